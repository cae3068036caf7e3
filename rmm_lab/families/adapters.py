"""LoRA adapters of peft's, applied to their base when they are read: W + scale * B A.

An adapter is a folder with ``adapter_config.json`` and ``adapter_model.safetensors``; it becomes a whole
model, as peft's ``merge_and_unload`` makes it. Sources: Hu et al. 2022, Sec. 4.1; Kalajdzievski 2023
(rank-stabilised).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from rmm_lab.errors import InputError
from rmm_lab.families.parts import Factors, Weights, outside_head
from rmm_lab.families.protocol import Model
from rmm_lab.families.reading import ADAPTER, read_config

_PREFIX = "base_model.model."
_WHOLE = "merge it with peft first: model.merge_and_unload().save_pretrained(FOLDER)"
# The parts of a LoRA by what their names end with; peft may leave the adapter's name, "default", in between.
_PART = re.compile(
    r"(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B)(?:\.default)?(?P<kind>\.weight|\.bias|)"
)
# Options that change what an adapter computes, and must be off.
_OFF = (
    *("use_dora", "use_qalora", "use_bdlora", "layer_replication", "target_parameters"),
    *("alora_invocation_tokens", "trainable_token_indices", "megatron_config", "arrow_config"),
)
# These initialisations subtract something from the base's weights, which then are no longer the base's.
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda")


def read_adapter_config(source: str, folder: Path) -> dict[str, Any]:
    """adapter_config.json; InputError for anything but a plain LoRA."""
    config = read_config(source, folder / ADAPTER, "with a 'peft_type'")
    if config.get("peft_type") != "LORA":
        found = f"peft_type {config.get('peft_type')!r}"
    elif odd := next((name for name in _OFF if config.get(name)), None):
        found = f"{odd} = {config[odd]!r}"
    elif str(config.get("init_lora_weights")).lower().startswith(_CHANGES_BASE):
        found = (
            f"init_lora_weights = {config['init_lora_weights']!r}, which changes the base's weights"
        )
    else:
        return config
    raise InputError(
        f"model {source!r}: expected a plain LoRA adapter in {folder / ADAPTER}, found {found}; {_WHOLE}"
    )


def base_of_adapter(source: str, config: Mapping[str, Any]) -> str:
    """The source of the model that an adapter names as its base; InputError if it names none."""
    name = config.get("base_model_name_or_path")
    if isinstance(name, str) and Path(name).expanduser().is_dir():
        return name
    if isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return f"hf-hub:{name}"
    raise InputError(
        f"model {source!r}: expected the folder or hub name of the adapter's base as "
        f"'base_model_name_or_path' in {ADAPTER}, found {name!r}; correct it, or {_WHOLE}"
    )


class Applied(NamedTuple):
    """The base's weights with an adapter applied, the names of the tensors that it replaces as a whole (of
    ``modules_to_save``, such as a new classifier, of trained biases and of resized embeddings), and the
    factors of what it adds to matrices, the scale in B.
    """

    weights: Weights
    replaced: set[str]
    factors: Factors


def apply_adapter(
    source: str,
    adapter: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    rename: Callable[[str], str] = str,
) -> Applied:
    """Apply an adapter to its base.

    Args:
        source: the adapter's name in messages.
        adapter: its adapter_config.json.
        tensors: its weights, as in the file: A is (r, in), B (out, r).
        base: the base's weights, in the names of its file.
        rename: a name in the adapter's model -> the name in ``base``, where they differ.

    Raises InputError where the adapter is of another model, or of a kind that is not a plain LoRA.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    whole: Weights = {}
    for name, tensor in tensors.items():
        bare = name.removeprefix(_PREFIX)
        if match := _PART.fullmatch(bare):
            key = match["part"] + match["kind"].removesuffix(".weight")
            pairs.setdefault(match["module"], {})[key] = tensor
        elif "lora_" in bare or "trainable_tokens" in bare:
            kind = "DoRA" if "magnitude" in bare else "unknown"
            raise InputError(
                f"model {source!r}: expected the matrices lora_A and lora_B in the adapter, found {name!r} "
                f"({kind}); {_WHOLE}"
            )
        elif ".original_module." not in bare:
            bare = re.sub(r"\.(modules_to_save(\.default)?|base_layer)\.", ".", bare)
            whole[rename(bare)] = tensor
    out, factors = dict(base) | whole, Factors()
    for module, parts in pairs.items():
        target = rename(f"{module}.weight")
        left, right = _factors(source, adapter, module, parts, out.get(target))
        out[target] = out[target] + (left @ right).reshape(out[target].shape)
        if out[target].dim() == 2:
            factors[target] = left, right
        if (bias := parts.get("B.bias")) is not None:
            there = rename(f"{module}.bias")
            rank = len(parts["A"])
            out[there] = out[there] + bias * _scale(adapter, module, rank)
    return Applied(out, set(whole), factors)


