"""Walks against hand-walked episodes and the environment itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_env import BACK, SKIP, Scores

from rmm_lab import ppo
from rmm_lab.course.episode_walk import Walk
from rmm_lab.env import MergingEnv
from rmm_lab.errors import InputError
from rmm_lab.reward import path_text


def agent_for(env: MergingEnv, preferred: int | None = None, value: float = 0.0) -> ppo.Agent:
    """An agent that ignores what it sees: one preferred action, or all alike for None."""
    agent = ppo.Agent(int(np.prod(env.observation_space.shape)), int(env.action_space.n))
    with torch.no_grad():
        for net in (agent.actor, agent.critic):
            net[-1].weight.zero_()
            net[-1].bias.zero_()
        if preferred is not None:
            agent.actor[-1].bias[preferred] = 3.0
        agent.critic[-1].bias.fill_(value)
    return agent


def test_a_walk_by_hand():
    """m1 at 0, back, op0 at 0, skip 1, m0 at 2, as in the test of the environment."""
    scorer = Scores(score=lambda path, subset: [0.2, 0.8])
    walk = Walk(scorer)
    layers = []
    for action in ("m1", BACK, "op0", "skip", 0):
        assert not walk.done
        walk.act(action)
        layers.append(walk.env.layer)
    assert layers == [1, 0, 1, 2, 3]
    assert walk.actions == [1, BACK, 2, SKIP, 0]
    assert path_text(walk.env.path) == "m1@0 op0@0 m0@2"
    assert walk.env.merging_map.tolist() == [[0, 0, 1], [1, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert (walk.done, walk.penalised) == (True, False)
    assert walk.scores == {"t0": 0.2, "t1": 0.8}
    assert walk.reward == pytest.approx(0.5)
    assert scorer.calls == [(walk.env.path, None)]  # all examples by default


def test_the_subset_is_the_one_asked_for():
    scorer = Scores()
    walk = Walk(scorer, subset=1)
    for _ in range(3):
        walk.act("m0")
    assert scorer.calls == [(walk.env.path, 1)]


def test_undo_of_an_end_of_a_penalty_and_of_nothing():
    walk = Walk(Scores())
    for _ in range(3):
        walk.act("m0")
    walk.undo()
    assert (walk.done, walk.reward, walk.scores, walk.env.layer) == (False, None, None, 2)
    walk.act("op1")
    assert path_text(walk.env.path) == "m0@0 m0@1 op1@2"
    walk.reset()
    assert (walk.actions, walk.env.path, walk.env.layer) == ([], (), 0)
    walk.act("back")
    assert walk.penalised
    walk.undo()
    assert (walk.done, walk.penalised, walk.illegal, walk.actions) == (False, False, False, [])
    with pytest.raises(InputError, match="undo: expected an action to take back"):
        walk.undo()


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
    assert walk.env.path == info["path"]
    assert walk.legal.tolist() == info["action_mask"].astype(bool).tolist()
    assert np.array_equal(walk.env.merging_map, env.merging_map)
    assert (walk.env.layer, walk.done) == (env.layer, ended)
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
    assert (walk.env.layer, walk.done, walk.actions) == (2, False, [1, 1])
    assert path_text(walk.env.path) == "m1@0 m1@1"


def test_sentences_name_the_place_the_action_and_what_follows():
    walk = Walk(Scores(score=lambda path, subset: [0.5, 0.75]))
    for action, parts in (
        ("op0", ("layer 0", "took op0", "next: layer 1")),
        ("back", ("layer 1", "went back", "next: layer 0", "stacks on top")),
        ("m1", ("layer 0", "took m1", "next: layer 1")),
        ("skip", ("layer 1", "skipped", "next: layer 2")),
        ("m0", ("layer 2", "took m0", "the reward is 0.625")),
    ):
        walk.act(action)
        assert all(part in walk.sentence() for part in parts), walk.sentence()


def test_sentences_say_why_there_is_a_penalty():
    walk = Walk(Scores())
    walk.act("back")
    assert walk.illegal
    assert "back at layer 0" in walk.sentence()
    assert "illegal, the episode ends with a penalty of -0.1" in walk.sentence()
    long = Walk(Scores(), max_steps=3, max_depth=2)
    for action in ("skip", "back", "skip"):
        long.act(action)
    assert not long.illegal
    assert "too long (at most 3 actions and 2 layers)" in long.sentence()


def test_places_of_two_stacks_and_their_border():
    walk = Walk(Scores(layers=4, stacks=(range(1), range(1, 4)), chooses_stem=True))
    places = [walk.place()]
    for _ in range(2):
        walk.act("m0")
        places.append(walk.place())
    assert places == ["stem", "enc 0", "dec 0"]
    assert not walk.legal[BACK]
    assert walk.does("back").startswith("illegal at dec 0")
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
    assert walk.policy()[0] == pytest.approx([0.2] * 5 + [0])
    assert walk.policy()[1] == pytest.approx(0.75)
    walk.act("m0")
    assert walk.policy()[0] == pytest.approx([1 / 6] * 6)
    open_walk = Walk(scorer, agent=agent, masked=False)
    assert open_walk.policy()[0] == pytest.approx([1 / 6] * 6)


def test_without_an_agent_and_at_the_end_there_is_no_policy():
    walk = Walk(Scores(layers=1))
    assert walk.policy() == (None, None)
    with pytest.raises(InputError, match="found no agent"):
        walk.agent_step()
    walk = Walk(Scores(layers=1), agent=agent_for(MergingEnv(Scores(layers=1))))
    assert walk.agent_step() == 0
    assert walk.policy() == (None, None)
    with pytest.raises(InputError, match="found an ended walk"):
        walk.agent_step()


def test_the_agents_steps_are_its_greedy_episode():
    scorer = Scores()
    torch.manual_seed(3)
    env = MergingEnv(scorer)
    agent = ppo.Agent(int(np.prod(env.observation_space.shape)), 6)
    with torch.no_grad():
        agent.actor[-1].weight.mul_(100)  # a policy that depends on where it is
    greedy = ppo.play(env, agent, None, masked=True, options={"subset": None})
    walk = Walk(scorer, agent=agent)
    while not walk.done:
        walk.agent_step()
    assert walk.env.path == greedy.info["path"]
    assert len({step.source for step in walk.env.path}) > 1


@pytest.mark.parametrize("observation", ["map", "map+cursor"])
def test_an_agent_of_another_problem_is_refused(observation):
    agent = agent_for(MergingEnv(Scores(layers=2), observation=observation))
    with pytest.raises(InputError, match="agent: expected one for"):
        Walk(Scores(layers=3), agent=agent, observation=observation)
    Walk(Scores(layers=2), agent=agent, observation=observation)
