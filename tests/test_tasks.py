"""The data sets against their sources: scikit-learn's digits, the PNG sheets, timm and torchvision."""

from __future__ import annotations

import hashlib
import re
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, write_images
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torchvision import transforms
from torchvision.datasets import ImageFolder

from data.build import write_sheet
from rmm_lab.errors import InputError
from rmm_lab.tasks import image_task as tasks
from rmm_lab.tasks import small_images as render
from rmm_lab.tasks.image_task import InputFormat, Task

SPLITS = ("train", "reward", "test")
SHIPPED = {  # classes, images per class in train, reward and test
    "digits": (10, 54, 60, 60),
    "letters": (26, 150, 48, 77),
    "symbols": (24, 150, 50, 83),
    "textures": (16, 250, 75, 125),
}
GREY = InputFormat((1, 28, 28), (0.5,), (0.5,))
DRAWN_WITH = "3.11.2"  # the matplotlib whose fonts drew the sheets: constraints.txt
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture(scope="module")
def shipped() -> dict[str, Task]:
    """The sets that ship, each read once."""
    return {name: Task(name, GREY) for name in SHIPPED}


# ------------------------------------------------------------------------------ the sets that ship


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("i", range(3), ids=SPLITS)
def test_counts_levels_and_labels(shipped, name, i):
    task, split = shipped[name], shipped[name].split(SPLITS[i])
    classes, count = SHIPPED[name][0], SHIPPED[name][1 + i]
    assert split.images.shape == (classes * count, 1, 28, 28)
    assert split.images.dtype == torch.uint8
    assert set(split.images.unique().tolist()) == {17 * level for level in range(16)}
    assert split.labels.dtype == torch.int64
    assert torch.bincount(split.labels).tolist() == [count] * classes
    assert len(split) == classes * count
    assert task.name == name
    assert len(task.classes) == len(set(task.classes)) == classes
    assert task.split(SPLITS[i]) is split  # read once


@pytest.mark.parametrize("name", SHIPPED)
def test_no_image_is_in_two_splits(shipped, name):
    hashes = [
        hashlib.sha256(image.numpy().tobytes()).hexdigest()
        for split in SPLITS
        for image in shipped[name].split(split).images
    ]
    assert len(set(hashes)) == len(hashes) == SHIPPED[name][0] * sum(SHIPPED[name][1:])


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("split", ["reward", "test"])
def test_a_sheet_has_a_row_for_each_class(shipped, name, split):
    file = Path(__file__).parents[1] / "data" / "sets" / f"{name}-{split}.png"
    with Image.open(file) as picture:
        sheet = np.array(picture.convert("L"))
    count = SHIPPED[name][1 + SPLITS.index(split)]
    assert sheet.shape == (28 * SHIPPED[name][0], 28 * count)
    found = shipped[name].split(split)
    for n in range(0, len(found), 7):
        row, column = 28 * int(found.labels[n]), 28 * (n % count)
        assert np.array_equal(found.images[n, 0], sheet[row : row + 28, column : column + 28])


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("split", ["reward", "test"])
def test_sheets_equal_a_fresh_drawing(shipped, name, split):
    if name in ("letters", "symbols") and version("matplotlib") != DRAWN_WITH:
        pytest.skip(
            f"drawn with the fonts of matplotlib {DRAWN_WITH}, found {version('matplotlib')}"
        )
    fresh = render.render(name, split, SHIPPED[name][1 + SPLITS.index(split)])
    assert torch.equal(fresh, shipped[name].split(split).images)


def test_digits_train_ships_and_equals_a_fresh_drawing(shipped):
    assert tasks.sheet_file("digits", "train").is_file()  # so that scikit-learn is not needed
    assert torch.equal(
        render.render("digits", "train", 54), shipped["digits"].split("train").images
    )


