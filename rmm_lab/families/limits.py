"""What a model's config.json may say: names that are known, and numbers from which a model can be built.

A config.json is data. No key of it names a file, a device, a class or code, and no size is believed before
the weights agree.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rmm_lab.errors import InputError, Range

DEEPEST = 512  # layers
_MOST_PATCHES = 2**16


def _whole(low: int, high: int) -> Range:
    return f"a whole number from {low} to {high}", lambda v: type(v) is int and low <= v <= high


def _number(what: str, test: Callable[[float], bool]) -> Range:
    def fits(v: Any) -> bool:
        return type(v) in (int, float) and abs(v) < 2**63 and test(v)  # of NaN nothing is true

    return what, fits


def _or_none(one: Range) -> Range:
    return f"{one[0]} or null", lambda v: v is None or one[1](v)


def _list_of(one: Range, lengths: Sequence[int]) -> Range:
    def fits(v: Any) -> bool:
        return isinstance(v, (list, tuple)) and len(v) in lengths and all(map(one[1], v))

    return f"{' or '.join(map(str, lengths))} numbers, each {one[0]}", fits


def _one_or_pair(one: Range) -> Range:
    pair = _list_of(one, (2,))
    return f"{one[0]}, or two", lambda v: one[1](v) or pair[1](v)


def _text(*known: str) -> Range:
    return f"one of {', '.join(known)}", lambda v: isinstance(v, str) and v in known


# A path may have no layer.
_LAYERS, _HEADS, _WIDTH = _whole(0, DEEPEST), _whole(1, 1024), _whole(1, 2**17)
_ROWS = _whole(1, 2**24)  # of an embedding
_YES_NO: Range = ("true or false", lambda v: isinstance(v, bool))
_SHARE = _number("a number from 0 to 1", lambda v: 0 <= v <= 1)
_POSITIVE = _number("a finite number above 0", lambda v: 0 < v <= 1e9)
_ANY = _number("a finite number of at most a million", lambda v: abs(v) <= 1e6)
_EPS = _number("a number from 0 to 1", lambda v: 0 <= v <= 1)
_PIXELS, _CHANNELS = _whole(1, 4096), _whole(1, 16)
_LAYER_NAME: Range = (
    "the name of a layer of timm's",
    lambda v: isinstance(v, str) and re.fullmatch(r"[a-z0-9_]{0,40}", v) is not None,
)
_NAME: Range = (
    "a name of timm's, without a source or a path",
    lambda v: isinstance(v, str) and re.fullmatch(r"\w+(\.\w+)?", v, re.ASCII) is not None,
)
_LABELS: Range = (
    "a list of names",
    lambda v: isinstance(v, (list, tuple)) and all(isinstance(x, (str, int)) for x in v),
)
_OBJECT: Range = ("an object", lambda v: isinstance(v, dict))

# timm's VisionTransformer: arguments that are plain data.
MODEL_ARGS: dict[str, Range] = {
    "img_size": _one_or_pair(_PIXELS),
    "patch_size": _one_or_pair(_whole(1, 1024)),
    "in_chans": _CHANNELS,
    "num_classes": _whole(0, 2**20),
    "global_pool": _text("", "avg", "avgmax", "max", "token", "map", "prr"),
    "embed_dim": _WIDTH,
    "depth": _LAYERS,
    "num_heads": _HEADS,
    "mlp_ratio": _number("a number above 0 and up to 64", lambda v: 0 < v <= 64),
    "init_values": _ANY,
    "pos_embed": _text("", "none", "learn"),
    "reg_tokens": _whole(0, 1024),
    "weight_init": _text("", "skip", "reset", "jax", "jax_nlhb", "moco"),
    **dict.fromkeys(
        (
            *("qkv_bias", "qk_norm", "scale_attn_norm", "scale_mlp_norm", "proj_bias"),
            *("class_token", "no_embed_class", "pre_norm", "final_norm", "fc_norm"),
            *("pool_include_prefix", "dynamic_img_size", "dynamic_img_pad", "fix_init"),
            *("strict_img_size", "distilled"),
        ),
        _YES_NO,
    ),
    **dict.fromkeys(
        (
            *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate"),
            *("attn_drop_rate", "drop_path_rate"),
        ),
        _SHARE,
    ),
    **dict.fromkeys(("norm_layer", "act_layer", "embed_norm_layer"), _LAYER_NAME),
}
# How pictures are prepared, in ``pretrained_cfg`` or, in old files, at the top.
_PREPARED: dict[str, Range] = {
    "input_size": _list_of(_PIXELS, (3,)),
    "mean": _list_of(_ANY, (1, 3, 4)),
    "std": _list_of(_POSITIVE, (1, 3, 4)),
    "crop_pct": _number("a number above 0 and up to 1", lambda v: 0 < v <= 1),
    "interpolation": _text(
        *("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random")
    ),
    "crop_mode": _text("center", "squash", "border"),
    "fixed_input_size": _YES_NO,
}
_TOP: dict[str, Range] = {
    "architecture": _NAME,
    "model_args": _OBJECT,
    "pretrained_cfg": _OBJECT,
    "num_classes": MODEL_ARGS["num_classes"],
    "label_names": _LABELS,
    "rmm_lab": _OBJECT,
}


def _sides(*names: tuple[str, ...]) -> Range:
    """Of a processor of transformers: one number, or those of one of the groups of names, and no others."""

    def fits(v: Any) -> bool:
        if not isinstance(v, dict):
            return _PIXELS[1](v)
        return tuple(sorted(v)) in names and all(map(_PIXELS[1], v.values()))

    return f"pixels, or {' or '.join(map(', '.join, names))} in pixels", fits


_PROCESSOR: dict[str, Range] = {
    "image_mean": _PREPARED["mean"],
    "image_std": _PREPARED["std"],
    "resample": _whole(0, 5),
    "size": _sides(("height", "width"), ("shortest_edge",), ("longest_edge", "shortest_edge")),
    "crop_size": _sides(("height", "width")),
    **dict.fromkeys(("do_normalize", "do_center_crop"), _YES_NO),
}
_NOT_NULL = ("architecture", "num_classes")

_DROPOUTS = (
    *("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
    *("dropout_rate", "drop_path_rate"),
)
# transformers: attributes of configs. ``hidden_size`` and its like stand for what other models call them.
_SIZES: dict[str, Range] = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "num_decoder_layers"), _LAYERS),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "num_key_value_heads"), _HEADS),
    **dict.fromkeys(
        (
            *("hidden_size", "d_model", "n_embd", "d_kv", "head_dim"),
            *("intermediate_size", "d_ff", "n_inner", "projection_dim"),
        ),
        _WIDTH,
    ),
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "n_positions"), _ROWS),
    "sliding_window": _ROWS,
    **dict.fromkeys(("layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps"), _EPS),
    **dict.fromkeys(
        ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"), _POSITIVE
    ),
    "relative_attention_num_buckets": _whole(4, 4096),
    "relative_attention_max_distance": _ROWS,
    **dict.fromkeys(("image_size", "patch_size"), _one_or_pair(_PIXELS)),
    "num_channels": _CHANNELS,
    **dict.fromkeys(_DROPOUTS, _SHARE),
    "mlp_ratio": MODEL_ARGS["mlp_ratio"],
    "num_register_tokens": MODEL_ARGS["reg_tokens"],
}
# What config.json says beside the arguments of its class and changes what a model computes.
_MORE = {
    *("rope_theta", "rope_scaling", "rotary_pct", "rotary_emb_base", "partial_rotary_factor"),
    *("rope_local_base_freq", "sliding_window_pattern", "tie_word_embeddings", "layer_types"),
    *("dense_act_fn", "is_gated_act", "scale_decoder_outputs", "decoder_start_token_id"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "hidden_act", "hidden_activation"),
}
# What asks for code, or for how transformers is to run.
_CODE = ("auto_map", "trust_remote_code")
_RUNS = {"output_hidden_states", "return_dict", "dtype", "torch_dtype", "id2label", "label2id"}


def check_timm(source: str, config: Mapping[str, Any]) -> None:
    """Raise InputError unless a timm config.json holds known names and numbers in their range."""
    _check(f"model {source!r}", "", config, {**_TOP, **_PREPARED})
    args, cfg = config.get("model_args") or {}, config.get("pretrained_cfg") or {}
    if unknown := sorted(set(args) - set(MODEL_ARGS)):
        raise InputError(
            f"model {source!r}: expected 'model_args' in its config.json to hold plain arguments of timm's "
            f"VisionTransformer ({', '.join(MODEL_ARGS)}), found {unknown[0]!r}; remove it, or save the "
            "model with timm again"
        )
    _check(f"model {source!r}", "model_args.", args, MODEL_ARGS)
    _check(f"model {source!r}", "pretrained_cfg.", cfg, _PREPARED)
    size, patch = (
        (v, v) if isinstance(v := args.get(key) or default, int) else v
        for key, default in (("img_size", 1), ("patch_size", 16))
    )
    if (n := math.prod(s // p for s, p in zip(size, patch, strict=True))) > _MOST_PATCHES:
        raise InputError(
            f"model {source!r}: expected at most {_MOST_PATCHES} patches in a picture, found {n} (img_size, "
            "patch_size in its config.json); save the model with timm again"
        )
    heads = (config.get("rmm_lab") or {}).get("heads") or {}
    part = _list_of(_whole(0, 2**20), (2,))
    if not isinstance(heads, dict) or not all(map(part[1], heads.values())):
        raise InputError(
            f"model {source!r}: expected rmm_lab.heads in its config.json to hold two whole numbers for each "
            f"task, found {heads!r}; make it with rmm-lab finetune and all image folders"
        )


def check_processor(source: str, found: Mapping[str, Any]) -> None:
    """Raise InputError unless a preprocessor_config.json holds numbers in their range."""
    _check(f"model {source!r}", "", found, _PROCESSOR, "preprocessor_config.json", "transformers")


def _check(
    thing: str,
    place: str,
    found: Mapping[str, Any],
    ranges: Mapping[str, Range],
    file: str = "config.json",
    by: str = "timm",
) -> None:
    """InputError for the first value out of its range; null is what is missing, but for some."""
    for key, (expected, fits) in ranges.items():
        value = found.get(key)
        if key in found and not fits(value) and (value is not None or key in _NOT_NULL):
            raise InputError(
                f"{thing}: expected {place + key!r} in its {file} to be {expected}, found "
                f"{_short(value)}; save the model with {by} again"
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def arguments(kind: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json says to a config class of transformers: its own arguments and ``_MORE``, and nothing
    of how it is run; InputError for code of the model's own. A dropout of null is one that is missing."""
    for key in _CODE:
        if config.get(key):
            raise InputError(
                f"expected a config.json without code of its own, found {key!r}; such models are not "
                "supported"
            )
    other = getattr(kind, "attribute_map", {})
    # First: transformers makes lists of as many names as there are layers or labels.
    _check_numbers({other.get(key, key): value for key, value in config.items()})
    known = set(inspect.signature(kind).parameters) | set(other) | _MORE
    said = {k: v for k, v in config.items() if v is not None or k not in _DROPOUTS}
    return {k: v for k, v in said.items() if k in known - _RUNS and not k.startswith("_")}


