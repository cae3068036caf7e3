"""Image sets as they are downloaded: the paper's CIFAR-10, CIFAR-100, CUB-200 and Stanford Dogs; GTSRB.

The official test split is ``test``; GTSRB without its own is split 60 : 20 : 20. A fifth of the official
train split, drawn within each class with a fixed seed, is ``reward``, and the rest ``train``. What is read is
checked first; no picture is decoded.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rmm_lab.errors import InputError
from rmm_lab.tasks import hub, plain
from rmm_lab.tasks import image_folder as images
from rmm_lab.tasks.files import content
from rmm_lab.tasks.groups import GroupOf
from rmm_lab.tasks.image_folder import Listing, Picture

PARTS = ("train", "test")  # the official splits
Official = tuple[list[str], Listing]  # class names, and the pictures of the official splits
Refuse = Callable[[str, str], NoReturn]  # what was expected, what was found -> InputError


@dataclass(frozen=True)
class ImageFormat:
    """An official image set: how to read a folder of it, and where it comes from."""

    read: Callable[[Path, ImageFormat, Refuse], Official]
    fetch: str  # what to fetch from where, and what the folder then holds
    hub: str | None = None  # data set with parquet files of pictures and labels
    label: str = "label"  # its column of class numbers
    group: GroupOf | None = None  # what pictures belong together in the splits that are drawn


# --------------------------------------------------------------- CIFAR-10 and CIFAR-100: parquet


def _read_cifar(folder: Path, form: ImageFormat, refuse: Refuse) -> Official:
    """Parquet files as on the hub, or an ImageFolder tree; the Python version's pickles are not read."""
    files = {part: _below(folder, f"{part}*.parquet") for part in PARTS}
    if all(files.values()):
        from datasets import load_dataset

        try:
            data = load_dataset("parquet", data_files={p: [*map(str, f)] for p, f in files.items()})
        except Exception as error:  # datasets and pyarrow raise many kinds
            found = f"broken ones ({type(error).__name__})"
            refuse(f"parquet files that can be read in {folder}", found)
        return _table(data, form, refuse)
    if all((folder / part).is_dir() for part in PARTS):
        classes, listing = images.list_folder(folder)
        # One official train split again: ``load`` draws the fifth of it.
        train = sorted(listing["train"] + listing["reward"], key=lambda pair: str(pair[0]))
        return classes, {"train": train, "test": listing["test"]}
    wanted = "train*.parquet and test*.parquet, or train/CLASS/ and test/CLASS/"
    refuse(f"{wanted}, in {folder}", content(folder))


def _below(folder: Path, pattern: str) -> list[Path]:
    """Files in a folder or below it, but in no hidden one (a download keeps its cache there)."""
    found = sorted(folder.rglob(pattern))
    return [p for p in found if not any(n.startswith(".") for n in p.relative_to(folder).parts)]


def _table(data: Any, form: ImageFormat, refuse: Refuse) -> Official:
    """The pictures of a data set of the library datasets, still encoded, and its classes' names."""
    from datasets import Image

    parts: Listing = {}
    for part in PARTS:
        if part not in data:
            refuse(f"the splits {' and '.join(PARTS)}", ", ".join(data))
        rows = data[part]
        columns = dict(rows.features)
        image = next((c for c in ("img", "image") if c in columns), None)
        if image is None or form.label not in columns:
            refuse(f"columns img (or image) and {form.label}", ", ".join(columns))
        encoded = rows.cast_column(image, Image(decode=False))[image]
        pictures = (row["bytes"] or Path(row["path"]) for row in encoded)
        labels = (-1 if label is None else int(label) for label in rows[form.label])
        parts[part] = list(zip(pictures, labels, strict=True))
    names = getattr(columns[form.label], "names", None)
    if names is None:  # a plain column of numbers
        names = map(str, range(1 + max((label for _, label in parts["train"]), default=-1)))
    return list(names), parts


# ------------------------------------------------------------------------------------- CUB-200-2011


