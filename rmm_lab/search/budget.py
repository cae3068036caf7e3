"""What a search without an agent may spend, and what it has scored with that.

A budget is a number of evaluations, or a ``Deadline``. A search asks ``Scored`` what is left and lets it
score; it knows nothing of clocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import Any

import numpy as np

from rmm_lab.errors import InputError
from rmm_lab.reward import Path, Step, path_text, places_of, reward
from rmm_lab.search.finalists import rounds, scores

ENDLESS = 2**62  # evaluations that no deadline leaves time for


class Deadline:
    """A budget of seconds, from now on.

    The clock is read after what is scored together, such as a generation of CMA-ES, which is finished: a
    search ends as if its evaluations had been given as the number that it got to.

    Args:
        seconds: at least 0.
        planned: evaluations by which a search plans its start, the rounds of uniform paths.
        clock: gives the time in seconds.
    """

    def __init__(
        self, seconds: float, planned: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        if not seconds >= 0:
            raise InputError(f"deadline: expected 0 seconds or more, found {seconds}; give more")
        self.planned, self._clock = planned, clock
        self._end = clock() + seconds

    def over(self) -> bool:
        """Whether the seconds have passed."""
        return self._clock() >= self._end


def uniform_paths(scorer: Any) -> list[Path]:
    """The path of each source, everywhere: N experts and M operators, in the order of the sources."""
    return [tuple(Step(source, k) for k in places_of(scorer)) for source in scorer.sources]


class Scored(list[tuple[str, float]]):
    """(path as text, reward in [0, 1]) of each evaluation in order, the uniform paths first.

    ``known``: the mean reward of each of these. ``answers``: what a search arrived at, the best first; these
    need not have been scored. ``by_task``: the scores (N,) behind each reward. ``left``: what is left of the
    budget, a number of evaluations, or a deadline: then nothing once it has passed.
    """

    def __init__(self, scorer: Any, budget: int | Deadline) -> None:
        super().__init__()
        self._deadline = budget if isinstance(budget, Deadline) else None
        evaluations = budget.planned if isinstance(budget, Deadline) else budget
        self.scorer = scorer
        self.left = evaluations if self._deadline is None else ENDLESS
        self.answers: list[Path] = []
        self.by_task: list[np.ndarray] = []
        paths = uniform_paths(scorer)
        values = [
            self.score(paths, repeat(subset), in_turn=True)
            for subset in range(rounds(evaluations, len(paths), scorer.n_subsets))
        ]
        scored = [[own[i] for own in values if i < len(own)] for i in range(len(paths))]
        self.known = [float(np.mean(own)) for own in scored if own]

    def score(
        self, paths: Sequence[Path], subsets: Iterable[int], *, in_turn: bool = False
    ) -> list[float]:
        """The rewards of paths, each on its subset, as far as the budget goes; in_turn: see ``scores``."""
        wanted = list(zip(paths[: self.left], subsets, strict=False))
        found = scores(self.scorer, wanted, in_turn=in_turn)
        values = [reward(own) for own in found]
        self.by_task.extend(found)
        self.extend(zip((path_text(path) for path, _ in wanted), values, strict=True))
        self.left -= len(values)
        if self._deadline is not None and self._deadline.over():
            self.left = 0
        return values
