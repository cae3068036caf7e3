"""What result tables measure: jobs, the processes that run them, and the CSV files that hold their rows.

A row has a key, the columns that say what was measured. A job measures some rows of one table or two and
depends on nothing but its fields, so several processes can work. Only the process that hands out the jobs
writes, so a command that is stopped leaves whole rows, and the next one goes on after them.
"""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import signal
import subprocess
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
from tqdm import tqdm

from rmm_lab.engine.cache import free_bytes
from rmm_lab.engine.scorer import Scorer
from rmm_lab.errors import InputError
from rmm_lab.evidence.rows import (
    BEST_EXPERT,
    COLUMNS,
    DRAWN,
    KEYS,
    METHOD_KEY,
    ORDER,
    STOCHASTIC,
    kind_of,
    of_this_version,
    read_csv,
)
from rmm_lab.reward import Path as Steps
from rmm_lab.reward import path_text
from rmm_lab.search import gradients, matched, rivals, uniform
from rmm_lab.search.budget import Deadline
from rmm_lab.search.config import Config, configure, describe, searched, seen_by
from rmm_lab.search.finalists import candidates, legal, rank
from rmm_lab.search.phases import Search, choose, make_scorer
from rmm_lab.search.pipeline import Result, run_phases, train
from rmm_lab.search.problem import Problem, ProblemSpec, at_hand, problem_of
from rmm_lab.search.run_folder import RunFolder
from rmm_lab.tasks.files import write_file

Measured = dict[str, list[dict[str, Any]]]  # table -> rows; the last table is the job's own

# What the default search is beside at small budgets and equal seconds: rivals that take all of its menu.
ON_A_BUDGET = ("CMA-ES over scales", "TPE", "coordinate ascent", "random search")


@dataclass(frozen=True)
class Job:
    """Rows to measure together. ``key``: their columns; ``config``: what is loaded and how it is searched."""

    table: str
    measure: Callable[[Job], Measured]
    key: dict[str, Any]
    config: Config


# ------------------------------------------------------------------------------------- the files


@dataclass
class Store:
    """The tables of a folder. ``order``: column -> the order of its values in a file, beside ORDER."""

    folder: Path
    order: Mapping[str, Sequence[Any]]

    def file(self, name: str) -> Path:
        """A table's file."""
        return self.folder / f"{name}.csv"

    def has(self, name: str, key: Mapping[str, Any], config: Config | None = None) -> bool:
        """Whether a row with these values is there.

        With ``config`` the rows of other seeds must be of the same search, since one mean over different
        searches says nothing. Raises InputError otherwise.
        """
        file = self.file(name)
        if not file.exists():
            return False
        rows = read_csv(file)
        with of_this_version(file):
            for column in key.keys() - {"seed"}:
                rows = rows[rows[column] == key[column]]
            known = set(rows["config"]) - {""} if config is not None else set()
            at = set(rows["seed"]) if "seed" in key else set()
        for text in known:
            theirs, ours = _search_of(_config(file, text)), _search_of(config)
            if odd := [option for option in ours if ours[option] != theirs[option]]:
                raise InputError(
                    f"{self.file(name)}: expected --{odd[0].replace('_', '-')} {theirs[odd[0]]} as in the "
                    f"rows of {' '.join(map(str, key.values()))}, found {ours[odd[0]]}; give the same, or "
                    "another --out"
                )
        return not rows.empty and ("seed" not in key or key["seed"] in at)

    def methods(self, name: str, key: Mapping[str, Any]) -> set[str]:
        """The methods that have a row with these values."""
        if not (file := self.file(name)).exists():
            return set()
        rows = read_csv(file)
        with of_this_version(file):
            return set(rows[(rows[list(key)] == pd.Series(key)).all(axis=1)]["method"])

    def add(self, name: str, rows: pd.DataFrame) -> None:
        """Put rows into their places, over those with the same key, and replace the file as a whole.

        Methods without randomness are measured once and have the same row under every seed.
        """
        key, file = list(KEYS[name]), self.file(name)
        if file.is_file():
            old = read_csv(file)
            if odd := sorted(set(old) ^ set(rows)):
                raise InputError(
                    f"{file}: expected the columns of this version, found others (they differ in "
                    f"{', '.join(odd)}); move the file away to measure it again"
                )
            rows = pd.concat([old, rows]).drop_duplicates(key, keep="last")
        if key == list(METHOD_KEY):
            rows = _under_every_seed(rows)
        self.folder.mkdir(parents=True, exist_ok=True)
        first = [column for column in COLUMNS if column in rows and "method" in rows]
        rows = rows[[*first, *rows.columns.difference(first, sort=False)]]
        rows = rows.sort_values(key, key=self._rank, kind="stable")
        write_file(file, rows.to_csv(index=False))

    def _rank(self, column: pd.Series) -> pd.Series:
        if column.name == "method":  # experts stay in the order in which they were measured
            column = column.mask(kind_of(column) == "expert", BEST_EXPERT)
        known = (ORDER | dict(self.order)).get(str(column.name), ())
        values = dict.fromkeys([*known, *sorted(set(column))])
        return column.map({value: i for i, value in enumerate(values)})


