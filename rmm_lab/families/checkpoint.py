"""Models as data: reading and writing checkpoints, and which family a checkpoint is of.

A *checkpoint* is a folder, on disk or on the hub: a timm ViT's (``config.json`` of timm and
``model.safetensors``) or a Hugging Face T5's (``config.json`` of transformers, ``model.safetensors``, a
tokenizer). ``vit`` and ``t5`` are the only files that know what is inside, and offer the same names.
Weights are read from safetensors only, kept in float32, and never changed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rmm_lab.errors import InputError
from rmm_lab.families import t5, vit
from rmm_lab.families.parts import Weights, outside_head

# What knows a family: a module with canonical, split, signature, check_head and a class that runs it.
Family = Any


@dataclass(frozen=True)
class Checkpoint:
    """A model as data. ``source`` is what the user typed, ``sha256`` that of the weights' file."""

    source: str
    folder: Path
    config: dict[str, Any]
    weights: Weights = field(repr=False)
    sha256: str

    @property
    def family(self) -> Family:
        """The module that knows this model: ``rmm_lab.families.vit`` or ``rmm_lab.families.t5``."""
        return family_of(self.source, self.config)

    @property
    def num_classes(self) -> int:
        return int(self.config.get("num_classes", 0))

    @property
    def label_names(self) -> list[str] | None:
        names = self.config.get("label_names")
        return list(names) if isinstance(names, (list, tuple)) else None


def family_of(source: str, config: Mapping[str, Any]) -> Family:
    """The module that knows a model with this config.json; InputError for another family's."""
    if "architecture" in config:
        return vit
    kind = config.get("model_type")
    if kind == "t5":
        return t5
    raise InputError(
        f"model {source!r}: expected timm's config.json with an 'architecture' or transformers' with "
        f"the model_type 't5', found {'neither' if kind is None else f'the model_type {kind!r}'}; save "
        "it with timm or transformers again, other families are not supported"
    )


def architecture(config: Mapping[str, Any], unit: str = "block") -> Any:
    """What runs and rebuilds models with this config.json piece by piece: a ``ViT`` or a ``T5``."""
    family = family_of("config.json", config)
    return family.ViT(config, unit) if family is vit else family.T5(config, unit)


# --------------------------------------------------------------------------- reading and writing


def resolve(source: str | Path) -> Path:
    """The local folder behind a source: a folder, ``local-dir:FOLDER`` or ``hf-hub:OWNER/NAME``.

    Hub models are downloaded once into the hub's own cache: safetensors, config and a T5's tokenizer.
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
                f"{name}; save the model in one file with timm's save_for_hf(..., "
                "safe_serialization=True) or transformers' save_pretrained"
            )
    return folder


def _from_hub(source: str) -> Path:
    repository, _, revision = source.removeprefix("hf-hub:").partition("@")
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "2")  # seconds: a closed network must answer fast
    from huggingface_hub import HfApi, snapshot_download

    files = ["config.json", "model.safetensors", *t5.FILES]
    commit = revision or None
    try:
        try:
            folder = snapshot_download(
                repository, revision=commit, allow_patterns=files, local_files_only=True
            )
            if not _is_whole(Path(folder)):  # another program may have cached a part of it
                raise FileNotFoundError(folder)
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
            f"({type(error).__name__}); download config.json and model.safetensors of {repository} (and a "
            "T5's tokenizer) elsewhere, put them in a folder and name that folder instead"
        ) from error


def _is_whole(folder: Path) -> bool:
    """Whether config and weights are there, and a T5's tokenizer."""
    there = {
        name
        for name in ("config.json", "model.safetensors", *t5.FILES)
        if (folder / name).is_file()
    }
    if not {"config.json", "model.safetensors"} <= there:
        return False
    is_t5 = '"t5"' in (folder / "config.json").read_text("utf-8", errors="replace")
    return not is_t5 or bool({"tokenizer.json", "spiece.model"} & there)


def read_checkpoint(source: str | Path) -> Checkpoint:
    """Read a folder or hub model: config, weights in float32, and the SHA-256 of the weights' file.

    Raises InputError for a missing or broken file, an unknown family, NaN or Inf.
    """
    folder = resolve(source)
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        if not isinstance(config, dict):
            raise TypeError(f"a {type(config).__name__}")
    except (ValueError, TypeError) as error:
        raise InputError(
            f"model {str(source)!r}: expected a JSON object with an 'architecture' (timm) or a "
            f"'model_type' (transformers) in {folder / 'config.json'}, found something else ({error}); "
            "save the model with timm or transformers again"
        ) from error
    family = family_of(str(source), config)
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
    weights = family.canonical(str(source), config, weights)
    with open(file, "rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return Checkpoint(str(source), folder, config, weights, sha256)


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    beside: Path | None = None,
) -> None:
    """Write a checkpoint's folder, each file to a temporary name first and then renamed.

    beside: folder whose tokenizer (or whatever else its family keeps beside the weights) is copied.
    """
    text = (
        json.dumps(dict(config), indent=2, ensure_ascii=False) + "\n"
    )  # may fail: before any file
    folder.mkdir(parents=True, exist_ok=True)
    # Clones, so that no two names share memory: safetensors refuses that, and a repeat is a copy.
    tensors = {k: v.detach().to("cpu", dtype, copy=True).contiguous() for k, v in weights.items()}
    # Not save_file: a full disk must show as OSError. The config comes last: with it, all is there.
    files = {"model.safetensors": save(tensors, metadata={"format": "pt"})}
    if beside is not None:
        kept = family_of(str(folder), config).FILES
        files |= {n: (beside / n).read_bytes() for n in kept if (beside / n).is_file()}
    for name, content in (files | {"config.json": text.encode()}).items():
        write_file(folder / name, content)


def write_file(file: Path, content: bytes) -> None:
    """Write to a temporary name, then rename: a reader sees the old file or the new one."""
    scratch = file.with_name(f".{file.name}.tmp")
    try:
        scratch.write_bytes(content)
        scratch.replace(file)
    finally:
        scratch.unlink(missing_ok=True)


def check_same_architecture(base: Checkpoint, experts: Sequence[Checkpoint]) -> None:
    """Experts must equal the base in everything but the head; the first difference is named."""
    own = base.family.signature(base.config)
    for expert in experts:
        if expert.family is not base.family:
            raise InputError(
                f"expert {expert.source!r}: expected {base.family.NAME} as base {base.source!r}, found "
                f"{expert.family.NAME}; merge only models fine-tuned from one base"
            )
        shapes = {k: tuple(v.shape) for k, v in outside_head(expert.weights).items()}
        for name, tensor in outside_head(base.weights).items():
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
        if (other := expert.family.signature(expert.config)) != own:
            raise InputError(
                f"expert {expert.source!r}: expected the architecture {own} of base {base.source!r}, "
                f"found {other}; merge only models fine-tuned from one base"
            )
