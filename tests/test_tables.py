"""The result tables: what is measured and stored, pages by hand, and what ships against the models."""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest

from rmm_lab.engine.scorer import Scorer
from rmm_lab.errors import InputError
from rmm_lab.evidence import measure, page_figures, pages, rows, tables
from rmm_lab.evidence.measure import Job, Store, load
from rmm_lab.evidence.paper_scale import Group
from rmm_lab.evidence.tables import Command
from rmm_lab.reward import Step, parse_path
from rmm_lab.search import rivals, uniform
from rmm_lab.search.config import configure, describe, searched

RESULTS = Path(tables.__file__).parents[2] / "results"
SHIPPED = (
    "halves",
    "vision",
    "language",
    "dar",
    "dar-curve",
    "searches",
    "searches-curve",
    "agent",
)


MERGES = (measure.rules, measure.drawn, measure.matched_rules, measure.by_gradient)
# Merges that see weights, and searches: what the other kinds measure has tests of its own.
QUICK = {"kinds": ("uniform", "search")}
FIRST = [
    *("group", "method", "seed", "mean", "reward_split", "by_task"),
    *("evaluations", "seconds", "sees", "config", "commit"),
]


@pytest.fixture
def small(tiny, monkeypatch):
    """Every problem of the kit is the tiny one."""
    replace_groups(monkeypatch, tiny)


def replace_groups(monkeypatch, tiny) -> None:
    one = [Group("digits+textures", "tiny", dict(tiny))]
    groups = dict.fromkeys(
        (
            "II",
            "IV",
            "fig3",
            "searches",
            "menu",
            "agent",
            "default",
            "budgets",
            "seconds",
            "labels",
        ),
        one,
    )
    monkeypatch.setattr(tables, "kit_groups", lambda: groups)


@pytest.fixture
def counted(monkeypatch) -> list[Job]:
    """What would be measured, without measuring."""
    done: list[Job] = []
    monkeypatch.setattr(measure, "measure_all", lambda jobs, *_: done.extend(jobs))
    return done


def read(folder: Path, name: str) -> pd.DataFrame:
    return rows.read_csv(folder / f"{name}.csv")


def config_of(row) -> object:
    return configure(**json.loads(row["config"]))


# --------------------------------------------------------------------------- what is to be measured


def test_the_kits_groups_are_the_papers_tables():
    groups = tables.kit_groups()
    halves = {(g.name, g.size): g.options["experts"] for g in groups["I"]}
    assert len(halves) == 8
    assert halves["digits", "ViT, width 64"] == ("digits-first", "digits-second")
    assert halves["digits", "ViT, width 32"] == ("tiny-digits-first", "tiny-digits-second")
    assert [g.options["experts"] for g in groups["II"]] == [("digits", "textures")]
    assert [g.name for g in groups["III"]] == ["qa", "mixed", "llm"]
    assert groups["IV"] == groups["fig3"] == groups["II"]


def test_all_measures_everything_once(tmp_path, counted):
    Command("all", out=tmp_path).run()
    kinds = [(j.table, j.measure) for j in counted]
    assert kinds.count(("halves", measure.trained)) == 8 * 5
    assert kinds.count(("halves", measure.rules)) == 8  # once: most depend on no seed
    assert kinds.count(("halves", measure.drawn)) == 8 * 4  # the first seed's comes with the others
    assert kinds.count(("halves", measure.matched_rules)) == 8 * 5
    assert kinds.count(("halves", measure.by_gradient)) == 8 * 5
    assert kinds.count(("vision", measure.trained)) == 5
    assert kinds.count(("language", measure.trained)) == 3 * 5
    # 100 % once, 10 and 1 % with DAR and without, the default preset at each, by likelihood at two.
    assert sum(j.table == "dar" for j in counted) == 5 * (1 + 2 + 2 + 3 + 2)
    soft = {r.data_fraction for j in counted if (r := j.config.run).reward == "likelihood"}
    assert soft == {0.1, 0.01}
    curves = [j.config.run for j in counted if j.measure is measure.trained_curve]
    assert [(r.data_fraction, r.dar_lambda, r.seed) for r in curves] == [
        (0.01, 0.8, 1),
        (0.01, 0.0, 1),
    ]
    merges = [j for j in counted if j.measure in MERGES]
    assert {j.config.problem.unit for j in merges} == {"block"}
    assert len({(j.table, j.measure, *j.key.values()) for j in counted}) == len(counted)


