"""The Gaussian process over paths against scikit-learn's, and the local search that it guides."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, DotProduct, WhiteKernel

from rmm_lab.search.gaussian_process import GaussianProcess, Kernel, Surrogate

P, S = 5, 3
PLACES = range(-1, P - 1)


def drawn(n: int, seed: int = 0):
    """n random paths as rows (n, P), their subsets and rewards (n,)."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(S, size=(n, P))
    return rows, rng.integers(4, size=n), 0.5 + 0.1 * rng.standard_normal(n)


def one_hot(rows, subsets=None) -> np.ndarray:
    """Paths as (n, P * S) indicators: their products count equal places."""
    flat = np.eye(S)[rows].reshape(len(rows), -1)
    return flat if subsets is None else np.concatenate([flat, np.eye(4)[subsets]], 1)


@pytest.mark.parametrize("length", [2.0, 5.0])
def test_posterior_and_likelihood_are_scikit_learns(length):
    rows, subsets, rewards = drawn(40)
    kernel = Kernel(linear=0.01, near=0.02, length=length, subset=0.0, noise=0.003)
    ours = GaussianProcess(
        torch.from_numpy(rows), torch.from_numpy(subsets), torch.from_numpy(rewards), kernel
    )
    # exp(-h / length) = exp(-d^2 / (2 l^2)) with d^2 = 2 h and l^2 = length, h the places that differ
    theirs = (
        ConstantKernel(0.01 / P) * DotProduct(sigma_0=0)
        + ConstantKernel(0.02) * RBF(length**0.5)
        + WhiteKernel(0.003)
    )
    model = GaussianProcessRegressor(theirs, optimizer=None)
    model.fit(one_hot(rows), rewards - rewards.mean())
    new = drawn(30, seed=1)[0]
    mean, cov = model.predict(one_hot(new), return_cov=True)
    found, joint = ours.joint(torch.from_numpy(new))
    np.testing.assert_allclose(found, mean + rewards.mean(), atol=1e-9)
    np.testing.assert_allclose(ours.mean(torch.from_numpy(new)), found, atol=1e-12)
    np.testing.assert_allclose(joint, cov - 0.003 * np.eye(30), atol=1e-9)  # without new noise
    constant = -0.5 * 40 * np.log(2 * np.pi)
    assert ours.log_likelihood + constant == pytest.approx(model.log_marginal_likelihood_value_)


def test_what_a_subset_adds_is_not_taken_for_a_paths_worth():
    rows = np.array([[0] * P] * 6 + [[1] * P] * 6)
    subsets = np.array([0] * 6 + [1] * 6)  # the second path was only seen on an easy subset
    rewards = np.array([0.5] * 6 + [0.6] * 6)
    kernel = dict(linear=0.001, near=0.001, length=2.0, noise=0.02**2)
    args = [torch.from_numpy(a) for a in (rows, subsets, rewards)]
    gains = []
    for subset in (0.0, 1.0):
        process = GaussianProcess(*args, Kernel(**kernel, subset=subset))
        a, b = process.mean(torch.tensor([[0] * P, [1] * P])).tolist()
        gains.append(b - a)
    assert gains[0] == pytest.approx(0.1, abs=0.03)
    assert abs(gains[1]) < 0.002


def test_the_likeliest_kernel_of_the_grid_is_taken():
    rows, subsets, _ = drawn(60)
    additive = 0.5 + 0.05 * (rows == 1).sum(1)  # nothing but a sum over places
    args = [torch.from_numpy(a) for a in (rows, subsets, additive)]
    process = GaussianProcess(*args)
    best = max(
        GaussianProcess(*args, Kernel(li * v, ne * v, le, 0.02**2, no**2)).log_likelihood
        for v in [float(torch.from_numpy(additive).var(correction=0))]
        for li, ne, le, no in itertools.product((0.3, 1, 3), (0.3, 1), (2.0, 5.0), (0.02, 0.03))
    )
    assert process.log_likelihood == pytest.approx(best)
    assert process.kernel.linear > process.kernel.near


