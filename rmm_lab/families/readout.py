"""What a head reads: a base of transformers' in the form that its experts' classifiers need."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from rmm_lab.families.parts import outside_head
from rmm_lab.families.protocol import Config, Model

M = TypeVar("M", bound=Model)
# What two signatures may differ in where one model is read out in another way.
_READOUT = re.compile(
    r"(?:kind|global_pool|num_prefix_tokens|num_reg_tokens|readout|(?:norm|fc_norm|attn_pool)\..*)"
)


def one_readout(
    base: M, experts: Sequence[M], signature: Callable[[Config], tuple[str, dict[str, Any]]]
) -> tuple[M, list[M]]:
    """A base of transformers' read out as its experts are, where these agree: CLIP's base has no classifier.

    It loses a final norm or a pooling that they do not have; a distillation token that they do not read is
    a token as any other. signature: the family's, see ``Family``.
    """
    (kind, own), *others = (signature(m.config) for m in (base, *experts))
    first, theirs = others[0]
    odd = {key for key in own | theirs if own.get(key) != theirs.get(key)}
    converted = "from" in (base.config.get("rmm_lab") or {})
    if not converted or not (odd or kind != first) or any(other != others[0] for other in others):
        return base, list(experts)
    weights = dict(outside_head(base.weights))
    for old, new in (("dist_token", "reg_token"), ("reg_token", "dist_token")):
        if old in weights and new in experts[0].weights:
            weights[new] = weights.pop(old)
    names = outside_head(experts[0].weights).keys()
    if not names <= weights.keys() or not all(_READOUT.fullmatch(key) for key in odd):
        return base, list(experts)
    dropped = {k: v for k, v in experts[0].config.items() if k != "label_names"}
    config = dropped | {"pretrained_cfg": base.config["pretrained_cfg"]}
    note = "read out as its experts are; its own classifier is left out"
    kept = {name: tensor for name, tensor in weights.items() if name in names}
    return replace(base, config=config, weights=kept, notes=(*base.notes, note)), list(experts)
