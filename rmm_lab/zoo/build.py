"""The models that ship, the command that rebuilds them, and one that fine-tunes your own.

``python -m rmm_lab.zoo.build`` rebuilds everything under ``data/`` from nothing, seeded.
``python -m rmm_lab.zoo.build finetune --base B --images FOLDER --out E`` makes one expert (or, with several
folders, a multi-task model) from any base that this kit can merge; ``--texts`` for a T5.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rmm_lab.engine.scorer import answers
from rmm_lab.errors import InputError, one_sentence
from rmm_lab.families import checkpoint as models
from rmm_lab.families import t5
from rmm_lab.tasks import image_task as tasks
from rmm_lab.tasks import small_texts as grammar
from rmm_lab.tasks import text_task as texts
from rmm_lab.zoo import training

# A second, smaller size of the ViTs; its models are called like the others with this in front.
TINY = "tiny-"
# Experts on the first and second half of a set's classes, as in the paper's Table I, in both sizes.
HALVES = {n: (f"{n}-{tasks.HALVES[0]}", f"{n}-{tasks.HALVES[1]}") for n in tasks.SMALL}
TINY_HALVES = {n: (TINY + pair[0], TINY + pair[1]) for n, pair in HALVES.items()}
# The pairs of ViTs whose multi-task model ships, the first is the demo's.
PAIRS = (
    ("digits", "textures"),
    ("letters", "symbols"),
    ("digits", "letters"),
    *HALVES.values(),
    *TINY_HALVES.values(),
)
# The set that each expert was trained on.
SETS = {n: n for n in (*tasks.SMALL, *grammar.TASKS)} | {
    expert: f"{n}:{half}"
    for halves in (HALVES, TINY_HALVES)
    for n, pair in halves.items()
    for expert, half in zip(pair, tasks.HALVES, strict=True)
}
# Groups of T5s as the paper groups its tasks; the multi-task model of each ships under its name.
TEXT_GROUPS = {
    "qa": ("colours", "answers", "antonyms"),
    "mixed": ("swaps", "endings", "fitting", "pronouns"),
}
GROUPS: dict[str, tuple[str, ...]] = {
    "demo": ("digits", "textures"),
    "glyphs": ("letters", "symbols"),
    "vision": ("digits", "letters", "textures"),
    **TEXT_GROUPS,
}
BASE, TINY_BASE, TEXT_BASE = "base", "tiny-base", "text-base"


def model_folder(name: str) -> Path:
    """The folder of a model that ships: a base, an expert, or the multi-task model of a group.

    ViTs: ``base`` or ``tiny-base``; a name of ``SETS``; two of them joined by ``+``. T5s: ``text-base``, a
    task's name, ``qa`` or ``mixed``.
    """
    is_text = name == TEXT_BASE or name in grammar.TASKS or name in TEXT_GROUPS
    return tasks.data_folder() / "models" / ("t5" if is_text else "vit") / name


def is_shipped(name: str) -> bool:
    """Whether ``name`` is an expert that ships rather than a folder or hub name."""
    return name in SETS


def base_of(expert: str) -> str:
    """The name of the base of an expert that ships."""
    if expert in grammar.TASKS:
        return TEXT_BASE
    return TINY_BASE if expert.startswith(TINY) else BASE


def multi_task_of(experts: Sequence[str]) -> Path | None:
    """The folder of the multi-task model that ships for these experts, in whatever order, or None."""
    for name, group in TEXT_GROUPS.items():
        if sorted(group) == sorted(experts):
            return model_folder(name)
    pair = next((p for p in PAIRS if sorted(p) == sorted(experts)), None)
    return model_folder("+".join(pair)) if pair else None


def locate(name: str) -> str:
    """The folder of a model that ships, by its name; any other source as it is."""
    return str(model_folder(name)) if name in (*SETS, BASE, TINY_BASE, TEXT_BASE) else name


# --------------------------------------------------------------------------------------- commands


@dataclass
class Build:
    """Rebuild the small sets and every checkpoint under data/ from nothing."""

    threads: int = 1
    """CPU threads for torch; the checkpoints that ship were made with one."""
    seed: int = 0
    """Seed of every initialisation and batch."""
    only: tuple[str, ...] = ()
    """Rebuild only these (sets, base, digits, digits+textures, digits-first, digits-first+digits-second,
    tiny-base, tiny-digits-first, ..., text-sets, text-base, swaps, qa, ...)."""
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

    def run(self) -> None:
        torch.set_num_threads(self.threads)
        experts = [(name,) for name in SETS if name not in grammar.TASKS]
        vits = {"+".join(group): group for group in [*experts, *PAIRS]}
        t5s = {name: (name,) for name in grammar.TASKS} | TEXT_GROUPS
        known = ["sets", BASE, TINY_BASE, *vits, "text-sets", TEXT_BASE, *t5s]
        if unknown := set(self.only) - set(known):
            raise InputError(
                f"--only: expected some of {', '.join(known)}, found {unknown.pop()!r}"
            )
        wanted = self.only or known
        self._vits({name: group for name, group in vits.items() if name in wanted}, wanted)
        self._t5s({name: group for name, group in t5s.items() if name in wanted}, wanted)

    def _vits(self, groups: dict[str, tuple[str, ...]], wanted: Sequence[str]) -> None:
        for name in tasks.SMALL if "sets" in wanted else ():
            for split in ("reward", "test") if name != "digits" else tasks.SPLITS:
                print(f"set: {tasks.write_sheet(name, split)}")
        for name, like in ((BASE, training.SMALL_VIT), (TINY_BASE, training.NARROW_VIT)):
            if name in wanted:
                config, weights = training.pretrain_vit(
                    like, steps=self.pretrain_steps, seed=self.seed, label=name
                )
                models.write_checkpoint(model_folder(name), config, weights, dtype=torch.float16)
        rates = {BASE: self.learning_rate, TINY_BASE: self.tiny_learning_rate}
        for name, group in groups.items():
            base_name = base_of(group[0])
            base = models.read_checkpoint(model_folder(base_name))
            fmt = tasks.InputFormat.of(base.config)
            config, weights = training.fine_tune(
                base,
                [tasks.Task(SETS[n], fmt) for n in group],
                steps=self.half_steps if ":" in SETS[group[0]] else self.steps,
                learning_rate=rates[base_name],
                seed=self.seed + 1,
                label=name,
            )
            models.write_checkpoint(model_folder(name), config, weights, dtype=torch.float16)

    def _t5s(self, groups: dict[str, tuple[str, ...]], wanted: Sequence[str]) -> None:
        for name in grammar.TASKS if "text-sets" in wanted else ():
            for split in ("reward", "test"):
                print(f"set: {texts.write_rows(name, split)}")
        folder = model_folder(TEXT_BASE)
        if TEXT_BASE in wanted:
            training.small_tokenizer(folder)
            steps = self.text_pretrain_steps
            config, weights = training.pretrain_t5(folder, steps=steps, seed=self.seed)
            # Rounded to what a file would hold, so that it can be continued from one as well.
            half = {name: tensor.half().float() for name, tensor in weights.items()}
            start = models.Checkpoint(TEXT_BASE, folder, config, half, "")
            weights = training.rehearse_t5(start, steps=self.text_rehearsal_steps, seed=self.seed)
            models.write_checkpoint(folder, config, weights, dtype=torch.float16)
        for name, group in groups.items():
            base = models.read_checkpoint(folder)
            fmt = texts.TextFormat.of(base)
            config, weights = training.fine_tune_t5(
                base,
                [texts.TextTask(n, fmt) for n in group],
                steps=self.text_steps,
                learning_rate=self.text_learning_rate,
                seed=self.seed + 1,
                label=name,
            )
            models.write_checkpoint(
                model_folder(name), config, weights, dtype=torch.float16, beside=folder
            )


@dataclass
class Finetune:
    """Fine-tune a base on image folders or texts: one makes an expert, several a multi-task model."""

    base: str
    """Base model: a timm or T5 folder, hf-hub:OWNER/NAME, or base or text-base for those that ship."""
    out: Path
    """New or empty folder to write the fine-tuned model to."""
    images: tuple[str, ...] = ()
    """For a ViT: image folders (SPLIT/CLASS/image or CLASS/image), FORMAT:FOLDER or FORMAT:hf-hub (cifar10,
    cifar100, cub200, dogs), or sets that ship; with :first or :second behind, half of its classes. The
    split train is used."""
    texts: tuple[str, ...] = ()
    """For a T5: folders or files of jsonl, FORMAT:FOLDER, FORMAT:hf-hub, or sets that ship; train is used."""
    steps: int = 1000
    """Optimiser steps."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    batch_size: int = 128
    """Examples per step."""
    threads: int = 0
    """CPU threads for torch; 0 leaves torch's own choice."""
    seed: int = 0
    """Seed of a ViT's new head, of dropout and of the batches."""

    def run(self) -> None:
        for name in ("steps", "learning_rate", "batch_size"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(
                    f"--{name.replace('_', '-')}: expected more than 0, found {getattr(self, name)}"
                )
        if self.threads < 0:
            raise InputError(f"--threads: expected 0 or more, found {self.threads}")
        option, sources = ("--texts", self.texts) if self.texts else ("--images", self.images)
        if not sources or (self.images and self.texts):
            raise InputError(
                f"--images: expected at least one folder, or --texts for a T5, found "
                f"{'both' if sources else 'none'}; name one"
            )
        if self.batch_size < len(sources):
            raise InputError(
                f"--batch-size: expected at least {len(sources)}, an example of each task, found "
                f"{self.batch_size}"
            )
        if self.out.is_file():
            raise InputError(f"--out: expected an empty or new folder, found a file: {self.out}")
        if self.out.exists() and any(self.out.iterdir()):
            raise InputError(f"--out: expected an empty or new folder, found files in {self.out}")
        if self.threads:
            torch.set_num_threads(self.threads)
        base = models.read_checkpoint(locate(self.base))
        is_text = base.family is t5
        if is_text != bool(self.texts):
            raise InputError(
                f"{option}: expected {'--texts' if is_text else '--images'}, since base {self.base!r} "
                f"is {base.family.NAME}, found {option}"
            )
        on: list[Any]
        if is_text:
            text_format = texts.TextFormat.of(base)
            on = [texts.TextTask(source, text_format) for source in sources]
        else:
            image_format = tasks.InputFormat.of(base.config)
            on = [tasks.Task(source, image_format) for source in sources]
        if len({task.name for task in on}) < len(on):
            raise InputError(
                f"{option}: expected folders of different names, found {[t.name for t in on]}; rename"
            )
        for task in on:  # broken data must show before hours of training
            for split in ("train", "test"):
                if cut := getattr(task.split(split), "cut", 0):
                    print(
                        f"note: {task.name}: {cut} inputs of the {split} split are too long, and cut"
                    )
        make: Any = training.fine_tune_t5 if is_text else training.fine_tune
        config, weights = make(
            base,
            on,
            steps=self.steps,
            learning_rate=self.learning_rate,
            seed=self.seed,
            batch_size=self.batch_size,
        )
        models.write_checkpoint(self.out, config, weights, beside=base.folder)
        architecture, parts = models.architecture(config), base.family.split(weights)
        stem = architecture.stem(parts.stem)
        layers = [architecture.layer(k, w) for k, w in enumerate(parts.layers)]
        start = 0
        for task in on:
            head = {}
            if not is_text:
                own = slice(start, start := start + len(task.classes))
                head = {key: value[own] for key, value in parts.head.items()}
            found = answers(architecture, stem, layers, head, task, "test")
            score = task.score(found, task.split("test").labels)
            what = "" if task.metric == "accuracy" else f" ({task.metric})"
            print(f"{task.name}: {100 * score:.1f} % of the test split{what}")
        print(f"written: {self.out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["finetune"]:
            tyro.cli(Finetune, args=argv[1:], prog="python -m rmm_lab.zoo.build finetune").run()
        else:
            tyro.cli(
                Build, args=argv, prog="python -m rmm_lab.zoo.build", description=__doc__
            ).run()
    except (InputError, OSError) as error:
        print(f"error: {one_sentence(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
