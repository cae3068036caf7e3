"""Bad input: one sentence on stderr, exit code 2, no traceback, and nothing written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, write_images, write_model
from PIL import Image
from safetensors.torch import load_file, save_file

from rmm_lab import ppo
from rmm_lab.errors import InputError
from rmm_lab.families import checkpoint as models
from rmm_lab.families import vit
from rmm_lab.operators import OPERATORS
from rmm_lab.path import LayerPath
from rmm_lab.search.problem import load_problem
from rmm_lab.search.run_folder import from_csv
from rmm_lab.zoo import build as zoo

REPOSITORY = Path(__file__).resolve().parent.parent


# ------------------------------------------------------------------------------------- helpers


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Every test works in an empty folder of its own, where anything written by mistake shows."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listing() -> set[str]:
    return {str(p) for p in Path.cwd().rglob("*")}


def one_error(err: str, *words: object) -> None:
    lines = [line for line in err.splitlines() if line.strip()]
    assert "Traceback" not in err
    assert len(lines) == 1, err
    assert lines[0].startswith("error: "), err
    for word in words:
        assert str(word) in lines[0], f"{word!r} is not in: {lines[0]}"


def refused(capsys, argv, *words: object) -> None:
    """``main`` refuses: exit code 2, one line on stderr that holds all words, nothing written."""
    argv = [str(a) for a in argv]
    if "--run-dir" not in argv and "--resume" not in argv:
        argv += ["--run-dir", "run"]
    before = listing()
    rc = ppo.main(argv)
    assert rc == 2
    one_error(capsys.readouterr().err, *words)
    assert not Path("run").exists()
    assert listing() == before


class Own:
    """The tiny problem's folders; what a test alters is copied first."""

    def __init__(self, tiny: dict) -> None:
        self.base, self.experts, self.images = tiny["base"], [*tiny["experts"]], [*tiny["images"]]

    def expert(self, i: int = 1) -> Path:
        self.experts[i] = shutil.copytree(self.experts[i], f"expert{i}")
        return Path(self.experts[i])

    def pictures(self, i: int = 1) -> Path:
        self.images[i] = shutil.copytree(self.images[i], f"images{i}")
        return Path(self.images[i])

    def configure(self, change, i: int = 1) -> Path:
        """Alter config.json of a copied expert."""
        file = self.expert(i) / "config.json"
        config = json.loads(file.read_text("utf-8"))
        change(config)
        file.write_text(json.dumps(config), "utf-8")
        return file

    def weights(self, change, i: int = 1) -> Path:
        """Alter model.safetensors of a copied expert."""
        file = self.expert(i) / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        return file

    def models(self) -> list[str]:
        return ["--base", self.base, "--experts", *self.experts]

    def argv(self, *more: object) -> list[str]:
        return [*self.models(), "--images", *self.images, "--quiet", *map(str, more)]


@pytest.fixture
def own(tiny) -> Own:
    return Own(tiny)


def python(*argv: object, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, argv)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment(**env),
    )


def environment(**more: str) -> dict[str, str]:
    proxies = ("http_proxy", "https_proxy", "all_proxy")
    env = {k: v for k, v in os.environ.items() if k.lower() not in proxies}
    return env | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "NO_PROXY": "*"} | more


def name_of(value) -> str | None:
    """A test's name from what it changes: an option, or the keys of a dictionary."""
    if isinstance(value, dict):
        return "-".join(f"{k}={v}" for k, v in value.items())[:40]
    return value[0] if isinstance(value, list) and value[0].startswith("--") else ""


# -------------------------------------------------------------------------- the kit is sane first


def test_the_untouched_problem_is_accepted(own, capsys):
    """All other tests alter one thing of this command line, which alone is good."""
    assert ppo.main(own.argv("--episodes", 2, "--run-dir", "run")) == 0
    assert capsys.readouterr().err == ""
    assert (Path("run") / "path.json").is_file()
    assert not [p for p in listing() if p.endswith(".tmp")]


# ------------------------------------------------------------------- models: shape, architecture


def write_variant(folder: str, num_classes: int = 3, **model_args) -> str:
    """A tiny ViT as a timm folder with other ``model_args``."""
    config = vit.model_config(TINY, depth=None, num_classes=num_classes)
    config["model_args"] |= model_args
    weights = vit.create(config, depth=None, num_classes=num_classes).state_dict()
    config["label_names"] = [f"class{i}" for i in range(num_classes)]
    models.write_checkpoint(Path(folder), config, weights)
    return folder


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"depth": 2}, ["blocks.2.", "(16,)", "no such tensor"]),
        ({"depth": 4}, ["blocks.3.", "besides"]),
        ({"embed_dim": 32}, ["blocks.0.attn.proj.bias", "(16,)", "(32,)"]),
        ({"mlp_ratio": 2}, ["blocks.0.mlp.fc1.bias", "(64,)", "(32,)"]),
        ({"patch_size": 2}, ["patch_embed.proj.weight", "(16, 1, 4, 4)", "(16, 1, 2, 2)"]),
        ({"in_chans": 3}, ["patch_embed.proj.weight", "(16, 1, 4, 4)", "(16, 3, 4, 4)"]),
        ({"qkv_bias": False}, ["attn.qkv.bias", "(48,)", "no such tensor"]),
        ({"num_heads": 4}, ["'num_heads': 2", "'num_heads': 4"]),  # the same shapes
    ],
    ids=name_of,
)
def test_experts_of_another_shape(own, capsys, args, words):
    own.experts[1] = write_variant("other", **args)
    refused(capsys, own.argv(), "'other'", own.base, *words, "merge only models")


