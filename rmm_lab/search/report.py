"""What a search shows and leaves behind: the progress line, the result table, files of the run folder."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rmm_lab.engine.scorer import Blocks, Path, reward, text_of
from rmm_lab.engine.scorer import steps_of as steps_of  # for those who look for it here
from rmm_lab.search import uniform as baselines
from rmm_lab.search.problem import Problem
from rmm_lab.search.run_folder import RunFolder
from rmm_lab.search.uniform import Row

if TYPE_CHECKING:
    from rmm_lab.ppo import Result


WIDEST = 120  # characters of a path in the progress line


# ---------------------------------------------------------------------------------------- episodes


def episode_row(
    episode: int, update: int, steps: dict[str, list[Any]], info: dict[str, Any], env: Any
) -> dict[str, Any]:
    """One line of episodes.csv: what was done, raw scores per task, raw and DAR reward apart."""
    scorer = env.unwrapped.scorer
    scores = info.get("scores") or dict.fromkeys(scorer.task_names, "")
    path = scorer.expand(info["path"]) if isinstance(scorer, Blocks) else info["path"]
    return {
        "episode": episode,
        "update": update,
        "subset": info["subset"],
        "raw_reward": info["raw_reward"],
        "dar_reward": info["dar_reward"],
        "penalised": int(info["penalised"]),
        **{f"score_{name}": value for name, value in scores.items()},
        "depth": sum(k >= 0 for _, k in path),
        "actions": " ".join(map(str, steps["action"])),
        "path": text_of(path, scorer.sources),
    }


def scored_row(
    episode: int, update: int, path: Path, subset: int, scores: Any, scorer: Any
) -> dict[str, Any]:
    """The same line for a path that no agent walked: without actions, and DAR leaves it alone."""
    value = reward(scores)
    return {
        "episode": episode,
        "update": update,
        "subset": subset,
        "raw_reward": value,
        "dar_reward": value,
        "penalised": 0,
        **{f"score_{n}": s for n, s in zip(scorer.task_names, scores.tolist(), strict=True)},
        "depth": sum(k >= 0 for _, k in path),
        "actions": "",
        "path": text_of(path, scorer.sources),
    }


class Progress:
    """A live line: episode, rewards, best path so far, time left. On a terminal it rewrites itself."""

    def __init__(self, total: int, before: Sequence[dict[str, Any]], *, quiet: bool) -> None:
        self.total, self.start, self.quiet = total, len(before), quiet
        self.began = self.shown = time.perf_counter()
        fair = [(e["raw_reward"], e["path"]) for e in before if not e["penalised"]]
        self.best: tuple[float, str] = max(fair, default=(-1.0, ""))
        self.live = sys.stdout.isatty()

    def show(self, episodes: Sequence[dict[str, Any]]) -> None:
        """Show the newest episode, at most five times a second (every 10 s where nobody watches)."""
        last, now = episodes[-1], time.perf_counter()
        if not last["penalised"]:
            self.best = max(self.best, (last["raw_reward"], last["path"]))
        if self.quiet or (
            now - self.shown < (0.2 if self.live else 10) and len(episodes) < self.total
        ):
            return
        self.shown = now
        recent = [e["raw_reward"] for e in episodes[-50:]]
        left = (now - self.began) / (len(episodes) - self.start) * (self.total - len(episodes))
        line = (
            f"episode {len(episodes)}/{self.total}  reward {100 * last['raw_reward']:.1f}  "
            f"DAR {100 * last['dar_reward']:.1f}  last 50 {100 * sum(recent) / len(recent):.1f}  "
            f"best {100 * self.best[0]:.1f} ({shortened(self.best[1])})  {left:.0f} s left"
        )
        print(f"\r\x1b[K{line}" if self.live else line, end="" if self.live else "\n", flush=True)

    def end(self) -> None:
        """Leave the live line."""
        if not self.quiet and self.live:
            print()


def shortened(path: str) -> str:
    """A path as text, in a line's length: scales of each layer would fill six."""
    return path if len(path) <= WIDEST else f"{path[: WIDEST - 4].rpartition(' ')[0]} ..."


