"""Figures of paths: rewards (Fig. 3), layer paths, merging maps, policies.

Colours are okabe_ito; counts and probabilities go from white to dark blue, so that zero looks empty, and
differences from orange to purple with white at zero.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import color_sequences
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from rmm_lab.reward import Path, Step

COLOURS = color_sequences["okabe_ito"]
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "ooo", "+++", "---")
COUNTS = LinearSegmentedColormap.from_list("counts", ["white", "#004c7d"])
DIFFERENCES = "PuOr"
MIDDLE: dict[str, Any] = {"ha": "center", "va": "center"}
ON_WHITE = {"fc": "white", "ec": "none", "pad": 1}  # behind a text
BOXES = 10  # of a path in one row


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file, the same for the same figure."""
    data, dpi = io.BytesIO(), figure.dpi
    figure.dpi = 150
    try:  # not savefig, which draws everything twice
        FigureCanvasAgg(figure).print_png(data, metadata={"Software": None})
    finally:
        figure.dpi = dpi
    return data.getvalue()


def panels(
    n: int, n_columns: int, width: float, height: float, more: float = 0.0, **options: Any
) -> tuple[Figure, list[Any]]:
    """A figure of n axes in rows of ``n_columns``, each ``width`` by ``height`` inches.

    ``more``: inches of height for the whole figure, such as for a legend; ``options``: of ``subplots``.
    """
    rows = -(-n // n_columns)
    size = (width * n_columns, more + height * rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, n_columns, squeeze=False, **options).flatten()
    for unused in axes[n:]:
        unused.set_axis_off()
    return figure, list(axes[:n])


def tidy(
    axes: Any, title: str = "", xlabel: str = "", ylabel: str = "", grid: Any = "both"
) -> None:
    """Titles, labels and ticks in the sizes of the course, and a pale grid."""
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(axis=grid, alpha=0.3)


def heat_map(
    axes: Any,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[Any],
    write: Callable[[float], str],
    low: float = 0.0,
    high: float = 1.0,
    colours: Any = COUNTS,
    fontsize: float = 9,
) -> Any:
    """Draw an array (rows, columns) with names and ``write(value)`` in its cells; returns the image."""
    image = axes.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        if text := "–" if np.isnan(value) else write(value):
            *rgb, alpha = image.to_rgba(value)  # transparent where NaN
            dark = alpha and np.dot(rgb, (0.3, 0.59, 0.11)) < 0.5
            colour = "white" if dark else "black"
            axes.text(x, y, text, fontsize=fontsize, color=colour, **MIDDLE)
    axes.set_xticks(range(len(columns)), columns, fontsize=9)
    axes.set_yticks(range(len(rows)), list(map(short_name, rows)), fontsize=9)
    return image


def draw_box(
    axes: Any,
    x: float,
    y: float,
    width: float,
    text: str,
    look: tuple[Any, str],
    pale: bool = False,
) -> None:
    """A box around (x, y) with a text; ``look``: its colour and hatch."""
    rgb, hatch = to_rgb(look[0]), "" if pale else look[1]
    face, edge = ((*rgb, 0.08), (*rgb, 0.35)) if pale else ((*rgb, 0.4), rgb)
    corner = (x - width / 2, y - 0.37)
    axes.add_patch(Rectangle(corner, width, 0.74, fc=face, ec=edge, lw=1.5, hatch=hatch))
    behind = ON_WHITE | {"alpha": 0.0 if pale else 0.85}
    colour = "0.4" if pale else "black"
    axes.text(x, y, text, fontsize=8, color=colour, bbox=behind, **MIDDLE)


def look_of(source: str, sources: Sequence[str]) -> tuple[Any, str]:
    """A source's colour and hatch; grey for one that is not among ``sources``."""
    if source not in sources:
        return "0.4", ""
    number = list(sources).index(source)
    return COLOURS[1 + number % (len(COLOURS) - 1)], HATCHES[number % len(HATCHES)]


def moving_average(values: Sequence[float] | np.ndarray, width: int) -> np.ndarray:
    """Mean of the last ``width`` values at each place (fewer at the start): (n,) -> (n,)."""
    return pd.Series(values).rolling(width, min_periods=1).mean().to_numpy()


def reward_curve(episodes: Sequence[dict[str, Any]], width: int = 50) -> Figure:
    """Raw reward of every episode as points, its moving average and the best so far as lines (Fig. 3).

    The DAR reward is drawn only where it differs from the raw one.
    """
    raw, dar = (100 * np.array([e[key] for e in episodes]) for key in ("raw_reward", "dar_reward"))
    x = np.arange(1, len(raw) + 1)
    figure, (axes,) = panels(1, 1, 7, 3.6)
    axes.plot(x, raw, ".", ms=3, color="0.45", label="raw reward of an episode (Eq. 7)")
    if not np.array_equal(raw, dar):
        axes.plot(x, dar, "+", ms=4, mew=0.6, color=COLOURS[1], label="DAR reward (Eq. 10)")
    label = f"mean of the last {width}"
    axes.plot(x, moving_average(raw, width), color=COLOURS[5], lw=2, label=label)
    best = np.maximum.accumulate(raw)
    axes.plot(x, best, "--", color="black", lw=1, label="best so far, on its subset")
    tidy(axes, "", "episode", "mean score, %")
    axes.set_xlim(0, len(raw) + 1)
    axes.legend(fontsize=8, loc="lower right")
    return figure


def place_name(k: int, stacks: Sequence[range] = ()) -> str:
    """A layer's name: ``stem`` below 0, ``layer 2``, or with two stacks (a T5's) ``enc 0``, ``dec 1``."""
    if k < 0:
        return "stem"
    if len(stacks) == 2:
        return f"enc {k}" if k in stacks[0] else f"dec {k - stacks[1].start}"
    return f"layer {k}"


def with_stem(path: Path, stem: str = "base") -> Path:
    """The path with its stem as the first step: from ``stem``, unless the path chooses one."""
    return path if path and path[0].layer < 0 else (Step(stem, -1), *path)


def path_picture(
    path: Path, sources: Sequence[str], n_layers: int, stacks: Sequence[range] = ()
) -> Figure:
    """A path as rows of boxes in running order, under its merging map (Eq. 5, sources by layers).

    One colour and hatch per source; the first box is the stem, the base's unless the path chooses one.
    With two ``stacks`` (a T5's) layers are called enc 0, ..., dec 0, ..., and a line in the map separates
    encoder and decoder.
    """
    return paths_picture([("", path)], {}, sources, n_layers, stacks)


def _draw_path(
    figure: Any, path: Path, sources: Sequence[str], n_layers: int, stacks: Sequence[range]
) -> None:
    """Map and boxes of one path, its stem first, into a part of a figure."""
    rows = -(-len(path) // BOXES)
    top, bottom = figure.subplots(2, 1, height_ratios=[0.45 * len(sources), 0.4 + 0.9 * rows])
    draw_map(top, merging_map(path[1:], sources, 0, n_layers), sources, 0, stacks)
    title = "merging map: how often each source's layer was taken"
    if any(step.scales for step in path):
        title += "; for scales, how much of each expert"
    top.set_title(title, fontsize=10)
    for i, step in enumerate(path):
        x, y = i % BOXES + 0.5, rows - 0.5 - i // BOXES
        text = short_name(step.source).partition(":")[0].replace("_", "\n")
        if step.scales:
            text = "scales\n" + "/".join(f"{s:.2f}".replace("0.", ".") for s in step.scales)
        text += f"\n{place_name(step.layer, stacks)}"
        draw_box(bottom, x, y, 0.84, text, look_of(step.source, sources))
    bottom.set(xlim=(-0.1, min(len(path), BOXES) + 0.1), ylim=(0, rows))
    bottom.set_axis_off()
    bottom.set_title("the path: the stem, then the layers in running order", fontsize=10)


def merging_map(path: Path, sources: Sequence[str], first: int, n_places: int) -> np.ndarray:
    """How often a path takes each source's layer: (S, places from layer ``first`` on), Eq. 5.

    A step with scales counts as its scales, at the experts, which are the first sources.
    """
    counts = np.zeros((len(sources), n_places))
    for step in path:
        if step.scales:
            counts[: len(step.scales), step.layer - first] += step.scales
        elif step.source in sources:
            counts[list(sources).index(step.source), step.layer - first] += 1
    return counts


def draw_map(
    axes: Any,
    counts: np.ndarray,
    names: Sequence[str],
    first: int,
    stacks: Sequence[range] = (),
    cursor: int | None = None,
) -> None:
    """A merging map (rows sources, columns places from layer ``first`` on) with its counts.

    ``names`` may be longer than the map: skip and back have rows without counts. ``cursor``: the layer
    to decide on, which gets a frame.
    """

    def write(n: float) -> str:
        return "" if n == 0 else f"{n:.0f}" if n == round(n) else f"{n:.2f}".replace("0.", ".")

    (height, n_places), most = counts.shape, max(1.0, float(counts.max(initial=0)))
    size = 9 if np.array_equal(counts, np.round(counts)) else 7
    heat_map(axes, counts, names, (), write, high=most, fontsize=size)
    # Thin lines between the cells, so that two counted neighbours read as two choices.
    below = height + (len(names) > height)
    axes.vlines(np.arange(1, n_places) - 0.5, -0.5, height - 0.5, color="0.75", lw=0.5)
    axes.hlines(np.arange(1, below) - 0.5, -0.5, n_places - 0.5, color="0.75", lw=0.5)
    _name_places(axes, first, n_places, stacks)
    axes.set_ylim(len(names) - 0.5, -0.5)
    if len(names) > height:  # over the cursor's frame
        x, y = (n_places - 1) / 2, (height + len(names) - 1) / 2
        axes.text(x, y, "not counted", fontsize=8, bbox=ON_WHITE, zorder=4, **MIDDLE)
    if cursor is not None and 0 <= cursor - first < n_places:
        x = cursor - first
        look: dict[str, Any] = {"fill": False, "ec": COLOURS[1], "lw": 3, "clip_on": False}
        axes.add_patch(Rectangle((x - 0.5, -0.5), 1, len(names), zorder=3, **look))
        axes.get_xticklabels()[x].set(fontweight="bold", bbox={"fc": "white", "ec": COLOURS[1]})


def _name_places(axes: Any, first: int, n_places: int, stacks: Sequence[range]) -> None:
    """Name the columns, places from layer ``first`` on; a line separates two stacks."""
    places = [place_name(k, stacks).removeprefix("layer ") for k in range(first, first + n_places)]
    crowded = len(stacks) == 2 and n_places > 8
    axes.set_xticks(range(n_places), places, fontsize=8 if crowded else 9)
    if crowded:
        axes.tick_params("x", rotation=90)
    axes.set_xlabel("layer", fontsize=9)
    if len(stacks) == 2:
        axes.axvline(stacks[1].start - first - 0.5, color="0.4", lw=2)


def walk_picture(
    merging_map: np.ndarray,
    actions: Sequence[str],
    first: int,
    stacks: Sequence[range],
    cursor: int,
    path: Sequence[str],
    *,
    probabilities: np.ndarray | None,
    legal: np.ndarray,
    value: float | None,
    scores: Mapping[str, float] | None,
) -> Figure:
    """A walk so far: the merging map (N+M, P) with the cursor, and below it the ``path`` in words.

    A second panel shows ``probabilities`` (A,) of the agent's policy and its ``value``, or at the end the
    ``scores`` (task -> metric in [0, 1]), if there are any.
    """
    ratios = [max(2.4, 0.5 * merging_map.shape[1])]
    if probabilities is not None or scores is not None:
        ratios.append(2.4)
    width = sum(ratios) + (3.2 if len(ratios) == 1 else 3.7)
    figure = Figure(figsize=(width, 1.1 + 0.29 * len(actions)), layout="constrained")
    left, *others = figure.subplots(1, len(ratios), width_ratios=ratios, squeeze=False)[0]
    draw_map(left, merging_map, actions, first, stacks, cursor)
    left.set_title("merging map", fontsize=10)
    if scores is not None:
        _score_bars(others[0], {"": scores})
    elif probabilities is not None:
        (right,) = others
        bars = right.barh(actions, probabilities, color=COLOURS[2], ec="black", lw=0.6, hatch="//")
        notes = [
            f"{p:.2f}{'' if ok else ' illegal'}" for p, ok in zip(probabilities, legal, strict=True)
        ]
        right.bar_label(bars, notes, fontsize=8, padding=3)
        right.spines[["top", "right"]].set_visible(False)
        right.set(xlim=(0, 1.3), ylim=(len(actions) - 0.5, -0.5))
        right.set_xticks([0, 0.5, 1], ["0", "0.5", "1"], fontsize=8)
        right.tick_params("y", labelleft=False)
        title = "the agent's policy" + ("" if value is None else f"; value {value:+.2f}")
        right.set_title(title, fontsize=10)
        right.set_xlabel("probability", fontsize=9)
    words = "path: " + (" → ".join(path) or "no layer yet")
    figure.supxlabel(fill(words, int(12 * width)), fontsize=9, x=0.01, ha="left")
    return figure


def _score_bars(axes: Any, scores: Mapping[str, Mapping[str, float]]) -> None:
    """Bars of each task's score in percent and of their mean; one colour and hatch per label."""
    height, names = 0.8 / len(scores), [*next(iter(scores.values())), "mean"]
    for i, (label, by_task) in enumerate(scores.items()):
        values = list(by_task.values())
        y = np.arange(len(names)) + (i - (len(scores) - 1) / 2) * height
        look = {"color": COLOURS[(2, 1)[i]], "hatch": ("//", "..")[i], "ec": "black", "lw": 0.6}
        bars = axes.barh(y, 100 * np.array([*values, np.mean(values)]), height, label=label, **look)
        axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=3)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(0, 118)  # room for the numbers; the axis itself ends at 100
    axes.spines["bottom"].set_bounds(0, 100)
    axes.set_xticks([0, 50, 100], ["0", "50", "100"], fontsize=8)
    axes.set_xlabel("score, %", fontsize=9)
    axes.set_title("score per task", fontsize=10)


def paths_picture(
    paths: Sequence[tuple[str, Path]],
    scores: Mapping[str, Mapping[str, float]],
    sources: Sequence[str],
    n_layers: int,
    stacks: Sequence[range] = (),
    caption: str = "score per task",
) -> Figure:
    """Some paths, as (label, path), one below the other, and bars of their scores.

    ``scores``: label -> task -> metric in [0, 1], for at most two; ``caption`` says what they are.
    """
    width, heights = 6.0 if paths else 7.0, []
    paths = [(label, with_stem(path)) for label, path in paths]
    for label, path in paths:
        rows, boxes = -(-len(path) // BOXES), min(max(len(path), n_layers), BOXES)
        width = max(width, 0.8 * boxes + 3, 0.45 * n_layers + 3)
        heights.append(1.0 + 0.25 * len(sources) + 0.7 * rows + 0.3 * bool(label))
    if scores:
        n_tasks = len(next(iter(scores.values())))
        heights.append(0.8 + 0.24 * len(scores) * (n_tasks + 1))
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (label, path) in zip(parts, paths, strict=False):
        if label:
            part.suptitle(label, fontsize=11, fontweight="bold", x=0.01, ha="left")
        _draw_path(part, path, sources, n_layers, stacks)
    if scores:
        axes = parts[-1].subplots()
        _score_bars(axes, scores)
        axes.set_title(caption, fontsize=10)
        if len(scores) > 1:
            axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def replay_picture(
    rewards: np.ndarray,
    episode: int,
    policy: np.ndarray,
    merging_map: np.ndarray,
    actions: Sequence[str],
    first: int,
    stacks: Sequence[range],
    agent_stacks: Sequence[range],
    title: str,
) -> Figure:
    """A search at one episode: all rewards, the agent's policy under a ``title``, the episode's map.

    rewards: (T,) raw, in [0, 1]; policy: (P, A), NaN at places never visited; merging_map: (N+M, P').
    The policy's places are those of ``agent_stacks``: blocks, where those of ``stacks`` are sublayers.
    """
    size = (3.5 + max(5.0, 0.75 * len(policy)), 3.1 + 0.25 * len(actions))
    figure = Figure(figsize=size, layout="constrained")
    ratios = [1.8, 0.8 + 0.25 * len(actions)]
    axes: Any = figure.subplot_mosaic("TT;LR", height_ratios=ratios)
    top, left, right = axes.values()
    percent = 100 * rewards
    top.plot(percent, ".", ms=3, color="0.45", label="raw reward of an episode (Eq. 7)")
    top.plot(moving_average(percent, 50), color=COLOURS[5], lw=2, label="mean of the last 50")
    top.axvline(episode, color="black", ls="--", lw=1)
    look = {"ms": 9, "mfc": COLOURS[1], "mec": "black", "label": "this episode"}
    top.plot([episode], percent[[episode]], "D", **look)
    tidy(top, "", "episode", "mean score, %")
    top.margins(x=0.02)
    top.legend(fontsize=8, loc="lower right", ncols=3, bbox_to_anchor=(1, 1), frameon=False)
    heat_map(
        left,
        np.nan_to_num(policy.T),
        actions,
        (),
        lambda p: f"{p:.1f}" if p >= 0.1 else "",
        fontsize=8,
    )
    for x in np.flatnonzero(np.isnan(policy).all(1)).tolist():
        hatched: dict[str, Any] = {"fc": "white", "ec": "0.4", "hatch": "xx", "lw": 0}
        left.add_patch(Rectangle((x - 0.5, -0.5), 1, len(actions), **hatched))
        y = (len(actions) - 1) / 2
        left.text(x, y, "not visited", rotation=90, fontsize=8, bbox=ON_WHITE, **MIDDLE)
    _name_places(left, first, len(policy), agent_stacks)
    left.set_title(title, fontsize=10)
    draw_map(right, merging_map, actions, first, stacks)
    right.tick_params("y", labelleft=False)
    right.set_title(f"merging map of episode {episode}", fontsize=10)
    if tuple(stacks) != tuple(agent_stacks):
        left.set_xlabel("block", fontsize=9)
        right.set_xlabel("sublayer", fontsize=9)
        right.tick_params("x", rotation=90, labelsize=8)  # twice as many, in the same width
    return figure


def short_name(source: str) -> str:
    """A source without the options of an operator that leans to an expert: ``weighted_average → 1``."""
    name, _, options = source.partition(":")
    leads = [o.partition("=")[2] for o in options.split(",") if o.startswith("expert=")]
    return f"{name} → {leads[0]}" if leads else source
