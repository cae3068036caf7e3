"""Figures of the course that are too long for a cell; each takes plain data and returns a Figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, MultipleLocator
from torch import Tensor

from rmm_lab.errors import InputError
from rmm_lab.operators import parse_operator
from rmm_lab.plots import COLOURS, HATCHES, draw_map, moving_average
from rmm_lab.scoring import Path
from rmm_lab.sheets import mean_and_sd as mean_and_sd
from rmm_lab.sheets import t_interval as t_interval

# ------------------------------------------------------------------------------------ notebooks 00 and 01


def walk_order(steps: Sequence[tuple[str, int]], sources: Sequence[str]) -> list[tuple[int, int]]:
    """Where a path's steps stand in the drawing: (column of the source, row of the layer), in order.

    Raises InputError for a source that has no column.
    """
    places = []
    for source, k in steps:
        if source not in sources:
            raise InputError(
                f"step {source!r}: expected one of {', '.join(sources)}; draw its source too"
            )
        places.append((list(sources).index(source), k))
    return places


def rmm_picture(
    steps: Sequence[tuple[str, int]], models: Sequence[str], operators: Sequence[str], n_layers: int
) -> Figure:
    """RMM in one picture: sources as columns of layers, the walk through them, the merged stack.

    ``steps``: (source, layer) of an example path without skip and back. The paper's Fig. 2, drawn anew.
    """
    sources = [*models, *operators]
    places = walk_order(steps, sources)
    figure = Figure(figsize=(9.5, 4.6), layout="constrained")
    axes: Any = figure.subplots()
    for a, source in enumerate(sources):
        for k in range(n_layers):
            _layer_box(axes, 1.6 * a, k, a, f"layer {k}", strong=(a, k) in places)
        kind = "model" if source in models else "operator"
        axes.text(1.6 * a, n_layers - 0.3, f"{source}\n({kind})", ha="center", fontsize=9)
    for t, (a, k) in enumerate(places):
        if t:
            b, j = places[t - 1]
            axes.annotate(
                "", (1.6 * a, k - 0.34), (1.6 * b, j + 0.34), zorder=3,
                arrowprops={"arrowstyle": "-|>", "lw": 2, "color": COLOURS[0]},
            )  # fmt: skip
    right = 1.6 * len(sources) + 1.5
    for t, (a, k) in enumerate(places):
        _layer_box(axes, right, t, a, f"{sources[a]}, layer {k}", width=2.4)
    axes.text(right, len(places) - 0.3, "merged model\n(runs upwards)", ha="center", fontsize=9)
    axes.annotate("", (right - 1.3, 2), (right - 2.0, 2), arrowprops={"arrowstyle": "-|>", "lw": 2})
    axes.text(right - 1.65, 2.2, "becomes", ha="center", fontsize=9)
    axes.text(right, -0.75, "its accuracy on all tasks: the reward", ha="center", fontsize=9)
    axes.text(
        0.8 * (len(sources) - 1), -0.75, "the agent starts at layer 0", ha="center", fontsize=9
    )
    axes.set(xlim=(-0.8, right + 1.4), ylim=(-1, max(n_layers, len(places)) + 0.5))
    axes.set_axis_off()
    return figure


def _layer_box(
    axes: Any, x: float, y: float, a: int, text: str, *, width: float = 1.2, strong: bool = True
) -> None:
    """One layer as a box in the colour and hatch of source a; pale where it was not chosen."""
    rgb = to_rgb(COLOURS[1 + a % (len(COLOURS) - 1)])
    axes.add_patch(
        Rectangle(
            (x - width / 2, y - 0.32), width, 0.64, facecolor=(*rgb, 0.45 if strong else 0.08),
            edgecolor=(*rgb, 1.0 if strong else 0.35), hatch=HATCHES[a % len(HATCHES)] if strong else "",
            lw=1.8 if strong else 1,
        )
    )  # fmt: skip
    axes.text(
        x, y, text, ha="center", va="center", fontsize=8, color="black" if strong else "0.4",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85 if strong else 0},
    )  # fmt: skip


def gallery(tasks: Sequence[Any], n: int = 10) -> Figure:
    """A picture of each of n classes, spread over a task's classes; one row per task."""
    figure = Figure(figsize=(0.75 * n + 1.2, 0.95 * len(tasks)), layout="constrained")
    grid: Any = figure.subplots(len(tasks), n, squeeze=False)
    for task, row in zip(tasks, grid, strict=True):
        split = task.split("reward")
        classes = np.linspace(0, len(task.classes) - 1, n).round().astype(int)
        for c, axes in zip(classes, row, strict=True):
            second = int((split.labels == int(c)).nonzero()[1])
            axes.imshow(
                split.images[second].permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255
            )
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(task.name, fontsize=10, rotation=0, ha="right", va="center")
    return figure


def plane(base: Tensor, experts: Tensor) -> np.ndarray:
    """Two experts in the plane that they span with their base, to scale.

    base: (D,), experts: (2, D) -> (2, 2): the coordinates of the task vectors, the first along x.
    """
    a, b = (experts - base).double()  # (D,) each
    x = float(a @ b / a.norm())
    y = float((b @ b - x**2).clamp(min=0).sqrt())
    return np.array([[float(a.norm()), 0.0], [x, y]])


