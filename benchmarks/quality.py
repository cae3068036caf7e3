"""Time to a good model: the test score of the best path so far, against seconds.

    python -m benchmarks.quality                          the demo's pair, three seeds; a quarter of an hour
    python -m benchmarks.quality --groups qa --seeds 1    another group of the tables
    python -m benchmarks.quality --groups CIFAR10+GTSRB --real FOLDER --base BASE \\
        --episodes 200 --calibration 100                  a base that others trained: docs/real-models.md

Each method has its problem to itself, in a process of its own with one thread, and begins once models and
data are read. Seconds are the processor's, so that other work beside does not count; only where workers are
compared they are the clock's. While a method runs, nothing is scored on the test split: the paths that were
its best by reward, and the one that it chose, are scored after it. Rows go to ``results/quality.csv``, the
figure to ``results/quality.png``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from rmm_lab.tasks.console import run_module

if __name__ == "__main__":  # here, so that Ctrl-C is a sentence while torch is imported
    sys.exit(run_module("benchmarks.quality:Quality", "finished groups are stored"))

import numpy as np
import pandas as pd

from benchmarks.bench import Row, in_process, machine, plain_way
from rmm_lab import reward
from rmm_lab.engine.scorer import Scorer
from rmm_lab.errors import InputError
from rmm_lab.evidence import tables
from rmm_lab.evidence.kit_scale import kit_groups
from rmm_lab.evidence.measure import commit
from rmm_lab.evidence.paper_scale import Group
from rmm_lab.evidence.real_scale import PAIR, SETS
from rmm_lab.evidence.rows import KINDS
from rmm_lab.figures.paths import COLOURS, panels, tidy
from rmm_lab.figures.render import png
from rmm_lab.figures.searches import ABOVE
from rmm_lab.search import matched, rivals, uniform
from rmm_lab.search.config import configure
from rmm_lab.search.finalists import candidates, rank
from rmm_lab.search.phases import make_scorer
from rmm_lab.search.pipeline import train
from rmm_lab.search.problem import Problem, problem_of
from rmm_lab.tasks.files import write_file

PLAIN, PAPER, OURS = "RMM (paper), plain way", "RMM (paper)", "RMM (agent)"
RIVALS = ("CMA-ES over scales", "coordinate ascent")
UNIFORM = ("weight average", "least squares", matched.WEIGHTED)
WORKERS = {f"{OURS}, 1 worker": 1, f"{OURS}, 2 workers": 2}  # by the clock
METHODS = (PLAIN, PAPER, OURS, *RIVALS, *UNIFORM, *WORKERS)
REAL = "+".join(SETS[name] for name in PAIR)
SAMPLE = 24  # paths of the paper's preset that are also scored in the plain way


@dataclass
class Quality:
    """Measure the time to a good model."""

    groups: tuple[str, ...] = ("digits+textures",)
    """Groups of experts, by their names in the tables."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of the searches."""
    episodes: int = 700
    """Evaluations of each search, on 10 % of the reward split."""
    calibration: int = 500
    """Inputs per task that least squares looks at."""
    real: Path | None = None
    """The folder --work of ``tables real``, with the experts of its pair, a further group."""
    base: str | None = None
    """The base of that pair."""
    out: Path = Path("results")
    """Folder of the CSV file and the figure."""

    def run(self) -> None:
        """Measure what is not in the file yet; store and print."""
        known = {g.name: g for name in ("II", "groups", "III") for g in kit_groups()[name]}
        if self.real is not None:
            known[REAL] = real_pair(self.real, self.base)
        if odd := set(self.groups) - set(known):
            raise InputError(
                f"--groups: expected some of {', '.join(known)}, found {odd.pop()!r}; correct it"
            )
        file = self.out / "quality.csv"
        self.out.mkdir(parents=True, exist_ok=True)
        for name in self.groups:
            for seed in self.seeds:
                for method in METHODS[1:]:  # the plain way is measured with the paper's preset
                    old = pd.read_csv(file) if file.is_file() else pd.DataFrame()
                    if (
                        len(old)
                        and (
                            (old.group == name) & (old.seed == seed) & (old.method == method)
                        ).any()
                    ):
                        continue
                    print(time.strftime("%H:%M:%S"), name, method, seed, flush=True)
                    options = known[name].options | {"seed": seed, "calibration": self.calibration}
                    rows = in_process(partial(measured, method, self.episodes, options))
                    new = pd.DataFrame(rows).assign(machine=machine(), commit=commit())
                    new.insert(0, "group", name)
                    new.insert(1, "seed", seed)
                    write_file(file, pd.concat([old, new]).to_csv(index=False))
        rows = pd.read_csv(file)
        write_file(self.out / "quality.png", png(picture(rows)))
        print(markdown(rows))


