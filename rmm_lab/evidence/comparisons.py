"""Pages on searches of one problem: beside each other, with one choice changed; see ``pages``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pandas import DataFrame, Index, Series, concat

from rmm_lab.evidence.markdown import markdown, seconds_text, seeds, span
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


# --------------------------------------------------------------------------------- by their budgets

VERDICTS = ("ahead", "level", "behind")


def budget_gains(rows: DataFrame, reference: str = AGENT) -> DataFrame:
    """What ``reference`` has more than each search of the same problem, budget and seed, in points of the
    test split, in the column ``more``."""
    gains = differences(rows, "method", reference, ("group", "evaluations", "seed"))
    return gains.assign(more=-gains["gain"])


def verdict(gains: Series) -> str:
    """``ahead``, ``level`` or ``behind`` by the 95 % interval of the differences; empty for one of them."""
    if len(gains) < 2:
        return ""
    mean, half = t_interval(gains)
    return VERDICTS[0 if mean - half > 0 else 2 if mean + half < 0 else 1]


def verdicts_table(gains: DataFrame) -> DataFrame:
    """By search and budget: on how many problems the reference is ahead, level and behind."""
    each = gains.groupby(["method", "evaluations", "group"], sort=False)["more"].agg(verdict)

    def counted(own: Series) -> str:
        return " / ".join(str((own == name).sum()) for name in VERDICTS) if own.any() else ""

    return each.groupby(["method", "evaluations"], sort=False).agg(counted).unstack()


def show_budgets(rows: DataFrame) -> str:
    """Searches whose budget was given beforehand, at several budgets."""
    gains = budget_gains(rows)
    text = (
        f"![{budgets_alt(rows)}](budgets.png)\n\n"
        "Test split, %: mean ± sample standard deviation over seeds "
        f"({seeds(rows, 'group', 'evaluations', 'method')}), by the number of evaluations. Every cell is a "
        "search of its own, which was told its budget beforehand: a tenth of it goes to "
        "the uniform paths that all begin with. So no search is cut short in its first rounds, and no column "
        "is read off a longer run. All take the same menu of sources or scales, the "
        "same subsets of the reward split and the same start, and choose in the end among ten paths on all "
        f"of it, {AGENT} among eleven, which no budget counts. CMA-ES over scales and densities is not here: "
        f"it takes experts alone. *{AGENT} − it*: paired by seed, ± the 95 % interval (Student's t).\n"
    )
    if len(gains):
        text += (
            f"\nOn how many problems {AGENT} is ahead / level / behind, by whether the interval is above "
            f"zero, contains it, or is below:\n\n{markdown(verdicts_table(gains))}"
        )
    for group, own in rows.groupby("group", sort=False):
        scores = own.groupby(["method", "evaluations"], sort=False)["mean"].agg(spread).unstack()
        table = scores.rename_axis("evaluations")
        if len(more := gains[gains["group"] == group]):
            by = more.groupby(["method", "evaluations"], sort=False)["more"]
            gained = by.agg(interval).unstack().rename(index=lambda name: f"{AGENT} − {name}")
            table = concat([table, gained]).rename_axis("evaluations")
        text += f"\n## {group}\n\n{markdown(table)}"
    return text


def budget_points(rows: DataFrame) -> dict[str, DataFrame]:
    """What ``forest_picture`` shows: problem -> a point for each budget and search, as of ``points_of``."""
    gains = budget_gains(rows)
    order = [m for m in dict.fromkeys(rows["method"]) if m != AGENT]
    names = [f"{n}: {name}" for n in sorted(set(rows["evaluations"])) for name in order]
    at = gains["evaluations"].astype(str) + ": " + gains["method"]
    return points_of(gains["more"], gains["group"], at, names, rows["group"])


def budgets_alt(rows: DataFrame) -> str:
    """One sentence on that plot, and one on each panel."""
    return _alt(f"what {AGENT} has more than others at each budget", budget_points(rows))


def show_seconds(rows: DataFrame) -> str:
    """Searches that had the same seconds."""
    columns: dict[str, Any] = {
        "seeds": ("seed", "nunique"),
        "seconds": ("search_seconds", seconds_text),
        "evaluations": ("evaluations", lambda n: f"{n.mean():.0f}"),
        "reward split, %": ("reward_split", spread),
        "test split, %": ("mean", spread),
        f"{AGENT} − it, reward": ("reference − reward_split", interval),
        f"{AGENT} − it, test": ("reference − mean", interval),
    }
    n = span(rows.loc[rows["method"] == AGENT, "evaluations"])
    return (
        f"![{difference_alt(rows, 'method', AGENT)}](seconds.png)\n\n"
        f"{AGENT} had {n} evaluations; every other search had the seconds that it took at the same seed, "
        "in the same process, and finished the batch under way. *Seconds*: of the processor (of the clock on "
        "a GPU), with all fits of layers and without the final choice on the whole reward split, which came "
        "on top for all alike. *Evaluations*: what the seconds were enough for, mean over seeds. Mean ± "
        f"sample standard deviation over seeds. *{AGENT} − it* is paired by seed, ± its 95 % interval.\n\n"
        + markdown(compared(rows, "method", AGENT, columns))
    )


# ----------------------------------------------------------------------------------------- labels

ALL_LABELS = "all labels, 10 % at a time"  # the default search


def labels_setting(reward: str, known: float, data: float) -> str:
    """What a search is called by its reward, the share of labels that is known, and an episode's of these."""
    if reward == "agreement":
        return f"no labels: agreement with the experts, {100 * data:g} % of the inputs at a time"
    share = "all labels" if known == 1 else f"{100 * known:g} % of the labels"
    at_a_time = "all" if data == 1 else f"{100 * data:g} %"
    by = "" if reward == "metric" else f", by {reward}"
    return f"{share}, {at_a_time} at a time{by}"


