"""What the searches for fronts share: evaluations with a score per task, and the numbers they choose.

Most choose from one *box*: a scale for each member of the pool in each of ``BLOCKS`` blocks of neighbouring
places, within ``layer_scales.BOUNDS``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import Any

import numpy as np

from rmm_lab.reward import Path, places_of
from rmm_lab.search.budget import Scored
from rmm_lab.search.front_measures import achievement
from rmm_lab.search.layer_scales import BOUNDS, path_of_scales
from rmm_lab.search.preferences import Ends
from rmm_lab.search.rivals import SCALES

BLOCKS = 4  # of places; fewer where there are fewer places


class Trials(Scored):
    """``Scored`` for K objectives: the tasks that count, on the scale of ``ends``.

    Like any search it begins with the uniform paths, for up to a tenth of its budget, in evaluations.
    """

    def __init__(self, scorer: Any, budget: int, ends: Ends) -> None:
        super().__init__(scorer, budget)
        self.ends, self.n_tasks = ends, int(ends.counts.sum())
        self.begun = len(self)  # evaluations of the uniform paths
        self.turn = 0  # number of the next subset

    def ask(self, paths: Sequence[Path], *, stay: bool = False) -> np.ndarray:
        """Normalised scores (n, K) of paths on one subset, as far as the budget goes.

        Subsets come in turn; stay: take the last one once more.
        """
        self.turn += not stay
        first = len(self)
        self.score(paths, repeat((self.turn - 1) % self.scorer.n_subsets))
        return self.points(first)

    def points(self, first: int = 0) -> np.ndarray:
        """Normalised scores (n, K) of the evaluations from ``first`` on."""
        found = np.array(self.by_task[first:]).reshape(-1, len(self.ends.base))
        return self.ends.normalised(found)

    def uniform(self) -> dict[str, np.ndarray]:
        """Source -> the mean of its uniform path, (K,)."""
        sources, found = self.scorer.sources, self.points()[: self.begun]
        each = {name: found[i :: len(sources)] for i, name in enumerate(sources)}
        return {name: own.mean(0) for name, own in each.items() if len(own)}


Known = list[tuple[np.ndarray, np.ndarray]]  # numbers (D,) and what they have, (K,)


class Box:
    """Numbers (D,) within ``BOUNDS`` as paths: D is the number of blocks times that of members.

    Args:
        scorer: of the paths. blocks: of neighbouring places that share their scales, as equal as possible.
        members: whose scales are chosen: the first so many of the scorer's; by default all.
    """

    def __init__(self, scorer: Any, blocks: int = BLOCKS, members: int | None = None) -> None:
        self.places = places_of(scorer)
        self.names = scorer.members[:members]
        self.n_experts = scorer.n_models
        parts = np.array_split(np.arange(len(self.places)), min(blocks, len(self.places)))
        self.block = np.repeat(np.arange(len(parts)), [len(part) for part in parts])  # (P,)
        self.shape = len(parts), len(self.names)
        self.size = len(parts) * len(self.names)

    def path(self, numbers: np.ndarray) -> Path:
        """(D,) -> a path with the scales of its block at each place."""
        rows = numbers.reshape(self.shape)[self.block]  # (D,) -> (P, M)
        return path_of_scales(rows.clip(*BOUNDS), self.places)

    def everywhere(self, scales: Sequence[float]) -> np.ndarray:
        """The same scales (M,) in all blocks: (D,)."""
        return np.tile(np.asarray(scales, float), self.shape[0])

    def starts(self, out: Trials) -> Known:
        """What is known before a search: the members, and one scale for all experts, which are scored.

        A member is a scale of 1 for itself and of 0 for the others.
        """
        uniform = out.uniform()
        known = [
            (self.everywhere(np.eye(len(self.names))[i]), uniform[name])
            for i, name in enumerate(self.names)
            if name in uniform
        ]
        equal = np.arange(len(self.names)) < self.n_experts
        tried = [self.everywhere(scale * equal) for scale in SCALES]
        return [*known, *zip(tried, out.ask([self.path(x) for x in tried]), strict=False)]


def best_for(known: Known, weights: np.ndarray) -> np.ndarray:
    """The numbers (D,) that meet weights (K,) best of all that are known, by their ``achievement``."""
    values = achievement(np.array([point for _, point in known]), weights)[0]
    return known[int(values.argmax())][0]
