"""The tables: which cells are measured and stored how; sheets by hand; what ships against the models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colors

from rmm_lab.errors import InputError
from rmm_lab.evidence import measure as cells
from rmm_lab.evidence import page_figures as sheet_figures
from rmm_lab.evidence import pages as sheets
from rmm_lab.evidence import tables
from rmm_lab.evidence.measure import Group, Job, Tables, args_of, config_of, load, method_jobs
from rmm_lab.evidence.tables import Command
from rmm_lab.figures import paths as plots
from rmm_lab.ppo import Args
from rmm_lab.search import rivals as searches
from rmm_lab.search import run_folder as runs
from rmm_lab.search import uniform as baselines
from rmm_lab.search.problem import load_problem

RESULTS = Path(tables.__file__).parents[2] / "results"


@pytest.fixture
def small(tiny, monkeypatch):
    """Every problem of the kit is the tiny one."""

    def groups() -> dict[str, list[Group]]:
        options = dict(tiny)
        one = [Group(n, "tiny", options) for n in ("digits+textures", "letters+symbols")]
        return {"II": one[:1], "groups": one[1:], "IV": one[:1], "fig3": one[:1]} | {
            "searches": one[:1],
            "agent": one[:1],
        }

    monkeypatch.setattr(tables, "kit_groups", groups)


def rows_of(folder: Path, name: str) -> list[dict]:
    return runs.from_csv((folder / f"{name}.csv").read_text())


# ---------------------------------------------------------------------------------------- the cells


def test_the_kits_groups_are_the_papers_tables():
    groups = tables.kit_groups()
    halves = {(g.name, g.size): g.options["experts"] for g in groups["I"]}
    assert len(halves) == 8
    assert halves["digits", "ViT, width 64"] == ("digits-first", "digits-second")
    assert halves["digits", "ViT, width 32"] == ("tiny-digits-first", "tiny-digits-second")
    assert [g.options["experts"] for g in groups["II"]] == [("digits", "textures")]
    assert [g.name for g in groups["III"]] == ["qa", "mixed"]
    assert groups["IV"] == groups["fig3"] == groups["II"]


@pytest.fixture
def counted(monkeypatch) -> list[Job]:
    """What would be measured, without measuring."""
    done: list[Job] = []
    monkeypatch.setattr(cells, "measure_all", lambda jobs, *_: done.extend(jobs))
    return done


def test_all_measures_each_cell_once(tmp_path, counted):
    Command("all", out=tmp_path).run()
    kinds = [(j.table, j.kind) for j in counted]
    assert kinds.count(("halves", "rmm")) == 8 * 5
    assert kinds.count(("halves", "methods")) == 8  # what does not depend on the seed, once
    assert kinds.count(("halves", "dare")) == 8 * 4  # the first seed's come with the others
    assert kinds.count(("vision", "rmm")) == 5
    assert kinds.count(("language", "rmm")) == 2 * 5
    # 100 % once, 10 and 1 % with DAR and without, the default preset at each, by likelihood at two.
    assert sum(j.table == "dar" for j in counted) == 5 * (1 + 2 + 2 + 3 + 2)
    soft = {(a.preset, a.data_fraction) for j in counted if (a := j.args).reward == "likelihood"}
    assert soft == {("default", 0.1), ("default", 0.01)}
    curves = [j.args for j in counted if j.kind == "rmm_curve"]
    assert [(a.data_fraction, a.dar, a.seed) for a in curves] == [(0.01, 0.8, 1), (0.01, 0.0, 1)]
    assert all(j.args.unit == "block" for j in counted if j.kind in ("methods", "dare"))
    assert len({(j.table, j.kind, *j.key.values()) for j in counted}) == len(counted)


def test_a_share_alone_is_table_ivs(tmp_path, counted):
    Command("all", only=("0.01",), seeds=(3,), out=tmp_path).run()
    assert {(j.table, j.args.data_fraction) for j in counted} == {("dar", 0.01)}
    counted.clear()
    Command("all", only=("0.01", "digits"), seeds=(3,), out=tmp_path).run()
    assert {j.table for j in counted} == {"halves"}


@pytest.mark.parametrize("seeds", [(), (1, 1), tuple(range(31))])
def test_seeds_that_no_interval_can_take_are_refused_before_anything_is_measured(
    tmp_path, counted, seeds
):
    with pytest.raises(InputError, match="--seeds: expected 1 to 30 different numbers, found"):
        Command("II", seeds=seeds, out=tmp_path).run()
    assert not counted


def test_show_of_a_folder_without_tables_is_refused(tmp_path):
    with pytest.raises(InputError, match="expected a folder with the CSV files of a table, found"):
        Command("show", out=tmp_path).run()


def test_a_process_that_is_killed_is_told_in_a_sentence(tmp_path, monkeypatch):
    class Killed(cells.ProcessPoolExecutor):
        def submit(self, function, *args):
            return super().submit(os._exit, 9)

    monkeypatch.setattr(cells, "ProcessPoolExecutor", Killed)
    jobs = list(
        Command("II", out=tmp_path)._jobs("II", Tables(tmp_path, {}), tables.kit_groups()["II"])
    )
    with pytest.raises(InputError, match="--jobs: expected 2 processes that live, found one"):
        cells.measure_all(jobs[:2], Tables(tmp_path, {}), 2)


def test_fig3_is_two_searches_at_the_smallest_share(tmp_path, counted):
    Command("fig3", out=tmp_path).run()
    assert [(j.args.preset, j.args.data_fraction, j.args.dar) for j in counted] == [
        ("paper", 0.01, 0.8),
        ("paper", 0.01, 0.0),
    ]


def test_only_names_groups_and_shares(tmp_path, counted):
    Command("I", only=("digits",), seeds=(3,), out=tmp_path).run()
    assert {(j.key["group"], j.key["size"]) for j in counted} == {
        ("digits", size) for size in tables.SIZES
    }
    counted.clear()
    Command("IV", only=("0.01",), seeds=(3,), out=tmp_path).run()
    assert {j.args.data_fraction for j in counted} == {0.01}
    assert len(counted) == 4


def test_an_unknown_group_is_refused(tmp_path, capsys):
    assert tables.main(["II", "--only", "cats", "--out", str(tmp_path)]) == 2
    assert "--only: expected some of digits+textures, found 'cats'" in capsys.readouterr().err
    assert tables.main(["II", "--jobs", "0", "--out", str(tmp_path)]) == 2
    assert "--jobs: expected at least 1, found 0" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_table_of_methods_goes_on_where_it_was(small, tmp_path, capsys):
    once = {"episodes": 8, "out": tmp_path}
    Command("II", seeds=(1,), **once).run()
    first = rows_of(tmp_path, "vision")
    Command("II", seeds=(2, 1), **once).run()
    rows = rows_of(tmp_path, "vision")
    assert rows[: len(first)] == first
    assert [r["seed"] for r in rows] == [1] * len(first) + [2] * len(first)
    assert [r["method"] for r in rows[: len(first)]] == [r["method"] for r in rows[len(first) :]]
    told = capsys.readouterr().out
    assert "2 cells to measure" in told  # all methods, RMM
    assert "cell 2 of 2" in told
    names = [r["method"] for r in first]
    assert names[0] == "base"
    assert names[-1] == "RMM"
    assert names.index("fine-tuned") < names.index("TIES") < names.index("DARE, tuned")
    by_method = {(r["method"], r["seed"]): r for r in rows}
    for name in names:  # what does not draw is the same line under each seed
        same = by_method[name, 1] | {"seed": 2} == by_method[name, 2]
        assert same or name.startswith(("DARE", "RMM"))
    before = (tmp_path / "vision.csv").read_text()
    Command("II", seeds=(1, 2), **once).run()
    assert (tmp_path / "vision.csv").read_text() == before
    assert not list(tmp_path.glob(".*"))


def test_lines_are_those_of_the_functions_that_they_name(small, tmp_path):
    """Uniform merges against ``baselines.rows``, at both seeds; RMM's line against its path."""
    Command("II", seeds=(1, 2), episodes=8, out=tmp_path).run()
    rows = rows_of(tmp_path, "vision")
    for seed in (1, 2):
        own = {r["method"]: r for r in rows if r["seed"] == seed}
        args = args_of(own["RMM"]["config"])
        assert (args.seed, args.episodes) == (seed, 8)
        problem = load(args)
        args.unit = "block"
        for row in baselines.rows(load(args)):
            assert own[row.name]["mean"] == pytest.approx(100 * row.mean, abs=0.006)
            assert own[row.name]["setting"] == row.setting
        steps, stem = tables.split_stem(own["RMM"]["path"], problem)
        again = baselines.path_row(problem, "", "", steps, stem)
        assert own["RMM"]["mean"] == pytest.approx(100 * again.mean, abs=0.006)
        reward = tables.whole(problem.scorer(), own["RMM"]["path"])
        assert own["RMM"]["reward_split"] == pytest.approx(100 * reward, abs=0.006)


