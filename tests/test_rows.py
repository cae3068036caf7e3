"""Rows of texts as people have them: kinds of files, names of fields, ways to write the right choice."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from pathlib import Path

import pandas as pd
import pytest
from t5_models import hf_model, write_t5

from rmm_lab.errors import InputError
from rmm_lab.families import t5
from rmm_lab.families.checkpoint import read_checkpoint
from rmm_lab.tasks.files import SPLITS
from rmm_lab.tasks.text_formats import load
from rmm_lab.tasks.text_rows import own, read

ROWS = [
    {"input": f"is {i} odd, or is it not?", "choices": ["no", "yes"], "label": i % 2}
    for i in range(10)
]


def json_lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(file: Path, rows=ROWS) -> Path:
    """By other libraries than ours: json, csv, pandas, gzip."""
    kind = file.name.partition(".")[2].removesuffix(".gz")
    if kind == "parquet":
        pytest.importorskip("pyarrow")
        pd.DataFrame(rows).to_parquet(file)
        return file
    if kind in ("csv", "tsv"):
        texts = [row | {"choices": json.dumps(row["choices"])} for row in rows]
        content = (
            pd.DataFrame(texts).to_csv(index=False, sep="," if kind == "csv" else "\t").encode()
        )
    elif kind == "json":
        content = json.dumps(rows, indent=1).encode()
    else:
        content = json_lines(rows)
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    return file


KINDS = ["jsonl", "json", "csv", "tsv", "parquet", "jsonl.gz", "json.gz", "csv.gz", "tsv.gz"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_any_kind_holds_the_same_rows(tmp_path, kind):
    assert read(write(tmp_path / f"x.{kind}")) == ROWS
    one = load(str(write(tmp_path / f"rows.{kind}")))
    assert one == load(str(write(tmp_path / "rows2.jsonl")))
    (tmp_path / "d").mkdir()
    for i, name in enumerate(("train", "val", "test")):
        write(tmp_path / "d" / f"{name}.{kind}", ROWS[3 * i : 3 * i + 3])
    folder = load(str(tmp_path / "d"))
    assert [folder[s] for s in SPLITS] == [ROWS[:3], ROWS[3:6], ROWS[6:9]]


def test_an_array_below_one_key_and_lines_under_the_name_of_json(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"data": ROWS}))
    (tmp_path / "b.json").write_bytes(json_lines(ROWS))
    assert read(tmp_path / "a.json") == read(tmp_path / "b.json") == ROWS
    (tmp_path / "c.json").write_text(json.dumps([*ROWS, {"input": "x"}]))
    with pytest.raises(InputError, match=r"c\.json, row 11: expected"):
        read(tmp_path / "c.json")


def test_choices_as_pandas_writes_lists(tmp_path):
    pd.DataFrame(ROWS).to_csv(tmp_path / "x.csv", index=False)
    assert "['no', 'yes']" in (tmp_path / "x.csv").read_text()
    assert read(tmp_path / "x.csv") == ROWS


def test_shards_of_the_hub_are_one_split_and_other_twins_are_refused(tmp_path):
    for i in range(2):
        write(tmp_path / f"train-0000{i}-of-00002.parquet", ROWS[5 * i : 5 * i + 5])
    write(tmp_path / "test.jsonl", ROWS[:1])
    splits = load(str(tmp_path))
    assert len(splits["train"]) + len(splits["reward"]) == 10
    write(tmp_path / "test.csv", ROWS[:1])
    with pytest.raises(InputError, match=r"one file for the test split.*test\.csv, test\.jsonl"):
        load(str(tmp_path))


def test_without_pyarrow_it_is_a_sentence(tmp_path, monkeypatch):
    file = write(tmp_path / "x.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="pip install pyarrow"):
        read(file)


@pytest.mark.parametrize(
    ("label", "choices", "number"),
    [
        ("0", ["yes", "no"], 0),
        (" 1 ", ["yes", "no"], 1),
        ("no", ["yes", "no"], 1),
        ("No ", ["yes", "no"], 1),
        (True, ["no", "yes"], 1),
        (True, ["yes", "no"], 0),  # by what it means, not by its number
        (False, ["True", "False"], 1),
        ("true", ["no", "yes"], 1),
        ("the sea", ["the sky", " the sea"], 1),
        ("1", ["1", "2"], None),  # the text of the first, the number of the second
        ("0", ["0", "1"], 0),  # both mean the same
        ("7", ["6", "7"], 1),
        (1, ["1", "2"], 1),  # a number is a number
        (True, ["coat", "brush"], None),
        ("hat", ["coat", "brush"], None),
        ("2", ["coat", "brush"], None),
    ],
)
def test_labels_that_are_unambiguous_are_read(tmp_path, label, choices, number):
    row = {"input": "x", "choices": choices, "label": label}
    (tmp_path / "x.jsonl").write_bytes(json_lines([row]))
    if number is None:
        with pytest.raises(InputError, match="line 1: expected 'label'"):
            read(tmp_path / "x.jsonl")
    else:
        assert read(tmp_path / "x.jsonl")[0]["label"] == number


def test_other_names_of_the_fields():
    row = {"input": "x", "options": ["a", "b"], "output": "b"}
    assert {k: own(row)[k] for k in ("input", "choices", "label")} == {
        "input": "x",
        "choices": ["a", "b"],
        "label": 1,
    }
    assert own(row | {"label": 0})["label"] == 0  # the usual name wins


@pytest.mark.parametrize("ending", ["", "-filtered"])
def test_wikiqa_from_its_sentence_files_alone(tmp_path, ending):
    """``WikiQASent-train.txt``: question, sentence, label; no first line with names."""
    for name, n in (("train", 6), ("dev", 2), ("test", 3)):
        with open(tmp_path / f"WikiQASent-{name}{ending}.txt", "w", newline="") as stream:
            rows = [(f"who is {i} ?", f'"{name} {i} .', int(i == 1)) for i in range(n)]
            csv.writer(stream, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None).writerows(
                rows
            )
    splits = load(f"wikiqa:{tmp_path}")
    assert [len(splits[s]) for s in SPLITS] == [6, 2, 3]
    assert splits["test"][1] == {
        "input": 'question: who is 1 ? sentence: "test 1 . does it answer the question?',
        "choices": ["no", "yes"],
        "label": 1,
    }


def test_packed_official_files(tmp_path):
    head = b"id\tsentence1\tsentence2\tlabel\n"
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.tsv.gz").write_bytes(gzip.compress(head + b"1\tA .\tB .\t1\n"))
    assert len(load(f"paws:{tmp_path}")["test"]) == 1


def test_choices_that_are_the_same_tokens_are_refused_with_their_row(tmp_path):
    folder = write_t5(tmp_path / "t5", hf_model(), tokenizer=True)
    base = read_checkpoint(folder)
    rows = [{"input": f"w{i}", "choices": ["w11", "w12"], "label": 0} for i in range(5)]
    (tmp_path / "d").mkdir()
    for name in SPLITS:
        write(tmp_path / "d" / f"{name}.jsonl", rows)
    assert len(t5.make_tasks(base, [str(tmp_path / "d")])[0].split("test")) == 5
    rows[3] = rows[3] | {"choices": ["w11", "\N{GRINNING FACE}", "\N{PIG}"]}
    write(tmp_path / "d" / "test.jsonl", rows)
    task = t5.make_tasks(base, [str(tmp_path / "d")])[0]
    task.split("reward")
    with pytest.raises(InputError, match=r"row 4 of the test split.*😀.*🐖"):
        task.split("test")
    write(tmp_path / "d.json", rows)
    assert t5.make_tasks(base, [str(tmp_path / "d.json")])[0].name == "d"
