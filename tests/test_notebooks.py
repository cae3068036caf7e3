"""What every notebook is held to without running it: shape, exercises, links, the map of equations."""

from __future__ import annotations

import ast
import importlib
import re
import statistics
from pathlib import Path

import pytest

from rmm_lab.course import checks
from rmm_lab.course import notebooks as course

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
NAMES = (
    *("00_start_here", "01_models_and_task_vectors", "02_merging_operators"),
    *("03_actions_and_merging_map", "04_compose_and_reward", "05_ppo_from_scratch", "05b_probes"),
    *("06_train_the_agent", "07_does_it_take_a_search", "08_dar_ablation", "09_vit_experiments"),
    *("10_t5_experiments", "11_more_than_one_answer", "12_small_language_models"),
)
HEADER = ("You will", "You need", "From the paper", "Time", "Seed")


@pytest.fixture(params=NAMES)
def solved(request):
    return course.read(FOLDER / "solved" / f"{request.param}.ipynb")


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def code(notebook) -> list[str]:
    return [c.source for c in notebook.cells if c.cell_type == "code"]


def prose(notebook) -> str:
    return "\n\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")


def test_the_course_is_complete_and_the_student_notebooks_are_up_to_date():
    assert [p.stem for p in sorted((FOLDER / "solved").glob("*.ipynb"))] == list(NAMES)
    course.Course(FOLDER, check=True).run()  # raises InputError where a file differs


def test_the_notebooks_without_solutions_state_their_seconds_and_keep_the_rules():
    for file in course.ALONE:
        notebook = course.read(FOLDER / file)
        assert course.stated_seconds(notebook) > 0
        assert len(notebook.cells) <= 12
        assert course.BEGIN not in "\n".join(code(notebook))
        assert not any(cell.get("outputs") for cell in notebook.cells)
        for target in re.findall(r"\]\(([^)]+)\)", prose(notebook)):
            assert (FOLDER / target).is_file(), target


def test_header_and_last_cell(name):
    notebook = course.read(FOLDER / "solved" / f"{name}.ipynb")
    header, last = notebook.cells[0], notebook.cells[-1]
    assert header.source.startswith(f"# {number(name)} · ")
    assert "?*" in header.source  # the question that it starts from
    rows = re.findall(r"^\| \*\*(.+?)\*\* \|", header.source, re.M)
    assert rows == list(HEADER)
    assert re.search(r"\d+ minutes to learn, \d+ s to run", header.source)
    assert (header.id, last.id) == ("header", "what-we-saw")
    assert "## What we saw" in last.source
    assert "## What to try" in last.source
    assert "torch.set_num_threads(1)" in code(notebook)[0]
    assert re.search(r"^SEED = \d+\b", code(notebook)[0], re.M)


def test_the_teachers_table_says_what_the_headers_say():
    text = (FOLDER / "README.md").read_text("utf-8")
    rows = re.findall(
        r"^\| \[\d\db? · [^|]*\]\((\w+)\.ipynb\) \|.*\| (\d+) \| (\d+) \|$", text, re.M
    )
    assert [name for name, _, _ in rows] == list(NAMES)
    for name, minutes, seconds in rows:
        header = course.read(FOLDER / "solved" / f"{name}.ipynb").cells[0].source
        assert f"{minutes} minutes to learn, {seconds} s to run" in header


def test_size(name):
    solved = course.read(FOLDER / "solved" / f"{name}.ipynb")
    optional = "*Optional." in solved.cells[0].source
    assert (15 if optional else 20) <= len(solved.cells) <= 40
    lengths = [len(source.split("\n")) for source in code(solved)]
    assert statistics.median(lengths) <= 10
    assert max(lengths) <= 25
    words = len(re.sub(r"`[^`\n]+`|<[^>]+>|\$[^$]*\$|[|#*`>_-]", " ", prose(solved)).split())
    assert (400 if optional else 600) <= words <= 1500


def test_ids_are_words(solved):
    ids = [c.id for c in solved.cells]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-z0-9-]+", i) for i in ids)


def test_offline_and_without_what_hides_errors(solved):
    text = "\n".join(code(solved))
    for word in (
        "http://",
        "https://",
        "pip install",
        "pyplot",
        "@interact",
        "interact(",
        "Output(",
    ):
        assert word not in text, word
    assert not re.search(r"^\s*[!%]", text, re.M), "no shell commands, no magics"


def test_links_lead_to_files_that_exist(solved):
    for folder, notebook in (("solved", solved), (".", course.student(solved))):
        for target in re.findall(r"\]\(([^)]+)\)", prose(notebook)):
            assert (FOLDER / folder / target).is_file(), target


def test_figures_go_through_show(solved):
    """Each figure has an alt sentence: none is a bare last expression of a cell."""
    for source in code(solved):
        if "Figure(" in source or "savefig" in source:
            assert "show(" in source, source


def number(name: str) -> str:
    return name.partition("_")[0]


def test_what_to_try_names_cells_by_their_first_line(solved):
    first = {c.id: c.source.split("\n")[0] for c in solved.cells}
    for name in re.findall(r"\bcells? `([^`]+)`", solved.cells[-1].source):
        assert first.get(name) == f"# {name}", name


def tasks_of(name: str) -> dict[str, checks.Task]:
    return importlib.import_module(f"rmm_lab.course.exercises.nb{number(name)}").EXERCISES


def used(notebook) -> dict[str, str]:
    """Exercise -> the source of the cell that checks it."""
    return {n: s for s in code(notebook) for n in re.findall(r'checks\.use\(\s*"([^"]+)"', s)}


