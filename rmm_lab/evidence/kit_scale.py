"""The kit's own models: each table's groups of experts that ship."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rmm_lab.evidence.paper_scale import Group

# The groups of experts of each table, by the name that the table calls them.
SETS = ("digits", "letters", "symbols", "textures")
SIZES = {"ViT, width 32": "tiny-", "ViT, width 64": ""}
VISION: dict[str, tuple[str, ...]] = {
    "digits+textures": ("digits", "textures"),  # Table II's
    "letters+symbols": ("letters", "symbols"),
    "digits+letters": ("digits", "letters"),
    "digits+letters+textures": ("digits", "letters", "textures"),
}
LANGUAGE = ("qa", "mixed")
WRITING = ("llm",)
Groups = Mapping[str, Sequence[Group]]  # table -> its groups of experts


def kit_groups() -> Groups:
    """Each table's groups of experts that ship. Table IV takes Table II's."""
    vision = [Group(n, "ViT, width 64", {"experts": e}) for n, e in VISION.items()]
    language = [Group(n, "T5, width 64", {"experts": (n,)}) for n in LANGUAGE]
    writing = [Group(n, "Llama, width 96", {"experts": (n,)}) for n in WRITING]
    halves = [
        Group(name, size, {"experts": (f"{prefix}{name}-first", f"{prefix}{name}-second")})
        for size, prefix in SIZES.items()
        for name in SETS
    ]
    pair, agent = vision[:1], [vision[0], language[0]]
    papers = {"I": halves, "II": pair, "III": [*language, *writing], "IV": pair, "fig3": pair}
    searches, menu = [*pair, vision[3], *language], [*language, vision[3], vision[1]]
    own = {"groups": vision[1:], "searches": searches, "menu": menu, "agent": agent}
    own |= {
        "default": [vision[0], vision[3], language[0], *writing],
        "budgets": [*vision, *language],
    }
    own |= {"seconds": own["budgets"], "labels": agent}
    own |= {"fronts": [vision[0], vision[3], *language, *writing]}
    return papers | own
