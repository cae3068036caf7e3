"""Bad input: one sentence on stderr, exit code 2, no traceback, and nothing written."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, finish, write_images, write_model
from PIL import Image
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from rmm_lab.__main__ import main
from rmm_lab.errors import InputError
from rmm_lab.families import checkpoint as models
from rmm_lab.families import vit
from rmm_lab.search.config import configure
from rmm_lab.search.pipeline import train

REPOSITORY = Path(__file__).resolve().parent.parent


# ------------------------------------------------------------------------------------- helpers


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Every test works in an empty folder, where anything written by mistake shows."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listing() -> set[str]:
    return {str(p) for p in Path.cwd().rglob("*")}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def one_error(err: str, *words: object) -> None:
    """All that stderr holds is one line that begins with "error:"; progress bars do not count."""
    lines = [line for line in err.splitlines() if line.strip() and "step/s" not in line]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: "), err
    for word in words:
        assert str(word) in lines[0], f"{word!r} is not in: {lines[0]}"


def refused(capsys, argv, *words: object) -> None:
    """``main`` refuses: exit code 2, one line on stderr that holds all words, nothing written."""
    argv = [str(a) for a in argv]
    if not {"--run-dir", "--resume", "finetune"} & set(argv):
        argv += ["--run-dir", "run"]
    before, files = listing(), contents(Path.cwd())
    assert main(argv) == 2
    one_error(capsys.readouterr().err, *words)
    assert listing() == before
    assert contents(Path.cwd()) == files


class Own:
    """The tiny problem's folders; what a test alters is copied first."""

    def __init__(self, tiny: dict) -> None:
        self.base, self.experts, self.images = tiny["base"], [*tiny["experts"]], [*tiny["images"]]

    def expert(self, i: int = 1) -> Path:
        self.experts[i] = str(shutil.copytree(self.experts[i], f"expert{i}"))
        return Path(self.experts[i])

    def origin(self) -> Path:
        self.base = str(shutil.copytree(self.base, "origin"))
        return Path(self.base)

    def pictures(self, i: int = 1) -> Path:
        self.images[i] = str(shutil.copytree(self.images[i], f"images{i}"))
        return Path(self.images[i])

    def config(self, everywhere: bool = False, **change: object) -> None:
        """Alter config.json of a copied expert, or of all models; ``model_args`` are added."""
        all_models = (self.origin, lambda: self.expert(0), self.expert)
        for copy in all_models if everywhere else all_models[2:]:
            file = copy() / "config.json"
            config = json.loads(file.read_text("utf-8"))
            if isinstance(args := change.get("model_args"), dict):
                change["model_args"] = config["model_args"] | args
            file.write_text(json.dumps(config | change), "utf-8")

    def weights(self, change: Callable, folder: Path | None = None) -> None:
        """Alter model.safetensors of a copied model, by default of an expert."""
        file = (folder or self.expert()) / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    def file(self, name: str, content: bytes | Callable[[bytes], bytes]) -> None:
        """Replace a file of a copied expert."""
        file = self.expert() / name
        altered = content(file.read_bytes()) if callable(content) else content
        assert altered != file.read_bytes()
        file.write_bytes(altered)

    def variant(self, name: str = "other", num_classes: int = 3, **model_args) -> None:
        """In place of an expert a tiny ViT with other ``model_args``."""
        config = vit.model_config(TINY, depth=None, num_classes=num_classes)
        config["model_args"] |= model_args
        weights = vit.create(config, depth=None, num_classes=num_classes).state_dict()
        config["label_names"] = [f"class{i}" for i in range(num_classes)]
        models.write_checkpoint(Path(name), config, weights)
        self.experts[1] = name

    def models(self) -> list[str]:
        return ["--base", self.base, "--experts", *self.experts]

    def argv(self, *more: object) -> list[str]:
        """Of a whole run, beside the search only a few rows: the others take most of the time."""
        images = ["--images", *self.images]
        return [*self.models(), *images, "--compare", "paper", "--quiet", *map(str, more)]


@pytest.fixture
def own(tiny) -> Own:
    return Own(tiny)


