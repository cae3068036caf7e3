"""The agent: its formulas by hand and against torch.distributions, a probe, a brute-forced optimum."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.distributions import Categorical

from rmm_lab import ppo
from rmm_lab.engine.scorer import Plan, Scorer, reward, steps_of
from rmm_lab.env import DynamicAverageReward, MergingEnv
from rmm_lab.errors import InputError
from rmm_lab.layers import LayerPool
from rmm_lab.path import LayerPath
from rmm_lab.ppo import PRESETS, Args, train
from rmm_lab.search import report
from rmm_lab.search import run_folder as runs
from rmm_lab.search.problem import Problem, load_problem
from rmm_lab.search.run_folder import RunFolder, from_csv

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
    return agent, ppo.Rollout(obs, masks, actions, log_probs, returns)


def test_the_first_gradient_is_the_policy_gradient():
    """At ratio 1, Eq. 8's gradient is that of mean(A log pi), the oracle from torch.distributions."""
    agent, data = batch()
    twin, _ = batch()
    args = Args(learning_rate=1.0, update_epochs=1, entropy=0.0, entropy_end=0.0, value_coef=0.0)
    ppo.update(agent, torch.optim.SGD(agent.actor.parameters(), lr=1.0), data, args, 0.5)
    returns = (data.returns - data.returns.mean()) / data.returns.std(correction=0)
    adv = returns - twin.critic(data.obs).squeeze(-1).detach()
    objective = (adv * Categorical(logits=twin.actor(data.obs)).log_prob(data.actions)).mean()
    objective.backward()
    for moved, start in zip(agent.actor.parameters(), twin.actor.parameters(), strict=True):
        assert torch.allclose(moved - start, start.grad, atol=1e-5)


def test_diagnostics_match_torch_distributions():
    agent, data = batch()
    old = Categorical(logits=agent.actor(data.obs).detach())
    args = Args(update_epochs=1, clip=0.2, entropy=0.3, entropy_end=0.1, target_kl=0.0)
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
    args = Args(update_epochs=60, target_kl=0.01, entropy=0.0, entropy_end=0.0)
    row = ppo.update(agent, adam, data, args, 0.0)
    assert row["epochs"] < 60
    assert 0.01 < row["approx_kl"] < 0.03
    new = Categorical(logits=agent.actor(data.obs).detach())
    exact = torch.distributions.kl_divergence(old, new).mean()
    # The diagnostic is from before the last step; the exact value has moved on by one more.
    assert 0.5 * row["approx_kl"] < float(exact) < 2 * row["approx_kl"]


def test_the_agent_solves_a_probe():
    """One right action among four at each of three layers; nothing else pays."""

    class Probe:
        sources, n_models, n_layers, n_subsets = ("a", "b", "c", "d"), 1, 3, 1
        stacks, task_names, chooses_stem = (range(3),), ["t"], False

        def score(self, path, subset=None):
            import numpy as np

            return np.array([sum(a == (k + 1) for a, k in path if len(path) == 3) / 3])

    args = Args(preset="agent", episodes=400, quiet=True, seed=3)
    env = ppo.make_env(_Fixed(Probe()), args)
    agent, episodes, *_ = ppo.search(env, args, ppo.RunFolder(None))
    _, info = ppo.play(env, agent, None, masked=True)
    assert info["path"] == ((1, 0), (2, 1), (3, 2))
    early = sum(e["raw_reward"] for e in episodes[:50]) / 50
    late = sum(e["raw_reward"] for e in episodes[-50:]) / 50
    assert late > 0.9 > 0.5 > early


class _Fixed:
    """A problem that is its scorer."""

    def __init__(self, scorer):
        self._scorer = scorer

    def scorer(self, **options):
        return self._scorer


# ------------------------------------------------------------------------------------- arguments


def test_presets_fill_what_is_not_given():
    paper = Args(preset="paper", gamma=0.5)
    assert paper.gamma == 0.5
    assert paper.episodes_per_update == 4
    assert (paper.update_epochs, paper.clip, paper.dar, paper.entropy) == (40, 0.2, 0.8, 0.0001)
    assert (paper.learning_rate, paper.critic_learning_rate) == (3e-4, 1e-3)
    assert (paper.observation, paper.mask_actions, paper.value_coef) == ("map", False, 0.5)
    assert Args().episodes == paper.episodes == 700
    for name in PRESETS["paper"]:
        assert getattr(Args(), name) == PRESETS["default"][name]


