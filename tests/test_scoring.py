"""Scores against a whole timm model's own predictions, and the cache against no cache."""

from __future__ import annotations

import copy
import itertools
import pickle
import threading
from collections import Counter

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import TINY
from gymnasium.utils.env_checker import check_env
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rmm_lab.env  # noqa: F401 - registers the environment
from rmm_lab import operators
from rmm_lab.engine.block_view import BlockView
from rmm_lab.engine.cache import Cache
from rmm_lab.engine.prefetch import RecordingScorer
from rmm_lab.engine.scorer import Job, Scorer, batch_size, parts_of
from rmm_lab.errors import InputError
from rmm_lab.families import vit, vit_run
from rmm_lab.layers import LayerPool
from rmm_lab.reward import Step, evaluate, partition, predict, reward
from rmm_lab.search.problem import load_problem

SOURCES = ("e1", "e2", "task_arithmetic:scale=0.5", "ties")  # of the tiny problem


def path_of(*steps) -> tuple[Step, ...]:
    """A path of (number in SOURCES, layer)."""
    return tuple(Step(SOURCES[a], k) for a, k in steps)


def oracle(problem, path, rows=None, split="reward"):
    """Accuracy of the assembled timm model, example by example."""
    model = problem.pool.assemble(path, problem.stem)
    scores = []
    for i, (task, (start, stop)) in enumerate(
        zip(problem.tasks, vit_run.head_slices(problem.pool.heads).values(), strict=True)
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
    path_of((0, 0), (1, 1), (2, 2)),
    path_of((3, 0), (3, 0), (1, 1), (0, 2)),  # a stack
    path_of((1, 2)),  # skips
    (),
]


@pytest.mark.parametrize("path", PATHS)
def test_scores_are_those_of_the_whole_timm_model(problem, path):
    """The fast way and the plain one."""
    scorer = problem.scorer(fraction=1.0)
    assert scorer.score(path).tolist() == pytest.approx(oracle(problem, path))
    test = evaluate(problem.pool, problem.tasks, (Step(problem.stem, -1), *path), "test")
    assert test.tolist() == pytest.approx(oracle(problem, path, split="test"))


OWN_STEM = path_of((3, -1), (0, 0), (2, 2))
SCALES = (Step("base", -1), Step("task_arithmetic", 1, (0.3, 0.8)))


@pytest.mark.parametrize("path", [*PATHS, OWN_STEM, SCALES])
def test_the_plain_way_and_the_fast_one_give_the_same_numbers(problem, path):
    scorer = problem.scorer(fraction=0.25, stem="agent", seed=3)
    pool, tasks = problem.pool, problem.tasks
    assert np.array_equal(scorer.score(path), evaluate(pool, tasks, path, "reward"))
    expected = [scorer.score(path, subset) for subset in range(4)]
    first, layers = (path[0], path[1:]) if path and path[0].layer < 0 else (Step("base", -1), path)
    stem, modules = pool.stem(first.source), [pool.layer(*step) for step in layers]
    for subset in range(4):
        for i, (name, task) in enumerate(zip(pool.names, tasks, strict=True)):
            rows = scorer.rows(i, subset)
            pieces = (pool.architecture, stem, modules, pool.heads[name])
            answers = predict(*pieces, task, "reward", rows)
            labels = task.split("reward").labels[torch.from_numpy(rows)]
            assert task.score(answers, labels) == expected[subset][i]


def test_a_subset_scores_its_own_examples(problem):
    scorer = problem.scorer(fraction=0.25, seed=3)
    path = PATHS[0]
    for subset in range(scorer.n_subsets):
        rows = [partition(36, 4, 3)[subset] for _ in problem.tasks]
        assert scorer.score(path, subset).tolist() == pytest.approx(oracle(problem, path, rows))


def test_the_mean_over_a_window_is_the_score_on_all_data(problem):
    scorer = problem.scorer(fraction=0.25)  # 36 examples in four equal subsets
    path = PATHS[1]
    parts = np.mean([scorer.score(path, s) for s in range(4)], axis=0)
    assert parts == pytest.approx(scorer.score(path, None))


def test_reward_is_the_mean_over_tasks():
    assert reward(np.array([0.25, 0.75, 0.5])) == 0.5  # Eq. 7


