"""What the widgets look at: a walk through the merging environment, and the record of a search.

No widget is imported here: everything can be called, and is tested, without a notebook.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path as Folder
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rmm_lab.engine.scorer import Path, Scorer, name_of, own_sources
from rmm_lab.env import MergingEnv, PathScorer
from rmm_lab.errors import InputError
from rmm_lab.families.checkpoint import read_checkpoint
from rmm_lab.families.parts import divide
from rmm_lab.figures.paths import place_name
from rmm_lab.path import LayerPath
from rmm_lab.ppo import Agent, Result
from rmm_lab.search.problem import Problem, load_problem
from rmm_lab.search.report import steps_of, text_of
from rmm_lab.search.run_folder import Row, RunFolder, from_csv


class Walk:
    """One episode of ``MergingEnv``, done action by action, by hand or by an agent; it can be undone.

    Args:
        scorer: what the environment needs; ``Problem.scorer()`` makes one.
        agent: a policy to look at and to follow, such as ``Result.agent``.
        observation, max_steps, max_depth: those of the environment; an agent needs its own.
        subset: number of the data subset that scores the end; None: all examples of the split.
        masked: whether the agent's policy gives illegal actions no probability.

    ``actions``: the numbers of what was done. ``done``: whether the episode has ended; then ``reward``,
    ``penalised``, ``illegal`` (penalised for an illegal move, not for its length) and ``scores`` (task ->
    metric in [0, 1]; None where there is no model to score).
    """

    def __init__(
        self,
        scorer: PathScorer,
        *,
        agent: Agent | None = None,
        observation: str = "map+cursor",
        subset: int | None = None,
        masked: bool = True,
        max_steps: int | None = None,
        max_depth: int | None = None,
    ) -> None:
        self.env = MergingEnv(
            scorer, observation=observation, max_steps=max_steps, max_depth=max_depth
        )
        self.agent, self.subset, self.masked = agent, subset, masked
        self.action_names = self.env.action_names
        if agent is not None:
            found = (agent.actor[0].in_features, agent.actor[-1].out_features)
            expected = (
                int(np.prod(self.env.observation_space.shape or ())),
                len(self.action_names),
            )
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
        """Take the last action back: the others are done again from the start."""
        if not self.actions:
            raise InputError("undo: expected an action to take back, found none; do one first")
        self._replay(self.actions[:-1])

    def act(self, action: int | str) -> None:
        """Do an action, given by number or name. An illegal one ends the episode with the penalty.

        If the scorer raises, the walk stands where it stood before, and the error is raised on.
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

    def agent_step(self, generator: torch.Generator | None = None) -> int:
        """Let the agent act: the most probable action, or a sampled one. Returns its number."""
        pi = self.probabilities()
        if pi is None:
            raise InputError(
                "agent: expected an agent and a running walk, found "
                + ("an ended walk; start again" if self.agent else "no agent; give agent=")
            )
        if generator is None:
            action = int(pi.argmax())
        else:
            action = int(torch.multinomial(torch.from_numpy(pi), 1, generator=generator))
        self.act(action)
        return action

    def _replay(self, actions: Sequence[int]) -> None:
        self._observation, _ = self.env.reset(options={"subset": self.subset})
        self.actions: list[int] = []
        self.visited: list[int] = []  # the layer at which each action was done
        self.done, self.penalised, self.illegal = False, False, False
        self.reward: float | None = None
        self.scores: dict[str, float] | None = None
        for action in actions:
            self._step(action)

    def _step(self, action: int) -> None:
        before = self.env.layer
        self._observation, reward, terminated, truncated, info = self.env.step(action)
        self.actions.append(action)
        self.visited.append(before)
        self.done = terminated or truncated
        if self.done:
            self.reward, self.penalised = reward, info["penalised"]
            self.illegal = terminated and self.penalised  # not truncated
            self.scores = info.get("scores")

    # ------------------------------------------------------------------------- where the walk stands

    @property
    def legal(self) -> np.ndarray:
        """(A,) bool: actions that are legal and leave a way to the end; all False at the end."""
        return self.env.action_mask().astype(bool)

    @property
    def merging_map(self) -> np.ndarray:
        """(N+M, P): how often each source was taken at each place, Eq. 5."""
        return self.env.merging_map.copy()

    @property
    def layer(self) -> int:
        """The layer to decide on: -1 for the stem, the number of layers at the end."""
        return self.env.layer

    @property
    def path(self) -> Path:
        """(source number, layer) in the order in which the layers run."""
        return self.env.path

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
        """A layer's name (by default the present one's): stem, layer 2, enc 0, dec 1, or the end."""
        layer = self.layer if layer is None else layer
        return "the end" if layer >= self.env.n_layers else place_name(layer, self.stacks)

    @property
    def stacks(self) -> Sequence[range]:
        """Layers that may follow each other: one stack, or a T5's two."""
        return self.env.scorer.stacks

    def text(self) -> str:
        """The path as in a run folder's tables: ``digits@0 ties@1``."""
        return text_of(self.path, self.env.scorer.sources)

    # ------------------------------------------------------------------------------ what the agent thinks

    def probabilities(self) -> np.ndarray | None:
        """pi(.|s): (A,), or None without an agent and at the end."""
        if self.agent is None or self.done:
            return None
        mask = torch.from_numpy(self.legal) if self.masked else torch.ones(len(self.legal)).bool()
        with torch.no_grad():
            return self.agent.log_probs(self._obs(), mask[None])[0].exp().numpy()

    def value(self) -> float | None:
        """V(s), or None as above. Its unit: deviations from the mean return of a rollout."""
        if self.agent is None or self.done:
            return None
        with torch.no_grad():
            return float(self.agent.value(self._obs()))

    def _obs(self) -> Tensor:
        return torch.from_numpy(self._observation).flatten()[None]  # (rows, P) -> (1, D)

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
            return f"append nothing, go back to {self.place(self.layer - 1)} and stack on top"
        what = "append nothing" if number == self.env.skip else f"append {here} of {name}"
        if self.layer < 0:
            what = "leave the base's stem" if number == self.env.skip else f"take {name}'s stem"
        return f"{what}; go to {self.place(self.layer + 1)}"

    def sentence(self) -> str:
        """What the last action did and what comes next."""
        if not self.actions:
            return f"nothing chosen yet; next: {self.place()}"
        action, layer = self.actions[-1], self.visited[-1]
        here, back, skip = self.place(layer), self.env.back, self.env.skip
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


