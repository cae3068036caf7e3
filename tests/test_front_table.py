"""The table of fronts: measured on a small problem, its page and figure by hand."""

from __future__ import annotations

import time

import numpy as np
import pandas as pd
import pytest

from rmm_lab.evidence import fronts, measure, page_figures, pages
from rmm_lab.evidence.measure import Job, Store
from rmm_lab.evidence.rows import read_csv
from rmm_lab.evidence.tables import ORDER, Command, kit_groups
from rmm_lab.figures.fronts import attained, front_picture
from rmm_lab.fronts.searches import AVERAGES, FRONT_SEARCHES
from rmm_lab.search.config import configure, searched
from rmm_lab.search.front_measures import hypervolume


def made_up() -> pd.DataFrame:
    """Two searches, two seeds: the averages have a quarter of the square, the other a half and all of it."""
    points = {AVERAGES: ("0.5/0.5", "0.5/0.5 0.1/0.2"), "MAP": ("1.0/0.5", "1.0/1.0")}
    rows = [
        {"group": "g", "seed": seed, "method": method, "mean": 70.0 + seed, "by_task": "x=1 y=2"}
        | {"hypervolume": hypervolume(fronts.points_of(text)), "hypervolume_reward": 0.6}
        | {"hypervolume_promised": np.nan if method == AVERAGES else 1.2, "counted": "x y"}
        | {"points": text, "evaluations": 0 if method == AVERAGES else 40, "seconds": 9.0}
        for method, own in points.items()
        for seed, text in enumerate(own)
    ]
    return pd.DataFrame(rows)


def test_quality_by_hand():
    found = fronts.quality(made_up()).set_index(["method", "seed"])
    # Everything found together is 1/1: the averages lack a half in both tasks.
    assert found.loc[(AVERAGES, 0), "IGD+"] == pytest.approx(np.sqrt(0.5))
    assert found.loc[(AVERAGES, 0), "epsilon"] == 0.5
    assert found.loc[("MAP", 0), "IGD+"] == 0.5
    assert found.loc[("MAP", 1), "epsilon"] == 0
    assert found["ratio"].tolist() == pytest.approx([1, 1, 2, 4])
    assert found["size"].tolist() == [1, 2, 1, 1]
    without = made_up().assign(hypervolume=[0.0, 0.25, 0.5, 1.0])  # averages of the first seed
    assert fronts.quality(without)["ratio"].fillna(-1).tolist() == [-1, 1, -1, 4]
    # Of weights w and 1 - w over a lattice the mean of w + (1 - w) / 2 is 3/4.
    assert found.loc[("MAP", 0), "utility"] == pytest.approx(0.75)


def test_the_page_has_the_best_front_first():
    rows = made_up()
    table = fronts.front_table(fronts.quality(rows))
    assert list(table.index) == ["MAP", AVERAGES]
    assert table.loc["MAP", "hypervolume, test"] == "0.750 ± 0.354"
    assert table.loc[AVERAGES, "hypervolume, test"] == "0.250 ± 0.000"
    assert table.loc["MAP", "times the averages"] == "3.00"
    assert (table.loc["MAP", "promised"], table.loc[AVERAGES, "promised"]) == ("1.200 ± 0.000", "")
    paper = pd.DataFrame({"table": [], "model": []})
    text = pages.PAGES["fronts"].text(rows, paper=paper)
    assert "had 40 evaluations" in text
    assert "seeds (2)" in text
    assert f"g: {AVERAGES} 0.250, MAP 0.750" in text


def test_the_figure_draws_each_front():
    two = made_up()
    three = two.assign(group="h", counted="x y z")
    three["points"] = [" ".join(f"{p}/0.3" for p in text.split()) for text in two["points"]]
    figure = page_figures.DRAW["fronts"](pd.concat([two, three], ignore_index=True))
    flat, parallel = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["g", "h"]
    # Half of the seeds attain the worse of two: MAP's 1.0/0.5.
    line = next(line for line in flat.lines if line.get_label() == "MAP")
    assert max(line.get_ydata()) == 0.5
    assert [tick.get_text() for tick in parallel.get_xticklabels()] == ["x", "y", "z"]
    points = [line for line in parallel.lines if len(line.get_xdata()) == 3]
    assert len(points) == 5


