"""The table of fronts: what each search for fronts is worth on the test split, measured, shown and drawn.

A row is a front. ``points``: each point's normalised scores on the test split, of the tasks ``counted``, as
text. ``mean`` and ``by_task`` are those of its point with the best mean on the reward split, for comparison
with other tables.
"""

from __future__ import annotations

import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from pandas import DataFrame

from rmm_lab.errors import InputError
from rmm_lab.evidence.markdown import markdown, seconds_text, seeds, span
from rmm_lab.evidence.rows import spread
from rmm_lab.families.shipped import expand
from rmm_lab.figures.fronts import fronts_picture
from rmm_lab.fronts.searches import A_FIFTH, AVERAGES, FRONT_SEARCHES, OF_MORE, SEPARATE
from rmm_lab.reward import path_text
from rmm_lab.search import uniform
from rmm_lab.search.config import Config, searched, seen_by
from rmm_lab.search.front import FINALISTS, find_front
from rmm_lab.search.front_measures import (
    epsilon,
    expected_utility,
    igd_plus,
    lattice_of,
    non_dominated,
)
from rmm_lab.search.phases import Search, make_scorer
from rmm_lab.search.pipeline import run_phases
from rmm_lab.search.preferences import check_ends, ends_of, scored_by_task
from rmm_lab.search.run_folder import RunFolder

if TYPE_CHECKING:
    from rmm_lab.evidence.measure import Job

DRAWN = 5  # fronts in a panel, the averages on top of them


def methods(config: Config) -> tuple[str, ...]:
    """The config's own search and all searches for fronts, but for those that are another for two experts."""
    left_out = OF_MORE if len(expand(config.problem.experts)) == 2 else ()
    return (searched(config), *(name for name in FRONT_SEARCHES if name not in left_out))


def measured(job: Job) -> dict[str, list[dict[str, Any]]]:
    """A search for a front by the key's method; any other name is that of the config's own search."""
    from rmm_lab.evidence.measure import cells, fitted

    (problem, start), run, method = fitted(job.config), job.config.run, job.key["method"]
    with closing(make_scorer(problem, job.config)) as scorer:
        names, ends = scorer.task_names, ends_of(scorer)
        check_ends(ends, names, "tables fronts")
        if method in FRONT_SEARCHES:
            out = FRONT_SEARCHES[method](scorer, run.episodes, run.seed, ends)
            scored = [(text, own) for (text, _), own in zip(out, out.by_task, strict=True)]
            front = find_front(scorer, scored, ends, out.answers)
        else:
            search = Search.start(job.config, scorer, RunFolder(None))
            run_phases(search)
            scored = scored_by_task(search.episodes, names)
            front = find_front(scorer, scored, ends)
    seconds = time.perf_counter() - start
    front = front.on_test(problem)
    if "test" not in front.scaled:
        raise InputError(
            f"group {job.key['group']!r}: expected experts that are better than the base on the test split "
            "too, found one that is not; leave the group out with --only"
        )
    best = front.points[int(front.scores().mean(1).argmax())]
    assert best.test is not None
    took: dict[str, Any] = {"evaluations": len(scored), "seconds": seconds}
    took |= {"sees": seen_by(job.config), "reward": float(np.mean(best.reward))}
    row = uniform.Row(method, f"{front.finalists} finalists", best.test, **took)
    worth, on = front.measures(), front.ends["reward"].counts
    return {
        job.table: [
            cells(problem, row)
            | {
                "path": path_text(best.path.path),
                "hypervolume": round(worth["test"]["hypervolume"], 4),
                "hypervolume_reward": round(worth["reward"]["hypervolume"], 4),
                "hypervolume_promised": round(front.promise, 4) if scored else float("nan"),
                "counted": " ".join(name for name, counts in zip(names, on, strict=True) if counts),
                "points": " ".join(
                    "/".join(f"{v:.4f}" for v in p) for p in front.normalised("test")
                ),
            }
        ]
    }


def points_of(text: str) -> np.ndarray:
    """The column ``points`` as (n, K)."""
    return np.array([list(map(float, point.split("/"))) for point in text.split()])


def quality(rows: DataFrame) -> DataFrame:
    """Each row with IGD+ and epsilon to what all fronts of its group found together, utility and size."""
    found = rows["points"].map(points_of)
    out = []
    for _, own in rows.groupby("group", sort=False):
        every = np.concatenate(list(found[own.index]))
        target = every[non_dominated(every)]
        weights = lattice_of(target.shape[1], FINALISTS)
        base = own.loc[own["method"] == AVERAGES].set_index("seed")["hypervolume"]
        base = base[base > 0]  # nothing is a multiple of no volume
        for i, row in own.iterrows():
            points = found[i]
            out.append(
                {
                    "IGD+": igd_plus(points, target),
                    "epsilon": epsilon(points, target),
                    "utility": expected_utility(points, weights),
                    "size": len(points),
                    "ratio": row["hypervolume"] / base.get(row["seed"], np.nan),
                }
            )
    index = [i for _, own in rows.groupby("group", sort=False) for i in own.index]
    return rows.join(DataFrame(out, index=index))


