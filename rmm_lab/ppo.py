"""PPO in one file, for any Gymnasium environment with discrete actions. Style after CleanRL.

    python -m rmm_lab.ppo --env-id rmm_lab/Merging-v0      # merge the demo's pair with an agent alone
    python -m rmm_lab.ppo --env-id CartPole-v1 --gamma 0.99

Read it from top to bottom: arguments, agent, returns and objective (Eq. 8 and 9), rollout, update, ``learn``,
which ``search.pipeline`` runs. It plays whole episodes, takes Monte-Carlo returns, and updates on all steps
of a rollout at once. Where ``info`` holds an ``action_mask``, illegal actions get no probability.
Sources: Schulman et al. 2016 (GAE), 2017 (PPO); Han et al. 2025 (Reinforced Model Merging).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rmm_lab.tasks.console import run_module

if __name__ == "__main__":  # here, so that Ctrl-C is a sentence while torch is imported
    sys.exit(run_module("rmm_lab.ppo:Main"))

import numpy as np
import torch
from torch import Tensor, nn

from rmm_lab.errors import SEED_RANGE, UNIT_RANGE, InputError, check_values


@dataclass(frozen=True)
class Args:
    """Options of the algorithm; the defaults are what measured best on the reward split."""

    episodes_per_update: int = 20
    """Episodes that one policy plays before each update."""
    update_epochs: int = 20
    """Maximum number of gradient steps per rollout; each uses the whole rollout."""
    learning_rate: float = 3e-3
    """Adam's learning rate of the actor."""
    critic_learning_rate: float = 3e-3
    """Adam's learning rate of the critic."""
    gamma: float = 1.0
    """Discount per step, in (0, 1]."""
    gae_lambda: float = 1.0
    """Lambda of generalised advantage estimation, in [0, 1]; 1: returns minus V, as in Eq. 9."""
    clip_coef: float = 0.2
    """Epsilon of the clipped objective, Eq. 8."""
    vf_coef: float = 0.5
    """Weight of the critic's loss. Adam is blind to it as long as actor and critic share no weights."""
    ent_coef: float = 0.1
    """Weight of the entropy bonus at the start."""
    ent_coef_end: float = 0.02
    """Weight of the entropy bonus at the end; it changes linearly."""
    target_kl: float = 0.05
    """End an update once the approximate KL divergence from the acting policy exceeds this; 0: never."""
    mask_actions: bool = True
    """Give illegal actions no probability. Without it an illegal action is tried, and penalised."""

    def __post_init__(self) -> None:
        ranges = {
            "episodes_per_update update_epochs": ("at least 1", lambda v: v >= 1),
            "learning_rate critic_learning_rate clip_coef gamma": UNIT_RANGE,
            "gae_lambda": ("0 to 1", lambda v: 0 <= v <= 1),
            "vf_coef ent_coef ent_coef_end target_kl": ("0 to 1000", lambda v: 0 <= v <= 1000),
        }
        check_values(self, ranges)


# ------------------------------------------------------------- the agent: actor pi(a|s), critic V(s)


