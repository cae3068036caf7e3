"""What a search is compared with: the base, the experts, multi-task training, rules that see weights alone.

A *rule* makes one merge of whole models by formula. Its scales and densities are chosen on the reward split,
from a grid of its own, since scales of different rules are not comparable; the test split is only reported.
Rules that see inputs are in ``matched``, those that follow gradients in ``gradients``, and other searches
with the same number of evaluations in ``rivals``; ``table`` puts them all in order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from rmm_lab.families.parts import Weights
from rmm_lab.reward import Path, Step, evaluate, predict, predict_all
from rmm_lab.search.problem import Problem
from rmm_lab.search.race import Race

# ------------------------------------------------------------------------------- lines of a table

OWN = "fine-tuned"  # the row of each expert on its own task
EXPERT = "expert "  # what the name of an unmerged expert's row begins with


@dataclass(frozen=True)
class Row:
    """One line of a result table.

    ``scores``: each task's metric in [0, 1] on the test split. ``plain``: accuracy of the tasks whose
    metric is another, task -> [0, 1]; it is shown beside, and is no part of the mean.

    What it took: ``sees``: the most that building and tuning looked at, one of nothing, inputs, labels,
    gradients. ``evaluations``: merged models that were scored on the reward split. ``seconds``: from loaded
    models to this one, with tuning and without the test split. ``reward``: mean over tasks on the whole
    reward split, in [0, 1]. NaN: not measured.
    """

    name: str
    setting: str
    scores: tuple[float, ...]
    plain: dict[str, float] = field(default_factory=dict)
    sees: str = "nothing"
    evaluations: int = 0
    seconds: float = float("nan")
    reward: float = float("nan")

    @property
    def mean(self) -> float:
        """Mean over tasks, Eq. 7 on the test split."""
        return float(np.mean(self.scores))

    def of_experts(self, own: Sequence[float]) -> float:
        """Mean over tasks of score / ``own``, that of the task's own expert; NaN if one of these is 0."""
        if not all(own):
            return float("nan")
        return float(np.mean(np.divide(self.scores, own)))


def row(problem: Problem, name: str, setting: str, found: Sequence[Tensor], **took: Any) -> Row:
    """A line of the table from each task's answers on the test split, (n,) each; ``took``: its costs."""
    scores, plain = [], {}
    for task, answer in zip(problem.tasks, found, strict=True):
        labels = task.split("test").labels
        scores.append(task.score(answer, labels))
        if task.metric == "balanced":
            plain[task.name] = float((answer == labels).double().mean())
    return Row(name, setting, tuple(scores), plain, **took)


def path_row(problem: Problem, name: str, setting: str, path: Path, **took: Any) -> Row:
    """A line of the table for a path, its stem as the first step."""
    found = predict_all(problem.pool, problem.tasks, path, "test", problem.device)
    return row(problem, name, setting, found, **took)


def uniform_path(problem: Problem, source: str) -> Path:
    """One source for the stem and every layer: a merge of whole models."""
    return tuple(Step(source, k) for k in range(-1, problem.pool.n_layers))


def uniform(problem: Problem, source: str, split: str) -> np.ndarray:
    """Each task's metric (N,) of a uniform path on a whole split."""
    path = uniform_path(problem, source)
    return evaluate(problem.pool, problem.tasks, path, split, problem.device)


# ------------------------------------------------------------------------------------ the rules


def _grid(operator: str, **options: Sequence[float | str]) -> tuple[str, ...]:
    """An operator with every combination of values of its options, the last one varying fastest."""
    each = [[f"{key}={value}" for value in values] for key, values in options.items()]
    return tuple(f"{operator}:{','.join(one)}" for one in product(*each))


