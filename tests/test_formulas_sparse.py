"""Operators that choose entries against numbers by hand and against loops in Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import layer, layers
from torch.testing import assert_close

from rmm_lab import operators as ops
from rmm_lab.errors import InputError

BASE = torch.tensor([1.0, 1.0, 1.0, 1.0])
DELTAS = torch.tensor([[4.0, -1.0, 2.0, 0.5], [2.0, 3.0, -1.0, 0.25]])
EXPERTS = BASE + DELTAS


def added(merged: torch.Tensor) -> list[float]:
    return (merged - BASE).tolist()


def numbers(base, experts) -> list[list[float]]:
    """Task vectors as lists: one for each expert."""
    return (experts - base).reshape(len(experts), -1).tolist()


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def sign(x: float) -> float:
    return math.copysign(1.0, x) if x else 0.0


# ---------------------------------------------------------------- Breadcrumbs


def test_breadcrumbs_by_hand():
    """Of 4 entries the largest goes, the next two stay: 2 and -1; 2 and -1."""
    merged = ops.breadcrumbs(BASE, EXPERTS, density=0.5, outliers=0.25, scale=0.5)
    assert added(merged) == [0.5 * 2, 0.5 * -1, 0.5 * (2 - 1), 0.0]


@settings(max_examples=40)
@given(layers(), st.floats(0.05, 1.0), st.floats(0.0, 0.9))
def test_breadcrumbs_equals_sorted_lists(case, density, outliers):
    base, experts = case
    size = base.numel()
    first = int(outliers * size)
    total = [0.0] * size
    for delta in numbers(base, experts):
        order = sorted(range(size), key=lambda j: (-abs(delta[j]), j))
        for j in order[first : first + max(1, int(density * size))]:
            total[j] += delta[j]
    found = ops.breadcrumbs(base, experts, density=density, outliers=outliers, scale=1.0)
    assert_close(found, base + torch.tensor(total).reshape(base.shape))


def test_breadcrumbs_of_everything_is_task_arithmetic():
    base, experts = layer(3)
    found = ops.breadcrumbs(base, experts, density=1.0, outliers=0.0, scale=0.7)
    assert_close(found, ops.task_arithmetic(base, experts, scale=0.7))


# ---------------------------------------------------------------- DELLA


def test_della_by_hand_on_a_known_mask():
    """Drop rates by rank: the largest of a row of 4 has 0.5 - 0.2, then 0.4, 0.5, 0.6."""
    rates = [[0.3, 0.5, 0.4, 0.6], [0.4, 0.3, 0.5, 0.6]]
    g = torch.Generator().manual_seed(8)
    drawn = torch.rand(2, 4, generator=g, dtype=torch.float64).tolist()
    expected = []
    for j in range(4):
        values = [
            float(DELTAS[i, j]) / (1 - rates[i][j]) for i in range(2) if drawn[i][j] >= rates[i][j]
        ]
        expected.append(mean([x for x in values if x * sum(values) > 0]))
    g = torch.Generator().manual_seed(8)
    merged = ops.della(BASE, EXPERTS, drop_rate=0.5, epsilon=0.4, generator=g)
    assert_close(merged, BASE + torch.tensor(expected))


def test_della_ranks_within_rows():
    """A row of large entries is dropped as often as one of small ones, the large end of each less often."""
    row = torch.linspace(1, 2, 100, dtype=torch.float64)
    delta = torch.stack([row, 100 * row]).repeat(200, 1)[None]  # (1, 400, 100)
    base = torch.zeros(400, 100, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    merged = ops.della(base, delta, drop_rate=0.5, epsilon=0.8, generator=g)
    kept = (merged != 0).double()
    for part in (kept[::2], kept[1::2]):
        assert part[:, :10].mean() == pytest.approx(0.5 - 0.36, abs=0.03)
        assert part[:, -10:].mean() == pytest.approx(0.5 + 0.364, abs=0.03)
    assert_close(merged.mean(0), delta[0].mean(0), rtol=0.7, atol=0)  # rescaled: about right


def test_della_with_one_rate_is_dare_ties():
    base, experts = layer(3)
    one, other = (torch.Generator().manual_seed(4) for _ in range(2))
    found = ops.della(base, experts, drop_rate=0.3, epsilon=0.0, generator=one)
    assert_close(found, ops.dare_ties(base, experts, drop_rate=0.3, generator=other))
    assert torch.equal(one.get_state(), other.get_state())


@pytest.mark.parametrize("generator", [None, 7])
def test_della_needs_a_seeded_generator(generator):
    with pytest.raises(InputError, match="generator: expected a seeded one"):
        ops.della(BASE, EXPERTS, generator=generator)


@pytest.mark.parametrize(("drop_rate", "epsilon"), [(0.1, 0.3), (0.9, 0.3), (0.0, 0.1)])
def test_della_refuses_rates_outside_0_and_1(drop_rate, epsilon):
    g = torch.Generator().manual_seed(0)
    with pytest.raises(InputError, match="option epsilon: expected drop_rate ± epsilon / 2"):
        ops.della(BASE, EXPERTS, drop_rate=drop_rate, epsilon=epsilon, generator=g)


# ---------------------------------------------------------------- Consensus


def test_consensus_by_hand():
    """Total 6, 2, 1, 0.75. With two experts, the other's entry is what is left: both within half of it?"""
    merged = ops.consensus(BASE, EXPERTS, threshold=0.5, scale=1.0)
    # 2 >= 4/2; 1 < 3/2; 1 >= 2/2; 0.25 >= 0.5/2
    assert added(merged) == [6.0, 0.0, 1.0, 0.75]
    assert added(ops.consensus(BASE, EXPERTS, threshold=2.0, scale=1.0)) == [0.0, 0.0, 0.0, 0.0]
    one = ops.consensus(BASE, EXPERTS, threshold=2.0, agree=1, scale=1.0)
    assert added(one) == [6.0, 2.0, 1.0, 0.75]


