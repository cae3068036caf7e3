"""A search from models to a merged model: phases, final choice, test split, results.

    for phase in (uniform_phase, agent_phase, scales_phase): phase(search)

The final path is chosen on the whole reward split; the test split is scored only after that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from rmm_lab import ppo
from rmm_lab.errors import InputError
from rmm_lab.layers import LayerPool
from rmm_lab.path import LayerPath
from rmm_lab.reward import path_text
from rmm_lab.search import mergekit, report
from rmm_lab.search.card import scales_of
from rmm_lab.search.config import Config, check_depth, read_config
from rmm_lab.search.front import Front, front_of
from rmm_lab.search.front import check as check_front
from rmm_lab.search.made_of import made_of
from rmm_lab.search.phases import (
    Search,
    agent_phase,
    choose,
    make_env,
    make_scorer,
    scales_phase,
    uniform_phase,
    view_of,
)
from rmm_lab.search.problem import Problem, at_rest, check_places, places_of, problem_of
from rmm_lab.search.run_folder import Row, RunFolder, opened
from rmm_lab.tasks.hold import check_apart, check_new


@dataclass
class Result:
    """What a search arrived at.

    ``path``: the chosen layer path. ``reward``: its score on the whole reward split, in [0, 1].
    ``episodes``, ``updates``: one row each, as in the run folder. ``policies``: (U, P, A), see
    ``mean_policy``. ``scores``: method -> task -> test metric in [0, 1]; empty if ``train`` was told not to
    report. ``agent``: the trained policy. ``finalists``: the candidates for the path, the best first.
    ``pool``: what the path was chosen from, to build it: ``path.build(pool)``.
    ``seconds``: from loaded models to the path; NaN for a run that was resumed.
    ``front``: with ``run.front``.
    """

    path: LayerPath
    reward: float
    episodes: list[Row]
    updates: list[Row]
    policies: Tensor
    scores: dict[str, dict[str, float]]
    agent: ppo.Agent
    folder: Path | None = None
    finalists: list[Row] = field(default_factory=list)
    seconds: float = float("nan")
    pool: LayerPool | None = None
    front: Front | None = None


# ----------------------------------------------------------------------------------------- the whole


def run_phases(search: Search) -> None:
    """All phases in turn, under a progress bar."""
    run = search.config.run
    bar = tqdm(total=run.episodes, initial=len(search.episodes), unit="ep", disable=run.quiet)
    with bar:
        for phase in (uniform_phase, agent_phase, scales_phase):
            for n in phase(search):
                recent = [e["raw_reward"] for e in search.episodes[-50:]]
                bar.set_postfix_str(f"last 50: {100 * sum(recent) / len(recent):.1f} %")
                bar.update(n)


def train(
    config: Config,
    problem: Problem | None = None,
    *,
    table: bool = True,
    above: Path | None = None,
) -> Result:
    """The main job: load, search, choose a path on the reward split, report on the test split once.

    Args:
        config: see ``configure``.
        problem: what is merged, if it is loaded already; its ``spec`` then takes the place of
            ``config.problem``.
        table: whether to score the test split.
        above: where neither ``run_dir`` nor ``resume`` is given, the folder in which the search makes one
            of its own.

    Raises InputError for bad input, before anything is written, and where another process holds the folder.
    Ctrl-C leaves a folder to resume. Threads, random state and allocator of the caller stay as they are.
    """
    run = config.run
    if problem is not None:
        config = dataclasses.replace(config, problem=problem.spec)
    if (place := run.resume or run.run_dir or above) is not None:
        option = "--run-dir" if run.resume is None else "--resume"
        check_apart(place, option, places_of(config.problem))
    if run.resume is not None:
        check_same_config(config, RunFolder(run.resume).read_config())
    elif run.run_dir is not None:
        check_new(run.run_dir)
    with contextlib.ExitStack() as ends:
        ends.enter_context(_threads(run.threads))
        place = ends.enter_context(opened(None, run.resume, None))
        problem = problem_of(config.problem) if problem is None else problem
        if run.export:
            mergekit.check_family(problem.pool)
        splits = ("reward", "test") if table else ("reward",)
        for task in problem.tasks:  # broken data must show before anything is written
            for split in splits:
                task.split(split)
        say = (lambda *a: None) if run.quiet else print
        for note in [*problem.notes(), *report.notes(problem.tasks, splits)]:
            say(f"note: {note}")
        scorer = make_scorer(problem, config)
        with contextlib.closing(scorer):
            check_depth(scorer, config)
            check_front(run, scorer)
            make_env(view_of(scorer, config), config)  # wrong bounds must show before a folder does
            parts = made_of(problem, config, splits)
            if place is not None:
                folder = RunFolder(place, parts)
            else:
                place = ends.enter_context(opened(run.run_dir, None, above))
                stored = dataclasses.replace(config, problem=at_rest(config.problem)).stored()
                folder = RunFolder.create(place, stored, parts)
            known = folder.load_checkpoint(run.episodes)  # refused before anything is written
            if folder.path is not None:
                problem.keep_converted(folder.path / "converted")
            start = time.perf_counter()
            search = Search.start(config, scorer, folder, known)
            run_phases(search)
            finalists = choose(search)
            seconds = time.perf_counter() - start if run.resume is None else float("nan")
            front = front_of(search) if run.front else None
        say(report.cost(scorer))
        best = finalists[0]
        stem = "base" if problem.stem == "agent" else problem.stem
        path = LayerPath.of(problem.pool, best["path"], stem)
        result = Result(
            path=path,
            reward=best["reward"],
            episodes=search.episodes,
            updates=search.updates,
            policies=torch.stack(search.policies) if search.policies else torch.zeros(0, 0, 0),
            scores={},
            agent=search.agent,
            folder=folder.path,
            finalists=[row | {"path": path_text(row["path"])} for row in finalists],
            seconds=seconds,
            pool=problem.pool,
            front=front.on_test(problem) if front is not None and table else front,
        )
        if folder.path is not None:  # before what may fail: tables, figures, a closed console
            report.write_model(result, problem, folder)
        scales = scales_of(path, problem.pool)
        say(f"path: {path_text(path.path)}" + (f" ({scales})" if scales else ""))
        how = f"on the whole reward split, best of {len(finalists)}"
        how += f" for {run.prefer}" if run.prefer else ""
        say(f"reward: {100 * result.reward:.2f} % {how}")
        rows = report.evaluate_on_test(result, problem, config) if table else []
        names = [task.name for task in problem.tasks]
        result.scores = {r.name: dict(zip(names, r.scores, strict=True)) for r in rows}
        if rows:
            say(report.plain(rows, problem.tasks))
        if folder.path is not None:
            report.write_tables(result, rows, problem, folder)
            if run.export:
                say(mergekit.write(path, problem.pool, folder))
            if result.front is not None:
                said = f"the knee is {result.front.knee}; all are in {folder.path / 'front.md'}"
                say(
                    f"front: {len(result.front.points)} of {result.front.finalists} finalists; {said}"
                )
            say(f"\nwritten: {folder.path} (the merged model: {folder.path / 'merged'})")
    return result


def check_same_config(config: Config, stored: dict[str, Any]) -> None:
    """InputError unless a run that is resumed has the options that it had before."""
    folder = config.run.resume
    old = read_config(stored, folder or "")
    check_places(old.problem)
    before, now = (
        dataclasses.replace(c, problem=at_rest(c.problem)).stored() for c in (old, config)
    )
    for part, values in now.items():
        for name, value in values.items():
            if (was := before[part][name]) != value:
                shown = "none" if was in (None, "") else was
                raise InputError(
                    f"--resume: expected --{name.replace('_', '-')} {shown} as in {folder}, "
                    f"found {value}; leave the option out, or start a new run"
                )


@contextlib.contextmanager
def _threads(n: int) -> Iterator[None]:
    """torch's threads, as long as the block runs; 0 leaves them."""
    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
