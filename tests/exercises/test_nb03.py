"""Exercises of notebook 03: wrong answers get the hint that is meant for them; figures show their data."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from rmm_lab.course.checks import Exercise
from rmm_lab.course.exercises.nb03 import EXERCISES
from rmm_lab.figures import models as pictures

# (exercise, what a student may write, a phrase of the answer)
STEP = "def f(s, k, a):\n n = s.shape[0]\n m = np.array(s)\n"
WRONG = [
    ("03.count_paths", "def f(n, L):\n return n ** L + 2", "expected"),
    ("03.count_paths", "def f(n, L):\n return n ** L + 1", "skipping everything"),
    ("03.apply_action", STEP + " if a < n:\n  m[a, k] += 1\n  return m, k + 1\n if a == n:\n"
     "  return m, k + 1\n m[:, k - 1] = 0\n return m, k - 1", "Back undoes nothing"),
    ("03.apply_action", STEP + " if a < n:\n  m[a, k] += 1\n  return m, k + 1\n if a == n:\n"
     "  return m, k + 1\n m[:, k - 1] -= m[:, k - 1] > 0\n return m, k - 1", "Back undoes nothing"),
    ("03.apply_action", STEP + " m[min(a, n - 1), k] += 1\n return m, k + (-1 if a > n else 1)",
     "skip and back change the map"),
    ("03.apply_action", STEP + " moves = [0] * n + [1, -1]\n if a < n:\n  m[a, k] += 1\n"
     " return m, k + moves[a]", "stays where it is"),
    ("03.apply_action", STEP + " if a == n + 1:\n  return m, k - 1\n k = k + 1\n if a < n:\n"
     "  m[a, k % m.shape[1]] += 1\n return m, k", "Count first, then move"),
    ("03.apply_action", STEP + " if a < n:\n  m[a, k] = 1\n return m, k - 1 if a > n else k + 1",
     "set the entry to 1"),
    ("03.apply_action", STEP + " if a < n:\n  m[:, k] = np.eye(n)[a]\n return m, k - 1 if a > n else k + 1",
     "You clear the column"),
    ("03.apply_action", STEP + " if a < n:\n  m[a, k] += 1\n return m, k - 1 if a == n else k + 1",
     "swapped"),
    ("03.apply_action", STEP + " if a < n:\n  m[a, k] += 1\n return m, k + {n: 2, n + 1: -1}.get(a, 1)",
     "jumps over two"),
    ("03.apply_action", STEP + " if a < n:\n  m[a, k] += 1\n return m, k + (a <= n)", "back does not move"),
    ("03.apply_action", STEP + " if a < n:\n  m[a, k] += 1\n return m, k + {n: 0, n + 1: -1}.get(a, 1)",
     "skip does not advance"),
    ("03.apply_action", STEP + " if a == n + 1:\n  m[:, k - 1] -= 1\n  return m, k - 1\n if a < n:\n"
     "  m[a, k] += 1\n return m, k + 1", "Back undoes nothing"),
    ("03.apply_action", STEP + " if a in (0, 1, 2):\n  m[a, k] += 1\n return m, k - 1 if a == 4 else k + 1",
     "You assume three sources"),
    ("03.apply_action", STEP + " if a < n:\n  m[a, k] += 1\n  return m, k + 2\n"
     " return m, k - 1 if a > n else k + 1",
     "second value: expected 1, found 2"),
    ("03.apply_action", STEP + " if a < n:\n  m[a, k] += 1\n return m", "the new layer is missing"),
    ("03.apply_action", "def f(s, k, a):\n n = s.shape[0]\n if a < n:\n  s[a, k] += 1\n"
     " return s, k - 1 if a > n else k + 1", "changes its arguments in place"),
    ("03.apply_action", STEP + " m[a, k] += 1\n return m, k + 1", "IndexError"),
    ("03.apply_action", STEP + " if a < n:\n  m[k, a] += 1\n return m, k - 1 if a > n else k + 1",
     "IndexError"),
    ("03.apply_action", STEP + " if a < n:\n  m[a, k] += 1", "returns None"),
    ("03.legal", "def f(n, k, s, full):\n return np.array([1 - full] * n + [1, 1])",
     "back is legal everywhere"),
    ("03.legal", "def f(n, k, s, full):\n return np.array([not full] * n + [1, k != 0])", "at layer 0 only"),
    ("03.legal", "def f(n, k, s, full):\n return np.array([1] * n + [1, k not in s])", "Sources stay legal"),
    ("03.legal", "def f(n, k, s, full):\n m = np.ones(n + 2)\n if full:\n  m[:n] = 0\n if k <= s[-1]:\n"
     "  m[-1] = 0\n return m", "only at the first layer of a stack"),
    ("03.legal", "def f(n, k, s, full):\n return np.array([not full] * n + [1, k != 0 and k != 4])",
     "starts says where"),
    ("03.legal", "def f(n, k, s, full):\n return np.array([full] * n + [0, k in s])", "wrong way round"),
    ("03.legal", "def f(n, k, s, full):\n return np.array([not full] * (n + 1) + [k not in s])",
     "the only way to the end"),
    ("03.legal", "def f(n, k, s, full):\n m = np.ones(n + 2)\n m[:n] = not full\n if k in s:\n  m[n:] = 0\n"
     " return m", "Any layer can be left out"),
    ("03.legal", "def f(n, k, s, full):\n return np.array([not full] * n + [k not in s, 1])",
     "in each other's place"),
    ("03.legal", "def f(n, k, s, full):\n return [int(not full)] * n + [1, int(k not in s)]", "in a list"),
    ("03.legal", "def f(n, k, s, full):\n return np.array([not full] * n + [k not in s])", "expected shape"),
    ("03.legal", "def f(n, k, s, full):\n return np.array([not full] * n + [1, k not in s[0]])", "TypeError"),
    ("03.count_paths", "def f(n, layers):\n out = 1\n for _ in range(layers):\n  out *= n\n return out",
     "Skip is missing"),
    ("03.count_paths", "def f(n, layers):\n return pow(n + 2, layers)", "count both skip and back"),
    ("03.count_paths", "def f(n, layers):\n return sum(n + 1 for _ in range(layers))", "You add the choices"),
    ("03.count_paths", "def f(n, layers):\n return pow(layers, n + 1)", "swapped"),
    ("03.count_paths", "def f(n, layers):\n return n ** layers * (n + layers) // n", "one skipped layer"),
    ("03.count_paths", "def f(n, layers):\n import math\n return sum(math.comb(layers, j) * n ** j "
     "for j in range(1, layers + 1))", "skips every layer"),
    ("03.count_paths", "def f(n, layers):\n return pow(layers, n)", "swapped, and skip is missing"),
    ("03.count_paths", "def f(n, layers):\n return float(n + 1) ** layers", "whole number"),
    ("03.count_paths", "def f(n, layers):\n return np.power(n + 1.0, layers)", "whole number"),
    ("03.count_paths", "def f(n, layers):\n (n + 1) ** layers", "returns None"),
    ("03.back", "def f():\n return 'a'", "Nothing is removed"),
    ("03.back", "def f():\n return 'b'", "Only the position"),
    ("03.back", "def f():\n return 'd'", "every layer but the first"),
]  # fmt: skip

RIGHT = [
    ("03.apply_action", STEP + " m = m.astype(int)\n if a < n:\n  m[a, k] = s[a, k] + 1\n"
     " return [m, np.int64(k - 1 if a == n + 1 else k + 1)]"),
    ("03.legal", "def f(n, k, s, full):\n return np.array([not full] * n + [True, all(k != x for x in s)])"),
    ("03.count_paths", "def f(n, layers):\n return 1 if layers == 0 else (n + 1) * f(n, layers - 1)"),
    ("03.back", "def f():\n return 'C'"),
]  # fmt: skip


def test_the_references_by_hand() -> None:
    references = {n: e.reference for n, e in EXERCISES.items() if isinstance(e, Exercise)}
    state = np.array([[0, 2, 0], [1, 0, 0]])
    step = references["03.apply_action"]
    for action, new, layer in (
        (0, [[0, 3, 0], [1, 0, 0]], 2),
        (1, [[0, 2, 0], [1, 1, 0]], 2),
        (2, state.tolist(), 2),
        (3, state.tolist(), 0),
    ):
        found, place = step(state, 1, action)
        assert found.tolist() == new
        assert place == layer
    mask = references["03.legal"]
    assert mask(2, 0, (0,), False).tolist() == [1, 1, 1, 0]
    assert mask(2, 4, (0, 4), True).tolist() == [0, 0, 1, 0]
    assert mask(2, 5, (0, 4), True).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(("n_sources", "n_layers"), [(1, 1), (2, 3), (3, 2)])
def test_paths_are_counted_by_listing_them(n_sources: int, n_layers: int) -> None:
    task = EXERCISES["03.count_paths"]
    assert isinstance(task, Exercise)
    choices = [*range(n_sources), None]
    paths = {
        tuple((a, k) for k, a in enumerate(each) if a is not None)
        for each in product(choices, repeat=n_layers)
    }
    assert task.reference(n_sources, n_layers) == len(paths)


# ------------------------------------------------------------------------------------------ figures


def test_maps_show_their_counts_and_titles() -> None:
    states = [("start", np.zeros((2, 3)), 0), ("1: a", np.array([[1, 0, 0], [0, 0, 2]]), 3)]
    figure = pictures.maps_picture(states, ("a", "b"), columns=2)
    assert [axes.get_title() for axes in figure.axes] == ["start", "1: a"]
    texts = [[(t.get_position(), t.get_text()) for t in axes.texts] for axes in figure.axes]
    assert texts == [[], [((0, 0), "1"), ((2, 1), "2")]]
    assert [len(axes.patches) for axes in figure.axes] == [1, 0]  # no frame at the end


def test_depths_are_counted_plain_and_other() -> None:
    depths, plain = np.array([2, 3, 3, 3, 5]), np.array([False, True, True, False, False])
    axes = pictures.depth_picture(depths, plain, 3).axes[0]
    once, other = ([bar.get_height() for bar in c] for c in axes.containers)
    assert once == [0, 0, 0, 2, 0, 0]
    assert other == [0, 0, 1, 1, 0, 1]
    assert [t.get_text() for t in axes.texts if t.get_text().isdigit()] == ["1", "3", "1"]