@pytest.mark.parametrize(
    ("table", "only", "found"),
    [
        ("I", ("digits",), {("halves", "digits", 0.1)}),
        ("IV", ("0.01",), {("dar", "digits+textures", 0.01)}),
        ("all", ("0.01",), {("dar", "digits+textures", 0.01)}),  # a share alone is Table IV's
        ("all", ("0.01", "digits"), {("halves", "digits", 0.1)}),
    ],
)
def test_only_names_groups_and_shares(tmp_path, counted, table, only, found):
    Command(table, only=only, seeds=(3,), out=tmp_path).run()
    assert {(j.table, j.key.get("group"), j.config.run.data_fraction) for j in counted} == found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["II", "--only", "cats"], "--only: expected some of digits+textures, found 'cats'"),
        (["II", "--jobs", "0"], "--jobs: expected 1 to 1024, found 0"),
        (["II", "--seeds", "1", "1"], "below 2**63, found 1 1"),
        (["agent", "--scale", "paper"], "--scale paper: expected one of I, II, III, IV, fig3"),
        (["show"], "expected a folder with the CSV files of a table, found none"),
    ],
)
def test_bad_options_are_refused_before_anything_is_measured(
    tmp_path, capsys, counted, words, message
):
    assert tables.main([*words, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not counted
    assert not list(tmp_path.iterdir())


def test_settings_of_the_ablations_are_options():
    for options in (*tables.AGENT.values(), *tables.DEFAULT.values()):
        configure(**(options or {}))
    assert next(iter(tables.AGENT.values())) == next(iter(tables.DEFAULT.values())) == {}


def test_the_defaults_ablation_is_of_an_agent_of_scales(tmp_path, counted):
    Command("default", seeds=(2, 4), out=tmp_path).run()
    groups = {"digits+textures", "digits+letters+textures", "qa", "llm"}
    keys = {(g, s, seed) for g in groups for s in tables.DEFAULT for seed in (2, 4)}
    assert {(j.key["group"], j.key["setting"], j.key["seed"]) for j in counted} == keys
    assert len(counted) == len(keys)
    for job in counted:
        run = job.config.run
        assert (job.table, run.actions, job.config.problem.calibration) == (
            "default",
            "scales",
            500,
        )
        changed = {
            run.observation[-5:] == "drift",
            run.shaping > 0,
            job.config.agent.gae_lambda < 1,
            run.deviation < 0.05,
        }
        assert changed == {
            "RMM (agent)": {False},
            "all three": {True, False},
        }.get(job.key["setting"], {True, False})


def test_every_budget_is_a_search_that_knows_it(tmp_path, counted):
    Command("budgets", seeds=(1, 2), budgets=(50, 100), only=("qa", "mixed"), out=tmp_path).run()
    methods = ("RMM (agent)", "CMA-ES over scales", "TPE", "coordinate ascent", "random search")
    keys = {
        (g, n, m, s) for g in ("qa", "mixed") for n in (50, 100) for m in methods for s in (1, 2)
    }
    names = ("group", "evaluations", "method", "seed")
    assert {tuple(job.key[name] for name in names) for job in counted} == keys
    assert len(counted) == len(keys)
    assert all(job.config.run.episodes == job.key["evaluations"] for job in counted)
    counted.clear()
    Command("budgets", seeds=(1,), out=tmp_path).run()
    assert len({job.key["group"] for job in counted}) == 6
    assert {job.key["evaluations"] for job in counted} == {50, 100, 200, 700}
    with pytest.raises(InputError, match="--budgets: expected one or more of at least 1, found"):
        Command("budgets", budgets=(50, 0), out=tmp_path).run()


def test_few_labels_are_all_that_a_search_has(tmp_path, counted):
    Command("labels", seeds=(2,), out=tmp_path).run()
    assert {job.key["group"] for job in counted} == {"digits+textures", "qa"}
    found = set()
    for job in counted:
        run, known = job.config.run, job.config.problem.label_fraction
        found.add((run.reward, known, run.data_fraction))
        names = ("reward", "label_fraction", "data_fraction", "seed")
        assert [job.key[name] for name in names] == [run.reward, known, run.data_fraction, 2]
    few = {(reward, share, 1) for reward in ("metric", "likelihood") for share in (0.1, 0.01)}
    every = {(reward, 1, 0.1) for reward in ("metric", "likelihood", "agreement")}
    assert found == {*few, *every, ("metric", 1, 0.01)}
    assert len(counted) == 2 * len(found)


# ------------------------------------------------------------------------------- small measurements


@pytest.fixture(scope="module")
def two_seeds(tiny, tmp_path_factory) -> tuple[Path, pd.DataFrame, str]:
    """Table II of the tiny problem at seed 1, then at 2: its folder, the first rows, what was printed."""
    folder, told = tmp_path_factory.mktemp("tables"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(told):
        replace_groups(patch, tiny)
        Command("II", seeds=(1,), episodes=8, out=folder, **QUICK).run()
        first = read(folder, "vision")
        Command("II", seeds=(2, 1), episodes=8, out=folder, **QUICK).run()
    return folder, first, told.getvalue()


@pytest.mark.slow
def test_a_table_of_methods_goes_on_where_it_was(small, two_seeds):
    folder, first, told = two_seeds
    both = read(folder, "vision")
    assert both.head(len(first)).equals(first)
    assert list(both["seed"]) == [1] * len(first) + [2] * len(first)
    assert list(both["method"]) == 2 * list(first["method"])
    # The rules and a search; then those rules that draw, and a search, of the new seed alone.
    assert re.findall(r"(\d+) jobs to measure", told) == ["2", "2"]
    names = list(first["method"])
    assert names[0] == "base"
    assert names[-1] == "RMM (agent)"
    assert names.index("fine-tuned") < names.index("TIES") < names.index("DARE, tuned")
    # What does not draw has the same row under each seed.
    one, two = (both[both["seed"] == s].set_index("method").drop(columns="seed") for s in (1, 2))
    fixed = [name for name in names if not name.startswith(("DARE", "DELLA", "RMM"))]
    assert one.loc[fixed].equals(two.loc[fixed])
    assert list(first)[: len(FIRST)] == FIRST
    before = (folder / "vision.csv").read_text()
    Command("II", seeds=(1, 2), episodes=8, out=folder, **QUICK).run()
    assert (folder / "vision.csv").read_text() == before
    assert not list(folder.glob(".*"))


@pytest.mark.slow
def test_rows_are_those_of_the_functions_that_they_name(two_seeds):
    """Uniform merges against ``uniform.rows``, at both seeds; a search against its path, scored again.

    What a table measures once stands for every seed: the rest draws.
    """
    scores: list[dict[str, tuple[float, ...]]] = []
    for seed, own in read(two_seeds[0], "vision").groupby("seed"):
        own = own.set_index("method")
        config = config_of(own.loc["RMM (agent)"])
        assert (config.run.seed, config.run.episodes) == (seed, 8)
        expected = list(uniform.rows(load(configure(config, unit="block"))))
        scores.append({row.name: row.scores for row in expected})
        for row in expected:
            assert own.at[row.name, "mean"] == pytest.approx(100 * row.mean, abs=0.006)
            assert own.at[row.name, "reward_split"] == pytest.approx(
                100 * row.reward, abs=0.006, nan_ok=True
            )
            told = [own.at[row.name, column] for column in ("setting", "sees", "evaluations")]
            assert told == [row.setting, row.sees, row.evaluations]
        told = [own.at["RMM (agent)", column] for column in ("setting", "sees", "evaluations")]
        assert told == ["8 episodes", "labels", 8]
        check_again(own.loc["RMM (agent)"], load(config))
    one, two = scores
    assert "DARE" in {name for name in one if one[name] != two[name]} <= set(rows.DRAWN)


def check_again(row, problem) -> None:
    """A row's path, or its uniform merge, scored again on both splits."""
    source = row["setting"].partition(", best")[0]
    path = tuple(Step(source, k) for k in range(-1, problem.pool.n_layers))
    if row["path"]:
        path = parse_path(row["path"])
        whole = rivals.whole(problem.scorer(), row["path"])
        assert row["reward_split"] == pytest.approx(100 * whole, abs=0.01)
    again = uniform.path_row(problem, "", "", path)
    assert row["mean"] == pytest.approx(100 * again.mean, abs=0.01)


def test_jobs_of_one_problem_merge_once_and_count_it_each(tiny):
    config = configure(**tiny, operators=("regmean",), calibration=8, episodes=4)
    first, _ = measure.fitted(config)
    merged = first.pool.weights("regmean", 0)
    before = time.perf_counter()
    again, start = measure.fitted(configure(config, episodes=9, reward="likelihood"))
    assert again is first
    assert again.pool.weights("regmean", 0) is merged
    assert start < before  # as if it had been merged anew
    assert measure.fitted(configure(config, seed=2))[0] is not first


@pytest.mark.slow
def test_table_iv_and_fig_3(small, tmp_path):
    Command("IV", seeds=(1,), episodes=6, out=tmp_path).run()
    assert len(read(tmp_path, "dar")) == 10
    curve = read(tmp_path, "dar-curve")
    assert list(zip(curve["dar"], curve["episode"], strict=True)) == [
        (dar, episode) for dar in (0.8, 0) for episode in range(6)
    ]
    plain = curve[curve["dar"] == 0]
    assert plain["raw_reward"].equals(plain["dar_reward"].rename("raw_reward"))
    # Two searches of one seed play the same policy until the first update.
    with_dar = curve[curve["dar"] > 0]
    assert list(with_dar["raw_reward"][:4]) == list(plain["raw_reward"][:4])
    command = Command("fig3", seeds=(1,), episodes=6, out=tmp_path)
    jobs = partial(command.jobs_of, "fig3", tables.kit_groups()["fig3"], Store(tmp_path, {}))
    assert not list(jobs())
    (tmp_path / "dar-curve.csv").unlink()  # a row without its curve is measured again
    assert len(list(jobs())) == 2


def test_searches_of_other_lengths_do_not_share_a_mean(small, tmp_path, counted):
    key = {"group": "digits+textures", "size": "tiny", "seed": 1, "method": "RMM (agent)"}
    values = {"mean": 1.0, "by_task": "p=1.0", "setting": "", "evaluations": 8}
    values |= {"sees": "labels", "seconds": 1.0, "reward_split": 1.0}
    config = json.dumps(describe(configure(episodes=8)))
    Store(tmp_path, {}).add("vision", pd.DataFrame([key | values | {"config": config}]))
    Command("II", seeds=(1, 2), episodes=8, out=tmp_path).run()
    assert [j.key["seed"] for j in counted if j.measure is measure.trained] == [2]
    with pytest.raises(InputError, match=r"vision.csv: expected --episodes 8 as in .*, found 9"):
        Command("II", seeds=(1, 2), episodes=9, out=tmp_path).run()
    with pytest.raises(InputError, match=r"vision.csv: expected --episodes 8 as in .*, found 7"):
        Command("II", seeds=(3,), episodes=7, out=tmp_path).run()
    with pytest.raises(InputError, match=r"--precision float32 as in .*, found bfloat16"):
        Command("II", seeds=(1,), episodes=8, precision="bfloat16", out=tmp_path).run()


def test_todays_searches_are_not_mixed_with_the_first_editions(counted, tmp_path):
    """The rows that ship are of a search with a local search at its end, which is gone."""
    shutil.copy(RESULTS / "agent.csv", tmp_path)
    with pytest.raises(InputError, match=r"expected --cma-share 0.75 as in .*, found 0.8"):
        Command("agent", seeds=(6,), out=tmp_path).run()
    assert not counted


@pytest.mark.parametrize(
    ("table", "first"), [("searches", "agent + CMA-ES"), ("menu", "RMM (agent)")]
)
def test_searches_have_a_row_and_a_curve_each(small, tmp_path, monkeypatch, table, first):
    names = ("random search", "coordinate ascent", "CMA-ES over orders")[: 2 + (table == "menu")]
    monkeypatch.setattr(rivals, "SEARCHES", {name: rivals.SEARCHES[name] for name in names})
    some = names[:2]
    Command(table, seeds=(1, 2), episodes=12, calibration=60, out=tmp_path).run()
    found, curve = read(tmp_path, table), read(tmp_path, f"{table}-curve")
    assert list(found["method"]) == [first, *sorted(some)] * 2
    for _, row in found.iterrows():  # the score in the file is that of the path in the file
        check_again(row, load(config_of(row)))
        assert row["evaluations"] == 12
    ends = curve[curve["evaluations"] == 12]
    assert curve["evaluations"].max() == 12
    key = ["seed", "method", "reward_split"]  # the curve ends in the final choice
    assert ends[key].reset_index(drop=True).equals(found[key])


def test_the_ablation_has_a_row_for_each_setting(small, tmp_path, monkeypatch):
    settings = {"agent + CMA-ES": {}, "gone": None, "gamma 0.5": {"gamma": 0.5}}
    monkeypatch.setattr(tables, "AGENT", settings)
    Command("agent", seeds=(1,), episodes=6, out=tmp_path).run()
    found = [
        (r["setting"], config_of(r).agent.gamma) for _, r in read(tmp_path, "agent").iterrows()
    ]
    assert found == [("agent + CMA-ES", 1.0), ("gamma 0.5", 0.5)]


@pytest.mark.slow
def test_the_defaults_settings_are_measured_by_the_default(small, tmp_path, monkeypatch):
    some = {name: tables.DEFAULT[name] for name in ("RMM (agent)", "all three")}
    monkeypatch.setattr(tables, "DEFAULT", some)
    Command("default", seeds=(1,), episodes=12, calibration=20, out=tmp_path).run()
    found = read(tmp_path, "default")
    assert list(found["setting"]) == list(some)
    for _, row in found.iterrows():
        assert row["method"] == "RMM (agent)"
        check_again(row, load(config_of(row)))
    assert (tmp_path / "default.png").is_file()


@pytest.mark.slow
def test_budgets_go_on_where_they_were(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure, "ON_A_BUDGET", ("TPE",))
    options = {"seeds": (1,), "calibration": 20, "out": tmp_path}
    for budgets in ((7,), (12, 7)):
        Command("budgets", budgets=budgets, **options).run()
    assert re.findall(r"(\d+) jobs to measure", capsys.readouterr().out) == ["2", "2"]
    found = read(tmp_path, "budgets")
    assert list(found["evaluations"]) == [7, 7, 12, 12]
    assert list(found["method"]) == ["RMM (agent)", "TPE"] * 2
    for _, row in found.iterrows():
        config = config_of(row)
        assert config.run.episodes == row["evaluations"]
        check_again(row, load(config))
    assert not (tmp_path / "budgets-curve.csv").exists()
    assert (tmp_path / "budgets.png").is_file()
    with pytest.raises(InputError, match=r"--calibration 20 as in the rows of .*, found 21"):
        Command("budgets", **options | {"calibration": 21, "budgets": (7,)}).run()


@pytest.mark.slow
def test_rivals_get_the_agents_seconds(small, tmp_path, monkeypatch, capsys):
    """A processor that takes a second for each path, and none for anything else."""
    time_now, score = [0.0], Scorer.score

    def slow(scorer, path, subset=None):
        time_now[0] += 1
        return score(scorer, path, subset)

    monkeypatch.setattr(Scorer, "score", slow)
    monkeypatch.setattr(time, "process_time", lambda: time_now[0])
    monkeypatch.setattr(measure, "ON_A_BUDGET", ("TPE", "random search"))
    options = {"episodes": 12, "calibration": 20, "out": tmp_path}
    for seeds in ((1,), (1, 2)):
        Command("seconds", seeds=seeds, **options).run()
    assert re.findall(r"(\d+) jobs to measure", capsys.readouterr().out) == ["1", "1"]
    found = read(tmp_path, "seconds")
    assert list(found["method"]) == ["RMM (agent)", "TPE", "random search"] * 2
    # Five uniform paths, then one at a time, or twenty; the final choice is not counted.
    assert list(found["evaluations"]) == [12, 12, 25] * 2
    assert list(found["search_seconds"]) == [12, 12, 25] * 2
    for _, row in found.iterrows():
        check_again(row, load(config_of(row)))
    assert (tmp_path / "seconds.png").is_file()


@pytest.mark.slow
def test_rows_with_few_labels_are_scored_on_these(small, tmp_path, monkeypatch):
    """The reward split's score is that of the few, or of agreement: not that of all labels."""
    some = (tables.LABELS[0], tables.LABELS[3] | {"label_fraction": 0.2}, tables.LABELS[-1])
    monkeypatch.setattr(tables, "LABELS", some)
    Command("labels", seeds=(1,), episodes=12, calibration=20, out=tmp_path).run()
    found = read(tmp_path, "labels")
    assert list(found["sees"]) == ["labels", "labels", "inputs"]
    assert list(found["label_fraction"]) == [1.0, 0.2, 1.0]
    for _, row in found.iterrows():
        config = config_of(row)
        problem, path = load(config), parse_path(row["path"])
        scorer = problem.scorer(reward=config.run.reward)
        assert row["reward_split"] == pytest.approx(100 * scorer.score(path).mean(), abs=0.01)
        again = uniform.path_row(problem, "", "", path)
        assert row["mean"] == pytest.approx(100 * again.mean, abs=0.01)
    assert (tmp_path / "labels.png").is_file()


# ------------------------------------------------------------------------------ files and processes


def test_names_that_look_like_numbers_stay_text(tmp_path):
    row = {
        "group": "007",
        "size": "1e3",
        "seed": 7,
        "method": "agent + CMA-ES",
        "mean": 1.5,
        "path": "",
    }
    row |= {"commit": "12e4567", "reward_split": float("nan")}
    Store(tmp_path, {}).add("vision", pd.DataFrame([row]))
    found = read(tmp_path, "vision").iloc[0]
    assert (found["group"], found["size"], found["commit"]) == ("007", "1e3", "12e4567")
    assert (found["seed"], found["mean"], found["path"]) == (7, 1.5, "")
    assert np.isnan(found["reward_split"])
    assert Store(tmp_path, {}).has("vision", {"group": "007", "seed": 7})
    assert not Store(tmp_path, {}).has("vision", {"group": "7"})


@pytest.mark.parametrize("name", SHIPPED)
def test_a_file_that_is_read_and_written_is_the_same(name):
    text = (RESULTS / f"{name}.csv").read_text("utf-8")
    assert read(RESULTS, name).to_csv(index=False) == text


def test_rows_come_into_their_places_over_those_with_the_same_key(tmp_path):
    store = Store(tmp_path, {"group": ("b", "a")})
    for group, seed, mean in (("a", 2, 1), ("b", 1, 2), ("a", 1, 3), ("a", 2, 4)):
        row = {
            "group": group,
            "size": "",
            "seed": seed,
            "method": "agent + CMA-ES",
            "mean": float(mean),
        }
        store.add("vision", pd.DataFrame([row]))
    found = read(tmp_path, "vision")[["group", "seed", "mean"]]
    assert found.values.tolist() == [["b", 1, 2], ["a", 1, 3], ["a", 2, 4]]


def test_a_file_of_another_version_is_left_alone(tmp_path):
    (tmp_path / "vision.csv").write_text("group,seed,method,mean\na,1,TIES,3\n")
    row = {"group": "a", "size": "", "seed": 2, "method": "agent + CMA-ES", "mean": 1}
    with pytest.raises(InputError, match=r"they differ in size\); move the file away"):
        Store(tmp_path, {}).add("vision", pd.DataFrame([row]))
    assert (tmp_path / "vision.csv").read_text().count("\n") == 2


def test_a_stopped_command_leaves_whole_rows(small, tmp_path, monkeypatch, capsys):
    def stop(job):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "trained", stop)
    some = {name: uniform.GRIDS[name] for name in ("weight average", "TIES", "DARE, tuned")}
    monkeypatch.setattr(uniform, "GRIDS", some)
    words = ["II", "--seeds", "1", "--episodes", "6", "--out", str(tmp_path)]
    assert tables.main([*words, "--kinds", "uniform", "search"]) == 130
    assert "stopped; the same command goes on" in capsys.readouterr().err
    found = read(tmp_path, "vision")["method"]
    assert list(found)[-3:] == list(some)
    assert not list(tmp_path.glob(".*"))


def some_jobs(n: int, run=measure.trained, **options) -> list[Job]:
    return [
        Job("agent", run, {"group": "g", "setting": "s", "seed": s}, configure(seed=s, **options))
        for s in range(n)
    ]


def test_the_folder_of_a_table_is_held_while_it_is_measured(tmp_path, monkeypatch, capsys):
    """A second process is refused by name, one with another folder is not; nothing empty is left."""
    argv, codes = ["II", "--out", str(tmp_path / "a/b")], []

    def meanwhile(*args):
        for folder in ("a/b", "c"):
            monkeypatch.setattr(measure, "measure_all", lambda *args: None)
            codes.append(tables.main([*argv[:2], str(tmp_path / folder)]))

    monkeypatch.setattr(measure, "measure_all", meanwhile)
    assert tables.main(argv) == 0
    assert codes == [2, 0]
    [said] = capsys.readouterr().err.strip().splitlines()
    assert said.startswith("error: --out: ")
    assert f"{tmp_path / 'a/b'} held by process {os.getpid()}" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["show", "II"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"a,b\n1,2\n",
        b"\xff\xfe",
        b"group,size,seed\nx\n1,2,3,4\n",
        b'"',
        b"\0\0",
        None,
        b"group,size,method,seed,config\ndigits+textures,,x,one,\n",
    ],
)
def test_a_table_that_is_none_is_named(tmp_path, monkeypatch, capsys, command, content):
    """Before anything is measured. None: a folder of that name."""
    monkeypatch.setattr(measure, "measure_all", lambda *a: pytest.fail("it measured"))
    file = tmp_path / "vision.csv"
    file.mkdir() if content is None else file.write_bytes(content)
    assert tables.main([command, "--out", str(tmp_path)]) == 2
    [said] = capsys.readouterr().err.strip().splitlines()
    assert said.startswith(f"error: {file}: expected ")
    assert [p.name for p in tmp_path.iterdir()] == ["vision.csv"]


def test_a_search_in_a_table_that_is_none_is_named(tmp_path):
    for config in ("{", "[]", '"{""no"": 1}"'):
        (tmp_path / "agent.csv").write_text(f"group,setting,seed,config\nx,y,1,{config}\n")
        store = Store(tmp_path, {})
        with pytest.raises(InputError, match=r"agent\.csv: expected the options"):
            store.has("agent", {"group": "x", "setting": "y", "seed": 1}, configure())


def test_a_process_that_is_killed_is_told_in_a_sentence(tmp_path, monkeypatch):
    class Killed(measure.ProcessPoolExecutor):
        def __init__(self, processes, context, *_):
            super().__init__(processes, context)  # that imports nothing: it ends at once

        def submit(self, function, *args):
            return super().submit(os._exit, 9)

    monkeypatch.setattr(measure, "ProcessPoolExecutor", Killed)
    with pytest.raises(InputError, match="--jobs: expected 2 processes that live, found one"):
        measure.measure_all(some_jobs(2), Store(tmp_path, {}), 2)


def test_ctrl_c_while_jobs_are_handed_out_waits_for_none(tmp_path, monkeypatch):
    """It would wait for an hour, which the time limit of a test ends."""

    class Interrupted(measure.ProcessPoolExecutor):
        n = 0

        def submit(self, function, *args):
            self.n += 1
            if self.n > 1:
                raise KeyboardInterrupt
            return super().submit(time.sleep, 3600)

    monkeypatch.setattr(measure, "ProcessPoolExecutor", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure.measure_all(some_jobs(3), Store(tmp_path, {}), 2)


HOLD = """
import time
from pathlib import Path

def hold(job):
    (Path(job.key["group"]) / str(job.key["seed"])).touch()
    time.sleep(3600)
"""


@pytest.mark.slow
def test_several_processes_measure_the_same_and_ctrl_c_ends_all_at_once(
    tiny, tmp_path, monkeypatch
):
    """Two searches, then work without end, which is interrupted as soon as both processes have some."""
    jobs = some_jobs(2, **tiny, episodes=6)
    measure.measure_all(jobs, Store(tmp_path / "one", {}), 1)
    one = read(tmp_path / "one", "agent")

    (tmp_path / "hold.py").write_text(HOLD)
    monkeypatch.syspath_prepend(tmp_path)
    endless = [
        Job("agent", importlib.import_module("hold").hold, {"group": str(tmp_path), "seed": s}, own)
        for s, own in ((2, configure()), (3, configure()))
    ]
    over, children = threading.Event(), []

    def interrupt():
        wanted = [tmp_path / "2", tmp_path / "3"]  # both have their jobs
        while not all(file.exists() for file in wanted) or stored() < len(jobs):
            if over.wait(0.1):
                return
        children.extend(psutil.Process(p.pid) for p in multiprocessing.active_children())
        os.kill(os.getpid(), signal.SIGINT)  # to this process alone, as a tool would

    def stored() -> int:
        file = tmp_path / "two" / "agent.csv"
        return len(read(tmp_path / "two", "agent")) if file.exists() else 0

    # Tests that run in the background have SIGINT switched off.
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    watch = threading.Thread(target=interrupt)
    watch.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            measure.measure_all([*jobs, *endless], Store(tmp_path / "two", {}), 2)
        assert len(children) == 2
        assert not psutil.wait_procs(children, timeout=60)[1]
    finally:
        over.set()
        watch.join()
        signal.signal(signal.SIGINT, old)
        for process in psutil.wait_procs(children, timeout=0)[1]:
            process.kill()
    two = read(tmp_path / "two", "agent")  # whole rows
    assert list(one["seed"]) == [0, 1]
    assert one.drop(columns="seconds").equals(two.drop(columns="seconds"))


# ---------------------------------------------------------------------------------- pages by hand


def result(group: str, seed: int, method: str, mean: float, **more) -> dict:
    row = {"group": group, "size": "S", "seed": seed, "method": method, "mean": mean}
    config = json.dumps({"data_fraction": 0.01})
    row |= {"by_task": f"p={mean - 1:.2f} q={mean + 1:.2f}", "config": config}
    row |= {"evaluations": 7 * seed if method == "DARE, tuned" else 0, "seconds": np.nan}
    row |= {"sees": "labels" if ", tuned" in method else "nothing"}
    if method == "agent + CMA-ES":
        row |= {"evaluations": 700, "seconds": 10.0 * seed, "sees": "labels"}
    return row | more


@pytest.fixture
def few() -> pd.DataFrame:
    """Two groups, two seeds; the search gains 8 and 10 points in a, 1 and 1 in b."""
    return pd.DataFrame(
        result(group, seed, method, mean)
        for group, base, gains in (("a", 60.0, (8, 10)), ("b", 80.0, (1, 1)))
        for seed, gain in zip((1, 2), gains, strict=True)
        for method, mean in (
            ("expert p", 40),
            ("expert q", 45),
            ("fine-tuned", 99),
            ("weight average", base - 5),
            ("TIES, tuned", base),
            ("DARE, tuned", base - 10 * seed),
            ("agent + CMA-ES", base + gain),
        )
    )


TOOK = ["% of experts", "sees", "evaluations", "seconds"]
NO_PAPER = pd.DataFrame(columns=["table", "model", "column", "method", "value"])


def page(name: str, *frames, paper=NO_PAPER) -> str:
    return pages.PAGES[name].text(*frames, paper=paper)


def line(text: str, *words: str) -> list[str]:
    """The cells behind these words, of the only line of a table that begins with them."""
    lines = [[cell.strip() for cell in x.strip("|").split("|")] for x in text.splitlines()]
    (found,) = [cells[len(words) :] for cells in lines if cells[: len(words)] == list(words)]
    return found


def test_table_i_by_hand(few):
    text = page("table-I", few)
    assert line(text, "method") == ["a", "b", "Average", *TOOK]
    # No ± for what draws nothing.
    assert line(text, "fine-tuned") == ["99.0"] * 3 + ["100.0", "nothing", "0", ""]
    assert line(text, "best expert, for all tasks")[:3] == ["45.0"] * 3
    dare = ["45.0 ± 7.1", "65.0 ± 7.1", "55.0 ± 7.1"]
    # Of 98 and 100 it has 44 and 46 on average in a, 64 and 66 in b.
    assert line(text, "DARE, tuned") == [*dare, "55.6", "labels", "7 to 14", ""]
    # agent + CMA-ES: a 68 and 70, b 81 twice; the average 74.5 and 75.5. 10 and 20 seconds.
    rmm = ["69.0 ± 1.4", "81.0 ± 0.0", "75.0 ± 0.7"]
    assert line(text, "agent + CMA-ES") == [*rmm, "75.8", "labels", "700", "15"]
    # 8 and 10: mean 9, half width 12.706 * sqrt(2) / sqrt(2). The average's gains are 4.5 and 5.5.
    gain = ["+9.0 ± 12.7", "+1.0 ± 0.0", "+5.0 ± 6.4"]
    assert line(text, "agent + CMA-ES − best uniform merge") == gain + [""] * 4
    assert "mean over seeds (2)" in text
    assert "of the 3 merges that search nothing" in text
    assert "on 1 % of it at a time for a search, which scores at most 11 paths" in text


@pytest.mark.parametrize(
    ("method", "gain"),
    [
        ("WUDI", "+2.0 ± 12.7"),  # a rule
        ("least squares, weighted", "+2.0 ± 12.7"),  # a rule that sees inputs
        ("coefficients by gradient, per tensor", "+9.0 ± 12.7"),  # a yardstick
        ("CMA-ES over scales", "+9.0 ± 12.7"),  # a search
    ],
)
def test_a_gain_is_over_the_best_that_searches_nothing_and_follows_no_gradient(few, method, gain):
    """The search has 68 and 70 in a, the other rules 60 at best."""
    more = pd.DataFrame(result("a", seed, method, 67.0) for seed in (1, 2))
    text = page("table-III", pd.concat([few[few["group"] == "a"], more], ignore_index=True))
    assert line(text, "agent + CMA-ES − best uniform merge")[0] == gain


def test_table_ii_shows_the_pairs_tasks_and_compares_their_mean_alone(few):
    alone = few[few["group"] == "a"]
    text = page("table-II", alone)
    assert line(text, "method") == ["p", "q", "Average", *TOOK]
    assert line(text, "agent + CMA-ES")[:3] == ["68.0 ± 1.4", "70.0 ± 1.4", "69.0 ± 1.4"]
    assert line(text, "agent + CMA-ES − best uniform merge")[:3] == ["", "", "+9.0 ± 12.7"]
    pair = alone.assign(group="digits+textures")
    assert page("table-II", pd.concat([few, pair], ignore_index=True)).count("\n## ") == 1
    assert page("table-II", few) == ""  # neither of its groups is the pair


def test_one_seed_has_no_spread(few):
    text = page("table-III", few[few["seed"] == 1])
    assert line(text, "agent + CMA-ES")[:2] == ["68.0", "81.0"]
    assert line(text, "agent + CMA-ES − best uniform merge")[:2] == ["+8.0", "+1.0"]


def test_table_iv_by_hand():
    found = pd.DataFrame(
        {"preset": preset, "reward": reward, "data_fraction": share, "dar": dar, "seed": seed}
        | {"mean": mean, "by_task": f"p={mean - 2} q={mean + 2}"}
        | {"seconds": 1000 * share, "evaluations": 700}
        for preset, reward, share, dar, means in (
            ("paper", "metric", 1.0, 0.8, (71, 72)),
            ("paper", "metric", 0.1, 0.8, (67, 68)),
            ("paper", "metric", 0.1, 0.0, (68, 68)),
            ("weights", "metric", 1.0, 0.0, (82, 82)),
            ("weights", "metric", 0.1, 0.0, (80, 80)),
            ("weights", "likelihood", 0.1, 0.0, (83, 83, 83)),
        )
        for seed, mean in enumerate(means)
    )
    ours, papers = page("table-IV", found, paper=tables.read("paper")).split("## Paper")
    assert "over seeds (2 to 3), 700 episodes" in ours
    assert line(ours, "Average", "paper's preset, with DAR") == ["71.5 ± 0.7", "67.5 ± 0.7"]
    # Its search at 100 % stands for both.
    assert line(ours, "Average", "paper's preset, without DAR") == ["71.5 ± 0.7", "68.0 ± 0.0"]
    assert line(ours, "p", "agent + CMA-ES, by likelihood") == ["", "81.0 ± 0.0"]
    # 67 - 68 and 68 - 68: mean -0.5, half width 12.706 * sqrt(0.5) / sqrt(2).
    assert line(ours, "Average", "with − without DAR") == ["", "−0.5 ± 6.4"]
    assert line(ours, "Average", "agent + CMA-ES − itself at 100 %") == ["", "−2.0 ± 0.0"]
    assert line(ours, "Average", "by likelihood − agent + CMA-ES at 100 %") == ["", "+1.0 ± 0.0"]
    assert line(ours, "seconds", "paper's preset") == ["1000", "100"]
    # Without 100 % there is nothing to compare with.
    assert "itself at" not in page("table-IV", found[found["data_fraction"] < 1])
    assert line(ours, "times faster", "paper's preset") == ["1.0", "10.0"]
    assert line(papers, "Average", "RMM w/o DAR") == ["73.86", "72.97", "73.27"]
    assert line(papers, "times faster", "RMM") == ["1.0", "10.4", "96.5"]


def test_searches_by_hand():
    found = pd.DataFrame(
        {"group": "g", "seed": seed, "method": method, "evaluations": 700, "seconds": 5}
        | {"reward_split": a, "mean": b}
        for method, split, test in (
            ("agent + CMA-ES", (70, 72), (66, 64)),
            ("TPE", (71, 71), (60, 60)),
            ("luck", (60, 60), (69, 69)),  # better on the test split, which chooses nothing
        )
        for seed, a, b in zip((1, 2), split, test, strict=True)
    )
    text = page("searches", found, found)
    order = [x.split("|")[2].strip() for x in text.splitlines() if x.startswith("| g ")]
    assert order == ["TPE", "agent + CMA-ES", "luck"]  # of equal ones by name
    assert line(text, "g", "agent + CMA-ES") == ["2", "71.0 ± 1.4", "65.0 ± 1.4", "", "", "5"]
    tpe = ["2", "71.0 ± 0.0", "60.0 ± 0.0", "+0.0 ± 12.7", "+5.0 ± 12.7", "5"]
    assert line(text, "g", "TPE") == tpe
    luck = ["2", "60.0 ± 0.0", "69.0 ± 0.0", "+11.0 ± 12.7", "−4.0 ± 12.7", "5"]
    assert line(text, "g", "luck") == luck


def test_the_ablation_by_hand():
    found = pd.DataFrame(
        {"group": "g", "setting": s, "seed": seed, "evaluations": 9, "reward_split": r, "mean": 50}
        for s, values in (("agent + CMA-ES", (70, 72)), ("x", (69, 69)))
        for seed, r in enumerate(values)
    )
    text = page("agent", found)
    assert line(text, "g", "agent + CMA-ES") == ["71.0 ± 1.4", "", "50.0 ± 0.0", "2"]
    assert line(text, "g", "x") == ["69.0 ± 0.0", "−2.0 ± 12.7", "50.0 ± 0.0", "2"]


def test_the_defaults_ablation_by_hand():
    found = pd.DataFrame(
        {"group": g, "setting": s, "seed": seed, "evaluations": 9, "reward_split": r, "mean": t}
        for g, s, reward, test in (
            ("g", "RMM (agent)", (70, 72), (60, 60)),
            ("g", "x", (69, 69), (58, 61)),
            ("g", "y", (69,), (61,)),
            ("h", "RMM (agent)", (70,), (60,)),
            ("h", "x", (71, 50), (64, 50)),  # the second has nothing to be compared with
        )
        for seed, (r, t) in enumerate(zip(reward, test, strict=True))
    )
    text = page("default", found)
    assert line(text, "g", "RMM (agent)") == ["71.0 ± 1.4", "", "60.0 ± 0.0", "2"]
    assert line(text, "g", "x") == ["69.0 ± 0.0", "−2.0 ± 12.7", "59.5 ± 2.1", "2"]
    # Test split: -2 and 1, mean -0.5; of one difference there is no interval.
    said = "g: x −0.5, y +1.0. h: x +4.0."
    assert f"differences to RMM (agent) on the test split. {said}](default.png)" in text
    axes = page_figures.DRAW["default"](found).axes
    assert [a.get_title() for a in axes] == ["g", "h"]
    shown = axes[0].containers[0]
    assert list(shown.lines[0].get_xdata()) == pytest.approx([-0.5, 1.0])
    # 12.706 * sd / sqrt(2), with sd = 3 / sqrt(2).
    ends = shown.lines[2][0].get_segments()[0][:, 0]
    assert list(ends) == pytest.approx([-0.5 - 19.059, -0.5 + 19.059], abs=0.01)


def test_budgets_by_hand():
    values = {  # (group, method, budget) -> test scores of seeds 0 and 1
        ("g", "RMM (agent)", 50): (60, 62),
        ("g", "TPE", 50): (55, 57),  # 5 and 5 less
        ("g", "RMM (agent)", 700): (70, 72),
        ("g", "TPE", 700): (71, 71),  # 1 more, 1 less
        ("g", "random search", 700): (72, 74),  # 2 and 2 more
        ("h", "RMM (agent)", 50): (60, 60),
        ("h", "TPE", 50): (59, 61),
        ("h", "random search", 50): (1, 2),
    }
    found = pd.DataFrame(
        {"group": g, "method": m, "evaluations": n, "seed": seed, "mean": mean}
        for (g, m, n), own in values.items()
        for seed, mean in enumerate(own)
    )
    text, _, second = page("budgets", found).partition("## h")
    assert line(text, "evaluations") == ["50", "700"]
    assert line(text, "RMM (agent)") == ["61.0 ± 1.4", "71.0 ± 1.4"]
    assert line(text, "RMM (agent) − TPE") == ["+5.0 ± 0.0", "+0.0 ± 12.7"]
    assert line(text, "RMM (agent) − random search") == ["", "−2.0 ± 0.0"]
    # 59 and 58: 12.706 * sqrt(0.5) / sqrt(2).
    assert line(second, "RMM (agent) − random search") == ["+58.5 ± 6.4"]
    summary, _, text = text.partition("## g")
    assert line(summary, "TPE") == ["1 / 1 / 0", "0 / 1 / 0"]
    assert line(summary, "random search") == ["1 / 0 / 0", "0 / 0 / 1"]
    assert "over seeds (2)" in summary
    shown = "g: 50: TPE +5.0, 700: TPE +0.0, 700: random search −2.0. h: 50: TPE +0.0, "
    assert f"{shown}50: random search +58.5.](budgets.png)" in summary
    axes = page_figures.DRAW["budgets"](found).axes[0]
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == ["50: TPE", "50: random search", "700: TPE", "700: random search"]
    drawn = axes.containers[0].lines[0].get_xdata()
    assert list(drawn) == pytest.approx([5, np.nan, 0, -2], nan_ok=True)


def test_equal_seconds_by_hand():
    found = pd.DataFrame(
        {"group": "g", "method": m, "evaluations": n, "search_seconds": 60.0, "seed": seed}
        | {"reward_split": mean + 1, "mean": mean}
        for m, n, means in (("RMM (agent)", 700, (60, 62)), ("NSGA-II", 900, (55, 57)))
        for seed, mean in enumerate(means)
    )
    text = page("seconds", found)
    agent = ["2", "60", "700", "62.0 ± 1.4", "61.0 ± 1.4", "", ""]
    assert line(text, "g", "RMM (agent)") == agent
    more = ["+5.0 ± 0.0"] * 2
    assert line(text, "g", "NSGA-II") == ["2", "60", "900", "57.0 ± 1.4", "56.0 ± 1.4", *more]
    assert "RMM (agent) had 700 evaluations" in text
    assert "differences to RMM (agent) on the test split. g: NSGA-II −5.0.](seconds.png)" in text
    assert len(page_figures.DRAW["seconds"](found).axes) == 1


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        *((name, True) for name in ("default", "budgets", "seconds", "labels")),
        *(
            (name, False) for name in ("default", "budgets", "labels")
        ),  # rows of seconds come together
    ],
)
def test_a_page_of_a_table_that_was_stopped(name, reference):
    """Whether the first row is what others are compared with, or another."""
    row = {"group": "g", "method": "RMM (agent)", "setting": "RMM (agent)", "reward": "metric"}
    row |= {"label_fraction": 1.0, "data_fraction": 0.1, "seed": 1, "evaluations": 50}
    row |= {"search_seconds": 9.0, "reward_split": 81.0, "mean": 80.0, "sees": "labels"}
    if not reference:
        row |= {"method": "TPE", "setting": "GAE", "reward": "agreement"}
    found = pd.DataFrame([row])
    text = page(name, found)
    assert "g: not measured." in text
    assert "80.0" in text
    assert "nan" not in text
    figure = page_figures.DRAW[name](found)
    assert [a.get_title() for a in figure.axes] == ["g"]
    figure.savefig(io.BytesIO())


