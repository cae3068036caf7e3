"""A run folder: what outlives a search, each file written whole or not at all.

config.json             the arguments
episodes.csv            one row per episode: raw scores, raw and DAR reward, path
updates.csv             one row per policy update: the diagnostics
checkpoint.safetensors  policy, optimiser, generator and counters after the last update
policy.safetensors, path.json, table.json, table.md, *.png, merged/    the result
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rmm_lab.errors import InputError

Row = dict[str, Any]


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


def to_csv(rows: Sequence[Row]) -> str:
    """Rows with equal keys as CSV with a header; floats in full precision."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def from_csv(text: str) -> list[Row]:
    """The inverse of ``to_csv``: numbers come back as int or float, the rest as text."""
    return [{k: _number(v) for k, v in row.items()} for row in csv.DictReader(io.StringIO(text))]


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
    ) -> None:
        """Store the state after an update; tables first, since the checkpoint names their length."""
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
        """What ``save_checkpoint`` stored last, tables cut to its length; None before the first."""
        file = self.file("checkpoint.safetensors")
        if self.path is None or file is None or not file.exists():
            return None
        try:
            with safe_open(file, framework="pt") as stored:
                counters = json.loads(stored.metadata()["counters"])
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"--resume: expected a whole checkpoint in {file}, found a truncated or altered one "
                f"({error}); start the search anew in another folder"
            ) from error
        tables = []
        for name in ("episodes", "updates"):
            table = self.path / f"{name}.csv"
            rows = from_csv(table.read_text("utf-8")) if table.exists() else []
            if len(rows) < counters[name]:
                raise InputError(
                    f"--resume: expected at least {counters[name]} rows in {table}, found {len(rows)}; "
                    "start the search anew in another folder"
                )
            tables.append(rows[: counters[name]])
        return tensors, counters, tables[0], tables[1]


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
