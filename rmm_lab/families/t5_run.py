"""What runs a T5 layer by layer, and builds a real one from layers.

Nothing here uses transformers' cache, which knows a block by its number: a repeated block would read the
keys of its first place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from rmm_lab.errors import InputError
from rmm_lab.families import limits
from rmm_lab.families.parts import Place, Shapes, Weights, begins, fill, gather, join, shapes_of
from rmm_lab.families.protocol import Config
from rmm_lab.tasks.text_task import TextBatch

BIAS = "layer.0.SelfAttention.relative_attention_bias.weight"
STACKS = ("encoder", "decoder")
_FILE_NAMES = {  # of the stem's tensors
    "shared.weight": "shared.weight",
    **{f"{stack}_bias.weight": f"{stack}.block.0.{BIAS}" for stack in STACKS},
    **{f"{stack}_norm.weight": f"{stack}.final_layer_norm.weight" for stack in STACKS},
}
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

    An ``Architecture``, equal to transformers' own forward pass without a cache; the state is a ``State``.

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
        self.scale = hf.d_model**-0.5 if is_scaled(config) else 1.0
        blocks: dict[str, list[Any]] = {}  # of each stack
        with torch.device("meta"):  # shapes only
            for stack, depth in zip(STACKS, (hf.num_layers, hf.num_decoder_layers), strict=True):
                hf.is_decoder = stack == "decoder"
                block = T5Block(hf, has_relative_attention_bias=False, layer_idx=0)
                blocks[f"{stack}.block"] = [block] * depth
            self._stem = T5Stem(hf)
        stem = {_FILE_NAMES[name]: tensor for name, tensor in self._stem.state_dict().items()}
        states = {stack: [block.state_dict() for block in all_] for stack, all_ in blocks.items()}
        self.shapes = shapes_of(join(stem, states))
        self.optional: Shapes = {"lm_head.weight": (hf.vocab_size, hf.d_model)}
        self._places: list[Place] = [
            (i, block)
            for block in chain(*blocks.values())
            for i in range(1 if unit == "block" else len(block.layer))
        ]
        self._layers: list[Any] = [
            block if unit == "block" else Sublayer(block, i) for i, block in self._places
        ]
        self.n_layers = len(self._layers)
        self._border = sum(not layer.is_decoder for layer in self._layers)

    def stem(self, weights: Weights) -> nn.Module:
        there = {own: weights[name] for own, name in _FILE_NAMES.items() if name in weights}
        stem = fill(self._stem, there)
        if (head := weights.get("lm_head.weight")) is not None:
            rows, width = head.shape
            shape = nn.Linear(width, rows, bias=False, device="meta")
            stem.lm_head = fill(shape, {"weight": head})
        return stem

    def layer(self, k: int, weights: Weights) -> nn.Module:
        return fill(self._layers[k], weights)

    @staticmethod
    def place(batch: TextBatch, device: torch.device | str, dtype: torch.dtype) -> TextBatch:
        """Tokens have no precision."""
        return TextBatch(*(tensor.to(device) for tensor in batch))

    @staticmethod
    def tensors(state: State) -> list[Tensor]:
        """Its batch too; what several states share is in each list."""
        tensors = (state.encoded, state.bias, state.hidden, state.decoded, *state.batch)
        return [tensor for tensor in tensors if tensor is not None]

    def widest(self, state: State) -> int:
        s, (_, c, t) = state.batch.ids.shape[1], state.batch.choices.shape
        hidden, heads = self._hf.d_ff, self._hf.num_heads
        return max(heads * s * s, s * hidden, c * t * hidden, heads * c * t * max(s, t))

    @staticmethod
    def embed(stem: Any, batch: TextBatch) -> State:
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

    def writes(self, layer: Any) -> dict[str, tuple[str, str]]:
        ends = ("Attention.o", "DenseReluDense.wo")
        names = (name for name, _ in layer.named_modules() if name.endswith(ends))
        return {name: (f"{name.rsplit('.', 2)[0]}.layer_norm", "") for name in names}

    @staticmethod
    def stream(state: State) -> Tensor:
        if state.decoded is None:
            return state.encoded[state.batch.mask]
        return state.decoded[state.batch.shares > 0]

    def row_weights(self, layer: Any, name: str, state: State, readout: float) -> Tensor:
        """Padding counts 0, all other tokens alike."""
        from_encoder = name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        if layer.is_decoder and not from_encoder:
            return (state.batch.shares > 0).flatten().float()  # (n, C, T)
        return state.batch.mask.flatten().float()  # (n, S)

    def embeddings(self, batch: TextBatch) -> dict[str, Tensor]:
        """Tokens that are read, written, and read again by the decoder; the table may be tied."""
        there = batch.shares > 0
        used = torch.cat([batch.ids[batch.mask], batch.shifted[there], batch.choices[there]])
        n = torch.bincount(used.flatten(), minlength=self._hf.vocab_size)
        return {"shared.weight": n.float()}

    def assemble(
        self, stem: Weights, layers: Sequence[tuple[int, Weights]], heads: Mapping[str, Weights]
    ) -> nn.Module:
        """A real T5ForConditionalGeneration.

        InputError for a layer of the encoder behind one of the decoder. Sublayers are joined to blocks again,
        with zeros for those that a block lacks.
        """
        from transformers import T5ForConditionalGeneration

        numbers = [k for k, _ in layers]
        border = self._border
        if any(a >= border > b for a, b in pairwise(numbers)):
            raise InputError(
                f"layer path: expected encoder blocks (0 to {border - 1}) before decoder blocks, found "
                f"the order {numbers}; take path.json of a run with these models"
            )
        blocks: dict[str, list[Weights]] = {}
        for stack in STACKS:
            part = [(k, w) for k, w in layers if (k >= border) == (stack == "decoder")]
            whole = [w for _, w in part] if self.unit == "block" else gather(part, self._places)
            blocks[f"{stack}.block"] = whole
            if not whole:  # neither a place nor a use for its position bias
                stem = {n: t for n, t in stem.items() if n != f"{stack}.block.0.{BIAS}"}
        weights = join(stem, blocks)
        config = hf_config(self.merged_config(numbers, heads, {}))
        model = T5ForConditionalGeneration(config)
        if "lm_head.weight" in weights:
            model.lm_head.weight = nn.Parameter(weights["lm_head.weight"].clone())
        result = model.load_state_dict(weights, strict=False)
        tied = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
        odd = result.unexpected_keys + [name for name in result.missing_keys if name not in tied]
        if odd:
            raise InputError(
                f"expected the weights that config.json describes, found {odd[0]!r} out of place"
            )
        return model.eval().requires_grad_(False)

    def merged_config(
        self, numbers: Sequence[int], heads: Mapping[str, Weights], labels: Mapping[str, Sequence]
    ) -> dict[str, Any]:
        """The base's with the depths of both stacks."""
        config = bare(self.config)
        config["num_layers"], config["num_decoder_layers"] = (
            sum(begins([k for k in numbers if (k >= self._border) == decoder], self._places))
            for decoder in (False, True)
        )
        if config["num_decoder_layers"] > config["num_layers"]:
            # generate makes its cache as deep as the encoder (transformers 5): IndexError.
            config["use_cache"] = False
        return config | {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}


