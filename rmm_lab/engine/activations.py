"""One layer at work: what its linear maps take in and put out, found by hooks, for any family."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Mean:
    """A weighted mean of products of rows, streamed: ``sum w x y' / sum w``.

    In float64: sums in float32 blur what distinguishes inputs that are nearly alike.
    """

    def __init__(self) -> None:
        self.total: Any = 0.0
        self.weight = 0.0

    def add(self, x: Tensor, y: Tensor, w: Tensor) -> None:
        """x: (n, D), y: (n, O), w: (n,)."""
        self.total = self.total + (x * w[:, None]).double().T @ y.double()  # (D, O)
        self.weight += float(w.sum())

    def mean(self) -> Tensor:
        """(D, O) float64; 0 of no rows."""
        return self.total / (self.weight or 1.0)


class _Done(Exception):
    """All that was wanted of a layer has run."""


@contextlib.contextmanager
def hooks(handles: Iterable[Any]) -> Iterator[None]:
    """Hooks that are removed at the end, whatever happens."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def linear_maps(layer: nn.Module) -> dict[str, nn.Linear]:
    """The linear maps of a layer by name."""
    return {name: m for name, m in layer.named_modules() if isinstance(m, nn.Linear)}


def stages(apply: Callable[[], Any], layer: nn.Module) -> list[list[str]]:
    """A layer's linear maps in the order in which they run, those together that take the same input.

    apply: runs the layer once.
    """
    seen: list[tuple[str, Tensor]] = []
    with hooks(
        module.register_forward_pre_hook(lambda _, x, name=name: seen.append((name, x[0])))
        for name, module in linear_maps(layer).items()
    ):
        apply()
    found: list[list[str]] = []
    last = None
    for name, x in seen:
        if x is last:
            found[-1].append(name)
        else:
            found.append([name])
        last = x
    return found


def run(
    arch: Any, layer: Any, state: Any, names: Sequence[str], norm: str = "", outputs: bool = True
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Run a layer as far as some linear maps: their common input, their outputs, what went into ``norm``.

    names: a stage of ``stages``. Without ``outputs`` the maps themselves do not run.
    """
    modules = dict(layer.named_modules())
    found: dict[str, Tensor] = {}
    out: dict[str, Tensor] = {}

    def before(_: Any, args: tuple) -> None:
        found["x"] = args[0]
        if not outputs:
            raise _Done

    def after(name: str) -> Callable[..., None]:
        def hook(_: Any, args: tuple, y: Tensor) -> None:
            out[name] = y
            if name == names[-1]:
                raise _Done

        return hook

    handles = [modules[names[0]].register_forward_pre_hook(before)]
    if outputs:
        handles += [modules[name].register_forward_hook(after(name)) for name in names]
    if norm:
        keep = modules[norm].register_forward_pre_hook(lambda _, x: found.update(stream=x[0]))
        handles.append(keep)
    with hooks(handles), contextlib.suppress(_Done):
        arch.apply(layer, state)
    return found["x"], out, found.get("stream", found["x"])


def as_rows(x: Tensor, w: Tensor | None, ones: bool = False) -> tuple[Tensor, Tensor]:
    """Inputs (..., D) as rows (n, D), or (n, D + 1) with a column of ones, and their weights (n,)."""
    rows = x.flatten(0, -2)
    if ones:
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
    return rows, rows.new_ones(len(rows)) if w is None else w.to(rows.dtype)


def make_up(
    y: Tensor, lack: Tensor, layer: Any, expert: Any, scale: str, residual: float
) -> Tensor:
    """What a map must put out so that the merged residual stream comes nearer to the expert's.

    y: (..., O), the expert's outputs; lack: (..., O), the expert's stream less the merged one's before they
    are added, times ``residual``. scale: the name of a layer scale behind the map, which each has its own of.
    """
    lack = lack.view_as(y)
    ours, theirs = (
        getattr(dict(m.named_modules()).get(scale), "gamma", None) for m in (layer, expert)
    )  # (O,)
    if ours is None or theirs is None:
        return y + lack
    gap = lack + residual * (theirs - ours) * y
    return y + torch.where(ours.abs() > 1e-12, gap / ours, torch.zeros_like(gap))


def parameter(tensor: Tensor) -> nn.Parameter:
    """A parameter without gradient."""
    return nn.Parameter(tensor.contiguous(), requires_grad=False)
