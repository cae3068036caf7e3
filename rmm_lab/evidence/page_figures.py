"""The figures of result tables, drawn from their CSV files alone: ``DRAW[name](*tables)``, see ``pages``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pandas import DataFrame

from rmm_lab.errors import InputError
from rmm_lab.evidence.pages import by_half, by_size, by_task, dar_scores, pair_of
from rmm_lab.evidence.rows import METHODS, STOCHASTIC, spread
from rmm_lab.figures.paths import COLOURS, moving_average

LOOKS: dict[str, dict[str, Any]] = {  # of a method's kind
    "bound": {"color": "0.35", "fmt": "s"},
    "uniform": {"color": COLOURS[5], "fmt": "o"},
    "search": {"color": COLOURS[6], "fmt": "D"},
}


def methods_picture(sections: Mapping[str, DataFrame]) -> Figure:
    """A panel for each column, a line for each method: mean, ± the deviation where seeds differ.

    The dotted line is RMM's mean. Squares are bounds, circles merges, the diamond RMM.
    """
    widest = max(scores.shape[1] for scores in sections.values())
    names = {heading: list(scores.index.unique("method")) for heading, scores in sections.items()}
    heights = [0.62 + 0.21 * len(methods) for methods in names.values()]
    figure = Figure(figsize=(2.2 + 1.75 * widest, sum(heights) + 0.35), layout="constrained")
    parts = figure.subfigures(len(sections), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (heading, scores) in zip(parts, sections.items(), strict=True):
        part.suptitle(heading, fontsize=10, fontweight="bold")
        panels = part.subplots(1, widest, sharey=True, squeeze=False)[0]
        by_method = scores.groupby("method", sort=False)
        means, sds = by_method.mean(), by_method.std()
        for axes, column in zip(panels, scores, strict=False):
            for y, method in enumerate(names[heading]):
                sd = sds.at[method, column] if method in STOCHASTIC else np.nan
                look = LOOKS[METHODS[method]]
                axes.errorbar(
                    means.at[method, column],
                    y,
                    xerr=None if np.isnan(sd) else sd,
                    **{"ms": 5, "capsize": 3, "mec": "black", "mew": 0.5},
                    **look,
                )
                if method == "RMM":
                    axes.axvline(means.at[method, column], color=COLOURS[6], ls=":", lw=1, zorder=0)
            _plain(axes, column, axis="x")
            axes.margins(x=0.1)
        for axes in panels[scores.shape[1] :]:
            axes.set_axis_off()
        panels[0].set_yticks(range(len(names[heading])), names[heading], fontsize=8)
        panels[0].set_ylim(len(names[heading]) - 0.5, -0.5)
        part.supxlabel("test split, %", fontsize=9)
    return figure


def _plain(axes: Axes, title: str, ylabel: str = "", axis: Any = "both", loc: Any = None) -> None:
    """What all panels share: a small title, small ticks, a light grid."""
    axes.set_title(title, fontsize=9 if loc is None else 10, loc=loc)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(axis=axis, alpha=0.3)


def draw_dar(rows: DataFrame) -> Figure:
    """A panel for each metric of Table IV: each seed as a point, the mean as a line over data shares."""
    scores = dar_scores(rows)
    metrics = list(scores.index.unique("metric"))
    figure = Figure(figsize=(3.1 * len(metrics), 3.4), layout="constrained")
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    looks = ((6, "D", "-"), (5, "o", "--"), (3, "s", ":"), (2, "^", "-."))
    for axes, metric in zip(panels, metrics, strict=True):
        for i, (setting, own) in enumerate(scores.loc[metric].groupby("setting", sort=False)):
            colour, marker, line = looks[i]
            at = np.arange(own.shape[1]) + 0.1 * (i - 1)
            look = {"marker": marker, "color": COLOURS[colour], "label": setting}
            axes.plot(at, own.mean(), line, ms=6, mec="black", **look)
            axes.plot(at, own.T, marker, ms=3.5, mfc="none", mec=COLOURS[colour], mew=0.8)
        axes.set_xticks(range(scores.shape[1]), list(scores), fontsize=9)
        axes.set_xlabel("share of the data", fontsize=9)
        _plain(axes, metric, axis="y")
    panels[0].set_ylabel("test split, %", fontsize=9)
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, fontsize=8, ncols=len(labels), loc="outside upper center")
    return figure


def draw_rewards(rows: DataFrame) -> Figure:
    """Fig. 3: reward per episode at 1 % of the data, raw as points, a panel without DAR and one with it.

    Each panel also has the running mean of the other search's raw reward, to compare. They have one seed:
    the first that both have.
    """
    raw = rows.pivot(index=["seed", "episode"], columns="dar", values="raw_reward").dropna()
    if raw.empty or raw.shape[1] < 2:
        raise InputError(
            "dar-curve.csv: expected a seed with DAR and without, found none; measure both with "
            "python -m rmm_lab tables fig3"
        )
    seed = raw.index.unique("seed").min()
    raw = raw.loc[seed]
    paid = rows[rows["seed"] == seed].pivot(index="episode", columns="dar", values="dar_reward")
    figure = Figure(figsize=(8, 4.9), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True, sharey=True)
    names = {dar: "with DAR" if dar else "without DAR" for dar in raw}
    for axes, dar in zip(panels, names, strict=True):
        axes.plot(raw[dar], ".", ms=2.5, color="0.6", label="raw (Eq. 7)")
        if dar:
            axes.plot(paid[dar], lw=0.7, color=COLOURS[5], label="paid (Eq. 10)")
        for other, name in names.items():
            look: dict[str, Any] = {"color": COLOURS[6], "lw": 2.2, "label": "mean of the last 50"}
            if other != dar:
                look = {"color": "black", "lw": 1, "ls": "--"}
                look["label"] = f"mean of the last 50, {name}"
            axes.plot(moving_average(raw[other].to_numpy(), 50), **look)
        _plain(axes, names[dar], "reward, %", loc="left")
        place = {"loc": "lower right", "bbox_to_anchor": (1, 1), "frameon": False, "ncols": 4}
        axes.legend(fontsize=8, columnspacing=1, borderpad=0.1, **place)
    panels[-1].set_xlabel("episode", fontsize=9)
    return figure


def draw_searches(rows: DataFrame, curve: DataFrame) -> Figure:
    """The best path so far, on the whole reward split, over evaluations; the last point is the final choice.

    A panel for each problem. Mean over seeds; the range as a band for RMM, as a bar at the end for the
    others. Beside each name the test score of the final choice.
    """
    groups, methods = curve["group"].unique(), list(curve["method"].unique())
    test = rows.groupby(["group", "method"])["mean"].agg(spread)
    figure = Figure(figsize=(8, 0.3 + 3.1 * len(groups)), layout="constrained")
    panels = figure.subplots(len(groups), 1, squeeze=False)[:, 0]
    for axes, group in zip(panels, groups, strict=True):
        own = curve[curve["group"] == group].groupby(["method", "evaluations"])["reward_split"]
        ranges = own.agg(["mean", "min", "max"])
        for i, method in enumerate(methods):
            if method not in ranges.index:
                continue
            of = ranges.loc[method]
            colour = COLOURS[(6, 5, 1, 3, 2, 7, 0)[i % 7]]
            if method == "RMM":
                axes.fill_between(of.index, of["min"], of["max"], color=colour, alpha=0.15, lw=0)
            else:  # more bands could not be told apart
                end, x = of.iloc[-1], of.index[-1] * (1 + 0.008 * i)
                span = [[end["mean"] - end["min"]], [end["max"] - end["mean"]]]
                axes.errorbar(x, end["mean"], span, color=colour, capsize=2, lw=1)
            axes.plot(
                of["mean"],
                ls=("-", "--", ":", "-.")[i % 4],
                marker="Dosv^Px*"[i % 8],
                ms=5,
                markevery=(i % 3, 3),
                color=colour,
                lw=2.4 if method == "RMM" else 1.4,
                label=f"{method}: {test.get((group, method), '')}",
            )
        _plain(axes, group, "reward split, %", loc="left")
        title = {"title": "test split at the end, %", "title_fontsize": 8, "alignment": "left"}
        look = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), "frameon": False}
        axes.legend(fontsize=8, **look, **title)
    panels[-1].set_xlabel("evaluations", fontsize=9)
    return figure


DRAW: dict[str, Callable[..., Figure]] = {
    "table-I": lambda rows: methods_picture(by_half(rows)),
    "table-II": lambda rows: methods_picture(by_task(pair_of(rows))),
    "groups": lambda rows: methods_picture(by_size(rows)),
    "table-III": lambda rows: methods_picture(by_size(rows)),
    "table-IV": draw_dar,
    "fig-3": draw_rewards,
    "searches": draw_searches,
}
