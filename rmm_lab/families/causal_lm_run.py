"""What runs a decoder-only language model layer by layer, and builds a real one from layers.

Layers are transformers' own modules, without its cache, which knows a layer by its number: a repeated layer
would read the keys of its first place. Positions and masks are made once, in the stem, and a layer takes
those of its own kind of attention wherever it stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rmm_lab.errors import InputError
from rmm_lab.families.causal_lm_kinds import (
    HEAD,
    LAYOUTS,
    SLIDING,
    Layout,
    bare,
    check_sublayers,
    hf_config,
    kinds_of,
    model_class,
    turned,
)
from rmm_lab.families.parts import Place, Shapes, Weights, begins, fill, gather, join, shapes_of
from rmm_lab.families.protocol import Config
from rmm_lab.tasks.lm_task import CHOOSE, NEXT, READ, LMBatch

NEVER = -1e4  # a lead that no token has
LOGITS = 2**18  # logits that are held at once: 1 MiB, what fits a core's cache


@dataclass(frozen=True)
class State:
    """What goes from layer to layer, for n rows of S tokens.

    ``hidden``: (n, S, width). ``masks``: what is added to a layer's scores, (n, 1, S, S), and ``rotary``:
    cosines and sines of the positions, (n, S, head width) each, by kind of attention.
    """

    batch: LMBatch
    hidden: Tensor
    masks: Mapping[str, Tensor]
    rotary: Mapping[str, tuple[Tensor, Tensor]]


class Stem(nn.Module):
    """A language model without layers: embeddings, the final norm, and the head where it is not tied."""

    def __init__(self, trunk: Any, layout: Layout, head: nn.Module | None) -> None:
        super().__init__()
        self.tokens = getattr(trunk, layout.tokens)
        if hasattr(self.tokens, "embed_scale"):  # a Gemma's; made on the meta device
            scale = torch.tensor(self.tokens.scalar_embed_scale, device="cpu")
            self.tokens.register_buffer("embed_scale", scale, persistent=False)
        self.positions = getattr(trunk, layout.positions) if layout.positions else None
        self.norm = getattr(trunk, layout.norm)
        self.head = head


class Sublayer(nn.Module):
    """Attention or MLP of a pre-norm block, with the residual: x + function(norm(x))."""

    def __init__(self, block: nn.Module, names: tuple[str, str], mixes: bool) -> None:
        super().__init__()
        self.names, self.mixes = names, mixes
        for name in names:
            setattr(self, name, getattr(block, name))

    def forward(self, tokens: Tensor, **attention: Any) -> Tensor:
        """Tokens (n, S, width) -> tokens (n, S, width)."""
        norm, function = (getattr(self, name) for name in self.names)
        out = function(norm(tokens), **(attention if self.mixes else {}))
        return tokens + (out[0] if isinstance(out, tuple) else out)


class CausalLM:
    """Runs and rebuilds the language models of one architecture piece by piece.

    An ``Architecture``, equal to transformers' own forward pass without a cache; the state is a ``State``.

    Args:
        config: transformers' config.json of any model of the architecture.
        unit: what a layer is: a ``block``, or a ``sublayer`` of one.
    """

    def __init__(self, config: Config, unit: str = "block") -> None:
        self.config, self.unit = dict(config), unit
        self._hf = hf = hf_config(config)
        self.layout = layout = LAYOUTS[hf.model_type]
        if unit != "block":
            check_sublayers(hf, layout)
        with torch.device("meta"):  # shapes only
            model = model_class(hf)(hf)
            trunk = getattr(model, layout.trunk)
            blocks = list(getattr(trunk, layout.layers))
            for block in blocks:
                _use_linear_maps(block)
        self.kinds = kinds_of(hf)  # of each block
        self.windows = dict.fromkeys(self.kinds, 0) | {
            SLIDING: getattr(hf, "sliding_window", 0) or 0
        }
        self._rotary: Any = None
        if hasattr(trunk, "rotary_emb"):
            self._rotary = type(trunk.rotary_emb)(hf)  # for real: it holds frequencies
        self._by_kind = (
            hf.model_type == "gemma3_text"
        )  # each kind of attention has its own positions
        self.cap = getattr(hf, "final_logit_softcapping", None)
        self.tied = bool(hf.tie_word_embeddings)
        self._stem = Stem(trunk, layout, None if self.tied else model.lm_head)
        self._names = layout.names | {
            f"norm.{name}": f"{layout.trunk}.{layout.norm}.{name}"
            for name in self._stem.norm.state_dict()
        }
        if not self.tied:
            self._names["head.weight"] = HEAD
        stem = {self._names[name]: tensor for name, tensor in self._stem.state_dict().items()}
        states = {layout.stack: [block.state_dict() for block in blocks]}
        self.shapes = shapes_of(join(stem, states))
        self.optional: Shapes = {}
        parts = range(1 if unit == "block" else len(layout.sublayers))
        self._places: list[Place] = [(i, block) for block in blocks for i in parts]
        self._layers: list[Any] = [
            block if unit == "block" else Sublayer(block, layout.sublayers[i], i == 0)
            for i, block in self._places
        ]
        for k, layer in enumerate(self._layers):
            layer.kind = self.kinds[k // len(parts)]
        self.n_layers = len(self._layers)

    def stem(self, weights: Weights) -> nn.Module:
        return fill(self._stem, {own: weights[name] for own, name in self._names.items()})

    def layer(self, k: int, weights: Weights) -> nn.Module:
        return fill(self._layers[k], weights)

    @staticmethod
    def place(batch: LMBatch, device: torch.device | str, dtype: torch.dtype) -> LMBatch:
        """Tokens have no precision."""
        return LMBatch(*(tensor.to(device) for tensor in batch))

    @staticmethod
    def tensors(state: State) -> list[Tensor]:
        """Its batch too; what several states share is in each list."""
        rotary = [tensor for pair in state.rotary.values() for tensor in pair]
        return [state.hidden, *state.masks.values(), *rotary, *state.batch]

    def widest(self, state: State) -> int:
        s, width = state.hidden.shape[1:]
        inner = getattr(self._hf, "intermediate_size", None) or 4 * width
        return max(self._hf.num_attention_heads * s * s, s * inner)

    def embed(self, stem: Any, batch: LMBatch) -> State:
        hidden = stem.tokens(batch.ids)  # (n, S) -> (n, S, width)
        if stem.positions is not None:
            hidden = hidden + stem.positions(batch.positions)
        rotary = {}
        if self._rotary is not None:
            for kind in dict.fromkeys(self.kinds):
                by_kind = (kind,) if self._by_kind else ()
                rotary[kind] = self._rotary(hidden, batch.positions, *by_kind)
        masks = {kind: mask_of(batch, self.windows[kind], hidden.dtype) for kind in self.kinds}
        return State(batch, hidden, masks, rotary)

    @staticmethod
    def apply(layer: Any, state: State) -> State:
        """One layer, with the mask and the positions of its kind of attention."""
        options: dict[str, Any] = {"attention_mask": state.masks[layer.kind]}
        if state.rotary:
            options["position_embeddings"] = state.rotary[layer.kind]
        out = layer(state.hidden, **options)
        return replace(state, hidden=out[0] if isinstance(out, tuple) else out)

    apply_last = apply

    def logits(self, stem: Any, state: State, head: Weights) -> Tensor:
        """What a model thinks of each answer, (n, answers); what answers are, the batch's ``kind`` says.

        * CHOOSE: the log-probability of each of C choices; -inf where a row has no such choice.
        * WRITE: 0, and by how much the least certain token of the target is ahead of the best other token:
          it is above 0 exactly where greedy writing gives the target.
        * READ: log(1 - p) and log p, with p the geometric mean of the tokens' probabilities, 1 / perplexity.
        * NEXT: the log-probability of each next token.
        """
        batch = state.batch
        kind = int(batch.kind[0])
        n, c, t = batch.at.shape
        rows = torch.arange(n, device=batch.at.device)[:, None]
        tokens = state.hidden[rows, batch.at.flatten(1)]  # (n, C T, width)
        tokens = stem.norm(tokens).flatten(0, 1)  # (n C T, width)
        table = stem.tokens.weight if stem.head is None else stem.head.weight
        size, found = max(1, LOGITS // len(table)), []
        for x, y in zip(tokens.split(size), batch.targets.flatten().split(size), strict=True):
            scores = nn.functional.linear(x, table).float()  # (size, V)
            if self.cap is not None:
                scores = torch.tanh(scores / self.cap) * self.cap
            if kind == NEXT:
                found.append(scores.log_softmax(-1))
            elif kind in (CHOOSE, READ):
                found.append(scores.log_softmax(-1).gather(-1, y[:, None])[:, 0])
            else:
                found.append(lead(scores, y))
        values = torch.cat(found)
        if kind == NEXT:
            return values  # (n, V), since C = T = 1
        values, shares = values.view(n, c, t), batch.shares
        there = shares > 0
        if kind == CHOOSE:
            total = torch.where(there, values * shares, 0.0).sum(-1)  # (n, C)
            return total.masked_fill(~there.any(-1), -torch.inf)
        if kind == READ:
            mean = torch.where(there, values * shares, 0.0).sum((1, 2)).clamp(max=-1e-6)  # (n,)
            return torch.stack([torch.log(-torch.expm1(mean)), mean], -1)
        least = values.masked_fill(~there, torch.inf).amin((1, 2))  # (n,)
        least = least.nan_to_num(nan=NEVER)  # else torch's argmax would call it right
        return torch.stack([torch.zeros_like(least), least], -1)

    def writes(self, layer: Any) -> dict[str, tuple[str, str]]:
        """None where a norm stands between the map and the stream; of parallel blocks the attention's."""
        names = {name for name, _ in layer.named_modules()}
        out = {}
        for norm, function in self.layout.sublayers:
            for end in ("o_proj", "down_proj", "c_proj", "dense", "dense_4h_to_h"):
                if f"{function}.{end}" in names:
                    out[f"{function}.{end}"] = (norm, "")
        if getattr(self._hf, "use_parallel_residual", False):
            out.pop("mlp.dense_4h_to_h", None)  # what is lacking is made up for once
        return out

    @staticmethod
    def stream(state: State) -> Tensor:
        return state.hidden[state.batch.groups >= 0]

    @staticmethod
    def row_weights(layer: Any, name: str, state: State, readout: float) -> Tensor:
        """Padding counts 0, all other tokens alike."""
        return (state.batch.groups >= 0).flatten().float()  # (n S,)

    def embeddings(self, batch: LMBatch) -> dict[str, Tensor]:
        """Tokens that are read; also those that choices write, where the head is tied; learned positions."""
        there = batch.groups >= 0
        tokens = [batch.ids[there]] + ([batch.targets[batch.shares > 0]] if self.tied else [])
        n = torch.bincount(torch.cat(tokens), minlength=self._hf.vocab_size)
        out = {self._names["tokens.weight"]: n.float()}
        if self.layout.positions:
            size = self._hf.max_position_embeddings
            n = torch.bincount(batch.positions[there], minlength=size)
            out[self._names["positions.weight"]] = n.float()
        return out

    def assemble(
        self, stem: Weights, layers: Sequence[tuple[int, Weights]], heads: Mapping[str, Weights]
    ) -> nn.Module:
        """A real model, such as a LlamaForCausalLM.

        Sublayers are joined to blocks again, with zeros for those that a block lacks.
        """
        whole = [w for _, w in layers] if self.unit == "block" else gather(layers, self._places)
        weights = turned(join(stem, {self.layout.stack: whole}), self.layout)
        hf = hf_config(self.merged_config([k for k, _ in layers], heads, {}), plain=False)
        model = model_class(hf)(hf)
        result = model.load_state_dict(weights, strict=False)
        tied = {HEAD} if self.tied else set()
        if odd := [*result.unexpected_keys, *(n for n in result.missing_keys if n not in tied)]:
            raise InputError(
                f"expected the weights that config.json describes, found {odd[0]!r} out of place"
            )
        return model.eval().requires_grad_(False)

    def merged_config(
        self, numbers: Sequence[int], heads: Mapping[str, Weights], labels: Mapping[str, Sequence]
    ) -> dict[str, Any]:
        """The base's with another depth; each layer keeps its kind of attention, whatever its new number."""
        first = [k for k, new in zip(numbers, begins(numbers, self._places), strict=True) if new]
        config = bare(self.config) | {self.layout.depth: len(first)}
        if getattr(self._hf, "layer_types", None) is not None:
            config["layer_types"] = [self._layers[k].kind for k in first]
        return config | {"architectures": [model_class(self._hf).__name__]}