def start(*argv: object, **env: str) -> subprocess.Popen[str]:
    """Python in a process of its own."""
    pipe = subprocess.PIPE
    command = [sys.executable, *map(str, argv)]
    # Tests that run in the background have SIGINT switched off, and a child inherits that.
    on = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, env=environment(**env), preexec_fn=on
    )


def environment(**more: str) -> dict[str, str]:
    proxies = ("http_proxy", "https_proxy", "all_proxy")
    env = {k: v for k, v in os.environ.items() if k.lower() not in proxies}
    return env | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "NO_PROXY": "*"} | more


def test_the_untouched_problem_is_accepted(own, capsys):
    """All other tests alter one thing of this command line."""
    assert main(own.argv("--episodes", 2, "--run-dir", "run")) == 0
    assert capsys.readouterr().err == ""
    assert Path("run/path.json").is_file()
    assert not [p for p in listing() if p.endswith(".tmp")]


# -------------------------------------------------------------------------------------- models


class Evil:
    """Unpickling this leaves a mark."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def nan(name: str, value: float = float("nan")) -> Callable:
    return lambda weights: weights[name].view(-1)[0].fill_(value)


def without(prefix: str) -> Callable:
    return lambda weights: [weights.pop(name) for name in [*weights] if name.startswith(prefix)]


def cut(keep: float) -> Callable[[bytes], bytes]:
    return lambda b: b[: int(keep * len(b)) if isinstance(keep, float) else keep]


FILE = "expert1/model.safetensors"
MODELS = {
    # another architecture
    "depth 2": (lambda o: o.variant(depth=2), "'other'", "blocks.2."),
    "patch": (lambda o: o.variant(patch_size=2), "'other'", "(16, 1, 4, 4)", "(16, 1, 2, 2)"),
    "heads": (lambda o: o.variant(num_heads=4), "'other'", "'num_heads': 2", "'num_heads': 4"),
    "by name": (
        lambda o: o.config(architecture="vit_small_patch16_224"),
        *("expert1", "vit_tiny_patch16_224", "vit_small_patch16_224"),
    ),
    "no plain ViT": (
        lambda o: o.config(everywhere=True, architecture="beit_base_patch16_224"),
        "BEiT",
    ),
    "unknown": (lambda o: o.config(everywhere=True, architecture="no_model"), "no_model", "timm"),
    "a number": (lambda o: o.config(everywhere=True, architecture=5), "architecture", "5"),
    "argument": (lambda o: o.config(everywhere=True, model_args={"no_arg": 1}), "no_arg", "timm"),
    "depth": (lambda o: o.config(everywhere=True, model_args={"depth": 4}), "config.json"),
    "token": (
        lambda o: o.config(everywhere=True, model_args={"class_token": False}),
        "config.json",
    ),
    # weights
    "NaN": (lambda o: o.weights(nan("head.bias")), "expert1", "'head.bias'", "1 NaN"),
    "Inf": (
        lambda o: o.weights(nan("blocks.1.mlp.fc2.weight", -np.inf)),
        *("expert1", "'blocks.1.mlp.fc2.weight'", "1 NaN or Inf"),
    ),
    "NaN in the base": (
        lambda o: o.weights(nan("norm.bias"), o.origin()),
        *("'origin'", "'norm.bias'", "1 NaN"),
    ),
    "no layer 1": (lambda o: o.weights(without("blocks.1.")), "expert1", "blocks.1."),
    **{f"cut {n}": (lambda o, n=n: o.file(FILE[8:], cut(n)), FILE) for n in (0, 4, 100, 0.5, -1)},
    **{
        f"altered {name}": (lambda o, change=change: o.file(FILE[8:], change), FILE)
        for name, change in {
            "length": lambda b: (2**62).to_bytes(8, "little") + b[8:],  # of the header
            "json": lambda b: b[:8] + b"#" + b[9:],
            "dtype": lambda b: b.replace(b'"F32"', b'"F99"', 1),
            "offsets": lambda b: b.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1),
            "end": lambda b: b + b"more",
            "format": lambda b: pickle.dumps(Evil()),
        }.items()
    },
    # folders and config.json
    "no base": (lambda o: setattr(o, "base", "nowhere"), "'nowhere'"),
    "no expert": (lambda o: o.experts.__setitem__(0, "nowhere"), "'nowhere'"),
    "no local-dir": (lambda o: setattr(o, "base", "local-dir:nowhere"), "local-dir:nowhere"),
    "no config.json": (lambda o: (o.expert() / "config.json").unlink(), "expert1", "config.json"),
    "no weights": (lambda o: (o.expert() / FILE[8:]).unlink(), "expert1", FILE[8:]),
    **{
        f"config {content!r}": (
            lambda o, c=content: o.file("config.json", c),
            *("expert1", "config.json", "'architecture'"),
        )
        for content in (b"", b"{", b"[]", b"null", b'{"num_classes": 3}', b"\xff\xfe\x00")
    },
    **{
        f"num_classes {n!r}": (lambda o, n=n: o.config(num_classes=n), "expert1", "num_classes")
        for n in ("three", None, [3])
    },
    "model_args text": (lambda o: o.config(model_args="text"), "expert1", "model_args"),
    "model_args list": (lambda o: o.config(model_args=[1, 2]), "expert1", "model_args"),
    # heads
    "head of 5": (
        lambda o: o.experts.__setitem__(1, str(write_model(Path("five"), 5, num_classes=5))),
        *("'five'", "3 classes", "found 5"),
    ),
    **{
        f"head {shape}": (
            lambda o, shape=shape: o.weights(
                lambda w: w.update({"head.weight": torch.zeros(shape)})
            ),
            *("expert1", "head.weight", shape),
        )
        for shape in ((5, 16), (2, 16), (3, 8))
    },
    "no head": (lambda o: o.weights(without("head.")), "expert1", "head.weight"),
    "no classes": (lambda o: o.variant("headless", num_classes=0), "'headless'", "found 0"),
    "renamed": (
        lambda o: o.config(label_names=["class0", "cat", "class2"]),
        *("expert1", "'class1'", "'cat'"),
    ),
    "twice": (
        lambda o: o.config(label_names=["class0", "class2", "class2"]),
        *("expert1", "class 1", "'class2'"),
    ),
    "fewer": (lambda o: o.config(label_names=["class0"]), "expert1", "label_names"),
    "none": (lambda o: o.config(label_names=[]), "expert1", "label_names"),
}


@pytest.mark.parametrize(("spoil", "words"), [(v[0], v[1:]) for v in MODELS.values()], ids=MODELS)
def test_models(own, capsys, spoil, words):
    spoil(own)
    refused(capsys, own.argv("--episodes", 2), *words)
    assert not Path("executed").exists()  # by a pickle


def test_pickles_are_never_opened(own, capsys, monkeypatch):
    folder = own.expert()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    torch.save({"weight": Evil()}, folder / "model.pt")

    def forbidden(*args, **kwargs):
        raise AssertionError("a pickle was opened")

    monkeypatch.setattr(torch, "load", forbidden)
    refused(capsys, own.argv(), "expert1", "model.safetensors")
    assert not Path("executed").exists()


def test_multi_task_model(own, capsys):
    refused(capsys, own.argv("--multi-task", "nowhere"), "'nowhere'")
    refused(capsys, own.argv("--multi-task", own.experts[0]), own.experts[0], "rmm_lab.heads")


def test_multi_task_model_of_another_shape(own, tiny, capsys):
    own.variant("joint", num_classes=6, depth=2)
    own.experts = [*tiny["experts"]]
    names = [Path(p).name for p in own.images]
    config = json.loads(Path("joint/config.json").read_text())
    config["rmm_lab"] = {"heads": {names[0]: [0, 3], names[1]: [3, 6]}}
    Path("joint/config.json").write_text(json.dumps(config))
    refused(capsys, own.argv("--episodes", 2, "--multi-task", "joint"), "'joint'")


@pytest.mark.parametrize("name", ["ties", "weight_average", "base"])
def test_expert_named_like_another_source(own, capsys, name):
    own.experts[1] = str(shutil.copytree(own.experts[1], Path("experts") / name))
    refused(capsys, own.argv(), f"expert {name!r}")


def test_one_head_may_have_no_bias(own):
    own.weights(lambda w: w.pop("head.bias"))
    assert main(own.argv("--preset", "agent", "--episodes", 1, "--run-dir", "run")) == 0
    assert Path("run/merged/model.safetensors").is_file()


# ------------------------------------------------------------------------- experts, images, options


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (lambda o: ["--experts"], ["--experts", "at least 2", "found 0"]),
        (lambda o: ["--experts", o.experts[0]], ["--experts", "at least 2", "found 1", "demo"]),
        (lambda o: ["--experts", *o.experts, "--images", *o.images], ["--base"]),
        (lambda o: o.models(), ["--images"]),
        (lambda o: [*o.models(), "--images", o.images[0]], ["--images", "2 experts", "found 1"]),
        (lambda o: o.argv("--images", *o.images, "x"), ["--images", "2 experts", "found 3"]),
        (lambda o: ["--experts", "digits", "textuers"], ["--images", "'textuers'"]),
    ],
    ids=["none", "one", "no base", "no images", "fewer images", "more images", "misspelt"],
)
def test_experts(own, capsys, argv, words):
    refused(capsys, argv(own), *words)


def test_data_folder_is_missing(capsys, monkeypatch):
    monkeypatch.setenv("RMM_LAB_DATA", "nowhere")
    refused(capsys, [], "nowhere", "RMM_LAB_DATA")


def empty_class(own: Own, split: str) -> None:
    folder = own.pictures() / split / "class1"
    for file in folder.iterdir():
        file.unlink()
    (folder / "notes.txt").write_text("no picture")


def rename_class(own: Own, split: str) -> None:
    folder = own.pictures() / split
    (folder / "class1").rename(folder / "klass1")


def one_class(own: Own, splits: tuple[str, ...]) -> None:
    folder = write_images(Path("one"), 7, per_class=6, splits=splits)
    for path in sorted(folder.rglob("class[12]")):
        shutil.rmtree(path)
    own.images[1] = "one"


def flat(own: Own) -> None:
    Path("flat").mkdir()
    Image.new("L", (8, 8)).save("flat/0.png")
    own.images[1] = "flat"


def few(own: Own) -> None:
    own.images[1] = str(write_images(Path("few"), 7, per_class=2, splits=()))


def without_splits(own: Own) -> None:
    folder = own.pictures()
    shutil.rmtree(folder / "test")
    shutil.rmtree(folder / "reward")


SPLITS = ("train", "reward", "test")
IMAGES = {
    "none": (lambda o: o.images.__setitem__(0, "nowhere"), "'nowhere'"),
    **{
        f"empty {s}": (lambda o, s=s: empty_class(o, s), f"images1/{s}/class1", ".png")
        for s in SPLITS
    },
    **{f"classes of {s}": (lambda o, s=s: rename_class(o, s), "images1", "class1") for s in SPLITS},
    "one class": (lambda o: one_class(o, SPLITS), "one", "two class", "found 1"),
    "one class, no splits": (lambda o: one_class(o, ()), "one", "two class", "found 1"),
    "no class": (flat, "flat", "two class", "found 0"),
    "few": (few, "few/class0", "at least 3", "found 2"),
    "no splits": (without_splits, "images1", "test", "found train"),
}


@pytest.mark.parametrize(("spoil", "words"), [(v[0], v[1:]) for v in IMAGES.values()], ids=IMAGES)
def test_images(own, capsys, spoil, words):
    spoil(own)
    refused(capsys, own.argv(), *words)


def as_text(file: Path) -> None:
    file.write_text("this is no picture")


def as_half(file: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    file.write_bytes(cut(0.5)(file.read_bytes()))


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
@pytest.mark.parametrize("spoil", [as_text, as_half, as_folder, as_huge])
def test_broken_image(own, capsys, split, spoil):
    file = own.pictures() / split / "class2" / "5.png"
    spoil(file)
    refused(capsys, own.argv(), file, "broken")


def number(name: str, *values: str) -> list[tuple[list[str], list[str]]]:
    """Values of an option that are out of its range."""
    return [([f"--{name}", v], [f"--{name}", v.removesuffix(".0")]) for v in values]


OPTIONS = [
    (["--operators", "tied"], ["'tied'", "task_arithmetic, ties, dare"]),
    (["--operators", "ties:densty=0.3"], ["'densty'", "density"]),
    (["--operators", "ties:density=1.1"], ["density", "(0, 1]", "1.1"]),
    (["--operators", "ties:density=0.50", "ties:density=0.5"], ["'ties:density=0.5' twice"]),
    (["--operators", "weighted_average:expert=3"], ["expert", "1 to 2", "found 3"]),
    (["--operators", "task_arithmetic:scale=0.1/0.2/0.3"], ["scale", "2 experts", "found 3"]),
    (["--stem", "weighted_average:expert=3"], ["expert", "1 to 2", "found 3"]),
    (["--stem", "trunk"], ["'trunk'", "e1, e2"]),
    (["--stem", "ties:density=2"], ["'ties:density=2'", "(0, 1]"]),
    (["--max-steps", "2"], ["max_steps", "4", "found 2"]),
    (["--workers", "many"], ["--workers", "'many'"]),
    (["--device", "abacus"], ["abacus"]),
    *number("data-fraction", "0.0", "-0.1", "1.5", "nan", "1e-320"),
    *number("dar-lambda", "-1.0", "2.0", "nan"),
    *number("cma-share", "-1.0", "2.0", "nan"),
    *number("gamma", "0.0", "1.1", "nan"),
    *number("gae-lambda", "-0.1", "1.1", "nan"),
    *number("clip-coef", "0.0", "-0.2", "nan", "inf"),
    *number("learning-rate", "0.0", "-0.001", "nan", "inf"),
    *number("critic-learning-rate", "-0.001"),
    *number("episodes", "0", "-5"),
    *[case for name in ("per-update", "per-subset") for case in number(f"episodes-{name}", "0")],
    *[case for name in ("update-epochs", "max-steps", "max-depth") for case in number(name, "0")],
    *[case for name in ("ent-coef", "ent-coef-end", "vf-coef") for case in number(name, "-0.1")],
    *number("target-kl", "-1.0"),
    *number("finalists", "-1"),
    *number("cache-mb", "-1.0", "nan"),
    *number("penalty", "0.1", "nan"),
    *number("threads", "-1", str(2**40)),
    *number("seed", "-1", str(2**70)),
]


@pytest.mark.parametrize(("argv", "words"), OPTIONS, ids=[" ".join(argv) for argv, _ in OPTIONS])
def test_options(own, capsys, argv, words):
    """By us, in a sentence, or by the parser, in a box that may wrap it."""
    try:
        code = main(own.argv("--run-dir", "run", *argv))
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    err = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert [word for word in words if word not in err] == []
    assert not listing()


@pytest.mark.parametrize(
    "argv",
    [
        *(["--no-such-option", "1"], ["--episodes", "many"], ["--episodes", "1.5"]),
        *(["--scope", "block"], ["--observation", "everything"], ["--preset", "fast"]),
        *(["--preset"], ["--resume"], ["finetune", "--no-such-option"]),
    ],
    ids=" ".join,
)
def test_options_that_the_parser_refuses(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert argv[-1].lstrip("-") in captured.err + captured.out or argv[0] in captured.err
    assert not listing()


def test_an_unknown_command_is_named(capsys):
    assert main(["finetun", "--base", "base"]) == 2
    assert "expected merge, finetune or tables, found 'finetun'" in capsys.readouterr().err


def test_a_preset_beside_resume_is_refused(tmp_path, capsys):
    assert main(["--resume", str(tmp_path), "--preset", "paper"]) == 2
    assert "--preset: expected none beside --resume" in capsys.readouterr().err


def test_a_value_out_of_range_is_told_in_one_line(capsys):
    assert main(["--episodes", "0"]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.strip() == "error: --episodes: expected at least 1, found 0; correct it"


# ---------------------------------------------------------------------------------- run folders


@pytest.mark.parametrize(
    ("create", "run_dir"),
    [
        (lambda: [Path("old").mkdir(), Path("old/notes.txt").write_text("mine")], "old"),
        (lambda: Path("old").write_text("mine"), "old"),
        (lambda: Path("old").write_text("mine"), "old/run"),
    ],
    ids=["with files", "a file", "below a file"],
)
def test_run_folder(own, capsys, create, run_dir):
    create()
    refused(capsys, own.argv("--run-dir", run_dir), "--run-dir", "old")


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory) -> Path:
    """The run folder of a short search."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert main(Own(tiny).argv("--preset", "agent", "--episodes", 2, "--run-dir", run)) == 0
    return run


