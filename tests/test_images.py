"""The paper's four image sets as they are downloaded, and pictures that are decoded on demand.

Small stand-ins of each official layout are written by other libraries: pandas' and datasets' parquet,
Pillow's JPEG and PNG, scipy's savemat.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import shutil
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import TINY, write_images, write_model
from PIL import Image
from torchvision.datasets import ImageFolder

from rmm_lab.errors import InputError
from rmm_lab.families import checkpoint as models
from rmm_lab.families import vit
from rmm_lab.reward import predict
from rmm_lab.search.problem import load_problem
from rmm_lab.tasks import image_folder as images
from rmm_lab.tasks.image_task import InputFormat, Task, image_formats
from rmm_lab.zoo.finetune import Finetune
from rmm_lab.zoo.training import fine_tune

SPLITS = ("train", "reward", "test")
GREY = InputFormat((1, 8, 8), (0.5,), (0.5,))
RGB = InputFormat((3, 8, 8), (0.5,) * 3, (0.5,) * 3)
REAL = Path(__file__).parents[2] / "shared" / "data"


# ------------------------------------------------------------------- stand-ins of the official layouts
# Each picture carries its number and its class in its first two pixels. JPEGs are of one grey, 4 x number.


def marked(n: int, label: int) -> np.ndarray:
    pixels = np.full((8, 8), 128, np.uint8)
    pixels[0, 0], pixels[0, 1] = n, label
    return pixels


def png(n: int, label: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(marked(n, label)).convert("RGB").save(file, "png")
    return file.getvalue()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> None:
    """What datasets makes of parquet files goes to a folder of the test's."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write_parquet(
    folder: Path, *, image: str = "img", label: str = "label", names: list[str] | None = None
) -> Path:
    """As on the hub: 4 classes in shuffled order, 10 pictures of each in train and 3 in test."""
    import datasets

    names = names if names is not None else ["ant", "bee", "cat", "dog"]
    kind = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = datasets.Features({image: datasets.Image(), label: kind})
    folder.mkdir(parents=True)
    rng, n = np.random.default_rng(0), 0
    for part, count in (("train", 10), ("test", 3)):
        labels = rng.permutation(np.repeat(np.arange(4), count)).tolist()
        rows = [{"bytes": png(n + i, c), "path": None} for i, c in enumerate(labels)]
        n += len(rows)
        data = datasets.Dataset.from_dict({image: rows, label: labels}, features=features)
        data.to_parquet(str(folder / f"{part}-00000-of-00001.parquet"))
    return folder


def write_cub(root: Path, classes: int = 4) -> Path:
    """CUB_200_2011 with 6 pictures of each class in train and 2 in test, in an order of its own."""
    lists: dict[str, list[str]] = {"images": [], "image_class_labels": [], "train_test_split": []}
    names = [f"{c + 1:03}.Bird_{'dcba'[c % 4]}" for c in range(classes)]
    rng = np.random.default_rng(0)
    numbers = rng.permutation(8 * classes) + 1
    for c, name in enumerate(names):
        (root / "images" / name).mkdir(parents=True)
        for i in range(8):
            n = int(numbers[8 * c + i])
            file = f"{name}/Bird_{i:04}_{n}.jpg"
            Image.new("L", (12, 10), 4 * n).save(root / "images" / file, quality=95)
            lists["images"].append(f"{n} {file}")
            lists["image_class_labels"].append(f"{n} {c + 1}")
            lists["train_test_split"].append(f"{n} {int(i % 4 > 0)}")
    for name, lines in lists.items():
        lines.sort(key=lambda line: int(line.split()[0]))
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
    (root / "classes.txt").write_text("".join(f"{c + 1} {n}\n" for c, n in enumerate(names)))
    return root


