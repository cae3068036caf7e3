"""Exercises of notebook 05b: a probe of three steps, and one of the student's own design."""

from __future__ import annotations

from typing import Any

from rmm_lab.course.checks import Essay, Exercise, Mistake, Task


def alternate(coin: int, actions: list[int]) -> float:
    """Paid at the end: the share of three steps that went to the coin's side, the other, the coin's."""
    if len(actions) < 3:
        return 0.0
    return sum(a == (coin + t) % 2 for t, a in enumerate(actions)) / 3


def _cases() -> list[tuple[Any, ...]]:
    walks = ([0], [1, 0], [0, 1, 0], [1, 0, 1], [0, 0, 0], [1, 1, 0], [1, 0], [0, 1, 1])
    return [(coin, list(walk)) for coin in (0, 1) for walk in walks]


def _share(coin: int, actions: list[int]) -> float:
    return sum(a == (coin + t) % 2 for t, a in enumerate(actions)) / len(actions)


def _last(coin: int, actions: list[int]) -> float:
    t = len(actions) - 1
    return float(actions[t] == (coin + t) % 2) / 3


ALTERNATE = Exercise(
    reference=alternate,
    cases=_cases,
    mistakes=[
        Mistake(
            "Every step is paid. The reward must come at the end alone: that is what makes the probe hard.",
            _share,
        ),
        Mistake(
            "You pay each step for its own action. An agent could then learn them one by one; pay for "
            "all three at the end.",
            _last,
        ),
        Mistake(
            "The sides are swapped: the first step should go to the coin's own side.",
            lambda coin, actions: alternate(1 - coin, actions),
        ),
        Mistake(
            "The coin plays no part: an agent that never looks would be paid in full.",
            lambda coin, actions: alternate(0, actions),
        ),
        Mistake(
            "This wants the coin's side three times. The second step goes to the other side.",
            lambda coin, actions: sum(a == coin for a in actions) / 3 if len(actions) == 3 else 0.0,
        ),
        Mistake(
            "This is the number of right steps. Return their share, so that the best reward is 1.",
            lambda coin, actions: 3 * alternate(coin, actions),
        ),
        Mistake(
            "This pays only if all three are right. Give a third for each, or an agent finds it too "
            "rarely.",
            lambda coin, actions: float(alternate(coin, actions) == 1.0),
        ),
    ],
    right="Which of three actions earned it, the agent must find out by itself.",
)

DESIGN = Essay(
    rubric=(
        "names one bug, in one line of code",
        "says what is shown, which actions there are, and what pays",
        "gives the number that a right agent ends at",
        "gives the number that the broken one ends at, or what else tells them apart",
        "is the simplest that does it: nothing in it can be left out",
    ),
    model="Bug: returns are computed for the whole batch as if it were one episode, so rewards of the next "
    "episode leak into the last. Probe: one step, one coin; action 0 pays 0, action 1 pays 1 where the "
    "coin is heads and 0 otherwise, with gamma 1. A right agent's returns are 0 or 1, and its critic "
    "separates heads from tails. The broken one's returns grow along the batch: its first episode has a "
    "return of about 10 in place of at most 1, so the critic learns the place in the batch, and the "
    "policy hardly moves.",
    needs={
        r"bug|wrong|broken|forg[eo]t|mistake|missing": "Say which bug the probe is for.",
        r"pay|reward|earn": "Say what pays.",
        r"right|correct": "Say how a right agent ends, and how the broken one.",
    },
    words=(40, 150),
)

EXERCISES: dict[str, Task] = {"05b.alternate": ALTERNATE, "05b.design": DESIGN}
