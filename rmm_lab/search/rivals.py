"""Searches without an agent, at the same number of evaluations on the same data subsets.

    random search        a source drawn at each place
    coordinate ascent    one place at a time, with restarts
    TPE                  tree-structured Parzen estimator        Bergstra et al. 2011
    NSGA-II              an evolution of paths                   Deb et al. 2002
    CMA-ES over scales   a scale per place and member            Akiba et al. 2024, parameter space
    CMA-ES over scales   TIES with a scale and a density per     the same, as they have it
      and densities      place and expert
    CMA-ES over orders   which experts' layers run, in a row     Akiba et al. 2024, data-flow space
    natural niches       an archive of scales, crossed           Abrantes et al. 2025
    large-neighbourhood  the scales of a block of places, drawn  Shaw 1998, Ropke & Pisinger 2006
      search             anew around the best so far

Each begins with the uniform path of every source, which any user has, on the first subsets, for up to a
tenth of its evaluations. All score on the subsets of the reward split, which come in turn. The same seed
gives the same search, but for one that ends at a ``Deadline``.

The first four choose among the agent's sources at each place, without skip and back: paths with them are
worse on average.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import cycle, repeat
from typing import Any

import numpy as np

from rmm_lab.errors import InputError
from rmm_lab.operators import OperatorSpec
from rmm_lab.reward import Path, Step, parse_path, path_text, places_of
from rmm_lab.search.budget import Deadline, Scored, uniform_paths
from rmm_lab.search.finalists import rewards, shortlist
from rmm_lab.search.layer_scales import BOUNDS, MEANS, SEEDS, Evolution, path_of_scales
from rmm_lab.search.proposals import Neighbourhoods, crossover, draw_parents, fittest

GROUP = 20  # evaluations that share a data subset, as the agent's episodes of one update do
STARTUP = 40  # evaluations before TPE models anything, the uniform paths among them
ANSWERS = 20  # of a search over scales, that may be chosen from
LAST = 10  # evaluations at the end of CMA-ES over orders that score the mean of what it found
SCALES = (0.3, 0.4, 0.5, 0.6, 0.8)  # one scale for all, tried before the scales evolve
THIN = 0.05  # the smallest density of an expert's task vector
REPEATS = 2  # how often a path of CMA-ES over orders can take each expert's layer
ARCHIVE = 10  # scales that natural niches keep
MEAN = 0.25  # of a layer's number at the start of CMA-ES over orders: above 0 it runs, below not


# ------------------------------------------------------------------------------ paths and their scores


def random_path(scorer: Any, rng: np.random.Generator) -> Path:
    """A source drawn uniformly at each place."""
    sources = scorer.sources
    return tuple(Step(sources[rng.integers(len(sources))], k) for k in places_of(scorer))


# Of a scorer, the number of evaluations or a deadline in their place, and a seed.
Search = Callable[[Any, int | Deadline, int], Scored]


# ---------------------------------------------------------------------------------- plain searches


def random_search(scorer: Any, evaluations: int | Deadline, seed: int) -> Scored:
    """The uniform paths, then paths with a source drawn uniformly at each place; subsets come in turn."""
    rng, out = np.random.default_rng(seed), Scored(scorer, evaluations)
    subsets = cycle(range(scorer.n_subsets))
    while out.left:
        out.score([random_path(scorer, rng) for _ in range(min(GROUP, out.left))], subsets)
    return out


def coordinate_ascent(scorer: Any, evaluations: int | Deadline, seed: int) -> Scored:
    """Improve the best uniform path one place at a time; go on from a random path when nothing helps.

    A sweep visits all places in random order on one data subset, so that like is compared with like, and
    takes at each the best of all sources. After a sweep without a change comes a fresh start; each sweep
    takes the next subset.
    """
    rng, out = np.random.default_rng(seed), Scored(scorer, evaluations)
    start = max(range(len(out.known)), key=lambda i: (out.known[i], out[i][0]), default=0)
    path, sweep, changed = uniform_paths(scorer)[start], 0, True
    while out.left:
        subset = sweep % scorer.n_subsets
        if sweep:
            path = path if changed else random_path(scorer, rng)
            [best] = out.score([path], [subset])
        else:  # the path has been scored on this subset
            best = out[start][1]
        sweep, changed = sweep + 1, False
        for place in rng.permutation(len(path)):
            others = [
                (*path[:place], step, *path[place + 1 :])
                for source in rng.permutation(len(scorer.sources))
                if (step := Step(scorer.sources[source], path[place].layer)) != path[place]
            ]
            for other, value in zip(others, out.score(others, repeat(subset)), strict=False):
                if value > best:
                    best, path, changed = value, other, True
    return out


# ------------------------------------------------------------------------------- searches of Optuna


def tpe(scorer: Any, evaluations: int | Deadline, seed: int) -> Scored:
    """Tree-structured Parzen estimator, Optuna's: sources that were frequent in good paths come again.

    ``STARTUP`` evaluations (the uniform paths, then random ones) come first. Twenty evaluations in a row
    share a subset. Source: Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization", Sec. 4.
    """
    options = {"n_startup_trials": STARTUP, "multivariate": True}
    return _by_optuna(scorer, evaluations, seed, 1, "TPESampler", options)


def nsga2(scorer: Any, evaluations: int | Deadline, seed: int) -> Scored:
    """NSGA-II, Optuna's: 20 paths a generation, crossed and mutated; one generation on one subset.

    It has one objective, the mean reward, although it could have one for each task: the final choice is by
    the mean, and a budget of 35 generations is not to be spent on the rest of a Pareto front.
    Source: Deb et al. 2002, "A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II".
    """
    options = {"population_size": GROUP}
    return _by_optuna(scorer, evaluations, seed, GROUP, "NSGAIISampler", options)


@contextmanager
def optuna_study(sampler: str, seed: int, n_objectives: int, **options: Any) -> Iterator[Any]:
    """A study that maximises so many objectives, without Optuna's news; InputError without the library."""
    try:
        import optuna
    except ImportError as error:
        raise InputError(
            f"search: expected the library optuna, found none ({error}); install it with "
            "pip install -e '.[search]'"
        ) from error
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            draws = getattr(optuna.samplers, sampler)(seed=seed % SEEDS, **options)
            yield optuna.create_study(directions=["maximize"] * n_objectives, sampler=draws)
    finally:
        optuna.logging.set_verbosity(verbosity)


