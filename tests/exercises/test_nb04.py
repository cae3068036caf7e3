"""Exercises of notebook 04: wrong answers, written as students write them, meet the hint that is meant."""

from __future__ import annotations

import pytest
from answers import function_of

from rmm_lab.course import checks

WRONG = [
    (
        "04.compose",
        """
def f(layers, x):
    for g in layers[::-1]:
        x = g(x)
    return x
""",
        "reversed",
    ),
    (
        "04.compose",
        """
def f(layers, x):
    y = x
    for g in layers:
        y = g(x)
    return y
""",
        "Only the last layer",
    ),
    (
        "04.compose",
        """
def f(layers, x):
    out = 0
    for g in layers:
        out = out + g(x)
    return out if layers else x
""",
        "side by side",
    ),
    (
        "04.compose",
        """
def f(layers, x):
    for g in layers:
        x = g(x) + x
    return x
""",
        "layer's input to its output",
    ),
    (
        "04.compose",
        """
def f(layers, x):
    for i in range(1, len(layers)):
        x = layers[i](x)
    return x
""",
        "leave out the first layer",
    ),
    (
        "04.compose",
        """
def f(layers, x):
    for i in range(len(layers) - 1):
        x = layers[i](x)
    return x
""",
        "leave out the last layer",
    ),
    (
        "04.compose",
        """
def f(layers, x):
    for g in layers:
        x = g(x)
""",
        "returns None",
    ),
    (
        "04.compose",
        """
def f(layers, x):
    return layers(x)
""",
        "raised TypeError",
    ),
    (
        "04.compose",
        """
def f(layers, x):
    return x.sum()
""",
        "expected shape",
    ),
    (
        "04.reward",
        """
def f(p, y):
    right = sum(int((a == b).sum()) for a, b in zip(p, y))
    return right / sum(len(b) for b in y)
""",
        "You pool all examples",
    ),
    (
        "04.reward",
        """
def f(p, y):
    total = 0.0
    for a, b in zip(p, y):
        total += float((a == b).float().mean())
    return total
""",
        "sum over tasks",
    ),
    (
        "04.reward",
        """
def f(p, y):
    acc = [100.0 * (a == b).double().mean().item() for a, b in zip(p, y)]
    return sum(acc) / len(acc)
""",
        "percent",
    ),
    (
        "04.reward",
        """
def f(p, y):
    acc = [(a != b).double().mean().item() for a, b in zip(p, y)]
    return sum(acc) / len(acc)
""",
        "wrong answers",
    ),
    (
        "04.reward",
        """
def f(p, y):
    return min((a == b).double().mean().item() for a, b in zip(p, y))
""",
        "worst task",
    ),
    (
        "04.reward",
        """
def f(p, y):
    hits = [int((a == b).sum()) for a, b in zip(p, y)]
    return sum(hits) / len(hits)
""",
        "counts of correct answers",
    ),
    (
        "04.reward",
        """
def f(p, y):
    n = len(p)
    acc = []
    for i in range(n):
        a, b = p[i], y[n - 1 - i]
        m = min(len(a), len(b))
        acc.append((a[:m] == b[:m]).double().mean().item())
    return sum(acc) / n
""",
        "in different orders",
    ),
    (
        "04.reward",
        """
def f(p, y):
    return (p == y).mean()
""",
        "raised RuntimeError",
    ),
    (
        "04.reward",
        """
def f(p, y):
    return 0.5
""",
        "expected",
    ),
    (
        "04.best_path",
        """
import itertools
def f(n, L, s):
    return sorted(itertools.product(range(n), repeat=L), key=s)[0]
""",
        "worst choice",
    ),
    (
        "04.best_path",
        """
import itertools
def f(n, L, s):
    best = None
    for c in itertools.product(range(n), repeat=L):
        if best is None or s(c) >= s(best):
            best = c
    return best
""",
        "this is the last",
    ),
    (
        "04.best_path",
        """
def f(n, L, s):
    best, top = None, -1
    for a in range(n):
        c = tuple([a] * L)
        if s(c) > top:
            best, top = c, s(c)
    return best
""",
        "uniform",
    ),
    (
        "04.best_path",
        """
import itertools
def f(n, L, s):
    best, top = None, -1
    for c in itertools.permutations(range(n), L):
        if s(c) > top:
            best, top = c, s(c)
    return best
""",
        "taken twice",
    ),
    (
        "04.best_path",
        """
import itertools
def f(n, L, s):
    return max((c for c in itertools.product(range(n), repeat=L) if list(c) == sorted(c)), key=s)
""",
        "rearrangement",
    ),
    (
        "04.best_path",
        """
import itertools
def f(n, L, s):
    return max(itertools.product(range(n - 1), repeat=L), key=s)
""",
        "never tried",
    ),
    (
        "04.best_path",
        """
def f(n, L, s):
    c = [0] * L
    for k in range(L):
        scores = []
        for a in range(n):
            d = list(c)
            d[k] = a
            scores.append(s(tuple(d)))
        c[k] = scores.index(max(scores))
    return tuple(c)
""",
        "layer by layer",
    ),
    (
        "04.best_path",
        """
import itertools
def f(n, L, s):
    return max(s(c) for c in itertools.product(range(n), repeat=L))
""",
        "best score",
    ),
    (
        "04.best_path",
        """
import itertools
def f(n, L, s):
    return sorted(itertools.product(range(L), repeat=n), key=lambda c: -s(c))[0]
""",
        "swapped",
    ),
    (
        "04.best_path",
        """
def f(n, L, s):
    return s.index(max(s))
""",
        "raised AttributeError",
    ),
]
RIGHT = [
    (
        "04.compose",
        """
from functools import reduce
def f(layers, x):
    return reduce(lambda y, g: g(y), layers, x)
""",
    ),
    (
        "04.compose",
        """
def f(layers, x):
    return f(layers[1:], layers[0](x)) if layers else x
""",
    ),
    (
        "04.reward",
        """
def f(p, y):
    total = 0.0
    for a, b in zip(p, y):
        total += sum(int(i) == int(j) for i, j in zip(a, b)) / len(b)
    return total / len(p)
""",
    ),
    (
        "04.reward",
        """
import numpy as np
def f(p, y):
    return np.mean([np.mean(a.numpy() == b.numpy()) for a, b in zip(p, y)])
""",
    ),
    (
        "04.best_path",
        """
import itertools
def f(n, L, s):
    best, top = None, float('-inf')
    for c in itertools.product(range(n), repeat=L):
        if s(c) > top:
            best, top = c, s(c)
    return best
""",
    ),
    (
        "04.best_path",
        """
def f(n, L, s):
    todo = [()]
    for _ in range(L):
        todo = [(*c, a) for c in todo for a in range(n)]
    scores = [s(c) for c in todo]
    return list(todo[scores.index(max(scores))])
""",
    ),
]


@pytest.mark.parametrize(("name", "text", "phrase"), WRONG)
def test_a_wrong_answer_gets_its_hint(name, text, phrase):
    verdict = checks.check(name, function_of(text))
    assert verdict.status == "wrong"
    assert phrase in verdict.message


@pytest.mark.parametrize(("name", "text"), RIGHT)
def test_a_right_answer_written_otherwise_passes(name, text):
    verdict = checks.check(name, function_of(text))
    assert verdict.status == "correct", verdict.message


def test_layers_are_shown_by_their_formula():
    verdict = checks.check("04.compose", lambda layers, x: x - 1)
    assert "[x + 3, 2x]" in verdict.message
