"""What the agent chose, as data: a ``LayerPath`` is JSON that turns into a real timm ViT or T5."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rmm_lab.errors import InputError
from rmm_lab.families.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from rmm_lab.families.shipped import locate
from rmm_lab.layers import LayerPool

SCHEMA = "rmm_lab/layer-path/1"


@dataclass(frozen=True)
class Origin:
    """Where a model came from: its name in the path, the name it ships under, its folder (absolute) or
    hub name, and its weights' SHA-256."""

    name: str
    source: str
    sha256: str

    @classmethod
    def of(cls, name: str, checkpoint: Checkpoint) -> Origin:
        """The origin of a checkpoint, in a form that holds from any working directory."""
        source = checkpoint.source
        if locate(source) == source and not source.startswith("hf-hub:"):
            source = str(checkpoint.folder.resolve())
        return cls(name, source, checkpoint.sha256)


@dataclass(frozen=True)
class LayerPath:
    """F_M = F*_1 o F*_2 o ... o F*_T (Eq. 6) with everything needed to build it again.

    ``steps``: (source, layer) in the order in which the layers are run; a source is an expert's name
    or an operator's specification. ``stem``: the source of all weights outside layers and heads.
    ``seed`` and ``scope``: those of the pool, so that random operators draw the same masks. ``unit``:
    what a layer is, ``block`` or ``sublayer``.
    """

    steps: tuple[tuple[str, int], ...]
    base: Origin
    experts: tuple[Origin, ...]
    operators: tuple[str, ...]
    scope: str
    seed: int
    stem: str
    unit: str = "block"

    @classmethod
    def of(cls, pool: LayerPool, steps: Sequence[tuple[str, int]], stem: str) -> LayerPath:
        """The path of (source, layer) through a pool."""
        return cls(
            steps=tuple((source, int(k)) for source, k in steps),
            base=Origin.of("base", pool.base),
            experts=tuple(
                Origin.of(name, e) for name, e in zip(pool.names, pool.experts, strict=True)
            ),
            operators=tuple(pool.operators),
            scope=pool.scope,
            seed=pool.seed,
            stem=stem,
            unit=pool.unit,
        )

    def to_json(self) -> str:
        """The path as JSON text with a schema; steps read ``{"layer": 0, "source": "ties"}``."""
        data = {"schema": SCHEMA} | asdict(self)
        data["steps"] = [{"layer": k, "source": source} for source, k in self.steps]
        return json.dumps(data, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> LayerPath:
        """The inverse of ``to_json``; InputError for anything else."""
        try:
            data: dict[str, Any] = json.loads(text)
            if data.pop("schema") != SCHEMA:
                raise ValueError(f"the schema is not {SCHEMA}")
            for s in data["steps"]:
                if type(s["layer"]) is not int or s["layer"] < 0 or type(s["source"]) is not str:
                    raise ValueError(f"the step {s} is not a source and a layer's number")
            data.setdefault("unit", "block")  # paths written before there were sublayers
            for key, kind in (
                *(("seed", int), ("stem", str), ("scope", str), ("operators", list)),
                ("unit", str),
            ):
                if type(data[key]) is not kind:
                    raise ValueError(f"{key} is no {kind.__name__}")
            data["steps"] = tuple((s["source"], s["layer"]) for s in data["steps"])
            data["base"] = Origin(**data["base"])
            data["experts"] = tuple(Origin(**e) for e in data["experts"])
            data["operators"] = tuple(data["operators"])
            return cls(**data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"layer path: expected JSON of schema {SCHEMA}, found something else ({error!r}); "
                "take path.json of a run folder"
            ) from error

    def load_pool(self) -> LayerPool:
        """Read the models that the path names; InputError if their weights have changed since."""
        checkpoints = []
        for origin in (self.base, *self.experts):
            checkpoint = read_checkpoint(locate(origin.source))
            if checkpoint.sha256 != origin.sha256:
                raise InputError(
                    f"model {origin.source!r}: expected weights of SHA-256 {origin.sha256[:12]}..., "
                    f"found {checkpoint.sha256[:12]}...; it has changed since the search, so put the "
                    "old one back or search again"
                )
            checkpoints.append(checkpoint)
        names = [e.name for e in self.experts]
        return LayerPool(
            checkpoints[0],
            checkpoints[1:],
            names,
            self.operators,
            scope=self.scope,
            seed=self.seed,
            unit=self.unit,
        )

    def build(self, pool: LayerPool | None = None) -> Any:
        """The merged model: a timm VisionTransformer or a T5ForConditionalGeneration, ready to run.

        A ViT's classifier holds the heads of all tasks one after another; ``rmm_lab.heads`` in
        config.json of the saved folder tells whose logits stand where. A T5 has its own number of
        encoder and decoder blocks; its tokenizer is the base's.
        """
        return (pool or self.load_pool()).assemble(self.steps, self.stem)

    def save_pretrained(self, folder: str | Path, pool: LayerPool | None = None) -> Path:
        """Write the merged model as a folder that timm or transformers loads.

        ``timm.create_model("local-dir:FOLDER", pretrained=True)`` or
        ``T5ForConditionalGeneration.from_pretrained(FOLDER)``. config.json carries the path (and a
        ViT's slices of the classifier); a repeated layer is stored as a copy.
        """
        pool, folder = pool or self.load_pool(), Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"folder {folder}: expected a new or empty one; name another")
        model = self.build(pool)
        labels = {
            name: e.label_names or range(e.num_classes)
            for name, e in zip(pool.names, pool.experts, strict=True)
        }
        config = pool.architecture.merged_config([k for _, k in self.steps], pool.heads, labels)
        config["rmm_lab"] = dict(config.get("rmm_lab", {})) | {"path": json.loads(self.to_json())}
        weights = pool.base.family.once(str(folder), model.state_dict())
        write_checkpoint(folder, config, weights, beside=pool.base.folder)
        return folder
