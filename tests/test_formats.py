"""Language tasks: the official files, a user's own rows, the draw of splits, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import types
from collections import Counter
from pathlib import Path

import huggingface_hub
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmm_lab.errors import InputError
from rmm_lab.tasks import text_formats as formats
from rmm_lab.tasks.files import SPLITS
from rmm_lab.tasks.text_formats import FORMATS, PROMPTS, chance, check, load, majority

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


def refusal(source: object) -> str:
    with pytest.raises(InputError) as caught:
        load(str(source))
    return str(caught.value)


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
    assert chance(rows) == 1 / 8 == FORMATS["qasc"].chance
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


@real
def test_the_unlabelled_test_file_of_wsc_is_refused():
    file = REAL / "wsc" / "test.jsonl"
    assert refusal(f"wsc:{file}") == (
        f"file {file}, line 1: expected a labelled row, found an unlabelled one (no 'label'); use a "
        "labelled file, or remove the row"
    )


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
    assert {name: f.chance for name, f in FORMATS.items() if f.chance != 1 / 2} == {"qasc": 1 / 8}


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
    ("bad", "message"),
    [
        ([1], "expected an object with input, choices and label, found [1]; correct the row"),
        (
            {"text": "a", "label": 0},
            "expected the fields input, choices and label, found text, label; add 'input', or give "
            "FORMAT:PATH if the file is an official one",
        ),
        (
            {},
            "expected the fields input, choices and label, found no field; add 'input', or give "
            "FORMAT:PATH if the file is an official one",
        ),
        (
            row() | {"label": None},
            "expected a labelled row, found an unlabelled one (no 'label'); add the label or remove it",
        ),
        (
            row() | {"input": 3},
            "expected 'input' to be a text that is not empty, found 3; correct the row",
        ),
        (
            row(" \t"),
            r"expected 'input' to be a text that is not empty, found ' \t'; correct the row",
        ),
        (
            row() | {"choices": "no"},
            "expected 'choices' to be a list of texts, found 'no'; correct the row",
        ),
        (
            row() | {"choices": ["a", 1]},
            "expected 'choices' to be a list of texts, found ['a', 1]; correct the row",
        ),
        (row() | {"choices": ["a"]}, "expected at least two choices, found 1; correct the row"),
        (row() | {"choices": []}, "expected at least two choices, found 0; correct the row"),
        (
            row() | {"choices": ["a", " "]},
            "expected no empty choice, found ['a', ' ']; correct the row",
        ),
        (
            row() | {"choices": ["a", "b", " b"]},
            "expected different choices, found 'b' twice; correct the row",
        ),
        (
            row() | {"label": True},
            "expected 'label' to be a whole number, that of the right choice, found True; "
            "correct the row",
        ),
        (
            row() | {"label": "0"},
            "expected 'label' to be a whole number, that of the right choice, found '0'; "
            "correct the row",
        ),
        (
            row() | {"label": 1.0},
            "expected 'label' to be a whole number, that of the right choice, found 1.0; "
            "correct the row",
        ),
        (row() | {"label": 2}, "expected 'label' from 0 to 1, found 2; correct the row"),
        (row() | {"label": -1}, "expected 'label' from 0 to 1, found -1; correct the row"),
        (
            row() | {"input": "", "choices": ["x" * 100]},
            "expected 'input' to be a text that is not empty, found ''; correct the row",
        ),
        (
            row() | {"choices": "x" * 100},
            "expected 'choices' to be a list of texts, found '" + "x" * 56 + "...; correct the row",
        ),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path, bad, message):
    with pytest.raises(InputError) as caught:
        check(bad, "here")
    assert str(caught.value) == f"here: {message}"
    file = write(tmp_path / "rows.jsonl", row(), "", bad)
    assert refusal(file) == f"file {file}, line 3: {message}"


def test_check_hands_out_the_three_fields():
    assert check(row() | {"id": 3}, "here") == row()
    assert check(row("a", 1), "here") == row("a", 1)


# ------------------------------------------------------------------------ bad official records

OFFICIAL = "check that the file is the official one of this format"


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        (
            "winogrande",
            {"sentence": "_", "option1": "a", "answer": "1"},
            f"expected a text 'option2', found sentence, option1, answer; {OFFICIAL}",
        ),
        (
            "winogrande",
            GAP | {"option2": 5, "answer": "1"},
            f"expected a text 'option2', found option2 = 5; {OFFICIAL}",
        ),
        (
            "winogrande",
            GAP | {"answer": "3"},
            "expected 'answer' to be one of 1, 2, found '3'; correct the row",
        ),
        (
            "winogrande",
            GAP | {"answer": ""},
            "expected a labelled row, found an unlabelled one (no 'answer'); use a labelled file, or "
            "remove the row",
        ),
        (
            "winogrande",
            GAP | {"option2": "Ann ", "answer": "1"},
            "expected different choices, found 'Ann' twice; correct the row",
        ),
        (
            "winogrande",
            [GAP],
            "expected an object with input, choices and label, found "
            "[{'sentence': 'Ann thanked Eve so _ smiled.', 'option1': ...; correct the row",
        ),
        (
            "wsc",
            WSC | {"target": SPAN, "label": "maybe"},
            "expected 'label' to be one of 0, 1, false, true, found 'maybe'; correct the row",
        ),
        (
            "wsc",
            WSC | {"target": SPAN, "label": -1},
            "expected a labelled row, found an unlabelled one (no 'label'); use a labelled file, or "
            "remove the row",
        ),
        (
            "wsc",
            WSC | {"label": True},
            "expected a whole number 'span2_index', found none; correct the row",
        ),
        (
            "qasc",
            QASC | {"question": {"stem": "What?", "choices": AI2}, "answerKey": "C"},
            "expected 'answerKey' to be one of A, B, found 'C'; correct the row",
        ),
        (
            "qasc",
            QASC | {"question": {"stem": "What?", "choices": ["rain"]}},
            "expected 'choices' with a 'text' and a 'label' of its own each, found ['rain']; "
            "correct the row",
        ),
        (
            "qasc",
            QASC | {"question": "What?", "choices": {"text": ["a", "b"], "label": ["A", "A"]}},
            "expected 'choices' with a 'text' and a 'label' of its own each, found "
            "{'text': ['a', 'b'], 'label': ['A', 'A']}; correct the row",
        ),
        (
            "qasc",
            QASC | {"question": "What?", "choices": {"text": ["a", "b"], "label": ["A"]}},
            "expected 'choices' with a 'text' and a 'label' of its own each, found "
            "{'text': ['a', 'b'], 'label': ['A']}; correct the row",
        ),
        (
            "quartz",
            {"answerKey": "A", "question": {"stem": "What?", "choices": AI2}},
            f"expected a text 'para', found answerKey, question; {OFFICIAL}",
        ),
        (
            "wikiqa",
            {"Question": "who", "Label": "0"},
            f"expected a text 'Sentence' or 'answer', found Question, Label; {OFFICIAL}",
        ),
    ],
)
def test_bad_official_records_are_named_by_file_and_line(tmp_path, name, record, message):
    file = write(tmp_path / "some.jsonl", record)
    assert refusal(f"{name}:{file}") == f"file {file}, line 1: {message}"


# ------------------------------------------------------------------------------- broken files


def test_broken_json(tmp_path):
    file = write(tmp_path / "rows.jsonl", row(), '{"input": "a", ')
    message = refusal(file)
    assert message.startswith(f"file {file}, line 2: expected one JSON object, found broken JSON (")
    assert message.endswith("; correct the line")
    file = write(tmp_path / "deep.jsonl", "[" * 100_000)
    assert refusal(file).startswith(f"file {file}, line 1: expected one JSON object, found broken")


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path):
    lines = [json.dumps(row(f"a\u2028b\x85{i}"), ensure_ascii=False) for i in range(3)]
    assert sum(map(len, load(str(write(tmp_path / "rows.jsonl", *lines))).values())) == 3


def test_windows_files_are_read(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(
        b"\xef\xbb\xbf" + b"".join(json.dumps(row(c)).encode() + b"\r\n" for c in "abc")
    )
    assert sorted(t for rows in load(str(file)).values() for t in inputs(rows)) == ["a", "b", "c"]


def test_bytes_that_are_not_utf8(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(json.dumps(row()).encode() + b'\n{"input": "caf\xe9"}\n')
    assert refusal(file) == (
        f"file {file}, line 2: expected UTF-8 text, found the byte 0xe9; save it as UTF-8"
    )


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_file(tmp_path, text):
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    assert refusal(file) == f"file {file}: expected at least one row, found none; copy it again"


@pytest.mark.parametrize("text", ["", "id\tsentence1\tsentence2\tlabel\n"])
def test_an_empty_table(tmp_path, text):
    file = tmp_path / "train.tsv"
    file.write_text(text)
    assert refusal(f"paws:{file}") == (
        f"file {file}: expected at least one row, found none; copy it again"
    )


@pytest.mark.parametrize(
    ("line", "found"), [("1\tA .\tB .", 3), ("1\tA .\tB .\t0\t\t", 6), ("1\tA .", 2)]
)
def test_a_line_of_a_table_with_other_columns(tmp_path, line, found):
    file = tmp_path / "train.tsv"
    file.write_text(f"id\tsentence1\tsentence2\tlabel\n1\tA .\tB .\t0\n{line}\n")
    assert refusal(f"paws:{file}") == (
        f"file {file}, line 3: expected 4 columns as in line 1, found {found}; correct the line"
    )


def test_a_table_without_a_column(tmp_path):
    file = tmp_path / "train.tsv"
    file.write_text("id\tsentence1\tlabel\n\n1\tA .\t0\n")  # an empty line is no row
    assert refusal(f"paws:{file}") == (
        f"file {file}, line 3: expected a text 'sentence2', found id, sentence1, label; {OFFICIAL}"
    )


def test_a_quote_that_never_ends(tmp_path):
    file = tmp_path / "train.tsv"
    file.write_text(
        'id\tsentence1\tsentence2\tlabel\n1\t"A .\tB .\t0\n' + "1\tA .\tB .\t0\n" * 20000
    )
    message = refusal(f"paws:{file}")
    assert message.startswith(f"file {file}, line ")
    assert message.endswith(
        ": expected a table, found broken columns (field larger than field limit (131072)); "
        "copy it again"
    )


def test_another_kind_of_file(tmp_path):
    for name in ("rows.parquet", "rows"):
        (tmp_path / name).write_bytes(b"x")
    assert refusal(tmp_path / "rows.parquet") == (
        f"file {tmp_path / 'rows.parquet'}: expected .jsonl, found '.parquet'; convert the file"
    )
    assert refusal(f"paws:{tmp_path / 'rows'}") == (
        f"file {tmp_path / 'rows'}: expected .jsonl or .tsv or .csv, found ''; convert the file"
    )


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    def refuse(file: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(file))

    file = write(tmp_path / "rows.jsonl", row())
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert refusal(file) == (
        f"file {file}: expected a file that can be read, found Permission denied; see to it"
    )


# ---------------------------------------------------------------------- sources that are not there


@pytest.mark.parametrize(
    "source", ["", "no-such", "winogrande", "C:\\rows", "/no/such/folder", "a b:c"]
)
def test_a_source_that_is_not_there(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal(source) == (
        f"language task {source!r}: expected a folder or file of rows, or FORMAT:PATH with one of the "
        f"formats {KNOWN}, found no such file or folder; check the spelling"
    )


@pytest.mark.parametrize(
    ("source", "name"),
    [("boolq:/data/boolq", "boolq"), ("Winogrande:.", "Winogrande"), ("hf-hub:a/b", "hf-hub")],
)
def test_an_unknown_format(source, name):
    assert refusal(source) == (
        f"language task {source!r}: expected one of the formats {KNOWN}, found {name!r}; "
        "check the spelling"
    )


def test_a_format_without_a_path_does_not_read_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("train.jsonl"), *(GAP | {"sentence": f"{i} _", "answer": "1"} for i in range(9)))
    assert refusal("winogrande:") == (
        "language task 'winogrande:': expected a folder, a file or hf-hub after the colon, found "
        "nothing; name one"
    )


def test_an_official_folder_that_is_not_there(tmp_path):
    source = f"winogrande:{tmp_path / 'no'}"
    assert refusal(source) == (
        f"language task {source!r}: expected a folder or file, found no {tmp_path / 'no'}; "
        "check the spelling"
    )


def test_a_folder_without_labelled_official_files(tmp_path):
    for name in ("test.jsonl", "b", "c", "d", "e", "f"):
        write(tmp_path / name, {"sentence": "_", "option1": "a", "option2": "b"})
    source = f"winogrande:{tmp_path}"
    assert refusal(source) == (
        f"language task {source!r}: expected the labelled files train_xl.jsonl and dev.jsonl in "
        f"{tmp_path}, found b, c, d, e, f, ...; put them there (from winogrande.allenai.org, CC BY)"
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    assert f"in {empty}, found nothing; put them there" in refusal(f"winogrande:{empty}")


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ([], "neither"),
        (["test"], "test"),
        (["val", "test"], "validation and test"),
        (["other"], "neither"),
    ],
)
def test_a_folder_without_train(tmp_path, names, found):
    for name in names:
        write(tmp_path / f"{name}.jsonl", row())
    assert refusal(tmp_path) == (
        f"language task {str(tmp_path)!r}: expected the splits train and test, found {found}; "
        "add the missing file"
    )


def test_an_official_folder_with_test_alone(tmp_path):
    wikiqa_folder(tmp_path)
    (tmp_path / "WikiQA-train.tsv").unlink()
    (tmp_path / "WikiQA-dev.tsv").unlink()
    assert "expected the splits train and test, found test; add" in refusal(f"wikiqa:{tmp_path}")


def test_two_files_for_the_reward_split(tmp_path):
    for name in ("train", "val", "dev", "test"):
        write(tmp_path / f"{name}.jsonl", row())
    assert refusal(tmp_path) == (
        f"language task {str(tmp_path)!r}: expected one file for the reward split, found several of "
        "val.jsonl, dev.jsonl; keep one of them"
    )


def test_too_few_different_inputs(tmp_path):
    file = write(tmp_path / "rows.jsonl", row("a"), row("a"), row("b"))
    assert refusal(file) == (
        f"language task {str(file)!r}: expected at least 3 different inputs, for train, reward, test, "
        "found 2; add rows or provide the splits"
    )
    write(tmp_path / "two" / "train.jsonl", row("a"), row("a", 1))
    write(tmp_path / "two" / "test.jsonl", row("c"))
    assert "expected at least 2 different inputs, for train, reward, found 1; add" in refusal(
        tmp_path / "two"
    )


# ------------------------------------------------------------------------------------- the hub

INSTEAD = (
    "get the official train_xl.jsonl and dev.jsonl elsewhere (from winogrande.allenai.org, CC BY), put "
    "them in a folder and give winogrande:FOLDER"
)
NO_LIBRARY = (
    "language task 'winogrande:hf-hub': expected the optional library datasets, found none; install it "
    f"with pip install -e '.[hub]', or {INSTEAD}"
)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # what an import of it then raises is real
    assert refusal("winogrande:hf-hub") == NO_LIBRARY


@pytest.mark.skipif(
    importlib.util.find_spec("datasets") is not None,
    reason="the library datasets is installed here",
)
def test_where_the_library_is_really_not_installed():
    assert refusal("winogrande:hf-hub") == NO_LIBRARY


@pytest.mark.parametrize("source", ["storycloze:hf-hub", "storycloze:hf-hub:me/story"])
def test_story_cloze_is_not_on_the_hub(source):
    assert refusal(source) == (
        f"language task {source!r}: expected a data set that the hub has, found one that it has not; "
        "get the official cloze_test_val__spring2016 - cloze_test_ALL_val.csv and "
        "cloze_test_test__spring2016 - cloze_test_ALL_test.csv elsewhere (from "
        "cs.rochester.edu/nlp/rocstories, on request), put them in a folder and give storycloze:FOLDER"
    )


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
    assert refusal("winogrande:hf-hub") == (
        "allenai/winogrande, train, row 1: expected 'answer' to be one of 1, 2, found '5'; correct the row"
    )
    fake_hub.data = {"train": []}
    assert refusal("winogrande:hf-hub") == (
        "allenai/winogrande, train: expected at least one row, found none; copy it again"
    )


ASK = "import sys; from rmm_lab.tasks import text_formats as formats\n"
ASK += "try: formats.load('winogrande:hf-hub')\n"
ASK += "except formats.InputError as error: print(error)"


def ask_hub(tmp_path: Path, library: str, **env: str) -> str:
    """The message in a fresh process; the library is FAKE, and fails the test if called, or real."""
    if library == "real" and importlib.util.find_spec("datasets") is None:
        pytest.skip("the library datasets is not installed here")
    if library == "fake":
        code = "def load_dataset(*args, **options): raise SystemExit('asked the library')\n"
        (tmp_path / "datasets.py").write_text(code)
        env["PYTHONPATH"] = str(tmp_path)
    env = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"} | env
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        cwd=Path(__file__).parents[1],
        env=os.environ | env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1, done.stdout
    return done.stdout.strip()


NEITHER = (
    "language task 'winogrande:hf-hub': expected allenai/winogrande on the hub, or with "
    "HF_HUB_OFFLINE=1 in its cache, found neither ("
)


@pytest.mark.parametrize("library", ["fake", "real"])
def test_where_nothing_listens(tmp_path, library):
    message = ask_hub(tmp_path, library, HF_ENDPOINT="http://127.0.0.1:9")
    assert message.startswith(NEITHER)
    assert message.endswith(f"; {INSTEAD}")


@pytest.mark.parametrize("library", ["fake", "real"])
def test_a_network_that_swallows_everything_does_not_hold_the_user(tmp_path, library):
    with socket.create_server(("127.0.0.1", 0)) as server:
        start = time.monotonic()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        message = ask_hub(tmp_path, library, HF_ENDPOINT=url)
        took = time.monotonic() - start
    assert message.startswith(NEITHER)
    assert took < 45  # seconds: a few of it is the wait; the rest is a busy machine's time to start


def test_offline_with_an_empty_cache(tmp_path):
    message = ask_hub(tmp_path, "real", HF_HUB_OFFLINE="1")
    assert message.startswith(NEITHER)
    assert message.endswith(f"; {INSTEAD}")


def test_the_seed_of_the_draw_is_fixed(tmp_path, monkeypatch):
    """Another seed, another draw: the seed is what decides, and nothing changes it but the code."""
    file = write(tmp_path / "rows.jsonl", *(row(f"{i:02}") for i in range(50)))
    before = load(str(file))
    monkeypatch.setattr(formats, "SPLIT_SEED", 1)
    assert load(str(file)) != before