def test_few_labels_by_hand():
    found = pd.DataFrame(
        {"group": "g", "reward": reward, "label_fraction": known, "data_fraction": data}
        | {"seed": seed, "evaluations": 700, "reward_split": 1.0, "mean": mean, "sees": sees}
        for reward, known, data, sees, means in (
            ("metric", 1.0, 0.1, "labels", (70, 72)),
            ("metric", 1.0, 0.01, "labels", (69, 69)),
            ("metric", 0.01, 1.0, "labels", (60, 62)),
            ("likelihood", 0.01, 1.0, "labels", (65,)),
            ("agreement", 1.0, 0.1, "inputs", (71, 73)),
        )
        for seed, mean in enumerate(means)
    )
    text = page("labels", found)
    every = "all labels, 10 % at a time"
    assert line(text, "g", every) == ["71.0 ± 1.4", "", "labels", "2"]
    # -1 and -3; -10 and -10; -5; 1 and 1.
    one = line(text, "g", "all labels, 1 % at a time")
    assert one == ["69.0 ± 0.0", "−2.0 ± 12.7", "labels", "2"]
    few = line(text, "g", "1 % of the labels, all at a time")
    assert few == ["61.0 ± 1.4", "−10.0 ± 0.0", "labels", "2"]
    soft = line(text, "g", "1 % of the labels, all at a time, by likelihood")
    assert soft == ["65.0", "−5.0", "labels", "1"]
    none = "no labels: agreement with the experts, 10 % of the inputs at a time"
    assert line(text, "g", none) == ["72.0 ± 1.4", "+1.0 ± 0.0", "inputs", "2"]
    assert f"differences to {every} on the test split. g: all labels, 1 % at a time −2.0, " in text
    (axes,) = page_figures.DRAW["labels"](found).axes
    drawn = {x for c in axes.containers for x in c.lines[0].get_xdata()}
    assert drawn == {-2, -10, -5, 1}
    (agreed,) = (c for c in axes.containers if c.get_label() == "sees inputs")
    assert list(agreed.lines[0].get_xdata()) == [1]


