"""What runs a T5 layer by layer, and builds a real one from layers.

Nothing here uses transformers' cache, which knows a block by its number: a repeated block would read the
keys of its first place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from rmm_lab.errors import InputError
from rmm_lab.families.parts import Shapes, Weights, begins, fill, gather
from rmm_lab.families.protocol import Config
from rmm_lab.tasks.text_task import TextBatch

BIAS = "layer.0.SelfAttention.relative_attention_bias.weight"
STACKS = ("encoder", "decoder")
LOGITS = 2**18  # logits that are held at once: 1 MiB, what fits a core's cache


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
        """All that it holds, its batch too; what several states share is in each list."""
        tensors = (self.encoded, self.bias, self.hidden, self.decoded, *self.batch)
        return [tensor for tensor in tensors if tensor is not None]


class T5Stem(nn.Module):
    """A T5 without blocks: what runs before, between and after the two stacks."""

    def __init__(self, config: Any) -> None:
        from transformers.models.t5 import modeling_t5

        super().__init__()
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        buckets = config.relative_attention_num_buckets
        self.encoder_bias = nn.Embedding(buckets, config.num_heads)
        self.decoder_bias = nn.Embedding(buckets, config.num_heads)
        self.encoder_norm, self.decoder_norm = (
            modeling_t5.T5LayerNorm(config.d_model, eps=config.layer_norm_epsilon) for _ in STACKS
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
    """One sublayer of a T5's block under its name there; ``T5.apply`` runs it."""

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

    def __init__(self, config: Config, unit: str = "block") -> None:
        from transformers.activations import ACT2FN
        from transformers.models.t5.modeling_t5 import T5Block

        self.config, self.unit = dict(config), unit
        self._hf = hf = hf_config(config)
        if hf.dense_act_fn not in ACT2FN:
            raise InputError(
                "config.json of a T5: expected an activation that transformers knows, found "
                f"{hf.dense_act_fn!r}; save the model with transformers again"
            )
        depths = (hf.num_layers, hf.num_decoder_layers)
        self.scale = hf.d_model**-0.5 if is_scaled(config) else 1.0
        with torch.device("meta"):  # shapes only
            self._blocks = []
            for decoder in (False, True):
                hf.is_decoder = decoder
                self._blocks.append(T5Block(hf, has_relative_attention_bias=False, layer_idx=0))
            self._stem = T5Stem(hf)
        self.shapes: Shapes = {
            _file_name(k): tuple(v.shape) for k, v in self._stem.state_dict().items()
        }
        for depth, block, name in zip(depths, self._blocks, STACKS, strict=True):
            for j in range(depth):
                for key, tensor in block.state_dict().items():
                    self.shapes[f"{name}.block.{j}.{key}"] = tuple(tensor.shape)
        each: list[list[Any]] = [[block] for block in self._blocks]  # a block's layers, by stack
        if unit == "sublayer":
            each = [[Sublayer(b, i) for i in range(len(b.layer))] for b in self._blocks]
        self._layers = [
            layer for n, layers in zip(depths, each, strict=True) for layer in layers * n
        ]
        self._kinds = [
            i for n, layers in zip(depths, each, strict=True) for i in [*range(len(layers))] * n
        ]
        self.n_layers, self._border = len(self._layers), depths[0] * len(each[0])
        self.optional: Shapes = {"lm_head.weight": (hf.vocab_size, hf.d_model)}

    def stem(self, weights: Weights) -> nn.Module:
        """Everything outside the blocks as a module."""
        weights = dict(weights)
        head = weights.pop("lm_head.weight", None)
        names = {_file_name(name): name for name in self._stem.state_dict()}
        stem = fill(self._stem, {names[key]: value for key, value in weights.items()})
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
        """A batch on the layers' device; tokens have no precision."""
        return TextBatch(*(tensor.to(device) for tensor in batch))

    @staticmethod
    def tensors(state: State) -> list[Tensor]:
        """All memory that a state holds."""
        return state.tensors

    def widest(self, state: State) -> int:
        """Numbers per example in the largest tensor of a layer."""
        s, (_, c, t) = state.batch.ids.shape[1], state.batch.choices.shape
        hidden, heads = self._hf.d_ff, self._hf.num_heads
        return max(heads * s * s, s * hidden, c * t * hidden, heads * c * t * max(s, t))

    @staticmethod
    def embed(stem: Any, batch: TextBatch) -> State:
        """A batch -> the encoder's first tokens."""
        encoded = stem.shared(batch.ids)  # (n, S) -> (n, S, width)
        bias = stem.positions(batch.ids.shape[1], decoder=False)  # (1, heads, S, S)
        low = torch.finfo(encoded.dtype).min
        hidden = encoded.new_zeros(batch.mask.shape).masked_fill(~batch.mask, low)[:, None, None]
        if not batch.mask.all():
            bias = bias + hidden  # (n, heads, S, S)
        return State(stem, batch, encoded, bias, hidden)

    @staticmethod
    def apply(layer: Any, state: State) -> State:
        """One layer, of its own stack. The decoder's first layer ends the encoder.

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
        for sublayer in layer.layer.children():
            if hasattr(sublayer, "SelfAttention"):
                tokens = tokens.reshape(-1, shape[-2], width)  # (n C, T, width) in the decoder
                normed = sublayer.layer_norm(tokens)
                tokens = tokens + attend(sublayer.SelfAttention, normed, normed, state.bias)
                continue
            tokens = tokens.reshape(shape[0], -1, width)  # (n, C T, width) in the decoder
            if hasattr(sublayer, "EncDecAttention"):
                normed = sublayer.layer_norm(tokens)
                mixed = attend(sublayer.EncDecAttention, normed, state.encoded, state.hidden)
                tokens = tokens + mixed
            else:
                tokens = sublayer(tokens)
        tokens = tokens.reshape(shape)
        if layer.is_decoder:
            return replace(state, decoded=tokens)
        return replace(state, encoded=tokens)

    apply_last = apply  # all positions of the last layer count

    def logits(self, stem: Any, state: State, head: Weights) -> Tensor:
        """The log-probability of each choice: state -> (n, C); -inf where a row has no such choice."""
        state = _begin_decoder(state)
        table = stem.shared.weight if stem.lm_head is None else stem.lm_head.weight
        tokens = stem.decoder_norm(state.decoded) * self.scale  # (n, C, T, width)
        _, c, t, _ = tokens.shape
        rows = max(1, LOGITS // (c * t * len(table)))
        parts = []
        for x, target in zip(tokens.split(rows), state.batch.choices.split(rows), strict=True):
            # In float32: a sum of small differences between large numbers.
            log_probs = nn.functional.linear(x, table).float().log_softmax(-1)  # (rows, C, T, V)
            parts.append(log_probs.gather(-1, target[..., None])[..., 0])  # (rows, C, T)
        total = (torch.cat(parts) * state.batch.shares).sum(-1)  # (n, C)
        return total.masked_fill(state.batch.shares.sum(-1) == 0, -torch.inf)

    def assemble(
        self, stem: Weights, layers: Sequence[tuple[int, Weights]], heads: Mapping[str, Weights]
    ) -> nn.Module:
        """A real T5ForConditionalGeneration; every block is a copy.

        layers: (number in the base, weights) in running order; InputError for a layer of the encoder behind
        one of the decoder. Sublayers are joined to blocks again, with zeros for those that a block lacks.
        """
        from transformers import T5ForConditionalGeneration

        numbers = [k for k, _ in layers]
        border = self._border
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
            of_layer = [shapes[k >= border] for k in range(self.n_layers)]
            blocks = [gather(stack, self._kinds, of_layer) for stack in stacks]
        weights = join(stem, *blocks)
        config = hf_config(self.merged_config(numbers, heads, {}))
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
        """config.json of an assembled model: the base's with the depths of both stacks."""
        border = self._border
        config = bare(self.config)
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


