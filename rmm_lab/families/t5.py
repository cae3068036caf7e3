"""A Hugging Face T5 (t5, flan-t5, t5-v1_1) seen as stem -> encoder blocks -> decoder blocks.

L = encoder blocks, then decoder blocks, in two stacks; or their sublayers (self-attention, the decoder's
cross-attention, feed-forward) as layers of their own. The *stem* is what no block owns: the shared
embeddings (counted once, however often a file holds them), the final norms, ``lm_head`` where it is not
tied, and the relative position biases of both stacks. transformers stores these biases in block 0, but
every block of the stack uses them: a skipped or repeated block 0 must not lose or double them.

A T5 has no head of its own for a task: a choice is scored by its log-probability, so nothing is set apart.
Nothing here uses transformers' cache, which knows a block by its number: a repeated block would read the
keys of its first place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rmm_lab.errors import InputError
from rmm_lab.families.parts import Parts, Weights, begins, fill, gather

NAME = "a T5"
# What stands beside config and weights, and is copied on export: the tokenizer.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
)
_LAYER = re.compile(r"(encoder|decoder)\.block\.(\d+)\.(.+)")
_BIAS = "layer.0.SelfAttention.relative_attention_bias.weight"
_STACKS = ("encoder", "decoder")
_SUBLAYER = re.compile(r"layer\.(\d+)\.")
# In the files of the first T5s, and used by no model: cross-attention has no positions.
_UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
# Arguments that change how weights are used, with transformers' defaults; shapes do not show them.
_ARGS: dict[str, Any] = {
    "d_model": 512,
    "d_kv": 64,
    "num_heads": 8,
    "feed_forward_proj": "relu",
    "layer_norm_epsilon": 1e-6,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
# Whole numbers of config.json; transformers checks the rest.
_WHOLE = (
    *("num_layers", "num_decoder_layers", "d_model", "d_kv", "num_heads", "vocab_size"),
    *("n_positions", "pad_token_id", "decoder_start_token_id"),
)
_LOGITS = 2**18  # logits that are held at once: 1 MiB, what fits a core's cache


class TextBatch(NamedTuple):
    """n questions with C choices each, padded; what a T5 takes where a ViT takes images.

    ``ids``: (n, S) input tokens, ``mask``: (n, S) True for tokens and False for padding; ``choices``:
    (n, C, T) target tokens, ``shifted``: (n, C, T) the same, one to the right behind the start token;
    ``shares``: (n, C, T) how much a token's log-probability counts: 1, or 1 / length, and 0 for padding.
    A choice that a row lacks has only zeros, and is never the best.
    """

    ids: Tensor
    mask: Tensor
    choices: Tensor
    shifted: Tensor
    shares: Tensor


# ------------------------------------------------------------------------------- taking a T5 apart


def once(source: str, weights: Mapping[str, Tensor]) -> Weights:
    """Every tensor once: copies of the shared embeddings are left out, and so is a tied ``lm_head``.

    Raises InputError where the copies differ.
    """
    shared = weights.get("shared.weight")
    if shared is None:  # some files hold it under the encoder's name only
        shared = weights.get("encoder.embed_tokens.weight")
    if shared is None:
        raise InputError(
            f"model {source!r}: expected the weights of a T5 for conditional generation (shared, "
            "encoder.block.0, decoder.block.0, ...), found others; other families are not supported"
        )
    out = {"shared.weight": shared}
    for name, tensor in weights.items():
        if name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
            if not torch.equal(tensor, shared):
                raise InputError(
                    f"model {source!r}: expected {name!r} to equal the shared embeddings, as in every "
                    "T5, found other values; fine-tune it again with tied embeddings"
                )
        elif name == "lm_head.weight":
            if not torch.equal(tensor, shared):
                out[name] = tensor
        elif name not in ("shared.weight", _UNUSED):
            out[name] = tensor
    return out


def canonical(source: str, config: Mapping[str, Any], weights: Weights) -> Weights:
    """The weights, each tensor ``once``, found to be those of the T5 that config.json describes."""
    for key in _WHOLE:
        if config.get(key) is not None and type(config[key]) is not int:
            raise InputError(
                f"model {source!r}: expected {key!r} in its config.json to be a whole number, found "
                f"{config[key]!r}; save the model with transformers again"
            )
    out = once(source, weights)
    counts = [len({m[2] for n in out if (m := _LAYER.fullmatch(n)) and m[1] == s}) for s in _STACKS]
    if not 0 <= (start := _start(config)) < len(out["shared.weight"]):
        raise InputError(
            f"model {source!r}: expected 'decoder_start_token_id' in its config.json to be one of its "
            f"{len(out['shared.weight'])} tokens, found {start}; save the model with transformers again"
        )
    layers = config.get("num_layers", 6)
    said = [layers, config.get("num_decoder_layers") or layers]
    if counts != said:
        raise InputError(
            f"model {source!r}: expected {said[0]} encoder and {said[1]} decoder blocks as its "
            f"config.json says, found weights of {counts[0]} and {counts[1]}; save it again"
        )
    if 0 in counts:
        raise InputError(
            f"model {source!r}: expected at least one block in the encoder and in the decoder, found "
            f"{counts[0]} and {counts[1]}; there is nothing to choose from an empty stack"
        )
    for stack in _STACKS:
        if f"{stack}.block.0.{_BIAS}" not in out:
            raise InputError(
                f"model {source!r}: expected the relative position bias of the {stack} in tensor "
                f"'{stack}.block.0.{_BIAS}', found none; save the model with transformers again"
            )
    return out


def split(weights: Mapping[str, Tensor]) -> Parts:
    """Canonical weights of a T5 by owner: stem, encoder blocks, decoder blocks; no head."""
    stem: Weights = {}
    blocks: dict[str, dict[int, Weights]] = {name: {} for name in _STACKS}
    for name, tensor in weights.items():
        match = _LAYER.fullmatch(name)
        if match is None or match[3] == _BIAS:
            stem[name] = tensor
        else:
            blocks[match[1]].setdefault(int(match[2]), {})[match[3]] = tensor
    for stack, found in blocks.items():
        if sorted(found) != list(range(len(found))):
            raise InputError(
                f"expected layers {stack}.block.0 to {len(found) - 1}, found {sorted(found)}"
            )
    n = len(blocks["encoder"])
    layers = [blocks[stack][k] for stack in _STACKS for k in range(len(blocks[stack]))]
    return Parts(stem, layers, {}, (range(n), range(n, len(layers))))


def sublayers(block: Weights) -> list[Weights]:
    """A block's weights by sublayer, names unchanged: self-attention, (cross-attention,) feed-forward."""
    found: dict[int, Weights] = {}
    for name, tensor in block.items():
        match = _SUBLAYER.match(name)
        if match is None:
            raise InputError(
                f"expected the sublayers layer.0, layer.1, ... in a block of a T5, found {name!r}; merge "
                "whole blocks: --unit block"
            )
        found.setdefault(int(match[1]), {})[name] = tensor
    return [found[i] for i in sorted(found)]


