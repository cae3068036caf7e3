"""Figures of paths: rewards (Fig. 3), layer paths, merging maps, policies.

Colours are okabe_ito; counts and probabilities go from white to dark blue, so that zero looks empty, and
differences from orange to purple with white at zero.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib import color_sequences
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from rmm_lab.reward import Path, Step

COLOURS = color_sequences["okabe_ito"]
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "ooo", "+++", "---")
COUNTS = LinearSegmentedColormap.from_list("counts", ["white", "#004c7d"])
DIFFERENCES = "PuOr"
BOXES = 10  # of a path in one row


def on_cell(share: float) -> str:
    """The colour of a number on a heat map's cell, whose value is ``share`` of the largest."""
    return "white" if share > 0.7 else "black"


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


def moving_average(values: Sequence[float] | np.ndarray, width: int) -> np.ndarray:
    """Mean of the last ``width`` values at each place (fewer at the start): (n,) -> (n,)."""
    total = np.concatenate([[0.0], np.cumsum(values)])  # (n + 1,)
    end = np.arange(1, len(values) + 1)
    start = np.maximum(0, end - width)
    return (total[end] - total[start]) / (end - start)


def reward_curve(episodes: Sequence[dict[str, Any]], width: int = 50) -> Figure:
    """Raw reward of every episode as points, its moving average and the best so far as lines (Fig. 3).

    The DAR reward is drawn only where it differs from the raw one.
    """
    raw = np.array([100 * e["raw_reward"] for e in episodes])
    dar = np.array([100 * e["dar_reward"] for e in episodes])
    x = np.arange(1, len(raw) + 1)
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(x, raw, ".", ms=3, color="0.45", label="raw reward of an episode (Eq. 7)")
    if not np.array_equal(raw, dar):
        axes.plot(x, dar, "+", ms=4, mew=0.6, color=COLOURS[1], label="DAR reward (Eq. 10)")
    axes.plot(
        x, moving_average(raw, width), color=COLOURS[5], lw=2, label=f"mean of the last {width}"
    )
    axes.plot(
        x, np.maximum.accumulate(raw), "--", color="black", lw=1, label="best so far, on its subset"
    )
    axes.set_xlabel("episode")
    axes.set_ylabel("mean score, %")
    axes.set_xlim(0, len(raw) + 1)
    axes.grid(alpha=0.3)
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
    path: Path,
    sources: Sequence[str],
    n_layers: int,
    stem: str = "base",
    stacks: Sequence[range] = (),
) -> Figure:
    """A path as rows of boxes in running order, under its merging map (Eq. 5, sources by layers).

    One colour and hatch per source; the first box is the stem, from ``stem`` unless the path chooses one.
    An arrow shows which expert a weighted average leans to. With two ``stacks`` (a T5's) layers are
    called enc 0, ..., dec 0, ..., and a line in the map separates encoder and decoder.
    """
    path = with_stem(path, stem)
    figure = Figure(figsize=_path_size([path], sources, n_layers), layout="constrained")
    _draw_path(figure, path, sources, n_layers, stacks)
    return figure


