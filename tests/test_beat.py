"""Beat the agent: tries, their file, and the ranking, by hand on the environment test's scorer."""

from __future__ import annotations

import pytest
from test_env import Scores

from rmm_lab.course import beat
from rmm_lab.course.episode_walk import Walk
from rmm_lab.errors import InputError

WORTH = {"m0": 0.9, "m1": 0.3, "op0": 0.6, "op1": 0.0}


def score(path, subset):
    """A path is worth the mean of its sources."""
    return [sum(WORTH[step.source] for step in path) / 3] * 2 if path else [0.0, 0.0]


def play(view, *sources):
    view.walk.reset()
    for source in sources:
        view.press(source)


def test_tries_are_kept_ranked_and_handed_in(tmp_path):
    file = tmp_path / "own" / "scores.json"
    view = beat.Beat(Walk(Scores(score=score)), {"agent": 0.7}, beat.HighScores(file))
    assert not file.exists(), "nothing is written before the first try"
    with pytest.raises(InputError, match="found none; play first"):
        view.scores.hand_in(tmp_path / "ada.txt")
    play(view, "op0", "op0", "op0")
    play(view, "m0", "m0", "m1")  # a tie with the rival, who wins it
    play(view, "m0", "m0", "m0")
    play(view, "m0", "m0")  # has not ended
    view.undo_button.click()
    ranking = [(who, round(value, 3)) for who, value, _ in view.ranking()]
    assert ranking == [("you", 0.9), ("agent", 0.7), ("you", 0.7), ("you", 0.6)]
    assert view.ranks.value.count(". you ") == 3
    again = beat.HighScores(file)
    assert again.tries == view.scores.tries
    again.hand_in(tmp_path / "ada.txt")
    assert (tmp_path / "ada.txt").read_text() == "m0@0 m0@1 m0@2\n"


def test_a_penalty_and_an_empty_model_are_no_tries(tmp_path):
    scores = beat.HighScores(tmp_path / "scores.json")
    view = beat.Beat(Walk(Scores(score=score), masked=False), {}, scores)
    view.press("back")
    play(view, "skip", "skip", "skip")
    assert view.walk.done
    assert scores.tries == {}


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "scores.json").write_text("[1, 2]")
    with pytest.raises(InputError, match="expected paths and rewards as JSON"):
        beat.HighScores(tmp_path / "scores.json")


def test_random_rewards_are_of_whole_paths_and_repeat():
    scorer = Scores(score=score, chooses_stem=True)
    first = beat.random_rewards(scorer, 3)
    assert [[step.layer for step in path] for path, _ in scorer.calls] == [[-1, 0, 1, 2]] * 3
    assert beat.random_rewards(scorer, 3) == first
    assert len(set(first)) > 1
    assert beat.everywhere(scorer, "op0") == pytest.approx(0.8)  # four places over three
