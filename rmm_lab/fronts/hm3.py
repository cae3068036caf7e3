"""HM3 as published, as far as its text goes: a merge for each preference, then PPO over what runs next.

1. Preferences w are drawn from a flat Dirichlet distribution over the tasks.
2. For each, Theta(w) is one DARE-TIES merge with the weights w: no search.
3. The layers of the N experts and those of Theta(w), model N + 1, are (N + 1) L pairs. PPO with fresh
   weights composes a path: at each step any pair may follow any other. A path is worth sum_k w_k f_k -
   beta T, spread evenly over its T steps. The best path that was played is kept.

The policy is Gaussian: a *proto-action*, a point among the pairs, of which one of the nearest pairs is
taken (Wolpertinger, Dulac-Arnold et al. 2015). What is left out, and why: docs/fronts.md.
Source: Zhou et al. 2025, "Hierarchical Multi-Objective Model Merging" (arXiv 2409.18893).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from rmm_lab import ppo
from rmm_lab.engine.block_view import BlockView
from rmm_lab.fronts.any_order import LayersEnv, spread
from rmm_lab.fronts.simplexes import dare_ties
from rmm_lab.fronts.space import Trials
from rmm_lab.reward import Path, Step
from rmm_lab.search.numbers import GaussianAgent
from rmm_lab.search.preferences import Ends

# The paper has no number for any of these, but for gamma. More are in ``any_order``.
PREFERENCES = 11  # N, as many as the other agents answer for two tasks
EPSILON = 0.1  # how often one of the nearest pairs is taken at random
NEAREST = 3  # M'; the more, the less the policy has to say
EMBEDDED, WIDTH = 16, 64  # numbers in an embedding, and in the state of the GRU
ARGS = ppo.Args(
    episodes_per_update=10,
    update_epochs=10,
    target_kl=0.0,  # to end an update early would leave the critic behind, which chooses here
    gamma=0.99,
    gae_lambda=0.95,
    ent_coef=0.01,
    ent_coef_end=0.01,
    mask_actions=False,
)


def summary(pool: Any, models: Sequence[str]) -> np.ndarray:
    """What stands for the weights of each pair in the state: (M L, 1 + N), a layer being a whole block.

    With the layer's task vector tau, the layer minus the base's: |tau| / |theta_base|, and the cosines of
    tau with each expert's there. The paper learns an encoding of the weights and does not say of what form.
    """
    rows = []
    for model in models:
        for block in pool.blocks or [range(k, k + 1) for k in range(pool.n_layers)]:
            base = _flat(pool, "base", block)
            own = _flat(pool, model, block) - base
            taus = [_flat(pool, name, block) - base for name in pool.names]
            size = float(own.norm() / base.norm().clamp(min=1e-12))
            rows.append([size, *(float(torch.cosine_similarity(own, t, 0)) for t in taus)])
    return np.array(rows)


def _flat(pool: Any, source: str, block: range) -> Tensor:
    return torch.cat([t.flatten().float() for k in block for t in pool.weights(source, k).values()])


# ------------------------------------------------------------------------------------ the agent


def places(n_models: int, n_layers: int) -> np.ndarray:
    """Where each pair is in the space of proto-actions: (M L, M + 1).

    Its layer's number is the last coordinate, its model one of M corners: two models are as far from each
    other as two neighbouring layers, 1. The paper does not say how pairs are embedded.
    """
    corners = np.eye(n_models).repeat(n_layers, 0) / np.sqrt(2)  # (M L, M)
    return np.c_[corners, np.tile(np.arange(n_layers), n_models)]


def nearest(proto: np.ndarray, points: np.ndarray, legal: np.ndarray, n: int) -> np.ndarray:
    """The numbers of the n legal points (A, D) nearest to proto (D,), the nearest first."""
    apart = np.linalg.norm(points - proto, axis=1).round(9)  # (A,); equal ones stay in order
    return np.argsort(np.where(legal, apart, np.inf), kind="stable")[: min(n, int(legal.sum()))]


class TrajectoryAgent(GaussianAgent):
    """Actor and critic over a GRU's state h_t of the pairs so far; h_0 is 0.

    A pair is seen as embeddings of its model and of its layer and its ``summary``. The actor's normal
    distributions begin with mean and deviation of all ``places``; both depend on h. The critic has two
    values: V(h), and the step reward R / T of the paths that go on from h.

    Args:
        n_models: M. n_layers: L. features: (M L, S), the ``summary``.
    """

    points: Tensor

    def __init__(self, n_models: int, n_layers: int, features: np.ndarray) -> None:
        points = torch.as_tensor(places(n_models, n_layers), dtype=torch.float32)
        n_actions = points.shape[1]
        super().__init__(WIDTH, n_actions)
        self.actor = ppo.mlp(WIDTH, 2 * n_actions, 0.01)
        self.critic = ppo.mlp(WIDTH, 2, 0.01)
        self.start = points.mean(0)
        self.register_buffer("width", points.std(0, correction=0).clamp(min=0.25))
        self.register_buffer("features", torch.as_tensor(features, dtype=torch.float32))
        self.model, self.layer = nn.Embedding(n_models, EMBEDDED), nn.Embedding(n_layers, EMBEDDED)
        self.weights = nn.Linear(features.shape[1], EMBEDDED)
        self.gru = nn.GRU(3 * EMBEDDED, WIDTH, batch_first=True)

    def state(self, obs: Tensor) -> Tensor:
        """h_t: obs (..., T_max) -> (..., H)."""
        rows = obs.reshape(-1, obs.shape[-1]).long()  # (B, T_max)
        lengths = (rows >= 0).sum(1)  # (B,)
        rows = rows[:, : max(1, int(lengths.max()))].clamp(min=0)  # (B, T)
        model, layer = rows // self.layer.num_embeddings, rows % self.layer.num_embeddings
        known: Any = self.features
        seen = [self.model(model), self.layer(layer), self.weights(known[rows])]
        states, _ = self.gru(torch.cat(seen, -1))  # (B, T, 3 E) -> (B, T, H)
        states = nn.functional.pad(states, (0, 0, 1, 0))  # (B, 1 + T, H): h_0 in front
        return states[torch.arange(len(rows)), lengths].reshape(*obs.shape[:-1], -1)

    def normal(self, obs: Tensor) -> Normal:
        """pi(.|h): obs (..., T_max) -> independent normals (..., D) over proto-actions."""
        shift, log_width = self.actor(self.state(obs)).chunk(2, -1)
        width: Any = self.width
        return Normal(self.start + width * shift, width * log_width.clamp(-3, 1).exp())

    def critics(self, obs: Tensor) -> Tensor:
        """V(h) and the step reward: (B, T_max) -> (B, 2)."""
        return torch.as_tensor(self.critic(self.state(obs)))

    def value(self, obs: Tensor) -> Tensor:
        """V(h): (B, T_max) -> (B,)."""
        return self.critics(obs)[:, 0]


class Wolpertinger(gym.Wrapper[np.ndarray, Any, np.ndarray, np.int64]):
    """Takes proto-actions (D,): of the nearest pairs that with the largest r + gamma V(next state).

    With probability epsilon it is any of them instead. V is 0 after the end. r = R / T is known only then:
    the critic's second value stands for it.
    """

    def __init__(
        self,
        env: LayersEnv,
        agent: TrajectoryAgent,
        seed: int,
        *,
        gamma: float = ARGS.gamma,
        epsilon: float = EPSILON,
        n: int = NEAREST,
    ) -> None:
        super().__init__(env)
        self.layers, self.agent, self.gamma, self.epsilon, self.n = env, agent, gamma, epsilon, n
        self.points = places(len(env.models), env.n_layers)
        self.action_space = gym.spaces.Box(-np.inf, np.inf, (self.points.shape[1],), np.float32)
        self.rng = np.random.default_rng(seed)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Run the pair that is chosen for a proto-action next."""
        return self.layers.step(self.choose(np.asarray(action)))

    def choose(self, proto: np.ndarray) -> int:
        """The pair for a proto-action (D,)."""
        found = nearest(proto, self.points, self.layers.legal(), self.n)  # (n,)
        if self.rng.random() < self.epsilon:
            return int(self.rng.choice(found))
        after = [[*self.layers.taken, int(pair)] for pair in found]  # (n, t + 1)
        with torch.no_grad():
            value, rate = self.agent.critics(torch.tensor(after)).T.numpy()
        goes_on = ~self.layers.ends_path()[found]
        return int(found[(rate + self.gamma * goes_on * value).argmax()])


