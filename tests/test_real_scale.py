"""Real pretrained models' tables, end to end on stand-ins: a tiny DINOv2, small sets of pictures."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from lm_models import WORDS, hf_model, write_rows, write_tokenizer
from PIL import Image
from safetensors.torch import save_file

from rmm_lab.errors import InputError
from rmm_lab.evidence import (
    measure,
    page_figures,
    real,
    real_excerpts,
    real_measure,
    real_pages,
    real_scale,
    tables,
)
from rmm_lab.evidence.measure import Job
from rmm_lab.evidence.real import Real
from rmm_lab.evidence.rows import DRAWN, read_csv
from rmm_lab.families.checkpoint import read_checkpoint
from rmm_lab.search import gradients, uniform
from rmm_lab.search.config import configure
from rmm_lab.zoo import probe, training

SIZE = 42  # 3 x 3 patches


def write_dinov2(folder: Path, seed: int = 0, size: int = 56) -> Path:
    """The real base's architecture, of two narrow blocks, at its own size of pictures."""
    import timm

    torch.manual_seed(seed)
    args = {"embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 0, "img_size": size}
    args |= {"init_values": 1.0}  # or the class token would hardly see the pictures
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


def sum_of(job: Job) -> dict:
    return {job.table: [{"method": "m", "peak_mb": real_measure.peak_mb()}]}


def stop_at(job: Job) -> dict:
    raise InputError("broken: expected more")


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> dict:
    """Options of ``tables real``: a base and four sets."""
    root = tmp_path_factory.mktemp("real")
    for seed, name in enumerate(("cifar10_jpg", "gtsrb_png", "flowers", "mnist")):
        write_set(root / "data" / name, seed, frames=3 if name == "gtsrb_png" else 1)
    base = write_dinov2(root / "base")
    small = {
        "size": SIZE,
        "steps": 8,
        "batch_size": 4,
        "learning_rate": 3e-3,
        "reward": 8,
        "calibration": 4,
    }
    small |= {"episodes": 6, "seeds": (1,), "curve": (1e-3, 1e-2), "inputs": (2, 4)}
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
    every = (*names, *DRAWN)  # what draws is looked for at each seed
    patch.setattr(uniform, "GRIDS", {name: uniform.GRIDS[name][:2] for name in every})
    patch.setattr(tables, "ONCE", ("fine-tuned", *names))
    patch.setattr(real_measure, "RULES", names)
    patch.setattr(uniform, "VALUES", {2: (0.3, 0.6)})
    patch.setattr(uniform, "MOST", 4)
    short = partial(gradients.rows, steps=2, vertex_steps=1, inputs=4)
    patch.setattr(gradients, "rows", short)
    patch.setattr(real_measure, "alone", lambda function, job: function(job))


def rows(out: Path, name: str) -> list[dict]:
    return read_csv(out / f"{name}.csv").to_dict("records")


def test_distances_are_drawn_with_plain_numbers():
    """A power of ten would be a formula, which figures do not draw."""
    found = [(d, m, 50.0) for d in (0.12, 0.95, 6.2) for m in ("fine-tuned", "weight average")]
    figure = real_pages.draw_curve(pd.DataFrame(found, columns=["distance", "method", "mean"]))
    figure.draw_without_rendering()
    ticks = {t.get_text() for t in figure.axes[0].get_xticklabels(which="both")}
    assert {"0.1", "1"} <= ticks <= {"", "0.01", "0.1", "1", "10", "100"}


def test_closed_forms_by_inputs_have_a_spread_over_seeds():
    names = ("method", "inputs", "reward_split", "mean", "seconds")
    found = [("RegMean", 25, 80, 70, 1), ("RegMean", 25, 82, 74, 3), ("RegMean", 50, 90, 80, 5)]
    table = real_pages.inputs_table(pd.DataFrame(found, columns=names))
    assert table.loc[25].tolist() == ["81.0 ± 1.4", "72.0 ± 2.8", "2"]
    assert table.loc[50].tolist() == ["90.0", "80.0", "5"]


@pytest.mark.slow
def test_all_parts_come_out(measured, stand_ins):
    sha = read_checkpoint(stand_ins["base"]).sha256
    files = ("halves", "vision", "dar", "stranger", "subsets", "unseen", "curve", "speed", "inputs")
    for name in files:
        for row in rows(measured, name):
            assert row["base_sha256"] == sha
            steps = "4 steps of 4 at 0.0" if name == "curve" else "8 steps of 4 at 0.003"
            assert row["training"].startswith(steps)
            assert json.loads(row["config"])
            assert {"commit", "seconds"} <= row.keys()
    assert {r["group"] for r in rows(measured, "halves")} == {"CIFAR10", "GTSRB"}
    four = "CIFAR10+GTSRB+flowers+MNIST"
    assert {r["group"] for r in rows(measured, "vision")} == {"CIFAR10+GTSRB", four}
    assert len({r["group"] for r in rows(measured, "subsets")}) == 6 + 4 + 1
    settings = {(r["preset"], r["reward"], r["data_fraction"]) for r in rows(measured, "dar")}
    assert ("default", "likelihood", 0.01) in settings
    assert len(settings) == 3 + 3 + 2
    by_gradient = [r["group"] for r in rows(measured, "vision") if r["sees"] == "gradients"]
    assert set(by_gradient) == {"CIFAR10+GTSRB"}
    for page in ("table-I", "table-II", "table-IV", "groups", *real_pages.REAL_PAGES):
        assert (measured / f"{page}.md").is_file() == (page != "texts")
    assert (measured / "curve.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_a_second_command_trains_and_measures_nothing(measured, stand_ins, monkeypatch, capsys):
    def refuse(*args, **options):
        raise AssertionError("trained again")

    few(monkeypatch)
    monkeypatch.setattr(training, "optimise", refuse)
    monkeypatch.setattr(page_figures, "DRAW", {})
    before = {f.name: f.read_bytes() for f in measured.iterdir() if f.is_file()}
    Real(**stand_ins, out=measured).run()
    assert capsys.readouterr().out.count(": 0 jobs to measure") == len(real.PARTS) - 1
    assert {f.name: f.read_bytes() for f in measured.iterdir() if f.is_file()} == before


@pytest.mark.slow
def test_experts_are_made_at_once_by_others_and_are_the_same(
    measured, stand_ins, tmp_path, monkeypatch
):
    """Two jobs: this process trains nothing, and the weights are those of one job."""
    few(monkeypatch)
    monkeypatch.setattr(training, "optimise", None)
    options = stand_ins | {"work": tmp_path / "work", "parts": ("inputs",), "inputs": (2,)}
    Real(**options, out=tmp_path, jobs=2).run()
    for name in ("cifar10", "gtsrb"):
        ours, theirs = (
            Path(work) / "experts" / name / "model.safetensors"
            for work in (options["work"], stand_ins["work"])
        )
        assert ours.read_bytes() == theirs.read_bytes()
    assert {f.name for f in (tmp_path / "work" / "experts").iterdir()} == {"cifar10", "gtsrb"}


@pytest.mark.slow
def test_the_protocols_say_what_the_models_say(measured):
    """A stranger counts for nothing; farther experts lie farther; the average of one distance is by hand."""
    alone, joined = (
        {r["method"]: r for r in rows(measured, "stranger") if r["stranger"] == who}
        for who in ("nobody", "MNIST")
    )
    for name in ("base", "fine-tuned"):  # models that do not change when another joins
        for key in ("mean", "by_task"):
            assert alone[name][key] == joined[name][key]
    rule = joined["task arithmetic, tuned"]  # on the reward split too, only the tasks that count do
    problem = measure.load(configure(**json.loads(rule["config"])))
    scores = uniform.uniform(problem, rule["setting"].split(", best")[0], "reward")
    assert (
        rule["reward_split"] == round(100 * scores[:2].mean(), 2) != round(100 * scores.mean(), 2)
    )
    assert joined["RMM (agent)"]["by_task"].count("=") == 2
    pair = [r for r in rows(measured, "vision") if r["group"] == "CIFAR10+GTSRB"]
    own = {r["method"]: r["mean"] for r in pair}
    assert alone["weight average"]["mean"] == own["weight average"]
    for row in rows(measured, "inputs"):
        source = real_measure.SOURCES[row["method"]]
        for split, key in (("reward", "reward_split"), ("test", "mean")):
            problem = measure.load(configure(**json.loads(row["config"])))
            scores = uniform.uniform(problem, source, split)
            assert row[key] == pytest.approx(100 * scores.mean(), abs=0.01)
            assert {len(r) for r in problem.pool.calibration.rows} == {row["inputs"]}
    near, far = (
        [r["distance"] for r in rows(measured, "curve") if r["learning_rate"] == rate]
        for rate in (1e-3, 1e-2)
    )
    assert len({*near}) == len({*far}) == 1
    assert 0 < near[0] < far[0]


@pytest.mark.slow
def test_texts_come_out_with_seconds_and_memory(tmp_path, monkeypatch):
    """A tiny Llama, three sets of rows; every word is one token."""
    base = tmp_path / "llama"
    hf_model().save_pretrained(base)
    write_tokenizer(base)
    for i, name in enumerate(real_scale.TEXTS):
        rows_ = [
            {"input": f"{WORDS[k]} {WORDS[k + i]}", "choices": WORDS[:2], "label": k % 2}
            for k in range(8)
        ]
        write_rows(tmp_path / "data" / name, dict.fromkeys(("train", "reward", "test"), rows_))
    few(monkeypatch)
    monkeypatch.setattr(real_measure, "FEW_RULES", ("weight average",))
    options = {"data": tmp_path / "data", "out": tmp_path / "out", "parts": ("texts",)}
    options |= {"text_steps": 2, "text_batch_size": 4, "text_episodes": 4, "calibration": 4}
    Real(text_base=str(base), **options).run()
    found = {r["method"]: r for r in rows(tmp_path / "out", "texts")}
    assert {"base", "fine-tuned", "weight average", *real_measure.CLOSED, "RMM (agent)"} <= {*found}
    assert all(r["peak_mb"] > 100 for r in found.values())
    assert found["RMM (agent)"]["evaluations"] == 4
    assert found["base"]["training"] == "2 steps of 4 at 2e-05"
    assert "| RMM (agent)" in (tmp_path / "out" / "texts.md").read_text()


# ------------------------------------------------------------------------------------------- the sets


def names(folder: Path, split: str) -> list[str]:
    return sorted(f"{p.parent.name}/{p.name}" for p in (folder / split).glob("*/*"))


def test_a_reward_split_is_drawn_from_train_by_tracks_and_never_from_test(tmp_path):
    source = write_set(tmp_path / "gtsrb", 0, frames=3)
    made = real_scale.split_images(source, tmp_path / "work" / "gtsrb", 20)
    train, reward = names(made, "train"), names(made, "reward")
    assert names(made, "test") == names(source, "test")
    assert sorted(train + reward) == names(source, "train")
    tracks = [{n.rpartition("_")[0] for n in part} for part in (train, reward)]
    assert not tracks[0] & tracks[1]
    assert len(reward) == 4 * 2 * 3  # 20 of 72 pictures: 5 of 18 in each class, two tracks of 3
    again = real_scale.split_images(source, tmp_path / "other" / "gtsrb", 20)
    assert names(again, "reward") == reward


def test_a_set_with_its_own_reward_split_keeps_it(tmp_path):
    source = write_set(tmp_path / "mnist", 0)
    (source / "reward").mkdir()
    for c in range(4):
        (source / "reward" / f"class{c}").mkdir()
        moved = source / "train" / f"class{c}" / "p0.png"
        moved.rename(source / "reward" / f"class{c}" / "p0.png")
    made = real_scale.split_images(source, tmp_path / "work" / "mnist", 20)
    assert all(names(made, split) == names(source, split) for split in ("train", "reward", "test"))


def test_a_stopped_copy_is_made_again_and_another_one_refused(tmp_path, monkeypatch):
    source, folder = write_set(tmp_path / "mnist", 0), tmp_path / "work" / "mnist"

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(real_scale.shutil, "copyfile", stop)
        with pytest.raises(KeyboardInterrupt):
            real_scale.split_images(source, folder, 8)
    assert not list(folder.parent.iterdir())
    real_scale.split_images(source, folder, 8)
    with pytest.raises(InputError, match=r"--work: expected .*mnist to be made as .*12.*found .*8"):
        real_scale.split_images(source, folder, 12)


def test_one_file_of_texts_is_split_and_sets_are_bounded(tmp_path):
    record = {
        "question": {
            "stem": "s",
            "choices": [{"text": "a", "label": "A"}, {"text": "b", "label": "B"}],
        }
    }
    (tmp_path / "qasc").mkdir()
    text = "".join(
        json.dumps({**record, "fact1": f"f{i}", "fact2": "g", "answerKey": "A"}) + "\n"
        for i in range(300)
    )
    (tmp_path / "qasc" / "dev.jsonl").write_text(text)
    made = real_scale.split_texts("qasc", tmp_path / "qasc", tmp_path / "work" / "qasc")
    count = {s: len((made / f"{s}.jsonl").read_text().splitlines()) for s in real_scale.MOST_TEXTS}
    assert count == {"train": 180, "reward": 40, "test": 60}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "--data: expected a folder with the sets cifar10, gtsrb"),
        ({"data": Path("nowhere")}, "found no nowhere; see docs/data-formats.md"),
        ({"base": None}, "--base: expected a ViT, a folder or hf-hub:OWNER/NAME, found none"),
        ({"parts": ("texts",)}, "--text-base: expected a language model"),
        ({"curve": (0.0,)}, "--curve: expected learning rates more than 0"),
        ({"seeds": (1, 1)}, "--seeds: expected one or more different numbers"),
    ],
)
def test_bad_options_are_refused_before_anything_is_made(stand_ins, tmp_path, changes, message):
    options = stand_ins | {"work": tmp_path / "w", "out": tmp_path / "o"} | changes
    with pytest.raises(InputError) as caught:
        Real(**options).run()
    assert message in str(caught.value)
    assert not (tmp_path / "w").exists()


