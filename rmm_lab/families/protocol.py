"""What a model family must offer. A family is a module, such as ``vit`` or ``t5``, that satisfies ``Family``.

To add one, write such a module and name it in ``checkpoint.FAMILIES``: the first there whose ``owns`` accepts
a config.json gets the model. ``vit`` accepts every config of timm's, so another timm family goes before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from rmm_lab.families.parts import Factors, Parts, Shapes, Weights

Config = Mapping[str, Any]  # a config.json


@dataclass(frozen=True)
class Model:
    """A model as data. ``source`` is what the user typed, ``sha256`` that of the weights' file.

    ``pickled``: the file of the weights, where it is a pickle. ``notes``: what a reader must know about how
    the model was read. ``tokens_from``: the folder of its tokenizer, where that is not its own.
    ``factors``: what an adapter adds to matrices; None for any other model.
    """

    source: str
    folder: Path
    config: dict[str, Any]
    weights: Weights = field(repr=False)
    sha256: str
    pickled: Path | None = None
    notes: tuple[str, ...] = ()
    tokens_from: Path | None = None
    factors: Factors | None = field(default=None, repr=False)

    @property
    def tokenizer_folder(self) -> Path:
        """Where the model's tokenizer lies: in its own folder, unless it was given another one."""
        return self.tokens_from or self.folder

    @property
    def num_classes(self) -> int:
        return int(self.config.get("num_classes", 0))

    @property
    def label_names(self) -> list[str] | None:
        names = self.config.get("label_names")
        return list(names) if isinstance(names, (list, tuple)) else None


Completion = Callable[[int, list[Any]], list[Any]]


class Architecture(Protocol):
    """Runs and rebuilds the models of one architecture piece by piece.

    ``embed`` -> ``apply`` for each layer of a path -> ``logits`` equals the library's own forward pass. A
    *batch* is what the family's tasks give, a *state* what goes from one layer to the next.
    """

    config: dict[str, Any]
    shapes: Shapes  # of every tensor outside the head
    optional: Shapes  # of tensors that a model may also have
    n_layers: int

    def stem(self, weights: Weights) -> nn.Module:
        """Everything outside the layers and the head as a module."""

    def layer(self, k: int, weights: Weights) -> nn.Module:
        """Layer k as a module that holds ``weights`` without copying them."""

    def place(self, batch: Any, device: torch.device | str, dtype: torch.dtype) -> Any:
        """A batch on the layers' device and in their precision."""

    def embed(self, stem: Any, batch: Any) -> Any:
        """A batch -> the first layer's state."""

    def apply(self, layer: Any, state: Any) -> Any:
        """One layer: state -> state."""

    def apply_last(self, layer: Any, state: Any) -> Any:
        """The last layer of a path: at least what ``logits`` needs of the state."""

    def logits(self, stem: Any, state: Any, head: Weights) -> Tensor:
        """The last state and one task's head -> a score for each answer, (n, answers)."""

    def widest(self, state: Any) -> int:
        """Numbers per example in the largest tensor of a layer."""

    def tensors(self, state: Any) -> list[Tensor]:
        """All memory that a state holds."""

    def stream(self, state: Any) -> Tensor:
        """The tokens of a state that count, without padding, of the stack that runs: (rows, width)."""

    def writes(self, layer: Any) -> dict[str, tuple[str, str]]:
        """The linear maps of a layer whose outputs are added to its residual stream: name -> the norm that
        takes this stream in before, and a layer scale behind the map, or ``""``. Unknown: none."""

    def row_weights(self, layer: Any, name: str, state: Any, readout: float) -> Tensor | None:
        """How much each row of what linear map ``name`` takes in counts, (rows,): padding 0. None: all alike.

        readout: the share that the token which the head reads has of each example, where there is one.
        """

    def embeddings(self, batch: Any) -> dict[str, Tensor]:
        """How often a batch uses each row of the stem's embeddings: a tensor's name -> (rows,)."""

    def assemble(
        self, stem: Weights, layers: Sequence[tuple[int, Weights]], heads: Mapping[str, Weights]
    ) -> nn.Module:
        """A real model of the library, with copies of the weights.

        layers: (number in the base, weights) in running order; heads: task -> its head.
        """

    def merged_config(
        self, numbers: Sequence[int], heads: Mapping[str, Weights], labels: Mapping[str, Sequence]
    ) -> dict[str, Any]:
        """config.json of an assembled model, from the layers' numbers, heads and labels of each task."""


class Trainable(NamedTuple):
    """A model to be fine-tuned. ``losses``: each task's loss on a random batch, scalars. ``result``:
    config.json and weights once it has learned."""

    model: nn.Module
    losses: Callable[[torch.Generator], Sequence[Tensor]]
    result: Callable[[], tuple[dict[str, Any], Weights]]