def check_sizes(hf: Any) -> None:
    """Raise InputError unless the numbers of a config of transformers are in their range."""
    _check_numbers({key: getattr(hf, key) for key in _SIZES if hasattr(hf, key)})
    heads, width = getattr(hf, "num_attention_heads", None), getattr(hf, "hidden_size", None)
    groups = getattr(hf, "num_key_value_heads", None)
    if heads and groups and heads % groups:
        raise InputError(f"expected 'num_key_value_heads' to divide {heads} heads, found {groups}")
    if heads and width and width % heads and not getattr(hf, "head_dim", None):
        raise InputError(f"expected heads that divide a width of {width}, found {heads}")
    buckets = getattr(hf, "relative_attention_num_buckets", None)
    if buckets and hf.relative_attention_max_distance <= buckets // 2:
        raise InputError(
            f"expected 'relative_attention_max_distance' above half of {buckets} buckets, found "
            f"{hf.relative_attention_max_distance}"
        )
    for key, value in _numbers(getattr(hf, "rope_parameters", None)):
        if not 0 <= value <= 1e12 or (key in ("rope_theta", "factor") and not value):
            raise InputError(f"expected {key!r} of 'rope_parameters' above 0, found {value}")


def _check_numbers(found: Mapping[str, Any]) -> None:
    for key in found.keys() & _SIZES.keys():
        expected, fits = _SIZES[key]
        if found[key] is not None and not fits(found[key]):
            raise InputError(f"expected {key!r} to be {expected}, found {_short(found[key])}")


def _numbers(found: Any) -> list[tuple[str, float]]:
    """The numbers of an object and of objects in it, with their keys."""
    out: list[tuple[str, float]] = []
    for key, value in found.items() if isinstance(found, dict) else ():
        out += [(str(key), value)] if type(value) in (int, float) else _numbers(value)
    return out
