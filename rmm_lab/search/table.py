"""All rows of a result table but the search's own, in their order."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from rmm_lab.search import gradients as by_gradient
from rmm_lab.search import matched, uniform
from rmm_lab.search.problem import Problem
from rmm_lab.search.uniform import GRIDS, Row

PAPER = tuple(GRIDS)[:7]  # the paper's merges, as published and tuned
# How many rules that see weights alone a single search shows: each costs evaluations of whole splits.
RULES: dict[str, Collection[str]] = {
    "paper": PAPER,
    "few": (*PAPER, uniform.WEIGHTS, "TSV", "Iso-C", "WUDI", "LiNeS", *uniform.OF_ADAPTERS),
    "rules": tuple(name for name in GRIDS if name not in uniform.SLOW),
    "all": tuple(GRIDS),
}


def rows(
    problem: Problem, *, gradients: bool = False, rules: Collection[str] = tuple(GRIDS)
) -> Iterator[Row]:
    """Models as they are, rules that see weights alone, that see inputs, and on request gradients.

    Each is scored on the test split, its settings chosen on the reward split. ``rules``: which of those that
    see weights alone. A problem without calibration inputs has no rows that see them.
    """
    yield from uniform.rows(problem, rules)
    if problem.pool.calibration is not None:
        yield from matched.rows(problem)
    if gradients:
        yield from by_gradient.rows(problem, problem.spec.seed)


def compared(problem: Problem, compare: str) -> Iterator[Row]:
    """The rows beside a search's own in its table; ``compare`` as in ``RunArgs``."""
    if compare == "paper":
        return uniform.rows(problem, PAPER)
    return rows(problem, gradients=compare == "all", rules=RULES[compare])
