"""Rows of language tasks: reading files of them, checking them, and drawing splits.

A row is ``{"input": prompt, "choices": [texts], "label": number of the right choice}``. For language models
it may be ``{"input": prompt, "target": text to write}`` or ``{"text": text to read}`` too. They become rows
with one choice, the latter without a prompt.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import gzip
import io
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rmm_lab.errors import InputError
from rmm_lab.tasks import plain
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
KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")  # all but the last may be packed: .csv.gz
LONGEST = 10_000_000  # characters of a row
_DELIMITERS = {".tsv": "\t", ".csv": ",", ".txt": "\t"}


def kind_of(file: Path) -> str:
    """What a file's name says that it holds, in lower case: ``.csv``, also of ``x.CSV.gz``."""
    return Path(file.name.lower().removesuffix(".gz")).suffix


def read(
    file: Path,
    convert: Convert = None,
    quoting: Quoting = csv.QUOTE_MINIMAL,
    columns: Sequence[str] = (),
) -> list[Row]:
    """The checked rows of a file of one of ``KINDS``, by default of a user's own rows, see ``own``.

    convert: makes a row of one record of an official file. columns: the names in a ``.txt`` file without a
    first line.
    """
    thing, kind = f"file {file}", kind_of(file)
    if kind not in (*KINDS, *([".txt"] if columns else [])):
        raise wrong(thing, ", ".join(KINDS), repr(file.suffix.lower()), "convert the file")
    if kind == ".parquet":
        return checked(_parquet(file, thing), thing, convert or own)
    try:
        text = plain.read_bytes(file, plain.TEXT_MB).decode("utf-8-sig")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise wrong(
            thing, "a whole .gz file", f"a broken one ({error})", "copy it again"
        ) from error
    except OSError as error:
        found = str(error.strerror or error)
        raise wrong(thing, "a file that can be read", found, "see to it") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        found = f"the byte 0x{error.object[error.start]:02x}"
        raise wrong(f"{thing}, line {line}", "UTF-8 text", found, "save it as UTF-8") from error
    except ValueError as error:
        raise wrong(thing, "a file of rows", str(error), "split it") from error
    if kind in _DELIMITERS:
        lines = io.StringIO(text, newline="")
        cells = csv.reader(lines, delimiter=_DELIMITERS[kind], quoting=quoting)
        records = _table(cells, thing, list(columns) if kind == ".txt" else None)
    else:
        records = _json_array(text, thing) if kind == ".json" else _json_lines(text, thing)
    return checked(records, thing, convert or own)


def _parquet(file: Path, thing: str) -> Iterator[tuple[str, Any]]:
    try:
        plain.check_regular(file)
        from pyarrow import parquet  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        remedy = "pip install pyarrow, or save the rows as jsonl"
        raise wrong(thing, "the optional library pyarrow to read it", "none", remedy) from error
    except OSError as error:
        raise wrong(thing, "a file that can be read", str(error), "see to it") from error
    try:
        rows = parquet.read_table(file).to_pylist()
    except Exception as error:  # pyarrow raises many kinds
        found = f"a broken one ({type(error).__name__})"
        raise wrong(thing, "a parquet file that can be read", found, "copy it again") from error
    yield from ((f"{thing}, row {i}", row) for i, row in enumerate(rows, start=1))


def _json_array(text: str, thing: str) -> Iterator[tuple[str, Any]]:
    """Rows of ``[{...}, ...]`` or ``{"data": [{...}, ...]}``, or else one object a line."""
    try:
        found = plain.parse_json(text)
    except ValueError:
        found = None
    if isinstance(found, dict) and len(found) == 1:
        (found,) = found.values()
    if not isinstance(found, list):
        yield from _json_lines(text, thing)
        return
    yield from ((f"{thing}, row {i}", row) for i, row in enumerate(found, start=1))


