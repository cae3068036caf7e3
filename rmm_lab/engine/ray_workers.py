"""Scoring on a Ray cluster: worker processes on one or many machines, one per core or GPU.

The scorer hands out jobs, and the workers run the same ``Scorer.work`` as a thread would, on the same parts
of the data: on machines of one kind, rewards are the same to the bit. Every machine needs the same version
of rmm_lab. Ray itself (``pip install 'rmm_lab[cluster]'``) is imported only when asked for.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import time
import warnings
import weakref
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmm_lab.engine.cache import free_bytes, keep_freed_memory
from rmm_lab.engine.ray_connection import connect, import_ray, leave, reason
from rmm_lab.engine.scorer import MOST, Job, Scorer
from rmm_lab.errors import InputError
from rmm_lab.layers import LayerPool
from rmm_lab.reward import Task
from rmm_lab.tasks.few_labels import FewLabels

TRIES = 5  # of a job whose worker died
START_S = 120.0  # until one worker must be there: it imports torch, and the cluster may be full
_AT_ONCE = 2  # jobs that a worker has, so that it need not wait for the next one

Packed = tuple[bytes, list[np.ndarray]]
Result = tuple[list[Tensor], int]  # what ``Scorer.work`` returns

# ------------------------------------------------------------------- what is sent to the workers


def pack(pool: LayerPool, tasks: Sequence[Task], split: str) -> Packed:
    """A pool and one split of its tasks, as (pickle, memory of the tensors, each block once).

    Blocks are uint8 arrays: Ray keeps those in memory that all workers of a machine read in place.
    """
    from ray.cloudpickle import CloudPickler

    arrays: list[np.ndarray] = []
    known: dict[int, int] = {}  # address of a tensor's memory -> number of its array

    class Packer(CloudPickler):
        def persistent_id(self, found: Any) -> Any:
            if type(found) is not Tensor or found.device.type != "cpu" or found.requires_grad:
                return None
            storage = found.untyped_storage()
            if not storage.nbytes():
                return None
            if storage.data_ptr() not in known:
                known[storage.data_ptr()] = len(arrays)
                arrays.append(torch.empty(0, dtype=torch.uint8).set_(storage).numpy())
            number, size = known[storage.data_ptr()], tuple(found.shape)
            return number, found.dtype, found.storage_offset(), size, found.stride()

    file = io.BytesIO()
    Packer(file).dump((pool, [only_split(task, split) for task in tasks]))
    return file.getvalue(), arrays


def unpack(packed: Packed) -> tuple[LayerPool, list[Task]]:
    """What was packed; its tensors are the arrays' memory, which must not be written to."""
    text, arrays = packed
    with warnings.catch_warnings():  # of memory that cannot be written to; nobody does
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        storages = [torch.from_numpy(array).untyped_storage() for array in arrays]

    class Unpacker(pickle.Unpickler):
        def persistent_load(self, found: Any) -> Tensor:
            number, dtype, offset, size, stride = found
            return torch.empty(0, dtype=dtype).set_(storages[number], offset, size, stride)

    return Unpacker(io.BytesIO(text)).load()


def only_split(task: Task, split: str) -> Task:
    """A copy of a task with one split read, and none to read: workers may not have the files."""
    if len(task.split(split)):
        task.batch(split, slice(0, 1))  # texts are padded at the first batch
    kept = copy.copy(task)
    if isinstance(kept, FewLabels):
        kept.task = only_split(kept.task, split)
        return kept
    for name in ("_splits", "_padded", "_rows", "_files"):
        stored = getattr(task, name, None)
        if isinstance(stored, dict):
            keep = {split} & set(stored) if name in ("_splits", "_padded") else set()
            setattr(kept, name, {k: stored[k] for k in keep})
    return kept


