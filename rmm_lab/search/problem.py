"""What is merged on what: a base, its experts, their tasks, loaded and checked from names or folders."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from rmm_lab.engine.calibration import Calibration
from rmm_lab.engine.scorer import Scorer
from rmm_lab.env import MergingEnv
from rmm_lab.errors import SEED_RANGE, UNIT_RANGE, InputError, check_values
from rmm_lab.families.adapters import factors_of
from rmm_lab.families.checkpoint import (
    Checkpoint,
    check_same_architecture,
    keep_converted,
    read_checkpoint,
    same_form,
)
from rmm_lab.families.shipped import GROUPS, MODELS, SETS, base_of, expand, locate, multi_task_of
from rmm_lab.layers import LayerPool
from rmm_lab.operators import MATCHED, SCOPE, parse_operator
from rmm_lab.path import LayerPath
from rmm_lab.reward import PathScorer
from rmm_lab.search.numbers import ScalesEnv
from rmm_lab.tasks import groups as picture_groups
from rmm_lab.tasks.few_labels import FewLabels, with_all_inputs
from rmm_lab.tasks.files import (
    SHIPPED,
    absolute,
    check_names,
    or_shipped,
    place_in,
    recalled,
    shipped_name,
    spelled,
)

# Measured on the reward split: see docs/evidence.md.
OPERATORS = (
    "weight_average",
    "weighted_average:share=0.75",  # one leaning to each expert
    "task_arithmetic:scale=0.75",
    "ties",
)
STEM = "agent"


@dataclass(frozen=True)
class ProblemSpec:
    """What is merged, by name: a problem is loaded from it, and a run folder keeps it."""

    experts: tuple[str, ...] = ("demo",)
    """Models to merge: a group that ships (demo, glyphs, vision, qa, mixed, llm), names, folders, hub names;
    LoRA adapters of peft's are applied to the base. A folder wins over a name that ships, which shipped:NAME
    means in any case; so for all options."""
    base: str | None = None
    """The model that they were fine-tuned from: a folder, a hub name, base, text-base or llm-base."""
    images: tuple[str, ...] = ()
    """For ViTs: an image folder per expert, in the experts' order; needed for your own experts."""
    texts: tuple[str, ...] = ()
    """For T5s and language models: a folder or file of rows per expert, FORMAT:FOLDER, FORMAT:hf-hub, or a
    set that ships."""
    groups: tuple[str, ...] = ()
    """For ViTs: pictures that stay in one split: a CSV of file and group, or a regular expression whose
    bracket is the group; one for all image folders, or one each ("" for none)."""
    metric: Literal["auto", "accuracy", "balanced"] = "auto"
    """For texts: auto balances the answers of a task where one of them is much more frequent."""
    normalise_length: bool = False
    """For texts: divide a choice's log-probability by its number of tokens; the paper takes the sum."""
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
    label_fraction: float = 1.0
    """Share of each task's reward split whose labels are known, to search, choose and tune, in (0, 1]."""
    seed: Annotated[int, tyro.conf.Suppress] = 0
    """Seed of the random operators' masks and of the draws of calibration inputs and known labels."""

    def __post_init__(self) -> None:
        ranges = {"seed": SEED_RANGE, "calibration": ("0 or more", lambda v: v >= 0)}
        check_values(self, ranges | {"label_fraction": UNIT_RANGE})


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
        """What a reader of the scores must know about how the models were read, and which are the same."""
        models = (self.pool.base, *self.pool.experts)
        said = [f"model {model.source}: {note}" for model in models for note in model.notes]
        first: dict[str, str] = {}
        for model, name in zip(
            models, ("the base", *map("expert {}".format, self.pool.names)), strict=True
        ):
            if model.sha256 and (other := first.setdefault(model.sha256, name)) != name:
                said.append(f"{name} has the same weights as {other}, and adds nothing to a merge")
        return said

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
        options, tasks = {"stem": self.stem} | options, self.tasks
        if options.get("reward") == "agreement":  # which reads no label: all inputs are free
            if odd := [task.name for task in tasks if not getattr(task, "offers", True)]:
                raise InputError(
                    f"--reward agreement: expected answers to choose from, found none in task {odd[0]!r}, "
                    "whose score looks at the right answer; use --reward metric or likelihood"
                )
            tasks = [with_all_inputs(task) for task in tasks]
        if str(workers).startswith("ray"):
            stem = str(options["stem"])
            if stem.partition(":")[0] in MATCHED and stem not in self.pool.operators:
                raise InputError(
                    f"--workers {workers}: expected the stem's source {stem!r} among the operators, so that "
                    "workers get its inputs, found others; add it to --operators"
                )
            from rmm_lab.engine.ray_workers import RayEngine

            engine = RayEngine(self.pool, tasks, str(workers), options)
            return Scorer(self.pool, tasks, **engine.options, engine=engine)
        if not str(workers).isdecimal() or not 1 <= int(workers) <= 1024:
            raise InputError(
                "--workers: expected a number of threads from 1 to 1024, ray, or ray://HOST:PORT, found "
                f"{workers!r}"
            )
        return Scorer(self.pool, tasks, **options, workers=int(workers))


