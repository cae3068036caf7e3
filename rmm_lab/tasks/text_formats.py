"""Language tasks from the official files, from the hub, or from your own rows.

As with images, every task has three splits: ``train`` to fine-tune, ``reward`` to search, ``test`` to report.
"""

from __future__ import annotations

import csv
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmm_lab.tasks import hub
from rmm_lab.tasks.files import content, format_of, nearly
from rmm_lab.tasks.text_rows import KINDS, Quoting, Row, checked, kind_of, read, short, split, wrong

# What a model reads in each official task, and what it chooses from; OWN: the record's answers.
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
    """With stars around the pronoun in question, as in T5's prompts.

    Without them, 12 prompts of the official train file occur both with yes and with no: the same pronoun
    occurs twice in the text and means two people.
    """
    spans = record.get("target", record)  # nested in SuperGLUE's files, flat on the hub
    if not isinstance(spans, dict) or type(spans.get("span2_index")) is not int:
        raise wrong("", "a whole number 'span2_index'", "none", "correct the row")
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
        raise wrong("", expected, short(offered), "correct the row") from error
    choices = list(dict.fromkeys(answers.values()))
    numbers = {letter: choices.index(text) for letter, text in answers.items()}
    return question, choices, _label(record, numbers, "answerKey")


def _text(record: Row, *names: str) -> str:
    """The first of the fields that is there, stripped; the names are those of the files and the hub."""
    for name in names:
        if isinstance(record.get(name), str):
            return record[name].strip()
    others = ", ".join(f"{name} = {short(record[name])}" for name in names if name in record)
    found = others or ", ".join(map(str, record)) or "no field"
    remedy = "check that the file is the official one of this format"
    raise wrong("", f"a text {' or '.join(map(repr, names))}", found, remedy)


def _label(record: Row, numbers: Mapping[str, int], name: str) -> int:
    value = record.get(name, record.get(name.lower()))
    if value in (None, "", -1, "-1"):
        remedy = "use a labelled file, or remove the row"
        raise wrong("", "a labelled row", f"an unlabelled one (no {name!r})", remedy)
    text = str(value).lower() if isinstance(value, bool) else str(value).strip()
    if text not in numbers:
        expected = f"{name!r} to be one of {', '.join(numbers)}"
        raise wrong("", expected, short(value), "correct the row")
    return numbers[text]


# ------------------------------------------------------------------------------ where they come from


@dataclass(frozen=True)
class Format:
    """An official data set, and how to make a row of one of its records."""

    convert: Callable[[Row], Row]
    files: Mapping[str, tuple[str, ...]]  # labelled split -> names of its file, the best first
    folder: str  # where the official archive keeps them
    hub: tuple[str, str | None] | None  # data set and configuration
    source: str  # and licence
    quoting: Quoting = csv.QUOTE_MINIMAL  # of a TSV or CSV file, as the data set's readers do
    columns: tuple[str, ...] = ()  # of its .txt files, which do not name them