@pytest.fixture
def stopped(finished) -> Path:
    """A copy of the short search's folder as an interruption leaves it: no result yet."""
    results = ("path.json", "table.json", "merged", "finalists.json")
    return Path(shutil.copytree(finished, "stopped", ignore=shutil.ignore_patterns(*results)))


def test_the_untouched_stopped_run_is_resumed(stopped):
    assert main(["--resume", "stopped", "--quiet", "--compare", "paper"]) == 0
    assert (stopped / "path.json").is_file()


def put(part: str, **change: object) -> Callable[[bytes], bytes]:
    """config.json with other values in a part."""

    def alter(content: bytes) -> bytes:
        config = json.loads(content)
        config[part] |= change
        return json.dumps(config).encode()

    return alter


def agent(**change: Tensor) -> Callable[[bytes], bytes]:
    """A checkpoint with another tensor of the agent, or without it."""

    def alter(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + length])["__metadata__"]
        tensors = load(content)
        del tensors["agent.actor.0.weight"]
        return save(tensors | change, metadata)

    return alter


# (file, what becomes of it, words)
STOPPED = [
    ("config.json", None, "--resume", "config.json", "stopped"),
    *[
        ("config.json", lambda _, text=text: text, "--resume", "stopped")
        for text in (b"", b"{", b"[1]", b"null", b'"text"', b"{}")
    ],
    ("config.json", put("run", colour="red"), "colour"),
    ("config.json", put("run", episodes=-1), "episodes"),
    ("config.json", put("run", episodes="many"), "episodes", "many"),
    ("config.json", put("agent", gamma=None), "gamma"),
    ("config.json", put("problem", operators=["tied"]), "'tied'"),
    *[
        ("checkpoint.safetensors", change, "--resume", "stopped")
        for change in (
            *map(cut, (0, 5, 200, 0.5, -1)),
            lambda _: save({"head": torch.zeros(3)}),
            agent(),
            agent(**{"agent.actor.0.weight": torch.zeros(64, 5)}),
        )
    ],
    *[
        (name, change, f"stopped/{name}")
        for name in ("episodes.csv", "updates.csv")
        for change in (None, lambda content: content.splitlines(True)[0])
    ],
]


