"""Looking ahead: which paths a rollout will ask for, so that all workers can score them at once."""

from __future__ import annotations

from typing import Any

import numpy as np

from rmm_lab.reward import Path, PathScorer


class RecordingScorer:
    """Scores nothing, and records what it is asked for.

    Nothing in a rollout depends on its scores, so a rollout played against a recorder, with the same draws,
    asks for the paths that the real one will ask for.

    Args:
        scorer: the one it stands in for.
    """

    def __init__(self, scorer: PathScorer) -> None:
        self.sources, self.n_models, self.n_layers = (
            scorer.sources,
            scorer.n_models,
            scorer.n_layers,
        )
        self.members = getattr(scorer, "members", ())  # a scorer by formula has none
        self.stacks, self.n_subsets = scorer.stacks, scorer.n_subsets
        self.task_names, self.chooses_stem = scorer.task_names, scorer.chooses_stem
        self._scorer: Any = scorer
        self._asked: list[tuple[Path, int | None]] = []

    def score(self, path: Path, subset: int | None = None) -> np.ndarray:
        """Zeros (N,)."""
        self._asked.append((path, subset))
        return np.zeros(self.n_models)

    def drift(self, path: Path) -> np.ndarray:
        """What the real one says, since the agent sees it: (N,)."""
        return self._scorer.drift(path)

    def take(self) -> list[tuple[Path, int | None]]:
        """All (path, subset) that were asked for since the last call."""
        asked, self._asked = self._asked, []
        return asked
