"""LoRA adapters, against peft's own merge and a case worked out by hand."""

from __future__ import annotations

import copy
import json
import re
import warnings
from pathlib import Path

import lm_models
import pytest
import torch
from conftest import TINY, random_weights, shake, write_images, write_model
from safetensors.torch import load_file, save_file
from t5_models import hf_model, write_t5, write_texts

from rmm_lab.__main__ import main
from rmm_lab.errors import InputError
from rmm_lab.families.checkpoint import read_checkpoint
from rmm_lab.families.vit import create
from rmm_lab.path import LayerPath

QKV = "blocks.1.attn.qkv"


def write_adapter(folder: Path, config: dict, tensors: dict) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | config))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def base(tmp_path):
    return read_checkpoint(write_model(tmp_path / "base", 0))


# ------------------------------------------------------------------------------------- by hand

A = torch.tensor([[1.0, 2.0], [0.0, 1.0]])  # (r, in)
B = torch.tensor([[1.0, 0.0], [3.0, 1.0], [0.0, 2.0]])  # (out, r)
BA = torch.tensor([[1.0, 2.0], [3.0, 7.0], [0.0, 2.0]])


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"lora_alpha": 4}, 2.0),
        ({}, 4.0),  # peft's default for alpha is 8
        ({"lora_alpha": 4, "use_rslora": True}, 4 / 2**0.5),
        ({"lora_alpha": 4, "alpha_pattern": {"qkv": 6}}, 3.0),
        ({"lora_alpha": 4, "alpha_pattern": {"kv": 6, "norm": 5}}, 2.0),
        ({"lora_alpha": 4, "r": 64}, 2.0),  # the rank is that of the matrices
    ],
)
def test_a_module_gets_its_matrices_product(base, tmp_path, config, scale):
    pad = torch.nn.functional.pad
    tensors = {
        f"base_model.model.{QKV}.lora_A.weight": pad(A, (0, 14)),  # (2, 16)
        f"base_model.model.{QKV}.lora_B.weight": pad(B, (0, 0, 0, 45)),  # (48, 2)
    }
    found = read_checkpoint(write_adapter(tmp_path / "lora", config, tensors), base=base)
    expected = dict(base.weights)
    expected[f"{QKV}.weight"] = expected[f"{QKV}.weight"].clone()
    expected[f"{QKV}.weight"][:3, :2] += scale * BA
    assert found.weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found.weights[name], tensor)
    assert found.config == base.config
    assert any("base" in note for note in found.notes)


def test_fan_in_fan_out_turns_the_product(base, tmp_path):
    name = "blocks.0.mlp.fc1"  # (64, 16), as if its file held (in, out)
    first, second = torch.randn(2, 64), torch.randn(16, 2)
    tensors = {f"{name}.lora_A.weight": first, f"{name}.lora_B.weight": second}
    config = {"lora_alpha": 2, "fan_in_fan_out": True}
    found = read_checkpoint(write_adapter(tmp_path / "lora", config, tensors), base=base)
    expected = base.weights[f"{name}.weight"] + (second @ first).T
    torch.testing.assert_close(found.weights[f"{name}.weight"], expected)


# ------------------------------------------------------------------------------------ against peft


