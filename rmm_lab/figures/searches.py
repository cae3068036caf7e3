"""Figures of notebooks 04 to 08: rewards, agents, searches, subsets. Plain data in, a Figure out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scipy.special import stdtrit

from rmm_lab.errors import InputError
from rmm_lab.figures.paths import (
    COLOURS,
    HATCHES,
    MIDDLE,
    ON_WHITE,
    draw_box,
    heat_map,
    look_of,
    moving_average,
    panels,
    tidy,
)
from rmm_lab.reward import Path

# ------------------------------------------------------------------------------------ statistics


def t_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and half width of its 95 % confidence interval: ``mean ± t sd / sqrt(n)``, Student's t."""
    v = np.asarray(values, float)
    if len(v) < 2:
        raise InputError(f"t_interval: expected at least 2 values, found {len(v)}; give more")
    return float(v.mean()), float(stdtrit(len(v) - 1, 0.975) * v.std(ddof=1) / len(v) ** 0.5)


# ------------------------------------------------------------------------------------ notebooks 06 and 08

Rows = Sequence[Mapping[str, Any]]  # a table; a DataFrame will do as well
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
TONES = (5, 1, 3, 6, 7, 2, 0, 4)  # of COLOURS, for up to eight lines; black and yellow last
ABOVE: dict[str, Any] = {"fontsize": 9, "loc": "outside upper center"}  # legends
BESIDE: dict[str, Any] = {
    "fontsize": 9,
    "loc": "center left",
    "bbox_to_anchor": (1, 0.5),
}
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 2)))


def line_look(i: int) -> dict[str, Any]:
    """Colour, marker and line style of line i; eight differ in colour and marker."""
    return {"color": COLOURS[TONES[i % 8]], "marker": MARKERS[i % 8], "ls": LINES[i % 8], "ms": 5}


def diagnostics_picture(
    runs: Mapping[str, Sequence[Mapping[str, float]]], keys: Mapping[str, str]
) -> Figure:
    """Diagnostics over the updates of some searches, a panel for each key of ``keys`` (key -> title).

    ``runs``: label -> one row an update. A KL divergence that spans decades is drawn on a log
    scale, floored at 1e-5.
    """
    figure, grid = panels(len(keys), 2, 4.5, 2.4, more=0.5)
    for axes, (key, title) in zip(grid, keys.items(), strict=True):
        every = [row[key] for rows in runs.values() for row in rows]
        far = key == "approx_kl" and (max(every) > 1 or min(every) < 1e-3)
        for i, (label, rows) in enumerate(runs.items()):
            y = np.array([max(row[key], 1e-5) if far else row[key] for row in rows])
            axes.plot(np.arange(1, len(y) + 1), y, lw=1.4, label=label, **line_look(i))
        if far:
            axes.set_yscale("log")
        elif min(every) >= 0:
            axes.set_ylim(-0.03 * max(every), 1.1 * max(every))
        tidy(axes, title, "update")
    if len(runs) > 1:
        figure.legend(*grid[0].get_legend_handles_labels(), ncols=len(runs), **ABOVE)
    return figure


def spread_picture(
    groups: Mapping[str, Mapping[str, Sequence[float]]], xlabel: str, n_columns: int = 2
) -> Figure:
    """A panel for each group, a line for each method: each seed as a point, mean ± deviation as a bar.

    ``groups``: group -> method -> a score in % for each seed.
    """
    n_columns = min(n_columns, len(groups))
    width, most = 4.55 if n_columns > 1 else 7.0, max(map(len, groups.values()))
    figure, grid = panels(len(groups), n_columns, width, 1.0 + 0.42 * most, sharex=n_columns == 1)
    bar = {"fmt": "|", "ms": 10, "mew": 2, "color": "black", "capsize": 4}
    for axes, (group, methods) in zip(grid, groups.items(), strict=True):
        for y, values in enumerate(methods.values()):
            v, colour = np.asarray(values, float), COLOURS[TONES[y % 8]]
            at = y + np.linspace(-0.24, 0.04, len(v))  # equal scores stay visible
            axes.plot(v, at, MARKERS[y % 8], ms=7, mfc="none", mec=colour, mew=1.4)
            sd = v.std(ddof=1) if len(v) > 1 else 0.0
            axes.errorbar(v.mean(), y + 0.28, xerr=sd, **bar)
        axes.set_yticks(range(len(methods)), [f"{m} ({len(v)})" for m, v in methods.items()])
        axes.set_ylim(len(methods) - 0.4, -0.6)
        tidy(axes, group, xlabel, grid="x")
    return figure