def write_dogs(root: Path, where: str = "lists") -> Path:
    """Images and the two MATLAB lists with 5 pictures of each breed in train and 2 in test."""
    from scipy.io import savemat

    breeds = [
        "n02085620-Chihuahua",
        "n02085782-Japanese_spaniel",
        "n02085936-Maltese_dog",
        "n02086079-Pug",
    ]
    rows: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    for c, breed in enumerate(breeds):
        (root / "Images" / breed).mkdir(parents=True)
        for i in range(7):
            name = f"{breed}/{breed.split('-')[0]}_{i}.jpg"
            Image.new("RGB", (9, 9), (4 * (7 * c + i),) * 3).save(
                root / "Images" / name, quality=95
            )
            rows["train" if i < 5 else "test"].append((name, c + 1))
    (root / where).mkdir(exist_ok=True)
    for part, pairs in rows.items():
        names = np.empty((len(pairs), 1), object)
        names[:, 0] = [name for name, _ in pairs]
        labels = np.array([[label] for _, label in pairs], np.uint8)
        savemat(root / where / f"{part}_list.mat", {"file_list": names, "labels": labels})
    return root


def numbers(task: Task, *, jpeg: bool = False) -> dict[str, dict[str, list[int]]]:
    """The numbers of the pictures of each split and class; checks the labels that pictures carry."""
    found: dict[str, dict[str, list[int]]] = {}
    for split in SPLITS:
        data = task.split(split)
        found[split] = {c: [] for c in task.classes}
        for i, label in enumerate(data.labels.tolist()):
            image = data.images[i]
            n = round(int(image[0, 4, 4]) / 4) if jpeg else int(image[0, 0, 0])
            found[split][task.classes[label]].append(n)
    return found


def counts(found: dict) -> dict[str, list[int]]:
    return {split: [len(n) for n in classes.values()] for split, classes in found.items()}


# ------------------------------------------------------------------------------ CIFAR-10, CIFAR-100


@pytest.mark.parametrize(
    ("name", "image", "label"), [("cifar10", "img", "label"), ("cifar100", "image", "fine_label")]
)
def test_cifar_from_parquet(tmp_path, cache, name, image, label):
    folder = write_parquet(tmp_path / "x" / "plain_text", image=image, label=label)
    task = Task(f"{name}:{tmp_path / 'x'}", GREY)
    assert (task.name, task.classes) == (name, ["ant", "bee", "cat", "dog"])
    found = numbers(task)
    assert counts(found) == {"train": [8] * 4, "reward": [2] * 4, "test": [3] * 4}
    import pandas

    for part, splits in (("train", ("train", "reward")), ("test", ("test",))):
        table = pandas.read_parquet(folder / f"{part}-00000-of-00001.parquet")
        for c, own in enumerate(task.classes):
            there = table[image][table[label] == c]
            expected = [int(np.array(Image.open(io.BytesIO(r["bytes"])))[0, 0, 0]) for r in there]
            assert sorted(n for s in splits for n in found[s][own]) == sorted(expected)
    assert numbers(Task(f"{name}:{folder}", GREY)) == found  # the folder itself, and the same draw


def test_a_parquet_file_without_names_has_numbers(tmp_path, cache):
    write_parquet(tmp_path / "x", names=[])
    assert Task(f"cifar10:{tmp_path / 'x'}", GREY).classes == ["0", "1", "2", "3"]


def test_parquet_pictures_have_their_labels(tmp_path, cache):
    write_parquet(tmp_path / "x")
    task = Task(f"cifar10:{tmp_path / 'x'}", RGB)
    for split in SPLITS:
        data = task.split(split)
        assert data.images.shape == (len(data), 3, 8, 8)
        assert data.images[:, 0, 0, 1].tolist() == data.labels.tolist()


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real pictures in {REAL}")
def test_cifar_from_an_image_folder(tmp_path):
    """A few real pictures: the tree is read as torchvision reads it."""
    for split, count in (("train", 10), ("test", 2)):
        for folder in sorted(p for p in (REAL / "cifar10_jpg" / split).iterdir() if p.is_dir()):
            (tmp_path / split / folder.name).mkdir(parents=True)
            for file in sorted(folder.iterdir())[:count]:
                shutil.copy(file, tmp_path / split / folder.name)
    fmt = InputFormat((3, 32, 32), (0.5,) * 3, (0.5,) * 3)
    task, whole = Task(f"cifar10:{tmp_path}", fmt), Task(str(tmp_path), fmt)
    oracle = ImageFolder(str(tmp_path / "test"))
    assert (task.name, task.classes) == ("cifar10", oracle.classes)
    assert task.split("test").labels.tolist() == oracle.targets
    expected = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p, _ in oracle])
    assert torch.equal(task.split("test").images[:], expected)
    for split, n in (("train", 80), ("reward", 20)):
        assert len(task.split(split)) == n
        assert torch.equal(task.split(split).images[:], whole.split(split).images[:])


