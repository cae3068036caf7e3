"""Layers that look at inputs: RegMean and layer-wise least squares of whole models, of any family.

``Calibration`` holds some inputs of each task, never their labels. A layer of the source ``regmean`` depends
on them and on the experts alone. One of ``least_squares`` also depends on the path before it: its linear maps
are fitted in the order in which they run, each to what the merged model so far feeds it.

A fit of a layer goes stage by stage, a stage being the linear maps that take the same input. ``_products``
runs each task's inputs through the merged layers (``_state``) and the expert's up to the stage, batch by
batch; nothing is stacked, only Gram matrices add up (``activations.Means``). From these ``_solve`` chooses a
ridge and solves the maps (``ridge.Folds``). What is kept on the way has a budget; the rest is computed again.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rmm_lab import matching
from rmm_lab.engine import ridge
from rmm_lab.engine.activations import Layer, Means, Remembered, Stages, make_up, put_out
from rmm_lab.engine.cache import Cache
from rmm_lab.engine.inputs import FOLDS, Inputs, take
from rmm_lab.errors import InputError
from rmm_lab.families.parts import Weights
from rmm_lab.operators import MATCHED, parse_operator
from rmm_lab.reward import Path, Step

BUDGET = 2**27  # bytes of states between layers
INSIDE = 2**27  # bytes of what is known inside a layer that is being fitted
THEIRS = 2**28  # bytes of what experts' linear maps see, from the second fit of a layer on
FITTED = 2**28  # bytes of fitted layers, for other paths that begin alike
FEW = 50  # inputs of a task; with fewer, ``ridge=auto`` first asks whether a fit helps at all
READOUT = 0.5  # see ``Calibration.merge``
RESIDUAL = 1.0
COUNTED = 1e-4  # how much the anchor counts beside an embedding's share of all tokens


class _Fit(NamedTuple):
    """A layer that is being fitted; for the options, from ``weights`` on, see ``Calibration.merge``."""

    pool: Any
    step: Step
    prefix: Path  # what feeds it
    layer: Layer  # of the anchor's weights, and stage by stage the fitted ones
    weights: Tensor
    ridge: Any
    readout: float
    residual: float


class Calibration(Inputs):
    """Inputs of each task, and the layers that are matched to them; the arguments are those of ``Inputs``."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._forget()

    def anew(self) -> Calibration:
        """The same inputs, with nothing computed yet."""
        new = type(self).__new__(type(self))  # copy.copy would take the tasks away, as pickle does
        vars(new).update(vars(self))
        new._forget()
        return new

    def _forget(self) -> None:
        self._cache, self._fitted = Cache(BUDGET), Cache(FITTED)
        self._theirs, self._inside = Cache(THEIRS), Remembered(INSIDE)
        self._layers: dict[int, list[Layer]] = {}  # of the experts
        self._stems: dict[str, str] = {}
        self._again = set[int]()  # layers that have been fitted before
        self._helps: dict[str, bool] = {}  # operator -> whether it does better than its anchor
        self.notes: list[str] = []  # what a reader of the scores must know about the fits

    def __getstate__(self) -> dict[str, Any]:
        computed = {"_inside": Remembered(INSIDE), "_layers": {}}
        return super().__getstate__() | computed  # a pickled cache is an empty one

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget()
        vars(self).update(state)

    def _state(self, pool: Any, path: Path, i: int, j: int) -> Any:
        """The state of part j of task i behind a path, its stem's step first, from the longest beginning that
        is kept."""
        arch, key, known = pool.architecture, self._key(pool, path), len(path)
        while known and (state := self._cache.get((key[:known], i, j))) is None:
            known -= 1
        if known == len(path):
            return state
        if not known:
            stem = pool.stem(path[0].source, path[0].scales)
            known, state = 1, arch.embed(stem, self._in_turn(i, j))
        for at in range(known, len(path)):
            state = arch.apply(pool.layer(*path[at], prefix=path[:at]), state)
        self._store(pool, path, i, j, state)
        return state

    def _store(self, pool: Any, path: Path, i: int, j: int, state: Any) -> None:
        """Keep a state, but for no other of its depth: where not all fit, each pass over all parts would
        push out what the next one asks for first."""
        key, tensors = (self._key(pool, path), i, j), pool.architecture.tensors(state)
        self._cache.put(key, state, tensors, lambda other: len(other[0]) == len(path))

    def _key(self, pool: Any, path: Path) -> Path:
        """The path, its stem named by the anchor where that is all it is: fits share what it puts out."""
        stem, *steps = path
        if (source := stem.source) not in self._stems:
            known = source.partition(":")[0] in MATCHED
            if known and not pool.architecture.embeddings(self._batch(0, 0)):
                options = dict(parse_operator(source, pool.n_models).options)
                source = self._anchor_source(options.get("anchor"))
            self._stems[stem.source] = source
        return (stem._replace(source=self._stems[stem.source]), *steps)

    def _experts(self, pool: Any, k: int) -> list[Layer]:
        """Each expert's layer k in a module of its own, since other threads may be running the pool's."""
        if k not in self._layers:
            arch, state = pool.architecture, self._state(pool, _whole(pool.names[0], k), 0, 0)
            modules = [arch.layer(k, pool.weights(e, k)) for e in pool.names]
            stages = Stages.of(modules[0], lambda: arch.apply(modules[0], state))
            self._layers[k] = [Layer(module, arch.apply, stages) for module in modules]
        return self._layers[k]

    def _all_parts(self) -> list[tuple[int, int]]:
        """The numbers of each task and part."""
        return [(i, j) for i in range(len(self.rows)) for j in self._parts(i)]

    @torch.no_grad()
    def drift(self, pool: Any, path: Path) -> np.ndarray:
        """How far a path, its stem's step first, has led each task's inputs from where its expert has them:
        ``|h - h_i|^2 / |h_i|^2`` over all tokens, behind the place of the last step; (N,), 0 for the expert,
        infinity where the states are no numbers.
        """
        far, size = np.zeros((2, pool.n_models))
        for i, j in self._all_parts():
            paths = path, _whole(pool.names[i], path[-1].layer + 1)
            ours, theirs = (pool.architecture.stream(self._state(pool, p, i, j)) for p in paths)
            far[i] += float((ours - theirs).square().sum())
            size[i] += float(theirs.square().sum())
        pairs = zip(far, size, strict=True)
        return np.array(
            [0 if f == 0 else f / s if s and np.isfinite(f) else np.inf for f, s in pairs]
        )

    # --------------------------------------------------------------------------- the merges

    @torch.no_grad()
    def merge(self, pool: Any, operator: Any, step: Step, prefix: Path) -> Weights:
        """The weights of a step whose operator is ``regmean`` or ``least_squares``; place -1 is the stem.

        Linear maps are matched. Embeddings, linear maps of one-hot inputs, are weighed by how often each task
        uses a row. Norms, positions and all else are the anchor's.

        pool: the ``LayerPool``; prefix: the path before, its stem's step first. Options of least squares:

        * weights: one for each task; ``lean``, in a pool's list of operators, stands for N of them;
        * fit: ``path``, or ``whole``, whose layers follow each other alone, whatever path they are put into;
        * anchor: ``average``, ``regmean``, or a scale of task arithmetic;
        * ridge: a number, or ``auto``: for each map the one that does best on held-out inputs;
        * readout: the class token's share among a ViT's tokens; 0: all count alike, as in PLeaS;
        * residual: how much of what the merged residual stream lacks against the expert's the maps that
          write to it make up for, from 0, as in PLeaS, to 1.
        """
        if (found := self._fitted.get((step, prefix))) is None:
            found = self._merge(pool, operator, step, prefix)
            self._fitted.put((step, prefix), found, found.values())
        return found

    def _merge(self, pool: Any, operator: Any, step: Step, prefix: Path) -> Weights:
        options, k = dict(operator.options), step.layer
        if operator.function == "regmean":
            anchor = self._anchor(pool, None, k)
            if k < 0:
                return self._embeddings(pool, anchor, torch.ones(pool.n_models))
            return self._regmean(pool, anchor, k, options.get("alpha", 0.9))
        if "lean" in options:
            raise InputError(
                f"source {operator.name!r}: expected weights, found lean, which stands for one operator per "
                "expert; name it among a pool's operators"
            )
        weights = torch.tensor(options.get("weights", (1.0,) * pool.n_models), dtype=torch.float64)
        anchor = self._anchor(pool, options.get("anchor"), k)
        ridge, few = options.get("ridge", "auto"), min(map(len, self.rows)) < FEW
        if ridge == "auto" and few and not self._is_better(pool, operator):
            self._note("a fit to so few inputs did not help every task, so the anchor stays")
            return anchor
        if k < 0:
            return self._embeddings(pool, anchor, weights)
        arch, stages = pool.architecture, self._experts(pool, k)[0].stages
        layer = Layer(arch.layer(k, anchor), arch.apply, stages)
        readout, residual = options.get("readout", READOUT), options.get("residual", RESIDUAL)
        fit = _Fit(pool, step, prefix, layer, weights, ridge, readout, residual)
        return self._least_squares(fit)

    def _is_better(self, pool: Any, operator: Any) -> bool:
        """Whether fits to either half of the inputs bring every task nearer to its expert's answers on the
        other half than the anchor is: whole models, by KL divergence."""
        if operator.name not in self._helps:
            sources = (operator.name, self._anchor_source(dict(operator.options).get("anchor")))
            helps = min(map(len, self.rows)) > 1
            for fitted, held in ((0, 1), (1, 0)) if helps else ():
                other = copy.copy(pool)  # with nothing computed yet
                other.calibration, judge = self._half(fitted), self._half(held)
                other.calibration._helps[operator.name] = True
                fit, anchor = (judge._distances(other, source) for source in sources)
                helps = helps and bool((fit < anchor).all())
            self._helps[operator.name] = helps
        return self._helps[operator.name]

    def _half(self, which: int) -> Calibration:
        """Every other input: 0 or 1."""
        half = self.anew()
        half._rows = [own[which::2] for own in self.rows]
        half._cuts, half._batches, half._turned, half._block = [], {}, {}, self._block // 2
        for i, own in enumerate(self._cuts_of()):
            parts = [(j, part[which::2]) for j, part in enumerate(own) if len(part) > which]
            half._cuts.append([rows for _, rows in parts])
            for at, (j, _) in enumerate(parts):
                half._batches[i, at] = take(self._batch(i, j), slice(which, None, 2))
        return half

    def _distances(self, pool: Any, source: str) -> np.ndarray:
        """KL divergence of a source's whole model from each expert on its task: (N,)."""
        total, n = np.zeros((2, pool.n_models))
        for i, j in self._all_parts():
            logs = []
            for model in (pool.names[i], source):
                state = self._state(pool, _whole(model, pool.n_layers), i, j)
                logits = pool.architecture.logits(
                    pool.stem(model), state, pool.heads[pool.names[i]]
                )
                logs.append(logits.double().log_softmax(-1))
            p = logs[0].exp()  # 0 for choices that a row lacks, whose logarithm is no number
            total[i] += float(torch.where(p > 0, p * (logs[0] - logs[1]), 0.0).sum())
            n[i] += len(p)
        return total / n

    def _anchor(self, pool: Any, anchor: Any, k: int) -> Weights:
        """Averages are merged anew each time: that is cheap, and no whole large model is kept."""
        return pool.weights(self._anchor_source(anchor), k, keep=anchor == "regmean")

    @staticmethod
    def _anchor_source(anchor: Any) -> str:
        if not isinstance(anchor, float):
            return "regmean" if anchor == "regmean" else "weight_average"
        return f"task_arithmetic:scale={anchor!r}"

    def _embeddings(self, pool: Any, anchor: Weights, weights: Tensor) -> Weights:
        """A stem whose embeddings are the experts', weighed by how often their tasks use each row."""
        out = dict(anchor)
        counts: dict[str, list[Tensor]] = {}
        for i in range(pool.n_models):
            own: dict[str, Tensor] = {}
            for j in self._parts(i):
                for name, n in pool.architecture.embeddings(self._batch(i, j)).items():
                    own[name] = own.get(name, torch.zeros(len(anchor[name]))) + n
            for name, n in own.items():
                counts.setdefault(name, []).append(float(weights[i]) * n / n.sum())
        for name, each in counts.items():
            share = torch.stack(each) / sum(float(w) for w in weights)  # (N, V)
            rows = torch.stack([pool.weights(e, -1)[name] for e in pool.names])  # (N, V, D)
            total = (share[..., None] * rows).sum(0) + COUNTED * anchor[name]
            out[name] = total / (share.sum(0) + COUNTED)[:, None]
        return out

    def _regmean(self, pool: Any, anchor: Weights, k: int, alpha: float) -> Weights:
        out, experts = dict(anchor), self._experts(pool, k)
        for number, names in enumerate(experts[0].stages.maps):
            means = Means(1, len(experts), experts[0].maps[names[0]].in_features)
            for i, j in self._all_parts():
                x, *_ = self._run_expert(pool, k, i, j, number)
                state = self._state(pool, _whole(pool.names[i], k), i, j)
                w = pool.architecture.row_weights(experts[i].module, names[0], state, 0.0)
                means.add(i, x, w=w)
            gram = means.take()[0][0]  # (N, D, D)
            for name in names:
                key = f"{name}.weight"
                own = torch.stack([pool.weights(e, k)[key] for e in pool.names])  # (N, O, D)
                with _at(f"regmean at layer {k}, {name}"):
                    out[key] = matching.regmean(gram, own, alpha=alpha).contiguous()
        self._inside.clear()
        return out

    def _note(self, text: str) -> None:
        if not any(note[:10] == text[:10] for note in self.notes):  # once of each kind
            self.notes.append(text)

    def _least_squares(self, fit: _Fit) -> Weights:
        """The layer's weights, fitted one stage after the other, since each feeds those behind it."""
        layer, k = fit.layer, fit.step.layer
        for number, names in enumerate(layer.stages.maps):
            self._solve(fit, names, *self._products(fit, number))
            self._inside.finish(layer, number)
        if k + 1 < fit.pool.n_layers:
            self._hand_on(fit)
        self._inside.clear()
        self._again.add(k)
        return dict(layer.module.state_dict())

    def _products(self, fit: _Fit, number: int) -> tuple[Tensor, Tensor]:
        """Means of a stage's inputs times themselves, and times what its maps should put out, over the rows
        of each fold and task: (K, N, D, D), (K, N, D, sum of O)."""
        pool, k, layer, arch = fit.pool, fit.step.layer, fit.layer, fit.pool.architecture
        experts, names = self._experts(pool, k), layer.stages.maps[number]
        maps = [layer.maps[name] for name in names]
        d, o = maps[0].in_features, sum(m.out_features for m in maps)
        with_bias = maps[0].bias is not None
        norm, scale = arch.writes(layer.module).get(names[0], ("", ""))
        # Products with what the experts' maps take in, if that is less, say the same as with their outputs.
        through = not norm and d + with_bias < o
        folds = FOLDS if fit.ridge == "auto" else 1
        means = Means(folds, len(experts), d, d if through else o, ones=with_bias)
        for i, j in self._all_parts():
            state, seen = self._state(pool, fit.prefix, i, j), norm if fit.residual else ""
            ys, their_stream = self._of_expert(pool, k, i, j, number, norm, through)
            x, stream = self._inside.inputs(layer, (i, j), state, number, seen)
            self._inside.hold(layer, (i, j), x)
            if seen:
                lack = (their_stream - stream) * fit.residual
                ys = [make_up(ys[0], lack, layer, experts[i], scale, fit.residual)]
            w = arch.row_weights(layer.module, names[0], state, fit.readout)
            means.add(i, x, ys, w, self._ranges(i, j, x) if folds > 1 else [slice(None)])
        if (n := means.rows) < d:
            self._note(
                f"fewer inputs than layers are wide (such as {n} tokens for the {d} inputs of "
                f"{names[0]}): the ridge holds what they leave open to the anchor"
            )
        xx, xy = means.take()
        return xx, put_out(xx, xy, experts, names) if through else xy

    def _solve(self, fit: _Fit, names: list[str], xx: Tensor, xy: Tensor) -> None:
        """Fit a stage's maps to its products, see ``_products``."""
        with _at(f"least squares at layer {fit.step.layer}, {names[0]}"):
            folds = ridge.Folds(xx, fit.weights)
        widths = [fit.layer.maps[name].out_features for name in names]
        for name, own in zip(names, xy.split(widths, -1), strict=True):
            with _at(f"least squares at layer {fit.step.layer}, {name}"):
                solved = folds.solution(own, fit.layer.matrix(name), fit.ridge)
            fit.layer.set_matrix(name, solved)

    def _hand_on(self, fit: _Fit) -> None:
        """Keep the states behind the layer, of the path and of the experts: the next layer asks for them, and
        little is left to compute."""
        pool, k = fit.pool, fit.step.layer

        def keep(layer: Layer, path: Path, i: int, j: int) -> None:
            before = self._state(pool, path[:-1], i, j)
            self._store(pool, path, i, j, self._inside.behind(layer, (i, j), before))

        for i, j in self._all_parts():
            keep(fit.layer, (*fit.prefix, fit.step), i, j)
            own = _whole(pool.names[i], k + 1)
            if (own, i, j) not in self._cache and not self._knows(k + 1, i, j):
                keep(self._experts(pool, k)[i], own, i, j)

    def _run_expert(
        self, pool: Any, k: int, i: int, j: int, number: int, norm: str = ""
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """What a stage of expert i's layer k takes in and puts out for part j of its task, and what goes into
        ``norm``."""
        expert, state = self._experts(pool, k)[i], self._state(pool, _whole(pool.names[i], k), i, j)
        x, stream = self._inside.inputs(expert, (i, j), state, number, norm)
        names = expert.stages.maps[number]
        ys = [expert.maps[name](x) for name in names]
        for name, y in zip(names, ys, strict=True):
            self._inside.put_out(expert, (i, j), name, y)
        return x, ys, stream

    def _of_expert(
        self, pool: Any, k: int, i: int, j: int, number: int, norm: str, through: bool
    ) -> tuple[list[Tensor], Tensor]:
        """``_run_expert`` with the outputs alone, or, ``through`` the maps, with the input alone.

        No path changes these, so that every fit of the layer but the first, which may be the only one, keeps
        and finds them.
        """
        key = (k, i, j, number)
        if (found := self._theirs.get(key)) is None:
            x, ys, stream = self._run_expert(pool, k, i, j, number, norm)
            found = [x] if through else ys, stream
            if k in self._again:  # what has found no room is computed each time
                self._theirs.put(key, found, [*found[0], stream], lambda other: True)
        return found

    def _knows(self, k: int, i: int, j: int) -> bool:
        """Whether all that ``_of_expert`` says of a layer is known for a part."""
        stages = range(len(self._layers[k][i].stages.maps)) if k in self._again else [0]
        return all((k, i, j, number) in self._theirs for number in stages)


def _whole(source: str, k: int) -> Path:
    """What leads to layer k of one source's whole model."""
    return tuple(Step(source, m) for m in range(-1, k))


@contextlib.contextmanager
def _at(where: str) -> Iterator[None]:
    """InputErrors say where they were raised."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