def test_each_exercise_is_set_once_and_described(name):
    notebook = course.read(FOLDER / "solved" / f"{name}.ipynb")
    tasks, cells = tasks_of(name), used(notebook)
    assert set(cells) == set(tasks)
    assert 2 <= len(tasks) <= 5
    assert any(isinstance(t, checks.Exercise) for t in tasks.values())
    text = prose(notebook)
    headings = re.findall(r"^### Exercise (\S+)", text, re.M)
    assert headings == [f"{number(name)}.{i + 1}" for i in range(len(tasks))]
    assert len(re.findall(r"Difficulty: [●○]{3} · \d+ minutes", text)) == len(tasks)
    n_code = sum(isinstance(t, checks.Exercise) for t in tasks.values())
    assert text.count("<details>") == text.count("</details>") >= n_code  # a hint each
    for source in cells.values():
        assert course.BEGIN in source


def test_some_exercises_are_hard_and_some_ask_for_words():
    texts = [prose(course.read(FOLDER / "solved" / f"{name}.ipynb")) for name in NAMES]
    assert sum(text.count("Difficulty: ●●●") for text in texts) >= 6
    tasks = [task for name in NAMES for task in tasks_of(name).values()]
    assert sum(isinstance(task, checks.Essay) for task in tasks) >= 3


def test_each_guess_is_typed_and_then_revealed(solved):
    """In turn: guess, reveal, guess, reveal, ..."""
    found = re.findall(r"^guess = |\breveal\(guess", "\n".join(code(solved)), re.M)
    assert found[::2] == ["guess = "] * (len(found) // 2)
    assert found[1::2] == ["reveal(guess"] * (len(found) // 2)


def function_of(source: str):
    """The function that a cell defines, run without its check."""
    tree = ast.parse(source)
    tree.body = [
        n for n in tree.body if isinstance(n, ast.FunctionDef | ast.Import | ast.ImportFrom)
    ]
    (function,) = [n for n in tree.body if isinstance(n, ast.FunctionDef)]
    import itertools
    import math

    import numpy as np
    import torch

    space = {"torch": torch, "np": np, "itertools": itertools, "math": math}
    exec(compile(tree, "<cell>", "exec"), space)
    return space[function.name]


def test_the_solved_notebooks_solutions_pass_and_the_students_stubs_are_not_attempted(name):
    notebook = course.read(FOLDER / "solved" / f"{name}.ipynb")
    for exercise, source in used(notebook).items():
        verdict = checks.check(exercise, function_of(source))
        essay = isinstance(checks.exercise(exercise), checks.Essay)
        assert verdict.status == ("written" if essay else "correct"), (exercise, verdict.message)
    for exercise, source in used(course.student(notebook)).items():
        verdict = checks.check(exercise, function_of(source))
        assert verdict.status == "not attempted", (exercise, verdict.message)


def test_every_mistake_differs_from_the_answer_and_from_the_others(name):
    """Else its hint could never be given, or another one would be given in its place."""
    for exercise, task in tasks_of(name).items():
        if isinstance(task, checks.Quiz):
            assert task.right in task.explained
            assert len(task.explained) >= 3
            assert len(set(task.explained.values())) == len(task.explained)
            continue
        if isinstance(task, checks.Essay):
            assert 3 <= len(task.rubric) <= 6
            assert checks.check(exercise, task.model).status == "written"
            assert checks.check(exercise, "word " * task.words[0]).status == "wrong"
            continue
        assert len(task.cases()) >= 2
        assert len(task.mistakes) >= 3
        for mistake in task.mistakes:
            verdict = checks.check(exercise, mistake.wrong)
            assert (verdict.status, verdict.message) == ("wrong", mistake.hint), exercise


# ------------------------------------------------------------------------------- the map in notebook 00


def equation_map() -> list[list[str]]:
    text = prose(course.read(FOLDER / "solved" / "00_start_here.ipynb"))
    rows = [line for line in text.split("\n") if re.match(r"\| (Eq\. )?\d+ \|", line)]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_map_has_every_equation():
    numbers = {int(re.sub(r"\D", "", row[0])) for row in equation_map()}
    assert numbers == set(range(1, 11))


def test_the_map_is_true():
    for number, _, both, notebooks in equation_map():
        functions, _, tests = both.partition("<br>")
        for full in re.findall(r"`(rmm_lab[\w.]+)`", functions):
            module, _, rest = full.removeprefix("rmm_lab.").partition(".")
            found = importlib.import_module(f"rmm_lab.{module}")
            for attribute in rest.split("."):
                found = getattr(found, attribute)
            last = rest.split(".")[-1]
            for file in re.findall(r"\]\(([^)]+)\)", notebooks):
                text = (FOLDER / "solved" / file).read_text("utf-8")
                assert last in text, f"Eq. {number}: {file} says nothing of {last}"
        assert re.search(r"\]\(\d\d_\w+\.ipynb\)", notebooks), number
        nodes = re.findall(r"`(tests/\w+\.py)::(\w+)`", tests)
        assert nodes, number
        for file, test in nodes:
            tree = ast.parse((ROOT / file).read_text("utf-8"))
            names = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
            assert test in names, f"Eq. {number}: {file} has no {test}"


def test_the_symbols_are_in_a_table():
    text = prose(course.read(FOLDER / "solved" / "00_start_here.ipynb"))
    assert "| Symbol | Meaning | Shape | Name in code |" in text
    for symbol in ("N", "M", "L", "s_t", "R_", "V", "lambda", "T_", "gamma", "varepsilon"):
        assert re.search(rf"^\| \$[^|]*{re.escape(symbol)}[^|]*\|", text, re.M), symbol
