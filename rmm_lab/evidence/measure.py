"""The cells of result tables: what is measured in one go, in which process, and into which file.

A table is a CSV file whose lines have a key, the columns that say what was measured. A job measures some
lines of one table or two; jobs depend on nothing but their arguments, so several processes can work. Only
the process that hands them out writes, so a stopped command leaves whole cells, and goes on after them.
Scores are in % of the test split, ``reward_split`` in % of the split that chose the path.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import signal
import subprocess
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from rmm_lab.engine.cache import free_bytes
from rmm_lab.errors import InputError
from rmm_lab.evidence.pages import draws
from rmm_lab.ppo import Args, Result, make_scorer, problem_of, train
from rmm_lab.search import rivals as searches
from rmm_lab.search import run_folder as runs
from rmm_lab.search import uniform as baselines
from rmm_lab.search.problem import Problem

Cell = dict[str, Any]  # one line of a CSV file
Found = dict[str, list[Cell]]  # what a job measured: table -> lines

# The columns that say what was measured.
METHOD_KEY = ("group", "size", "seed", "method")
KEYS: dict[str, tuple[str, ...]] = {
    "halves": METHOD_KEY,
    "vision": METHOD_KEY,
    "language": METHOD_KEY,
    "dar": ("preset", "reward", "data_fraction", "dar", "seed"),
    "dar-curve": ("dar", "seed", "episode"),
    "searches": ("group", "seed", "method"),
    "searches-curve": ("group", "seed", "method", "evaluations"),
    "agent": ("group", "setting", "seed"),
}
# Values of these columns come in this order in a file, others in their natural one.
ORDER: dict[str, Sequence[Any]] = {
    "method": (
        *("chance", "most frequent answer", "base", "expert", "fine-tuned", "multi-task"),
        *baselines.AS_GIVEN,
        *(name if len(grid) == 1 else f"{name}, tuned" for name, grid in baselines.GRIDS.items()),
        *("RMM", "RMM, paper's preset"),
    ),
    "preset": ("paper", "default"),
    "reward": ("metric", "likelihood"),
    "data_fraction": (1.0, 0.1, 0.01),
    "dar": (0.8, 0.0),
}


@dataclass(frozen=True)
class Job:
    """Lines to measure together: ``kind`` is one of KINDS, ``key`` the columns that name the lines.

    ``args`` say what is loaded and how it is searched.
    """

    table: str
    kind: str
    key: Cell
    args: Args


# ------------------------------------------------------------------------------------- the files


@dataclass
class Tables:
    """The tables of a folder. ``order``: column -> the order of its values in a file."""

    folder: Path
    order: Mapping[str, Sequence[Any]]

    def read(self, name: str) -> list[Cell]:
        """The lines so far."""
        file = self.folder / f"{name}.csv"
        return runs.from_csv(file.read_text("utf-8")) if file.is_file() else []

    def has(self, name: str, key: Mapping[str, Any], args: Args | None = None) -> bool:
        """Whether a line with these values is there.

        With ``args`` it must be of a search as long and as precise as theirs: one mean over different
        searches would say nothing. Raises InputError otherwise.
        """
        for cell in self.read(name):
            if all(cell.get(k) == v for k, v in key.items()):
                if args is not None and (odd := _differs(cell, args)):
                    raise InputError(
                        f"{self.folder / name}.csv: expected {odd[1]} as in the line of "
                        f"{' '.join(str(v) for v in key.values())}, found {odd[0]}; give the same, or "
                        "another --out"
                    )
                return True
        return False

    def add(self, name: str, cells: Sequence[Cell]) -> None:
        """Put lines into their places, over those with the same key, and replace the file as a whole.

        Methods without randomness are measured once and stand under every seed.
        """
        key, old = KEYS[name], self.read(name)
        if old and cells and set(old[0]) != set(cells[0]):
            odd = sorted(set(old[0]) ^ set(cells[0]))
            raise InputError(
                f"{self.folder / name}.csv: expected the columns of this version, found others (they "
                f"differ in {', '.join(odd)}); move the file away to measure it anew"
            )
        lines = {tuple(cell[k] for k in key): cell for cell in [*old, *cells]}
        if key == METHOD_KEY:
            lines = _under_every_seed(lines)
        order = ORDER | dict(self.order)

        def rank(at: tuple[Any, ...]) -> list[Any]:
            out = []
            for k, v in zip(key, at, strict=True):
                known = list(order.get(k, ()))
                v = "expert" if str(v).startswith("expert ") else v  # as they were measured
                out.append((known.index(v), 0) if v in known else (len(known), v))
            return out

        self.folder.mkdir(parents=True, exist_ok=True)
        text = runs.to_csv([lines[at] for at in sorted(lines, key=rank)])
        runs.write(self.folder / f"{name}.csv", text)


def _differs(cell: Cell, args: Args) -> tuple[str, str] | None:
    """What a search was asked for and what a line holds, where its episodes or precision differ."""
    of_line = {"precision": "float32"} | json.loads(str(cell.get("config") or "{}"))
    of_line |= {"episodes": cell.get("episodes", args.episodes)}
    for name in ("episodes", "precision"):
        if of_line[name] != (asked := getattr(args, name)):
            return f"{asked}", f"--{name} {of_line[name]}"
    return None


def _under_every_seed(lines: dict[tuple[Any, ...], Cell]) -> dict[tuple[Any, ...], Cell]:
    seeds: dict[tuple[Any, ...], set[int]] = {}
    for group, size, seed, _ in lines:
        seeds.setdefault((group, size), set()).add(seed)
    out: dict[tuple[Any, ...], Cell] = {}
    for (group, size, _, method), cell in lines.items():
        for seed in [cell["seed"]] if draws(method) else sorted(seeds[group, size]):
            out.setdefault((group, size, seed, method), cell | {"seed": seed})
    return out


@functools.cache
def commit() -> str:
    """The commit that measures, with a + where files differ from it; empty outside a repository."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return done.stdout.strip()


