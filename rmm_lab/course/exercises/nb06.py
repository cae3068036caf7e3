"""Exercises of notebook 06: the best path so far, the shortlist, and a run with a faulty setting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rmm_lab.course.checks import Exercise, Mistake, Quiz
from rmm_lab.search.finalists import shortlist

Scored = Sequence[tuple[str, float]]

# Four searches of the quiz: the options of ppo.Args that each changes.
SUSPECTS: dict[str, dict[str, float]] = {
    "A": {"ent_coef": 2.0, "ent_coef_end": 2.0},
    "B": {},
    "C": {"learning_rate": 0.3, "target_kl": 0.0},
    "D": {"learning_rate": 3e-5},
}


def _values(scored: Scored) -> dict[str, list[float]]:
    seen: dict[str, list[float]] = {}
    for path, value in scored:
        seen.setdefault(path, []).append(value)
    return seen


def _so_far(pick: Callable[[dict[str, list[float]]], float]) -> Callable[[Scored], list[float]]:
    """For each evaluation, a number from what is known after it."""
    return lambda scored: [pick(_values(scored[: n + 1])) for n in range(len(scored))]


def best_so_far(scored: Scored) -> list[float]:
    """After each evaluation, the highest mean reward of a path so far.

    ``scored``: n pairs (path, reward in [0, 1]), in the order of the search. Returns n numbers.
    """
    return _so_far(lambda seen: max(float(np.mean(v)) for v in seen.values()))(scored)


def _best_cases() -> list[tuple[Any, ...]]:
    rng = np.random.default_rng(6)
    drawn = [("pqrs"[int(rng.integers(4))], float(rng.uniform(0.3, 0.9))) for _ in range(15)]
    return [
        ([("p", 0.5), ("q", 0.9), ("q", 0.3), ("p", 0.6), ("r", 0.4), ("q", 0.7)],),
        ([("p", 0.8), ("p", 0.4), ("q", 0.5), ("q", 0.7), ("p", 0.3)],),
        (drawn,),
    ]


def _shortlist_by(score: Callable[[list[float], Scored], float]) -> Callable[..., list[str]]:
    """A shortlist by another score of a path's rewards, the best first; equal ones by the alphabet."""

    def chosen(scored: Scored, n: int) -> list[str]:
        seen = _values(scored)
        return sorted(seen, key=lambda p: (-score(seen[p], scored), p))[:n]

    return chosen


def _as_found(score: Callable[[list[float], Scored], float]) -> Callable[..., list[str]]:
    """The same, but equal ones in the order of the search."""

    def chosen(scored: Scored, n: int) -> list[str]:
        seen = _values(scored)
        return sorted(seen, key=lambda p: -score(seen[p], scored))[:n]

    return chosen


def _in_both_orders(
    hint: str, score: Callable[[list[float], Scored], float]
) -> tuple[Mistake, Mistake]:
    return Mistake(hint, _shortlist_by(score)), Mistake(hint, _as_found(score))


def _all_mean(scored: Scored) -> float:
    return float(np.mean([value for _, value in scored]))


def _drawn(weight: float) -> Callable[[list[float], Scored], float]:
    return lambda v, scored: (sum(v) + weight * _all_mean(scored)) / (len(v) + weight)


def _mean_of_means(scored: Scored) -> float:
    return float(np.mean([np.mean(v) for v in _values(scored).values()]))


def _shortlist_cases() -> list[tuple[Any, ...]]:
    """Paths whose order turns on the prior: lucky ones, steady ones, one seen often and poor."""
    poor = [("often", 0.2)] * 12
    steady = [("steady", 0.7), ("steady", 0.72), ("steady", 0.71), ("steady", 0.7)]
    first = [("lucky", 0.8), *steady, ("once", 0.55), ("twice", 0.6), ("twice", 0.62)]
    second = [*poor, ("a", 0.9), ("b", 0.6), ("b", 0.62), ("b", 0.61), ("c", 0.63), ("c", 0.7)]
    # One evaluation of prior puts a in front, two put b in front.
    third = [("a", 0.95), *[("b", 0.75)] * 4, *[("c", 0.5)] * 10, ("d", 0.4)]
    fourth = [("a", 0.9), *[("b", 0.72)] * 3, *[("c", 0.3)] * 15, ("d", 0.8), ("e", 0.85)]
    fifth = [("a", 0.65), ("a", 0.66), *[("b", 0.61)] * 9, *[("c", 0.2)] * 8, ("d", 0.7)]
    sixth = [("a", 0.9), ("a", 0.3), ("b", 0.7), ("b", 0.72), ("c", 0.8), ("c", 0.55), ("d", 0.6)]
    equal = [("b", 0.6), ("a", 0.6), ("c", 0.2), ("c", 0.3)]
    return [(first, 3), (second, 2), (third, 2), (fourth, 4), (fifth, 3), (sixth, 2), (equal, 2)]