def test_expert_of_another_architecture_by_name(own, capsys):
    own.configure(lambda c: c.update(architecture="vit_small_patch16_224"))
    refused(capsys, own.argv(), "expert1", "vit_tiny_patch16_224", "vit_small_patch16_224")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["blocks.1.mlp.fc2.weight", "head.bias"])
def test_weights_that_are_not_finite(own, capsys, value, name):
    own.weights(lambda w: w[name].view(-1)[0].fill_(value))
    refused(capsys, own.argv(), "expert1", f"{name!r}", "1 NaN or Inf")


def test_base_that_is_not_finite(own, capsys):
    own.base = shutil.copytree(own.base, "origin")
    file = Path("origin/model.safetensors")
    weights = load_file(file)
    weights["norm.bias"][:] = float("nan")
    save_file(weights, file)
    refused(capsys, own.argv(), "'origin'", "'norm.bias'", "16 NaN or Inf")


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated_weights(own, capsys, keep):
    file = own.expert() / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    refused(capsys, own.argv(), file, "truncated or altered", "copy or download it again")


@pytest.mark.parametrize(
    "change",
    [
        lambda b: (2**62).to_bytes(8, "little") + b[8:],  # a header of absurd length
        lambda b: b[:8] + b"#" + b[9:],  # a header that is no JSON
        lambda b: b.replace(b'"F32"', b'"F99"', 1),  # a dtype that does not exist
        lambda b: b.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1),  # a hole in the data
        lambda b: b + b"more",  # data that belong to no tensor
        lambda b: pickle.dumps({"w": 1}),  # another format under the name
    ],
    ids=["length", "json", "dtype", "offsets", "longer", "pickle"],
)
def test_altered_weights(own, capsys, change):
    file = own.expert() / "model.safetensors"
    content = file.read_bytes()
    altered = change(content)
    assert altered != content
    file.write_bytes(altered)
    refused(capsys, own.argv(), file, "truncated or altered")


def test_a_layer_is_missing(own, capsys):
    def drop(weights):
        for name in [n for n in weights if n.startswith("blocks.1.")]:
            del weights[name]

    own.weights(drop)
    refused(capsys, own.argv(), "expert1", "blocks.1.", "no such tensor")


def test_a_layer_is_missing_everywhere(own, capsys):
    own.base = shutil.copytree(own.base, "origin")
    for folder in (Path("origin"), own.expert(0), own.expert(1)):
        weights = load_file(folder / "model.safetensors")
        kept = {k: v for k, v in weights.items() if not k.startswith("blocks.1.")}
        save_file(kept, folder / "model.safetensors")
    refused(capsys, own.argv(), "blocks.0 to blocks.1", "[0, 2]")


# ----------------------------------------------------------------------------- models: the folder


@pytest.mark.parametrize("which", ["base", "expert", "multi-task"])
def test_missing_model_folder(own, capsys, which):
    if which == "base":
        own.base = "nowhere"
    elif which == "expert":
        own.experts[0] = "nowhere"
    more = ["--multi-task", "nowhere"] if which == "multi-task" else []
    refused(capsys, own.argv(*more), "'nowhere'", "there is no folder", "check the spelling")


def test_missing_local_dir(own, capsys):
    own.base = "local-dir:nowhere"
    refused(capsys, own.argv(), "local-dir:nowhere", "there is no folder nowhere")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file(own, capsys, name):
    (own.expert() / name).unlink()
    refused(capsys, own.argv(), "expert1", f"no {name}", "safe_serialization=True")


class Evil:
    """Unpickling this leaves a mark."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_pickles_are_never_read(own, capsys, monkeypatch):
    folder = own.expert()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    torch.save({"weight": Evil()}, folder / "model.pt")

    def forbidden(*args, **kwargs):
        raise AssertionError("a pickle was opened")

    monkeypatch.setattr(torch, "load", forbidden)
    refused(capsys, own.argv(), "expert1", "no model.safetensors", "safe_serialization=True")
    assert not Path("executed").exists()


def test_pickle_named_safetensors(own, capsys):
    file = own.expert() / "model.safetensors"
    file.write_bytes(pickle.dumps(Evil()))
    refused(capsys, own.argv(), file, "truncated or altered")
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"num_classes": 3}', b"\xff\xfe\x00", b'"text"'],
    ids=["empty", "cut", "list", "null", "no-architecture", "binary", "text"],
)
def test_broken_config(own, capsys, content):
    (own.expert() / "config.json").write_bytes(content)
    refused(capsys, own.argv(), "expert1", "config.json", "'architecture'", "transformers again")


@pytest.mark.parametrize("value", ["three", None, [3]])
def test_config_with_odd_number_of_classes(own, capsys, value):
    own.configure(lambda c: c.update(num_classes=value))
    refused(capsys, own.argv(), "expert1", "num_classes")


@pytest.mark.parametrize("value", ["text", [1, 2]])
def test_config_with_odd_model_args(own, capsys, value):
    own.configure(lambda c: c.update(model_args=value))
    refused(capsys, own.argv(), "expert1", "model_args")


def everywhere(own: Own, change) -> None:
    """Alter config.json of the base and of both experts alike."""
    own.base = shutil.copytree(own.base, "origin")
    for folder in (Path("origin"), own.expert(0), own.expert(1)):
        config = json.loads((folder / "config.json").read_text("utf-8"))
        change(config)
        (folder / "config.json").write_text(json.dumps(config), "utf-8")


@pytest.mark.parametrize(
    "name",
    [
        "no_such_model",
        pytest.param(5),
    ],
)
def test_architecture_that_timm_does_not_know(own, capsys, name):
    everywhere(own, lambda c: c.update(architecture=name))
    refused(capsys, own.argv(), "architecture", name, "timm")


def test_argument_that_timm_does_not_know(own, capsys):
    everywhere(own, lambda c: c["model_args"].update(no_such_argument=1))
    refused(capsys, own.argv(), "no_such_argument", "timm")


@pytest.mark.parametrize(
    "change",
    [{"depth": 2}, {"depth": 4}, {"embed_dim": 32}, {"mlp_ratio": 2}, {"class_token": False}],
    ids=str,
)
def test_configs_that_describe_other_weights(own, capsys, change):
    everywhere(own, lambda c: c["model_args"].update(change))
    refused(capsys, own.argv("--episodes", 2), "config.json")


def test_other_family(own, capsys):
    import timm

    model = timm.create_model("resnet10t", num_classes=3)
    config = {"architecture": "resnet10t", "num_classes": 3}
    models.write_checkpoint(Path("resnet"), config, model.state_dict())
    own.experts[1] = "resnet"
    refused(capsys, own.argv(), "'resnet'", "VisionTransformer", "'resnet10t'", "not supported")


def test_vit_that_is_not_plain(own, capsys):
    """Weights named like a ViT's, but timm makes another class of them."""
    everywhere(own, lambda c: c.update(architecture="deit_tiny_distilled_patch16_224"))
    refused(capsys, own.argv(), "deit_tiny_distilled", "VisionTransformer", "not supported")


