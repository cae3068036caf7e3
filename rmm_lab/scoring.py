"""How good a path is: each task's metric on a share of its data, and the reward (Eq. 7).

A path is a tuple of ``(source number, layer number)`` in the order in which the layers run.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from rmm_lab.errors import InputError
from rmm_lab.models import ViT, Weights
from rmm_lab.pool import LayerPool
from rmm_lab.tasks import Task

Path = tuple[tuple[int, int], ...]


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


@torch.inference_mode()
def accuracy(
    vit: ViT,
    stem: nn.Module,
    layers: Sequence[nn.Module],
    head: Weights,
    task: Task,
    split: str,
    batch_size: int = 256,
) -> float:
    """Share of a split that a model given in pieces classifies correctly, in [0, 1]."""
    data, right = task.split(split), 0
    for i in range(0, len(data), batch_size):
        tokens = vit.embed(stem, task.format.normalise(data.images[i : i + batch_size]))
        for layer in layers:
            tokens = vit.apply(layer, tokens)
        found = vit.logits(stem, tokens, head).argmax(-1)  # (n, classes) -> (n,)
        right += int((found == data.labels[i : i + batch_size]).sum())
    return right / len(data)


def evaluate(
    pool: LayerPool, tasks: Sequence[Task], steps: Sequence[tuple[str, int]], stem: str, split: str
) -> np.ndarray:
    """Each task's accuracy (N,) of a path of (source, layer) on a whole split, nothing kept."""
    layers = [pool.layer(source, k) for source, k in steps]
    heads = [pool.heads[name] for name in pool.names]
    return np.array(
        [
            accuracy(pool.vit, pool.stem(stem), layers, head, task, split)
            for head, task in zip(heads, tasks, strict=True)
        ]
    )


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
        batch_size: int = 256,
    ) -> None:
        if not 0 < fraction <= 1:
            raise InputError(f"data fraction: expected a number in (0, 1], found {fraction}")
        if len(tasks) != pool.n_models:
            raise InputError(
                f"tasks: expected one for each of {pool.n_models} experts, found {len(tasks)}"
            )
        self.pool, self.tasks, self.split = pool, list(tasks), split
        self.stem = "base" if stem == "agent" else stem
        self.sources, self.n_models = pool.sources, pool.n_models
        self.task_names = [task.name for task in tasks]
        self.n_layers, self.chooses_stem = pool.n_layers, stem == "agent"
        self.stacks: Sequence[range] = pool.vit.stacks
        self.n_subsets = max(1, round(1 / fraction))
        self.batch_size = batch_size
        self._rows = [deal(len(t.split(split)), self.n_subsets, seed) for t in tasks]
        self._budget = int(cache_mb * 2**20)
        self._cache: OrderedDict[tuple[int, int | None, Path], Tensor] = OrderedDict()
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
        """Each task's accuracy of the path: (N,) in [0, 1]; ``subset`` None uses all examples."""
        self.evaluations += 1
        key = (path, subset)
        if key not in self._seen:
            scores = [self._score_task(i, path, subset) for i in range(self.n_models)]
            self._seen[key] = np.array(scores)
        return self._seen[key].copy()

    def _score_task(self, i: int, path: Path, subset: int | None) -> float:
        data = self.tasks[i].split(self.split)
        rows = slice(None) if subset is None else torch.from_numpy(self._rows[i][subset])
        tokens = self._run(i, path, subset)  # (n, tokens, width)
        head = self.pool.heads[self.pool.names[i]]
        stem = self.pool.stem(self.stem_of(path)[0])
        right = sum(
            int((self.pool.vit.logits(stem, part, head).argmax(-1) == labels).sum())
            for part, labels in zip(
                tokens.split(self.batch_size), data.labels[rows].split(self.batch_size), strict=True
            )
        )
        return right / len(tokens)

    def _run(self, i: int, path: Path, subset: int | None) -> Tensor:
        """Tokens after the path, starting from the longest prefix whose tokens are kept."""
        stem_source, first = self.stem_of(path)
        length, tokens = len(path), None
        while length >= first and (tokens := self._recall((i, subset, path[:length]))) is None:
            length -= 1
        vit = self.pool.vit
        if tokens is None:
            task, stem = self.tasks[i], self.pool.stem(stem_source)
            images = task.split(self.split).images
            rows = np.arange(len(images)) if subset is None else self._rows[i][subset]
            tokens = torch.cat(
                [
                    vit.embed(stem, task.format.normalise(images[rows[j : j + self.batch_size]]))
                    for j in range(0, len(rows), self.batch_size)
                ]
            )  # (n, tokens, width)
            length = first
            self._keep((i, subset, path[:first]), tokens)
        for end in range(length + 1, len(path) + 1):
            source, k = path[end - 1]
            layer = self.pool.layer(self.sources[source], k)
            tokens = torch.cat([vit.apply(layer, part) for part in tokens.split(self.batch_size)])
            self.layers_run += 1
            if end < len(path):  # a whole path has its scores kept instead
                self._keep((i, subset, path[:end]), tokens)
        return tokens

    # Least recently used first; what does not fit the budget is forgotten.

    def _recall(self, key: tuple[int, int | None, Path]) -> Tensor | None:
        if key in self._cache:
            self._cache.move_to_end(key)
        return self._cache.get(key)

    def _keep(self, key: tuple[int, int | None, Path], tokens: Tensor) -> None:
        self._cache[key] = tokens
        self._cached_bytes += tokens.nbytes
        while self._cached_bytes > self._budget and self._cache:
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
