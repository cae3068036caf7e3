"""A run folder: what outlives a search.

config.json             the options: what is merged, the agent, the run
episodes.csv            one row per episode: phase, raw scores, raw and DAR reward, path
updates.csv             one row per policy update: the diagnostics
checkpoint.safetensors  agent, optimiser, generator, counters, and what the policy did, (U, P, A)
policy.safetensors, policies.safetensors, path.json, finalists.json, notes.json, table.json, table.md, *.png,
merged/                 the result
converted/              models that came as pickles, as safetensors
.lock                   while a process holds the folder: see ``tasks.hold``

Every file is written whole, to a temporary name, and renamed. The checkpoint comes last, with the SHA-256 of
what the search is made of, of config.json, of both tables and of its own tensors: a run goes on only where
all are the same. A search that was stopped between two files may leave more rows than the checkpoint knows
of, those of one update at most, numbered on; they are dropped, and found again.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import math
import os
import shlex
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rmm_lab.errors import FULL, InputError, one_sentence
from rmm_lab.search.made_of import of_tensors
from rmm_lab.tasks import plain
from rmm_lab.tasks.files import write_file
from rmm_lab.tasks.hold import check_new, held, held_new

Row = dict[str, Any]
Stored = tuple[
    dict[str, Tensor], dict[str, Any], list[Row], list[Row]
]  # and counters, episodes, updates
_AGAIN = "start the search again in another folder"
CONFIG, EPISODES, UPDATES = "config.json", "episodes.csv", "updates.csv"
CHECKPOINT = "checkpoint.safetensors"
RESULTS = (  # files that are written in the end
    *("policy.safetensors", "policies.safetensors", "path.json", "finalists.json", "notes.json"),
    *("table.json", "table.md", "rewards.png", "path.png", "cross-task.png", "mergekit.yaml"),
    *("front.json", "front.md", "front.png"),
)
TEXTS = ("phase", "actions", "path")  # columns of text; all others hold numbers


def to_csv(rows: Sequence[Row]) -> str:
    """Rows with equal keys as CSV; floats in full precision."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def from_csv(text: str, texts: Collection[str] = TEXTS) -> list[Row]:
    """The inverse of ``to_csv``. Columns in ``texts`` stay text, so that ``007`` does not become 7.

    Raises ValueError for any other column that holds no number, TypeError for a row of another length.
    """
    rows = list(csv.DictReader(io.StringIO(text)))
    if any(None in row or None in row.values() for row in rows):
        raise TypeError("a row has more or fewer columns than the first line")
    return [{k: v if k in texts or v == "" else _number(v) for k, v in row.items()} for row in rows]


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


