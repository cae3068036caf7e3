"""The kit's results from one command each, into ``results/``: means and spread over seeds.

    python -m rmm_lab.tables vision       Tables I and II at our scale: all methods, groups of ViTs
    python -m rmm_lab.tables language     Table III at our scale: all methods, groups of T5s
    python -m rmm_lab.tables dar          Table IV and Fig. 3 at our scale: data share, DAR on and off
    python -m rmm_lab.tables searches     RMM beside other searches at the same number of evaluations

A table is a CSV file; each cell (a group and a seed, say) is written as soon as it is measured, and a
stopped command goes on where it was. Scores are in % of the test split, ``reward_split`` in % of the
split that chose the path. Nothing here is chosen by the test split.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from rmm_lab import baselines, report, runs
from rmm_lab.errors import InputError, one_sentence
from rmm_lab.ppo import Args, Result, train
from rmm_lab.problem import Problem, load_problem
from rmm_lab.scoring import Scorer, reward, shortlist
from rmm_lab.tasks import data_folder

# The groups of experts of each table, by the name that the table calls them.
VISION = {
    "digits+textures": ("digits", "textures"),
    "letters+symbols": ("letters", "symbols"),
    "digits+letters": ("digits", "letters"),
    "digits+letters+textures": ("digits", "letters", "textures"),
}
LANGUAGE = {"qa": ("qa",), "mixed": ("mixed",)}
DATA = (1.0, 0.1, 0.01)  # Table IV's shares of the data
Cell = dict[str, Any]  # one line of a CSV file


@dataclass
class Tables:
    """Measure one table, or go on with it."""

    table: Literal["vision", "language", "dar", "searches"]
    """Which one; see the module's text."""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Seeds of the search."""
    episodes: int = 700
    """Evaluations of each search."""
    only: tuple[str, ...] = ()
    """Groups, or shares of data such as 0.01, to measure now; all by default."""
    out: Path = Path("results")
    """Folder of the CSV files."""
    threads: int = 1
    """CPU threads for torch."""

    def run(self) -> None:
        """Measure what is not in the file yet."""
        torch.set_num_threads(self.threads)
        self.out.mkdir(parents=True, exist_ok=True)
        {
            "vision": self.vision,
            "language": self.language,
            "dar": self.dar,
            "searches": self.searches,
        }[self.table]()

    # ------------------------------------------------------------------------------- the tables

    def vision(self) -> None:
        """All methods on the groups of ViTs, every seed."""
        self._methods("vision", self._wanted(VISION), self.seeds)

    def language(self) -> None:
        """All methods on the groups of T5s, at the first seed alone: tuning the uniform merges takes long."""
        self._methods("language", self._wanted(LANGUAGE), self.seeds[:1])

    def _methods(self, name: str, groups: dict[str, tuple[str, ...]], seeds: Sequence[int]) -> None:
        for group, experts in groups.items():
            for seed in seeds:
                if self._known(name, group=group, seed=seed):
                    continue
                args = self._args(experts=experts, seed=seed)
                problem = load_problem(experts, seed=seed)
                result, seconds = timed(args, problem)
                cells = [
                    cell_of(problem, row) | {"reward_split": "", "seconds": "", "path": ""}
                    for row in baselines.rows(problem)
                ]
                cells.append(found(problem, result, args) | {"seconds": round(seconds, 1)})
                self._add(name, [{"group": group, "seed": seed} | cell for cell in cells])

    def dar(self) -> None:
        """The paper's preset on the demo's pair at 100, 10 and 1 %, with DAR and without; ours beside it.

        At 100 % every episode begins a new window, so DAR has no effect and is measured once.
        """
        settings = [("paper", f, dar) for f in DATA for dar in ((0.8,) if f == 1 else (0.8, 0.0))]
        settings += [("default", f, 0.0) for f in reversed(DATA)]
        shares = self._wanted({f"{f:g}": f for f in DATA}).values()
        for preset, fraction, scale in settings:
            for seed in self.seeds if fraction in shares else ():
                key = {"preset": preset, "data_fraction": fraction, "dar": scale, "seed": seed}
                if self._known("dar", **key):
                    continue
                args = self._args(preset=preset, seed=seed, data_fraction=fraction, dar=scale)
                problem = load_problem(
                    args.experts, operators=args.operators, stem=args.stem, seed=seed
                )
                result, seconds = timed(args, problem)
                cell = found(problem, result, args) | {"seconds": round(seconds, 1)}
                if preset == "paper" and fraction == min(DATA) and seed == self.seeds[0]:
                    curve = [
                        {"dar": scale, "episode": e["episode"]}
                        | {k: round(100 * e[k], 2) for k in ("raw_reward", "dar_reward")}
                        for e in result.episodes
                    ]
                    self._add("dar-curve", curve, "dar")
                self._add("dar", [key | cell])

    def searches(self) -> None:
        """RMM, random search and coordinate ascent; the curve is the incumbent's score on all data."""
        for group, experts in self._wanted(VISION | LANGUAGE).items():
            for seed in self.seeds:
                for method in ("RMM", *SEARCHES):
                    if self._known("searches", group=group, seed=seed, method=method):
                        continue
                    problem = load_problem(experts, seed=seed)
                    args = self._args(experts=experts, seed=seed)
                    key = {"group": group, "seed": seed, "method": method}
                    scorer = problem.scorer(
                        fraction=args.data_fraction, seed=seed, cache_mb=args.cache_mb
                    )
                    if method == "RMM":
                        result, seconds = timed(args, problem)
                        cell = found(problem, result, args)
                        scored = [
                            (e["path"], e["raw_reward"])
                            for e in result.episodes
                            if not e["penalised"]
                        ]
                    else:
                        start = time.perf_counter()
                        pairs = SEARCHES[method](scorer, self.episodes, seed)
                        scored = [(report.text_of(p, scorer.sources), r) for p, r in pairs]
                        cell = self._best(problem, scorer, scored, args)
                        seconds = time.perf_counter() - start
                    curve = [key | c for c in curve_of(scorer, scored)]
                    self._add("searches-curve", curve, *key)
                    self._add("searches", [key | cell | {"seconds": round(seconds, 1)}])

    def _best(
        self, problem: Problem, scorer: Scorer, scored: Sequence[tuple[str, float]], args: Args
    ) -> Cell:
        """The final choice as RMM makes it: the best of the shortlist on the whole reward split."""
        value, text = max((whole(scorer, text), text) for text in shortlist(scored, args.finalists))
        steps, stem = split_stem(text, problem)
        row = baselines.path_row(problem, "", f"{self.episodes} evaluations", steps, stem)
        cell = cell_of(problem, row) | {"reward_split": round(100 * value, 2), "path": text}
        del cell["method"]
        return cell

    # ------------------------------------------------------------------------------- the files

    def _args(self, **options: Any) -> Args:
        return Args(**{"episodes": self.episodes, "threads": self.threads, "quiet": True} | options)

    def _wanted(self, known: dict[str, Any]) -> dict[str, Any]:
        if unknown := set(self.only) - set(known):
            raise InputError(
                f"--only: expected some of {', '.join(known)}, found {unknown.pop()!r}"
            )
        return {name: v for name, v in known.items() if not self.only or name in self.only}

    def _read(self, name: str) -> list[Cell]:
        file = self.out / f"{name}.csv"
        return runs.from_csv(file.read_text("utf-8")) if file.is_file() else []

    def _known(self, name: str, **key: Any) -> bool:
        return any(all(cell[k] == v for k, v in key.items()) for cell in self._read(name))

    def _add(self, name: str, cells: Iterable[Cell], *key: str) -> None:
        """Append to a table, in place of lines with the same key that a stopped command left."""
        cells = [cell | {"episodes": self.episodes, "commit": commit()} for cell in cells]
        kept = [c for c in self._read(name) if not key or any(c[k] != cells[0][k] for k in key)]
        runs.write(self.out / f"{name}.csv", runs.to_csv([*kept, *cells]))
        last = {k: v for k, v in cells[-1].items() if k not in ("path", "by_task", "commit")}
        print(time.strftime("%H:%M:%S"), name, *(f"{k}={v}" for k, v in last.items()), flush=True)