@given(st.integers(1, 300), st.integers(1, 120), st.integers(0, 5))
def test_each_example_is_in_one_subset(n, n_subsets, seed):
    parts = partition(n, n_subsets, seed)
    assert len(parts) == n_subsets
    sizes = {len(p) for p in parts}
    if n >= n_subsets:
        assert sorted(np.concatenate(parts).tolist()) == list(range(n))  # each example once
        assert max(sizes) - min(sizes) <= 1
    else:
        assert sizes == {1}  # at least one example, all of them in turn
        assert {int(p[0]) for p in parts} == set(range(n))


def test_partition_depends_on_its_seed_alone():
    assert all(
        np.array_equal(a, b) for a, b in zip(partition(50, 5, 1), partition(50, 5, 1), strict=True)
    )
    assert not all(
        np.array_equal(a, b) for a, b in zip(partition(50, 5, 1), partition(50, 5, 2), strict=True)
    )


# --------------------------------------------------- what is kept, and who works, changes no bit


def check_that_nothing_changes_a_bit(problem, path, data, **options) -> None:
    """The same to the bit for any budget, number of workers and way of looking ahead.

    path: a strategy of paths. Half of the cases repeat a path, or go on from one. The likelihood shows each
    last bit of the logits; fractions of right answers would hide it.
    """
    asked = data.draw(
        st.lists(st.tuples(path, st.sampled_from([None, 0, 1, 2])), min_size=1, max_size=10)
    )
    asked += data.draw(st.lists(st.sampled_from(asked), max_size=4))
    options |= {"reward": "likelihood"}
    plain = Scorer(problem.pool, problem.tasks, **options, cache_mb=0)
    expected = [plain.score(*one) for one in asked]
    assert plain.work_run == sum(work_of(plain, *one) for one in set(asked))
    budgets = [256.0, 8.0, 0.02, 0.004, 0.0]  # MiB; the small ones hold an activation or two
    for budget in data.draw(st.lists(st.sampled_from(budgets), min_size=1, max_size=3)):
        workers = data.draw(st.integers(1, 3))
        scorer = Scorer(problem.pool, problem.tasks, **options, cache_mb=budget, workers=workers)
        order = data.draw(st.permutations(range(len(asked))))
        size = data.draw(st.sampled_from([0, 1, 3, 20]))  # looked ahead at once; 0: never
        for n, i in enumerate(order):
            if size and n % size == 0:
                scorer.prefetch([asked[k] for k in order[n : n + size]])
            assert np.array_equal(scorer.score(*asked[i]), expected[i])
            assert scorer.cache.bytes <= scorer.cache.peak <= scorer.cache.budget
        assert (scorer.evaluations, scorer.work_asked) == (plain.evaluations, plain.work_asked)
        assert scorer.work_run <= plain.work_run
        scorer.close()


def work_of(scorer, path, subset) -> int:
    """Layers of a path x examples of a subset, over all tasks."""
    layers = sum(step.layer >= 0 for step in path)
    return layers * sum(len(scorer.rows(i, subset)) for i in range(scorer.n_models))


STEPS = st.builds(Step, st.sampled_from(SOURCES), st.integers(0, 2), st.just(()))
SCALED = st.builds(
    Step, st.just("task_arithmetic"), st.integers(0, 2), st.sampled_from([(0.2, 0.7), (1.1, 0.0)])
)
STEM = st.lists(st.builds(Step, st.sampled_from(SOURCES), st.just(-1), st.just(())), max_size=1)


@pytest.mark.slow
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_nothing_but_the_path_changes_a_score(problem, data):
    """Skips, stacks, repeats, scales and stems chosen by the path."""
    path = st.tuples(STEM, st.lists(STEPS | SCALED, max_size=6)).map(lambda p: (*p[0], *p[1]))
    options = {"fraction": 1 / 3, "stem": "agent", "batch_size": 5}
    check_that_nothing_changes_a_bit(problem, path, data, **options)


def test_eight_mib_are_never_exceeded(problem):
    """Deep stacks of which 8 MiB hold only a part, looked ahead in groups, with one worker and two."""
    rng = np.random.default_rng(0)
    paths = [
        path_of(*zip(rng.integers(0, 4, 12), rng.integers(0, 3, 12).tolist(), strict=True))
        for _ in range(60)
    ]
    found = {}
    for cache_mb, workers in ((0, 1), (8, 1), (8, 2)):
        scorer = problem.scorer(
            fraction=1.0, stem="base", cache_mb=cache_mb, workers=workers, batch_size=36
        )
        for n in range(0, len(paths), 20):
            scorer.prefetch([(path, None) for path in paths[n : n + 20]])
        again = [scorer.score((*path[:11], Step("e1", 0))).tolist() for path in paths]
        found[cache_mb, workers] = [scorer.score(path).tolist() for path in paths] + again
        assert scorer.cache.peak <= cache_mb * 2**20
        if cache_mb:
            assert scorer.cache.peak > 7.9 * 2**20
            assert scorer.cache.evicted > 100
    assert found[0, 1] == found[8, 1] == found[8, 2]


