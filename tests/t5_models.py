"""Small T5s, their tokenizers and texts, made by transformers alone; and what ours must agree with."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from rmm_lab.families import t5
from rmm_lab.families.checkpoint import architecture, read_checkpoint
from rmm_lab.layers import LayerPool
from rmm_lab.search.problem import load_problem
from rmm_lab.tasks.text_task import TextBatch

BIAS = "layer.0.SelfAttention.relative_attention_bias.weight"
TINY = {
    "vocab_size": 104,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 3,  # heads times d_kv is not the width
    "decoder_start_token_id": 0,
    "n_positions": 24,
}
VARIANTS = {
    "t5": {},
    "v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "unequal": {"num_layers": 3, "layer_norm_epsilon": 1e-3},
    "buckets": {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 6},
    "start": {"decoder_start_token_id": 7, "feed_forward_proj": "gated-silu"},
}


def hf_model(variant: str = "t5", seed: int = 0, **more) -> T5ForConditionalGeneration:
    """A transformers model, every parameter of which is random and makes a difference."""
    args = TINY | VARIANTS[variant] | more
    model = T5ForConditionalGeneration(T5Config(**args)).eval().requires_grad_(False)
    if args.get("tie_word_embeddings") is False:
        model.lm_head.weight = nn.Parameter(model.shared.weight.clone(), requires_grad=False)
    g = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        scale = 1.0 if "shared" in name or "bias" in name or "lm_head" in name else 0.3
        parameter.copy_(scale * torch.randn(parameter.shape, generator=g))
        parameter += "layer_norm" in name
    return model


def tuned(model: T5ForConditionalGeneration, seed: int) -> T5ForConditionalGeneration:
    """A copy that has moved away from the model in every parameter."""
    model, g = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter += 0.3 * torch.randn(parameter.shape, generator=g)
    return model


def by_hand(models, encoder, decoder, stem=None) -> T5ForConditionalGeneration:
    """A transformers model whose blocks are copied tensor by tensor: (model, block) of each place."""
    stem = models[0] if stem is None else stem
    args = {k: v for k, v in stem.config.to_dict().items() if k not in ("dtype", "num_layers")}
    args |= {"num_layers": len(encoder), "num_decoder_layers": len(decoder)}
    own = T5ForConditionalGeneration(T5Config(**args)).eval().requires_grad_(False)
    own.config.scale_decoder_outputs = stem.config.scale_decoder_outputs
    if stem.lm_head.weight is not stem.shared.weight:
        own.lm_head.weight = nn.Parameter(own.lm_head.weight.clone(), requires_grad=False)
    for name, parameter in own.named_parameters():
        source = stem
        match = re.fullmatch(r"(encoder|decoder)\.block\.(\d+)\.(.+)", name)
        if match and match[3] != BIAS:
            m, k = {"encoder": encoder, "decoder": decoder}[match[1]][int(match[2])]
            source, name = models[m], f"{match[1]}.block.{k}.{match[3]}"
        parameter.copy_(source.get_parameter(name))
    return own


def reference(model, row, *, mean: bool = False) -> list[float]:
    """The log-probability of each choice: one choice at a time, no padding, no cache."""
    ids, choices = row
    out, encoded = [], model.encoder(input_ids=torch.tensor([ids]))
    for choice in choices:
        shifted = [model.config.decoder_start_token_id, *choice[:-1]]
        logits = model(
            encoder_outputs=encoded,
            decoder_input_ids=torch.tensor([shifted]),
            use_cache=False,
        ).logits[0]  # (T, vocabulary)
        found = logits.log_softmax(-1)[range(len(choice)), choice]
        out.append(float(found.mean() if mean else found.sum()))
    return out


# Inputs of 6 to 11 tokens, 2 to 4 choices of 1 to 5 tokens, each with the end token.
ROWS = [
    ([12, 30, 7, 55, 9, 1], [[40, 1], [8, 33, 71, 1]]),
    ([3, 3, 90, 41, 22, 17, 60, 61, 5, 88, 1], [[5, 1], [6, 1], [9, 10, 11, 12, 1], [1]]),
    ([99, 4, 71, 12, 50, 1], [[20, 21, 1], [20, 22, 1], [23, 1]]),
]


def batch_of(rows, *, start: int = 0, mean: bool = False) -> TextBatch:
    """Padded with zeros at the right, entry by entry."""
    n, s = len(rows), max(len(ids) for ids, _ in rows)
    c = max(len(choices) for _, choices in rows)
    t = max(len(y) for _, choices in rows for y in choices)
    ids, mask = torch.zeros(n, s, dtype=torch.long), torch.zeros(n, s, dtype=torch.bool)
    choices, shifted = (torch.zeros(n, c, t, dtype=torch.long) for _ in range(2))
    shares = torch.zeros(n, c, t)
    for i, (x, ys) in enumerate(rows):
        for p, token in enumerate(x):
            ids[i, p], mask[i, p] = token, True
        for j, y in enumerate(ys):
            for p, token in enumerate(y):
                choices[i, j, p] = token
                shifted[i, j, p] = start if p == 0 else y[p - 1]
                shares[i, j, p] = 1 / len(y) if mean else 1
    return TextBatch(ids, mask, choices, shifted, shares)


def taken_apart(model):
    """What runs the model in pieces, and its parts, from transformers' own files' content."""
    config = model.config.to_dict()
    family = architecture(config)
    return family, t5.split(t5.canonical("m", config, dict(model.state_dict())))


def run(family, stem, layers, batch) -> torch.Tensor:
    """Log-probabilities (n, C) piece by piece; layers: (number, weights)."""
    stem = family.stem(stem)
    with torch.no_grad():
        state = family.embed(stem, batch)
        for k, weights in layers:
            state = family.apply(family.layer(k, weights), state)
        return family.logits(stem, state, {})


def logits_of(model, rows=ROWS) -> torch.Tensor:
    """Teacher-forced, padded, no cache: (n, T, vocabulary)."""
    batch = batch_of(rows, start=model.config.decoder_start_token_id)
    with torch.no_grad():
        return model(
            input_ids=batch.ids,
            attention_mask=batch.mask.long(),
            decoder_input_ids=batch.shifted[:, 1],
            use_cache=False,
        ).logits


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the order of sums in float32; logits are about 1 to 10."""
    assert found.dtype == expected.dtype == torch.float32
    assert expected.std() > 0.3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-4)