class TrivialRow(NamedTuple):
    """A line of a result table that needs no model: each task's metric and accuracy on the test split.

    ``sees``: what it takes to know the answer, ``nothing`` or ``labels`` of the reward split.
    """

    name: str
    setting: str
    scores: tuple[float, ...]
    accuracies: tuple[float, ...]
    sees: Literal["nothing", "labels"] = "nothing"


def trivial_text_rows(tasks: Sequence[Any], guessing: str = "guessing") -> list[TrivialRow]:
    """Of tasks of texts: chance, and the answer that is most frequent in the reward split given always."""
    chances = tuple(task.chance("test") for task in tasks)
    always = [task.majority("test") for task in tasks]
    return [
        TrivialRow("chance", guessing, chances, chances),
        TrivialRow(
            "most frequent answer",
            "of the reward split, always; chance where rows have their own choices",
            tuple(score for score, _ in always),
            tuple(accuracy for _, accuracy in always),
            "labels",
        ),
    ]


class Family(Protocol):
    """A model family: its files, its weights by owner, what runs it, and its tasks."""

    NAME: str  # what messages call a model of it, such as ``a T5``
    DATA: str  # what its tasks are made of, and the option that names them: images or texts
    FILES: tuple[str, ...]  # further files of a model's folder, such as its tokenizer
    NEEDED: tuple[str, ...]  # those of which a download must hold at least one; may be empty
    BASE_SETTING: str  # how the base is scored, for the result table

    def owns(self, config: Config) -> bool:
        """Whether a config.json describes a model of this family; the first one in ``FAMILIES`` gets it."""

    def canonical(self, source: str, config: Config, weights: Weights) -> Weights:
        """The weights of a file, checked against config.json; InputError if they do not fit."""

    def factored(self, source: str, config: Config, factors: Factors) -> Factors:
        """An adapter's factors by the names of its base's file, for the matrices that ``canonical`` gives."""

    def once(self, source: str, weights: Mapping[str, Tensor]) -> Weights:
        """A model's state with every tensor once, as a file holds it."""

    def split(self, weights: Mapping[str, Tensor]) -> Parts:
        """Canonical weights by owner: stem, layers, head."""

    def sublayer(self, name: str) -> int | None:
        """In which of a block's sublayers a tensor of this name is, in running order; None: in none."""

    def fused(self, name: str) -> int:
        """How many matrices a tensor of this name holds one below the other, in rows: 1 for most."""

    def signature(self, config: Config) -> tuple[str, dict[str, Any]]:
        """What two models must share that shapes do not show."""

    def one_form(self, base: Any, experts: Sequence[Any]) -> tuple[Any, list[Any]]:
        """Base and experts before they are compared: differences bridged, such as another size of images.

        A note of a model that is changed says how.
        """

    def check_head(
        self, name: str, source: str, num_classes: int, head: Weights, stem: Weights
    ) -> None:
        """Raise InputError unless an expert has the head that its config.json describes."""

    def architecture(self, config: Config, unit: str = "block") -> Architecture:
        """What runs such models. unit: whether a layer is a ``block`` or a ``sublayer``."""

    def make_tasks(
        self,
        base: Model,
        sources: Sequence[str],
        *,
        metric: str = "auto",
        normalise_length: bool = False,
    ) -> list[Any]:
        """One task for each source, in the input format of the base. metric, normalise_length: of texts.

        A family of images takes ``groups`` too, see ``vit.make_tasks``.
        """

    def check_task(self, expert: Model, task: Any) -> Model | None:
        """Raise InputError unless the expert's head answers this task.

        An expert whose head has the task's classes in another order: with its rows in the task's; else None.
        """

    def check_inputs(self, base: Model, expert: Model) -> None:
        """Raise InputError unless the expert takes its inputs as the base does."""

    def completion(self, experts: Sequence[Model], tasks: Sequence[Any]) -> Completion | None:
        """Where tasks ask a model to write: what takes a task's number and batches of its inputs, as its
        ``inputs`` gives them, to batches with what its expert writes. None where none does."""

    def task_head(self, joint: Model, task: Any) -> Weights:
        """A task's part of a multi-task model's head; InputError if there is none."""

    def trivial_rows(self, tasks: Sequence[Any]) -> list[TrivialRow]:
        """Lines of a result table that need no model, such as chance."""

    def trainable(
        self, base: Model, tasks: Sequence[Any], *, seed: int, batch_size: int, augment: bool
    ) -> Trainable:
        """A copy of the base to be fine-tuned on the train split of one or more tasks.

        batch_size: examples of a step, over all tasks. augment: whether images are distorted at random. A
        family whose tasks have classes takes ``balance`` too: whether they weigh the same in the loss.
        """
