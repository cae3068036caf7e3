"""What all widgets and figures of the notebooks share: an alt sentence, and a picture without a kernel."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from IPython import display
from ipywidgets import HTML, VBox
from matplotlib.figure import Figure

from rmm_lab.figures.render import page_png, page_webp


def img(figure: Figure, alt: str, *, small: bool = False) -> str:
    """A figure as an HTML image; ``alt`` is one sentence that says what there is to see.

    ``small``: in few bytes, for what is drawn again and again. JupyterLab drops the alt text of image
    outputs, and keeps that of an ``<img>``.
    """
    if not alt.strip():
        raise ValueError("alt: expected a sentence that says what the figure shows, found none")
    kind, data = ("webp", page_webp(figure)) if small else ("png", page_png(figure))
    width = int(figure.get_figwidth() * 100)
    return (
        f'<img alt="{escape(alt, quote=True)}" style="max-width: 100%; width: {width}px" '
        f'src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'
    )


def status(sentence: str) -> str:
    """A line that screen readers speak when it changes."""
    return f'<div role="status" aria-live="polite">{escape(sentence)}</div>'


def show(figure: Figure, alt: str) -> None:
    """Display a figure under a notebook's cell, with its alt sentence."""
    display.display(display.HTML(img(figure, alt)))


def reveal(guess: Any, found: Any, unit: str = " %") -> None:
    """Print a guess beside what was measured, numbers or dicts of them; None where no guess was typed."""

    def words(value: Any) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{name} {words(own)}" for name, own in value.items())
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return "?" if value is None else f"{value:.3g}{unit}" if number else str(value)

    print(f"you guessed {words(guess)}; measured {words(found)}")


class View(VBox):
    """Base of the widgets: rows of controls, a line of ``status`` and a picture in ``place``.

    A subclass's ``still`` returns what there is to see now: a figure and a sentence. They replace the
    widget where no kernel runs; the sentence is also the picture's alt text. ``refresh`` runs at first and
    whenever one of the ``watched`` controls (by default the rows) changes.
    """

    steady = False  # whether what stands beside the axes always takes the same room

    def __init__(self, rows: Sequence[Any], watched: Sequence[Any] | None = None) -> None:
        self.status, self.place = HTML(), HTML()
        self._boxes: dict[Any, list[Any]] = {}  # of axes
        super().__init__([*rows, self.status, self.place])
        for control in rows if watched is None else watched:
            control.observe(self.refresh, "value")
        self.refresh()

    def still(self) -> tuple[Figure, str]:
        """The view's current figure, and a sentence that says what it shows."""
        raise NotImplementedError

    def refresh(self, change: Any = None) -> None:
        """Draw the current state; ``change`` is what ipywidgets passes to an observer."""
        self.draw()
        self.status.value = status(self.sentence())

    def sentence(self) -> str:
        """What the line of status says: by default that of the picture."""
        return self._alt

    def arranged(self, figure: Figure) -> Figure:
        """The figure with its axes where the first of its kind had them, if the view is ``steady``.

        To arrange them takes half of the time, and a picture that jumps is harder to compare.
        """
        if self.steady:
            names = [t.get_text() for a in figure.axes if a.images for t in a.get_yticklabels()]
            kind = (*figure.get_size_inches(), len(figure.axes), *names)
            if kind not in self._boxes:
                figure.draw_without_rendering()
                self._boxes[kind] = [axes.get_position() for axes in figure.axes]
            figure.set_layout_engine("none")
            for axes, box in zip(figure.axes, self._boxes[kind], strict=True):
                axes.set_position(box)
        return figure

    def draw(self) -> None:
        """Put the current ``still`` into its place."""
        figure, self._alt = self.still()
        self.place.value = img(self.arranged(figure), self._alt, small=True)

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        """The live widget, with a PNG and a sentence for where no kernel runs."""
        bundle = dict(super()._repr_mimebundle_(**kwargs))
        figure, sentence = self.still()
        bundle["image/png"] = base64.b64encode(page_png(figure)).decode()
        bundle["text/plain"] = sentence
        return bundle
