"""transformers' vision models become timm's, with transformers' own logits as the oracle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
import transformers as hf
from conftest import shake, write_images
from safetensors.torch import load_file, save_file

from rmm_lab.__main__ import main
from rmm_lab.errors import InputError
from rmm_lab.families.checkpoint import read_checkpoint, same_form
from rmm_lab.families.vit_run import create

SIZE = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
VISION = SIZE | {"intermediate_size": 24}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
LABELS = {0: "class0", 1: "class1", 2: "class2"}


def plain(kind: str, base: str, **args):
    """How to make a classifier and its headless base."""
    config = getattr(hf, f"{base}Config")
    return (
        lambda: getattr(hf, kind)(config(**args, id2label=LABELS)),
        lambda: getattr(hf, f"{base}Model")(config(**args)),
    )


def tower(name: str, **args):
    config = getattr(hf, f"{name}Config")
    both = {"vision_config": VISION | args, "text_config": TEXT, "projection_dim": 8}
    return (
        lambda: getattr(hf, f"{name}ForImageClassification")(config(**both, id2label=LABELS)),
        lambda: getattr(hf, f"{name}Model")(config(**both)),
    )


MODELS = {
    "ViT": plain("ViTForImageClassification", "ViT", **VISION),
    "ViT, other parts": plain(
        "ViTForImageClassification", "ViT", **VISION, hidden_act="gelu_new", qkv_bias=False,
        layer_norm_eps=1e-5,
    ),
    "DeiT": plain("DeiTForImageClassification", "DeiT", **VISION),
    "DeiT with teacher": plain("DeiTForImageClassificationWithTeacher", "DeiT", **VISION),
    "DINOv2": plain("Dinov2ForImageClassification", "Dinov2", **SIZE, mlp_ratio=2),
    "DINOv2 with registers": plain(
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegisters", **SIZE, mlp_ratio=2
    ),
    "DINOv2, SwiGLU": plain(
        "Dinov2ForImageClassification", "Dinov2", **SIZE, mlp_ratio=3, use_swiglu_ffn=True
    ),
    "DINOv2 with registers, SwiGLU": plain(
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegisters", **SIZE, use_swiglu_ffn=True
    ),
    "CLIP": tower("CLIP"),
    "CLIP, other activation": tower("CLIP", hidden_act="gelu"),
    "SigLIP": tower("Siglip"),
}  # fmt: skip


def shaken(model, seed: int):
    """A model, every parameter of which is random and makes a difference."""
    shake(model.parameters(), seed)
    return model.eval().requires_grad_(False)


def save(model, folder: Path, **processor) -> Path:
    model.save_pretrained(folder)
    if processor:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def images(size: int = 16) -> torch.Tensor:
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(5))


def logits(checkpoint, x, path=None):
    """As a search computes them, piece by piece; and as a whole model does."""
    family, parts = (
        checkpoint.family.architecture(checkpoint.config),
        checkpoint.family.split(checkpoint.weights),
    )
    path = path or range(len(parts.layers))
    stem = family.stem(parts.stem)
    tokens = family.embed(stem, x)
    for k in path[:-1]:
        tokens = family.apply(family.layer(k, parts.layers[k]), tokens)
    tokens = family.apply_last(family.layer(path[-1], parts.layers[path[-1]]), tokens)
    whole = family.assemble(parts.stem, [(k, parts.layers[k]) for k in path], {"a": parts.head})
    out = whole(x)
    return family.logits(stem, tokens, parts.head), getattr(out, "logits", out)


def close(found, expected) -> None:
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [m for m, _ in MODELS.values()], ids=MODELS)
def test_logits_are_those_of_transformers(tmp_path, make):
    model, x = shaken(make(), 1), images()
    found = read_checkpoint(save(model, tmp_path / "m"))
    assert found.label_names == list(LABELS.values())
    for own in logits(found, x):
        close(own, model(x).logits)
    pieces, whole = logits(found, x, (2, 0, 0, 1))
    close(pieces, whole)


@pytest.mark.parametrize(("make", "start"), MODELS.values(), ids=MODELS)
def test_models_merge_with_their_headless_base_and_are_exported(tmp_path, monkeypatch, make, start):
    """transformers' own files in, one command, and out comes what the library loads, with equal logits."""
    monkeypatch.chdir(tmp_path)
    save(shaken(start(), 1), Path("m/start"))
    for i in (1, 2):
        save(shaken(make(), i + 1), Path(f"m/e{i}"))
        write_images(tmp_path / f"i{i}", i, per_class=4)
    words = ["--base", "m/start", "--experts", "m/e1", "m/e2", "--images", "i1", "i2"]
    words += ["--preset", "weights", "--episodes", "3", "--data-fraction", "1", "--quiet"]
    assert main([*words, "--compare", "paper", "--run-dir", "run"]) == 0
    config, x = json.loads(Path("run/merged/config.json").read_text()), images()
    if config.get("model_type", "").startswith("dinov2"):
        exported = hf.AutoModelForImageClassification.from_pretrained("run/merged").eval()
        found = exported(x).logits.detach()
        assert exported.config.id2label[3] == "e2/class0"
    else:
        exported = timm.create_model("local-dir:run/merged", pretrained=True).eval()
        found = exported(x).detach()
    assert found.shape == (4, 6)
    library = "transformers" if "model_type" in config else "timm"  # as the card says
    readme = Path("run/merged/README.md").read_text()
    assert f"library_name: {library}\n" in readme
    assert f"    {library}." in readme
    for own in logits(read_checkpoint("run/merged"), x):
        close(own, found)