# ------------------------------------------------------------------------------------ a method


def real_pair(work: Path, base: str | None) -> Group:
    """The pair of ``tables real``, whose experts and sets are there already."""
    if base is None:
        raise InputError("--base: expected the base of the experts in --real, found none; name it")
    experts, images = (
        tuple(str(work / folder / n) for n in PAIR) for folder in ("experts", "sets")
    )
    for folder in experts + images:
        if not Path(folder).is_dir():
            raise InputError(
                f"--real: expected {folder}, found none; make it with python -m rmm_lab tables real"
            )
    return Group(REAL, "", {"base": base, "experts": experts, "images": images})


@dataclass
class Best:
    """The best path so far, each time that it changes."""

    clock: Callable[[], float] = time.process_time
    begun: float = field(init=False)
    asked: list[tuple[reward.Path, int | None, float]] = field(default_factory=list)
    found: list[tuple[float, int, reward.Path]] = field(
        default_factory=list
    )  # seconds, evaluations
    most: float = -np.inf

    def __post_init__(self) -> None:
        self.begun = self.clock()

    def seconds(self) -> float:
        """Since the beginning."""
        return self.clock() - self.begun

    def note(self, path: reward.Path, subset: int | None, worth: float) -> None:
        """An evaluation; those on the whole split are of the final choice."""
        self.asked.append((path, subset, worth))
        if subset is not None and worth > self.most:
            self.most = worth
            self.end(path)

    def end(self, path: reward.Path) -> None:
        """What is best from now on."""
        self.found.append((self.seconds(), len(self.asked), path))


def measured(method: str, episodes: int, options: dict[str, Any]) -> list[Row]:
    """What was best when, and its score on the test split; of the paper's preset in the plain way too."""
    preset = "paper" if method == PAPER else "default"
    calibration = {} if preset == "paper" else {"calibration": options["calibration"]}
    own = {k: v for k, v in options.items() if k != "calibration"} | calibration
    workers = WORKERS.get(method, 1)
    config = configure(
        preset, **own, episodes=episodes, quiet=True, data_fraction=0.1, workers=workers
    )
    problem = problem_of(config.problem)
    for task in problem.tasks:
        task.split("reward")
    if method in UNIFORM:
        best = merged(problem, method)
        return [{"method": method} | row for row in scored(problem, best)]
    with closing(make_scorer(problem, config)) as scorer:
        with watched(time.perf_counter if method in WORKERS else time.process_time) as best:
            if method in RIVALS:
                found = rivals.SEARCHES[method](scorer, episodes, config.run.seed)
                ranked = rank(scorer, candidates(found, config.run.finalists, found.answers))
                best.end(max(ranked, key=lambda row: row["reward"])["path"])
            else:
                best.end(train(config, problem, table=False).path.path)
        rows = [{"method": method} | row for row in scored(problem, best)]
        if method == PAPER:
            rows += list(in_the_plain_way(problem, scorer, best, rows))
    return rows


def in_the_plain_way(
    problem: Problem, scorer: Scorer, best: Best, rows: Sequence[Row]
) -> Iterator[Row]:
    """The same search with whole models that remember nothing; the agent's own seconds do not count."""
    seconds = plain_way(problem, scorer, best.asked, SAMPLE, time.process_time)["seconds"]
    examples = [
        sum(len(scorer.rows(i, s)) for i in range(scorer.n_models)) for _, s, _ in best.asked
    ]
    share = np.cumsum(examples) / sum(examples)
    for row in rows:
        at = round(seconds * float(share[row["evaluations"] - 1]), 3)
        yield row | {"method": PLAIN, "seconds": at}


@contextmanager
def watched(clock: Callable[[], float]) -> Iterator[Best]:
    """Note each score that a search asks for, and when."""
    best, score = Best(clock), Scorer.score

    def noted(scorer: Scorer, path: reward.Path, subset: int | None = None) -> np.ndarray:
        scores = score(scorer, path, subset)
        best.note(path, subset, reward.reward(scores))
        return scores

    with mock.patch.object(Scorer, "score", noted):
        yield best


