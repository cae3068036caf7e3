"""Widgets that explain a formula, each a thin view over the function above it."""

from __future__ import annotations

from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
from ipywidgets import Dropdown, FloatSlider, Layout
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

from rmm_lab import operators
from rmm_lab.course.views import View
from rmm_lab.errors import InputError
from rmm_lab.figures.paths import (
    COLOURS,
    COUNTS,
    DIFFERENCES,
    HATCHES,
    MIDDLE,
    OWN_COLOURS,
    heat_map,
    panels,
    place_name,
)
from rmm_lab.ppo import clipped_objective
from rmm_lab.search.problem import Problem


def _look(description: str) -> dict[str, Any]:
    layout = Layout(width="36em", max_width="100%")
    return {"description": description, "style": {"description_width": "12em"}, "layout": layout}


def _slider(description: str, value: float, low: float, high: float, step: float) -> FloatSlider:
    # A picture can take longer than 0.15 s, so it is drawn once, when the slider is released.
    options = {"value": value, "min": low, "max": high, "step": step, "readout_format": ".2f"}
    return FloatSlider(continuous_update=False, **options, **_look(description))


# Two experts, and a third if asked for. Places 1 and 3: agreement. 2: a conflict. 4: a tie of signs,
# which the third expert breaks. 6: the smaller value wins, because its expert is small elsewhere too.
DELTAS = (
    (0.9, 0.7, -0.6, 0.8, -0.1, 0.45, 0.1, -0.3, 0.05, 0.6, -0.2, -0.2),
    (1.0, -0.6, -0.8, -0.8, 0.2, -0.49, -0.9, 0.1, 0.1, -0.4, 1.1, -0.3),
    (-0.7, 0.9, -0.5, 0.6, 0.1, -0.2, 0.8, -0.1, 0.3, 0.05, 1.0, -0.15),
)


class TiesStages(NamedTuple):
    """The intermediate results of TIES, for N experts' task vectors of n entries."""

    trimmed: Tensor  # (N, n), 0 where an entry was removed
    sign: Tensor  # (n,) in {-1, 0, 1}
    agreeing: Tensor  # (N, n) bool: kept, and of the elected sign
    merged: Tensor  # (n,) mean of the agreeing entries
    scaled: Tensor  # (n,) scale * merged, what is added to the base


def ties_stages(deltas: Tensor, density: float, scale: float) -> TiesStages:
    """The stages of TIES one by one (Yadav et al. 2023, Alg. 1), with the functions of ``operators``.

    deltas: (N, n) task vectors; density: kept fraction in (0, 1]; scale: lambda, finite. For these
    deltas ``operators.ties`` returns ``base + stages.scaled``. Raises InputError as the operators do.
    """
    trimmed = operators.trim(deltas, density)  # (N, n)
    sign = operators.elect_sign(trimmed)  # (N, n) -> (n,)
    merged = operators.disjoint_merge(trimmed, sign)  # (N, n) -> (n,)
    return TiesStages(trimmed, sign, trimmed * sign > 0, merged, scale * merged)


