"""The tables that stand in the README and in docs/: written from the CSV files of ``results/``.

A text has them between two comments, ``<!-- results: NAME -->`` and ``<!-- end -->``. Then

    python -m rmm_lab.evidence.excerpts README.md docs/evidence.md

writes them anew, and a test holds that they are up to date.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rmm_lab.errors import InputError, run_command
from rmm_lab.evidence import tables
from rmm_lab.evidence.pages import (
    BY_SEED,
    DEFAULT,
    METHODS,
    best_uniform,
    by_seed,
    by_task,
    dar_blocks,
    difference,
    group_blocks,
    halves_blocks,
    markdown,
    span,
    text,
)
from rmm_lab.search import run_folder as runs

Rows = Sequence[Mapping[str, Any]]
_START = "<!-- results:"
_BLOCK = re.compile(rf"({_START} ([^ ]+) -->\n)(?:(?!{_START}).)*?(<!-- end -->)", re.DOTALL)


def fill(page: str, read: Callable[[str], Rows] = tables.read) -> str:
    """A text with all its excerpts written anew; ``read`` gives a table's rows by its name."""

    def write(match: re.Match[str]) -> str:
        if match[2] not in EXCERPTS:
            raise InputError(
                f"excerpt {match[2]!r}: expected one of {', '.join(EXCERPTS)}, found another; correct "
                "the comment"
            )
        return f"{match[1]}\n{EXCERPTS[match[2]](read)}\n{match[3]}"

    new, n = _BLOCK.subn(write, page)
    if n != page.count(_START):
        raise InputError(
            f"excerpts: expected {_START} NAME --> and <!-- end --> around each, found "
            f"{page.count(_START)} beginnings and {n} whole ones; correct the comments"
        )
    return new


def _of(rows: Rows, **values: Any) -> list[Mapping[str, Any]]:
    return [row for row in rows if all(row[k] == v for k, v in values.items())]


def _one_seed(rows: Rows) -> str:
    """Every method of one search, as its own table shows it: tasks, mean, setting."""
    names = list(by_task(rows[0]))
    lines = [
        [r["method"], *(f"{v:.1f}" for v in by_task(r).values()), f"{r['mean']:.1f}", r["setting"]]
        for r in rows
    ]
    head = ["method", *names, "mean", "setting"]
    body = markdown(head, lines).splitlines()
    body[1] = "|---|" + "---:|" * (len(names) + 1) + "---|"
    return "\n".join(body) + "\n"


def demo(read: Callable[[str], Rows]) -> str:
    """All methods on the demo's pair, seed 1."""
    return _one_seed(_of(read("vision"), group=tables.PAIR, seed=1))


def language(read: Callable[[str], Rows]) -> str:
    """All methods but those as published on the T5s, seed 1."""
    rows = [r for r in _of(read("language"), seed=1) if "as published" not in str(r["setting"])]
    return "\n".join(
        f"`--experts {group}`:\n\n{_one_seed(_of(rows, group=group))}"
        for group in dict.fromkeys(r["group"] for r in rows)
    )


def groups(read: Callable[[str], Rows]) -> str:
    """Room and gain of each group of experts: means over seeds, the gain paired."""
    lines = []
    for rows in (read("vision"), read("language")):
        for found, columns in group_blocks(rows).values():
            for column in columns:
                best = best_uniform(found, column)
                gain = difference(found["RMM"].get(column, {}), best)
                cells = [
                    text(found.get(m, {}).get(column, {}), m)
                    for m in ("fine-tuned", "multi-task", "RMM")
                ]
                spread = _spread(best)
                n = len(found["RMM"].get(column, {}))
                cells[1] = cells[1] or "none ships"
                lines.append([column, *cells[:2], spread, cells[2], gain, str(n)])
    head = ["experts", "fine-tuned", "multi-task", "best uniform merge", "RMM", "gain", "seeds"]
    return markdown(head, lines)


def halves(read: Callable[[str], Rows]) -> str:
    """Table I in short: each size's average over the four sets."""
    lines = []
    for size, (found, columns) in halves_blocks(read("halves")).items():
        for method in METHODS:
            if method in found:
                lines.append([size, method, *(text(found[method][c], method) for c in columns)])
        gains = [difference(found["RMM"][c], best_uniform(found, c)) for c in columns]
        lines.append([size, "RMM − best uniform merge", *gains])
    return markdown(["models", "method", *columns], lines, 2)


def searches(read: Callable[[str], Rows]) -> str:
    """The searches of each problem on the test split."""
    rows = read("searches")
    names = list(dict.fromkeys(r["group"] for r in rows))
    lines = []
    for method in dict.fromkeys(r["method"] for r in rows):
        cells = [_spread(by_seed(_of(rows, group=g, method=method), "mean")) for g in names]
        lines.append([f"**{method}**" if method == "RMM" else method, *cells])
    seeds = []
    for g in names:
        counts = Counter(r["method"] for r in _of(rows, group=g)).values()
        seeds.append(span(counts))
    return markdown(["test split, %", *names], [*lines, ["seeds", *seeds]])


