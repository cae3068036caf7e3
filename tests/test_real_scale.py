"""Real pretrained models' tables, end to end on stand-ins: a tiny DINOv2, small sets of pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from rmm_lab.evidence import real_measure, tables
from rmm_lab.evidence.real import Real
from rmm_lab.evidence.rows import read_csv
from rmm_lab.families.checkpoint import read_checkpoint
from rmm_lab.search import uniform

SIZE = 42  # 3 x 3 patches


def write_dinov2(folder: Path, seed: int = 0, size: int = 56) -> Path:
    """The real base's architecture, of two narrow blocks, at its own size of pictures."""
    import timm

    torch.manual_seed(seed)
    args = {"embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 0, "img_size": size}
    model = timm.create_model("vit_small_patch14_dinov2", pretrained=False, **args)
    folder.mkdir(parents=True)
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors"
    )
    cfg = {"mean": [0.5] * 3, "std": [0.25] * 3, "input_size": [3, size, size]}
    config = {"architecture": "vit_small_patch14_dinov2", "num_classes": 0, "model_args": args}
    (folder / "config.json").write_text(json.dumps(config | {"pretrained_cfg": cfg}))
    return folder


def write_set(folder: Path, seed: int, frames: int = 1, classes: int = 4) -> Path:
    """Classes of different colours: 6 tracks of ``frames`` pictures each in train, 3 pictures in test."""
    rng = np.random.default_rng(seed)
    for split, n in (("train", 6), ("test", 3)):
        for c in range(classes):
            at = folder / split / f"class{c}"
            at.mkdir(parents=True)
            for i in range(n):
                for frame in range(frames if split == "train" else 1):
                    pixels = rng.integers(0, 60, (14, 14, 3)) + 45 * c
                    name = f"{i:03d}_{frame:03d}.png" if frames > 1 else f"p{i}.png"
                    Image.fromarray(pixels.astype(np.uint8)).save(at / name)
    return folder


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> dict:
    """Options of ``tables real``: a base and four sets."""
    root = tmp_path_factory.mktemp("real")
    for seed, name in enumerate(("cifar10_jpg", "gtsrb_png", "flowers", "mnist")):
        write_set(root / "data" / name, seed, frames=3 if name == "gtsrb_png" else 1)
    base = write_dinov2(root / "base")
    small = {"size": SIZE, "steps": 2, "batch_size": 4, "reward": 8, "calibration": 4}
    small |= {"episodes": 6, "seeds": (1,), "curve": (1e-3, 1e-2)}
    return {"base": str(base), "data": root / "data", "work": root / "work"} | small


@pytest.fixture(scope="module")
def measured(stand_ins, tmp_path_factory) -> Path:
    """All parts but texts, of few rules, each tuned over two settings."""
    out = tmp_path_factory.mktemp("results-real")
    with pytest.MonkeyPatch.context() as patch:
        few(patch)
        Real(**stand_ins, out=out).run()
    return out


def few(patch: pytest.MonkeyPatch) -> None:
    names = ("weight average", "task arithmetic, tuned", "TIES, tuned", uniform.WEIGHTS)
    patch.setattr(uniform, "GRIDS", {name: uniform.GRIDS[name][:2] for name in names})
    patch.setattr(tables, "ONCE", ("fine-tuned", *names))
    patch.setattr(real_measure, "RULES", names)
    patch.setattr(uniform, "VALUES", {2: (0.3, 0.6)})
    patch.setattr(uniform, "MOST", 4)
    patch.setattr(real_measure, "alone", lambda function, job: function(job))


def rows(out: Path, name: str) -> list[dict]:
    return read_csv(out / f"{name}.csv").to_dict("records")


def test_all_parts_come_out(measured, stand_ins):
    sha = read_checkpoint(stand_ins["base"]).sha256
    for name in ("halves", "vision", "dar", "stranger", "subsets", "unseen", "curve", "speed"):
        for row in rows(measured, name):
            assert row["base_sha256"] == sha
            assert row["training"] == "2 steps of 4 at 5e-05"
            assert json.loads(row["config"])
            assert "commit" in row and "seconds" in row
    assert {r["group"] for r in rows(measured, "halves")} == {"CIFAR10", "GTSRB"}
    four = "CIFAR10+GTSRB+flowers+MNIST"
    assert {r["group"] for r in rows(measured, "vision")} == {"CIFAR10+GTSRB", four}
    assert len({r["group"] for r in rows(measured, "subsets")}) == 6 + 4 + 1
