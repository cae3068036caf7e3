"""An agent whose actions are numbers: scales of experts and merges, at every place."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from rmm_lab import ppo
from rmm_lab.reward import Step, evaluate, parse_path
from rmm_lab.search.config import configure
from rmm_lab.search.layer_scales import BOUNDS
from rmm_lab.search.numbers import GaussianAgent, ScalesEnv
from rmm_lab.search.pipeline import train
from rmm_lab.search.problem import load_problem

WHOLE = "least_squares:fit=whole,ridge=0.01"


class Bowl:
    """Pays for scales near a target, place by place; three places, two members."""

    sources, members, n_models = ("a", "b", "ties"), ("a", "b"), 2
    n_layers, n_subsets, task_names, chooses_stem = 2, 3, ["x"], True
    stacks = (range(2),)
    target = np.array([[0.9, 0.1], [0.4, 0.4], [-0.1, 1.2]])  # (places, members)

    def score(self, path, subset=None):
        scales = np.array([step.scales for step in path])
        return np.array([np.exp(-np.square(scales - self.target).sum())])


def test_each_step_takes_its_scales():
    env = ScalesEnv(Bowl())
    assert env.action_space == gym.spaces.Box(*BOUNDS, (2,), np.float32)
    obs, info = env.reset(seed=0)
    assert obs.shape == (3, 3)  # two members and the cursor, three places
    assert "action_mask" not in info
    env.step(np.array([0.9, 0.1]))
    obs, value, terminated, _, _ = env.step(np.array([0.40004, -0.00001]))
    np.testing.assert_allclose(obs, [[0.9, 0.4, 0], [0.1, 0, 0], [0, 0, 1]], atol=1e-6)
    assert (value, terminated) == (0, False)
    _, value, terminated, truncated, info = env.step([-7, 7])  # beyond the bounds
    assert (terminated, truncated) == (True, False)
    assert info["path"] == (
        Step("task_arithmetic", -1, (0.9, 0.1)),
        Step("task_arithmetic", 0, (0.4, 0.0)),
        Step("task_arithmetic", 1, BOUNDS),
    )
    # (0.4 - 0)^2 + (-0.2 + 0.1)^2 + (1.5 - 1.2)^2
    assert value == pytest.approx(np.exp(-0.26))
    assert (env.reset()[0][:2] == 0).all()


def test_it_is_an_environment_of_gymnasiums():
    check_env(gym.make("rmm_lab/Merging-v0", scorer=Bowl(), actions="scales").unwrapped)


@pytest.mark.parametrize("deviation", [0.01, 0.2])
def test_the_first_scales_are_drawn_as_far_as_is_asked(tiny, deviation):
    """Before the first update, around the scales of the best uniform path."""
    options = {"episodes": 40, "episodes_per_update": 16, "quiet": True, "calibration": 20}
    result = train(
        configure(**tiny, **options, operators=(WHOLE,), deviation=deviation), table=False
    )
    first = [e for e in result.episodes if e["phase"] == "agent" and e["update"] == 0]
    drawn = np.array([[step.scales for step in parse_path(e["path"])] for e in first])
    assert drawn.std(0).mean() == pytest.approx(deviation, rel=0.25)


def test_a_gaussian_agents_log_probabilities_by_scipy():
    from scipy.stats import norm

    torch.manual_seed(0)
    agent = GaussianAgent(6, 3)
    agent.start.copy_(torch.tensor([1.0, 0.0, 0.5]))
    with torch.no_grad():
        agent.actor.get_parameter("log_std").copy_(torch.tensor([0.1, 0.3, 0.5]).log())
    obs, actions = torch.randn(4, 6), torch.randn(4, 3)
    mean = (agent.start + agent.actor(obs)).detach().numpy()
    found, entropy = agent.judge(obs, torch.ones(4, 3).bool(), actions)
    expected = norm(mean, [0.1, 0.3, 0.5])
    np.testing.assert_allclose(
        found.detach(), expected.logpdf(actions.numpy()).sum(1), rtol=1e-4, atol=1e-4
    )
    assert float(entropy) == pytest.approx(expected.entropy().sum(1).mean(), rel=1e-4)
    with torch.no_grad():
        best, _, policy = agent.act(obs[0], torch.ones(3).bool(), None)
        draws = torch.Generator().manual_seed(0)
        drawn = np.stack([agent.act(obs[0], None, draws)[0] for _ in range(4000)])
    np.testing.assert_allclose(best, mean[0], atol=1e-6)
    np.testing.assert_allclose(policy, mean[0], atol=1e-6)
    np.testing.assert_allclose(drawn.mean(0), mean[0], atol=0.03)
    np.testing.assert_allclose(drawn.std(0), [0.1, 0.3, 0.5], rtol=0.05)


def test_ppo_climbs_a_bowl_of_scales():
    env = ScalesEnv(Bowl())
    args = ppo.Args(ent_coef=0.0, ent_coef_end=0.0)
    agent, optimiser = ppo.make_agent(env, args, 1, GaussianAgent)
    agent.start.copy_(torch.tensor([0.5, 0.5]))
    before = sum(ppo.play(env, agent, None, masked=True).rewards)
    for _ in ppo.learn(env, args, agent, optimiser, torch.Generator().manual_seed(1), 2000):
        pass
    after = sum(ppo.play(env, agent, None, masked=True).rewards)
    # Squared distances by hand: 0.32, 0.02 and 0.85 at the start.
    assert before == pytest.approx(np.exp(-1.19), abs=0.05)
    assert after > 0.8


@pytest.fixture
def problem(tiny):
    return load_problem(
        **tiny, operators=(WHOLE, "weight_average"), calibration=10, stem="agent", unit="both"
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_a_search_by_an_agent_of_scales(problem, tmp_path, workers):
    options = {"episodes": 40, "actions": "scales", "episodes_per_update": 8, "cma_share": 0.0}
    config = configure(
        "default", **options, quiet=True, finalists=6, run_dir=tmp_path / "run", workers=workers
    )
    result = train(config, problem)
    phases = [e["phase"] for e in result.episodes]
    assert phases == ["uniform"] * 4 + ["agent"] * 36
    members = problem.pool.members
    assert members == ("e1", "e2", problem.pool.sources[2])
    for row in result.episodes[4:]:
        path = parse_path(row["path"])
        assert {step.source for step in path} == {"task_arithmetic"}
        assert {len(step.scales) for step in path} == {len(members)}
        assert row["actions"] == ""  # the path says it all
    # The first draws stand around the best uniform path.
    expected = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.5, 0]]
    known = [(-e["raw_reward"], e["path"]) for e in result.episodes[:4]]
    first = np.mean([[s.scales for s in parse_path(e["path"])] for e in result.episodes[4:12]], 0)
    assert np.abs(first - expected[known.index(min(known))]).max() < 0.15
    assert result.reward == pytest.approx(
        evaluate(problem.pool, problem.tasks, result.path.path, "reward").mean(), abs=1e-6
    )
    assert any(row["found"] == "scales" for row in result.finalists)
    for row in result.finalists:  # three digits each, as the draws
        scales = [s for step in parse_path(row["path"]) for s in step.scales]
        assert scales == np.round(scales, 3).tolist()
    assert result.policies.shape[1:] == (4, len(members))
