"""MAP: a quadratic with a link, fitted to each task's scores, whose own front costs nothing (Li et al. 2024).

Three forms, all over one scale per expert: as it is (``map_surrogate``), with points where the fit is worst
(``map_bayesian``), and pair by pair for many tasks (``map_nested``).
Source: "MAP: Low-compute Model Merging with Amortized Pareto Fronts via Quadratic Approximation" (arXiv
2406.07529).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np

from rmm_lab.fronts.space import Box, Trials
from rmm_lab.search.front_measures import achievement, lattice_of
from rmm_lab.search.layer_scales import BOUNDS
from rmm_lab.search.preferences import Ends
from rmm_lab.search.rivals import GROUP, SCALES

DRAWN = 4096  # points at which a fitted surface is looked at

# ----------------------------------------------------------------------------------------- the fit


def quadratic(points: np.ndarray) -> np.ndarray:
    """1, c_i and c_i c_j for i <= j of points (n, D): (n, (D + 1) (D + 2) / 2)."""
    n, d = points.shape
    i, j = np.triu_indices(d)
    return np.concatenate([np.ones((n, 1)), points, points[:, i] * points[:, j]], axis=1)


def fit_quadratic(points: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Coefficients of sigmoid(quadratic(c)) for scores (n,) in [0, 1] at points (n, D), by least squares.

    Source: Li et al. 2024, Eq. 4 with the sigmoid for accuracies.
    """
    from scipy.optimize import least_squares

    basis = quadratic(points)
    near = np.log((f := found.clip(0.01, 0.99)) / (1 - f))  # the logits, which are linear in them
    start = np.linalg.lstsq(basis, near, rcond=1e-6)[0]
    weight = 1e-3  # of the coefficients, so that fewer points than these have one answer

    def residuals(coefficients: np.ndarray) -> np.ndarray:
        return np.r_[sigmoid(basis @ coefficients) - found, weight * (coefficients - start)]

    return np.asarray(least_squares(residuals, start).x)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), also for large |x|."""
    return 0.5 * (1 + np.tanh(0.5 * x))


class Surrogate:
    """What was scored at points c (n, D), merges theta_0 + sum_i c_i v_i, and a quadratic for each task.

    Args:
        out: what scores, and its budget. box: of one scale per expert.
        vectors: (D, N), what each v_i is made of: a scale for each expert's task vector.
    """

    def __init__(self, out: Trials, box: Box, vectors: np.ndarray) -> None:
        self.out, self.box, self.vectors = out, box, vectors
        self.tried = np.empty((0, len(vectors)))
        self.known = np.empty((0, len(out.ends.base)))  # not normalised: the link needs [0, 1]

    def path(self, point: np.ndarray) -> Any:
        """The merge at a point (D,)."""
        return self.box.path(point @ self.vectors)

    def score(self, points: np.ndarray, *, stay: bool = False) -> None:
        """Score points (n, D) as far as the budget goes, ``GROUP`` of them on a subset; stay: on the last."""
        for start in range(0, len(points), GROUP):
            some, first = points[start : start + GROUP], len(self.out)
            n = len(self.out.ask([self.path(c) for c in some], stay=stay))
            self.tried = np.r_[self.tried, some[:n]]
            self.known = np.r_[self.known, self.out.by_task[first:]] if n else self.known

    def guess(self, points: np.ndarray) -> np.ndarray:
        """The fits' scores at points (n, D): (n, N), in [0, 1]."""
        fits = [fit_quadratic(self.tried, own) for own in self.known.T]
        return sigmoid(quadratic(points) @ np.array(fits).T)

    def best(
        self, weights: np.ndarray, rng: np.random.Generator, on: np.ndarray | None = None
    ) -> np.ndarray:
        """Of ``DRAWN`` random points and those tried, by the fits, the best for each weight (W, K): (W, D).

        on: the K tasks that are looked at, (N,) bool; by default all that count. Random search in place of
        NSGA-III, since the fits have few dimensions.
        """
        drawn = np.r_[rng.uniform(*BOUNDS, (DRAWN, len(self.vectors))), self.tried]
        guessed = self.out.ends.normalised(self.guess(drawn), on)
        return np.asarray(drawn[achievement(guessed, weights).argmax(1)])


def unknowns(n: int) -> int:
    """How many coefficients a quadratic of n numbers has."""
    return (n + 1) * (n + 2) // 2