class TiesExplorer(View):
    """TIES on a few numbers: (N, n) task vectors; by default twelve each of two or three experts."""

    steady = True

    def __init__(self, deltas: Tensor | None = None) -> None:
        self._frame: tuple[int, Figure] | None = None  # for so many experts
        self.deltas = torch.from_numpy(np.array(DELTAS)) if deltas is None else deltas.detach()
        shape = tuple(self.deltas.shape)
        if len(shape) != 2 or not 2 <= shape[0] <= 7 or not 1 <= shape[1] <= 24:
            raise InputError(
                f"deltas: expected 2 to 7 experts by 1 to 24 numbers, found shape {shape}; take a part"
            )
        count = 2 if deltas is None else shape[0]
        self.density = _slider("density (share kept)", 0.5, 0.1, 1, 0.05)
        self.scale = _slider("scale λ", 1, 0, 2, 0.05)
        self.experts = Dropdown(options=range(2, shape[0] + 1), value=count, **_look("experts"))
        super().__init__((self.density, self.scale, self.experts))

    def still(self) -> tuple[Figure, str]:
        """The stages as bars; how many entries were kept, where experts disagree, what a mean does."""
        deltas, density = self.deltas[: self.experts.value], self.density.value
        s = ties_stages(deltas, density, self.scale.value)
        mean, size = deltas.mean(0), deltas.abs().mean(0)  # (N, n) -> (n,)
        conflict = (s.trimmed > 0).any(0) & (s.trimmed < 0).any(0)  # (N, n) -> (n,)
        tied = int((conflict & (s.sign == 0)).sum())
        ties = f", and at {tied} of them neither sign wins" if tied else ""
        cancelled = float((size - mean.abs()).sum() / size.sum().clamp(min=1e-30))
        # The example: the place, among those that TIES fills, where the mean loses the largest share
        worst = int(((1 - (mean.abs() / size).nan_to_num(1.0)) * (s.sign != 0)).argmax())
        sentence = (
            f"Density {density:.2f} keeps {int((s.trimmed != 0).sum())} of {deltas.numel()} entries. "
            f"Kept entries disagree in sign at {int(conflict.sum())} of {len(mean)} places"
            f"{ties}. {int(s.agreeing.sum())} entries have the elected sign and are averaged, then "
            f"multiplied by λ = {self.scale.value:.2f}. Plain averaging of all entries cancels "
            f"{cancelled:.0%} of their magnitude: at place {worst + 1} it gives {mean[worst]:.2f}, "
            f"the disjoint mean {s.merged[worst]:.2f}."
        )
        return self._figure(deltas, s), sentence

    def _figure(self, deltas: Tensor, s: TiesStages) -> Figure:
        """The stages as bars, on the frame of before: only what the sliders change is drawn anew."""
        count, n = deltas.shape
        if self._frame is None or self._frame[0] != count:
            self._frame = count, _ties_frame(deltas)
        figure = self._frame[1]
        _, kept, sign, merged, scaled = figure.axes
        for artist in (*kept.patches, *kept.lines[1:], *sign.texts):
            artist.remove()
        entries, trimmed, agreeing = deltas.numpy(), s.trimmed.numpy(), s.agreeing.numpy()
        x = np.arange(1, n + 1)
        for i in range(count):
            at, width, look = _bars(i, count, x)
            left = trimmed[i] != 0
            kept.bar(at[left], trimmed[i][left], width, **look)
            kept.bar(at[~left], entries[i][~left], width, **REMOVED)
            out = left & ~agreeing[i]
            kept.plot(at[out], trimmed[i][out] / 2, **OUT)
        for place, value in enumerate(s.sign.int().tolist(), 1):
            sign.text(place, 0, "0+−"[value], fontsize=11, weight="bold", **MIDDLE)
        for axes, heights in ((merged, s.merged), (scaled, s.scaled)):
            for bar, height in zip(axes.containers[0], heights.tolist(), strict=True):
                bar.set_height(height)
        title = f"2  trimmed: each expert's largest, density {self.density.value:.2f}"
        kept.set_title(title, **TITLE)
        title = (
            f"5  scaled by λ = {self.scale.value:.2f}, to be added to the base; beside the average"
        )
        scaled.set_title(title, **TITLE)
        return figure


# With a y of its own a title is not placed anew, around all that could be in its way, at each drawing.
TITLE: dict[str, Any] = {"fontsize": 9, "loc": "left", "pad": 3, "y": 1.0}
RIM: dict[str, Any] = {"edgecolor": "black", "lw": 0.7}
REMOVED: dict[str, Any] = {"fill": False, "ls": ":", **RIM}
OUT: dict[str, Any] = {"ls": "none", "marker": "X", "color": "black", "mec": "white", "ms": 8}
TIES_BAR: dict[str, Any] = {"facecolor": COLOURS[OWN_COLOURS["ties"]], "hatch": "...", **RIM}
AVERAGE: dict[str, Any] = {"ls": "none", "marker": "D", "color": COLOURS[OWN_COLOURS["average"]]}