def update(
    agent: TrajectoryAgent,
    optimiser: torch.optim.Optimizer,
    played: Sequence[ppo.Episode],
    args: ppo.Args = ARGS,
) -> None:
    """PPO clip, GAE, value loss and entropy bonus on whole episodes, whose last reward is R.

    The value loss is (V - G)^2, as in the paper's Algorithm 1, and the same of the step reward. Advantages
    are normalised, returns are not: ``Wolpertinger`` adds r and V.
    """
    each = [spread(e.rewards[-1], len(e.rewards)) for e in played]
    batch = ppo.collect(
        [e._replace(rewards=own) for e, own in zip(played, each, strict=True)], args.gamma
    )
    rates = torch.tensor([r for own in each for r in own])  # (B,)
    last = [torch.as_tensor(e.info["seen"]) for e in played]
    after = torch.stack([x for e, end in zip(played, last, strict=True) for x in (*e.obs[1:], end)])
    adv = ppo.advantage(batch.returns, agent.value(batch.obs).detach())  # (B,)
    parts = adv.split(batch.lengths)
    adv = ppo.normalise(torch.cat([ppo.gae(a, args.gamma, args.gae_lambda) for a in parts]))
    kl, epoch = 0.0, 0
    while epoch < args.update_epochs and (not args.target_kl or kl <= args.target_kl):
        epoch += 1
        log_probs, entropy = agent.judge(batch.obs, batch.masks, batch.actions)
        log_ratio = log_probs - batch.log_probs
        objective = ppo.clipped_objective(log_ratio.exp(), adv, args.clip_coef)
        value_loss = (agent.value(batch.obs) - batch.returns).pow(2).mean()
        value_loss = value_loss + (agent.critics(after)[:, 1] - rates).pow(2).mean()
        loss = -objective + args.vf_coef * value_loss - args.ent_coef * entropy
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        kl = float((log_ratio.exp() - 1 - log_ratio).detach().mean())


