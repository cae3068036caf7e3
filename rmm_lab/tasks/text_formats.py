"""Language tasks: multiple-choice rows from the official files, from the hub, or from one's own.

A row is ``{"input": prompt, "choices": [texts], "label": number of the right choice}``. As with
images, every task has three splits: ``train`` to fine-tune, ``reward`` to search, ``test`` to report.
"""

from __future__ import annotations

import csv
import io
import json
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rmm_lab.errors import InputError
from rmm_lab.tasks import hub
from rmm_lab.tasks.files import SPLIT_SEED, draw

Row = dict[str, Any]

# ------------------------------------------------------------------------------------ the prompts

# What a model reads in each official task, and what it chooses from; OWN: the record's own answers.
NO_YES, OWN = ("no", "yes"), ()
PROMPTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "qasc": ("question: {question} facts: {fact1} {fact2}", OWN),
    "wikiqa": ("question: {question} sentence: {sentence} does it answer the question?", NO_YES),
    "quartz": ("{para} {question}", OWN),
    "paws": ("sentence 1: {sentence1} sentence 2: {sentence2} same meaning?", NO_YES),
    "storycloze": ("story: {story} ending:", OWN),
    "winogrande": ("fill in the blank: {sentence}", OWN),
    "wsc": ('{text} question: does "{span2}" refer to "{span1}"?', NO_YES),
}
# How the official files write the label -> number of the choice.
_ONE_TWO = {"1": 0, "2": 1}
_BINARY = {"0": 0, "1": 1, "false": 0, "true": 1}


def _row(task: str, label: int, choices: Sequence[str] = (), **texts: str) -> Row:
    prompt, fixed = PROMPTS[task]
    return {"input": prompt.format(**texts), "choices": list(fixed or choices), "label": label}


# ------------------------------------------- the official records (and the hub's, where they differ)


def _qasc(record: Row) -> Row:
    question, choices, label = _question(record)
    facts = {key: _text(record, key) for key in ("fact1", "fact2")}
    return _row("qasc", label, choices, question=question, **facts)


def _wikiqa(record: Row) -> Row:
    question, sentence = _text(record, "Question", "question"), _text(record, "Sentence", "answer")
    return _row("wikiqa", _label(record, _BINARY, "Label"), question=question, sentence=sentence)


def _quartz(record: Row) -> Row:
    question, choices, label = _question(record)
    return _row("quartz", label, choices, para=_text(record, "para"), question=question)


def _paws(record: Row) -> Row:
    texts = {key: _text(record, key) for key in ("sentence1", "sentence2")}
    return _row("paws", _label(record, _BINARY, "label"), **texts)


def _storycloze(record: Row) -> Row:
    story = " ".join(_text(record, f"InputSentence{i}") for i in (1, 2, 3, 4))
    choices = [_text(record, f"RandomFifthSentenceQuiz{i}") for i in (1, 2)]
    return _row("storycloze", _label(record, _ONE_TWO, "AnswerRightEnding"), choices, story=story)


def _winogrande(record: Row) -> Row:
    choices = [_text(record, "option1"), _text(record, "option2")]
    label = _label(record, _ONE_TWO, "answer")
    return _row("winogrande", label, choices, sentence=_text(record, "sentence"))


def _wsc(record: Row) -> Row:
    """With stars around the pronoun asked about, as T5 has them.

    Without them, 12 prompts of the official train file stand there once with yes and once with no:
    the same pronoun occurs twice in the text and means two people.
    """
    spans = record.get("target", record)  # nested in SuperGLUE's files, flat on the hub
    if not isinstance(spans, dict) or type(spans.get("span2_index")) is not int:
        raise _wrong("", "a whole number 'span2_index'", "none", "correct the row")
    span1, span2 = _text(spans, "span1_text"), _text(spans, "span2_text")
    words = _text(record, "text").split()
    # The index counts words; it is off by one in one official row, hence the nearest such word.
    hits = [i for i, word in enumerate(words) if word.strip(string.punctuation) == span2]
    if hits:
        i = min(hits, key=lambda i: abs(i - spans["span2_index"]))
        words[i] = words[i].replace(span2, f"*{span2}*", 1)
    label = _label(record, _BINARY, "label")
    return _row("wsc", label, text=" ".join(words), span1=span1, span2=span2)


