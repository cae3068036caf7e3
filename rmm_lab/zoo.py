"""Makes the checkpoints that ship, and fine-tunes a user's own: pretrain, fine-tune, multi-task.

``python -m rmm_lab.zoo`` rebuilds everything under ``data/`` from nothing, seeded.
``python -m rmm_lab.zoo finetune --base B --images FOLDER --out E`` makes one expert (or, with several
image folders, a multi-task model) from any base that this kit can merge.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rmm_lab import models, render, tasks
from rmm_lab.errors import InputError, one_sentence
from rmm_lab.models import Checkpoint

# A ViT of 6 layers, width 64 and 16 patches of 7 x 7 pixels: about 0.3 M parameters.
SMALL_VIT: dict[str, Any] = {
    "architecture": "vit_tiny_patch16_224",
    "model_args": {
        "img_size": 28,
        "patch_size": 7,
        "in_chans": 1,
        "embed_dim": 64,
        "depth": 6,
        "num_heads": 4,
    },
    "pretrained_cfg": {
        "input_size": [1, 28, 28],
        "mean": [0.5],
        "std": [0.5],
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "license": "mit",
    },
}
# The pairs whose multi-task model ships; the first is the demo's.
PAIRS = (("digits", "textures"), ("letters", "symbols"), ("digits", "letters"))
GROUPS: dict[str, tuple[str, ...]] = {
    "demo": ("digits", "textures"),
    "glyphs": ("letters", "symbols"),
    "vision": ("digits", "letters", "textures"),
}


def model_folder(name: str) -> Path:
    """The folder of a ViT that ships: ``base``, a task's name, or two joined by ``+``."""
    return tasks.data_folder() / "models" / "vit" / name


def is_shipped(name: str) -> bool:
    """Whether ``name`` is an expert that ships rather than a folder or hub name."""
    return name in tasks.SMALL


def locate(name: str) -> str:
    """The folder of a model that ships, by its name; any other source as it is."""
    return str(model_folder(name)) if is_shipped(name) or name == "base" else name


# ---------------------------------------------------------------------------------------- training