def lead(scores: Tensor, targets: Tensor) -> Tensor:
    """By how much a target is ahead of the best other token: (m, V), (m,) -> (m,).

    Above 0 exactly where the target is torch's argmax, also where several tokens are equally good.
    """
    best = scores.argmax(-1)  # (m,)
    own = scores.gather(-1, targets[:, None])[:, 0]
    others = scores.scatter(-1, targets[:, None], -torch.inf).amax(-1)
    tiny = torch.finfo(scores.dtype).tiny
    ahead = own - others
    return torch.where(best == targets, ahead.clamp(min=tiny), ahead)


def mask_of(batch: LMBatch, window: int, dtype: torch.dtype) -> Tensor:
    """What is added to scores: 0 where a token sees another, else the lowest number; (n, 1, S, S).

    A token sees itself and those before it of the prompt and of its own choice; with a window, only the last
    ``window`` of them.
    """
    groups, at = batch.groups, batch.positions  # (n, S)
    behind = at[:, :, None] - at[:, None, :]  # (n, S, S), query less key
    sees = (groups[:, None, :] == 0) | (groups[:, None, :] == groups[:, :, None])
    sees &= behind >= 0
    if window:
        sees &= behind < window
    mask = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
    return mask.masked_fill_(~sees, torch.finfo(dtype).min)[:, None]


def _use_linear_maps(block: nn.Module) -> None:
    """GPT-2's layers with linear maps in the orientation of all others: (out, in)."""
    for module in list(block.modules()):
        children: list[tuple[str, Any]] = list(module.named_children())
        for name, child in children:
            if type(child).__name__ == "Conv1D":
                setattr(module, name, nn.Linear(child.nx, child.nf))
