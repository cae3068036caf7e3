"""The command finetune: reports, weights of classes, Ctrl-C, a full disk; names of experts and folders."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import N_CLASSES, write_images, write_model
from sklearn.utils.class_weight import compute_class_weight
from t5_models import hf_model, rows_of, write_t5, write_texts

from rmm_lab.__main__ import main
from rmm_lab.errors import InputError
from rmm_lab.families import checkpoint as models
from rmm_lab.families import t5, vit
from rmm_lab.search import run_folder
from rmm_lab.search.config import RunArgs
from rmm_lab.search.problem import load_problem
from rmm_lab.tasks.metrics import class_weights
from rmm_lab.zoo import finetune
from rmm_lab.zoo.training import fine_tune


@pytest.fixture
def words(tmp_path, monkeypatch, tiny) -> list[str]:
    monkeypatch.chdir(tmp_path)
    argv = ["finetune", "--base", tiny["base"], "--images", tiny["images"][0], "--out", "out"]
    return [*argv, "--steps", "8", "--batch-size", "4", "--threads", "1"]


def test_the_reward_split_is_reported_on_the_way_and_the_test_split_once(words, capsys):
    assert main(words) == 0
    printed = capsys.readouterr().out
    found = re.findall(r"after (\d+) steps: \S+: [\d.]+ % of the reward split", printed)
    assert found == ["2", "4", "6", "8"]
    assert printed.count("of the test split") == 1
    assert printed.index("test split") > printed.rindex("reward split")
    # The last one is that of the model that was written.
    task = vit.make_tasks(models.read_checkpoint("out"), [words[4]])[0]
    import timm

    model = timm.create_model("local-dir:out", pretrained=True).eval()
    for split in ("reward", "test"):
        data = task.split(split)
        with torch.inference_mode():
            right = model((data.images.float() / 255 - 0.5) / 0.5).argmax(-1) == data.labels
        said = re.findall(rf"([\d.]+) % of the {split} split", printed)[-1]
        assert float(said) == pytest.approx(100 * float(right.double().mean()), abs=0.051)


def test_the_files_of_all_splits_are_listed(words):
    assert main(words) == 0
    with open("out/splits.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    root = Path(words[4])
    assert len(rows) == 3 * N_CLASSES * 12
    for row in rows:
        file = Path(row["file"])
        assert file.is_file()
        assert file.relative_to(root).parts[:2] == (row["split"], row["class"])
        assert row["task"] == root.name


def test_ctrl_c_keeps_the_model_so_far(words, capsys, monkeypatch):
    usual, calls = vit.class_loss, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return usual(*args)

    monkeypatch.setattr(vit, "class_loss", interrupted)
    assert main(words) == 130
    err = capsys.readouterr().err
    assert "stopped; the model after 3 of 8 steps is in out" in err
    assert "Traceback" not in err
    kept = models.read_checkpoint("out")
    assert kept.num_classes == N_CLASSES
    assert kept.sha256 != models.read_checkpoint(words[2]).sha256
    # At the first step there is nothing to keep.
    calls[:] = [1, 1, 1]
    shutil.rmtree("out")
    assert main(words) == 130
    assert "nothing is written" in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("second", "scores", "kept"),
    [(False, [0.9, 0.5], 2), (False, [0.5, 0.9], 3), (False, [0.5, 0.5], 3), (True, [0.1, 0.9], 2)],
    ids=["before", "at the stop", "as good", "twice"],
)
def test_ctrl_c_keeps_the_best_by_the_reward_split(
    words, capsys, monkeypatch, second, scores, kept
):
    """Scored after 2 of 8 steps, and at the stop after 3, where a second Ctrl-C may come."""
    usual, steps, seen = vit.class_loss, [], []

    def interrupted(*args):
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return usual(*args)

    def scored(model, tasks, split):
        seen.append({name: tensor.clone() for name, tensor in model.weights.items()})
        assert split == "reward"
        if second and len(seen) == 2:
            raise KeyboardInterrupt
        yield scores[len(seen) - 1]

    monkeypatch.setattr(vit, "class_loss", interrupted)
    monkeypatch.setattr(finetune, "_scores", scored)
    assert main(words) == 130
    err = capsys.readouterr().err
    assert err.endswith(f"stopped; the model after {kept} of 8 steps is in out\n")
    found = models.read_checkpoint("out").weights
    assert not torch.equal(seen[0]["head.weight"], seen[1]["head.weight"])
    torch.testing.assert_close(found, seen[kept - 2], rtol=0, atol=0)


def test_ctrl_c_keeps_no_model_with_nan(words, capsys, monkeypatch):
    usual = vit.class_loss
    for at, kept in ((4, True), (2, False)):
        steps = []

        def broken(*args, at=at, steps=steps):
            steps.append(1)
            if len(steps) == at:
                raise KeyboardInterrupt
            loss = usual(*args)  # finite, and its gradient is NaN at the step before
            return loss + 0 * (loss - loss.detach()).sqrt() if len(steps) == at - 1 else loss

        monkeypatch.setattr(vit, "class_loss", broken)
        assert main(words) == 130
        said = "the model after 2 of 8 steps is in out" if kept else "nothing is written"
        assert capsys.readouterr().err.endswith(f"stopped; {said}\n")
        assert Path("out").exists() is kept
        shutil.rmtree("out", ignore_errors=True)


def test_ctrl_c_while_the_model_is_written_waits_for_it(words, capsys, monkeypatch):
    usual = finetune.write_checkpoint

    def written(*args, **options):
        os.kill(os.getpid(), signal.SIGINT)
        usual(*args, **options)

    monkeypatch.setattr(finetune, "write_checkpoint", written)
    # Tests that run in the background have SIGINT switched off.
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(words) == 130
    finally:
        signal.signal(signal.SIGINT, old)
    assert capsys.readouterr().err.endswith("stopped; the model after all 8 steps is in out\n")
    assert models.read_checkpoint("out").num_classes == N_CLASSES
    assert Path("out/splits.csv").is_file()


def test_a_full_disk_is_told_before_training(words, capsys, monkeypatch):
    """FAKE: a file that takes no more than 1,000 bytes."""
    real = open

    def small(file, mode="r", *args, **options):
        stream = real(file, mode, *args, **options)
        if "w" in mode and "space" in str(file):

            class Small:
                def __enter__(self):
                    return self

                def __exit__(self, *_):
                    stream.close()

                def write(self, data):
                    if len(data) > 1000:
                        raise OSError(errno.ENOSPC, "No space left on device")
                    return stream.write(data)

            return Small()
        return stream

    monkeypatch.setattr(finetune, "open", small, raising=False)
    monkeypatch.setattr(finetune, "fine_tune", lambda *a, **k: pytest.fail("it trained"))
    assert main(words) == 2
    err = capsys.readouterr().err.strip()
    assert "space" in err
    assert "out" in err
    assert "resume" not in err
    assert len(err.splitlines()) == 1
    assert not list(Path().iterdir())


def test_a_disk_that_fills_up_while_training_is_told_with_its_folder(words, capsys, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(finetune, "write_checkpoint", full)
    assert main(words) == 2
    err = capsys.readouterr().err
    assert "space for the model in out" in err
    assert "resume" not in err


def test_a_home_folder_is_understood(words, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    words[words.index("out")] = "~/ft"
    assert main(words) == 0
    assert (tmp_path / "home" / "ft" / "config.json").is_file()
    assert not Path("~").exists()
    args = RunArgs(run_dir=Path("~/run"), resume=Path("~/old"))
    assert (args.run_dir, args.resume) == (tmp_path / "home" / "run", tmp_path / "home" / "old")


# ------------------------------------------------------------------------------- weights of classes


def test_class_weights_are_those_of_scikit_learn():
    labels = torch.tensor([0, 0, 0, 0, 0, 2, 2, 3])
    expected = compute_class_weight("balanced", classes=np.array([0, 2, 3]), y=labels.numpy())
    found = class_weights(labels, 4)
    assert found[1] == 0
    assert found[[0, 2, 3]].tolist() == pytest.approx(expected.tolist())


def test_class_weights_help_a_rare_class(tmp_path):
    """Nine of ten pictures are of one class; features are pure noise, so only the frequency is learned."""
    root = write_images(tmp_path / "x", 1, per_class=20)
    for split in ("train",):
        for c in (1, 2):
            for n in range(2, 20):
                (root / split / f"class{c}" / f"{n}.png").unlink()
    base = models.read_checkpoint(write_model(tmp_path / "base", 0))
    task = vit.make_tasks(base, [str(root)])[0]
    shares = {}
    for balance in (False, True):
        config, weights = fine_tune(
            base, [task], steps=60, learning_rate=1e-2, seed=0, batch_size=24, balance=balance
        )
        model = vit.create(config, depth=None, num_classes=3)
        model.load_state_dict(weights)
        with torch.inference_mode():
            found = model(task.batch("test", slice(None))).argmax(-1)
        shares[balance] = float((found == 0).double().mean())
    assert shares[True] < shares[False] - 0.1


def test_weights_of_a_text_loss_by_hand(tmp_path):
    """The weighted mean over target tokens, by cross-entropies of single rows."""
    model = hf_model()
    base = models.read_checkpoint(write_t5(tmp_path / "t5", model, tokenizer=True))
    fmt = t5.input_format(base)
    inputs, targets = [[11, 12, 1], [13, 1]], [[14, 1], [15, 16, 1]]
    single = [t5.text_loss(model, fmt, [i], [t]) for i, t in zip(inputs, targets, strict=True)]
    weights = torch.tensor([3.0, 0.5])
    found = t5.text_loss(model, fmt, inputs, targets, weights)
    sums = [3.0 * 2 * single[0], 0.5 * 3 * single[1]]
    torch.testing.assert_close(found, sum(sums) / (3.0 * 2 + 0.5 * 3))


def test_class_weights_of_texts_need_common_answers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = write_t5(tmp_path / "t5", hf_model(), tokenizer=True)
    for name, fixed in (("own", False), ("noyes", True)):
        write_texts(tmp_path / name, 1, fixed=fixed)
        argv = ["finetune", "--base", str(base), "--texts", name, "--out", f"{name}-out"]
        argv += ["--steps", "2", "--batch-size", "4", "--class-weights", "balanced"]
        assert main(argv) == (0 if fixed else 2)
        if not fixed:
            assert "--class-weights" in capsys.readouterr().err
            assert not Path("own-out").exists()
    assert rows_of(tmp_path / "noyes", "train")  # its rows share their choices


# ------------------------------------------------------------------------------------ names, folders


def test_experts_of_folders_that_say_nothing_are_called_after_their_tasks(tiny, tmp_path):
    folders = []
    for name, source in zip(("a", "b"), tiny["experts"], strict=True):
        folders.append(str(shutil.copytree(source, tmp_path / name / "best")))
    options = {"base": tiny["base"], "images": tiny["images"], "operators": ("weight_average",)}
    problem = load_problem(folders, **options)
    assert list(problem.pool.names) == [task.name for task in problem.tasks] == ["i1", "i2"]
    from rmm_lab.path import LayerPath
    from rmm_lab.reward import Step

    path = LayerPath.of(problem.pool, [Step("weight_average", k) for k in range(3)])
    path.save_pretrained(tmp_path / "merged", problem.pool)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert list(config["rmm_lab"]["heads"]) == ["i1", "i2"]
    shutil.move(folders[1], tmp_path / "b" / "checkpoint-500")
    folders[1] = str(tmp_path / "b" / "checkpoint-500")
    assert list(load_problem(folders, **options).pool.names) == ["i1", "i2"]
    assert list(load_problem(**tiny).pool.names) == ["e1", "e2"]


def test_runs_of_the_same_second_have_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda form: "merge-now")
    above = tmp_path / "runs"
    with run_folder.new_folder(above) as first, run_folder.new_folder(above) as second:
        assert first != second
        (first / "x").write_text("")
    assert [p.name for p in above.iterdir()] == ["merge-now"]
    with run_folder.new_folder(above) as third:
        assert third.name == "merge-now-2"
    assert [p.name for p in above.iterdir()] == ["merge-now"]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"), run_folder.new_folder(tmp_path / "file"):
        pass


def test_a_console_without_a_letter_stops_no_search(tiny, tmp_path, monkeypatch):
    """What Python has on Windows when its output goes to a file."""
    expert = shutil.copytree(tiny["experts"][0], tmp_path / "модель")
    argv = ["--base", tiny["base"], "--experts", str(expert), tiny["experts"][1]]
    argv += ["--images", *tiny["images"], "--episodes", "2", "--compare", "paper"]
    argv += ["--preset", "agent", "--run-dir", str(tmp_path / "run")]
    written = io.BytesIO()
    console = io.TextIOWrapper(written, "cp1252")  # kept: it closes what it writes to when it goes
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", console)
        assert main(["merge", *argv]) == 0
    console.flush()
    assert b"expert ??????" in written.getvalue()
    assert "модель" in (tmp_path / "run" / "path.json").read_text("utf-8")
