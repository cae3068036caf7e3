"""What a search tells and leaves behind: notes, the result table, the files of its run folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from rmm_lab.search import table, uniform
from rmm_lab.search.card import card, escaped
from rmm_lab.search.config import SEARCHED, Config, searched, seen_by
from rmm_lab.search.front_files import write_front
from rmm_lab.search.problem import Problem
from rmm_lab.search.run_folder import RunFolder
from rmm_lab.search.uniform import EXPERT, OWN, Row
from rmm_lab.tasks.files import split_lists, write_file
from rmm_lab.tasks.metrics import PERPLEXITY

if TYPE_CHECKING:
    from rmm_lab.search.pipeline import Result


def notes(tasks: Sequence[Any], splits: Sequence[str]) -> list[str]:
    """What a reader of the scores must know about the data: inputs that were cut, skewed tasks."""
    out: list[str] = []
    for task in tasks:
        out += getattr(task, "notes", ())
        for name in splits:
            if cut := getattr(task.split(name), "cut", 0):
                out.append(
                    f"texts {task.name}: {cut} of {len(task.split(name))} inputs of the {name} split are "
                    f"longer than the {task.format.max_length} tokens that the model takes, and lost "
                    f"their {task.loses}"
                )
        if task.metric == PERPLEXITY:
            out.append(f"texts {task.name}: scored by {PERPLEXITY}, a token's probability")
        elif task.metric != "accuracy":
            out.append(
                f"texts {task.name}: scored by {task.metric} accuracy, the mean over its answers"
            )
    return out


def cost(scorer: Any) -> str:
    """What a search's scores took, in a line: layers that were not computed again, memory in use."""
    times, cache = scorer.work_asked / max(1, scorer.work_run), scorer.cache
    kept = f"{cache.peak / 2**20:.0f} of at most {cache.budget / 2**20:.0f} MiB of activations kept"
    return (
        f"scored {scorer.evaluations} paths: {times:.2f} times as many layers asked for as computed"
        + (f", {kept}, {cache.evicted} forgotten" if cache.peak else "")
    )


def evaluate_on_test(result: Result, problem: Problem, config: Config) -> list[Row]:
    """The rows of the result table: all that a search is compared with, and its path, on the test split."""
    others = table.compared(problem, config.run.compare)
    rows = list(tqdm(others, desc="comparing", unit="row", disable=config.run.quiet))
    n, path = len(result.episodes), result.path.path
    took = {"evaluations": n, "seconds": result.seconds, "reward": result.reward}
    name, setting = searched(config), f"{n} episodes"
    return [*rows, uniform.path_row(problem, name, setting, path, sees=seen_by(config), **took)]


# What makes a good ViT guess, besides training.
CAUSES = (
    "experts or of their images, classes in another order, or another normalisation of the images"
)
NEAR = 2.0  # points: a search's result is hardly another than an unmerged expert's
LUCK = 0.05  # share of the way from chance to 1 that an expert has to be beyond, on its own task


def remarks(rows: Sequence[Row], tasks: Sequence[Any]) -> list[str]:
    """What a reader of a result table must know: no better than an expert, an expert knows nothing."""
    out, means = [], {row.name: 100 * row.mean for row in rows}
    found = next((name for name in SEARCHED if name in means), "")
    for name, mean in means.items():
        gap = means.get(found, np.inf) - mean
        if name.startswith(EXPERT) and round(gap, 9) <= NEAR:
            where = "within 2 points of" if round(gap, 9) >= -NEAR else "below"
            out.append(
                f"the {means[found]:.1f} % of {found} is {where} the {mean:.1f} % of {name}, unmerged, on "
                "all tasks"
            )
    names = [row.name.removeprefix(EXPERT) for row in rows if row.name.startswith(EXPERT)]
    for name, task, score in zip(names, tasks, own_scores(rows) or (), strict=False):
        chance = task.chance("test")
        if score <= chance + LUCK * (1 - chance) and task.metric != PERPLEXITY:
            out.append(
                f"expert {name} has {100 * score:.1f} % on its own task {task.name}, where chance is "
                f"{100 * chance:.1f} %: there is hardly anything to merge; likely causes: the order of the "
                + ("experts or of their data" if hasattr(task, "rows") else CAUSES)
            )
    return out


def own_scores(rows: Sequence[Row]) -> tuple[float, ...] | None:
    """Each expert's score on its own task, in [0, 1]; None where no row says so."""
    return next((row.scores for row in rows if row.name == OWN), None)


def shares_of_experts(rows: Sequence[Row]) -> list[float]:
    """``Row.of_experts`` of each row, 1 for the experts at home; NaN where no row says what they have."""
    own = own_scores(rows)
    return [float("nan") if own is None else row.of_experts(own) for row in rows]