def _config(file: Path, text: str) -> Config:
    """A search as a table has it."""
    try:
        return configure(**json.loads(text))
    except (InputError, ValueError, TypeError) as error:
        raise InputError(
            f"{file}: expected the options of a search in its column config, found others ({error}); move "
            "the file away to measure it again"
        ) from error


def _search_of(config: Any) -> dict[str, Any]:
    """The options that all searches of one mean share."""
    elsewhere = ("seed", "device", "experts", "base", "images", "texts", "multi_task")
    options = (option for part in config.stored().values() for option in part.items())
    return {name: value for name, value in options if name not in elsewhere}


def _under_every_seed(rows: pd.DataFrame) -> pd.DataFrame:
    drawn = rows["method"].isin(STOCHASTIC)
    once = rows[~drawn].drop_duplicates(["group", "size", "method"]).drop(columns="seed")
    seeds = rows[["group", "size", "seed"]].drop_duplicates()
    return pd.concat([once.merge(seeds, on=["group", "size"])[list(rows)], rows[drawn]])


@functools.cache
def commit() -> str:
    """The commit that measures, with a + where files differ from it; empty outside a repository."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    here = Path(__file__).parent
    return subprocess.run(command, capture_output=True, text=True, cwd=here).stdout.strip()


# ---------------------------------------------------------------------------------- what is measured


def load(config: Config) -> Problem:
    """What the config names, as ``train`` loads it, to be scored on its device."""
    return replace(problem_of(at_hand(config.problem)), device=config.run.device)


@functools.lru_cache(maxsize=1)
def _fitted(spec: ProblemSpec, device: str) -> tuple[Problem, float]:
    problem = replace(problem_of(at_hand(spec)), device=device)
    for task in problem.tasks:
        task.split("reward")
    start, pool = time.perf_counter(), problem.pool
    for source, k in itertools.product(pool.sources, range(pool.n_layers)):
        if not pool.depends_on_path(source):
            pool.weights(source, k)
    return problem, time.perf_counter() - start


def fitted(config: Config) -> tuple[Problem, float]:
    """What is loaded, with its data read and every source merged, and when a search would have begun this.

    Jobs of one problem that follow each other in a process share it; the seconds of merging count for each.
    """
    problem, took = _fitted(config.problem, config.run.device)
    return problem, time.perf_counter() - took


def cells(problem: Problem, row: uniform.Row) -> dict[str, Any]:
    """A row of a result table, in %."""
    names = [task.name for task in problem.tasks]
    by_task = " ".join(f"{n}={100 * s:.2f}" for n, s in zip(names, row.scores, strict=True))
    out = {"method": row.name, "mean": round(100 * row.mean, 2), "by_task": by_task}
    out |= {"reward_split": round(100 * row.reward, 2), "evaluations": row.evaluations}
    out |= {"seconds": round(row.seconds, 2), "sees": row.sees, "setting": row.setting}
    return out | {"path": ""}


def chosen(
    job: Job,
    problem: Problem,
    start: float,
    path: Steps,
    reward: float,
    method: str = "",
    evaluations: int | None = None,
) -> dict[str, Any]:
    """The row of a search's path: its score on the test split; ``reward`` in [0, 1] on the reward split.

    ``start``: when the search began; its seconds end here. ``method`` and ``evaluations``: by default the
    key's, else the config's.
    """
    seconds = time.perf_counter() - start
    name = method or job.key.get("method") or searched(job.config)
    n = job.config.run.episodes if evaluations is None else evaluations
    what = "evaluations" if name in rivals.SEARCHES else "episodes"
    took: dict[str, Any] = {"evaluations": n, "seconds": seconds, "reward": reward}
    took["sees"] = seen_by(job.config)
    row = uniform.path_row(problem, name, f"{n} {what}", path, **took)
    return cells(problem, row) | {"path": path_text(path)}


def rules(job: Job) -> Measured:
    """Models as they are, and all merges by rules that see weights alone."""
    problem = load(job.config)
    return {job.table: [cells(problem, row) for row in uniform.rows(problem)]}


def drawn(job: Job) -> Measured:
    """Those of the rules that draw, at another seed."""
    problem = load(job.config)
    return {job.table: [cells(problem, row) for row in uniform.rule_rows(problem, DRAWN)]}


def matched_rules(job: Job) -> Measured:
    """The merges by rules that see inputs."""
    problem = load(job.config)
    return {job.table: [cells(problem, row) for row in matched.rows(problem)]}


def by_gradient(job: Job) -> Measured:
    """The merges that use gradients."""
    problem = load(job.config)
    found = gradients.rows(problem, job.config.run.seed)
    return {job.table: [cells(problem, row) for row in found]}


def _trained(job: Job, problem: Problem, start: float) -> tuple[dict[str, Any], Result]:
    """The row of ``train``, with its seconds from loaded models to the chosen path, and all of its result."""
    found = train(job.config, problem, table=False)
    return chosen(job, problem, start, found.path.path, found.reward), found


def trained(job: Job) -> Measured:
    """A search by ``train``."""
    return {job.table: [_trained(job, *fitted(job.config))[0]]}


def trained_curve(job: Job) -> Measured:
    """The same, and every episode's reward (Fig. 3)."""
    row, result = _trained(job, *fitted(job.config))
    curve = [
        {"episode": e["episode"]} | {k: round(100 * e[k], 2) for k in ("raw_reward", "dar_reward")}
        for e in result.episodes
    ]
    return {f"{job.table}-curve": curve, job.table: [row]}


