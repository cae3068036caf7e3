"""The fast scorer: each task's score of a path on a subset, from activations that paths share.

``reward.evaluate`` gives the same scores the plain way.
"""

from __future__ import annotations

import copy
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rmm_lab.engine.cache import Cache, free_bytes
from rmm_lab.errors import InputError
from rmm_lab.layers import LayerPool
from rmm_lab.reward import Path, Step, Task, partition, split_stem
from rmm_lab.tasks.metrics import REWARDS, agreement, answers, likelihood, mean_of

DRIFTING = 64  # inputs of a task: a mean over all their tokens
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# ------------------------------------------------------------------- how many examples at once

# Numbers in the largest tensor of a layer: 4 MiB in float32, a share of a CPU's cache.
_WIDEST = 2**20
# Examples: with fewer, calls cost more than they compute; with more, nothing is gained.
_FEWEST, MOST = 32, 256


def batch_size(architecture: Any, stem: nn.Module, task: Task, split: str) -> int:
    """How many of a task's examples go through a layer at once, so that its tensors stay in the cache.

    Estimated from a sample of the split; on a GPU always ``MOST``.
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
    """Cut rows into parts of at most ``size``, as equal as possible."""
    return np.array_split(rows, max(1, math.ceil(len(rows) / size)))


# ---------------------------------------------------------------------------------- the scorer


class Job(NamedTuple):
    """A worker's unit of work: some paths on one part of one task's subset."""

    subset: int | None
    part: int  # its number, over all tasks
    paths: tuple[Path, ...]


# Runs jobs in any order and anywhere; yields what ``Scorer.work`` returns, in the order of the jobs.
Engine = Callable[[Sequence[Job]], Iterable[tuple[list[Tensor], int]]]


class Scorer:
    """Scores paths through a pool of layers on a fixed partition of each task's examples.

    What a path has in common with the beginning of an earlier one is not computed again: activations are
    kept by (subset, part of a task's examples, first steps of the path). The parts depend neither on what
    is kept nor on who works, so rewards are the same to the bit for any budget and number of workers.

    A deep copy is the scorer itself, since all it holds follows from its arguments (Gymnasium copies the
    arguments of an environment). A pickle holds the pool, the tasks and the scores so far.

    Args:
        pool: the layers.
        tasks: N tasks, in the order of the pool's experts; each is scored with its own head.
        split: the examples: ``reward`` to search, ``test`` to report.
        fraction: share of each task's examples per episode, in (0, 1]; there are
            ``round(1 / fraction)`` subsets, which together use every example once.
        stem: where the weights outside the layers come from: ``base``, an expert, an operator, or
            ``agent``: then a path may start with a step at place -1, and without one takes the base's.
        seed: of the partition.
        cache_mb: budget for activations, in MiB; 0 keeps none, None takes a quarter of free memory.
        batch_size: examples that go through a layer at once; None: as many as suit the CPU's cache.
        workers: threads that score at the same time.
        device: ``cpu``, ``cuda`` or another of torch's.
        precision: ``float32`` or ``bfloat16`` for models and activations; the latter changes rewards
            a little.
        reward: what a subset's scores are: ``metric``, each task's own; ``likelihood`` of the right
            answers; or ``agreement`` with the task's expert, which reads no label.
        choice: the same of all examples together, subset None; None: agreement for itself, else the metric.
        engine: what runs the work in place of threads, such as ``ray_workers.RayEngine``.
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
        choice: str | None = None,
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
        choice = choice or ("agreement" if reward == "agreement" else "metric")
        for name in (reward, choice):
            if name not in REWARDS:
                raise InputError(
                    f"reward: expected {' or '.join(REWARDS)}, found {name!r}; correct it"
                )
        if workers < 1 or (batch_size is not None and batch_size < 1):
            raise InputError(
                f"scorer: expected at least 1 worker and batches of at least 1 example, found {workers} "
                f"and {batch_size}"
            )
        self.pool, self.tasks, self.split = pool, list(tasks), split
        self.architecture = pool.architecture  # now, since it finds weights that do not fit
        self.stem = "base" if stem == "agent" else stem
        self.sources, self.n_models, self.members = pool.sources, pool.n_models, pool.members
        self.task_names = [task.name for task in tasks]
        self.n_layers, self.chooses_stem = pool.n_layers, stem == "agent"
        kept = (*self.sources, "base", self.stem)  # other sources are forgotten after use
        self._kept = {source for source in kept if not pool.depends_on_path(source)}
        self.stacks: Sequence[range] = pool.stacks
        self.blocks: Sequence[range] = pool.blocks
        self.n_subsets = max(1, round(1 / fraction))
        self.device, self.dtype = torch.device(check_device(device)), PRECISIONS[precision]
        self._batch_size, self._reward, self._choice = batch_size, reward, choice
        self._rows = [partition(len(t.split(split)), self.n_subsets, seed) for t in tasks]
        self._parts: dict[int | None, list[tuple[int, np.ndarray]]] = {}
        budget = free_bytes(device) // 4 if cache_mb is None else int(cache_mb * 2**20)
        self.cache = Cache(budget)
        self._moved: dict[tuple[Step, Path], nn.Module] = {}
        self._heads = [
            {k: v.to(self.device, self.dtype) for k, v in pool.heads[name].items()}
            for name in pool.names
        ]
        self._lock = threading.Lock()
        self._seen: dict[tuple[Path, int | None], np.ndarray] = {}
        self._few: Any = None  # the inputs that drift looks at
        self._own: dict[tuple[int | None, int], Tensor] = {}  # logits of experts, by part
        self._workers = workers
        self.alone = engine is None and workers == 1  # then nothing is won by looking ahead
        self.shares_layers = engine is None  # else each worker merges its own
        self._engine = engine
        self._threads: ThreadPoolExecutor | None = None
        self.evaluations = 0  # paths scored, repeats included
        self.work_asked = 0  # layers of these paths x examples
        self.work_run = 0  # layers applied x examples they were applied to

    def __deepcopy__(self, memo: dict[int, Any]) -> Scorer:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_lock": None, "_threads": None, "_moved": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()

    def _is_passing(self, path: Path) -> bool:
        """Whether a path has a step whose layer is merged, used and forgotten."""
        return any(step.scales or step.source not in self._kept for step in path)

    # ------------------------------------------------------------------------------- scores

    def score(self, path: Path, subset: int | None = None) -> np.ndarray:
        """Each task's score of the path: (N,) in [0, 1]; ``subset`` None uses all examples.

        The score is what ``reward`` names, of all examples what ``choice`` does.
        """
        self.evaluations += 1
        examples = sum(len(self.rows(i, subset)) for i in range(self.n_models))
        self.work_asked += examples * len(split_stem(path)[1])
        self.prefetch([(path, subset)])
        return self._seen[path, subset].copy()

    def drift(self, path: Path) -> np.ndarray:
        """How far a beginning of a path is from each expert, (N,); none: 0. See ``Calibration.drift``.

        Looks at up to DRIFTING of a task's calibration inputs; InputError where the pool has none.
        """
        if self.pool.calibration is None:
            raise InputError(
                "drift: expected calibration inputs to look at, found none; give --calibration N"
            )
        if not path:
            return np.zeros(self.n_models)
        first, steps = split_stem(path, self.stem)
        self._few = self._few or self.pool.calibration.few(DRIFTING)
        return self._few.drift(self.pool, (first, *steps))

    def prefetch(self, wanted: Iterable[tuple[Path, int | None]]) -> None:
        """Score (path, subset) pairs together, so that all workers have work; ``score`` then finds them.

        Layers of operators that are no sources, such as scaled ones, are forgotten after use. They exist
        for as many paths at a time as there are threads.
        """
        unseen = {key for key in wanted if key not in self._seen}
        passing = [key for key in unseen if self._is_passing(key[0])]
        self._score(unseen.difference(passing))
        passing.sort(key=_order)
        n = self._workers if self._engine is None else max(1, len(passing))
        for start in range(0, len(passing), n):
            self._score(passing[start : start + n])
            self.forget(path for path, _ in passing[start : start + n])

    def _score(self, unseen: Iterable[tuple[Path, int | None]]) -> None:
        jobs = []
        for subset, keys in itertools.groupby(sorted(unseen, key=_order), lambda key: key[1]):
            paths = [path for path, _ in keys]
            # Sorted paths that begin alike stand together and share the most. Others share nothing, so
            # they can go to another worker.
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
                answers, kind = torch.cat(parts), self._kind(subset)
                if kind == "agreement":
                    right, labels = answers.unbind(-1)  # (n, 2) -> (n,), (n,)
                else:
                    right, labels = answers, self._labels(i, self.rows(i, subset))
                if kind == "metric":
                    scores.append(task.score(answers, labels))
                else:
                    scores.append(mean_of(task.metric, right, labels))
            self._seen[path, subset] = np.array(scores)

    def _kind(self, subset: int | None) -> str:
        return self._choice if subset is None else self._reward

    def _labels(self, i: int, rows: np.ndarray) -> Tensor:
        return self.tasks[i].split(self.split).labels[torch.from_numpy(rows)]

    def forget(self, paths: Iterable[Path]) -> None:
        """Free the layers of operators that are no sources."""
        gone = {step for path in paths for step in path if self._is_passing((step,))}
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
            if None not in self._parts:  # sizes are estimated once, for all subsets
                stem = self._module(Step(self.stem, -1))
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
        """What ``work`` returns for each job, whoever does it."""
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
        """Forget activations, and end the threads or the engine's workers.

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

        Answers are their numbers; where the reward is the likelihood, how right they are in [0, 1]; where it
        is the agreement, (n, 2): how nearly they are the expert's in [0, 1], and the number of that answer.
        """
        found, layers, kind = [], 0, self._kind(job.subset)
        for path in job.paths:
            logits, n = self._logits(job.subset, job.part, path)  # (n, answers)
            if kind == "likelihood":
                labels = self._labels(*self.parts(job.subset)[job.part])
                found.append(likelihood(logits, labels))
            elif kind == "agreement":
                own = self._expert(job.subset, job.part)
                found.append(torch.stack([agreement(logits, own), own.argmax(-1)], -1))  # (n, 2)
            else:
                task = self.tasks[self.parts(job.subset)[job.part][0]]
                found.append(answers(task, logits))  # (n, answers) -> (n,)
            layers += n
        return found, layers

    def _expert(self, subset: int | None, j: int) -> Tensor:
        """The logits (n, answers) of a part's own expert, whose task it is."""
        if (subset, j) not in self._own:
            name = self.pool.names[self.parts(subset)[j][0]]
            whole = tuple(Step(name, k) for k in range(-1, self.n_layers))
            self._own[subset, j] = self._logits(subset, j, whole)[0].cpu().double()
        return self._own[subset, j]

    def _logits(self, subset: int | None, j: int, path: Path) -> tuple[Tensor, int]:
        """Logits (n, answers) from the longest beginning that is kept, and the number of layers run."""
        first, steps = split_stem(path, self.stem)
        stem, architecture = self._module(first), self.architecture
        start = len(path) - len(steps)  # the index of the first layer
        # The last layer is never kept: it may compute only what the head needs.
        known, state = max(start, len(path) - 1), None
        while known >= start and (state := self.cache.get((subset, j, path[:known]))) is None:
            known -= 1
        if state is None:
            known = start
            state = architecture.embed(stem, self._batch(subset, j))
            self._keep((subset, j, path[:start]), state)
        for end in range(known + 1, len(path) + 1):
            layer = self._module(path[end - 1], (first, *path[start : end - 1]))
            if end == len(path):
                state = architecture.apply_last(layer, state)
            else:
                state = architecture.apply(layer, state)
                self._keep((subset, j, path[:end]), state)
        head = self._heads[self.parts(subset)[j][0]]
        return architecture.logits(stem, state, head), len(path) - known

    def _keep(self, key: tuple[int | None, int, Path], state: Any) -> None:
        if not self._is_passing(key[2][-1:]):  # else no other path begins like that
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

    def _module(self, step: Step, prefix: Path = ()) -> nn.Module:
        """A step's layer after a path, or stem, on the device and in the precision of the scorer."""
        source, k, scales = step
        with self._lock:  # a layer is merged once, whoever asks first
            module = self.pool.stem(source, scales) if k < 0 else self.pool.layer(*step, prefix)
            if self.device.type == "cpu" and self.dtype == torch.float32:
                return module
            key = (step, prefix if source not in self._kept else ())
            if key not in self._moved:
                self._moved[key] = copy.deepcopy(module).to(self.device, self.dtype)
            return self._moved[key]


def _order(key: tuple[Path, int | None]) -> tuple[int, Path]:
    """What sorts pairs of a path and a subset: by subset first, all examples before any."""
    path, subset = key
    return -1 if subset is None else subset, path


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
