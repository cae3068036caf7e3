"""The family of Hugging Face's decoder-only language models: stem -> layers -> stem.

Llama, Mistral, Qwen2, Qwen3, Gemma (1 to 3, text), GPT-2 and GPT-NeoX, as transformers builds them. The
*stem* is what no layer owns: embeddings, the final norm, and the head that scores the next token, tied to the
embeddings or not. This head is no task's: all tasks share it, so it is merged, and nothing is set apart.

In memory every linear map is (out, in); GPT-2's files hold them the other way round.

What has no docstring here does what ``Family`` says of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rmm_lab.errors import InputError
from rmm_lab.families import parts
from rmm_lab.families.causal_lm_kinds import (
    HEAD,
    LAYOUTS,
    Layout,
    bare,
    hf_config,
    kinds_of,
    turned,
)
from rmm_lab.families.causal_lm_run import CausalLM
from rmm_lab.families.parts import Factors, Parts, Weights
from rmm_lab.families.protocol import (
    Completion,
    Config,
    Model,
    Trainable,
    TrivialRow,
    trivial_text_rows,
)
from rmm_lab.families.vocabulary import one_vocabulary
from rmm_lab.tasks import lm_task
from rmm_lab.tasks.lm_task import WRITE, Answers, LMBatch, LMFormat, LMTask, make_batch

NAME = "a language model"
DATA = "texts"
NEEDED: tuple[str, ...] = lm_task.FILES
FILES: tuple[str, ...] = (
    *NEEDED,
    *("merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "generation_config.json"),
)
BASE_SETTING = "as pretrained"
WRITTEN = 128  # tokens at most that an expert writes after a prompt that merges look at
# Attributes of transformers' configs that change how weights are used; shapes do not show them.
_ARGS = (
    *("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act"),
    *("hidden_activation", "activation_function", "rms_norm_eps", "layer_norm_eps"),
    *("layer_norm_epsilon", "rope_parameters", "sliding_window", "query_pre_attn_scalar"),
    *("attn_logit_softcapping", "final_logit_softcapping", "use_parallel_residual"),
    *("scale_attn_weights", "tie_word_embeddings"),
)
_BUFFERS = (".inv_freq", ".attn.bias", ".masked_bias", ".attention.bias")  # in old files
_MIXTURES = ("moe", "mixtral", "dbrx", "olmoe", "gpt_oss")


def owns(config: Config) -> bool:
    """Any decoder-only model of transformers'; ``canonical`` refuses those that are not supported."""
    if config.get("model_type") in LAYOUTS:
        return True
    named = config.get("architectures") or ()
    ends = ("ForCausalLM", "LMHeadModel")
    return isinstance(named, list) and any(str(name).endswith(ends) for name in named)


def canonical(source: str, config: Config, weights: Weights) -> Weights:
    """The weights by the names of transformers' model, without a tied head; InputError if they do not fit."""
    kind = str(config.get("model_type"))
    if kind not in LAYOUTS:
        what = "a mixture of experts" if any(m in kind for m in _MIXTURES) else f"a {kind!r}"
        raise InputError(
            f"model {source!r}: expected a decoder-only language model of one of the kinds "
            f"{', '.join(LAYOUTS)}, found {what} (model_type {kind!r}); others are not supported"
        )
    if "quantization_config" in config:
        raise InputError(
            f"model {source!r}: expected weights in floating point, found quantised ones "
            "(quantization_config in config.json); save the model in float32 or bfloat16"
        )
    try:
        hf = hf_config(config)
        kinds_of(hf)
    except InputError as error:
        raise InputError(f"model {source!r}: {error}") from error
    layout = LAYOUTS[kind]
    weights = {HEAD if n == "embed_out.weight" else n: t for n, t in weights.items()}  # GPT-NeoX's
    if not any(n.startswith(f"{layout.trunk}.") for n in weights):  # the trunk alone was saved
        weights = {n if n == HEAD else f"{layout.trunk}.{n}": t for n, t in weights.items()}
    start = f"{layout.stack}."
    depth = {n[len(start) :].split(".")[0] for n in weights if n.startswith(start)}
    if len(depth) != hf.num_hidden_layers:
        raise InputError(
            f"model {source!r}: expected {hf.num_hidden_layers} layers ({layout.stack}.0, ...) as its "
            f"config.json says, found {len(depth)}; save the model again"
        )
    out = {n: t for n, t in weights.items() if not n.endswith(_BUFFERS)}
    if hf.tie_word_embeddings:
        out.pop(HEAD, None)
    elif HEAD not in out:
        raise InputError(
            f"model {source!r}: expected a head ({HEAD}), since tie_word_embeddings in its config.json is "
            "false, found none; save the model as transformers' AutoModelForCausalLM"
        )
    return turned(out, layout)