def _question(record: Row) -> tuple[str, list[str], int]:
    """Question, answers, number of the right one, of AI2's records; an answer given twice counts once."""
    nested = isinstance(record.get("question"), dict)  # in the files; the hub has them side by side
    outer: Row = record["question"] if nested else record
    question = _text(outer, "stem" if nested else "question")
    offered: Any = outer.get("choices")
    try:
        if isinstance(offered, dict):
            pairs = list(zip(offered["label"], offered["text"], strict=True))
        else:
            pairs = [(c["label"], c["text"]) for c in offered]
        answers = {letter: text.strip() for letter, text in pairs}
        if len(answers) < len(pairs):
            raise ValueError
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        expected = "'choices' with a 'text' and a 'label' of its own each"
        raise _wrong("", expected, _short(offered), "correct the row") from error
    choices = list(dict.fromkeys(answers.values()))
    numbers = {letter: choices.index(text) for letter, text in answers.items()}
    return question, choices, _label(record, numbers, "answerKey")


def _text(record: Row, *names: str) -> str:
    """The first of the fields that is there, stripped; the names are those of the files and the hub."""
    for name in names:
        if isinstance(record.get(name), str):
            return record[name].strip()
    wrong = ", ".join(f"{name} = {_short(record[name])}" for name in names if name in record)
    found = wrong or ", ".join(map(str, record)) or "no field"
    remedy = "check that the file is the official one of this format"
    raise _wrong("", f"a text {' or '.join(map(repr, names))}", found, remedy)


def _label(record: Row, numbers: Mapping[str, int], name: str) -> int:
    value = record.get(name, record.get(name.lower()))
    if value in (None, "", -1, "-1"):
        remedy = "use a labelled file, or remove the row"
        raise _wrong("", "a labelled row", f"an unlabelled one (no {name!r})", remedy)
    text = str(value).lower() if isinstance(value, bool) else str(value).strip()
    if text not in numbers:
        expected = f"{name!r} to be one of {', '.join(numbers)}"
        raise _wrong("", expected, _short(value), "correct the row")
    return numbers[text]


def _wrong(thing: str, expected: str, found: str, remedy: str) -> InputError:
    """The one sentence that every error here is; without a thing, the caller puts it in front."""
    return InputError(f"{thing}: expected {expected}, found {found}; {remedy}".removeprefix(": "))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ------------------------------------------------------------------------------ where they come from


@dataclass(frozen=True)
class Format:
    """An official data set, and how to make a row of one of its records."""

    convert: Callable[[Row], Row]
    files: Mapping[str, tuple[str, ...]]  # labelled split -> names of its file, the best first
    folder: str  # where the official archive keeps them
    hub: tuple[str, str | None] | None  # data set and configuration
    chance: float  # expected accuracy of a guess, 0 to 1
    source: str  # and licence
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL  # of a TSV or CSV file, as the data set's readers do


