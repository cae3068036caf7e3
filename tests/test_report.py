"""What a search tells: its result table by hand, notes on the data, its cost."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rmm_lab.figures.results import cross_task_picture
from rmm_lab.search import report, uniform
from rmm_lab.search.uniform import Row

ROWS = [
    Row("base", "as it is", (0.25, 0.5)),
    Row("fine-tuned", "at home", (1.0, 0.625)),
    Row("RMM (agent)", "9 episodes", (0.875, 0.625), {}, "labels", 9, 2.25, 0.8),
]
TASKS = [SimpleNamespace(name=n, metric="accuracy", chance=lambda split: 0.25) for n in "ab"]
SKEWED = SimpleNamespace(name="b", metric="balanced")
TOOK = ["% of experts", "sees", "evaluations", "seconds"]


def test_the_table_by_hand():
    table = report.frame(ROWS, TASKS)
    assert list(table) == ["method", "a", "b", "mean", *TOOK, "setting"]
    base, home, rmm = table.values.tolist()
    # Shares of the experts' 100 and 62.5: 25 and 80 %; 87.5 and 100 %.
    assert base[:7] == ["base", 25.0, 50.0, 37.5, 52.5, "nothing", 0]
    assert np.isnan(base[7])
    assert home[4] == 100.0
    assert rmm == ["RMM (agent)", 87.5, 62.5, 75.0, 93.75, "labels", 9, 2.25, "9 episodes"]


def test_table_json_has_what_each_row_took():
    """What was not measured is null, which any reader of JSON takes."""
    base, _, rmm = json.loads(report.to_json(ROWS, TASKS))
    assert rmm == {"name": "RMM (agent)", "setting": "9 episodes", "mean": 0.75} | {
        "scores": {"a": 0.875, "b": 0.625},
        **{"of_experts": 0.9375, "sees": "labels", "evaluations": 9},
        **{"seconds": 2.25, "reward": 0.8},
    }
    assert (base["seconds"], base["reward"]) == (None, None)
    assert (base["of_experts"], base["sees"], base["evaluations"]) == (0.525, "nothing", 0)
    assert json.loads(report.to_json(ROWS[:1], TASKS))[0]["of_experts"] is None  # of none known


def test_a_share_of_an_expert_that_knows_nothing_is_unknown():
    assert np.isnan(Row("agent + CMA-ES", "", (0.5, 0.5)).of_experts((0.0, 1.0)))


def test_a_skewed_task_has_its_accuracy_in_a_column_that_is_no_part_of_the_mean():
    rows = [Row("always no", "-", (0.25, 0.5), {"b": 0.9})]
    [row] = report.frame(rows, [TASKS[0], SKEWED]).to_dict("records")
    shown = {"method": "always no", "a": 25.0, "b (balanced)": 50.0, "mean": 37.5}
    assert {key: row[key] for key in shown} == shown
    assert list(row)[-2:] == ["setting", "b (accuracy)"]
    assert row["b (accuracy)"] == 90.0
    assert report.title(TASKS) != report.title([TASKS[0], SKEWED])


def test_the_table_for_a_terminal():
    empty, title, *lines = report.plain(ROWS, TASKS).splitlines()
    assert (empty, title) == ("", report.title(TASKS))
    assert [line.split() for line in lines] == [
        ["method", "a", "b", "mean", "%", "of", "experts", *TOOK[1:], "setting"],
        ["base", "25.0", "50.0", "37.5", "52.5", "nothing", "0", "as", "it", "is"],
        ["fine-tuned", "100.0", "62.5", "81.2", "100.0", "nothing", "0", "at", "home"],
        ["RMM", "(agent)", "87.5", "62.5", "75.0", "93.8", "labels", "9", "2.2", "9", "episodes"],
    ]
    words = ("setting", "as", "at", "9 e")
    assert len({line.rindex(word) for line, word in zip(lines, words, strict=True)}) == 1


def compared(rmm: float, expert: float) -> list[str]:
    rows = [Row("expert a", "", (expert, expert)), Row("agent + CMA-ES", "", (rmm, rmm))]
    return report.remarks(rows, TASKS)


def test_a_remark_says_where_a_search_found_hardly_more_than_an_expert():
    [within] = compared(0.65, 0.63)  # exactly 2 points
    for words in ("65.0 % of agent + CMA-ES", "within 2 points", "63.0 %", "expert a"):
        assert words in within
    assert within in report.plain(
        [Row("expert a", "", (0.63, 0.63)), Row("agent + CMA-ES", "", (0.65, 0.65))], TASKS
    )
    assert compared(0.6501, 0.63) == []
    assert "within" in compared(0.61, 0.63)[0]
    [below] = compared(0.5, 0.63)
    assert "below" in below
    assert report.remarks([Row("TIES", "", (0.65, 0.65)), *ROWS], TASKS) == []  # no expert
    assert report.remarks([Row("expert a", "", (0.63, 0.63))], TASKS) == []  # no search


def test_a_remark_names_an_expert_near_chance_on_its_own_task():
    """Chance is 25 %: 5 % of the way to 100 % is 28.75 %."""
    for score, near in ((0.2875, True), (0.28751, False), (0.1, True)):
        rows = [Row("expert x", "", (0.99, 0.3)), Row("expert y", "", (0.2, score))]
        found = report.remarks([*rows, Row("fine-tuned", "", (0.99, score))], TASKS)
        assert len(found) == near
        for words in ("expert y", "task b", "chance is 25.0 %") if near else ():
            assert words in found[0]


def test_chance_is_one_in_as_many_as_there_are_classes(problem):
    assert [task.chance("test") for task in problem.tasks] == [1 / 3, 1 / 3]


def test_the_cross_task_matrix_is_in_percent():
    scores = {"e1": (0.991, 0.25), "e2": (0.5, 1.0)}
    axes = cross_task_picture(scores, ["a", "b"]).axes[0]
    shown = {text.get_position(): text.get_text() for text in axes.texts}
    assert shown == {(0, 0): "99.1", (1, 0): "25.0", (0, 1): "50.0", (1, 1): "100.0"}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["e1", "e2"]
    frames = {patch.get_xy() for patch in axes.patches}
    assert len(frames) == 2  # each expert at home


def test_a_row_keeps_the_accuracy_of_a_skewed_task_beside_its_metric():
    """Four of five rows are 0: always 0 has an accuracy of 0.8, and a balanced one of 0.5."""
    labels = torch.tensor([0, 0, 0, 0, 1])
    task = SimpleNamespace(
        name="b",
        metric="balanced",
        split=lambda name: SimpleNamespace(labels=labels),
        score=lambda found, labels: 0.5,
    )
    row = uniform.row(SimpleNamespace(tasks=[task]), "always", "-", [torch.zeros(5)])
    assert row.scores == (0.5,)
    assert row.plain == {"b": pytest.approx(0.8)}


def test_notes_tell_of_inputs_that_were_cut_and_of_skewed_tasks():
    class Split(list):
        cut = 0

    long = Split("abc")
    long.cut = 2
    task = SimpleNamespace(
        name="qa",
        metric="balanced",
        split={"reward": Split("ab"), "test": long}.__getitem__,
        format=SimpleNamespace(max_length=64),
        loses="end",
    )
    cut, skewed = report.notes([task], ("reward", "test"))
    for words in ("qa", "2 of 3", "test split", "64 tokens"):
        assert words in cut
    assert "balanced" in skewed
    assert report.notes([task], ("reward",)) == [skewed]
    task.metric = "accuracy"
    assert report.notes([task], ("reward",)) == []


def test_the_cost_of_a_search_in_a_line():
    cache = SimpleNamespace(peak=3 * 2**20, budget=8 * 2**20, evicted=5)
    scorer = SimpleNamespace(evaluations=71, work_asked=900, work_run=400, cache=cache)
    assert report.cost(scorer) == (
        "scored 71 paths: 2.25 times as many layers asked for as computed, 3 of at most 8 MiB of "
        "activations kept, 5 forgotten"
    )
    cache.peak = 0  # all that was kept is with the workers of a cluster
    assert report.cost(scorer) == (
        "scored 71 paths: 2.25 times as many layers asked for as computed"
    )
