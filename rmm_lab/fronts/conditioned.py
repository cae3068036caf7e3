"""One agent for all preferences: PPO that sees the weights w of the tasks it plays for.

HM3 (Zhou et al. 2025) trains an agent for each preference. Here w is part of the observation and drawn anew
for each episode, so one training serves any w: a greedy rollout, a forward pass for each layer. The critic
has one value per task, V(s, w). *Forms* of what is maximised, with G the gains of an episode, (K,), on the
scale 0 for the base and 1 for a task's expert:

    linear       A = sum_k w_k (G_k - V_k), one clipped objective (Eq. 8)
    late         one clipped objective for each task's A_k; then their sum, weighted by w (D3PO, 2026)
    tchebycheff  G is the achievement of ``front_measures``, the critic's only target: for fronts that are not
                 convex, which linear weights miss
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from rmm_lab import ppo
from rmm_lab.env import MergingEnv
from rmm_lab.errors import InputError
from rmm_lab.fronts.space import Trials
from rmm_lab.reward import Path, path_text, places_of
from rmm_lab.search.front import means
from rmm_lab.search.front_measures import achievement, lattice_of
from rmm_lab.search.numbers import GaussianAgent, ScalesEnv
from rmm_lab.search.preferences import Ends
from rmm_lab.search.rivals import evolve_niches

FORMS = ("linear", "late", "tchebycheff")
POINTS = 11  # preferences that are answered in the end, and that half of the episodes play for
CORNERS = 0.1  # share of the episodes that play for one task alone
# An entropy bonus would blur the numbers, see the preset default.
ARGS = ppo.Args(ent_coef=0.0, ent_coef_end=0.0)


def draw_weights(rng: np.random.Generator, lattice: np.ndarray) -> np.ndarray:
    """A preference (K,): half of the time one of a lattice (W, K), at times a corner, else Dirichlet(1..1).

    Source: none gives one; HM3 draws from a Dirichlet distribution, flat as far as it says.
    """
    n_tasks, kind = lattice.shape[1], rng.random()
    if kind < 0.5:
        return np.asarray(lattice[rng.integers(len(lattice))])
    if kind < 0.5 + CORNERS:
        return np.asarray(np.eye(n_tasks)[rng.integers(n_tasks)])
    return rng.dirichlet(np.ones(n_tasks))


class PreferenceEnv(gym.Wrapper[np.ndarray, Any, np.ndarray, Any]):
    """A merging environment whose reward is what a merged model is worth by a preference.

    The observation is the environment's, flattened, and then the weights w (K,), unless ``fixed`` gives the
    only ones there are. ``reset(options={"preference": w})`` plays for w, of which only ratios count; else w
    is drawn by the seed. At the end ``info["gains"]`` holds the gains (K,); the reward is sum_k w_k gain_k,
    or the achievement with ``tchebycheff``. An illegal move gains the penalty in every task.

    Args:
        env: a ``MergingEnv``. ends: both ends of each task's scale. seed: of the draws.
        form: one of ``FORMS``. fixed: weights (K,), or None.

    InputError for another form, and in ``reset`` for weights that are not K numbers of 0 or more, not all 0.
    """

    def __init__(
        self,
        env: Any,
        ends: Ends,
        *,
        seed: int,
        form: str = "linear",
        fixed: np.ndarray | None = None,
    ) -> None:
        super().__init__(env)
        if form not in FORMS:
            raise InputError(f"form: expected {' or '.join(FORMS)}, found {form!r}; correct it")
        self.ends, self.form, self.fixed = ends, form, fixed
        self.n_tasks = int(ends.counts.sum())
        self.lattice = lattice_of(self.n_tasks, POINTS)
        self.rng = np.random.default_rng(seed)
        self.weights = np.full(self.n_tasks, 1 / self.n_tasks) if fixed is None else fixed
        if fixed is None:
            space: Any = env.observation_space
            low = np.append(space.low.ravel(), np.zeros(self.n_tasks, np.float32))
            high = np.append(space.high.ravel(), np.ones(self.n_tasks, np.float32))
            self.observation_space = gym.spaces.Box(low, high, dtype=np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode; see the class for ``options``."""
        options = dict(options or {})
        asked = options.pop("preference", None)
        observation, info = self.env.reset(seed=seed, options=options)
        if asked is not None:
            self.weights = self._shares(asked)
        elif self.fixed is None:
            self.weights = draw_weights(self.rng, self.lattice)
        return self._seen(observation), info

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """As the environment's, with another last reward."""
        observation, value, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            gains = np.full(self.n_tasks, float(value))
            if not info["penalised"]:
                gains = self.ends.normalised(np.array(list(info["scores"].values())))
            value = self.worth(gains)
            info = info | {"gains": gains, "preference": self.weights}
        return self._seen(observation), float(value), terminated, truncated, info

    def worth(self, gains: np.ndarray) -> float:
        """What gains (K,) are worth by the weights of the episode."""
        if self.form == "tchebycheff":
            return float(achievement(gains[None], self.weights)[0, 0])
        return float(self.weights @ gains)

    def _shares(self, asked: Any) -> np.ndarray:
        w = np.asarray(asked, float)
        if w.shape != (self.n_tasks,) or not (w >= 0).all() or not 0 < w.sum() < np.inf:
            raise InputError(
                f"preference: expected {self.n_tasks} weights of 0 or more, not all 0, found {asked}; give "
                "one for each task that counts"
            )
        return w / w.sum()

    def _seen(self, observation: np.ndarray) -> np.ndarray:
        if self.fixed is not None:
            return observation
        return np.append(observation.ravel(), self.weights).astype(np.float32)


