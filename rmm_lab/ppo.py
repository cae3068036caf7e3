"""Reinforced Model Merging: a PPO agent that composes a model layer by layer, in one file.

    python -m rmm_lab.ppo                                 the demo: digits and textures, as they ship
    python -m rmm_lab.ppo --preset paper                  with the published hyper-parameters
    python -m rmm_lab.ppo --experts qa                    three T5s on three question-answering tasks
    python -m rmm_lab.ppo --base B --experts E1 E2 --images D1 D2      your own models and images
    python -m rmm_lab.ppo --base B --experts E1 E2 --texts D1 D2       your own T5s and texts

Read it from top to bottom: arguments, agent, rollout, update (Eq. 8 and 9), search, result.
Sources: Han et al. 2025 (RMM); Schulman et al. 2017 (PPO). Style after CleanRL.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from rmm_lab.engine.cache import keep_freed_memory
from rmm_lab.engine.scorer import (
    PRECISIONS,
    REWARDS,
    Blocks,
    Plan,
    Scorer,
    name_of,
    shortlist,
    steps_of,
)
from rmm_lab.engine.scorer import Path as Steps
from rmm_lab.errors import InputError, one_sentence
from rmm_lab.path import LayerPath
from rmm_lab.search import report
from rmm_lab.search.gaussian_process import surrogate_of
from rmm_lab.search.layer_scales import evolution_of, path_of_scales
from rmm_lab.search.problem import OPERATORS, STEM, Problem, load_problem
from rmm_lab.search.run_folder import (
    Row,
    RunFolder,
    check_new,
    optimiser_tensors,
    restore_optimiser,
)

# =============================================================================================
# Arguments
# =============================================================================================

FROM_PRESET: Any = None  # a field left at this takes its preset's value

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {  # as published with the paper, but for the bounds on an episode
        "metric": "accuracy",
        "operators": ("task_arithmetic", "ties", "dare"),
        "stem": "task_arithmetic",
        "unit": "block",
        "observation": "map",
        "mask_actions": False,
        "start": False,
        "finish": 0.0,
        "scales": 0.0,
        "episodes_per_update": 4,
        "episodes_per_subset": 1,
        "update_epochs": 40,
        "learning_rate": 3e-4,
        "critic_learning_rate": 1e-3,
        "gamma": 0.99,
        "clip": 0.2,
        "value_coef": 0.5,
        "entropy": 0.0001,
        "entropy_end": 0.0001,
        "target_kl": 0.0,
        "dar": 0.8,
    },
    "agent": {  # the agent alone, as it measures best on the reward split; figures in the README
        "metric": "auto",
        "operators": OPERATORS,
        "stem": STEM,
        "unit": "block",
        "observation": "map+cursor",
        "mask_actions": True,
        "start": False,
        "finish": 0.0,
        "scales": 0.0,
        "episodes_per_update": 20,
        "episodes_per_subset": 20,
        "update_epochs": 20,
        "learning_rate": 3e-3,
        "critic_learning_rate": 3e-3,
        "gamma": 1.0,
        "clip": 0.2,
        "value_coef": 0.5,
        "entropy": 0.1,
        "entropy_end": 0.02,
        "target_kl": 0.05,
        "dar": 0.0,  # off: the episodes of an update share a subset
    },
}
# The agent walks through whole blocks; a local search around the best paths takes them apart; then a scale
# for each layer and expert evolves around the best one.
PRESETS["default"] = PRESETS["agent"] | {
    "unit": "both",
    "start": True,
    "finish": 0.05,
    "scales": 0.75,
}


@dataclass
class Args:
    """Search a merged model with PPO and report it on the test split."""

    # --- what is merged
    experts: tuple[str, ...] = ("demo",)
    """Models to merge: a group that ships (demo, glyphs, vision, qa, mixed), names, folders, hub names."""
    base: str | None = None
    """The model they were fine-tuned from: a folder, a hub name, base or text-base; for your own experts."""
    images: tuple[str, ...] = ()
    """For ViTs: an image folder per expert, in the experts' order; needed for your own experts."""
    texts: tuple[str, ...] = ()
    """For T5s: per expert a folder or file of jsonl, FORMAT:FOLDER, FORMAT:hf-hub, or a set that ships."""
    metric: Literal["auto", "accuracy", "balanced"] = FROM_PRESET
    """For T5s: auto balances the answers of a task where one of them is much more frequent."""
    normalise_length: bool = False
    """For T5s: divide a choice's log-probability by its number of tokens; the paper takes the sum."""
    multi_task: str | None = None
    """Folder of a multi-task model to compare with; those that ship are found by themselves."""
    operators: tuple[str, ...] = FROM_PRESET
    """Merging actions, such as ties, task_arithmetic:scale=0.5 or dare:drop_rate=0.5,scale=1."""
    scope: Literal["layer", "tensor", "global"] = "layer"
    """What an operator trims over: each layer, each tensor, or the whole model."""
    stem: str = FROM_PRESET
    """Source of the weights outside the layers: base, an expert, an operator, or agent (it chooses)."""

    unit: Literal["block", "sublayer", "both"] = FROM_PRESET
    """What is chosen at a time: block (the paper), sublayer (attention, MLP), both: blocks, then these."""

    # --- the search
    preset: Literal["default", "agent", "paper"] = "default"
    """default: what measures best here; agent: its agent alone; paper: as published. It sets what follows."""
    episodes: int = 700
    """Merged models to evaluate, T_max of Eq. 10."""
    data_fraction: float = 0.1
    """Share of each task's reward split that scores an episode, in (0, 1]."""
    seed: int = 1
    """Seed of the policy, the rollouts, the data subsets and the random operators."""
    reward: Literal["metric", "likelihood"] = "metric"
    """Of an episode: each task's metric (Eq. 7), or how likely the right answers are, less noisy on few."""
    dar: float = FROM_PRESET
    """Lambda of the Dynamic Average Reward, Eq. 10, in [0, 1]; 0 switches it off."""
    observation: Literal["map", "map+cursor"] = FROM_PRESET
    """What the agent sees: the merging map of Eq. 5, or the map and its own position."""
    mask_actions: bool = FROM_PRESET
    """Give illegal actions no probability, rather than a penalty."""
    penalty: float = -0.1
    """Reward of an illegal move, at most 0; rewards are in [0, 1]."""
    max_steps: int | None = None
    """Longest episode in actions; by default four times the layers, and one."""
    max_depth: int | None = None
    """Most layers of a merged model; by default twice the layers."""
    start: bool = FROM_PRESET
    """Score the uniform path of each source first; these count as episodes."""
    finish: float = FROM_PRESET
    """Share of the episodes, after the agent's, for a local search around the best paths, in [0, 1]."""
    scales: float = FROM_PRESET
    """Share of the episodes, the last ones, for a scale per layer and expert, around the best path."""
    finalists: int = 10
    """Best paths, besides the greedy one, that are scored on the whole reward split at the end."""

    # --- PPO
    episodes_per_update: int = FROM_PRESET
    """Episodes of one policy per update."""
    episodes_per_subset: int = FROM_PRESET
    """Episodes in a row that are scored on the same data subset."""
    update_epochs: int = FROM_PRESET
    """Gradient steps on each rollout, each on all of it."""
    learning_rate: float = FROM_PRESET
    """Adam's learning rate of the actor."""
    critic_learning_rate: float = FROM_PRESET
    """Adam's learning rate of the critic."""
    gamma: float = FROM_PRESET
    """Discount of the return per step, in (0, 1]."""
    clip: float = FROM_PRESET
    """Epsilon of the clipped objective, Eq. 8."""
    value_coef: float = FROM_PRESET
    """Weight of the critic's loss."""
    entropy: float = FROM_PRESET
    """Weight of the entropy bonus at the start."""
    entropy_end: float = FROM_PRESET
    """Weight of the entropy bonus at the end; it changes linearly."""
    target_kl: float = FROM_PRESET
    """Stop an update once the policy has moved this far (approximate KL); 0 never stops."""

    # --- the run
    run_dir: Path | None = None
    """New folder for the results; the command line makes runs/ppo-DATE-TIME by default."""
    resume: Path | None = None
    """Folder of a stopped run to go on with, to the same result as an unbroken one."""
    threads: int = 1
    """CPU threads for torch; with more than one, small models are often slower. 0: torch's choice."""
    workers: int | str = 1
    """Scoring at once: a number of threads, or ray, or ray://HOST:PORT (a cluster); changes no reward."""
    cache_mb: float | None = None
    """MiB for activations that are used again, by default a quarter of free memory; changes no reward."""
    device: str = "cpu"
    """Where the models run: cpu, or a GPU such as cuda."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the models in the search; bfloat16 may be faster, and changes rewards a little. Tables: float32."""
    quiet: bool = False
    """Print nothing while searching."""

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise InputError(f"--preset: expected {' or '.join(PRESETS)}, found {self.preset!r}")
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is FROM_PRESET:
                setattr(self, name, value)

    def check(self) -> None:
        """Raise InputError for the first value out of range."""
        for names, expected, ok in (
            ("episodes episodes_per_update episodes_per_subset", "at least 1", lambda v: v >= 1),
            ("update_epochs", "at least 1", lambda v: v >= 1),
            ("max_steps max_depth", "at least 1", lambda v: v is None or v >= 1),
            ("seed", "0 or more and below 2**63", lambda v: 0 <= v < 2**63),
            ("threads", "0 to 1024", lambda v: 0 <= v <= 1024),
            ("data_fraction", "at least 1e-6", lambda v: not 0 < v < 1e-6),
            ("data_fraction gamma", "more than 0 and at most 1", lambda v: 0 < v <= 1),
            ("dar finish scales", "0 to 1", lambda v: 0 <= v <= 1),
            ("learning_rate critic_learning_rate clip", "more than 0", lambda v: 0 < v < np.inf),
            ("entropy entropy_end value_coef target_kl", "0 or more", lambda v: 0 <= v < np.inf),
            ("finalists", "0 or more", lambda v: 0 <= v < np.inf),
            ("cache_mb", "0 or more", lambda v: v is None or 0 <= v < np.inf),
            ("precision", " or ".join(PRECISIONS), lambda v: v in PRECISIONS),
            ("reward", " or ".join(REWARDS), lambda v: v in REWARDS),
            ("penalty", "0 or less", lambda v: -np.inf < v <= 0),
        ):
            for name in names.split():
                value = getattr(self, name)
                if isinstance(value, str) != (name in ("precision", "reward")) or not ok(value):
                    raise InputError(
                        f"--{name.replace('_', '-')}: expected {expected}, found "
                        f"{getattr(self, name)}; correct it"
                    )
        if (both := self.finish + self.scales) > 1 + 1e-9:
            raise InputError(
                f"--finish: expected at most 1 together with --scales, found {both:g}; make one smaller"
            )
        if both > 1 - 1e-9 and not self.start:
            raise InputError(
                "--finish: expected less than 1 together with --scales and without --start, found 1; a "
                "local search needs paths to start from"
            )

    def config(self) -> dict[str, Any]:
        """What determines the result, as JSON; where and how loudly it runs is left out."""
        data = dataclasses.asdict(self)
        for name in ("run_dir", "resume", "quiet", "threads", "workers", "cache_mb"):
            del data[name]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in data.items()}


