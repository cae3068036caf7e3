"""Language tasks: multiple choice, scored by the log-probability that a model gives to each choice.

The counterpart of ``image_task``: the same three splits, the same methods. ``text_formats`` reads data sets
and turns their rows into prompts; ``small_texts`` makes the small tasks that ship.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, NamedTuple, NoReturn, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from rmm_lab.errors import InputError, one_sentence
from rmm_lab.tasks import plain, small_texts, text_rows
from rmm_lab.tasks import text_formats as formats
from rmm_lab.tasks.files import SPLITS, data_folder, or_shipped, shipped_name, spelled
from rmm_lab.tasks.metrics import class_weights, mean_of

# Rows of the small tasks in reward and test; the train split is made when something asks for it.
SIZES = {"reward": 800, "test": 1_200}
METRICS = ("auto", "accuracy", "balanced")
SKEWED = 0.6  # share of one answer in the reward split from which "auto" balances a task
# Rows of an embedding that no token of its tokenizer may use: T5's is padded by 28 to 32,128.
_SPARE = 256


@dataclass(frozen=True)
class TextFormat:
    """What a model takes: its tokenizer, its longest input (tokens), and three tokens by number."""

    tokenizer: Any = field(repr=False)
    max_length: int
    pad: int
    end: int
    start: int

    @classmethod
    def read(
        cls, source: str, folder: Path, config: Mapping[str, Any], embeddings: int
    ) -> TextFormat:
        """From a T5's folder; InputError where the tokenizer is missing or another model's.

        source: the model's name in messages; embeddings: how many tokens it knows.
        """
        tokenizer, settings = read_tokenizer(source, folder)
        pad, end = (config.get(f"{n}_token_id", i) for i, n in enumerate(("pad", "eos")))
        for name, default, number in (("pad", "<pad>", pad), ("eos", "</s>", end)):
            token = settings.get(f"{name}_token", default)
            token = token.get("content") if isinstance(token, dict) else token
            found = tokenizer.token_to_id(str(token or default))
            if found != number:
                raise InputError(
                    f"model {source!r}: expected a tokenizer whose {name} token is number {number} as its "
                    f"config.json says, found {token!r} at number {found}; put the model's own tokenizer "
                    "into its folder"
                )
        size, highest = tokenizer.get_vocab_size(), max(tokenizer.get_vocab().values()) + 1
        if highest > embeddings or embeddings - size > _SPARE:
            raise InputError(
                f"model {source!r}: expected a tokenizer of at most {embeddings} tokens (and at most "
                f"{_SPARE} fewer) as the model has embeddings, found {max(size, highest)}; put the model's "
                "own tokenizer into its folder"
            )
        start = config.get("decoder_start_token_id")
        # Relative positions have no end; this is the length that the model was trained on.
        longest = config.get("n_positions") or 512
        return cls(tokenizer, int(longest), pad, end, pad if start is None else start)

    def check_same_tokenizer(self, source: str, folder: Path) -> None:
        """Raise InputError unless an expert's folder holds this tokenizer."""
        mine = self.tokenizer.get_vocab()
        theirs = read_tokenizer(source, folder)[0].get_vocab()
        if mine != theirs:
            other = min(mine.items() ^ theirs.items())[0]
            raise InputError(
                f"expert {source!r}: expected the tokenizer of its base, found another one (they "
                f"differ in {other!r}); merge only models fine-tuned from one base"
            )

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each text, the end token included."""
        return [[*text.ids, self.end] for text in encodings(self.tokenizer, texts)]


T5_FILES = ("tokenizer.json", "spiece.model")  # either is a T5's whole tokenizer
TOKENIZERS = (*T5_FILES, "tokenizer.model", "vocab.json")  # of any model of texts


def tokens_of(source: str, folder: Path) -> dict[str, int]:
    """The tokens of a folder's tokenizer and their numbers; InputError for a missing or broken one."""
    return dict(read_tokenizer(source, folder, TOKENIZERS)[0].get_vocab())


