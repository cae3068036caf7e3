"""Pictures in folders: listed by split and class, decoded as a model takes them."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmm_lab.errors import InputError
from rmm_lab.tasks.files import SPLIT_SEED, SPLITS, draw

KEPT_MB = 1024  # a split that is larger when decoded is decoded batch by batch instead
Picture = Path | bytes  # a picture's file, or the file's content
Listing = dict[str, list[tuple[Picture, int]]]  # split -> its pictures with their class numbers
_REWARD = ("reward", "val", "valid", "validation")  # names of the reward split's folder
_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}


@dataclass(frozen=True)
class InputFormat:
    """What a model takes, as timm's ``pretrained_cfg`` says: shape (C, H, W), mean and std."""

    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop: float = 1.0  # share of the resized image that the centre crop keeps
    crop_mode: str = "center"  # timm's name of the crop

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> InputFormat:
        """From a timm config.json; ``model_args`` win over ``pretrained_cfg`` where both speak."""
        cfg, args = dict(config.get("pretrained_cfg") or {}), config.get("model_args") or {}
        c, h, w = cfg.get("input_size") or (3, 224, 224)
        size = args.get("img_size", (h, w))
        h, w = (size, size) if isinstance(size, int) else size
        c = args.get("in_chans", c)
        mean, std = (tuple(cfg.get(key) or (0.5,) * c) for key in ("mean", "std"))
        # One mean for a grey model made from a colour one, as timm does.
        mean, std = (v if len(v) == c else (sum(v) / len(v),) * c for v in (mean, std))
        return cls(
            (c, h, w),
            mean,
            std,
            cfg.get("interpolation") or "bicubic",
            cfg.get("crop_pct") or 1.0,
            cfg.get("crop_mode") or "center",
        )

    def normalise(self, images: Tensor) -> Tensor:
        """(n, C, H, W) uint8 -> float32, (x / 255 - mean) / std per channel."""
        mean = torch.tensor(self.mean).view(-1, 1, 1)  # (C, 1, 1)
        std = torch.tensor(self.std).view(-1, 1, 1)  # (C, 1, 1)
        return (images.float() / 255 - mean) / std


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
        self._pictures, self._format = list(pictures), input_format
        for picture in self._pictures:
            with _opened(picture):  # reads the size and mode alone
                pass

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, rows: int | slice | np.ndarray | Tensor) -> Tensor:
        """(n, C, H, W) uint8, or (C, H, W) for one row."""
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
        pictures = [p.read_bytes() if isinstance(p, Path) else p for p in self._pictures]
        return {"_pictures": pictures, "_format": self._format}


def read(pictures: Sequence[Picture], input_format: InputFormat) -> Tensor | Pictures:
    """n pictures as uint8 (n, C, H, W): decoded now up to ``KEPT_MB``, else whenever asked for."""
    found = Pictures(pictures, input_format)
    size = len(pictures) * int(np.prod(input_format.shape))  # bytes
    return found if size > KEPT_MB * 2**20 else found[:]


def _decode(picture: Picture, fmt: InputFormat) -> Tensor:
    """One picture resized and cropped as timm does at evaluation, without normalising: (C, H, W)."""
    with _opened(picture) as opened:
        return _transform(fmt)(opened.convert("L" if fmt.shape[0] == 1 else "RGB"))


@contextmanager
def _opened(picture: Picture) -> Iterator[Any]:
    from PIL import Image

    try:
        with Image.open(picture if isinstance(picture, Path) else io.BytesIO(picture)) as opened:
            yield opened
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
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


def list_folder(
    root: Path, expected: str = "a folder SPLIT/CLASS/image"
) -> tuple[list[str], Listing]:
    """Class names and, for each split, its files with their class numbers; no picture is opened.

    Missing splits are drawn within each class with a fixed seed: of train and test alone, a fifth of train
    becomes reward; classes alone are split 60 : 20 : 20.

    Args:
        root: ``SPLIT/CLASS/picture`` with splits train, reward (or val) and test, or ``CLASS/picture``.
        expected: what an error says of a folder that is not there.
    """
    if not root.is_dir():
        raise InputError(
            f"images {str(root)!r}: expected {expected}, found no such folder; check the spelling"
        )
    found = _subfolders(root)
    several = [name for name in found if name in _REWARD]
    if len(several) > 1:
        raise InputError(
            f"images {str(root)!r}: expected one folder for the reward split, found several of "
            f"{', '.join(several)}; keep one of them"
        )
    parts = {"reward" if name in _REWARD else name: path for name, path in found.items()}
    parts = {name: path for name, path in parts.items() if name in SPLITS}
    if "train" in parts and "test" not in parts and "reward" in parts:
        parts["test"] = parts.pop("reward")  # the held-out part is reported, not searched
    if parts and not {"train", "test"} <= set(parts):
        raise InputError(
            f"images {str(root)!r}: expected the splits train and test (reward is optional), found "
            f"{', '.join(sorted(found))}; add the missing one, or put the class folders right there "
            "(a class must not be called like a split)"
        )
    tree = {name: _list_classes(p) for name, p in (parts or {"all": root}).items()}
    classes = sorted(next(iter(tree.values())))
    for name, listing in tree.items():
        if sorted(listing) != classes:
            odd = sorted(set(listing) ^ set(classes))
            raise InputError(
                f"images {str(root)!r}: expected the same classes in every split, found {odd[0]!r} "
                f"in one of {', '.join(tree)} only (see {name}); add or remove that folder"
            )
    piles = [{name: tree[name][c] for name in tree} for c in classes]
    return classes, split(piles, classes, f"images {str(root)!r}")


def split(
    piles: Sequence[Mapping[str, Sequence[Picture]]], names: Sequence[str], thing: str
) -> Listing:
    """Three splits of the pictures of each class, class by class.

    Args:
        piles: for each class its pictures, of train, reward and test; of train and test, and a fifth of
            train is drawn for reward; or of ``all``, which is split 60 : 20 : 20.
        names: the classes' names; thing: what an error speaks of.
    """
    rng = np.random.default_rng(SPLIT_SEED)
    listing: Listing = {name: [] for name in SPLITS}
    for label, (pile, name) in enumerate(zip(piles, names, strict=True)):
        parts = dict(pile)
        for key, shares in (
            ("all", {"train": 3, "reward": 1, "test": 1}),
            ("train", {"train": 4, "reward": 1}),
        ):
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


def _subfolders(folder: Path) -> dict[str, Path]:
    return {
        p.name: p for p in sorted(folder.iterdir()) if p.is_dir() and not p.name.startswith(".")
    }


def _list_classes(folder: Path) -> dict[str, list[Path]]:
    listing = {}
    for name, path in _subfolders(folder).items():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in _SUFFIXES)
        if not files:
            raise InputError(
                f"images: expected pictures ({', '.join(sorted(_SUFFIXES))}) in class folder "
                f"{path}, found none; fill it or remove it"
            )
        listing[name] = files
    if len(listing) < 2:
        raise InputError(
            f"images: expected at least two class folders in {folder}, found {len(listing)}; "
            "lay the pictures out as CLASS/image"
        )
    return listing