def with_settings(rows: DataFrame) -> DataFrame:
    """The table ``labels`` with the column ``setting``, see ``labels_setting``."""
    each = zip(rows["reward"], rows["label_fraction"], rows["data_fraction"], strict=True)
    return rows.assign(setting=[labels_setting(*key) for key in each])


def show_labels(rows: DataFrame) -> str:
    """The default search with few labels, and none."""
    rows = with_settings(rows)
    columns = {
        "test split, %": ("mean", spread),
        "difference": ("mean − reference", interval),
        "sees": ("sees", "first"),
        "seeds": ("seed", "nunique"),
    }
    return (
        f"![{difference_alt(rows, 'setting', ALL_LABELS)}](labels.png)\n\n"
        f"{AGENT}, {rows['evaluations'].iloc[0]} episodes. *N % of the labels*: no others of the reward "
        "split are known, to the final choice neither. *N % at a time*: the share of these that scores an "
        "episode; the final choice reads all of them. Episodes and choice go by the metric, or by what the "
        "setting says; with all labels the choice is by the metric after likelihood too. *Agreement*: how "
        "likely the merged model gives the experts' answers. Test split: mean ± sample standard deviation "
        f"over seeds; the difference to *{ALL_LABELS}* is paired by seed, ± its 95 % interval.\n\n"
        + markdown(compared(rows, "setting", ALL_LABELS, columns), left=["sees"])
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


def points_of(
    gains: Series, group: Series, name: Series, names: Sequence[str], groups: Iterable[str]
) -> dict[str, DataFrame]:
    """What ``forest_picture`` shows: group -> a frame with the index ``names`` and the ``mean`` of the gains,
    ``half`` the width of their 95 % interval, and what they ``sees``; NaN where there is none."""
    points = {}
    for panel in dict.fromkeys(groups):
        by_name = gains[group == panel].groupby(name)
        half = {key: t_interval(gain)[1] for key, gain in by_name if len(gain) > 1}
        frame = DataFrame({"sees": "labels"}, index=Index(names))
        points[panel] = frame.assign(mean=by_name.mean(), half=Series(half, dtype=float))
    return points


def difference_points(rows: DataFrame, by: str, reference: str) -> dict[str, DataFrame]:
    """Problem -> a point for each ``by``, as of ``points_of``: its difference on the test split."""
    gains = differences(rows, by, reference)
    names = [name for name in dict.fromkeys(rows[by]) if name != reference]
    points = points_of(gains["gain"], gains["group"], gains[by], names, rows["group"])
    if "sees" in rows:
        sees = rows.groupby(by)["sees"].first()
        points = {group: own.assign(sees=sees.reindex(names)) for group, own in points.items()}
    return points


def difference_alt(rows: DataFrame, by: str, reference: str) -> str:
    """One sentence on that plot, and one on each panel."""
    points = difference_points(rows, by, reference)
    return _alt(f"differences to {reference} on the test split", points)


def _alt(what: str, points: Mapping[str, DataFrame]) -> str:
    text = f"Forest plot: {what}"
    for group, own in points.items():
        said = [f"{name} {interval(Series([mean]))}" for name, mean in own["mean"].dropna().items()]
        text += f". {group}: {', '.join(said) or 'not measured'}"
    return text + "."