def test_digits_are_scikit_learns_and_no_row_is_dealt_twice(shipped):
    from sklearn.datasets import load_digits

    source = load_digits()
    large = np.zeros((len(source.images), 28, 28), np.float32)
    for i, image in enumerate(source.images):  # Pillow enlarges, not the code under test
        picture = Image.fromarray(image.astype(np.float32) / 16)
        enlarged = picture.resize((22, 22), Image.Resampling.BICUBIC)
        large[i, 3:25, 3:25] = np.array(enlarged).clip(0, 1)
    splits = [shipped["digits"].split(s) for s in SPLITS]
    found = torch.cat([s.images for s in splits]).float().flatten(1) / 255  # (1740, 784)
    labels = torch.cat([s.labels for s in splits]).numpy()
    distance = torch.cdist(found, torch.from_numpy(large).flatten(1))  # (1740, 1797)
    two, rows = distance.topk(2, dim=1, largest=False)
    nearest = rows[:, 0].numpy()
    assert len(set(nearest)) == len(nearest) == 1740
    assert np.array_equal(source.target[nearest], labels)
    error = (found - torch.from_numpy(large).flatten(1)[nearest]).abs()
    assert error.mean() < 0.02
    assert error.mean(1).max() < 0.03
    assert (two[:, 0] < 0.6 * two[:, 1]).float().mean() > 0.95  # no other row is nearly as close
    assert "".join(shipped["digits"].classes) == "0123456789"


def test_classes_can_be_told_apart(shipped):
    """Labels fit the pictures: nearest class mean of train, on test, is far above chance."""
    for name, least in (("digits", 0.8), ("letters", 0.3), ("symbols", 0.3)):
        train, test = shipped[name].split("train"), shipped[name].split("test")
        x = train.images.float().flatten(1)
        means = torch.stack([x[train.labels == c].mean(0) for c in range(SHIPPED[name][0])])
        found = torch.cdist(test.images.float().flatten(1), means).argmin(1)
        assert (found == test.labels).float().mean() > least, name


def test_a_shipped_set_at_another_input_format(shipped):
    wide = Task("digits", InputFormat((3, 32, 32), *IMAGENET)).split("test")
    assert wide.images.shape == (600, 3, 32, 32)
    assert wide.images.dtype == torch.uint8
    assert torch.equal(wide.labels, shipped["digits"].split("test").labels)
    assert torch.equal(wide.images[:, 0], wide.images[:, 1])
    assert torch.equal(wide.images[:, 0], wide.images[:, 2])
    for n in range(0, 600, 50):
        small = shipped["digits"].split("test").images[n, 0].numpy().astype(np.float32)
        large = Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC)
        expected = torch.from_numpy(np.array(large)).clamp(0, 255)
        assert (wide.images[n, 0] - expected).abs().max() < 0.6  # rounding alone
    batch = InputFormat((3, 32, 32), *IMAGENET).normalise(wide.images[:5])
    assert batch.shape == (5, 3, 32, 32)


def test_write_sheet_stores_what_is_read(shipped, monkeypatch, tmp_path):
    monkeypatch.setenv("RMM_LAB_DATA", str(tmp_path))
    with pytest.raises(InputError, match="textures-reward"):
        Task("textures", GREY).split("reward")
    file = write_sheet("textures", "reward")
    assert file == tmp_path / "sets" / "textures-reward.png"
    assert torch.equal(
        Task("textures", GREY).split("reward").images, shipped["textures"].split("reward").images
    )
    monkeypatch.setenv("RMM_LAB_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="nowhere"):
        Task("textures", GREY).split("reward")


# ------------------------------------------------------------------------------------------ halves


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("split", SPLITS)
def test_halves_of_a_set_that_ships_are_its_parts(shipped, name, split):
    """As slices of the whole set: the classes stand one after another, equally many of each."""
    whole = shipped[name].split(split)
    n, k = len(whole) // 2, len(shipped[name].classes) // 2
    for half, rows, classes in (
        ("first", slice(0, n), slice(0, k)),
        ("second", slice(n, None), slice(k, None)),
    ):
        task = Task(f"{name}:{half}", GREY)
        assert task.name == f"{name}-{half}"
        assert task.classes == shipped[name].classes[classes]
        found = task.split(split)
        assert torch.equal(found.images, whole.images[rows])
        assert torch.equal(found.labels, whole.labels[rows] - (k if half == "second" else 0))
        assert (
            found.images.untyped_storage().nbytes() == found.images.numel()
        )  # the rest is not kept


def test_halves_at_another_input_format(shipped):
    whole = Task("digits", InputFormat((3, 32, 32), *IMAGENET)).split("test").images
    half = Task("digits:second", InputFormat((3, 32, 32), *IMAGENET)).split("test").images
    assert torch.equal(half, whole[300:])


@pytest.mark.parametrize(("n", "first"), [(4, 2), (5, 3), (6, 3)])
def test_halves_of_a_folder_are_its_parts(tmp_path, n, first):
    """Of an odd number of classes the first half has one more; the splits are the whole folder's."""
    root = tmp_path / "pets"
    write_marked(root, {"": dict(zip("abcdef", [7, 5, 9, 4, 6, 8][:n], strict=False))})
    every = read_marked(root)
    for half, classes in (("first", "abcdef"[:first]), ("second", "abcdef"[first:n])):
        task = Task(f"{root}:{half}", MARKED)
        assert (task.name, task.classes) == (f"pets-{half}", list(classes))
        for split in SPLITS:
            data = task.split(split)
            expected = [(k, c) for c, name in enumerate(classes) for k in every[split][name]]
            found = zip(data.images[:, 0, 0, 0].tolist(), data.labels.tolist(), strict=True)
            assert list(found) == expected


def test_too_few_classes_to_halve_and_a_folder_called_like_a_half(tmp_path, monkeypatch):
    write_images(tmp_path / "x", 0)
    for half in ("first", "second"):
        with pytest.raises(InputError, match="at least 4 classes to halve, found 3"):
            Task(f"{tmp_path / 'x'}:{half}", MARKED)
    (tmp_path / "x").rename(tmp_path / "x:first")
    assert Task(f"{tmp_path / 'x'}:first", MARKED).classes == ["class0", "class1", "class2"]
    with pytest.raises(InputError, match="no such folder"):
        Task(f"{tmp_path / 'x'}:second", MARKED)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"nothing behind 'digits', found ':third'"):
        Task("digits:third", MARKED)