@settings(max_examples=40)
@given(layers(), st.floats(0.0, 2.0), st.integers(1, 5))
def test_consensus_equals_loops(case, threshold, agree):
    base, experts = case
    deltas = numbers(base, experts)
    expected = []
    for column in zip(*deltas, strict=True):
        votes = sum(abs(x) >= np.float32(threshold) * abs(sum(column) - x) for x in column)
        expected.append(sum(column) if votes >= min(agree, len(column)) else 0.0)
    found = ops.consensus(
        base, experts, threshold=float(np.float32(threshold)), agree=agree, scale=1.0
    )
    assert_close(found, base + torch.tensor(expected).reshape(base.shape))


# ---------------------------------------------------------------- EMR, MagMax, SCE


def test_emr_by_hand():
    assert added(ops.emr(BASE, EXPERTS)) == [4.0, 3.0, 2.0, 0.5]
    cancel = BASE + torch.tensor([[1.0, -2.0, 0.0, 1.0], [-1.0, 1.0, 0.0, -3.0]])
    assert added(ops.emr(BASE, cancel, scale=0.5)) == [0.0, -1.0, 0.0, -1.5]


@settings(max_examples=40)
@given(layers())
def test_emr_equals_loops(case):
    base, experts = case
    expected = [
        sign(sum(column)) * max([abs(x) for x in column if x * sum(column) > 0], default=0.0)
        for column in zip(*numbers(base, experts), strict=True)
    ]
    assert_close(ops.emr(base, experts), base + torch.tensor(expected).reshape(base.shape))


def test_magmax_by_hand():
    assert added(ops.magmax(BASE, EXPERTS, scale=0.5)) == [2.0, 1.5, 1.0, 0.25]
    level = BASE + torch.tensor([[1.0, -2.0, 0.0, 1.0], [-1.0, 1.0, 0.0, -3.0]])
    assert added(ops.magmax(BASE, level)) == [1.0, -2.0, 0.0, -3.0]


@settings(max_examples=40)
@given(layers())
def test_magmax_equals_loops(case):
    base, experts = case
    expected = [max(column, key=abs) for column in zip(*numbers(base, experts), strict=True)]
    assert_close(ops.magmax(base, experts), base + torch.tensor(expected).reshape(base.shape))