@dataclass
class Result:
    """What a search found.

    ``path``: the chosen layer path. ``reward``: its mean score on the whole reward split.
    ``episodes``, ``updates``: one row each, as in the run folder. ``policies``: (U, P, A), see
    ``mean_policy``, one for each update. ``scores``: method -> task -> test metric in [0, 1]; empty if
    ``train`` was told not to report. ``agent``: the trained policy.
    """

    path: LayerPath
    reward: float
    episodes: list[Row]
    updates: list[Row]
    policies: Tensor
    scores: dict[str, dict[str, float]]
    agent: Agent
    folder: Path | None = None
    finalists: list[Row] = field(default_factory=list)


# =============================================================================================
# The agent: actor pi(a|s) and critic V(s)
# =============================================================================================


def mlp(n_in: int, n_out: int, last_gain: float) -> nn.Sequential:
    """D-64-64-n with tanh and orthogonal weights; a small last gain starts close to uniform."""
    layers: list[nn.Module] = []
    for i, o, gain in ((n_in, 64, 2**0.5), (64, 64, 2**0.5), (64, n_out, last_gain)):
        linear = nn.Linear(i, o)
        nn.init.orthogonal_(linear.weight, gain)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def forward(network: nn.Sequential, x: Tensor) -> Tensor:
    """``network(x)``, layer by layer: for one observation a module's call costs as much as its sums."""
    for layer in network:
        x = layer.forward(x)
    return x