# ------------------------------------------------------------------------------------ the search


class Training:
    """An agent with fresh weights for one environment. ``played``: R and path of each episode.

    features: (M L, S), the ``summary``. seed: of the networks and of all that is drawn.
    """

    def __init__(
        self, env: LayersEnv, features: np.ndarray, seed: int, args: ppo.Args = ARGS
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.agent = TrajectoryAgent(len(env.models), env.n_layers, features)
        self.optimiser = torch.optim.Adam(self.agent.parameters(), args.learning_rate)
        self.generator, self.args = torch.Generator().manual_seed(seed), args
        self.env = Wolpertinger(env, self.agent, seed, gamma=args.gamma)
        self.played: list[tuple[float, Path]] = []

    def learn(self, episodes: int) -> None:
        """Play and update in turn."""
        while episodes > 0:
            n = min(self.args.episodes_per_update, episodes)
            agent: Any = self.agent
            played = [ppo.play(self.env, agent, self.generator, masked=False) for _ in range(n)]
            episodes -= n
            self.played += [(e.rewards[-1], e.info["path"]) for e in played]
            update(self.agent, self.optimiser, played, self.args)


def best_path(out: Trials, weights: np.ndarray, episodes: int, seed: int, merge: bool) -> Path:
    """One preference (K,): the path with the largest R of all that it scored, each on a subset.

    episodes: how many evaluations it has. merge: whether Theta is one of the models.
    Theta's own layers in their order are scored first, so that the merge is among the answers; the paper does
    not say whether it does that. The episodes of an update share a subset. Layers are whole blocks, whatever
    the scorer's are.
    """
    scorer, every = out.scorer, np.zeros(out.scorer.n_models)
    view: Any = BlockView(scorer) if scorer.blocks else scorer
    expand = view.expand if scorer.blocks else tuple
    every[out.ends.counts] = weights
    experts, theta = scorer.sources[: scorer.n_models], dare_ties(every)
    models = (*experts, theta) if merge else experts
    turns, first = count(), Step(theta, -1) if merge and scorer.chooses_stem else None

    def score(path: Path) -> np.ndarray:
        stay = next(turns) % ARGS.episodes_per_update > 0
        return np.asarray(out.ask([expand(path)], stay=stay)[0])

    env = LayersEnv(score, models, view.stacks, weights, stem=first)
    training = Training(env, summary(scorer.pool, models), seed)
    if merge:
        whole = (*([first] if first else []), *(Step(theta, k) for k in range(view.n_layers)))
        [gains] = out.ask([expand(whole)])
        training.played.append((env.worth(gains, view.n_layers), whole))
    training.learn(episodes - len(training.played))
    best = max(training.played, key=lambda pair: pair[0])[1]
    return tuple(expand(best))


def hm3(merge: bool = True) -> Callable[[Any, int, int, Ends], Trials]:
    """The search: a merge and a training for each preference, with equal shares of the budget.

    It does not begin with the uniform paths as the others do, which would leave its front full of operators
    that the paper does not have. merge: False leaves Theta out, the ablation without the parameter step.
    """

    def search(scorer: Any, evaluations: int, seed: int, ends: Ends) -> Trials:
        out = Trials(scorer, 0, ends)
        out.left = evaluations
        drawn = np.random.default_rng(seed).dirichlet(np.ones(out.n_tasks), PREFERENCES)
        for i, weights in enumerate(drawn):
            if share := out.left // (len(drawn) - i):
                out.answers.append(best_path(out, weights, share, seed + i, merge))
        out.answers = list(dict.fromkeys(out.answers))
        return out

    return search
