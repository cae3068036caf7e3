"""The forest plot of a table of methods: which rows it shows, their means and intervals, and what it says."""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd
from pandas import DataFrame

from rmm_lab.evidence.rows import BEST_EXPERT, METHODS, STOCHASTIC, kind_of
from rmm_lab.figures.results import SEES
from rmm_lab.figures.searches import t_interval

MOST = 16  # methods that one panel can show
LINES = {  # the bounds that are a line across all methods, and what it is called
    "fine-tuned": "experts, own tasks",
    "multi-task": "multi-task model",
    "base": "base",
}
AXIS = "accuracy, %, mean over tasks"


def with_best_expert(rows: DataFrame) -> DataFrame:
    """Of the experts, each used for all tasks, the one with the best mean on the test split stays.

    It is a bound, no fair opponent.
    """
    alone = rows[kind_of(rows["method"]) == "expert"]
    best = alone.loc[alone.groupby(["group", "size", "seed"])["mean"].idxmax()]
    return pd.concat([rows.drop(alone.index), best.assign(method=BEST_EXPERT)])


class Forest(NamedTuple):
    """What a forest plot shows. A panel is a group of experts.

    ``points``: panel -> a frame with the index method, the same for all, and the columns ``sees``, ``mean``
    over seeds in %, and ``half``, half the width of its 95 % interval; NaN for a mean where the group lacks
    the method, for a half where one seed was measured or nothing is drawn. ``lines``: panel -> what
    ``LINES`` calls a bound -> its mean in %. ``left_out``: how many methods have no row.
    """

    points: dict[str, DataFrame]
    lines: dict[str, dict[str, float]]
    left_out: int

    @property
    def caption(self) -> str:
        """What the marks are, and what is missing."""
        text = "Point: mean over seeds; bar: its 95 % interval (Student's t), where a method draws."
        if self.left_out:
            text += (
                f"\nThe best of each kind by mean rank on the test split; the page's table has "
                f"{self.left_out} more."
            )
        return text

    @property
    def alt(self) -> str:
        """One sentence on the plot, and one on each panel."""
        n = len(next(iter(self.points.values())))
        text = f"Forest plot: mean accuracy of {n} methods"
        text += f" of {n + self.left_out}" if self.left_out else ""
        for panel, points in self.points.items():
            best = points["mean"].dropna().nlargest(1)  # none where no method was measured yet
            said = [f"best {method} {mean:.1f}" for method, mean in best.items()]
            said += [f"{name} {mean:.1f}" for name, mean in self.lines[panel].items()]
            text += f". {panel}: {', '.join(said)}"
        return text + "."


def chosen(rows: DataFrame, most: int = MOST) -> DataFrame:
    """The methods to show, by what they see, then in the order of the tables: index method, column ``sees``.

    In turn the best of each kind, until there are ``most``: by the mean over groups of its rank, and
    searches first. The choice is for the eye alone: nothing is tuned by it.
    """
    means = rows.pivot_table("mean", "method", ["size", "group"])  # over seeds
    of = DataFrame({"sees": rows.groupby("method")["sees"].first()})
    of["rank"] = means.rank(pct=True).mean(axis=1)
    of["search"] = kind_of(of.index.to_series()) == "search"
    of = of.sort_values(["search", "rank"], ascending=False)
    of["turn"] = of.groupby("sees").cumcount()
    of = of.sort_values("turn", kind="stable").head(most)
    order = {method: i for i, method in enumerate(METHODS.index)}
    of["kind"], of["place"] = of["sees"].map(SEES.index), of.index.map(order)
    return of.sort_values(["kind", "place"])[["sees"]]


def forest(rows: DataFrame, most: int = MOST) -> Forest:
    """The forest plot of a table's rows, a panel for each group of experts and size of model."""
    rows = with_best_expert(rows)
    bounds = rows["method"].isin(LINES)
    shown, points, lines = chosen(rows[~bounds], most), {}, {}
    sizes = list(rows["size"].unique())
    groups = rows.groupby(["size", "group"], sort=False)
    for (size, group), own in sorted(groups, key=lambda item: sizes.index(item[0][0])):
        panel = f"{size}: {group}" if len(sizes) > 1 else str(group)
        by_method = own.groupby("method")["mean"]
        means, drawn = by_method.mean(), {m: v for m, v in by_method if m in STOCHASTIC}
        half = {m: t_interval(v)[1] for m, v in drawn.items() if len(v) > 1}
        points[panel] = shown.assign(mean=means, half=pd.Series(half, dtype=float))
        lines[panel] = {name: float(means[m]) for m, name in LINES.items() if m in means}
    return Forest(points, lines, rows.loc[~bounds, "method"].nunique() - len(shown))
