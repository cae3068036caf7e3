"""The exercises of notebook 10: a T5's layers by name, a choice's score, balanced accuracy, a question."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rmm_lab.course.checks import Exercise, Mistake, Quiz
from rmm_lab.families import t5
from rmm_lab.tasks.text_task import TextTask

COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
BIAS = "layer.0.SelfAttention.relative_attention_bias.weight"
PARTS = {
    "encoder": ("layer.0.SelfAttention.q.weight", "layer.1.DenseReluDense.wi.weight"),
    "decoder": ("layer.0.SelfAttention.q.weight", "layer.1.EncDecAttention.k.weight"),
}


def layer_groups(names: Sequence[str]) -> dict[str, int]:
    """Each tensor's layer, -1 for the stem: encoder blocks from 0, decoder blocks on from there.

    names: of a T5 whose embeddings are tied; their copies are left out. By ``t5.once`` and ``t5.split``.
    """
    parts = t5.split(t5.once("names", {name: torch.zeros(()) for name in names}))
    groups = dict.fromkeys(parts.stem, -1)
    for stack, numbers in zip(("encoder", "decoder"), parts.stacks, strict=True):
        for k in numbers:
            groups |= {f"{stack}.block.{k - numbers.start}.{name}": k for name in parts.layers[k]}
    return groups


def score_choice(log_probs: Tensor, mask: Tensor) -> Tensor:
    """The log-probability of each choice: sum over its own tokens.

    log_probs: (n, C, T); mask: (n, C, T), True for tokens, False for padding -> (n, C).
    """
    return (log_probs * mask).sum(-1)


def balanced_accuracy(predicted: Tensor, labels: Tensor) -> float:
    """The mean, over the answers in labels, of the share of correct rows; both (n,) -> [0, 1]."""
    task: Any = SimpleNamespace(metric="balanced")
    return TextTask.score(task, predicted, labels)


def _names(encoder: int, decoder: int) -> list[str]:
    names = ["shared.weight", *COPIES]
    for stack, depth in (("encoder", encoder), ("decoder", decoder)):
        names += [f"{stack}.block.{k}.{part}" for k in range(depth) for part in PARTS[stack]]
        names += [f"{stack}.block.0.{BIAS}", f"{stack}.final_layer_norm.weight"]
    return names


def _group_cases() -> list[tuple[Any, ...]]:
    return [(_names(2, 2),), (_names(3, 2),), (_names(2, 12),)]


def _grouped(rule: Callable[[str, int, int, int], int | None]) -> Callable[..., Any]:
    """A wrong layer_groups: ``rule(name, right, encoder, decoder)`` changes its answer, None drops it."""

    def wrong(names: Sequence[str]) -> dict[str, int]:
        right = layer_groups(names)
        right |= {name: -1 for name in names if name in COPIES}
        depths = [
            1 + max(int(m[1]) for n in names if (m := re.match(rf"{stack}\.block\.(\d+)", n)))
            for stack in ("encoder", "decoder")
        ]
        found = {name: rule(name, right[name], *depths) for name in names}
        return {name: k for name, k in found.items() if k is not None}

    return wrong


def _without_copies(name: str, k: int) -> int | None:
    return None if name in COPIES else k


def _token_cases() -> list[tuple[Any, ...]]:
    cases = []
    for n, c, t, seed in ((2, 3, 4, 0), (1, 2, 3, 1), (3, 8, 5, 2)):
        generator = torch.Generator().manual_seed(seed)
        log_probs = torch.rand((n, c, t), generator=generator).log()
        lengths = torch.randint(1, t, (n, c, 1), generator=generator)
        lengths[0, 0] = t  # the longest fills its row
        cases.append((log_probs, torch.arange(t) < lengths))
    return cases


def _answer_cases() -> list[tuple[Any, ...]]:
    skewed = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 1, 1])
    return [
        (torch.tensor([0, 0, 0, 0, 0, 0, 1, 0, 1, 0]), skewed),
        (torch.tensor([0, 1, 2, 0, 1, 1, 3]), torch.tensor([0, 1, 1, 0, 0, 1, 1])),
        (torch.tensor([2, 0, 2, 2, 1, 0]), torch.tensor([2, 2, 2, 2, 0, 0])),
    ]


def _recalls(found: Tensor, labels: Tensor) -> Tensor:
    right = (found == labels).double()
    return torch.stack([right[labels == k].mean() for k in labels.unique()])


def _precision(found: Tensor, labels: Tensor) -> float:
    right = (found == labels).double()
    return float(torch.stack([right[found == k].mean() for k in found.unique()]).mean())


def _absent_too(found: Tensor, labels: Tensor) -> float:
    n = int(max(found.max(), labels.max())) + 1
    return float(_recalls(found, labels).sum() / n)


EXERCISES: dict[str, Exercise | Quiz] = {
    "10.layer_groups": Exercise(
        reference=layer_groups,
        cases=_group_cases,
        mistakes=(
            Mistake(
                "The relative position bias is stored in block 0 and used by every block of its stack. If "
                "it went with block 0, a path that skips block 0 would lose it for all: it belongs to the "
                "stem.",
                _grouped(
                    lambda name, k, e, d: _without_copies(
                        name, (0 if name[0] == "e" else e) if name.endswith(BIAS) else k
                    )
                ),
            ),
            Mistake(
                "The shared embeddings are counted four times. encoder.embed_tokens, decoder.embed_tokens "
                "and lm_head are other names of shared.weight; keep only that one.",
                _grouped(lambda name, k, e, d: k),
            ),
            Mistake(
                "The final norms come after the blocks and belong to none: with them in the last block, a "
                "path that ends with another block would lose the norm. They belong to the stem.",
                _grouped(
                    lambda name, k, e, d: _without_copies(
                        name,
                        (e - 1 if name[0] == "e" else e + d - 1) if ".final_layer" in name else k,
                    )
                ),
            ),
            Mistake(
                "The decoder's blocks are counted from 0 again, so two blocks share a number. In a path the "
                "decoder continues where the encoder ends.",
                _grouped(
                    lambda name, k, e, d: _without_copies(
                        name, k - e if name.startswith("decoder.block") and k >= e else k
                    )
                ),
            ),
            Mistake(
                "The decoder starts at layer 4 for every model. 4 is E of the models here; in general E is "
                "the number of encoder blocks that occur in names.",
                _grouped(
                    lambda name, k, e, d: _without_copies(
                        name, k - e + 4 if name.startswith("decoder.block") and k >= e else k
                    )
                ),
            ),
            Mistake(
                "Block 10 and block 1 share a number: read all digits of the block's number, not the first.",
                _grouped(
                    lambda name, k, e, d: _without_copies(
                        name,
                        e + int(str(k - e)[0])
                        if name.startswith("decoder.block") and k >= e
                        else k,
                    )
                ),
            ),
            Mistake(
                "The stem is missing. What belongs to no block is a choice too, at place -1.",
                _grouped(lambda name, k, e, d: None if k < 0 else k),
            ),
        ),
        right="Stem at -1, then the encoder's blocks, then the decoder's, each tensor once.",
    ),
    "10.score_choice": Exercise(
        reference=score_choice,
        cases=_token_cases,
        mistakes=(
            Mistake(
                "This is a mean over the tokens: the length no longer counts. The log-probability of a "
                "whole text is a sum (the mean is an option of its own, --normalise-length).",
                lambda log_probs, mask: (log_probs * mask).sum(-1) / mask.sum(-1),
            ),
            Mistake(
                "You count padding too, so short choices pay for tokens that they do not have. Use the "
                "mask.",
                lambda log_probs, mask: log_probs.sum(-1),
            ),
            Mistake(
                "These are means over all T places, padding included. Sum the tokens that the mask keeps.",
                lambda log_probs, mask: log_probs.mean(-1),
            ),
            Mistake(
                "These are probabilities. They order the choices alike, but those of long texts become 0 in "
                "floating point; stay with logarithms.",
                lambda log_probs, mask: (log_probs * mask).sum(-1).exp(),
            ),
            Mistake(
                "You add probabilities of tokens. The probability of a whole text is their product, a sum of "
                "logarithms.",
                lambda log_probs, mask: (log_probs.exp() * mask).sum(-1),
            ),
            Mistake(
                "The sign is reversed: this is a loss, whose best choice is the smallest. A score is the "
                "log-probability itself.",
                lambda log_probs, mask: -(log_probs * mask).sum(-1),
            ),
            Mistake(
                "This is the number of the chosen answer. Return the scores of all choices; the argmax comes "
                "after.",
                lambda log_probs, mask: (log_probs * mask).sum(-1).argmax(-1),
            ),
            Mistake(
                "This is the choice with the lowest log-probability, the worst one. Return the scores.",
                lambda log_probs, mask: (log_probs * mask).sum(-1).argmin(-1),
            ),
        ),
        right="A sum of log-probabilities over the choice's own tokens.",
    ),
    "10.balanced_accuracy": Exercise(
        reference=balanced_accuracy,
        cases=_answer_cases,
        mistakes=(
            Mistake(
                "This is plain accuracy: the frequent answer weighs most. First take the share of correct "
                "rows within each answer.",
                lambda found, labels: float((found == labels).double().mean()),
            ),
            Mistake(
                "You group the rows by prediction, not by label. That asks how far an answer can be trusted "
                "(precision); group by labels.",
                _precision,
            ),
            Mistake(
                "You divide by the number of all possible answers. An answer that labels lacks has no share: "
                "leave it out of the mean.",
                _absent_too,
            ),
            Mistake(
                "You add the shares, but do not average them.",
                lambda found, labels: float(_recalls(found, labels).sum()),
            ),
            Mistake(
                "This is the share of the worst answer alone. All answers that occur count alike.",
                lambda found, labels: float(_recalls(found, labels).min()),
            ),
        ),
        right="Each answer counts alike, however often it occurs.",
    ),
    "10.why": Quiz(
        right="c",
        explained={
            "a": (
                "It can: take colours at the stem and at all eight layers. The curve's last point is that "
                "path."
            ),
            "b": (
                "All paths of the picture were scored on the same rows, and the two ends are far apart. "
                "Noise makes a search slower; it would not leave colours near chance each time."
            ),
            "c": (
                "The best random paths are better at answers, while colours stays near chance in most. Two "
                "or four places of colours raise its own score, but the other tasks, mostly antonyms, lose "
                "as much, so that the reward rises only later."
            ),
            "d": (
                "The test split chose nothing and stops nothing. On the reward split too, the paths found "
                "lie below colours everywhere."
            ),
        },
    ),
}
