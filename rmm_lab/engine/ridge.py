"""Which ridge a least-squares layer takes: the one that does best on inputs that it was not fitted to."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rmm_lab.matching import step, sums

WIDE, OUTPUTS = 300, 64  # see ``choose_ridge``
# What a ridge is chosen from; the last one stands for the anchor itself.
RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, float("inf"))


def choose_ridge(
    xx: Sequence[Tensor] | Tensor,
    xy: Sequence[Tensor] | Tensor,
    *,
    weights: Tensor,
    anchor: Tensor,
    ridges: Sequence[float] = RIDGES,
) -> float:
    """The ridge whose solution on some inputs does best on others: cross-validation over folds.

    xx: K times (N, D, D) and xy: K times (N, D, O), of K >= 2 disjoint folds of each task's inputs, each
    divided by its number of rows; a fold without rows of a task is all 0, and such a task is not scored
    there. weights: (N,); anchor: (O, D); ridges: ascending. Returns the largest of the best ridges; infinity,
    the anchor, where no fold can be held out. Source: Hastie et al. 2009, Sec. 7.10.

    A layer of more than ``WIDE`` inputs is scored on the first fold and on ``OUTPUTS`` of its outputs, and
    only up to a ridge whose neighbours are no better: each one costs a factorisation.
    """
    wide = anchor.shape[1] > WIDE
    columns = torch.arange(anchor.shape[0])
    if wide and len(columns) > OUTPUTS:
        columns = torch.linspace(0, len(columns) - 1, OUTPUTS).long()
    start, splits = anchor.double().T[:, columns], []
    for held in range(1 if wide else len(xx)):
        rest = [k for k in range(len(xx)) if k != held]
        usable = _there(together([xx[k] for k in rest])) & _there(xx[held])  # (N,)
        if not (weights * usable).any():
            continue
        a, b = sums(
            together([xx[k] for k in rest]),
            together([xy[k][..., columns] for k in rest]),
            weights,
        )
        held_a, held_b = sums(xx[held], xy[held][..., columns], weights * usable)
        way = _solved if wide else _turned
        splits.append(way(a, b, held_a, held_b, start, xx[0].dtype))
    if not splits:
        return float("inf")

    @functools.cache
    def error(ridge: float) -> float:
        """The mean of |W x - y|^2, less what is the same for all ridges."""
        return sum(split(ridge) for split in splits)

    if wide:
        at = len(ridges) // 2
        while better := [
            n
            for n in (at - 1, at + 1)
            if 0 <= n < len(ridges) and error(ridges[n]) < error(ridges[at])
        ]:
            at = better[0]
        return ridges[at]
    best = min(map(error, ridges))
    return max(ridge for ridge in ridges if error(ridge) <= best)


Split = Callable[
    [float], float
]  # ridge -> error on what is held out, less that of the anchor or |y|^2


def _turned(a: Tensor, b: Tensor, held_a: Tensor, held_b: Tensor, start: Tensor, _: Any) -> Split:
    """In the directions of a's eigenvectors one decomposition serves every ridge.

    There the solution is ``first + c * moved``, row by row, with a c for each direction and ridge, and its
    error is a quadratic in c: outputs are summed over once, for all ridges.
    """
    values, turn = torch.linalg.eigh(a)  # (D,), (D, D)
    first, moved = turn.T @ start, turn.T @ (b - a @ start)  # (D, O)
    held_a, held_b = turn.T @ held_a @ turn, turn.T @ held_b
    square = held_a * (moved @ moved.T)  # (D, D)
    slope = (moved * (held_a @ first - held_b)).sum(1)  # (D,)
    mean, least = float(a.diagonal().mean()), torch.finfo(a.dtype).tiny

    def error(ridge: float) -> float:
        if ridge == float("inf"):
            return 0.0
        c = 1 / (values.clamp(min=0) + ridge * mean).clamp(min=least)  # (D,)
        return float(c @ square @ c + 2 * c @ slope)

    return error


def _solved(
    a: Tensor, b: Tensor, held_a: Tensor, held_b: Tensor, start: Tensor, dtype: torch.dtype
) -> Split:
    """With a factorisation for each ridge, which for wide layers is faster than one decomposition."""
    lack = b - a @ start  # (D, O), of all ridges

    def error(ridge: float) -> float:
        w = start + step(a, lack, ridge, dtype) if ridge < float("inf") else start  # (D, O)
        return float((w * (held_a @ w)).sum() - 2 * (w * held_b).sum())

    return error


def together(folds: Sequence[Tensor] | Tensor) -> Tensor:
    """The mean over folds, for each task over those that have rows: K times (N, D, O) -> (N, D, O)."""
    if len(folds) == 1:
        return folds[0]
    there = torch.stack([_there(fold) for fold in folds]).to(folds[0].dtype)  # (K, N)
    share = there / there.sum(0).clamp(min=1)
    total = torch.zeros_like(folds[0])
    for fold, own in zip(folds, share, strict=True):
        for i in range(len(own)):
            total[i].add_(fold[i], alpha=float(own[i]))
    return total


def _there(matrices: Tensor) -> Tensor:
    """Which tasks have rows: (N, D, O) -> (N,) bool."""
    return matrices.flatten(1).any(1)