class RunFolder:
    """Creates, continues and reads a run folder. ``path`` None keeps everything in memory.

    ``made_of``: the SHA-256 of each part of the search, by its name; config.json is one.
    """

    def __init__(self, path: Path | None, made_of: Mapping[str, str] | None = None) -> None:
        self.path = path and path.expanduser()
        self.made_of = dict(made_of or {})
        if self.path and made_of is not None:
            self.made_of[CONFIG] = _sha256((self.path / CONFIG).read_bytes())

    @classmethod
    def create(
        cls,
        path: Path | None,
        config: Mapping[str, Any],
        made_of: Mapping[str, str] | None = None,
    ) -> RunFolder:
        """A new folder with its config; InputError if there are files in it already."""
        if path is not None:
            path = path.expanduser()
            check_new(path)
            path.mkdir(parents=True, exist_ok=True)
            where = {"run_folder": os.path.abspath(path)}  # so that both may move: see ``moved``
            write_file(path / CONFIG, json.dumps(dict(config) | where, indent=2) + "\n")
        return cls(path, made_of)

    def write(self, name: str, content: str | bytes) -> None:
        """Write one file of the folder, whole."""
        if self.path is not None:
            write_file(self.path / name, content)

    def read_config(self) -> dict[str, Any]:
        """The options of an earlier run, as stored."""
        assert self.path is not None
        try:
            return dict(plain.read_json(self.path / CONFIG, halves=True))  # paths may have them
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"--resume: expected a run folder with config.json, found none that can be read in "
                f"{self.path} ({type(error).__name__}); name the folder of an earlier --run-dir"
            ) from error

    def read_rows(self, name: str) -> list[Row]:
        """The rows of ``episodes.csv`` or ``updates.csv``; InputError for a table that is none."""
        assert self.path is not None
        file = self.path / name
        try:
            return from_csv(self._content(name).decode())
        except (TypeError, ValueError, csv.Error) as error:
            raise InputError(
                f"{file}: expected a table of a search, found an altered one ({error}); {_AGAIN}"
            ) from error

    def _content(self, name: str) -> bytes:
        """A table's bytes, none where there is no file; InputError for what is no regular file."""
        assert self.path is not None
        file = self.path / name
        try:
            return plain.read_bytes(file, plain.TEXT_MB)
        except FileNotFoundError:
            return b""
        except (OSError, ValueError) as error:
            raise InputError(
                f"{file}: expected a table of a search, found none that can be read ({error}); {_AGAIN}"
            ) from error

    def save_checkpoint(
        self,
        tensors: Mapping[str, Tensor],
        counters: Mapping[str, Any],
        episodes: Sequence[Row],
        updates: Sequence[Row],
    ) -> None:
        """Store the state after an update: all rows so far, and the tensors to go on with."""
        if self.path is None:
            return
        tables = {}
        for name, rows in ((EPISODES, episodes), (UPDATES, updates)):
            content = to_csv(rows).encode()
            self.write(name, content)
            tables[name] = {"rows": len(rows), "bytes": len(content), "sha256": _sha256(content)}
        known = {"made_of": self.made_of, "tables": tables} | dict(counters)
        tensors = {k: v.detach().clone().contiguous() for k, v in tensors.items()}
        text = json.dumps(known)
        metadata = {"counters": text, "sha256": of_tensors(tensors, text)}
        self.write(CHECKPOINT, save(tensors, metadata))

    def load_checkpoint(self, most: float = math.inf) -> Stored | None:
        """What ``save_checkpoint`` stored last; None before the first time. most: episodes of the search.

        Raises InputError for a checkpoint or a table that is not whole or was altered, and where the search
        is made of something else.
        """
        if self.path is None:
            return None
        for name in RESULTS:
            if (self.path / name).is_dir():
                raise InputError(
                    f"--resume: expected to write the file {self.path / name}, found a folder; move it away"
                )
        file = self.path / CHECKPOINT
        if not file.exists():
            self._check_beyond(0, 0, most)
            return None
        try:
            plain.check_regular(file)
            with safe_open(file, framework="pt") as stored:
                metadata = stored.metadata()
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            if of_tensors(tensors, metadata["counters"]) != metadata["sha256"]:
                raise ValueError("its SHA-256 is another")
            counters = json.loads(metadata["counters"])
            made_of, tables = counters["made_of"], counters["tables"]
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"--resume: expected a whole checkpoint of this version in {file}, found a truncated or "
                f"altered one ({error}); {_AGAIN}"
            ) from error
        self._check_made_of(made_of)
        rows = [self._known(name, **tables[name]) for name in (EPISODES, UPDATES)]
        self._check_beyond(len(rows[0]), len(rows[1]), most)
        return tensors, counters, *rows

    def _check_made_of(self, before: Mapping[str, str]) -> None:
        """Raise InputError where a part of the search is not what it was."""
        for name, found in self.made_of.items():
            if (was := before.get(name, found)) != found:
                place = self.path / name if name == CONFIG and self.path else name
                raise InputError(
                    f"--resume: expected {place} as when {self.path} was searched (SHA-256 {was[:12]}...), "
                    f"found another ({found[:12]}...); put the old one back, or {_AGAIN}"
                )

    def _known(self, name: str, rows: int, bytes: int, sha256: str) -> list[Row]:
        """The rows of a table that the checkpoint knows."""
        assert self.path is not None
        file = self.path / name
        content = self._content(name)
        if _sha256(content[:bytes]) != sha256:
            n = max(0, content.count(b"\n") - 1)
            raise InputError(
                f"--resume: expected the {rows} rows in {file} that the checkpoint knows, found "
                f"{f'only {n}' if n < rows else 'others'}; {_AGAIN}"
            )
        return from_csv(content[:bytes].decode())

    def _check_beyond(self, n_episodes: int, n_updates: int, most: float) -> None:
        """Raise InputError unless the rows behind the first are those of one update: its search was stopped
        after the tables and before the checkpoint."""
        assert self.path is not None
        episodes, updates = (self.read_rows(name) for name in (EPISODES, UPDATES))
        more, later = episodes[n_episodes:], updates[n_updates:]
        numbers = [row.get("episode") for row in more] == [*range(n_episodes, len(episodes))]
        of_one = {row.get("update", n_updates) for row in (*more, *later)} <= {n_updates}
        whole = len(later) <= (1 if more else 0) and len(episodes) <= most
        if not (numbers and of_one and whole) or (self.path / "path.json").exists() > bool(
            n_episodes
        ):
            raise InputError(
                f"--resume: expected in {self.path} {n_episodes} episodes and {n_updates} updates, as the "
                f"checkpoint knows, and one update more at most, found {len(episodes)} and {len(updates)} or "
                f"others; {_AGAIN}"
            )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def new_folder(above: Path) -> Iterator[Path]:
    """A folder of one's own, ``merge-DATE-TIME``, held; runs that start in the same second get two.

    What is left empty is removed again.
    """
    made = not above.exists()
    check_new(above / "merge-")  # raises InputError where that cannot be
    stem = time.strftime("merge-%Y%m%d-%H%M%S")
    for n in itertools.count(1):
        path = above / (stem if n == 1 else f"{stem}-{n}")
        with suppress(FileExistsError):  # of another run
            path.mkdir(parents=True)
            break
    try:
        with held_new(path):
            yield path
    finally:
        for folder in (path, *([above] if made else [])):
            with suppress(OSError):  # it is not empty
                folder.rmdir()


