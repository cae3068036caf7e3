"""An episode of the merging environment, walked by hand or by an agent, and undone where you like.

No widget is imported here: everything can be called, and is tested, without a notebook.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rmm_lab.env import MergingEnv
from rmm_lab.errors import InputError
from rmm_lab.figures.paths import place_name
from rmm_lab.ppo import Agent
from rmm_lab.reward import PathScorer


class Walk:
    """One episode of ``MergingEnv``, action by action, by hand or by an agent, with undo.

    Args:
        scorer: scores the path at the end; ``Problem.scorer()`` makes one.
        agent: a policy to look at and to follow, such as ``Result.agent``.
        subset: the data subset that scores the end; None: all examples of the split.
        masked: whether the agent's policy gives illegal actions no probability.
        options: of ``MergingEnv``, such as ``observation``; an agent needs those it was trained with.

    ``env``: the environment, with its ``layer``, ``path`` and ``merging_map``. ``actions``: the numbers of
    the actions so far. ``done``: whether the episode has ended; then ``reward``, ``penalised``, ``illegal``
    (penalised for an illegal move, not for its length) and ``scores`` (task -> metric in [0, 1]; None after
    a penalty).
    """

    def __init__(
        self,
        scorer: PathScorer,
        *,
        agent: Agent | None = None,
        subset: int | None = None,
        masked: bool = True,
        **options: Any,
    ) -> None:
        self.env = MergingEnv(scorer, **options)
        self.agent, self.subset, self.masked = agent, subset, masked
        self.action_names, self.stacks = self.env.action_names, scorer.stacks
        if agent is not None:
            found = (agent.actor[0].in_features, agent.actor[-1].out_features)
            expected = (math.prod(self.env.observation_space.shape or ()), len(self.action_names))
            if found != expected:
                raise InputError(
                    f"agent: expected one for {expected[0]} numbers of observation and {expected[1]} "
                    f"actions, found {found[0]} and {found[1]}; give the agent of a search on this "
                    "problem, and its observation"
                )
        self.reset()

    def reset(self) -> None:
        """Back to the start, nothing chosen."""
        self._replay(())

    def undo(self) -> None:
        """Take the last action back, by repeating the others from the start."""
        if not self.actions:
            raise InputError("undo: expected an action to take back, found none; do one first")
        self._replay(self.actions[:-1])

    def act(self, action: int | str) -> None:
        """Do an action, given by number or name. An illegal one ends the episode with the penalty.

        If the scorer raises, the walk stays where it was and the error propagates.
        """
        number = self.number(action)
        if self.done:
            raise InputError(
                "action: expected a running walk, found an ended one; undo or start again"
            )
        try:
            self._step(number)
        except Exception:
            self._replay(self.actions)
            raise

    def agent_step(self) -> int:
        """Let the agent do its most probable action. Returns its number."""
        pi, _ = self.policy()
        if pi is None:
            raise InputError(
                "agent: expected an agent and a running walk, found "
                + ("an ended walk; start again" if self.agent else "no agent; give agent=")
            )
        self.act(action := int(pi.argmax()))
        return action

    def _replay(self, actions: Sequence[int]) -> None:
        self._observation, _ = self.env.reset(options={"subset": self.subset})
        self.actions: list[int] = []
        self.done, self.penalised, self.illegal = False, False, False
        self.reward: float | None = None
        self.scores: dict[str, float] | None = None
        for action in actions:
            self._step(action)

    def _step(self, action: int) -> None:
        self._last_layer = self.env.layer
        self._observation, reward, terminated, truncated, info = self.env.step(action)
        self.actions.append(action)
        self.done = terminated or truncated
        if self.done:
            self.reward, self.penalised = reward, info["penalised"]
            self.illegal = terminated and self.penalised  # not truncated
            self.scores = info.get("scores")

    # ---------------------------------------------------------------------------------------- state

    @property
    def legal(self) -> np.ndarray:
        """(A,) bool: actions that are legal and leave a way to the end; all False at the end."""
        return self.env.action_mask().astype(bool)

    def number(self, action: int | str) -> int:
        """An action's number, from its number or name."""
        if isinstance(action, str) and action in self.action_names:
            return self.action_names.index(action)
        if isinstance(action, str) or not 0 <= action < len(self.action_names):
            raise InputError(
                f"action: expected a number below {len(self.action_names)} or one of "
                f"{', '.join(self.action_names)}, found {action!r}"
            )
        return int(action)

    def place(self, layer: int | None = None) -> str:
        """A layer's name (by default the current one's): stem, layer 2, enc 0, dec 1, or the end."""
        layer = self.env.layer if layer is None else layer
        return "the end" if layer >= self.env.n_layers else place_name(layer, self.stacks)

    # ------------------------------------------------------------------------------- the agent's view

    def policy(self) -> tuple[np.ndarray, float] | tuple[None, None]:
        """pi(.|s): (A,), and V(s) in deviations from the mean return of a rollout.

        None for both without an agent and at the end.
        """
        if self.agent is None or self.done:
            return None, None
        state = torch.from_numpy(self._observation).flatten()[None]  # (rows, P) -> (1, D)
        mask = torch.from_numpy(self.legal | (not self.masked))[None]
        with torch.no_grad():
            pi = self.agent.log_probs(state, mask)[0].exp().numpy()
            return pi, float(self.agent.value(state))

    # ------------------------------------------------------------------------------------- in words

    def does(self, action: int | str) -> str:
        """What an action would do now, for a button's tooltip."""
        number = self.number(action)
        if self.done:
            return "the walk has ended"
        here, name = self.place(), self.action_names[number]
        if not self.legal[number]:
            return f"illegal at {here}: it leads to the penalty"
        if number == self.env.back:
            return f"append nothing, go back to {self.place(self.env.layer - 1)} and stack on top"
        what = "append nothing" if number == self.env.skip else f"append {here} of {name}"
        if self.env.layer < 0:
            what = "leave the base's stem" if number == self.env.skip else f"take {name}'s stem"
        return f"{what}; go to {self.place(self.env.layer + 1)}"

    def sentence(self) -> str:
        """What the last action did and what comes next."""
        if not self.actions:
            return f"nothing chosen yet; next: {self.place()}"
        action, here = self.actions[-1], self.place(self._last_layer)
        back, skip = self.env.back, self.env.skip
        penalty = f"the episode ends with a penalty of {self.reward} (rewards are 0 to 1)"
        if self.illegal:
            return f"back at {here}, the first of a stack: illegal, {penalty}"
        did = {skip: "skipped", back: "went back"}.get(action, f"took {self.action_names[action]}")
        if self.penalised:
            return (
                f"{here}: {did}; too long (at most {self.env.max_steps} actions and "
                f"{self.env.max_depth} layers), {penalty}"
            )
        if self.done:
            return f"{here}: {did}; the end: the reward is {self.reward:.3f}"
        more = ", where the next choice stacks on top" if action == back else ""
        return f"{here}: {did}; next: {self.place()}{more}"