def _read_cub(folder: Path, form: ImageFormat, refuse: Refuse) -> Official:
    """The official folder: four lists by picture number, and ``images``."""
    needed = ("classes.txt", "images.txt", "image_class_labels.txt", "train_test_split.txt")
    root = _inner(folder, "CUB_200_2011", needed[1])
    missing = [n for n in (*needed, "images") if not (root / n).exists()]
    if missing:
        refuse(f"{', '.join(missing)} in {root}", content(root))
    classes, files, labels, is_train = (_numbered(root / name, refuse) for name in needed)
    for name, column in zip(needed[2:], (labels, is_train), strict=True):
        if column.keys() != files.keys():
            odd = min(column.keys() ^ files.keys(), key=int)
            refuse(f"the same pictures in images.txt and {name}", f"number {odd} in one")
    order = sorted(classes, key=int)
    parts: Listing = {part: [] for part in PARTS}
    for number, file in files.items():
        if labels[number] not in classes or is_train[number] not in ("0", "1"):
            found = f"class {labels[number]}, split {is_train[number]} for picture {number}"
            refuse("a class of classes.txt and a split of 0 or 1", found)
        part = "train" if is_train[number] == "1" else "test"
        parts[part].append((root / "images" / file, order.index(labels[number])))
    return [classes[number] for number in order], parts


def _numbered(file: Path, refuse: Refuse) -> dict[str, str]:
    """Lines of a number and a text."""
    out: dict[str, str] = {}
    try:
        text = plain.read_bytes(file, plain.CONFIG_MB).decode("utf-8", errors="replace")
    except (OSError, ValueError) as error:
        refuse(f"a table of numbers and texts in {file}", f"none that can be read ({error})")
    for line in filter(str.strip, text.splitlines()):
        number, _, text = line.strip().partition(" ")
        if not number.isdecimal() or not text or number in out:
            refuse(f"lines of a new number and a text in {file}", repr(line))
        out[number] = text.strip()
    return out


# ------------------------------------------------------------------------------------ Stanford Dogs


def _read_dogs(folder: Path, form: ImageFormat, refuse: Refuse) -> Official:
    """``Images/nNUMBER-BREED/*.jpg``, and the official lists, in ``lists`` or next to ``Images``."""
    root = _inner(folder, "StanfordDogs", "Images")
    if not (root / "Images").is_dir():
        refuse(f"the folder Images (of images.tar) in {root}", content(root))
    parts: Listing = {}
    names: dict[int, str] = {}
    for part in PARTS:
        places = [root / "lists" / f"{part}_list.mat", root / f"{part}_list.mat"]
        file = next((p for p in places if p.is_file()), None)
        if file is None:
            refuse(f"lists/{part}_list.mat (of lists.tar) in {root}", content(root))
        rows = _matlab(file, refuse)
        for name, label in rows:
            breed = name.partition("/")[0]
            if names.setdefault(label, breed) != breed:
                found = f"{names[label]} and {breed} as number {label}"
                refuse(f"one breed for each number in {file}", found)
        parts[part] = [(root / "Images" / name, label) for name, label in rows]
    order = sorted(names)
    numbered = {
        part: [(file, order.index(label)) for file, label in rows] for part, rows in parts.items()
    }
    return [names[label] for label in order], numbered


def _matlab(file: Path, refuse: Refuse) -> list[tuple[str, int]]:
    """``file_list`` and ``labels`` of an official MATLAB file."""
    from scipy.io import loadmat

    try:
        content = loadmat(file, variable_names=["file_list", "labels"])
        names = [str(cell.item()) for cell in content["file_list"].ravel()]
        labels = [int(label) for label in content["labels"].ravel()]
        return list(zip(names, labels, strict=True))
    except Exception as error:  # scipy raises what a broken file makes it stumble over
        found = f"a file that cannot be read so ({type(error).__name__}: {error})"
        refuse(f"file_list and labels in {file}", found)


