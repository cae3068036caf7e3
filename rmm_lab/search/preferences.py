"""Scores on a common scale, 0 for the base and 1 for a task's own expert, and what a user prefers there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rmm_lab.errors import InputError
from rmm_lab.reward import Step
from rmm_lab.search.finalists import scores
from rmm_lab.search.front_measures import achievement


@dataclass(frozen=True)
class Ends:
    """Both ends of each task's scale on one split, metrics in [0, 1], (N,): the base, and the own expert.

    A task whose expert is no better than the base has no scale: nothing of that expert is worth keeping
    there. It takes no part in what is normalised, and its scores are only shown.
    """

    base: np.ndarray
    expert: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """Which tasks have a scale, (N,) bool: K of them."""
        return self.expert > self.base

    def normalised(self, found: np.ndarray, on: np.ndarray | None = None) -> np.ndarray:
        """(f - base) / (expert - base) of the tasks that count, or of those ``on``: (..., N) -> (..., K)."""
        on = self.counts if on is None else on
        gains = np.asarray(found, float)[..., on] - self.base[on]
        return np.asarray(gains / (self.expert - self.base)[on])


def ends_of(scorer: Any) -> Ends:
    """The ends on the whole reward split: N + 1 evaluations of all of it, on top of any budget."""
    models = ("base", *scorer.sources[: scorer.n_models])
    places = range(-1, scorer.n_layers)  # whole models, whatever the search's stem
    paths = [tuple(Step(name, k) for k in places) for name in models]
    base, *experts = scores(scorer, [(path, None) for path in paths])
    return Ends(base, np.array([own[i] for i, own in enumerate(experts)]))


def check_ends(ends: Ends, names: Sequence[str], option: str) -> None:
    """InputError unless two tasks have a scale: with one there is nothing to trade."""
    if ends.counts.sum() < 2:
        pairs = zip(names, ends.expert, ends.base, strict=True)
        found = ", ".join(f"{n} ({100 * e:.1f} %, base {100 * b:.1f} %)" for n, e, b in pairs)
        raise InputError(
            f"{option}: expected at least two tasks whose own expert is better than the base on the reward "
            f"split, found {found}; leave the option out, or merge other experts"
        )


def parse_preference(text: str, tasks: Sequence[str], experts: Sequence[str] = ()) -> np.ndarray:
    """``digits=2,textures=1`` -> weights (N,) that add up to 1, a task called by its name or its expert's.

    Only their ratios count. Raises InputError for anything else.
    """
    numbers = {name: i for names in (experts, tasks) for i, name in enumerate(names)}
    example = ",".join(
        f"{name}={n}" for name, n in zip(tasks, (2, *[1] * len(tasks)), strict=False)
    )
    found: dict[int, float] = {}
    for part in text.split(","):
        name, _, value = (word.strip() for word in part.rpartition("="))
        if name not in numbers:
            what = f"a task among {', '.join(tasks)}, as in {example}"
            raise InputError(f"--prefer: expected {what}, found {part.strip()!r}; correct it")
        try:
            weight = float(value)
        except ValueError:
            weight = math.nan
        if not 0 <= weight < math.inf:
            raise InputError(
                f"--prefer: expected a number of 0 or more for task {name!r}, found {value!r}; correct it"
            )
        if numbers[name] in found:
            raise InputError(f"--prefer: expected task {name!r} once, found it twice; keep one")
        found[numbers[name]] = weight
    if missing := [name for i, name in enumerate(tasks) if i not in found]:
        raise InputError(
            f"--prefer: expected a weight for each task, found none for {missing[0]!r}; add "
            f"{missing[0]}=0 where it does not count"
        )
    weights = np.array([found[i] for i in range(len(tasks))])
    if not (total := sum(found.values())) or not math.isfinite(total):
        raise InputError(
            f"--prefer: expected one weight above 0 at least, and a finite sum, found {text!r}; give "
            f"others, such as {example}"
        )
    return weights / total


@dataclass(frozen=True)
class Preference:
    """What a user asked for: weights (N,) of the tasks, on the scale of ``ends``."""

    weights: np.ndarray
    ends: Ends

    def worth(self, found: np.ndarray) -> float:
        """How well scores (N,) meet it, see ``front_measures.achievement``; at most 0."""
        return float(achievement(self.ends.normalised(found)[None], self._own)[0, 0])

    @property
    def _own(self) -> np.ndarray:
        own = self.weights[self.ends.counts]
        return own / own.sum()


def preference_of(text: str | None, scorer: Any) -> Preference | None:
    """The preference of ``--prefer``; None where none was given. InputError if no such model can be told."""
    if not text:
        return None
    experts = scorer.sources[: scorer.n_models]
    weights, ends = parse_preference(text, scorer.task_names, experts), ends_of(scorer)
    check_ends(ends, scorer.task_names, "--prefer")
    if not weights[ends.counts].any():
        own = scorer.task_names[int(weights.argmax())]
        raise InputError(
            f"--prefer: expected weight on a task whose expert is better than the base, found it all on "
            f"{own!r}, where the expert is not; prefer another task"
        )
    return Preference(weights, ends)


def with_worth(
    episodes: Sequence[Mapping[str, Any]], names: Sequence[str], preference: Preference
) -> list[tuple[str, float]]:
    """(path as text, worth) of a log's legal episodes, as ``finalists.legal`` gives rewards."""
    return [(path, preference.worth(found)) for path, found in scored_by_task(episodes, names)]


def scored_by_task(
    episodes: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> list[tuple[str, np.ndarray]]:
    """(path as text, each task's score (N,)) of a log's legal episodes."""
    return [
        (e["path"], np.array([e[f"score_{name}"] for name in names], float))
        for e in episodes
        if not e["penalised"]
    ]