def searches_picture(rows: Rows, test: Mapping[Any, str] | None = None) -> Figure:
    """The path that would be chosen, scored on all data, over evaluations: mean and range over seeds.

    ``rows``: those of ``results/searches-curve.csv``; a panel for each group. ``test``: (group, method) ->
    the test score of the final choice, shown beside each name.
    """
    groups = pd.DataFrame(rows).groupby("group", sort=False)
    shape = (min(2, len(groups)), 4.55, 2.7) if test is None else (1, 8.0, 3.1)
    figure, grid = panels(len(groups), *shape, more=0.4)
    for axes, (group, runs) in zip(grid, groups, strict=True):
        for i, (method, curve) in enumerate(runs.groupby("method", sort=False)):
            over = curve.groupby("evaluations")["reward_split"]
            mean, look = over.mean(), line_look(i) | {"markevery": max(1, len(over) // 8)}
            axes.fill_between(mean.index, over.min(), over.max(), color=look["color"], alpha=0.12)
            label = method if test is None else f"{method}: {test[group, method]}"
            axes.plot(mean.index, mean, label=label, **look)
        tidy(axes, group, "evaluations", "reward split, %")
        if test is not None:
            title = {"title": "test split at the end, %", "title_fontsize": 8, "frameon": False}
            axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), **title)
    if test is None:
        figure.legend(*grid[0].get_legend_handles_labels(), ncols=4, **ABOVE)
    return figure


def settled(rows: Rows, within: float = 1.0) -> dict[tuple[str, str], tuple[float, int]]:
    """Where each search's mean curve ends, and from which evaluation on it stays near that.

    ``rows``: those of ``results/searches-curve.csv``. Returns (group, method) -> (mean over seeds at the
    end, the first number of evaluations from which no mean lies more than ``within`` below it).
    """
    columns = ["group", "method", "evaluations"]
    means = pd.DataFrame(rows).groupby(columns, sort=False)["reward_split"].mean()
    ends = {}
    for key, curve in means.groupby(level=["group", "method"], sort=False):
        mean = curve.droplevel(["group", "method"]).sort_index()  # evaluations -> mean over seeds
        end = float(mean.iloc[-1])
        near = (mean >= end - within)[::-1].cummin()[::-1]  # from here on to the end
        ends[key] = (end, int(near.idxmax()))
    return ends


def estimates_picture(
    estimates: Mapping[str, np.ndarray], whole: float, predicted: Mapping[str, float]
) -> Figure:
    """Histograms of reward estimates on subsets, a panel for each share, and the score on all data.

    ``estimates``: share -> (k,) in [0, 1]; ``predicted``: share -> standard deviation, drawn as a span.
    """
    figure, grid = panels(len(estimates), 1, 8, 1.5, more=1.0, sharex=True)
    low = min(float(v.min()) for v in estimates.values())
    high = max(float(v.max()) for v in estimates.values())
    bins = np.linspace(100 * low - 2, 100 * high + 2, 31)
    for axes, (share, values) in zip(grid, estimates.items(), strict=True):
        gap = np.diff(np.unique(np.round(100 * values, 6))).min(initial=np.inf)
        edges = bins
        if np.isfinite(gap) and gap > bins[1] - bins[0]:  # few examples: few possible values
            n = round((100 * high - 100 * values.min()) / gap) + 1
            edges = 100 * values.min() + gap * (np.arange(n + 1) - 0.5)
        axes.hist(100 * values, bins=edges, color=COLOURS[2], ec="black", lw=0.6, hatch="//")
        axes.axvline(100 * whole, color="black", ls="--", lw=1.5, label="all data")
        mean = f"mean of {len(values)}"
        axes.plot([100 * values.mean()], [0.4], "D", color=COLOURS[1], mec="black", label=mean)
        sd = 100 * predicted[share]
        span = {"color": COLOURS[5], "alpha": 0.2, "zorder": 0}
        axes.axvspan(100 * whole - sd, 100 * whole + sd, label="± predicted sd", **span)
        axes.set_xlim(right=min(100.0, axes.get_xlim()[1]))  # no reward is above 100 %
        tidy(axes, f"{share} of the data", ylabel="subsets", grid="x")
        axes.legend(fontsize=8, loc="upper left")
    grid[-1].set_xlabel("reward estimate of one path, %", fontsize=9)
    return figure


