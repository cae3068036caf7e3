"""The checks of notebook 08 against wrong and right answers, and the data of its pictures."""

from __future__ import annotations

import numpy as np
import pytest
from answers import function_of

from rmm_lab.course import checks
from rmm_lab.course.exercises import nb08
from rmm_lab.figures import searches as pictures

ORDER = "    order = np.random.default_rng(seed).permutation(n)\n"
WRONG = [
    (
        "08.subset",
        "def f(n, k, seed):\n" + ORDER + "    size = n // k\n    out = []\n"
        "    for i in range(0, size * k, size):\n        out.append(np.array(sorted(order[i:i + size])))\n"
        "    return out",
        "lose the rest",
    ),
    (
        "08.subset",
        "def f(n, k, seed):\n" + ORDER + "    cuts = [n // k * i for i in range(k)] + [n]\n"
        "    return [np.sort(order[a:b]) for a, b in zip(cuts[:-1], cuts[1:])]",
        "whole rest goes to the last",
    ),
    (
        "08.subset",
        "def f(n, k, seed):\n    sizes = [n // k + (i < n % k) for i in range(k)]\n"
        "    ends = np.cumsum(sizes)\n    return [np.arange(e - s, e) for s, e in zip(sizes, ends)]",
        "not shuffled",
    ),
    (
        "08.subset",
        "def f(n, k, seed):\n    order = np.random.default_rng(0).permutation(n)\n"
        "    return [np.array(sorted(part)) for part in np.array_split(order, k)]",
        "seed has no effect",
    ),
    (
        "08.dar",
        "def f(reward, previous, t, t_max, dar_lambda):\n    if not previous:\n        return reward\n"
        "    w = dar_lambda * t / t_max\n    return w * previous + (1 - w) * reward",
        "previous is None",
    ),
    (
        "08.subset",
        "def f(n, k, seed):\n" + ORDER + "    hands = [[] for _ in range(k)]\n"
        "    for i, row in enumerate(order):\n        hands[i % k].append(row)\n"
        "    return [np.sort(h) for h in hands]",
        "in turn",
    ),
    (
        "08.subset",
        "def f(n, k, seed):\n" + ORDER + "    return np.array_split(order, k)",
        "sort each",
    ),
    (
        "08.subset",
        "def f(n, k, seed):\n    out = []\n    while len(out) < k:\n"
        "        rng = np.random.default_rng(seed)\n"
        "        out.append(np.sort(rng.permutation(n)[:n // k]))\n    return out",
        "same rows",
    ),
    (
        "08.subset",
        "def f(n, k, seed):\n    rng, out = np.random.default_rng(seed), []\n    for _ in range(k):\n"
        "        out.append(np.sort(rng.choice(np.arange(n), n // k)))\n    return out",
        "with replacement",
    ),
    (
        "08.subset",
        "def f(n, k, seed):\n    rng, out = np.random.default_rng(seed), []\n    for _ in range(k):\n"
        "        out.append(np.sort(rng.choice(np.arange(n), n // k, replace=False)))\n    return out",
        "overlap",
    ),
    ("08.subset", "def f(n, k, seed):\n    np.array_split(np.arange(n), k)", "returns None"),
    ("08.subset", "def f(n, k, seed):\n    return np.split(np.arange(n), k)", "raised ValueError"),
    (
        "08.standard_error",
        "def f(p, n):\n    return sum(math.sqrt(q * (1 - q) / m) for q, m in zip(p, n)) / len(p)",
        "do not add up",
    ),
    (
        "08.standard_error",
        "def f(p, n):\n    return math.sqrt(sum(q * (1 - q) / m for q, m in zip(p, n)))",
        "1/N is missing",
    ),
    (
        "08.standard_error",
        "def f(p, n):\n    return np.mean(p * (1 - p) / n) ** 0.5",
        "by the root of N",
    ),
    (
        "08.standard_error",
        "def f(p, n):\n    q = p.sum() / len(p)\n    return np.sqrt(q * (1 - q) / n.sum())",
        "pool all examples",
    ),
    (
        "08.standard_error",
        "def f(p, n):\n    return np.sum(p * (1 - p) / n) / len(n) ** 2",
        "variance. Its root",
    ),
    (
        "08.standard_error",
        "def f(p, n):\n    return np.sqrt(np.sum(p - p**2)) / p.size",
        "number of examples is missing",
    ),
    ("08.standard_error", "def f(p, n):\n    return np.sqrt(p * (1 - p) / n) / len(p)", "shape"),
    (
        "08.standard_error",
        "def f(p, n):\n    return math.sqrt(p * (1 - p) / n)",
        "raised TypeError",
    ),
    (
        "08.dar",
        "def f(reward, previous, t, t_max, dar_lambda):\n    if previous is None:\n        return reward\n"
        "    own = dar_lambda * t / t_max\n    return previous + own * (reward - previous)",
        "swapped",
    ),
    (
        "08.dar",
        "def f(reward, previous, t, t_max, dar_lambda):\n    if previous is None:\n        previous = 0\n"
        "    w = dar_lambda * (t / t_max)\n    return reward - w * (reward - previous)",
        "start of a window",
    ),
    (
        "08.dar",
        "def f(reward, previous, t, t_max, dar_lambda):\n    if previous is None:\n        return reward\n"
        "    return reward + dar_lambda * (previous - reward)",
        "t / T_max is missing",
    ),
    (
        "08.dar",
        "def f(reward, previous, t, t_max, dar_lambda):\n    if previous is None:\n        return reward\n"
        "    return reward + t / t_max * (previous - reward)",
        "λ is missing",
    ),
    (
        "08.dar",
        "def f(reward, previous, t, t_max, dar_lambda):\n    if previous is not None:\n"
        "        reward = reward + dar_lambda * t * previous / t_max\n    return reward",
        "sum to 1",
    ),
    (
        "08.dar",
        "def f(reward, previous, t, t_max, dar_lambda):\n    w = dar_lambda * t / t_max\n"
        "    return w * previous + (1 - w) * reward",
        "raised TypeError",
    ),
    (
        "08.dar",
        "def f(reward, previous, t, t_max, dar_lambda):\n    return previous",
        "returns None",
    ),
]
RIGHT = [
    (
        "08.subset",
        "def f(n, k, seed):\n" + ORDER + "    out, start = [], 0\n    for i in range(k):\n"
        "        stop = start + n // k + (1 if i < n % k else 0)\n"
        "        out.append(np.array(sorted(order[start:stop].tolist())))\n        start = stop\n"
        "    return out",
    ),
    (
        "08.standard_error",
        "def f(p, n):\n    total = 0.0\n    for i in range(len(p)):\n"
        "        total += p[i] * (1 - p[i]) / n[i] / len(p) ** 2\n    return math.sqrt(total)",
    ),
    (
        "08.dar",
        "def f(reward, previous, t, t_max, dar_lambda):\n"
        "    w = np.float64(0.0) if previous is None else dar_lambda * t / t_max\n"
        "    return (1 - w) * reward + w * (previous or 0.0)",
    ),
]


