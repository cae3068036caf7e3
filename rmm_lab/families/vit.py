"""A timm ViT seen as stem -> layers -> head.

A checkpoint's weights fall into three kinds, by name:

* ``head.*``: the classifier; it stays with its task and is never merged;
* ``blocks.k.*``: block k, the layer that the agent chooses (f_i^l of the paper), or its two sublayers,
  attention and MLP, as layers of their own;
* all the rest, the *stem*: patch and position embeddings, class token, final norm.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rmm_lab.errors import InputError
from rmm_lab.families.parts import Parts, Weights, begins, fill, gather

NAME = "a timm ViT"
FILES: tuple[str, ...] = ()  # what stands beside config and weights, and is copied on export
# The modules of a pre-norm block's sublayers: norm, function, scale.
_SUBLAYERS = (("norm1", "attn", "ls1"), ("norm2", "mlp", "ls2"))
_LAYER = re.compile(r"blocks\.(\d+)\.(.+)")
# Arguments of timm's ViT that change no tensor outside the head, or nothing at evaluation.
_FREE_ARGS = {"num_classes", "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate"}
_FREE_ARGS |= {"attn_drop_rate", "drop_path_rate", "weight_init"}


# ------------------------------------------------------------------------------ taking a ViT apart


def canonical(source: str, config: Mapping[str, Any], weights: Weights) -> Weights:
    """The weights as they are, once config and names are found to be a timm ViT's."""
    for key, kind, what in (
        ("architecture", str, "text"),
        ("model_args", dict, "an object"),
        ("num_classes", int, "a whole number"),
    ):
        if key in config and not isinstance(config[key], kind):
            raise InputError(
                f"model {source!r}: expected {key!r} in its config.json to be {what}, found "
                f"{config[key]!r}; save the model with timm again"
            )
    if not any(_LAYER.match(name) for name in weights) or "patch_embed.proj.weight" not in weights:
        raise InputError(
            f"model {source!r}: expected a timm VisionTransformer (patch_embed, blocks.0, ...), found "
            f"architecture {config['architecture']!r} with other weights; other families are not "
            "supported"
        )
    return weights


def once(source: str, weights: Mapping[str, Tensor]) -> Weights:
    """A ViT's file holds every tensor once."""
    return dict(weights)


def split(weights: Mapping[str, Tensor]) -> Parts:
    """Weights of a timm ViT by owner: stem, L layers, head."""
    stem: Weights = {}
    head: Weights = {}
    layers: dict[int, Weights] = {}
    for name, tensor in weights.items():
        if match := _LAYER.fullmatch(name):
            layers.setdefault(int(match[1]), {})[match[2]] = tensor
        elif name.startswith("head."):
            head[name.removeprefix("head.")] = tensor
        else:
            stem[name] = tensor
    if sorted(layers) != list(range(len(layers))):
        raise InputError(
            f"expected layers blocks.0 to blocks.{len(layers) - 1}, found {layers.keys()}"
        )
    return Parts(stem, [layers[k] for k in range(len(layers))], head, (range(len(layers)),))


def sublayers(block: Weights) -> list[Weights]:
    """A block's weights by sublayer: attention, then MLP, names unchanged."""
    found: list[Weights] = [{} for _ in _SUBLAYERS]
    for name, tensor in block.items():
        owner = [i for i, own in enumerate(_SUBLAYERS) if name.partition(".")[0] in own]
        if not owner:
            raise InputError(
                f"expected blocks of attention and MLP, each with a norm before it, found {name!r} in a "
                "block; merge whole blocks: --unit block"
            )
        found[owner[0]][name] = tensor
    return found


def join(stem: Weights, layers: Sequence[Weights], head: Weights) -> Weights:
    """The inverse of ``split``: names as timm has them, layers renumbered in the order given."""
    weights = dict(stem)
    for k, layer in enumerate(layers):
        weights |= {f"blocks.{k}.{name}": tensor for name, tensor in layer.items()}
    return weights | {f"head.{name}": tensor for name, tensor in head.items()}


