"""Layers to merge: Gaussian ones, and ones in eighths, where ties and sums of 0 are common."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st


def layer(n: int = 2, shape: tuple[int, ...] = (6, 4), seed: int = 0, dtype=torch.float64):
    """A base and n experts of Gaussian entries: no two magnitudes alike, no sum of exactly 0."""
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=g, dtype=torch.float64)
    return base.to(dtype), (base + torch.randn((n, *shape), generator=g, dtype=torch.float64)).to(
        dtype
    )


@st.composite
def layers(draw, min_experts: int = 1):
    """base and experts in eighths, so that sums are exact and ties and zero sums are common."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=0, max_size=3)))
    n = draw(st.integers(min_experts, 4))
    size = math.prod(shape)
    eighths = st.integers(-16, 16)
    base = draw(st.lists(eighths, min_size=size, max_size=size))
    experts = draw(st.lists(eighths, min_size=n * size, max_size=n * size))
    return torch.tensor(base).reshape(shape) / 8, torch.tensor(experts).reshape(n, *shape) / 8