def _bars(i: int, count: int, x: np.ndarray) -> tuple[np.ndarray, float, dict[str, Any]]:
    """Where the bars of expert i stand, (n,), how wide they are, and their look."""
    at = x + (2 * i - count + 1) * 0.42 / count
    return at, 0.84 / count, {"color": COLOURS[1 + i], "hatch": HATCHES[i], **RIM}


def _ties_frame(deltas: Tensor) -> Figure:
    """What no slider of the TiesExplorer changes: axes, titles, legends, task vectors and their mean."""
    count, n = deltas.shape
    x = np.arange(1, n + 1)
    figure = Figure(figsize=(max(7.8, 0.5 * n + 2), 4.2), layout="constrained")
    rows = figure.subplots(5, 1, sharex=True, height_ratios=[1, 1, 0.3, 0.85, 1])
    raw, kept, sign, merged, scaled = rows
    high = 1.1 * float(deltas.abs().max()) or 1.0
    for axes, reach, title in (
        (raw, high, "1  task vectors"),
        (kept, high, ""),
        (sign, 1, "3  elected sign: of the sum of what is left"),
        (merged, high, "4  disjoint mean: of the entries that have this sign"),
        (scaled, 2 * high, ""),
    ):
        axes.set_title(title, **TITLE)
        axes.yaxis.set_label_coords(-0.1, 0.5)  # there is none to find a place for
        axes.tick_params(labelsize=8)
        axes.xaxis.set_visible(axes is scaled)
        axes.set_ylim(-reach, reach)
        axes.axhline(0, color="black", lw=0.0 if axes is sign else 0.7)
    sign.yaxis.set_visible(False)
    scaled.set(xticks=x, xlabel="place in the weight", xlim=(0.3, n + 0.7))
    for i in range(count):
        at, width, look = _bars(i, count, x)
        raw.bar(at, deltas[i].numpy(), width, label=f"expert {i + 1}", **look)
    merged.bar(x, 0, 0.6, color="0.75", **RIM)
    scaled.bar(x, 0, 0.6, **TIES_BAR)
    scaled.plot(x, deltas.mean(0).numpy(), mec="black", **AVERAGE)
    right_of = {"fontsize": 8, "loc": "upper left", "bbox_to_anchor": (1, 1)}
    raw.legend(**right_of)
    marks = [Patch(**REMOVED, label="removed"), Line2D([], [], **OUT, label="kept, not merged")]
    kept.legend(handles=marks, **right_of)
    marks = [Patch(**TIES_BAR, label="TIES"), Line2D([], [], **AVERAGE, label="plain average")]
    scaled.legend(handles=marks, **right_of)
    return figure


def clip_curve(ratio: Tensor, advantage: float, epsilon: float) -> tuple[Tensor, Tensor]:
    """The clipped objective of Eq. 8 for single actions, and its gradient, computed by ``ppo``.

    ratio: (n,) new over old probability, at least 0; epsilon: above 0.
    Returns the objective (n,), to be maximised, and its derivative by the ratio (n,); exactly at
    1 ± epsilon autograd returns a value between those of both sides.
    """
    ratio = ratio.detach().requires_grad_()
    adv = torch.tensor(advantage, dtype=ratio.dtype)
    # One at a time: the agent's objective is a mean over its batch.
    value = torch.stack([clipped_objective(r, adv, epsilon) for r in ratio])  # (n,)
    (gradient,) = torch.autograd.grad(value.sum(), ratio)  # (n,)
    return value.detach(), gradient