def test_intervals_are_scipys():
    from scipy import stats

    rng = np.random.default_rng(0)
    for n in range(2, 31):
        values = 100 * rng.normal(size=n)
        low, high = stats.t.interval(0.95, n - 1, values.mean(), stats.sem(values))
        mean, half = ((high + low) / 2, (high - low) / 2)
        assert rows.interval(pd.Series(values)) == f"{mean:+.1f} ± {half:.1f}".replace("-", "−")
    assert rows.interval(pd.Series([-3.0, np.nan])) == "−3.0"


def test_fig_3_holds_what_the_rows_say():
    curve = pd.DataFrame(
        {
            "dar": dar,
            "seed": s,
            "episode": e,
            "raw_reward": 50 + e - s,
            "dar_reward": 50 + e * (1 - dar),
        }
        for dar, seeds in ((0.8, (1, 2)), (0.0, (2, 3)))
        for s in seeds
        for e in range(60)
    )
    rewards = page_figures.DRAW["fig-3"](curve)
    titles = [axes.get_title(loc="left") for axes in rewards.axes]
    assert titles == ["without DAR", "with DAR, λ = 0.8"]
    paid = [x for x in rewards.axes[1].lines if x.get_label().startswith("paid")]
    assert paid[0].get_ydata()[59] == pytest.approx(50 + 59 * 0.2)
    own = next(x for x in rewards.axes[0].lines if "mean of the last 50" in x.get_label())
    assert own.get_ydata()[59] == pytest.approx(48 + np.mean(range(10, 60)))  # both have seed 2
    with pytest.raises(InputError, match="expected a seed with DAR and without, found none"):
        page_figures.DRAW["fig-3"](curve[curve["seed"] != 2])


