"""Operators on LoRA adapters kept factored: a task vector ``B_i A_i`` is never formed.

Each takes ``base: (out, in)`` and the experts' changes as ``Factored``, and returns ``(out, in)``. The only
product of that size is the last one, of what is added to the base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rmm_lab.errors import InputError
from rmm_lab.formulas.checks import Rng, add, check_options, checked
from rmm_lab.formulas.spectral import rounding, triplets
from rmm_lab.formulas.steps import disjoint_merge, elect_sign, trim

Pair = tuple[Tensor, Tensor]  # B: (out, r) and A: (r, in), of the change B A


@dataclass(frozen=True)
class Factored:
    """The changes of N experts to one matrix, each as a pair; ranks may differ, and may be 0."""

    pairs: tuple[Pair, ...]

    @classmethod
    def of(cls, base: Tensor, experts: Sequence[Tensor], known: Sequence[Pair | None]) -> Factored:
        """The pairs that are known. An expert without one has rank 0 where its matrix is the base's, and
        ``(theta_i - theta_base, I)`` where it was trained as a whole.

        base: (out, in); experts: N of them.
        """
        pairs = []
        for expert, pair in zip(experts, known, strict=True):
            if pair is None and torch.equal(expert, base):
                pair = base.new_zeros(len(base), 0), base.new_zeros(0, base.shape[1])
            elif pair is None:
                pair = expert - base, torch.eye(base.shape[1], dtype=base.dtype)
            pairs.append(pair)
        return cls(tuple(pairs))

    def tensor_split(self, n: int, dim: int = 1) -> list[Factored]:
        """The changes to each of n matrices that stand one below the other, as torch's function gives it."""
        rows = [left.tensor_split(n) for left, _ in self.pairs]  # n of (out / n, r) each
        rights = [right for _, right in self.pairs]
        return [
            Factored(tuple(zip(lefts, rights, strict=True))) for lefts in zip(*rows, strict=True)
        ]


def by_matrix(
    operator: Callable[..., Tensor],
    base: Mapping[str, Tensor],
    experts: Sequence[Mapping[str, Tensor]],
    fused: Callable[[str], int],
    known: Sequence[Mapping[str, Pair | None]] = (),
) -> dict[str, Tensor]:
    """A layer's matrices merged whole, each by its name; what is no matrix is averaged.

    operator: of a base (out, in) and of experts (N, out, in), or ``Factored`` where ``known`` has each
    expert's pairs. fused: how many matrices stand one below the other in a tensor of a name.
    """
    out = {}
    for name, own in base.items():
        others = [expert[name] for expert in experts]
        if own.dim() != 2:
            out[name] = checked(own, torch.stack(others))[1].mean(dim=0).to(own.dtype)
            continue
        pairs, n = [adapter[name] for adapter in known], fused(name)
        given = Factored.of(own, others, pairs) if known else torch.stack(others)
        parts = zip(own.tensor_split(n), given.tensor_split(n, dim=1), strict=True)
        out[name] = torch.cat([operator(*part) for part in parts])
    return out


def _checked(name: str, base: Tensor, experts: Factored) -> tuple[list[Tensor], list[Tensor]]:
    """All B and all A in float32 or more; InputError unless they are finite and fit the base (out, in)."""
    if not isinstance(experts, Factored) or not experts.pairs or base.dim() != 2:
        raise InputError(
            f"{name}: expected a matrix and the Factored changes of 1 or more LoRA adapters, found shape "
            f"{tuple(base.shape)} and a {type(experts).__name__}; merge other weights by another operator"
        )
    dtype = torch.promote_types(base.dtype, torch.float32)
    for i, (left, right) in enumerate(experts.pairs):
        found = tuple(left.shape), tuple(right.shape)
        dtype = torch.promote_types(dtype, torch.promote_types(left.dtype, right.dtype))
        if found != ((len(base), len(right)), (len(right), base.shape[1])):
            raise InputError(
                f"{name}: expected factors (out, r) and (r, in) of a change of shape {tuple(base.shape)}, "
                f"found {found[0]} and {found[1]} of expert {i + 1}; name the base that the adapter was "
                "trained on"
            )
        if not (left.isfinite().all() and right.isfinite().all()):
            raise InputError(
                f"{name}: expected finite factors, found NaN or infinity of expert {i + 1}; fine-tune it "
                "again with a lower learning rate"
            )
    lefts, rights = zip(*experts.pairs, strict=True)
    return [b.to(dtype) for b in lefts], [a.to(dtype) for a in rights]


