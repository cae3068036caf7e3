"""The checks of notebook 08 against wrong and right answers, and the data of its pictures."""

from __future__ import annotations

import numpy as np
import pytest
from answers import answers

from rmm_lab.course.exercises import nb08
from rmm_lab.figures import searches as pictures

WRONG, RIGHT = answers("""
## 08.subset
def f(n, k, seed):
    order = np.random.default_rng(seed).permutation(n)
# lose the rest
    size = n // k
    out = []
    for i in range(0, size * k, size):
        out.append(np.array(sorted(order[i:i + size])))
    return out
# whole rest goes to the last
    cuts = [n // k * i for i in range(k)] + [n]
    return [np.sort(order[a:b]) for a, b in zip(cuts[:-1], cuts[1:])]
# in turn
    hands = [[] for _ in range(k)]
    for i, row in enumerate(order):
        hands[i % k].append(row)
    return [np.sort(h) for h in hands]
# sort each
    return np.array_split(order, k)
# correct
    out, start = [], 0
    for i in range(k):
        stop = start + n // k + (1 if i < n % k else 0)
        out.append(np.array(sorted(order[start:stop].tolist())))
        start = stop
    return out

## 08.subset
def f(n, k, seed):
# not shuffled
    sizes = [n // k + (i < n % k) for i in range(k)]
    ends = np.cumsum(sizes)
    return [np.arange(e - s, e) for s, e in zip(sizes, ends)]
# seed has no effect
    order = np.random.default_rng(0).permutation(n)
    return [np.array(sorted(part)) for part in np.array_split(order, k)]
# same rows
    out = []
    while len(out) < k:
        rng = np.random.default_rng(seed)
        out.append(np.sort(rng.permutation(n)[:n // k]))
    return out
# returns None
    np.array_split(np.arange(n), k)
# raised ValueError
    return np.split(np.arange(n), k)

## 08.subset
def f(n, k, seed):
    rng, out = np.random.default_rng(seed), []
# with replacement
    for _ in range(k):
        out.append(np.sort(rng.choice(np.arange(n), n // k)))
    return out
# overlap
    for _ in range(k):
        out.append(np.sort(rng.choice(np.arange(n), n // k, replace=False)))
    return out

## 08.standard_error
def f(p, n):
# do not add up
    return sum(math.sqrt(q * (1 - q) / m) for q, m in zip(p, n)) / len(p)
# 1/N is missing
    return math.sqrt(sum(q * (1 - q) / m for q, m in zip(p, n)))
# by the root of N
    return np.mean(p * (1 - p) / n) ** 0.5
# pool all examples
    q = p.sum() / len(p)
    return np.sqrt(q * (1 - q) / n.sum())
# variance. Its root
    return np.sum(p * (1 - p) / n) / len(n) ** 2
# number of examples is missing
    return np.sqrt(np.sum(p - p**2)) / p.size
# shape
    return np.sqrt(p * (1 - p) / n) / len(p)
# raised TypeError
    return math.sqrt(p * (1 - p) / n)
# correct
    total = 0.0
    for i in range(len(p)):
        total += p[i] * (1 - p[i]) / n[i] / len(p) ** 2
    return math.sqrt(total)

## 08.dar
def f(reward, previous, t, t_max, dar_lambda):
# previous is None
    if not previous:
        return reward
    w = dar_lambda * t / t_max
    return w * previous + (1 - w) * reward
# start of a window
    if previous is None:
        previous = 0
    w = dar_lambda * (t / t_max)
    return reward - w * (reward - previous)
# sum to 1
    if previous is not None:
        reward = reward + dar_lambda * t * previous / t_max
    return reward
# raised TypeError
    w = dar_lambda * t / t_max
    return w * previous + (1 - w) * reward
# returns None
    return previous
# correct
    w = np.float64(0.0) if previous is None else dar_lambda * t / t_max
    return (1 - w) * reward + w * (previous or 0.0)

## 08.dar
def f(reward, previous, t, t_max, dar_lambda):
    if previous is None:
        return reward
# swapped
    own = dar_lambda * t / t_max
    return previous + own * (reward - previous)
# t / T_max is missing
    return reward + dar_lambda * (previous - reward)
# λ is missing
    return reward + t / t_max * (previous - reward)

## 08.dar_bias
def f():
# neighbours
    return "a"
# as it draws poor ones
    return "c"
# as noise
    return "d"
# correct
    return "b"
""")


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