# ---------------------------------------------------------------------------------- what is measured


def config_of(args: Args) -> str:
    """What determines the result, as JSON, but for what the preset gives: enough to run it again."""
    full, usual = args.config(), Args(preset=args.preset).config()
    own = {k: v for k, v in full.items() if v != usual[k] or k in ("preset", "seed")}
    return json.dumps(own)


def args_of(text: str) -> Args:
    """The inverse of ``config_of``."""
    values: dict[str, Any] = json.loads(text)
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return Args(**values)


def load(args: Args) -> Problem:
    """What the arguments name, as ``train`` loads it, to be scored on their device."""
    problem = problem_of(args)
    problem.device = args.device
    return problem


def timed(args: Args, problem: Problem) -> tuple[Result, float]:
    """A search without its table, and its seconds, from loaded models to the chosen path."""
    for task in problem.tasks:
        task.split("reward")
    start = time.perf_counter()
    result = train(args, problem=problem, table=False)
    return result, time.perf_counter() - start


def split_stem(text: str, problem: Problem) -> tuple[list[tuple[str, int]], str]:
    """A path as text -> its (source, layer) and its stem."""
    steps = [(s, int(k)) for s, _, k in (step.rpartition("@") for step in text.split())]
    if steps and steps[0][1] < 0:
        return steps[1:], steps[0][0]
    return steps, "base" if problem.stem == "agent" else problem.stem


def line(problem: Problem, row: baselines.Row) -> Cell:
    """A row of a result table as a line of CSV, in %."""
    names = [task.name for task in problem.tasks]
    by_task = " ".join(f"{n}={100 * s:.2f}" for n, s in zip(names, row.scores, strict=True))
    mean = round(100 * row.mean, 2)
    empty = {"reward_split": "", "path": "", "seconds": ""}
    return {"method": row.name, "setting": row.setting, "mean": mean, "by_task": by_task} | empty


