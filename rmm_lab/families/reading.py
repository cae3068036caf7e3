"""What is on disk: config.json and weights, in the forms in which checkpoints come.

Weights are one safetensors file, several with an index (``save_pretrained`` writes them above some GB), or
a pickle (``pytorch_model.bin``, ``.pth``), which is read only where the caller allows it, by torch's own
restricted loader. All become float32, under the names that the model's own ``state_dict`` has.
"""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rmm_lab.errors import InputError, one_sentence
from rmm_lab.families.parts import Weights
from rmm_lab.tasks import plain

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EMBEDDINGS = "class_embeddings.safetensors"  # of classes, beside a vision tower: see ``text_head``
SHARDS = "model-*-of-*.safetensors"
PICKLES = ("pytorch_model*.bin", "adapter_model.bin", "*.pth", "*.pt")
# What a training script keeps beside them.
_NO_WEIGHTS = ("optimizer", "scheduler", "rng_state", "scaler", "training_args")
# Masks and numbers of positions in old files: no weights, and made again by each model.
_NO_NUMBERS = re.compile(r"(.*\.)?(position_ids|(attn|attention)\.(bias|masked_bias))")
# Where training scripts keep a model's weights in a file that holds more than these.
_NESTED = ("state_dict", "model_state_dict", "model")


@dataclass(frozen=True)
class Stored:
    """The weights of a folder in float32, and of which file or files they are.

    ``sha256``: of the file; of several files, of the lines ``SHA-256 NAME`` in the order of their names.
    ``pickled``: the file, where it is a pickle.
    """

    weights: Weights
    sha256: str
    pickled: Path | None = None


def read_config(source: str, file: Path, expected: str) -> dict[str, Any]:
    """A JSON object of a model's folder; InputError for anything else. expected: what it should hold."""
    try:
        config = plain.read_json(file)
        if not isinstance(config, dict):
            raise TypeError(f"a {type(config).__name__}")
        return config
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"model {source!r}: expected a JSON object {expected} in {file}, found something else "
            f"({error}); save the model with timm, transformers or peft again"
        ) from error


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter of peft's and no whole model."""
    whole = any((folder / name).is_file() for name in (WEIGHTS, INDEX))
    return (folder / ADAPTER).is_file() and not whole


def weight_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The safetensors files of a folder's weights (the index first, if there is one), and its pickles."""
    one = folder / (ADAPTER_WEIGHTS if is_adapter(folder) else WEIGHTS)
    if one.is_file():
        return [one], []
    if (folder / INDEX).is_file():
        return [folder / INDEX], []
    found = sorted({f for pattern in PICKLES for f in folder.glob(pattern) if f.is_file()})
    found = [file for file in found if not file.name.startswith(_NO_WEIGHTS)]
    named = [file for file in found if file.name in ("pytorch_model.bin", "adapter_model.bin")]
    return [], named[:1] or found


def read_weights(source: str, folder: Path, *, allow_pickle: bool = False) -> Stored:
    """All weights of a folder, in float32 and with their own names.

    Raises InputError for a missing, broken or altered file, a pickle that is not allowed, numbers that
    are not floating point of 16 bits or more, NaN or Inf.
    """
    files, pickles = weight_files(folder)
    pickled = None
    if files and files[0].name == INDEX:
        owner = shards(source, files[0])
        files += sorted(set(owner.values()))
        tensors = {name: t for file in files[1:] for name, t in _read(source, file).items()}
        lost = next((name for name in owner if name not in tensors), None)
        if lost is not None:
            raise InputError(
                f"model {source!r}: expected tensor {lost!r} in {owner[lost]} as {INDEX} says, found none; "
                "copy or download the folder again"
            )
    elif files:
        tensors = _read(source, files[0])
    else:
        _check_pickles(source, folder, pickles, allow_pickle)
        files, pickled = list(pickles), pickles[0]
        tensors = {n: t for file in pickles for n, t in _unpickle(source, file).items()}
    if is_adapter(folder):
        files.append(folder / ADAPTER)  # which holds the scale
    files += [f for f in (folder / EMBEDDINGS,) if f.is_file()]
    weights = bare_names(
        source,
        {
            n: _float32(source, n, t)
            for n, t in tensors.items()
            if t.is_floating_point() or not _NO_NUMBERS.fullmatch(n)
        },
    )
    return Stored(weights, digest(files), pickled)


