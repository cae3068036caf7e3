"""Other searches: their budgets, what they find where the best is known, the paths they give."""

from __future__ import annotations

import sys
from collections import Counter

import numpy as np
import pytest
import torch

from rmm_lab.errors import InputError
from rmm_lab.families.checkpoint import read_checkpoint
from rmm_lab.operators import parse_operator
from rmm_lab.path import LayerPath
from rmm_lab.reward import Step, evaluate, parse_path, path_text, reward
from rmm_lab.search import rivals
from rmm_lab.search.budget import Deadline
from rmm_lab.search.layer_scales import BOUNDS
from rmm_lab.search.proposals import (
    Neighbourhoods,
    crossover,
    draw_parents,
    fittest,
    mix,
    shared,
)

CHOICES = ("random search", "coordinate ascent", "TPE", "NSGA-II")  # a source at each place


class Landscape:
    """A scorer by formula: each place has a best source, and rewards add up. Three subsets, no noise."""

    sources, members, n_models, n_layers = ("a", "b", "ties"), ("a", "b"), 2, 4
    n_subsets, task_names, chooses_stem = 3, ["x"], True
    stacks = (range(4),)
    best = parse_path("ties@-1 a@0 b@1 ties@2 b@3")

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def score(self, path, subset=None):
        self.calls.append((path, subset))
        return np.array([self.value(path)])

    def value(self, path) -> float:
        return sum(step in self.best for step in path) / len(self.best)


class Wide(Landscape):
    """Nine places of seven sources, as the demo's: too many for chance."""

    sources, members, n_layers, n_subsets = tuple("abcdefg"), ("a", "b"), 8, 10
    stacks = (range(8),)
    best = tuple(Step("abcdefg"[(3 * k + 5) % 7], k) for k in range(-1, 8))


def watched(problem, monkeypatch, stem="agent", **options):
    """A real scorer and a list of the (path as text, subset) that it is asked for, whoever asks."""
    scorer = problem.scorer(fraction=0.25, stem=stem, **options)
    asked: list[tuple[str, int | None]] = []
    score = scorer.score

    def note(path, subset=None):
        asked.append((path_text(path), subset))
        return score(path, subset)

    monkeypatch.setattr(scorer, "score", note)
    return scorer, asked


# ------------------------------------------------------------------------------------- all searches


@pytest.mark.parametrize("budget", [0, 3, 6, 25, 65])
@pytest.mark.parametrize("name", rivals.SEARCHES)
def test_a_search_spends_its_budget_and_begins_with_the_uniform_paths(
    problem, monkeypatch, name, budget
):
    scorer, asked = watched(problem, monkeypatch)
    scored = rivals.SEARCHES[name](scorer, budget, 1)
    assert len(scored) == len(asked) == scorer.evaluations == budget
    assert [text for text, _ in scored] == [text for text, _ in asked]
    assert all(subset in range(4) for _, subset in asked)  # never the whole split
    uniform = [" ".join(f"{s}@{k}" for k in (-1, 0, 1, 2)) for s in scorer.sources]
    assert len(uniform) == 4
    assert asked[:4] == [(text, 0) for text in uniform][:budget]
    if budget > 40:
        assert {subset for _, subset in asked} == {0, 1, 2, 3}


class Hours(Wide):
    """A path takes a second of its clock."""

    def clock(self) -> float:
        return 100.0 + len(self.calls)


@pytest.mark.parametrize("seconds", [0, 5, 30, 61])
@pytest.mark.parametrize("name", rivals.SEARCHES)
def test_a_deadline_ends_a_search_after_the_batch_under_way(name, seconds):
    """It has scored what a search of so many evaluations scores first."""
    scorer = Hours()
    scored = rivals.SEARCHES[name](scorer, Deadline(seconds, 140, scorer.clock), 1)
    whole = rivals.SEARCHES[name](Hours(), 140, 1)
    n = len(scored)
    assert max(1, seconds) <= n < seconds + 21
    assert n == len(scorer.calls)
    assert scored == whole[:n]
    assert len(scored.known) == 7
    assert bool(scored.answers) == bool(whole.answers and n > 14 + 5)  # of scales that evolved