def _three(values: Any) -> str:
    v = values.dropna()
    if v.empty:
        return ""
    return f"{v.mean():.3f}" + (f" ± {v.std():.3f}" if len(v) > 1 else "")


def front_table(rows: DataFrame) -> DataFrame:
    """One group's searches, the largest hypervolume on the test split first."""
    columns: dict[str, Any] = {
        "hypervolume, test": ("hypervolume", _three),
        "reward": ("hypervolume_reward", _three),
        "promised": ("hypervolume_promised", _three),
        "times the averages": ("ratio", lambda v: "" if v.isna().all() else f"{v.mean():.2f}"),
        "IGD+": ("IGD+", _three),
        "epsilon": ("epsilon", _three),
        "utility": ("utility", _three),
        "points": ("size", span),
        "best mean, test %": ("mean", spread),
        "evaluations": ("evaluations", span),
        "seconds": ("seconds", seconds_text),
    }
    order = rows.groupby("method", sort=False)["hypervolume"].mean()
    order = order.sort_values(ascending=False, kind="stable")
    return rows.groupby("method", sort=False).agg(**columns).reindex(order.index)


def show_fronts(rows: DataFrame) -> str:
    """The page of the table."""
    whole = (rows["evaluations"] > 0) & (rows["method"] != A_FIFTH)
    n = span(rows.loc[whole, "evaluations"])
    text = (
        f"![{fronts_alt(rows)}](fronts.png)\n\n"
        f"Hypervolume of (score − base) / (expert − base) with the base as reference: 1 is every expert at "
        f"once. Mean ± sample standard deviation over seeds ({seeds(rows, 'group', 'method')}). Each search "
        f"had {n} evaluations on the same subsets of the reward split; the simplexes need none. At most "
        f"{FINALISTS} finalists of each were scored on the whole reward split, where the front was chosen; "
        "the test split was scored once. *Promised*: the front of the mean scores on subsets, which no other "
        "column follows. *IGD+* and *epsilon*: to the front of all points of the group, on the test split; "
        "less is better. *Utility*: the best weighted mean, mean over a lattice of weights. *Best mean*: of "
        "the front's point with the best mean on the reward split. All see labels, if only to choose.\n"
    )
    for group, own in quality(rows).groupby("group", sort=False):
        text += f"\n## {group}\n\n{markdown(front_table(own))}{one_for_all(own)}"
    return text


def one_for_all(rows: DataFrame) -> str:
    """Of one group: what one agent with a fifth of the evaluations has of a training for each preference."""
    one, each = (rows[rows["method"] == name].set_index("seed") for name in (A_FIFTH, SEPARATE))
    shares = (one["hypervolume"] / each["hypervolume"]).dropna()
    if shares.empty:
        return ""
    n, most = span(one["evaluations"]), span(each["evaluations"])
    return (
        f"\nOne agent for all preferences, {A_FIFTH}, has {_three(shares)} times the hypervolume of "
        f"{SEPARATE}, with {n} evaluations against {most}.\n"
    )


def fronts_alt(rows: DataFrame) -> str:
    """One sentence on the figure, and one on each panel."""
    text = "Fronts on the test split, tasks as axes"
    for group, own in rows.groupby("group", sort=False):
        means = own.groupby("method", sort=False)["hypervolume"].mean()
        text += f". {group}: " + ", ".join(f"{name} {value:.3f}" for name, value in means.items())
    return text + "."


def draw_fronts(rows: DataFrame) -> Figure:
    """``fronts_picture`` of the averages and of the searches with the largest hypervolumes."""
    groups = {}
    for group, own in rows.groupby("group", sort=False):
        means = own.groupby("method", sort=False)["hypervolume"].mean()
        best = list(means.sort_values(ascending=False, kind="stable").index)
        shown = [name for name in best if name != AVERAGES][:DRAWN]
        shown += [AVERAGES] if AVERAGES in best else []
        fronts = {
            name: [points_of(text) for text in own.loc[own["method"] == name, "points"]]
            for name in shown
        }
        groups[str(group)] = (own["counted"].iloc[0].split(), fronts)
    several = "Line: what half of the seeds attain; band: what all do to what one does."
    return fronts_picture(groups, several if rows["seed"].nunique() > 1 else "")