def test_a_missing_set_is_named(stand_ins, tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("cifar10", "cifar100", "gtsrb"):
        (tmp_path / "data" / name).mkdir()
    with pytest.raises(InputError, match=r"one folder flowers in .*data with train/CLASS/picture"):
        Real(**stand_ins | {"data": tmp_path / "data", "out": tmp_path / "o"}).run()
    assert not (tmp_path / "o").exists()


# ------------------------------------------------------------------------------------------- the pieces


def test_a_probe_is_scikit_learns_and_a_nearest_mean_is_by_hand():
    from sklearn.linear_model import LogisticRegression

    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    x = torch.randn(60, 4, generator=generator) + 2 * torch.nn.functional.one_hot(labels, 4)
    weight, bias = probe.fit(x, labels, 3, decay=1e-2)
    scaled = (x - x.mean(0)) / x.std()
    theirs = LogisticRegression(C=1 / (2 * 60 * 1e-2), tol=1e-8, max_iter=1000)
    theirs.fit(scaled.numpy(), labels.numpy())
    ours = (x @ weight.T + bias).softmax(1)
    assert np.allclose(ours, theirs.predict_proba(scaled.numpy()), atol=2e-3)
    train = torch.tensor([[1.0, 0], [2, 0], [-1, 1], [-2, -1]])
    found = probe.nearest_mean(train, torch.tensor([0, 0, 1, 1]), torch.tensor([[9.0, 1], [-1, 9]]))
    assert found.tolist() == [0, 1]
    # Far from zero all lie in one direction: seen from there, class 1 at 45 degrees would be the nearest.
    train = torch.tensor([[10.0, 9], [10, 9.2], [10, 11], [10, 10.8]])
    found = probe.nearest_mean(
        train, torch.tensor([0, 0, 1, 1]), torch.tensor([[5.0, 4.9], [20, 21]])
    )
    assert found.tolist() == [0, 1]


def test_sets_of_experts_by_hand():
    """Two sets: a merge beats the base on one of them, and the best expert by 10 and by -20 points."""
    rows = pd.DataFrame(
        [
            {"n_experts": 2, "group": group, "method": method, "mean": mean}
            for group, means in {"A+B": (40, 60, 50, 80, 70), "A+C": (50, 60, 70, 90, 50)}.items()
            for method, mean in zip(
                ("base", "expert A", "expert X", "fine-tuned", "weight average"), means, strict=True
            )
        ]
    )
    row = real_pages.subset_table(rows).loc[(2, "weight average")]
    assert row["subsets"] == "2"
    assert row["P(better than base), %"] == "50"  # 70 > 40, and 50 is not more than 50
    assert row["gain over the best expert"] == "−5.0"  # 70 - 60 and 50 - 70
    assert row["% of experts"].startswith("71.5")  # 87.5 and 55.6


def test_what_is_recovered_by_hand_and_nothing_where_nothing_is_lost():
    table = pd.DataFrame(
        {"method": ["fine-tuned", "weight average", "RegMean"], "mean": [90.0, 70.0, 85.0]}
        | {"seconds": 1.0, "sees": "nothing"}
    )
    text = real_pages.recovered_table(table)["recovered, %"]
    assert text.to_dict() == {"fine-tuned": "", "weight average": "0", "RegMean": "75"}
    same = real_pages.recovered_table(table.assign(mean=70.0))["recovered, %"]
    assert set(same) == {""}


def test_a_table_that_was_not_measured_is_not_shown():
    def read(name: str) -> pd.DataFrame:
        raise InputError(f"no {name}")

    assert {f(read) for f in real_excerpts.REAL} == {""}


def test_groups_of_other_sizes_are_not_shown_as_the_pair_or_the_four():
    def rows(group: str) -> pd.DataFrame:
        table = {"group": group, "method": ["fine-tuned", "weight average"], "mean": [90.0, 70.0]}
        return pd.DataFrame(table | {"seconds": 1.0, "sees": "nothing"})

    pair, four = (lambda _: rows("a+b")), (lambda _: rows("a+b+c+d"))
    assert "| weight average" in real_excerpts.real_pair(pair)
    assert "| weight average" in real_excerpts.real_four(four)
    assert real_excerpts.real_pair(four) == real_excerpts.real_four(pair) == ""


@pytest.mark.parametrize("function", [sum_of, stop_at])
def test_a_process_of_its_own_hands_back_rows_and_errors(function):
    job = Job("speed", function, {"group": "g"}, configure())
    if function is stop_at:
        with pytest.raises(InputError, match="broken: expected more"):
            real_measure.alone(function, job)
    else:
        found = real_measure.alone(function, job)
        assert found["speed"][0]["peak_mb"] > 10
