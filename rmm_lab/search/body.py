"""What the yardsticks with gradients share: a model whose weights can be set, and inputs drawn at random.

Merging never changes an expert's weights, and the agent and its rivals never differentiate. Only
``fisher`` and ``gradients`` do, to show what a merge can reach that may look at answers and gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rmm_lab.errors import InputError
from rmm_lab.families.parts import Weights
from rmm_lab.search.problem import Problem

Model = list[Weights]  # all that is merged: the stem, then each layer, by name
SPLIT = "train"  # the only one that these merges look at
ANSWERS = 64  # inputs that an expert answers at a time


class Body:
    """A model of a pool's architecture that holds tensors of its own, which take gradients.

    It begins with the base's weights. Memory: one model, and as much again for its gradients; base and
    experts stay where they are.
    """

    def __init__(self, problem: Problem) -> None:
        pool, self.device = problem.pool, problem.device
        places = range(-1, pool.n_layers)
        self.base, *self.experts = (
            [{n: t.to(self.device) for n, t in pool.weights(name, k).items()} for k in places]
            for name in ("base", *pool.names)
        )
        self.heads = [
            {n: t.to(self.device) for n, t in pool.heads[name].items()} for name in pool.names
        ]
        self._own = [{n: nn.Parameter(t.clone()) for n, t in part.items()} for part in self.base]
        self._architecture = pool.architecture  # its modules hold our parameters themselves
        self._stem = pool.architecture.stem(dict(self._own[0]))
        self._layers = [
            pool.architecture.layer(k, dict(part)) for k, part in enumerate(self._own[1:])
        ]
        for part in self._own:
            for tensor in part.values():
                tensor.requires_grad_(True)

    @property
    def weights(self) -> Model:
        """The weights as they are now, without gradients, not copied."""
        return [{n: t.detach() for n, t in part.items()} for part in self._own]

    @property
    def gradients(self) -> Model:
        """What ``backward`` left since ``forget``; zeros for a weight that nothing depended on."""
        return [
            {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in part.items()}
            for part in self._own
        ]

    @torch.no_grad()
    def set(self, model: Sequence[Weights]) -> None:
        """Copy a model's weights into this one."""
        for own, part in zip(self._own, model, strict=True):
            for name, tensor in own.items():
                tensor.copy_(part[name])

    @torch.no_grad()
    def combine(self, scales: Sequence[Sequence[dict[str, float]]]) -> None:
        """Set theta = theta_0 + sum_i lambda_i (theta_i - theta_0), tensor by tensor.

        scales: lambda of each expert, place and tensor: [i][place][name].
        """
        for k, (own, base) in enumerate(zip(self._own, self.base, strict=True)):
            for name, tensor in own.items():
                tensor.copy_(base[name])
                for expert, scale in zip(self.experts, scales, strict=True):
                    tensor.add_(expert[k][name] - base[name], alpha=scale[k][name])

    def forget(self) -> None:
        """Set all gradients to zero."""
        for part in self._own:
            for tensor in part.values():
                tensor.grad = None

    def logits(self, i: int, batch: Any) -> Tensor:
        """Scores of each answer to a batch of task i, with its head: (n, answers).

        A T5's are log-probabilities, -inf for a choice that a row lacks.
        """
        run = self._architecture
        state = run.embed(self._stem, run.place(batch, self.device, torch.float32))
        for layer in self._layers:
            state = run.apply(layer, state)
        return run.logits(self._stem, state, self.heads[i])


def broken(name: str) -> InputError:
    """What to raise where an expert's scores of its own task's answers are no numbers."""
    return InputError(
        f"expert {name!r}: expected finite scores of its own task's answers, found others; its weights are "
        "broken, leave it out"
    )


class Draws:
    """Inputs of each task, drawn at random: splits are sorted by class, so the first rows are one class.

    Args:
        problem: the experts and their tasks; of the tasks only inputs are read, but for ``labels``.
        steps, size: batches of a task, and inputs in each; fewer where a split is smaller. The rows of a
            split come in a random order, and in another one when it is used up.
        seed: of the order; the same seed gives the same rows.
    """

    def __init__(self, problem: Problem, *, steps: int, size: int, seed: int) -> None:
        self.steps, self.tasks, self.names = steps, problem.tasks, problem.pool.names
        self.rows: list[np.ndarray] = []  # (steps, size) of each task
        for i, task in enumerate(self.tasks):
            if (n := len(task.split(SPLIT))) == 0:
                raise InputError(
                    f"task {task.name!r}: expected inputs in its {SPLIT} split, found none; add some"
                )
            rng, k = np.random.default_rng([seed, i]), min(size, n)
            orders = [rng.permutation(n) for _ in range(max(1, -(-steps * k // n)))]
            self.rows.append(np.concatenate(orders)[: steps * k].reshape(steps, k))
        self._answers: list[tuple[np.ndarray, Tensor]] = []

    def batch(self, i: int, step: int) -> Any:
        """The inputs of task i at a step, as its family takes them."""
        return self.tasks[i].batch(SPLIT, self.rows[i][step])

    def labels(self, i: int, step: int) -> Tensor:
        """Their labels, (size,): numbers of classes or choices."""
        return self.tasks[i].split(SPLIT).labels[self.rows[i][step]]

    def ask_experts(self, body: Body) -> None:
        """Let each expert answer its own task's inputs, each once; the body ends with the last's weights.

        Raises InputError where an expert's answers are no numbers.
        """
        if self._answers or not self.steps:
            return
        for i, rows in enumerate(map(np.unique, self.rows)):
            body.set(body.experts[i])
            found = []
            with torch.no_grad():
                for start in range(0, len(rows), ANSWERS):
                    batch = self.tasks[i].batch(SPLIT, rows[start : start + ANSWERS])
                    found.append(body.logits(i, batch))
            width = max(
                part.shape[1] for part in found
            )  # a batch has no more choices than it needs
            table = torch.cat(
                [
                    nn.functional.pad(part, (0, width - part.shape[1]), value=-torch.inf)
                    for part in found
                ]
            )
            if table.isnan().any() or (table.amax(-1) == -torch.inf).any():
                raise broken(self.names[i])
            self._answers.append((rows, table))

    def answers(self, i: int, step: int) -> Tensor:
        """What expert i scores the inputs of a step, (size, answers), -inf for choices that a row lacks."""
        known, table = self._answers[i]
        return table[np.searchsorted(known, self.rows[i][step])]
