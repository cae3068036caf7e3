"""Spectral operators against numbers by hand, and against scipy, numpy's least squares and torch's Adam."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from operator_cases import layer
from torch.testing import assert_close

from rmm_lab import operators as ops

SHAPES = [(8, 6), (5, 9), (1, 4), (4, 1)]
cases = pytest.mark.parametrize(("n", "shape"), [(n, s) for n in (1, 2, 3) for s in SHAPES])


def arrays(n: int, shape: tuple[int, int], seed: int = 1):
    """Tensors for the kit; base and task vectors for numpy."""
    base, experts = layer(n, shape, seed)
    return base, experts, base.numpy(), (experts - base).numpy()


def diagonal(*rows: list[float]) -> torch.Tensor:
    return torch.stack([torch.diag(torch.tensor(row)) for row in rows])


# ---------------------------------------------------------------- TSV


def test_tsv_by_hand():
    """Each expert's one main direction; they are orthogonal already."""
    experts = diagonal([3.0, 1.0], [1.0, 2.0])
    base = torch.zeros(2, 2)
    assert_close(ops.tsv(base, experts), torch.diag(torch.tensor([3.0, 2.0])))
    assert_close(ops.tsv(base, experts, scale=0.5), torch.diag(torch.tensor([1.5, 1.0])))


def test_tsv_of_equal_experts_is_their_main_part():
    """The two bases coincide; their common polar factor has each direction once."""
    base, experts = torch.zeros(2, 2), diagonal([3.0, 1.0], [3.0, 1.0])
    assert_close(ops.tsv(base, experts), torch.diag(torch.tensor([3.0, 0.0])))


