"""Small language models, their tokenizer and texts, by transformers alone; and what ours must agree with."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

TINY = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 2}
WIDE = {"head_dim": 12}  # heads times their width is not the width
VARIANTS: dict[str, tuple[str, dict]] = {
    "llama": ("llama", GROUPED | {"tie_word_embeddings": False}),
    "llama-tied": (
        "llama",
        {
            "tie_word_embeddings": True,
            "attention_bias": True,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
            "rope_theta": 500.0,
        },
    ),
    "mistral": ("mistral", GROUPED | WIDE | {"sliding_window": 5}),
    "qwen2": (
        "qwen2",
        GROUPED | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", GROUPED | WIDE | {"tie_word_embeddings": True}),
    "gemma": ("gemma", GROUPED | WIDE),
    "gemma2": (
        "gemma2",
        GROUPED
        | WIDE
        | {"sliding_window": 4, "query_pre_attn_scalar": 9, "attn_logit_softcapping": 2.0}
        | {"final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "gemma3_text",
        GROUPED | WIDE | {"sliding_window": 4, "sliding_window_pattern": 2, "rope_theta": 300.0},
    ),
    "gpt2": ("gpt2", {"n_inner": 40}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False, "scale_attn_weights": False}),
    "neox": ("gpt_neox", {"rotary_pct": 0.5}),
    "neox-sequential": ("gpt_neox", {"use_parallel_residual": False, "rotary_pct": 1.0}),
}
STACKS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}


def hf_config(variant: str, **more):
    """transformers' config of a variant, with plain attention, which all of them can."""
    kind, own = VARIANTS[variant]
    # As from a folder: in a config of the hub's all are keywords.
    return CONFIG_MAPPING[kind](**copy.deepcopy(TINY | own | more), attn_implementation="eager")


def hf_model(variant: str = "llama", seed: int = 0, **more):
    """A transformers model, every parameter of which is random and makes a difference."""
    model = AutoModelForCausalLM.from_config(hf_config(variant, **more))
    model.eval().requires_grad_(False)
    g = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        is_norm = "norm" in name or ".ln_" in name
        scale = 0.5 if is_norm else 1.0 if "embed" in name or "wte" in name else 0.3
        parameter.copy_(scale * torch.randn(parameter.shape, generator=g))
        if is_norm and name.endswith("weight") and not variant.startswith("gemma"):
            parameter += 1
    return model


def tuned(model, seed: int, scale: float = 0.1):
    """A copy that has moved away from the model in every parameter."""
    model, g = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter += scale * torch.randn(parameter.shape, generator=g)
    return model


def stack_of(model) -> str:
    """What the names of its layers' tensors begin with."""
    return STACKS.get(model.config.model_type, "model.layers")


def config_of(model) -> dict:
    """What ``save_pretrained`` writes as config.json."""
    return json.loads(model.config.to_json_string(use_diff=False)) | {
        "architectures": [type(model).__name__]
    }


# ------------------------------------------------------------------------------ rows as tokens

# A prompt of 3 to 9 tokens, and 1 to 3 choices of 1 to 4 tokens.
ROWS = [
    ([1, 12, 30, 7, 55], [[40, 2], [8, 33, 71, 2]]),
    ([1, 3, 3, 90, 41, 22, 17, 60, 61], [[5, 2], [6, 2], [9, 10, 11, 2]]),
    ([1, 99, 4], [[20, 21, 2], [20, 22, 2], [2]]),
]


def reference(model, prompt: list[int], choice: list[int]) -> torch.Tensor:
    """Log-probabilities at a choice's tokens: alone, no padding, no cache; (T, vocabulary)."""
    with torch.no_grad():
        ids = torch.tensor([[*prompt, *choice]])
        logits = model(input_ids=ids, use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def log_probability(model, prompt: list[int], choice: list[int], mean: bool = False) -> float:
    found = reference(model, prompt, choice)[range(len(choice)), choice]
    return float(found.mean() if mean else found.sum())


# ------------------------------------------------------------------------------ folders and texts

WORDS = ["no", "yes", *(f"w{i}" for i in range(6, 100))]


def write_tokenizer(folder: Path, *, begin: bool = True) -> None:
    """Words between blanks; <pad> 0, <s> 1, </s> 2 and <unk> 3; a text begins with <s> if asked for."""
    names = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]
    tokenizer = Tokenizer(WordLevel({n: i for i, n in enumerate(names[:100])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "pad_token": "<pad>",
        "eos_token": {"content": "</s>", "__type": "AddedToken"},
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def numbers(words: str) -> list[int]:
    """Tokens of words, without begin and end."""
    known = {n: i for i, n in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS]) if i < 100}
    return [known.get(word, 3) for word in words.split()]


def write_lm(folder: Path, model, *, tokenizer: bool = True, begin: bool = True) -> Path:
    """As transformers writes it, and the tokenizer."""
    model.save_pretrained(folder)
    if tokenizer:
        write_tokenizer(folder, begin=begin)
    return folder


def text(rng, low: int, high: int) -> str:
    return " ".join(rng.choice(WORDS[:96], rng.integers(low, high)))


def write_rows(folder: Path, rows: dict[str, list[dict]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, own in rows.items():
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, own)) + "\n")
    return folder


def write_texts(folder: Path, seed: int, kind: str, n: int = 12) -> Path:
    """Rows in three splits: choices of their own, targets to be written, or texts to be read."""
    rng = np.random.default_rng(seed)

    def row(i: int) -> dict:
        if kind == "choices":
            choices = [f"{text(rng, 1, 4)} w{9 + j}" for j in range(2 + i % 3)]
            return {"input": text(rng, 3, 9), "choices": choices, "label": i % len(choices)}
        if kind == "target":
            return {"input": text(rng, 3, 9), "target": text(rng, 1, 4)}
        return {"text": text(rng, 4, 12)}

    splits = ("train", "reward", "test")
    return write_rows(folder, {split: [row(i) for i in range(n)] for split in splits})