def test_a_config_is_short_and_enough():
    args = Args(experts=("digits", "textures"), seed=3, preset="paper", dar=0.0, threads=1)
    text = config_of(args)
    assert json.loads(text) == {
        "experts": ["digits", "textures"],
        "preset": "paper",
        "seed": 3,
        "dar": 0.0,
    }
    assert args_of(text).config() == args.config()


def test_table_iv_and_fig_3(small, tmp_path):
    Command("IV", seeds=(1,), episodes=6, out=tmp_path).run()
    assert len(rows_of(tmp_path, "dar")) == 10
    curve = rows_of(tmp_path, "dar-curve")
    assert [(r["dar"], r["episode"]) for r in curve] == [(d, e) for d in (0.8, 0) for e in range(6)]
    plain = [r for r in curve if r["dar"] == 0]
    assert all(r["raw_reward"] == r["dar_reward"] for r in plain)
    command = Command("fig3", seeds=(1,), episodes=6, out=tmp_path)
    groups = command._wanted(("fig3",), tables.kit_groups())["fig3"]
    assert not list(command._jobs("fig3", Tables(tmp_path, tables.ORDER), groups))
    # Two searches of one seed play the same policy until the first update.
    raw = {d: [r["raw_reward"] for r in curve if r["dar"] == d] for d in (0.8, 0)}
    assert raw[0.8][:4] == raw[0][:4]
    (tmp_path / "dar-curve.csv").unlink()  # a line without its curve is measured again
    assert len(list(command._jobs("fig3", Tables(tmp_path, tables.ORDER), groups))) == 2
    other = [  # another seed's curve stands beside it
        r | {"seed": 2, "raw_reward": 1.0} for r in curve if r["dar"] == 0.8
    ]
    Tables(tmp_path, {}).add("dar-curve", curve)
    Tables(tmp_path, {}).add("dar-curve", other)
    assert len(rows_of(tmp_path, "dar-curve")) == 18


