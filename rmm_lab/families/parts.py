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


def divide(parts: Parts, sublayers: Callable[[Weights], list[Weights]]) -> Parts:
    """The same parts with the sublayers of every block as layers, in running order.

    sublayers: takes a block apart, into attention and MLP of a ViT's, say; see ``Family``.
    """
    layers: list[Weights] = []
    stacks: list[range] = []
    blocks: list[range] = []
    for stack in parts.stacks:
        start = len(layers)
        for k in stack:
            first = len(layers)
            layers += sublayers(parts.layers[k])
            blocks.append(range(first, len(layers)))
        stacks.append(range(start, len(layers)))
    return replace(parts, layers=layers, stacks=tuple(stacks), blocks=tuple(blocks))


def gather(
    layers: Sequence[tuple[int, Weights]], kinds: Sequence[int], shapes: Sequence[Shapes]
) -> list[Weights]:
    """Whole blocks from any sequence of sublayers: the inverse of ``divide``.

    A block takes the sublayers that follow each other in a block's order. Sublayers that it lacks are zeros,
    which add nothing to what runs through it.

    layers: (number, weights) of one stack. kinds: place in its block of each number, from 0.
    shapes: of each number, the tensors of its block.
    """
    out: list[Weights] = []
    for (k, weights), new in zip(layers, begins([k for k, _ in layers], kinds), strict=True):
        if new:
            out.append({name: torch.zeros(shape) for name, shape in shapes[k].items()})
        out[-1] |= weights
    return out


def begins(numbers: Sequence[int], kinds: Sequence[int]) -> list[bool]:
    """For each sublayer of a stack, in running order, whether a new block begins with it."""
    places = [kinds[k] for k in numbers]
    return [i == 0 or place <= places[i - 1] for i, place in enumerate(places)]


def outside_head(weights: Mapping[str, Tensor]) -> Weights:
    """All that is merged: the weights except the head's."""
    return {k: v for k, v in weights.items() if not k.startswith("head.")}


def fill(shape: nn.Module, weights: Weights) -> nn.Module:
    """A copy of the module ``shape`` that holds ``weights`` without copying them; no gradients."""
    return refill(copy.deepcopy(shape), weights)


def refill(module: nn.Module, weights: Weights) -> nn.Module:
    """The module itself, with ``weights`` in place of its former ones; no gradients."""
    try:
        module.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise InputError(
            f"expected the weights that config.json describes, found others: {error}"
        ) from error
    return module.eval().requires_grad_(False)
