"""Racing: merged models are scored part by part, and one that can hardly win any more is dropped.

Source: Maron & Moore 1994, "Hoeffding races: accelerating model selection search"; as in the races of
Birattari et al. 2002, the models that are left see the same examples, and their differences are tested.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmm_lab.reward import Path, predict_all, reward

FIRST, SHARE = 64, 1 / 16  # the first look: examples of each task, and share of the split, at least
SURE = 4.0  # standard errors that a model must be behind


class Race:
    """The best of some models by the mean metric of their tasks on the whole reward split.

    A model sees examples in random order, the same for all, and at each look twice as many as before. It is
    dropped once it is ``SURE`` standard errors behind the best so far on the same examples; that happens to a
    model that is no worse once in 30,000 looks. What is not dropped is scored on the whole split, as
    ``evaluate`` does, so that the best model's score is no estimate. Where a task's metric is not accuracy,
    nothing is dropped.

    problem: models and tasks. seed: of the order. ``dropped``: how many models were.
    """

    def __init__(self, problem: Any, seed: int = 0) -> None:
        self.problem, self.dropped = problem, 0
        self._most, self._right = -1.0, list[Tensor]()  # the best so far, and what it has right
        sizes = [len(task.split("reward")) for task in problem.tasks]
        self._orders = [
            np.random.default_rng((seed, i)).permutation(n) for i, n in enumerate(sizes)
        ]
        share, self._looks = max(SHARE, FIRST / min(sizes)), [1.0]
        if all(task.metric == "accuracy" for task in problem.tasks):
            while share < 1:
                self._looks.insert(-1, share)
                share *= 2

    def score(self, path: Path) -> float:
        """A model's mean metric, in [0, 1]; of one that is dropped an estimate, below the best so far."""
        pool, tasks, device = self.problem.pool, self.problem.tasks, self.problem.device
        labels = [t.split("reward").labels[o] for t, o in zip(tasks, self._orders, strict=True)]
        answers, seen = [y[:0] for y in labels], 0.0
        for look in self._looks:
            rows = [o[round(seen * len(o)) : round(look * len(o))] for o in self._orders]
            found = predict_all(pool, tasks, path, "reward", device, rows)
            answers = [torch.cat([a, new]) for a, new in zip(answers, found, strict=True)]
            seen = look
            if look < 1 and self._right:
                behind, error = self._difference(answers, labels)
                if behind < -SURE * error:
                    self.dropped += 1
                    return self._most + behind
        worth = reward(
            np.array([t.score(*x) for t, *x in zip(tasks, answers, labels, strict=True)])
        )
        if worth > self._most:
            self._most = worth
            self._right = [(a == y).double() for a, y in zip(answers, labels, strict=True)]
        return worth

    def _difference(self, answers: list[Tensor], labels: list[Tensor]) -> tuple[float, float]:
        """The mean difference to the best on what both have seen, and its standard error."""
        means, squares = [], []
        for own, y, best in zip(answers, labels, self._right, strict=True):
            n = len(own)
            gaps = (own == y[:n]).double() - best[:n]  # (n,) of -1, 0, 1
            means.append(float(gaps.mean()))
            # At least one example is taken to differ; of a finite split, what is left alone is unknown.
            variance = max(float(gaps.var(correction=0)), 1 / n)
            squares.append(variance / n * (1 - n / len(y)))
        return float(np.mean(means)), float(np.sqrt(sum(squares)) / len(squares))