def test_the_curve_that_ships_is_of_one_seed():
    rows = tables.read("dar-curve")
    raw = {d: [r["raw_reward"] for r in rows if r["dar"] == d] for d in (0.8, 0)}
    assert [len(v) for v in raw.values()] == [700, 700]
    assert {r["seed"] for r in rows} == {1}
    assert raw[0.8][:4] == raw[0][:4] != raw[0.8][4:8]


def test_searches_of_other_lengths_do_not_share_a_mean(small, tmp_path, counted):
    done = tables.kit_groups()["II"][0].key | {"seed": 1, "method": "RMM"}
    values = {
        "mean": 1.0,
        "by_task": "p=1.0",
        "setting": "8 episodes",
        "episodes": 8,
        "config": '{"preset": "default", "seed": 1}',
    }
    Tables(tmp_path, {}).add("vision", [done | values])
    Command("II", seeds=(1, 2), episodes=8, out=tmp_path).run()
    assert [j.key["seed"] for j in counted if j.kind == "rmm"] == [2]
    message = "vision.csv: expected --episodes 8 as in the line of .* RMM, found 9; give the same"
    with pytest.raises(InputError, match=message):
        Command("II", seeds=(1, 2), episodes=9, out=tmp_path).run()
    with pytest.raises(InputError, match=r"--precision float32 as in .*, found bfloat16"):
        Command("II", seeds=(1,), episodes=8, precision="bfloat16", out=tmp_path).run()


