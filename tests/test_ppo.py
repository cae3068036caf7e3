"""PPO: its formulas by hand and against torch.distributions, probes with a known answer, CartPole."""

from __future__ import annotations

import copy
import math
import runpy
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical

from rmm_lab import ppo
from rmm_lab.env import MergingEnv
from rmm_lab.errors import InputError
from rmm_lab.ppo import Args
from rmm_lab.reward import parse_path, path_text
from rmm_lab.tasks.console import run_command

# ------------------------------------------------------------------------------- formulas by hand


def test_returns_by_hand():
    rewards = torch.tensor([1.0, 0.0, 4.0])
    assert ppo.discounted_returns(rewards, 0.5).tolist() == [2.0, 2.0, 4.0]
    assert ppo.discounted_returns(rewards, 1.0).tolist() == [5.0, 4.0, 4.0]


def test_advantage_is_return_minus_value():
    assert ppo.advantage(torch.tensor([1.0, 0.5]), torch.tensor([0.25, 1.0])).tolist() == [
        0.75,
        -0.5,
    ]


def advantages(rewards, values, gamma, gae_lambda):
    """GAE of one episode from lists of T rewards and T values."""
    adv = ppo.discounted_returns(torch.tensor(rewards), gamma) - torch.tensor(values)
    return ppo.gae(adv, gamma, gae_lambda).tolist()


def test_generalised_advantages_by_hand():
    """With gamma = 1/2 the TD errors are 1 + 1/2 - 2, 0 + 3/2 - 1, 4 + 0 - 3; lambda = 1/2 adds quarters."""
    rewards, values = [1.0, 0.0, 4.0], [2.0, 1.0, 3.0]
    assert advantages(rewards, values, 0.5, 0.5) == [-0.3125, 0.75, 1.0]
    assert advantages(rewards, values, 0.5, 0.0) == [-0.5, 0.5, 1.0]  # the TD errors
    assert advantages(rewards, values, 0.5, 1.0) == [0.0, 1.0, 1.0]  # returns 2, 2, 4 minus values
    assert advantages([4.0], [3.0], 0.5, 0.5) == [1.0]


@given(
    st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=1, max_size=8),
    st.floats(0.1, 1),
    st.floats(0, 1),
)
def test_generalised_advantages_are_the_weighted_mean_of_k_step_ones(steps, gamma, lam):
    """Schulman et al. 2016, Eq. 15 and 16: weights (1 - lambda) lambda^(k-1), the rest for whole returns."""
    rewards, values = map(list, zip(*steps, strict=True))
    expected = []
    for t in range(len(steps)):
        left = len(steps) - t
        k_step = [
            sum(gamma**i * rewards[t + i] for i in range(k))
            + (gamma**k * values[t + k] if k < left else 0)
            - values[t]
            for k in range(1, left + 1)
        ]
        weights = [(1 - lam) * lam ** (k - 1) for k in range(1, left)] + [lam ** (left - 1)]
        expected.append(sum(w * a for w, a in zip(weights, k_step, strict=True)))
    assert advantages(rewards, values, gamma, lam) == pytest.approx(expected, abs=1e-3)


def test_clipped_objective_by_hand():
    """Eq. 8: a ratio outside [0.8, 1.2] earns no more, but a loss is never clipped away."""
    ratio = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.1])
    adv = torch.tensor([1.0, 1.0, -1.0, -1.0, 2.0])
    terms = [1.2, 0.5, -1.5, -0.8, 2.2]
    assert float(ppo.clipped_objective(ratio, adv, 0.2)) == pytest.approx(sum(terms) / 5)


def test_the_clip_stops_the_gradient_only_where_the_ratio_has_gone_too_far():
    ratio = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.0], requires_grad=True)
    adv = torch.tensor([1.0, 1.0, -1.0, -1.0, 3.0])
    ppo.clipped_objective(ratio, adv, 0.2).backward()
    assert ratio.grad.tolist() == pytest.approx([0, 0.2, -0.2, 0, 0.6])


def test_normalise_by_hand_and_with_one_element():
    assert ppo.normalise(torch.tensor([1.0, 3.0])).tolist() == pytest.approx([-1, 1])
    assert ppo.normalise(torch.tensor([7.0])).tolist() == [0.0]  # not NaN
    same = torch.full((100,), 0.8)  # whose mean is not 0.8 in float32
    assert not ppo.normalise(same).any()  # no signal from rounding
    near = torch.tensor([0.8, 0.8001])  # a small difference is a signal
    assert ppo.normalise(near).tolist() == pytest.approx([-1, 1], abs=1e-2)