# ==================================================================================== a finished search


@dataclass
class Run:
    """A finished search as the views need it.

    ``first``: -1 where the agent chose the stem, else 0. ``stem``: where the stem comes from if no step
    chose it. ``episodes``, ``updates``, ``finalists``: rows as in the run folder. ``policies``:
    (updates, places, actions), the mean policy of each rollout, NaN where no step stood at a place;
    None in folders that lack it. ``blocks``: where layers are sublayers, the numbers of those of each
    block, as in ``Parts``; the agent may have walked through blocks then, see ``agent_stacks``.
    """

    sources: tuple[str, ...]
    n_layers: int
    first: int
    stacks: tuple[range, ...]
    stem: str
    task_names: list[str]
    episodes: list[Row]
    updates: list[Row]
    finalists: list[Row]
    policies: Tensor | None
    config: dict[str, Any] = field(default_factory=dict)
    problem: Problem | None = field(default=None, repr=False)
    blocks: tuple[range, ...] = ()
    _scorer: Scorer | None = field(default=None, init=False, repr=False)

    @classmethod
    def of(cls, result: Result, problem: Problem) -> Run:
        """The record of ``rmm_lab.ppo.train``'s result on a problem."""
        pool, chosen = problem.pool, problem.stem == "agent"
        return cls(
            sources=pool.sources,
            n_layers=pool.n_layers,
            first=-1 if chosen else 0,
            stacks=pool.stacks,
            stem="base" if chosen else problem.stem,
            task_names=[task.name for task in problem.tasks],
            episodes=result.episodes,
            updates=result.updates,
            finalists=result.finalists,
            policies=result.policies,
            problem=problem,
            blocks=pool.blocks,
        )

    @classmethod
    def read(cls, folder: str | Folder, problem: Problem | None = None) -> Run:
        """Read a run folder. ``problem``: what was merged; without it, it is loaded when first needed.

        Raises InputError if the search has not ended, or if a file cannot be read.
        """
        from rmm_lab.families.shipped import locate

        folder = Folder(folder)
        config = RunFolder.read_config(folder)
        try:
            path = LayerPath.from_json((folder / "path.json").read_text("utf-8"))
            finalists = json.loads((folder / "finalists.json").read_text("utf-8"))
            episodes, updates = (
                from_csv((folder / f"{name}.csv").read_text("utf-8"))
                for name in ("episodes", "updates")
            )
            file = folder / "policies.safetensors"
            policies = load_file(file)["policies"] if file.exists() else None
            tasks = [k.removeprefix("score_") for k in episodes[0] if k.startswith("score_")]
            chosen = config["stem"] == "agent"
        except InputError:
            raise
        except (OSError, LookupError, SafetensorError, TypeError, ValueError) as error:
            raise InputError(
                f"run folder {folder}: expected path.json, finalists.json, episodes.csv and updates.csv "
                f"of a search that has ended, found none that can be read ({error!r}); end it with "
                "python -m rmm_lab.ppo --resume, or name another folder"
            ) from error
        base = read_checkpoint(locate(path.base.source))
        parts = base.family.split(base.weights)
        if path.unit == "sublayer":
            parts = divide(parts, base.family.sublayers)
        return cls(
            sources=tuple(e.name for e in path.experts) + path.operators,
            n_layers=len(parts.layers),
            first=-1 if chosen else 0,
            stacks=parts.stacks,
            stem="base" if chosen else config["stem"],
            task_names=tasks,
            episodes=episodes,
            updates=updates,
            finalists=finalists,
            policies=policies,
            config=config,
            problem=problem,
            blocks=parts.blocks,
        )

    @property
    def action_names(self) -> tuple[str, ...]:
        """Models, operators, skip, back."""
        return (*self.sources, "skip", "back")

    # ------------------------------------------------------------------------- which way it was found

    @property
    def agent_stacks(self) -> tuple[range, ...]:
        """The stacks that the agent walked through: of blocks where it chose whole ones, else ``stacks``."""
        places = 0 if self.policies is None else self.policies.shape[1] + self.first
        if not self.blocks or places == self.n_layers or self.config.get("unit") == "sublayer":
            return self.stacks
        starts = [[b.start for b in self.blocks].index(stack.start) for stack in self.stacks]
        return tuple(map(range, starts, [*starts[1:], len(self.blocks)]))

    @property
    def n_start(self) -> int:
        """How many of the first episodes were given: the uniform path of each source, or none."""
        given = self.episodes[: len(self.sources)]
        uniform = all(set(str(e["actions"]).split()) == {str(i)} for i, e in enumerate(given))
        return len(given) if uniform else 0

    def phase(self, number: int) -> str:
        """What proposed an episode's path: ``uniform path``, ``agent``, ``local search`` or ``scales``."""
        row = self.episode(number)
        if number < self.n_start:
            return "uniform path"
        if str(row["actions"]):
            return "agent"
        return "scales" if own_sources(self.path(number)) else "local search"

    def policy(self, number: int) -> Tensor | None:
        """(places, actions): the policy that played an episode; the last one after the agent's part.

        None before an agent has acted, and where a search had no agent.
        """
        phase = self.phase(number)
        if self.policies is None or not len(self.policies) or phase == "uniform path":
            return None
        return self.policies[self.episode(number)["update"] if phase == "agent" else -1]

    # ------------------------------------------------------------------------------------ its paths

    @property
    def names(self) -> list[str]:
        """The paths that have a name: best, greedy (where it was legal), finalist 2, 3, ..."""
        greedy = ["greedy"] if any(f["found"] == "greedy" for f in self.finalists) else []
        return ["best", *greedy, *(f"finalist {i}" for i in range(2, len(self.finalists) + 1))]

    def path(self, name: str | int) -> Path:
        """A path by its name, or that of an episode by its number."""
        if isinstance(name, int):
            return steps_of(self.episode(name)["path"], self.sources)
        return steps_of(self.finalist(name)["path"], self.sources)

    def finalist(self, name: str) -> Row:
        """The row of a path that has a name: its ``path`` (text), ``found``, and ``reward``."""
        if name not in self.names:
            raise InputError(
                f"path: expected an episode's number or one of {', '.join(self.names)}, found {name!r}"
            )
        if name == "greedy":
            return next(f for f in self.finalists if f["found"] == "greedy")
        return self.finalists[0 if name == "best" else int(name.split()[1]) - 1]

    def episode(self, number: int) -> Row:
        """An episode's row; they count from 0."""
        if not 0 <= number < len(self.episodes):
            raise InputError(
                f"episode: expected 0 to {len(self.episodes) - 1}, found {number}; name another one"
            )
        return self.episodes[number]

    def steps(self, path: Path) -> tuple[list[tuple[str, int]], str]:
        """A path as (source, layer) and the stem's source, as ``path_picture`` takes them."""
        steps = [(name_of(a, self.sources), k) for a, k in path]
        return (steps[1:], steps[0][0]) if path and path[0][1] < 0 else (steps, self.stem)

    def scores(self, path: Path) -> dict[str, float]:
        """Each task's metric on the whole reward split, in [0, 1]; the test split is never read."""
        if self._scorer is None:
            self._scorer = self._load().scorer()
        scores = self._scorer.score(path, None)  # (N,)
        return dict(zip(self.task_names, scores.tolist(), strict=True))

    def _load(self) -> Problem:
        if self.problem is None:
            same = ("base", "images", "texts", "operators", "stem", "scope", "seed", "metric")
            more = {k: self.config[k] for k in (*same, "normalise_length", "multi_task")}
            more["unit"] = "sublayer" if self.blocks else "block"
            self.problem = load_problem(self.config["experts"], **more)
        pool = self.problem.pool
        if pool.sources != self.sources:
            raise InputError(
                f"run: expected the problem of the search, with the sources {', '.join(self.sources)}, "
                f"found {', '.join(pool.sources)}; load it with the run's config.json"
            )
        if pool.n_layers != self.n_layers:
            unit = "sublayer" if self.blocks else "block"
            raise InputError(
                f"run: expected the problem of the search, with {self.n_layers} layers, found "
                f"{pool.n_layers}; load it with unit={unit!r}"
            )
        return self.problem

    def difference(self, a: Path, b: Path) -> list[str]:
        """Where two paths differ, in words; see the function of this name."""
        return difference(a, b, self.sources, self.stacks)