def test_searches_have_a_line_and_a_curve_each(small, tmp_path, monkeypatch):
    some = {name: searches.SEARCHES[name] for name in ("random search", "coordinate ascent")}
    monkeypatch.setattr(searches, "SEARCHES", some)
    Command("searches", seeds=(1, 2), episodes=12, out=tmp_path).run()
    rows = rows_of(tmp_path, "searches")
    assert {(r["seed"], r["method"]) for r in rows} == {
        (s, m) for s in (1, 2) for m in ("RMM", *some)
    }
    problem = load(args_of(rows[0]["config"]))
    for row in rows:  # the score in the file is that of the path in the file
        steps, stem = tables.split_stem(row["path"], problem)
        again = baselines.path_row(problem, "", "", steps, stem)
        assert row["mean"] == pytest.approx(100 * again.mean, abs=0.006)
        assert row["episodes"] == 12
    curve = rows_of(tmp_path, "searches-curve")
    assert {(r["seed"], r["method"]) for r in curve} == {(r["seed"], r["method"]) for r in rows}
    assert max(r["evaluations"] for r in curve) == 12
    ends = {(r["seed"], r["method"]): r["reward_split"] for r in curve if r["evaluations"] == 12}
    assert ends == {(r["seed"], r["method"]): r["reward_split"] for r in rows}  # the final choice


def test_the_ablation_has_a_line_for_each_setting(small, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "AGENT", {"default preset": {}, "gamma 0.5": {"gamma": 0.5}})
    Command("agent", seeds=(1,), episodes=6, out=tmp_path).run()
    rows = rows_of(tmp_path, "agent")
    assert [(r["setting"], args_of(r["config"]).gamma) for r in rows] == [
        ("default preset", 1.0),
        ("gamma 0.5", 0.5),
    ]


def test_settings_of_the_ablation_are_arguments():
    for options in tables.AGENT.values():
        Args(**options).check()
    assert next(iter(tables.AGENT.values())) == {}


# ------------------------------------------------------------------------------ files and processes


def test_lines_come_into_their_places_over_those_with_the_same_key(tmp_path):
    table = Tables(tmp_path, {"group": ("b", "a")})
    line = {"size": "", "method": "RMM", "mean": 1}
    for group, seed, mean in (("a", 2, 1), ("b", 1, 2), ("a", 1, 3), ("a", 2, 4)):
        table.add("vision", [{"group": group, "seed": seed} | line | {"mean": mean}])
    found = [(r["group"], r["seed"], r["mean"]) for r in table.read("vision")]
    assert found == [("b", 1, 2), ("a", 1, 3), ("a", 2, 4)]


def test_a_file_of_another_version_is_left_alone(tmp_path):
    (tmp_path / "vision.csv").write_text("group,seed,method,mean\na,1,RMM,3\n")
    line = {"group": "a", "size": "", "seed": 2, "method": "RMM", "mean": 1}
    with pytest.raises(InputError, match=r"they differ in size\); move the file away"):
        Tables(tmp_path, {}).add("vision", [line])
    assert (tmp_path / "vision.csv").read_text().count("\n") == 2


def test_a_stopped_command_leaves_whole_cells(small, tmp_path, monkeypatch, capsys):
    measure = cells.measure

    def stop_at_the_second(job):
        if job.kind == "rmm":
            raise KeyboardInterrupt
        return measure(job)

    monkeypatch.setattr(cells, "measure", stop_at_the_second)
    words = ["II", "--seeds", "1", "--episodes", "6", "--out", str(tmp_path)]
    assert tables.main(words) == 130
    assert "stopped; the same command goes on" in capsys.readouterr().err
    assert rows_of(tmp_path, "vision")[-1]["method"] == "DARE, tuned"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_several_processes_find_the_same(tiny, tmp_path):
    """Two real processes; their lines stand in the order of one."""
    groups = [Group("a", "", dict(tiny)), Group("b", "", dict(tiny))]
    for n in (1, 2):
        table = Tables(tmp_path / str(n), {})
        jobs = [
            j
            for j in method_jobs(table, "vision", groups, (1,), {"episodes": 6})
            if j.kind == "rmm"
        ]
        cells.measure_all(jobs, table, n)
    one, two = (rows_of(tmp_path / str(n), "vision") for n in (1, 2))
    for row in (*one, *two):
        del row["seconds"]
    assert [r["group"] for r in one] == ["a", "b"]
    assert one == two