def digest(files: Sequence[Path]) -> str:
    """SHA-256 of a file; of several, of the lines ``SHA-256 NAME``."""
    found = []
    for file in files:
        with open(file, "rb") as stream:
            found.append(hashlib.file_digest(stream, "sha256").hexdigest())
    if len(found) == 1:
        return found[0]
    lines = [f"{sha256} {file.name}\n" for sha256, file in zip(found, files, strict=True)]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def bare_names(source: str, weights: Mapping[str, Tensor]) -> Weights:
    """Weights without what wrappers add to names: DataParallel's ``module.``, torch.compile's ``_orig_mod.``.

    Raises InputError where two names become one.
    """
    out: Weights = {}
    origin: dict[str, str] = {}
    for name, tensor in weights.items():
        bare = name.replace("_orig_mod.", "")
        while bare.startswith("module."):
            bare = bare.removeprefix("module.")
        if bare in out:
            raise InputError(
                f"model {source!r}: expected each tensor once, found both {origin[bare]!r} and {name!r}, the "
                "same name but for the prefix of a wrapper; save the state_dict of the model without its "
                "wrapper (model.module or model._orig_mod)"
            )
        out[bare], origin[bare] = tensor, name
    return out


def shards(source: str, index: Path) -> dict[str, Path]:
    """Tensor's name -> its file, of an index; InputError where the index or a file is missing or broken."""
    owner = read_config(source, index, "with a 'weight_map'").get("weight_map")
    names = list(owner.values()) if isinstance(owner, dict) else []
    if not names or not all(isinstance(n, str) and Path(n).name == n for n in names):
        raise InputError(
            f"model {source!r}: expected 'weight_map' in {index} to name a file of the same folder for each "
            "tensor, found something else; copy or download the folder again"
        )
    missing = sorted({name for name in names if not (index.parent / name).is_file()})
    if missing:
        raise InputError(
            f"model {source!r}: expected {len(set(names))} files as {index.name} says, found no "
            f"{', '.join(missing)} in {index.parent}; copy or download them too"
        )
    assert isinstance(owner, dict)
    return {tensor: index.parent / name for tensor, name in owner.items()}


def _read(source: str, file: Path) -> Weights:
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise InputError(
            f"model {source!r}: expected a whole safetensors file, but {file} is truncated or "
            f"altered ({error}); copy or download it again"
        ) from error


def _check_pickles(source: str, folder: Path, pickles: Sequence[Path], allow: bool) -> None:
    """InputError unless a folder without safetensors has one pickle, or all shards, and they are allowed."""
    names = ", ".join(file.name for file in pickles)
    shards = [re.fullmatch(r"pytorch_model-\d+-of-(\d+)\.bin", file.name) for file in pickles]
    whole = all(match and int(match[1]) == len(pickles) for match in shards)
    if not pickles or (not whole if any(shards) else len(pickles) > 1):
        raise InputError(
            f"model {source!r}: expected {WEIGHTS} or {INDEX} in {folder}, found "
            f"{names or f'no {WEIGHTS}'}; save the model with timm's save_for_hf(..., "
            "safe_serialization=True) or transformers' save_pretrained"
        )
    if not allow:
        raise InputError(
            f"model {source!r}: expected {WEIGHTS} in {folder}, found only {names}, a pickle; if you trust "
            'where it comes from, add --allow-pickle, or convert it once: python -c "import torch, '
            f"safetensors.torch as s; w = torch.load('{names}', map_location='cpu', weights_only=True); "
            f"s.save_file({{k: v.clone() for k, v in w.items()}}, '{WEIGHTS}', {{'format': 'pt'}})\""
        )


def _unpickle(source: str, file: Path) -> Weights:
    """The tensors of a pickle by torch's restricted loader, which makes tensors and nothing else."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        TypeError,
    ) as error:
        raise InputError(
            f"model {source!r}: expected tensors alone in {file}, found what torch.load(weights_only=True) "
            f"does not read ({one_sentence(error)[:200]}); save its state_dict as safetensors"
        ) from error
    inner = [
        found[k] for k in _NESTED if isinstance(found, dict) and isinstance(found.get(k), dict)
    ]
    found = inner[0] if inner else found
    if not isinstance(found, dict) or not found:
        raise InputError(
            f"model {source!r}: expected a state_dict in {file}, found a {type(found).__name__}; save the "
            "model's state_dict"
        )
    odd = next(
        (k for k, v in found.items() if not (isinstance(k, str) and torch.is_tensor(v))), None
    )
    if odd is not None:
        raise InputError(
            f"model {source!r}: expected names and tensors in {file}, found {odd!r} besides; save its "
            "state_dict alone"
        )
    return dict(found)


def _float32(source: str, name: str, tensor: Tensor) -> Tensor:
    """One tensor in float32; InputError for whole, complex or quantised numbers, NaN or Inf."""
    if not tensor.is_floating_point() or tensor.is_quantized or tensor.dtype.itemsize == 1:
        raise InputError(
            f"model {source!r}: expected weights in float32, float16 or bfloat16, found {tensor.dtype} in "
            f"tensor {name!r}; merge the models before they are quantised, and save weights alone"
        )
    tensor = tensor.float()
    if bad := int((~torch.isfinite(tensor)).sum()):
        raise InputError(
            f"model {source!r}: expected finite weights, found {bad} NaN or Inf in tensor "
            f"{name!r}; fine-tune it again or take an earlier checkpoint"
        )
    return tensor