def make_merging_env(
    scorer: PathScorer | None = None, *, actions: str = "sources", **options: Any
) -> MergingEnv:
    """The environment behind ``rmm_lab/Merging-v0``; without a scorer it holds the demo's pair.

    actions: ``sources``, or ``scales``, see ``search.numbers.ScalesEnv``.
    """
    kind = ScalesEnv if actions == "scales" else MergingEnv
    return kind(load_problem(("shipped:demo",)).scorer() if scorer is None else scorer, **options)


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
    names = expand(list(map(str, experts)))
    ships = [shipped_name(n, SETS) for n in names]  # "" for those that do not
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
            "--texts: expected either --images (for ViTs) or --texts (for others), found both; one model "
            "cannot take both"
        )
    all_ship = all(ships)
    option = "--texts" if texts else "--images"
    if not images and not texts and not all_ship:
        first = next(n for n, name in zip(names, ships, strict=True) if not name)
        raise InputError(
            f"--images: expected a folder for each expert (ViTs), or --texts (others), found none for "
            f"{first!r}"
        )
    shipped_sets = [spelled(SETS[n]) if n else "" for n in ships]
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
    origin = _read(base or SHIPPED + base_of(ships[0]), spec)
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
        origin,
        sets,
        metric=spec.metric,
        normalise_length=spec.normalise_length,
        **picture_groups.of_groups(spec.groups, sets, family.DATA),
    )
    for i, task in enumerate(tasks):
        if (turned := family.check_task(checkpoints[i], task)) is not None:
            config, weights = turned.config, turned.weights
            checkpoints[i] = dataclasses.replace(checkpoints[i], config=config, weights=weights)
    for task, name in zip(tasks, _distinct([t.name for t in tasks]), strict=True):
        task.name = name
    short = _expert_names(names, [task.name for task in tasks])
    check_names(tasks, short)
    unit = "sublayer" if spec.unit == "both" else spec.unit
    pool = LayerPool(origin, checkpoints, short, operators, scope=scope, seed=spec.seed, unit=unit)
    if spec.calibration:
        complete = family.completion(pool.experts, tasks)
        n, seed = spec.calibration, spec.seed
        pool.calibration = Calibration(tasks, n, seed=seed, complete=complete)
    for checkpoint in checkpoints:
        family.check_inputs(origin, checkpoint)
    if stem != "agent":
        pool.check_stem(stem)
    for text in (*pool.operators, stem):
        if SCOPE.get(text.partition(":")[0]) == "factors":
            factors_of(text, checkpoints)
    joint = None
    if spec.multi_task is not None:
        allowed = spec.allow_pickle
        joint = read_checkpoint(spec.multi_task, base=origin, allow_pickle=allowed)
    elif all_ship and sets == shipped_sets and base is None:
        folder = multi_task_of(ships)
        joint = read_checkpoint(folder) if folder else None
    if joint is not None:
        check_same_architecture(origin, [joint])
        family.check_inputs(origin, joint)
        for task in tasks:
            family.task_head(joint, task)  # raises InputError where it has none
    if spec.label_fraction < 1:
        draws = enumerate(tasks)
        tasks = [FewLabels(task, spec.label_fraction, (spec.seed, i)) for i, task in draws]
    return Problem(pool, tasks, spec, joint)


def places_of(spec: ProblemSpec) -> list[str]:
    """Sources of all that a problem is read from, with folders for the models that ship."""
    experts = expand(list(map(str, spec.experts)))
    ships = [name for name in (shipped_name(e, SETS) for e in experts) if name]
    models = [spec.base, spec.multi_task, *(SHIPPED + base_of(name) for name in ships), *experts]
    return [*(locate(model) for model in models if model), *spec.images, *spec.texts]


