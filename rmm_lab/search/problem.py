"""What is merged on what: a base, its experts, their tasks, loaded and checked from names or folders."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmm_lab.engine.scorer import Scorer
from rmm_lab.errors import InputError
from rmm_lab.families.checkpoint import Checkpoint, check_same_architecture, read_checkpoint
from rmm_lab.families.shipped import GROUPS, SETS, base_of, locate, multi_task_of
from rmm_lab.layers import LayerPool
from rmm_lab.operators import parse_operator

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
    """N experts of one base with their tasks, as a pool of layers; ``stem`` is the stem's source.

    ``device``: where whole splits are scored for tables; a search's scorer has one of its own.
    """

    pool: LayerPool
    tasks: list[Any]  # of the pool's family
    stem: str
    multi_task: Checkpoint | None = None
    device: str = "cpu"

    def scorer(self, *, workers: int | str = 1, **options: Any) -> Scorer:
        """A scorer of paths; the options are those of ``Scorer``.

        workers: a number of threads, or ``ray`` or ``ray://HOST:PORT``: a cluster, see ``RayEngine``.
        """
        options = {"stem": self.stem} | options
        if str(workers).startswith("ray"):
            from rmm_lab.engine.ray_workers import RayEngine

            engine = RayEngine(self.pool, self.tasks, str(workers), options)
            return Scorer(self.pool, self.tasks, **engine.options, engine=engine)
        if not str(workers).isdecimal() or int(workers) < 1:
            raise InputError(
                f"--workers: expected a number of threads from 1, ray, or ray://HOST:PORT, found "
                f"{workers!r}"
            )
        return Scorer(self.pool, self.tasks, **options, workers=int(workers))


def load_problem(
    experts: Sequence[str],
    *,
    base: str | None = None,
    images: Sequence[str] = (),
    texts: Sequence[str] = (),
    operators: Sequence[str] = OPERATORS,
    stem: str = STEM,
    scope: str = "layer",
    seed: int = 0,
    unit: str = "block",
    multi_task: str | None = None,
    metric: str = "auto",
    normalise_length: bool = False,
) -> Problem:
    """Read and check everything that a search needs; no image is opened and no text tokenised yet.

    Args:
        experts: a group that ships (demo, glyphs, vision; qa, mixed), names that ship, folders or hub
            names; all ViTs or all T5s.
        base: folder or hub name; may be left out where all experts ship.
        images: for ViTs, one source of ``Task`` per expert: a folder, ``FORMAT:FOLDER`` or set that ships, or
            half of one; texts: for T5s, one folder, jsonl file, ``FORMAT:FOLDER`` or set that ships per
            expert. May be left out where all experts ship.
        operators, scope, seed, unit: see ``LayerPool``; ``both`` is ``sublayer`` too. stem: ``base``, an
            expert's name, an operator, or ``agent``.
        multi_task: folder of a multi-task model for the table; found by itself where one ships.
        metric, normalise_length: of language tasks, see ``TextTask``.

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
    if images and texts:
        raise InputError(
            "--texts: expected either --images (for ViTs) or --texts (for T5s), found both; one model "
            "cannot take both"
        )
    all_ship = all(n in SETS for n in names)
    option = "--texts" if texts else "--images"
    if not images and not texts and not all_ship:
        first = next(n for n in names if n not in SETS)
        raise InputError(
            f"--images: expected a folder for each expert (ViTs), or --texts (T5s), found none for "
            f"{first!r}"
        )
    shipped_sets = [SETS.get(n, n) for n in names]
    sets = list(map(str, images or texts)) or shipped_sets
    if len(sets) != len(names):
        raise InputError(
            f"{option}: expected one for each of {len(names)} experts, in their order, found "
            f"{len(sets)}"
        )
    if base is None and not all_ship:
        raise InputError(
            "--base: expected the model that the experts were fine-tuned from, found none; name its "
            "folder or hub name"
        )
    origin = _read(base or base_of(names[0]))
    checkpoints = [_read(name) for name in names]
    for name, checkpoint in zip(names, checkpoints, strict=True):
        if checkpoint.family is not origin.family:
            raise InputError(
                f"expert {name!r}: expected {origin.family.NAME} as base {origin.source!r}, found "
                f"{checkpoint.family.NAME}; a merged model is of one family"
            )
    family = origin.family
    if (images or texts) and option != f"--{family.DATA}":
        raise InputError(
            f"{option}: expected --{family.DATA}, since base {origin.source!r} is {family.NAME}, found "
            f"{option}; give the data by --{family.DATA}"
        )
    tasks = family.make_tasks(origin, sets, metric=metric, normalise_length=normalise_length)
    for checkpoint, task in zip(checkpoints, tasks, strict=True):
        family.check_task(checkpoint, task)
    for task, name in zip(tasks, _distinct([t.name for t in tasks]), strict=True):
        task.name = name
    short = _distinct([Path(n.partition("@")[0]).name.replace(" ", "_") for n in names])
    unit = "sublayer" if unit == "both" else unit
    pool = LayerPool(origin, checkpoints, short, operators, scope=scope, seed=seed, unit=unit)
    for checkpoint in checkpoints:
        family.check_inputs(origin, checkpoint)
    if stem != "agent":
        pool.check_stem(stem)
    joint = None
    if multi_task is not None:
        joint = read_checkpoint(multi_task)
    elif all_ship and sets == shipped_sets and base is None:
        folder = multi_task_of(names)
        joint = read_checkpoint(folder) if folder else None
    if joint is not None:
        check_same_architecture(origin, [joint])
        family.check_inputs(origin, joint)
        for task in tasks:
            family.task_head(joint, task)  # raises InputError where it has none
    return Problem(pool, tasks, stem, joint)


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