def test_multi_task_model_without_heads(own, capsys):
    words = [
        "multi-task",
        own.experts[0],
        "rmm_lab.heads",
        "found none",
        "rmm_lab.zoo.build finetune",
    ]
    refused(capsys, own.argv("--multi-task", own.experts[0]), *words)


@pytest.mark.parametrize("args", [{"depth": 2}, {"embed_dim": 32}, {"num_heads": 4}], ids=str)
def test_multi_task_model_of_another_shape(own, capsys, args):
    write_variant("joint", num_classes=6, **args)
    config = json.loads(Path("joint/config.json").read_text())
    names = [Path(p).name for p in own.images]
    config["rmm_lab"] = {"heads": {names[0]: [0, 3], names[1]: [3, 6]}}
    Path("joint/config.json").write_text(json.dumps(config))
    refused(capsys, own.argv("--episodes", 2, "--multi-task", "joint"), "'joint'")


@pytest.mark.parametrize("name", ["ties", "weight_average", "base"])
def test_expert_named_like_another_source(own, capsys, name):
    """Refused, or told apart: a source must never stand for another one's weights."""
    own.experts[1] = str(shutil.copytree(own.experts[1], Path("experts") / name))
    try:
        problem = load_problem(own.experts, base=own.base, images=own.images, stem="base")
    except InputError:
        return
    pool = problem.pool
    assert len(set(pool.sources)) == len(pool.sources)
    assert not {*OPERATORS, "base"} & set(pool.names)  # the table asks for all of these
    expert = vit.split(pool.experts[1].weights).layers[0]
    got = pool.layer_weights(pool.names[1], 0)
    assert all(torch.equal(got[k], expert[k]) for k in expert)


# ------------------------------------------------------------------------------ experts and heads


def test_head_of_another_size(own, capsys):
    own.experts[1] = str(write_model(Path("five"), 5, num_classes=5))
    words = ["'five'", "a head of 3 classes", own.images[1], "found 5", "same order"]
    refused(capsys, own.argv(), *words)


@pytest.mark.parametrize("shape", [(5, 16), (2, 16), (3, 8)], ids=str)
def test_head_whose_weights_are_not_what_the_config_says(own, capsys, shape):
    own.weights(lambda w: w.update({"head.weight": torch.zeros(shape)}))
    refused(capsys, own.argv("--episodes", 2), "expert1", "head.weight", shape)


def test_expert_without_a_head(own, capsys):
    own.weights(lambda w: [w.pop("head.weight"), w.pop("head.bias")])
    refused(capsys, own.argv(), "expert1", "head.weight", "found none")


def test_expert_with_no_classes(own, capsys):
    own.experts[1] = write_variant("headless", num_classes=0)
    refused(capsys, own.argv(), "'headless'", "a head of 3 classes", "found 0")


def test_only_one_head_has_a_bias(own, capsys):
    """One may do without; then the merged model must be built all the same, or be refused."""
    own.weights(lambda w: w.pop("head.bias"))
    before = listing()
    rc = ppo.main(own.argv("--episodes", 2, "--run-dir", "run"))
    if rc == 0:
        assert (Path("run/merged") / "model.safetensors").is_file()
    else:
        one_error(capsys.readouterr().err, "expert1", "head.bias")
        assert listing() == before


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["class0", "cat", "class2"], ["class 1", "'class1'", "'cat'"]),
        (["class0", "class2", "class1"], ["class 1", "'class1'", "'class2'"]),
        pytest.param(["class0", "class1"], ["label_names"]),
        pytest.param(["class0", "class1", "class2", "class3"], ["label_names"]),
        pytest.param([], ["label_names"]),
    ],
    ids=["renamed", "reordered", "fewer", "more", "none"],
)
def test_labels_of_other_classes(own, capsys, names, words):
    own.configure(lambda c: c.update(label_names=names))
    refused(capsys, own.argv(), "expert1", own.images[1], *words, "label_names")


def test_one_expert_only(own, capsys):
    own.experts, own.images = own.experts[:1], own.images[:1]
    refused(capsys, own.argv(), "--experts", "at least 2", "found 1", "demo, glyphs, vision")


