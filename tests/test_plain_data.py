"""A folder is data, not orders: what it holds is read within bounds, or refused in one sentence."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import pytest
import torch
from conftest import write_images, write_model
from lm_models import hf_model as language_model
from PIL import Image
from safetensors.torch import load_file, save_file
from t5_models import hf_model, write_t5, write_texts
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    LlamaConfig,
    MistralConfig,
    ViTConfig,
    ViTForImageClassification,
)

from rmm_lab.__main__ import main
from rmm_lab.errors import InputError
from rmm_lab.families.checkpoint import read_checkpoint
from rmm_lab.families.limits import arguments
from rmm_lab.tasks import plain
from rmm_lab.tasks.image_task import InputFormat, Task
from rmm_lab.tasks.text_formats import load

REPOSITORY = Path(__file__).resolve().parent.parent
SMALL_VIT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1} | {
    "num_attention_heads": 2
}
GREY = InputFormat((1, 8, 8), (0.5,), (0.5,))


@pytest.fixture
def vit(tmp_path) -> Path:
    return write_model(tmp_path / "vit", 0)


@pytest.fixture
def t5(tmp_path) -> Path:
    return write_t5(tmp_path / "t5", hf_model())


def alter(folder: Path, **change: object) -> None:
    """Other values in config.json, or in its objects where a value is one."""
    file = folder / "config.json"
    config = json.loads(file.read_text("utf-8"))
    for key, value in change.items():
        inside = isinstance(value, dict) and isinstance(config.get(key), dict)
        config[key] = config[key] | value if inside else value
    file.write_text(json.dumps(config), "utf-8")


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(InputError) as refusal:
        read_checkpoint(folder)
    for word in (folder.name, *words):
        assert word in str(refusal.value)


# ------------------------------------------------------------------------------- config.json of timm


@pytest.mark.parametrize(
    "order",
    [
        {"checkpoint_path": "secret.pth"},
        {"cache_dir": "elsewhere"},
        {"pretrained": True},
        {"device": "cuda"},
        {"dtype": "float16"},
        {"pretrained_cfg_overlay": {"file": "secret.pth"}},
        {"features_only": True},
        {"block_fn": "x"},
    ],
    ids=lambda order: next(iter(order)),
)
def test_arguments_that_are_orders_are_refused(vit, order):
    alter(vit, model_args=order)
    refused(vit, next(iter(order)), "model_args")


@pytest.mark.parametrize(
    "name",
    [
        "local-dir:/tmp",
        "hf-hub:timm/vit",
        "hf_hub:a/b",
        "timm/vit_base",
        "../vit",
        "",
        "a:b",
        5,
        None,
    ],
)
def test_an_architecture_is_a_bare_name(vit, name):
    alter(vit, architecture=name)
    refused(vit, "'architecture'", repr(name))


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        *(("pretrained_cfg", "std", v) for v in ([0], [0.5, 0.5], [-1.0], "0.5", [10**400])),
        *(("pretrained_cfg", "mean", v) for v in ([], [1e300], ["a"], 0.5)),
        *(("pretrained_cfg", "input_size", v) for v in ([1, 0, 8], [1, 8], [1, 8, 10**6], "8")),
        *(("pretrained_cfg", "crop_pct", v) for v in (0, -1, 2, "1")),
        ("pretrained_cfg", "interpolation", "../x"),
        *(("model_args", "depth", v) for v in (0, -1, 513, 10**9, 3.0, True)),
        *(("model_args", "embed_dim", v) for v in (0, 10**9, 2**16)),
        *(("model_args", "num_heads", v) for v in (0, 3, 10**9)),
        *(("model_args", "img_size", v) for v in (0, 10**6, [8], [8, 8, 8], [8, 0])),
        *(("model_args", "mlp_ratio", v) for v in (0, -4, 1e9)),
        ("model_args", "drop_path_rate", 7),
        ("model_args", "act_layer", "os.system"),
        ("model_args", "class_token", "yes"),
    ],
)
def test_numbers_are_in_their_range(vit, part, key, value):
    alter(vit, **{part: {key: value}})
    refused(vit, "config.json")


@pytest.mark.parametrize("value", [-1, True, 1.5, 2**40])
def test_a_number_of_classes_is_one(vit, value):
    alter(vit, num_classes=value)
    refused(vit, "num_classes", str(value))


@pytest.mark.parametrize("heads", [[1], {"a": 3}, {"a": [1, 2, 3]}, {"a": ["x", "y"]}, "a"])
def test_slices_of_a_head_are_numbers(vit, heads):
    alter(vit, rmm_lab={"heads": heads})
    refused(vit, "rmm_lab.heads")


@pytest.mark.slow
def test_a_model_larger_than_its_weights_takes_no_memory(vit):
    """vit_huge has 630 million weights, 2.5 GB."""
    config = json.loads((vit / "config.json").read_text("utf-8"))
    config |= {"architecture": "vit_huge_patch14_224", "model_args": {"num_classes": 3}}
    (vit / "config.json").write_text(json.dumps(config), "utf-8")
    code = (
        "import resource, sys\n"
        "from rmm_lab.errors import InputError\n"
        "from rmm_lab.families.checkpoint import read_checkpoint\n"
        "try: read_checkpoint(sys.argv[1])\n"
        "except InputError as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    done = python("-c", code, str(vit))
    refusal, megabytes = done.stdout.splitlines()
    assert "as its config.json says" in refusal
    assert int(megabytes) < 2500


def test_a_dropout_of_null_is_one_that_is_missing():
    """It is read, and stops the first step of training. Other nulls mean none, as of Mistral's window."""
    found = {"attention_dropout": None, "sliding_window": None, "hidden_size": 32}
    assert arguments(MistralConfig, found) == {"sliding_window": None, "hidden_size": 32}
    with pytest.raises(InputError, match="'attention_dropout' to be a number from 0 to 1, found 7"):
        arguments(LlamaConfig, {"attention_dropout": 7})


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_labels"])
def test_a_number_in_a_config_of_transformers_takes_no_memory(tmp_path, key):
    """Its class makes a list of the names of all layers, before anyone looks at them."""
    size = {k: v for k, v in SMALL_VIT.items() if k != "intermediate_size"}
    config = Dinov2Config(**size, image_size=8, patch_size=4, num_channels=1)
    Dinov2ForImageClassification(config).save_pretrained(tmp_path / "dinov2")
    read_checkpoint(tmp_path / "dinov2")  # imports what it needs
    alter(tmp_path / "dinov2", **{key: 3 * 10**6})
    tracemalloc.start()
    try:
        with contextlib.suppress(InputError):
            read_checkpoint(tmp_path / "dinov2")
        assert tracemalloc.get_traced_memory()[1] < 100e6  # bytes; 64 MiB are a file's bound
    finally:
        tracemalloc.stop()


