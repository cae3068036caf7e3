"""What a search tells: its result table by hand, notes on the data, its cost."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rmm_lab.search import report, uniform
from rmm_lab.search.uniform import Row

ROWS = [Row("base", "as it is", (0.25, 0.5)), Row("RMM", "9 episodes", (0.875, 0.625))]
TASKS = [SimpleNamespace(name=n, metric="accuracy") for n in "ab"]
SKEWED = SimpleNamespace(name="b", metric="balanced")


def test_the_table_by_hand():
    table = report.frame(ROWS, TASKS)
    assert list(table) == ["method", "a", "b", "mean", "setting"]
    assert table.to_dict("records") == [
        {"method": "base", "a": 25.0, "b": 50.0, "mean": 37.5, "setting": "as it is"},
        {"method": "RMM", "a": 87.5, "b": 62.5, "mean": 75.0, "setting": "9 episodes"},
    ]


def test_a_skewed_task_has_its_accuracy_in_a_column_that_is_no_part_of_the_mean():
    rows = [Row("always no", "-", (0.25, 0.5), {"b": 0.9})]
    [row] = report.frame(rows, [TASKS[0], SKEWED]).to_dict("records")
    assert row == {"method": "always no", "a": 25.0, "b (balanced)": 50.0, "mean": 37.5} | {
        "setting": "-",
        "b (accuracy)": 90.0,
    }
    assert report.title(TASKS) != report.title([TASKS[0], SKEWED])


def test_the_table_for_a_terminal():
    lines = report.plain(ROWS, TASKS).splitlines()
    assert [line.split() for line in lines] == [
        ["method", "a", "b", "mean", "setting"],
        ["base", "25.0", "50.0", "37.5", "as", "it", "is"],
        ["RMM", "87.5", "62.5", "75.0", "9", "episodes"],
    ]
    assert (
        len({line.rindex(word) for line, word in zip(lines, ("setting", "as", "9"), strict=True)})
        == 1
    )


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
