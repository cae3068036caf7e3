"""T5s, tokenizers and texts that do not fit are refused in one sentence; and runs with T5s end to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import shake, write_images, write_model
from safetensors.torch import load_file, save_file
from t5_models import (
    BIAS,
    TINY,
    WORDS,
    close,
    hf_model,
    logits_of,
    pool_of,
    write_t5,
    write_tokenizer,
)
from transformers import (
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from rmm_lab.__main__ import main
from rmm_lab.errors import InputError, one_sentence
from rmm_lab.families import t5
from rmm_lab.families.checkpoint import architecture, read_checkpoint
from rmm_lab.path import LayerPath
from rmm_lab.reward import Step, predict
from rmm_lab.search import problem as problems
from rmm_lab.search.problem import load_problem
from rmm_lab.zoo.training import fine_tune

REAL = Path(__file__).parents[2] / "shared" / "data" / "t5_tokenizer"
BIASES = [f"{stack}.block.0.{BIAS}" for stack in ("encoder", "decoder")]
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")


class Own:
    """The tiny problem's folders; what a test alters is copied first."""

    def __init__(self, t5s) -> None:
        self.base, *self.experts = map(str, t5s["t5"][1])
        self.texts = tuple(map(str, t5s["texts"]))

    def copied(self, name: str = "two") -> Path:
        """A folder of this problem's own: base, one or two."""
        if name == "base":
            self.base = str(shutil.copytree(self.base, "origin"))
            return Path(self.base)
        i = ("one", "two").index(name)
        self.experts[i] = str(shutil.copytree(self.experts[i], name))
        return Path(self.experts[i])

    def configure(self, *names: str, **values) -> None:
        for name in names:
            file = self.copied(name) / "config.json"
            config = json.loads(file.read_text())
            config |= values
            file.write_text(json.dumps(config))

    def weights(self, change, *names: str) -> None:
        for name in names:
            file = self.copied(name) / "model.safetensors"
            tensors = load_file(file)
            change(tensors)
            save_file(tensors, file)

    def run(self, *more) -> int:
        """A short search by the command line; returns its exit code."""
        argv = ["--base", self.base, "--experts", *self.experts, "--texts", *self.texts]
        argv += ["--quiet", "--episodes", "2", "--compare", "paper", "--run-dir", "run"]
        return main([*argv, *map(str, more)])

    def load(self, **options):
        options = {"base": self.base, "texts": self.texts} | options
        return load_problem(tuple(map(str, self.experts)), **options)


@pytest.fixture
def own(t5s, tmp_path, monkeypatch) -> Own:
    """In an empty folder, where anything written by mistake shows."""
    monkeypatch.chdir(tmp_path)
    return Own(t5s)


def refused(own, *words, **options) -> None:
    """Loading the problem refuses with one sentence that holds all words."""
    with pytest.raises(InputError) as caught:
        own.load(**options).scorer()
    sentence = one_sentence(caught.value)
    assert [word for word in map(str, words) if word not in sentence] == []


def test_the_untouched_problem_is_accepted(own, capsys):
    """All other tests alter one thing of this problem, which alone is good."""
    own.load()
    assert own.run() == 0
    assert capsys.readouterr().err == ""
    path = LayerPath.from_json((Path("run") / "path.json").read_text())
    assert type(path.build(problems.pool_of(path))) is T5ForConditionalGeneration


def test_the_command_line_refuses_with_the_same_sentence(own, capsys):
    own.configure("two", num_heads=4, d_kv=3)
    assert own.run() == 2
    assert "of shape (32, 4) by its config.json" in capsys.readouterr().err
    assert not Path("run").exists()


