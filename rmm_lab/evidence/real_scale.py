"""Real pretrained models: which sets and experts ``tables real`` takes, and how it makes them.

A base that others trained, pictures and texts that others took and wrote. Experts are fine-tuned from the
base once, and kept: a command that was stopped goes on with what is there.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rmm_lab.errors import InputError
from rmm_lab.evidence.paper_scale import Group, is_made, make_once
from rmm_lab.families.checkpoint import Checkpoint, read_checkpoint
from rmm_lab.families.resolution import resampled
from rmm_lab.tasks import text_formats
from rmm_lab.tasks.files import SPLITS, content, write_file
from rmm_lab.tasks.groups import deal, series
from rmm_lab.tasks.image_folder import list_folder
from rmm_lab.tasks.image_task import HALVES

SETS = {"cifar10": "CIFAR10", "gtsrb": "GTSRB", "flowers": "flowers", "mnist": "MNIST"}
TEXTS = ("winogrande", "wsc", "qasc")
PAIR, HALVED = ("cifar10", "gtsrb"), ("cifar10", "gtsrb")
STRANGER = "mnist"  # has nothing to do with the pair
UNSEEN = ("flowers", "mnist")  # sets that no expert of the pair saw
MOST_TEXTS = {"train": 2000, "reward": 40, "test": 150}  # rows of each task, drawn at random
SEED = 0  # of the splits that are drawn


@dataclass(frozen=True)
class Training:
    """How experts are fine-tuned: optimiser steps, peak learning rate, examples per step."""

    steps: int
    learning_rate: float
    batch_size: int

    def __str__(self) -> str:
        return f"{self.steps} steps of {self.batch_size} at {self.learning_rate:g}"


@dataclass
class Works:
    """What is made beside the tables, once: sets with three splits, and experts.

    Args:
        folder: where. data: the folder of the sets as they came. base, training: of the experts.
        reward: pictures of a new reward split. device: where experts are trained, such as cuda.
    """

    folder: Path
    data: Path
    base: Checkpoint
    training: Training
    reward: int
    device: str

    def image_set(self, name: str) -> str:
        """A set as SPLIT/CLASS/picture, made once."""
        return str(split_images(_find(self.data, name), self.folder / "sets" / name, self.reward))

    def text_set(self, name: str) -> str:
        """A set as SPLIT.jsonl, made once."""
        return str(split_texts(name, _find(self.data, name), self.folder / "sets" / name))

    def expert(self, place: str, training: Training | None = None) -> str:
        """A set's or half's expert, fine-tuned once; head first. Others' training has a folder of its own."""
        folder, how = self._folder(place, training), vars(training or self.training)
        more = {"device": self.device, "label": self.base.source, "option": "--work"}
        probe = self.base.family.DATA == "images"
        make_once(folder, self.base, [place], dict(how), **more, probe=probe)
        return str(folder)

    def make_expert(self, wanted: tuple[str, Training | None]) -> str:
        """The same of a pair (place, training), for a process of its own."""
        return self.expert(*wanted)

    def has_expert(self, place: str, training: Training | None = None) -> bool:
        """Whether that expert is there as a whole."""
        return is_made(self._folder(place, training))

    def _folder(self, place: str, training: Training | None) -> Path:
        kind = str(training).replace(" ", "-") if training else "experts"
        return self.folder / kind / Path(place).name.replace(":", "-")

    def place(self, name: str) -> str:
        """Where a set is, or a half of one: ``cifar10:first``."""
        whole, colon, half = name.partition(":")
        return f"{self.image_set(whole)}{colon}{half}"

    def group(self, names: Sequence[str]) -> Group:
        """Experts of whole sets, or of the halves of one."""
        whole = list(dict.fromkeys(SETS[name.partition(":")[0]] for name in names))
        size = str(self.base.config.get("architecture", "")).removesuffix("_dinov2")
        return Group("+".join(whole), size, self.options(list(map(self.place, names))))

    def options(self, places: Sequence[str], training: Training | None = None) -> dict[str, Any]:
        """The options of ``configure`` for experts of these sets."""
        experts = tuple(self.expert(place, training) for place in places)
        return {"base": self.base.source, "experts": experts, self.base.family.DATA: tuple(places)}


def read_base(source: str, kind: str, option: str, size: int = 0) -> Checkpoint:
    """A base of a kind of data, images or texts; a ViT for pictures of ``size`` pixels."""
    try:
        base = read_checkpoint(source)
    except InputError as error:
        raise InputError(f"{option}: {error}") from error
    if kind != base.family.DATA:
        raise InputError(
            f"{option}: expected a model of {kind}, found {base.family.NAME} in {source!r}; name another one"
        )
    return resampled(base, (size, size)) if size else base


def wanted(part: str) -> tuple[str, ...]:
    """The sets and halves whose experts a part needs."""
    if part == "I":
        return tuple(f"{name}:{half}" for name in HALVED for half in HALVES)
    own = {"groups": SETS, "subsets": SETS, "stranger": (*PAIR, STRANGER), "texts": TEXTS}
    return tuple(own.get(part, PAIR))


def vision_groups(works: Works, part: str) -> list[Group]:
    """A table's groups of image experts, which are made where they are not there yet."""
    if part == "I":
        return [works.group([f"{name}:{half}" for half in HALVES]) for name in HALVED]
    return [works.group(wanted(part))]