def knots_factored(
    base: Tensor,
    experts: Factored,
    *,
    density: float = 0.3,
    scale: float = 1.0,
    merge: str = "mean",
    generator: Rng = None,
) -> Tensor:
    """KnOTS-TIES through the factors (Stoica et al. 2025): what ``knots`` computes of the product.

    The shared basis U is that of ``[B_1 A_1 ... B_N A_N]``. With ``[B_1 ... B_N] = Q [R_1 ... R_N]`` and
    ``A_i^T = Q_i T_i`` it is Q times the left singular vectors of the small ``[R_1 T_1^T ... R_N T_N^T]``,
    and expert i's coordinates are ``U^T B_i A_i``: (K, in), K at most the sum of the ranks. They are merged
    by TIES, and multiplied by U. ``knots`` sees the weights alone, in which the product is rounded: it may
    take that noise for further directions, and trims a fraction of more coordinates.
    density: fraction of the coordinates kept, in (0, 1]; scale: finite; merge: "mean" or "sum", as for
    ``ties``. Source: arXiv 2410.19735, Sec. 4.
    """
    lefts, rights = _checked("knots_factored", base, experts)
    check_options(density=density, merge=merge)
    q, r = torch.linalg.qr(torch.cat(lefts, dim=1))  # (out, R) -> (out, k), (k, R)
    own = r.split([b.shape[1] for b in lefts], dim=1)  # (k, r_i) each
    turned = [torch.linalg.qr(a.mT, mode="r")[1].mT for a in rights]  # (r_i, min(in, r_i)) each
    core = torch.cat([r_i @ t_i for r_i, t_i in zip(own, turned, strict=True)], dim=1)
    whole = len(base), len(rights) * base.shape[1]
    u, s, _ = triplets(core, min(core.shape), rounding(core, whole))  # (k, K)
    if len(s) == 0:
        return add(base, torch.zeros_like(base, dtype=q.dtype), scale)
    coordinates = torch.stack([u.mT @ r_i @ a for r_i, a in zip(own, rights, strict=True)])
    coordinates = trim(coordinates, density)  # (N, K, in)
    return add(base, q @ u @ disjoint_merge(coordinates, elect_sign(coordinates), merge), scale)


def do_merging(
    base: Tensor,
    experts: Factored,
    *,
    gamma: float = 1.0,
    scale: float = 1.0,
    steps: float = 50,
    generator: Rng = None,
) -> Tensor:
    """DO-Merging: directions made orthogonal, magnitudes averaged apart (Zheng et al. 2025).

    1. All A_i, and all B_i, move by gradient descent down
       ``sum_{i != j} ||A_i A_j^T||^2 + gamma sum_i ||A_i - start||^2`` (of B_i: ``B_i^T B_j``).
    2. Each column of ``B_i A_i`` is its length m_i times a direction d_i.
    3. ``theta_base + scale * mean_i(m_i) * sum_i d_i``, column by column; the mean is over the experts that
       move the column.

    Deviations: squared norms, gamma in units of the largest eigenvalue of the Gram matrix, and a fixed
    number of steps of a length that descends; the split of a product into A and B is the balanced one of its
    SVD, so that the result depends on the product alone.
    gamma: finite from 0; scale: finite; steps: a whole number from 0, which leaves step 1 out.
    Source: arXiv 2505.15875.
    """
    lefts, rights = _checked("do_merging", base, experts)
    check_options(gamma=gamma, steps=steps)
    pairs = [_balanced(b, a) for b, a in zip(lefts, rights, strict=True)]
    lefts = [b.mT for b in _apart([b.mT for b, _ in pairs], gamma, int(steps))]
    rights = _apart([a for _, a in pairs], gamma, int(steps))
    sizes = torch.stack(
        [
            torch.linalg.vector_norm(torch.linalg.qr(b, mode="r")[1] @ a, dim=0)
            for b, a in zip(lefts, rights, strict=True)
        ]
    )  # (N, in): lengths of the columns of B_i A_i
    mean = sizes.sum(dim=0) / (sizes > 0).sum(dim=0).clamp(min=1)
    ratio = torch.where(sizes > 0, mean / sizes, 0.0)  # (N, in)
    moved = torch.cat([a * c for a, c in zip(rights, ratio, strict=True)])  # (R, in)
    return add(base, torch.cat(lefts, dim=1) @ moved, scale)


def _balanced(left: Tensor, right: Tensor) -> Pair:
    """The same product as ``U sqrt(S)`` and ``sqrt(S) V^T`` of its SVD: (out, r'), (r', in), r' its rank."""
    q, r = torch.linalg.qr(left)  # (out, k), (k, r)
    p, t = torch.linalg.qr(right.mT)  # (in, l), (l, r)
    core = r @ t.mT
    u, s, v = triplets(core, min(core.shape), rounding(core, (len(left), right.shape[1])))
    root = s.sqrt()
    return q @ u * root, (p @ v * root).mT


def _apart(rows: list[Tensor], gamma: float, steps: int) -> list[Tensor]:
    """Groups of rows, (r_i, d) each, moved so that different groups are nearly orthogonal.

    They stay in the span of all rows C: ``T C`` with T: (R, R), so that a step costs R^3, whatever d is.
    """
    sizes = [len(group) for group in rows]
    c = torch.cat(rows)  # (R, d)
    gram = c @ c.mT  # (R, R)
    if len(c) == 0 or (top := float(torch.linalg.eigvalsh(gram)[-1])) <= 0:
        return rows
    gram = gram / top
    number = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    other = number[:, None] != number  # (R, R): of different groups
    t = start = torch.eye(len(c), dtype=c.dtype)
    for _ in range(steps):
        slope = 4 * (t @ gram @ t.mT * other) @ t + 2 * gamma * (t - start)
        t = t - slope / (12 + 2 * gamma)
    return list((t @ c).split(sizes))
