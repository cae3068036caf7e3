"""How a model learns: the training loop, and fine-tuning a base on tasks.

A model fine-tuned on one task is an expert, one fine-tuned on several tasks a multi-task model. Gradients
touch a model's weights only here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import trange

from rmm_lab.errors import InputError
from rmm_lab.families.checkpoint import Checkpoint
from rmm_lab.families.parts import Weights


def optimise(
    model: nn.Module,
    losses: Callable[[torch.Generator], Sequence[Tensor]],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    label: str,
    weight_decay: float = 0.05,
    watch: Callable[[int], None] | None = None,
) -> None:
    """AdamW with a cosine schedule and 5 % warm-up; the loss of a step is the mean over tasks.

    losses: gives each task's loss for a step, scalars. watch: called after each quarter of the steps with
    their number. Ctrl-C leaves the model as it is and says after how many steps: "12 of 100 steps".
    """
    generator = torch.Generator().manual_seed(seed)
    model.train().requires_grad_(True)
    # The schedule divides by the warm-up's steps less one, so their number must not be exactly one.
    warm_up = 0.05 if steps >= 40 else 0.55
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=learning_rate, total_steps=steps, pct_start=warm_up
    )
    progress, done = trange(steps, desc=label, unit="step", mininterval=0.5), 0
    try:
        for step in progress:
            loss = torch.stack(list(losses(generator))).mean()
            if not torch.isfinite(loss):
                raise InputError(
                    f"{label}: expected a finite loss, found {loss.item()} at step {step + 1} of {steps}; "
                    "lower the learning rate"
                )
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            done = step + 1
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            quarter = done * 4 // steps > step * 4 // steps
            # Weights that are not finite any more give no score; the next loss tells.
            if watch is not None and quarter and all(map(is_finite, model.parameters())):
                watch(done)
    except KeyboardInterrupt:
        progress.close()
        raise KeyboardInterrupt(f"{done} of {steps} steps" if done else "") from None
    finally:
        model.eval().requires_grad_(False)


def is_finite(tensor: Tensor) -> bool:
    """Whether no number of a tensor is NaN or infinite."""
    return bool(torch.isfinite(tensor).all())


def fine_tune(
    base: Checkpoint,
    tasks: Sequence[Any],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    batch_size: int = 128,
    label: str = "fine-tune",
    augment: bool = True,
    device: str = "cpu",
    balance: bool = False,
    begin: Weights | None = None,
    watch: Callable[[int, dict[str, Any], Weights], None] | None = None,
    keep: Callable[[str, dict[str, Any], Weights], None] | None = None,
) -> tuple[dict[str, Any], Weights]:
    """Fine-tune all weights on the train split of one task (an expert) or several (a multi-task model).

    tasks: of the base's family. augment: whether images are distorted a little. balance: whether all answers
    of a task weigh the same in its loss, however frequent. begin: tensors that the model begins with in place
    of its own, such as a head that was fitted to the base's features. watch: called after each quarter of the
    steps with their number, config.json and weights so far, which change as it goes on; keep: after Ctrl-C,
    which is raised again, with "12 of 100 steps" and the same. Returns config.json and the weights, on
    ``device``.
    """
    # Named only where it is asked for: a family whose tasks have no answers of their own need not know it.
    more = {"balance": True} if balance else {}
    model, losses, result = base.family.trainable(
        base, tasks, seed=seed, batch_size=batch_size, augment=augment, **more
    )
    if begin is not None:
        model.load_state_dict(begin, strict=False)
    model.to(device)

    def after(step: int) -> None:
        if watch is not None:
            watch(step, *result())

    options: dict[str, Any] = {"steps": steps, "learning_rate": learning_rate, "seed": seed}
    try:
        optimise(model, losses, **options, label=label, watch=after)
    except KeyboardInterrupt as stopped:
        if keep is not None and str(stopped):
            keep(str(stopped), *result())
        raise
    return result()