class Start(NamedTuple):
    """Where an agent of scales begins for each preference: the known path that is worth most by it.

    ``scales``: (S, P, M), of each path, the uniform ones first. ``gains``: (S, K), what it had on subsets.
    """

    scales: np.ndarray
    gains: np.ndarray

    def best(self, weights: np.ndarray) -> np.ndarray:
        """For each of weights (B, K) the number of its path: (B,)."""
        return np.asarray(achievement(self.gains, np.atleast_2d(weights)).argmax(1))


class VectorCritic:
    """What makes an agent's critic one value per target: a mix-in, before ``ppo.Agent`` or a kind of it."""

    critic: Any

    def values(self, obs: Tensor) -> Tensor:
        """V(s, w): (B, D) -> (B, C)."""
        return torch.as_tensor(self.critic(obs))


class ListAgent(VectorCritic, ppo.Agent):
    """Takes one of the sources at each place."""

    def __init__(self, n_observation: int, n_actions: int, n_targets: int) -> None:
        super().__init__(n_observation, n_actions)
        if n_targets > 1:
            self.critic = ppo.mlp(n_observation, n_targets, 0.01)


class ScalesAgent(VectorCritic, GaussianAgent):
    """Gives each place a scale per member. ``begin``: where, by the weights at the end of an observation."""

    def __init__(self, n_observation: int, n_actions: int, n_targets: int) -> None:
        super().__init__(n_observation, n_actions)
        self.begin: Start | None = None
        self.n_tasks = 0
        if n_targets > 1:
            self.critic = ppo.mlp(n_observation, n_targets, 0.01)

    def normal(self, obs: Tensor) -> Any:
        """pi(.|s): obs (..., D) -> independent normals (..., A)."""
        if self.begin is None:
            return super().normal(obs)
        flat = obs.reshape(-1, obs.shape[-1])
        paths = self.begin.best(flat[:, -self.n_tasks :].double().numpy())
        n_places, n_members = self.begin.scales.shape[1:]
        cursor = flat[:, n_members * n_places :][:, :n_places]  # after the map, see MergingEnv
        scales = self.begin.scales[paths, cursor.argmax(1).numpy()]  # (B, M)
        start = torch.from_numpy(scales).to(obs.dtype).reshape(*obs.shape[:-1], -1)
        deviation = self.actor.get_parameter("log_std").exp()
        return torch.distributions.Normal(start + self.actor(obs), deviation)


class Targets(NamedTuple):
    """What an update needs beside a ``ppo.Rollout`` of B steps."""

    gains: Tensor  # (B, C): what each step's episode had
    weights: Tensor  # (B, C)


def update(
    agent: Any,
    optimiser: torch.optim.Optimizer,
    batch: ppo.Rollout,
    targets: Targets,
    args: ppo.Args,
    progress: float,
    form: str = "linear",
) -> dict[str, float]:
    """``ppo.update`` for C targets at once. Gains are normalised over the rollout, each target by itself.

    progress: how much of the search is over, in [0, 1]. form: one of ``FORMS``.

    The value loss is the sum over targets. With one target of weight 1 it is ``ppo.update`` bit for bit.
    Returns the diagnostics.
    """
    returns = torch.stack([ppo.normalise(g) for g in targets.gains.T], -1)  # (B, C)
    adv = ppo.advantage(returns, agent.values(batch.obs).detach())  # (B, C), Eq. 9
    ent_coef = args.ent_coef + (args.ent_coef_end - args.ent_coef) * progress
    pooled = (targets.weights * adv).sum(-1)  # (B,)
    kl, epoch = 0.0, 0
    while epoch < args.update_epochs and (not args.target_kl or kl <= args.target_kl):
        epoch += 1
        log_probs, entropy = agent.judge(batch.obs, batch.masks, batch.actions)
        log_ratio = log_probs - batch.log_probs
        ratio = log_ratio.exp()  # (B,)
        if form == "late":
            low, high = 1 - args.clip_coef, 1 + args.clip_coef
            each = torch.min(ratio[:, None] * adv, ratio.clamp(low, high)[:, None] * adv)  # (B, C)
            objective = (targets.weights * each).sum(-1).mean()
        else:
            objective = ppo.clipped_objective(ratio, pooled, args.clip_coef)
        value_loss = (agent.values(batch.obs) - returns).pow(2).mean(0).sum()
        loss = -objective + args.vf_coef * value_loss - ent_coef * entropy
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        kl = float((ratio - 1 - log_ratio).detach().mean())
    return {
        "policy_objective": float(objective.detach()),
        "value_loss": float(value_loss.detach()),
        "entropy": float(entropy.detach()),
        "approx_kl": kl,
        "epochs": epoch,
    }


