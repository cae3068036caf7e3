"""The paper's own models and sets: Tables I to IV and Fig. 3 of Han et al. 2025 at their scale.

    python -m rmm_lab tables all --scale paper --sets-folder sets --device cuda

Four image sets (CIFAR-10, CIFAR-100, CUB-200, Stanford Dogs) on ViT-S/32 and ViT-B/16, seven language tasks
on T5-Small and T5-Base. Experts and multi-task models are fine-tuned once, as by ``rmm_lab finetune``, and
kept in ``--checkpoints``. The paper names no checkpoints and no settings of its fine-tuning: the bases and
settings below are ours.

A set is read from ``--sets-folder``, by the name of its format (``cifar10``, ``cub200``, ``qasc``, ...; see
``image_formats`` and ``text_formats``), or from the hub. All are looked for before anything is trained.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from rmm_lab.engine.scorer import check_device
from rmm_lab.errors import UNIT_RANGE, InputError, Range, check_values
from rmm_lab.families.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from rmm_lab.search.config import configure
from rmm_lab.search.problem import places_of
from rmm_lab.tasks import image_formats, text_formats
from rmm_lab.tasks.files import write_file
from rmm_lab.tasks.hold import check_apart, check_writable
from rmm_lab.tasks.image_task import HALVES
from rmm_lab.zoo import training
from rmm_lab.zoo.probe import linear_probe

# Pretrained on ImageNet-21k alone, since Stanford Dogs is a part of ImageNet-1k.
BASES = {
    "ViT-S/32": "hf-hub:timm/vit_small_patch32_224.augreg_in21k",
    "ViT-B/16": "hf-hub:timm/vit_base_patch16_224.augreg_in21k",
    "T5-Small": "hf-hub:google-t5/t5-small",
    "T5-Base": "hf-hub:google-t5/t5-base",
}
VITS, T5S = ("ViT-S/32", "ViT-B/16"), ("T5-Small", "T5-Base")
IMAGES = {"CIFAR10": "cifar10", "CIFAR100": "cifar100", "CUB": "cub200", "Dogs": "dogs"}
TEXTS = {
    "QA": ("qasc", "wikiqa", "quartz"),
    "Mixed": ("paws", "storycloze", "winogrande", "wsc"),
}
PAIR = ("cub200", "dogs")  # whole, on ViT-B/16: Tables II and IV
RECORD = "training.json"  # how a model was made, in its folder
SHARES = {"images": 0.1, "texts": 0.01}  # of the data, in Tables I to III


@dataclass(frozen=True)
class Group:
    """Experts to merge: ``name`` and ``size`` are columns, ``options`` those of ``configure``."""

    name: str
    size: str
    options: dict[str, Any]

    @property
    def places(self) -> tuple[str, ...]:
        """Where its sets are."""
        return self.options.get("images") or self.options["texts"]

    @property
    def reads(self) -> list[str]:
        """Where its models and sets are."""
        return places_of(configure(**self.options).problem)


@dataclass
class PaperScale:
    """What is trained, on what, and where it is kept."""

    sets_folder: Path | None = None
    """Folder with a folder for each set: cifar10, cifar100, cub200, dogs; qasc, wikiqa, quartz, ..."""
    bases: tuple[str, ...] = ()
    """NAME=SOURCE puts another base in place, such as ViT-S/32=FOLDER; also T5-Small, T5-Base, ViT-B/16."""
    checkpoints: Path = Path("checkpoints-paper")
    """Folder of the fine-tuned models: each is made once."""
    steps: int = 2000
    """Optimiser steps of a ViT's expert; of a multi-task model as many for each of its tasks."""
    learning_rate: float = 5e-5
    """Peak learning rate of the ViTs."""
    batch_size: int = 128
    """Pictures per step."""
    text_steps: int = 3000
    """Optimiser steps of a T5's expert; of a multi-task model as many for each of its tasks."""
    text_learning_rate: float = 3e-4
    """Peak learning rate of the T5s."""
    text_batch_size: int = 32
    """Texts per step."""
    metric: Literal["accuracy", "auto", "balanced"] = "accuracy"
    """Of language tasks; the paper's is accuracy, auto balances the answers of a skewed task (WikiQA)."""

    def __post_init__(self) -> None:
        self.checkpoints = self.checkpoints.expanduser()  # --checkpoints=~/x
        self.sets_folder = self.sets_folder and self.sets_folder.expanduser()

    # ------------------------------------------------------------------------------ what is merged

    def groups(self) -> dict[str, list[Group]]:
        """Each table's experts, as folders that ``prepare`` fills."""
        halves = [
            self._group(name, size, [f"{source}:{half}" for half in HALVES])
            for size in VITS
            for name, source in IMAGES.items()
        ]
        pair = [self._group("CUB+Dogs", "ViT-B/16", PAIR)]
        language = [self._group(n, size, sets) for size in T5S for n, sets in TEXTS.items()]
        return {"I": halves, "II": pair, "III": language, "IV": pair, "fig3": pair}

    def _sources(self) -> dict[str, str]:
        """The bases, with those of ``--bases`` in place."""
        sources = dict(BASES)
        for text in self.bases:
            name, _, source = text.partition("=")
            if name not in BASES or not source:
                raise InputError(
                    f"--bases: expected NAME=SOURCE with a name of {', '.join(BASES)}, found {text!r}; "
                    "correct it"
                )
            sources[name] = source
        return sources

    def places(self) -> list[str]:
        """What is read and not made here: the sets and the bases that were named."""
        own = [source for name, source in self._sources().items() if source != BASES[name]]
        return [*own, str(self.sets_folder)] if self.sets_folder else own

    def _group(self, name: str, size: str, sets: Sequence[str]) -> Group:
        kind = "texts" if size in T5S else "images"
        folder = self.checkpoints / size.replace("/", "-")
        names = [s.replace(":", "-") for s in sets]
        options: dict[str, Any] = {
            "base": self._sources()[size],
            "experts": tuple(str(folder / n) for n in names),
            kind: tuple(self._place(s) for s in sets),
            "multi_task": str(folder / "+".join(names)),
            "data_fraction": SHARES[kind],
        }
        return Group(name, size, options | ({"metric": self.metric} if kind == "texts" else {}))

    def _place(self, name: str) -> str:
        """Where a set is: ``cub200:first`` -> ``cub200:FOLDER/cub200:first``, or its data set on the hub."""
        name, colon, half = name.partition(":")
        known = image_formats.FORMATS | text_formats.FORMATS
        folder = self.sets_folder and self.sets_folder / name
        local = folder and (folder.is_dir() or known[name].hub is None)
        return f"{name}:{folder if local else 'hf-hub'}{colon}{half}"

    # ----------------------------------------------------------------------------- what is trained

    def prepare(self, groups: Sequence[Group], device: str, threads: int) -> None:
        """Look for all sets and bases, then fine-tune what is not in ``--checkpoints`` yet.

        Raises InputError for the first that is missing, with what to fetch and where to put it.
        """
        whole: Range = ("at least 1", lambda v: v >= 1)
        numbers = {"steps text_steps batch_size text_batch_size": whole}
        check_values(self, numbers | {"learning_rate text_learning_rate": UNIT_RANGE})
        check_apart(self.checkpoints, "--checkpoints", self.places())
        check_writable(self.checkpoints, "--checkpoints")
        if self.sets_folder is not None and not self.sets_folder.is_dir():
            raise InputError(
                f"--sets-folder: expected a folder, found none at {self.sets_folder}; name the one that "
                "holds the sets"
            )
        check_device(device)
        torch.set_num_threads(threads)
        for place in sorted({_whole(place) for group in groups for place in group.places}):
            self._look_for(place)
        for size, source in {g.size: g.options["base"] for g in groups}.items():
            try:
                read_checkpoint(source)  # not kept: some are large
            except InputError as error:
                raise InputError(f"{error} (--bases {size}=FOLDER takes it from there)") from error
        for group in groups:
            for folder, place in zip(group.options["experts"], group.places, strict=True):
                self._make(group, Path(folder), [place], device)
            self._make(group, Path(group.options["multi_task"]), group.places, device)

    def _look_for(self, place: str) -> None:
        name = place.partition(":")[0]
        try:
            (image_formats if name in image_formats.FORMATS else text_formats).load(place)
        except InputError as error:
            folder = self.sets_folder or Path("DIR")
            raise InputError(
                f"{error} (--sets-folder {folder} takes it from {folder / name})"
            ) from error

    def _make(self, group: Group, folder: Path, places: Sequence[str], device: str) -> None:
        """An expert, or the multi-task model of several sets, unless it is there."""
        base = read_checkpoint(group.options["base"])
        prefix = "text_" if base.family.DATA == "texts" else ""
        settings = {
            "steps": getattr(self, f"{prefix}steps") * len(places),
            "learning_rate": getattr(self, f"{prefix}learning_rate"),
            "batch_size": max(len(places), getattr(self, f"{prefix}batch_size")),
        }
        make_once(folder, base, places, settings, device=device, label=group.size)


