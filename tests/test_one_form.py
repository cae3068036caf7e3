"""Base and experts that say the same in other words, or of another size: brought into one form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from conftest import TINY, shake, write_images, write_model
from timm.layers import resample_abs_pos_embed
from timm.models import save_for_hf

from rmm_lab.__main__ import main
from rmm_lab.errors import InputError
from rmm_lab.families.checkpoint import read_checkpoint, same_form
from rmm_lab.path import LayerPath


def run(base, experts, images) -> int:
    words = ["--base", str(base), "--experts", *map(str, experts), "--images", *map(str, images)]
    words += ["--preset", "weights", "--episodes", "4", "--data-fraction", "1"]
    return main([*words, "--compare", "paper", "--run-dir", "run"])


# ---------------------------------------------------------- what timm's save_for_hf makes of a base


def timm_expert(folder: Path, base: Path, **args) -> Path:
    """As a user of timm fine-tunes and saves: args are those of create_model."""
    model = timm.create_model(f"local-dir:{base}", pretrained=True, num_classes=3, **args)
    shake(model.parameters(), len(folder.name), 0.1)
    cfg = json.loads((base / "config.json").read_text())["model_args"]
    args = (
        cfg | {"num_classes": 3, "in_chans": 1, "global_pool": "token", "img_size": [8, 8]} | args
    )
    save_for_hf(model, folder, model_args=args, safe_serialization=True)
    return folder


def test_experts_that_timm_saved_with_more_words_are_the_bases(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = write_model(tmp_path / "start", 0)
    experts = [timm_expert(tmp_path / name, base) for name in ("one", "three")]
    texts = [read_checkpoint(f).config["model_args"] for f in (base, *experts)]
    assert texts[0] != texts[1]  # which is why they were refused
    images = [write_images(tmp_path / f"i{i}", i) for i in (1, 2)]
    assert run(base, experts, images) == 0
    merged = timm.create_model("local-dir:run/merged", pretrained=True)
    assert merged.num_classes == 6


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"qk_norm": True}, "q_norm"),
        ({"num_heads": 4}, "'num_heads': 2.*in blocks.0.attn.*'num_heads': 4"),
        ({"act_layer": "relu"}, "'kind': 'GELU'.* in blocks.0.mlp.act.*'kind': 'ReLU'"),
        ({"global_pool": "avg", "fc_norm": False}, "'global_pool': 'token'.*'global_pool': 'avg'"),
        ({"norm_layer": "layernorm2d"}, "LayerNorm2d"),
    ],
)
def test_what_is_another_model_is_refused_by_its_first_difference(tmp_path, args, words):
    base = read_checkpoint(write_model(tmp_path / "start", 0))
    config = TINY | {"model_args": TINY["model_args"] | args}
    weights = timm.create_model(config["architecture"], **config["model_args"]).state_dict()
    other = type(base)("other", tmp_path, config, weights, "")
    with pytest.raises(InputError, match=words):
        same_form(base, [base, other])


@pytest.mark.parametrize(
    "args",
    [
        {"drop_path_rate": 0.2, "drop_rate": 0.1, "patch_drop_rate": 0.1, "attn_drop_rate": 0.3},
        {"img_size": [8, 8], "qkv_bias": True, "mlp_ratio": 4, "class_token": True},
        {"dynamic_img_size": True, "weight_init": "jax"},
    ],
)
def test_what_changes_nothing_at_evaluation_is_the_same_model(tmp_path, args):
    base = read_checkpoint(write_model(tmp_path / "start", 0))
    config = TINY | {"model_args": TINY["model_args"] | args}
    other = type(base)("other", tmp_path, config, base.weights, "")
    assert same_form(base, [other])[1] == [other]


# -------------------------------------------------------------------------------- another resolution


def sized(folder: Path, size: int, seed: int) -> Path:
    config = TINY | {"model_args": TINY["model_args"] | {"img_size": size, "num_classes": 3}}
    model = timm.create_model(config["architecture"], **config["model_args"])
    shake(model.parameters(), seed)
    config["pretrained_cfg"] = config["pretrained_cfg"] | {"input_size": [1, size, size]}
    save_for_hf(model, folder, model_config=config, model_args=config["model_args"],
                safe_serialization=True)  # fmt: skip
    return folder


def test_experts_of_one_larger_size_keep_it_and_the_base_is_resampled(tmp_path):
    base = read_checkpoint(sized(tmp_path / "base", 8, 1))
    experts = [read_checkpoint(sized(tmp_path / f"e{i}", 16, i)) for i in (2, 3)]
    found, same = same_form(base, experts)
    assert same == experts
    by_timm = timm.create_model(f"local-dir:{tmp_path / 'base'}", pretrained=True, img_size=16)
    expected = by_timm.state_dict()
    assert found.weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found.weights[name], tensor)
    assert any("8 x 8" in note and "16 x 16" in note for note in found.notes)
    assert base.family.make_tasks(found, [str(write_images(tmp_path / "i", 1))])[
        0
    ].format.shape == (
        1,
        16,
        16,
    )
    assert same_form(found, experts)[0] is found  # once


def test_experts_of_several_sizes_take_the_bases(tmp_path):
    base = read_checkpoint(sized(tmp_path / "base", 8, 1))
    experts = [read_checkpoint(sized(tmp_path / f"e{i}", s, i)) for i, s in ((2, 16), (3, 8))]
    found, (large, small) = same_form(base, experts)
    assert found is base
    assert small is experts[1]
    expected = resample_abs_pos_embed(experts[0].weights["pos_embed"], [2, 2], [4, 4])
    torch.testing.assert_close(large.weights["pos_embed"], expected)
    assert large.weights["pos_embed"].shape == (1, 5, 16)


def test_a_run_with_another_size_says_so_and_can_be_built_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = sized(tmp_path / "start", 8, 1)
    experts = [sized(tmp_path / f"e{i}", 16, i) for i in (2, 3)]
    images = [write_images(tmp_path / f"i{i}", i) for i in (1, 2)]
    assert run(base, experts, images) == 0
    out = capsys.readouterr().out
    assert any("note: " in line and "resampled" in line for line in out.splitlines())
    notes = json.loads(Path("run/notes.json").read_text())
    assert any(note.startswith("model ") and "resampled" in note for note in notes)
    path = LayerPath.from_json(Path("run/path.json").read_text())
    merged = timm.create_model("local-dir:run/merged", pretrained=True).eval()
    x = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        assert torch.equal(path.build()(x), merged(x))