_JSONL = {"train": ("train.jsonl",), "validation": ("dev.jsonl", "val.jsonl")}
_TSV = {"train": ("train.tsv",), "validation": ("dev.tsv",), "test": ("test.tsv",)}
FORMATS: dict[str, Format] = {
    "qasc": Format(
        convert=_qasc,
        files=_JSONL,
        folder="QASC_Dataset",
        hub=("allenai/qasc", None),
        source="allenai.org/data/qasc, CC BY 4.0",
    ),
    "wikiqa": Format(
        convert=_wikiqa,
        files={
            part: (
                *(f"WikiQA-{name}.tsv", f"{name}.tsv", f"WikiQASent-{name}.txt"),
                *(f"WikiQASent-{name}.tsv", f"WikiQASent-{name}-filtered.txt"),
            )
            for part, name in (("train", "train"), ("validation", "dev"), ("test", "test"))
        },
        columns=("Question", "Sentence", "Label"),
        folder="WikiQACorpus",
        hub=("microsoft/wiki_qa", None),
        source="aka.ms/WikiQA, Microsoft Research Data License",
        quoting=csv.QUOTE_NONE,
    ),
    "quartz": Format(
        convert=_quartz,
        files={**_JSONL, "test": ("test.jsonl",)},
        folder="quartz-dataset-v1-aug2019",
        hub=("allenai/quartz", None),
        source="allenai.org/data/quartz, CC BY 4.0",
    ),
    "paws": Format(
        convert=_paws,
        files=_TSV,
        folder="final",
        hub=("google-research-datasets/paws", "labeled_final"),
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
        source="winogrande.allenai.org, CC BY",
    ),
    "wsc": Format(
        convert=_wsc,
        files={**_JSONL, "validation": ("val.jsonl", "dev.jsonl")},
        folder="WSC",
        hub=("aps/super_glue", "wsc"),
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
              ``test.jsonl`` of rows, or a single file of rows. In place of ``.jsonl``: ``.json`` (an array),
              ``.csv``, ``.tsv``, ``.parquet``; all but the last also as ``.gz``. See ``text_rows.own``.

    Missing splits are drawn with a fixed seed: with train and one other file, the other is the test split
    and a fifth of train the reward split; a file, or train alone, is split 60 : 20 : 20. The
    draw depends on the inputs, not on their order, and keeps equal inputs together; texts that are merely
    alike, such as Winogrande's twins, may be separated.

    Raises InputError for anything that is missing, broken or unlabelled.
    """
    thing = f"language task {source!r}"
    path = Path(source).expanduser()
    if name := format_of(source, FORMATS, thing):
        rest = source.removeprefix(f"{name}:")
        if not rest:
            raise wrong(thing, "a folder, a file or hf-hub after the colon", "nothing", "name one")
        if hub.is_hub(rest):
            return split(_from_hub(name, rest, thing), thing)
        return split(_from_files(FORMATS[name], Path(rest).expanduser(), thing), thing)
    if path.is_file():
        return split({"train": read(path)}, thing)
    if not source or not path.is_dir():
        formats = ", ".join(FORMATS)
        expected = f"a folder or file of rows, or FORMAT:PATH with one of the formats {formats}"
        raise wrong(thing, expected, "no such file or folder", "check the spelling")
    parts: dict[str, list[Path]] = {}
    for name in ("train", *_VALIDATION, "test"):
        part = "validation" if name in _VALIDATION else name
        parts.setdefault(part, []).extend(_own_files(path, name))
    for part, files in parts.items():
        if len(files) > 1 and not all("-of-" in f.name for f in files):
            which = "reward" if part == "validation" else part
            found = f"several of {', '.join(f.name for f in files)}"
            raise wrong(thing, f"one file for the {which} split", found, "keep one of them")
    _check_names(path, [f for files in parts.values() for f in files], thing)
    rows = {part: [row for f in files for row in read(f)] for part, files in parts.items() if files}
    if [*rows] == ["validation"]:  # of a whole set it would be the test split
        found = parts["validation"][0].name
        raise wrong(thing, "the splits train and test", f"{found} alone", "add the missing file")
    return split(rows, thing)


def _own_files(folder: Path, name: str) -> list[Path]:
    """The file of a split, of any kind, or the hub's shards of one: NAME-00000-of-00002.parquet."""
    kinds = "|".join(kind[1:] for kind in KINDS)
    pattern = re.compile(rf"{name}(-\d+-of-\d+)?\.({kinds})(\.gz)?", re.IGNORECASE)
    return sorted(f for f in folder.iterdir() if pattern.fullmatch(f.name))


def _check_names(folder: Path, used: Sequence[Path], thing: str) -> None:
    """InputError for a file of rows, or a folder, that is nearly called like a split, such as tets.jsonl."""
    for file in sorted(folder.iterdir()):
        stem = file.name.partition(".")[0]
        is_rows = not file.name.startswith(".") and (kind_of(file) in KINDS or file.is_dir())
        if (
            is_rows
            and file not in used
            and (meant := nearly(stem, ("train", *_VALIDATION, "test")))
        ):
            found = f"{file.name}{'/' if file.is_dir() else ''}"
            raise wrong(thing, f"a file called {meant}.jsonl or another name", found, "rename it")


def _from_files(form: Format, path: Path, thing: str) -> dict[str, list[Row]]:
    if path.is_file():
        return {"train": read(path, form.convert, form.quoting, form.columns)}
    if not path.is_dir():
        remedy = f"check the spelling, or get {_names(form)} from {form.source}"
        raise wrong(thing, "a folder or file", f"no {path}", remedy)
    for folder in (path, path / form.folder):
        found: dict[str, list[Row]] = {}
        for part, names in form.files.items():
            either = (folder / f"{n}{packed}" for n in names for packed in ("", ".gz"))
            if file := next((f for f in either if f.exists()), None):
                found[part] = read(file, form.convert, form.quoting, form.columns)
        if found:
            return found
    remedy = f"put them there (from {form.source})"
    raise wrong(thing, f"the labelled files {_names(form)} in {path}", content(path), remedy)


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
        raise wrong(thing, "a data set that the hub has", "one that it has not", remedy)
    repository, revision = hub.parse(rest, form.hub[0])
    data = hub.load(repository, form.hub[1], revision, thing=thing, remedy=remedy)
    parts = {}
    for part in form.files:
        if part in data:
            rows = ((f"{repository}, {part}, row {i}", row) for i, row in enumerate(data[part]))
            parts[part] = checked(rows, f"{repository}, {part}", form.convert)
    return parts
