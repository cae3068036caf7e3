"""Exercises of notebook 05: returns, the advantage, PPO's clipped loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rmm_lab import ppo
from rmm_lab.course.checks import Exercise, Mistake, Quiz

Function = Callable[..., Any]


def _gives_a_tensor(*case: Any) -> Callable[[Function], str | None]:
    """A last look: whether the answer is a tensor, which the notebook's later cells rely on."""
    hint = "The numbers are right. Return a tensor: the cells below use its methods."
    return lambda function: None if isinstance(function(*case), Tensor) else hint


# ------------------------------------------------------------------------------------------ 05.returns


def _rewards() -> list[tuple[Tensor, float]]:
    return [
        (torch.tensor([1.0, 0.0, 4.0]), 0.5),
        (torch.tensor([0.0, 0.0, 0.0, 0.8]), 0.9),
        (torch.tensor([2.0, -1.0]), 0.25),
        (torch.tensor([0.5, 0.25, 1.0]), 1.0),
    ]


def _no_discount(rewards: Tensor, gamma: float) -> Tensor:
    return ppo.discounted_returns(rewards, 1.0)


def _past(rewards: Tensor, gamma: float) -> Tensor:
    """Sums what came before, not what comes after."""
    return ppo.discounted_returns(rewards.flip(0), gamma).flip(0)


def _from_the_start(rewards: Tensor, gamma: float) -> Tensor:
    """Discounts by the step's own number: gamma^k r_k summed from t on."""
    weighted = rewards * gamma ** torch.arange(len(rewards), dtype=rewards.dtype)
    return weighted.flip(0).cumsum(0).flip(0)


def _without_own(rewards: Tensor, gamma: float) -> Tensor:
    return ppo.discounted_returns(rewards, gamma) - rewards


def _one_ahead(rewards: Tensor, gamma: float) -> Tensor:
    """Only the next reward: r_t + gamma r_(t+1)."""
    return rewards + gamma * torch.cat([rewards[1:], torch.zeros(1, dtype=rewards.dtype)])


def _unreversed(rewards: Tensor, gamma: float) -> Tensor:
    return ppo.discounted_returns(rewards, gamma).flip(0)


def _total(rewards: Tensor, gamma: float) -> Tensor:
    return ppo.discounted_returns(rewards, gamma)[:1].expand(len(rewards)).clone()


# ---------------------------------------------------------------------------------------- 05.advantage


def advantage(returns: Tensor, values: Tensor) -> Tensor:
    """Eq. 9 with returns normalised over the batch, as ``rmm_lab.ppo.update`` does it."""
    return ppo.advantage(ppo.normalise(returns), values)


def _batches() -> list[tuple[Tensor, Tensor]]:
    t = torch.tensor
    return [
        (t([1.0, 3.0]), t([0.0, 0.5])),
        (t([0.6, 0.8, 0.7, 0.9]), t([0.1, -0.2, 0.3, 0.4])),
        (t([2.0, 2.0, 5.0]), t([-1.0, 0.0, 1.0])),
    ]


def _sign(returns: Tensor, values: Tensor) -> Tensor:
    return values - ppo.normalise(returns)


def _not_normalised(returns: Tensor, values: Tensor) -> Tensor:
    return returns - values


def _normalised_last(returns: Tensor, values: Tensor) -> Tensor:
    return ppo.normalise(returns - values)


def _divided_last(returns: Tensor, values: Tensor) -> Tensor:
    return (returns - values) / (returns.std(correction=0) + 1e-8)


def _values_too(returns: Tensor, values: Tensor) -> Tensor:
    return ppo.normalise(returns) - ppo.normalise(values)


def _no_value(returns: Tensor, values: Tensor) -> Tensor:
    return ppo.normalise(returns)


def _only_centred(returns: Tensor, values: Tensor) -> Tensor:
    return returns - returns.mean() - values


def _sample_deviation(returns: Tensor, values: Tensor) -> Tensor:
    return (returns - returns.mean()) / (returns.std() + 1e-8) - values


def _precedence(returns: Tensor, values: Tensor) -> Tensor:
    return returns - returns.mean() / (returns.std(correction=0) + 1e-8) - values


