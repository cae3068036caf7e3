"""Exercises of notebook 07: merges that look at inputs, layer by layer, and a verdict in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rmm_lab import matching
from rmm_lab.course.checks import Essay, Exercise, Mistake, Quiz, Task

# ---------------------------------------------------------------------------------- a fit to inputs


def _fit_cases() -> list[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(6)
    inputs = torch.tensor([[[1.0, 0.0], [2.0, 0.0]], [[0.0, 1.0], [0.0, 3.0]]])
    cases: list[tuple[Any, ...]] = [(inputs, torch.tensor([[[2.0, 5.0]], [[7.0, 3.0]]]))]
    for n, d, o in ((2, 3, 2), (3, 2, 3)):
        shared = torch.randn(n, 8, 1, generator=generator)  # so that inputs vary together
        x = shared + torch.randn(n, 8, d, generator=generator)
        cases.append((x, torch.randn(n, o, d, generator=generator)))
    return [tuple(t.double() for t in case) for case in cases]


def _grams(inputs: Tensor) -> Tensor:
    return inputs.mT @ inputs  # (N, D, D)


def _fit(inputs: Tensor, weights: Tensor) -> Tensor:
    return matching.regmean(_grams(inputs), weights, alpha=1.0)


FIT = Exercise(
    reference=_fit,
    cases=_fit_cases,
    mistakes=[
        Mistake(
            "This is the plain average: it counts what an expert says about inputs that it never had.",
            lambda inputs, weights: weights.mean(0),
        ),
        Mistake(
            "This is the sum of the weights. Multiply each expert's weights by its own Gram matrix before "
            "you add them up.",
            lambda inputs, weights: weights.sum(0),
        ),
        Mistake(
            "This is the right side of the equation. Solve for W: the sum of the Gram matrices is still in "
            "front of it.",
            lambda inputs, weights: (weights @ _grams(inputs)).sum(0),
        ),
        Mistake(
            "One side is a mean over experts and the other a sum: the answer is off by a factor of N.",
            lambda inputs, weights: _fit(inputs, weights) / len(weights),
        ),
        Mistake(
            "This uses only the diagonal of the Gram matrices, as if inputs never varied together.",
            lambda inputs, weights: matching.regmean(_grams(inputs), weights, alpha=0.0),
        ),
        Mistake(
            "The axes are turned. The unknown of torch.linalg.solve is W transposed, (D, O): turn it back.",
            lambda inputs, weights: _fit(inputs, weights).T,
        ),
    ],
    right="Each expert has a say where its task has inputs, and the more the larger they are.",
)

# ------------------------------------------------------------------------------- layer by layer

Nets = Sequence[Sequence[Tensor]]  # N experts of L weights (O, D) each


def _solved(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
    """The W (O, D) with the least squares of all x W' - y together."""
    return torch.linalg.lstsq(torch.cat(list(x)), torch.cat(list(y))).solution.T


def _answers(x: Sequence[Tensor], layer: Sequence[Tensor]) -> list[Tensor]:
    return [a @ w.T for a, w in zip(x, layer, strict=True)]


def _squashed(x: Sequence[Tensor]) -> list[Tensor]:
    return [torch.tanh(y) for y in x]


def _to_experts(ours: list[Tensor], theirs: list[Tensor], layer: Sequence[Tensor]) -> Tensor:
    return _solved(ours, _answers(theirs, layer))


def layer_by_layer(
    inputs: Sequence[Tensor],
    experts: Nets,
    fit: Callable[..., Tensor] = _to_experts,
    between: Callable[[Tensor], Tensor] = torch.tanh,
) -> list[Tensor]:
    """The merge of N nets, each layer fitted to what the merged net so far feeds it.

    inputs: N tensors (n, D), one per task; experts: N lists of L weights (O, D); a layer is W x, with tanh
    between layers. Returns L weights. fit: of the merged net's inputs, the experts' own, and their weights.
    """
    ours, theirs, merged = list(inputs), list(inputs), []
    for layer in zip(*experts, strict=True):
        merged.append(fit(ours, theirs, layer))
        ours = [between(x @ merged[-1].T) for x in ours]
        theirs = [between(y) for y in _answers(theirs, layer)]
    return merged


