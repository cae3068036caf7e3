"""Exercises of notebook 02: wrong answers get the hint that is meant for them; figures show their data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rmm_lab import operators
from rmm_lab.course.checks import Exercise
from rmm_lab.course.exercises.nb02 import EXERCISES
from rmm_lab.figures import models as pictures

ORDER = (
    "def f(d, p):\n m = max(1, int(p * d.shape[1]))\n out = torch.zeros_like(d)\n"
    " idx = d.abs().argsort(dim=1, descending=True, stable=True)[:, :m]\n"
)
# (exercise, what a student may write, a phrase of the answer)
WRONG = [
    ("02.dare", "def f(d, keep, p):\n return torch.where(keep, d, 0 * d) / (p + 1e-9)",
     "by the drop rate; a"),
    ("02.ties", "def f(t):\n return torch.sign(t.sum(0)) * t.abs().sum(0) / len(t)",
     "mean of all magnitudes"),
    ("02.ties", "def f(t):\n return t.relu().mean(0)", "clamp(0) keeps what is positive"),
    ("02.trim", "def f(d, p):\n m = max(1, math.ceil(p * d.shape[1]))\n out = torch.zeros_like(d)\n"
     " for row, o in zip(d, out):\n  i = row.abs().argsort(descending=True, stable=True)[:m]\n"
     "  o[i] = row[i]\n return out", "m is rounded up"),
    ("02.trim", ORDER + " out[:, idx] = d[:, idx]\n return out", "out[:, idx]"),
    ("02.trim", ORDER + " for i in range(len(d)):\n  out[i, :m] = d[i, idx[i]]\n return out", "to the front"),
    ("02.task_arithmetic", "def f(b, e, s):\n return s * sum(x - b for x in e)", "The base is missing"),
    ("02.task_arithmetic", "def f(b, e, s):\n return b + s * (e.mean(0) - b)",
     "You average the task vectors"),
    (
        "02.task_arithmetic",
        "def f(b, e, s):\n out = b\n for x in e:\n  out = out + s * x\n return out",
        "the experts' whole weights",
    ),
    (
        "02.task_arithmetic",
        "def f(b, e, s):\n return b + s * (len(e) * b - e.sum(0))",
        "The sign is reversed",
    ),
    (
        "02.task_arithmetic",
        "def f(b, e, s):\n return s * b + s * sum(x - b for x in e)",
        "multiplies the base too",
    ),
    ("02.task_arithmetic", "def f(b, e, s):\n return e.sum(0) - (len(e) - 1) * b", "not used"),
    ("02.task_arithmetic", "def f(b, e, s):\n return b + s * (e[0] + e[1] - 2 * b)", "first two experts"),
    ("02.task_arithmetic", "def f(b, e, s):\n return b + s * (e - b)", "expected shape"),
    ("02.task_arithmetic", "def f(b, e, s):\n b + s * (e - b).sum(0)", "return missing"),
    (
        "02.task_arithmetic",
        "def f(b, e, s):\n for x in e:\n  b += s * (x - b)\n return b",
        "changes its arguments in place",
    ),
    ("02.trim", "def f(d, p):\n k = max(1, int(p * d.shape[1]))\n t = d.sort(1).values[:, -k]\n"
     " return torch.where(d >= t[:, None], d, 0.0)", "largest values"),
    ("02.trim", "def f(d, p):\n k = max(1, int(p * d.shape[1]))\n out = torch.zeros_like(d)\n"
     " for r in range(len(d)):\n  for c in d[r].abs().argsort(stable=True)[:k]:\n"
     "   out[r, c] = d[r, c]\n return out", "smallest"),
    ("02.trim", "def f(d, p):\n k = max(1, int((1 - p) * d.shape[1]))\n"
     " i = d.abs().argsort(dim=1, descending=True, stable=True)\n out = torch.zeros_like(d)\n"
     " return out.scatter(1, i[:, :k], d.gather(1, i[:, :k]))", "Density is the share that is kept"),
    ("02.trim", "def f(d, p):\n k = max(1, int(p * d.numel()))\n"
     " best = sorted(range(d.numel()), key=lambda i: (-abs(d.flatten()[i].item()), i))[:k]\n"
     " out = torch.zeros(d.numel())\n for i in best:\n  out[i] = d.flatten()[i]\n"
     " return out.view(d.shape)", "compete"),
    ("02.trim", "def f(d, p):\n k = max(1, int(p * d.shape[1]))\n out = d.clone()\n for r in range(len(d)):\n"
     "  t = sorted(d[r].abs().tolist())[-k]\n  for c in range(d.shape[1]):\n"
     "   if abs(d[r, c].item()) <= t:\n    out[r, c] = 0\n return out", "One entry too few"),
    ("02.trim", "def f(d, p):\n k = max(1, int(p * d.shape[1]))\n t = d.abs().sort(1).values[:, -k]\n"
     " return torch.where(d.abs() >= t[:, None], d, 0.0)", "more than m"),
    ("02.trim", "def f(d, p):\n k = int(p * d.shape[1])\n"
     " i = d.abs().argsort(dim=1, descending=True, stable=True)\n"
     " out = d.clone()\n for r in range(len(d)):\n  out[r, i[r, k:]] = 0\n return out",
     "At least one entry stays"),
    ("02.trim", "def f(d, p):\n k = max(1, int(p * d.shape[1]))\n"
     " rank = d.abs().argsort(dim=1, descending=True, stable=True).argsort(1)\n return rank < k",
     "This is the mask"),
    ("02.trim", "def f(d, p):\n k = max(1, int(p * d.shape[1]))\n i = d.abs().topk(k).indices\n"
     " out = torch.zeros_like(d)\n return out.scatter(1, i, d.gather(1, i))", "Of equal magnitudes"),
    ("02.trim", "def f(d, p):\n d = abs(d)\n k = max(1, int(p * d.shape[1]))\n"
     " i = d.argsort(dim=1, descending=True, stable=True)[:, :k]\n"
     " return torch.zeros_like(d).scatter(1, i, d.gather(1, i))", "The signs are lost"),
    ("02.trim", "def f(d, p):\n return d.abs().argsort(1, descending=True, stable=True)", "TypeError"),
    ("02.trim", "def f(d, p):\n k = max(1, int(p * d.shape[1]))\n return d.abs().topk(k).values",
     "expected shape"),
    ("02.trim", "def f(d, p):\n d[d.abs() < d.abs().quantile(1 - p)] = 0\n return d",
     "changes its arguments in place"),
    ("02.ties", "def f(t):\n return sum(t) / len(t)", "This averages all experts"),
    ("02.ties", "def f(t):\n s = torch.sign(t.sum(0))\n"
     " return torch.where(torch.sign(t) == s, t, 0.0).mean(0)", "divide by all N experts"),
    ("02.ties", "def f(t):\n s = t.sum(0)\n n = (t.abs() > 0).sum(0).clamp(min=1)\n"
     " return torch.where(t * s > 0, t, 0.0).sum(0) / n", "including those of the other sign"),
    ("02.ties", "def f(t):\n up = t.clamp(min=0).sum(0)\n down = t.clamp(max=0).sum(0)\n"
     " return torch.where(up > -down, up, torch.where(up < -down, down, 0.0))", "This is the sum"),
    ("02.ties", "def f(t):\n v = (t > 0).sum(0) - (t < 0).sum(0)\n out = torch.zeros(t.shape[1])\n"
     " for j in range(t.shape[1]):\n  a = [x for x in t[:, j] if x * v[j] > 0]\n"
     "  if a:\n   out[j] = sum(a) / len(a)\n return out", "Each expert has one vote"),
    ("02.ties", "def f(t):\n out = torch.zeros(t.shape[1])\n for j in range(t.shape[1]):\n"
     "  lead = max(t[:, j].tolist(), key=abs)\n"
     "  a = [x for x in t[:, j].tolist() if x * lead > 0]\n"
     "  out[j] = sum(a) / max(1, len(a))\n return out", "single largest entry"),
    ("02.ties", "def f(t):\n a = t * t.sum(0) < 0\n return (t * a).sum(0) / a.sum(0).clamp(min=1)",
     "lost the election"),
    ("02.ties", "def f(t):\n a = t * t.sum(0) > 0\n return (t * a).sum(0) / a.sum(0)", "0 / 0 is NaN"),
    ("02.ties", "def f(t):\n return torch.stack([max(c, key=abs) for c in t.T])", "largest entry alone"),
    ("02.ties", "def f(t):\n out = [c[c != 0] for c in t.T]\n"
     " return torch.stack([c.mean() if len(c) else c.sum() for c in out])", "mean of all kept entries"),
    ("02.ties", "def f(t):\n return t.sum(1)", "expected shape"),
    ("02.ties", "def f(t):\n return elect(t)", "NameError"),
    ("02.dare", "def f(d, k, p):\n return torch.where(k, d, 0.0)", "do not rescale"),
    ("02.dare", "def f(d, k, p):\n return torch.where(k, 0.0, d / (1 - p))", "wrong way round"),
    ("02.dare", "def f(d, k, p):\n return torch.where(k, d - p * d, 0.0)", "make the entries smaller"),
    ("02.dare", "def f(d, k, p):\n return torch.where(k, d / p, 0.0)", "grows without bound"),
    ("02.dare", "def f(d, k, p):\n return d * k * d.numel() / k.sum()", "happened to keep"),
    ("02.dare", "def f(d, k, p):\n return (d[k] / (1 - p))", "expected shape"),
    ("02.dare", "def f(d, k, p):\n d[~k] = 0\n return d / (1 - p)", "changes its arguments in place"),
]  # fmt: skip

RIGHT = [
    ("02.task_arithmetic", "def f(b, e, s):\n out = b.clone()\n for x in e:\n  out += s * (x - b)\n"
     " return out"),
    ("02.task_arithmetic", "def f(b, e, s):\n b, e = b.double(), e.double()\n"
     " return b * (1 - s * len(e)) + s * e.sum(0)"),
    ("02.trim", "def f(d, p):\n k = max(1, int(p * d.shape[1]))\n out = torch.zeros(d.shape)\n"
     " for r, row in enumerate(d.tolist()):\n"
     "  for c in sorted(range(len(row)), key=lambda c: (-abs(row[c]), c))[:k]:\n"
     "   out[r, c] = row[c]\n return out"),
    ("02.ties", "def f(t):\n out = []\n for column in t.T.double().tolist():\n"
     "  a = [x for x in column if x * sum(column) > 0]\n"
     "  out.append(sum(a) / len(a) if a else 0.0)\n return torch.tensor(out)"),
    ("02.dare", "def f(d, k, p):\n return torch.where(k, d.double() / (1 - p), 0.0)"),
]  # fmt: skip


def test_the_references_by_hand() -> None:
    references = {n: e.reference for n, e in EXERCISES.items() if isinstance(e, Exercise)}
    base, experts = torch.tensor([1.0, 2.0]), torch.tensor([[2.0, 2.0], [0.0, 5.0]])
    # 1 + 0.5 (1 - 1), 2 + 0.5 (0 + 3)
    assert references["02.task_arithmetic"](base, experts, 0.5).tolist() == [1.0, 3.5]
    assert references["02.trim"](torch.tensor([[1.0, -1.0, 1.0, 3.0]]), 0.5).tolist() == [
        [1, 0, 0, 3]
    ]
    # a conflict (3 against -1), agreement (mean of 1 and 3), one alone, nothing, a sum of 0
    trimmed = torch.tensor([[3.0, 1.0, 0.0, 0.0, 2.0], [-1.0, 3.0, -4.0, 0.0, -2.0]])
    assert references["02.ties"](trimmed).tolist() == [3, 2, -4, 0, 0]
    dropped = references["02.dare"](torch.tensor([[4.0, 2.0]]), torch.tensor([[True, False]]), 0.75)
    assert dropped.tolist() == [[16.0, 0.0]]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), drop_rate=st.sampled_from([0.2, 0.5, 0.9]))
def test_dares_reference_is_the_kits_dare_with_its_mask(seed: int, drop_rate: float) -> None:
    deltas = torch.randn(2, 30, generator=torch.Generator().manual_seed(seed)) + 3.0  # no zeros
    by_kit = operators.drop_and_rescale(deltas, drop_rate, torch.Generator().manual_seed(seed))
    task = EXERCISES["02.dare"]
    assert isinstance(task, Exercise)
    torch.testing.assert_close(task.reference(deltas, by_kit != 0, drop_rate), by_kit)


# ------------------------------------------------------------------------------------------ figures


def test_signs_are_counted_in_the_legend() -> None:
    before = torch.tensor([[1.0, -1.0, 2.0, 0.0, 0.0], [1.0, 1.0, -3.0, 2.0, 0.0]])
    after = before.clone()
    after[0, 2] = 0
    figure = pictures.sign_picture(before, after, ("a", "b"), ("first", "second"))
    legends = [
        [text.get_text() for text in axes.get_legend().get_texts()]  # type: ignore[union-attr]
        for axes in figure.axes
    ]
    assert legends[0] == ["0 in one expert (1)", "same sign (1)", "opposite signs (2)"]
    assert legends[1] == ["0 in one expert (2)", "same sign (1)", "opposite signs (1)"]


def test_a_sweep_names_its_best_mean() -> None:
    scores = np.array([[0.2, 0.4], [0.9, 0.5], [1.0, 0.0]])  # means 0.3, 0.7, 0.5
    figure = pictures.sweep_picture({"one": ([0.1, 0.2, 0.3], scores)}, ("x", "y"), "scale")
    assert figure.axes[0].get_title() == "one\nbest mean: 70 % at 0.2"


def test_kept_shares_are_bars_in_percent() -> None:
    kept = np.array([[0.1, 0.5], [0.2, 1.0]])
    figure = pictures.kept_picture(kept, ("a", "b"), ("stem", "layer 0"), 0.3)
    heights = [round(bar.get_height()) for bar in figure.axes[0].patches]  # type: ignore[attr-defined]
    assert heights == [10, 50, 20, 100]
    assert figure.axes[0].lines[0].get_ydata()[0] == pytest.approx(30)  # type: ignore[index]


def test_gains_are_written_and_the_best_source_is_framed() -> None:
    gains = np.array([[[0.0, 0.0, 0.0], [1.5, -2.0, 0.5], [0.5, -1.0, 3.0]]])
    figure = pictures.gains_picture(gains, ["half 0"], ("a", "b", "c"), ("0", "1", "2"))
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.texts][3:6] == ["+1.5", "-2.0", "+0.5"]
    centres = [(p.get_x() + 0.47, p.get_y() + 0.45) for p in axes.patches]  # type: ignore[attr-defined]
    np.testing.assert_allclose(centres, [(0, 1), (2, 2)])  # nothing gains at place 1


def test_dare_is_drawn_against_the_task_vector() -> None:
    delta = torch.tensor([1.0, -2.0])
    figure = pictures.dare_picture(delta, {"one": torch.tensor([4.0, 0.0])}, 0.75)
    lines = figure.axes[0].lines
    assert np.asarray(lines[2].get_ydata()).tolist() == [4.0, 0.0]
    x, y = (np.asarray(values) for values in (lines[1].get_xdata(), lines[1].get_ydata()))
    np.testing.assert_allclose(y / x, 4)  # 1 / (1 - 0.75)
