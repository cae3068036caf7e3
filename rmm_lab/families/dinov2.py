"""A merged DINOv2 as transformers has it: its classifier reads the class token and the mean of the patches.

No ViT of timm's has such a classifier, so these models are the ones that are not exported as a timm folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rmm_lab.families.names import timm_name
from rmm_lab.families.parts import Weights, join

_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh"}  # others have timm's name


def hf_config(config: Mapping[str, Any], depth: int, joint: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' config.json of a merged DINOv2.

    config: timm's, as ``convert.to_timm`` makes it; joint: with the labels and slices of all heads.
    """
    args, own = config["model_args"], config["rmm_lab"]
    registers = int(args.get("reg_tokens", 0))
    kind = "dinov2_with_registers" if registers else "dinov2"
    title = "Dinov2WithRegisters" if registers else "Dinov2"
    labels = {str(i): name for i, name in enumerate(joint["label_names"])}
    out = {
        "architectures": [f"{title}ForImageClassification"],
        "model_type": kind,
        "hidden_size": args["embed_dim"],
        "num_hidden_layers": depth,
        "num_attention_heads": args["num_heads"],
        "mlp_ratio": own.get("mlp_ratio", round(args["mlp_ratio"])),
        "use_swiglu_ffn": "mlp_ratio" in own,
        "hidden_act": _ACTIVATIONS.get(args["act_layer"], args["act_layer"]),
        "layer_norm_eps": 1e-6,
        "image_size": args["img_size"][0],
        "patch_size": args["patch_size"][0],
        "num_channels": args["in_chans"],
        "qkv_bias": args["qkv_bias"],
        "id2label": labels,
        "label2id": {name: int(i) for i, name in labels.items()},
        "rmm_lab": joint["rmm_lab"],
    }
    return out | ({"num_register_tokens": registers} if registers else {})


def to_dinov2(
    config: Mapping[str, Any], stem: Weights, blocks: Sequence[Weights], head: Weights
) -> nn.Module:
    """transformers' Dinov2ForImageClassification with timm's weights; config: from ``hf_config``."""
    import transformers

    kind = getattr(transformers, config["architectures"][0])
    rest = {k: v for k, v in config.items() if k not in ("model_type", "rmm_lab")}
    model = kind(kind.config_class(**rest))
    weights = apart(join(stem, {"blocks": blocks}, head), config["use_swiglu_ffn"])
    if "reg_token" in weights:  # the class token's position is in the token
        zero = torch.zeros_like(weights["cls_token"])
        weights["pos_embed"] = torch.cat([zero, weights["pos_embed"]], 1)
    state = {
        name: weights.get(timm_name(name), torch.zeros_like(tensor))  # the mask's token is not used
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def apart(weights: Mapping[str, Tensor], swiglu: bool = False) -> Weights:
    """Queries, keys and values of each block as three tensors, and a SwiGLU's maps; others as they are."""
    out: Weights = {}
    for name, tensor in weights.items():
        mlp = re.fullmatch(r"(.+\.mlp\.)fc([12])\.(weight|bias)", name) if swiglu else None
        if match := re.fullmatch(r"(.+\.attn\.)qkv\.(weight|bias)", name):
            for part, own in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                out[f"{match[1]}{part}.{match[2]}"] = own
        elif mlp:
            parts = ("gate_proj", "up_proj") if mlp[2] == "1" else ("down_proj",)
            for part, own in zip(parts, tensor.chunk(len(parts)), strict=True):
                out[f"{mlp[1]}{part}.{mlp[3]}"] = own
        else:
            out[name] = tensor
    return out


def gated(weights: Mapping[str, Tensor]) -> Weights:
    """A model's tensors as the hub's files have them: a SwiGLU's two maps to the hidden tensor are one."""
    out: Weights = {}
    for name, tensor in weights.items():
        if ".mlp.gate_proj." in name:
            tensor = torch.cat([tensor, weights[name.replace("gate_proj", "up_proj")]])
        if ".mlp.up_proj." not in name:
            name = name.replace("gate_proj", "weights_in").replace("down_proj", "weights_out")
            out[name] = tensor
    return out