def factored(source: str, config: Config, factors: Factors) -> Factors:
    """By the names of ``canonical``, GPT-2's the other way round; InputError for those of a tied head."""
    layout, out = LAYOUTS[str(config["model_type"])], Factors()
    for name, (left, right) in factors.items():
        name = HEAD if name == "embed_out.weight" else name
        if name != HEAD and not name.startswith(f"{layout.trunk}."):
            name = f"{layout.trunk}.{name}"
        turn = layout.transposed.fullmatch(name)
        out[name] = (right.T, left.T) if turn else (left, right)
    if HEAD in out and hf_config(config).tie_word_embeddings:
        raise InputError(
            f"model {source!r}: expected an adapter that leaves the head ({HEAD}) alone, since it is the "
            "embeddings themselves (tie_word_embeddings), found one that changes it; train one without it"
        )
    return out


def once(source: str, weights: Mapping[str, Tensor]) -> Weights:
    """Every tensor once: a head that is the embeddings themselves is left out."""
    pointers = {t.data_ptr() for n, t in weights.items() if n != HEAD}
    return {n: t for n, t in weights.items() if n != HEAD or t.data_ptr() not in pointers}


def _layout_of(names: Mapping[str, Tensor]) -> Layout:
    """By names alone: the layouts with the same names agree in all that ``split`` needs."""
    starts = {name.partition(".")[0] for name in names}
    return next(own for own in LAYOUTS.values() if own.trunk in starts)


def split(weights: Mapping[str, Tensor]) -> Parts:
    """Stem, with the head; layers; no task's head."""
    return parts.split(weights, [_layout_of(weights).stack])


def sublayer(name: str) -> int | None:
    """0 for an attention, 1 for an MLP, with the norm before it; None for further norms."""
    for layout in LAYOUTS.values():
        for number, names in enumerate(layout.sublayers):
            if name.partition(".")[0] in names:
                return number
    return None


def fused(name: str) -> int:
    """3 for GPT-2's projections to queries, keys and values; GPT-NeoX mixes their rows by head."""
    return 3 if name.endswith("attn.c_attn.weight") else 1


def signature(config: Config) -> tuple[str, dict[str, Any]]:
    """With heads, activation, positions and kinds of attention; not the special tokens."""
    hf = hf_config(config)
    args = {name: getattr(hf, name) for name in _ARGS if hasattr(hf, name)}
    return hf.model_type, args | {"layer_types": kinds_of(hf)}


one_form = one_vocabulary


def check_head(name: str, source: str, num_classes: int, head: Weights, stem: Weights) -> None:
    """A language model has no head for a task."""


def architecture(config: Config, unit: str = "block") -> CausalLM:
    return CausalLM(config, unit)


# ------------------------------------------------------------------------------ tasks and training


def input_format(model: Model) -> LMFormat:
    """What a language model takes: its tokenizer and lengths."""
    layout = LAYOUTS[model.config["model_type"]]
    embeddings = len(model.weights[layout.names["tokens.weight"]])
    hf = hf_config(model.config)
    return LMFormat.read(
        model.source,
        model.tokenizer_folder,
        hf.eos_token_id,
        hf.max_position_embeddings,
        embeddings,
    )


def make_tasks(
    base: Model, sources: Sequence[str], *, metric: str = "auto", normalise_length: bool = False
) -> list[LMTask]:
    fmt = input_format(base)
    return [LMTask(s, fmt, metric=metric, normalise_length=normalise_length) for s in sources]


def check_task(expert: Model, task: LMTask) -> None:
    """A language model answers any task of texts."""


def check_inputs(base: Model, expert: Model) -> None:
    """Raise InputError if an expert has another tokenizer; without one, it has the base's."""
    folder = expert.tokenizer_folder
    if any((folder / name).is_file() for name in NEEDED):
        input_format(base).check_same_tokenizer(expert.source, folder)


