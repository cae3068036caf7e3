"""A Gaussian process over layer paths, and the local search that it guides.

A path is a row of P numbers: at each place (the stem, then each layer) the source taken there. The process
learns from all scores of a search so far what each source is worth at each place, and how much paths that
have many places in common score alike; noise of small subsets averages out over paths. It then proposes
paths near the best ones to score next, and at the end the finalists.

Sources: Rasmussen and Williams 2006, "Gaussian Processes for Machine Learning", Eq. 2.23, 2.24 and 2.30;
Thompson 1933 for drawing what to try; kernels on Hamming distances as in Ru et al. 2020 (CoCaBO).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmm_lab.engine.scorer import Path, own_sources, places_of, steps_of
from rmm_lab.errors import InputError

CENTRES = 4  # best paths around which is searched
DRAWS = 20  # of the posterior for each path that is proposed, at most
SEVERAL = 60  # paths a centre that differ in two to four places, beside all that differ in one
# What a kernel's parts are tried at, in units of the rewards' variance, and in places; noise in rewards.
_LINEAR, _NEAR, _LENGTH, _NOISE = (0.3, 1.0, 3.0), (0.3, 1.0), (2.0, 5.0), (0.02, 0.03)
_SUBSET = 0.02  # how far a subset's rewards lie above or below another's

Scored = tuple[Path, int, float]  # path, subset, reward in [0, 1]


@dataclass(frozen=True)
class Kernel:
    """k(p, q) = linear * same / P + near * exp(-(P - same) / length), with ``same`` equal places of P.

    Besides, scores on one subset have ``subset`` in common, and each has ``noise`` of its own; all but
    ``length`` (in places) are variances of rewards.
    """

    linear: float
    near: float
    length: float
    subset: float
    noise: float

    def between(self, a: Tensor, b: Tensor) -> Tensor:
        """(n, P) and (m, P) source numbers -> (n, m)."""
        return self.of(common(a, b), a.shape[1])

    def of(self, same: Tensor, places: int) -> Tensor:
        """The same from the number of equal places, (n, m) -> (n, m)."""
        return self.linear * same / places + self.near * ((same - places) / self.length).exp()


def common(a: Tensor, b: Tensor) -> Tensor:
    """In how many places paths are equal: (n, P) and (m, P) source numbers -> (n, m)."""
    same = torch.zeros(len(a), len(b), dtype=torch.float64)
    for x, y in zip(a.T, b.T, strict=True):
        same += x[:, None] == y[None]
    return same


class GaussianProcess:
    """The posterior over paths' rewards, given scores.

    Args:
        paths: (n, P) source numbers. subsets: (n,). rewards: (n,) in [0, 1].
        kernel: by default the likeliest of a small grid.
    """

    def __init__(
        self, paths: Tensor, subsets: Tensor, rewards: Tensor, kernel: Kernel | None = None
    ) -> None:
        self.paths, self.prior = paths, float(rewards.mean())
        variance = max(float(rewards.var(correction=0)), 1e-8)
        kernels = [
            Kernel(linear * variance, near * variance, length, _SUBSET**2, noise**2)
            for linear, near, length, noise in itertools.product(_LINEAR, _NEAR, _LENGTH, _NOISE)
        ]
        off = rewards.double() - self.prior  # (n,)
        same = common(paths, paths)  # (n, n), for all kernels alike
        found = [
            self._condition(k, same, subsets, off)
            for k in (kernels if kernel is None else [kernel])
        ]
        self.log_likelihood, self.kernel, self._root, self._weights = max(
            found, key=lambda one: one[0]
        )

    def _condition(
        self, kernel: Kernel, same: Tensor, subsets: Tensor, off: Tensor
    ) -> tuple[float, Kernel, Tensor, Tensor]:
        """Log marginal likelihood, up to a constant (Eq. 2.30), and what predictions need."""
        cov = kernel.of(same, self.paths.shape[1])
        cov += kernel.subset * (subsets[:, None] == subsets[None])
        cov += kernel.noise * torch.eye(len(off), dtype=torch.float64)
        root = torch.linalg.cholesky(cov)  # (n, n)
        weights = torch.cholesky_solve(off[:, None], root)  # (n, 1)
        likelihood = -0.5 * (off @ weights).item() - root.diagonal().log().sum().item()
        return likelihood, kernel, root, weights

    def mean(self, paths: Tensor) -> Tensor:
        """Expected rewards on all data: (m, P) -> (m,), Eq. 2.23."""
        return self.prior + (self.kernel.between(paths, self.paths) @ self._weights).squeeze(1)

    def joint(self, paths: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (m,) and covariance (m, m) of the rewards of (m, P) paths, Eq. 2.23 and 2.24."""
        cross = self.kernel.between(paths, self.paths)  # (m, n)
        mean = self.prior + (cross @ self._weights).squeeze(1)
        known = torch.linalg.solve_triangular(self._root, cross.T, upper=False)  # (n, m)
        return mean, self.kernel.between(paths, paths) - known.T @ known


