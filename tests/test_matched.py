"""Rows of merges that look at inputs, and the search for the weights of the tasks."""

from __future__ import annotations

import math
from contextlib import closing

import numpy as np
import pytest

from rmm_lab.engine.calibration import Calibration
from rmm_lab.engine.scorer import Scorer
from rmm_lab.errors import InputError
from rmm_lab.operators import parse_operator
from rmm_lab.reward import Step, evaluate
from rmm_lab.search import matched, rivals, uniform
from rmm_lab.search.config import configure
from rmm_lab.search.matched import rows, source_of, tune_weights, weigh
from rmm_lab.search.phases import make_scorer
from rmm_lab.search.pipeline import train
from rmm_lab.search.problem import load_problem, problem_of

pytestmark = pytest.mark.slow  # models are fitted: half a minute in all


class Score:
    """Scores whose mean is concave in the logarithms of the weights, with its one optimum at ``best``."""

    def __init__(self, best):
        self.best, self.calls = np.log(best) - np.mean(np.log(best)), []

    def off(self, weights):
        logs = np.log(weights)
        return logs - logs.mean() - self.best

    def __call__(self, weights):
        assert sum(weights) == pytest.approx(len(weights), rel=1e-3)
        self.calls.append(weights)
        return 0.9 - 0.1 * self.off(weights) ** 2


def best_of(tried):
    return max(tried, key=lambda weights: tried[weights].mean())


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("seed", range(8))
def test_weights_come_near_the_best_ones_within_20_merges(n, seed):
    """The last factor is the square root of 2: a grid of half its logarithm, where calls are enough."""
    best = np.exp(np.random.default_rng(seed).uniform(-1.5, 1.5, n))
    score = Score(best)
    tried = tune_weights(score, np.full(n, 0.9), 20)
    assert list(tried) == score.calls  # each once, in order
    assert len(score.calls) <= 20
    assert score.calls[0] == (1.0,) * n
    off = np.abs(score.off(best_of(tried))).max()
    assert off < (math.log(2) / 4 if n < 4 else math.log(2) / 2)


@pytest.mark.parametrize("most", [1, 2, 3, 7, 20])
def test_no_more_merges_than_allowed(most):
    for best in ((1, 1), (1, 30), (1, 2, 50), (5, 1, 1, 40)):
        score = Score(np.array(best, float))
        tune_weights(score, np.ones(len(best)), most)
        assert len(score.calls) <= most


@pytest.mark.parametrize("n", [2, 3, 4])
def test_a_task_far_behind_its_target_gets_more_weight_first(n):
    """Each task's score rises with its share, the last one's target is far away."""

    def score(weights):
        shares = np.array(weights) / sum(weights)
        return np.array([*(0.9 + 0.02 * shares[:-1]), 0.3 + 0.6 * np.sqrt(shares[-1])])

    tried = tune_weights(score, np.full(n, 0.95), 20)
    second, best = list(tried)[1], best_of(tried)
    assert second[-1] > 1 > second[0]
    assert best[-1] > 2 * best[0]
    assert tried[best].mean() > tried[(1.0,) * n].mean()


def test_nothing_better_leaves_the_weights_equal():
    tried = tune_weights(lambda weights: np.array([0.5, 0.5]), np.ones(2), 20)
    assert best_of(tried) == (1.0, 1.0)


def test_weights_that_always_help_stay_above_0():
    """However far they go, an operator takes them."""

    def score(weights):
        return np.array([math.log(weights[0] / weights[1]), 0.0])

    tried = tune_weights(score, np.ones(2), 20)
    assert len(tried) > 10
    for weights in tried:
        assert min(weights) > 0
        parse_operator(source_of(weights), 2)


def test_a_source_names_the_weights():
    assert source_of((1.0, 1.0, 1.0)) == "least_squares"
    assert source_of((0.5, 1.5)) == "least_squares:weights=0.5/1.5"
    assert source_of((1.23456, 0.76544)) == "least_squares:weights=1.23/0.765"


@pytest.fixture
def looking(tiny):
    return load_problem(**tiny, operators=("ties",), calibration=9, stem="base")


def test_the_rows_are_those_of_whole_models(looking):
    found = list(rows(looking))
    assert [row.name for row in found] == [*matched.MATCHED, "least squares, weighted"]
    sources = [*matched.MATCHED.values(), found[-1].setting.partition(", at most 9")[0]]
    for row, source in zip(found, sources, strict=True):
        path = tuple(Step(source, k) for k in range(-1, 3))
        scores = evaluate(looking.pool, looking.tasks, path, "test")
        assert row.scores == pytest.approx(tuple(scores))
        assert row.seconds > 0
    for row in found[:-1]:
        assert (row.sees, row.evaluations) == ("inputs", 0)
        assert math.isnan(row.reward)
    tuned = found[-1]
    assert tuned.sees == "labels"
    assert 3 < tuned.evaluations <= matched.MERGES + 2 + 1  # as below
    path = tuple(Step(sources[-1], k) for k in range(-1, 3))
    scores = evaluate(looking.pool, looking.tasks, path, "reward")
    assert tuned.reward == pytest.approx(scores.mean())
    assert tuned.reward >= uniform.uniform(looking, "least_squares", "reward").mean()


def test_weights_are_tuned_on_the_reward_split_alone(looking):
    for task in looking.tasks:
        seen = task.split

        def split(name, seen=seen):
            assert name != "test"
            return seen(name)

        task.split = split
    weights, reward, n = weigh(looking, 4)
    assert len(weights) == 2
    assert n == 4 + 2 + 1  # the two experts, and the best with all inputs
    assert 0 <= reward <= 1


def test_rows_need_inputs(tiny):
    problem = load_problem(**tiny, operators=("ties",), calibration=0)
    with pytest.raises(InputError, match="expected calibration inputs, found none"):
        list(rows(problem))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("search", ["default", "CMA-ES over scales"])
def test_a_search_scores_what_it_has_before_it_fits_more(tiny, monkeypatch, search, workers):
    """A user who waits has the experts' scores first, then the first fit's, before the next is begun."""
    menu = ("least_squares:fit=whole", "least_squares:fit=whole,ridge=0.1")
    options = {"operators": menu, "calibration": 9, "episodes": 8, "workers": workers}
    config = configure(**tiny, **options, quiet=True)
    problem, seen = problem_of(config.problem), []
    merge, score = Calibration.merge, Scorer.score

    def merged(self, pool, operator, step, prefix):
        seen.append(operator.name)
        return merge(self, pool, operator, step, prefix)

    def scored(self, path, subset=None):
        found = score(self, path, subset)
        seen.append("score")
        return found

    monkeypatch.setattr(Calibration, "merge", merged)
    monkeypatch.setattr(Scorer, "score", scored)
    if search == "default":
        train(config, problem, table=False)
    else:
        with closing(make_scorer(problem, config)) as scorer:
            rivals.SEARCHES[search](scorer, 8, 1)
    first, second = map(seen.index, menu)
    assert seen[:first] == ["score"] * 2
    assert first < seen.index("score", first) < second