def train(
    model: nn.Module,
    batches: Callable[[torch.Generator], list[tuple[Tensor, Tensor, slice]]],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    label: str,
    weight_decay: float = 0.05,
) -> None:
    """AdamW under a cosine schedule with 5 % warm-up; the loss is the mean over the batches' tasks.

    batches: gives, for a step, ``(images (n, C, H, W) float, labels (n,), slice of the logits)`` of
    each task; a task's cross-entropy sees its own slice only.
    """
    generator = torch.Generator().manual_seed(seed)
    model.train().requires_grad_(True)
    # A share that no whole number of steps turns into exactly one, by which the schedule divides.
    warm_up = 0.05 if steps >= 40 else 0.55
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=learning_rate, total_steps=steps, pct_start=warm_up
    )
    start = time.perf_counter()
    for step in range(steps):
        losses = [
            nn.functional.cross_entropy(model(x)[:, part], y, label_smoothing=0.05)
            for x, y, part in batches(generator)
        ]
        loss = torch.stack(losses).mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if (step + 1) % max(1, steps // 20) == 0 or step + 1 == steps:
            left = (time.perf_counter() - start) / (step + 1) * (steps - step - 1)
            print(
                f"\r{label}: step {step + 1}/{steps}  loss {loss.item():.3f}  {left:4.0f} s left ",
                end="" if step + 1 < steps else "\n",
                flush=True,
            )
    model.eval().requires_grad_(False)


@torch.inference_mode()
def accuracy(
    model: nn.Module, task: tasks.Task, split: str, part: slice = slice(None), batch: int = 256
) -> float:
    """Share of a split's images that the model, with the logits in ``part``, classifies correctly."""
    data = task.split(split)
    right = 0
    for i in range(0, len(data), batch):
        logits = model(task.format.normalise(data.images[i : i + batch]))[:, part]
        right += int((logits.argmax(-1) == data.labels[i : i + batch]).sum())
    return right / len(data)


def fine_tune(
    base: Checkpoint,
    on: Sequence[tasks.Task],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    batch_size: int = 128,
    label: str = "fine-tune",
    augment: bool = True,
) -> tuple[dict[str, Any], models.Weights]:
    """Fine-tune all of a base on the train split of one task (an expert) or several (multi-task).

    Images are turned by at most 8 degrees, scaled by a tenth and shifted by at most 7 %: safe for
    digits, letters and signs, which flips are not. Returns the timm config and the weights.
    """
    total = sum(len(task.classes) for task in on)
    torch.manual_seed(seed)  # timm initialises the new head from the global generator
    model = models.create(base.config, depth=None, num_classes=total)
    weights = {k: v for k, v in base.weights.items() if not k.startswith("head.")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or any(not name.startswith("head.") for name in missing):
        raise InputError(
            f"base {base.source!r}: expected the weights that its config.json describes, found "
            f"{(unexpected + missing)[0]!r} out of place; save the model with timm again"
        )
    parts, start = [], 0
    for task in on:
        parts.append(slice(start, start + len(task.classes)))
        start += len(task.classes)

    def batches(generator: torch.Generator) -> list[tuple[Tensor, Tensor, slice]]:
        out = []
        for task, part in zip(on, parts, strict=True):
            data = task.split("train")
            rows = torch.randint(len(data), (batch_size // len(on),), generator=generator)
            images = task.format.normalise(data.images[rows])
            if augment:
                low = images.amin()  # what comes in from outside the frame is background
                images = low + render.distort(
                    images - low, generator, degrees=8, scale=(0.9, 1.1), shift=0.07
                )
            out.append((images, data.labels[rows], part))
        return out

    train(model, batches, steps=steps, learning_rate=learning_rate, seed=seed, label=label)
    config = models.model_config(base.config, depth=None, num_classes=total)
    if len(on) == 1:
        config["label_names"] = list(on[0].classes)
    else:
        config["label_names"] = [f"{task.name}/{c}" for task in on for c in task.classes]
        config["rmm_lab"] = {
            "heads": {t.name: [p.start, p.stop] for t, p in zip(on, parts, strict=True)}
        }
    return config, dict(model.state_dict())


def pretrain(*, steps: int, seed: int) -> tuple[dict[str, Any], models.Weights]:
    """The small ViT from random weights on glyphs of scripts that no task uses."""
    n_classes = len(render.BASE_GLYPHS)
    per_class = 250
    images = render.glyphs("base", per_class, seed=10)  # (n, 1, 28, 28) uint8
    labels = torch.arange(n_classes).repeat_interleave(per_class)
    fmt = tasks.InputFormat.of(SMALL_VIT)
    torch.manual_seed(seed)
    model = models.create(SMALL_VIT, depth=None, num_classes=n_classes)

    def batches(generator: torch.Generator) -> list[tuple[Tensor, Tensor, slice]]:
        rows = torch.randint(len(labels), (128,), generator=generator)
        x = render.distort(
            fmt.normalise(images[rows]) + 1, generator, degrees=8, scale=(0.9, 1.1), shift=0.05
        )
        return [(x - 1, labels[rows], slice(None))]

    train(model, batches, steps=steps, learning_rate=2e-3, seed=seed, label="base")
    config = models.model_config(SMALL_VIT, depth=None, num_classes=n_classes)
    config["label_names"] = list(render.BASE_GLYPHS)
    return config, dict(model.state_dict())


# --------------------------------------------------------------------------------------- commands


@dataclass
class Build:
    """Rebuild the small sets and every checkpoint under data/ from nothing."""

    threads: int = 1
    """CPU threads for torch; the checkpoints that ship were made with one."""
    seed: int = 0
    """Seed of every initialisation and batch."""
    only: tuple[str, ...] = ()
    """Rebuild only these (sets, base, digits, digits+textures, ...); empty rebuilds all."""
    pretrain_steps: int = 3000
    """Steps of 128 images for the base."""
    steps: int = 1500
    """Steps of 128 images for each expert and each multi-task model."""
    learning_rate: float = 1e-3
    """Peak learning rate of fine-tuning."""

    def run(self) -> None:
        torch.set_num_threads(self.threads)
        groups = [(name,) for name in tasks.SMALL] + list(PAIRS)
        known = ["sets", "base", *map("+".join, groups)]
        if unknown := set(self.only) - set(known):
            raise InputError(
                f"--only: expected some of {', '.join(known)}, found {unknown.pop()!r}"
            )
        wanted = self.only or known
        for name in tasks.SMALL if "sets" in wanted else ():
            for split in ("reward", "test") if name != "digits" else tasks.SPLITS:
                print(f"set: {tasks.write_sheet(name, split)}")
        if "base" in wanted:
            config, weights = pretrain(steps=self.pretrain_steps, seed=self.seed)
            models.write_checkpoint(model_folder("base"), config, weights, dtype=torch.float16)
        base = models.read_checkpoint(model_folder("base"))
        fmt = tasks.InputFormat.of(base.config)
        small = {name: tasks.Task(name, fmt) for name in tasks.SMALL}
        for group in groups:
            name = "+".join(group)
            if name not in wanted:
                continue
            config, weights = fine_tune(
                base,
                [small[n] for n in group],
                steps=self.steps,
                learning_rate=self.learning_rate,
                seed=self.seed + 1,
                label=name,
            )
            models.write_checkpoint(model_folder(name), config, weights, dtype=torch.float16)


@dataclass
class Finetune:
    """Fine-tune a base on image folders: one folder makes an expert, several a multi-task model."""

    base: str
    """Base model: a timm folder, hf-hub:OWNER/NAME, or base for the small one that ships."""
    images: tuple[str, ...]
    """Image folders (SPLIT/CLASS/image or CLASS/image) or sets that ship; the train split is used."""
    out: Path
    """Folder to write the fine-tuned model to; it must not exist or be empty."""
    steps: int = 1000
    """Optimiser steps."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    batch_size: int = 128
    """Images per step."""
    threads: int = 0
    """CPU threads for torch; 0 leaves torch's own choice."""
    seed: int = 0
    """Seed of the new head and the batches."""

    def run(self) -> None:
        for name in ("steps", "learning_rate", "batch_size"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(
                    f"--{name.replace('_', '-')}: expected more than 0, found {getattr(self, name)}"
                )
        if self.threads < 0:
            raise InputError(f"--threads: expected 0 or more, found {self.threads}")
        if not self.images:
            raise InputError("--images: expected at least one folder, found none; name one")
        if self.batch_size < len(self.images):
            raise InputError(
                f"--batch-size: expected at least {len(self.images)}, an image of each task, found "
                f"{self.batch_size}"
            )
        if self.out.is_file():
            raise InputError(f"--out: expected an empty or new folder, found a file: {self.out}")
        if self.out.exists() and any(self.out.iterdir()):
            raise InputError(f"--out: expected an empty or new folder, found files in {self.out}")
        if self.threads:
            torch.set_num_threads(self.threads)
        base = models.read_checkpoint(locate(self.base))
        fmt = tasks.InputFormat.of(base.config)
        on = [tasks.Task(folder, fmt) for folder in self.images]
        if len({task.name for task in on}) < len(on):
            raise InputError(
                f"--images: expected folders of different names, found {[t.name for t in on]}; rename"
            )
        for task in on:  # a broken image must show before hours of training
            task.split("train"), task.split("test")
        config, weights = fine_tune(
            base,
            on,
            steps=self.steps,
            learning_rate=self.learning_rate,
            seed=self.seed,
            batch_size=self.batch_size,
        )
        models.write_checkpoint(self.out, config, weights)
        model = models.ViT(config)
        parts = models.split(weights)
        net = model.assemble(parts.stem, parts.layers, {"head": parts.head})
        start = 0
        for task in on:
            part = slice(start, start := start + len(task.classes))
            print(f"{task.name}: {100 * accuracy(net, task, 'test', part):.1f} % of the test split")
        print(f"written: {self.out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["finetune"]:
            tyro.cli(Finetune, args=argv[1:], prog="python -m rmm_lab.zoo finetune").run()
        else:
            tyro.cli(Build, args=argv, prog="python -m rmm_lab.zoo", description=__doc__).run()
    except (InputError, OSError) as error:
        print(f"error: {one_sentence(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