def test_a_deadline_is_from_now_on():
    now = [3.0]
    deadline = Deadline(2.5, 10, lambda: now[0])
    for time, over in ((3.0, False), (5.4, False), (5.5, True), (9.0, True)):
        now[0] = time
        assert deadline.over() == over
    for seconds in (-1, float("nan")):
        with pytest.raises(InputError, match="deadline: expected 0 seconds or more, found"):
            Deadline(seconds, 10)


@pytest.mark.parametrize("stem", ["agent", "ties"])
@pytest.mark.parametrize("name", rivals.SEARCHES)
def test_the_same_seed_gives_the_same_search_with_any_number_of_workers(problem, name, stem):
    search = rivals.SEARCHES[name]
    first = search(problem.scorer(fraction=0.25, stem=stem), 40, 3)
    assert search(problem.scorer(fraction=0.25, stem=stem, workers=2), 40, 3) == first
    assert search(problem.scorer(fraction=0.25, stem=stem), 40, 4) != first
    stems = {text.split()[0].rpartition("@")[2] for text, _ in first if text}
    assert ("-1" in stems) == (stem == "agent")


@pytest.mark.parametrize("stem", ["agent", "ties"])
@pytest.mark.parametrize("name", rivals.SEARCHES)
def test_rewards_are_those_of_the_paths(problem, monkeypatch, name, stem):
    """Against a scorer that keeps nothing; a whole split's against the plain evaluation."""
    scorer, asked = watched(problem, monkeypatch, stem=stem)
    scored = rivals.SEARCHES[name](scorer, 30, 2)
    plain = problem.scorer(fraction=0.25, stem=stem, cache_mb=0)
    for (text, value), (_, subset) in list(zip(scored, asked, strict=True))[::5]:
        path = parse_path(text)
        assert value == reward(plain.score(path, subset))
        whole = path if path and path[0].layer < 0 else (Step(plain.stem, -1), *path)
        expected = evaluate(problem.pool, problem.tasks, whole, "reward").mean()
        assert rivals.whole(plain, text) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", CHOICES)
def test_a_search_over_sources_takes_one_at_each_place(name):
    scorer = Landscape()
    scored = rivals.SEARCHES[name](scorer, 90, 1)
    for (text, value), (path, _) in zip(scored, scorer.calls, strict=True):
        assert text == path_text(path)
        assert [step.layer for step in path] == [-1, 0, 1, 2, 3]
        assert value == pytest.approx(scorer.value(path))