class ClipExplorer(View):
    """PPO's clipped objective for one action, and which way its gradient moves the policy (Eq. 8)."""

    steady = True

    def __init__(self) -> None:
        self.ratio = _slider("ratio π / π_old", 1.3, 0, 2.5, 0.05)
        self.advantage = _slider("advantage A", 1, -2, 2, 0.1)
        self.epsilon = _slider("epsilon ε", 0.2, 0.05, 0.5, 0.05)
        super().__init__((self.ratio, self.advantage, self.epsilon))

    def still(self) -> tuple[Figure, str]:
        """Both terms, their minimum and the gradient over the ratio; what the current point means."""
        r, a, eps = self.ratio.value, self.advantage.value, self.epsilon.value
        near = r + 1e-6 * (1 - r)  # a border is a kink of the curve: count it as inside
        value, gradient = (float(v) for v in clip_curve(torch.tensor([near]).double(), a, eps))
        where = f"between 1 - ε = {1 - eps:.2f} and 1 + ε = {1 + eps:.2f}"
        if outside := abs(near - 1) > eps:
            where = f"above 1 + ε = {1 + eps:.2f}" if r > 1 else f"below 1 - ε = {1 - eps:.2f}"
        kind = "positive" if a > 0 else "negative" if a < 0 else "zero"
        if a == 0:
            effect = "0, because the action was neither better nor worse than expected."
        elif gradient == 0:
            effect = "0, so this step no longer moves the policy."
        else:
            way = "more" if a > 0 else "less"
            effect = f"{gradient:.2f}, so this step makes the action {way} probable."
            if outside:
                effect += " The clip does not stop it, because it leads back to the old policy."
            elif abs(near - 1) > eps - 1e-5 and a * (r - 1) > 0:
                effect += " Beyond this border the gradient is 0."
        sentence = f"The ratio {r:.2f} is {where} and the advantage is {kind} ({a:.2f}): "
        sentence += f"the gradient is {effect}"
        return self._figure(r, a, eps, value, gradient), sentence

    def _figure(self, r: float, a: float, eps: float, value: float, gradient: float) -> Figure:
        grid = torch.linspace(0.005, 2.495, 250, dtype=torch.float64)  # never a border itself
        values, gradients = clip_curve(grid, a, eps)
        figure, (left, right) = panels(2, 2, 4.25, 3.8)
        left.plot(grid, values, color=COLOURS[5], lw=5, alpha=0.5, label="J: the smaller of both")
        left.plot(grid, grid * a, "--", color="black", lw=1.2, label="ratio · A")
        clipped = grid.clamp(1 - eps, 1 + eps) * a
        left.plot(grid, clipped, ":", color=COLOURS[6], lw=2, label="clip(ratio) · A")
        # Each flat piece by itself: between them the gradient jumps.
        for piece in np.split(np.arange(len(grid)), np.flatnonzero(np.diff(gradients)) + 1):
            right.plot(grid[piece], gradients[piece], color=COLOURS[5], lw=3)
        left.set(ylim=(-5.3, 5.3), title="objective of this action")
        right.set(ylim=(-2.3, 2.3), title="its gradient by the ratio")
        for axes, y in ((left, value), (right, gradient)):
            axes.plot(r, y, "o", color=COLOURS[1], mec="black", ms=9, label=f"now: {y:.2f}")
            axes.axvspan(1 - eps, 1 + eps, color="0.9", zorder=0, label="1 - ε to 1 + ε")
            axes.axhline(0, color="black", lw=0.6)
            axes.set_xlabel("ratio π / π_old")
            axes.legend(fontsize=9, loc="upper right" if a < 0 else "lower right")
        return figure