def _by_optuna(
    scorer: Any,
    evaluations: int | Deadline,
    seed: int,
    batch: int,
    sampler: str,
    options: dict[str, Any],
) -> Scored:
    """A study of one categorical choice for each place, ``batch`` paths asked for at a time."""
    with optuna_study(sampler, seed, 1, **options) as study:
        from optuna.distributions import CategoricalDistribution

        one = CategoricalDistribution(range(len(scorer.sources)))
        choices: dict[str, Any] = {str(k): one for k in places_of(scorer)}
        out = Scored(scorer, evaluations)
        for number, value in enumerate(out.known):  # the uniform paths
            study.enqueue_trial(dict.fromkeys(choices, number))
            study.tell(study.ask(choices), value)
        while out.left:
            n = min(batch - len(out) % batch, out.left)
            trials = [study.ask(choices) for _ in range(n)]
            paths = [
                tuple(Step(scorer.sources[t.params[key]], int(key)) for key in choices)
                for t in trials
            ]
            subset = len(out) // GROUP % scorer.n_subsets
            for trial, value in zip(trials, out.score(paths, repeat(subset)), strict=True):
                study.tell(trial, value)
    return out


# ------------------------------------------------------------------------- a scale per place and member


def starts_of(out: Scored) -> list[tuple[float, np.ndarray]]:
    """(reward, scales (P, M)) of what is known at the start: the members, then ``SCALES`` for all experts.

    A member is a scale of 1 for itself and of 0 for the others. Scores the path of each of ``SCALES``.
    """
    scorer, members = out.scorer, out.scorer.members
    places, n = places_of(scorer), scorer.n_models
    worth = dict(zip(scorer.sources, out.known, strict=False))
    known = [
        (worth[member], np.tile(np.eye(len(members))[i], (len(places), 1)))
        for i, member in enumerate(members)
        if member in worth
    ]
    equal = np.repeat([1.0, 0.0], [n, len(members) - n])
    tried = [np.tile(scale * equal, (len(places), 1)) for scale in SCALES]
    values = out.score([path_of_scales(scales, places) for scales in tried], repeat(0))
    return [*known, *zip(values, tried, strict=False)]