def test_a_head_of_the_other_half_is_refused():
    task = Task("digits:second", GREY)
    task.check_head("model", 5, list("56789"))
    with pytest.raises(
        InputError, match=r"class 0 to be '5' as in images 'digits:second', found '0'"
    ):
        task.check_head("model", 5, list("01234"))
    with pytest.raises(InputError, match=r"head of 5 classes.*found 10"):
        task.check_head("model", 10, list("0123456789"))


# -------------------------------------------------------------------------------- the input format


@pytest.mark.parametrize("channels", [1, 3])
def test_normalise_equals_torchvisions(channels):
    mean, std = ((0.1307,), (0.3081,)) if channels == 1 else IMAGENET
    pixels = np.random.default_rng(0).integers(0, 256, (5, 9, 7, channels), dtype=np.uint8)
    steps = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    expected = torch.stack([steps(p) for p in pixels])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    found = InputFormat((channels, 9, 7), mean, std).normalise(images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "config",
    [
        {"input_size": [3, 224, 224], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9},
        {"input_size": [1, 20, 28], "mean": [0.1], "std": [0.3], "crop_pct": 1.0},
        {
            "input_size": [3, 64, 64],
            "mean": IMAGENET[0],
            "std": IMAGENET[1],
            "crop_pct": 0.875,
            "interpolation": "bilinear",
        },
    ],
)
def test_the_format_is_what_timm_resolves(config):
    expected = resolve_data_config(pretrained_cfg={"interpolation": "bicubic"} | config)
    found = InputFormat.of({"architecture": "x", "pretrained_cfg": config})
    assert found.shape == tuple(expected["input_size"])
    assert found.mean == tuple(expected["mean"])
    assert found.std == tuple(expected["std"])
    assert found.crop == expected["crop_pct"]
    assert found.interpolation == expected["interpolation"]


def test_model_args_win_over_pretrained_cfg():
    config = {"pretrained_cfg": {"input_size": [3, 224, 224]}}
    assert InputFormat.of(config).shape == (3, 224, 224)
    assert InputFormat.of(config | {"model_args": {"img_size": 32}}).shape == (3, 32, 32)
    args = {"img_size": [24, 40], "in_chans": 1}
    assert InputFormat.of(config | {"model_args": args}) == InputFormat((1, 24, 40), (0.5,), (0.5,))
    assert InputFormat.of(TINY).shape == (1, 8, 8)
    assert InputFormat.of({}) == InputFormat((3, 224, 224), (0.5,) * 3, (0.5,) * 3)