def dar_weights(t: int, t_max: int, dar_lambda: float, n_back: int) -> np.ndarray:
    """How much each episode's reward counts in the DAR reward of episode t: Eq. 10 unrolled.

    Within a window each episode is blended with the one before, the first one is not (``env.dar``): with
    ``a_s = dar_lambda * s / t_max`` the weights are ``1 - a_t``, ``a_t (1 - a_{t-1})``, ..., and at the end
    the product of all ``a``.
    t: episode, from 0 to t_max; dar_lambda: in [0, 1]; n_back: episodes since the window began.
    Returns (n_back + 1,), of episodes t, t-1, ..., t-n_back; they sum to 1.
    """
    a = dar_lambda * np.arange(t, t - n_back, -1) / t_max  # (n_back,) of episodes t, t-1, ...
    reaches = np.concatenate([[1.0], np.cumprod(a)])  # (n_back + 1,) share passed on to each
    return reaches * np.append(1 - a, 1.0)


class DarExplorer(View):
    """Which episodes' rewards the DAR reward averages, and how many in effect (Eq. 10).

    t_max: all episodes of the agent. The episode shown is the last of its window.
    """

    def __init__(self, t_max: int = 700) -> None:
        self.t_max = t_max
        self.dar_lambda = _slider("λ", 0.8, 0, 1, 0.05)
        self.time = _slider("time t / T_max", 0.5, 0, 1, 0.05)
        shares = {"100 % (window of 1 episode)": 1, "10 % (of 10)": 10, "1 % (of 100)": 100}
        self.window = Dropdown(options=shares.items(), value=10, **_look("data per episode"))
        super().__init__((self.dar_lambda, self.time, self.window))

    def still(self) -> tuple[Figure, str]:
        """The weights as bars, the plain mean as a line; how many episodes are averaged in effect."""
        now = min(round(self.time.value * self.t_max), self.t_max - 1)
        start = now - now % self.window.value
        t = min(start + self.window.value, self.t_max) - 1  # the search may end within a window
        w = dar_weights(t, self.t_max, self.dar_lambda.value, t - start)
        n = 1 / float((w**2).sum())
        sentence = f"Episode {t + 1} of {self.t_max}, the last of its window of {len(w)}: "
        if w[0] == 1:
            why = "the window has no other episode" if len(w) == 1 else "λ is 0"
            sentence += f"its reward counts alone, because {why}."
        else:
            sentence += (
                f"its reward weighs {100 * w[0]:.3g} %, those of earlier models in the window "
                f"{100 - 100 * w[0]:.3g} %. Effective number of episodes averaged: {n:.1f}, so that "
                f"independent noise of equal size falls to {n**-0.5:.0%}."
            )
        # Weights fall off fast: draw the bars that hold all but a thousandth of them, ten at least.
        shown = min(len(w), max(10, int(np.searchsorted(np.cumsum(w), 0.999)) + 1))
        figure, (axes,) = panels(1, 1, 7.5, 3.4)
        back, high = range(shown), 1.25 * max(w.max(), 1 / len(w))
        axes.bar(back, w[:shown], color=COLOURS[5], edgecolor="black", lw=0.5, label="DAR")
        mean = f"plain mean of the window, 1/{len(w)}"
        axes.axhline(1 / len(w), ls="--", color=COLOURS[6], label=mean)
        for i in back if shown <= 12 else ():
            text = f"{w[i]:.2f}" if w[i] >= 0.005 or w[i] == 0 else "<.01"
            axes.text(i, w[i] + 0.02 * high, text, ha="center", fontsize=9)
        rest = f"; {len(w) - shown} more weigh {w[shown:].sum():.1g}" if shown < len(w) else ""
        axes.set(xlim=(-0.7, max(shown, 10) - 0.3), ylim=(0, high), ylabel="weight of its reward")
        axes.set_xlabel(f"episodes before episode {t + 1}{rest}")
        axes.legend(fontsize=9, loc="upper right")
        return figure, sentence


QUANTITIES = {  # key -> name, and what to compare a number with
    "length": ("length of the task vector", "At 1 it would be as long as the base's weights."),
    "cosine": ("cosine between experts' task vectors", "1: same direction, 0: a right angle."),
    "signs": ("share of entries whose signs disagree", "Half would be chance."),
}