def test_a_base_without_classifier_is_read_out_as_its_experts(tmp_path):
    make, start = MODELS["CLIP"]
    base = read_checkpoint(save(shaken(start(), 1), tmp_path / "base"))
    experts = [read_checkpoint(save(shaken(make(), i), tmp_path / f"e{i}")) for i in (2, 3)]
    assert "norm.weight" in base.weights  # of the pooled output, which the classifiers do not read
    found, same = same_form(base, experts)
    assert same == experts
    assert found.weights.keys() == {n for n in experts[0].weights if not n.startswith("head.")}
    assert all(torch.equal(t, base.weights[n]) for n, t in found.weights.items())
    assert any("read out" in note for note in found.notes)


@pytest.mark.parametrize("model_type", ["vision", "whole"])
def test_a_clip_towers_pooled_output_is_timms(tmp_path, model_type):
    if model_type == "vision":
        model = shaken(hf.CLIPVisionModel(hf.CLIPVisionConfig(**VISION)), 1)
        expected = model(images()).pooler_output
    else:
        model = shaken(MODELS["CLIP"][1](), 1)
        expected = model.vision_model(images()).pooler_output
    found = read_checkpoint(save(model, tmp_path / "m"))
    built = create(found.config, depth=None, num_classes=0)
    built.load_state_dict(found.weights)
    close(built(images()), expected)


def test_a_dinov2_giant_of_timms_computes_the_same_piece_by_piece(tmp_path):
    args = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
    name = "vit_giant_patch14_dinov2"  # with SwiGLU
    model = shaken(timm.create_model(name, num_classes=3, **args), 1)
    timm.models.save_for_hf(model, tmp_path / "m", model_args=args, safe_serialization=True)
    found, x = read_checkpoint(tmp_path / "m"), images()
    for own in logits(found, x):
        close(own, model(x))
    pieces, whole = logits(found, x, (2, 0, 0, 1))
    close(pieces, whole)


def test_a_siglip_towers_pooled_output_is_timms(tmp_path):
    model = shaken(hf.SiglipVisionModel(hf.SiglipVisionConfig(**VISION)), 1)
    found = read_checkpoint(save(model, tmp_path / "m"))
    built = create(found.config, depth=None, num_classes=0)
    built.load_state_dict(found.weights)
    close(built(images()), model(images()).pooler_output)


# -------------------------------------------------------------------------------- what is translated


def vit(folder: Path, seed: int = 1, processor=None, **args) -> Path:
    config = hf.ViTConfig(**VISION | {"id2label": LABELS} | args)
    model = shaken(hf.ViTForImageClassification(config), seed)
    return save(model, folder, **(processor or {}))


def test_an_eps_that_timm_has_is_kept_and_one_of_no_influence_becomes_timms(tmp_path):
    for eps, own in ((1e-6, 1e-6), (1e-5, 1e-5), (1e-12, 1e-6)):
        found = read_checkpoint(vit(tmp_path / str(eps), layer_norm_eps=eps))
        built = create(found.config, depth=None, num_classes=3)
        assert {m.eps for m in built.modules() if isinstance(m, torch.nn.LayerNorm)} == {own}
        assert any("eps" in note for note in found.notes) == (eps != own)


def test_an_eps_that_changes_logits_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"1e-06 or 1e-05.*layer_norm_eps 0\.1.*write 1e-06"):
        read_checkpoint(vit(tmp_path / "m", layer_norm_eps=0.1))


