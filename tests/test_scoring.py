"""Scores against a whole timm model's own predictions, and the cache against no cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rmm_lab import vit
from rmm_lab.errors import InputError
from rmm_lab.scoring import Scorer, deal, evaluate, reward, shortlist


def oracle(problem, path, rows=None, split="reward"):
    """Accuracy of the assembled timm model, example by example."""
    sources = problem.pool.sources
    model = problem.pool.assemble([(sources[a], k) for a, k in path], problem.stem)
    scores = []
    for i, (task, (start, stop)) in enumerate(
        zip(problem.tasks, vit.head_slices(problem.pool.heads).values(), strict=True)
    ):
        data = task.split(split)
        chosen = range(len(data)) if rows is None else rows[i]
        right = 0
        for j in chosen:
            image = (data.images[j : j + 1].float() / 255 - 0.5) / 0.5
            with torch.no_grad():
                logits = model(image)[0, start:stop]
            right += int(logits.argmax()) == int(data.labels[j])
        scores.append(right / len(chosen))
    return scores


PATHS = [
    ((0, 0), (1, 1), (2, 2)),
    ((3, 0), (3, 0), (1, 1), (0, 2)),  # a stack
    ((1, 2),),  # skips
    (),
]


@pytest.mark.parametrize("path", PATHS)
def test_scores_are_those_of_the_whole_timm_model(problem, path):
    scorer = problem.scorer(fraction=1.0)
    assert scorer.score(path).tolist() == pytest.approx(oracle(problem, path))
    steps = [(problem.pool.sources[a], k) for a, k in path]
    test = evaluate(problem.pool, problem.tasks, steps, problem.stem, "test")
    assert test.tolist() == pytest.approx(oracle(problem, path, split="test"))


def test_a_subset_scores_its_own_examples(problem):
    scorer = problem.scorer(fraction=0.25, seed=3)
    path = PATHS[0]
    for subset in range(scorer.n_subsets):
        rows = [deal(36, 4, 3)[subset] for _ in problem.tasks]
        assert scorer.score(path, subset).tolist() == pytest.approx(oracle(problem, path, rows))


def test_the_mean_over_a_window_is_the_score_on_all_data(problem):
    scorer = problem.scorer(fraction=0.25)  # 36 examples in four equal subsets
    path = PATHS[1]
    parts = np.mean([scorer.score(path, s) for s in range(4)], axis=0)
    assert parts == pytest.approx(scorer.score(path, None))


def test_reward_is_the_mean_over_tasks():
    assert reward(np.array([0.25, 0.75, 0.5])) == 0.5  # Eq. 7


@given(st.integers(1, 300), st.integers(1, 120), st.integers(0, 5))
def test_deal_is_a_partition(n, n_subsets, seed):
    parts = deal(n, n_subsets, seed)
    assert len(parts) == n_subsets
    sizes = {len(p) for p in parts}
    if n >= n_subsets:
        assert sorted(np.concatenate(parts).tolist()) == list(range(n))  # each example once
        assert max(sizes) - min(sizes) <= 1
    else:
        assert sizes == {1}  # at least one example, all of them in turn
        assert {int(p[0]) for p in parts} == set(range(n))


def test_deal_depends_on_its_seed_alone():
    assert all(np.array_equal(a, b) for a, b in zip(deal(50, 5, 1), deal(50, 5, 1), strict=True))
    assert not all(
        np.array_equal(a, b) for a, b in zip(deal(50, 5, 1), deal(50, 5, 2), strict=True)
    )


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_the_cache_changes_no_score_and_keeps_its_budget(problem, data):
    """On, off or tiny, over random paths with skips and stacks: the same to the bit."""
    step = st.tuples(st.integers(0, 3), st.integers(0, 2))
    paths = data.draw(
        st.lists(
            st.tuples(st.lists(step, max_size=6).map(tuple), st.sampled_from([None, 0, 1, 2])),
            min_size=1,
            max_size=12,
        )
    )
    budgets = [256.0, 0.0, 0.02]  # MiB; the tiny one holds two or three activations
    scorers = [
        Scorer(
            problem.pool, problem.tasks, fraction=1 / 3, stem=problem.stem, cache_mb=b, batch_size=5
        )
        for b in budgets
    ]
    for path, subset in paths:
        first, *others = (s.score(path, subset) for s in scorers)
        assert all(np.array_equal(first, other) for other in others)
        for scorer, budget in zip(scorers, budgets, strict=True):
            held = sum(t.nbytes for states in scorer._cache.values() for t in states)
            assert held == scorer._cached_bytes <= budget * 2**20
    assert scorers[0].layers_run <= scorers[2].layers_run <= scorers[1].layers_run


def test_a_shared_prefix_is_computed_once(problem):
    scorer = problem.scorer(fraction=1.0)
    scorer.score(((0, 0), (0, 1), (0, 2)))
    assert scorer.layers_run == 6  # three layers for two tasks
    scorer.score(((0, 0), (0, 1), (1, 2)))
    assert scorer.layers_run == 8
    scorer.score(((0, 0), (0, 1), (0, 2)))
    assert (scorer.layers_run, scorer.evaluations) == (8, 3)


def test_a_returned_score_can_be_changed_without_harm(problem):
    scorer = problem.scorer()
    scorer.score((), 0)[:] = 7
    assert scorer.score((), 0).max() <= 1


def test_no_gradient_is_ever_enabled(problem, monkeypatch):
    """Every layer runs in inference mode, also when the caller has gradients on."""
    seen = []
    original = problem.pool.architecture.apply

    def spy(layer, tokens):
        out = original(layer, tokens)
        seen.append((out.requires_grad, torch.is_inference(out), torch.is_grad_enabled()))
        return out

    monkeypatch.setattr(type(problem.pool.architecture), "apply", staticmethod(spy))
    with torch.enable_grad():
        problem.scorer().score(PATHS[0], 0)
        evaluate(problem.pool, problem.tasks, [("e1", 0)], "base", "test")
    assert len(seen) > 6
    assert set(seen) == {(False, True, False)}
    for layer in problem.pool._modules.values():
        assert not any(p.requires_grad for p in layer.parameters())
    for checkpoint in (problem.pool.base, *problem.pool.experts):
        assert not any(t.requires_grad for t in checkpoint.weights.values())


@pytest.mark.parametrize("fraction", [0, -0.1, 1.5, float("nan")])
def test_a_fraction_out_of_range_is_refused(problem, fraction):
    with pytest.raises(InputError, match="data fraction: expected"):
        problem.scorer(fraction=fraction)


def test_one_task_per_expert(problem):
    with pytest.raises(InputError, match="one for each of 2 experts, found 1"):
        Scorer(problem.pool, problem.tasks[:1])


@pytest.mark.parametrize("stem", [0, 1, 2, None])
def test_a_path_may_bring_its_own_stem(problem, stem):
    """Against the whole timm model with the stem of that source, the base's without one."""
    layers = ((0, 0), (3, 1), (1, 2))
    path = layers if stem is None else ((stem, -1), *layers)
    scorer = problem.scorer(stem="agent", fraction=1.0)
    problem.stem = "base" if stem is None else problem.pool.sources[stem]
    assert scorer.score(path).tolist() == pytest.approx(oracle(problem, layers))
    again = problem.scorer(stem="agent", fraction=1.0, cache_mb=0)
    assert np.array_equal(scorer.score(path), again.score(path))


def test_the_shortlist_draws_means_towards_the_mean_of_all():
    scored = [("lucky", 0.9), *[("steady", 0.8)] * 6, *[("poor", 0.1)] * 7]
    # Mean of all 6.4 / 14; two more evaluations with it: lucky (0.9 + 0.914) / 3 = 0.605,
    # steady (4.8 + 0.914) / 8 = 0.714, poor (0.7 + 0.914) / 9 = 0.179.
    assert shortlist(scored, 2) == ["steady", "lucky"]
    assert shortlist(scored, 9) == ["steady", "lucky", "poor"]
    assert shortlist([("b", 0.5), ("a", 0.5)], 2) == ["a", "b"]
    assert shortlist([], 3) == []
