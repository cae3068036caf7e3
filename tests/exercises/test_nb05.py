"""Exercises of notebook 05: wrong answers, written as students write them, meet the hint that is meant."""

from __future__ import annotations

import pytest
from answers import function_of

from rmm_lab.course import checks

WRONG = [
    (
        "05.returns",
        """
def f(r, g):
    T = len(r)
    return torch.stack([sum(g ** (k - t + 1) * r[k] for k in range(t, T)) for t in range(T)])
""",
        "one gamma too many",
    ),
    (
        "05.advantage",
        "def f(r, v):\n    return (r - v) / r.std(correction=0)",
        "divide the difference",
    ),
    (
        "05.returns",
        """
def f(r, g):
    return torch.stack([r[t:].sum() for t in range(len(r))])
""",
        "no effect",
    ),
    (
        "05.returns",
        """
def f(r, g):
    out, seen = [], 0.0
    for x in r:
        seen = float(x) + g * seen
        out.append(seen)
    return torch.tensor(out)
""",
        "came before",
    ),
    (
        "05.returns",
        """
def f(r, g):
    T = len(r)
    return torch.tensor([sum(g**k * float(r[k]) for k in range(t, T)) for t in range(T)])
""",
        "from the start of the episode",
    ),
    (
        "05.returns",
        """
def f(r, g):
    T = len(r)
    return torch.tensor([sum(g ** (k - t) * float(r[k]) for k in range(t + 1, T)) for t in range(T)])
""",
        "own reward is missing",
    ),
    (
        "05.returns",
        """
def f(r, g):
    out = r.clone()
    out[:-1] += g * r[1:]
    return out
""",
        "Only the next reward",
    ),
    (
        "05.returns",
        """
def f(r, g):
    out, future = [], 0.0
    for x in r.flip(0):
        future = float(x) + g * future
        out.append(future)
    return torch.tensor(out)
""",
        "reverse order",
    ),
    (
        "05.returns",
        """
def f(r, g):
    total = sum(g**t * float(x) for t, x in enumerate(r))
    return torch.full((len(r),), total)
""",
        "return of the first one",
    ),
    (
        "05.returns",
        """
def f(r, g):
    return sum(g**t * float(x) for t, x in enumerate(r))
""",
        "expected shape",
    ),
    (
        "05.returns",
        """
def f(r, g):
    for t in range(len(r) - 2, -1, -1):
        r[t] += g * r[t + 1]
    return r
""",
        "in place",
    ),
    (
        "05.returns",
        """
def f(r, g):
    out = []
    for t in range(len(r)):
        out.append(r[t] + g * out[t + 1])
    return torch.stack(out)
""",
        "raised IndexError",
    ),
    (
        "05.advantage",
        """
def f(r, v):
    n = (r - r.mean()) / r.std(correction=0)
    return v - n
""",
        "sign is reversed",
    ),
    (
        "05.advantage",
        """
def f(r, v):
    return torch.tensor([float(a) - float(b) for a, b in zip(r, v)])
""",
        "not normalised",
    ),
    (
        "05.advantage",
        """
def f(r, v):
    a = r - v
    return (a - a.mean()) / a.std(correction=0)
""",
        "difference is normalised",
    ),
    (
        "05.advantage",
        """
def f(r, v):
    n = lambda x: (x - x.mean()) / x.std(correction=0)
    return n(r) - n(v)
""",
        "values are normalised too",
    ),
    (
        "05.advantage",
        """
def f(r, v):
    return (r - r.mean()) / r.std(correction=0)
""",
        "no baseline",
    ),
    (
        "05.advantage",
        """
def f(r, v):
    return r - r.sum() / len(r) - v
""",
        "centred",
    ),
    (
        "05.advantage",
        """
def f(r, v):
    return (r - r.mean()) / r.std() - v
""",
        "B - 1",
    ),
    (
        "05.advantage",
        """
def f(r, v):
    c = r - r.mean()
    return c / (c**2).mean() - v
""",
        "variance",
    ),
    (
        "05.advantage",
        """
def f(r, v):
    return (r - v).mean()
""",
        "expected shape",
    ),
    (
        "05.advantage",
        """
def f(r, v):
    r - v
""",
        "returns None",
    ),
    (
        "05.clipped_loss",
        """
def f(q, a, e):
    return torch.minimum(q * a, torch.clip(q, 1 - e, 1 + e) * a).mean()
""",
        "sign is reversed",
    ),
    (
        "05.clipped_loss",
        """
def f(q, a, e):
    c = torch.clip(q, 1 - e, 1 + e)
    return sum(-max(float(x * z), float(y * z)) for x, y, z in zip(q, c, a)) / len(a)
""",
        "larger of the two",
    ),
    (
        "05.clipped_loss",
        """
def f(q, a, e):
    return torch.mean(-torch.clip(q, 1 - e, 1 + e) * a)
""",
        "Only the clipped term",
    ),
    (
        "05.clipped_loss",
        """
def f(q, a, e):
    return -(q @ a) / len(a)
""",
        "Nothing is clipped",
    ),
    (
        "05.clipped_loss",
        """
def f(q, a, e):
    p = q * a
    return -torch.minimum(p, torch.clip(p, 1 - e, 1 + e)).mean()
""",
        "product of ratio and advantage",
    ),
    (
        "05.clipped_loss",
        """
def f(q, a, e):
    return -torch.minimum(q * a, torch.clip(q, -e, e) * a).mean()
""",
        "around 0",
    ),
    (
        "05.clipped_loss",
        """
def f(q, a, e):
    return -torch.minimum(q * a, torch.clip(q, 1 - e, 1 + e) * a).sum()
""",
        "sum over the batch",
    ),
    (
        "05.clipped_loss",
        """
def f(q, a, e):
    return torch.maximum(-q * a, -torch.clip(q, 1 - e, 1 + e) * a)
""",
        "one number for each step",
    ),
    (
        "05.clipped_loss",
        """
def f(q, a, e):
    return -(torch.clip(q, max=1 + e).minimum(torch.clip(q, min=1 - e)).minimum(q) * a).mean()
""",
        "before multiplying",
    ),
    (
        "05.clipped_loss",
        """
def f(q, a, e):
    return -min(q * a, q.clamp(1 - e, 1 + e) * a).mean()
""",
        "raised RuntimeError",
    ),
    (
        "05.returns",
        """
def f(r, g):
    out = r.numpy().copy()
    for t in range(len(out) - 2, -1, -1):
        out[t] += g * out[t + 1]
    return out
""",
        "Return a tensor",
    ),
    (
        "05.advantage",
        """
def f(r, v):
    x = r.numpy()
    return (x - x.mean()) / x.std() - v.numpy()
""",
        "Return a tensor",
    ),
    (
        "05.advantage",
        """
def f(r, v):
    return r - r.mean() / r.std(correction=0) - v
""",
        "in parentheses",
    ),
    (
        "05.clipped_loss",
        """
def f(q, a, e):
    terms = []
    for x, y in zip(q.tolist(), a.tolist()):
        terms.append(min(x * y, min(max(x, 1 - e), 1 + e) * y))
    return torch.tensor(-sum(terms) / len(terms))
""",
        "carries no gradient",
    ),
    (
        "05.clipped_loss",
        """
def f(q, a, e):
    return -torch.min(q * a, q.clamp(1 - e, 1 + e) * a).mean().item()
""",
        "carries no gradient",
    ),
    (
        "05.clipped_loss",
        """
def f(q, a, e):
    return -torch.min(q * a, q.detach().clamp(1 - e, 1 + e) * a).detach().mean()
""",
        "carries no gradient",
    ),
    (
        "05.clipped_loss",
        """
def f(q, a, e):
    far = ((q - 1).abs() > e).float()
    return -(torch.min(q * a, q.clamp(1 - e, 1 + e) * a).detach() * far
             + torch.min(q * a, q.clamp(1 - e, 1 + e) * a) * (1 - far)).mean()
""",
        "its gradient is not",
    ),
    (
        "05.clipped_loss",
        """
def f(q, a, e):
    x, y = q.numpy(), a.numpy()
    return -torch.from_numpy((x * y).clip(max=x.clip(1 - e, 1 + e) * y)).mean()
""",
        "raised RuntimeError",
    ),
]
RIGHT = [
    (
        "05.returns",
        """
def f(r, g):
    T = len(r)
    return torch.tensor([sum(g ** (k - t) * float(r[k]) for k in range(t, T)) for t in range(T)])
""",
    ),
    (
        "05.returns",
        """
def f(r, g):
    k = torch.arange(len(r))
    powers = torch.triu(g ** (k[None] - k[:, None]).clamp(min=0).double())
    return powers @ r.double()
""",
    ),
    (
        "05.advantage",
        """
def f(r, v):
    r = r.double()
    d = ((r - r.mean()) ** 2).mean().sqrt()
    return (r - r.mean()) / d - v
""",
    ),
    (
        "05.advantage",
        """
import numpy as np
def f(r, v):
    x = r.numpy()
    return torch.from_numpy((x - x.mean()) / (np.std(x) + 1e-8)) - v
""",
    ),
    (
        "05.clipped_loss",
        """
def f(q, a, e):
    edge = torch.where(a > 0, 1 + e, 1 - e)
    far = torch.where(a > 0, q > edge, q < edge)
    return -(torch.where(far, edge, q).double() * a).mean()
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


def test_the_quiz_explains_every_option():
    found = {o: checks.check("05.clip_corner", lambda o=o: o) for o in "abc"}
    assert {o for o, v in found.items() if v.status == "correct"} == {"c"}
    assert "still depends on the ratio" in found["a"].message
    assert "lower the objective" in found["b"].message