def _path_size(paths: Sequence[Path], sources: Sequence[str], n_layers: int) -> tuple[float, float]:
    """Width and height in inches of the pictures of some paths, one below the other."""
    longest = max(len(path) for path in paths)
    width = max(6.0, 0.8 * max(min(longest, BOXES), min(n_layers, BOXES)) + 3, 0.45 * n_layers + 3)
    rows = sum(-(-len(path) // BOXES) for path in paths)
    return width, len(paths) * (1.0 + 0.25 * len(sources)) + 0.7 * rows


def _draw_path(
    figure: Any, path: Path, sources: Sequence[str], n_layers: int, stacks: Sequence[range]
) -> None:
    """Map and boxes of one path, its stem first, into a figure or a part of one."""
    rows = -(-len(path) // BOXES)
    top, bottom = figure.subplots(2, 1, height_ratios=[0.45 * len(sources), 0.4 + 0.9 * rows])
    draw_map(top, merging_map(path[1:], sources, 0, n_layers), sources, 0, stacks)
    title = "merging map: how often each source's layer was taken"
    if any(step.scales for step in path):
        title += "; for scales, how much of each expert"
    top.set_title(title, fontsize=10)
    for i, step in enumerate(path):
        known = step.source in sources
        number = list(sources).index(step.source) if known else 0
        rgb = to_rgb(COLOURS[1 + number % (len(COLOURS) - 1)]) if known else (0.4, 0.4, 0.4)
        x, y = i % BOXES, rows - 1 - i // BOXES
        bottom.add_patch(
            FancyBboxPatch(
                (x + 0.08, y + 0.1), 0.84, 0.8, boxstyle="round,pad=0,rounding_size=0.08",
                facecolor=(*rgb, 0.35), edgecolor=rgb, lw=1.5,
                hatch=HATCHES[number % len(HATCHES)] if known else "",
            )
        )  # fmt: skip
        bottom.text(
            x + 0.5, y + 0.5, f"{_label(step)}\n{place_name(step.layer, stacks)}", ha="center",
            va="center", fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85},
        )  # fmt: skip
    bottom.set_xlim(-0.1, min(len(path), BOXES) + 0.1)
    bottom.set_ylim(0, rows)
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
    counts = np.asarray(counts)
    n_places, most = counts.shape[1], max(1.0, float(counts.max(initial=0)))
    axes.imshow(counts, cmap=COUNTS, vmin=0, vmax=most, aspect="auto")
    # Thin lines between the cells, so that two counted neighbours read as two choices.
    axes.vlines(np.arange(1, n_places) - 0.5, -0.5, len(counts) - 0.5, color="0.75", lw=0.5)
    below = len(counts) + (len(names) > len(counts))
    axes.hlines(np.arange(1, below) - 0.5, -0.5, n_places - 0.5, color="0.75", lw=0.5)
    for (a, x), n in np.ndenumerate(counts):
        if n:
            text, size = (f"{n:.0f}", 9) if n == round(n) else (f"{n:.2f}".replace("0.", "."), 7)
            colour = on_cell(n / most)
            axes.text(x, a, text, ha="center", va="center", fontsize=size, color=colour)
    _places(axes, first, n_places, stacks)
    axes.set_yticks(range(len(names)), list(map(short_name, names)), fontsize=9)
    axes.set_ylim(len(names) - 0.5, -0.5)
    if len(names) > len(counts):
        x, y = (n_places - 1) / 2, (len(counts) + len(names) - 1) / 2
        box = {"fc": "white", "ec": "none", "pad": 1}  # over the cursor's frame
        axes.text(x, y, "not counted", ha="center", va="center", fontsize=8, bbox=box, zorder=4)
    if cursor is not None and 0 <= cursor - first < n_places:
        x = cursor - first
        frame = Rectangle(
            (x - 0.5, -0.5), 1, len(names), fill=False, ec=COLOURS[1], lw=3, clip_on=False, zorder=3
        )
        axes.add_patch(frame)
        axes.get_xticklabels()[x].set(fontweight="bold", bbox={"fc": "white", "ec": COLOURS[1]})


def _places(axes: Any, first: int, n_places: int, stacks: Sequence[range]) -> None:
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
    *,
    probabilities: np.ndarray | None = None,
    legal: np.ndarray | None = None,
    value: float | None = None,
    scores: Mapping[str, float] | None = None,
    path: Sequence[str] = (),
) -> Figure:
    """A walk so far: the merging map (N+M, P) with the cursor, and below it the ``path`` in words.

    A second panel shows ``probabilities`` (A,) of the agent's policy and its ``value``, or at the end the
    ``scores`` (task -> metric in [0, 1]), if there are any.
    """
    n_places, two_panels = merging_map.shape[1], probabilities is not None or scores is not None
    width = 3.2 + max(2.4, 0.5 * n_places) + 2.9 * two_panels
    figure = Figure(figsize=(width, 1.1 + 0.29 * len(actions)), layout="constrained")
    ratios = [max(2.4, 0.5 * n_places), 2.4] if two_panels else [1]
    axes = figure.subplots(1, len(ratios), width_ratios=ratios, squeeze=False)[0]
    draw_map(axes[0], merging_map, actions, first, stacks, cursor)
    axes[0].set_title("merging map", fontsize=10)
    if scores is not None:
        _score_bars(axes[1], list(scores), [list(scores.values())], [""])
    elif probabilities is not None:
        y = np.arange(len(actions))
        axes[1].barh(y, probabilities, color=COLOURS[2], ec="black", lw=0.6, hatch="//")
        for a, p in enumerate(probabilities):
            note = f"{p:.2f}" if legal is None or legal[a] else f"{p:.2f} illegal"
            axes[1].text(p + 0.02, a, note, va="center", fontsize=8)
        axes[1].spines[["top", "right"]].set_visible(False)
        axes[1].set_xlim(0, 1.3)
        axes[1].set_xticks([0, 0.5, 1], ["0", "0.5", "1"], fontsize=8)
        axes[1].set_yticks(y, [""] * len(actions))
        axes[1].set_ylim(len(actions) - 0.5, -0.5)
        axes[1].set_title(
            "the agent's policy" + ("" if value is None else f"; value {value:+.2f}"), fontsize=10
        )
        axes[1].set_xlabel("probability", fontsize=9)
    words = "path: " + (" → ".join(path) or "no layer yet")
    figure.supxlabel(fill(words, int(12 * width)), fontsize=9, x=0.01, ha="left")
    return figure


def _score_bars(
    axes: Any, tasks: Sequence[str], scores: Sequence[Sequence[float]], labels: Sequence[str]
) -> None:
    """Horizontal bars of each task's score in percent and of their mean; one colour, hatch per path."""
    names, height = [*tasks, "mean"], 0.8 / len(scores)
    for i, (values, label) in enumerate(zip(scores, labels, strict=True)):
        percent = 100 * np.array([*values, np.mean(values)])
        y = np.arange(len(names)) + (i - (len(scores) - 1) / 2) * height
        axes.barh(
            y, percent, height, color=COLOURS[(2, 1)[i]], ec="black", lw=0.6, label=label,
            hatch=("//", "..")[i],
        )  # fmt: skip
        for at, value in zip(y, percent, strict=True):
            axes.text(value + 1, at, f"{value:.1f}", va="center", fontsize=8)
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
    paths = [(label, with_stem(path)) for label, path in paths]
    sizes = [_path_size([path], sources, n_layers) for _, path in paths]  # (width, height) each
    tasks = list(next(iter(scores.values()), {}))
    heights = [height + 0.3 for _, height in sizes]
    if scores:
        heights.append(0.8 + 0.24 * len(scores) * (len(tasks) + 1))
    width = max((w for w, _ in sizes), default=7.0)
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (label, path) in zip(parts, paths, strict=False):
        part.suptitle(label, fontsize=11, fontweight="bold", x=0.01, ha="left")
        _draw_path(part, path, sources, n_layers, stacks)
    if scores:
        axes = parts[-1].subplots()
        _score_bars(axes, tasks, [list(s.values()) for s in scores.values()], list(scores))
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
    title: str = "the policy that acted: mean probability",
    width: int = 50,
) -> Figure:
    """A search at one episode: all rewards, the agent's policy under a ``title``, the episode's map.

    rewards: (T,) raw, in [0, 1]; policy: (P, A), NaN at places never visited; merging_map: (N+M, P').
    The policy's places are those of ``agent_stacks``: blocks, where those of ``stacks`` are sublayers.
    """
    n_places = len(policy)
    figure = Figure(
        figsize=(3.5 + max(5.0, 0.75 * n_places), 3.1 + 0.25 * len(actions)), layout="constrained"
    )
    grid = figure.add_gridspec(2, 2, height_ratios=[1.8, 0.8 + 0.25 * len(actions)])
    top, left, right = (figure.add_subplot(g) for g in (grid[0, :], grid[1, 0], grid[1, 1]))
    percent = 100 * rewards
    top.plot(percent, ".", ms=3, color="0.45", label="raw reward of an episode (Eq. 7)")
    top.plot(
        moving_average(percent, width), color=COLOURS[5], lw=2, label=f"mean of the last {width}"
    )
    top.axvline(episode, color="black", ls="--", lw=1)
    top.plot(
        [episode], percent[[episode]], "D", ms=9, mfc=COLOURS[1], mec="black", label="this episode"
    )
    top.set_xlabel("episode", fontsize=9)
    top.set_ylabel("mean score, %", fontsize=9)
    top.tick_params(labelsize=8)
    top.margins(x=0.02)
    top.grid(alpha=0.3)
    top.legend(fontsize=8, loc="lower right", ncols=3, bbox_to_anchor=(1, 1), frameon=False)
    left.imshow(policy.T, cmap=COUNTS, vmin=0, vmax=1, aspect="auto")
    for (a, x), p in np.ndenumerate(policy.T):
        if p >= 0.1:  # False where NaN
            left.text(x, a, f"{p:.1f}", ha="center", va="center", fontsize=8, color=on_cell(p))
    for x in np.flatnonzero(np.isnan(policy).all(1)).tolist():
        left.add_patch(
            Rectangle((x - 0.5, -0.5), 1, len(actions), fc="white", ec="0.4", hatch="xx", lw=0)
        )
        y = (len(actions) - 1) / 2
        box = {"fc": "white", "ec": "none", "pad": 1}
        left.text(x, y, "not visited", rotation=90, ha="center", va="center", fontsize=8, bbox=box)
    _places(left, first, n_places, agent_stacks)
    left.set_yticks(range(len(actions)), list(map(short_name, actions)), fontsize=9)
    left.set_title(title, fontsize=10)
    draw_map(right, merging_map, actions, first, stacks)
    right.set_yticks(range(len(actions)), [""] * len(actions))
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


def _label(step: Step) -> str:
    """A step's source in a few short lines."""
    if step.scales:
        return "scales\n" + "/".join(f"{s:.2f}".replace("0.", ".") for s in step.scales)
    return short_name(step.source).partition(":")[0].replace("_", "\n")
