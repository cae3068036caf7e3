"""Races: who cannot win is dropped, who wins is scored whole, on answers that are made by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rmm_lab.reward import Step, evaluate
from rmm_lab.search import race, uniform
from rmm_lab.search.race import Race


class Known:
    """Tasks of n examples each; ``right``: which of them a model has right, by its name."""

    device = "cpu"

    def __init__(self, monkeypatch, sizes, right, metric="accuracy"):
        self.tasks = [
            SimpleNamespace(metric=metric, split=self._split(n), score=self._score) for n in sizes
        ]
        self.pool, self.right, self.asked = None, right, 0
        monkeypatch.setattr(race, "predict_all", self._predict)

    @staticmethod
    def _split(n):
        return lambda name: {"reward": Labels(torch.ones(n, dtype=torch.int64))}[name]

    @staticmethod
    def _score(found, labels):
        return float((found == labels).double().mean())

    def _predict(self, pool, tasks, path, split, device, rows):
        assert split == "reward"
        self.asked += sum(map(len, rows))
        own = self.right[path[0].source]
        return [torch.from_numpy(own[i][r].astype(np.int64)) for i, r in enumerate(rows)]


class Labels:
    """A split: labels and a length."""

    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)


def path(name):
    return (Step(name, -1),)


def share(n, right, seed=0):
    """n answers of which so many are right, in random order."""
    return np.random.default_rng(seed).permutation(np.arange(n) < round(right * n))


def test_who_is_far_behind_is_dropped_at_the_first_look(monkeypatch):
    """By hand: of 1,600 and 3,200 examples a sixteenth, 100 and 200, after the best had all of them."""
    sizes = (1600, 3200)
    right = {name: [share(n, r) for n in sizes] for name, r in {"good": 0.9, "bad": 0.3}.items()}
    known = Known(monkeypatch, sizes, right)
    own = Race(known)
    assert own.score(path("good")) == pytest.approx(0.9)
    assert known.asked == 4800
    assert own.score(path("bad")) < 0.9
    assert known.asked == 4800 + 300
    assert own.dropped == 1


def test_few_examples_are_seen_64_at_a_time_and_one_alone_decides_nothing(monkeypatch):
    """A sixteenth of 200 would be 12; and all of 3 examples are seen, whatever they say."""
    for n, seen in ((200, 64), (3, 3)):
        known = Known(monkeypatch, (n,), {"all": [np.ones(n)], "none": [np.zeros(n)]})
        own = Race(known)
        own.score(path("all"))
        known.asked = 0
        own.score(path("none"))
        assert known.asked == seen


def test_the_error_is_that_of_a_sample_without_replacement(monkeypatch):
    """Half of 256 seen, 128; 16 gaps of -1: mean -1/8, variance 7/64, error sqrt(7/64/128 * (1 - 1/2))."""
    monkeypatch.setattr(race, "SHARE", 0.5)
    order = np.random.default_rng((0, 0)).permutation(256)
    worse = np.ones(256)
    worse[order[:128][:16]] = 0
    error = (7 / 64 / 128 / 2) ** 0.5
    for sure, dropped in ((0.125 / error * 1.001, 0), (0.125 / error * 0.999, 1)):
        monkeypatch.setattr(race, "SURE", sure)
        own = Race(Known(monkeypatch, (256,), {"best": [np.ones(256)], "worse": [worse]}))
        own.score(path("best"))
        found = own.score(path("worse"))
        assert own.dropped == dropped
        assert found == pytest.approx(1 - 16 / (128 if dropped else 256))


def test_a_metric_of_another_kind_is_scored_whole(monkeypatch):
    right = {name: [share(1600, r)] for name, r in {"good": 0.9, "bad": 0.1}.items()}
    known = Known(monkeypatch, (1600,), right, metric="balanced")
    own = Race(known)
    own.score(path("good"))
    assert own.score(path("bad")) == pytest.approx(0.1)
    assert (known.asked, own.dropped) == (3200, 0)


@pytest.mark.parametrize("seed", range(20))
def test_the_best_of_many_wins_with_its_own_score(monkeypatch, seed):
    """Models of all strengths in random order; the estimates of those that are dropped are never ahead."""
    rng = np.random.default_rng(seed)
    sizes = (600, 1200)
    easy = [rng.random(n) for n in sizes]  # the same examples are hard for all
    right = {
        f"m{i}": [(e + 0.1 * rng.standard_normal(n) < s) for e, n in zip(easy, sizes, strict=True)]
        for i, s in enumerate(rng.uniform(0.3, 0.9, 15))
    }
    known = Known(monkeypatch, sizes, right)
    own = Race(known)
    scores = {name: own.score(path(name)) for name in right}
    truth = {name: np.mean([r.mean() for r in own]) for name, own in right.items()}
    best = max(truth, key=truth.__getitem__)
    assert max(scores, key=scores.__getitem__) == best
    assert scores[best] == pytest.approx(truth[best])
    assert own.dropped > 0
    assert known.asked < 15 * 1800


def test_a_real_models_score_is_the_plain_evaluations(problem):
    for name in ("weight_average", *problem.pool.names):
        steps = uniform.uniform_path(problem, name)
        scores = evaluate(problem.pool, problem.tasks, steps, "reward")
        assert Race(problem).score(steps) == pytest.approx(scores.mean())
