"""Walks against hand-walked episodes and the environment itself; runs against the search's own tables."""

from __future__ import annotations

import functools
import json
import types

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_env import BACK, SKIP, Scores

from rmm_lab import ppo
from rmm_lab.course import episode_walk as walk_module
from rmm_lab.course.episode_walk import Run, Walk, align, difference
from rmm_lab.engine import scorer as scoring
from rmm_lab.env import MergingEnv
from rmm_lab.errors import InputError
from rmm_lab.search.problem import load_problem

SOURCES = ("m0", "m1", "op0", "op1")


def agent_for(env: MergingEnv, preferred: int | None = None, value: float = 0.0) -> ppo.Agent:
    """An agent that does not look: the same preference everywhere, uniform for None."""
    agent = ppo.Agent(int(np.prod(env.observation_space.shape)), int(env.action_space.n))
    with torch.no_grad():
        for net in (agent.actor, agent.critic):
            net[-1].weight.zero_()
            net[-1].bias.zero_()
        if preferred is not None:
            agent.actor[-1].bias[preferred] = 3.0
        agent.critic[-1].bias.fill_(value)
    return agent


# ------------------------------------------------------------------------------------------- Walk


def test_a_walk_by_hand():
    """m1 at 0, back, op0 at 0, skip 1, m0 at 2, as in the test of the environment."""
    scorer = Scores(score=lambda path, subset: [0.2, 0.8])
    walk = Walk(scorer)
    layers = []
    for action in ("m1", BACK, "op0", "skip", 0):
        assert not walk.done
        walk.act(action)
        layers.append(walk.layer)
    assert layers == [1, 0, 1, 2, 3]
    assert walk.actions == [1, BACK, 2, SKIP, 0]
    assert walk.path == ((1, 0), (2, 0), (0, 2))
    assert walk.text() == "m1@0 op0@0 m0@2"
    assert walk.merging_map.tolist() == [[0, 0, 1], [1, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert walk.done
    assert not walk.penalised
    assert walk.scores == {"t0": 0.2, "t1": 0.8}
    assert walk.reward == pytest.approx(0.5)
    assert scorer.calls == [(((1, 0), (2, 0), (0, 2)), None)]  # all examples by default


def test_the_subset_is_the_one_asked_for():
    scorer = Scores()
    walk = Walk(scorer, subset=1)
    for _ in range(3):
        walk.act("m0")
    assert scorer.calls == [(((0, 0), (0, 1), (0, 2)), 1)]


def test_what_was_given_out_is_not_changed_by_later_actions():
    walk = Walk(Scores())
    before = walk.merging_map
    walk.act(0)
    assert not before.any()


def test_undo_of_a_finished_walk_makes_it_run_again():
    walk = Walk(Scores())
    for _ in range(3):
        walk.act("m0")
    walk.undo()
    assert (walk.done, walk.reward, walk.scores, walk.layer) == (False, None, None, 2)
    assert walk.path == ((0, 0), (0, 1))
    walk.act("op1")
    assert walk.text() == "m0@0 m0@1 op1@2"


def test_undo_of_a_penalty_and_reset():
    walk = Walk(Scores())
    walk.act("back")
    assert walk.penalised
    walk.undo()
    assert (walk.done, walk.penalised, walk.illegal, walk.actions) == (False, False, False, [])
    with pytest.raises(InputError, match="undo: expected an action to take back"):
        walk.undo()
    walk.act("m1")
    walk.reset()
    assert (walk.actions, walk.path, walk.layer) == ([], (), 0)


@given(st.lists(st.integers(0, 5), max_size=14), st.integers(0, 14), st.booleans())
def test_undoing_gives_what_the_environment_gives_without_these_actions(actions, n, stem):
    def scorer():
        return Scores(chooses_stem=stem, score=lambda path, subset: [len(path) / 20, 0.5])

    walk, done = Walk(scorer()), []
    for action in actions:
        if walk.done:
            break
        walk.act(action)
        done.append(action)
    undone = min(n, len(done))
    for _ in range(undone):
        walk.undo()
    kept = done[: len(done) - undone]
    env = MergingEnv(scorer())
    _, info = env.reset(options={"subset": None})
    reward, ended = None, False
    for action in kept:
        _, reward, terminated, truncated, info = env.step(action)
        ended = terminated or truncated
    assert walk.actions == kept
    assert walk.path == info["path"]
    assert walk.legal.tolist() == info["action_mask"].astype(bool).tolist()
    assert np.array_equal(walk.merging_map, env.merging_map)
    assert (walk.layer, walk.done) == (env.layer, ended)
    assert walk.reward == (reward if ended else None)
    assert walk.scores == info.get("scores")


@pytest.mark.parametrize("action", ["ties", "m9", "", 6, -1])
def test_an_unknown_action_is_refused_and_nothing_happens(action):
    walk = Walk(Scores())
    with pytest.raises(InputError, match="m0, m1, op0, op1, skip, back"):
        walk.act(action)
    assert walk.actions == []


def test_an_ended_walk_takes_no_action():
    walk = Walk(Scores(layers=1))
    walk.act(0)
    with pytest.raises(InputError, match="ended one; undo or start again"):
        walk.act(0)
    assert walk.actions == [0]


def test_a_scorer_that_fails_leaves_the_walk_where_it_was():
    def fail(path, subset):
        raise ZeroDivisionError("no examples")

    walk = Walk(Scores(score=fail))
    for _ in range(2):
        walk.act("m1")
    with pytest.raises(ZeroDivisionError):
        walk.act("m1")
    assert (walk.layer, walk.done, walk.path) == (2, False, ((1, 0), (1, 1)))
    assert walk.actions == [1, 1]


def test_sentences_by_hand():
    walk = Walk(Scores(score=lambda path, subset: [0.5, 0.75]))
    said = [walk.sentence()]
    for action in ("op0", "back", "m1", "skip", "m0"):
        walk.act(action)
        said.append(walk.sentence())
    assert said == [
        "nothing chosen yet; next: layer 0",
        "layer 0: took op0; next: layer 1",
        "layer 1: went back; next: layer 0, where the next choice stacks on top",
        "layer 0: took m1; next: layer 1",
        "layer 1: skipped; next: layer 2",
        "layer 2: took m0; the end: the reward is 0.625",
    ]


def test_sentences_of_penalties():
    walk = Walk(Scores())
    walk.act("back")
    assert walk.sentence() == (
        "back at layer 0, the first of a stack: illegal, the episode ends with a penalty of -0.1 "
        "(rewards are 0 to 1)"
    )
    long = Walk(Scores(), max_steps=3, max_depth=2)
    for action in ("skip", "back", "skip"):
        long.act(action)
    assert long.sentence() == (
        "layer 0: skipped; too long (at most 3 actions and 2 layers), the episode ends with a penalty "
        "of -0.1 (rewards are 0 to 1)"
    )
    assert not long.illegal
    assert walk.illegal


def test_places_of_two_stacks_and_their_border():
    walk = Walk(Scores(layers=4, stacks=(range(1), range(1, 4)), chooses_stem=True))
    places = [walk.place()]
    for _ in range(2):
        walk.act("m0")
        places.append(walk.place())
    assert places == ["stem", "enc 0", "dec 0"]
    assert not walk.legal[BACK]
    assert walk.does("back") == "illegal at dec 0: it leads to the penalty"
    walk.act("back")
    assert walk.sentence().startswith("back at dec 0, the first of a stack: illegal")
    assert walk.place() == "the end"


def test_what_an_action_would_do():
    walk = Walk(Scores(chooses_stem=True))
    assert walk.does("m0") == "take m0's stem; go to layer 0"
    assert walk.does("skip") == "leave the base's stem; go to layer 0"
    walk.act("m0")
    assert walk.does("op1") == "append layer 0 of op1; go to layer 1"
    assert walk.does("skip") == "append nothing; go to layer 1"
    walk.act("m1")
    assert walk.does("back") == "append nothing, go back to layer 0 and stack on top"
    walk.act("m1")
    assert walk.does("m1") == "append layer 2 of m1; go to the end"
    walk.act("m1")
    assert walk.does("m1") == "the walk has ended"


# ------------------------------------------------------------------------------- the agent's policy


def test_probabilities_are_masked_and_the_value_is_the_critics():
    scorer = Scores()
    agent = agent_for(MergingEnv(scorer), value=0.75)
    walk = Walk(scorer, agent=agent)
    # Uniform over four sources and skip; back is illegal at layer 0.
    assert walk.probabilities() == pytest.approx([0.2] * 5 + [0])
    assert walk.value() == pytest.approx(0.75)
    walk.act("m0")
    assert walk.probabilities() == pytest.approx([1 / 6] * 6)
    open_walk = Walk(scorer, agent=agent, masked=False)
    assert open_walk.probabilities() == pytest.approx([1 / 6] * 6)


def test_the_probabilities_are_a_softmax_of_the_logits():
    scorer = Scores()
    walk = Walk(scorer, agent=agent_for(MergingEnv(scorer), preferred=2))
    total = np.exp(3) + 4
    expected = np.array([1, 1, np.exp(3), 1, 1, 0]) / total
    assert walk.probabilities() == pytest.approx(expected)


def test_without_an_agent_and_at_the_end_there_are_none():
    walk = Walk(Scores(layers=1))
    assert walk.probabilities() is None
    assert walk.value() is None
    with pytest.raises(InputError, match="found no agent"):
        walk.agent_step()
    walk = Walk(Scores(layers=1), agent=agent_for(MergingEnv(Scores(layers=1))))
    assert walk.agent_step() == 0
    assert walk.probabilities() is None
    assert walk.value() is None
    with pytest.raises(InputError, match="found an ended walk"):
        walk.agent_step()


def test_the_agents_steps_are_its_greedy_episode():
    scorer = Scores()
    torch.manual_seed(3)
    env = MergingEnv(scorer)
    agent = ppo.Agent(int(np.prod(env.observation_space.shape)), 6)
    with torch.no_grad():
        agent.actor[-1].weight.mul_(100)  # a policy that looks at where it stands
    _, info = ppo.play(env, agent, None, masked=True, options={"subset": None})
    walk = Walk(scorer, agent=agent)
    while not walk.done:
        walk.agent_step()
    assert walk.path == info["path"]
    assert len({a for a, _ in walk.path}) > 1


def test_sampled_steps_follow_the_probabilities():
    scorer = Scores(n_subsets=1)
    agent = agent_for(MergingEnv(scorer), preferred=1)
    walk, generator = Walk(scorer, agent=agent), torch.Generator().manual_seed(0)
    counts, n = np.zeros(6), 600
    for _ in range(n):
        walk.reset()
        counts[walk.agent_step(generator)] += 1
    total = np.exp(3) + 4
    expected = np.array([1, np.exp(3), 1, 1, 1, 0]) / total
    assert counts[BACK] == 0
    assert np.abs(counts / n - expected).max() < 0.06  # 4 standard deviations
    assert counts[0] > 0


@pytest.mark.parametrize("observation", ["map", "map+cursor"])
def test_an_agent_of_another_problem_is_refused(observation):
    agent = agent_for(MergingEnv(Scores(layers=2), observation=observation))
    with pytest.raises(InputError, match="agent: expected one for"):
        Walk(Scores(layers=3), agent=agent, observation=observation)
    Walk(Scores(layers=2), agent=agent, observation=observation)


# ------------------------------------------------------------------------------- where paths differ


def test_differences_by_hand():
    a = ((0, 0), (1, 1), (2, 2))
    assert difference(a, a, SOURCES) == []
    assert difference(a, ((0, 0), (3, 1), (2, 2)), SOURCES) == [
        "layer 1: m1 in the first, op1 in the second"
    ]
    assert difference(a, ((0, 0), (2, 2)), SOURCES) == [
        "layer 1: m1 in the first, skipped in the second",
        "length: 3 layers in the first, 2 in the second",
    ]
    stacked = ((0, 0), (1, 1), (3, 1), (2, 2))
    assert difference(a, stacked, SOURCES) == [
        "layer 1: op1 in the second only, one more on the stack",
        "length: 3 layers in the first, 4 in the second",
    ]
    assert difference(stacked, a, SOURCES)[0] == (
        "layer 1: op1 in the first only, one more on the stack"
    )


def test_differences_at_the_stem_and_in_two_stacks():
    stacks = (range(1), range(1, 3))
    a, b = ((2, -1), (0, 0), (1, 2)), ((0, 0), (0, 1), (3, 2))
    assert difference(a, b, SOURCES, stacks) == [
        "stem: op0 in the first, not chosen in the second",
        "dec 0: m0 in the second, skipped in the first",
        "dec 1: m1 in the first, op1 in the second",
        "length: 2 layers in the first, 3 in the second",
    ]
    assert difference(a, ((3, -1), *a[1:]), SOURCES) == [
        "stem: op0 in the first, op1 in the second"
    ]


paths = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=5).map(tuple)


@given(paths, paths)
def test_an_alignment_covers_both_paths_at_the_least_cost(a, b):
    @functools.cache
    def least(i, j):
        if i == len(a) or j == len(b):
            return len(a) - i + len(b) - j
        pair = (a[i] != b[j]) + least(i + 1, j + 1) if a[i][1] == b[j][1] else 99
        return min(pair, 1 + least(i + 1, j), 1 + least(i, j + 1))

    pairs = align(a, b)
    assert [i for i, _ in pairs if i is not None] == list(range(len(a)))
    assert [j for _, j in pairs if j is not None] == list(range(len(b)))
    gaps = sum(i is None or j is None for i, j in pairs)
    both = [(a[i], b[j]) for i, j in pairs if i is not None and j is not None]
    assert all(x[1] == y[1] for x, y in both)
    assert gaps + sum(x != y for x, y in both) == least(0, 0)


# -------------------------------------------------------------------------------------------- Run


@pytest.fixture(scope="module")
def searched(tiny, tmp_path_factory):
    """A finished search on the tiny problem: its folder, its result, its problem."""
    folder = tmp_path_factory.mktemp("walk") / "run"
    args = ppo.Args(
        **tiny,
        preset="agent",
        operators=("task_arithmetic:scale=0.5", "ties"),
        episodes=12,
        episodes_per_update=4,
        seed=3,
        data_fraction=0.5,
        finalists=3,
        quiet=True,
        run_dir=folder,
    )
    problem = load_problem(**tiny, operators=args.operators, stem="agent", seed=3)
    return folder, ppo.train(args, problem=problem, table=False), problem


def test_a_run_read_from_its_folder_is_that_of_the_result(searched):
    folder, result, problem = searched
    run, read = Run.of(result, problem), Run.read(folder)
    for name in ("sources", "n_layers", "first", "stacks", "stem", "task_names", "episodes"):
        assert getattr(run, name) == getattr(read, name), name
    assert [u["entropy"] for u in read.updates] == [u["entropy"] for u in result.updates]
    assert torch.equal(run.policies, read.policies)
    assert run.policies.shape == (3, 4, 6)  # updates; the stem and three layers; actions
    assert run.sources == ("e1", "e2", "task_arithmetic:scale=0.5", "ties")
    assert run.action_names == (*run.sources, "skip", "back")
    assert (run.first, run.n_layers, run.stacks) == (-1, 3, (range(3),))
    assert [run.path(n) for n in run.names] == [read.path(n) for n in run.names]


def test_named_paths_are_those_of_the_search(searched):
    folder, result, problem = searched
    run = Run.of(result, problem)
    steps, stem = run.steps(run.path("best"))
    assert steps == list(result.path.steps)
    assert stem == result.path.stem
    rows = json.loads((folder / "finalists.json").read_text())
    assert run.names[:2] == ["best", "greedy"]
    assert run.names[2:] == [f"finalist {i}" for i in range(2, len(rows) + 1)]
    for i, row in enumerate(rows[1:], 2):
        words = [f"{run.sources[a]}@{k}" for a, k in run.path(f"finalist {i}")]
        assert " ".join(words) == row["path"]
        assert run.finalist(f"finalist {i}")["reward"] == row["reward"]
    _, greedy = ppo.play(
        MergingEnv(problem.scorer()), result.agent, None, masked=True, options={"subset": None}
    )
    assert run.path("greedy") == greedy["path"]
    for i, row in enumerate(result.episodes):
        assert " ".join(f"{run.sources[a]}@{k}" for a, k in run.path(i)) == row["path"]


def test_scores_are_those_of_the_whole_reward_split(searched):
    _, result, problem = searched
    run = Run.of(result, problem)
    path = run.path("best")
    steps, stem = run.steps(path)
    expected = scoring.evaluate(problem.pool, problem.tasks, steps, stem, "reward")
    assert run.scores(path) == dict(zip(run.task_names, expected.tolist(), strict=True))
    assert np.mean(expected) == pytest.approx(result.reward)


def test_the_problem_is_loaded_when_a_score_is_asked_for_and_not_before(searched, monkeypatch):
    folder, result, _ = searched
    calls = []

    def load(*args, **kwargs):
        calls.append(kwargs["seed"])
        problem = load_problem(*args, **kwargs)
        for task in problem.tasks:
            split = task.split

            def only_reward(name, split=split):
                assert name == "reward"
                return split(name)

            monkeypatch.setattr(task, "split", only_reward)
        return problem

    monkeypatch.setattr(walk_module, "load_problem", load)
    run = Run.read(folder)
    run.path("greedy")
    assert calls == []
    for _ in range(2):
        assert np.mean(list(run.scores(run.path("best")).values())) == pytest.approx(result.reward)
    assert calls == [3]


def test_a_problem_of_another_search_is_refused(searched):
    folder, _, _ = searched
    other = types.SimpleNamespace(pool=types.SimpleNamespace(sources=("e1", "ties")))
    run = Run.read(folder, other)
    with pytest.raises(InputError, match="the sources e1, e2"):
        run.scores(run.path("best"))


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


def test_a_search_that_has_not_ended_is_refused(searched, tmp_path):
    folder, _, _ = searched
    for name in ("config.json", "episodes.csv", "updates.csv"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(InputError, match="of a search that has ended"):
        Run.read(tmp_path)
    with pytest.raises(InputError, match=r"config\.json"):
        Run.read(tmp_path / "none")


@pytest.mark.parametrize("damage", [b"700,0,1", b"\xff\xfe"])
def test_a_damaged_table_is_refused(searched, tmp_path, damage):
    """Half a last line, and bytes that are no text."""
    folder, _, _ = searched
    for file in folder.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with (tmp_path / "episodes.csv").open("ab") as stream:
        stream.write(damage)
    with pytest.raises(InputError, match="none that can be read"):
        Run.read(tmp_path)


def test_broken_files_are_refused_and_policies_may_lack(searched, tmp_path):
    folder, _, _ = searched
    names = ("config.json", "path.json", "finalists.json", "episodes.csv", "updates.csv")
    for name in names:
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert Run.read(tmp_path).policies is None
    made = torch.rand(3, 4, 6)
    save_file({"policies": made}, tmp_path / "policies.safetensors")
    assert torch.equal(Run.read(tmp_path).policies, made)
    for name, content in (
        ("policies.safetensors", b"x"),
        ("finalists.json", b"["),
        ("episodes.csv", b""),
    ):
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="run folder"):
            Run.read(tmp_path)
        (tmp_path / name).write_bytes(before)


def test_a_path_without_a_chosen_stem_takes_the_runs():
    pool = types.SimpleNamespace(sources=SOURCES, n_layers=3, stacks=(range(3),), blocks=())
    result = types.SimpleNamespace(episodes=[], updates=[], finalists=[], policies=None)
    for stem, expected, first in (("agent", "base", -1), ("ties", "ties", 0)):
        run = Run.of(result, types.SimpleNamespace(pool=pool, stem=stem, tasks=[]))
        assert (run.steps(((1, 0),)), run.first) == (([("m1", 0)], expected), first)
        assert run.steps(((3, -1), (1, 0))) == ([("m1", 0)], "op1")
        assert run.steps(()) == ([], expected)


# --------------------------------------------------------------- Run: uniform paths, agent, local search


@pytest.fixture(scope="module")
def in_phases(tiny, tmp_path_factory):
    """The same by the default preset: 4 uniform paths, 4 of the agent, 4 of the local search, 8 of scales."""
    folder = tmp_path_factory.mktemp("phases") / "run"
    args = ppo.Args(
        **tiny,
        operators=("task_arithmetic:scale=0.5", "ties"),
        episodes=20,
        episodes_per_update=2,
        seed=3,
        data_fraction=0.5,
        finalists=3,
        finish=0.25,
        scales=0.5,
        quiet=True,
        run_dir=folder,
    )
    problem = load_problem(**tiny, operators=args.operators, stem="agent", seed=3, unit="sublayer")
    return folder, ppo.train(args, problem=problem, table=False), problem


def test_a_run_of_the_default_preset_is_one_of_sublayers(in_phases):
    folder, result, problem = in_phases
    run, read = Run.of(result, problem), Run.read(folder)
    for one in (run, read):
        assert (one.n_layers, one.stacks, one.first) == (6, (range(6),), -1)
        assert one.blocks == (range(2), range(2, 4), range(4, 6))
        assert one.agent_stacks == (range(3),)
        assert one.n_start == 4
        phases = [one.phase(i) for i in range(20)]
        assert phases == (
            ["uniform path"] * 4 + ["agent"] * 4 + ["local search"] * 4 + ["scales"] * 8
        )
        own = [source for source, _ in one.path(19)]
        assert all(str(source).startswith("task_arithmetic:scale=") for source in own)
        assert one.difference(one.path(19), one.path(2))[0] == (
            f"stem: {own[0]} in the first, task_arithmetic:scale=0.5 in the second"
        )
        assert one.path(2) == tuple((2, k) for k in range(-1, 6))
    assert torch.equal(run.policies, read.policies)
    assert [run.path(n) for n in run.names] == [read.path(n) for n in run.names]
    steps, stem = read.steps(read.path("best"))
    assert (steps, stem) == (list(result.path.steps), result.path.stem)
    env = MergingEnv(scoring.Blocks(problem.scorer()), observation="map+cursor")
    _, greedy = ppo.play(env, result.agent, None, masked=True, options={"subset": None})
    assert run.path("greedy") == env.scorer.expand(greedy["path"])


def test_the_scores_of_a_default_run_are_those_of_its_finalists(in_phases):
    folder, result, _ = in_phases
    run = Run.read(folder)
    for name in run.names:
        mean = np.mean(list(run.scores(run.path(name)).values()))
        assert mean == pytest.approx(run.finalist(name)["reward"])
    assert np.mean(list(run.scores(run.path("best")).values())) == pytest.approx(result.reward)


def test_each_episode_has_the_policy_that_played_it(in_phases):
    run = Run.of(*in_phases[1:])
    assert run.policies.shape == (2, 4, 6)
    assert run.policy(0) is None
    assert [torch.equal(run.policy(i), run.policies[0]) for i in (4, 5, 6)] == [True, True, False]
    for last in (6, 7, 8, 19):
        assert torch.equal(run.policy(last), run.policies[1])


def test_the_agent_of_a_default_run_walks_through_blocks(in_phases):
    _, result, problem = in_phases
    walk = Walk(scoring.Blocks(problem.scorer()), agent=result.agent)
    while not walk.done:
        walk.agent_step()
    assert (walk.layer, walk.place()) == (3, "the end")  # three blocks, not six layers
    with pytest.raises(InputError, match="agent: expected one for"):
        Walk(problem.scorer(), agent=result.agent)


def test_a_default_run_refuses_a_problem_in_blocks(in_phases, tiny):
    folder, _, _ = in_phases
    problem = load_problem(**tiny, operators=("task_arithmetic:scale=0.5", "ties"), seed=3)
    run = Run.read(folder, problem)
    with pytest.raises(InputError, match="6 layers, found 3; load it with unit='sublayer'"):
        run.scores(run.path("best"))


def test_a_default_run_on_a_problem_in_blocks_stays_in_blocks(tiny, tmp_path):
    args = ppo.Args(
        **tiny,
        operators=("ties",),
        episodes=9,
        quiet=True,
        run_dir=tmp_path / "run",
        finish=0.5,
        scales=0.0,
    )
    problem = load_problem(**tiny, operators=("ties",), seed=args.seed)
    result = ppo.train(args, problem=problem, table=False)
    for run in (Run.of(result, problem), Run.read(tmp_path / "run", problem)):
        assert (run.n_layers, run.blocks, run.agent_stacks) == (3, (), (range(3),))
        phases = ["uniform path"] * 3 + ["agent"] * 3 + ["local search"] * 3
        assert [run.phase(i) for i in range(9)] == phases
        assert np.mean(list(run.scores(run.path("best")).values())) == pytest.approx(result.reward)


def test_a_search_without_an_agent_has_no_policy(tiny):
    problem = load_problem(**tiny, operators=("ties",), unit="sublayer")
    args = ppo.Args(**tiny, operators=("ties",), episodes=5, finish=1.0, scales=0.0, quiet=True)
    run = Run.of(ppo.train(args, problem=problem, table=False), problem)
    assert [run.phase(i) for i in range(5)] == ["uniform path"] * 3 + ["local search"] * 2
    assert [run.policy(i) for i in range(5)] == [None] * 5


def test_a_run_of_the_paper_preset_is_one_of_blocks(tiny, tmp_path):
    args = ppo.Args(
        **tiny, preset="paper", episodes=8, seed=2, data_fraction=0.5, quiet=True,
        run_dir=tmp_path / "run", mask_actions=True,
    )  # fmt: skip
    problem = load_problem(**tiny, operators=args.operators, stem=args.stem, seed=2)
    result = ppo.train(args, problem=problem, table=False)
    for run in (Run.of(result, problem), Run.read(tmp_path / "run")):
        assert (run.n_layers, run.blocks, run.first) == (3, (), 0)
        assert (run.stem, run.n_start) == ("task_arithmetic", 0)
        assert run.agent_stacks == run.stacks
        assert {run.phase(i) for i in range(8)} == {"agent"}
        assert torch.equal(run.policy(7), result.policies[1])


@pytest.mark.parametrize(
    ("places", "expected"),
    [(5, (range(2), range(2, 4))), (11, (range(4), range(4, 10)))],
)
def test_the_agents_places_in_two_stacks(places, expected):
    """A T5 of two encoder blocks (two parts each) and two decoder blocks (three): blocks, or parts."""
    blocks = (range(2), range(2, 4), range(4, 7), range(7, 10))
    run = Run(
        SOURCES, 10, -1, (range(4), range(4, 10)), "base", [], [], [], [],
        torch.zeros(1, places, 6), blocks=blocks,
    )  # fmt: skip
    assert run.agent_stacks == expected
    # Without an agent nobody walked: the layers are what was decided on.
    run.policies, run.config = torch.zeros(0, 0, 0), {"unit": "sublayer"}
    assert run.agent_stacks == run.stacks