# ---------------------------------------------------------------------------------- two models


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"num_layers": 1}, ["encoder.block.1.", "no such tensor"]),
        ({"num_layers": 3}, ["encoder.block.2.", "besides"]),
        ({"num_decoder_layers": 1}, ["decoder.block.1.", "no such tensor"]),
        ({"num_decoder_layers": 3}, ["decoder.block.2.", "besides"]),
        ({"d_model": 8}, ["(104, 16)", "(104, 8)"]),
        ({"d_ff": 8}, ["DenseReluDense", "(24, 16)", "(8, 16)"]),
        ({"vocab_size": 90}, ["98 embeddings or more", "found 90"]),  # fewer than its tokens
        ({"d_kv": 3, "num_heads": 4}, ["relative_attention_bias", "(32, 3)", "(32, 4)"]),
        ({"relative_attention_num_buckets": 8}, ["relative_attention_bias", "(32, 3)", "(8, 3)"]),
        ({"relative_attention_max_distance": 64}, ["max_distance': 128", "max_distance': 64"]),
        ({"feed_forward_proj": "gated-gelu"}, ["DenseReluDense.wi.weight", "no such tensor"]),
        ({"feed_forward_proj": "silu"}, ["'relu'", "'silu'"]),  # the same shapes
        ({"layer_norm_epsilon": 1e-3}, ["1e-06", "0.001"]),
        ({"decoder_start_token_id": 9}, ["'start': 0", "'start': 9"]),
        ({"tie_word_embeddings": False}, ["lm_head.weight", "besides"]),
    ],
    ids=lambda v: "-".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else "",
)
def test_experts_of_another_shape(own, args, words):
    own.experts[1] = str(write_t5(Path("two"), hf_model("t5", 5, **args)))
    refused(own, "'two'", own.base, *words, "merge only models")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"relative_attention_max_distance": 64},
            ["distance': 128", "distance': 64", "merge only models"],
        ),
        ({"scale_decoder_outputs": False}, ["'scaled': True", "'scaled': False"]),
        (
            {"dense_act_fn": "silu"},
            ["relu", "silu"],
        ),  # transformers obeys it, not feed_forward_proj
    ],
    ids=["distance", "scaled", "activation"],
)
def test_experts_whose_config_differs_where_no_shape_does(own, values, words):
    own.configure("two", **values)
    refused(own, "'two'", *words)


def test_a_vit_among_t5s_and_a_t5_among_vits(own, tiny):
    t5, own.experts[1] = own.experts[0], str(write_model(Path("two"), 0))
    refused(own, "'two'", own.base, "a T5", "a timm ViT", "one family")
    own.base, own.experts = tiny["base"], [tiny["experts"][0], t5]
    refused(own, t5, "a timm ViT", "a T5", "one family", texts=(), images=tiny["images"])


def test_images_for_t5s_and_texts_for_vits(own, tiny):
    pictures = tuple(str(write_images(Path(f"i{i}"), i, per_class=2)) for i in range(2))
    refused(own, "--images", "is a T5", "--texts", texts=(), images=pictures)
    refused(own, "--texts", "--images", "both", images=pictures)
    refused(own, "--texts", own.experts[0], texts=())
    refused(own, "--texts", "2 experts", "found 1", texts=own.texts[:1])
    own.base, own.experts = tiny["base"], list(tiny["experts"])
    refused(own, "--texts", "is a timm ViT", "--images")


# --------------------------------------------------------------------------------- the tokenizer


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"version": "1.0", "model": {}}'])
@pytest.mark.parametrize("name", ["base", "one"])
def test_no_tokenizer_or_a_broken_one(own, name, content):
    folder = own.copied(name)
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
        refused(own, f"'{folder}'", "tokenizer", "broken", "save it again")
        return
    (folder / "tokenizer.json").unlink()
    if name == "base":
        refused(own, "'origin'", "tokenizer", "found none", "save_pretrained")
    else:
        own.load()  # an expert without a tokenizer has the base's


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", []),
        ("[]", []),
        ('{"pad_token": 5}', []),
        ('{"eos_token": ["</s>"]}', []),
        ('{"eos_token": "<eos>"}', ["eos", "'<eos>'", "None"]),
    ],
)
def test_a_tokenizer_config_that_is_broken_or_anothers(own, content, words):
    (own.copied("base") / "tokenizer_config.json").write_text(content)
    refused(own, "'origin'", "tokenizer", *words)


def test_a_tokenizer_without_its_unknown_word_is_told(own):
    """It reads well, and cannot encode a word that it does not know."""
    own.copied("base")
    for name in ("one", "two"):
        (own.copied(name) / "tokenizer.json").unlink(missing_ok=True)
    file = Path(own.base) / "tokenizer.json"
    settings = json.loads(file.read_text())
    settings["model"]["unk_token"] = "[NONE]"
    file.write_text(json.dumps(settings))
    problem = own.load()
    with pytest.raises(InputError, match=r"tokenizer: .*can encode every text, .*own tokenizer"):
        problem.tasks[0].format.encode(["a word unheard of"])


@pytest.mark.parametrize("n", [105, 400])
def test_a_tokenizer_larger_than_the_embeddings(own, n):
    write_tokenizer(own.copied("base"), [f"w{i}" for i in range(n - 3)])
    refused(own, "'origin'", "at most 104 tokens", f"found {n}", "own tokenizer")


