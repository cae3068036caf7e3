"""The pool of layers: what an agent can choose from, each layer computed once, when first asked for.

A *source* is an expert (its own layer) or a merging operator (its merge of all experts' layers).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rmm_lab.errors import InputError
from rmm_lab.families.checkpoint import Checkpoint, architecture, check_same_architecture
from rmm_lab.families.parts import UNITS, Parts, Weights, divide, outside_head, refill
from rmm_lab.operators import OPERATORS as ALL
from rmm_lab.operators import RANDOM, OperatorSpec, expand_operators, parse_operator

SCOPES = ("layer", "tensor", "global")


class LayerPool:
    """N experts and M operators over one base, layer by layer.

    Args:
        base: the model that all experts were fine-tuned from.
        experts: N >= 2 checkpoints of the base's architecture.
        names: the experts' names, distinct; a task is called after its expert.
        operators: M specifications such as ``ties`` or ``task_arithmetic:scale=0.5``; a
            ``weighted_average`` without ``expert`` stands for N, one leaning to each expert.
        scope: what an operator sees at once. ``layer``: the flattened layer, as in Eq. 4; ``tensor``:
            each tensor alone; ``global``: the whole model. It matters where an operator trims.
        seed: of the random operators' masks; each operator and layer has a generator of its own, so
            that a mask does not depend on what was asked for before.
        unit: what a layer is: a ``block``, as in the paper, or a ``sublayer``: attention and MLP of a
            block apart.
    """

    def __init__(
        self,
        base: Checkpoint,
        experts: Sequence[Checkpoint],
        names: Sequence[str],
        operators: Sequence[str] = ("task_arithmetic", "ties", "dare"),
        *,
        scope: str = "layer",
        seed: int = 0,
        unit: str = "block",
    ) -> None:
        if len(experts) < 2:
            raise InputError(
                f"experts: expected at least 2 models to merge, found {len(experts)}; name another one"
            )
        if len(names) != len(experts) or len(set(names)) != len(names):
            raise InputError(
                f"experts: expected a distinct name for each, found {', '.join(names)}"
            )
        if scope not in SCOPES:
            raise InputError(f"scope {scope!r}: expected one of {', '.join(SCOPES)}")
        if unit not in UNITS:
            raise InputError(f"unit {unit!r}: expected one of {', '.join(UNITS)}")
        check_same_architecture(base, experts)
        self.base, self.experts, self.names = base, list(experts), tuple(names)
        self.operators: dict[str, OperatorSpec] = {}
        for text in expand_operators(operators, len(experts)):
            spec = parse_operator(text)
            if spec.name in self.operators:
                raise InputError(f"operators: expected each once, found {spec.name!r} twice")
            self.operators[spec.name] = spec
        self.scope, self.seed, self.unit = scope, seed, unit
        if clash := sorted({*ALL, "base"} & set(self.names)):
            raise InputError(
                f"experts: expected names that no operator and no base has, found {clash[0]!r}; "
                "rename its folder"
            )
        self.sources = self.names + tuple(self.operators)  # actions in the order models, operators
        self.n_models, self.n_operators = len(experts), len(self.operators)
        split = self.split
        self._base_parts = split(base.weights)
        # In the base's order: flattened layers must line up whatever order a file has.
        self._parts = [
            split({name: e.weights[name] for name in base.weights if name in e.weights} | e.weights)
            for e in experts
        ]
        for name, expert, parts in zip(self.names, self.experts, self._parts, strict=True):
            base.family.check_head(
                name, expert.source, expert.num_classes, parts.head, self._base_parts.stem
            )
        self.heads = {n: p.head for n, p in zip(self.names, self._parts, strict=True)}
        self.n_layers, self.stacks = len(self._base_parts.layers), self._base_parts.stacks
        self.blocks = self._base_parts.blocks
        self._architecture: Any = None
        self._weights: dict[tuple[str, int], Weights] = {}
        self._modules: dict[tuple[str, int], nn.Module] = {}
        self._spare: dict[
            int, list[nn.Module]
        ] = {}  # of forgotten layers: filling is faster than making
        self._stems: dict[str, nn.Module] = {}
        self._global: dict[str, tuple[Tensor, ...]] = {}
        self._specs = dict(self.operators)

    def split(self, weights: Weights) -> Parts:
        """A model's weights by owner, in layers of this pool's unit."""
        parts = self.base.family.split(weights)
        return parts if self.unit == "block" else divide(parts, self.base.family.sublayers)

    @property
    def architecture(self) -> Any:
        """What runs the layers (a ``ViT`` or a ``T5``), built when first needed: reading stays fast."""
        if self._architecture is None:
            found = architecture(self.base.config, self.unit)
            optional = getattr(found, "optional", {})
            for name, shape in found.shapes.items():
                tensor = self.base.weights.get(name)
                if tensor is None or tuple(tensor.shape) != shape:
                    what = "none" if tensor is None else tuple(tensor.shape)
                    raise InputError(
                        f"base {self.base.source!r}: expected tensor {name!r} of shape {shape} as its "
                        f"config.json says, found {what}; save the model again"
                    )
            for name, tensor in outside_head(self.base.weights).items():
                if name not in found.shapes and optional.get(name) != tuple(tensor.shape):
                    raise InputError(
                        f"base {self.base.source!r}: expected the tensors that its config.json says, "
                        f"found {name!r} of shape {tuple(tensor.shape)} besides; save the model again"
                    )
            self._architecture = found
        return self._architecture

    # Position -1 is the stem: one more group of weights that an operator can merge.

    def layer_weights(self, source: str, k: int) -> Weights:
        """Layer k of a source, name -> tensor: F* of Eq. 3 (an expert's) or Eq. 4 (an operator's)."""
        key = (source, k)
        if key not in self._weights:
            if source == "base":
                self._weights[key] = _group(self._base_parts, k)
            elif source in self.names:
                self._weights[key] = _group(self._parts[self.names.index(source)], k)
            else:
                self._weights[key] = self._merge(source, k)
        return self._weights[key]

    def stem_weights(self, source: str) -> Weights:
        """The weights outside layers and heads from ``base``, an expert or an operator."""
        return self.layer_weights(source, -1)

    def check_stem(self, source: str) -> None:
        """Raise InputError unless ``source`` is ``base``, an expert or an operator."""
        if source != "base" and source not in self.names:
            self._operator(source)

    def forget(self, sources: Iterable[str]) -> None:
        """Free what was computed for operators that are no actions of the pool.

        Modules of theirs may be filled again by the next such operator's weights: hold none of them.
        """
        gone = set(sources) - set(self.sources)
        for (source, k), module in self._modules.items():
            if source in gone:
                self._spare.setdefault(k, []).append(module.to("meta"))  # its shape alone
        for store in (self._weights, self._modules):
            for key in [key for key in store if key[0] in gone]:
                del store[key]
        for source in gone:
            self._stems.pop(source, None)
            self._specs.pop(source, None)
            self._global.pop(source, None)

    def layer(self, source: str, k: int) -> nn.Module:
        """Layer k of a source as a module; the same object at every call."""
        key = (source, k)
        if key not in self._modules:
            weights = self.layer_weights(source, k)
            if spare := self._spare.get(k):
                self._modules[key] = refill(spare.pop(), weights)
            else:
                self._modules[key] = self.architecture.layer(k, weights)
        return self._modules[key]

    def stem(self, source: str) -> nn.Module:
        """The stem of a source as a module; the same object at every call."""
        if source not in self._stems:
            self._stems[source] = self.architecture.stem(self.stem_weights(source))
        return self._stems[source]

    def assemble(self, steps: Sequence[tuple[str, int]], stem: str) -> nn.Module:
        """The real timm or transformers model of a path of (source, layer).

        The head of a ViT holds all tasks' heads.
        """
        for source, k in steps:
            if not 0 <= k < self.n_layers:
                raise InputError(
                    f"layer path: expected layers 0 to {self.n_layers - 1}, found layer {k} of "
                    f"{source!r}; take path.json of a run with these models"
                )
        layers = [(k, self.layer_weights(source, k)) for source, k in steps]
        return self.architecture.assemble(self.stem_weights(stem), layers, self.heads)

    # ------------------------------------------------------------------------------ the operators

    def _operator(self, source: str) -> OperatorSpec:
        """An operator by its specification; a stem may name one that is no action of the pool."""
        if source not in self._specs:
            try:
                self._specs[source] = parse_operator(source)
            except InputError as error:
                raise InputError(
                    f"source {source!r}: expected base, an expert ({', '.join(self.names)}) or an "
                    f"operator; {error}"
                ) from error
        return self._specs[source]

    def _merge(self, source: str, k: int) -> Weights:
        base = _group(self._base_parts, k)
        experts = [_group(parts, k) for parts in self._parts]
        spec = self._operator(source)
        if self.scope == "layer":
            merged = spec(
                _flat(base), torch.stack([_flat(e) for e in experts]), self._mask(spec, k)
            )
            return _unflat(merged, base)
        if self.scope == "tensor":
            generator = self._mask(spec, k)
            return {
                name: spec(tensor, torch.stack([e[name] for e in experts]), generator)
                for name, tensor in base.items()
            }
        if source not in self._global:  # the whole model once, then cut into stem and layers
            order = range(-1, self.n_layers)
            groups = [_group(self._base_parts, j) for j in order]
            stack = [torch.cat([_flat(_group(p, j)) for j in order]) for p in self._parts]
            whole = torch.cat([_flat(g) for g in groups])  # (D,)
            merged = spec(whole, torch.stack(stack), self._mask(spec, -1))  # (N, D) -> (D,)
            self._global[source] = merged.split([len(_flat(g)) for g in groups])
        return _unflat(self._global[source][k + 1], base)

    def _mask(self, spec: OperatorSpec, k: int) -> torch.Generator | None:
        """The generator of a random operator's masks in layer k, from the pool's seed."""
        if spec.function not in RANDOM:
            return None
        digest = hashlib.sha256(f"{self.seed}/{spec.name}/{k}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _group(parts: Parts, k: int) -> Weights:
    return parts.stem if k < 0 else parts.layers[k]


def _flat(weights: Weights) -> Tensor:
    return torch.cat([t.flatten() for t in weights.values()])  # (D,)


def _unflat(vector: Tensor, like: Weights) -> Weights:
    pieces = vector.split([t.numel() for t in like.values()])
    return {name: p.view_as(t) for p, (name, t) in zip(pieces, like.items(), strict=True)}
