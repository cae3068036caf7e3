"""The family of timm's ViTs, seen as stem -> layers -> head.

A checkpoint's weights fall into three kinds, by name:

* ``head.*``: the classifier; it stays with its task and is never merged;
* ``blocks.k.*``: block k, the layer that the agent chooses (f_i^l of the paper), or its two sublayers,
  attention and MLP, one by one;
* all the rest, the *stem*: patch and position embeddings, class token, final norm.

What has no docstring here does what ``Family`` says of it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rmm_lab.errors import InputError
from rmm_lab.families import limits, parts, text_head
from rmm_lab.families.convert import is_vision, joined_factors
from rmm_lab.families.dinov2 import gated
from rmm_lab.families.names import hub_name, timm_name
from rmm_lab.families.parts import Factors, Parts, Weights, outside_head
from rmm_lab.families.protocol import Config, Model, Trainable, TrivialRow
from rmm_lab.families.readout import one_readout
from rmm_lab.families.resolution import one_size
from rmm_lab.families.vit_run import (
    SUBLAYERS,
    TOKEN_AND_MEAN,
    ViT,
    check_shapes,
    create,
    described,
    joint_config,
    model_config,
    one_head,
)
from rmm_lab.tasks.image_task import Task
from rmm_lab.tasks.input_format import InputFormat
from rmm_lab.tasks.metrics import class_weights
from rmm_lab.tasks.small_images import distort

M = TypeVar("M", bound=Model)
NAME = "a timm ViT"
DATA = "images"
FILES: tuple[str, ...] = ("preprocessor_config.json", text_head.FILE)  # of transformers' models
NEEDED: tuple[str, ...] = ()
BASE_SETTING = "with the experts' heads"
# The tensors of heads, and how many dimensions they have.
_HEAD = {"head.weight": 2, "head.bias": 1, "head.projection": 2} | {
    "head_dist.weight": 2,
    "head_dist.bias": 1,
}


def owns(config: Config) -> bool:
    """Any model of timm's, and transformers' that are converted; ``canonical`` refuses what is no ViT."""
    return "architecture" in config or is_vision(config)


def canonical(source: str, config: Config, weights: Weights) -> Weights:
    """The weights as they are; InputError unless config and names are a timm ViT's."""
    limits.check_timm(source, config)
    if (
        not any(n.startswith("blocks.0.") for n in weights)
        or "patch_embed.proj.weight" not in weights
    ):
        raise InputError(
            f"model {source!r}: expected a timm VisionTransformer (patch_embed, blocks.0, ...), found "
            f"architecture {config['architecture']!r} with other weights; other families are not "
            "supported"
        )
    check_shapes(source, config, weights)  # timm builds it, and it is a plain ViT
    readout = signature(config)[1]["readout"]
    width, head = weights["patch_embed.proj.weight"].shape[0], weights.get("head.weight")
    for name, tensor in weights.items():
        if name.startswith(("head.", "head_dist.")) and _HEAD.get(name) != tensor.dim():
            expected = ", ".join(f"{n} of {d} dimensions" for n, d in _HEAD.items())
            raise InputError(
                f"model {source!r}: expected no more of a head than {expected}, found {name!r} of shape "
                f"{tuple(tensor.shape)}; save the model with timm again"
            )
    one = "head.projection" in weights or readout == TOKEN_AND_MEAN  # reads what it says it reads
    if head is not None and head.shape[-1] == 2 * width and not one:
        raise InputError(
            f"model {source!r}: expected head.weight to read {width} numbers, found {tuple(head.shape)}; "
            "save it again"
        )
    return weights


def factored(source: str, config: Config, factors: Factors) -> Factors:
    return joined_factors(factors)


def once(source: str, weights: Mapping[str, Tensor]) -> Weights:
    """A ViT's file holds every tensor once. A DINOv2 of transformers' gets the names of the hub's files."""
    own = next((n.partition(".")[0] for n in weights if n.startswith("dinov2")), "")
    if own:  # dinov2 or dinov2_with_registers
        return gated({hub_name(timm_name(name), own): t for name, t in weights.items()})
    return dict(weights)


def split(weights: Mapping[str, Tensor]) -> Parts:
    """A distilled ViT has one head of two tokens."""
    return parts.split(one_head(weights), ("blocks",))


def sublayer(name: str) -> int | None:
    """0 for an attention, 1 for an MLP, with the norm before it."""
    return next((i for i, names in enumerate(SUBLAYERS) if name.partition(".")[0] in names), None)


def fused(name: str) -> int:
    """3 for the projections to queries, keys and values, 1 for all others."""
    return 3 if ".attn.qkv." in f".{name}" else 1


def signature(config: Config) -> tuple[str, dict[str, Any]]:
    """What shapes do not show, of the built model: config.json may say one thing in several ways.

    The architecture's name; of each module its kind and its numbers, such as heads and norms' eps.
    """
    own = {"readout": str((config.get("rmm_lab") or {}).get("readout", ""))}
    return config["architecture"], described(config)[0] | own


def one_form(base: M, experts: Sequence[M]) -> tuple[M, list[M]]:
    """One readout, images of one size."""
    return one_size(*one_readout(base, experts, signature))


def check_head(name: str, source: str, num_classes: int, head: Weights, stem: Weights) -> None:
    if "weight" not in head:
        raise InputError(
            f"expert {name!r}: expected a classification head (head.weight), found none; fine-tune it "
            "with a head on its task"
        )
    width = stem["patch_embed.proj.weight"].shape[0]
    if "projection" in head:  # made of text
        width = len(head["projection"])
    elif head["weight"].shape == (num_classes, 2 * width):  # of two tokens; see ``canonical``
        width *= 2
    for key, shape in (("weight", (num_classes, width)), ("bias", (num_classes,))):
        if key in head and tuple(head[key].shape) != shape:
            raise InputError(
                f"expert {source!r}: expected head.{key} of shape {shape} as its config.json says, "
                f"found {tuple(head[key].shape)}; save it again"
            )


