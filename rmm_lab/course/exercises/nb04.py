"""Exercises of notebook 04: composing layers, the reward, brute force."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from rmm_lab import reward as rewards
from rmm_lab.course.checks import Exercise, Mistake, Task

Layer = Callable[[Tensor], Tensor]
Score = Callable[[tuple[int, ...]], float]

# ------------------------------------------------------------------------------------------ 04.compose


def compose(layers: Sequence[Layer], x: Tensor) -> Tensor:
    """F_T*( ... F_2*(F_1*(x))): the layers one after another, the path's first one first (Eq. 6)."""
    for layer in layers:
        x = layer(x)
    return x


class Named:
    """A layer that is shown by its formula."""

    def __init__(self, text: str, function: Layer) -> None:
        self.text, self.function = text, function

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)

    def __repr__(self) -> str:
        return self.text


_double = Named("2x", lambda x: 2 * x)
_plus = Named("x + 3", lambda x: x + 3)
_square = Named("x²", lambda x: x * x)


def _chains() -> list[tuple[list[Layer], Tensor]]:
    return [
        ([_plus, _double], torch.tensor([1.0, 2.0])),
        ([_double, _plus, _square], torch.tensor([[1.0, -1.0], [0.5, 2.0]])),
        ([_square, _double, _double, _plus], torch.tensor([3.0])),
        ([], torch.tensor([1.0, 2.0])),
    ]


def _reversed(layers: Sequence[Layer], x: Tensor) -> Tensor:
    return compose(list(reversed(layers)), x)


def _last_only(layers: Sequence[Layer], x: Tensor) -> Tensor:
    return layers[-1](x) if layers else x


def _sum_of_each(layers: Sequence[Layer], x: Tensor) -> Tensor:
    return torch.stack([layer(x) for layer in layers]).sum(0) if layers else x


def _without_first(layers: Sequence[Layer], x: Tensor) -> Tensor:
    return compose(layers[1:], x)


def _without_last(layers: Sequence[Layer], x: Tensor) -> Tensor:
    return compose(layers[:-1], x)


def _residual(layers: Sequence[Layer], x: Tensor) -> Tensor:
    for layer in layers:
        x = x + layer(x)
    return x


# ------------------------------------------------------------------------------------------- 04.reward


def _accuracies(predictions: Sequence[Tensor], labels: Sequence[Tensor]) -> np.ndarray:
    return np.array(
        [float((p == y).double().mean()) for p, y in zip(predictions, labels, strict=True)]
    )


def reward(predictions: Sequence[Tensor], labels: Sequence[Tensor]) -> float:
    """Eq. 7 with accuracy as the metric: the mean over N tasks of each task's share of right answers."""
    return rewards.reward(_accuracies(predictions, labels))


def _answers() -> list[tuple[list[Tensor], list[Tensor]]]:
    t = torch.tensor
    return [
        ([t([0, 1, 2, 3]), t([1, 1])], [t([0, 1, 2, 0]), t([0, 1])]),
        ([t([2, 2, 1]), t([0]), t([1, 0, 1, 0, 1])], [t([2, 0, 0]), t([0]), t([1, 0, 1, 1, 1])]),
        ([t([0, 0, 0, 0]), t([1, 0])], [t([0, 1, 1, 1]), t([1, 0])]),
    ]


def _pooled(predictions: Sequence[Tensor], labels: Sequence[Tensor]) -> float:
    return float((torch.cat(list(predictions)) == torch.cat(list(labels))).double().mean())


def _sum(predictions: Sequence[Tensor], labels: Sequence[Tensor]) -> float:
    return float(_accuracies(predictions, labels).sum())


def _percent(predictions: Sequence[Tensor], labels: Sequence[Tensor]) -> float:
    return 100 * reward(predictions, labels)


def _errors(predictions: Sequence[Tensor], labels: Sequence[Tensor]) -> float:
    return 1 - reward(predictions, labels)


def _crossed(predictions: Sequence[Tensor], labels: Sequence[Tensor]) -> float:
    """Tasks in the wrong order; counted as far as both go."""
    pairs = zip(predictions, reversed(labels), strict=True)
    shares = []
    for p, y in pairs:
        n = min(len(p), len(y))
        shares.append(float((p[:n] == y[:n]).double().mean()))
    return float(np.mean(shares))


def _worst(predictions: Sequence[Tensor], labels: Sequence[Tensor]) -> float:
    return float(_accuracies(predictions, labels).min())


def _counts(predictions: Sequence[Tensor], labels: Sequence[Tensor]) -> float:
    return float(np.mean([float((p == y).sum()) for p, y in zip(predictions, labels, strict=True)]))


# ---------------------------------------------------------------------------------------- 04.best_path


class Table:
    """A reward for each choice of sources; what is not listed earns 0.1."""

    def __init__(self, rewards: dict[tuple[int, ...], float]) -> None:
        self.rewards = rewards

    def __call__(self, choice: tuple[int, ...]) -> float:
        return self.rewards.get(tuple(choice), 0.1)

    def __repr__(self) -> str:
        listed = ", ".join(f"{''.join(map(str, c))}: {r}" for c, r in self.rewards.items())
        return f"<{listed}; else 0.1>"


def best_path(n_sources: int, n_layers: int, score: Score) -> tuple[int, ...]:
    """The choice of one source for each layer with the highest score; of equal ones the first."""
    return max(itertools.product(range(n_sources), repeat=n_layers), key=score)


