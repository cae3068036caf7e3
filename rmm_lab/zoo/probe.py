"""What a model's features are worth: a linear classifier fitted to them, or the nearest mean of a class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rmm_lab.families.checkpoint import Checkpoint
from rmm_lab.families.parts import Weights
from rmm_lab.reward import BATCH

DECAY = 1e-3  # of the squared weights, for features of variance 1; from 1e-4, 1e-3, 1e-2 by a reward split


@torch.no_grad()
def features(
    architecture: Any,
    stem: Any,
    layers: Sequence[Any],
    task: Any,
    split: str,
    device: str = "cpu",
) -> Tensor:
    """What a ViT's classifier reads of a split's pictures: (n, width).

    A model comes in pieces, as for ``reward.predict``; they are on ``device``.
    """
    found = []
    for start in range(0, len(task.split(split)), BATCH):
        batch = task.batch(split, slice(start, start + BATCH))
        state = architecture.embed(stem, architecture.place(batch, device, torch.float32))
        for layer in layers:
            state = architecture.apply(layer, state)
        eye = {"weight": torch.eye(state.shape[-1], device=state.device)}
        found.append(architecture.logits(stem, state, eye).cpu())
    return torch.cat(found)


def fit(x: Tensor, labels: Tensor, classes: int, decay: float = DECAY) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression by L-BFGS: (n, D), (n,) -> weight (classes, D), bias (classes,)."""
    mean, scale = x.mean(0), x.std().clamp(min=1e-12)
    x = (x - mean) / scale
    weight = torch.zeros(classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = nn.functional.cross_entropy(x @ weight.T + bias, labels)
        value = value + decay * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    weight, bias = weight.detach() / scale, bias.detach()
    return weight, bias - weight @ mean


def linear_probe(base: Checkpoint, task: Any, device: str = "cpu") -> Weights:
    """A ViT's head for a task, fitted to the base's features of its train split: head.weight, head.bias."""
    family = base.family
    parts, architecture = family.split(base.weights), family.architecture(base.config)
    stem = architecture.stem(parts.stem).to(device)
    layers = [architecture.layer(k, w).to(device) for k, w in enumerate(parts.layers)]
    x = features(architecture, stem, layers, task, "train", device)
    weight, bias = fit(x, task.split("train").labels, len(task.classes))
    return {"head.weight": weight, "head.bias": bias}


def nearest_mean(train: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    """The class whose mean is nearest by cosine, less the mean of all: (m,).

    train: (n, D) with labels (n,); test: (m, D).
    """
    centre = train.mean(0)
    own = nn.functional.normalize(train - centre, dim=1)
    means = torch.stack([own[labels == c].mean(0) for c in range(int(labels.max()) + 1)])
    return (
        nn.functional.normalize(test - centre, dim=1) @ nn.functional.normalize(means, dim=1).T
    ).argmax(1)
