"""Operators that average: on the sphere, by depth, by what experts scored, or by how far they moved.

Each takes ``base: (*shape)``, ``experts: (N, *shape)``, both finite, and returns ``(*shape)``; the
generator is ignored. Notation: ``delta_i = theta_i - theta_base``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rmm_lab.errors import InputError
from rmm_lab.formulas.checks import Rng, add, check_for, check_options, finite, matrices
from rmm_lab.formulas.steps import task_vectors


def weighted_average(
    base: Tensor,
    experts: Tensor,
    *,
    expert: float = 1,
    share: float = 0.75,
    scale: float = 1.0,
    generator: Rng = None,
) -> Tensor:
    """Task arithmetic with one expert in the lead; ignores generator (Ilharco et al. 2022, Sec. 2).

    ``theta_base + scale * sum_i w_i delta_i`` with ``w = share`` for the leading expert and
    ``(1 - share) / (N - 1)`` for every other; at scale 1 a weighted average of the experts.
    expert: which one leads, a whole number from 1 to N; share in [0, 1]; scale: finite.
    """
    deltas = task_vectors(base, experts)
    n = len(deltas)
    check_for(n, expert=expert, share=share)
    weights = deltas.new_full((n,), (1 - share) / max(1, n - 1))
    weights[int(expert) - 1] = share if n > 1 else 1.0
    return add(base, torch.tensordot(weights, deltas, dims=1), scale)  # (N, *shape) -> (*shape)


def model_stock(base: Tensor, experts: Tensor, *, generator: Rng = None) -> Tensor:
    """Model Stock: from the base towards the mean, as far as the experts' angle says (Jang et al. 2024).

    ``theta_base + t * mean_i delta_i``, ``t = N c / (1 + (N - 1) c)``, c the mean cosine between two deltas,
    0 at least; one expert alone is itself.
    **Warning**: t nears 0 where task vectors are nearly orthogonal, as those of different tasks are. Then it
    returns the base. The paper merges runs on one task. Source: arXiv 2403.19522, Sec. 4.
    """
    base_, experts = finite(base, experts)
    deltas, n = experts - base_, len(experts)
    if n == 1:
        return add(base, deltas[0], 1.0)
    flat = deltas.reshape(len(deltas), -1).double()  # (N, n)
    size = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    unit = flat / torch.where(size > 0, size, 1.0)
    pairs = (unit.sum(dim=0).square().sum() - unit.square().sum()) / (n * (n - 1))
    c = float(pairs.clamp(0, 1))
    return add(base, deltas.mean(dim=0), n * c / (1 + (n - 1) * c))


def slerp(
    base: Tensor, experts: Tensor, *, t: float = 0.5, of: str = "weights", generator: Rng = None
) -> Tensor:
    """SLERP: along the arc from the first expert to the second (Shoemake 1985).

    ``[sin((1 - t) w) a + sin(t w) b] / sin w``, w the angle between a and b: the experts' weights, or their
    deltas, to which the base is added. Exactly two experts. Where they are parallel, opposite or zero
    (``sin w < 1e-6``) it is ``(1 - t) a + t b``. Weights of one base are nearly parallel, so that this is
    nearly their average; deltas are not. t in [0, 1]: 0 is the first expert. of: "weights" or "deltas".
    Source: Animating rotation with quaternion curves, SIGGRAPH 1985; for models as in mergekit.
    """
    base_, experts = finite(base, experts)
    check_options(t=t, of=of)
    if len(experts) != 2:
        raise InputError(
            f"slerp: expected exactly 2 experts, found {len(experts)}; use karcher for other numbers"
        )
    points = (experts if of == "weights" else experts - base_).double()
    size = torch.linalg.vector_norm(points.reshape(len(points), -1), dim=1).view(
        2, *[1] * base.dim()
    )
    a, b = points / torch.where(size > 0, size, 1.0)
    # Twice the arc tangent is exact for small angles, where the arc cosine is not.
    w = 2 * torch.atan2(torch.linalg.vector_norm(a - b), torch.linalg.vector_norm(a + b))
    shares = [1 - t, t]
    if size.min() > 0 and torch.sin(w) >= 1e-6:
        shares = [float(torch.sin(s * w) / torch.sin(w)) for s in shares]
    merged = shares[0] * points[0] + shares[1] * points[1]
    origin = base_ if of == "weights" else torch.zeros_like(base_)
    return add(base, (merged - origin).to(base_.dtype), 1.0)


def karcher(
    base: Tensor, experts: Tensor, *, of: str = "weights", scale: float = 1.0, generator: Rng = None
) -> Tensor:
    """The Karcher mean: the direction nearest to all experts, at their mean norm (Karcher 1977).

    The unit vector with the least sum of squared angles to the ``u_i = x_i / ||x_i||``, from the mean of
    the u_i by steps ``m <- exp_m(mean_i log_m(u_i))``, times ``mean_i ||x_i||``. x_i: the experts' weights
    or their deltas, without zeros. The plain mean where the u_i cancel. Weights of one base are nearly
    parallel, so that this is nearly their average; deltas are not.
    of: "weights" or "deltas"; scale: of what it adds to the base, finite.
    Source: Riemannian center of mass, CPAM 30; for models as in mergekit.
    """
    base_, experts = finite(base, experts)
    check_options(of=of)
    points = (
        (experts if of == "weights" else experts - base_).double().reshape(len(experts), -1)
    )  # (N, n)
    size = torch.linalg.vector_norm(points, dim=1)
    mean = _direction(points[size > 0] / size[size > 0, None])
    merged = points.mean(dim=0) if mean is None else size.mean() * mean
    merged = merged.reshape(base.shape) - (base_ if of == "weights" else 0)
    return add(base, merged.to(base_.dtype), scale)


def _direction(units: Tensor) -> Tensor | None:
    """The Karcher mean of unit vectors (N, n) -> (n,); None where they cancel, or there is none."""
    mean = units.sum(dim=0)
    if torch.linalg.vector_norm(mean) < 1e-9:
        return None
    for _ in range(100):
        mean = mean / torch.linalg.vector_norm(mean)
        cosine = units @ mean  # (N,)
        across = units - cosine[:, None] * mean  # (N, n)
        sine = torch.linalg.vector_norm(across, dim=1)
        angle = torch.atan2(sine, cosine)
        step = (angle / sine.clamp(min=1e-150)) @ across / len(units)  # mean of log_m(u_i): (n,)
        length = torch.linalg.vector_norm(step)
        if length < 1e-12:
            break
        mean = torch.cos(length) * mean + torch.sin(length) / length * step
    return mean


def lines(
    base: Tensor,
    experts: Tensor,
    *,
    first: float = 0.3,
    last: float = 1.0,
    depth: float | None = None,
    generator: Rng = None,
) -> Tensor:
    """LiNeS: task arithmetic with a scale that grows with depth (Wang et al. 2025).

    ``theta_base + (first + (last - first) * depth) * sum_i delta_i``. In the paper's letters, ``first`` is
    alpha, ``last`` alpha + beta. first, last: finite. depth: of the layer, in [0, 1], 0 for the stem;
    ``LayerPool`` passes ``(k + 1) / L``, so that the last layer has 1 (the paper counts from the first
    layer). Source: arXiv 2410.17146, Eq. 3.
    """
    base_, experts = finite(base, experts)
    check_options(first=first, last=last)
    if depth is None or not 0 <= depth <= 1:
        raise InputError(
            f"lines: expected the layer's depth in [0, 1], found {depth!r}; LayerPool passes it"
        )
    return add(base, (experts - base_).sum(dim=0), first + (last - first) * depth)


def metrics_weighted_average(
    base: Tensor,
    experts: Tensor,
    *,
    metrics: tuple[float, ...] = (),
    power: float = 1.0,
    generator: Rng = None,
) -> Tensor:
    """Metrics-weighted average: ``sum_i w_i theta_i``, w_i proportional to ``metrics_i ** power``.

    The paper merges checkpoints of one run by 1 / loss or by the number of steps. metrics: one for each
    expert, above 0; without them all weights are equal. power: finite; 0 is the average. Source: arXiv
    2504.18580.
    """
    _, experts = finite(base, experts)
    check_options(power=power)
    metrics = metrics or (1.0,) * len(experts)
    check_for(len(experts), metrics=metrics)
    logs = torch.tensor(metrics, dtype=torch.float64).log()
    weights = (power * (logs - logs.amax())).softmax(dim=0)  # in logs: no overflow
    return torch.tensordot(weights.to(experts), experts, dims=1).to(base.dtype)


def widen(
    base: Tensor,
    experts: Tensor,
    *,
    factor: float = 1.0,
    calibration: float = 1.0,
    generator: Rng = None,
) -> Tensor:
    """WIDEN: a weight per expert and input column, by how its length and direction moved (Yu et al. 2024).

    Matrices only. A column of theta has the length m and the direction d. Its two moves are ``|m_i - m_0|``
    and ``1 - cos(d_i, d_0)``; each is ranked within its model to r in [0, 1) and becomes softmax_i(r),
    or ``calibration`` where r is above ``factor * mean(r)``. w_i is the mean of the two:
    ``theta_base + sum_i w_i delta_i``. The weights need not sum to 1.
    factor: the paper's t, finite from 0; calibration: its s, finite. Source: arXiv 2408.03092, Sec. 3.
    """
    base_, experts = matrices("widen", base, experts)
    check_options(factor=factor, calibration=calibration)
    length_0, length = (torch.linalg.vector_norm(w, dim=-2, keepdim=True) for w in (base_, experts))
    d_0, d = (w / torch.where(m > 0, m, 1.0) for w, m in ((base_, length_0), (experts, length)))
    moves = (
        (length - length_0).abs().squeeze(1),
        (d - d_0).square().sum(dim=1) / 2,
    )  # (N, in) each
    one, other = (_scores(move, factor, calibration) for move in moves)
    weights = (one + other) / 2  # (N, in)
    return add(base, (weights[:, None] * (experts - base_)).sum(dim=0), 1.0)


def _scores(move: Tensor, factor: float, calibration: float) -> Tensor:
    """WIDEN's weights from one of the two moves: (N, in) -> (N, in)."""
    rank = move.argsort(dim=1, stable=True).argsort(dim=1) / move.shape[1]  # of equal ones by index
    high = rank > factor * rank.mean(dim=1, keepdim=True)
    return torch.where(high, calibration, rank.softmax(dim=0)).to(move.dtype)
