"""Folders of pictures as people have them: order of classes, what is read and how, what is said."""

from __future__ import annotations

import csv
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, write_model
from PIL import Image
from timm.data import resolve_data_config
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.models import get_pretrained_cfg

from rmm_lab.errors import InputError
from rmm_lab.families import checkpoint as models
from rmm_lab.families import vit
from rmm_lab.search import report
from rmm_lab.search.problem import load_problem, pool_of
from rmm_lab.tasks.groups import reader
from rmm_lab.tasks.image_task import InputFormat, Task
from rmm_lab.tasks.input_format import preprocessing

GREY = InputFormat((1, 8, 8), (0.5,), (0.5,))
RGB = InputFormat((3, 8, 8), (0.5,) * 3, (0.5,) * 3)


def picture(file: Path, value: int = 0, **options) -> Path:
    """A flat grey picture of 8 px."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8), value, np.uint8)).save(file, **options)
    return file


def folder(root: Path, classes=("a", "b"), n: int = 6) -> Path:
    """``CLASS/N.png``; the value of each picture is its number."""
    for c in classes:
        for i in range(n):
            picture(root / c / f"{i}.png", i)
    return root


def used(task: Task) -> set[Path]:
    return {file for split in ("train", "reward", "test") for file, _ in task.files(split)}


# ------------------------------------------------------------------------------- classes and heads


@pytest.mark.parametrize(
    "names",
    [
        [str(n) for n in range(1, 13)],
        ["Apple", "banana", "Cherry", "date"],
        ["x2y10", "x2y9", "x10", "X1", "n", "7", "a 03", "a 1"],
    ],
)
def test_classes_are_numbered_as_timms_reader_does(tmp_path, names):
    folder(tmp_path, names)
    task = Task(str(tmp_path), GREY)
    expected = find_images_and_targets(str(tmp_path))[1]
    assert {name: i for i, name in enumerate(task.classes)} == expected
    for split in ("train", "reward", "test"):
        labels = task.split(split).labels
        assert [expected[p.parent.name] for p, _ in task.files(split)] == labels.tolist()
        assert labels.tolist() == sorted(labels.tolist())
    assert any("timm" in note for note in task.notes) == (sorted(names) != task.classes)


def test_an_order_of_classes_does_not_change_what_is_drawn(tmp_path):
    """Renamed so that they keep their plain order, classes get the same pictures in each split."""
    one, two = folder(tmp_path / "1", ["1", "10", "2"]), folder(tmp_path / "2", ["a", "b", "c"])
    for split in ("train", "reward", "test"):
        found = []
        for root in (one, two):
            files = Task(str(root), GREY).files(split)
            classes = sorted({c for _, c in files})
            found.append({(classes.index(c), p.name) for p, c in files})
        assert found[0] == found[1]


def test_a_head_in_another_order_is_matched_by_name(tmp_path):
    names = ["grün", "rot", "blau"]
    data = folder(tmp_path / "data", [unicodedata.normalize("NFD", n) for n in names])
    base = write_model(tmp_path / "base", 0, num_classes=3)
    experts = [write_model(tmp_path / f"e{i}", i, num_classes=3) for i in (1, 2)]
    for expert in experts:
        file = expert / "config.json"
        config = json.loads(file.read_text("utf-8")) | {"label_names": names}
        file.write_text(json.dumps(config), "utf-8")
    problem = load_problem(list(map(str, experts)), base=str(base), images=[str(data)] * 2)
    assert problem.tasks[0].classes == ["blau", "grün", "rot"]  # composed, in the folders' order
    for expert, checkpoint in zip(experts, problem.pool.experts, strict=True):
        raw = models.read_checkpoint(expert).weights
        for key in ("weight", "bias"):
            rows = [raw[f"head.{key}"][names.index(c)] for c in problem.tasks[0].classes]
            assert torch.equal(checkpoint.weights[f"head.{key}"], torch.stack(rows))
        assert checkpoint.label_names == problem.tasks[0].classes


def test_slices_of_a_multi_task_model_are_matched_by_name_too(tmp_path):
    task = Task(str(folder(tmp_path / "pets", ["1", "2", "10"])), GREY)
    config = vit.joint_config(TINY, 3, {"other": ["x"], "pets": ["1", "10", "2"]})  # plain order
    weights = {"head.weight": torch.arange(8.0).view(4, 2), "head.bias": torch.arange(4.0)}
    joint = models.Checkpoint("joint", tmp_path, config, weights, "")
    head = vit.task_head(joint, task)
    assert head["bias"].tolist() == [1.0, 3.0, 2.0]
    assert head["weight"].tolist() == [[2.0, 3.0], [6.0, 7.0], [4.0, 5.0]]


def test_the_advice_is_never_to_edit_the_names(tmp_path):
    task = Task(str(folder(tmp_path / "pets", ["cat", "dog"])), GREY)
    with pytest.raises(InputError) as error:
        task.check_head("e", 2, ["cat", "cow"])
    assert "correct label_names" not in str(error.value)
    assert "'cow'" in str(error.value)


def test_an_expert_near_chance_names_likely_causes(problem):
    task = problem.tasks[0]
    rows = [report.Row(report.OWN, "", (task.chance("test"), 1.0))]
    rows += [report.Row(f"expert {name}", "", (0.3, 0.3)) for name in problem.pool.names]
    said = [note for note in report.remarks(rows, problem.tasks) if "chance" in note]
    assert len(said) == 1
    for cause in ("order of the experts", "classes in another order", "normalis"):
        assert cause in said[0]


# ------------------------------------------------------------------------------- what is read


def test_pictures_below_a_class_belong_to_it(tmp_path):
    folder(tmp_path, n=4)
    for c in "ab":
        for i in range(4):
            picture(tmp_path / c / "session2" / "x" / f"{i}.png")
    task = Task(str(tmp_path), GREY)
    assert sum(task.size(s) for s in ("train", "reward", "test")) == 16
    assert len(used(task)) == 16
    assert task.notes == []


@pytest.mark.parametrize("kind", ["jfif", "gif", "pgm", "jp2", "tga", "JPG", "TIFF", "bmp", "webp"])
def test_all_that_pillow_reads_is_read(tmp_path, kind):
    folder(tmp_path, n=3)
    names = {"jfif": "jpeg", "pgm": "ppm", "JPG": "jpeg", "jp2": "jpeg2000", "TIFF": "tiff"}
    for c in "ab":
        picture(tmp_path / c / f"x.{kind}", 200, format=names.get(kind, kind))
    task = Task(str(tmp_path), GREY)
    assert sum(task.size(s) for s in ("train", "reward", "test")) == 8
    values = torch.cat([task.split(s).images.flatten(1)[:, 0] for s in ("train", "reward", "test")])
    assert int((values > 190).sum()) == 2


def test_hidden_files_and_macos_leavings_are_no_pictures_and_the_rest_is_named(tmp_path):
    folder(tmp_path)
    (tmp_path / "a" / "._0.png").write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "._x.png").write_bytes(b"")
    (tmp_path / "a" / ".thumbs").mkdir()
    picture(tmp_path / "a" / ".thumbs" / "0.png")
    (tmp_path / "a" / ".DS_Store").write_bytes(b"")
    (tmp_path / "b" / "list.txt").write_text("")
    (tmp_path / "b" / "0.heic").write_bytes(b"")
    (tmp_path / "b" / "1.heic").write_bytes(b"")
    picture(tmp_path / "loose.png")
    task = Task(str(tmp_path), GREY)
    assert len(used(task)) == 12
    assert task.classes == ["a", "b"]
    assert len(task.notes) == 1
    assert task.notes[0].endswith(": 2 .heic, 1 .png, 1 .txt, 3 hidden .png")


def test_a_level_too_many_is_said(tmp_path):
    for name in ("one", "two"):
        folder(tmp_path / name, ["cat", "dog"])
    task = Task(str(tmp_path), GREY)
    assert task.classes == ["one", "two"]
    assert len(task.notes) == 1
    assert "lie in folders below" in task.notes[0]
    assert Task(str(tmp_path / "one"), GREY).notes == []


def test_a_loop_of_links_ends(tmp_path):
    folder(tmp_path)
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    assert len(used(Task(str(tmp_path), GREY))) == 12


def test_two_spellings_of_one_class_are_refused(tmp_path):
    folder(tmp_path, [unicodedata.normalize(f, "é") for f in ("NFC", "NFD")])
    with pytest.raises(InputError, match="'é' twice"):
        Task(str(tmp_path), GREY)


# ------------------------------------------------------------------------------- how it is read


def pixels(tmp_path, form: InputFormat, save) -> tuple[torch.Tensor, list[str]]:
    """A picture that ``save(file)`` writes, as a task gives it, and the task's notes."""
    folder(tmp_path, n=3)
    for split in ("train", "reward", "test"):
        for c in "ab":
            (tmp_path / "set" / split / c).mkdir(parents=True)
            save(tmp_path / "set" / split / c / "x.png")
    task = Task(str(tmp_path / "set"), form)
    return task.split("test").images[0], task.notes


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    deep = np.linspace(0, 65_535, 64).round().astype(np.uint16).reshape(8, 8)
    found, notes = pixels(tmp_path, GREY, lambda file: Image.fromarray(deep).save(file))
    assert np.array_equal(found[0].numpy(), np.round(deep / 65_535 * 255))
    assert "16 bits" in notes[0]
    assert "2 pictures" in notes[0]


