"""What an operator accepts: options by name, tensors by shape and dtype. All raise InputError."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rmm_lab.errors import InputError, Range

Option = float | str | tuple[float, ...]
Rng = torch.Generator | None

# ---------------------------------------------------------------- options


def _number(expected: str, is_valid: Callable[[float], bool]) -> Range:
    def is_one(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and is_valid(value)

    return expected, is_one


def _one_of(*texts: str) -> Range:
    return " or ".join(map(repr, texts)), lambda value: value in texts


def _or(text: Range, number: Range) -> Range:
    return f"{text[0]} or {number[0]}", lambda value: text[1](value) or number[1](value)


MOST = 1e6  # of a coefficient: beyond, products of float32 soon overflow
_ABOVE_0 = _number("a number in (0, 1]", lambda value: 0 < value <= 1)
_BELOW_1 = _number("a number in [0, 1)", lambda value: 0 <= value < 1)
_UNIT = _number("a number in [0, 1]", lambda value: 0 <= value <= 1)
_FINITE = _number("a finite number from -1e6 to 1e6", lambda value: abs(value) <= MOST)
_FROM_0 = _number("a finite number from 0 to 1e6", lambda value: 0 <= value <= MOST)
_POSITIVE = _number("a finite number above 0, to 1e6", lambda value: 0 < value <= MOST)
_WHOLE = _number("a whole number from 1", lambda value: value >= 1 and float(value).is_integer())
_COUNT = _number("a whole number from 0", lambda value: value >= 0 and float(value).is_integer())

OPTIONS: dict[str, Range] = {
    "density": _ABOVE_0,
    "drop_rate": _BELOW_1,
    "scale": _FINITE,
    "expert": _WHOLE,
    "share": _UNIT,
    "merge": _one_of("mean", "sum"),
    "common": _UNIT,
    "energy": _ABOVE_0,
    "outliers": _BELOW_1,
    "epsilon": _BELOW_1,
    "threshold": _FROM_0,
    "agree": _WHOLE,
    "factor": _FROM_0,
    "calibration": _FINITE,
    "t": _UNIT,
    "of": _one_of("weights", "deltas"),
    "first": _FINITE,
    "last": _FINITE,
    "metrics": _POSITIVE,
    "power": _FINITE,
    "steps": _COUNT,
    "damping": _FROM_0,
    "gamma": _FROM_0,
    "alpha": _UNIT,
    "ridge": _or(_one_of("auto"), _FROM_0),
    "weights": _POSITIVE,
    "readout": _BELOW_1,
    "residual": _UNIT,
    "fit": _one_of("path", "whole"),
    "lean": _POSITIVE,
    "anchor": _or(_one_of("average", "regmean"), _FINITE),
}


def check_options(**options: Option) -> None:
    """Raise InputError for the first option that is not what ``OPTIONS`` says."""
    for key, value in options.items():
        expected, is_valid = OPTIONS[key]
        if not is_valid(value):
            raise InputError(f"option {key}: expected {expected}, found {value!r}; correct it")


def option_text(value: Option) -> str:
    """%g, with more digits only where %g would name another number; several with / between them."""
    if isinstance(value, str):
        return value
    if isinstance(value, tuple):
        return "/".join(map(option_text, value))
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


def check_for(n: int | None, **options: Option) -> None:
    """InputError unless the options are valid and fit n experts; None: any number of them."""
    for key, value in options.items():
        each = value if isinstance(value, tuple) else (value,)
        for one in each:
            check_options(**{key: one})
        if n is not None and key == "expert" and float(each[0]) > n:
            raise InputError(f"option expert: expected 1 to {n}, found {each[0]:g}; correct it")
        if n is not None and each is value and len(each) != n:
            what = key if key.endswith("s") else f"{key}s".replace("ys", "ies")
            raise InputError(f"{what}: expected one for each of {n} experts, found {len(each)}")


# ---------------------------------------------------------------- tensors


def check_stack(name: str, stack: Tensor, shape: torch.Size | None = None) -> None:
    """InputError unless ``stack`` is N >= 1 floating tensors, of ``shape`` if one is given."""
    fits = stack.dim() > 0 and stack.numel() > 0 and shape in (None, stack.shape[1:])
    if not (fits and stack.is_floating_point()):
        one = "any shape" if shape is None else f"shape {tuple(shape)}"
        raise InputError(
            f"{name}: expected N >= 1 floating tensors of {one} stacked on axis 0, found shape "
            f"{tuple(stack.shape)} and {stack.dtype}; use torch.stack([expert_1, ...]).float()"
        )


def checked(base: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    """Both inputs in the dtype to compute in: float32, or float64 if one of them is."""
    if not base.is_floating_point():
        raise InputError(f"base: expected a floating tensor, found {base.dtype}; use base.float()")
    check_stack("experts", experts, base.shape)
    dtype = torch.promote_types(torch.promote_types(base.dtype, experts.dtype), torch.float32)
    return base.to(dtype), experts.to(dtype)


def finite(base: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    """``checked``, and InputError that names the model with a NaN or an infinity, if one has.

    For operators that rank or decompose, where one such entry would be lost or spoil all others.
    """
    base, experts = checked(base, experts)
    for name, tensor in [("base", base), *((f"expert {i + 1}", e) for i, e in enumerate(experts))]:
        if not tensor.isfinite().all():
            raise InputError(
                f"{name}: expected finite weights, found NaN or infinity; fine-tune it again with a "
                "lower learning rate"
            )
    return base, experts


def matrices(name: str, base: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    """``finite``, for an operator of this name on whole matrices: base (out, in), experts (N, out, in)."""
    base, experts = finite(base, experts)
    if base.dim() != 2:
        raise InputError(
            f"{name}: expected a matrix (out, in), found shape {tuple(base.shape)}; merge other tensors "
            "by weight_average, as LayerPool does"
        )
    return base, experts


def add(base: Tensor, merged: Tensor, scale: float) -> Tensor:
    """``base + scale * merged``, both (*shape), in the dtype of base: every paper's last step."""
    check_options(scale=scale)
    return (scale * merged).add_(base.to(merged.dtype)).to(base.dtype)


def weighed(deltas: Tensor, scale: float | tuple[float, ...]) -> tuple[Tensor, float]:
    """Task vectors (N, *shape) times a scale of their own, and the scale that is left for their merge.

    scale: finite; a tuple of N weighs each, which leaves 1.
    """
    check_stack("deltas", deltas)
    if not isinstance(scale, tuple):
        return deltas, scale
    check_for(len(deltas), scale=scale)
    weights = deltas.new_tensor(scale).reshape(-1, *[1] * (deltas.dim() - 1))
    return deltas * weights, 1.0  # (N, *shape) * (N, 1, ...) -> (N, *shape)
