"""Pictures in folders: listed by split and class, decoded as a model takes them."""

from __future__ import annotations

import functools
import io
import os
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmm_lab.errors import InputError
from rmm_lab.tasks import plain
from rmm_lab.tasks.files import SPLIT_SEED, SPLITS, draw, nearly
from rmm_lab.tasks.groups import GroupOf, deal
from rmm_lab.tasks.input_format import MODES, InputFormat

KEPT_MB = 1024  # a split that is larger when decoded is decoded batch by batch instead
Picture = Path | bytes  # a picture's file, or the file's content
Listing = dict[str, list[tuple[Picture, int]]]  # split -> its pictures with their class numbers
REWARD = ("reward", "val", "valid", "validation")  # names of the reward split's folder
# What a folder has of the splits -> the shares of what is drawn from it.
_DRAWN = {
    "all": {"train": 3, "reward": 1, "test": 1},
    "train": {"train": 4, "reward": 1},
}
_NO_PICTURES = {
    "BUFR",
    "GRIB",
    "HDF5",
    "MPEG",
    "EPS",
    "WMF",
    "IPTC",
}  # named, but not decoded by Pillow alone


# ---------------------------------------------------------------------------------------- decoding


class Pictures:
    """Pictures that are decoded when asked for, and not kept: ``pictures[rows]``, as of a tensor.

    A split of CIFAR-10 at 224 px is 6 GB as uint8 and 0.1 GB as PNGs. This keeps pictures encoded, or only
    the names of files, and decodes with as many threads as torch uses. A copy sent to another process
    takes the files' contents along.

    Args:
        pictures: n files or their contents.
        input_format: what the models take; pictures are resized, cropped and recoloured to it.

    Raises InputError for a picture that cannot be opened; one that is cut off raises it when decoded.
    """

    def __init__(self, pictures: Sequence[Picture], input_format: InputFormat) -> None:
        from PIL import Image

        self._pictures, self._format = list(pictures), input_format
        self.seen: Counter[str] = Counter()  # how many were changed in which way: see ``_ways``
        with (
            warnings.catch_warnings()
        ):  # what cannot be read is an error, and all else is of no use
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            for picture in self._pictures:
                with _opened(picture) as opened:  # reads the size and mode alone
                    self.seen.update(_ways(opened, input_format.shape[0]))

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, rows: int | slice | np.ndarray | Tensor) -> Tensor:
        """(n, C, H, W) uint8, or (C, H, W) for one row."""
        # What cannot be read is an error. For good, since filters of threads' own would mix.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        chosen = np.arange(len(self))[rows.numpy() if isinstance(rows, Tensor) else rows]
        if not np.ndim(chosen):
            return _decode(self._pictures[int(chosen)], self._format)
        # An array, since a tensor of inference mode could not be filled by threads without it.
        out = np.empty((len(chosen), *self._format.shape), np.uint8)
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            decoded = threads.map(lambda i: _decode(self._pictures[i], self._format), chosen)
            for i, picture in enumerate(decoded):
                out[i] = picture.numpy()
        return torch.from_numpy(out)

    def __getstate__(self) -> dict[str, Any]:
        pictures = [self.encoded(row) for row in range(len(self))]
        return {"_pictures": pictures, "_format": self._format, "seen": self.seen}

    def encoded(self, row: int) -> bytes:
        """The file of a picture."""
        picture = self._pictures[row]
        return picture.read_bytes() if isinstance(picture, Path) else picture

    def decoded(self) -> Tensor | Pictures:
        """All as uint8 (n, C, H, W) if that takes at most ``KEPT_MB``, else themselves."""
        size = len(self) * int(np.prod(self._format.shape))  # bytes
        return self if size > KEPT_MB * 2**20 else self[:]


def _decode(picture: Picture, fmt: InputFormat) -> Tensor:
    """One picture resized and cropped as timm does at evaluation, without normalising: (C, H, W)."""
    with _opened(picture) as opened:
        return _transform(fmt)(_upright(opened).convert(MODES[fmt.shape[0]]))