def test_pickles_and_other_folders_are_refused_with_what_to_fetch(tmp_path):
    batches = tmp_path / "cifar-10-batches-py"
    batches.mkdir()
    (batches / "data_batch_1").write_bytes(pickle.dumps({b"data": []}))
    message = r"train\*.parquet.*found data_batch_1; get train-00000.*uoft-cs/cifar10.*pickles"
    with pytest.raises(InputError, match=message):
        Task(f"cifar10:{batches}", GREY)
    with pytest.raises(InputError, match=r"a folder .*found none; .*uoft-cs/cifar100"):
        Task(f"cifar100:{tmp_path / 'nowhere'}", GREY)


def test_parquet_files_that_do_not_fit_are_refused(tmp_path, cache):
    write_parquet(tmp_path / "x")
    with pytest.raises(InputError, match=r"fine_label, found img, label"):
        Task(f"cifar100:{tmp_path / 'x'}", GREY)
    (tmp_path / "x" / "test-00000-of-00001.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match=r"parquet files that can be read.*broken"):
        Task(f"cifar10:{tmp_path / 'x'}", GREY)


# -------------------------------------------------------------------------------------- CUB-200-2011


def test_cub_from_its_official_folder(tmp_path):
    root = write_cub(tmp_path / "CUB_200_2011")
    task = Task(f"cub200:{root}", GREY)
    assert task.name == "cub200"
    assert task.classes == ["001.Bird_d", "002.Bird_c", "003.Bird_b", "004.Bird_a"]
    found = numbers(task, jpeg=True)
    assert counts(found) == {"train": [5] * 4, "reward": [1] * 4, "test": [2] * 4}
    files = dict(line.split() for line in (root / "images.txt").read_text().splitlines())
    split = dict(line.split() for line in (root / "train_test_split.txt").read_text().splitlines())
    for c in task.classes:
        own = {n for n, file in files.items() if file.startswith(f"{c}/")}
        assert set(found["test"][c]) == {int(n) for n in own if split[n] == "0"}
        assert {*found["train"][c], *found["reward"][c]} == {int(n) for n in own if split[n] == "1"}
    assert numbers(Task(f"cub200:{tmp_path}", GREY), jpeg=True) == found  # or what it lies in


def test_broken_lists_of_cub_are_refused(tmp_path):
    def refused(message: str, name: str, change) -> None:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        file = write_cub(root) / name
        lines = file.read_text().splitlines()
        file.write_text("\n".join(change(lines)) + "\n")
        with pytest.raises(InputError, match=message) as error:
            Task(f"cub200:{root}", GREY)
        assert "CUB_200_2011.tgz" in str(error.value)

    refused("the same pictures.*number 32 in one", "image_class_labels.txt", lambda x: x[:-1])
    refused("class of classes.txt.*class 9", "image_class_labels.txt", lambda x: [*x[:-1], "32 9"])
    refused("split of 0 or 1.*split 2", "train_test_split.txt", lambda x: ["1 2", *x[1:]])
    refused("a new number and a text", "images.txt", lambda x: [*x, x[0]])
    refused("a new number and a text", "classes.txt", lambda x: ["one", *x[1:]])
    refused("no such file", "images.txt", lambda x: [x[0] + "x", *x[1:]])
    refused("twice", "images.txt", lambda x: [x[0], "2 " + x[0].split()[1], *x[2:]])
    refused("in test", "train_test_split.txt", lambda x: [f"{n + 1} 1" for n in range(len(x))])
    root = write_cub(tmp_path / "last")
    (root / "train_test_split.txt").unlink()
    with pytest.raises(InputError, match=r"expected train_test_split.txt in .*found classes.txt"):
        Task(f"cub200:{root}", GREY)


# ------------------------------------------------------------------------------------ Stanford Dogs


@pytest.mark.parametrize("where", ["lists", "."])
def test_dogs_from_their_official_folder(tmp_path, where):
    root = write_dogs(tmp_path / "dogs", where)
    task = Task(f"dogs:{root}", GREY)
    assert task.name == "dogs"
    assert task.classes == sorted(p.name for p in (root / "Images").iterdir())
    found = numbers(task, jpeg=True)
    assert counts(found) == {"train": [4] * 4, "reward": [1] * 4, "test": [2] * 4}
    for c, breed in enumerate(task.classes):
        assert found["test"][breed] == [7 * c + 5, 7 * c + 6]
        assert sorted(found["train"][breed] + found["reward"][breed]) == [
            7 * c + i for i in range(5)
        ]


def test_dogs_without_their_lists_are_refused(tmp_path):
    root = write_dogs(tmp_path / "dogs")
    (root / "lists" / "test_list.mat").write_bytes(b"MATLAB 5.0, cut off")
    with pytest.raises(InputError, match=r"file_list and labels in .*test_list.mat"):
        Task(f"dogs:{root}", GREY)
    (root / "lists" / "test_list.mat").unlink()
    with pytest.raises(InputError, match=r"lists/test_list.mat .*lists.tar.*found Images, lists;"):
        Task(f"dogs:{root}", GREY)
    (root / "Images").rename(root / "images_of_dogs")
    with pytest.raises(InputError, match="the folder Images"):
        Task(f"dogs:{root}", GREY)


def test_without_scipy_or_datasets_the_error_says_what_to_install(tmp_path, monkeypatch, cache):
    dogs, cifar = write_dogs(tmp_path / "dogs"), write_parquet(tmp_path / "cifar")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    for source, library in ((f"dogs:{dogs}", "scipy"), (f"cifar10:{cifar}", "datasets")):
        with pytest.raises(InputError, match=rf"library {library},.*pip install -e"):
            Task(source, GREY)


# ---------------------------------------------------------------------------------- halves, and the hub


@pytest.mark.parametrize("write", [write_cub, write_dogs])
def test_halves_of_an_official_set_are_parts_of_the_whole(tmp_path, write):
    name = {"write_cub": "cub200", "write_dogs": "dogs"}[write.__name__]
    source = f"{name}:{write(tmp_path / 'x')}"
    whole = Task(source, GREY)
    halves = [Task(f"{source}:{half}", GREY) for half in ("first", "second")]
    assert [t.name for t in halves] == [f"{name}-first", f"{name}-second"]
    assert [t.classes for t in halves] == [whole.classes[:2], whole.classes[2:]]
    every = numbers(whole, jpeg=True)
    for half in halves:
        assert numbers(half, jpeg=True) == {
            s: {c: every[s][c] for c in half.classes} for s in every
        }
        assert set(half.split("test").labels.tolist()) == {0, 1}


@pytest.mark.parametrize("text", ["cifar:x", "imagenet:hf-hub", "winogrande:x"])
def test_an_unknown_format_is_refused(text):
    with pytest.raises(InputError, match="one of the formats cifar10, cifar100, cub200, dogs"):
        Task(text, GREY)


HALVES = "expected :first or :second, a half of its classes, or nothing behind {!r}, found {!r}"


@pytest.mark.parametrize("part", [":third", ":First", ":1", ":", ":train", ":first:second"])
@pytest.mark.parametrize("place", ["{}", "cub200:{}", "cifar10:{}", "digits"])
def test_what_stands_behind_a_folder_is_a_half(tmp_path, monkeypatch, place, part):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "i1", 1)
    for folder in ("i1", tmp_path / "i1"):
        source = place.format(folder) + part
        first = "digits" if place == "digits" else str(folder)
        said = re.escape(f"images {source!r}: {HALVES.format(first, part)}; correct it")
        if part.endswith("second"):
            said = "^images .*, found ':first(:second)?'; correct it$"
        with pytest.raises(InputError, match=said):
            Task(source, GREY)