def signature(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """What shapes do not show: the architecture's name and arguments such as the number of heads."""
    args = config.get("model_args") or {}
    return config["architecture"], {k: args[k] for k in sorted(args) if k not in _FREE_ARGS}


def check_head(name: str, source: str, num_classes: int, head: Weights, stem: Weights) -> None:
    """Raise InputError unless an expert has a classifier of the shape that its config says."""
    if "weight" not in head:
        raise InputError(
            f"expert {name!r}: expected a classification head (head.weight), found none; fine-tune it "
            "with a head on its task"
        )
    width = stem["patch_embed.proj.weight"].shape[0]
    for key, shape in (("weight", (num_classes, width)), ("bias", (num_classes,))):
        if key in head and tuple(head[key].shape) != shape:
            raise InputError(
                f"expert {source!r}: expected head.{key} of shape {shape} as its config.json says, "
                f"found {tuple(head[key].shape)}; save it again"
            )


# --------------------------------------------------------------------------- running and rebuilding


class ViT:
    """Runs and rebuilds the ViTs of one architecture piece by piece.

    ``embed`` -> ``apply`` for each layer of a path -> ``logits`` equals timm's own forward pass. What
    goes from one to the next is a Tensor of tokens (n, tokens, width).

    Args:
        config: timm's config.json of any model of the architecture.
        unit: what a layer is: a ``block``, or a ``sublayer``: attention or MLP of a block.
    """

    def __init__(self, config: Mapping[str, Any], unit: str = "block") -> None:
        self.config, self.unit = dict(config), unit
        model = create(config, depth=None, num_classes=0)
        self.shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
        if unit == "sublayer":
            _check_sublayers(config["architecture"], model)
        self._pools_token = _pools_token(model)
        model = model.to("meta")  # shapes only: every number comes from a checkpoint
        self._blocks = list(model.blocks)
        self._layers: list[Any] = self._blocks
        if unit == "sublayer":
            self._layers = [Sublayer(block, own) for block in self._blocks for own in _SUBLAYERS]
        self.n_layers = len(self._layers)
        model.blocks = nn.Sequential()
        self._trunk = model

    @property
    def _kinds(self) -> list[int]:
        """What each sublayer is: 0 for an attention, 1 for an MLP."""
        return [i for _ in self._blocks for i in range(len(_SUBLAYERS))]

    def stem(self, weights: Weights) -> nn.Module:
        """Everything outside the layers and the head as a module."""
        return Stem(fill(self._trunk, weights))

    def layer(self, k: int, weights: Weights) -> nn.Module:
        """Layer k as a module that holds ``weights`` without copying them."""
        return fill(self._layers[k], weights)

    @staticmethod
    def place(images: Tensor, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """A batch where the layers are, in their precision."""
        return images.to(device, dtype)

    @staticmethod
    def tensors(tokens: Tensor) -> list[Tensor]:
        """All memory that a state holds."""
        return [tokens]

    def widest(self, tokens: Tensor) -> int:
        """Numbers per example in the largest tensor of a layer, the hidden one of the MLP as a rule."""
        block: Any = self._blocks[0]
        outs = [m.out_features for m in block.modules() if isinstance(m, nn.Linear)]
        return tokens.shape[1] * max(outs, default=tokens.shape[2])

    @staticmethod
    def embed(stem: nn.Module, images: Tensor) -> Tensor:
        """Images (n, channels, height, width), normalised -> tokens (n, tokens, width)."""
        return stem.trunk.forward_features(images)  # type: ignore[operator, union-attr]

    @staticmethod
    def apply(layer: nn.Module, tokens: Tensor) -> Tensor:
        """One layer: tokens (n, tokens, width) -> tokens (n, tokens, width)."""
        return layer(tokens)

    def apply_last(self, layer: nn.Module, tokens: Tensor) -> Tensor:
        """The last layer of a path: what ``logits`` needs of it, (n, 1 or all tokens, width).

        Where the class token alone is pooled, the other tokens are only its keys and values: a sixth of
        the layer's work.
        """
        if not self._pools_token:
            return layer(tokens)
        if isinstance(layer, Sublayer):
            return _class_attention(layer, tokens) if layer.mixes else layer(tokens[:, :1])
        return _class_token(layer, tokens)

    @staticmethod
    def logits(stem: nn.Module, tokens: Tensor, head: Weights) -> Tensor:
        """Final norm, pooling and one task's head: tokens -> logits (n, classes)."""
        pooled = stem.trunk.forward_head(stem.norm(tokens), pre_logits=True)  # type: ignore[operator, union-attr]
        return nn.functional.linear(pooled, head["weight"], head.get("bias"))

    def assemble(
        self, stem: Weights, layers: Sequence[tuple[int, Weights]], heads: Mapping[str, Weights]
    ) -> nn.Module:
        """A real timm model of depth ``len(layers)`` whose classifier holds all heads, one after another.

        layers: (number in the base, weights) in running order; a timm ViT does not mind the number.
        Sublayers are put together to blocks again, with zeros for an attention or an MLP that is missing.
        The logits of a task are a slice of the model's: see ``head_slices``.
        """
        total = sum(len(h["weight"]) for h in heads.values())
        blocks = [weights for _, weights in layers]
        if self.unit == "sublayer":
            shapes = [
                {k: tuple(v.shape) for k, v in block.state_dict().items()} for block in self._blocks
            ]
            blocks = gather(layers, self._kinds, [s for s in shapes for _ in _SUBLAYERS])
        model = create(self.config, depth=len(blocks), num_classes=total)
        head = {
            "weight": torch.cat([h["weight"] for h in heads.values()]),
            "bias": torch.cat(
                [h.get("bias", torch.zeros(len(h["weight"]))) for h in heads.values()]
            ),
        }
        model.load_state_dict(join(stem, blocks, head))
        return model.eval()

    def merged_config(
        self, numbers: Sequence[int], heads: Mapping[str, Weights], labels: Mapping[str, Sequence]
    ) -> dict[str, Any]:
        """config.json of an assembled model: its depth, all classes as ``task/class``, heads' slices."""
        slices = head_slices(heads)
        total = sum(stop - start for start, stop in slices.values())
        depth = len(numbers) if self.unit == "block" else sum(begins(numbers, self._kinds))
        config = model_config(self.config, depth=depth, num_classes=total)
        config["label_names"] = [f"{name}/{label}" for name in heads for label in labels[name]]
        config["rmm_lab"] = {"heads": {name: list(part) for name, part in slices.items()}}
        return config


class Stem(nn.Module):
    """A ViT without layers and head, its final norm set apart: what stands before and after a path."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.norm = trunk.norm
        trunk.norm = nn.Identity()
        self.trunk = trunk


class Sublayer(nn.Module):
    """Attention or MLP of a pre-norm block, with the residual: x + scale(function(norm(x)))."""

    def __init__(self, block: nn.Module, names: tuple[str, str, str]) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, getattr(block, name))
        self.names, self.mixes = names, "attn" in names

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (n, tokens, width) -> tokens (n, tokens, width)."""
        norm, function, scale = (getattr(self, name) for name in self.names)
        return tokens + scale(function(norm(tokens)))


def _check_sublayers(architecture: str, model: Any) -> None:
    """InputError unless a block of this architecture is its two sublayers, one after the other."""
    generator = torch.Generator().manual_seed(0)
    for block in model.blocks[:1]:
        fits = all(hasattr(block, name) for own in _SUBLAYERS for name in own)
        if fits:
            tokens = torch.randn(2, 5, model.embed_dim, generator=generator)
            with torch.inference_mode():
                found = tokens
                for own in _SUBLAYERS:
                    found = Sublayer(block, own)(found)
                fits = torch.allclose(found, block(tokens), rtol=1e-4, atol=1e-5)
        if not fits:
            raise InputError(
                f"architecture {architecture!r}: expected blocks of attention and MLP, each with a norm "
                "before it, found others; merge whole blocks: --unit block"
            )


def _pools_token(model: Any) -> bool:
    """Whether ``_class_token`` is the whole of what a model of this architecture pools.

    Asked of timm's names, and then of the numbers: the shortcut must agree with the whole layer.
    """
    from timm.models.vision_transformer import Attention, Block

    known = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop"}
    if not model.blocks:  # said by a config.json that does not fit its weights
        return False
    block = model.blocks[0]
    if (
        model.global_pool != "token"
        or getattr(model, "attn_pool", None) is not None
        or any(type(b) is not Block or type(b.attn) is not Attention for b in model.blocks)
        or any(name not in known for name, _ in block.attn.named_children())
    ):
        return False
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 5, model.embed_dim, generator=generator)
    with torch.inference_mode():
        whole = block(tokens)[:, :1]
        return torch.allclose(_class_token(block, tokens), whole, rtol=1e-4, atol=1e-5)


def _class_token(layer: Any, tokens: Tensor) -> Tensor:
    """timm's pre-norm Block for the class token alone: (n, tokens, width) -> (n, 1, width)."""
    token = _class_attention(layer, tokens)
    return token + layer.ls2(layer.mlp(layer.norm2(token)))


def _class_attention(layer: Any, tokens: Tensor) -> Tensor:
    """A block's attention sublayer for the class token alone: (n, tokens, width) -> (n, 1, width)."""
    attn, width = layer.attn, layer.attn.num_heads * layer.attn.head_dim
    normed, weight, bias = layer.norm1(tokens), attn.qkv.weight, attn.qkv.bias
    parts = []
    for i, x in enumerate((normed[:, :1], normed, normed)):  # query, key, value
        own = slice(i * width, (i + 1) * width)
        part = nn.functional.linear(x, weight[own], None if bias is None else bias[own])
        parts.append(part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2))  # (n, heads, t, d)
    q, k, v = parts
    mixed = nn.functional.scaled_dot_product_attention(
        attn.q_norm(q), attn.k_norm(k), v, scale=attn.scale
    )
    mixed = attn.proj(getattr(attn, "norm", nn.Identity())(mixed.transpose(1, 2).flatten(2)))
    return tokens[:, :1] + layer.ls1(mixed)


