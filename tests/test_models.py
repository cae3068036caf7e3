"""The ViT taken apart and put together again, with timm's own models and files as the oracle."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from conftest import TINY, random_weights, shake, write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer

from rmm_lab.errors import InputError
from rmm_lab.families import checkpoint as models
from rmm_lab.families import class_token, vit
from rmm_lab.families.checkpoint import read_checkpoint, resolve, write_checkpoint
from rmm_lab.families.parts import join
from rmm_lab.families.vit import ViT, split
from rmm_lab.families.vit_run import OTHERS, head_slices

VARIANTS = {
    "class token": {},
    "average pool": {"global_pool": "avg", "class_token": False},  # its final norm is fc_norm
    "registers": {"reg_tokens": 2},
    "attention pool": {"global_pool": "map"},
    "layer scale": {"init_values": 0.1},
    "pre-norm": {"pre_norm": True, "qk_norm": True},
    "dropout": {  # nothing of it at evaluation
        "drop_rate": 0.5,
        "pos_drop_rate": 0.5,
        "patch_drop_rate": 0.5,
        "proj_drop_rate": 0.5,
        "attn_drop_rate": 0.5,
        "drop_path_rate": 0.5,
    },
}
PATHS = [(0, 1, 2), (1,), (2, 0), (0, 0, 1, 2), (0, 1, 0, 1, 2), ()]


def config_of(variant: str) -> dict:
    return TINY | {"model_args": TINY["model_args"] | VARIANTS[variant]}


def timm_model(variant: str, seed: int = 0, *, depth: int = 3, num_classes: int = 5):
    """A timm model, every parameter of which is random, made without any code of ours."""
    args = config_of(variant)["model_args"] | {"depth": depth}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=num_classes, **args).eval()
    assert type(model) is VisionTransformer
    shake(model.parameters(), seed)
    return model


def by_hand(variant: str, model, path):
    """A timm model whose block j is block path[j] of another one, copied tensor by tensor."""
    own = timm_model(variant, 1, depth=len(path), num_classes=model.num_classes)
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            if name.startswith("blocks."):
                _, j, rest = name.split(".", 2)
                name = f"blocks.{path[int(j)]}.{rest}"
            parameter.copy_(model.get_parameter(name))
    return own


def images(seed: int = 0) -> torch.Tensor:
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=VARIANTS)
def variant(request) -> str:
    return request.param


# ------------------------------------------------------------------------------ split and join


def test_every_parameter_has_exactly_one_owner(variant):
    model = timm_model(variant)
    parts = split(dict(model.named_parameters()))
    expected = {id(p): "head" for p in model.head.parameters()}
    for k, block in enumerate(model.blocks):
        expected |= {id(p): f"layer {k}" for p in block.parameters()}
    for p in model.parameters():
        expected.setdefault(id(p), "stem")
    found = [(id(p), "stem") for p in parts.stem.values()]
    found += [(id(p), "head") for p in parts.head.values()]
    found += [(id(p), f"layer {k}") for k, w in enumerate(parts.layers) for p in w.values()]
    assert len(found) == len(expected) == len(list(model.parameters()))
    assert dict(found) == expected


def test_join_undoes_split(variant):
    weights = timm_model(variant).state_dict()
    parts = split(weights)
    again = join(parts.stem, {"blocks": parts.layers}, parts.head)
    assert again.keys() == weights.keys()
    assert all(again[name] is weights[name] for name in weights)


@given(st.integers(1, 13), st.randoms(use_true_random=False))
@settings(max_examples=25, deadline=None)
def test_layers_are_in_numerical_order_whatever_the_order_of_the_file(n, random):
    names = [f"blocks.{k}.{part}.weight" for k in range(n) for part in ("norm1", "mlp.fc1")]
    names += ["head.weight", "head.bias", "head_norm.weight", "norm.weight", "blocks_norm.bias"]
    random.shuffle(names)
    weights = {name: torch.tensor(float(i)) for i, name in enumerate(names)}
    parts = split(weights)
    assert len(parts.layers) == n
    for k, layer in enumerate(parts.layers):
        assert layer.keys() == {"norm1.weight", "mlp.fc1.weight"}
        assert all(tensor is weights[f"blocks.{k}.{name}"] for name, tensor in layer.items())
    assert parts.stem.keys() == {"head_norm.weight", "norm.weight", "blocks_norm.bias"}
    assert parts.head.keys() == {"weight", "bias"}
    assert join(parts.stem, {"blocks": parts.layers}, parts.head) == weights  # the same objects


def test_a_gap_between_layers_is_refused():
    with pytest.raises(InputError, match=r"blocks\.0"):
        split({"blocks.0.a": torch.zeros(1), "blocks.2.a": torch.zeros(1)})


# --------------------------------------------------------------------- running against timm


# Architectures whose class token alone is pooled, and is computed alone in the last layer.
SHORT = {
    "plain": {},
    "registers": {"reg_tokens": 2},
    "query and key normed": {"qk_norm": True},
    "attention normed": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "layer scale": {"init_values": 0.1},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "pre-norm, pooled norm": {"pre_norm": True, "fc_norm": True},
    "one head": {"num_heads": 1},
    "dropout": VARIANTS["dropout"],
    "another activation": {"mlp_ratio": 2, "act_layer": "silu"},
}
# And those of which nothing of the kind is known.
WHOLE = {
    "average pool": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "no class token": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
    "average of all": (
        "vit_tiny_patch16_224",
        {"global_pool": "avg", "pool_include_prefix": True},
    ),
    "maximum": ("vit_tiny_patch16_224", {"global_pool": "max"}),
    "attention pool": ("vit_tiny_patch16_224", {"global_pool": "map"}),
    "norm behind the branch": ("vit_base_patch16_rpn_224", {}),
    "norm behind, class token": ("vit_base_patch16_rpn_224", {"global_pool": "token"}),
    "attention beside MLP": ("vit_base_patch16_xp_224", {}),
    "two of each side by side": ("vit_small_patch16_18x2_224", {}),
}
WHOLE["norm behind, class token"][1]["class_token"] = True


def shaken(architecture: str, args: dict, seed: int = 0):
    """A timm model of depth 3, every parameter of which is random, and its config."""
    config = TINY | {"architecture": architecture, "model_args": TINY["model_args"] | args}
    model = timm.create_model(architecture, num_classes=5, **config["model_args"]).eval()
    assert type(model) is VisionTransformer
    shake(model.parameters(), seed)
    return model.requires_grad_(False), config


def run_short(family, model, x, path):
    """Logits as the scorer computes them: the last layer by ``apply_last``."""
    parts = split(model.state_dict())
    stem = family.stem(parts.stem)
    tokens = family.embed(stem, x)
    for k in path[:-1]:
        tokens = family.apply(family.layer(k, parts.layers[k]), tokens)
    for k in path[-1:]:
        tokens = family.apply_last(family.layer(k, parts.layers[k]), tokens)
    return tokens, family.logits(stem, tokens, parts.head)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("args", SHORT.values(), ids=SHORT)
def test_the_class_token_alone_in_the_last_layer_is_timms(args, path):
    model, config = shaken("vit_tiny_patch16_224", args)
    family, x = ViT(config), images()
    with torch.no_grad():
        tokens, logits = run_short(family, model, x, path)
        expected, seen = model.forward_features(x), []
        assert tokens.shape == ((4, 1, 16) if path else expected.shape)
        parts = split(model.state_dict())
        whole = family.assemble(parts.stem, [(k, parts.layers[k]) for k in path], {"": parts.head})
        expected = whole(x)
        if path:
            whole.blocks[-1].register_forward_hook(lambda _, __, out: seen.append(out))
            whole(x)
            torch.testing.assert_close(tokens, seen[0][:, :1], rtol=1e-4, atol=1e-4)
    assert expected.std() > 1e-3
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("architecture", "args"), WHOLE.values(), ids=WHOLE)
def test_the_last_layer_is_whole_where_more_than_the_class_token_counts(architecture, args):
    model, config = shaken(architecture, args)
    family, x = ViT(config), images()
    with torch.no_grad():
        tokens, logits = run_short(family, model, x, (0, 2, 1, 1))
        parts = split(model.state_dict())
        layers = [(k, parts.layers[k]) for k in (0, 2, 1, 1)]
        expected = family.assemble(parts.stem, layers, {"": parts.head})(x)
        torch.testing.assert_close(run_short(family, model, x, (0, 1, 2))[1], model(x))
    assert tokens.shape[1] >= 4
    assert expected.std() > 1e-3
    torch.testing.assert_close(logits, expected)


class _Mixing(torch.nn.Module):
    """An MLP that sees the other tokens."""

    def __init__(self, in_features, hidden_features, **_):
        super().__init__()
        self.fc = torch.nn.Linear(in_features, in_features)

    def forward(self, x):
        return self.fc(x - x.mean(1, keepdim=True))


class _Own(timm.models.vision_transformer.Block):
    """A block of another class may compute anything."""


def test_a_block_that_the_shortcut_does_not_know_is_run_whole(monkeypatch):
    def model(**args):
        args = TINY["model_args"] | {"num_classes": 0} | args
        return timm.create_model("vit_tiny_patch16_224", **args).eval()

    assert class_token.pools_token(model())
    assert not class_token.pools_token(model(mlp_layer=_Mixing))  # found by the numbers
    assert not class_token.pools_token(model(block_fn=_Own))
    assert not class_token.pools_token(model(depth=0))
    other = model()
    other.blocks[0].attn.gate = torch.nn.Linear(16, 16)  # as some releases have
    assert not class_token.pools_token(other)
    other = model()
    other.blocks[2] = _Own(16, 2)  # not the first one only
    assert not class_token.pools_token(other)
    other = model()
    other.blocks[0].attn.scale *= 50  # the same name for another thing
    other.blocks[0].attn.fused_attn = True  # which takes its own scale
    other.blocks[0].attn.qkv.weight.data.mul_(20)
    assert not class_token.pools_token(other)
    original = class_token.class_token
    monkeypatch.setattr(class_token, "class_token", lambda *args: 1.001 * original(*args))
    assert not class_token.pools_token(model())


@pytest.mark.parametrize("path", PATHS)
def test_skipped_and_repeated_layers_equal_a_timm_model_of_that_depth(variant, path):
    model, x = timm_model(variant), images(1)
    vit, parts = ViT(config_of(variant)), split(model.state_dict())
    stem = vit.stem(parts.stem)
    tokens = vit.embed(stem, x)
    for k in path:
        tokens = vit.apply(vit.layer(k, parts.layers[k]), tokens)
    with torch.no_grad():
        expected = by_hand(variant, model, path)(x)
    torch.testing.assert_close(vit.logits(stem, tokens, parts.head), expected)
    whole = vit.assemble(parts.stem, [(k, parts.layers[k]) for k in path], {"task": parts.head})
    assert type(whole) is VisionTransformer
    assert len(whole.blocks) == len(path)
    assert not whole.training
    with torch.no_grad():
        torch.testing.assert_close(whole(x), expected)


def test_the_assembled_logits_hold_each_tasks_slice(variant):
    x = images(2)
    trunk = timm_model(variant)
    parts = split(trunk.state_dict())
    sizes = {"a": 2, "b": 4, "c": 3}
    g = torch.Generator().manual_seed(3)
    heads = {
        name: {"weight": torch.randn(n, 16, generator=g), "bias": torch.randn(n, generator=g)}
        for name, n in sizes.items()
    }
    assert head_slices(heads) == {"a": (0, 2), "b": (2, 6), "c": (6, 9)}
    whole = ViT(config_of(variant)).assemble(parts.stem, list(enumerate(parts.layers)), heads)
    with torch.no_grad():
        logits = whole(x)
        assert logits.shape == (4, 9)
        for name, (start, stop) in {"a": (0, 2), "b": (2, 6), "c": (6, 9)}.items():
            trunk.head.weight = torch.nn.Parameter(heads[name]["weight"])
            trunk.head.bias = torch.nn.Parameter(heads[name]["bias"])
            torch.testing.assert_close(logits[:, start:stop], trunk(x))


def test_no_gradient_is_ever_enabled(variant):
    parameters = dict(timm_model(variant).named_parameters())
    assert all(p.requires_grad for p in parameters.values())
    vit, parts = ViT(config_of(variant)), split(parameters)
    head = {k: v.detach() for k, v in parts.head.items()}
    with torch.enable_grad():
        stem = vit.stem(parts.stem)
        modules = [stem] + [vit.layer(k, layer) for k, layer in enumerate(parts.layers)]
        tokens = vit.embed(stem, images())
        for module in modules[1:]:
            tokens = vit.apply(module, tokens)
        assert not vit.logits(stem, tokens, head).requires_grad
    for module in modules:
        assert list(module.parameters())
        assert not any(p.requires_grad for p in module.parameters())


def test_a_layer_holds_its_weights_without_a_copy_and_leaves_them_as_they_are():
    weights = random_weights(0)
    before = {k: v.clone() for k, v in weights.items()}
    vit, parts = ViT(TINY), split(weights)
    layer, stem = vit.layer(1, parts.layers[1]), vit.stem(parts.stem)
    assert layer.mlp.fc1.weight.data_ptr() == weights["blocks.1.mlp.fc1.weight"].data_ptr()
    other = vit.stem(split(random_weights(1)).stem)  # a second stem takes nothing from the first
    torch.testing.assert_close(stem.norm.weight.data, before["norm.weight"], rtol=0, atol=0)
    assert not torch.equal(other.norm.weight, stem.norm.weight)
    vit.logits(stem, vit.apply(layer, vit.embed(stem, images())), parts.head)
    assert all(torch.equal(weights[k], before[k]) for k in before)


def test_weights_of_another_shape_are_refused():
    vit, parts = ViT(TINY), split(random_weights(0))
    with pytest.raises(InputError, match=re.escape("config.json describes")):
        vit.layer(0, parts.layers[0] | {"norm1.weight": torch.zeros(17)})
    with pytest.raises(InputError, match=re.escape("config.json describes")):
        vit.stem({k: v for k, v in parts.stem.items() if k != "pos_embed"})


@pytest.mark.parametrize("name", ["resnet18", "beit_base_patch16_224", "no_such_model"])
def test_other_families_are_refused(name):
    with pytest.raises(InputError, match=name):
        ViT({"architecture": name})


def test_layers_that_depend_on_their_number_are_refused():
    args = TINY["model_args"] | {"attn_layer": "diff", "embed_dim": 32}
    with pytest.raises(InputError, match="differential attention"):
        ViT(TINY | {"model_args": args})


# ---------------------------------------------------------------------------- reading and writing


@pytest.fixture
def folder(tmp_path):
    return write_model(tmp_path / "model", 7)


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_resolve_takes_a_folder_and_a_local_dir(folder, prefix, monkeypatch):
    assert resolve(f"{prefix}{folder}") == folder
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve(f"{prefix}~/model") == folder
    assert read_checkpoint(f"{prefix}{folder}").source == f"{prefix}{folder}"
    assert resolve(folder) == folder


def test_resolve_names_what_is_missing(folder):
    with pytest.raises(InputError, match="nowhere"):
        resolve(folder / "nowhere")
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"found no config\.json"):
        resolve(folder)


def test_a_checkpoint_is_its_files(folder):
    checkpoint = read_checkpoint(folder)
    file = folder / "model.safetensors"
    expected = safetensors.torch.load_file(file)
    assert checkpoint.weights.keys() == expected.keys()
    assert all(torch.equal(checkpoint.weights[k], expected[k]) for k in expected)
    assert checkpoint.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert checkpoint.config == json.loads((folder / "config.json").read_text())
    assert checkpoint.num_classes == 3
    assert checkpoint.label_names == ["class0", "class1", "class2"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_float32(folder, dtype):
    weights = {k: v.to(dtype) for k, v in random_weights(8).items()}
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    found = read_checkpoint(folder).weights
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], tensor.float())


def test_half_precision_is_written(tmp_path):
    config = vit.model_config(TINY, depth=3, num_classes=3)
    write_checkpoint(tmp_path / "m", config, random_weights(0), dtype=torch.float16)
    stored = safetensors.torch.load_file(tmp_path / "m" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float16}
    assert torch.equal(stored["norm.weight"], random_weights(0)["norm.weight"].half())


def test_timm_loads_a_written_folder(tmp_path, variant):
    model, x = timm_model(variant), images()
    config = vit.model_config(config_of(variant), depth=3, num_classes=5)
    write_checkpoint(tmp_path / "m", config, model.state_dict())
    loaded = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def test_we_load_a_folder_that_timm_wrote(tmp_path, variant):
    model, x = timm_model(variant), images()
    args = config_of(variant)["model_args"] | {"num_classes": 5}
    save_for_hf(model, tmp_path, model_args=args, safe_serialization=True)
    checkpoint = read_checkpoint(tmp_path)
    vit, parts = ViT(checkpoint.config), split(checkpoint.weights)
    whole = vit.assemble(parts.stem, list(enumerate(parts.layers)), {"task": parts.head})
    with torch.no_grad():
        torch.testing.assert_close(whole(x), model(x))


def test_what_only_pretrained_cfg_says_is_used_as_timm_uses_it(tmp_path):
    model = timm.create_model("test_vit", num_classes=3, in_chans=1).eval()
    cfg = {"num_classes": 3, "input_size": [1, 160, 160], "fixed_input_size": True}
    config = {"architecture": "test_vit", "num_classes": 3, "pretrained_cfg": cfg}
    (tmp_path / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    x = torch.rand(1, 1, 160, 160)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    checkpoint = read_checkpoint(tmp_path)
    parts = split(checkpoint.weights)
    vit = ViT(checkpoint.config)
    vit.stem(parts.stem)
    whole = vit.assemble(parts.stem, list(enumerate(parts.layers)), {"task": parts.head})
    with torch.no_grad():
        torch.testing.assert_close(whole(x), loaded(x))


@pytest.fixture
def full_disk():
    """As on a full disk, no file of this process grows beyond 1,000 bytes; the weights need 40,000."""
    resource = pytest.importorskip("resource", reason="limits of a process are Unix's")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    @contextlib.contextmanager
    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return full


def test_a_failed_write_leaves_nothing(tmp_path, full_disk):
    with full_disk(), pytest.raises(OSError):  # noqa: PT011 - whatever the system calls it
        write_checkpoint(tmp_path / "new", TINY, random_weights(0))
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_a_failed_write_keeps_the_old_files(folder, full_disk):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert before.keys() == {"config.json", "model.safetensors"}
    with full_disk(), pytest.raises(OSError):  # noqa: PT011
        write_checkpoint(folder, TINY, random_weights(1))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_the_files_get_their_names_only_when_whole(folder, monkeypatch):
    """A process that is killed in between leaves the old files or the new ones, never half."""
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    renamed, replace = [], Path.replace

    def watched(self, target):
        assert Path(target).read_bytes() == before[Path(target).name]  # not written to so far
        renamed.append(Path(target).name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    write_checkpoint(folder, {"architecture": "x"}, random_weights(1))
    assert renamed == ["model.safetensors", "config.json"]
    found = safetensors.torch.load_file(folder / "model.safetensors")
    assert torch.equal(found["norm.weight"], random_weights(1)["norm.weight"])
    assert json.loads((folder / "config.json").read_text()) == {"architecture": "x"}


def test_a_config_that_is_no_json_keeps_the_old_files(folder):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(TypeError):
        write_checkpoint(folder, {"architecture": object()}, random_weights(1))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_write_leaves_no_other_file_and_is_readable_as_the_umask_says(folder):
    old = os.umask(0o022)
    try:
        write_checkpoint(folder, TINY, random_weights(1))
    finally:
        os.umask(old)
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644  # safetensors: 0600


def test_tensors_that_share_memory_can_be_written(tmp_path):
    one = torch.arange(6.0)
    weights = {"a": one, "b": one, "view": one[2:], "turned": one.view(2, 3).T}
    with pytest.raises(RuntimeError, match="share memory"):  # what would happen without copies
        safetensors.torch.save_file({"a": one, "b": one}, tmp_path / "x.safetensors")
    write_checkpoint(tmp_path / "m", {}, weights)
    stored = safetensors.torch.load_file(tmp_path / "m" / "model.safetensors")
    assert stored.keys() == weights.keys()
    assert all(torch.equal(stored[k], weights[k]) for k in weights)


def test_broken_files_are_refused_with_their_name(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", whole[:8] + b"x" + whole[9:]):
        file.write_bytes(broken)
        with pytest.raises(InputError, match=r"model\.safetensors"):
            read_checkpoint(folder)
    file.write_bytes(whole)
    for text in ("{", "[]", "{}", "null"):
        (folder / "config.json").write_text(text)
        with pytest.raises(InputError, match=r"config\.json"):
            read_checkpoint(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_refused_with_the_tensors_name(folder, value):
    weights = random_weights(0)
    weights["blocks.1.mlp.fc1.bias"][3] = value
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"1 NaN or Inf in tensor 'blocks\.1\.mlp\.fc1\.bias'"):
        read_checkpoint(folder)


def test_other_weights_are_refused(folder):
    safetensors.torch.save_file({"conv1.weight": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(InputError, match="other families"):
        read_checkpoint(folder)


# -------------------------------------------------------------------------- the same architecture


def checkpoint(weights, source="expert", **args) -> models.Checkpoint:
    config = TINY | {"model_args": TINY["model_args"] | args}
    return models.Checkpoint(source, None, config, weights, "")


def test_experts_may_differ_in_their_heads_and_dropout_only():
    base = checkpoint(random_weights(0), "base")
    other = checkpoint(random_weights(1, num_classes=7), num_classes=7, drop_path_rate=0.1)
    models.check_same_architecture(base, [base, other])
    headless = {k: v for k, v in random_weights(2).items() if not k.startswith("head.")}
    models.check_same_architecture(checkpoint(headless, "base"), [other])


def test_the_first_difference_from_the_base_is_named():
    base, weights = checkpoint(random_weights(0), "base"), random_weights(1)
    wrong = {
        r"'cls_token'.*no such": checkpoint({k: weights[k] for k in weights if k != "cls_token"}),
        r"'extra\.bias'": checkpoint(weights | {"extra.bias": torch.zeros(1)}),
        r"'norm\.bias'.*\(16,\).*\(2, 8\)": checkpoint(
            weights | {"norm.bias": torch.zeros(2, 8)},
        ),
        r"'num_heads': 4": checkpoint(weights, num_heads=4),  # no shape tells these two apart
        r"'blocks\.2\.": checkpoint(random_weights(1, depth=2), depth=2),
        r"blocks\.3\.": checkpoint(random_weights(1, depth=4), depth=4),
    }
    for message, expert in wrong.items():
        with pytest.raises(InputError, match=message):
            models.check_same_architecture(base, [base, expert])


def test_no_name_of_a_plain_vit_begins_like_another_familys():
    """Other families are refused by the names that timm gives them, without a look at the model."""
    import timm

    for name in timm.list_models():
        home = timm.model_entrypoint(name).__module__
        if home in ("timm.models.vision_transformer", "timm.models.deit"):
            assert not name.startswith(OTHERS), name