STOP = """
import sys, time
from pathlib import Path
from rmm_lab.evidence import measure as cells
from rmm_lab.evidence.measure import Group, Tables, method_jobs
from rmm_lab.errors import run_command
class Work:
    def run(self):
        table = Tables(Path(sys.argv[1]), {})
        groups = [Group(n, "", {"experts": ("digits", "textures")}) for n in "abcd"]
        jobs = [j for j in method_jobs(table, "vision", groups, (1,), {"episodes": 5000})]
        print("started", flush=True)
        cells.measure_all(jobs, table, 2)
if __name__ == "__main__":
    try:
        Work().run()
    except KeyboardInterrupt:
        print("stopped", flush=True)
"""


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_at_once(tmp_path):
    import signal

    import psutil

    script = tmp_path / "work.py"
    script.write_text(STOP)
    work = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
    )
    assert work.stdout is not None
    assert work.stdout.readline() == "started\n"
    parent, deadline = psutil.Process(work.pid), time.monotonic() + 60
    while len(parent.children()) < 3 and time.monotonic() < deadline:  # one is the tracker's
        time.sleep(0.2)
    time.sleep(2)  # until both are handed their jobs; before that is the next test's matter
    children = parent.children()
    work.send_signal(signal.SIGINT)  # to the first alone, as a tool would
    try:
        assert work.communicate(timeout=30)[0] == "stopped\n"
        assert not psutil.wait_procs(children, timeout=10)[1]
    finally:
        for process in (work, *psutil.wait_procs(children, timeout=0)[1]):
            process.kill()
    assert not (tmp_path / "out").exists()


def test_ctrl_c_while_jobs_are_handed_out_waits_for_none(tmp_path, monkeypatch):
    class Interrupted(cells.ProcessPoolExecutor):
        def submit(self, function, *args):
            if self._pending_work_items:
                raise KeyboardInterrupt
            return super().submit(time.sleep, 60)

    monkeypatch.setattr(cells, "ProcessPoolExecutor", Interrupted)
    jobs = list(
        Command("II", out=tmp_path)._jobs("II", Tables(tmp_path, {}), tables.kit_groups()["II"])
    )
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        cells.measure_all(jobs[:3], Tables(tmp_path, {}), 2)
    assert time.monotonic() - start < 40


# ----------------------------------------------------------------------------------------- the sheets


def cell(group: str, seed: int, method: str, mean: float, **more) -> dict:
    setting = "x=1, best of 7 on the reward split" if ", tuned" in method else ""
    line = {"group": group, "size": "S", "seed": seed, "method": method, "setting": setting}
    return line | {"mean": mean, "by_task": f"p={mean - 1:.2f} q={mean + 1:.2f}"} | more


def search_cell(group: str, seed: int, mean: float, **more) -> dict:
    config = json.dumps({"data_fraction": 0.01})
    return cell(group, seed, "RMM", mean, **({"episodes": 700, "config": config} | more))


@pytest.fixture
def few() -> list[dict]:
    """Two groups, two seeds; RMM gains 8 and 10 points in a, 1 and 1 in b."""
    rows = []
    for group, base in (("a", 60.0), ("b", 80.0)):
        for seed, gain in ((1, 8.0), (2, 10.0)):
            gain = gain if group == "a" else 1.0
            rows += [
                cell(group, seed, "expert p", 40),
                cell(group, seed, "expert q", 45),
                cell(group, seed, "fine-tuned", 99),
                cell(group, seed, "weight average", base - 5),
                cell(group, seed, "TIES, tuned", base),
                cell(group, seed, "DARE, tuned", base - 10 * seed),
                search_cell(group, seed, base + gain),
            ]
    return rows


def line_of(page: str, start: str) -> list[str]:
    (line,) = [x for x in page.splitlines() if x.startswith(f"| {start} |")]
    return [part.strip() for part in line.strip("|").split("|")][1:]


