"""Records of searches against the searches' own tables, and paths compared by hand."""

from __future__ import annotations

import functools
import json
import types

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rmm_lab import ppo
from rmm_lab.course.episode_walk import Walk
from rmm_lab.course.run_record import Run, align, difference
from rmm_lab.engine.block_view import BlockView
from rmm_lab.env import MergingEnv
from rmm_lab.errors import InputError
from rmm_lab.reward import Step, parse_path, path_text
from rmm_lab.search.config import configure
from rmm_lab.search.pipeline import train
from rmm_lab.search.problem import problem_of

# ------------------------------------------------------------------------------- where paths differ


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("m0@0 m1@1 op0@2", "m0@0 m1@1 op0@2", []),
        ("m0@0 m1@1", "m0@0 op1@1", ["layer 1: m1 in the first, op1 in the second"]),
        (
            "m0@0 t:scale=0.5/0.25@1",
            "m0@0 t:scale=0.5/1@1",
            ["layer 1: t:scale=0.5/0.25 in the first, t:scale=0.5/1 in the second"],
        ),
        (
            "m0@0 m1@1 op0@2",
            "m0@0 op0@2",
            [
                "layer 1: m1 in the first, skipped in the second",
                "length: 3 layers in the first, 2 in the second",
            ],
        ),
        (
            "m0@0 m1@1",
            "m0@0 m1@1 op1@1",
            [
                "layer 1: op1 in the second only, one more on the stack",
                "length: 2 layers in the first, 3 in the second",
            ],
        ),
        ("op0@-1 m0@0", "op1@-1 m0@0", ["stem: op0 in the first, op1 in the second"]),
        ("op0@-1 m0@0", "m0@0", ["stem: op0 in the first, not chosen in the second"]),
    ],
)
def test_differences_by_hand(first, second, expected):
    a, b = parse_path(first), parse_path(second)
    assert difference(a, b) == expected
    swapped = {" in the first": " in the second", " in the second": " in the first"}
    assert len(difference(b, a)) == len(expected)
    for line in difference(b, a):
        assert any(end in line for end in swapped)


def test_differences_in_two_stacks_name_encoder_and_decoder():
    a, b = parse_path("m0@0 m1@2"), parse_path("m0@0 m0@1 op1@2")
    assert difference(a, b, (range(1), range(1, 3)))[:2] == [
        "dec 0: m0 in the second, skipped in the first",
        "dec 1: m1 in the first, op1 in the second",
    ]


steps = st.builds(Step, st.sampled_from("abc"), st.integers(0, 2))
paths = st.lists(steps, max_size=5).map(tuple)


@given(paths, paths)
def test_an_alignment_covers_both_paths_at_the_least_cost(a, b):
    @functools.cache
    def least(i, j):
        if i == len(a) or j == len(b):
            return len(a) - i + len(b) - j
        pair = (a[i] != b[j]) + least(i + 1, j + 1) if a[i].layer == b[j].layer else 99
        return min(pair, 1 + least(i + 1, j), 1 + least(i, j + 1))

    pairs = align(a, b)
    assert [i for i, _ in pairs if i is not None] == list(range(len(a)))
    assert [j for _, j in pairs if j is not None] == list(range(len(b)))
    gaps = sum(i is None or j is None for i, j in pairs)
    both = [(a[i], b[j]) for i, j in pairs if i is not None and j is not None]
    assert all(x.layer == y.layer for x, y in both)
    assert gaps + sum(x != y for x, y in both) == least(0, 0)


# -------------------------------------------------------------------------- a search by the agent alone


@pytest.fixture(scope="module")
def searched(tiny, tmp_path_factory):
    """A finished search on the tiny problem: its folder, its result, its problem."""
    return search("agent", tiny, tmp_path_factory.mktemp("searched") / "run", episodes=12)


def search(preset, tiny, folder, **options):
    config = configure(
        preset, **tiny, operators=("task_arithmetic:scale=0.5", "ties"), episodes_per_update=4, seed=3,
        data_fraction=0.5, finalists=3, quiet=True, run_dir=folder, **options,
    )  # fmt: skip
    problem = problem_of(config.problem)
    return folder, train(config, problem, table=False), problem


def test_a_run_read_from_its_folder_is_that_of_the_result(searched):
    folder, result, problem = searched
    run = Run.of(result, problem)
    for read in (Run.read(folder), Run.read(folder, problem)):
        assert (read.episodes, read.finalists) == (run.episodes, run.finalists)
        assert [u["entropy"] for u in read.updates] == [u["entropy"] for u in result.updates]
        assert torch.equal(read.policies, run.policies)
        assert read.action_names == run.action_names
    assert run.policies.shape == (3, 4, 6)  # updates; the stem and three layers; actions
    assert run.action_names == (
        *("e1", "e2", "task_arithmetic:scale=0.5", "ties"),
        *("skip", "back"),
    )
    assert (run.first, run.agent_stacks) == (-1, (range(3),))
    assert torch.equal(run.policy(11), run.policies[2])


def test_named_paths_are_those_of_the_search(searched):
    folder, result, problem = searched
    run = Run.of(result, problem)
    rows = json.loads((folder / "finalists.json").read_text())
    assert list(run.named) == [
        "best",
        "greedy",
        *(f"finalist {i}" for i in range(2, len(rows) + 1)),
    ]
    assert path_text(run.path("best")) == rows[0]["path"]
    for i, row in enumerate(rows[1:], 2):
        assert path_text(run.path(f"finalist {i}")) == row["path"]
        assert run.named[f"finalist {i}"]["reward"] == row["reward"]
    greedy = ppo.play(
        MergingEnv(problem.scorer()), result.agent, None, masked=True, options={"subset": None}
    )
    assert run.path("greedy") == greedy.info["path"]
    for i, row in enumerate(result.episodes):
        assert path_text(run.path(i)) == row["path"]