def _ways(opened: Any, channels: int) -> Iterator[str]:
    """What is done to a picture besides resizing, for notes."""
    if _turned(opened):
        yield "turned upright as their EXIF orientation says"
    if opened.mode.startswith("I"):
        yield "of 16 bits of grey, scaled to 8 bits"
    if channels != 4 and (opened.mode in ("LA", "PA", "RGBA") or "transparency" in opened.info):
        yield "with an alpha channel, which is dropped as timm does"


def _turned(opened: Any) -> bool:
    """Whether a camera says that the picture lies on its side; Pillow turns TIFF files by itself."""
    if "exif" not in opened.info or opened.format == "TIFF":
        return False
    try:
        return opened.getexif().get(0x0112, 1) in range(2, 9)
    except Exception:  # broken EXIF data: the pixels may be whole, and timm reads them
        return False


def _upright(opened: Any) -> Any:
    """A picture as it is meant to be seen, with 8 bits a channel."""
    from PIL import Image, ImageOps

    if opened.mode == "F":
        raise ValueError("32-bit numbers without a range")
    turned = _turned(opened)
    if opened.mode.startswith("I"):  # convert would clip all that is above 255
        deep = np.asarray(opened).astype(np.int64).clip(0, 65_535)  # (H, W)
        flat = Image.fromarray(((deep + 128) // 257).astype(np.uint8))
        flat.info = opened.info
        opened = flat
    return ImageOps.exif_transpose(opened) if turned else opened


@contextmanager
def _opened(picture: Picture) -> Iterator[Any]:
    from PIL import Image

    try:
        if isinstance(picture, Path):
            plain.check_regular(picture)
        file = picture if isinstance(picture, Path) else io.BytesIO(picture)
        with Image.open(file, formats=_formats()) as opened:
            yield opened
    except Exception as error:  # Pillow's readers stumble over broken files in many ways
        what = picture if isinstance(picture, Path) else f"one of {len(picture)} bytes"
        raise InputError(
            f"images: expected a readable picture, but {what} is broken ({error}); replace or remove it"
        ) from error


@functools.cache
def _transform(fmt: InputFormat) -> Any:
    from timm.data import create_transform

    return create_transform(
        fmt.shape,
        is_training=False,
        interpolation=fmt.interpolation,
        crop_pct=fmt.crop,
        crop_mode=fmt.crop_mode,
        normalize=False,
    )


# ----------------------------------------------------------------------------------------- listing


def natural(name: str) -> tuple[list[str | int], str]:
    """A key that sorts classes as timm's reader does: numbers by value, letters without their case."""
    parts = re.split("([0-9]+)", name.lower())  # texts and numbers in turn
    return [int(p) if i % 2 else p for i, p in enumerate(parts)], name


def composed(name: str) -> str:
    """A name with accents in one character, whichever way a file system wrote it (NFC)."""
    return unicodedata.normalize("NFC", name)


def list_folder(
    root: Path, expected: str = "a folder SPLIT/CLASS/image", group_of: GroupOf | None = None
) -> tuple[list[str], Listing]:
    """Class names and, for each split, its files with their class numbers; no picture is opened.

    Classes are in the order of timm's reader, see ``natural``. Pictures may lie in folders of a class's
    folder. Hidden files and ``__MACOSX`` are no pictures.

    Missing splits are drawn within each class with a fixed seed: of train and test alone, a fifth of train
    becomes reward; classes alone are split 60 : 20 : 20.

    Args:
        root: ``SPLIT/CLASS/picture`` with splits train, reward (or val) and test, or ``CLASS/picture``.
        expected: what an error says of a folder that is not there.
        group_of: pictures of a group stay in one of the splits that are drawn.
    """
    if not root.is_dir():
        raise InputError(
            f"images {str(root)!r}: expected {expected}, found no such folder; check the spelling"
        )
    found = _subfolders(root)
    if "Final_Training" in found:
        raise InputError(
            f"images {str(root)!r}: expected class folders, found Final_Training of GTSRB; give it as "
            f"gtsrb:{root}"
        )
    several = [name for name in found if name in REWARD]
    if len(several) > 1:
        raise InputError(
            f"images {str(root)!r}: expected one folder for the reward split, found several of "
            f"{', '.join(several)}; keep one of them"
        )
    parts = {"reward" if name in REWARD else name: path for name, path in found.items()}
    parts = {name: path for name, path in parts.items() if name in SPLITS}
    _check_names(root, found, parts)
    if "train" in parts and "test" not in parts and "reward" in parts:
        parts["test"] = parts.pop("reward")  # the held-out part is reported, not searched
    if parts and not {"train", "test"} <= set(parts):
        raise InputError(
            f"images {str(root)!r}: expected the splits train and test (reward is optional), found "
            f"{', '.join(sorted(found))}; add the missing one, or put the class folders right there "
            "(a class must not be called like a split)"
        )
    tree = {name: _list_classes(p) for name, p in (parts or {"all": root}).items()}
    classes = sorted(next(iter(tree.values())))  # splits are drawn in this order
    for name, listing in tree.items():
        if sorted(listing) != classes:
            odd = sorted(set(listing) ^ set(classes))
            raise InputError(
                f"images {str(root)!r}: expected the same classes in every split, found {odd[0]!r} "
                f"in one of {', '.join(tree)} only (see {name}); add or remove that folder"
            )
    piles = [{name: tree[name][c] for name in tree} for c in classes]
    drawn = split(piles, classes, f"images {str(root)!r}", group_of)
    order = sorted(classes, key=natural)
    number = [order.index(c) for c in classes]
    out: Listing = {}
    for s, rows in drawn.items():
        renumbered = [(picture, number[c]) for picture, c in rows]
        out[s] = sorted(renumbered, key=lambda row: row[1])
    return order, out


def left_out(root: Path, listing: Listing) -> str:
    """What a folder holds besides the pictures in use: how many files of which kind, or ""."""
    used = {picture for rows in listing.values() for picture, _ in rows}
    kinds = Counter(
        f"hidden {p.suffix}" if _hidden(p.relative_to(root)) else p.suffix.lower() or "no suffix"
        for p in _walk(root)
        if p not in used and (not _hidden(p.relative_to(root)) or p.suffix.lower() in suffixes())
    )
    return ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))


