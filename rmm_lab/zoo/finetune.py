"""The command ``rmm-lab finetune``: an expert, or a multi-task model, from any base that can be merged.

python -m rmm_lab finetune --base B --images FOLDER --out E
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from rmm_lab.errors import InputError, Range, check_values
from rmm_lab.families.checkpoint import read_checkpoint, write_checkpoint
from rmm_lab.families.shipped import locate
from rmm_lab.reward import predict
from rmm_lab.zoo.training import fine_tune


@dataclass
class Finetune:
    """Fine-tune a base on image folders or texts: one makes an expert, several a multi-task model."""

    base: str = ""
    """Base model: a folder of timm or transformers, hf-hub:OWNER/NAME, or base or text-base, which ship."""
    out: Path | None = None
    """New or empty folder to write the fine-tuned model to."""
    images: tuple[str, ...] = ()
    """For a ViT: image folders (SPLIT/CLASS/image or CLASS/image), FORMAT:FOLDER or FORMAT:hf-hub (cifar10,
    cifar100, cub200, dogs), or sets that ship; with :first or :second behind, half of its classes. The
    split train is used."""
    texts: tuple[str, ...] = ()
    """For a T5 or a language model: folders or files of jsonl, FORMAT:FOLDER, FORMAT:hf-hub, or sets that
    ship; train is used."""
    steps: int = 1000
    """Optimiser steps."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    batch_size: int = 128
    """Examples per step."""
    allow_pickle: bool = False
    """Read a base whose weights come as .bin or .pth alone (restricted loader); trust its source."""
    threads: int = 0
    """CPU threads for torch; 0 leaves the choice to torch."""
    seed: int = 0
    """Seed of a ViT's new head, of dropout and of the batches."""

    def run(self) -> None:
        """Fine-tune, write the model, and report each task's metric on its test split."""
        data, sources = ("texts", self.texts) if self.texts else ("images", self.images)
        self._check(sources)
        assert self.out is not None
        if self.threads:
            torch.set_num_threads(self.threads)
        base = read_checkpoint(locate(self.base), allow_pickle=self.allow_pickle)
        family = base.family
        if data != family.DATA:
            raise InputError(
                f"--{data}: expected --{family.DATA}, since base {self.base!r} is {family.NAME}, found "
                f"--{data}"
            )
        tasks = family.make_tasks(base, sources)
        if len({task.name for task in tasks}) < len(tasks):
            raise InputError(
                f"--{data}: expected folders of different names, found {[t.name for t in tasks]}; rename"
            )
        for task in tasks:  # broken data must show before hours of training
            for split in ("train", "test"):
                if cut := getattr(task.split(split), "cut", 0):
                    print(
                        f"note: {task.name}: {cut} inputs of the {split} split are too long, and cut"
                    )
        config, weights = fine_tune(
            base,
            tasks,
            steps=self.steps,
            learning_rate=self.learning_rate,
            seed=self.seed,
            batch_size=self.batch_size,
        )
        write_checkpoint(self.out, config, weights, beside=base.folder)
        model = read_checkpoint(self.out)  # as it is written
        architecture, parts = family.architecture(config), family.split(model.weights)
        stem = architecture.stem(parts.stem)
        layers = [architecture.layer(k, w) for k, w in enumerate(parts.layers)]
        for task in tasks:
            head = parts.head if len(tasks) == 1 else family.task_head(model, task)
            predicted = predict(architecture, stem, layers, head, task, "test")
            score = task.score(predicted, task.split("test").labels)
            metric = "" if task.metric == "accuracy" else f" ({task.metric})"
            print(f"{task.name}: {100 * score:.1f} % of the test split{metric}")
        print(f"written: {self.out}")

    def _check(self, sources: tuple[str, ...]) -> None:
        """Raise InputError for options out of range, before anything is read."""
        positive: Range = ("more than 0", lambda value: value > 0)
        given: Range = ("the model to fine-tune, a folder or hub name", bool)
        threads: Range = ("0 or more", lambda value: value >= 0)
        ranges = {"steps learning_rate batch_size": positive, "threads": threads, "base": given}
        check_values(self, ranges)
        if not sources or (self.images and self.texts):
            raise InputError(
                f"--images: expected at least one folder, or --texts for a T5 or language model, found "
                f"{'both' if sources else 'none'}; name one"
            )
        if self.batch_size < len(sources):
            raise InputError(
                f"--batch-size: expected at least {len(sources)}, an example of each task, found "
                f"{self.batch_size}"
            )
        out = self.out
        if out is None or out.is_file() or (out.exists() and any(out.iterdir())):
            found = "none" if out is None else f"something in {out}"
            raise InputError(f"--out: expected an empty or new folder, found {found}; name one")
