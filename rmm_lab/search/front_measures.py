"""What a front is worth: domination, hypervolume, IGD+, additive epsilon, R2, expected utility, the knee.

A *front* is a set of points (n, K), a score for each of K tasks, more being better, of which none is as good
as another everywhere and better somewhere. Scores are normalised (see ``preferences.Ends``): 0 is the base,
1 the task's own expert. All measures take any set of points; dominated ones and repeats change none of them.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np

from rmm_lab.errors import InputError

# Of the sum beside the largest regret: with weights above 0 no dominated point is chosen (Knowles 2006).
AUGMENT = 0.05


def checked(points: object) -> np.ndarray:
    """Points as floats (n, K), n and K at least 1; InputError for anything else."""
    found = np.asarray(points, float)
    if found.ndim != 2 or 0 in found.shape or not np.isfinite(found).all():
        raise InputError(
            f"front: expected points as finite numbers (n, K), found shape {found.shape}"
            f"{'' if np.isfinite(found).all() else ' with NaN or infinity'}; give at least one point"
        )
    return found


def non_dominated(points: np.ndarray) -> np.ndarray:
    """Which points (n, K) no other one dominates: (n,) bool. Of equal points the first one stays."""
    p = checked(points)
    as_good = (p[:, None] >= p[None]).all(-1)  # (n, n): i is nowhere worse than j
    better = as_good & ~as_good.T
    earlier = np.tri(len(p), k=-1, dtype=bool).T  # i comes before j
    return np.asarray(~(better | (as_good & as_good.T & earlier)).any(0))


# ----------------------------------------------------------------------------------- hypervolume


def hypervolume(points: np.ndarray, reference: float = 0.0) -> float:
    """The volume of what is dominated by some point and dominates the reference, in each task's own units.

    Exact: a sweep for two and three tasks, for more the library moocore (Fonseca et al. 2006). With
    normalised scores and the base as reference it is at most 1 unless a merge is better than an expert.
    Source: Zitzler and Thiele 1998, "Multiobjective Optimization Using Evolutionary Algorithms".
    """
    gains = checked(points) - reference
    n_tasks = gains.shape[1]
    gains = gains[(gains > 0).all(1)]
    if not len(gains):
        return 0.0
    if n_tasks == 1:
        return float(gains.max())
    if n_tasks == 2:
        return _area(gains)
    if n_tasks == 3:
        return _volume(gains)
    try:
        import moocore
    except ImportError as error:
        raise InputError(
            f"hypervolume: expected the library moocore for {n_tasks} tasks, found none ({error}); install "
            "it with pip install -e '.[front]'"
        ) from error
    return float(moocore.hypervolume(gains, ref=np.zeros(n_tasks), maximise=True))


def _area(points: np.ndarray) -> float:
    """Of points (n, 2) above 0: from the right to the left, each adds a strip above the best so far."""
    x, y = points[np.lexsort((-points[:, 1], -points[:, 0]))].T
    below = np.maximum.accumulate(np.r_[0.0, y])[:-1]
    return float((x * (y - below).clip(0)).sum())


def _volume(points: np.ndarray) -> float:
    """Of points (n, 3) above 0: from the top down, slices whose area only grows."""
    p = points[np.argsort(-points[:, 2], kind="stable")]
    heights = p[:, 2] - np.r_[p[1:, 2], 0.0]
    return sum(_area(p[: i + 1, :2]) * h for i, h in enumerate(heights) if h > 0)


# ---------------------------------------------------------------------- distances to another front


def igd_plus(points: np.ndarray, target: np.ndarray) -> float:
    """IGD+: what the points lack, on average over a target front (m, K), at least 0; 0 is best.

    A target's distance is that to the nearest point, counting only tasks where it is behind.
    Source: Ishibuchi et al. 2015, "Modified Distance Calculation in GD and IGD".
    """
    lack = _lack(points, target)
    return float(np.sqrt((lack.clip(0) ** 2).sum(-1)).min(0).mean())


def epsilon(points: np.ndarray, target: np.ndarray) -> float:
    """Additive epsilon: the least that must be added to all scores to be nowhere behind a target front.

    Below 0 where the points are ahead of it everywhere. Source: Zitzler et al. 2003, "Performance Assessment
    of Multiobjective Optimizers: An Analysis and Review".
    """
    return float(_lack(points, target).max(-1).min(0).max())


def _lack(points: np.ndarray, target: np.ndarray) -> np.ndarray:
    """target - points: (n, m, K)."""
    p, t = checked(points), checked(target)
    if p.shape[1] != t.shape[1]:
        raise InputError(
            f"front: expected a target of {p.shape[1]} tasks, found {t.shape[1]}; compare like with like"
        )
    return t[None] - p[:, None]


# ------------------------------------------------------------------------------------ preferences


def lattice(n_tasks: int, divisions: int) -> np.ndarray:
    """All weights (W, K) that add up to 1 in steps of 1 / divisions, in order.

    W is C(divisions + K - 1, K - 1). Source: Das and Dennis 1998, "Normal-Boundary Intersection".
    """
    last = divisions + n_tasks - 1
    bars = np.array(list(combinations(range(last), n_tasks - 1)), int)  # (W, K - 1)
    edges = np.c_[np.full(len(bars), -1), bars, np.full(len(bars), last)]  # (W, K + 1)
    return (np.diff(edges) - 1) / divisions


def lattice_of(n_tasks: int, most: int) -> np.ndarray:
    """The finest lattice of at most so many weights, (W, K); the K corners at least.

    One with fewer divisions than tasks leaves out a task at each of its weights. There the centre, all
    tasks alike, is one more, if there is room.
    """
    divisions = 1
    while n_tasks > 1 and len(lattice(n_tasks, divisions + 1)) <= most:
        divisions += 1
    weights = lattice(n_tasks, divisions)
    if divisions < n_tasks and len(weights) < most:
        weights = np.array(sorted([*weights.tolist(), [1 / n_tasks] * n_tasks]))
    return weights


def achievement(points: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """How well normalised points (n, K) meet weights (W, K), augmented Tchebycheff: (W, n), at most 0.

    -(max_k w_k (1 - f_k) + 0.05 sum_k w_k (1 - f_k)): 1, the task's expert, is the ideal. A weighted mean
    misses the points of a front that lie in a hollow, and likes its ends; this does neither.
    Source: Knowles 2006, "ParEGO", whose sum has the weights too, so that a task of weight 0 has no
    say; that of Steuer and Choo 1983, "An Interactive Weighted Tchebycheff Procedure", has none.
    """
    regret = np.atleast_2d(weights)[:, None] * (1 - checked(points))[None]  # (W, n, K)
    return -(regret.max(-1) + AUGMENT * regret.sum(-1))


def r2(points: np.ndarray, weights: np.ndarray) -> float:
    """R2: the least regret max_k w_k (1 - f_k) of any point, at least 0, mean over weights (W, K); 0 is best.

    Source: Hansen and Jaszkiewicz 1998, "Evaluating the Quality of Approximations to the Non-dominated Set".
    """
    regret = weights[:, None] * (1 - checked(points)).clip(0)[None]
    return float(regret.max(-1).min(1).mean())


def expected_utility(points: np.ndarray, weights: np.ndarray) -> float:
    """The best weighted mean that any point has, mean over weights (W, K).

    Source: Zintgraf et al. 2015, "Quality Assessment of MORL Algorithms: A Utility-Based Approach".
    """
    return float((weights @ checked(points).T).max(1).mean())


def knee(points: np.ndarray) -> int:
    """The point that lies farthest beyond the plane through the best point for each task: its row.

    Where there is no such plane, or no point beyond it, the one that best meets equal weights.
    Source: Das 1999, "On Characterizing the 'Knee' of the Pareto Curve".
    """
    p = checked(points)
    corners = p[p.argmax(0)]  # (K, K)
    if np.linalg.matrix_rank(corners) == len(corners):
        normal = np.linalg.solve(corners, np.ones(len(corners)))
        beyond = p @ normal - 1  # (n,), in units of the plane's distance from 0
        if (normal > 0).all() and beyond.max() > 1e-9:
            return int(beyond.argmax())
    return int(achievement(p, np.full(p.shape[1], 1 / p.shape[1]))[0].argmax())
