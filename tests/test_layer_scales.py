"""Scales for each place and expert: what path they stand for, and CMA-ES over them."""

from __future__ import annotations

import cmaes
import numpy as np
import pytest
import torch

from rmm_lab.families.checkpoint import read_checkpoint
from rmm_lab.layers import LayerPool
from rmm_lab.reward import Step, evaluate, parse_path, path_text, reward
from rmm_lab.search import layer_scales
from rmm_lab.search.layer_scales import (
    BOUNDS,
    Evolution,
    evolution_of,
    path_of_scales,
    scales_of,
    start_of,
)
from rmm_lab.search.problem import load_problem

OPERATORS = ("weighted_average:share=0.75", "task_arithmetic:scale=0.4", "weight_average", "ties")


@pytest.fixture
def problem(tiny):
    return load_problem(**tiny, operators=OPERATORS, stem="agent")


# ------------------------------------------------------------------------------- paths and scales


def test_scales_as_a_path_by_hand():
    scales = np.array([1, 0, -0.00004, 0.12345, *[0.5] * 6])
    path = path_of_scales(scales, range(-1, 4))
    assert path[:2] == (
        Step("task_arithmetic", -1, (1.0, 0.0)),
        Step("task_arithmetic", 0, (0.0, 0.123)),
    )
    assert path_of_scales(scales.reshape(5, 2), range(-1, 4)) == path
    text = path_text(path)
    assert text.startswith("task_arithmetic:scale=1/0@-1 task_arithmetic:scale=0/0.123@0 ")
    assert parse_path(text) == path


def test_sources_that_lie_between_the_experts_are_found_exactly(problem):
    pool = problem.pool
    wanted = {"e1": [1, 0], "e2": [0, 1], "base": [0, 0]}
    wanted |= dict(zip(OPERATORS, ([0.75, 0.25], [0.4, 0.4], [0.5, 0.5]), strict=False))
    for k in (-1, 0, 2):
        for source, expected in wanted.items():
            found = scales_of(pool, (Step(source, k),))
            assert found.shape == (1, 2)
            np.testing.assert_allclose(found[0], expected, atol=2e-6)
    path = parse_path("task_arithmetic:scale=0.3/-0.1@-1 e2@0 weight_average@1 e1@2")
    np.testing.assert_allclose(
        scales_of(pool, path), [[0.3, -0.1], [0, 1], [0.5, 0.5], [1, 0]], atol=2e-6
    )


def test_an_operator_that_trims_gets_the_nearest_scales(problem):
    """Least squares over the whole layer, against NumPy's."""
    pool = problem.pool

    def flat(source):
        return torch.cat([t.flatten() for t in pool.weights(source, 1).values()]).double()

    base, e1, e2, ties = (flat(s).numpy() for s in ("base", "e1", "e2", "ties"))
    expected = np.linalg.lstsq(np.stack([e1 - base, e2 - base], 1), ties - base, rcond=None)[0]
    assert 0.1 < np.abs(expected).max() < 2
    np.testing.assert_allclose(scales_of(pool, (Step("ties", 1),))[0], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("same", "expected"), [("each other", [0.5, 0.5]), ("the base", [0.0, 0.0])]
)
def test_experts_that_do_not_differ_in_a_layer_share_it(tiny, same, expected):
    base, e1, e2 = map(read_checkpoint, (tiny["base"], *tiny["experts"]))
    other = e1 if same == "each other" else base
    for name in e2.weights:
        if name.startswith("blocks.1."):
            e2.weights[name] = other.weights[name]
            if same == "the base":
                e1.weights[name] = base.weights[name]
    pool = LayerPool(base, [e1, e2], ["e1", "e2"], ["weight_average"])
    np.testing.assert_allclose(scales_of(pool, (Step("e1", 1),))[0], expected, atol=1e-6)
    np.testing.assert_allclose(scales_of(pool, (Step("e2", 0),))[0], [0, 1], atol=2e-6)


@pytest.mark.parametrize("workers", [1, 2])
def test_paths_of_scales_score_as_their_models(problem, workers):
    """Several at once and one after another, with layers that are forgotten in between."""
    rng = np.random.default_rng(1)
    paths = [path_of_scales(x, range(-1, 3)) for x in rng.random((9, 8))]
    scorer = problem.scorer(fraction=1.0, workers=workers)
    scorer.prefetch([(path, None) for path in paths[:6]])
    found = [reward(scorer.score(path)) for path in paths]
    scorer.close()
    expected = [evaluate(problem.pool, problem.tasks, p, "reward").mean() for p in paths]
    assert found == pytest.approx(expected, abs=1e-12)
    assert len(set(found)) > 1


# ------------------------------------------------------------------------------------------ CMA-ES


def bowl(x: np.ndarray) -> float:
    target = np.linspace(-0.1, 1.2, len(x))
    return -float((np.geomspace(1, 100, len(x)) * (x - target) ** 2).sum())


def evolve(evolution: Evolution, n: int, value=bowl) -> Evolution:
    while n > 0:
        asked = evolution.ask(n)
        evolution.tell(asked, [value(x) for x in asked])
        n -= len(asked)
    return evolution


def test_the_separable_form_learns_faster_where_numbers_are_many():
    full, separable = (
        evolve(Evolution(np.full(30, 0.5), BOUNDS, 1, separable=s), 1500) for s in (False, True)
    )
    assert bowl(separable.mean) > 3 * bowl(full.mean)  # both negative
    assert bowl(separable.mean) > -0.2
    assert bowl(np.full(30, 0.5)) < -50


