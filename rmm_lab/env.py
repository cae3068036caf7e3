"""The merging environment (Gymnasium) and the Dynamic Average Reward as a reward wrapper.

``import rmm_lab.env`` registers ``rmm_lab/Merging-v0``; ``gym.make`` with no further argument gives the
demo's pair.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from rmm_lab.errors import InputError
from rmm_lab.reward import Path, PathScorer, Step, path_text, reward

OBSERVATIONS = ("map", "map+cursor", "map+cursor+drift")


class MergingEnv(gym.Env[np.ndarray, np.int64]):
    """Walk through the layers of N models and compose a merged model, layer by layer.

    ## Action space
    ``Discrete(N + M + 2)``. At layer k:

    | action | name | effect |
    |---|---|---|
    | 0 .. N-1 | model action (Eq. 3) | append layer k of that model; go to layer k+1 |
    | N .. N+M-1 | merging action (Eq. 4) | append that operator's layer k; go to layer k+1 |
    | N+M | skip | append nothing; go to layer k+1 |
    | N+M+1 | back | append nothing; go to layer k-1, so that the next choice stacks on top |

    ``back`` undoes nothing: what was appended stays ("hierarchical stacking").

    With a scorer that ``chooses_stem`` the walk starts one place earlier, at k = -1: there a source
    gives the *stem* (all weights outside the layers and heads), and ``skip`` keeps the base's stem. The
    map and the observation then have L + 1 columns, the stem's in front.

    ## Observation space
    ``observation="map"``: the merging map s of Eq. 5, ``Box(0, max_steps, (N+M, L), float32)``:
    s(a, k) counts how often source a was taken at layer k; zero at the start.
    ``observation="map+cursor"``: one more row, a one-hot of the current layer (all zero at the end),
    ``Box(0, max_steps, (N+M+1, L), float32)``. The map alone does not show where the agent is
    after a skip or a back.
    ``observation="map+cursor+drift"``: N more rows, 0 but at the current layer, where they hold d / (1 + d)
    for the drift d of what is merged so far from each expert on calibration inputs. What least squares
    makes of a layer depends on the layers before; this tells how well they did.

    ## Reward
    0 for every step but the last, which gives the mean over tasks of the merged model's metric on one
    data subset, in [0, 1] (Eq. 7), or ``penalty`` (below 0) for an illegal move or truncation.

    ## Start
    Layer 0, an empty path. Subsets come in turn: ``episodes_per_subset`` episodes on each, until every
    example has been used once (a *window*); then from the first one again.
    ``reset(options={"subset": i})`` scores this episode on subset i, or on all examples for ``None``,
    and does not advance the turn. ``reset(options={"episode": t})`` sets the turn, to resume;
    ``reset(seed=...)`` sets it to the first subset. Nothing else in the environment is random.

    ## End
    *Terminated* after the last layer, or with the penalty after an illegal ``back`` at the first layer
    of a stack (of a ViT: layer 0). *Truncated* with the penalty after ``max_steps`` actions or with
    more than ``max_depth`` layers. An agent that obeys the mask meets neither penalty.

    ## Info
    ``action_mask``: (N+M+2,) int8, 1 where an action is legal and the end can still be reached;
    ``layer``: k; ``path``: tuple of ``Step``; ``subset``; ``new_window``: whether this
    episode is the first of a window. At the end also ``raw_reward``, ``penalised``, and unless
    penalised ``scores``: task -> metric.

    ## Arguments
    scorer: a ``PathScorer``. observation: as above. penalty: reward of an
    illegal move, in units of the reward (the paper's -10 points are -0.1). max_steps: default 4 L + 1.
    max_depth: layers of the merged model, default 2 L. episodes_per_subset: see Start.
    render_mode: ``ansi`` (text) or ``rgb_array``.

    Source: Han et al. 2025, Sec. II-B and II-C, Eq. 1 to 7. The bounds and the mask are ours.
    """

    metadata = {"render_modes": ["ansi", "rgb_array"], "render_fps": 2}

    def __init__(
        self,
        scorer: PathScorer,
        *,
        observation: str = "map+cursor",
        penalty: float = -0.1,
        max_steps: int | None = None,
        max_depth: int | None = None,
        episodes_per_subset: int = 1,
        render_mode: str | None = None,
    ) -> None:
        self.scorer = scorer
        self.n_sources, self.n_layers = len(scorer.sources), scorer.n_layers
        if observation not in OBSERVATIONS:
            raise InputError(
                f"observation: expected {' or '.join(OBSERVATIONS)}, found {observation!r}; correct it"
            )
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise InputError(
                f"render_mode: expected ansi or rgb_array, found {render_mode!r}; correct it"
            )
        self.observation, self.penalty, self.render_mode = observation, penalty, render_mode
        self.max_steps = 4 * self.n_layers + 1 if max_steps is None else max_steps
        self.max_depth = 2 * self.n_layers if max_depth is None else max_depth
        self.episodes_per_subset = episodes_per_subset
        self.first = -1 if scorer.chooses_stem else 0
        self.n_places = self.n_layers - self.first
        if self.max_steps < self.n_places or min(self.max_depth, episodes_per_subset) < 1:
            raise InputError(
                f"bounds: expected max_steps >= {self.n_places}, the places, max_depth and "
                f"episodes_per_subset >= 1, found {self.max_steps}, {self.max_depth}, {episodes_per_subset}"
            )
        self.skip, self.back = self.n_sources, self.n_sources + 1
        self.action_names = (*scorer.sources, "skip", "back")
        rows = self.n_sources + (observation != "map")
        if observation == "map+cursor+drift":
            self._drift: Any = getattr(scorer, "drift", None)
            if self._drift is None:
                raise InputError(
                    "observation map+cursor+drift: expected a scorer with drift(path), found none; "
                    "see engine.scorer.Scorer.drift"
                )
            rows += len(self._drift(()))  # InputError where there are no inputs to look at
        self.action_space = gym.spaces.Discrete(self.n_sources + 2)
        self.observation_space = gym.spaces.Box(
            0, self.max_steps, (rows, self.n_places), np.float32
        )
        self._stack_starts = {stack.start for stack in scorer.stacks} | {self.first}
        self._turn = 0  # episodes started in turn
        self._begin(None, False)

    def _begin(self, subset: int | None, new_window: bool) -> None:
        self.merging_map = np.zeros((self.n_sources, self.n_places), np.float32)  # s_0 = 0
        self.layer, self.steps, self.depth = self.first, 0, 0
        self.path: Path = ()
        self.subset, self.new_window = subset, new_window

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode; see the class for ``options``."""
        super().reset(seed=seed)
        options = options or {}
        if seed is not None:
            self._turn = 0
        if "episode" in options:
            self._turn = int(options["episode"])
        if "subset" in options:
            subset = options["subset"]
            if subset is not None and not 0 <= subset < self.scorer.n_subsets:
                raise InputError(
                    f"subset: expected 0 to {self.scorer.n_subsets - 1} or None, found {subset}; correct it"
                )
            self._begin(subset, False)
        else:
            turn = self._turn % (self.scorer.n_subsets * self.episodes_per_subset)
            self._begin(turn // self.episodes_per_subset, turn == 0)
            self._turn += 1
        return self._observe(), self._info()

    def step(self, action: np.int64 | int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Do one action at the current layer; see the class."""
        action = int(action)
        if not 0 <= action < self.n_sources + 2:
            raise InputError(
                f"action: expected 0 to {self.n_sources + 1}, found {action}; correct it"
            )
        if self.layer >= self.n_layers:
            raise InputError(
                "step: expected a running episode, found an ended one; call reset first"
            )
        self.steps += 1
        illegal = False
        if action < self.n_sources:  # model and merging actions
            self._append(action)
            self.depth += self.layer >= 0
            self.layer += 1
        elif action == self.skip:
            self.layer += 1
        elif self.layer in self._stack_starts:
            illegal = True
        else:
            self.layer -= 1
        finished = self.layer >= self.n_layers
        too_long = self.depth > self.max_depth or (self.steps >= self.max_steps and not finished)
        terminated, truncated = illegal or (finished and not too_long), too_long and not illegal
        value = 0.0
        info: dict[str, Any] = {}
        if terminated or truncated:
            penalised = illegal or too_long
            if penalised:
                value = self.penalty
            else:
                scores = self.scorer.score(self.path, self.subset)  # F_M evaluated, (N,)
                value = reward(scores)  # Eq. 7
                names = self.scorer.task_names
                info["scores"] = dict(zip(names, scores.tolist(), strict=True))
            info |= {"raw_reward": value, "penalised": penalised}
            self.layer = self.n_layers
        return self._observe(), value, terminated, truncated, self._info() | info

    def _append(self, action: int) -> None:
        self.merging_map[action, self.layer - self.first] += 1  # Eq. 5
        self.path += (Step(self.scorer.sources[action], self.layer),)

    def action_mask(self) -> np.ndarray:
        """(N+M+2,) int8: 1 for actions that are legal and after which the end can be reached."""
        mask = np.ones(self.n_sources + 2, np.int8)
        left = self.n_layers - self.layer  # actions that the way to the end takes
        if self.layer >= self.n_layers:
            return np.zeros_like(mask)
        if self.depth >= self.max_depth and self.layer >= 0:
            mask[: self.n_sources] = 0
        if self.layer in self._stack_starts or self.max_steps - self.steps - 1 < left + 1:
            mask[self.back] = 0
        return mask

    def _observe(self) -> np.ndarray:
        if self.observation == "map":
            return self.merging_map.copy()
        cursor = np.zeros((1, self.n_places), np.float32)
        if self.layer < self.n_layers:
            cursor[0, self.layer - self.first] = 1
        seen = [self.merging_map, cursor]
        if self.observation == "map+cursor+drift":
            drift = self._drift(self.path if cursor.any() else ())  # (N,)
            seen.append((cursor * (1 - 1 / (1 + drift[:, None]))).astype(np.float32))
        return np.concatenate(seen)  # (N+M+1, L) or (2N+M+1, L)

    def _info(self) -> dict[str, Any]:
        return {
            "action_mask": self.action_mask(),
            "layer": self.layer,
            "path": self.path,
            "subset": self.subset,
            "new_window": self.new_window,
        }

    def render(self) -> Any:
        """``ansi``: the map as text; ``rgb_array``: (H, W, 3) uint8, rows sources, columns layers."""
        if self.render_mode == "ansi":
            places = range(self.first, self.n_layers)
            width = max(5, *(len(s) for s in self.scorer.sources))
            lines = [f"{'layer':>{width}} " + " ".join(f"{k:2d}" for k in places)]
            for name, row in zip(self.scorer.sources, self.merging_map, strict=True):
                cells = " ".join(f"{int(v):2d}" if v else " ." for v in row)
                lines.append(f"{name:>{width}} {cells}")
            cursor = " ".join(" ^" if k == self.layer else "  " for k in places)
            path = path_text(self.path) or "(empty)"
            return "\n".join([*lines, f"{'':>{width}} {cursor}", f"path: {path}"]) + "\n"
        if self.render_mode == "rgb_array":
            shade = np.minimum(self.merging_map / 2, 1)[
                ..., None
            ]  # (N+M, L, 1): 0, once, twice or more
            colours = 255 - shade * (
                255 - np.array([0, 76, 125])
            )  # (N+M, L, 3), from white to blue
            square = np.ones((24, 24, 1))  # pixels per cell
            picture = np.kron(colours, square).astype(np.uint8)  # (24 (N+M), 24 L, 3)
            if self.layer < self.n_layers:
                x = 24 * (self.layer - self.first)
                picture[:, [x, x + 1, x + 22, x + 23]] = (230, 159, 0)  # the cursor's column
            return picture
        return None


class DynamicAverageReward(gym.Wrapper[np.ndarray, np.int64, np.ndarray, np.int64]):
    """DAR, Eq. 10: blend an episode's reward with the previous one's, by a weight that grows over the search.

        R_t <- lambda * (t / T_max) * R_{t-1} + (1 - lambda * (t / T_max)) * R_t

    R_{t-1} is the previous episode's DAR reward (the equation writes R_t on both sides; we carry the
    average on within a window); lambda is 0 for the first episode of a window, when the subsets start over.
    A penalty passes unblended and never becomes a "previous reward". An episode on a subset that
    ``reset(options={"subset": ...})`` asks for is out of turn: it passes unblended and does not count.

    Args:
        env: a ``MergingEnv``.
        dar_lambda: lambda, in [0, 1].
        max_episodes: T_max, the number of episodes that the agent plays in turn.

    ``info["raw_reward"]`` keeps Eq. 7's reward, ``info["dar_reward"]`` holds the blended one, which is
    also what ``step`` returns. ``episode`` (t, from 0; -1 before the first) and ``previous`` are the
    wrapper's whole state. ``reset(seed=...)`` forgets both; ``reset(options={"episode": t})`` sets t.
    """

    def __init__(
        self, env: gym.Env[np.ndarray, np.int64], *, dar_lambda: float, max_episodes: int
    ) -> None:
        if not 0 <= dar_lambda <= 1:
            raise InputError(
                f"dar_lambda: expected a number in [0, 1], found {dar_lambda}; correct it"
            )
        if max_episodes < 1:
            raise InputError(f"max_episodes: expected at least 1, found {max_episodes}; correct it")
        super().__init__(env)
        self.dar_lambda, self.max_episodes = dar_lambda, max_episodes
        self.episode, self.in_turn = -1, False
        self.previous: float | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start the next episode; a new window forgets the previous reward."""
        observation, info = self.env.reset(seed=seed, options=options)
        options = options or {}
        if seed is not None:
            self.episode, self.previous = -1, None
        if "episode" in options:
            self.episode = int(options["episode"]) - 1
        self.in_turn = "subset" not in options
        if self.in_turn:
            self.episode += 1
            if info["new_window"]:
                self.previous = None
        return observation, info

    def step(self, action: np.int64 | int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """As the environment's, with the last reward blended."""
        observation, value, terminated, truncated, info = self.env.step(action)  # type: ignore[arg-type]
        value = float(value)
        if terminated or truncated:
            if self.in_turn and not info["penalised"]:
                value = dar(value, self.previous, self.episode, self.max_episodes, self.dar_lambda)
                self.previous = value
            info["dar_reward"] = value
        return observation, value, terminated, truncated, info


def dar(raw: float, previous: float | None, t: int, t_max: int, dar_lambda: float) -> float:
    """Eq. 10 for one episode; t / t_max counts as 1 from t_max on. ``raw``: the reward of Eq. 7.

    ``previous`` None (the start of a window) leaves the reward as it is.
    """
    if previous is None:
        return raw
    weight = dar_lambda * min(t, t_max) / t_max
    return weight * previous + (1 - weight) * raw


# A function by name: the demo's pair is loaded from the wings, which this file does not import.
gym.register(id="rmm_lab/Merging-v0", entry_point="rmm_lab.search.problem:make_merging_env")
