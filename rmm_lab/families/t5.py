"""The family of Hugging Face's T5s (t5, flan-t5, t5-v1_1, mt5): stem -> encoder blocks -> decoder blocks.

L = encoder blocks, then decoder blocks, in two stacks; or their sublayers (self-attention, the decoder's
cross-attention, feed-forward) one by one. The *stem* is what no block owns: the shared
embeddings (counted once, however often a file holds them), the final norms, ``lm_head`` where it is not
tied, and the relative position biases of both stacks. transformers stores these biases in block 0, but
every block of the stack uses them: a skipped or repeated block 0 must not lose or double them.

A T5 has no head for a task: a choice is scored by its log-probability, so nothing is set apart.

What has no docstring here does what ``Family`` says of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rmm_lab.errors import InputError
from rmm_lab.families import parts
from rmm_lab.families.parts import Factors, Parts, Weights
from rmm_lab.families.protocol import Config, Model, Trainable, TrivialRow, trivial_text_rows
from rmm_lab.families.t5_run import BIAS, STACKS, T5, bare, is_scaled
from rmm_lab.families.vocabulary import one_vocabulary
from rmm_lab.tasks.text_task import TextFormat, TextTask, pad

NAME = "a T5"
DATA = "texts"
NEEDED: tuple[str, ...] = ("tokenizer.json", "spiece.model")
FILES: tuple[str, ...] = (
    *NEEDED,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
BASE_SETTING = "as pretrained"
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


def owns(config: Config) -> bool:
    return config.get("model_type") == "t5"


def of_mt5(config: Config) -> dict[str, Any]:
    """config.json of an mT5 as that of the T5 1.1 that it is; mT5's defaults are others."""
    defaults = {"vocab_size": 250112, "d_ff": 1024, "num_layers": 8, "num_heads": 6}
    unscaled = {"tie_word_embeddings": False, "scale_decoder_outputs": False}
    known = {"feed_forward_proj": "gated-gelu"} | defaults | dict(config)
    return known | unscaled | {"model_type": "t5"}


def canonical(source: str, config: Config, weights: Weights) -> Weights:
    """The weights, each tensor ``once``; InputError unless config.json describes them."""
    for key in _WHOLE:
        if config.get(key) is not None and type(config[key]) is not int:
            raise InputError(
                f"model {source!r}: expected {key!r} in its config.json to be a whole number, found "
                f"{config[key]!r}; save the model with transformers again"
            )
    out = once(source, weights)
    counts = [len({n.split(".")[2] for n in out if n.startswith(f"{s}.block.")}) for s in STACKS]
    if not 0 <= (start := _start(config)) < len(out["shared.weight"]):
        raise InputError(
            f"model {source!r}: expected 'decoder_start_token_id' in its config.json to be one of its "
            f"{len(out['shared.weight'])} tokens, found {start}; save the model with transformers again"
        )
    layers = config.get("num_layers", 6)
    said = [layers, config.get("num_decoder_layers") or layers]
    if counts != said or 0 in counts:
        raise InputError(
            f"model {source!r}: expected {said[0]} encoder and {said[1]} decoder blocks as its config.json "
            f"says, at least one each, found weights of {counts[0]} and {counts[1]}; save it again"
        )
    return out


def factored(source: str, config: Config, factors: Factors) -> Factors:
    """As they are: a T5's files hold its matrices as transformers does."""
    return factors


def split(weights: Mapping[str, Tensor]) -> Parts:
    """Stem, encoder blocks, decoder blocks; no head."""
    return parts.split(weights, [f"{stack}.block" for stack in STACKS], shared=BIAS)


def sublayer(name: str) -> int | None:
    """Self-attention, (cross-attention,) feed-forward."""
    match = re.match(r"layer\.(\d+)\.", name)
    return int(match[1]) if match else None


def fused(name: str) -> int:
    """1: queries, keys and values have a matrix each."""
    return 1


def signature(config: Config) -> tuple[str, dict[str, Any]]:
    """With the number and size of the heads, activation, buckets and special tokens."""
    args = {key: config.get(key, default) for key, default in _ARGS.items()}
    # transformers obeys dense_act_fn, which it writes itself, before feed_forward_proj.
    name = str(args["feed_forward_proj"])
    activation = config.get("dense_act_fn") or {"gated-gelu": "gelu_new"}.get(
        name, name.split("-")[-1]
    )
    return "t5", args | {
        "activation": activation,
        "start": _start(config),
        "scaled": is_scaled(config),
    }