def test_no_expert(own, capsys):
    refused(capsys, ["--experts"], "--experts", "at least 2", "found 0")


def test_experts_without_base(own, capsys):
    argv = ["--experts", *own.experts, "--images", *own.images]
    refused(capsys, argv, "--base", "fine-tuned from", "found none", "name its folder")


def test_experts_without_images(own, capsys):
    refused(capsys, own.models(), "--images", "for each expert", f"{own.experts[0]!r}")


@pytest.mark.parametrize("n", [1, 3])
def test_another_number_of_images(own, capsys, n):
    images = (own.images * 2)[:n]
    argv = [*own.models(), "--images", *images]
    refused(capsys, argv, "--images", "each of 2 experts", f"found {n}")


def test_misspelt_name_that_ships(capsys):
    refused(capsys, ["--experts", "digits", "textuers"], "--images", "'textuers'")


def test_data_folder_is_missing(capsys, monkeypatch):
    monkeypatch.setenv("RMM_LAB_DATA", "nowhere")
    refused(capsys, [], "nowhere", "found no such folder", "RMM_LAB_DATA")


# -------------------------------------------------------------------------------------- images


def test_missing_image_folder(own, capsys):
    own.images[0] = "nowhere"
    refused(capsys, own.argv(), "'nowhere'", "SPLIT/CLASS/image", "no such folder", "spelling")


@pytest.mark.parametrize("split", ["train", "reward", "test"])
def test_empty_class_folder(own, capsys, split):
    folder = own.pictures() / split / "class1"
    for file in folder.iterdir():
        file.unlink()
    (folder / "notes.txt").write_text("no picture")
    refused(capsys, own.argv(), folder, ".png", "found none", "fill it or remove it")


def as_text(file: Path) -> None:
    file.write_text("this is no picture")


def as_half(file: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def as_nothing(file: Path) -> None:
    file.write_bytes(b"")


def as_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def as_huge(file: Path) -> None:
    """A BMP whose header claims more pixels than Pillow is willing to decode."""
    Image.new("L", (8, 8)).save(file, "bmp")
    content = bytearray(file.read_bytes())
    content[18:26] = (60000).to_bytes(4, "little") * 2
    file.write_bytes(content)


@pytest.mark.parametrize("split", ["reward", "test"])
@pytest.mark.parametrize(
    "spoil",
    [
        as_text,
        as_half,
        as_nothing,
        as_folder,
        pytest.param(as_huge),
    ],
)
def test_broken_image(own, capsys, split, spoil):
    file = own.pictures() / split / "class2" / "5.png"
    spoil(file)
    refused(capsys, own.argv(), file, "broken", "replace or remove it")


@pytest.mark.parametrize("split", ["train", "reward", "test"])
def test_splits_of_other_classes(own, capsys, split):
    folder = own.pictures()
    (folder / split / "class1").rename(folder / split / "klass1")
    refused(capsys, own.argv(), folder, "same classes in every split", "class1", "add or remove")


def test_class_in_one_split_only(own, capsys):
    folder = own.pictures()
    shutil.copytree(folder / "test" / "class0", folder / "test" / "extra")
    refused(capsys, own.argv(), folder, "same classes in every split", "'extra'", "test")


@pytest.mark.parametrize("splits", [("train", "reward", "test"), ()], ids=["splits", "plain"])
def test_only_one_class(own, capsys, splits):
    folder = write_images(Path("one"), 7, per_class=6, splits=splits)
    for path in sorted(folder.rglob("class[12]")):
        shutil.rmtree(path)
    own.images[1] = str(folder)
    refused(capsys, own.argv(), "two class folders", folder, "found 1", "CLASS/image")


def test_pictures_without_class_folders(own, capsys):
    folder = Path("flat")
    folder.mkdir()
    Image.new("L", (8, 8)).save(folder / "0.png")
    own.images[1] = "flat"
    refused(capsys, own.argv(), "flat", "two class folders", "found 0")


def test_too_few_pictures_to_split(own, capsys):
    own.images[1] = str(write_images(Path("few"), 7, per_class=2, splits=()))
    refused(capsys, own.argv(), Path("few/class0"), "at least 3 pictures", "found 2")


def test_missing_split(own, capsys):
    folder = own.pictures()
    shutil.rmtree(folder / "test")
    shutil.rmtree(folder / "reward")
    refused(capsys, own.argv(), folder, "splits train and test", "found train", "add the missing")


# ------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("tied", ["Unknown operator 'tied'", "task_arithmetic, ties, dare"]),
        ("", ["Unknown operator ''"]),
        ("ties:densty=0.3", ["Unknown option 'densty'", "density"]),
        ("dare:density=0.3", ["Unknown option 'density'", "drop_rate"]),
        ("weight_average:scale=1", ["Unknown option 'scale'", "takes no option"]),
        ("ties:", ["Unknown option ''"]),
        ("ties:density=0.3,density=0.4", ["Repeated option 'density'"]),
        ("ties:density=0", ["density", "(0, 1]", "0"]),
        ("ties:density=1.1", ["density", "(0, 1]", "1.1"]),
        ("ties:density=nan", ["density", "(0, 1]", "nan"]),
        ("ties:density=much", ["density", "(0, 1]", "'much'"]),
        ("ties:merge=median", ["merge", "'mean' or 'sum'", "'median'"]),
        ("dare:drop_rate=1", ["drop_rate", "[0, 1)", "1.0"]),
        ("dare:drop_rate=-0.1", ["drop_rate", "[0, 1)", "-0.1"]),
        ("dare_ties:drop_rate=nan", ["drop_rate", "[0, 1)", "nan"]),
        ("task_arithmetic:scale=inf", ["scale", "finite", "inf"]),
        ("ties:scale=nan", ["scale", "finite", "nan"]),
    ],
)
def test_operators(own, capsys, spec, words):
    refused(capsys, own.argv("--operators", "ties:density=0.5", spec), *words)