_JSONL = {"train": ("train.jsonl",), "validation": ("dev.jsonl", "val.jsonl")}
_TSV = {"train": ("train.tsv",), "validation": ("dev.tsv",), "test": ("test.tsv",)}
FORMATS: dict[str, Format] = {
    "qasc": Format(
        convert=_qasc,
        files=_JSONL,
        folder="QASC_Dataset",
        hub=("allenai/qasc", None),
        chance=1 / 8,
        source="allenai.org/data/qasc, CC BY 4.0",
    ),
    "wikiqa": Format(
        convert=_wikiqa,
        files={
            "train": ("WikiQA-train.tsv", "train.tsv"),
            "validation": ("WikiQA-dev.tsv", "dev.tsv"),
            "test": ("WikiQA-test.tsv", "test.tsv"),
        },
        folder="WikiQACorpus",
        hub=("microsoft/wiki_qa", None),
        chance=1 / 2,  # but about 95 % of the labels are no: see the majority
        source="aka.ms/WikiQA, Microsoft Research Data License",
        quoting=csv.QUOTE_NONE,
    ),
    "quartz": Format(
        convert=_quartz,
        files={**_JSONL, "test": ("test.jsonl",)},
        folder="quartz-dataset-v1-aug2019",
        hub=("allenai/quartz", None),
        chance=1 / 2,
        source="allenai.org/data/quartz, CC BY 4.0",
    ),
    "paws": Format(
        convert=_paws,
        files=_TSV,
        folder="final",
        hub=("google-research-datasets/paws", "labeled_final"),
        chance=1 / 2,
        source="PAWS-Wiki Labeled (Final), github.com/google-research-datasets/paws, free for any use",
    ),
    "storycloze": Format(
        convert=_storycloze,
        files={  # there is no labelled train file: as is usual, the validation file is trained on
            "train": (
                "cloze_test_val__spring2016 - cloze_test_ALL_val.csv",
                "cloze_test_val__spring2016.csv",
                "val.csv",
            ),
            "test": (
                "cloze_test_test__spring2016 - cloze_test_ALL_test.csv",
                "cloze_test_test__spring2016.csv",
                "test.csv",
            ),
        },
        folder=".",
        hub=None,
        chance=1 / 2,
        source="cs.rochester.edu/nlp/rocstories, on request",
    ),
    "winogrande": Format(
        convert=_winogrande,
        files={
            **_JSONL,
            "train": tuple(f"train{size}.jsonl" for size in ("_xl", "_l", "_m", "_s", "_xs", "")),
        },
        folder="winogrande_1.1",
        hub=("allenai/winogrande", "winogrande_xl"),
        chance=1 / 2,
        source="winogrande.allenai.org, CC BY",
    ),
    "wsc": Format(
        convert=_wsc,
        files={**_JSONL, "validation": ("val.jsonl", "dev.jsonl")},
        folder="WSC",
        hub=("aps/super_glue", "wsc"),
        chance=1 / 2,
        source="super.gluebenchmark.com, CC BY 4.0",
    ),
}
_VALIDATION = ("reward", "val", "valid", "validation", "dev")  # names of a user's own file


def load(source: str) -> dict[str, list[Row]]:
    """The rows of the splits train, reward and test of a language task.

    Args:
        source: one of

            * ``FORMAT:PATH``, a folder with the official files of a format, or one of these files; of
              Winogrande's train files the largest that is there is taken (xl, l, m, s, xs);
            * ``FORMAT:hf-hub`` or ``FORMAT:hf-hub:OWNER/NAME@REVISION``, by the library datasets;
            * a folder with ``train.jsonl``, ``reward.jsonl`` (or val, valid, validation, dev) and
              ``test.jsonl`` of rows, or a single ``.jsonl`` file of rows.

    Without all three splits, a fixed, seeded draw makes them: with train and one other file, the other
    is the test split and a fifth of train the reward split; a single file that is not called test is
    dealt 60 : 20 : 20. The draw depends on the inputs alone, not on their order, and keeps equal inputs
    together; texts that are merely alike, such as Winogrande's twins, may be parted.

    Raises InputError for anything that is missing, broken or unlabelled.
    """
    thing = f"language task {source!r}"
    known = ", ".join(FORMATS)
    name, colon, rest = source.partition(":")
    path = Path(source).expanduser()
    if colon and name in FORMATS:
        if not rest:
            raise _wrong(thing, "a folder, a file or hf-hub after the colon", "nothing", "name one")
        if re.match("hf-hub($|[:@])", rest):
            return _split(_from_hub(name, rest, thing), thing)
        return _split(_from_files(FORMATS[name], Path(rest).expanduser(), thing), thing)
    # A letter alone is a Windows drive.
    if colon and re.fullmatch(r"[A-Za-z][\w-]+", name) and not path.exists():
        raise _wrong(thing, f"one of the formats {known}", repr(name), "check the spelling")
    if path.is_file():
        return _split({"train": read(path)}, thing)
    if not source or not path.is_dir():
        expected = f"a folder or file of rows, or FORMAT:PATH with one of the formats {known}"
        raise _wrong(thing, expected, "no such file or folder", "check the spelling")
    files = {n: path / f"{n}.jsonl" for n in ("train", *_VALIDATION, "test")}
    files = {n: file for n, file in files.items() if file.is_file()}
    several = [file.name for n, file in files.items() if n in _VALIDATION]
    if len(several) > 1:
        found = f"several of {', '.join(several)}"
        raise _wrong(thing, "one file for the reward split", found, "keep one of them")
    parts = {"validation" if n in _VALIDATION else n: read(file) for n, file in files.items()}
    return _split(parts, thing)


