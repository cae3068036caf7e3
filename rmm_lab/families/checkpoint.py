"""Reading and writing checkpoints, and which family a checkpoint belongs to.

A *checkpoint* is a folder, on disk or on the hub: a timm ViT (timm's ``config.json`` and
``model.safetensors``) or a Hugging Face T5 (``config.json``, ``model.safetensors``, a tokenizer). What is
inside is the family's business. Weights are read from safetensors only, kept in float32 and never changed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from rmm_lab.errors import InputError, one_sentence
from rmm_lab.families import adapters, causal_lm, convert, reading, t5, vit
from rmm_lab.families.names import timm_name
from rmm_lab.families.parts import Factors, outside_head, shapes_of
from rmm_lab.families.protocol import Architecture, Family, Model
from rmm_lab.tasks.files import check_path, write_file

FAMILIES: dict[str, Family] = {"vit": vit, "t5": t5, "causal_lm": causal_lm}
# transformers' models that are read; timm's are known by their 'architecture'.
MODEL_TYPES = ("t5", "mt5", *convert.MODEL_TYPES, *causal_lm.LAYOUTS)
_PICKLES = list(reading.PICKLES)
# What a download takes besides the families' own files.
_FILES = (
    *("config.json", reading.WEIGHTS, reading.INDEX, reading.SHARDS),
    *(reading.ADAPTER, reading.ADAPTER_WEIGHTS),
)
_CONFIG = "with an 'architecture' (timm) or a 'model_type' (transformers)"


class Checkpoint(Model):
    """A model as data that knows its family."""

    @property
    def family(self) -> Family:
        """The module that knows this model: ``rmm_lab.families.vit``, say."""
        return family_of(self.source, self.config)


def family_of(source: str, config: Mapping[str, Any]) -> Family:
    """The module that knows a model with this config.json; InputError for another family's."""
    kind = config.get("model_type")
    for family in FAMILIES.values() if kind is None or isinstance(kind, str) else ():
        if family.owns(config):
            return family
    found = "neither" if kind is None else f"the model_type {kind!r}"
    raise InputError(
        f"model {source!r}: expected timm's config.json with an 'architecture' (a plain ViT) or "
        f"transformers' with the model_type {', '.join(map(repr, MODEL_TYPES))}, found {found}; others are "
        "not supported, such as Swin, BEiT, EVA, ResNets, umT5 or encoders of text"
    )


def architecture(config: Mapping[str, Any], unit: str = "block") -> Architecture:
    """What runs and rebuilds models with this config.json piece by piece."""
    return family_of("config.json", config).architecture(config, unit)


def resolve(source: str | Path, *, allow_pickle: bool = False) -> Path:
    """The local folder behind a source: a folder, ``local-dir:FOLDER`` or ``hf-hub:OWNER/NAME``.

    Hub models are downloaded once into the hub's own cache: config, weights and the family's files; pickles
    only where they are allowed and there is nothing else.
    """
    text = str(source)
    if text.startswith("hf-hub:"):
        return _from_hub(text, allow_pickle)
    check_path(text, "model")
    folder = Path(text.removeprefix("local-dir:")).expanduser()
    if not folder.is_dir():
        raise InputError(
            f"model {text!r}: expected a folder with config.json and model.safetensors, or "
            f"hf-hub:OWNER/NAME, but there is no folder {folder}; check the spelling"
        )
    if not (folder / "config.json").is_file() and not reading.is_adapter(folder):
        raise InputError(
            f"model {text!r}: expected config.json and model.safetensors in {folder}, found no "
            "config.json; save the model with timm's save_for_hf(..., safe_serialization=True) or "
            "transformers' save_pretrained"
        )
    return folder


def _from_hub(source: str, allow_pickle: bool) -> Path:
    repository, _, revision = source.removeprefix("hf-hub:").partition("@")
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "2")  # seconds: a closed network must answer fast
    from huggingface_hub import HfApi, snapshot_download

    files = [*_FILES, *(name for family in FAMILIES.values() for name in family.FILES)]
    which: dict[str, Any] = {"revision": revision or None}
    try:
        try:
            local = snapshot_download(
                repository, **which, allow_patterns=[*files, *_PICKLES], local_files_only=True
            )
            cached = _is_whole(folder := Path(local), allow_pickle)  # a part may be cached
        except OSError:
            cached = False
        if not cached:
            # One cheap question first: snapshot_download itself retries for minutes without a network.
            info = HfApi().model_info(repository, revision=which["revision"], timeout=2)
            names = [file.rfilename for file in getattr(info, "siblings", None) or ()]
            if allow_pickle and not any(name.endswith(".safetensors") for name in names):
                files += _PICKLES
            folder = Path(snapshot_download(repository, **which, allow_patterns=files))
    except Exception as error:  # whatever the network stack raises, the user needs one sentence
        raise InputError(
            f"model {source!r}: expected the hub or a copy in its cache, found neither "
            f"({type(error).__name__}); download config.json and model.safetensors of {repository} (and a "
            "T5's tokenizer) elsewhere, put them in a folder and name that folder instead"
        ) from error
    return resolve(folder)