def completion(experts: Sequence[Model], tasks: Sequence[LMTask]) -> Completion | None:
    """Greedy writing by each expert's own model, for tasks that ask for it; the others' inputs stay."""
    if all(task.kind != WRITE for task in tasks):
        return None

    def complete(i: int, batches: list[LMBatch]) -> list[LMBatch]:
        if tasks[i].kind != WRITE:
            return batches
        own = split(experts[i].weights)
        model = CausalLM(experts[i].config).assemble(own.stem, list(enumerate(own.layers)), {})
        fmt = tasks[i].format
        return [written(model, batch, fmt.end, fmt.max_length) for batch in batches]

    return complete


@torch.inference_mode()
def written(model: Any, batch: LMBatch, end: int, longest: int) -> LMBatch:
    """Prompts with what a model of transformers writes after them, greedily, up to ``WRITTEN`` tokens.

    batch: n prompts, of kind NEXT; end: the token that ends an answer; longest: tokens of a whole row. The
    result asks how surely a model writes the same, kind WRITE.
    """
    prompts = [ids[there >= 0].tolist() for ids, there in zip(batch.ids, batch.groups, strict=True)]
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), end)  # (n, S): generate wants padding on the left
    there = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        there[row, width - len(prompt) :] = 1
    new = model.generate(
        ids,
        attention_mask=there,
        max_new_tokens=max(1, min(WRITTEN, longest + 1 - width)),
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        eos_token_id=end,
        pad_token_id=end,
    )[:, width:]  # (n, T), filled up with the end
    rows = []
    for prompt, tokens in zip(prompts, new.tolist(), strict=True):
        stop = tokens.index(end) + 1 if end in tokens else len(tokens)
        rows.append(Answers(prompt, [(tokens[:stop], 0)]))
    return make_batch(rows, WRITE, False)


def task_head(joint: Model, task: LMTask) -> Weights:
    """A language model has no head for a task."""
    return {}


def trivial_rows(tasks: Sequence[Any]) -> list[TrivialRow]:
    """Chance, and the answer that is most frequent in the reward split given always."""
    return trivial_text_rows(tasks, "guessing; nothing is written right by chance")


def trainable(
    base: Model,
    tasks: Sequence[LMTask],
    *,
    seed: int,
    batch_size: int,
    augment: bool,
    balance: bool = False,
) -> Trainable:
    """A model with the base's weights; it learns to write the target, or the right choice, and to stop.

    balance: InputError for a task whose rows have choices of their own, or none.
    """
    weights = [task.answer_weights() if balance else None for task in tasks]
    own = split(base.weights)
    torch.manual_seed(seed)  # dropout, where the base's config asks for it
    run = CausalLM(base.config)
    model = run.assemble(own.stem, list(enumerate(own.layers)), {})

    def losses(generator: torch.Generator) -> list[Tensor]:
        out = []
        for task, weight in zip(tasks, weights, strict=True):
            labels, shape = task.split("train").labels, (batch_size // len(tasks),)
            rows = torch.randint(len(labels), shape, generator=generator)
            of_rows = None if weight is None else weight[labels[rows]]  # (n,)
            out.append(text_loss(model, run, task.right("train", rows.numpy()), of_rows))
        return out

    return Trainable(
        model, losses, lambda: (bare(base.config), once(base.source, model.state_dict()))
    )


def text_loss(model: Any, run: CausalLM, batch: Any, weights: Tensor | None = None) -> Tensor:
    """Mean cross-entropy per target token of n rows with one choice each, by transformers' own model.

    weights: (n,), how much each row counts; all alike by default.
    """
    batch = run.place(batch, next(model.parameters()).device, torch.float32)
    hidden = model.base_model(
        input_ids=batch.ids, attention_mask=(batch.groups >= 0).long(), use_cache=False
    )[0]  # (n, S, width)
    there = batch.shares > 0  # (n, 1, T)
    rows = torch.arange(len(hidden), device=hidden.device)[:, None, None].expand_as(there)
    scores = model.get_output_embeddings()(hidden[rows[there], batch.at[there]])  # (m, V)
    if (cap := run.cap) is not None:
        scores = torch.tanh(scores / cap) * cap
    if weights is None:
        return nn.functional.cross_entropy(scores, batch.targets[there])
    of_tokens = weights.to(scores.device)[rows[there]]  # (m,)
    each = nn.functional.cross_entropy(scores, batch.targets[there], reduction="none")  # (m,)
    return (each * of_tokens).sum() / of_tokens.sum()