def test_a_shared_prefix_is_computed_once(problem):
    scorer = problem.scorer(fraction=1.0)
    scorer.score(path_of((0, 0), (0, 1), (0, 2)))
    assert scorer.work_run == 3 * 72  # three layers for 36 examples of each of two tasks
    scorer.score(path_of((0, 0), (0, 1), (1, 2)))
    assert scorer.work_run == 4 * 72
    scorer.score(path_of((0, 0), (0, 1), (0, 2)))
    assert (scorer.work_run, scorer.evaluations, scorer.work_asked) == (4 * 72, 3, 9 * 72)


# ------------------------------------------------------------------------------ cost, by counting


@pytest.fixture
def calls(problem, monkeypatch):
    """How often each of the parts is called, with one part of each task."""
    counts = Counter()
    vit_class = type(problem.pool.architecture)

    def counted(owner, name, static=False):
        original = getattr(owner, name)

        def spy(*args):
            counts[name] += 1
            return original(*args)

        monkeypatch.setattr(owner, name, staticmethod(spy) if static else spy)

    for name in ("embed", "apply", "logits"):
        counted(vit_class, name, static=True)
    counted(vit_class, "apply_last")
    counted(Cache, "get")
    for name in ("task_arithmetic", "ties"):

        def merged(*args, original=operators.OPERATORS[name], **options):
            counts["merge"] += 1
            return original(*args, **options)

        monkeypatch.setitem(operators.OPERATORS, name, merged)
    return counts


ALL_PATHS = [
    path_of(*steps) for steps in itertools.product(*([(a, k) for a in range(4)] for k in range(3)))
]


def test_ten_times_the_episodes_cost_ten_times_as_much(problem, calls):
    costs = []
    for n in (6, 60):
        scorer = problem.scorer(fraction=1.0, cache_mb=0)
        before = calls.copy()
        for path in ALL_PATHS[:n]:
            scorer.score(path)
        layers = calls["apply"] + calls["apply_last"] - before["apply"] - before["apply_last"]
        costs.append(np.array([scorer.work_run, layers, calls["embed"] - before["embed"] - 2]))
    assert costs[0].tolist() == [6 * 3 * 72, 6 * 3 * 2, 6 * 2]  # 2: the batches' size is found once
    assert costs[1].tolist() == (10 * costs[0]).tolist()
    assert calls["merge"] <= 6  # an operator's layer is merged once, however many paths take it


def test_kept_activations_make_more_episodes_cheaper_not_dearer(problem):
    """All 64 paths share their beginnings: 4 first layers, 16 second ones, 64 last ones."""
    scorer = problem.scorer(fraction=1.0)
    for path in ALL_PATHS:
        scorer.score(path)
    assert scorer.work_run == (4 + 16 + 64) * 72
    assert scorer.work_asked == 3 * 64 * 72