class Agent(nn.Module):
    """Separate actor and critic over the flattened observation. obs: (..., D) float."""

    def __init__(self, n_observation: int, n_actions: int) -> None:
        super().__init__()
        self.actor = mlp(n_observation, n_actions, 0.01)
        self.critic = mlp(n_observation, 1, 0.01)  # V starts near 0, the normalised returns' mean

    def log_probs(self, obs: Tensor, mask: Tensor) -> Tensor:
        """log pi(a|s): (B, D), mask (B, A) bool -> (B, A); masked actions get a probability of 0."""
        return torch.where(mask, forward(self.actor, obs), -1e9).log_softmax(-1)

    def value(self, obs: Tensor) -> Tensor:
        """V(s): (B, D) -> (B,)."""
        return forward(self.critic, obs).squeeze(-1)  # (B, 1) -> (B,)


# =============================================================================================
# Algorithm: rollout, returns, advantage (Eq. 9), clipped objective (Eq. 8)
# =============================================================================================


def discounted_returns(rewards: Tensor, gamma: float) -> Tensor:
    """Monte-Carlo returns of one episode. rewards: (T,) -> (T,), G_t = r_t + gamma G_{t+1}."""
    returns, future = torch.zeros_like(rewards), 0.0
    for t in reversed(range(len(rewards))):
        future = float(rewards[t]) + gamma * future
        returns[t] = future
    return returns