# ------------------------------------------------------------------------------ folders and texts

WORDS = ["no", "yes", *(f"w{i}" for i in range(5, 98))]


def write_tokenizer(folder: Path, words=WORDS) -> None:
    """Words between blanks; <pad> 0, </s> 1 and <unk> 2; transformers' own adds </s>."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.enable_truncation(4)  # files of others come with such settings; ours must not care
    tokenizer.enable_padding(length=30)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings_of = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": {"content": "</s>", "__type": "AddedToken"},
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings_of))


def write_t5(folder: Path, model, *, tokenizer: bool = True) -> Path:
    """As transformers writes it, and the tokenizer."""
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if tokenizer:
        write_tokenizer(folder)
    return folder


def text(rng, low: int, high: int) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(low, high)))


def write_texts(folder: Path, seed: int, *, fixed: bool, n: int = 12) -> Path:
    """Rows in three splits: with the choices no and yes, mostly no; or with choices of their own."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for split in ("train", "reward", "test"):
        lines = []
        for i in range(n):
            choices = ["no", "yes"]
            while not fixed and (len(set(choices)) < 3 or choices[0] == "no"):
                choices = [text(rng, 1, 5) for _ in range(2 + i % 3)]
                choices += [f"{choices[0]} w7"] if len(choices) == 2 else []
            label = int(i % 4 == 0) if fixed else int(rng.integers(len(choices)))
            lines.append({"input": text(rng, 3, 9), "choices": choices, "label": label})
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def rows_of(folder: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def pool_of(t5s, variant="t5", operators=("weight_average", "ties")) -> LayerPool:
    base, *experts = map(read_checkpoint, t5s[variant][1])
    return LayerPool(base, experts, ("one", "two"), operators)


def problem_of(t5s, variant="t5", stem="one", **options):
    base, *experts = map(str, t5s[variant][1])
    return load_problem(
        experts,
        base=base,
        texts=list(map(str, t5s["texts"])),
        operators=("weight_average", "ties"),
        stem=stem,
        **options,
    )
