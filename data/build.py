"""Rebuilds everything under ``data/`` from nothing, seeded: ``python -m data.build``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmm_lab.tasks.console import run_module

if __name__ == "__main__":  # here, so that Ctrl-C is a sentence while torch is imported
    sys.exit(run_module("data.build:Build", "what was rebuilt so far is stored"))

import torch
from PIL import Image

from data import pretraining
from rmm_lab.errors import (
    SEED_RANGE,
    UNIT_RANGE,
    InputError,
    Range,
    check_values,
)
from rmm_lab.families.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from rmm_lab.families.shipped import (
    BASE,
    MULTI_TASK,
    SETS,
    TEXT_BASE,
    TINY_BASE,
    WRITING_BASE,
    base_of,
    model_folder,
)
from rmm_lab.tasks import image_task, small_images, small_texts, small_writing, text_task
from rmm_lab.tasks.files import SPLITS, write_file
from rmm_lab.zoo.training import fine_tune


def write_sheet(name: str, split: str) -> Path:
    """Draw a split and store it as a 4-bit grey PNG under ``data/sets``."""
    per_class = image_task.SMALL[name][1][SPLITS.index(split)]
    images = small_images.render(name, split, per_class)  # (classes * per_class, 1, 28, 28)
    size = small_images.SIZE
    rows = images.view(-1, per_class, size, size).permute(0, 2, 1, 3)
    sheet = rows.reshape(-1, per_class * size).numpy()  # (classes * 28, per_class * 28)
    picture = Image.fromarray(sheet // 17, mode="P")
    picture.putpalette([17 * i for i in range(16) for _ in "rgb"])
    file = image_task.sheet_file(name, split)
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file, bits=4, optimize=True)
    return file


def write_rows(name: str, split: str) -> Path:
    """Make a split and store it as jsonl under ``data/sets``."""
    file = text_task.rows_file(name, split)
    file.parent.mkdir(parents=True, exist_ok=True)
    grammar = small_texts if name in small_texts.TASKS else small_writing
    rows = grammar.rows(name, split, text_task.SIZES[split])
    write_file(file, "".join(json.dumps(row) + "\n" for row in rows))
    return file


@dataclass
class Build:
    """Rebuild the small sets and every checkpoint under data/ from nothing."""

    threads: int = 1
    """CPU threads for torch; the checkpoints that ship were made with one."""
    seed: int = 0
    """Seed of every initialisation and batch."""
    only: tuple[str, ...] = ()
    """Rebuild only these (sets, base, digits, digits+textures, digits-first, digits-first+digits-second,
    tiny-base, tiny-digits-first, ..., text-sets, text-base, swaps, qa, ..., llm-base, code, llm, ...)."""
    pretrain_steps: int = 3000
    """Steps of 128 images for the ViTs' bases."""
    steps: int = 1500
    """Steps of 128 images for each ViT on whole sets."""
    half_steps: int = 750
    """Steps of 128 images for each ViT on halves of sets: half the classes."""
    learning_rate: float = 1e-3
    """Peak learning rate of fine-tuning the ViTs of width 64."""
    tiny_learning_rate: float = 3e-3
    """Peak learning rate of fine-tuning the ViTs of width 32."""
    text_pretrain_steps: int = 4000
    """Steps of 256 texts for the T5s' base."""
    text_rehearsal_steps: int = 1500
    """Steps of 256 texts on recall, for the T5s' base after that."""
    text_steps: int = 1500
    """Steps of at most 64 texts for each T5."""
    text_learning_rate: float = 2e-3
    """Peak learning rate of fine-tuning the T5s."""
    writing_pretrain_steps: int = 1600
    """Steps of 96 exercises for the Llamas' base."""
    writing_more_steps: int = 300
    """Steps after that, in which one exercise in seven is a row of a task."""
    writing_steps: int = 300
    """Steps of 64 texts for each Llama; three times as many for the multi-task model."""

    def run(self) -> None:
        """Sets first, then bases, then the models fine-tuned from them."""
        some: Range = ("1 or more", lambda v: v >= 1)
        rates = [name for name in vars(self) if name.endswith("learning_rate")]
        ranges = {name: some for name in vars(self) if name.endswith("steps")}
        ranges |= dict.fromkeys(rates, UNIT_RANGE) | {"seed": SEED_RANGE}
        check_values(self, ranges | {"threads": ("1 to 1024", lambda v: 1 <= v <= 1024)})
        torch.set_num_threads(self.threads)
        tuned = {name: (name,) for name in SETS} | MULTI_TASK
        known = ["sets", "text-sets", BASE, TINY_BASE, TEXT_BASE, WRITING_BASE, *tuned]
        if unknown := set(self.only) - set(known):
            raise InputError(
                f"--only: expected some of {', '.join(known)}, found {unknown.pop()!r}"
            )
        wanted = self.only or known
        if "sets" in wanted:
            for name in image_task.SMALL:
                for split in SPLITS if name == "digits" else ("reward", "test"):
                    print(f"set: {write_sheet(name, split)}")
        if "text-sets" in wanted:
            for name in (*small_texts.TASKS, *small_writing.TASKS):
                for split in ("reward", "test"):
                    print(f"set: {write_rows(name, split)}")
        for name, like in ((BASE, pretraining.SMALL_VIT), (TINY_BASE, pretraining.NARROW_VIT)):
            if name in wanted:
                config, weights = pretraining.pretrain_vit(
                    like, steps=self.pretrain_steps, seed=self.seed, label=name
                )
                write_checkpoint(model_folder(name), config, weights, dtype=torch.float16)
        if TEXT_BASE in wanted:
            self._text_base()
        if WRITING_BASE in wanted:
            folder = model_folder(WRITING_BASE)
            pretraining.writing_tokenizer(folder)
            steps = {"steps": self.writing_pretrain_steps, "more": self.writing_more_steps}
            config, weights = pretraining.pretrain_llama(folder, **steps, seed=self.seed)
            write_checkpoint(folder, config, weights, dtype=torch.float16)
        for name, group in tuned.items():
            if name in wanted:
                base = read_checkpoint(model_folder(base_of(group[0])))
                tasks = base.family.make_tasks(base, [SETS[n] for n in group])
                settings = self._settings(group)
                config, weights = fine_tune(base, tasks, seed=self.seed + 1, label=name, **settings)
                write_checkpoint(
                    model_folder(name), config, weights, dtype=torch.float16, beside=base.folder
                )

    def _settings(self, group: Sequence[str]) -> dict[str, Any]:
        """How a model is fine-tuned on the tasks of these experts."""
        expert = group[0]
        if expert in small_texts.TASKS:
            return {
                "steps": self.text_steps,
                "learning_rate": self.text_learning_rate,
                "batch_size": 64,
            }
        if expert in small_writing.TASKS:
            steps = self.writing_steps * len(group)
            return {"steps": steps, "learning_rate": 1e-3, "batch_size": 64}
        is_tiny = base_of(expert) == TINY_BASE
        return {
            "steps": self.half_steps if ":" in SETS[expert] else self.steps,
            "learning_rate": self.tiny_learning_rate if is_tiny else self.learning_rate,
        }

    def _text_base(self) -> None:
        folder = model_folder(TEXT_BASE)
        pretraining.small_tokenizer(folder)
        steps = self.text_pretrain_steps
        config, weights = pretraining.pretrain_t5(folder, steps=steps, seed=self.seed)
        # Rounded to what a file would hold, so that it can be continued from one as well.
        half = {name: tensor.half().float() for name, tensor in weights.items()}
        start = Checkpoint(TEXT_BASE, folder, config, half, "")
        steps = self.text_rehearsal_steps
        weights = pretraining.rehearse_t5(start, steps=steps, seed=self.seed)
        write_checkpoint(folder, config, weights, dtype=torch.float16)
