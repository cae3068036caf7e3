"""A merging problem so small that every path can be scored: ground truth for a search.

Formulas draw images of 8 x 8 pixels, and ``tiny_problem`` trains three ViTs of three blocks on them.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path as Folder
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmm_lab.engine.scorer import Scorer
from rmm_lab.errors import InputError
from rmm_lab.families import vit
from rmm_lab.families.checkpoint import Checkpoint
from rmm_lab.layers import LayerPool
from rmm_lab.reward import Path, Step
from rmm_lab.search.problem import Problem, ProblemSpec
from rmm_lab.tasks.image_task import SPLITS, InputFormat, Split, Task
from rmm_lab.zoo.training import fine_tune

SIZE = 8  # pixels
PER_CLASS = (100, 60, 60)  # images of train, reward and test
NOISE = 0.2  # standard deviation of the noise on each pixel; brightness is 0 to 1
# A ViT of 3 layers, width 16 and 4 patches of 4 x 4 pixels.
TINY_VIT: dict[str, Any] = {
    "architecture": "vit_tiny_patch16_224",
    "model_args": {"img_size": SIZE, "patch_size": 4, "in_chans": 1}
    | {"embed_dim": 16, "depth": 3, "num_heads": 2},
    "pretrained_cfg": {"input_size": [1, SIZE, SIZE], "mean": [0.5], "std": [0.5]},
}
OPERATORS = ("weight_average", "ties")
Draw = Callable[[Tensor, torch.Generator], Tensor]


def ramps(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Brightness grows to the right, down, left or up, twice. labels (n,) 0 to 3 -> (n, 8, 8)."""
    saw = torch.linspace(0.25, 0.75, SIZE // 2).repeat(2).expand(SIZE, SIZE)  # to the right, twice
    return torch.stack([torch.rot90(saw, -k) for k in range(4)])[labels]


def stripes(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Upright bars, level bars or checks, at a random phase. labels (n,) 0 to 2 -> (n, 8, 8)."""
    phase = 6.3 * torch.rand(len(labels), 1, 1, generator=generator)
    place = 1.6 * torch.arange(SIZE).float()
    upright = torch.sin(place + phase).expand(-1, SIZE, SIZE)
    level = torch.sin(place[:, None] + phase).expand(-1, SIZE, SIZE)
    waves = torch.stack([upright, level, upright * level], 1)  # (n, 3, 8, 8)
    return 0.5 + 0.4 * waves[torch.arange(len(labels)), labels]


def quarters(labels: Tensor, generator: torch.Generator) -> Tensor:
    """One to four random quarters are bright. labels (n,) 0 to 3 -> (n, 8, 8)."""
    order = torch.rand(len(labels), 4, generator=generator).argsort(1).argsort(1)  # (n, 4) ranks
    bright = (order <= labels[:, None]).float().view(-1, 2, 2)
    half = SIZE // 2
    return 0.3 + 0.35 * bright.repeat_interleave(half, 1).repeat_interleave(half, 2)


class DrawnTask(Task):
    """A task whose images a formula draws, with noise.

    Args:
        name: of the task. classes: their names. draw: (labels (n,), generator) -> images (n, 8, 8) in
            [0, 1]. seed: of the noise.
    """

    def __init__(self, name: str, classes: list[str], draw: Draw, *, seed: int) -> None:
        self.name, self.source, self.classes = name, name, classes
        self.format = InputFormat.of(TINY_VIT)
        self._splits = {}
        for i, (split, n) in enumerate(zip(SPLITS, PER_CLASS, strict=True)):
            generator = torch.Generator().manual_seed(10 * seed + i)
            labels = torch.arange(len(classes)).repeat_interleave(n)
            images = draw(labels, generator)
            images = images + NOISE * torch.randn(images.shape, generator=generator)
            pixels = (255 * images.clamp(0, 1)).to(torch.uint8)[:, None]  # (n, 1, 8, 8)
            self._splits[split] = Split(pixels, labels)


def tiny_problem(seed: int = 0) -> Problem:
    """N = 2 experts (ramps, stripes), M = 2 operators, L = 3 layers, trained in a few seconds.

    A ViT of random weights learns to count bright quarters: the base. Two copies of it learn a task each.
    The stem is always the weight average, so that a path has layers only. As in every task, ``train`` made
    the experts, ``reward`` is for searching, ``test`` for reporting.
    The same seed gives the same weights on one machine; elsewhere rounding may change them.
    """
    before = DrawnTask("quarters", ["one", "two", "three", "four"], quarters, seed=3 * seed)
    tasks = [
        DrawnTask("ramps", ["right", "down", "left", "up"], ramps, seed=3 * seed + 1),
        DrawnTask("stripes", ["upright", "level", "checks"], stripes, seed=3 * seed + 2),
    ]
    config = vit.model_config(TINY_VIT, depth=None, num_classes=len(before.classes))
    with torch.random.fork_rng():  # timm draws weights from the global generator
        torch.manual_seed(seed)
        weights = vit.create(TINY_VIT, depth=None, num_classes=len(before.classes)).state_dict()
        start = Checkpoint("tiny-start", Folder("."), config, dict(weights), "tiny-start")
        base = _fit(start, before, "tiny-base", steps=100, seed=seed)
        experts = [_fit(base, task, task.name, steps=200, seed=seed) for task in tasks]
    names = tuple(task.name for task in tasks)
    pool = LayerPool(base, experts, names, OPERATORS, seed=seed)
    spec = ProblemSpec(experts=names, operators=OPERATORS, stem="weight_average", seed=seed)
    return Problem(pool, list(tasks), spec)


def _fit(start: Checkpoint, task: Task, name: str, *, steps: int, seed: int) -> Checkpoint:
    """A copy of a checkpoint fine-tuned on a task, without the progress bar."""
    with contextlib.redirect_stderr(io.StringIO()):
        config, weights = fine_tune(
            start, [task], steps=steps, learning_rate=5e-3, seed=seed, batch_size=64, augment=False
        )
    return Checkpoint(f"tiny-{name}", Folder("."), config, weights, f"tiny-{name}")


def all_paths(
    sources: Sequence[str],
    n_layers: int,
    *,
    skips: bool = False,
    backs: int | None = 0,
    max_depth: int | None = None,
) -> list[Path]:
    """Every path that an agent can compose in one stack, each once, in a fixed order.

    sources: models and operators. skips: whether a layer may be left out. backs: how often at most the
    agent goes back a layer; None: any number, which needs a ``max_depth``, the most layers of a path. With
    skips there is the empty path, stem and head alone. Without skips and backs there are
    ``len(sources) ** n_layers``: only small problems can be listed. Raises InputError.
    """
    left, deepest = (math.inf if n is None else n for n in (backs, max_depth))
    if not sources or n_layers < 1 or not 0 <= min(left, deepest) < math.inf:
        raise InputError(
            "all_paths: expected at least 1 source and 1 layer, backs of 0 or more (None: any number, with "
            f"a max_depth), found {len(sources)} sources, n_layers {n_layers}, backs {backs}, max_depth "
            f"{max_depth}; correct them"
        )
    start: tuple[int, float, Path] = (0, left, ())  # layer, backs left, path so far
    seen, walks, found = {start}, [start], set()
    while walks:
        k, left, path = walks.pop()
        if k == n_layers:
            found.add(path)
            continue
        steps = [Step(source, k) for source in sources] if len(path) < deepest else []
        after = {(k + 1, left, (*path, step)) for step in steps}
        if skips:
            after.add((k + 1, left, path))
        if left and k:
            after.add((k - 1, left - 1, path))
        walks += after - seen
        seen |= after
    number = {source: a for a, source in enumerate(sources)}
    return sorted(found, key=lambda path: [(number[step.source], step.layer) for step in path])


def score_all(scorer: Scorer, paths: Sequence[Path]) -> np.ndarray:
    """Each task's metric of each path on all examples of the scorer's split: (P, N) in [0, 1].

    The order of ``all_paths`` is fastest: paths that begin alike follow each other and share activations.
    """
    return np.stack([scorer.score(path, None) for path in paths])
