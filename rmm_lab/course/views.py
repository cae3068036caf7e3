"""What all widgets and figures of the notebooks share: an alt sentence, and a picture without a kernel."""

from __future__ import annotations

import base64
from html import escape
from typing import Any

from ipywidgets import HTML, VBox
from matplotlib.figure import Figure

from rmm_lab.figures.paths import png


def img(figure: Figure, alt: str) -> str:
    """A figure as an HTML image; ``alt`` is one sentence that says what there is to see.

    JupyterLab drops the alt text of image outputs, and keeps that of an ``<img>``.
    """
    if not alt.strip():
        raise ValueError("alt: expected a sentence that says what the figure shows, found none")
    data = base64.b64encode(png(figure)).decode()
    width = int(figure.get_figwidth() * 100)
    return (
        f'<img alt="{escape(alt, quote=True)}" style="max-width: 100%; width: {width}px" '
        f'src="data:image/png;base64,{data}">'
    )


def status(sentence: str) -> str:
    """A line that screen readers speak when it changes."""
    return f'<div role="status" aria-live="polite">{escape(sentence)}</div>'


def show(figure: Figure, alt: str) -> None:
    """Display a figure under a notebook's cell, with its alt sentence."""
    from IPython import display

    display.display(display.HTML(img(figure, alt)))


class View(VBox):
    """Base of the widgets: a column of controls and pictures over an object that does the work.

    A subclass builds ``children``, and ``still`` returns what there is to see now: a figure and a
    sentence. They replace the widget where no kernel runs; the sentence is also the picture's alt text.
    """

    def still(self) -> tuple[Figure, str]:
        """The view's current figure, and a sentence that says what it shows."""
        raise NotImplementedError

    def picture(self) -> HTML:
        """An empty place for a picture; ``draw`` fills it."""
        return HTML()

    def draw(self, place: HTML) -> str:
        """Put the current ``still`` into a place; returns its sentence."""
        figure, sentence = self.still()
        place.value = img(figure, sentence)
        return sentence

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        """The live widget, with a PNG and a sentence for where no kernel runs."""
        bundle = dict(super()._repr_mimebundle_(**kwargs))
        figure, sentence = self.still()
        bundle["image/png"] = base64.b64encode(png(figure)).decode()
        bundle["text/plain"] = sentence
        return bundle