def cost(scorer: Any) -> str:
    """What a search's scores took, in a line: layers that were not computed again, memory in use."""
    times = scorer.work_asked / max(1, scorer.work_run)
    cache = scorer.cache
    kept = f"{cache.peak / 2**20:.0f} of at most {cache.budget / 2**20:.0f} MiB of activations kept"
    return (
        f"scored {scorer.evaluations} paths: {times:.2f} times as many layers asked for as computed"
        + (f", {kept}, {cache.evicted} forgotten" if cache.peak else "")
    )


# ----------------------------------------------------------------------------------------- results


def _table(rows: Sequence[Row], tasks: Sequence[Any]) -> list[list[str]]:
    """Cells in percent, head first. A task whose metric is not accuracy has its accuracy at the end."""
    names = [t.name if t.metric == "accuracy" else f"{t.name} ({t.metric})" for t in tasks]
    skewed = [t.name for t in tasks if t.metric != "accuracy"]
    extra = [f"{name} (accuracy)" for name in skewed]
    table = [["method", *names, "mean", "setting", *extra]]
    for row in rows:
        cells = [f"{100 * s:.1f}" for s in (*row.scores, row.mean)]
        beside = [f"{100 * row.plain[name]:.1f}" for name in skewed]
        table.append([row.name, *cells, row.setting, *beside])
    return table


def markdown(rows: Sequence[Row], tasks: Sequence[Any]) -> str:
    """A result table in Markdown; percent of the test split."""
    head, *body = _table(rows, tasks)
    n = len(tasks) + 1
    rule = "|---|" + "---:|" * n + "---|" + "---:|" * (len(head) - n - 2)
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *body)]
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def plain(rows: Sequence[Row], tasks: Sequence[Any]) -> str:
    """The same table for a terminal, columns aligned."""
    table = _table(rows, tasks)
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    left = (0, len(tasks) + 2)  # method and setting
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    )


def notes(tasks: Sequence[Any], splits: Sequence[str]) -> list[str]:
    """What a reader of the scores must know about the data: inputs that were too long, skewed tasks."""
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


def finish(
    result: Result, problem: Problem, folder: RunFolder, *, table: bool, quiet: bool
) -> None:
    """Score the test split once, print the table, write the run folder's result."""
    pool, tasks, names = problem.pool, problem.tasks, [task.name for task in problem.tasks]
    path_text = " ".join(f"{source}@{k}" for source, k in result.path.steps)
    say = (lambda *a: None) if quiet else print
    say(f"path: {path_text or '(no layer)'}   stem: {result.path.stem}")
    say(
        f"reward: {100 * result.reward:.2f} % on the whole reward split, best of {len(result.finalists)}"
    )
    rows: list[Row] = []
    if table:
        rows = list(baselines.rows(problem))
        setting, path = f"{len(result.episodes)} episodes", result.path
        rows.append(baselines.path_row(problem, "RMM", setting, path.steps, path.stem))
        result.scores = {r.name: dict(zip(names, r.scores, strict=True)) for r in rows}
        what = "metric" if any(task.metric != "accuracy" for task in tasks) else "accuracy"
        say(f"\n{what} on the test split, %\n{plain(rows, tasks)}")
    if folder.path is None:
        return
    from safetensors.torch import save

    from rmm_lab.figures import paths as plots

    folder.write("policy.safetensors", save(result.agent.state_dict()))
    folder.write("policies.safetensors", save({"policies": result.policies}))
    folder.write("path.json", result.path.to_json())
    folder.write("finalists.json", json.dumps(result.finalists, indent=2) + "\n")
    if rows:
        below = "".join(f"\n{note}.\n" for note in notes(tasks, ("reward", "test")))
        folder.write("table.md", markdown(rows, tasks) + below)
        data = [
            {"method": r.name, "setting": r.setting, "test": result.scores[r.name]}
            | ({"accuracy": r.plain} if r.plain else {})
            for r in rows
        ]
        folder.write("table.json", json.dumps(data, indent=2) + "\n")
    folder.write("rewards.png", plots.png(plots.reward_curve(result.episodes)))
    folder.write(
        "path.png",
        plots.png(
            plots.path_picture(
                result.path.steps, pool.sources, pool.n_layers, result.path.stem, pool.stacks
            )
        ),
    )
    merged = folder.path / "merged"
    if not (merged / "config.json").is_file():  # the file that is written last
        shutil.rmtree(merged, ignore_errors=True)
        result.path.save_pretrained(folder.path / "merged", pool)
    say(f"\nwritten: {folder.path} (the merged model: {merged})")
