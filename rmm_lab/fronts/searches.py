"""Searches for fronts: the same number of evaluations on the same subsets, and but for HM3 the same start.

    simplex of weighted averages       rewarded soups; no evaluation      Ramé et al. 2023
    simplex of weighted least squares  a fit for each weight; none        ``matching``
    simplex of DARE-TIES               a merge for each weight; none      HM3's first step
    random scales                      drawn in the box
    CMA-ES along a lattice             one short run per preference       after HM3's subproblems, 2025
    NSGA-II, NSGA-III, TPE, GP         Optuna's, for several objectives   see ``models``
    MAP, and Bayesian, and nested      a quadratic fit with a link        Li et al. 2024
    MM-MO                              Bayesian, with the 1-norm          Li et al. 2024
    fill-in by constraints             raise one task, keep the others    after C-MORL, Liu et al. 2025
    natural niches                     see ``rivals``                     Abrantes et al. 2025
    RMM (conditioned)                  one agent that sees the preference see ``conditioned``
    RMM (conditioned), a fifth         the same with a fifth of its evaluations
    RMM (conditioned), after niches    the same, begun with what niches found with three quarters
    RMM (agent) per preference         a training each, equal shares      after HM3
    HM3 (as published)                 a merge and a training each        Zhou et al. 2025
    HM3 without its merge              layers of the experts alone        its ablation

``FRONT_SEARCHES[name](scorer, evaluations, seed, ends)``: the scorer of a problem's paths, how many it may
score on subsets, a seed, and both ends of each task's scale. A search returns what it scored
(``rivals.Scored``) and, as ``answers``, what it arrived at; ``front.find_front`` scores the finalists of
either on the whole reward split. Optuna's searches raise InputError where optuna is not installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from rmm_lab.fronts.conditioned import conditioned, separate
from rmm_lab.fronts.hm3 import hm3
from rmm_lab.fronts.models import by_gp, by_nsga2, by_nsga3, by_tpe, mm_mo
from rmm_lab.fronts.quadratics import map_bayesian, map_nested, map_surrogate
from rmm_lab.fronts.simplexes import Simplex, averages, by_dare_ties, least_squares
from rmm_lab.fronts.space import Box, Known, Trials, best_for
from rmm_lab.search import rivals
from rmm_lab.search.budget import Scored
from rmm_lab.search.front_measures import achievement, lattice_of, non_dominated
from rmm_lab.search.layer_scales import BOUNDS, MEANS, Evolution
from rmm_lab.search.preferences import Ends

# Of a scorer, a number of evaluations, a seed and both ends of each task's scale.
FrontSearch = Callable[[Any, int, int, Ends], Scored]

POINTS = 15  # of a simplex: 15 for two tasks and for three
GENERATIONS = 3  # of CMA-ES for each preference, at least, where the budget lets it
TOLERANCE = 0.02  # what another task may lose while one is raised, on the normalised scale
PENALTY = 10.0  # for each unit that it loses beyond that


def simplex(make: Simplex) -> FrontSearch:
    """A search that makes a merge for each of a lattice of weights and spends nothing of its budget.

    make: ``(scorer, weights (W, N))`` -> a path for each row.
    """

    def search(scorer: Any, evaluations: int, seed: int, ends: Ends) -> Trials:
        out = Trials(scorer, 0, ends)
        out.answers = make(scorer, lattice_of(scorer.n_models, POINTS))
        return out

    return search


def random_scales(scorer: Any, evaluations: int, seed: int, ends: Ends) -> Trials:
    """Numbers drawn uniformly from the box, after its ``starts``."""
    out, box, rng = Trials(scorer, evaluations, ends), Box(scorer), np.random.default_rng(seed)
    box.starts(out)
    while out.left:
        drawn = rng.uniform(*BOUNDS, (min(rivals.GROUP, out.left), box.size))
        out.ask([box.path(x) for x in drawn])
    return out


# ----------------------------------------------------------------------------------- CMA-ES in the box


def cmaes_lattice(scorer: Any, evaluations: int, seed: int, ends: Ends) -> Trials:
    """A short CMA-ES for each weight of a lattice, started from the best that is known for that weight.

    What is known are the members, one scale for all, and the means of the runs before. A run maximises the
    augmented Tchebycheff value; a generation shares a subset. HM3 (Zhou et al. 2025) has a separate search
    for each preference too, but starts each from nothing.
    """
    out, box = Trials(scorer, evaluations, ends), Box(scorer)
    known = box.starts(out)
    _sweep(out, box, known, seed, 0)
    return out


def _sweep(out: Trials, box: Box, known: Known, seed: int, keep: int) -> None:
    """The runs of ``cmaes_lattice`` until ``keep`` evaluations are left; their means become known."""
    population = 4 + int(3 * np.log(box.size))  # Hansen 2016, Table 1
    left = out.left - keep
    weights = lattice_of(out.n_tasks, left // (GENERATIONS * population)) if left > 0 else ()
    for i, w in enumerate(weights):
        last = keep + (out.left - keep) * (len(weights) - i - 1) // (len(weights) - i)
        evolution = Evolution(best_for(known, w), BOUNDS, seed + i)
        found = np.empty((0, out.n_tasks))
        while out.left > last:
            asked = evolution.ask(out.left - last)
            found = out.ask([box.path(x) for x in asked])
            evolution.tell(asked, achievement(found, w)[0].tolist())
        if any(evolution.runs):
            mean = np.mean(evolution.runs[-1][-MEANS:] or [evolution.latest], axis=0)
            known.append((mean, found.mean(0)))  # of the last generation: about what the mean has
            out.answers.append(box.path(mean))


# ------------------------------------------------------------------------------ fill-in by constraints


def crowding(points: np.ndarray) -> np.ndarray:
    """How far apart each point's neighbours are, summed over tasks: (n,), infinite at both ends.

    Source: Deb et al. 2002 (NSGA-II), Sec. III-B.
    """
    total = np.zeros(len(points))
    for column in points.T:
        order = np.argsort(column, kind="stable")
        gaps = np.full(len(points), np.inf)
        width = np.ptp(column) or 1.0
        gaps[order[1:-1]] = (column[order[2:]] - column[order[:-2]]) / width
        total += gaps
    return total


def constrained(points: np.ndarray, task: int, now: np.ndarray) -> np.ndarray:
    """What points (n, K) are worth while one task is raised from ``now``, (n,): its score less a penalty.

    The other tasks may lose ``TOLERANCE`` each, on the normalised scale; beyond it a unit costs ``PENALTY``.
    """
    lost = (now - TOLERANCE - points).clip(0)
    lost[:, task] = 0
    return np.asarray(points[:, task] - PENALTY * lost.sum(1))


def fill_in(scorer: Any, evaluations: int, seed: int, ends: Ends) -> Trials:
    """Half of the budget as ``cmaes_lattice``; then from the least crowded point each task is raised in turn.

    A short CMA-ES of two generations maximises one task, under a penalty for what the others lose; the point
    is scored on its subset first, so that both are compared on the same examples.
    Source: after the second stage of C-MORL (Liu et al. 2025, arXiv 2410.02236), with CMA-ES in place of PPO
    and a linear penalty in place of its interior point, whose logarithm noise would cross.
    """
    out, box = Trials(scorer, evaluations, ends), Box(scorer)
    known = box.starts(out)
    _sweep(out, box, known, seed, out.left // 2)
    tried: set[tuple[int, int]] = set()
    while out.left and known:
        points = np.array([point for _, point in known])
        front = np.flatnonzero(non_dominated(points))
        order = front[np.argsort(-crowding(points[front]), kind="stable")]
        moves = [(int(i), k) for i in order for k in range(out.n_tasks)]
        i, task = next((m for m in moves if m not in tried), moves[len(tried) % len(moves)])
        tried.add((i, task))
        numbers = known[i][0]
        evolution = Evolution(numbers, BOUNDS, seed + len(tried))
        now = found = out.ask([box.path(numbers)])
        for _ in range(2):
            if out.left:
                asked = evolution.ask(out.left)
                found = out.ask([box.path(x) for x in asked], stay=True)
                evolution.tell(asked, constrained(found, task, now[0]).tolist())
        known.append((evolution.latest, found.mean(0)))
        out.answers.insert(0, box.path(evolution.latest))
    return out


# ------------------------------------------------------------------------------------------ niches


def natural_niches(scorer: Any, evaluations: int, seed: int, ends: Ends) -> Scored:
    """``rivals.natural_niches``, whose archive is kept diverse by tasks; its last archive is the answer."""
    return rivals.natural_niches(scorer, evaluations, seed)


AVERAGES, LEAST_SQUARES = "simplex of weighted averages", "simplex of weighted least squares"
DARE_TIES, NESTED = "simplex of DARE-TIES", "MAP, nested"
A_FIFTH, SEPARATE = "RMM (conditioned), a fifth", "RMM (agent) per preference"
FRONT_SEARCHES: dict[str, FrontSearch] = {
    AVERAGES: simplex(averages),
    LEAST_SQUARES: simplex(least_squares),
    DARE_TIES: simplex(by_dare_ties),
    "random scales": random_scales,
    "CMA-ES along a lattice": cmaes_lattice,
    "NSGA-II, several objectives": by_nsga2,
    "NSGA-III": by_nsga3,
    "TPE, several objectives": by_tpe,
    "GP, log-EHVI": by_gp,
    "MAP": map_surrogate,
    "MAP, Bayesian": map_bayesian,
    NESTED: map_nested,
    "MM-MO": mm_mo,
    "fill-in by constraints": fill_in,
    "natural niches": natural_niches,
    "RMM (conditioned)": conditioned(),
    "RMM (conditioned), late": conditioned("late"),
    "RMM (conditioned), Tchebycheff": conditioned("tchebycheff"),
    A_FIFTH: conditioned(part=5),
    "RMM (conditioned), after niches": conditioned(niches=0.75),  # 0.5 is worse on the reward split
    SEPARATE: separate,
    "HM3 (as published)": hm3(),
    "HM3 without its merge": hm3(merge=False),
}
CLOSED = (AVERAGES, LEAST_SQUARES, DARE_TIES)  # that look at no score while they are made
OF_MORE = (NESTED,)  # that are another search where there are two experts