def _is_whole(folder: Path, allow_pickle: bool) -> bool:
    """Whether config and weights are there, and the files that the model's family needs."""
    files, pickles = reading.weight_files(folder)
    if not files and not (allow_pickle and pickles):
        return False
    if reading.is_adapter(folder):
        return True
    try:
        if files and files[0].name == reading.INDEX:
            reading.shards(str(folder), files[0])
        config = reading.read_config(str(folder), folder / "config.json", _CONFIG)
    except InputError:
        return False
    try:
        needed = family_of(str(folder), config).NEEDED
    except InputError:
        return True  # whole, if of no use: ``read_checkpoint`` says why
    return not needed or any((folder / name).is_file() for name in needed)


def read_checkpoint(
    source: str | Path, *, base: Model | None = None, allow_pickle: bool = False
) -> Checkpoint:
    """Read a folder or hub model: config, weights in float32, and the SHA-256 of the weights' file.

    An adapter of peft's becomes a whole model.

    Args:
        source: what ``resolve`` takes.
        base: what an adapter is applied to; by default the model that its own config names.
        allow_pickle: whether weights that are only there as a pickle are read, by torch's restricted loader.

    Raises InputError for a missing or broken file, an unknown family, NaN or Inf.
    """
    text, folder = str(source), resolve(source, allow_pickle=allow_pickle)
    whole = folder
    if reading.is_adapter(folder):
        adapter = adapters.read_adapter_config(text, folder)
        whole = base.folder if base else _base_folder(text, adapter, allow_pickle)
    config = reading.read_config(text, whole / "config.json", _CONFIG)
    if config.get("model_type") == "mt5":
        config = t5.of_mt5(config)
    family = family_of(text, config)
    stored = reading.read_weights(text, whole, allow_pickle=allow_pickle)
    weights, sha256, pickled = stored.weights, stored.sha256, stored.pickled
    notes: tuple[str, ...] = ()
    factors: Factors | None = None
    rename = timm_name if convert.is_vision(config) else str
    weights = {rename(name): tensor for name, tensor in weights.items()}
    if whole != folder:
        own = reading.read_weights(text, folder, allow_pickle=allow_pickle)
        applied = adapters.apply_adapter(text, adapter, own.weights, weights, rename)
        weights, factors = applied.weights, family.factored(text, config, applied.factors)
        config = adapters.refit(config, weights, applied.replaced)
        sha256, pickled = own.sha256, own.pickled or pickled
        notes = (f"a LoRA adapter, applied to {base.source if base else whole}",)
    if convert.is_vision(config):

        def of_base() -> Mapping[str, Tensor]:
            where = base.folder if base else folder
            return reading.read_weights(text, where, allow_pickle=allow_pickle).weights

        config, weights, more = convert.to_timm(text, (folder, whole), config, weights, of_base)
        notes = (*notes, *more)
    weights = family.canonical(text, config, weights)
    _check_shapes(text, config, weights)
    factors = None if pickled else factors  # what is kept of a pickle is a whole model
    return Checkpoint(text, folder, config, weights, sha256, pickled, notes, factors=factors)


