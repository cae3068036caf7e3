"""Heads made of text: CLIP's zero-shot classifiers, as FusionBench merges CLIP experts with.

A folder of a CLIP or SigLIP vision tower may hold ``class_embeddings.safetensors``:

* ``class_embeddings`` (classes, P): the text tower's embedding of each class;
* metadata ``label_names``: their names, a list as JSON;
* ``visual_projection.weight`` (P, width) and ``logit_scale`` (a factor), where the expert's weights, or its
  base's, do not hold them.

Logits are logit_scale * cos(projected image, class), Radford et al. 2021, Sec. 2.3.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rmm_lab.errors import InputError
from rmm_lab.families.parts import Weights
from rmm_lab.families.reading import EMBEDDINGS as FILE

_PROJECTION = "visual_projection.weight"
_SCALE = 100.0  # CLIP's largest, at which all of its models end


def read_text_head(
    source: str,
    folder: Path,
    weights: Mapping[str, Tensor],
    width: int,
    of_base: Callable[[], Mapping[str, Tensor]],
) -> tuple[Weights, list[str]]:
    """A model's head from its folder's class embeddings, and the names of its classes.

    Args:
        source: the model's name in messages.
        folder: where the file is.
        weights: the model's, which may hold ``visual_projection.weight`` and ``logit_scale`` (a logarithm).
        width: of the tower's pooled output.
        of_base: gives the base's weights, asked where the model and the file lack the projection.

    Returns ``weight`` (classes, P), with the scale in it, and ``projection`` (P, width); and the names.
    """
    file = folder / FILE
    try:
        with safe_open(file, framework="pt") as tensors:
            found = {name: tensors.get_tensor(name).float() for name in tensors.keys()}  # noqa: SIM118
            names = json.loads((tensors.metadata() or {}).get("label_names", "[]"))
    except (SafetensorError, ValueError) as error:
        raise InputError(
            f"model {source!r}: expected a safetensors file of class embeddings in {file}, found another "
            f"({error}); write it again"
        ) from error
    rows = found.get("class_embeddings", torch.zeros(0))
    projection = found.get(_PROJECTION, weights.get(_PROJECTION))
    held = weights
    if projection is None:
        held = of_base()
        projection = held.get(_PROJECTION)
    if projection is None and rows.dim() == 2 and rows.shape[1] == width:  # SigLIP has none
        projection = torch.eye(width)
    shape = None if projection is None else tuple(projection.shape)
    if rows.dim() != 2 or shape != (rows.shape[-1], width):
        raise InputError(
            f"model {source!r}: expected class_embeddings (classes, P) in {file}, and {_PROJECTION} (P, "
            f"{width}) there or in the model's or its base's weights, found {tuple(rows.shape)} and {shape}; "
            "write both"
        )
    if not isinstance(names, list) or len(names) not in (0, len(rows)):
        raise InputError(
            f"model {source!r}: expected {len(rows)} 'label_names' in the metadata of {file}, found "
            f"{names!r}; write them in the order of the embeddings"
        )
    assert projection is not None
    log = held.get("logit_scale", weights.get("logit_scale"))
    scale = found.get("logit_scale", torch.tensor(_SCALE) if log is None else log.exp())
    head = {"weight": scale * nn.functional.normalize(rows, dim=-1), "projection": projection}
    return head, list(map(str, names))


def project(pooled: Tensor, head: Mapping[str, Tensor]) -> Tensor:
    """What a head made of text reads: (n, width) -> (n, P), each of length 1; other heads: as it is."""
    if "projection" not in head:
        return pooled
    return nn.functional.normalize(nn.functional.linear(pooled, head["projection"]), dim=-1)


def folded(head: Mapping[str, Tensor]) -> Weights:
    """A head that reads pooled outputs alone, for timm: (classes, width).

    Of a head made of text, the logits of an image then have a positive factor, the length of its projection:
    the same classes win.
    """
    if "projection" not in head:
        return dict(head)
    return {"weight": head["weight"] @ head["projection"]}
