"""How good a path is: each task's metric on a share of its data, and the reward (Eq. 7).

A path is a tuple of ``(source number, layer number)`` in the order in which the layers run.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rmm_lab.errors import InputError
from rmm_lab.pool import LayerPool

Path = tuple[tuple[int, int], ...]
BATCH = 256  # examples that go through a layer at once, by default


class Task(Protocol):
    """What scoring needs of a task; ``tasks.Task`` (pictures) and ``texts.TextTask`` are such."""

    name: str
    metric: Any  # its name, a str

    def split(self, name: str) -> Any:
        """A split: its length, and ``labels`` (n,) int64."""

    def batch(self, name: str, rows: np.ndarray | slice) -> Any:
        """Rows of a split as the models take them."""

    def score(self, found: Tensor, labels: Tensor) -> float:
        """The task's metric of the answers found, both (n,): in [0, 1]."""


def reward(scores: np.ndarray) -> float:
    """R = 1/N sum_i R_metric(F_M(X_i), Y_i), Eq. 7. scores: (N,) in [0, 1] -> reward in [0, 1]."""
    return float(np.mean(scores))


def deal(n: int, n_subsets: int, seed: int) -> list[np.ndarray]:
    """Deal n examples into subsets: a seeded partition whose parts differ by one at most.

    With fewer examples than subsets every subset has one example, and examples come round again.
    Returns ``n_subsets`` arrays of row numbers.
    """
    order = np.random.default_rng(seed).permutation(n)
    if n < n_subsets:
        return [order[[i % n]] for i in range(n_subsets)]
    return [np.sort(part) for part in np.array_split(order, n_subsets)]


def shortlist(scored: Iterable[tuple[str, float]], n: int) -> list[str]:
    """The n paths with the best mean reward over their evaluations, the best first.

    ``scored``: (path, reward), one for each evaluation on a subset. Means are drawn towards the mean of
    all, as if two more evaluations had given that: a path that was lucky on one subset must not
    displace one that was good on ten.
    """
    seen: dict[str, list[float]] = {}
    for path, value in scored:
        seen.setdefault(path, []).append(value)
    every = [value for values in seen.values() for value in values]
    prior = float(np.mean(every)) if every else 0.0
    return sorted(seen, key=lambda p: (-(sum(seen[p]) + 2 * prior) / (len(seen[p]) + 2), p))[:n]


def _batches(n: int, size: int = BATCH) -> Iterator[slice]:
    return (slice(i, min(i + size, n)) for i in range(0, n, size))


@torch.inference_mode()
def answers(
    architecture: Any, stem: Any, layers: Sequence[Any], head: Any, task: Task, split: str
) -> Tensor:
    """The answers (n,) that a model given in pieces finds in a split: numbers of classes or choices."""
    found = []
    for part in _batches(len(task.split(split))):
        state = architecture.embed(stem, task.batch(split, part))
        for layer in layers:
            state = architecture.apply(layer, state)
        found.append(architecture.logits(stem, state, head).argmax(-1))  # (n, answers) -> (n,)
    return torch.cat(found)


def answers_of_path(
    pool: LayerPool, tasks: Sequence[Task], steps: Sequence[tuple[str, int]], stem: str, split: str
) -> list[Tensor]:
    """For each task the answers (n,) of a path of (source, layer) on a whole split, nothing kept."""
    layers = [pool.layer(source, k) for source, k in steps]
    return [
        answers(pool.architecture, pool.stem(stem), layers, pool.heads[name], task, split)
        for name, task in zip(pool.names, tasks, strict=True)
    ]


def evaluate(
    pool: LayerPool, tasks: Sequence[Task], steps: Sequence[tuple[str, int]], stem: str, split: str
) -> np.ndarray:
    """Each task's metric (N,) of a path of (source, layer) on a whole split, nothing kept."""
    found = answers_of_path(pool, tasks, steps, stem, split)
    return np.array([t.score(f, t.split(split).labels) for t, f in zip(tasks, found, strict=True)])