# ----------------------------------------------------------------------------------- what ships


def test_the_papers_figures_are_whole_and_consistent():
    paper = tables.read("paper")
    assert paper.groupby("table").size().to_dict() == {"I": 70, "II": 21, "III": 28, "IV": 24}
    wide = paper[paper["table"].isin(["I", "II"])].pivot(
        index=["table", "model", "method"], columns="column", values="value"
    )
    sets = wide.drop(columns="Average").mean(axis=1)
    assert (wide["Average"] - sets).abs().max() < 0.0101
    iv = paper[paper["table"] == "IV"].set_index(["column", "method"])["value"]
    for share in ("100 %", "10 %", "1 %"):
        for method in ("RMM", "RMM w/o DAR"):
            own = [iv[f"{metric} at {share}", method] for metric in ("CUB", "Dogs")]
            assert iv[f"Average at {share}", method] == pytest.approx(np.mean(own), abs=0.0101)
    assert iv["Average at 10 %", "RMM"] == wide.at[("II", "ViT-B/16", "RMM"), "Average"]


WRITTEN = [
    n for n, p in pages.PAGES.items() if all((RESULTS / f"{f}.csv").is_file() for f in p.files)
]


def test_a_page_whose_table_ships_ships():
    assert {"table-I", "table-II", "table-III", "table-IV", "groups"} <= set(WRITTEN)
    assert {f"{name}.md" for name in WRITTEN} == {f.name for f in RESULTS.glob("*.md")} - {
        "README.md"
    }