def architecture(config: Config, unit: str = "block") -> ViT:
    return ViT(config, unit)


# ------------------------------------------------------------------------------ tasks and training


def make_tasks(
    base: Model,
    sources: Sequence[str],
    *,
    metric: str = "auto",
    normalise_length: bool = False,
    groups: Sequence[str] = (),
) -> list[Task]:
    """One ``Task`` for each source, its images as the base takes them; the metric is accuracy.

    groups: what keeps pictures together, one for all sources or one for each, see ``tasks.groups.reader``.
    """
    input_format = InputFormat.of(base.config)
    each = groups if len(groups) == len(sources) else [*groups, ""][:1] * len(sources)
    return [Task(s, input_format, g) for s, g in zip(sources, each, strict=True)]


def check_task(expert: Model, task: Task) -> Model | None:
    order = task.check_head(expert.source, expert.num_classes, expert.label_names)
    if order is None:
        return None
    rows = {name: head[order] for name, head in split(expert.weights).head.items()}
    weights = expert.weights | {f"head.{name}": value for name, value in rows.items()}
    config = expert.config | {"label_names": list(task.classes)}
    return dataclasses.replace(expert, config=config, weights=weights)


def check_inputs(base: Model, expert: Model) -> None:
    ours, theirs = InputFormat.of(base.config), InputFormat.of(expert.config)
    if (theirs.mean, theirs.std) != (ours.mean, ours.std):
        raise InputError(
            f"expert {expert.source!r}: expected images normalised by mean {ours.mean} and std {ours.std} "
            f"as for the base, found {theirs.mean} and {theirs.std}; a merged model can take only one"
        )


def completion(experts: Sequence[Model], tasks: Sequence[Any]) -> None:
    """None: nothing is written."""


def task_head(joint: Model, task: Task) -> Weights:
    """The rows of a multi-task model's classifier that are a task's classes."""
    heads = (joint.config.get("rmm_lab") or {}).get("heads", {})
    start, stop = heads.get(task.name, (0, 0))
    if stop - start != len(task.classes):
        raise InputError(
            f"multi-task model {joint.source!r}: expected rmm_lab.heads in config.json to hold a "
            f"slice of {len(task.classes)} classes for {task.name!r}, found {heads or 'none'}; "
            "make it with rmm-lab finetune and all image folders"
        )
    names = joint.label_names or []
    own = [str(name).removeprefix(f"{task.name}/") for name in names[start:stop]]
    order = task.check_head(joint.source, stop - start, own or None)
    head = {key: value[start:stop] for key, value in split(joint.weights).head.items()}
    return head if order is None else {key: value[order] for key, value in head.items()}


def trivial_rows(tasks: Sequence[Any]) -> list[TrivialRow]:
    """None: the small image sets are balanced, and chance is one in as many as there are classes."""
    return []


def trainable(
    base: Model,
    tasks: Sequence[Task],
    *,
    seed: int,
    batch_size: int,
    augment: bool,
    balance: bool = False,
) -> Trainable:
    """A ViT with the base's weights and a new head: one task's classes, or those of all tasks in turn.

    augment: turn images by at most 8 degrees, scale them by a tenth, shift them by at most 7 %. That is
    safe for digits, letters and signs; flips are not.
    """
    stops = list(itertools.accumulate(len(task.classes) for task in tasks))
    torch.manual_seed(seed)  # timm initialises the new head from the global generator
    model = create(base.config, depth=None, num_classes=stops[-1])
    missing, unexpected = model.load_state_dict(outside_head(base.weights), strict=False)
    if unexpected or any(not name.startswith(("head.", "head_dist.")) for name in missing):
        raise InputError(
            f"base {base.source!r}: expected the weights that its config.json describes, found "
            f"{(unexpected + missing)[0]!r} out of place; save the model with timm again"
        )

    weights: list[Tensor | None] = [
        class_weights(task.split("train").labels, len(task.classes)) if balance else None
        for task in tasks
    ]

    def losses(generator: torch.Generator) -> list[Tensor]:
        out, device = [], next(model.parameters()).device
        for task, stop, weight in zip(tasks, stops, weights, strict=True):
            data = task.split("train")
            rows = torch.randint(len(data), (batch_size // len(tasks),), generator=generator)
            images = task.format.normalise(data.images[rows])
            if augment:
                low = images.amin()  # what comes in from outside the frame is background
                images = low + distort(
                    images - low, generator, degrees=8, scale=(0.9, 1.1), shift=0.07
                )
            logits = model(images.to(device))[:, stop - len(task.classes) : stop]
            weight = None if weight is None else weight.to(device)
            out.append(class_loss(logits, data.labels[rows].to(device), weight))
        return out

    def result() -> tuple[dict[str, Any], Weights]:
        if len(tasks) > 1:
            config = joint_config(base.config, None, {task.name: task.classes for task in tasks})
        else:
            config = model_config(base.config, depth=None, num_classes=stops[-1])
            config["label_names"] = list(tasks[0].classes)
        return config, dict(model.state_dict())

    return Trainable(model, losses, result)


def class_loss(logits: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy with a little label smoothing: logits (n, classes), labels (n,) -> scalar.

    weight: of each class, (classes,).
    """
    return nn.functional.cross_entropy(logits, labels, weight, label_smoothing=0.05)