def _net_cases() -> list[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(7)
    cases = []
    for n, sizes in ((2, (3, 3)), (2, (3, 4, 2)), (3, (4, 4, 3, 3))):
        inputs = [torch.randn(9, sizes[0], generator=generator).double() + i for i in range(n)]
        pairs = list(zip(sizes[1:], sizes[:-1], strict=True))
        nets = [
            [torch.randn(o, d, generator=generator).double() for o, d in pairs] for _ in range(n)
        ]
        cases.append((inputs, nets))
    return cases


def _wrong(fit: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    return lambda inputs, experts: layer_by_layer(inputs, experts, fit)


LAYERS = Exercise(
    reference=layer_by_layer,
    cases=_net_cases,
    mistakes=[
        Mistake(
            "This is the plain average of each layer. Solve for the weights that meet the experts' outputs.",
            _wrong(lambda ours, theirs, layer: torch.stack(list(layer)).mean(0)),
        ),
        Mistake(
            "You fit each layer on what the experts' own layers below feed it, as RegMean does. In the "
            "merged net it gets the outputs of the merged layers below: carry those along.",
            _wrong(lambda ours, theirs, layer: _solved(theirs, _answers(theirs, layer))),
        ),
        Mistake(
            "The targets are what each expert's layer makes of the merged net's inputs. Aim at what the "
            "expert itself puts out there, on its own inputs: errors below are then made up for.",
            _wrong(lambda ours, theirs, layer: _solved(ours, _answers(ours, layer))),
        ),
        Mistake(
            "You aim behind the tanh. A layer's weight comes before it: the targets are what goes into it.",
            _wrong(lambda ours, theirs, layer: _solved(ours, _squashed(_answers(theirs, layer)))),
        ),
        Mistake(
            "The tanh between the layers is missing.",
            lambda inputs, experts: layer_by_layer(inputs, experts, between=lambda x: x),
        ),
        Mistake(
            "Your fit sees the first task alone. Put the rows of all tasks below each other.",
            _wrong(lambda ours, theirs, layer: _solved(ours[:1], _answers(theirs, layer)[:1])),
        ),
        Mistake(
            "The weights are turned: lstsq(X, Y) solves X A = Y, and a layer's weight is A transposed.",
            lambda inputs, experts: [w.T for w in layer_by_layer(inputs, experts)],
        ),
    ],
    right="Each layer makes up, as far as it can, for what the merged layers below got wrong.",
    tolerance=1e-4,
)

NEEDS = Quiz(
    right="c",
    explained={
        "a": "No answer enters the equation: only inputs, and what the experts put out for them.",
        "b": "It is solved in closed form. No loss is differentiated; nothing is trained.",
        "c": "Some inputs of each task, unlabelled, and the experts' own layers. That is more than an "
        "average needs, and much less than 700 scores on labelled data.",
        "d": "It scores no merged model at all. A search scores hundreds.",
    },
)

VERDICT = Essay(
    rubric=(
        "says plainly whether she needs a search, and gives the condition",
        "uses measured numbers, with the data set or the spread they belong to",
        "names the price of each: labels, inputs, gradients, evaluations or seconds",
        "names a case in which the answer turns",
        "says what was not tested",
    ),
    model="Not with accuracy as her goal. On digits+textures least squares has 97.1 % from 500 unlabelled "
    "inputs per task in 10 seconds; the agent, which scored 700 models on labelled data, has 97.4, a gain "
    "of 0.3 ± 0.2 points. Choosing among merges that see weights alone, it stays at 79.2. But where least "
    "squares leaves a task behind, as on qa (77.7), the agent on top of it gains 16.5 points. So: fit "
    "first, look at each task, and search only if one is poor, or if her metric is not what the experts "
    "were trained for. All this holds for small models; large ones were not tested.",
    needs={
        r"\d": "An argument about measurements needs at least one number from this notebook.",
        r"label|input|evaluation|second|gradient|cost|price": "Say what each of the two costs.",
        r"not|unless|except|but|only": "Say where your verdict stops: a case in which it would not hold.",
    },
    words=(40, 170),
)

EXERCISES: dict[str, Task] = {
    "07.fit": FIT,
    "07.layer_by_layer": LAYERS,
    "07.needs": NEEDS,
    "07.verdict": VERDICT,
}