def head_slices(heads: Mapping[str, Weights]) -> dict[str, tuple[int, int]]:
    """First and last + 1 of each task's logits in the assembled model's."""
    slices, start = {}, 0
    for name, head in heads.items():
        slices[name] = (start, start + len(head["weight"]))
        start = slices[name][1]
    return slices


def model_config(
    config: Mapping[str, Any], *, depth: int | None, num_classes: int
) -> dict[str, Any]:
    """A timm config.json like ``config`` with another depth and number of classes, without labels."""
    out = {k: copy.deepcopy(v) for k, v in config.items() if k not in ("label_names", "rmm_lab")}
    out["num_classes"] = num_classes
    out["model_args"] = dict(config.get("model_args") or {}) | {"num_classes": num_classes}
    out.setdefault("pretrained_cfg", {})["num_classes"] = num_classes
    if depth is not None:
        out["model_args"]["depth"] = depth
    return out


def create(config: Mapping[str, Any], *, depth: int | None, num_classes: int) -> Any:
    """A timm VisionTransformer in evaluation mode, without gradients, with random weights."""
    import timm
    from timm.models.vision_transformer import VisionTransformer

    args = model_config(config, depth=depth, num_classes=num_classes)["model_args"]
    try:
        model = timm.create_model(
            config["architecture"],
            pretrained=False,
            pretrained_cfg=config.get("pretrained_cfg"),  # may hold the size of the input
            **args,
        )
    except (RuntimeError, TypeError, AssertionError) as error:
        raise InputError(
            f"architecture {config['architecture']!r}: expected a name and arguments that timm "
            f"{timm.__version__} knows, found {args} ({error}); correct config.json or install the "
            "timm that wrote it"
        ) from error
    if type(model) is not VisionTransformer:
        raise InputError(
            f"architecture {config['architecture']!r}: expected a timm VisionTransformer, found "
            f"{type(model).__name__}; other families are not supported"
        )
    if any(hasattr(module, "lambda_init") for module in model.blocks.modules()):
        raise InputError(
            f"architecture {config['architecture']!r}: expected layers that compute the same wherever "
            "they stand, found differential attention, which depends on the layer's number; such "
            "models cannot be merged layer by layer"
        )
    return model.eval().requires_grad_(False)
