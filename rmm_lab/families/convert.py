"""transformers' vision models, converted on reading into the timm ViT that computes the same.

ViT, DeiT (also distilled), DINOv2, and the vision towers of CLIP and SigLIP, with their classifiers. Names
change, queries, keys and values are joined, class names and preprocessing go where timm has them.

A classifier reads what its class in transformers reads: the final class token (ViT, DeiT, CLIP's pooled
output), class and distillation token (DeiT with teacher), the class token beside the mean of the patches
(DINOv2), or the mean of the patches (CLIP and SigLIP for image classification).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmm_lab.errors import InputError
from rmm_lab.families import limits, reading, text_head
from rmm_lab.families.parts import Factors, Weights
from rmm_lab.families.vit_run import TOKEN_AND_MEAN, check_shapes, create

MODEL_TYPES = (
    *("vit", "deit", "dinov2", "dinov2_with_registers"),
    *("clip", "clip_vision_model", "siglip", "siglip_vision_model"),
)
# timm's architectures by the eps of their norms, which config.json cannot say otherwise.
_BY_EPS = {1e-6: "vit_base_patch16_224", 1e-5: "vit_base_patch16_clip_224"}
_DISTILLED = "deit_base_distilled_patch16_224"
_GATED = "vit_giant_patch14_dinov2"  # whose MLPs are SwiGLU
_SAME = 1e-4  # how far logits may move where timm has no norm of the same eps
_ACTIVATIONS = {
    **{"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"},
    **{"quick_gelu": "quick_gelu", "relu": "relu", "silu": "silu", "swish": "silu"},
}
# What a classifier of images does not use.
_UNUSED = re.compile(
    r"^(?:pooler|text_model|text_projection|embeddings\.mask_token|embeddings\.position_ids)(?:\.|$)"
    r"|^(?:logit_scale|logit_bias|visual_projection\.weight|decoder\..*)$"
)
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_NORMALISED = {"deit": _IMAGENET, "dino": _IMAGENET, "clip": _CLIP}  # without preprocessor_config
_RESAMPLE: dict[Any, str] = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
}  # Pillow's numbers


def is_vision(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a model that is converted here."""
    return config.get("model_type") in MODEL_TYPES


def to_timm(
    source: str,
    folders: Sequence[Path],
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    of_base: Callable[[], Mapping[str, Tensor]] = dict,
) -> tuple[dict[str, Any], Weights, list[str]]:
    """config.json and weights of the timm ViT that computes the same, and notes.

    Args:
        source: the model's name in messages.
        folders: where preprocessor_config.json and class embeddings may lie, the model's own first.
        config: transformers' config.json.
        weights: under the names of ``timm_name``.
        of_base: gives the base's weights, where a head made of text needs its projection.

    Raises InputError for an activation, norm or layer that timm's plain ViT does not have.
    """
    hf = _hf_config(source, config)
    kind = str(config["model_type"]).partition("_")[0]
    text: tuple[Weights, list[str]] = {}, []
    if kind in ("clip", "siglip") and (folders[0] / text_head.FILE).is_file():
        text = text_head.read_text_head(source, folders[0], weights, int(hf.hidden_size), of_base)
        weights = {n: t for n, t in weights.items() if not n.startswith("head.")}
    weights = {n: t for n, t in weights.items() if not _UNUSED.match(n)}
    needed = ["patch_embed.proj.weight", "pos_embed", "blocks.0.norm1.weight"]
    for name in [n for n in weights if n.endswith(".attn.query.weight")]:
        needed += [name.replace("query", part) for part in ("key", "value")]
    lost = next((name for name in needed if name not in weights), None)
    if lost is not None:
        raise InputError(
            f"model {source!r}: expected the weights of a {config['model_type']!r} of transformers', found "
            f"no {lost!r}; save the model with transformers again"
        )
    with _described(source):
        out, args, more = _weights(source, kind, hf, weights)
    out |= {f"head.{name}": tensor for name, tensor in text[0].items()}
    eps = float(hf.layer_norm_eps)
    architecture = _BY_EPS.get(eps, _BY_EPS[1e-6])
    if "dist_token" in out:
        architecture = _DISTILLED
    if "mlp_ratio" in more:
        architecture = _GATED
    with _described(source):
        cfg, notes = _preprocessing(source, folders, kind, hf, args, out)
        n = len(out["head.weight"]) if "head.weight" in out else 0
    found: dict[str, Any] = {
        "architecture": architecture,
        "num_classes": n,
        "num_features": int(hf.hidden_size),
        "model_args": args | {"num_classes": n},
        "pretrained_cfg": cfg | {"num_classes": n},
        "rmm_lab": {"from": str(config["model_type"]), **more},
    }
    names = config.get("id2label") or {}
    labels = [str(names.get(str(i), names.get(i))) for i in range(n)]
    if n == len(names) and labels != [f"LABEL_{i}" for i in range(n)] and not text[0]:
        found["label_names"] = labels
    if text[1]:
        found["label_names"] = text[1]
    notes += _check_eps(source, found, out, eps)
    return found, out, notes


