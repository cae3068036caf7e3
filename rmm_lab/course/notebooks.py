"""Student notebooks from the solved ones, and the checks that every executed notebook must pass.

    python -m rmm_lab.course.notebooks            write notebooks/*.ipynb from notebooks/solved/*.ipynb
    python -m rmm_lab.course.notebooks --check    write nothing; fail if a file differs
    python -m rmm_lab.course.notebooks --handout FOLDER    the tree that students get, without solutions

The solved notebook is the only source. A line to replace takes the place of what is between
``### BEGIN SOLUTION`` and ``### END SOLUTION`` (nbgrader's markers). Cell ids stay, outputs go.
"""

from __future__ import annotations

import base64
import copy
import re
import shutil
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmm_lab.tasks.console import loaded, run_command

if __name__ == "__main__":  # here, so that Ctrl-C is a sentence while nbformat is imported
    sys.exit(loaded("rmm_lab.course.notebooks:main")())

import nbformat

from rmm_lab.errors import InputError
from rmm_lab.tasks.files import write_file

BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
STUB = ("# YOUR CODE HERE", "raise NotImplementedError()")  # as nbgrader writes it
HANDED = (  # what a student's tree has, if it is there
    *("README.md", "LICENSE", "CITATION.cff", "Makefile", "pyproject.toml", "constraints.txt"),
    *("environment.yml", "requirements.txt", "rmm_lab", "data", "docs", "notebooks", "results"),
)
KEPT_BACK = (".*", "__pycache__", "solved", "conftest.py", "teaching")
ALONE = ("beat_the_agent.ipynb",)  # without exercises, so without a solved version
SLACK, LEAST = 4.0, 120.0  # times its stated seconds, and seconds: what a busy machine may take


def read(file: Path) -> Any:
    """A notebook; InputError for a file that cannot be read as one."""
    try:
        return nbformat.read(file, as_version=4)
    except (OSError, ValueError) as error:
        raise InputError(
            f"notebook {file}: expected a notebook, found a file that cannot be read as one ({error}); "
            "restore it"
        ) from error


def student(notebook: Any) -> Any:
    """The student's version of a solved notebook: no solutions, no outputs, the same cell ids.

    Raises InputError for a marker without its partner, and for one outside a function, where the line
    that replaces it would stop the notebook.
    """
    notebook = copy.deepcopy(notebook)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            cell.source = _cut(cell.source, cell.id)
        else:  # one folder higher up
            cell.source = cell.source.replace("](../../", "](../")
    return notebook


def _cut(source: str, cell_id: str) -> str:
    block = rf"(?ms)^( +){BEGIN}\n.*?^ *{END}$"
    cut, n = re.subn(block, lambda m: "\n".join(m[1] + line for line in STUB), source)
    if not n == source.count(BEGIN) == source.count(END):
        raise InputError(
            f"cell {cell_id}: expected {BEGIN} and {END} in turn, inside a function, found others; pair "
            "and indent them"
        )
    return cut


def text_of(notebook: Any) -> str:
    """A notebook as the text of its file, the same for the same notebook."""
    return nbformat.writes(notebook).rstrip("\n") + "\n"


def stated_seconds(notebook: Any) -> float:
    """The measured seconds to run that the header cell states, as in ``12 s to run``."""
    found = re.search(r"(\d+(?:\.\d+)?) s to run", notebook.cells[0].source)
    if not found:
        raise InputError('header cell: expected "... s to run", found none; add it')
    return float(found.group(1))


def faults(notebook: Any, seconds: float) -> list[str]:
    """The faults that nbmake misses in an executed notebook that took ``seconds`` of wall time.

    An error inside an Output widget leaves a notebook green; so does a widget that hangs until a
    timeout inside it ends.
    """
    out = []
    budget = max(LEAST, SLACK * stated_seconds(notebook))
    if seconds > budget:
        out.append(
            f"took {seconds:.0f} s of wall time, expected at most {budget:.0f} s; make it faster, or "
            "correct the seconds in its header"
        )
    kind = "application/vnd.jupyter.widget-state+json"
    models = notebook.metadata.get("widgets", {}).get(kind, {}).get("state", {})
    for model in models.values():
        for output in model.get("state", {}).get("outputs", []) or []:
            if output.get("output_type") == "error":
                error = f"{output.get('ename')}: {output.get('evalue')}"
                out.append(f"an error inside an Output widget: {error}")
    return out


