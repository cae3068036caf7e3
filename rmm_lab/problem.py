"""What is merged on what: a base, its experts, their tasks, loaded and checked from names or folders."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmm_lab.errors import InputError
from rmm_lab.models import Checkpoint, check_same_architecture, read_checkpoint
from rmm_lab.operators import parse_operator
from rmm_lab.pool import LayerPool
from rmm_lab.scoring import Scorer
from rmm_lab.tasks import InputFormat, Task
from rmm_lab.zoo import GROUPS, PAIRS, is_shipped, locate, model_folder

# Measured on the reward split: see the README's section on the default preset.
OPERATORS = (
    "weight_average",
    "weighted_average:share=0.75",  # one leaning to each expert
    "task_arithmetic:scale=0.75",
    "ties",
)
STEM = "agent"


@dataclass
class Problem:
    """N experts of one base with their tasks, as a pool of layers; ``stem`` is the stem's source."""

    pool: LayerPool
    tasks: list[Task]
    stem: str
    multi_task: Checkpoint | None = None

    def scorer(self, **options: Any) -> Scorer:
        """A scorer of paths; the options are those of ``Scorer``."""
        return Scorer(self.pool, self.tasks, **{"stem": self.stem} | options)


def load_problem(
    experts: Sequence[str],
    *,
    base: str | None = None,
    images: Sequence[str] = (),
    operators: Sequence[str] = OPERATORS,
    stem: str = STEM,
    scope: str = "layer",
    seed: int = 0,
    multi_task: str | None = None,
) -> Problem:
    """Read and check everything that a search needs; no image is opened yet.

    Args:
        experts: a group that ships (demo, glyphs, vision), names that ship, folders or hub names.
        base: folder or hub name; may be left out where all experts ship.
        images: one folder or set that ships per expert; may be left out where all experts ship.
        operators, scope, seed: see ``LayerPool``. stem: ``base``, an expert's name, an operator,
            or ``agent``.
        multi_task: folder of a multi-task model for the table; found by itself where one ships.

    Raises InputError for anything missing, broken or out of place.
    """
    names = [n for e in map(str, experts) for n in GROUPS.get(e, (e,))]
    for text in operators:
        parse_operator(text)
    if len(names) < 2:
        raise InputError(
            f"--experts: expected at least 2 models to merge, found {len(names)}; name another one, "
            f"or a group: {', '.join(GROUPS)}"
        )
    all_ship = all(is_shipped(n) for n in names)
    if not images and not all_ship:
        first = next(n for n in names if not is_shipped(n))
        raise InputError(f"--images: expected a folder for each expert, found none for {first!r}")
    sets = list(map(str, images)) or names
    if len(sets) != len(names):
        raise InputError(
            f"--images: expected one for each of {len(names)} experts, in their order, found "
            f"{len(sets)}"
        )
    if base is None and not all_ship:
        raise InputError(
            "--base: expected the model that the experts were fine-tuned from, found none; name its "
            "folder or hub name"
        )
    origin = _read(base or "base")
    fmt = InputFormat.of(origin.config)
    tasks, checkpoints = [], []
    for name, images_of in zip(names, sets, strict=True):
        checkpoint = _read(name)
        task = Task(images_of, fmt)
        task.check_head(name, checkpoint.num_classes, checkpoint.label_names)
        tasks.append(task)
        checkpoints.append(checkpoint)
    for task, name in zip(tasks, _distinct([t.name for t in tasks]), strict=True):
        task.name = name
    short = _distinct([Path(n.partition("@")[0]).name.replace(" ", "_") for n in names])
    pool = LayerPool(origin, checkpoints, short, operators, scope=scope, seed=seed)
    for name, checkpoint in zip(names, checkpoints, strict=True):
        own = InputFormat.of(checkpoint.config)
        if (own.mean, own.std) != (fmt.mean, fmt.std):
            raise InputError(
                f"expert {name!r}: expected images normalised by mean {fmt.mean} and std {fmt.std} as "
                f"for the base, found {own.mean} and {own.std}; one merged model can take only one"
            )
    if stem != "agent":
        pool.check_stem(stem)
    joint = None
    if multi_task is not None:
        joint = read_checkpoint(multi_task)
    elif all_ship and sets == names and base is None:
        pair = next((p for p in PAIRS if sorted(p) == sorted(names)), None)
        joint = read_checkpoint(model_folder("+".join(pair))) if pair else None
    if joint is not None:
        _check_multi_task(joint, tasks)
        check_same_architecture(origin, [joint])
    return Problem(pool, tasks, stem, joint)


def _check_multi_task(joint: Checkpoint, tasks: Sequence[Task]) -> None:
    heads = (joint.config.get("rmm_lab") or {}).get("heads", {})
    for task in tasks:
        start, stop = heads.get(task.name, (0, 0))
        if stop - start != len(task.classes):
            raise InputError(
                f"multi-task model {joint.source!r}: expected rmm_lab.heads in config.json to hold a "
                f"slice of {len(task.classes)} classes for {task.name!r}, found {heads or 'none'}; "
                "make it with python -m rmm_lab.zoo finetune and all image folders"
            )


def _read(name: str) -> Checkpoint:
    """A checkpoint whose source is the name as given, also where it is one that ships."""
    return dataclasses.replace(read_checkpoint(locate(name)), source=name)


def _distinct(names: Sequence[str]) -> list[str]:
    """Names with -2, -3, ... behind those that stand there already."""
    out: list[str] = []
    for name in names:
        n, text = 1, name
        while text in out:
            n += 1
            text = f"{name}-{n}"
        out.append(text)
    return out
