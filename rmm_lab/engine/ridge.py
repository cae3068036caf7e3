"""Which ridge a least-squares layer takes: the one that does best on inputs that it was not fitted to."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rmm_lab import matching

MANY, WIDE, OUTPUTS = 128, 300, 64  # see ``Folds.choose``
# Errors in float32 tell ridges apart that differ by more than NEAR, if these are above SMALL.
NEAR, SMALL = 1e-3, 1e-4
# What a ridge is chosen from; the last one stands for the anchor itself.
RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, float("inf"))

Shares = list[list[float]]  # of K folds and N tasks
Error = Callable[..., float]  # of a ridge on what is held out, less that of the anchor


def choose_ridge(
    xx: Tensor,
    xy: Tensor,
    *,
    weights: Tensor,
    anchor: Tensor,
    ridges: Sequence[float] = RIDGES,
) -> float:
    """``Folds.choose`` of a single linear map; xx: (K, N, D, D); weights: (N,)."""
    return Folds(xx, weights).choose(xy, anchor, ridges)


class Folds:
    """The inputs of linear maps, as Gram matrices of K disjoint folds of each of N tasks' inputs.

    xx: (K, N, D, D), each divided by its number of rows; a fold without rows of a task is all 0. weights:
    (N,), at least 0, not all 0; only their ratios count. All maps of the same inputs share what is computed
    from these alone.
    """

    def __init__(self, xx: Tensor, weights: Tensor) -> None:
        k, n, d, _ = xx.shape
        diagonal = xx.diagonal(dim1=-2, dim2=-1)  # (K, N, D), finite only where all else is
        matching.check("xx", xx[:, :, :1], (k, n, 1, d))
        matching.check("xx", diagonal, (k, n, d))
        self._xx, self._weights = xx, matching.shares(weights, n)
        self._there = diagonal.any(-1).tolist()  # (K, N) bool
        # What is wide takes too much room.
        self._known: dict[tuple, Tensor] | None = {} if d <= WIDE else None
        self._splits: dict[int, _Split] = {}

    def solution(self, xy: Tensor, anchor: Tensor, ridge: float | str) -> Tensor:
        """A map that is fitted to all inputs, see ``matching.least_squares``: (O, D) in the anchor's dtype.

        xy: (K, N, D, O), the inputs' products with what the map should put out; anchor: (O, D); ridge: a
        number, or ``auto`` for the best.
        """
        matching.check("xy", xy, (*self._xx.shape[:3], len(anchor)))
        known: dict[tuple, Tensor] = {}
        if isinstance(ridge, str):
            ridge = self._choose(xy, anchor, RIDGES, known)
        if ridge == float("inf"):
            return anchor.clone()
        whole = self._shares(range(len(xy)))
        a, b = _mixed(self._xx, whole, self._known), _mixed(xy, whole, known)
        start = anchor.double().T
        return matching.towards(a, b, start, ridge, self._xx.dtype).T.to(anchor.dtype)

    def choose(self, xy: Tensor, anchor: Tensor, ridges: Sequence[float] = RIDGES) -> float:
        """The ridge whose solution on some inputs does best on others: cross-validation over folds.

        xy: (K, N, D, O); a task is not scored on a fold that lacks it; anchor: (O, D); ridges: ascending.
        Returns the largest of the best ridges; infinity, the anchor, where no fold can be held out. Source:
        Hastie et al. 2009, Sec. 7.10.

        Of more than ``MANY`` inputs each ridge costs a factorisation: only those are tried that lie between
        the middle one and one whose neighbours are no better. More than ``WIDE`` are scored on the first fold
        and on ``OUTPUTS`` of the outputs.
        """
        matching.check("xy", xy, (*self._xx.shape[:3], len(anchor)))
        return self._choose(xy, anchor, ridges, {})

    def _choose(
        self, xy: Tensor, anchor: Tensor, ridges: Sequence[float], known: dict[tuple, Tensor]
    ) -> float:
        """known: sums of xy, to be used again."""
        (outputs, d), start = anchor.shape, anchor.double().T
        if d > WIDE and outputs > OUTPUTS:
            columns = torch.linspace(0, outputs - 1, OUTPUTS).long()
            xy, start, known = xy[..., columns], start[:, columns], {}
        splits = [self._split(held) for held in range(1 if d > WIDE else len(xy))]
        parts = [
            (split, _mixed(xy, split.rest, known), _mixed(xy, split.alone, known), start)
            for split in splits
            if split is not None
        ]
        if not parts:
            return float("inf")
        if d <= MANY:
            errors = [sum(own) for own in zip(*(_turned(*p, ridges) for p in parts), strict=True)]
            return max(r for r, e in zip(ridges, errors, strict=True) if e <= min(errors))
        solved = [_solved(*part) for part in parts]

        @functools.cache
        def error(ridge: float, exact: bool = True) -> float:
            return sum(of_split(ridge, exact) for of_split in solved)

        def better(one: float, two: float) -> bool:
            a, b = error(one, False), error(two, False)
            if abs(a - b) <= NEAR * max(abs(a), abs(b)):
                a, b = error(one), error(two)
            return a < b

        at: int | None = len(ridges) // 2
        while at is not None:
            best, near = at, (n for n in (at - 1, at + 1) if 0 <= n < len(ridges))
            at = next((n for n in near if better(ridges[n], ridges[best])), None)
        return ridges[best]

    def _shares(self, folds: Iterable[int], weights: Sequence[float] = ()) -> Shares:
        """How much each fold and task counts where some folds stand for all: those of a task alike."""
        there = [[t and f in folds for t in own] for f, own in enumerate(self._there)]
        n = [max(1, sum(of_task)) for of_task in zip(*there, strict=True)]
        weights = weights or self._weights
        return [[w * t / m for w, t, m in zip(weights, own, n, strict=True)] for own in there]

    def _split(self, held: int) -> _Split | None:
        """A fold that is held out; None where no task that counts has rows both there and elsewhere."""
        if held in self._splits:
            return self._splits[held]
        rest = [f for f in range(len(self._there)) if f != held]
        own = [
            w * (self._there[held][i] and any(self._there[f][i] for f in rest))
            for i, w in enumerate(self._weights)
        ]
        if not any(own):
            return None
        of_rest, alone = self._shares(rest), self._shares([held], [w / sum(own) for w in own])
        a, b = (_mixed(self._xx, shares, self._known) for shares in (of_rest, alone))
        split = _Split(of_rest, alone, a, b, self._xx.dtype)
        if len(a) <= MANY:
            split = split.turned()
        if len(a) <= WIDE:
            self._splits[held] = split
        return split


class _Split(NamedTuple):
    """Gram matrices of what a solution is fitted to, ``a``, and of what is held out; how much each counts.

    Turned, the latter is in the directions of a's eigenvectors. dtype: in which they were summed up.
    """

    rest: Shares
    alone: Shares
    a: Tensor  # (D, D)
    held: Tensor  # (D, D)
    dtype: torch.dtype
    values: Tensor | None = None  # (D,)
    turn: Tensor | None = None  # (D, D)

    def turned(self) -> _Split:
        values, turn = torch.linalg.eigh(self.a)
        return self._replace(held=turn.T @ self.held @ turn, values=values, turn=turn)


def _turned(
    split: _Split, b: Tensor, held_b: Tensor, start: Tensor, ridges: Sequence[float]
) -> list[float]:
    """The errors of ridges: in the directions of a's eigenvectors one decomposition serves every ridge.

    There the solution is ``first + c * moved``, row by row, with a c for each direction and ridge, and its
    error is a quadratic in c: outputs are summed over once, for all ridges.
    """
    values, turn = split.values, split.turn
    assert values is not None
    assert turn is not None
    first, moved = turn.T @ start, turn.T @ (b - split.a @ start)  # (D, O)
    square = split.held * (moved @ moved.T)  # (D, D)
    slope = (moved * (split.held @ first - turn.T @ held_b)).sum(1)  # (D,)
    mean, least = float(split.a.diagonal().mean()), torch.finfo(b.dtype).tiny

    rho = [0.0 if r == float("inf") else r * mean for r in ridges]
    c = 1 / (values.clamp(min=0) + values.new_tensor(rho)[:, None]).clamp(min=least)  # (R, D)
    found = ((c @ square + 2 * slope) * c).sum(1).tolist()
    return [0.0 if r == float("inf") else e for r, e in zip(ridges, found, strict=True)]


def _solved(split: _Split, b: Tensor, held_b: Tensor, start: Tensor) -> Error:
    """With a factorisation for each ridge, which for many inputs is faster than one decomposition.

    Unless it must be exact, a ridge that makes up for float32's rounding errors has its error in float32.
    """
    a, held = split.a, split.held
    lack, slope = b - a @ start, 2 * (held @ start - held_b)  # (D, O), of all ridges
    mean, size = float(a.diagonal().mean()), float(a.norm())
    fast = [t.float() for t in (a, held, lack, slope)]

    def error(ridge: float, exact: bool) -> float:
        if ridge == float("inf"):
            return 0.0
        if not exact and ridge * mean > SMALL * size:
            quick, held_, lack_, slope_ = fast
            quick = quick.clone()
            quick.diagonal().add_(ridge * mean)
            factor, failed = torch.linalg.cholesky_ex(quick)
            if not failed:
                w = torch.cholesky_solve(lack_, factor)  # (D, O), less the anchor
                return float((w * (held_ @ w + slope_)).sum())
        w = matching.step(a, lack, ridge, split.dtype)
        return float((w * (held @ w + slope)).sum())

    return error


def _mixed(matrices: Tensor, shares: Shares, known: dict[tuple, Tensor] | None) -> Tensor:
    """The mean of (K, N, ...) over folds and tasks in float64: (...), not to be changed.

    shares: they add up to 1; known: what is kept, the means of single folds.
    """
    total: Tensor | None = None
    whole = sum(map(sum, shares))
    for fold, (own, of_fold) in enumerate(zip(matrices, shares, strict=True)):
        if not (size := sum(of_fold)):
            continue
        key = fold, *(share / size for share in of_fold)
        if known is None or (part := known.get(key)) is None:
            part = torch.zeros(own.shape[1:], dtype=torch.float64)
            for matrix, share in zip(own, key[1:], strict=True):
                if share:
                    part.add_(matrix, alpha=share)
            if known is not None:
                known[key] = part
        if size == whole:  # all that there is, and the shares add up to 1
            return part
        total = part * size if total is None else total.add_(part, alpha=size)
    return torch.zeros(matrices.shape[2:], dtype=torch.float64) if total is None else total
