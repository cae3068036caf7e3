"""Merges that use gradients: yardsticks for what a search without them leaves on the table.

RMM itself never uses gradients of a model: its agent sees a reward, and so do the searches in ``rivals``.
The rows here see more, and every table says so:

    Fisher                      an average weighted by sensitivity        Matena & Raffel 2022
    coefficients by gradient    match each expert's answers, no labels    after Zhang et al. 2025
    AdaMerging                  the same, but for sure answers            Yang et al. 2024
    Frank-Wolfe                 steps towards one expert, by labels       Chen et al. 2025

Inputs and labels are those of the train splits. Nothing is tuned, and the test split is only read for a row's
scores.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rmm_lab.errors import InputError
from rmm_lab.families.parts import Weights
from rmm_lab.search.body import SPLIT, Body, Draws, Model
from rmm_lab.search.fisher import INPUTS, fisher
from rmm_lab.search.problem import Problem
from rmm_lab.search.uniform import Row, weights_row

GROUPS = ("model", "place", "matrix", "tensor")
STEPS, SIZE, RATE = 100, 64, 0.02  # of Adam: steps, inputs per task in each, learning rate
VERTEX_STEPS, VERTEX_SIZE, VERTEX_RATE = 10, 100, 0.1  # of Frank-Wolfe, as published for texts

# ------------------------------------------------------------------------------------- objectives


def distil(logits: Tensor, expert: Tensor) -> Tensor:
    """KL(expert || merged), the mean over n inputs, in nats: both (n, answers) -> scalar.

    -inf stands for a choice that a row lacks, in both.
    """
    there = expert > -torch.inf
    p = expert.softmax(-1)
    log_p, log_q = (x.log_softmax(-1).masked_fill(~there, 0.0) for x in (expert, logits))
    return (p * (log_p - log_q)).sum(-1).mean()


def entropy(logits: Tensor) -> Tensor:
    """Mean entropy of the answers in nats (Yang et al. 2024): (n, answers) -> scalar.

    -inf stands for a choice that a row lacks.
    """
    logs = logits.log_softmax(-1)
    there = logits > -torch.inf
    return -(logs.exp() * logs.masked_fill(~there, 0.0)).sum(-1).mean()


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats: (n, answers), (n,) int64 -> scalar."""
    return torch.nn.functional.cross_entropy(logits, labels)


def _distil(draws: Draws, i: int, step: int, logits: Tensor) -> Tensor:
    return distil(logits, draws.answers(i, step)[:, : logits.shape[1]])


def _entropy(draws: Draws, i: int, step: int, logits: Tensor) -> Tensor:
    return entropy(logits)


def _labels(draws: Draws, i: int, step: int, logits: Tensor) -> Tensor:
    return label_loss(logits, draws.labels(i, step).to(logits.device))


Objective = Callable[[Draws, int, int, Tensor], Tensor]  # draws, task, step, its logits -> scalar
OBJECTIVES: dict[str, Objective] = {"distil": _distil, "entropy": _entropy, "labels": _labels}


def backward(body: Body, draws: Draws, step: int, objective: str) -> float:
    """The objective at a step, its mean over tasks; leaves its gradient in the body.

    One task at a time, so that one task's activations are held. Raises InputError where it is not finite.
    """
    body.forget()
    total = 0.0
    for i, name in enumerate(draws.names):
        logits = body.logits(i, draws.batch(i, step))
        loss = OBJECTIVES[objective](draws, i, step, logits) / len(draws.names)
        if not torch.isfinite(loss):
            raise InputError(
                f"merge by gradient, task {name!r}: expected a finite loss, found {loss.item()} at step "
                f"{step + 1} of {draws.steps}; lower the learning rate"
            )
        loss.backward()
        total += loss.item()
    return total


# ------------------------------------------------------------------------- coefficients by gradient


def group_numbers(model: Sequence[Weights], groups: str) -> list[dict[str, int]]:
    """Which tensors share a coefficient: place -> tensor -> the number of its coefficient.

    groups: ``model``, one for all; ``place``, one for the stem and for each layer; ``matrix``, one for each
    2-D tensor (a fused qkv is one); ``tensor``, one for each. A tensor without a number is averaged.
    """
    if groups not in GROUPS:
        raise InputError(f"groups: expected one of {', '.join(GROUPS)}, found {groups!r}")
    if groups in ("model", "place"):
        return [dict.fromkeys(part, k if groups == "place" else 0) for k, part in enumerate(model)]
    out: list[dict[str, int]] = [{} for _ in model]
    count = 0
    for numbers, part in zip(out, model, strict=True):
        for name, tensor in part.items():
            if groups == "tensor" or tensor.ndim == 2:
                numbers[name] = count
                count += 1
    return out


