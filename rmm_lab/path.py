"""What a search chose, as data: a ``LayerPath`` is JSON that turns into a real model."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rmm_lab.errors import InputError
from rmm_lab.families.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from rmm_lab.families.shipped import MODELS, locate_stored
from rmm_lab.layers import LayerPool
from rmm_lab.operators import MATCHED
from rmm_lab.reward import Path, Step, split_stem
from rmm_lab.tasks.files import shipped_name
from rmm_lab.tasks.hold import check_apart

SCHEMA = "rmm_lab/layer-path/1"
_OLD_SCALES = "task_arithmetic:scale="  # older files have a step's scales in its source


@dataclass(frozen=True)
class Origin:
    """Where a model came from: its name in the path, its source, and its weights' SHA-256.

    ``source``: the name it ships under, its absolute folder, or its hub name.
    """

    name: str
    source: str
    sha256: str

    @classmethod
    def of(cls, name: str, checkpoint: Checkpoint) -> Origin:
        """The origin of a checkpoint, valid from any working directory."""
        source = checkpoint.source
        if not (place := shipped_name(source, MODELS)) and not source.startswith("hf-hub:"):
            place = str(checkpoint.folder.resolve())
        return cls(name, place or source, checkpoint.sha256)


@dataclass(frozen=True)
class LayerPath:
    """F_M = F*_1 o F*_2 o ... o F*_T (Eq. 6) with everything needed to build it again.

    ``stem``: the step at place -1, the source of all weights outside layers and heads. ``steps``: the
    other steps, in the order in which the layers run. ``seed``, ``scope`` and ``unit``: those of the pool,
    so that random operators draw the same masks. ``calibration``: where a layer is ``regmean`` or
    ``least_squares``, the inputs that it was fitted to, see ``engine.calibration.Calibration.record``.
    """

    steps: Path
    base: Origin
    experts: tuple[Origin, ...]
    operators: tuple[str, ...]
    scope: str
    seed: int
    stem: Step
    unit: str = "block"
    calibration: dict[str, Any] | None = None

    @classmethod
    def of(cls, pool: LayerPool, path: Sequence[Step], stem: str = "base") -> LayerPath:
        """A path through a pool; ``stem`` is its stem's source unless it starts with one, at place -1."""
        whole = tuple(Step(source, int(k), *scales) for source, k, *scales in path)
        first, steps = split_stem(whole, stem)
        matched = any(
            s.source.partition(":")[0] in MATCHED or len(s.scales) > pool.n_models
            for s in (first, *steps)
        )
        return cls(
            calibration=pool.calibration.record() if matched and pool.calibration else None,
            steps=steps,
            base=Origin.of("base", pool.base),
            experts=tuple(
                Origin.of(name, e) for name, e in zip(pool.names, pool.experts, strict=True)
            ),
            operators=tuple(pool.operators),
            scope=pool.scope,
            seed=pool.seed,
            stem=first,
            unit=pool.unit,
        )

    @property
    def path(self) -> Path:
        """All steps, the stem's first, as scorers and ``path_text`` take them."""
        return (self.stem, *self.steps)

    def to_json(self) -> str:
        """The path as JSON text with a schema; a step reads ``{"layer": 0, "source": "ties"}``.

        A step with scales has them as ``"scales": [0.3, 0.5]``, the stem's are ``"stem_scales"``.
        """
        data = {"schema": SCHEMA} | asdict(self)
        data["steps"] = [
            {"layer": k, "source": source} | ({"scales": list(scales)} if scales else {})
            for source, k, scales in self.steps
        ]
        data["stem"] = self.stem.source
        if self.calibration is None:
            del data["calibration"]
        if self.stem.scales:
            data["stem_scales"] = list(self.stem.scales)
        return json.dumps(data, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> LayerPath:
        """The inverse of ``to_json``; InputError for anything else."""
        try:
            data: dict[str, Any] = json.loads(text)
            if data.pop("schema") != SCHEMA:
                raise ValueError(f"the schema is not {SCHEMA}")
            data.setdefault("unit", "block")  # paths written before there were sublayers
            for key, kind in {"seed": int, "scope": str, "operators": list, "unit": str}.items():
                if type(data[key]) is not kind:
                    raise ValueError(f"{key} is no {kind.__name__}")
            data["steps"] = tuple(_read_step(step, 0) for step in data["steps"])
            stem = {"source": data["stem"], "layer": -1, "scales": data.pop("stem_scales", [])}
            data["stem"] = _read_step(stem, -1)
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
        checkpoints: list[Checkpoint] = []  # the base first: adapters are applied to it
        for origin in (self.base, *self.experts):
            place, base = locate_stored(origin.source), next(iter(checkpoints), None)
            checkpoint = read_checkpoint(place, base=base)
            if checkpoint.sha256 != origin.sha256:
                raise InputError(
                    f"model {origin.source!r}: expected weights of SHA-256 {origin.sha256[:12]}..., "
                    f"found {checkpoint.sha256[:12]}...; it has changed since the search, so put the "
                    "old one back or search again"
                )
            checkpoints.append(checkpoint)
        base, *experts = checkpoints
        names, options = [e.name for e in self.experts], {"scope": self.scope, "unit": self.unit}
        return LayerPool(base, experts, names, self.operators, seed=self.seed, **options)

    def build(self, pool: LayerPool | None = None) -> Any:
        """The merged model of timm or transformers, such as a VisionTransformer, ready to run.

        A ViT's classifier holds the heads of all tasks one after another; ``rmm_lab.heads`` in the saved
        folder's config.json says which logits are whose. A text model's tokenizer is the base's.

        pool: by default read anew; where layers were fitted to inputs, ``search.problem.pool_of(path)``.
        """
        return (pool or self.load_pool()).assemble(self.path)

    def save_pretrained(
        self, folder: str | pathlib.Path, pool: LayerPool | None = None
    ) -> pathlib.Path:
        """Write the merged model as a folder that timm or transformers loads.

        ``timm.create_model("local-dir:FOLDER", pretrained=True)`` or
        ``AutoModelForCausalLM.from_pretrained(FOLDER)``, say. config.json carries the path (and a
        ViT's slices of the classifier); a repeated layer is stored as a copy.
        """
        pool, folder = pool or self.load_pool(), pathlib.Path(folder)
        sources = [locate_stored(origin.source) for origin in (self.base, *self.experts)]
        models = [s for s in sources if any(pathlib.Path(s).glob("*config.json"))]
        check_apart(folder, "folder", models)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"folder {folder}: expected a new or empty one; name another")
        model = self.build(pool)
        labels = {
            name: e.label_names or range(e.num_classes)
            for name, e in zip(pool.names, pool.experts, strict=True)
        }
        config = pool.architecture.merged_config([s.layer for s in self.steps], pool.heads, labels)
        config["rmm_lab"] = dict(config.get("rmm_lab", {})) | {"path": json.loads(self.to_json())}
        weights = pool.base.family.once(str(folder), model.state_dict())
        write_checkpoint(folder, config, weights, beside=pool.base.tokenizer_folder)
        return folder


def _read_step(data: Mapping[str, Any], first: int) -> Step:
    """A step of a JSON file; ValueError for one that is none, or whose layer is below ``first``."""
    source, k, scales = data["source"], data["layer"], data.get("scales", [])
    if type(k) is not int or k < first or type(source) is not str or type(scales) is not list:
        raise ValueError(f"the step {data} is not a source and a layer's number")
    if source.startswith(_OLD_SCALES) and "/" in source:
        source, _, text = source.partition(":scale=")
        scales = list(map(float, text.split("/")))
    if not all(type(s) in (int, float) for s in scales):
        raise ValueError(f"the scales of the step {data} are not numbers")
    return Step(source, k, tuple(map(float, scales)))