def test_draws_stay_within_the_bounds_and_follow_the_seed():
    first, again, other = (
        np.stack(Evolution(np.full(6, 1.4), BOUNDS, s).ask(99)) for s in (1, 1, 2)
    )
    assert first.shape == (9, 6)  # 4 + int(3 ln 6)
    assert (first == again).all()
    assert not (first == other).any()
    assert first.min() >= BOUNDS[0]
    assert first.max() <= BOUNDS[1]
    assert 0.1 < np.stack(Evolution(np.zeros(200), None, 1).ask(99)).std() < 0.3


def test_an_evolution_is_played_again_from_what_was_told():
    whole = Evolution(np.zeros(5), BOUNDS, 3, separable=True)
    told = []
    for _ in range(8):
        asked = whole.ask(99)
        told.append([bowl(x) for x in asked])
        whole.tell(asked, told[-1])
    again = Evolution(np.zeros(5), BOUNDS, 3, separable=True)
    for values in told:
        again.tell(again.ask(99), values)
    assert (again.mean == whole.mean).all()
    assert (np.stack(again.ask(99)) == np.stack(whole.ask(99))).all()


def test_a_part_of_a_generation_teaches_nothing():
    evolution = Evolution(np.zeros(4), BOUNDS, 1)
    asked = evolution.ask(3)
    evolution.tell(asked, [1.0, 2.0, 3.0])
    assert len(asked) == 3
    assert (evolution.mean == 0).all()
    assert (evolution.latest == 0).all()
    assert evolution.answers(5) == []


def test_answers_are_the_mean_of_the_last_means_then_these():
    evolution = evolve(Evolution(np.full(4, 0.5), BOUNDS, 1), 8 * 15)
    [means] = evolution.runs
    assert len(means) == 15
    first, *rest = evolution.answers(4)
    np.testing.assert_allclose(first, np.mean(means[-layer_scales.MEANS :], 0))
    assert len(rest) == 3
    for found, mean in zip(rest, means[:-4:-1], strict=True):
        assert (found == mean).all()
    assert (rest[0] == evolution.mean).all()
    assert len(evolution.answers(99)) == 16


def test_answers_of_two_runs_by_hand():
    evolution = Evolution(np.zeros(1), BOUNDS, 1)
    evolution.runs = [[np.array([1.0]), np.array([2.0])], [np.array([5.0]), np.array([7.0])], []]
    assert np.concatenate(evolution.answers(9)).tolist() == [6, 1.5, 7, 5, 2, 1]
    assert np.concatenate(evolution.answers(2)).tolist() == [6, 1.5]
    assert evolution.latest.tolist() == [7]


def row(path, value, phase="uniform", penalised=0):
    return {"path": path, "raw_reward": value, "phase": phase, "penalised": penalised}


def test_the_start_is_the_best_path_with_one_source_at_each_place(problem):
    scorer = problem.scorer(fraction=0.5)
    whole = "e1@-1 e2@0 ties@1 e2@2"
    rows = [row(whole, 0.5), row("e1@-1 e1@0 e1@1 e1@2", 0.4, "agent")]
    rows.append(row("e1@-1 e2@0 ties@1 ties@1 e2@2", 0.9))  # a stack
    rows.append(row("e1@0 e2@1 ties@2", 0.9))  # no stem
    rows.append(row("e1@-1 e1@0 e1@1 e2@2", 0.9, penalised=1))
    assert path_text(start_of(scorer, rows)) == whole
    assert start_of(scorer, rows[2:]) == tuple(Step("e1", k) for k in range(-1, 3))


def test_the_evolution_of_a_search_is_separable_and_starts_at_its_best_path(problem):
    scorer = problem.scorer(fraction=0.5)
    rows = [
        row(" ".join(f"{source}@{k}" for k in range(-1, 3)), value)
        for source, value in zip(scorer.sources, (0.4, 0.3, 0.9, 0.8, 0.5, 0.4, 0.2), strict=True)
    ]
    found = evolution_of(scorer, rows, 1)
    np.testing.assert_allclose(found.mean, [0.75, 0.25] * 4, atol=2e-6)  # of the third source
    expected = Evolution(found.mean, BOUNDS, 1, separable=True)
    for _ in range(3):  # its scores are in the rows of the phase
        asked = expected.ask(99)
        values = [bowl(x) for x in asked]
        expected.tell(asked, values)
        rows += [row("task_arithmetic:scale=0.5/0.5@0", value, "scales") for value in values]
    again = evolution_of(scorer, rows, 1)
    assert (again.mean == expected.mean).all()
    assert (np.stack(again.ask(99)) == np.stack(expected.ask(99))).all()


def test_where_it_has_contracted_it_begins_again_with_twice_the_population(monkeypatch):
    begun = []

    class Counted(cmaes.SepCMA):
        def __init__(self, **options):
            super().__init__(**options)
            begun.append((self.population_size, options["seed"], options["mean"].tolist()))

    monkeypatch.setattr(cmaes, "SepCMA", Counted)
    evolve(Evolution(np.full(2, 0.5), BOUNDS, 1, separable=True), 2000, lambda x: 0.5)
    assert len(begun) > 1
    assert [n for n, _, _ in begun] == [6 * 2**i for i in range(len(begun))]  # 4 + int(3 ln 2)
    assert len({seed for _, seed, _ in begun}) == len(begun)
    assert all(mean == [0.5, 0.5] for *_, mean in begun)
