"""Result tables in Markdown: the pages of results/, ``PAGES[name].text(*tables, paper=...)``.

They are written from the CSV files alone. Means are over seeds, ± is the sample standard deviation,
differences are paired by seed with a 95 % interval.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pandas as pd
from pandas import DataFrame

from rmm_lab.evidence.comparisons import (
    AGENT,
    show_ablation,
    show_budgets,
    show_labels,
    show_searches,
    show_seconds,
)
from rmm_lab.evidence.forest import forest, with_best_expert
from rmm_lab.evidence.fronts import show_fronts
from rmm_lab.evidence.markdown import markdown, seconds_text, seeds, span
from rmm_lab.evidence.real_pages import REAL_PAGES
from rmm_lab.evidence.rows import (
    KINDS,
    METHODS,
    RULES,
    STOCHASTIC,
    interval,
    kind_of,
    of_experts,
    spread,
    task_scores,
)
from rmm_lab.search.config import BOTH, configure

PAIRS = (
    "digits+textures",
    "CUB+Dogs",
    "CIFAR10+GTSRB",
)  # Table II's, of the kit, the paper, and real
BEST, GAIN = "best uniform merge", "{} − best uniform merge"

# ----------------------------------------------------------------------------- tables of methods
# Scores of methods are a frame with the index (method, seed) and a column for each group, or each task.


def _sections(
    rows: DataFrame, by: str, scores: Callable[[DataFrame], DataFrame]
) -> dict[str, DataFrame]:
    """Each value of ``by`` -> ``scores`` of its rows by (method, seed), in the order of METHODS."""
    rows = with_best_expert(rows)
    groups = rows.set_index(["method", "seed"]).groupby(by, sort=False)
    order = METHODS.index.intersection(rows["method"])
    return {str(name): scores(own).reindex(order, level="method") for name, own in groups}


def by_size(rows: DataFrame) -> dict[str, DataFrame]:
    """Size of the models -> scores of each group."""
    return _sections(
        rows, "size", lambda own: own.set_index("group", append=True)["mean"].unstack(sort=False)
    )


def by_half(rows: DataFrame) -> dict[str, DataFrame]:
    """Table I: size -> scores of each set's halves, and the average where a method has them all."""
    of = by_size(rows)
    return {s: scores.assign(Average=scores.mean(axis=1, skipna=False)) for s, scores in of.items()}


def pair_of(rows: DataFrame) -> DataFrame:
    """Table II's rows: those of one of ``PAIRS``, or of the only group."""
    return rows[rows["group"].isin(PAIRS)] if rows["group"].nunique() > 1 else rows


def by_task(rows: DataFrame) -> dict[str, DataFrame]:
    """The only group -> scores of its tasks, and their mean."""
    return _sections(rows, "group", lambda own: task_scores(own).assign(Average=own["mean"]))


COSTS = {
    "% of experts": ("share", lambda share: spread(share, plus_minus=False)),
    "sees": ("sees", "first"),
    "evaluations": ("evaluations", span),
    "seconds": ("seconds", seconds_text),
}


def costs_table(rows: DataFrame) -> DataFrame:
    """Each method's share of the experts' scores and what it took, as text: means over groups and seeds."""
    rows = with_best_expert(rows)
    return rows.assign(share=of_experts(rows)).groupby("method", sort=False).agg(**COSTS)


def methods_table(scores: DataFrame, compared: str = "") -> DataFrame:
    """A row for each method, then the best uniform merge of each seed, and what each search gains over it.

    The best merge is that on the test split, the hardest to beat. ``compared``: the only column with a gain,
    if it is not all. Where they are tasks of one merged model, only the average has one: a merge may be good
    at one task because it lost the other.
    """
    lines = {
        method: own.agg(spread, plus_minus=method in STOCHASTIC)
        for method, own in scores.groupby("method", sort=False)
    }
    best = scores[scores.index.isin(RULES, level="method")].groupby("seed").max()
    lines[BEST] = best.agg(spread)
    for method in [name for name in KINDS["search"] if name in lines]:
        gain = (scores.loc[method] - best).agg(interval)
        lines[GAIN.format(method)] = gain.where(gain.index.str.contains(compared), "")
    return DataFrame(lines).T.rename_axis("method")


