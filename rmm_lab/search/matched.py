"""Rows of merges that look at inputs: RegMean and least squares, and least squares with tuned weights.

They see no label, but for the last: its weights are tuned on the reward split, as a search's paths are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np

from rmm_lab.engine.calibration import Calibration
from rmm_lab.search import uniform
from rmm_lab.search.problem import Problem
from rmm_lab.search.uniform import Row

Weights = tuple[float, ...]
MERGES = 19  # at most, to tune the weights
TRIED = 200  # inputs of each task, at most, that a merge looks at while weights are tuned
FACTORS = (4.0, 2.0, 2.0**0.5)
MATCHED: dict[str, str] = {  # without anything to tune
    "RegMean": "regmean",
    "least squares, as in PLeaS": "least_squares:readout=0,residual=0,ridge=1e-06",
    "least squares": "least_squares",
}
WEIGHTED = "least squares, weighted"


def rows(problem: Problem) -> Iterator[Row]:
    """The closed forms, whole models each; InputError where the problem has no calibration inputs."""
    if (inputs := problem.pool.calibration) is not None:
        problem.pool.calibration = inputs.anew()  # so that seconds count every fit
    for name, source in MATCHED.items():
        yield closed_row(problem, name, source)
    start = time.perf_counter()
    weights, reward, n = weigh(problem)
    source = source_of(weights)
    yield _row(problem, WEIGHTED, source, "labels", n, start, reward)


def closed_row(problem: Problem, name: str, source: str) -> Row:
    """A closed form without anything to tune."""
    return _row(problem, name, source, "inputs", 0, time.perf_counter(), np.nan)


def source_of(weights: Weights) -> str:
    """The operator with a weight for each task; equal ones are left out."""
    if len(set(weights)) == 1:
        return "least_squares"
    return "least_squares:weights=" + "/".join(f"{w:.3g}" for w in weights)


def weigh(problem: Problem, merges: int = MERGES) -> tuple[Weights, float, int]:
    """Weights of the tasks tuned on the reward split: the weights, their reward in [0, 1], and evaluations.

    The merges that are tried look at no more than ``TRIED`` inputs of each task, for speed; the chosen
    weights are scored once more with all inputs. Each expert is scored too, for what its task may reach.
    """
    pool = problem.pool
    whole = pool.calibration
    own = [uniform.uniform(problem, e, "reward")[i] for i, e in enumerate(pool.names)]

    def score(weights: Weights) -> np.ndarray:
        source = source_of(weights)
        scores = uniform.uniform(problem, source, "reward")
        pool.forget([source])
        return scores

    try:
        if whole.n > TRIED:
            same = {"seed": whole.seed, "split": whole.split, "complete": whole.complete}
            pool.calibration = Calibration(whole.tasks, TRIED, **same)
        tried = tune_weights(score, np.array(own), merges)
    finally:
        pool.calibration = whole
    best = max(tried, key=lambda w: float(tried[w].mean()))
    return best, float(score(best).mean()), len(own) + len(tried) + 1


def tune_weights(
    score: Callable[[Weights], np.ndarray], target: np.ndarray, most: int
) -> dict[Weights, np.ndarray]:
    """Weights of N tasks by a pattern search on a grid of ratios, the task that lacks most first.

    From equal weights: the weight of one task is multiplied by a factor, then divided by it, in the order
    of what the tasks lack to their targets; the first change that raises the mean score is kept. A factor
    that helps no task gives way to the next of ``FACTORS``. Source: Hooke & Jeeves 1961.

    score: weights, which add up to N -> (N,) scores. target: (N,). most: calls of ``score``. Returns all that
    was tried, in order.
    """
    n = len(target)
    best: Weights = (1.0,) * n
    tried = {best: score(best)}
    for factor in FACTORS:
        improved = True
        while improved and len(tried) < most:
            improved = False
            lack = target - tried[best]
            order = [(i, factor) for i in np.argsort(-lack, kind="stable")]
            order += [(i, 1 / factor) for i in np.argsort(lack, kind="stable")]
            for i, times in order:
                moved = np.array(best)
                moved[i] *= times
                moved = moved / moved.sum() * n
                weights = tuple(float(f"{w:.5g}") for w in moved)
                if len(tried) == most or any(np.allclose(weights, w, rtol=0.02) for w in tried):
                    continue
                tried[weights] = score(weights)
                if tried[weights].mean() > tried[best].mean():
                    best, improved = weights, True
                    break
    return tried


def _row(
    problem: Problem,
    name: str,
    source: str,
    sees: str,
    evaluations: int,
    start: float,
    reward: float,
) -> Row:
    """A whole model of one source on the test split; the seconds end once its layers are there."""
    path, n = uniform.uniform_path(problem, source), problem.spec.calibration
    for i, step in enumerate(path):
        if i:
            problem.pool.layer(*step, prefix=path[:i])
    seconds = time.perf_counter() - start
    tuned = f", best of {evaluations} on the reward split" if evaluations else ""
    notes = "".join(f"; {note}" for note in problem.pool.calibration.notes)
    setting = f"{source}, at most {n} inputs of each train split{tuned}{notes}"
    row = uniform.path_row(problem, name, setting, path)
    problem.pool.forget([source])
    return Row(name, setting, row.scores, row.plain, sees, evaluations, round(seconds, 2), reward)
