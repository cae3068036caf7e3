"""Merging operators: pure functions that turn one layer's experts into one merged layer (Eq. 4).

    task vectors        delta_i = theta_i - theta_base                 Ilharco et al. 2022
    weight average      theta = mean_i theta_i                         Wortsman et al. 2022
    weighted average    theta = theta_base + scale * sum_i w_i delta_i, sum_i w_i = 1
    task arithmetic     theta = theta_base + scale * sum_i delta_i     Ilharco et al. 2022
                        theta = theta_base + sum_i scale_i * delta_i   with a scale per expert
    TIES                trim -> elect sign -> disjoint merge           Yadav et al. 2023
    DARE                drop and rescale -> task arithmetic            Yu et al. 2024
    DARE-TIES           drop and rescale -> elect sign -> disjoint merge

Every operator takes ``base: (*shape)``, a weight of the base model, and ``experts: (N, *shape)``, the same
weight of N fine-tuned models. It returns ``(*shape)`` in the dtype of ``base``, and never changes its inputs;
half precision is computed in float32. An operator trims over everything it is given: ``LayerPool`` passes a
flattened layer, as in Eq. 4, unless told otherwise. NaN stays visible in the result. Wrong shapes, dtypes
and options raise InputError.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rmm_lab.errors import InputError

Option = float | str | tuple[float, ...]
Rng = torch.Generator | None
BLOCK = 2**16  # entries computed at a time, so that intermediate results fit a core's cache

# ---------------------------------------------------------------- steps of the papers


def task_vectors(base: Tensor, experts: Tensor) -> Tensor:
    """What each expert learned: ``delta_i = theta_i - theta_base`` (Ilharco et al. 2022, Sec. 2).

    base: (*shape), experts: (N, *shape), both floating. Returns (N, *shape) in float32, or in float64 if an
    input is.
    """
    base, experts = _checked(base, experts)
    return experts - base  # (N, *shape) - (*shape) -> (N, *shape)


def trim(deltas: Tensor, density: float) -> Tensor:
    """Keep each expert's largest entries, set the rest to 0 (Yadav et al. 2023, Alg. 1, step 1).

    deltas: (N, *shape) task vectors; density: fraction to keep, in (0, 1]. Keeps exactly
    ``k = max(1, int(density * numel))`` entries per expert, by magnitude over its whole tensor; among equal
    magnitudes the lower index wins. An expert with a NaN keeps only the NaN. Returns (N, *shape).
    """
    _check_stack("deltas", deltas)
    _check_options(density=density)
    return torch.stack([delta * _largest(delta, density) for delta in deltas])


def elect_sign(deltas: Tensor) -> Tensor:
    """The sign with the larger total magnitude over experts (Yadav et al. 2023, Alg. 1, step 2).

    deltas: (N, *shape) task vectors. Returns ``sgn(sum_i delta_i)``: (*shape) in {-1, 0, 1}.
    """
    _check_stack("deltas", deltas)
    return deltas.sum(dim=0).sign()  # (N, *shape) -> (*shape)


def disjoint_merge(deltas: Tensor, sign: Tensor, merge: str = "mean") -> Tensor:
    """Merge the experts that agree with the elected sign (Yadav et al. 2023, Alg. 1, step 3).

    deltas: (N, *shape) task vectors; sign: (*shape) in {-1, 0, 1}; merge: "mean" over the nonzero entries
    that agree (the TIES paper's disjoint mean), or their "sum". Returns (*shape), 0 where none agrees.
    """
    _check_stack("deltas", deltas, sign.shape)
    _check_options(merge=merge)

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
    _check_stack("deltas", deltas)
    _check_options(drop_rate=drop_rate)
    if drop_rate == 0:
        return deltas.clone()
    if not isinstance(generator, torch.Generator):
        raise InputError(
            "generator: expected a seeded one, so that the tested model is the searched one, found "
            f"{generator!r}; pass torch.Generator().manual_seed(seed)"
        )
    device = generator.device
    keep = torch.empty(deltas.numel(), dtype=torch.bool, device=device)  # (N * numel,)
    # A CPU generator draws the same stream in pieces as at once; another one may not.
    for part in keep.split(BLOCK if device.type == "cpu" else deltas.numel()):
        # torch.rand, not bernoulli_, whose stream depends on how torch was built.
        uniform = torch.rand(len(part), generator=generator, device=device, dtype=torch.float64)
        torch.ge(uniform, drop_rate, out=part)  # uniform in [0, 1)
    return (deltas * keep.to(deltas.device).reshape(deltas.shape)).div_(1 - drop_rate)


# ---------------------------------------------------------------- the six operators


def weight_average(base: Tensor, experts: Tensor, *, generator: Rng = None) -> Tensor:
    """Mean of the experts, the uniform soup; ignores base and generator (Wortsman et al. 2022)."""
    average = _checked(base, experts)[1].mean(dim=0)  # (N, *shape) -> (*shape)
    return average.to(base.dtype)


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
    _check_for(n, expert=expert, share=share)
    weights = deltas.new_full((n,), (1 - share) / max(1, n - 1))
    weights[int(expert) - 1] = share if n > 1 else 1.0
    return _add(base, torch.tensordot(weights, deltas, dims=1), scale)  # (N, *shape) -> (*shape)


def task_arithmetic(
    base: Tensor, experts: Tensor, *, scale: float | tuple[float, ...] = 1.0, generator: Rng = None
) -> Tensor:
    """``theta_base + scale * sum_i delta_i``; ignores generator (Ilharco et al. 2022, Sec. 2).

    scale: finite, or a tuple of one for each expert: ``theta_base + sum_i scale_i * delta_i``.
    """
    deltas = task_vectors(base, experts)
    if not isinstance(scale, tuple):
        return _add(base, deltas.sum(dim=0), scale)  # (N, *shape) -> (*shape)
    _check_for(len(deltas), scale=scale)
    weights = deltas.new_tensor(scale)
    return _add(base, torch.tensordot(weights, deltas, dims=1), 1.0)  # (N, *shape) -> (*shape)


def ties(
    base: Tensor,
    experts: Tensor,
    *,
    density: float = 0.3,
    scale: float = 1.0,
    merge: str = "mean",
    generator: Rng = None,
) -> Tensor:
    """TIES: trim, elect sign, disjoint merge; ignores generator (Yadav et al. 2023, Alg. 1).

    density: fraction to keep, in (0, 1]; scale: finite; merge: "mean" (the TIES paper) or "sum".
    """
    deltas = trim(task_vectors(base, experts), density)
    return _add(base, disjoint_merge(deltas, elect_sign(deltas), merge), scale)


def dare(
    base: Tensor,
    experts: Tensor,
    *,
    drop_rate: float = 0.34,
    scale: float = 1.0,
    generator: Rng = None,
) -> Tensor:
    """DARE: task arithmetic on task vectors that are randomly dropped and rescaled (Yu et al. 2024).

    drop_rate in [0, 1); scale: finite; generator: seeded, needed unless drop_rate is 0.
    """
    deltas = drop_and_rescale(task_vectors(base, experts), drop_rate, generator)
    return _add(base, deltas.sum(dim=0), scale)  # (N, *shape) -> (*shape)


def dare_ties(
    base: Tensor,
    experts: Tensor,
    *,
    drop_rate: float = 0.34,
    scale: float = 1.0,
    merge: str = "mean",
    generator: Rng = None,
) -> Tensor:
    """DARE-TIES: TIES with DARE's random drop in place of the trim (Yu et al. 2024).

    drop_rate in [0, 1); scale: finite; merge: "mean" or "sum"; generator: as for ``dare``.
    """
    deltas = drop_and_rescale(task_vectors(base, experts), drop_rate, generator)
    return _add(base, disjoint_merge(deltas, elect_sign(deltas), merge), scale)


OPERATORS: dict[str, Callable[..., Tensor]] = {
    operator.__name__: operator
    for operator in (weight_average, weighted_average, task_arithmetic, ties, dare, dare_ties)
}
RANDOM = frozenset({"dare", "dare_ties"})  # these need a seeded generator

# ---------------------------------------------------------------- operators as text


@dataclass(frozen=True)
class OperatorSpec:
    """An operator with its options; ``parse_operator(spec.name) == spec``."""

    name: str  # normalised text, such as "ties:density=0.3,scale=1"
    function: str  # key of OPERATORS
    options: tuple[tuple[str, Option], ...] = ()  # sorted by key

    @classmethod
    def of(cls, function: str, options: Mapping[str, Option], n: int | None = None) -> OperatorSpec:
        """The spec of a function with options, checked for n experts, or for any number of them."""
        _check_for(n, **options)
        ordered = tuple(sorted(options.items()))
        text = ",".join(f"{key}={_text(value)}" for key, value in ordered)
        return cls(f"{function}:{text}" if text else function, function, ordered)

    def __call__(self, base: Tensor, experts: Tensor, generator: Rng = None) -> Tensor:
        """Apply it to base: (*shape) and experts: (N, *shape); returns (*shape)."""
        return OPERATORS[self.function](base, experts, generator=generator, **dict(self.options))


def parse_operator(text: str, n: int | None = None) -> OperatorSpec:
    """Read text such as "ties", "ties:density=0.3,scale=1" or "task_arithmetic:scale=0.3/0.6".

    The last has a scale for each expert. Options not given keep their defaults. n: experts they must fit.
    """
    function, colon, rest = (part.strip() for part in text.partition(":"))
    if function not in OPERATORS:
        raise InputError(f"operator {text!r}: expected one of {', '.join(OPERATORS)}; correct it")
    known = [key for key in inspect.signature(OPERATORS[function]).parameters if key in _OPTIONS]
    options: dict[str, Option] = {}
    for item in rest.split(",") if colon else []:
        key, _, value = (part.strip() for part in item.partition("="))
        if key not in known or key in options:
            allowed = f"key=value once each, out of {', '.join(known)}" if known else "no option"
            found = f"{key!r} twice" if key in options else repr(key)
            raise InputError(f"operator {text!r}: expected {allowed}, found {found}; correct it")
        each = (function, key) == ("task_arithmetic", "scale") and "/" in value
        try:
            options[key] = tuple(map(float, value.split("/"))) if each else float(value)
        except ValueError:
            options[key] = value  # right for merge; OperatorSpec.of refuses it for a number
    return OperatorSpec.of(function, options, n)


def expand_operators(specs: Sequence[str], n: int) -> list[str]:
    """Specifications as ``parse_operator`` names them, for n experts.

    A ``weighted_average`` that names no expert stands for n operators, each with another one in the lead.
    """
    names = []
    for spec in map(parse_operator, specs):
        options = dict(spec.options)
        leads = spec.function == "weighted_average" and "expert" not in options
        each = [options | {"expert": float(i + 1)} for i in range(n)] if leads else [options]
        names += [OperatorSpec.of(spec.function, one, n).name for one in each]
    return names


def _text(value: Option) -> str:
    """%g, with more digits only where %g would name another number; several with / between them."""
    if isinstance(value, str):
        return value
    if isinstance(value, tuple):
        return "/".join(map(_text, value))
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


# ---------------------------------------------------------------- checks and dtypes

_OPTIONS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "density": ("a number in (0, 1]", lambda value: 0 < value <= 1),
    "drop_rate": ("a number in [0, 1)", lambda value: 0 <= value < 1),
    "scale": ("a finite number", math.isfinite),
    "expert": ("a whole number from 1", lambda value: value >= 1 and float(value).is_integer()),
    "share": ("a number in [0, 1]", lambda value: 0 <= value <= 1),
    "merge": ("'mean' or 'sum'", lambda value: value in ("mean", "sum")),
}


def _check_options(**options: Option) -> None:
    for key, value in options.items():
        expected, is_valid = _OPTIONS[key]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if (key != "merge" and not is_number) or not is_valid(value):  # type: ignore[arg-type]
            raise InputError(f"option {key}: expected {expected}, found {value!r}; correct it")


def _check_for(n: int | None, **options: Option) -> None:
    """InputError unless the options are valid and fit n experts; None: any number of them."""
    for key, value in options.items():
        each = value if isinstance(value, tuple) else (value,)
        for one in each:
            _check_options(**{key: one})
        if n is not None and key == "expert" and float(each[0]) > n:
            raise InputError(f"option expert: expected 1 to {n}, found {each[0]:g}; correct it")
        if n is not None and each is value and len(each) != n:
            raise InputError(f"scales: expected one for each of {n} experts, found {len(each)}")


def _check_stack(name: str, stack: Tensor, shape: torch.Size | None = None) -> None:
    fits = stack.dim() > 0 and stack.numel() > 0 and shape in (None, stack.shape[1:])
    if not (fits and stack.is_floating_point()):
        one = "any shape" if shape is None else f"shape {tuple(shape)}"
        raise InputError(
            f"{name}: expected N >= 1 floating tensors of {one} stacked on axis 0, found shape "
            f"{tuple(stack.shape)} and {stack.dtype}; use torch.stack([expert_1, ...]).float()"
        )


def _checked(base: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    """Both inputs in the dtype to compute in: float32, or float64 if one of them is."""
    if not base.is_floating_point():
        raise InputError(f"base: expected a floating tensor, found {base.dtype}; use base.float()")
    _check_stack("experts", experts, base.shape)
    dtype = torch.promote_types(torch.promote_types(base.dtype, experts.dtype), torch.float32)
    return base.to(dtype), experts.to(dtype)


def _add(base: Tensor, merged: Tensor, scale: float) -> Tensor:
    """``base + scale * merged``, both (*shape), in the dtype of base: every paper's last step."""
    _check_options(scale=scale)
    return (scale * merged).add_(base.to(merged.dtype)).to(base.dtype)


# ---------------------------------------------------------------- speed


def _largest(delta: Tensor, density: float) -> Tensor:
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
