"""A scale for each place and member: the models between and beyond these, and CMA-ES over them.

``layer_k = base_k + sum_i scale_{k,i} (member_{i,k} - base_k)`` at each place k, the stem among them where it
is chosen. The members (``LayerPool.members``) are the experts, then merges that look at inputs.

Sources: Ilharco et al. 2022 for the models; Hansen 2016, "The CMA Evolution Strategy: A Tutorial"; Ros and
Hansen 2008 for its separable form, which adapts one variance per number and so learns faster where there
are many; Auger and Hansen 2005 for the larger population after a restart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from rmm_lab.layers import LayerPool
from rmm_lab.reward import Path, Step, parse_path, places_of, split_stem
from rmm_lab.search.finalists import legal, shortlist

BOUNDS = (-0.2, 1.5)  # of a scale: 0 is the base, 1 the expert
SIGMA = 0.2  # initial step size of CMA-ES
MEANS = 10  # generations whose means are averaged at the end
SEEDS = 2**32  # cmaes and Optuna take seeds below this


def path_of_scales(scales: np.ndarray, places: Sequence[int]) -> Path:
    """The path of the scales ((P * M,) or (P, M)) of each place's members, rounded to 3 digits."""
    rows = scales.round(3).reshape(len(places), -1) + 0.0  # (P * M,) -> (P, M); no -0
    return tuple(
        Step("task_arithmetic", k, tuple(row.tolist())) for k, row in zip(places, rows, strict=True)
    )


def scales_of(pool: LayerPool, path: Path, stem: str = "base") -> np.ndarray:
    """The scales whose layers are nearest to those of a path: (P, M), by least squares over all weights.

    A member's layer has scale 1 for itself and 0 for the others, task arithmetic its own scale; only what
    an operator trims or elects is lost. ``path`` has P steps; stem: its stem's source, unless it has one.
    """
    rows = []
    first, steps = split_stem(path, stem)
    for i, step in enumerate(path, start=len(steps) - len(path)):
        names = pool.weights("base", step.layer)
        base, *layers = (
            torch.cat([weights[name].flatten().double() for name in names])  # (D,)
            for weights in (
                *(pool.weights(source, step.layer) for source in ("base", *pool.members)),
                pool.weights(*step, prefix=(first, *steps[: max(0, i)])),
            )
        )
        deltas = torch.stack(layers) - base  # (M + 1, D)
        products = deltas @ deltas.T
        # The normal equations; members that are equal here, or the base itself, share or get nothing.
        inverse = torch.linalg.pinv(products[:-1, :-1], hermitian=True, rtol=1e-9)
        rows.append((inverse @ products[:-1, -1]).numpy())
    return np.stack(rows)


class Evolution:
    """CMA-ES with restarts: once converged, it starts again from its first mean with twice the population.

    Args:
        mean: (D,) to start from. bounds: of each number, or None. seed: of the draws.
        separable: with a diagonal covariance.

    ``runs``: for each beginning the means (D,) after its whole generations. It maximises. Draws depend on
    nothing but the arguments and what was told, so an evolution can be played again.
    """

    def __init__(
        self,
        mean: np.ndarray,
        bounds: tuple[float, float] | None,
        seed: int,
        *,
        separable: bool = False,
    ) -> None:
        import cmaes

        self._kind = cmaes.SepCMA if separable else cmaes.CMA
        self._first, self._seed = mean, seed
        self._limits = None if bounds is None else np.tile(bounds, (len(mean), 1))  # (D, 2)
        self.generation = 0
        self.runs: list[list[np.ndarray]] = []
        self._begin(None)

    def _begin(self, population: int | None) -> None:
        self.runs.append([])
        self._strategy = self._kind(
            mean=self._first.copy(),  # the separable form writes into it
            sigma=SIGMA,
            bounds=self._limits,
            seed=(self._seed + self.generation) % SEEDS,
            population_size=population,
        )

    @property
    def mean(self) -> np.ndarray:
        """(D,), around which it draws next."""
        return self._strategy.mean

    @property
    def latest(self) -> np.ndarray:
        """(D,), the mean after the last whole generation, or its start."""
        return next((run[-1] for run in reversed(self.runs) if run), self.mean)

    def ask(self, most: int) -> list[np.ndarray]:
        """The next generation, (D,) each, or as much of it as is wanted."""
        if self._strategy.should_stop():
            self._begin(2 * self._strategy.population_size)
        self.generation += 1
        return [self._strategy.ask() for _ in range(min(most, self._strategy.population_size))]

    def tell(self, asked: Sequence[np.ndarray], rewards: Sequence[float]) -> None:
        """The rewards of what was asked for; a partial generation is ignored."""
        if len(asked) == self._strategy.population_size:
            self._strategy.tell([(x, -r) for x, r in zip(asked, rewards, strict=True)])
            self.runs[-1].append(self.mean.copy())

    def answers(self, n: int) -> list[np.ndarray]:
        """Up to n vectors (D,) to choose from at the end: the mean of each run's last means, then the means.

        The newest come first. CMA-ES's own answer is its mean, and better than its samples, each of which
        was scored once.
        """
        settled = [np.mean(run[-MEANS:], axis=0) for run in reversed(self.runs) if run]
        means = [mean for run in reversed(self.runs) for mean in reversed(run)]
        return [*settled, *means][:n]


def start_of(scorer: Any, episodes: Sequence[Mapping[str, Any]]) -> Path:
    """The best path so far that takes one source at each place, see ``shortlist``.

    Where no legal episode did: the first expert, everywhere.
    """
    places = list(places_of(scorer))
    whole = [s for s in legal(episodes) if [step.layer for step in parse_path(s[0])] == places]
    best = shortlist(whole, 1)
    return parse_path(best[0]) if best else tuple(Step(scorer.sources[0], k) for k in places)


def start_scales(scorer: Any, episodes: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """The scales (P, M) nearest to the best path so far, within ``BOUNDS``."""
    path = start_of(scorer, episodes)
    return scales_of(scorer.pool, path, getattr(scorer, "stem", "base")).clip(*BOUNDS)


def evolution_of(scorer: Any, episodes: Sequence[Mapping[str, Any]], seed: int) -> Evolution:
    """CMA-ES around the best path, as far as the episodes of the phase ``scales`` have brought it.

    These come after all others; where there are none it stands at its start.
    """
    before = [e for e in episodes if e["phase"] != "scales"]
    rewards = [e["raw_reward"] for e in episodes if e["phase"] == "scales"]
    first = start_scales(scorer, before).ravel()
    evolution = Evolution(first, BOUNDS, seed, separable=True)
    while rewards:
        asked = evolution.ask(len(rewards))
        evolution.tell(asked, rewards[: len(asked)])
        rewards = rewards[len(asked) :]
    return evolution