class Worker:
    """What runs in a worker process: a scorer with its own cache.

    Args:
        options: of ``Scorer``.
        share: number of workers on each machine, by Ray's name of it; "" for any other machine.

    Each call brings ``stored``, a list with Ray's reference to what ``pack`` returned, which a restarted
    process needs; Ray warns of such references among the arguments above.
    """

    def __init__(self, options: Mapping[str, Any], share: Mapping[str, int]) -> None:
        # The scorer is made at the first call, whose errors come back as they are.
        self._options, self._share = dict(options), share
        self._scorer: Scorer | None = None

    def scorer(self, stored: list[Any]) -> Scorer:
        """This process's scorer."""
        if self._scorer is None:
            import ray

            torch.set_num_threads(1)
            keep_freed_memory()
            if self._options.get("cache_mb") is None and self._options["device"] == "cpu":
                here = self._share.get(ray.get_runtime_context().get_node_id(), self._share[""])
                self._options["cache_mb"] = free_bytes() / 4 / here / 2**20
            pool, tasks = unpack(ray.get(stored[0]))
            self._scorer = Scorer(pool, tasks, **self._options)
        return self._scorer

    def ready(self, stored: list[Any]) -> int:
        """Make the scorer; returns the number of the process."""
        self.scorer(stored)
        return os.getpid()

    def work(self, stored: list[Any], job: Job) -> Result:
        """``Scorer.work``: each path's answers (n,) on the job's part, and the layers computed."""
        scorer = self.scorer(stored)
        done = scorer.work(job)
        scorer.forget(job.paths)
        return done


# --------------------------------------------------------------------------------- the engine


def home(job: Job, n_workers: int) -> int:
    """The worker, 0 to n_workers - 1, that has kept what paths of this beginning need of this part."""
    start = job.paths[0][:1] if job.paths else ()
    return zlib.crc32(repr((job.part, start)).encode()) % n_workers