class Surrogate:
    """What a search has seen, as a Gaussian process that proposes what to see next.

    Args:
        scored: the scores so far; at least one path must take one source at each place.
        places: numbers of the places, -1 for a chosen stem, then the layers.
        n_sources: S.
        seed: of the draws; the same scores and seed give the same proposals.
    """

    def __init__(
        self, scored: Sequence[Scored], places: Sequence[int], n_sources: int, seed: int
    ) -> None:
        self.places, self.n_sources = list(places), n_sources
        self._rng = np.random.default_rng([seed, len(scored)])
        self._paths = torch.tensor([self._row(path) for path, _, _ in scored])  # (n, P)
        subsets = torch.tensor([subset for _, subset, _ in scored])
        rewards = torch.tensor([reward for _, _, reward in scored], dtype=torch.float64)
        self.process = GaussianProcess(self._paths, subsets, rewards)
        whole = self._paths[(self._paths < n_sources).all(1)].unique(dim=0)  # without skips
        if not len(whole):
            whole = torch.arange(n_sources)[:, None].repeat(
                1, len(self.places)
            )  # the uniform paths
        self._best = whole[self.process.mean(whole).argsort(descending=True, stable=True)]

    def propose(self, n: int) -> list[Path]:
        """The path that is best so far, and n - 1 others near the best: Thompson sampling, each once."""
        near = torch.cat([self._best[:CENTRES], self._near()])
        mean, cov = self.process.joint(near)
        root = torch.linalg.cholesky(cov + 1e-8 * torch.eye(len(cov), dtype=torch.float64))
        chosen = [0]
        for _ in range(DRAWS * n):
            if len(chosen) < min(n, len(near)):
                draw = mean + root @ torch.from_numpy(self._rng.standard_normal(len(mean)))
                if (i := int(draw.argmax())) not in chosen:
                    chosen.append(i)
        # Where draw after draw has the same few paths on top, the next best by their means.
        rest = [i for i in mean.argsort(descending=True, stable=True).tolist() if i not in chosen]
        chosen += rest[: min(n, len(near)) - len(chosen)]
        return [self._path(near[i]) for i in chosen]

    def finalists(self, n: int) -> list[Path]:
        """The n paths with the best expected rewards, among those seen and all near the best."""
        paths = torch.cat([self._best, self._near()]).unique(dim=0)
        best = self.process.mean(paths).argsort(descending=True, stable=True)[:n]
        return [self._path(paths[i]) for i in best.tolist()]

    def _near(self) -> Tensor:
        """Paths that differ from a centre in one place (all), in two to four, or cross two centres."""
        found: set[tuple[int, ...]] = set()
        centres = self._best[:CENTRES].numpy()
        n_places = len(self.places)
        for centre in centres:
            for place, source in itertools.product(range(n_places), range(self.n_sources)):
                other = centre.copy()
                other[place] = source
                found.add(tuple(other.tolist()))
            for _ in range(SEVERAL):
                other = centre.copy()
                some = min(n_places, int(self._rng.integers(2, 5)))
                at = self._rng.choice(n_places, some, replace=False)
                other[at] = self._rng.integers(self.n_sources, size=len(at))
                found.add(tuple(other.tolist()))
            mate = centres[int(self._rng.integers(len(centres)))]
            for _ in range(SEVERAL // 2):
                mixed = np.where(self._rng.random(n_places) < 0.5, centre, mate)
                found.add(tuple(mixed.tolist()))
        found -= {tuple(centre.tolist()) for centre in centres}
        return torch.tensor(sorted(found)).reshape(-1, n_places)

    def _row(self, path: Path) -> list[int]:
        """The source of each place; S where it is skipped, taken twice, or takes none of them."""
        at: dict[int, list[int]] = {k: [] for k in self.places}
        for source, k in path:
            at[k].append(self.n_sources if isinstance(source, str) else source)
        return [taken[0] if len(taken) == 1 else self.n_sources for taken in at.values()]

    def _path(self, row: Tensor) -> Path:
        return tuple((int(source), k) for source, k in zip(row, self.places, strict=True))


def surrogate_of(scorer: Any, episodes: Sequence[Mapping[str, Any]], seed: int) -> Surrogate:
    """What all episodes of the scorer's sources, without a penalty, have taught."""
    scored = [
        (path, e["subset"], e["raw_reward"])
        for e in episodes
        if not e["penalised"] and not own_sources(path := steps_of(e["path"], scorer.sources))
    ]
    if not scored:
        raise InputError(
            f"search: expected at least one legal episode in {len(episodes)} before the local search, found "
            "none; raise --episodes, or use --start or --mask-actions"
        )
    return Surrogate(scored, places_of(scorer), len(scorer.sources), seed)