def read_tokenizer(
    source: str, folder: Path, files: Sequence[str] = T5_FILES
) -> tuple[Any, dict[str, Any]]:
    """A Rust tokenizer without padding and truncation, and tokenizer_config.json.

    files: those of which one at least must be there.
    """
    if not any((folder / name).is_file() for name in files):
        raise InputError(
            f"model {source!r}: expected its tokenizer ({' or '.join(files)}) in {folder}, found "
            "none; save it there with tokenizer.save_pretrained"
        )
    file, remedy = folder / "tokenizer_config.json", "save it again with tokenizer.save_pretrained"
    try:
        settings = plain.read_json(file) if file.is_file() else {}
        if not isinstance(settings, dict):
            raise TypeError(f"{file.name} holds a {type(settings).__name__}")
        if (folder / "tokenizer.json").is_file():
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        else:
            from transformers import AutoTokenizer

            remedy = "pip install sentencepiece protobuf, or put the model's tokenizer.json there"
            found = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
            tokenizer = found.backend_tokenizer
    except Exception as error:  # tokenizers raises bare Exceptions
        raise InputError(
            f"model {source!r}: expected a tokenizer that can be read in {folder}, found a broken one "
            f"({type(error).__name__}: {one_sentence(error)}); {remedy}"
        ) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer, settings


def encodings(tokenizer: Any, texts: Sequence[str], special: bool = False) -> list[Any]:
    """What a Rust tokenizer makes of n texts; special: with the tokens that it puts around a text.

    InputError where it cannot: one that lacks its own unknown word reads, and then fails at a text.
    """
    try:
        return list(tokenizer.encode_batch(list(texts), add_special_tokens=special))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise InputError(
            f"the model's tokenizer: expected one that can encode every text, found one that cannot "
            f"({one_sentence(error)}); put the model's own tokenizer into its folder"
        ) from error


class TextBatch(NamedTuple):
    """n questions with C choices each, padded.

    ``ids``: (n, S) input tokens, ``mask``: (n, S) True for tokens and False for padding; ``choices``:
    (n, C, T) target tokens, ``shifted``: (n, C, T) the same, one to the right behind the start token;
    ``shares``: (n, C, T) how much a token's log-probability counts: 1, or 1 / length, and 0 for padding.
    A choice that a row lacks has only zeros, and is never the best.
    """

    ids: Tensor
    mask: Tensor
    choices: Tensor
    shifted: Tensor
    shares: Tensor


def pad(rows: Sequence[Sequence[int]], number: int) -> tuple[Tensor, Tensor]:
    """n token lists padded with a token: (n, longest) int64, and (n, longest) True for what is no padding."""
    mask = torch.arange(max(map(len, rows))) < torch.tensor([len(row) for row in rows])[:, None]
    ids = torch.full(mask.shape, number)
    ids[mask] = torch.tensor([token for row in rows for token in row])
    return ids, mask


@dataclass(frozen=True)
class TextSplit:
    """Tokens of n rows. ``inputs``: n lists; ``choices``: n lists of C lists; ``labels``: (n,) int64.

    ``cut``: inputs that were longer than the model takes, and lost their end.
    """

    inputs: list[list[int]] = field(repr=False)
    choices: list[list[list[int]]] = field(repr=False)
    labels: Tensor = field(repr=False)
    cut: int = 0

    def __len__(self) -> int:
        return len(self.labels)


class Labelled(Protocol):
    """What a split has in any case: labels (n,) int64."""

    @property
    def labels(self) -> Tensor:
        """The right answers' numbers."""


S = TypeVar("S", bound=Labelled)
B = TypeVar("B")


