"""A scorer of sublayers seen as one of blocks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from rmm_lab.reward import Path, Step

if TYPE_CHECKING:
    from rmm_lab.engine.scorer import Scorer


class BlockView:
    """Lets an agent choose whole blocks: a source taken at a block is taken in all of its sublayers.

    What ``MergingEnv`` needs of a scorer. Whoever makes a view keeps the scorer of sublayers too.

    Args:
        scorer: of a pool whose ``unit`` is ``sublayer``.
    """

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self.sources, self.n_models = scorer.sources, scorer.n_models
        self.members = scorer.members
        self.n_subsets, self.task_names = scorer.n_subsets, scorer.task_names
        self.chooses_stem = scorer.chooses_stem
        self.blocks = scorer.blocks  # of each block the numbers of its sublayers
        self.n_layers = len(self.blocks)
        first = [stack.start for stack in scorer.stacks]
        starts = [i for i, block in enumerate(self.blocks) if block.start in first]
        ends = [*starts[1:], self.n_layers]
        self.stacks = tuple(range(a, b) for a, b in zip(starts, ends, strict=True))

    def expand(self, path: Path) -> Path:
        """The path of sublayers of a path of blocks; the stem stays as it is."""
        return tuple(
            Step(source, j, scales)
            for source, k, scales in path
            for j in ([k] if k < 0 else self.blocks[k])
        )

    def score(self, path: Path, subset: int | None = None) -> np.ndarray:
        """Each task's score of a path of blocks: (N,) in [0, 1]."""
        return self._scorer.score(self.expand(path), subset)

    def drift(self, path: Path) -> np.ndarray:
        """How far a path of blocks is from each expert: (N,), see ``Scorer.drift``."""
        return self._scorer.drift(self.expand(path))

    def prefetch(self, wanted: Iterable[tuple[Path, int | None]]) -> None:
        """Score (path of blocks, subset) pairs together, see ``Scorer.prefetch``."""
        self._scorer.prefetch([(self.expand(path), subset) for path, subset in wanted])