@dataclass(frozen=True)
class Learned:
    """``coefficients``: (N, G), of each expert and group; ``model``: the merge; ``losses``: of each step."""

    coefficients: Tensor
    model: Model = field(repr=False)
    losses: list[float] = field(repr=False)


def learn(
    body: Body,
    draws: Draws,
    *,
    groups: str = "tensor",
    objective: str = "distil",
    rate: float = RATE,
) -> Learned:
    """theta = theta_0 + sum_i lambda_i^t (theta_i - theta_0), one lambda for each expert i and group t.

    Adam from lambda = 1 / N, a step for each batch of ``draws``. A merge is linear in lambda, so its gradient
    is that of the weights projected on the task vectors: d/d lambda_i^t = sum_{j in t} g_j (theta_ij -
    theta_0j). Whole models are run and differentiated once per task and step, however many lambdas there are.

    groups: see ``group_numbers``. objective: ``distil``, ``entropy`` or ``labels``; only ``labels`` reads
    labels. Source: Expert Merging (arXiv 2509.25712) in its plainest form: answers alone, no hidden states,
    no penalty, lambda not bounded; with ``entropy`` AdaMerging (arXiv 2310.02575), on train inputs instead
    of the test split's.
    """
    if objective not in OBJECTIVES:
        raise InputError(f"objective: expected one of {', '.join(OBJECTIVES)}, found {objective!r}")
    if objective == "distil":
        draws.ask_experts(body)
    n, numbers = len(body.experts), group_numbers(body.base, groups)
    size = 1 + max((g for part in numbers for g in part.values()), default=0)
    coefficients = torch.full((n, size), 1 / n)  # (N, G)
    adam, losses = torch.optim.Adam([coefficients], lr=rate), []
    for step in range(draws.steps):
        body.combine(_scales(body.base, numbers, coefficients))
        losses.append(backward(body, draws, step, objective))
        coefficients.grad = projected(body, numbers, size)
        adam.step()
    body.combine(_scales(body.base, numbers, coefficients))
    body.forget()
    return Learned(coefficients, _copy(body.weights), losses)


def _scales(
    model: Model, numbers: Sequence[dict[str, int]], coefficients: Tensor
) -> list[list[dict[str, float]]]:
    """Each expert's coefficient of each place and tensor; 1 / N for a tensor without one."""
    mean = 1 / len(coefficients)
    return [
        [
            {name: values[of[name]] if name in of else mean for name in part}
            for part, of in zip(model, numbers, strict=True)
        ]
        for values in coefficients.tolist()
    ]


@torch.no_grad()
def projected(body: Body, numbers: Sequence[dict[str, int]], size: int) -> Tensor:
    """The gradients in a body, projected on the task vectors of each group: (N, G)."""
    out = torch.zeros(len(body.experts), size)
    for k, (gradients, base) in enumerate(zip(body.gradients, body.base, strict=True)):
        for name, number in numbers[k].items():
            for i, expert in enumerate(body.experts):
                vector = expert[k][name] - base[name]
                out[i, number] += (gradients[name] * vector).sum().cpu()
    return out


def _copy(model: Model) -> Model:
    return [{name: tensor.clone() for name, tensor in part.items()} for part in model]


# -------------------------------------------------------------------------------------- Frank-Wolfe