# -------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "Infinity"),
        ('{"a": 1e999}', "1e999"),
        ('{"a": 1, "b": 2, "a": 3}', "'a' twice"),
        ("[" * 100_000, "in each other"),
        ("[" * 65 + "]" * 65, "in each other"),
        ('{"a": "\\ud800"}', "ud800"),
    ],
    ids=["NaN", "Infinity", "1e999", "twice", "not closed", "deep", "half"],
)
def test_json_says_one_thing(vit, text, found):
    with pytest.raises(ValueError, match=found):
        plain.parse_json(text)
    (vit / "config.json").write_text(text, "utf-8")
    refused(vit, "config.json", found)


def test_json_that_is_fine_is_read():
    text = '{"a": [1, 2.5, "\\ud83d\\ude00", null], "b": ' + "[" * 60 + "]" * 60 + "}"
    assert plain.parse_json(text) == json.loads(text)


def test_a_file_is_read_up_to_its_bound(tmp_path):
    file = tmp_path / "large.json"
    file.write_bytes(b" " * (2**20) + b"1")
    with pytest.raises(ValueError, match="more than 1 MiB"):
        plain.read_bytes(file, 1)
    assert plain.read_json(file) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("image_mean", v) for v in (True, ["a"], [1e300])),
        *(("image_std", v) for v in (0.5, [0.0, 1.0, 1.0])),
        *(("resample", v) for v in ("", 9)),
        *(("size", v) for v in (0.5, "x", {"height": 8}, {"shortest_edge": 0})),
        *(("crop_size", v) for v in (0.5, {"height": 0}, {"shortest_edge": 8})),
    ],
)
def test_a_processor_of_pictures_says_numbers(tmp_path, key, value):
    config = ViTConfig(**SMALL_VIT, image_size=8, patch_size=4, num_labels=3)
    ViTForImageClassification(config).save_pretrained(tmp_path / "hf")
    text = json.dumps({"do_center_crop": True, "size": 8} | {key: value})
    (tmp_path / "hf" / "preprocessor_config.json").write_text(text)
    refused(tmp_path / "hf", "preprocessor_config.json", repr(key))


