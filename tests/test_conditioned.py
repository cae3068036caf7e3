"""One agent for all preferences, against brute force and against the PPO that it must equal."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from rmm_lab import ppo
from rmm_lab.env import MergingEnv
from rmm_lab.errors import InputError
from rmm_lab.fronts.conditioned import (
    FORMS,
    Conditioned,
    PreferenceEnv,
    ScalesAgent,
    Start,
    Targets,
    conditioned,
    draw_weights,
    separate,
    update,
)
from rmm_lab.fronts.space import Trials
from rmm_lab.reward import Step
from rmm_lab.search.front_measures import lattice_of
from rmm_lab.search.layer_scales import path_of_scales
from rmm_lab.search.numbers import ScalesEnv
from rmm_lab.search.preferences import Ends
from rmm_lab.search.rivals import natural_niches

UNIT = Ends(np.zeros(2), np.ones(2))
DISCRETE = ppo.Args(ent_coef=0.1, ent_coef_end=0.0)


class Table:
    """Two tasks by formula: three layers, three sources, each good for one task or a bit for both."""

    sources, members, n_models = ("a", "b", "ties"), ("a", "b"), 2
    n_layers, n_subsets, task_names, chooses_stem = 3, 2, ["x", "y"], False
    stacks = (range(3),)
    worth = {"a": (1.0, 0.0), "b": (0.0, 1.0), "ties": (0.75, 0.75)}

    def score(self, path, subset=None):
        parts = [np.array(self.worth[s.source]) for s in path]
        # A layer of the other expert hurts more than its share.
        mixed = len({s.source for s in path} - {"ties"}) > 1
        total = sum(parts, np.zeros(2)) / 3 if len(path) == 3 else np.zeros(2)
        return total * (0.5 if mixed else 1.0)


class Bowl:
    """Pays a task for scales near a target of its own; two places, two members."""

    sources, members, n_models = ("a", "b"), ("a", "b"), 2
    n_layers, n_subsets, task_names, chooses_stem = 2, 2, ["x", "y"], False
    stacks = (range(2),)
    targets = np.array(
        [[[1.0, 0.2], [0.8, 0.0]], [[0.2, 1.0], [0.0, 0.8]]]
    )  # (tasks, places, members)

    def score(self, path, subset=None):
        scales = np.array([s.scales or np.eye(2)[("a", "b").index(s.source)] for s in path])
        return np.exp(-4 * np.square(scales - self.targets).sum((1, 2)))


def best_for(weights):
    """The best of all 27 paths by a weighted sum."""
    every = [
        tuple(Step(s, k) for k, s in enumerate(names))
        for names in itertools.product(Table.sources, repeat=3)
    ]
    return max(every, key=lambda path: weights @ Table().score(path))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_one_training_answers_every_preference_as_brute_force_does(form):
    out = Trials(Table(), 1400, UNIT)
    agent = Conditioned(out, 1, actions="sources", form=form, args=DISCRETE)
    for _ in agent.learn(out.left):
        pass
    assert len(out) == 1400
    found = {w: agent.path(np.array(w)) for w in ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5))}
    assert found == {w: best_for(np.array(w)) for w in found}
    assert len(set(found.values())) == 3
    assert len(out) == 1400  # an answer costs no evaluation


def test_one_fixed_preference_is_ppo_bit_for_bit():
    w = np.array([0.25, 0.75])

    class Scalar(Table):
        task_names = ["sum"]

        def score(self, path, subset=None):
            return super().score(path, subset) @ w[:, None]

    args = ppo.Args(episodes_per_update=8, update_epochs=5)
    out = Trials(Table(), 86, UNIT)
    ours = Conditioned(out, 3, actions="sources", fixed=w, args=args)
    found = list(ours.learn(80))
    env = MergingEnv(Scalar(), episodes_per_subset=8)
    agent, optimiser = ppo.make_agent(env, args, 3)
    generator = torch.Generator().manual_seed(3)
    theirs = [d for _, d in ppo.learn(env, args, agent, optimiser, generator, 80)]
    assert len(found) == len(theirs) == 10
    for a, b in zip(found, theirs, strict=True):
        assert a == {name: b[name] for name in a}
    for a, b in zip(ours.agent.parameters(), agent.parameters(), strict=True):
        assert torch.equal(a, b)


def test_forms_agree_where_nothing_is_clipped_and_differ_where_signs_do():
    """At ratio 1 both gradients are those of the weighted advantage; a clipped ratio tells them apart."""
    torch.manual_seed(0)
    obs, actions = torch.randn(6, 4), torch.randn(6, 2)
    gains = torch.randn(6, 2)
    targets = Targets(gains, torch.full((6, 2), 0.5))
    ends = {}
    for moved in (0.0, 1.0):
        for form in ("linear", "late"):
            torch.manual_seed(1)
            agent = ScalesAgent(4, 2, 2)
            with torch.no_grad():
                log_probs = agent.judge(obs, torch.ones(6, 2), actions)[0] - moved
            batch = ppo.Rollout(obs, torch.ones(6, 2), actions, log_probs, gains[:, 0], [6])
            optimiser = torch.optim.SGD(agent.actor.parameters(), lr=1.0)
            args = ppo.Args(update_epochs=1, ent_coef=0.0, ent_coef_end=0.0)
            update(agent, optimiser, batch, targets, args, 0.0, form)
            ends[moved, form] = torch.cat([p.flatten() for p in agent.actor.parameters()])
    torch.testing.assert_close(ends[0.0, "linear"], ends[0.0, "late"])
    assert not torch.allclose(ends[1.0, "linear"], ends[1.0, "late"], atol=1e-4)


def test_the_late_objective_by_hand():
    """Ratio e at one step, two tasks: advantages 1 and -1 after normalisation, values 0."""

    class Agent(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = torch.nn.Parameter(torch.zeros(()))

        def values(self, obs):
            return torch.zeros(2, 2) * self.shift

        def judge(self, obs, masks, actions):
            return torch.tensor([1.0, 0.0]) + self.shift, torch.zeros(())

    agent = Agent()
    batch = ppo.Rollout(*[torch.zeros(2, 1)] * 3, torch.zeros(2), torch.zeros(2), [1, 1])
    targets = Targets(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.7, 0.3]] * 2))
    args = ppo.Args(update_epochs=1, ent_coef=0.0, ent_coef_end=0.0, clip_coef=0.2)
    optimiser = torch.optim.SGD(agent.parameters(), lr=0.0)
    found = update(agent, optimiser, batch, targets, args, 0.0, "late")
    # Step 1: 0.7 min(e, 1.2) - 0.3 max(e, 1.2); step 2, ratio 1: -0.7 + 0.3.
    wanted = (0.7 * 1.2 - 0.3 * np.e - 0.7 + 0.3) / 2
    assert found["policy_objective"] == pytest.approx(wanted, rel=1e-5)
    assert found["value_loss"] == pytest.approx(2)  # 1 for each target
    pooled = update(agent, optimiser, batch, targets, args, 0.0, "linear")
    # Advantages 0.4 and -0.4: min(0.4 e, 0.48) - 0.4.
    assert pooled["policy_objective"] == pytest.approx((0.48 - 0.4) / 2, rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_scales_begin_with_the_best_known_path_of_each_preference(form):
    out = Trials(Bowl(), 40, UNIT)
    agent = Conditioned(out, 1, form=form)
    for w, name in (((1.0, 0.0), "a"), ((0.0, 1.0), "b")):
        path = agent.path(np.array(w))
        wanted = np.eye(2)[("a", "b").index(name)]
        for step in path:
            np.testing.assert_allclose(step.scales, wanted, atol=0.05)


def test_scales_may_begin_with_a_path_that_differs_from_place_to_place():
    """Each task's target, 1 there, is better than any member; so it is where the agent begins."""
    out = Trials(Bowl(), 40, UNIT)
    known = [path_of_scales(target, range(2)) for target in Bowl.targets]
    out.ask(known)
    agent = Conditioned(out, 1, known=known)
    for w, target in zip(np.eye(2), Bowl.targets, strict=True):
        found = [step.scales for step in agent.path(w)]
        np.testing.assert_allclose(found, target, atol=0.05)