def test_a_name_of_the_hubs_needs_its_format():
    for source in ("hf-hub:uoft-cs/cifar10", "hf-hub:cub200"):
        with pytest.raises(InputError, match=r"FORMAT:FOLDER or FORMAT:hf-hub.* 'hf-hub'"):
            Task(source, GREY)


def test_groups_for_splits_that_are_given_are_noted(tmp_path):
    write_images(tmp_path / "i1", 1)
    said = "its splits are given, so that --groups changes nothing"
    assert not [n for n in Task(str(tmp_path / "i1"), GREY).notes if said in n]
    assert [n for n in Task(str(tmp_path / "i1"), GREY, "(.)").notes if said in n]
    write_images(tmp_path / "i2", 1, splits=("train", "test"))
    assert not [n for n in Task(str(tmp_path / "i2"), GREY, r"(\d+)\.").notes if said in n]


def test_a_format_needs_a_folder():
    with pytest.raises(InputError, match="after the colon, found nothing"):
        Task("cub200:", GREY)


@pytest.mark.parametrize("name", ["cub200", "dogs"])
def test_sets_that_the_hub_has_not_say_what_to_fetch(name):
    with pytest.raises(InputError, match=r"unpack .*, and give .*:FOLDER, or name a copy"):
        Task(f"{name}:hf-hub", GREY)