def attend(attention: Any, tokens: Tensor, memory: Tensor, bias: Tensor) -> Tensor:
    """T5's attention with the weights of a transformers' module: softmax(q k' + bias) v, unscaled.

    tokens (n, Q, width) attend to memory (n, K, width); bias broadcasts to (n, heads, Q, K).
    The same bits as transformers', with fewer copies. Source: Raffel et al. 2020, Sec. 2.1.
    """
    n, heads = len(tokens), attention.n_heads
    q, k, v = (  # (n, Q or K, width) -> (n, heads, Q or K, d_kv)
        part(x).view(n, x.shape[1], heads, -1).transpose(1, 2)
        for x, part in ((tokens, attention.q), (memory, attention.k), (memory, attention.v))
    )
    scores = q @ k.transpose(-1, -2)  # (n, heads, Q, K)
    scores += bias
    mixed = scores.float().softmax(-1).to(v.dtype) @ v  # (n, heads, Q, d_kv)
    return attention.o(mixed.transpose(1, 2).flatten(2))


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


def bare(config: Config) -> dict[str, Any]:
    """config.json without what does not hold for a model that we make, which is float32."""
    return {k: v for k, v in config.items() if k not in ("rmm_lab", "dtype", "torch_dtype")}


def hf_config(config: Config) -> Any:
    """The T5Config of a config.json; InputError for what transformers does not know."""
    from transformers import T5Config

    try:
        arguments = limits.arguments(T5Config, config)
        # Plain attention: the one way of computing it that takes biases and is the same everywhere.
        hf = T5Config(**arguments, attn_implementation="eager")
        limits.check_sizes(hf)
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
