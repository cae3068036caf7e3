"""Figures of notebooks 09 and 10: paths as amounts, seeds, T5s. Plain data in, a Figure out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from rmm_lab.figures.paths import (
    AMOUNTS,
    COLOURS,
    MIDDLE,
    ON_WHITE,
    draw_box,
    heat_map,
    ink_on,
    look_of,
    panels,
    tidy,
    with_stem,
)
from rmm_lab.operators import parse_operator
from rmm_lab.reward import Path, Step

# ---- notebook 09

LINEAR = ("task_arithmetic", "weight_average", "weighted_average")  # sums of scaled task vectors


def amounts(step: Step, names: Sequence[str]) -> np.ndarray:
    """How much of each expert's task vector a step adds to the base: (N,).

    1 of its own for an expert, its scales for task arithmetic; NaN where the source trims or drops.
    """
    if step.scales:
        return np.array(step.scales)
    if step.source == "base":
        return np.zeros(len(names))
    if step.source in names:
        return np.eye(len(names))[list(names).index(step.source)]
    spec = parse_operator(step.source)
    if spec.function not in LINEAR:
        return np.full(len(names), np.nan)
    return spec(torch.zeros(len(names)), torch.eye(len(names))).double().numpy()


def path_amounts(path: Path, names: Sequence[str], n_layers: int, stem: str = "base") -> np.ndarray:
    """``amounts`` at each place of a path: (N, 1 + L), the stem first; NaN where it takes no layer."""
    out = np.full((len(names), 1 + n_layers), np.nan)
    for step in with_stem(path, stem):
        out[:, 1 + step.layer] = amounts(step, names)
    return out


def amounts_picture(groups: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """A heat map for each group: group -> expert -> (1 + L,) amounts, in the cells as numbers."""
    figure, grid = panels(len(groups), 2, 4.55, 1.9)
    for axes, (group, experts) in zip(grid, groups.items(), strict=True):
        values = np.stack(list(experts.values()))  # (N, 1 + L)
        places = ["stem", *range(values.shape[1] - 1)]
        heat_map(axes, values, list(experts), places, "{:.1f}".format)
        axes.set_title(group, fontsize=10)
        axes.set_xlabel("layer", fontsize=9)
    return figure


# What methods are, by the beginning of their names, for a marker and a colour; all others are tuned rules.
LOOKS: dict[str, tuple[tuple[str, ...], str, Any]] = {
    "bounds": (
        (
            "chance",
            "most frequent answer",
            "base",
            "fine-tuned",
            "multi-task",
            "best expert",
            "expert",
        ),
        "s",
        "0.35",
    ),
    "uniform merges that see inputs": (("RegMean", "least squares"), "P", COLOURS[2]),
    "uniform merges by gradient": (
        ("Fisher", "coefficients by gradient", "AdaMerging", "Frank-Wolfe"),
        "X",
        COLOURS[7],
    ),
    "agent + CMA-ES": (("agent + CMA-ES",), "D", COLOURS[3]),
    "RMM": (("RMM",), "*", COLOURS[6]),
}
PUBLISHED = ("task arithmetic", "TIES", "DARE")


def method_look(method: str) -> tuple[str, Any]:
    """A method's marker and colour."""
    if method in PUBLISHED:
        return "o", COLOURS[1]
    looks = LOOKS.values()
    return next((look[1:] for look in looks if method.startswith(look[0])), ("^", COLOURS[5]))