def test_table_i_by_hand(few):
    page = sheets.SHOW["table-I"](few)
    assert line_of(page, "method") == ["a", "b", "Average"]
    assert line_of(page, "fine-tuned") == ["99.0"] * 3  # no ± for what draws nothing
    assert line_of(page, "best expert, for all tasks") == ["45.0"] * 3
    assert line_of(page, "DARE, tuned") == ["45.0 ± 7.1", "65.0 ± 7.1", "55.0 ± 7.1"]
    # RMM: a 68 and 70, b 81 twice; the average 74.5 and 75.5.
    assert line_of(page, "**RMM**") == ["**69.0 ± 1.4**", "**81.0 ± 0.0**", "**75.0 ± 0.7**"]
    # 8 and 10: mean 9, half width 12.706 * sqrt(2) / sqrt(2). The average's gains are 4.5 and 5.5.
    assert line_of(page, "RMM − best uniform merge") == ["+9.0 ± 12.7", "+1.0 ± 0.0", "+5.0 ± 6.4"]
    assert "Mean over 2 seeds" in page
    assert "7 settings of TIES, 7 settings of DARE" in page
    assert "with the weight average 15 evaluations" in page
    assert "700 episodes, each on 1 % of the reward split" in page


def test_table_ii_shows_tasks_and_compares_their_mean_alone(few):
    page = sheets.SHOW["table-II"]([row for row in few if row["group"] == "a"])
    assert line_of(page, "method") == ["p", "q", "Average"]
    assert line_of(page, "**RMM**") == ["**68.0 ± 1.4**", "**70.0 ± 1.4**", "**69.0 ± 1.4**"]
    assert line_of(page, "RMM − best uniform merge") == ["", "", "+9.0 ± 12.7"]


def test_table_ii_is_the_pairs_or_is_not_there(few, tmp_path):
    """Beside other groups it takes the pair's lines alone; without the pair there is no page."""
    pair = [r | {"group": "digits+textures"} for r in few if r["group"] == "a"]
    others = [r for r in few if r["group"] == "b" and r["seed"] == 1]
    alone, both = (sheets.SHOW["table-II"](rows) for rows in (pair, others + pair))
    assert alone == both
    assert "digits+textures" in alone
    assert sheets.SHOW["table-II"](few) == ""
    Tables(tmp_path, {}).add("vision", [{"episodes": 8, "config": "{}"} | r for r in few])
    assert "table-II.md" not in {f.name for f in tables.write_sheets(tmp_path)}


def test_one_seed_has_no_spread(few):
    page = sheets.SHOW["table-III"]([r for r in few if r["seed"] == 1])
    assert line_of(page, "**RMM**") == ["**68.0**", "**81.0**"]
    assert line_of(page, "RMM − best uniform merge") == ["+8.0", "+1.0"]
    assert "Mean over one seed" in page


def dar_cell(preset, fraction, dar, seed, mean, reward="metric") -> dict:
    key = {"preset": preset, "reward": reward, "data_fraction": fraction, "dar": dar, "seed": seed}
    more = {"mean": mean, "by_task": f"p={mean - 2} q={mean + 2}"}
    return key | more | {"seconds": 1000 * fraction, "episodes": 700}


def test_table_iv_by_hand():
    rows = [dar_cell("paper", 1.0, 0.8, s, 70 + s) for s in (1, 2)]
    rows += [dar_cell("paper", 0.1, 0.8, s, 66 + s) for s in (1, 2)]
    rows += [dar_cell("paper", 0.1, 0.0, s, 68) for s in (1, 2)]
    rows += [dar_cell("default", 0.1, 0.0, s, 80) for s in (1, 2)]
    rows += [dar_cell("default", 0.1, 0.0, s, 83, "likelihood") for s in (1, 2)]
    page = sheets.SHOW["table-IV"](rows, paper=tables.read("paper"))
    ours, papers = page.split("## Paper")
    assert "over 2 seeds, 700 episodes" in ours
    assert "| Average | RMM | 71.5 ± 0.7 | 67.5 ± 0.7 |" in ours
    assert "| Average | RMM w/o DAR | 71.5 ± 0.7 | 68.0 ± 0.0 |" in ours  # 100 % stands for both
    assert "| p | RMM, default preset |  | 78.0 ± 0.0 |" in ours
    assert "| p | RMM, default preset, by likelihood |  | 81.0 ± 0.0 |" in ours
    # 67 - 68 and 68 - 68: mean -0.5, half width 12.706 * sqrt(0.5) / sqrt(2).
    assert "| Average | with − without DAR |  | −0.5 ± 6.4 |" in ours
    assert "| seconds | RMM | 1000 | 100 |" in ours
    assert "| times faster | RMM | 1.0 | 10.0 |" in ours
    assert "| Average | RMM w/o DAR | 73.86 | 72.97 | 73.27 |" in papers
    assert "| times faster | RMM | 1.0 | 10.4 | 96.5 |" in papers


