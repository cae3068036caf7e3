"""A widget that answers a preference: a point of a front, what it scores, its path, and its model to take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ipywidgets import Button, FloatSlider, HBox, Layout, VBox
from matplotlib.figure import Figure

from rmm_lab.course.views import View, status
from rmm_lab.errors import InputError, one_sentence
from rmm_lab.figures.paths import COLOURS, HATCHES, look_of, panels, tidy
from rmm_lab.reward import path_text
from rmm_lab.search.front import Front
from rmm_lab.search.front_measures import achievement, lattice

DIVISIONS = 5  # of a triangle's sides: 21 preferences
SHORT = 80  # characters of a path that are shown


class ParetoExplorer(View):
    """Say what matters, and see the model of a front that fits best.

    Two tasks: a slider between them. Three: a triangle of buttons, each corner a task alone. More: a slider
    for each task, of which only ratios count. A button exports the model that is shown.

    Args:
        front: of two tasks or more, whose points are compared by the reward split; scores shown are those of
            the test split where there are any.
        folder: where models are exported to, as ``point-NUMBER``.
    """

    steady = True

    def __init__(self, front: Front, folder: str | Path = "models") -> None:
        names = [n for n, on in zip(front.tasks, front.ends["reward"].counts, strict=True) if on]
        if len(names) < 2 or not front.points:
            raise InputError(
                f"front: expected a point or more and two tasks that count, found {len(front.points)} and "
                f"{', '.join(names) or 'none'}; see front.md"
            )
        self.front, self.folder, self.names = front, Path(folder).expanduser(), names
        self.weights = np.full(len(names), 1 / len(names))
        self.sliders: list[FloatSlider] = []
        self.buttons: dict[tuple[float, ...], Button] = {}
        self.export_button = Button(description="export this model", layout=Layout(width="auto"))
        self.export_button.on_click(lambda _: self.export())
        rows = [self._triangle()] if len(names) == 3 else self._sliders()
        super().__init__([*rows, self.export_button], self.sliders)

    def _sliders(self) -> list[FloatSlider]:
        two = len(self.names) == 2
        labels = [f"{self.names[0]} ↔ {self.names[1]}"] if two else self.names
        self.sliders = [
            FloatSlider(
                value=0.5 if two else 1.0,
                min=0,
                max=1,
                step=0.05,
                description=label,
                readout=not two,
                continuous_update=False,
                style={"description_width": "14em"},
                layout=Layout(width="36em", max_width="100%"),
            )
            for label in labels
        ]
        return self.sliders

    def _triangle(self) -> VBox:
        """Rows of buttons, from the first task's corner at the top to the others' at the bottom."""
        rows = []
        every = lattice(3, DIVISIONS)
        for k in range(DIVISIONS, -1, -1):
            row = [w for w in every if round(w[0] * DIVISIONS) == k]
            row.sort(key=lambda w: -w[1])
            rows.append(
                HBox([self._button(w) for w in row], layout=Layout(justify_content="center"))
            )
        return VBox(rows, layout=Layout(width="22em", max_width="100%"))

    def _button(self, weights: np.ndarray) -> Button:
        corner = weights.max() == 1
        name = self.names[int(weights.argmax())] if corner else "·"
        said = ", ".join(f"{n} {w:.0%}" for n, w in zip(self.names, weights, strict=True))
        button = Button(
            description=name, tooltip=said, layout=Layout(width="auto", min_width="2.6em")
        )
        button.on_click(lambda _: self.prefer(weights))
        self.buttons[tuple(weights.round(6).tolist())] = button
        return button

    # ------------------------------------------------------------------------------- what it does

    def prefer(self, weights: Sequence[float] | np.ndarray) -> None:
        """Show the point for weights of the tasks that count, (K,) >= 0, not all 0."""
        w = np.asarray(weights, float)
        w = w / w.sum()
        if not self.sliders:
            self.weights = w
            self.refresh()
            return
        values = [w[1]] if len(self.sliders) == 1 else w / w.max()
        for slider, value in zip(self.sliders, values, strict=True):
            slider.value = float(value)

    def refresh(self, change: Any = None) -> None:
        """Take the preference of the sliders, and draw."""
        if len(self.sliders) == 1:
            self.weights = np.array([1 - self.sliders[0].value, self.sliders[0].value])
        elif self.sliders:
            found = np.array([slider.value for slider in self.sliders])
            self.weights = (
                found / found.sum() if found.any() else np.full(len(found), 1 / len(found))
            )
        for weights, button in self.buttons.items():
            chosen = np.allclose(weights, self.weights, atol=1e-5)
            button.button_style = "primary" if chosen else ""
        super().refresh(change)

    @property
    def point(self) -> int:
        """The number of the point for the present preference, by the reward split."""
        return int(achievement(self.front.normalised(), self.weights)[0].argmax())

    def export(self) -> Path | None:
        """Write the model of the point into a new folder, and say where."""
        folder = self.folder / f"point-{self.point}"
        try:
            if folder.exists():
                raise InputError(f"export: expected a new folder, found {folder}; move it away")
            wanted = np.zeros(len(self.front.tasks))
            wanted[self.front.ends["reward"].counts] = self.weights
            self.front.export(self.point, folder, wanted.tolist())
        except InputError as error:
            self.status.value = status(f"error: {one_sentence(error)}")
            return None
        self.status.value = status(f"written: {folder}")
        return folder

    # -------------------------------------------------------------------------------- what is seen

    @property
    def split(self) -> str:
        """Whose scores are shown: the test split's where they are known and have a scale."""
        return self.front.scaled[-1]

    def sentence(self) -> str:
        """The preference, the point, its scores and its path."""
        i = self.point
        wanted = ", ".join(f"{n} {w:.0%}" for n, w in zip(self.names, self.weights, strict=True))
        scores = dict(zip(self.front.tasks, self.front.scores(self.split)[i], strict=True))
        found = ", ".join(f"{n} {100 * s:.1f} %" for n, s in scores.items())
        path = path_text(self.front.points[i].path.path)
        path = path if len(path) <= SHORT else f"{path[:SHORT].rsplit(' ', 1)[0]} …"
        return (
            f"Preference {wanted}: point {i} of {len(self.front.points)}, {self.split} split: {found}. "
            f"Path: {path}"
        )

    def still(self) -> tuple[Figure, str]:
        """The front with the point that fits, and its scores as bars."""
        i, points = self.point, self.front.normalised(self.split)
        figure, (left, right) = panels(2, 2, 4.2, 3.4)
        if len(self.names) == 2:
            order = np.argsort(points[:, 0])
            left.plot(*points[order].T, "o-", color="0.6", mec="black", ms=7, lw=1)
            left.plot(*points[i], "D", color=COLOURS[6], mec="black", ms=11)
            labels = [f"{n}: 0 base, 1 expert" for n in self.names]
            tidy(left, f"the front, {self.split} split", *labels)
        else:
            at = np.arange(len(self.names))
            for j, point in enumerate(points):
                look = {"color": COLOURS[6], "lw": 3, "marker": "D"} if j == i else {"color": "0.7"}
                left.plot(at, point, zorder=3 if j == i else 2, **look)
            tidy(left, f"the front, {self.split} split", "", "0 base, 1 expert")
            left.set_xticks(at, self.names, fontsize=8)
        y, height = np.arange(len(self.names)), 0.38
        bars: dict[str, Any] = {"height": height, "edgecolor": "black", "lw": 0.7}
        colours = [look_of(name, self.names)[0] for name in self.names]
        right.barh(y - height / 2, points[i], color=colours, **bars)
        right.barh(y + height / 2, self.weights, color="0.8", hatch=HATCHES[1], **bars)
        right.axvline(1, color="black", ls=":", lw=0.8)
        right.set_yticks(y, self.names, fontsize=8)
        right.invert_yaxis()
        right.set_xlim(min(0.0, float(points[i].min())), max(1.15, 1.05 * float(points[i].max())))
        tidy(right, f"point {i}; hatched: the preference", "0 base, 1 expert", "")
        return figure, self.sentence()
