"""The rows of the result tables: how a CSV file is read, what its methods are, statistics.

A table is a DataFrame with a row for each method and seed, its first columns ``COLUMNS``. Scores are in %:
``mean`` and ``by_task`` on the test split, ``reward_split`` on the split that tunes and chooses. ``sees``,
``evaluations`` and ``seconds`` are those of ``uniform.Row``.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from rmm_lab.errors import InputError
from rmm_lab.figures.searches import t_interval
from rmm_lab.search.config import SEARCHED
from rmm_lab.search.matched import MATCHED, WEIGHTED
from rmm_lab.search.uniform import GRIDS
from rmm_lab.tasks import plain

COLUMNS = (
    *("group", "method", "seed", "mean", "reward_split", "by_task"),
    *("evaluations", "seconds", "sees", "config", "commit"),
)
# The columns that hold numbers. All others are text, even where a name looks like a number: a group called
# 007, the commit 12e4567.
NUMBERS: dict[str, type] = {
    **dict.fromkeys(("seed", "episode", "episodes", "evaluations"), int),
    **dict.fromkeys(("mean", "reward_split", "test", "seconds", "search_seconds", "value"), float),
    **dict.fromkeys(("dar", "data_fraction", "label_fraction", "raw_reward", "dar_reward"), float),
    **dict.fromkeys(("hypervolume", "hypervolume_reward", "hypervolume_promised"), float),
    **dict.fromkeys(("rmm_mean", "distance", "learning_rate", "cpu", "inside", "peak_mb"), float),
    **dict.fromkeys(("n_experts", "inputs"), int),
}

BEST_EXPERT = "best expert, for all tasks"
# Kind -> methods, in the order of the tables. A bound is no opponent: it has one model per task, was trained,
# or merges nothing. What is uniform, a rule that sees weights, or matched, a rule that also sees inputs,
# searches nothing. Any other method is an expert on its own.
KINDS = {
    "bound": ("chance", "most frequent answer", "base", BEST_EXPERT, "fine-tuned", "multi-task"),
    "uniform": tuple(GRIDS),
    "matched": (*MATCHED, WEIGHTED),
    "gradients": (
        "Fisher",
        *(
            f"coefficients by gradient, per {part}"
            for part in ("model", "place", "matrix", "tensor")
        ),
        *("AdaMerging", "Frank-Wolfe"),
    ),
    "search": SEARCHED[:3],  # with an agent
    "rival": (
        *("CMA-ES over orders", "CMA-ES over scales", "CMA-ES over scales and densities"),
        *("NSGA-II", "TPE"),
        *("coordinate ascent", "large-neighbourhood search", "natural niches", "random search"),
        # Of the first edition's local search, in the ablation alone.
        *("agent + local search", "local search + CMA-ES", "local search"),
    ),
}
METHODS = pd.Series({method: kind for kind, methods in KINDS.items() for method in methods})
RULES = KINDS["uniform"] + KINDS["matched"]  # what a gain is over the best of
# What depends on the seed; the others are measured once.
DRAWN = ("DARE", "DARE, tuned", "DELLA")
STOCHASTIC = tuple(
    method
    for method, kind in METHODS.items()
    if method in DRAWN or kind not in ("bound", "uniform")
)

# The columns that say what was measured.
METHOD_KEY = ("group", "size", "seed", "method")
KEYS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("halves", "vision", "language"), METHOD_KEY),
    "dar": ("group", "preset", "reward", "data_fraction", "dar", "seed"),
    "dar-curve": ("dar", "seed", "episode"),
    "searches-curve": ("group", "seed", "method", "evaluations"),
    "menu-curve": ("group", "seed", "method", "evaluations"),
    **dict.fromkeys(("searches", "menu", "seconds", "fronts"), ("group", "seed", "method")),
    **dict.fromkeys(("agent", "default"), ("group", "setting", "seed")),
    "budgets": ("group", "evaluations", "seed", "method"),
    "speed": ("group", "method"),
    "stranger": ("group", "stranger", "seed", "method"),
    **dict.fromkeys(("subsets", "texts"), ("group", "seed", "method")),
    "unseen": ("group", "unseen", "method"),
    "inputs": ("group", "inputs", "seed", "method"),
    "curve": ("group", "learning_rate", "method"),
    "labels": ("group", "reward", "label_fraction", "data_fraction", "seed"),
}
# Values of these columns come in this order in a file, others in their natural one.
ORDER: dict[str, Sequence[Any]] = {
    "method": tuple(METHODS.index),
    "preset": ("paper", "weights", "default"),
    "reward": ("metric", "likelihood", "agreement"),
    "data_fraction": (1.0, 0.1, 0.01),
    "label_fraction": (1.0, 0.1, 0.01),
    "dar": (0.8, 0.0),
}


def read_csv(file: Path) -> pd.DataFrame:
    """A table from its file; an empty cell is NaN in a column of numbers, else an empty text.

    Raises InputError for a file that holds none.
    """
    try:
        text = plain.read_bytes(file, plain.TEXT_MB).decode()
        sizes = {len(row) for row in csv.reader(io.StringIO(text)) if row}
        table = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)
        if table.empty or len(sizes) > 1:  # pandas would fill a row that is cut off
            raise ValueError("it has no rows" if table.empty else "its rows differ in length")
        numbers = {name: kind for name, kind in NUMBERS.items() if name in table}
        return table.replace({name: {"": "nan"} for name in numbers}).astype(numbers)
    except (OSError, ValueError, OverflowError, csv.Error) as error:
        raise InputError(
            f"{file}: expected a table that python -m rmm_lab tables wrote, found none that can be read "
            f"({error}); move it away"
        ) from error


@contextmanager
def of_this_version(where: Path) -> Iterator[None]:
    """InputError where a table lacks a column that is looked for, or has odd cells."""
    try:
        yield
    except KeyError as error:
        raise InputError(
            f"{where}: expected the columns of this version, found none called {error}; move the file away "
            "to measure it again"
        ) from error
    except (ValueError, TypeError, IndexError, AttributeError, StopIteration) as error:
        raise InputError(
            f"{where}: expected rows that python -m rmm_lab tables wrote, found others ({error}); move the "
            "file away to measure it again"
        ) from error


def kind_of(methods: pd.Series) -> pd.Series:
    """Each method's kind, one of ``KINDS``, or expert."""
    return methods.map(METHODS).fillna("expert")