def test_a_picture_is_turned_upright_as_a_viewer_shows_it(tmp_path):
    side = np.zeros((8, 8, 3), np.uint8)
    side[:, :2] = 255  # light on the left; turned by a quarter clockwise: at the top
    exif = Image.Exif()
    exif[0x0112] = 6
    found, notes = pixels(tmp_path, RGB, lambda file: Image.fromarray(side).save(file, exif=exif))
    assert found[:, :2].min() == 255
    assert found[:, 2:].max() == 0
    assert "EXIF" in notes[0]


def test_alpha_is_dropped_for_rgb_and_kept_for_rgba(tmp_path):
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[..., 0], clear[..., 3] = 200, 7
    found, notes = pixels(tmp_path / "1", RGB, lambda file: Image.fromarray(clear).save(file))
    assert found[:, 0, 0].tolist() == [200, 0, 0]  # what timm's loader gives: convert("RGB")
    assert "alpha" in notes[0]
    four = InputFormat((4, 8, 8), (0.5,) * 4, (0.5,) * 4)
    found, notes = pixels(tmp_path / "2", four, lambda file: Image.fromarray(clear).save(file))
    assert found[:, 0, 0].tolist() == [200, 0, 0, 7]
    assert notes == []
    shipped = Task("digits", InputFormat((4, 28, 28), (0.5,) * 4, (0.5,) * 4)).split("test").images
    assert shipped[:, 3].min() == 255
    assert torch.equal(shipped[:, 0], shipped[:, 2])


