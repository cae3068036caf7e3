"""Numbers in place of a list: an agent whose action at each place is one scale per member.

``ScalesEnv`` is the merging environment with continuous actions, ``GaussianAgent`` the policy for them; the
PPO is that of ``rmm_lab.ppo``. What a step of scales is: see ``search.layer_scales``.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from rmm_lab.env import MergingEnv
from rmm_lab.ppo import Agent
from rmm_lab.reward import Step, path_text
from rmm_lab.search.layer_scales import BOUNDS

# Of the first policy, in units of a scale; best of 0.025, 0.05 and 0.1 on two reward splits, one seed each.
SIGMA = 0.05


class ScalesEnv(MergingEnv):
    """Give each place a scale per member, from the first to the last; nothing is skipped or stacked.

    Actions are ``Box(-0.2, 1.5, (M,))`` for the M members of the pool (``LayerPool.members``); beyond these
    bounds they are clipped, and rounded to 3 digits. The merging map has M rows, which hold the scales
    that were chosen. All else is as in ``MergingEnv``; ``info`` has no ``action_mask``.
    """

    def __init__(self, scorer: Any, **options: Any) -> None:
        self.members: tuple[str, ...] = scorer.members
        super().__init__(scorer, **options)
        self.action_space = gym.spaces.Box(*BOUNDS, (len(self.members),), np.float32)  # type: ignore[assignment]
        rows = len(self._observe())
        self.observation_space = gym.spaces.Box(*BOUNDS, (rows, self.n_places), np.float32)

    def _begin(self, subset: int | None, new_window: bool) -> None:
        super()._begin(subset, new_window)
        self.merging_map = np.zeros((len(self.members), self.n_places), np.float32)

    def _append(self, action: int) -> None:
        self.merging_map[:, self.layer - self.first] = self._scales
        self.path += (Step("task_arithmetic", self.layer, self._scales),)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Append a layer of these scales, (M,), and go on to the next."""
        scales = np.asarray(action, np.float64).clip(*BOUNDS).round(3) + 0.0  # no -0
        self._scales = tuple(scales.tolist())
        return super().step(0)

    def render(self) -> Any:
        """``ansi``: the path as text; ``rgb_array``: as ``MergingEnv``, a row per member."""
        if self.render_mode == "ansi":
            return f"layer {self.layer}, path: {path_text(self.path) or '(empty)'}\n"
        return super().render()

    def _info(self) -> dict[str, Any]:
        info = super()._info()
        del info["action_mask"]
        return info


class GaussianAgent(Agent):
    """Independent normal distributions over numbers: mean ``start + actor(s)`` (A,), deviation exp(log_std).

    ``start``: (A,), the mean before anything is learned, 0 unless it is set. The deviations are learned and
    do not depend on the state, as in CleanRL's ``ppo_continuous_action``; log_std belongs to the actor.
    """

    start: Tensor

    def __init__(self, n_observation: int, n_actions: int) -> None:
        super().__init__(n_observation, n_actions)
        self.register_buffer("start", torch.zeros(n_actions))
        self.actor.register_parameter("log_std", nn.Parameter(torch.empty(n_actions)))
        self.deviate(SIGMA)

    def deviate(self, deviation: float) -> None:
        """Let all deviations be this one."""
        with torch.no_grad():
            self.actor.get_parameter("log_std").fill_(float(np.log(deviation)))

    def normal(self, obs: Tensor) -> Normal:
        """pi(.|s): obs (..., D) -> independent normals (..., A)."""
        return Normal(self.start + self.actor(obs), self.actor.get_parameter("log_std").exp())

    def act(
        self, obs: Tensor, mask: Tensor, generator: torch.Generator | None
    ) -> tuple[np.ndarray, Tensor, Tensor]:
        """As ``Agent.act``: an action (A,) drawn, or the mean; its log-probability; the mean (A,)."""
        policy = self.normal(obs)
        action = policy.mean
        if generator is not None:
            action = action + policy.stddev * torch.randn(action.shape, generator=generator)
        return action.numpy(), policy.log_prob(action).sum(-1), policy.mean

    def judge(self, obs: Tensor, mask: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """As ``Agent.judge``: obs (B, D), actions (B, A) -> log-probabilities (B,), mean entropy."""
        policy = self.normal(obs)
        return policy.log_prob(actions).sum(-1), policy.entropy().sum(-1).mean()