def test_scores_are_those_of_the_whole_reward_split(searched):
    _, result, problem = searched
    run = Run.of(result, problem)
    for name in run.named:
        scores = run.scores(run.path(name))
        assert list(scores) == [task.name for task in problem.tasks]
        assert np.mean(list(scores.values())) == pytest.approx(run.named[name]["reward"])
    assert run.named["best"]["reward"] == pytest.approx(result.reward)


@pytest.mark.parametrize("name", ["worst", "finalist 1", "finalist 99", ""])
def test_an_unknown_path_is_refused(searched, name):
    _, result, problem = searched
    with pytest.raises(InputError, match="one of best, greedy"):
        Run.of(result, problem).path(name)


@pytest.mark.parametrize("number", [-1, 12])
def test_an_episode_that_was_not_played_is_refused(searched, number):
    _, result, problem = searched
    with pytest.raises(InputError, match="episode: expected 0 to 11"):
        Run.of(result, problem).path(number)


def test_the_problem_of_another_search_is_refused(searched, tiny):
    folder, _, _ = searched
    other = problem_of(configure("agent", **tiny, operators=("ties",), seed=3).problem)
    with pytest.raises(InputError, match=r"expected the problem of its config\.json"):
        Run.read(folder, other)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("episodes.csv", b"path,episode\nm0@0\n"),  # half a line
        ("updates.csv", b"\xff\xfe"),  # bytes that are no text
        ("finalists.json", b"["),
        ("policies.safetensors", b"x"),
        ("policies.safetensors", None),  # as of a search that has not ended
    ],
)
def test_a_folder_that_is_not_whole_is_refused(searched, tmp_path, name, content):
    folder, _, _ = searched
    for file in folder.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=r"none that can be read|an altered one"):
        Run.read(tmp_path)


@pytest.mark.parametrize(("stem", "source", "first"), [("agent", "base", -1), ("ties", "ties", 0)])
def test_a_path_without_a_stem_takes_the_problems(stem, source, first):
    spec = types.SimpleNamespace(stem=stem)
    run = Run(types.SimpleNamespace(spec=spec), [], [], [], torch.zeros(0, 0, 0))
    assert run.first == first
    assert path_text(run.with_stem(parse_path("m1@0"))) == f"{source}@-1 m1@0"
    assert path_text(run.with_stem(parse_path("op1@-1 m1@0"))) == "op1@-1 m1@0"
    assert path_text(run.with_stem(())) == f"{source}@-1"


# ---------------------------------------------------------------------- uniform paths, agent, scales


@pytest.fixture(scope="module")
def in_phases(tiny, tmp_path_factory):
    """The same by the preset weights: 4 uniform paths, 8 of the agent in blocks, 8 of scales."""
    folder = tmp_path_factory.mktemp("phases") / "run"
    return search("weights", tiny, folder, episodes=20, cma_share=0.5)


def test_a_run_of_the_preset_weights_is_one_of_sublayers(in_phases):
    folder, result, problem = in_phases
    for run in (Run.of(result, problem), Run.read(folder)):
        assert run.first == -1
        assert run.agent_stacks == (range(3),)
        phases = [row["phase"] for row in run.episodes]
        assert phases == ["uniform"] * 4 + ["agent"] * 8 + ["scales"] * 8
        assert {s.source for s in run.path(2)} == {"task_arithmetic:scale=0.5"}
        assert [s.layer for s in run.path(2)] == list(range(-1, 6))
        assert all(len(step.scales) == 2 for step in run.path(19))
        mean = np.mean(list(run.scores(run.path("best")).values()))
        assert mean == pytest.approx(result.reward)
    env = MergingEnv(view := BlockView(problem.scorer()))
    greedy = ppo.play(env, result.agent, None, masked=True, options={"subset": None})
    assert run.path("greedy") == view.expand(greedy.info["path"])


def test_each_episode_has_the_policy_that_played_it(in_phases):
    run = Run.of(*in_phases[1:])
    assert run.policies.shape == (2, 4, 6)
    assert [run.policy(i) for i in range(4)] == [None] * 4
    assert [torch.equal(run.policy(i), run.policies[0]) for i in (4, 7, 8)] == [True, True, False]
    for last in (8, 11, 12, 19):
        assert torch.equal(run.policy(last), run.policies[1])


def test_the_agent_of_a_default_run_walks_through_blocks(in_phases):
    _, result, problem = in_phases
    walk = Walk(BlockView(problem.scorer()), agent=result.agent)
    while not walk.done:
        walk.agent_step()
    assert (walk.env.layer, walk.place()) == (3, "the end")  # three blocks, not six layers
    with pytest.raises(InputError, match="agent: expected one for"):
        Walk(problem.scorer(), agent=result.agent)


@pytest.mark.parametrize(
    ("unit", "expected"),
    [("both", (range(2), range(2, 4))), ("sublayer", (range(4), range(4, 10)))],
)
def test_the_agents_places_in_two_stacks(unit, expected):
    """A T5 of two encoder blocks (two parts each) and two decoder blocks (three): blocks, or parts."""
    blocks = (range(2), range(2, 4), range(4, 7), range(7, 10))
    pool = types.SimpleNamespace(blocks=blocks, stacks=(range(4), range(4, 10)))
    spec = types.SimpleNamespace(unit=unit)
    run = Run(types.SimpleNamespace(pool=pool, spec=spec), [], [], [], torch.zeros(0, 0, 0))
    assert run.agent_stacks == expected
