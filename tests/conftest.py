"""Tiny models and images, built in the process: ViTs of 3 layers and width 16 on 8 px images."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from PIL import Image

from rmm_lab.families import checkpoint as models
from rmm_lab.families import vit
from rmm_lab.families.parts import Weights
from rmm_lab.tasks.image_task import InputFormat, Split, Task

N_CLASSES = 3
TINY = {
    "architecture": "vit_tiny_patch16_224",
    "model_args": {
        "img_size": 8,
        "patch_size": 4,
        "in_chans": 1,
        "embed_dim": 16,
        "depth": 3,
        "num_heads": 2,
    },
    "pretrained_cfg": {"input_size": [1, 8, 8], "mean": [0.5], "std": [0.5], "crop_pct": 1.0},
}


hypothesis.settings.load_profile("ci")  # no deadline, and the same examples on every run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that two workers end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _random_state():
    """No test depends on the draws of another."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def random_weights(seed: int, *, num_classes: int = N_CLASSES, depth: int = 3) -> Weights:
    """Weights of a tiny ViT, large enough that layers and sources make a difference."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = vit.create(TINY, depth=depth, num_classes=num_classes)
    g = torch.Generator().manual_seed(seed)
    return {k: v + 0.3 * torch.randn(v.shape, generator=g) for k, v in model.state_dict().items()}


def write_model(folder: Path, seed: int, *, near: Weights | None = None, **kwargs) -> Path:
    """A tiny ViT as a timm folder; ``near`` gives weights that this one is a fine-tuned copy of."""
    num_classes, depth = kwargs.get("num_classes", N_CLASSES), kwargs.get("depth", 3)
    weights = random_weights(seed, num_classes=num_classes, depth=depth)
    if near is not None:
        weights = {k: near[k] + 0.5 * v if k in near else v for k, v in weights.items()}
    config = vit.model_config(TINY, depth=depth, num_classes=num_classes)
    config["label_names"] = [f"class{i}" for i in range(num_classes)]
    models.write_checkpoint(folder, config, weights)
    return folder


def write_images(
    folder: Path, seed: int, *, per_class: int = 12, splits=("train", "reward", "test")
) -> Path:
    """An ImageFolder of random pictures, ``SPLIT/CLASS/N.png``; no splits: ``CLASS/N.png``."""
    rng = np.random.default_rng(seed)
    for split in splits or [""]:
        for c in range(N_CLASSES):
            (folder / split / f"class{c}").mkdir(parents=True)
            for n in range(per_class):
                pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / f"class{c}" / f"{n}.png")
    return folder


def shake(parameters: Iterable[torch.Tensor], seed: int, scale: float = 0.3) -> None:
    """Move every parameter by noise, so that each makes a difference."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter += scale * torch.randn(parameter.shape, generator=g)


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Wait for a process, which has a time limit."""
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait(timeout=30)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="module")
def no_progress_bars():
    """transformers draws them on stderr, where our errors are looked for."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def write_tiny(root: Path) -> dict:
    """Folders of a base, two experts and their images: arguments for ``load_problem``."""
    base = write_model(root / "base", 0)
    weights = models.read_checkpoint(base).weights
    experts = [write_model(root / f"e{i}", i, near=weights) for i in (1, 2)]
    images = [write_images(root / f"i{i}", i) for i in (1, 2)]
    return {
        "base": str(base),
        "experts": tuple(map(str, experts)),
        "images": tuple(map(str, images)),
    }


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> dict:
    """Those that no test changes."""
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def problem(tiny):
    """The tiny problem, freshly loaded: N = 2 experts, M = 2 operators, L = 3 layers."""
    from rmm_lab.search.problem import load_problem

    return load_problem(**tiny, operators=("task_arithmetic:scale=0.5", "ties"), stem="base")


@pytest.fixture(scope="session")
def t5s(tmp_path_factory) -> dict:
    """For some variants the models and their folders: a base and two experts; two tasks."""
    from t5_models import hf_model, tuned, write_t5, write_texts

    root = tmp_path_factory.mktemp("t5s")
    out = {"texts": [write_texts(root / "own", 1, fixed=False)]}
    out["texts"].append(write_texts(root / "noyes", 2, fixed=True))
    for variant in ("t5", "v1.1", "unequal"):
        base = hf_model(variant, 1)
        models = [base, tuned(base, 2), tuned(base, 3)]
        folders = [
            write_t5(root / variant / name, model, tokenizer=name != "two")
            for name, model in zip(("base", "one", "two"), models, strict=True)
        ]
        out[variant] = (models, folders)
    return out


class TensorTask(Task):
    """A task given as tensors: what ``Task`` is, without files."""

    def __init__(self, name: str, seed: int, classes: int, draw) -> None:
        self.name, self.source = name, name
        self.classes = [f"{name}{c}" for c in range(classes)]
        self.format = InputFormat((1, 8, 8), (0.5,), (0.5,))
        self._splits = {}
        for i, (split, n) in enumerate((("train", 100), ("reward", 60), ("test", 60))):
            g = torch.Generator().manual_seed(100 * seed + i)
            labels = torch.arange(classes).repeat_interleave(n)
            images = draw(labels, g) + 0.25 * torch.randn(len(labels), 8, 8, generator=g)
            pixels = (images.clamp(0, 1) * 255).to(torch.uint8)[:, None]
            self._splits[split] = Split(pixels, labels)

    def split(self, name: str):
        return self._splits[name]


def quadrant(labels, g):
    """Which corner is bright."""
    images = torch.full((len(labels), 8, 8), 0.3)
    for n, c in enumerate(labels.tolist()):
        y, x = 4 * (c // 2), 4 * (c % 2)
        images[n, y : y + 4, x : x + 4] += 0.25
    return images


def stripes(labels, g):
    """Bars along, across, or both ways, at a random phase."""
    phase = torch.rand(len(labels), 1, 1, generator=g) * 6.3
    x = torch.arange(8).float()
    across, along = torch.sin(1.6 * x + phase), torch.sin(1.6 * x[:, None] + phase)
    waves = torch.stack([(across + 0 * along), (along + 0 * across), across * along], 1)
    return 0.5 + 0.4 * waves[torch.arange(len(labels)), labels]


@pytest.fixture(scope="session")
def trained():
    """A small but real merging problem, N = 2, M = 2, L = 3: experts trained here in a few seconds."""
    from rmm_lab.layers import LayerPool
    from rmm_lab.search.problem import Problem, ProblemSpec
    from rmm_lab.zoo.training import fine_tune

    tasks = [TensorTask("quadrant", 1, 4, quadrant), TensorTask("stripes", 2, 3, stripes)]
    config = vit.model_config(TINY, depth=3, num_classes=4)
    torch.manual_seed(0)
    start = vit.create(TINY, depth=None, num_classes=4).state_dict()
    base = models.Checkpoint("base", Path("."), config, dict(start), "0")
    experts = []
    for task in tasks:
        config, weights = fine_tune(
            base, [task], steps=150, learning_rate=5e-3, seed=0, batch_size=64, augment=False
        )
        experts.append(models.Checkpoint(task.name, Path("."), config, weights, task.name))
    names, operators = tuple(t.name for t in tasks), ("task_arithmetic:scale=0.5", "ties")
    spec = ProblemSpec(experts=names, operators=operators, stem=operators[0])
    return Problem(LayerPool(base, experts, names, operators), tasks, spec)
