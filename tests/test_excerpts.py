"""The tables in the README and docs: right by hand on made-up results, up to date with those that ship."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rmm_lab.errors import InputError
from rmm_lab.evidence import excerpts
from rmm_lab.evidence import pages as sheets

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/evidence.md")


def rows_of(name: str):
    """Two seeds of two settings or methods, means 70 and 72 against 71 and 75 (paired: +2 on average)."""
    common = {"size": "ViT", "by_task": "x=60.00 y=80.00", "seconds": 1.0, "episodes": 9}
    if name == "agent":
        return [
            common
            | {"group": "g", "setting": s, "seed": n, "mean": m, "reward_split": m + 1, "path": ""}
            for s, values in (("default", (70, 72)), ("other", (71, 75)))
            for n, m in enumerate(values)
        ]
    if name == "dar":
        return [
            common | {"preset": p, "reward": r, "data_fraction": f, "dar": d, "seed": n, "mean": m}
            for p, r, f, d, values in (
                ("paper", "metric", 1.0, 0.8, (70, 72)),
                ("paper", "metric", 0.01, 0.8, (71, 75)),
                ("paper", "metric", 0.01, 0.0, (70, 74)),
                ("default", "metric", 1.0, 0.0, (80, 82)),
                ("default", "metric", 0.01, 0.0, (79, 79)),
                ("default", "likelihood", 0.01, 0.0, (80, 82, 9)),
            )
            for n, m in enumerate(values)
        ]
    return [
        common
        | {"group": "g", "method": m, "seed": n, "mean": v, "reward_split": v, "setting": "s"}
        for m, values in (
            *(("fine-tuned", (99, 99)), ("weight average", (70, 72)), ("RMM", (71, 75))),
        )
        for n, v in enumerate(values)
    ]


def lines_of(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.strip().splitlines()
    ]


def test_means_spreads_and_paired_differences_by_hand():
    # mean 71, sample deviation sqrt(2); differences 1 and 3: 2 +- 12.706 * sqrt(2) / sqrt(2)
    table = lines_of(excerpts.agent(rows_of))
    assert table[2] == ["g", "default", "72.0 ± 1.4", "", "71.0 ± 1.4", "2"]
    assert table[3] == ["g", "other", "74.0 ± 2.8", "+2.0 ± 12.7", "73.0 ± 2.8", "2"]
    table = lines_of(excerpts.searches(rows_of))
    assert table[0] == ["test split, %", "g"]
    assert table[-2:] == [["**RMM**", "73.0 ± 2.8"], ["seeds", "2"]]
    table = lines_of(excerpts.groups(rows_of))
    assert table[2] == ["g", "99.0", "none ships", "71.0 ± 1.4", "73.0 ± 2.8", "+2.0 ± 12.7", "2"]
    table = lines_of(excerpts.dar(rows_of))
    assert table[0] == ["test split, %", "100 %", "1 %"]
    assert table[2] == ["paper's preset", "71.0 ± 1.4", "73.0 ± 2.8"]
    assert table[3] == ["paper's preset, without DAR", "71.0 ± 1.4", "72.0 ± 2.8"]
    assert table[4] == ["default preset", "81.0 ± 1.4", "79.0 ± 0.0"]
    assert table[5] == ["default preset, by likelihood", "", "57.0 ± 41.6"]
    assert table[6] == ["with − without DAR", "", "+1.0 ± 0.0"]
    assert table[7] == ["paper's preset − itself at 100 %", "", "+2.0 ± 12.7"]
    assert table[8] == ["default preset − itself at 100 %", "", "−2.0 ± 12.7"]
    assert table[9] == [
        "default preset, by likelihood − default preset at 100 %",
        *("", "+0.0 ± 0.0"),
    ]
    assert table[10] == ["seeds", "2", "2 to 3"]


def test_a_page_keeps_all_but_its_excerpts():
    page = "a\n<!-- results: agent -->\nold 1\n<!-- end -->\nb 2.5\n<!-- end -->\n"
    filled = excerpts.fill(page, rows_of)
    assert filled.startswith("a\n<!-- results: agent -->\n\n| experts |")
    assert filled.endswith("|\n\n<!-- end -->\nb 2.5\n<!-- end -->\n")
    assert "old" not in filled
    assert excerpts.fill(filled, rows_of) == filled
    with pytest.raises(InputError, match="excerpt 'Table4': expected one of"):
        excerpts.fill("<!-- results: Table4 -->\n<!-- end -->", rows_of)
    with pytest.raises(InputError, match="excerpt 'cats': expected one of demo"):
        excerpts.fill("<!-- results: cats -->\n<!-- end -->", rows_of)


@pytest.mark.parametrize(
    "page",
    [
        "<!-- results: agent -->\n text\n<!-- results: dar -->\n<!-- end -->",  # would lose text
        "<!-- results: agent -->\n text",
        "<!-- results: agent-->\n<!-- end -->",
    ],
)
def test_an_excerpt_without_its_end_loses_no_prose(page):
    with pytest.raises(
        InputError, match=r"excerpts: expected .* around each, found [12] beginnings"
    ):
        excerpts.fill(page, rows_of)


def test_the_command_writes_only_what_has_changed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(excerpts, "fill", lambda page: page.replace("old", "new"))
    for name, content in (("a.md", "old"), ("b.md", "none")):
        (tmp_path / name).write_text(content)
    assert excerpts.main([str(tmp_path / "a.md"), str(tmp_path / "b.md")]) == 0
    assert (tmp_path / "a.md").read_text() == "new"
    assert capsys.readouterr().out == f"written: {tmp_path / 'a.md'}\n"
    assert excerpts.main([str(tmp_path / "c.md")]) == 2


@pytest.mark.parametrize("page", PAGES)
def test_the_excerpts_that_ship_are_up_to_date(page):
    text = (ROOT / page).read_text("utf-8")
    assert "<!-- results:" in text
    assert excerpts.fill(text) == text


def numbers(text: str) -> set[str]:
    """All numbers with one or two decimals."""
    return set(re.findall(r"(?<![\d.])\d+\.\d{1,2}(?![\d.])", text))


@pytest.mark.parametrize("page", PAGES)
def test_every_measured_number_in_the_prose_stands_in_the_results(page):
    """A number with decimals beside % or points, or with ±, is in a sheet or a table of results/."""
    text = re.sub(
        r"<!-- results: .*?<!-- end -->", "", (ROOT / page).read_text("utf-8"), flags=re.S
    )
    text = re.sub(r"```.*?```|^    .*?$|`[^`]*`", "", text, flags=re.S | re.M)
    claimed = set(re.findall(r"(?<![\d.])(\d+\.\d{1,2})(?= %| points| ±| times| s\b)", text))
    claimed |= set(re.findall(r"± (\d+\.\d{1,2})", text))
    known = numbers("".join(f.read_text("utf-8") for f in (ROOT / "results").glob("**/*.md")))
    known |= numbers(
        (ROOT / "docs/performance.md").read_text("utf-8")
    )  # its tables are tested there
    for excerpt in excerpts.EXCERPTS.values():
        known |= numbers(excerpt(excerpts.tables.read))
    assert claimed <= known, sorted(claimed - known)


def test_json_configs_in_the_results_can_be_read():
    for name in ("halves", "vision", "language", "dar", "searches", "agent"):
        for row in excerpts.tables.read(name):
            if row["config"]:
                assert "preset" in json.loads(row["config"]), name
    assert sheets.SHOW