def test_offline_the_hub_is_refused_at_once(monkeypatch):
    def no_network(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", no_network)
    with pytest.raises(InputError, match=r"uoft-cs/cifar10 on the hub.*neither.*cifar10:FOLDER"):
        Task("cifar10:hf-hub:first", GREY)


def test_the_hub_is_asked_for_the_set_or_the_copy_named(tmp_path, monkeypatch, cache):
    import datasets

    write_parquet(tmp_path / "x")
    files = {p: str(tmp_path / "x" / f"{p}-00000-of-00001.parquet") for p in ("train", "test")}
    data, asked = datasets.load_dataset("parquet", data_files=files), []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or data)
    tasks = [Task(f"{s}:first", GREY) for s in ("cifar10:hf-hub", "cub200:hf-hub:ann/birds@v2")]
    assert [t.name for t in tasks] == ["cifar10-first", "cub200-first"]
    assert [t.classes for t in tasks] == [["ant", "bee"]] * 2
    assert [(a[0], k["revision"]) for a, k in asked] == [
        ("uoft-cs/cifar10", None),
        ("ann/birds", "v2"),
    ]
    assert not any(k["trust_remote_code"] for _, k in asked)
    del data["test"]
    with pytest.raises(InputError, match="the splits train and test, found train"):
        Task("cifar10:hf-hub", GREY)


# ------------------------------------------------------------------------- pictures decoded on demand


@pytest.fixture
def two(tmp_path, monkeypatch) -> tuple[Task, Task]:
    """One set decoded at once and one that decodes on demand."""
    source = f"cub200:{write_cub(tmp_path / 'CUB_200_2011')}"
    kept, lazy = Task(source, GREY), Task(source, GREY)
    for split in SPLITS:
        kept.split(split)
    monkeypatch.setattr(images, "KEPT_MB", 0)
    for split in SPLITS:
        lazy.split(split)
    return kept, lazy


def test_pictures_on_demand_are_those_decoded_at_once(two):
    kept, lazy = two
    for split in SPLITS:
        a, b = kept.split(split), lazy.split(split)
        assert isinstance(a.images, torch.Tensor)
        assert isinstance(b.images, images.Pictures)
        assert len(b) == len(b.images) == len(a)
        assert torch.equal(a.labels, b.labels)
        mask = a.labels == 1
        for rows in (slice(None), slice(2, 5), np.array([3, 0, 3]), torch.tensor([1, 2]), mask):
            assert torch.equal(a.images[rows], b.images[rows])
            if not isinstance(rows, torch.Tensor):
                assert torch.equal(kept.batch(split, rows), lazy.batch(split, rows))
        assert torch.equal(a.images[3], b.images[3])


def test_a_split_is_kept_up_to_the_limit(tmp_path, monkeypatch):
    """20 pictures of 1 x 512 x 512 bytes are 5 MiB."""
    source = f"cub200:{write_cub(tmp_path)}"
    for limit, kind in ((5, torch.Tensor), (4, images.Pictures)):
        monkeypatch.setattr(images, "KEPT_MB", limit)
        task = Task(source, InputFormat((1, 512, 512), (0.5,), (0.5,)))
        assert isinstance(task.split("train").images, kind)