def pool_of(path: LayerPath) -> LayerPool:
    """The pool that a path was made from, also where its layers were fitted to calibration inputs.

    Reads the models and, if the path needs them, the inputs that it names; InputError where either has
    changed.
    """
    pool = path.load_pool()
    if path.calibration is not None:
        try:
            sources = [
                recalled(str(task["source"]), SETS.values()) for task in path.calibration["tasks"]
            ]
            groups = [str(task.get("groups", "")) for task in path.calibration["tasks"]]
            family = pool.base.family
            more = picture_groups.of_groups(groups, sources, family.DATA)
            tasks = family.make_tasks(pool.base, sources, **more)
            complete = pool.base.family.completion(pool.experts, tasks)
            pool.calibration = Calibration.of_record(tasks, path.calibration, complete=complete)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"layer path: expected calibration inputs as split, seed and tasks, found others "
                f"({error!r}); take path.json of a run folder"
            ) from error
    return pool


def at_rest(spec: ProblemSpec) -> ProblemSpec:
    """A problem that means the same in any working directory, as files hold it: see ``files.absolute``."""
    return _renamed(spec, absolute)


def at_hand(spec: ProblemSpec) -> ProblemSpec:
    """The inverse of ``at_rest``: what ships is spelled ``shipped:NAME`` where a folder is in the way."""
    return _renamed(spec, recalled)


def moved(spec: ProblemSpec, before: str, now: Path) -> ProblemSpec:
    """A stored problem whose run folder was ``before``: what is not in its place any more is looked for where
    it lay, seen from the run folder."""

    def change(source: str, known: Collection[str]) -> str:
        head, _, rest = source.partition(":")
        if before and source not in known and head != "hf-hub" and not place_in(source):
            for format_, place in (("", source), (f"{head}:", rest)):
                if os.path.isabs(place):
                    other = os.path.abspath(now / os.path.relpath(place, before))
                    if place_in(other):
                        return format_ + other
        return source

    return _renamed(spec, change)


def check_places(spec: ProblemSpec) -> None:
    """Raise InputError where a folder or file of a stored problem is not there any more."""
    known = (*GROUPS, *MODELS, *SETS.values())
    for source in (spec.base, spec.multi_task, *spec.experts, *spec.images, *spec.texts):
        if not source or shipped_name(source, known) or "hf-hub" in source:
            continue
        if not place_in(source):
            place = Path.cwd() / source
            raise InputError(
                f"--resume: expected {place.name!r} in {place.parent} as when the run started, found no such "
                "folder or file; resume from the folder where the run was started, or put it back"
            )


def _renamed(spec: ProblemSpec, change: Callable[[str, Collection[str]], str]) -> ProblemSpec:
    models, sets = (*GROUPS, *MODELS), tuple(SETS.values())
    return dataclasses.replace(
        spec,
        experts=tuple(change(str(e), models) for e in spec.experts),
        base=spec.base and change(str(spec.base), MODELS),
        images=tuple(change(str(s), sets) for s in spec.images),
        texts=tuple(change(str(s), sets) for s in spec.texts),
        multi_task=spec.multi_task and change(str(spec.multi_task), ()),
        groups=tuple(change(g, ()) if g.lower().endswith(".csv") else g for g in spec.groups),
    )


def _read(source: str, spec: ProblemSpec, base: Checkpoint | None = None) -> Checkpoint:
    """A checkpoint whose source is as given, also where it is one that ships."""
    name = shipped_name(source, MODELS)
    with or_shipped(source, () if name else MODELS):
        found = read_checkpoint(locate(source), base=base, allow_pickle=spec.allow_pickle)
    return dataclasses.replace(found, source=spelled(name) if name else source)


def _short(source: str) -> str:
    """What an expert is called in paths and tables: its name, or the last part of its folder's."""
    source = absolute(source, MODELS).partition("@")[0]
    return _joined(Path(source).name)


def _joined(name: str) -> str:
    """A name in one word, as a path's text needs it; what no name may hold stays, and is refused."""
    return re.sub(r"[^\S\t\n\r\f\v\x1c-\x1f\x85\u2028\u2029]", "_", name)


# Folders that training scripts make; they do not say what a model has learned.
_NO_NAMES = re.compile(
    r"(best|last|final|model|merged|output|outputs|checkpoint|ckpt|epoch|step|export)([-_.]?\d+)?|\d+",
    re.IGNORECASE,
)


def _expert_names(sources: Sequence[str], tasks: Sequence[str]) -> list[str]:
    """What experts are called in paths, tables and exported heads: after their folders, or after their tasks
    where folders are called alike or like any training script's."""
    names = [_short(source) for source in sources]
    if len(set(names)) < len(names) or any(map(_NO_NAMES.fullmatch, names)):
        own = [_joined(task) for task in tasks]
        names = own if len(set(own)) == len(own) else names
    return _distinct(names)


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