def subsets(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """All sets of 2 to N of some names."""
    for n in range(2, len(names) + 1):
        yield from itertools.combinations(names, n)


# ------------------------------------------------------------------------------------------ the sets


def check_sets(data: Path | None, names: Sequence[str]) -> Path:
    """The folder of the sets; InputError with what is missing, before anything is made."""
    if data is None or not data.is_dir():
        raise InputError(
            f"--data: expected a folder with the sets {', '.join(names)}, found "
            f"{'none' if data is None else f'no {data}'}; see docs/data-formats.md for their layout"
        )
    for name in names:
        _find(data, name)
    return data


def _find(data: Path, name: str) -> Path:
    """A set's folder: called after it, or after it and more, such as cifar10_jpg or flowers5."""
    number = "" if name[-1].isdigit() else r"\d*"  # cifar100 is another set
    fits = re.compile(rf"{name}{number}([_-].*)?", re.IGNORECASE)
    found = [p for p in sorted(data.iterdir()) if p.is_dir() and fits.fullmatch(p.name)]
    if len(found) == 1:
        return found[0]
    layout = "SPLIT.jsonl" if name in TEXTS else "train/CLASS/picture and test/CLASS/picture"
    there = " and ".join(p.name for p in found) or f"none among {content(data)}"
    raise InputError(
        f"--data: expected one folder {name} in {data} with {layout}, found {there}; put it there, or leave "
        "out the parts that need it with --parts"
    )


def split_images(source: Path, folder: Path, reward: int) -> Path:
    """A copy of an image folder with three splits, made once.

    Without a reward split, about ``reward`` pictures become one: drawn from train at random within each
    class, frames of a track together, never from test. A class keeps at least one track in train.
    """
    made = {"from": source.name, "reward": reward, "seed": SEED}
    if _is_made(folder, made):
        return folder
    parts = {p.name for p in source.iterdir() if p.is_dir()}
    if not {"train", "test"} <= parts:
        raise InputError(
            f"--data: expected {source} to hold train and test (reward is optional), found "
            f"{content(source)}; lay its pictures out as SPLIT/CLASS/picture"
        )
    classes, listing = list_folder(source)
    if not parts & {"reward", "val", "valid", "validation"}:
        listing["train"], listing["reward"] = _drawn(
            listing["train"] + listing["reward"], len(classes), reward
        )
    with _new(folder, made) as scratch:
        for split in SPLITS:
            for picture, c in listing[split]:
                at = scratch / split / classes[c]
                at.mkdir(parents=True, exist_ok=True)
                name = "-".join(Path(str(picture)).relative_to(source).parts[2:])
                shutil.copyfile(picture, at / name)
    return folder


def _drawn(rows: Sequence[tuple[Any, int]], classes: int, wanted: int) -> tuple[list, list]:
    """Pictures with their classes as train and reward."""
    frames = series({"train": rows}) is not None

    def track(picture: Any) -> str:
        return picture.name.rpartition("_")[0] if frames else picture.name

    piles = [sorted(p for p, c in rows if c == label) for label in range(classes)]
    share = max(1, wanted * 1000 // max(1, len(rows)))
    shares = {"train": max(1, 1000 - share), "reward": min(999, share)}
    train, chosen = [], []
    for label, pile in enumerate(piles):
        if len({track(p) for p in pile}) < 2:
            raise InputError(
                f"--data: expected at least 2 pictures or tracks of each class in train, found 1 of class "
                f"{label} ({pile[0].parent}); add one, or provide a reward split"
            )
        [dealt] = deal([pile], shares, track, np.random.default_rng((SEED, label)))
        train += [(p, label) for p in dealt["train"]]
        chosen += [(p, label) for p in dealt["reward"]]
    return train, chosen


def split_texts(name: str, source: Path, folder: Path) -> Path:
    """The rows of an official set, or of a folder of rows, with three splits of bounded size, made once."""
    made = {"from": source.name, "seed": SEED} | MOST_TEXTS
    if _is_made(folder, made):
        return folder
    own = all((source / f"{split}.jsonl").is_file() for split in SPLITS)
    try:
        rows = text_formats.load(str(source) if own else f"{name}:{source}")
    except InputError as error:
        if list(source.glob("*.jsonl")) == [
            source / "dev.jsonl"
        ]:  # one labelled file stands for all
            rows = text_formats.load(f"{name}:{source / 'dev.jsonl'}")
        else:
            raise InputError(f"--data: {error}") from error
    with _new(folder, made) as scratch:
        for split in SPLITS:
            keep = np.random.default_rng((SEED, len(split))).permutation(len(rows[split]))
            kept = [rows[split][i] for i in sorted(keep[: MOST_TEXTS[split]])]
            text = "".join(json.dumps(row) + "\n" for row in kept)
            write_file(scratch / f"{split}.jsonl", text)
    return folder


def _is_made(folder: Path, made: Mapping[str, Any]) -> bool:
    record = folder.with_suffix(".json")
    if not record.is_file():
        return False
    if (stored := json.loads(record.read_text("utf-8"))) != made:
        raise InputError(
            f"--work: expected {folder} to be made as {dict(made)}, found {stored}; remove it, or name "
            "another folder"
        )
    return True


@contextmanager
def _new(folder: Path, made: Mapping[str, Any]) -> Iterator[Path]:
    """A folder that is there as a whole or not at all: a scratch folder, renamed at the end."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".new-"))
    try:
        yield scratch
        shutil.rmtree(folder, ignore_errors=True)  # of a command that was stopped right here
        scratch.rename(folder)
        write_file(folder.with_suffix(".json"), json.dumps(dict(made)) + "\n")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
