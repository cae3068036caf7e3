"""Shaping by drift: what it adds, that it sums up to a constant, and that searches take it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmm_lab.env import DynamicAverageReward, MergingEnv
from rmm_lab.errors import InputError
from rmm_lab.search.config import configure
from rmm_lab.search.pipeline import train
from rmm_lab.search.shaping import DriftShaping


class Scorer:
    """Two models and one operator over three layers; drift by the number of layers so far."""

    sources, n_models, n_layers, n_subsets = ("a", "b", "op"), 2, 3, 1
    stacks, task_names, chooses_stem = (range(3),), ["a", "b"], False

    def score(self, path, subset=None):
        return np.array([0.2, 0.6])

    def drift(self, path):
        return np.array([len(path), 3 + 2.0 * sum(step.source == "b" for step in path)])


def made(weight=1.0, gamma=1.0):
    env = DynamicAverageReward(MergingEnv(Scorer()), dar_lambda=0.0, max_episodes=1)
    return DriftShaping(env, weight=weight, gamma=gamma)


def test_a_walk_by_hand():
    """Potentials -(1/2)(d / (1 + d) + e / (1 + e)) times 2: of drifts (0, 3), (1, 3), (2, 5), and 0."""
    env = made(2.0, 0.5)
    env.reset()
    rewards = [env.step(action)[1] for action in (0, 1, 2)]
    potentials = [-3 / 4, -(1 / 2 + 3 / 4), -(2 / 3 + 5 / 6), 0]
    expected = [0.5 * after - before for before, after in itertools.pairwise(potentials)]
    expected[-1] += 0.4  # Eq. 7
    assert rewards == pytest.approx(expected)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=13), st.floats(0.1, 1), st.floats(0, 3))
def test_the_discounted_sum_is_minus_the_first_potential(actions, gamma, weight):
    """Ng et al. 1999: whatever the agent does, penalties and detours included."""
    shaped, plain = made(weight, gamma), made(0.0)
    shaped.reset()
    plain.reset()
    total, discount, done = 0.0, 1.0, False
    for action in itertools.chain(actions, itertools.repeat(0)):
        _, reward, terminated, truncated, _ = shaped.step(action)
        total += discount * (reward - plain.step(action)[1])
        discount *= gamma
        if done := terminated or truncated:
            break
    assert done
    assert total == pytest.approx(weight * (0 + 3 / 4) / 2, abs=1e-9)


def test_rewards_in_info_stay_as_they_are():
    env = made(5.0)
    env.reset()
    for action in (0, 1, 2):
        *_, info = env.step(action)
    assert (info["raw_reward"], info["dar_reward"]) == (pytest.approx(0.4), pytest.approx(0.4))


@pytest.mark.parametrize(("weight", "gamma"), [(-1, 1), (np.nan, 1), (np.inf, 1), (1, 0), (1, 1.1)])
def test_other_weights_and_discounts_are_refused(weight, gamma):
    with pytest.raises(InputError, match="shaping: expected a weight of 0 or more"):
        made(weight, gamma)


def searched(tiny, **options):
    given = {"operators": ("least_squares:ridge=0.01", "ties"), "stem": "agent", "calibration": 8}
    given |= {"observation": "map+cursor+drift", "shaping": 0.5, "episodes": 12, "quiet": True}
    config = configure("agent", **(tiny | given | {"episodes_per_update": 4} | options))
    return train(config, table=False)


def test_a_search_with_drift_is_the_same_with_threads(tiny):
    """And the rewards that it logs are those of Eq. 7 alone."""
    whole = searched(tiny)
    assert searched(tiny, workers=2).episodes == whole.episodes
    plain = searched(tiny, shaping=0.0, observation="map+cursor")
    assert plain.episodes[0] == whole.episodes[0]  # drawn before any update


def test_drift_without_inputs_is_told(tiny):
    options = {"operators": ("ties",), "calibration": 0}
    with pytest.raises(InputError, match="drift: expected calibration inputs"):
        searched(tiny, **options)
    with pytest.raises(InputError, match="drift: expected calibration inputs"):
        searched(tiny, **options, observation="map+cursor")


def test_blocks_drift_as_their_sublayers_do(tiny):
    assert len(searched(tiny, unit="both").episodes) == 12