def peft_model(model, seed: int, **options):
    """An adapter of peft's, all matrices of which are random, and the whole model that it merges to."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=3, **options))
    shake((p for p in adapted.parameters() if p.requires_grad), seed)
    return adapted


def check(adapted, folder: Path, base, drop=()) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(folder, save_embedding_layers=False)
    found = read_checkpoint(folder, base=base)
    expected = adapted.merge_and_unload().state_dict()
    changed = 0
    for name, tensor in found.weights.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
        changed += name not in base.weights or not torch.equal(tensor, base.weights[name])
    assert changed
    assert expected.keys() - found.weights.keys() <= set(drop)


TIED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q", "v"]},
        {"target_modules": ["wi", "wo", "o"], "use_rslora": True, "lora_alpha": 16},
        {"target_modules": r".*decoder.*\.k", "alpha_pattern": {r"block\.1\..*k": 5}},
        {"target_modules": ["q", "k"], "rank_pattern": {"k": 2}},
        {"target_modules": ["q"], "modules_to_save": ["final_layer_norm"]},
    ],
    ids=["defaults", "rank-stabilised", "alphas", "ranks", "whole modules"],
)
def test_a_t5s_adapter_is_merged_as_peft_merges_it(tmp_path, options):
    model = hf_model("t5", 1)
    base = read_checkpoint(write_t5(tmp_path / "base", model))
    check(peft_model(model, 2, **options), tmp_path / "lora", base, TIED)


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
        ("llama-tied", {"target_modules": "all-linear", "use_rslora": True}),
        ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
        ("neox", {"target_modules": ["query_key_value"]}),
    ],
)
def test_a_language_models_adapter_is_merged_as_peft_merges_it(tmp_path, variant, options):
    """Compared as the whole models that transformers builds, since GPT-2's files turn their matrices."""
    model = lm_models.hf_model(variant, 1)
    base = read_checkpoint(lm_models.write_lm(tmp_path / "base", model))
    adapted = peft_model(model, 2, **options)
    adapted.save_pretrained(tmp_path / "lora")
    expected = adapted.merge_and_unload()
    whole = read_checkpoint(lm_models.write_lm(tmp_path / "whole", expected))
    found = read_checkpoint(tmp_path / "lora", base=base)
    assert found.weights.keys() == whole.weights.keys()
    for name, tensor in found.weights.items():
        torch.testing.assert_close(tensor, whole.weights[name], rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(found.weights[n], base.weights[n]) for n in base.weights)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["qkv", "proj"], "modules_to_save": ["head"]},  # proj: the patches' too
        {"target_modules": ["fc1"], "bias": "lora_only"},
        {"target_modules": ["fc2"], "lora_bias": True, "init_lora_weights": False},
    ],
    ids=["convolution and head", "biases", "bias of the matrix"],
)
def test_a_vits_adapter_is_merged_as_peft_merges_it(tmp_path, options):
    base = read_checkpoint(write_model(tmp_path / "base", 0))
    model = create(TINY, depth=3, num_classes=3)
    model.load_state_dict(base.weights)
    check(peft_model(model, 2, **options), tmp_path / "lora", base)


def test_a_head_of_other_classes_comes_with_the_adapter(tmp_path, base):
    model = create(TINY, depth=3, num_classes=5)
    model.load_state_dict(random_weights(4, num_classes=5))
    adapted = peft_model(model, 2, target_modules=["qkv"], modules_to_save=["head"])
    adapted.save_pretrained(tmp_path / "lora")
    found = read_checkpoint(tmp_path / "lora", base=base)
    assert found.weights["head.weight"].shape == (5, 16)
    assert found.num_classes == 5
    assert found.label_names is None


# ------------------------------------------------------------------------------------- refusals


def spoiled(folder: Path, config=None, tensors=None) -> Path:
    good = {f"{QKV}.lora_A.weight": torch.ones(2, 16), f"{QKV}.lora_B.weight": torch.ones(48, 2)}
    good |= tensors or {}
    return write_adapter(folder, config or {}, {k: v for k, v in good.items() if v is not None})