@contextmanager
def _described(source: str) -> Iterator[None]:
    """InputError where tensors have other shapes than the block takes them for."""
    try:
        yield
    except (RuntimeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"model {source!r}: expected the weights that its config.json describes, found others "
            f"({error}); save it with transformers again"
        ) from error


def _hf_config(source: str, config: Mapping[str, Any]) -> Any:
    """transformers' configuration of the vision model, with its defaults."""
    from transformers import CONFIG_MAPPING

    kind = config["model_type"]
    try:
        known = CONFIG_MAPPING[kind]
        rest = limits.arguments(known, config)
        if (inner := getattr(known, "sub_configs", {}).get("vision_config")) is not None:
            rest = {"vision_config": limits.arguments(inner, config.get("vision_config") or {})}
        hf = known(**rest)
        hf = getattr(hf, "vision_config", hf)
        limits.check_sizes(hf)
        return hf
    except Exception as error:  # huggingface_hub has errors of its own for this
        raise InputError(
            f"model {source!r}: expected a config.json that transformers reads as {kind!r}, found another "
            f"({error}); save the model with transformers again"
        ) from error


def _pair(size: Any) -> list[int]:
    return [int(size)] * 2 if isinstance(size, int) else [int(s) for s in size]


def _weights(
    source: str, kind: str, hf: Any, weights: Weights
) -> tuple[Weights, dict[str, Any], dict[str, Any]]:
    """Weights under timm's names, timm's ``model_args``, and what only we know of the readout."""
    width, depth = int(hf.hidden_size), int(hf.num_hidden_layers)
    hidden = int(getattr(hf, "intermediate_size", 0) or width * getattr(hf, "mlp_ratio", 4))
    ratio = hidden / width
    activation = _ACTIVATIONS.get(str(hf.hidden_act))
    if activation is None:
        raise InputError(
            f"model {source!r}: expected an activation of {', '.join(_ACTIVATIONS)}, found "
            f"{hf.hidden_act!r}; such models are not supported"
        )
    args: dict[str, Any] = {
        "img_size": _pair(hf.image_size),
        "patch_size": _pair(hf.patch_size),
        "in_chans": int(hf.num_channels),
        "embed_dim": width,
        "depth": depth,
        "num_heads": int(hf.num_attention_heads),
        "mlp_ratio": ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf),
        "qkv_bias": bool(getattr(hf, "qkv_bias", True)),
        "act_layer": activation,
        "pre_norm": kind == "clip",
        "global_pool": "token",
    }
    more: dict[str, Any] = {}
    out = _joined(weights)
    if "pos_embed" in out:
        out["pos_embed"] = out["pos_embed"].reshape(1, -1, width)  # (N, D) in CLIP and SigLIP
    if "cls_token" in out:
        out["cls_token"] = out["cls_token"].reshape(1, 1, width)
    if kind == "siglip":
        args["class_token"] = False
    if kind in ("clip", "siglip") and "head.weight" in out:  # ...ForImageClassification: the mean
        out = {n: t for n, t in out.items() if not n.startswith("attn_pool.")}
        args |= {"global_pool": "avg", "fc_norm": False}
        if kind == "clip":  # of tokens before the final norm
            args["final_norm"] = False
            out = {n: t for n, t in out.items() if not n.startswith("norm.")}
    elif kind == "siglip":
        args["global_pool"] = "map" if "attn_pool.latent" in out else "avg"
        args |= {} if "attn_pool.latent" in out else {"fc_norm": False}
    if getattr(hf, "use_swiglu_ffn", False):  # fc1: what is gated and the gate, one below the other
        more["mlp_ratio"] = hf.mlp_ratio  # as transformers counts
        args |= {"mlp_ratio": len(out["blocks.0.mlp.fc1.weight"]) / width, "act_layer": "silu"}
    if kind == "deit" and "head_dist.weight" not in out and "dist_token" in out:
        args["reg_tokens"] = 1  # a token that no classifier reads
        out["reg_token"] = out.pop("dist_token")
    if kind == "dinov2":
        args["init_values"] = 1.0
        more["readout"] = TOKEN_AND_MEAN
        if "reg_token" in out:  # no position for these; the class token's goes into the token
            args |= {"reg_tokens": out["reg_token"].shape[1], "no_embed_class": True}
            out["cls_token"] = out["cls_token"] + out["pos_embed"][:, :1]
            out["pos_embed"] = out["pos_embed"][:, 1:]
    return out, args, more


