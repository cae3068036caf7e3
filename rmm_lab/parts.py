"""A model's weights by owner: the stem, the layers that can be chosen, and a task's head."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from rmm_lab.errors import InputError

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Parts:
    """Every tensor of a model in exactly one of three kinds.

    ``stacks``: the numbers of the layers that may follow each other. A ViT has one stack; a T5 has two,
    encoder and decoder, and a layer of one never lands in the other.
    """

    stem: Weights
    layers: list[Weights]  # names without the layer's own prefix
    head: Weights
    stacks: tuple[range, ...]


def outside_head(weights: Mapping[str, Tensor]) -> Weights:
    """All that is merged: the weights but those of the head."""
    return {k: v for k, v in weights.items() if not k.startswith("head.")}


def fill(shape: nn.Module, weights: Weights) -> nn.Module:
    """A copy of the module ``shape`` that holds ``weights`` themselves, to be run without gradients."""
    module = copy.deepcopy(shape)
    try:
        module.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise InputError(
            f"expected the weights that config.json describes, found others: {error}"
        ) from error
    return module.eval().requires_grad_(False)