def hand_out(repository: Path, folder: Path) -> None:
    """Copy the repository to a new folder without solved notebooks and tests; exercises are packed.

    Packed ones work as before, and no answer is read by accident; who wants to can unpack them. InputError
    for a folder that exists, or lies inside what is copied.
    """
    inside = any(folder.resolve().is_relative_to((repository / name).resolve()) for name in HANDED)
    if folder.exists() or inside:
        found = "one inside what is copied" if inside else "one that exists"
        raise InputError(f"--handout {folder}: expected a new folder, found {found}; name another")
    for name in HANDED:
        if (repository / name).is_dir():
            ignore = shutil.ignore_patterns(*KEPT_BACK)
            shutil.copytree(repository / name, folder / name, ignore=ignore)
        elif (repository / name).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository / name, folder / name)
    _mark_dead_links(folder)
    for file in (folder / "rmm_lab" / "course" / "exercises").glob("nb*.py"):
        packed = base64.b85encode(zlib.compress(file.read_bytes(), 9)).decode()
        lines = "\n".join(f'    b"{packed[i : i + 100]}"' for i in range(0, len(packed), 100))
        file.write_text(
            '"""Exercises of a notebook, packed: try them before you look."""\n\n'
            f"import base64\nimport zlib\n\nDATA = (\n{lines}\n)\n"
            'exec(compile(zlib.decompress(base64.b85decode(DATA)), __name__, "exec"))\n',
            "utf-8",
        )


def _mark_dead_links(folder: Path) -> None:
    """In the READMEs and pages of a handout: what leads to a file that is not handed out is said to."""
    link = re.compile(r"(?<!!)\[([^\]]+)\]\((?!\w+:|#)([^)#]+)(?:#[^)]*)?\)")
    for file in folder.rglob("*.md"):

        def kept(found: re.Match[str], beside: Path = file.parent) -> str:
            there = (beside / found[2]).exists()
            return found[0] if there else f"{found[1]} (not handed out)"

        text = file.read_text("utf-8")
        if (said := link.sub(kept, text)) != text:
            file.write_text(said, "utf-8")


@dataclass
class Course:
    """Write the student notebooks from the solved ones, or a folder to hand out."""

    folder: Path = Path("notebooks")
    """The folder of the student notebooks; the solved ones are in solved/ below it."""
    check: bool = False
    """Write nothing; fail if a student notebook differs from what its solved one gives."""
    handout: Path | None = None
    """A new folder for what students get: this repository without solutions, answers of exercises packed."""

    def run(self) -> None:
        """Write or check all notebooks; InputError names the files that fail the check."""
        if self.handout is not None:
            Course(self.folder, check=True).run()
            hand_out(self.folder.resolve().parent, self.handout)
            print(f"written: {self.handout}")
            return
        solved = sorted((self.folder / "solved").glob("*.ipynb"))
        if not solved:
            raise InputError(f"folder {self.folder}/solved: expected solved notebooks, found none")
        wanted = {self.folder / file.name: text_of(student(read(file))) for file in solved}
        old = {f: f.read_text("utf-8") for f in self.folder.glob("*.ipynb")}
        stale = [file for file, text in wanted.items() if old.get(file) != text]
        if not self.check:
            for file in stale:
                write_file(file, wanted[file])
                print(f"written: {file}")
            return
        notes = [f"{file} differs from what solved/{file.name} gives" for file in stale]
        alone = {self.folder / name for name in ALONE}
        more = sorted(old.keys() - wanted.keys() - alone)
        notes += [f"{file} has no solved version" for file in more]
        if notes:
            raise InputError(f"student notebooks: {'; '.join(notes)}; run make student")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0, or 2 for bad input and where a check fails."""
    return run_command(Course, "python -m rmm_lab.course.notebooks", argv)
