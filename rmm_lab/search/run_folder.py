"""A run folder: what outlives a search.

config.json             the options: what is merged, the agent, the run
episodes.csv            one row per episode: phase, raw scores, raw and DAR reward, path
updates.csv             one row per policy update: the diagnostics
checkpoint.safetensors  agent, optimiser, generator, counters, and what the policy did, (U, P, A)
policy.safetensors, policies.safetensors, path.json, finalists.json, notes.json, table.json, table.md, *.png,
merged/                 the result
converted/              models that came as pickles, as safetensors

Every file is written whole, to a temporary name, and renamed. The checkpoint comes last: a search that was
stopped between two files may leave more rows than the checkpoint knows of, and they are dropped.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import shlex
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rmm_lab.errors import InputError
from rmm_lab.tasks.files import write_file

Row = dict[str, Any]
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
    """Creates, continues and reads a run folder. ``path`` None keeps everything in memory."""

    def __init__(self, path: Path | None) -> None:
        self.path = path and path.expanduser()

    @classmethod
    def create(cls, path: Path | None, config: Mapping[str, Any]) -> RunFolder:
        """A new folder with its config; InputError if there are files in it already."""
        folder = cls(path)
        if (path := folder.path) is not None:
            check_new(path)
            path.mkdir(parents=True, exist_ok=True)
            folder.write("config.json", json.dumps(config, indent=2) + "\n")
        return folder

    def write(self, name: str, content: str | bytes) -> None:
        """Write one file of the folder, whole."""
        if self.path is not None:
            write_file(self.path / name, content)

    def read_config(self) -> dict[str, Any]:
        """The options of an earlier run, as stored."""
        assert self.path is not None
        try:
            return dict(json.loads((self.path / "config.json").read_text("utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"--resume: expected a run folder with config.json, found none that can be read in "
                f"{self.path} ({type(error).__name__}); name the folder of an earlier --run-dir"
            ) from error

    def read_rows(self, name: str, n: int | None = None) -> list[Row]:
        """The rows of ``episodes.csv`` or ``updates.csv``, or the first n; InputError if there are fewer."""
        assert self.path is not None
        file = self.path / name
        try:
            rows = from_csv(file.read_text("utf-8") if file.exists() else "")[:n]
        except (TypeError, ValueError, csv.Error) as error:
            raise InputError(
                f"{file}: expected a table of a search, found an altered one ({error}); start the search "
                "again in another folder"
            ) from error
        if n is not None and len(rows) < n:
            raise InputError(
                f"--resume: expected at least {n} rows in {file}, found {len(rows)}; start the search "
                "again in another folder"
            )
        return rows

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
        self.write("episodes.csv", to_csv(episodes))
        self.write("updates.csv", to_csv(updates))
        counters = {"episodes": len(episodes), "updates": len(updates)} | dict(counters)
        tensors = {k: v.detach().clone().contiguous() for k, v in tensors.items()}
        self.write("checkpoint.safetensors", save(tensors, {"counters": json.dumps(counters)}))

    def load_checkpoint(
        self,
    ) -> tuple[dict[str, Tensor], dict[str, Any], list[Row], list[Row]] | None:
        """What ``save_checkpoint`` stored last; None before the first time.

        Raises InputError for a checkpoint or a table that is not whole.
        """
        if self.path is None or not (file := self.path / "checkpoint.safetensors").exists():
            return None
        try:
            with safe_open(file, framework="pt") as stored:
                counters = json.loads(stored.metadata()["counters"])
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            n_episodes, n_updates = counters["episodes"], counters["updates"]
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"--resume: expected a whole checkpoint in {file}, found a truncated or altered one "
                f"({error}); start the search again in another folder"
            ) from error
        episodes = self.read_rows("episodes.csv", n_episodes)
        return tensors, counters, episodes, self.read_rows("updates.csv", n_updates)


@contextmanager
def new_folder(above: Path) -> Iterator[Path]:
    """A folder of one's own, ``merge-DATE-TIME``, also for runs that start in the same second.

    What is left empty is removed again.
    """
    made = not above.exists()
    if not made and not above.is_dir():
        check_new(above / "merge")  # raises InputError
    stem = time.strftime("merge-%Y%m%d-%H%M%S")
    for n in itertools.count(1):
        path = above / (stem if n == 1 else f"{stem}-{n}")
        with suppress(FileExistsError):  # of another run
            path.mkdir(parents=True)
            break
    try:
        yield path
    finally:
        for folder in (path, *([above] if made else [])):
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def check_new(path: Path) -> None:
    """Raise InputError unless ``path`` is absent or an empty folder."""
    above = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not above.is_dir():
        raise InputError(
            f"--run-dir: expected a new or empty folder, but {above} is a file; name another one"
        )
    if path.exists() and any(path.iterdir()):
        raise InputError(
            f"--run-dir: expected a new or empty folder, found files in {path}; name another one, or "
            f"go on with --resume {shlex.quote(str(path))}"
        )


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
