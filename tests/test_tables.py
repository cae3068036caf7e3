"""The result tables: what is measured and stored, pages by hand, and what ships against the models."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest

from rmm_lab.errors import InputError
from rmm_lab.evidence import measure, page_figures, pages, rows, tables
from rmm_lab.evidence.measure import Job, Store, load
from rmm_lab.evidence.paper_scale import Group
from rmm_lab.evidence.tables import Command
from rmm_lab.reward import Step, parse_path
from rmm_lab.search import rivals, uniform
from rmm_lab.search.config import configure, describe
from rmm_lab.search.problem import load_problem

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


@pytest.fixture
def small(tiny, monkeypatch):
    """Every problem of the kit is the tiny one."""
    one = [Group("digits+textures", "tiny", dict(tiny))]
    groups = dict.fromkeys(("II", "IV", "fig3", "searches", "agent"), one)
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
    assert [g.name for g in groups["III"]] == ["qa", "mixed"]
    assert groups["IV"] == groups["fig3"] == groups["II"]


def test_all_measures_everything_once(tmp_path, counted):
    Command("all", out=tmp_path).run()
    kinds = [(j.table, j.measure) for j in counted]
    assert kinds.count(("halves", measure.rmm)) == 8 * 5
    assert kinds.count(("halves", measure.uniform_merges)) == 8  # once: it depends on no seed
    assert kinds.count(("halves", measure.dare)) == 8 * 4  # the first seed's comes with the others
    assert kinds.count(("vision", measure.rmm)) == 5
    assert kinds.count(("language", measure.rmm)) == 2 * 5
    # 100 % once, 10 and 1 % with DAR and without, the default preset at each, by likelihood at two.
    assert sum(j.table == "dar" for j in counted) == 5 * (1 + 2 + 2 + 3 + 2)
    soft = {r.data_fraction for j in counted if (r := j.config.run).reward == "likelihood"}
    assert soft == {0.1, 0.01}
    curves = [j.config.run for j in counted if j.measure is measure.rmm_curve]
    assert [(r.data_fraction, r.dar_lambda, r.seed) for r in curves] == [
        (0.01, 0.8, 1),
        (0.01, 0.0, 1),
    ]
    merges = [j for j in counted if j.measure in (measure.uniform_merges, measure.dare)]
    assert {j.config.problem.unit for j in merges} == {"block"}
    assert len({(j.table, *j.key.values()) for j in counted}) == len(counted)


@pytest.mark.parametrize(
    ("table", "only", "found"),
    [
        ("I", ("digits",), {("halves", "digits", 0.1)}),
        ("IV", ("0.01",), {("dar", None, 0.01)}),
        ("all", ("0.01",), {("dar", None, 0.01)}),  # a share alone is Table IV's
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
        (["II", "--jobs", "0"], "--jobs: expected at least 1, found 0"),
        (["II", "--seeds", "1", "1"], "--seeds: expected one or more different numbers, found 1 1"),
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


def test_settings_of_the_ablation_are_options():
    for options in tables.AGENT.values():
        configure(**(options or {}))
    assert next(iter(tables.AGENT.values())) == {}


# ------------------------------------------------------------------------------- small measurements


@pytest.mark.slow
def test_a_table_of_methods_goes_on_where_it_was(small, tmp_path, capsys):
    once = {"episodes": 8, "out": tmp_path}
    Command("II", seeds=(1,), **once).run()
    first = read(tmp_path, "vision")
    Command("II", seeds=(2, 1), **once).run()
    both = read(tmp_path, "vision")
    assert both.head(len(first)).equals(first)
    assert list(both["seed"]) == [1] * len(first) + [2] * len(first)
    assert list(both["method"]) == 2 * list(first["method"])
    assert "2 jobs to measure" in capsys.readouterr().out
    names = list(first["method"])
    assert names[0] == "base"
    assert names[-1] == "RMM"
    assert names.index("fine-tuned") < names.index("TIES") < names.index("DARE, tuned")
    # What does not draw has the same row under each seed.
    one, two = (both[both["seed"] == s].set_index("method").drop(columns="seed") for s in (1, 2))
    fixed = [name for name in names if not name.startswith(("DARE", "RMM"))]
    assert one.loc[fixed].equals(two.loc[fixed])
    before = (tmp_path / "vision.csv").read_text()
    Command("II", seeds=(1, 2), **once).run()
    assert (tmp_path / "vision.csv").read_text() == before
    assert not list(tmp_path.glob(".*"))


def test_rows_are_those_of_the_functions_that_they_name(small, tmp_path):
    """Uniform merges against ``uniform.rows``, at both seeds; RMM's row against its path, scored again."""
    Command("II", seeds=(1, 2), episodes=8, out=tmp_path).run()
    for seed, own in read(tmp_path, "vision").groupby("seed"):
        own = own.set_index("method")
        config = config_of(own.loc["RMM"])
        assert (config.run.seed, config.run.episodes) == (seed, 8)
        for row in uniform.rows(load(configure(config, unit="block"))):
            assert own.at[row.name, "mean"] == pytest.approx(100 * row.mean, abs=0.006)
            assert own.at[row.name, "setting"] == row.setting
        check_again(own.loc["RMM"], load(config))


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
    key = {"group": "digits+textures", "size": "tiny", "seed": 1, "method": "RMM"}
    values = {"mean": 1.0, "by_task": "p=1.0", "setting": "", "episodes": 8}
    config = json.dumps(describe(configure(episodes=8)))
    Store(tmp_path, {}).add("vision", pd.DataFrame([key | values | {"config": config}]))
    Command("II", seeds=(1, 2), episodes=8, out=tmp_path).run()
    assert [j.key["seed"] for j in counted if j.measure is measure.rmm] == [2]
    with pytest.raises(InputError, match=r"vision.csv: expected --episodes 8 as in .*, found 9"):
        Command("II", seeds=(1, 2), episodes=9, out=tmp_path).run()
    with pytest.raises(InputError, match=r"vision.csv: expected --episodes 8 as in .*, found 7"):
        Command("II", seeds=(3,), episodes=7, out=tmp_path).run()
    with pytest.raises(InputError, match=r"--precision float32 as in .*, found bfloat16"):
        Command("II", seeds=(1,), episodes=8, precision="bfloat16", out=tmp_path).run()


