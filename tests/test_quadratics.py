"""MAP's three forms: the fit, where its points lie by hand, pairs of many tasks."""

from __future__ import annotations

import numpy as np
import pytest
from test_front_searches import UNIT, Valley

from rmm_lab.fronts import quadratics
from rmm_lab.fronts.quadratics import map_bayesian, map_nested, map_surrogate, nest
from rmm_lab.fronts.searches import FRONT_SEARCHES
from rmm_lab.reward import parse_path
from rmm_lab.search.preferences import Ends

# ----------------------------------------------------------------------------------------- the fit


def test_the_fit_of_map_recovers_a_quadratic():
    rng = np.random.default_rng(0)
    c, true = rng.uniform(-0.2, 1.5, (30, 2)), np.array([-2.0, 3.0, 1.0, -1.5, 0.5, -2.0])
    logits = true[0] + c @ true[1:3] + true[3] * c[:, 0] ** 2
    logits += true[4] * c[:, 0] * c[:, 1] + true[5] * c[:, 1] ** 2
    found = quadratics.fit_quadratic(c, 1 / (1 + np.exp(-logits)))
    assert found == pytest.approx(true, abs=1e-2)


def test_the_fit_takes_fewer_points_than_unknowns():
    c = np.array([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]])
    found = quadratics.fit_quadratic(c, np.array([0.0, 1.0, 0.5]))
    guessed = quadratics.sigmoid(quadratics.quadratic(c) @ found)
    assert guessed == pytest.approx([0, 1, 0.5], abs=0.02)


def test_a_design_has_each_alone_and_equal_ones_first():
    found = quadratics.design(3, 20, np.random.default_rng(0))
    assert found.shape == (20, 3)
    assert found[:3].tolist() == np.eye(3).tolist()
    assert found[3:8].tolist() == [[s] * 3 for s in (0.3, 0.4, 0.5, 0.6, 0.8)]
    assert len({tuple(row) for row in found}) == 20
    assert found.min() < 0 < 1.2 < found.max() < 1.5
    assert len(quadratics.design(3, 2, np.random.default_rng(0))) == 8
    assert [quadratics.unknowns(n) for n in (2, 3, 8)] == [6, 10, 45]


def test_half_of_the_budget_is_designed_and_half_scores_answers():
    scorer = Valley()
    out = map_surrogate(scorer, 200, 1, UNIT)
    paths = [text for text, _ in out[out.begun :]]
    half = (200 - out.begun) // 2
    again = quadratics.design(2, half, np.random.default_rng(1))
    scales = [parse_path(text)[0].scales for text in paths]
    assert scales[:half] == [tuple(row) for row in again.round(3).tolist()]
    # Then answers alone, most of which are near the front, whose sums are up to 1.595.
    assert np.median(np.sum(out.by_task[out.begun + half :], axis=1)) > 1.5
    assert np.median(np.sum(out.by_task[out.begun : out.begun + half], axis=1)) < 1.4


# -------------------------------------------------------------------------------------- Bayesian


def test_directions_and_points_are_inverse():
    assert quadratics.angles_of(np.array([[1.0, 1.0], [2.0, 0.0], [0.0, 3.0]])) == pytest.approx(
        np.pi / 4 * np.array([[1], [0], [2]])
    )
    # z alone, x = y, and the space diagonal: cos = 1 / sqrt 3.
    three = np.array([[0, 0, 1.0], [1, 1, 0], [1, 1, 1]])
    assert quadratics.angles_of(three) == pytest.approx(
        np.array([[np.pi / 2] * 2, [np.pi / 4, 0], [np.arccos(3**-0.5), np.pi / 4]])
    )
    points = np.random.default_rng(0).uniform(0.1, 1, (9, 4))
    angles = quadratics.angles_of(points)
    assert angles.shape == (9, 3)
    assert quadratics.points_at(angles, np.linalg.norm(points, axis=1)) == pytest.approx(points)


def test_bins_of_directions_by_hand():
    right = np.pi / 2
    angles = np.array([0.0, 0.24, 0.26, 0.76, 1.0, 1.4]) * right
    assert quadratics.bins_of(angles, 4).tolist() == [0, 0, 1, 3, 3, 3]
    assert quadratics.bins_of(angles, 2).tolist() == [0, 0, 0, 1, 1, 1]