def show_methods(
    rows: DataFrame,
    picture: str,
    sections: Callable[[DataFrame], dict[str, DataFrame]],
    by: str = "size",
    compared: str = "",
) -> str:
    """Tables I to III and other groups, a section for each value of ``by``; empty without such rows.

    ``picture``: the file of their forest plot.
    """
    of = sections(rows)
    searches = rows[kind_of(rows["method"]) == "search"]
    if not of or searches.empty:
        return ""
    run = configure(**json.loads(searches["config"].iloc[0])).run
    n = rows.loc[rows["method"].isin(RULES), "method"].nunique()
    text = (
        f"![{forest(rows).alt}]({picture})\n\n"
        f"Test split, %: mean over seeds ({seeds(searches, 'group', 'size', 'method')}), ± sample standard "
        f"deviation where a method draws. *{BEST.capitalize()}*: the best *on the test split* of the {n} "
        "merges that search nothing and follow no gradient. Last: the gain over it, paired by seed, ± its "
        "95 % interval. *% of experts*: the mean over tasks of the score as a share of the own expert's. "
        "*Sees*: the most that building and tuning looked at. *Evaluations*: merged models that were scored "
        "on the reward split, on all of it for a uniform merge, on "
        f"{100 * run.data_fraction:g} % of it at a time for a search, which scores at most "
        f"{run.finalists + 1} paths on all of it to choose one. *Seconds*: with tuning, where they were "
        "measured, beside other work.\n"
    )
    for heading, scores in of.items():
        costs = costs_table(rows[rows[by] == heading])
        table = methods_table(scores, compared).join(costs).rename_axis("method")
        text += f"\n## {heading}\n\n{markdown(table, left=['sees'])}"
    return text


# ------------------------------------------------------------------------------------- Table IV

# Preset, reward, with DAR or not -> what the tables call it.
SETTINGS = {
    ("paper", "metric", True): "paper's preset, with DAR",
    ("paper", "metric", False): "paper's preset, without DAR",
    ("weights", "metric", False): BOTH,
    ("weights", "likelihood", False): f"{BOTH}, by likelihood",
    ("default", "metric", False): AGENT,
    ("default", "likelihood", False): f"{AGENT}, by likelihood",
}
WITH_DAR, WITHOUT_DAR, WEIGHTS, LIKELIHOOD, DEFAULT, BY_LIKELIHOOD = SETTINGS.values()
FULL = "100 %"
# Differences of averages: name, setting, and the setting it is compared with, at its own share or at 100 %.
DAR_GAINS = (
    ("with − without DAR", WITH_DAR, WITHOUT_DAR, False),
    ("paper's preset − itself at 100 %", WITH_DAR, WITH_DAR, True),
    (f"{BOTH} − itself at 100 %", WEIGHTS, WEIGHTS, True),
    (f"by likelihood − {BOTH} at 100 %", LIKELIHOOD, WEIGHTS, True),
    (f"{AGENT} − itself at 100 %", DEFAULT, DEFAULT, True),
    (f"by likelihood − {AGENT} at 100 %", BY_LIKELIHOOD, DEFAULT, True),
)


def percent(share: float) -> str:
    return f"{100 * share:g} %"


def dar_scores(rows: DataFrame) -> DataFrame:
    """Table IV: index (metric, setting, seed), a column for each share of the data, the largest first.

    A metric is a task, or Average. With all data DAR changes nothing: its search stands for both.
    """
    alike = rows[(rows["preset"] == "paper") & (rows["data_fraction"] == 1)]
    rows = pd.concat([rows, alike.assign(dar=0.0)], ignore_index=True)
    keys = zip(rows["preset"], rows["reward"], rows["dar"] > 0, strict=True)
    rows = rows.assign(setting=[SETTINGS[key] for key in keys])
    metrics = task_scores(rows).assign(Average=rows["mean"])
    at = [rows[name] for name in ("setting", "seed", "data_fraction")]
    out = metrics.set_index(at).rename_axis(columns="metric").stack().unstack("data_fraction")
    out = out.sort_index(axis=1, ascending=False).rename(columns=percent)
    out = out.reorder_levels(["metric", "setting", "seed"]).sort_index()
    settings = [s for s in SETTINGS.values() if s in set(rows["setting"])]
    return out.reindex(list(metrics), level="metric").reindex(settings, level="setting")


def dar_table(rows: DataFrame) -> DataFrame:
    """Means of each metric and setting, then the averages' differences at the shares below 100 %, as text."""
    scores = dar_scores(rows)
    table = scores.groupby(["metric", "setting"], sort=False).agg(spread)
    average = scores.loc["Average"]
    for name, *settings, at_full in DAR_GAINS:
        one, other = (average.query("setting == @s").droplevel("setting") for s in settings)
        gain = one.sub(other.get(FULL, float("nan")), axis=0) if at_full else one - other
        gain = gain.agg(interval).where(gain.columns != FULL, "")
        if gain.any():
            table.loc[("Average", name), :] = gain
    return table


