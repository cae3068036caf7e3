"""Tasks of decoder-only language models: choosing an answer, writing one, or reading texts.

The counterpart of ``text_task``, with the same sources and splits. What a task asks for, its rows say:

* ``input``, ``choices``, ``label``: the choice of the highest log-probability, as for T5s;
* ``input``, ``target``: whether greedy writing gives the target and its end, word for word (exact match);
* ``text``: how well it is predicted, scored by 1 / perplexity.

The choices of a row share its prompt: one sequence holds the prompt, then each choice, and a mask hides
choices from each other. A choice goes on where the prompt ended, so no number depends on padding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rmm_lab.errors import InputError
from rmm_lab.tasks import small_writing
from rmm_lab.tasks.metrics import PERPLEXITY
from rmm_lab.tasks.text_task import Texts, encodings, pad, read_tokenizer

CHOOSE, WRITE, READ, NEXT = range(4)  # what is asked: see ``CausalLM.logits``
FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # each is a tokenizer, or most of one
_SPARE = (
    1024  # rows of an embedding that no token of its tokenizer may use: vocabularies are padded
)


@dataclass(frozen=True)
class LMFormat:
    """What a language model takes: its tokenizer, its longest text (tokens), what a text begins with, and
    the token that ends an answer.
    """

    tokenizer: Any = field(repr=False)
    max_length: int
    begin: tuple[int, ...]
    end: int

    @classmethod
    def read(
        cls,
        source: str,
        folder: Path,
        end: int | Sequence[int] | None,
        longest: int,
        embeddings: int,
    ) -> LMFormat:
        """From a model's folder; InputError where the tokenizer is missing or another model's.

        source: the model's name in messages; end: the end token, or several, as config.json says; longest: in
        tokens; embeddings: how many tokens the model knows.
        """
        tokenizer, settings = read_tokenizer(source, folder, FILES)
        highest = max(tokenizer.get_vocab().values()) + 1
        if highest > embeddings or embeddings - highest > max(_SPARE, embeddings // 8):
            raise InputError(
                f"model {source!r}: expected a tokenizer of at most {embeddings} tokens, as the model has "
                f"embeddings, and hardly fewer, found {highest}; put the model's own tokenizer there"
            )
        token = settings.get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        named = None if token is None else tokenizer.token_to_id(str(token))
        known = [named] if end is None else [end] if isinstance(end, int) else list(end)
        last = named if named in known else known[0]
        if last is None or not 0 <= last < embeddings:
            raise InputError(
                f"model {source!r}: expected a token that ends an answer (eos_token_id in config.json), "
                f"found {last}; name one there, and in tokenizer_config.json"
            )
        begin, plain = (encodings(tokenizer, ["a"], special)[0].ids for special in (True, False))
        at = next((i for i in range(len(begin)) if begin[i:][: len(plain)] == plain), 0)
        return cls(tokenizer, longest, tuple(begin[:at]), last)

    def check_same_tokenizer(self, source: str, folder: Path) -> None:
        """Raise InputError unless an expert's folder holds this tokenizer; a few tokens may be added."""
        mine, theirs = (
            self.tokenizer.get_vocab(),
            read_tokenizer(source, folder, FILES)[0].get_vocab(),
        )
        if odd := sorted(
            token for token in mine.keys() & theirs.keys() if mine[token] != theirs[token]
        ):
            other = odd[0]
        elif len(mine.items() ^ theirs.items()) > _SPARE:
            other = min(mine.items() ^ theirs.items())[0]
        else:
            return
        raise InputError(
            f"expert {source!r}: expected the tokenizer of its base, found another one (they differ in "
            f"{other!r}); merge only models fine-tuned from one base"
        )

    def encode(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], int]]:
        """Tokens of each prompt and its answer, with begin and end, and how many of them are the prompt's.

        A blank stands between the two unless one of them has white space there. What a token covers of the
        answer's text makes it the answer's, so that nothing is cut where both meet.
        """
        texts, borders = [], []
        for prompt, answer in pairs:
            joined = not prompt or prompt[-1].isspace() or answer[:1].isspace()
            texts.append(prompt + ("" if joined else " ") + answer)
            borders.append(len(prompt))
        out = []
        for text, border in zip(encodings(self.tokenizer, texts), borders, strict=True):
            n = next(
                (i for i, (_, stop) in enumerate(text.offsets) if stop > border), len(text.ids)
            )
            out.append(([*self.begin, *text.ids, self.end], len(self.begin) + n))
        return out


