"""Figures on a page: read on a light ground and on a dark one, where nothing is white but what means zero."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib.patches import Rectangle
from PIL import Image

from rmm_lab.figures import models, paths, render, results, searches
from rmm_lab.figures.episodes import score_bars
from rmm_lab.reward import Step

GROUNDS = {"light": (255, 255, 255), "dark": (17, 17, 17)}  # of JupyterLab's two themes


def pixels(data: bytes, ground: str = "") -> np.ndarray:
    """(H, W, 4) uint8; put on a ground, if one is named."""
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    if ground:
        page = Image.new("RGBA", picture.size, (*GROUNDS[ground], 255))
        page.alpha_composite(picture)
        picture = page
    return np.asarray(picture)


def luminance(rgb: np.ndarray) -> np.ndarray:
    """Relative luminance (WCAG 2.1) of (..., 3) in [0, 255]."""
    c = np.asarray(rgb, float) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ (
        0.2126,
        0.7152,
        0.0722,
    )


def contrast(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """WCAG's contrast ratio, 1 to 21."""
    high, low = np.maximum(luminance(a), luminance(b)), np.minimum(luminance(a), luminance(b))
    return (high + 0.05) / (low + 0.05)


def a_line():
    figure, (axes,) = paths.panels(1, 1, 4, 3)
    axes.plot([0, 1], [0, 1], color="black", lw=3)
    paths.tidy(axes, "a title", "x", "y")
    return figure


@pytest.mark.parametrize("draw", [render.page_png, render.page_webp])
@pytest.mark.parametrize("ground", GROUNDS)
def test_texts_axes_and_lines_are_read_on_both_grounds(draw, ground):
    seen = pixels(draw(a_line()), ground)[..., :3]
    page = np.array(GROUNDS[ground])
    assert (seen[0, 0] == page).all()  # no ground of its own
    h, w = seen.shape[:2]
    title, middle = seen[: h // 12], seen[h // 3 : h // 2, w // 3 : 2 * w // 3]
    for part in (title, middle, seen[h // 4 : 3 * h // 4, : w // 8]):  # title, line, the y axis
        assert contrast(part, page).max() > 4


@pytest.mark.parametrize("draw", [render.page_png, render.page_webp])
def test_zero_is_white_in_a_map_and_its_numbers_stay(draw):
    figure, (axes,) = paths.panels(1, 1, 4, 3)
    paths.draw_map(axes, np.array([[0.0, 2.0], [0.0, 0.0]]), ("a", "b"), 0)
    figure.draw_without_rendering()
    box = (
        axes.get_window_extent().bounds / np.array(figure.get_size_inches()).repeat(2)[[0, 2, 0, 2]]
    )
    seen = pixels(draw(figure))
    h, w = seen.shape[:2]
    left, bottom, width, height = np.array(box) / 100 * (w, h, w, h)
    y = round(h - bottom - height / 4)
    assert seen[y, round(left + width / 4)].min() >= 253  # b's count at layer 0
    taken = seen[round(h - bottom - 0.9 * height), round(left + 0.9 * width)]
    assert luminance(taken[:3]) < 0.1
    assert taken[3] == 255


def test_colours_stay_and_greys_keep_their_look_on_white():
    figure, (axes,) = paths.panels(1, 1, 4, 3)
    axes.add_patch(Rectangle((0, 0), 0.5, 1, color=paths.COLOURS[1], lw=0))
    axes.add_patch(Rectangle((0.5, 0), 0.5, 1, color="0.9", lw=0))
    axes.set_position((0, 0, 1, 1))
    figure.set_layout_engine("none")
    seen = pixels(render.page_png(figure), "light")
    h, w = seen.shape[:2]
    assert np.abs(seen[h // 2, w // 4, :3] - 255 * np.array(paths.COLOURS[1])).max() <= 1
    assert np.abs(seen[h // 2, 3 * w // 4, :3].astype(float) - 0.9 * 255).max() <= 2
    dark = pixels(render.page_png(figure), "dark")
    assert dark[h // 2, 3 * w // 4, :3].max() < 60  # no bright slab


def test_drawn_twice_a_figure_is_the_same_and_a_file_is_on_white():
    figure = a_line()
    on_white = pixels(render.png(figure))
    assert (on_white[0, 0] == 255).all()
    first = render.page_png(figure)
    assert render.page_png(figure) == first
    assert pixels(first)[0, 0, 3] == 0


def test_a_task_has_one_colour_in_all_figures():
    tasks = ("textures", "digits")
    wanted = {"digits": paths.COLOURS[1], "textures": paths.COLOURS[2]}
    x, scores = [0.0, 1.0], np.array([[0.1, 0.2], [0.3, 0.4]])
    sweep = models.sweep_picture({"s": (x, scores)}, tasks, "scale").axes[0]
    found = {line.get_label(): line.get_color() for line in sweep.lines[:2]}
    assert found == wanted
    bars = models.kept_picture(np.full((2, 3), 0.5), tasks, ["a", "b", "c"], 0.2).axes[0]
    faces = {c.get_label(): c.patches[0].get_facecolor()[:3] for c in bars.containers}
    assert faces.keys() == wanted.keys()
    for name, face in faces.items():
        assert face == pytest.approx(wanted[name])
    hills = results.hills_picture(scores, {0: scores, 1: scores}, tasks, "digits").axes[0]
    assert {line.get_label(): line.get_color() for line in hills.lines} == wanted
    axes = paths.panels(1, 1, 4, 3)[1][0]
    score_bars(axes, {"first": {"textures": 0.5, "digits": 0.25}})
    for bar, name in zip(axes.patches, tasks, strict=False):
        assert bar.get_facecolor()[:3] == pytest.approx(wanted[name])


def test_the_lowest_of_a_map_is_white():
    path = (Step("a", 0), Step("b", 1))
    image = (
        searches.one_place(np.array([[0.5, 0.7], [0.6, 0.5]]), path, ("a", "b")).axes[0].images[0]
    )
    assert image.to_rgba(50.0) == pytest.approx((1, 1, 1, 1))
    tokens = results.tokens_picture([["x", "y"]], np.array([[0.0, -2.0]]), 0, "t").axes[0]
    certain, doubtful = np.asarray(tokens.images[0].get_array())[0].tolist()
    assert certain == pytest.approx((1, 1, 1, 1), abs=0.01)
    assert luminance(255 * np.array(doubtful[:3])) < 0.3


def test_an_arrow_is_ink_too():
    figure, (axes,) = paths.panels(1, 1, 4, 3)
    axes.set_axis_off()
    axes.annotate("", (1, 0.5), (0, 0.5), arrowprops={"arrowstyle": "-|>", "lw": 6})
    dark = pixels(render.page_png(figure), "dark")[..., :3]
    assert contrast(dark, np.array(GROUNDS["dark"])).max() > 4
    assert luminance(dark).min() >= luminance(np.array(GROUNDS["dark"])) - 1e-6  # nothing is darker


@pytest.mark.parametrize("colours", [paths.AMOUNTS, paths.DIFFERENCES])
def test_zero_is_exactly_white(colours):
    assert colours(0.5) == (1, 1, 1, 1)
    assert colours(0.49) != (1, 1, 1, 1) != colours(0.51)