class Texts(ABC, Generic[S, B]):
    """A task of texts with three splits, S, read and tokenised when first asked for; batches are B.

    Args:
        source: a name that ships (``ships``) or whatever ``formats.load`` reads: a folder or
            file of jsonl, ``FORMAT:FOLDER`` or ``FORMAT:hf-hub``.
        text_format: what the models take, a ``TextFormat``; for language models an ``LMFormat``.
        metric: ``accuracy``; ``balanced``, the mean over answers of the share predicted right, for tasks
            whose rows share their choices; or ``auto``: balanced where one answer is right in 60 % or more
            of the reward split, else accuracy.
        normalise_length: divide a choice's log-probability by its number of tokens (the end token
            counts); the paper takes the sum.
    """

    ships: Mapping[str, Any] = dict.fromkeys(small_texts.TASKS, small_texts)  # name -> its grammar

    def __init__(
        self,
        source: str,
        text_format: Any,
        *,
        metric: str = "auto",
        normalise_length: bool = False,
    ) -> None:
        if metric not in METRICS:
            raise InputError(f"metric: expected one of {', '.join(METRICS)}, found {metric!r}")
        self._ships = shipped_name(source, self.ships)
        self.source = spelled(self._ships) if self._ships else source
        self.format, self.normalise_length = text_format, normalise_length
        self._splits: dict[str, S] = {}
        self._padded: dict[str, B] = {}
        self._asked_metric = metric
        if self._ships:
            self.name = self._ships
            self._rows: dict[str, list[dict[str, Any]]] = {}  # read when first asked for
        else:
            head, _, rest = source.partition(":")
            place = rest if head in formats.FORMATS else source
            hub = place.startswith("hf-hub")
            name = Path(os.path.realpath(Path(place).expanduser())).name
            self.name = head if hub else re.sub(r"\.(jsonl?|tsv|csv|parquet)(\.gz)?$", "", name)
            with or_shipped(source, self.ships):
                self._rows = formats.load(source)
            self._check_rows()

    @property
    @abstractmethod
    def loses(self) -> str:
        """What is cut of an input that is too long: its end or its beginning."""

    @abstractmethod
    def _check_rows(self) -> None:
        """Raise InputError for rows that the models cannot answer."""

    @abstractmethod
    def _tokens(self, rows: Sequence[dict[str, Any]], name: str) -> S:
        """Rows of a split, tokenised."""

    @abstractmethod
    def _pad(self, data: S) -> B:
        """Tokenised rows, padded to their longest."""

    @abstractmethod
    def inputs(self, name: str, rows: np.ndarray) -> B:
        """Some rows of a split, padded to their longest, without tokenising the others; see ``batch``."""

    @abstractmethod
    def batch(self, name: str, rows: np.ndarray | slice) -> B:
        """Some rows of a split, padded to their longest."""

    def _whole(self, name: str) -> B:
        """A split, padded once."""
        if name not in self._padded:
            self._padded[name] = self._pad(self.split(name))
        return self._padded[name]

    def rows(self, name: str) -> list[dict[str, Any]]:
        """A split as ``input``, ``choices``, ``label``."""
        if name not in SPLITS:
            raise InputError(f"split {name!r}: expected one of {', '.join(SPLITS)}")
        if name not in self._rows:
            self._rows[name] = _small(self._ships, name, self.ships)
        return self._rows[name]

    def split(self, name: str) -> S:
        """The split ``train``, ``reward`` or ``test``, tokenised."""
        if name not in self._splits:
            self._splits[name] = self._tokens(self.rows(name), name)
        return self._splits[name]

    def _refuse_alike(
        self, row: dict[str, Any], tokens: Sequence[Sequence[int]], name: str
    ) -> NoReturn:
        """Any model gives choices of the same tokens the same score, and would answer the first of them."""
        alike = [c for c, t in zip(row["choices"], tokens, strict=True) if tokens.count(t) > 1]
        raise InputError(
            f"texts {self.source!r}, row {self.rows(name).index(row) + 1} of the {name} split "
            f"({text_rows.short(row['input'])}): expected choices that differ as tokens, found {alike[0]!r} "
            f"and {alike[1]!r}, which the model's tokenizer cannot tell apart; use other words"
        )

    def size(self, name: str) -> int:
        """Rows of a split; nothing is tokenised."""
        return len(self.rows(name))

    @cached_property
    def metric(self) -> str:
        """``accuracy`` or ``balanced``."""
        if self._asked_metric == "balanced" and self.answers is None:
            raise InputError(
                f"texts {self.source!r}: expected the same choices in every row, which the balanced "
                "metric needs, found different ones; use --metric accuracy"
            )
        if self._asked_metric != "auto":
            return self._asked_metric
        skewed = self.answers is not None and text_rows.majority(self.rows("reward"))[1] >= SKEWED
        return "balanced" if skewed else "accuracy"

    @cached_property
    def answers(self) -> list[str] | None:
        """The choices that all rows share, or None where they differ."""
        rows = self.rows("reward")
        first = rows[0]["choices"]
        return list(first) if all(row["choices"] == first for row in rows) else None

    def score(self, found: Tensor, labels: Tensor) -> float:
        """The metric of the choices found: both (n,) -> [0, 1]."""
        return mean_of(self.metric, (found == labels).double(), labels)

    def majority(self, name: str) -> tuple[float, float]:
        """Metric and plain accuracy of giving the reward split's most frequent answer to all of a split.

        Without common answers: chance, the mean of 1 / number of choices.
        """
        rows = self.rows(name)
        if self.answers is None:
            return (text_rows.chance(rows),) * 2
        always, labels = text_rows.majority(self.rows("reward"))[0], self.split(name).labels
        found = torch.full_like(labels, always)
        return self.score(found, labels), float((found == labels).float().mean())

    def answer_weights(self) -> Tensor:
        """``class_weights`` of the train split: (answers,), for a loss in which each answer counts the same.

        InputError for rows that have choices of their own, or none.
        """
        if self.answers is None:
            raise InputError(
                f"--class-weights: expected the same choices in every row of texts {self.source!r}, found "
                "different ones; leave the option out"
            )
        return class_weights(self.split("train").labels, len(self.answers))

    def chance(self, name: str) -> float:
        """Expected accuracy of guessing: the mean of 1 / number of choices."""
        return text_rows.chance(self.rows(name))