def align(a: Path, b: Path) -> list[tuple[int | None, int | None]]:
    """The cheapest alignment of two paths: pairs of positions, None for a gap.

    Equal steps cost 0, another source for the same layer 1, a step that only one path has 1; steps of
    different layers are never paired.
    """
    cost = np.add.outer(np.arange(len(a) + 1), np.arange(len(b) + 1)).astype(float)  # all gaps
    for i, j in np.ndindex(len(a), len(b)):
        pair = np.inf if a[i][1] != b[j][1] else float(a[i] != b[j])
        cost[i + 1, j + 1] = min(cost[i, j] + pair, cost[i, j + 1] + 1, cost[i + 1, j] + 1)
    pairs: list[tuple[int | None, int | None]] = []
    i, j = len(a), len(b)
    while i or j:  # back along the cheapest way
        paired = bool(i and j) and a[i - 1][1] == b[j - 1][1]
        if paired and cost[i, j] == cost[i - 1, j - 1] + (a[i - 1] != b[j - 1]):
            i, j = i - 1, j - 1
            pairs.append((i, j))
        elif i and cost[i, j] == cost[i - 1, j] + 1:
            i -= 1
            pairs.append((i, None))
        else:
            j -= 1
            pairs.append((None, j))
    return pairs[::-1]


def difference(a: Path, b: Path, sources: Sequence[str], stacks: Sequence[range] = ()) -> list[str]:
    """Where two paths differ, place by place in running order; empty for equal paths."""
    out = []
    for i, j in align(a, b):
        if i is not None and j is not None:
            if a[i] != b[j]:
                place = place_name(a[i][1], stacks)
                first, second = name_of(a[i][0], sources), name_of(b[j][0], sources)
                out.append(f"{place}: {first} in the first, {second} in the second")
            continue
        which, path, other, position = ("first", a, b, i) if j is None else ("second", b, a, j)
        assert position is not None
        source, layer = name_of(path[position][0], sources), path[position][1]
        rest = "second" if which == "first" else "first"
        text = f"{place_name(layer, stacks)}: {source} in the {which}"
        if any(k == layer for _, k in other):
            out.append(f"{text} only, one more on the stack")
        else:
            out.append(f"{text}, {'not chosen' if layer < 0 else 'skipped'} in the {rest}")
    depth = [sum(k >= 0 for _, k in path) for path in (a, b)]
    if depth[0] != depth[1]:
        out.append(f"length: {depth[0]} layers in the first, {depth[1]} in the second")
    return out