one_form = one_vocabulary


def check_head(name: str, source: str, num_classes: int, head: Weights, stem: Weights) -> None:
    """A T5 has no head."""


def _start(config: Config) -> int:
    start = config.get("decoder_start_token_id")
    return int((config.get("pad_token_id") or 0) if start is None else start)


def architecture(config: Config, unit: str = "block") -> T5:
    return T5(config, unit)


# ------------------------------------------------------------------------------ tasks and training


def input_format(model: Model) -> TextFormat:
    """What a T5 takes: its tokenizer and lengths."""
    embeddings = len(model.weights["shared.weight"])
    return TextFormat.read(model.source, model.tokenizer_folder, model.config, embeddings)


def make_tasks(
    base: Model, sources: Sequence[str], *, metric: str = "auto", normalise_length: bool = False
) -> list[TextTask]:
    fmt = input_format(base)
    return [TextTask(s, fmt, metric=metric, normalise_length=normalise_length) for s in sources]


def check_task(expert: Model, task: TextTask) -> None:
    """A T5 answers any task of texts."""


def check_inputs(base: Model, expert: Model) -> None:
    """Raise InputError if an expert has another tokenizer; without one, it has the base's."""
    if any((expert.folder / name).is_file() for name in NEEDED):
        input_format(base).check_same_tokenizer(expert.source, expert.folder)


def completion(experts: Sequence[Model], tasks: Sequence[Any]) -> None:
    """None: nothing is written."""


def task_head(joint: Model, task: TextTask) -> Weights:
    """A T5 has no head."""
    return {}


def trivial_rows(tasks: Sequence[Any]) -> list[TrivialRow]:
    """Chance, and the answer that is most frequent in the reward split given always."""
    return trivial_text_rows(tasks)


def trainable(
    base: Model,
    tasks: Sequence[TextTask],
    *,
    seed: int,
    batch_size: int,
    augment: bool,
    balance: bool = False,
) -> Trainable:
    """A T5 with the base's weights; it learns to write the right choice's text.

    balance: InputError for a task whose rows have choices of their own.
    """
    weights = [task.answer_weights() if balance else None for task in tasks]
    own = split(base.weights)
    torch.manual_seed(seed)  # dropout, where the base's config asks for it
    model = T5(base.config).assemble(own.stem, list(enumerate(own.layers)), {})

    def losses(generator: torch.Generator) -> list[Tensor]:
        out = []
        for task, weight in zip(tasks, weights, strict=True):
            data = task.split("train")
            shape = (batch_size // len(tasks),)
            rows = torch.randint(len(data), shape, generator=generator).tolist()
            targets = [data.choices[i][int(data.labels[i])] for i in rows]
            of_rows = None if weight is None else weight[data.labels[rows]]  # (n,)
            inputs = [data.inputs[i] for i in rows]
            out.append(text_loss(model, task.format, inputs, targets, of_rows))
        return out

    return Trainable(
        model, losses, lambda: (bare(base.config), once(base.source, model.state_dict()))
    )


def text_loss(
    model: Any,
    fmt: TextFormat,
    inputs: Sequence[list[int]],
    targets: Sequence[list[int]],
    weights: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy per target token of n (input, target) pairs of token lists; weights: (n,)."""
    device = next(model.parameters()).device
    ids, mask = (x.to(device) for x in pad(inputs, fmt.pad))
    wanted, there = (x.to(device) for x in pad(targets, fmt.pad))
    start = torch.full((len(wanted), 1), fmt.start, device=device)
    out = model(
        input_ids=ids,
        attention_mask=mask.long(),
        decoder_input_ids=torch.cat([start, wanted[:, :-1]], 1),  # (n, T), one to the right
        use_cache=False,
    )
    if weights is None:
        return nn.functional.cross_entropy(out.logits[there], wanted[there])
    losses = nn.functional.cross_entropy(out.logits[there], wanted[there], reduction="none")
    of_tokens = weights.to(device)[:, None].expand_as(there)[there]  # (n,) -> (target tokens,)
    return (of_tokens * losses).sum() / of_tokens.sum()