@pytest.mark.parametrize("size", ["hidden_size", "num_channels", "patch_size"])
def test_a_size_that_is_not_said_is_not_that_of_the_weights(tmp_path, size):
    """transformers then takes a default."""
    config = ViTConfig(**SMALL_VIT, image_size=8, patch_size=4, num_channels=1, num_labels=3)
    ViTForImageClassification(config).save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    said = json.loads(file.read_text())
    del said[size]
    file.write_text(json.dumps(said))
    refused(tmp_path / "hf", "config.json", "found")


# ----------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.complex64])
def test_weights_are_floating_point(vit, dtype):
    weights = load_file(vit / "model.safetensors")
    name = "blocks.1.norm1.weight"
    save_file(weights | {name: torch.ones(16).to(dtype)}, vit / "model.safetensors")
    refused(vit, repr(name), str(dtype))


def test_positions_of_old_files_are_no_weights(tmp_path):
    config = ViTConfig(**SMALL_VIT, image_size=8, patch_size=4, num_labels=3)
    ViTForImageClassification(config).save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    before = read_checkpoint(tmp_path / "hf").weights
    save_file(load_file(file) | {"embeddings.position_ids": torch.arange(5)[None]}, file)
    assert read_checkpoint(tmp_path / "hf").weights.keys() == before.keys()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("head.extra", (3,)),
        ("head.weight", ()),
        ("head.weight", (3, 4, 4)),
        ("head_dist.extra", (1,)),
        ("blocks.0.extra", (16,)),
        ("patch_embed.proj.weight", (16,)),
        ("pos_embed", ()),
    ],
)
def test_a_tensor_of_no_module_is_named(vit, name, shape):
    weights = load_file(vit / "model.safetensors")
    save_file(weights | {name: torch.zeros(shape)}, vit / "model.safetensors")
    refused(vit, repr(name))


# ------------------------------------------------------------------------ config.json of transformers


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("num_layers", v) for v in (10**9, -1, "two")),
        *(("vocab_size", v) for v in (0, 10**15)),
        *(("d_model", v) for v in (0, 10**12, 32)),
        *(("num_heads", v) for v in (0, 10**9, 4)),
        ("d_ff", 10**12),
        ("layer_norm_epsilon", -1.0),
        ("relative_attention_num_buckets", 0),
        ("relative_attention_max_distance", 1),
        ("auto_map", {"AutoModel": "code.Model"}),
        ("trust_remote_code", True),
    ],
)
def test_sizes_of_a_t5_are_those_of_its_weights(t5, key, value):
    alter(t5, **{key: value})
    refused(t5, "config.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("vocab_size", 10**15),
        ("hidden_size", 30),
        ("num_key_value_heads", 3),
        ("rms_norm_eps", -1.0),
        ("hidden_act", ""),
        ("pad_token_id", 513),
        ("model_type", ["llama"]),
        ("rope_theta", 0.0),
        ("auto_map", {"AutoModelForCausalLM": "code.Model"}),
    ],
)
def test_sizes_of_a_language_model_are_those_of_its_weights(tmp_path, key, value):
    folder = tmp_path / "lm"
    language_model("llama").save_pretrained(folder)
    alter(folder, **{key: value})
    if key == "rope_theta":
        alter(folder, rope_parameters={"rope_theta": value})
    refused(folder, "config.json")


@pytest.mark.parametrize(
    "order",
    [
        {"attn_implementation": "kernels-community/flash-attn"},
        {"_attn_implementation": "kernels-community/flash-attn"},
        {"return_dict": False},
        {"output_attentions": True},
    ],
    ids=str,
)
def test_how_transformers_is_to_run_is_not_for_a_folder_to_say(t5, order, tmp_path):
    """It is left out: a run fine-tunes the model as if nothing was said."""
    alter(t5, **order)
    texts = write_texts(tmp_path / "texts", 1, fixed=True, n=3)
    words = ["finetune", "--base", str(t5), "--texts", str(texts), "--out", str(tmp_path / "out")]
    assert main([*words, "--steps", "1", "--batch-size", "2"]) == 0


def test_the_base_of_an_adapter_is_looked_up_only_where_the_user_wrote_a_hub_name(
    tmp_path, monkeypatch
):
    def asked(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", asked)
    monkeypatch.setattr("huggingface_hub.snapshot_download", asked)
    folder = tmp_path / "adapter"
    folder.mkdir()
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "someone/model", "r": 1}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    save_file({"a": torch.zeros(1)}, folder / "adapter_model.safetensors")
    refused(folder, "hf-hub:someone/model", "--base")


