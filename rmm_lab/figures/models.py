"""Figures of notebooks 00 to 03: models, task vectors, operators, walks. Plain data in, a Figure out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, MultipleLocator
from torch import Tensor

from rmm_lab.errors import InputError
from rmm_lab.figures.paths import (
    COLOURS,
    DIFFERENCES,
    draw_box,
    draw_map,
    heat_map,
    look_of,
    panels,
    tidy,
)
from rmm_lab.reward import Path

ARROW = {"arrowstyle": "-|>", "lw": 2}

# ------------------------------------------------------------------------------------ notebooks 00 and 01


def rmm_picture(
    path: Path, models: Sequence[str], operators: Sequence[str], n_layers: int
) -> Figure:
    """RMM in one picture: sources as columns of layers, the walk through them, the merged stack.

    ``path``: an example without skip and back. After the paper's Fig. 2. Raises InputError for a step whose
    source is neither a model nor an operator.
    """
    sources = [*models, *operators]
    for step in path:
        if step.source not in sources:
            known = ", ".join(sources)
            raise InputError(f"step {step}: expected one of {known}; draw its source too")
    places = [(sources.index(step.source), step.layer) for step in path]
    figure, (axes,) = panels(1, 1, 9.1, 4.6)
    centred = {"ha": "center", "fontsize": 9}
    for a, source in enumerate(sources):
        for k in range(n_layers):
            look, pale = look_of(source, sources), (a, k) not in places
            draw_box(axes, 1.6 * a, k, 1.2, f"layer {k}", look, pale)
        kind = "model" if source in models else "operator"
        axes.text(1.6 * a, n_layers - 0.3, f"{source}\n({kind})", **centred)
    for (b, j), (a, k) in pairwise(places):
        arrow = {"arrowprops": ARROW | {"color": COLOURS[0]}, "zorder": 3}
        axes.annotate("", (1.6 * a, k - 0.34), (1.6 * b, j + 0.34), **arrow)
    right = 1.6 * len(sources) + 1.5
    for t, step in enumerate(path):
        text = f"{step.source}, layer {step.layer}"
        draw_box(axes, right, t, 2.4, text, look_of(step.source, sources))
    axes.text(right, len(places) - 0.3, "merged model\n(runs upwards)", **centred)
    axes.annotate("", (right - 1.3, 2), (right - 2.0, 2), arrowprops=ARROW)
    axes.text(right - 1.65, 2.2, "becomes", **centred)
    axes.text(right, -0.75, "its accuracy on all tasks: the reward", **centred)
    axes.text(0.8 * (len(sources) - 1), -0.75, "the agent starts at layer 0", **centred)
    axes.set(xlim=(-0.8, right + 1.4), ylim=(-1, max(n_layers, len(places)) + 0.5))
    axes.set_axis_off()
    return figure


def gallery(tasks: Sequence[Any], n: int = 10) -> Figure:
    """A picture of each of n classes, spread over a task's classes; one row per task."""
    figure, grid = panels(n * len(tasks), n, 0.75 + 1.2 / n, 0.95)
    for i, task in enumerate(tasks):
        split, row = task.split("reward"), grid[n * i : n * (i + 1)]
        classes = np.linspace(0, len(task.classes) - 1, n).round().astype(int).tolist()
        for c, axes in zip(classes, row, strict=True):
            second = split.images[split.labels == c][1].permute(1, 2, 0).numpy()  # (H, W, channels)
            axes.imshow(second, cmap="gray", vmin=0, vmax=255)
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
    figure, (axes,) = panels(1, 1, 6.4, 4.4)
    below: dict[str, Any] = {"xytext": (0, -8), "ha": "center", "va": "top"}
    left: dict[str, Any] = {"xytext": (-8, 0), "ha": "right", "va": "center"}
    colours = {name: look_of(name, [*names, "average"])[0] for name in [*names, "average"]}
    for point, name, beside in zip(points, names, (below, left), strict=True):
        axes.annotate("", point, (0, 0), arrowprops=ARROW | {"color": colours[name]})
        label = {"textcoords": "offset points", "fontsize": 9, **beside}
        axes.annotate(f"task vector\nof {name}", point / 2, **label)
    axes.plot(*points.T, ls=":", color="0.3")
    marks = zip([*points, points.mean(0)], [*names, "average"], "osD", strict=True)
    for point, name, marker in marks:
        axes.plot(*point, marker=marker, ms=11, color=colours[name], mec="black")
        axes.text(*point, f"   {name}", fontsize=10, va="bottom")
    axes.plot(0, 0, marker="P", ms=12, color=COLOURS[0])
    axes.text(0, 0, "base   ", fontsize=10, ha="right", va="top")
    tidy(axes, "", "distance in weight space", "distance in weight space")
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.15)
    first, second, *_ = MaxNLocator(5).tick_values(0, float(np.abs(points).max()))
    for axis in (axes.xaxis, axes.yaxis):  # equal distances, equal steps
        axis.set_major_locator(MultipleLocator(second - first))
    return figure


