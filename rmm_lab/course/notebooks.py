"""The course: student notebooks from the solved ones, and what every notebook is held to.

    python -m rmm_lab.course.notebooks            write notebooks/*.ipynb from notebooks/solved/*.ipynb
    python -m rmm_lab.course.notebooks --check    write nothing; exit code 1 where a file differs

A solved notebook is the only source. What stands between ``### BEGIN SOLUTION`` and ``### END SOLUTION``
(nbgrader's markers) becomes a line to be replaced. Cell ids stay, outputs are never kept.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmm_lab.errors import InputError, one_sentence
from rmm_lab.search import run_folder as runs

BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
STUB = ("# YOUR CODE HERE", "raise NotImplementedError()")  # as nbgrader writes it
SLACK, LEAST = 1.5, 30.0  # a notebook may take 1.5 times its stated seconds, and always 30 s


def read(file: Path) -> Any:
    """A notebook; InputError where there is none that can be read."""
    import nbformat

    try:
        return nbformat.read(file, as_version=4)
    except (OSError, ValueError) as error:
        raise InputError(
            f"notebook {file}: expected a notebook that can be read, found none ({error}); restore it"
        ) from error


def student(notebook: Any) -> Any:
    """The student's version of a solved notebook: solutions cut out, no outputs, the same cell ids.

    Raises InputError where a marker has no partner, or stands outside a function, where the line in its
    place would stop the notebook.
    """
    notebook = copy.deepcopy(notebook)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            cell.source = _cut(cell.source, cell.id)
    return notebook


def _cut(source: str, cell_id: str) -> str:
    lines: list[str] = []
    inside = False
    for line in source.split("\n"):
        if line.strip() in (BEGIN, END) and (line.strip() == BEGIN) == inside:
            raise InputError(f"cell {cell_id}: expected {BEGIN} and {END} in turn; pair them")
        if line.strip() == BEGIN:
            inside, indent = True, line[: len(line) - len(line.lstrip())]
            if not indent:
                raise InputError(
                    f"cell {cell_id}: expected {BEGIN} inside a function, found it at the left margin; "
                    "indent it"
                )
            lines += [indent + text for text in STUB]
        elif line.strip() == END:
            inside = False
        elif not inside:
            lines.append(line)
    if inside:
        raise InputError(f"cell {cell_id}: expected {END} after {BEGIN}, found none; add it")
    return "\n".join(lines)


def text_of(notebook: Any) -> str:
    """A notebook as the bytes of its file, the same for the same notebook."""
    import nbformat

    return nbformat.writes(notebook).rstrip("\n") + "\n"


def stated_seconds(notebook: Any) -> float:
    """The measured seconds to run that the header cell states, as in ``12 s to run``."""
    found = re.search(r"(\d+(?:\.\d+)?) s to run", notebook.cells[0].source)
    if not found:
        raise InputError('header cell: expected "... s to run", found no such words; add them')
    return float(found.group(1))


def faults(notebook: Any, seconds: float) -> list[str]:
    """What nbmake does not see in an executed notebook that took ``seconds`` of wall time.

    Errors inside an Output widget leave a notebook green; so does a widget that hangs until a
    timeout inside it ends.
    """
    out = []
    budget = max(LEAST, SLACK * stated_seconds(notebook))
    if seconds > budget:
        out.append(
            f"took {seconds:.0f} s of wall time, expected at most {budget:.0f} s; make it faster, or state "
            "the seconds that it needs in its header"
        )
    stored = notebook.metadata.get("widgets", {}).get(
        "application/vnd.jupyter.widget-state+json", {}
    )
    for model in stored.get("state", {}).values():
        for output in model.get("state", {}).get("outputs", []) or []:
            if output.get("output_type") == "error":
                out.append(
                    f"an error inside an Output widget: {output.get('ename')}: "
                    f"{output.get('evalue')}"
                )
    return out


@dataclass
class Course:
    """Write the student notebooks from the solved ones."""

    folder: Path = Path("notebooks")
    """The folder of the student notebooks; the solved ones are in solved/ below it."""
    check: bool = False
    """Write nothing; fail where a student notebook is not what its solved one gives."""

    def run(self) -> int:
        """Returns the exit code."""
        solved = sorted((self.folder / "solved").glob("*.ipynb"))
        if not solved:
            raise InputError(f"folder {self.folder}/solved: expected solved notebooks, found none")
        wanted = {self.folder / file.name: text_of(student(read(file))) for file in solved}
        present = set(self.folder.glob("*.ipynb"))
        stale = [
            f for f, text in wanted.items() if f not in present or f.read_text("utf-8") != text
        ]
        extra = sorted(present - set(wanted))
        if self.check:
            for file in stale:
                print(f"{file}: differs from what solved/{file.name} gives; run make student")
            for file in extra:
                print(f"{file}: has no solved version; write one, or delete it")
            return 1 if stale or extra else 0
        for file in stale:
            runs.write(file, wanted[file])
            print(f"written: {file}")
        return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0, 1 where a check fails, 2 for bad input."""
    import tyro

    try:
        args = None if argv is None else list(argv)
        return tyro.cli(Course, args=args, prog="python -m rmm_lab.course.notebooks").run()
    except (InputError, OSError) as error:
        print(f"error: {one_sentence(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
