"""Operators that choose entries: by magnitude, by chance, by sign, or by agreement of the experts.

Each takes ``base: (*shape)``, ``experts: (N, *shape)``, both finite, and returns ``(*shape)``; all but
``della`` ignore the generator. They rank over everything they are given. Notation: ``delta_i = theta_i -
theta_base``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rmm_lab.errors import InputError
from rmm_lab.formulas.checks import Rng, add, check_options, finite, weighed
from rmm_lab.formulas.steps import (
    disjoint_merge,
    drop_and_rescale,
    elect_sign,
    largest,
    seeded_uniform,
    task_vectors,
)


def _deltas(base: Tensor, experts: Tensor) -> Tensor:
    base, experts = finite(base, experts)
    return experts - base  # (N, *shape)


def dare_ties(
    base: Tensor,
    experts: Tensor,
    *,
    drop_rate: float = 0.34,
    scale: float | tuple[float, ...] = 1.0,
    merge: str = "mean",
    generator: Rng = None,
) -> Tensor:
    """DARE-TIES: TIES with DARE's random drop in place of the trim (Yu et al. 2024).

    drop_rate in [0, 1); scale: finite, or a tuple of one for each expert, as for ``ties``; merge: "mean" or
    "sum"; generator: as for ``dare``.
    """
    deltas = drop_and_rescale(task_vectors(base, experts), drop_rate, generator)
    deltas, scale = weighed(deltas, scale)
    return add(base, disjoint_merge(deltas, elect_sign(deltas), merge), scale)


def breadcrumbs(
    base: Tensor,
    experts: Tensor,
    *,
    density: float = 0.14,
    outliers: float = 0.01,
    scale: float = 0.3,
    generator: Rng = None,
) -> Tensor:
    """Model Breadcrumbs: neither the largest nor the small entries (Davari & Belilovsky 2024).

    Of each delta_i the ``int(outliers * n)`` largest of n entries are dropped, the ``max(1, int(density *
    n))`` largest of the others stay (fewer if fewer are left). ``theta_base + scale * sum_i``. outliers in
    [0, 1), density in (0, 1]; among equal magnitudes the lower index is the larger. scale: finite. Source:
    arXiv 2312.06795, Sec. 3 (there by two percentiles: beta = 0.85 and gamma = 0.99).
    """
    deltas = _deltas(base, experts)
    check_options(density=density, outliers=outliers)
    n = base.numel()
    first = int(outliers * n)
    order = (
        deltas.abs().reshape(len(deltas), -1).argsort(dim=1, descending=True, stable=True)
    )  # (N, n)
    kept = order[:, first : first + max(1, int(density * n))]  # (N, k)
    flat = deltas.reshape(len(deltas), -1)  # (N, n)
    thin = torch.zeros_like(flat).scatter_(1, kept, flat.gather(1, kept))
    return add(base, thin.sum(dim=0).reshape(base.shape), scale)


def della(
    base: Tensor,
    experts: Tensor,
    *,
    drop_rate: float = 0.5,
    epsilon: float = 0.2,
    scale: float = 1.0,
    merge: str = "mean",
    generator: Rng = None,
) -> Tensor:
    """DELLA: DARE-TIES that drops small entries more often than large ones (Deep et al. 2024).

    Within a row of n entries (the last axis), ``p = drop_rate - epsilon / 2 + epsilon * rank / n`` with
    rank 0 for the largest; an entry is dropped with probability p, else divided by ``1 - p``. Then a sign
    is elected and the experts that agree are merged. drop_rate in [0, 1), epsilon in [0, 1), such that p
    stays in [0, 1); scale: finite; merge: "mean" (the paper) or "sum"; generator: seeded, one uniform for
    each entry, expert after expert. Source: arXiv 2406.11617, Sec. 3 (MagPrune).
    """
    deltas = _deltas(base, experts)
    check_options(drop_rate=drop_rate, epsilon=epsilon)
    if not epsilon / 2 <= drop_rate < 1 - epsilon / 2:
        raise InputError(
            f"option epsilon: expected drop_rate ± epsilon / 2 in [0, 1), found drop_rate {drop_rate:g} and "
            f"epsilon {epsilon:g}; lower epsilon"
        )
    rows = deltas.reshape(len(deltas), -1, base.shape[-1] if base.dim() else 1)  # (N, rows, n)
    order = rows.abs().argsort(dim=2, descending=True, stable=True)
    rank = order.argsort(dim=2).to(deltas.dtype)  # 0 is the largest
    p = (drop_rate - epsilon / 2 + epsilon * rank / rows.shape[2]).reshape(deltas.shape)
    kept = seeded_uniform(deltas.shape, generator).to(p.device) >= p
    deltas = deltas * kept / (1 - p)
    return add(base, disjoint_merge(deltas, elect_sign(deltas), merge), scale)


def consensus(
    base: Tensor,
    experts: Tensor,
    *,
    threshold: float = 0.4,
    agree: float = 2,
    scale: float = 0.3,
    generator: Rng = None,
) -> Tensor:
    """Consensus merging: the entries that several tasks need, found by TALL masks (Wang et al. 2024).

    With ``total = sum_i delta_i`` the mask of task i is ``|delta_i| >= threshold * |total - delta_i|``.
    ``theta_base + scale * total`` where at least ``min(agree, N)`` masks are on, the base elsewhere.
    threshold: the paper's lambda, finite from 0; agree: a whole number from 1; scale: finite.
    Source: arXiv 2405.07813, Eq. 5 and Sec. 4.
    """
    deltas = _deltas(base, experts)
    check_options(threshold=threshold, agree=agree)
    total = deltas.sum(dim=0)  # (N, *shape) -> (*shape)
    votes = (deltas.abs() >= threshold * (total - deltas).abs()).sum(dim=0)
    return add(base, total * (votes >= min(int(agree), len(deltas))), scale)


def emr(base: Tensor, experts: Tensor, *, scale: float = 1.0, generator: Rng = None) -> Tensor:
    """EMR's unified vector: the elected sign with the largest magnitude that has it (Huang et al. 2024).

    ``theta_base + scale * sign(sum_i delta_i) * max{|delta_i| : delta_i has that sign}``. The paper then
    gives each task a mask and a rescaler of this vector; one merged model cannot have them. scale: finite.
    Source: arXiv 2405.17461, Sec. 3 (Elect).
    """
    deltas = _deltas(base, experts)
    sign = elect_sign(deltas)
    return add(base, sign * (deltas * sign).amax(dim=0), scale)


def magmax(base: Tensor, experts: Tensor, *, scale: float = 1.0, generator: Rng = None) -> Tensor:
    """MagMax: each entry from the expert that moved it the furthest (Marczak et al. 2024).

    ``theta_base + scale * delta_i``, entry by entry the i with the largest |delta_i|, the first of equal
    ones. The paper merges models that were trained one after the other. scale: finite. Source: arXiv
    2407.06322, Sec. 4.
    """
    deltas = _deltas(base, experts)
    furthest = deltas.abs().argmax(dim=0, keepdim=True)  # (1, *shape)
    return add(base, deltas.gather(0, furthest)[0], scale)


def sce(
    base: Tensor,
    experts: Tensor,
    *,
    density: float = 0.1,
    scale: float = 1.0,
    generator: Rng = None,
) -> Tensor:
    """SCE: select what differs, calculate a weight per expert, erase the minority's sign (Wan et al. 2024).

    Select: the entries whose variance over the experts is largest, a fraction ``density``. Calculate:
    ``w_i`` proportional to the sum of delta_i^2 over them. Erase: where delta_i has not the sign of ``sum_i
    delta_i``. ``theta_base + scale * sum_i w_i delta_i / sum_i w_i`` over the experts that are left at an
    entry. (The weights there sum to 1 as in mergekit; the paper leaves them as they are.) density in (0,
    1]; where no variance is above 0 all entries are selected. scale: finite. Source: FuseChat, arXiv
    2408.07990, Sec. 3.
    """
    deltas = _deltas(base, experts)
    check_options(density=density)
    spread = (deltas - deltas[0]).var(dim=0, correction=0)  # (*shape), 0 for equal experts
    selected = deltas * largest(spread, density)
    weights = selected.double().square().reshape(len(deltas), -1).sum(dim=1)  # (N,)
    weights = (weights / torch.where(weights > 0, weights, 1.0).amax()).to(deltas.dtype)
    agrees = selected * elect_sign(selected) > 0  # (N, *shape)
    weights = weights.view(-1, *[1] * base.dim()) * agrees  # (N, *shape)
    total = weights.sum(dim=0)
    merged = (weights * selected).sum(dim=0) / torch.where(total > 0, total, 1.0)
    return add(base, merged, scale)


def pcb(
    base: Tensor,
    experts: Tensor,
    *,
    density: float = 0.1,
    scale: float = 1.2,
    generator: Rng = None,
) -> Tensor:
    """PCB-Merging: entries that matter to their own task and that the other tasks want too (Du et al. 2024).

    ``n_i``: |delta_i| clipped at its 1 % and 99 % quantiles, scaled to [0, 1], with the sign of delta_i.
    ``b_i = exp(N n_i^2) * sum_j tanh(n_i n_j)``. The largest b_i, a fraction ``density``, are scaled to [0,
    1], the smallest of them to 0: w_i; w_i is 0 elsewhere. ``theta_base + scale * sum_i w_i delta_i / sum_i
    w_i``. density in (0, 1]; scale: finite. Source: arXiv 2410.02396, Sec. 3 (softmax there, exp and tanh
    in the authors' code; signs are those of n_i, as the products need).
    """
    deltas = _deltas(base, experts)
    check_options(density=density)
    n = torch.stack(
        [_normal(delta) for delta in deltas.reshape(len(deltas), -1)]
    )  # (N, n) in [-1, 1]
    inter = torch.stack([(one * n).tanh().sum(dim=0) for one in n])  # (N, n)
    # exp(-N) times the formula's, so that nothing overflows; the scaling to [0, 1] takes it out.
    weights = torch.stack(
        [_rise(b, density) for b in (len(n) * (n.square() - 1)).exp() * inter]
    )  # (N, n) in [0, 1]
    total = weights.sum(dim=0)
    merged = (weights * deltas.reshape(len(deltas), -1)).sum(dim=0) / torch.where(
        total > 0, total, 1.0
    )
    return add(base, merged.reshape(base.shape), scale)


def _normal(delta: Tensor) -> Tensor:
    """Magnitudes between the 1 % and the 99 % quantile to [0, 1], signs as they were: (n,) -> (n,)."""
    size, last = delta.abs(), delta.numel() - 1
    low, high = (size.kthvalue(1 + round(q * last)).values for q in (0.01, 0.99))
    width = torch.where(high > low, high - low, 1.0)  # all alike: all 1, or 0 if they are 0
    size = (size.clamp(low, high) - low) / width if high > low else (size > 0).to(size.dtype)
    return size * delta.sign()


def _rise(b: Tensor, density: float) -> Tensor:
    """The k = max(1, int(density * n)) largest from 0 to 1, all others 0: (n,) -> (n,)."""
    top = b.topk(max(1, int(density * b.numel()))).values
    low, high = top[-1], top[0]
    if high <= low:  # all alike
        return (b >= low).to(b.dtype)
    return ((b - low) / (high - low)).clamp(min=0)
