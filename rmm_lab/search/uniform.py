"""What RMM is compared with: the base, the experts, multi-task training, uniform merges.

Scales and densities of the uniform merges are chosen on the reward split; the test split is only
reported. Other searches with the same number of evaluations are in ``rivals``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from rmm_lab.families.parts import Weights
from rmm_lab.reward import Path, Step, evaluate, predict, predict_all
from rmm_lab.search.problem import Problem

SCALES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
# Each uniform merge with the settings it is tuned over: 35 evaluations of the reward split in all, since
# the weight average has nothing to tune.
GRIDS: dict[str, tuple[str, ...]] = {
    "weight average": ("weight_average",),
    "task arithmetic": tuple(f"task_arithmetic:scale={s:g}" for s in SCALES),
    "TIES": tuple(
        f"ties:density={d:g},scale={s:g}" for d in (0.1, 0.3, 1.0) for s in (*SCALES[2:], 1.5, 2.0)
    ),
    "DARE": tuple(f"dare:scale={s:g}" for s in SCALES),
}
# As in the paper, one setting for all tasks; the densities are those of its code (TIES 0.3, DARE 0.66).
AS_GIVEN: dict[str, str] = {"task arithmetic": "task_arithmetic", "TIES": "ties", "DARE": "dare"}


@dataclass(frozen=True)
class Row:
    """One line of a result table.

    ``scores``: each task's metric in [0, 1] on the test split. ``plain``: accuracy of the tasks whose
    metric is another, task -> [0, 1]; it is shown beside, and is no part of the mean.
    ``sees``: what building and tuning saw of the train and reward splits: nothing, inputs, labels or
    gradients; what is tuned on the reward split saw labels. ``evaluations``: merged models scored on the
    reward split. ``seconds``: of building and tuning, nan if not measured. ``reward``: mean metric on the
    whole reward split in [0, 1], nan if not scored.
    """

    name: str
    setting: str
    scores: tuple[float, ...]
    plain: dict[str, float] = field(default_factory=dict)
    sees: str = "nothing"
    evaluations: int = 0
    seconds: float = math.nan
    reward: float = math.nan

    @property
    def mean(self) -> float:
        """Mean over tasks, Eq. 7 on the test split."""
        return float(np.mean(self.scores))


def row(problem: Problem, name: str, setting: str, found: Sequence[Tensor], **more: Any) -> Row:
    """A line of the table from each task's answers on the test split, (n,) each; more: fields of ``Row``."""
    scores, plain = [], {}
    for task, answer in zip(problem.tasks, found, strict=True):
        labels = task.split("test").labels
        scores.append(task.score(answer, labels))
        if task.metric != "accuracy":
            plain[task.name] = float((answer == labels).double().mean())
    return Row(name, setting, tuple(scores), plain, **more)


def path_row(problem: Problem, name: str, setting: str, path: Path) -> Row:
    """A line of the table for a path, its stem as the first step."""
    found = predict_all(problem.pool, problem.tasks, path, "test", problem.device)
    return row(problem, name, setting, found)


def uniform_path(problem: Problem, source: str) -> Path:
    """One source for the stem and every layer: a merge of whole models."""
    return tuple(Step(source, k) for k in range(-1, problem.pool.n_layers))


def uniform(problem: Problem, source: str, split: str) -> np.ndarray:
    """Each task's metric (N,) of a uniform path on a whole split."""
    path = uniform_path(problem, source)
    return evaluate(problem.pool, problem.tasks, path, split, problem.device)


def tune(problem: Problem, settings: Sequence[str]) -> str:
    """The setting with the best mean metric on the reward split; the first of equal ones."""
    if len(settings) == 1:
        return settings[0]
    return max(settings, key=lambda s: float(uniform(problem, s, "reward").mean()))


def rows(problem: Problem) -> Iterator[Row]:
    """The rows of Tables I to III but for RMM, on the test split, in the paper's order.

    A family may put rows that need no model at the top, such as chance.
    """
    pool, tasks, family = problem.pool, problem.tasks, problem.pool.base.family
    for trivial in family.trivial_rows(tasks):
        accuracies = zip(tasks, trivial.accuracies, strict=True)
        plain = {task.name: a for task, a in accuracies if task.metric != "accuracy"}
        yield Row(trivial.name, trivial.setting, trivial.scores, plain)
    yield path_row(problem, "base", family.BASE_SETTING, uniform_path(problem, "base"))
    own: list[Tensor] = []
    for i, name in enumerate(pool.names):
        found = predict_all(pool, tasks, uniform_path(problem, name), "test", problem.device)
        own.append(found[i])
        yield row(problem, f"expert {name}", "on every task", found)
    yield row(problem, "fine-tuned", "each expert on its task: the upper bound", own)
    if problem.multi_task is not None:
        yield row(problem, "multi-task", "trained on all tasks", _joint(problem))
    yield from uniform_rows(problem, (*AS_GIVEN, *GRIDS))


def uniform_rows(problem: Problem, names: Collection[str]) -> Iterator[Row]:
    """The uniform merges of these names, such as ``DARE``: as published, then tuned on the reward split."""
    merges: list[tuple[str, tuple[str, ...], str]]
    merges = [(name, (setting,), "{} as published") for name, setting in AS_GIVEN.items()]
    for name, settings in GRIDS.items():
        if len(settings) == 1:
            merges.append((name, settings, "{}"))
        else:
            told = f"{{}}, best of {len(settings)} on the reward split"
            merges.append((f"{name}, tuned", settings, told))
    for name, settings, told in merges:
        if name.removesuffix(", tuned") in names:
            best = tune(problem, settings)
            yield path_row(problem, name, told.format(best), uniform_path(problem, best))
            problem.pool.forget(settings)


def weights_row(
    problem: Problem, name: str, setting: str, stem: Weights, layers: Sequence[Weights], **more: Any
) -> Row:
    """A line of the table for a merged model given as weights; each task by its own expert's head.

    stem, layers: names -> tensors, as ``LayerPool.weights`` gives those of places -1 and 0 to L - 1. more:
    further fields of ``Row``.
    """
    heads = [problem.pool.heads[expert] for expert in problem.pool.names]
    return row(problem, name, setting, _answers(problem, stem, layers, heads), **more)


def _joint(problem: Problem) -> list[Tensor]:
    """Each task's answers on the test split of the multi-task model; of a ViT, by the task's own head."""
    joint = problem.multi_task
    assert joint is not None
    parts = problem.pool.split(joint.weights)
    heads = [joint.family.task_head(joint, task) for task in problem.tasks]
    return _answers(problem, parts.stem, parts.layers, heads)


def _answers(
    problem: Problem, stem: Weights, layers: Sequence[Weights], heads: Sequence[Weights]
) -> list[Tensor]:
    """Each task's answers (n,) on the test split of a model given as weights, with the task's head."""
    architecture = problem.pool.architecture
    outside = architecture.stem(stem)
    modules = [architecture.layer(k, weights) for k, weights in enumerate(layers)]
    return [
        predict(architecture, outside, modules, head, task, "test", device=problem.device)
        for head, task in zip(heads, problem.tasks, strict=True)
    ]
