"""How right a model's answers are: as a metric counts them, and by degrees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PERPLEXITY = "1/perplexity"  # of texts that a language model reads
REWARDS = ("metric", "likelihood", "agreement")  # what scores may be
LOWEST = -6.0  # log-probability of the right answer, below which an answer is plainly wrong


def answers(task: Any, logits: Tensor) -> Tensor:
    """A model's answers by its scores: (n, answers) -> (n,), on the CPU: as a rule the best one's number.

    A task may have a method ``found`` that says otherwise.
    """
    found = getattr(task, "found", None)
    return (logits.argmax(-1) if found is None else found(logits)).cpu()


def mean_of(metric: str, right: Tensor, labels: Tensor) -> float:
    """How right answers are, as a metric counts them: right (n,) in [0, 1], labels (n,) -> [0, 1].

    ``accuracy``: the mean. ``balanced``: the mean over the answers that occur in ``labels``, of which a small
    subset may lack one.
    """
    if metric == "balanced":
        return float(torch.stack([right[labels == k].mean() for k in labels.unique()]).mean())
    return float(right.mean())


def likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """How right answers are by degrees: logits (n, answers), labels (n,) -> (n,) float64 in [0, 1].

    1 + log p / 6 with p the right answer's probability; 0 where p is below e^-6, so that no single example
    rules a mean. On a few examples it tells two models apart that have the same answers right.
    """
    log_p = logits.cpu().double().log_softmax(-1)  # (n, answers)
    right = log_p.gather(-1, labels[:, None]).squeeze(1)
    return (1 + right / -LOWEST).nan_to_num(0).clamp(min=0)


def agreement(logits: Tensor, own: Tensor) -> Tensor:
    """How nearly a merged model answers as a task's expert does: both logits (n, answers) -> (n,) in [0, 1].

    1 - KL(expert || merged) / 6, 0 where that is negative: the likelihood of the answers that the expert
    gives, by how sure it is of them. No label is read. float64. Source: the loss of Hinton et al. 2015,
    "Distilling the Knowledge in a Neural Network", at temperature 1, as a reward.
    """
    log_p, log_q = (x.cpu().double().log_softmax(-1) for x in (logits, own))  # (n, answers)
    terms = torch.where(log_q == -torch.inf, 0.0, log_q.exp() * (log_q - log_p))  # 0 log 0 = 0
    return (1 + terms.sum(-1) / LOWEST).nan_to_num(0).clamp(0, 1)  # (n, answers) -> (n,)


def class_weights(labels: Tensor, n: int) -> Tensor:
    """A weight for each of n classes, (n,), for a loss in which each class counts the same.

    labels: (examples,) class numbers. examples / (classes that occur x examples of the class); an example
    weighs 1 on average, and a class that does not occur 0.
    """
    counts = torch.bincount(labels, minlength=n)  # (n,)
    weights = len(labels) / ((counts > 0).sum() * counts.clamp(min=1))  # (n,)
    return torch.where(counts > 0, weights, 0.0)