def test_a_grey_model_with_the_means_of_rgb_gets_one_channel():
    """timm itself takes the mean of the means."""
    cfg = {"input_size": [3, 28, 28], "mean": list(IMAGENET[0]), "std": list(IMAGENET[1])}
    fmt = InputFormat.of({"pretrained_cfg": cfg, "model_args": {"in_chans": 1}})
    images = torch.randint(256, (2, 1, 28, 28), dtype=torch.uint8)
    expected = (images / 255 - 0.449) / 0.226
    torch.testing.assert_close(fmt.normalise(images), expected, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------------- a user's folders: the splits
# Each picture carries its own number and its class in two pixels, so that any copy is recognised.

MARKED = InputFormat((1, 8, 8), (0.5,), (0.5,))


def write_marked(folder: Path, sizes: dict[str, dict[str, int]]) -> dict[str, dict[str, set[int]]]:
    """Pictures ``SPLIT/CLASS/N.png`` of given counts ("" for no split); returns their numbers."""
    numbers, n = {}, 0
    for split, classes in sizes.items():
        numbers[split] = {}
        for c, (name, count) in enumerate(classes.items()):
            (folder / split / name).mkdir(parents=True)
            numbers[split][name] = set(range(n, n + count))
            for i in range(count):
                pixels = np.full((8, 8), 128, np.uint8)
                pixels[0, 0], pixels[0, 1] = n, c
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
                n += 1
    assert n <= 256
    return numbers


def read_marked(folder: Path) -> dict[str, dict[str, list[int]]]:
    """The numbers of the pictures in each split and class of a task; checks the labels on the way."""
    task, found = Task(str(folder), MARKED), {}
    for split in SPLITS:
        data = task.split(split)
        found[split] = {c: [] for c in task.classes}
        for image, label in zip(data.images, data.labels, strict=True):
            assert image[0, 0, 1] == label
            found[split][task.classes[label]].append(int(image[0, 0, 0]))
    return found


def counts(found: dict) -> dict[str, list[int]]:
    return {split: [len(n) for n in classes.values()] for split, classes in found.items()}


def check_dealt(found: dict, numbers: dict) -> None:
    """Every picture of the pile is in exactly one of the splits, under its own class."""
    for name, pile in numbers.items():
        dealt = [n for classes in found.values() for n in classes[name]]
        assert sorted(dealt) == sorted(pile)


@pytest.mark.parametrize("seed_of_numpy", [1, 2])
def test_classes_alone_are_dealt_60_20_20(tmp_path, seed_of_numpy):
    np.random.seed(seed_of_numpy)  # a global seed has no say
    sizes = {"ant": 30, "bee": 11, "cat": 7, "dog": 3}
    numbers = write_marked(tmp_path, {"": sizes})[""]
    found = read_marked(tmp_path)
    assert counts(found) == {
        "train": [18, 7, 5, 1],
        "reward": [6, 2, 1, 1],
        "test": [6, 2, 1, 1],
    }
    check_dealt(found, numbers)
    assert read_marked(tmp_path) == found  # the same deal twice
    by_name = sorted(range(30), key=str)
    assert sorted(found["train"]["ant"]) != sorted(by_name[:18])  # drawn, not the first ones
    assert set(found["test"]["ant"]) != set(range(24, 30))


def test_a_deal_does_not_depend_on_where_the_folder_stands(tmp_path):
    write_marked(tmp_path / "here", {"": {"a": 20, "b": 20}})
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    assert read_marked(tmp_path / "here") == read_marked(tmp_path / "there")


def test_train_and_test_give_a_fifth_of_train_to_reward(tmp_path):
    sizes = {"train": {"a": 25, "b": 11, "c": 2}, "test": {"a": 3, "b": 1, "c": 4}}
    numbers = write_marked(tmp_path, sizes)
    found = read_marked(tmp_path)
    assert counts(found) == {"train": [20, 9, 1], "reward": [5, 2, 1], "test": [3, 1, 4]}
    assert {c: set(n) for c, n in found["test"].items()} == numbers["test"]
    check_dealt({s: found[s] for s in ("train", "reward")}, numbers["train"])
    assert read_marked(tmp_path) == found


@pytest.mark.parametrize("name", ["val", "valid", "validation", "reward"])
def test_train_and_val_report_val(tmp_path, name):
    sizes = {"train": {"a": 10, "b": 6}, name: {"a": 4, "b": 4}}
    numbers = write_marked(tmp_path, sizes)
    found = read_marked(tmp_path)
    assert counts(found) == {"train": [8, 5], "reward": [2, 1], "test": [4, 4]}
    assert {c: set(n) for c, n in found["test"].items()} == numbers[name]
    check_dealt({s: found[s] for s in ("train", "reward")}, numbers["train"])


@pytest.mark.parametrize("name", ["val", "valid", "validation", "reward"])
def test_three_splits_stay_as_they_are(tmp_path, name):
    sizes = {"train": {"a": 5, "b": 4}, name: {"a": 1, "b": 2}, "test": {"a": 3, "b": 1}}
    numbers = write_marked(tmp_path, sizes)
    (tmp_path / ".cache").mkdir()  # hidden folders are no classes
    (tmp_path / "README.md").write_text("about")
    found = read_marked(tmp_path)
    for split, own in (("train", "train"), ("reward", name), ("test", "test")):
        assert {c: set(n) for c, n in found[split].items()} == numbers[own]


@pytest.mark.parametrize("splits", [("train", "reward", "val"), ("train", "test", "val", "valid")])
def test_two_folders_for_one_split_are_refused(tmp_path, splits):
    write_images(tmp_path / "x", 0, splits=splits, per_class=3)
    with pytest.raises(InputError):
        Task(str(tmp_path / "x"), MARKED)


def test_folder_errors_say_where(tmp_path):
    def refused(message, sizes):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        write_marked(folder, sizes)
        with pytest.raises(InputError, match=message):
            Task(str(folder), MARKED)

    refused("at least 3 pictures.*found 2", {"": {"a": 5, "b": 2}})
    refused("at least 2 pictures.*found 1", {"train": {"a": 5, "b": 1}, "test": {"a": 1, "b": 1}})
    refused("two class folders", {"": {"a": 5}})
    refused("found none", {"": {"a": 5, "b": 0}})
    refused("'c'", {"train": {"a": 3, "b": 3}, "test": {"a": 3, "b": 3, "c": 3}})
    refused("'b'", {"train": {"a": 3, "b": 3, "c": 3}, "test": {"a": 3, "c": 3}})
    refused("train and test", {"test": {"a": 3, "b": 3}})
    refused("train and test", {"reward": {"a": 3, "b": 3}, "test": {"a": 3, "b": 3}})
    with pytest.raises(InputError, match=r"digits, letters.*no such folder"):
        Task("digit", MARKED)
    with pytest.raises(InputError, match="'val'"):
        Task("digits", MARKED).split("val")


def test_a_broken_picture_is_named(tmp_path):
    write_marked(tmp_path, {"": {"a": 3, "b": 3}})
    for i in range(3):
        file = tmp_path / "b" / f"{i}.png"
        file.write_bytes(file.read_bytes()[:30])
    task = Task(str(tmp_path), MARKED)  # no picture is opened yet
    with pytest.raises(InputError, match=r"b/\d\.png"):
        task.split("reward")


# ------------------------------------------------------------------- a user's folders: the pictures

REAL = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="module", params=["cifar10_jpg", "mnist_png"])
def real(request, tmp_path_factory) -> Path:
    """A few real pictures per class of a set as an ImageFolder: 5 to train and 3 to test."""
    source = REAL / request.param
    if not source.is_dir():
        pytest.skip(f"the real pictures are not here: no folder {source}")
    root = tmp_path_factory.mktemp(request.param)
    for split, count in (("train", 5), ("test", 3)):
        for folder in sorted(p for p in (source / split).iterdir() if p.is_dir()):
            (root / split / folder.name).mkdir(parents=True)
            for file in sorted(folder.iterdir())[:count]:
                shutil.copy(file, root / split / folder.name)
    return root


