"""Vocabularies of one size: embeddings that are padded, cut, or grown by new tokens.

Embeddings may have more rows than the tokenizer has tokens (T5's 32,128 for 32,100), and fine-tuning may add
tokens. What no tokenizer can produce is cut; new tokens that all experts share are given to the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from rmm_lab.errors import InputError
from rmm_lab.families.protocol import Model
from rmm_lab.tasks.text_task import TOKENIZERS, tokens_of

# Embeddings and heads of T5s and language models.
ROWS = (
    *("shared.weight", "lm_head.weight", "model.embed_tokens.weight", "transformer.wte.weight"),
    "gpt_neox.embed_in.weight",
)
M = TypeVar("M", bound=Model)


def one_vocabulary(base: M, experts: Sequence[M]) -> tuple[M, list[M]]:
    """Base and experts with as many embeddings each, for the same tokens.

    * Rows that no token uses, in none of the models, are cut to the smallest number that a model has.
    * Where all experts have the same new tokens, the base gets their tokenizer. It keeps rows that it has
      for them: those are what the experts began with. Others it gets as the mean over the experts, since what
      they began with is not known: task vectors of such a row hold what the experts do not share.

    Notes say so. Raises InputError where the number of rows differs, and new tokens are not the same.
    """
    name = next((n for n in ROWS if n in base.weights), "")
    known, *others = (_tokens(model) for model in (base, *experts))
    if known is None or any(name not in model.weights for model in experts):
        return base, list(experts)
    if len(base.weights[name]) < _used(known):  # another model's tokenizer: the family refuses it
        return base, list(experts)
    sizes = {len(model.weights[name]) for model in (base, *experts)}
    first = others[0]
    same = first is not None and all(own == first for own in others)
    if same and first is not None and first != known and known.items() <= first.items():
        known = first
        base = _grown(base, experts, _used(known))
    elif len(sizes) > 1:
        _check_no_new_tokens(base, experts, known, others)
    rows = min(len(model.weights[name]) for model in (base, *experts))
    short = next((m for m in experts if len(m.weights[name]) < _used(known)), None)
    if short is not None:
        raise InputError(
            f"expert {short.source!r}: expected {_used(known)} embeddings or more, one for each token of "
            f"base {base.source!r}, found {len(short.weights[name])}; merge only models fine-tuned from one "
            "base"
        )
    if len(sizes) == 1 and rows >= _used(known):
        return base, list(experts)
    cut = [_cut(model, rows) for model in (base, *experts)]
    return cut[0], cut[1:]


def _tokens(model: Model) -> dict[str, int] | None:
    """A model's tokens and their numbers; None for an expert without a tokenizer, which has the base's."""
    folder = model.tokenizer_folder
    if not any((folder / name).is_file() for name in TOKENIZERS):
        return None
    return tokens_of(model.source, folder)


def _used(tokens: Mapping[str, int]) -> int:
    """How many rows the tokens need."""
    return max(tokens.values(), default=-1) + 1


def _check_no_new_tokens(
    base: Model,
    experts: Sequence[Model],
    known: Mapping[str, int],
    tokens: Sequence[Mapping[str, int] | None],
) -> None:
    """InputError for the first expert that has other tokens than the base, and not those of all experts."""
    for expert, own in zip(experts, tokens, strict=True):
        if own is not None and own != known:
            new = sorted(own.keys() - known.keys())
            raise InputError(
                f"expert {expert.source!r}: expected the tokens of base {base.source!r}, or the same new "
                f"ones in all, found {len(new)} new ones ({', '.join(new[:4]) or 'none'}) in this one; "
                "add the same tokens to the base and to every expert before fine-tuning "
                "(tokenizer.add_tokens, model.resize_token_embeddings)"
            )


def _grown(base: M, experts: Sequence[M], rows: int) -> M:
    """The base with the experts' tokenizer, and the mean of their rows where it has none."""
    weights, missing = dict(base.weights), 0
    for name in ROWS:
        have = len(weights.get(name, ()))
        if have and all(name in e.weights for e in experts):
            new = [e.weights[name][have:rows] for e in experts]  # each (new, width)
            missing = max(0, rows - have)
            weights[name] = torch.cat([weights[name], torch.stack(new).mean(0)])  # (rows, width)
    note = "the experts have further tokens: it takes their tokenizer"
    if missing:
        note += (
            f", and the mean of the experts' embeddings for the {missing} that it has no row for"
        )
    return replace(
        base,
        config=base.config | {"vocab_size": max(rows, int(base.config.get("vocab_size") or 0))},
        weights=weights,
        tokens_from=experts[0].tokenizer_folder,
        notes=(*base.notes, note),
    )


def _cut(model: M, rows: int) -> M:
    own = {n: len(model.weights[n]) for n in ROWS if n in model.weights}
    if set(own.values()) == {rows}:
        return model
    weights = model.weights | {n: model.weights[n][:rows] for n in own}
    factors = model.factors and {
        n: (left[:rows] if n in own else left, right) for n, (left, right) in model.factors.items()
    }
    note = f"its {max(own.values())} embeddings are cut to {rows}: the others are of no token"
    config: dict[str, Any] = model.config | {"vocab_size": rows}
    notes = (*model.notes, note)
    return replace(model, config=config, weights=weights, notes=notes, factors=factors)