def test_numbers_without_a_range_and_other_channels_are_refused(tmp_path):
    floats = Image.fromarray(np.ones((8, 8), np.float32))
    with pytest.raises(InputError, match=r"x\.png.*32-bit"):
        pixels(tmp_path, GREY, lambda file: floats.save(file, format="tiff"))
    with pytest.raises(InputError, match="found 6"):
        InputFormat.of({"model_args": {"in_chans": 6}})


# ------------------------------------------------------------------- a config without preprocessing


@pytest.mark.parametrize(
    "architecture", ["deit3_small_patch16_224", "test_vit3", "vit_tiny_patch16_224"]
)
@pytest.mark.parametrize("more", [{}, {"pretrained_cfg": {"num_classes": 3}}])
def test_without_preprocessing_it_is_timms_for_the_architecture(architecture, more):
    expected = resolve_data_config(pretrained_cfg=get_pretrained_cfg(architecture).to_dict())
    found = InputFormat.of({"architecture": architecture, "num_classes": 3} | more)
    assert found.shape == tuple(expected["input_size"])
    assert (found.mean, found.std) == (tuple(expected["mean"]), tuple(expected["std"]))
    assert (found.crop, found.interpolation) == (expected["crop_pct"], expected["interpolation"])
    sized = InputFormat.of({"architecture": architecture, "model_args": {"img_size": 16}} | more)
    assert sized.shape == (3, 16, 16)
    assert sized.mean == found.mean