def test_operator_given_twice(own, capsys):
    argv = own.argv("--operators", "ties:density=0.50", "ties:density=0.5")
    refused(capsys, argv, "operators", "'ties:density=0.5' twice")


@pytest.mark.parametrize("stem", ["trunk", "ties:density=2", ""])
def test_unknown_stem(own, capsys, stem):
    words = [f"{stem!r}", "base", "e1, e2", "operator"]
    refused(capsys, own.argv("--stem", stem), *words)


NUMBERS = [
    *[("data-fraction", v, "more than 0 and at most 1") for v in ("0", "-0.1", "1.5", "nan")],
    *[("dar", v, "0 to 1") for v in ("-1", "2", "nan")],
    *[("gamma", v, "more than 0 and at most 1") for v in ("0", "1.1", "nan")],
    *[("clip", v, "more than 0") for v in ("0", "-0.2", "nan", "inf")],
    *[("learning-rate", v, "more than 0") for v in ("-0.001", "0", "nan", "inf")],
    ("critic-learning-rate", "-1e-3", "more than 0"),
    ("episodes", "0", "at least 1"),
    ("episodes", "-5", "at least 1"),
    ("episodes-per-update", "0", "at least 1"),
    ("episodes-per-subset", "0", "at least 1"),
    ("update-epochs", "0", "at least 1"),
    ("max-steps", "0", "at least 1"),
    ("max-depth", "0", "at least 1"),
    ("entropy", "-0.1", "0 or more"),
    ("entropy-end", "nan", "0 or more"),
    ("value-coef", "-1", "0 or more"),
    ("target-kl", "-1", "0 or more"),
    ("finalists", "-1", "0 or more"),
    ("threads", "-1", "0 "),
    ("cache-mb", "-1", "0 or more"),
    ("cache-mb", "nan", "0 or more"),
    ("penalty", "0.1", "0 or less"),
    ("penalty", "nan", "0 or less"),
    pytest.param("seed", "-1", "0 "),
]


@pytest.mark.parametrize(("name", "value", "expected"), NUMBERS)
def test_numbers_out_of_range(own, capsys, name, value, expected):
    shown = str(float(value)) if "." in value or "e-" in value or value in ("nan", "inf") else value
    refused(capsys, own.argv(f"--{name}", value), f"--{name}: expected {expected}", shown)


@pytest.mark.parametrize(
    "argv",
    [["--seed", str(2**70)], ["--data-fraction", "1e-320"], ["--threads", str(2**40)]],
    ids=name_of,
)
def test_numbers_out_of_all_bounds(own, capsys, argv):
    refused(capsys, own.argv("--episodes", 2, *argv), argv[0])


def test_steps_that_do_not_reach_the_end(own, capsys):
    refused(capsys, own.argv("--max-steps", 2), "max_steps >= 4", "found 2")


@pytest.mark.parametrize(
    "argv",
    [
        ["--no-such-option", "1"],
        ["--episodes", "many"],
        ["--episodes", "1.5"],
        ["--scope", "block"],
        ["--observation", "everything"],
        ["--preset", "fast"],
        ["--preset"],
        ["--resume"],
        ["stray"],
    ],
    ids=" ".join,
)
def test_options_that_the_parser_refuses(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        ppo.main(argv)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert argv[0].lstrip("-") in captured.err + captured.out
    assert "Traceback" not in captured.err
    assert not listing()


# ---------------------------------------------------------------------------------- run folders


def test_run_folder_that_is_not_empty(own, capsys):
    Path("old").mkdir()
    Path("old/notes.txt").write_text("mine")
    argv = own.argv("--run-dir", "old")
    refused(capsys, argv, "--run-dir", "new or empty", "found files in old", "--resume old")
    assert Path("old/notes.txt").read_text() == "mine"


def test_run_folder_that_is_a_file(own, capsys):
    Path("old").write_text("mine")
    refused(capsys, own.argv("--run-dir", "old"), "--run-dir", "new or empty folder", "old")
    assert Path("old").read_text() == "mine"


def test_run_folder_below_a_file(own, capsys):
    Path("old").write_text("mine")
    refused(capsys, own.argv("--run-dir", "old/run"), "--run-dir", "expected", "old/run")
    assert Path("old").read_text() == "mine"


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory) -> Path:
    """The run folder of a short search."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert ppo.main(Own(tiny).argv("--preset", "agent", "--episodes", 2, "--run-dir", run)) == 0
    return run


@pytest.fixture
def stopped(finished) -> Path:
    """A copy of the short search's folder as an interruption leaves it: no result yet."""
    Path("stopped").mkdir()
    names = ("config.json", "episodes.csv", "updates.csv", "policies.bin", "checkpoint.safetensors")
    for name in names:
        shutil.copy(finished / name, Path("stopped") / name)
    return Path("stopped")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused_resume(capsys, folder: Path, argv, *words: object) -> None:
    """Refused, and no byte of the folder changes."""
    before = contents(folder)
    refused(capsys, ["--resume", folder, *argv], *words)
    assert contents(folder) == before


def test_the_untouched_stopped_run_is_resumed(stopped, capsys):
    assert ppo.main(["--resume", "stopped", "--quiet"]) == 0
    assert (stopped / "path.json").is_file()