SEARCHES = {
    "random search": baselines.random_search,
    "coordinate ascent": baselines.coordinate_ascent,
}


def timed(args: Args, problem: Problem) -> tuple[Result, float]:
    """A search without its table, and its seconds, from loaded models to the chosen path."""
    for task in problem.tasks:
        task.split("reward")
    start = time.perf_counter()
    result = train(args, problem=problem, table=False)
    return result, time.perf_counter() - start


def cell_of(problem: Problem, row: baselines.Row) -> Cell:
    """A row of a result table as a line of CSV, in %."""
    names = [task.name for task in problem.tasks]
    by_task = " ".join(f"{n}={100 * s:.2f}" for n, s in zip(names, row.scores, strict=True))
    return {
        "method": row.name,
        "setting": row.setting,
        "mean": round(100 * row.mean, 2),
        "by_task": by_task,
    }


def found(problem: Problem, result: Result, args: Args) -> Cell:
    """RMM's line: the chosen path on the test split."""
    path = result.path
    setting = f"{args.episodes} episodes"
    row = baselines.path_row(problem, "RMM", setting, path.steps, path.stem)
    cell = cell_of(problem, row)
    cell["reward_split"] = round(100 * result.reward, 2)
    return cell | {"path": " ".join(f"{s}@{k}" for s, k in [(path.stem, -1), *path.steps])}


def whole(scorer: Scorer, text: str) -> float:
    """The reward of a path, given as text, on the whole reward split."""
    return reward(scorer.score(report.steps_of(text, scorer.sources), None))


def split_stem(text: str, problem: Problem) -> tuple[list[tuple[str, int]], str]:
    """A path as text -> its (source, layer) and its stem."""
    steps = [(s, int(k)) for s, _, k in (step.rpartition("@") for step in text.split())]
    if steps and steps[0][1] < 0:
        return steps[1:], steps[0][0]
    return steps, "base" if problem.stem == "agent" else problem.stem


def curve_of(
    scorer: Scorer, scored: Sequence[tuple[str, float]], every: int = 20
) -> Iterator[Cell]:
    """Every 20 evaluations and at the end: the path that would be chosen now, on the whole reward split.

    These scores serve the plot, and no search sees them.
    """
    for n in sorted({*range(every, len(scored), every), len(scored)}):
        best = shortlist(scored[:n], 1)[0]
        yield {"evaluations": n, "reward_split": round(100 * whole(scorer, best), 2)}


def read(name: str) -> list[Cell]:
    """A table that ships, by its file's name without ``.csv``; InputError where there is none."""
    file = data_folder().parent / "results" / f"{name}.csv"
    if not file.is_file():
        raise InputError(
            f"table {name!r}: expected {file}, found none; take a checkout of the repository, or measure "
            "it with python -m rmm_lab.tables"
        )
    return runs.from_csv(file.read_text("utf-8"))


@functools.cache
def commit() -> str:
    """The commit that measures, with a + where files differ from it; empty outside a repository."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return done.stdout.strip()


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    import tyro

    try:
        tyro.cli(
            Tables,
            args=None if argv is None else list(argv),
            prog="python -m rmm_lab.tables",
            config=(tyro.conf.PositionalRequiredArgs,),
        ).run()
    except (InputError, OSError) as error:
        print(f"\nerror: {one_sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
