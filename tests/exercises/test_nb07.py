"""Exercises of notebook 07: wrong answers, written as students write them, meet the hint that is meant."""

from __future__ import annotations

import pytest
import torch

from rmm_lab.course.exercises import nb07

NET = """
def f(inputs, experts):
    a, b, out = list(inputs), list(inputs), []
    for layer in zip(*experts):
        y = [x @ w.T for x, w in zip(%s, layer)]
        out.append(torch.linalg.lstsq(torch.cat(%s), torch.cat(y)).solution%s)
        a = [torch.tanh(x @ out[-1]%s) for x in a]
        b = [torch.tanh(x @ w.T) for x, w in zip(b, layer)]
    return out
"""
WRONG = [
    ("07.fit", "def f(x, w):\n return sum(w) / len(w)", "plain average"),
    ("07.fit", "def f(x, w):\n g = sum(a.T @ a for a in x)\n return sum(w) @ g @ torch.linalg.inv(g)",
     "sum of the weights"),
    ("07.fit", "def f(x, w):\n return sum(v @ a.T @ a for a, v in zip(x, w))", "right side"),
    ("07.fit", "def f(x, w):\n b = torch.stack([v @ a.T @ a for a, v in zip(x, w)]).mean(0)\n"
     " return b @ torch.linalg.inv(sum(a.T @ a for a in x))", "factor of N"),
    ("07.fit", "def f(x, w):\n s = (x**2).sum(1)\n return (w * s[:, None]).sum(0) / s.sum(0)", "diagonal"),
    ("07.fit", "def f(x, w):\n b = sum(v @ a.T @ a for a, v in zip(x, w))\n"
     " return torch.linalg.solve(sum(a.T @ a for a in x), b.T)", "axes are turned"),
    ("07.fit", "def f(x, w):\n return w", "expected shape"),
    ("07.layer_by_layer", NET % ("b", "b", ".T", ".T"), "as RegMean does"),
    ("07.layer_by_layer", NET % ("a", "a", ".T", ".T"), "errors below are then made up for"),
    ("07.layer_by_layer", NET % ("b", "a", "", ""), "weights are turned"),
    ("07.layer_by_layer", "def f(x, e):\n return [sum(l) / len(l) for l in zip(*e)]", "plain average"),
    ("07.layer_by_layer", (NET % ("b", "a", ".T", ".T")).replace("torch.tanh", ""), "tanh"),
    ("07.layer_by_layer", (NET % ("b", "a", ".T", ".T")).replace("(y)", "(y).tanh()"), "behind the tanh"),
    ("07.layer_by_layer", (NET % ("b", "a[:1]", ".T", ".T")).replace("(y)", "(y[:1])"), "first task alone"),
    ("07.layer_by_layer", (NET % ("b", "a", ".T", ".T")).replace("return out", "pass"), "returns None"),
    ("07.needs", "def f():\n return 'a'", "No answer enters"),
    ("07.verdict", "def f():\n return 'No. ' + 'Least squares is as good as it gets. ' * 6", "one number"),
    ("07.verdict", "def f():\n return '97 is enough.'", "Expected 40 to 170 words, found 3"),
]  # fmt: skip
RIGHT = [
    ("07.fit", "def f(x, w):\n y = torch.cat([a @ v.T for a, v in zip(x, w)])\n"
     " return torch.linalg.lstsq(x.flatten(0, 1), y).solution.T"),
    ("07.fit", "def f(x, w):\n g = [a.T @ a for a in x]\n"
     " return sum(v @ m for v, m in zip(w, g)) @ torch.linalg.inv(sum(g))"),
    ("07.layer_by_layer", NET % ("b", "a", ".T", ".T")),
    ("07.layer_by_layer", """
def f(inputs, experts):
    a = b = inputs
    merged = []
    for l in range(len(experts[0])):
        y = [b[i] @ experts[i][l].T for i in range(len(experts))]
        g = sum(x.T @ x for x in a)
        merged.append(torch.linalg.solve(g, sum(x.T @ t for x, t in zip(a, y))).T)
        a, b = [(x @ merged[-1].T).tanh() for x in a], [t.tanh() for t in y]
    return merged
"""),
]  # fmt: skip


def test_the_references_by_hand():
    weights = torch.tensor([[[2.0, 5.0]], [[7.0, 3.0]]])
    fit = nb07.FIT.reference
    # A has only a first input and B a second; then both have the same one, B's twice as large.
    inputs = torch.tensor([[[1.0, 0.0]], [[0.0, 3.0]]])
    torch.testing.assert_close(fit(inputs, weights), torch.tensor([[2.0, 3.0]]))
    one, two = torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([[[2.0]], [[7.0]]])
    torch.testing.assert_close(fit(one, two), torch.tensor([[6.0]]))  # (1 * 2 + 4 * 7) / 5
    # Two tasks and one number: W = (1 * 2 + 2 * 12) / (1 + 4), since the squares are 1 and 4.
    one, six = torch.tensor([[2.0]]), torch.tensor([[6.0]])
    (w,) = nb07.layer_by_layer([torch.tensor([[1.0]]), torch.tensor([[2.0]])], [[one], [six]])
    torch.testing.assert_close(w, torch.tensor([[5.2]]))
    # The second layer sees tanh of the first's 5.2 and 10.4 (both about 1), and aims at 3 tanh 2, 4 tanh 12.
    nets = [[one, torch.tensor([[3.0]])], [six, torch.tensor([[4.0]])]]
    w = nb07.layer_by_layer([torch.tensor([[1.0]]), torch.tensor([[2.0]])], nets)[1]
    assert float(w) == pytest.approx((3 * 0.96403 + 4) / 2, abs=1e-3)