def normalise(x: Tensor) -> Tensor:
    """Zero mean and unit (population) deviation over the batch: (B,) -> (B,); equal elements give 0."""
    deviation = x.std(correction=0)
    if deviation <= 1e-6 * x.abs().max():  # rounding alone, which must not be blown up to a signal
        return torch.zeros_like(x)
    return (x - x.mean()) / (deviation + 1e-8)


def advantage(returns: Tensor, values: Tensor) -> Tensor:
    """A(s, a) = R - V(s), Eq. 9. Both (B,) -> (B,)."""
    return returns - values


def clipped_objective(ratio: Tensor, adv: Tensor, clip: float) -> Tensor:
    """J of Eq. 8, as a mean, to be maximised. ratio: pi/pi_old (B,); adv: (B,) -> scalar."""
    return torch.min(ratio * adv, ratio.clamp(1 - clip, 1 + clip) * adv).mean()


@dataclass
class Rollout:
    """Steps of whole episodes under one policy; B steps in all."""

    obs: Tensor  # (B, D)
    masks: Tensor  # (B, A) bool
    actions: Tensor  # (B,)
    log_probs: Tensor  # (B,) under the policy that acted
    returns: Tensor  # (B,)


def play(
    env: Any,
    agent: Agent,
    generator: torch.Generator | None,
    *,
    masked: bool,
    options: dict[str, Any] | None = None,
    actions: Sequence[int] = (),
) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """One episode; actions are sampled, or the most probable where ``generator`` is None (Eq. 1).

    ``actions``: what to do in the first steps, whatever the policy says.
    """
    names = ("obs", "mask", "action", "log_prob", "reward", "layer", "policy")
    steps: dict[str, list[Any]] = {k: [] for k in names}
    obs, info = env.reset(options=options)
    done = False
    while not done:
        x = torch.from_numpy(obs).flatten()  # (rows, L) -> (D,)
        mask = torch.from_numpy(info["action_mask"]).bool()  # (A,)
        if not masked:
            mask = torch.ones_like(mask)
        with torch.no_grad():
            log_probs = agent.log_probs(x[None], mask[None])[0]  # (A,)
            policy = log_probs.exp()  # (A,)
        if (t := len(steps["action"])) < len(actions):
            action = actions[t]
        elif generator is None:
            action = int(log_probs.argmax())
        else:
            action = int(torch.multinomial(policy, 1, generator=generator))
        layer = info["layer"]
        obs, reward, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        seen = (x, mask, action, log_probs[action], float(reward), layer, policy)
        for name, value in zip(steps, seen, strict=True):
            steps[name].append(value)
    return steps, info


def collect(episodes: Sequence[dict[str, list[Any]]], gamma: float) -> Rollout:
    """Stack the steps of several episodes."""
    flat = {k: [v for e in episodes for v in e[k]] for k in ("obs", "mask", "action", "log_prob")}
    returns = [discounted_returns(torch.tensor(e["reward"]), gamma) for e in episodes]
    return Rollout(
        obs=torch.stack(flat["obs"]),
        masks=torch.stack(flat["mask"]),
        actions=torch.tensor(flat["action"]),
        log_probs=torch.stack(flat["log_prob"]),
        returns=torch.cat(returns),
    )


