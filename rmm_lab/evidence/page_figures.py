"""The figures of result tables, drawn from their CSV files alone: ``DRAW[name](*tables)``, see ``pages``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
from matplotlib.figure import Figure
from pandas import DataFrame

from rmm_lab.errors import InputError
from rmm_lab.evidence.comparisons import (
    AGENT,
    ALL_LABELS,
    budget_points,
    difference_points,
    with_settings,
)
from rmm_lab.evidence.forest import AXIS, forest
from rmm_lab.evidence.fronts import draw_fronts
from rmm_lab.evidence.pages import dar_scores, pair_of
from rmm_lab.evidence.real_pages import draw_curve
from rmm_lab.evidence.rows import spread
from rmm_lab.figures.paths import COLOURS, panels, tidy
from rmm_lab.figures.results import forest_picture
from rmm_lab.figures.searches import dar_curve_picture, searches_picture


def draw_methods(rows: DataFrame) -> Figure:
    """``forest_picture`` of a table of methods."""
    shown = forest(rows)
    return forest_picture(shown.points, shown.lines, AXIS, shown.caption)


def draw_dar(rows: DataFrame) -> Figure:
    """A panel for each metric of Table IV: each seed as a point, the mean as a line over data shares."""
    scores = dar_scores(rows)
    metrics = list(scores.index.unique("metric"))
    figure, grid = panels(len(metrics), len(metrics), 3.1, 3.4)
    looks = ((6, "D", "-"), (5, "o", "--"), (3, "s", ":"), (2, "^", "-."))
    for axes, metric in zip(grid, metrics, strict=True):
        for i, (setting, own) in enumerate(scores.loc[metric].groupby("setting", sort=False)):
            colour, marker, line = looks[i]
            at = np.arange(own.shape[1]) + 0.1 * (i - 1)
            look = {"marker": marker, "color": COLOURS[colour], "label": setting}
            axes.plot(at, own.mean(), line, ms=6, mec="black", **look)
            axes.plot(at, own.T, marker, ms=3.5, mfc="none", mec=COLOURS[colour], mew=0.8)
        axes.set_xticks(range(scores.shape[1]), list(scores), fontsize=9)
        tidy(axes, metric, "share of the data", "test split, %" if axes is grid[0] else "", "y")
    lines, labels = grid[0].get_legend_handles_labels()
    figure.legend(lines, labels, fontsize=8, ncols=len(labels), loc="outside upper center")
    return figure


def draw_rewards(rows: DataFrame) -> Figure:
    """Fig. 3: reward per episode at 1 % of the data, of the first seed with DAR and without."""
    both = rows.groupby("seed")["dar"].nunique() > 1
    if not both.any():
        raise InputError(
            "dar-curve.csv: expected a seed with DAR and without, found none; measure both with "
            "python -m rmm_lab tables fig3"
        )
    return dar_curve_picture(rows[rows["seed"] == both.idxmax()])


def draw_searches(rows: DataFrame, curve: DataFrame) -> Figure:
    """``searches_picture``, with the test score of each final choice: mean and deviation over seeds."""
    return searches_picture(curve, rows.groupby(["group", "method"])["mean"].agg(spread).to_dict())


def draw_differences(rows: DataFrame, by: str, reference: str = AGENT) -> Figure:
    """``forest_picture`` of differences to ``reference``, paired by seed."""
    points = difference_points(rows, by, reference)
    return _paired(points, f"test split, points above {reference}", reference)


def draw_labels(rows: DataFrame) -> Figure:
    """The same for few labels, to all of them."""
    return draw_differences(with_settings(rows), "setting", ALL_LABELS)


def draw_budgets(rows: DataFrame) -> Figure:
    """The other way round, at each budget: what ``AGENT`` has more."""
    return _paired(budget_points(rows), f"test split, points by which {AGENT} is above")


def _paired(points: Mapping[str, DataFrame], xlabel: str, reference: str = AGENT) -> Figure:
    caption = (
        "Point: mean of the differences, paired by seed; bar: its 95 % interval (Student's t)."
    )
    lines = {panel: {reference: 0.0} for panel in points}
    return forest_picture(points, lines, xlabel, caption)


DRAW: dict[str, Callable[..., Figure]] = {
    "table-I": draw_methods,
    "table-II": lambda rows: draw_methods(pair_of(rows)),
    "groups": draw_methods,
    "table-III": draw_methods,
    "table-IV": draw_dar,
    "fig-3": draw_rewards,
    "searches": draw_searches,
    "menu": draw_searches,
    "default": partial(draw_differences, by="setting"),
    "budgets": draw_budgets,
    "seconds": partial(draw_differences, by="method"),
    "labels": draw_labels,
    "fronts": draw_fronts,
    "curve": draw_curve,
}
