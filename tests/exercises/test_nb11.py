"""Exercises of notebook 11: wrong answers, written as students write them, meet the hint that is meant."""

from __future__ import annotations

import numpy as np
import pytest

from rmm_lab.course.exercises import nb11

KEEP = "def f(p):\n return np.array([not any(%s for q in p) for o in p])"
AREA = "def f(p):\n p = sorted(map(tuple, p[(p > 0).all(1)]))\n"
WRONG = [
    ("11.non_dominated", KEEP % "all(q > o)", "only if another is better at every task"),
    ("11.non_dominated", KEEP % "all(q >= o)", "as good as itself"),
    ("11.non_dominated", KEEP % "any(q > o)", "not enough to dominate"),
    ("11.non_dominated", "def f(p):\n return p.sum(1) == p.sum(1).max()", "best mean"),
    ("11.non_dominated", "def f(p):\n a, b = p[:, None], p[None]\n"
     " return ~((a >= b).all(-1) & (a > b).any(-1)).any(1)", "axes are turned"),
    ("11.hypervolume", "def f(p):\n return sum(x * y for x, y in p)", "They overlap"),
    ("11.hypervolume", AREA + " a, top = 0, 0\n for x, y in p:\n"
     "  a, top = a + x * max(0, y - top), max(y, top)\n return a", "from the left to the right"),
    ("11.tchebycheff", "def f(p, w):\n return (w * (1 - p)).max(0).argmin()", "along axis 1"),
    ("11.non_dominated", "def f(p):\n return np.flatnonzero(p[:, 0] > 2)", "shape"),
    ("11.hypervolume", "def f(p):\n return sum(x * y for x, y in p if x > 0 and y > 0)", "They overlap"),
    ("11.hypervolume", AREA + " return max(x * y for x, y in p)", "largest single rectangle"),
    ("11.hypervolume", AREA + " return max(x for x, _ in p) * max(y for _, y in p)", "box around all"),
    ("11.hypervolume", AREA + " a, left = 0, (0, p[0][1])\n for q in p:\n"
     "  a, left = a + (q[0] - left[0]) * left[1], q\n return a", "stairs go above"),
    ("11.hypervolume", "def f(p):\n a, top = 0, 0\n for x, y in p[p[:, 0].argsort()[::-1]]:\n"
     "  a, top = a + x * max(0, y - top), max(y, top)\n return a", "leave it out"),
    ("11.tchebycheff", "def f(p, w):\n return (w * p).sum(1).argmax()", "weighted mean"),
    ("11.tchebycheff", "def f(p, w):\n return p.min(1).argmax()", "weights are not used"),
    ("11.tchebycheff", "def f(p, w):\n return (p * w).min(1).argmax()", "weigh the scores"),
    ("11.hm3", "def f():\n return 'd'", "Above 1.331"),
    ("11.review", "def f():\n return 'Please run it again with more seeds. ' * 8", "means nothing without"),
]  # fmt: skip
RIGHT = [
    ("11.non_dominated", KEEP % "all(q >= o) and any(q > o)"),
    ("11.hypervolume", AREA + " a, left = 0, 0\n for i, (x, y) in enumerate(p):\n"
     "  a, left = a + (x - left) * max(v for _, v in p[i:]), x\n return a"),
    ("11.tchebycheff", "def f(p, w):\n return min(range(len(p)), key=lambda i: max(w * (1 - p[i])))"),
]  # fmt: skip


def test_the_references_by_hand():
    points = np.array([[0.9, 0.2], [0.5, 0.6], [0.4, 0.6]])
    assert nb11.non_dominated(points).tolist() == [True, True, False]
    assert nb11.hypervolume(points) == pytest.approx(0.9 * 0.2 + 0.5 * 0.4)
    hollow = np.array([[1.0, 0.0], [0.4, 0.4], [0.0, 1.0]])
    assert nb11.tchebycheff(hollow, np.array([0.5, 0.5])) == 1  # lacks 0.3, the others 0.5
    assert nb11.tchebycheff(hollow, np.array([0.9, 0.1])) == 0
