"""Anchor points: few examples that stand for all, chosen by how merges that are known anyway answer.

Examples on which all known merges do equally well tell alike merges apart alike, so one of them is enough.
Source: Vivek et al. 2024, "Anchor Points: Benchmarking Models with Much Fewer Examples"; k-means and a weight
for each cluster as in Maia Polo et al. 2024, "tinyBenchmarks".
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.cluster.vq import kmeans2

from rmm_lab.engine.scorer import Job
from rmm_lab.reward import Path


class Anchors(NamedTuple):
    """Rows of a split, (K,) in order, and the share of the split that each stands for, (K,), sum 1."""

    rows: np.ndarray
    weights: np.ndarray


def choose_anchors(answers: np.ndarray, n: int, seed: int | Sequence[int] = 0) -> Anchors:
    """At most n anchor points of examples that known merges answered.

    answers: (examples, merges), how right each merge is, or how near the expert. Each merge is standardised,
    so that one that varies little counts as much; one that answers all examples alike counts nothing. Each
    of n clusters (k-means) is represented by the example nearest to its centre, an empty one by none.
    """
    spread = answers.std(0)
    scaled = (answers - answers.mean(0)) / np.where(spread > 1e-9, spread, np.inf)  # (E, M)
    n = min(n, len(np.unique(scaled, axis=0)))
    rng = np.random.default_rng(seed)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # an empty cluster
        centres, cluster = kmeans2(scaled, n, minit="++", rng=rng)  # (K, M), (E,)
    apart = np.linalg.norm(
        scaled - centres[cluster], axis=1
    )  # (E,) from the centre of its own cluster
    clusters = [np.flatnonzero(cluster == c) for c in np.unique(cluster)]
    rows = {int(own[apart[own].argmin()]): len(own) / len(scaled) for own in clusters}
    return Anchors(np.array(sorted(rows)), np.array([rows[row] for row in sorted(rows)]))


def known_answers(scorer: Any, paths: Sequence[Path]) -> list[np.ndarray]:
    """How nearly each path answers as each task's own expert does: a task's (examples, paths), in [0, 1].

    scorer: whose ``choice`` is ``agreement``, which reads no label; or ``likelihood``: how likely the right
    answer is.
    """
    found: list[list[np.ndarray]] = [[] for _ in scorer.tasks]
    for j, (i, _) in enumerate(scorer.parts(None)):
        answers, _ = scorer.work(Job(None, j, tuple(paths)))
        found[i].append(np.stack([own.reshape(len(own), -1)[:, 0].numpy() for own in answers], -1))
    return [np.concatenate(parts) for parts in found]