class LMBatch(NamedTuple):
    """n rows of S tokens, padded, with C choices of T tokens each.

    ``ids``: (n, S) tokens that are read: a prompt, and each choice but for its last token. ``positions``:
    (n, S) of these in their text. ``groups``: (n, S) 0 for the prompt, 1 to C for choices, -1 for padding.
    ``targets``: (n, C, T) the choices' tokens; ``at``: (n, C, T) where in S each is predicted; ``shares``:
    (n, C, T) how much its log-probability counts: 1, or 1 / length, and 0 for padding. ``kind``: (n,), the
    same for all: CHOOSE, WRITE (C = 1), READ (C = 1), or NEXT (C = T = 1, of a prompt alone).
    """

    ids: Tensor
    positions: Tensor
    groups: Tensor
    targets: Tensor
    at: Tensor
    shares: Tensor
    kind: Tensor


class Answers(NamedTuple):
    """Tokens of a row: what all its choices begin with; and of each choice the rest, and how many tokens of
    this rest are the prompt's."""

    prompt: list[int]
    choices: list[tuple[list[int], int]]


@dataclass(frozen=True)
class LMSplit:
    """n rows. ``labels``: (n,) int64, the right choice's number; 1 where an answer is written or read.

    ``cut``: rows that were longer than the model takes, and lost their beginning.
    """

    rows: list[Answers] = field(repr=False)
    labels: Tensor = field(repr=False)
    cut: int = 0

    def __len__(self) -> int:
        return len(self.labels)


class LMTask(Texts[LMSplit, LMBatch]):
    """A task of a language model; the arguments are those of ``Texts``."""

    ships = {**Texts.ships, **dict.fromkeys(small_writing.TASKS, small_writing)}
    kind = CHOOSE

    def __init__(self, source: str, text_format: Any, **options: Any) -> None:
        super().__init__(source, text_format, **options)
        if self._ships in small_writing.TASKS:
            self.kind = WRITE

    @property
    def offers(self) -> bool:
        """Whether rows offer answers to choose from; else scores are of the right one."""
        return self.kind == CHOOSE

    @property
    def loses(self) -> str:
        """What is cut of a row that is too long; the question is at the end of its prompt."""
        return "end" if self.kind == READ else "beginning"

    def _check_rows(self) -> None:
        """Raise InputError unless all rows ask for the same; sets ``kind``."""
        kinds = {kind_of(row) for rows in self._rows.values() for row in rows}
        if len(kinds) > 1:
            raise InputError(
                f"texts {self.source!r}: expected rows of one kind (input, choices and label; or input and "
                "target; or text), found several; make a set of each"
            )
        (self.kind,) = kinds

    def _tokens(self, rows: Sequence[dict[str, Any]], name: str) -> LMSplit:
        encoded = self._encoded([row["choices"] for row in rows], rows)
        for row, found in zip(rows, encoded.rows, strict=True):
            tokens = [own for own, _ in found.choices]
            if len(set(map(tuple, tokens))) < len(tokens):
                self._refuse_alike(row, tokens, name)
        return encoded

    def _encoded(self, choices: Sequence[Sequence[str]], rows: Sequence[dict[str, Any]]) -> LMSplit:
        """choices: those of each row that are wanted."""
        pairs = [(r["input"], c) for r, own in zip(rows, choices, strict=True) for c in own]
        flat, out, cut = iter(self.format.encode(pairs)), [], 0
        for own in choices:
            whole = [next(flat) for _ in own]
            first = whole[0][0]
            border = min(n for _, n in whole)
            n = 0
            while n < border and all(tokens[n] == first[n] for tokens, _ in whole):
                n += 1  # what all have in common, as a rule the whole prompt
            lost = max(len(tokens) for tokens, _ in whole) - 1 - self.format.max_length
            rest = [(tokens[n:], m - n) for tokens, m in whole]
            out.append(self._shortened(Answers(first[:n], rest), lost))
            cut += lost > 0
        wanted = [r["label"] if self.kind == CHOOSE else 1 for r in rows]
        return LMSplit(out, torch.tensor(wanted), cut)

    def _shortened(self, row: Answers, lost: int) -> Answers:
        """A row that is ``lost`` tokens shorter: its prompt's first ones, or of a text that is read the last.

        What texts begin with stays.
        """
        if lost <= 0:
            return row
        if self.kind == READ:
            return Answers(row.prompt, [(tokens[:-lost], n) for tokens, n in row.choices])
        keep = len(self.format.begin)
        if keep + lost >= len(row.prompt):
            raise InputError(
                f"texts {self.source!r}: expected answers that fit into the {self.format.max_length} tokens "
                "that the model takes, with a part of their prompt, found one too long; shorten it"
            )
        return Answers([*row.prompt[:keep], *row.prompt[keep + lost :]], row.choices)

    def inputs(self, name: str, rows: np.ndarray) -> LMBatch:
        """Some rows of a split without their answers; where choices are offered, with all of them."""
        data = [self.rows(name)[row] for row in rows]
        if self.kind != WRITE:
            return self._pad(self._tokens(data, name))
        encoded = self._tokens([row | {"choices": [""]} for row in data], name)
        bare = [Answers(row.prompt, [([0], 0)]) for row in encoded.rows]
        return make_batch(bare, NEXT, self.normalise_length)

    def batch(self, name: str, rows: np.ndarray | slice) -> LMBatch:
        whole = self._whole(name)
        ids, positions, groups, targets, at, shares, kind = (tensor[rows] for tensor in whole)
        s = int((groups >= 0).sum(-1).max())
        there = shares > 0  # (n, C, T); what counts stands at a choice's end
        c = max(1, int((there.any(-1) * torch.arange(1, there.shape[1] + 1)).max()))
        t = max(1, int((there.any(1) * torch.arange(1, there.shape[2] + 1)).max()))
        parts = (ids[:, :s], positions[:, :s], groups[:, :s])
        return LMBatch(*parts, targets[:, :c, :t], at[:, :c, :t], shares[:, :c, :t], kind)

    def right(self, name: str, rows: np.ndarray) -> LMBatch:
        """Some rows with the right choice alone, as a model learns them."""
        data = [self.rows(name)[row] for row in rows]
        own = [[row["choices"][row["label"]]] for row in data]
        return make_batch(self._encoded(own, data).rows, WRITE, False)

    def _pad(self, data: LMSplit) -> LMBatch:
        return make_batch(data.rows, self.kind, self.normalise_length or self.kind == READ)

    @cached_property
    def metric(self) -> str:
        """As for T5s; the share written right (accuracy); or 1 / perplexity."""
        if self.kind == CHOOSE:
            return str(super().metric)
        if self._asked_metric == "balanced":
            raise InputError(
                f"texts {self.source!r}: expected choices in every row, which the balanced metric needs, "
                "found none; use --metric auto"
            )
        return PERPLEXITY if self.kind == READ else "accuracy"

    def found(self, logits: Tensor) -> Tensor:
        """The best choice's number; 1 for what is written right; of a text that is read 1 / perplexity."""
        if self.kind == READ:
            return logits[:, 1].double().exp().nan_to_num(0)
        return logits.argmax(-1)

    def score(self, found: Tensor, labels: Tensor) -> float:
        """The metric of what was found: (n,), (n,) -> [0, 1]; over texts the geometric mean."""
        if self.kind == READ:
            return float(found.double().log().mean().exp())
        return super().score(found, labels)

    def chance(self, name: str) -> float:
        """Expected score of guessing; 0 for what is written, and 1 / number of tokens for what is read."""
        if self.kind == READ:
            return 1 / int(self.format.tokenizer.get_vocab_size())
        return super().chance(name) if self.kind == CHOOSE else 0.0

    def majority(self, name: str) -> tuple[float, float]:
        """Metric and accuracy of the reward split's most frequent answer, given always."""
        if self.kind == CHOOSE:
            return super().majority(name)
        if self.kind == READ:
            return (self.chance(name),) * 2
        (answer, _), *_ = Counter(r["choices"][0] for r in self.rows("reward")).most_common(1)
        rows = self.rows(name)
        share = sum(r["choices"][0] == answer for r in rows) / len(rows)
        return share, share


