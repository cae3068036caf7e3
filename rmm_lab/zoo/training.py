"""How checkpoints are made: pretraining and fine-tuning, of ViTs on pictures and of T5s on texts.

A model fine-tuned on one task is an expert, one on several tasks at once the multi-task model. This is the
only place where gradients touch a model's weights.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rmm_lab.errors import InputError
from rmm_lab.families import checkpoint as models
from rmm_lab.families import t5, vit
from rmm_lab.families.checkpoint import Checkpoint
from rmm_lab.families.parts import Weights
from rmm_lab.tasks import image_task as tasks
from rmm_lab.tasks import small_images as render
from rmm_lab.tasks import small_texts as grammar
from rmm_lab.tasks.text_task import TextFormat, TextTask

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
SPECIAL = ("<pad>", "</s>", "<unk>")
SENTINELS = tuple(f"<extra_id_{i}>" for i in range(10))  # the gaps of span corruption


def optimise(
    model: nn.Module,
    losses: Callable[[torch.Generator], Sequence[Tensor]],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    label: str,
    weight_decay: float = 0.05,
) -> None:
    """AdamW under a cosine schedule with 5 % warm-up; the loss of a step is the mean over tasks.

    losses: gives, for a step, each task's loss, a scalar.
    """
    generator = torch.Generator().manual_seed(seed)
    model.train().requires_grad_(True)
    # A share that no whole number of steps turns into exactly one, by which the schedule divides.
    warm_up = 0.05 if steps >= 40 else 0.55
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=learning_rate, total_steps=steps, pct_start=warm_up
    )
    start = time.perf_counter()
    for step in range(steps):
        loss = torch.stack(list(losses(generator))).mean()
        if not torch.isfinite(loss):
            raise InputError(
                f"{label}: expected a finite loss, found {loss.item()} at step {step + 1} of {steps}; lower "
                "the learning rate"
            )
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if (step + 1) % max(1, steps // 20) == 0 or step + 1 == steps:
            left = (time.perf_counter() - start) / (step + 1) * (steps - step - 1)
            print(
                f"\r{label}: step {step + 1}/{steps}  loss {loss.item():.3f}  {left:4.0f} s left ",
                end="" if step + 1 < steps else "\n",
                flush=True,
            )
    model.eval().requires_grad_(False)


# -------------------------------------------------------------------------------- ViTs on pictures


def fine_tune(
    base: Checkpoint,
    on: Sequence[tasks.Task],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    batch_size: int = 128,
    label: str = "fine-tune",
    augment: bool = True,
    device: str = "cpu",
) -> tuple[dict[str, Any], Weights]:
    """Fine-tune all of a ViT on the train split of one task (an expert) or several (multi-task).

    Images are turned by at most 8 degrees, scaled by a tenth and shifted by at most 7 %: safe for
    digits, letters and signs, which flips are not. ``device``: where the model is trained. Returns the timm
    config and the weights, there.
    """
    total = sum(len(task.classes) for task in on)
    torch.manual_seed(seed)  # timm initialises the new head from the global generator
    model = vit.create(base.config, depth=None, num_classes=total)
    weights = {k: v for k, v in base.weights.items() if not k.startswith("head.")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or any(not name.startswith("head.") for name in missing):
        raise InputError(
            f"base {base.source!r}: expected the weights that its config.json describes, found "
            f"{(unexpected + missing)[0]!r} out of place; save the model with timm again"
        )
    model.to(device)
    parts, start = [], 0
    for task in on:
        parts.append(slice(start, start + len(task.classes)))
        start += len(task.classes)

    def losses(generator: torch.Generator) -> list[Tensor]:
        out = []
        for task, part in zip(on, parts, strict=True):
            data = task.split("train")
            rows = torch.randint(len(data), (batch_size // len(on),), generator=generator)
            images = task.format.normalise(data.images[rows])
            if augment:
                low = images.amin()  # what comes in from outside the frame is background
                images = low + render.distort(
                    images - low, generator, degrees=8, scale=(0.9, 1.1), shift=0.07
                )
            logits = model(images.to(device))[:, part]
            out.append(_classification_loss(logits, data.labels[rows].to(device)))
        return out

    optimise(model, losses, steps=steps, learning_rate=learning_rate, seed=seed, label=label)
    config = vit.model_config(base.config, depth=None, num_classes=total)
    if len(on) == 1:
        config["label_names"] = list(on[0].classes)
    else:
        config["label_names"] = [f"{task.name}/{c}" for task in on for c in task.classes]
        config["rmm_lab"] = {
            "heads": {t.name: [p.start, p.stop] for t, p in zip(on, parts, strict=True)}
        }
    return config, dict(model.state_dict())


def _classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, labels, label_smoothing=0.05)


def pretrain_vit(
    like: dict[str, Any] = SMALL_VIT, *, steps: int, seed: int, label: str = "base"
) -> tuple[dict[str, Any], Weights]:
    """A small ViT from random weights on glyphs of scripts that no task uses.

    ``like``: timm config of its architecture, ``SMALL_VIT`` or ``NARROW_VIT``.
    """
    n_classes = len(render.BASE_GLYPHS)
    per_class = 250
    images = render.glyphs("base", per_class, seed=10)  # (n, 1, 28, 28) uint8
    labels = torch.arange(n_classes).repeat_interleave(per_class)
    fmt = tasks.InputFormat.of(like)
    torch.manual_seed(seed)
    model = vit.create(like, depth=None, num_classes=n_classes)

    def losses(generator: torch.Generator) -> list[Tensor]:
        rows = torch.randint(len(labels), (128,), generator=generator)
        x = render.distort(
            fmt.normalise(images[rows]) + 1, generator, degrees=8, scale=(0.9, 1.1), shift=0.05
        )
        return [_classification_loss(model(x - 1), labels[rows])]

    optimise(model, losses, steps=steps, learning_rate=2e-3, seed=seed, label=label)
    config = vit.model_config(like, depth=None, num_classes=n_classes)
    config["label_names"] = list(render.BASE_GLYPHS)
    return config, dict(model.state_dict())


# ------------------------------------------------------------------------------------ T5s on texts


def fine_tune_t5(
    base: Checkpoint,
    on: Sequence[TextTask],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    batch_size: int = 64,
    label: str = "fine-tune",
    device: str = "cpu",
) -> tuple[dict[str, Any], Weights]:
    """Fine-tune all of a T5 on the train split of one task (an expert) or several (multi-task).

    The target is the right choice's text, the loss its mean cross-entropy per token. ``device``: where the
    model is trained. Returns the transformers config and the weights, there, each tensor once.
    """
    architecture, parts = models.architecture(base.config), t5.split(base.weights)
    torch.manual_seed(seed)  # dropout, where the base's config asks for it
    model = architecture.assemble(parts.stem, list(enumerate(parts.layers)), {}).to(device)

    def losses(generator: torch.Generator) -> list[Tensor]:
        out = []
        for task in on:
            data = task.split("train")
            rows = torch.randint(len(data), (batch_size // len(on),), generator=generator).tolist()
            targets = [data.choices[i][int(data.labels[i])] for i in rows]
            out.append(_text_loss(model, task.format, [data.inputs[i] for i in rows], targets))
        return out

    optimise(model, losses, steps=steps, learning_rate=learning_rate, seed=seed, label=label)
    weights = t5.once(label, {k: v.detach() for k, v in model.state_dict().items()})
    gone = ("rmm_lab", "dtype", "torch_dtype")  # what we write is float32
    return {k: v for k, v in base.config.items() if k not in gone}, weights


def _text_loss(
    model: Any, fmt: TextFormat, inputs: Sequence[list[int]], targets: Sequence[list[int]]
) -> Tensor:
    """Mean cross-entropy per target token of n (input, target) pairs of token lists."""
    ids, mask = _pad(inputs, fmt.pad)
    wanted, there = _pad(targets, fmt.pad)
    start = torch.full((len(wanted), 1), fmt.start)
    device = next(model.parameters()).device
    ids, mask, wanted, there, start = (x.to(device) for x in (ids, mask, wanted, there, start))
    out = model(
        input_ids=ids,
        attention_mask=mask,
        decoder_input_ids=torch.cat([start, wanted[:, :-1]], 1),  # (n, T), one to the right
        use_cache=False,
    )
    return nn.functional.cross_entropy(out.logits[there.bool()], wanted[there.bool()])


def _pad(rows: Sequence[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Tokens (n, longest) and their mask, 1 for tokens and 0 for padding."""
    ids = torch.full((len(rows), max(map(len, rows))), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids, mask


def small_tokenizer(folder: Path) -> None:
    """Train the small T5's tokenizer on the grammar's text and write it into ``folder``.

    Byte-pair encoding with enough merges that every word of the grammar is one token; other words fall
    apart into letters.
    """
    import json

    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as algorithms

    rng = random.Random(0)
    lines = [
        text
        for _ in range(20_000)
        for text in (grammar.story(rng), *grammar.drill(rng), *grammar.retell(rng))
    ]
    for name in grammar.TASKS:
        for row in grammar.rows(name, "train", 2_000):
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
    models.write_file(folder / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    text = json.dumps(settings, indent=2) + "\n"
    models.write_file(folder / "tokenizer_config.json", text.encode())


def corrupt(text: str, rng: random.Random, share: float = 0.2) -> tuple[str, str]:
    """Span corruption (Raffel et al. 2020, Sec. 3.1.4): a fifth of the words makes way for sentinels.

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
    """The small T5 from random weights, on span corruption of stories, retelling and short drills.

    ``folder`` holds its tokenizer. None of the seven tasks is asked here in the task's words.
    """
    from tokenizers import Tokenizer
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = SMALL_T5 | {"vocab_size": tokenizer.get_vocab_size()}
    torch.manual_seed(seed)
    arguments = {k: v for k, v in config.items() if k != "model_type"}
    model = T5ForConditionalGeneration(T5Config(**arguments, attn_implementation="eager"))
    fmt = TextFormat(tokenizer, config["n_positions"], 0, 1, 0)
    weights = _learn(model, fmt, grammar.drill, grammar.retell, steps, seed, "base of the T5s")
    return config, weights


def rehearse_t5(base: Checkpoint, *, steps: int, seed: int) -> Weights:
    """More of the hardest: recall among two or three. Without it no question of two facts is learned.

    To find a word's like in the text comes first in ``pretrain_t5``; to read what stands beside it only
    came when most of the batch asked for that.
    """
    architecture, parts = models.architecture(base.config), t5.split(base.weights)
    model = architecture.assemble(parts.stem, list(enumerate(parts.layers)), {})

    def short(rng: random.Random) -> tuple[str, str]:
        return grammar.recall(rng, least=2) if rng.random() < 0.9 else grammar.drill(rng)

    def long(rng: random.Random) -> tuple[str, str]:
        return grammar.retell(rng, least=2)

    return _learn(model, TextFormat.of(base), short, long, steps, seed, "rehearsal")


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
        return corrupt(grammar.story(rng), rng) if rng.random() < 0.5 else long(rng)

    def losses(generator: torch.Generator) -> list[Tensor]:
        out = []
        # Large batches: matching a word with its like elsewhere is learned from them, not from small ones.
        for draw, n in ((either, 64), (short, 192)):
            inputs, targets = (
                fmt.encode(texts) for texts in zip(*(draw(rng) for _ in range(n)), strict=True)
            )
            out.append(_text_loss(model, fmt, inputs, targets))
        return out

    optimise(
        model,
        losses,
        steps=steps,
        learning_rate=2e-3,
        seed=seed,
        label=label,
        weight_decay=0.01,
    )
    return t5.once(label, {k: v.detach() for k, v in model.state_dict().items()})