def _best(known: Sequence[tuple[float, np.ndarray]]) -> np.ndarray:
    return max(known, key=lambda pair: pair[0])[1]


def _answer(out: Scored, found: Iterable[np.ndarray]) -> None:
    """Let the final choice be among these scales, each ((P, M) or (P * M,)), the best first."""
    paths = (path_of_scales(scales, places_of(out.scorer)) for scales in found)
    out.answers = list(dict.fromkeys(paths))


def cmaes_scales(scorer: Any, evaluations: int | Deadline, seed: int) -> Scored:
    """CMA-ES over a scale for each place and member: models between and beyond the experts.

    After the uniform paths come ``SCALES``, one for all experts and places; the best of these and of the
    members is the first mean. A generation shares a subset.
    Source: Akiba et al. 2024, "Evolutionary Optimization of Model Merging Recipes", parameter space; they
    evolve densities beside the weights, see ``cmaes_densities``.
    """
    out = Scored(scorer, evaluations)
    known = starts_of(out)
    if out.left:
        evolution = Evolution(_best(known).ravel(), BOUNDS, seed)
        _evolve(out, evolution, lambda scales: path_of_scales(scales, places_of(scorer)))
        _answer(out, evolution.answers(ANSWERS))
    return out


def cmaes_densities(scorer: Any, evaluations: int | Deadline, seed: int) -> Scored:
    """CMA-ES over a scale and a density for each place and expert, of TIES with merge=sum.

    The best expert, or the best of ``SCALES`` at the middle density, is the first mean. A generation shares a
    subset. Merges that look at inputs take no part.
    Source: Akiba et al. 2024, parameter space. Theirs drop entries at random before TIES (DARE); these trim,
    so that a small change of a density is a small change of the model.
    """
    out, places, n = Scored(scorer, evaluations), places_of(scorer), scorer.n_models
    middle = np.full((len(places), n), sum(BOUNDS) / 2)

    def path_of(numbers: np.ndarray) -> Path:
        scales, densities = numbers.reshape(2, len(places), n)
        return path_of_densities(scales, densities, places)

    tried = [np.stack([np.full_like(middle, scale), middle]) for scale in SCALES]
    values = out.score([path_of(numbers) for numbers in tried], repeat(0))
    if out.left:
        experts = [np.tile(row, (len(places), 1)) for row in np.eye(n)]  # alone and whole
        alone = [np.stack([scales, np.full_like(middle, BOUNDS[1])]) for scales in experts]
        best = _best([*zip(out.known, alone, strict=False), *zip(values, tried, strict=True)])
        evolution = Evolution(best.ravel(), BOUNDS, seed)
        _evolve(out, evolution, path_of)
        out.answers = list(dict.fromkeys(map(path_of, evolution.answers(ANSWERS))))
    return out


def path_of_densities(scales: np.ndarray, densities: np.ndarray, places: Sequence[int]) -> Path:
    """The path of TIES with these numbers (P, N), both within ``BOUNDS``, rounded to 3 digits.

    A density's number runs over the bounds as the density from ``THIN`` to 1.
    """
    low, high = BOUNDS
    shares = THIN + (1 - THIN) * (densities - low) / (high - low)  # (P, N) in [THIN, 1]
    steps = []
    for k, scale, share in zip(places, scales.round(3) + 0.0, shares.round(3), strict=True):
        own = {"scale": tuple(scale.tolist()), "density": tuple(share.tolist())}
        steps.append(Step(OperatorSpec.of("ties", {"merge": "sum", **own}).name, k))
    return tuple(steps)