def test_a_picture_on_demand_that_is_broken_is_found_before_the_work_or_in_it(
    tmp_path, monkeypatch
):
    root = write_cub(tmp_path / "x")
    monkeypatch.setattr(images, "KEPT_MB", 0)
    good = Task(f"cub200:{root}", GREY)
    files = sorted((root / "images" / good.classes[0]).iterdir())
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    for file in files:
        Image.fromarray(pixels).save(file)
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])  # its header can be read
    good.split("train")
    with pytest.raises(InputError, match=r"Bird_.*\.jpg is broken"):
        good.batch("train", slice(0, 5))
    files[0].write_bytes(content[:10])
    with pytest.raises(InputError, match=r"Bird_.*\.jpg is broken"):
        _ = [Task(f"cub200:{root}", GREY).split(split) for split in SPLITS]


def test_pictures_that_go_to_another_process_need_no_files(two, tmp_path):
    kept, lazy = two
    sent = pickle.dumps(lazy.split("reward"))
    shutil.rmtree(tmp_path / "CUB_200_2011")
    assert torch.equal(pickle.loads(sent).images[:], kept.split("reward").images)


def test_fine_tuning_and_scoring_are_the_same_on_demand(two):
    """To the bit: weights after some steps, and the answers of the fine-tuned model."""
    config = vit.model_config(TINY, depth=3, num_classes=4)
    torch.manual_seed(0)
    start = dict(vit.create(TINY, depth=None, num_classes=4).state_dict())
    base = models.Checkpoint("base", Path("."), config, start, "0")
    found = []
    for task in two:
        config, weights = fine_tune(base, [task], steps=4, learning_rate=1e-2, seed=0, batch_size=8)
        architecture, parts = models.architecture(config), vit.split(weights)
        layers = [architecture.layer(k, w) for k, w in enumerate(parts.layers)]
        stem = architecture.stem(parts.stem)
        answers = predict(architecture, stem, layers, parts.head, task, "test")
        found.append((weights, answers))
    assert all(torch.equal(found[0][0][k], found[1][0][k]) for k in found[0][0])
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][0]["blocks.0.mlp.fc1.weight"], start["blocks.0.mlp.fc1.weight"])


# -------------------------------------------------------------------------- all the way: the command


def test_halves_of_an_official_set_from_fine_tuning_to_a_problem(tmp_path, capsys):
    source = f"cub200:{write_cub(tmp_path / 'CUB_200_2011')}"
    base = write_model(tmp_path / "base", 0)
    halves = [f"{source}:first", f"{source}:second"]
    for out, sets in (("e1", halves[:1]), ("e2", halves[1:]), ("both", halves)):
        options = {"steps": 2, "batch_size": 8, "threads": 1}
        Finetune(base=str(base), out=tmp_path / out, images=tuple(sets), **options).run()
    assert "cub200-second: " in capsys.readouterr().out
    config = json.loads((tmp_path / "e2" / "config.json").read_text())
    assert config["label_names"] == ["003.Bird_b", "004.Bird_a"]
    heads = json.loads((tmp_path / "both" / "config.json").read_text())["rmm_lab"]["heads"]
    assert heads == {"cub200-first": [0, 2], "cub200-second": [2, 4]}
    experts = (str(tmp_path / "e1"), str(tmp_path / "e2"))
    problem = load_problem(
        experts, base=str(base), images=halves, multi_task=str(tmp_path / "both")
    )
    assert [t.name for t in problem.tasks] == ["cub200-first", "cub200-second"]
    assert problem.multi_task is not None
    with pytest.raises(InputError, match=r"class 0 to be '003.Bird_b'"):
        load_problem(experts, base=str(base), images=halves[::-1])


def test_the_formats_are_listed_where_a_name_is_wrong():
    with pytest.raises(
        InputError, match=r"digits, letters.*FORMAT:FOLDER \(cifar10, .*dogs, gtsrb\)"
    ):
        Task("digit", GREY)
    assert set(image_formats.FORMATS) == {"cifar10", "cifar100", "cub200", "dogs"}
