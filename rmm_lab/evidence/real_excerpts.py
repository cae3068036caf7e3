"""Excerpts of the tables of real models, with their headings: a table that was not measured is not shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pandas import DataFrame

from rmm_lab.errors import InputError
from rmm_lab.evidence.markdown import markdown
from rmm_lab.evidence.pages import by_half, dar_table, methods_table, pair_of
from rmm_lab.evidence.real_pages import (
    curve_table,
    inputs_table,
    recovered_table,
    speed_table,
    stranger_table,
    subset_table,
    texts_table,
    unseen_table,
)

BESIDE = ["fine-tuned", "weight average", "WUDI", "least squares", "RMM (agent)"]
Read = Callable[[str], DataFrame]  # a table by its file's name


def _shown(
    read: Read,
    name: str,
    heading: str,
    table: Callable[[DataFrame], DataFrame],
    experts: int | None = None,
) -> str:
    """A heading and a table, of groups of so many experts; empty where nothing was measured."""
    try:
        rows = read(f"real/{name}")
    except InputError:
        return ""
    if experts is not None:
        rows = rows[rows["group"].str.count(r"\+") == experts - 1]
    if rows.empty:
        return ""
    return f"**{heading}**\n\n{markdown(table(rows))}"


def real_pair(read: Read) -> str:
    """Table II with what each method wins back of what averaging loses."""
    return _shown(read, "vision", "CIFAR-10 and GTSRB", recovered_table, 2)


def real_beside(read: Read) -> str:
    """The demo's pair of small models and the real one, side by side."""
    out: dict[str, Any] = {}
    try:
        for name, file in (("small", "vision"), ("real", "real/vision")):
            table = recovered_table(pair_of(read(file))).reindex(BESIDE)
            out |= {name: table["test split, %"], f"{name}, recovered": table["recovered, %"]}
    except InputError:
        return ""
    return markdown(DataFrame(out).assign(sees=table["sees"]))


def real_halves(read: Read) -> str:
    """Table I."""

    def table(rows: DataFrame) -> DataFrame:
        [scores] = list(by_half(rows).values())[:1]
        return methods_table(scores)

    return _shown(read, "halves", "Halves of CIFAR-10 and of GTSRB", table)


def real_four(read: Read) -> str:
    """The group of four."""
    return _shown(read, "vision", "Four experts", recovered_table, 4)


def real_dar(read: Read) -> str:
    """Table IV's averages."""
    return _shown(read, "dar", "Shares of the data", lambda rows: dar_table(rows).loc["Average"])


def real_inputs(read: Read) -> str:
    return _shown(read, "inputs", "By how many inputs closed forms look at", inputs_table)


def real_curve(read: Read) -> str:
    return _shown(read, "curve", "By distance from the base", curve_table)


def real_stranger(read: Read) -> str:
    return _shown(read, "stranger", "With an expert that has no task", stranger_table)


def real_subsets(read: Read) -> str:
    return _shown(read, "subsets", "Sets of experts", lambda rows: subset_table(rows).loc[["all"]])


def real_unseen(read: Read) -> str:
    return _shown(read, "unseen", "Sets that no expert saw", unseen_table)


def real_texts(read: Read) -> str:
    return _shown(read, "texts", "A language model", texts_table)


def real_speed(read: Read) -> str:
    return _shown(read, "speed", "Seconds and memory", speed_table)


REAL = (
    *(real_pair, real_inputs, real_halves, real_four, real_dar, real_curve),
    *(real_beside, real_stranger, real_subsets, real_unseen, real_texts, real_speed),
)
