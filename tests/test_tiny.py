"""The tiny problem: the same for the same seed, real experts, and a list of paths that leaves none out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from rmm_lab.course import tiny
from rmm_lab.env import MergingEnv
from rmm_lab.errors import InputError
from rmm_lab.figures import searches as figures
from rmm_lab.reward import Step, parse_path, path_text


@pytest.fixture(scope="module")
def problem():
    return tiny.tiny_problem()


# -------------------------------------------------------------------------------------- paths


def texts(paths) -> list[str]:
    return [path_text(path) for path in paths]


def test_paths_without_skip_and_back_are_one_source_for_each_layer():
    expected = [f"{a}@0 {b}@1" for a in "zab" for b in "zab"]  # in the order of the sources
    assert texts(tiny.all_paths(("z", "a", "b"), 2)) == expected


def test_paths_with_skips_are_counted_by_hand():
    paths = tiny.all_paths(("a", "b"), 2, skips=True)
    assert len(paths) == len(set(paths)) == 9  # (2 + 1) ** 2
    assert () in paths
    assert (Step("b", 1),) in paths
    assert len(tiny.all_paths("abcd", 3, skips=True)) == 125


def test_one_back_of_one_source_by_hand():
    """L = 2, one source: forward, or after layer 0 back to it once; the last layer ends the episode."""
    assert texts(tiny.all_paths(("a",), 2, backs=1)) == ["a@0 a@0 a@1", "a@0 a@1"]


def test_backs_without_end_match_a_count_by_formula():
    """A last layer can only come at the end: sum of 8^j over j <= 3, and 4 * 8^j over j <= 2."""
    paths = tiny.all_paths("abcd", 3, skips=True, backs=None, max_depth=3)
    assert len(paths) == sum(8**j for j in range(4)) + sum(4 * 8**j for j in range(3)) == 877


@pytest.mark.parametrize("backs", [0, 1, 2])
def test_paths_are_those_of_walks_through_the_environment(problem, backs):
    """All action sequences of the real environment with at most that many backs, by exhaustion."""

    class Free:
        sources, n_models, n_layers, n_subsets = ("a", "b"), 1, 2, 1
        stacks, task_names, chooses_stem = (range(2),), ["t"], False

        def score(self, path, subset=None):
            return np.zeros(1)

    env, found = MergingEnv(Free(), max_steps=20, max_depth=20), set()
    longest = 2 + 2 * backs
    for actions in itertools.product(range(4), repeat=longest):
        env.reset()
        used, done, info = 0, False, {}
        for action in actions:
            if done or (action == 3 and used == backs):
                break
            used += action == 3
            _, _, done, _, info = env.step(action)
        if done and not info["penalised"]:
            found.add(info["path"])
    assert sorted(found) == tiny.all_paths(("a", "b"), 2, skips=True, backs=backs)


@pytest.mark.parametrize(
    ("args", "options"),
    [(("", 2), {}), (("ab", 0), {}), (("ab", 2), {"backs": -1}), (("ab", 2), {"backs": None})],
)
def test_numbers_out_of_range_are_refused(args, options):
    with pytest.raises(InputError, match="all_paths: expected"):
        tiny.all_paths(*args, **options)


# ------------------------------------------------------------------------------------ the problem


@pytest.mark.slow
def test_a_problem_is_the_same_for_the_same_seed_and_leaves_the_global_generator(problem):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    again = tiny.tiny_problem()
    assert torch.equal(torch.rand(1), expected)
    for a, b in zip(problem.pool.experts, again.pool.experts, strict=True):
        assert a.weights.keys() == b.weights.keys()
        assert all(torch.equal(a.weights[k], b.weights[k]) for k in a.weights)
    for one, two in zip(problem.tasks, again.tasks, strict=True):
        assert torch.equal(one.split("reward").images, two.split("reward").images)


def test_the_problem_is_as_the_notebooks_say(problem):
    pool = problem.pool
    assert pool.sources == ("ramps", "stripes", "weight_average", "ties")
    assert (pool.n_models, pool.n_operators, pool.n_layers) == (2, 2, 3)
    assert [len(t.split("reward")) for t in problem.tasks] == [240, 180]
    for task in problem.tasks:
        images = [task.split(s).images.flatten(1) for s in ("train", "reward", "test")]
        for a, b in itertools.combinations(images, 2):  # no image is in two splits
            assert not (a[:, None] == b[None]).all(-1).any()
    with pytest.raises(InputError, match="split 'val'"):
        problem.tasks[0].split("val")


def test_experts_know_their_task_and_the_best_path_is_no_uniform_merge(problem):
    scorer = problem.scorer(fraction=1.0)
    paths = tiny.all_paths(problem.pool.sources, 3)
    scores = tiny.score_all(scorer, paths)
    assert scores.shape == (64, 2)
    uniform = [paths.index(tuple(Step(a, k) for k in range(3))) for a in problem.pool.sources]
    for i in range(2):
        assert scores[uniform[i], i] > 0.85
        assert scores[uniform[i], 1 - i] < 0.65
    assert scores.mean(1).max() > scores.mean(1)[uniform].max() + 0.01
    assert scores[5].tolist() == scorer.score(paths[5]).tolist()


def test_pictures_show_what_their_formulas_say():
    g = torch.Generator().manual_seed(0)
    right, down, left, up = tiny.ramps(torch.arange(4), g)
    assert (right[:, 3] > right[:, 0]).all()
    assert (left[:, 3] < left[:, 0]).all()
    assert (down[3] > down[0]).all()
    assert (up[3] < up[0]).all()
    bright = tiny.quarters(torch.tensor([0, 1, 2, 3]), g) > 0.5
    assert bright.flatten(1).sum(1).tolist() == [16, 32, 48, 64]  # pixels of 1 to 4 quarters
    upright, level, checks = tiny.stripes(torch.arange(3), g)
    assert torch.allclose(upright[0], upright[5])
    assert torch.allclose(level[:, 0], level[:, 5])
    assert not torch.allclose(checks[0], checks[5])


def test_neighbours_change_one_place_and_keep_its_layer():
    found = figures.neighbours(parse_path("c@0 t:scale=0.5/0.25@1"), ("a", "b", "c"))
    assert [texts(paths) for paths in found] == [
        [f"{source}@0 t:scale=0.5/0.25@1" for source in "abc"],
        [f"c@0 {source}@1" for source in "abc"],
    ]


def test_the_legend_of_sorted_rewards_tells_ranks():
    figure = figures.sorted_rewards(np.array([0.2, 0.9, 0.5]), {"a": 2, "b": 0}, top=2)
    texts = [t.get_text() for t in figure.axes[0].get_legend().get_texts()]
    assert texts == ["the 2 best of 3 paths", "a: rank 2, 50.0 %", "b: rank 3, 20.0 %"]
