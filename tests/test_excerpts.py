"""The tables in README.md and docs/: right by hand on made-up results, up to date with those that ship."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from rmm_lab.errors import InputError
from rmm_lab.evidence import excerpts, tables

ROOT = Path(__file__).resolve().parent.parent


def read(name: str) -> pd.DataFrame:
    """Two seeds of two settings or methods, means 70 and 72 against 71 and 75 (paired: +2 on average)."""
    first, other = (
        ("agent + CMA-ES", "other") if name == "agent" else ("weight average", "agent + CMA-ES")
    )
    values = {"fine-tuned": (99, 99), "multi-task": (98, 98), first: (70, 72), other: (71, 75)}
    return pd.DataFrame(
        {"group": "g", "size": "ViT", "method": key, "setting": key, "seed": seed, "mean": value}
        | {"reward_split": value + 1, "seconds": 1.0, "evaluations": 9}
        for key, own in values.items()
        for seed, value in enumerate(own)
    )


def cells(text: str) -> list[list[str]]:
    lines = text.strip().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_means_spreads_and_paired_differences_by_hand():
    # mean 71, sample deviation sqrt(2); differences 1 and 3: 2 +- 12.706 * sqrt(2) / sqrt(2)
    row = cells(excerpts.groups(read))[2]
    # Nothing of RMM (agent), which was not measured.
    assert row == ["g", "99.0", "98.0", "71.0 ± 1.4", "", "73.0 ± 2.8", "", "+2.0 ± 12.7", "2"]
    table = cells(excerpts.searches(read))
    assert table[0] == ["test split, %", "g"]
    assert table[-2:] == [["agent + CMA-ES", "73.0 ± 2.8"], ["seeds", "2"]]
    table = {row[0]: row[1] for row in cells(excerpts.agent(read))}
    assert table["agent + CMA-ES"] == "72.0 ± 1.4"  # its score on the reward split
    assert table["other"] == "+2.0 ± 12.7"


def test_a_text_keeps_all_but_its_excerpts():
    text = "a\n<!-- results: agent -->\nold 1\n<!-- end -->\nb 2.5\n<!-- end -->\n"
    filled = excerpts.fill(text, read)
    assert filled.startswith("a\n<!-- results: agent -->\n\n| setting")
    assert filled.endswith("|\n\n<!-- end -->\nb 2.5\n<!-- end -->\n")
    assert "old" not in filled
    assert excerpts.fill(filled, read) == filled


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- results: cats -->\n<!-- end -->", "excerpt 'cats': expected one of demo"),
        # The first one's end is missing, and text would be lost.
        (
            "<!-- results: agent -->\n text\n<!-- results: dar -->\n<!-- end -->",
            r"around each, found 2 beginnings",
        ),
        ("<!-- results: agent-->\n<!-- end -->", r"around each, found 1 beginnings and 0 whole"),
    ],
)
def test_an_excerpt_that_is_not_whole_loses_no_prose(text, message):
    with pytest.raises(InputError, match=message):
        excerpts.fill(text, tables.read)


@pytest.mark.parametrize("name", ["README.md", "docs/evidence.md", "docs/fronts.md"])
def test_the_excerpts_that_ship_are_up_to_date(name):
    text = (ROOT / name).read_text("utf-8")
    assert "<!-- results:" in text
    assert excerpts.fill(text, tables.read) == text


def test_other_folders_leave_the_docs_alone(tmp_path):
    assert not list(tables.write_excerpts(tmp_path))


def test_every_measured_number_in_the_prose_is_in_the_results():
    """A number with decimals before % or points, or with ±, is in a page or an excerpt."""
    text = (ROOT / "docs/evidence.md").read_text("utf-8")
    prose = re.sub(r"<!-- results: .*?<!-- end -->|`[^`]*`", "", text, flags=re.S)
    claimed = set(re.findall(r"(?<![\d.])(\d+\.\d{1,2})(?= %| points| ±| times)", prose))
    claimed |= set(re.findall(r"± (\d+\.\d{1,2})", prose))
    known = text.replace(prose, "") + (ROOT / "docs/performance.md").read_text("utf-8")
    known += "".join(f.read_text("utf-8") for f in (ROOT / "results").glob("**/*.md"))
    known += "".join(excerpt(tables.read) for excerpt in excerpts.EXCERPTS.values())
    assert claimed
    assert claimed <= set(re.findall(r"(?<![\d.])\d+\.\d{1,2}(?![\d.])", known))