def _tables() -> list[tuple[int, int, Table]]:
    return [
        # 10 is best, 01 as good but earlier; greedy goes to 11 by way of 10
        (2, 2, Table({(0, 0): 0.3, (0, 1): 0.9, (1, 0): 0.9, (1, 1): 0.0})),
        (
            3,
            3,
            Table(
                {(2, 0, 2): 0.8, (1, 1, 1): 0.7, (0, 1, 2): 0.75, (0, 0, 1): 0.3, (1, 2, 0): 0.0}
            ),
        ),
        (3, 2, Table({(2, 0): 0.6, (2, 2): 0.5, (1, 0): 0.55, (0, 2): 0.05, (2, 1): 0.6})),
    ]


def _best_of(choices: Sequence[tuple[int, ...]], score: Score) -> tuple[int, ...]:
    return max(choices, key=score)


def _all(n_sources: int, n_layers: int) -> list[tuple[int, ...]]:
    return list(itertools.product(range(n_sources), repeat=n_layers))


def _min(n_sources: int, n_layers: int, score: Score) -> tuple[int, ...]:
    return min(_all(n_sources, n_layers), key=score)


def _last_tie(n_sources: int, n_layers: int, score: Score) -> tuple[int, ...]:
    return _best_of(_all(n_sources, n_layers)[::-1], score)


def _uniform_only(n_sources: int, n_layers: int, score: Score) -> tuple[int, ...]:
    return _best_of([(a,) * n_layers for a in range(n_sources)], score)


def _no_repeats(n_sources: int, n_layers: int, score: Score) -> tuple[int, ...]:
    return _best_of(list(itertools.permutations(range(n_sources), n_layers)), score)


def _sorted_only(n_sources: int, n_layers: int, score: Score) -> tuple[int, ...]:
    choices = itertools.combinations_with_replacement(range(n_sources), n_layers)
    return _best_of(list(choices), score)


def _last_source_left_out(n_sources: int, n_layers: int, score: Score) -> tuple[int, ...]:
    return _best_of(_all(n_sources - 1, n_layers), score)


def _greedy(n_sources: int, n_layers: int, score: Score) -> tuple[int, ...]:
    choice = (0,) * n_layers
    for k in range(n_layers):
        choice = _best_of([(*choice[:k], a, *choice[k + 1 :]) for a in range(n_sources)], score)
    return choice


def _swapped(n_sources: int, n_layers: int, score: Score) -> tuple[int, ...]:
    return best_path(n_layers, n_sources, score)


def _the_score(n_sources: int, n_layers: int, score: Score) -> float:
    return score(best_path(n_sources, n_layers, score))


EXERCISES: dict[str, Task] = {
    "04.compose": Exercise(
        reference=compose,
        cases=_chains,
        mistakes=[
            Mistake(
                "The order is reversed. The path's first layer meets the data first, whatever the ring in "
                "Eq. 6 means elsewhere in mathematics.",
                _reversed,
            ),
            Mistake(
                "Only the last layer counts: you pass x to every layer. Each takes what the one before it "
                "returned.",
                _last_only,
            ),
            Mistake(
                "You run the layers side by side and add their outputs. They follow each other.",
                _sum_of_each,
            ),
            Mistake(
                "You add each layer's input to its output. A ViT's layers already do that inside: pass on "
                "the output alone.",
                _residual,
            ),
            Mistake("You leave out the first layer of the path.", _without_first),
            Mistake("You leave out the last layer of the path.", _without_last),
        ],
        right="The layers run in the path's order, each on the output of the one before.",
    ),
    "04.reward": Exercise(
        reference=reward,
        cases=_answers,
        mistakes=[
            Mistake(
                "You pool all examples, so a task with more examples weighs more. Eq. 7 takes each task's "
                "accuracy first, then the mean over tasks.",
                _pooled,
            ),
            Mistake("This is the sum over tasks. Eq. 7 has a 1/N before it.", _sum),
            Mistake("This is in percent. Rewards are between 0 and 1 in this kit.", _percent),
            Mistake("This is the share of wrong answers. A reward is maximised.", _errors),
            Mistake(
                "The tasks are in different orders. Task i's predictions belong to task i's labels.",
                _crossed,
            ),
            Mistake("This is the worst task's accuracy. Eq. 7 takes the mean of all.", _worst),
            Mistake(
                "These are counts of correct answers. Divide by each task's number of examples.",
                _counts,
            ),
        ],
        right="Every task counts the same, however many examples it has.",
    ),
    "04.best_path": Exercise(
        reference=best_path,
        cases=_tables,
        mistakes=[
            Mistake("This is the worst choice. A reward is maximised.", _min),
            Mistake(
                "Of equally good choices this is the last. Replace the best so far only by a better one, not "
                "by an equal one.",
                _last_tie,
            ),
            Mistake(
                "You compare only uniform choices, the same source at each layer. Sources may be mixed.",
                _uniform_only,
            ),
            Mistake(
                "No source is taken twice. The same source may serve several layers: product, not "
                "permutations.",
                _no_repeats,
            ),
            Mistake(
                "You try only one rearrangement of each choice. Layers differ, so the order of the sources "
                "matters.",
                _sorted_only,
            ),
            Mistake(
                "The last source is never tried. Sources run from 0 to n_sources - 1.",
                _last_source_left_out,
            ),
            Mistake(
                "This decides layer by layer and keeps what looks best at the time. Brute force scores whole "
                "choices.",
                _greedy,
            ),
            Mistake(
                "Source numbers and layers are swapped: a choice has n_layers entries, each below n_sources.",
                _swapped,
            ),
            Mistake("This is the best score. Return the choice that has it.", _the_score),
        ],
        right="Every choice was scored, so nothing can be better: the yardstick for any search.",
    ),
}