def test_todays_default_preset_is_not_mixed_with_the_first_editions(counted):
    """The rows that ship are of a default preset with a local search, which is gone."""
    with pytest.raises(InputError, match=r"expected --cma-share 0.75 as in .*, found 0.8"):
        Command("II", seeds=(6,), out=RESULTS).run()
    assert not counted


def test_searches_have_a_row_and_a_curve_each(small, tmp_path, monkeypatch):
    some = {name: rivals.SEARCHES[name] for name in ("random search", "coordinate ascent")}
    monkeypatch.setattr(rivals, "SEARCHES", some)
    Command("searches", seeds=(1, 2), episodes=12, out=tmp_path).run()
    found, curve = read(tmp_path, "searches"), read(tmp_path, "searches-curve")
    assert list(found["method"]) == ["RMM", *sorted(some)] * 2
    for _, row in found.iterrows():  # the score in the file is that of the path in the file
        check_again(row, load(config_of(row)))
        assert row["episodes"] == 12
    ends = curve[curve["evaluations"] == 12]
    assert curve["evaluations"].max() == 12
    key = ["seed", "method", "reward_split"]  # the curve ends in the final choice
    assert ends[key].reset_index(drop=True).equals(found[key])


def test_the_ablation_has_a_row_for_each_setting(small, tmp_path, monkeypatch):
    settings = {"default preset": {}, "gone": None, "gamma 0.5": {"gamma": 0.5}}
    monkeypatch.setattr(tables, "AGENT", settings)
    Command("agent", seeds=(1,), episodes=6, out=tmp_path).run()
    found = [
        (r["setting"], config_of(r).agent.gamma) for _, r in read(tmp_path, "agent").iterrows()
    ]
    assert found == [("default preset", 1.0), ("gamma 0.5", 0.5)]


def test_uniform_rows_do_not_depend_on_the_seed_but_for_dare(tiny):
    """What a table measures once stands for every seed."""
    one, two = (
        {r.name: r.scores for r in uniform.rows(load_problem(**tiny, seed=s))} for s in (1, 2)
    )
    assert "DARE" in {name for name in one if one[name] != two[name]} <= {"DARE", "DARE, tuned"}