def test_scales_get_better_for_each_preference_than_where_they_began():
    out = Trials(Bowl(), 700, UNIT)
    agent = Conditioned(out, 1)
    start = {w: agent.path(np.array(w)) for w in ((1.0, 0.0), (0.0, 1.0))}
    for _ in agent.learn(out.left):
        pass
    for w, before in start.items():
        after = agent.path(np.array(w))
        assert np.array(w) @ Bowl().score(after) > np.array(w) @ Bowl().score(before) + 0.05


@pytest.mark.parametrize("form", FORMS)
def test_what_each_preference_begins_with_is_not_learned_again(form):
    """Paths that are the start's have nothing above it, whatever their preference: V has only 0 to learn."""
    agent = Conditioned(Trials(Bowl(), 30, UNIT), 1, form=form)
    with torch.no_grad():
        for parameter in agent.agent.actor.parameters():
            parameter.zero_()
    agent.agent.deviate(1e-9)
    [found] = agent.learn(20)
    assert found["value_loss"] < 0.1  # about 1 for each target that differs between preferences


def test_a_search_spends_its_budget_and_answers_each_preference():
    for search in (conditioned(), separate):
        out = search(Bowl(), 60, 1, UNIT)
        assert len(out) == 60
        assert 2 <= len(out.answers) <= 11
        second, first = (
            Bowl().score(out.answers[i]) for i in (0, -1)
        )  # weights go from (0, 1) to (1, 0)
        assert first[0] > 0.5 > second[0]
        assert second[1] > 0.5 > first[1]
        again = search(Bowl(), 60, 1, UNIT)
        assert out == again
        assert out.answers == again.answers