def test_keys_at_the_top_of_an_old_config_count():
    config = {"architecture": "vit_tiny_patch16_224", "mean": [0.1] * 3, "std": [0.2] * 3}
    config |= {"input_size": [3, 32, 32], "crop_pct": 0.5}
    found = InputFormat.of(config)
    assert (found.mean, found.shape, found.crop) == ((0.1,) * 3, (3, 32, 32), 0.5)
    assert preprocessing({"architecture": "no_such_model"}) == {}


def test_a_merged_model_keeps_the_preprocessing_and_size_that_its_base_implied(tmp_path):
    import timm

    config = vit.model_config({"architecture": "test_vit3"}, depth=None, num_classes=2)
    model = vit.create(config, depth=None, num_classes=2)
    models.write_checkpoint(tmp_path / "m", config, model.state_dict())
    again = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).eval()
    form = InputFormat.of(config)
    assert form.shape == (3, 160, 160)
    assert resolve_data_config(pretrained_cfg=again.pretrained_cfg)["mean"] == list(form.mean)
    images = torch.randn(1, *form.shape)
    assert torch.equal(again(images), model(images))


# ------------------------------------------------------------------------------------------- groups


def tracks(root: Path, classes=("00000", "00001"), n: int = 5, frames: int = 6, table=True) -> Path:
    """Tracks of frames of GTSRB, as unpacked."""
    for c, name in enumerate(classes):
        rows = []
        for track in range(n):
            for frame in range(frames):
                file = picture(root / name / f"{track:05}_{frame:05}.ppm", 10 * track + frame)
                rows.append([file.name, 8, 8, 0, 0, 7, 7, c])
        if table:
            with open(root / name / f"GT-{name}.csv", "w", newline="") as stream:
                writer = csv.writer(stream, delimiter=";")
                writer.writerow(
                    [
                        "Filename",
                        "Width",
                        "Height",
                        "Roi.X1",
                        "Roi.Y1",
                        "Roi.X2",
                        "Roi.Y2",
                        "ClassId",
                    ]
                )
                writer.writerows(rows)
    return root


def torn(task: Task) -> int:
    """Groups (class and track) that lie in more than one split."""
    places: dict[tuple[str, str], set[str]] = {}
    for split in ("train", "reward", "test"):
        for file, c in task.files(split):
            places.setdefault((c, file.name.partition("_")[0]), set()).add(split)
    assert len(places) == 10
    return sum(len(found) > 1 for found in places.values())


def test_gtsrb_is_read_as_downloaded_and_keeps_tracks_together(tmp_path):
    tracks(tmp_path / "GTSRB" / "Final_Training" / "Images")
    for source in (f"gtsrb:{tmp_path}", f"gtsrb:{tmp_path / 'GTSRB'}"):
        task = Task(source, RGB)
        assert (task.name, task.classes) == ("gtsrb", ["00000", "00001"])
        assert torn(task) == 0
        assert [task.size(s) for s in ("train", "reward", "test")] == [36, 12, 12]
    tests = tmp_path / "GTSRB" / "Final_Test" / "Images"
    for i in range(3):
        picture(tests / f"{i:05}.ppm")
    with pytest.raises(InputError, match=r"GT-final_test\.csv"):
        Task(source, RGB)
    with pytest.raises(InputError, match=r"gtsrb:"):
        Task(str(tmp_path / "GTSRB"), RGB)
    rows = "Filename;ClassId\n00000.ppm;1\n00001.ppm;0\n00002.ppm;1\n"
    (tests / "GT-final_test.csv").write_text(rows)
    task = Task(source, RGB)
    assert [task.size(s) for s in ("train", "reward", "test")] == [48, 12, 3]
    assert task.split("test").labels.tolist() == [0, 1, 1]
    assert torn_train(task) == 0


def torn_train(task: Task) -> int:
    groups = [{(c, p.name[:5]) for p, c in task.files(s)} for s in ("train", "reward")]
    return len(groups[0] & groups[1])


