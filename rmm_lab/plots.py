"""Figures: the reward per episode (Fig. 3) and a layer path. Colours are okabe_ito and cividis."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import color_sequences
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

COLOURS = color_sequences["okabe_ito"]
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "ooo", "+++", "---")


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file, the same for the same figure."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150, metadata={"Software": None})
    return data.getvalue()


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


def path_picture(
    steps: Sequence[tuple[str, int]],
    sources: Sequence[str],
    n_layers: int,
    stem: str,
    stacks: Sequence[range] = (),
) -> Figure:
    """A path as a row of boxes in running order: one colour and hatch per source, its layer's number.

    With two ``stacks`` (a T5's) layers are called enc 0, enc 1, ..., dec 0, ..., and a line in the map
    shows the border that no layer crosses.

    The first box is the stem; an arrow says to which expert a weighted average leans. Above the boxes:
    the merging map at the end (Eq. 5), sources by layers.
    """
    # Room for the map at the top, the path's boxes below; both share nothing but the sources' colours.
    width = max(6.0, 0.8 * max(len(steps) + 1, n_layers) + 3)
    figure = Figure(figsize=(width, 1.9 + 0.32 * len(sources)), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=[0.45 * len(sources), 1.3])
    counts = np.zeros((len(sources), n_layers))
    for source, k in steps:
        counts[list(sources).index(source), k] += 1
    top.imshow(counts, cmap="cividis", vmin=0, vmax=max(1.0, counts.max()), aspect="auto")
    for (a, k), n in np.ndenumerate(counts):
        if n:
            colour = "black" if n > counts.max() / 2 else "white"
            top.text(k, a, f"{n:.0f}", ha="center", va="center", fontsize=9, color=colour)
    top.set_yticks(range(len(sources)), sources, fontsize=9)
    places = [str(k) for k in range(n_layers)]
    if len(stacks) == 2:
        places = [
            f"{name} {j}"
            for name, s in zip(("enc", "dec"), stacks, strict=True)
            for j in range(len(s))
        ]
        top.axvline(stacks[1].start - 0.5, color="white", lw=2)
    top.set_xticks(range(n_layers), places, fontsize=9)
    top.set_title("merging map: how often each source's layer was taken", fontsize=10)
    top.set_xlabel("layer", fontsize=9)
    for i, (source, k) in enumerate([(stem, -1), *steps]):
        known = source in sources
        rgb = _rgb(list(sources).index(source)) if known else (0.4, 0.4, 0.4)
        bottom.add_patch(
            FancyBboxPatch(
                (i + 0.08, 0.1),
                0.84,
                0.8,
                boxstyle="round,pad=0,rounding_size=0.08",
                facecolor=(*rgb, 0.35),
                edgecolor=rgb,
                hatch=HATCHES[list(sources).index(source) % len(HATCHES)] if known else "",
                lw=1.5,
            )
        )
        place = "stem" if k < 0 else places[k] if len(stacks) == 2 else f"layer {k}"
        bottom.text(
            i + 0.5,
            0.5,
            f"{_label(source)}\n{place}",
            ha="center",
            va="center",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85},
        )
    bottom.set_xlim(-0.1, len(steps) + 1.1)
    bottom.set_ylim(0, 1)
    bottom.set_axis_off()
    bottom.set_title(
        "the path: the stem, then the layers in the order in which they run", fontsize=10
    )
    return figure


def _label(source: str) -> str:
    """A source in a few short lines; an operator that leans says to which expert."""
    name, _, options = source.partition(":")
    leads = next((o.partition("=")[2] for o in options.split(",") if o.startswith("expert=")), "")
    return name.replace("_", "\n") + (f" → {leads}" if leads else "")


def _rgb(a: int) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    # Black, the first, is for lines; seven colours and eight hatches: 56 sources differ.
    return to_rgb(COLOURS[1 + a % (len(COLOURS) - 1)])
