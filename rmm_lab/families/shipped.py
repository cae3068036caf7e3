"""The catalogue of the models that ship: their names, groups and folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rmm_lab.tasks import image_task, small_texts, small_writing
from rmm_lab.tasks.files import check_path, data_folder, recalled, shipped_name, spelled

# Names of the ViTs of a second, smaller size start with this.
TINY = "tiny-"
# Experts on the first and second half of a set's classes, as in the paper's Table I, in both sizes.
HALVES = {
    n: (f"{n}-{image_task.HALVES[0]}", f"{n}-{image_task.HALVES[1]}") for n in image_task.SMALL
}
TINY_HALVES = {n: (TINY + pair[0], TINY + pair[1]) for n, pair in HALVES.items()}
# The pairs of ViTs whose multi-task model ships; the first is the demo's.
PAIRS = (
    ("digits", "textures"),
    ("letters", "symbols"),
    ("digits", "letters"),
    *HALVES.values(),
    *TINY_HALVES.values(),
)
# The set that each expert was trained on.
SETS = {n: n for n in (*image_task.SMALL, *small_texts.TASKS, *small_writing.TASKS)} | {
    expert: f"{n}:{half}"
    for halves in (HALVES, TINY_HALVES)
    for n, pair in halves.items()
    for expert, half in zip(pair, image_task.HALVES, strict=True)
}
# Groups of T5s, as the paper groups its tasks.
TEXT_GROUPS = {
    "qa": ("colours", "answers", "antonyms"),
    "mixed": ("swaps", "endings", "fitting", "pronouns"),
}
# Language models, which write: HM3's three kinds of task.
WRITING_GROUPS = {"llm": tuple(small_writing.TASKS)}
GROUPS: dict[str, tuple[str, ...]] = {
    "demo": ("digits", "textures"),
    "glyphs": ("letters", "symbols"),
    "vision": ("digits", "letters", "textures"),
    **TEXT_GROUPS,
    **WRITING_GROUPS,
}
# The multi-task models and the experts whose tasks each has learned.
MULTI_TASK: dict[str, tuple[str, ...]] = {
    **{"+".join(pair): pair for pair in PAIRS},
    **TEXT_GROUPS,
    **WRITING_GROUPS,
}
BASE, TINY_BASE, TEXT_BASE, WRITING_BASE = "base", "tiny-base", "text-base", "llm-base"
# All names of models: what an option may call a base or an expert.
MODELS = (*SETS, BASE, TINY_BASE, TEXT_BASE, WRITING_BASE)


def model_folder(name: str) -> Path:
    """The folder of a base, of an expert (a name of ``SETS``) or of a multi-task model that ships."""
    if name in (WRITING_BASE, *small_writing.TASKS, *WRITING_GROUPS):
        kind = "llama"
    else:
        kind = "t5" if name in (TEXT_BASE, *small_texts.TASKS, *TEXT_GROUPS) else "vit"
    return data_folder() / "models" / kind / name


def base_of(expert: str) -> str:
    """The name of the base of an expert that ships."""
    if expert in small_texts.TASKS:
        return TEXT_BASE
    if expert in small_writing.TASKS:
        return WRITING_BASE
    return TINY_BASE if expert.startswith(TINY) else BASE


def multi_task_of(experts: Sequence[str]) -> Path | None:
    """The folder of the multi-task model that ships for these experts, in any order, or None."""
    for name, group in MULTI_TASK.items():
        if sorted(group) == sorted(experts):
            return model_folder(name)
    return None


def locate(source: str) -> str:
    """The folder of a model that ships, by its name, see ``shipped_name``; any other source as it is."""
    name = shipped_name(source, MODELS)
    return str(model_folder(name)) if name else source


def locate_stored(source: str) -> str:
    """``locate`` for a source in a file, where a bare name is always that of a model that ships."""
    return locate(recalled(source, MODELS))


def expand(experts: Sequence[str]) -> list[str]:
    """Sources of experts with the members of groups in the groups' place, spelled as ``spelled`` does.

    A folder called like a group wins if it holds a model (a ``config.json`` or ``adapter_config.json``).
    """
    out: list[str] = []
    for source in experts:
        check_path(source, "--experts")
        held = any(Path(source, f"{kind}config.json").is_file() for kind in ("", "adapter_"))
        group = source in GROUPS and not held
        name = source if group else shipped_name(source, (*GROUPS, *MODELS))
        out += map(spelled, GROUPS.get(name, (name,))) if name else [source]
    return out