def show_dar(rows: DataFrame) -> str:
    """Table IV."""
    table = dar_table(rows)
    seconds = rows[rows["preset"] == "paper"].groupby("data_fraction")["seconds"].mean()
    seconds = seconds.rename(percent)
    table.loc[("seconds", "paper's preset"), :] = seconds.map("{:.0f}".format)
    if FULL in seconds:
        faster = (seconds[FULL] / seconds).map("{:.1f}".format)
        table.loc[("times faster", "paper's preset"), :] = faster
    n_seeds = seeds(rows, "preset", "reward", "data_fraction", "dar")
    return (
        f"Test split, %: mean ± sample standard deviation over seeds ({n_seeds}), "
        f"{rows['evaluations'].iloc[0]} episodes. At {FULL} DAR has no effect, and one search stands for "
        "both rows of the paper's preset. *By likelihood*: an episode is paid by how likely the right "
        "answers are; the final choice is by the metric as always. Differences are paired by seed, ± the "
        f"95 % interval. Seconds are of searches that ran beside other work.\n\n{markdown(table)}"
    )


# ----------------------------------------------------------------------------------------- pages


@dataclass(frozen=True)
class Page:
    """A page of results/. ``files``: the tables it is written from; ``number``: of the paper's table."""

    files: tuple[str, ...]
    title: str
    show: Callable[..., str]
    number: str = ""

    def text(self, *tables: DataFrame, paper: DataFrame) -> str:
        """The page; empty where the rows are not this table's."""
        papers = papers_tables(paper[paper["table"] == self.number])
        return f"# {self.title}\n\n{body}{papers}" if (body := self.show(*tables)) else ""


def papers_tables(rows: DataFrame) -> str:
    """The paper's own figures, a table for each of its models. Table IV's columns are "METRIC at SHARE"."""
    text = "\n## Paper (Han et al. 2025), other models and data\n" if len(rows) else ""
    for model, own in rows.groupby("model", sort=False):
        parts = own["column"].str.rpartition(" at ")
        digits = parts[0].eq("times faster").map({True: 1, False: 2})
        value = [f"{v:.{n}f}" for v, n in zip(own["value"], digits, strict=True)]
        own = own.assign(metric=parts[0], column=parts[2], value=value)
        index = ["metric", "method"] if own["metric"].any() else ["method"]
        table = own.set_index([*index, "column"])["value"].unstack(sort=False)
        text += f"\n{model}:\n\n{markdown(table)}"
    return text


_SEARCHES = ("searches", "searches-curve")


def _pair(rows: DataFrame) -> str:
    return show_methods(pair_of(rows), "table-II.png", by_task, "group", "Average")


def _by_size(picture: str) -> Callable[[DataFrame], str]:
    return partial(show_methods, picture=picture, sections=by_size)


_HALVES = partial(show_methods, picture="table-I.png", sections=by_half)
PAGES = {
    "table-I": Page(("halves",), "Table I: halves of each set, merged in pairs", _HALVES, "I"),
    "table-II": Page(("vision",), "Table II: two sets that differ more", _pair, "II"),
    "groups": Page(("vision",), "Groups of sets: Table II's methods", _by_size("groups.png")),
    "table-III": Page(("language",), "Table III: language tasks", _by_size("table-III.png"), "III"),
    "table-IV": Page(("dar",), "Table IV: share of the data, DAR or not", show_dar, "IV"),
    "searches": Page(_SEARCHES, f"{BOTH} beside other searches", show_searches),
    "menu": Page(
        ("menu", "menu-curve"),
        f"{AGENT} beside other searches on the same menu",
        partial(show_searches, reference=AGENT),
    ),
    "agent": Page(("agent",), f"{BOTH}, one choice changed", show_ablation),
    "default": Page(
        ("default",),
        f"{AGENT}, one choice changed",
        partial(show_ablation, reference=AGENT, picture="default.png"),
    ),
    "budgets": Page(("budgets",), f"{AGENT} beside other searches by budget", show_budgets),
    "seconds": Page(("seconds",), f"{AGENT} beside other searches at equal seconds", show_seconds),
    "fronts": Page(("fronts",), "Searches for many answers: their fronts", show_fronts),
    "labels": Page(("labels",), f"{AGENT}: few labels, and none", show_labels),
    **{name: Page((name,), title, show) for name, (title, show) in REAL_PAGES.items()},
}