def frame(rows: Sequence[Row], tasks: Sequence[Any]) -> Any:
    """A result table as a DataFrame, in % of the test split.

    ``% of experts`` is the mean over tasks of the score as a share of the own expert's. A task whose metric
    is not accuracy has its accuracy in a column at the end.
    """
    import pandas as pd

    skewed = [t.name for t in tasks if t.metric == "balanced"]
    names = [t.name if t.metric == "accuracy" else f"{t.name} ({t.metric})" for t in tasks]
    lines = [
        {"method": row.name}
        | {name: 100 * s for name, s in zip(names, row.scores, strict=True)}
        | {"mean": 100 * row.mean, "% of experts": 100 * share, "sees": row.sees}
        | {"evaluations": row.evaluations, "seconds": row.seconds, "setting": row.setting}
        | {f"{name} (accuracy)": 100 * row.plain[name] for name in skewed}
        for row, share in zip(rows, shares_of_experts(rows), strict=True)
    ]
    return pd.DataFrame(lines)


def _markdown(rows: Sequence[Row], tasks: Sequence[Any], tablefmt: str) -> str:
    found = frame(rows, tasks).astype(object)
    if tablefmt == "pipe":
        found = found.map(lambda v: escaped(v) if isinstance(v, str) else v).rename(columns=escaped)
    found = found.astype(object).where(found.notna(), None)  # last: map makes NaN of None
    return str(found.to_markdown(index=False, floatfmt=".1f", tablefmt=tablefmt, missingval=""))


def title(tasks: Sequence[Any]) -> str:
    """What a result table holds."""
    what = "metric" if any(task.metric != "accuracy" for task in tasks) else "accuracy"
    return f"{what} on the test split, %"


def plain(rows: Sequence[Row], tasks: Sequence[Any]) -> str:
    """A result table for a terminal, with its title and remarks."""
    notes = "".join(f"\nnote: {remark}" for remark in remarks(rows, tasks))
    return f"\n{title(tasks)}\n{_markdown(rows, tasks, 'plain')}{notes}"


def to_json(rows: Sequence[Row], tasks: Sequence[Any]) -> str:
    """A result table as table.json holds it; what was not measured is null."""

    def number(value: float) -> float | None:
        return None if np.isnan(value) else value

    names = [task.name for task in tasks]
    data = [
        {"name": row.name, "setting": row.setting, "mean": row.mean}
        | {"scores": dict(zip(names, row.scores, strict=True))}
        | ({"accuracy": row.plain} if row.plain else {})
        | {"of_experts": number(share), "sees": row.sees, "evaluations": row.evaluations}
        | {"seconds": number(row.seconds), "reward": number(row.reward)}
        for row, share in zip(rows, shares_of_experts(rows), strict=True)
    ]
    return json.dumps(data, indent=2) + "\n"


def write_model(result: Result, problem: Problem, folder: RunFolder) -> None:
    """Write policy, path, finalists and the merged model, what is left of an earlier one too."""
    from safetensors.torch import save

    assert folder.path is not None
    pool, path, merged = problem.pool, result.path, folder.path / "merged"
    folder.write("policy.safetensors", save(result.agent.state_dict()))
    folder.write("policies.safetensors", save({"policies": result.policies}))
    folder.write("path.json", path.to_json())
    folder.write("finalists.json", json.dumps(result.finalists, indent=2) + "\n")
    scratch = folder.path / ".merged.tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        path.save_pretrained(scratch, pool)
        merged.mkdir(exist_ok=True)
        for file in sorted(scratch.iterdir(), key=lambda file: file.name == "config.json"):
            file.replace(merged / file.name)  # the config comes last: with it, all is there
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if lists := split_lists(problem.tasks):  # what was trained on, searched with and reported
        write_file(merged / "splits.csv", lists)
    write_file(merged / "README.md", card(path, pool))


def write_tables(result: Result, rows: Sequence[Row], problem: Problem, folder: RunFolder) -> None:
    """Write notes, the table, where there are rows, the model's card with it, and the figures."""
    from rmm_lab.figures import paths as figures
    from rmm_lab.figures import render
    from rmm_lab.figures.results import cross_task_picture

    assert folder.path is not None
    pool, tasks, path = problem.pool, problem.tasks, result.path
    splits = ("reward", "test") if rows else ("reward",)
    said = [*problem.notes(), *notes(tasks, splits), *(remarks(rows, tasks) if rows else ())]
    folder.write("notes.json", json.dumps(said, indent=2, ensure_ascii=False) + "\n")
    if rows:
        below = "".join(f"\n{escaped(note)}.\n" for note in said)
        folder.write("table.md", f"{_markdown(rows, tasks, 'pipe')}\n{below}")
        folder.write("table.json", to_json(rows, tasks))
        folder.write("merged/README.md", card(path, pool, _markdown(rows, tasks, "pipe")))
        experts = [r for r in rows if r.name.startswith(EXPERT)]
        picture = cross_task_picture(
            {r.name.removeprefix(EXPERT): r.scores for r in experts}, [t.name for t in tasks]
        )
        folder.write("cross-task.png", render.png(picture))
    if result.front is not None:
        write_front(result.front, folder)
    folder.write("rewards.png", render.png(figures.reward_curve(result.episodes)))
    names, members = pool.sources, pool.members
    picture = figures.path_picture(path.path, names, pool.n_layers, pool.stacks, members=members)
    folder.write("path.png", render.png(picture))
