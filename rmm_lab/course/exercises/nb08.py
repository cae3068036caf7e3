"""Exercises of notebook 08: subsets, the noise of a reward on one, and the Dynamic Average Reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rmm_lab import env
from rmm_lab.course.checks import Exercise, Mistake, Quiz
from rmm_lab.reward import partition


def _order(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(n)


def _cut(n: int, k: int, seed: int, *, rest: bool) -> list[np.ndarray]:
    """Pieces of n // k rows; what is left over goes to the last one, or nowhere."""
    order, m = _order(n, seed), n // k
    return [np.sort(order[i * m : n if rest and i == k - 1 else (i + 1) * m]) for i in range(k)]


def _drawn(n: int, k: int, seed: int, *, replace: bool) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.sort(rng.choice(n, n // k, replace=replace)) for _ in range(k)]


def _fresh(n: int, k: int, seed: int) -> list[np.ndarray]:
    return [np.sort(_order(n, seed)[: n // k]) for _ in range(k)]


def standard_error(p: np.ndarray, n: np.ndarray) -> float:
    """Standard deviation of a reward estimate, Eq. 7 with binomial noise in each task.

    ``p``: (N,) true accuracies in [0, 1]; ``n``: (N,) examples of each task in the subset. The tasks'
    errors are independent, so their variances ``p (1 - p) / n`` add up: sqrt(sum) / N.
    """
    p, n = np.asarray(p, float), np.asarray(n, float)
    return float(np.sqrt((p * (1 - p) / n).sum()) / len(p))


def _variances(p: Any, n: Any) -> np.ndarray:
    p, n = np.asarray(p, float), np.asarray(n, float)
    return p * (1 - p) / n


def _pooled(p: np.ndarray, n: np.ndarray) -> float:
    """As if all examples were of one task."""
    mean = float(np.mean(p))
    return float(np.sqrt(mean * (1 - mean) / np.sum(n)))


def _dar_by(weight: Callable[[int, int, float], float]) -> Callable[..., float]:
    """Eq. 10 with another weight of the previous reward."""

    def blended(
        reward: float, previous: float | None, t: int, t_max: int, dar_lambda: float
    ) -> float:
        if previous is None:
            return reward
        a = weight(t, t_max, dar_lambda)
        return a * previous + (1 - a) * reward

    return blended


def _never_reset(
    reward: float, previous: float | None, t: int, t_max: int, dar_lambda: float
) -> float:
    a = dar_lambda * t / t_max
    return a * (previous or 0.0) + (1 - a) * reward


def _falsy(reward: float, previous: float | None, t: int, t_max: int, dar_lambda: float) -> float:
    return env.dar(reward, previous or None, t, t_max, dar_lambda)


def _added(reward: float, previous: float | None, t: int, t_max: int, dar_lambda: float) -> float:
    return reward + (0.0 if previous is None else dar_lambda * t / t_max * previous)


def _forgets_own(
    reward: float, previous: float | None, t: int, t_max: int, dar_lambda: float
) -> float:
    a = dar_lambda * t / t_max
    return (1 - a) * reward if previous is None else a * previous + (1 - a) * previous


def _dar_cases() -> Sequence[tuple[Any, ...]]:
    return [
        (0.5, 0.7, 350, 700, 0.8),
        (0.6, None, 0, 700, 0.8),
        (0.6, None, 400, 700, 0.8),
        (0.9, 0.2, 630, 700, 0.5),
        (0.4, 0.0, 50, 200, 1.0),
        (0.3, 0.8, 0, 100, 0.7),
    ]


EXERCISES: dict[str, Exercise | Quiz] = {
    "08.subset": Exercise(
        reference=partition,
        cases=lambda: [(10, 3, 0), (12, 4, 1), (601, 7, 2), (5, 5, 3)],
        mistakes=[
            Mistake(
                "Some examples are in no subset: if k does not divide n, your pieces lose the rest. The "
                "first n % k subsets take one more each.",
                lambda n, k, seed: _cut(n, k, seed, rest=False),
            ),
            Mistake(
                "The whole rest goes to the last subset. Sizes may differ by one at most: the first n % k "
                "subsets take one more each.",
                lambda n, k, seed: _cut(n, k, seed, rest=True),
            ),
            Mistake(
                "The rows are not shuffled. Splits are stored class by class, so such a subset would hold "
                "only a class or two.",
                lambda n, k, seed: np.array_split(np.arange(n), k),
            ),
            Mistake(
                "seed has no effect: every seed gives the same shuffle. Pass seed on to default_rng.",
                lambda n, k, seed: partition(n, k, 0),
            ),
            Mistake(
                "You deal one row to each subset in turn. That is a fair partition too, but not the "
                "scorer's: each subset takes a consecutive piece of the shuffled order.",
                lambda n, k, seed: [np.sort(_order(n, seed)[i::k]) for i in range(k)],
            ),
            Mistake(
                "The right rows in the wrong order: sort each subset.",
                lambda n, k, seed: np.array_split(_order(n, seed), k),
            ),
            Mistake(
                "Every subset has the same rows. Shuffle once, then cut.",
                _fresh,
            ),
            Mistake(
                "Rows are drawn with replacement: some come twice, others never. Deal them out like cards.",
                lambda n, k, seed: _drawn(n, k, seed, replace=True),
            ),
            Mistake(
                "Each subset is drawn from all rows, so subsets overlap. Shuffle once, then cut.",
                lambda n, k, seed: _drawn(n, k, seed, replace=False),
            ),
        ],
        right="Every example is used once in a window.",
    ),
    "08.standard_error": Exercise(
        reference=standard_error,
        cases=lambda: [
            (np.array([0.8, 0.75]), np.array([6, 12])),
            (np.array([0.5, 0.9, 0.6]), np.array([60, 120, 80])),
            (np.array([0.99, 0.5]), np.array([100, 10])),
        ],
        mistakes=[
            Mistake(
                "Standard deviations of independent errors do not add up; their variances do. Add p(1-p)/n, "
                "then take the root.",
                lambda p, n: float(np.sqrt(_variances(p, n)).mean()),
            ),
            Mistake(
                "The reward is a mean over tasks: the 1/N is missing.",
                lambda p, n: float(np.sqrt(_variances(p, n).sum())),
            ),
            Mistake(
                "The 1/N is outside the sum in Eq. 7, so it comes out of the root whole: you divided only "
                "by the root of N.",
                lambda p, n: float(np.sqrt(_variances(p, n).mean())),
            ),
            Mistake(
                "You pool all examples into one task. Eq. 7 gives each task the same weight, whatever its "
                "number of examples, so each needs its own p(1-p)/n.",
                _pooled,
            ),
            Mistake(
                "This is the variance. Its root is the standard deviation.",
                lambda p, n: float(_variances(p, n).sum() / len(p) ** 2),
            ),
            Mistake(
                "The number of examples is missing: the variance of a mean of n examples is p(1-p)/n.",
                lambda p, n: float(np.sqrt(_variances(p, np.ones(len(p))).sum()) / len(p)),
            ),
        ],
        right="At similar accuracies the task with the fewest examples is the noisiest.",
    ),
    "08.dar": Exercise(
        reference=env.dar,
        cases=_dar_cases,
        mistakes=[
            Mistake(
                "The weights are swapped: λ t / T_max belongs to the previous reward, the rest to this one.",
                _dar_by(lambda t, t_max, dar_lambda: 1 - dar_lambda * t / t_max),
            ),
            Mistake(
                "At the start of a window there is no previous reward, and 0 is a bad substitute: None must "
                "leave the reward as it is.",
                _never_reset,
            ),
            Mistake(
                "A previous reward of 0 is a reward too, and must be blended. Test `previous is None`: "
                "`not previous` is also true for 0.",
                _falsy,
            ),
            Mistake(
                "t / T_max is missing: the weight of the previous reward must grow during the search.",
                _dar_by(lambda t, t_max, dar_lambda: dar_lambda),
            ),
            Mistake(
                "λ is missing from the weight.",
                _dar_by(lambda t, t_max, dar_lambda: t / t_max),
            ),
            Mistake(
                "You add the previous reward on top. The two weights must sum to 1, or rewards outgrow 1.",
                _added,
            ),
            Mistake(
                "Two mix-ups: this episode's reward is missing from the blend, and the start of a window "
                "must stay unblended.",
                _forgets_own,
            ),
        ],
        right="Early, an episode is paid almost its own reward; late, mostly the window's running average.",
    ),
    "08.dar_bias": Quiz(
        right="b",
        explained={
            "a": "Averages over many subsets of one path would be right on average. But DAR averages over "
            "the paths of earlier episodes too, so the reward of a path depends on its neighbours.",
            "b": "Right: with weight a = λ t / T_max on the past, a path's reward is drawn towards the "
            "average of what was played before, and the difference between two paths shrinks by 1 - a.",
            "c": "DAR does not know which paths are good. It draws good ones down as it draws poor ones up.",
            "d": "The spread falls, but the part that tells the paths apart falls as much, and the past "
            "comes on top as noise. The simulation counted it: the better path does not stand out more.",
        },
    ),
}
