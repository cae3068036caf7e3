"""What is merged on what: a base, its experts, their tasks, loaded and checked from names or folders."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from rmm_lab.engine.calibration import Calibration
from rmm_lab.engine.scorer import Scorer
from rmm_lab.env import MergingEnv
from rmm_lab.errors import InputError, Range, check_values
from rmm_lab.families.checkpoint import (
    Checkpoint,
    check_same_architecture,
    keep_converted,
    read_checkpoint,
    same_form,
)
from rmm_lab.families.shipped import GROUPS, SETS, base_of, locate, multi_task_of
from rmm_lab.layers import LayerPool
from rmm_lab.operators import MATCHED, parse_operator
from rmm_lab.path import LayerPath
from rmm_lab.reward import PathScorer
from rmm_lab.search.numbers import ScalesEnv

# Measured on the reward split: see docs/evidence.md.
OPERATORS = (
    "weight_average",
    "weighted_average:share=0.75",  # one leaning to each expert
    "task_arithmetic:scale=0.75",
    "ties",
)
STEM = "agent"
SEED_RANGE: Range = ("0 or more and below 2**63", lambda v: 0 <= v < 2**63)


@dataclass(frozen=True)
class ProblemSpec:
    """What is merged, by name: a problem is loaded from it, and a run folder keeps it."""

    experts: tuple[str, ...] = ("demo",)
    """Models to merge: a group that ships (demo, glyphs, vision, qa, mixed), names, folders, hub names; LoRA
    adapters of peft's are applied to the base."""
    base: str | None = None
    """The model that they were fine-tuned from: a folder, a hub name, base or text-base."""
    images: tuple[str, ...] = ()
    """For ViTs: an image folder per expert, in the experts' order; needed for your own experts."""
    texts: tuple[str, ...] = ()
    """For T5s: per expert a folder or file of jsonl, FORMAT:FOLDER, FORMAT:hf-hub, or a set that ships."""
    metric: Literal["auto", "accuracy", "balanced"] = "auto"
    """For T5s: auto balances the answers of a task where one of them is much more frequent."""
    normalise_length: bool = False
    """For T5s: divide a choice's log-probability by its number of tokens; the paper takes the sum."""
    multi_task: str | None = None
    """Folder of a multi-task model to compare with; those that ship need no mention."""
    allow_pickle: bool = False
    """Read weights that come as .bin or .pth alone, by torch's restricted loader; trust their source."""
    operators: tuple[str, ...] = OPERATORS
    """Merging actions, such as ties, task_arithmetic:scale=0.5 or dare:drop_rate=0.5,scale=1."""
    scope: Literal["layer", "tensor", "global"] = "layer"
    """What an operator trims over: each layer, each tensor, or the whole model."""
    stem: str = STEM
    """Source of the stem, all weights outside the layers: base, an expert, an operator; agent: it chooses."""
    unit: Literal["block", "sublayer", "both"] = "block"
    """What is chosen at a time: block (the paper), sublayer (attention, MLP), both: blocks, then these."""
    calibration: int = 300
    """Inputs per task, of the train split and without labels, that regmean and least_squares look at."""
    seed: Annotated[int, tyro.conf.Suppress] = 0
    """Seed of the random operators' masks and of the draw of calibration inputs."""

    def __post_init__(self) -> None:
        check_values(self, {"seed": SEED_RANGE, "calibration": ("0 or more", lambda v: v >= 0)})


@dataclass
class Problem:
    """N experts of one base with their tasks, as a pool of layers.

    ``spec``: what it was loaded from. ``device``: where whole splits are scored for tables; a search's
    scorer has its own.
    """

    pool: LayerPool
    tasks: list[Any]  # a task per expert, of the pool's family
    spec: ProblemSpec
    multi_task: Checkpoint | None = None
    device: str = "cpu"

    @property
    def stem(self) -> str:
        """The stem's source, or ``agent``."""
        return self.spec.stem

    def notes(self) -> list[str]:
        """What a reader of the scores must know about how the models were read."""
        models = (self.pool.base, *self.pool.experts)
        return [f"model {model.source}: {note}" for model in models for note in model.notes]

    def keep_converted(self, folder: Path) -> None:
        """Write what came as a pickle to a folder as safetensors, from where the pool's paths read it."""
        pool, names = self.pool, ("base", *self.pool.names)
        pool.base, *pool.experts = (
            keep_converted(model, folder / name)
            for name, model in zip(names, (pool.base, *pool.experts), strict=True)
        )

    def scorer(self, *, workers: int | str = 1, **options: Any) -> Scorer:
        """A scorer of paths; the options are those of ``Scorer``.

        workers: a number of threads, or ``ray`` or ``ray://HOST:PORT``: a cluster, see ``RayEngine``.
        """
        options = {"stem": self.stem} | options
        if str(workers).startswith("ray"):
            stem = str(options["stem"])
            if stem.partition(":")[0] in MATCHED and stem not in self.pool.operators:
                raise InputError(
                    f"--workers {workers}: expected the stem's source {stem!r} among the operators, so that "
                    "workers get its inputs, found others; add it to --operators"
                )
            from rmm_lab.engine.ray_workers import RayEngine

            engine = RayEngine(self.pool, self.tasks, str(workers), options)
            return Scorer(self.pool, self.tasks, **engine.options, engine=engine)
        if not str(workers).isdecimal() or int(workers) < 1:
            raise InputError(
                f"--workers: expected a number of threads from 1, ray, or ray://HOST:PORT, found "
                f"{workers!r}"
            )
        return Scorer(self.pool, self.tasks, **options, workers=int(workers))


