"""CLIP experts with heads made of text, with transformers' CLIP as the oracle."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import timm
import torch
import transformers as hf
from conftest import write_images
from safetensors.torch import save_file
from test_convert import MODELS, VISION, close, images, logits, save, shaken

from rmm_lab.__main__ import main
from rmm_lab.errors import InputError
from rmm_lab.families.checkpoint import read_checkpoint
from rmm_lab.path import LayerPath

NAMES = ["class0", "class1", "class2"]


@pytest.fixture(scope="module")
def clip():
    return shaken(MODELS["CLIP"][1](), 1)


def class_embeddings(folder: Path, seed: int, names=NAMES, **more) -> torch.Tensor:
    rows = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))
    metadata = {"label_names": json.dumps(names)}
    save_file({"class_embeddings": rows} | more, folder / "class_embeddings.safetensors", metadata)
    return rows


def expert(folder: Path, clip, seed: int):
    """A tower alone, fine-tuned, as the experts on the hub are; and CLIP with it."""
    whole = copy.deepcopy(clip)
    shaken(whole.vision_model, seed)
    tower = hf.CLIPVisionModel(hf.CLIPVisionConfig(**VISION))
    tower.load_state_dict(whole.vision_model.state_dict())
    save(tower, folder)
    return whole


def by_clip(model, rows, x) -> torch.Tensor:
    """Zero-shot logits, written out."""
    pooled = model.vision_model(x).pooler_output
    image = model.visual_projection(pooled)
    image = image / image.norm(dim=-1, keepdim=True)
    return model.logit_scale.exp() * image @ (rows / rows.norm(dim=-1, keepdim=True)).T


def test_logits_are_clips(tmp_path, clip):
    base = read_checkpoint(save(clip, tmp_path / "base"))
    model, x = expert(tmp_path / "e", clip, 2), images()
    rows = class_embeddings(tmp_path / "e", 3)
    found = read_checkpoint(tmp_path / "e", base=base)
    assert found.label_names == NAMES
    expected = by_clip(model, rows, x)
    own, whole = logits(found, x)
    close(own, expected)
    torch.testing.assert_close(  # timm's classifier has no norm: a factor for each image
        whole / whole.norm(dim=-1, keepdim=True), expected / expected.norm(dim=-1, keepdim=True),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip
    assert (whole * expected).sum(-1).min() > 0


def test_the_file_may_hold_projection_and_scale(tmp_path, clip):
    model, x = expert(tmp_path / "e", clip, 2), images()
    class_embeddings(tmp_path / "e", 3)
    with pytest.raises(InputError, match=r"visual_projection\.weight.*found \(3, 8\) and None"):
        read_checkpoint(tmp_path / "e")
    more = {"visual_projection.weight": 2 * clip.visual_projection.weight}
    rows = class_embeddings(tmp_path / "e", 3, **more, logit_scale=torch.tensor(10.0))
    found = read_checkpoint(tmp_path / "e")
    close(logits(found, x)[0], by_clip(model, rows, x) / model.logit_scale.exp() * 10)


def test_siglip_needs_no_projection(tmp_path):
    model = shaken(hf.SiglipVisionModel(hf.SiglipVisionConfig(**VISION)), 1)
    save(model, tmp_path / "e")
    rows = torch.randn(3, 16)
    save_file({"class_embeddings": rows}, tmp_path / "e" / "class_embeddings.safetensors")
    pooled = model(images()).pooler_output
    expected = 100 * torch.nn.functional.cosine_similarity(pooled[:, None], rows, dim=-1)
    close(logits(read_checkpoint(tmp_path / "e"), images())[0], expected)


@pytest.mark.parametrize("names", [["one"], {"a": 1}])
def test_names_of_another_number_are_refused(tmp_path, clip, names):
    base = read_checkpoint(save(clip, tmp_path / "base"))
    expert(tmp_path / "e", clip, 2)
    class_embeddings(tmp_path / "e", 3, names)
    with pytest.raises(InputError, match="3 'label_names'"):
        read_checkpoint(tmp_path / "e", base=base)


def test_experts_with_text_heads_merge(tmp_path, monkeypatch, clip):
    monkeypatch.chdir(tmp_path)
    save(clip, Path("m/base"))
    for i in (1, 2):
        expert(Path(f"m/e{i}"), clip, i + 1)
        class_embeddings(Path(f"m/e{i}"), i)
        write_images(tmp_path / f"i{i}", i, per_class=4)
    words = ["--base", "m/base", "--experts", "m/e1", "m/e2", "--images", "i1", "i2"]
    words += ["--preset", "weights", "--episodes", "3", "--data-fraction", "1", "--quiet"]
    assert main([*words, "--compare", "paper", "--run-dir", "run"]) == 0
    exported = timm.create_model("local-dir:run/merged", pretrained=True).eval()
    path = LayerPath.from_json(Path("run/path.json").read_text())
    pool, x = path.load_pool(), images()
    stem = pool.stem(*path.stem[::2])
    tokens = pool.architecture.embed(stem, x)
    for source, k, scales in path.steps:
        tokens = pool.architecture.apply(pool.layer(source, k, scales), tokens)
    for i, name in enumerate(("e1", "e2")):
        own = pool.architecture.logits(stem, tokens, pool.heads[name])
        part = exported(x)[:, 3 * i : 3 * i + 3]
        assert torch.equal(own.argmax(-1), part.argmax(-1))
    class_embeddings(Path("m/e1"), 9)
    with pytest.raises(InputError, match="has changed"):
        path.load_pool()
