"""Fisher-weighted averaging, a merge that sees inputs and gradients: a yardstick, no part of RMM.

Source: Matena & Raffel 2022, "Merging Models with Fisher-Weighted Averaging".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rmm_lab.errors import InputError
from rmm_lab.search.body import Body, Draws, Model, broken

INPUTS = 200  # per task
FLOOR = 1e-6  # of the root mean square; where no expert has a larger entry, they are averaged


def fisher_average(experts: Tensor, fishers: Tensor, floor: float = FLOOR) -> Tensor:
    """theta_j = sum_i F_ij theta_ij / sum_i F_ij, all experts weighing the same.

    experts: (N, ...) one tensor of N experts. fishers: (N, ...) their diagonal Fisher information, in the
    same shape, >= 0; floor is added to each entry. Returns (...). InputError for entries that are negative
    or no numbers.
    """
    if not (fishers >= 0).all() or not fishers.isfinite().all():
        raise InputError(
            "Fisher information: expected finite numbers from 0, found others; leave out the expert that "
            "has them"
        )
    weights = fishers + floor
    shares = weights / weights.sum(0)  # (N, ...)
    return (shares * experts).sum(0)


def diagonal(body: Body, i: int, draws: Draws, *, seed: int = 0, exact: bool = False) -> Model:
    """The diagonal Fisher information of expert i on its task's inputs, tensor by tensor.

    F_j = E_x E_{y ~ p(.|x)} (d log p(y|x) / d theta_j)^2, p being the softmax over a task's answers. No label
    is read. What is squared is the gradient of one input and one answer at a time, never that of a batch's
    mean, so there is a backward pass for each input.

    draws: batches of a single input. exact: the expectation over all answers, with a backward pass for each;
    otherwise one answer is drawn from the expert, by the seed, for each input. The body ends with expert i's
    weights. Raises InputError where the expert's answers are no numbers.
    """
    body.set(body.experts[i])
    generator = torch.Generator().manual_seed(seed)
    total = [{n: torch.zeros_like(t) for n, t in part.items()} for part in body.weights]
    for step in range(draws.steps):
        logs = body.logits(i, draws.batch(i, step)).log_softmax(-1)  # (1, answers)
        if len(logs) != 1:
            raise InputError(
                f"Fisher information: expected one input at a time, found {len(logs)}; draw batches of one"
            )
        shares = logs.detach()[0].exp().cpu()  # (answers,), 0 for a choice that a row lacks
        if not shares.isfinite().all():
            raise broken(draws.names[i])
        if exact:
            answers = shares.nonzero()[:, 0].tolist()
        else:
            answers = torch.multinomial(shares, 1, generator=generator).tolist()
        for number, y in enumerate(answers):
            body.forget()
            logs[0, y].backward(retain_graph=number + 1 < len(answers))
            share = float(shares[y]) if exact else 1.0
            for sums, part in zip(total, body.gradients, strict=True):
                for name, gradient in part.items():
                    sums[name].addcmul_(gradient, gradient, value=share / draws.steps)
    body.forget()
    return total


def normalise(model: Model) -> Model:
    """Fisher information divided by its root mean square over the whole model; all zeros stay so.

    As in the authors' code, which divides by the norm: a sure expert has small gradients, so that an unsure
    one would take all the weight (on the demo's pair 90 times as much).
    """
    tensors = [t.double() for part in model for t in part.values()]
    square = sum(float(t.square().sum()) for t in tensors) / sum(t.numel() for t in tensors)
    return [{n: t / (square**0.5 or 1.0) for n, t in part.items()} for part in model]


def fisher(body: Body, draws: Draws, *, seed: int = 0, exact: bool = False) -> Model:
    """All experts of a body averaged by their normalised Fisher information; heads stay with their tasks.

    draws, seed, exact: see ``diagonal``. Memory: as much again as all experts.
    """
    fishers = [
        normalise(diagonal(body, i, draws, seed=seed, exact=exact))
        for i in range(len(body.experts))
    ]
    return [
        {n: fisher_average(_stack(body.experts, k, n), _stack(fishers, k, n)) for n in part}
        for k, part in enumerate(body.base)
    ]


def _stack(models: Sequence[Model], k: int, name: str) -> Tensor:
    return torch.stack([model[k][name] for model in models])  # (N, ...)