def join(stem: Weights, encoder: Sequence[Weights], decoder: Sequence[Weights]) -> Weights:
    """The inverse of ``split``: names as transformers has them, blocks renumbered in the order given.

    A stack without blocks has no place for its position bias, and no use for it.
    """
    weights = {k: v for k, v in stem.items() if not k.endswith(_BIAS)}
    for stack, layers in zip(_STACKS, (encoder, decoder), strict=True):
        for k, layer in enumerate(layers):
            if k == 0:
                name = f"{stack}.block.0.{_BIAS}"
                weights[name] = stem[name]
            weights |= {f"{stack}.block.{k}.{name}": tensor for name, tensor in layer.items()}
    return weights


def signature(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """What shapes do not show: number and size of the heads, activation, buckets, special tokens."""
    args = {key: config.get(key, default) for key, default in _ARGS.items()}
    # transformers obeys dense_act_fn, which it writes itself, before feed_forward_proj.
    name = str(args["feed_forward_proj"])
    activation = config.get("dense_act_fn") or {"gated-gelu": "gelu_new"}.get(
        name, name.split("-")[-1]
    )
    return "t5", args | {
        "activation": activation,
        "start": _start(config),
        "scaled": _scaled(config),
    }


def check_head(name: str, source: str, num_classes: int, head: Weights, stem: Weights) -> None:
    """A T5 has no head."""


def _start(config: Mapping[str, Any]) -> int:
    start = config.get("decoder_start_token_id")
    return int((config.get("pad_token_id") or 0) if start is None else start)


def _scaled(config: Mapping[str, Any]) -> bool:
    """Whether outputs are scaled by 1 / sqrt(d_model) before the embeddings: the first T5s, not v1.1."""
    scaled = config.get("scale_decoder_outputs")
    return config.get("tie_word_embeddings") is not False if scaled is None else bool(scaled)


# ------------------------------------------------------------------------- running and rebuilding


@dataclass(frozen=True)
class State:
    """What goes from layer to layer, for n inputs of S tokens with C choices of T tokens.

    ``encoded``: (n, S, width), the encoder's tokens, normed once the decoder has begun; ``decoded``:
    (n, C, T, width) or None before that. ``stem`` and ``batch`` are those that it began with. ``bias``:
    what is added to the scores of the running stack's self-attention, positions and mask, (n or 1, heads,
    S, S) in the encoder, (1, heads, T, T) in the decoder; ``hidden``: (n, 1, 1, S), the mask of the
    encoder's tokens alone.
    """

    stem: T5Stem
    batch: TextBatch
    encoded: Tensor
    bias: Tensor
    hidden: Tensor
    decoded: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """All that it holds, its batch too; what several states share stands in each of them."""
        own = (self.encoded, self.bias, self.hidden, self.decoded, *self.batch)
        return [tensor for tensor in own if tensor is not None]


class T5Stem(nn.Module):
    """A T5 without blocks: what stands before, between and after the two stacks."""

    def __init__(self, config: Any) -> None:
        from transformers.models.t5 import modeling_t5

        super().__init__()
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        buckets = config.relative_attention_num_buckets
        self.encoder_bias = nn.Embedding(buckets, config.num_heads)
        self.decoder_bias = nn.Embedding(buckets, config.num_heads)
        self.encoder_norm, self.decoder_norm = (
            modeling_t5.T5LayerNorm(config.d_model, eps=config.layer_norm_epsilon) for _ in _STACKS
        )
        self.lm_head: nn.Linear | None = None
        self.max_distance = config.relative_attention_max_distance
        self._buckets = modeling_t5.T5Attention._relative_position_bucket

    def positions(self, length: int, *, decoder: bool) -> Tensor:
        """The relative position bias of a stack: (1, heads, length, length)."""
        table = self.decoder_bias if decoder else self.encoder_bias
        at = torch.arange(length, device=table.weight.device)
        bucket = self._buckets(
            at[None, :] - at[:, None],  # (length, length), key minus query
            bidirectional=not decoder,
            num_buckets=table.num_embeddings,
            max_distance=self.max_distance,
        )
        return table(bucket).permute(2, 0, 1)[None]  # (length, length, heads) -> (1, heads, ...)


class Sublayer(nn.Module):
    """One sublayer of a T5's block, under the name that it has there; ``T5.apply`` runs it."""

    def __init__(self, block: Any, number: int) -> None:
        super().__init__()
        self.layer = nn.ModuleDict({str(number): block.layer[number]})
        self.is_decoder = block.is_decoder


class T5:
    """Runs and rebuilds the T5s of one architecture piece by piece.

    ``embed`` -> ``apply`` for each layer of a path -> ``logits`` equals transformers' own forward pass
    without a cache. What goes from one to the next is a ``State``.

    Args:
        config: transformers' config.json of any model of the architecture.
        unit: what a layer is: a ``block``, or a ``sublayer`` of one.
    """

    def __init__(self, config: Mapping[str, Any], unit: str = "block") -> None:
        from transformers.activations import ACT2FN
        from transformers.models.t5.modeling_t5 import T5Block

        self.config, self.unit = dict(config), unit
        self._hf = hf = _hf_config(config)
        if hf.dense_act_fn not in ACT2FN:
            raise InputError(
                "config.json of a T5: expected an activation that transformers knows, found "
                f"{hf.dense_act_fn!r}; save the model with transformers again"
            )
        depths = (hf.num_layers, hf.num_decoder_layers)
        self.scale = hf.d_model**-0.5 if _scaled(config) else 1.0
        with torch.device("meta"):  # shapes only
            self._blocks = []
            for decoder in (False, True):
                hf.is_decoder = decoder
                self._blocks.append(T5Block(hf, has_relative_attention_bias=False, layer_idx=0))
            self._stem = T5Stem(hf)
        self.shapes = {_file_name(k): tuple(v.shape) for k, v in self._stem.state_dict().items()}
        for depth, block, name in zip(depths, self._blocks, _STACKS, strict=True):
            for j in range(depth):
                for key, tensor in block.state_dict().items():
                    self.shapes[f"{name}.block.{j}.{key}"] = tuple(tensor.shape)
        each: list[list[Any]] = [[block] for block in self._blocks]
        if unit == "sublayer":
            each = [[Sublayer(b, i) for i in range(len(b.layer))] for b in self._blocks]
        self._layers = [layer for n, own in zip(depths, each, strict=True) for layer in own * n]
        self.n_layers, border = len(self._layers), depths[0] * len(each[0])
        self.stacks = (range(border), range(border, self.n_layers))
        self._kinds = [
            i for n, own in zip(depths, each, strict=True) for i in [*range(len(own))] * n
        ]
        self.optional = {"lm_head.weight": (hf.vocab_size, hf.d_model)}

    def stem(self, weights: Weights) -> nn.Module:
        """Everything outside the blocks as a module."""
        head = weights.get("lm_head.weight")
        names = {_file_name(name): name for name in self._stem.state_dict()}
        own = {names[key]: value for key, value in weights.items() if key != "lm_head.weight"}
        stem = fill(self._stem, own)
        if head is not None:
            rows, width = head.shape
            shape = nn.Linear(width, rows, bias=False, device="meta")
            stem.lm_head = fill(shape, {"weight": head})
        return stem

    def layer(self, k: int, weights: Weights) -> nn.Module:
        """Layer k, of the encoder or the decoder, as a module that holds ``weights`` without copying."""
        return fill(self._layers[k], weights)

    @staticmethod
    def place(batch: TextBatch, device: torch.device | str, dtype: torch.dtype) -> TextBatch:
        """A batch where the layers are; tokens have no precision."""
        return TextBatch(*(tensor.to(device) for tensor in batch))

    @staticmethod
    def tensors(state: State) -> list[Tensor]:
        """All memory that a state holds."""
        return state.tensors

    def widest(self, state: State) -> int:
        """Numbers per example in the largest tensor of a layer."""
        s, (_, c, t) = state.batch.ids.shape[1], state.batch.choices.shape
        own, heads = self._hf.d_ff, self._hf.num_heads
        return max(heads * s * s, s * own, c * t * own, heads * c * t * max(s, t))

    @staticmethod
    def embed(stem: nn.Module, batch: TextBatch) -> State:
        """A batch -> the encoder's first tokens."""
        encoded = stem.shared(batch.ids)  # type: ignore[operator]
        bias = stem.positions(batch.ids.shape[1], decoder=False)  # type: ignore[operator]
        low = torch.finfo(encoded.dtype).min
        hidden = encoded.new_zeros(batch.mask.shape).masked_fill(~batch.mask, low)[:, None, None]
        if not batch.mask.all():
            bias = bias + hidden  # (n, heads, S, S)
        return State(stem, batch, encoded, bias, hidden)  # type: ignore[arg-type]

    @staticmethod
    def apply(layer: nn.Module, state: State) -> State:
        """One layer, of the stack that it belongs to. The decoder's first ends the encoder.

        All choices of an input share its encoded tokens: cross-attention sees them as one sequence of
        C * T queries, which is the same (it has no positions) and computes keys and values once.
        """
        if layer.is_decoder:
            state = _begin_decoder(state)
        elif state.decoded is not None:
            raise InputError("layer path: expected encoder blocks before decoder blocks")
        tokens = state.decoded if layer.is_decoder else state.encoded
        assert tokens is not None
        shape, width = tokens.shape, tokens.shape[-1]
        parts: Any = layer.layer
        for own in parts.children():
            if hasattr(own, "SelfAttention"):
                tokens = tokens.reshape(-1, shape[-2], width)  # (n C, T, width) in the decoder
                normed = own.layer_norm(tokens)
                tokens = tokens + _attend(own.SelfAttention, normed, normed, state.bias)
                continue
            tokens = tokens.reshape(shape[0], -1, width)  # (n, C T, width) in the decoder
            if hasattr(own, "EncDecAttention"):
                normed = own.layer_norm(tokens)
                mixed = _attend(own.EncDecAttention, normed, state.encoded, state.hidden)
                tokens = tokens + mixed
            else:
                tokens = own(tokens)
        tokens = tokens.reshape(shape)
        if layer.is_decoder:
            return replace(state, decoded=tokens)
        return replace(state, encoded=tokens)

    apply_last = apply  # all positions of the last block count

    def logits(self, stem: nn.Module, state: State, head: Weights) -> Tensor:
        """The log-probability of each choice: state -> (n, C); -inf where a row has no such choice."""
        state = _begin_decoder(state)
        table = stem.shared.weight if stem.lm_head is None else stem.lm_head.weight  # type: ignore[union-attr]
        tokens = stem.decoder_norm(state.decoded) * self.scale  # type: ignore[operator]
        _, c, t, _ = tokens.shape
        rows = max(1, _LOGITS // (c * t * len(table)))  # type: ignore[arg-type]
        parts = []
        for x, target in zip(tokens.split(rows), state.batch.choices.split(rows), strict=True):
            # In float32: a sum of small differences between large numbers.
            log_probs = nn.functional.linear(x, table).float().log_softmax(-1)  # type: ignore[arg-type]
            parts.append(log_probs.gather(-1, target[..., None])[..., 0])  # (rows, C, T)
        total = (torch.cat(parts) * state.batch.shares).sum(-1)  # (n, C)
        return total.masked_fill(state.batch.shares.sum(-1) == 0, -torch.inf)

    def assemble(
        self, stem: Weights, layers: Sequence[tuple[int, Weights]], heads: Mapping[str, Weights]
    ) -> nn.Module:
        """A real T5ForConditionalGeneration with the stacks' own depths; every block is a copy.

        layers: (number in the base, weights) in running order; raises InputError for a layer of the
        encoder behind one of the decoder. Sublayers are put together to blocks again, with zeros for
        those that a block lacks.
        """
        from transformers import T5ForConditionalGeneration

        numbers = [k for k, _ in layers]
        border = self.stacks[1].start
        if any(a >= border > b for a, b in pairwise(numbers)):
            raise InputError(
                f"layer path: expected encoder blocks (0 to {border - 1}) before decoder blocks, found "
                f"the order {numbers}; take path.json of a run with these models"
            )
        stacks = ([x for x in layers if x[0] < border], [x for x in layers if x[0] >= border])
        blocks = [[weights for _, weights in stack] for stack in stacks]
        if self.unit == "sublayer":
            shapes = [
                {k: tuple(v.shape) for k, v in block.state_dict().items()} for block in self._blocks
            ]
            own = [shapes[k >= border] for k in range(self.n_layers)]
            blocks = [gather(stack, self._kinds, own) for stack in stacks]
        weights = join(stem, *blocks)
        config = _hf_config(self.merged_config(numbers, heads, {}))
        model = T5ForConditionalGeneration(config)
        if "lm_head.weight" in weights:
            model.lm_head.weight = nn.Parameter(weights["lm_head.weight"].clone())
        result = model.load_state_dict(weights, strict=False)
        tied = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
        if result.unexpected_keys or not set(result.missing_keys) <= tied:
            raise InputError(
                f"expected the weights that config.json describes, found "
                f"{(result.unexpected_keys + result.missing_keys)[0]!r} out of place"
            )
        return model.eval().requires_grad_(False)

    def merged_config(
        self, numbers: Sequence[int], heads: Mapping[str, Weights], labels: Mapping[str, Sequence]
    ) -> dict[str, Any]:
        """config.json of an assembled model: that of the base with the stacks' own depths."""
        border = self.stacks[1].start
        config = {
            k: v for k, v in self.config.items() if k not in ("rmm_lab", "dtype", "torch_dtype")
        }
        stacks = [[k for k in numbers if k < border], [k for k in numbers if k >= border]]
        if self.unit == "sublayer":  # those that begin a block, in place of all
            stacks = [
                [k for k, new in zip(s, begins(s, self._kinds), strict=True) if new] for s in stacks
            ]
        config["num_layers"], config["num_decoder_layers"] = map(len, stacks)
        if config["num_decoder_layers"] > config["num_layers"]:
            # generate makes its cache as deep as the encoder (transformers 5): IndexError.
            config["use_cache"] = False
        return config | {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}


def _attend(attention: Any, tokens: Tensor, memory: Tensor, bias: Tensor) -> Tensor:
    """T5's attention with the weights of a transformers' module: softmax(q k' + bias) v, unscaled.

    tokens: (n, Q, width) ask, memory: (n, K, width) answers; bias: broadcasts to (n, heads, Q, K).
    The same bits as transformers' own, with fewer copies. Source: Raffel et al. 2020, Sec. 2.1.
    """
    n, heads = len(tokens), attention.n_heads
    q, k, v = (  # (n, Q or K, width) -> (n, heads, Q or K, d_kv)
        nn.functional.linear(x, part.weight).view(n, x.shape[1], heads, -1).transpose(1, 2)
        for x, part in ((tokens, attention.q), (memory, attention.k), (memory, attention.v))
    )
    scores = q @ k.transpose(-1, -2)  # (n, heads, Q, K)
    scores += bias
    mixed = scores.float().softmax(-1).to(v.dtype) @ v  # (n, heads, Q, d_kv)
    return nn.functional.linear(mixed.transpose(1, 2).flatten(2), attention.o.weight)


def _begin_decoder(state: State) -> State:
    """The encoder's end: final norm, and the choices' first tokens in the decoder."""
    if state.decoded is not None:
        return state
    stem: Any = state.stem
    t = state.batch.shifted.shape[-1]
    low = torch.finfo(state.encoded.dtype).min
    future = state.encoded.new_full((t, t), low).triu(1)  # a token must not see later ones
    return replace(
        state,
        encoded=stem.encoder_norm(state.encoded),
        bias=stem.positions(t, decoder=True) + future,  # (1, heads, T, T)
        decoded=stem.shared(state.batch.shifted),  # (n, C, T) -> (n, C, T, width)
    )


def _file_name(name: str) -> str:
    """A stem's tensor as the file has it."""
    return {
        "encoder_bias.weight": f"encoder.block.0.{_BIAS}",
        "decoder_bias.weight": f"decoder.block.0.{_BIAS}",
        "encoder_norm.weight": "encoder.final_layer_norm.weight",
        "decoder_norm.weight": "decoder.final_layer_norm.weight",
    }.get(name, name)


def _hf_config(config: Mapping[str, Any]) -> Any:
    from transformers import T5Config

    own = {k: v for k, v in config.items() if k not in ("rmm_lab", "model_type", "dtype")}
    own.pop("torch_dtype", None)
    try:
        # Plain attention: the one way of computing it that takes biases and is the same everywhere.
        hf = T5Config(**own, attn_implementation="eager")
    except Exception as error:  # huggingface_hub has errors of its own for this
        raise InputError(
            f"config.json of a T5: expected arguments that transformers knows, found others ({error}); "
            "save the model with transformers again"
        ) from error
    hf.use_cache = False
    return hf