def test_resume_of_no_folder(capsys):
    refused(capsys, ["--resume", "nowhere"], "--resume", "config.json", "nowhere", "--run-dir")


def test_resume_without_config(stopped, capsys):
    (stopped / "config.json").unlink()
    refused_resume(capsys, stopped, [], "--resume", "config.json", "stopped", "--run-dir")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "",
        *[pytest.param(c) for c in ("[1]", "null", "5")],
        '"text"',
        "[]",
        "{}",
    ],
)
def test_resume_with_broken_config(stopped, capsys, content):
    (stopped / "config.json").write_text(content)
    refused_resume(capsys, stopped, [], "--resume", "stopped")


def reconfigure(stopped: Path, **change) -> None:
    file = stopped / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"colour": "red"}, ["config of this version", "colour"]),
        ({"preset": "old"}, ["preset", "'old'"]),
        ({"episodes": -1}, ["episodes"]),
        pytest.param({"episodes": "many"}, ["episodes", "many"]),
        ({"gamma": None}, ["gamma"]),
        ({"operators": ["tied"]}, ["Unknown operator 'tied'"]),
    ],
    ids=name_of,
)
def test_resume_with_altered_config(stopped, capsys, change, words):
    reconfigure(stopped, **change)
    refused_resume(capsys, stopped, [], *words)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--episodes", "3"], ["--episodes 2", "found 3"]),
        (["--seed", "7"], ["--seed 1", "found 7"]),
        (["--gamma", "0.5"], ["--gamma 1.0", "found 0.5"]),
        (["--no-mask-actions"], ["--mask-actions True", "found False"]),
        (["--preset", "paper"], ["--preset agent", "found paper"]),
        (["--stem", "base"], ["--stem agent", "found base"]),
        (["--operators", "ties"], ["--operators ['weight_average',", "found ['ties']"]),
        (["--experts", "digits", "letters"], ["--experts [", "found ['digits', 'letters']"]),
    ],
    ids=name_of,
)
def test_resume_with_another_config(stopped, capsys, argv, words):
    refused_resume(capsys, stopped, argv, "--resume", *words, "config.json", "leave the option out")


def test_resume_beside_run_dir(stopped, capsys):
    argv = ["--run-dir", "run"]
    refused_resume(capsys, stopped, argv, "--run-dir", "beside --resume", "names the folder")


@pytest.mark.parametrize("keep", [0, 5, 200, 0.5, -1])
def test_resume_with_truncated_checkpoint(stopped, capsys, keep):
    file = stopped / "checkpoint.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    refused_resume(capsys, stopped, [], "--resume", file, "truncated", "another folder")


def test_resume_with_a_model_for_a_checkpoint(own, stopped, capsys):
    file = stopped / "checkpoint.safetensors"
    shutil.copy(Path(own.base) / "model.safetensors", file)
    refused_resume(capsys, stopped, [], "--resume", file, "altered", "another folder")


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_resume_with_the_checkpoint_of_another_agent(stopped, capsys, change):
    from safetensors import safe_open

    file = stopped / "checkpoint.safetensors"
    with safe_open(file, "pt") as stored:
        metadata = stored.metadata()
    tensors = load_file(file)
    if change == "missing":
        del tensors["agent.actor.0.weight"]
    else:
        tensors["agent.actor.0.weight"] = torch.zeros(64, 5)
    save_file(tensors, file, metadata)
    refused_resume(capsys, stopped, [], "--resume", file)


@pytest.mark.parametrize("name", ["episodes.csv", "updates.csv"])
@pytest.mark.parametrize("how", ["missing", "cut"])
def test_resume_without_rows(stopped, capsys, name, how):
    if how == "missing":
        (stopped / name).unlink()
    else:
        (stopped / name).write_text((stopped / name).read_text().splitlines()[0] + "\n")
    refused_resume(capsys, stopped, [], "--resume", stopped / name, "rows", "found 0")


def test_resume_after_an_expert_went_missing(own, capsys):
    own.expert()
    assert ppo.main(own.argv("--episodes", 1, "--run-dir", "mine")) == 0
    shutil.rmtree("expert1")
    capsys.readouterr()
    refused_resume(capsys, Path("mine"), [], "'expert1'", "there is no folder")


# ------------------------------------------------------------------------ a device without space


