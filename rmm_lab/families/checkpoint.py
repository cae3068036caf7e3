"""Reading and writing checkpoints, and which family a checkpoint belongs to.

A *checkpoint* is a folder, on disk or on the hub: a timm ViT (timm's ``config.json`` and
``model.safetensors``) or a Hugging Face T5 (``config.json``, ``model.safetensors``, a tokenizer). What is
inside is the family's business. Weights are read from safetensors only, kept in float32 and never changed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rmm_lab.errors import InputError
from rmm_lab.families import causal_lm, t5, vit
from rmm_lab.families.parts import Weights, outside_head, shapes_of
from rmm_lab.families.protocol import Architecture, Family, Model
from rmm_lab.tasks.files import write_file

FAMILIES: dict[str, Family] = {"vit": vit, "t5": t5, "causal_lm": causal_lm}
_FILES = ("config.json", "model.safetensors")


class Checkpoint(Model):
    """A model as data that knows its family."""

    @property
    def family(self) -> Family:
        """The module that knows this model: ``rmm_lab.families.vit``, say."""
        return family_of(self.source, self.config)


def family_of(source: str, config: Mapping[str, Any]) -> Family:
    """The module that knows a model with this config.json; InputError for another family's."""
    for family in FAMILIES.values():
        if family.owns(config):
            return family
    kind = config.get("model_type")
    raise InputError(
        f"model {source!r}: expected timm's config.json with an 'architecture' or transformers' with "
        f"the model_type 't5' or a decoder-only language model's ({', '.join(causal_lm.LAYOUTS)}), found "
        f"{'neither' if kind is None else f'the model_type {kind!r}'}; save it with timm or transformers "
        "again, other families are not supported"
    )


def architecture(config: Mapping[str, Any], unit: str = "block") -> Architecture:
    """What runs and rebuilds models with this config.json piece by piece."""
    return family_of("config.json", config).architecture(config, unit)


def resolve(source: str | Path) -> Path:
    """The local folder behind a source: a folder, ``local-dir:FOLDER`` or ``hf-hub:OWNER/NAME``.

    Hub models are downloaded once into the hub's own cache: config, weights and the family's files.
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
    for name in _FILES:
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

    files = [*_FILES, *(name for family in FAMILIES.values() for name in family.FILES)]
    which: dict[str, Any] = {"revision": revision or None, "allow_patterns": files}
    try:
        try:
            folder = str(snapshot_download(repository, **which, local_files_only=True))
            cached = _is_whole(Path(folder))  # another program may have cached a part of it
        except OSError:
            cached = False
        if not cached:
            # One cheap question first: snapshot_download itself retries for minutes without a network.
            HfApi().model_info(repository, revision=which["revision"], timeout=2)
            folder = str(snapshot_download(repository, **which))
    except Exception as error:  # whatever the network stack raises, the user needs one sentence
        raise InputError(
            f"model {source!r}: expected the hub or a copy in its cache, found neither "
            f"({type(error).__name__}); download config.json and model.safetensors of {repository} (and a "
            "T5's tokenizer) elsewhere, put them in a folder and name that folder instead"
        ) from error
    return resolve(folder)


def _is_whole(folder: Path) -> bool:
    """Whether config and weights are there, and the files that the model's family needs."""
    if not all((folder / name).is_file() for name in _FILES):
        return False
    try:
        needed = family_of(str(folder), _read_config(str(folder), folder)).NEEDED
    except InputError:
        return True  # whole, if of no use: ``read_checkpoint`` says why
    return not needed or any((folder / name).is_file() for name in needed)


def _read_config(source: str, folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        if not isinstance(config, dict):
            raise TypeError(f"a {type(config).__name__}")
        return config
    except (ValueError, TypeError) as error:
        raise InputError(
            f"model {source!r}: expected a JSON object with an 'architecture' (timm) or a "
            f"'model_type' (transformers) in {folder / 'config.json'}, found something else ({error}); "
            "save the model with timm or transformers again"
        ) from error


def read_checkpoint(source: str | Path) -> Checkpoint:
    """Read a folder or hub model: config, weights in float32, and the SHA-256 of the weights' file.

    Raises InputError for a missing or broken file, an unknown family, NaN or Inf.
    """
    text, folder = str(source), resolve(source)
    config = _read_config(text, folder)
    family = family_of(text, config)
    file = folder / "model.safetensors"
    weights: Weights = {}
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - a safe_open is no dict
                weights[name] = tensors.get_tensor(name).float()
    except (SafetensorError, ValueError) as error:
        raise InputError(
            f"model {text!r}: expected a whole safetensors file, but {file} is truncated or "
            f"altered ({error}); copy or download it again"
        ) from error
    for name, tensor in weights.items():
        if bad := int((~torch.isfinite(tensor)).sum()):
            raise InputError(
                f"model {text!r}: expected finite weights, found {bad} NaN or Inf in tensor "
                f"{name!r}; fine-tune it again or take an earlier checkpoint"
            )
    weights = family.canonical(text, config, weights)
    with open(file, "rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return Checkpoint(text, folder, config, weights, sha256)


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    beside: Path | None = None,
) -> None:
    """Write a checkpoint's folder, each file to a temporary name first and then renamed.

    beside: folder whose tokenizer (or other files of the model's family) is copied.
    """
    # As text first: what JSON cannot hold must fail before any file is written.
    text = json.dumps(dict(config), indent=2, ensure_ascii=False) + "\n"
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


def check_same_architecture(base: Checkpoint, experts: Sequence[Checkpoint]) -> None:
    """Raise InputError, naming the first difference, unless experts equal the base up to the head."""
    signature = base.family.signature(base.config)
    shapes = shapes_of(outside_head(base.weights))
    for expert in experts:
        others = shapes_of(outside_head(expert.weights))
        odd = next((n for n in shapes | others if shapes.get(n) != others.get(n)), "")
        if expert.family is not base.family:
            expected, found = f"{base.family.NAME} as base {base.source!r}", expert.family.NAME
        elif odd in shapes:
            expected = f"tensor {odd!r} of shape {shapes[odd]} as in base {base.source!r}"
            found = str(others.get(odd, "no such tensor"))
        elif odd:
            expected = f"the tensors of base {base.source!r}"
            found = f"{odd!r} of shape {others[odd]} besides"
        elif (other := expert.family.signature(expert.config)) != signature:
            expected = f"the architecture {signature} of base {base.source!r}"
            found = str(other)
        else:
            continue
        raise InputError(
            f"expert {expert.source!r}: expected {expected}, found {found}; merge only models "
            "fine-tuned from one base"
        )