def _searched(
    job: Job, problem: Problem, start: float, scorer: Scorer
) -> tuple[dict[str, Any], list[tuple[str, float]]]:
    """The row of a search by the key's method, and (path as text, reward) of what it scored."""
    run, method = job.config.run, job.key["method"]
    if method not in rivals.SEARCHES:
        row, result = _trained(job, problem, start)
        return row, legal(result.episodes)
    scored = rivals.SEARCHES[method](scorer, run.episodes, run.seed)
    best = _best_of(scorer, scored, run.finalists)
    return chosen(job, problem, start, best["path"], best["reward"]), scored


def _best_of(scorer: Scorer, scored: rivals.Scored, finalists: int) -> dict[str, Any]:
    """A rival's final choice; of equal ones the last by name, as in the rows that ship."""
    ranked = rank(scorer, candidates(scored, finalists, scored.answers))
    return max(ranked, key=lambda r: (r["reward"], path_text(r["path"])))


def search(job: Job) -> Measured:
    """A search by the key's method; its curve is ``rivals.curve_of``, and at the end its final choice."""
    problem, start = fitted(job.config)
    with closing(make_scorer(problem, job.config)) as scorer:
        row, scored = _searched(job, problem, start, scorer)
        curve = list(rivals.curve_of(scorer, scored))
    curve[-1]["reward_split"] = row["reward_split"]  # what is chosen in the end
    return {f"{job.table}-curve": curve, job.table: [row]}


def search_alone(job: Job) -> Measured:
    """The same without its curve, whose paths are scored on the whole reward split."""
    problem, start = fitted(job.config)
    with closing(make_scorer(problem, job.config)) as scorer:
        return {job.table: [_searched(job, problem, start, scorer)[0]]}


