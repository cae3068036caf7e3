"""Searches for fronts by Optuna's samplers, and MM-MO; for the arguments see ``searches``."""

from __future__ import annotations

from typing import Any

import numpy as np

from rmm_lab.fronts.space import Box, Trials
from rmm_lab.reward import Path
from rmm_lab.search.layer_scales import BOUNDS
from rmm_lab.search.preferences import Ends
from rmm_lab.search.rivals import GROUP, STARTUP, optuna_study, path_of_densities

# ------------------------------------------------------------------------------- samplers of Optuna


def _numbers(size: int, low: float, high: float) -> dict[str, Any]:
    """Optuna's distributions of (size,) numbers."""
    import optuna

    one = optuna.distributions.FloatDistribution(low, high)
    return {str(i): one for i in range(size)}


def _by_optuna(
    scorer: Any,
    evaluations: int,
    seed: int,
    ends: Ends,
    sampler: str,
    batch: int,
    **options: Any,
) -> Trials:
    """A study over the box, ``batch`` asked for at a time; ``GROUP``, a multiple of that, share a subset."""
    out, box = Trials(scorer, evaluations, ends), Box(scorer)
    with optuna_study(sampler, seed, out.n_tasks, **options) as study:
        space = _numbers(box.size, *BOUNDS)
        for numbers, point in box.starts(out):
            study.enqueue_trial(dict(zip(space, numbers.tolist(), strict=True)))
            study.tell(study.ask(space), point.tolist())
        done = 0
        while out.left:
            trials = [study.ask(space) for _ in range(min(batch, out.left))]
            paths = [box.path(np.array([t.params[key] for key in space])) for t in trials]
            found = out.ask(paths, stay=done % GROUP > 0)
            for trial, point in zip(trials, found, strict=True):
                study.tell(trial, point.tolist())
            done += len(trials)
    return out


def by_nsga2(scorer: Any, evaluations: int, seed: int, ends: Ends) -> Trials:
    """NSGA-II, Optuna's: ranks by domination, then by crowding. A generation shares a subset.

    Source: Deb et al. 2002, "A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II".
    """
    return _by_optuna(
        scorer, evaluations, seed, ends, "NSGAIISampler", GROUP, population_size=GROUP
    )


def by_nsga3(scorer: Any, evaluations: int, seed: int, ends: Ends) -> Trials:
    """NSGA-III, Optuna's: the same with niches around reference directions in place of crowding.

    Source: Deb and Jain 2014, "An Evolutionary Many-Objective Optimization Algorithm".
    """
    return _by_optuna(
        scorer, evaluations, seed, ends, "NSGAIIISampler", GROUP, population_size=GROUP
    )


def by_tpe(scorer: Any, evaluations: int, seed: int, ends: Ends) -> Trials:
    """Tree-structured Parzen estimator for several objectives, Optuna's: good is what dominates.

    Source: Ozaki et al. 2022, "Multiobjective Tree-Structured Parzen Estimator".
    """
    options = {"n_startup_trials": STARTUP, "multivariate": True}
    return _by_optuna(scorer, evaluations, seed, ends, "TPESampler", 1, **options)


def by_gp(scorer: Any, evaluations: int, seed: int, ends: Ends) -> Trials:
    """A Gaussian process for each task, and the numbers of largest log expected hypervolume improvement.

    Optuna's GPSampler; it treats scores as noisy, which subsets are.
    Sources: Daulton et al. 2020, "Differentiable Expected Hypervolume Improvement"; Ament et al. 2023,
    "Unexpected Improvements to Expected Improvement", for its logarithm.
    """
    return _by_optuna(scorer, evaluations, seed, ends, "GPSampler", 1)


# ------------------------------------------------------------------------------------------- MM-MO

BATCH, PROPOSED, ELITE = 5, 10, 5
MOST_TASKS = 3
ASKED = (
    2  # of the proposals; the others cross the same with other mutants, since a GP's take seconds
)


