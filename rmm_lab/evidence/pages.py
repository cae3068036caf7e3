"""Result tables in Markdown: the pages of results/, and the excerpts in README.md and docs/.

Both are written from the CSV files alone. ``PAGES[name].text(*tables, paper=...)`` is a page. An excerpt has
a place in a text, between ``<!-- results: NAME -->`` and ``<!-- end -->``; ``fill`` brings it up to date.
Means are over seeds, ± is the sample standard deviation, differences are paired by seed with a 95 % interval.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
from pandas import DataFrame

from rmm_lab.errors import InputError
from rmm_lab.evidence.rows import (
    BEST_EXPERT,
    KINDS,
    METHODS,
    STOCHASTIC,
    interval,
    kind_of,
    spread,
    task_scores,
)
from rmm_lab.search import uniform
from rmm_lab.search.config import configure

Read = Callable[[str], DataFrame]  # a table by its file's name
PAIRS = ("digits+textures", "CUB+Dogs")  # Table II's, at the kit's scale and at the paper's
BEST, GAIN = "best uniform merge", "{} − best uniform merge"


def markdown(table: DataFrame, left: Sequence[str] = ()) -> str:
    """A table in Markdown: the index and the columns ``left`` aligned left, the others right."""
    n = table.index.nlevels
    align = ["left"] * n + ["left" if c in left else "right" for c in table.columns]
    body = table.fillna("").astype(str).reset_index()
    return body.to_markdown(index=False, disable_numparse=True, colalign=align) + "\n"


def _seeds(rows: DataFrame, *key: str) -> str:
    """The number of seeds of the rows with equal ``key``: ``5``, or ``3 to 5`` where it differs."""
    counts = rows.groupby(list(key))["seed"].nunique()
    return " to ".join(dict.fromkeys([str(counts.min()), str(counts.max())]))


# ----------------------------------------------------------------------------- tables of methods
# Scores of methods are a frame with the index (method, seed) and a column for each group, or each task.


def _sections(
    rows: DataFrame, by: str, scores: Callable[[DataFrame], DataFrame]
) -> dict[str, DataFrame]:
    """Each value of ``by`` -> ``scores`` of its rows by (method, seed), in the order of METHODS.

    Of the experts, each used for all tasks, the one with the best mean on the test split counts: a bound,
    no fair opponent.
    """
    alone = rows[kind_of(rows["method"]) == "expert"]
    best = alone.loc[alone.groupby(["group", "size", "seed"])["mean"].idxmax()]
    rows = pd.concat([rows.drop(alone.index), best.assign(method=BEST_EXPERT)])
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
    best = scores[scores.index.isin(KINDS["uniform"], level="method")].groupby("seed").max()
    lines[BEST] = best.agg(spread)
    for method in [name for name in KINDS["search"] if name in lines]:
        gain = (scores.loc[method] - best).agg(interval)
        lines[GAIN.format(method)] = gain.where(gain.index.str.contains(compared), "")
    return DataFrame(lines).T.rename_axis("method")


def show_methods(
    rows: DataFrame, sections: Callable[[DataFrame], dict[str, DataFrame]], compared: str = ""
) -> str:
    """Tables I to III and other groups; empty where there are no such rows."""
    of = sections(rows)
    searches = rows[kind_of(rows["method"]) == "search"]
    if not of or searches.empty:
        return ""
    grids = {name: len(grid) for name, grid in uniform.GRIDS.items() if len(grid) > 1}
    run = configure(**json.loads(searches["config"].iloc[0])).run
    text = (
        f"Test split, %: mean over seeds ({_seeds(searches, 'group', 'size', 'method')}), ± sample standard "
        "deviation where a method draws. Last: the gain over the best of the seven uniform merges *on the "
        "test split*, paired by seed, ± its 95 % interval. Tuned: the best on the reward split of "
        f"{', '.join(f'{n} settings of {name}' for name, n in grids.items())}, "
        f"{sum(grids.values())} evaluations of that whole split. RMM: {searches['episodes'].iloc[0]} "
        f"episodes, each on {100 * run.data_fraction:g} % of the reward split; at most {run.finalists + 1} "
        "paths are scored on all of it to choose one.\n"
    )
    for heading, scores in of.items():
        text += f"\n## {heading}\n\n{markdown(methods_table(scores, compared))}"
    return text


# -------------------------------------------------------------- Table IV, searches, the ablation

# Preset, reward, with DAR or not -> what the tables call it.
SETTINGS = {
    ("paper", "metric", True): "paper's preset, with DAR",
    ("paper", "metric", False): "paper's preset, without DAR",
    ("default", "metric", False): "default preset",
    ("default", "likelihood", False): "default preset, by likelihood",
}
WITH_DAR, WITHOUT_DAR, DEFAULT, LIKELIHOOD = SETTINGS.values()
FULL = "100 %"
# Differences of averages: name, setting, and the setting it is compared with, at its own share or at 100 %.
DAR_GAINS = (
    ("with − without DAR", WITH_DAR, WITHOUT_DAR, False),
    ("paper's preset − itself at 100 %", WITH_DAR, WITH_DAR, True),
    ("default preset − itself at 100 %", DEFAULT, DEFAULT, True),
    ("by likelihood − default preset at 100 %", LIKELIHOOD, DEFAULT, True),
)


def _percent(share: float) -> str:
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
    out = out.sort_index(axis=1, ascending=False).rename(columns=_percent)
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
    seconds = seconds.rename(_percent)
    table.loc[("seconds", "paper's preset"), :] = seconds.map("{:.0f}".format)
    if FULL in seconds:
        faster = (seconds[FULL] / seconds).map("{:.1f}".format)
        table.loc[("times faster", "paper's preset"), :] = faster
    seeds = _seeds(rows, "preset", "reward", "data_fraction", "dar")
    return (
        f"Test split, %: mean ± sample standard deviation over seeds ({seeds}), {rows['episodes'].iloc[0]} "
        f"episodes. At {FULL} DAR has no effect, and one search stands for both rows of the paper's preset. "
        "*By likelihood*: an episode is paid by how likely the right answers are; the final choice is by the "
        "metric as always. Differences are paired by seed, ± the 95 % interval. Seconds are of searches "
        f"that ran beside other work.\n\n{markdown(table)}"
    )


UNCHANGED = "default preset"  # what the ablation's differences are to
SEARCHES = {
    "seeds": ("seed", "nunique"),
    "reward split, %": ("reward_split", spread),
    "test split, %": ("mean", spread),
    "RMM − it, reward": ("reference − reward_split", interval),
    "RMM − it, test": ("reference − mean", interval),
    "seconds": ("seconds", lambda seconds: f"{seconds.mean():.0f}"),
}
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


searches_table = partial(compared, by="method", reference="RMM", columns=SEARCHES)
agent_table = partial(compared, by="setting", reference=UNCHANGED, columns=ABLATION)


def show_searches(rows: DataFrame, curve: DataFrame) -> str:
    """All searches of each problem, the best on the reward split first."""
    best = rows.groupby(["group", "method"])["reward_split"].mean()
    names = list(rows["group"].unique())
    order = sorted(best.index, key=lambda at: (names.index(at[0]), -best[at]))
    return (
        f"All had {rows['episodes'].iloc[0]} evaluations on the same subsets of the reward split. Each chose "
        "in the end among ten paths on all of it: those with the best scores, and where scales evolved, "
        "mostly the means that CMA-ES arrived at; RMM had its agent's greedy path besides. Mean ± sample "
        "standard deviation over seeds, best first on the reward split. *RMM − it* is paired by seed, ± its "
        "95 % interval. Seconds are of searches that ran beside other work.\n\n"
        + markdown(searches_table(rows).loc[order])
    )


def show_agent(rows: DataFrame) -> str:
    """The default preset and one choice changed."""
    return (
        f"Mean ± sample standard deviation over seeds, {rows['episodes'].iloc[0]} episodes. The difference "
        "is on the reward split, which also chose; it is paired by seed, ± its 95 % interval.\n\n"
        + markdown(agent_table(rows))
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


_HALVES = partial(show_methods, sections=by_half)
_GROUPS = partial(show_methods, sections=by_size)
_SEARCHES = ("searches", "searches-curve")


def _pair(rows: DataFrame) -> str:
    return show_methods(pair_of(rows), by_task, "Average")


PAGES = {
    "table-I": Page(("halves",), "Table I: halves of each set, merged in pairs", _HALVES, "I"),
    "table-II": Page(("vision",), "Table II: two sets that differ more", _pair, "II"),
    "groups": Page(("vision",), "Groups of sets: Table II's methods", _GROUPS),
    "table-III": Page(("language",), "Table III: language tasks", _GROUPS, "III"),
    "table-IV": Page(("dar",), "Table IV: share of the data, DAR or not", show_dar, "IV"),
    "searches": Page(_SEARCHES, "RMM beside other searches", show_searches),
    "agent": Page(("agent",), "The default preset, one choice changed", show_agent),
}


# -------------------------------------------------------------------------------------- excerpts


SHORT = ["fine-tuned", "multi-task", BEST, "RMM", GAIN.format("RMM")]


def groups(read: Read) -> str:
    """What merging loses in each group of experts, and what RMM wins back."""
    tables = [
        methods_table(scores).loc[SHORT].T.assign(seeds=scores.loc["RMM"].count())
        for name in ("vision", "language")
        for scores in by_size(read(name)).values()
    ]
    table = pd.concat(tables).rename_axis("experts").replace({"multi-task": {"": "none ships"}})
    return markdown(table.rename(columns={SHORT[-1]: "gain"}))


def halves(read: Read) -> str:
    """Table I in short."""
    of = by_half(read("halves")).items()
    tables = {size: methods_table(scores).loc[SHORT] for size, scores in of}
    return markdown(pd.concat(tables, names=["models", "method"]))


def searches(read: Read) -> str:
    """The searches of each problem on the test split."""
    rows = read("searches")
    table = searches_table(rows)["test split, %"].unstack(0, sort=False)
    table.loc["seeds"] = [_seeds(own, "method") for _, own in rows.groupby("group", sort=False)]
    return markdown(table.rename_axis("test split, %"))


def agent(read: Read) -> str:
    """The ablation's differences on the reward split; its first row is the default preset's score there."""
    table = agent_table(read("agent"))
    first = table.index.get_level_values("setting") == UNCHANGED
    own = table["difference"].mask(first, table["reward split, %"])
    return markdown(own.unstack(0, sort=False))


def preset(read: Read) -> str:
    """The preset ``agent`` with one choice put back to the paper's."""
    groups = read("preset").groupby("setting", sort=False)[["reward_split", "test"]]
    return markdown(groups.agg(spread).set_axis(["reward split, %", "test split, %"], axis=1))