def _joined(weights: Mapping[str, Tensor]) -> Weights:
    """Queries, keys and values of a block as one matrix; the query and the rest of SigLIP's pooling apart."""
    out: Weights = {}
    for name, tensor in weights.items():
        if match := re.fullmatch(r"(.+\.attn\.)query\.(weight|bias)", name):
            rest = [weights[f"{match[1]}{part}.{match[2]}"] for part in ("key", "value")]
            out[f"{match[1]}qkv.{match[2]}"] = torch.cat([tensor, *rest])  # (3 D, D)
        elif match := re.fullmatch(r"attn_pool\.in_proj\.(weight|bias)", name):
            n = len(tensor) // 3
            out[f"attn_pool.q.{match[1]}"], out[f"attn_pool.kv.{match[1]}"] = tensor[:n], tensor[n:]
        elif not re.fullmatch(r".+\.attn\.(key|value)\.(weight|bias)", name):
            out[name] = tensor
    return out


def joined_factors(factors: Factors) -> Factors:
    """An adapter's factors with those of queries, keys and values as factors of the joined matrix."""
    out: Factors = {}
    for name, (left, right) in factors.items():
        if match := re.fullmatch(r"(.+\.attn\.)(query|key|value)\.weight", name):
            name, i, n = f"{match[1]}qkv.weight", "qkv".index(match[2][0]), len(left)
            left = torch.nn.functional.pad(left, (0, 0, i * n, (2 - i) * n))  # (D, r) -> (3 D, r)
            if name in out:
                left, right = torch.cat([out[name][0], left], 1), torch.cat([out[name][1], right])
        out[name] = left, right
    return out