@pytest.mark.parametrize("name", WRITTEN)
def test_the_pages_that_ship_are_written_from_the_files_that_ship(name):
    found = [read(RESULTS, table) for table in pages.PAGES[name].files]
    assert (RESULTS / f"{name}.md").read_text("utf-8") == page(
        name, *found, paper=tables.read("paper")
    )
    assert name not in page_figures.DRAW or (RESULTS / f"{name}.png").is_file()


OF_METHODS = [name for name in SHIPPED if not name.endswith("-curve")]


@pytest.mark.parametrize("name", [*OF_METHODS, "demo/vision", "fresh/vision"])
def test_every_file_of_methods_has_the_same_columns_and_order(name):
    found = read(RESULTS, name)
    assert list(found)[: len(FIRST)] == FIRST
    kinds = rows.kind_of(found["method"])
    assert set(found["sees"]) <= {"nothing", "inputs", "labels", "gradients"}
    searched = kinds.isin(["search", "rival"])
    assert set(found[searched]["sees"]) == {"labels"}
    assert (found[searched]["evaluations"] == 700).all()
    assert (found[kinds.isin(["bound", "expert"])]["evaluations"] == 0).all()
    # What a rule is tuned over has seen labels, and nothing else has.
    merged = found[kinds == "uniform"]
    assert ((merged["evaluations"] > 0) == (merged["sees"] == "labels")).all()
    told = merged["setting"].str.extract(r"best of (\d+) on the reward split")[0]
    plain = merged["method"] != "metrics-weighted average"  # it scores the experts too
    assert (told.fillna("0").astype(int) == merged["evaluations"])[plain].all()
    if "size" not in found:
        return
    for _, own in found.groupby(["group", "size", "seed"]):
        names = [rows.BEST_EXPERT if n.startswith("expert ") else n for n in own["method"]]
        assert names == sorted(names, key=list(rows.METHODS.index).index)