def chosen(problem: Problem, name: str, setting: str, text: str, value: float) -> Cell:
    """The line of a search's path: its score on the test split; ``value`` in [0, 1] on the reward split."""
    steps, stem = split_stem(text, problem)
    cell = line(problem, baselines.path_row(problem, name, setting, steps, stem))
    return cell | {"reward_split": round(100 * value, 2), "path": text}


def found(problem: Problem, job: Job, result: Result, seconds: float) -> Cell:
    """RMM's line."""
    path = " ".join(f"{s}@{k}" for s, k in [(result.path.stem, -1), *result.path.steps])
    name = str(job.key.get("method", "RMM"))
    cell = chosen(problem, name, f"{job.args.episodes} episodes", path, result.reward)
    return cell | {"seconds": round(seconds, 1)}


def methods(job: Job) -> Found:
    """All methods but RMM, at the job's seed."""
    problem = load(job.args)
    return {job.table: [line(problem, row) for row in baselines.rows(problem)]}


def dare(job: Job) -> Found:
    """DARE at the job's seed, the only uniform merge that draws: as published, and tuned."""
    problem = load(job.args)
    return {job.table: [line(problem, row) for row in baselines.uniform_rows(problem, ["DARE"])]}


def rmm(job: Job) -> Found:
    """A search by the agent."""
    problem = load(job.args)
    result, seconds = timed(job.args, problem)
    return {job.table: [found(problem, job, result, seconds)]}


def rmm_curve(job: Job) -> Found:
    """The same, and every episode's reward (Fig. 3)."""
    problem = load(job.args)
    result, seconds = timed(job.args, problem)
    curve = [
        {"dar": job.args.dar, "seed": job.args.seed, "episode": e["episode"]}
        | {k: round(100 * e[k], 2) for k in ("raw_reward", "dar_reward")}
        for e in result.episodes
    ]
    return {job.table: [found(problem, job, result, seconds)], f"{job.table}-curve": curve}


def search(job: Job) -> Found:
    """A search by the key's method; its curve is ``searches.curve_of``, and at the end its final choice."""
    problem = load(job.args)
    scorer, method = make_scorer(problem, job.args), job.key["method"]
    if method == "RMM":
        result, seconds = timed(job.args, problem)
        cell = found(problem, job, result, seconds)
        scored = [(e["path"], e["raw_reward"]) for e in result.episodes if not e["penalised"]]
    else:
        start = time.perf_counter()
        scored = searches.SEARCHES[method](scorer, job.args.episodes, job.args.seed)
        best = searches.finalists(scored, job.args.finalists)
        value, text = max((searches.whole(scorer, text), text) for text in best)
        seconds = round(time.perf_counter() - start, 1)
        setting = f"{job.args.episodes} evaluations"
        cell = chosen(problem, method, setting, text, value) | {"seconds": seconds}
    curve = list(searches.curve_of(scorer, scored))
    curve[-1]["reward_split"] = cell["reward_split"]  # what is chosen in the end
    scorer.close()
    return {job.table: [cell], f"{job.table}-curve": curve}


KINDS: dict[str, Callable[[Job], Found]] = {
    "methods": methods,
    "dare": dare,
    "rmm": rmm,
    "rmm_curve": rmm_curve,
    "search": search,
}


def measure(job: Job) -> Found:
    """What a job finds, each line with its key."""
    out = KINDS[job.kind](job)
    for name, cells in out.items():
        for i, cell in enumerate(cells):
            own = {k: job.key.get(k, cell.get(k)) for k in KEYS[name]}
            last: Cell = {"episodes": job.args.episodes}
            if not name.endswith("-curve"):
                last["config"] = config_of(job.args)
            kept = {k: v for k, v in cell.items() if k not in own}
            cells[i] = own | kept | last
    return out


# ----------------------------------------------------------------------------------- all of them


@dataclass(frozen=True)
class Group:
    """Experts to merge: ``name`` and ``size`` are columns, ``options`` those of ``Args`` that name them."""

    name: str
    size: str
    options: dict[str, Any]

    @property
    def key(self) -> Cell:
        """Its columns in a table of methods."""
        return {"group": self.name, "size": self.size}


