"""Pages on searches of one problem: beside each other, with one choice changed; see ``pages``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pandas import DataFrame, Index, Series

from rmm_lab.evidence.markdown import markdown
from rmm_lab.evidence.rows import interval, spread
from rmm_lab.figures.searches import t_interval
from rmm_lab.search.config import BOTH, SEARCHED

AGENT = SEARCHED[1]  # the default preset's
UNCHANGED = BOTH  # what the ablation's differences are to
ABLATION = {
    "reward split, %": ("reward_split", spread),
    "difference": ("reward_split − reference", interval),
    "test split, %": ("mean", spread),
    "seeds": ("seed", "nunique"),
}


def compared(rows: DataFrame, by: str, reference: str, columns: dict[str, Any]) -> DataFrame:
    """By problem and ``by``: ``columns``, heading -> (column, how to aggregate it), as text.

    There are more columns to aggregate: what each split's score is above, and below, that at the same group
    and seed where ``by`` is ``reference``.
    """
    splits, key = ["reward_split", "mean"], ["group", "seed"]
    base = rows[rows[by] == reference].set_index(key)[splits]
    gain = (rows[splits] - rows[key].join(base, on=key)[splits]).mask(rows[by] == reference)
    rows = rows.join(gain.add_suffix(" − reference")).join((-gain).add_prefix("reference − "))
    table = rows.groupby(["group", by], sort=False).agg(**columns)
    return table.rename_axis(["problem", "search" if by == "method" else by])


def searches_table(rows: DataFrame, reference: str = BOTH) -> DataFrame:
    """Each problem's searches, and what ``reference`` has more than each."""
    columns: dict[str, Any] = {
        "seeds": ("seed", "nunique"),
        "reward split, %": ("reward_split", spread),
        "test split, %": ("mean", spread),
        f"{reference} − it, reward": ("reference − reward_split", interval),
        f"{reference} − it, test": ("reference − mean", interval),
        "seconds": ("seconds", lambda seconds: f"{seconds.mean():.0f}"),
    }
    return compared(rows, "method", reference, columns)


def ablation_table(rows: DataFrame, reference: str = UNCHANGED) -> DataFrame:
    """Each problem's settings, and how far each is above ``reference``, the unchanged one."""
    return compared(rows, "setting", reference, ABLATION)


def show_searches(rows: DataFrame, curve: DataFrame, reference: str = BOTH) -> str:
    """All searches of each problem, the best on the reward split first."""
    best = rows.groupby(["group", "method"])["reward_split"].mean()
    names = list(rows["group"].unique())
    order = sorted(best.index, key=lambda at: (names.index(at[0]), -best[at]))
    return (
        f"All had {rows['evaluations'].iloc[0]} evaluations on the same subsets of the reward split. Each "
        "chose in the end among ten paths on all of it: those with the best scores, and where scales "
        f"were searched, mostly the means arrived at; {reference} had its agent's greedy path besides. "
        "Mean ± sample standard deviation over seeds, best first on the reward split. "
        f"*{reference} − it* is paired by seed, ± its 95 % interval. Seconds are of searches that ran beside "
        "other work.\n\n" + markdown(searches_table(rows, reference).loc[order])
    )


def show_ablation(rows: DataFrame, reference: str = UNCHANGED, picture: str = "") -> str:
    """A preset and one choice changed. ``picture``: the file of their forest plot, if there is one."""
    shown = f"![{difference_alt(rows, 'setting', reference)}]({picture})\n\n" if picture else ""
    return (
        f"{shown}Mean ± sample standard deviation over seeds, {rows['evaluations'].iloc[0]} episodes. The "
        "difference is on the reward split, which also chose; it is paired by seed, ± its 95 % interval.\n\n"
        + markdown(ablation_table(rows, reference))
    )


# ------------------------------------------------------------------------ differences as a forest plot


def differences(
    rows: DataFrame, by: str, reference: str, key: Sequence[str] = ("group", "seed")
) -> DataFrame:
    """How far each row is above the row of the same ``key`` whose ``by`` is ``reference``.

    In points of the test split, in the column ``gain``; rows of the reference, and those of seeds that it
    lacks, are left out.
    """
    key = list(key)
    base = rows[rows[by] == reference].set_index(key)["mean"].rename("base")
    rows = rows[rows[by] != reference].join(base, on=key)
    return rows.assign(gain=rows["mean"] - rows["base"]).dropna(subset="gain")


def difference_points(rows: DataFrame, by: str, reference: str) -> dict[str, DataFrame]:
    """What ``forest_picture`` shows: problem -> each ``by``'s ``mean`` difference on the test split, ``half``
    the width of its 95 % interval, and what it ``sees``."""
    gains = differences(rows, by, reference)
    names = [name for name in dict.fromkeys(rows[by]) if name != reference]
    points = {}
    for group, own in gains.groupby("group", sort=False):
        by_name = own.groupby(by)["gain"]
        half = {name: t_interval(gain)[1] for name, gain in by_name if len(gain) > 1}
        frame = DataFrame({"sees": "labels"}, index=Index(names))
        points[str(group)] = frame.assign(mean=by_name.mean(), half=Series(half, dtype=float))
    return points


def difference_alt(rows: DataFrame, by: str, reference: str) -> str:
    """One sentence on that plot, and one on each panel."""
    text = f"Forest plot: differences to {reference} on the test split"
    for group, points in difference_points(rows, by, reference).items():
        said = [f"{name} {mean:+.1f}" for name, mean in points["mean"].dropna().items()]
        text += f". {group}: {', '.join(said)}".replace("-", "−")
    return text + "."