WEIGHTS, METRICS = "weight per expert, tuned", "metrics-weighted average"
SCALES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
# Row -> the settings that it is chosen from; one alone has nothing to tune. As in the paper, one setting for
# all tasks; the densities as published are those of its code (TIES 0.3, DARE 0.66).
GRIDS: dict[str, tuple[str, ...]] = {
    "weight average": ("weight_average",),
    "task arithmetic": ("task_arithmetic",),
    "TIES": ("ties",),
    "DARE": ("dare",),
    "task arithmetic, tuned": _grid("task_arithmetic", scale=SCALES),
    "TIES, tuned": _grid("ties", density=(0.1, 0.3, 1.0), scale=(*SCALES[2:], 1.5, 2.0)),
    "DARE, tuned": _grid("dare", scale=SCALES),
    WEIGHTS: (),  # see tune_weights
    "TSV": _grid("tsv", scale=(0.5, 0.75, 1.0, 1.5)),
    "Iso-C": _grid("iso_c", scale=(0.75, 1.0, 1.3, 1.6)),
    "Iso-CTS": _grid("iso_cts", scale=(0.75, 1.0, 1.3, 1.6)),
    "WUDI": _grid("wudi", scale=(0.4, 0.6, 0.8, 1.0)),
    "KnOTS": _grid("knots", density=(0.3, 1.0), scale=(0.4, 0.6, 1.0)),
    "KnOTS, factored": _grid("knots_factored", density=(0.3, 1.0), scale=(0.2, 0.3, 0.4, 0.6)),
    "DO-Merging": _grid("do_merging", steps=(0, 50), scale=(0.2, 0.3, 0.4, 0.6)),
    "STAR": _grid("star", scale=(0.5, 0.8, 1.0, 1.3)),
    "PCB": _grid("pcb", density=(0.1, 0.2, 0.4), scale=(0.8, 1.2)),
    "Breadcrumbs": _grid("breadcrumbs", density=(0.14, 0.9), scale=(0.3, 0.6, 0.8)),
    "DELLA": _grid("della", scale=(0.3, 0.5, 0.8, 1.0)),
    "Consensus": _grid("consensus", scale=(0.3, 0.5, 0.8, 1.0)),
    "EMR": _grid("emr", scale=(0.4, 0.6, 0.8, 1.0)),
    "MagMax": _grid("magmax", scale=(0.4, 0.6, 0.8, 1.0)),
    "SCE": _grid("sce", density=(0.1, 1.0), scale=(0.6, 1.0)),
    "WIDEN": _grid("widen", calibration=(0.4, 0.6, 0.8, 1.0)),
    "Model Stock": ("model_stock",),
    "SLERP": _grid("slerp", t=(0.3, 0.5, 0.7)),
    "Karcher mean": _grid("karcher", of=("weights", "deltas")),
    "LiNeS": _grid("lines", first=(0.1, 0.3), last=(0.8, 1.0, 1.2)),
    METRICS: (),  # see tune_metrics
    "DOGE": _grid("doge", scale=(0.5, 0.75, 1.0)),
}
PUBLISHED = ("task arithmetic", "TIES", "DARE")
OF_TWO = ("SLERP",)  # rows of two experts alone
OF_ADAPTERS = ("KnOTS, factored", "DO-Merging")  # rows of LoRA adapters alone
SLOW = ("DOGE",)  # iterative: not in the table of a single search


class Choice(NamedTuple):
    """A rule's setting and its mean metric on the whole reward split; NaN and 0 ``tried`` if not scored.

    ``evaluations``: models that were scored, those among them that are no setting of the rule; ``dropped``:
    how many of them on a part of the split alone, see ``race``.
    """

    setting: str
    reward: float = float("nan")
    tried: int = 0
    evaluations: int = 0
    dropped: int = 0


class Tuning:
    """The best setting so far by its mean metric on the whole reward split; frees the others' weights."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.best = problem, Choice("", -1.0)
        self._race = Race(problem)
        self._rewards: dict[str, float] = {}

    @property
    def tried(self) -> int:
        """How many different settings were scored."""
        return len(self._rewards)

    def score(self, setting: str) -> float:
        """The mean metric of a setting, in [0, 1]; the first of equal ones stays the best.

        Of one that falls behind, an estimate below the best.
        """
        if setting not in self._rewards:
            self._rewards[setting] = self._race.score(uniform_path(self.problem, setting))
            better = self._rewards[setting] > self.best.reward
            self.problem.pool.forget([self.best.setting if better else setting])
            if better:
                self.best = Choice(setting, self._rewards[setting])
        return self._rewards[setting]

    def choice(self) -> Choice:
        """The best setting of all."""
        n = self.tried
        return self.best._replace(tried=n, evaluations=n, dropped=self._race.dropped)


def tune(problem: Problem, settings: Sequence[str]) -> Choice:
    """The best of some settings; one alone is not scored."""
    if len(settings) == 1:
        return Choice(settings[0])
    tuning = Tuning(problem)
    for setting in settings:
        tuning.score(setting)
    return tuning.choice()


MOST = 27  # evaluations to tune a weight per expert
VALUES = {2: (0.2, 0.4, 0.6, 0.8, 1.0), 3: (0.2, 0.5, 0.8)}  # experts -> values of each weight
STARTS, STEP = (0.3, 0.5, 0.7), 0.3  # from 4 experts on: one weight for all, then up and down


def tune_weights(problem: Problem) -> Choice:
    """Task arithmetic with a scale per expert, by at most ``MOST`` evaluations.

    Two and three experts have a grid. More have a coordinate search from the best scale for all: one expert
    at a time, a step down and up, as long as evaluations are left; the step halves after a round without a
    gain.
    """
    n, tuning = problem.pool.n_models, Tuning(problem)

    def score(weights: Sequence[float]) -> float:
        return tuning.score("task_arithmetic:scale=" + "/".join(f"{w:g}" for w in weights))

    if n in VALUES:
        max(product(VALUES[n], repeat=n), key=score)
        return tuning.choice()
    best, step = max(((start,) * n for start in STARTS), key=score), STEP
    while tuning.tried < MOST:
        before = best
        for i, change in product(range(n), (-step, step)):
            other = (*best[:i], before[i] + change, *best[i + 1 :])
            if tuning.tried < MOST:
                best = max(best, other, key=score)
        step = step / 2 if best == before else step
    return tuning.choice()


def tune_metrics(problem: Problem) -> Choice:
    """An average by how good each expert is on its own task's reward split; N evaluations go to that."""
    names = problem.pool.names
    own = [uniform(problem, name, "reward")[i] for i, name in enumerate(names)]
    metrics = "/".join(f"{max(metric, 0.001):.4g}" for metric in own)  # the rule takes no 0
    settings = _grid("metrics_weighted_average", metrics=(metrics,), power=(0.5, 1, 2, 4))
    choice = tune(problem, settings)
    return choice._replace(evaluations=choice.evaluations + len(names))