# ------------------------------------------------------------------------------------ regular files


def put(file: Path, kind: str) -> None:
    """Something in a file's place that is no regular file."""
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "loop":
        file.symlink_to(file.name)
    else:
        with socket.socket(socket.AF_UNIX) as own:
            here = Path.cwd()
            os.chdir(file.parent)  # a socket's name may have 100 letters
            own.bind(file.name)
            os.chdir(here)


KINDS = ("pipe", "folder", "device", "loop", "socket")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_of_a_model_is_a_regular_one(vit, name, kind):
    put(vit / name, kind)
    refused(vit, name)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_a_regular_file(tmp_path, kind):
    root = write_images(tmp_path / "images", 1, per_class=2)
    put(root / "train" / "class0" / "0.png", kind)
    with pytest.raises(InputError, match=r"class0/0\.png"):
        Task(str(root), GREY).split("train")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("place", "name"), [("{}", "test.jsonl"), ("winogrande:{}", "train.jsonl")]
)
def test_rows_are_in_a_regular_file(tmp_path, kind, place, name):
    root = write_texts(tmp_path / "rows", 1, fixed=True, n=3)
    put(root / name, kind)
    with pytest.raises(InputError, match=name):
        load(place.format(root))


def test_links_to_regular_files_are_fine(vit, tmp_path):
    link = tmp_path / "link"
    link.mkdir()
    for file in vit.iterdir():
        (link / file.name).symlink_to(file)
    assert read_checkpoint(link).weights.keys() == read_checkpoint(vit).weights.keys()
    root = write_images(tmp_path / "images", 1, per_class=2)
    for file in list(root.rglob("*.png")):
        there = file.rename(tmp_path / "-".join(file.parts[-3:]))
        file.symlink_to(there)
    assert len(Task(str(root), GREY).split("train")) == 6


# ----------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("name", ["tets", "tests", "Test", "TEST"])
def test_a_split_that_is_nearly_called_so_is_named(tmp_path, name):
    root = write_images(tmp_path / "images", 1, per_class=4)
    (root / "test").rename(root / name)
    with pytest.raises(InputError, match=f"found '{name}', which is nearly 'test'"):
        Task(str(root), GREY)


def test_splits_that_are_all_nearly_called_so_are_no_classes(tmp_path):
    root = write_images(tmp_path / "images", 1, per_class=4, splits=("trian", "tets"))
    with pytest.raises(InputError, match="nearly 'test'"):
        Task(str(root), GREY)


def test_a_class_may_be_called_nearly_like_a_split(tmp_path):
    for name in ("text", "rain", "rest"):
        for i in range(5):
            file = tmp_path / "images" / name / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8)).save(file)
    assert Task(str(tmp_path / "images"), GREY).classes == ["rain", "rest", "text"]


@pytest.mark.parametrize("other", ["class0\u200b", "class0 ", "\u202eclass0", "class0\u00a0"])
def test_classes_that_look_the_same_are_named(tmp_path, other):
    root = write_images(tmp_path / "images", 1, per_class=4, splits=())
    (root / "class1").rename(root / other)
    with pytest.raises(InputError, match="look different"):
        Task(str(root), GREY)


def test_no_program_is_started_for_a_picture(tmp_path, monkeypatch):
    """A file called .png may hold PostScript, which Pillow gives to Ghostscript."""
    root = write_images(tmp_path / "images", 1, per_class=2)
    Image.new("L", (8, 8)).save(root / "train" / "class0" / "0.png", "eps")

    def started(*_: object, **__: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr("subprocess.check_call", started)
    monkeypatch.setattr("subprocess.Popen", started)
    with pytest.raises(InputError, match=r"class0/0\.png is broken"):
        Task(str(root), GREY).split("train")


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_a_picture_that_would_fill_the_memory_is_named(tmp_path, side, recwarn):
    root = write_images(tmp_path / "images", 1, per_class=2)
    file = root / "train" / "class0" / "0.png"
    Image.new("L", (8, 8)).save(file, "bmp")
    content = bytearray(file.read_bytes())
    content[18:26] = side.to_bytes(4, "little") * 2
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"class0/0\.png is broken.*pixels"):
        Task(str(root), GREY).split("train")
    assert not recwarn.list