def test_a_tokenizer_as_large_as_the_embeddings(own):
    write_tokenizer(own.copied("base"), [f"w{i}" for i in range(101)])
    assert t5.input_format(read_checkpoint(own.base)).tokenizer.get_vocab_size() == 104


def test_a_tokenizer_far_smaller_than_the_embeddings(own):
    write_t5(Path("far"), hf_model(vocab_size=98 + 257))
    with pytest.raises(InputError, match=r"'far'.*355 tokens.*256 fewer.*found 98"):
        t5.input_format(read_checkpoint("far"))
    write_t5(Path("near"), hf_model(vocab_size=98 + 256))
    t5.input_format(read_checkpoint("near"))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"pad_token_id": 5}, ["pad", "number 5", "'<pad>'", "number 0"]),
        ({"eos_token_id": 0}, ["eos", "number 0", "'</s>'", "number 1"]),
        ({"eos_token_id": None}, ["eos", "number None", "'</s>'"]),
    ],
)
def test_special_tokens_that_are_not_the_models(own, values, words):
    own.configure("base", "one", "two", **values)
    refused(own, "'origin'", *words, "own tokenizer")


def test_an_expert_or_a_multi_task_model_with_another_tokenizer(own):
    folder = own.copied("two")
    write_tokenizer(folder)  # equal: accepted
    own.load()
    write_tokenizer(folder, ["yes", "no", *WORDS[2:]])
    words = ["'two'", "tokenizer of its base", "differ in", "merge only models"]
    refused(own, *words)
    own.experts[1] = own.experts[0]
    refused(own, *words, multi_task="two")


# ------------------------------------------------------------------------------- weights and config


@pytest.mark.parametrize("name", COPIES[:2])
def test_copies_of_the_embeddings_that_differ(own, name):
    own.weights(lambda tensors: tensors.update({name: tensors["shared.weight"] + 1}), "two")
    refused(own, "'two'", name, "shared embeddings", "tied")


@pytest.mark.parametrize("name", BIASES)
def test_no_relative_position_bias(own, name):
    own.weights(lambda tensors: tensors.pop(name), "base", "one", "two")
    refused(own, "'origin'", name, "found none")


def test_a_missing_block(own):
    def change(tensors):
        for name in [n for n in tensors if n.startswith("encoder.block.1.")]:
            tensors[name.replace("block.1.", "block.2.")] = tensors.pop(name)

    own.weights(change, "two")
    refused(own, "'two'", "encoder.block.")


def test_weights_of_something_else(own):
    own.weights(lambda tensors: tensors.pop("shared.weight"), "two")
    refused(own, "'two'", "weights of a T5", "shared", "not supported")


def test_weights_that_are_not_finite(own):
    name = "decoder.block.1.layer.1.EncDecAttention.v.weight"
    own.weights(lambda tensors: tensors[name][2, 3:5].copy_(torch.tensor([1, 0]) / 0), "two")
    refused(own, "'two'", name, "2 NaN")


def test_an_encoder_alone(own):
    own.experts[1] = "two"
    T5EncoderModel(T5Config(**TINY)).save_pretrained("two")
    refused(own, "'two'", "decoder blocks", "2 and 0")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_layers": 3}, ["3 encoder and 2 decoder", "of 2 and 2"]),
        ({"num_decoder_layers": 1}, ["2 encoder and 1 decoder", "of 2 and 2"]),
        ({"num_layers": 4, "num_decoder_layers": None}, ["4 encoder and 4 decoder", "of 2 and 2"]),
        ({"model_type": "umt5"}, ["'t5'", "'umt5'", "not supported"]),
        ({"model_type": None}, ["'t5'", "neither", "not supported"]),
    ],
)
def test_a_config_of_another_depth_or_family(own, values, words):
    own.configure("two", **values)
    refused(own, "'two'", "config.json", *words)