TUNED: dict[str, Callable[[Problem], Choice]] = {WEIGHTS: tune_weights, METRICS: tune_metrics}


def rule_rows(problem: Problem, names: Collection[str] = tuple(GRIDS)) -> Iterator[Row]:
    """The merges by rule of these rows, on the test split, each tuned on the reward split before."""
    whole = any(expert.factors is None for expert in problem.pool.experts)
    left_out = (OF_TWO if problem.pool.n_models != 2 else ()) + (OF_ADAPTERS if whole else ())
    for name in GRIDS:
        if name not in names or name in left_out:
            continue
        start = time.perf_counter()
        choice = TUNED[name](problem) if name in TUNED else tune(problem, GRIDS[name])
        path = uniform_path(problem, choice.setting)
        for step in path:
            problem.pool.weights(*step)
        told, sees = choice.setting, "nothing"
        if choice.tried:
            told, sees = f"{told}, best of {choice.tried} on the reward split", "labels"
            told += f", {choice.dropped} of them on a part of it" if choice.dropped else ""
        elif name in PUBLISHED:
            told += " as published"
        took = {"evaluations": choice.evaluations, "reward": choice.reward, "sees": sees}
        yield path_row(problem, name, told, path, seconds=time.perf_counter() - start, **took)
        problem.pool.forget([choice.setting])


def rows(problem: Problem, names: Collection[str] = tuple(GRIDS)) -> Iterator[Row]:
    """The rows that need no search, on the test split: models as they are, then the rules of these rows.

    A family may put rows that need no model at the top, such as chance.
    """
    pool, tasks, family = problem.pool, problem.tasks, problem.pool.base.family
    for trivial in family.trivial_rows(tasks):
        accuracies = zip(tasks, trivial.accuracies, strict=True)
        plain = {task.name: a for task, a in accuracies if task.metric == "balanced"}
        yield Row(trivial.name, trivial.setting, trivial.scores, plain, sees=trivial.sees)
    yield path_row(problem, "base", family.BASE_SETTING, uniform_path(problem, "base"))
    own: list[Tensor] = []
    for i, name in enumerate(pool.names):
        found = predict_all(pool, tasks, uniform_path(problem, name), "test", problem.device)
        own.append(found[i])
        yield row(problem, f"{EXPERT}{name}", "on every task", found)
    yield row(problem, OWN, "each expert on its task: the upper bound", own)
    if problem.multi_task is not None:
        joint = _joint(problem)
        yield row(problem, "multi-task", "trained on all tasks", joint, sees="gradients")
    yield from rule_rows(problem, names)


def weights_row(
    problem: Problem, name: str, setting: str, stem: Weights, layers: Sequence[Weights], **took: Any
) -> Row:
    """A line of the table for a merged model given as weights; each task by its own expert's head.

    stem, layers: names -> tensors, as ``LayerPool.weights`` gives those of places -1 and 0 to L - 1.
    """
    heads = [problem.pool.heads[expert] for expert in problem.pool.names]
    return row(problem, name, setting, _answers(problem, stem, layers, heads), **took)


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
