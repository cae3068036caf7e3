"""What teachers build from the lessons: slides by a rule, and a handout of two pages."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from rmm_lab.course import handout, slides
from rmm_lab.course import notebooks as course

ROOT = Path(__file__).parent.parent


def lesson(*cells: str):
    """Cells, code where they start with >; their ids are a, b, c, ..."""
    made = nbformat.v4.new_notebook()
    for name, text in zip("abcdefghijkl", cells, strict=False):
        new = nbformat.v4.new_code_cell if text[0] == ">" else nbformat.v4.new_markdown_cell
        made.cells.append(new(text.lstrip(">"), id=name))
    return made


def test_each_cell_has_the_slide_that_the_rule_gives():
    made = slides.tagged(
        lesson(
            *("# Title", ">import x", "## Part", "More.", ">plot()", "We see."),
            *(
                "Now you.\n\n### Exercise 02.1 · f",
                ">def f():\n    ...",
                ">f = checks.use('02.1', f)",
            ),
            *(">" + "a = 1\n" * 11, "### Exercise 02.2", "## What we saw\n\n## What to try\n\n- x"),
        )
    )
    kinds = [cell.metadata["slideshow"]["slide_type"] for cell in made.cells]
    assert kinds == [
        *("slide", "-", "slide", "-", "-", "subslide"),
        *("-", "skip", "skip", "-", "skip", "slide"),
    ]
    assert [c.id for c in made.cells if slides.HIDE in c.metadata.get("tags", [])] == ["j"]
    assert made.cells[6].source == "Now you."
    assert made.cells[-1].source == "## What we saw"


@pytest.mark.parametrize("file", sorted((ROOT / "notebooks/solved").glob("*.ipynb")), ids=str)
def test_slides_show_no_solution_and_keep_all_code_to_run(file):
    before = course.read(file)
    made = slides.tagged(before)
    shown = [c for c in made.cells if c.metadata["slideshow"]["slide_type"] != "skip"]
    text = "\n".join(cell.source for cell in shown)
    assert course.BEGIN not in text
    assert "### Exercise" not in text
    assert "slideshow" not in before.cells[0].metadata, "the lesson itself is left alone"
    assert 2 <= sum(c.metadata["slideshow"]["slide_type"] == "slide" for c in shown) <= 15
    sources = [[c.source for c in nb.cells if c.cell_type == "code"] for nb in (before, made)]
    assert sources[0] == sources[1]


def test_the_command_writes_one_lesson_and_names_the_others(tmp_path, capsys):
    words = ["--folder", str(ROOT / "notebooks/solved"), "--out", str(tmp_path)]
    assert slides.main(["05b", *words]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "05b_probes.ipynb")
    assert slides.main(["5", *words]) == 2
    assert "expected one of 00, 01" in capsys.readouterr().err


def test_the_handout_has_every_symbol_and_equation_and_all_fits_on_two_pages():
    pages = handout.pages(ROOT)
    assert len(pages) == 2
    words = [[text.get_text() for text in page.texts] for page in pages]
    assert sum(bool(re.fullmatch(r"Eq\. \d+", word)) for word in words[0]) == 10
    assert {"$N$", "$s_t$", "$T_{max}$", "reward.reward"} <= set(words[0])
    assert {"ties", "least_squares", "reward split"} <= set(words[1])
    for page in pages:
        renderer = FigureCanvasAgg(page).get_renderer()
        boxes = [text.get_window_extent(renderer) for text in page.texts]
        assert min(min(b.x0, b.y0) for b in boxes) >= 0
        assert max(b.x1 for b in boxes) <= page.bbox.x1
        shared = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
        assert not [pair for pair in shared if min(p.height for p in pair) > 0 and _deep(*pair)]


def _deep(a, b) -> bool:
    """Whether two boxes share more than a line's leading."""
    return min(a.y1, b.y1) - max(a.y0, b.y0) > 4 and min(a.x1, b.x1) - max(a.x0, b.x0) > 2


def test_the_handout_is_a_pdf_and_needs_the_map(tmp_path, capsys):
    file = tmp_path / "new" / "handout.pdf"
    assert handout.main(["--out", str(file), "--repository", str(ROOT)]) == 0
    assert file.read_bytes().startswith(b"%PDF")
    assert handout.main(["--repository", str(tmp_path)]) == 2
    assert "expected a notebook" in capsys.readouterr().err


def test_the_guide_has_each_lesson_and_names_what_is_there():
    """Each section names cells and exercises of its own lesson, and has the four points."""
    text = (ROOT / "docs/teaching/guide.md").read_text("utf-8")
    sections = re.split(r"^## ", text, flags=re.M)[1:]
    files = sorted((ROOT / "notebooks/solved").glob("*.ipynb"))
    assert [s.split(" ")[0] for s in sections] == [f.stem.partition("_")[0] for f in files]
    for file, section in zip(files, sections, strict=True):
        notebook, number = course.read(file), file.stem.partition("_")[0]
        cells = {cell.id: cell.source for cell in notebook.cells}
        assert f"# {section.splitlines()[0]}" == notebook.cells[0].source.splitlines()[0]
        points = re.findall(r"^- \*\*(They \w+|\w+)\*\*", section, re.M)
        assert points == ["Ask", "They answer", "They stall", "Skip"], number
        assert set(re.findall(r"cell `([\w-]+)`", section)) <= set(cells), number
        for exercise in re.findall(r"`(\d\db?\.\w+)`", section):
            assert exercise.startswith(f"{number}."), exercise
            assert f'checks.use("{exercise}"' in "\n".join(cells.values()), exercise


@pytest.mark.parametrize("name", ["README", "guide"])
def test_the_links_of_the_teachers_pages_lead_to_files(name):
    file = ROOT / "docs" / "teaching" / f"{name}.md"
    for target in re.findall(r"\]\(([^)#]+)", file.read_text("utf-8")):
        assert (file.parent / target).is_file(), target