def _from_files(form: Format, path: Path, thing: str) -> dict[str, list[Row]]:
    if path.is_file():
        return {"train": read(path, form)}
    if not path.is_dir():
        raise _wrong(thing, "a folder or file", f"no {path}", "check the spelling")
    for folder in (path, path / form.folder):
        files = {
            split: [folder / name for name in names if (folder / name).is_file()]
            for split, names in form.files.items()
        }
        if any(files.values()):
            return {split: read(there[0], form) for split, there in files.items() if there}
    found = sorted(p.name for p in path.iterdir())
    raise _wrong(
        thing,
        f"the labelled files {_names(form)} in {path}",
        (", ".join(found[:5]) or "nothing") + (", ..." if len(found) > 5 else ""),
        f"put them there (from {form.source})",
    )


def _names(form: Format) -> str:
    return " and ".join(names[0] for names in form.files.values())


def _from_hub(name: str, rest: str, thing: str) -> dict[str, list[Row]]:
    """Rows of the splits of a hub data set; data files only, never a data set's own code."""
    form = FORMATS[name]
    remedy = (
        f"get the official {_names(form)} elsewhere (from {form.source}), put them in a folder and "
        f"give {name}:FOLDER"
    )
    if form.hub is None:
        raise _wrong(thing, "a data set that the hub has", "one that it has not", remedy)
    repository, _, revision = rest.removeprefix("hf-hub").removeprefix(":").partition("@")
    repository = repository or form.hub[0]
    data = hub.load(repository, form.hub[1], revision or None, thing=thing, remedy=remedy)
    parts = {}
    for split in form.files:
        if split in data:
            rows = ((f"{repository}, {split}, row {i}", row) for i, row in enumerate(data[split]))
            parts[split] = _rows(rows, f"{repository}, {split}", form)
    return parts


# --------------------------------------------------------------------------------------- reading


def read(file: Path, form: Format | None = None) -> list[Row]:
    """The checked rows of a file of rows or, given a format, of an official file."""
    thing = f"file {file}"
    kinds = {".jsonl": "", ".tsv": "\t", ".csv": ","} if form else {".jsonl": ""}
    kind = file.suffix.lower()
    if kind not in kinds:
        raise _wrong(thing, " or ".join(kinds), repr(kind), "convert the file")
    try:
        text = file.read_bytes().decode("utf-8-sig")  # Windows likes to put a mark at the start
    except OSError as error:
        raise _wrong(thing, "a file that can be read", str(error.strerror), "see to it") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        found = f"the byte 0x{error.object[error.start]:02x}"
        raise _wrong(f"{thing}, line {line}", "UTF-8 text", found, "save it as UTF-8") from error
    if kind == ".jsonl":
        return _rows(_json_lines(text, thing), thing, form)
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=kinds[kind],
        quoting=form.quoting if form else csv.QUOTE_MINIMAL,
    )
    return _rows(_table(reader, thing), thing, form)


