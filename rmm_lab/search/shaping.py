"""A dense reward for the merging environment, which changes no optimal policy."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from rmm_lab.errors import InputError


class DriftShaping(gym.Wrapper[np.ndarray, np.int64, np.ndarray, np.int64]):
    """Potential-based shaping: adds ``F = gamma Phi(s') - Phi(s)`` to the reward of every step.

    ``Phi(s) = -weight * mean_i d_i / (1 + d_i)`` of the drifts d_i of what is merged so far from each expert
    (``Calibration.drift``), and 0 once an episode has ended. With the gamma that the agent discounts by, the
    discounted sum of all F of an episode is ``-Phi(s_0)``, whatever the agent does, so the optimal policies
    are those without F. Source: Ng et al. 1999, "Policy Invariance Under Reward Transformations", Theorem 1.

    Args:
        env: a ``MergingEnv``, wrapped or not.
        weight: of the potential, in units of the reward.
        gamma: the agent's discount.

    ``info["raw_reward"]`` and ``info["dar_reward"]`` stay as they are.
    """

    def __init__(self, env: gym.Env[np.ndarray, np.int64], *, weight: float, gamma: float) -> None:
        if not 0 <= weight < np.inf or not 0 < gamma <= 1:
            raise InputError(
                f"shaping: expected a weight of 0 or more and gamma in (0, 1], found {weight} and {gamma}; "
                "correct them"
            )
        super().__init__(env)
        self.weight, self.gamma, self.potential = weight, gamma, 0.0

    def _potential(self, info: dict[str, Any]) -> float:
        scorer = self.unwrapped.scorer  # type: ignore[attr-defined]
        drift = scorer.drift(info["path"])  # (N,)
        return -self.weight * float(np.mean(1 - 1 / (1 + drift)))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode, at the potential of an empty path."""
        observation, info = self.env.reset(seed=seed, options=options)
        self.potential = self._potential(info)
        return observation, info

    def step(self, action: np.int64 | int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """As the environment's, with F added to the reward."""
        observation, value, terminated, truncated, info = self.env.step(action)  # type: ignore[arg-type]
        before = self.potential
        self.potential = 0.0 if terminated or truncated else self._potential(info)
        return (
            observation,
            float(value) + self.gamma * self.potential - before,
            terminated,
            truncated,
            info,
        )
