"""The final choice: the shortlist by hand, the candidates, their order."""

from __future__ import annotations

import numpy as np
import pytest

from rmm_lab.errors import InputError
from rmm_lab.reward import parse_path
from rmm_lab.search.finalists import candidates, legal, rank, shortlist


def test_the_shortlist_shrinks_means_towards_the_mean_of_all():
    """By hand: the mean of all is 0.6; each path's mean counts it twice more."""
    scored = [("lucky", 0.9), *[("steady", 0.8)] * 3, ("poor", 0.1), ("poor", 0.2)]
    # lucky (0.9 + 1.2) / 3 = 0.7; steady (2.4 + 1.2) / 5 = 0.72; poor (0.3 + 1.2) / 4 = 0.375
    assert sum(v for _, v in scored) / len(scored) == pytest.approx(0.6)
    assert shortlist(scored, 9) == ["steady", "lucky", "poor"]
    assert shortlist(scored, 2) == ["steady", "lucky"]
    assert shortlist([], 3) == []


def test_equal_paths_come_in_alphabetical_order():
    assert shortlist([("b", 0.5), ("a", 0.5), ("c", 0.5)], 2) == ["a", "b"]


def test_illegal_episodes_are_left_out():
    log = (("a@0", 0.2, 0), ("c@0", -0.1, 1))
    rows = [{"path": p, "raw_reward": r, "penalised": i} for p, r, i in log]
    assert legal(rows) == [("a@0", 0.2)]


def test_candidates_are_answers_then_the_best_of_what_was_scored():
    scored = [("a@0", 0.2), ("b@0", 0.9), ("c@0", 0.6), ("d@0", 0.4)]
    a, b, c, d, m, n, o = (parse_path(f"{name}@0") for name in "abcdmno")
    assert candidates(scored, 9) == {b: "best", c: "best", d: "best", a: "best"}
    assert candidates(scored, 2, [m]) == {m: "scales", b: "best"}
    assert list(candidates(scored, 3, [m, d])) == [m, d, b]
    assert candidates(scored, 9, [d])[d] == "scales"  # once, as what it was first
    assert list(candidates(scored, 4, [m, b, m, n, o])) == [m, b, n, c]  # three quarters
    assert list(candidates(scored, 10, [m, b, n, o])) == [m, b, n, o, c, d, a]
    assert candidates(scored, 0, [m]) == {}


class Table:
    """A scorer by a table, that notes what it is asked for."""

    def __init__(self, worth):
        self.worth, self.asked = worth, []

    def score(self, path, subset=None):
        self.asked.append((path, subset))
        return np.array(self.worth[path])


def test_candidates_are_ranked_on_all_examples():
    a, b, c, d = (parse_path(text) for text in ("a@0 a@1", "b@0", "c@0 c@1", "d@0 d@1"))
    scorer = Table({a: [0.2, 0.4], b: [0.9, 0.1], c: [0.5, 0.5], d: [1.0, 0.8]})
    ranked = rank(scorer, {a: "best", c: "greedy", d: "scales", b: "best"})
    # b and c are equal: the shorter one comes first
    assert [r["path"] for r in ranked] == [d, b, c, a]
    assert [r["found"] for r in ranked] == ["scales", "best", "greedy", "best"]
    assert [r["reward"] for r in ranked] == pytest.approx([0.9, 0.5, 0.5, 0.3])
    assert {subset for _, subset in scorer.asked} == {None}


def test_no_candidate_is_refused():
    with pytest.raises(InputError, match="at least one legal episode, found none"):
        rank(Table({}), {})
