"""Tables and numbers of the pages of results/ as text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pandas import DataFrame, Series


def markdown(table: DataFrame, left: Sequence[str] = ()) -> str:
    """A table in Markdown: the index and the columns ``left`` aligned left, the others right."""
    n = table.index.nlevels
    align = ["left"] * n + ["left" if c in left else "right" for c in table.columns]
    body = table.fillna("").astype(str).reset_index()
    return body.to_markdown(index=False, disable_numparse=True, colalign=align) + "\n"


def seeds(rows: DataFrame, *key: str) -> str:
    """The number of seeds of the rows with equal ``key``: ``5``, or ``3 to 5`` where it differs."""
    return span(rows.groupby(list(key))["seed"].nunique())


def span(numbers: Series) -> str:
    """``5``, or ``3 to 5`` where they differ."""
    return " to ".join(dict.fromkeys([str(numbers.min()), str(numbers.max())]))


def seconds_text(seconds: Series) -> str:
    """The mean; empty where none was measured."""
    mean = seconds.mean()
    return "" if np.isnan(mean) else f"{mean:.0f}" if mean >= 9.95 else f"{mean:.1f}"
