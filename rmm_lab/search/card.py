"""A merged model's README.md as the Hub takes it: a header of tags, what it is, from what, by which path.

Licences are those that the parts themselves state: in the header of their README.md, or in config.json.
Folders of this machine are named without their path.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from rmm_lab.families import causal_lm, t5, vit
from rmm_lab.families.checkpoint import Checkpoint
from rmm_lab.families.shipped import locate
from rmm_lab.families.vit_run import TOKEN_AND_MEAN
from rmm_lab.layers import LayerPool
from rmm_lab.path import LayerPath, Origin
from rmm_lab.reward import path_text

UNKNOWN = "not stated"


def escaped(text: str) -> str:
    """A name as Markdown shows it: nothing in it begins a column or a tag."""
    return text.replace("|", "\\|").replace("<", "&lt;")


_WHOLE: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
_PAPER = "[Reinforced Model Merging](https://arxiv.org/abs/2503.21272)"
_LOAD = {  # by what such models do; of transformers'
    "image-classification": 'transformers.AutoModelForImageClassification.from_pretrained("FOLDER")',
    "text2text-generation": 'transformers.T5ForConditionalGeneration.from_pretrained("FOLDER")',
    "text-generation": 'transformers.AutoModelForCausalLM.from_pretrained("FOLDER")',
}
_LOAD_TIMM = 'timm.create_model("local-dir:FOLDER", pretrained=True)'


def card(
    path: LayerPath, pool: LayerPool, table: str = "", said: str = "On the test split, in %:"
) -> str:
    """The text of README.md.

    table: scores in Markdown, or nothing where nothing was scored. said: what stands before them.
    """
    origins, models = (path.base, *path.experts), (pool.base, *pool.experts)
    licences = [licence_of(model) for model in models]
    depth = f"{len(path.steps)} of {pool.n_layers} {path.unit}s" if path.steps else "no layers"
    kind = _task_of(pool)
    # A DINOv2 is exported as transformers has it: see ``families.dinov2``.
    of_timm = pool.base.family is vit and pool.architecture.readout != TOKEN_AND_MEAN
    parts = [
        f"| {escaped(origin.name)} | {_public(origin)} | {licence} | `{origin.sha256[:12]}` |"
        for origin, licence in zip(origins, licences, strict=True)
    ]
    experts = ", ".join(escaped(origin.name) for origin in path.experts)
    text = [
        *_header(origins, licences, kind, "timm" if of_timm else "transformers"),
        f"# A merge of {experts}",
        "",
        f"Made without training by rmm_lab, after {_PAPER}: one model with layers of "
        f"{len(path.experts)} experts that were fine-tuned from one base.",
        "",
        "## From what",
        "",
        "| part | source | licence | SHA-256 of the weights |",
        "|:--|:--|:--|:--|",
        *parts,
        "",
        _on_licences(licences),
        "",
        "## By which path",
        "",
        f"Each step is a source and the layer taken from it, in running order ({depth}); `@-1` is the stem, "
        "all weights outside the layers. `config.json` holds it under `rmm_lab.path`."
        + (f" The {scales}." if (scales := scales_of(path, pool)) else ""),
        "",
        *(f"    {line}" for line in wrap(path_text(path.path), 90, **_WHOLE)),
        "",
        *(["## Scores", "", said, "", table, ""] if table else []),
        "## Use",
        "",
        f"    {_LOAD_TIMM if of_timm else _LOAD[kind]}",
        "",
    ]
    return "\n".join(text)


def scales_of(path: LayerPath, pool: LayerPool) -> str:
    """Whose scales a path's steps have, in their order; an empty text where none has any."""
    n = max(len(step.scales) for step in path.path)
    return f"scales are of {', '.join(pool.members[:n])}, in this order" if n else ""


def licence_of(model: Checkpoint) -> str:
    """The licence that a model's own files state, such as ``apache-2.0``, or ``not stated``."""
    readme = model.folder / "README.md"
    if readme.is_file():
        head = re.match(r"---\n(.*?)\n---", readme.read_text("utf-8", "replace"), re.DOTALL)
        named = re.search(r"^license:[ \t]*(\S.*?)\s*$", head[1] if head else "", re.MULTILINE)
        if named:
            return named[1].strip("\"'")
    for place in (model.config, model.config.get("pretrained_cfg")):
        named = place.get("license") if isinstance(place, dict) else None
        if isinstance(named, str) and named:
            return named
    return UNKNOWN


def _task_of(pool: LayerPool) -> str:
    """The Hub's name of what such models do."""
    family = pool.base.family
    if family is causal_lm:
        return "text-generation"
    return "text2text-generation" if family is t5 else "image-classification"


def _header(
    origins: Sequence[Origin], licences: Sequence[str], kind: str, library: str
) -> list[str]:
    """The Hub's YAML: only what it can look up. A licence is given where all parts state the same one."""
    hub = [o.source[7:].partition("@")[0] for o in origins if o.source.startswith("hf-hub:")]
    lines = ["---", f"library_name: {library}"]
    lines += [f"pipeline_tag: {kind}"]
    if hub:
        lines += ["base_model:", *(f"- {json.dumps(name)}" for name in dict.fromkeys(hub))]
        lines += ["base_model_relation: merge"]
    if len(set(licences)) == 1 and licences[0] != UNKNOWN:
        lines += [f"license: {json.dumps(licences[0])}"]
    return [*lines, "tags:", "- merge", "- rmm_lab", "---", ""]


def _on_licences(licences: Sequence[str]) -> str:
    if UNKNOWN in licences:
        return "Not every part states a licence: ask their owners before you share this model."
    if len(set(licences)) > 1:
        return "The parts have different licences, all of which hold for this model."
    return "This model is under the licence of its parts."


def _public(origin: Origin) -> str:
    """Where a part came from, without the folders of this machine."""
    if origin.source.startswith("hf-hub:"):
        return origin.source.removeprefix("hf-hub:")
    if locate(origin.source) != origin.source:
        return f"`{origin.source}`, ships with rmm_lab"
    name = Path(origin.source).name.replace("|", "\\|")
    return f"a folder `{name}`"
