"""What a search tells and leaves behind: notes, the result table, the files of its run folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rmm_lab.path import LayerPath
from rmm_lab.search import uniform
from rmm_lab.search.problem import Problem
from rmm_lab.search.run_folder import RunFolder
from rmm_lab.search.uniform import Row

if TYPE_CHECKING:
    from rmm_lab.search.pipeline import Result


def notes(tasks: Sequence[Any], splits: Sequence[str]) -> list[str]:
    """What a reader of the scores must know about the data: inputs that were cut, skewed tasks."""
    out = []
    for task in tasks:
        for name in splits:
            if cut := getattr(task.split(name), "cut", 0):
                out.append(
                    f"texts {task.name}: {cut} of {len(task.split(name))} inputs of the {name} split are "
                    f"longer than the {task.format.max_length} tokens that the model takes, and lost "
                    "their end"
                )
        if task.metric != "accuracy":
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


def evaluate_on_test(path: LayerPath, problem: Problem, episodes: int) -> list[Row]:
    """The rows of the result table: all that a search is compared with, and its path, on the test split."""
    row = uniform.path_row(problem, "RMM", f"{episodes} episodes", path.path)
    return [*uniform.rows(problem), row]


def frame(rows: Sequence[Row], tasks: Sequence[Any]) -> Any:
    """A result table as a DataFrame, in % of the test split.

    A task whose metric is not accuracy has its accuracy in a column at the end.
    """
    import pandas as pd

    skewed = [t.name for t in tasks if t.metric != "accuracy"]
    names = [f"{t.name} ({t.metric})" if t.name in skewed else t.name for t in tasks]
    table = [
        {"method": row.name}
        | {name: 100 * s for name, s in zip(names, row.scores, strict=True)}
        | {"mean": 100 * row.mean, "setting": row.setting}
        | {f"{name} (accuracy)": 100 * row.plain[name] for name in skewed}
        for row in rows
    ]
    return pd.DataFrame(table)


def title(tasks: Sequence[Any]) -> str:
    """What a result table holds."""
    what = "metric" if any(task.metric != "accuracy" for task in tasks) else "accuracy"
    return f"{what} on the test split, %"


def plain(rows: Sequence[Row], tasks: Sequence[Any]) -> str:
    """A result table for a terminal."""
    return frame(rows, tasks).to_markdown(index=False, floatfmt=".1f", tablefmt="plain")


def write_results(result: Result, rows: Sequence[Row], problem: Problem, folder: RunFolder) -> None:
    """Write policy, path, finalists, table, figures and the merged model into the run folder."""
    from safetensors.torch import save

    from rmm_lab.figures import paths as figures

    assert folder.path is not None
    pool, tasks, path = problem.pool, problem.tasks, result.path
    folder.write("policy.safetensors", save(result.agent.state_dict()))
    folder.write("policies.safetensors", save({"policies": result.policies}))
    folder.write("path.json", path.to_json())
    folder.write("finalists.json", json.dumps(result.finalists, indent=2) + "\n")
    if rows:
        below = "".join(f"\n{note}.\n" for note in notes(tasks, ("reward", "test")))
        table = frame(rows, tasks).to_markdown(index=False, floatfmt=".1f")
        folder.write("table.md", f"{table}\n{below}")
        data = [
            {"name": r.name, "setting": r.setting, "mean": r.mean, "scores": result.scores[r.name]}
            | ({"accuracy": r.plain} if r.plain else {})
            for r in rows
        ]
        folder.write("table.json", json.dumps(data, indent=2) + "\n")
    folder.write("rewards.png", figures.png(figures.reward_curve(result.episodes)))
    picture = figures.path_picture(path.path, pool.sources, pool.n_layers, stacks=pool.stacks)
    folder.write("path.png", figures.png(picture))
    merged = folder.path / "merged"
    if not (merged / "config.json").is_file():  # the file that is written last
        shutil.rmtree(merged, ignore_errors=True)
        path.save_pretrained(merged, pool)