@pytest.fixture
def small_disk(folder):
    """Make a tmpfs of some KiB; unmounted whatever happens."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small tmpfs")
    mounted: list[Path] = []

    def make(kib: int) -> Path:
        disk = folder / f"disk{len(mounted)}"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(disk)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"mount works not here: {done.stderr.strip()}")
        mounted.append(disk)
        return disk

    yield make
    for disk in mounted:
        subprocess.run(["umount", str(disk)], check=True)


def no_space(capsys, rc: int, disk: Path) -> None:
    assert rc == 2
    one_error(capsys.readouterr().err, "space", "free some")
    assert not [p for p in disk.rglob("*") if p.name.endswith(".tmp")]


def test_no_space_for_the_checkpoint(own, capsys, small_disk):
    disk = small_disk(48)
    rc = ppo.main(own.argv("--episodes", 2, "--run-dir", disk / "run"))
    no_space(capsys, rc, disk)
    assert not (disk / "run" / "checkpoint.safetensors").exists()
    assert json.loads((disk / "run" / "config.json").read_text())["episodes"] == 2


def test_no_space_for_the_config(own, capsys, small_disk):
    disk = small_disk(4)
    (disk / "full").write_bytes(bytes(4096))
    no_space(capsys, ppo.main(own.argv("--episodes", 2, "--run-dir", disk / "run")), disk)


def test_no_space_for_the_merged_model(own, finished, capsys, small_disk):
    """All of the result fits but the last file; with more space, --resume completes it."""
    disk = small_disk(2048)
    argv = own.argv("--preset", "agent", "--episodes", 2, "--run-dir", disk / "run")
    need = sum(-(-len(v) // 4096) * 4096 for v in contents(finished).values())
    need -= (finished / "merged" / "model.safetensors").stat().st_size
    free = need + 2 * 4096  # enough for all the rest, not for the model
    (disk / "ballast").write_bytes(bytes(2048 * 1024 - free))
    no_space(capsys, ppo.main(argv), disk)
    assert (disk / "run" / "rewards.png").is_file()
    assert not (disk / "run" / "merged" / "model.safetensors").exists()
    (disk / "ballast").unlink()
    assert ppo.main(["--resume", str(disk / "run"), "--quiet"]) == 0
    assert (disk / "run" / "merged" / "model.safetensors").is_file()


# -------------------------------------------------------------------------- the hub, unreachable

HUB = "hf-hub:rmm-lab-tests/no-such-model"


def refused_hub(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 2, done.stderr
    error = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(error) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in (HUB, "download config.json and model.safetensors of rmm-lab-tests/no-such-model"):
        assert word in error[0]
    assert "put them in a folder and name that folder" in error[0]
    assert not Path("run").exists()


def hub_argv(own: Own) -> list[str]:
    own.base = HUB
    return ["-m", "rmm_lab.ppo", *own.argv("--run-dir", "run")]


def test_hub_offline(own, folder):
    refused_hub(python(*hub_argv(own), HF_HUB_OFFLINE="1", HF_HOME=str(folder / "hf")))


def test_hub_without_a_network(own, folder):
    """Nothing listens at the endpoint: the same as no network, wherever the tests run."""
    env = {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(folder / "hf"),
    }
    refused_hub(python(*hub_argv(own), **env))


def test_hub_behind_a_network_that_swallows_everything(own, folder):
    """A firewall that answers nothing must not hold the user for minutes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        start = time.monotonic()
        done = python(
            *hub_argv(own), HF_ENDPOINT=url, HF_HUB_OFFLINE="0", HF_HOME=str(folder / "hf")
        )
        took = time.monotonic() - start
    refused_hub(done)
    assert took < 45  # 2 s of it is the wait; the rest is a busy machine's time to start


# ------------------------------------------------------------------------ as a user would type it


def wall(*argv: str) -> float:
    start = time.perf_counter()
    done = python(*argv)
    assert done.returncode == 0, done.stderr
    return time.perf_counter() - start


def test_help_is_fast():
    """Under 3 s, or where torch alone takes that long, at most a second more than torch."""
    helps, torches = [], []
    for _ in range(3):
        helps.append(wall("-m", "rmm_lab.ppo", "--help"))
        if min(helps) < 3:
            return
        torches.append(wall("-c", "import torch"))
    assert min(helps) <= min(torches) + 1.0, (helps, torches)


def test_missing_folder_from_the_shell(own):
    own.experts[0] = "nowhere"
    done = python("-m", "rmm_lab.ppo", *own.argv("--run-dir", "run"))
    assert done.returncode == 2
    one_error(done.stderr, "'nowhere'", "there is no folder")
    assert not listing()


def test_interrupted_and_resumed(own, capsys):
    """Ctrl-C after the first update: exit code 130, and the command that it prints works."""
    process = subprocess.Popen(
        [sys.executable, "-m", "rmm_lab.ppo", *own.argv("--episodes", 300, "--run-dir", "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        # Tests that run in the background have SIGINT switched off, and a child inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 90
        while not Path("run/checkpoint.safetensors").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "stopped; go on with: python -m rmm_lab.ppo --resume run" in err
    assert not Path("run/path.json").exists()
    assert not [p for p in listing() if p.endswith(".tmp")]
    assert len(from_csv(Path("run/episodes.csv").read_text())) < 300

    assert ppo.main(["--resume", "run", "--quiet"]) == 0
    rows = from_csv(Path("run/episodes.csv").read_text())
    assert [r["episode"] for r in rows] == list(range(300))
    assert json.loads(Path("run/path.json").read_text())["steps"]


@pytest.mark.parametrize("where", ["parse", "train"])
def test_interrupted_before_there_is_a_folder(own, capsys, monkeypatch, where):
    """Then there is nothing to resume, and nothing must say so."""

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(ppo, where, interrupt)
    assert ppo.main(own.argv("--run-dir", "run")) == 130
    err = capsys.readouterr().err
    assert "stopped" in err
    assert "--resume" not in err
    assert not listing()


# -------------------------------------------------------------------------------- from Python


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"experts": ("nowhere", "e2")}, "'nowhere'.*there is no folder"),
        ({"base": None}, "--base: expected the model"),
        ({"episodes": 0}, "--episodes: expected at least 1, found 0"),
        ({"operators": ("tied",)}, "Unknown operator 'tied'"),
        ({"scope": "block"}, "scope 'block': expected one of layer, tensor, global"),
        ({"observation": "all"}, "observation: expected map or map\\+cursor, found 'all'"),
        pytest.param({"resume": Path("nowhere")}, "nowhere"),
    ],
    ids=name_of,
)
def test_train_raises_for_python_callers(tiny, change, match):
    args = tiny | {"run_dir": Path("run"), "quiet": True, "episodes": 2} | change
    if "resume" in change:
        del args["run_dir"]
    with pytest.raises(InputError, match=match):
        ppo.train(ppo.Args(**args))
    assert not listing()