def dar_curve_picture(rows: Rows, window: int = 100) -> Figure:
    """Fig. 3's shape: what the agent is paid per episode, without DAR and with it, one below the other.

    ``rows``: those of ``results/dar-curve.csv``, rewards in %. Dotted lines: a new window begins.
    """
    searches = pd.DataFrame(rows).groupby("dar")
    figure, grid = panels(len(searches), 1, 8, 2.2, more=0.6, sharex=True, sharey=True)
    means = {scale: moving_average(part["raw_reward"], 50) for scale, part in searches}
    for axes, (scale, part) in zip(grid, searches, strict=True):
        x = part["episode"]
        if scale:
            axes.plot(x, part["raw_reward"], ".", ms=3, color="0.6", label="raw (Eq. 7)")
        label = "paid: DAR (Eq. 10)" if scale else "paid: raw (Eq. 7)"
        axes.plot(x, part["dar_reward"], "-+", lw=0.8, ms=4, color=COLOURS[5], label=label)
        axes.plot(x, means[scale], color=COLOURS[6], lw=2, label="raw, mean of the last 50")
        for other in means.keys() - {scale}:
            axes.plot(x, means[other], color="black", lw=1, ls="--", label="the other's mean")
        for start in range(0, len(x), window):
            label = "" if scale or start else "a new window begins"
            axes.axvline(start, color="black", ls=":", lw=0.8, label=label)
        tidy(axes, ylabel="reward, %", grid="y")
        title = f"with DAR, λ = {scale:g}" if scale else "without DAR"
        axes.set_title(title, fontsize=10, loc="left")
        place = {"loc": "lower right", "bbox_to_anchor": (1, 1), "frameon": False}
        axes.legend(fontsize=8, ncols=4, columnspacing=1, **place)
    grid[-1].set_xlabel("episode", fontsize=9)
    return figure


# ---- notebook 04


def examples(tasks: Sequence[Any], means: Mapping[str, int] | None = None) -> Figure:
    """One training image of each class: a row for each task, the class's name above.

    tasks: N ``tasks.Task``. ``means``: task -> n adds a row below that of the task: the mean of the first
    n images of each class.
    """
    shown = [(task, n) for task in tasks for n in (1, (means or {}).get(task.name)) if n]
    width = max(len(task.classes) for task in tasks)
    figure, grid = panels(width * len(shown), width, 1.5, 1.7)
    for (row, column), axes in zip(np.ndindex(len(shown), width), grid, strict=True):
        (task, n), data = shown[row], shown[row][0].split("train")
        axes.set_axis_off()
        if column < len(task.classes):
            some = data.images[data.labels == column][:n, 0].float().mean(0)
            axes.imshow(some, cmap="gray", vmin=0, vmax=255)
            title = f"{task.name}: {task.classes[column]}" + (f",\nmean of {n}" if n > 1 else "")
            axes.set_title(title, fontsize=9)
    return figure


def sorted_rewards(rewards: np.ndarray, marks: Mapping[str, int], top: int | None = None) -> Figure:
    """All paths from the best to the worst, some of them named.

    rewards: (P,) in [0, 1], in any order; marks: name -> position in ``rewards``; top: draw these many.
    """
    order = np.argsort(-rewards, kind="stable")
    best = 100 * rewards[order[:top]]
    figure, (axes,) = panels(1, 1, 7.5, 3.6)
    label = f"the {len(best)} best of {len(rewards)} paths" if top else f"all {len(rewards)} paths"
    axes.plot(range(1, len(best) + 1), best, ".-", ms=4, lw=0.8, color="0.5", label=label)
    sources = [name.removeprefix("all ") for name in marks if name.startswith("all ")]
    for i, (name, p) in enumerate(marks.items()):
        rank, percent = 1 + order.tolist().index(p), 100 * rewards[p]
        own = name.removeprefix("all ")
        colour = look_of(own, sources)[0] if own in sources else COLOURS[6 + i % 2]
        look = {"ls": "none", "ms": max(6, 14 - 2 * i), "mec": "black", "color": colour}
        label = f"{name}: rank {rank}, {percent:.1f} %"
        axes.plot(rank, percent, MARKERS[i % 8], label=label, **look)
    tidy(axes, "", "rank (1 is the best)", "reward, %")
    axes.legend(**BESIDE)
    return figure


def neighbours(path: Path, sources: Sequence[str]) -> list[list[Path]]:
    """Every path that differs from this one in one place: [place][source] -> path."""
    return [
        [(*path[:i], step._replace(source=source, scales=()), *path[i + 1 :]) for source in sources]
        for i, step in enumerate(path)
    ]


def one_place(rewards: np.ndarray, path: Path, sources: Sequence[str]) -> Figure:
    """Rewards (T, N+M) of a path's ``neighbours`` as a heat map; the path's sources have a frame."""
    figure, (axes,) = panels(1, 1, 1.6 + 1.3 * len(path), 1.3 + 0.5 * len(sources))
    percent, layers = 100 * rewards.T, [step.layer for step in path]
    image = heat_map(axes, percent, sources, layers, "{:.1f}".format, percent.min(), percent.max())
    for i, step in enumerate(path):
        a = list(sources).index(step.source)
        frame = Rectangle((i - 0.47, a - 0.47), 0.94, 0.94, fill=False, ec=COLOURS[1], lw=3)
        axes.add_patch(frame)
    axes.set_xlabel("layer whose source is changed")
    figure.colorbar(image, ax=axes, label="reward, %")
    return figure