def check_against_timm(folder: Path, fmt: InputFormat, mode: str, transform) -> None:
    oracle, task = ImageFolder(str(folder / "test")), Task(str(folder), fmt)
    assert task.classes == oracle.classes
    split = task.split("test")
    assert split.images.dtype == torch.uint8
    assert split.images.shape == (30, *fmt.shape)
    assert split.labels.tolist() == oracle.targets
    expected = []
    for file, _ in oracle.samples:
        with Image.open(file) as picture:
            expected.append(transform(picture.convert(mode)))
    expected = torch.stack(expected)
    assert expected.std() > 0.1
    torch.testing.assert_close(fmt.normalise(split.images), expected)
    assert [len(task.split(s)) for s in ("train", "reward")] == [40, 10]


@pytest.mark.parametrize("channels", [1, 3])  # grey pictures for RGB models and the other way round
@pytest.mark.parametrize(
    ("size", "crop", "interpolation"),
    [((28, 28), 1.0, "bicubic"), ((24, 24), 0.875, "bilinear"), ((48, 40), 0.9, "bicubic")],
)
def test_real_pictures_are_prepared_as_timm_does(real, channels, size, crop, interpolation):
    mean, std = ((0.4,), (0.3,)) if channels == 1 else IMAGENET
    fmt = InputFormat((channels, *size), mean, std, interpolation, crop)
    transform = create_transform(
        (channels, *size),
        is_training=False,
        interpolation=interpolation,
        mean=mean,
        std=std,
        crop_pct=crop,
    )
    check_against_timm(real, fmt, "L" if channels == 1 else "RGB", transform)


