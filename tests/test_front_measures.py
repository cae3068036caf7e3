"""Measures of fronts: by hand, against moocore, and what must hold for any points."""

from __future__ import annotations

import builtins

import moocore
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rmm_lab.errors import InputError
from rmm_lab.search import front_measures as measures

STAIRS = np.array([[1.0, 0.25], [0.5, 0.5], [0.25, 1.0]])
# 1 x 1/4, then 1/2 x 1/4 above it, then 1/4 x 1/2 above that.
STAIRS_AREA = 0.25 + 0.125 + 0.125


def fronts(n_tasks: int, low: float = -0.2):
    """Points (n, K) on a grid, so that ties are frequent."""
    rows = st.integers(1, 7)
    number = st.integers(round(10 * low), 12).map(lambda v: v / 10)
    return rows.flatmap(lambda n: arrays(float, (n, n_tasks), elements=number))


any_front = st.integers(2, 4).flatmap(fronts)


def test_hypervolume_by_hand():
    assert measures.hypervolume(STAIRS) == pytest.approx(STAIRS_AREA)
    assert measures.hypervolume(np.array([[1.0, 1.0]])) == 1
    assert measures.hypervolume(np.array([[0.5, 0.5, 0.5]])) == 0.125
    # Two boxes 1 x 1 x 1/2 and 1/2 x 1/2 x 1 share 1/2 x 1/2 x 1/2.
    both = np.array([[1, 1, 0.5], [0.5, 0.5, 1]])
    assert measures.hypervolume(both) == pytest.approx(0.5 + 0.25 - 0.125)
    assert measures.hypervolume(np.array([[0.7], [0.4]])) == 0.7


def test_what_is_not_above_the_reference_has_no_volume():
    assert measures.hypervolume(np.array([[1.0, 0.0], [-0.1, 5.0]])) == 0
    assert measures.hypervolume(np.array([[1.0, 0.5]]), reference=0.5) == 0
    assert measures.hypervolume(np.array([[1.0, 0.75]]), reference=0.5) == 0.125


def test_published_hypervolumes_above_the_box_are_impossible():
    """With 1 as the best score and a reference at -0.1 no front has more than 1.1 ** 3 = 1.331."""
    best = np.ones((1, 3))
    assert measures.hypervolume(best, reference=-0.1) == pytest.approx(1.331)


@given(any_front)
def test_hypervolume_is_moocores(points):
    expected = moocore.hypervolume(points, ref=np.zeros(points.shape[1]), maximise=True)
    assert measures.hypervolume(points) == pytest.approx(expected)


@given(any_front, st.randoms(use_true_random=False))
def test_measures_know_no_order_and_no_repeats(points, random):
    weights = measures.lattice(points.shape[1], 4)
    other = points[[*random.sample(range(len(points)), len(points)), 0]]
    for measure in (measures.r2, measures.expected_utility):
        assert measure(points, weights) == pytest.approx(measure(other, weights))
    for measure in (measures.igd_plus, measures.epsilon):
        assert measure(points, STAIRS_OF[points.shape[1]]) == pytest.approx(
            measure(other, STAIRS_OF[points.shape[1]])
        )
    assert measures.hypervolume(points) == pytest.approx(measures.hypervolume(other))


STAIRS_OF = {k: np.eye(k) * 0.5 + 0.25 for k in (2, 3, 4)}


@given(st.integers(2, 4).flatmap(lambda k: st.tuples(fronts(k), fronts(k))))
def test_a_further_point_never_makes_a_front_worse(pair):
    points, more = pair
    both, target = np.r_[points, more], STAIRS_OF[points.shape[1]]
    weights = measures.lattice(points.shape[1], 4)
    slack = 1e-12
    assert measures.hypervolume(both) >= measures.hypervolume(points) - slack
    assert measures.igd_plus(both, target) <= measures.igd_plus(points, target) + slack
    assert measures.epsilon(both, target) <= measures.epsilon(points, target) + slack
    assert measures.r2(both, weights) <= measures.r2(points, weights) + slack
    assert measures.expected_utility(both, weights) >= (
        measures.expected_utility(points, weights) - slack
    )


@given(st.integers(2, 4).flatmap(lambda k: st.tuples(fronts(k, 0.1), fronts(k, 0.1))))
def test_hypervolume_grows_by_a_point_that_none_dominates(pair):
    """Strictly, where the point is above the reference; a dominated one or a repeat changes nothing."""
    points, more = pair
    new = more[:1]
    dominated = (points >= new).all(1).any()
    gain = measures.hypervolume(np.r_[points, new]) - measures.hypervolume(points)
    assert gain == pytest.approx(0, abs=1e-12) if dominated else gain > 1e-6


@given(any_front)
def test_non_dominated_is_moocores_and_by_brute_force(points):
    found = measures.non_dominated(points)
    # moocore keeps the first of equal points too.
    assert found.tolist() == moocore.is_nondominated(points, maximise=True).tolist()
    for point in points:  # each is covered by one that stays
        assert (points[found] >= point).all(1).any()


@given(st.integers(2, 4).flatmap(lambda k: st.tuples(fronts(k), fronts(k))))
def test_distances_are_moocores(pair):
    points, target = pair
    # moocore takes targets as they are; so do we.
    assert measures.igd_plus(points, target) == pytest.approx(
        moocore.igd_plus(points, ref=target, maximise=True)
    )
    assert measures.epsilon(points, target) == pytest.approx(
        moocore.epsilon_additive(points, ref=target, maximise=True)
    )