@pytest.mark.parametrize("cache_mb", [0, 256])
def test_ten_times_the_layers_cost_ten_times_as_much(problem, calls, cache_mb):
    found = []
    for n in (3, 30, 60, 90):
        scorer = problem.scorer(fraction=1.0, cache_mb=cache_mb)
        before = calls.copy()
        scorer.score(PATHS[0] * (n // 3))
        assert scorer.work_run == n * 72
        calls.subtract(before)
        assert calls["apply"] + calls["apply_last"] == 2 * n
        found.append(calls["get"])
        calls.clear()
    # So do look-ups: as many more from 30 to 60 layers as from 60 to 90, at most two a layer and task.
    assert found[2] - found[1] == found[3] - found[2] <= 2 * 2 * 30


def test_ten_times_the_tasks_cost_ten_times_as_much(problem):
    base, (one, _) = problem.pool.base, problem.pool.experts
    work = []
    for n in (2, 20):
        pool = LayerPool(base, [one] * n, [f"e{i}" for i in range(n)], ())
        scorer = Scorer(pool, problem.tasks[:1] * n, fraction=1.0, stem="base", cache_mb=0)
        scorer.score((Step("e0", 0), Step("e1", 1), Step("e0", 2)))
        work.append(scorer.work_run)
    assert work == [2 * 3 * 36, 20 * 3 * 36]


def test_what_is_asked_for_twice_is_computed_once(problem, calls):
    scorer = problem.scorer(fraction=0.5, cache_mb=0, workers=2)
    path = ALL_PATHS[37]
    scorer.prefetch([(path, 0), (path, 0), (path, 1), (path, 0)])
    assert scorer.work_run == 3 * 72  # both halves
    assert scorer.evaluations == scorer.work_asked == 0
    before = calls.copy()
    scorer.prefetch([(path, 1), (path, 0)])
    for subset in (0, 1, 0):
        scorer.score(path, subset)
    scorer.prefetch([])
    assert calls == before
    assert (scorer.work_run, scorer.evaluations, scorer.work_asked) == (3 * 72, 3, 3 * 3 * 36)


def test_looking_ahead_shares_more_within_a_small_budget(problem):
    """Paths in an order that shares the most: a budget for one path's activations is enough."""
    rng = np.random.default_rng(1)
    wanted = [(ALL_PATHS[i], 0) for i in rng.permutation(64)]
    scorers = [problem.scorer(fraction=1.0, cache_mb=0.1) for _ in range(2)]
    scorers[0].prefetch(wanted)
    for path, subset in wanted:
        scorers[1].score(path, subset)
    assert scorers[0].work_run == (4 + 16 + 64) * 72 < scorers[1].work_run


def memory_of(*roots) -> int:
    """Bytes of the distinct memory of all tensors that objects lead to, counted by walking them."""
    storages, seen, stack = {}, set(), list(roots)
    while stack:
        one = stack.pop()
        if id(one) in seen or isinstance(one, type):
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            if not one.is_meta:
                storages[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        elif isinstance(one, dict):
            stack += one.values()
        elif isinstance(one, (list, tuple, set)):
            stack += one
        elif hasattr(one, "__dict__"):
            stack += vars(one).values()
    return sum(storages.values())


def test_memory_for_the_pool_is_the_models_and_the_layers_that_were_asked_for(problem):
    """At most N + 1 models and each operator's layer in use, scaled layers for a moment only."""
    pool = problem.pool
    pool.calibration = None  # it refers to the tasks
    model = sum(t.nbytes for t in pool.base.weights.values())
    scorer = problem.scorer(fraction=0.5, workers=2)
    rng = np.random.default_rng(0)
    for i in range(30):  # both experts everywhere; one operator in layer 0, the other in layer 2
        numbers = [(rng.choice([0, 1, *{0: [2], 2: [3]}.get(k, [])]), k) for k in range(3)]
        scorer.score(path_of(*numbers), i % 2)
        scales = tuple(rng.uniform(0, 1, 2).tolist())
        scorer.score(tuple(Step("task_arithmetic", k, scales) for k in range(3)), i % 2)
    held = memory_of(pool)
    merged = [pool.weights(SOURCES[2], 0), pool.weights(SOURCES[3], 2)]  # they are held already
    layers = sum(t.nbytes for weights in merged for t in weights.values())
    assert memory_of(pool) == held
    assert (pool.n_models + 1) * model < held <= 1.01 * ((pool.n_models + 1) * model + layers)


# ------------------------------------------------------------------------- batches, worker by worker


@given(st.integers(0, 400), st.integers(1, 70))
def test_parts_cover_each_row_once_in_order(n, size):
    rows = np.random.default_rng(n).permutation(n)
    parts = parts_of(rows, size)
    assert np.concatenate(parts).tolist() == rows.tolist()
    lengths = [len(part) for part in parts]
    assert max(lengths) - min(lengths) <= 1
    assert max(lengths) <= size
    assert len(parts) == max(1, -(-n // size))


def test_parts_by_hand(problem):
    scorer = problem.scorer(fraction=1 / 3, batch_size=5, seed=2)
    own = partition(36, 3, 2)[1]  # 12 rows of each of two tasks, in 4 + 4 + 4
    assert [(i, rows.tolist()) for i, rows in scorer.parts(1)] == [
        (i, own[a : a + 4].tolist()) for i in (0, 1) for a in (0, 4, 8)
    ]
    assert [(i, len(rows)) for i, rows in scorer.parts(None)] == [
        (i, n) for i in (0, 1) for n in (5, 5, 5, 5, 4, 4, 4, 4)
    ]


@pytest.mark.parametrize(
    ("width", "pixels", "expected"),
    [
        (192, 48, 32),  # 145 tokens x 768 hidden numbers: 2**20 // 111,360 = 9, but never below 32
        (16, 32, 252),  # 65 x 64: 2**20 // 4,160
        (16, 8, 256),  # 5 x 64: 2**20 // 320 = 3,276, but never above 256
    ],
)
def test_the_batches_size_by_hand(problem, width, pixels, expected):
    args = TINY["model_args"] | {"embed_dim": width, "img_size": pixels}
    config = TINY | {"model_args": args}
    family = vit_run.ViT(config)
    stem = family.stem(vit.split(vit_run.create(config, depth=1, num_classes=0).state_dict()).stem)

    class Blank:
        def split(self, name):
            return range(7)

        def batch(self, name, rows):
            assert len(rows) <= 7
            return torch.zeros(len(rows), 1, pixels, pixels)

    assert batch_size(family, stem, Blank(), "reward") == expected


def test_all_workers_have_the_threads_of_the_first(problem, monkeypatch):
    """Sums in another number of threads may have other last bits."""
    seen = set()
    original = Scorer.work

    def spy(self, job):
        seen.add((threading.current_thread().name.split("_")[0], torch.get_num_threads()))
        return original(self, job)

    monkeypatch.setattr(Scorer, "work", spy)
    problem.scorer(workers=3, fraction=0.5).score(ALL_PATHS[0], 0)
    assert seen == {("scorer", torch.get_num_threads())}


def test_an_engine_runs_jobs_in_any_order_and_place(problem):
    """Here backwards, and by another scorer: what ``Job`` says is all that a worker needs."""
    other = problem.scorer(fraction=0.5, batch_size=7)
    jobs_seen = []

    def backwards(jobs):
        jobs_seen.extend(jobs)
        return reversed([other.work(job) for job in reversed(jobs)])

    options = {"fraction": 0.5, "stem": problem.stem, "batch_size": 7}
    scorer = Scorer(problem.pool, problem.tasks, **options, engine=backwards)
    plain = Scorer(problem.pool, problem.tasks, **options)
    wanted = [(path, s) for path in ALL_PATHS[::5] for s in (0, 1, None)]
    scorer.prefetch(wanted)
    n = len(jobs_seen)
    assert n > 6
    assert all(np.array_equal(scorer.score(*w), plain.score(*w)) for w in wanted)
    assert len(jobs_seen) == n
    assert scorer.work_run <= scorer.work_asked
    assert not scorer.alone
    assert plain.alone
    assert not scorer.shares_layers
    assert plain.shares_layers


def test_an_error_in_a_worker_is_the_callers(problem, monkeypatch):
    scorer = problem.scorer(workers=2)

    def broken(self, job):
        raise InputError("a layer is missing")

    monkeypatch.setattr(Scorer, "work", broken)
    with pytest.raises(InputError, match="a layer is missing"):
        scorer.score(ALL_PATHS[0], 0)
    monkeypatch.undo()
    expected = problem.scorer().score(ALL_PATHS[0], 0)
    assert np.array_equal(scorer.score(ALL_PATHS[0], 0), expected)  # and nothing wrong was noted


@pytest.mark.parametrize("workers", ["0", "-1", "1.5", "two", "²", ""])
def test_workers_that_are_no_number_are_refused(problem, workers):
    with pytest.raises(InputError, match="--workers: expected a number of threads from 1"):
        problem.scorer(workers=workers)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"workers": 0}, "at least 1 worker"),
        ({"batch_size": 0}, "batches of at least 1 example, found 1 and 0"),
        ({"precision": "float16"}, "precision: expected float32 or bfloat16, found 'float16'"),
        ({"cache_mb": -1}, "expected a budget of 0 bytes or more"),
    ],
)
def test_options_out_of_range_are_refused(problem, options, words):
    with pytest.raises(InputError, match=words):
        Scorer(problem.pool, problem.tasks, **options)


# ----------------------------------------------------------------------------- device and precision


@pytest.mark.parametrize("device", ["cuda:99", "meta", "nonsense", "hpu", ""])
def test_a_device_that_is_not_there_is_refused(problem, device):
    with pytest.raises(InputError, match=r"device '.*': expected cpu, or a GPU .*; choose cpu"):
        problem.scorer(device=device)


@pytest.fixture(scope="module")
def demo():
    """The pair that ships: trained, so that most answers are sure ones."""
    return load_problem(("demo",))


def answers_of(scorer, paths) -> torch.Tensor:
    """All answers on the first subset, whatever the batches."""
    found = []
    for j in range(len(scorer.parts(0))):
        found.append(torch.cat([a[None] for a in scorer.work(Job(0, j, tuple(paths)))[0]]))
    return torch.cat(found, 1)


DEMO_PATHS = [
    tuple(Step("digits", k) for k in range(6)),
    tuple(Step("textures", k) for k in range(6)),
    (
        Step("task_arithmetic:scale=0.75", -1),
        *(Step(s, k) for s, k in [("digits", 0), ("weight_average", 1), ("weight_average", 1)]),
        *(Step(s, k) for s, k in [("textures", 3), ("task_arithmetic:scale=0.75", 5)]),
    ),
]


def compare_with_float32(demo, least: float, **options) -> None:
    plain = demo.scorer(fraction=0.2)
    other = demo.scorer(fraction=0.2, **options)
    first, second = answers_of(plain, DEMO_PATHS), answers_of(other, DEMO_PATHS)
    assert first.shape == second.shape
    assert first.shape[1] > 150
    assert len(first.unique()) > 5
    for a, b in zip(first, second, strict=True):
        assert float((a == b).float().mean()) > least
    soft = [demo.scorer(fraction=0.2, reward="likelihood", **o) for o in ({}, options)]
    for path in DEMO_PATHS:
        scores = other.score(path, 0)
        assert ((scores >= 0) & (scores <= 1)).all()
        assert scores == pytest.approx(plain.score(path, 0), abs=0.05)
        # Computed in another way indeed, with nearly the same result.
        found, expected = (scorer.score(path, 0) for scorer in reversed(soft))
        assert not np.array_equal(found, expected)
        assert found == pytest.approx(expected, abs=0.05)


def test_bfloat16_finds_nearly_the_same_answers(demo):
    before = {k: v.clone() for k, v in demo.pool.base.weights.items()}
    compare_with_float32(demo, 0.95, precision="bfloat16")
    # The pool's own layers stay as they are, for tables and exports.
    assert all(p.dtype == torch.float32 for p in demo.pool.layer("ties", 2).parameters())
    assert all(torch.equal(v, before[k]) for k, v in demo.pool.base.weights.items())


def test_a_path_that_began_another_one_has_the_same_logits(demo):
    """The last layer is computed for the class token alone: at real sizes in other last bits."""
    options = {"fraction": 0.2, "stem": demo.stem, "reward": "likelihood"}
    longer = (*DEMO_PATHS[0], Step("textures", 5))
    used, fresh = (Scorer(demo.pool, demo.tasks, **options) for _ in range(2))
    used.score(longer, 0)
    for scorer in (used, fresh):
        scorer.score(DEMO_PATHS[0], 0)
    assert np.array_equal(used.score(DEMO_PATHS[0], 0), fresh.score(DEMO_PATHS[0], 0))
    assert used.work_run == work_of(used, longer, 0) + work_of(used, longer, 0) // 7


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
@pytest.mark.parametrize(("precision", "least"), [("float32", 0.995), ("bfloat16", 0.95)])
def test_a_gpu_finds_the_same_answers(demo, precision, least):
    compare_with_float32(demo, least, device="cuda", precision=precision)
    assert demo.pool.layer("ties", 2).norm1.weight.device.type == "cpu"


def test_a_returned_score_can_be_changed_without_harm(problem):
    scorer = problem.scorer()
    scorer.score((), 0)[:] = 7
    assert scorer.score((), 0).max() <= 1


def test_no_gradient_is_ever_enabled(problem, monkeypatch):
    """Every layer runs in inference mode, also when the caller has gradients on."""
    seen = []
    architecture = problem.pool.architecture
    for name in ("apply", "apply_last"):
        original = getattr(architecture, name)

        def spy(layer, tokens, original=original):
            out = original(layer, tokens)
            seen.append((out.requires_grad, torch.is_inference(out), torch.is_grad_enabled()))
            return out

        monkeypatch.setattr(architecture, name, spy)
    with torch.enable_grad():
        problem.scorer().score(PATHS[0], 0)
        evaluate(problem.pool, problem.tasks, (Step("e1", 0),), "test")
    assert len(seen) > 6
    assert set(seen) == {(False, True, False)}
    for step in (Step("base", -1), *PATHS[0]):
        module = problem.pool.layer(*step) if step.layer >= 0 else problem.pool.stem("base")
        assert not any(p.requires_grad for p in module.parameters())
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
    layers = path_of((0, 0), (3, 1), (1, 2))
    path = layers if stem is None else (*path_of((stem, -1)), *layers)
    scorer = problem.scorer(stem="agent", fraction=1.0)
    assert scorer.score(path).tolist() == pytest.approx(oracle(problem, path))
    again = problem.scorer(stem="agent", fraction=1.0, cache_mb=0)
    assert np.array_equal(scorer.score(path), again.score(path))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_closed_scorer_gives_its_memory_back_at_once(problem, workers):
    """Not only when Python next looks for circles: activations may fill a quarter of the memory."""
    scorer = problem.scorer(fraction=1.0, workers=workers)
    before = scorer.score(PATHS[0])
    assert scorer.cache.bytes > 0
    scorer.close()
    assert (scorer.cache.bytes, len(scorer.cache)) == (0, 0)
    assert np.array_equal(scorer.score(PATHS[0]), before)
    assert scorer.score(PATHS[1]).shape == (2,)  # and it works on
    scorer.close()


# ------------------------------------------------------------------------- copies, views, recorders


@pytest.mark.parametrize("stem", ["base", "agent"])
def test_gymnasiums_own_check_passes_with_a_real_scorer(problem, stem):
    """It deep-copies the environment's arguments, and makes the environment again from them."""
    scorer = problem.scorer(fraction=1.0, seed=1, stem=stem)
    env = gym.make("rmm_lab/Merging-v0", scorer=scorer).unwrapped
    check_env(env)
    assert env.scorer is scorer
    assert copy.deepcopy(env).scorer is scorer


def test_a_deep_copy_of_a_scorer_is_the_scorer_itself(problem):
    scorer = problem.scorer(workers=2)
    assert copy.deepcopy({"scorer": [scorer]})["scorer"][0] is scorer


@pytest.mark.parametrize("workers", [1, 2])
def test_a_pickled_scorer_scores_the_same(problem, workers):
    scorer = problem.scorer(workers=workers, fraction=0.5)
    expected = scorer.score(PATHS[0], 0)
    other = pickle.loads(pickle.dumps(scorer))
    assert np.array_equal(other.score(PATHS[0], 0), expected)
    assert other.work_run == scorer.work_run  # it has the scores so far
    assert np.array_equal(other.score(PATHS[1], 1), scorer.score(PATHS[1], 1))
    for one in (scorer, other):
        one.close()


def test_a_block_view_scores_paths_of_blocks(tiny):
    problem = load_problem(**tiny, operators=("ties",), stem="agent", unit="sublayer")
    scorer = problem.scorer(fraction=0.5)
    view = BlockView(scorer)
    assert (view.n_layers, list(view.stacks), scorer.n_layers) == (3, [range(3)], 6)
    path = (Step("ties", -1), Step("e1", 0), Step("task_arithmetic", 2, (0.5, 0.25)))
    expected = (
        Step("ties", -1),
        *(Step("e1", j) for j in (0, 1)),
        *(Step("task_arithmetic", j, (0.5, 0.25)) for j in (4, 5)),
    )
    assert view.expand(path) == expected
    view.prefetch([(path, 1)])
    ran = scorer.work_run
    assert np.array_equal(view.score(path, 1), scorer.score(expected, 1))
    assert scorer.work_run == ran > 0
    check_env(gym.make("rmm_lab/Merging-v0", scorer=view).unwrapped)


def test_a_recorder_takes_what_an_environment_asks_for(problem):
    scorer = problem.scorer(fraction=0.5)
    recorder = RecordingScorer(scorer)
    env = gym.make("rmm_lab/Merging-v0", scorer=recorder).unwrapped
    for _ in range(2):
        env.reset()
        for action in (0, 3, 1):
            *_, info = env.step(action)
        assert info["raw_reward"] == 0
    path = (Step("e1", 0), Step("ties", 1), Step("e2", 2))
    assert recorder.take() == [(path, 0), (path, 1)]
    assert recorder.take() == []
    assert scorer.evaluations == 0