# -------------------------------------------------------------------------------------------- GTSRB


def _read_gtsrb(folder: Path, form: ImageFormat, refuse: Refuse) -> Official:
    """``Final_Training/Images/000NN/*.ppm`` with a GT-000NN.csv in each; the test split if it has labels."""
    root = _inner(folder, "GTSRB", "Final_Training")
    images = root / "Final_Training" / "Images"
    if not images.is_dir():
        refuse(f"the folder Final_Training/Images in {root}", content(root))
    classes = sorted(p.name for p in images.iterdir() if p.is_dir() and p.name.isdecimal())
    parts: Listing = {"train": []}
    for number, name in enumerate(classes):
        table = images / name / f"GT-{name}.csv"
        for file, label in _signs(table, refuse):
            if label != int(name):
                refuse(f"class {int(name)} in {table}", f"{label} for {file}")
            parts["train"].append((images / name / file, number))
    tests = root / "Final_Test" / "Images"
    tables = [p / n for p in (tests, root) for n in ("GT-final_test.csv",) if (p / n).is_file()]
    if tests.is_dir() and not tables:
        refuse(f"the classes of {tests}, GT-final_test.csv (of GTSRB_Final_Test_GT.zip)", "none")
    if tests.is_dir():
        numbers = [int(name) for name in classes]
        signs = _signs(tables[0], refuse)
        if odd := sorted({label for _, label in signs} - set(numbers)):
            refuse(f"the classes of {images} in {tables[0]}", str(odd[0]))
        parts["test"] = [(tests / file, numbers.index(label)) for file, label in signs]
    return classes, parts


def _signs(file: Path, refuse: Refuse) -> list[tuple[str, int]]:
    """File names and classes of a table of GTSRB."""
    try:
        text = plain.read_bytes(file, plain.CONFIG_MB).decode("utf-8-sig")
        rows = list(csv.DictReader(text.splitlines(), delimiter=";"))
        return [(row["Filename"], int(row["ClassId"])) for row in rows]
    except (OSError, KeyError, ValueError, TypeError, csv.Error) as error:
        refuse(f"Filename and ClassId, separated by semicolons, in {file}", f"others ({error!r})")


def _track(picture: Path) -> str:
    """The track of a frame: 30 pictures of one sign, ``00012_00000.ppm`` to ``00012_00029.ppm``."""
    return f"{picture.parent.name}/{picture.name.partition('_')[0]}"


# ---------------------------------------------------------------------------------- what is common

# Those of the paper.
FORMATS: dict[str, ImageFormat] = {
    "cifar10": ImageFormat(
        read=_read_cifar,
        fetch="get train-00000-of-00001.parquet and test-00000-of-00001.parquet from plain_text/ of "
        "huggingface.co/datasets/uoft-cs/cifar10 into it (the pickles of cifar-10-python are not read)",
        hub="uoft-cs/cifar10",
    ),
    "cifar100": ImageFormat(
        read=_read_cifar,
        fetch="get train-00000-of-00001.parquet and test-00000-of-00001.parquet from cifar100/ of "
        "huggingface.co/datasets/uoft-cs/cifar100 into it (the pickles of cifar-100-python are not read)",
        hub="uoft-cs/cifar100",
        label="fine_label",
    ),
    "cub200": ImageFormat(
        read=_read_cub,
        fetch="unpack CUB_200_2011.tgz from www.vision.caltech.edu/datasets/cub_200_2011 there",
    ),
    "dogs": ImageFormat(
        read=_read_dogs,
        fetch="unpack images.tar there and lists.tar in its folder lists, both from "
        "vision.stanford.edu/aditya86/ImageNetDogs",
    ),
}
# All that are read: the paper's, and what others ask for.
ALL = FORMATS | {
    "gtsrb": ImageFormat(
        read=_read_gtsrb,
        fetch="unpack GTSRB_Final_Training_Images.zip of benchmark.ini.rub.de there, and for its test split "
        "GTSRB_Final_Test_Images.zip and GT-final_test.csv",
        group=_track,
    ),
}


