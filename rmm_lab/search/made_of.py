"""What a search is made of, as SHA-256: a run goes on with nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmm_lab.families.checkpoint import Checkpoint
from rmm_lab.operators import MATCHED
from rmm_lab.search.config import Config
from rmm_lab.search.problem import Problem
from rmm_lab.tasks.few_labels import with_all_inputs


def made_of(problem: Problem, config: Config, splits: Sequence[str]) -> dict[str, str]:
    """Each part of a search by its name in a sentence, with its SHA-256.

    The models with their heads, config.json and tokenizer; the ``splits`` of each task; the inputs of the
    train split where a merge or the agent looks at them. Places are not part of it: a folder may move.
    """
    pool, spec = problem.pool, config.problem
    models = {"the base": pool.base}
    models |= {f"expert {n}": e for n, e in zip(pool.names, pool.experts, strict=True)}
    if problem.multi_task is not None:
        models["the multi-task model"] = problem.multi_task
    found = {name: _of_model(model) for name, model in models.items()}
    for task in map(with_all_inputs, problem.tasks):
        for split in splits:
            found[f"the {split} split of {task.name}"] = _sha256(_examples(task, split))
    looking = any(text.partition(":")[0] in MATCHED for text in (*pool.operators, spec.stem))
    if pool.calibration is not None and (looking or "drift" in config.run.observation):
        inputs = pool.calibration
        for task, rows in zip(inputs.tasks, inputs.rows, strict=True):
            name = f"the calibration inputs of {task.name}"
            found[name] = _sha256(_examples(task, inputs.split, rows))
    return found


def of_tensors(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """SHA-256 of named tensors, in the order of their names, and of a text."""
    parts: list[Any] = [text]
    for name in sorted(tensors):
        parts += [name, tensors[name]]
    return _sha256(parts)


def _of_model(model: Checkpoint) -> str:
    """Of a model's weights as they were read, its config.json and the files of its tokenizer."""
    files = (model.tokenizer_folder / name for name in model.family.FILES)
    kept = [file.read_bytes() for file in files if file.is_file()]
    return _sha256([model.sha256, json.dumps(model.config, sort_keys=True, default=str), *kept])


def _examples(task: Any, split: str, rows: np.ndarray | None = None) -> Iterable[Any]:
    """What a task's examples are, all or those of some rows: texts, or labels and pictures."""
    if hasattr(task, "rows"):
        texts = task.rows(split)
        chosen = texts if rows is None else [texts[row] for row in rows]
        yield json.dumps(chosen, sort_keys=True)
        return
    part = task.split(split)
    at = np.arange(len(part)) if rows is None else rows
    yield part.labels[torch.from_numpy(at)]
    if isinstance(part.images, Tensor):
        yield part.images if rows is None else part.images[torch.from_numpy(at)]
    else:  # too many to be kept decoded
        yield from map(part.images.encoded, at.tolist())


def _sha256(parts: Iterable[Any]) -> str:
    """Of texts, bytes and tensors; where one ends is part of it."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
            part = part.detach().cpu().reshape(-1).view(torch.uint8).numpy()
        elif isinstance(part, str):
            part = part.encode("utf-8", "surrogatepass")
        digest.update(f" {len(memoryview(part).cast('B'))} ".encode())
        digest.update(part)
    return digest.hexdigest()
