"""The checks of notebook 06 against wrong and right answers, and the data of its pictures."""

from __future__ import annotations

import numpy as np
import pytest
from answers import answers

from rmm_lab.course.exercises import nb06
from rmm_lab.figures import searches as pictures
from rmm_lab.ppo import Args

WRONG, RIGHT = answers("""
## 06.best_so_far
def f(scored):
# highest single reward
    return [max(r for _, r in scored[:i + 1]) for i in range(len(scored))]
# A mean may fall
    total, count, out, top = {}, {}, [], 0.0
    for p, r in scored:
        total[p] = total.get(p, 0) + r
        count[p] = count.get(p, 0) + 1
        top = max(top, max(total[q] / count[q] for q in total))
        out.append(top)
    return out
# mean for each path
    r = np.array([r for _, r in scored])
    return (np.cumsum(r) / np.arange(1, len(r) + 1)).tolist()
# replaces its earlier ones
    d, out = {}, []
    for p, r in scored:
        d[p] = r
        out.append(max(d.values()))
    return out
# first reward counts
    d, out = {}, []
    for p, r in scored:
        d.setdefault(p, r)
        out.append(max(d.values()))
    return out
# Divide by their number
    d, out = {}, []
    for p, r in scored:
        d[p] = d.get(p, 0) + r
        out.append(max(d.values()))
    return out
# Off by one
    d, out = defaultdict(list), []
    for p, r in scored:
        out.append(max((np.mean(v) for v in d.values()), default=0.0))
        d[p].append(r)
    return out
# returns None
    max(scored)
# For f(
    return max(scored)
# raised IndexError
    return scored[99]
# mean over the paths
    d, out = defaultdict(list), []
    for p, r in scored:
        d[p].append(r)
        out.append(sum(sum(v) / len(v) for v in d.values()) / len(d))
    return out
# correct
    out = np.zeros(len(scored))
    for i in range(len(scored)):
        known = scored[: i + 1]
        paths = {p for p, _ in known}
        out[i] = max(np.mean([r for q, r in known if q == p]) for p in paths)
    return list(out)
# correct
    total, count, out = defaultdict(float), defaultdict(int), []
    for p, r in scored:
        total[p] += r
        count[p] += 1
        out.append(sorted(total[q] / count[q] for q in total)[-1])
    return out

## 06.shortlist
def f(scored, n):
# sorted() goes from low to high
    seen = defaultdict(list)
    for p, r in scored:
        seen[p].append(r)
    m = sum(r for _, r in scored) / len(scored)
    return sorted(seen, key=lambda p: ((sum(seen[p]) + 2 * m) / (len(seen[p]) + 2), p))[:n]
# For f(
    return scored[:n]
# raised KeyError
    return {}[n]
# correct
    prior = float(np.mean([r for _, r in scored], dtype=np.float64))
    names = sorted({p for p, _ in scored})
    score = []
    for p in names:
        own = [r for q, r in scored if q == p] + [prior] * 2
        score.append(sum(own) / len(own))
    return [names[i] for i in np.argsort(-np.array(score), kind="stable")[:n]]

## 06.shortlist
def f(scored, n):
    by_path = defaultdict(list)
    for path, reward in scored:
        by_path[path] += [reward]
    m = np.mean([r for _, r in scored])
# plain mean
    return sorted(by_path, key=lambda p: -sum(by_path[p]) / len(by_path[p]))[:n]
# luckiest
    return sorted(by_path, key=lambda p: -max(by_path[p]))[:n]
# towards 0
    s = {p: np.sum(v) / (2 + len(v)) for p, v in by_path.items()}
    return sorted(s, key=s.get, reverse=True)[:n]
# mean over paths
    m = np.mean([np.mean(v) for v in by_path.values()])
    s = {p: np.mean([*v, m, m]) for p, v in by_path.items()}
    return sorted(s, key=s.get, reverse=True)[:n]
# must count as two
    s = {p: np.mean([*v, m]) for p, v in by_path.items()}
    return sorted(s, key=s.get, reverse=True)[:n]
# n_p + 2
    s = {p: np.sum([*v, m, m]) / len(v) for p, v in by_path.items()}
    return sorted(s, key=s.get, reverse=True)[:n]
# must count as two
    s = {p: np.mean([*v, m]) for p, v in by_path.items()}
    return sorted(s, key=lambda p: (-s[p], p))[:n]
# order is reversed
    s = {p: np.mean([*v, m, m]) for p, v in by_path.items()}
    return sorted(s, key=s.get)[:n]
# first n only
    s = {p: np.mean([*v, m, m]) for p, v in by_path.items()}
    return sorted(s, key=s.get, reverse=True)
# Let the alphabet decide
    s = {p: np.mean([*v, m, m]) for p, v in by_path.items()}
    return sorted(s, key=s.get, reverse=True)[:n]

## 06.faulty_setting
def f():
# entropy bonus
    return "a"
# healthy
    return "b"
# too low
    return "d"
# correct
    return "c"
""")


