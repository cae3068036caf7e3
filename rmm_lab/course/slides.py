"""Slides from a solved lesson: its cells' tags by a rule, for ``jupyter nbconvert --to slides --execute``.

Headings start slides, prose after code a slide below; exercises and their answers, imports and "What to try"
are left out (they still run), and of long code only the output is shown.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmm_lab.tasks.console import loaded, run_command

if __name__ == "__main__":  # here, so that Ctrl-C is a sentence while nbformat is imported
    sys.exit(loaded("rmm_lab.course.slides:main")())

from rmm_lab.course.notebooks import read, text_of
from rmm_lab.errors import InputError
from rmm_lab.tasks.files import write_file

HIDE = "hide"  # tag of code whose input no slide shows
LONGEST = 10  # lines of code that a slide can hold
CUT = re.compile(r"^### Exercise |^## What to try", re.M)


def tagged(notebook: Any) -> Any:
    """A copy with ``slideshow.slide_type`` slide, subslide, - or skip, and HIDE on long code."""
    notebook, after_code, inside = copy.deepcopy(notebook), False, False
    for cell in notebook.cells:
        source = cell.source
        if cell.cell_type == "markdown":
            cell.source = CUT.split(source)[0].rstrip()
            kind = "subslide" if after_code else "-"
            if re.match(r"##? ", source):
                kind, inside = "slide", False
            if len(cell.source) < len(source):
                inside = True  # up to the next check
            elif inside:
                kind = "skip"
            kind = kind if cell.source else "skip"
            after_code = after_code and kind == "skip"
        else:
            kind = "-"
            if inside or cell.id == "setup" or "checks.use(" in source:
                kind, inside = "skip", inside and "checks.use(" not in source
            elif len(source.splitlines()) > LONGEST:
                cell.metadata["tags"] = [*cell.metadata.get("tags", []), HIDE]
            after_code = after_code or kind != "skip"
        cell.metadata["slideshow"] = {"slide_type": kind}
    return notebook


@dataclass
class Slides:
    """Write a solved lesson with tags for slides; make slides then runs and converts it."""

    lesson: str
    """The number or name of a lesson, such as 03."""
    out: Path = Path("build/slides")
    """The folder for the tagged notebook."""
    folder: Path = Path("notebooks/solved")
    """The folder of the solved lessons."""

    def run(self) -> None:
        """Write it as slides.ipynb; InputError unless one lesson has this number or name."""
        known = {file.stem: file for file in sorted(self.folder.glob("*.ipynb"))}
        files = [f for name, f in known.items() if self.lesson in (name, name.partition("_")[0])]
        if len(files) != 1:
            raise InputError(
                f"lesson: expected one of {', '.join(n.partition('_')[0] for n in known) or 'none'}, found "
                f"{self.lesson!r}; correct it"
            )
        self.out.mkdir(parents=True, exist_ok=True)
        file = self.out / files[0].name
        write_file(file, text_of(tagged(read(files[0]))))
        print(file)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0, or 2 for bad input."""
    return run_command(Slides, "python -m rmm_lab.course.slides", argv)
