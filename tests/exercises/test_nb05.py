"""Exercises of notebook 05: wrong answers, written as students write them, meet the hint that is meant."""

from __future__ import annotations

from answers import answers

WRONG, RIGHT = answers("""
## 05.returns
def f(r, g):
    T = len(r)
# one gamma too many
    return torch.stack([sum(g ** (k - t + 1) * r[k] for k in range(t, T)) for t in range(T)])
# from the start of the episode
    return torch.tensor([sum(g**k * float(r[k]) for k in range(t, T)) for t in range(T)])
# own reward is missing
    return torch.tensor([sum(g ** (k - t) * float(r[k]) for k in range(t + 1, T)) for t in range(T)])
# correct
    return torch.tensor([sum(g ** (k - t) * float(r[k]) for k in range(t, T)) for t in range(T)])

## 05.returns
def f(r, g):
# no effect
    return torch.stack([r[t:].sum() for t in range(len(r))])
# came before
    out, seen = [], 0.0
    for x in r:
        seen = float(x) + g * seen
        out.append(seen)
    return torch.tensor(out)
# Only the next reward
    out = r.clone()
    out[:-1] += g * r[1:]
    return out
# reverse order
    out, future = [], 0.0
    for x in r.flip(0):
        future = float(x) + g * future
        out.append(future)
    return torch.tensor(out)
# return of the first one
    total = sum(g**t * float(x) for t, x in enumerate(r))
    return torch.full((len(r),), total)
# expected shape
    return sum(g**t * float(x) for t, x in enumerate(r))
# in place
    for t in range(len(r) - 2, -1, -1):
        r[t] += g * r[t + 1]
    return r
# raised IndexError
    out = []
    for t in range(len(r)):
        out.append(r[t] + g * out[t + 1])
    return torch.stack(out)
# Return a tensor
    out = r.numpy().copy()
    for t in range(len(out) - 2, -1, -1):
        out[t] += g * out[t + 1]
    return out
# correct
    k = torch.arange(len(r))
    powers = torch.triu(g ** (k[None] - k[:, None]).clamp(min=0).double())
    return powers @ r.double()

## 05.advantage
def f(r, v):
# divide the difference
    return (r - v) / r.std(correction=0)
# sign is reversed
    n = (r - r.mean()) / r.std(correction=0)
    return v - n
# not normalised
    return torch.tensor([float(a) - float(b) for a, b in zip(r, v)])
# difference is normalised
    a = r - v
    return (a - a.mean()) / a.std(correction=0)
# values are normalised too
    n = lambda x: (x - x.mean()) / x.std(correction=0)
    return n(r) - n(v)
# no baseline
    return (r - r.mean()) / r.std(correction=0)
# centred
    return r - r.sum() / len(r) - v
# B - 1
    return (r - r.mean()) / r.std() - v
# variance
    c = r - r.mean()
    return c / (c**2).mean() - v
# expected shape
    return (r - v).mean()
# returns None
    r - v
# Return a tensor
    x = r.numpy()
    return (x - x.mean()) / x.std() - v.numpy()
# in parentheses
    return r - r.mean() / r.std(correction=0) - v
# correct
    r = r.double()
    d = ((r - r.mean()) ** 2).mean().sqrt()
    return (r - r.mean()) / d - v
# correct
    import numpy as np
    x = r.numpy()
    return torch.from_numpy((x - x.mean()) / (np.std(x) + 1e-8)) - v

## 05.clipped_loss
def f(q, a, e):
# sign is reversed
    return torch.minimum(q * a, torch.clip(q, 1 - e, 1 + e) * a).mean()
# larger of the two
    c = torch.clip(q, 1 - e, 1 + e)
    return sum(-max(float(x * z), float(y * z)) for x, y, z in zip(q, c, a)) / len(a)
# Only the clipped term
    return torch.mean(-torch.clip(q, 1 - e, 1 + e) * a)
# Nothing is clipped
    return -(q @ a) / len(a)
# product of ratio and advantage
    p = q * a
    return -torch.minimum(p, torch.clip(p, 1 - e, 1 + e)).mean()
# around 0
    return -torch.minimum(q * a, torch.clip(q, -e, e) * a).mean()
# sum over the batch
    return -torch.minimum(q * a, torch.clip(q, 1 - e, 1 + e) * a).sum()
# one number for each step
    return torch.maximum(-q * a, -torch.clip(q, 1 - e, 1 + e) * a)
# before multiplying
    return -(torch.clip(q, max=1 + e).minimum(torch.clip(q, min=1 - e)).minimum(q) * a).mean()
# raised RuntimeError
    return -min(q * a, q.clamp(1 - e, 1 + e) * a).mean()
# carries no gradient
    terms = []
    for x, y in zip(q.tolist(), a.tolist()):
        terms.append(min(x * y, min(max(x, 1 - e), 1 + e) * y))
    return torch.tensor(-sum(terms) / len(terms))
# carries no gradient
    return -torch.min(q * a, q.clamp(1 - e, 1 + e) * a).mean().item()
# carries no gradient
    return -torch.min(q * a, q.detach().clamp(1 - e, 1 + e) * a).detach().mean()
# its gradient is not
    far = ((q - 1).abs() > e).float()
    return -(torch.min(q * a, q.clamp(1 - e, 1 + e) * a).detach() * far
             + torch.min(q * a, q.clamp(1 - e, 1 + e) * a) * (1 - far)).mean()
# raised RuntimeError
    x, y = q.numpy(), a.numpy()
    return -torch.from_numpy((x * y).clip(max=x.clip(1 - e, 1 + e) * y)).mean()
# correct
    edge = torch.where(a > 0, 1 + e, 1 - e)
    far = torch.where(a > 0, q > edge, q < edge)
    return -(torch.where(far, edge, q).double() * a).mean()

## 05.clip_corner
def f():
# still depends on the ratio
    return "a"
# lower the objective
    return "b"
# correct
    return "c"
""")
