"""Exercises of notebook 00: the reward of Eq. 7, and what the upper bound is."""

from __future__ import annotations

from typing import Any

import numpy as np

from rmm_lab.course.checks import Exercise, Mistake, Quiz
from rmm_lab.engine.scorer import reward


def _scores() -> list[tuple[Any, ...]]:
    return [
        (np.array([0.9, 0.4]),),
        (np.array([0.5, 0.75, 0.95]),),
        (np.array([0.2, 0.3, 0.8, 0.6]),),
    ]


EXERCISES: dict[str, Exercise | Quiz] = {
    "00.predict_reward": Exercise(
        reference=reward,
        cases=_scores,
        mistakes=[
            Mistake(
                "This is the sum over tasks. It grows with the number of tasks; Eq. 7 has a factor 1/N "
                "in front, so that a reward stays between 0 and 1.",
                lambda scores: float(np.sum(scores)),
            ),
            Mistake(
                "This is the best task's score. A model that forgets all other tasks would get full "
                "marks; Eq. 7 counts every task alike.",
                lambda scores: float(np.max(scores)),
            ),
            Mistake(
                "This is the worst task's score. It is a sensible goal, but not the paper's: Eq. 7 "
                "counts every task alike.",
                lambda scores: float(np.min(scores)),
            ),
            Mistake(
                "This is the product of the scores. Eq. 7 has a sum sign, not a product.",
                lambda scores: float(np.prod(scores)),
            ),
            Mistake(
                "This is the median. Eq. 7 weighs every task's score, also the extreme ones.",
                lambda scores: float(np.median(scores)),
            ),
            Mistake(
                "You divide by 2, whatever the number of tasks. N is the length of scores.",
                lambda scores: float(np.sum(scores) / 2),
            ),
            Mistake(
                "The mean is right, the unit is not: rewards in this kit run from 0 to 1, not to 100.",
                lambda scores: float(100 * np.mean(scores)),
            ),
            Mistake(
                "You average the first two tasks only. Eq. 7 runs over all N of them.",
                lambda scores: float(np.mean(scores[:2])),
            ),
        ],
        right="The mean over the tasks: each counts alike, however many examples it has.",
    ),
    "00.upper_bound": Quiz(
        right="b",
        explained={
            "a": "The base is where all experts started. Its row is the lower bound: a merge that "
            "scores less than this was worse than no merge at all.",
            "b": "Each expert on its own task shows what N specialised models reach together, so it is "
            "taken as the upper bound for one merged model. It is no law: tasks can help each other. In "
            "the paper's Table I, one model trained on all tasks beats the experts on average "
            "(ViT-S/32: 85.79 against 84.90).",
            "c": "The weight average is a merged model itself, the simplest one. It is what a search has "
            "to beat, not what it cannot pass.",
            "d": "One expert used on every task is good at its own and poor at the others. A merge should "
            "pass its mean easily.",
        },
    ),
}