def _variance(returns: Tensor, values: Tensor) -> Tensor:
    return (returns - returns.mean()) / (returns.var(correction=0) + 1e-8) - values


# ------------------------------------------------------------------------------------- 05.clipped_loss


def clipped_loss(ratio: Tensor, advantage: Tensor, epsilon: float) -> Tensor:
    """-J of Eq. 8, as a mean: what an optimiser that goes downhill is given."""
    return -ppo.clipped_objective(ratio, advantage, epsilon)


def _carries_gradient(function: Function) -> str | None:
    """A last look: whether the loss has the gradient of ``clipped_loss``, which ``update`` follows."""
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0, 2.0, -3.0])
    gradients = []
    for loss in (clipped_loss, function):
        ratio = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.1, 0.9], requires_grad=True)
        found = loss(ratio, advantage, 0.2)
        if not isinstance(found, Tensor) or not found.requires_grad:
            return (
                "The value is right, but your loss carries no gradient. Make it of ratio by tensor "
                "operations and return the tensor, without .item(), .tolist() or .detach()."
            )
        gradients.append(torch.autograd.grad(found, ratio, allow_unused=True)[0])
    if gradients[1] is None or not torch.allclose(gradients[0], gradients[1], atol=1e-5):
        return "The value is right, its gradient is not. Is part of it detached?"
    return None


def _ratios() -> list[tuple[Tensor, Tensor, float]]:
    t = torch.tensor
    corners = t([1.5, 0.5, 1.5, 0.5, 1.1])
    return [
        (corners, t([1.0, 1.0, -1.0, -1.0, 2.0]), 0.2),
        (t([1.4, 0.9]), t([2.0, -0.5]), 0.1),
        (t([0.3, 1.8, 2.0]), t([-0.4, -1.5, 0.3]), 0.3),
    ]


def _clip(ratio: Tensor, epsilon: float) -> Tensor:
    return ratio.clamp(1 - epsilon, 1 + epsilon)


def _not_negated(ratio: Tensor, advantage: Tensor, epsilon: float) -> Tensor:
    return ppo.clipped_objective(ratio, advantage, epsilon)


def _max(ratio: Tensor, advantage: Tensor, epsilon: float) -> Tensor:
    return -torch.max(ratio * advantage, _clip(ratio, epsilon) * advantage).mean()


def _clip_only(ratio: Tensor, advantage: Tensor, epsilon: float) -> Tensor:
    return -(_clip(ratio, epsilon) * advantage).mean()


def _no_clip(ratio: Tensor, advantage: Tensor, epsilon: float) -> Tensor:
    return -(ratio * advantage).mean()


def _product_clipped(ratio: Tensor, advantage: Tensor, epsilon: float) -> Tensor:
    return -torch.min(ratio * advantage, _clip(ratio * advantage, epsilon)).mean()


def _around_zero(ratio: Tensor, advantage: Tensor, epsilon: float) -> Tensor:
    return -torch.min(ratio * advantage, ratio.clamp(-epsilon, epsilon) * advantage).mean()


def _summed(ratio: Tensor, advantage: Tensor, epsilon: float) -> Tensor:
    return clipped_loss(ratio, advantage, epsilon) * len(ratio)


def _each(ratio: Tensor, advantage: Tensor, epsilon: float) -> Tensor:
    return -torch.min(ratio * advantage, _clip(ratio, epsilon) * advantage)


def _min_of_ratios(ratio: Tensor, advantage: Tensor, epsilon: float) -> Tensor:
    return -(torch.min(ratio, _clip(ratio, epsilon)) * advantage).mean()