def merged(problem: Problem, method: str) -> Best:
    """Whole models: the average, one fit by least squares, or the weights of the tasks tuned."""
    best = Best()
    source = matched.MATCHED.get(method, "weight_average")
    if method == matched.WEIGHTED:
        weights, _, n = matched.weigh(problem)
        source = matched.source_of(weights)
        best.asked = [((), None, 0.0)] * n
    path = uniform.uniform_path(problem, source)
    for m, step in enumerate(path[1:], 1):
        problem.pool.layer(*step, prefix=path[:m])
    best.end(path)
    return best


def scored(problem: Problem, best: Best) -> Iterator[Row]:
    """What was best when, on the test split; the last row is what was chosen in the end."""
    known: dict[reward.Path, float] = {}
    for n, (seconds, evaluations, path) in enumerate(best.found):
        if path not in known:
            scores = reward.evaluate(problem.pool, problem.tasks, path, "test", problem.device)
            known[path] = round(100 * float(scores.mean()), 2)
        last = n == len(best.found) - 1
        yield {
            "seconds": round(seconds, 3),
            "evaluations": evaluations,
            "test": known[path],
            "chosen": last,
        }


# ---------------------------------------------------------------------------------- the output


def targets(rows: pd.DataFrame, group: str) -> dict[str, float]:
    """Test scores that are worth reaching, in %: name -> score."""
    end = rows[(rows["group"] == group) & rows["chosen"]].groupby("method")["test"].mean()
    vision = "vision" if group in tables.VISION else "language"
    table = tables.read("real/vision" if group == REAL else vision)
    rules = table[(table["group"] == group) & table["method"].isin(KINDS["uniform"])]
    return {
        f"{PAPER}'s": float(end[PAPER]),
        "the best rule's without inputs": float(rules.groupby("method")["mean"].mean().max()),
        f"99 % of {OURS}'s": 0.99 * float(end[OURS]),
    }


def seconds_to(rows: pd.DataFrame, target: float) -> pd.Series:
    """Of each seed, the seconds until the best path so far first has a test score; NaN where it never has."""
    there = rows[rows["test"] >= target].groupby("seed")["seconds"].min()
    return there.reindex(rows["seed"].unique())


def table(rows: pd.DataFrame, group: str) -> pd.DataFrame:
    """Each method's seconds, in all and to each target, means over seeds."""
    out, aims = {}, targets(rows, group)
    for method in METHODS:
        own = rows[(rows["group"] == group) & (rows["method"] == method)]
        end = own[own["chosen"]]
        line = {
            "test split, %": f"{end['test'].mean():.1f}",
            "seconds": f"{end['seconds'].mean():.1f}",
        }
        for name, target in aims.items():
            found = seconds_to(own, target)
            n, seconds = int(found.notna().sum()), found.mean()
            text = f"{seconds:.1f}" if n else "never"
            line[f"to {name}: {target:.1f}"] = text + (
                f" ({n} of {len(found)})" if 0 < n < len(found) else ""
            )
        out[method] = line
    return pd.DataFrame(out).T.rename_axis("method")


def markdown(rows: pd.DataFrame) -> str:
    """The tables of docs/performance.md."""
    parts = []
    for group, own in rows.groupby("group", sort=False):
        seeds = ", ".join(map(str, sorted(own["seed"].unique())))
        parts.append(
            f"{group}, seeds {seeds}:\n\n{table(rows, group).to_markdown(disable_numparse=True)}\n"
        )
    return "\n".join(parts)


def picture(rows: pd.DataFrame) -> Any:
    """Test score against seconds: a step line for each method and seed."""
    groups = list(rows["group"].unique())
    figure, axes = panels(len(groups), min(2, len(groups)), 7, 4, 0.5)
    for ax, group in zip(axes, groups, strict=True):
        for method, colour in zip(METHODS, COLOURS, strict=False):  # without those by the clock
            own = rows[(rows["group"] == group) & (rows["method"] == method)]
            for n, (_, line) in enumerate(own.groupby("seed")):
                label = None if n else method
                ax.step(
                    line["seconds"], line["test"], where="post", color=colour, label=label, lw=1.2
                )
                ax.plot(line["seconds"].iloc[-1], line["test"].iloc[-1], "o", color=colour, ms=4)
        ax.set_xscale("log")
        tidy(ax, group, "seconds of the processor, one thread", "best path so far, test split, %")
    figure.legend(*axes[0].get_legend_handles_labels(), ncols=4, **ABOVE)
    return figure
