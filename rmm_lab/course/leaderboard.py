"""A class's contest: paths that students hand in, ranked by their scores on hidden pictures, the test split.

``python -m rmm_lab.course.leaderboard FOLDER`` reads each student's file, or folder with a ``path.json``.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmm_lab.tasks.console import loaded, run_command

if __name__ == "__main__":  # here, so that Ctrl-C is a sentence while torch is imported
    sys.exit(loaded("rmm_lab.course.leaderboard:main")())

import numpy as np
import pandas as pd

from rmm_lab.engine.calibration import Calibration
from rmm_lab.engine.scorer import Scorer
from rmm_lab.errors import InputError, one_sentence
from rmm_lab.layers import LayerPool
from rmm_lab.path import LayerPath
from rmm_lab.reward import Path as Steps
from rmm_lab.reward import parse_path, path_text, reward, split_stem
from rmm_lab.search.problem import Problem, load_problem
from rmm_lab.tasks.files import write_file

LARGEST = 100_000  # bytes of a file: a path with its calibration inputs has a few thousand
LONGEST = 40  # characters of a name
Judge = Callable[[str], tuple[str, np.ndarray]]  # a file's text -> its path as text, scores (N,)


def clean(name: str) -> str:
    """A name as a table can hold it: letters, digits and .,'- of any script, single spaces, 40 characters."""
    kept = re.sub(r"[^\w.,'’ -]|_", " ", unicodedata.normalize("NFC", name))
    return " ".join(kept.split())[:LONGEST].strip() or "no name"


