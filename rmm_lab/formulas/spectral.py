"""Operators on whole weight matrices: what they average is singular directions, not entries.

Each takes ``base: (out, in)``, ``experts: (N, out, in)``, both finite, and returns ``(out, in)``; the
generator is ignored. SVDs are those of the task vectors ``delta_i = theta_i - theta_base``, ``r = min(out,
in)``. Singular directions whose value is rounding error are left out: papers keep them, but there they are
arbitrary, and two equal experts have many. So experts equal to the base never disturb the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rmm_lab.formulas.checks import Rng, add, check_options, matrices
from rmm_lab.formulas.steps import disjoint_merge, elect_sign, largest, trim

RIDGE = 1e-10  # of the mean diagonal: far below what a float32 weight can show


def triplets(matrix: Tensor, k: int, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest singular triplets above ``floor``: U (out, k'), values (k',), V (in, k'), k' <= k."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    k = min(k, int((s > floor).sum()))
    return u[:, :k], s[:k], vh[:k].mT


def rounding(matrix: Tensor, shape: tuple[int, ...] = ()) -> float:
    """Singular values of a matrix up to this one are rounding error; 0 for zeros.

    shape: of the larger matrix that it has its singular values from.
    """
    longest = max(shape or matrix.shape)
    return float(torch.finfo(matrix.dtype).eps * longest * matrix.double().norm())


def _orthogonal(columns: Tensor) -> Tensor:
    """The polar factor ``P Q^T`` of ``P diag(s) Q^T``, the nearest orthonormal columns: (n, k) -> (n, k)."""
    if columns.shape[1] == 0:
        return columns
    p, _, q = triplets(columns, columns.shape[1], rounding(columns))
    return p @ q.mT


def _joined(parts: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Triplets side by side, both bases made orthogonal: U (out, K), values (K,), V (in, K)."""
    us, values, vs = zip(*parts, strict=True)
    u, v = (_orthogonal(torch.cat(columns, dim=1)) for columns in (us, vs))
    return u, torch.cat(values), v


