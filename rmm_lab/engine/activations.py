"""One layer at work: what its linear maps take in and put out, found by hooks, for any family."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rmm_lab.engine.ridge import WIDE

BAND = 256  # rows of a symmetric product that are computed at a time


class Means:
    """Weighted means of products, streamed: ``sum w x [x | y]' / sum w`` for each fold and task.

    d: how many numbers a row x has; o: how many y has. Of wide rows' products with themselves only the upper
    bands add up; ``take`` mirrors them.
    """

    def __init__(self, folds: int, tasks: int, d: int, o: int = 0) -> None:
        self.dtype = torch.float64 if d <= WIDE else torch.float32
        self.total = torch.zeros(folds, tasks, d, d + o, dtype=self.dtype)
        self.rows = torch.zeros(folds, tasks, dtype=torch.int64)
        self.weight = torch.zeros(folds, tasks, 1, 1, dtype=torch.float64)
        self._bands = [slice(0, d)]
        if d > WIDE:
            self._bands = [slice(a, min(a + BAND, d)) for a in range(0, d, BAND)]

    def add(self, fold: int, task: int, rows: Tensor, w: Tensor) -> None:
        """rows: (n, D + O), each x and then y; w: (n,). Wide ones add up in float32, for speed."""
        total, d = self.total[fold, task], self.total.shape[2]  # (D, D + O)
        rows, w = rows.to(self.dtype), w.to(self.dtype)
        weighed = (rows[:, :d] * w[:, None]).T  # (D, n)
        for band in self._bands:
            total[band, band.start :].addmm_(weighed[band], rows[:, band.start :])
        self.weight[fold, task] += float(w.sum())
        self.rows[fold, task] += len(w)

    def take(self) -> tuple[Tensor, Tensor]:
        """(K, N, D, D) and (K, N, D, O), 0 where there are no rows; the sums are used up."""
        d = self.total.shape[2]
        for band in self._bands[:-1]:
            right = self.total[..., band, band.stop : d]
            self.total[..., band.stop :, band] = right.transpose(-1, -2)
        self.total.div_(torch.where(self.weight > 0, self.weight, 1.0).to(self.dtype))
        return self.total[..., :d], self.total[..., d:]


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


class Stages(NamedTuple):
    """How a layer runs. ``stages``: its linear maps in running order, those together that take the same
    input; ``inside``: of each module that is called, the linear maps in it."""

    stages: list[list[str]]
    inside: dict[str, set[str]]

    @classmethod
    def of(cls, apply: Callable[[], Any], layer: nn.Module) -> Stages:
        """What happens when ``apply`` runs the layer once."""
        maps, called = linear_maps(layer), set[str]()
        seen: list[list[str]] = []
        last: list[Tensor] = []

        def note(name: str, _: Any, args: tuple) -> None:
            called.add(name)
            if name in maps:
                if last and args[0] is last[0]:
                    seen[-1].append(name)
                else:
                    seen.append([name])
                last[:] = args[:1]

        modules = [(name, m) for name, m in layer.named_modules() if name]
        with hooks(m.register_forward_pre_hook(functools.partial(note, n)) for n, m in modules):
            apply()
        inside = {
            name: {m for m in maps if m == name or m.startswith(f"{name}.")} for name in called
        }
        return cls(seen, {name: own for name, own in inside.items() if own})

    def done(self, maps: Collection[str]) -> set[str]:
        """These linear maps, and the largest modules that hold no others."""
        fixed = {name for name, own in self.inside.items() if own <= set(maps)}
        return {*maps, *(n for n in fixed if not any(n.startswith(f"{o}.") for o in fixed))}


class Remembered:
    """What the finished parts of layers put out, computed once.

    Args:
        budget: bytes that may be held; what goes beyond is computed again.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._outputs: dict[tuple, Any] = {}  # tensors, or tuples that begin with one
        self._bytes = 0

    def keep(self, layer: nn.Module, at: Hashable, name: str, output: Any) -> None:
        """What a layer's module put out for some inputs, ``at``, while there is room."""
        key = (layer, at, name)
        if self._bytes + _bytes(output) <= self.budget and key not in self._outputs:
            self._outputs[key] = output
            self._bytes += _bytes(output)

    @contextlib.contextmanager
    def within(self, layer: nn.Module, at: Hashable, names: Iterable[str]) -> Iterator[None]:
        """Within the block, modules of these names answer from what is remembered of them at some inputs."""
        modules = dict(layer.named_modules())
        chosen = {name: modules[name] for name in names}
        for name, module in chosen.items():
            module.forward = functools.partial(self._answer, layer, at, name, module)
        try:
            yield
        finally:
            for module in chosen.values():
                del module.forward

    def _answer(
        self, layer: nn.Module, at: Hashable, name: str, module: Any, *args: Any, **options: Any
    ) -> Any:
        if (y := self._outputs.get((layer, at, name))) is None:
            y = type(module).forward(module, *args, **options)
            if isinstance(y, tuple):  # a language model's attention, whose scores nobody needs
                y = (y[0], *(None for _ in y[1:]))
            self.keep(layer, at, name, y)
            if (layer, at, name) in self._outputs:  # it stands for the modules in it
                for old in [
                    o for o in self._outputs if o[:2] == (layer, at) and o[2].startswith(f"{name}.")
                ]:
                    self._bytes -= _bytes(self._outputs.pop(old))
        return y


def _bytes(output: Any) -> int:
    return int((output[0] if isinstance(output, tuple) else output).nbytes)


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
