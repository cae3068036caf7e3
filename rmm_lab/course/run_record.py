"""The record of a finished search, as the widgets read it: its episodes, policies and named paths."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path as Folder

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rmm_lab.engine.scorer import Scorer
from rmm_lab.errors import InputError
from rmm_lab.figures.paths import place_name, with_stem
from rmm_lab.reward import Path, Step, parse_path
from rmm_lab.search.config import read_config
from rmm_lab.search.pipeline import Result
from rmm_lab.search.problem import Problem, problem_of
from rmm_lab.search.run_folder import Row, RunFolder


@dataclass
class Run:
    """A finished search.

    ``problem``: what was merged. ``episodes``, ``updates``, ``finalists``: rows as in the run folder.
    ``policies``: (updates, places, actions), the mean policy of each rollout, NaN at places that no step
    visited.
    """

    problem: Problem
    episodes: list[Row]
    updates: list[Row]
    finalists: list[Row]
    policies: Tensor

    @classmethod
    def of(cls, result: Result, problem: Problem) -> Run:
        """The record of ``train``'s result on a problem."""
        return cls(problem, result.episodes, result.updates, result.finalists, result.policies)

    @classmethod
    def read(cls, folder: str | Folder, problem: Problem | None = None) -> Run:
        """Read a run folder. ``problem``: what was merged; None loads it as config.json says.

        Raises InputError if the search has not ended, a file cannot be read, or the problem is another one.
        """
        files = RunFolder(Folder(folder))
        config = read_config(files.read_config(), folder)
        episodes, updates = files.read_rows("episodes.csv"), files.read_rows("updates.csv")
        try:
            finalists = json.loads((Folder(folder) / "finalists.json").read_text("utf-8"))
            policies = load_file(Folder(folder) / "policies.safetensors")["policies"]
        except (OSError, LookupError, SafetensorError, ValueError) as error:
            raise InputError(
                f"run folder {folder}: expected finalists.json and policies.safetensors of a finished "
                f"search, found none that can be read ({error!r}); finish it with --resume, or name "
                "another folder"
            ) from error
        if problem is not None and problem.spec != config.problem:
            raise InputError(
                f"run folder {folder}: expected the problem of its config.json, {config.problem}, found "
                f"{problem.spec}; leave the problem out, or load that one"
            )
        return cls(problem or problem_of(config.problem), episodes, updates, finalists, policies)

    # ------------------------------------------------------------------------------------ the problem

    @property
    def action_names(self) -> tuple[str, ...]:
        """Models, operators, skip, back."""
        return (*self.problem.pool.sources, "skip", "back")

    @property
    def first(self) -> int:
        """The agent's first place: -1 where it chooses the stem, else 0."""
        return -1 if self.problem.spec.stem == "agent" else 0

    @property
    def agent_stacks(self) -> tuple[range, ...]:
        """The stacks that the agent walks through: of whole blocks with ``unit="both"``, else the pool's."""
        pool = self.problem.pool
        if self.problem.spec.unit != "both" or not pool.blocks:
            return pool.stacks
        starts = [
            [block.start for block in pool.blocks].index(stack.start) for stack in pool.stacks
        ]
        return tuple(map(range, starts, [*starts[1:], len(pool.blocks)]))

    # ------------------------------------------------------------------------------------ episodes

    def episode(self, number: int) -> Row:
        """An episode's row; they count from 0."""
        if not 0 <= number < len(self.episodes):
            raise InputError(
                f"episode: expected 0 to {len(self.episodes) - 1}, found {number}; name another one"
            )
        return self.episodes[number]

    def policy(self, number: int) -> Tensor | None:
        """(places, actions): the policy that played an episode; after the agent's part, its last one.

        None before the agent has acted, and where a search had no agent, or one that chose scales.
        """
        row = self.episode(number)
        n_actions = len(self.problem.pool.sources) + 2
        if self.policies.shape[-1] != n_actions or row["phase"] == "uniform":
            return None
        return self.policies[row["update"] if row["phase"] == "agent" else -1]

    # ------------------------------------------------------------------------------------ paths

    @property
    def named(self) -> dict[str, Row]:
        """The rows of the paths that have a name: best, greedy (if it was legal), finalist 2, 3, ...

        A row has its ``path`` (text), how it was ``found``, and its ``reward``.
        """
        rows = {"best": self.finalists[0]}
        rows |= {f["found"]: f for f in self.finalists if f["found"] == "greedy"}
        return rows | {f"finalist {i}": f for i, f in enumerate(self.finalists[1:], 2)}

    def path(self, name: str | int) -> Path:
        """A path by its name, or that of an episode by its number."""
        rows = self.named
        if isinstance(name, str) and name not in rows:
            raise InputError(
                f"path: expected an episode's number or one of {', '.join(rows)}, found {name!r}"
            )
        return parse_path((rows[name] if isinstance(name, str) else self.episode(name))["path"])

    def with_stem(self, path: Path) -> Path:
        """The path with its stem as the first step, also where the agent does not choose it."""
        return with_stem(path, "base" if self.first < 0 else self.problem.spec.stem)

    @cached_property
    def _scorer(self) -> Scorer:
        return self.problem.scorer()

    def scores(self, path: Path) -> dict[str, float]:
        """Each task's metric on the whole reward split, in [0, 1]; the test split is never read."""
        scores = self._scorer.score(path, None)  # (N,)
        names = [task.name for task in self.problem.tasks]
        return dict(zip(names, scores.tolist(), strict=True))