def agent(read: Callable[[str], Rows]) -> str:
    """The default preset with one choice changed."""
    rows = read("agent")
    lines = []
    for group in dict.fromkeys(r["group"] for r in rows):
        settings = list(dict.fromkeys(r["setting"] for r in _of(rows, group=group)))
        of = DEFAULT if DEFAULT in settings else settings[0]
        first = by_seed(_of(rows, group=group, setting=of), "reward_split")
        for setting in settings:
            own = _of(rows, group=group, setting=setting)
            split = [_spread(by_seed(own, k)) for k in ("reward_split", "mean")]
            gain = "" if setting == of else difference(by_seed(own, "reward_split"), first)
            lines.append([group, setting, split[0], gain, split[1], str(len(own))])
    head = ["experts", "setting", "reward split, %", "difference", "test split, %", "seeds"]
    return markdown(head, lines, 2)


def preset(read: Callable[[str], Rows]) -> str:
    """The preset ``agent`` with one choice put back to the paper's, as measured before the local search."""
    rows = read("preset")
    lines = []
    for setting in dict.fromkeys(r["setting"] for r in rows):
        own = _of(rows, setting=setting)
        name = setting.replace("default preset", "agent preset")
        name = name.replace("default with", "agent preset with")  # as it was called then
        lines.append([name, *(_spread(by_seed(own, k)) for k in ("reward_split", "test"))])
    return markdown(["setting", "reward split, %", "test split, %"], lines)


def dar(read: Callable[[str], Rows]) -> str:
    """Table IV's averages: the paper's preset with DAR and without, and the default preset."""
    found, shares = dar_blocks(read("dar"))
    own = found["Average"]
    lines = [[name, *(_spread(own[name].get(s, {})) for s in shares)] for name in own]
    gains = [
        difference(own["RMM"].get(s, {}), own["RMM w/o DAR"].get(s, {})) if s != "100 %" else ""
        for s in shares
    ]
    lines.append(["with − without DAR", *gains])
    for name, whole in {
        "RMM": "RMM",
        "RMM, default preset": "RMM, default preset",
        "RMM, default preset, by likelihood": "RMM, default preset",
    }.items():
        of = own.get(whole, {}).get("100 %", {})
        lost = [
            difference(own.get(name, {}).get(s, {}), of) if s != "100 %" else "" for s in shares
        ]
        against = "itself" if whole == name else "default preset"
        if any(lost):
            lines.append([f"{name} − {against} at 100 %", *lost])
    seeds = [span(len(its[s]) for its in own.values() if s in its) for s in shares]
    names = {"RMM, ": "", "RMM w/o DAR": "paper's preset, without DAR", "RMM": "paper's preset"}
    for line in lines:
        for old, new in names.items():
            if line[0].startswith(old):
                line[0] = new + line[0][len(old) :]
                break
    return markdown(["test split, %", *shares], [*lines, ["seeds", *seeds]])


def fresh(read: Callable[[str], Rows]) -> str:
    """The demo's pair on seeds that chose nothing."""
    rows = _of(read("fresh/vision"), method="RMM")
    lines = [[str(r["seed"]), f"{r['reward_split']:.1f}", f"{r['mean']:.1f}"] for r in rows]
    mean = [_spread(by_seed(rows, k)) for k in ("reward_split", "mean")]
    return markdown(["seed", "reward split, %", "test split, %"], [*lines, ["mean", *mean]])


def _spread(values: BY_SEED) -> str:
    v = list(values.values())
    if not v:
        return ""
    return f"{np.mean(v):.1f}" + (f" ± {np.std(v, ddof=1):.1f}" if len(v) > 1 else "")


EXCERPTS: dict[str, Callable[[Callable[[str], Rows]], str]] = {
    "demo": demo,
    "language": language,
    "groups": groups,
    "halves": halves,
    "searches": searches,
    "agent": agent,
    "preset": preset,
    "dar": dar,
    "fresh": fresh,
}


@dataclass
class Fill:
    """Write the excerpts of some texts anew."""

    pages: tuple[Path, ...]
    """Files such as README.md."""

    def run(self) -> None:
        """Replace each file whose excerpts have changed."""
        for page in self.pages:
            old = page.read_text("utf-8")
            if (new := fill(old)) != old:
                runs.write(page, new)
                print(f"written: {page}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    return run_command(
        Fill, "python -m rmm_lab.evidence.excerpts", argv, "the pages are as they were"
    )


if __name__ == "__main__":
    sys.exit(main())