def seeds_picture(scores: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """Every seed's score as an open mark, one panel per group, one line per method.

    ``scores``: group -> method -> (S,) in %. Squares are bounds, circles uniform merges as published,
    triangles tuned ones, pluses those that see inputs, crosses those by gradient, diamonds agent + CMA-ES,
    stars RMM. The line of a method that a group lacks stays empty.
    """
    methods = list(dict.fromkeys(m for group in scores.values() for m in group))
    figure, grid = panels(len(scores), 2, 4.55, max(3.3, 0.21 * len(methods)), sharey=True)
    for axes, (group, by_method) in zip(grid, scores.items(), strict=True):
        for method, values in by_method.items():
            marker, colour = method_look(method)
            y = np.full(len(values), methods.index(method))
            axes.plot(values, y, marker, ms=7, mfc="none", mec=colour, mew=1.4)
        axes.set_yticks(range(len(methods)), methods)
        axes.set_ylim(len(methods) - 0.5, -0.5)
        tidy(axes, group, "score on the test split, %")
    return figure


# What a method looked at besides weights -> marker and colour.
SIGHTS: dict[str, tuple[str, Any]] = {
    "nothing": ("o", "0.35"),
    "inputs": ("s", COLOURS[5]),
    "labels": ("^", COLOURS[1]),
    "gradients": ("X", COLOURS[7]),
}
SEES = tuple(SIGHTS)


def forest_picture(
    points: Mapping[str, pd.DataFrame],
    lines: Mapping[str, Mapping[str, float]],
    xlabel: str,
    caption: str,
) -> Figure:
    """A forest plot: a row for each method, a point at its mean, a bar over its interval; panels by group.

    ``points``: panel -> a frame with the methods as its index, the same and in the same order for all, and
    the columns ``sees`` (one of ``SEES``), ``mean`` and ``half``, half the width of the interval; NaN where
    there is none. ``lines``: panel -> name -> where a vertical line stands, the same three at most.
    """
    n, n_rows = len(points), len(next(iter(points.values())))
    columns = n if n < 3 else 2 if n < 5 else 4
    figure, grid = panels(n, columns, 9.1 / columns, 0.45 + 0.2 * n_rows, more=1.1, sharey=True)
    styles = dict.fromkeys(name for by_name in lines.values() for name in by_name)
    looks = dict(zip(styles, ("-", "--", ":"), strict=False))
    for axes, (panel, frame) in zip(grid, points.items(), strict=True):
        y = np.arange(n_rows)
        for sees, (marker, colour) in SIGHTS.items():
            own = (frame["sees"] == sees).to_numpy()
            x, half = (frame.loc[own, name].to_numpy(float) for name in ("mean", "half"))
            bar: dict[str, Any] = {"color": colour, "mec": "black", "mew": 0.5, "capsize": 2.5}
            if own.any():
                label = f"sees {sees}"
                axes.errorbar(x, y[own], xerr=half, fmt=marker, ms=5.5, lw=1.6, label=label, **bar)
        for name, x in lines[panel].items():
            axes.axvline(x, color="black", lw=1, ls=looks[name], label=name, zorder=1)
        across = axes.get_yaxis_transform()
        empty: dict[str, Any] = {"fontsize": 9, "color": "0.4", "bbox": ON_WHITE} | MIDDLE
        for row in np.flatnonzero(frame["mean"].isna()):
            axes.text(0.5, row, "not measured", transform=across, **empty)
        ends = np.flatnonzero(frame["sees"].iloc[1:].to_numpy() != frame["sees"].iloc[:-1])
        axes.hlines(ends + 0.5, 0, 1, "0.5", lw=0.8, transform=across)
        axes.set_yticks(y, list(frame.index))
        axes.set_ylim(n_rows - 0.4, -0.6)
        tidy(axes, panel)
    shown = [pair for axes in grid for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    handles = {label: handle for handle, label in shown}
    names = [*(f"sees {s}" for s in SEES if f"sees {s}" in handles), *looks]
    place: dict[str, Any] = {"ncols": len(names), "frameon": False, "columnspacing": 1.2}
    place |= {"loc": "outside upper center", "handletextpad": 0.4, "fontsize": 9}
    figure.legend([handles[name] for name in names], names, **place)
    figure.supxlabel(f"{xlabel}\n{caption}", fontsize=9)
    return figure


def gain_picture(gains: Mapping[str, np.ndarray], half: Mapping[str, float]) -> Figure:
    """Each seed's gain as an open diamond, the mean and its interval as a bar, one line per group.

    ``gains``: group -> (S,) in points; ``half``: group -> half the width of the interval.
    """
    figure, (axes,) = panels(1, 1, 7.5, 0.6 * len(gains), more=1.0)
    for y, (group, values) in enumerate(gains.items()):
        axes.plot(values, np.full(len(values), y + 0.18), "D", ms=6, mfc="none", mec=COLOURS[3])
        mean, bar = values.mean(), half[group]
        axes.errorbar(mean, y - 0.14, xerr=bar, fmt="|", ms=12, color="black", capsize=5, lw=2)
    axes.axvline(0, color="black", lw=1, ls="--")
    axes.set_yticks(range(len(gains)), list(gains))
    axes.set_ylim(len(gains) - 0.5, -0.5)
    tidy(axes, "", "gain over the best uniform merge, points", grid="x")
    return figure


def cross_task_picture(scores: Mapping[str, Sequence[float]], tasks: Sequence[str]) -> Figure:
    """A matrix in %: each expert's body, a row, with the head of each task, a column.

    ``scores``: expert -> (N,) in [0, 1], the task of expert i at place i; that of its own task is framed. How
    well an expert does under another's head foretells how well the two merge (arXiv 2412.19098).
    """
    values = 100 * np.array(list(scores.values()))  # (N, N)
    n = len(tasks)
    figure, (axes,) = panels(1, 1, 2.2 + 1.1 * n, 1.2 + 0.5 * n)
    heat_map(axes, values, list(scores), list(tasks), "{:.1f}".format, high=100)
    for i in range(min(values.shape)):
        axes.add_patch(Rectangle((i - 0.48, i - 0.46), 0.96, 0.92, fill=False, ec="black", lw=2))
    axes.set_title("score on the test split, %", fontsize=10)
    axes.set_xlabel("task, and its head", fontsize=9)
    axes.set_ylabel("expert", fontsize=9)
    return figure


# ---- notebook 10


def t5_picture(n_encoder: int, n_decoder: int) -> Figure:
    """A T5 as boxes: two stacks of blocks with their layer numbers, and in grey what is the stem."""
    figure, (axes,) = panels(1, 1, 9.1, 3.4)
    deepest, stem = max(n_encoder, n_decoder), ("0.6", "//")
    for stack, y, depth, first, colour in (
        ("encoder", 2.4, n_encoder, 0, COLOURS[5]),
        ("decoder", 0.4, n_decoder, n_encoder, COLOURS[1]),
    ):
        draw_box(axes, 0.45, y, 0.9, "shared\nembeddings", stem)
        draw_box(axes, 1.65, y, 0.9, "position\nbias", stem)
        for k in range(depth):
            draw_box(axes, 2.85 + k, y, 0.9, f"{stack[:3]} {k}\nlayer {first + k}", (colour, ""))
        draw_box(axes, 3.05 + deepest, y, 0.9, "final\nnorm", stem)
        axes.text(-0.2, y, stack, ha="right", va="center", fontsize=10, fontweight="bold")
    out = 3.05 + deepest
    axes.plot([out, out, 2.4], [2.0, 1.2, 1.2], color="black", lw=1.5)
    arrow = {"arrowstyle": "->", "lw": 1.5}
    for k in range(n_decoder):
        axes.annotate("", (2.85 + k, 0.78), (2.85 + k, 1.2), arrowprops=arrow)
    axes.text(2.4, 1.3, "every decoder block reads the encoder's last tokens", fontsize=9)
    draw_box(axes, 4.45 + deepest, 0.4, 0.9, "choice's\nlog-prob.", stem)
    axes.set(xlim=(-1.3, 5.1 + deepest), ylim=(-0.2, 3.0))
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
    figure, (left, right) = panels(2, 2, 4.55, 3.7)
    rewards = {n: 100 * scores.mean(1) for n, scores in partial.items()}
    for n, scores in rewards.items():
        right.plot(np.full(len(scores), n), scores, "D", color="black", mfc="none", ms=4, alpha=0.6)
    means = [scores.mean() for scores in rewards.values()]
    right.plot(list(partial), means, "D-", color="black", lw=2.5, label="reward")
    for i, task in enumerate(tasks):
        colour = look_of(task, tasks)[0]
        style: dict[str, Any] = {"marker": "o^s"[i], "color": colour, "label": task}
        left.plot(100 * drawn.mean(1), 100 * drawn[:, i], ms=5, ls="none", mfc="none", **style)
        means = [100 * scores[:, i].mean() for scores in partial.values()]
        right.plot(list(partial), means, ls=("--", "-.", ":")[i], lw=1.8, **style)
    tidy(left, "", "reward of a random path: mean over tasks, %", "score on each task, %")
    left.set_ylim(-3, 125)
    left.set_yticks(range(0, 101, 20))
    tidy(right, "", f"places that take {expert}; the others are random", "mean over the paths, %")
    right.set_xticks(list(partial))
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
    figure, (axes,) = panels(1, 1, min(9.1, 1.6 + 1.0 * T), 0.9 + 0.62 * C)
    low = min(-1.0, *(log_probs[c, t] for c in range(C) for t in range(len(tokens[c]))))
    faces = AMOUNTS(np.nan_to_num(0.5 - 0.5 * log_probs / low))  # (C, T, 4)
    axes.imshow(faces, extent=(0, T, C, 0), aspect="auto")
    for c, t in np.ndindex(C, T):
        if t >= len(tokens[c]):
            axes.add_patch(Rectangle((t, c), 1, 1, fc="white", ec="0.5", hatch="xx"))
            continue
        axes.add_patch(Rectangle((t, c), 1, 1, fill=False, ec="0.4"))
        text = f"{tokens[c][t]}\n{round(float(log_probs[c, t]), 2) + 0.0:.2f}"
        axes.text(t + 0.5, c + 0.5, text, fontsize=9, color=ink_on(faces[c, t]), **MIDDLE)
    names = [f"choice {c}" + (" (right)" if c == right else "") for c in range(C)]
    axes.set_yticks(np.arange(C) + 0.5, names, fontsize=9)
    axes.set_xticks(np.arange(T) + 0.5, [f"t = {t + 1}" for t in range(T)], fontsize=9)
    axes.set(xlim=(0, T), ylim=(C, 0))
    axes.set_title(title, fontsize=10)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return figure
