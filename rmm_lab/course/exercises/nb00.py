"""Exercises of notebook 00: the reward of Eq. 7, and what the upper bound is."""

from __future__ import annotations

from typing import Any

import numpy as np

from rmm_lab.course.checks import Exercise, Mistake, Quiz
from rmm_lab.reward import reward


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
                "in front, which keeps the reward between 0 and 1.",
                lambda scores: float(np.sum(scores)),
            ),
            Mistake(
                "This is the best task's score. A model that forgets all other tasks would get full "
                "marks; Eq. 7 counts every task alike.",
                lambda scores: float(np.max(scores)),
            ),
            Mistake(
                "This is the worst task's score. A sensible goal, but not the paper's: Eq. 7 counts every "
                "task alike.",
                lambda scores: float(np.min(scores)),
            ),
            Mistake(
                "This is the product of the scores. Eq. 7 has a sum sign, not a product.",
                lambda scores: float(np.prod(scores)),
            ),
            Mistake(
                "This is the median. Eq. 7 counts every task's score, the extreme ones too.",
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
            "a": "All experts started from the base. Its row is the lower bound: a merge that "
            "scores less is worse than no merge at all.",
            "b": "Each expert on its own task shows what N specialised models reach together, so it is "
            "the usual upper bound for one merged model. It is no law: tasks can help each other. In "
            "the paper's Table I, one model trained on all tasks beats the experts on average "
            "(ViT-S/32: 85.79 against 84.90).",
            "c": "The weight average is itself a merged model, the simplest one. A search has to beat it.",
            "d": "One expert used on every task is good at its own and poor at the others. A merge should "
            "easily beat its mean.",
        },
    ),
}