def test_presets_speak_of_the_same_fields_and_each_is_documented():
    names = {f.name for f in dataclasses.fields(Args)}
    assert set(PRESETS["paper"]) == set(PRESETS["default"]) < names
    source = Path(ppo.__file__).read_text("utf-8")
    body = source[source.index("class Args") : source.index("def __post_init__")]
    for name in names:
        assert f"    {name}: " in body
        after = body[body.index(f"    {name}: ") :].split("\n")[1]
        assert after.strip().startswith('"""'), name
        assert after.strip().endswith('"""'), name


def test_the_command_line_reads_a_preset_and_overrides_it():
    args = ppo.parse(["--preset", "paper", "--episodes", "9", "--no-mask-actions", "--dar", "0.5"])
    assert (args.preset, args.episodes, args.gamma, args.dar) == ("paper", 9, 0.99, 0.5)
    args = ppo.parse(["--preset=paper"])
    assert args.update_epochs == 40
    for name, values in PRESETS.items():
        args = ppo.parse(["--preset", name])
        assert {key: getattr(args, key) for key in values} == values
    own, usual = ppo.parse([]), Args()
    assert own.run_dir is not None
    assert dataclasses.replace(own, run_dir=None) == usual


# ------------------------------------------------------------------------------------- the search


def reachable(n_layers, n_sources, depth):
    """Every path that actions can compose, by exhaustive walk: skips, backs and stacks included."""
    out, seen, stack = set(), set(), [(0, ())]
    while stack:
        k, path = stack.pop()
        if (k, path) in seen:
            continue
        seen.add((k, path))
        if k == n_layers:
            out.add(path)
            continue
        if len(path) < depth:
            stack += [(k + 1, (*path, (a, k))) for a in range(n_sources)]
        stack += [(k + 1, path)] + ([(k - 1, path)] if k else [])
    return out


def test_the_walk_that_the_brute_force_makes_is_the_environments(trained):
    scorer = trained.scorer(fraction=1.0)
    env = MergingEnv(scorer, max_depth=3)
    paths = reachable(3, 4, 3)
    generator = torch.Generator().manual_seed(0)
    agent = ppo.Agent(env.observation_space.shape[0] * 3, 6)
    for _ in range(200):
        _, info = ppo.play(env_with_dar(env), agent, generator, masked=True)
        assert info["path"] in paths


def env_with_dar(env):
    return DynamicAverageReward(env, scale=0.0, max_episodes=1)


class Table:
    """A scorer that is a formula: what the layers are worth alone and beside each other, seeded.

    The same on every machine, where trained models differ by rounding, and their best paths with them.
    """

    sources, n_models, n_layers, stacks = ("a", "b"), 2, 3, (range(3),)
    n_subsets, task_names, chooses_stem = 1, ["one", "two"], False

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        self.alone = rng.normal(size=(2, 3))
        self.beside = rng.normal(size=(2, 3, 2, 3))

    def score(self, path, subset=None):
        value = sum(self.alone[step] for step in path) / 2
        value += sum(self.beside[(*a, *b)] for a, b in itertools.pairwise(path))
        return np.full(2, 1 / (1 + np.exp(-value / 2)))


def best_of_search(scorer, args):
    env = gym.make("rmm_lab/Merging-v0", scorer=scorer, max_depth=4, episodes_per_subset=20)
    env = DynamicAverageReward(env, scale=0.0, max_episodes=args.episodes)
    agent, episodes, *_ = ppo.search(env, args, RunFolder(None))
    return ppo.choose(env, agent, episodes, args)[0]["path"]


