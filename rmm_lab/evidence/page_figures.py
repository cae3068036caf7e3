"""The figures of result tables, drawn from their CSV files alone: ``DRAW[name](rows)``, see ``sheets``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from rmm_lab.errors import InputError
from rmm_lab.evidence.pages import (
    METHODS,
    TITLES,
    UNIFORM,
    Block,
    Blocks,
    Rows,
    by_seed,
    dar_blocks,
    draws,
    text,
)
from rmm_lab.figures.paths import COLOURS, moving_average

NAN = float("nan")


def methods_picture(blocks: Mapping[str, tuple[Block, Sequence[str]]]) -> Figure:
    """A panel for each column, a line for each method: mean, ± the deviation where seeds differ.

    The dotted line is RMM's mean. Squares are bounds, circles merges, the diamond RMM.
    """
    widest = max(len(columns) for _, columns in blocks.values())
    shown = {h: [m for m in METHODS if m in found] for h, (found, _) in blocks.items()}
    heights = [0.62 + 0.21 * len(methods) for methods in shown.values()]
    figure = Figure(figsize=(2.2 + 1.75 * widest, sum(heights) + 0.35), layout="constrained")
    parts = figure.subfigures(len(blocks), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (heading, (found, columns)) in zip(parts, blocks.items(), strict=True):
        part.suptitle(heading, fontsize=10, fontweight="bold")
        panels = part.subplots(1, widest, sharey=True, squeeze=False)[0]
        methods = shown[heading]
        for axes, column in zip(panels, columns, strict=False):
            for y, method in enumerate(methods):
                v = list(found[method].get(column, {}).values())
                if not v:
                    continue
                look: dict[str, Any] = {"color": "0.35", "fmt": "s"}
                if method in UNIFORM:
                    look = {"color": COLOURS[5], "fmt": "o"}
                elif method.startswith("RMM"):
                    look = {"color": COLOURS[6], "fmt": "D"}
                sd = np.std(v, ddof=1) if draws(method) and len(v) > 1 else None
                axes.errorbar(np.mean(v), y, xerr=sd, ms=5, capsize=3, mec="black", mew=0.5, **look)
                if method == "RMM":
                    axes.axvline(float(np.mean(v)), color=COLOURS[6], ls=":", lw=1, zorder=0)
            axes.set_title(column, fontsize=9)
            axes.tick_params(labelsize=8)
            axes.grid(axis="x", alpha=0.3)
            axes.margins(x=0.1)
        for axes in panels[len(columns) :]:
            axes.set_axis_off()
        panels[0].set_yticks(range(len(methods)), methods, fontsize=8)
        panels[0].set_ylim(len(methods) - 0.5, -0.5)
        part.supxlabel("test split, %", fontsize=9)
    return figure


def draw_dar(rows: Rows) -> Figure:
    """A panel for each metric of Table IV: each seed as a point, the mean as a line over data shares."""
    found, shares = dar_blocks(rows)
    figure = Figure(figsize=(3.1 * len(found), 3.4), layout="constrained")
    panels = figure.subplots(1, len(found), sharey=False, squeeze=False)[0]
    looks = {
        "RMM": ("paper's preset, DAR", COLOURS[6], "D", "-"),
        "RMM w/o DAR": ("paper's preset, no DAR", COLOURS[5], "o", "--"),
        "RMM, default preset": ("default preset", COLOURS[3], "s", ":"),
        "RMM, default preset, by likelihood": ("default, by likelihood", COLOURS[2], "^", "-."),
        "RMM, default preset, DAR": ("default preset, DAR", COLOURS[3], "s", ":"),
        "RMM, default preset, by likelihood, DAR": ("by likelihood, DAR", COLOURS[2], "^", "-."),
    }
    for axes, (metric, own) in zip(panels, found.items(), strict=True):
        for i, (setting, columns) in enumerate(own.items()):
            name, colour, marker, line = looks[setting]
            at = np.arange(len(shares)) + 0.1 * (i - 1)
            means = [np.mean(list(columns.get(s, {0: NAN}).values())) for s in shares]
            axes.plot(at, means, line, marker=marker, ms=6, color=colour, mec="black", label=name)
            for x, s in zip(at, shares, strict=True):
                v = list(columns.get(s, {}).values())
                axes.plot([x] * len(v), v, marker, ms=3.5, mfc="none", mec=colour, mew=0.8)
        axes.set_xticks(range(len(shares)), shares, fontsize=9)
        axes.set_title(metric, fontsize=10)
        axes.set_xlabel("share of the data", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("test split, %", fontsize=9)
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, fontsize=8, ncols=len(labels), loc="outside upper center")
    return figure


def draw_rewards(rows: Rows) -> Figure:
    """Fig. 3: reward per episode at 1 % of the data, raw as points, a panel without DAR and one with it.

    The running mean of the raw reward; of both searches in each panel, so that they can be compared. They
    have one seed: the first that all have.
    """
    scales = sorted({row["dar"] for row in rows})
    seeds = [{row["seed"] for row in rows if row["dar"] == s} for s in scales]
    if not (common := set.intersection(*seeds)):
        raise InputError(
            f"dar-curve.csv: expected a seed with DAR and without, found {seeds}; measure both with "
            "python -m rmm_lab.evidence.tables fig3"
        )
    rows = [row for row in rows if row["seed"] == min(common)]
    figure = Figure(figsize=(8, 0.7 + 2.1 * len(scales)), layout="constrained")
    panels = figure.subplots(len(scales), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    raw = {s: np.array([r["raw_reward"] for r in rows if r["dar"] == s], float) for s in scales}
    paid = {s: np.array([r["dar_reward"] for r in rows if r["dar"] == s], float) for s in scales}
    names = {s: "with DAR" if s else "without DAR" for s in scales}
    for axes, scale in zip(panels, scales, strict=True):
        axes.plot(raw[scale], ".", ms=2.5, color="0.6", label="raw (Eq. 7)")
        if scale:
            axes.plot(paid[scale], lw=0.7, color=COLOURS[5], label="paid (Eq. 10)")
        for other in scales:
            own = other == scale
            look = (
                {"color": COLOURS[6], "lw": 2.2} if own else {"color": "black", "lw": 1, "ls": "--"}
            )
            label = "mean of the last 50" + ("" if own else f", {names[other]}")
            axes.plot(moving_average(raw[other], 50), label=label, **look)
        axes.set_title(names[scale], fontsize=10, loc="left")
        axes.set_ylabel("reward, %", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        place = {"loc": "lower right", "bbox_to_anchor": (1, 1), "frameon": False, "ncols": 4}
        axes.legend(fontsize=8, columnspacing=1, borderpad=0.1, **place)
    panels[-1].set_xlabel("episode", fontsize=9)
    return figure


def draw_searches(rows: Rows, curve: Rows) -> Figure:
    """The best path so far, on the whole reward split, over evaluations: a panel for each problem.

    The last point is the final choice.

    Mean over seeds; the range as a band for RMM, as a bar at the end for the others. Beside each name the
    test score of the final choice.
    """
    groups = list(dict.fromkeys(row["group"] for row in curve))
    methods = list(dict.fromkeys(row["method"] for row in curve))
    figure = Figure(figsize=(8, 0.3 + 3.1 * len(groups)), layout="constrained")
    panels = figure.subplots(len(groups), 1, squeeze=False)[:, 0]
    for axes, group in zip(panels, groups, strict=True):
        for i, method in enumerate(methods):
            at: dict[int, list[float]] = {}
            for row in curve:
                if (row["group"], row["method"]) == (group, method):
                    at.setdefault(row["evaluations"], []).append(row["reward_split"])
            if not at:
                continue
            x = sorted(at)
            colour = COLOURS[(6, 5, 1, 3, 2, 7, 0)[i % 7]]
            low, high = [min(at[n]) for n in x], [max(at[n]) for n in x]
            mean = [float(np.mean(at[n])) for n in x]
            if method == "RMM":
                axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
            else:  # more bands could not be told apart
                span = [[mean[-1] - low[-1]], [high[-1] - mean[-1]]]
                axes.errorbar(
                    x[-1] * (1 + 0.008 * i), mean[-1], span, color=colour, capsize=2, lw=1
                )
            ends = [r for r in rows if (r["group"], r["method"]) == (group, method)]
            score = text(by_seed(ends, "mean"), "RMM")
            axes.plot(
                x,
                mean,
                ls=("-", "--", ":", "-.")[i % 4],
                marker="Dosv^Px*"[i % 8],
                ms=5,
                markevery=(i % 3, 3),
                color=colour,
                lw=2.4 if method == "RMM" else 1.4,
                label=f"{method}: {score}",
            )
        axes.set_title(group, fontsize=10, loc="left")
        axes.set_ylabel("reward split, %", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        title = {"title": "test split at the end, %", "title_fontsize": 8, "alignment": "left"}
        look = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), "frameon": False}
        axes.legend(fontsize=8, **look, **title)
    panels[-1].set_xlabel("evaluations", fontsize=9)
    return figure


def _of_methods(blocks: Blocks) -> Callable[[Rows], Figure]:
    return lambda rows: methods_picture(blocks(rows))


DRAW: dict[str, Callable[..., Figure]] = {
    **{name: _of_methods(blocks) for name, (_, blocks, _) in TITLES.items()},
    "table-IV": draw_dar,
    "fig-3": draw_rewards,
    "searches": draw_searches,
}