class RayEngine:
    """Runs a scorer's jobs on a Ray cluster: ``engine(jobs)`` yields their results in their order.

    A job goes to its ``home`` first; a worker without jobs takes those of others. Where a worker dies,
    others do its jobs while Ray restarts it; an error in the work itself is raised as it is.
    A context manager: ``close`` ends the workers, and Ray if it was started or joined here. Whatever is
    not closed ends with the process at the latest.

    Args:
        pool, tasks: as for ``Scorer``. The split is read here, and sent.
        address: ``ray``: the cluster that RAY_ADDRESS names, else a new one on this machine; or
            ``ray://HOST:PORT``: a cluster's Ray client server. A connection that the process already has
            is used, whatever the address.
        options: of ``Scorer``. ``device`` cpu: a worker per core; cuda: one per GPU. ``cache_mb`` is for
            all workers together; by default each machine's take a quarter of its free memory, and on a
            GPU of that GPU's.
        limit: most workers; by default as many as the cluster has cores or GPUs.

    ``options``: those of the scorer that hands out the jobs; it computes nothing and needs no GPU.
    ``pids``: the process of each worker that is ready, by its number.

    Raises InputError where Ray is not installed, nobody answers at the address, the cluster has no core or
    GPU for a worker within ``START_S`` seconds, or a job's workers died ``TRIES`` times.
    """

    def __init__(
        self,
        pool: LayerPool,
        tasks: Sequence[Task],
        address: str = "ray",
        options: Mapping[str, Any] | None = None,
        *,
        limit: int | None = None,
    ) -> None:
        self._ray, user = import_ray(address), object()
        options = {"device": "cpu"} | dict(options or {})
        kind = torch.device(options["device"]).type
        if kind not in ("cpu", "cuda") or (limit is not None and limit < 1):
            raise InputError(
                f"--workers {address}: expected device cpu or cuda and at least 1 worker, found "
                f"{options['device']!r} and {limit}"
            )
        options["device"] = kind  # Ray shows each worker its own GPU only
        if kind == "cuda":  # as the workers find it, wherever the jobs are cut
            options["batch_size"] = options.get("batch_size") or MOST
        packed = pack(pool, tasks, options.get("split", "reward"))
        n_bytes = len(packed[0]) + sum(array.nbytes for array in packed[1])
        connect(self._ray, address, user, n_bytes, limit if kind == "cpu" else None)
        self._actors: list[Any] = []
        self._finalizer = weakref.finalize(self, leave, self._ray, user, self._actors)
        try:
            self._start(address, packed, options, limit)
        except BaseException:
            self.close()
            raise

    def _start(
        self, address: str, packed: Packed, options: dict[str, Any], limit: int | None
    ) -> None:
        """Make the workers, and wait for the first one."""
        ray, device = self._ray, options["device"]
        resource = "GPU" if device == "cuda" else "CPU"
        on_node = {
            node["NodeID"]: int(node["Resources"].get(resource, 0))
            for node in ray.nodes()
            if node["Alive"]
        }
        n = min(sum(on_node.values()), limit or sum(on_node.values()))
        if n < 1:
            raise InputError(
                f"--workers {address}: expected a {resource} for each worker on device {device}, found "
                "none in the cluster; choose another --device, or add a machine"
            )
        self.options = options | {"device": "cpu"}
        if options.get("cache_mb") is not None:
            options["cache_mb"] /= n
        share = {node: max(1, min(k, n)) for node, k in on_node.items()} | {"": n}
        needs = {"num_gpus": 1} if device == "cuda" else {"num_cpus": 1}
        remote = ray.remote(max_restarts=-1, **needs)(Worker)
        # Stored once, however many workers there are, and kept for those that are restarted.
        self._stored = [ray.put(packed)]
        self._actors += [remote.remote(options, share) for _ in range(n)]
        # Workers that are not ready (yet), by number, with the call that ends when they are.
        self._away = {w: actor.ready.remote(self._stored) for w, actor in enumerate(self._actors)}
        self._lost: dict[int, str] = {}  # workers that never come back, and why
        self.pids: dict[int, int] = {}
        self._await_one()

    # ------------------------------------------------------------------------------ the work

    def __call__(self, jobs: Sequence[Job]) -> Iterator[Result]:
        """What ``Scorer.work`` returns for each job, in the order of the jobs."""
        if self._finalizer.alive is False and jobs:
            raise InputError("scorer: expected its cluster, found it closed; make a new scorer")
        n = len(self._actors)
        queues: list[deque[int]] = [deque() for _ in range(n)]
        for number, job in enumerate(jobs):
            queues[home(job, n)].append(number)
        running: dict[Any, tuple[int, int]] = {}  # call -> numbers of worker and job
        tries = [0] * len(jobs)
        done: dict[int, Result] = {}
        told = 0  # jobs whose results were given
        while told < len(jobs):
            self._await_one()
            for w in set(range(n)) - set(self._away) - set(self._lost):
                busy = sum(worker == w for worker, _ in running.values())
                while busy < _AT_ONCE and (taken := _take(queues, w, busy)) is not None:
                    running[self._actors[w].work.remote(self._stored, jobs[taken])] = w, taken
                    tries[taken] += 1
                    busy += 1
            for call in self._ray.wait([*running, *self._away.values()], num_returns=1)[0]:
                if call not in running:
                    self._greet(call)
                    continue
                w, number = running.pop(call)
                try:
                    done[number] = self._get(call)
                except self._ray.exceptions.RayError as error:
                    if tries[number] >= TRIES:
                        raise InputError(
                            "--workers: expected a worker that lives through a job, found that "
                            f"{tries[number]} died of it ({reason(error)}); look at the cluster's "
                            "memory, or use a number of threads"
                        ) from error
                    queues[w].appendleft(number)
                    if w not in self._away and w not in self._lost:
                        self._away[w] = self._actors[w].ready.remote(self._stored)
            while told in done:
                yield done.pop(told)
                told += 1

    def _get(self, call: Any) -> Any:
        """What a call returned; an error inside it as itself, a ``RayError`` if the worker died."""
        try:
            return self._ray.get(call)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, Exception):
                raise error.cause from None
            raise

    def _greet(self, call: Any) -> None:
        """End of a call to ``ready``: the worker is ready, or away again, or lost."""
        (w,) = (w for w, waited in self._away.items() if waited == call)
        del self._away[w]
        try:
            self.pids[w] = self._get(call)
        except self._ray.exceptions.ActorDiedError as error:
            self._lost[w] = reason(error)
        except self._ray.exceptions.RayError:
            time.sleep(0.2)  # Ray is restarting it
            self._away[w] = self._actors[w].ready.remote(self._stored)

    def _await_one(self) -> None:
        """Return once any worker is ready."""
        end = time.monotonic() + START_S
        while len(self._away) + len(self._lost) == len(self._actors):
            left = end - time.monotonic()
            if left <= 0 or not self._away:
                why = next(iter(self._lost.values()), "no room in the cluster, or they die at once")
                raise InputError(
                    f"--workers: expected a worker of Ray within {START_S:.0f} s, found none of "
                    f"{len(self._actors)} ready ({why}); see ray status, or use a number of threads"
                )
            for call in self._ray.wait(list(self._away.values()), timeout=left)[0]:
                self._greet(call)

    # ------------------------------------------------------------------------------- the end

    def close(self) -> None:
        """End the workers, and the connection to Ray if it was made here; Ray itself if started here."""
        self._finalizer()

    def __enter__(self) -> RayEngine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _take(queues: Sequence[deque[int]], w: int, busy: int) -> int | None:
    """Worker w's next job: its own, or if it has nothing to do the last of the longest queue."""
    if queues[w]:
        return queues[w].popleft()
    longest = max(queues, key=len)
    return longest.pop() if longest and not busy else None