def design(n: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Where a fit over n scales begins: each alone, equal ones, then random ones; (size, n), or more."""
    fixed = np.array([*np.eye(n), *(np.full(n, scale) for scale in SCALES)])
    return np.r_[fixed, rng.uniform(*BOUNDS, (max(0, size - len(fixed)), n))]


# ----------------------------------------------------------------------------------- as it is, Bayesian


def map_surrogate(scorer: Any, evaluations: int, seed: int, ends: Ends) -> Trials:
    """MAP: one scale per expert; a fitted quadratic under a sigmoid for each task has its front for nothing.

    Half of the budget, or (N + 1) (N + 2) where that is more, goes to a ``design``. The best points for each
    weight of a lattice, by the fits, are the answers; what is left of the budget scores these, subset after
    subset, and each time the fits are redone.
    """
    return _map(scorer, evaluations, seed, ends, adaptive=False)


def map_bayesian(scorer: Any, evaluations: int, seed: int, ends: Ends) -> Trials:
    """Bayesian MAP: (N + 1) (N + 2) points by design; the rest of that half goes where the fits are worst.

    ``NEXT`` points at a time, see ``least_known``; the fits are redone in between. Otherwise as
    ``map_surrogate``, which it is where half of the budget leaves nothing more to choose.
    """
    return _map(scorer, evaluations, seed, ends, adaptive=True)


def _map(scorer: Any, evaluations: int, seed: int, ends: Ends, *, adaptive: bool) -> Trials:
    out, n, rng = Trials(scorer, evaluations, ends), scorer.n_models, np.random.default_rng(seed)
    fit = Surrogate(out, Box(scorer, blocks=1, members=n), np.eye(n))
    first = 2 * unknowns(n)
    wanted = max(first, out.left // 2)
    fit.score(design(n, first if adaptive else wanted, rng))
    while out.left and (more := wanted - len(fit.tried)) > 0:
        errors = np.square(fit.guess(fit.tried) - fit.known)[:, ends.counts].mean(1)  # (n,)
        fit.score(least_known(fit.tried, errors, min(NEXT, more), rng))
    weights = lattice_of(out.n_tasks, GROUP)
    while len(fit.tried):
        best = np.array(list(dict.fromkeys(map(tuple, fit.best(weights, rng)))))
        out.answers = [fit.path(c) for c in best]
        if not out.left:
            break
        fit.score(best)
    return out


# Of Bayesian MAP, all as in the paper's code; the paper says less.
NEXT = 3
TEMPERATURE = 0.07
RADIUS = (0.2, 0.8)
DEVIATIONS = 0.5


def bins_of(angles: np.ndarray, each: int) -> np.ndarray:
    """In which of ``each`` equal parts of a right angle angles lie; of others, the nearest part."""
    return (angles / (np.pi / 2) * each).astype(int).clip(0, each - 1)


def angles_of(points: np.ndarray) -> np.ndarray:
    """The directions of points (n, D), in hyperspherical angles (n, D - 1) from 0 to pi."""
    rest = np.sqrt(np.cumsum(np.square(points[:, ::-1]), axis=1)[:, ::-1])  # (n, D)
    return np.arctan2(rest[:, 1:], points[:, :-1])


def points_at(angles: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Angles (n, D - 1) and radii (n,) -> points (n, D): the inverse of ``angles_of``."""
    one = np.ones((len(angles), 1))
    sines = np.cumprod(np.c_[one, np.sin(angles)], axis=1)  # (n, D)
    return np.asarray(radius[:, None] * sines * np.c_[np.cos(angles), one])


def least_known(
    points: np.ndarray, errors: np.ndarray, n: int, rng: np.random.Generator
) -> np.ndarray:
    """n new points, most of them in directions where the fit is worst: (n, D).

    points (m, D) with squared errors (m,) fall into bins of directions: each of their D - 1 angles has 4
    parts, 2 from 4 experts on. A bin is worth the mean of its errors and half of their standard deviation;
    one is drawn by a softmax, then a direction in it and a radius, uniformly. A bin without points is worth
    what all points are; the paper's code never draws it.
    """
    each, d = (4 if points.shape[1] < 4 else 2), points.shape[1] - 1
    known = bins_of(angles_of(points), each)  # (m, D - 1)
    every = np.indices((each,) * d).reshape(d, -1).T  # (bins, D - 1)
    owns = [errors[(known == one).all(1)] for one in every]
    worth = np.array([_worth(own if len(own) else errors) for own in owns])  # (bins,)
    chance = np.exp((worth - worth.max()) / TEMPERATURE)
    drawn = every[rng.choice(len(every), n, p=chance / chance.sum())]  # (n, D - 1)
    angles = (drawn + rng.uniform(size=drawn.shape)) * (np.pi / 2 / each)
    return points_at(angles, rng.uniform(*RADIUS, n))


def _worth(errors: np.ndarray) -> float:
    return float(errors.mean() + DEVIATIONS * errors.std())


# ------------------------------------------------------------------------------------------ nested

Group = tuple[int, ...]  # numbers of experts


def nest(scores: Mapping[Group, float]) -> list[tuple[Group, Group]]:
    """Which groups merge with which, in order: round by round those with the closest scores.

    An odd one waits for the next round. A merged group's score is the mean over its experts. At the end all
    are one.
    """
    order, groups = [], dict(scores)
    while len(groups) > 1:
        merged = {}
        while len(groups) > 1:
            a, b = min(
                combinations(groups, 2), key=lambda pair: abs(groups[pair[0]] - groups[pair[1]])
            )
            order.append((a, b))
            total = len(a) * groups.pop(a) + len(b) * groups.pop(b)
            merged[a + b] = total / len(a + b)
        groups |= merged
    return order


def map_nested(scorer: Any, evaluations: int, seed: int, ends: Ends) -> Trials:
    """Nested MAP: two experts or merges at a time, each with its fit over two scales, by the preference.

    ``nest`` pairs those whose experts' own scores are closest. The fit of two experts holds for all
    preferences; from its front each preference takes its point, a task vector that is merged further. Half
    of the budget goes to fits of 12 points or more, for as many weights of a lattice as it has room for;
    what is left scores the answers, subset after subset, and their last fits are redone. For two tasks this
    is ``map_surrogate``. As in all searches here a preference chooses by the augmented Tchebycheff value,
    where the paper's takes a weighted sum. A task that does not count leaves its expert out.
    """
    n = scorer.n_models
    if n == 2:
        return map_surrogate(scorer, evaluations, seed, ends)
    out, rng = Trials(scorer, evaluations, ends), np.random.default_rng(seed)
    box, on = Box(scorer, blocks=1, members=n), np.flatnonzero(ends.counts)
    order = nest({(int(i),): float(ends.expert[i]) for i in on})
    once = sum(len(a + b) == 2 for a, b in order)  # fits for all preferences
    each = len(order) - once  # and for one
    least, half = 2 * unknowns(2), out.left // 2
    most = (half // least - once) // each if each else GROUP
    weights = lattice_of(out.n_tasks, min(GROUP, most))  # (W, K)
    size = max(least, half // (once + each * len(weights)))
    shared: dict[Group, Surrogate] = {}

    def fit_of(a: Group, b: Group, merged: Mapping[Group, np.ndarray]) -> Surrogate:
        """Over the scales of two groups; that of two experts is made once."""
        if (known := shared.get(a + b)) is not None:
            return known
        fit = Surrogate(out, box, np.array([merged[a], merged[b]]))
        fit.score(design(2, size, rng))
        if len(a + b) == 2:
            shared[a + b] = fit
        return fit

    def point(fit: Surrogate, group: Group, w: np.ndarray) -> np.ndarray:
        """The point (2,) of a fit for weights (K,), of which those of the group's tasks count."""
        own = w[np.isin(on, group)]
        own = own if own.any() else np.ones(len(own))
        return fit.best(own[None] / own.sum(), rng, np.isin(np.arange(n), group))[0]

    last: list[Surrogate] = []  # of each preference
    points: list[np.ndarray] = []
    for w in weights:
        merged: dict[Group, np.ndarray] = {(i,): row for i, row in enumerate(np.eye(n))}
        for a, b in order:
            fit = fit_of(a, b, merged)
            if not len(fit.tried):  # nothing was left for it
                return out
            best = point(fit, a + b, w)
            merged[a + b] = best @ fit.vectors
        last.append(fit)
        points.append(best)
        out.answers.append(fit.path(best))
    while out.left:
        for i, fit in enumerate(last):
            fit.score(points[i][None], stay=i > 0)
        points = [point(fit, tuple(on), w) for fit, w in zip(last, weights, strict=True)]
        out.answers = [fit.path(best) for fit, best in zip(last, points, strict=True)]
    out.answers = list(dict.fromkeys(out.answers))
    return out