@pytest.mark.parametrize(("name", "source", "phrase"), WRONG)
def test_a_wrong_answer_gets_its_hint(name, source, phrase):
    verdict = checks.check(name, function_of(source))
    assert verdict.status == "wrong"
    assert phrase in verdict.message


@pytest.mark.parametrize(("name", "source"), RIGHT)
def test_other_right_answers_pass(name, source):
    assert checks.check(name, function_of(source)).status == "correct"


def test_each_option_of_the_quiz_says_why():
    told = {o: checks.check("08.dar_bias", lambda o=o: o) for o in "abcd"}
    assert [v.status for v in told.values()] == ["wrong", "correct", "wrong", "wrong"]
    assert "neighbours" in told["a"].message
    assert "as it draws poor ones" in told["c"].message
    assert "as noise" in told["d"].message


def test_the_standard_error_by_hand_and_by_chance():
    # Two tasks with variances 0.25 / 25 = 0.01 each: sqrt(0.02) / 2.
    assert nb08.standard_error(np.array([0.5, 0.5]), np.array([25, 25])) == pytest.approx(0.0707107)
    p, n = np.array([0.8, 0.6, 0.9]), np.array([6, 12, 30])
    drawn = (np.random.default_rng(0).binomial(n, p, (200_000, 3)) / n).mean(1)
    assert nb08.standard_error(p, n) == pytest.approx(drawn.std(), rel=0.01)


# ------------------------------------------------------------------------------------ pictures


def test_histograms_hold_every_estimate():
    rng = np.random.default_rng(0)
    estimates = {"10 %": rng.uniform(0.5, 0.9, 10), "1 %": rng.integers(10, 24, 100) / 24}
    figure = pictures.estimates_picture(estimates, 0.7, {"10 %": 0.03, "1 %": 0.1})
    for axes, values in zip(figure.axes, estimates.values(), strict=True):
        assert sum(p.get_height() for p in axes.patches if p.get_hatch()) == len(values)
        whole, mean = axes.lines[:2]
        assert whole.get_xdata()[0] == pytest.approx(70)
        assert mean.get_xdata()[0] == pytest.approx(100 * values.mean())


def test_few_examples_get_a_bar_for_each_possible_value():
    values = np.array([18, 18, 19, 20, 24, 16]) / 24
    figure = pictures.estimates_picture({"1 %": values}, 0.8, {"1 %": 0.1})
    bars = [p for p in figure.axes[0].patches if p.get_hatch()]
    tall = {p.get_x() + p.get_width() / 2: p.get_height() for p in bars if p.get_height()}
    assert [round(float(x) * 24 / 100, 4) for x in tall] == [16, 18, 19, 20, 24]
    assert list(tall.values()) == [1, 2, 1, 1, 1]


def test_dar_curves_show_what_was_paid():
    rows = [
        {"dar": d, "episode": e, "raw_reward": 10.0 * e, "dar_reward": 10.0 * e - d}
        for d in (0.8, 0.0)
        for e in range(4)
    ]
    without, with_dar = pictures.dar_curve_picture(rows, window=2).axes
    assert list(without.lines[0].get_ydata()) == [0, 10, 20, 30]
    assert list(with_dar.lines[1].get_ydata()) == pytest.approx([-0.8, 9.2, 19.2, 29.2])
    dotted = [line for line in with_dar.lines if line.get_linestyle() == ":"]
    assert [line.get_xdata()[0] for line in dotted] == [0, 2]