def task_scores(rows: pd.DataFrame) -> pd.DataFrame:
    """Each row's score of each task, from ``by_task``: the same index, a column for each task."""
    parts = rows["by_task"].str.split().explode().str.rsplit("=", n=1, expand=True)
    parts = parts.set_index(0, append=True)[1].astype(float)
    return parts.unstack()[parts.index.unique(-1)].rename_axis(columns=None)


def of_experts(rows: pd.DataFrame) -> pd.Series:
    """Mean over tasks of each row's score / that of the task's own expert, in %.

    NaN where the row's group, size and seed have no fine-tuned row, or an own expert has 0.
    """
    keys = [name for name in ("group", "size", "seed") if name in rows]
    scores = task_scores(rows)
    own = rows[rows["method"] == "fine-tuned"].drop_duplicates(keys)[keys].join(scores)
    own = rows[keys].merge(own, on=keys, how="left").set_axis(rows.index)[list(scores)]
    shares = (scores / own.where(own > 0)).where(scores.notna())
    there = shares.count(axis=1) == scores.count(axis=1)
    return 100 * shares.mean(axis=1).where(there)


def spread(values: pd.Series, plus_minus: bool = True) -> str:
    """``79.2 ± 1.1``: the mean and the sample standard deviation; one value has none."""
    v = values.dropna()
    if v.empty:
        return ""
    return f"{v.mean():.1f}" + (f" ± {v.std():.1f}" if plus_minus and len(v) > 1 else "")


def interval(differences: pd.Series) -> str:
    """``+1.2 ± 0.3``: the mean of paired differences and its 95 % interval; one difference has none.

    Student's t, since n is small: see ``t_interval``.
    """
    v = differences.dropna()
    if v.empty:
        return ""
    half = f" ± {t_interval(v)[1]:.1f}" if len(v) > 1 else ""
    return f"{v.mean():+.1f}".replace("-", "−") + half