@pytest.mark.parametrize("case", STOPPED)
def test_resume_of_an_altered_folder(stopped, capsys, case):
    name, change, *words = case
    file = stopped / name
    before = file.read_bytes()
    file.unlink() if change is None else file.write_bytes(change(before))
    assert not file.exists() or file.read_bytes() != before
    refused(capsys, ["--resume", stopped], *words)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--episodes", "3"], ["--episodes 2", "found 3"]),
        (["--seed", "7"], ["--seed 1", "found 7"]),
        (["--gamma", "0.5"], ["--gamma 1.0", "found 0.5"]),
        (["--no-mask-actions"], ["--mask-actions", "found False"]),
        (["--stem", "base"], ["--stem", "found base"]),
        (["--operators", "ties"], ["--operators", "ties"]),
        (["--experts", "digits", "letters"], ["--experts", "letters"]),
        (["--run-dir", "run"], ["--run-dir", "--resume"]),
    ],
)
def test_resume_with_another_config(stopped, capsys, argv, words):
    refused(capsys, ["--resume", stopped, *argv], *words)


def test_resume_of_no_folder(capsys):
    refused(capsys, ["--resume", "nowhere"], "--resume", "config.json", "nowhere")


def test_resume_after_an_expert_went_missing(own, capsys):
    own.expert()
    assert main(own.argv("--episodes", 1, "--run-dir", "mine")) == 0
    shutil.rmtree("expert1")
    capsys.readouterr()
    refused(capsys, ["--resume", "mine"], "'expert1'")


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
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            pytest.skip(f"cannot mount here: {done.stderr.strip()}")
        mounted.append(disk)
        return disk

    yield make
    for disk in mounted:
        subprocess.run(["umount", str(disk)], timeout=60, check=True)