EXERCISES: dict[str, Exercise | Quiz] = {
    "05.returns": Exercise(
        reference=ppo.discounted_returns,
        cases=_rewards,
        mistakes=[
            Mistake(
                "Gamma has no effect. Each step further into the future counts gamma times as much.",
                _no_discount,
            ),
            Mistake(
                "This adds up what came before each step. A return looks ahead: an action cannot change "
                "past rewards.",
                _past,
            ),
            Mistake(
                "You discount from the start of the episode. Count from the step itself: its own reward is "
                "not discounted.",
                _from_the_start,
            ),
            Mistake(
                "All returns have one gamma too many. A step's own reward is not discounted: gamma "
                "multiplies only the return of the next step.",
                lambda rewards, gamma: gamma * ppo.discounted_returns(rewards, gamma),
            ),
            Mistake("The step's own reward is missing from its return.", _without_own),
            Mistake(
                "Only the next reward counts here. What comes after it counts too, discounted more.",
                _one_ahead,
            ),
            Mistake(
                "The returns are right, but in reverse order: the last step comes first. Turn them round.",
                _unreversed,
            ),
            Mistake(
                "Every step has the return of the first one. Each step has its own future.", _total
            ),
        ],
        right="Each step's return is its own reward and gamma times the return of the next step.",
        also=_gives_a_tensor(torch.tensor([1.0, 0.0, 4.0]), 0.5),
    ),
    "05.advantage": Exercise(
        reference=advantage,
        cases=_batches,
        mistakes=[
            Mistake(
                "The sign is reversed. An action that earned more than expected has a positive advantage.",
                _sign,
            ),
            Mistake(
                "The returns are not normalised. The critic's values are in units of normalised returns.",
                _not_normalised,
            ),
            Mistake(
                "The difference is normalised. Normalise the returns first, then subtract the values.",
                _normalised_last,
            ),
            Mistake(
                "You divide the difference, and subtract no mean. Normalise the returns alone, mean and "
                "deviation, then subtract the values.",
                _divided_last,
            ),
            Mistake(
                "The values are normalised too. They are already in the right unit.", _values_too
            ),
            Mistake("You do not subtract the critic's values: there is no baseline.", _no_value),
            Mistake(
                "The returns are centred, but not divided by their standard deviation.",
                _only_centred,
            ),
            Mistake(
                "The deviation divides by B - 1. Here it is the population's, which divides by B: "
                "std(correction=0).",
                _sample_deviation,
            ),
            Mistake(
                "This divides by the variance. The standard deviation is its square root.",
                _variance,
            ),
            Mistake(
                "You divide only the mean by the deviation. Subtract the mean first, in parentheses.",
                _precedence,
            ),
        ],
        right="Positive: better than the critic expected. Negative: worse.",
        tolerance=1e-4,
        also=_gives_a_tensor(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.5])),
    ),
    "05.clipped_loss": Exercise(
        reference=clipped_loss,
        cases=_ratios,
        mistakes=[
            Mistake(
                "The sign is reversed: this is J, which is maximised. The optimiser goes downhill, so the "
                "loss is -J.",
                _not_negated,
            ),
            Mistake(
                "This takes the larger of the two terms. Eq. 8 takes the smaller, the more careful one.",
                _max,
            ),
            Mistake(
                "Only the clipped term is used. Without the minimum, a policy that moved the wrong way gets "
                "no gradient to return.",
                _clip_only,
            ),
            Mistake(
                "Nothing is clipped: the policy may move as far as it likes in one update.",
                _no_clip,
            ),
            Mistake(
                "The product of ratio and advantage is clipped. Clip the ratio alone, then multiply.",
                _product_clipped,
            ),
            Mistake(
                "The ratio is clipped around 0. An unchanged policy has the ratio 1, so clip around 1.",
                _around_zero,
            ),
            Mistake("This is the sum over the batch. Take the mean.", _summed),
            Mistake("This is one number for each step. Return their mean, a scalar.", _each),
            Mistake(
                "You take the smaller ratio before multiplying. With a negative advantage the order "
                "reverses: multiply both, then compare.",
                _min_of_ratios,
            ),
        ],
        right="The gradient stops only where a step has already gone far enough in its own favour.",
        also=_carries_gradient,
    ),
    "05.clip_corner": Quiz(
        right="c",
        explained={
            "a": "No. The clip does not stop it: the minimum takes the unclipped term, -1.5, since it is "
            "below the clipped one, -1.2. This term still depends on the ratio.",
            "b": "No. A negative advantage means that the action was worse than expected. Making it more "
            "probable would lower the objective.",
            "c": "Yes. The action was bad and has become more probable, by an earlier step on other data. "
            "The minimum is the unclipped term, -1.5, and its gradient leads back.",
        },
    ),
}
