"""What ``tables real`` measures beside the kit's tables: jobs that give rows, see ``measure``.

curve     what averaging loses, against the distance of the experts from the base
stranger  what a method loses when an expert joins that has nothing to do with the tasks
subsets   all sets of 2 to N experts: how often a merge is better than the base
unseen    a set that no expert saw: nearest class mean on the merged model's features
inputs    what closed forms keep, by how many inputs they look at
texts     a language model: rules, closed forms, a search of few evaluations
speed     seconds of the closed forms, the share inside the models, and memory
"""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from rmm_lab.errors import InputError
from rmm_lab.evidence import measure
from rmm_lab.evidence.measure import Job, Measured
from rmm_lab.reward import Step
from rmm_lab.search import matched, uniform
from rmm_lab.search.config import searched
from rmm_lab.search.pipeline import train
from rmm_lab.search.problem import Problem
from rmm_lab.search.uniform import Row
from rmm_lab.zoo.probe import features, nearest_mean

RULES = ("weight average", "task arithmetic, tuned", "TIES, tuned", uniform.WEIGHTS, "TSV")
FEW_RULES = RULES[:2]  # where many groups are measured
CLOSED = dict(itertools.islice(matched.MATCHED.items(), 3))  # nothing of them is tuned
SOURCES = {  # whole models without anything to tune
    "weight average": "weight_average",
    "task arithmetic": "task_arithmetic",
    "TIES": "ties",
    **{name: source for name, source in CLOSED.items() if "PLeaS" not in name},
}


def peak_mb() -> float:
    """The most memory that this process ever had, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; bytes on macOS
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 0)


def closed_rows(problem: Problem, names: Sequence[str] = tuple(CLOSED)) -> Iterator[Row]:
    """RegMean and least squares, each with its inputs anew, so that seconds count every fit."""
    for name in names:
        assert problem.pool.calibration is not None
        problem.pool.calibration = problem.pool.calibration.anew()
        yield matched.closed_row(problem, name, CLOSED[name])


# -------------------------------------------------------------------------------------- the protocols


class Uncounted:
    """A task that is worth nothing: its inputs may be looked at, but its score is always 0.

    A search or a rule that is tuned on the mean over tasks is then tuned on the others.
    """

    def __init__(self, task: Any) -> None:
        self._task = task

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_task":
            raise AttributeError(name)
        return getattr(self._task, name)

    def split(self, name: str) -> Any:
        """One picture of the splits that score."""
        whole = self._task.split(name)
        return whole if name == "train" else type(whole)(whole.images[:1], whole.labels[:1])

    def size(self, name: str) -> int:
        return len(self.split(name))

    def score(self, found: Any, labels: Any) -> float:
        return 0.0


def stranger(job: Job) -> Measured:
    """Rules, closed forms and a search; with a ``stranger`` the last expert's task does not count."""
    problem, start = measure.fitted(job.config)
    n = len(problem.tasks) - (job.key["stranger"] != "nobody")
    share = len(problem.tasks) / n  # of a mean over the tasks that count
    problem = dataclasses.replace(problem)
    problem.tasks = [t if i < n else Uncounted(t) for i, t in enumerate(problem.tasks)]
    counted = dataclasses.replace(problem, tasks=problem.tasks[:n])

    def cells(row: Row) -> dict[str, Any]:
        own = dataclasses.replace(row, scores=row.scores[:n], reward=row.reward * share)
        return measure.cells(counted, own)

    found = [cells(row) for row in _models(problem) if row.name in ("base", uniform.OWN)]
    found += [cells(row) for row in uniform.rule_rows(problem, RULES)]
    found += [cells(row) for row in closed_rows(problem)]
    return {job.table: [*found, _search(job, problem, start, cells)]}


def _models(problem: Problem) -> Iterator[Row]:
    """The models as they are: the base, each expert, and each expert on its own task."""
    return uniform.rows(problem, ())


def _search(
    job: Job, problem: Problem, start: float, cells: Callable[[Row], dict[str, Any]]
) -> dict[str, Any]:
    """The row of the config's search."""
    found = train(job.config, problem, table=False)
    seconds, n = time.perf_counter() - start, job.config.run.episodes
    took = {"evaluations": n, "seconds": seconds, "reward": found.reward, "sees": "labels"}
    return cells(
        uniform.path_row(problem, searched(job.config), f"{n} episodes", found.path.path, **took)
    )


def subset(job: Job) -> Measured:
    """One set of experts: the base, the experts, few rules, closed forms, and a search."""
    problem, start = measure.fitted(job.config)
    found = [*_models(problem), *uniform.rule_rows(problem, FEW_RULES)]
    found += closed_rows(problem, [name for name in CLOSED if name in SOURCES])
    rows = [measure.cells(problem, row) for row in found]
    rows.append(_search(job, problem, start, lambda row: measure.cells(problem, row)))
    return {job.table: [row | {"n_experts": problem.pool.n_models} for row in rows]}


def curve(job: Job) -> Measured:
    """Experts at one learning rate: how far they went, and what an average and closed forms keep."""
    problem = measure.load(job.config)
    base = [problem.pool.weights("base", k) for k in range(-1, problem.pool.n_layers)]
    size = np.sqrt(sum(float(t.square().sum()) for part in base for t in part.values()))
    far = [
        np.sqrt(
            sum(
                float((t - part[name]).square().sum())
                for k, part in enumerate(base, -1)
                for name, t in problem.pool.weights(expert, k).items()
                if name in part
            )
        )
        for expert in problem.pool.names
    ]
    rows = [r for r in _models(problem) if r.name in ("base", uniform.OWN)]
    rows += [*uniform.rule_rows(problem, FEW_RULES)]
    rows += closed_rows(problem, [name for name in CLOSED if name in SOURCES])
    distance = round(100 * float(np.mean(far)) / size, 4)
    more = {"distance": distance, "training": job.key["training"]}
    return {job.table: [measure.cells(problem, row) | more for row in rows]}


