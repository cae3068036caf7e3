"""Anchor points: which examples stand for all, by hand and against the answers of whole models."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy

from rmm_lab.engine.anchors import choose_anchors, known_answers
from rmm_lab.errors import InputError
from rmm_lab.reward import Step, parse_path, predict_all
from rmm_lab.search.config import configure
from rmm_lab.search.phases import make_scorer
from rmm_lab.search.pipeline import train
from rmm_lab.search.problem import load_problem
from rmm_lab.tasks.metrics import mean_of

SEARCH = {"episodes": 40, "finalists": 4, "episodes_per_update": 8, "quiet": True}
KINDS = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])  # of examples, by what two merges answer


def options_of(tiny):
    return {**tiny, "unit": "block", "examples": "anchors", "seed": 3}


def test_each_kind_of_example_is_represented_once_by_its_share():
    answers = KINDS[[0] * 5 + [1] * 3 + [2] * 2]
    rows, weights = choose_anchors(answers, 3)
    assert len(rows) == 3
    assert rows[0] < 5 <= rows[1] < 8 <= rows[2]
    np.testing.assert_allclose(weights, [0.5, 0.3, 0.2])


def test_the_mean_of_anchors_is_that_of_all_where_each_kind_has_one():
    """And of merges that were not among the known ones, but treat examples of a kind alike."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(3, size=50)
    rows, weights = choose_anchors(KINDS[kinds], 3, seed=1)
    other = rng.random(3)[kinds]
    assert (other[rows] * weights).sum() == pytest.approx(other.mean())


def test_merges_count_alike_whatever_their_spread_and_constant_ones_nothing():
    few = KINDS[[0, 0, 1, 1, 2, 2]]
    constant = np.ones((6, 1))
    plain = choose_anchors(few, 3)
    other = choose_anchors(np.hstack([few * [1, 0.001], constant]), 3)
    np.testing.assert_array_equal(plain.rows, other.rows)
    np.testing.assert_allclose(plain.weights, other.weights)


@pytest.mark.parametrize("n", [1, 4, 10, 99])
def test_no_more_anchors_than_unlike_examples(n):
    answers = np.random.default_rng(2).random((10, 3))
    rows, weights = choose_anchors(answers, n)
    assert 1 <= len(rows) <= min(n, 10)
    assert weights.sum() == pytest.approx(1)
    assert list(rows) == sorted(set(rows))
    assert len(choose_anchors(np.ones((10, 3)), n).rows) == 1


def test_known_answers_are_those_of_whole_models(tiny):
    problem = load_problem(**tiny, operators=("ties",), stem="base")
    scorer = problem.scorer(reward="agreement", batch_size=7)
    names = [*problem.pool.names, "ties"]
    paths = [tuple(Step(s, k) for k in range(problem.pool.n_layers)) for s in names]
    found = known_answers(scorer, paths)
    for i, task in enumerate(problem.tasks):
        logits = []
        own = tuple(Step(names[i], k) for k in range(-1, problem.pool.n_layers))
        sizes = [len(t.classes) for t in problem.tasks]
        start = sum(sizes[:i])
        for path, stem in [(own[1:], names[i]), *((p, "base") for p in paths)]:
            with torch.no_grad():
                out = problem.pool.assemble(path, stem)(task.batch("reward", slice(None)))
            logits.append(softmax(out[:, start : start + sizes[i]].double().numpy(), axis=1))
        wanted = [np.clip(1 - entropy(logits[0], q, axis=1) / 6, 0, 1) for q in logits[1:]]
        np.testing.assert_allclose(found[i], np.stack(wanted, -1), atol=1e-5)


def test_episodes_are_scored_by_the_weighted_anchors_and_the_choice_by_all(tiny):
    """Against the answers of whole models."""
    config = configure("weights", **options_of(tiny), **SEARCH, data_fraction=0.25)
    problem = load_problem(**tiny, unit="block", seed=3)
    scorer = make_scorer(problem, config)
    assert scorer.n_subsets == 1
    path = tuple(Step("ties", k) for k in range(problem.pool.n_layers))
    scores, every = scorer.score(path, 0), scorer.score(path)
    found = predict_all(problem.pool, problem.tasks, (Step(scorer.stem, -1), *path), "reward")
    for i, (task, answer) in enumerate(zip(problem.tasks, found, strict=True)):
        right = (answer == task.split("reward").labels).double().numpy()
        rows = scorer.rows(i, 0)
        assert 2 <= len(rows) <= 9  # a quarter of 36
        assert every[i] == pytest.approx(right.mean())
        lowest, highest = right[rows].min(), right[rows].max()
        assert lowest <= scores[i] <= highest
    result = train(config, problem, table=False)
    assert {e["subset"] for e in result.episodes} == {0}
    for row in result.finalists:
        assert row["reward"] == pytest.approx(scorer.score(parse_path(row["path"])).mean())


def test_weights_count_in_a_mean_as_copies_would():
    right = torch.tensor([1.0, 0.0, 0.5, 1.0], dtype=torch.float64)
    labels, copies = torch.tensor([0, 0, 1, 1]), torch.tensor([3, 1, 2, 2])
    for metric in ("accuracy", "balanced"):
        many = mean_of(metric, right.repeat_interleave(copies), labels.repeat_interleave(copies))
        assert mean_of(metric, right, labels, copies / 8) == pytest.approx(many)


@pytest.mark.parametrize("reward", ["metric", "likelihood"])
def test_the_anchors_are_the_labels_to_know(tiny, reward):
    """They are chosen without any label, and no other label is read."""
    few = {"label_fraction": 0.25, "data_fraction": 1.0, "reward": reward}
    config = configure("weights", **options_of(tiny), **SEARCH, **few)
    found = []
    for wrong in (False, True):
        problem = load_problem(**tiny, unit="block", label_fraction=0.25, seed=3)
        if wrong:
            for task, rows in zip(problem.tasks, found[0][0], strict=True):
                labels = task.task.split("reward").labels
                other = (labels + 1) % len(task.classes)
                other[rows] = labels[rows]
                labels.copy_(other)
        result = train(config, problem, table=False)
        known = [task.known.tolist() for task in problem.tasks]
        found.append((known, result.episodes, result.finalists))
    assert found[0] == found[1]
    assert all(2 <= len(rows) <= 9 for rows in found[0][0])
    drawn = load_problem(**tiny, unit="block", label_fraction=0.25, seed=3)
    assert [t.known.tolist() for t in drawn.tasks] != found[0][0]


def test_a_seed_gives_the_same_anchors(tiny):
    problem = load_problem(**tiny, unit="block", seed=3)
    options = options_of(tiny) | SEARCH
    whole = train(configure("weights", **options), copy.deepcopy(problem), table=False)
    again = train(configure("weights", **options), copy.deepcopy(problem), table=False)
    assert whole.episodes == again.episodes
    other = train(configure("weights", **options | {"seed": 4}), problem, table=False)
    assert other.episodes != whole.episodes


def test_tasks_without_answers_to_choose_from_need_all_labels(monkeypatch, tiny):
    problem = load_problem(**tiny, unit="block", label_fraction=0.5, seed=3)
    config = configure("weights", **options_of(tiny), **SEARCH, label_fraction=0.5)
    monkeypatch.setattr(type(problem.tasks[0].task), "offers", False, raising=False)
    with pytest.raises(InputError, match="--examples anchors: expected answers to choose from"):
        make_scorer(problem, config)
