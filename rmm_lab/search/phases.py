"""The phases of a search: what spends its evaluations, and how it chooses in the end.

Each phase spends its share of the episodes and adds rows to the log, which saves them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from rmm_lab import ppo
from rmm_lab.engine.block_view import BlockView
from rmm_lab.engine.prefetch import RecordingScorer
from rmm_lab.engine.scorer import Scorer
from rmm_lab.env import DynamicAverageReward
from rmm_lab.errors import InputError
from rmm_lab.reward import Path, Step, path_text, places_of, reward
from rmm_lab.search.config import Config
from rmm_lab.search.finalists import candidates, legal, rank, rounds, scores
from rmm_lab.search.layer_scales import (
    BOUNDS,
    MEANS,
    evolution_of,
    path_of_scales,
    start_scales,
)
from rmm_lab.search.numbers import GaussianAgent
from rmm_lab.search.preferences import preference_of, with_worth
from rmm_lab.search.problem import Problem
from rmm_lab.search.run_folder import Row, RunFolder, Stored, optimiser_tensors, restore_optimiser
from rmm_lab.search.shaping import DriftShaping

# ------------------------------------------------------------------------------------ scorer and env


def make_scorer(problem: Problem, config: Config) -> Scorer:
    """What scores the paths of a search: on the reward split, on the run's share of the data.

    The final choice is by the metric, unless no label is read, or so few are known that good models have the
    same ones right: then it is by what scores the episodes.
    """
    run = config.run
    choice = "metric" if problem.spec.label_fraction == 1 else run.reward
    return problem.scorer(
        fraction=run.data_fraction,
        seed=run.seed,
        cache_mb=run.cache_mb,
        workers=run.workers,
        device=run.device,
        precision=run.precision,
        reward=run.reward,
        choice="agreement" if run.reward == "agreement" else choice,
    )


def view_of(scorer: Any, config: Config) -> Any:
    """The scorer as the agent sees it: by blocks, where later phases take blocks apart."""
    return BlockView(scorer) if config.problem.unit == "both" else scorer


def make_env(view: Any, config: Config) -> Any:
    """The environment that scores paths by ``view``, under DAR, whose T_max counts the agent's episodes, and
    with the shaping that was asked for."""
    run = config.run
    env = gym.make(
        "rmm_lab/Merging-v0",
        scorer=view,
        actions=run.actions,
        observation=run.observation,
        penalty=run.penalty,
        max_steps=run.max_steps,
        max_depth=run.max_depth,
        episodes_per_subset=run.episodes_per_subset,
    )
    n_agent = shares(config, len(view.sources)).agent
    env = DynamicAverageReward(env, dar_lambda=run.dar_lambda, max_episodes=max(1, n_agent))
    if run.shaping:
        env = DriftShaping(env, weight=run.shaping, gamma=config.agent.gamma)
    return env


class Shares(NamedTuple):
    """The episodes of each phase."""

    uniform: int
    agent: int
    scales: int


def shares(config: Config, n_sources: int) -> Shares:
    """How the phases share ``run.episodes``."""
    run = config.run
    uniform = 0
    if run.score_uniform_first:
        n_subsets = max(1, round(1 / run.data_fraction))
        uniform = min(run.episodes, n_sources * rounds(run.episodes, n_sources, n_subsets))
    scales = round(run.cma_share * (run.episodes - uniform))
    return Shares(uniform, run.episodes - uniform - scales, scales)


# --------------------------------------------------------------------------------------------- phases


@dataclass
class Search:
    """A search under way: what it works with, and its log."""

    config: Config
    scorer: Any  # scores paths of layers
    view: Any  # the same, as the agent sees it
    env: Any
    agent: ppo.Agent
    optimiser: torch.optim.Optimizer
    generator: torch.Generator
    folder: RunFolder
    episodes: list[Row] = field(default_factory=list)
    updates: list[Row] = field(default_factory=list)
    policies: list[Tensor] = field(default_factory=list)

    @classmethod
    def start(
        cls, config: Config, scorer: Any, folder: RunFolder, stored: Stored | None = None
    ) -> Search:
        """A new search, or one as the folder's last checkpoint left it: ``folder.load_checkpoint()``."""
        view = view_of(scorer, config)
        env = make_env(view, config)
        kind = GaussianAgent if config.run.actions == "scales" else ppo.Agent
        agent, optimiser = ppo.make_agent(env, config.agent, config.run.seed, kind)
        if isinstance(agent, GaussianAgent):
            agent.deviate(config.run.deviation)
        generator = torch.Generator().manual_seed(config.run.seed)
        search = cls(config, scorer, view, env, agent, optimiser, generator, folder)
        if stored is not None:
            search.restore(*stored)
        return search

    def restore(
        self,
        tensors: dict[str, Tensor],
        counters: dict[str, Any],
        episodes: list[Row],
        updates: list[Row],
    ) -> None:
        """Go on where a checkpoint was saved; InputError if it is another search's."""
        try:
            state = {k: tensors[f"agent.{k}"] for k in self.agent.state_dict()}
            self.agent.load_state_dict(state)
            restore_optimiser(self.optimiser, tensors, "adam")
            self.generator.set_state(tensors["generator"])
            self.policies = list(tensors.get("policies", ()))
            self.env.set_wrapper_attr("previous", counters["dar_previous"])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise InputError(
                f"--resume: expected this search's checkpoint in {self.folder.path}, found another "
                f"one ({error}); start the search again in another folder"
            ) from error
        self.episodes, self.updates = episodes, updates

    def save(self) -> None:
        """Store all that the search needs to go on."""
        tensors = {f"agent.{k}": v for k, v in self.agent.state_dict().items()}
        tensors |= optimiser_tensors(self.optimiser, "adam")
        tensors["generator"] = self.generator.get_state()
        if self.policies:
            tensors["policies"] = torch.stack(self.policies)  # (U, P, A)
        counters = {"dar_previous": self.env.get_wrapper_attr("previous")}
        self.folder.save_checkpoint(tensors, counters, self.episodes, self.updates)

    def log(self, phase: str, subset: int, path: Path, info: dict[str, Any]) -> None:
        """Add a row. ``info``: raw_reward, dar_reward, penalised, scores by task, actions."""
        scores = info.get("scores") or dict.fromkeys(self.scorer.task_names, "")
        row = {
            "episode": len(self.episodes),
            "phase": phase,
            "update": len(self.updates),
            "subset": subset,
            "raw_reward": info["raw_reward"],
            "dar_reward": info.get("dar_reward", info["raw_reward"]),
            "penalised": int(info.get("penalised", False)),
            **{f"score_{name}": value for name, value in scores.items()},
            "depth": sum(step.layer >= 0 for step in path),
            "actions": " ".join(map(str, info.get("actions", ()))),
            "path": path_text(path),
        }
        self.episodes.append(row)

    def score(self, phase: str, paths: Sequence[Path], subset: int) -> list[float]:
        """Score paths that no agent walked on one subset, log and save them; their rewards."""
        rewards = []
        found = scores(self.scorer, [(path, subset) for path in paths], in_turn=True)
        for path, own in zip(paths, found, strict=True):
            by_task = dict(zip(self.scorer.task_names, own.tolist(), strict=True))
            rewards.append(reward(own))
            self.log(phase, subset, path, {"raw_reward": rewards[-1], "scores": by_task})
        self.save()
        return rewards

    def expand(self, path: Path) -> Path:
        """A path as the agent sees it, in layers of the scorer."""
        return self.view.expand(path) if self.view is not self.scorer else path

    @property
    def shares(self) -> Shares:
        """The episodes of each phase."""
        return shares(self.config, len(self.view.sources))

    def count(self, phase: str) -> int:
        """Episodes of a phase so far."""
        return sum(e["phase"] == phase for e in self.episodes)