def test_a_broken_picture_is_told_in_one_sentence(tmp_path, recwarn):
    """Pillow warns of each reader that stumbles over a TIFF."""
    root = write_images(tmp_path / "images", 1, per_class=2)
    file = root / "train" / "class0" / "0.png"
    Image.new("L", (8, 8)).save(file, "tiff")
    file.write_bytes(file.read_bytes()[:30])
    with pytest.raises(InputError, match=r"class0/0\.png is broken"):
        Task(str(root), GREY).split("train")
    assert not recwarn.list


# A TIFF whose list of entries is cut off behind the one that says where the pixels are: as found by the
# fuzz test.
CUT = (
    "49492a000800000009000001040001000000010000000101040001000000010000000201030001000000080000"
    "0003010300010000000100000006010300010000000100000011010400010000007a000000"
)


def test_a_picture_that_breaks_when_it_is_decoded_is_told_in_one_sentence(tmp_path, recwarn):
    root = write_images(tmp_path / "images", 1, per_class=2)
    (root / "train" / "class0" / "0.png").write_bytes(bytes.fromhex(CUT))
    with pytest.raises(InputError, match=r"class0/0\.png is broken"):
        Task(str(root), GREY).split("train")
    assert not recwarn.list


# --------------------------------------------------------------------------------------------- rows


def write_rows(folder: Path, **files: str | bytes) -> str:
    folder.mkdir()
    for name, content in files.items():
        data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        (folder / f"{name}.jsonl").write_bytes(data)
    return str(folder)


def row(n: int, **more: object) -> str:
    return json.dumps({"input": f"what {n}", "choices": ["no", "yes"], "label": n % 2} | more)


GOOD = "\n".join(map(row, range(6)))


@pytest.mark.parametrize("name", ["tets", "trian", "Tests", "vall"])
def test_rows_of_a_split_that_is_nearly_called_so_are_named(tmp_path, name):
    source = write_rows(tmp_path / "rows", train=GOOD, **{name: GOOD})
    with pytest.raises(InputError, match=rf"found {name}\.jsonl"):
        load(source)


def test_a_folder_called_like_a_split_is_named(tmp_path):
    source = write_rows(tmp_path / "rows", train=GOOD)
    (tmp_path / "rows" / "test").mkdir()
    with pytest.raises(InputError, match="found test/"):
        load(source)


@pytest.mark.parametrize("name", ["test", "reward", "val"])
def test_a_split_without_train_is_named(tmp_path, name):
    with pytest.raises(InputError, match="expected the splits train and test"):
        load(write_rows(tmp_path / "rows", **{name: GOOD}))


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ('{"input": "\\ud800", "choices": ["a", "b"], "label": 0}', "half a character"),
        ("[" * 5000 + "]" * 5000, "in each other"),
        ('{"input": "a", "choices": ["a", "b"], "label": NaN}', "NaN"),
        ('{"input": "a", "input": "b", "choices": ["a", "b"], "label": 0}', "'input' twice"),
        (row(1, input="a\0b"), "NUL"),
        (row(1, choices=["yes", "yes\u200b"]), "look the same"),
        (row(1, choices=["caf\u00e9", "cafe\u0301"]), "look the same"),
        (row(1, label="yes\u200b"), "one of the choices"),
        ("\ufeff" + row(1), "BOM"),
        (row(1, input="x" * 10_000_001), "at most 10,000,000 characters"),
    ],
    ids=["half", "deep", "NaN", "twice", "NUL", "zero width", "accents", "label", "BOM", "long"],
)
def test_an_odd_row_is_named(tmp_path, odd, words):
    source = write_rows(tmp_path / "rows", train=f"{GOOD}\n{odd}", test=GOOD)
    with pytest.raises(InputError, match=rf"train\.jsonl, line 7: .*{words}"):
        load(source)


@pytest.mark.parametrize(
    "content", [b"", b"\n \n", b"\xef\xbb\xbf", GOOD.encode("utf-16"), b"\0" * 9]
)
def test_a_file_without_rows_is_named(tmp_path, content):
    with pytest.raises(InputError, match=r"train\.jsonl"):
        load(write_rows(tmp_path / "rows", train=content, test=GOOD))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_in_any_way_and_a_file_may_begin_with_a_mark(tmp_path, end):
    text = "\ufeff" + GOOD.replace("\n", end)
    found = load(write_rows(tmp_path / "rows", train=text, test=text))
    assert [r["input"] for r in found["test"]] == [f"what {n}" for n in range(6)]


