"""A run folder: what outlives a search.

config.json             the arguments
episodes.csv            one row per episode: raw scores, raw and DAR reward, path
updates.csv             one row per policy update: the diagnostics
policies.bin            what the policy did at each layer, one update after another: float32 (U, P, A)
checkpoint.safetensors  policy, optimiser, generator and counters after the last update
policy.safetensors, path.json, table.json, table.md, *.png, merged/    the result

After an update episodes.csv, updates.csv and policies.bin grow by what is new, so that a save costs the
same however long the search has run; then the checkpoint, which names their length, is replaced. A search
that is stopped between the two leaves more than the checkpoint knows of, perhaps half a line: that is cut
off when it goes on. All other files are written whole or not at all.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rmm_lab.errors import InputError

Row = dict[str, Any]
GROWING = ("episodes.csv", "updates.csv", "policies.bin")


def write(file: Path, content: str | bytes) -> None:
    """Write to a temporary name, then rename: a reader sees the old file or the new one."""
    scratch = file.with_name(f".{file.name}.tmp")
    try:
        if isinstance(content, str):
            content = content.encode()
        scratch.write_bytes(content)
        scratch.replace(file)
    finally:
        scratch.unlink(missing_ok=True)


def append(file: Path, content: bytes) -> None:
    """Add to the end of a file. Where that fails (OSError: no space) the file is what it was."""
    with file.open("ab", buffering=0) as stream:
        size = stream.seek(0, os.SEEK_END)
        left = memoryview(content)
        try:
            while left:  # one write; a device that takes only a part says why at the next one
                left = left[stream.write(left) :]
        except OSError:
            stream.truncate(size)
            raise


def to_csv(rows: Sequence[Row], *, header: bool = True) -> str:
    """Rows with equal keys as CSV; floats in full precision."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


TEXTS = ("commit",)  # columns that stay text: a commit may look like a number, 12e4567


def from_csv(text: str, n: int | None = None) -> list[Row]:
    """The inverse of ``to_csv``, or its first n rows: numbers come back as int or float.

    Raises TypeError at a row with too few or too many cells.
    """
    rows = islice(csv.DictReader(io.StringIO(text)), n)
    return [{k: v if k in TEXTS else _number(v) for k, v in row.items()} for row in rows]


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