def test_searches_by_hand():
    rows = []
    for method, split, test in (
        ("RMM", (70, 72), (66, 64)),
        ("TPE", (71, 71), (60, 60)),
        ("luck", (60, 60), (69, 69)),  # better on the test split, which chooses nothing
    ):
        for seed, a, b in zip((1, 2), split, test, strict=True):
            key = {"group": "g", "seed": seed, "method": method, "episodes": 700}
            rows.append(key | {"reward_split": a, "mean": b, "seconds": 5})
    page = sheets.SHOW["searches"](rows)
    order = [x.split("|")[2].strip() for x in page.splitlines() if x.startswith("| g ")]
    assert order == ["**RMM**", "TPE", "luck"]
    assert "| g | **RMM** | 2 | 71.0 ± 1.4 | 65.0 ± 1.4 |  |  | 5 |" in page
    assert "| g | TPE | 2 | 71.0 ± 0.0 | 60.0 ± 0.0 | +0.0 ± 12.7 | +5.0 ± 12.7 | 5 |" in page
    assert "| g | luck | 2 | 60.0 ± 0.0 | 69.0 ± 0.0 | +11.0 ± 12.7 | −4.0 ± 12.7 | 5 |" in page


def test_the_ablation_by_hand():
    rows = [
        {"group": "g", "setting": s, "seed": seed, "episodes": 9, "reward_split": r, "mean": 50}
        for s, values in (("default preset", (70, 72)), ("x", (69, 69)))
        for seed, r in zip((1, 2), values, strict=True)
    ]
    page = sheets.SHOW["agent"](rows)
    assert "| g | default preset | 71.0 ± 1.4 |  | 50.0 ± 0.0 | 2 |" in page
    assert "| g | x | 69.0 ± 0.0 | −2.0 ± 12.7 | 50.0 ± 0.0 | 2 |" in page


def test_intervals_are_scipys():
    scipy = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for n in range(2, 31):
        values = rng.normal(size=n)
        mean, half = sheets.t_interval(values)
        low, high = scipy.t.interval(0.95, n - 1, values.mean(), scipy.sem(values))
        assert (mean - half, mean + half) == pytest.approx((low, high), abs=1e-3)
    assert sheets.difference({1: 1.0, 2: 2.0}, {2: 5.0, 3: 0.0}) == "−3.0"  # one seed in both


def test_figures_hold_what_the_rows_say(few):
    figure = sheet_figures.DRAW["table-I"](few)
    panels = [axes for part in figure.subfigs for axes in part.axes]
    assert [axes.get_title() for axes in panels] == ["a", "b", "Average"]
    marks = [line.get_xdata()[0] for line in panels[0].lines if line.get_marker() == "D"]
    assert marks == [69.0]
    smallest = min(t.get_fontsize() for t in figure.findobj(lambda a: hasattr(a, "get_fontsize")))
    assert smallest >= 8
    rows = [{"dar": d, "seed": s, "episode": e, "raw_reward": 50 + e - s, "dar_reward": 50 + e * (1 - d)}
            for d, seeds in ((0.8, (1, 2)), (0.0, (2, 3))) for s in seeds for e in range(60)]  # fmt: skip
    rewards = sheet_figures.DRAW["fig-3"](rows)
    assert [axes.get_title(loc="left") for axes in rewards.axes] == ["without DAR", "with DAR"]
    paid = [x for x in rewards.axes[1].lines if x.get_label().startswith("paid")]
    assert paid[0].get_ydata()[59] == pytest.approx(50 + 59 * 0.2)
    own = next(x for x in rewards.axes[0].lines if x.get_label() == "mean of the last 50")
    assert own.get_ydata()[59] == pytest.approx(48 + np.mean(range(10, 60)))  # both have seed 2
    with pytest.raises(InputError, match="expected a seed with DAR and without, found"):
        sheet_figures.DRAW["fig-3"]([r for r in rows if r["seed"] != 2])
    assert colors.same_color(own.get_color(), plots.COLOURS[6])