def test_an_agent_after_niches_answers_what_they_do_and_more():
    after = conditioned(niches=0.75)(Bowl(), 60, 1, UNIT)
    alone = natural_niches(Bowl(), 2 + round(0.75 * 58), 1)  # two uniform paths come first
    assert len(after) == 60
    assert after[: len(alone)] == alone
    assert set(after[len(alone) :]).isdisjoint(natural_niches(Bowl(), 60, 1))  # the agent's own
    assert set(alone.answers) < set(after.answers)


def test_the_environment_by_hand():
    env = PreferenceEnv(MergingEnv(Table()), Ends(np.array([0.2, 0.0]), np.ones(2)), seed=0)
    obs, _ = env.reset(options={"preference": [0.75, 0.25]})
    assert obs.shape == env.observation_space.shape == (4 * 3 + 2,)
    np.testing.assert_allclose(obs[-2:], [0.75, 0.25])
    for _ in range(2):
        obs, value, *_ = env.step(0)
        assert value == 0
    obs, value, done, _, info = env.step(2)  # a, a, ties: (2.75, 0.75) / 3
    np.testing.assert_allclose(info["gains"], [(2.75 / 3 - 0.2) / 0.8, 0.25])
    assert value == pytest.approx(0.75 * (2.75 / 3 - 0.2) / 0.8 + 0.25 * 0.25)
    assert done
    obs, _ = env.reset(options={"preference": [6, 2]})  # only ratios count
    np.testing.assert_allclose(obs[-2:], [0.75, 0.25])
    env.reset()
    assert not np.allclose(env.weights, [0.75, 0.25])
    _, value, _, _, info = env.step(4)  # back at the first layer
    assert info["penalised"]
    assert value == pytest.approx(-0.1)  # whatever the weights


def test_what_is_drawn():
    rng, lattice = np.random.default_rng(0), lattice_of(3, 11)
    drawn = np.array([draw_weights(rng, lattice) for _ in range(4000)])
    np.testing.assert_allclose(drawn.sum(1), 1)
    assert (drawn >= 0).all()
    on_lattice = (np.abs(drawn[:, None] - lattice).max(-1) < 1e-12).any(1)
    assert on_lattice.mean() == pytest.approx(0.6, abs=0.03)  # half, and the corners
    corners = (drawn.max(1) == 1).mean()
    share = (lattice.max(1) == 1).mean()
    assert corners == pytest.approx(0.1 + 0.5 * share, abs=0.03)


def test_what_is_refused():
    with pytest.raises(InputError, match="form: expected linear or late or tchebycheff, found 'x'"):
        PreferenceEnv(ScalesEnv(Bowl()), UNIT, seed=0, form="x")
    with pytest.raises(InputError, match=r"conditioned agent: expected gamma .* found 0.9 and 1"):
        Conditioned(Trials(Bowl(), 9, UNIT), 1, args=ppo.Args(gamma=0.9))
    agent = Conditioned(Trials(Bowl(), 9, UNIT), 1)
    for weights in ([1.0], [2.0, -1.0], [0.0, 0.0], [np.nan, 1.0]):
        with pytest.raises(InputError, match="preference: expected 2 weights of 0 or more"):
            agent.path(np.array(weights))


def test_the_start_of_a_preference_by_hand():
    start = Start(np.eye(3), np.array([[1.0, 0.0], [0.0, 1.0], [0.7, 0.7]]))
    assert start.best(np.array([[1, 0], [0.5, 0.5], [0, 1]])).tolist() == [0, 2, 1]