def _json_lines(text: str, thing: str) -> Iterator[tuple[str, Any]]:
    # Not splitlines, which also breaks at U+2028. Old Macs end lines with a carriage return alone.
    for number, line in enumerate(re.split("\r\n|\r|\n", text), start=1):
        if line.strip():
            where = f"{thing}, line {number}"
            if len(line) > LONGEST:
                found, remedy = f"{len(line):,} characters", "shorten its texts"
                raise wrong(where, f"a row of at most {LONGEST:,} characters", found, remedy)
            try:
                yield where, plain.parse_json(line)
            except ValueError as error:
                found = f"broken JSON ({error})"
                raise wrong(where, "one JSON object", found, "correct the line") from error


def _table(reader: Any, thing: str, columns: list[str] | None) -> Iterator[tuple[str, Any]]:
    try:
        header: list[str] = columns or next(reader, [])
        for cells in filter(None, reader):
            where = f"{thing}, line {reader.line_num}"
            if len(cells) != len(header):
                expected = f"{len(header)} columns" + ("" if columns else " as in line 1")
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


_MEANING = {"true": True, "yes": True, "false": False, "no": False}


def own(record: Row) -> Row:
    """A row of a user's record: other names of its fields, and other ways to write the right choice.

    ``options`` stands for ``choices`` and ``output`` for ``label``. In a table, choices are a list in JSON or
    Python. A label may be the right choice's number, also as text, its text, or true and false where
    the choices are yes and no, or true and false. A text that can be read in two ways is refused.
    """
    out = dict(record)
    for name, other in (("choices", "options"), ("label", "output")):
        if out.get(name) is None and out.get(other) is not None:
            out[name] = out[other]
    choices = out.get("choices")
    if isinstance(choices, str) and choices.strip().startswith("["):
        with contextlib.suppress(ValueError, SyntaxError):
            choices = out["choices"] = ast.literal_eval(choices)
    if isinstance(choices, list) and all(isinstance(c, str) for c in choices):
        out["label"] = _number(out.get("label"), [c.strip() for c in choices])
    return out


def _number(label: Any, choices: Sequence[str]) -> Any:
    """The number of the right choice; a label that is no bool and no text as it is."""
    if isinstance(label, str):
        text, low = label.strip(), label.strip().lower()
        found = [i for i, c in enumerate(choices) if c == text]
        found = found or [i for i, c in enumerate(choices) if c.lower() == low]
        if text.isdecimal() and int(text) < len(choices):
            found.append(int(text))
        if len(set(found)) == 1:
            return found[0]
        if found:
            remedy = "write it as a number, without quotes, in a jsonl file"
            expected = "'label' to be the number or the text of one choice"
            raise wrong("", expected, f"{text!r}, which is both of two", remedy)
        if low not in ("true", "false"):
            if not text:
                return None
            expected = f"'label' to be one of the choices {short(list(choices))}, or its number"
            raise wrong("", expected, short(label), "correct the row")
        label = low == "true"
    if isinstance(label, bool):
        means = [_MEANING.get(c.lower()) for c in choices]
        if sorted(map(str, means)) != ["False", "True"]:
            expected = "'label' to be the number of the right choice, since they are not yes and no"
            raise wrong("", expected, str(label), "correct the row")
        return means.index(label)
    return label


def check(row: Row, where: str) -> Row:
    """The three fields of a row; raises InputError, beginning with ``where``, if they are wrong.

    A row with a ``target``, or with a ``text`` alone, has it as its only choice.
    """

    def refuse(expected: str, found: str, remedy: str = "correct the row") -> InputError:
        return wrong(where, expected, found, remedy)

    if not isinstance(row, dict):
        raise refuse("an object with input, choices and label", short(row))
    texts = [t for v in row.values() for t in (v if isinstance(v, list) else [v])]
    texts = [text for text in texts if isinstance(text, str)]
    if (size := sum(map(len, texts))) > LONGEST:
        found = f"{size:,} characters"
        raise refuse(f"a row of at most {LONGEST:,} characters", found, "shorten its texts")
    if odd := next((t for t in texts if "\0" in t), None):
        raise refuse("texts without NUL characters", short(odd), "save it as UTF-8")
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
    if (pair := plain.alike(choices)) is not None:
        found = f"{short(pair[0])} and {short(pair[1])}, which look the same"
        raise refuse("choices that look different", found)
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
