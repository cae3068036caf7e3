"""Language tasks: the official files, a user's own rows, the draw of splits, and what is refused."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import types
from collections import Counter
from pathlib import Path

import huggingface_hub
import pytest
from conftest import finish
from hypothesis import given, settings
from hypothesis import strategies as st
from t5_models import write_texts

from rmm_lab.errors import InputError
from rmm_lab.tasks import text_rows
from rmm_lab.tasks.files import SPLITS
from rmm_lab.tasks.text_formats import FORMATS, PROMPTS, load
from rmm_lab.tasks.text_rows import chance, check, majority

REAL = Path(__file__).parents[2] / "shared" / "data"
KNOWN = "qasc, wikiqa, quartz, paws, storycloze, winogrande, wsc"
real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no official files in {REAL}")


def row(text: str = "a", label: int = 0) -> dict:
    return {"input": text, "choices": ["no", "yes"], "label": label}


def write(file: Path, *records: object) -> Path:
    """A .jsonl file of the records, one a line; a text is written as it stands."""
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return file


def records(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def refused(source: object, *words: object) -> None:
    """One sentence that holds all words."""
    with pytest.raises(InputError) as caught:
        load(str(source))
    sentence = str(caught.value)
    assert [word for word in map(str, words) if word not in sentence] == []
    assert "\n" not in sentence


def inputs(rows: list[dict]) -> list[str]:
    return [r["input"] for r in rows]


# ------------------------------------------------------------------------------ the real files


@real
@pytest.mark.parametrize("name", ["winogrande", "wsc", "qasc"])
def test_every_real_row_is_a_row_and_splits_share_no_input(name):
    splits = load(f"{name}:{REAL / name}")
    assert list(splits) == list(SPLITS)
    for split, rows in splits.items():
        for r in rows:
            assert set(r) == {"input", "choices", "label"}
            assert check(r, split) == r
        others = {t for s, o in splits.items() if s != split for t in inputs(o)}
        assert not others & set(inputs(rows))


@real
def test_winogrande():
    """Counted in the files: 10,234 train rows of which two are repeated, 1,267 of dev."""
    splits = load(f"winogrande:{REAL / 'winogrande'}")
    assert len(splits["train"]) + len(splits["reward"]) == 10234
    assert len(set(inputs(splits["train"]))) == 10232 - 2046
    assert len(set(inputs(splits["reward"]))) == 2046  # a fifth
    assert splits["test"][0] == {
        "input": "fill in the blank: Sarah was a much better surgeon than Maria so _ always got the "
        "easier cases.",
        "choices": ["Sarah", "Maria"],
        "label": 1,
    }
    official = (REAL / "winogrande" / "dev-labels.lst").read_text().split()
    assert [str(r["label"] + 1) for r in splits["test"]] == official
    assert majority(splits["test"]) == (1, 639 / 1267)
    assert chance(splits["test"]) == 0.5


@real
def test_the_largest_train_file_of_winogrande_is_taken(tmp_path):
    for name in ("train_xs.jsonl", "train_s.jsonl", "dev.jsonl"):
        (tmp_path / name).symlink_to(REAL / "winogrande" / name)
    splits = load(f"winogrande:{tmp_path}")
    assert len(splits["train"]) + len(splits["reward"]) == 640
    (tmp_path / "train_s.jsonl").unlink()
    splits = load(f"winogrande:{tmp_path}")
    assert (len(splits["train"]), len(splits["reward"])) == (128, 32)


@real
def test_wsc():
    splits = load(f"wsc:{REAL / 'wsc'}")
    train = splits["train"] + splits["reward"]
    assert Counter(r["label"] for r in train) == {0: 295, 1: 259}
    assert majority(splits["test"]) == (0, 66 / 104)
    assert {tuple(r["choices"]) for r in train} == {("no", "yes")}
    assert splits["test"][1] == {
        "input": "Mr. Moncrieff visited Chester 's luxurious New York apartment, thinking that it "
        "belonged to his son Edward . The result was that Mr. Moncrieff has decided to cancel Edward 's "
        "allowance on the ground that he no longer requires *his* financial support. "
        'question: does "his" refer to "Mr. Moncrieff"?',
        "choices": ["no", "yes"],
        "label": 1,
    }
    first = [r for r in train if r["input"].startswith("Mark told Pete many lies about himself")]
    text = (
        "Mark told Pete many lies about himself, which Pete included in his book. *He* should have "
    )
    assert (f'{text}been more skeptical. question: does "He" refer to "Mark"?', 0) in [
        (r["input"], r["label"]) for r in first
    ]


@real
def test_the_star_of_wsc_is_on_the_word_that_the_file_counts():
    off = []
    for name in ("train", "val"):
        for record in records(REAL / "wsc" / f"{name}.jsonl"):
            text = FORMATS["wsc"].convert(record)["input"].split(" question: does ")[0]
            starred = [i for i, word in enumerate(text.split(" ")) if "*" in word]
            assert len(starred) == 1
            if starred != [record["target"]["span2_index"]]:
                off.append((name, record["idx"], starred[0] - record["target"]["span2_index"]))
            assert text.replace("*", "").split() == record["text"].split()
            assert f"*{record['target']['span2_text']}*" in text
    assert off == [("val", 42, 1)]  # "... they might want to use it ,": the file counts "use"


@real
def test_the_star_of_wsc_is_needed():
    """12 prompts of the train file would stand there with both answers without it, none does with it."""
    plain: dict[str, set[int]] = {}
    starred: dict[str, set[int]] = {}
    for record in records(REAL / "wsc" / "train.jsonl"):
        r = FORMATS["wsc"].convert(record)
        starred.setdefault(r["input"], set()).add(r["label"])
        plain.setdefault(r["input"].replace("*", ""), set()).add(r["label"])
    assert sum(len(labels) > 1 for labels in plain.values()) == 12
    assert all(len(labels) == 1 for labels in starred.values())


@real
def test_qasc():
    """One official file: dealt; the counts of its answer keys A to H were taken from the file."""
    splits = load(f"qasc:{REAL / 'qasc' / 'dev.jsonl'}")
    assert load(f"qasc:{REAL / 'qasc'}") == splits  # the only labelled file there
    rows = [r for s in SPLITS for r in splits[s]]
    keys = [121, 103, 122, 111, 120, 104, 135, 110]
    assert [Counter(r["label"] for r in rows)[k] for k in range(8)] == keys
    assert chance(rows) == 1 / 8
    assert majority(rows) == (6, 135 / 926)
    assert 0.58 < len(splits["train"]) / 926 < 0.62
    assert 0.18 < len(splits["test"]) / 926 < 0.22
    assert {
        "input": "question: Climate is generally described in terms of what? facts: Climate is "
        "generally described in terms of temperature and moisture. Fire behavior is driven by local "
        "weather conditions such as winds, temperature and moisture.",
        "choices": [
            "sand",
            "occurs over a wide range",
            "forests",
            "Global warming",
            "rapid changes occur",
            "local weather conditions",
            "measure of motion",
            "city life",
        ],
        "label": 5,
    } in rows


# ----------------------------------------------- official records by hand, of the files and the hub

AI2 = [{"text": "rain", "label": "A"}, {"text": "wind", "label": "B"}]
AI2_HUB = {"text": ["rain", "wind"], "label": ["A", "B"]}
QASC = {"answerKey": "B", "fact1": "Wind is air.", "fact2": "Air moves."}
QUARTZ = {"answerKey": "A", "para": "More sun, more heat.", "para_id": "x"}
WSC = {"text": "Ann saw Eve. She ran.", "idx": 0}
SPAN = {"span1_index": 2, "span1_text": "Eve", "span2_index": 3, "span2_text": "She"}
STORY = {
    "InputSentence1": "One.",
    "InputSentence2": "Two.",
    "InputSentence3": "Three.",
    "InputSentence4": "Four.",
    "RandomFifthSentenceQuiz1": "Five.",
    "RandomFifthSentenceQuiz2": "Six.",
}
WIKI = {"QuestionID": "Q1", "Question": "who sang", "Sentence": "Ann sang .", "Label": "1"}
PAWS = {"id": "1", "sentence1": "A beat B .", "sentence2": "B beat A .", "label": "0"}
GAP = {"sentence": "Ann thanked Eve so _ smiled.", "option1": "Ann", "option2": "Eve"}
# format, record, input, choices, label
CASES = [
    (
        "qasc",
        QASC | {"question": {"stem": "What moves?", "choices": AI2}},
        "question: What moves? facts: Wind is air. Air moves.",
        ["rain", "wind"],
        1,
    ),
    (
        "qasc",
        QASC | {"question": "What moves?", "choices": AI2_HUB},
        "question: What moves? facts: Wind is air. Air moves.",
        ["rain", "wind"],
        1,
    ),
    (
        "quartz",
        QUARTZ | {"question": {"stem": "What falls?", "choices": AI2}},
        "More sun, more heat. What falls?",
        ["rain", "wind"],
        0,
    ),
    (
        "quartz",
        QUARTZ | {"question": "What falls?", "choices": AI2_HUB},
        "More sun, more heat. What falls?",
        ["rain", "wind"],
        0,
    ),
    (
        "wikiqa",
        WIKI,
        "question: who sang sentence: Ann sang . does it answer the question?",
        ["no", "yes"],
        1,
    ),
    (
        "wikiqa",
        {"question_id": "Q1", "question": "who sang", "answer": "Eve ran .", "label": 0},
        "question: who sang sentence: Eve ran . does it answer the question?",
        ["no", "yes"],
        0,
    ),
    (
        "paws",
        PAWS,
        "sentence 1: A beat B . sentence 2: B beat A . same meaning?",
        ["no", "yes"],
        0,
    ),
    (
        "paws",
        PAWS | {"id": 1, "label": 1},
        "sentence 1: A beat B . sentence 2: B beat A . same meaning?",
        ["no", "yes"],
        1,
    ),
    (
        "storycloze",
        STORY | {"AnswerRightEnding": "2"},
        "story: One. Two. Three. Four. ending:",
        ["Five.", "Six."],
        1,
    ),
    (
        "winogrande",
        GAP | {"answer": "1"},
        "fill in the blank: Ann thanked Eve so _ smiled.",
        ["Ann", "Eve"],
        0,
    ),
    (
        "wsc",
        WSC | {"target": SPAN, "label": True},
        'Ann saw Eve. *She* ran. question: does "She" refer to "Eve"?',
        ["no", "yes"],
        1,
    ),
    (
        "wsc",
        WSC | SPAN | {"label": 0},
        'Ann saw Eve. *She* ran. question: does "She" refer to "Eve"?',
        ["no", "yes"],
        0,
    ),
]


@pytest.mark.parametrize(("name", "record", "text", "choices", "label"), CASES)
def test_records_of_the_files_and_of_the_hub(name, record, text, choices, label):
    assert FORMATS[name].convert(record) == {"input": text, "choices": choices, "label": label}


def test_every_format_has_a_prompt_and_a_case():
    assert list(FORMATS) == list(PROMPTS) == KNOWN.split(", ")
    assert {name for name, *_ in CASES} == set(FORMATS)
    assert FORMATS["storycloze"].hub is None
    assert FORMATS["winogrande"].hub == ("allenai/winogrande", "winogrande_xl")


def test_braces_and_spaces_in_a_text_are_harmless():
    r = FORMATS["winogrande"].convert({**GAP, "sentence": " {x} {} _ ", "answer": "2"})
    assert r["input"] == "fill in the blank: {x} {} _"


def test_an_answer_that_is_offered_twice_counts_once():
    offered = {"text": ["ice", "fog", "ice ", "sun"], "label": ["A", "B", "C", "D"]}
    for key, label in (("A", 0), ("C", 0), ("B", 1), ("D", 2)):
        r = FORMATS["quartz"].convert(
            QUARTZ | {"question": "What?", "choices": offered, "answerKey": key}
        )
        assert (r["choices"], r["label"]) == (["ice", "fog", "sun"], label)


@pytest.mark.parametrize(
    ("text", "pronoun", "index", "marked"),
    [
        ("he saw that he ran", "he", 3, "he saw that *he* ran"),
        ("he saw that he ran", "he", 0, "*he* saw that he ran"),
        ("he saw that he ran", "he", 4, "he saw that *he* ran"),  # the nearest
        ('"Good for him," he said', "him", 2, '"Good for *him*," he said'),
        ("there the cat hid", "he", 2, "there the cat hid"),  # no such word: no star
    ],
)
def test_the_star_falls_on_the_nearest_such_word(text, pronoun, index, marked):
    record = {"text": text, "target": {**SPAN, "span2_text": pronoun, "span2_index": index}}
    r = FORMATS["wsc"].convert(record | {"label": True})
    assert r["input"].split(" question: ")[0] == marked


# -------------------------------------------------------------- official files by hand, and folders


def wikiqa_folder(folder: Path) -> Path:
    """Quotes in this TSV are text: a stray one must not swallow the lines after it."""
    folder.mkdir(parents=True, exist_ok=True)
    head = "QuestionID\tQuestion\tDocumentID\tDocumentTitle\tSentenceID\tSentence\tLabel\n"
    line = 'Q{0}\twho is {0}\tD{0}\tT\tD{0}-0\t"{0} is it .\t{1}\n'
    for split, numbers in (("train", range(5)), ("dev", [5]), ("test", [6, 7])):
        body = "".join(line.format(n, int(n == 6)) for n in numbers)
        (folder / f"WikiQA-{split}.tsv").write_text(head + body, "utf-8")
    return folder


def test_three_official_files_are_three_splits(tmp_path):
    wikiqa_folder(tmp_path)
    splits = load(f"wikiqa:{tmp_path}")
    assert {k: len(v) for k, v in splits.items()} == {"train": 5, "reward": 1, "test": 2}
    text = 'question: who is 6 sentence: "6 is it . does it answer the question?'
    assert splits["test"][0] == {"input": text, "choices": ["no", "yes"], "label": 1}
    assert splits["reward"][0]["input"].startswith("question: who is 5")
    assert majority(splits["test"]) == (0, 0.5)  # a tie: the smallest


def test_files_in_the_folder_of_the_official_archive_are_found(tmp_path):
    wikiqa_folder(tmp_path / "WikiQACorpus")
    assert len(load(f"wikiqa:{tmp_path}")["test"]) == 2


def test_overlapping_official_splits_are_left_as_they_are(tmp_path):
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.tsv").write_text(
            "id\tsentence1\tsentence2\tlabel\n1\tA .\tB .\t1\n", "utf-8"
        )
    splits = load(f"paws:{tmp_path}")
    assert inputs(splits["train"]) == inputs(splits["reward"]) == inputs(splits["test"])


def test_quoted_fields_of_paws(tmp_path):
    file = tmp_path / "train.tsv"
    line = '{0}\t"He said ""{0}"" ."\tB {0} .\t0\n'
    body = "".join(line.format(n) for n in range(5))
    file.write_text("id\tsentence1\tsentence2\tlabel\n" + body, "utf-8")
    splits = load(f"paws:{file}")
    assert {k: len(v) for k, v in splits.items()} == {"train": 3, "reward": 1, "test": 1}
    rows = [t for s in SPLITS for t in inputs(splits[s])]
    assert sorted(rows) == [
        f'sentence 1: He said "{n}" . sentence 2: B {n} . same meaning?' for n in range(5)
    ]


STORY_HEAD = (
    "InputStoryid,InputSentence1,InputSentence2,InputSentence3,InputSentence4,"
    "RandomFifthSentenceQuiz1,RandomFifthSentenceQuiz2,AnswerRightEnding"
)


def test_the_validation_file_of_story_cloze_is_trained_on(tmp_path):
    line = '{0},"Rick, {0}, grew up.",B.,C.,D.,"Good, then.",Bad.,{1}\n'
    train = tmp_path / "cloze_test_val__spring2016 - cloze_test_ALL_val.csv"
    train.write_text(STORY_HEAD + "\n" + "".join(line.format(n, 1) for n in range(10)), "utf-8")
    test = tmp_path / "cloze_test_test__spring2016 - cloze_test_ALL_test.csv"
    test.write_text(STORY_HEAD + "\n" + line.format("z", 2), "utf-8-sig")  # with a mark
    splits = load(f"storycloze:{tmp_path}")
    assert {k: len(v) for k, v in splits.items()} == {"train": 8, "reward": 2, "test": 1}
    assert splits["test"] == [
        {
            "input": "story: Rick, z, grew up. B. C. D. ending:",
            "choices": ["Good, then.", "Bad."],
            "label": 1,
        }
    ]


# ------------------------------------------------------------------------------------ own rows


@pytest.mark.parametrize("dev", ["reward", "val", "valid", "validation", "dev"])
def test_a_folder_of_rows(tmp_path, dev):
    for name, text in (("train", "a"), (dev, "b"), ("test", "c")):
        write(tmp_path / f"{name}.jsonl", row(text) | {"id": 7})
    assert load(str(tmp_path)) == {"train": [row("a")], "reward": [row("b")], "test": [row("c")]}


@pytest.mark.parametrize("other", ["reward", "val", "test"])
def test_with_train_and_one_other_file_the_other_is_the_test_split(tmp_path, other):
    write(tmp_path / "train.jsonl", *(row(str(i)) for i in range(10)))
    write(tmp_path / f"{other}.jsonl", row("held out"))
    splits = load(str(tmp_path))
    assert {k: len(v) for k, v in splits.items()} == {"train": 8, "reward": 2, "test": 1}
    assert inputs(splits["test"]) == ["held out"]
    assert sorted(inputs(splits["train"] + splits["reward"])) == [str(i) for i in range(10)]


@pytest.mark.parametrize(
    ("n", "counts"),
    [(3, (1, 1, 1)), (4, (2, 1, 1)), (7, (5, 1, 1)), (10, (6, 2, 2)), (50, (30, 10, 10))],
)
def test_a_single_file_is_dealt(tmp_path, n, counts):
    file = write(tmp_path / "rows.jsonl", *(row(f"{i:02}") for i in range(n)))
    splits = load(str(file))
    assert tuple(len(splits[s]) for s in SPLITS) == counts
    folder = tmp_path / "folder"
    write(folder / "train.jsonl", *(row(f"{i:02}") for i in range(n)))
    assert load(str(folder)) == splits  # whatever the file is called
    assert all(inputs(rows) == sorted(inputs(rows)) for rows in splits.values())  # the file's order


def dealt(rows: list[dict], *, with_test: bool) -> dict[str, list[dict]]:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "train.jsonl", *rows)
        if with_test:
            write(Path(folder) / "test.jsonl", row("test"))
        return load(folder)


def as_bag(rows: list[dict]) -> Counter:
    return Counter((r["input"], r["label"]) for r in rows)


rows_with_repeats = st.lists(
    st.builds(row, st.text("abc", min_size=1, max_size=3), st.integers(0, 1)),
    min_size=3,
    max_size=40,
).filter(lambda rows: len({r["input"] for r in rows}) >= 3)


@settings(max_examples=60, deadline=None)
@given(rows_with_repeats, st.booleans(), st.randoms(use_true_random=False))
def test_the_draw_is_a_partition_by_input_that_the_order_does_not_change(rows, with_test, random):
    splits = dealt(rows, with_test=with_test)
    drawn = [s for s in SPLITS if not (with_test and s == "test")]
    assert sum((as_bag(splits[s]) for s in drawn), Counter()) == as_bag(rows)
    groups = [set(inputs(splits[s])) for s in drawn]
    assert sum(map(len, groups)) == len(set().union(*groups)) == len(set(inputs(rows)))
    assert all(groups)
    fifth = max(1, len(set(inputs(rows))) // 5)
    assert [len(g) for g in groups[1:]] == [fifth] * (len(drawn) - 1)
    shuffled = [*rows]
    random.shuffle(shuffled)
    again = dealt(shuffled, with_test=with_test)
    assert {s: as_bag(again[s]) for s in SPLITS} == {s: as_bag(splits[s]) for s in SPLITS}


def test_the_draw_is_a_draw_and_the_same_in_every_process(tmp_path):
    file = write(tmp_path / "rows.jsonl", *(row(f"{i:02}") for i in range(50)))
    code = (
        "import json, sys; from rmm_lab.tasks import text_formats as formats; "
        "print(json.dumps(formats.load(sys.argv[1])), 'torch' in sys.modules)"
    )
    outs = [
        subprocess.run(
            [sys.executable, "-c", code, str(file)],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outs[0] == outs[1] == f"{json.dumps(load(str(file)))} False\n"  # and torch is not needed
    test = inputs(load(str(file))["test"])
    assert test not in ([f"{i:02}" for i in range(k, k + 10)] for k in range(41))  # not a block


def test_a_path_with_a_colon_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("my:rows") / "train.jsonl", *(row(str(i)) for i in range(3)))
    assert len(load("my:rows")["train"]) == 1


def test_a_home_folder_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "rows.jsonl", *(row(str(i)) for i in range(3)))
    assert len(load("~/rows.jsonl")["test"]) == 1
    write(tmp_path / "gaps.jsonl", *(GAP | {"sentence": f"{i} _", "answer": "1"} for i in range(3)))
    assert len(load("winogrande:~/gaps.jsonl")["test"]) == 1


def test_majority_and_chance_by_hand():
    rows = [row("a", 1), row("b", 1), row("c", 0)]
    rows.append({"input": "d", "choices": ["1", "2", "3", "4"], "label": 3})
    assert majority(rows) == (1, 0.5)
    assert chance(rows) == (3 * 0.5 + 0.25) / 4


# ------------------------------------------------------------------------------------ bad rows


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ([1], ["an object with input, choices and label", "found [1]"]),
        ({"text": "a", "label": 0}, ["found text, label", "add 'input'", "FORMAT:PATH"]),
        ({}, ["the fields input, choices and label", "no field"]),
        (row() | {"label": None}, ["an unlabelled one (no 'label')"]),
        (row() | {"input": 3}, ["'input' to be a text that is not empty", "found 3"]),
        (row(" \t"), ["'input' to be a text that is not empty", r"found ' \t'"]),
        (row() | {"choices": "no"}, ["'choices' to be a list of texts", "found 'no'"]),
        (row() | {"choices": ["a", 1]}, ["'choices' to be a list of texts", "found ['a', 1]"]),
        (row() | {"choices": ["a"]}, ["at least two choices", "found 1"]),
        (row() | {"choices": ["a", " "]}, ["no empty choice", "found ['a', ' ']"]),
        (row() | {"choices": ["a", "b", " b"]}, ["different choices", "found 'b' twice"]),
        (row() | {"choices": "x" * 100}, ["found '" + "x" * 56 + "...;"]),
        (row() | {"label": "maybe"}, ["'label' to be one of the choices", "found 'maybe'"]),
        (row() | {"label": "2"}, ["'label' to be one of the choices", "found '2'"]),
        (row() | {"label": 1.0}, ["'label' to be a whole number", "found 1.0"]),
        (row() | {"label": 2}, ["'label' from 0 to 1", "found 2"]),
        (row() | {"label": -1}, ["'label' from 0 to 1", "found -1"]),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path, bad, words):
    file = write(tmp_path / "rows.jsonl", row(), "", bad)
    refused(file, f"file {file}, line 3: expected", *words)


def test_check_hands_out_the_three_fields():
    assert check(row() | {"id": 3}, "here") == row()
    assert check(row("a", 1), "here") == row("a", 1)


OFFICIAL = "check that the file is the official one"
OWN_LABELS = "'choices' with a 'text' and a 'label' of its own each"
ASKED = {"question": "What?"}


@pytest.mark.parametrize(
    ("name", "record", "words"),
    [
        (
            "winogrande",
            {"sentence": "_", "option1": "a", "answer": "1"},
            ["a text 'option2'", "found sentence, option1, answer", OFFICIAL],
        ),
        ("winogrande", GAP | {"option2": 5, "answer": "1"}, ["'option2'", "option2 = 5", OFFICIAL]),
        ("winogrande", GAP | {"answer": "3"}, ["'answer' to be one of 1, 2", "found '3'"]),
        ("winogrande", GAP | {"answer": ""}, ["an unlabelled one (no 'answer')"]),
        ("winogrande", GAP | {"option2": "Ann ", "answer": "1"}, ["'Ann' twice"]),
        ("winogrande", [GAP], ["an object", "'option1': ...;"]),
        ("wsc", WSC | {"target": SPAN, "label": "maybe"}, ["0, 1, false, true", "found 'maybe'"]),
        ("wsc", WSC | {"target": SPAN, "label": -1}, ["an unlabelled one (no 'label')"]),
        ("wsc", WSC | {"label": True}, ["a whole number 'span2_index'", "found none"]),
        (
            "qasc",
            QASC | {"question": {"stem": "What?", "choices": AI2}, "answerKey": "C"},
            ["'answerKey' to be one of A, B", "found 'C'"],
        ),
        ("qasc", QASC | {"question": {"stem": "What?", "choices": ["rain"]}}, [OWN_LABELS]),
        ("qasc", QASC | ASKED | {"choices": AI2_HUB | {"label": ["A", "A"]}}, [OWN_LABELS]),
        ("qasc", QASC | ASKED | {"choices": AI2_HUB | {"label": ["A"]}}, [OWN_LABELS]),
        (
            "quartz",
            {"answerKey": "A", "question": {"stem": "What?", "choices": AI2}},
            ["a text 'para'", "found answerKey, question", OFFICIAL],
        ),
        ("wikiqa", {"Question": "who", "Label": "0"}, ["'Sentence' or 'answer'", OFFICIAL]),
    ],
)
def test_bad_official_records_are_named_by_file_and_line(tmp_path, name, record, words):
    file = write(tmp_path / "some.jsonl", record)
    refused(f"{name}:{file}", f"file {file}, line 1: expected", *words)


# ------------------------------------------------------------------------------- broken files

PAWS_HEAD = "id\tsentence1\tsentence2\tlabel\n"


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("rows.jsonl", '{"input": ', ["line 1", "one JSON object", "broken JSON"]),
        ("deep.jsonl", "[" * 100_000, ["line 1", "one JSON object", "broken"]),
        ("rows.jsonl", b'\n{"input": "caf\xe9"}\n', ["line 2", "UTF-8", "the byte 0xe9"]),
        ("rows.jsonl", "", ["at least one row"]),
        ("rows.jsonl", "\n \n", ["at least one row"]),
        ("train.tsv", "", ["at least one row"]),
        ("train.tsv", PAWS_HEAD, ["at least one row"]),
        ("train.tsv", f"{PAWS_HEAD}1\tA .\tB .\t0\n1\tA .\n", ["line 3", "4 columns", "found 2"]),
        ("train.tsv", f"{PAWS_HEAD}1\tA .\tB .\t0\t\t\n", ["line 2", "4 columns", "found 6"]),
        ("train.tsv", "id\tsentence1\tlabel\n\n1\tA .\t0\n", ["line 3", "'sentence2'", OFFICIAL]),
        (
            "train.tsv",
            f'{PAWS_HEAD}1\t"A .\tB .\t0\n' + "1\tA .\tB .\t0\n" * 20000,  # the quote never ends
            ["a table", "broken columns"],
        ),
        ("rows.parquet", "x", ["a parquet file that can be read"]),
        ("rows.jsonl.gz", "x", ["a whole .gz file"]),
        ("rows.xlsx", "x", ["expected .jsonl,", "found '.xlsx'"]),
        ("rows", "x", ["expected .jsonl,", "found ''"]),
    ],
)
def test_broken_files(tmp_path, file, content, words):
    path = tmp_path / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(f"paws:{path}" if file.endswith("tsv") else path, f"file {path}", *words)


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path):
    lines = [json.dumps(row(f"a\u2028b\x85{i}"), ensure_ascii=False) for i in range(3)]
    assert sum(map(len, load(str(write(tmp_path / "rows.jsonl", *lines))).values())) == 3


def test_windows_files_are_read(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(
        b"\xef\xbb\xbf" + b"".join(json.dumps(row(c)).encode() + b"\r\n" for c in "abc")
    )
    assert sorted(t for rows in load(str(file)).values() for t in inputs(rows)) == ["a", "b", "c"]


# ---------------------------------------------------------------------- sources that are not there


@pytest.mark.parametrize(
    ("files", "source", "words"),
    [
        ([], "", ["a folder or file of rows", KNOWN, "no such file or folder"]),
        ([], "no-such", ["a folder or file of rows", KNOWN, "no such file or folder"]),
        ([], "winogrande", ["FORMAT:PATH", "no such file or folder"]),
        ([], "C:\\rows", ["no such file or folder"]),  # a drive is no format
        ([], "boolq:/data", ["one of the formats", KNOWN, "found 'boolq'"]),
        ([], "Winogrande:.", ["one of the formats", "found 'Winogrande'"]),
        ([], "hf-hub:a/b", ["one of the formats", "found 'hf-hub'"]),
        (["train"], "winogrande:", ["after the colon", "found nothing"]),  # not the working folder
        ([], "winogrande:no", ["a folder or file", "found no no"]),
        (["test", "b", "c", "d", "e", "f"], "winogrande:.", ["b.jsonl, c.jsonl", "...; put them"]),
        ([], "winogrande:.", ["train_xl.jsonl and dev.jsonl", "found nothing", "winogrande.all"]),
        ([], ".", ["the splits train and test", "found neither"]),
        (["other"], ".", ["the splits train and test", "found neither"]),
        (["test"], ".", ["the splits train and test", "found test"]),
        (["val", "test"], ".", ["the splits train and test", "found validation and test"]),
        (["train", "val", "dev", "test"], ".", ["one file for the reward", "val.jsonl, dev.jsonl"]),
        (["one"], "one.jsonl", ["at least 3 different inputs", "train, reward, test", "found 1"]),
        (["train", "test"], ".", ["at least 2 different inputs", "train, reward", "found 1"]),
    ],
)
def test_a_source_that_is_not_there_or_not_whole(tmp_path, monkeypatch, files, source, words):
    monkeypatch.chdir(tmp_path)
    for name in files:
        write(Path(f"{name}.jsonl"), row())
    refused(source, f"language task {source!r}: expected", *words)


# ------------------------------------------------------------------------------------- the hub

INSTEAD = (
    "get the official train_xl.jsonl and dev.jsonl elsewhere (from winogrande.allenai.org, CC BY), put "
    "them in a folder and give winogrande:FOLDER"
)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # what an import of it then raises is real
    refused("winogrande:hf-hub", "the optional library datasets", "pip install", INSTEAD)


@pytest.mark.parametrize("source", ["storycloze:hf-hub", "storycloze:hf-hub:me/story"])
def test_story_cloze_is_not_on_the_hub(source):
    refused(source, "a data set that the hub has", "on request", "give storycloze:FOLDER")


@pytest.fixture
def fake_hub(monkeypatch) -> types.SimpleNamespace:
    """FAKE: no hub and no library, only what they are asked; ``data`` is what the library answers."""
    hub = types.SimpleNamespace(asked=[], loaded=[], data={})

    def dataset_info(self, repository, **options):
        hub.asked.append((repository, options))

    def load_dataset(*args, **options):
        hub.loaded.append((args, options))
        return hub.data

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return hub


@pytest.mark.parametrize(
    ("source", "repository", "config", "revision"),
    [
        ("winogrande:hf-hub", "allenai/winogrande", "winogrande_xl", None),
        ("winogrande:hf-hub:me/copy", "me/copy", "winogrande_xl", None),
        ("winogrande:hf-hub:me/copy@1f2e", "me/copy", "winogrande_xl", "1f2e"),
        ("winogrande:hf-hub@refs/x", "allenai/winogrande", "winogrande_xl", "refs/x"),
    ],
)
def test_what_the_hub_is_asked(fake_hub, source, repository, config, revision):
    gaps = [GAP | {"sentence": f"{i} _", "answer": "2"} for i in range(10)]
    unlabelled = [GAP | {"answer": ""}]
    fake_hub.data = {"train": gaps, "validation": [GAP | {"answer": "1"}], "test": unlabelled}
    splits = load(source)
    assert fake_hub.asked == [(repository, {"revision": revision, "timeout": 2})]
    options = {"revision": revision, "trust_remote_code": False}  # never a data set's own code
    assert fake_hub.loaded == [((repository, config), options)]
    # The official test split has no labels: validation takes its place.
    assert {k: len(v) for k, v in splits.items()} == {"train": 8, "reward": 2, "test": 1}
    assert splits["test"] == [FORMATS["winogrande"].convert(GAP | {"answer": "1"})]


def test_the_cache_is_used_without_asking_where_the_hub_is_switched_off(fake_hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    fake_hub.data = {name: [PAWS] for name in ("train", "validation", "test")}
    assert len(load("paws:hf-hub")["reward"]) == 1
    assert fake_hub.asked == []
    assert fake_hub.loaded[0][0] == ("google-research-datasets/paws", "labeled_final")


def test_a_hub_data_set_with_train_alone_is_dealt(fake_hub):
    fake_hub.data = {"train": [GAP | {"sentence": f"{i} _", "answer": "2"} for i in range(5)]}
    assert {k: len(v) for k, v in load("winogrande:hf-hub").items()} == {
        "train": 3,
        "reward": 1,
        "test": 1,
    }


def test_a_bad_row_of_the_hub_is_named(fake_hub):
    fake_hub.data = {"train": [GAP | {"answer": "1"}, GAP | {"answer": "5"}]}
    refused("winogrande:hf-hub", "allenai/winogrande, train, row 1: expected 'answer'", "found '5'")
    fake_hub.data = {"train": []}
    refused("winogrande:hf-hub", "allenai/winogrande, train: expected at least one row")


ASK = "from rmm_lab.errors import InputError; from rmm_lab.tasks import text_formats as formats\n"
ASK += "try: formats.load('winogrande:hf-hub')\n"
ASK += "except InputError as error: print(error)"


def start_asking(tmp_path: Path, library: str, **env: str) -> subprocess.Popen[str]:
    """A fresh process that asks; the library is FAKE, and fails the test if called, or real."""
    if library == "real" and importlib.util.find_spec("datasets") is None:
        pytest.skip("the library datasets is not installed here")
    if library == "fake":
        code = "def load_dataset(*args, **options): raise SystemExit('asked the library')\n"
        (tmp_path / "datasets.py").write_text(code)
        env["PYTHONPATH"] = str(tmp_path)
    env = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"} | env
    return subprocess.Popen(
        [sys.executable, "-c", ASK],
        cwd=Path(__file__).parents[1],
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def told(process: subprocess.Popen[str]) -> str:
    """The one line that it prints, within its own time limit."""
    done = finish(process)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1, done.stdout
    return done.stdout.strip()


NEITHER = (
    "language task 'winogrande:hf-hub': expected allenai/winogrande on the hub, or with "
    "HF_HUB_OFFLINE=1 in its cache, found neither ("
)


@pytest.mark.parametrize("library", ["fake", "real"])
def test_where_nothing_listens(tmp_path, library):
    with socket.socket() as deaf:  # a port that is taken, and does not listen
        deaf.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        message = told(start_asking(tmp_path, library, HF_ENDPOINT=url))
    assert message.startswith(NEITHER)
    assert message.endswith(f"; {INSTEAD}")


@pytest.mark.slow
def test_a_network_that_swallows_everything_does_not_hold_the_user(tmp_path):
    """With the library and without, at once: both wait for the same time limit."""
    libraries = ["fake"] + ["real"] * (importlib.util.find_spec("datasets") is not None)
    with socket.create_server(("127.0.0.1", 0)) as server, contextlib.ExitStack() as ends:
        url, started = f"http://127.0.0.1:{server.getsockname()[1]}", []
        for library in libraries:
            (own := tmp_path / library).mkdir()
            started.append(start_asking(own, library, HF_ENDPOINT=url))
            ends.callback(started[-1].kill)
        messages = [told(process) for process in started]
    assert all(message.startswith(NEITHER) for message in messages)


def test_offline_with_an_empty_cache(tmp_path):
    message = told(start_asking(tmp_path, "real", HF_HUB_OFFLINE="1"))
    assert message.startswith(NEITHER)
    assert message.endswith(f"; {INSTEAD}")


def test_the_seed_of_the_draw_is_fixed(tmp_path, monkeypatch):
    """Another seed, another draw: the seed is what decides, and nothing changes it but the code."""
    file = write(tmp_path / "rows.jsonl", *(row(f"{i:02}") for i in range(50)))
    before = load(str(file))
    monkeypatch.setattr(text_rows, "SPLIT_SEED", 1)
    assert load(str(file)) != before


@pytest.mark.parametrize("place", ["{}", "qasc:{}", "{}/train.jsonl"])
def test_what_stands_behind_a_folder_of_texts_is_refused(tmp_path, place):
    write_texts(tmp_path / "t1", 1, fixed=True)
    for part in (":first", ":third", ":"):
        source = place.format(tmp_path / "t1")
        said = f"expected nothing behind {source.removeprefix('qasc:')!r}, found {part!r}; leave it out"
        with pytest.raises(InputError, match=re.escape(f"language task {source + part!r}: {said}")):
            load(source + part)