@pytest.mark.parametrize("name", ["TPE", "NSGA-II"])
def test_twenty_evaluations_share_a_subset(name):
    scorer = Wide()
    rivals.SEARCHES[name](scorer, 70, 1)
    assert [subset for _, subset in scorer.calls] == [i // 20 for i in range(70)]


@pytest.mark.parametrize("name", ["TPE", "NSGA-II"])
def test_tpe_and_nsga2_learn_what_chance_does_not_find(name):
    def found(name: str, seed: int) -> tuple[float, float]:
        rewards = [value for _, value in rivals.SEARCHES[name](Wide(), 240, seed)]
        return max(rewards), float(np.mean(rewards[-40:]))

    best, late = np.mean([found(name, seed) for seed in range(3)], axis=0)
    by_chance, late_by_chance = np.mean([found("random search", seed) for seed in range(3)], axis=0)
    assert late_by_chance < 0.25  # one in seven
    assert late > late_by_chance + 0.25
    assert best > by_chance + 0.1


@pytest.mark.parametrize("name", ["TPE", "NSGA-II"])
def test_a_missing_library_is_named(problem, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match=r"library optuna, found none .*'\.\[search\]'"):
        rivals.SEARCHES[name](problem.scorer(fraction=0.25), 30, 1)


# ----------------------------------------------------------------- random search, coordinate ascent


def test_random_search_draws_each_source_equally_often_and_takes_subsets_in_turn():
    scorer = Landscape()
    rivals.random_search(scorer, 3003, 0)
    drawn = np.array([[step.source for step in path] for path, _ in scorer.calls[9:]])
    shares = np.stack([(drawn == source).mean(0) for source in scorer.sources])  # (3, places)
    assert np.abs(shares - 1 / 3).max() < 0.04
    # The uniform paths on all three subsets, since a tenth of the evaluations is more than that.
    assert [subset for _, subset in scorer.calls[:9]] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [subset for _, subset in scorer.calls[9:15]] == [0, 1, 2, 0, 1, 2]


def test_coordinate_ascent_climbs_a_separable_landscape_in_one_sweep():
    scorer = Landscape()
    # 3 uniform paths, then 5 places times 2 other sources: the start is scored already.
    scored = rivals.coordinate_ascent(scorer, 13, 5)
    assert max(scored, key=lambda s: s[1]) == (path_text(scorer.best), 1.0)
    assert {subset for _, subset in scorer.calls} == {0}  # like is compared with like
    first = scorer.calls[3][0]
    start = max(scorer.calls[:3], key=lambda call: (scorer.value(call[0]), path_text(call[0])))[0]
    assert sum(a != b for a, b in zip(first, start, strict=True)) == 1
    more = Landscape()
    rivals.coordinate_ascent(more, 50, 5)
    subsets = [subset for _, subset in more.calls]
    assert subsets[:13] == [0] * 13
    assert subsets[13:24] == [1] * 11  # the next sweep, the next subset: nothing changes
    assert more.calls[13][0] == more.best
    assert more.calls[24][0] != more.best  # so it starts over
    assert subsets[24:35] == [2] * 11


# -------------------------------------------------------------------------------- CMA-ES over scales


def scales_of(path) -> np.ndarray:
    """A path of scales, or its text, -> (places, N)."""
    return np.array([step.scales for step in (parse_path(path) if isinstance(path, str) else path)])


class Scaled(Landscape):
    """Pays for scales by a formula, and 0.1 for any other path."""

    def __init__(self, worth):
        super().__init__()
        self.worth = worth

    def value(self, path):
        return self.worth(scales_of(path)) if path[0].scales else 0.1


def test_cmaes_finds_the_bottom_of_a_bowl_in_the_scales():
    target = np.array([[0.9, 0.1], [0.4, 0.4], [-0.1, 1.2], [0.7, 0.0], [0.3, 0.8]])  # (places, N)
    scorer = Scaled(lambda scales: float(np.exp(-np.square(scales - target).sum())))
    scored = rivals.cmaes_scales(scorer, 700, 1)
    asked = scorer.calls[9:]  # three uniform paths on three subsets
    assert [text for text, _ in scored[9:]] == [path_text(path) for path, _ in asked]
    assert len(scored.answers) > 1
    for one, (path, subset) in zip(rivals.SCALES, asked, strict=False):
        assert (scales_of(path) == one).all()  # the uniform scales come first
        assert subset == 0
    every = np.stack([scales_of(path) for path, _ in asked])  # (691, places, N)
    assert every.min() >= BOUNDS[0]
    assert every.max() <= BOUNDS[1]
    best = scales_of(max(scored[9:], key=lambda s: s[1])[0])
    assert np.abs(best - target).max() < 0.02
    for text in scored.answers:  # its means
        assert np.abs(scales_of(text) - target).max() < 0.03
    subsets = [subset for _, subset in asked[5:]]
    ends = np.flatnonzero(np.diff(subsets)) + 1  # where a generation ends
    assert set(np.diff([0, *ends])) == {10}  # 4 + int(3 ln 10)
    assert subsets[:31:10] == [1, 2, 0, 1]


def test_the_scales_start_at_the_best_of_what_is_known():
    """One uniform scale where that is best; an expert, as scales of 1 and 0, where no merge works."""

    class Second(Scaled):
        def value(self, path):
            return 0.9 if path[0].source == "b" else super().value(path)

    for scorer, expected in (
        (Second(lambda scales: 0.5), [0, 1]),
        (Scaled(lambda scales: 1 - abs(scales - 0.8).mean()), [0.8, 0.8]),
    ):
        scored = rivals.cmaes_scales(scorer, 18, 1)
        first = np.stack([scales_of(text) for text, _ in scored[8:]])
        assert len(first) == 10
        assert np.abs(first.mean(0) - expected).max() < 0.35  # ten draws around it, sigma 0.2
        assert first.std() > 0.1


def test_the_scales_start_at_a_merge_that_looks_where_that_is_best():
    class Looks(Scaled):
        sources, members = ("a", "b", "ties", "regmean"), ("a", "b", "regmean")

        def value(self, path):
            return 0.9 if path[0].source == "regmean" else super().value(path)

    scorer = Looks(lambda scales: 0.5)
    scored = rivals.cmaes_scales(scorer, 19, 1)
    tried = [scales_of(text) for text, _ in scored[4:9]]
    assert [one[0].tolist() for one in tried] == [[s, s, 0] for s in rivals.SCALES]
    first = np.stack([scales_of(text) for text, _ in scored[9:]])  # (10, places, 3)
    assert np.abs(first.mean(0) - [0, 0, 1]).max() < 0.35


def test_a_path_of_scales_is_exported_as_a_timm_model(problem, tmp_path):
    """Every tensor against the formula, and the exported model's answers against the search's score."""
    import timm

    scorer, pool = problem.scorer(fraction=0.25, stem="agent"), problem.pool
    text = rivals.cmaes_scales(scorer, 40, 1)[-1][0]
    scales = scales_of(text)  # (4 places, 2)
    path = LayerPath.of(pool, parse_path(text))
    assert LayerPath.from_json(path.to_json()) == path
    path.save_pretrained(tmp_path / "merged", pool)
    model = timm.create_model(f"local-dir:{tmp_path / 'merged'}", pretrained=True).eval()
    found = model.state_dict()
    base, experts = pool.base.weights, [e.weights for e in pool.experts]
    differ = 0
    for name, tensor in base.items():
        if name.startswith("head."):
            continue
        place = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else 0
        expected = tensor.double()
        for scale, expert in zip(scales[place], experts, strict=True):
            expected = expected + scale * (expert[name].double() - tensor.double())
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-6)
        differ += not torch.allclose(found[name], tensor)
    assert differ > 30  # nearly all tensors moved away from the base's
    heads = read_checkpoint(tmp_path / "merged").config["rmm_lab"]["heads"]
    scores = []
    for task, name in zip(problem.tasks, pool.names, strict=True):
        split = task.split("reward")
        with torch.inference_mode():
            logits = model(task.batch("reward", slice(None)))[:, slice(*heads[name])]
        scores.append((logits.argmax(-1) == split.labels).double().mean().item())
    assert rivals.whole(scorer, text) == pytest.approx(np.mean(scores), abs=1e-9)


