"""The class's leaderboard: names, ties, duplicates and errors by hand, scores on a tiny problem."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rmm_lab.course import leaderboard, tiny
from rmm_lab.path import LayerPath
from rmm_lab.reward import Step, evaluate, parse_path

UNIFORM = "ties@0 ties@1 ties@2"


@pytest.fixture(scope="module")
def problem():
    return tiny.tiny_problem()


def write(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.txt").write_text(text, "utf-8")
    return folder


def given(text):
    """A judge whose scores are the text's numbers."""
    return text, np.array([float(word) for word in text.split()])


@pytest.mark.parametrize(
    ("name", "cleaned"),
    [
        ("ada_lovelace", "ada lovelace"),
        ("  Émilie   du Châtelet ", "Émilie du Châtelet"),
        ("Emmy\u202eNoether\x1b[31m|<b>", "Emmy Noether 31m b"),
        ("|", "no name"),
        ("x" * 99, "x" * 40),
    ],
)
def test_names_are_cleaned(name, cleaned):
    assert leaderboard.clean(name) == cleaned


def test_equal_rewards_share_a_rank_and_the_next_is_left_out(tmp_path):
    write(tmp_path, ada="0.9 0.5", Bob="0.5 0.9", cem="0.2 0.2", dia="0.8 0.8", eve="0.9 0.5")
    rows, errors = leaderboard.board(leaderboard.handed_in(tmp_path)[0], given)
    assert [(r["rank"], r["name"], r["note"]) for r in rows] == [
        *((1, "dia", ""), (2, "ada", ""), (2, "Bob", ""), (2, "eve", "the path of ada")),
        (5, "cem", ""),
    ]
    assert errors == []
    text = leaderboard.table(rows, ["fox: no path"], ["a", "b"])
    assert "| 5      | cem    | 20.0   | 20.0 | 20.0 |" in text
    assert text.endswith("Not counted:\n\n- fox: no path\n")


def test_who_hands_in_twice_does_not_count_and_other_files_are_named(tmp_path):
    write(tmp_path, ada="0.5", bob="0.7")
    (tmp_path / "ADA.json").write_text("{}")
    (tmp_path / "cem").mkdir()
    (tmp_path / "cem" / "path.json").write_text("{}")
    (tmp_path / "dia.docx").write_text("0.5")
    (tmp_path / ".hidden").write_text("")
    files, errors = leaderboard.handed_in(tmp_path)
    assert set(files) == {"bob", "cem"}
    assert len(errors) == 2
    assert errors[0].startswith("dia.docx: expected a .json or .txt file")
    assert errors[1].startswith("ADA: expected one path, found 2")


def test_scores_are_those_of_the_test_split_as_text_and_as_json(problem, tmp_path):
    path = parse_path(UNIFORM)
    whole = (Step("weight_average", -1), *path)  # the tiny problem's stem
    expected = evaluate(problem.pool, problem.tasks, whole, split="test")
    write(tmp_path, text=UNIFORM)
    json_text = LayerPath.of(problem.pool, path, "weight_average").to_json()
    (tmp_path / "json.json").write_text(json_text, "utf-8")
    score = leaderboard.judge(problem)
    rows, errors = leaderboard.board(leaderboard.handed_in(tmp_path)[0], score)
    assert errors == []
    assert [row["rank"] for row in rows] == [1, 1]
    assert [row["note"] for row in rows] == ["", "the path of json"]
    for row in rows:
        np.testing.assert_allclose(row["scores"], expected, atol=1e-9)
    searched = problem.scorer(fraction=1.0).score(path)
    assert not np.allclose(searched, expected), "the splits differ, or this test sees nothing"


def test_each_bad_file_is_one_sentence_and_stops_nobody_else(problem, tmp_path):
    other = json.loads(LayerPath.of(problem.pool, (Step("ties", 0),), "ties").to_json())
    other["experts"][0]["sha256"] = "0" * 12
    texts = {
        "words": ("my best path", "path: expected steps"),
        "source": ("base@0 nobody@1", "source 'nobody'"),
        "layer": ("ties@0 ties@3", "expected 1 to 6 layers from 0 to 2"),
        "long": ("ties@0 " * 7, "expected 1 to 6 layers"),
        "stem-alone": ("ties@-1", "expected 1 to 6 layers"),
        "empty": (" \n", "found an empty file"),
        "large": ("x" * 100_001, "expected at most 100000 bytes"),
        "json": ("{}", "layer path: expected JSON"),
        "deep": ('{"a":' * 5000, "cannot be built"),
        "models": (json.dumps(other), "expected the contest's models ramps, stripes"),
    }
    write(tmp_path, good=UNIFORM, **{name: text for name, (text, _) in texts.items()})
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    rows, errors = leaderboard.board(leaderboard.handed_in(tmp_path)[0], leaderboard.judge(problem))
    assert [row["name"] for row in rows] == ["good"]
    said = dict(error.split(": ", 1) for error in errors)
    assert set(said) == {"bytes", *texts}
    for name, (_, words) in texts.items():
        assert words in said[name]
        assert "\n" not in said[name]


def test_a_fit_to_hidden_inputs_is_refused(problem):
    data = json.loads(LayerPath.of(problem.pool, parse_path(UNIFORM), "ties").to_json())
    data["calibration"] = {"split": "test", "seed": 0, "tasks": []}
    with pytest.raises(leaderboard.InputError, match="expected inputs of the train split"):
        leaderboard.judge(problem)(json.dumps(data))


def test_the_standard_error_by_hand():
    """sqrt(0.5 * 0.5 / 100 + 0) / 2 = 0.025."""
    assert leaderboard.chance(np.array([0.5, 1.0]), [100, 7]) == pytest.approx(0.025)


def test_a_folder_without_paths_is_refused(tmp_path, capsys):
    assert leaderboard.main([str(tmp_path / "nowhere")]) == 2
    assert leaderboard.main([str(tmp_path)]) == 2
    assert "expected path files, found none" in capsys.readouterr().err