def test_what_is_attained_by_how_many():
    fronts_ = [np.array([[1.0, 0.2], [0.5, 0.6]]), np.array([[0.5, 0.9]]), np.array([[0.8, 0.4]])]
    found = attained(fronts_, np.array([0.5, 0.8, 1.0]))
    assert found.tolist() == [[0.9, 0.4, 0.2], [0.6, 0.2, -np.inf], [0.4, -np.inf, -np.inf]]


def test_a_front_of_a_run_names_what_it_does_not_show():
    points = np.array([[0.9, 0.2], [0.5, 0.5], [-0.5, 1.0]])
    (axes,) = front_picture({"reward": points, "test": points}, ("x", "y"), {1: "knee"}).axes
    assert {text.get_text() for text in axes.texts} == {"0", "1 knee"}
    assert axes.get_title().endswith("not shown: 2")
    (axes,) = front_picture({"test": points[:1]}, ("x", "y")).axes  # a front of one point
    assert {text.get_text() for text in axes.texts} == {"0"}
    three = np.c_[points, points[:, :1]]
    (axes,) = front_picture({"test": three}, ("x", "y", "z")).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["0", "1", "2"]


@pytest.mark.parametrize("method", ["agent + CMA-ES", AVERAGES, "CMA-ES along a lattice"])
def test_a_row_is_measured_and_stored(trained, monkeypatch, tmp_path, method):
    monkeypatch.setattr(measure, "fitted", lambda config: (trained, time.perf_counter()))
    config = configure("weights", unit="block", episodes=30, data_fraction=0.25, quiet=True)
    assert searched(config) == "agent + CMA-ES"
    key = {"group": "own", "seed": 1, "method": method}
    found = measure.measure(Job("fronts", fronts.measured, key, config))["fronts"]
    store = Store(tmp_path, ORDER)
    store.add("fronts", found.assign(commit=""))
    (_, row) = next(read_csv(tmp_path / "fronts.csv").iterrows())
    points = fronts.points_of(row["points"])
    assert row["hypervolume"] == pytest.approx(hypervolume(points), abs=1e-3)
    assert row["counted"] == "quadrant stripes"
    assert row["evaluations"] == (0 if method == AVERAGES else 30)
    assert np.isnan(row["hypervolume_promised"]) == (method == AVERAGES)
    assert store.has("fronts", key, config)


def test_the_command_has_a_job_for_each_search(tmp_path):
    command = Command("fronts", seeds=(1, 2), episodes=40)
    groups = kit_groups()["fronts"]
    assert [g.name for g in groups] == [
        *("digits+textures", "digits+letters+textures", "qa", "mixed", "llm")
    ]
    jobs = list(command.jobs_of("fronts", groups, Store(tmp_path, ORDER)))
    assert {job.config.run.episodes for job in jobs} == {40}
    for group in groups:  # nested merging is MAP itself for two experts
        left_out = {"MAP, nested"} if group.name == "digits+textures" else set()
        for seed in (1, 2):
            at = {"group": group.name, "seed": seed}
            found = [job.key["method"] for job in jobs if job.key.items() >= at.items()]
            assert found == ["RMM (agent)", *(m for m in FRONT_SEARCHES if m not in left_out)]


def test_one_agent_is_compared_with_a_training_for_each_preference():
    rows = made_up().replace({"method": {AVERAGES: fronts.A_FIFTH, "MAP": fronts.SEPARATE}})
    rows["evaluations"] = rows["method"].map({fronts.A_FIFTH: 140, fronts.SEPARATE: 700})
    # A quarter of the square against a half of it and all of it.
    assert fronts.one_for_all(rows).strip() == (
        "One agent for all preferences, RMM (conditioned), a fifth, has 0.375 ± 0.177 times the hypervolume "
        "of RMM (agent) per preference, with 140 evaluations against 700."
    )
    paper = pd.DataFrame({"table": [], "model": []})
    text = pages.PAGES["fronts"].text(rows, paper=paper)
    assert "0.375 ± 0.177 times" in text
    assert "had 700 evaluations" in text
    assert fronts.one_for_all(rows[rows["method"] == fronts.A_FIFTH]) == ""
    assert fronts.one_for_all(made_up()) == ""