# ----------------------------------------------------------------- CMA-ES over scales and densities


def numbers_of(path) -> np.ndarray:
    """A path of TIES, or its text -> (places, 2, N): its scales and densities."""
    steps = parse_path(path) if isinstance(path, str) else path
    options = [dict(parse_operator(step.source, 2).options) for step in steps]
    return np.array([[own["scale"], own["density"]] for own in options])


def test_a_step_of_ties_with_scales_alone_is_read_as_it_was_written(problem):
    """Only the scales of task arithmetic are the step's own; others are the operator's option."""
    path = (Step("task_arithmetic", 0, (0.3, 0.5)), Step("ties:scale=1/0.2", 1), Step("ties", 2))
    assert path_text(path) == "task_arithmetic:scale=0.3/0.5@0 ties:scale=1/0.2@1 ties@2"
    assert parse_path(path_text(path)) == path
    assert LayerPath.from_json(LayerPath.of(problem.pool, path).to_json()).path[-3:] == path
    assert rivals.whole(problem.scorer(fraction=0.25, stem="base"), path_text(path)) > 0


def test_cmaes_over_densities_finds_the_bottom_of_a_bowl():
    target = np.stack([TARGET, np.linspace(0.2, 0.9, 10).reshape(5, 2)], axis=1)  # (places, 2, N)

    class Bowl(Landscape):
        def value(self, path):
            if not path[0].source.startswith("ties:"):
                return 0.1
            return float(np.exp(-np.square(numbers_of(path) - target).sum()))

    scored = rivals.cmaes_densities(Bowl(), 1500, 1)
    asked = np.stack([numbers_of(text) for text, _ in scored[9:]])  # (n, places, 2, N)
    assert (asked[:5, :, 0] == np.reshape(rivals.SCALES, (5, 1, 1))).all()
    assert BOUNDS[0] <= asked[:, :, 0].min() <= asked[:, :, 0].max() <= BOUNDS[1]
    assert rivals.THIN <= asked[:, :, 1].min() <= asked[:, :, 1].max() <= 1
    for text in scored.answers:  # its means
        assert np.abs(numbers_of(text) - target).max() < 0.05


