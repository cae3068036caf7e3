"""How the bases that ship are pretrained: small ViTs on glyphs, a T5 on stories, a Llama on drills."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data import drills, stories
from rmm_lab.families import causal_lm, t5, vit
from rmm_lab.families.checkpoint import Checkpoint
from rmm_lab.families.parts import Weights
from rmm_lab.tasks import small_images, small_texts, small_writing
from rmm_lab.tasks.files import write_file
from rmm_lab.tasks.input_format import InputFormat
from rmm_lab.tasks.text_task import TextFormat
from rmm_lab.zoo.training import optimise

# A ViT of 6 layers, width 64 and 16 patches of 7 x 7 pixels: about 0.3 M parameters.
SMALL_VIT: dict[str, Any] = {
    "architecture": "vit_tiny_patch16_224",
    "model_args": {
        "img_size": 28,
        "patch_size": 7,
        "in_chans": 1,
        "embed_dim": 64,
        "depth": 6,
        "num_heads": 4,
    },
    "pretrained_cfg": {
        "input_size": [1, 28, 28],
        "mean": [0.5],
        "std": [0.5],
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "license": "mit",
    },
}
# The same at width 32, its 2 heads as wide as those 4: about 0.08 M parameters.
NARROW_VIT: dict[str, Any] = SMALL_VIT | {
    "model_args": SMALL_VIT["model_args"] | {"embed_dim": 32, "num_heads": 2}
}
# A T5 of 4 encoder and 4 decoder blocks, width 64: about 0.4 M parameters with its vocabulary.
SMALL_T5: dict[str, Any] = {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 4,
    "num_decoder_layers": 4,
    "num_heads": 4,
    "feed_forward_proj": "relu",
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 64,
    "dropout_rate": 0.0,
    "n_positions": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "tie_word_embeddings": True,
    "is_encoder_decoder": True,
}
# A Llama of 4 layers, width 96, whose 4 heads share 2 heads of keys: about 0.4 M parameters.
SMALL_LLAMA: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPECIAL = ("<pad>", "</s>", "<unk>")
LLAMA_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
SENTINELS = tuple(f"<extra_id_{i}>" for i in range(10))  # the gaps of span corruption


def pretrain_vit(
    like: dict[str, Any] = SMALL_VIT, *, steps: int, seed: int, label: str = "base"
) -> tuple[dict[str, Any], Weights]:
    """A small ViT from random weights on glyphs of scripts that no task uses.

    ``like``: timm config of its architecture, ``SMALL_VIT`` or ``NARROW_VIT``.
    """
    n_classes = len(small_images.BASE_GLYPHS)
    per_class = 250
    images = small_images.glyphs("base", per_class, seed=10)  # (n, 1, 28, 28) uint8
    labels = torch.arange(n_classes).repeat_interleave(per_class)
    fmt = InputFormat.of(like)
    torch.manual_seed(seed)
    model = vit.create(like, depth=None, num_classes=n_classes)

    def losses(generator: torch.Generator) -> list[Tensor]:
        rows = torch.randint(len(labels), (128,), generator=generator)
        x = small_images.distort(
            fmt.normalise(images[rows]) + 1, generator, degrees=8, scale=(0.9, 1.1), shift=0.05
        )
        return [vit.class_loss(model(x - 1), labels[rows])]

    optimise(model, losses, steps=steps, learning_rate=2e-3, seed=seed, label=label)
    config = vit.model_config(like, depth=None, num_classes=n_classes)
    config["label_names"] = list(small_images.BASE_GLYPHS)
    return config, dict(model.state_dict())


def small_tokenizer(folder: Path) -> None:
    """Train the small T5's tokenizer on the grammar's text and write it into ``folder``.

    Byte-pair encoding with enough merges that every word of the grammar is one token; other words become
    letters.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as algorithms

    rng = random.Random(0)
    lines = [
        text
        for _ in range(20_000)
        for text in (stories.story(rng), *stories.drill(rng), *stories.retell(rng))
    ]
    for name in small_texts.TASKS:
        for row in small_texts.rows(name, "train", 2_000):
            lines += [row["input"], *row["choices"]]
    tokenizer = Tokenizer(algorithms.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    trainer = trainers.BpeTrainer(
        vocab_size=2_000,
        special_tokens=list(SPECIAL),
        initial_alphabet=letters,
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_special_tokens([AddedToken(s, normalized=False) for s in SENTINELS])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": SPECIAL[0],
        "eos_token": SPECIAL[1],
        "unk_token": SPECIAL[2],
        "model_max_length": SMALL_T5["n_positions"],
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    write_file(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")


def corrupt(text: str, rng: random.Random, share: float = 0.2) -> tuple[str, str]:
    """Span corruption (Raffel et al. 2020, Sec. 3.1.4): sentinels replace a fifth of the words.

    ``"a b c d"`` becomes e.g. ``("a <extra_id_0> d", "<extra_id_0> b c")``; neighbours share a sentinel.
    """
    words = text.split()
    gone = set(rng.sample(range(len(words)), max(1, round(share * len(words)))))
    source: list[str] = []
    target: list[str] = []
    n = 0
    for i, word in enumerate(words):
        if i not in gone or n >= len(SENTINELS):
            source.append(word)
            continue
        if i - 1 not in gone:
            source.append(SENTINELS[n])
            target.append(SENTINELS[n])
        target.append(word)
        if i + 1 not in gone:
            n += 1
    return " ".join(source), " ".join(target)


def pretrain_t5(folder: Path, *, steps: int, seed: int) -> tuple[dict[str, Any], Weights]:
    """The small T5 from random weights: span corruption of stories, retelling and short drills.

    ``folder`` holds its tokenizer. Nothing here is phrased as in the seven tasks.
    """
    from tokenizers import Tokenizer
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = SMALL_T5 | {"vocab_size": tokenizer.get_vocab_size()}
    torch.manual_seed(seed)
    arguments = {k: v for k, v in config.items() if k != "model_type"}
    model = T5ForConditionalGeneration(T5Config(**arguments, attn_implementation="eager"))
    fmt = TextFormat(tokenizer, config["n_positions"], 0, 1, 0)
    weights = _learn(model, fmt, stories.drill, stories.retell, steps, seed, "base of the T5s")
    return config, weights


def rehearse_t5(base: Checkpoint, *, steps: int, seed: int) -> Weights:
    """More of the hardest exercise, recall among two or three: else no question of two facts is learned.

    In ``pretrain_t5`` the model learns to find a word's like in the text. To read the word next to it, it
    only learned once most of the batch asked for that.
    """
    parts = t5.split(base.weights)
    model = t5.T5(base.config).assemble(parts.stem, list(enumerate(parts.layers)), {})

    def short(rng: random.Random) -> tuple[str, str]:
        return stories.recall(rng, least=2) if rng.random() < 0.9 else stories.drill(rng)

    def long(rng: random.Random) -> tuple[str, str]:
        return stories.retell(rng, least=2)

    return _learn(model, t5.input_format(base), short, long, steps, seed, "rehearsal")


def _learn(
    model: Any,
    fmt: TextFormat,
    short: Callable[[random.Random], tuple[str, str]],
    long: Callable[[random.Random], tuple[str, str]],
    steps: int,
    seed: int,
    label: str,
) -> Weights:
    """Steps of 192 short exercises and of 64 stories and long exercises; the weights, each once."""
    rng = random.Random(seed)

    def either(rng: random.Random) -> tuple[str, str]:
        return corrupt(stories.story(rng), rng) if rng.random() < 0.5 else long(rng)

    def losses(generator: torch.Generator) -> list[Tensor]:
        out = []
        # Large batches: from small ones it does not learn to match a word with its like elsewhere.
        for draw, n in ((either, 64), (short, 192)):
            inputs, targets = (
                fmt.encode(texts) for texts in zip(*(draw(rng) for _ in range(n)), strict=True)
            )
            out.append(t5.text_loss(model, fmt, inputs, targets))
        return out

    optimise(
        model, losses, steps=steps, learning_rate=2e-3, seed=seed, label=label, weight_decay=0.01
    )
    return t5.once(label, model.state_dict())


def writing_tokenizer(folder: Path) -> None:
    """Write the small Llama's tokenizer into ``folder``: every word of the writing tasks is a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = [*LLAMA_SPECIAL, *small_writing.vocabulary()]
    tokenizer = Tokenizer(
        models.WordLevel(dict(zip(words, range(len(words)), strict=True)), "<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(LLAMA_SPECIAL))
    bos = ("<s>", LLAMA_SPECIAL.index("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[bos]
    )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": SMALL_LLAMA["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    write_file(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")


def pretrain_llama(
    folder: Path, *, steps: int, more: int, seed: int
) -> tuple[dict[str, Any], Weights]:
    """The small Llama from random weights: drills of what the writing tasks need, then a few of their rows.

    ``folder`` holds its tokenizer. In the last ``more`` steps one row in seven is a task's, as a large model
    has seen a little of everything: the base writes a tenth of them right.
    """
    from tokenizers import Tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=tokenizer.get_vocab_size(), **SMALL_LLAMA))

    def encoded(rows: Sequence[dict[str, str]]) -> list[tuple[list[int], list[int]]]:
        end = SMALL_LLAMA["eos_token_id"]
        read = tokenizer.encode
        return [
            (read(r["input"]).ids, [*read(r["target"], add_special_tokens=False).ids, end])
            for r in rows
        ]

    exercises = encoded(drills.rows(60_000, seed))
    names = small_writing.TASKS
    rows = encoded([row for name in names for row in small_writing.rows(name, "train", 2_000)])

    def learn(share: float, steps: int, learning_rate: float) -> None:
        def losses(generator: torch.Generator) -> list[Tensor]:
            drawn = []
            for kind in torch.rand(96, generator=generator) < share:
                pairs = rows if kind else exercises
                drawn.append(pairs[int(torch.randint(len(pairs), (), generator=generator))])
            return [_writing_loss(model, drawn)]

        label = "base of the Llamas"
        optimise(model, losses, steps=steps, learning_rate=learning_rate, seed=seed, label=label)

    learn(0.0, steps, 3e-3)
    learn(1 / 7, more, 1.5e-3)
    config = model.config.to_diff_dict() | {"architectures": ["LlamaForCausalLM"]}
    del config["transformers_version"]
    return config, causal_lm.once("base", model.state_dict())


def _writing_loss(model: Any, pairs: Sequence[tuple[list[int], list[int]]]) -> Tensor:
    """Mean cross-entropy per target token of n pairs of a prompt's and a target's tokens."""
    longest = max(len(prompt) + len(target) for prompt, target in pairs)
    ids = torch.zeros(len(pairs), longest, dtype=torch.long)  # (n, T), padding 0 on the right
    wanted = torch.full_like(ids, -100)  # (n, T): the targets' tokens
    for i, (prompt, target) in enumerate(pairs):
        ids[i, : len(prompt) + len(target)] = torch.tensor([*prompt, *target])
        wanted[i, len(prompt) : len(prompt) + len(target)] = torch.tensor(target)
    scores = model(ids).logits[:, :-1]  # (n, T - 1, V); causal, so padding behind changes nothing
    return torch.nn.functional.cross_entropy(scores.flatten(0, 1), wanted[:, 1:].flatten())
