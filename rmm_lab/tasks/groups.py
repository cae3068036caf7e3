"""Pictures that belong together, such as the frames of one track: a drawn split must not tear them apart."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rmm_lab.errors import InputError
from rmm_lab.tasks import plain
from rmm_lab.tasks.files import absolute

GroupOf = Callable[[Any], str]  # a picture -> what it belongs to
# NAME_17.png, NAME-17.png: frame 17 of NAME.
_FRAME = re.compile(r"(.*[^_-])[_-]+\d+\.\w+")


def of_groups(groups: Sequence[str], sources: Sequence[str], data: str) -> dict[str, Any]:
    """``groups`` as an option of ``make_tasks``, which only images have; InputError for a wrong number."""
    if not any(groups):
        return {}
    if data != "images" or len(groups) not in (1, len(sources)):
        raise InputError(
            f"--groups: expected one for all image folders, or one for each of {len(sources)}, found "
            f"{len(groups)} for {data}; texts keep equal inputs together by themselves"
        )
    return {"groups": tuple(groups)}


def reader(groups: str, root: Path) -> GroupOf:
    """What gives each picture below ``root`` its group.

    Args:
        groups: a ``.csv`` file with the columns file and group, where a file is a path below ``root`` or a
            name alone; or a regular expression, searched in the path below ``root``: its first bracket, or
            all that it matches, is the group.
        root: the pictures' folder.

    Raises InputError for a broken file or expression, and for a picture without a group.
    """
    thing = f"--groups {groups!r}"
    table: dict[str, str] = {}
    if groups.lower().endswith(".csv"):
        table = _table(Path(groups).expanduser(), thing)
    else:
        try:
            pattern = re.compile(groups)
        except re.error as error:
            raise InputError(
                f"{thing}: expected a file that ends in .csv or a regular expression, found one that is "
                f"broken ({error}); correct it"
            ) from error

    def group_of(picture: Path) -> str:
        below = picture.relative_to(root).as_posix()
        if table:
            found = table.get(below) or table.get(picture.name)
        else:
            match = pattern.search(below)
            found = match and (match[1] if match.re.groups else match[0])
        if not found:
            raise InputError(
                f"{thing}: expected a group for each picture, found none for {below}; add it"
            )
        return found

    return group_of


def at_rest(groups: str) -> str:
    """The same in any working directory: a file by its whole path."""
    return absolute(groups, ()) if groups.lower().endswith(".csv") else groups


def _table(file: Path, thing: str) -> dict[str, str]:
    if not file.is_file():
        raise InputError(f"{thing}: expected a table of files and groups, found no {file}; name it")
    try:
        text = plain.read_bytes(file, plain.CONFIG_MB).decode("utf-8-sig")
        rows = list(csv.reader(text.splitlines()))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(
            f"{thing}: expected a table in UTF-8, found another file ({error}); save it as CSV"
        ) from error
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    if not {"file", "group"} <= set(header) or len(rows) < 2:
        raise InputError(
            f"{thing}: expected the columns file and group, and a row for each picture, found "
            f"{', '.join(header) or 'nothing'}; correct its first line"
        )
    at, to = header.index("file"), header.index("group")
    cells = [row for row in rows[1:] if len(row) > max(at, to)]
    return {row[at].strip().removeprefix("./"): row[to].strip() for row in cells}


def series(listing: Mapping[str, Sequence[tuple[Any, int]]]) -> tuple[int, str] | None:
    """How many series of frames pictures seem to be, by their names, and a name; None: no series.

    ``00003_00017.ppm`` is frame 17 of series 00003 of its class. Series hold at least three pictures each
    on average, and a class has several of them.
    """
    names: Counter[tuple[int, str]] = Counter()
    first, n = "", 0
    for picture, label in (pair for pairs in listing.values() for pair in pairs):
        n += 1
        match = _FRAME.fullmatch(picture.name) if isinstance(picture, Path) else None
        if match:
            first = first or picture.name
            names[label, match[1]] += 1
    classes = {label for label, _ in names}
    if not names or names.total() < n or len(names) < 2 * len(classes) or n < 3 * len(names):
        return None
    return len(names), first


def deal(
    piles: Sequence[Sequence[Any]],
    shares: Mapping[str, int],
    group_of: GroupOf,
    rng: np.random.Generator,
) -> list[dict[str, list[Any]]]:
    """Deal the pictures of each class into splits of the given proportions, groups as a whole.

    A group may occur in several classes. Groups are taken class by class in a random order; each goes to
    the split that this class lacks most pictures of.
    """
    owner: dict[str, str] = {}
    total = sum(shares.values())
    for pile in piles:
        sizes = Counter(map(group_of, pile))
        have = Counter({name: 0 for name in shares})
        for group, n in sizes.items():
            if group in owner:
                have[owner[group]] += n
        new = sorted(set(sizes) - set(owner))
        for group in (new[i] for i in rng.permutation(len(new))):
            lacks = {k: share * len(pile) / total - have[k] for k, share in shares.items()}
            empty = {k: v for k, v in lacks.items() if not have[k]}
            owner[group] = max(empty or lacks, key=lambda k: (empty or lacks)[k])
            have[owner[group]] += sizes[group]
    return [{k: [p for p in pile if owner[group_of(p)] == k] for k in shares} for pile in piles]
