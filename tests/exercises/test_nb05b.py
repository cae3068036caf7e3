"""Exercises of notebook 05b: wrong answers, written as students write them, meet the hint that is meant."""

from __future__ import annotations

import pytest

from rmm_lab.course.exercises import nb05b
from rmm_lab.figures.searches import loop_picture

PAY = "def f(c, a):\n r = %s\n n = sum(x == y for x, y in zip(a, r))\n return %s"
SIDES = "[c, 1 - c, c]"
END = "n / 3 if len(a) > 2 else 0"
NAME = "05b.alternate"
WRONG = [
    (NAME, PAY % (SIDES, "n / len(a)"), "Every step is paid"),
    (NAME, PAY % (SIDES, "(a[-1] == r[len(a) - 1]) / 3"), "its own action"),
    (NAME, PAY % ("[1 - c, c, 1 - c]", END), "sides are swapped"),
    (NAME, PAY % ("[0, 1, 0]", END), "coin plays no part"),
    (NAME, PAY % ("[c, c, c]", END), "three times"),
    (NAME, PAY % (SIDES, "n if len(a) > 2 else 0"), "number of right steps"),
    (NAME, PAY % (SIDES, "float(n == 3)"), "only if all three"),
    (NAME, PAY % (SIDES, "None"), "returns None"),
]
RIGHT = [(NAME, PAY % (SIDES, END))]


def test_the_reference_by_hand():
    assert nb05b.alternate(1, [1, 0, 0]) == pytest.approx(2 / 3)
    assert nb05b.alternate(1, [1, 0]) == 0


def test_the_loop_has_its_three_parts():
    texts = [t.get_text() for t in loop_picture().axes[0].texts]
    assert [t.split("\n")[0] for t in texts if "\n" in t] == ["actor", "environment", "critic"]
    assert {"action", "state", "advantage"} <= set(texts)
