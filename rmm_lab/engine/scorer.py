"""How good a path is: each task's metric on a share of its data, and the reward (Eq. 7).

A path is a tuple of ``(source number, layer number)`` in the order in which the layers run.
"""

from __future__ import annotations

import copy
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from rmm_lab.engine.cache import Cache, free_bytes
from rmm_lab.errors import InputError
from rmm_lab.layers import LayerPool
from rmm_lab.tasks.metrics import REWARDS, likelihood, mean_of

# (source, layer) in the order in which they run: the number of a scorer's source, or any operator's
# specification as text.
Path = tuple[tuple[int | str, int], ...]
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def text_of(path: Path, sources: Sequence[str]) -> str:
    """A path as text, ``digits@0 ties@1``: source and layer in the order in which they run."""
    return " ".join(f"{name_of(a, sources)}@{k}" for a, k in path)


def steps_of(text: str, sources: Sequence[str]) -> Path:
    """The inverse of ``text_of``; what is none of the sources stays text."""
    numbers = {name: a for a, name in enumerate(sources)}
    return tuple(
        (numbers.get(source, source), int(k))
        for source, _, k in (s.rpartition("@") for s in text.split())
    )


def name_of(source: int | str, sources: Sequence[str]) -> str:
    """A step's source by its name."""
    return source if isinstance(source, str) else sources[source]


def own_sources(path: Path) -> set[str]:
    """Operators of a path that are none of the scorer's sources."""
    return {source for source, _ in path if isinstance(source, str)}


def places_of(scorer: Any) -> range:
    """Where a path of a scorer takes a source: the stem, if it is chosen, as -1, then the layers."""
    return range(-1 if scorer.chooses_stem else 0, scorer.n_layers)


def _order(key: tuple[Path, int | None]) -> tuple[Any, ...]:
    """What sorts pairs of a path, of numbers or text, and a subset: by subset first."""
    path, subset = key
    return -1 if subset is None else subset, [(isinstance(a, str), a, k) for a, k in path]


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


# ------------------------------------------------------------------- how many examples at once

# Numbers in the largest tensor of a layer: 4 MiB in float32, a share of a CPU's cache.
_WIDEST = 2**20
# Examples: below the first, calls cost more than they compute; above the second, nothing is won.
_FEWEST, MOST = 32, 256