# ----------------------------------------------------------------------------------- what ships


def test_the_papers_figures_are_whole_and_consistent():
    rows = tables.read("paper")
    by_table = {t: [r for r in rows if r["table"] == t] for t in ("I", "II", "III", "IV")}
    assert [len(v) for v in by_table.values()] == [7 * 5 * 2, 7 * 3, 7 * 4, 6 * 3 + 6]
    values = {(r["table"], r["model"], r["method"], r["column"]): r["value"] for r in rows}
    for (table, model, method, column), value in values.items():
        if table in ("I", "II") and column == "Average":
            sets = [c for t, m, w, c in values if (t, m, w) == (table, model, method)]
            own = [values[table, model, method, c] for c in sets if c != "Average"]
            assert value == pytest.approx(np.mean(own), abs=0.0101), (model, method)
    iv = {(r["column"], r["method"]): r["value"] for r in by_table["IV"]}
    for share in ("100 %", "10 %", "1 %"):
        for method in ("RMM", "RMM w/o DAR"):
            own = [iv[f"{m} at {share}", method] for m in ("CUB", "Dogs")]
            assert iv[f"Average at {share}", method] == pytest.approx(np.mean(own), abs=0.0101)
    assert iv["Average at 10 %", "RMM"] == values["II", "ViT-B/16", "RMM", "Average"]


@pytest.mark.parametrize("name", sheets.SHOW)
def test_the_pages_that_ship_are_written_from_the_files_that_ship(name):
    files = [RESULTS / f"{table}.csv" for table in sheets.FILES[name]]
    if not all(file.is_file() for file in files):
        pytest.skip(f"{name} has not been measured")
    rows = [runs.from_csv(file.read_text("utf-8")) for file in files]
    page = sheets.SHOW[name](*rows, paper=tables.read("paper"))
    assert (RESULTS / f"{name}.md").read_text("utf-8") == page
    assert name not in sheet_figures.DRAW or (RESULTS / f"{name}.png").is_file()


def shipped(name: str) -> list[dict]:
    file = RESULTS / f"{name}.csv"
    rows = runs.from_csv(file.read_text("utf-8")) if file.is_file() else []
    if not rows or "config" not in rows[0]:
        pytest.skip(f"{name}.csv has not been measured with configs")
    return rows


# A uniform merge and a search of each table, measured again.
AGAIN = [
    (name, method)
    for name in ("halves", "vision", "language")
    for method in ("weight average", "TIES, tuned", "RMM")
]


@pytest.mark.parametrize(("name", "method"), AGAIN)
def test_a_cell_that_ships_is_found_again(name, method):
    row = next(r for r in reversed(shipped(name)) if r["method"] == method)
    check_again(row)


@pytest.mark.parametrize("name", ["dar", "agent", "searches"])
def test_a_search_that_ships_is_found_again(name):
    check_again(shipped(name)[-1])


def check_again(row: dict) -> None:
    """The line's path or merge on both splits, from its config alone."""
    problem = load(args_of(row["config"]))
    source = row["setting"].partition(", best")[0]
    steps, stem = [(source, k) for k in range(problem.pool.n_layers)], source
    if row["path"]:
        steps, stem = tables.split_stem(row["path"], problem)
        whole = 100 * tables.whole(problem.scorer(), row["path"])
        assert row["reward_split"] == pytest.approx(whole, abs=0.01)
    again = baselines.path_row(problem, "", "", steps, stem)
    assert row["mean"] == pytest.approx(100 * again.mean, abs=0.01)


def test_read_refuses_what_is_not_there():
    with pytest.raises(InputError, match=r"python -m rmm_lab\.tables"):
        tables.read("none")


def test_uniform_rows_do_not_depend_on_the_seed_but_for_dare(tiny):
    """What a table measures once stands for every seed."""
    one, two = (
        {r.name: r.scores for r in baselines.rows(load_problem(**tiny, seed=s))} for s in (1, 2)
    )
    differ = {name for name in one if one[name] != two[name]}
    assert differ <= {"DARE", "DARE, tuned"}
    assert "DARE" in differ
