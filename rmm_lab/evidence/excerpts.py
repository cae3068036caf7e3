"""The excerpts of result tables in README.md and docs/, written from the CSV files alone.

An excerpt has a place in a text, between ``<!-- results: NAME -->`` and ``<!-- end -->``; ``fill`` brings it
up to date. Its tables are those of ``pages``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pandas as pd
from pandas import DataFrame

from rmm_lab.errors import InputError
from rmm_lab.evidence.comparisons import AGENT, UNCHANGED, ablation_table, searches_table
from rmm_lab.evidence.fronts import front_table, quality
from rmm_lab.evidence.markdown import markdown, seconds_text, seeds, span
from rmm_lab.evidence.pages import (
    BEST,
    GAIN,
    by_half,
    by_size,
    dar_table,
    methods_table,
    percent,
)
from rmm_lab.evidence.real_excerpts import REAL
from rmm_lab.evidence.rows import kind_of, of_experts, spread, task_scores
from rmm_lab.search.config import BOTH

Read = Callable[[str], DataFrame]  # a table by its file's name

LED = AGENT, BOTH  # the searches that an agent leads
SHORT = ["fine-tuned", "multi-task", BEST, *LED, *map(GAIN.format, LED)]


def groups(read: Read) -> str:
    """What merging loses in each group of experts, and what the searches win back."""
    tables = [
        methods_table(scores).reindex(SHORT).T.assign(seeds=_seeds_of(scores))
        for name in ("vision", "language")
        for scores in by_size(read(name)).values()
    ]
    table = pd.concat(tables).rename_axis("experts").replace({"multi-task": {"": "none ships"}})
    return markdown(table.rename(columns={GAIN.format(name): f"{name}, gain" for name in LED}))


def _seeds_of(scores: DataFrame) -> Any:
    """Seeds of each group, by the first search that an agent leads."""
    return scores.loc[next(name for name in LED if name in scores.index)].count()


def halves(read: Read) -> str:
    """Table I in short."""
    of = by_half(read("halves")).items()
    tables = {size: methods_table(scores).reindex(SHORT).dropna(how="all") for size, scores in of}
    return markdown(pd.concat(tables, names=["models", "method"]))


def searches(read: Read) -> str:
    """The searches of each problem on the test split."""
    rows = read("searches")
    table = searches_table(rows)["test split, %"].unstack(0, sort=False)
    table.loc["seeds"] = [seeds(own, "method") for _, own in rows.groupby("group", sort=False)]
    return markdown(table.rename_axis("test split, %"))


def agent(read: Read) -> str:
    """The ablation's differences on the reward split; its first row is the unchanged search's score there."""
    table = ablation_table(read("agent"))
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
    by_share = rows.groupby(rows["data_fraction"].map(percent))
    table.loc["seeds"] = {s: seeds(own, "preset", "reward", "dar") for s, own in by_share}
    return markdown(table.rename_axis("test split, %"))


def fresh(read: Read) -> str:
    """The demo's pair on seeds that chose nothing."""
    rows = read("fresh/vision").query("method == @BOTH").set_index("seed")
    scores = rows[["reward_split", "mean"]].set_axis(["reward split, %", "test split, %"], axis=1)
    table = scores.map("{:.1f}".format)
    table.loc["mean"] = scores.agg(spread)
    return markdown(table)


def _one_seed(rows: DataFrame) -> str:
    """Every method of one search, as its own table shows it: tasks, mean, setting."""
    table = task_scores(rows).assign(mean=rows["mean"])
    table = table.assign(**{"% of experts": of_experts(rows)}).map("{:.1f}".format)
    table = table.assign(sees=rows["sees"], evaluations=rows["evaluations"])
    table["seconds"] = [seconds_text(rows.loc[[i], "seconds"]) for i in rows.index]
    table = table.assign(setting=rows["setting"]).set_axis(rows["method"].rename("method"))
    return markdown(table, left=["sees", "setting"])


IN_README = (
    *("weight average", "TIES, tuned", "weight per expert, tuned", "TSV", "WUDI"),
    "least squares",
)


def demo(read: Read) -> str:
    """Some of the methods on the demo's pair, seed 1: README.md has no room for all."""
    rows = read("demo/vision").query("seed == 1")
    others = kind_of(rows["method"]).isin(("bound", "expert", "search"))
    return _one_seed(rows[others | rows["method"].isin(IN_README)])


def language(read: Read) -> str:
    """All methods on the T5s, seed 1."""
    groups = read("language").query("seed == 1").groupby("group", sort=False)
    return "\n".join(f"`--experts {name}`:\n\n{_one_seed(own)}" for name, own in groups)


def fronts(read: Read) -> str:
    """The hypervolumes of each group of experts, and of what evaluations and seeds."""
    rows = quality(read("fronts"))
    text = ""
    for name, own in rows.groupby("group", sort=False):
        n = span(own.loc[own["evaluations"] > 0, "evaluations"])
        shown = front_table(own)[list(SHOWN)]
        text += f"{name}, {n} evaluations, seeds: {seeds(own, 'method')}.\n\n{markdown(shown)}\n"
    return text.rstrip("\n") + "\n"


SHOWN = ("hypervolume, test", "reward", "promised", "times the averages", "points", "seconds")
_ALL = (demo, language, groups, halves, searches, agent, preset, dar, fresh, fronts, *REAL)
EXCERPTS: dict[str, Callable[[Read], str]] = {f.__name__: f for f in _ALL}
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