class TextTask(Texts[TextSplit, TextBatch]):
    """A multiple-choice task of T5s; the arguments are those of ``Texts``."""

    @property
    def loses(self) -> str:
        """Of an input that is too long, the end."""
        return "end"

    def _check_rows(self) -> None:
        """Raise InputError for a row that has no choices."""
        if any(len(row["choices"]) < 2 for rows in self._rows.values() for row in rows):
            raise InputError(
                f"texts {self.source!r}: expected 'choices' and a 'label' in every row, as a T5 chooses, "
                "found a row with a 'target' or a 'text' alone; only language models write and read"
            )

    def _tokens(self, rows: Sequence[dict[str, Any]], name: str) -> TextSplit:
        encode, longest = self.format.encode, self.format.max_length
        inputs = encode([row["input"] for row in rows])
        flat = iter(encode([choice for row in rows for choice in row["choices"]]))
        choices = [[next(flat) for _ in row["choices"]] for row in rows]
        for row, tokens in zip(rows, choices, strict=True):
            if len(set(map(tuple, tokens))) < len(tokens):
                self._refuse_alike(row, tokens, name)
        return TextSplit(
            [x if len(x) <= longest else [*x[: longest - 1], self.format.end] for x in inputs],
            choices,
            torch.tensor([row["label"] for row in rows]),
            sum(len(x) > longest for x in inputs),
        )

    def inputs(self, name: str, rows: np.ndarray) -> TextBatch:
        all_rows = self.rows(name)
        return self._pad(self._tokens([all_rows[row] for row in rows], name))

    def batch(self, name: str, rows: np.ndarray | slice) -> TextBatch:
        ids, mask, choices, shifted, shares = (tensor[rows] for tensor in self._whole(name))
        s = int(mask.sum(-1).max())
        there = shares > 0  # (n, C, T)
        c, t = int(there.any(-1).sum(-1).max()), int(there.sum(-1).max())
        return TextBatch(
            ids[:, :s], mask[:, :s], choices[:, :c, :t], shifted[:, :c, :t], shares[:, :c, :t]
        )

    def _pad(self, data: TextSplit) -> TextBatch:
        """A whole split, padded to its longest row."""
        ids, mask = pad(data.inputs, self.format.pad)
        n, c = len(data), max(map(len, data.choices))
        flat = [tokens for row in data.choices for tokens in (*row, *[[]] * (c - len(row)))]
        choices, there = (x.view(n, c, -1) for x in pad(flat, self.format.pad))  # (n, C, T)
        shares = there.double()
        if self.normalise_length:
            shares /= shares.sum(-1, keepdim=True).clamp(min=1)
        start = torch.full((n, c, 1), self.format.start)
        shifted = torch.cat([start, choices[..., :-1]], -1)  # (n, C, T)
        return TextBatch(ids, mask, choices, shifted, shares.float())


# ------------------------------------------------------------------------------ the tasks that ship


def train_size(name: str) -> int:
    """Rows of a small task's train split: what its grammar can say, within reason."""
    return 40_000 if name == "colours" else 8_000


def rows_file(name: str, split: str) -> Path:
    """The jsonl of a split that ships."""
    return data_folder() / "sets" / f"{name}-{split}.jsonl"


def _small(name: str, split: str, ships: Mapping[str, Any]) -> list[dict[str, Any]]:
    file = rows_file(name, split)
    if split == "train" and not file.exists():
        rows = ships[name].rows(name, split, train_size(name))
        return [text_rows.check(row, f"task {name}") for row in rows]
    if not file.exists():
        raise InputError(
            f"expected the set {name!r} in {file}, found no such file; run python -m data.build "
            "--only text-sets"
        )
    return text_rows.read(file)