class _Noted:
    """A scorer that counts what it scores in a search's log."""

    def __init__(self, out: Trials) -> None:
        self._out = out

    def __getattr__(self, name: str) -> Any:
        if name == "_out":  # while one is copied
            raise AttributeError(name)
        return getattr(self._out.scorer, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Noted:
        return self

    def score(self, path: Path, subset: int | None = None) -> np.ndarray:
        """Each task's score (N,) on a subset."""
        self._out.score([path], [subset])  # type: ignore[list-item]
        return self._out.by_task[-1]


class Conditioned:
    """The agent of a problem, to train and to ask.

    Args:
        out: what the search has scored so far, the uniform paths; its ``scorer`` scores paths.
        seed: of the networks, the actions and the preferences.
        actions: ``scales`` or ``sources``, see ``RunArgs``. form: one of ``FORMS``.
        fixed: the only preference, (K,): then nothing is conditioned, and this is ``ppo.learn``.
        args: of PPO; gamma and gae_lambda must be 1, or there is an InputError.
        turn: number of the subset of its first update.
        known: paths of scales in ``out``, where it may begin beside the members; not with ``fixed``.
    """

    def __init__(
        self,
        out: Trials,
        seed: int,
        *,
        actions: str = "scales",
        form: str = "linear",
        fixed: np.ndarray | None = None,
        args: ppo.Args = ARGS,
        turn: int = 0,
        known: Sequence[Path] = (),
    ) -> None:
        if args.gamma < 1 or args.gae_lambda < 1:
            raise InputError(
                f"conditioned agent: expected gamma and gae_lambda 1, found {args.gamma:g} and "
                f"{args.gae_lambda:g}; an episode's gains count for each of its steps alike"
            )
        self.out, self.args, self.form = out, args, form
        scorer = _Noted(out)
        kind = ScalesEnv if actions == "scales" else MergingEnv
        n = args.episodes_per_update
        inner = kind(scorer, episodes_per_subset=n)
        inner.reset(options={"episode": turn * n - 1})  # the first episode comes next
        self.env = PreferenceEnv(inner, out.ends, seed=seed, form=form, fixed=fixed)
        one = fixed is not None or form == "tchebycheff"
        self.n_targets = 1 if one else self.env.n_tasks
        agent = ScalesAgent if actions == "scales" else ListAgent
        self.agent, self.optimiser = ppo.make_agent(
            self.env,
            args,
            seed,
            lambda n, a: agent(n, a, self.n_targets),  # type: ignore[arg-type]
        )
        self.generator = torch.Generator().manual_seed(seed)
        self.start: Start | None = None
        if actions == "scales" and (uniform := out.uniform()):
            self._begin(uniform, known)

    def _begin(self, uniform: dict[str, np.ndarray], known: Sequence[Path]) -> None:
        scorer, ends = self.out.scorer, self.out.ends
        n_places, eye = len(places_of(scorer)), np.eye(len(scorer.members))
        members = [i for i, name in enumerate(scorer.members) if name in uniform]
        scales = [np.tile(eye[i], (n_places, 1)) for i in members]  # (P, M)
        gains = [uniform[scorer.members[i]] for i in members]
        texts = (text for text, _ in self.out)
        found = means(zip(texts, self.out.by_task, strict=True))
        for path in known:
            scales.append(np.array([step.scales for step in path]))
            gains.append(ends.normalised(found[path_text(path)][None])[0])
        self.start = Start(np.array(scales), np.array(gains))
        agent: Any = self.agent
        if self.env.fixed is not None:
            [best] = self.start.best(self.env.fixed)
            agent.start.copy_(torch.from_numpy(self.start.scales[best, 0]))
        else:
            agent.begin, agent.n_tasks = self.start, self.env.n_tasks

    def learn(self, episodes: int) -> Iterator[dict[str, float]]:
        """Play and update in turn, as far as the budget goes; yields the diagnostics of each update."""
        total = episodes = min(episodes, self.out.left)
        while episodes > 0:
            n = min(self.args.episodes_per_update, episodes)
            played = [
                ppo.play(self.env, self.agent, self.generator, masked=self.args.mask_actions)
                for _ in range(n)
            ]
            episodes -= n
            batch = ppo.collect(played, self.args.gamma)
            targets, progress = self._targets(played, batch), 1 - episodes / total
            yield update(self.agent, self.optimiser, batch, targets, self.args, progress, self.form)

    def _targets(self, played: Sequence[ppo.Episode], batch: ppo.Rollout) -> Targets:
        """Gains above those of the path that each preference begins with, which V then need not learn."""
        if self.n_targets == 1:
            gains = batch.returns[:, None]
            if self.start is not None and self.env.fixed is None:
                known = [
                    float(achievement(self.start.gains[[i]], w)[0, 0])
                    for w, i in ((w, self.start.best(w)[0]) for w in map(_preference, played))
                ]
                gains = gains - _each(known, batch.lengths)[:, None]
            return Targets(gains, torch.ones_like(gains))
        vectors = np.array([e.info["gains"] for e in played])  # (E, K)
        weights = np.array([_preference(e) for e in played])
        if self.start is not None:
            vectors = vectors - self.start.gains[self.start.best(weights)]
        return Targets(_each(vectors, batch.lengths), _each(weights, batch.lengths))

    def path(self, weights: np.ndarray) -> Path:
        """The greedy path for a preference (K,), without scoring it."""
        env = PreferenceEnv(
            type(self.env.unwrapped)(_Unscored(self.out.scorer)),  # type: ignore[call-arg]
            self.out.ends,
            seed=0,
            form=self.form,
            fixed=self.env.fixed,
        )
        options = {"preference": weights, "subset": None}
        played = ppo.play(env, self.agent, None, masked=self.args.mask_actions, options=options)
        return tuple(played.info["path"])


class _Unscored(_Noted):
    """A scorer that gives every path the same scores, to walk without evaluating anything."""

    def __init__(self, scorer: Any) -> None:
        self._scorer = scorer

    def __getattr__(self, name: str) -> Any:
        if name == "_scorer":
            raise AttributeError(name)
        return getattr(self._scorer, name)

    def score(self, path: Path, subset: int | None = None) -> np.ndarray:
        """Zeros (N,)."""
        return np.zeros(self._scorer.n_models)


def _preference(episode: ppo.Episode) -> np.ndarray:
    return np.asarray(episode.info["preference"])


def _each(values: Any, lengths: Sequence[int]) -> Tensor:
    """What an episode has, for each of its steps: (E, ...) -> (B, ...)."""
    found = torch.as_tensor(np.asarray(values), dtype=torch.float32)
    return found.repeat_interleave(torch.tensor(lengths), dim=0)


def conditioned(
    form: str = "linear", part: int = 1, niches: float = 0.0
) -> Callable[[Any, int, int, Ends], Trials]:
    """The search: one training for all preferences, then the greedy path of each of a lattice.

    form: one of ``FORMS``. part: the search spends its evaluations divided by this, so 5 is a fifth. niches:
    the share of them that ``evolve_niches`` spends first; the agent then begins for each preference with the
    best path of its archive; what niches answer is among the answers.
    """

    def search(scorer: Any, evaluations: int, seed: int, ends: Ends) -> Trials:
        out = Trials(scorer, evaluations // part, ends)
        archive = evolve_niches(out, round(niches * out.left), seed) if niches else []
        agent = Conditioned(out, seed, form=form, known=archive)
        for _ in agent.learn(out.left):
            pass
        found = map(agent.path, lattice_of(out.n_tasks, POINTS))
        out.answers = list(dict.fromkeys([*found, *out.answers]))
        return out

    return search


def separate(scorer: Any, evaluations: int, seed: int, ends: Ends) -> Trials:
    """An agent for each preference of the lattice, as HM3 has it, with an equal share of the budget each.

    They share the uniform paths, which each would otherwise pay for. Each goes on with the subset after those
    of the agents before, or agents of few episodes would all see the first ones alone.
    """
    out, turn = Trials(scorer, evaluations, ends), 0
    weights = lattice_of(out.n_tasks, POINTS)
    for i, w in enumerate(weights):
        agent = Conditioned(out, seed + i, fixed=w, turn=turn)
        turn += sum(1 for _ in agent.learn(out.left // (len(weights) - i)))  # a subset per update
        out.answers.append(agent.path(w))
    out.answers = list(dict.fromkeys(out.answers))
    return out