def make_merging_env(
    scorer: PathScorer | None = None, *, actions: str = "sources", **options: Any
) -> MergingEnv:
    """The environment behind ``rmm_lab/Merging-v0``; without a scorer it holds the demo's pair.

    actions: ``sources``, or ``scales``, see ``search.numbers.ScalesEnv``.
    """
    kind = ScalesEnv if actions == "scales" else MergingEnv
    return kind(load_problem(("demo",)).scorer() if scorer is None else scorer, **options)


def load_problem(experts: Sequence[str], **options: Any) -> Problem:
    """The problem of these experts; ``options``: further fields of ``ProblemSpec``."""
    names = {f.name for f in dataclasses.fields(ProblemSpec)}
    if unknown := set(options) - names:
        raise InputError(
            f"load_problem: expected options among {', '.join(sorted(names))}, found "
            f"{unknown.pop()!r}; correct it"
        )
    values: dict[str, Any] = {"experts": experts} | options
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return problem_of(ProblemSpec(**values))


def problem_of(spec: ProblemSpec) -> Problem:
    """Read and check everything that a search needs; no image is opened and no text tokenised yet.

    Raises InputError for anything missing, broken or out of place.
    """
    experts, base, images, texts = spec.experts, spec.base, spec.images, spec.texts
    operators, stem, scope = spec.operators, spec.stem, spec.scope
    names = [n for e in map(str, experts) for n in GROUPS.get(e, (e,))]
    for text in operators:
        if parse_operator(text).function in MATCHED and not spec.calibration:
            raise InputError(
                f"--calibration: expected 1 or more inputs per task for operator {text!r}, found 0; give "
                "more, or choose other operators"
            )
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
    origin = _read(base or base_of(names[0]), spec)
    checkpoints = [_read(name, spec, origin) for name in names]
    for name, checkpoint in zip(names, checkpoints, strict=True):
        if checkpoint.family is not origin.family:
            raise InputError(
                f"expert {name!r}: expected {origin.family.NAME} as base {origin.source!r}, found "
                f"{checkpoint.family.NAME}; a merged model is of one family"
            )
    origin, checkpoints = same_form(origin, checkpoints)
    family = origin.family
    if (images or texts) and option != f"--{family.DATA}":
        raise InputError(
            f"{option}: expected --{family.DATA}, since base {origin.source!r} is {family.NAME}, found "
            f"{option}; give the data by --{family.DATA}"
        )
    tasks = family.make_tasks(
        origin, sets, metric=spec.metric, normalise_length=spec.normalise_length
    )
    for checkpoint, task in zip(checkpoints, tasks, strict=True):
        family.check_task(checkpoint, task)
    for task, name in zip(tasks, _distinct([t.name for t in tasks]), strict=True):
        task.name = name
    short = _distinct([Path(n.partition("@")[0]).name.replace(" ", "_") for n in names])
    unit = "sublayer" if spec.unit == "both" else spec.unit
    pool = LayerPool(origin, checkpoints, short, operators, scope=scope, seed=spec.seed, unit=unit)
    if spec.calibration:
        pool.calibration = Calibration(tasks, spec.calibration, seed=spec.seed)
    for checkpoint in checkpoints:
        family.check_inputs(origin, checkpoint)
    if stem != "agent":
        pool.check_stem(stem)
    joint = None
    if spec.multi_task is not None:
        allowed = spec.allow_pickle
        joint = read_checkpoint(spec.multi_task, base=origin, allow_pickle=allowed)
    elif all_ship and sets == shipped_sets and base is None:
        folder = multi_task_of(names)
        joint = read_checkpoint(folder) if folder else None
    if joint is not None:
        check_same_architecture(origin, [joint])
        family.check_inputs(origin, joint)
        for task in tasks:
            family.task_head(joint, task)  # raises InputError where it has none
    return Problem(pool, tasks, spec, joint)


def pool_of(path: LayerPath) -> LayerPool:
    """The pool that a path was made from, also where its layers were fitted to calibration inputs.

    Reads the models and, if the path needs them, the inputs that it names; InputError where either has
    changed.
    """
    pool = path.load_pool()
    if path.calibration is not None:
        try:
            sources = [str(task["source"]) for task in path.calibration["tasks"]]
            tasks = pool.base.family.make_tasks(pool.base, sources)
            pool.calibration = Calibration.of_record(tasks, path.calibration)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"layer path: expected calibration inputs as split, seed and tasks, found others "
                f"({error!r}); take path.json of a run folder"
            ) from error
    return pool


def _read(name: str, spec: ProblemSpec, base: Checkpoint | None = None) -> Checkpoint:
    """A checkpoint whose source is the name as given, also where it is one that ships."""
    found = read_checkpoint(locate(name), base=base, allow_pickle=spec.allow_pickle)
    return dataclasses.replace(found, source=name)


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