def dar(read: Read) -> str:
    """Table IV's averages, and what a smaller share of the data costs."""
    rows = read("dar")
    table = dar_table(rows).loc["Average"]
    by_share = rows.groupby(rows["data_fraction"].map(_percent))
    table.loc["seeds"] = {s: _seeds(own, "preset", "reward", "dar") for s, own in by_share}
    return markdown(table.rename_axis("test split, %"))


def fresh(read: Read) -> str:
    """The demo's pair on seeds that chose nothing."""
    rows = read("fresh/vision").query("method == 'RMM'").set_index("seed")
    scores = rows[["reward_split", "mean"]].set_axis(["reward split, %", "test split, %"], axis=1)
    table = scores.map("{:.1f}".format)
    table.loc["mean"] = scores.agg(spread)
    return markdown(table)


def _one_seed(rows: DataFrame) -> str:
    """Every method of one search, as its own table shows it: tasks, mean, setting."""
    table = task_scores(rows).assign(mean=rows["mean"]).map("{:.1f}".format)
    table = table.assign(setting=rows["setting"]).set_axis(rows["method"].rename("method"))
    return markdown(table, left=["setting"])


def demo(read: Read) -> str:
    """All methods on the demo's pair, seed 1."""
    return _one_seed(read("demo/vision").query("seed == 1"))