def test_the_order_of_methods_is_that_of_the_tables():
    names = list(rows.METHODS.index)
    some = ["base", rows.BEST_EXPERT, "fine-tuned", "multi-task", "weight average", "DARE"]
    some += ["task arithmetic, tuned", "DARE, tuned", "weight per expert, tuned", "TSV", "DOGE"]
    some += ["RegMean", "least squares", "least squares, weighted", "Fisher"]
    some += ["coefficients by gradient, per model", "AdaMerging", "Frank-Wolfe"]
    some += ["RMM (paper)", "RMM (agent)", "agent + CMA-ES", "CMA-ES over scales", "TPE"]
    assert [name for name in names if name in some] == some
    assert len(names) == len(set(names))


def test_shares_of_the_experts_by_hand():
    found = pd.DataFrame(
        {"group": group, "size": "S", "seed": 1, "method": method, "by_task": scores}
        for group, method, scores in (
            ("a", "fine-tuned", "p=80.0 q=50.0"),
            ("a", "agent + CMA-ES", "p=40.0 q=50.0"),  # 50 % and 100 %
            ("b", "fine-tuned", "r=0.0 q=50.0"),  # an expert that knows nothing
            ("b", "agent + CMA-ES", "r=10.0 q=50.0"),
            ("c", "agent + CMA-ES", "p=10.0 q=50.0"),  # nothing to compare with
        )
    )
    expected = [100.0, 75.0, np.nan, np.nan, np.nan]
    np.testing.assert_allclose(rows.of_experts(found), expected)