def path_of(row):
    return tuple((int(a), k) for a, k in zip(row, PLACES, strict=True))


def scored_of(n: int, seed: int = 0):
    rows, subsets, rewards = drawn(n, seed)
    return [(path_of(r), int(s), float(v)) for r, s, v in zip(rows, subsets, rewards, strict=True)]


def test_the_same_scores_give_the_same_proposals_and_each_once():
    scored = scored_of(30)
    first = Surrogate(scored, PLACES, S, seed=3)
    paths = first.propose(20)
    assert len(paths) == len(set(paths)) == 20
    assert all([k for _, k in p] == list(PLACES) for p in paths)
    assert all(0 <= a < S for p in paths for a, _ in p)
    assert Surrogate(scored, PLACES, S, seed=3).propose(20) == paths
    assert Surrogate(scored, PLACES, S, seed=4).propose(20) != paths
    # the best so far comes again first: what is compared stands on one subset
    best = max({p for p, _, _ in scored}, key=lambda p: float(mean_of(first, p)))
    assert paths[0] == best


def mean_of(surrogate, path):
    return surrogate.process.mean(torch.tensor([[a for a, _ in path]]))


def test_proposals_are_near_the_best():
    scored = scored_of(60)
    surrogate = Surrogate(scored, PLACES, S, seed=0)
    centres = sorted({p for p, _, _ in scored}, key=lambda p: -float(mean_of(surrogate, p)))[:4]

    def differs(a, b):
        return sum(x != y for x, y in zip(a, b, strict=True))

    for path in surrogate.propose(20):
        assert min(differs(path, c) for c in centres) <= 4


def test_finalists_are_the_best_expected_and_may_be_unseen():
    rng = np.random.default_rng(0)
    best = (2, 0, 1, 2, 1)
    rows = [r for r in rng.integers(S, size=(200, P)) if sum(r != np.array(best)) in (1, 2, 3)]
    scored = [
        (path_of(r), i % 4, 0.5 + 0.05 * sum(r == np.array(best))) for i, r in enumerate(rows)
    ]
    surrogate = Surrogate(scored, PLACES, S, seed=0)
    found = surrogate.finalists(5)
    assert found[0] == path_of(best)  # never scored, and the best by all that was
    assert found[0] not in {p for p, _, _ in scored}
    values = [float(mean_of(surrogate, p)) for p in found]
    assert values == sorted(values, reverse=True)
    assert len(set(found)) == 5


def test_paths_that_skip_or_stack_teach_and_are_never_proposed():
    skipped = tuple(step for step in path_of([1] * P) if step[1] != 2)
    stacked = (*path_of([1] * P), (0, 3))
    scored = [(skipped, 0, 0.9), (stacked, 0, 0.8), (path_of([0] * P), 0, 0.3)]
    surrogate = Surrogate(scored, PLACES, S, seed=0)
    assert surrogate._paths.tolist() == [[1, 1, 1, S, 1], [1, 1, 1, 1, S], [0] * P]
    for path in (*surrogate.propose(20), *surrogate.finalists(5)):
        assert [k for _, k in path] == list(PLACES)
        assert max(a for a, _ in path) < S
    # Where no whole path has been seen, the search is around the uniform ones.
    alone = Surrogate([(skipped, 0, 0.9), (stacked, 0, 0.8)], PLACES, S, seed=0)
    assert sorted(alone._best.tolist()) == [[a] * P for a in range(S)]
    assert len(alone.propose(20)) == 20


def test_a_small_space_gives_no_more_than_it_has():
    scored = [(((a, 0), (b, 1)), 0, 0.1 * (a + b)) for a in range(2) for b in range(2)]
    assert len(Surrogate(scored, range(2), 2, seed=0).propose(20)) == 4
    assert len(Surrogate(scored, range(2), 2, seed=0).finalists(10)) == 4


def test_equal_rewards_are_no_error():
    scored = [(path_of(r), 0, 0.5) for r in drawn(10)[0]]
    assert len(Surrogate(scored, PLACES, S, seed=0).propose(20)) == 20