EXERCISES: dict[str, Exercise | Quiz] = {
    "06.best_so_far": Exercise(
        reference=best_so_far,
        cases=_best_cases,
        mistakes=[
            Mistake(
                "This is the highest single reward. A path that once met an easy subset would lead for "
                "ever: compare paths by the mean of all their rewards.",
                _so_far(lambda seen: max(max(v) for v in seen.values())),
            ),
            Mistake(
                "Your curve never falls. A mean may fall: a lucky path that is evaluated again loses its "
                "lead. Take the best of the current means.",
                lambda scored: np.maximum.accumulate(best_so_far(scored)).tolist(),
            ),
            Mistake(
                "This is the mean over all evaluations so far. Take a mean for each path, then the best.",
                _so_far(lambda seen: float(np.mean([x for v in seen.values() for x in v]))),
            ),
            Mistake(
                "This is the mean over the paths' means. Take the best of them.",
                _so_far(lambda seen: float(np.mean([np.mean(v) for v in seen.values()]))),
            ),
            Mistake(
                "A path's latest reward replaces its earlier ones. Keep them all and take their mean.",
                _so_far(lambda seen: max(v[-1] for v in seen.values())),
            ),
            Mistake(
                "Only a path's first reward counts. Keep them all and take their mean.",
                _so_far(lambda seen: max(v[0] for v in seen.values())),
            ),
            Mistake(
                "You add up a path's rewards, so the path evaluated most often leads. Divide by their "
                "number.",
                _so_far(lambda seen: max(sum(v) for v in seen.values())),
            ),
            Mistake(
                "Off by one: the n-th value must count the n-th evaluation as well.",
                lambda scored: [0.0, *best_so_far(scored)[:-1]],
            ),
        ],
        right="The curve may fall: a lucky path was tried again.",
    ),
    "06.shortlist": Exercise(
        reference=shortlist,
        cases=_shortlist_cases,
        mistakes=[
            *_in_both_orders(
                "The plain mean lets a path win that was lucky once. Shrink each mean towards the mean of "
                "all evaluations.",
                lambda v, scored: float(np.mean(v)),
            ),
            *_in_both_orders(
                "The highest single reward is the luckiest one. Start from the mean of a path's rewards.",
                lambda v, scored: max(v),
            ),
            *_in_both_orders(
                "The denominator has two more evaluations, the numerator has not: means shrink towards 0. "
                "Add twice the mean of all.",
                lambda v, scored: sum(v) / (len(v) + 2),
            ),
            *_in_both_orders(
                "The numerator has two more evaluations, the denominator has not: it is n_p + 2.",
                lambda v, scored: (sum(v) + 2 * _all_mean(scored)) / len(v),
            ),
            *_in_both_orders(
                "Your prior counts as one evaluation; it must count as two.", _drawn(1)
            ),
            *_in_both_orders(
                "Your prior is the mean over paths. It must be the mean over all evaluations, in which a "
                "path seen ten times counts ten times.",
                lambda v, scored: (sum(v) + 2 * _mean_of_means(scored)) / (len(v) + 2),
            ),
            Mistake(
                "Equal paths come in the order of the search. Let the alphabet decide: sort by the pair "
                "(-score, path).",
                _as_found(_drawn(2)),
            ),
            Mistake(
                "The order is reversed: the best path comes first.",
                lambda scored, n: shortlist(scored, len(scored))[::-1][:n],
            ),
            Mistake(
                "sorted() goes from low to high, so these are the worst paths. Sort by the negative score, "
                "or the best n come last.",
                lambda scored, n: sorted(
                    _values(scored), key=lambda p: (_drawn(2)(_values(scored)[p], scored), p)
                )[:n],
            ),
            Mistake(
                "These are the right paths, the worst of them first. The best comes first.",
                lambda scored, n: shortlist(scored, n)[::-1],
            ),
            Mistake(
                "All paths come back. Return the first n only.",
                lambda scored, n: shortlist(scored, len(scored)),
            ),
            Mistake(
                "All paths come back. Return the first n only.",
                lambda scored, n: _as_found(_drawn(2))(scored, len(scored)),
            ),
        ],
        right="One lucky subset is no longer enough.",
    ),
    "06.faulty_setting": Quiz(
        right="c",
        explained={
            "a": "Run A learns hardly anything, but its policy is nearly uniform to the end: the entropy "
            "stays high. Its entropy bonus is 20 times too strong and outweighs the reward.",
            "b": "Run B is the healthy one: the KL stops at its target of 0.05, the entropy falls slowly, "
            "the reward rises.",
            "c": "Run C moved by a KL of more than 10 in its first update, and its entropy fell to 0 at "
            "once: the policy committed itself before it had seen anything, and never explores again.",
            "d": "Run D's clip fraction is 0 and its KL near 0: its policy hardly moves. Its learning rate "
            "is 100 times too low, the opposite fault.",
        },
    ),
}
