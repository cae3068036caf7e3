"""Layers that look at inputs: RegMean and layer-wise least squares of whole models, of any family.

``Calibration`` holds some inputs of each task, never their labels. A layer of the source ``regmean`` depends
on them and on the experts alone. One of ``least_squares`` also depends on the path before it: its linear maps
are fitted in the order in which they run, each to what the merged model so far feeds it.

Nothing is stacked: inputs go through a layer batch by batch, and only their Gram matrices add up. States
between layers are kept within a budget and computed again beyond it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rmm_lab import matching
from rmm_lab.engine import ridge
from rmm_lab.engine.activations import Layer, Means, Remembered, Stages, make_up, put_out, run
from rmm_lab.engine.cache import Cache
from rmm_lab.engine.inputs import FOLDS, Inputs, take
from rmm_lab.errors import InputError
from rmm_lab.families.parts import Weights
from rmm_lab.operators import MATCHED, parse_operator
from rmm_lab.reward import Path, Step

BUDGET = 2**27  # bytes of states between layers
INSIDE = 2**27  # bytes of what is known inside a layer that is being fitted
THEIRS = 2**28  # bytes of what experts' linear maps see, from the second fit of a layer on
ANCHORS = 2**24  # bytes of layers that fits start from
FITTED = 2**28  # bytes of fitted layers, for other paths that begin alike
FEW = 50  # inputs of a task; with fewer, ``ridge=auto`` first asks whether a fit helps at all
READOUT = 0.5  # see ``Calibration.merge``
RESIDUAL = 1.0
COUNTED = 1e-4  # how much the anchor counts beside an embedding's share of all tokens


class _Fit(NamedTuple):
    """How a layer is fitted; see ``Calibration.merge``."""

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
        self._modules: dict[int, list[Layer]] = {}
        self._spare: dict[int, Layer] = {}  # of fits, to be filled again
        self._again = set[int]()  # layers that have been fitted before
        self._stages: dict[int, Stages] = {}
        self._anchors = Cache(ANCHORS)
        self._helps: dict[str, bool] = {}  # operator -> whether it does better than its anchor
        self.notes: list[str] = []  # what a reader of the scores must know about the fits

    def __getstate__(self) -> dict[str, Any]:
        computed = {"_inside": Remembered(INSIDE), "_stages": {}, "_modules": {}, "_spare": {}}
        return super().__getstate__() | computed  # a pickled cache is an empty one

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget()
        vars(self).update(state)

    def _state(
        self, key: tuple, stem: Any, layers: Sequence[Any], arch: Any, i: int, j: int
    ) -> Any:
        """The state of a part after ``layers``, from the longest beginning that is kept.

        key: names the stem, and each layer as one more entry.
        """
        known = depth = len(layers)
        first = len(key) - known
        while known >= 0 and (state := self._cache.get((key[: first + known], i, j))) is None:
            known -= 1
        if known == depth:
            return state
        if known < 0:
            known, state = 0, arch.embed(stem, self._in_turn(i, j))
        for layer in layers[known:]:
            state = arch.apply(layer, state)
        self._store((key, i, j), state, arch)
        return state

    def _store(self, key: tuple, state: Any, arch: Any) -> None:
        """Keep a state, but for no other of its depth: where not all fit, each pass over all parts would
        push out what the next one asks for first."""
        depth = _depth(key)
        self._cache.put(key, state, arch.tensors(state), lambda other: _depth(other) == depth)

    def _expert_state(self, pool: Any, i: int, j: int, k: int) -> Any:
        """The state that expert i's own layer k takes in."""
        name = pool.names[i]
        layers = [pool.layer(name, m) for m in range(k)]
        key = ("expert", name, *range(k))
        return self._state(key, pool.stem(name), layers, pool.architecture, i, j)

    def _experts(self, pool: Any, k: int) -> list[Layer]:
        """Each expert's layer k in a module of its own, since other threads may be running the pool's."""
        if k not in self._modules:
            make = pool.architecture.layer
            self._modules[k] = [Layer(make(k, pool.weights(e, k))) for e in pool.names]
        return self._modules[k]

    @torch.no_grad()
    def drift(self, pool: Any, path: Path) -> np.ndarray:
        """How far a path, its stem's step first, has led each task's inputs from where its expert has them:
        ``|h - h_i|^2 / |h_i|^2`` over all tokens, behind the place of the last step; (N,), 0 for the expert,
        infinity where the states are no numbers.
        """
        (first, *steps), arch = path, pool.architecture
        layers = [pool.layer(*s, prefix=path[: m + 1]) for m, s in enumerate(steps)]
        stem, out = pool.stem(first.source, first.scales), []
        for i in range(pool.n_models):
            far, size = 0.0, 0.0
            for j in self._parts(i):
                ours = arch.stream(self._state(path, stem, layers, arch, i, j))
                theirs = arch.stream(self._expert_state(pool, i, j, path[-1].layer + 1))
                far += float((ours - theirs).square().sum())
                size += float(theirs.square().sum())
            out.append(0.0 if far == 0 else far / size if size and np.isfinite(far) else np.inf)
        return np.array(out)

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
        readout, residual = options.get("readout", READOUT), options.get("residual", RESIDUAL)
        fit = _Fit(weights, ridge, readout, residual)
        return self._least_squares(pool, anchor, step, prefix, fit)

    def _is_better(self, pool: Any, operator: Any) -> bool:
        """Whether fits to either half of the inputs bring every task nearer to its expert's answers on the
        other half than the anchor is: whole models, by KL divergence."""
        if operator.name not in self._helps:
            sources = (operator.name, self._anchor_source(dict(operator.options).get("anchor")))
            helps = min(map(len, self.rows)) > 1
            for fitted, held in ((0, 1), (1, 0)) if helps else ():
                other = copy.copy(pool)  # with nothing computed yet
                other.calibration = self._half(fitted)
                other.calibration._helps[operator.name] = True
                fit, anchor = (self._half(held)._distances(other, s) for s in sources)
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
        arch, found = pool.architecture, []
        whole = tuple(Step(source, k) for k in range(-1, pool.n_layers))
        merged = [pool.layer(*s, prefix=whole[: m + 1]) for m, s in enumerate(whole[1:])]
        for i, name in enumerate(pool.names):
            own = [pool.layer(name, k) for k in range(pool.n_layers)]
            total, n = 0.0, 0
            for j in self._parts(i):
                batch, logs = self._batch(i, j), []
                for stem, layers in ((pool.stem(name), own), (pool.stem(source), merged)):
                    state = arch.embed(stem, batch)
                    for layer in layers:
                        state = arch.apply(layer, state)
                    logs.append(arch.logits(stem, state, pool.heads[name]).double().log_softmax(-1))
                p = logs[0].exp()  # 0 for choices that a row lacks, whose logarithm is no number
                total += float(torch.where(p > 0, p * (logs[0] - logs[1]), 0.0).sum())
                n += len(p)
            found.append(total / n)
        return np.array(found)

    def _anchor(self, pool: Any, anchor: Any, k: int) -> Weights:
        """Merged anew where that is cheap and there is no room, so that no whole large model is kept."""
        source = self._anchor_source(anchor)
        if (found := self._anchors.get((source, k))) is None:
            found = pool.weights(source, k, keep=anchor == "regmean")
            self._anchors.put((source, k), found, found.values(), lambda other: True)
        return found

    @staticmethod
    def _anchor_source(anchor: Any) -> str:
        if not isinstance(anchor, float):
            return "regmean" if anchor == "regmean" else "weight_average"
        return f"task_arithmetic:scale={anchor!r}"

    def _embeddings(self, pool: Any, anchor: Weights, weights: Tensor) -> Weights:
        """A stem whose embeddings are the experts', weighed by how often their tasks use each row."""
        out = dict(anchor)
        total: dict[str, Tensor] = {}
        counts: dict[str, list[Tensor]] = {}
        for i in range(pool.n_models):
            own: dict[str, Tensor] = {}
            for j in self._parts(i):
                for name, n in pool.architecture.embeddings(self._batch(i, j)).items():
                    own[name] = own.get(name, torch.zeros(len(anchor[name]))) + n
            for name, n in own.items():
                counts.setdefault(name, []).append(float(weights[i]) * n / n.sum())
        for name, each in counts.items():
            scale = sum(float(w) for w in weights)
            share = torch.stack(each) / scale  # (N, V)
            rows = torch.stack([pool.weights(e, -1)[name] for e in pool.names])  # (N, V, D)
            total[name] = (share[..., None] * rows).sum(0) + COUNTED * anchor[name]
            out[name] = total[name] / (share.sum(0) + COUNTED)[:, None]
        return out

    def _regmean(self, pool: Any, anchor: Weights, k: int, alpha: float) -> Weights:
        arch, experts = pool.architecture, self._experts(pool, k)
        out = dict(anchor)
        stages = self._stages_of(pool, k)
        for number, names in enumerate(stages.stages):
            grams = Means(1, len(experts), experts[0].maps[names[0]].in_features)
            for i, expert in enumerate(experts):
                for j in self._parts(i):
                    state = self._expert_state(pool, i, j, k)
                    with self._inside.within(expert, (i, j), stages.done[number]):
                        x, _ = run(arch, expert, state, names[0])
                    self._inside.hold(expert, (i, j), x)
                    grams.add(i, x, w=arch.row_weights(expert.module, names[0], state, 0.0))
                self._inside.finish(expert, stages, names)
            gram = grams.take()[0][0]  # (N, D, D)
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

    def _least_squares(
        self, pool: Any, anchor: Weights, step: Step, prefix: Path, fit: _Fit
    ) -> Weights:
        k, arch = step.layer, pool.architecture
        layer, experts = self._spare_layer(arch, k, anchor), self._experts(pool, k)
        _, *steps = prefix
        before = [pool.layer(*s, prefix=prefix[: m + 1]) for m, s in enumerate(steps)]
        prefix = self._by_anchor(pool, prefix)
        first = pool.stem(prefix[0].source, prefix[0].scales)
        writes, stages = arch.writes(layer.module), self._stages_of(pool, k)
        folds, more = FOLDS if fit.ridge == "auto" else 1, k + 1 < pool.n_layers
        for number, names in enumerate(stages.stages):
            maps, done = [layer.maps[name] for name in names], stages.done[number]
            with_bias, d = maps[0].bias is not None, maps[0].in_features
            widths = [m.out_features for m in maps]
            norm, scale = writes.get(names[0], ("", ""))
            # Products with what the experts' maps take in say the same as with what they put out.
            through = not norm and d + with_bias < sum(widths)
            means = Means(folds, len(experts), d, d if through else sum(widths), ones=with_bias)
            for i, expert in enumerate(experts):
                for j in self._parts(i):
                    state = self._state(prefix, first, before, arch, i, j)
                    theirs, their_stream = self._of_expert(pool, (k, i, j), number, norm, through)
                    with self._inside.within(layer, (i, j), done):
                        x, stream = run(arch, layer, state, names[0], norm if fit.residual else "")
                    self._inside.hold(layer, (i, j), x)
                    if norm and fit.residual:
                        lack, [y] = (their_stream - stream) * fit.residual, theirs
                        theirs = [make_up(y, lack, layer, expert, scale, fit.residual)]
                    w = arch.row_weights(layer.module, names[0], state, fit.readout)
                    ranges = self._ranges(i, j, x) if folds > 1 else [slice(None)]
                    means.add(i, x, theirs, w, ranges)
            if (n := int(means.rows.sum())) < d:
                self._note(
                    f"fewer inputs than layers are wide (such as {n} tokens for the {d} inputs of "
                    f"{names[0]}): the ridge holds what they leave open to the anchor"
                )
            xx, xy = means.take()  # (K, N, D, D), (K, N, D, sum of O)
            if through:
                xy = put_out(xx, xy, experts, names)
            with _at(f"least squares at layer {k}, {names[0]}"):
                gram = ridge.Folds(xx, fit.weights)
            for name, products in zip(names, xy.split(widths, -1), strict=True):
                start = anchor[f"{name}.weight"]
                if with_bias:
                    start = torch.cat([start, anchor[f"{name}.bias"][:, None]], 1)  # (O, D + 1)
                with _at(f"least squares at layer {k}, {name}"):
                    solved = gram.solution(products, start, fit.ridge)  # (O, D)
                layer.set_map(name, solved)
            if more or names is not stages.stages[-1]:
                self._inside.finish(layer, stages, names)
        done = stages.done[-1]
        for i in range(len(experts)) if more else ():  # the next layer asks for these states
            for j in self._parts(i):
                state = self._state(prefix, first, before, arch, i, j)
                with self._inside.within(layer, (i, j), done):
                    self._store(((*prefix, step), i, j), arch.apply(layer.module, state), arch)
                own = (("expert", pool.names[i], *range(k + 1)), i, j)
                if own not in self._cache and not self._knows(pool, k + 1, i, j):
                    with self._inside.within(experts[i], (i, j), done):
                        theirs = self._expert_state(pool, i, j, k)
                        self._store(own, arch.apply(experts[i].module, theirs), arch)
        self._inside.clear()
        self._again.add(k)
        found = layer.weights()
        layer.fill(None)
        self._spare[k] = layer
        return found

    def _by_anchor(self, pool: Any, prefix: Path) -> Path:
        """The path, its stem named by the anchor where that is all it is: fits share what it puts out."""
        stem, *steps = prefix
        function, _, options = stem.source.partition(":")
        has_rows = function not in MATCHED or pool.architecture.embeddings(self._batch(0, 0))
        if has_rows or "lean" in options:
            return prefix
        anchor = dict(parse_operator(stem.source, pool.n_models).options).get("anchor")
        return (Step(self._anchor_source(anchor), -1), *steps)

    def _spare_layer(self, arch: Any, k: int, weights: Weights) -> Layer:
        """A layer that nobody else runs, of copies of weights; filled again where there is one, for speed."""
        own = {name: tensor.clone() for name, tensor in weights.items()}
        if (spare := self._spare.pop(k, None)) is None:
            return Layer(arch.layer(k, own))
        spare.fill(own)
        return spare

    def _of_expert(
        self, pool: Any, at: tuple[int, int, int], number: int, norm: str, through: bool
    ) -> tuple[list[Tensor], Tensor]:
        """What linear maps of an expert's layer put out for a part of its task, or ``through`` what: their
        common input; and what went into ``norm``.

        at: the numbers of the layer, the task and the part; number: of the stage. No path changes these, so
        that every fit of the layer but the first, which may be the only one, finds them.
        """
        k, i, j = at
        if (found := self._theirs.get((at, number))) is None:
            state, stages = self._expert_state(pool, i, j, k), self._stages_of(pool, k)
            expert, names = self._experts(pool, k)[i], stages.stages[number]
            with self._inside.within(expert, (i, j), stages.done[number]):
                x, stream = run(pool.architecture, expert, state, names[0], norm)
            outputs = [expert.maps[name](x) for name in names]
            for name, y in zip(names, outputs, strict=True):
                self._inside.put_out(expert, (i, j), stages, name, y)
            found = [x] if through else outputs, stream
            if k in self._again:  # what has found no room is computed each time
                tensors = [*found[0], stream]
                self._theirs.put((at, number), found, tensors, lambda other: True)
        return found

    def _knows(self, pool: Any, k: int, i: int, j: int) -> bool:
        """Whether all that ``_of_expert`` says of a layer is known for a part."""
        n = len(self._stages_of(pool, k).stages) if k in self._again else 1
        return all(((k, i, j), number) in self._theirs for number in range(n))

    def _stages_of(self, pool: Any, k: int) -> Stages:
        if k not in self._stages:
            layer, state = self._experts(pool, k)[0], self._expert_state(pool, 0, 0, k)
            apply = pool.architecture.apply
            self._stages[k] = Stages.of(lambda: apply(layer.module, state), layer)
        return self._stages[k]


def _depth(key: Any) -> int:
    """Layers before a kept state: a path's key begins with its stem's step, an expert's with two words."""
    (first, *_), *_ = key
    return len(key[0]) - (2 if first == "expert" else 1)


@contextlib.contextmanager
def _at(where: str) -> Iterator[None]:
    """InputErrors say where they were raised."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
