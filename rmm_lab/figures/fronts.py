"""Figures of fronts: two tasks as stairs with what is attained over seeds, more as parallel coordinates.

Points are normalised scores (n, K): 0 is the base, 1 the task's own expert. Plain data in, a Figure out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from rmm_lab.figures.paths import COLOURS, panels, tidy

MARKERS = "oDs^vP*X<>hd"
STYLES = ("-", "--", "-.", ":")
LOWEST = -0.1  # what a picture shows below the base


def attained(fronts: Sequence[np.ndarray], x: np.ndarray) -> np.ndarray:
    """What each front (n, 2) attains in the second task where the first has at least x (X,): (S, X).

    -inf where it attains nothing. Sorted over the fronts, the best first: row r - 1 is attained by r of them.
    Source: Fonseca and Fleming 1996, "On the Performance Assessment and Comparison of Stochastic
    Multiobjective Optimizers".
    """
    found = [np.where(front[:, :1] >= x - 1e-12, front[:, 1:], -np.inf).max(0) for front in fronts]
    return -np.sort(-np.array(found), axis=0)


def front_picture(
    points: Mapping[str, np.ndarray], tasks: Sequence[str], marks: Mapping[int, str] | None = None
) -> Figure:
    """One front, a set of points for each split, and the numbers of its points.

    points: split -> (n, K), the same models in the same order; the last one has the numbers. marks: number of
    a point -> what it is called beside that. Points below the base somewhere are only named.
    """
    if len(tasks) != 2:
        return _parallel({f"{i}": front[None] for i, front in enumerate(_last(points))}, tasks)
    figure, (axes,) = panels(1, 1, 5.6, 4.8)
    for i, (split, found) in enumerate(points.items()):
        filled = COLOURS[5] if i == len(points) - 1 else "none"
        look: dict[str, Any] = {
            "ls": "none",
            "mec": COLOURS[5],
            "mfc": filled,
            "ms": 8 - 2 * (not i),
        }
        axes.plot(*found.T, MARKERS[i], label=f"{split} split", **look)
    shown = np.all(_last(points) >= 0, axis=1)
    for i, point in enumerate(_last(points)):
        text = f"{i} {(marks or {}).get(i, '')}".strip()
        if shown[i]:
            axes.annotate(text, point, (5, 4), textcoords="offset points", fontsize=9)
    _stairs(axes, [_last(points)], {"color": COLOURS[5], "lw": 1})
    _frame(axes, tasks)
    if shown.any():
        inside = np.concatenate([found[shown] for found in points.values()])
        low, high = inside.min(0), np.maximum(inside.max(0), 1)
        room = np.maximum(0.12 * (high - low), 0.01)
        axes.set_xlim(low[0] - room[0], high[0] + 2 * room[0])
        axes.set_ylim(low[1] - room[1], high[1] + 2 * room[1])
    if not shown.all():
        out = ", ".join(map(str, np.flatnonzero(~shown)))
        axes.set_title(f"below the base in a task, not shown: {out}", fontsize=9)
    axes.legend(fontsize=8, loc="lower left")
    return figure


def fronts_picture(
    groups: Mapping[str, tuple[Sequence[str], Mapping[str, Sequence[np.ndarray]]]],
    caption: str = "",
) -> Figure:
    """Many searches' fronts, a panel for each group of tasks: group -> tasks, search -> a front per seed.

    Two tasks: what half of the seeds attain as a line, from what all attain to what one does as a band. More:
    a line for each point, of all seeds.
    """
    n = max(1, len(groups))
    figure, grid = panels(n, min(n, 2), 6.4, 4.8, more=1.2)
    names = list(dict.fromkeys(name for _, own in groups.values() for name in own))
    looks = {
        name: {"color": COLOURS[1 + i % 7], "ls": STYLES[i // 7 % 4], "lw": 1.6}
        for i, name in enumerate(names)
    }
    for axes, (group, (tasks, own)) in zip(grid, groups.items(), strict=True):
        if len(tasks) == 2:
            for name, fronts in own.items():
                _stairs(axes, fronts, looks[name], name, MARKERS[names.index(name) % len(MARKERS)])
            _frame(axes, tasks)
            axes.set(xlim=(LOWEST, 1.08), ylim=(LOWEST, 1.08))
        else:
            _lines(axes, own, tasks, looks)
        axes.set_title(group, fontsize=10)
    lines = {
        label: line
        for axes in grid
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        list(lines.values()), list(lines), fontsize=8, ncols=2, loc="outside upper center"
    )
    if caption:
        figure.supxlabel(caption, fontsize=8)
    return figure


def _last(points: Mapping[str, np.ndarray]) -> np.ndarray:
    return list(points.values())[-1]


def _frame(axes: Any, tasks: Sequence[str]) -> None:
    """Labels, the base at 0, each expert at 1."""
    for line in (axes.axvline, axes.axhline):
        line(1, color="black", ls=":", lw=0.8)
        line(0, color="0.5", lw=0.8)
    tidy(axes, "", *(f"{task}: 0 is the base, 1 the expert" for task in tasks))


def _stairs(
    axes: Any,
    fronts: Sequence[np.ndarray],
    look: Mapping[str, Any],
    label: str = "",
    mark: str = "",
) -> None:
    """The median attainment of some fronts (n, 2), and the band around it."""
    xs = np.unique(np.concatenate([[LOWEST], *(front[:, 0] for front in fronts)]))
    xs = xs[xs >= LOWEST]
    found = attained(fronts, xs)
    low, high = found[-1], found[0]
    middle = found[(len(fronts) - 1) // 2 + (len(fronts) % 2 == 0)]  # by half of them, at least
    shown = np.isfinite(middle)
    x, y = np.r_[xs[shown], xs[shown][-1:]], np.r_[middle[shown], LOWEST]
    axes.plot(x, y, drawstyle="steps-pre", label=label or None, **look)
    if mark:
        corners = np.r_[middle[shown][:-1] > middle[shown][1:], True]
        axes.plot(xs[shown][corners], middle[shown][corners], mark, ms=4, color=look["color"])
    if len(fronts) > 1:
        band = {"color": look["color"], "alpha": 0.15, "lw": 0, "step": "pre"}
        axes.fill_between(xs, low.clip(LOWEST), high.clip(LOWEST), **band)


def _lines(
    axes: Any,
    own: Mapping[str, Sequence[np.ndarray]],
    tasks: Sequence[str],
    looks: Mapping[str, Mapping[str, Any]],
) -> None:
    """Parallel coordinates: a vertical axis for each task, a line for each point."""
    at = np.arange(len(tasks))
    for name, fronts in own.items():
        for i, point in enumerate(np.concatenate(list(fronts))):
            axes.plot(at, point, label=None if i else name, **{**looks[name], "lw": 1})
    for level, ls in ((0, "-"), (1, ":")):
        axes.axhline(level, color="0.5", ls=ls, lw=0.8)
    tidy(axes, "", "", "0 is the base, 1 the expert")
    axes.set_xticks(at, tasks, fontsize=9)


def _parallel(own: Mapping[str, np.ndarray], tasks: Sequence[str]) -> Figure:
    """``_lines`` of a front whose points are told apart: number -> (1, K)."""
    figure, (axes,) = panels(1, 1, 1.6 * max(3, len(tasks)), 4.4)
    looks = {
        name: {"color": COLOURS[1 + i % 7], "ls": STYLES[i // 7 % 4], "marker": MARKERS[i % 12]}
        for i, name in enumerate(own)
    }
    _lines(axes, {name: [point] for name, point in own.items()}, tasks, looks)
    axes.legend(title="point", fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
