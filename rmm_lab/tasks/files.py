"""What all tasks share: the data folder, names of sources, the three splits, and writing a file."""

from __future__ import annotations

import csv
import difflib
import errno
import io
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from rmm_lab.errors import InputError

SPLITS = ("train", "reward", "test")  # to fine-tune, to search, to report once
SHIPPED = "shipped:"  # before the name of what ships, where a folder has the same name
SPLIT_SEED = 0  # fixed, so that fine-tuning and search agree on the splits that we draw


def data_folder() -> Path:
    """The folder ``data/`` of the repository, or the one that RMM_LAB_DATA names."""
    folder = Path(os.environ.get("RMM_LAB_DATA") or Path(__file__).resolve().parents[2] / "data")
    folder = folder.expanduser()
    if not folder.is_dir():
        raise InputError(
            f"expected the data that ships in {folder}, found no such folder; clone the repository "
            "and install it with pip install -e, or set RMM_LAB_DATA to its data folder"
        )
    return folder


def format_of(
    source: str,
    formats: Collection[str],
    thing: str,
    halves: Sequence[str] = (),
    ships: Collection[str] = (),
) -> str:
    """FORMAT of a source ``FORMAT:PLACE``, or "" for any other source; InputError for an unknown format.

    Nor may anything stand behind a place that is there, or a name of ``ships``: one of ``halves`` is gone
    already. thing: what the message speaks of.
    """
    name, colon, place = source.partition(":")
    is_known = bool(colon) and name in formats
    place = place if is_known else source
    for end in (m.start() for m in re.finditer(":", place) if m.start() and not _there(place)):
        if place[:end] in ships or _there(place[:end]):
            half = f"{' or '.join(f':{h}' for h in halves)}, a half of its classes, or "
            expected = f"{half if halves else ''}nothing behind {place[:end]!r}"
            remedy = "correct it" if halves else "leave it out"
            raise InputError(f"{thing}: expected {expected}, found {place[end:]!r}; {remedy}")
    # A letter alone is a Windows drive.
    if not is_known and colon and re.fullmatch(r"[A-Za-z][\w-]+", name) and not _there(source):
        raise InputError(
            f"{thing}: expected a folder, or FORMAT:FOLDER or FORMAT:hf-hub with one of the formats "
            f"{', '.join(formats)}, found {name!r}; check the spelling"
        )
    return name if is_known else ""


def _there(place: str) -> bool:
    """Whether a file or folder is there; ``~`` of nobody is nowhere."""
    return os.path.exists(os.path.expanduser(place))


def check_path(place: str, thing: str) -> None:
    """Raise InputError for a text that is no file's name on any disk: it is too long, or has a NUL."""
    try:
        os.stat(place)
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) or error.errno == errno.ENAMETOOLONG:
            short = place if len(place) <= 60 else f"{place[:57]}..."
            why = getattr(error, "strerror", "") or error
            raise InputError(
                f"{thing}: expected the name of a file or folder, found {short!r} ({why}); correct it"
            ) from error


def shipped_name(source: str, known: Collection[str]) -> str:
    """Which of the ``known`` names of what ships a source means, or "" for anything else.

    ``shipped:NAME`` always means what ships. A bare NAME does, unless the working directory has a folder
    of that name, which then wins. Raises InputError for ``shipped:`` and an unknown name.
    """
    check_path(source, "a model or data")
    name = source.removeprefix(SHIPPED)
    if name == source:
        return name if name in known and not _in_the_way(name) else ""
    if name not in known:
        raise InputError(
            f"{source!r}: expected a name that ships ({', '.join(known)}), found {name!r}; correct it"
        )
    return name


def spelled(name: str) -> str:
    """How to spell the name of something that ships: ``shipped:NAME`` where a folder is called NAME."""
    return SHIPPED + name if _in_the_way(name) else name


def _in_the_way(name: str) -> bool:
    return Path(name).is_dir() or Path(name.partition(":")[0]).is_dir()  # NAME:first


def nearly(name: str, known: Sequence[str]) -> str:
    """Which of the known names a misspelled one means, such as ``tets`` or ``Train``; "" for none of them."""
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.75)
    return near[0] if near else ""


@contextmanager
def or_shipped(source: str, known: Collection[str]) -> Iterator[None]:
    """Where a folder that took the place of something that ships is refused, say how to name the latter."""
    try:
        yield
    except InputError as error:
        if source not in known:
            raise
        raise InputError(f"{error}; what ships under this name is {SHIPPED}{source}") from error


def absolute(source: str, known: Collection[str]) -> str:
    """A source for a file that outlives the working directory: a bare NAME is always what ships.

    A folder or file is named by its whole path; ``known``: what ships. ``recalled`` is the inverse.
    """
    if name := shipped_name(source, known):
        return name
    if not (parts := place_in(source)):
        return source
    before, place, after = parts
    return before + os.path.abspath(Path(place).expanduser()) + after  # links keep their names


def place_in(source: str) -> tuple[str, str, str] | None:
    """A source as what is before, the file or folder in it, what is after; None if there is no such place."""
    head, _, rest = source.partition(":")
    for before, place in (("", source), (f"{head}:", rest)):  # FORMAT:FOLDER
        for folder in (place, place.rpartition(":")[0]):  # FOLDER:first
            if head != "hf-hub" and folder and _there(folder):
                return before, folder, place[len(folder) :]
    return None


def recalled(source: str, known: Collection[str]) -> str:
    """A source as ``absolute`` wrote it, as it is spelled in this working directory."""
    return spelled(source) if source in known else source


# Control characters (of a terminal too), line and paragraph separators, changes of direction, and bytes of
# a file's name that are no UTF-8.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def check_names(tasks: Sequence[Any], more: Iterable[str] = ()) -> None:
    """Raise InputError for a name of a task, a class or something else that no table or terminal can hold."""
    classes = (name for task in tasks for name in getattr(task, "classes", ()))
    for name in (*more, *(task.name for task in tasks), *classes):
        if odd := _UNSAFE.search(str(name)):
            raise InputError(
                f"name {name!r}: expected letters that tables and terminals show, found {odd[0]!r}; rename "
                "the folder or class"
            )


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


def split_lists(tasks: Sequence[Any]) -> str:
    """The files of all splits as CSV, task,split,class,file; "" where the tasks have no files."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for task in tasks:
        for split in SPLITS if hasattr(task, "files") else ():
            writer.writerows(
                [task.name, split, c, file.absolute()] for file, c in task.files(split)
            )
    return f"task,split,class,file\n{text.getvalue()}" if text.getvalue() else ""


def write_file(file: Path, content: str | bytes) -> None:
    """Write to a temporary name, then rename: a reader sees the old file or the new one.

    Raises OSError with the file's name, also where the disk is full.
    """
    scratch = file.with_name(f".{file.name}.tmp")
    try:
        # What is no UTF-8 in a file's name becomes an escape, which JSON reads.
        raw = content.encode(errors="backslashreplace") if isinstance(content, str) else content
        scratch.unlink(missing_ok=True)  # or what a link there leads to would be written over
        scratch.write_bytes(raw)
        scratch.replace(file)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error
    finally:
        with suppress(OSError):  # it is a folder
            scratch.unlink(missing_ok=True)