def align(a: Path, b: Path) -> list[tuple[int | None, int | None]]:
    """The cheapest alignment of two paths: pairs of positions, None for a gap.

    Equal steps cost 0, another source for the same layer 1, a step that only one path has 1; steps of
    different layers are never paired.
    """
    best: dict[tuple[int, int], tuple[float, list[tuple[int | None, int | None]]]] = {
        (0, 0): (0, [])
    }
    for i, j in np.ndindex(len(a) + 1, len(b) + 1):
        ways = []  # (cost, pairs) of what may come last: a pair, or one step alone
        if i and j and a[i - 1].layer == b[j - 1].layer:
            cost, pairs = best[i - 1, j - 1]
            ways.append((cost + (a[i - 1] != b[j - 1]), [*pairs, (i - 1, j - 1)]))
        if i:
            ways.append((best[i - 1, j][0] + 1, [*best[i - 1, j][1], (i - 1, None)]))
        if j:
            ways.append((best[i, j - 1][0] + 1, [*best[i, j - 1][1], (None, j - 1)]))
        if ways:
            best[i, j] = min(ways, key=lambda way: way[0])
    return best[len(a), len(b)][1]


def difference(a: Path, b: Path, stacks: Sequence[range] = ()) -> list[str]:
    """Where two paths differ, place by place in running order; empty for equal paths."""
    out = []
    for i, j in align(a, b):
        one, two = None if i is None else a[i], None if j is None else b[j]
        if one and two and one != two:
            place = place_name(one.layer, stacks)
            out.append(
                f"{place}: {source_text(one)} in the first, {source_text(two)} in the second"
            )
        elif (one is None or two is None) and (step := one or two):
            which, rest, other = ("first", "second", b) if one else ("second", "first", a)
            how = f", {'not chosen' if step.layer < 0 else 'skipped'} in the {rest}"
            if any(s.layer == step.layer for s in other):
                how = " only, one more on the stack"
            out.append(f"{place_name(step.layer, stacks)}: {source_text(step)} in the {which}{how}")
    depth = [sum(step.layer >= 0 for step in path) for path in (a, b)]
    if depth[0] != depth[1]:
        out.append(f"length: {depth[0]} layers in the first, {depth[1]} in the second")
    return out


def source_text(step: Step) -> str:
    """A step without its layer: ``ties``, ``task_arithmetic:scale=0.3/0.5``."""
    return str(step).rpartition("@")[0]
