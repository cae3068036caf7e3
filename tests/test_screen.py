"""What measures every executed notebook finds what does not fit, and nothing else."""

from __future__ import annotations

import pandas as pd
import pytest
import screen
from matplotlib.figure import Figure
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from rmm_lab.course.views import img

pytestmark = pytest.mark.slow


def page(*outputs: str, markdown: str = "some words"):
    """A notebook whose cells have these HTML outputs."""
    cells = [
        new_code_cell("1", outputs=[new_output("display_data", {"text/html": text})])
        for text in outputs
    ]
    return new_notebook(cells=[new_markdown_cell(markdown), *cells])


def table(columns: int, rows: int = 3) -> str:
    names = [f"column_{i:02d}_of_some" for i in range(columns)]
    return pd.DataFrame(0.25, index=range(rows), columns=names).to_html()


@pytest.fixture(scope="module")
def path():
    found = screen.browser()
    if found is None:
        pytest.skip("no browser found: what the notebooks show was NOT measured")
    return found


def test_what_fits_is_let_be(path):
    figure = Figure(figsize=(9.1, 1))
    assert (
        screen.overflow(
            page(table(5), img(figure, "a figure"), markdown="| a |\n|---|\n| b |"), path
        )
        == []
    )


def test_what_does_not_fit_is_named(path):
    wordy = pd.DataFrame({f"a column {i}": ["some words in a cell"] for i in range(9)}).to_html()
    with pd.option_context("display.max_columns", 4):
        cut = pd.DataFrame(0, index=[0], columns=range(9))._repr_html_()
    wide = f"| `{'x' * 90}` | `{'y' * 90}` |\n|---|---|\n| a | b |"
    figure = img(Figure(figsize=(9.6, 1)), "a figure")
    found = screen.overflow(page(table(9), wordy, cut, figure, markdown=wide), path)
    for cell, words in enumerate(
        ("px of 934", "px of 934", '" wraps', "leaves columns", "960px shrinks")
    ):
        assert any(text.startswith(f"cell {cell}: ") and words in text for text in found), (
            cell,
            found,
        )
