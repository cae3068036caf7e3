"""Steps that operators share: task vectors, the trim and sign election of TIES, the random drop of DARE."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from rmm_lab.errors import InputError
from rmm_lab.formulas.checks import Rng, check_for, check_options, check_stack, checked

BLOCK = 2**16  # entries computed at a time, so that intermediate results fit a core's cache


def task_vectors(base: Tensor, experts: Tensor) -> Tensor:
    """What each expert learned: ``delta_i = theta_i - theta_base`` (Ilharco et al. 2022, Sec. 2).

    base: (*shape), experts: (N, *shape), both floating. Returns (N, *shape) in float32, or in float64 if an
    input is.
    """
    base, experts = checked(base, experts)
    return experts - base  # (N, *shape) - (*shape) -> (N, *shape)


def trim(deltas: Tensor, density: float | tuple[float, ...]) -> Tensor:
    """Keep each expert's largest entries, set the rest to 0 (Yadav et al. 2023, Alg. 1, step 1).

    deltas: (N, *shape) task vectors; density: fraction to keep, in (0, 1], or N of them. Keeps exactly
    ``k = max(1, int(density * numel))`` entries per expert, by magnitude over its whole tensor; among equal
    magnitudes the lower index wins. An expert with a NaN keeps only the NaN. Returns (N, *shape).
    """
    check_stack("deltas", deltas)
    check_for(len(deltas), density=density)
    each = density if isinstance(density, tuple) else (density,) * len(deltas)
    kept = zip(deltas, each, strict=True)
    return torch.stack([delta * largest(delta, share) for delta, share in kept])


def elect_sign(deltas: Tensor) -> Tensor:
    """The sign with the larger total magnitude over experts (Yadav et al. 2023, Alg. 1, step 2).

    deltas: (N, *shape) task vectors. Returns ``sgn(sum_i delta_i)``: (*shape) in {-1, 0, 1}.
    """
    check_stack("deltas", deltas)
    return deltas.sum(dim=0).sign()  # (N, *shape) -> (*shape)


def disjoint_merge(deltas: Tensor, sign: Tensor, merge: str = "mean") -> Tensor:
    """Merge the experts that agree with the elected sign (Yadav et al. 2023, Alg. 1, step 3).

    deltas: (N, *shape) task vectors; sign: (*shape) in {-1, 0, 1}; merge: "mean" over the nonzero entries
    that agree (the TIES paper's disjoint mean), or their "sum". Returns (*shape), 0 where none agrees.
    """
    check_stack("deltas", deltas, sign.shape)
    check_options(merge=merge)

    def merge_block(deltas: Tensor, sign: Tensor) -> Tensor:  # (N, n), (n,) -> (n,)
        agrees = deltas * sign > 0  # (N, n), False where either one is 0
        total = (deltas * agrees).sum(dim=0)  # (N, n) -> (n,)
        return total if merge == "sum" else total / agrees.sum(dim=0).clamp(min=1)

    return _in_blocks(merge_block, deltas, sign)


def drop_and_rescale(deltas: Tensor, drop_rate: float, generator: Rng = None) -> Tensor:
    """DARE: drop entries at random, rescale the others so that the mean stays (Yu et al. 2024).

    ``m ~ Bernoulli(p)`` per entry and expert, then ``(1 - m) * delta / (1 - p)``.
    deltas: (N, *shape) task vectors; drop_rate: p in [0, 1), 0 drops nothing; generator: seeded, needed
    unless p is 0. A CPU generator draws the same mask whatever device the deltas are on.
    Returns (N, *shape).
    """
    check_stack("deltas", deltas)
    check_options(drop_rate=drop_rate)
    if drop_rate == 0:
        return deltas.clone()
    device = _seeded(generator).device
    keep = torch.empty(deltas.numel(), dtype=torch.bool, device=device)  # (N * numel,)
    # A CPU generator draws the same stream in pieces as at once; another one may not.
    for part in keep.split(BLOCK if device.type == "cpu" else deltas.numel()):
        torch.ge(seeded_uniform(part.shape, generator), drop_rate, out=part)
    return (deltas * keep.to(deltas.device).reshape(deltas.shape)).div_(1 - drop_rate)


def seeded_uniform(shape: Sequence[int], generator: Rng) -> Tensor:
    """float64 uniforms in [0, 1) of a shape, on the generator's device; InputError without a generator."""
    # torch.rand, not bernoulli_, whose stream depends on how torch was built.
    device = _seeded(generator).device
    return torch.rand(shape, generator=generator, device=device, dtype=torch.float64)


def _seeded(generator: Rng) -> torch.Generator:
    if not isinstance(generator, torch.Generator):
        raise InputError(
            "generator: expected a seeded one, so that the tested model is the searched one, found "
            f"{generator!r}; pass torch.Generator().manual_seed(seed)"
        )
    return generator


# ---------------------------------------------------------------- speed


def largest(delta: Tensor, density: float) -> Tensor:
    """Where the ``max(1, int(density * numel))`` largest magnitudes of delta are: (*shape) -> bool."""
    size = delta.detach().abs().flatten()  # (*shape) -> (numel,)
    size = size.to(torch.promote_types(size.dtype, torch.float32))  # numpy has no bfloat16
    k = max(1, int(density * size.numel()))
    below = size.numel() - k
    if size.device.type == "cpu":  # in half of topk's time; for both, NaN is the largest
        threshold = torch.from_numpy(np.partition(size.numpy(), below)[below:]).amin()
    else:
        threshold = size.topk(k, sorted=False).values.amin()
    keep = size >= threshold
    surplus = int(keep.count_nonzero()) - k  # entries tied at the threshold, but too many
    if surplus > 0 and threshold > 0:  # zeros are zeros, kept or not
        tied = (size == threshold).nonzero().squeeze(1)
        keep[tied[-surplus:]] = False  # the lower indices stay
    return keep.reshape(delta.shape)


def _in_blocks(step: Callable[[Tensor, Tensor], Tensor], deltas: Tensor, sign: Tensor) -> Tensor:
    """``step(deltas, sign)`` of an entry-by-entry function, a block at a time (on a GPU all at once).

    deltas: (N, *shape), sign: (*shape). Returns (*shape).
    """
    # The last block takes the rest: torch sums the last columns, up to the width of a vector register, in
    # another order, so every other block must be a whole number of vectors.
    ends = range(BLOCK, sign.numel() - BLOCK + 1, BLOCK) if sign.device.type == "cpu" else ()
    columns = deltas.reshape(len(deltas), -1).tensor_split(tuple(ends), dim=1)  # (N, n) each
    signs = sign.reshape(-1).tensor_split(tuple(ends))  # (n,) each
    merged = [step(*block) for block in zip(columns, signs, strict=True)]  # (n,) each
    return torch.cat(merged).reshape(sign.shape)
