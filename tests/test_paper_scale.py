"""The paper's scale, end to end on stand-ins: tiny bases, small sets in the layouts of the official ones."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import write_model
from PIL import Image
from test_images import write_cub, write_dogs

from rmm_lab.errors import InputError
from rmm_lab.evidence import page_figures, paper_scale, tables
from rmm_lab.evidence.paper_scale import PaperScale
from rmm_lab.evidence.rows import read_csv
from rmm_lab.evidence.tables import Command
from rmm_lab.search import uniform
from rmm_lab.search.config import Config, configure
from rmm_lab.search.table import PAPER
from rmm_lab.tasks import image_formats
from rmm_lab.tasks import text_formats as formats
from rmm_lab.zoo import training


def write_t5(folder: Path, seed: int) -> Path:
    """A T5 of one block in each stack and its tokenizer, by transformers and tokenizers alone."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    size = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4}
    config = T5Config(vocab_size=64, n_positions=32, decoder_start_token_id=0, **size)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    words = ["<pad>", "</s>", "<unk>", "no", "yes", *(f"w{i}" for i in range(50))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"}
    settings |= {"eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_folder(folder: Path) -> Path:
    """CIFAR's pictures as folders: 4 classes, 6 pictures in train and 3 in test."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 6), ("test", 3)):
        for c in range(4):
            (folder / part / f"class{c}").mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / f"class{c}" / f"{i}.png")
    return folder


def _ai2(i: int, **more: str) -> dict:
    choices = [{"text": f"w{i}", "label": "A"}, {"text": f"w{i + 1}", "label": "B"}]
    question = {"stem": f"w{i} w3", "choices": choices}
    return {"question": question, "answerKey": "AB"[i % 2]} | more


def _wsc(i: int) -> dict:
    target = {"span1_text": "w2", "span1_index": 1, "span2_text": "w4", "span2_index": 2}
    return {"text": f"w{i} w2 w4 w{i + 1}", "target": target, "label": bool(i % 2)}


RECORDS = {
    "qasc": lambda i: _ai2(i, fact1=f"w{i}", fact2="w5"),
    "quartz": lambda i: _ai2(i, para=f"w{i} w6"),
    "wikiqa": lambda i: {"Question": f"w{i}", "Sentence": "w1 w2", "Label": str(i % 2)},
    "paws": lambda i: {"sentence1": f"w{i} w1", "sentence2": f"w1 w{i}", "label": str(i % 2)},
    "winogrande": lambda i: {
        **{"sentence": f"w{i} saw _", "option1": "w1", "option2": "w2"},
        "answer": str(1 + i % 2),
    },
    "wsc": _wsc,
    "storycloze": lambda i: (
        {f"InputSentence{k}": f"w{i} w{k}" for k in (1, 2, 3, 4)}
        | {"RandomFifthSentenceQuiz1": "w1", "RandomFifthSentenceQuiz2": "w2"}
        | {"AnswerRightEnding": str(1 + i % 2)}
    ),
}


def write_official(folder: Path, name: str) -> Path:
    """Every file that the format's reader looks for first, 12 records each."""
    folder.mkdir()
    for k, names in enumerate(formats.FORMATS[name].files.values()):
        records = [RECORDS[name](12 * k + i) for i in range(12)]
        file = folder / names[0]
        if file.suffix == ".jsonl":
            file.write_text("\n".join(map(json.dumps, records)))
            continue
        with open(file, "w", newline="") as stream:
            delimiter = "\t" if file.suffix == ".tsv" else ","
            writer = csv.DictWriter(stream, list(records[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(records)
    return folder


KINDS = ("uniform", "search")  # the others have tests of their own
RULES = (*PAPER, "DELLA")  # the paper's, and all that draw; the others have tests of their own too


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> dict:
    """Options of the paper's scale: local bases and sets."""
    root = tmp_path_factory.mktemp("paper")
    sets = root / "sets"
    sets.mkdir()
    for name in ("cifar10", "cifar100"):
        write_folder(sets / name)
    write_cub(sets / "cub200")
    write_dogs(sets / "dogs")
    for name in RECORDS:
        write_official(sets / name, name)
    vits = [write_model(root / f"vit{i}", i, depth=2) for i in (1, 2)]
    t5s = [write_t5(root / f"t5-{i}", i) for i in (1, 2)]
    bases = [f"{n}={f}" for n, f in zip(paper_scale.BASES, [*vits, *t5s], strict=True)]
    return {
        **{"sets_folder": sets, "bases": tuple(bases), "checkpoints": root / "checkpoints"},
        **{"steps": 1, "text_steps": 1, "batch_size": 4, "text_batch_size": 4},
    }


@pytest.fixture(scope="module")
def measured(stand_ins, tmp_path_factory) -> Iterator[Path]:
    """The folder of all tables, of few rules, each tuned over two settings."""
    out = tmp_path_factory.mktemp("results-paper")
    command = Command("all", scale="paper", seeds=(1,), episodes=6, out=out, kinds=KINDS)
    command.paper = PaperScale(**stand_ins)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uniform, "GRIDS", {name: uniform.GRIDS[name][:2] for name in RULES})
        once = [name for name in tables.ONCE if name in ("fine-tuned", *RULES)]
        patch.setattr(tables, "ONCE", once)
        command.run()
        yield out


def rows_of(out: Path, name: str) -> list[dict]:
    return read_csv(out / f"{name}.csv").to_dict("records")


def config_of(row: dict) -> Config:
    return configure(**json.loads(row["config"]))


@pytest.mark.slow
def test_all_tables_come_out(measured):
    halves = rows_of(measured, "halves")
    assert {(r["group"], r["size"]) for r in halves} == {
        (g, s) for g in ("CIFAR10", "CIFAR100", "CUB", "Dogs") for s in ("ViT-S/32", "ViT-B/16")
    }
    methods = ["fine-tuned", "multi-task", "weight average", "task arithmetic", "TIES", "DARE"]
    methods += ["RMM (paper)", "RMM (agent)"]
    for name, groups in (("halves", 8), ("vision", 1), ("language", 4)):
        found = [r["method"] for r in rows_of(measured, name)]
        assert all(found.count(m) == groups for m in methods), name
    language = rows_of(measured, "language")
    assert {(r["group"], r["size"]) for r in language} == {
        (g, s) for g in ("QA", "Mixed") for s in ("T5-Small", "T5-Base")
    }
    shares = [(r["preset"], r["data_fraction"], r["dar"]) for r in rows_of(measured, "dar")]
    assert shares[:5] == [
        ("paper", 1, 0.8),
        *(("paper", f, dar) for f in (0.1, 0.01) for dar in (0.8, 0)),
    ]
    assert [s[:2] for s in shares[5:]] == [("weights", f) for f in (1, 0.1, 0.01, 0.1, 0.01)]
    assert {r["reward"] for r in rows_of(measured, "dar")[-2:]} == {"likelihood"}
    assert len(rows_of(measured, "dar-curve")) == 2 * 6
    for page in ("table-I", "table-II", "table-III", "table-IV"):
        text = (measured / f"{page}.md").read_text()
        assert "Paper (Han et al. 2025), other models and data" in text
        assert (measured / f"{page}.png").read_bytes()[:4] == b"\x89PNG"
    assert (measured / "fig-3.png").is_file()


@pytest.mark.slow
def test_the_share_of_the_data_and_the_metric_are_the_papers(measured):
    for name, share in (("halves", 0.1), ("vision", 0.1), ("language", 0.01)):
        assert {config_of(row).run.data_fraction for row in rows_of(measured, name)} == {share}
    for row in rows_of(measured, "language"):
        assert config_of(row).problem.metric == "accuracy"
        assert row["by_task"].split("=")[0] in ("qasc", "paws")


@pytest.mark.slow
def test_halves_share_no_class_and_pairs_are_whole(measured):
    """What the experts were trained on, from their checkpoints' own files."""

    def labels(expert: str) -> list[str]:
        return json.loads((Path(expert) / "config.json").read_text())["label_names"]

    rows = {(r["group"], r["size"]): r for r in rows_of(measured, "halves")}
    spec = config_of(rows["CUB", "ViT-S/32"]).problem
    one, two = map(labels, spec.experts)
    assert (len(one), len(two), len({*one, *two})) == (2, 2, 4)
    (pair,) = {config_of(r).problem.experts for r in rows_of(measured, "vision")}
    assert [len(labels(expert)) for expert in pair] == [4, 4]
    made = json.loads((Path(spec.multi_task) / "training.json").read_text())
    assert made["sets"] == ["cub200:first", "cub200:second"]
    assert made["steps"] == 2  # as many for each of its tasks


@pytest.mark.slow
def test_a_second_command_trains_and_measures_nothing(measured, stand_ins, monkeypatch, capsys):
    def refuse(*args, **options):
        raise AssertionError("trained again")

    monkeypatch.setattr(training, "optimise", refuse)
    monkeypatch.setattr(page_figures, "DRAW", {})  # what takes most of the time
    before = {f.name: f.read_bytes() for f in measured.iterdir()}
    command = Command("all", scale="paper", seeds=(1,), episodes=6, out=measured, kinds=KINDS)
    command.paper = PaperScale(**stand_ins)
    command.run()
    assert "0 jobs to measure" in capsys.readouterr().out
    assert {f.name: f.read_bytes() for f in measured.iterdir()} == before


def prepared(stand_ins, tmp_path, **options) -> PaperScale:
    scale = PaperScale(**(stand_ins | {"checkpoints": tmp_path / "c"} | options))
    scale.prepare(scale.groups()["II"], "cpu", 1)
    return scale


def test_a_half_made_checkpoint_is_made_again(stand_ins, tmp_path, capsys):
    prepared(stand_ins, tmp_path)
    folder = tmp_path / "c" / "ViT-B-16" / "cub200"
    (folder / "training.json").unlink()  # as a command leaves it that was stopped before
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:100])
    capsys.readouterr()
    prepared(stand_ins, tmp_path)
    told = capsys.readouterr().out
    assert told.count("fine-tuning") == 1
    assert (folder / "model.safetensors").read_bytes() == whole  # seeded


def test_a_checkpoint_made_otherwise_is_refused(stand_ins, tmp_path):
    prepared(stand_ins, tmp_path)
    with pytest.raises(InputError, match=r"--checkpoints: expected .*cub200 .* steps = 3, found 1"):
        prepared(stand_ins, tmp_path, steps=3)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("cub200", "unpack CUB_200_2011.tgz"),
        ("cifar10", "train-00000-of-00001.parquet"),
        ("storycloze", "cs.rochester.edu/nlp/rocstories"),
    ],
)
def test_a_missing_set_is_refused_before_anything_is_trained(
    stand_ins, tmp_path, monkeypatch, name, hint
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    sets = tmp_path / "sets"
    sets.mkdir()
    for folder in stand_ins["sets_folder"].iterdir():
        if folder.name != name:
            (sets / folder.name).symlink_to(folder)
    scale = PaperScale(**(stand_ins | {"sets_folder": sets, "checkpoints": tmp_path / "c"}))
    groups = [g for table in ("I", "III") for g in scale.groups()[table]]
    with pytest.raises(InputError) as caught:
        scale.prepare(groups, "cpu", 1)
    assert hint in str(caught.value)
    assert str(sets / name) in str(caught.value)
    assert not (tmp_path / "c").exists()


def test_a_missing_base_is_refused_before_anything_is_trained(stand_ins, tmp_path):
    bases = (*stand_ins["bases"], f"ViT-B/16={tmp_path / 'none'}")
    with pytest.raises(InputError, match=r"there is no folder .*--bases ViT-B/16=FOLDER"):
        prepared(stand_ins, tmp_path, bases=bases)
    assert not (tmp_path / "c").exists()


def test_places_are_folders_where_there_are_some_and_else_the_hub(stand_ins, tmp_path):
    (tmp_path / "cifar10").mkdir()
    scale = PaperScale(sets_folder=tmp_path)
    (halves, *_), (language, *_) = scale.groups()["I"], scale.groups()["III"]
    assert halves.options["images"] == tuple(
        f"cifar10:{tmp_path}/cifar10:{half}" for half in ("first", "second")
    )
    assert language.options["texts"] == ("qasc:hf-hub", "wikiqa:hf-hub", "quartz:hf-hub")
    assert scale.groups()["II"][0].options["images"][0] == f"cub200:{tmp_path}/cub200"
    hub = PaperScale().groups()["I"][0].options
    assert hub["images"] == ("cifar10:hf-hub:first", "cifar10:hf-hub:second")
    assert hub["base"].startswith("hf-hub:timm/vit_small_patch32_224")


def test_the_bases_are_the_papers_architectures():
    import timm

    for name, patch, width in (("ViT-S/32", 32, 384), ("ViT-B/16", 16, 768)):
        tag = paper_scale.BASES[name].removeprefix("hf-hub:timm/")
        assert tag in timm.list_models(pretrained=True)
        model = timm.create_model(tag.partition(".")[0], num_classes=2)
        assert (model.patch_embed.patch_size, model.embed_dim) == ((patch, patch), width)


def test_every_set_has_a_reader():
    assert set(paper_scale.IMAGES.values()) == set(image_formats.FORMATS)
    assert {n for names in paper_scale.TEXTS.values() for n in names} == set(formats.FORMATS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bases", "ViT-L/16=x"], "--bases: expected NAME=SOURCE"),
        (["--steps", "0"], "--steps: expected at least 1, found 0"),
        (["--text-learning-rate", "0"], "--text-learning-rate: expected more than 0"),
        (["--sets-folder", "nowhere"], "--sets-folder: expected a folder, found none at nowhere"),
    ],
)
def test_bad_options_are_refused(tmp_path, capsys, words, message):
    out = ["--scale", "paper", "--out", str(tmp_path), "--checkpoints", str(tmp_path / "c")]
    assert tables.main(["II", *out, *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