def mean_policy(episodes: Sequence[dict[str, list[Any]]], first: int, n_layers: int) -> Tensor:
    """What the policy that acted did at each place, for those who look on: (P, A).

    The mean of pi(.|s) over all steps of a rollout at layers ``first`` (-1 where the agent chooses the
    stem) to ``n_layers - 1``; a row of NaN where no step stood there.
    """
    policy = torch.stack([p for e in episodes for p in e["policy"]])  # (B, A)
    layer = torch.tensor([k for e in episodes for k in e["layer"]])  # (B,)
    return torch.stack([policy[layer == k].mean(0) for k in range(first, n_layers)])  # (P, A)


def update(
    agent: Agent, optimiser: torch.optim.Optimizer, batch: Rollout, args: Args, progress: float
) -> Row:
    """Several full-batch epochs of PPO on one rollout; ``progress`` in [0, 1] anneals the entropy.

    Returns the diagnostics: losses, entropy, approximate KL, clip fraction, explained variance.
    """
    returns = normalise(batch.returns)
    with torch.no_grad():
        values = agent.value(batch.obs)
        adv = advantage(returns, values)  # Eq. 9
    entropy_coef = args.entropy + (args.entropy_end - args.entropy) * progress
    spread = returns.var(correction=0)
    explained = float(1 - (returns - values).var(correction=0) / spread) if spread > 0 else 0.0
    kl, epoch = 0.0, 0
    while epoch < args.update_epochs and (epoch == 0 or not args.target_kl or kl <= args.target_kl):
        epoch += 1
        all_log_probs = agent.log_probs(batch.obs, batch.masks)  # (B, A)
        log_probs = all_log_probs.gather(1, batch.actions[:, None]).squeeze(1)  # (B,)
        log_ratio = log_probs - batch.log_probs
        ratio = log_ratio.exp()
        policy = clipped_objective(ratio, adv, args.clip)  # Eq. 8
        entropy = -(all_log_probs.exp() * all_log_probs).sum(-1).mean()
        value_loss = (agent.value(batch.obs) - returns).pow(2).mean()
        loss = -policy + args.value_coef * value_loss - entropy_coef * entropy
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            kl = float((ratio - 1 - log_ratio).mean())  # Schulman's estimator k3, never negative
    clipped = (ratio.detach() - 1).abs() > args.clip  # (B,)
    return {
        "policy_objective": float(policy.detach()),
        "value_loss": float(value_loss.detach()),
        "entropy": float(entropy.detach()),
        "entropy_coef": entropy_coef,
        "approx_kl": kl,
        "clip_fraction": float(clipped.float().mean()),
        "explained_variance": explained,
        "epochs": epoch,
    }


# =============================================================================================
# The search
# =============================================================================================


def problem_of(args: Args) -> Problem:
    """What the arguments name, loaded and checked; InputError for what does not fit."""
    return load_problem(
        args.experts,
        base=args.base,
        images=args.images,
        texts=args.texts,
        operators=args.operators,
        stem=args.stem,
        scope=args.scope,
        seed=args.seed,
        unit=args.unit,
        multi_task=args.multi_task,
        metric=args.metric,
        normalise_length=args.normalise_length,
    )


def make_scorer(problem: Problem, args: Args) -> Scorer:
    """What scores the paths of a search: on the reward split, with the arguments' share of the data."""
    return problem.scorer(
        fraction=args.data_fraction,
        seed=args.seed,
        cache_mb=args.cache_mb,
        workers=args.workers,
        device=args.device,
        precision=args.precision,
        reward=args.reward,
    )


def make_env(problem: Any, args: Args, scorer: Any = None) -> Any:
    """The environment of a ``Problem``, by Gymnasium's own way, under the DAR wrapper.

    scorer: what scores its paths; with one given, ``problem`` may be None.
    """
    import gymnasium as gym

    from rmm_lab.env import DynamicAverageReward

    scorer = make_scorer(problem, args) if scorer is None else scorer
    if args.unit == "both" and isinstance(scorer, Scorer) and scorer.blocks:
        scorer = Blocks(scorer)
    env = gym.make(
        "rmm_lab/Merging-v0",
        scorer=scorer,
        observation=args.observation,
        penalty=args.penalty,
        max_steps=args.max_steps,
        max_depth=args.max_depth,
        episodes_per_subset=args.episodes_per_subset,
    )
    return DynamicAverageReward(env, scale=args.dar, max_episodes=args.episodes)


