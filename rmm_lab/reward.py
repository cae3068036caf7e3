"""What a layer path is, and what it is worth: the reward of Eq. 7.

A *path* is a tuple of steps in the order in which their layers run. A *step* takes layer k of a source: an
expert's own layer, or all experts' layers merged by an operator.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from rmm_lab.errors import InputError


class Step(NamedTuple):
    """One step of a path.

    ``source``: an expert's name, an operator's specification such as ``ties:density=0.3``, or ``base``.
    ``layer``: k, or -1 for the *stem*, the weights outside layers and heads. ``scales``: with the source
    ``task_arithmetic``, one scale per expert; else empty.
    """

    source: str
    layer: int
    scales: tuple[float, ...] = ()

    def __str__(self) -> str:
        scales = ":scale=" + "/".join(f"{s:g}" for s in self.scales) if self.scales else ""
        return f"{self.source}{scales}@{self.layer}"


Path = tuple[Step, ...]
_STEP = re.compile(r"(?P<source>\S+?)(:scale=(?P<scales>[^\s/,@]+(/[^\s/,@]+)+))?@(?P<layer>-?\d+)")


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


class PathScorer(Protocol):
    """What scores paths, as the environment needs it; ``engine.scorer.Scorer`` is one."""

    sources: tuple[str, ...]  # N models, then M operators
    n_models: int  # N
    n_layers: int  # L
    stacks: Sequence[range]  # layers that may follow each other: one stack for a ViT, two for a T5
    n_subsets: int  # of the reward split
    task_names: list[str]
    chooses_stem: bool  # whether a path may start with a step at layer -1

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

    With fewer examples than subsets each subset has one example, and examples are used again.
    Returns ``n_subsets`` arrays of row numbers.
    """
    order = np.random.default_rng(seed).permutation(n)
    if n < n_subsets:
        return [order[[i % n]] for i in range(n_subsets)]
    return [np.sort(part) for part in np.array_split(order, n_subsets)]
