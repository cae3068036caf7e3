"""What runs a timm ViT layer by layer, and builds a real one from layers."""

from __future__ import annotations

import copy
import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rmm_lab.errors import InputError
from rmm_lab.families.class_token import class_attention, class_token, pools_token
from rmm_lab.families.dinov2 import hf_config, to_dinov2
from rmm_lab.families.parts import (
    Place,
    Shapes,
    Weights,
    begins,
    fill,
    gather,
    join,
    outside_head,
    shapes_of,
)
from rmm_lab.families.protocol import Config
from rmm_lab.families.text_head import folded, project
from rmm_lab.tasks.input_format import preprocessing

# What a head reads, where that is not what timm's ``forward_head`` pools, beside the class token:
DISTILLED = "token+distilled"  # the distillation token, as timm's own class does
TOKEN_AND_MEAN = "token+mean"  # the mean of the patches, as DINOv2 in transformers does
# The modules of a pre-norm block's sublayers: norm, function, scale.
SUBLAYERS = (("norm1", "attn", "ls1"), ("norm2", "mlp", "ls2"))


class ViT:
    """Runs and rebuilds the ViTs of one architecture piece by piece.

    An ``Architecture``: batches are images, the state is a Tensor of tokens (n, tokens, width).

    Args:
        config: timm's config.json of any model of the architecture.
        unit: what a layer is: a ``block``, or a ``sublayer``: attention or MLP of a block.
    """

    def __init__(self, config: Config, unit: str = "block") -> None:
        self.config, self.unit = dict(config), unit
        self.optional: Shapes = {}
        model = create(config, depth=None, num_classes=0)
        self.readout = readout(config, model)
        self.shapes = shapes_of(model.state_dict())
        if unit == "sublayer":
            _check_sublayers(config["architecture"], model)
        self._pools_token = not self.readout and pools_token(model)
        model = model.to("meta")  # shapes only: every number comes from a checkpoint
        numbers = range(1 if unit == "block" else len(SUBLAYERS))
        self._places: list[Place] = [(i, block) for block in model.blocks for i in numbers]
        self._layers = [b if unit == "block" else Sublayer(b, i) for i, b in self._places]
        self.n_layers = len(self._layers)
        model.blocks = nn.Sequential()
        self._trunk = model

    def stem(self, weights: Weights) -> nn.Module:
        return Stem(fill(self._trunk, weights), self.readout)

    def layer(self, k: int, weights: Weights) -> nn.Module:
        return fill(self._layers[k], weights)

    @staticmethod
    def place(batch: Tensor, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        return batch.to(device, dtype)

    @staticmethod
    def tensors(state: Tensor) -> list[Tensor]:
        return [state]

    @staticmethod
    def stream(state: Tensor) -> Tensor:
        return state.flatten(0, -2)

    def widest(self, state: Tensor) -> int:
        """Usually the hidden tensor of the MLP."""
        block = self._places[0][1]
        outs = [m.out_features for m in block.modules() if isinstance(m, nn.Linear)]
        return state.shape[1] * max(outs, default=state.shape[2])

    @staticmethod
    def embed(stem: Any, batch: Tensor) -> Tensor:
        """Images (n, channels, height, width), normalised -> tokens (n, tokens, width)."""
        return stem.trunk.forward_features(batch)

    @staticmethod
    def apply(layer: nn.Module, state: Tensor) -> Tensor:
        return layer(state)

    def apply_last(self, layer: nn.Module, state: Tensor) -> Tensor:
        """(n, 1 or all tokens, width): only the class token where ``logits`` needs no other."""
        if not self._pools_token:
            return layer(state)
        if isinstance(layer, Sublayer):
            return class_attention(layer, state) if layer.mixes else layer(state[:, :1])
        return class_token(layer, state)

    @staticmethod
    def logits(stem: Any, state: Tensor, head: Weights) -> Tensor:
        """Final norm, pooling and one task's head: tokens -> logits (n, classes)."""
        tokens = stem.norm(state)
        if stem.readout:
            prefix = stem.trunk.num_prefix_tokens
            second = tokens[:, 1] if stem.readout == DISTILLED else tokens[:, prefix:].mean(1)
            pooled = torch.cat([tokens[:, 0], second], 1)  # (n, 2 width)
        else:
            pooled = stem.trunk.forward_head(tokens, pre_logits=True)  # (n, width)
        return nn.functional.linear(project(pooled, head), head["weight"], head.get("bias"))

    def writes(self, layer: Any) -> dict[str, tuple[str, str]]:
        if not self._pools_token:  # also: whether a block is timm's pre-norm one
            return {}
        names = {"attn.proj": SUBLAYERS[0], "mlp.fc2": SUBLAYERS[1]}
        there = dict(layer.named_modules())
        return {name: (part[0], part[2]) for name, part in names.items() if name in there}

    def row_weights(self, layer: Any, name: str, state: Tensor, readout: float) -> Tensor | None:
        n, tokens, _ = state.shape
        if not self._pools_token or not readout or tokens < 2:
            return None
        weights = state.new_ones(n, tokens)
        weights[:, 0] = readout / (1 - readout) * (tokens - 1)  # the class token
        return weights.flatten()

    def embeddings(self, batch: Tensor) -> dict[str, Tensor]:
        """None: patches are no rows of a table."""
        return {}

    def assemble(
        self, stem: Weights, layers: Sequence[tuple[int, Weights]], heads: Mapping[str, Weights]
    ) -> nn.Module:
        """A real timm model of depth ``len(layers)`` whose classifier holds all heads, one after another.

        Sublayers are joined to blocks again, with zeros for a missing attention or MLP. A task's logits are
        a slice of the model's: see ``head_slices``.
        """
        total = sum(len(h["weight"]) for h in heads.values())
        heads = {name: folded(head) for name, head in heads.items()}
        blocks = [weights for _, weights in layers]
        if self.unit == "sublayer":
            blocks = gather(layers, self._places)
        head = {
            "weight": torch.cat([h["weight"] for h in heads.values()]),
            "bias": torch.cat(
                [h.get("bias", torch.zeros(len(h["weight"]))) for h in heads.values()]
            ),
        }
        if self.readout == TOKEN_AND_MEAN:  # which timm has not
            config = self.merged_config([k for k, _ in layers], heads, {})
            return to_dinov2(config, stem, blocks, head)
        model = create(self.config, depth=len(blocks), num_classes=total)
        weights = join(stem, {"blocks": blocks}, head)
        model.load_state_dict(two_heads(weights) if self.readout else weights)
        return model.eval()

    def merged_config(
        self, numbers: Sequence[int], heads: Mapping[str, Weights], labels: Mapping[str, Sequence]
    ) -> dict[str, Any]:
        depth = sum(begins(numbers, self._places))
        classes = {
            name: labels.get(name, range(len(head["weight"]))) for name, head in heads.items()
        }
        joint = joint_config(self.config, depth, classes)
        if self.readout == TOKEN_AND_MEAN:
            return hf_config(self.config, depth, joint)
        return joint


def readout(config: Config, model: Any) -> str:
    """What a head reads: ``""`` for what timm's ``forward_head`` pools."""
    if hasattr(model, "head_dist"):
        return DISTILLED
    return str((config.get("rmm_lab") or {}).get("readout", ""))


def one_head(weights: Mapping[str, Tensor]) -> Weights:
    """The two classifiers of timm's distilled ViT, whose logits are averaged, as one of two tokens."""
    if "head_dist.weight" not in weights:
        return dict(weights)
    out = {n: t for n, t in weights.items() if not n.startswith("head_dist.")}
    one, two = weights["head.weight"], weights["head_dist.weight"]
    out["head.weight"] = torch.cat([one, two], 1) / 2  # (classes, 2 width)
    out["head.bias"] = (weights["head.bias"] + weights["head_dist.bias"]) / 2
    return out


def two_heads(weights: Mapping[str, Tensor]) -> Weights:
    """The inverse of ``one_head``, with equal biases."""
    one, two = (2 * weights["head.weight"]).chunk(2, 1)  # each (classes, width)
    bias = weights["head.bias"]
    heads = {"head.weight": one, "head_dist.weight": two, "head.bias": bias, "head_dist.bias": bias}
    return dict(weights) | heads


class Stem(nn.Module):
    """A ViT without layers and head: what runs before and after a path; its final norm is set apart."""

    def __init__(self, trunk: nn.Module, readout: str = "") -> None:
        super().__init__()
        self.readout = readout
        self.norm = trunk.norm
        trunk.norm = nn.Identity()
        self.trunk = trunk


class Sublayer(nn.Module):
    """Attention or MLP of a pre-norm block, with the residual: x + scale(function(norm(x)))."""

    def __init__(self, block: nn.Module, number: int) -> None:
        super().__init__()
        self.names, self.mixes = SUBLAYERS[number], number == 0
        for name in self.names:
            setattr(self, name, getattr(block, name))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (n, tokens, width) -> tokens (n, tokens, width)."""
        norm, function, scale = (getattr(self, name) for name in self.names)
        return tokens + scale(function(norm(tokens)))


def _check_sublayers(architecture: str, model: Any) -> None:
    """InputError unless a block of this architecture is its two sublayers, one after the other."""
    generator = torch.Generator().manual_seed(0)
    for block in model.blocks[:1]:
        fits = all(hasattr(block, name) for names in SUBLAYERS for name in names)
        if fits:
            tokens = torch.randn(2, 5, model.embed_dim, generator=generator)
            with torch.inference_mode():
                out = Sublayer(block, 1)(Sublayer(block, 0)(tokens))
                fits = torch.allclose(out, block(tokens), rtol=1e-4, atol=1e-5)
        if not fits:
            raise InputError(
                f"architecture {architecture!r}: expected blocks of attention and MLP, each with a norm "
                "before it, found others; merge whole blocks: --unit block"
            )


def head_slices(heads: Mapping[str, Weights]) -> dict[str, tuple[int, int]]:
    """First and last + 1 of each task's logits in the assembled model's."""
    return _slices({name: len(head["weight"]) for name, head in heads.items()})


def _slices(sizes: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    stops = itertools.accumulate(sizes.values())
    return {name: (stop - n, stop) for (name, n), stop in zip(sizes.items(), stops, strict=True)}


def joint_config(
    config: Config, depth: int | None, classes: Mapping[str, Sequence]
) -> dict[str, Any]:
    """config.json of a ViT with the heads of several tasks: all classes as ``task/class``, and slices.

    classes: task -> the names of its classes. depth: None for that of ``config``.
    """
    names = [f"{task}/{label}" for task, labels in classes.items() for label in labels]
    slices = _slices({task: len(labels) for task, labels in classes.items()})
    return model_config(config, depth=depth, num_classes=len(names)) | {
        "label_names": names,
        "rmm_lab": {"heads": {task: list(part) for task, part in slices.items()}},
    }


def model_config(config: Config, *, depth: int | None, num_classes: int) -> dict[str, Any]:
    """A timm config.json like ``config`` with another depth and number of classes, without labels."""
    out = {k: copy.deepcopy(v) for k, v in config.items() if k not in ("label_names", "rmm_lab")}
    out["num_classes"] = num_classes
    out["model_args"] = dict(config.get("model_args") or {}) | {"num_classes": num_classes}
    out["pretrained_cfg"] = preprocessing(out) | {"num_classes": num_classes}
    if depth is not None:
        out["model_args"]["depth"] = depth
    return out


# How timm's names of other families begin: told at once, since timm takes seconds to start.
OTHERS = (
    *(
        "beit_",
        "beitv2",
        "convnext",
        "efficientnet",
        "eva02",
        "eva_giant",
        "levit",
        "mixer",
        "mobilenet",
    ),
    *("resnet", "swin"),
)


def _refuse(config: Config, found: str) -> InputError:
    return InputError(
        f"architecture {config['architecture']!r}: expected a plain ViT or DeiT (timm's "
        f"VisionTransformer), found {found}; of vision models only these are supported, and no Swin, BEiT, "
        "EVA or ResNet"
    )


# What timm looks at in ``pretrained_cfg`` when it builds a model: sizes, and no place to load from.
_SHOWN = (
    "input_size",
    "fixed_input_size",
    "num_classes",
    "global_pool",
    "first_conv",
    "classifier",
)


def create(config: Config, *, depth: int | None, num_classes: int) -> Any:
    """A timm VisionTransformer in evaluation mode, without gradients, with random weights."""
    if (name := str(config["architecture"])).startswith(OTHERS):
        raise _refuse(config, name.partition("_")[0])
    import timm
    from timm.models.vision_transformer import VisionTransformer

    args = model_config(config, depth=depth, num_classes=num_classes)["model_args"]
    cfg = {k: v for k, v in (config.get("pretrained_cfg") or {}).items() if k in _SHOWN}
    try:
        model = timm.create_model(
            config["architecture"], pretrained=False, pretrained_cfg=cfg or None, **args
        )
    except Exception as error:  # of many kinds, where numbers or names do not go together
        raise InputError(
            f"architecture {config['architecture']!r}: expected a name and arguments that timm "
            f"{timm.__version__} knows, found {args} ({error}); correct config.json or install the "
            "timm that wrote it"
        ) from error
    if (
        type(model) is not VisionTransformer
        and type(model).__name__ != "VisionTransformerDistilled"
    ):
        raise _refuse(config, type(model).__name__)
    if any(hasattr(module, "lambda_init") for module in model.blocks.modules()):
        raise InputError(
            f"architecture {config['architecture']!r}: expected layers that compute the same in any "
            "place, found differential attention, which depends on the layer's number; such models "
            "cannot be merged layer by layer"
        )
    return model.eval().requires_grad_(False)


# What a module knows of itself that changes nothing at evaluation and at the size of its images.
_FREE = {
    *("training", "inplace", "fused_attn", "grad_checkpointing", "distilled_training", "fix_init"),
    *("p", "prob", "drop_prob", "drop_rate", "scale_by_keep", "weight_init_mode"),
    *("dynamic_img_size", "dynamic_img_pad", "strict_img_size", "flatten", "output_fmt"),
    "num_classes",
}
_IDLE = ("Identity", "Dropout", "DropPath", "PatchDropout")  # at evaluation


def described(config: Config) -> tuple[dict[str, Any], Shapes]:
    """The model that config.json describes, without numbers: what shapes do not show, and the shapes.

    The first holds of each module its kind and its numbers, such as heads and norms' eps.
    """
    args = {k: v for k, v in (config.get("model_args") or {}).items() if k != "num_classes"}
    cfg = config.get("pretrained_cfg") or {}
    sizes = {k: cfg[k] for k in ("input_size", "fixed_input_size") if k in cfg}
    return _described(json.dumps([config["architecture"], args, sizes], sort_keys=True))


@functools.lru_cache(maxsize=16)
def _described(text: str) -> tuple[dict[str, Any], Shapes]:
    name, args, cfg = json.loads(text)
    config = {"architecture": name, "model_args": args, "pretrained_cfg": cfg}
    out: dict[str, Any] = {}
    with torch.device("meta"):  # no memory for what the weights may not confirm
        model = create(config, depth=None, num_classes=0)
    for place, module in model.named_modules():
        if (kind := type(module).__name__) not in _IDLE:
            known = {k: v for k, v in vars(module).items() if not k.startswith("_")}
            plain = (int, float, str, tuple)
            found = {k: v for k, v in known.items() if k not in _FREE and isinstance(v, plain)}
            out |= {f"{place}.{k}".lstrip("."): v for k, v in ({"kind": kind} | found).items()}
    return out, shapes_of(outside_head(model.state_dict()))


def check_shapes(source: str, config: Config, weights: Mapping[str, Tensor]) -> None:
    """InputError unless the weights outside the head are those that config.json describes."""
    said, there = described(config)[1], shapes_of(outside_head(weights))
    odd = next((n for n in there | said if said.get(n) != there.get(n)), None)
    if odd is not None:
        raise InputError(
            f"model {source!r}: expected tensor {odd!r} of shape {said.get(odd, 'none')} as its config.json "
            f"says, found {there.get(odd, 'none')}; save the model with timm again"
        )
