"""Checkpoints as they come: shards, prefixes, half precision, pickles."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import random_weights, write_model
from t5_models import hf_model, write_t5
from torch import nn

from rmm_lab.__main__ import main
from rmm_lab.errors import InputError
from rmm_lab.families.checkpoint import read_checkpoint
from rmm_lab.path import LayerPath


def same(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], tensor.float()), name


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_model(tmp_path / "model", 7)


def rewrite(folder: Path, change) -> dict:
    """The weights of a folder after a change of names or tensors."""
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    changed = change(weights)
    safetensors.torch.save_file(changed, folder / "model.safetensors")
    return weights


def as_pickle(folder: Path, name: str = "pytorch_model.bin", wrap=lambda w: w) -> dict:
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(wrap(weights), folder / name)
    return weights


# -------------------------------------------------------------------------------------- shards


@pytest.fixture
def sharded(tmp_path):
    """A T5 as transformers itself shards it, and its weights in one file."""
    model = hf_model("v1.1", 3)
    whole = read_checkpoint(write_t5(tmp_path / "whole", model))
    model.save_pretrained(tmp_path / "parts", max_shard_size="8KB")
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 2
    return whole, tmp_path / "parts"


def test_shards_that_transformers_wrote_are_one_model(sharded):
    whole, folder = sharded
    found = read_checkpoint(folder)
    same(found.weights, whole.weights)
    files = sorted(f for f in folder.iterdir() if "safetensors" in f.name)
    lines = [f"{hashlib.sha256(f.read_bytes()).hexdigest()} {f.name}\n" for f in files]
    assert found.sha256 == hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def test_a_changed_shard_changes_the_digest(sharded):
    _, folder = sharded
    before = read_checkpoint(folder).sha256
    file = max(folder.glob("model-*.safetensors"))
    weights = safetensors.torch.load_file(file)
    safetensors.torch.save_file({k: v + 1 for k, v in weights.items()}, file)
    assert read_checkpoint(folder).sha256 != before


def test_a_missing_or_broken_shard_is_named(sharded):
    _, folder = sharded
    file = max(folder.glob("model-*.safetensors"))
    content = file.read_bytes()
    file.write_bytes(content[:-4])
    with pytest.raises(InputError, match=rf"{file.name} is truncated"):
        read_checkpoint(folder)
    file.unlink()
    with pytest.raises(InputError, match=rf"found no {file.name} in"):
        read_checkpoint(folder)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": {"a": "../a.safetensors"}}', "{"])
def test_an_index_that_is_none_is_refused(sharded, text):
    _, folder = sharded
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json"):
        read_checkpoint(folder)


def test_a_tensor_that_its_shard_lacks_is_named(sharded):
    _, folder = sharded
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["more.weight"] = next(iter(index["weight_map"].values()))
    file.write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"'more\.weight'"):
        read_checkpoint(folder)


# ------------------------------------------------------------------------------------- prefixes


class _Compiled(nn.Module):
    """Names as torch.compile gives them, without a compiler."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module


def test_the_names_are_those_of_torchs_wrappers():
    names = nn.Linear(1, 1).state_dict().keys()
    assert {f"_orig_mod.{n}" for n in names} == torch.compile(nn.Linear(1, 1)).state_dict().keys()
    assert {f"module.{n}" for n in names} == nn.DataParallel(nn.Linear(1, 1)).state_dict().keys()


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_prefixes_of_wrappers_are_dropped(folder, prefix):
    expected = rewrite(folder, lambda w: {prefix + k: v for k, v in w.items()})
    same(read_checkpoint(folder).weights, expected)


def test_a_part_that_was_compiled_alone_is_read(folder):
    def compiled(weights):
        return {k.replace("blocks.1.", "blocks.1._orig_mod."): v for k, v in weights.items()}

    same(read_checkpoint(folder).weights, rewrite(folder, compiled))


def test_two_names_that_would_become_one_are_refused(folder):
    rewrite(folder, lambda w: w | {"module.norm.bias": w["norm.bias"] + 1})
    with pytest.raises(InputError, match=r"'module\.norm\.bias' and 'norm\.bias'"):
        read_checkpoint(folder)


# ------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(folder, dtype):
    rewrite(folder, lambda w: w | {"blocks.0.attn.qkv.weight": torch.ones(48, 16).to(dtype)})
    with pytest.raises(InputError, match=r"'blocks\.0\.attn\.qkv\.weight'.*quantised"):
        read_checkpoint(folder)


def test_what_overflows_float32_is_refused(folder):
    rewrite(folder, lambda w: w | {"norm.bias": torch.full((16,), 1e300, dtype=torch.float64)})
    with pytest.raises(InputError, match=r"16 NaN or Inf in tensor 'norm\.bias'"):
        read_checkpoint(folder)


# ------------------------------------------------------------------------------------- pickles


@pytest.mark.parametrize("name", ["pytorch_model.bin", "best.pth", "last.pt"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: w,
        lambda w: {"epoch": 3, "state_dict": w},
        lambda w: {"model": {f"module.{k}": v.half() for k, v in w.items()}, "lr": 0.1},
    ],
    ids=["weights", "state_dict", "model in half precision"],
)
def test_a_pickle_is_read_where_it_is_allowed(folder, name, wrap):
    weights = as_pickle(folder, name, wrap)
    with pytest.raises(InputError, match=rf"{re.escape(name)}.*--allow-pickle.*weights_only=True"):
        read_checkpoint(folder)
    found = read_checkpoint(folder, allow_pickle=True)
    assert found.weights.keys() == weights.keys()
    for key, tensor in weights.items():
        torch.testing.assert_close(found.weights[key], tensor, rtol=1e-3, atol=1e-3)
    assert found.sha256 == hashlib.sha256((folder / name).read_bytes()).hexdigest()