def look_ahead(
    plan: Any, agent: Agent, generator: torch.Generator, args: Args, start: int, n: int
) -> list[tuple[Steps, int | None]]:
    """The (path, subset) of the n episodes from number ``start`` on, played before with no scores.

    Nothing in a rollout depends on scores, so the same draws lead to the same paths; the generator is
    left as it was.
    """
    state = generator.get_state()
    for i in range(n):
        options = {"episode": start + i}
        play(plan, agent, generator, masked=args.mask_actions, options=options)
    generator.set_state(state)
    return plan.unwrapped.scorer.take()


def check_phases(env: Any, args: Args) -> None:
    """InputError unless the searches after the agent's can be made in this environment."""
    view = env.unwrapped.scorer
    if args.scales and not hasattr(getattr(view, "scorer", view), "pool"):
        raise InputError(
            "--scales: expected a scorer of models, found one by formula, which has none to scale; use "
            "--scales 0"
        )
    if args.finish + args.scales and env.unwrapped.max_depth < env.unwrapped.n_layers:
        raise InputError(
            f"--max-depth: expected at least {env.unwrapped.n_layers} layers, found "
            f"{env.unwrapped.max_depth}; the searches at the end skip none: use --finish 0 --scales 0"
        )


def search(
    env: Any, args: Args, folder: RunFolder
) -> tuple[Agent, list[Row], list[Row], list[Tensor]]:
    """The four phases of a search, from the folder's checkpoint if it has one.

    Uniform paths, PPO, the local search, the scales: ``args.episodes`` evaluations in all.
    Returns the agent, the episodes, the updates and each update's ``mean_policy``. After each update
    all state is on disk.
    """
    check_phases(env, args)
    torch.manual_seed(args.seed)  # the agent's initial weights
    agent = Agent(int(np.prod(env.observation_space.shape)), int(env.action_space.n))
    optimiser = torch.optim.Adam(
        [
            {"params": agent.actor.parameters(), "lr": args.learning_rate},
            {"params": agent.critic.parameters(), "lr": args.critic_learning_rate},
        ]
    )
    generator = torch.Generator().manual_seed(args.seed)
    episodes: list[Row] = []
    updates: list[Row] = []
    policies: list[Tensor] = []
    if (stored := folder.load_checkpoint()) is not None:
        tensors, counters, episodes, updates = stored
        try:
            agent.load_state_dict({k: tensors[f"agent.{k}"] for k in agent.state_dict()})
            restore_optimiser(optimiser, tensors, "adam")
            generator.set_state(tensors["generator"])
            policies = list(tensors["policies"])
            env.episode, env.previous = counters["dar_episode"], counters["dar_previous"]
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise InputError(
                f"--resume: expected this search's checkpoint in "
                f"{folder.file('checkpoint.safetensors')}, found another one ({error}); start the "
                "search anew in another folder"
            ) from error
    scorer, places = env.unwrapped.scorer, range(env.unwrapped.first, env.unwrapped.n_layers)
    plan = make_env(None, args, Plan(scorer)) if getattr(scorer, "alone", True) is False else None
    progress = report.Progress(args.episodes, episodes, quiet=args.quiet)

    def save() -> None:
        folder.save_checkpoint(
            {f"agent.{k}": v for k, v in agent.state_dict().items()}
            | optimiser_tensors(optimiser, "adam")
            | {"generator": generator.get_state()},
            {"dar_episode": env.episode, "dar_previous": env.previous},
            episodes,
            updates,
            policies,
        )

    # 1. The uniform path of each source, which any user has. They teach the agent nothing: it has not
    # chosen them.
    n_start = min(args.episodes, env.unwrapped.n_sources) if args.start else 0
    while len(episodes) < n_start:
        steps, info = play(
            env,
            agent,
            None,
            masked=args.mask_actions,
            options={"subset": 0},
            actions=[len(episodes)] * len(places),
        )
        episodes.append(report.episode_row(len(episodes), 0, steps, info, env))
        progress.show(episodes)
        if len(episodes) == n_start:
            save()

    # 2. PPO.
    n_scales = round(args.scales * (args.episodes - n_start))
    n_agent = args.episodes - round((args.finish + args.scales) * (args.episodes - n_start))
    options: dict[str, Any] | None = {
        "episode": len(episodes) - n_start
    }  # whose turn it is, also after a resume
    while len(episodes) < n_agent:
        played = []
        n = min(args.episodes_per_update, n_agent - len(episodes))
        if plan is not None:
            wanted = look_ahead(plan, agent, generator, args, len(episodes) - n_start, n)
            scorer.prefetch(wanted)  # by all workers; the episodes then find their scores
        for _ in range(n):
            steps, info = play(env, agent, generator, masked=args.mask_actions, options=options)
            options = None
            played.append(steps)
            episodes.append(report.episode_row(len(episodes), len(updates), steps, info, env))
            progress.show(episodes)
        done = (len(episodes) - n_start) / (n_agent - n_start)
        policies.append(mean_policy(played, places[0], len(places) + places[0]))
        diagnostics = update(agent, optimiser, collect(played, args.gamma), args, done)
        updates.append({"update": len(updates), "episodes": len(episodes)} | diagnostics)
        save()

    # 3. The best paths' neighbours, layer by layer.
    scorer = getattr(scorer, "scorer", scorer)  # sublayers, where the agent saw blocks

    def score(paths: Sequence[Steps], subset: int) -> None:
        if hasattr(scorer, "prefetch"):
            scorer.prefetch([(path, subset) for path in paths])
        for path in paths:
            scores = scorer.score(path, subset)
            episodes.append(
                report.scored_row(len(episodes), len(updates), path, subset, scores, scorer)
            )
            progress.show(episodes)
        save()

    while len(episodes) < args.episodes - n_scales:
        subset = len(episodes) // args.episodes_per_update % scorer.n_subsets
        n = min(args.episodes_per_update, args.episodes - n_scales - len(episodes))
        score(surrogate_of(scorer, episodes, args.seed).propose(n), subset)

    # 4. A scale for each layer and expert, around the best path.
    if len(episodes) < args.episodes:
        evolution = evolution_of(scorer, episodes, args.seed)
        while len(episodes) < args.episodes:
            asked = evolution.ask(args.episodes - len(episodes))
            paths = [path_of_scales(scorer, x) for x in asked]
            score(paths, evolution.generation % scorer.n_subsets)
            evolution.tell(asked, [e["raw_reward"] for e in episodes[-len(asked) :]])
    progress.end()
    return agent, episodes, updates, policies


