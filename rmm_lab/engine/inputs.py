"""Inputs of each task that merges may look at, without labels: drawn, recorded, found again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from rmm_lab.errors import InputError
from rmm_lab.families.shipped import SETS
from rmm_lab.tasks.files import absolute
from rmm_lab.tasks.groups import at_rest

BATCH = 32  # examples that go through a layer at a time
FOLDS = 2  # of the inputs that choose a ridge
JOINED = 2**20  # bytes of pictures that do in any case: small ones are no work


class _Named(NamedTuple):
    """What is left of a task whose inputs are known."""

    name: str
    source: str
    groups: str = ""


class Inputs:
    """Inputs of each task, as merges see them.

    Args:
        tasks: N tasks, in the order of the pool's experts.
        n: inputs of each task, at most, drawn at random: rows of a split are sorted by class.
        seed: of the draw.
        split: ``train``, or another one that scores nothing.
        rows: in place of a draw, the numbers of each task's rows, N arrays (n_i,).
        complete: takes a task's number and all its parts to what a merge looks at, for tasks that ask a model
            to write: prompts with what the expert writes, in place of an answer. By default they stay.
    """

    def __init__(
        self,
        tasks: Sequence[Any],
        n: int,
        *,
        seed: int = 0,
        split: str = "train",
        rows: Sequence[np.ndarray] | None = None,
        complete: Callable[[int, list[Any]], list[Any]] | None = None,
    ) -> None:
        if n < 1:
            raise InputError(
                "--calibration: expected 1 or more inputs per task for regmean and least_squares, found "
                f"{n}; give more, or choose other operators"
            )
        self.tasks, self.n, self.split, self.seed = list(tasks), n, split, seed
        self.complete = complete
        self._rows = None if rows is None else list(rows)
        self._cuts: list[list[np.ndarray]] | None = None
        self._batches: dict[tuple[int, int], Any] = {}
        self._block = BATCH
        self._turned: dict[tuple[int, int], tuple[np.ndarray, list[int]]] = {}

    @property
    def rows(self) -> list[np.ndarray]:
        """Of each task, the numbers of the rows to look at, in order: N arrays (n_i,)."""
        if self._rows is None:
            self._rows = []
            for i, task in enumerate(self.tasks):
                draw = np.random.default_rng((self.seed, i)).permutation(task.size(self.split))
                self._rows.append(np.sort(draw[: self.n]))
        for task, own in zip(self.tasks, self._rows, strict=True):
            if not len(own):
                raise InputError(
                    f"calibration: expected at least one input of task {task.name!r}, found none in its "
                    f"{self.split} split; add some, or choose other operators"
                )
        return self._rows

    def few(self, n: int) -> Self:
        """At most n of these inputs of each task, drawn from them at random, with nothing computed yet."""
        rows = [
            np.sort(np.random.default_rng((self.seed, i)).permutation(own)[:n])
            for i, own in enumerate(self.rows)
        ]
        other: dict[str, Any] = {"seed": self.seed, "split": self.split, "complete": self.complete}
        return type(self)(self.tasks, n, rows=rows, **other)

    def __getstate__(self) -> dict[str, Any]:
        """With its inputs in place of the tasks, since another process may not have this split."""
        batches = {(i, j): self._batch(i, j) for i in range(len(self.rows)) for j in self._parts(i)}
        tasks = [_Named(task.name, task.source, getattr(task, "groups", "")) for task in self.tasks]
        return vars(self) | {"tasks": tasks, "complete": None, "_batches": batches}

    def record(self) -> dict[str, Any]:
        """What names the inputs, as JSON: split, seed, and of each task its source, rows and SHA-256."""
        tasks = [
            {
                "task": task.name,
                "source": absolute(task.source, SETS.values()),
                "rows": rows.tolist(),
                "sha256": self._sha256(i),
            }
            | ({"groups": at_rest(groups)} if (groups := getattr(task, "groups", "")) else {})
            for i, (task, rows) in enumerate(zip(self.tasks, self.rows, strict=True))
        ]
        return {"split": self.split, "seed": self.seed, "tasks": tasks}

    @classmethod
    def of_record(cls, tasks: Sequence[Any], record: dict[str, Any], **options: Any) -> Self:
        """The inputs that a record names; InputError where the data have changed since."""
        rows = [np.array(task["rows"], dtype=np.int64) for task in record["tasks"]]
        for task, own in zip(tasks, rows, strict=True):
            if len(own) and own.max() >= task.size(record["split"]):
                raise InputError(
                    f"calibration: expected row {own.max()} in the {record['split']} split of task "
                    f"{task.name!r}, found {task.size(record['split'])} rows; the data have changed since"
                )
        n = max(map(len, rows))
        known = {"seed": record["seed"], "split": record["split"], "rows": rows}
        found = cls(tasks, n, **known, **options)
        for i, task in enumerate(record["tasks"]):
            if (have := found._sha256(i)) != task["sha256"]:
                raise InputError(
                    f"calibration: expected inputs of task {task['task']!r} with SHA-256 "
                    f"{task['sha256'][:12]}..., found {have[:12]}...; the data have changed since"
                )
        return found

    def _sha256(self, i: int) -> str:
        digest = hashlib.sha256()
        for j in self._parts(i):
            batch = self._batch(i, j)
            for tensor in [batch] if isinstance(batch, Tensor) else batch:
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _cuts_of(self) -> list[list[np.ndarray]]:
        """Of each task, the rows of each part: at most BATCH of them, or a multiple that JOINED holds."""
        if self._cuts is None:
            self._cuts = []
            for task, own in zip(self.tasks, self.rows, strict=True):
                n, one = BATCH, task.inputs(self.split, own[:1])
                if isinstance(one, Tensor):
                    n *= max(1, JOINED // max(1, BATCH * one.nbytes))
                self._cuts.append([own[at : at + n] for at in range(0, len(own), n)])
        return self._cuts

    def _parts(self, i: int) -> range:
        return range(len(self._cuts_of()[i]))

    def parts(self, i: int) -> Iterator[Any]:
        """Task i's inputs, as the models take them, ``BATCH`` at a time."""
        return (self._batch(i, j) for j in self._parts(i))

    def _batch(self, i: int, j: int) -> Any:
        """Part j of task i's inputs, as the models take them."""
        if (i, j) in self._batches:
            return self._batches[i, j]
        if self.complete is None:
            return self.tasks[i].inputs(self.split, self._cuts_of()[i][j])
        parts = [self.tasks[i].inputs(self.split, rows) for rows in self._cuts_of()[i]]
        for at, part in enumerate(self.complete(i, parts)):
            self._batches[i, at] = part
        return self._batches[i, j]

    def _turns(self, i: int, j: int) -> tuple[np.ndarray, list[int]]:
        """A part's examples fold by fold, and how many are in the first folds: (n,), FOLDS + 1 numbers.

        Whole examples take turns, and every other block of them begins with the other fold.
        """
        if (i, j) not in self._turned:
            first, n = (len(self._cuts_of()[i][m]) for m in (0, j))
            at = j * first + np.arange(n)
            fold = (at + at // self._block) % FOLDS
            ends = np.bincount(fold, minlength=FOLDS).cumsum()
            self._turned[i, j] = fold.argsort(kind="stable"), [0, *ends.tolist()]
        return self._turned[i, j]

    def _in_turn(self, i: int, j: int) -> Any:
        """A part with its examples fold by fold."""
        return take(self._batch(i, j), torch.from_numpy(self._turns(i, j)[0]))

    def _ranges(self, i: int, j: int, x: Tensor) -> list[slice]:
        """Of each fold, its rows of what goes into a layer's map, (..., D), where a part runs in turn."""
        _, ends = self._turns(i, j)
        rows = x.numel() // (x.shape[-1] * ends[-1])
        return [slice(a * rows, b * rows) for a, b in pairwise(ends)]


def take(batch: Any, rows: slice | Tensor) -> Any:
    """Some examples of a batch, of images or texts."""
    return batch[rows] if isinstance(batch, Tensor) else type(batch)(*(t[rows] for t in batch))