def inputs(job: Job) -> Measured:
    """Closed forms with the config's number of inputs, on the reward split too, which they do not see."""
    problem, rows = measure.load(job.config), []
    for row in closed_rows(problem, [name for name in CLOSED if name in SOURCES]):
        scores = uniform.uniform(problem, SOURCES[row.name], "reward")
        rows.append(measure.cells(problem, dataclasses.replace(row, reward=float(scores.mean()))))
        problem.pool.forget([SOURCES[row.name]])
    return {job.table: rows}


def unseen(job: Job) -> Measured:
    """Merges of experts on a set that none of them saw: nearest class mean on the merged features.

    Means are of the set's train split, accuracy is on its test split; nothing is fitted or tuned.
    """
    problem, rows = measure.load(job.config), []
    pool = problem.pool
    [task] = pool.base.family.make_tasks(pool.base, [job.key["place"]])
    own = {"base": "base", **{f"{uniform.EXPERT}{name}": name for name in pool.names}} | SOURCES
    labels = {split: task.split(split).labels for split in ("train", "test")}
    for method, source in own.items():
        start = time.perf_counter()
        if pool.calibration is not None:
            pool.calibration = pool.calibration.anew()
        path = uniform.uniform_path(problem, source)
        stem = pool.stem(source)
        layers = [pool.layer(*step, prefix=path[: i + 1]) for i, step in enumerate(path[1:])]
        found = {s: features(pool.architecture, stem, layers, task, s) for s in labels}
        hits = nearest_mean(found["train"], labels["train"], found["test"]) == labels["test"]
        score = round(100 * float(hits.double().mean()), 2)
        seconds = round(time.perf_counter() - start, 2)
        rows.append({"method": method, "mean": score, "seconds": seconds, "setting": source})
        if source in SOURCES.values():
            pool.forget([source])
    return {job.table: rows}


# ---------------------------------------------------------------------------- a process of its own


def _send(function: Callable[[Job], Measured], job: Job, pipe: Any) -> None:
    """In a new process: the rows, or what was wrong."""
    torch.set_num_threads(job.config.run.threads or torch.get_num_threads())
    try:
        pipe.send(function(job))
    except InputError as error:
        pipe.send(error)


def alone(function: Callable[[Job], Measured], job: Job) -> Measured:
    """A job in a process of its own, whose memory is then the job's."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(function, job, theirs))
    process.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError as error:
        raise InputError(
            f"{job.table}: expected a process that lives, found one that was ended; where memory is short "
            "give smaller models or fewer inputs"
        ) from error
    finally:
        process.join()
    if isinstance(found, InputError):
        raise found
    return found


def speed(job: Job) -> Measured:
    """``speed_rows`` in a process of its own."""
    return alone(speed_rows, job)


def speed_rows(job: Job) -> Measured:
    """Stages of a merge: seconds of the clock and of the processor, of these the share inside the models, and
    the peak of memory so far. Other work beside counts for the clock alone.
    """
    rows: list[dict[str, Any]] = []
    inside = [0.0]

    def clock() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def stage(name: str, started: tuple[float, float]) -> None:
        took, cpu = (b - a for a, b in zip(started, clock(), strict=True))
        row = {"method": name, "seconds": round(took, 2), "cpu": round(cpu, 2)}
        row |= {"inside": round(inside[0], 2), "share": f"{100 * inside[0] / max(cpu, 1e-9):.0f} %"}
        rows.append(row | {"peak_mb": peak_mb()})
        inside[0] = 0.0

    started = clock()
    problem = measure.load(job.config)
    pool = problem.pool
    arch, looking = pool.architecture, pool.calibration
    stage("models are read", started)
    started = clock()
    for task in problem.tasks:
        task.split("train")
    stage("pictures are read", started)
    for name in ("apply", "embed"):
        setattr(arch, name, _timed(getattr(arch, name), inside))
    started = clock()
    with torch.inference_mode():
        for i, expert in enumerate(pool.names):
            layers = [pool.layer(expert, k) for k in range(pool.n_layers)]
            for part in looking.parts(i):
                state = arch.embed(pool.stem(expert), part)
                for layer in layers:
                    state = arch.apply(layer, state)
    stage("forward passes of the experts", started)
    for name, source in CLOSED.items():
        pool.calibration = looking.anew()
        started = clock()
        path = tuple(Step(source, k) for k in range(-1, pool.n_layers))
        for i, step in enumerate(path):
            pool.weights(*step, prefix=path[:i])
        stage(name, started)
        pool.forget([source])
    return {job.table: rows}


def _timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def timed(*args: Any) -> Any:
        started = time.process_time()
        try:
            return function(*args)
        finally:
            seconds[0] += time.process_time() - started

    return timed


def texts(job: Job) -> Measured:
    """``text_rows`` in a process of its own."""
    return alone(text_rows, job)


def text_rows(job: Job) -> Measured:
    """Language experts: the base and experts, few rules, closed forms, and a search of few evaluations."""
    problem, rows = measure.load(job.config), []

    def add(row: Row) -> None:
        rows.append(measure.cells(problem, row) | {"peak_mb": peak_mb()})

    for row in itertools.chain(_models(problem), uniform.rule_rows(problem, FEW_RULES)):
        add(row)
    for row in closed_rows(problem):
        add(row)
    search = _search(job, problem, time.perf_counter(), lambda row: measure.cells(problem, row))
    return {job.table: [*rows, search | {"peak_mb": peak_mb()}]}
