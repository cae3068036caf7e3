"""Other searches under the same budget, and the tables that measure them."""

from __future__ import annotations

import numpy as np
import pytest

from rmm_lab import baselines, runs, tables
from rmm_lab.tables import Tables


class Landscape:
    """A scorer by formula: each place has a best source, and rewards add up. Three subsets, no noise."""

    sources, n_models, n_layers = ("a", "b", "ties"), 2, 4
    n_subsets, task_names, chooses_stem = 3, ["x"], True
    best = {-1: 2, 0: 0, 1: 1, 2: 2, 3: 1}

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def score(self, path, subset=None):
        self.calls.append((path, subset))
        return np.array([sum(self.best[k] == a for a, k in path) / 5])


@pytest.mark.parametrize("search", tables.SEARCHES.values())
def test_a_search_spends_its_budget_and_no_more(search):
    scorer = Landscape()
    scored = search(scorer, 70, seed=1)
    assert len(scored) == len(scorer.calls) == 70
    for (path, value), (asked, subset) in zip(scored, scorer.calls, strict=True):
        assert path == asked
        assert 0 <= subset < 3  # never the whole split while it searches
        assert [k for _, k in path] == [-1, 0, 1, 2, 3]
        assert value == pytest.approx(sum(Landscape.best[k] == a for a, k in path) / 5)
    assert search(Landscape(), 70, seed=1) == scored
    assert search(Landscape(), 70, seed=2) != scored


def test_random_search_draws_each_source_equally_often_and_takes_subsets_in_turn():
    scorer = Landscape()
    scored = baselines.random_search(scorer, 3000, seed=0)
    drawn = np.array([[a for a, _ in path] for path, _ in scored])  # (3000, places)
    shares = np.stack([(drawn == a).mean(0) for a in range(3)])
    assert np.abs(shares - 1 / 3).max() < 0.04
    assert [subset for _, subset in scorer.calls[:7]] == [0, 1, 2, 0, 1, 2, 0]


def test_coordinate_ascent_climbs_a_separable_landscape_in_one_sweep():
    scorer = Landscape()
    scored = baselines.coordinate_ascent(scorer, 11, seed=5)  # 1 + 5 places times 2 other sources
    best = tuple((Landscape.best[k], k) for k in (-1, 0, 1, 2, 3))
    assert max(scored, key=lambda s: s[1])[0] == best
    assert len({subset for _, subset in scorer.calls}) == 1  # like is compared with like
    more = Landscape()
    baselines.coordinate_ascent(more, 40, seed=5)
    subsets = [subset for _, subset in more.calls]
    assert subsets[:11] == [0] * 11
    assert subsets[11:22] == [1] * 11  # the next sweep, the next subset: nothing changes
    assert more.calls[22][0] != best  # so it starts anew


def test_the_curve_shows_the_path_that_would_be_chosen_on_all_data():
    scorer = Landscape()
    best = "ties@-1 a@0 b@1 ties@2 b@3"
    scored = [("a@-1 a@0 a@1 a@2 a@3", 0.2)] * 20 + [(best, 1.0)] * 20
    curve = list(tables.curve_of(scorer, scored))
    assert curve == [
        {"evaluations": 20, "reward_split": 20.0},
        {"evaluations": 40, "reward_split": 100.0},
    ]
    assert {subset for _, subset in scorer.calls} == {None}


def test_a_table_goes_on_where_it_was(tiny, tmp_path, monkeypatch, capsys):
    from rmm_lab.problem import load_problem

    def small(experts, **options):
        return load_problem(**tiny, operators=("ties", "task_arithmetic"), stem="agent")

    monkeypatch.setattr(tables, "load_problem", small)
    once = {"seeds": (1, 2), "episodes": 12, "only": ("digits+textures",), "out": tmp_path}
    Tables("searches", **(once | {"seeds": (1,)})).run()
    first = (tmp_path / "searches.csv").read_text()
    Tables("searches", **once).run()
    rows = runs.from_csv((tmp_path / "searches.csv").read_text())
    assert (tmp_path / "searches.csv").read_text().startswith(first)
    assert [(r["seed"], r["method"]) for r in rows] == [
        (s, m) for s in (1, 2) for m in ("RMM", "random search", "coordinate ascent")
    ]
    for row in rows:  # the score in the file is that of the path in the file
        problem = small(())
        steps, stem = tables.split_stem(row["path"], problem)
        again = baselines.path_row(problem, "", "", steps, stem)
        assert row["mean"] == pytest.approx(100 * again.mean, abs=0.006)
        assert row["episodes"] == 12
    before = (tmp_path / "searches.csv").read_text()
    Tables("searches", **once).run()  # nothing is left to do
    assert (tmp_path / "searches.csv").read_text() == before
    assert not list(tmp_path.glob(".*"))


def test_all_methods_stand_in_the_vision_table(tiny, tmp_path, monkeypatch):
    from rmm_lab.problem import load_problem

    monkeypatch.setattr(tables, "load_problem", lambda experts, **_: load_problem(**tiny))
    Tables("vision", seeds=(1,), episodes=8, only=("digits+letters",), out=tmp_path).run()
    rows = runs.from_csv((tmp_path / "vision.csv").read_text())
    for method in ("base", "fine-tuned", "weight average", "TIES, tuned", "DARE", "RMM"):
        (row,) = [r for r in rows if r["method"] == method]
        parts = [float(p.partition("=")[2]) for p in row["by_task"].split()]
        assert row["mean"] == pytest.approx(np.mean(parts), abs=0.011)


def test_an_unknown_group_is_refused(tmp_path, capsys):
    assert tables.main(["vision", "--only", "cats", "--out", str(tmp_path)]) == 2
    assert "--only: expected some of digits+textures" in capsys.readouterr().err


def test_what_a_stopped_command_left_of_a_cell_is_replaced(tmp_path):
    table = Tables("searches", out=tmp_path, episodes=40)
    for n, value in (("a", 1), ("b", 2)):
        table._add("curve", [{"group": n, "value": value}, {"group": n, "value": value}], "group")
    table._add("curve", [{"group": "b", "value": 3}], "group")  # measured again after the stop
    rows = runs.from_csv((tmp_path / "curve.csv").read_text())
    assert [(r["group"], r["value"]) for r in rows] == [("a", 1), ("a", 1), ("b", 3)]
