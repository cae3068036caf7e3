"""Averages on the sphere, by depth, by metrics and by moves: numbers by hand, scipy, and numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.spatial
import scipy.stats
import torch
from operator_cases import layer
from torch.testing import assert_close

from rmm_lab import operators as ops
from rmm_lab.errors import InputError

ZERO = torch.zeros(2)

# ---------------------------------------------------------------- Model Stock


def test_model_stock_by_hand():
    """An angle of 60 degrees: c = 1/2, t = 2 * 0.5 / 1.5 = 2/3."""
    experts = torch.tensor([[2.0, 0.0], [2.0, 2 * math.sqrt(3)]])
    merged = ops.model_stock(ZERO, experts)
    assert_close(merged, 2 / 3 * torch.tensor([2.0, math.sqrt(3)]))


def test_model_stock_returns_the_base_for_right_and_obtuse_angles():
    base = torch.tensor([5.0, 5.0])
    for other in ([0.0, 1.0], [-1.0, 0.1]):
        experts = base + torch.tensor([[1.0, 0.0], other])
        assert_close(ops.model_stock(base, experts), base)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_model_stock_equals_scipys_cosines(n):
    base, experts = layer(n, (4, 5), seed=n)
    base = base - 1.5  # so that the task vectors have something in common
    deltas = (experts - base).flatten(1).numpy()
    c = 1 - np.mean(scipy.spatial.distance.pdist(deltas, "cosine"))
    assert c > 0.2
    t = n * c / (1 + (n - 1) * c)
    expected = t * experts.mean(0) + (1 - t) * base
    assert_close(ops.model_stock(base, experts), expected)


# ---------------------------------------------------------------- SLERP


def test_slerp_by_hand():
    """From east to north, a third of the way: 30 degrees."""
    experts = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    third = ops.slerp(ZERO, experts, t=1 / 3)
    assert_close(third, torch.tensor([math.sqrt(3), 1.0]))
    assert_close(ops.slerp(ZERO, experts), torch.tensor([math.sqrt(2), math.sqrt(2)]))


def test_slerp_of_deltas_is_at_the_base():
    base = torch.tensor([10.0, 10.0])
    experts = base + torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    merged = ops.slerp(base, experts, of="deltas")
    assert_close(merged, base + math.sqrt(2))
    # The weights themselves are nearly parallel: nearly their average.
    assert_close(ops.slerp(base, experts), torch.tensor([11.0, 11.0]), rtol=0.01, atol=0)


@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("seed", [1, 2])
def test_slerp_of_unit_vectors_equals_scipy(t, seed):
    _, points = layer(2, (7,), seed)
    points = points / points.norm(dim=1, keepdim=True)
    expected = scipy.spatial.geometric_slerp(*points.numpy(), t)
    found = ops.slerp(torch.zeros(7, dtype=torch.float64), points, t=t)
    assert_close(found.numpy(), expected)


@pytest.mark.parametrize("other", [[3.0, 3.0], [-1.0, -1.0], [0.0, 0.0]])
def test_slerp_is_linear_where_there_is_no_arc(other):
    experts = torch.tensor([[1.0, 1.0], other])
    assert_close(ops.slerp(ZERO, experts, t=0.25), 0.75 * experts[0] + 0.25 * experts[1])


@pytest.mark.parametrize("n", [1, 3])
def test_slerp_takes_two_experts(n):
    with pytest.raises(InputError, match=f"slerp: expected exactly 2 experts, found {n}"):
        ops.slerp(*layer(n))


# ---------------------------------------------------------------- Karcher


def test_karcher_by_hand():
    """The middle of three equal steps along a circle, at the mean length 2."""
    angles, sizes = (0.1, 0.5, 0.9), (1.0, 2.0, 3.0)
    experts = torch.tensor(
        [[r * math.cos(a), r * math.sin(a)] for a, r in zip(angles, sizes, strict=True)]
    )
    merged = ops.karcher(ZERO, experts)
    assert_close(merged, 2 * torch.tensor([math.cos(0.5), math.sin(0.5)]))
    half = ops.karcher(ZERO, experts, scale=0.5)
    assert_close(half, torch.tensor([math.cos(0.5), math.sin(0.5)]))


@pytest.mark.parametrize("of", ["weights", "deltas"])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_karcher_has_the_least_squared_angles_that_scipy_finds(n, of):
    base, experts = layer(n, (5,), seed=n)
    base = base - 1.0
    points = (experts if of == "weights" else experts - base).numpy()
    sizes = np.linalg.norm(points, axis=1)
    units = points / sizes[:, None]

    def angles(x: np.ndarray) -> float:
        return float((np.arccos(np.clip(units @ x / np.linalg.norm(x), -1, 1)) ** 2).sum())

    best = scipy.optimize.minimize(angles, units.mean(0), tol=1e-12).x
    expected = sizes.mean() * best / np.linalg.norm(best)
    found = ops.karcher(base, experts, of=of).numpy() - (0 if of == "weights" else base.numpy())
    assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_karcher_of_two_is_half_of_slerp():
    base, experts = layer(2, (5,))
    experts /= experts.norm(dim=1, keepdim=True)
    assert_close(ops.karcher(base, experts), ops.slerp(base, experts, t=0.5))


def test_karcher_of_opposites_is_the_mean_and_zeros_have_no_direction():
    experts = torch.tensor([[2.0, 0.0], [-1.0, 0.0]])
    assert_close(ops.karcher(ZERO, experts), torch.tensor([0.5, 0.0]))
    experts = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    assert_close(ops.karcher(ZERO, experts), torch.tensor([1.0, 0.0]))


# ---------------------------------------------------------------- LiNeS, metrics


@pytest.mark.parametrize(("depth", "scale"), [(0.0, 0.2), (0.25, 0.4), (1.0, 1.0)])
def test_lines_is_task_arithmetic_at_the_depths_scale(depth, scale):
    base, experts = layer(3)
    found = ops.lines(base, experts, first=0.2, last=1.0, depth=depth)
    expected = base + scale * ((experts[0] - base) + (experts[1] - base) + (experts[2] - base))
    assert_close(found, expected)


@pytest.mark.parametrize("depth", [None, -0.1, 1.1, math.nan])
def test_lines_needs_a_depth(depth):
    with pytest.raises(InputError, match="lines: expected the layer's depth in"):
        ops.lines(*layer(), depth=depth)


def test_metrics_weighted_average_by_hand():
    experts = torch.tensor([[4.0, 0.0], [0.0, 8.0]])
    merged = ops.metrics_weighted_average(ZERO, experts, metrics=(3.0, 1.0))
    assert_close(merged, torch.tensor([3.0, 2.0]))
    merged = ops.metrics_weighted_average(ZERO, experts, metrics=(3.0, 1.0), power=-1.0)
    assert_close(merged, torch.tensor([1.0, 6.0]))


@pytest.mark.parametrize("power", [-3.0, 0.0, 0.5, 4.0])
def test_metrics_weighted_average_equals_numpys_average(power):
    base, experts = layer(3)
    metrics = (0.9, 0.4, 0.7)
    expected = np.average(experts.numpy(), axis=0, weights=np.array(metrics) ** power)
    found = ops.metrics_weighted_average(base, experts, metrics=metrics, power=power)
    assert_close(found.numpy(), expected)


def test_metrics_weighted_average_of_a_large_power_is_the_best_expert():
    base, experts = layer(3)
    found = ops.metrics_weighted_average(base, experts, metrics=(0.9, 0.4, 0.7), power=1e4)
    assert_close(found, experts[0])


@pytest.mark.parametrize("metrics", [(0.9,), (0.9, 0.8, 0.7), (0.9, 0.0), (0.9, math.nan)])
def test_metrics_must_be_positive_and_one_for_each_expert(metrics):
    with pytest.raises(InputError, match="metrics: expected"):
        ops.metrics_weighted_average(*layer(), metrics=metrics)


# ---------------------------------------------------------------- WIDEN


def test_widen_by_hand():
    """Two columns; expert 1 turns the first, expert 2 stretches the second.

    Ranks are 0 and 1/2 of 2 columns, their mean is 1/4: the moved column (of equal moves the later) is
    above it and gets 1, the other one softmax_i of the ranks.
    """
    base = torch.eye(2)
    experts = torch.tensor([[[0.0, 0.0], [1.0, 1.0]], [[1.0, 0.0], [0.0, 3.0]]])
    # Lengths: expert 1 moved none (ranks 0, 1/2), expert 2 the second (0, 1/2).
    # Directions: expert 1 turned the first (1/2, 0), expert 2 none (0, 1/2).
    low = math.exp(0) / (math.exp(0) + math.exp(0.5))  # rank 0 beside another's rank 1/2
    length = [[0.5, 1.0], [0.5, 1.0]]
    direction = [[1.0, low], [low, 1.0]]
    w = (torch.tensor(length) + torch.tensor(direction)) / 2
    deltas = experts - base
    expected = base + w[0] * deltas[0] + w[1] * deltas[1]
    assert_close(ops.widen(base, experts), expected)


@pytest.mark.parametrize(("factor", "calibration"), [(1.0, 1.0), (0.5, 0.7), (3.0, 1.0)])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_widen_equals_loops_with_scipys_cosines_and_ranks(n, factor, calibration):
    base, experts = layer(n, (5, 8), seed=n)
    b, es = base.numpy(), experts.numpy()
    moves = np.zeros((2, n, 8))
    for i in range(n):
        for j in range(8):
            moves[0, i, j] = abs(np.linalg.norm(es[i][:, j]) - np.linalg.norm(b[:, j]))
            moves[1, i, j] = scipy.spatial.distance.cosine(es[i][:, j], b[:, j])
    ranks = (scipy.stats.rankdata(moves, axis=2) - 1) / 8
    expected = b.copy()
    for j in range(8):
        for i in range(n):
            w = 0
            for kind in ranks:
                high = kind[i, j] > factor * kind[i].mean()
                soft = math.exp(kind[i, j]) / sum(math.exp(r) for r in kind[:, j])
                w += (calibration if high else soft) / 2
            expected[:, j] += w * (es[i] - b)[:, j]
    found = ops.widen(base, experts, factor=factor, calibration=calibration)
    assert_close(found.numpy(), expected)
