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
and options raise InputError. Operators of later papers are in ``formulas``, steps that all share in
``formulas.steps``; those refuse NaN, and some see whole matrices or tensors (``SCOPE``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rmm_lab.errors import InputError
from rmm_lab.formulas.averages import (
    karcher,
    lines,
    metrics_weighted_average,
    model_stock,
    slerp,
    weighted_average,
    widen,
)
from rmm_lab.formulas.checks import (
    OPTIONS,
    Option,
    Rng,
    add,
    check_for,
    checked,
    option_text,
    weighed,
)
from rmm_lab.formulas.factored import do_merging, knots_factored
from rmm_lab.formulas.sparse import breadcrumbs, consensus, dare_ties, della, emr, magmax, pcb, sce
from rmm_lab.formulas.spectral import doge, iso_c, iso_cts, knots, star, tsv, wudi
from rmm_lab.formulas.steps import disjoint_merge, drop_and_rescale, elect_sign, task_vectors, trim

# ---------------------------------------------------------------- the paper's operators


def weight_average(base: Tensor, experts: Tensor, *, generator: Rng = None) -> Tensor:
    """Mean of the experts, the uniform soup; ignores base and generator (Wortsman et al. 2022)."""
    average = checked(base, experts)[1].mean(dim=0)  # (N, *shape) -> (*shape)
    return average.to(base.dtype)


def task_arithmetic(
    base: Tensor, experts: Tensor, *, scale: float | tuple[float, ...] = 1.0, generator: Rng = None
) -> Tensor:
    """``theta_base + scale * sum_i delta_i``; ignores generator (Ilharco et al. 2022, Sec. 2).

    scale: finite, or a tuple of one for each expert: ``theta_base + sum_i scale_i * delta_i``.
    """
    deltas = task_vectors(base, experts)
    if not isinstance(scale, tuple):
        return add(base, deltas.sum(dim=0), scale)  # (N, *shape) -> (*shape)
    check_for(len(deltas), scale=scale)
    weights = deltas.new_tensor(scale)
    return add(base, torch.tensordot(weights, deltas, dims=1), 1.0)  # (N, *shape) -> (*shape)


def ties(
    base: Tensor,
    experts: Tensor,
    *,
    density: float | tuple[float, ...] = 0.3,
    scale: float | tuple[float, ...] = 1.0,
    merge: str = "mean",
    generator: Rng = None,
) -> Tensor:
    """TIES: trim, elect sign, disjoint merge; ignores generator (Yadav et al. 2023, Alg. 1).

    density: fraction to keep, in (0, 1]; scale: finite; merge: "mean" (the TIES paper) or "sum". Density
    and scale may be tuples of one for each expert; such scales weigh what is trimmed, before a sign is
    elected (Akiba et al. 2024).
    """
    deltas, scale = weighed(trim(task_vectors(base, experts), density), scale)
    return add(base, disjoint_merge(deltas, elect_sign(deltas), merge), scale)


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
    return add(base, deltas.sum(dim=0), scale)  # (N, *shape) -> (*shape)


_Functions = tuple[Callable[..., Tensor], ...]
_POOL: _Functions = (
    *(weight_average, weighted_average, task_arithmetic, ties, dare, dare_ties),
    *(pcb, breadcrumbs, consensus, emr, magmax, metrics_weighted_average),
)
_MATRIX: _Functions = (tsv, iso_c, iso_cts, wudi, knots, star, widen, doge)
_TENSOR: _Functions = (della, sce, model_stock, slerp, karcher, lines)
OPERATORS: dict[str, Callable[..., Tensor]] = {
    operator.__name__: operator for operator in (*_POOL, *_MATRIX, *_TENSOR)
}
RANDOM = frozenset({"dare", "dare_ties", "della"})  # these need a seeded generator
DEPTH = frozenset({"lines"})  # these need the layer's depth in [0, 1]
# These match activations: a pool with calibration inputs computes them. Their options and defaults.
MATCHED_OPTIONS: dict[str, dict[str, Option]] = {
    "regmean": {"alpha": 0.9},
    "least_squares": {
        **{"ridge": "auto", "weights": (), "lean": 1.0, "anchor": "average"},
        **{"readout": 0.5, "residual": 1.0, "fit": "path"},
    },
}
MATCHED = frozenset(MATCHED_OPTIONS)
# These take LoRA adapters of peft's, kept factored.
FACTORED: dict[str, Callable[..., Tensor]] = {f.__name__: f for f in (knots_factored, do_merging)}
# What an operator sees at once: what the pool's scope says; each matrix, other tensors averaged, or its
# factors; each tensor.
SCOPE: dict[str, str] = {
    **{operator.__name__: "pool" for operator in _POOL},
    **{operator.__name__: "matrix" for operator in _MATRIX},
    **{operator.__name__: "tensor" for operator in _TENSOR},
    **dict.fromkeys(FACTORED, "factors"),
    **dict.fromkeys(MATCHED, "pool"),
}
# Options with a value for each expert, or that may have one, as in "task_arithmetic:scale=0.3/0.6".
_EACH = {("metrics_weighted_average", "metrics"), ("least_squares", "weights")}
_MAY = {(f, "scale") for f in ("task_arithmetic", "ties", "dare_ties")} | {("ties", "density")}

# ---------------------------------------------------------------- operators as text


@dataclass(frozen=True)
class OperatorSpec:
    """An operator with its options; ``parse_operator(spec.name) == spec``."""

    name: str  # normalised text, such as "ties:density=0.3,scale=1"
    function: str  # key of OPERATORS or FACTORED, or one of MATCHED
    options: tuple[tuple[str, Option], ...] = ()  # sorted by key

    @classmethod
    def of(cls, function: str, options: Mapping[str, Option], n: int | None = None) -> OperatorSpec:
        """The spec of a function with options, checked for n experts, or for any number of them."""
        check_for(n, **options)
        if function == "slerp" and n not in (None, 2):
            raise InputError(f"operator slerp: expected 2 experts, found {n}; use karcher")
        ordered = tuple(sorted(options.items()))
        text = ",".join(f"{key}={option_text(value)}" for key, value in ordered)
        return cls(f"{function}:{text}" if text else function, function, ordered)

    def __call__(
        self, base: Tensor, experts: Any, generator: Rng = None, depth: float | None = None
    ) -> Tensor:
        """Apply it to base: (*shape) and experts: (N, *shape), or ``Factored``; returns (*shape).

        depth: of the layer, in [0, 1], for the operators of ``DEPTH``. InputError for those of ``MATCHED``.
        """
        if self.function in MATCHED:
            raise InputError(
                f"operator {self.name!r}: expected calibration inputs, found weights alone; use a pool "
                "with calibration inputs"
            )
        more: dict[str, Any] = dict(self.options)
        if self.function in DEPTH:
            more["depth"] = depth
        return (OPERATORS | FACTORED)[self.function](base, experts, generator=generator, **more)


def parse_operator(text: str, n: int | None = None) -> OperatorSpec:
    """Read text such as "ties", "ties:density=0.3,scale=1" or "task_arithmetic:scale=0.3/0.6".

    The last has a scale for each expert. Options not given keep their defaults. n: experts they must fit.
    """
    function, colon, rest = (part.strip() for part in text.partition(":"))
    if function not in SCOPE:
        raise InputError(f"operator {text!r}: expected one of {', '.join(SCOPE)}; correct it")
    known = list(MATCHED_OPTIONS.get(function, ()))
    if called := (OPERATORS | FACTORED).get(function):
        known = [key for key in inspect.signature(called).parameters if key in OPTIONS]
    options: dict[str, Option] = {}
    for item in rest.split(",") if colon else []:
        key, _, value = (part.strip() for part in item.partition("="))
        if key not in known or key in options:
            allowed = f"key=value once each, out of {', '.join(known)}" if known else "no option"
            found = f"{key!r} twice" if key in options else repr(key)
            raise InputError(f"operator {text!r}: expected {allowed}, found {found}; correct it")
        each = (function, key) in _EACH or ((function, key) in _MAY and "/" in value)
        try:
            options[key] = tuple(map(float, value.split("/"))) if each else float(value)
        except ValueError:
            options[key] = value  # right for a word; OperatorSpec.of refuses it for a number
    try:
        return OperatorSpec.of(function, options, n)
    except InputError as error:
        raise InputError(f"operator {text!r}: {error}") from error


def expand_operators(specs: Sequence[str], n: int) -> list[str]:
    """Specifications as ``parse_operator`` names them, for n experts.

    A ``weighted_average`` that names no expert stands for n operators, each with another one in the lead;
    so does ``least_squares`` with ``lean``, the weight of that one beside 1 of the others.
    """
    names = []
    for spec in map(parse_operator, specs):
        options = dict(spec.options)
        lean: Any = options.pop("lean", None)
        leads: list[dict[str, Option]] = [{}]
        if spec.function == "weighted_average" and "expert" not in options:
            leads = [{"expert": float(i + 1)} for i in range(n)]
        elif lean is not None:
            leads = [
                {"weights": tuple(lean if j == i else 1.0 for j in range(n))} for i in range(n)
            ]
        each = [options | lead for lead in leads]
        names += [OperatorSpec.of(spec.function, one, n).name for one in each]
    return names