def test_log_probs_are_a_masked_categorical():
    torch.manual_seed(0)
    agent = ppo.Agent(6, 4)
    torch.nn.init.normal_(agent.actor[-1].weight)
    obs = torch.randn(5, 6)
    mask = torch.tensor([[1, 1, 0, 1]] * 5).bool()
    found = agent.log_probs(obs, mask)
    logits = agent.actor(obs)[:, [0, 1, 3]]
    assert torch.allclose(found[:, [0, 1, 3]], Categorical(logits=logits).logits, atol=1e-6)
    assert (found[:, 2].exp() == 0).all()


def batch(n=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    agent = ppo.Agent(6, 4)
    obs = torch.randn(n, 6, generator=g)
    masks = torch.ones(n, 4).bool()
    actions = torch.randint(4, (n,), generator=g)
    with torch.no_grad():
        log_probs = Categorical(logits=agent.actor(obs)).log_prob(actions)
    returns = torch.rand(n, generator=g)
    return agent, ppo.Rollout(obs, masks, actions, log_probs, returns, [n])


def test_the_first_gradient_is_the_policy_gradient():
    """At ratio 1, Eq. 8's gradient is that of mean(A log pi), the oracle from torch.distributions."""
    agent, data = batch()
    twin, _ = batch()
    args = Args(learning_rate=1.0, update_epochs=1, ent_coef=0.0, ent_coef_end=0.0, vf_coef=0.0)
    ppo.update(agent, torch.optim.SGD(agent.actor.parameters(), lr=1.0), data, args, 0.5)
    returns = (data.returns - data.returns.mean()) / data.returns.std(correction=0)
    adv = returns - twin.critic(data.obs).squeeze(-1).detach()
    objective = (adv * Categorical(logits=twin.actor(data.obs)).log_prob(data.actions)).mean()
    objective.backward()
    for moved, start in zip(agent.actor.parameters(), twin.actor.parameters(), strict=True):
        assert torch.allclose(moved - start, start.grad, atol=1e-5)


def test_the_first_gradient_with_generalised_advantages():
    """Two episodes, V turned back into units of reward; the critic's target stays the return."""
    gamma, lam, rewards = 0.9, 0.7, [[0.1, -0.4, 2.0], [0.3, 0.0, 0.5, -1.0, 1.0]]
    agent, data = batch()
    torch.nn.init.normal_(agent.critic[-1].weight)
    twin = copy.deepcopy(agent)
    returns = torch.cat([ppo.discounted_returns(torch.tensor(r), gamma) for r in rewards])
    mean, deviation = returns.mean(), returns.std(correction=0)
    values = twin.critic(data.obs).squeeze(-1).detach()
    advs = []
    for r, v in zip(rewards, (mean + deviation * values).split([3, 5]), strict=True):
        v, adv = [*v.tolist(), 0.0], [0.0]
        for t in reversed(range(len(r))):
            adv.insert(0, r[t] + gamma * v[t + 1] - v[t] + gamma * lam * adv[0])
        advs += adv[:-1]
    adv = torch.tensor(advs) / deviation
    (adv * Categorical(logits=twin.actor(data.obs)).log_prob(data.actions)).mean().backward()

    args = Args(gamma=gamma, gae_lambda=lam, update_epochs=1, ent_coef=0.0, ent_coef_end=0.0)
    data = data._replace(returns=returns, lengths=[3, 5])
    row = ppo.update(agent, torch.optim.SGD(agent.actor.parameters(), lr=1.0), data, args, 0.5)
    for moved, start in zip(agent.actor.parameters(), twin.actor.parameters(), strict=True):
        assert torch.allclose(moved - start, start.grad, atol=1e-5)
    residual = (returns - mean) / deviation - values
    assert row["value_loss"] == pytest.approx(float(residual.pow(2).mean()), rel=1e-4)


def test_diagnostics_match_torch_distributions():
    agent, data = batch()
    old = Categorical(logits=agent.actor(data.obs).detach())
    args = Args(update_epochs=1, clip_coef=0.2, ent_coef=0.3, ent_coef_end=0.1, target_kl=0.0)
    sgd = torch.optim.SGD(agent.parameters(), lr=0.0)
    row = ppo.update(agent, sgd, data, args, 0.5)
    assert row["entropy"] == pytest.approx(float(old.entropy().mean()), rel=1e-5)
    assert row["entropy_coef"] == pytest.approx(0.2)  # half way from 0.3 to 0.1
    assert (row["approx_kl"], row["clip_fraction"]) == (0.0, 0.0)
    returns = (data.returns - data.returns.mean()) / data.returns.std(correction=0)
    residual = returns - agent.value(data.obs).detach()
    assert row["explained_variance"] == pytest.approx(
        1 - float(residual.var(correction=0)), rel=1e-4
    )
    assert row["value_loss"] == pytest.approx(float(residual.pow(2).mean()), rel=1e-4)


def test_approximate_kl_and_the_stop():
    """KL(old || new) over many samples is close to k3's estimate, and an update stops beyond it."""
    agent, data = batch(4000)
    old = Categorical(logits=agent.actor(data.obs).detach())
    adam = torch.optim.Adam(agent.parameters(), lr=3e-3)
    args = Args(update_epochs=60, target_kl=0.01, ent_coef=0.0, ent_coef_end=0.0)
    row = ppo.update(agent, adam, data, args, 0.0)
    assert row["epochs"] < 60
    assert 0.01 < row["approx_kl"] < 0.03
    new = Categorical(logits=agent.actor(data.obs).detach())
    exact = torch.distributions.kl_divergence(old, new).mean()
    # The diagnostic is from before the last step; the exact value has moved on by one more.
    assert 0.5 * row["approx_kl"] < float(exact) < 2 * row["approx_kl"]


def test_losses_stay_finite_with_one_step_in_a_batch():
    """One episode of one action: the deviation of one return is 0, and nothing may become NaN."""
    agent, data = batch(1)
    row = ppo.update(agent, torch.optim.Adam(agent.parameters()), data, Args(), 0.0)
    assert all(math.isfinite(v) for v in row.values())
    assert all(torch.isfinite(p).all() for p in agent.parameters())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(
            ("gamma", 1.5),
            ("gamma", 0),
            ("gae_lambda", 1.5),
            ("gae_lambda", -0.1),
            ("clip_coef", 0.0),
            ("update_epochs", 0),
            ("target_kl", -1),
        ),
        *(("episodes_per_update", 2.5), ("learning_rate", math.nan), ("mask_actions", "no")),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(option, value):
    with pytest.raises(InputError, match=f"--{option.replace('_', '-')}: expected .*{value}"):
        Args(**{option: value})


# -------------------------------------------------------------------------------- rollout and learn


class Corridor(gym.Env):
    """Five cells; right (1) from the last pays 1. Left (0) is illegal in the first cell and ends it."""

    observation_space, action_space = gym.spaces.Box(0, 1, (5,)), gym.spaces.Discrete(2)

    def __init__(self):
        self.resets = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.resets.append(options)
        self.cell = 0
        return self.seen()

    def seen(self):
        mask = np.array([self.cell > 0, 1], np.int8)
        return np.eye(5, dtype=np.float32)[min(self.cell, 4)], {"action_mask": mask}

    def step(self, action):
        legal = self.cell > 0 or action == 1
        self.cell += 1 if action == 1 else -1
        obs, info = self.seen()
        reward = float(self.cell == 5) if legal else -1.0
        return obs, reward, self.cell == 5 or not legal, False, info


def corridor(seed=0, **options):
    env, args = Corridor(), Args(**options)
    agent, optimiser = ppo.make_agent(env, args, seed)
    return env, args, agent, optimiser, torch.Generator().manual_seed(seed)


def test_an_episode_keeps_what_was_seen_drawn_and_paid():
    env, _, agent, _, generator = corridor()
    episode = ppo.play(env, agent, generator, masked=True)
    columns = episode[:-1]
    assert len({len(column) for column in columns}) == 1
    assert episode.actions[0] == 1  # left is masked
    assert torch.equal(episode.policies[0], torch.tensor([0.0, 1.0]))
    cells = [int(obs.argmax()) for obs in episode.obs]
    for cell, action, after in zip(cells, episode.actions, [*cells[1:], 5], strict=True):
        assert after == cell + (1 if action == 1 else -1)
    assert sum(episode.rewards) == episode.rewards[-1] == 1
    for obs, mask, action, log_prob, policy in zip(*columns[:3], *columns[4:2:-1], strict=True):
        expected = Categorical(logits=agent.actor(obs[None])[:, mask])
        assert torch.allclose(policy[mask], expected.probs[0], atol=1e-6)
        assert float(log_prob) == pytest.approx(math.log(policy[action]), abs=1e-5)


def test_a_rollout_is_its_episodes_end_to_end():
    env, _, agent, _, generator = corridor()
    one, two = (ppo.play(env, agent, generator, masked=True) for _ in range(2))
    rollout = ppo.collect([one, two], 0.5)
    n, m = len(one.rewards), len(two.rewards)
    assert rollout.obs.shape == (n + m, 5)
    assert rollout.actions.tolist() == one.actions + two.actions
    assert rollout.lengths == [n, m]
    assert rollout.returns[[0, n - 1, n, -1]].tolist() == [0.5 ** (n - 1), 1, 0.5 ** (m - 1), 1]


def test_learn_plays_the_episodes_that_are_left():
    env, args, agent, optimiser, generator = corridor(episodes_per_update=4, update_epochs=2)
    announced, sizes = [], []
    for played, row in ppo.learn(
        env, args, agent, optimiser, generator, 14, done=4, before_rollout=announced.append
    ):
        sizes.append(len(played))
        assert row["entropy_coef"] == pytest.approx(0.1 - 0.08 * (4 + sum(sizes)) / 14)
    assert sizes == announced == [4, 4, 2]
    assert env.resets == [{"episode": 4}] + [None] * 9


class Probe:
    """Of four sources at each of three layers one is right; nothing else pays."""

    sources, n_models, n_layers, n_subsets = ("a", "b", "c", "d"), 1, 3, 1
    stacks, task_names, chooses_stem = (range(3),), ["t"], False
    best = parse_path("b@0 c@1 d@2")

    def score(self, path, subset=None):
        return np.array([sum(s in self.best for s in path) / 3 if len(path) == 3 else 0.0])


def test_the_agent_solves_a_probe():
    env, args = MergingEnv(Probe()), Args()
    agent, optimiser = ppo.make_agent(env, args, 3)
    generator = torch.Generator().manual_seed(3)
    rewards = []
    for played, _ in ppo.learn(env, args, agent, optimiser, generator, 400):
        rewards += [e.rewards[-1] for e in played]
    greedy = ppo.play(env, agent, None, masked=True)
    assert path_text(greedy.info["path"]) == path_text(Probe.best)
    assert np.mean(rewards[-50:]) > 0.9 > 0.5 > np.mean(rewards[:50])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_ppo_balances_a_pole(seed):
    """A mean return of 400 over 20 episodes, of 500 at most, within 500 episodes: 5 at once, large steps."""
    rate = {"learning_rate": 0.01, "critic_learning_rate": 0.01, "ent_coef": 0, "ent_coef_end": 0}
    env, args = gym.make("CartPole-v1"), Args(gamma=0.99, episodes_per_update=5, **rate)
    env.reset(seed=seed)
    agent, optimiser = ppo.make_agent(env, args, seed)
    generator = torch.Generator().manual_seed(seed)
    returns: list[float] = []
    for played, _ in ppo.learn(env, args, agent, optimiser, generator, 500):
        assert len(played) == 5
        returns += [sum(e.rewards) for e in played]
        if np.mean(returns[-20:]) >= 400:
            break
    assert np.mean(returns[:5]) < 50
    assert np.mean(returns[-20:]) >= 400


# ----------------------------------------------------------------------------------- command line


def test_ppo_runs_alone_on_the_demos_pair(monkeypatch, capsys):
    """As ``python -m rmm_lab.ppo``, the file being ``__main__``."""
    words = ["--env-id", "rmm_lab/Merging-v0", "--episodes", "20"]
    monkeypatch.setattr(sys, "argv", ["ppo", *words])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(ppo.__file__, run_name="__main__")
    out, err = capsys.readouterr()
    assert done.value.code == 0, err
    episodes, greedy, path = out.splitlines()
    mean = float(episodes.removeprefix("episode 20/20  return "))
    assert 0 < mean < 1
    assert 0 < float(greedy.removeprefix("greedy return ")) <= 1
    steps = parse_path(path.removeprefix("greedy path "))
    assert steps
    assert all(-1 <= step.layer < 6 for step in steps)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--episodes", "0"], "--episodes: expected at least 1, found 0"),
        (["--seed", "-1"], "--seed: expected 0 or more and below 2**63, found -1"),
        (["--env-id", "NoSuch-v0"], "--env-id: expected one of Gymnasium's, found"),
        (["--env-id", "Pendulum-v1"], "--env-id: expected discrete actions"),
        (
            ["--env-id", "no.such:CartPole-v1"],
            "--env-id: expected one of Gymnasium's, found No module named 'no'",
        ),
        (["--env-id", "GymV21Environment-v0"], "--env-id: expected one of Gymnasium's, found"),
        *(
            (["--env-id", name], f"--env-id: expected NAME or MODULE:NAME, found {name!r}")
            for name in (":x-v0", ".a:x-v0", "a b:x-v0", "x:", "a:b:c")
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_ppo_alone_refuses_in_a_sentence(capsys, words, message):
    assert run_command(ppo.Main, "ppo", words) == 2
    assert capsys.readouterr().err.startswith(f"\nerror: {message}")
