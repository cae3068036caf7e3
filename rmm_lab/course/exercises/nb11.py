"""Exercises of notebook 11: domination, the hypervolume by hand, a preference, and a critical reading."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from rmm_lab.course.checks import Essay, Exercise, Mistake, Quiz, Task
from rmm_lab.search import front_measures

FRONT = np.array([[0.9, 0.2], [0.5, 0.6], [0.1, 0.8]])


def _point_cases() -> list[tuple[Any, ...]]:
    """Sets of different points; in each, some are dominated, some only in one task's eyes."""
    mixed = np.array([[0.9, 0.2], [0.5, 0.6], [0.5, 0.5], [0.4, 0.55], [0.1, 0.8], [0.9, 0.1]])
    three = np.array(
        [[0.9, 0.1, 0.4], [0.8, 0.3, 0.4], [0.8, 0.2, 0.4], [0.2, 0.9, 0.1], [0.1, 0.8, 0.1]]
    )
    best = np.array([[0.5, 0.6], [0.9, 0.9], [0.2, 0.8]])  # one of them dominates all
    rng = np.random.default_rng(11)
    return [(mixed,), (three,), (best,), (np.round(rng.uniform(0, 1, (12, 2)), 2),)]  # fmt: skip


def non_dominated(points: np.ndarray) -> np.ndarray:
    """Which of different points (n, K) no other one dominates: (n,) bool."""
    return front_measures.non_dominated(points)


def _by(beaten: Callable[..., Any]) -> Callable[..., Any]:
    """Points that none beats, ``beaten(other, own)`` being told of (n, 1, K) and (1, n, K)."""
    return lambda points: ~beaten(points[:, None], points[None]).any(0)


def _dominate(points: np.ndarray) -> np.ndarray:
    """Whether point i dominates point j: (n, n)."""
    one, other = points[:, None], points[None]
    return np.asarray((one >= other).all(-1) & (one > other).any(-1))


def _corners(points: np.ndarray) -> np.ndarray:
    kept = np.zeros(len(points), bool)
    kept[points.argmax(0)] = True
    return kept


DOMINATED = Exercise(
    reference=non_dominated,
    cases=_point_cases,
    mistakes=[
        Mistake(
            "A point counts as beaten here only if another is better at every task. As good everywhere and "
            "better once is enough.",
            _by(lambda other, own: (other > own).all(-1)),
        ),
        Mistake(
            "Every point is as good as itself. It must also be better somewhere to dominate.",
            _by(lambda other, own: (other >= own).all(-1)),
        ),
        Mistake(
            "Better at one task is not enough to dominate: the other must be worse nowhere.",
            _by(lambda other, own: (other > own).any(-1)),
        ),
        Mistake(
            "The answer is turned round: True is for points that no other one dominates.",
            lambda points: ~non_dominated(points),
        ),
        Mistake(
            "The axes are turned: True is here for points that dominate none. Ask of each point whether any "
            "other dominates it.",
            lambda points: ~_dominate(points).any(1),
        ),
        Mistake(
            "Only the best point for each task is left. Those between them may be dominated by none.",
            _corners,
        ),
        Mistake(
            "This keeps what has the best mean. A front has every point that some preference may want.",
            lambda points: points.mean(1) == points.mean(1).max(),
        ),
    ],
    right="What is left is a front: to gain at one task, you must give at another.",
    tolerance=0.0,
)

# ------------------------------------------------------------------------------------ hypervolume


def _area_cases() -> list[tuple[Any, ...]]:
    below = np.array([[1.0, -0.1], [0.8, 0.3], [0.3, 0.9], [-0.4, 1.0], [-0.3, -0.3]])
    return [
        (FRONT,),
        (FRONT[[1, 2, 0]],),
        (below,),
        (np.array([[0.7, 0.5], [0.6, 0.4], [0.2, 0.5]]),),
    ]


def hypervolume(points: np.ndarray) -> float:
    """The area between (0, 0) and points (n, 2): of all that some point dominates, above 0."""
    return front_measures.hypervolume(points)


def _inside(points: np.ndarray) -> np.ndarray:
    """The points above 0, from the right to the left."""
    own = points[(points > 0).all(1)]
    return own[np.lexsort((-own[:, 1], -own[:, 0]))]


def _trapezoids(points: np.ndarray) -> float:
    own = _inside(points)[::-1]
    x, y = np.r_[0.0, own[:, 0]], np.r_[own[0, 1], own[:, 1]]
    return float((np.diff(x) * (y[1:] + y[:-1]) / 2).sum())


def _stairs_above(points: np.ndarray) -> float:
    own = _inside(points)[::-1]
    return float((np.diff(np.r_[0.0, own[:, 0]]) * np.r_[own[0, 1], own[:-1, 1]]).sum())


def _unfiltered(points: np.ndarray) -> float:
    return _strips(points[np.argsort(-points[:, 0])])


def _strips(points: np.ndarray) -> float:
    """What each point adds, in this order, above the highest before it."""
    x, y = points.T
    below = np.maximum.accumulate(np.r_[0.0, y])[:-1]
    return float((x * (y - below).clip(0)).sum())


