"""Names and folders: a folder wins over what ships, and a run's files mean the same from anywhere."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from conftest import write_images
from t5_models import write_texts

from rmm_lab.errors import InputError
from rmm_lab.evidence import tables
from rmm_lab.evidence.paper_scale import PaperScale
from rmm_lab.families import shipped
from rmm_lab.families.checkpoint import read_checkpoint
from rmm_lab.path import LayerPath
from rmm_lab.search.config import configure, read_config
from rmm_lab.search.pipeline import train
from rmm_lab.search.problem import load_problem, pool_of
from rmm_lab.search.run_folder import RunFolder
from rmm_lab.tasks.files import absolute, place_in, recalled, shipped_name, spelled
from rmm_lab.tasks.image_task import InputFormat, Task
from rmm_lab.zoo.finetune import Finetune

GREY = InputFormat((1, 8, 8), (0.5,), (0.5,))
# Few episodes of merges that need nothing but weights.
FEW = {
    "operators": ("task_arithmetic:scale=0.5", "ties"),
    "episodes": 4,
    "data_fraction": 0.1,
    "quiet": True,
    "finalists": 0,
}


@pytest.fixture
def here(tiny, tmp_path, monkeypatch) -> Path:
    """A working directory with a base, two experts and images, all called like something that ships."""
    for name, source in zip(
        ("base", "digits", "textures"), (tiny["base"], *tiny["experts"]), strict=True
    ):
        shutil.copytree(source, tmp_path / name)
    for name, source in zip(("letters", "symbols"), tiny["images"], strict=True):
        shutil.copytree(source, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


OWN = {"experts": ("digits", "textures"), "base": "base", "images": ("letters", "symbols")}


def test_a_folder_wins_over_a_name_and_the_name_can_still_be_said(here):
    assert Task("letters", GREY).classes == ["class0", "class1", "class2"]
    ships = Task("shipped:letters", GREY)
    assert len(ships.classes) > 3
    assert ships.source == "shipped:letters"
    assert len(Task("shipped:digits:first", GREY).classes) == 5
    with pytest.raises(InputError, match="shipped:digits:first"):
        Task("digits:first", GREY)  # ./digits is there, but is a model and no pictures


def test_models_of_the_folder_are_merged_and_not_those_that_ship(here, tiny):
    problem = load_problem(**OWN)
    assert problem.pool.base.folder == Path("base")
    shas = [e.sha256 for e in load_problem(**tiny).pool.experts]
    assert [e.sha256 for e in problem.pool.experts] == shas
    assert list(problem.pool.names) == ["digits", "textures"]
    ships = load_problem(["shipped:digits", "shipped:textures"])
    assert ships.pool.n_layers == 6
    assert list(ships.pool.names) == ["digits", "textures"]
    assert ships.multi_task is not None  # digits+textures


def test_a_group_gives_way_to_a_model_of_its_name_only(here, tiny):
    Path("demo").mkdir()
    assert shipped.expand(["demo"]) == ["shipped:digits", "shipped:textures"]
    shutil.copytree(tiny["base"], "qa")
    assert shipped.expand(["qa", "vision"]) == [
        *("qa", "shipped:digits", "shipped:letters", "shipped:textures")
    ]
    assert shipped.expand(["shipped:qa"]) == ["colours", "answers", "antonyms"]


def test_a_folder_that_is_no_model_says_how_to_name_what_ships(here, tmp_path):
    Path("tiny-base").mkdir()
    with pytest.raises(InputError, match=r"config\.json.*shipped:tiny-base"):
        load_problem(**(OWN | {"base": "tiny-base"}))
    with pytest.raises(InputError, match=r"'shipped:cats'.*digits"):
        Task("shipped:cats", GREY)
    with pytest.raises(InputError, match="shipped:cats"):
        load_problem(["shipped:cats", "digits"])


def test_texts_follow_the_same_rule(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "colours", 1, fixed=True)
    own = [json.loads(line) for line in Path("colours/test.jsonl").read_text().splitlines()]
    named = {"experts": ["shipped:colours", "answers"], "base": "text-base"}
    tasks = load_problem(**named, texts=["colours", "answers"]).tasks
    assert tasks[0].rows("test") == own
    assert (tasks[0].name, tasks[1].name) == ("colours", "answers")
    # What an expert that ships was trained on is what ships, whatever lies around.
    ships = load_problem(**(named | {"base": None})).tasks[0]
    assert len(ships.rows("test")) == 1200
    assert ships.source == "shipped:colours"


def test_the_rules_of_names_on_their_own(tmp_path, monkeypatch):
    known = ("digits", "digits:first")
    monkeypatch.chdir(tmp_path)
    for name in known:
        assert shipped_name(name, known) == spelled(name) == absolute(name, known) == name
        assert recalled(name, known) == name
    assert shipped_name("cats", known) == ""
    (tmp_path / "digits").mkdir()
    (tmp_path / "link").symlink_to("digits")
    for name in known:
        assert shipped_name(name, known) == ""
        assert shipped_name(f"shipped:{name}", known) == name
        assert spelled(name) == recalled(name, known) == f"shipped:{name}"
        # In a file, a bare name is always what ships, and a folder always a whole path.
        assert absolute(f"shipped:{name}", known) == name
        assert absolute(name, known) == f"{tmp_path}/{name}"
        assert absolute(f"cifar10:{name}", known) == f"cifar10:{tmp_path}/{name}"
    assert absolute("link", known) == f"{tmp_path}/link"
    assert absolute("hf-hub:digits", known) == "hf-hub:digits"
    assert place_in("cats") is None


def test_a_run_goes_on_from_another_folder_with_the_same_files(here, tmp_path_factory, monkeypatch):
    whole = train(configure("agent", **OWN, **FEW, run_dir=Path("run")), table=False)
    stored = json.loads(Path("run/config.json").read_text())
    assert stored["problem"]["experts"] == [str(here / "digits"), str(here / "textures")]
    assert stored["problem"]["base"] == str(here / "base")
    assert stored["problem"]["images"] == [str(here / "letters"), str(here / "symbols")]
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    config = read_config(RunFolder(here / "run").read_config(), "run")
    again = train(configure(config, resume=here / "run", quiet=True), table=False)
    assert again.path == whole.path
    assert again.reward == whole.reward


@pytest.mark.slow
def test_names_that_ship_are_stored_bare_and_are_never_folders_when_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sets = ["digits:first", "textures"]
    options = FEW | {"experts": ["digits-first", "textures"], "images": sets, "base": "base"}
    options |= {"operators": ("weight_average", "least_squares"), "calibration": 5}
    options |= {"stem": "least_squares"}
    result = train(configure("agent", **options, run_dir=Path("run")), table=False)
    stored = json.loads(Path("run/config.json").read_text())["problem"]
    assert (stored["experts"], stored["base"]) == (["digits-first", "textures"], "base")
    assert stored["images"] == sets
    path = LayerPath.from_json(Path("run/path.json").read_text())
    assert [e.source for e in path.experts] == ["digits-first", "textures"]
    # Folders of these names come up: the run still means what ships.
    for name in ("digits", "textures", "base"):
        write_images(tmp_path / name, 1)
    assert pool_of(path).experts[1].sha256 == result.path.experts[1].sha256
    assert read_config(RunFolder(Path("run")).read_config(), "run").problem.images == (
        *("shipped:digits:first", "shipped:textures"),
    )
    config = read_config(RunFolder(Path("run")).read_config(), "run")
    again = train(configure(config, resume=Path("run"), quiet=True), table=False)
    assert again.reward == result.reward
    assert again.path.to_json() == path.to_json()


def test_an_older_run_with_names_from_its_own_folder_says_where_to_resume(
    here, tmp_path_factory, monkeypatch
):
    train(configure("agent", **OWN, **FEW, run_dir=here / "run"), table=False)
    file = here / "run" / "config.json"
    stored = json.loads(file.read_text())
    stored["problem"] |= {"experts": ["./digits", "./textures"], "base": "./base"}
    stored["problem"]["images"] = ["./letters", "./symbols"]
    shutil.rmtree(here / "run")  # as if it was stopped before its first checkpoint
    (here / "run").mkdir()
    file.write_text(json.dumps(stored))
    config = read_config(RunFolder(here / "run").read_config(), "run")
    again = train(configure(config, resume=here / "run", quiet=True), table=False)
    assert again.folder == here / "run"
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    with pytest.raises(InputError, match=rf"'base' in {elsewhere}.*where the run was started"):
        train(configure(config, resume=here / "run", quiet=True), table=False)


# ----------------------------------------------------------------------- nothing goes into an input


def everything(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def refuses(command, option: str, where: str, inside: str) -> None:
    """A sentence that names the option, the folder and the input; and nothing new on the disk."""
    before = everything(Path())
    with pytest.raises(InputError) as error:
        command()
    said = str(error.value)
    assert said.startswith(f"{option}: expected a folder outside of what is read, found {where} ")
    assert f"in {inside}" in said
    assert everything(Path()) == before


MERGE = {**OWN, **FEW, "multi_task": "joint"}


@pytest.mark.parametrize("inside", ["letters", "symbols", "base", "digits", "textures", "joint"])
@pytest.mark.parametrize("below", ["", "/run", "/train/class0/a/b"])
def test_no_search_writes_into_what_it_reads(here, inside, below):
    shutil.copytree("base", "joint")
    options = MERGE | {"run_dir": Path(inside + below)}
    refuses(lambda: train(configure("agent", **options)), "--run-dir", inside + below, inside)


def test_a_folder_is_in_another_whatever_its_name(here):
    """By a link, by way of ``..``, behind a format's name and a half's, and the default's runs/."""
    (here / "link").symlink_to("letters")
    for run_dir, images in (
        ("link/run", OWN["images"]),
        ("base/../letters/run", OWN["images"]),
        ("letters/run", ("link", "symbols")),
        ("letters/run", ("cifar10:letters:first", "symbols")),
    ):
        options = OWN | FEW | {"images": images, "run_dir": Path(run_dir)}
        inside = next(i for i in images if "l" in i).split(":")[-2 if ":" in images[0] else 0]
        refuses(lambda o=options: train(configure("agent", **o)), "--run-dir", run_dir, inside)
    options = OWN | FEW | {"images": (".", "symbols")}
    refuses(
        lambda: train(configure("agent", **options), above=Path("runs")),
        *("--run-dir", "runs", "."),
    )