def test_a_packed_file_is_unpacked_up_to_its_bound(tmp_path, monkeypatch):
    import gzip

    monkeypatch.setattr(plain, "TEXT_MB", 1)
    source = write_rows(tmp_path / "rows", test=GOOD)
    (tmp_path / "rows" / "train.jsonl.gz").write_bytes(gzip.compress(b" " * 2**21))
    with pytest.raises(InputError, match=r"train\.jsonl\.gz.*more than 1 MiB"):
        load(source)


# ------------------------------------------------------------------------------- as a whole command

WATCHED = """
import json, sys
opened, events = set(), []
def hook(event, args):
    if event == "open" and isinstance(args[0], (str, bytes)):
        opened.add(args[0] if isinstance(args[0], str) else args[0].decode())
    elif event.startswith(("socket.connect", "socket.getaddrinfo", "socket.bind", "pickle.", "os.system")):
        events.append(event)
    elif event in ("subprocess.Popen", "os.exec", "os.posix_spawn"):
        events.append(f"{event} {args[0]}")
from rmm_lab.__main__ import main
sys.addaudithook(hook)
code = main(sys.argv[1:])
print(json.dumps({"code": code, "opened": sorted(opened), "events": events}))
"""


def python(*argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    own = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    own |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | env
    done = subprocess.run(
        [sys.executable, *argv], capture_output=True, text=True, timeout=200, env=own, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def decoys(folder: Path) -> None:
    """What training scripts leave beside weights, and must not be opened."""
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "modeling_own.py"):
        (folder / name).write_bytes(b"no data")


def foreign(root: Path, kind: str) -> list[str]:
    """A base, two experts and their data as others write them; options of ``merge``."""
    if kind == "timm":
        models = [write_model(root / name, i) for i, name in enumerate(("base", "e1", "e2"))]
        data = ["--images", *(str(write_images(root / f"d{i}", i, per_class=2)) for i in (1, 2))]
    else:
        models = [
            write_t5(root / name, hf_model(seed=i)) for i, name in enumerate(("base", "e1", "e2"))
        ]
        data = [
            "--texts",
            *(str(write_texts(root / f"d{i}", i, fixed=i == 2, n=4)) for i in (1, 2)),
        ]
    for model in models:
        decoys(model)
    base, *experts = map(str, models)
    return ["--base", base, "--experts", *experts, *data]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shipped", "timm", "transformers"])
def test_a_merge_opens_no_pickle_no_socket_and_nothing_outside_its_folders(tmp_path, kind):
    """The interpreter's own files, installed packages, the system's and temporary ones aside."""
    home = tmp_path / "home"
    home.mkdir()
    ships = ["--experts", "tiny-digits-first", "tiny-digits-second"]
    options = ships if kind == "shipped" else foreign(tmp_path, kind)
    more = ["--preset", "agent", "--episodes", "1", "--compare", "paper", "--quiet"]
    run = tmp_path / "run"
    done = python("-c", WATCHED, *options, *more, "--run-dir", str(run), HOME=str(home))
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["code"] == 0
    assert (run / "merged" / "config.json").is_file()
    network = [e for e in found["events"] if not e.startswith("subprocess")]
    assert network == []
    own = ("/proc", "/sys", "/dev", "/usr", "/lib", "/etc", "/opt", sys.prefix, sys.base_prefix)
    allowed = (*own, str(REPOSITORY / "rmm_lab"), str(REPOSITORY / "data"), str(tmp_path))
    outside = [p for p in found["opened"] if os.path.isabs(p) and not p.startswith(allowed)]
    # With these names tempfile tries which folder it can write to.
    tried = re.compile(re.escape(tempfile.gettempdir()) + r"/[a-z0-9_]{8}")
    outside = [p for p in outside if not tried.fullmatch(p)]
    assert outside == []
    pickles = (".bin", ".pt", ".pth", ".pkl", ".pickle", "modeling_own.py")
    ours = [p for p in found["opened"] if p.startswith((str(tmp_path), str(REPOSITORY / "data")))]
    assert ours, "nothing was seen"
    assert [p for p in ours if p.endswith(pickles)] == []


def test_names_that_look_the_same_are_found_in_plain_text_too():
    assert plain.alike(["a b", "ab", "a  b "]) == ("a b", "a  b ")
    assert plain.alike(["yes", "yes\x07"]) == ("yes", "yes\x07")  # a bell shows nothing
    assert plain.alike(["a b", "ab", "a\tb", "c"]) == ("a b", "a\tb")
    assert plain.alike(["a b", "ab", "A b"]) is None