def tsv(base: Tensor, experts: Tensor, *, scale: float = 1.0, generator: Rng = None) -> Tensor:
    """TSV-Merge: each expert's main singular directions, made orthogonal (Gargiulo et al. 2025).

    The ``max(1, r // N)`` largest triplets of each delta_i stand side by side: U, s, V. Then
    ``theta_base + scale * U' diag(s) V'^T`` with the polar factors U' and V' of U and V.
    scale: finite. Source: arXiv 2412.00081, Sec. 4.
    """
    base_, experts = matrices("tsv", base, experts)
    deltas = experts - base_
    k = max(1, min(base.shape) // len(deltas))
    u, s, v = _joined([triplets(d, k, rounding(d)) for d in deltas])
    return add(base, (u * s) @ v.mT, scale)  # (out, K) @ (K, in) -> (out, in)


def iso_c(base: Tensor, experts: Tensor, *, scale: float = 1.0, generator: Rng = None) -> Tensor:
    """Iso-C: the sum of the task vectors with a flat spectrum (Marczak et al. 2025).

    ``sum_i delta_i = U diag(s) V^T`` becomes ``theta_base + scale * mean(s) U V^T``; the mean is over the
    directions that the sum has. scale: finite. Source: arXiv 2502.04959, Sec. 4.
    """
    base_, experts = matrices("iso_c", base, experts)
    total = (experts - base_).sum(dim=0)  # (N, out, in) -> (out, in)
    u, s, v = triplets(total, min(base.shape), rounding(total))
    return add(base, s.sum() / max(1, len(s)) * (u @ v.mT), scale)


def iso_cts(
    base: Tensor,
    experts: Tensor,
    *,
    common: float = 0.8,
    scale: float = 1.0,
    generator: Rng = None,
) -> Tensor:
    """Iso-CTS: Iso-C on common directions and on directions of each task alone (Marczak et al. 2025).

    ``m = (r - int(common * r)) // N`` directions for each task, ``k = r - N m`` common ones. Common: the k
    largest triplets of ``sum_i delta_i``, left vectors U_0. Of task i: the m largest of
    ``delta_i - U_0 U_0^T delta_i``. All stand side by side: U, s, V. Then
    ``theta_base + scale * mean(s) U' V'^T`` with the polar factors U' and V'.
    common: share of the directions, in [0, 1]; 1 is Iso-C. scale: finite. Source: arXiv 2502.04959, Sec. 5.
    """
    base_, experts = matrices("iso_cts", base, experts)
    check_options(common=common)
    deltas, r = experts - base_, min(base.shape)
    m = (r - int(common * r)) // len(deltas)
    total = deltas.sum(dim=0)  # (N, out, in) -> (out, in)
    parts = [triplets(total, r - len(deltas) * m, rounding(total))]
    u_0 = parts[0][0]
    parts += [triplets(d - u_0 @ (u_0.mT @ d), m, rounding(d)) for d in deltas]
    u, s, v = _joined(parts)
    return add(base, s.sum() / max(1, len(s)) * (u @ v.mT), scale)


def wudi(
    base: Tensor,
    experts: Tensor,
    *,
    damping: float = 0.1,
    scale: float = 1.0,
    generator: Rng = None,
) -> Tensor:
    """WUDI in closed form: the least interference on each expert's rows (Cheng et al. 2025).

    The paper minimises ``sum_i ||(x - delta_i) delta_i^T||^2 / ||delta_i||^2`` over x by a few hundred
    steps of Adam. It is quadratic: with ``C_i = delta_i^T delta_i / ||delta_i||^2`` we solve
    ``x (sum_i C_i + damping * c I) = sum_i delta_i C_i`` in float64, c the mean diagonal of
    ``sum_i C_i``. Then ``theta_base + scale * x``.
    damping: finite from 0. The exact minimum, at 0 (there 1e-10 takes the part of the pseudo-inverse), can be
    several times longer than the task vectors, which the paper's early stop avoids. scale: finite.
    Source: arXiv 2503.08099.
    """
    base_, experts = matrices("wudi", base, experts)
    check_options(damping=damping)
    deltas = (experts - base_).double()
    size = torch.linalg.vector_norm(deltas, dim=(1, 2), keepdim=True)  # (N, 1, 1)
    unit = deltas / torch.where(size > 0, size, 1.0)
    grams = unit.mT @ unit  # (N, out, in) -> (N, in, in)
    a = grams.sum(dim=0)
    ridge = max(damping, RIDGE) * a.diagonal().mean()
    a.diagonal().add_(ridge if ridge > 0 else 1.0)
    b = (deltas @ grams).sum(dim=0)  # (N, out, in) -> (out, in)
    x = torch.cholesky_solve(b.mT, torch.linalg.cholesky(a)).mT
    return add(base, x.to(experts.dtype), scale)


def knots(
    base: Tensor,
    experts: Tensor,
    *,
    density: float = 0.3,
    scale: float = 1.0,
    merge: str = "mean",
    generator: Rng = None,
) -> Tensor:
    """KnOTS-TIES: TIES on the task vectors' coordinates in one shared basis (Stoica et al. 2025).

    ``[delta_1 ... delta_N] = U diag(s) [V_1 ... V_N]^T``; the coordinates ``diag(s) V_i^T`` are trimmed, a
    sign is elected, they are merged, and multiplied by U. The paper does this to LoRA's updates. Task
    arithmetic in the basis is task arithmetic without it, so there is no option for it.
    density: fraction of the coordinates kept, in (0, 1]; scale: finite; merge: "mean" or "sum", as for
    ``ties``. Source: arXiv 2410.19735, Sec. 4.
    """
    base_, experts = matrices("knots", base, experts)
    deltas = experts - base_
    side = torch.cat(tuple(deltas), dim=1)  # (N, out, in) -> (out, N * in)
    u, s, _ = triplets(side, min(side.shape), rounding(side))
    if len(s) == 0:
        check_options(density=density, merge=merge)
        return add(base, torch.zeros_like(base_), scale)
    # Not diag(s) V_i^T: for an expert that left the matrix as it was, that is rounding error and not 0, and
    # would count in a mean.
    coordinates = trim(u.mT @ deltas, density)  # (r, out) @ (N, out, in) -> (N, r, in)
    return add(base, u @ disjoint_merge(coordinates, elect_sign(coordinates), merge), scale)


def star(
    base: Tensor,
    experts: Tensor,
    *,
    energy: float = 0.4,
    scale: float = 1.0,
    generator: Rng = None,
) -> Tensor:
    """STAR: cut off each task vector's small singular values, rescale the others, average (Lee et al. 2025).

    Of delta_i stay the fewest largest triplets whose values sum to at least ``energy`` of all; they are
    multiplied so that the sum is what it was. Then ``theta_base + scale * mean_i``.
    energy in (0, 1], 1 changes nothing; scale: finite. Source: arXiv 2502.10339, Sec. 3.
    """
    base_, experts = matrices("star", base, experts)
    check_options(energy=energy)
    total = torch.zeros_like(base_)
    for delta in experts - base_:
        u, s, v = triplets(delta, min(base.shape), rounding(delta))
        before = s.cumsum(dim=0) - s  # (r,), what the larger values sum to
        k = int((before < energy * s.sum()).sum())
        total += (u[:, :k] * (s[:k] * s.sum() / s[:k].sum())) @ v[:, :k].mT
    return add(base, total / len(experts), scale)


def doge(
    base: Tensor,
    experts: Tensor,
    *,
    density: float = 0.3,
    scale: float = 1.0,
    steps: float = 100,
    generator: Rng = None,
) -> Tensor:
    """DOGE: a shared correction keeps what the merge does to each expert's rows (Wei et al. 2025).

    With the correction D, ``theta_base + sum_i a_i (delta_i + D) * m_i``, a_i inversely proportional to
    ``||delta_i||`` (0 for no move), m_i the largest entries of delta_i. D starts at 0 and takes Adam steps
    down
    ``sum_i sum_rows (sum_columns delta_i * (delta_i - sum_j a_j (delta_j + D)))^2``, whose gradient loses its
    part in the shared subspace: the ``r // 6`` main left directions of the ``r // N`` main left singular
    vectors of all task vectors.

    Deviations: the paper's a_i is 0.07 / ||delta_i||, ours ``scale * mean_j ||delta_j|| / ||delta_i||``; a
    step is 0.01 of the task vectors' root mean square, not 1e-4, and there are 100, not 400 (with many more,
    Adam's noise outweighs the task vectors); m_i is over the matrix, not the model. So the result does not
    depend on the size of the task vectors.
    density: fraction kept by m_i, in (0, 1]; scale: finite; steps: a whole number from 0. Deterministic.
    Source: arXiv 2501.01230, Sec. 3.
    """
    base_, experts = matrices("doge", base, experts)
    check_options(density=density, scale=scale, steps=steps)
    deltas = experts - base_
    unit = deltas.double().square().mean().sqrt().to(deltas.dtype)
    if unit == 0:
        return base.clone()
    deltas = deltas / unit
    size = torch.linalg.vector_norm(deltas, dim=(1, 2), keepdim=True)  # (N, 1, 1)
    a = torch.where(size > 0, scale * size.mean() / size, 0.0)
    r = min(base.shape)
    left = [triplets(d, max(1, r // len(deltas)), rounding(d))[0] for d in deltas if d.any()]
    q = left[0] if len(left) == 1 else torch.linalg.svd(torch.cat(left, 1), full_matrices=False)[0]
    q = q[:, : max(1, r // 6)]
    goal = (deltas * (deltas - (a * deltas).sum(dim=0))).sum(dim=2, keepdim=True)  # (N, out, 1)
    d, mean, square = (torch.zeros_like(base_) for _ in range(3))
    for step in range(1, int(steps) + 1):
        rest = goal - a.sum() * (deltas * d).sum(dim=2, keepdim=True)  # (N, out, 1)
        slope = -2 * a.sum() * (rest * deltas).sum(dim=0)  # (out, in)
        slope -= q @ (q.mT @ slope)
        mean = 0.9 * mean + 0.1 * slope
        square = 0.999 * square + 0.001 * slope.square()
        d -= 0.01 * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
    kept = torch.stack([largest(delta, density) for delta in deltas])  # (N, out, in)
    return add(base, unit * (a * (deltas + d) * kept).sum(dim=0), 1.0)