def load(source: str) -> tuple[str, list[str], Listing]:
    """Name, class names and the pictures of each split of an official image set.

    Args:
        source: ``FORMAT:FOLDER``, or ``FORMAT:hf-hub`` or ``FORMAT:hf-hub:OWNER/NAME@REVISION`` by the
            library datasets. The formats and their folders:

            * ``cifar10``, ``cifar100``: ``train*.parquet`` and ``test*.parquet`` as on the hub, at any
              depth, or ``train/CLASS/picture`` and ``test/CLASS/picture``; the 100 fine labels;
            * ``cub200``: ``CUB_200_2011`` with classes.txt, images.txt, image_class_labels.txt,
              train_test_split.txt and images/, or the folder that it lies in;
            * ``dogs``: ``Images`` and ``lists`` with train_list.mat and test_list.mat;
            * ``gtsrb``: ``Final_Training/Images``, and ``Final_Test/Images`` with GT-final_test.csv; the
              30 frames of a track stay in one split, and pictures are not cut to the sign.

    Memory: pictures in parquet files are held encoded, 0.15 GB for CIFAR-10; of others only the names.

    Raises InputError for anything that is missing or broken, with what to fetch.
    """
    thing = f"images {source!r}"
    name, _, rest = source.partition(":")
    form = ALL[name]
    if not rest:
        raise InputError(
            f"{thing}: expected a folder or hf-hub after the colon, found nothing; name one"
        )

    def refuse(expected: str, found: str) -> NoReturn:
        raise InputError(f"{thing}: expected {expected}, found {found}; {form.fetch}")

    if hub.is_hub(rest):
        data = _from_hub(form, name, rest, thing)
        classes, parts = _table(data, form, refuse)
    elif (folder := Path(rest).expanduser()).is_dir():
        try:
            classes, parts = form.read(folder, form, refuse)
        except ImportError as error:
            raise InputError(
                f"{thing}: expected the optional library {str(error.name).partition('.')[0]}, which reads "
                "such a folder, found none; install it with pip install -e '.[hub]'"
            ) from error
    else:
        refuse(f"a folder {rest}", "none")
    if len(classes) < 2:
        refuse("at least 2 classes", str(len(classes)))
    piles: list[dict[str, list[Picture]]] = [{part: [] for part in parts} for _ in classes]
    seen: set[Path] = set()
    for part, pairs in parts.items():
        for picture, label in pairs:
            if not 0 <= label < len(classes):
                refuse(f"class numbers from 0 to {len(classes) - 1}", str(label))
            if isinstance(picture, Path):
                if picture in seen:
                    refuse("each picture once in the lists", f"{picture} twice")
                if not picture.is_file():
                    refuse(f"the picture {picture}", "no such file")
                seen.add(picture)
            piles[label][part].append(picture)
    for pile, c in zip(piles, classes, strict=True):
        if not pile.get("test", True):
            refuse(f"pictures of each class in test, {c!r} too", "none")
        if "test" not in pile:
            pile["all"] = pile.pop("train")
    return name, classes, images.split(piles, classes, thing, form.group)


def _from_hub(form: ImageFormat, name: str, rest: str, thing: str) -> Any:
    repository, revision = hub.parse(rest, form.hub or "")
    remedy = f"make a folder, {form.fetch}, and give {name}:FOLDER"
    if not repository:
        raise InputError(
            f"{thing}: expected a data set that its makers keep on the hub, found none for {name}; {remedy}, "
            f"or name a copy, {name}:hf-hub:OWNER/NAME"
        )
    return hub.load(repository, None, revision, thing=thing, remedy=remedy)


def _inner(folder: Path, name: str, mark: str) -> Path:
    """The folder itself, or the one of the archive's name in it, whichever has what marks it."""
    return folder / name if not (folder / mark).exists() and (folder / name).is_dir() else folder