class RunFolder:
    """Creates, continues and reads a run folder. ``path`` None keeps everything in memory."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._saved = dict.fromkeys(GROWING, 0)  # rows of each file that a checkpoint may build on

    @classmethod
    def create(cls, path: Path | None, config: Mapping[str, Any]) -> RunFolder:
        """A new folder with its config; InputError if there are files in it already."""
        if path is not None:
            check_new(path)
            path.mkdir(parents=True, exist_ok=True)
            write(path / "config.json", json.dumps(config, indent=2) + "\n")
        return cls(path)

    @classmethod
    def read_config(cls, path: Path) -> dict[str, Any]:
        """The arguments of an earlier run."""
        file = path / "config.json"
        try:
            return dict(json.loads(file.read_text("utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"--resume: expected a run folder with config.json, found none that can be read in "
                f"{path} ({type(error).__name__}); name the folder of an earlier --run-dir"
            ) from error

    def file(self, name: str) -> Path | None:
        """A file's place in the folder, or None where nothing is written."""
        return None if self.path is None else self.path / name

    def write(self, name: str, content: str | bytes) -> None:
        """Write one file of the folder, whole."""
        if (file := self.file(name)) is not None:
            write(file, content)

    def save_checkpoint(
        self,
        tensors: Mapping[str, Tensor],
        counters: Mapping[str, Any],
        episodes: Sequence[Row],
        updates: Sequence[Row],
        policies: Sequence[Tensor],
    ) -> None:
        """Store the state after an update; what is already in the growing files is not touched.

        episodes, updates: all rows so far. policies: one for each update so far, (P, A) float32 each.
        Raises OSError where there is no space; the folder can then be resumed from the last checkpoint.
        """
        if self.path is None:
            return
        for name, rows in (("episodes.csv", episodes), ("updates.csv", updates)):
            known = self._saved[name]
            self._grow(name, to_csv(rows[known:], header=not known).encode(), len(rows))
        new = b"".join(p.numpy().tobytes() for p in policies[self._saved["policies.bin"] :])
        self._grow("policies.bin", new, len(policies))
        counters = {
            "episodes": len(episodes),
            "updates": len(updates),
            "policies": [len(policies), *(policies[-1].shape if policies else (0, 0))],
        } | dict(counters)
        tensors = {k: v.detach().clone().contiguous() for k, v in tensors.items()}
        self.write("checkpoint.safetensors", save(tensors, {"counters": json.dumps(counters)}))

    def _grow(self, name: str, new: bytes, total: int) -> None:
        assert self.path is not None
        if self._saved[name]:
            append(self.path / name, new)
        else:
            self.write(name, new)  # whole, in place of what a stopped search may have left
        self._saved[name] = total

    def load_checkpoint(
        self,
    ) -> tuple[dict[str, Tensor], dict[str, Any], list[Row], list[Row]] | None:
        """What ``save_checkpoint`` stored last, None before the first time.

        The policies are the tensor ``policies``, (U, P, A). Cuts off what was written after that
        checkpoint, in the files too, each replaced as a whole. Raises InputError for a checkpoint or a
        table that is not whole.
        """
        file = self.file("checkpoint.safetensors")
        if self.path is None or file is None or not file.exists():
            return None
        try:
            with safe_open(file, framework="pt") as stored:
                counters = json.loads(stored.metadata()["counters"])
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            lengths = [counters["episodes"], counters["updates"], counters["policies"][0]]
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"--resume: expected a whole checkpoint in {file}, found a truncated or altered one "
                f"({error}); start the search anew in another folder"
            ) from error
        episodes = self._read_table("episodes.csv", counters["episodes"])
        updates = self._read_table("updates.csv", counters["updates"])
        tensors["policies"] = self._read_policies(counters["policies"])
        self._saved = dict(zip(GROWING, lengths, strict=True))
        return tensors, counters, episodes, updates

    def _read_table(self, name: str, n: int) -> list[Row]:
        """The first n rows of a table; the file is cut to them."""
        data = self._read(name)
        whole = data[: data.rfind(b"\n") + 1]  # a write that was stopped may leave half a line
        try:
            rows = from_csv(whole.decode("utf-8"), n)
        except (TypeError, ValueError, csv.Error) as error:
            raise self._too_short(name, f"{n} rows", "an altered one") from error
        if len(rows) < n:
            raise self._too_short(name, f"{n} rows", str(len(rows)))
        self._cut(name, data, to_csv(rows).encode())
        return rows

    def _read_policies(self, shape: Sequence[int]) -> Tensor:
        """The policies (U, P, A) of the first U updates; the file is cut to them."""
        name, size = "policies.bin", 4 * math.prod(shape)
        data = self._read(name)
        if len(data) < size:
            raise self._too_short(name, f"{size} bytes", str(len(data)))
        self._cut(name, data, data[:size])
        if not size:  # no update yet
            return torch.zeros(*shape)
        return torch.frombuffer(bytearray(data[:size]), dtype=torch.float32).reshape(*shape)

    def _read(self, name: str) -> bytes:
        assert self.path is not None
        return (self.path / name).read_bytes() if (self.path / name).exists() else b""

    def _cut(self, name: str, found: bytes, kept: bytes) -> None:
        if found != kept:
            self.write(name, kept)

    def _too_short(self, name: str, expected: str, found: str) -> InputError:
        return InputError(
            f"--resume: expected at least {expected} in {self.file(name)}, found {found}; start the "
            "search anew in another folder"
        )


def check_new(path: Path) -> None:
    """Raise InputError unless ``path`` is absent or an empty folder."""
    above = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not above.is_dir():
        raise InputError(
            f"--run-dir: expected a new or empty folder, but {above} is a file, so {path} can be none; "
            "name another one"
        )
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(
            f"--run-dir: expected a new or empty folder, found files in {path}; name another one, or "
            f"go on with --resume {path}"
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