def test_new_points_lie_where_the_fit_is_worst():
    rng = np.random.default_rng(0)
    angles = np.repeat([[0.1], [0.5], [0.9], [1.3]], 2, 0)  # two in each of four bins
    points = quadratics.points_at(angles, np.ones(8))

    def shares(errors):
        found = quadratics.least_known(points, np.array(errors), 4000, rng)
        radius = np.linalg.norm(found, axis=1)
        assert 0.2 < radius.min() < 0.21 < 0.79 < radius.max() < 0.8
        assert radius.mean() == pytest.approx(0.5, abs=0.02)
        own = quadratics.angles_of(found)
        within = own % (np.pi / 8)
        assert within.mean() == pytest.approx(np.pi / 16, abs=0.01)  # uniform in its bin
        return np.bincount(quadratics.bins_of(own, 4)[:, 0], minlength=4) / 4000

    assert shares([0.2] * 8) == pytest.approx([0.25] * 4, abs=0.03)
    # Means 0.07 and 0: e to 1.
    wanted = np.array([1, np.e, 1, 1]) / (3 + np.e)
    assert shares([0, 0, 0.07, 0.07, 0, 0, 0, 0]) == pytest.approx(wanted, abs=0.03)
    # The same means, of 0 and 0.14: half of the deviation of 0.07 comes on top, in the last.
    wanted = np.array([1, 1, np.e, np.e**1.5]) / (2 + np.e + np.e**1.5)
    assert shares([0, 0, 0, 0, 0.07, 0.07, 0, 0.14]) == pytest.approx(wanted, abs=0.03)


def test_a_direction_without_points_is_worth_what_all_are():
    rng = np.random.default_rng(0)
    points = quadratics.points_at(np.array([[0.1], [0.1], [0.5]]), np.ones(3))
    found = quadratics.least_known(points, np.array([0.0, 0.0, 0.21]), 4000, rng)
    share = np.bincount(quadratics.bins_of(quadratics.angles_of(found), 4)[:, 0]) / 4000
    all_of_them = 0.07 + 0.5 * np.std([0, 0, 0.21])
    worth = np.exp(np.array([0, 0.21, all_of_them, all_of_them]) / 0.07)
    assert share == pytest.approx(worth / worth.sum(), abs=0.03)


@pytest.mark.parametrize(("n", "bins"), [(3, 16), (4, 8)])
def test_how_many_directions_there_are(n, bins):
    rng = np.random.default_rng(0)
    found = quadratics.least_known(np.eye(n), np.zeros(n), 2000, rng)
    each = round(bins ** (1 / (n - 1)))
    assert (
        len({tuple(row) for row in quadratics.bins_of(quadratics.angles_of(found), each)}) == bins
    )
    assert (found >= 0).all()


def test_bayesian_map_goes_on_where_a_quadratic_is_wrong():
    """A kink that no quadratic has, for much of the first expert and little of the second."""

    class Kink(Valley):
        def score(self, path, subset=None):
            found = super().score(path, subset)
            a, b = path[0].scales or (0, 0)
            return found * (0.2 if 0.2 < a < 0.6 and 0 <= b < 0.4 * a else 1)

    def beyond(search):
        out = search(Kink(), 300, 1, UNIT)
        rows = [parse_path(text)[0].scales for text, _ in out[out.begun + 12 : 150]]
        return np.mean([b < 0.414 * a for a, b in rows])  # the first of four directions

    assert beyond(map_bayesian) > 0.33
    # Of a square of scales it is less than a quarter.
    assert beyond(map_bayesian) > beyond(map_surrogate)


def test_bayesian_map_begins_as_map_does():
    one, two = Valley(), Valley()
    first, second = map_surrogate(one, 300, 1, UNIT), map_bayesian(two, 300, 1, UNIT)
    same = first.begun + 12
    assert first[:same] == second[:same]
    assert first[same:] != second[same:]
    found = np.array([parse_path(text)[0].scales for text, _ in second[same:150]])
    radius = np.linalg.norm(found, axis=1)
    assert (found >= 0).all()
    assert radius.min() > 0.19
    assert radius.max() < 0.81


# ---------------------------------------------------------------------------------------- nested


class Peaks(Valley):
    """N tasks by formula: each wants its own expert alone."""

    def __init__(self, n: int = 3) -> None:
        super().__init__()
        self.n_models, self.members = n, tuple("abcd"[:n])
        self.sources, self.task_names = (*self.members, "ties"), [*"xyzw"[:n]]

    def score(self, path, subset=None):
        self.calls.append((path, subset))
        rows = np.array(
            [
                step.scales or np.eye(self.n_models)[self.members.index(step.source)]
                if step.source != "ties"
                else np.full(self.n_models, 0.5)
                for step in path
            ]
        )
        off = (rows[None] - np.eye(self.n_models)[:, None]) ** 2  # (N, P, N)
        return (1 - off.sum(-1).mean(1) / 2).clip(0, 1)