def test_best_so_far_by_hand():
    scored = [("p", 0.4), ("q", 0.8), ("q", 0.2), ("p", 0.8)]
    # means: p 0.4 | q 0.8 | q 0.5, p 0.4 | p 0.6, q 0.5
    assert nb06.best_so_far(scored) == pytest.approx([0.4, 0.8, 0.5, 0.6])


def test_the_suspects_are_what_the_quiz_says():
    default = Args()
    assert nb06.SUSPECTS["B"] == {}
    assert nb06.SUSPECTS["C"]["learning_rate"] == pytest.approx(100 * default.learning_rate)
    assert nb06.SUSPECTS["D"]["learning_rate"] == pytest.approx(default.learning_rate / 100)
    assert nb06.SUSPECTS["A"]["ent_coef"] == pytest.approx(20 * default.ent_coef)
    for changed in nb06.SUSPECTS.values():
        Args(**changed)


# ------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("n", [2, 3, 10, 11, 21, 30])
def test_the_interval_is_that_of_scipy(n):
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(n).normal(3, 2, n)
    mean, half = pictures.t_interval(values)
    low, high = stats.t.interval(0.95, n - 1, values.mean(), stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high), abs=2e-3)


def test_diagnostics_draw_every_run_and_floor_the_kl():
    runs = {"A": [{"approx_kl": 5.0, "e": 1.0}], "B": [{"approx_kl": 0.0, "e": 2.0}]}
    kl, e = pictures.diagnostics_picture(runs, {"approx_kl": "KL", "e": "entropy"}).axes
    assert kl.get_yscale() == "log"
    assert [line.get_ydata()[0] for line in kl.lines] == [5.0, 1e-5]
    assert e.get_yscale() == "linear"
    assert [line.get_ydata()[0] for line in e.lines] == [1.0, 2.0]
    assert len({line.get_marker() for line in e.lines}) == 2  # never colour alone


def test_a_kl_within_a_decade_is_drawn_linearly():
    runs = {"A": [{"approx_kl": 0.05}, {"approx_kl": 0.06}]}
    assert pictures.diagnostics_picture(runs, {"approx_kl": "KL"}).axes[0].get_yscale() == "linear"


def test_spread_shows_each_seed_and_the_mean():
    axes = pictures.spread_picture({"g": {"m": [1.0, 3.0], "n": [5.0]}}, "x").axes[0]
    seeds, bar = axes.lines[0], axes.lines[1]
    assert list(seeds.get_xdata()) == [1.0, 3.0]
    assert list(bar.get_xdata()) == [2.0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["m (2)", "n (1)"]
    low, high = (line.get_xdata()[0] for line in axes.lines[2:4])  # the caps of the bar
    assert (low, high) == pytest.approx((2 - 2**0.5, 2 + 2**0.5))


def test_a_curve_has_settled_when_it_stays_within_a_point_of_its_end():
    a = [5.0, 9.5, 8.0, 9.4, 12.0, 10.0]  # near the end at 2, but below again at 3
    rows = [
        {"group": "g", "method": m, "seed": s, "evaluations": n + 1, "reward_split": v + s - 1.5}
        for s in (1, 2)
        for m, values in (("a", a), ("b", [3.0, 3.5]))
        for n, v in enumerate(values)
    ]
    assert pictures.settled(rows) == {("g", "a"): (10.0, 4), ("g", "b"): (3.5, 1)}
    assert pictures.settled(rows, within=0.25)["g", "a"] == (10.0, 5)


def test_searches_show_the_mean_over_seeds():
    rows = [
        {"group": "g", "method": m, "seed": s, "evaluations": n, "reward_split": 10 * s + n + off}
        for m, off in (("agent + CMA-ES", 0), ("random search", 50))
        for s in (1, 2)
        for n in (20, 40)
    ]
    axes = pictures.searches_picture(rows).axes[0]
    assert list(axes.lines[0].get_xdata()) == [20, 40]
    assert list(axes.lines[0].get_ydata()) == [35.0, 55.0]
    assert list(axes.lines[1].get_ydata()) == [85.0, 105.0]


def test_seven_searches_differ_without_their_colours():
    rows = [
        {"group": "g", "method": f"m{i}", "seed": 1, "evaluations": n, "reward_split": i + n}
        for i in range(7)
        for n in (50, 100)
    ]
    figure = pictures.searches_picture(rows)
    lines = figure.axes[0].lines
    assert len({line.get_marker() for line in lines}) == 7
    assert (
        len({str(line.get_linestyle()) + str(line._unscaled_dash_pattern) for line in lines}) == 7
    )
    assert len({line.get_color() for line in lines}) == 7
    (legend,) = figure.legends  # next to the panels, not over the curves
    assert [t.get_text() for t in legend.get_texts()] == [f"m{i}" for i in range(7)]
    points = {"g": {f"m{i}": [1.0, 2.0] for i in range(7)}}
    axes = pictures.spread_picture(points, "x").axes[0]
    assert len({line.get_marker() for line in axes.lines if line.get_marker() in "os^DvPX"}) == 7