def test_a_decoders_depth_may_be_left_out(own):
    """transformers then takes the encoder's."""
    own.configure("base", "one", "two", num_decoder_layers=None)
    assert own.load().pool.stacks == (range(2), range(2, 4))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"d_ff": 32}, ["DenseReluDense", "(32, 16)", "(24, 16)"]),
        ({"vocab_size": 105}, ["shared.weight", "(105, 16)", "(104, 16)"]),
        (
            {"feed_forward_proj": "gated-gelu", "is_gated_act": True},
            ["DenseReluDense.wi_0.weight", "found none"],
        ),
        ({"num_heads": 4}, ["(32, 4)", "(32, 3)"]),
        ({"num_layers": "2"}, []),
        ({"num_decoder_layers": 2.0}, []),
        ({"num_heads": True}, []),
        ({"d_ff": "24"}, []),
        ({"relative_attention_num_buckets": "32"}, []),
        ({"relative_attention_max_distance": None}, []),
        ({"layer_norm_epsilon": "tiny"}, []),
        ({"feed_forward_proj": 3}, []),
        ({"feed_forward_proj": "nonsense", "dense_act_fn": "nonsense"}, []),
        ({"feed_forward_proj": "a-b-c"}, []),
        ({"dropout_rate": "x"}, []),
        ({"n_positions": "many"}, []),
        ({"decoder_start_token_id": "zero"}, []),
        ({"decoder_start_token_id": 104}, []),
        ({"decoder_start_token_id": -1}, []),
        ({"pad_token_id": "0"}, []),
    ],
    ids=lambda v: "-".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else "",
)
def test_a_config_that_is_not_the_weights_or_not_a_t5s(own, values, words):
    """Base and experts agree, but no model of this config has these weights."""
    own.configure("base", "one", "two", **values)
    refused(own, "config.json", *words)


@pytest.mark.parametrize("layers", [(0, 2, 1), (3, 0), (2, 3, 0, 1)])
def test_a_path_whose_encoder_block_follows_a_decoder_block(own, t5s, layers):
    pool = pool_of(t5s)
    path = LayerPath.of(pool, [Step("one", k) for k in layers])
    for action in (path.build, lambda: path.save_pretrained("merged")):
        with pytest.raises(InputError, match=r"layer path: expected encoder blocks .*path\.json"):
            action()
    assert not Path("merged").exists()


def test_a_model_that_is_cached_in_part_is_fetched_whole(own, monkeypatch):
    """As transformers leaves it when only the model, not the tokenizer, was asked for."""
    part = Path(shutil.copytree(own.base, "part"))
    (part / "tokenizer.json").unlink()
    asked = []

    def snapshot_download(name, *, revision, allow_patterns, local_files_only=False):
        asked.append(local_files_only)
        return str(part if local_files_only else own.base)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: None)
    found = read_checkpoint("hf-hub:someone/small")
    assert asked == [True, False]
    assert found.folder == Path(own.base)


@pytest.mark.parametrize("tied", [False, True])
def test_an_mt5_is_the_t5_that_transformers_runs(tmp_path, tied):
    args = {k: v for k, v in TINY.items() if k != "num_decoder_layers"}
    model = MT5ForConditionalGeneration(MT5Config(**args)).eval().requires_grad_(False)
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn(104, 16), requires_grad=False)
    shake(model.parameters(), 0)
    expected = logits_of(model)
    model.save_pretrained(tmp_path / "mt5")
    found = read_checkpoint(tmp_path / "mt5")
    parts = found.family.split(found.weights)
    built = found.family.architecture(found.config).assemble(
        parts.stem, list(enumerate(parts.layers)), {}
    )
    close(logits_of(built), expected)


# ------------------------------------------------------------------- bad rows, and a run from end to end


def bad_row(name: str, line: int, change) -> Path:
    """Texts in the current folder, one row of the train split changed."""
    rows = [{"input": f"w{i} w{i + 1}", "choices": ["w2", "w3"], "label": i % 2} for i in range(9)]
    rows[line - 1] = change(rows[line - 1])
    folder = Path(name)
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: {"input": "w1", "choices": ["w2", "w3"]}, ["'label'"]),
        (lambda r: {"question": "w1", "choices": ["w2", "w3"], "label": 0}, ["'input'"]),
        (lambda r: r | {"label": 2}, ["label", "0 to 1", "found 2"]),
        (lambda r: r | {"label": -1}, ["label", "found -1"]),
        (lambda r: r | {"label": "w4"}, ["label", "'w4'"]),
        (lambda r: r | {"choices": ["w2", " "]}, ["choice"]),
        (lambda r: r | {"choices": ["w2"]}, ["two"]),
        (lambda r: r | {"input": "  "}, ["input"]),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(own, change, words):
    own.texts = (own.texts[0], str(bad_row("rows", 7, change)))
    refused(own, "train.jsonl", "line 7", *words)


