"""Figures of paths: rewards (Fig. 3), layer paths, merging maps, policies.

Colours are okabe_ito; counts and probabilities go from white to dark blue, so that zero looks empty, amounts
below zero from white to brown, and differences from orange to purple with white at zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import color_sequences
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MultipleLocator

from rmm_lab.operators import SCOPE
from rmm_lab.reward import Path, Step

COLOURS = color_sequences["okabe_ito"]
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "ooo", "+++", "---")
OWN_COLOURS = {  # of tasks, experts and operators, through the whole course
    **{"digits": 1, "textures": 2, "letters": 3, "symbols": 7, "weight_average": 5, "average": 5},
    **{"ramps": 1, "stripes": 2},
    **{"ties": 4, "task_arithmetic": 6, "dare": 7, "expert=1": 3, "expert=2": 7},
    **{"regmean": 3, "least_squares": 6},
    **{
        "colours": 1,
        "answers": 2,
        "antonyms": 3,
        "swaps": 1,
        "endings": 2,
        "fitting": 3,
        "pronouns": 7,
    },
    **{"arithmetic": 1, "translation": 2, "code": 3},
}
COUNTS = LinearSegmentedColormap.from_list("counts", ["white", "#004c7d"])
AMOUNTS = LinearSegmentedColormap.from_list("amounts", ["#9c4a00", "white", "#004c7d"], 257)
DIFFERENCES = LinearSegmentedColormap.from_list(  # as PuOr, but exactly white in the middle
    "differences", ["#7f3b08", "#e08214", "white", "#8073ac", "#2d004b"], 257
)
MIDDLE: dict[str, Any] = {"ha": "center", "va": "center"}
ON_WHITE = {"fc": "white", "ec": "none", "pad": 1}  # behind a text
BOXES = 8  # of a path in one row
SPELLED = {
    name.lower().replace("-", "_"): name
    for name in (
        *(
            "TIES",
            "DARE",
            "DARE-TIES",
            "RegMean",
            "TSV",
            "Iso-C",
            "Iso-CTS",
            "WUDI",
            "KnOTS",
            "STAR",
        ),
        *("PCB", "Breadcrumbs", "DELLA", "Consensus", "EMR", "MagMax", "SCE", "WIDEN", "SLERP"),
        *("LiNeS", "DOGE"),
    )
} | {"weight_average": "average"}


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
        unused.remove()
    return figure, list(axes[:n])


def tidy(
    axes: Any, title: str = "", xlabel: str = "", ylabel: str = "", grid: Any = "both"
) -> None:
    """Titles, labels and ticks in the sizes of the course, and a pale grid."""
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=9)
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":  # powers would be formulas, which are not drawn
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
    axes.grid(axis=grid, alpha=0.3)


def ink_on(face: Sequence[float]) -> str:
    """Black or white, for a text on a cell of this colour: red, green, blue and alpha."""
    *rgb, alpha = face  # transparent where NaN, on white
    return "white" if alpha and np.dot(rgb, (0.3, 0.59, 0.11)) < 0.5 else "black"


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
            colour = ink_on(image.to_rgba(value))
            axes.text(x, y, text, fontsize=fontsize, color=colour, **MIDDLE)
    axes.set_xticks(range(len(columns)), columns, fontsize=9)
    axes.set_yticks(range(len(rows)), short_names(rows), fontsize=9)
    return image


def short_names(sources: Sequence[str]) -> list[str]:
    """Sources as a reader calls them: ``average``, ``TIES``, ``75 % digits``, ``least squares 3:1``.

    ``sources``: experts first, so that an operator that leans to one can name it. Options that tell no two
    sources apart are left out.
    """
    names = [_short_name(source, sources) for source in sources]
    options = [source.partition(":")[2].replace(",", ", ") for source in sources]
    return [
        f"{name} ({more})" if more and names.count(name) > 1 else name
        for name, more in zip(names, options, strict=True)
    ]


def _short_name(source: str, sources: Sequence[str]) -> str:
    function, _, text = source.partition(":")
    if function not in SCOPE:
        return source  # an expert's
    name = SPELLED.get(function, function.replace("_", " "))
    options = dict(item.split("=") for item in text.split(",") if item)
    if "expert" in options:
        lead, share = int(options["expert"]) - 1, float(options.get("share", 0.75))
        expert = sources[lead] if lead < len(sources) else f"expert {lead + 1}"
        return f"{100 * share:g} % {expert}"
    if "weights" in options:
        return f"{name} {options['weights'].replace('/', ':')}"
    return f"{name} × {options['scale']}" if "scale" in options else name


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
    axes.text(x, y, text, fontsize=9, color=colour, bbox=behind, **MIDDLE)


def look_of(source: str, sources: Sequence[str]) -> tuple[Any, str]:
    """A source's colour and hatch, its own in every picture; grey for one that is not among ``sources``.

    A source without a colour of its own, or whose colour another one before it has, takes the next free one.
    """
    numbers: list[int] = []
    for i, name in enumerate(sources):
        function, _, text = name.partition(":")
        own = OWN_COLOURS.get(function if "expert=" not in text else text.partition(",")[0], i + 1)
        free = [n for n in range(1, len(COLOURS)) if n not in numbers] or [1 + i % 7]
        numbers.append(own if own in free else free[0])
    if source not in sources:
        return "0.4", ""
    number = numbers[list(sources).index(source)]
    return COLOURS[number], HATCHES[number - 1]


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
    axes.legend(fontsize=9, loc="lower right")
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
    stacks: Sequence[range] = (),
    members: Sequence[str] = (),
    label: str = "",
) -> Figure:
    """What a path takes at each place: its merging map (Eq. 5), the stem as the first column.

    The stem is the base's unless the path chooses one. ``members``: the sources that a step's scales are of;
    by default the first. With two ``stacks`` (a T5's) layers are called enc 0, ..., dec 0, ..., and a line
    separates encoder and decoder. Boxes in running order follow where a layer runs twice or out of order,
    which a map cannot show.
    """
    path = with_stem(path)
    rows, n_boxes = rows_of(path, sources, members), boxes_of(path)
    width = max(7.0, 0.46 * n_layers + 3)
    if n_boxes:
        width = max(width, 0.95 * min(len(path), BOXES) + 2.6)
    height = 0.95 + 0.29 * len(rows) + (0.35 + 0.8 * n_boxes) * bool(n_boxes)
    figure = Figure(figsize=(width, height + 0.3 * bool(label)), layout="constrained")
    if label:
        figure.suptitle(label, fontsize=11, fontweight="bold", x=0.01, ha="left")
    _draw_path(figure, path, rows, members, n_layers, stacks)
    return figure


def rows_of(path: Path, sources: Sequence[str], members: Sequence[str]) -> list[str]:
    """The rows of a path's map: all sources, and what else it takes.

    Where it has scales, operators that it never takes would be most of the rows, and have none.
    """
    plain = [step.source for step in path if not step.scales]
    rows = dict.fromkeys((*sources, *members, *plain))
    if not any(step.scales for step in path):
        return list(rows)
    mixed = (members or sources)[: max(len(step.scales) for step in path)]
    return [name for name in rows if name in (*mixed, *plain)]


def boxes_of(path: Path) -> int:
    """How many rows of boxes a path needs below its map: none where layers run in order, once at most."""
    layers = [step.layer for step in path]
    return 0 if layers == sorted(set(layers)) else -(-len(path) // BOXES)


def _draw_path(
    figure: Any, path: Path, rows: Sequence[str], members: Sequence[str], n_layers: int, stacks: Any
) -> None:
    """Map, and boxes if need be, of one path, its stem first, into a figure."""
    n_boxes = boxes_of(path)
    heights = [0.3 * len(rows) + 0.4, 0.9 * n_boxes][: 1 + bool(n_boxes)]
    top, *more = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    counts = merging_map(path, rows, -1, 1 + n_layers, members)
    image = draw_map(top, counts, rows, -1, stacks)
    bar = figure.colorbar(image, ax=top, pad=0.01, fraction=0.03, aspect=12)
    bar.ax.set_ylim(min(0.0, float(counts.min())), image.norm.vmax)
    bar.ax.yaxis.set_major_locator(MultipleLocator(max(0.5, image.norm.vmax // 2)))
    bar.ax.tick_params(labelsize=9)
    for k in set(range(n_layers)) - {step.layer for step in path}:
        skipped: dict[str, Any] = {"fc": "none", "ec": "0.75", "hatch": "//", "lw": 0}
        top.add_patch(Rectangle((k + 0.5, -0.5), 1, len(rows), **skipped))
        y, look = (len(rows) - 1) / 2, {"rotation": 90, "fontsize": 9, "bbox": ON_WHITE}
        top.text(k + 1, y, "skipped", **look, **MIDDLE)
    top.axvline(0.5, color="black", lw=1.5)
    what = "how often each source's layer is taken"
    if any(step.scales for step in path):
        what = "how much of each source goes into each layer"
    top.set_title(f"merging map: {what}", fontsize=10)
    for axes in more:
        axes.set(xlim=(-0.1, min(len(path), BOXES) + 0.1), ylim=(0, n_boxes))
        axes.set_axis_off()
        axes.set_title("the same in running order", fontsize=10)
        names = dict(zip(rows, short_names(rows), strict=True))
        for i, step in enumerate(path):
            x, y = i % BOXES + 0.5, n_boxes - 0.5 - i // BOXES
            name = "mixture" if step.scales else fill(names[step.source], 11)
            text = f"{name}\n{place_name(step.layer, stacks)}"
            draw_box(axes, x, y, 0.9, text, look_of(step.source, rows))


def merging_map(
    path: Path, sources: Sequence[str], first: int, n_places: int, members: Sequence[str] = ()
) -> np.ndarray:
    """How often a path takes each source's layer: (S, places from layer ``first`` on), Eq. 5.

    A step with scales counts as its scales, at the rows of ``members``, which are by default the first.
    """
    counts = np.zeros((len(sources), n_places))
    rows = {source: row for row, source in enumerate(sources)}
    for step in path:
        taken = zip(members or sources, step.scales, strict=False)
        for source, amount in taken if step.scales else [(step.source, 1.0)]:
            if source in rows:
                counts[rows[source], step.layer - first] += amount
    return counts


def draw_map(
    axes: Any,
    counts: np.ndarray,
    names: Sequence[str],
    first: int,
    stacks: Sequence[range] = (),
    cursor: int | None = None,
    fontsize: float = 9,
) -> Any:
    """A merging map (rows sources, columns places from layer ``first`` on); returns the image.

    ``names`` may be longer than the map: skip and back have rows without counts. ``cursor``: the layer
    to decide on, which gets a frame.
    """

    def write(n: float) -> str:
        return "" if n == 0 else f"{n:.0f}" if n == round(n) else f"{n:.2f}".replace("-", "−")

    (height, n_places), most = counts.shape, max(1.0, float(np.abs(counts).max(initial=0)))
    image = heat_map(axes, counts, names, (), write, -most, most, AMOUNTS, fontsize)
    for text in axes.texts:
        if text.get_text().startswith("−"):  # by more than a colour that is pale near zero
            text.set_fontweight("bold")
    # Thin lines between the cells, so that two counted neighbours read as two choices.
    below = height + (len(names) > height)
    axes.vlines(np.arange(1, n_places) - 0.5, -0.5, height - 0.5, color="0.75", lw=0.5)
    axes.hlines(np.arange(1, below) - 0.5, -0.5, n_places - 0.5, color="0.75", lw=0.5)
    name_places(axes, first, n_places, stacks)
    axes.set_ylim(len(names) - 0.5, -0.5)
    if len(names) > height:  # over the cursor's frame
        x, y = (n_places - 1) / 2, (height + len(names) - 1) / 2
        axes.text(x, y, "not counted", fontsize=9, bbox=ON_WHITE, zorder=4, **MIDDLE)
    if cursor is not None and 0 <= cursor - first < n_places:
        x = cursor - first
        look: dict[str, Any] = {"fill": False, "ec": COLOURS[1], "lw": 3, "clip_on": False}
        axes.add_patch(Rectangle((x - 0.5, -0.5), 1, len(names), zorder=3, **look))
        axes.get_xticklabels()[x].set(fontweight="bold", bbox={"fc": "white", "ec": COLOURS[1]})
    return image


def name_places(axes: Any, first: int, n_places: int, stacks: Sequence[range]) -> None:
    """Name the columns, places from layer ``first`` on; a line separates two stacks."""
    places = [place_name(k, stacks).removeprefix("layer ") for k in range(first, first + n_places)]
    crowded = len(stacks) == 2 and n_places > 8
    axes.set_xticks(range(n_places), places, fontsize=9)
    if crowded:
        axes.tick_params("x", rotation=90)
    axes.set_xlabel("layer", fontsize=9)
    if len(stacks) == 2:
        axes.axvline(stacks[1].start - first - 0.5, color="0.4", lw=2)