def test_the_densities_start_at_the_best_expert_where_no_merge_works():
    class Second(Landscape):
        def value(self, path):
            return 0.9 if path[0].source == "b" else 0.1

    scored = rivals.cmaes_densities(Second(), 20, 1)
    first = np.stack([numbers_of(text) for text, _ in scored[8:]])  # (12, places, 2, N)
    assert np.abs(first[:, :, 0].mean(0) - [0, 1]).max() < 0.35  # draws around it, sigma 0.2
    assert first[:, :, 1].mean() > 0.8  # nearly whole


# -------------------------------------------------- natural niches, large-neighbourhood search

TARGET = np.array([[0.9, 0.1], [0.4, 0.4], [-0.1, 1.2], [0.7, 0.0], [0.3, 0.8]])  # (places, N)
MOVING = ("natural niches", "large-neighbourhood search")


def bowl(scales: np.ndarray) -> float:
    return float(np.exp(-np.square(scales - TARGET).sum()))


@pytest.mark.parametrize("name", MOVING)
def test_scales_climb_a_bowl_better_than_chance(name):
    answers, chance = [], []
    for seed in range(3):
        scored = rivals.SEARCHES[name](Scaled(bowl), 700, seed)
        assert len(scored.answers) == len(set(scored.answers)) > 1
        every = np.stack([scales_of(text) for text, _ in scored[9:]])  # (691, places, N)
        assert every.min() >= BOUNDS[0]
        assert every.max() <= BOUNDS[1]
        answers.append([bowl(scales_of(path)) for path in scored.answers])
        # As many draws around the best of the starts, 0.5 for all, as wide as CMA-ES's first.
        drawn = np.random.default_rng(seed).normal(0.5, 0.2, every.shape)
        chance.append(max(map(bowl, drawn)))
    assert max(chance) < 0.6
    assert min(max(own) for own in answers) > 0.9
    assert min(own[0] for own in answers) > 0.8  # the first to be chosen from


@pytest.mark.parametrize("name", MOVING)
def test_twenty_evaluations_are_compared_on_the_same_examples(name):
    scorer = Scaled(lambda scales: 0.5)
    rivals.SEARCHES[name](scorer, 80, 1)  # 3 uniform paths on two subsets, 5 scales for all
    subsets = [subset for _, subset in scorer.calls]
    assert subsets[:11] == [0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0]
    assert subsets[11:] == [1] * 20 + [2] * 20 + [0] * 20 + [1] * 9


def test_the_scores_behind_each_reward_are_kept_by_task():
    class Two(Landscape):
        def score(self, path, subset=None):
            return np.array([0.1 * (path[0].source == "a"), 0.5])

    scored = rivals.random_search(Two(), 20, 1)
    first = [0.1 * text.startswith("a@-1") for text, _ in scored]
    assert [own.tolist() for own in scored.by_task] == [[x, 0.5] for x in first]
    assert [value for _, value in scored] == pytest.approx([(x + 0.5) / 2 for x in first])


