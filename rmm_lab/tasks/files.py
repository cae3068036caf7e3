"""What all tasks share: the data folder, names of sources, the three splits, and writing a file."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from rmm_lab.errors import InputError

SPLITS = ("train", "reward", "test")  # to fine-tune, to search, to report once
SPLIT_SEED = 0  # fixed, so that fine-tuning and search agree on the splits that we draw


def data_folder() -> Path:
    """The folder ``data/`` of the repository, or the one that RMM_LAB_DATA names."""
    folder = Path(os.environ.get("RMM_LAB_DATA") or Path(__file__).resolve().parents[2] / "data")
    if not folder.is_dir():
        raise InputError(
            f"expected the data that ships in {folder}, found no such folder; clone the repository "
            "and install it with pip install -e, or set RMM_LAB_DATA to its data folder"
        )
    return folder


def format_of(source: str, formats: Collection[str], thing: str) -> str:
    """FORMAT of a source ``FORMAT:...``, or "" for any other source; InputError for an unknown format.

    thing: what the message speaks of.
    """
    name, colon, _ = source.partition(":")
    if colon and name in formats:
        return name
    # A letter alone is a Windows drive.
    if colon and re.fullmatch(r"[A-Za-z][\w-]+", name) and not Path(source).expanduser().exists():
        raise InputError(
            f"{thing}: expected one of the formats {', '.join(formats)}, or a folder, found {name!r}; "
            "check the spelling"
        )
    return ""


def absolute(source: str, known: Collection[str]) -> str:
    """A source that means the same in any working directory: the folder or file in it by its whole path.

    known: sources that are no folders, whatever there is beside them.
    """
    if source in known:
        return source
    head, _, rest = source.partition(":")
    for before, place in (("", source), (f"{head}:", rest)):  # FORMAT:FOLDER
        for folder in (place, place.rpartition(":")[0]):  # FOLDER:first
            if folder and Path(folder).expanduser().exists():
                return before + str(Path(folder).expanduser().resolve()) + place[len(folder) :]
    return source


def content(folder: Path) -> str:
    """The first names in a folder, for messages."""
    names = sorted(p.name for p in folder.iterdir())
    return (", ".join(names[:5]) or "nothing") + (", ..." if len(names) > 5 else "")


def draw(n: int, shares: Mapping[str, int], rng: np.random.Generator) -> dict[str, list[int]]:
    """Deal the numbers 0 to n - 1 at random into splits of the given proportions, each sorted.

    Every split gets at least one number; train takes what rounding leaves. n: at least ``len(shares)``.
    """
    counts = {k: max(1, n * share // sum(shares.values())) for k, share in shares.items()}
    counts["train"] = n - sum(count for k, count in counts.items() if k != "train")
    parts = np.split(rng.permutation(n), np.cumsum(list(counts.values()))[:-1])
    return {name: sorted(part.tolist()) for name, part in zip(counts, parts, strict=True)}


def write_file(file: Path, content: str | bytes) -> None:
    """Write to a temporary name, then rename: a reader sees the old file or the new one."""
    scratch = file.with_name(f".{file.name}.tmp")
    try:
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)
        scratch.replace(file)
    finally:
        scratch.unlink(missing_ok=True)
