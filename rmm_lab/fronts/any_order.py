"""HM3's decision process: a model out of any layers of several models, in any order (Gymnasium).

Source: Zhou et al. 2025, "Hierarchical Multi-Objective Model Merging" (arXiv 2409.18893).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from rmm_lab.errors import InputError
from rmm_lab.reward import Path, Step, path_text

# The paper has no number for these.
BETA = 0.01  # of a layer: a hundredth of the way from the base to the experts
DEEPEST = 2  # T_max, in layers of the base; as in ``MergingEnv``
Score = Callable[[Path], np.ndarray]  # a path's gains, (K,)


def spread(total: float, steps: int) -> list[float]:
    """A total R as the rewards of T steps: R / T for each, a list of T."""
    return [total / steps] * steps


class LayersEnv(gym.Env[np.ndarray, np.int64]):
    """Compose a model out of any layers of M models, in any order.

    ## Action space
    ``Discrete(M L)``: the pair a runs layer a mod L of model a // L next.

    ## Observation space
    ``Box(-1, M L - 1, (T_max,), float32)``: the pairs so far, then -1.

    ## Reward
    0, but at the end R = sum_k w_k f_k - beta T. Only then T is known: ``spread`` makes R / T a step of it.

    ## End
    After the last layer of any model, or after T_max layers. The paper has no action that stops; without an
    end of its own each path would have T_max layers, and beta no effect.
    A T5's encoder comes before its decoder, whose layers have other inputs: each stack ends like that, with
    a T_max of its own, and ``info["action_mask"]`` (M L,) has the pairs of the present stack.

    ## Info
    ``action_mask``, ``path``, ``seen``: the observation; at the end ``gains`` (K,).

    Args:
        score: a path's gains (K,), 0 for the base and 1 for a task's expert.
        models: M sources. stacks: layers that may follow each other. weights: w, (K,).
        stem: the path's first step, at place -1; None: that of the scorer.
    """

    def __init__(
        self,
        score: Score,
        models: Sequence[str],
        stacks: Sequence[range],
        weights: np.ndarray,
        *,
        beta: float = BETA,
        stem: Step | None = None,
    ) -> None:
        self.score, self.models, self.stacks = score, tuple(models), tuple(stacks)
        self.weights, self.beta, self.stem = np.asarray(weights, float), beta, stem
        self.n_layers = sum(map(len, stacks))
        n, most = len(self.models) * self.n_layers, DEEPEST * self.n_layers
        self.action_space = gym.spaces.Discrete(n)
        self.observation_space = gym.spaces.Box(-1, n - 1, (most,), np.float32)
        self.layers = np.arange(n) % self.n_layers  # of each pair
        self._begin()

    def _begin(self) -> None:
        self.taken: list[int] = []
        self.stack, self.depth = 0, 0  # the present stack, and how many of its layers run

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode, with no layer."""
        super().reset(seed=seed)
        self._begin()
        return self._observe(), self._info()

    def step(self, action: np.int64 | int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Run a pair next, a number below M L; InputError for one that ``legal`` has not."""
        action = int(action)
        legal = self.legal()
        if not 0 <= action < len(legal) or not legal[action]:
            found = f"{action} after {path_text(self.path) or 'nothing'}"
            raise InputError(
                f"action: expected a pair of the present stack, found {found}; obey action_mask"
            )
        over = self.ends_stack()[action]
        self.stack, self.depth = (self.stack + 1, 0) if over else (self.stack, self.depth + 1)
        self.taken.append(action)
        value, info, done = 0.0, self._info(), self.stack == len(self.stacks)
        if done:
            gains = self.score(self.path)
            value, info = self.worth(gains, len(self.taken)), info | {"gains": gains}
        return self._observe(), value, done, False, info

    @property
    def path(self) -> Path:
        """The pairs so far as a path."""
        steps = (Step(self.models[a // self.n_layers], a % self.n_layers) for a in self.taken)
        return (*([self.stem] if self.stem else []), *steps)

    def worth(self, gains: np.ndarray, steps: int) -> float:
        """R = sum_k w_k f_k - beta T, for gains f (K,) and T steps."""
        return float(self.weights @ gains - self.beta * steps)

    def legal(self) -> np.ndarray:
        """Which pairs may come next: (M L,) bool; none after the end."""
        if self.stack == len(self.stacks):
            return np.zeros(len(self.layers), bool)
        return np.isin(self.layers, self.stacks[self.stack])

    def ends_stack(self) -> np.ndarray:
        """After which pairs the present stack would be over: (M L,) bool."""
        own = self.stacks[self.stack]
        return self.legal() & ((self.layers == own[-1]) | (self.depth + 1 >= DEEPEST * len(own)))

    def ends_path(self) -> np.ndarray:
        """After which pairs the episode would be over: (M L,) bool."""
        return self.ends_stack() & (self.stack == len(self.stacks) - 1)

    def _observe(self) -> np.ndarray:
        seen = np.full(DEEPEST * self.n_layers, -1, np.float32)  # (T_max,)
        seen[: len(self.taken)] = self.taken
        return seen

    def _info(self) -> dict[str, Any]:
        mask = self.legal().astype(np.int8)
        return {"action_mask": mask, "path": self.path, "seen": self._observe()}