LABELS = {"default": "RMM", "paper": "RMM, paper's preset"}


def method_jobs(
    tables: Tables,
    name: str,
    groups: Sequence[Group],
    seeds: Sequence[int],
    search: Mapping[str, Any],
    presets: Sequence[str] = ("default",),
) -> Iterator[Job]:
    """What is not in a table of methods yet: all uniform merges once, DARE and RMM for each seed.

    ``search``: further options of ``Args``.
    """
    for group in groups:
        known = tables.has(name, group.key | {"method": "fine-tuned"})
        for seed in seeds:
            key = group.key | {"seed": seed}
            # Uniform merges are merged block by block, as published, whatever the agent decides on.
            args = Args(**(group.options | dict(search)), seed=seed, unit="block")
            if not known:
                yield Job(name, "methods", key, args)
            elif not tables.has(name, key | {"method": "DARE, tuned"}):
                yield Job(name, "dare", key, args)
            known = True
            for preset in presets:
                own = key | {"method": LABELS[preset]}
                args = Args(**(group.options | dict(search)), seed=seed, preset=preset)  # type: ignore[arg-type]
                if not tables.has(name, own, args):
                    yield Job(name, "rmm", own, args)


def measure_all(jobs: Sequence[Job], tables: Tables, processes: int, threads: int = 1) -> None:
    """Measure in several processes at once; each job's lines are stored as soon as they are found."""
    start = time.perf_counter()
    commit()  # that of the code which runs, whatever is committed meanwhile
    jobs = [replace(job, args=replace(job.args, threads=threads, quiet=True)) for job in jobs]
    with closing(_measured(jobs, processes, threads)) as results:
        for n, (job, out) in enumerate(results, 1):
            for name in reversed(out):  # the curve first: the table's line says that all is there
                tables.add(name, [cell | {"commit": commit()} for cell in out[name]])
            left = (time.perf_counter() - start) / n * (len(jobs) - n)
            key = " ".join(f"{k}={v}" for k, v in job.key.items())
            cell = out[job.table][-1]
            told = f"{cell.get('method', 'RMM')} {cell['mean']:.2f} % of the test split"
            print(
                f"{time.strftime('%H:%M:%S')} {job.table} {key}: {told}; cell {n} of {len(jobs)}"
                + (f", about {_minutes(left)} left" if n < len(jobs) else ""),
                flush=True,
            )


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"


def _measured(jobs: Sequence[Job], processes: int, threads: int) -> Generator[tuple[Job, Found]]:
    """Each job with what it found, in the order in which they end."""
    if processes == 1 or len(jobs) < 2:
        torch.set_num_threads(threads)
        for job in jobs:
            yield job, measure(job)
        return
    # Or each would take a quarter of the memory, and twice where a search and its curve are scored.
    share = free_bytes(jobs[0].args.device) / 2**20 / 4 / processes
    jobs = [replace(job, args=replace(job.args, cache_mb=share)) for job in jobs]
    spawn = multiprocessing.get_context("spawn")
    before = set(psutil.Process().children())
    with ProcessPoolExecutor(
        processes, mp_context=spawn, initializer=_start, initargs=(threads,)
    ) as pool:
        futures = {}
        try:
            for job in jobs:  # each may start a process: stopped here too, none is waited for
                futures[pool.submit(measure, job)] = job
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise InputError(
                f"--jobs: expected {processes} processes that live, found one that was ended ({error}); "
                "where memory is short give fewer: what is measured is stored"
            ) from error
        except BaseException:  # also Ctrl-C, and a reader that went away: wait for nothing
            for future in futures:
                future.cancel()
            # Also one that was being started, which multiprocessing does not know yet.
            for process in set(psutil.Process().children()) - before:
                with suppress(psutil.NoSuchProcess):
                    process.terminate()
            raise


def _start(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends this one
    torch.set_num_threads(threads)
