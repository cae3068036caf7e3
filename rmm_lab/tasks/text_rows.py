"""Rows of language tasks: reading files of them, checking them, and drawing splits.

A row is ``{"input": prompt, "choices": [texts], "label": number of the right choice}``. For language models
it may be ``{"input": prompt, "target": text to write}`` or ``{"text": text to read}`` too. They become rows
with one choice, the latter without a prompt.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rmm_lab.errors import InputError
from rmm_lab.tasks.files import SPLIT_SEED, draw

Row = dict[str, Any]
Quoting = Literal[0, 3]  # of the module csv: minimal, none


def wrong(thing: str, expected: str, found: str, remedy: str) -> InputError:
    """The one sentence that every error here is; without a thing, the caller puts it in front."""
    return InputError(f"{thing}: expected {expected}, found {found}; {remedy}".removeprefix(": "))


def short(value: object) -> str:
    """A value in a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


Convert = Callable[[Row], Row] | None  # makes a row of an official record


def read(file: Path, convert: Convert = None, quoting: Quoting = csv.QUOTE_MINIMAL) -> list[Row]:
    """The checked rows of a jsonl file or, given ``convert``, of an official jsonl, TSV or CSV file."""
    thing = f"file {file}"
    kinds = {".jsonl": "", ".tsv": "\t", ".csv": ","} if convert else {".jsonl": ""}
    kind = file.suffix.lower()
    if kind not in kinds:
        raise wrong(thing, " or ".join(kinds), repr(kind), "convert the file")
    try:
        text = file.read_bytes().decode("utf-8-sig")  # Windows likes to put a mark at the start
    except OSError as error:
        raise wrong(thing, "a file that can be read", str(error.strerror), "see to it") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        found = f"the byte 0x{error.object[error.start]:02x}"
        raise wrong(f"{thing}, line {line}", "UTF-8 text", found, "save it as UTF-8") from error
    if kind == ".jsonl":
        return checked(_json_lines(text, thing), thing, convert)
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=kinds[kind], quoting=quoting)
    return checked(_table(reader, thing), thing, convert)


def _json_lines(text: str, thing: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines also breaks at U+2028
        if line.strip():
            where = f"{thing}, line {number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                found = f"broken JSON ({error})"
                raise wrong(where, "one JSON object", found, "correct the line") from error


def _table(reader: Any, thing: str) -> Iterator[tuple[str, Any]]:
    try:
        header: list[str] = next(reader, [])
        for cells in filter(None, reader):
            where = f"{thing}, line {reader.line_num}"
            if len(cells) != len(header):
                expected = f"{len(header)} columns as in line 1"
                raise wrong(where, expected, str(len(cells)), "correct the line")
            yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        where = f"{thing}, line {reader.line_num}"
        raise wrong(where, "a table", f"broken columns ({error})", "copy it again") from error


def checked(records: Iterable[tuple[str, Any]], thing: str, convert: Convert) -> list[Row]:
    """Checked rows of pairs: where a record is, for messages, and the record."""
    rows = []
    for where, record in records:
        try:
            row = convert(record) if convert and isinstance(record, dict) else record
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        rows.append(check(row, where))
    if not rows:
        raise wrong(thing, "at least one row", "none", "copy it again")
    return rows


def check(row: Row, where: str) -> Row:
    """The three fields of a row; raises InputError, beginning with ``where``, if they are wrong.

    A row with a ``target``, or with a ``text`` alone, has it as its only choice.
    """

    def refuse(expected: str, found: str, remedy: str = "correct the row") -> InputError:
        return wrong(where, expected, found, remedy)

    if not isinstance(row, dict):
        raise refuse("an object with input, choices and label", short(row))
    if not row.keys() & {"choices", "label"} and row.keys() & {"target", "text"}:
        names = ["input", "target"] if "target" in row else ["text"]
        for name in names:
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise refuse(f"{name!r} to be a text that is not empty", short(row.get(name)))
        return {"input": row["input"] if names[1:] else "", "choices": [row[names[-1]]], "label": 0}
    missing = [key for key in ("input", "choices", "label") if row.get(key) is None]
    if missing == ["label"]:
        raise refuse(
            "a labelled row", "an unlabelled one (no 'label')", "add the label or remove it"
        )
    if missing:
        found = ", ".join(map(str, row)) or "no field"
        remedy = f"add {missing[0]!r}, or give FORMAT:PATH if the file is an official one"
        raise refuse("the fields input, choices and label", found, remedy)
    text, choices, label = row["input"], row["choices"], row["label"]
    if not isinstance(text, str) or not text.strip():
        raise refuse("'input' to be a text that is not empty", short(text))
    if not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
        raise refuse("'choices' to be a list of texts", short(choices))
    if len(choices) < 2:
        raise refuse("at least two choices", str(len(choices)))
    bare = Counter(c.strip() for c in choices)
    if "" in bare:
        raise refuse("no empty choice", short(choices))
    if len(bare) < len(choices):
        raise refuse("different choices", f"{short(bare.most_common(1)[0][0])} twice")
    if isinstance(label, bool) or not isinstance(label, int):
        raise refuse("'label' to be a whole number, that of the right choice", short(label))
    if not 0 <= label < len(choices):
        raise refuse(f"'label' from 0 to {len(choices) - 1}", str(label))
    return {"input": text, "choices": choices, "label": label}


def split(parts: dict[str, list[Row]], thing: str) -> dict[str, list[Row]]:
    """Three splits from those that a source has, called train, validation and test.

    Rows are dealt out by their inputs; every split gets at least one.
    """
    if len(parts) == 3:
        return {"train": parts["train"], "reward": parts["validation"], "test": parts["test"]}
    held_out, shares = {}, {"train": 3, "reward": 1, "test": 1}
    if len(parts) == 1 and "test" not in parts:
        (rows,) = parts.values()
    elif "train" not in parts:
        found = " and ".join(parts) or "neither"
        raise wrong(thing, "the splits train and test", found, "add the missing file")
    else:
        rows, shares = parts["train"], {"train": 4, "reward": 1}
        held_out = {"test": parts.get("test") or parts["validation"]}  # reported, not searched
    inputs = sorted({_drawn_by(row) for row in rows})
    if len(inputs) < len(shares):
        expected = f"at least {len(shares)} different inputs, for {', '.join(shares)}"
        raise wrong(thing, expected, str(len(inputs)), "add rows or provide the splits")
    dealt = draw(len(inputs), shares, np.random.default_rng(SPLIT_SEED))
    owner = {inputs[i]: name for name, numbers in dealt.items() for i in numbers}
    return {name: [r for r in rows if owner[_drawn_by(r)] == name] for name in shares} | held_out


def _drawn_by(row: Row) -> str:
    """What rows of one split share: the input, or the text of a row without one."""
    return str(row["input"] or row["choices"][0])


def majority(rows: Sequence[Row]) -> tuple[int, float]:
    """The most frequent label (of several, the smallest) and its share of the rows, 0 to 1."""
    counts = Counter(row["label"] for row in rows)
    label = min(counts, key=lambda k: (-counts[k], k))
    return label, counts[label] / len(rows)


def chance(rows: Sequence[Row]) -> float:
    """Expected accuracy of a guess, 0 to 1: the mean of 1 / number of choices."""
    return sum(1 / len(row["choices"]) for row in rows) / len(rows)