def natural_niches(scorer: Any, evaluations: int | Deadline, seed: int) -> Scored:
    """An archive of scales: parents compete for tasks and look for partners that are good at others.

    The archive begins with what CMA-ES over scales knows at its start. A child of two parents joins it, and
    the least fit leaves once there are more than ``ARCHIVE``. For each ``GROUP`` evaluations comes the next
    subset: the archive is scored on it first, so that all in it are compared on the same examples.
    Source: Abrantes, Lange and Tang 2025, "Competition and Attraction Improve Model Fusion" (M2N2). Theirs
    compete for examples and cross weights: here for tasks, whose scores a search sees, and scales.
    """
    out = Scored(scorer, evaluations)
    evolve_niches(out, out.left, seed)
    return out


def evolve_niches(out: Scored, evaluations: int, seed: int) -> list[Path]:
    """What ``natural_niches`` does after the uniform paths, for so many evaluations; its archive, best first.

    The answers of ``out`` are the archive's mean and then the archive.
    """
    scorer, rng, last = out.scorer, np.random.default_rng(seed), max(0, out.left - evaluations)
    places = places_of(scorer)
    archive, turn = [scales for _, scales in starts_of(out)], 0

    def score(scales: Sequence[np.ndarray]) -> list[np.ndarray]:
        n = len(out)
        out.score([path_of_scales(s, places) for s in scales], repeat(turn % scorer.n_subsets))
        return out.by_task[n:]

    while out.left > last:
        turn, end = turn + 1, max(last, out.left - GROUP)
        niches = score(archive)
        while out.left > end:
            a, b = draw_parents(np.array(niches), rng)
            child = crossover(archive[a], archive[b], rng)
            archive, niches = [*archive, child], [*niches, *score([child])]
            kept = fittest(np.array(niches), ARCHIVE)
            archive, niches = [archive[i] for i in kept], [niches[i] for i in kept]
    if not turn:
        return []
    own = {path_text(path_of_scales(scales, places)): scales for scales in archive}
    ranked = shortlist((pair for pair in out if pair[0] in own), ANSWERS)
    _answer(out, [np.mean(archive, axis=0), *(own[text] for text in ranked)])
    return [path_of_scales(own[text], places) for text in ranked]


def neighbourhood_search(scorer: Any, evaluations: int | Deadline, seed: int) -> Scored:
    """Large-neighbourhood search: draw the scales of a block of places anew, keep what is better.

    It starts from the best that CMA-ES over scales knows at its start. For each ``GROUP`` evaluations comes
    the next subset: the incumbent is scored on it first, so that it is compared on the same examples.
    Sources: Shaw 1998, "Using Constraint Programming and Local Search Methods to Solve Vehicle Routing
    Problems"; Ropke and Pisinger 2006, "An Adaptive Large Neighborhood Search Heuristic for the Pickup and
    Delivery Problem with Time Windows", for what adapts. It accepts by hill climbing, not by annealing.
    """
    out, places = Scored(scorer, evaluations), places_of(scorer)
    known, turn = starts_of(out), 0
    if not out.left:
        return out
    incumbent, ends = _best(known), []
    moves = Neighbourhoods(len(places), seed)
    while out.left:
        turn, last = turn + 1, max(0, out.left - GROUP)
        subset = turn % scorer.n_subsets
        [best] = out.score([path_of_scales(incumbent, places)], [subset])
        while out.left > last:
            drawn = moves.draw(incumbent)
            [value] = out.score([path_of_scales(drawn, places)], [subset])
            moves.tell(value - best)
            if value > best:
                incumbent, best = drawn, value
        moves.settle()
        ends.append(incumbent)
    _answer(out, [np.mean(ends[-MEANS:], axis=0), *reversed(ends[-ANSWERS:])])
    return out


# ------------------------------------------------------------------------------- CMA-ES over orders