def language(read: Read) -> str:
    """All methods on the T5s, seed 1."""
    groups = read("language").query("seed == 1").groupby("group", sort=False)
    return "\n".join(f"`--experts {name}`:\n\n{_one_seed(own)}" for name, own in groups)


EXCERPTS: dict[str, Callable[[Read], str]] = {
    f.__name__: f for f in (demo, language, groups, halves, searches, agent, preset, dar, fresh)
}
_START = "<!-- results:"
_BLOCK = re.compile(rf"({_START} ([^ ]+) -->\n)(?:(?!{_START}).)*?(<!-- end -->)", re.DOTALL)


def fill(text: str, read: Read) -> str:
    """A text with its excerpts brought up to date."""

    def write(match: re.Match[str]) -> str:
        if match[2] not in EXCERPTS:
            raise InputError(
                f"excerpt {match[2]!r}: expected one of {', '.join(EXCERPTS)}; correct the comment"
            )
        return f"{match[1]}\n{EXCERPTS[match[2]](read)}\n{match[3]}"

    new, n = _BLOCK.subn(write, text)
    if n != text.count(_START):
        raise InputError(
            f"excerpts: expected {_START} NAME --> and <!-- end --> around each, found "
            f"{text.count(_START)} beginnings and {n} whole ones; correct the comments"
        )
    return new