def plane_picture(base: Tensor, experts: Tensor, names: Sequence[str]) -> Figure:
    """Base, two experts, their task vectors and their average, in the plane of ``plane``."""
    points = plane(base, experts)
    middle = points.mean(0)
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes: Any = figure.subplots()
    for point, name, i in zip(points, names, (1, 2), strict=True):
        axes.annotate(
            "", point, (0, 0), arrowprops={"arrowstyle": "-|>", "lw": 2.5, "color": COLOURS[i]}
        )
        below: dict[str, Any] = {"xytext": (0, -8), "ha": "center", "va": "top"}
        beside: dict[str, Any] = {"xytext": (-8, 0), "ha": "right", "va": "center"}
        axes.annotate(
            f"task vector\nof {name}", point / 2, textcoords="offset points", fontsize=9,
            **(below if i == 1 else beside),
        )  # fmt: skip
        axes.plot(*point, marker="os"[i - 1], ms=11, color=COLOURS[i], mec="black")
        axes.text(*point, f"   {name}", fontsize=10, va="bottom")
    axes.plot(*points.T, ls=":", color="0.3")
    axes.plot(*middle, marker="D", ms=9, color=COLOURS[3], mec="black")
    axes.text(*middle, "   average", fontsize=10, va="bottom")
    axes.plot(0, 0, marker="P", ms=12, color=COLOURS[0])
    axes.text(0, 0, "base   ", fontsize=10, ha="right", va="top")
    axes.set(xlabel="distance in weight space", ylabel="distance in weight space")
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.15)
    first, second, *_ = MaxNLocator(5).tick_values(0, float(np.abs(points).max()))
    for axis in (axes.xaxis, axes.yaxis):  # equal distances, equal steps
        axis.set_major_locator(MultipleLocator(second - first))
    axes.grid(alpha=0.3)
    return figure


# ------------------------------------------------------------------------------------ notebook 02


def sign_picture(
    before: Tensor, after: Tensor, names: Sequence[str], titles: Sequence[str], points: int = 2500
) -> Figure:
    """Two experts' task vectors against each other, entry by entry, at two stages.

    before, after: (2, D); every (D // points)-th entry is drawn. Entries of opposite sign lie in the
    shaded quadrants, entries that one expert lost lie on an axis.
    """
    figure = Figure(figsize=(9, 5), layout="constrained")
    panels: Any = figure.subplots(1, 2, sharex=True, sharey=True)
    step = max(1, before.shape[1] // points)
    high = 1.05 * float(before[:, ::step].abs().max())
    for axes, deltas, title in zip(panels, (before, after), titles, strict=True):
        x, y = deltas[:, ::step].numpy()
        axes.fill([-high, 0, 0, -high], [0, 0, high, high], color="0.9", lw=0)
        axes.fill([0, high, high, 0], [-high, -high, 0, 0], color="0.9", lw=0)
        for chosen, marker, i, label in (
            ((x * y == 0) & (x + y != 0), ".", 0, "0 in one expert"),
            (x * y > 0, "o", 2, "same sign"),
            (x * y < 0, "x", 6, "opposite signs"),
        ):
            look = {"s": 12, "lw": 0.8, "alpha": 0.7, "color": COLOURS[i], "marker": marker}
            axes.scatter(x[chosen], y[chosen], label=f"{label} ({chosen.sum()})", **look)
        axes.axhline(0, color="black", lw=0.6)
        axes.axvline(0, color="black", lw=0.6)
        axes.set(
            xlim=(-high, high), ylim=(-high, high), xlabel=f"entry of the task vector: {names[0]}"
        )
        axes.set_title(title, fontsize=10)
        below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "ncols": 2}
        axes.legend(fontsize=8, markerscale=1.5, columnspacing=1, handletextpad=0.2, **below)
    panels[0].set_ylabel(f"entry of the task vector: {names[1]}")
    return figure


def sweep_picture(
    panels: Mapping[str, tuple[Sequence[float], np.ndarray]], tasks: Sequence[str], xlabel: str
) -> Figure:
    """Scores over a setting: title -> (settings (n,), scores (n, N) in [0, 1]), one panel each.

    A line and marker per task, the mean in black; a star at its highest point.
    """
    figure = Figure(figsize=(4.3 * len(panels) + 1, 3.6), layout="constrained")
    grid: Any = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    for axes, (title, (x, scores)) in zip(grid[0], panels.items(), strict=True):
        for i, task in enumerate(tasks):
            axes.plot(x, 100 * scores[:, i], "-" + "os^v"[i % 4], color=COLOURS[1 + i], label=task)
        mean = 100 * scores.mean(1)  # (n, N) -> (n,)
        axes.plot(x, mean, "--D", color="black", ms=5, lw=2, label="mean")
        best = int(mean.argmax())
        axes.plot(x[best], mean[best], "*", ms=18, color=COLOURS[4], mec="black", label="best mean")
        axes.set(xlabel=xlabel, ylim=(0, 100))
        axes.set_title(f"{title}\nbest mean: {mean[best]:.0f} % at {x[best]:g}", fontsize=10)
        axes.grid(alpha=0.3)
    grid[0][0].set_ylabel("accuracy, % (reward split)")
    grid[0][-1].legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def dare_picture(delta: Tensor, masked: Mapping[str, Tensor], drop_rate: float) -> Figure:
    """Entries of a task vector (n,) against what DARE makes of them: title -> (n,), one panel each."""
    figure = Figure(figsize=(4.2 * len(masked), 3.8), layout="constrained")
    panels: Any = figure.subplots(1, len(masked), sharex=True, sharey=True, squeeze=False)
    high = 1.1 * float(delta.abs().max())
    for i, (axes, (title, values)) in enumerate(zip(panels[0], masked.items(), strict=True)):
        axes.plot([-high, high], [-high, high], color="black", lw=1, label="unchanged")
        steep = np.array([-high, high]) / (1 - drop_rate)
        axes.plot([-high, high], steep, ":", color="0.3", label="kept and rescaled")
        axes.plot(delta, values, "ox"[i % 2], ms=4, color=COLOURS[(5, 6)[i % 2]])
        axes.set_xlabel("entry of the task vector")
        axes.locator_params(axis="x", nbins=5)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("entry after DARE")
    panels[0][0].set_ylim(-high / (1 - drop_rate), high / (1 - drop_rate))
    panels[0][0].legend(fontsize=8, loc="upper left")
    return figure