def cmaes_order(scorer: Any, evaluations: int | Deadline, seed: int) -> Scored:
    """CMA-ES over which layers of the experts run, in a fixed order: unmerged layers in a new sequence.

    All layers of the first expert stand in a row, then those of the next, and all of that ``REPEATS`` times:
    T places, each with a number, and a layer runs where it is above 0. Of more than 2 L such layers the
    largest numbers win. A T5's encoder layers run before its decoder's. The stem is the first operator's,
    the base's if there is none. The first mean is the expert whose uniform path was best.
    Source: Akiba et al. 2024, data-flow space; the matrix W that scales a layer's input by the pair of
    layers that it stands between is left out, so that a path is a model of the base's architecture.

    Up to ``LAST`` evaluations at the end, each on another subset, go to the mean that it arrived at. A mean
    of means, as of scales, would be no answer: between two orders lies a third, of other layers.
    """
    out = Scored(scorer, evaluations)
    if not out.left:
        return out
    best = int(np.argmax(out.known[: scorer.n_models]))
    mean = np.full((REPEATS, scorer.n_models, scorer.n_layers), -MEAN)
    mean[0, best] = MEAN

    def path_of(numbers: np.ndarray) -> Path:
        return path_of_order(scorer, numbers)

    evolution = Evolution(mean.ravel(), None, seed)
    last = min(LAST, scorer.n_subsets, out.left // 10)
    _evolve(out, evolution, path_of, last)
    subsets = ((evolution.generation + 1 + i) % scorer.n_subsets for i in range(last))
    out.score([path_of(evolution.latest)] * last, subsets)
    return out


def path_of_order(scorer: Any, numbers: np.ndarray) -> Path:
    """The path of CMA-ES over orders, from the number of each place: ((REPEATS * N * L),)."""
    n, n_layers = scorer.n_models, scorer.n_layers
    experts = scorer.sources[:n]
    slots = [Step(e, k) for _ in range(REPEATS) for e in experts for k in range(n_layers)]
    stack_of = {k: s for s, stack in enumerate(scorer.stacks) for k in stack}
    largest = np.argsort(-numbers, kind="stable")[: 2 * n_layers]
    on = [slots[t] for t in sorted(largest) if numbers[t] > 0]
    stem = (Step(scorer.sources[n], -1),) if scorer.chooses_stem and len(scorer.sources) > n else ()
    return (*stem, *sorted(on, key=lambda step: stack_of[step.layer]))  # stable: otherwise in order


def _evolve(
    out: Scored, evolution: Evolution, path_of: Callable[[np.ndarray], Path], keep: int = 0
) -> None:
    """CMA-ES until ``keep`` evaluations are left; a generation shares a subset.

    The library cmaes, which Optuna's own CMA-ES is built on: here a generation is asked for as a whole, its
    start is a vector, and nothing is kept of older trials.
    """
    while out.left > keep:
        asked = evolution.ask(out.left - keep)
        subset = evolution.generation % out.scorer.n_subsets
        evolution.tell(asked, out.score(list(map(path_of, asked)), repeat(subset)))


SEARCHES: dict[str, Search] = {
    "random search": random_search,
    "coordinate ascent": coordinate_ascent,
    "TPE": tpe,
    "NSGA-II": nsga2,
    "CMA-ES over scales": cmaes_scales,
    "CMA-ES over scales and densities": cmaes_densities,
    "CMA-ES over orders": cmaes_order,
    "natural niches": natural_niches,
    "large-neighbourhood search": neighbourhood_search,
}
OF_EXPERTS = ("CMA-ES over orders", "CMA-ES over scales and densities")  # that take these alone


# ------------------------------------------------------------------------------- what they found


def whole(scorer: Any, text: str) -> float:
    """The reward in [0, 1] of a path, given as text, on the whole reward split."""
    return rewards(scorer, [(parse_path(text), None)])[0]


def curve_of(
    scorer: Any, scored: Sequence[tuple[str, float]], every: int = 50
) -> Iterator[dict[str, Any]]:
    """Every so many evaluations and at the end: the path with the best scores so far, on the whole split.

    Yields ``evaluations`` and ``reward_split`` in %; the path is the first of the ``shortlist``. These scores
    serve the plot, and no search sees them; a path that is chosen several times is scored once.
    """
    worth = cache(lambda text: whole(scorer, text))
    for n in sorted({*range(every, len(scored), every), len(scored)}):
        [best] = shortlist(scored[:n], 1)
        yield {"evaluations": n, "reward_split": round(100 * worth(best), 2)}