def kind_of(row: dict[str, Any]) -> int:
    """What a checked row asks for: several choices, one to be written, or a text without a prompt."""
    if len(row["choices"]) > 1:
        return CHOOSE
    return WRITE if row["input"] else READ


def make_batch(rows: Sequence[Answers], kind: int, by_length: bool) -> LMBatch:
    """Rows padded to the longest. by_length: whether a choice's tokens count 1 / their number each."""
    read: tuple[list[list[int]], ...] = ([], [], [])  # tokens, positions, groups
    c = max(len(row.choices) for row in rows)
    targets: list[list[int]] = []  # of n C choices
    at: list[list[int]] = []
    counts: list[list[int]] = []
    for row in rows:
        n = len(row.prompt)
        own = (list(row.prompt), list(range(n)), [0] * n)
        for i, (tokens, skipped) in enumerate(row.choices, start=1):
            start, m = len(own[0]), len(tokens) - 1  # the last token is not read
            own[0].extend(tokens[:-1])
            own[1].extend(range(n, n + m))
            own[2].extend([i] * m)
            # A token is predicted where the one before it is read; the first of a text nowhere.
            places = [n - 1, *range(start, start + m)]
            first = max(skipped, int(n == 0))
            targets.append(tokens[first:])
            at.append(places[first:])
            counts.append([1] * (len(tokens) - first))
        for part in (targets, at, counts):
            part.extend([[]] * (c - len(row.choices)))
        for part, values in zip(read, own, strict=True):
            part.append(values)
    shape = (len(rows), c, -1)
    shares = pad(counts, 0)[0].view(shape).double() * (kind != NEXT)
    if by_length:
        shares /= shares.sum(-1, keepdim=True).clamp(min=1)
    return LMBatch(
        pad(read[0], 0)[0],
        pad(read[1], 0)[0],
        pad(read[2], -1)[0],
        pad(targets, 0)[0].view(shape),
        pad(at, 0)[0].view(shape),
        shares.float(),
        torch.full((len(rows),), kind),
    )