# ------------------------------------------------------------------------------ files and processes


def test_names_that_look_like_numbers_stay_text(tmp_path):
    row = {"group": "007", "size": "1e3", "seed": 7, "method": "RMM", "mean": 1.5, "path": ""}
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
        row = {"group": group, "size": "", "seed": seed, "method": "RMM", "mean": float(mean)}
        store.add("vision", pd.DataFrame([row]))
    found = read(tmp_path, "vision")[["group", "seed", "mean"]]
    assert found.values.tolist() == [["b", 1, 2], ["a", 1, 3], ["a", 2, 4]]


def test_a_file_of_another_version_is_left_alone(tmp_path):
    (tmp_path / "vision.csv").write_text("group,seed,method,mean\na,1,RMM,3\n")
    row = {"group": "a", "size": "", "seed": 2, "method": "RMM", "mean": 1}
    with pytest.raises(InputError, match=r"they differ in size\); move the file away"):
        Store(tmp_path, {}).add("vision", pd.DataFrame([row]))
    assert (tmp_path / "vision.csv").read_text().count("\n") == 2


def test_a_stopped_command_leaves_whole_rows(small, tmp_path, monkeypatch, capsys):
    def stop(job):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "rmm", stop)
    assert tables.main(["II", "--seeds", "1", "--episodes", "6", "--out", str(tmp_path)]) == 130
    assert "stopped; the same command goes on" in capsys.readouterr().err
    assert read(tmp_path, "vision")["method"].iloc[-1] == "DARE, tuned"
    assert not list(tmp_path.glob(".*"))


def some_jobs(n: int, run=measure.rmm, **options) -> list[Job]:
    return [
        Job("agent", run, {"group": "g", "setting": "s", "seed": s}, configure(seed=s, **options))
        for s in range(n)
    ]


@pytest.mark.slow
def test_several_processes_measure_the_same(tiny, tmp_path):
    for n in (1, 2):
        jobs = some_jobs(2, **tiny, episodes=6)
        measure.measure_all(jobs, Store(tmp_path / str(n), {}), n)
    one, two = (read(tmp_path / str(n), "agent").drop(columns="seconds") for n in (1, 2))
    assert list(one["seed"]) == [0, 1]
    assert one.equals(two)


@pytest.mark.slow
def test_a_process_that_is_killed_is_told_in_a_sentence(tmp_path, monkeypatch):
    class Killed(measure.ProcessPoolExecutor):
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
import signal, sys, time
from pathlib import Path
from rmm_lab.evidence.measure import Job, Store, measure_all
from rmm_lab.search.config import configure
out = Path(sys.argv[1])
def hold(job):
    (out / str(job.key["seed"])).touch()
    time.sleep(3600)
if __name__ == "__main__":
    # Tests that run in the background have SIGINT switched off, and a child inherits that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    jobs = [Job("agent", hold, {"seed": s}, configure()) for s in range(4)]
    try:
        measure_all(jobs, Store(out / "store", {}), 2)
    except KeyboardInterrupt:
        print("stopped", flush=True)