def batch_size(architecture: Any, stem: nn.Module, task: Task, split: str) -> int:
    """Examples of a task that go through a layer at once, so that a layer's tensors stay in the cache.

    Found from a sample of the split. On a GPU always ``MOST``.
    """
    n = len(task.split(split))
    sample = np.unique(np.linspace(0, n - 1, min(n, _FEWEST)).astype(int))
    weight = next(stem.parameters())
    if weight.device.type != "cpu":
        return MOST
    with torch.inference_mode():
        batch = architecture.place(task.batch(split, sample), weight.device, weight.dtype)
        widest = architecture.widest(architecture.embed(stem, batch))
    return min(MOST, max(_FEWEST, _WIDEST // widest))


def parts_of(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Cut rows into parts of at most ``size``, as equal as can be."""
    return np.array_split(rows, max(1, math.ceil(len(rows) / size)))


@torch.inference_mode()
def answers(
    architecture: Any,
    stem: Any,
    layers: Sequence[Any],
    head: Any,
    task: Task,
    split: str,
    device: str = "cpu",
) -> Tensor:
    """The answers (n,) that a model given in pieces finds in a split: numbers of classes or choices.

    ``device``: where it runs; a model elsewhere than on the CPU is a copy.
    """
    if device != "cpu":
        stem, *layers = (copy.deepcopy(m).to(device) for m in (stem, *layers))
        head = {name: tensor.to(device) for name, tensor in head.items()}
    found = []
    size = batch_size(architecture, stem, task, split)
    for rows in parts_of(np.arange(len(task.split(split))), size):
        batch = architecture.place(task.batch(split, rows), device, torch.float32)
        state = architecture.embed(stem, batch)
        for layer in layers[:-1]:
            state = architecture.apply(layer, state)
        for layer in layers[-1:]:
            state = architecture.apply_last(layer, state)
        logits = architecture.logits(stem, state, head)  # (n, answers)
        found.append(logits.argmax(-1).cpu())  # (n,)
    return torch.cat(found)


def answers_of_path(
    pool: LayerPool,
    tasks: Sequence[Task],
    steps: Sequence[tuple[str, int]],
    stem: str,
    split: str,
    device: str = "cpu",
) -> list[Tensor]:
    """For each task the answers (n,) of a path of (source, layer) on a whole split, nothing kept."""
    layers = [pool.layer(source, k) for source, k in steps]
    return [
        answers(pool.architecture, pool.stem(stem), layers, pool.heads[name], task, split, device)
        for name, task in zip(pool.names, tasks, strict=True)
    ]


def evaluate(
    pool: LayerPool,
    tasks: Sequence[Task],
    steps: Sequence[tuple[str, int]],
    stem: str,
    split: str,
    device: str = "cpu",
) -> np.ndarray:
    """Each task's metric (N,) of a path of (source, layer) on a whole split, nothing kept."""
    found = answers_of_path(pool, tasks, steps, stem, split, device)
    return np.array([t.score(f, t.split(split).labels) for t, f in zip(tasks, found, strict=True)])


# ---------------------------------------------------------------------------------- the scorer


class Job(NamedTuple):
    """What a worker does at a time: some paths on one part of one task's subset."""

    subset: int | None
    part: int  # number of the part, over all tasks
    paths: tuple[Path, ...]


# Runs jobs in any order and place; yields what ``Scorer.work`` returns, in the order of the jobs.
Engine = Callable[[Sequence[Job]], Iterable[tuple[list[Tensor], int]]]


class Scorer:
    """Scores paths through a pool of layers on a fixed partition of each task's examples.

    A step that a path shares with one seen before on the same examples is not computed again: activations
    are kept by (subset, part of a task's examples, path prefix). The parts are the same whatever is
    kept and whoever works, so rewards are the same to the bit for any budget and number of workers.

    Args:
        pool: the layers.
        tasks: N tasks, in the order of the pool's experts: each is scored with its own head.
        split: the examples: ``reward`` to search, ``test`` to report.
        fraction: share of each task's examples per episode, in (0, 1]; there are
            ``round(1 / fraction)`` subsets, and together they use every example once.
        stem: where the weights outside the layers come from: ``base``, an expert, an operator, or
            ``agent``: a path may then start with ``(source number, -1)``, and without it takes the base's.
        seed: of the partition.
        cache_mb: budget for what is kept, in MiB; 0 keeps no activations, None takes a quarter of the
            memory that is free now.
        batch_size: examples that go through a layer at once; None: as many as suit the cache of the CPU.
        workers: threads that score at the same time.
        device: ``cpu``, ``cuda`` or another of torch's.
        precision: ``float32`` or ``bfloat16`` for the models' weights and activations; the latter
            changes rewards a little.
        reward: what a subset's scores are: ``metric``, each task's own, or ``likelihood`` of the right
            answers. All examples together, subset None, always have the metric.
        engine: what runs the work in place of threads; ``cluster.RayEngine`` is one.
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
        cache_mb: float | None = None,
        batch_size: int | None = None,
        workers: int = 1,
        device: str = "cpu",
        precision: str = "float32",
        reward: str = "metric",
        engine: Engine | None = None,
    ) -> None:
        if not 0 < fraction <= 1:
            raise InputError(
                f"data fraction: expected a number in (0, 1], found {fraction}; correct it"
            )
        if len(tasks) != pool.n_models:
            raise InputError(
                f"tasks: expected one for each of {pool.n_models} experts, found {len(tasks)}; give as many"
            )
        if precision not in PRECISIONS:
            raise InputError(
                f"precision: expected float32 or bfloat16, found {precision!r}; correct it"
            )
        if reward not in REWARDS:
            raise InputError(
                f"reward: expected {' or '.join(REWARDS)}, found {reward!r}; correct it"
            )
        if workers < 1 or (batch_size is not None and batch_size < 1):
            raise InputError(
                f"scorer: expected at least 1 worker and batches of at least 1 example, found {workers} "
                f"and {batch_size}"
            )
        self.pool, self.tasks, self.split = pool, list(tasks), split
        self.architecture = pool.architecture  # now, since it finds weights that do not fit
        self.stem = "base" if stem == "agent" else stem
        self.sources, self.n_models = pool.sources, pool.n_models
        self.task_names = [task.name for task in tasks]
        self.n_layers, self.chooses_stem = pool.n_layers, stem == "agent"
        self.stacks: Sequence[range] = pool.stacks
        self.blocks: Sequence[range] = pool.blocks
        self.n_subsets = max(1, round(1 / fraction))
        self.device, self.dtype = torch.device(check_device(device)), PRECISIONS[precision]
        self._batch_size, self._soft = batch_size, reward == "likelihood"
        self._rows = [deal(len(t.split(split)), self.n_subsets, seed) for t in tasks]
        self._parts: dict[int | None, list[tuple[int, np.ndarray]]] = {}
        budget = free_bytes(device) // 4 if cache_mb is None else int(cache_mb * 2**20)
        self.cache = Cache(budget)
        self._moved: dict[tuple[str, int], nn.Module] = {}
        self._heads = [
            {k: v.to(self.device, self.dtype) for k, v in pool.heads[name].items()}
            for name in pool.names
        ]
        self._lock = threading.Lock()
        self._seen: dict[tuple[Path, int | None], np.ndarray] = {}
        self._workers = workers
        self.alone = engine is None and workers == 1  # then nothing is won by looking ahead
        self._engine = engine
        self._threads: ThreadPoolExecutor | None = None
        self.evaluations = 0  # paths scored, repeats included
        self.work_asked = 0  # layers of these paths x examples
        self.work_run = 0  # layers applied x examples they were applied to

    def stem_of(self, path: Path) -> tuple[str, int]:
        """The source of a path's stem, and where in the path the layers start."""
        if path and path[0][1] < 0:
            return name_of(path[0][0], self.sources), 1
        return self.stem, 0

    # ------------------------------------------------------------------------------- scores

    def score(self, path: Path, subset: int | None = None) -> np.ndarray:
        """Each task's score of the path: (N,) in [0, 1]; ``subset`` None uses all examples.

        The score is the task's metric, or on a subset what ``reward`` names.
        Layers of operators that are none of the sources are merged, used, and forgotten.
        """
        self.evaluations += 1
        examples = sum(len(self.rows(i, subset)) for i in range(self.n_models))
        self.work_asked += examples * (len(path) - self.stem_of(path)[1])
        self.prefetch([(path, subset)])
        return self._seen[path, subset].copy()

    def prefetch(self, wanted: Iterable[tuple[Path, int | None]]) -> None:
        """Score (path, subset) pairs together, so that ``score`` has them at hand: work for all workers.

        Layers of operators that are none of the sources are there for as many paths as there are threads.
        """
        unseen = {key for key in wanted if key not in self._seen}
        own = sorted((key for key in unseen if own_sources(key[0])), key=_order)
        self._score(sorted(unseen - set(own), key=_order))
        n = self._workers if self._engine is None else max(1, len(own))
        for start in range(0, len(own), n):
            self._score(own[start : start + n])
            self.forget(path for path, _ in own[start : start + n])

    def _score(self, unseen: Sequence[tuple[Path, int | None]]) -> None:
        jobs = []
        for subset, keys in itertools.groupby(unseen, lambda key: key[1]):
            paths = [path for path, _ in keys]
            # Paths that begin alike stay together, in the order that shares the most; others share
            # nothing, and can go to another worker.
            starts = [tuple(group) for _, group in itertools.groupby(paths, lambda path: path[:1])]
            jobs += [
                Job(subset, j, group)
                for j in range(len(self.parts(subset)))
                for group in ([tuple(paths)] if self.alone else starts)
            ]
        found: dict[tuple[Path, int | None], list[list[Tensor]]] = {}
        for job, (answered, layers) in zip(jobs, self._run(jobs), strict=True):
            i, rows = self.parts(job.subset)[job.part]
            self.work_run += layers * len(rows)
            for path, answer in zip(job.paths, answered, strict=True):
                found.setdefault((path, job.subset), [[] for _ in self.tasks])[i].append(answer)
        for (path, subset), by_task in found.items():
            scores = []
            for i, (task, parts) in enumerate(zip(self.tasks, by_task, strict=True)):
                labels, found_here = self._labels(i, self.rows(i, subset)), torch.cat(parts)
                if self._is_soft(subset):
                    scores.append(mean_of(task.metric, found_here, labels))
                else:
                    scores.append(task.score(found_here, labels))
            self._seen[path, subset] = np.array(scores)

    def _is_soft(self, subset: int | None) -> bool:
        return self._soft and subset is not None

    def _labels(self, i: int, rows: np.ndarray) -> Tensor:
        return self.tasks[i].split(self.split).labels[torch.from_numpy(rows)]

    def forget(self, paths: Iterable[Path]) -> None:
        """Free the layers of operators that are none of the sources."""
        if gone := set().union(*map(own_sources, paths)):
            self.pool.forget(gone)
            for key in [key for key in self._moved if key[0] in gone]:
                del self._moved[key]

    def rows(self, i: int, subset: int | None) -> np.ndarray:
        """Row numbers of task i in a subset; all for None."""
        if subset is None:
            return np.arange(len(self.tasks[i].split(self.split)))
        return self._rows[i][subset]

    def parts(self, subset: int | None) -> list[tuple[int, np.ndarray]]:
        """A subset cut into batches: (task number, row numbers); task by task, rows in order."""
        if subset not in self._parts:
            if None not in self._parts:  # sizes are found once, for all subsets
                stem = self._module(self.stem, -1)
                self._sizes = [
                    self._batch_size or batch_size(self.architecture, stem, task, self.split)
                    for task in self.tasks
                ]
            for key in {None, subset}:
                self._parts[key] = [
                    (i, part)
                    for i, size in enumerate(self._sizes)
                    for part in parts_of(self.rows(i, key), size)
                ]
        return self._parts[subset]

    # ------------------------------------------------------------------- what workers do

    def _run(self, jobs: Sequence[Job]) -> Iterable[tuple[list[Tensor], int]]:
        """What ``work`` returns for each job, by whoever does it."""
        if self._engine is not None:
            return self._engine(jobs)
        if self.alone:
            return map(self.work, jobs)
        if self._threads is None:
            threads = torch.get_num_threads()
            self._threads = ThreadPoolExecutor(
                self._workers, "scorer", torch.set_num_threads, (threads,)
            )
        return self._threads.map(self.work, jobs)

    def close(self) -> None:
        """Forget activations, end the threads or the engine's workers.

        The scores stay, and without an engine the scorer can be used again.
        """
        self.cache.clear()
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None
        if (close := getattr(self._engine, "close", None)) is not None:
            close()

    @torch.inference_mode()
    def work(self, job: Job) -> tuple[list[Tensor], int]:
        """Each path's answers (n,) on the job's part, and how many layers were computed for them.

        Answers are their numbers; where the reward is the likelihood, how right they are in [0, 1].
        """
        found, layers = [], 0
        for path in job.paths:
            logits, n = self._logits(job.subset, job.part, path)  # (n, answers)
            if self._is_soft(job.subset):
                labels = self._labels(*self.parts(job.subset)[job.part])
                found.append(likelihood(logits, labels))
            else:
                found.append(logits.argmax(-1).cpu())  # (n, answers) -> (n,)
            layers += n
        return found, layers

    def _logits(self, subset: int | None, j: int, path: Path) -> tuple[Tensor, int]:
        """From the longest prefix whose activations are kept, and the number of layers from there."""
        source, first = self.stem_of(path)
        stem, architecture = self._module(source, -1), self.architecture
        # The last layer is never a prefix: it may compute only what the head needs.
        known, state = max(first, len(path) - 1), None
        while known >= first and (state := self.cache.get((subset, j, path[:known]))) is None:
            known -= 1
        if state is None:
            known = first
            state = architecture.embed(stem, self._batch(subset, j))
            self._keep((subset, j, path[:first]), state)
        for end in range(known + 1, len(path) + 1):
            layer = self._module(name_of(path[end - 1][0], self.sources), path[end - 1][1])
            if end == len(path):
                state = architecture.apply_last(layer, state)
            else:
                state = architecture.apply(layer, state)
                self._keep((subset, j, path[:end]), state)
        head = self._heads[self.parts(subset)[j][0]]
        return architecture.logits(stem, state, head), len(path) - known

    def _keep(self, key: tuple[int | None, int, Path], state: Any) -> None:
        if not own_sources(key[2][-1:]):  # no other path will begin like that
            self.cache.put(key, state, self.architecture.tensors(state))

    def _batch(self, subset: int | None, j: int) -> Any:
        """The examples of a part as the models take them, made once while the budget allows."""
        key = (subset, j, "batch")
        if (batch := self.cache.get(key)) is None:
            i, rows = self.parts(subset)[j]
            batch = self.tasks[i].batch(self.split, rows)
            batch = self.architecture.place(batch, self.device, self.dtype)
            self.cache.put(key, batch, [batch] if isinstance(batch, Tensor) else batch)
        return batch

    def _module(self, source: str, k: int) -> nn.Module:
        """Layer k of a source, -1 for the stem, on the device and in the precision of the scorer."""
        with self._lock:  # a layer is merged once, whoever asks first
            module = self.pool.stem(source) if k < 0 else self.pool.layer(source, k)
            if self.device.type == "cpu" and self.dtype == torch.float32:
                return module
            if (source, k) not in self._moved:
                moved = copy.deepcopy(module).to(self.device, self.dtype)
                self._moved[source, k] = moved
            return self._moved[source, k]


class Blocks:
    """A scorer of sublayers seen as one of blocks: a source taken at a block is taken in all of it.

    What ``MergingEnv`` needs of a scorer; ``expand`` gives the path of sublayers.
    """

    def __init__(self, scorer: Any) -> None:
        self.scorer = scorer
        self.sources, self.n_models = scorer.sources, scorer.n_models
        self.n_subsets, self.task_names = scorer.n_subsets, scorer.task_names
        self.chooses_stem, self.alone = scorer.chooses_stem, getattr(scorer, "alone", True)
        self.blocks = scorer.blocks
        self.n_layers = len(self.blocks)
        first = [stack.start for stack in scorer.stacks]
        starts = [i for i, block in enumerate(self.blocks) if block.start in first]
        ends = [*starts[1:], self.n_layers]
        self.stacks = tuple(range(a, b) for a, b in zip(starts, ends, strict=True))

    def expand(self, path: Path) -> Path:
        """A path of (source, block) -> that of (source, sublayer); the stem stays."""
        return tuple((a, j) for a, k in path for j in ([k] if k < 0 else self.blocks[k]))

    def score(self, path: Path, subset: int | None = None) -> np.ndarray:
        """Each task's metric (N,) in [0, 1] of a path of blocks."""
        return self.scorer.score(self.expand(path), subset)

    def prefetch(self, wanted: Iterable[tuple[Path, int | None]]) -> None:
        """As the scorer's."""
        self.scorer.prefetch([(self.expand(path), subset) for path, subset in wanted])

    def close(self) -> None:
        """As the scorer's."""
        self.scorer.close()


class Plan:
    """A scorer that scores nothing, and notes what it was asked for: so a rollout can be looked ahead.

    Args:
        scorer: whose sources, layers and subsets it has.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.sources, self.n_models = scorer.sources, scorer.n_models
        self.n_layers = scorer.n_layers
        self.stacks, self.n_subsets = scorer.stacks, scorer.n_subsets
        self.task_names, self.chooses_stem = scorer.task_names, scorer.chooses_stem
        self.asked: list[tuple[Path, int | None]] = []

    def score(self, path: Path, subset: int | None = None) -> np.ndarray:
        """Zeros (N,)."""
        self.asked.append((path, subset))
        return np.zeros(self.n_models)

    def take(self) -> list[tuple[Path, int | None]]:
        """All that was asked for since the last time."""
        asked, self.asked = self.asked, []
        return asked


def check_device(device: str) -> str:
    """The device's name; InputError for one that is not there."""
    try:
        torch.zeros(1, device=device).item()  # meta, say, has no numbers
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).split(". ")[0].splitlines()[0]
        raise InputError(
            f"device {device!r}: expected cpu, or a GPU that torch can use here, such as cuda, found none "
            f"({reason}); choose cpu"
        ) from error
    return device