def join(stem: Weights, encoder: Sequence[Weights], decoder: Sequence[Weights]) -> Weights:
    """The inverse of ``t5.split``: names as transformers has them, blocks renumbered in the order given.

    A stack without blocks has neither a place nor a use for its position bias.
    """
    weights = {k: v for k, v in stem.items() if not k.endswith(BIAS)}
    for stack, layers in zip(STACKS, (encoder, decoder), strict=True):
        for k, layer in enumerate(layers):
            if k == 0:
                name = f"{stack}.block.0.{BIAS}"
                weights[name] = stem[name]
            weights |= {f"{stack}.block.{k}.{name}": tensor for name, tensor in layer.items()}
    return weights


def attend(attention: Any, tokens: Tensor, memory: Tensor, bias: Tensor) -> Tensor:
    """T5's attention with the weights of a transformers' module: softmax(q k' + bias) v, unscaled.

    tokens (n, Q, width) attend to memory (n, K, width); bias broadcasts to (n, heads, Q, K).
    The same bits as transformers', with fewer copies. Source: Raffel et al. 2020, Sec. 2.1.
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
        "encoder_bias.weight": f"encoder.block.0.{BIAS}",
        "decoder_bias.weight": f"decoder.block.0.{BIAS}",
        "encoder_norm.weight": "encoder.final_layer_norm.weight",
        "decoder_norm.weight": "decoder.final_layer_norm.weight",
    }.get(name, name)


def bare(config: Config) -> dict[str, Any]:
    """config.json without what does not hold for a model that we make, which is float32."""
    return {k: v for k, v in config.items() if k not in ("rmm_lab", "dtype", "torch_dtype")}


def hf_config(config: Config) -> Any:
    """The T5Config of a config.json; InputError for what transformers does not know."""
    from transformers import T5Config

    arguments = {k: v for k, v in bare(config).items() if k != "model_type"}
    try:
        # Plain attention: the one way of computing it that takes biases and is the same everywhere.
        hf = T5Config(**arguments, attn_implementation="eager")
    except Exception as error:  # huggingface_hub has errors of its own for this
        raise InputError(
            f"config.json of a T5: expected arguments that transformers knows, found others ({error}); "
            "save the model with transformers again"
        ) from error
    hf.use_cache = False
    return hf


def is_scaled(config: Config) -> bool:
    """Whether outputs are scaled by 1 / sqrt(d_model) before the embeddings: the first T5s, not v1.1."""
    scaled = config.get("scale_decoder_outputs")
    return config.get("tie_word_embeddings") is not False if scaled is None else bool(scaled)
