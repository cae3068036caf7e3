"""Which ridge a least-squares layer takes: the one that does best on inputs that it was not fitted to."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

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
        self._xx, self._there = xx, diagonal.any(-1)  # (K, N) bool
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
        a, b, start = _mixed(self._xx, whole), _mixed(xy, whole), anchor.double().T
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
        parts = []
        for held in range(1 if d > WIDE else len(xy)):
            if split := self._split(held):
                (a, held_a), (b, held_b) = ([_mixed(m, s) for s in split] for m in (self._xx, xy))
                parts.append((a, b, held_a, held_b, start))
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

    def _split(self, held: int) -> tuple[Tensor, Tensor] | None:
        """How much each fold and task counts in a fit without fold ``held``, and on that alone: (K, N) each.

        None where no task that counts has rows both there and elsewhere.
        """
        alone = self._there & (torch.arange(len(self._there)) == held)[:, None]
        rest = self._there & ~alone
        own = self._weights * (alone.any(0) & rest.any(0))  # (N,)
        if not own.any():
            return None
        return _shares(rest, self._weights), _shares(alone, own / sum(own.tolist()))


def _shares(there: Tensor, weights: Tensor) -> Tensor:
    """How much each fold and task counts, of those that are there: the folds of a task alike. (K, N)."""
    return weights * there / there.sum(0).clamp(min=1)


def _mixed(matrices: Tensor, shares: Tensor) -> Tensor:
    """The mean of (K, N, ...) over folds and tasks in float64: (...). shares: they add up to 1."""
    total: Tensor | None = None
    sizes = [sum(of_fold) for of_fold in shares.tolist()]
    for own, of_fold, size in zip(matrices, shares.tolist(), sizes, strict=True):
        if not size:
            continue
        part = torch.zeros(own.shape[1:], dtype=torch.float64)
        for matrix, share in zip(own, of_fold, strict=True):
            if share:
                part.add_(matrix, alpha=share / size)
        if size == sum(sizes):  # all that there is, and the shares add up to 1
            return part
        total = part * size if total is None else total.add_(part, alpha=size)
    return torch.zeros(matrices.shape[2:], dtype=torch.float64) if total is None else total


def _errors(
    a: Tensor, b: Tensor, held: Tensor, held_b: Tensor, start: Tensor, ridges: Sequence[float]
) -> list[float]:
    """Errors of ridges on what is held out, less the anchor's: in the directions of a's eigenvectors one
    decomposition serves every ridge.

    There the solution is ``first + c * moved``, row by row, with a c for each direction and ridge, and its
    error is a quadratic in c: outputs are summed over once, for all ridges.

    a, held: (D, D), Gram matrices of what a solution is fitted to and of what is held out; b, held_b: (D, O),
    the products with what the map should put out; start: (D, O), the anchor.
    """
    values, turn = torch.linalg.eigh(a)
    turned = turn.T @ held @ turn
    first, moved = turn.T @ start, turn.T @ (b - a @ start)  # (D, O)
    square = turned * (moved @ moved.T)  # (D, D)
    slope = (moved * (turned @ first - turn.T @ held_b)).sum(1)  # (D,)
    mean, least = float(a.diagonal().mean()), torch.finfo(b.dtype).tiny

    rho = [0.0 if r == INFINITE else r * mean for r in ridges]
    c = 1 / (values.clamp(min=0) + values.new_tensor(rho)[:, None]).clamp(min=least)  # (R, D)
    found = ((c @ square + 2 * slope) * c).sum(1).tolist()
    return [0.0 if r == INFINITE else e for r, e in zip(ridges, found, strict=True)]


def _solved(
    a: Tensor, b: Tensor, held: Tensor, held_b: Tensor, start: Tensor, dtype: torch.dtype
) -> Callable[[float, bool], float]:
    """One of ``_errors`` at a time, by a factorisation: for many inputs faster than one decomposition.

    Unless it must be exact, a ridge that makes up for float32's rounding errors has its error in float32.
    dtype: in which a was summed up.
    """
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