def test_activations_that_timm_has_not_are_refused(tmp_path):
    with pytest.raises(InputError, match="'tanh'"):
        read_checkpoint(vit(tmp_path / "m", hidden_act="tanh"))


@pytest.mark.parametrize(
    "part", ["layer.1.attention.attention.key.weight", "patch_embeddings.projection.weight"]
)
def test_weights_that_lack_a_part_are_refused(tmp_path, part):
    folder = vit(tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    (name,) = [n for n in weights if n.endswith(part)]
    del weights[name]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(InputError, match="'vit' of transformers'"):
        read_checkpoint(folder)


def test_a_dinov2_base_of_timm_experts_loses_its_own_readout(tmp_path, monkeypatch):
    """The command finetune makes timm models, which read the class token alone."""
    monkeypatch.chdir(tmp_path)
    save(shaken(MODELS["DINOv2"][1](), 1), Path("start"))
    write_images(tmp_path / "i1", 1, per_class=4)
    words = ["finetune", "--base", "start", "--images", "i1", "--out", "e1", "--steps", "2"]
    assert main([*words, "--batch-size", "4"]) == 0
    base, expert = read_checkpoint("start"), read_checkpoint("e1")
    assert expert.weights["head.weight"].shape == (3, 16)
    found, (same,) = same_form(base, [expert])
    assert same is expert
    assert all(torch.equal(t, base.weights[n]) for n, t in found.weights.items())


def test_made_up_label_names_are_none(tmp_path):
    labels = {i: f"LABEL_{i}" for i in range(3)}
    assert read_checkpoint(vit(tmp_path / "m", id2label=labels)).label_names is None


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (
            {"do_resize": True, "size": {"height": 16, "width": 16}, "resample": 2,
             "do_normalize": True, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
            {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear",
             "crop_pct": 1.0, "crop_mode": "squash"},
        ),
        (
            {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16},
             "do_center_crop": True, "resample": 3, "do_normalize": False},
            {"mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bicubic",
             "crop_pct": 0.8, "crop_mode": "center"},
        ),
        (None, {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 16, 16]}),
    ],
)  # fmt: skip
def test_preprocessing_is_that_of_the_image_processor(tmp_path, processor, expected):
    cfg = read_checkpoint(vit(tmp_path / "m", processor=processor)).config["pretrained_cfg"]
    assert {k: cfg[k] for k in expected} == expected


def test_a_dinov2_run_at_another_size_is_interpolated_as_transformers_does(tmp_path):
    config = hf.Dinov2Config(**SIZE | {"image_size": 40, "mlp_ratio": 2}, id2label=LABELS)
    model = shaken(hf.Dinov2ForImageClassification(config), 1)
    processor = {
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 24, "width": 24},
        "do_center_crop": True,
    }
    found = read_checkpoint(save(model, tmp_path / "m", **processor))
    x = images(24)
    for own in logits(found, x):
        close(own, model(x).logits)
    assert any("24 x 24" in note for note in found.notes)


def test_an_adapter_of_a_transformers_vit_is_applied(tmp_path):
    peft = pytest.importorskip("peft")
    base = read_checkpoint(vit(tmp_path / "base"))
    model = hf.ViTForImageClassification.from_pretrained(tmp_path / "base")
    targets = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)][:4]
    options = peft.LoraConfig(target_modules=targets, modules_to_save=["classifier"])
    adapted = peft.get_peft_model(model, options)
    shake((p for p in adapted.parameters() if p.requires_grad), 0)
    adapted.eval().save_pretrained(tmp_path / "lora")
    found = read_checkpoint(tmp_path / "lora", base=base)
    expected = adapted.merge_and_unload()(images()).logits
    close(logits(found, images())[0], expected)
    assert found.label_names is None  # an adapter does not say


def test_a_swin_is_refused_in_one_sentence_that_says_what_is_not(tmp_path):
    config = {"model_type": "swin", "architectures": ["SwinForImageClassification"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"'vit', 'deit', .*'siglip'.*found the model_type 'swin'"):
        read_checkpoint(tmp_path)


def test_timms_own_distilled_deits_are_read_and_written(tmp_path):
    """Two classifiers, whose logits are averaged."""
    args = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
    name = "deit_tiny_distilled_patch16_224"
    model = shaken(timm.create_model(name, num_classes=5, **args), 1)
    timm.models.save_for_hf(
        model, tmp_path, model_args=args | {"num_classes": 5}, safe_serialization=True
    )
    for own in logits(read_checkpoint(tmp_path), images()):
        close(own, model(images()))
