"""The data sets: the small ones that ship, and a user's own image folders.

Every task has three splits, and each has one use: ``train`` to fine-tune an expert, ``reward`` to
search, ``test`` to report once. Images are kept as uint8 and normalised batch by batch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmm_lab import render
from rmm_lab.errors import InputError

SPLITS = ("train", "reward", "test")
SPLIT_SEED = 0  # of the split made for a user's folder: fixed, so that fine-tuning and search agree
_TEXTURE_NAMES = list(render.TEXTURES)
# name -> (class names, images per class in train, reward, test)
SMALL: dict[str, tuple[list[str], tuple[int, int, int]]] = {
    "digits": (list("0123456789"), (54, 60, 60)),
    "letters": (list(render.LETTERS), (150, 48, 77)),
    "symbols": (list(render.SYMBOLS), (150, 50, 83)),
    "textures": (_TEXTURE_NAMES, (250, 75, 125)),
}
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}


def data_folder() -> Path:
    """The folder ``data/`` of the repository, or the one that RMM_LAB_DATA names."""
    folder = Path(os.environ.get("RMM_LAB_DATA") or Path(__file__).resolve().parent.parent / "data")
    if not folder.is_dir():
        raise InputError(
            f"expected the data that ships in {folder}, found no such folder; clone the repository "
            "and install it with pip install -e, or set RMM_LAB_DATA to its data folder"
        )
    return folder


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


@dataclass(frozen=True)
class Split:
    """``images``: (n, C, H, W) uint8; ``labels``: (n,) int64 class numbers."""

    images: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)

    def __len__(self) -> int:
        return len(self.labels)


class Task:
    """A classification task with three splits, read when first asked for and kept.

    Args:
        source: a name that ships (digits, letters, symbols, textures) or a folder of images:
            ``SPLIT/CLASS/image`` with splits train, reward (or val) and test, or ``CLASS/image``.
        input_format: what the models take; images are resized, cropped and recoloured to it.

    A folder without all three splits gets them by a fixed, seeded draw within each class: train and
    test alone give a fifth of train to reward; classes alone are dealt 60 : 20 : 20.
    """

    metric = "accuracy"

    def __init__(self, source: str, input_format: InputFormat) -> None:
        self.source, self.format = source, input_format
        self._splits: dict[str, Split] = {}
        if source in SMALL:
            self.name = source
            self.classes: list[str] = SMALL[source][0]
            self._files: dict[str, list[tuple[Path, int]]] = {}
        else:
            root = Path(source).expanduser()
            self.name = root.resolve().name
            self.classes, self._files = _list_folder(root)

    def split(self, name: str) -> Split:
        """The split ``train``, ``reward`` or ``test``."""
        if name not in SPLITS:
            raise InputError(f"split {name!r}: expected one of {', '.join(SPLITS)}")
        if name not in self._splits:
            if self._files:
                self._splits[name] = _read_files(self._files[name], self.format)
            else:
                images, per_class = _small(self.source, name)
                labels = torch.arange(len(self.classes)).repeat_interleave(per_class)
                self._splits[name] = Split(_fit(images, self.format), labels)
        return self._splits[name]

    def batch(self, name: str, rows: np.ndarray | slice) -> Tensor:
        """Some pictures of a split, normalised as the models take them: (n, C, H, W) float32."""
        return self.format.normalise(self.split(name).images[rows])

    def score(self, found: Tensor, labels: Tensor) -> float:
        """Accuracy of the classes found: both (n,) -> [0, 1]."""
        return float((found == labels).double().mean())

    def check_head(self, source: str, num_classes: int, label_names: Sequence[str] | None) -> None:
        """Raise InputError unless a model's head has this task's classes."""
        if num_classes != len(self.classes):
            raise InputError(
                f"expert {source!r}: expected a head of {len(self.classes)} classes as in images "
                f"{self.source!r}, found {num_classes}; give experts and images in the same order"
            )
        if label_names is not None and list(label_names) != self.classes:
            if len(label_names) != len(self.classes):
                raise InputError(
                    f"expert {source!r}: expected {len(self.classes)} label_names in its config.json as "
                    f"in images {self.source!r}, found {len(label_names)}; correct them"
                )
            first = next(i for i, c in enumerate(self.classes) if label_names[i] != c)
            raise InputError(
                f"expert {source!r}: expected class {first} to be {self.classes[first]!r} as in images "
                f"{self.source!r}, found {label_names[first]!r}; give experts and images in the same "
                "order, or correct label_names in its config.json"
            )


# ------------------------------------------------------------------------------ the sets that ship


def sheet_file(name: str, split: str) -> Path:
    """The PNG sheet of a split: a row for each class, a column for each of its images."""
    return data_folder() / "sets" / f"{name}-{split}.png"


def write_sheet(name: str, split: str) -> Path:
    """Draw a split anew and store it as a 4-bit grey PNG under ``data/sets``."""
    from PIL import Image

    per_class = SMALL[name][1][SPLITS.index(split)]
    images = render.render(name, split, per_class)  # (classes * per_class, 1, 28, 28)
    rows = images.view(-1, per_class, render.SIZE, render.SIZE).permute(0, 2, 1, 3)
    sheet = rows.reshape(-1, per_class * render.SIZE).numpy()  # (classes * 28, per_class * 28)
    picture = Image.fromarray(sheet // 17, mode="P")
    picture.putpalette([17 * i for i in range(16) for _ in "rgb"])
    file = sheet_file(name, split)
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file, bits=4, optimize=True)
    return file


def _small(name: str, split: str) -> tuple[Tensor, int]:
    """Images (n, 1, 28, 28) of a set that ships, class by class, and their number per class."""
    from PIL import Image

    per_class = SMALL[name][1][SPLITS.index(split)]
    file = sheet_file(name, split)
    if split == "train" and not file.exists():
        return render.render(name, split, per_class), per_class
    if not file.exists():
        raise InputError(
            f"expected the set {name!r} in {file}, found no such file; run python -m rmm_lab.zoo"
        )
    with Image.open(file) as picture:
        sheet = torch.from_numpy(np.array(picture.convert("L")))  # (classes * 28, per_class * 28)
    rows = sheet.view(-1, render.SIZE, per_class, render.SIZE).permute(0, 2, 1, 3)
    return rows.reshape(-1, 1, render.SIZE, render.SIZE).contiguous(), per_class


def _fit(images: Tensor, fmt: InputFormat) -> Tensor:
    """uint8 images resized to another model's size and number of channels."""
    if tuple(images.shape[2:]) != fmt.shape[1:]:
        resized = torch.nn.functional.interpolate(
            images.float(), size=fmt.shape[1:], mode="bicubic", antialias=True
        )
        images = resized.round().clamp(0, 255).to(torch.uint8)
    return images.expand(-1, fmt.shape[0], -1, -1)


