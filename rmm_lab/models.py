"""The only file that knows a model family: a timm ViT seen as stem -> layers -> head.

A *checkpoint* is a folder in timm's own format (``config.json`` and ``model.safetensors``), on disk or
on the hub. Its weights fall into three kinds, by name:

* ``head.*``: the classifier; it stays with its task and is never merged;
* ``blocks.k.*``: layer k, the unit that the agent chooses (f_i^l of the paper);
* all the rest, the *stem*: patch and position embeddings, class token, final norm.

Weights are read from safetensors only, kept in float32, and never changed.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from rmm_lab.errors import InputError

Weights = dict[str, Tensor]
_LAYER = re.compile(r"blocks\.(\d+)\.(.+)")
# Arguments of timm's ViT that change no tensor outside the head, or nothing at evaluation.
_FREE_ARGS = {"num_classes", "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate"}
_FREE_ARGS |= {"attn_drop_rate", "drop_path_rate", "weight_init"}


@dataclass(frozen=True)
class Parts:
    """A model's weights by owner; every tensor belongs to exactly one of the three kinds."""

    stem: Weights
    layers: list[Weights]  # names without "blocks.k."
    head: Weights


@dataclass(frozen=True)
class Checkpoint:
    """A model as data. ``source`` is what the user typed, ``sha256`` that of the weights' file."""

    source: str
    folder: Path
    config: dict[str, Any]
    weights: Weights = field(repr=False)
    sha256: str

    @property
    def num_classes(self) -> int:
        return int(self.config.get("num_classes", 0))

    @property
    def label_names(self) -> list[str] | None:
        names = self.config.get("label_names")
        return list(names) if isinstance(names, (list, tuple)) else None


# --------------------------------------------------------------------------- reading and writing


def resolve(source: str | Path) -> Path:
    """The local folder behind a source: a folder, ``local-dir:FOLDER`` or ``hf-hub:OWNER/NAME``.

    Hub models are downloaded once, safetensors and config only, into the hub's own cache.
    """
    text = str(source)
    if text.startswith("hf-hub:"):
        return _from_hub(text)
    folder = Path(text.removeprefix("local-dir:")).expanduser()
    if not folder.is_dir():
        raise InputError(
            f"model {text!r}: expected a folder with config.json and model.safetensors, or "
            f"hf-hub:OWNER/NAME, but there is no folder {folder}; check the spelling"
        )
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise InputError(
                f"model {text!r}: expected config.json and model.safetensors in {folder}, found no "
                f"{name}; save the model with timm's save_for_hf(..., safe_serialization=True)"
            )
    return folder


def _from_hub(source: str) -> Path:
    repository, _, revision = source.removeprefix("hf-hub:").partition("@")
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "2")  # seconds: a closed network must answer fast
    from huggingface_hub import HfApi, snapshot_download

    files = ["config.json", "model.safetensors"]
    commit = revision or None
    try:
        try:
            folder = snapshot_download(
                repository, revision=commit, allow_patterns=files, local_files_only=True
            )
        except OSError:  # not in the cache (yet)
            # One cheap question first: snapshot_download itself retries for minutes without a network.
            HfApi().model_info(repository, revision=commit, timeout=2)
            folder = snapshot_download(repository, revision=commit, allow_patterns=files)
        return resolve(folder)
    except InputError:
        raise
    except Exception as error:  # whatever the network stack raises, the user needs one sentence
        raise InputError(
            f"model {source!r}: expected the hub or a copy in its cache, found neither "
            f"({type(error).__name__}); download config.json and model.safetensors of {repository} "
            "elsewhere, put them in a folder and name that folder instead"
        ) from error