def mlp(n_in: int, n_out: int, last_gain: float) -> nn.Sequential:
    """D-64-64-n with tanh and orthogonal weights; a small last gain makes a nearly uniform policy."""
    layers: list[nn.Module] = []
    for i, o, gain in ((n_in, 64, 2**0.5), (64, 64, 2**0.5), (64, n_out, last_gain)):
        linear = nn.Linear(i, o)
        nn.init.orthogonal_(linear.weight, gain)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class Agent(nn.Module):
    """Separate actor and critic over the flattened observation, (..., D) float."""

    def __init__(self, n_observation: int, n_actions: int) -> None:
        super().__init__()
        self.n_actions = n_actions
        self.actor = mlp(n_observation, n_actions, 0.01)
        self.critic = mlp(n_observation, 1, 0.01)  # V starts near 0, the mean of normalised returns

    def log_probs(self, obs: Tensor, mask: Tensor) -> Tensor:
        """log pi(a|s): obs (B, D), mask (B, A) bool -> (B, A); masked actions have probability 0."""
        return torch.where(mask, self.actor(obs), -1e9).log_softmax(-1)

    def act(self, obs: Tensor, mask: Tensor, generator: torch.Generator | None) -> tuple[Any, ...]:
        """An action at obs (D,), drawn, or without a generator the likeliest (Eq. 1); its log pi; pi (A,)."""
        log_probs = self.log_probs(obs[None], mask[None])[0]  # (A,)
        policy = log_probs.exp()  # (A,)
        action = (
            policy.argmax() if generator is None else policy.multinomial(1, generator=generator)
        )
        return int(action), log_probs[int(action)], policy

    def judge(self, obs: Tensor, mask: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """log pi(a|s) of the actions taken, (B,), and the mean entropy of pi(.|s)."""
        log_probs = self.log_probs(obs, mask)  # (B, A)
        entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
        return log_probs.gather(1, actions[:, None]).squeeze(1), entropy

    def value(self, obs: Tensor) -> Tensor:
        """V(s): (B, D) -> (B,)."""
        return self.critic(obs).squeeze(-1)  # (B, 1) -> (B,)


def make_agent(env: Any, args: Args, seed: int, kind: type[Agent] = Agent) -> tuple[Agent, Any]:
    """An agent for an environment, and its optimiser; leaves the global random state alone."""
    n_actions = getattr(env.action_space, "n", None) or env.action_space.shape[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        agent = kind(int(np.prod(env.observation_space.shape)), int(n_actions))
    actor = {"params": agent.actor.parameters(), "lr": args.learning_rate}
    critic = {"params": agent.critic.parameters(), "lr": args.critic_learning_rate}
    return agent, torch.optim.Adam([actor, critic])


# --------------------------------------------- returns, advantage (Eq. 9), clipped objective (Eq. 8)


def discounted_returns(rewards: Tensor, gamma: float) -> Tensor:
    """Monte-Carlo returns of one episode: rewards (T,) -> (T,), G_t = r_t + gamma G_{t+1}."""
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


def gae(adv: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """Generalised advantages of one episode, from Eq. 9's A_t = G_t - V(s_t) of the same gamma: (T,) -> (T,).

    Sums (gamma lambda)^l delta_{t+l} over l (Schulman et al. 2016, Eq. 16). The TD error delta_t is
    r_t + gamma V(s_{t+1}) - V(s_t), with V = 0 after the last step; as r_t = G_t - gamma G_{t+1}, it is
    A_t - gamma A_{t+1}, whatever scale G and V share. Lambda 0 gives delta, 1 gives ``adv`` but for rounding.
    """
    delta = adv - gamma * nn.functional.pad(adv[1:], (0, 1))  # (T,)
    return discounted_returns(delta, gamma * gae_lambda)


def clipped_objective(ratio: Tensor, adv: Tensor, clip_coef: float) -> Tensor:
    """J of Eq. 8, as a mean, to be maximised. ratio: pi/pi_old (B,); adv: (B,) -> scalar."""
    return torch.min(ratio * adv, ratio.clamp(1 - clip_coef, 1 + clip_coef) * adv).mean()


# ----------------------------------------------------------------------------- rollout, update, learn


class Episode(NamedTuple):
    """One episode of T steps; ``policies`` and ``infos`` are for those who look on."""

    obs: list[Tensor]  # T of (D,)
    masks: list[Tensor]  # T of (A,) bool
    actions: list[int]
    policies: list[Tensor]  # T of (A,): the probabilities that each action was drawn from
    log_probs: list[Tensor]  # T scalars
    rewards: list[float]
    infos: list[dict[str, Any]]  # T: those that were acted on
    info: dict[str, Any]  # the last one


class Rollout(NamedTuple):
    """Steps of whole episodes under one policy, end to end; B steps in all."""

    obs: Tensor  # (B, D)
    masks: Tensor  # (B, A) bool
    actions: Tensor  # (B,)
    log_probs: Tensor  # (B,) under the policy that acted
    returns: Tensor  # (B,)
    lengths: list[int]  # of the episodes; their sum is B


def play(
    env: Any,
    agent: Agent,
    generator: torch.Generator | None,
    *,
    masked: bool,
    options: dict[str, Any] | None = None,
) -> Episode:
    """One episode; actions are sampled, or the most probable where ``generator`` is None (Eq. 1)."""
    steps: list[tuple[Any, ...]] = []  # each as in Episode
    obs, info = env.reset(options=options)
    done, every = False, np.ones(agent.n_actions)
    while not done:
        x = torch.as_tensor(obs, dtype=torch.float32).flatten()  # (D,)
        legal = info.get("action_mask", every) if masked else every
        mask = torch.as_tensor(legal).bool()  # (A,)
        with torch.no_grad():
            action, log_prob, policy = agent.act(x, mask, generator)
        obs, reward, terminated, truncated, info_after = env.step(action)
        steps.append((x, mask, action, policy, log_prob, float(reward), info))
        done, info = terminated or truncated, info_after
    return Episode._make([*map(list, zip(*steps, strict=True)), info])


def collect(episodes: Sequence[Episode], gamma: float) -> Rollout:
    """Stack the steps of several episodes."""
    return Rollout(
        obs=torch.stack([x for e in episodes for x in e.obs]),
        masks=torch.stack([m for e in episodes for m in e.masks]),
        actions=torch.as_tensor(np.array([a for e in episodes for a in e.actions])),
        log_probs=torch.stack([p for e in episodes for p in e.log_probs]),
        returns=torch.cat([discounted_returns(torch.tensor(e.rewards), gamma) for e in episodes]),
        lengths=[len(e.rewards) for e in episodes],
    )


def update(
    agent: Agent, optimiser: torch.optim.Optimizer, batch: Rollout, args: Args, progress: float
) -> dict[str, float]:
    """Full-batch epochs of PPO on one rollout; ``progress`` in [0, 1] anneals the entropy bonus.

    Returns are normalised over the rollout, so that V, whose target they are, need not learn their scale.
    Returns the diagnostics; KL and clip fraction are those before the last step.
    """
    returns = normalise(batch.returns)
    values = agent.value(batch.obs).detach()  # (B,), and fixed from here on
    adv = advantage(returns, values)  # Eq. 9
    if args.gae_lambda < 1:
        adv = torch.cat([gae(a, args.gamma, args.gae_lambda) for a in adv.split(batch.lengths)])
    ent_coef = args.ent_coef + (args.ent_coef_end - args.ent_coef) * progress
    spread = returns.var(correction=0)
    explained = float(1 - (returns - values).var(correction=0) / spread) if spread > 0 else 0.0
    kl, epoch = 0.0, 0
    while epoch < args.update_epochs and (not args.target_kl or kl <= args.target_kl):
        epoch += 1
        log_probs, entropy = agent.judge(batch.obs, batch.masks, batch.actions)  # (B,)
        log_ratio = log_probs - batch.log_probs
        ratio = log_ratio.exp()
        objective = clipped_objective(ratio, adv, args.clip_coef)  # Eq. 8
        value_loss = (agent.value(batch.obs) - returns).pow(2).mean()
        loss = -objective + args.vf_coef * value_loss - ent_coef * entropy
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        kl = float((ratio - 1 - log_ratio).detach().mean())  # Schulman's k3, never negative
    clipped = (ratio.detach() - 1).abs() > args.clip_coef  # (B,)
    return {
        "policy_objective": float(objective.detach()),
        "value_loss": float(value_loss.detach()),
        "entropy": float(entropy.detach()),
        "entropy_coef": ent_coef,
        "approx_kl": kl,
        "clip_fraction": float(clipped.float().mean()),
        "explained_variance": explained,
        "epochs": epoch,
    }


def learn(
    env: Any,
    args: Args,
    agent: Agent,
    optimiser: torch.optim.Optimizer,
    generator: torch.Generator,
    episodes: int,
    *,
    done: int = 0,
    before_rollout: Callable[[int], None] | None = None,
) -> Iterator[tuple[list[Episode], dict[str, float]]]:
    """Play and update in turn until ``episodes`` are played; yields each rollout's episodes and diagnostics.

    ``generator`` draws the actions; ``before_rollout`` is called with the number of episodes that come next.
    ``done`` episodes were played before, when resuming; ``env``'s first reset gets it as option ``episode``.
    """
    options = {"episode": done} if done else None
    while done < episodes:
        n = min(args.episodes_per_update, episodes - done)
        if before_rollout is not None:
            before_rollout(n)
        played = []
        for _ in range(n):
            played.append(play(env, agent, generator, masked=args.mask_actions, options=options))
            options = None
        done += n
        batch = collect(played, args.gamma)
        yield played, update(agent, optimiser, batch, args, done / episodes)


@dataclass(frozen=True)
class Main(Args):
    """Train an agent on a Gymnasium environment; print its rewards and its greedy episode."""

    env_id: str = "rmm_lab/Merging-v0"
    """Gymnasium's name of an environment with discrete actions."""
    episodes: int = 700
    """Episodes to play."""
    seed: int = 1
    """Seed of the agent's weights, its actions and the environment."""

    def __post_init__(self) -> None:
        super().__post_init__()
        pattern = r"(\w+(\.\w+)*:)?[^:]+"
        name = ("NAME or MODULE:NAME", lambda v: bool(re.fullmatch(pattern, v)))
        episodes = ("at least 1", lambda v: v >= 1)
        check_values(self, {"env_id": name, "episodes": episodes, "seed": SEED_RANGE})

    def run(self) -> None:
        import gymnasium as gym

        import rmm_lab.env  # noqa: F401 - registers rmm_lab/Merging-v0

        try:
            env: Any = gym.make(self.env_id)
        except (gym.error.Error, ImportError) as error:
            raise InputError(f"--env-id: expected one of Gymnasium's, found {error}") from error
        spaces = (env.action_space, env.observation_space)
        if not all(map(isinstance, spaces, (gym.spaces.Discrete, gym.spaces.Box))):
            raise InputError(
                f"--env-id: expected discrete actions and observations in a Box, found {spaces} in "
                f"{self.env_id!r}; choose another environment"
            )
        env.reset(seed=self.seed)
        agent, optimiser = make_agent(env, self, self.seed)
        generator = torch.Generator().manual_seed(self.seed)
        done = 0
        for played, _ in learn(env, self, agent, optimiser, generator, self.episodes):
            done += len(played)
            returns = [sum(e.rewards) for e in played]
            print(f"episode {done}/{self.episodes}  return {np.mean(returns):.3f}", flush=True)
        greedy = play(env, agent, None, masked=self.mask_actions)
        print(f"greedy return {sum(greedy.rewards):.3f}")
        if "path" in greedy.info:
            print("greedy path", *greedy.info["path"])