def split(
    piles: Sequence[Mapping[str, Sequence[Picture]]],
    names: Sequence[str],
    thing: str,
    group_of: GroupOf | None = None,
) -> Listing:
    """Three splits of the pictures of each class, class by class.

    Args:
        piles: for each class its pictures, of train, reward and test; of train and test, and a fifth of
            train is drawn for reward; or of ``all``, which is split 60 : 20 : 20.
        names: the classes' names; thing: what an error speaks of.
        group_of: what a picture belongs to; what is drawn keeps groups together, over all classes.
    """
    rng = np.random.default_rng(SPLIT_SEED)
    listing: Listing = {name: [] for name in SPLITS}
    if group_of is not None:
        piles = _dealt(piles, names, thing, group_of, rng)
    for label, (pile, name) in enumerate(zip(piles, names, strict=True)):
        parts = dict(pile)
        for key, shares in _DRAWN.items():
            if key not in parts or "reward" in parts:
                continue
            pictures = parts.pop(key)
            if len(pictures) < len(shares):
                first = next(iter(pictures), None)
                folder = f" in {first.parent}" if isinstance(first, Path) else ""
                raise InputError(
                    f"{thing}, class {name!r}: expected at least {len(shares)} pictures{folder} to make "
                    f"the splits {', '.join(shares)}, found {len(pictures)}; add pictures or provide "
                    "the splits"
                )
            rows = draw(len(pictures), shares, rng)
            parts |= {s: [pictures[i] for i in numbers] for s, numbers in rows.items()}
        for s in SPLITS:
            listing[s] += [(picture, label) for picture in parts[s]]
    return listing


