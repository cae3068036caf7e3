"""Exercises of notebook 02: task arithmetic, TIES in two steps, DARE's rescaling."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rmm_lab import operators
from rmm_lab.course.checks import Exercise, Mistake, Quiz

# ------------------------------------------------------------------------------- task arithmetic


def _arithmetic_cases() -> list[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(2)
    base = torch.randn(3, 4, generator=generator)
    experts = base + torch.randn(3, 3, 4, generator=generator)
    small = torch.tensor([1.0, 2.0]), torch.tensor([[2.0, 2.0], [0.0, 5.0]])
    return [(*small, 0.5), (base, experts, 0.4), (base, experts[:2], 1.0), (base, experts, -0.3)]


def _deltas_sum(base: Tensor, experts: Tensor) -> Tensor:
    return (experts - base).sum(0)


ARITHMETIC = Exercise(
    reference=lambda base, experts, scale: operators.task_arithmetic(base, experts, scale=scale),
    cases=_arithmetic_cases,
    mistakes=[
        Mistake(
            "The base is missing: the merged weight is the base plus a step, not the step alone.",
            lambda base, experts, scale: scale * _deltas_sum(base, experts),
        ),
        Mistake(
            "You average the task vectors. Task arithmetic adds them; the scale says how far to go.",
            lambda base, experts, scale: base + scale * (experts - base).mean(0),
        ),
        Mistake(
            "You add the experts' whole weights. Add only what each one learned: its difference from the "
            "base.",
            lambda base, experts, scale: base + scale * experts.sum(0),
        ),
        Mistake(
            "The sign is reversed: a task vector points from the base to the expert.",
            lambda base, experts, scale: base - scale * _deltas_sum(base, experts),
        ),
        Mistake(
            "The scale multiplies the base too. It belongs to the sum of task vectors alone.",
            lambda base, experts, scale: scale * (base + _deltas_sum(base, experts)),
        ),
        Mistake(
            "The scale is not used: this is the answer for a scale of 1.",
            lambda base, experts, scale: base + _deltas_sum(base, experts),
        ),
        Mistake(
            "You use the first two experts only. There may be more of them on axis 0.",
            lambda base, experts, scale: base + scale * _deltas_sum(base, experts[:2]),
        ),
    ],
    right="At scale 0 this is the base, and for one expert at scale 1 that expert.",
)

# ------------------------------------------------------------------------------------------- trim


def _trim_cases() -> list[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(3)
    far = torch.randn(2, 10, generator=generator) * torch.tensor([[1.0], [4.0]])
    equal = torch.tensor([[0.5, -1.0, 1.0, 0.0, 1.0, -0.5], [2.0, 2.0, -2.0, 2.0, 3.0, 2.0]])
    return [
        (torch.tensor([[0.1, -3.0, 2.0, -0.4], [5.0, 6.0, -7.0, 0.2]]), 0.5),
        (far, 0.2),
        (far, 0.8),
        (equal, 0.34),  # two of six, and more than two have the magnitude at the border
        (far, 0.01),  # int(0.1) is 0: one entry stays
    ]


def _kept(deltas: Tensor, density: float, least: int = 1) -> int:
    return max(least, int(density * deltas.shape[1]))


def _topk(deltas: Tensor, density: float) -> Tensor:
    places = deltas.abs().topk(_kept(deltas, density)).indices
    return deltas * torch.zeros_like(deltas).scatter(1, places, 1.0)


def _first(score: Tensor, deltas: Tensor, k: int) -> Tensor:
    """The k entries of each row with the highest score, the lower index first; the others 0."""
    order = score.argsort(dim=1, descending=True, stable=True)[:, :k]
    return deltas * torch.zeros_like(deltas).scatter(1, order, 1.0)


def _from_threshold(deltas: Tensor, density: float) -> Tensor:
    size = deltas.abs()
    return deltas * (size >= size.topk(_kept(deltas, density)).values[:, -1:])


def _above_threshold(deltas: Tensor, density: float) -> Tensor:
    size = deltas.abs()
    return deltas * (size > size.topk(_kept(deltas, density)).values[:, -1:])


def _from_signed_threshold(deltas: Tensor, density: float) -> Tensor:
    return deltas * (deltas >= deltas.topk(_kept(deltas, density)).values[:, -1:])


def _across_experts(deltas: Tensor, density: float) -> Tensor:
    flat = deltas.reshape(1, -1)
    return _first(flat.abs(), flat, _kept(flat, density)).reshape(deltas.shape)


def _last_of_equal(deltas: Tensor, density: float) -> Tensor:
    return _first(deltas.abs().flip(1), deltas.flip(1), _kept(deltas, density)).flip(1)


def _moved_to_the_front(deltas: Tensor, density: float) -> Tensor:
    m = _kept(deltas, density)
    order = deltas.abs().argsort(dim=1, descending=True, stable=True)[:, :m]
    return torch.cat([deltas.gather(1, order), torch.zeros_like(deltas[:, m:])], 1)


def _columns_of_any_row(deltas: Tensor, density: float) -> Tensor:
    order = deltas.abs().argsort(dim=1, descending=True, stable=True)[:, : _kept(deltas, density)]
    out = torch.zeros_like(deltas)
    out[:, order] = deltas[:, order]
    return out


SIGNED = "This keeps the largest values and drops large negative ones. Large means far from 0."
EQUAL = (
    "The number of entries is right. Of equal magnitudes keep those with the lower index (argsort has "
    "stable=True; topk takes any)."
)
TRIM = Exercise(
    reference=operators.trim,
    cases=_trim_cases,
    mistakes=[
        Mistake(SIGNED, lambda deltas, density: _first(deltas, deltas, _kept(deltas, density))),
        Mistake(SIGNED, _from_signed_threshold),
        Mistake(
            "This keeps the smallest entries. Keep the large ones: what the expert changed most.",
            lambda deltas, density: _first(-deltas.abs(), deltas, _kept(deltas, density)),
        ),
        Mistake(
            "This drops the share density. Density is the share that is kept.",
            lambda deltas, density: _first(deltas.abs(), deltas, _kept(deltas, 1 - density)),
        ),
        Mistake(
            "Here all experts compete for the same places: one with a long task vector keeps them all. "
            "Trim each row separately.",
            _across_experts,
        ),
        Mistake(
            "One entry too few: the m-th largest stays too. (> a threshold, or >=?)",
            _above_threshold,
        ),
        Mistake(
            "Where several entries tie at the threshold, this keeps more than m. Exactly m stay; of "
            "equal ones those with the lower index.",
            _from_threshold,
        ),
        Mistake(EQUAL, _last_of_equal),
        Mistake(EQUAL, _topk),
        Mistake(
            "A small density can round m down to 0, and nothing of the expert is left. At least one "
            "entry stays.",
            lambda deltas, density: _first(deltas.abs(), deltas, _kept(deltas, density, 0)),
        ),
        Mistake(
            "This is the mask, 1 where an entry stays. Return the task vectors with the others set to 0.",
            lambda deltas, density: (operators.trim(deltas, density) != 0).float(),
        ),
        Mistake(
            "m is rounded up here. int() rounds down, so that no more than the density's share stays.",
            lambda deltas, density: _first(
                deltas.abs(), deltas, max(1, math.ceil(density * deltas.shape[1]))
            ),
        ),
        Mistake(
            "The largest entries are moved to the front of each row. They must stay in their places: set "
            "the others to 0 instead.",
            _moved_to_the_front,
        ),
        Mistake(
            "out[:, idx] = ... takes the columns that any row chose, for all rows. Each row keeps its own "
            "entries: use scatter, or one row at a time.",
            _columns_of_any_row,
        ),
        Mistake(
            "The signs are lost. Choose by magnitude, but keep the entries themselves.",
            lambda deltas, density: operators.trim(deltas, density).abs(),
        ),
    ],
    right="Exactly m entries of each expert stay, the same number whatever its task vector's length.",
)

# ------------------------------------------------------------------------------- elect and merge


def _ties_cases() -> list[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(4)
    # A conflict, agreement, one value alone, nothing left, and a sum of 0.
    small = torch.tensor([[3.0, 1.0, 0.0, 0.0, 2.0], [-1.0, 3.0, -4.0, 0.0, -2.0]])
    # Two small values against a large one: a vote by heads and one by weight differ.
    three = torch.tensor([[5.0, 1.0, -2.0], [-1.0, 1.5, -2.0], [-2.0, -2.0, 3.0]])
    random = operators.trim(torch.randn(4, 12, generator=generator), 0.6)
    return [(small,), (three,), (random,)]


def _merge(deltas: Tensor, sign: Tensor, count: Any = None) -> Tensor:
    agrees = deltas * sign > 0
    number = agrees.sum(0) if count is None else count
    return (deltas * agrees).sum(0) / torch.as_tensor(number).clamp(min=1)


TIES = Exercise(
    reference=lambda trimmed: operators.disjoint_merge(trimmed, operators.elect_sign(trimmed)),
    cases=_ties_cases,
    mistakes=[
        Mistake(
            "This averages all experts, even those that pull the other way. Merge only entries with the "
            "elected sign.",
            lambda trimmed: trimmed.mean(0),
        ),
        Mistake(
            "You drop the entries that disagree, but divide by all N experts. The mean is over those that "
            "agree.",
            lambda trimmed: _merge(trimmed, trimmed.sum(0).sign(), len(trimmed)),
        ),
        Mistake(
            "You divide the sum by the number of nonzero entries, including those of the other sign. "
            "Count those that agree.",
            lambda trimmed: _merge(trimmed, trimmed.sum(0).sign(), (trimmed != 0).sum(0)),
        ),
        Mistake(
            "This is the sum of the agreeing entries. TIES takes their mean: two experts that agree should "
            "not go twice as far.",
            lambda trimmed: operators.disjoint_merge(trimmed, trimmed.sum(0).sign(), "sum"),
        ),
        Mistake(
            "Each expert has one vote here, whatever its entry's size. The sign with the larger total "
            "magnitude wins.",
            lambda trimmed: _merge(trimmed, trimmed.sign().sum(0).sign()),
        ),
        Mistake(
            "The single largest entry decides the sign here. Two smaller ones together can outweigh it.",
            lambda trimmed: _merge(
                trimmed, trimmed.gather(0, trimmed.abs().argmax(0)[None])[0].sign()
            ),
        ),
        Mistake(
            "The largest entry alone wins here. It may lose the election, and where others agree with it "
            "they share in the mean.",
            lambda trimmed: trimmed.gather(0, trimmed.abs().argmax(0)[None])[0],
        ),
        Mistake(
            "This is the mean of all kept entries, including those that lost the election.",
            lambda trimmed: trimmed.sum(0) / (trimmed != 0).sum(0).clamp(min=1),
        ),
        Mistake(
            "You give the elected sign to the mean of all magnitudes, those of the losers too. Average only "
            "entries that have that sign.",
            lambda trimmed: trimmed.sum(0).sign() * trimmed.abs().mean(0),
        ),
        Mistake(
            "clamp(0) keeps what is positive, whichever sign was elected. Where the negative entries weigh "
            "more, they are merged.",
            lambda trimmed: trimmed.clamp(min=0).mean(0),
        ),
        Mistake(
            "This keeps the entries that lost the election. An entry agrees if it has the sign of the sum.",
            lambda trimmed: _merge(trimmed, -trimmed.sum(0).sign()),
        ),
        Mistake(
            "Where no expert agrees there is nothing to average, and 0 / 0 is NaN. Such a place stays 0.",
            lambda trimmed: (
                trimmed.mul(trimmed * trimmed.sum(0) > 0).sum(0)
                / (trimmed * trimmed.sum(0) > 0).sum(0)
            ),
        ),
    ],
    right="With two experts the rule is simple: the larger entry wins a conflict and keeps its full length.",
)

# ------------------------------------------------------------------------------------------- DARE


def _dare_cases() -> list[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(5)
    deltas = torch.randn(2, 8, generator=generator)
    keep = torch.rand(2, 8, generator=generator) >= 0.6
    small = torch.tensor([[4.0, -2.0, 1.0]]), torch.tensor([[True, False, True]])
    return [(*small, 0.75), (deltas, keep, 0.6), (deltas, ~keep, 0.3), (deltas, keep | True, 0.0)]


DARE = Exercise(
    reference=lambda deltas, keep, drop_rate: deltas * keep / (1 - drop_rate),
    cases=_dare_cases,
    mistakes=[
        Mistake(
            "You drop entries but do not rescale: on average the task vector is too short by the share "
            "dropped.",
            lambda deltas, keep, drop_rate: deltas * keep,
        ),
        Mistake(
            "The mask is the wrong way round: keep is True where the entry stays.",
            lambda deltas, keep, drop_rate: deltas * ~keep / (1 - drop_rate),
        ),
        Mistake(
            "You make the entries smaller. Those that stay must make up for those that went.",
            lambda deltas, keep, drop_rate: deltas * keep * (1 - drop_rate),
        ),
        Mistake(
            "You divide by the share that is dropped. With a drop rate near 0 this grows without bound; "
            "divide by the share that is kept.",
            lambda deltas, keep, drop_rate: deltas * keep / drop_rate if drop_rate else deltas / 0,
        ),
        Mistake(
            "You divide by the drop rate; a small number beside it only hides the division by 0. Divide by "
            "the share that is kept, 1 - p.",
            lambda deltas, keep, drop_rate: deltas * keep / (drop_rate + 1e-9),
        ),
        Mistake(
            "You divide by the share that this mask happened to keep. DARE divides by the expected share, "
            "the same for every mask: only then is the mean over masks exact.",
            lambda deltas, keep, drop_rate: deltas * keep / keep.float().mean(),
        ),
    ],
    right="Each entry is 0 with probability p and delta / (1 - p) otherwise: its mean is delta.",
)

EXERCISES: dict[str, Exercise | Quiz] = {
    "02.task_arithmetic": ARITHMETIC,
    "02.trim": TRIM,
    "02.ties": TIES,
    "02.dare": DARE,
}