def subset_strip(values: Mapping[str, tuple[np.ndarray, float]]) -> Figure:
    """Rewards on data subsets as points, and on all data as a bar. name -> ((S,) rewards, reward)."""
    figure, (axes,) = panels(1, 1, 7, 0.5 * len(values), more=1.1)
    points, bar = {"mfc": "none", "mec": COLOURS[5]}, {"ms": 26, "mew": 3, "color": COLOURS[6]}
    for i, (rewards, whole) in enumerate(values.values()):
        axes.plot(100 * rewards, np.full(len(rewards), i), "o", **points)
        axes.plot([100 * whole], [i], "|", **bar)
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.4, -0.6)
    tidy(axes, "", "reward, %", grid="x")
    names = ["one subset of 10 %", "all examples"]
    axes.legend(names, markerscale=0.5, labelspacing=1, **BESIDE)
    return figure


# ---- notebook 05


def loop_picture() -> Figure:
    """Actor, environment and critic, and what they tell each other."""
    figure, (axes,) = panels(1, 1, 7.5, 2.6)
    boxes = {
        "actor\nπ(a|s)": (1.0, 1.6, COLOURS[1]),
        "environment\nwalk, model, score": (5.0, 1.6, COLOURS[5]),
        "critic\nV(s)": (3.0, 0.0, COLOURS[3]),
    }
    for text, (x, y, colour) in boxes.items():
        draw_box(axes, x, y, 1.7, text, (colour, ""))
    arrows = {  # text -> from, to, and where it stands
        "action": ((1.9, 1.75), (4.1, 1.75), (3.0, 1.9)),
        "state": ((4.1, 1.45), (1.9, 1.45), (3.0, 1.2)),
        "state, reward at the end": ((5.0, 1.2), (3.95, 0.1), (5.2, 0.5)),
        "advantage": ((2.05, 0.1), (1.0, 1.2), (1.0, 0.5)),
    }
    for text, (start, end, place) in arrows.items():
        look: dict[str, Any] = {"arrowstyle": "-|>", "lw": 1.6, "color": "0.3"}
        axes.annotate("", end, start, arrowprops=look)
        axes.text(*place, text, fontsize=10, bbox=ON_WHITE, **MIDDLE)
    axes.set(xlim=(-0.1, 6.4), ylim=(-0.5, 2.1))
    axes.axis("off")
    return figure


def histograms(samples: Mapping[str, np.ndarray], xlabel: str, at: Mapping[str, float]) -> Figure:
    """Histograms of some samples (n,) on the same bins; ``at``: name -> where a line marks a value."""
    figure, (axes,) = panels(1, 1, 7.5, 3.2)
    bins = np.histogram_bin_edges(np.concatenate(list(samples.values())), 29).tolist()
    for i, (name, sample) in enumerate(samples.items()):
        look = {
            "color": COLOURS[(1, 5, 3)[i % 3]],
            "hatch": HATCHES[1 + i],
            "ec": "black",
            "lw": 0.4,
        }
        label = f"{name}: deviation {sample.std():.3f}"
        axes.hist(sample, bins, alpha=0.6, label=label, **look)
    for name, x in at.items():
        axes.axvline(x, color="black", ls="--", label=f"{name}: {x:.3f}")
    tidy(axes, "", xlabel, "number of estimates", grid="y")
    axes.legend(**BESIDE)
    return figure


def curves(lines: Mapping[str, Sequence[float]], x: str, y: str) -> Figure:
    """Some curves over the updates, each with its marker and line style."""
    figure, (axes,) = panels(1, 1, 7.5, 3.4)
    for i, (name, values) in enumerate(lines.items()):
        look = line_look(i) | {"markevery": max(1, len(values) // 12)}
        axes.plot(values, lw=1.8, label=name, **look)
    tidy(axes, "", x, y)
    axes.legend(**BESIDE)
    return figure


def targets(steps: np.ndarray, values: Mapping[str, np.ndarray]) -> Figure:
    """The targets (B,) of the steps of some episodes over the step numbers (B,), a panel for each kind."""
    figure, grid = panels(len(values), len(values), 8 / len(values), 3.1, sharey=True)
    for i, (axes, (name, target)) in enumerate(zip(grid, values.items(), strict=True)):
        axes.plot(steps, target, "oD^"[i % 3], color=COLOURS[(6, 5, 3)[i % 3]], mec="black", ms=6)
        axes.axhline(0, color="black", lw=0.7)
        tidy(axes, name, "step of the episode")
        axes.set_xticks(range(int(steps.max()) + 1))
    grid[0].set_ylabel("normalised return", fontsize=9)
    return figure