def test_the_curve_that_ships_is_of_one_seed():
    curve = tables.read("dar-curve").pivot(
        index=["seed", "episode"], columns="dar", values="raw_reward"
    )
    assert list(curve.index.unique("seed")) == [1]
    assert len(curve.dropna()) == 700
    same = (curve[0.8] == curve[0.0]).to_numpy()
    assert same[:4].all()
    assert not same.all()


@pytest.mark.parametrize(
    "name", ["halves", "vision", "language", "dar", "searches", "agent", "fresh/vision"]
)
def test_every_config_that_ships_can_be_read(name):
    configs = set(tables.read(name)["config"]) - {""}
    assert configs
    for text in configs:
        config = configure(**json.loads(text))
        assert configure(**describe(config)) == config


@pytest.mark.parametrize("file", sorted(RESULTS.rglob("*.csv")), ids=lambda file: file.stem)
def test_a_row_that_ships_is_called_what_searched(file):
    """RMM alone is a method of the paper's own tables."""
    found = rows.read_csv(file)
    if "method" not in found or file.stem == "paper":
        return
    assert "RMM" not in set(found["method"])
    if "config" in found:
        runs = found[found["method"].isin(rows.KINDS["search"]) & (found["config"] != "")]
        for name, config in {*zip(runs["method"], runs["config"], strict=True)}:
            assert name == searched(configure(**json.loads(config)))


# Rows to measure again: a uniform merge and a search of each kind.
AGAIN = [
    *(("halves", "TIES, tuned"), ("language", "weight average")),
    *((name, "agent + CMA-ES") for name in ("halves", "vision", "language", "searches", "agent")),
    *(("dar", "RMM (paper)"), ("agent", "RMM (agent)")),
]


@pytest.mark.parametrize(("name", "method"), AGAIN)
def test_a_row_that_ships_is_measured_again(name, method):
    row = tables.read(name).query("method == @method").iloc[0]
    check_again(row, load(config_of(row)))


def test_read_refuses_what_is_not_there():
    with pytest.raises(InputError, match=r"python -m rmm_lab tables"):
        tables.read("none")


SHIPPED = Path(tables.__file__).parents[2] / "results"


def _first_cell(text: str, column: str, value: str) -> str:
    """A table with another value in a column of its first row."""
    head, first, *rest = csv.reader(io.StringIO(text))
    first[head.index(column)] = value
    out = io.StringIO()
    csv.writer(out).writerows([head, first, *rest])
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("budgets", lambda text: text.partition("\n")[0] + "\n"),
        ("fronts", lambda text: text.partition("\n")[0] + "\n"),
        ("labels", lambda text: text.partition("\n")[0] + "\n"),
        ("labels", lambda text: text.rpartition(",")[0]),  # pandas would fill the last row
        ("vision", lambda text: _first_cell(text, "by_task", "a=x")),
        ("fronts", lambda text: _first_cell(text, "seed", "9" * 30)),
        ("dar-curve", lambda text: text.replace("seed", "sed", 1)),
        ("dar-curve", lambda text: text + text.splitlines()[1] + "\n"),
    ],
)
def test_an_odd_table_is_refused_before_any_page_is_written(tmp_path, capsys, name, change):
    """Also those of tables that are whole."""
    shutil.copy(SHIPPED / "agent.csv", tmp_path)
    (tmp_path / f"{name}.csv").write_text(change((SHIPPED / f"{name}.csv").read_text("utf-8")))
    assert tables.main(["show", "--out", str(tmp_path)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {tmp_path / name}.csv: expected ")
    assert not list(tmp_path.glob("*.md"))


def test_a_table_that_gives_no_page_is_told(tmp_path, capsys):
    shutil.copy(SHIPPED / "searches-curve.csv", tmp_path)
    assert tables.main(["show", "--out", str(tmp_path)]) == 2
    assert "expected a folder with the CSV files of a table" in capsys.readouterr().err
