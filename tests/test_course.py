"""Student notebooks from solved ones; what a run is held to."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import screen
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from rmm_lab.course import notebooks as course
from rmm_lab.errors import InputError

ROOT = Path(__file__).parent.parent
SOLVED = '''def ties(deltas):
    """Merge."""
    ### BEGIN SOLUTION
    kept = deltas

    return kept.sum(0)
    ### END SOLUTION


ties = checks.use("02.ties", ties)'''
STUDENT = '''def ties(deltas):
    """Merge."""
    # YOUR CODE HERE
    raise NotImplementedError()


ties = checks.use("02.ties", ties)'''


def notebook(*sources: str):
    cells = [
        new_markdown_cell("# T\n\n| **Time** | 5 minutes to learn, 40 s to run |", id="header")
    ]
    cells += [
        new_code_cell(
            text, id=f"code-{i}", execution_count=3, outputs=[new_output("stream", text="x")]
        )
        for i, text in enumerate(sources)
    ]
    return new_notebook(cells=cells)


def test_a_solution_becomes_a_line_to_replace():
    solved = notebook("x = 1", SOLVED)
    made = course.student(solved)
    assert [c.source for c in made.cells] == [solved.cells[0].source, "x = 1", STUDENT]
    assert [c.id for c in made.cells] == ["header", "code-0", "code-1"]
    assert all(c.outputs == [] and c.execution_count is None for c in made.cells[1:])
    assert "return kept" in solved.cells[2].source  # the solved one stays
    assert course.text_of(made) == course.text_of(course.student(solved))


def test_two_solutions_in_a_cell():
    text = "def f():\n    ### BEGIN SOLUTION\n    return 1\n    ### END SOLUTION\n"
    made = course.student(notebook(text + "\n" + text.replace("f()", "g()")))
    assert made.cells[1].source.count("raise NotImplementedError()") == 2
    assert "return" not in made.cells[1].source


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def f():\n    ### BEGIN SOLUTION\n    return 1", "in turn"),
        ("def f():\n    ### END SOLUTION", "in turn"),
        ("def f():\n    ### BEGIN SOLUTION\n    ### BEGIN SOLUTION", "in turn"),
        ("### BEGIN SOLUTION\nx = 1\n### END SOLUTION", "inside a function"),
    ],
)
def test_unpaired_markers_are_refused(text, words):
    with pytest.raises(InputError, match=words) as error:
        course.student(notebook(text))
    assert "cell code-0" in str(error.value)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "solved").mkdir()
    nbformat.write(notebook(SOLVED), tmp_path / "solved" / "02_x.ipynb")
    return tmp_path


def test_the_command_writes_and_checks(folder, capsys):
    arguments = ["--folder", str(folder)]
    assert course.main([*arguments, "--check"]) == 2  # nothing is written yet
    assert not (folder / "02_x.ipynb").exists()
    assert course.main(arguments) == 0
    made = (folder / "02_x.ipynb").read_text()
    assert made.endswith("}\n")
    assert course.main([*arguments, "--check"]) == 0
    (folder / "02_x.ipynb").write_text(made.replace("ties", "TIES", 1))
    assert course.main([*arguments, "--check"]) == 2
    assert "02_x.ipynb differs" in capsys.readouterr().err
    assert course.main(arguments) == 0
    assert (folder / "02_x.ipynb").read_text() == made
    (folder / "03_y.ipynb").write_text(made)
    assert course.main([*arguments, "--check"]) == 2
    assert "03_y.ipynb has no solved version" in capsys.readouterr().err


def test_the_command_without_words_writes(folder, monkeypatch):
    (folder / "notebooks").mkdir()
    shutil.move(folder / "solved", folder / "notebooks" / "solved")
    monkeypatch.chdir(folder)
    assert course.main([]) == 0
    assert (folder / "notebooks" / "02_x.ipynb").exists()


def test_a_handout_has_no_solutions_and_its_checks_work(folder, tmp_path, capsys):
    """Of a repository in small: a notebook, and an exercise whose answer must not be read by accident."""
    exercises = tmp_path / "rmm_lab" / "course" / "exercises"
    exercises.mkdir(parents=True)
    answer = (
        'from __future__ import annotations\nEXERCISES = {"é": "the answer ' + "x" * 300 + '"}\n'
    )
    (exercises / "nb02.py").write_text(answer, "utf-8")
    (exercises / "__init__.py").write_text('"""Exercises."""\n')
    (tmp_path / "README.md").write_text("# Kit\n")
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    shutil.move(folder / "solved", notebooks / "solved")
    out = tmp_path / "out"
    arguments = ["--folder", str(notebooks), "--handout", str(out)]
    assert course.main(arguments) == 2  # the students' notebooks are out of step
    assert course.main(arguments[:2]) == 0
    assert course.main(arguments) == 0
    files = sorted(str(f.relative_to(out)) for f in out.rglob("*") if f.is_file())
    package = "rmm_lab/course/exercises"
    assert files == [
        *("README.md", "notebooks/02_x.ipynb"),
        *(f"{package}/__init__.py", f"{package}/nb02.py"),
    ]
    packed = (out / package / "nb02.py").read_text()
    assert "the answer" not in packed
    space = {"__name__": "nb02"}
    exec(packed, space)
    assert space["EXERCISES"] == {"é": "the answer " + "x" * 300}
    assert course.main(arguments) == 2  # it exists
    assert course.main([*arguments[:3], str(notebooks / "inside")]) == 2
    assert "expected a new folder" in capsys.readouterr().err


def test_every_link_of_a_handout_leads_somewhere(tmp_path):
    """Of the real one: what students do not get, they are told of without a link."""
    course.hand_out(ROOT, tmp_path / "out")
    link, dead = re.compile(r"\]\((?!\w+:|#)([^)#]+)"), []
    pages = [*(tmp_path / "out").rglob("*.md"), *(tmp_path / "out").rglob("*.ipynb")]
    for page in pages:
        found = link.findall(page.read_text("utf-8"))
        dead += [(page.name, to) for to in found if not (page.parent / to).exists()]
    assert len(pages) > 20
    assert dead == []
    readme = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "docs/teaching (not handed out)" in readme
    assert "(notebooks/00_start_here.ipynb)" in readme


def test_bad_folders_are_refused(tmp_path, capsys):
    assert course.main(["--folder", str(tmp_path)]) == 2
    assert "expected solved notebooks, found none" in capsys.readouterr().err
    (tmp_path / "solved").mkdir()
    (tmp_path / "solved" / "a.ipynb").write_text("{")
    assert course.main(["--folder", str(tmp_path)]) == 2
    assert "expected a notebook, found a file that cannot be read" in capsys.readouterr().err


def test_a_run_is_held_to_its_stated_seconds():
    nb = notebook()
    assert course.stated_seconds(nb) == 40
    assert course.faults(nb, 159) == []
    (fault,) = course.faults(nb, 161)
    assert "took 161 s" in fault
    assert "at most 160 s" in fault
    nb.cells[0].source = "1 minute to learn, 2 s to run"
    assert course.faults(nb, 119) == []  # a short one has 120 s
    assert len(course.faults(nb, 121)) == 1
    nb.cells[0].source = "no time"
    with pytest.raises(InputError, match="s to run"):
        course.stated_seconds(nb)


HIDDEN = {"output_type": "error", "ename": "ValueError", "evalue": "hidden", "traceback": []}


def test_an_error_in_an_output_widget_is_seen():
    """In the widget state as nbclient stores it: the cell is green, a widget holds the error."""
    text = {"output_type": "stream", "name": "stdout", "text": "x"}
    for outputs, n in (([HIDDEN], 1), ([text], 0), ([], 0)):
        nb = notebook("out")
        models = {"a": {"state": {"outputs": outputs}}, "b": {"state": {"value": 1}}}
        mime = "application/vnd.jupyter.widget-state+json"
        nb.metadata["widgets"] = {mime: {"state": models}}
        found = course.faults(nb, 1)
        assert len(found) == n
        assert all("ValueError: hidden" in fault for fault in found)


@pytest.mark.slow
def test_nbmake_fails_where_a_widget_holds_an_error(tmp_path):
    """A run with the notebooks' own conftest.py, which gives the kernel no ports that another may take.

    The widget is made with its error: no cell enters it. A table is wider than a laptop's screen.
    """
    for name in ("notebooks/conftest.py", "tests/screen.py"):
        (tmp_path / name).parent.mkdir()
        shutil.copy(ROOT / name, tmp_path / name)
    ports = """
import json
from ipykernel.connect import get_connection_info
assert json.loads(get_connection_info())["transport"] == "ipc"
"""
    nb = notebook(f"import ipywidgets\nout = ipywidgets.Output(outputs=[{HIDDEN}]){ports}")
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "p", "language": "python"}
    nbformat.write(nb, tmp_path / "notebooks" / "bad.ipynb")
    nb.cells[
        1
    ].source = (
        "import pandas\npandas.DataFrame(0.5, index=[0], columns=[20 * c for c in 'abcdefgh'])"
    )
    nbformat.write(nb, tmp_path / "notebooks" / "wide.ipynb")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "--nbmake",
        str(tmp_path / "notebooks"),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=120
    )
    assert done.returncode == 1, done.stdout
    assert "bad.ipynb: an error inside an Output widget: ValueError: hidden" in done.stdout
    if screen.browser() is not None:
        assert re.search(r"wide.ipynb: cell 1: \d+ px of 934", done.stdout), done.stdout
    assert f"{1 + (screen.browser() is not None)} failed" in done.stdout