"""


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_at_once(tmp_path):
    (tmp_path / "hold.py").write_text(HOLD)
    words = [sys.executable, str(tmp_path / "hold.py"), str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as work:
        children: list[psutil.Process] = []
        try:
            deadline = time.monotonic() + 200
            while not all((tmp_path / n).exists() for n in "01"):  # both have their jobs
                assert work.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            children = psutil.Process(work.pid).children()
            work.send_signal(signal.SIGINT)  # to the first alone, as a tool would
            assert work.communicate(timeout=60)[0] == "stopped\n"
            assert not psutil.wait_procs(children, timeout=60)[1]
        finally:
            for process in (work, *psutil.wait_procs(children, timeout=0)[1]):
                process.kill()
    assert not (tmp_path / "store").exists()


# ---------------------------------------------------------------------------------- pages by hand


def result(group: str, seed: int, method: str, mean: float, **more) -> dict:
    row = {"group": group, "size": "S", "seed": seed, "method": method, "mean": mean}
    config = json.dumps({"data_fraction": 0.01})
    row |= {"by_task": f"p={mean - 1:.2f} q={mean + 1:.2f}", "episodes": 700, "config": config}
    return row | more


@pytest.fixture
def few() -> pd.DataFrame:
    """Two groups, two seeds; RMM gains 8 and 10 points in a, 1 and 1 in b."""
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
            ("RMM", base + gain),
        )
    )


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
    assert line(text, "method") == ["a", "b", "Average"]
    assert line(text, "fine-tuned") == ["99.0"] * 3  # no ± for what draws nothing
    assert line(text, "best expert, for all tasks") == ["45.0"] * 3
    assert line(text, "DARE, tuned") == ["45.0 ± 7.1", "65.0 ± 7.1", "55.0 ± 7.1"]
    # RMM: a 68 and 70, b 81 twice; the average 74.5 and 75.5.
    assert line(text, "RMM") == ["69.0 ± 1.4", "81.0 ± 0.0", "75.0 ± 0.7"]
    # 8 and 10: mean 9, half width 12.706 * sqrt(2) / sqrt(2). The average's gains are 4.5 and 5.5.
    assert line(text, "RMM − best uniform merge") == ["+9.0 ± 12.7", "+1.0 ± 0.0", "+5.0 ± 6.4"]
    assert "mean over seeds (2)" in text
    assert "7 settings of DARE, 35 evaluations of that whole split" in text
    assert "700 episodes, each on 1 % of the reward split; at most 11 paths" in text


def test_table_ii_shows_the_pairs_tasks_and_compares_their_mean_alone(few):
    alone = few[few["group"] == "a"]
    text = page("table-II", alone)
    assert line(text, "method") == ["p", "q", "Average"]
    assert line(text, "RMM") == ["68.0 ± 1.4", "70.0 ± 1.4", "69.0 ± 1.4"]
    assert line(text, "RMM − best uniform merge") == ["", "", "+9.0 ± 12.7"]
    pair = alone.assign(group="digits+textures")
    assert page("table-II", pd.concat([few, pair], ignore_index=True)).count("\n## ") == 1
    assert page("table-II", few) == ""  # neither of its groups is the pair


def test_one_seed_has_no_spread(few):
    text = page("table-III", few[few["seed"] == 1])
    assert line(text, "RMM") == ["68.0", "81.0"]
    assert line(text, "RMM − best uniform merge") == ["+8.0", "+1.0"]


def test_table_iv_by_hand():
    found = pd.DataFrame(
        {"preset": preset, "reward": reward, "data_fraction": share, "dar": dar, "seed": seed}
        | {"mean": mean, "by_task": f"p={mean - 2} q={mean + 2}"}
        | {"seconds": 1000 * share, "episodes": 700}
        for preset, reward, share, dar, means in (
            ("paper", "metric", 1.0, 0.8, (71, 72)),
            ("paper", "metric", 0.1, 0.8, (67, 68)),
            ("paper", "metric", 0.1, 0.0, (68, 68)),
            ("default", "metric", 1.0, 0.0, (82, 82)),
            ("default", "metric", 0.1, 0.0, (80, 80)),
            ("default", "likelihood", 0.1, 0.0, (83, 83, 83)),
        )
        for seed, mean in enumerate(means)
    )
    ours, papers = page("table-IV", found, paper=tables.read("paper")).split("## Paper")
    assert "over seeds (2 to 3), 700 episodes" in ours
    assert line(ours, "Average", "paper's preset, with DAR") == ["71.5 ± 0.7", "67.5 ± 0.7"]
    # Its search at 100 % stands for both.
    assert line(ours, "Average", "paper's preset, without DAR") == ["71.5 ± 0.7", "68.0 ± 0.0"]
    assert line(ours, "p", "default preset, by likelihood") == ["", "81.0 ± 0.0"]
    # 67 - 68 and 68 - 68: mean -0.5, half width 12.706 * sqrt(0.5) / sqrt(2).
    assert line(ours, "Average", "with − without DAR") == ["", "−0.5 ± 6.4"]
    assert line(ours, "Average", "default preset − itself at 100 %") == ["", "−2.0 ± 0.0"]
    assert line(ours, "Average", "by likelihood − default preset at 100 %") == ["", "+1.0 ± 0.0"]
    assert line(ours, "seconds", "paper's preset") == ["1000", "100"]
    # Without 100 % there is nothing to compare with.
    assert "itself at" not in page("table-IV", found[found["data_fraction"] < 1])
    assert line(ours, "times faster", "paper's preset") == ["1.0", "10.0"]
    assert line(papers, "Average", "RMM w/o DAR") == ["73.86", "72.97", "73.27"]
    assert line(papers, "times faster", "RMM") == ["1.0", "10.4", "96.5"]


def test_searches_by_hand():
    found = pd.DataFrame(
        {"group": "g", "seed": seed, "method": method, "episodes": 700, "seconds": 5}
        | {"reward_split": a, "mean": b}
        for method, split, test in (
            ("RMM", (70, 72), (66, 64)),
            ("TPE", (71, 71), (60, 60)),
            ("luck", (60, 60), (69, 69)),  # better on the test split, which chooses nothing
        )
        for seed, a, b in zip((1, 2), split, test, strict=True)
    )
    text = page("searches", found, found)
    order = [x.split("|")[2].strip() for x in text.splitlines() if x.startswith("| g ")]
    assert order == ["RMM", "TPE", "luck"]
    assert line(text, "g", "RMM") == ["2", "71.0 ± 1.4", "65.0 ± 1.4", "", "", "5"]
    tpe = ["2", "71.0 ± 0.0", "60.0 ± 0.0", "+0.0 ± 12.7", "+5.0 ± 12.7", "5"]
    assert line(text, "g", "TPE") == tpe
    luck = ["2", "60.0 ± 0.0", "69.0 ± 0.0", "+11.0 ± 12.7", "−4.0 ± 12.7", "5"]
    assert line(text, "g", "luck") == luck


def test_the_ablation_by_hand():
    found = pd.DataFrame(
        {"group": "g", "setting": s, "seed": seed, "episodes": 9, "reward_split": r, "mean": 50}
        for s, values in (("default preset", (70, 72)), ("x", (69, 69)))
        for seed, r in enumerate(values)
    )
    text = page("agent", found)
    assert line(text, "g", "default preset") == ["71.0 ± 1.4", "", "50.0 ± 0.0", "2"]
    assert line(text, "g", "x") == ["69.0 ± 0.0", "−2.0 ± 12.7", "50.0 ± 0.0", "2"]


def test_intervals_are_scipys():
    from scipy import stats

    rng = np.random.default_rng(0)
    for n in range(2, 31):
        values = 100 * rng.normal(size=n)
        low, high = stats.t.interval(0.95, n - 1, values.mean(), stats.sem(values))
        mean, half = ((high + low) / 2, (high - low) / 2)
        assert rows.interval(pd.Series(values)) == f"{mean:+.1f} ± {half:.1f}".replace("-", "−")
    assert rows.interval(pd.Series([-3.0, np.nan])) == "−3.0"


def test_figures_hold_what_the_rows_say(few):
    figure = page_figures.DRAW["table-I"](few)
    assert [axes.get_title() for axes in figure.axes[:3]] == ["S: a", "S: b", "S: Average"]
    marks = [list(x.get_xdata()) for x in figure.axes[0].lines if x.get_marker() == "D"]
    assert marks == [[68, 70]]  # each seed's
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


@pytest.mark.parametrize("name", pages.PAGES)
def test_the_pages_that_ship_are_written_from_the_files_that_ship(name):
    found = [read(RESULTS, table) for table in pages.PAGES[name].files]
    assert (RESULTS / f"{name}.md").read_text("utf-8") == page(
        name, *found, paper=tables.read("paper")
    )
    assert name not in page_figures.DRAW or (RESULTS / f"{name}.png").is_file()


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


# Rows to measure again: a uniform merge and a search of each kind.
AGAIN = [
    *(("halves", "TIES, tuned"), ("language", "weight average")),
    *((name, "RMM") for name in ("halves", "vision", "language", "dar", "searches", "agent")),
]


@pytest.mark.parametrize(("name", "method"), AGAIN)
def test_a_row_that_ships_is_measured_again(name, method):
    row = tables.read(name).query("method == @method").iloc[0]
    check_again(row, load(config_of(row)))


def test_read_refuses_what_is_not_there():
    with pytest.raises(InputError, match=r"python -m rmm_lab tables"):
        tables.read("none")
