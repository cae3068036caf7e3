"""Figures of widgets: a walk, a search played back, paths compared. Plain data in, a Figure out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from rmm_lab.figures.paths import (
    COLOURS,
    MIDDLE,
    ON_WHITE,
    boxes_of,
    draw_map,
    heat_map,
    look_of,
    merging_map,
    moving_average,
    name_places,
    place_name,
    rows_of,
    short_names,
    tidy,
    with_stem,
)
from rmm_lab.reward import Path

SCORE_HATCHES = ("//", "..")  # of the first label and the second


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
        score_bars(others[0], {"": scores})
    elif probabilities is not None:
        (right,) = others
        sources = actions[: len(merging_map)]
        colours = [look_of(action, sources)[0] for action in actions]
        bars = right.barh(actions, probabilities, color=colours, ec="black", lw=0.6)
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
    size = (3.5 + max(5.0, 0.75 * len(policy)), 2.7 + 0.23 * len(actions))
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
        lambda p: f"{p:.1f}" if p >= 1.5 / len(actions) else "",  # more than by chance
        fontsize=8,
    )
    for x in np.flatnonzero(np.isnan(policy).all(1)).tolist():
        hatched: dict[str, Any] = {"fc": "white", "ec": "0.6", "hatch": "/", "lw": 0}
        left.add_patch(Rectangle((x - 0.5, -0.5), 1, len(actions), **hatched))
        y = (len(actions) - 1) / 2
        left.text(x, y, "not visited", rotation=90, fontsize=8, bbox=ON_WHITE, **MIDDLE)
    name_places(left, first, len(policy), agent_stacks)
    left.set_title(title, fontsize=10)
    whole = np.array_equal(merging_map, np.round(merging_map))
    draw_map(right, merging_map, actions, first, stacks, fontsize=9 if whole else 7)
    right.tick_params("y", labelleft=False)
    right.set_title(f"merging map of episode {episode}", fontsize=10)
    if tuple(stacks) != tuple(agent_stacks):
        left.set_xlabel("block", fontsize=9)
        right.set_xlabel("sublayer", fontsize=9)
        right.tick_params("x", rotation=90, labelsize=8)  # twice as many, in the same width
    return figure


def score_bars(axes: Any, scores: Mapping[str, Mapping[str, float]]) -> None:
    """Bars of each task's score in percent, in its colour, and of their mean; one hatch per label."""
    height, tasks = 0.8 / len(scores), list(next(iter(scores.values())))
    names, colours = [*tasks, "mean"], [*(look_of(task, tasks)[0] for task in tasks), "0.7"]
    for i, (label, by_task) in enumerate(scores.items()):
        values = list(by_task.values())
        y = np.arange(len(names)) + (i - (len(scores) - 1) / 2) * height
        look: dict[str, Any] = {
            "color": colours,
            "hatch": SCORE_HATCHES[i],
            "ec": "black",
            "lw": 0.6,
        }
        bars = axes.barh(y, 100 * np.array([*values, np.mean(values)]), height, label=label, **look)
        which = f"{label.partition(':')[0]} " if len(scores) > 1 else ""  # first, second
        axes.bar_label(bars, fmt=f"{which}%.1f", fontsize=9, padding=3)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(
        0, 118 if len(scores) == 1 else 165
    )  # room for the numbers; the axis itself ends at 100
    axes.spines["bottom"].set_bounds(0, 100)
    axes.set_xticks([0, 50, 100], ["0", "50", "100"], fontsize=9)
    axes.set_xlabel("score, %", fontsize=9)
    axes.set_title("score per task", fontsize=10)


def compare_picture(
    paths: Sequence[tuple[str, Path]],
    scores: Mapping[str, Mapping[str, float]],
    sources: Sequence[str],
    n_layers: int,
    stacks: Sequence[range] = (),
    caption: str = "score per task",
    members: Sequence[str] = (),
) -> Figure:
    """Two paths at most, as (label, path): their merging maps, and bars of their scores beside them.

    ``scores``: label -> task -> metric in [0, 1]; ``caption`` says what they are. ``members`` is that of
    ``path_picture``. A path whose order a map cannot show stands below its map in words.
    """
    maps, words, width = [], [], min(6.4, max(4.0, 0.38 * n_layers + 2.2))
    for _, path in paths:
        path = with_stem(path)
        rows = rows_of(path, sources, members)
        maps.append((rows, merging_map(path, rows, -1, 1 + n_layers, members)))
        names = dict(zip(rows, short_names(rows), strict=True))
        order = [
            f"{'mixture' if step.scales else names[step.source]} {place_name(step.layer, stacks)}"
            for step in path
        ]
        text = fill(f"order: {' → '.join(order)}", int(15 * width))
        words.append(text if boxes_of(path) else "")
    heights = [
        0.65 + 0.2 * len(rows) + 0.16 * (1 + text.count("\n")) * bool(text)
        for (rows, _), text in zip(maps, words, strict=True)
    ]
    n_bars = sum(len(by_task) + 1 for by_task in scores.values())
    height = max(sum(heights), 0.9 + 0.24 * n_bars)
    ratios = [width] * bool(paths) + [2.7] * bool(scores)
    figure = Figure(figsize=(sum(ratios), height), layout="constrained")
    grid = figure.add_gridspec(
        max(1, len(paths)), len(ratios), width_ratios=ratios, height_ratios=heights or [1]
    )
    for i, ((label, _), (rows, counts), text) in enumerate(zip(paths, maps, words, strict=True)):
        axes = figure.add_subplot(grid[i, 0])
        draw_map(axes, counts, rows, -1, stacks, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.set_title(label, fontsize=10, fontweight="bold", loc="left")
        axes.set_xlabel(text or "layer", fontsize=8, ha="left", x=0)
    if scores:
        axes = figure.add_subplot(grid[:, -1])
        score_bars(axes, scores)
        axes.set_title(caption, fontsize=10)
    return figure
