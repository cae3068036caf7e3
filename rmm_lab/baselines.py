"""What RMM is compared with: the base, the experts, multi-task training and uniform merges.

Scales and densities of the uniform merges are chosen on the reward split; the test split is only
reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rmm_lab.models import split
from rmm_lab.problem import Problem
from rmm_lab.scoring import accuracy, evaluate

SCALES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
# Each uniform merge with the settings it is tuned over: 36 evaluations of the reward split in all.
GRIDS: dict[str, tuple[str, ...]] = {
    "weight average": ("weight_average",),
    "task arithmetic": tuple(f"task_arithmetic:scale={s:g}" for s in SCALES),
    "TIES": tuple(
        f"ties:density={d:g},scale={s:g}" for d in (0.1, 0.3, 1.0) for s in (*SCALES[2:], 1.5, 2.0)
    ),
    "DARE": tuple(f"dare:scale={s:g}" for s in SCALES),
}
# The paper's: "the same hyper-parameter settings"; its code keeps 30 % in TIES and 66 % in DARE.
AS_GIVEN: dict[str, str] = {"task arithmetic": "task_arithmetic", "TIES": "ties", "DARE": "dare"}


@dataclass(frozen=True)
class Row:
    """One line of a result table. ``scores``: each task's accuracy in [0, 1] on the test split."""

    name: str
    setting: str
    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over tasks, Eq. 7 on the test split."""
        return float(np.mean(self.scores))


def uniform(problem: Problem, source: str, split_name: str) -> np.ndarray:
    """One source for the stem and every layer, a whole-model merge: each task's accuracy (N,)."""
    steps = [(source, k) for k in range(problem.pool.n_layers)]
    return evaluate(problem.pool, problem.tasks, steps, source, split_name)


def tune(problem: Problem, settings: Sequence[str]) -> str:
    """The setting with the best mean accuracy on the reward split; the first of equal ones."""
    if len(settings) == 1:
        return settings[0]
    return max(settings, key=lambda s: float(uniform(problem, s, "reward").mean()))


def rows(problem: Problem) -> Iterator[Row]:
    """The rows of Tables I to III but for RMM, on the test split, in the paper's order."""
    pool, tasks = problem.pool, problem.tasks

    def row(name: str, setting: str, scores: np.ndarray) -> Row:
        return Row(name, setting, tuple(scores.tolist()))

    yield row("base", "with the experts' heads", uniform(problem, "base", "test"))
    own = []
    for i, name in enumerate(pool.names):
        scores = uniform(problem, name, "test")
        own.append(scores[i])
        yield row(f"expert {name}", "on every task", scores)
    yield row("fine-tuned", "each expert on its task: the upper bound", np.array(own))
    if problem.multi_task is not None:
        joint, vit = split(problem.multi_task.weights), pool.vit
        layers = [vit.layer(k, w) for k, w in enumerate(joint.layers)]
        joint_scores = []
        for task in tasks:
            part = slice(*problem.multi_task.config["rmm_lab"]["heads"][task.name])
            head = {key: value[part] for key, value in joint.head.items()}
            joint_scores.append(accuracy(vit, vit.stem(joint.stem), layers, head, task, "test"))
        yield row("multi-task", "trained on all tasks", np.array(joint_scores))
    for name, setting in AS_GIVEN.items():
        yield row(name, f"{setting} as published", uniform(problem, setting, "test"))
    for name, settings in GRIDS.items():
        best = tune(problem, settings)
        if len(settings) == 1:
            yield row(name, best, uniform(problem, best, "test"))
        else:
            setting = f"{best}, best of {len(settings)} on the reward split"
            yield row(f"{name}, tuned", setting, uniform(problem, best, "test"))
        pool.forget(settings)