def read_checkpoint(source: str | Path) -> Checkpoint:
    """Read a timm folder or hub model: config, weights in float32, and the weights' SHA-256.

    Raises InputError for a missing or broken file, a family that is not a plain ViT, NaN or Inf.
    """
    folder = resolve(source)
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        architecture = config["architecture"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"model {str(source)!r}: expected timm's config.json with an 'architecture', found "
            f"something else in {folder / 'config.json'} ({error}); save the model with timm again"
        ) from error
    for key, kind, what in (
        ("architecture", str, "text"),
        ("model_args", dict, "an object"),
        ("num_classes", int, "a whole number"),
    ):
        if key in config and not isinstance(config[key], kind):
            raise InputError(
                f"model {str(source)!r}: expected {key!r} in {folder / 'config.json'} to be {what}, "
                f"found {config[key]!r}; save the model with timm again"
            )
    file = folder / "model.safetensors"
    weights: Weights = {}
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - a safe_open is no dict
                weights[name] = tensors.get_tensor(name).float()
    except (SafetensorError, ValueError) as error:
        raise InputError(
            f"model {str(source)!r}: expected a whole safetensors file, but {file} is truncated or "
            f"altered ({error}); copy or download it again"
        ) from error
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise InputError(
                f"model {str(source)!r}: expected finite weights, found {bad} NaN or Inf in tensor "
                f"{name!r}; fine-tune it again or take an earlier checkpoint"
            )
    if not any(_LAYER.match(name) for name in weights) or "patch_embed.proj.weight" not in weights:
        raise InputError(
            f"model {str(source)!r}: expected a timm VisionTransformer (patch_embed, blocks.0, ...), "
            f"found architecture {architecture!r} with other weights; other families are not supported"
        )
    with open(file, "rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return Checkpoint(str(source), folder, config, weights, sha256)


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a timm folder, each file to a temporary name first and then renamed."""
    text = (
        json.dumps(dict(config), indent=2, ensure_ascii=False) + "\n"
    )  # may fail: before any file
    folder.mkdir(parents=True, exist_ok=True)
    # Clones, so that no two names share memory: safetensors refuses that, and a repeat is a copy.
    tensors = {k: v.detach().to("cpu", dtype, copy=True).contiguous() for k, v in weights.items()}
    scratch = folder / ".model.safetensors.tmp"
    try:
        # Not save_file: a full disk must show as OSError.
        scratch.write_bytes(save(tensors, metadata={"format": "pt"}))
        scratch.replace(folder / "model.safetensors")
        scratch = folder / ".config.json.tmp"
        scratch.write_text(text, "utf-8")
        scratch.replace(folder / "config.json")
    finally:
        scratch.unlink(missing_ok=True)


# ------------------------------------------------------------------------------ taking a ViT apart


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
    return Parts(stem, [layers[k] for k in range(len(layers))], head)


def join(stem: Weights, layers: Sequence[Weights], head: Weights) -> Weights:
    """The inverse of ``split``: names as timm has them, layers renumbered in the order given."""
    weights = dict(stem)
    for k, layer in enumerate(layers):
        weights |= {f"blocks.{k}.{name}": tensor for name, tensor in layer.items()}
    return weights | {f"head.{name}": tensor for name, tensor in head.items()}


def check_same_architecture(base: Checkpoint, experts: Sequence[Checkpoint]) -> None:
    """Experts must equal the base in everything but the head; the first difference is named."""
    own = _signature(base)
    for expert in experts:
        shapes = {k: tuple(v.shape) for k, v in _outside_head(expert.weights).items()}
        for name, tensor in _outside_head(base.weights).items():
            if name not in shapes:
                raise InputError(
                    f"expert {expert.source!r}: expected tensor {name!r} of shape "
                    f"{tuple(tensor.shape)} as in base {base.source!r}, found no such tensor; merge "
                    "only models fine-tuned from one base"
                )
            if shapes[name] != tuple(tensor.shape):
                raise InputError(
                    f"expert {expert.source!r}: expected tensor {name!r} of shape "
                    f"{tuple(tensor.shape)} as in base {base.source!r}, found {shapes[name]}; merge "
                    "only models fine-tuned from one base"
                )
        if extra := sorted(set(shapes) - set(base.weights)):
            raise InputError(
                f"expert {expert.source!r}: expected the tensors of base {base.source!r}, found "
                f"{extra[0]!r} of shape {shapes[extra[0]]} besides; merge only models fine-tuned "
                "from one base"
            )
        if (other := _signature(expert)) != own:
            raise InputError(
                f"expert {expert.source!r}: expected the architecture {own} of base {base.source!r}, "
                f"found {other}; merge only models fine-tuned from one base"
            )


def _outside_head(weights: Mapping[str, Tensor]) -> Weights:
    return {k: v for k, v in weights.items() if not k.startswith("head.")}


def _signature(checkpoint: Checkpoint) -> tuple[str, dict[str, Any]]:
    """What shapes do not show: the architecture's name and arguments such as the number of heads."""
    args = checkpoint.config.get("model_args") or {}
    return checkpoint.config["architecture"], {
        k: args[k] for k in sorted(args) if k not in _FREE_ARGS
    }


# --------------------------------------------------------------------------- running and rebuilding


class ViT:
    """Runs and rebuilds the ViTs of one architecture piece by piece.

    ``embed`` -> ``apply`` for each layer of a path -> ``logits`` equals timm's own forward pass.

    Args:
        config: timm's config.json of any model of the architecture.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = dict(config)
        model = create(config, depth=None, num_classes=0)
        self.shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
        self.n_layers = len(model.blocks)
        # Stacks of layers that may follow each other: a layer only ever lands in its own stack.
        self.stacks = (range(self.n_layers),)
        self._blocks = list(model.blocks)  # kept only as shapes for new layers
        model.blocks = nn.Sequential()
        self._trunk = model

    def stem(self, weights: Weights) -> nn.Module:
        """Everything outside the layers and the head as a module."""
        return Stem(_load(self._trunk, weights))

    def layer(self, k: int, weights: Weights) -> nn.Module:
        """Layer k as a module that holds ``weights`` without copying them."""
        return _load(self._blocks[k], weights)

    @staticmethod
    def embed(stem: nn.Module, images: Tensor) -> Tensor:
        """Images (n, channels, height, width), normalised -> tokens (n, tokens, width)."""
        return stem.trunk.forward_features(images)  # type: ignore[operator, union-attr]

    @staticmethod
    def apply(layer: nn.Module, tokens: Tensor) -> Tensor:
        """One layer: tokens (n, tokens, width) -> tokens (n, tokens, width)."""
        return layer(tokens)

    @staticmethod
    def logits(stem: nn.Module, tokens: Tensor, head: Weights) -> Tensor:
        """Final norm, pooling and one task's head: tokens -> logits (n, classes)."""
        pooled = stem.trunk.forward_head(stem.norm(tokens), pre_logits=True)  # type: ignore[operator, union-attr]
        return nn.functional.linear(pooled, head["weight"], head.get("bias"))

    def assemble(
        self, stem: Weights, layers: Sequence[Weights], heads: Mapping[str, Weights]
    ) -> nn.Module:
        """A real timm model of depth ``len(layers)`` whose classifier holds all heads, one after another.

        The logits of a task are a slice of the model's: see ``head_slices``.
        """
        total = sum(len(h["weight"]) for h in heads.values())
        model = create(self.config, depth=len(layers), num_classes=total)
        head = {
            "weight": torch.cat([h["weight"] for h in heads.values()]),
            "bias": torch.cat(
                [h.get("bias", torch.zeros(len(h["weight"]))) for h in heads.values()]
            ),
        }
        model.load_state_dict(join(stem, layers, head))
        return model.eval()


class Stem(nn.Module):
    """A ViT without layers and head, its final norm set apart: what stands before and after a path."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.norm = trunk.norm
        trunk.norm = nn.Identity()
        self.trunk = trunk


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
    if any(hasattr(block.attn, "lambda_init") for block in model.blocks):
        raise InputError(
            f"architecture {config['architecture']!r}: expected layers that compute the same wherever "
            "they stand, found differential attention, which depends on the layer's number; such "
            "models cannot be merged layer by layer"
        )
    return model.eval().requires_grad_(False)


def _load(shape: nn.Module, weights: Weights) -> nn.Module:
    module = copy.deepcopy(shape)
    try:
        module.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise InputError(
            f"expected the weights that config.json describes, found others: {error}"
        ) from error
    return module.eval().requires_grad_(False)
