"""A handout of two pages, A4, as PDF: the map of lesson 00, and operators with a glossary."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from rmm_lab.tasks.console import loaded, run_command

if __name__ == "__main__":  # here, so that Ctrl-C is a sentence while matplotlib is imported
    sys.exit(loaded("rmm_lab.course.handout:main")())

from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure

from rmm_lab.course.notebooks import read
from rmm_lab.errors import InputError

PAGE = (8.27, 11.69)  # inches, A4
OPERATORS = 6  # rows of docs/operators.md: the paper's and their relatives
MATCHED = (
    ("regmean", "least squares to the experts' answers on their own inputs, each layer alone"),
    ("least_squares", "the same layer by layer, on what the merged model feeds each layer"),
)
EQUATIONS = (
    (r"Eq. 6: $F_M = F_1^* \circ F_2^* \circ \dots \circ F_T^*$", "the path's layers, in order"),
    (r"Eq. 7: $R_\pi = \frac{1}{N} \sum_i R_{metric}(F_M(X_i), Y_i)$", "mean over tasks"),
    (
        r"Eq. 8: $\min(r A,\ clip(r, 1 - \varepsilon, 1 + \varepsilon)\, A)$",
        "PPO's clipped objective",
    ),
    (r"Eq. 9: $A_\pi(s, a) = R - V_\pi(s)$", "advantage; returns are normalised first"),
    (r"Eq. 10: $(1 - \lambda t / T_{max})\, R + \lambda t / T_{max}\, R_{previous}$", "DAR"),
)
GLOSSARY = {
    "base": "the model that all experts were fine-tuned from",
    "expert": "a copy of the base, fine-tuned on one task",
    "head": "the last step, features to classes; belongs to a task, is never merged",
    "stem": "all weights outside layers and heads; place −1",
    "task vector": "expert minus base",
    "operator": "a rule that merges one layer of all experts",
    "source": "an expert or an operator: what a layer is taken from",
    "path": "a source for each place; a file that builds a model",
    "merging map": "counts of choices, sources by layers: what the agent sees",
    "skip, back": "advance without a layer; return, to stack another one",
    "mask": "which actions are legal now",
    "reward": "mean over tasks of the metric, 0 to 1",
    "penalty": "−0.1, for illegal moves and for walks too long",
    "reward split": "pictures that a search may score paths on",
    "test split": "pictures that report, once, and choose nothing",
    "subset": "a part of the reward split that scores one episode",
    "advantage": "how much better than expected an action was",
    "entropy, KL": "how undecided a policy is; how far an update moved it",
    "DAR": "blends the previous episode's reward into this one",
    "calibration inputs": "a few inputs, without labels, that RegMean and least squares look at",
    "front": "models that no other one beats at all tasks",
    "hypervolume": "how much of the box of scores a front fills",
}


def rows(text: str, columns: int) -> list[list[str]]:
    """The cells of a Markdown table's body, for tables of so many columns."""
    lines = [line for line in text.split("\n") if re.match(r"\| .* \|$", line)]
    cells = [[c.strip() for c in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines]
    return [row for row in cells if len(row) == columns][1:]


def pages(repository: Path) -> list[Figure]:
    """The two pages, from notebooks/00_start_here.ipynb and docs/operators.md; InputError without them."""
    notebook = read(repository / "notebooks" / "00_start_here.ipynb")
    cells = {cell.id: cell.source for cell in notebook.cells}
    operators = repository / "docs" / "operators.md"
    if not operators.is_file() or not {"map-symbols", "map-equations"} <= set(cells):
        raise InputError(
            f"repository {repository}: expected lesson 00 with its map, and docs/operators.md, found others; "
            "restore them"
        )
    one, two = _page("The map", 1), _page("Operators and words", 2)
    y = _heading(one, 0.93, "Symbols (paper, shape, name in code)")
    for symbol, meaning, shape, code in rows(cells["map-symbols"], 4):
        y = _row(one, y, (0.07, symbol), (0.19, meaning), (0.55, shape), (0.74, code))
    y = _heading(one, y - 0.012, "Equations in code")
    for number, says, function, lessons in rows(cells["map-equations"], 4):
        function = function.partition("<br>")[0]  # its test comes after it
        lesson = ", ".join(re.findall(r"\[(\w+)\]", lessons))
        y = _row(one, y, (0.07, number), (0.14, says), (0.56, function), (0.90, lesson))
    y = _heading(two, 0.93, "Operators: base θ₀, task vector τᵢ = θᵢ − θ₀, scale s")
    known = rows(operators.read_text("utf-8"), 5)
    for name, formula, *_ in known[:OPERATORS]:
        y = _row(two, y, (0.07, name), (0.28, formula))
    for name, says in MATCHED:
        y = _row(two, y, (0.07, name), (0.28, says))
    y = _heading(two, y - 0.012, "Equations")
    for formula, says in EQUATIONS:
        y = _row(two, y - 0.004, (0.07, formula), (0.62, says))
    y = _heading(two, y - 0.012, "Words")
    for word, says in GLOSSARY.items():
        y = _row(two, y, (0.07, word), (0.28, says))
    return [one, two]


def _page(title: str, number: int) -> Figure:
    figure = Figure(figsize=PAGE)
    figure.text(0.07, 0.955, f"Merging models: {title}", fontsize=15, weight="bold")
    figure.text(0.93, 0.03, f"rmm_lab · page {number} of 2", fontsize=7, ha="right")
    return figure


def _heading(figure: Figure, y: float, text: str) -> float:
    figure.text(0.07, y, text, fontsize=11, weight="bold", va="top")
    return y - 0.025


def _row(figure: Figure, y: float, *cells: tuple[float, str]) -> float:
    """Draw texts at their x, wrapped before the next one; the y of the next row."""
    ends, most = [x for x, _ in cells[1:]] + [0.95], 1
    for (x, text), end in zip(cells, ends, strict=True):
        text = text.replace("`", "").replace("\\|", "|").replace("*shape", "∗shape")
        wrapped = text if "$" in text else fill(text, int((end - x) * 112))
        figure.text(x, y, wrapped, fontsize=8.5, va="top")
        most = max(most, wrapped.count("\n") + 1)
    return y - 0.0055 - 0.0135 * most


@dataclass
class Handout:
    """Write the two-page handout as PDF."""

    out: Path = Path("build/handout.pdf")
    """The file to write."""
    repository: Path = Path()
    """The folder with notebooks/ and docs/."""

    def run(self) -> None:
        """Draw both pages and write the file."""
        drawn: Sequence[Any] = pages(self.repository)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with PdfPages(self.out, metadata={"CreationDate": None, "Title": "Merging models"}) as pdf:
            for page in drawn:
                pdf.savefig(page)
        print(f"written: {self.out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0, or 2 for bad input."""
    return run_command(Handout, "python -m rmm_lab.course.handout", argv)