@pytest.mark.parametrize(
    "crop_mode",
    [
        "center",
        pytest.param("squash"),
        pytest.param("border"),
    ],
)
def test_pictures_of_any_shape_are_cropped_as_the_model_says(tmp_path, crop_mode):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for c in "ab":
            (tmp_path / split / c).mkdir(parents=True)
            for n, shape in enumerate([(40, 60, 3), (50, 30, 3)]):
                pixels = rng.integers(0, 256, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / c / f"{n}.png")
    cfg = {"input_size": (3, 24, 24), "mean": IMAGENET[0], "std": IMAGENET[1], "crop_pct": 1.0}
    cfg |= {"interpolation": "bicubic", "crop_mode": crop_mode}
    fmt = InputFormat.of({"pretrained_cfg": cfg})
    transform = create_transform(**resolve_data_config(pretrained_cfg=cfg))
    expected = []
    for file, _ in ImageFolder(str(tmp_path / "test")).samples:
        with Image.open(file) as picture:
            expected.append(transform(picture))
    found = fmt.normalise(Task(str(tmp_path), fmt).split("test").images)
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_every_kind_of_picture_becomes_grey_or_rgb(tmp_path, mode):
    rng = np.random.default_rng(0)
    suffix = "jpg" if mode == "CMYK" else "png"
    for c in "ab":
        (tmp_path / c).mkdir()
        for n in range(3):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(tmp_path / c / f"{n}.{suffix}")
    for channels, target in ((1, "L"), (3, "RGB")):
        fmt = InputFormat((channels, 8, 8), (0.5,) * channels, (0.5,) * channels)
        task = Task(str(tmp_path), fmt)
        found = {i.numpy().tobytes() for s in SPLITS for i in task.split(s).images}
        expected = set()
        for file in tmp_path.rglob(f"*.{suffix}"):
            with Image.open(file) as picture:
                pixels = np.array(picture.convert(target)).reshape(8, 8, channels)
            expected.add(np.ascontiguousarray(pixels.transpose(2, 0, 1)).tobytes())
        assert found == expected
        assert len(found) == 6


def test_the_name_of_a_task_is_its_folders(tmp_path, monkeypatch):
    write_images(tmp_path / "pets", 0)
    assert Task(str(tmp_path / "pets"), MARKED).name == "pets"
    monkeypatch.chdir(tmp_path / "pets")
    assert Task(".", MARKED).name == "pets"


# --------------------------------------------------------------------------------------- the head


def test_a_head_must_have_the_tasks_classes(tmp_path):
    task = Task(str(write_images(tmp_path / "x", 0)), MARKED)
    names = ["class0", "class1", "class2"]
    task.check_head("model", 3, names)
    task.check_head("model", 3, None)
    with pytest.raises(InputError, match=r"3 classes.*found 4"):
        task.check_head("model", 4, None)
    message = re.escape("class 1 to be 'class1'") + ".*'class2'"
    with pytest.raises(InputError, match=message):
        task.check_head("model", 3, ["class0", "class2", "class2"])
    # Another order: which row of the head is which class.
    assert task.check_head("model", 3, ["class2", "class0", "class1"]) == [1, 2, 0]


@pytest.mark.parametrize("names", [["class0"], ["class0", "class1", "class2", "class3"]])
def test_label_names_of_another_length_are_refused(tmp_path, names):
    task = Task(str(write_images(tmp_path / "x", 0)), MARKED)
    with pytest.raises(InputError):
        task.check_head("model", 3, names)
