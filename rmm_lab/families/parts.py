"""A model's weights by owner: the stem, the layers that can be chosen, and a task's head."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rmm_lab.errors import InputError

Weights = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]
UNITS = ("block", "sublayer")  # what an agent decides on at a time


@dataclass(frozen=True)
class Parts:
    """Every tensor of a model in exactly one of three kinds.

    ``stacks``: the numbers of the layers that may follow each other. A ViT has one stack; a T5 has two,
    encoder and decoder, and a layer of one never lands in the other. ``blocks``: where layers are sublayers,
    the numbers of those of each block.
    """

    stem: Weights
    layers: list[Weights]  # names without the layer's own prefix
    head: Weights
    stacks: tuple[range, ...]
    blocks: tuple[range, ...] = ()


def divide(parts: Parts, sublayers: Callable[[Weights], list[Weights]]) -> Parts:
    """The same parts with every block's sublayers as layers of their own, in running order.

    sublayers: a family's way of taking a block apart (attention and MLP of a ViT's, say).
    """
    layers: list[Weights] = []
    stacks: list[range] = []
    blocks: list[range] = []
    for stack in parts.stacks:
        start = len(layers)
        for k in stack:
            own = sublayers(parts.layers[k])
            blocks.append(range(len(layers), len(layers) + len(own)))
            layers += own
        stacks.append(range(start, len(layers)))
    return replace(parts, layers=layers, stacks=tuple(stacks), blocks=tuple(blocks))


def gather(
    layers: Sequence[tuple[int, Weights]], kinds: Sequence[int], shapes: Sequence[Shapes]
) -> list[Weights]:
    """Whole blocks from sublayers in running order: the inverse of ``divide`` for any sequence of them.

    A block takes the sublayers that follow each other in a block's order; what it then lacks is filled
    with zeros, and so adds nothing to what runs through it.

    layers: (number, weights) of one stack. kinds: for each number its place in its block, from 0.
    shapes: for each number the tensors of the block that it comes from.
    """
    out: list[Weights] = []
    for (k, weights), new in zip(layers, begins([k for k, _ in layers], kinds), strict=True):
        if new:
            out.append({name: torch.zeros(shape) for name, shape in shapes[k].items()})
        out[-1] |= weights
    return out


def begins(numbers: Sequence[int], kinds: Sequence[int]) -> list[bool]:
    """For each sublayer of a stack, in running order, whether a new block begins with it."""
    found = [kinds[k] for k in numbers]
    return [i == 0 or found[i] <= found[i - 1] for i in range(len(found))]


def outside_head(weights: Mapping[str, Tensor]) -> Weights:
    """All that is merged: the weights but those of the head."""
    return {k: v for k, v in weights.items() if not k.startswith("head.")}


def fill(shape: nn.Module, weights: Weights) -> nn.Module:
    """A copy of the module ``shape`` that holds ``weights`` themselves, to be run without gradients."""
    return refill(copy.deepcopy(shape), weights)


def refill(module: nn.Module, weights: Weights) -> nn.Module:
    """The module itself, holding ``weights`` in place of its own, to be run without gradients."""
    try:
        module.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise InputError(
            f"expected the weights that config.json describes, found others: {error}"
        ) from error
    return module.eval().requires_grad_(False)