# ---------------------------------------------------------------------------- a user's own folders


def _subfolders(folder: Path) -> dict[str, Path]:
    return {
        p.name: p for p in sorted(folder.iterdir()) if p.is_dir() and not p.name.startswith(".")
    }


def _list_folder(root: Path) -> tuple[list[str], dict[str, list[tuple[Path, int]]]]:
    """Class names and, for each split, its files with their class numbers; no image is opened."""
    if not root.is_dir():
        raise InputError(
            f"images {str(root)!r}: expected a folder SPLIT/CLASS/image or a name that ships "
            f"({', '.join(SMALL)}), found no such folder; check the spelling"
        )
    found = _subfolders(root)
    aliases = {"val": "reward", "valid": "reward", "validation": "reward"}
    parts = {aliases.get(k, k): v for k, v in found.items() if aliases.get(k, k) in SPLITS}
    if len(parts) < sum(aliases.get(k, k) in SPLITS for k in found):
        raise InputError(
            f"images {str(root)!r}: expected one folder for the reward split, found several of "
            f"{', '.join(k for k in found if aliases.get(k, k) == 'reward')}; keep one of them"
        )
    if "train" in parts and "test" not in parts and "reward" in parts:
        parts["test"] = parts.pop("reward")  # the held-out part there is is reported, not searched
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
    rng = np.random.default_rng(SPLIT_SEED)
    files: dict[str, list[tuple[Path, int]]] = {name: [] for name in SPLITS}
    for label, c in enumerate(classes):
        if "all" in tree:
            shares = {"train": 0.6, "reward": 0.2, "test": 0.2}
            deal = _deal(tree["all"][c], shares, rng)
        elif "reward" in tree:
            deal = {name: tree[name][c] for name in SPLITS}
        else:
            deal = _deal(tree["train"][c], {"train": 0.8, "reward": 0.2}, rng)
            deal["test"] = tree["test"][c]
        for name in SPLITS:
            files[name] += [(f, label) for f in deal[name]]
    return classes, files


def _list_classes(folder: Path) -> dict[str, list[Path]]:
    listing = {}
    for name, path in _subfolders(folder).items():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in _IMAGE_SUFFIXES)
        if not files:
            raise InputError(
                f"images: expected pictures ({', '.join(sorted(_IMAGE_SUFFIXES))}) in class folder "
                f"{path}, found none; fill it or remove it"
            )
        listing[name] = files
    if len(listing) < 2:
        raise InputError(
            f"images: expected at least two class folders in {folder}, found {len(listing)}; "
            "lay the pictures out as CLASS/image"
        )
    return listing


def _deal(
    files: list[Path], shares: dict[str, float], rng: np.random.Generator
) -> dict[str, list[Path]]:
    """Shuffle one class and deal it out; every split gets at least one image."""
    if len(files) < len(shares):
        raise InputError(
            f"images: expected at least {len(shares)} pictures in {files[0].parent} to make the "
            f"splits {', '.join(shares)}, found {len(files)}; add pictures or provide the splits"
        )
    order = [files[i] for i in rng.permutation(len(files))]
    counts = {k: max(1, int(len(files) * v)) for k, v in shares.items()}
    counts["train"] = len(files) - sum(n for k, n in counts.items() if k != "train")
    out, start = {}, 0
    for name, n in counts.items():
        out[name] = sorted(order[start : start + n])
        start += n
    return out


def _read_files(files: list[tuple[Path, int]], fmt: InputFormat) -> Split:
    """Decode, resize and crop as timm does at evaluation, without normalising."""
    from PIL import Image
    from timm.data import create_transform

    transform = create_transform(
        fmt.shape,
        is_training=False,
        interpolation=fmt.interpolation,
        crop_pct=fmt.crop,
        crop_mode=fmt.crop_mode,
        normalize=False,
    )
    images = []
    for file, _ in files:
        try:
            with Image.open(file) as picture:
                images.append(transform(picture.convert("L" if fmt.shape[0] == 1 else "RGB")))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(
                f"images: expected a readable picture, but {file} is broken ({error}); replace or "
                "remove it"
            ) from error
    return Split(torch.stack(images), torch.tensor([label for _, label in files]))