def _check_shapes(source: str, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """InputError unless a model of texts has the tensors that its config.json describes; ViTs are known."""
    if (family := family_of(source, config)) is vit:
        return
    try:
        found = family.architecture(config)  # without numbers
    except InputError as error:
        raise InputError(f"model {source!r}: {error}") from error
    except Exception as error:  # transformers raises many kinds where values do not go together
        raise InputError(
            f"model {source!r}: expected a config.json that transformers can build a model of, found another "
            f"({one_sentence(error) or type(error).__name__}); save the model with transformers again"
        ) from error
    there = shapes_of(weights)
    said = found.shapes | {n: s for n, s in found.optional.items() if n in there}
    odd = next((n for n in said | there if said.get(n) != there.get(n)), None)
    if odd is not None:
        raise InputError(
            f"model {source!r}: expected tensor {odd!r} of shape {said.get(odd, 'none')} by its config.json, "
            f"found {there.get(odd, 'none')}; save the model again"
        )


def _base_folder(source: str, adapter: Mapping[str, Any], allow_pickle: bool) -> Path:
    """The folder of the model that an adapter names as its base."""
    base = adapters.base_of_adapter(source, adapter)
    if base.startswith("hf-hub:") and not source.startswith("hf-hub:"):
        raise InputError(
            f"model {source!r}: expected its base, since no folder makes us ask a network, found its name on "
            f"the hub; name it: --base {base}"
        )
    folder = resolve(base, allow_pickle=allow_pickle)
    if reading.is_adapter(folder):
        raise InputError(
            f"model {source!r}: expected the base of an adapter to be a whole model, found an adapter in "
            f"{folder}; merge that one into its base first"
        )
    return folder


def keep_converted(model: Checkpoint, folder: Path) -> Checkpoint:
    """A model whose weights came from a pickle, written to a folder as safetensors; any other as it is.

    Its config.json says of which file it is made. What is there already is kept if it is the same to the
    byte, and written again if not: a path is built from these files.
    """
    if model.pickled is None:
        return model
    made = {"file": str(model.pickled), "sha256": model.sha256}
    config = model.config | {"rmm_lab": {**(model.config.get("rmm_lab") or {}), "converted": made}}
    files = _files(folder, config, model.weights, beside=model.folder)
    if not all(_holds(folder / name, content) for name, content in files.items()):
        _write(folder, files)
    sha256 = reading.digest([folder / reading.WEIGHTS])
    return replace(
        model, source=str(folder), folder=folder, config=config, sha256=sha256, pickled=None
    )


def _holds(file: Path, content: bytes) -> bool:
    return file.is_file() and file.read_bytes() == content


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
    _write(folder, _files(folder, config, weights, dtype, beside))


def _files(
    folder: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
    beside: Path | None = None,
) -> dict[str, bytes]:
    """The files of a checkpoint by name. The config comes last: with it, all is there."""
    # As text first: what JSON cannot hold must fail before any file is written.
    text = json.dumps(dict(config), indent=2, ensure_ascii=False) + "\n"
    # Clones, so that no two names share memory: safetensors refuses that, and a repeat is a copy.
    tensors = {k: v.detach().to("cpu", dtype, copy=True).contiguous() for k, v in weights.items()}
    # Not save_file: a full disk must show as OSError.
    files = {reading.WEIGHTS: save(tensors, metadata={"format": "pt"})}
    if beside is not None:
        kept = family_of(str(folder), config).FILES
        files |= {n: (beside / n).read_bytes() for n in kept if (beside / n).is_file()}
    return files | {"config.json": text.encode(errors="backslashreplace")}


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_file(folder / name, content)


def same_form(
    base: Checkpoint, experts: Sequence[Checkpoint]
) -> tuple[Checkpoint, list[Checkpoint]]:
    """Base and experts with tensors of the same shapes outside their heads; InputError if they cannot be.

    Where a difference can be bridged (the size of a ViT's images, say), a note of the model says how.
    """
    if all(expert.family is base.family for expert in experts):
        base, experts = base.family.one_form(base, experts)
    check_same_architecture(base, experts)
    return base, list(experts)


def check_same_architecture(base: Checkpoint, experts: Sequence[Checkpoint]) -> None:
    """Raise InputError, naming the first difference, unless experts equal the base up to the head."""
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
        elif (named := _difference(base, expert)) is not None:
            expected, found = f"{named[0]} as in base {base.source!r}", named[1]
        else:
            continue
        raise InputError(
            f"expert {expert.source!r}: expected {expected}, found {found}; merge only models "
            "fine-tuned from one base"
        )


def _difference(base: Checkpoint, expert: Checkpoint) -> tuple[str, str] | None:
    """What two models of equal shapes do not share, in the first module that differs, of each of them."""
    (kind, ours), (other, theirs) = (m.family.signature(m.config) for m in (base, expert))
    if kind != other:
        return f"the architecture {kind!r}", repr(other)
    odd = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
    if not odd:
        return None
    place = odd[0].rpartition(".")[0]
    names = {key: key.rpartition(".")[2] for key in odd if key.rpartition(".")[0] == place}
    one, two = (
        ", ".join(f"{name!r}: {own.get(key)!r}" for key, name in names.items())
        for own in (ours, theirs)
    )
    return (f"{one} in {place}" if place else one), two
