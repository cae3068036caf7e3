"""One layer at work: what its linear maps take in and put out, for any family."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rmm_lab.engine.ridge import WIDE

BAND = 64  # rows of a symmetric product that are computed at a time; in float32 four times as many
CACHED = 2**19  # bytes of rows that are summed up at a time
HELD = "."  # no module's name


class Means:
    """Weighted means of products, streamed: ``sum w x [x | y]' / sum w`` for each fold and task.

    d: how many numbers a row x has; o: how many y has; ones: whether each x has a 1 behind it, which is not
    given. Of rows' products with themselves only the upper bands add up; ``take`` mirrors them.
    """

    def __init__(self, folds: int, tasks: int, d: int, o: int = 0, *, ones: bool = False) -> None:
        self.ones, self.dtype = ones, torch.float64 if d + ones <= WIDE else torch.float32
        self.total = torch.zeros(folds, tasks, d + ones, d + ones + o, dtype=self.dtype)
        self.rows = 0  # that count
        self.weight = torch.zeros(folds, tasks, dtype=torch.float64)
        band = BAND if self.dtype == torch.float64 else 4 * BAND
        self._bands = [slice(a, min(a + band, d)) for a in range(0, d, band)]

    def add(
        self,
        task: int,
        x: Tensor,
        ys: Sequence[Tensor] = (),
        w: Tensor | None = None,
        folds: Sequence[slice] = (slice(None),),
    ) -> None:
        """Rows of a task, one range of them for each fold.

        x: (..., D); ys: (..., O) of any O that add up; w: (...), None for 1. Rows of w = 0 do not count.
        """
        padded = w is not None and not bool((w > 0).all())
        given: list[Any] = [w if w is None else w.flatten(), *(t.flatten(0, -2) for t in (x, *ys))]
        for fold, some in enumerate(folds):
            own: list[Any] = [t if t is None else t[some] for t in given]
            if padded:  # what padding holds need be no number
                there = (own[0] > 0).nonzero().squeeze(1)
                own = [t[there] for t in own]
            self._add(fold, task, *own)

    def _add(self, fold: int, task: int, w: Any, x: Any, *ys: Any) -> None:
        """Some rows at a time, so that what float64 holds of them stays in the processor's cache."""
        total, (n, d) = self.total[fold, task], x.shape  # (D, D + O)
        few = max(256, CACHED // (d * 8)) if self.dtype == torch.float64 else max(1, n)
        for start in range(0, n, few):
            some = slice(start, start + few)
            rows, share = x[some].to(self.dtype), None if w is None else w[some].to(self.dtype)
            weighed = rows if share is None else rows * share[:, None]
            for band in self._bands:
                total[band, band.start : d].addmm_(weighed[:, band].T, rows[:, band.start :])
            size = float(len(rows) if share is None else share.sum())
            if self.ones:
                total[:d, d] += weighed.sum(0)
                total[d, d] += size
            at = d + self.ones
            for y in ys:
                own, columns = y[some].to(self.dtype), slice(at, at := at + y.shape[1])
                total[:d, columns].addmm_(weighed.T, own)
                if self.ones:
                    total[d, columns] += own.sum(0) if share is None else share @ own
            self.weight[fold, task] += size
        self.rows += n

    def take(self) -> tuple[Tensor, Tensor]:
        """(K, N, D, D) and (K, N, D, O), 0 where there are no rows; the sums are used up."""
        d = self.total.shape[2]
        x = d - self.ones
        for band in self._bands[:-1]:
            right = self.total[..., band, band.stop : x]
            self.total[..., band.stop : x, band] = right.transpose(-1, -2)
        if self.ones:
            self.total[..., x, :x] = self.total[..., :x, x]
        weight = self.weight.where(self.weight > 0, 1.0).to(self.dtype)
        self.total.div_(weight[..., None, None])
        return self.total[..., :d], self.total[..., d:]


@contextlib.contextmanager
def answering(
    modules: Mapping[str, nn.Module], forwards: Mapping[str, Callable[..., Any]]
) -> Iterator[None]:
    """Within the block modules of these names answer by other functions; whatever happens, not after it."""
    try:
        for name, forward in forwards.items():
            modules[name].__dict__["forward"] = forward  # faster than setattr
        yield
    finally:
        for name in forwards:
            modules[name].__dict__.pop("forward", None)


class Stages(NamedTuple):
    """In what order a layer's linear maps run, and so in what order they can be fitted.

    ``maps``: the maps of each stage, which all take the same input, in running order. ``final``: for each
    number of stages that have their weights, the modules that no later stage can change. ``ends``: by map,
    the largest module that puts out what the map does, and in a tuple of how many, 0 for none.
    """

    maps: list[list[str]]
    final: list[list[str]]
    ends: dict[str, tuple[str, int]]

    @classmethod
    def of(cls, layer: nn.Module, apply: Callable[[], Any]) -> Stages:
        """What happens when ``apply`` runs the layer once."""
        modules = {name: module for name, module in layer.named_modules() if name}
        stages, calls = list[list[str]](), Counter[str]()
        begun: dict[str, int] = {}  # by module, the stages that had begun when it ended
        ends: dict[str, tuple[str, int]] = {}
        latest: list[Any] = [None] * 4  # the latest map: its input, name, output, a copy of that

        def run(name: str, *args: Any, **options: Any) -> Any:
            calls[name] += 1
            module = modules[name]
            if is_map := isinstance(module, nn.Linear):
                if args[0] is not latest[0]:
                    stages.append([])
                stages[-1].append(name)
                latest[0] = args[0]
            y = type(module).forward(module, *args, **options)
            first = y[0] if isinstance(y, tuple) else y
            if is_map:
                latest[1:] = name, y, y.clone()
            elif (
                first is latest[2]
                and latest[1].startswith(f"{name}.")
                and torch.equal(first, latest[3])  # nothing was added in place
            ):
                ends[latest[1]] = name, len(y) if isinstance(y, tuple) else 0
            if isinstance(first, Tensor) and not any(first is x for x in args):
                begun[name] = len(stages)
            return y

        with answering(modules, {name: functools.partial(run, name) for name in modules}):
            apply()
        once = {name: n for name, n in begun.items() if calls[name] == 1}
        final = [[name for name, n in once.items() if n <= m] for m in range(len(stages) + 1)]
        ends = {m: end for m, end in ends.items() if m in once and end[0] in once}
        return cls(stages, final, ends)


class Layer:
    """A layer's module, what takes it and a state to the next state, its stages, and the modules in it."""

    def __init__(self, module: nn.Module, apply: Callable[..., Any], stages: Stages) -> None:
        self.module, self.apply, self.stages = module, apply, stages
        self.modules = dict(module.named_modules())
        self.maps = {name: m for name, m in self.modules.items() if isinstance(m, nn.Linear)}

    def matrix(self, name: str) -> Tensor:
        """A linear map's weights, and its bias behind them as one more column: (O, D) or (O, D + 1)."""
        own = self.maps[name]
        return own.weight if own.bias is None else torch.cat([own.weight, own.bias[:, None]], 1)

    def set_matrix(self, name: str, matrix: Tensor) -> None:
        """Others in their place."""
        own = self.maps[name]
        if own.bias is not None:
            matrix, own.bias = matrix[:, :-1], _parameter(matrix[:, -1])
        own.weight = _parameter(matrix)


class _Done(Exception):
    """All that was wanted of a layer has run."""


class Remembered:
    """Runs layers again and again while they are fitted, and what is final inside of them only once.

    Args:
        budget: bytes that may be held; what goes beyond is computed again.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        # By layer and inputs, and by name: tensors, or tuples that begin with one.
        self._outputs: dict[tuple[Layer, Hashable], dict[str, Any]] = {}
        self._bytes = 0

    def inputs(
        self, layer: Layer, at: Hashable, state: Any, number: int, norm: str = ""
    ) -> tuple[Tensor, Tensor]:
        """What goes into a stage of a layer, and into a norm before it if that is given; no map of the stage
        runs.

        at: names the inputs that led to ``state``; number: of the stage: those before have their weights.
        """
        found: dict[str, Tensor] = {}

        def stop(x: Tensor) -> Any:
            found["x"] = x
            raise _Done

        def note(x: Tensor) -> Any:
            found["stream"] = x
            return before(x)

        forwards = self._forwards(layer, at, number)
        forwards[layer.stages.maps[number][0]] = stop
        if norm:
            before = forwards.get(norm, layer.modules[norm].forward)
            forwards[norm] = note
        with answering(layer.modules, forwards), contextlib.suppress(_Done):
            layer.apply(layer.module, state)
        return found["x"], found.get("stream", found["x"])

    def behind(self, layer: Layer, at: Hashable, state: Any) -> Any:
        """The state behind a layer that has all its weights."""
        with answering(layer.modules, self._forwards(layer, at, len(layer.stages.maps))):
            return layer.apply(layer.module, state)

    def _forwards(self, layer: Layer, at: Hashable, number: int) -> dict[str, Callable[..., Any]]:
        names = layer.stages.final[number]
        return {name: functools.partial(self._answer, layer, at, name) for name in names}

    def _answer(self, layer: Layer, at: Hashable, name: str, *args: Any, **options: Any) -> Any:
        if (y := self._outputs.get((layer, at), {}).get(name)) is None:
            module = layer.modules[name]
            y = type(module).forward(module, *args, **options)
            if isinstance(y, tuple):  # a language model's attention, whose scores nobody needs
                y = (y[0], *(None for _ in y[1:]))
            self._keep(layer, at, name, y)
        return y

    def hold(self, layer: Layer, at: Hashable, x: Tensor) -> None:
        """What a stage takes in, until ``finish``, while there is room."""
        self._keep(layer, at, HELD, x)

    def finish(self, layer: Layer, number: int) -> None:
        """A stage has its weights: what it puts out for each input that is held."""
        for (other, at), own in self._outputs.items():
            if other is layer and (x := own.pop(HELD, None)) is not None:
                self._bytes -= _bytes(x)
                for name in layer.stages.maps[number]:
                    self.put_out(layer, at, name, layer.maps[name](x))

    def put_out(self, layer: Layer, at: Hashable, name: str, y: Tensor) -> None:
        """What a final linear map, and the largest module that ends with it, puts out."""
        end, n = layer.stages.ends.get(name, (name, 0))
        self._keep(layer, at, end, (y, *[None] * (n - 1)) if n else y)

    def _keep(self, layer: Layer, at: Hashable, name: str, output: Any) -> None:
        """Keep an output while there is room. It stands for those of the modules in its own."""
        own = self._outputs.setdefault((layer, at), {})
        if name not in own and self._bytes + _bytes(output) <= self.budget:
            own[name] = output
            self._bytes += _bytes(output)
            for inner in [other for other in own if other.startswith(f"{name}.")]:
                self._bytes -= _bytes(own.pop(inner))


def _bytes(output: Any) -> int:
    return int((output[0] if isinstance(output, tuple) else output).nbytes)


def make_up(
    y: Tensor, lack: Tensor, layer: Layer, expert: Layer, scale: str, residual: float
) -> Tensor:
    """What a map must put out so that the merged residual stream comes nearer to the expert's.

    y: (..., O), the expert's outputs; lack: (..., O), the expert's stream less the merged one's before they
    are added, times ``residual``. scale: the name of a layer scale behind the map, which each has its own of.
    """
    lack = lack.view_as(y)
    ours, theirs = (getattr(m.modules.get(scale), "gamma", None) for m in (layer, expert))  # (O,)
    if ours is None or theirs is None:
        return y + lack
    gap = lack + residual * (theirs - ours) * y
    return y + torch.where(ours.abs() > 1e-12, gap / ours, torch.zeros_like(gap))


def put_out(xx: Tensor, xz: Tensor, experts: Sequence[Layer], names: Sequence[str]) -> Tensor:
    """Products of x with what experts' linear maps put out, from those with what they take in, z.

    xx: (K, N, D, D), whose last column is of products with 1 if the maps have a bias; xz: (K, N, D, Z).
    Returns (K, N, D, sum of O).
    """
    out = []
    for i, expert in enumerate(experts):
        maps = [expert.maps[name] for name in names]
        product = xz[:, i] @ torch.cat([m.weight for m in maps]).T.to(xz.dtype)  # (K, D, sum of O)
        if maps[0].bias is not None:
            product += xx[:, i, :, -1:] * torch.cat([m.bias for m in maps]).to(xz.dtype)
        out.append(product)
    return torch.stack(out, 1)


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.contiguous(), requires_grad=False)
