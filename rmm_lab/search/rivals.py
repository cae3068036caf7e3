"""Searches without an agent, at the same number of evaluations on the same data subsets.

    random search        a source drawn at each place
    coordinate ascent    one place at a time, with restarts
    TPE                  tree-structured Parzen estimator        Bergstra et al. 2011
    NSGA-II              an evolution of paths                   Deb et al. 2002
    CMA-ES over scales   a scale per place and member            Akiba et al. 2024, parameter space
    CMA-ES over orders   which experts' layers run, in a row     Akiba et al. 2024, data-flow space

Each begins with the uniform path of every source, which any user has, on the first subsets, for up to a
tenth of its evaluations. All score on the subsets of the reward split, which come in turn. The same seed
gives the same search.

The first four choose among the agent's sources at each place, without skip and back: paths with them are
worse on average.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import cycle, repeat
from typing import Any

import numpy as np

from rmm_lab.errors import InputError
from rmm_lab.reward import Path, Step, parse_path, path_text, places_of
from rmm_lab.search.finalists import rewards, rounds, shortlist
from rmm_lab.search.layer_scales import BOUNDS, SEEDS, Evolution, path_of_scales

GROUP = 20  # evaluations that share a data subset, as the agent's episodes of one update do
STARTUP = 40  # evaluations before TPE models anything, the uniform paths among them
ANSWERS = 20  # means of CMA-ES over scales that may be chosen from
LAST = 10  # evaluations at the end of CMA-ES over orders that score the mean of what it found
SCALES = (0.3, 0.4, 0.5, 0.6, 0.8)  # one scale for all, tried before the scales evolve
REPEATS = 2  # how often a path of CMA-ES over orders can take each expert's layer
MEAN = 0.25  # of a layer's number at the start of CMA-ES over orders: above 0 it runs, below not


# ------------------------------------------------------------------------------ paths and their scores


def uniform_paths(scorer: Any) -> list[Path]:
    """The path of each source, everywhere: N experts and M operators, in the order of the sources."""
    return [tuple(Step(source, k) for k in places_of(scorer)) for source in scorer.sources]


def random_path(scorer: Any, rng: np.random.Generator) -> Path:
    """A source drawn uniformly at each place."""
    sources = scorer.sources
    return tuple(Step(sources[rng.integers(len(sources))], k) for k in places_of(scorer))


class Scored(list[tuple[str, float]]):
    """(path as text, reward in [0, 1]) of each evaluation in order, the uniform paths first.

    ``known``: the mean reward of each of these. ``answers``: what a search arrived at, the best first; these
    need not have been scored. ``left``: what is left of the budget of ``evaluations``.
    """

    def __init__(self, scorer: Any, evaluations: int) -> None:
        super().__init__()
        self.scorer, self.left = scorer, evaluations
        self.answers: list[Path] = []
        paths = uniform_paths(scorer)
        values = [
            self.score(paths, repeat(subset))
            for subset in range(rounds(evaluations, len(paths), scorer.n_subsets))
        ]
        scored = [[own[i] for own in values if i < len(own)] for i in range(len(paths))]
        self.known = [float(np.mean(own)) for own in scored if own]

    def score(self, paths: Sequence[Path], subsets: Iterable[int]) -> list[float]:
        """The rewards of paths, each on its subset, as far as the budget goes."""
        wanted = list(zip(paths[: self.left], subsets, strict=False))
        values = rewards(self.scorer, wanted)
        self.extend(zip((path_text(path) for path, _ in wanted), values, strict=True))
        self.left -= len(values)
        return values


Search = Callable[[Any, int, int], Scored]  # of a scorer, the number of evaluations, and a seed


# ---------------------------------------------------------------------------------- plain searches


def random_search(scorer: Any, evaluations: int, seed: int) -> Scored:
    """The uniform paths, then paths with a source drawn uniformly at each place; subsets come in turn."""
    rng, out = np.random.default_rng(seed), Scored(scorer, evaluations)
    drawn = [random_path(scorer, rng) for _ in range(out.left)]
    out.score(drawn, cycle(range(scorer.n_subsets)))
    return out


def coordinate_ascent(scorer: Any, evaluations: int, seed: int) -> Scored:
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


def tpe(scorer: Any, evaluations: int, seed: int) -> Scored:
    """Tree-structured Parzen estimator, Optuna's: sources that were frequent in good paths come again.

    ``STARTUP`` evaluations (the uniform paths, then random ones) come first. Twenty evaluations in a row
    share a subset. Source: Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization", Sec. 4.
    """
    options = {"n_startup_trials": STARTUP, "multivariate": True}
    return _by_optuna(scorer, evaluations, seed, 1, "TPESampler", options)


def nsga2(scorer: Any, evaluations: int, seed: int) -> Scored:
    """NSGA-II, Optuna's: 20 paths a generation, crossed and mutated; one generation on one subset.

    It has one objective, the mean reward, although it could have one for each task: the final choice is by
    the mean, and a budget of 35 generations is not to be spent on the rest of a Pareto front.
    Source: Deb et al. 2002, "A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II".
    """
    options = {"population_size": GROUP}
    return _by_optuna(scorer, evaluations, seed, GROUP, "NSGAIISampler", options)


def _by_optuna(
    scorer: Any, evaluations: int, seed: int, batch: int, sampler: str, options: dict[str, Any]
) -> Scored:
    """A study of one categorical choice for each place, ``batch`` paths asked for at a time."""
    try:
        import optuna
    except ImportError as error:
        raise InputError(
            f"search: expected the library optuna, found none ({error}); install it with "
            "pip install -e '.[search]'"
        ) from error
    one = optuna.distributions.CategoricalDistribution(range(len(scorer.sources)))
    choices: dict[str, Any] = {str(k): one for k in places_of(scorer)}
    out, verbosity = Scored(scorer, evaluations), optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # without its news of each study
    try:
        draws = getattr(optuna.samplers, sampler)(seed=seed % SEEDS, **options)
        study = optuna.create_study(direction="maximize", sampler=draws)
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
    finally:
        optuna.logging.set_verbosity(verbosity)
    return out


# ------------------------------------------------------------------------------------------ CMA-ES


def cmaes_scales(scorer: Any, evaluations: int, seed: int) -> Scored:
    """CMA-ES over a scale for each place and member: models between and beyond the experts.

    After the uniform paths come ``SCALES``, one for all experts and places; the best of these and of the
    members is the first mean. A generation shares a subset.
    Source: Akiba et al. 2024, "Evolutionary Optimization of Model Merging Recipes", parameter space; they
    evolve TIES' densities beside the weights.
    """
    places, n, members = places_of(scorer), scorer.n_models, scorer.members

    def path_of(scales: np.ndarray) -> Path:
        return path_of_scales(scales, places)

    out = Scored(scorer, evaluations)
    worth = dict(zip(scorer.sources, out.known, strict=False))
    # A member is a scale of 1 for itself and of 0 for the others.
    known = [
        (worth[member], np.tile(np.eye(len(members))[i], len(places)))
        for i, member in enumerate(members)
        if member in worth
    ]
    equal = np.repeat([1.0, 0.0], [n, len(members) - n])
    tried = [np.tile(scale * equal, len(places)) for scale in SCALES]
    known += zip(out.score(list(map(path_of, tried)), repeat(0)), tried, strict=False)
    if out.left:
        evolution = Evolution(max(known, key=lambda pair: pair[0])[1], BOUNDS, seed)
        _evolve(out, evolution, path_of)
        out.answers = list(dict.fromkeys(map(path_of, evolution.answers(ANSWERS))))
    return out


def cmaes_order(scorer: Any, evaluations: int, seed: int) -> Scored:
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
    "CMA-ES over orders": cmaes_order,
}


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
