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
) -> None:
    """AdamW with a cosine schedule and 5 % warm-up; the loss of a step is the mean over tasks.

    losses: gives each task's loss for a step, scalars.
    """
    generator = torch.Generator().manual_seed(seed)
    model.train().requires_grad_(True)
    # The schedule divides by the warm-up's steps less one, so their number must not be exactly one.
    warm_up = 0.05 if steps >= 40 else 0.55
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=learning_rate, total_steps=steps, pct_start=warm_up
    )
    progress = trange(steps, desc=label, unit="step", mininterval=0.5)
    for step in progress:
        loss = torch.stack(list(losses(generator))).mean()
        if not torch.isfinite(loss):
            raise InputError(
                f"{label}: expected a finite loss, found {loss.item()} at step {step + 1} of {steps}; lower "
                "the learning rate"
            )
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval().requires_grad_(False)


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
) -> tuple[dict[str, Any], Weights]:
    """Fine-tune all weights on the train split of one task (an expert) or several (a multi-task model).

    tasks: of the base's family. augment: whether images are distorted a little. Returns config.json and the
    weights, on ``device``.
    """
    model, losses, result = base.family.trainable(
        base, tasks, seed=seed, batch_size=batch_size, augment=augment
    )
    model.to(device)
    optimise(model, losses, steps=steps, learning_rate=learning_rate, seed=seed, label=label)
    return result()