@cases
def test_tsv_equals_scipys_polar_factors(n, shape):
    base, experts, b, deltas = arrays(n, shape)
    k = max(1, min(shape) // n)
    u, s, v = [], [], []
    for delta in deltas:
        left, values, right = scipy.linalg.svd(delta, full_matrices=False)
        u, s, v = [*u, left[:, :k]], [*s, values[:k]], [*v, right[:k].T]
    u, v = (scipy.linalg.polar(np.hstack(x))[0] for x in (u, v))
    if min(shape) > 1:  # else scipy's factor of dependent columns has arbitrary parts
        expected = b + 0.7 * u @ np.diag(np.hstack(s)) @ v.T
        assert_close(ops.tsv(base, experts, scale=0.7).numpy(), expected)


# ---------------------------------------------------------------- Iso


def test_iso_c_by_hand():
    experts = diagonal([3.0, 0.0], [1.0, -2.0])  # the sum is diag(4, -2): values 4 and 2, mean 3
    merged = ops.iso_c(torch.zeros(2, 2), experts)
    assert_close(merged, torch.diag(torch.tensor([3.0, -3.0])))


def test_iso_c_averages_over_the_directions_that_there_are():
    experts = diagonal([3.0, 0.0], [1.0, 0.0])
    assert_close(ops.iso_c(torch.zeros(2, 2), experts), torch.diag(torch.tensor([4.0, 0.0])))


@cases
def test_iso_c_equals_scipys_polar_decomposition(n, shape):
    """W = Q H: Q is the flat matrix, the trace of H the sum of the singular values."""
    base, experts, b, deltas = arrays(n, shape)
    side = "right" if shape[0] >= shape[1] else "left"
    q, h = scipy.linalg.polar(deltas.sum(0), side=side)
    expected = b + 1.3 * np.trace(h) / min(shape) * q
    assert_close(ops.iso_c(base, experts, scale=1.3).numpy(), expected)


def test_iso_cts_by_hand():
    """Common: the first two directions, 8 and 6; each task's own: 1 and 2. Their mean is 4.25."""
    experts = diagonal([4.0, 3.0, 1.0, 0.0], [4.0, 3.0, 0.0, 2.0])
    merged = ops.iso_cts(torch.zeros(4, 4), experts, common=0.5)
    assert_close(merged, 4.25 * torch.eye(4))


def test_iso_cts_with_common_directions_alone_is_iso_c():
    base, experts = layer(3, (8, 6))
    assert_close(ops.iso_cts(base, experts, common=1.0), ops.iso_c(base, experts))


@pytest.mark.parametrize("shape", [(8, 6), (6, 9)])
@pytest.mark.parametrize("common", [0.0, 0.34, 0.67])
def test_iso_cts_equals_projections_and_scipys_polar_factors(common, shape):
    base, experts, b, deltas = arrays(2, shape)
    own = (6 - int(common * 6)) // 2
    k = 6 - 2 * own
    u, s, vh = scipy.linalg.svd(deltas.sum(0), full_matrices=False)
    us, values, vs = [u[:, :k]], [s[:k]], [vh[:k].T]
    outside = scipy.linalg.null_space(u[:, :k].T) if k else np.eye(shape[0])  # (out, out - k)
    for delta in deltas:
        left, value, right = scipy.linalg.svd(outside @ outside.T @ delta, full_matrices=False)
        us, values, vs = [*us, left[:, :own]], [*values, value[:own]], [*vs, right[:own].T]
    u, v = (scipy.linalg.polar(np.hstack(x))[0] for x in (us, vs))
    expected = b + np.hstack(values).mean() * u @ v.T
    assert_close(ops.iso_cts(base, experts, common=common).numpy(), expected)


# ---------------------------------------------------------------- WUDI


def test_wudi_by_hand():
    """Two rows at right angles do not disturb each other: C_1 = diag(1, 0), C_2 = diag(0, 1)."""
    base, experts = torch.zeros(1, 2), torch.tensor([[[2.0, 0.0]], [[0.0, 3.0]]])
    assert_close(ops.wudi(base, experts, damping=0.0), torch.tensor([[2.0, 3.0]]))
    assert_close(ops.wudi(base, experts, damping=1.0), torch.tensor([[1.0, 1.5]]))


@pytest.mark.parametrize("damping", [0.0, 0.1, 2.0])
@cases
def test_wudi_equals_numpys_least_squares_on_the_stacked_problem(n, shape, damping):
    base, experts, b, deltas = arrays(n, shape)
    units = [delta / np.linalg.norm(delta) for delta in deltas]
    c = sum((unit**2).sum() for unit in units) / shape[1]
    rows = np.vstack([*units, np.sqrt(damping * c) * np.eye(shape[1])])
    goals = [unit @ delta.T for unit, delta in zip(units, deltas, strict=True)]
    x = np.linalg.lstsq(rows, np.vstack([*goals, np.zeros((shape[1], shape[0]))]), rcond=1e-9)[0]
    found = ops.wudi(base, experts, damping=damping, scale=0.6).numpy()
    tolerance = (
        1e-9 if damping else 1e-4
    )  # without it, what the smallest directions lose by the ridge
    assert_close(found, b + 0.6 * x.T, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------- KnOTS and STAR


def test_knots_by_hand():
    """Both experts move along the first axis, by 3 and by -1: the elected sign is +."""
    experts = torch.tensor([[[3.0], [0.0]], [[-1.0], [0.0]]])
    assert_close(ops.knots(torch.zeros(2, 1), experts, density=1.0), torch.tensor([[3.0], [0.0]]))
    same = torch.tensor([[[3.0], [0.0]], [[1.0], [0.0]]])
    total = ops.knots(torch.zeros(2, 1), same, density=1.0, merge="sum")
    assert_close(total, torch.tensor([[4.0], [0.0]]))


@pytest.mark.parametrize("density", [0.3, 1.0])
@cases
def test_knots_equals_ties_by_loops_in_numpys_basis(n, shape, density):
    base, experts, b, deltas = arrays(n, shape)
    u, s, vh = np.linalg.svd(np.hstack(list(deltas)), full_matrices=False)
    columns = np.split(s[:, None] * vh, n, axis=1)  # (r, in) each
    k = max(1, int(density * columns[0].size))
    kept = [np.where(abs(c) >= np.sort(abs(c), axis=None)[-k], c, 0) for c in columns]
    merged = np.zeros_like(kept[0])
    for place in np.ndindex(merged.shape):
        values = [c[place] for c in kept]
        agree = [x for x in values if x * sum(values) > 0]
        merged[place] = np.mean(agree) if agree else 0
    found = ops.knots(base, experts, density=density, scale=0.9).numpy()
    assert_close(found, b + 0.9 * u @ merged)


def test_an_expert_that_leaves_the_matrix_counts_in_no_mean_of_knots():
    base, experts = layer(1, (32, 20), dtype=torch.float32)
    with_base = torch.stack([base, experts[0]])
    assert_close(ops.knots(base, with_base, density=1.0), experts[0], atol=1e-5, rtol=0)


def test_knots_turns_with_the_outputs():
    base, experts = layer(3, (6, 4))
    q = torch.linalg.qr(layer(1, (6, 6))[0])[0]
    assert_close(ops.knots(q @ base, q @ experts), q @ ops.knots(base, experts))


def test_star_by_hand():
    """Half of 3 + 1 is reached by 3 alone, which takes all 4; of 0.8, only by both."""
    experts, base = diagonal([3.0, 1.0], [3.0, 1.0]), torch.zeros(2, 2)
    assert_close(ops.star(base, experts, energy=0.5), torch.diag(torch.tensor([4.0, 0.0])))
    assert_close(ops.star(base, experts, energy=0.8), experts[0])


@pytest.mark.parametrize("energy", [0.1, 0.4, 0.77])
@cases
def test_star_equals_numpy_and_keeps_the_nuclear_norm(n, shape, energy):
    base, experts, b, deltas = arrays(n, shape)
    parts = []
    for delta in deltas:
        u, s, vh = np.linalg.svd(delta, full_matrices=False)
        k = 1
        while s[:k].sum() < energy * s.sum():
            k += 1
        part = sum(s[j] * np.outer(u[:, j], vh[j]) for j in range(k))
        parts.append(part * np.linalg.norm(delta, "nuc") / np.linalg.norm(part, "nuc"))
    found = ops.star(base, experts, energy=energy, scale=1.5).numpy()
    assert_close(found, b + 1.5 * np.mean(parts, axis=0))


# ---------------------------------------------------------------- DOGE


def test_doge_without_steps_by_hand():
    """Both task vectors at their mean length, 2."""
    base, experts = torch.zeros(1, 2), torch.tensor([[[3.0, 0.0]], [[0.0, 1.0]]])
    merged = ops.doge(base, experts, steps=0, density=1.0)
    assert_close(merged, torch.tensor([[2.0, 2.0]]))
    # One row: its only left direction is the shared one, and nothing may change there.
    assert_close(ops.doge(base, experts, steps=50, density=1.0), merged)
    assert_close(ops.doge(base, experts, steps=0, density=0.5, scale=0.5), merged / 2)


@pytest.mark.parametrize(("n", "shape"), [(2, (8, 6)), (3, (6, 10))])
def test_doge_equals_torchs_adam_on_the_papers_loss(n, shape):
    base, experts, _, _ = arrays(n, shape)
    deltas = experts - base
    unit = deltas.pow(2).mean().sqrt()
    norms = torch.stack([d.norm() for d in deltas])
    a = 0.5 * norms.mean() / norms
    main = [torch.linalg.svd(d)[0][:, : max(1, min(shape) // n)] for d in deltas]
    q = torch.linalg.svd(torch.cat(main, 1))[0][:, : max(1, min(shape) // 6)]
    shift = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([shift], lr=0.01 * float(unit), eps=1e-14)
    losses = []
    for _ in range(50):
        adam.zero_grad()
        merge = sum(w * (d + shift) for w, d in zip(a, deltas, strict=True))
        loss = sum(((d * (d - merge)).sum(1) ** 2).sum() for d in deltas)
        loss.backward()
        shift.grad -= q @ q.T @ shift.grad
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    shift = shift.detach()
    masks = [d.abs() >= d.abs().flatten().sort().values[-int(0.4 * d.numel())] for d in deltas]
    expected = base + sum(w * (d + shift) * m for w, d, m in zip(a, deltas, masks, strict=True))
    found = ops.doge(base, experts, steps=50, density=0.4, scale=0.5)
    assert_close(found, expected, rtol=1e-5, atol=1e-5)