def kept_picture(
    kept: np.ndarray, names: Sequence[str], places: Sequence[str], density: float
) -> Figure:
    """Share of each expert's entries that trimming leaves, by place: kept (N, P) in [0, 1]."""
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    axes: Any = figure.subplots()
    x, width = np.arange(len(places)), 0.8 / len(names)
    for i, name in enumerate(names):
        at = x + (i - (len(names) - 1) / 2) * width
        bars = axes.bar(
            at, 100 * kept[i], width, label=name, color=COLOURS[1 + i], ec="black", hatch=HATCHES[i]
        )
        label: dict[str, Any] = {"bbox": {"fc": "white", "ec": "none", "pad": 0.5}, "padding": 2}
        axes.bar_label(bars, fmt="%.0f", fontsize=8, **label)
    axes.axhline(100 * density, color="black", ls="--", lw=1, label="trimmed layer by layer")
    axes.set_xticks(x, places)
    axes.set_ylabel("entries kept, %")
    axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def gains_picture(
    gains: np.ndarray, titles: Sequence[str], sources: Sequence[str], places: Sequence[str]
) -> Figure:
    """What a source changes where it replaces one place alone: gains (H, A, P) in points, H panels.

    The best source of each place is framed, where it gains at all.
    """
    figure = Figure(figsize=(8.5, 0.6 + len(titles) * (0.75 + 0.34 * len(sources))))
    figure.set_layout_engine("constrained")
    panels: Any = figure.subplots(len(titles), 1, squeeze=False)[:, 0]
    low, high = float(gains.min()), float(gains.max())
    for axes, values, title in zip(panels, gains, titles, strict=True):
        axes.imshow(values, cmap="cividis", vmin=low, vmax=high, aspect="auto")
        for (a, p), v in np.ndenumerate(values):
            dark = v < (low + high) / 2
            text = {"color": "white" if dark else "black", "ha": "center", "va": "center"}
            axes.text(p, a, f"{v:+.1f}", fontsize=9, **text)
        for p, a in enumerate(values.argmax(0)):
            if values[a, p] > 0:
                frame: dict[str, Any] = {"fill": False, "ec": COLOURS[6], "lw": 3}
                axes.add_patch(Rectangle((p - 0.47, a - 0.45), 0.94, 0.9, **frame))
        axes.set_xticks(range(len(places)), places, fontsize=9)
        axes.set_yticks(range(len(sources)), sources, fontsize=9)
        axes.set_title(title, fontsize=10)
    return figure


# ------------------------------------------------------------------------------------ notebook 03


def maps_picture(
    states: Sequence[tuple[str, np.ndarray, int]], names: Sequence[str], columns: int = 4
) -> Figure:
    """Merging maps side by side: (title, map (N+M, L), the agent's layer) for each."""
    rows = -(-len(states) // columns)
    n_layers = states[0][1].shape[1]
    size = (1 + columns * (0.4 * n_layers + 0.4), rows * (1.1 + 0.3 * len(names)))
    figure = Figure(figsize=size, layout="constrained")
    grid: Any = figure.subplots(rows, columns, squeeze=False)
    for i, axes in enumerate(grid.flat):
        if i >= len(states):
            axes.set_axis_off()
            continue
        title, counts, layer = states[i]
        draw_map(axes, counts, names, 0, cursor=layer)
        axes.set_title(title, fontsize=10)
        axes.xaxis.labelpad = 7  # below the box around the present layer
        if i % columns:
            axes.set_yticklabels([])
    return figure


def depth_picture(depths: np.ndarray, plain: np.ndarray, n_layers: int) -> Figure:
    """How deep random models are: depths (E,) of E episodes, plain (E,) bool: every layer just once."""
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    axes: Any = figure.subplots()
    x = np.arange(depths.max() + 1)
    once = np.bincount(depths[plain], minlength=len(x))
    other = np.bincount(depths[~plain], minlength=len(x))
    look = {"ec": "black", "lw": 0.7}
    axes.bar(x, once, color=COLOURS[3], hatch="///", label="every layer exactly once", **look)
    bars = axes.bar(
        x, other, bottom=once, color=COLOURS[1], label="some skipped or stacked", **look
    )
    axes.bar_label(bars, [str(n) if n else "" for n in once + other], fontsize=9)
    axes.axvline(n_layers + 0.5, color="black", ls=":", lw=1)
    axes.text(
        n_layers + 0.55, 0.8 * (once + other).max(), f"  deeper than\n  the {n_layers} layers"
    )
    axes.set(xlabel="layers in the merged model", ylabel="episodes", xticks=x)
    axes.legend(fontsize=9, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


# ------------------------------------------------------------------------------------ notebooks 06 and 07

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
TONES = (5, 1, 3, 6, 7, 2, 0)  # of COLOURS, for up to seven lines; black last
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 3)))