def test_distances_by_hand():
    target = np.array([[1.0, 0.0], [0.0, 1.0]])
    half = np.array([[0.5, 0.5]])
    assert measures.epsilon(half, target) == 0.5
    assert measures.igd_plus(half, target) == 0.5  # ahead in the other task, which does not count
    assert measures.igd_plus(np.array([[1.0, 1.0]]), target) == 0
    assert measures.epsilon(np.array([[1.5, 1.25]]), target) == -0.25


def test_r2_tends_to_moocores_exact_one():
    weights = measures.lattice(2, 2000)
    exact = moocore.r2_exact(STAIRS * 0.9, ref=[1, 1], maximise=True)
    assert measures.r2(STAIRS * 0.9, weights) == pytest.approx(exact, abs=1e-3)


@given(any_front)
def test_dominated_points_change_no_measure(points):
    kept, target = points[measures.non_dominated(points)], STAIRS_OF[points.shape[1]]
    weights = measures.lattice(points.shape[1], 4)
    assert measures.hypervolume(kept) == pytest.approx(measures.hypervolume(points))
    assert measures.igd_plus(kept, target) == measures.igd_plus(points, target)
    assert measures.epsilon(kept, target) == measures.epsilon(points, target)
    assert measures.r2(kept, weights) == pytest.approx(measures.r2(points, weights))
    assert measures.expected_utility(kept, weights) == pytest.approx(
        measures.expected_utility(points, weights)
    )


def test_utilities_by_hand():
    weights = measures.lattice(2, 2)  # 0/1, 1/2 1/2, 1/0
    points = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert measures.expected_utility(points, weights) == pytest.approx((1 + 0.5 + 1) / 3)
    assert measures.r2(points, weights) == pytest.approx((0 + 0.5 + 0) / 3)


def test_lattices():
    assert measures.lattice(2, 2).tolist() == [[0, 1], [0.5, 0.5], [1, 0]]
    assert len(measures.lattice(3, 5)) == 21
    assert len(measures.lattice(4, 4)) == 35
    for weights in (measures.lattice(3, 5), measures.lattice(4, 3)):
        assert np.allclose(weights.sum(1), 1)
        assert len(np.unique(weights, axis=0)) == len(weights)
        assert weights.min() == 0
    assert (np.diff(measures.lattice(2, 4)[:, 0]) > 0).all()
    assert len(measures.lattice_of(2, 21)) == 21
    assert len(measures.lattice_of(3, 21)) == 21
    assert measures.lattice_of(3, 1).tolist() == [[0, 0, 1], [0, 1, 0], [1, 0, 0]]


def test_a_coarse_lattice_has_the_centre():
    """Ten weights of four tasks in steps of a half: each leaves out at least two of them."""
    found = measures.lattice_of(4, 11).tolist()
    assert len(found) == 11
    assert [w for w in found if min(w) > 0] == [[0.25] * 4]
    assert found == sorted(found)
    assert len(measures.lattice_of(4, 10)) == 10  # no room
    assert measures.lattice_of(5, 6).tolist()[-2] == [0.2] * 5
    assert len(measures.lattice_of(3, 16)) == 15  # in steps of a quarter some weigh all three
    assert measures.lattice_of(1, 9).tolist() == [[1]]


def test_a_preference_finds_a_point_in_a_hollow():
    """No weighted mean ever chooses the middle point, since it lies below the line between the others."""
    points = np.array([[1.0, 0.0], [0.45, 0.45], [0.0, 1.0]])
    weights = measures.lattice(2, 10)
    assert 1 not in (weights @ points.T).argmax(1)
    chosen = measures.achievement(points, weights).argmax(1)
    assert chosen[5] == 1
    assert (chosen[0], chosen[-1]) == (2, 0)  # all weight on a task takes its best point


@given(any_front, st.integers(0, 20))
def test_no_preference_of_all_tasks_takes_a_dominated_point(points, seed):
    weights = np.random.default_rng(seed).dirichlet(np.ones(points.shape[1])) + 0.01
    best = int(measures.achievement(points, weights)[0].argmax())
    assert not ((points >= points[best]) & (points > points[best]).any(1)[:, None]).all(1).any()


def test_knee():
    assert measures.knee(np.array([[1.0, 0.0], [0.8, 0.7], [0.6, 0.8], [0.0, 1.0]])) == 1
    # All on the line, or in a hollow: that which meets equal weights.
    assert measures.knee(np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])) == 1
    assert measures.knee(np.array([[1.0, 0.1], [0.4, 0.4], [0.1, 1.0]])) == 1
    assert measures.knee(np.array([[0.3, 0.4]])) == 0
    # The base lies beyond the line: there is no knee towards it.
    below = np.array([[0.1, -1.0], [-0.1, -0.6], [-0.6, -0.5], [-1.0, 0.1]])
    assert measures.knee(below) == 1
    three = np.array([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [0.6, 0.5, 0.4]])
    assert measures.knee(three) == 3


@pytest.mark.parametrize(
    ("points", "said"),
    [(np.zeros((0, 2)), "at least one"), (np.zeros(3), "shape"), ([[0.1, np.nan]], "NaN")],
)
def test_what_is_no_front_is_refused(points, said):
    with pytest.raises(InputError, match=said):
        measures.hypervolume(points)


def test_fronts_of_other_tasks_are_not_compared():
    with pytest.raises(InputError, match="2 tasks, found 3"):
        measures.igd_plus(STAIRS, np.ones((1, 3)))


def test_more_tasks_need_the_library(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "moocore":
            raise ImportError("no moocore")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert measures.hypervolume(np.ones((1, 3))) == 1
    with pytest.raises(InputError, match=r"\[front\]"):
        measures.hypervolume(np.ones((1, 4)))
