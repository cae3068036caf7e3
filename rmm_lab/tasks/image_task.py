"""Image tasks: the small sets that ship, image folders, the paper's four sets, and halves of any.

Every task has three splits: ``train`` to fine-tune an expert, ``reward`` to search, ``test`` to report
once. Images are kept as uint8 and normalised batch by batch.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rmm_lab.errors import InputError
from rmm_lab.tasks import image_folder as images
from rmm_lab.tasks import image_formats
from rmm_lab.tasks import small_images as render
from rmm_lab.tasks.files import SPLITS, data_folder, format_of, or_shipped, shipped_name, spelled
from rmm_lab.tasks.groups import reader as group_reader
from rmm_lab.tasks.groups import series
from rmm_lab.tasks.image_folder import Listing, Pictures, composed
from rmm_lab.tasks.input_format import InputFormat
from rmm_lab.tasks.metrics import mean_of

HALVES = ("first", "second")  # of a set's classes: NAME:first and NAME:second
# name -> (class names, images per class in train, reward, test)
SMALL: dict[str, tuple[list[str], tuple[int, int, int]]] = {
    "digits": (list("0123456789"), (54, 60, 60)),
    "letters": (list(render.LETTERS), (150, 48, 77)),
    "symbols": (list(render.SYMBOLS), (150, 50, 83)),
    "textures": (list(render.TEXTURES), (250, 75, 125)),
}
NAMES = (*SMALL, *(f"{name}:{half}" for name in SMALL for half in HALVES))  # with halves


@dataclass(frozen=True)
class Split:
    """``images``: (n, C, H, W) uint8; ``labels``: (n,) int64 class numbers.

    Large sets decode their images when they are asked for by rows, see ``images.Pictures``.
    """

    images: Tensor | Pictures = field(repr=False)
    labels: Tensor = field(repr=False)

    def __len__(self) -> int:
        return len(self.labels)


class Task:
    """A classification task with three splits, read when first asked for.

    Args:
        source: one of

            * a set that ships: digits, letters, symbols, textures, or shipped:digits and so on where a
              folder has the same name;
            * a folder of images: ``SPLIT/CLASS/image`` with splits train, reward (or val) and test, or
              ``CLASS/image``;
            * ``FORMAT:FOLDER`` or ``FORMAT:hf-hub``: cifar10, cifar100, cub200, dogs, gtsrb as
              downloaded, see ``image_formats``;
            * any of these followed by ``:first`` or ``:second``: that half of its classes in the set's
              order (Han et al. 2025, Sec. III-A1), numbered from 0. Of an odd number of classes the first
              half has one more. The splits are those of the whole set.
        input_format: what the models take; images are resized, cropped and recoloured to it.
        groups: what pictures of a folder belong together and stay in one split, see ``groups.reader``.

    ``name``: the set's, folder's or format's, with ``-first`` or ``-second`` for a half. ``list_folder``
    says how the splits of a folder are drawn that has not all three.
    """

    metric = "accuracy"

    def __init__(self, source: str, input_format: InputFormat, groups: str = "") -> None:
        self.format, self.groups = input_format, groups
        self._said: list[str] = []  # notes on the folder
        self._seen: dict[str, Counter[str]] = {}  # split -> what was done to how many pictures
        self._splits: dict[str, Split] = {}
        self._files: Listing = {}
        ships = shipped_name(source, NAMES)
        self.source = spelled(ships) if ships else source
        self._place, half = _halved(ships or source)
        self._ships = bool(ships)
        if ships:
            self.name, classes = self._place, SMALL[self._place][0]
        elif format_of(self._place, image_formats.ALL, f"images {source!r}", HALVES, SMALL):
            self.name, classes, self._files = image_formats.load(self._place)
        else:
            root = Path(self._place).expanduser()
            expected = (
                f"a folder SPLIT/CLASS/image, a name that ships ({', '.join(SMALL)}), or FORMAT:FOLDER "
                f"({', '.join(image_formats.ALL)})"
            )
            self.name = Path(os.path.realpath(root)).name  # also of links in a circle
            with or_shipped(source, NAMES):
                group_of = group_reader(groups, root) if groups else None
                classes, self._files = images.list_folder(root, expected, group_of)
            self._said = _notes(root, classes, self._files, grouped=bool(groups))
        self._kept = range(len(classes))  # class numbers in the whole set
        if half:
            self.name = f"{self.name}-{half}"
            self._kept = _half(source, half, len(classes))
            self._files = {
                split: [(file, c - self._kept.start) for file, c in files if c in self._kept]
                for split, files in self._files.items()
            }
        self.classes: list[str] = [classes[c] for c in self._kept]

    def split(self, name: str) -> Split:
        """The split ``train``, ``reward`` or ``test``."""
        if name not in SPLITS:
            raise InputError(f"split {name!r}: expected one of {', '.join(SPLITS)}")
        if name not in self._splits:
            if self._ships:
                pixels, per_class = _small(self._place, name, self._kept)
                labels = torch.arange(len(self.classes)).repeat_interleave(per_class)
                self._splits[name] = Split(_fit(pixels, self.format), labels)
            else:
                files, numbers = zip(*self._files[name], strict=True)
                pictures = Pictures(files, self.format)
                self._seen[name] = pictures.seen
                self._splits[name] = Split(pictures.decoded(), torch.tensor(numbers))
        return self._splits[name]

    def batch(self, name: str, rows: np.ndarray | slice) -> Tensor:
        """Some pictures of a split, normalised as the models take them: (n, C, H, W) float32."""
        return self.format.normalise(self.split(name).images[rows])

    def size(self, name: str) -> int:
        """Pictures of a split."""
        return len(self.split(name))

    def inputs(self, name: str, rows: np.ndarray) -> Tensor:
        """Some pictures of a split without anything of the others; see ``batch``."""
        return self.batch(name, rows)

    def score(self, found: Tensor, labels: Tensor) -> float:
        """Accuracy of the classes found: both (n,) -> [0, 1]."""
        return mean_of(self.metric, (found == labels).double(), labels)

    def chance(self, name: str) -> float:
        """Expected accuracy of guessing on any split: one in as many as there are classes."""
        return 1 / len(self.classes)

    @property
    def notes(self) -> list[str]:
        """What was left out of a folder, and what was done to the pictures of the splits read so far."""
        done: Counter[str] = sum(vars(self).get("_seen", {}).values(), Counter())
        return [
            *(f"images {self.name}: {said}" for said in vars(self).get("_said", [])),
            *(f"images {self.name}: {n} pictures are {way}" for way, n in sorted(done.items())),
        ]

    def files(self, name: str) -> list[tuple[Path, str]]:
        """The files of a split with the names of their classes; none for sets that are no files."""
        listed = vars(self).get("_files", {}).get(name, [])  # a subclass of tensors has none
        return [(p, self.classes[c]) for p, c in listed if isinstance(p, Path)]

    def check_head(
        self, source: str, num_classes: int, label_names: Sequence[str] | None
    ) -> list[int] | None:
        """In which order to take the rows of a model's head, so that they are this task's classes; or None.

        label_names: the head's classes, matched by name; None: it has this task's order.
        Raises InputError for other classes.
        """
        if num_classes != len(self.classes):
            raise InputError(
                f"expert {source!r}: expected a head of {len(self.classes)} classes as in images "
                f"{self.source!r}, found {num_classes}; give experts and images in the same order"
            )
        if label_names is None:
            return None
        wanted, names = (list(map(composed, map(str, n))) for n in (self.classes, label_names))
        if sorted(wanted) == sorted(names):
            return None if wanted == names else [names.index(c) for c in wanted]
        i, want, have = next(
            (i, w, h)
            for i, (w, h) in enumerate(zip_longest(wanted, names))
            if w not in names or h not in wanted
        )
        raise InputError(
            f"expert {source!r}: expected class {i} to be {want!r} as in images {self.source!r}, found "
            f"{have!r}; give experts and images in the same order, or rename the folders to the classes in "
            "label_names of its config.json"
        )


def _notes(root: Path, classes: Sequence[str], files: Listing, grouped: bool) -> list[str]:
    """What to know of a folder of pictures."""
    out = []
    if rest := images.left_out(root, files):
        out.append(f"left out are files that are no pictures of a class and split: {rest}")
    if list(classes) != sorted(classes):
        out.append(
            f"classes are in the order of timm's reader, {', '.join(classes[:4])}"
            f"{', ...' if len(classes) > 4 else ''}; an expert with another order needs label_names in its "
            "config.json"
        )
    paths = [p for rows in files.values() for p, _ in rows if isinstance(p, Path)]
    splits = {path.relative_to(root).parts[0] for path in paths}
    depth = min((len(path.relative_to(root).parts) for path in paths), default=0)
    if depth > (3 if "train" in splits else 2):
        out.append(
            f"the pictures of {', '.join(classes[:3])} lie in folders below ({paths[0].parent}): if those "
            "are the classes, give the folder that they are in"
        )
    if grouped and {"train", "test"} <= splits and splits & set(images.REWARD):
        out.append("its splits are given, so that --groups changes nothing")
    if not grouped and not {"train", "test"} <= splits and (found := series(files)):
        out.append(
            f"its pictures look like {found[0]} series of frames ({found[1]}), which the random splits tear "
            "apart, so that scores are too high; keep them together with --groups"
        )
    return out


def _halved(source: str) -> tuple[str, str]:
    """A source without ``:first`` or ``:second``, and which of them; a folder may be called so."""
    place, _, half = source.rpartition(":")
    if place and half in HALVES and not Path(source).expanduser().is_dir():
        return place, half
    return source, ""


def _half(source: str, half: str, n: int) -> range:
    """The class numbers of the first or second half of n classes."""
    if n < 4:
        raise InputError(
            f"images {source!r}: expected at least 4 classes to halve, found {n}; take the whole set"
        )
    return range(n)[: (n + 1) // 2] if half == "first" else range(n)[(n + 1) // 2 :]


# ------------------------------------------------------------------------------ the sets that ship


def sheet_file(name: str, split: str) -> Path:
    """The PNG sheet of a split: a row for each class, a column for each of its images."""
    return data_folder() / "sets" / f"{name}-{split}.png"


def _small(name: str, split: str, kept: range) -> tuple[Tensor, int]:
    """Images (n, 1, 28, 28) of some classes of a set that ships, class by class; number per class."""
    from PIL import Image

    per_class = SMALL[name][1][SPLITS.index(split)]
    file = sheet_file(name, split)
    if split == "train" and not file.exists():
        drawn = render.render(name, split, per_class)  # all classes: they share one generator
        rows = drawn[kept.start * per_class : kept.stop * per_class]
        return rows.clone() if len(rows) < len(drawn) else drawn, per_class
    if not file.exists():
        raise InputError(
            f"expected the set {name!r} in {file}, found no such file; run python -m data.build"
        )
    with Image.open(file) as picture:
        box = (0, kept.start * render.SIZE, picture.width, kept.stop * render.SIZE)
        sheet = torch.from_numpy(np.array(picture.crop(box).convert("L")))
    # (classes * 28, per_class * 28) -> (classes * per_class, 1, 28, 28)
    rows = sheet.view(-1, render.SIZE, per_class, render.SIZE).permute(0, 2, 1, 3)
    return rows.reshape(-1, 1, render.SIZE, render.SIZE).contiguous(), per_class


def _fit(images: Tensor, fmt: InputFormat) -> Tensor:
    """uint8 images resized to another model's size and number of channels."""
    if tuple(images.shape[2:]) != fmt.shape[1:]:
        resized = torch.nn.functional.interpolate(
            images.float(), size=fmt.shape[1:], mode="bicubic", antialias=True
        )
        images = resized.round().clamp(0, 255).to(torch.uint8)
    if fmt.shape[0] == 4:  # RGBA, nothing of it transparent
        return torch.cat([images.expand(-1, 3, -1, -1), torch.full_like(images, 255)], 1)
    return images.expand(-1, fmt.shape[0], -1, -1)
