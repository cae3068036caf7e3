"""One layer at work: what its linear maps take in and put out, for any family."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rmm_lab.engine.ridge import WIDE
from rmm_lab.families.parts import Weights

BAND = 64  # rows of a symmetric product that are computed at a time; in float32 four times as many
CACHED = 2**19  # bytes of rows that are summed up at a time


class Means:
    """Weighted means of products, streamed: ``sum w x [x | y]' / sum w`` for each fold and task.

    d: how many numbers a row x has; o: how many y has; ones: whether each x has a 1 behind it, which is not
    given. Of rows' products with themselves only the upper bands add up; ``take`` mirrors them.
    """

    def __init__(self, folds: int, tasks: int, d: int, o: int = 0, *, ones: bool = False) -> None:
        self.ones, self.dtype = ones, torch.float64 if d + ones <= WIDE else torch.float32
        self.total = torch.zeros(folds, tasks, d + ones, d + ones + o, dtype=self.dtype)
        self.rows = torch.zeros(folds, tasks, dtype=torch.int64)
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
        """Rows of a task, one range of them for each fold. Wide ones add up in float32, for speed.

        x: (..., D); ys: (..., O) of any O that add up; w: (...), None for 1. Rows of w = 0 do not count.
        """
        x, ys = x.flatten(0, -2), [y.flatten(0, -2) for y in ys]
        w = None if w is None else w.flatten()
        padded = w is not None and not bool((w > 0).all())
        for fold, rows in enumerate(folds):
            some: Any = rows
            if padded and w is not None:  # what padding holds need be no number
                some = (w[rows] > 0).nonzero().squeeze(1) + (rows.start or 0)
            self._add(fold, task, x[some], [y[some] for y in ys], None if w is None else w[some])

    def _add(self, fold: int, task: int, x: Tensor, ys: list[Tensor], w: Tensor | None) -> None:
        """Some rows at a time, so that what float64 holds of them stays in the processor's cache."""
        total, (n, d) = self.total[fold, task], x.shape  # (D, D + O)
        few = max(256, CACHED // (d * 8)) if self.dtype == torch.float64 else n
        for start in range(0, n, few or 1):
            some = slice(start, start + few)
            rows = x[some].to(self.dtype)
            share = None if w is None else w[some].to(self.dtype)
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
        self.rows[fold, task] += n

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


class Layer:
    """A layer's module, and the modules in it by name, looked up once."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.modules = module, dict(module.named_modules())
        self.maps = {name: m for name, m in self.modules.items() if isinstance(m, nn.Linear)}
        self._places = {
            name: (self.modules[name.rpartition(".")[0]], name.rpartition(".")[2])
            for name in module.state_dict()
        }

    def weights(self) -> Weights:
        """By name, without gradients."""
        return {name: getattr(*place).detach() for name, place in self._places.items()}

    def set_map(self, name: str, solved: Tensor) -> None:
        """Other weights for a linear map: (O, D), or (O, D + 1) with the bias behind them."""
        own = self.maps[name]
        if own.bias is not None:
            solved, own.bias = solved[:, :-1], parameter(solved[:, -1])
        own.weight = parameter(solved)

    def fill(self, weights: Weights | None) -> None:
        """Put others in the place of its own, of the same names and shapes; None: none at all."""
        for name, (module, own) in self._places.items():
            setattr(module, own, weights and parameter(weights[name]))


class _Done(Exception):
    """All that was wanted of a layer has run."""


@contextlib.contextmanager
def instead(forwards: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Within the block, modules answer by other functions; whatever happens, not after it."""
    before = []
    try:
        for module, forward in forwards:
            before.append((module, vars(module).get("forward")))
            vars(module)["forward"] = (
                forward  # faster than setattr, and as good for what is no weight
            )
        yield
    finally:
        for module, forward in reversed(before):
            if forward is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = forward


class Stages(NamedTuple):
    """How a layer runs.

    ``stages``: its linear maps in running order, those together that take the same input. ``done``: for each
    number of stages that are final, which modules then put out what they will put out in the end: linear
    maps, the largest modules that hold no others, and those without any that have run. ``ends``: by linear
    map, the largest module that puts out what it does, and in a tuple of how many, 0 for none.
    """

    stages: list[list[str]]
    done: list[list[str]]
    ends: dict[str, tuple[str, int]]

    @classmethod
    def of(cls, apply: Callable[[], Any], layer: Layer) -> Stages:
        """What happens when ``apply`` runs the layer once."""
        called, seen = Counter[str](), list[list[str]]()
        plain: dict[str, int] = {}  # modules without maps -> stages that had begun
        ends: dict[str, tuple[str, int]] = {}
        inside = {
            name: own
            for name in layer.modules
            if name and (own := {m for m in layer.maps if f"{m}.".startswith(f"{name}.")})
        }
        last: list[Any] = [None] * 4  # the latest map: its input, name, output, a copy of that

        def run(name: str, module: nn.Module, *args: Any, **options: Any) -> Any:
            called[name] += 1
            if name in layer.maps:
                if args[0] is last[0]:
                    seen[-1].append(name)
                else:
                    seen.append([name])
                last[0] = args[0]
            y = type(module).forward(module, *args, **options)
            first = y[0] if isinstance(y, tuple) else y
            if name in layer.maps:
                last[1:] = name, y, y.clone()
            elif last[1] in inside.get(name, ()) and same(first, last[2], last[3]):
                ends[last[1]] = name, len(y) if isinstance(y, tuple) else 0
            elif name not in inside and isinstance(y, Tensor) and not list(module.children()):
                plain[name] = -1 if any(same(x, y, y) for x in args) else len(seen)
            return y

        def same(a: Any, b: Tensor, value: Tensor) -> bool:
            """Whether a is b and still has the value."""
            there = isinstance(a, Tensor) and a.data_ptr() == b.data_ptr() and a.shape == b.shape
            return there and torch.equal(a, value)

        parts = [(name, m) for name, m in layer.modules.items() if name]
        with instead((m, functools.partial(run, name, m)) for name, m in parts):
            apply()
        ends = {m: e for m, e in ends.items() if called[m] == called[e[0]] == 1}
        done = []
        for n in range(len(seen) + 1):
            maps = {m for stage in seen[:n] for m in stage}
            fixed = {name for name, own in inside.items() if called[name] and own <= maps}
            large = {x for x in fixed if not any(x.startswith(f"{o}.") for o in fixed)}
            rest = {x for x, begun in plain.items() if 0 <= begun <= n and called[x] == 1}
            rest = {x for x in rest if not any(x.startswith(f"{o}.") for o in large)}
            done.append(sorted(maps | large | rest))
        return cls(seen, done, ends)


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
        # By layer and inputs, and by name: tensors, or tuples that begin with one.
        self._outputs: dict[tuple[Layer, Hashable], dict[str, Any]] = {}
        self._bytes = 0

    def keep(self, layer: Layer, at: Hashable, name: str, output: Any) -> None:
        """What a layer's module put out for some inputs, ``at``, while there is room: half of it for what is
        no linear map and holds none. It stands for the modules in it."""
        own = self._outputs.setdefault((layer, at), {})
        plain = not any(f"{m}.".startswith(f"{name}.") for m in layer.maps)
        room = self.budget // 2 if plain else self.budget
        if name not in own and self._bytes + _bytes(output) <= room:
            own[name] = output
            self._bytes += _bytes(output)
            for old in [o for o in own if o.startswith(f"{name}.")]:
                self._bytes -= _bytes(own.pop(old))

    def hold(self, layer: Layer, at: Hashable, x: Tensor) -> None:
        """What a stage takes in for some inputs, until ``finish``, while there is room."""
        self.keep(layer, at, HELD, x)

    def finish(self, layer: Layer, stages: Stages, names: Sequence[str]) -> None:
        """A stage has its weights: keep what it puts out for each input that is held."""
        for (other, at), own in self._outputs.items():
            if other is layer and (x := own.pop(HELD, None)) is not None:
                self._bytes -= _bytes(x)
                for name in names:
                    self.put_out(layer, at, stages, name, layer.maps[name](x))

    def put_out(self, layer: Layer, at: Hashable, stages: Stages, name: str, y: Tensor) -> None:
        """Keep what a linear map, and the largest module that ends with it, puts out."""
        end, n = stages.ends.get(name, (name, 0))
        self.keep(layer, at, end, (y, *[None] * (n - 1)) if n else y)

    @contextlib.contextmanager
    def within(self, layer: Layer, at: Hashable, names: Iterable[str]) -> Iterator[None]:
        """Within the block, modules of these names answer from what is remembered of them at some inputs."""
        chosen = [(name, layer.modules[name]) for name in names]
        with instead((m, functools.partial(self._answer, layer, at, n, m)) for n, m in chosen):
            yield

    def _answer(
        self, layer: Layer, at: Hashable, name: str, module: Any, *args: Any, **options: Any
    ) -> Any:
        if (y := self._outputs.get((layer, at), {}).get(name)) is None:
            y = type(module).forward(module, *args, **options)
            if isinstance(y, tuple):  # a language model's attention, whose scores nobody needs
                y = (y[0], *(None for _ in y[1:]))
            self.keep(layer, at, name, y)
        return y


HELD = "."  # no module's name


def _bytes(output: Any) -> int:
    return int((output[0] if isinstance(output, tuple) else output).nbytes)


def run(arch: Any, layer: Layer, state: Any, name: str, norm: str = "") -> tuple[Tensor, Tensor]:
    """Run a layer as far as a linear map: what goes into it, and into a norm before it if that is given."""
    found: dict[str, Tensor] = {}

    def stop(x: Tensor) -> Any:
        found["x"] = x
        raise _Done

    forwards: list[tuple[nn.Module, Callable[..., Any]]] = [(layer.modules[name], stop)]
    if norm:
        module = layer.modules[norm]
        forward = module.forward

        def note(x: Tensor) -> Any:
            found["stream"] = x
            return forward(x)

        forwards.append((module, note))
    with instead(forwards), contextlib.suppress(_Done):
        arch.apply(layer.module, state)
    return found["x"], found.get("stream", found["x"])


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


def parameter(tensor: Tensor) -> nn.Parameter:
    """A parameter without gradient."""
    return nn.Parameter(tensor.contiguous(), requires_grad=False)
