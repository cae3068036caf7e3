"""Exercises of notebook 01: task vectors, the weight average, and the line between two experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from rmm_lab import operators
from rmm_lab.course.checks import Exercise, Mistake, Quiz


def _models() -> list[tuple[Any, ...]]:
    """(base, experts) of N = 3, 2 and 2 experts; the last ones are layers of two axes."""
    g = torch.Generator().manual_seed(1)
    random = [(torch.randn(5, generator=g), torch.randn(2, 5, generator=g))]
    random += [(torch.randn(2, 4, generator=g), torch.randn(2, 2, 4, generator=g))]
    base = torch.tensor([1.0, 0.0, -2.0])
    experts = torch.tensor([[1.5, 0.0, -2.0], [1.0, 3.0, -1.0], [0.0, 1.0, -4.0]])
    return [(base, experts), *random]


def _experts() -> list[tuple[Any, ...]]:
    return [(experts,) for _, experts in _models()]


def _lines() -> list[tuple[Any, ...]]:
    g = torch.Generator().manual_seed(2)
    a, b = torch.randn(2, 6, generator=g)
    simple = (torch.tensor([0.0, 2.0, 4.0]), torch.tensor([4.0, 2.0, 0.0]))
    return [(*simple, 0.25), (a, b, 0.0), (a, b, 1.0), (a, b, 0.7)]


def _interpolate(a: Tensor, b: Tensor, t: float) -> Tensor:
    """(1 - t) a + t b, both (D,) -> (D,)."""
    return torch.lerp(a, b, t)


def _average(experts: Tensor) -> Tensor:
    """The weight average of experts (N, *shape) -> (*shape); it needs no base."""
    return operators.weight_average(experts[0], experts)


LENGTH = (
    "You changed the length. A task vector is the whole difference; its length was learned too."
)
EXERCISES: dict[str, Exercise | Quiz] = {
    "01.task_vector": Exercise(
        reference=operators.task_vectors,
        cases=_models,
        mistakes=[
            Mistake(
                "The sign is reversed: a task vector points from the base to the expert, so that base "
                "plus task vector gives the expert.",
                lambda base, experts: base - experts,
            ),
            Mistake(
                "You subtract the experts' mean. A task vector is what fine-tuning changed, so it starts at "
                "the base, where fine-tuning started.",
                lambda base, experts: experts - experts.mean(0),
            ),
            Mistake(
                "You add base and experts. A task vector is a difference of weights.",
                lambda base, experts: experts + base,
            ),
            Mistake(
                "You drop the sign. Where fine-tuning made a weight smaller, the entry is negative.",
                lambda base, experts: (experts - base).abs(),
            ),
            Mistake(
                "You sum over the experts. Each of the N experts has its own task vector: keep "
                "axis 0.",
                lambda base, experts: (experts - base).sum(0),
            ),
            Mistake(
                "You average over the experts. Each of the N experts has its own task vector: keep "
                "axis 0.",
                lambda base, experts: (experts - base).mean(0),
            ),
            Mistake(
                "You return the experts unchanged. What did they learn beyond the base?",
                lambda base, experts: experts,
            ),
            Mistake(
                LENGTH,
                lambda base, experts: torch.stack(
                    [(e - base) / (e - base).norm() for e in experts]
                ),
            ),
            Mistake(LENGTH, lambda base, experts: normalize(experts - base, dim=1, eps=0)),
            Mistake(LENGTH, lambda base, experts: normalize(experts - base, dim=-1, eps=0)),
            Mistake(
                "You divide by the base. A task vector is a plain difference of weights, not a relative "
                "one, which would be undefined where the base has a 0.",
                lambda base, experts: (experts - base) / base,
            ),
        ],
        right="One row for each expert, from the base to the expert: base + row gives the expert back.",
    ),
    "01.average": Exercise(
        reference=_average,
        cases=_experts,
        mistakes=[
            Mistake(
                "This is the sum. With N experts the weights become about N times too large.",
                lambda experts: experts.sum(0),
            ),
            Mistake(
                "You average over the last axis, the weights of one expert. The experts are stacked on "
                "axis 0.",
                lambda experts: experts.mean(-1),
            ),
            Mistake(
                "You average over axis 1, the weights of one expert. The experts are stacked on axis 0.",
                lambda experts: experts.mean(1),
            ),
            Mistake(
                "You average over everything, and one number is left. Only axis 0, the experts, goes.",
                lambda experts: experts.mean(),
            ),
            Mistake(
                "This is the median over the experts. The weight average counts every expert alike.",
                lambda experts: experts.median(0).values,
            ),
            Mistake(
                "You divide by 2, whatever the number of experts. N is the length of axis 0.",
                lambda experts: experts.sum(0) / 2,
            ),
            Mistake(
                "You average the first two experts only. There may be more of them on axis 0.",
                lambda experts: experts[:2].mean(0),
            ),
            Mistake(
                "You keep axis 0 with length 1. One merged model has the shape of one expert.",
                lambda experts: experts.mean(0, keepdim=True),
            ),
        ],
        right="Axis 0 is gone: one model, in the middle of the experts.",
    ),
    "01.interpolate": Exercise(
        reference=_interpolate,
        cases=_lines,
        mistakes=[
            Mistake(
                "The ends are swapped: at t = 0 your line is at b. It has to start at a.",
                lambda a, b, t: t * a + (1 - t) * b,
            ),
            Mistake(
                "You start at a, but add t times b rather than t times the way from a to b. At t = 1 "
                "this gives a + b.",
                lambda a, b, t: a + t * b,
            ),
            Mistake(
                "You walk away from b: the way from a to b is b - a, not a - b.",
                lambda a, b, t: a + t * (a - b),
            ),
            Mistake(
                "You return the step, t (b - a), without the place where it starts.",
                lambda a, b, t: t * (b - a),
            ),
            Mistake(
                "You return the middle whatever t is. At t = 0 the result is a, at t = 1 it is b.",
                lambda a, b, t: (a + b) / 2,
            ),
            Mistake(
                "Both shares are t. The shares of a and b add up to 1.",
                lambda a, b, t: t * a + t * b,
            ),
        ],
        right="At t = 0 the first model, at t = 1 the second, in between a weighted average of both.",
    ),
    "01.why_average_hurts": Quiz(
        right="c",
        explained={
            "a": "The task vectors are nearly at right angles: their cosine is about 0.04, far from -1. "
            "Opposite directions would cancel; here almost nothing cancels.",
            "b": "Half of digits' task vector alone still gives 97.5 %, so its length hardly explains the "
            "loss on digits; on textures, where half a vector gives 81 %, it explains about half.",
            "c": "A random vector of the same length hardly hurts, nor does the textures vector with random "
            "signs; the textures vector itself does. It changes what the layers compute for pictures of "
            "digits, and neither its length nor its angle shows that.",
            "d": "The heads stay with their tasks and are not averaged: each task is scored with the head "
            "of its own expert.",
        },
    ),
}