def uniform_phase(search: Search) -> Iterator[int]:
    """The uniform path of each source, on some subsets: the agent does not learn from these baselines."""
    n, done = search.shares.uniform, search.count("uniform")
    places = places_of(search.scorer)
    paths = [tuple(Step(s, k) for k in places) for s in search.scorer.sources]
    while done < n:
        subset, known = divmod(done, len(paths))
        some = paths[known:][: n - done]
        search.score("uniform", some, subset)
        done += len(some)
        yield len(some)


def agent_phase(search: Search) -> Iterator[int]:
    """PPO on the merging environment."""
    args, env, agent = search.config.agent, search.env, search.agent
    n_agent, done = search.shares.agent, search.count("agent")
    if isinstance(agent, GaussianAgent) and not done:
        agent.start.copy_(torch.from_numpy(start_scales(search.scorer, search.episodes).mean(0)))
    recorder = None
    if not getattr(search.scorer, "alone", True):  # several workers
        recorder = make_env(RecordingScorer(search.view), search.config)

    def look_ahead(n: int) -> None:
        """Let all workers score the next n episodes, played before without scores, by the same draws."""
        if recorder is None:
            return
        state = search.generator.get_state()
        for i in range(n):
            options = {"episode": search.count("agent") + i}
            ppo.play(recorder, agent, search.generator, masked=args.mask_actions, options=options)
        search.generator.set_state(state)
        search.view.prefetch(recorder.unwrapped.scorer.take())

    places = places_of(search.view)
    for played, diagnostics in ppo.learn(
        env,
        args,
        agent,
        search.optimiser,
        search.generator,
        n_agent,
        done=done,
        before_rollout=look_ahead,
    ):
        for episode in played:
            path = search.expand(episode.info["path"])
            numbers = search.config.run.actions == "scales"  # which the path holds
            info = episode.info | {"actions": () if numbers else episode.actions}
            search.log("agent", info["subset"], path, info)
        search.policies.append(mean_policy(played, places))
        row = {"update": len(search.updates), "episodes": len(search.episodes)} | diagnostics
        search.updates.append(row)
        search.save()
        yield len(played)