def _dealt(
    piles: Sequence[Mapping[str, Sequence[Picture]]],
    names: Sequence[str],
    thing: str,
    group_of: GroupOf,
    rng: np.random.Generator,
) -> list[dict[str, Sequence[Picture]]]:
    """``piles`` with the splits that they lack, drawn by groups."""
    out: list[dict[str, Sequence[Picture]]] = [dict(pile) for pile in piles]
    for key, shares in _DRAWN.items():
        if key not in piles[0] or "reward" in piles[0]:
            continue
        drawn = deal([pile[key] for pile in piles], shares, group_of, rng)
        for pile, parts, name in zip(out, drawn, names, strict=True):
            del pile[key]
            pile |= parts
            if empty := [s for s in shares if not parts[s]]:
                raise InputError(
                    f"{thing}, class {name!r}: expected at least {len(shares)} groups of pictures to make "
                    f"the splits {', '.join(shares)}, found none for {empty[0]}; add pictures or provide "
                    "the splits"
                )
    return out


def _subfolders(folder: Path) -> dict[str, Path]:
    """Folders by their composed names, without hidden ones and what macOS leaves in archives."""
    found: dict[str, Path] = {}
    for path in sorted(p for p in folder.iterdir() if p.is_dir() and not _hidden(Path(p.name))):
        if (name := composed(path.name)) in found:
            raise InputError(
                f"images: expected different names in {folder}, found {name!r} twice, with composed and "
                "with combining accents; put them together"
            )
        found[name] = path
    if (pair := plain.alike(found)) is not None:
        raise InputError(
            f"images: expected names that look different in {folder}, found {pair[0]!r} and {pair[1]!r}; "
            "rename one, or put them together"
        )
    return found


def _check_names(root: Path, found: Mapping[str, Path], parts: Collection[str]) -> None:
    """InputError for a folder that is nearly called like a split, such as ``tets``, and laid out like one.

    Beside a split any folder is; where there is none, one whose folders another one has, too.
    """
    for name, path in found.items():
        meant = "" if name in parts else nearly(name, (*SPLITS, *REWARD))
        if not meant or name in REWARD:
            continue
        inside, rest = set(_subfolders(path)), [p for n, p in found.items() if n != name]
        if inside and any(parts or len(inside & set(_subfolders(p))) > 1 for p in rest):
            raise InputError(
                f"images {str(root)!r}: expected the splits {', '.join(SPLITS)}, found {name!r}, which is "
                f"nearly {meant!r}; rename it"
            )


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


@functools.cache
def _formats() -> tuple[str, ...]:
    """All kinds of pictures that Pillow reads by itself, whatever a file is called."""
    from PIL import Image

    Image.init()
    return tuple(sorted(set(Image.OPEN) - _NO_PICTURES))


@functools.cache
def suffixes() -> frozenset[str]:
    """Of these kinds, in lower case, with their dot."""
    from PIL import Image

    known = Image.registered_extensions()
    return frozenset(s for s, f in known.items() if f in _formats())


def _walk(folder: Path) -> Iterable[Path]:
    """All files in a folder and below it, each place once, wherever links lead."""
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else sorted(folders)
        if real not in seen:
            yield from (Path(place, f) for f in files)
            if not files and not folders and Path(place).suffix.lower() in suffixes():
                yield Path(place)  # an empty folder in a picture's place: it cannot be read
        seen.add(real)


def _list_classes(folder: Path) -> dict[str, list[Path]]:
    listing = {}
    for name, path in _subfolders(folder).items():
        below = (p for p in _walk(path) if p.suffix.lower() in suffixes())
        files = sorted(p for p in below if not _hidden(p.relative_to(path)))
        if not files:
            raise InputError(
                f"images: expected pictures that Pillow reads (.png, .jpg, .tif, ...) in class folder "
                f"{path}, found none; fill it or remove it"
            )
        listing[name] = files
    if len(listing) < 2:
        raise InputError(
            f"images: expected at least two class folders in {folder}, found {len(listing)}; "
            "lay the pictures out as CLASS/image"
        )
    return listing
