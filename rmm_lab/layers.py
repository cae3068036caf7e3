"""What can be chosen at each layer: ``LayerPool`` holds every source's layers, merged when first asked for.

A *source* is an expert (its own layer) or a merging operator (its merge of all experts' layers). Place -1
is the *stem*, all weights outside layers and heads: one more group of weights that an operator can merge.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rmm_lab.errors import InputError
from rmm_lab.families.adapters import factors_of
from rmm_lab.families.checkpoint import Checkpoint, architecture, same_form
from rmm_lab.families.parts import UNITS, Parts, Weights, divide, outside_head, refill
from rmm_lab.formulas.factored import by_matrix
from rmm_lab.operators import (
    MATCHED,
    RANDOM,
    SCOPE,
    OperatorSpec,
    expand_operators,
    parse_operator,
)
from rmm_lab.reward import Path, Step, parse_path, split_stem

SCOPES = ("layer", "tensor", "global")
SCALED = "task_arithmetic"  # the source that takes a step's scales
_TAKEN = ("base", "agent", "skip", "back")  # names that mean something else
Scales = tuple[float, ...]


class LayerPool:
    """N experts and M operators over one base, layer by layer.

    Args:
        base: the model that all experts were fine-tuned from.
        experts: N >= 2 checkpoints of the base's architecture.
        names: of the experts, all different; a task is called after its expert.
        operators: M specifications such as ``ties`` or ``task_arithmetic:scale=0.5``; a
            ``weighted_average`` without ``expert`` stands for N of them, one leading with each expert.
        scope: what an operator sees at once, which matters where it trims. ``layer``: the flattened layer,
            as in Eq. 4; ``tensor``: each tensor alone; ``global``: the whole model. An operator with a scope
            of its own (``operators.SCOPE``) keeps it: matrices, with all else averaged, or tensors.
        seed: of the random operators' masks. Each operator and layer has its own generator, so a mask does
            not depend on what was asked for before.
        unit: what a layer is: a ``block``, as in the paper, or a ``sublayer``, the attention or MLP of one.

    Copies and pickles hold the models alone: whatever is computed from them is computed again.
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
        for name in names:
            _check_name(name)
        if scope not in SCOPES:
            raise InputError(f"scope {scope!r}: expected one of {', '.join(SCOPES)}")
        if unit not in UNITS:
            raise InputError(f"unit {unit!r}: expected one of {', '.join(UNITS)}")
        base, experts = same_form(base, experts)
        self.base, self.experts, self.names = base, list(experts), tuple(names)
        self.operators: dict[str, OperatorSpec] = {}
        for text in expand_operators(operators, len(experts)):
            if text in self.operators:
                raise InputError(f"operators: expected each once, found {text!r} twice")
            self.operators[text] = parse_operator(text)
        self.scope, self.seed, self.unit = scope, seed, unit
        self.sources = self.names + tuple(self.operators)  # actions in the order models, operators
        self.n_models, self.n_operators = len(experts), len(self.operators)
        # What a step's scales are of: the experts, then what no combination of these is.
        looking = (name for name, spec in self.operators.items() if spec.function in MATCHED)
        self.members = self.names + tuple(n for n in looking if not self.depends_on_path(n))
        base_parts = self.split(base.weights)
        self._parts = {"base": base_parts}  # of each model, by its name
        for name, expert in zip(self.names, self.experts, strict=True):
            # In the base's order: flattened layers must line up whatever order a file has.
            weights = {k: expert.weights[k] for k in base.weights if k in expert.weights}
            parts = self._parts[name] = self.split(weights | expert.weights)
            base.family.check_head(
                name, expert.source, expert.num_classes, parts.head, base_parts.stem
            )
        self.heads = {name: self._parts[name].head for name in self.names}
        self.n_layers, self.stacks = len(base_parts.layers), base_parts.stacks
        self.blocks = base_parts.blocks
        # ``engine.calibration.Calibration``: what regmean and least_squares look at.
        self.calibration: Any = None
        self._forget_all()

    def _forget_all(self) -> None:
        self._architecture: Any = None
        self._weights: dict[tuple[Step, Path], Weights] = {}
        self._modules: dict[tuple[Step, Path], nn.Module] = {}  # layers, and stems at place -1
        self._spare: dict[int, list[nn.Module]] = {}  # by layer, to refill: faster than new ones
        self._global: dict[str, tuple[Tensor, ...]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """The models and options, without what can be computed from them."""
        computed = ("_architecture", "_weights", "_modules", "_spare", "_global")
        state = {key: value for key, value in vars(self).items() if key not in computed}
        if not any(spec.function in MATCHED for spec in self.operators.values()):
            state["calibration"] = None  # inputs that nobody looks at
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget_all()

    def split(self, weights: Weights) -> Parts:
        """A model's weights by owner, in layers of this pool's unit."""
        parts = self.base.family.split(weights)
        return parts if self.unit == "block" else divide(parts, self.base.family.sublayer)

    @property
    def architecture(self) -> Any:
        """What runs the layers, built when first needed, so that reading models stays fast."""
        if self._architecture is None:
            found = architecture(self.base.config, self.unit)
            there = {n: tuple(t.shape) for n, t in outside_head(self.base.weights).items()}
            expected = found.shapes | {n: s for n, s in found.optional.items() if n in there}
            for name in expected | there:
                want, have = (shapes.get(name, "none") for shapes in (expected, there))
                if want != have:
                    raise InputError(
                        f"base {self.base.source!r}: expected tensor {name!r} of shape {want} by its "
                        f"config.json, found {have}; save the model again"
                    )
            self._architecture = found
        return self._architecture

    # ------------------------------------------------------------------------------------- layers

    def depends_on_path(self, source: str) -> bool:
        """Whether a source's layer is another one after another path: least squares without ``fit=whole``."""
        function, _, options = source.partition(":")
        return function == "least_squares" and "fit=whole" not in options.split(",")

    def _key(self, step: Step, prefix: Path) -> tuple[Step, Path]:
        """What a layer is kept under: what depends on no path is shared by all."""
        depends = step.layer >= 0 and not step.scales and self.depends_on_path(step.source)
        if depends and not prefix:
            raise InputError(
                f"source {step.source!r}: expected the path before layer {step.layer}, its stem first, found "
                "none; give it as prefix"
            )
        return step, prefix if depends else ()

    def weights(
        self, source: str, k: int, scales: Scales = (), prefix: Path = (), keep: bool = True
    ) -> Weights:
        """A source's weights at place k, name -> tensor: F* of Eq. 3 (an expert's) or Eq. 4 (an operator's).

        source: ``base``, an expert's name, or any operator, whether an action of the pool or not.
        scales: with ``task_arithmetic``, one for each expert, or for each of ``members``.
        prefix: the path before, its stem's step first; only least squares asks for it.
        keep: whether what is merged stays for the next call.
        """
        step = Step(source, k, scales)
        key = self._key(step, prefix)
        if (found := self._weights.get(key)) is None:
            own = self._parts.get(source)
            found = self._merge(*key) if own is None or scales else _group(own, k)
            if keep:
                self._weights[key] = found
        return found

    def layer(self, source: str, k: int, scales: Scales = (), prefix: Path = ()) -> nn.Module:
        """Layer k of a source as a module; the same object at every call with the same prefix."""
        key = self._key(Step(source, k, scales), prefix)
        if key not in self._modules:
            weights = self.weights(source, k, scales, prefix)
            if spare := self._spare.get(k):
                self._modules[key] = refill(spare.pop(), weights)
            else:
                self._modules[key] = self.architecture.layer(k, weights)
        return self._modules[key]

    def stem(self, source: str, scales: Scales = ()) -> nn.Module:
        """The stem of a source as a module; the same object at every call."""
        key = self._key(Step(source, -1, scales), ())
        if key not in self._modules:
            self._modules[key] = self.architecture.stem(self.weights(source, -1, scales))
        return self._modules[key]

    def check_stem(self, source: str) -> None:
        """Raise InputError unless ``source`` is ``base``, an expert or an operator."""
        if source not in self._parts:
            self._operator(source)

    def forget(self, gone: Iterable[str | Step]) -> None:
        """Free what was computed for sources, or for the sources and scales of steps; actions stay.

        Do not use their modules any more: the pool fills them with the weights of the next layer.
        """
        pairs = {(s, ()) if isinstance(s, str) else (s.source, s.scales) for s in gone}
        pairs -= {(s, ()) for s in self.sources if not self.depends_on_path(s)}
        for key in [key for key in self._modules if key[0][::2] in pairs]:
            module, place = self._modules.pop(key), key[0].layer
            if place >= 0:
                self._spare.setdefault(place, []).append(module.to("meta"))  # shapes alone
        for key in [key for key in self._weights if key[0][::2] in pairs]:
            del self._weights[key]
        for source in (s for s, scales in pairs if not scales):
            self._global.pop(source, None)

    def assemble(self, path: Iterable[Step], stem: str = "base") -> nn.Module:
        """The real timm or transformers model of a path; a ViT's classifier holds all tasks' heads.

        stem: where the stem comes from, unless the path starts with a step at place -1.
        """
        first, steps = split_stem(tuple(Step(*step) for step in path), stem)
        for step in steps:
            if not 0 <= step.layer < self.n_layers:
                raise InputError(
                    f"layer path: expected layers 0 to {self.n_layers - 1}, found {str(step)!r}; take "
                    "path.json of a run with these models"
                )
        layers = [
            (step.layer, self.weights(*step, (first, *steps[:i]))) for i, step in enumerate(steps)
        ]
        return self.architecture.assemble(self.weights(*first), layers, self.heads)

    # ------------------------------------------------------------------------------ the operators

    def _operator(self, source: str, scales: Scales = ()) -> OperatorSpec:
        """The operator of a step, which need not be an action of the pool."""
        if scales and source != SCALED:
            raise InputError(f"scales: expected with {SCALED}, found with {source!r}; omit them")
        try:
            if scales:
                return OperatorSpec(source, SCALED, (("scale", scales),))
            return self.operators.get(source) or parse_operator(source, self.n_models)
        except InputError as error:
            raise InputError(
                f"source {source!r}: expected base, an expert ({', '.join(self.names)}) or an "
                f"operator; {error}"
            ) from error

    def _merge(self, step: Step, prefix: Path) -> Weights:
        source, k, scales = step
        operator, groups = self._operator(source, scales), list(self._parts.values())
        if operator.function in MATCHED:
            if self.calibration is None:
                raise InputError(
                    f"source {source!r}: expected calibration inputs, found none; give --calibration N, or "
                    "take search.problem.pool_of(path)"
                )
            if not self.depends_on_path(source):  # its layers follow each other
                prefix = tuple(Step(source, j) for j in range(-1, k))
            return self.calibration.merge(self, operator, step, prefix)
        base, *experts = (_group(parts, k) for parts in groups)
        if len(scales) > self.n_models:
            more = (self.weights(m, k) for m in self.members[self.n_models :])
            experts += [{name: own[name] for name in base} for own in more]
        scope = "layer" if scales else SCOPE[operator.function]
        if scope in ("matrix", "factors"):
            known = factors_of(source, self.experts) if scope == "factors" else []
            own: Any = [_group(self.split(factors), k) for factors in known]
            return by_matrix(operator, base, experts, self.base.family.fused, own)
        scope = self.scope if scope == "pool" else scope
        if scope == "layer":
            stack = torch.stack([_flat(e) for e in experts])  # (N, D)
            return _unflat(operator(_flat(base), stack, self._mask(source, k)), base)
        if scope == "tensor":
            generator, depth = self._mask(source, k), (k + 1) / self.n_layers
            return {
                name: operator(tensor, torch.stack([e[name] for e in experts]), generator, depth)
                for name, tensor in base.items()
            }
        if source not in self._global:  # the whole model once, cut into stem and layers
            places = range(-1, self.n_layers)
            whole, *others = (torch.cat([_flat(_group(p, j)) for j in places]) for p in groups)
            merged = operator(whole, torch.stack(others), self._mask(source, -1))  # (N, D) -> (D,)
            sizes = [len(_flat(_group(groups[0], j))) for j in places]
            self._global[source] = merged.split(sizes)
        return _unflat(self._global[source][k + 1], base)

    def _mask(self, source: str, k: int) -> torch.Generator | None:
        """The generator of a random operator's masks at place k, from the pool's seed."""
        spec = self._operator(source)
        if spec.function not in RANDOM:
            return None
        digest = hashlib.sha256(f"{self.seed}/{spec.name}/{k}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _check_name(name: str) -> None:
    """InputError for an expert's name that is an action's too, or cannot stand in a path's text."""
    if name in _TAKEN or name.partition(":")[0] in SCOPE:
        raise InputError(
            f"expert {name!r}: expected a name that no action, stem or operator has; rename its folder"
        )
    try:
        fits = "@" not in name and parse_path(f"{name}@0") == (Step(name, 0),)
    except InputError:
        fits = False
    if not fits:
        raise InputError(
            f"expert {name!r}: expected a name that can stand in a path, without white space or '@'; "
            "rename its folder"
        )


def _group(parts: Parts, k: int) -> Weights:
    return parts.stem if k < 0 else parts.layers[k]


def _flat(weights: Weights) -> Tensor:
    return torch.cat([t.flatten() for t in weights.values()])  # (D,)


def _unflat(vector: Tensor, like: Weights) -> Weights:
    pieces = vector.split([t.numel() for t in like.values()])
    return {name: p.view_as(t) for p, (name, t) in zip(pieces, like.items(), strict=True)}
