"""Odd names, consoles that fail, values out of range, Ctrl-C at the end: no traceback, no work lost."""

from __future__ import annotations

import functools
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import write_images

from rmm_lab import ppo
from rmm_lab.__main__ import main
from rmm_lab.course import notebooks
from rmm_lab.errors import InputError
from rmm_lab.evidence import measure, tables
from rmm_lab.figures import models, render
from rmm_lab.figures import paths as figures
from rmm_lab.operators import parse_operator
from rmm_lab.search.config import configure
from rmm_lab.search.pipeline import train
from rmm_lab.search.run_folder import from_csv
from rmm_lab.tasks.console import run_command
from rmm_lab.tasks.hold import held
from rmm_lab.zoo import finetune

# Other systems have no /dev/full, and file systems that take only some names.
linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux's files and devices")
QUICK = ("--preset", "agent", "--episodes", "2", "--compare", "paper")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory, and a home beside it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words(tiny, *more, experts=None, images=None) -> list[str]:
    experts, images = experts or tiny["experts"], images or tiny["images"]
    named = ["--base", tiny["base"], "--experts", *experts, "--images", *images]
    return [*named, *QUICK, *map(str, more)]


def refused(capsys, argv, *said) -> None:
    """Exit code 2, one line, nothing written."""
    before = sorted(Path.cwd().rglob("*"))
    assert main([str(word) for word in argv]) == 2
    found = capsys.readouterr()
    lines = [line for line in found.err.splitlines() if line]
    assert len(lines) == 1, found.err
    assert lines[0].startswith("error: "), found.err
    for text in said:
        assert str(text) in lines[0]
    assert sorted(Path.cwd().rglob("*")) == before


# ------------------------------------------------------------------------------------------- names

ODD = ('$a_{$|<b>é😀\xa0x, "y"', "_two{")


