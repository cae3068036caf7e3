"""Files as data: only regular ones are opened, of a bounded size, and JSON says one thing once.

What is raised here is a ValueError or an OSError; the caller says which model, picture or row it is of.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import stat
import unicodedata
from pathlib import Path
from typing import Any, NoReturn

CONFIG_MB = 64  # config.json and its like, an index, a tokenizer's settings
TEXT_MB = 2048  # a file of rows, unpacked
DEEPEST = 64  # lists and objects in each other
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def check_regular(file: Path) -> None:
    """OSError unless a file, or what a link leads to, is a regular one: a pipe or a device never ends."""
    mode = file.stat().st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_ISDIR: "folder", stat.S_ISFIFO: "pipe", stat.S_ISSOCK: "socket"}
        kind = next((name for is_kind, name in kinds.items() if is_kind(mode)), "device")
        raise OSError(f"a {kind}, no regular file")


def read_bytes(file: Path, most_mb: int) -> bytes:
    """A regular file of at most ``most_mb`` MiB; one that ends in ``.gz`` is unpacked."""
    check_regular(file)
    packed = file.suffix.lower() == ".gz"
    with gzip.open(file) if packed else open(file, "rb") as stream:
        content = bytes(stream.read(most_mb * 2**20 + 1))
    if len(content) > most_mb * 2**20:
        raise ValueError(f"more than {most_mb} MiB")
    return content


def read_json(file: Path, *, halves: bool = False) -> Any:
    """``parse_json`` of a regular file of at most ``CONFIG_MB``, in UTF-8."""
    return parse_json(read_bytes(file, CONFIG_MB).decode("utf-8-sig"), halves=halves)


def parse_json(text: str, *, halves: bool = False) -> Any:
    """JSON as data; ValueError for NaN or Infinity, a key twice, more than ``DEEPEST`` lists or objects in
    each other, and unless ``halves`` half a character (a lone surrogate), which a path may have that is no
    UTF-8."""
    try:
        found = json.loads(
            text, object_pairs_hook=_once, parse_constant=_refuse, parse_float=_finite
        )
        too_deep = _is_deeper(found, DEEPEST)
    except RecursionError:
        too_deep = True
    if too_deep:
        raise ValueError(f"more than {DEEPEST} lists or objects in each other")
    if not halves and _SURROGATE.search(text):
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise ValueError(f"half a character, {half}") from error
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)[:60]!r} twice")
    return out


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant}, which is no JSON")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {text[:20]}, which is too large")
    return value


def _is_deeper(found: Any, most: int) -> bool:
    """Whether lists and objects are nested more than ``most`` deep; level by level, without recursion."""
    level = [found]
    for _ in range(most):
        level = [v for v in level if isinstance(v, (dict, list))]
        level = [x for v in level for x in (v.values() if isinstance(v, dict) else v)]
    return any(isinstance(v, (dict, list)) for v in level)


def visible(name: str) -> str:
    """What a reader sees of a name: without characters that show nothing, blanks alike, accents composed."""
    if name.isascii() and name.isprintable():  # as nearly all are; this is six times faster
        return " ".join(name.split())
    shown = (c for c in name if c.isspace() or unicodedata.category(c) not in ("Cc", "Cf"))
    return " ".join(unicodedata.normalize("NFC", "".join(shown)).split())


def alike(names: Any) -> tuple[str, str] | None:
    """The first two of different names that look the same."""
    seen: dict[str, str] = {}
    for name in names:
        if (first := seen.setdefault(visible(name), name)) != name:
            return first, name
    return None