def handed_in(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Name -> the file of each student, and a sentence for each file that does not count.

    A name is that of a .json or .txt file, or of a folder with a path.json, as a search leaves it. Of a name
    with several files none counts, since nobody may try twice on the test split. InputError for no folder.
    """
    if not folder.is_dir():
        raise InputError(
            f"folder {folder}: expected a folder of path files, found none; correct it"
        )
    found: dict[str, list[tuple[str, Path]]] = {}
    errors = []
    for place in sorted(p for p in folder.iterdir() if not p.name.startswith(".")):
        file = place / "path.json" if place.is_dir() else place
        if file.suffix.lower() not in (".json", ".txt") or not file.is_file():
            errors.append(
                f"{clean(place.name)}: expected a .json or .txt file, or a folder with a path.json, found "
                "another; ask for the path"
            )
            continue
        name = clean(place.name if place.is_dir() else place.stem)
        found.setdefault(name.casefold(), []).append((name, file))
    for own in found.values():
        if len(own) > 1:
            files = ", ".join(clean(str(file.relative_to(folder))) for _, file in own)
            errors.append(
                f"{own[0][0]}: expected one path, found {len(own)} ({files}); keep one of them"
            )
    return {own[0][0]: own[0][1] for own in found.values() if len(own) == 1}, errors


def judge(problem: Problem, split: str = "test") -> Judge:
    """What scores a handed-in text, JSON or steps, on all examples of a split.

    A text's models are the problem's, whatever it says of their places: only names and weights' SHA-256 are
    compared, and nothing is read that a student's file names. Raises InputError for anything but a path.
    """
    shared = problem.scorer(split=split, fraction=1.0)

    def score(text: str) -> tuple[str, np.ndarray]:
        if text.lstrip().startswith("{"):
            pool, path = _from_json(problem, text)
            scorer = Scorer(pool, problem.tasks, split=split, fraction=1.0, stem=problem.stem)
        else:
            scorer, path = shared, parse_path(text)
        _check(path, scorer)
        first, steps = split_stem(path, scorer.stem)
        return path_text((first, *steps)), scorer.score(path)

    return score


def _from_json(problem: Problem, text: str) -> tuple[LayerPool, Steps]:
    """The pool and the path of a path.json, from the problem's own models and inputs."""
    own, ours = LayerPath.from_json(text), problem.pool
    wanted = [("base", ours.base), *zip(ours.names, ours.experts, strict=True)]
    if [(o.name, o.sha256) for o in (own.base, *own.experts)] != [(n, m.sha256) for n, m in wanted]:
        names = ", ".join(origin.name for origin in own.experts)
        raise InputError(
            f"experts: expected the contest's models {', '.join(ours.names)}, found {names} or other "
            "weights; search on the contest's models"
        )
    options: dict[str, Any] = {"scope": own.scope, "seed": own.seed, "unit": own.unit}
    pool = LayerPool(ours.base, ours.experts, ours.names, own.operators, **options)
    pool.calibration = ours.calibration
    if (record := own.calibration) is not None:
        if record["split"] != "train":
            raise InputError(
                f"calibration: expected inputs of the train split, found {record['split']!r}; use these"
            )
        complete = pool.base.family.completion(pool.experts, problem.tasks)
        pool.calibration = Calibration.of_record(problem.tasks, record, complete=complete)
    return pool, own.path


def _check(path: Steps, scorer: Scorer) -> None:
    """InputError for steps that no walk could take: at most 2 L layers, the stem first, stacks in order."""
    layers, last = [step.layer for step in split_stem(path)[1]], scorer.n_layers
    if not 1 <= len(layers) <= 2 * last or not all(0 <= k < last for k in layers):
        raise InputError(
            f"path: expected 1 to {2 * last} layers from 0 to {last - 1}, the stem at -1 first, found "
            f"{len(layers)} layers {', '.join(map(str, layers[:8]))}; correct it"
        )
    stacks = [next(i for i, stack in enumerate(scorer.stacks) if k in stack) for k in layers]
    if stacks != sorted(stacks):
        raise InputError(
            "path: expected the layers of one stack after those of another, found them mixed; order them"
        )


def board(files: Mapping[str, Path], judge: Judge) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows, the best first, and a sentence for each file that cannot be scored.

    A row: rank (equal rewards share one, and the next is left out: 1, 1, 3), name, reward in [0, 1], scores
    (N,), path, note (whose path it also is).
    """
    rows: list[dict[str, Any]] = []
    errors = []
    for name, file in files.items():
        try:
            if file.stat().st_size > LARGEST:
                raise InputError(f"expected at most {LARGEST} bytes, found more; hand in the path")
            if not (text := file.read_text("utf-8-sig").strip()):
                raise InputError("expected a path, found an empty file; ask for it")
            path, scores = judge(text)
        except (
            Exception
        ) as error:  # a student's file may hold anything, and must not stop the class
            why = one_sentence(error)
            if not isinstance(error, InputError | OSError):
                why = f"expected a path, found what cannot be built ({type(error).__name__}: {why[:80]})"
            errors.append(f"{name}: {why}")
            continue
        rows.append({"name": name, "reward": reward(scores), "scores": scores, "path": path})
    rows.sort(key=lambda row: (-round(row["reward"], 9), row["name"].casefold()))
    first: dict[str, str] = {}
    for i, row in enumerate(rows):
        ties = i and abs(row["reward"] - rows[i - 1]["reward"]) < 1e-9
        row["rank"] = rows[i - 1]["rank"] if ties else i + 1
        other = first.setdefault(row["path"], row["name"])
        row["note"] = "" if other == row["name"] else f"the path of {other}"
    return rows, errors


def chance(scores: np.ndarray, sizes: Sequence[int]) -> float:
    """The standard error of a reward from scores (N,) on ``sizes`` examples: root of sum p(1-p)/n, over N."""
    return float(np.sqrt(np.sum(scores * (1 - scores) / np.array(sizes))) / len(scores))


@dataclass
class Leaderboard:
    """Rank the paths of a folder by their scores on the test split. Look once, when the contest is over."""

    folder: Path
    """A file per student, NAME.txt (digits@-1 ties@0 ...) or NAME.json, or a run folder NAME."""
    experts: tuple[str, ...] = ("demo",)
    """The models of the contest: a group that ships, or names."""
    out: Path | None = None
    """A file for the table, in Markdown."""

    def run(self) -> None:
        """Print the table and the errors; InputError for a folder without any path."""
        files, errors = handed_in(self.folder)
        if not files and not errors:
            raise InputError(f"folder {self.folder}: expected path files, found none; add some")
        problem = load_problem(self.experts)
        rows, more = board(files, judge(problem))
        text = table(rows, [*errors, *more], [task.name for task in problem.tasks])
        if rows:
            sizes = [len(task.split("test")) for task in problem.tasks]
            text += (
                f"\n±{100 * chance(rows[0]['scores'], sizes):.1f} points is one standard error of the "
                "first; what lies closer may be chance.\n"
            )
        print(text, end="")
        if self.out is not None:
            write_file(self.out, text)


def table(rows: Sequence[Mapping], errors: Sequence[str], tasks: Sequence[str]) -> str:
    """The board as Markdown, in %, with a list of what does not count."""
    lines = [
        {"rank": row["rank"], "name": row["name"], "mean": f"{100 * row['reward']:.1f}"}
        | {t: f"{100 * s:.1f}" for t, s in zip(tasks, row["scores"], strict=True)}
        | {"note": row["note"]}
        for row in rows
    ]
    text = pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True) if lines else ""
    return (
        "\n".join([text, *(["", "Not counted:", ""] if errors else [])]).lstrip()
        + "".join(f"\n- {error}" for error in errors)
        + "\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0, or 2 for bad input."""
    return run_command(Leaderboard, "python -m rmm_lab.course.leaderboard", argv)