@pytest.mark.parametrize("seed", [0, 3])
def test_ppo_finds_the_best_path_of_two_tables_on_five_of_five_seeds(seed):
    """L = 3, N = 2: all 511 paths of at most four layers are scored; the best one is a stack.

    With an entropy bonus of 0.2. On 4 of 6 such tables the search ends elsewhere on some seed, and on
    2 of them with most seeds: a policy gradient on 700 episodes promises no global optimum.
    """
    table = Table(seed)
    paths = sorted(reachable(3, 2, 4), key=lambda p: table.score(p)[0], reverse=True)
    first, second = (table.score(p)[0] for p in paths[:2])
    assert len(paths) == 511
    assert len(paths[0]) == 4
    assert first > second + 0.01  # one best path, so that finding it is no matter of luck
    for s in range(1, 6):
        args = Args(preset="agent", seed=s, max_depth=4, entropy=0.2, quiet=True)
        assert best_of_search(table, args) == paths[0]


def test_ppo_ends_among_the_best_paths_of_trained_models(trained):
    """As above on real models: the best 10 of 511 paths, on each of five seeds."""
    pool = LayerPool(trained.pool.base, trained.pool.experts, trained.pool.names, ())
    problem = Problem(pool, trained.tasks, "weight_average")
    scorer = problem.scorer(fraction=1.0)
    scores = sorted((float(scorer.score(p).mean()) for p in reachable(3, 2, 4)), reverse=True)
    assert len(scores) == 511
    options = {
        "preset": "agent",
        "data_fraction": 1.0,
        "max_depth": 4,
        "entropy": 0.2,
        "quiet": True,
    }
    found = [
        train(Args(seed=seed, **options), problem=problem, table=False) for seed in range(1, 6)
    ]
    assert min(r.reward for r in found) >= scores[9]