@pytest.mark.parametrize(
    ("config", "tensors", "words"),
    [
        ({"peft_type": "IA3"}, None, "'IA3'.*merge_and_unload"),
        ({"use_dora": True}, None, "use_dora.*merge_and_unload"),
        ({"init_lora_weights": "pissa_niter_4"}, None, "pissa.*merge_and_unload"),
        ({"target_parameters": ["a"]}, None, "target_parameters.*merge_and_unload"),
        ({}, {f"{QKV}.lora_magnitude_vector": torch.ones(48)}, "DoRA.*merge_and_unload"),
        ({}, {f"{QKV}.lora_B.weight": None}, "only lora_A.*merge_and_unload"),
        ({}, {f"{QKV}.lora_B.weight": torch.ones(40, 2)}, r"'blocks\.1\.attn\.qkv\.weight'.*\(40, 16\)"),
        ({}, {"no.lora_A.weight": A, "no.lora_B.weight": B}, r"'no\.weight'.*found none"),
        ({}, {f"{QKV}.lora_A.weight": torch.full((2, 16), torch.nan)}, "32 NaN"),
    ],
)  # fmt: skip
def test_what_is_no_plain_lora_of_this_base_is_refused(base, tmp_path, config, tensors, words):
    with pytest.raises(InputError, match=words):
        read_checkpoint(spoiled(tmp_path / "lora", config, tensors), base=base)


def test_an_adapter_alone_needs_the_name_of_its_base(tmp_path, base):
    folder = spoiled(tmp_path / "lora")
    with pytest.raises(InputError, match=r"base_model_name_or_path.*merge_and_unload"):
        read_checkpoint(folder)
    named = spoiled(tmp_path / "named", {"base_model_name_or_path": str(base.folder)})
    expected = read_checkpoint(folder, base=base).weights
    assert all(torch.equal(t, expected[n]) for n, t in read_checkpoint(named).weights.items())
    with pytest.raises(InputError, match="a whole model, found an adapter"):
        read_checkpoint(spoiled(tmp_path / "x", {"base_model_name_or_path": str(folder)}))


def test_the_digest_covers_the_scale(tmp_path, base):
    first = read_checkpoint(spoiled(tmp_path / "a", {"lora_alpha": 4}), base=base).sha256
    assert read_checkpoint(spoiled(tmp_path / "b", {"lora_alpha": 4}), base=base).sha256 == first
    assert read_checkpoint(spoiled(tmp_path / "c", {"lora_alpha": 5}), base=base).sha256 != first


# --------------------------------------------------------------------------------- from end to end


def run(words: list[str]) -> int:
    words += ["--preset", "weights", "--episodes", "4", "--data-fraction", "1", "--quiet"]
    return main([*words, "--compare", "paper", "--run-dir", "run"])


def test_adapters_of_a_vit_are_merged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    near = read_checkpoint(write_model(tmp_path / "base", 0))
    images = [str(write_images(tmp_path / f"i{i}", i)) for i in (1, 2)]
    for i in (1, 2):
        tensors = {"head.weight": torch.randn(3, 16), "head.bias": torch.randn(3)}
        spoiled(tmp_path / f"e{i}", tensors=tensors)
    assert run(["--base", "./base", "--experts", "e1", "e2", "--images", *images]) == 0
    path = LayerPath.from_json(Path("run/path.json").read_text())
    merged = load_file("run/merged/model.safetensors")
    assert torch.equal(path.build().state_dict()["norm.weight"], merged["norm.weight"])
    assert merged["norm.weight"].shape == near.weights["norm.weight"].shape
    changed = json.loads(Path("e1/adapter_config.json").read_text()) | {"lora_alpha": 99}
    Path("e1/adapter_config.json").write_text(json.dumps(changed))
    with pytest.raises(InputError, match="has changed"):
        path.build()


def test_a_broken_adapter_of_a_t5_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_t5(tmp_path / "base", hf_model("t5", 1))
    texts = [str(write_texts(tmp_path / f"t{i}", i, fixed=False)) for i in (1, 2)]
    name = "base_model.model.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight"
    for i in (1, 2):
        write_adapter(tmp_path / f"e{i}", {"r": 4}, {name: torch.ones(4, 16)})
    capsys.readouterr()  # what transformers says when it writes
    assert run(["--base", "./base", "--experts", "e1", "e2", "--texts", *texts]) == 2
    error = capsys.readouterr().err.strip()
    assert re.fullmatch(r"error: model 'e1'.*merge_and_unload.*", error), error
    assert not Path("run").exists()
