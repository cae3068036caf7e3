"""A task of which only some labels are known."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Some examples of a split, as scoring sees them. ``labels``: (n,) int64."""

    labels: Tensor = field(repr=False)

    def __len__(self) -> int:
        return len(self.labels)


class FewLabels:
    """A task whose reward split has only the examples whose labels are known; all else is the task's.

    They are drawn uniformly, without a look at any label: a draw of equally many of each class would know the
    labels that it draws by. So subsets, the final choice and the tuning of rules share these few.

    Args:
        task: of images or texts.
        fraction: share of the reward split whose labels are known, in (0, 1]; one example at least.
        seed: of the draw; different tasks of a problem get different ones.

    ``task``: the task with all labels. What a task says of its split as a whole, such as a text task's
    metric, goes by all of it.
    """

    def __init__(self, task: Any, fraction: float, seed: int | tuple[int, ...]) -> None:
        self.task, self.fraction, self.seed = task, fraction, seed
        self._known: np.ndarray | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "task":  # what is not there yet while one is copied
            raise AttributeError(name)
        return getattr(self.task, name)

    @property
    def known(self) -> np.ndarray:
        """Row numbers in the whole reward split, in order: (n,)."""
        if self._known is None:
            size = self.task.size("reward")
            drawn = np.random.default_rng(self.seed).permutation(size)
            self._known = np.sort(drawn[: max(1, round(self.fraction * size))])
        return self._known

    def split(self, name: str) -> Any:
        """A split; of ``reward`` the examples whose labels are known."""
        whole = self.task.split(name)
        return Part(whole.labels[torch.from_numpy(self.known)]) if name == "reward" else whole

    def size(self, name: str) -> int:
        """Examples of a split."""
        return len(self.known) if name == "reward" else self.task.size(name)

    def batch(self, name: str, rows: np.ndarray | slice) -> Any:
        """Some rows of a split as the models take them."""
        return self.task.batch(name, self.known[rows] if name == "reward" else rows)

    def inputs(self, name: str, rows: np.ndarray) -> Any:
        """The same, without anything of the others."""
        return self.task.inputs(name, self.known[rows] if name == "reward" else rows)


def with_all_inputs(task: Any) -> Any:
    """The task with its whole reward split, for what reads no label."""
    return task.task if isinstance(task, FewLabels) else task