def _json_lines(text: str, thing: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines also breaks at U+2028
        if line.strip():
            where = f"{thing}, line {number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                found = f"broken JSON ({error})"
                raise _wrong(where, "one JSON object", found, "correct the line") from error


def _table(reader: Any, thing: str) -> Iterator[tuple[str, Any]]:
    try:
        header: list[str] = next(reader, [])
        for cells in filter(None, reader):
            where = f"{thing}, line {reader.line_num}"
            if len(cells) != len(header):
                expected = f"{len(header)} columns as in line 1"
                raise _wrong(where, expected, str(len(cells)), "correct the line")
            yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        where = f"{thing}, line {reader.line_num}"
        raise _wrong(where, "a table", f"broken columns ({error})", "copy it again") from error


def _rows(records: Iterable[tuple[str, Any]], thing: str, form: Format | None) -> list[Row]:
    """Checked rows of (where it stands, record)."""
    rows = []
    for where, record in records:
        try:
            row = form.convert(record) if form and isinstance(record, dict) else record
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        rows.append(check(row, where))
    if not rows:
        raise _wrong(thing, "at least one row", "none", "copy it again")
    return rows


def check(row: Row, where: str) -> Row:
    """The three fields of a row; raises InputError, beginning with ``where``, if they are wrong."""

    def wrong(expected: str, found: str, remedy: str = "correct the row") -> InputError:
        return _wrong(where, expected, found, remedy)

    if not isinstance(row, dict):
        raise wrong("an object with input, choices and label", _short(row))
    missing = [key for key in ("input", "choices", "label") if row.get(key) is None]
    if missing == ["label"]:
        raise wrong(
            "a labelled row", "an unlabelled one (no 'label')", "add the label or remove it"
        )
    if missing:
        found = ", ".join(map(str, row)) or "no field"
        remedy = f"add {missing[0]!r}, or give FORMAT:PATH if the file is an official one"
        raise wrong("the fields input, choices and label", found, remedy)
    text, choices, label = row["input"], row["choices"], row["label"]
    if not isinstance(text, str) or not text.strip():
        raise wrong("'input' to be a text that is not empty", _short(text))
    if not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
        raise wrong("'choices' to be a list of texts", _short(choices))
    if len(choices) < 2:
        raise wrong("at least two choices", str(len(choices)))
    bare = Counter(c.strip() for c in choices)
    if "" in bare:
        raise wrong("no empty choice", _short(choices))
    if len(bare) < len(choices):
        raise wrong("different choices", f"{_short(bare.most_common(1)[0][0])} twice")
    if isinstance(label, bool) or not isinstance(label, int):
        raise wrong("'label' to be a whole number, that of the right choice", _short(label))
    if not 0 <= label < len(choices):
        raise wrong(f"'label' from 0 to {len(choices) - 1}", str(label))
    return {"input": text, "choices": choices, "label": label}


# -------------------------------------------------------------------------------------- splitting


def _split(parts: dict[str, list[Row]], thing: str) -> dict[str, list[Row]]:
    """Three splits from those that a source has, called train, validation and test."""
    if len(parts) == 1 and "test" not in parts:
        return _deal(next(iter(parts.values())), {"train": 3, "reward": 1, "test": 1}, thing)
    if "train" not in parts:
        found = " and ".join(parts) or "neither"
        raise _wrong(thing, "the splits train and test", found, "add the missing file")
    if len(parts) == 3:
        return {"train": parts["train"], "reward": parts["validation"], "test": parts["test"]}
    held_out = parts["test"] if "test" in parts else parts["validation"]  # reported, not searched
    return _deal(parts["train"], {"train": 4, "reward": 1}, thing) | {"test": held_out}


def _deal(rows: list[Row], shares: dict[str, int], thing: str) -> dict[str, list[Row]]:
    """Deal rows out by their inputs in the given proportions; every split gets at least one."""
    inputs = sorted({row["input"] for row in rows})
    if len(inputs) < len(shares):
        expected = f"at least {len(shares)} different inputs, for {', '.join(shares)}"
        raise _wrong(thing, expected, str(len(inputs)), "add rows or provide the splits")
    parts = draw(len(inputs), shares, np.random.default_rng(SPLIT_SEED))
    owner = {inputs[i]: name for name, numbers in parts.items() for i in numbers}
    return {name: [row for row in rows if owner[row["input"]] == name] for name in shares}


def majority(rows: Sequence[Row]) -> tuple[int, float]:
    """The most frequent label (of several, the smallest) and its share of the rows, 0 to 1."""
    counts = Counter(row["label"] for row in rows)
    label = min(counts, key=lambda k: (-counts[k], k))
    return label, counts[label] / len(rows)


def chance(rows: Sequence[Row]) -> float:
    """Expected accuracy of a guess, 0 to 1: the mean of 1 / number of choices."""
    return sum(1 / len(row["choices"]) for row in rows) / len(rows)