def make_once(
    folder: Path,
    base: Checkpoint,
    places: Sequence[str],
    settings: dict[str, Any],
    *,
    device: str,
    label: str,
    option: str = "--checkpoints",
    probe: bool = False,
) -> None:
    """Fine-tune a base on some sets into a folder, unless it is there; InputError if it was made otherwise.

    settings: steps, learning_rate and batch_size. option: what names the folder. probe: whether the new head
    is fitted to the base's features first.
    """
    made = {"base": base.sha256, "sets": [_named(p) for p in places]} | settings
    made |= {"probe": True} if probe else {}
    record = folder / RECORD
    if is_made(folder):
        stored = json.loads(record.read_text("utf-8"))
        if odd := [k for k in made if stored.get(k) != made[k]]:
            raise InputError(
                f"{option}: expected {folder} to be made with {odd[0]} = {made[odd[0]]}, found "
                f"{stored.get(odd[0])}; remove that folder, or name another one for {option}"
            )
        return
    print(f"{time.strftime('%H:%M:%S')} fine-tuning {folder}", flush=True)
    start = time.perf_counter()
    tasks = base.family.make_tasks(base, places)
    label = f"{label} {'+'.join(task.name for task in tasks)}"
    more = settings | {"seed": 0, "label": label, "device": device}
    begin = linear_probe(base, tasks[0], device) if probe else None
    config, weights = training.fine_tune(base, tasks, begin=begin, **more)
    write_checkpoint(folder, config, weights, beside=base.folder)
    took = {"seconds": round(time.perf_counter() - start, 1)}
    write_file(record, json.dumps(made | took, indent=2) + "\n")


def is_made(folder: Path) -> bool:
    """Whether ``make_once`` made this folder: its record is written last."""
    return (folder / RECORD).is_file()


def _whole(place: str) -> str:
    """A place without the half of its classes."""
    head, _, half = place.rpartition(":")
    return head if half in HALVES else place


def _named(place: str) -> str:
    """A place without its folder: ``cub200:first``."""
    whole, half = _whole(place), place.rpartition(":")[2]
    name, colon, _ = whole.partition(":")
    return (name if colon else Path(whole).name) + (f":{half}" if half in HALVES else "")
