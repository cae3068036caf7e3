"""Figures as bytes: on white for a file, and without a ground for a notebook's page, light or dark.

A picture does not know the theme of its page. So on a page all that is black, grey or white becomes the one
grey that stands out as far from white as from JupyterLab's dark ground. Heat maps and photographs keep their
white ground, and what is drawn on it.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import Collection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Annotation, Text
from PIL import Image

Rgba = tuple[float, float, float, float]
GREY = 0.475  # a contrast of 4.4 to white, and of 4.3 to #111111
INK: Rgba = (GREY, GREY, GREY, 1.0)
PALETTE = 64  # colours of a small picture


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file, the same for the same figure.

    Texts are drawn as they are: what is between two dollars of a name is no mathematics. A letter that the
    font lacks is a box.
    """
    data = io.BytesIO()
    with _drawing(figure, 150):  # not savefig, which draws everything twice
        FigureCanvasAgg(figure).print_png(data, metadata={"Software": None})
    return data.getvalue()


def page_png(figure: Figure) -> bytes:
    """``png`` without a ground, for a light page and a dark one. Changes the figure's greys."""
    without_ground(figure)
    return png(figure)


def page_webp(figure: Figure) -> bytes:
    """``page_png`` in a fifth of the bytes, for what is drawn often: WebP, 64 colours, at the size shown."""
    without_ground(figure)
    with _drawing(figure, 100):
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        picture = Image.fromarray(np.asarray(canvas.buffer_rgba()))
    few = picture.quantize(PALETTE, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    data = io.BytesIO()
    few.convert("RGBA").save(data, "webp", lossless=True, method=2)
    return data.getvalue()


@contextmanager
def _drawing(figure: Figure, dpi: float) -> Iterator[None]:
    """A resolution, and texts without mathematics, for as long as a figure is drawn."""
    before, figure.dpi = figure.dpi, dpi
    with rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        for artist in _seen(figure):
            if isinstance(artist, Text):
                artist.set_parse_math(False)
        try:
            yield
        finally:
            figure.dpi = before


def _seen(artist: Artist) -> Iterator[Artist]:
    """All that is drawn; ``findobj`` would make the ticks of hidden axes too, a third of a drawing's time."""
    if artist.get_visible():
        yield artist
        for child in artist.get_children():
            yield from _seen(child)


def ink(colour: Any) -> Rgba:
    """A grey as ink, the paler the more transparent, so that on white it looks as before; others stay.

    Greys darker than the ink are as dark as it is.
    """
    red, green, blue, alpha = to_rgba(colour)
    if not _is_grey(colour):
        return red, green, blue, alpha
    return GREY, GREY, GREY, alpha * min(1.0, (1 - red) / (1 - GREY))


def without_ground(figure: Figure) -> None:
    """Take a figure's ground away, and turn its greys into ``ink``; a second time changes nothing."""
    for artist in _parts(figure):
        if isinstance(artist, Text):
            _text(artist)
        elif isinstance(artist, Line2D):
            _line(artist)
        elif isinstance(artist, Patch):
            _patch(artist)
        elif isinstance(artist, Collection) and artist.get_array() is None:
            _collection(artist)


def _parts(artist: Artist) -> Iterator[Artist]:
    """All that is drawn on the page's ground, but ticks: of those there are many, and they are set here."""
    yield artist
    children: list[Artist]
    if isinstance(artist, Axis):
        children = [artist.label, artist.get_offset_text()]
    else:
        children = artist.get_children()
    if isinstance(artist, Axes):
        artist.tick_params(which="both", color=INK, labelcolor=INK)
        if artist.images:  # what is drawn on them has a ground, white
            drawn = (artist.patches, artist.lines, artist.collections, artist.texts)
            on_white: set[Artist] = {artist.patch}.union(*drawn)
            children = [child for child in children if child not in on_white]
    for child in children:
        yield from _parts(child)


def _is_grey(colour: Any) -> bool:
    rgb = to_rgba(colour)[:3]
    return max(rgb) - min(rgb) < 0.02


def _is_ground(colour: Any) -> bool:
    """Whether a black edge, hatch or text on this face is read against it, and not against the page."""
    return not _is_grey(colour) and to_rgba(colour)[3] > 0.8


def _text(text: Text) -> None:
    if isinstance(text, Annotation) and text.arrow_patch is not None:
        edge = text.arrow_patch.get_edgecolor()
        if _is_grey(edge):
            text.arrow_patch.set_color(ink(edge))  # its head too
    box = text.get_bbox_patch()
    if box is None or to_rgba(box.get_facecolor())[3] < 0.5:
        grey = _is_grey(text.get_color())
        text.set_color(INK if grey else text.get_color())  # never pale


def _line(line: Line2D) -> None:
    colours: tuple[Any, ...] = (
        line.get_color(),
        line.get_markerfacecolor(),
        line.get_markeredgecolor(),
    )
    own, face, edge = (to_rgba(c, line.get_alpha()) for c in colours)
    line.set_alpha(None)
    line.set_color(ink(own))
    if edge != (1, 1, 1, 1):  # a white rim is read on all grounds
        face, edge = ink(face), edge if _is_ground(face) else ink(edge)
    line.set_markerfacecolor(face)
    line.set_markeredgecolor(edge)


def _patch(patch: Patch) -> None:
    face, edge = to_rgba(patch.get_facecolor()), to_rgba(patch.get_edgecolor())
    if not _is_ground(face):
        patch.set_alpha(None)
        patch.set_facecolor(ink(face))
        patch.set_edgecolor(ink(edge))


def _collection(marks: Collection) -> None:
    faces, edges = (
        [to_rgba(c) for c in np.asarray(own)]
        for own in (marks.get_facecolor(), marks.get_edgecolor())
    )
    if not any(map(_is_ground, faces)):
        marks.set_alpha(None)
        marks.set_facecolor([ink(c) for c in faces] or "none")
        marks.set_edgecolor([ink(c) for c in edges] or "none")