def scales_phase(search: Search) -> Iterator[int]:
    """CMA-ES over a scale for each layer and member, around the best path so far."""
    n = search.shares.scales - search.count("scales")
    if n <= 0:
        return
    evolution = evolution_of(search.scorer, search.episodes, search.config.run.seed)
    places = places_of(search.scorer)
    while n > 0:
        asked = evolution.ask(n)
        paths = [path_of_scales(x, places) for x in asked]
        subset = evolution.generation % search.scorer.n_subsets
        evolution.tell(asked, search.score("scales", paths, subset))
        n -= len(asked)
        yield len(asked)


def mean_policy(played: Sequence[ppo.Episode], places: Sequence[int]) -> Tensor:
    """What the policy that acted did at each place, for those who look on: (P, A).

    The mean of pi(.|s) over all steps of a rollout at a place; a row of NaN where no step stood there.
    """
    policy = torch.stack([p for e in played for p in e.policies])  # (B, A)
    layer = torch.tensor([info["layer"] for e in played for info in e.infos])  # (B,)
    return torch.stack([policy[layer == k].mean(0) for k in places])  # (P, A)


def choose(search: Search) -> list[Row]:
    """The candidates for the final path, scored on the whole reward split, the best first.

    They are the greedy rollout (Eq. 1) and ``run.finalists`` paths: the shortlist, and where scales were
    searched, three quarters of them the means that CMA-ES or the agent's policies arrived at. With a
    preference the shortlist goes by that, and as many of these means come on top of it.
    """
    run, answers = search.config.run, []
    if search.count("scales"):
        evolution = evolution_of(search.scorer, search.episodes, run.seed)
        means = evolution.answers(run.finalists - run.finalists // 4)
        answers = [path_of_scales(x, places_of(search.scorer)) for x in means]
    elif run.actions == "scales":
        means = [p.double().numpy() for p in search.policies[::-1]]  # (P, M), the newest first
        means = [np.mean(means[:MEANS], axis=0), *means] if means else []
        paths = (path_of_scales(x.clip(*BOUNDS), places_of(search.view)) for x in means)
        answers = [search.expand(path) for path in paths]
    preference = preference_of(run.prefer, search.scorer)
    found = candidates(legal(search.episodes), run.finalists, answers)
    if preference is not None:
        liked = with_worth(search.episodes, search.scorer.task_names, preference)
        found = {p: how for p, how in found.items() if how == "scales"}
        found = candidates(liked, run.finalists) | found
    masked, options = search.config.agent.mask_actions, {"subset": None}
    greedy = ppo.play(search.env, search.agent, None, masked=masked, options=options)
    if not greedy.info["penalised"]:
        found[search.expand(greedy.info["path"])] = "greedy"
    if not found:  # no finalists were asked for, and the greedy rollout is illegal
        found = candidates(legal(search.episodes), 1)
    return rank(search.scorer, found, preference.worth if preference else None)
