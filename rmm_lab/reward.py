"""What a layer path is, and what it is worth: the reward of Eq. 7, evaluated in the plainest way.

A *path* is a tuple of steps in the order in which their layers run. A *step* takes layer k of a source: an
expert's own layer, or all experts' layers merged by an operator.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from rmm_lab.errors import InputError
from rmm_lab.formulas.checks import option_text
from rmm_lab.tasks.metrics import answers


class Step(NamedTuple):
    """One step of a path.

    ``source``: an expert's name, an operator's specification such as ``ties:density=0.3``, or ``base``.
    ``layer``: its place, k, or -1 for the *stem*, the weights outside layers and heads. ``scales``: with the
    source ``task_arithmetic``, one for each of N >= 2 experts, or of ``LayerPool.members``; else empty.
    """

    source: str
    layer: int
    scales: tuple[float, ...] = ()

    def __str__(self) -> str:
        scales = f":scale={option_text(self.scales)}" if self.scales else ""
        return f"{self.source}{scales}@{self.layer}"


Path = tuple[Step, ...]
_NUMBER = r"-?\d+\.?\d*(?:e[+-]?\d+)?"
_STEP = re.compile(  # scales of another operator than task_arithmetic belong to its source
    rf"(?P<source>\S+?)((?<=^task_arithmetic):scale=(?P<scales>{_NUMBER}(/{_NUMBER})+))?@(?P<layer>-?\d+)"
)


def path_text(path: Path) -> str:
    """A path as text, such as ``digits@0 ties@1 task_arithmetic:scale=0.3/0.5@2``."""
    return " ".join(map(str, path))


def parse_path(text: str) -> Path:
    """The inverse of ``path_text``; InputError for anything else."""
    steps = []
    for word in text.split():
        if (match := _STEP.fullmatch(word)) is None:
            raise InputError(
                f"path: expected steps such as digits@0 or ties@1, found {word!r}; correct it"
            )
        scales = tuple(map(float, match["scales"].split("/"))) if match["scales"] else ()
        steps.append(Step(match["source"], int(match["layer"]), scales))
    return tuple(steps)


def split_stem(path: Path, default: str = "base") -> tuple[Step, Path]:
    """The stem and the layers of a path; one that does not start at place -1 has the stem of ``default``."""
    has_stem = path[:1] and path[0].layer == -1
    return (path[0], path[1:]) if has_stem else (Step(default, -1), path)


class PathScorer(Protocol):
    """What scores paths, as the environment needs it; ``engine.scorer.Scorer`` is one."""

    sources: tuple[str, ...]  # N models, then M operators
    n_models: int  # N
    n_layers: int  # L
    stacks: Sequence[range]  # layers that may follow each other: one stack for a ViT, two for a T5
    n_subsets: int  # of the reward split
    task_names: list[str]
    chooses_stem: bool  # whether a path may start with a step at place -1

    def score(self, path: Path, subset: int | None = None) -> np.ndarray:
        """Each task's metric on a subset, or on all examples for None: (N,) in [0, 1]."""
        ...


def places_of(scorer: PathScorer) -> range:
    """The places of a scorer's paths: -1 for the stem, if it is chosen, then the layers."""
    return range(-1 if scorer.chooses_stem else 0, scorer.n_layers)


def reward(scores: np.ndarray) -> float:
    """R = 1/N sum_i metric(F_M(X_i), Y_i), Eq. 7. scores: (N,) in [0, 1] -> reward in [0, 1]."""
    return float(np.mean(scores))


def partition(n: int, n_subsets: int, seed: int) -> list[np.ndarray]:
    """Split n examples at random into subsets whose sizes differ by one at most.

    If there are fewer examples than subsets, each subset has one example, and some examples repeat.
    Returns ``n_subsets`` arrays of row numbers.
    """
    order = np.random.default_rng(seed).permutation(n)
    if n < n_subsets:
        return [order[[i % n]] for i in range(n_subsets)]
    return [np.sort(part) for part in np.array_split(order, n_subsets)]


# ----------------------------------------------------------- a path, evaluated from beginning to end
# ``engine.scorer.Scorer`` gives the same scores faster: it keeps activations that paths share.

BATCH = 64  # examples that go through a model at a time


class Task(Protocol):
    """What evaluation needs of a task, of images or texts."""

    name: str
    metric: Any  # the metric's name, a str

    def split(self, name: str) -> Any:
        """A split of the data: its length, and ``labels`` (n,) int64."""

    def batch(self, name: str, rows: np.ndarray | slice) -> Any:
        """Rows of a split as the models take them."""

    def score(self, found: Tensor, labels: Tensor) -> float:
        """The task's metric of answers, in [0, 1]; both (n,)."""


@torch.inference_mode()
def predict(
    architecture: Any,
    stem: Any,
    layers: Sequence[Any],
    head: Any,
    task: Task,
    split: str,
    rows: np.ndarray | None = None,
    device: str = "cpu",
) -> Tensor:
    """A model's answers to a task, (n,): numbers of classes or choices.

    The model comes in pieces: modules ``stem`` and ``layers``, tensors ``head``, and the ``architecture``
    that runs them. rows: (n,) examples of the split; None: all. device: where it runs, on copies.
    """
    if device != "cpu":
        stem, *layers = (copy.deepcopy(module).to(device) for module in (stem, *layers))
        head = {name: tensor.to(device) for name, tensor in head.items()}
    rows = np.arange(len(task.split(split))) if rows is None else rows
    found = []
    for start in range(0, len(rows), BATCH):
        batch = task.batch(split, rows[start : start + BATCH])
        state = architecture.embed(stem, architecture.place(batch, device, torch.float32))
        for layer in layers:
            state = architecture.apply(layer, state)
        logits = architecture.logits(stem, state, head)  # (n, answers)
        found.append(answers(task, logits))  # (n, answers) -> (n,)
    return torch.cat(found)


def predict_all(
    pool: Any,
    tasks: Sequence[Task],
    path: Path,
    split: str,
    device: str = "cpu",
    rows: Sequence[np.ndarray | None] = (),
) -> list[Tensor]:
    """Each task's answers (n,) by a path through a ``LayerPool``, with the task's own head.

    rows: each task's, see ``predict``; by default all.
    """
    first, steps = split_stem(path)
    stem = pool.stem(first.source, first.scales)
    layers = [pool.layer(*step, prefix=(first, *steps[:i])) for i, step in enumerate(steps)]
    model = pool.architecture, stem, layers
    each = zip(pool.names, tasks, rows or [None] * len(tasks), strict=True)
    return [predict(*model, pool.heads[name], task, split, own, device) for name, task, own in each]


def evaluate(
    pool: Any, tasks: Sequence[Task], path: Path, split: str, device: str = "cpu"
) -> np.ndarray:
    """Each task's metric of a path on a whole split, (N,) in [0, 1]; ``reward`` of it is Eq. 7."""
    pairs = zip(tasks, predict_all(pool, tasks, path, split, device), strict=True)
    return np.array([task.score(found, task.split(split).labels) for task, found in pairs])
