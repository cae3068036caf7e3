"""Other searches: their budgets, what they find where the best is known, the paths they give."""

from __future__ import annotations

import sys
from collections import Counter

import numpy as np
import pytest
import torch

from rmm_lab.errors import InputError
from rmm_lab.families.checkpoint import read_checkpoint
from rmm_lab.path import LayerPath
from rmm_lab.reward import Step, evaluate, parse_path, path_text, reward
from rmm_lab.search import rivals
from rmm_lab.search.layer_scales import BOUNDS

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