def test_the_recipe_of_the_refusal_converts(folder, monkeypatch):
    weights = as_pickle(folder)
    with pytest.raises(InputError) as refusal:
        read_checkpoint(folder)
    monkeypatch.chdir(folder)
    exec(re.search(r'python -c "(.+)"', str(refusal.value))[1], {})
    same(read_checkpoint(folder).weights, weights)


class _Evil:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize(
    "content",
    [{"norm.bias": _Evil()}, [1], {"a": 3}, {}, b"no pickle", b""],
    ids=["an order", "a list", "a number", "nothing", "no pickle", "an empty file"],
)
def test_a_pickle_of_anything_else_is_refused(folder, content, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(InputError, match=r"pytorch_model\.bin"):
        read_checkpoint(folder, allow_pickle=True)
    assert not Path("executed").exists()


def test_what_a_trainer_leaves_beside_the_weights_is_not_read(folder):
    weights = as_pickle(folder)
    for name in ("optimizer.pt", "rng_state.pth", "scheduler.pt", "training_args.bin", "x.pth"):
        (folder / name).write_bytes(b"no tensors")
    same(read_checkpoint(folder, allow_pickle=True).weights, weights)


def test_shards_of_pickles_are_one_model(folder):
    weights = as_pickle(folder, "whole.pth")
    (folder / "whole.pth").unlink()
    names = sorted(weights)
    for i, part in enumerate((names[:9], names[9:])):
        torch.save(
            {n: weights[n] for n in part}, folder / f"pytorch_model-0000{i + 1}-of-00002.bin"
        )
    same(read_checkpoint(folder, allow_pickle=True).weights, weights)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(InputError, match="pytorch_model-00001-of-00002"):
        read_checkpoint(folder, allow_pickle=True)


def test_several_pickles_are_not_chosen_from(folder):
    as_pickle(folder, "a.pth")
    torch.save({}, folder / "b.pth")
    with pytest.raises(InputError, match=r"a\.pth, b\.pth"):
        read_checkpoint(folder, allow_pickle=True)


def test_a_run_keeps_pickles_as_safetensors(tiny, tmp_path, capsys, monkeypatch):
    """The user's folders stay as they are; the path of the result needs no pickle any more."""
    monkeypatch.chdir(tmp_path)
    near = random_weights(0)
    experts = [write_model(tmp_path / f"e{i}", i, near=near) for i in (1, 2)]
    as_pickle(experts[0])
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    words = ["--base", tiny["base"], "--experts", *map(str, experts), "--images", *tiny["images"]]
    words += ["--preset", "weights", "--episodes", "4", "--data-fraction", "1", "--quiet"]
    words += ["--compare", "paper"]
    assert main([*words, "--run-dir", "refused"]) == 2
    assert "--allow-pickle" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert main([*words, "--run-dir", "run", "--allow-pickle"]) == 0
    assert all(p.read_bytes() == content for p, content in before.items())
    assert {p.name for p in experts[0].iterdir()} == {"config.json", "pytorch_model.bin"}
    kept = read_checkpoint("run/converted/e1")
    same(kept.weights, read_checkpoint(experts[0], allow_pickle=True).weights)
    sha256 = hashlib.sha256((experts[0] / "pytorch_model.bin").read_bytes()).hexdigest()
    assert kept.config["rmm_lab"]["converted"]["sha256"] == sha256
    assert not Path("run/converted/e2").exists()

    def forbidden(*args, **kwargs):
        raise AssertionError("a pickle was opened")

    monkeypatch.setattr(torch, "load", forbidden)
    path = LayerPath.from_json(Path("run/path.json").read_text())
    weights = path.build().state_dict()
    same(safetensors.torch.load_file("run/merged/model.safetensors"), weights)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_conversion_is_noticed(tiny, tmp_path, monkeypatch, name):
    """A path that is built from it refuses; a run that goes on writes it again."""
    monkeypatch.chdir(tmp_path)
    experts = [write_model(tmp_path / f"e{i}", i, near=random_weights(0)) for i in (1, 2)]
    as_pickle(experts[0])
    words = ["--base", tiny["base"], "--experts", *map(str, experts), "--images", *tiny["images"]]
    words += ["--preset", "weights", "--episodes", "4", "--allow-pickle", "--run-dir", "run"]
    assert main([*words, "--quiet", "--compare", "paper"]) == 0
    file = Path("run/converted/e1", name)
    good = file.read_bytes()
    bad = bytearray(good)
    bad[-3] ^= 1  # of a weight, or what ends the JSON
    file.write_bytes(bad)
    path = LayerPath.from_json(Path("run/path.json").read_text())
    with pytest.raises(InputError, match=r"SHA-256|JSON"):
        path.build()
    assert main(["--resume", "run", "--quiet", "--compare", "paper"]) == 0
    assert file.read_bytes() == good
    path = LayerPath.from_json(Path("run/path.json").read_text())
    same(safetensors.torch.load_file("run/merged/model.safetensors"), path.build().state_dict())