def diagnostics_picture(
    runs: Mapping[str, Sequence[Mapping[str, float]]], keys: Mapping[str, str]
) -> Figure:
    """Diagnostics over the updates of some searches, a panel for each key of ``keys`` (key -> title).

    ``runs``: label -> one row an update. A KL divergence that spans decades is drawn on a log
    scale, floored at 1e-5.
    """
    n = -(-len(keys) // 2)
    figure = Figure(figsize=(9, 0.5 + 2.4 * n), layout="constrained")
    panels = figure.subplots(n, 2, squeeze=False).flatten()
    for axes, (key, title) in zip(panels, keys.items(), strict=False):
        every = [row[key] for rows in runs.values() for row in rows]
        far = key == "approx_kl" and (max(every) > 1 or min(every) < 1e-3)
        for i, (label, rows) in enumerate(runs.items()):
            y = np.array([row[key] for row in rows])
            if far:
                y = np.maximum(y, 1e-5)
            look = {"color": COLOURS[TONES[i % 7]], "marker": MARKERS[i % 7], "ms": 5}
            axes.plot(np.arange(1, len(y) + 1), y, ls=LINES[i % 7], lw=1.4, label=label, **look)
        if far:
            axes.set_yscale("log")
        elif min(every) >= 0:
            axes.set_ylim(-0.03 * max(every), 1.1 * max(every))
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("update", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    for axes in panels[len(keys) :]:
        axes.set_axis_off()
    if len(runs) > 1:
        lines, labels = panels[0].get_legend_handles_labels()
        figure.legend(lines, labels, fontsize=10, ncols=len(runs), loc="outside upper center")
    return figure


def spread_picture(
    groups: Mapping[str, Mapping[str, Sequence[float]]], xlabel: str, n_columns: int = 2
) -> Figure:
    """A panel for each group, a line for each method: each seed as a point, mean ± deviation as a bar.

    ``groups``: group -> method -> a score in % for each seed.
    """
    n_columns = min(n_columns, len(groups))
    n_rows = -(-len(groups) // n_columns)
    most = max(len(methods) for methods in groups.values())
    size = (4.7 * n_columns if n_columns > 1 else 7, n_rows * (1.0 + 0.42 * most))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(n_rows, n_columns, squeeze=False, sharex=n_columns == 1)
    panels = grid.flatten()
    for axes, (group, methods) in zip(panels, groups.items(), strict=False):
        for y, values in enumerate(methods.values()):
            v, colour = np.asarray(values, float), COLOURS[TONES[y % 7]]
            at = y + np.linspace(-0.24, 0.04, len(v))  # equal scores stay visible
            axes.plot(v, at, MARKERS[y % 7], ms=7, mfc="none", mec=colour, mew=1.4)
            sd = v.std(ddof=1) if len(v) > 1 else 0.0
            axes.errorbar(
                v.mean(), y + 0.28, xerr=sd, fmt="|", ms=10, mew=2, color="black", capsize=4
            )
        axes.set_yticks(range(len(methods)), [f"{m} ({len(v)})" for m, v in methods.items()])
        axes.set_ylim(len(methods) - 0.4, -0.6)
        axes.set_title(group, fontsize=10)
        axes.set_xlabel(xlabel, fontsize=9)
        axes.tick_params(labelsize=9)
        axes.grid(axis="x", alpha=0.3)
    for axes in panels[len(groups) :]:
        axes.set_axis_off()
    return figure


def searches_picture(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """The path that would be chosen, scored on all data, over evaluations: mean and range over seeds.

    ``rows``: those of ``results/searches-curve.csv``; a panel for each group.
    """
    groups = list(dict.fromkeys(row["group"] for row in rows))
    n_columns = min(2, len(groups))
    n_rows = -(-len(groups) // n_columns)
    figure = Figure(figsize=(5 * n_columns, 0.4 + 2.7 * n_rows), layout="constrained")
    panels = figure.subplots(n_rows, n_columns, squeeze=False).flatten()
    for axes, group in zip(panels, groups, strict=False):
        own = [row for row in rows if row["group"] == group]
        for i, method in enumerate(dict.fromkeys(row["method"] for row in own)):
            at: dict[int, list[float]] = {}
            for row in own:
                if row["method"] == method:
                    at.setdefault(row["evaluations"], []).append(row["reward_split"])
            x = sorted(at)
            mean = [float(np.mean(at[n])) for n in x]
            colour = COLOURS[TONES[i % 7]]
            axes.fill_between(
                x, [min(at[n]) for n in x], [max(at[n]) for n in x], color=colour, alpha=0.12
            )
            look = {"marker": MARKERS[i % 7], "ms": 5, "markevery": max(1, len(x) // 8)}
            axes.plot(x, mean, ls=LINES[i % 7], color=colour, label=method, **look)
        axes.set_title(group, fontsize=10)
        axes.set_xlabel("evaluations", fontsize=9)
        axes.set_ylabel("reward split, %", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    for axes in panels[len(groups) :]:
        axes.set_axis_off()
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, fontsize=9, ncols=4, loc="outside upper center")
    return figure


def settled(
    rows: Sequence[Mapping[str, Any]], within: float = 1.0
) -> dict[tuple[str, str], tuple[float, int]]:
    """Where each search's mean curve ends, and from which evaluation on it stays near that.

    ``rows``: those of ``results/searches-curve.csv``. Returns (group, method) -> (mean over seeds at the
    end, the first number of evaluations from which no mean lies more than ``within`` below it).
    """
    found = {}
    means = mean_and_sd(rows, "reward_split", "group", "method", "evaluations")
    for key in dict.fromkeys(k[:2] for k in means):
        curve = sorted((k[2], mean) for k, (_, mean, _) in means.items() if k[:2] == key)
        first, end = curve[0][0], curve[-1][1]
        for (_, mean), (n, _) in pairwise(curve):
            first = n if mean < end - within else first
        found[key] = (end, first)
    return found


def estimates_picture(
    estimates: Mapping[str, np.ndarray], whole: float, predicted: Mapping[str, float]
) -> Figure:
    """Histograms of reward estimates on subsets, a panel for each share, and the score on all data.

    ``estimates``: share -> (k,) in [0, 1]; ``predicted``: share -> standard deviation, drawn as a span.
    """
    figure = Figure(figsize=(8, 1.0 + 1.5 * len(estimates)), layout="constrained")
    panels = figure.subplots(len(estimates), 1, sharex=True, squeeze=False)[:, 0]
    low = min(float(v.min()) for v in estimates.values())
    high = max(float(v.max()) for v in estimates.values())
    bins = np.linspace(100 * low - 2, 100 * high + 2, 31)
    for axes, (share, values) in zip(panels, estimates.items(), strict=True):
        gap = np.diff(np.unique(np.round(100 * values, 6))).min(initial=np.inf)
        own = bins
        if np.isfinite(gap) and gap > bins[1] - bins[0]:  # few examples: few possible values
            n = round((100 * high - 100 * values.min()) / gap) + 1
            own = 100 * values.min() + gap * (np.arange(n + 1) - 0.5)
        axes.hist(
            100 * values,
            bins=[float(edge) for edge in own],
            color=COLOURS[2],
            ec="black",
            lw=0.6,
            hatch="//",
        )
        axes.axvline(100 * whole, color="black", ls="--", lw=1.5, label="all data")
        mean = f"mean of {len(values)}"
        axes.plot([100 * values.mean()], [0.4], "D", color=COLOURS[1], mec="black", label=mean)
        sd = 100 * predicted[share]
        span = {"color": COLOURS[5], "alpha": 0.2, "zorder": 0}
        axes.axvspan(100 * whole - sd, 100 * whole + sd, label="± predicted sd", **span)
        axes.set_xlim(right=min(100.0, axes.get_xlim()[1]))  # no reward is above 100 %
        axes.set_title(f"{share} of the data", fontsize=10)
        axes.set_ylabel("subsets", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=8, loc="upper left")
    panels[-1].set_xlabel("reward estimate of one path, %", fontsize=9)
    return figure


def dar_curve_picture(rows: Sequence[Mapping[str, Any]], window: int = 100) -> Figure:
    """Fig. 3's shape: what the agent is paid per episode, without DAR and with it, one below the other.

    ``rows``: those of ``results/dar-curve.csv``, rewards in %. Dotted lines: a new window begins.
    """
    scales = sorted({row["dar"] for row in rows})
    figure = Figure(figsize=(8, 0.6 + 2.2 * len(scales)), layout="constrained")
    panels = figure.subplots(len(scales), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, scale in zip(panels, scales, strict=True):
        own = [row for row in rows if row["dar"] == scale]
        x = [row["episode"] for row in own]
        paid = np.array([row["dar_reward"] for row in own], float)
        raw = np.array([row["raw_reward"] for row in own], float)
        if scale:
            axes.plot(x, raw, ".", ms=3, color="0.6", label="raw reward (Eq. 7)")
        look = {"lw": 0.8, "color": COLOURS[5], "marker": "+", "ms": 4}
        axes.plot(
            x, paid, label="paid: DAR reward (Eq. 10)" if scale else "paid: raw reward", **look
        )
        axes.plot(
            x, moving_average(raw, 50), color=COLOURS[6], lw=2, label="raw, mean of the last 50"
        )
        for start in range(0, len(x), window):
            label = "" if scale or start else "a new window begins"
            axes.axvline(start, color="black", ls=":", lw=0.8, label=label)
        title = f"with DAR, λ = {scale:g}" if scale else "without DAR"
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_ylabel("reward, %", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)
    panels[-1].set_xlabel("episode", fontsize=9)
    return figure


# ---- notebook 04


def examples(
    tasks: Sequence[Any], split: str = "train", means: Mapping[str, int] | None = None
) -> Figure:
    """One image of each class: a row for each task, the class's name above. tasks: N ``tasks.Task``.

    ``means``: task -> n adds a row below the task's own: the mean of the first n images of each class.
    """
    averaged = means or {}
    shown = []  # (task, how many images)
    for task in tasks:
        shown += [(task, 1)] + ([(task, averaged[task.name])] if task.name in averaged else [])
    width = max(len(task.classes) for task in tasks)
    figure = Figure(figsize=(1.5 * width, 1.7 * len(shown)), layout="constrained")
    rows = figure.subplots(len(shown), width, squeeze=False)
    for row, (task, n) in zip(rows, shown, strict=True):
        data = task.split(split)
        for c, axes in enumerate(row):
            axes.set_axis_off()
            if c < len(task.classes):
                some = data.images[data.labels == c][:n, 0].float().mean(0)
                axes.imshow(some, cmap="gray", vmin=0, vmax=255)
                title = f"{task.name}: {task.classes[c]}" + (f",\nmean of {n}" if n > 1 else "")
                axes.set_title(title, fontsize=9)
    return figure


def sorted_rewards(rewards: np.ndarray, marks: Mapping[str, int], top: int | None = None) -> Figure:
    """All paths from the best to the worst, some of them named.

    rewards: (P,) in [0, 1], in any order; marks: name -> position in ``rewards``; top: draw these many.
    """
    order = np.argsort(-rewards, kind="stable")
    shown = order[:top]
    rank = {int(p): i + 1 for i, p in enumerate(order)}
    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        range(1, len(shown) + 1), 100 * rewards[shown], ".-", ms=4, lw=0.8, color="0.5",
        label=f"the {len(shown)} best of {len(rewards)} paths" if top else f"all {len(rewards)} paths",
    )  # fmt: skip
    for i, (name, p) in enumerate(marks.items()):
        axes.plot(
            rank[p], 100 * rewards[p], "oD^vsP*X"[i % 8], ms=max(6, 14 - 2 * i), mec="black",
            color=COLOURS[1 + i % 7],
            label=f"{name}: rank {rank[p]}, {100 * rewards[p]:.1f} %", ls="none",
        )  # fmt: skip
    axes.set_xlabel("rank (1 is the best)")
    axes.set_ylabel("reward, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def neighbours(path: Path, n_sources: int) -> list[list[Path]]:
    """What a path becomes if one place takes another source: [place][source] -> path."""
    return [
        [(*path[:i], (a, k), *path[i + 1 :]) for a in range(n_sources)]
        for i, (_, k) in enumerate(path)
    ]


def one_place(rewards: np.ndarray, path: Path, sources: Sequence[str]) -> Figure:
    """Rewards (T, N+M) of a path's ``neighbours`` as a heat map; the path's own places are framed."""
    figure = Figure(figsize=(1.6 + 1.3 * len(path), 1.3 + 0.5 * len(sources)), layout="constrained")
    axes = figure.subplots()
    percent = 100 * rewards.T  # (N+M, T)
    image = axes.imshow(percent, cmap="cividis", aspect="auto")
    middle = (percent.min() + percent.max()) / 2
    for (a, i), value in np.ndenumerate(percent):
        own = path[i][0] == a
        text = f"{value:.1f}" + (" ◆" if own else "")
        axes.text(
            i, a, text, ha="center", va="center", color="black" if value > middle else "white"
        )
        if own:
            frame = Rectangle((i - 0.47, a - 0.47), 0.94, 0.94, fill=False, ec=COLOURS[1], lw=3)
            axes.add_patch(frame)
    axes.set_xticks(range(len(path)), [str(k) for _, k in path])
    axes.set_yticks(range(len(sources)), sources)
    axes.set_xlabel("layer whose source is changed")
    figure.colorbar(image, ax=axes, label="reward, %")
    return figure


def subset_strip(values: Mapping[str, tuple[np.ndarray, float]]) -> Figure:
    """Rewards on data subsets as points, and on all data as a bar. name -> ((S,) rewards, reward)."""
    figure = Figure(figsize=(7, 1.1 + 0.5 * len(values)), layout="constrained")
    axes = figure.subplots()
    for i, (found, whole) in enumerate(values.values()):
        label = ("one subset of 10 %", "all examples") if i == 0 else (None, None)
        axes.plot(
            100 * found, np.full(len(found), i), "o", mfc="none", mec=COLOURS[5], label=label[0]
        )
        axes.plot([100 * whole], [i], "|", ms=26, mew=3, color=COLOURS[6], label=label[1])
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.set_xlabel("reward, %")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(
        fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5), markerscale=0.5, labelspacing=1
    )
    return figure


# ---- notebook 05


def histograms(samples: Mapping[str, np.ndarray], label: str, at: Mapping[str, float]) -> Figure:
    """Histograms of some samples (n,) on the same bins; ``at``: name -> where a line marks a value."""
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    axes = figure.subplots()
    values = np.concatenate(list(samples.values()))
    bins: list[float] = np.linspace(values.min(), values.max(), 30).tolist()
    for i, (name, sample) in enumerate(samples.items()):
        axes.hist(
            sample, bins, color=COLOURS[(1, 5, 3)[i % 3]], alpha=0.6, ec="black", lw=0.4,
            hatch=HATCHES[1 + i], label=f"{name}: deviation {sample.std():.3f}",
        )  # fmt: skip
    for name, x in at.items():
        axes.axvline(x, color="black", ls="--", label=f"{name}: {x:.3f}")
    axes.set_xlabel(label)
    axes.set_ylabel("number of estimates")
    axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def curves(lines: Mapping[str, Sequence[float]], x: str, y: str) -> Figure:
    """Some curves over the updates, each with a marker and a line style of its own."""
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    axes = figure.subplots()
    for i, (name, values) in enumerate(lines.items()):
        axes.plot(
            values, marker="oD^vsP*X"[i % 8], ls=("-", "--", ":", "-.")[i % 4], lw=1.8, ms=5,
            markevery=max(1, len(values) // 12), color=COLOURS[TONES[i % 7]], label=name,
        )  # fmt: skip
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def targets(steps: np.ndarray, values: Mapping[str, np.ndarray]) -> Figure:
    """What each step of some episodes is told: (B,) targets over (B,) step numbers, a panel for each."""
    figure = Figure(figsize=(8, 3.1), layout="constrained")
    panels = figure.subplots(1, len(values), sharey=True, squeeze=False)[0]
    for i, (axes, (name, target)) in enumerate(zip(panels, values.items(), strict=True)):
        axes.plot(steps, target, "oD^"[i % 3], color=COLOURS[(6, 5, 3)[i % 3]], mec="black", ms=6)
        axes.axhline(0, color="black", lw=0.7)
        axes.set_title(name, fontsize=11)
        axes.set_xlabel("step of the episode")
        axes.set_xticks(range(int(steps.max()) + 1))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("normalised return")
    return figure


# ---- notebook 08

LINEAR = ("task_arithmetic", "weight_average", "weighted_average")  # sums of scaled task vectors


def amounts(source: str, names: Sequence[str]) -> np.ndarray:
    """How much of each expert's task vector a source adds to the base: (N,).

    1 of its own for an expert, its scales for task arithmetic; NaN where a source trims or drops.
    """
    if source == "base":
        return np.zeros(len(names))
    if source in names:
        return np.eye(len(names))[list(names).index(source)]
    spec = parse_operator(source)
    if spec.function not in LINEAR:
        return np.full(len(names), np.nan)
    return spec(torch.zeros(len(names)), torch.eye(len(names))).double().numpy()


def path_amounts(
    steps: Sequence[tuple[str, int]], stem: str, names: Sequence[str], n_layers: int
) -> np.ndarray:
    """``amounts`` at each place of a path: (N, 1 + L), the stem first; NaN where it takes no layer."""
    out = np.full((len(names), 1 + n_layers), np.nan)
    for source, k in [(stem, -1), *steps]:
        out[:, 1 + k] = amounts(source, names)
    return out


def amounts_picture(found: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """A heat map for each group: group -> expert -> (1 + L,) amounts, in the cells as numbers."""
    rows = -(-len(found) // 2)
    figure = Figure(figsize=(9.5, 1.9 * rows), layout="constrained")
    grid = figure.subplots(rows, 2, squeeze=False)
    for axes, (group, own) in zip(grid.flat, found.items(), strict=False):
        values = np.stack(list(own.values()))  # (N, 1 + L)
        axes.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        for (y, x), value in np.ndenumerate(values):
            if not np.isnan(value):
                colour = "black" if value >= 0.5 else "white"
                text = f"{value:.1f}".replace("0.", ".")
                axes.text(x, y, text, ha="center", va="center", fontsize=8, color=colour)
        axes.set_title(group, fontsize=10)
        axes.set_xticks(range(values.shape[1]), ["stem", *range(values.shape[1] - 1)], fontsize=9)
        axes.set_yticks(range(len(own)), list(own), fontsize=9)
        axes.set_xlabel("layer", fontsize=9)
    for axes in grid.flat[len(found) :]:
        axes.set_axis_off()
    return figure


def seeds_picture(scores: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """Every seed's score as an open mark, one panel per group, one line per method.

    ``scores``: group -> method -> (S,) in %. Squares are bounds, circles uniform merges as published,
    triangles tuned ones, diamonds RMM. A method that a group lacks keeps its line empty.
    """
    rows = -(-len(scores) // 2)
    methods = list(dict.fromkeys(m for own in scores.values() for m in own))
    figure = Figure(figsize=(9.5, 3.3 * rows), layout="constrained")
    grid = figure.subplots(rows, 2, squeeze=False, sharey=True)
    for axes, (group, own) in zip(grid.flat, scores.items(), strict=False):
        for method, values in own.items():
            marker, colour = "o", COLOURS[1]
            if method in ("base", "fine-tuned", "multi-task") or "expert" in method:
                marker, colour = "s", "0.35"
            elif method.startswith("RMM"):
                marker, colour = "D", COLOURS[3]
            elif "tuned" in method or method == "weight average":
                marker, colour = "^", COLOURS[5]
            y = np.full(len(values), methods.index(method))
            axes.plot(values, y, marker, ms=7, mfc="none", mec=colour, mew=1.4)
        axes.set_title(group, fontsize=10)
        axes.set_yticks(range(len(methods)), methods, fontsize=9)
        axes.set_ylim(len(methods) - 0.5, -0.5)
        axes.set_xlabel("mean over tasks, test split, %", fontsize=9)
        axes.tick_params("x", labelsize=9)
        axes.grid(alpha=0.3)
    for axes in grid.flat[len(scores) :]:
        axes.set_axis_off()
    return figure


def gain_picture(gains: Mapping[str, np.ndarray], half: Mapping[str, float]) -> Figure:
    """Each seed's gain as an open diamond, the mean and its interval as a bar, one line per group.

    ``gains``: group -> (S,) in points; ``half``: group -> half the width of the interval.
    """
    figure = Figure(figsize=(7.5, 1.0 + 0.6 * len(gains)), layout="constrained")
    axes = figure.subplots()
    for y, (group, values) in enumerate(gains.items()):
        axes.plot(values, np.full(len(values), y + 0.18), "D", ms=6, mfc="none", mec=COLOURS[3])
        mean, bar = values.mean(), half[group]
        axes.errorbar(mean, y - 0.14, xerr=bar, fmt="|", ms=12, color="black", capsize=5, lw=2)
    axes.axvline(0, color="black", lw=1, ls="--")
    axes.set_yticks(range(len(gains)), list(gains), fontsize=9)
    axes.set_ylim(len(gains) - 0.5, -0.5)
    axes.set_xlabel("gain of RMM over the best uniform merge, points", fontsize=9)
    axes.tick_params("x", labelsize=9)
    axes.grid(axis="x", alpha=0.3)
    return figure


# ---- notebook 09


def t5_picture(n_encoder: int, n_decoder: int) -> Figure:
    """A T5 as boxes: two stacks of blocks with their layer numbers, and in grey what is the stem."""
    figure = Figure(figsize=(9.5, 3.4), layout="constrained")
    axes = figure.subplots()

    def box(x: float, y: float, text: str, colour: Any, hatch: str = "") -> None:
        place = Rectangle((x, y), 0.9, 0.75, fc=(*to_rgb(colour), 0.35), ec="black", hatch=hatch)
        axes.add_patch(place)
        plain = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85}
        axes.text(x + 0.45, y + 0.37, text, ha="center", va="center", fontsize=9, bbox=plain)

    deepest = max(n_encoder, n_decoder)
    rows = (
        ("encoder", 2.0, n_encoder, 0, COLOURS[5]),
        ("decoder", 0.0, n_decoder, n_encoder, COLOURS[1]),
    )
    for stack, y, depth, first, colour in rows:
        box(0, y, "shared\nembeddings", "0.6", "//")
        box(1.2, y, "position\nbias", "0.6", "//")
        for k in range(depth):
            box(2.4 + k, y, f"{stack[:3]} {k}\nlayer {first + k}", colour)
        box(2.6 + deepest, y, "final\nnorm", "0.6", "//")
        axes.text(-0.2, y + 0.37, stack, ha="right", va="center", fontsize=10, fontweight="bold")
    out = 3.05 + deepest
    axes.annotate("", (2.4, 1.2), (out, 1.2), arrowprops={"arrowstyle": "-", "lw": 1.5})
    axes.plot([out, out], [2.0, 1.2], color="black", lw=1.5)
    for k in range(n_decoder):
        axes.annotate(
            "", (2.85 + k, 0.75), (2.85 + k, 1.2), arrowprops={"arrowstyle": "->", "lw": 1.5}
        )
    axes.text(2.4, 1.3, "every decoder block reads the encoder's last tokens", fontsize=9)
    box(4.0 + deepest, 0, "choice's\nlog-prob.", "0.6", "//")
    axes.set_xlim(-1.3, 5.1 + deepest)
    axes.set_ylim(-0.2, 3.0)
    axes.set_axis_off()
    return figure


def hills_picture(
    drawn: np.ndarray, partial: Mapping[int, np.ndarray], tasks: Sequence[str], expert: str
) -> Figure:
    """What a search can learn from: random paths, and paths that are partly right.

    ``drawn``: (paths, N) scores in [0, 1] of random paths. ``partial``: n -> (paths, N) scores of paths
    that take ``expert``, one of the ``tasks``, at n places. Left: each task's score against the reward;
    right: the mean reward and each task's mean score against n; the reward of each path as a mark.
    """
    figure = Figure(figsize=(9.5, 3.7), layout="constrained")
    left, right = figure.subplots(1, 2)
    rewards = {n: 100 * found.mean(1) for n, found in partial.items()}
    for n, found in rewards.items():
        right.plot(np.full(len(found), n), found, "D", color="black", mfc="none", ms=4, alpha=0.6)
    means = [found.mean() for found in rewards.values()]
    right.plot(list(partial), means, "D-", color="black", lw=2.5, label="reward")
    for i, task in enumerate(tasks):
        style: dict[str, Any] = {"marker": "o^s"[i], "color": COLOURS[(5, 6, 3)[i]], "label": task}
        left.plot(100 * drawn.mean(1), 100 * drawn[:, i], ms=5, ls="none", mfc="none", **style)
        means = [100 * found[:, i].mean() for found in partial.values()]
        right.plot(list(partial), means, ls=("--", "-.", ":")[i], lw=1.8, **style)
    left.set_xlabel("reward of a random path: mean over tasks, %", fontsize=9)
    left.set_ylabel("score on each task, %", fontsize=9)
    left.set_ylim(-3, 125)
    left.set_yticks(range(0, 101, 20))
    right.set_xlabel(f"places that take {expert}; the others are random", fontsize=9)
    right.set_ylabel("mean over the paths, %", fontsize=9)
    right.set_xticks(list(partial))
    for axes in (left, right):
        axes.tick_params(labelsize=9)
        axes.grid(alpha=0.3)
    left.legend(fontsize=9, ncols=3, loc="upper center")
    title = "open marks: one path's reward"
    right.legend(fontsize=9, title=title, title_fontsize=9, loc="upper left")
    return figure


def tokens_picture(
    tokens: Sequence[Sequence[str]], log_probs: np.ndarray, right: int, title: str
) -> Figure:
    """Each choice as a row of cells: a token with its log-probability; padding is hatched.

    ``tokens``: C lists of at most T; log_probs: (C, T); ``right``: the number of the right choice.
    """
    C, T = log_probs.shape
    figure = Figure(figsize=(1.6 + 1.0 * T, 0.9 + 0.62 * C), layout="constrained")
    axes = figure.subplots()
    low = min(-1.0, *(log_probs[c, t] for c in range(C) for t in range(len(tokens[c]))))
    for c in range(C):
        for t in range(T):
            if t >= len(tokens[c]):
                axes.add_patch(Rectangle((t, c), 0.94, 0.9, fc="white", ec="0.5", hatch="xx"))
                continue
            share = float(1 - log_probs[c, t] / low)
            axes.add_patch(Rectangle((t, c), 0.94, 0.9, fc=colormaps["cividis"](share), ec="black"))
            text = f"{tokens[c][t]}\n{round(float(log_probs[c, t]), 2) + 0.0:.2f}"
            colour = "black" if share > 0.5 else "white"
            axes.text(t + 0.47, c + 0.45, text, ha="center", va="center", fontsize=9, color=colour)
    names = [f"choice {c}" + (" (right)" if c == right else "") for c in range(C)]
    axes.set_yticks(np.arange(C) + 0.45, names, fontsize=9)
    axes.set_xticks(np.arange(T) + 0.47, [f"t = {t + 1}" for t in range(T)], fontsize=9)
    axes.set(xlim=(-0.06, T), ylim=(C, -0.06))
    axes.set_title(title, fontsize=10)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return figure