def test_a_folder_beside_what_is_read_is_taken(here):
    for run_dir in ("letters-run", "runs/letters", "base2/base"):
        assert train(configure("agent", **OWN, **FEW, run_dir=Path(run_dir)), table=False).folder
    Path("letters/old").mkdir()
    shutil.move("runs/letters", "letters/old/run")
    config = read_config(RunFolder(Path("letters/old/run")).read_config(), "letters/old/run")
    options = {"resume": Path("letters/old/run"), **OWN}
    refuses(
        lambda: train(configure(config, **options), table=False),
        *("--resume", "letters/old/run", "letters"),
    )


@pytest.mark.parametrize("inside", ["letters", "base"])
def test_no_expert_is_written_into_what_it_is_made_of(here, inside):
    for out in (Path(inside), Path(inside, "e"), here / inside / "a" / "b"):
        tune = Finetune(base="base", images=("symbols", "letters"), out=out)
        refuses(tune.run, "--out", str(out), inside)


def test_no_merged_model_is_written_into_what_it_is_made_of(here):
    result = train(configure("agent", **OWN, **FEW), table=False)
    for inside in ("digits", "base"):
        at = Path(inside, "merged")
        refuses(lambda a=at: result.path.save_pretrained(a), "folder", str(at), str(here / inside))
    assert result.path.save_pretrained(Path("digits-merged")).is_dir()


