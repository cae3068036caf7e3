"""New scales from those that are known: the children of natural niches, blocks of places drawn anew.

Scales are (P, M): of each place and member, see ``layer_scales``. Nothing here scores anything.
"""

from __future__ import annotations

import numpy as np

from rmm_lab.search.layer_scales import BOUNDS, SIGMA

MUTATION = 0.1  # standard deviation, of a child's scales
SIZES = (1, 2, 4, 8)  # places in a block that is drawn anew
WIDTHS = (0.02, 0.5)  # bounds of the standard deviation of draws around the incumbent
REACTION = 0.2  # how far a move's weight goes to its last rate of success
STEP = 1.5  # what the width is multiplied by after a success


# ----------------------------------------------------------------------------------- natural niches


def shared(scores: np.ndarray) -> np.ndarray:
    """F[a, j] = S[a, j] / sum_a S[a, j]: a task's worth is shared by all that score on it.

    scores: S, (A, N) in [0, 1], of A scales and N tasks -> F, (A, N). An unsolved task is worth nothing.
    A row's sum is its fitness. Source: Abrantes et al. 2025, with alpha 1.
    """
    total = scores.sum(0)
    return scores / np.where(total > 0, total, 1)


def fittest(scores: np.ndarray, n: int) -> list[int]:
    """The rows of the n fittest, in order: the least fit leaves, of equals the oldest, then the next.

    scores: (A, N), as in ``shared``; what is shared changes with each that leaves.
    """
    kept = list(range(len(scores)))
    while len(kept) > n:
        del kept[int(shared(scores[kept]).sum(1).argmin())]
    return kept


def draw_parents(scores: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """Two rows: the first a by fitness, the second b by attraction, sum_j max(0, F[b, j] - F[a, j]).

    scores: (A, N), as in ``shared``. Where nobody attracts a, its partner is drawn by fitness; where nobody
    scores, each is as likely. Source: Abrantes et al. 2025.
    """
    niches = shared(scores)
    fitness = niches.sum(1)
    a = _draw(fitness, rng)
    attraction = np.maximum(0, niches - niches[a]).sum(1)
    return a, _draw(attraction if attraction.any() else fitness, rng)


def _draw(weights: np.ndarray, rng: np.random.Generator) -> int:
    """A row with a probability in proportion to its weight."""
    total = weights.sum()
    return int(rng.choice(len(weights), p=weights / total if total > 0 else None))


def crossover(first: np.ndarray, second: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A child of two scales (P, M), within ``BOUNDS``, from a random split, ratio and mutation.

    Source: Abrantes et al. 2025, who mutate only what starts from random weights. They interpolate on the
    sphere; between models with one base, whose angle is small, that is a straight line.
    """
    split, ratio = rng.integers(len(first)), rng.uniform()
    child = mix(first, second, int(split), ratio) + rng.normal(0, MUTATION, first.shape)
    return child.clip(*BOUNDS)


def mix(first: np.ndarray, second: np.ndarray, split: int, ratio: float) -> np.ndarray:
    """(1 - ratio) first + ratio second before the place ``split``, the other way round from there on."""
    share = np.where(np.arange(len(first)) < split, ratio, 1 - ratio)[:, None]  # (P, 1)
    return (1 - share) * first + share * second


# ------------------------------------------------------------------------ large-neighbourhood search


class Neighbourhoods:
    """Draws the scales of a random block of neighbouring places anew, in ways that adapt to their success.

    Args:
        n_places: P. seed: of the draws.

    The block's size (one of ``SIZES``) and what fills it are drawn by weights: scales around the incumbent,
    or a member's. After a segment a weight w that led to s successes in n draws becomes (1 - r) w + r s / n,
    r being ``REACTION``: Ropke & Pisinger 2006, Sec. 3.4, where a success is worth 1. The width of draws
    around the incumbent follows the 1/5 success rule: Rechenberg 1973, as in Kern et al. 2004.
    """

    def __init__(self, n_places: int, seed: int) -> None:
        self.rng, self.width = np.random.default_rng(seed), SIGMA
        self.sizes = [size for size in SIZES if size <= n_places]
        self.weights = [np.ones(len(self.sizes)), np.ones(2)]  # of sizes, of fillings
        self._forget()

    def _forget(self) -> None:
        self.draws = [np.zeros_like(w) for w in self.weights]
        self.successes = [np.zeros_like(w) for w in self.weights]

    def draw(self, incumbent: np.ndarray) -> np.ndarray:
        """New scales (P, M), within ``BOUNDS``, that differ from the incumbent's in one block."""
        (n_places, n_members), rng = incumbent.shape, self.rng
        self.move = [_draw(w, rng) for w in self.weights]
        size = self.sizes[self.move[0]]
        first = rng.integers(n_places - size + 1)
        block, drawn = slice(first, first + size), incumbent.copy()
        if self.move[1]:
            drawn[block] = np.eye(n_members)[rng.integers(n_members)]
        else:
            drawn[block] += rng.normal(0, self.width, (size, n_members))
        return drawn.clip(*BOUNDS)

    def tell(self, gain: float) -> None:
        """What was drawn last has this much more reward than the incumbent: a success, if it is above 0.

        For the width 0 counts as well: what changes no answer was too small a step.
        """
        for kind, i in enumerate(self.move):
            self.draws[kind][i] += 1
            self.successes[kind][i] += gain > 0
        if not self.move[1]:
            factor = STEP if gain >= 0 else STEP**-0.25  # level at one success in five
            self.width = float(np.clip(self.width * factor, *WIDTHS))

    def settle(self) -> None:
        """End a segment."""
        for w, n, s in zip(self.weights, self.draws, self.successes, strict=True):
            w[n > 0] += REACTION * (s[n > 0] / n[n > 0] - w[n > 0])
        self._forget()
