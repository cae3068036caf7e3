"""Exercises of notebook 04: wrong answers, written as students write them, meet the hint that is meant."""

from __future__ import annotations

from answers import answers

from rmm_lab.course import checks

WRONG, RIGHT = answers("""
## 04.compose
def f(layers, x):
# reversed
    for g in layers[::-1]:
        x = g(x)
    return x
# Only the last layer
    y = x
    for g in layers:
        y = g(x)
    return y
# side by side
    out = 0
    for g in layers:
        out = out + g(x)
    return out if layers else x
# layer's input to its output
    for g in layers:
        x = g(x) + x
    return x
# leave out the first layer
    for i in range(1, len(layers)):
        x = layers[i](x)
    return x
# leave out the last layer
    for i in range(len(layers) - 1):
        x = layers[i](x)
    return x
# returns None
    for g in layers:
        x = g(x)
# raised TypeError
    return layers(x)
# expected shape
    return x.sum()
# correct
    from functools import reduce
    return reduce(lambda y, g: g(y), layers, x)
# correct
    return f(layers[1:], layers[0](x)) if layers else x

## 04.reward
def f(p, y):
# You pool all examples
    right = sum(int((a == b).sum()) for a, b in zip(p, y))
    return right / sum(len(b) for b in y)
# sum over tasks
    total = 0.0
    for a, b in zip(p, y):
        total += float((a == b).float().mean())
    return total
# percent
    acc = [100.0 * (a == b).double().mean().item() for a, b in zip(p, y)]
    return sum(acc) / len(acc)
# wrong answers
    acc = [(a != b).double().mean().item() for a, b in zip(p, y)]
    return sum(acc) / len(acc)
# worst task
    return min((a == b).double().mean().item() for a, b in zip(p, y))
# counts of correct answers
    hits = [int((a == b).sum()) for a, b in zip(p, y)]
    return sum(hits) / len(hits)
# in different orders
    n = len(p)
    acc = []
    for i in range(n):
        a, b = p[i], y[n - 1 - i]
        m = min(len(a), len(b))
        acc.append((a[:m] == b[:m]).double().mean().item())
    return sum(acc) / n
# raised RuntimeError
    return (p == y).mean()
# expected
    return 0.5
# correct
    total = 0.0
    for a, b in zip(p, y):
        total += sum(int(i) == int(j) for i, j in zip(a, b)) / len(b)
    return total / len(p)
# correct
    import numpy as np
    return np.mean([np.mean(a.numpy() == b.numpy()) for a, b in zip(p, y)])

## 04.best_path
def f(n, L, s):
    import itertools
# worst choice
    return sorted(itertools.product(range(n), repeat=L), key=s)[0]
# this is the last
    best = None
    for c in itertools.product(range(n), repeat=L):
        if best is None or s(c) >= s(best):
            best = c
    return best
# rearrangement
    return max((c for c in itertools.product(range(n), repeat=L) if list(c) == sorted(c)), key=s)
# never tried
    return max(itertools.product(range(n - 1), repeat=L), key=s)
# best score
    return max(s(c) for c in itertools.product(range(n), repeat=L))
# swapped
    return sorted(itertools.product(range(L), repeat=n), key=lambda c: -s(c))[0]
# correct
    best, top = None, float('-inf')
    for c in itertools.product(range(n), repeat=L):
        if s(c) > top:
            best, top = c, s(c)
    return best
# uniform
    best, top = None, -1
    for a in range(n):
        c = tuple([a] * L)
        if s(c) > top:
            best, top = c, s(c)
    return best
# layer by layer
    c = [0] * L
    for k in range(L):
        scores = []
        for a in range(n):
            d = list(c)
            d[k] = a
            scores.append(s(tuple(d)))
        c[k] = scores.index(max(scores))
    return tuple(c)
# raised AttributeError
    return s.index(max(s))
# correct
    todo = [()]
    for _ in range(L):
        todo = [(*c, a) for c in todo for a in range(n)]
    scores = [s(c) for c in todo]
    return list(todo[scores.index(max(scores))])
# taken twice
    best, top = None, -1
    for c in itertools.permutations(range(n), L):
        if s(c) > top:
            best, top = c, s(c)
    return best
""")


def test_layers_are_shown_by_their_formula():
    verdict = checks.check("04.compose", lambda layers, x: x - 1)
    assert "[x + 3, 2x]" in verdict.message