def mm_mo(scorer: Any, evaluations: int, seed: int, ends: Ends) -> Trials:
    """MM-MO: Bayesian optimisation of a density and a weight per expert, with -||theta - theta_0||_1 as one
    more objective, against over-fitting.

    Ten random recipes first. Then GPs propose two by the expected hypervolume improvement; each is crossed
    five times, at rate 1/2, with a mutant a + (b - c) / 2 of the five best by the sum of scores; of these ten
    the five that are known least are scored, on one subset. In the paper all ten come from the GPs.
    Source: Li et al. 2024, "It's Morphing Time: Unleashing the Potential of Multiple LLMs via Multi-objective
    Optimization" (arXiv 2407.00487). Theirs merges by DARE-TIES; this by TIES that adds, as in
    ``rivals.cmaes_densities``, so that the same recipe is the same model. Known least is, for one kernel,
    what is farthest from all that was scored: see ``uncertainty``.

    From four tasks on the GPs see the mean of the scores and the 1-norm: with five objectives the boxes of
    the expected hypervolume improvement take tens of gigabytes.
    """
    out, n, rng = Trials(scorer, evaluations, ends), scorer.n_models, np.random.default_rng(seed)
    box, many = Box(scorer, blocks=1, members=n), out.n_tasks > MOST_TASKS
    tried, worth = np.empty((0, 2 * n)), np.empty(0)

    def path_of(x: np.ndarray) -> Path:
        scales, densities = x.reshape(2, 1, n).repeat(len(box.places), axis=1)  # (P, N) each
        return path_of_densities(scales, BOUNDS[0] + densities * np.ptp(BOUNDS), box.places)

    n_objectives = 1 + (1 if many else out.n_tasks)
    with optuna_study("GPSampler", seed, n_objectives, n_startup_trials=0) as study:
        import optuna

        space = _numbers(2 * n, 0.0, 1.0)
        asked = rng.uniform(0, 1, (PROPOSED, 2 * n))
        while out.left:
            paths = [path_of(x) for x in asked[: out.left]]
            found = out.ask(paths)
            far = np.array([-_one_norm(scorer, path) for path in paths[: len(found)]])
            rows = np.c_[found.mean(1) if many else found, far]
            for x, values in zip(asked, rows, strict=False):
                params = dict(zip(space, x.tolist(), strict=True))
                trial = optuna.trial.create_trial(
                    params=params, distributions=space, values=values.tolist()
                )
                study.add_trial(trial)
            tried, worth = np.r_[tried, asked[: len(rows)]], np.r_[worth, found.sum(1)]
            if not out.left:
                break
            trials = [study.ask(space) for _ in range(ASKED)]
            proposed = np.array([[t.params[key] for key in space] for t in trials])
            proposed = proposed.repeat(PROPOSED // ASKED, axis=0)
            for trial in trials:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)  # a proposal alone
            elite = tried[np.argsort(-worth, kind="stable")[:ELITE]]
            crossed = np.array([_cross(x, elite, rng) for x in proposed])
            least = np.argsort(-uncertainty(crossed, tried), kind="stable")
            asked = crossed[least[:BATCH]]
    return out


def _cross(x: np.ndarray, elite: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A proposal whose numbers come from a mutant of the elite half of the time."""
    a, b, c = elite[rng.integers(len(elite), size=3)]
    return np.where(rng.uniform(size=len(x)) < 0.5, (a + 0.5 * (b - c)).clip(0, 1), x)


def uncertainty(points: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The variance of a Gaussian process at points (n, D) before any value is known there: (n,) in [0, 1].

    Its kernel is exp(-d^2 / (2 l^2)), l the median distance of the known points (m, D): Rasmussen and
    Williams 2006, Eq. 2.26. MM-MO's Fisher information sum_k 1 / var_k falls with it.
    """
    apart = np.linalg.norm(known[:, None] - known[None], axis=-1)  # (m, m)
    length = np.median(apart[apart > 0]) if apart.any() else 1.0
    own = np.exp(-0.5 * (apart / length) ** 2) + 1e-6 * np.eye(len(known))
    across = np.exp(-0.5 * (np.linalg.norm(points[:, None] - known, axis=-1) / length) ** 2)
    return np.asarray(1 - (across * np.linalg.solve(own, across.T).T).sum(1)).clip(0, 1)


def _one_norm(scorer: Any, path: Path) -> float:
    """||theta - theta_0||_1 of a path whose layers depend on no other; as a mean over weights."""
    pool, total, n = scorer.pool, 0.0, 0
    for step in path:
        base = pool.weights("base", step.layer)
        own = pool.weights(*step, keep=False)
        total += sum(float((own[name] - base[name]).abs().sum()) for name in base)
        n += sum(tensor.numel() for tensor in base.values())
    return total / n