def test_inputs_that_are_too_long_are_counted_and_told(own):
    own.configure("base", n_positions=3)
    assert own.run() == 0
    rows = (Path(own.texts[0]) / "test.jsonl").read_text().splitlines()
    long = sum(len(json.loads(row)["input"].split()) + 1 > 3 for row in rows)  # and the end token
    assert long > 0
    told = (Path("run") / "table.md").read_text()
    assert f"{long} of {len(rows)} inputs of the test split" in told


def test_a_metric_that_does_not_fit_leaves_nothing_behind(own, capsys):
    """With --quiet too, under which nothing about the data is printed."""
    assert own.run("--metric", "balanced") == 2
    assert "the same choices" in capsys.readouterr().err
    assert not Path("run").exists()


def fine_tuned(own, *more):
    argv = ["finetune", "--base", own.base, "--texts", own.texts[0], "--out", "out"]
    return main([*argv, "--steps", "3", "--batch-size", "4", "--threads", "1", *more])


def test_a_fine_tuned_model_of_a_base_in_half_precision_is_in_full(own):
    own.configure("base", dtype="bfloat16")
    assert fine_tuned(own) == 0
    assert T5ForConditionalGeneration.from_pretrained("out").dtype == torch.float32


def test_fine_tuning_teaches_the_right_choice(t5s, tmp_path):
    """Only the second choice is ever right: a model taught the first would find none."""
    rows = [{"input": f"w{i} w9", "choices": ["w20", "w30"], "label": 1} for i in range(10, 40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    base = read_checkpoint(t5s["t5"][1][0])
    task = t5.make_tasks(base, [str(tmp_path / "rows.jsonl")])[0]
    config, weights = fine_tune(base, [task], steps=60, learning_rate=1e-2, seed=0, batch_size=16)
    family, parts = architecture(config), t5.split(weights)
    layers = [family.layer(k, w) for k, w in enumerate(parts.layers)]
    found = predict(family, family.stem(parts.stem), layers, {}, task, "test")
    assert found.tolist() == [1] * len(found)


def test_a_training_that_diverges_is_stopped(own, capsys):
    name = "decoder.final_layer_norm.weight"
    own.weights(lambda tensors: tensors[name].fill_(3e38), "base")  # logits overflow
    assert fine_tuned(own) == 2
    assert "expected a finite loss" in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real texts beside {REAL}")
def test_real_texts_from_fine_tuning_to_a_merged_model(tmp_path, capsys, monkeypatch):
    """Winogrande and WSC with T5's own vocabulary: two experts by our own command, merged, resumed."""
    monkeypatch.chdir(tmp_path)
    real = REAL.parent
    model = hf_model("t5", 3, vocab_size=32_128, n_positions=512)
    base = write_t5(tmp_path / "base-t5", model, tokenizer=False)
    shutil.copy(REAL / "tokenizer.json", base)
    for name, n in (("winogrande/dev", 120), ("wsc/train", 80), ("wsc/val", 104)):
        rows = (real / f"{name}.jsonl").read_text("utf-8").splitlines()[:n]
        file = tmp_path / f"{name}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(rows), "utf-8")
    sets = [f"winogrande:{tmp_path / 'winogrande' / 'dev.jsonl'}", f"wsc:{tmp_path / 'wsc'}"]
    for name, source in zip(("one", "two"), sets, strict=True):
        argv = ["finetune", "--base", str(base), "--texts", source, "--out", name]
        assert main([*argv, "--steps", "10", "--batch-size", "16", "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    assert "of the test split" in printed
    run = ["--base", str(base), "--experts", "one", "two", "--texts", *sets]
    assert (
        main(
            [*run, "--episodes", "10", "--finalists", "2", "--compare", "paper", "--run-dir", "run"]
        )
        == 0
    )
    table = {r["name"]: r for r in json.loads((Path("run") / "table.json").read_text())}
    assert set(table["RMM (agent)"]["scores"]) == {"dev", "wsc"}
    merged = T5ForConditionalGeneration.from_pretrained("run/merged").eval()
    task = t5.make_tasks(read_checkpoint("run/merged"), [sets[1]])[0]
    labels, right = task.split("test").labels.tolist(), 0
    for row, label in zip(task.rows("test"), labels, strict=True):
        ids = torch.tensor(task.format.encode([row["input"]]))
        scores = []
        for choice in task.format.encode(row["choices"]):
            with torch.no_grad():
                loss = merged(input_ids=ids, labels=torch.tensor([choice])).loss
            scores.append(-float(loss) * len(choice))
        right += scores.index(max(scores)) == label
    assert table["RMM (agent)"]["scores"]["wsc"] == pytest.approx(right / len(labels), abs=0.011)