def no_space(capsys, argv: list[str], disk: Path) -> None:
    assert main(argv) == 2
    one_error(capsys.readouterr().err, "space")
    assert not [p for p in disk.rglob("*") if p.name.endswith(".tmp")]


def test_no_space_for_the_checkpoint(own, capsys, small_disk):
    disk = small_disk(48)
    no_space(capsys, own.argv("--episodes", 2, "--run-dir", disk / "run"), disk)
    assert not (disk / "run" / "checkpoint.safetensors").exists()
    assert json.loads((disk / "run" / "config.json").read_text("utf-8"))["run"]["episodes"] == 2


def test_no_space_for_the_merged_model(own, finished, capsys, small_disk):
    """All that comes before the merged model fits; with more space, --resume completes it."""
    disk = small_disk(2048)
    argv = own.argv("--preset", "agent", "--episodes", 2, "--run-dir", disk / "run")
    files = contents(finished)
    later = ("/merged/", ".png", "/table.")
    need = sum(-(-len(files[f]) // 4096) * 4096 for f in files if not any(p in f for p in later))
    free = need + 2 * 4096  # enough for all the rest, not for the model
    (disk / "ballast").write_bytes(bytes(2048 * 1024 - free))
    assert main(argv) == 2
    words = ("run/.merged.tmp/model.safetensors", "space", f"merge --resume {disk / 'run'}")
    one_error(capsys.readouterr().err, *words)
    assert (disk / "run" / "finalists.json").is_file()
    assert not [p.name for p in (disk / "run").iterdir() if "merged" in p.name or "lock" in p.name]
    (disk / "ballast").unlink()
    assert main(["--resume", str(disk / "run"), "--quiet", "--compare", "paper"]) == 0
    assert (disk / "run" / "merged" / "model.safetensors").is_file()


# -------------------------------------------------------------------------- the hub, unreachable

HUB = "hf-hub:rmm-lab-tests/no-such-model"


@pytest.mark.slow
def test_hub(own, folder):
    """A firewall that answers nothing must not hold the user for minutes: there is a time limit.

    The three processes run at once, since one mostly waits.
    """
    own.base = HUB
    with (
        socket.socket() as deaf,
        socket.create_server(("127.0.0.1", 0)) as silent,
        contextlib.ExitStack() as ends,
    ):
        deaf.bind(("127.0.0.1", 0))  # a port that is taken, and does not listen
        started = []
        for server, offline in ((deaf, 1), (deaf, 0), (silent, 0)):
            run = f"run{len(started)}"
            env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}"}
            env |= {"HF_HUB_OFFLINE": str(offline), "HF_HOME": str(folder / f"hf-{run}")}
            started.append(start("-m", "rmm_lab", *own.argv("--run-dir", run), **env))
            ends.callback(started[-1].kill)
        ended = [finish(process) for process in started]
    for done in ended:
        assert done.returncode == 2, done.stderr
        (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in done.stderr
        for word in (HUB, "config.json", "model.safetensors", "folder"):
            assert word in error
    assert not list(Path.cwd().glob("run*"))


# ------------------------------------------------------------------------ as a user would type it

HELP = """
import sys
from rmm_lab.__main__ import main
try:
    main(["merge", "--help"])
except SystemExit as stop:
    assert stop.code == 0
for heavy in ("timm", "transformers", "torchvision", "matplotlib", "ray", "cmaes"):
    assert heavy not in sys.modules, heavy
"""


def test_help_loads_no_large_library():
    done = finish(start("-c", HELP))
    assert done.returncode == 0, done.stderr
    assert "--data-fraction" in done.stdout


WAITING = """
import os, runpy, signal
replace = os.replace

def then_wait(source, target, **options):
    replace(source, target, **options)
    if str(target).endswith("checkpoint.safetensors"):
        print("saved", flush=True)
        signal.pause()

os.replace = then_wait
runpy.run_module("rmm_lab", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_interrupted_and_resumed(own):
    """Ctrl-C after the first checkpoint: exit code 130, and the command that it prints works."""
    process = start("-c", WAITING, *own.argv("--episodes", 40, "--run-dir", "run"))
    said = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert said == "saved\n", done.stderr
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert "--resume run" in done.stderr
    assert not [p for p in listing() if p.endswith(".tmp")]
    assert main(["--resume", "run", "--quiet", "--compare", "paper"]) == 0
    assert len(Path("run/episodes.csv").read_text("utf-8").splitlines()) == 41


def test_interrupted_before_there_is_a_folder(own, capsys, monkeypatch):
    """Then there is nothing to resume, and nothing must say so."""

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("rmm_lab.search.command.train", interrupt)
    assert main(own.argv("--run-dir", "run")) == 130
    err = capsys.readouterr().err
    assert "stopped" in err
    assert "--resume" not in err
    assert not listing()


# -------------------------------------------------------------------------------- from Python


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"experts": ("nowhere", "e2")}, "'nowhere'"),
        ({"base": None}, "--base"),
        ({"episodes": 0}, "--episodes.* 0"),
        ({"operators": ("tied",)}, "'tied'"),
        ({"scope": "block"}, "layer.*tensor.*global.*'block'"),
        ({"preset": "fast"}, "default or weights or agent or paper.*'fast'"),
        ({"resume": Path("nowhere"), "run_dir": None}, "nowhere"),
        ({"colour": "red"}, "colour"),
    ],
    ids=str,
)
def test_python_callers_get_an_input_error(tiny, change, match):
    options = tiny | {"run_dir": Path("run"), "quiet": True, "episodes": 2} | change
    with pytest.raises(InputError, match=match):
        train(configure(**options))
    assert not listing()


# --------------------------------------------------------------------------------------- finetune


def finetune(own: Own, *more: object) -> list[str]:
    argv = ["finetune", "--base", own.base, "--images", own.images[0], "--out", "out"]
    return [*argv, "--steps", "1", "--batch-size", "4", *map(str, more)]


def test_finetune_of_the_untouched_problem(own):
    assert main(finetune(own, "--steps", 20, "--threads", 1)) == 0
    assert models.read_checkpoint("out").label_names == ["class0", "class1", "class2"]


def out_with_files(own: Own) -> None:
    Path("out").mkdir()
    Path("out/mine.txt").write_text("mine")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (out_with_files, ["--out", "out"]),
        (lambda o: Path("out").write_text("mine"), ["--out", "out"]),
        (lambda o: setattr(o, "base", "nowhere"), ["'nowhere'"]),
        (lambda o: o.images.__setitem__(0, "nowhere"), ["'nowhere'"]),
        (lambda o: as_half(o.pictures(0) / "train/class0/0.png"), ["images0/train/class0/0.png"]),
        (lambda o: as_half(o.pictures(0) / "test/class0/0.png"), ["images0/test/class0/0.png"]),
    ],
    ids=["files", "a file", "no base", "no images", "broken train", "broken test"],
)
def test_finetune(own, capsys, spoil, words):
    spoil(own)
    refused(capsys, finetune(own), *words)


@pytest.mark.parametrize(
    "argv",
    [
        *(["--steps", "0"], ["--steps", "-1"], ["--batch-size", "0"], ["--threads", "-1"]),
        *(["--learning-rate", v] for v in ("0", "-0.1", "nan", "inf")),
        ["--images"],
    ],
    ids=" ".join,
)
def test_finetune_options(own, capsys, argv):
    refused(capsys, finetune(own, *argv), argv[0], argv[-1])


def test_finetune_fewer_images_per_step_than_tasks(own, capsys):
    argv = finetune(own, "--images", *own.images, "--batch-size", 1)
    refused(capsys, argv, "--batch-size", "2")


def test_finetune_on_two_folders_of_one_name(own, capsys):
    own.images = [str(shutil.copytree(f, f"set{i}/pictures")) for i, f in enumerate(own.images)]
    refused(capsys, finetune(own, "--images", *own.images), "pictures")


def test_finetune_without_space(own, capsys, small_disk):
    disk = small_disk(16)
    no_space(capsys, finetune(own, "--out", disk / "out"), disk)