def at_equal_seconds(job: Job) -> Measured:
    """The agent's search, then each rival with the seconds that it took, one after another in this process.

    Seconds are the processor's, so that other work beside does not count; on a GPU those of the clock. They
    are spent on searching, with all fits of layers; the final choice comes on top, for all alike. Every
    search has its problem to itself, so that it finds nothing fitted.
    """
    run, rows = job.config.run, []
    clock = time.process_time if run.device == "cpu" else time.perf_counter
    limit = 0.0
    for method in (searched(job.config), *ON_A_BUDGET):
        problem = load(job.config)
        for task in problem.tasks:
            task.split("reward")
        with closing(make_scorer(problem, job.config)) as scorer:
            start, begun = time.perf_counter(), clock()
            if method in rivals.SEARCHES:
                budget = Deadline(limit, run.episodes, clock)
                scored = rivals.SEARCHES[method](scorer, budget, run.seed)
                took, n = clock() - begun, len(scored)
                best = _best_of(scorer, scored, run.finalists)
            else:
                search = Search.start(job.config, scorer, RunFolder(None))
                run_phases(search)
                took, n = clock() - begun, len(search.episodes)
                limit, best = took, choose(search)[0]
            row = chosen(job, problem, start, best["path"], best["reward"], method, n)
        rows.append(row | {"search_seconds": round(took, 2)})
    return {job.table: rows}


def measure(job: Job) -> dict[str, pd.DataFrame]:
    """The rows of a job, each with its key and its config."""
    out = {}
    for name, rows in job.measure(job).items():
        key = {k: v for k, v in job.key.items() if k in KEYS[name]}
        found = pd.DataFrame(rows).assign(**key)
        if name == job.table:
            found["config"] = json.dumps(describe(job.config))
        else:  # a curve
            found["episodes"] = job.config.run.episodes
        out[name] = found[list(dict.fromkeys([*KEYS[name], *found]))]
    return out


# ----------------------------------------------------------------------------------- all of them


def measure_all(
    jobs: Sequence[Job],
    store: Store,
    processes: int,
    threads: int = 1,
    also: Mapping[str, Any] | None = None,
) -> None:
    """Measure in several processes at once; the rows of each job are stored as soon as it ends.

    also: further columns of every row, and their values, where a row has none of its own.
    """
    commit()  # that of the code which runs, whatever is committed meanwhile
    processes = min(processes, len(jobs))
    options: dict[str, Any] = {"threads": threads, "quiet": True}
    if processes > 1:
        # Or each would take a quarter of the memory, and twice where a search and its curve are scored.
        options["cache_mb"] = free_bytes(jobs[0].config.run.device) / 2**20 / 4 / processes
    jobs = [replace(job, config=configure(job.config, **options)) for job in jobs]
    with closing(in_processes(measure, jobs, processes, threads)) as results:
        for job, tables in tqdm(results, total=len(jobs), unit="job"):
            for name, rows in tables.items():  # the curve first: the row says that all is there
                more = {k: v for k, v in (also or {}).items() if k not in rows}
                store.add(name, rows.assign(commit=commit(), **more))
            key = " ".join(f"{k}={v}" for k, v in job.key.items())
            row = tables[job.table].iloc[-1]
            score = (
                f"{row['method']} {row['mean']:.2f} % of the test split" if "mean" in row else ""
            )
            tqdm.write(f"{time.strftime('%H:%M:%S')} {job.table} {key}: {score}")


def in_processes(
    function: Callable[[Any], Any], items: Sequence[Any], processes: int, threads: int = 1
) -> Generator[tuple[Any, Any]]:
    """Each item with what the function returns of it, in the order in which they end; one is this process."""
    if processes < 2:
        torch.set_num_threads(threads)
        yield from ((item, function(item)) for item in items)
        return
    spawn = multiprocessing.get_context("spawn")
    before = set(psutil.Process().children())
    with ProcessPoolExecutor(processes, spawn, _start, (threads,)) as pool:
        futures = {}
        try:
            for item in items:  # each may start a process: stopped here too, none is waited for
                futures[pool.submit(function, item)] = item
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise InputError(
                f"--jobs: expected {processes} processes that live, found one that was ended ({error}); "
                "where memory is short give fewer: what is done is stored"
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
