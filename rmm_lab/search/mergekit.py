"""A layer path as a recipe for mergekit, where its methods can say it.

What can be said is a sum of models with a weight each: an expert's or the base's own layer, averages, task
arithmetic with one scale or one per expert. All of these are mergekit's method ``linear``, one slice for each
layer, with theta = (1 - sum of lambda) theta_base + sum_i lambda_i theta_i. mergekit takes what is before the
layers from the first slice and what is behind them from the last one, so the stem's weights are given there,
by name. Source: mergekit's README and guide to its configuration; nothing of its code.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from rmm_lab.errors import InputError
from rmm_lab.families import causal_lm
from rmm_lab.families.parts import begins
from rmm_lab.layers import SCALED, LayerPool
from rmm_lab.operators import OperatorSpec, parse_operator
from rmm_lab.path import LayerPath
from rmm_lab.reward import Step
from rmm_lab.search.run_folder import RunFolder

# Operators that are sums of models with a weight each.
LINEAR = (
    "weight_average",
    "weighted_average",
    "task_arithmetic",
    "metrics_weighted_average",
    "lines",
)
DIGITS = 12  # of a weight: more than float32 has


def check_family(pool: LayerPool) -> None:
    """Raise InputError unless mergekit knows models of this kind."""
    if pool.base.family is not causal_lm:
        raise InputError(
            f"--export mergekit: expected decoder-only language models, found {pool.base.family.NAME}; "
            "mergekit merges no others, so leave the option out"
        )


def recipe(path: LayerPath, pool: LayerPool) -> str:
    """The path as YAML for ``mergekit-yaml FILE FOLDER``; InputError for a step that it cannot say."""
    check_family(pool)
    blocks = _blocks(path, pool)
    if not blocks:
        raise InputError("--export mergekit: expected a path with layers, found none")
    _check_config(pool, [block[0][0] for block in blocks])
    layout, stem = pool.architecture.layout, weights_of(path.stem, pool)
    models = [_place_of(origin.source) for origin in (path.base, *path.experts)]
    lines = [
        "merge_method: linear",
        "parameters:",
        "  normalize: false",
        "dtype: float32",
        "slices:",
    ]
    for i, block in enumerate(blocks):
        rules = []  # parts of names, weights
        if i == 0:
            rules += [(f"{name}.", stem) for name in (layout.tokens, layout.positions) if name]
        if i == len(blocks) - 1:
            dot = "." if layout.norm == "norm" else ""  # else a layer's norms would be meant too
            rules += [(name, stem) for name in (f"{dot}{layout.norm}.", "lm_head.")]
        if len(block) > 1 and block[0][1] != block[1][1]:
            rules += [(f".{name}.", block[0][1]) for name in layout.sublayers[0]]
        rest, k = block[-1][1], block[0][0]
        lines.append("  - sources:")
        for m, model in enumerate(models):
            own = [(name, weights[m]) for name, weights in rules]
            if rest[m] or any(weight for _, weight in own):
                lines += [f"      - model: {model}", f"        layer_range: [{k}, {k + 1}]"]
                lines += ["        parameters:", "          weight:"]
                for name, weight in own:
                    lines.append(f'            - {{filter: "{name}", value: {weight!r}}}')
                lines.append(f"            - value: {rest[m]!r}")
    return "\n".join(lines) + "\n"


def _check_config(pool: LayerPool, numbers: Sequence[int]) -> None:
    """Raise InputError where mergekit would write a model whose config.json does not fit its weights."""
    config, kinds = pool.base.config, pool.architecture.kinds
    biased = config.get("attention_bias") or config.get("mlp_bias")
    if config["model_type"] == "gpt_neox":
        found = "a GPT-NeoX, of which mergekit wants tensors that transformers has stopped to write"
    elif biased and config["model_type"] == "llama":
        found = (
            "biases in a Llama's linear maps (attention_bias, mlp_bias), which mergekit leaves out"
        )
    elif "layer_types" in config and [kinds[k] for k in numbers] != kinds:
        found = "another depth or order than the base's list of kinds of attention (layer_types)"
    else:
        return
    raise InputError(
        f"--export mergekit: expected a model that mergekit writes whole, found {found}; load merged/ "
        "in place of the recipe"
    )


def write(path: LayerPath, pool: LayerPool, folder: RunFolder) -> str:
    """Write mergekit.yaml into a run folder; returns what to do with it, or why it cannot be written."""
    try:
        folder.write("mergekit.yaml", recipe(path, pool))
    except InputError as error:
        return f"note: {error}"
    return f"mergekit's recipe: mergekit-yaml {folder.path}/mergekit.yaml FOLDER"


def weights_of(step: Step, pool: LayerPool) -> list[float]:
    """How much of the base and of each expert is in a step, N + 1 numbers with sum 1.

    InputError where a step is no such sum.
    """
    source, k, scales = step
    models = ("base", *pool.names)
    if source in models:
        return [float(name == source) for name in models]
    if scales:
        if any(scales[pool.n_models :]):
            more = ", ".join(pool.members[pool.n_models :])
            raise _unsaid(step, f"a merge that looks at inputs ({more}) in the sum")
        spec = OperatorSpec(source, SCALED, (("scale", scales[: pool.n_models]),))
    else:
        spec = pool.operators.get(source) or parse_operator(source, pool.n_models)
    if spec.function not in LINEAR:
        raise _unsaid(
            step, f"{spec.function}, which is no weighted sum of models as this kit computes it"
        )
    one = torch.eye(len(models), dtype=torch.float64)  # an operator of these says its weights
    found = spec(one[0], one[1:], None, (k + 1) / pool.n_layers)
    return [round(weight, DIGITS) + 0.0 for weight in found.tolist()]


def _unsaid(step: Step, found: str) -> InputError:
    where = "the stem" if step.layer < 0 else f"layer {step.layer}"
    return InputError(
        f"--export mergekit: expected steps that mergekit can say (a model's own layer, averages, task "
        f"arithmetic), found {found} at {where} ({step}); load merged/ in place of the recipe"
    )


def _blocks(path: LayerPath, pool: LayerPool) -> list[list[tuple[int, list[float]]]]:
    """The path's blocks in running order: the number in the base and the weights of each one's parts."""
    steps: Sequence[Step] = path.steps
    if path.unit == "block":
        return [[(step.layer, weights_of(step, pool))] for step in steps]
    of = {j: k for k, block in enumerate(pool.blocks) for j in block}
    places: Any = [(block.index(j), None) for block in pool.blocks for j in block]
    out: list[list[tuple[int, list[float]]]] = []
    for step, new in zip(steps, begins([s.layer for s in steps], places), strict=True):
        if new:
            out.append([])
        out[-1].append((of[step.layer], weights_of(step, pool)))
    for block in out:
        if len(block) < 2 or block[0][0] != block[1][0]:
            raise InputError(
                "--export mergekit: expected whole blocks, attention and then MLP of one layer, found a part "
                f"of layer {block[0][0]} without the other; load merged/ in place of the recipe"
            )
    return out


def _place_of(source: str) -> str:
    """A model as mergekit names it: a folder, or OWNER/NAME@REVISION of the hub."""
    return json.dumps(source.removeprefix("hf-hub:"), ensure_ascii=False)
