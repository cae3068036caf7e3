"""The files of a front in a run folder: front.json, front.md, front.png."""

from __future__ import annotations

from typing import Any

from rmm_lab.search.front import SPLITS, Front


def write_front(front: Front, folder: Any) -> None:
    """front.json, front.md and front.png of a run folder; the first is whole before the others are there."""
    from rmm_lab.figures.fronts import front_picture
    from rmm_lab.figures.render import png

    tasks = [t for t, on in zip(front.tasks, front.ends["reward"].counts, strict=True) if on]
    found = {split: front.normalised(split) for split in front.scaled[1:]}
    picture = front_picture(found, tasks, {front.knee: "knee"})
    folder.write("front.json", front.to_json())
    folder.write("front.md", markdown(front))
    folder.write("front.png", png(picture))


def frame(front: Front) -> Any:
    """A front as a DataFrame, a row for each point, in % of the test split (of the reward split without).

    ``promised`` and ``reward`` are means over tasks, as the last column of the split that is shown.
    """
    import pandas as pd

    split = "test" if "test" in front.ends else "reward"
    shown = pd.DataFrame(100 * front.scores(split), columns=[f"{t}, {split}" for t in front.tasks])
    for name in dict.fromkeys([*SPLITS[:2], split]):
        shown[f"mean, {name}"] = 100 * front.scores(name).mean(1)
    costs = {key: [getattr(p, key) for p in front.points] for key in ("layers", "modules")}
    shown = shown.assign(**costs, distance=[p.distance for p in front.points])
    return shown.rename_axis("point")


def markdown(front: Front) -> str:
    """front.md: the table of a front, and what the numbers are."""
    left = [t for t, on in zip(front.tasks, front.ends["reward"].counts, strict=True) if not on]
    worth = front.measures()
    said = [
        f"{split} split {worth[split]['hypervolume']:.3f}" for split in SPLITS[1:] if split in worth
    ]
    table = frame(front).astype(object)
    table = table.where(table.notna(), None).to_markdown(floatfmt=".1f", missingval="")
    text = (
        f"{table}\n\nScores in %. {len(front.points)} of {front.finalists} finalists that no other one "
        "dominates on the whole reward split. *Promised*: the mean on subsets, the best of many noisy ones. "
        "*Test*: scored once, after the choice; some points may dominate others there. *Modules*: different "
        f"stems and layers that a point stores; all points together store {front.modules}. *Distance*: the "
        f"norm of the weights minus the base's.\n\nThe knee is point {front.knee}.\n\nHypervolume of "
        f"(score − base) / (expert − base), 1 for every expert at once: {', '.join(said)}; subsets promised "
        f"{front.promise:.3f} by {front.archive} path{'' if front.archive == 1 else 's'}.\n"
    )
    if left:
        text += (
            f"\n{', '.join(left)}: the expert is no better than the base on the reward split, so that the "
            "front does not count it.\n"
        )
    if "test" in front.ends and "test" not in front.scaled:
        text += (
            "\nAn expert is no better than the base on the test split, so that there is no scale there and "
            "no hypervolume.\n"
        )
    return text