def _factors(
    source: str,
    adapter: Mapping[str, Any],
    module: str,
    parts: Mapping[str, Tensor],
    weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The factors (out, r) and (r, in) of what a module's LoRA adds; InputError unless they fit."""
    first, second = parts.get("A"), parts.get("B")
    embedding = "embedding_A" in parts
    if embedding:
        first, second = parts["embedding_A"], parts.get("embedding_B")
    if first is None or second is None:
        raise InputError(
            f"model {source!r}: expected lora_A and lora_B of {module!r} in the adapter, found only "
            f"{', '.join('lora_' + name for name in parts)}; save it again with peft's save_pretrained, or "
            f"{_WHOLE}"
        )
    rank = len(first)
    left, right = second.flatten(1), first.flatten(1)  # (out, r), (r, in); kernels are flat
    fits = left.shape[1] == rank
    if embedding or adapter.get("fan_in_fan_out"):
        left, right = right.T, left.T
    shape = len(left), right.shape[1]
    if weight is None or not fits or weight.flatten(1).shape != shape:
        found = "none" if weight is None else str(tuple(weight.shape))
        raise InputError(
            f"model {source!r}: expected {module + '.weight'!r} in the adapter's base to fit a change of "
            f"shape {shape}, found {found}; name the base that the adapter was trained on"
        )
    return _scale(adapter, module, rank) * left, right


def factors_of(operator: str, experts: Sequence[Model]) -> list[dict[str, Any]]:
    """Each expert's factors, for an operator that needs them: a tensor's name -> its pair, or None.

    InputError unless all experts are adapters.
    """
    whole = next((expert for expert in experts if expert.factors is None), None)
    if whole is not None:
        raise InputError(
            f"operator {operator!r}: expected LoRA adapters of peft's in safetensors as experts, found "
            f"{whole.source!r}, which is none; name adapters, or choose another operator, such as knots"
        )
    return [{n: (e.factors or {}).get(n) for n in outside_head(e.weights)} for e in experts]


def _scale(adapter: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) where the adapter is rank-stabilised; alpha may be the module's own."""
    alpha = adapter.get("lora_alpha", 8)  # peft's default
    for pattern, own in (adapter.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = own
            break
    return float(alpha / (rank**0.5 if adapter.get("use_rslora") else rank))


def refit(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], whole: set[str]
) -> dict[str, Any]:
    """The base's config.json for a model whose classifier or embeddings came with an adapter."""
    out = {k: v for k, v in config.items() if k != "rmm_lab"}
    for name in ("shared.weight", "model.embed_tokens.weight"):
        if name in whole and "vocab_size" in out:
            out["vocab_size"] = len(weights[name])
    if "head.weight" in whole and "architecture" in config:  # timm's
        n = out["num_classes"] = len(weights["head.weight"])
        out["model_args"] = dict(out.get("model_args") or {}) | {"num_classes": n}
        out.pop("label_names", None)  # of the base's head
    elif "head.weight" in whole:  # transformers', under timm's name
        out["id2label"] = {str(i): f"LABEL_{i}" for i in range(len(weights["head.weight"]))}
    return out
