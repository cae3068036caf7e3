"""A search from models to a merged model: phases, final choice, test split, results.

    for phase in (uniform_phase, agent_phase, scales_phase): phase(search)

Each phase spends its share of the episodes and adds rows to the log, which saves them. The final path is
chosen on the whole reward split; the test split is scored only after that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import torch
from torch import Tensor
from tqdm import tqdm

from rmm_lab import ppo
from rmm_lab.engine.block_view import BlockView
from rmm_lab.engine.prefetch import RecordingScorer
from rmm_lab.engine.scorer import Scorer
from rmm_lab.env import DynamicAverageReward
from rmm_lab.errors import InputError
from rmm_lab.path import LayerPath
from rmm_lab.reward import Path as Steps
from rmm_lab.reward import Step, path_text, places_of, reward
from rmm_lab.search import report
from rmm_lab.search.config import Config, check_depth, read_config
from rmm_lab.search.finalists import candidates, legal, rank
from rmm_lab.search.layer_scales import evolution_of, path_of_scales
from rmm_lab.search.problem import Problem, problem_of
from rmm_lab.search.run_folder import (
    Row,
    RunFolder,
    check_new,
    optimiser_tensors,
    restore_optimiser,
)
from rmm_lab.search.shaping import DriftShaping


@dataclass
class Result:
    """What a search arrived at.

    ``path``: the chosen layer path. ``reward``: its score on the whole reward split, in [0, 1].
    ``episodes``, ``updates``: one row each, as in the run folder. ``policies``: (U, P, A), see
    ``mean_policy``. ``scores``: method -> task -> test metric in [0, 1]; empty if ``train`` was told not to
    report. ``agent``: the trained policy. ``finalists``: the candidates for the path, the best first.
    ``seconds``: from loaded models to the path; NaN for a run that was resumed.
    """

    path: LayerPath
    reward: float
    episodes: list[Row]
    updates: list[Row]
    policies: Tensor
    scores: dict[str, dict[str, float]]
    agent: ppo.Agent
    folder: Path | None = None
    finalists: list[Row] = field(default_factory=list)
    seconds: float = float("nan")


# ------------------------------------------------------------------------------------ scorer and env


def make_scorer(problem: Problem, config: Config) -> Scorer:
    """What scores the paths of a search: on the reward split, on the run's share of the data."""
    run = config.run
    return problem.scorer(
        fraction=run.data_fraction,
        seed=run.seed,
        cache_mb=run.cache_mb,
        workers=run.workers,
        device=run.device,
        precision=run.precision,
        reward=run.reward,
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
    uniform = min(run.episodes, n_sources) if run.score_uniform_first else 0
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
    def start(cls, config: Config, scorer: Any, folder: RunFolder) -> Search:
        """A new search, or the folder's, as its last checkpoint left it."""
        view = view_of(scorer, config)
        env = make_env(view, config)
        agent, optimiser = ppo.make_agent(env, config.agent, config.run.seed)
        generator = torch.Generator().manual_seed(config.run.seed)
        search = cls(config, scorer, view, env, agent, optimiser, generator, folder)
        if (stored := folder.load_checkpoint()) is not None:
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

    def log(self, phase: str, subset: int, path: Steps, info: dict[str, Any]) -> None:
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

    def score(self, phase: str, paths: Sequence[Steps], subset: int) -> list[float]:
        """Score paths that no agent walked on one subset, log and save them; their rewards."""
        if hasattr(self.scorer, "prefetch"):
            self.scorer.prefetch([(path, subset) for path in paths])
        rewards = []
        for path in paths:
            scores = self.scorer.score(path, subset)
            by_task = dict(zip(self.scorer.task_names, scores.tolist(), strict=True))
            rewards.append(reward(scores))
            self.log(phase, subset, path, {"raw_reward": rewards[-1], "scores": by_task})
        self.save()
        return rewards

    def expand(self, path: Steps) -> Steps:
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
    """The uniform path of each source: the obvious baselines. The agent does not learn from them."""
    n, done = search.shares.uniform, search.count("uniform")
    if done < n:
        places = places_of(search.scorer)
        paths = [tuple(Step(s, k) for k in places) for s in search.scorer.sources]
        search.score("uniform", paths[done:n], 0)
        yield n - done


def agent_phase(search: Search) -> Iterator[int]:
    """PPO on the merging environment."""
    args, env, agent = search.config.agent, search.env, search.agent
    n_agent, done = search.shares.agent, search.count("agent")
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
            info = episode.info | {"actions": episode.actions}
            search.log("agent", info["subset"], path, info)
        search.policies.append(mean_policy(played, places))
        row = {"update": len(search.updates), "episodes": len(search.episodes)} | diagnostics
        search.updates.append(row)
        search.save()
        yield len(played)


def scales_phase(search: Search) -> Iterator[int]:
    """CMA-ES over a scale for each layer and expert, around the best path so far."""
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

    They are the greedy rollout (Eq. 1) and ``run.finalists`` paths: the shortlist, and where scales
    evolved, three quarters of them the means that CMA-ES arrived at.
    """
    run, answers = search.config.run, []
    if search.count("scales"):
        evolution = evolution_of(search.scorer, search.episodes, run.seed)
        means = evolution.answers(run.finalists - run.finalists // 4)
        answers = [path_of_scales(x, places_of(search.scorer)) for x in means]
    found = candidates(legal(search.episodes), run.finalists, answers)
    masked, options = search.config.agent.mask_actions, {"subset": None}
    greedy = ppo.play(search.env, search.agent, None, masked=masked, options=options)
    if not greedy.info["penalised"]:
        found[search.expand(greedy.info["path"])] = "greedy"
    if not found:  # no finalists were asked for, and the greedy rollout is illegal
        found = candidates(legal(search.episodes), 1)
    return rank(search.scorer, found)


# ----------------------------------------------------------------------------------------- the whole


def run_phases(search: Search) -> None:
    """All phases in turn, under a progress bar."""
    run = search.config.run
    bar = tqdm(total=run.episodes, initial=len(search.episodes), unit="ep", disable=run.quiet)
    with bar:
        for phase in (uniform_phase, agent_phase, scales_phase):
            for n in phase(search):
                recent = [e["raw_reward"] for e in search.episodes[-50:]]
                bar.set_postfix_str(f"last 50: {100 * sum(recent) / len(recent):.1f} %")
                bar.update(n)


def train(config: Config, problem: Problem | None = None, *, table: bool = True) -> Result:
    """The main job: load, search, choose a path on the reward split, report on the test split once.

    Args:
        config: see ``configure``.
        problem: what is merged, if it is loaded already; its ``spec`` then takes the place of
            ``config.problem``.
        table: whether to score the test split.

    Raises InputError for bad input, before anything is written. Ctrl-C leaves a folder to resume. Threads,
    random state and allocator of the caller stay as they are.
    """
    run = config.run
    if problem is not None:
        config = dataclasses.replace(config, problem=problem.spec)
    if run.resume is not None:
        check_same_config(config, RunFolder(run.resume).read_config())
    elif run.run_dir is not None:
        check_new(run.run_dir)
    with _threads(run.threads):
        problem = problem_of(config.problem) if problem is None else problem
        splits = ("reward", "test") if table else ("reward",)
        for task in problem.tasks:  # broken data must show before anything is written
            for split in splits:
                task.split(split)
        say = (lambda *a: None) if run.quiet else print
        for note in report.notes(problem.tasks, splits):
            say(f"note: {note}")
        scorer = make_scorer(problem, config)
        with contextlib.closing(scorer):
            check_depth(scorer, config)
            make_env(view_of(scorer, config), config)  # wrong bounds must show before a folder does
            if run.resume is not None:
                folder = RunFolder(run.resume)
            else:
                folder = RunFolder.create(run.run_dir, config.stored())
            start = time.perf_counter()
            search = Search.start(config, scorer, folder)
            run_phases(search)
            finalists = choose(search)
            seconds = time.perf_counter() - start if run.resume is None else float("nan")
        say(report.cost(scorer))
        best = finalists[0]
        stem = "base" if problem.stem == "agent" else problem.stem
        path = LayerPath.of(problem.pool, best["path"], stem)
        result = Result(
            path=path,
            reward=best["reward"],
            episodes=search.episodes,
            updates=search.updates,
            policies=torch.stack(search.policies) if search.policies else torch.zeros(0, 0, 0),
            scores={},
            agent=search.agent,
            folder=folder.path,
            finalists=[row | {"path": path_text(row["path"])} for row in finalists],
            seconds=seconds,
        )
        say(f"path: {path_text(path.path)}")
        how = f"on the whole reward split, best of {len(finalists)}"
        say(f"reward: {100 * result.reward:.2f} % {how}")
        rows = report.evaluate_on_test(result, problem, config) if table else []
        names = [task.name for task in problem.tasks]
        result.scores = {r.name: dict(zip(names, r.scores, strict=True)) for r in rows}
        if rows:
            say(report.plain(rows, problem.tasks))
        if folder.path is not None:
            report.write_results(result, rows, problem, folder)
            say(f"\nwritten: {folder.path} (the merged model: {folder.path / 'merged'})")
    return result


def check_same_config(config: Config, stored: dict[str, Any]) -> None:
    """InputError unless a run that is resumed has the options that it had before."""
    folder = config.run.resume
    before = read_config(stored, folder or "").stored()
    for part, values in config.stored().items():
        for name, value in values.items():
            if (old := before[part][name]) != value:
                raise InputError(
                    f"--resume: expected --{name.replace('_', '-')} {old} as in {folder}, found {value}; "
                    "leave the option out, or start a new run"
                )


@contextlib.contextmanager
def _threads(n: int) -> Iterator[None]:
    """torch's threads, as long as the block runs; 0 leaves them."""
    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