def test_resume_with_another_config_for_python_callers(tiny, stopped):
    before = contents(stopped)
    with pytest.raises(InputError, match="seed"):
        ppo.train(ppo.Args(**tiny, preset="agent", resume=stopped, episodes=2, seed=7, quiet=True))
    assert contents(stopped) == before


def test_unknown_preset_for_python_callers():
    with pytest.raises(
        InputError, match="--preset: expected paper or agent or default, found 'fast'"
    ):
        ppo.Args(preset="fast")


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"schema": "other/1"}'])
def test_layer_path_that_is_none(text):
    with pytest.raises(
        InputError, match=r"expected JSON of schema rmm_lab/layer-path/1.*path\.json"
    ):
        LayerPath.from_json(text)


def test_layer_path_of_weights_that_changed(own):
    problem = load_problem([str(own.expert(0)), own.experts[1]], base=own.base, images=own.images)
    path = LayerPath.of(problem.pool, [("ties", 0)], "base")
    file = Path("expert0/model.safetensors")
    save_file({k: v + 1 for k, v in load_file(file).items()}, file)
    with pytest.raises(InputError, match=r"expert0'.*expected weights of SHA-256.*put the"):
        LayerPath.from_json(path.to_json()).build()


# --------------------------------------------------------------------------- rmm_lab.zoo.build finetune


def finetune(own: Own, *more: object) -> list[str]:
    argv = ["finetune", "--base", own.base, "--images", own.images[0], "--out", "out"]
    return [*argv, "--steps", "1", "--batch-size", "4", *map(str, more)]


def refused_zoo(capsys, argv, *words: object) -> None:
    before = listing()
    assert zoo.main(argv) == 2
    one_error(capsys.readouterr().err, *words)
    assert listing() == before


@pytest.mark.parametrize(
    "steps",
    [
        1,
        pytest.param(20),
    ],
)
def test_finetune_of_the_untouched_problem(own, steps):
    assert zoo.main(finetune(own, "--steps", steps, "--threads", 1)) == 0
    assert models.read_checkpoint("out").label_names == ["class0", "class1", "class2"]


def test_finetune_into_a_folder_with_files(own, capsys):
    Path("out").mkdir()
    Path("out/mine.txt").write_text("mine")
    refused_zoo(capsys, finetune(own), "--out", "empty or new", "found files in out")


def test_finetune_into_a_file(own, capsys):
    Path("out").write_text("mine")
    refused_zoo(capsys, finetune(own), "--out", "empty or new", "out")


def test_finetune_of_no_base(own, capsys):
    own.base = "nowhere"
    refused_zoo(capsys, finetune(own), "'nowhere'", "there is no folder")


def test_finetune_on_no_folder(own, capsys):
    own.images[0] = "nowhere"
    refused_zoo(capsys, finetune(own), "'nowhere'", "no such folder")


@pytest.mark.parametrize(
    "split",
    [
        "train",
        pytest.param("test"),
    ],
)
def test_finetune_on_a_broken_image(own, capsys, split):
    file = own.pictures(0) / split / "class0" / "0.png"
    as_text(file)
    refused_zoo(capsys, finetune(own), file, "broken")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", "0"),
        ("steps", "-1"),
        ("batch-size", "0"),
        ("learning-rate", "0"),
        ("learning-rate", "-0.1"),
        pytest.param("learning-rate", "nan"),
        pytest.param("learning-rate", "inf"),
        pytest.param("threads", "-1"),
    ],
)
def test_finetune_numbers_out_of_range(own, capsys, name, value):
    refused_zoo(capsys, finetune(own, f"--{name}", value), f"--{name}: expected", value)


def test_finetune_fewer_images_per_step_than_tasks(own, capsys):
    argv = ["finetune", "--base", own.base, "--images", *own.images, "--out", "out"]
    refused_zoo(capsys, [*argv, "--steps", "1", "--batch-size", "1"], "--batch-size", "2")


def test_finetune_on_no_images(own, capsys):
    argv = ["finetune", "--base", own.base, "--out", "out", "--steps", "1", "--images"]
    refused_zoo(capsys, argv, "--images", "at least one")


def test_finetune_on_two_folders_of_one_name(own, capsys):
    """Refused, or told apart: each of the tasks must find its own head."""
    for i in range(2):
        own.images[i] = shutil.copytree(own.images[i], Path(f"set{i}") / "pictures")
    argv = ["finetune", "--base", own.base, "--images", *own.images, "--out", "out"]
    rc = zoo.main([*map(str, argv), "--steps", "1", "--batch-size", "4"])
    if rc == 2:
        one_error(capsys.readouterr().err, "pictures")
        assert not Path("out").exists()
    else:
        heads = models.read_checkpoint("out").config["rmm_lab"]["heads"]
        assert sorted(heads.values()) == [[0, 3], [3, 6]]


def test_finetune_without_space(own, capsys, small_disk):
    disk = small_disk(16)
    rc = zoo.main(finetune(own, "--out", disk / "out"))
    assert rc == 2
    one_error(capsys.readouterr().err, "space")
    assert not [p for p in disk.rglob("*") if p.name.endswith(".tmp")]


def test_finetune_unknown_option(own, capsys):
    with pytest.raises(SystemExit) as stop:
        zoo.main(finetune(own, "--no-such-option", 1))
    assert stop.value.code == 2
    assert not listing()


def test_rebuilding_something_unknown(capsys, monkeypatch):
    monkeypatch.setenv("RMM_LAB_DATA", str(Path.cwd()))
    refused_zoo(capsys, ["--only", "digit"], "--only", "digits", "found 'digit'")