# ------------------------------------------------------------------------------------ notebook 02


def sign_picture(
    before: Tensor, after: Tensor, names: Sequence[str], titles: Sequence[str]
) -> Figure:
    """Two experts' task vectors against each other, entry by entry, at two stages.

    before, after: (2, D); about 2,500 entries are drawn. Those of opposite sign lie in the
    shaded quadrants, entries that one expert lost lie on an axis.
    """
    figure, both = panels(2, 2, 4.5, 5, sharex=True, sharey=True)
    step = max(1, before.shape[1] // 2500)
    high = 1.05 * float(before[:, ::step].abs().max())
    below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "ncols": 2}
    for axes, deltas, title in zip(both, (before, after), titles, strict=True):
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
        axes.set(xlim=(-high, high), ylim=(-high, high))
        axes.set_xlabel(f"entry of the task vector: {names[0]}")
        axes.set_title(title, fontsize=10)
        axes.legend(fontsize=8, markerscale=1.5, columnspacing=1, handletextpad=0.2, **below)
    both[0].set_ylabel(f"entry of the task vector: {names[1]}")
    return figure


def sweep_picture(
    sweeps: Mapping[str, tuple[Sequence[float], np.ndarray]], tasks: Sequence[str], xlabel: str
) -> Figure:
    """Scores over a setting: title -> (settings (n,), scores (n, N) in [0, 1]), one panel each.

    A line and marker per task, the mean in black; a star at its highest point.
    """
    figure, grid = panels(len(sweeps), len(sweeps), 4.1 + 0.9 / len(sweeps), 3.6, sharey=True)
    for axes, (title, (x, scores)) in zip(grid, sweeps.items(), strict=True):
        for i, task in enumerate(tasks):
            colour = look_of(task, tasks)[0]
            axes.plot(x, 100 * scores[:, i], "-" + "os^v"[i % 4], color=colour, label=task)
        mean = 100 * scores.mean(1)  # (n, N) -> (n,)
        axes.plot(x, mean, "--D", color="black", ms=5, lw=2, label="mean")
        best = int(mean.argmax())
        axes.plot(x[best], mean[best], "*", ms=18, color=COLOURS[4], mec="black", label="best mean")
        axes.set_ylim(0, 100)
        tidy(axes, f"{title}\nbest mean: {mean[best]:.0f} % at {x[best]:g}", xlabel)
    grid[0].set_ylabel("accuracy, % (reward split)", fontsize=9)
    named = [*tasks, "mean", "best mean"]  # given, or one that begins with "_" is left out
    grid[-1].legend(grid[-1].lines, named, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def dare_picture(delta: Tensor, masked: Mapping[str, Tensor], drop_rate: float) -> Figure:
    """Entries of a task vector (n,) against what DARE makes of them: title -> (n,), one panel each."""
    figure, grid = panels(len(masked), len(masked), 4.2, 3.8, sharex=True, sharey=True)
    ends = 1.1 * float(delta.abs().max()) * np.array([-1, 1])
    steep = ends / (1 - drop_rate)
    for i, (axes, (title, values)) in enumerate(zip(grid, masked.items(), strict=True)):
        axes.plot(ends, ends, color="black", lw=1, label="unchanged")
        axes.plot(ends, steep, ":", color="0.3", label="kept and rescaled")
        axes.plot(delta, values, "ox"[i % 2], ms=4, color=COLOURS[(5, 6)[i % 2]])
        tidy(axes, title, "entry of the task vector")
        axes.locator_params(axis="x", nbins=5)
    grid[0].set_ylabel("entry after DARE", fontsize=9)
    grid[0].set_ylim(*steep)
    grid[0].legend(fontsize=8, loc="upper left")
    return figure


def kept_picture(
    kept: np.ndarray, names: Sequence[str], places: Sequence[str], density: float
) -> Figure:
    """Share of each expert's entries that trimming leaves, by place: kept (N, P) in [0, 1]."""
    figure, (axes,) = panels(1, 1, 7.5, 3.2)
    x, width = np.arange(len(places)), 0.8 / len(names)
    behind: dict[str, Any] = {"bbox": {"fc": "white", "ec": "none", "pad": 0.5}, "padding": 2}
    for i, name in enumerate(names):
        at = x + (i - (len(names) - 1) / 2) * width
        colour, hatch = look_of(name, names)
        look = {"color": colour, "ec": "black", "hatch": hatch}
        bars = axes.bar(at, 100 * kept[i], width, label=name, **look)
        axes.bar_label(bars, fmt="%.0f", fontsize=8, **behind)
    axes.axhline(100 * density, color="black", ls="--", lw=1, label="trimmed layer by layer")
    axes.set_xticks(x, places)
    axes.set_ylabel("entries kept, %")
    named = [*axes.lines, *axes.containers], ["trimmed layer by layer", *names]
    axes.legend(*named, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def gains_picture(
    gains: np.ndarray, titles: Sequence[str], sources: Sequence[str], places: Sequence[str]
) -> Figure:
    """What a source changes where it replaces one place alone: gains (H, A, P) in points, H panels.

    The best source of each place is framed, where it gains at all.
    """
    figure, grid = panels(len(titles), 1, 8.5, 0.75 + 0.34 * len(sources), more=0.6)
    most = float(np.abs(gains).max()) or 1.0
    for axes, values, title in zip(grid, gains, titles, strict=True):
        heat_map(axes, values, sources, places, "{:+.1f}".format, -most, most, DIFFERENCES)
        for p, a in enumerate(values.argmax(0)):
            if values[a, p] > 0:
                frame: dict[str, Any] = {"fill": False, "ec": COLOURS[6], "lw": 3}
                axes.add_patch(Rectangle((p - 0.47, a - 0.45), 0.94, 0.9, **frame))
        axes.set_title(title, fontsize=10)
    return figure


# ------------------------------------------------------------------------------------ notebook 03


def maps_picture(
    states: Sequence[tuple[str, np.ndarray, int]], names: Sequence[str], columns: int = 4
) -> Figure:
    """Merging maps side by side: (title, map (N+M, L), the agent's layer) for each."""
    width = 1 / columns + 0.4 * states[0][1].shape[1] + 0.4
    figure, grid = panels(len(states), columns, width, 1.1 + 0.3 * len(names))
    for i, (axes, (title, counts, layer)) in enumerate(zip(grid, states, strict=True)):
        draw_map(axes, counts, names, 0, cursor=layer)
        axes.set_title(title, fontsize=10)
        axes.xaxis.labelpad = 7  # below the box around the present layer
        if i % columns:
            axes.set_yticklabels([])
    return figure


def depth_picture(depths: np.ndarray, plain: np.ndarray, n_layers: int) -> Figure:
    """How deep random models are: depths (E,) of E episodes, plain (E,) bool: every layer just once."""
    figure, (axes,) = panels(1, 1, 7.5, 3.4)
    x, look = np.arange(depths.max() + 1), {"ec": "black", "lw": 0.7}
    once, other = (np.bincount(depths[own], minlength=len(x)) for own in (plain, ~plain))
    axes.bar(x, once, color=COLOURS[3], hatch="///", label="every layer exactly once", **look)
    look |= {"color": COLOURS[1], "label": "some skipped or stacked"}
    bars = axes.bar(x, other, bottom=once, **look)
    axes.bar_label(bars, [str(n) if n else "" for n in once + other], fontsize=9)
    axes.axvline(n_layers + 0.5, color="black", ls=":", lw=1)
    text = f"  deeper than\n  the {n_layers} layers"
    axes.text(n_layers + 0.55, 0.8 * (once + other).max(), text)
    axes.set(xlabel="layers in the merged model", ylabel="episodes", xticks=x)
    axes.legend(fontsize=9, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