def test_sce_by_hand():
    """Variances 1, 4, 2.25, 0.016: half of the entries are the second and third.

    Squares there: 1 + 4 = 5 and 9 + 1 = 10. The signs of the sums 2 and 1 leave 3 and 2, each alone.
    """
    assert_close(ops.sce(BASE, EXPERTS, density=0.5), BASE + torch.tensor([0.0, 3.0, 2.0, 0.0]))
    # All entries: squares 21.25 and 14.0625. Entry 0 has both: weighted mean of 4 and 2.
    first = (21.25 * 4 + 14.0625 * 2) / (21.25 + 14.0625)
    last = (21.25 * 0.5 + 14.0625 * 0.25) / (21.25 + 14.0625)
    merged = ops.sce(BASE, EXPERTS, density=1.0)
    assert_close(merged, BASE + torch.tensor([first, 3.0, 2.0, last]))


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_sce_equals_numpy(n, density):
    base, experts = layer(n, (5, 6), seed=n)
    deltas = (experts - base).numpy()
    spread = deltas.var(axis=0)
    cut = np.sort(spread, axis=None)[-int(density * spread.size)]
    deltas = np.where(spread >= cut, deltas, 0)
    energy = (deltas**2).sum(axis=(1, 2))
    agrees = np.sign(deltas) == np.sign(deltas.sum(0))
    merged = np.ma.average(
        np.ma.array(deltas, mask=~agrees),
        axis=0,
        weights=np.broadcast_to(energy[:, None, None], deltas.shape),
    ).filled(0)
    assert_close(
        ops.sce(base, experts, density=density, scale=0.8).numpy(), base.numpy() + 0.8 * merged
    )


# ---------------------------------------------------------------- PCB


def test_pcb_by_hand():
    """Two experts of three entries; the quantiles are the least and the largest, so n = 0, 1/2, 1.

    b is exp(2 n^2) (tanh(n^2) + tanh(n n')). Expert 1 has n = 1, 0, 1/2, expert 2 n = 1, 1/2, 0.
    """
    base = torch.zeros(3)
    experts = torch.tensor([[3.0, 1.0, 2.0], [5.0, 3.0, 1.0]])
    top = math.exp(2) * 2 * math.tanh(1)
    half = math.exp(0.5) * math.tanh(0.25)
    # density 2/3: the larger two, from 0 to 1: weight 1 for the first entry, 0 for the other.
    merged = ops.pcb(base, experts, density=0.67, scale=1.0)
    assert_close(merged, torch.tensor([4.0, 0.0, 0.0]))
    w = half / top  # all three: 0 for the entry with n = 0
    merged = ops.pcb(base, experts, density=1.0, scale=1.0)
    assert 0 < w < 1  # alone at its entry, a weight of any size gives the task vector
    assert_close(merged, torch.tensor([4.0, 3.0, 2.0]))


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("density", [0.05, 0.2, 1.0])
def test_pcb_equals_numpy_with_its_quantiles(n, density):
    base, experts = layer(n, (20, 13), seed=n)
    deltas = (experts - base).flatten(1).numpy()
    normal = []
    for delta in deltas:
        low, high = np.quantile(abs(delta), (0.01, 0.99), method="nearest")
        normal.append(np.interp(abs(delta), (low, high), (0, 1)) * np.sign(delta))
    weights = []
    for one in normal:
        b = np.exp(n * one**2) * sum(np.tanh(one * other) for other in normal)
        top = np.sort(b)[-max(1, int(density * b.size)) :]
        weights.append(np.interp(b, (top[0], top[-1]), (0, 1)))
    weights = np.array(weights)
    total = weights.sum(0)
    merged = np.divide((weights * deltas).sum(0), total, out=0 * total, where=total > 0)
    found = ops.pcb(base, experts, density=density, scale=0.9).flatten().numpy()
    assert_close(found, base.flatten().numpy() + 0.9 * merged)


def test_pcb_of_many_experts_does_not_overflow():
    base, experts = (x.float() for x in layer(200, (5, 4)))
    assert ops.pcb(base, experts).isfinite().all()