def unit(n, expert=None):
    return Ends(np.zeros(n), np.ones(n) if expert is None else np.array(expert))


def test_pairs_are_those_with_the_closest_scores():
    def order(*scores):
        return nest({(i,): s for i, s in enumerate(scores)})

    assert order(0.5) == []
    assert order(0.5, 0.9) == [((0,), (1,))]
    assert order(0.9, 0.2, 0.85) == [((0,), (2,)), ((1,), (0, 2))]
    # Two pairs, then these; not the pair with a third.
    assert order(0.9, 0.5, 0.88, 0.7) == [((0,), (2,)), ((1,), (3,)), ((0, 2), (1, 3))]
    # Five: the odd one waits. The means are 0.9, 0.6 and 0.1, so that the first two are closer.
    assert order(0.9, 0.9, 0.6, 0.6, 0.1) == [
        *(((0,), (1,)), ((2,), (3,))),
        *(((0, 1), (2, 3)), ((4,), (0, 1, 2, 3))),
    ]
    # A merged group's score is the mean over its experts: 0.8 of three, nearer to 0.75 than to 0.9.
    six = order(0.99, 0.99, 0.42, 0.75, 0.9, 0.9)
    assert six[:3] == [((0,), (1,)), ((4,), (5,)), ((2,), (3,))]
    assert six[3] == ((0, 1), (4, 5))


def test_for_two_tasks_nested_is_map():
    one, two = Valley(), Valley()
    assert map_surrogate(one, 90, 1, UNIT).answers == map_nested(two, 90, 1, UNIT).answers
    assert one.calls == two.calls


@pytest.mark.parametrize("n", [3, 4])
@pytest.mark.parametrize("budget", [0, 9, 24, 40, 150])
def test_nested_spends_its_budget(n, budget):
    scorer = Peaks(n)
    out = map_nested(scorer, budget, 1, unit(n))
    assert len(out) == len(scorer.calls) == budget
    assert len(out.answers) == len(set(out.answers))
    assert budget < 150 or len(out.answers) >= n


def test_pairs_are_fitted_once_and_what_they_give_for_each_preference():
    scorer = Peaks(3)
    out = map_nested(scorer, 210, 1, unit(3, [0.9, 0.2, 0.85]))
    scales = np.array([parse_path(text)[0].scales for text, _ in out[out.begun :]])  # (E, 3)
    # Half of the rest is for eight fits of 12, and one is the pair's: a lattice of six and its centre for the
    # others.
    assert (210 - out.begun) // 2 // 12 == 8
    size = (210 - out.begun) // 2 // 8
    pair, rest = scales[:size], scales[size : 8 * size].reshape(7, size, 3)
    assert (pair[:, 1] == 0).all()  # the first and the third have the closest scores
    assert pair[:2].tolist() == [[1, 0, 0], [0, 0, 1]]
    directions = set()
    for own in rest:
        assert own[0].tolist() == [0, 1, 0]  # the second expert alone, then the merged pair alone
        assert own[1, 1] == 0
        directions.add(tuple(own[1, [0, 2]].tolist()))
        inside = ((own > -0.19) & (own < 1.49)).all(1)
        on_a_line = own[inside][:, 0] * own[1, 2] - own[inside][:, 2] * own[1, 0]
        assert on_a_line == pytest.approx(np.zeros(inside.sum()), abs=2e-3)
    assert len(directions) > 3
    # Then seven answers on each subset.
    subsets = [subset for _, subset in scorer.calls[out.begun + 8 * size :]]
    assert len(set(subsets[:7])) == 1
    assert subsets[7] != subsets[0]


def test_nested_finds_each_expert_and_the_middle_of_each_pair():
    """Halfway between two experts both tasks have 1 - (1/4 + 1/4) / 2."""
    scorer = Peaks(3)
    out = FRONT_SEARCHES["MAP, nested"](scorer, 210, 1, unit(3))
    nested = np.array([scorer.score(path) for path in out.answers])
    assert (nested.max(0) > 0.9).all()
    for pair in ((0, 1), (0, 2), (1, 2)):
        assert nested[:, pair].min(1).max() == pytest.approx(0.75, abs=0.05)


def test_an_expert_whose_task_does_not_count_is_left_out():
    scorer = Peaks(3)
    ends = Ends(np.array([0.0, 0.5, 0.0]), np.array([1.0, 0.5, 1.0]))
    out = map_nested(scorer, 100, 1, ends)
    assert len(out) == 100
    scales = np.array([parse_path(text)[0].scales for text, _ in out[out.begun :]])
    assert (scales[:, 1] == 0).all()
    assert len({tuple(row) for row in scales}) > 40
    assert len(out.answers) > 5