def test_a_random_split_that_tears_series_apart_is_said(tmp_path):
    root = tracks(tmp_path / "signs", table=False)
    task = Task(str(root), RGB)
    assert torn(task) > 0
    assert len(task.notes) == 1
    assert "10 series" in task.notes[0]
    assert "--groups" in task.notes[0]
    kept = Task(str(root), RGB, r"/(\d+)_")
    assert kept.notes == []
    assert torn(Task(str(root), RGB, r"^(\d+/\d+)_")) == 0
    assert Task(str(folder(tmp_path / "plain", n=9)), RGB).notes == []


def test_groups_of_a_table_stay_in_one_split_over_all_classes(tmp_path, monkeypatch):
    """Patient i gave a picture to each class."""
    monkeypatch.chdir(tmp_path)
    folder(Path("xray"), ["ill", "well"], n=10)
    rows = [f"{c}/{i}.png,patient{i}" for c in ("ill", "well") for i in range(10)]
    Path("who.csv").write_text("\n".join(["file,group", *rows]))
    task = Task("xray", GREY, "who.csv")
    owners = [{p.name for p, _ in task.files(s)} for s in ("train", "reward", "test")]
    assert [len(names) for names in owners] == [6, 2, 2]
    assert not owners[0] & owners[1] | owners[0] & owners[2] | owners[1] & owners[2]
    assert [task.size(s) for s in ("train", "reward", "test")] == [12, 4, 4]
    again = Task("xray", GREY, "who.csv")
    assert [again.files(s) for s in ("train", "test")] == [task.files(s) for s in ("train", "test")]


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ("none.csv", "none.csv"),
        ("empty.csv", "columns file and group"),
        ("short.csv", "a/0.png"),
        ("(", "regular expression"),
        ("x(y)", "a/0.png"),
        (r"(\w)/", "3 groups"),  # one group in each class
    ],
)
def test_bad_groups_are_refused_in_a_sentence(tmp_path, monkeypatch, groups, words):
    monkeypatch.chdir(tmp_path)
    folder(Path("set"))
    Path("empty.csv").write_text("")
    Path("short.csv").write_text("file,group\nb/0.png,x\n")
    with pytest.raises(InputError, match=words):
        Task("set", GREY, groups)


def test_a_table_of_groups_that_is_too_large_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "groups.csv"
    file.write_text("file,group\n" + "a/1.png,x\n" * 200_000)  # 2 MB
    monkeypatch.setattr("rmm_lab.tasks.plain.CONFIG_MB", 1)
    with pytest.raises(InputError, match=r"expected a table in UTF-8, .*more than 1 MiB"):
        reader(str(file), tmp_path)


def test_groups_are_part_of_a_problem_and_of_its_path(tmp_path):
    root = tracks(tmp_path / "signs", table=False)
    base = write_model(tmp_path / "base", 0, num_classes=2)
    experts = [str(write_model(tmp_path / f"e{i}", i, num_classes=2)) for i in (1, 2)]
    for name in ("base", "e1", "e2"):
        file = tmp_path / name / "config.json"
        config = {k: v for k, v in json.loads(file.read_text()).items() if k != "label_names"}
        file.write_text(json.dumps(config))
    options = {"base": str(base), "images": [str(root)] * 2, "calibration": 3}
    options |= {"groups": [r"^(\d+/\d+)_"], "operators": ["least_squares"]}
    problem = load_problem(experts, **options)
    assert [torn(task) for task in problem.tasks] == [0, 0]
    from rmm_lab.path import LayerPath
    from rmm_lab.reward import Step

    steps = [Step("least_squares", k) for k in range(3)]
    path = LayerPath.from_json(LayerPath.of(problem.pool, steps).to_json())
    assert torch.equal(
        pool_of(path).calibration.rows and torch.tensor(pool_of(path).calibration.rows[0]),
        torch.tensor(problem.pool.calibration.rows[0]),
    )
    with pytest.raises(InputError, match="--groups"):
        load_problem(experts, **(options | {"groups": ["a", "b", "c"]}))
    with pytest.raises(InputError, match="--groups"):
        load_problem(["colours", "answers"], groups=["a"])