AREA = Exercise(
    reference=hypervolume,
    cases=_area_cases,
    mistakes=[
        Mistake(
            "You add the points' rectangles. They overlap, and what two points dominate counts once.",
            lambda points: float(_inside(points).prod(1).sum()),
        ),
        Mistake(
            "You add the points' rectangles. They overlap, and what two points dominate counts once.",
            lambda points: float(points.prod(1).sum()),
        ),
        Mistake(
            "You walk from the left to the right. A strip begins at 0 and ends at its point, so begin at the "
            "right, with the longest.",
            lambda points: _strips(_inside(points)[::-1]),
        ),
        Mistake(
            "This is the largest single rectangle. Other points add what lies outside of it.",
            lambda points: float(_inside(points).prod(1).max()),
        ),
        Mistake(
            "This is the box around all points. No single model is best at both tasks; the corner of the "
            "box is dominated by none.",
            lambda points: float(_inside(points).max(0).prod()),
        ),
        Mistake(
            "You join the points by straight lines. Between two models there is none: the border goes in "
            "stairs below the lines.",
            _trapezoids,
        ),
        Mistake(
            "The stairs go above the points. Left of a point the height is that point's own, not that of "
            "the next one to the left.",
            _stairs_above,
        ),
        Mistake(
            "A point below 0 at a task takes area away, or adds some. It dominates nothing above 0: "
            "leave it out.",
            _unfiltered,
        ),
    ],
    right="From the right to the left, each point adds the strip that rises above the best so far.",
)

# ------------------------------------------------------------------------------------ a preference


def _preference_cases() -> list[tuple[Any, ...]]:
    hollow = np.array([[1.0, 0.05], [0.45, 0.45], [0.05, 1.0]])
    round_ = np.array([[1.0, 0.1], [0.95, 0.5], [0.7, 0.8], [0.2, 0.95]])
    three = np.array([[0.9, 0.2, 0.4], [0.5, 0.5, 0.5], [0.3, 0.9, 0.6], [0.6, 0.6, 0.1]])
    cases = [
        (hollow, (0.5, 0.5)),
        (round_, (0.7, 0.3)),
        (round_, (0.2, 0.8)),
        (round_, (0.95, 0.05)),
    ]
    return [
        (p, np.array(w)) for p, w in [*cases, (three, (0.4, 0.4, 0.2)), (three, (0.1, 0.2, 0.7))]
    ]


def tchebycheff(points: np.ndarray, weights: np.ndarray) -> int:
    """The point (of (n, K)) whose largest weighted lack, w_k (1 - f_k), is the smallest: its number."""
    return int((weights * (1 - points)).max(1).argmin())


TCHEBYCHEFF = Exercise(
    reference=tchebycheff,
    cases=_preference_cases,
    mistakes=[
        Mistake(
            "This is the weighted mean. It never picks a point that lies in a hollow of the front.",
            lambda points, weights: int((points @ weights).argmax()),
        ),
        Mistake(
            "The largest lack is one of each point, over the tasks: the maximum goes along axis 1.",
            lambda points, weights: int((weights * (1 - points)).max(0).argmin()),
        ),
        Mistake(
            "The weights are not used: this is the point whose worst task lacks least.",
            lambda points, weights: int((1 - points).max(1).argmin()),
        ),
        Mistake(
            "You weigh the scores. Weigh what is lacking to the expert, 1 - f: a task that counts more may "
            "lack less.",
            lambda points, weights: int((weights * points).min(1).argmax()),
        ),
        Mistake(
            "You look for the largest lack. The best point has the smallest of its largest lacks.",
            lambda points, weights: int((weights * (1 - points)).max(1).argmax()),
        ),
        Mistake(
            "This looks at each point's smallest lack. Its largest is what the preference complains about.",
            lambda points, weights: int((weights * (1 - points)).min(1).argmin()),
        ),
    ],
    right="Each point of a front, hollow or not, is the answer to some weights.",
    tolerance=0.0,
)

HM3 = Quiz(
    right="b",
    explained={
        "a": "A front beyond the experts would still have to fit into the box: three sides of 1.1 hold "
        "1.331.",
        "b": "1.1 x 1.1 x 1.1 = 1.331. So 1.8120 was computed with another reference point or other "
        "scores than those stated. We cannot tell which, and neither can a reader.",
        "c": "More points fill the box better. They do not make it larger.",
        "d": "A hypervolume above 1 only says that some merge beats an expert somewhere. Above 1.331 it "
        "says that the stated set-up is not the one used.",
    },
)

REVIEW = Essay(
    rubric=(
        "asks for the reference point and how scores are normalised, and gives the bound that follows",
        "asks for several seeds, with a spread or an interval",
        "asks for baselines that need no search: the simplexes of averages and of least squares",
        "asks for the same evaluations for all, or for the price of each",
        "asks for a test split that chose nothing, scored once",
    ),
    model="Please state the reference point and both ends of each normalised score: three scores of at "
    "most 1.1 bound the hypervolume by 1.331, and yours is above it. Report at least five seeds, paired, "
    "with a 95 % interval. Add the simplex of weighted averages and that of least squares, which need no "
    "search, and tune the other baselines with as many evaluations as your method had. Choose the front "
    "on one split and score it once on another; what a search promises on its own noisy scores is not "
    "its result.",
    needs={
        r"reference|normali[sz]": "A hypervolume means nothing without two things. Ask for one of them.",
        r"seed|spread|interval|deviation": "Ask how far the numbers could move by luck.",
        r"baseline|average|simplex|least squares": "Ask what the method is compared with.",
    },
    words=(40, 160),
)

EXERCISES: dict[str, Task] = {
    "11.non_dominated": DOMINATED,
    "11.hypervolume": AREA,
    "11.tchebycheff": TCHEBYCHEFF,
    "11.hm3": HM3,
    "11.review": REVIEW,
}
