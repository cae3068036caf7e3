"""Fronts without a search: each point of a lattice of weights is a merge by formula.

Each function takes a scorer and weights (W, N), and gives W paths. They look at no score. Points that stand
for one task alone are its expert, of DARE-TIES its expert with dropped entries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from rmm_lab.operators import OperatorSpec
from rmm_lab.reward import Path, Step, places_of
from rmm_lab.search.layer_scales import path_of_scales

Simplex = Callable[[Any, np.ndarray], list[Path]]


def averages(scorer: Any, weights: np.ndarray) -> list[Path]:
    """theta = sum_i w_i theta_i for each row of weights (W, N): the baseline that any front must beat.

    Source: Ramé et al. 2023, "Rewarded Soups" (arXiv 2306.04488); the mixtures of IBCL for preferences.
    """
    places = places_of(scorer)
    return [path_of_scales(np.tile(w, (len(places), 1)), places) for w in weights]


def least_squares(scorer: Any, weights: np.ndarray) -> list[Path]:
    """Layer-wise least squares with a weight for each task, see ``matching``: no labels, but inputs.

    The scorer's pool must have calibration inputs. ``matched.weigh`` searches the same weights for the mean.
    """
    experts, places = scorer.sources[: scorer.n_models], places_of(scorer)
    return [tuple(Step(_matched(w, experts), k) for k in places) for w in weights]


def by_dare_ties(scorer: Any, weights: np.ndarray) -> list[Path]:
    """DARE-TIES with the weights as scales: HM3's parameter step alone (Zhou et al. 2025)."""
    return [tuple(Step(dare_ties(w), k) for k in places_of(scorer)) for w in weights]


def dare_ties(weights: np.ndarray) -> str:
    """The source of Theta(w) for weights (N,): theta_base + sum_k w_k M_k * delta_k.

    M_k is the mask of DARE's drop, rescaled, and of the elected sign. As in Akiba et al. 2024, w weighs what
    the sign is elected from: with all weight on one task, Theta is DARE of its expert.
    """
    scale = tuple(round(float(w), 4) for w in weights)
    return OperatorSpec.of("dare_ties", {"merge": "sum", "scale": scale}, len(scale)).name


def _matched(weights: np.ndarray, experts: tuple[str, ...]) -> str:
    if weights.max() == 1:  # the others' inputs have no say: the expert itself
        return experts[int(weights.argmax())]
    if weights.min() == weights.max():
        return "least_squares"
    least = 1e-3  # the operator takes no 0
    return "least_squares:weights=" + "/".join(
        f"{max(w, least) * len(weights):.4g}" for w in weights
    )