def test_the_default_search_starts_uniform_then_walks_blocks_then_seeks_nearby(tiny):
    """Phase by phase, on sublayers: L = 3 blocks of two, a stem to choose, S = 4 sources."""
    options = dict(tiny) | {"operators": ("weight_average", "ties")}
    options |= {"finish": 0.15, "scales": 0.6}
    args = Args(**options, episodes=124, data_fraction=0.25, quiet=True)
    result = train(args, table=False)
    rows = result.episodes
    assert len(rows) == 124
    sources = ["e1", "e2", "weight_average", "ties"]
    for source, row in zip(sources, rows, strict=False):
        assert row["path"] == " ".join(f"{source}@{k}" for k in range(-1, 6))
        assert (row["subset"], row["penalised"]) == (0, 0)
    walked = rows[4:34]  # 124 - 4 = 120, a quarter of it for the agent
    assert [r["update"] for r in walked] == [0] * 20 + [1] * 10
    assert [r["subset"] for r in walked] == [0] * 20 + [1] * 10
    for row in walked:  # attention and MLP of a block from one source
        steps = [s.rpartition("@") for s in row["path"].split()]
        layers = [(source, int(k)) for source, _, k in steps if int(k) >= 0]
        pairs = list(zip(layers[::2], layers[1::2], strict=True))
        assert all(a == b and i + 1 == j and i % 2 == 0 for (a, i), (b, j) in pairs)
    near = rows[34:52]  # 0.15 of 120
    assert all(r["actions"] == "" and not r["penalised"] for r in rows[34:])
    assert all(len(r["path"].split()) == 7 for r in rows[34:])
    apart = [r for r in near if not blockwise(r["path"])]
    assert len(apart) > 10  # now attention and MLP differ
    assert len({r["subset"] for r in near}) == 1  # a batch on one subset, no path twice in it
    assert len({r["path"] for r in near}) == 18
    assert [u["episodes"] for u in result.updates] == [24, 34]
    evolved = rows[
        52:
    ]  # a scale for each expert at 7 places: 14 numbers, 4 + int(3 ln 14) = 11 at once
    scale = re.compile(r"task_arithmetic:scale=-?[\d.e-]+/-?[\d.e-]+@-?\d")
    assert all(scale.fullmatch(step) for r in evolved for step in r["path"].split())
    assert [r["subset"] for r in evolved] == [(1 + i // 11) % 4 for i in range(72)]
    assert {f["found"] for f in result.finalists} == {"scales", "best", "greedy"}
    assert len(result.finalists) == 11
    assert result.path.unit == "sublayer"
    options = dict(tiny) | {"operators": ("weight_average", "ties")}
    whole = load_problem(**options, unit="sublayer", stem="agent", seed=1).scorer(fraction=1.0)
    text = " ".join(f"{s}@{k}" for s, k in [(result.path.stem, -1), *result.path.steps])
    assert result.reward == pytest.approx(reward(whole.score(steps_of(text, whole.sources))))


def blockwise(text: str) -> bool:
    sources = [s.rpartition("@")[0] for s in text.split()][1:]
    return sources[::2] == sources[1::2]


def test_the_local_search_finds_the_best_of_many_by_few_noisy_scores():
    """A sum over eight places with four sources each: 65,536 paths, 150 scores, no agent."""

    class Sum:
        sources, n_models, n_layers, n_subsets = ("a", "b", "c", "d"), 2, 8, 10
        stacks, task_names, chooses_stem = (range(8),), ["t"], False
        worth = np.random.default_rng(0).permuted(np.tile([0.0, 0.02, 0.05, 0.1], (8, 1)), axis=1)
        noise = np.random.default_rng(1)

        def score(self, path, subset=None):
            value = sum(self.worth[k, a] for a, k in path)
            return np.array(
                [value + (0 if subset is None else 0.02 * self.noise.standard_normal())]
            )

    args = Args(preset="agent", start=True, finish=1.0, episodes=150, max_depth=8, quiet=True)
    env = ppo.make_env(_Fixed(Sum()), args)
    agent, episodes, *_ = ppo.search(env, args, RunFolder(None))
    assert ppo.choose(env, agent, episodes, args)[0]["reward"] == pytest.approx(0.8)  # the best


def test_final_candidates_are_those_expected_to_be_best_though_nobody_tried_them():
    """Worth adds up over six places; the best of 729 paths is not among the 150 that were scored."""

    class Sum:
        sources, n_models, n_layers, n_subsets = ("a", "b", "c"), 2, 6, 10
        stacks, task_names, chooses_stem = (range(6),), ["t"], False
        worth = np.random.default_rng(2).permuted(np.tile([0.0, 0.05, 0.1], (6, 1)), axis=1)

        def score(self, path, subset=None):
            return np.array([sum(self.worth[k, a] for a, k in path)])

    scorer, rng = Sum(), np.random.default_rng(3)
    episodes = []
    for i in range(150):
        path = tuple((int(a), k) for k, a in enumerate(rng.integers(3, size=6)))
        scores = scorer.score(path) + 0.02 * rng.standard_normal(1)
        episodes.append(report.scored_row(i, 0, path, i % 10, scores, scorer))
    best = tuple((int(a), k) for k, a in enumerate(scorer.worth.argmax(1)))
    assert report.text_of(best, scorer.sources) not in {e["path"] for e in episodes}
    args = Args(preset="agent", finish=0.5, episodes=150, quiet=True)
    env = ppo.make_env(_Fixed(scorer), args)
    with pytest.raises(InputError, match="--scales: expected a scorer of models, found one by"):
        ppo.search(env, dataclasses.replace(args, scales=0.5), RunFolder(None))
    agent = ppo.Agent(int(np.prod(env.observation_space.shape)), int(env.action_space.n))
    assert ppo.choose(env, agent, episodes, args)[0]["path"] == best


def test_impossible_finishes_are_refused(trained):
    with pytest.raises(InputError, match=r"--finish: expected 0 to 1, found 1.5"):
        Args(finish=1.5).check()
    with pytest.raises(
        InputError, match=r"--finish: expected at most 1 together with --scales, found 1\.35"
    ):
        Args(finish=0.6).check()
    for shares in ({"finish": 1.0, "scales": 0.0}, {"finish": 0.25}):
        with pytest.raises(InputError, match=r"--finish: expected less than 1 .* without --start"):
            Args(**shares, start=False).check()
    with pytest.raises(InputError, match="--max-depth: expected at least 3 layers, found 2"):
        train(Args(max_depth=2, episodes=8, quiet=True), problem=trained, table=False)


@pytest.mark.parametrize("mask", [True, False])
def test_a_local_search_without_an_episode_to_start_from_says_so(trained, mask):
    args = Args(episodes=2, start=False, mask_actions=mask, quiet=True)
    with pytest.raises(
        InputError, match="expected at least one legal episode in 0 before the local"
    ):
        train(args, problem=trained, table=False)


def test_a_search_that_cannot_be_made_leaves_no_folder(tiny, tmp_path, capsys):
    folder = tmp_path / "run"
    words = [w for w in arguments(tiny, folder, 24) if w not in ("--preset", "paper")]
    assert ppo.main([*words, "--max-depth", "2"]) == 2
    assert "--max-depth: expected at least" in capsys.readouterr().err
    assert not folder.exists()


def test_a_search_without_the_agent_has_no_update(trained):
    result = train(Args(finish=0.25, episodes=30, quiet=True), problem=trained, table=False)
    assert len(result.episodes) == 30
    assert result.updates == []
    assert result.policies.shape == (0, 0, 0)


def test_a_run_is_determined_by_its_seed(trained):
    first, again, other = (
        train(Args(episodes=60, seed=s, quiet=True), problem=trained, table=False)
        for s in (1, 1, 2)
    )
    assert first.episodes == again.episodes
    assert first.updates == again.updates
    assert first.path == again.path
    assert first.episodes != other.episodes


def test_the_paper_preset_runs_and_penalises_without_a_mask(trained):
    result = train(Args(preset="paper", episodes=40, quiet=True), problem=trained, table=False)
    penalised = [e for e in result.episodes if e["penalised"]]
    assert penalised  # an untrained agent goes back at layer 0 now and then
    assert all(e["raw_reward"] == e["dar_reward"] == -0.1 for e in penalised)
    assert len(result.updates) == 10
    assert all(row["epochs"] == 40 for row in result.updates)


def test_the_final_path_is_the_best_candidate_on_the_whole_reward_split(trained):
    result = train(Args(episodes=100, quiet=True), problem=trained, table=False)
    scorer = trained.scorer(fraction=1.0)
    numbers = {s: i for i, s in enumerate(trained.pool.sources)}
    scores = [
        scorer.score(
            tuple((numbers.get(s, s), int(k)) for s, k in (x.split("@") for x in f["path"].split()))
        ).mean()
        for f in result.finalists
    ]
    assert scores == pytest.approx([f["reward"] for f in result.finalists])
    assert result.reward == pytest.approx(max(scores))
    assert any(f["found"] == "greedy" for f in result.finalists)


def test_the_search_never_reads_the_test_split(trained, monkeypatch):
    """Another test split changes nothing but the test scores."""
    plain = train(Args(episodes=40, quiet=True), problem=trained, table=False)
    for task in trained.tasks:
        split = task.split("test")
        altered = dataclasses.replace(split, labels=(split.labels + 1) % len(task.classes))
        monkeypatch.setitem(task._splits, "test", altered)
    again = train(Args(episodes=40, quiet=True), problem=trained)
    assert again.path == plain.path
    assert again.episodes == plain.episodes
    assert again.scores["fine-tuned"]["stripes"] < 0.5  # the altered split was what was reported


def test_an_agent_that_chooses_the_stem_leaves_it_in_the_path(trained):
    trained.stem = "agent"
    try:
        result = train(Args(preset="agent", episodes=60, quiet=True), problem=trained, table=False)
    finally:
        trained.stem = "task_arithmetic:scale=0.5"
    stems = {e["path"].split("@-1")[0] if "@-1" in e["path"] else "base" for e in result.episodes}
    assert len(stems) > 2
    assert result.path.stem in {*trained.pool.sources, "base"}
    assert all(k >= 0 for _, k in result.path.steps)
    from rmm_lab.engine.scorer import evaluate

    path = result.path
    scores = evaluate(trained.pool, trained.tasks, path.steps, path.stem, "reward")
    assert scores.mean() == pytest.approx(result.reward)


# ------------------------------------------------------------------- looking ahead, and workers


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_what_is_looked_ahead_is_what_is_played(trained, preset):
    """In the middle of a search: generator, environment and DAR are left as they were."""
    args = Args(preset=preset, episodes=40, data_fraction=0.2, quiet=True)
    env = ppo.make_env(trained, args)
    plan = ppo.make_env(None, args, Plan(env.unwrapped.scorer))
    torch.manual_seed(0)
    agent = ppo.Agent(int(np.prod(env.observation_space.shape)), int(env.action_space.n))
    generator = torch.Generator().manual_seed(7)
    penalised = 0
    options = {"episode": 0}
    for start in (0, 7, 14):
        before = generator.get_state(), torch.get_rng_state()
        env_before = {k: repr(v) for k, v in vars(env.unwrapped).items()}
        scorer_before = env.unwrapped.scorer.evaluations, env.unwrapped.scorer.work_run
        dar_before = env.episode, env.previous
        wanted = ppo.look_ahead(plan, agent, generator, args, start, 7)
        assert torch.equal(generator.get_state(), before[0])
        assert torch.equal(torch.get_rng_state(), before[1])
        assert {k: repr(v) for k, v in vars(env.unwrapped).items()} == env_before
        assert (env.episode, env.previous) == dar_before
        scorer = env.unwrapped.scorer
        assert (scorer.evaluations, scorer.work_run) == scorer_before
        played = []
        for _ in range(7):
            _, info = ppo.play(env, agent, generator, masked=args.mask_actions, options=options)
            options = None
            penalised += info["penalised"]
            if not info["penalised"]:
                played.append((info["path"], info["subset"]))
        assert wanted == played
        assert len({subset for _, subset in played}) > (preset == "paper")  # subsets take turns
        assert not plan.unwrapped.scorer.take()  # and nothing is asked for again
    assert bool(penalised) == (preset == "paper")


@pytest.mark.parametrize("preset", ["default", "agent", "paper"])
def test_a_search_is_the_same_with_any_number_of_workers(trained, preset, monkeypatch):
    found, asked = [], []
    original = ppo.look_ahead

    def spy(*args):
        asked.append(original(*args))
        return asked[-1]

    monkeypatch.setattr(ppo, "look_ahead", spy)
    for workers in ("1", "2", "3"):
        args = Args(preset=preset, episodes=48, workers=workers, quiet=True)
        found.append(train(args, problem=trained, table=False))
        if workers == "1":
            assert not asked  # nothing is won by it
    one = found[0]
    for other in found[1:]:
        assert other.episodes == one.episodes
        assert other.updates == one.updates
        assert other.finalists == one.finalists
        assert (other.path, other.reward) == (one.path, one.reward)
        weights = other.agent.state_dict()
        assert all(torch.equal(weights[k], v) for k, v in one.agent.state_dict().items())
    walked = [e for e in one.episodes[len(trained.pool.sources) * args.start :] if e["actions"]]
    fair = sum(not e["penalised"] for e in walked)
    assert sum(map(len, asked)) == 2 * fair
    assert fair < 48 if preset == "paper" else fair == len(walked)
    assert len(walked) == {"default": 48 - 4 - 35, "agent": 48, "paper": 48}[preset]


def test_a_search_that_looks_ahead_finds_every_score_at_hand(trained, monkeypatch):
    """All that an update needs goes to the workers at once, and no episode computes on its own."""
    groups = []
    original = Scorer.prefetch

    def spy(self, wanted):
        wanted = list(wanted)
        unseen = {key for key in wanted if key not in self._seen}
        if unseen:
            groups.append(len(unseen))
        original(self, wanted)

    monkeypatch.setattr(Scorer, "prefetch", spy)
    args = Args(preset="agent", episodes=60, workers="2", quiet=True)
    train(args, problem=trained, table=False)
    assert len(groups) == 60 // 20 + 2  # updates, the greedy path, the finalists


def test_the_number_of_workers_is_no_part_of_the_result():
    """A run may go on with other workers and another budget, not with another precision or device."""
    plain = Args().config()
    assert Args(workers="4", cache_mb=3.0, threads=2).config() == plain
    assert Args(precision="bfloat16").config() != plain
    assert Args(device="cuda").config() != plain


# ----------------------------------------------------------------------------- run folder, resume


def arguments(tiny, folder, episodes):
    return [
        *("--base", tiny["base"], "--experts", *tiny["experts"], "--images", *tiny["images"]),
        *("--episodes", str(episodes), "--data-fraction", "0.5", "--run-dir", str(folder)),
        *("--preset", "paper"),
    ]


def files(folder: Path):
    return {p.name for p in folder.iterdir()}


def test_a_run_folder_holds_what_the_readme_says(tiny, tmp_path, capsys):
    folder = tmp_path / "run"
    assert ppo.main(arguments(tiny, folder, 24)) == 0
    printed = capsys.readouterr().out
    assert files(folder) == {
        *("config.json", "episodes.csv", "updates.csv", "checkpoint.safetensors"),
        *(
            "policies.bin",
            "policy.safetensors",
            "policies.safetensors",
            "path.json",
            "finalists.json",
            "table.md",
            "table.json",
        ),
        *("rewards.png", "path.png", "merged"),
    }
    episodes = from_csv((folder / "episodes.csv").read_text())
    assert [e["episode"] for e in episodes] == list(range(24))
    for e in episodes:
        if not e["penalised"]:
            assert (e["score_i1"] + e["score_i2"]) / 2 == pytest.approx(e["raw_reward"])
    for row in ("base", "fine-tuned", "TIES, tuned", "RMM"):
        assert row in printed
        assert row in (folder / "table.md").read_text()
    assert (folder / "rewards.png").read_bytes().startswith(b"\x89PNG")
    # Three ways to the same model: built from the JSON, loaded by timm, scored in the table.
    import timm

    path = LayerPath.from_json((folder / "path.json").read_text())
    built = path.build()
    loaded = timm.create_model(f"local-dir:{folder / 'merged'}", pretrained=True).eval()
    images = torch.randn(4, 1, 8, 8)
    with torch.inference_mode():
        assert torch.equal(built(images), loaded(images))


def test_resume_after_kill_ends_as_an_unbroken_run(tiny, tmp_path):
    """kill -9 in mid-run; the rest gives the same episodes, path, policy and model, to the byte."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    command = [sys.executable, "-m", "rmm_lab.ppo"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command + arguments(tiny, broken, 400), env=env, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (broken / "checkpoint.safetensors").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    partial = len(from_csv((broken / "episodes.csv").read_text()))
    assert 0 < partial < 400
    assert not (broken / "path.json").exists()
    assert ppo.main(["--resume", str(broken)]) == 0
    assert ppo.main(arguments(tiny, whole, 400)) == 0
    for name in (
        "episodes.csv",
        "updates.csv",
        "path.json",
        "table.json",
        "policy.safetensors",
        "policies.safetensors",
    ):
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name
    model = Path("merged") / "model.safetensors"
    assert (whole / model).read_bytes() == (broken / model).read_bytes()


@pytest.mark.parametrize("known", [4, 9, 14, 25, 45, 60])
def test_resume_in_any_phase_ends_as_an_unbroken_run(tiny, tmp_path, monkeypatch, known):
    """After the uniform paths, in the agent's part, at its end, in the local search, among the scales."""
    options = {"operators": ("weight_average", "ties"), "episodes": 64, "episodes_per_update": 5}
    options |= {"finish": 0.4, "scales": 0.4}
    options |= {"data_fraction": 0.25, "quiet": True} | dict(tiny)
    whole = train(Args(**options, run_dir=tmp_path / "whole"), table=False)

    class Stop(Exception):
        pass

    save = RunFolder.save_checkpoint

    def stop(self, tensors, counters, episodes, updates, policies):
        save(self, tensors, counters, episodes, updates, policies)
        if len(episodes) >= known:
            raise Stop

    monkeypatch.setattr(RunFolder, "save_checkpoint", stop)
    with pytest.raises(Stop):
        train(Args(**options, run_dir=tmp_path / "run"), table=False)
    monkeypatch.undo()
    saved = len(from_csv((tmp_path / "run" / "episodes.csv").read_text()))
    assert saved == {4: 4, 9: 9, 14: 14, 25: 26, 45: 51, 60: 62}[known]
    again = train(Args(**options, resume=tmp_path / "run"), table=False)
    assert again.episodes == whole.episodes
    assert again.updates == whole.updates
    assert again.finalists == whole.finalists
    assert torch.equal(again.policies, whole.policies)
    for name in ("episodes.csv", "updates.csv", "policies.bin", "path.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_ctrl_c_says_how_to_go_on(tiny, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    original, calls = ppo.update, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(ppo, "update", interrupted)
    assert ppo.main(arguments(tiny, folder, 40)) == 130
    assert f"--resume {folder}" in capsys.readouterr().err
    assert len(from_csv((folder / "episodes.csv").read_text())) == 8  # two updates of four
    monkeypatch.setattr(ppo, "update", original)
    assert ppo.main(["--resume", str(folder)]) == 0
    assert len(from_csv((folder / "episodes.csv").read_text())) == 40


RESULT = ("episodes.csv", "updates.csv", "policies.safetensors", "policy.safetensors", "path.json")


@pytest.mark.parametrize("stop", ["episodes.csv", "updates.csv", "policies.bin", "checkpoint"])
@pytest.mark.parametrize("save", [1, 3])
def test_a_search_stopped_between_the_files_of_a_save_ends_as_an_unbroken_one(
    tiny, tmp_path, monkeypatch, stop, save
):
    """Stopped before the named file of the first and of the third save, and with half a line left."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert ppo.main(arguments(tiny, whole, 16)) == 0
    count = 0

    def stopped(original):
        def write(file, content):
            nonlocal count
            count += stop in file.name
            if stop in file.name and count == save:
                raise KeyboardInterrupt
            original(file, content)

        return write

    with monkeypatch.context() as patched:
        for how in ("append", "write"):
            patched.setattr(runs, how, stopped(getattr(runs, how)))
        assert ppo.main(arguments(tiny, broken, 16)) == 130
    assert (broken / "checkpoint.safetensors").exists() == (save > 1)
    with (broken / "episodes.csv").open("ab") as table:
        table.write(b"17,4,0.12")
    assert ppo.main(["--resume", str(broken)]) == 0
    for name in (*RESULT, "policies.bin"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name


def test_a_finished_search_that_is_resumed_cuts_its_tables(tiny, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert ppo.main(arguments(tiny, whole, 16)) == 0
    assert ppo.main(arguments(tiny, broken, 16)) == 0
    table = broken / "episodes.csv"
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join([*lines, lines[-1].replace("15,", "16,", 1)]))
    assert ppo.main(["--resume", str(broken)]) == 0
    for name in RESULT:
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name


def test_losses_stay_finite_with_one_step_in_a_batch():
    """One episode of one action: the deviation of one return is 0, and nothing may become NaN."""
    agent, data = batch(1)
    row = ppo.update(agent, torch.optim.Adam(agent.parameters()), data, Args(), 0.0)
    assert all(math.isfinite(v) for v in row.values())
    assert all(torch.isfinite(p).all() for p in agent.parameters())


def test_mean_policy_is_the_mean_over_the_steps_at_a_place():
    one = {
        "layer": [-1, 0, -1],
        "policy": [torch.tensor(p) for p in ([1.0, 0], [0, 1], [0.5, 0.5])],
    }
    two = {"layer": [-1], "policy": [torch.tensor([0.0, 1.0])]}
    found = ppo.mean_policy([one, two], -1, 2)
    torch.testing.assert_close(found[:2], torch.tensor([[0.5, 0.5], [0.0, 1.0]]))
    assert found.shape == (3, 2)
    assert found[2].isnan().all()  # no step stood at layer 1


def test_policies_are_the_agents_own_and_end_near_its_last_ones(problem):
    args = Args(preset="agent", episodes=40, quiet=True, seed=3)
    result = ppo.train(args, problem=problem, table=False)
    policies = result.policies
    assert policies.shape == (2, 3, 6)  # two updates, three layers, N + M + skip + back
    assert torch.allclose(policies.nansum(-1), torch.ones(2, 3), atol=1e-5)
    assert (policies[:, 0, 5] == 0).all()  # back at layer 0 is masked
    first = policies[0, 1]  # an untrained policy is close to uniform
    assert (first - 1 / 6).abs().max() < 0.02