def test_an_example_of_tasks_that_are_shared():
    scores = np.array([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    assert shared(scores).tolist() == [[0.5, 0, 0], [0.5, 1, 0]]


def test_who_leaves_the_archive():
    # Fitness 0.8/1.4 = 0.57, 0.6/1.4 = 0.43 and 1: the only one that can do the second task stays.
    assert fittest(np.array([[0.8, 0.0], [0.6, 0.0], [0.0, 0.3]]), 2) == [0, 2]
    # 0.5, 0.5, 0.35, 0.33, 0.32 at first; without the last two the third has all of its task.
    scores = np.array([[0.6, 0], [0.6, 0], [0, 0.35], [0, 0.33], [0, 0.32]])
    assert fittest(scores, 3) == [0, 1, 2]
    assert fittest(scores, 2) == [1, 2]  # of equals the oldest leaves
    assert fittest(scores, 9) == [0, 1, 2, 3, 4]


def frequencies(scores, n: int = 20_000) -> np.ndarray:
    """(A, A): how often each pair of parents was drawn."""
    rng, counts = np.random.default_rng(0), np.zeros((len(scores), len(scores)))
    for _ in range(n):
        counts[draw_parents(np.array(scores), rng)] += 1
    return counts / n


def test_parents_compete_and_attract():
    # Shared: [0.5, 0.25], [0.375, 0.25], [0.125, 0.5]; fitness 0.75, 0.625, 0.625 of 2 in all. The third
    # alone attracts the first; to the second it is 0.25 and the first 0.125; to it they are 0.375 and 0.25.
    found = frequencies([[0.8, 0.2], [0.6, 0.2], [0.2, 0.4]])
    first = np.array([0.375, 0.3125, 0.3125])
    second = np.array([[0, 0, 1], [1 / 3, 0, 2 / 3], [0.6, 0.4, 0]])
    assert np.abs(found - first[:, None] * second).max() < 0.015


def test_where_nobody_attracts_the_partner_comes_by_fitness():
    one_task = frequencies([[0.6], [0.2]])  # nothing draws the first to the second
    assert np.abs(one_task - [[0.75 * 0.75, 0.75 * 0.25], [0.25, 0]]).max() < 0.015
    assert np.abs(frequencies([[0.0, 0.0]] * 2) - 0.25).max() < 0.015


def test_a_child_by_hand():
    a, b = np.array([[1.0, 0.0]] * 3), np.array([[0.0, 1.0]] * 3)
    assert mix(a, b, 1, 0.25).tolist() == [[0.75, 0.25], [0.25, 0.75], [0.25, 0.75]]
    assert mix(a, b, 0, 1.0).tolist() == a.tolist()


def test_children_are_split_anywhere_and_mutated():
    rng = np.random.default_rng(0)
    a, b = np.zeros((4, 2000)), np.ones((4, 2000))  # 2000 members, so that a mean shows the ratio
    ratios, splits = [], []
    for _ in range(300):
        child = crossover(a, b, rng)
        means = child.mean(1)  # (4,)
        steps = np.flatnonzero(np.abs(np.diff(means)) > 0.03) + 1
        assert len(steps) <= 1
        assert means[-1] == pytest.approx(means[0] if not len(steps) else 1 - means[0], abs=0.04)
        ratios.append(means[-1])
        splits += list(steps)
        inside = child[(means > 0.3) & (means < 0.7)]
        if len(inside):
            assert inside.std(1) == pytest.approx(np.full(len(inside), 0.1), rel=0.1)
    assert np.histogram(ratios, 4, (0, 1))[0].min() > 50  # of 300, uniform
    assert min(Counter(splits)[k] for k in (1, 2, 3)) > 50
    extreme = crossover(np.full((4, 50), 1.5), np.full((4, 50), 1.5), rng)
    assert extreme.max() == 1.5


def test_the_niches_start_from_the_members_and_keep_a_specialist():
    """Two tasks: a is perfect at the first, b is the best at the second, which pays less."""

    class Niches(Scaled):
        task_names = ["x", "y"]

        def score(self, path, subset=None):
            self.calls.append((path, subset))
            if not path[0].scales:
                return np.array([0.5, 0.5])
            scales = scales_of(path)
            return [1, 0.2] * np.exp(-np.square(scales - np.eye(2)[:, None]).sum((1, 2)))

    scorer = Niches(None)
    scored = rivals.natural_niches(scorer, 300, 1)  # 3 uniform paths on three subsets, 5 scales
    first = [scales_of(path) for path, _ in scorer.calls[14:21]]
    assert [one[0].tolist() for one in first] == [[1, 0], [0, 1], *([s, s] for s in rivals.SCALES)]
    assert all((one == one[0]).all() for one in first)
    kept = [scorer.score(path).tolist() for path in scored.answers[1:]]
    assert max(x for x, _ in kept) > 0.9
    assert max(y for _, y in kept) > 0.18
    mean, *archive = map(scales_of, scored.answers)
    assert len(archive) == 10
    assert mean == pytest.approx(np.mean(archive, axis=0), abs=0.002)


def test_the_archive_is_scored_anew_on_each_subset():
    scorer = Scaled(bowl)
    rivals.natural_niches(scorer, 94, 1)
    asked = [path for path, _ in scorer.calls[14:]]
    met = set(asked[:20])  # seven starts, thirteen children
    assert len(met) == 20
    for turn in (20, 40, 60):
        kept, children = asked[turn : turn + 10], asked[turn + 10 : turn + 20]
        assert len(set(kept)) == len(set(children)) == 10
        assert set(kept) <= met
        assert not met & set(children)
        met |= set(children)


def test_a_neighbourhood_is_one_block_of_places():
    moves, incumbent = Neighbourhoods(6, 0), np.full((6, 3), 0.5)
    sizes, firsts, filled = Counter(), Counter(), Counter()
    for _ in range(2000):
        drawn = moves.draw(incumbent)
        changed = np.flatnonzero((drawn != incumbent).any(1))
        assert (np.diff(changed) == 1).all()
        sizes[len(changed)] += 1
        firsts[int(changed[0])] += len(changed) == 1
        block = drawn[changed]
        member = block.max() == 1 and block.sum() == len(block)
        if member:
            assert (block == block[0]).all()  # one member for all of the block
            filled[int(block[0].argmax())] += 1
        else:
            filled["around"] += 1
            assert np.abs(block - 0.5).max() < 0.9  # 4.5 of 0.2
    assert (incumbent == 0.5).all()
    assert set(sizes) == {1, 2, 4}  # 8 is more than there is
    assert min(sizes.values()) > 580  # a third of 2000, less 4 deviations
    assert min(firsts[k] for k in range(6)) > 70
    assert filled["around"] == pytest.approx(1000, abs=100)
    assert min(filled[i] for i in range(3)) > 270


def test_what_succeeds_is_drawn_more_often_and_widths_follow_one_success_in_five():
    moves, incumbent = Neighbourhoods(1, 0), np.full((1, 2), 0.5)
    width, members = 0.2, 0
    for i in range(20):
        drawn = moves.draw(incumbent)
        if sorted(drawn[0]) == [0, 1]:
            moves.tell(0.01)
            members += 1
        else:
            gain = (-0.01, 0.0)[i % 2]
            moves.tell(gain)
            width *= 1.5 if gain == 0 else 1.5**-0.25
            width = min(width, 0.5)
        assert moves.width == pytest.approx(width)
    assert 0 < members < 20
    moves.settle()
    sizes, fillings = moves.weights
    assert sizes == pytest.approx([0.8 + 0.2 * members / 20])
    assert fillings == pytest.approx([0.8, 1.0])
    moves.settle()  # a segment without draws changes nothing
    assert moves.weights[1] == pytest.approx([0.8, 1.0])


@pytest.mark.parametrize(
    ("worth", "start"),
    [(lambda scales: 0.2, [0.3, 0.3]), (lambda scales: 1 - abs(scales - 0.8).mean(), [0.8, 0.8])],
)
def test_the_neighbourhoods_start_at_the_best_of_what_is_known_and_never_get_worse(worth, start):
    scorer = Scaled(worth)
    scored = rivals.neighbourhood_search(scorer, 300, 2)
    found = [scales_of(text) for text, _ in scored[14:]]
    assert (found[0] == start).all()  # the incumbent, on the next subset
    drawn, last = found[1], found[0]
    changed = np.flatnonzero((drawn != last).any(1))
    assert 1 <= len(changed) <= 4
    assert (np.diff(changed) == 1).all()
    ends = [value for _, value in scored[14::20]]  # incumbents, at the start of each subset
    assert ends == sorted(ends)
    assert ends[0] == pytest.approx(worth(found[0]))


def test_a_block_of_a_merge_that_looks_is_found():
    """Two places want the third member, which no start has where the others want the first."""

    class Looks(Scaled):
        sources, members = ("a", "b", "regmean"), ("a", "b", "regmean")

    target = np.eye(3)[[0, 0, 2, 2, 0]]
    scorer = Looks(lambda scales: 1 - np.abs(scales - target).mean())
    scored = rivals.neighbourhood_search(scorer, 600, 1)
    assert scales_of(scored.answers[0]).tolist() == target.tolist()  # the same at the last ten ends


# -------------------------------------------------------------------------------- CMA-ES over orders


class Pair(Landscape):
    """Rewards a set of layers of two experts; what is missing, too much or twice there costs."""

    n_layers, stacks = 3, (range(3),)
    target = parse_path("a@0 b@1 b@2 a@2")

    def value(self, path):
        have, want = Counter(step for step in path if step.layer >= 0), Counter(self.target)
        return 1 - ((have - want).total() + (want - have).total()) / 10


def ordered(scorer, numbers) -> str:
    return path_text(rivals.path_of_order(scorer, np.array(numbers)))


def test_an_order_by_hand():
    """Two experts of three layers, twice: numbers of a0 a1 a2 b0 b1 b2 a0 a1 a2 b0 b1 b2."""
    numbers = [1.0, -1, 0, -1, 2, 3, -1, -1, 0.5, -1, -1, -1]
    assert ordered(Pair(), numbers) == "ties@-1 a@0 b@1 b@2 a@2"
    most = [0.1, 9, 8, 0.2, 7, 6, 0.3, 5, 0.4, 4, 0.5, -1]  # 11 above 0, 6 have places
    assert ordered(Pair(), most) == "ties@-1 a@1 a@2 b@1 b@2 a@1 b@0"
    assert ordered(Pair(), [-0.1] * 12) == "ties@-1"
    fixed = Pair()
    fixed.chooses_stem = False
    assert ordered(fixed, numbers) == "a@0 b@1 b@2 a@2"
    fixed.chooses_stem, fixed.sources = True, ("a", "b")  # without an operator: the base's stem
    assert ordered(fixed, numbers) == "a@0 b@1 b@2 a@2"


def test_an_order_keeps_two_stacks_apart():
    """An encoder of layers 0 and 1, a decoder of 2: a0 a1 a2 b0 b1 b2 a0 a1 a2 b0 b1 b2."""
    scorer = Pair()
    scorer.stacks = (range(2), range(2, 3))
    numbers = [1.0, -1, 1, -1, 1, 1, 1, -1, -1, -1, -1, 1]
    assert ordered(scorer, numbers) == "ties@-1 a@0 b@1 a@0 a@2 b@2 b@2"


@pytest.mark.parametrize("seed", range(3))
def test_cmaes_order_finds_a_known_set_of_layers(seed):
    scorer = Pair()
    scored = rivals.cmaes_order(scorer, 400, seed)
    # Of the uniform paths b is best: its first layer is too much, two of a's are missing.
    assert max(value for _, value in scored[:3]) == 0.7
    best, value = max(scored, key=lambda s: s[1])
    assert value == 1
    assert sorted(best.split()[1:]) == ["a@0", "a@2", "b@1", "b@2"]
    assert np.mean([value for _, value in scored[-50:]]) > 0.9


def test_the_order_starts_at_the_better_expert():
    class Second(Pair):
        def value(self, path):
            return sum(step.source == "b" for step in path) / 6

    scorer = Second()
    rivals.cmaes_order(scorer, 100, 1)
    first = [path for path, _ in scorer.calls[3:14]]
    shares = [sum(step.source == "b" for step in p) / max(1, len(p) - 1) for p in first]
    assert np.mean(shares) > 0.6


# ------------------------------------------------------------------------------------------ the curve


def test_the_curve_shows_the_best_path_so_far_on_all_data():
    scorer = Landscape()
    best = "ties@-1 a@0 b@1 ties@2 b@3"
    scored = [("a@-1 a@0 a@1 a@2 a@3", 0.2)] * 20 + [(best, 1.0)] * 35
    assert list(rivals.curve_of(scorer, scored, 10)) == [
        {"evaluations": n, "reward_split": value}
        for n, value in ((10, 20.0), (20, 20.0), (30, 100.0), (40, 100.0), (50, 100.0), (55, 100.0))
    ]
    # Each of the two paths once, and always on all examples.
    assert scorer.calls == [
        (parse_path("a@-1 a@0 a@1 a@2 a@3"), None),
        (parse_path(best), None),
    ]
    assert [c["evaluations"] for c in rivals.curve_of(scorer, scored)] == [50, 55]