def choose(env: Any, agent: Agent, episodes: Sequence[Row], args: Args) -> list[Row]:
    """Candidates for the final path, scored on the whole reward split, the best first.

    They are the greedy rollout (Eq. 1) and ``args.finalists`` paths: those of the best expected reward after
    a local search, else the ``shortlist``; where scales evolved, most are the means that they arrived at.
    The test split is not used.
    """
    view = env.unwrapped.scorer
    scorer = getattr(view, "scorer", view)  # sublayers, where the agent saw blocks
    fair = [(e["path"], e["raw_reward"]) for e in episodes if not e["penalised"]]
    n = args.finalists
    candidates = {}
    if args.scales:
        means = evolution_of(scorer, episodes, args.seed).answers(n - n // 4)
        candidates = {path_of_scales(scorer, x): "scales" for x in means}
    if args.finish:
        near = surrogate_of(scorer, episodes, args.seed).finalists(n - len(candidates))
        candidates |= dict.fromkeys(near, "best")
    else:
        best = shortlist(fair, n - len(candidates))
        candidates |= {steps_of(p, scorer.sources): "best" for p in best}
    dar = (env.episode, env.previous)
    _, info = play(env, agent, None, masked=args.mask_actions, options={"subset": None})
    env.episode, env.previous = dar  # the greedy rollout is no episode of the search
    if not info["penalised"]:
        greedy = view.expand(info["path"]) if isinstance(view, Blocks) else info["path"]
        candidates[greedy] = "greedy"
    if not candidates:
        raise InputError(
            f"search: expected at least one legal episode in {args.episodes}, found none; raise "
            "--episodes or use --mask-actions"
        )
    if isinstance(scorer, Scorer):
        scorer.prefetch([(path, None) for path in candidates])
    rows = [
        {"path": path, "found": how, "reward": float(scorer.score(path, None).mean())}
        for path, how in candidates.items()
    ]
    return sorted(rows, key=lambda r: (-r["reward"], len(r["path"]), str(r["path"])))


def check_same_config(args: Args, stored: dict[str, Any]) -> None:
    """InputError unless a run that is resumed has the arguments that it had before."""
    for name, value in args.config().items():
        if stored.get(name) != value:
            raise InputError(
                f"--resume: expected --{name.replace('_', '-')} {stored.get(name)} as in "
                f"{args.resume}/config.json, found {value}; leave the option out, or start a new run"
            )


def train(args: Args, *, problem: Problem | None = None, table: bool = True) -> Result:
    """The main job: load, search, choose a path on the reward split, report on the test split once.

    Args:
        args: see ``Args``. problem: one made before, in place of the models that ``args`` names.
        table: whether to score the test split at all.

    Raises InputError for bad input, before anything is written. Ctrl-C leaves a folder to resume.
    """
    if args.resume is not None:
        check_same_config(args, RunFolder.read_config(args.resume))
    args.check()
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_freed_memory()
    if args.resume is None and args.run_dir is not None:
        check_new(args.run_dir)
    if problem is None:
        problem = problem_of(args)
    splits = ("reward", "test") if table else ("reward",)
    for task in problem.tasks:  # broken data must show before anything is written
        for split in splits:
            task.split(split)
    for note in report.notes(problem.tasks, splits):
        if not args.quiet:
            print(f"note: {note}")
    env = make_env(problem, args)
    check_phases(env, args)
    if args.resume is not None:
        folder = RunFolder(args.resume)
    else:
        folder = RunFolder.create(args.run_dir, args.config())
    try:
        agent, episodes, updates, policies = search(env, args, folder)
        finalists = choose(env, agent, episodes, args)
    finally:
        env.unwrapped.scorer.close()
    if not args.quiet:
        view = env.unwrapped.scorer
        print(report.cost(getattr(view, "scorer", view)))
    best: Steps = finalists[0]["path"]
    sources = problem.pool.sources
    steps = [(name_of(a, sources), k) for a, k in best]
    stem = "base" if problem.stem == "agent" else problem.stem
    if steps and steps[0][1] < 0:
        stem = steps.pop(0)[0]
    path = LayerPath.of(problem.pool, steps, stem)
    result = Result(
        path=path,
        reward=finalists[0]["reward"],
        episodes=episodes,
        updates=updates,
        policies=torch.stack(policies) if policies else torch.zeros(0, 0, 0),
        scores={},
        agent=agent,
        folder=folder.path,
        finalists=[r | {"path": report.text_of(r["path"], sources)} for r in finalists],
    )
    report.finish(result, problem, folder, table=table, quiet=args.quiet)
    return result


# =============================================================================================
# Command line
# =============================================================================================


def parse(argv: Sequence[str]) -> Args:
    """Arguments from the command line; a resumed run starts from its own config."""
    import tyro

    early = {}  # these two decide what the other options' defaults are
    for i, word in enumerate(argv):
        name, _, value = word.partition("=")
        if name in ("--preset", "--resume"):
            early[name] = value or (argv[i + 1] if i + 1 < len(argv) else "")
    preset: Any = early.get("--preset")
    default = Args(preset=preset) if preset in PRESETS else Args()
    stored = None
    if early.get("--resume"):
        stored = RunFolder.read_config(Path(early["--resume"]))
        if odd := sorted(set(stored) ^ set(Args().config())):
            raise InputError(
                f"--resume: expected the config of this version in {early['--resume']}, found another "
                f"(they differ in {', '.join(odd)}); start the search anew in another folder"
            )
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()
        }
        default = Args(**values)
    args = tyro.cli(Args, args=list(argv), default=default, prog="python -m rmm_lab.ppo")
    if stored is not None:
        if args.run_dir is not None:
            raise InputError("--run-dir: expected none beside --resume, which names the folder")
        check_same_config(args, stored)
    elif args.run_dir is None:
        args.run_dir = Path("runs") / time.strftime("ppo-%Y%m%d-%H%M%S")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    args = None
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        train(args)
    except (InputError, OSError) as error:
        print(f"\nerror: {one_sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        folder = (args.resume or args.run_dir) if args else None
        known = folder is not None and (folder / "config.json").is_file()
        how = (
            f"go on with: python -m rmm_lab.ppo --resume {folder}"
            if known
            else "nothing is written"
        )
        print(f"\nstopped; {how}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