def _preprocessing(
    source: str, folders: Sequence[Path], kind: str, hf: Any, args: dict[str, Any], out: Weights
) -> tuple[dict[str, Any], list[str]]:
    """timm's ``pretrained_cfg`` from preprocessor_config.json, or from what the models were made with."""
    files, notes = [f / "preprocessor_config.json" for f in folders], []
    file = next((file for file in files if file.is_file()), None)
    found = reading.read_config(source, file, "of an image processor") if file else {}
    limits.check_processor(source, found)
    mean, std = _NORMALISED.get(kind[:4], ((0.5,) * 3, (0.5,) * 3))
    mean, std = found.get("image_mean") or mean, found.get("image_std") or std
    if found.get("do_normalize") is False:
        mean, std = (0.0,) * 3, (1.0,) * 3
    size = found.get("size") or {}
    size = {"shortest_edge": size} if isinstance(size, int) else dict(size)
    own = args["img_size"]
    edge = size.get("shortest_edge")
    crop = found.get("crop_size") if found.get("do_center_crop") else None
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    asked = crop or size
    if "height" in asked and [asked["height"], asked["width"]] != own:
        own = [asked["height"], asked["width"]]
        if kind.startswith("dino"):  # made for 518 pixels, and run at 224
            out["pos_embed"] = _interpolated(out["pos_embed"], args, own)
            notes.append(f"its position embeddings are interpolated to {own[0]} x {own[1]} pixels")
            args["img_size"] = own
    share = {"crop_pct": 1.0, "crop_mode": "squash"}
    if crop and edge:
        share = {"crop_pct": crop["height"] / edge, "crop_mode": "center"}
    elif not found or edge:
        share = {"crop_pct": 1.0, "crop_mode": "center"}
    cfg = {
        "input_size": [args["in_chans"], *args["img_size"]],
        "fixed_input_size": True,
        "mean": list(mean),
        "std": list(std),
        "interpolation": _RESAMPLE.get(found.get("resample"), "bicubic"),
        "first_conv": "patch_embed.proj",
        "classifier": ["head", "head_dist"] if "head_dist.weight" in out else "head",
        **share,
    }
    return cfg, notes


def _interpolated(tokens: Tensor, args: Mapping[str, Any], size: list[int]) -> Tensor:
    """Position embeddings for another size as transformers' DINOv2 interpolates them."""
    old, new = (
        [side // patch for side, patch in zip(pixels, args["patch_size"], strict=True)]
        for pixels in (args["img_size"], size)
    )
    prefix = tokens.shape[1] - old[0] * old[1]
    grid = tokens[:, prefix:].reshape(1, *old, -1).permute(0, 3, 1, 2)  # (1, width, rows, columns)
    grid = torch.nn.functional.interpolate(grid, size=new, mode="bicubic", align_corners=False)
    return torch.cat([tokens[:, :prefix], grid.flatten(2).transpose(1, 2)], 1)


def _check_eps(source: str, config: dict[str, Any], weights: Weights, eps: float) -> list[str]:
    """Notes; InputError where the eps of timm's norms, which config.json cannot set, changes the logits.

    Measured on noise and on a blank image.
    """
    apart = config["rmm_lab"].get("readout") or "head.projection" in weights
    n = 0 if apart else config["num_classes"]
    check_shapes(source, config, weights)
    model = create(config, depth=None, num_classes=n)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
    own = norms[0].eps
    if own == eps:
        return []
    plain = {k: v for k, v in weights.items() if n or not k.startswith(("head.", "head_dist."))}
    with _described(source):
        model.load_state_dict(plain, strict=False)
    x = torch.randn(
        1, *config["pretrained_cfg"]["input_size"], generator=torch.Generator().manual_seed(0)
    )
    x = torch.cat([x, torch.zeros_like(x)])
    with torch.inference_mode():
        one = model(x)
        for norm in norms:
            norm.eps = eps
        two = model(x)
    moved = float((one - two).abs().max())
    if moved > _SAME * max(1.0, float(two.abs().max())):
        raise InputError(
            f"model {source!r}: expected norms with an eps of {' or '.join(map(str, _BY_EPS))}, as timm has, "
            f"or one of no influence, found layer_norm_eps {eps}; with {own} logits move by {moved:.2g} on "
            f"two test images. If that is all the same to you, write {own} into config.json of the base and "
            "of each expert"
        )
    return [
        f"its norms' eps of {eps} becomes timm's {own}: on two test images logits move by {moved:.0e}"
    ]
