"""A model's weights by owner: the stem, the layers that can be chosen, and a task's head."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rmm_lab.errors import InputError

Weights = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]
Factors = dict[
    str, tuple[Tensor, Tensor]
]  # a matrix's name -> B (out, r) and A (r, in) of its change B A
UNITS = ("block", "sublayer")  # what an agent decides on at a time


@dataclass(frozen=True)
class Parts:
    """The tensors of a model, each in exactly one of three kinds.

    ``stacks``: numbers of the layers that may follow each other: one stack for a ViT, two for a T5, whose
    encoder layers never land in the decoder. ``blocks``: where layers are sublayers, their numbers in each
    block.
    """

    stem: Weights
    layers: list[Weights]  # names without the layer's own prefix
    head: Weights
    stacks: tuple[range, ...]
    blocks: tuple[range, ...] = ()


def split(weights: Mapping[str, Tensor], stacks: Sequence[str], shared: str = "") -> Parts:
    """A model's tensors by owner; ``head.*`` are the head's.

    stacks: what names in each stack's layers start with: ``blocks`` for ``blocks.0.norm1.weight``.
    shared: the name in a layer of a tensor that all layers use, and that is the stem's.
    """
    stem: Weights = {}
    head: Weights = {}
    found: dict[str, dict[int, Weights]] = {stack: {} for stack in stacks}
    pattern = re.compile(rf"({'|'.join(map(re.escape, stacks))})\.(\d+)\.(.+)")
    for name, tensor in weights.items():
        if (match := pattern.fullmatch(name)) and match[3] != shared:
            found[match[1]].setdefault(int(match[2]), {})[match[3]] = tensor
        elif name.startswith("head."):
            head[name.removeprefix("head.")] = tensor
        else:
            stem[name] = tensor
    layers: list[Weights] = []
    ranges: list[range] = []
    for stack, numbered in found.items():
        n = len(numbered)
        if sorted(numbered) != list(range(n)):
            raise InputError(f"expected layers {stack}.0 to {n - 1}, found {sorted(numbered)}")
        ranges.append(range(len(layers), len(layers) + n))
        layers += [numbered[k] for k in range(n)]
    return Parts(stem, layers, head, tuple(ranges))


def join(
    stem: Weights, stacks: Mapping[str, Sequence[Weights]], head: Mapping[str, Tensor] = {}
) -> Weights:
    """The inverse of ``split``: layers renumbered in the order given. stacks: prefix -> layers."""
    weights = dict(stem)
    for stack, layers in stacks.items():
        for k, layer in enumerate(layers):
            weights |= {f"{stack}.{k}.{name}": tensor for name, tensor in layer.items()}
    return weights | {f"head.{name}": tensor for name, tensor in head.items()}


def divide(parts: Parts, sublayer: Callable[[str], int | None]) -> Parts:
    """The same parts with the sublayers of every block as layers, in running order, names unchanged.

    sublayer: the number in its block of a tensor's sublayer, by the tensor's name; see ``Family``.
    """
    layers: list[Weights] = []
    blocks: list[range] = []
    for block in parts.layers:
        found: dict[int, Weights] = {}
        for name, tensor in block.items():
            if (number := sublayer(name)) is None:
                raise InputError(
                    "expected blocks of attention and MLP, each with a norm before it, found "
                    f"{name!r} in a block; merge whole blocks: --unit block"
                )
            found.setdefault(number, {})[name] = tensor
        blocks.append(range(len(layers), len(layers) + len(found)))
        layers += [found[number] for number in sorted(found)]
    stacks = tuple(range(blocks[s.start].start, blocks[s.stop - 1].stop) for s in parts.stacks)
    return replace(parts, layers=layers, stacks=stacks, blocks=tuple(blocks))


Place = tuple[int, nn.Module]  # of a layer: its number in its block, from 0, and the block


def gather(layers: Sequence[tuple[int, Weights]], places: Sequence[Place]) -> list[Weights]:
    """Whole blocks from any sequence of sublayers: the inverse of ``divide``.

    A block takes the sublayers that follow each other in a block's order. Sublayers that it lacks are zeros,
    which add nothing to what runs through it.

    layers: (number, weights) of one stack. places: of each number.
    """
    out: list[Weights] = []
    for (k, weights), new in zip(layers, begins([k for k, _ in layers], places), strict=True):
        if new:
            out.append({n: torch.zeros(t.shape) for n, t in places[k][1].state_dict().items()})
        out[-1] |= weights
    return out


def begins(numbers: Sequence[int], places: Sequence[Place]) -> list[bool]:
    """For each layer of a stack, in running order, whether a new block begins with it."""
    kinds = [places[k][0] for k in numbers]
    return [i == 0 or kind <= kinds[i - 1] for i, kind in enumerate(kinds)]


def shapes_of(weights: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def outside_head(weights: Mapping[str, Tensor]) -> Weights:
    """All that is merged: the weights except the head's."""
    return {k: v for k, v in weights.items() if not k.startswith(("head.", "head_dist."))}


def fill(shape: nn.Module, weights: Weights) -> nn.Module:
    """A copy of the module ``shape`` that holds ``weights`` without copying them; no gradients."""
    return refill(copy.deepcopy(shape), weights)


def refill(module: nn.Module, weights: Weights) -> nn.Module:
    """The module itself, with ``weights`` in place of its former ones; no gradients."""
    own = module.state_dict()
    if own.keys() == weights.keys() and all(t.shape == weights[n].shape for n, t in own.items()):
        modules = dict(module.named_modules())
        for name, tensor in weights.items():  # load_state_dict says what is wrong, and takes longer
            place, _, last = name.rpartition(".")
            if isinstance(tensor, nn.Parameter):  # whoever made it looks at its gradient
                tensor.requires_grad_(False)
            elif isinstance(getattr(modules[place], last), nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=False)
            setattr(modules[place], last, tensor)
        return module.eval()
    module.requires_grad_(False)  # first: what was merged in inference mode cannot take gradients
    try:
        module.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise InputError(
            f"expected the weights that config.json describes, found others: {error}"
        ) from error
    return module.eval()
