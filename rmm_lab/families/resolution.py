"""ViTs for images of one size: position embeddings resampled, as timm does when it loads a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from rmm_lab.families.protocol import Model
from rmm_lab.tasks.input_format import InputFormat

Size = tuple[int, int]  # height and width in pixels
M = TypeVar("M", bound=Model)


def one_size(base: M, experts: Sequence[M]) -> tuple[M, list[M]]:
    """Base and experts with position embeddings for one size of images.

    That is the experts', where they agree: a base for 224 pixels was resampled before they were fine-tuned
    at 384, so the change from the resampled base is what they learned. Otherwise it is the base's. Whoever is
    resampled says so in a note. Models whose grids do not fit their sizes stay as they are.
    """
    sizes = [_size(model) for model in (base, *experts)]
    if len(set(sizes)) == 1 or None in sizes:
        return base, list(experts)
    size = sizes[1] if len(set(sizes[1:])) == 1 else sizes[0]
    assert size is not None
    return resampled(base, size), [resampled(expert, size) for expert in experts]


def _size(model: Model) -> Size | None:
    """The size of the images that a model takes; None unless its position embeddings are a grid of that."""
    _, h, w = InputFormat.of(model.config).shape
    grid, tokens = _grid(model, (h, w)), model.weights.get("pos_embed")
    if (
        tokens is None or not 0 <= tokens.shape[1] - grid[0] * grid[1] <= 16
    ):  # class token, registers
        return None
    return h, w


def _grid(model: Model, size: Size) -> Size:
    """How many patches a model cuts from images of a size, down and across."""
    height, width = model.weights["patch_embed.proj.weight"].shape[-2:]
    return size[0] // height, size[1] // width


def resampled(model: M, size: Size) -> M:
    """A model for images of another size, in pixels; itself where that is its own, or it has no grid."""
    from timm.layers import resample_abs_pos_embed

    own = _size(model)
    if own is None or own == size:
        return model
    old, new, tokens = _grid(model, own), _grid(model, size), model.weights["pos_embed"]
    resampled = resample_abs_pos_embed(  # (1, prefix + old, width) -> (1, prefix + new, width)
        tokens, list(new), list(old), num_prefix_tokens=tokens.shape[1] - old[0] * old[1]
    )
    config = copy.deepcopy(model.config)
    config["model_args"] = dict(config.get("model_args") or {}) | {"img_size": list(size)}
    shape = [InputFormat.of(model.config).shape[0], *size]
    config["pretrained_cfg"] = dict(config.get("pretrained_cfg") or {}) | {"input_size": shape}
    note = (
        f"its position embeddings for {own[0]} x {own[1]} pixels are resampled to {size[0]} x {size[1]}, as "
        "timm does"
    )
    return replace(
        model,
        config=config,
        weights=model.weights | {"pos_embed": resampled},
        notes=(*model.notes, note),
    )