@contextmanager
def opened(run_dir: Path | None, resume: Path | None, above: Path | None) -> Iterator[Path | None]:
    """Hold the folder of a search: the one to go on with, a new one, or one of its own in ``above``.

    With none of them a search stays in memory. Ctrl-C and a full disk say how to go on.
    """
    if resume is not None:
        folder: Any = held(resume, "--resume")
    elif run_dir is not None:
        folder = held_new(run_dir)
    else:
        folder = nullcontext() if above is None else new_folder(above)
    with folder as made:
        path = resume or run_dir or made
        try:
            yield path
        except (KeyboardInterrupt, OSError) as error:
            if path is None or not (path / CONFIG).is_file():
                raise
            how = f"go on with: python -m rmm_lab merge --resume {shlex.quote(str(path))}"
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(how) from None
            if error.errno not in FULL:
                raise
            raise InputError(one_sentence(error, how)) from error


def optimiser_tensors(optimiser: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """Adam's state as named tensors, so that a checkpoint needs no pickle."""
    return {
        f"{prefix}.{i}.{key}": value
        for i, state in optimiser.state_dict()["state"].items()
        for key, value in state.items()
    }


def restore_optimiser(
    optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor], prefix: str
) -> None:
    """The inverse of ``optimiser_tensors``."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith(prefix + "."):
            _, i, key = name.rsplit(".", 2)
            state.setdefault(int(i), {})[key] = value
    optimiser.load_state_dict(optimiser.state_dict() | {"state": state})
