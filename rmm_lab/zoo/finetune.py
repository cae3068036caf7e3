"""The command ``rmm-lab finetune``: an expert, or a multi-task model, from any base that can be merged.

python -m rmm_lab finetune --base B --images FOLDER --out E
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from rmm_lab.errors import FULL, SEED_RANGE, UNIT_RANGE, InputError, Range, check_values
from rmm_lab.families.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from rmm_lab.families.parts import Weights
from rmm_lab.families.shipped import locate
from rmm_lab.reward import predict
from rmm_lab.tasks.console import finishing
from rmm_lab.tasks.files import SPLITS, check_names, split_lists, write_file
from rmm_lab.tasks.groups import of_groups
from rmm_lab.tasks.hold import check_apart, check_new, held_new
from rmm_lab.zoo.training import fine_tune, is_finite

_PIECE = 2**24  # bytes that are written at a time to try the space


@dataclass
class Finetune:
    """Fine-tune a base on image folders or texts: one makes an expert, several a multi-task model."""

    base: str | None = None
    """Base model: a folder of timm or transformers, hf-hub:OWNER/NAME, or base or text-base, which ship."""
    out: Path | None = None
    """New or empty folder to write the fine-tuned model to."""
    images: tuple[str, ...] = ()
    """For a ViT: image folders (SPLIT/CLASS/image or CLASS/image), FORMAT:FOLDER or FORMAT:hf-hub (cifar10,
    cifar100, cub200, dogs, gtsrb), or sets that ship; with :first or :second behind, half of its classes. The
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
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: each class (or answer, where all rows share them) counts the same, however frequent."""
    groups: tuple[str, ...] = ()
    """For a ViT: pictures that stay in one split, as in ``merge``: a CSV of file and group, or a regular
    expression whose bracket is the group; one for all folders, or one each."""

    def run(self) -> None:
        """Fine-tune and write the model; report the reward split on the way, the test split at the end.

        Ctrl-C keeps the best model so far by the reward split: of those after each quarter of the steps and
        the present one, which alone is kept before the first. No other process may write to its folder
        meanwhile.
        """
        data, sources = ("texts", self.texts) if self.texts else ("images", self.images)
        self.out = self.out and Path(self.out).expanduser()  # --out=~/x, which no shell expands
        self._check(sources)
        assert self.out is not None
        out = self.out
        if self.threads:
            torch.set_num_threads(self.threads)
        base = read_checkpoint(locate(self.base or ""), allow_pickle=self.allow_pickle)
        family = base.family
        if data != family.DATA:
            raise InputError(
                f"--{data}: expected --{family.DATA}, since base {self.base!r} is {family.NAME}, found "
                f"--{data}"
            )
        options = of_groups(self.groups, sources, family.DATA)
        tasks = family.make_tasks(base, sources, **options)
        if len({task.name for task in tasks}) < len(tasks):
            raise InputError(
                f"--{data}: expected folders of different names, found {[t.name for t in tasks]}; rename"
            )
        check_names(tasks)
        for task in tasks:  # broken data must show before hours of training
            for split in SPLITS:
                if cut := getattr(task.split(split), "cut", 0):
                    print(
                        f"note: {task.name}: {cut} inputs of the {split} split are too long, and cut"
                    )
            for note in getattr(task, "notes", ()):
                print(f"note: {note}")

        def say(model: Checkpoint, split: str, before: str = "") -> float:
            scores = list(_scores(model, tasks, split))
            for task, score in zip(tasks, scores, strict=True):
                metric = "" if task.metric == "accuracy" else f" ({task.metric})"
                print(f"{before}{task.name}: {100 * score:.1f} % of the {split} split{metric}")
            return sum(scores) / len(scores)

        best: tuple[float, str, Weights] | None = None

        def watch(step: int, config: dict[str, Any], weights: Weights) -> None:
            nonlocal best
            model = Checkpoint(str(out), out, config, weights, "")
            score = say(model, "reward", f"after {step} steps: ")
            if best is None or score >= best[0]:
                copies = {name: tensor.clone() for name, tensor in weights.items()}
                best = score, f"{step} of {self.steps} steps", copies

        def keep(at: str, config: dict[str, Any], weights: Weights) -> None:
            if not all(map(is_finite, weights.values())):
                weights = {}
            elif best is not None:
                with suppress(KeyboardInterrupt):  # again: the best so far
                    watch(int(at.partition(" ")[0]), config, weights)
            if best is not None:
                _, at, weights = best
            if weights:
                write(at, config, weights)

        done = ""

        def write(after: str, config: dict[str, Any], weights: Weights) -> None:
            nonlocal done
            with finishing(), _room(out):
                write_checkpoint(out, config, weights, beside=base.folder)
                if lists := split_lists(tasks):
                    write_file(out / "splits.csv", lists)
                done = after

        with held_new(out, "--out", resume=False):
            try_space(out, sum(t.numel() * t.element_size() for t in base.weights.values()))
            try:
                config, weights = fine_tune(
                    base,
                    tasks,
                    steps=self.steps,
                    learning_rate=self.learning_rate,
                    seed=self.seed,
                    batch_size=self.batch_size,
                    balance=self.class_weights == "balanced",
                    watch=watch,
                    keep=keep,
                )
                write(f"all {self.steps} steps", config, weights)
                say(Checkpoint(str(out), out, config, weights, ""), "test")
            except KeyboardInterrupt:
                if done:
                    raise KeyboardInterrupt(f"the model after {done} is in {out}") from None
                raise KeyboardInterrupt from None
            print(f"written: {out}")

    def _check(self, sources: tuple[str, ...]) -> None:
        """Raise InputError for options out of range, before anything is read."""
        positive: Range = ("more than 0", lambda value: value > 0)
        threads: Range = ("0 to 1024", lambda value: 0 <= value <= 1024)
        ranges = {"steps batch_size": positive, "learning_rate": UNIT_RANGE, "seed": SEED_RANGE}
        check_values(self, ranges | {"threads": threads})
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
        if self.base is None:
            raise InputError(
                "--base: expected the model to fine-tune, a folder or hub name, found none; name one"
            )
        if self.out is None:
            raise InputError("--out: expected an empty or new folder, found none; name one")
        check_apart(self.out, "--out", (locate(self.base), *sources))
        check_new(self.out, "--out", resume=False)


def _scores(model: Checkpoint, tasks: Sequence[Any], split: str) -> Iterator[float]:
    """Each task's metric in [0, 1] on a split."""
    family = model.family
    parts = family.split(family.canonical(model.source, model.config, model.weights))
    architecture = family.architecture(model.config)
    stem = architecture.stem(parts.stem)
    layers = [architecture.layer(k, w) for k, w in enumerate(parts.layers)]
    for task in tasks:
        head = parts.head if len(tasks) == 1 else family.task_head(model, task)
        predicted = predict(architecture, stem, layers, head, task, split)
        yield task.score(predicted, task.split(split).labels)


@contextmanager
def _room(out: Path) -> Iterator[None]:
    """A full disk in one sentence that names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise InputError(
            f"--out: expected space for the model in {out}, found too little; free some, or name a folder "
            "on another disk"
        ) from error


def try_space(out: Path, size: int) -> None:
    """Raise InputError unless a file of ``size`` bytes fits into the folder ``out``; nothing stays there."""
    scratch = out / ".space"
    with _room(out):
        try:
            with open(scratch, "wb") as file:
                for start in range(0, size, _PIECE):
                    file.write(bytes(min(_PIECE, size - start)))
        finally:
            scratch.unlink(missing_ok=True)