def test_odd_names_are_carried_by_tables_figures_and_the_card(tiny, recwarn):
    experts = [shutil.copytree(e, Path("e") / n) for e, n in zip(tiny["experts"], ODD, strict=True)]
    images = [shutil.copytree(i, Path("i") / n) for i, n in zip(tiny["images"], ODD, strict=True)]
    assert (
        main(words(tiny, "--run-dir", "run", experts=map(str, experts), images=map(str, images)))
        == 0
    )
    one = ODD[0].replace("\xa0", "_").replace(" ", "_")
    path = json.loads(Path("run/path.json").read_text("utf-8"))
    assert [e["name"] for e in path["experts"]] == [one, ODD[1]]
    table = json.loads(Path("run/table.json").read_text("utf-8"))
    assert tuple(table[0]["scores"]) == ODD
    for file in ("run/table.md", "run/merged/README.md"):
        lines = [x for x in Path(file).read_text("utf-8").splitlines() if x.startswith("|")]
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
        assert len(columns) == (1 if "table" in file else 2), lines
        assert not re.search(r"(?<!`)<b>(?!.*`)", "".join(x for x in lines if "folder" not in x))
    rows = from_csv(Path("run/episodes.csv").read_text("utf-8"))
    assert {f"score_{name}" for name in ODD} <= set(rows[0])
    for name in ("rewards", "path", "cross-task"):
        assert Path(f"run/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not [w for w in recwarn if "Glyph" in str(w.message)]


@linux
@pytest.mark.parametrize("name", ["a\tb", "a\nb", "a\u2028b", "a\x1b[31mb", "a\u202eb", "a\udce9b"])
@pytest.mark.parametrize("what", ["expert", "task", "class"])
def test_names_that_no_table_can_hold_are_refused_at_the_start(tiny, capsys, name, what):
    experts, images = list(tiny["experts"]), list(tiny["images"])
    if what == "expert":
        experts[1] = str(shutil.copytree(experts[1], name))
    elif what == "task":
        images[1] = str(shutil.copytree(images[1], name))
    else:
        images[1] = str(shutil.copytree(images[1], "i"))
        for split in Path("i").iterdir():
            (split / "class2").rename(split / name)
        experts[1] = str(shutil.copytree(experts[1], "e"))
        file = Path("e/config.json")
        config = json.loads(file.read_text())
        config["label_names"] = sorted(["class0", "class1", name])
        file.write_text(json.dumps(config))
    argv = words(tiny, "--run-dir", "run", experts=experts, images=images)
    told = ["rename", repr(name)]
    if "\udce9" in name and what == "expert":  # which safetensors itself does not open
        told = ["UTF-8"]
    elif "\udce9" in name and what == "class":  # JSON has no such character
        told = ["half a character", "save the model"]
    refused(capsys, argv, *told)


def test_an_expert_like_an_operator_with_options_is_refused(tiny, capsys):
    experts = [tiny["experts"][0], str(shutil.copytree(tiny["experts"][1], "ties:mine"))]
    refused(capsys, words(tiny, "--run-dir", "run", experts=experts), "'ties:mine'", "rename")


@linux
def test_a_folder_whose_name_is_no_utf8_is_carried(tiny, here):
    images = [shutil.copytree(i, here / "jos\udce9" / Path(i).name) for i in tiny["images"]]
    more = ("--operators", "regmean", "--stem", "regmean", "--calibration", "5", "--quiet")
    assert main(words(tiny, "--run-dir", "run", *more, images=map(str, images))) == 0
    path = json.loads(Path("run/path.json").read_text("utf-8"))
    assert path["calibration"]["tasks"][0]["source"] == str(images[0])
    assert main(["--resume", "run", "--compare", "paper", "--quiet"]) == 0


def test_models_with_the_same_weights_are_noted(tiny, capsys):
    one, two = tiny["experts"]
    copy = str(shutil.copytree(tiny["base"], "copy"))
    for experts, said in (
        ([one, copy], ["note: expert copy has the same weights as the base, and adds nothing"]),
        ([one, one], ["note: expert i2 has the same weights as expert i1, and adds nothing"]),
        ([one, two], []),
    ):
        assert (
            main(words(tiny, "--run-dir", f"run{len(list(Path().iterdir()))}", experts=experts))
            == 0
        )
        found = [line for line in capsys.readouterr().out.splitlines() if "same weights" in line]
        assert [line.partition(" to a merge")[0] for line in found] == said


def test_two_dollars_are_no_mathematics():
    def drawn(title):
        figure, (axes,) = figures.panels(1, 1, 2, 2)
        axes.set_title(title)
        axes.set_xticks([0, 1], [title, ""])
        return render.png(figure)

    assert drawn("$a_{$").startswith(b"\x89PNG")
    assert drawn("$a$") not in (drawn("a"), drawn("$b$"))


def test_a_name_that_begins_with_an_underscore_is_in_the_legend():
    """matplotlib leaves such labels out."""
    names = ["_one", "two"]
    kept = models.kept_picture(np.full((2, 3), 0.5), names, ["a", "b", "c"], 0.2)
    swept = models.sweep_picture({"x": ([0.1, 0.2], np.full((2, 2), 0.5))}, names, "scale")
    for figure, more in ((kept, ["trimmed layer by layer"]), (swept, ["mean", "best mean"])):
        legend = figure.axes[-1].get_legend()
        assert sorted(text.get_text() for text in legend.get_texts()) == sorted([*names, *more])


# ----------------------------------------------------------------------------------------- consoles


def broken_pipe():
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w", encoding="utf-8")


STREAMS = {
    "full": lambda: os.fdopen(os.open("/dev/full", os.O_WRONLY), "w", encoding="utf-8"),
    "a broken pipe": broken_pipe,
    "closed": lambda: None,
    "ascii": lambda: io.TextIOWrapper(io.BytesIO(), "ascii"),
}


@linux
@pytest.mark.parametrize("kind", STREAMS)
def test_a_console_that_fails_ends_no_run(tiny, monkeypatch, kind):
    experts = [tiny["experts"][0], str(shutil.copytree(tiny["experts"][1], "модель"))]
    out, err = STREAMS[kind](), STREAMS[kind]()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", out)
        patched.setattr(sys, "stderr", err)
        assert main(words(tiny, "--run-dir", "run", experts=experts)) == 0
        assert sys.stdout is out
    for name in ("table.json", "table.md", "path.png", "merged/model.safetensors"):
        assert Path("run", name).is_file()
    for stream in (out, err):
        if stream is not None:
            stream.close()  # without an error: nothing is left to write


@linux
def test_a_full_stdout_is_told_and_a_reader_that_had_enough_is_not(capsys, monkeypatch):
    for kind, told in (("full", True), ("a broken pipe", False)):
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", stream := STREAMS[kind]())
            with pytest.raises(SystemExit) as ended:
                main(["merge", "--help"])
        stream.close()
        assert ended.value.code == 0
        assert ("note: not all could be written" in capsys.readouterr().err) is told


@linux
@pytest.mark.parametrize("kind", STREAMS)
def test_every_command_has_a_console_that_lasts(monkeypatch, kind):
    """Also those that are not started through ``rmm_lab.__main__``."""
    words = ["--env-id", "CartPole-v1", "--episodes", "1", "--episodes-per-update", "1"]
    root = str(Path(notebooks.__file__).parents[2] / "notebooks")
    for command in (
        lambda: run_command(ppo.Main, "ppo", words),
        lambda: notebooks.main(["--check", "--folder", root]),
        lambda: tables.main(["nonsense"]),
    ):
        out, err = STREAMS[kind](), STREAMS[kind]()
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", out)
            patched.setattr(sys, "stderr", err)
            try:
                code = command()
            except SystemExit as ended:  # of the parser
                code = ended.code
        assert code in (0, 2)
        for stream in (out, err):
            if stream is not None:
                stream.close()


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGINT for one process")
@pytest.mark.parametrize(
    ("loaded", "argv"),
    [
        ("numpy", ["rmm_lab", "merge", "--help"]),
        ("rmm_lab.families", ["rmm_lab", "finetune"]),
        ("pandas", ["rmm_lab", "tables", "show"]),
        ("numpy", ["rmm_lab.ppo", "--env-id", "CartPole-v1"]),
        ("torch", ["rmm_lab.ppo"]),
        ("nbformat", ["rmm_lab.course.notebooks", "--check"]),
        ("numpy", ["benchmarks.bench", "--only", "none"]),
        ("numpy", ["data.build", "--only", "none"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_ctrl_c_while_libraries_are_imported_is_one_line(loaded, argv):
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", *argv],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run in the background have SIGINT switched off, and a child inherits that.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        for line in process.stderr:
            if line.rpartition("|")[2].strip() == loaded:
                process.send_signal(signal.SIGINT)
                break
        lines = process.stderr.read().splitlines()
        code = process.wait(timeout=60)
    finally:
        process.kill()
        process.wait(timeout=30)
        process.stderr.close()
    said = [line for line in lines if line and not line.startswith("import time:")]
    assert (code, said) == (130, ["stopped; nothing is written"])


@pytest.mark.slow
def test_a_pipe_that_closes_and_a_backend_that_is_not_there_end_no_run(tiny):
    """``| head -1``, and MPLBACKEND nonsense, in a process of its own."""
    more = {
        "MPLBACKEND": "nonsense",
        "PYTHONIOENCODING": "ascii",
        "COLUMNS": "many",
        "TERM": "none",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "rmm_lab", *words(tiny, "--run-dir", "run")],
        env=os.environ | more | {"PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        process.stdout.close()
        said = process.stderr.read()
        code = process.wait(timeout=120)
    finally:
        process.kill()
        process.wait(timeout=30)
        process.stderr.close()
    assert code == 0, said
    assert "Traceback" not in said
    assert "ignored" not in said  # by the interpreter, as it ends
    assert Path("run/path.png").is_file()


def test_the_model_and_the_tables_are_written_before_the_figures(tiny, monkeypatch):
    def broken(*args, **options):
        raise OSError("no figure")

    monkeypatch.setattr(render, "png", broken)
    assert main(words(tiny, "--run-dir", "run", "--quiet")) == 2
    for name in (
        "merged/config.json",
        "merged/model.safetensors",
        "merged/README.md",
        "table.json",
    ):
        assert Path("run", name).is_file()
    monkeypatch.setattr("rmm_lab.search.report.evaluate_on_test", broken)
    assert main(words(tiny, "--run-dir", "two", "--quiet")) == 2
    assert Path("two/merged/config.json").is_file()


def test_nothing_is_made_before_all_is_checked(tiny, monkeypatch):
    def refuse(*args):
        assert not list(Path().iterdir())
        raise InputError("refused")

    monkeypatch.setattr("rmm_lab.search.pipeline.made_of", refuse)  # the last before the folder
    for more in (("--run-dir", "a/b"), ()):
        assert main(words(tiny, *more)) == 2
        assert not list(Path().iterdir())


def test_a_run_without_a_name_gets_a_folder_in_runs(tiny):
    result = train(
        configure("agent", **tiny, episodes=2, quiet=True), table=False, above=Path("runs")
    )
    assert result.folder.parent == Path("runs")
    assert (result.folder / "merged/config.json").is_file()
    assert train(configure("agent", **tiny, episodes=2, quiet=True), table=False).folder is None


# ------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    "argv",
    [
        *(
            ["merge", option, ""]
            for option in ("--experts", "--base", "--images", "--texts", "--operators", "--stem")
        ),
        *(
            ["merge", option, ""]
            for option in ("--run-dir", "--multi-task", "--device", "--workers")
        ),
        ["merge", "--run-dir="],
        ["merge", "--resume", ""],
        ["merge", "--experts", "digits", ""],
        *(["finetune", option, ""] for option in ("--base", "--out", "--images", "--texts")),
        *(
            ["tables", "II", option, ""]
            for option in ("--out", "--only", "--device", "--sets-folder", "--checkpoints")
        ),
    ],
    ids=" ".join,
)
def test_an_empty_text_is_refused_by_its_option(capsys, argv):
    option = next(word for word in argv if word.startswith("--")).rstrip("=")
    refused(capsys, argv, f"error: {option}: expected a value, found ''")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--learning-rate", "1e30"], "--learning-rate"),
        (["--critic-learning-rate", "2"], "--critic-learning-rate"),
        (["--clip-coef", "1e9"], "--clip-coef"),
        (["--ent-coef", "1e9"], "--ent-coef"),
        (["--vf-coef", "1e9"], "--vf-coef"),
        (["--penalty", "-1e30"], "--penalty"),
        (["--shaping", "1e30"], "--shaping"),
        (["--threads", "100000"], "--threads"),
        (["--workers", "100000"], "--workers"),
        (["--operators", "task_arithmetic:scale=1e30"], "scale"),
        (["--stem", "task_arithmetic:scale=-1e30"], "scale"),
        (["--max-steps", str(2**63)], "--max-steps"),
        (["--episodes", str(10**30)], "--episodes"),
        (["--calibration", str(2**63)], "--calibration"),
        (["finetune", "--steps", str(10**30)], "--steps"),
        (["finetune", "--batch-size", str(10**30)], "--batch-size"),
        (["tables", "II", "--budgets", "5", str(2**63)], "--budgets"),
        (["finetune", "--learning-rate", "3"], "--learning-rate"),
        (["finetune", "--threads", "100000"], "--threads"),
        (["finetune", "--seed", "-1"], "--seed"),
        (["finetune", "--seed", str(2**64)], "--seed"),
        (["tables", "II", "--threads", "100000"], "--threads"),
        (["tables", "II", "--jobs", "100000"], "--jobs"),
        (["tables", "II", "--seeds", "-1"], "--seeds"),
        (["tables", "II", "--seeds", str(2**63)], "--seeds"),
        (["tables", "II", "--device", "nonsense"], "device 'nonsense'"),
        (["tables", "II", "--out", "/dev/null/x"], "--out"),
        (["tables", "II", "--calibration", "0"], "--calibration"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_numbers_have_bounds_which_are_checked_first(tiny, capsys, monkeypatch, argv, said):
    monkeypatch.setattr(measure, "measure_all", lambda *a, **k: pytest.fail("it measured"))
    if argv[0] == "finetune":
        argv = [*argv, "--base", tiny["base"], "--images", tiny["images"][0], "--out", "out"]
    elif argv[0] != "tables":
        argv = [*words(tiny, "--run-dir", "run"), *argv]
    refused(capsys, argv, said)


def test_the_bounds_hold_from_python_too():
    for options in ({"learning_rate": 10**400}, {"ent_coef": 1e30}, {"gamma": 2}):
        with pytest.raises(InputError):
            ppo.Args(**options)
    with pytest.raises(InputError, match="--experts: expected a value"):
        configure(experts=("digits", ""))
    assert configure(groups=("", "x.csv")).problem.groups == ("", "x.csv")
    with pytest.raises(InputError):
        parse_operator("ties:scale=1e7")


def test_a_tilde_is_the_home_everywhere(tiny, monkeypatch, capsys):
    home = Path("home").absolute()
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in ("base", "e1", "e2", "i1", "i2"):
        (home / name).symlink_to(Path(tiny["base"]).parent / name)
    argv = ["--base=~/base", "--experts", "~/e1", "~/e2", "--images", "~/i1", "~/i2", *QUICK]
    assert main([*argv, "--run-dir=~/run", "--quiet"]) == 0
    assert (home / "run/merged/config.json").is_file()
    assert main(["--resume=~/run", "--quiet", "--compare", "paper"]) == 0
    capsys.readouterr()
    refused(capsys, ["tables", "show", "--out=~/none"], home / "none")
    refused(capsys, ["tables", "II", "--scale", "paper", "--sets-folder=~/no"], home / "no")
    monkeypatch.setenv("RMM_LAB_DATA", "~/data")
    refused(capsys, ["--experts", "digits", "textures"], home / "data")
    assert not Path("~").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="knows no homes of others")
@pytest.mark.parametrize(
    "argv",
    [
        ["merge", "--run-dir", "~nobody-here"],
        ["--resume=~nobody-here/run"],
        ["--base", "~nobody-here/base"],
        ["finetune", "--images", "digits", "cifar10:~nobody-here/x"],
        ["finetune", "--out", "~nobody-here"],
        ["tables", "II", "--out", "~nobody-here"],
    ],
    ids=" ".join,
)
def test_the_home_of_nobody_is_named(capsys, argv):
    option = next(w for w in reversed(argv) if w.startswith("--")).partition("=")[0]
    refused(capsys, argv, f"error: {option}: ", "~nobody-here")


@pytest.mark.skipif(sys.platform == "win32", reason="links need a right there")
def test_a_link_in_a_circle_is_no_folder(tiny, capsys):
    Path("circle").symlink_to("circle")
    for option, more in (("--images", tiny["base"]), ("--texts", "text-base")):
        argv = ["finetune", "--base", more, option, "circle", "--out", "out"]
        refused(capsys, argv, "'circle'")


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: ...")],
)
def test_too_little_memory_is_told_in_a_sentence(tiny, capsys, monkeypatch, error):
    def hungry(*args, **options):
        raise error

    monkeypatch.setattr(finetune, "fine_tune", hungry)
    refused(capsys, training(tiny), "expected more memory", "smaller batch")
    monkeypatch.setattr(error, "args", ("another",), raising=False)
    if isinstance(error, RuntimeError):
        with pytest.raises(RuntimeError, match="another"):
            main(training(tiny))


# ----------------------------------------------------------------------------------------- finetune


def training(tiny, *more) -> list[str]:
    argv = ["finetune", "--base", tiny["base"], "--images", tiny["images"][0], "--out", "out"]
    return [*argv, "--steps", "4", "--batch-size", "8", "--learning-rate", "1e-3", *more]


def test_the_folder_of_a_model_is_held_while_it_is_trained(tiny, capsys, monkeypatch):
    def other(*args, **options):
        with pytest.raises(InputError, match="held by process"), held(Path("out"), "--out"):
            pass
        assert main(training(tiny)) == 2
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "fine_tune", other)
    assert main(training(tiny)) == 130
    said = capsys.readouterr().err
    assert re.search(r"--out: .* held by process \d+", said)
    assert said.strip().splitlines()[-1] == "stopped; nothing is written"
    assert not Path("out").exists()


def test_ctrl_c_while_the_test_split_is_scored_keeps_the_model(tiny, capsys, monkeypatch):
    real = finetune._scores

    def scores(model, tasks, split):
        if split == "test":
            raise KeyboardInterrupt
        return real(model, tasks, split)

    monkeypatch.setattr(finetune, "_scores", scores)
    assert main(training(tiny)) == 130
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == "stopped; the model after all 4 steps is in out"
    assert sorted(p.name for p in Path("out").iterdir()) == [
        *("config.json", "model.safetensors", "splits.csv"),
    ]


def test_finetune_refuses_odd_class_names(capsys, tiny):
    write_images(Path("i"), 1)
    for split in Path("i").iterdir():
        (split / "class2").rename(split / "a\x1bb")
    refused(capsys, ["finetune", "--base", tiny["base"], "--images", "i", "--out", "out"], "rename")