def distances(problem: Problem) -> dict[str, np.ndarray]:
    """How far experts moved from the base, and how similarly, in the stem and in each layer.

    The first of L + 1 rows is the stem; pairs are in the order of ``itertools.combinations``.
    ``length`` (L + 1, N): ``|delta_i| / |theta_base|``; ``cosine`` (L + 1, N (N-1) / 2) of a pair's
    task vectors; ``signs``, same shape: share of entries with one delta above 0, the other below.
    NaN where a norm to divide by is 0. Task vectors: Ilharco et al. 2022; signs: Yadav et al. 2023.
    """
    pool = problem.pool
    rows: dict[str, list[Tensor]] = {key: [] for key in QUANTITIES}
    i, j = torch.combinations(torch.arange(pool.n_models)).T  # (N (N-1) / 2,) each
    for k in range(-1, pool.n_layers):
        layers = [pool.weights(source, k) for source in ("base", *pool.names)]
        # By name, in the base's order and double precision: (N + 1, D)
        flat = torch.stack(
            [torch.cat([w[n].double().flatten() for n in layers[0]]) for w in layers]
        )
        deltas = operators.task_vectors(flat[0], flat[1:])  # (N, D)
        norm, size = deltas.norm(dim=1), flat[0].norm()  # (N,), scalar
        rows["length"].append(torch.where(size > 0, norm / size, torch.nan))
        rows["cosine"].append((deltas @ deltas.T)[i, j] / (norm[i] * norm[j]))  # 0 / 0 is NaN
        rows["signs"].append((deltas[i] * deltas[j] < 0).double().mean(dim=1))
    return {key: torch.stack(values).numpy() for key, values in rows.items()}


class DistanceMap(View):
    """A heat map of ``distances``: a column per layer, a row per expert or pair of experts."""

    def __init__(self, problem: Problem) -> None:
        self.values, pool = distances(problem), problem.pool
        self.pairs = [f"{a} – {b}" for a, b in combinations(pool.names, 2)]
        self.names, self.unit = list(pool.names), "layer" if pool.unit == "block" else "sublayer"
        names = [place_name(k, pool.stacks) for k in range(-1, pool.n_layers)]
        self.places = [name.removeprefix("layer ") for name in names]
        options = [(name, key) for key, (name, _) in QUANTITIES.items()]
        self.quantity = Dropdown(options=options, **_look("quantity"))
        super().__init__([self.quantity])

    def still(self) -> tuple[Figure, str]:
        """The heat map of the chosen quantity; where it is highest and lowest."""
        values, (title, meaning) = self.values[self.quantity.value], QUANTITIES[self.quantity.value]
        names = self.names if self.quantity.value == "length" else self.pairs
        sentence = f"The {title} is undefined in every layer."
        if not np.isnan(values).all():
            ends = []
            for flat in (np.nanargmax(values), np.nanargmin(values)):
                k, column = (int(i) for i in np.unravel_index(flat, values.shape))
                place = f"{self.unit} {self.places[k]}" if k else "the stem"
                ends.append(f"{values[k, column]:.2f} in {place} ({names[column]})")
            sentence = (
                f"The {title} is {np.nanmean(values):.2f} on average; highest: {ends[0]}, lowest: "
                f"{ends[1]}. {meaning}"
            )
        n_places, n_names = values.shape
        figure, (axes,) = panels(1, 1, max(5.5, 0.58 * n_places + 2.6), 1.4 + 0.36 * n_names)
        most = float(np.abs(np.nan_to_num(values)).max()) or 1.0
        low, colours = (-most, DIFFERENCES) if (values < 0).any() else (0.0, COUNTS)
        # Rows of the picture are experts, as in the merging map: (L + 1, C) -> (C, L + 1)
        cells = (values.T, names, self.places, "{:.2f}".format)
        image = heat_map(axes, *cells, low, most, colours)
        axes.set(xlabel=self.unit, title=title)
        figure.colorbar(image, ax=axes)
        return figure, sentence
