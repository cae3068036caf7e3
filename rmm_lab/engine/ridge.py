"""Which ridge a least-squares layer takes: the one that does best on inputs that it was not fitted to."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rmm_lab import matching

MANY, WIDE, OUTPUTS = 128, 300, 64  # see ``Folds.choose``
# Errors in float32 tell ridges apart that differ by more than NEAR, if these are above SMALL.
NEAR, SMALL = 1e-3, 1e-4
INFINITE = float("inf")  # the ridge that leaves the anchor as it is
RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, INFINITE)  # what one is chosen from


class Folds:
    """The inputs of linear maps, as Gram matrices of K disjoint folds of each of N tasks' inputs.

    xx: (K, N, D, D), each divided by its number of rows; a fold without rows of a task is all 0. weights:
    (N,), at least 0, not all 0; only their ratios count.
    """

    def __init__(self, xx: Tensor, weights: Tensor) -> None:
        k, n, d, _ = xx.shape
        diagonal = xx.diagonal(dim1=-2, dim2=-1)  # (K, N, D), finite only where all else is
        matching.check("xx", xx[:, :, :1], (k, n, 1, d))
        matching.check("xx", diagonal, (k, n, d))
        self._xx, self._mean, self._there = xx, _means(xx), diagonal.any(-1)  # (K, N) bool
        self._weights = torch.tensor(matching.shares(weights, n), dtype=torch.float64)

    def solution(self, xy: Tensor, anchor: Tensor, ridge: float | str) -> Tensor:
        """A map that is fitted to all inputs, see ``matching.least_squares``: (O, D) in the anchor's dtype.

        xy: (K, N, D, O), the inputs' products with what the map should put out; anchor: (O, D); ridge: a
        number, or ``auto`` for the best.
        """
        matching.check("xy", xy, (*self._xx.shape[:3], len(anchor)))
        best = self.choose(xy, anchor) if isinstance(ridge, str) else ridge
        if best == INFINITE:
            return anchor.clone()
        whole = _shares(self._there, self._weights)
        a, b, start = self._mean(whole), _means(xy)(whole), anchor.double().T
        return matching.towards(a, b, start, best, self._xx.dtype).T.to(anchor.dtype)

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
        (outputs, d), start = anchor.shape, anchor.double().T
        if d > WIDE and outputs > OUTPUTS:
            columns = torch.linspace(0, outputs - 1, OUTPUTS).long()
            xy, start = xy[..., columns], start[:, columns]
        mean = _means(xy)
        parts = [(s, mean(s.rest), mean(s.alone), start) for s in self._splits]
        if not parts:
            return INFINITE
        if d <= MANY:
            each = [_errors(*part, ridges) for part in parts]
            errors = [sum(own) for own in zip(*each, strict=True)]
            return max(r for r, e in zip(ridges, errors, strict=True) if e <= min(errors))
        solved = [_solved(*part, self._xx.dtype) for part in parts]

        @functools.cache
        def error(ridge: float, exact: bool = True) -> float:
            return sum(of_part(ridge, exact) for of_part in solved)

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

    @functools.cached_property
    def _splits(self) -> list[_Split]:
        """For each fold to be held out; none where no task that counts has rows both there and elsewhere."""
        (k, _, d, _), out = self._xx.shape, []
        for held in range(1 if d > WIDE else k):
            alone = self._there & (torch.arange(k) == held)[:, None]
            rest = self._there & ~alone
            own = self._weights * (alone.any(0) & rest.any(0))  # (N,)
            if own.any():
                shares = _shares(rest, self._weights), _shares(alone, own / sum(own.tolist()))
                split = _Split(*shares, *map(self._mean, shares))
                out.append(split.turned() if d <= MANY else split)
        return out


class _Split(NamedTuple):
    """One fold held out; all maps of the same inputs share what is computed from these alone.

    Turned, what is held out is in the directions of a's eigenvectors: one decomposition serves all ridges.
    """

    rest: Tensor  # (K, N), how much each fold and task counts in a fit
    alone: Tensor  # (K, N), and in what is held out
    a: Tensor  # (D, D), the Gram matrix of the former
    held: Tensor  # (D, D), of the latter
    eigen: Any = None  # of a: (D,), (D, D)

    def turned(self) -> _Split:
        values, turn = torch.linalg.eigh(self.a)
        return self._replace(held=turn.T @ self.held @ turn, eigen=(values, turn))


def _shares(there: Tensor, weights: Tensor) -> Tensor:
    """How much each fold and task counts, of those that are there: the folds of a task alike. (K, N)."""
    return weights * there / there.sum(0).clamp(min=1)


def _means(matrices: Tensor) -> Callable[[Tensor], Tensor]:
    """What takes shares that add up to 1, (K, N), to the mean of (K, N, ...) over folds and tasks: (...) in
    float64, not to be changed. Unless they are wide, means of single folds are kept for the next shares."""

    def of_fold(fold: int, *shares: float) -> Tensor:
        total = torch.zeros(matrices.shape[2:], dtype=torch.float64)
        for matrix, share in zip(matrices[fold], shares, strict=True):
            if share:
                total.add_(matrix, alpha=share)
        return total

    known = functools.cache(of_fold) if matrices.shape[2] <= WIDE else of_fold

    def mean(shares: Tensor) -> Tensor:
        parts = [
            (known(fold, *(share / size for share in own)), size)
            for fold, own in enumerate(shares.tolist())
            if (size := sum(own))
        ]
        if len(parts) == 1:
            return parts[0][0]
        total = torch.zeros(matrices.shape[2:], dtype=torch.float64)
        for part, size in parts:
            total.add_(part, alpha=size)
        return total

    return mean


def _errors(
    split: _Split, b: Tensor, held_b: Tensor, start: Tensor, ridges: Sequence[float]
) -> list[float]:
    """Errors of ridges on what is held out, less the anchor's, from a split that is turned.

    The solution is ``first + c * moved``, row by row, with a c for each direction and ridge, and its
    error is a quadratic in c: outputs are summed over once, for all ridges.

    b, held_b: (D, O), the products with what the map should put out of what a solution is fitted to and of
    what is held out; start: (D, O), the anchor.
    """
    values, turn = split.eigen
    first, moved = turn.T @ start, turn.T @ (b - split.a @ start)  # (D, O)
    square = split.held * (moved @ moved.T)  # (D, D)
    slope = (moved * (split.held @ first - turn.T @ held_b)).sum(1)  # (D,)
    mean, least = float(split.a.diagonal().mean()), torch.finfo(b.dtype).tiny

    rho = [0.0 if r == INFINITE else r * mean for r in ridges]
    c = 1 / (values.clamp(min=0) + values.new_tensor(rho)[:, None]).clamp(min=least)  # (R, D)
    found = ((c @ square + 2 * slope) * c).sum(1).tolist()
    return [0.0 if r == INFINITE else e for r, e in zip(ridges, found, strict=True)]


def _solved(
    split: _Split, b: Tensor, held_b: Tensor, start: Tensor, dtype: torch.dtype
) -> Callable[[float, bool], float]:
    """One of ``_errors`` at a time, by a factorisation: for many inputs faster than one decomposition.

    Unless it must be exact, a ridge that makes up for float32's rounding errors has its error in float32.
    dtype: in which ``split.a`` was summed up.
    """
    a, held = split.a, split.held
    lack, slope = b - a @ start, 2 * (held @ start - held_b)  # (D, O), of all ridges
    mean, size = float(a.diagonal().mean()), float(a.norm())
    fast = [t.float() for t in (a, held, lack, slope)]

    def error(ridge: float, exact: bool) -> float:
        if ridge == INFINITE:
            return 0.0
        if not exact and ridge * mean > SMALL * size:
            quick, held_, lack_, slope_ = fast
            quick = quick.clone()
            quick.diagonal().add_(ridge * mean)
            factor, failed = torch.linalg.cholesky_ex(quick)
            if not failed:
                w = torch.cholesky_solve(lack_, factor)  # (D, O), less the anchor
                return float((w * (held_ @ w + slope_)).sum())
        w = matching.step(a, lack, ridge, dtype)
        return float((w * (held @ w + slope)).sum())

    return error