def frank_wolfe(
    gradient: Callable[[Model, int], Model],
    vertices: Sequence[Model],
    start: Model,
    *,
    steps: int = VERTEX_STEPS,
    rate: float = VERTEX_RATE,
) -> tuple[Model, list[list[int]]]:
    """Minimise a loss over mixtures of vertices, place by place, one vertex at a time.

    At step t, for each place: s = argmin_i <g, theta_i> (the linear minimisation oracle), then
    theta <- theta + gamma (s - theta), gamma = rate * 2 / (t + 2). A start among the mixtures stays there.

    gradient: of the loss at a model and a step, counted from 0. vertices: N models. Returns the last model
    and the vertices taken, [step][place].
    Source: Frank & Wolfe 1956 (rate 1); FW-Merging, hard (Chen et al. 2025, arXiv 2503.12649; rate 0.1).
    """
    point, taken = _copy(start), []
    for t in range(steps):
        slopes, gamma = gradient(point, t), rate * 2 / (t + 2)
        chosen: list[int] = []
        for k, (part, slope) in enumerate(zip(point, slopes, strict=True)):
            gains = [
                # Measured from theta: the same argmin, and sums of small numbers.
                sum(float((slope[n] * (v[k][n] - part[n])).double().sum()) for n in part)
                for v in vertices
            ]
            best = min(range(len(gains)), key=gains.__getitem__)
            for name, tensor in part.items():
                tensor.add_(vertices[best][k][name] - tensor, alpha=gamma)
            chosen.append(best)
        taken.append(chosen)
    return point, taken


def merge_by_frank_wolfe(body: Body, draws: Draws, *, rate: float = VERTEX_RATE) -> Model:
    """Frank-Wolfe over the experts, from their average, on the cross-entropy of labels; a step per batch.

    The paper starts from task arithmetic, whose scale would be one more number to tune; the average is its
    scale 1 / N, and lies among the mixtures.
    """

    def gradient(point: Model, step: int) -> Model:
        body.set(point)
        backward(body, draws, step, "labels")
        return body.gradients

    n = len(body.experts)
    body.combine([[dict.fromkeys(part, 1 / n) for part in body.base] for _ in range(n)])
    model, _ = frank_wolfe(gradient, body.experts, body.weights, steps=draws.steps, rate=rate)
    body.forget()
    return model


# --------------------------------------------------------------------------------------------- rows


def rows(
    problem: Problem,
    seed: int = 0,
    *,
    steps: int = STEPS,
    vertex_steps: int = VERTEX_STEPS,
    inputs: int = INPUTS,
) -> Iterator[Row]:
    """The rows that use gradients, on the test split, in the order of the tables.

    seed: of the inputs that are drawn, and of the answers drawn for Fisher's row. steps: of Adam;
    vertex_steps: of Frank-Wolfe; inputs: of each task for Fisher's row.
    """
    ones, batches, few = (  # which reads the split, so that no row pays for that
        Draws(problem, steps=n, size=size, seed=seed)
        for n, size in ((inputs, 1), (steps, SIZE), (vertex_steps, VERTEX_SIZE))
    )
    started, body = time.perf_counter(), Body(problem)
    model = fisher(body, ones, seed=seed)
    told = f"{_seen(ones)}, no labels: answers drawn from the expert"
    yield _row(problem, "Fisher", told, model, time.perf_counter() - started)

    started = time.perf_counter()
    batches.ask_experts(body)
    asked = time.perf_counter() - started  # once, and counted in each row that needs it
    wanted = [(f"coefficients by gradient, per {groups}", groups, "distil") for groups in GROUPS]
    for name, groups, objective in [*wanted, ("AdaMerging", "tensor", "entropy")]:
        started = time.perf_counter()
        found = learn(body, batches, groups=groups, objective=objective)
        seconds = time.perf_counter() - started + asked * (objective == "distil")
        aim = "the experts' answers" if objective == "distil" else "entropy"
        told = f"{found.coefficients.numel()} numbers, {aim}; {_seen(batches)}"
        yield _row(problem, name, f"{told}, no labels", found.model, seconds)

    started = time.perf_counter()
    model = merge_by_frank_wolfe(body, few)
    told = f"{_seen(few)} with labels"
    yield _row(problem, "Frank-Wolfe", told, model, time.perf_counter() - started)


def _seen(draws: Draws) -> str:
    """What was drawn, for the table."""
    size = max(rows.shape[1] for rows in draws.rows)
    inputs = f"{SPLIT} inputs per task"
    return f"{draws.steps} {inputs}" if size == 1 else f"{draws.steps} steps of {size} {inputs}"


def _row(problem: Problem, name: str, setting: str, model: Model, seconds: float) -> Row:
    stem, *layers = ({n: t.cpu() for n, t in part.items()} for part in model)
    more: dict[str, Any] = {"sees": "gradients", "seconds": seconds}
    return weights_row(problem, name, setting, stem, layers, **more)
