"""Layers that look at inputs: RegMean and layer-wise least squares of whole models, for ViTs and T5s alike.

``Calibration`` holds some inputs of each task, never their labels. A layer of the source ``regmean`` depends
on them and on the experts alone. One of ``least_squares`` also depends on the path before it: its linear maps
are fitted in the order in which they run, each to what the merged model so far feeds it.

Nothing is stacked: inputs go through a layer batch by batch, and only their Gram matrices add up. States
between layers are kept within a budget and computed again beyond it.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rmm_lab import matching
from rmm_lab.engine.activations import (
    Mean,
    as_rows,
    linear_maps,
    make_up,
    parameter,
    run,
    stages,
)
from rmm_lab.engine.cache import Cache
from rmm_lab.errors import InputError
from rmm_lab.families.parts import Weights
from rmm_lab.families.shipped import SETS
from rmm_lab.reward import Path
from rmm_lab.tasks.files import absolute

BATCH = 32  # examples that go through a layer at a time
BUDGET = 2**27  # bytes of states between layers
FOLDS = 2  # of the inputs that choose a ridge
READOUT = 0.5  # see ``Calibration.merge``
RESIDUAL = 1.0
COUNTED = 1e-4  # how much the anchor counts beside an embedding's share of all tokens


class _Named(NamedTuple):
    """What is left of a task whose inputs are known."""

    name: str
    source: str


class Calibration:
    """Inputs of each task, as merges see them.

    Args:
        tasks: N tasks, in the order of the pool's experts.
        n: inputs of each task, at most, drawn at random: rows of a split are sorted by class.
        seed: of the draw.
        split: ``train``, or another one that scores nothing.
        rows: in place of a draw, the numbers of each task's rows, N arrays (n_i,).
    """

    def __init__(
        self,
        tasks: Sequence[Any],
        n: int,
        *,
        seed: int = 0,
        split: str = "train",
        rows: Sequence[np.ndarray] | None = None,
    ) -> None:
        if n < 1:
            raise InputError(
                "--calibration: expected 1 or more inputs per task for regmean and least_squares, found "
                f"{n}; give more, or choose other operators"
            )
        self.tasks, self.n, self.split, self.seed = list(tasks), n, split, seed
        self._rows = None if rows is None else list(rows)
        self._batches: dict[tuple[int, int], Any] = {}
        self._forget()

    @property
    def rows(self) -> list[np.ndarray]:
        """Of each task, the numbers of the rows to look at, in order: N arrays (n_i,)."""
        if self._rows is None:
            self._rows = []
            for i, task in enumerate(self.tasks):
                draw = np.random.default_rng((self.seed, i)).permutation(task.size(self.split))
                self._rows.append(np.sort(draw[: self.n]))
        for task, own in zip(self.tasks, self._rows, strict=True):
            if not len(own):
                raise InputError(
                    f"calibration: expected at least one input of task {task.name!r}, found none in its "
                    f"{self.split} split; add some, or choose other operators"
                )
        return self._rows

    def _forget(self) -> None:
        self._cache = Cache(BUDGET)
        self._stages: dict[int, list[list[str]]] = {}
        self._grams: dict[tuple[int, str], Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """With its inputs in place of the tasks, since another process may not have this split."""
        batches = {(i, j): self._batch(i, j) for i in range(len(self.rows)) for j in self._parts(i)}
        computed: dict[str, Any] = {"_cache": None, "_grams": {}, "_stages": {}}
        tasks = [_Named(task.name, task.source) for task in self.tasks]
        return vars(self) | {"tasks": tasks, "_batches": batches} | computed

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def record(self) -> dict[str, Any]:
        """What names the inputs, as JSON: split, seed, and of each task its source, rows and SHA-256."""
        tasks = [
            {
                "task": task.name,
                "source": absolute(task.source, SETS.values()),
                "rows": rows.tolist(),
                "sha256": self._sha256(i),
            }
            for i, (task, rows) in enumerate(zip(self.tasks, self.rows, strict=True))
        ]
        return {"split": self.split, "seed": self.seed, "tasks": tasks}

    @classmethod
    def of_record(cls, tasks: Sequence[Any], record: dict[str, Any]) -> Calibration:
        """The inputs that a record names; InputError where the data have changed since."""
        rows = [np.array(task["rows"], dtype=np.int64) for task in record["tasks"]]
        for task, own in zip(tasks, rows, strict=True):
            if len(own) and own.max() >= task.size(record["split"]):
                raise InputError(
                    f"calibration: expected row {own.max()} in the {record['split']} split of task "
                    f"{task.name!r}, found {task.size(record['split'])} rows; the data have changed since"
                )
        n = max(map(len, rows))
        found = cls(tasks, n, seed=record["seed"], split=record["split"], rows=rows)
        for i, task in enumerate(record["tasks"]):
            if (have := found._sha256(i)) != task["sha256"]:
                raise InputError(
                    f"calibration: expected inputs of task {task['task']!r} with SHA-256 "
                    f"{task['sha256'][:12]}..., found {have[:12]}...; the data have changed since"
                )
        return found

    def _sha256(self, i: int) -> str:
        digest = hashlib.sha256()
        for j in self._parts(i):
            batch = self._batch(i, j)
            for tensor in [batch] if isinstance(batch, Tensor) else batch:
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    # ------------------------------------------------------------------- inputs on their way

    def _parts(self, i: int) -> range:
        return range(-(-len(self.rows[i]) // BATCH))

    def _batch(self, i: int, j: int) -> Any:
        """Part j of task i's inputs, as the models take them."""
        if (i, j) in self._batches:
            return self._batches[i, j]
        rows = self.rows[i][j * BATCH : (j + 1) * BATCH]
        return self.tasks[i].inputs(self.split, rows)

    def _state(
        self, key: tuple, stem: Any, layers: Sequence[Any], arch: Any, i: int, j: int
    ) -> Any:
        """The state of a part after ``layers``, from the longest beginning that is kept.

        key: names the stem, and each layer as one more entry.
        """
        known = len(layers)
        first = len(key) - known
        while known >= 0 and (state := self._cache.get((key[: first + known], i, j))) is None:
            known -= 1
        if known < 0:
            known, state = 0, arch.embed(stem, self._batch(i, j))
        for layer in layers[known:]:
            state, known = arch.apply(layer, state), known + 1
            self._cache.put((key[: first + known], i, j), state, arch.tensors(state))
        return state

    def _expert_state(self, pool: Any, i: int, j: int, k: int) -> Any:
        """The state that expert i's own layer k takes in."""
        name = pool.names[i]
        layers = [pool.layer(name, m) for m in range(k)]
        key = ("expert", name, *range(k))
        return self._state(key, pool.stem(name), layers, pool.architecture, i, j)

    @staticmethod
    def _experts(pool: Any, k: int) -> list[nn.Module]:
        """Each expert's layer k in a module of its own, since other threads may be running the pool's."""
        return [pool.architecture.layer(k, pool.weights(e, k)) for e in pool.names]

    # --------------------------------------------------------------------------- the merges

    @torch.no_grad()
    def merge(self, pool: Any, operator: Any, k: int, prefix: Path) -> Weights:
        """The weights of a ``regmean`` or ``least_squares`` layer at place k; -1 is the stem.

        Linear maps are matched. Embeddings, linear maps of one-hot inputs, are weighed by how often each task
        uses a row. Norms, positions and all else are the anchor's.

        pool: the ``LayerPool``; prefix: the path before, its stem's step first. Options of least squares:

        * weights: one for each task;
        * anchor: ``average``, ``regmean``, or a scale of task arithmetic;
        * ridge: a number, or ``auto``: for each map the one that does best on held-out inputs;
        * readout: the class token's share among a ViT's tokens; 0: all count alike, as in PLeaS;
        * residual: how much of what the merged residual stream lacks against the expert's the maps that
          write to it make up for, from 0, as in PLeaS, to 1.
        """
        options = dict(operator.options)
        if operator.function == "regmean":
            anchor = self._anchor(pool, "average", k)
            if k < 0:
                return self._embeddings(pool, anchor, torch.ones(pool.n_models))
            return self._regmean(pool, anchor, k, options.get("alpha", 0.9))
        weights = torch.tensor(options.get("weights", (1.0,) * pool.n_models), dtype=torch.float64)
        anchor = self._anchor(pool, options.get("anchor", "average"), k)
        if k < 0:
            return self._embeddings(pool, anchor, weights)
        return self._least_squares(
            pool,
            anchor,
            k,
            prefix,
            weights,
            options.get("ridge", "auto"),
            options.get("readout", READOUT),
            options.get("residual", RESIDUAL),
        )

    def _anchor(self, pool: Any, anchor: Any, k: int) -> Weights:
        if anchor == "regmean":
            return pool.weights("regmean", k)
        return pool.weights(
            "weight_average" if anchor == "average" else f"task_arithmetic:scale={anchor!r}", k
        )

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
        for names in self._stages_of(pool, k):
            if (k, names[0]) not in self._grams:
                grams = []
                for i, expert in enumerate(experts):
                    total = Mean()
                    for j in self._parts(i):
                        state = self._expert_state(pool, i, j, k)
                        x, _, _ = run(arch, expert, state, names, outputs=False)
                        rows, w = as_rows(x, arch.row_weights(expert, names[0], state, 0.0))
                        total.add(rows, rows, w)
                    grams.append(total.mean())
                self._grams[k, names[0]] = torch.stack(grams)  # (N, D, D)
            gram = self._grams[k, names[0]]
            for name in names:
                key = f"{name}.weight"
                own = torch.stack([pool.weights(e, k)[key] for e in pool.names])  # (N, O, D)
                with _at(f"regmean at layer {k}, {name}"):
                    out[key] = matching.regmean(gram, own, alpha=alpha).contiguous()
        return out

    def _least_squares(
        self,
        pool: Any,
        anchor: Weights,
        k: int,
        prefix: Path,
        weights: Tensor,
        ridge: float | str,
        readout: float,
        residual: float,
    ) -> Weights:
        arch = pool.architecture
        layer = arch.layer(k, {n: t.clone() for n, t in anchor.items()})
        experts = self._experts(pool, k)
        stem, *steps = prefix
        before = [pool.layer(*s, prefix=prefix[: m + 1]) for m, s in enumerate(steps)]
        first = pool.stem(stem.source, stem.scales)
        writes = arch.writes(layer) if residual else {}
        folds = FOLDS if ridge == "auto" else 1
        linear = linear_maps(layer)
        for names in self._stages_of(pool, k):
            sums = {
                name: [[(Mean(), Mean()) for _ in experts] for _ in range(folds)] for name in names
            }  # name -> fold -> task -> sums of x x' and x y'
            with_bias = linear[names[0]].bias is not None
            for i, expert in enumerate(experts):
                for j in self._parts(i):
                    state = self._state(prefix, first, before, arch, i, j)
                    theirs = self._expert_state(pool, i, j, k)
                    norm, scale = writes.get(names[0], ("", ""))
                    x, _, stream = run(arch, layer, state, names, norm, outputs=False)
                    _, outputs, their_stream = run(arch, expert, theirs, names, norm)
                    w = arch.row_weights(layer, names[0], state, readout)
                    rows, w = as_rows(x, w, ones=with_bias)
                    if norm:
                        [name] = names
                        lack = (their_stream - stream) * residual
                        outputs[name] = make_up(outputs[name], lack, layer, expert, scale, residual)
                    # Whole examples take turns in the folds.
                    n = len(self.rows[i][j * BATCH : (j + 1) * BATCH])
                    fold = ((torch.arange(n) + j * BATCH) % folds).repeat_interleave(len(rows) // n)
                    for f in range(folds):
                        here = ((fold == f) & (w > 0)).nonzero().squeeze(1)
                        x_here, w_here = rows[here], w[here]
                        for name in names:
                            to_x, to_y = sums[name][f][i]
                            y = outputs[name].flatten(0, -2)[here]  # (rows, O)
                            if name == names[0]:
                                to_x.add(x_here, x_here, w_here)
                            to_y.add(x_here, y, w_here)
            for name in names:
                xx, xy = (
                    torch.stack([torch.stack([t[m].mean() for t in fold]) for fold in sums[of]])
                    for m, of in ((0, names[0]), (1, name))
                )  # (K, N, D, D), (K, N, D, O)
                start = anchor[f"{name}.weight"]
                if with_bias:
                    start = torch.cat([start, anchor[f"{name}.bias"][:, None]], 1)  # (O, D + 1)
                with _at(f"least squares at layer {k}, {name}"):
                    best = ridge
                    if isinstance(best, str):
                        best = matching.choose_ridge(xx, xy, weights=weights, anchor=start)
                    there = xx.diagonal(dim1=2, dim2=3).sum(2) > 0  # (K, N)
                    each = (there / there.sum(0).clamp(min=1))[:, :, None, None].double()
                    solved = matching.least_squares(
                        (each * xx).sum(0),
                        (each * xy).sum(0),
                        weights=weights,
                        ridge=best,
                        anchor=start,
                    )  # (O, D)
                if with_bias:
                    solved, linear[name].bias = solved[:, :-1], parameter(solved[:, -1])
                linear[name].weight = parameter(solved)
        return {name: tensor.detach() for name, tensor in layer.state_dict().items()}

    def _stages_of(self, pool: Any, k: int) -> list[list[str]]:
        if k not in self._stages:
            layer, state = self._experts(pool, k)[0], self._expert_state(pool, 0, 0, k)
            self._stages[k] = stages(lambda: pool.architecture.apply(layer, state), layer)
        return self._stages[k]


@contextlib.contextmanager
def _at(where: str) -> Iterator[None]:
    """InputErrors say where they were raised."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