def test_no_table_is_written_into_what_it_is_made_of(here, monkeypatch):
    monkeypatch.setattr(tables.measure, "measure_all", lambda *a: pytest.fail("it measured"))
    monkeypatch.setattr(PaperScale, "_look_for", lambda *a: pytest.fail("it looked"))
    (here / "sets" / "cub200").mkdir(parents=True)
    refuses(tables.Command("II", out=Path("textures/x")).run, "--out", "textures/x", "textures")
    ours = shipped.model_folder("textures")
    shutil.rmtree("textures")  # so that the name means what ships
    refuses(tables.Command("II", out=ours / "x").run, "--out", str(ours / "x"), str(ours))
    assert not (ours / "x").exists()
    paper = PaperScale(Path("sets"), bases=("ViT-B/16=base",))
    for out, inside in (
        ("sets/results", "sets"),
        ("base/results", "base"),
        ("checkpoints-paper/ViT-B-16/dogs/x", "checkpoints-paper/ViT-B-16/dogs"),
    ):
        command = tables.Command("II", scale="paper", out=Path(out), paper=paper)
        refuses(command.run, "--out", out, inside)
    for place in ("sets", "sets/own", "base/own"):
        paper = PaperScale(Path("sets"), bases=("ViT-B/16=base",), checkpoints=Path(place))
        command = tables.Command("II", scale="paper", out=Path("results"), paper=paper)
        refuses(command.run, "--checkpoints", place, place.partition("/")[0])


@pytest.mark.parametrize("odd", ["x" * 5000, "a\0b"], ids=["long", "NUL"])
def test_what_can_be_no_name_of_a_folder_is_refused_from_python_too(here, odd):
    """The parser of the command line refuses these already."""
    for command in (
        *(partial(load_problem, **(OWN | {key: odd})) for key in ("base", "multi_task")),
        *(partial(load_problem, **(OWN | {key: (odd, odd)})) for key in ("experts", "images")),
        partial(read_checkpoint, odd),
        partial(Task, odd, GREY),
        partial(Task, f"cifar10:{odd}", GREY),
        Finetune(base="base", images=("letters",), out=Path(odd)).run,
        partial(train, configure("agent", **OWN, **FEW, run_dir=Path(odd))),
    ):
        with pytest.raises(InputError, match="expected the name of a file or folder"):
            command()


def test_the_folder_of_an_expert_may_be_a_text(here):
    Finetune(base="base", images=("letters",), out="e", steps=1, batch_size=2).run()
    assert Path("e/config.json").is_file()