class Scorer:
    """Scores paths through a pool of layers on a fixed partition of each task's examples.

    Args:
        pool: the layers.
        tasks: N tasks, in the order of the pool's experts: each is scored with its own head.
        split: the examples: ``reward`` to search, ``test`` to report.
        fraction: share of each task's examples per episode, in (0, 1]; there are
            ``round(1 / fraction)`` subsets, and together they use every example once.
        stem: where the weights outside the layers come from: ``base``, an expert, an operator, or
            ``agent``: a path may then start with ``(source number, -1)``, and without it takes the base's.
        seed: of the partition.
        cache_mb: budget for activations of path prefixes, in MiB; 0 keeps none. Rewards are the same
            to the bit whatever the budget.
        batch_size: examples that go through a layer at once.
    """

    def __init__(
        self,
        pool: LayerPool,
        tasks: Sequence[Task],
        *,
        split: str = "reward",
        fraction: float = 0.1,
        stem: str = "task_arithmetic",
        seed: int = 0,
        cache_mb: float = 128,
        batch_size: int = BATCH,
    ) -> None:
        if not 0 < fraction <= 1:
            raise InputError(f"data fraction: expected a number in (0, 1], found {fraction}")
        if len(tasks) != pool.n_models:
            raise InputError(
                f"tasks: expected one for each of {pool.n_models} experts, found {len(tasks)}"
            )
        self.pool, self.tasks, self.split = pool, list(tasks), split
        self.architecture = pool.architecture  # now, since it finds weights that do not fit
        self.stem = "base" if stem == "agent" else stem
        self.sources, self.n_models = pool.sources, pool.n_models
        self.task_names = [task.name for task in tasks]
        self.n_layers, self.chooses_stem = pool.n_layers, stem == "agent"
        self.stacks: Sequence[range] = pool.stacks
        self.batch_size = batch_size
        self.n_subsets = max(1, round(1 / fraction))
        self._rows = [deal(len(t.split(split)), self.n_subsets, seed) for t in tasks]
        self._budget = int(cache_mb * 2**20)
        self._cache: OrderedDict[tuple[int, int | None, Path], list[Any]] = OrderedDict()
        self._cached_bytes = 0
        self._seen: dict[tuple[Path, int | None], np.ndarray] = {}
        self.evaluations = 0  # paths scored, repeats included
        self.layers_run = 0  # layers applied to a task's subset

    def stem_of(self, path: Path) -> tuple[str, int]:
        """The source of a path's stem, and where in the path the layers start."""
        if path and path[0][1] < 0:
            return self.sources[path[0][0]], 1
        return self.stem, 0

    @torch.inference_mode()
    def score(self, path: Path, subset: int | None = None) -> np.ndarray:
        """Each task's metric of the path: (N,) in [0, 1]; ``subset`` None uses all examples."""
        self.evaluations += 1
        key = (path, subset)
        if key not in self._seen:
            scores = [self._score_task(i, path, subset) for i in range(self.n_models)]
            self._seen[key] = np.array(scores)
        return self._seen[key].copy()

    def _score_task(self, i: int, path: Path, subset: int | None) -> float:
        task, labels = self.tasks[i], self.tasks[i].split(self.split).labels
        if subset is not None:
            labels = labels[torch.from_numpy(self._rows[i][subset])]
        head = self.pool.heads[self.pool.names[i]]
        stem = self.pool.stem(self.stem_of(path)[0])
        logits = self.architecture.logits
        found = [logits(stem, state, head).argmax(-1) for state in self._run(i, path, subset)]
        return task.score(torch.cat(found), labels)

    def _run(self, i: int, path: Path, subset: int | None) -> list[Any]:
        """Activations after the path, batch by batch, from the longest prefix that has them kept."""
        stem_source, first = self.stem_of(path)
        length, states = len(path), None
        while length >= first and (states := self._recall((i, subset, path[:length]))) is None:
            length -= 1
        architecture = self.architecture
        if states is None:
            task, stem = self.tasks[i], self.pool.stem(stem_source)
            rows = np.arange(len(task.split(self.split)))
            rows = rows if subset is None else self._rows[i][subset]
            states = [
                architecture.embed(stem, task.batch(self.split, rows[part]))
                for part in _batches(len(rows), self.batch_size)
            ]
            length = first
            self._keep((i, subset, path[:first]), states)
        for end in range(length + 1, len(path) + 1):
            source, k = path[end - 1]
            layer = self.pool.layer(self.sources[source], k)
            states = [architecture.apply(layer, state) for state in states]
            self.layers_run += 1
            if end < len(path):  # a whole path has its scores kept instead
                self._keep((i, subset, path[:end]), states)
        return states

    # Least recently used first; what does not fit the budget is forgotten.

    def _recall(self, key: tuple[int, int | None, Path]) -> list[Any] | None:
        if key in self._cache:
            self._cache.move_to_end(key)
        return self._cache.get(key)

    def _keep(self, key: tuple[int, int | None, Path], states: list[Any]) -> None:
        self._cache[key] = states
        self._cached_bytes += _bytes(states)
        while self._cached_bytes > self._budget and self._cache:
            self._cached_bytes -= _bytes(self._cache.popitem(last=False)[1])


def _bytes(states: Sequence[Any]) -> int:
    return sum(state.nbytes for state in states)
