"""The rows that a search is compared with: grids, what tuning sees and costs, their order."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from rmm_lab.evidence.rows import BEST_EXPERT, METHODS
from rmm_lab.operators import parse_operator
from rmm_lab.reward import Step, evaluate
from rmm_lab.search import table, uniform
from rmm_lab.search.problem import load_problem
from rmm_lab.search.uniform import GRIDS, METRICS, WEIGHTS


def fake(monkeypatch, n: int, worth) -> tuple[SimpleNamespace, list[str]]:
    """A problem of n experts whose uniform merges score ``worth(setting)``, and what is asked for."""
    asked: list[str] = []

    def score(problem, source, split):
        assert split == "reward"
        asked.append(source)
        return np.full(n, worth(source))

    class NoRace:
        dropped = 0

        def __init__(self, problem):
            pass

        def score(self, path):
            asked.append(path[0].source)
            return worth(path[0].source)

    monkeypatch.setattr(uniform, "uniform", score)
    monkeypatch.setattr(uniform, "Race", NoRace)
    names = tuple(f"e{i}" for i in range(n))
    pool = SimpleNamespace(n_models=n, n_layers=2, names=names, forget=lambda gone: None)
    return SimpleNamespace(pool=pool), asked


def weights_of(setting: str) -> np.ndarray:
    return np.array([float(w) for w in setting.partition("scale=")[2].split("/")])


# ------------------------------------------------------------------------------------------- grids


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("name", GRIDS)
def test_every_setting_is_an_operator_for_n_experts(name, n):
    if n != 2 and name in uniform.OF_TWO:
        pytest.skip("two experts alone")
    for setting in GRIDS[name]:
        assert parse_operator(setting, n).function in setting


def test_a_new_rule_has_a_grid_of_two_to_eight_settings_or_nothing_to_tune():
    first = tuple(GRIDS)[:7]
    assert sum(len(GRIDS[name]) for name in first if "tuned" in name) == 35
    for name in GRIDS.keys() - {*first, WEIGHTS, METRICS, "Model Stock"}:
        assert 2 <= len(GRIDS[name]) <= 8, name
        assert len(set(GRIDS[name])) == len(GRIDS[name])


# ------------------------------------------------------------------------------------------ tuning


def test_the_best_of_a_grid_by_hand(monkeypatch):
    worth = {"ties": 0.5, "dare": 0.7, "weight_average": 0.7}
    problem, asked = fake(monkeypatch, 2, worth.__getitem__)
    assert uniform.tune(problem, tuple(worth)) == ("dare", 0.7, 3, 3, 0)  # the first of equal ones
    assert asked == list(worth)
    setting, reward, *evaluations = uniform.tune(problem, ("ties",))
    assert setting == "ties"
    assert np.isnan(reward)
    assert evaluations == [0, 0, 0]
    assert asked == list(worth)


@pytest.mark.parametrize(("n", "evaluations"), [(2, 25), (3, 27)])
def test_few_experts_have_a_grid_of_weights(monkeypatch, n, evaluations):
    target = np.array([0.75, 0.25, 0.5])[:n]
    problem, asked = fake(
        monkeypatch, n, lambda s: float(np.exp(-((weights_of(s) - target) ** 2).sum()))
    )
    found = uniform.tune_weights(problem)
    assert len(asked) == len(set(asked)) == found.tried == found.evaluations == evaluations
    values = uniform.VALUES[n]
    nearest = [min(values, key=lambda v, t=t: abs(v - t)) for t in target]
    assert weights_of(found.setting).tolist() == nearest


@pytest.mark.parametrize("n", [4, 5, 8, 12, 20])
def test_more_experts_have_at_most_27_evaluations(monkeypatch, n):
    target = np.linspace(0.2, 1.0, n)
    problem, asked = fake(
        monkeypatch, n, lambda s: float(np.exp(-((weights_of(s) - target) ** 2).mean()))
    )
    found = uniform.tune_weights(problem)
    assert len(asked) == len(set(asked)) == found.evaluations <= 27
    common = [weights_of(setting) for setting in asked[:3]]
    assert all(len(set(weights)) == 1 for weights in common)  # one weight for all comes first
    best = min(((weights - target) ** 2).mean() for weights in common)
    assert ((weights_of(found.setting) - target) ** 2).mean() < best
    assert parse_operator(found.setting, n)


def test_a_landscape_without_a_gain_ends_too(monkeypatch):
    problem, _ = fake(monkeypatch, 4, lambda setting: 0.5)
    found = uniform.tune_weights(problem)
    assert weights_of(found.setting).tolist() == [0.3] * 4  # the first
    assert found.evaluations == 27


def test_metrics_are_the_experts_own_and_count_as_evaluations(monkeypatch):
    """e0 has 0.9 everywhere, e1 0: the rule takes no 0."""
    own = {"e0": 0.9, "e1": 0.0}
    problem, asked = fake(monkeypatch, 2, lambda s: own.get(s, 0.1 + 0.1 * ("power=2" in s)))
    found = uniform.tune_metrics(problem)
    assert asked[:2] == ["e0", "e1"]
    assert found.setting == "metrics_weighted_average:metrics=0.9/0.001,power=2"
    assert found.evaluations == found.tried + 2 == len(asked)
    assert found.reward == pytest.approx(0.2)


# -------------------------------------------------------------------------------------------- rows


def test_rows_say_what_they_took(problem):
    """As published, the average, a grid, weights per expert; scores against the plain evaluation."""
    names = ("weight average", "TIES", "task arithmetic, tuned", WEIGHTS)
    rows = {row.name: row for row in uniform.rule_rows(problem, names)}
    assert tuple(rows) == names
    for name, setting in (("weight average", "weight_average"), ("TIES", "ties as published")):
        row = rows[name]
        assert (row.setting, row.sees, row.evaluations) == (setting, "nothing", 0)
        assert np.isnan(row.reward)
        assert row.seconds >= 0
    for name, n in (("task arithmetic, tuned", 7), (WEIGHTS, 25)):
        row = rows[name]
        source, _, told = row.setting.partition(", best of ")
        assert told.startswith(f"{n} on the reward split")
        assert (row.sees, row.evaluations) == ("labels", n)
        path = tuple(Step(source, k) for k in range(-1, 3))
        scores = evaluate(problem.pool, problem.tasks, path, "reward")
        assert row.reward == pytest.approx(scores.mean())
        test = evaluate(problem.pool, problem.tasks, path, "test")
        assert row.scores == pytest.approx(test.tolist())
        assert 0 < row.seconds < 600
    # The grid of weights holds most scales of task arithmetic.
    assert rows[WEIGHTS].reward >= rows["task arithmetic, tuned"].reward - 0.05


def test_models_as_they_are_see_nothing(problem):
    rows = list(uniform.rows(problem, ()))
    assert [row.name for row in rows] == ["base", "expert e1", "expert e2", "fine-tuned"]
    assert {(row.sees, row.evaluations) for row in rows} == {("nothing", 0)}
    assert rows[3].scores == (rows[1].scores[0], rows[2].scores[1])
    assert rows[3].of_experts(rows[3].scores) == 1


@pytest.mark.parametrize("name", ["TIES", "TIES, tuned", WEIGHTS, METRICS, "TSV", "DELLA"])
def test_no_rule_reads_the_test_split_before_it_is_scored(trained, monkeypatch, name):
    """Nor does another test split change what is chosen."""
    read: list[str] = []
    for task in trained.tasks:
        splits = {split: task.split(split) for split in ("train", "reward", "test")}
        labels = (splits["test"].labels + 1) % len(task.classes)
        splits["test"] = dataclasses.replace(splits["test"], labels=labels)

        def split(wanted, splits=splits):
            read.append(wanted)
            return splits[wanted]

        monkeypatch.setattr(task, "split", split)
    [altered] = uniform.rule_rows(trained, [name])
    first = read.index("test")
    assert "reward" not in read[first:]
    assert ("reward" in read[:first]) == (altered.sees == "labels")
    monkeypatch.undo()
    [plain] = uniform.rule_rows(trained, [name])
    assert (plain.setting, plain.reward) == pytest.approx(
        (altered.setting, altered.reward), nan_ok=True
    )
    assert plain.scores != altered.scores


# ------------------------------------------------------------------------------------------- order


@pytest.fixture
def quick(tiny, monkeypatch):
    """The tiny problem with little to tune and few inputs, where only names are looked at."""
    grids = {name: settings[:1] for name, settings in GRIDS.items()}
    monkeypatch.setattr(uniform, "GRIDS", grids)
    return load_problem(**tiny, operators=("ties",), stem="base", calibration=3)


def test_a_table_has_all_rows_in_order(quick):
    names = [row.name for row in table.rows(quick)]
    known = [BEST_EXPERT if name.startswith("expert ") else name for name in names]
    assert known == sorted(known, key=list(METHODS.index).index)
    rules = [name for name in METHODS.index if METHODS[name] in ("uniform", "matched")]
    rules = [name for name in rules if name not in uniform.OF_ADAPTERS]
    assert [name for name in names if name in rules] == rules
    assert names[:4] == ["base", "expert e1", "expert e2", "fine-tuned"]


@pytest.mark.parametrize(
    ("compare", "there", "absent"),
    [
        ("paper", ("TIES, tuned",), (WEIGHTS, "TSV", "RegMean", "DOGE", "Fisher")),
        ("few", (WEIGHTS, "TSV", "RegMean", "least squares, weighted"), ("PCB", "DOGE", "Fisher")),
        (
            "rules",
            (WEIGHTS, "TSV", "PCB", "RegMean", "least squares, weighted"),
            ("DOGE", "Fisher"),
        ),
    ],
)
def test_what_a_search_is_compared_with(quick, compare, there, absent):
    names = [row.name for row in table.compared(quick, compare)]
    assert set(there) <= set(names)
    assert not set(absent) & set(names)


def test_without_calibration_inputs_there_are_no_rows_that_see_them(tiny):
    problem = load_problem(**tiny, calibration=0)
    names = [row.name for row in table.compared(problem, "few")]
    assert "TSV" in names
    assert not {"RegMean", "least squares"} & set(names)
