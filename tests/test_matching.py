"""RegMean and least squares against hand computation, numpy and scikit-learn on the stacked inputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression, Ridge

from rmm_lab.engine.ridge import RIDGES, Folds
from rmm_lab.errors import InputError
from rmm_lab.matching import least_squares, regmean, step


def drawn(seed=0, n=2, d=3, o=2, rows=20, targets=None):
    """Inputs (rows, d) and outputs (rows, o) of n tasks, and the experts (n, o, d) that made them."""
    rng = np.random.default_rng(seed)
    experts = rng.normal(size=(n, o, d)) if targets is None else targets
    xs = [rng.normal(size=(rows + 7 * i, d)) @ rng.normal(size=(d, d)) for i in range(n)]
    return xs, [x @ w.T for x, w in zip(xs, experts, strict=True)], experts


def sums(xs, ys, dtype=torch.float64):
    """Mean products (N, D, D), (N, D, O), written as sums over rows."""
    xx = [sum(np.outer(x, x) for x in rows) / len(rows) for rows in xs]
    xy = [
        sum(np.outer(x, y) for x, y in zip(*pair, strict=True)) / len(pair[0])
        for pair in zip(xs, ys, strict=True)
    ]
    return torch.tensor(np.array(xx), dtype=dtype), torch.tensor(np.array(xy), dtype=dtype)


def stacked(xs, ys, weights):
    """All rows below each other, scaled so that task i counts weights[i] / sum: X (n, D), Y (n, O)."""
    total = sum(weights)
    scales = [math.sqrt(w / total / len(x)) for w, x in zip(weights, xs, strict=True)]
    return (
        np.concatenate([s * part for s, part in zip(scales, parts, strict=True)])
        for parts in (xs, ys)
    )


def near(found, expected, tolerance=1e-8):
    np.testing.assert_allclose(np.asarray(found), expected, rtol=tolerance, atol=tolerance)


def fit(xs, ys, weights=None, ridge=0.0, anchor=None):
    weights = torch.ones(len(xs)) if weights is None else torch.tensor(weights)
    anchor = None if anchor is None else torch.tensor(anchor)
    return least_squares(*sums(xs, ys), weights=weights, ridge=ridge, anchor=anchor)


# ------------------------------------------------------------------------------------- by hand


def test_regmean_of_single_numbers_is_an_average_weighed_by_squares():
    """Mean squares 1 and 3: (1 * 2 + 3 * 6) / 4 = 5."""
    grams = torch.tensor([[[1.0]], [[3.0]]], dtype=torch.float64)
    weights = torch.tensor([[[2.0]], [[6.0]]])
    for alpha in (0.0, 0.9, 1.0):  # nothing is off the diagonal
        assert regmean(grams, weights, alpha=alpha).tolist() == [[5.0]]


def test_regmean_of_two_inputs_by_hand():
    """G = [[2, 1], [1, 2]] and I, rows w = (3, 0) and (0, 3).

    alpha 1: (6, 3) + (0, 3) = (6, 6), times [[3, 1], [1, 3]]^-1 = [[3, -1], [-1, 3]] / 8, is (1.5, 1.5).
    alpha 0: (6, 3) without what is off the diagonal is (6, 0), plus (0, 3), over 3 each: (2, 1).
    """
    grams = torch.tensor([[[2.0, 1.0], [1.0, 2.0]], [[1.0, 0.0], [0.0, 1.0]]])
    weights = torch.tensor([[[3.0, 0.0]], [[0.0, 3.0]]])
    grams = grams.double()
    near(regmean(grams, weights, alpha=1.0), [[1.5, 1.5]], 1e-6)
    near(regmean(grams, weights, alpha=0.0), [[2.0, 1.0]], 1e-6)
    # alpha 0.5: (6, 1.5) + (0, 3) = (6, 4.5), times [[3, 0.5], [0.5, 3]]^-1 = [[3, -.5], [-.5, 3]] / 8.75
    near(regmean(grams, weights, alpha=0.5), [[15.75 / 8.75, 10.5 / 8.75]], 1e-6)


def test_least_squares_of_single_numbers_by_hand():
    """Inputs 1 and 2, outputs 3 and 4: (w1 3 + w2 8 + rho W_0) / (w1 + w2 4 + rho), w of sum 1."""
    xx, xy = (torch.tensor(t).double()[:, None, None] for t in ([1.0, 4.0], [3.0, 8.0]))

    def found(weights, ridge, anchor):
        weights, anchor = torch.tensor(weights), torch.tensor([[anchor]])
        return least_squares(xx, xy, weights=weights, ridge=ridge, anchor=anchor).item()

    assert found([1.0, 1.0], 0.0, 9.0) == pytest.approx(5.5 / 2.5)
    assert found([3.0, 1.0], 0.0, 9.0) == pytest.approx(4.25 / 1.75)
    # The ridge is a share of the mean diagonal, here 2.5.
    assert found([1.0, 1.0], 2.0, 9.0) == pytest.approx((5.5 + 5 * 9) / (2.5 + 5))
    assert found([1.0, 1.0], math.inf, 9.0) == 9.0


def test_the_ridge_is_a_share_of_the_mean_over_the_diagonal():
    """xx = diag(1, 3), mean 2; ridge 0.5 is rho = 1; xy = (2, 3), anchor 0: (2 / 2, 3 / 4)."""
    xx, xy = torch.diag(torch.tensor([1.0, 3.0]))[None], torch.tensor([[[2.0], [3.0]]])
    near(least_squares(xx, xy, weights=torch.ones(1), ridge=0.5), [[1.0, 0.75]], 1e-6)


# ------------------------------------------------------------------------------------- oracles


@pytest.mark.parametrize(("n", "d", "o"), [(2, 3, 2), (3, 5, 1), (4, 2, 6)])
def test_regmean_with_alpha_1_is_numpys_least_squares_on_all_rows(n, d, o):
    xs, ys, experts = drawn(n, n, d, o)
    x, y = stacked(xs, ys, np.ones(n))
    found = regmean(sums(xs, ys)[0], torch.tensor(experts), alpha=1.0)
    near(found.T, np.linalg.lstsq(x, y, rcond=None)[0])


@given(alpha=st.floats(0, 1), seed=st.integers(0, 99))
def test_regmean_is_its_equation(alpha, seed):
    xs, ys, experts = drawn(seed)
    shrink = np.where(np.eye(3, dtype=bool), 1.0, alpha)
    grams = [shrink * (x.T @ x) / len(x) for x in xs]
    top = sum(w @ g for w, g in zip(experts, grams, strict=True))
    found = regmean(sums(xs, ys)[0], torch.tensor(experts), alpha=alpha)
    near(found, top @ np.linalg.inv(sum(grams)), 1e-6)


@given(weights=st.lists(st.floats(0.01, 100), min_size=3, max_size=3), seed=st.integers(0, 99))
def test_least_squares_is_numpys_on_rows_scaled_by_the_weights(weights, seed):
    xs, ys, _ = drawn(seed, 3)
    x, y = stacked(xs, ys, weights)
    near(fit(xs, ys, weights).T, np.linalg.lstsq(x, y, rcond=None)[0], 1e-5)


@pytest.mark.parametrize("ridge", [1e-6, 0.01, 1.0, 30.0])
def test_a_ridge_towards_an_anchor_is_more_rows_and_scikit_learns_on_what_is_left(ridge):
    """rho |W - W_0|^2: rows sqrt(rho) I with outputs sqrt(rho) W_0; or Ridge of Y - X W_0."""
    xs, ys, _ = drawn(3, 2, 4, 3)
    anchor, weights = np.random.default_rng(1).normal(size=(3, 4)), [1.0, 2.5]
    x, y = stacked(xs, ys, weights)
    rho = ridge * np.mean(np.diag(x.T @ x))
    more_x = np.concatenate([x, math.sqrt(rho) * np.eye(4)])
    more_y = np.concatenate([y, math.sqrt(rho) * anchor.T])
    found = fit(xs, ys, weights, ridge, anchor)
    near(found.T, np.linalg.lstsq(more_x, more_y, rcond=None)[0])
    model = Ridge(alpha=rho, fit_intercept=False).fit(x, y - x @ anchor.T)
    near(found, anchor + model.coef_, 1e-7)


def test_a_bias_as_a_column_of_ones_is_scikit_learns_intercept():
    xs, ys, _ = drawn(4, 2, 3, 2)
    ys = [y + np.array([i, -2.0]) for i, y in enumerate(ys)]
    ones = [np.concatenate([x, np.ones((len(x), 1))], 1) for x in xs]
    counts = np.concatenate([np.full(len(x), 1 / len(x)) for x in xs])
    model = LinearRegression().fit(np.concatenate(xs), np.concatenate(ys), counts)
    found = fit(ones, ys)
    near(found[:, :-1], model.coef_)
    near(found[:, -1], model.intercept_)


# ------------------------------------------------------------------------------------- properties


def test_equal_experts_give_themselves():
    one = np.random.default_rng(5).normal(size=(2, 3))
    xs, ys, experts = drawn(5, 3, targets=np.stack([one] * 3))
    for alpha in (0.0, 0.7, 1.0):
        near(regmean(sums(xs, ys)[0], torch.tensor(experts), alpha=alpha), one)
    near(fit(xs, ys), one)
    near(fit(xs, ys, [5.0, 1.0, 0.1], ridge=0.3, anchor=one), one)


def test_an_input_that_one_task_alone_uses_is_its_experts():
    """Tasks with inputs in different coordinates keep each their own columns."""
    rng = np.random.default_rng(6)
    xs = [rng.normal(size=(9, 4)) * mask for mask in ([1, 1, 0, 0], [0, 0, 1, 1])]
    experts = rng.normal(size=(2, 3, 4))
    ys = [x @ w.T for x, w in zip(xs, experts, strict=True)]
    expected = np.concatenate([experts[0][:, :2], experts[1][:, 2:]], 1)
    for alpha in (0.0, 0.9, 1.0):
        near(regmean(sums(xs, ys)[0], torch.tensor(experts), alpha=alpha), expected)
    near(fit(xs, ys, [1.0, 7.0], anchor=np.ones((3, 4))), expected)
    # All the weight on the first: its columns are fitted, the others stay the anchor's.
    near(fit(xs, ys, [1.0, 0.0], anchor=np.ones((3, 4)))[:, 2:], np.ones((3, 2)))
    near(fit(xs, ys, [1.0, 0.0], anchor=np.ones((3, 4)))[:, :2], experts[0][:, :2])


@given(seed=st.integers(0, 99), factor=st.floats(1e-3, 1e3))
def test_only_ratios_count_and_no_order_does(seed, factor):
    xs, ys, experts = drawn(seed, 3)
    anchor, weights, turned = np.ones((2, 3)), [1.0, 2.0, 4.0], [2, 0, 1]
    one = fit(xs, ys, weights, 0.1, anchor)
    near(fit(xs, ys, [factor * w for w in weights], 0.1, anchor), one, 1e-5)
    near(
        fit(*([each[i] for i in turned] for each in (xs, ys, weights)), 0.1, anchor),
        one,
    )
    # Larger inputs and outputs of all tasks: the ridge is relative.
    near(fit([factor * x for x in xs], [factor * y for y in ys], weights, 0.1, anchor), one, 1e-5)
    grams = sums(xs, ys)[0]
    merged = regmean(grams, torch.tensor(experts))
    near(regmean(factor * grams, torch.tensor(experts)), merged, 1e-5)
    near(regmean(grams[turned], torch.tensor(experts[turned])), merged)
    # Outputs are fitted one by one.
    near(regmean(grams, torch.tensor(experts[:, ::-1].copy())), merged.flip(0))


def test_a_ridge_leads_from_the_solution_to_the_anchor():
    xs, ys, _ = drawn(7)
    anchor = np.random.default_rng(7).normal(size=(2, 3))
    ends = fit(xs, ys, ridge=0.0, anchor=anchor), torch.tensor(anchor)
    near(fit(xs, ys, ridge=1e-12, anchor=anchor), ends[0])
    near(fit(xs, ys, ridge=1e12, anchor=anchor), ends[1])
    assert torch.equal(fit(xs, ys, ridge=math.inf, anchor=anchor), ends[1])
    assert not fit(xs, ys, ridge=math.inf).any()  # without an anchor: 0
    way = [float((fit(xs, ys, ridge=r, anchor=anchor) - ends[1]).norm()) for r in RIDGES]
    assert way == sorted(way, reverse=True)


# ------------------------------------------------------------- where the inputs leave something open


@pytest.mark.parametrize("rows", [1, 3, 6])
def test_few_rows_change_the_anchor_as_little_as_they_can(rows):
    """numpy's pseudoinverse of the rows: the smallest change that fits."""
    rng = np.random.default_rng(rows)
    xs = [rng.normal(size=(rows, 16)) for _ in range(2)]
    ys, anchor = [rng.normal(size=(rows, 3)) for _ in range(2)], rng.normal(size=(3, 16))
    x, y = stacked(xs, ys, [1.0, 3.0])
    expected = anchor.T + np.linalg.pinv(x) @ (y - x @ anchor.T)
    near(fit(xs, ys, [1.0, 3.0], 0.0, anchor).T, expected, 1e-6)


def test_rows_in_a_plane_that_no_axis_shows_stay_in_it():
    """As behind a layer norm: in single precision the rows add up to 0 only nearly; 0 is what is meant."""
    rng = np.random.default_rng(8)
    rows = rng.normal(size=(400, 48))
    x = rows - rows.mean(1, keepdims=True) + 1e-7 * rng.normal(size=rows.shape)
    y = x @ rng.normal(size=(48, 2)) + 0.1 * rng.normal(size=(400, 2))
    anchor = rng.normal(size=(2, 48))
    expected = anchor.T + np.linalg.pinv(x, rcond=1e-5) @ (y - x @ anchor.T)
    near(fit([x], [y], ridge=0.0, anchor=anchor).T, expected, 1e-5)
    experts = np.stack([anchor, 2 * anchor])
    merged = regmean(sums([x, x], [y, y])[0], torch.tensor(experts), alpha=1.0)
    near(merged, 1.5 * anchor, 1e-5)  # the average where the inputs say nothing, and elsewhere too


def test_inputs_that_are_always_0_keep_the_average_or_the_anchor():
    xs, ys, experts = drawn(9)
    for x in xs:
        x[:, 1] = 0
    average = experts.mean(0)
    for alpha in (0.0, 0.9, 1.0):
        found = regmean(sums(xs, ys)[0], torch.tensor(experts), alpha=alpha)
        near(found[:, 1], average[:, 1])
    anchor = np.full((2, 3), 4.0)
    near(fit(xs, ys, ridge=0.0, anchor=anchor)[:, 1], [4.0, 4.0])
    nothing = torch.zeros(2, 3, 3)
    near(regmean(nothing, torch.tensor(experts)), average)
    for ridge in (0.0, 0.1):
        found = least_squares(
            nothing, nothing, weights=torch.ones(2), ridge=ridge, anchor=torch.ones(3, 3)
        )
        assert (found == 1).all()


# ------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_is_computed_in_double_and_handed_back(dtype):
    """As in double of the same rounded numbers, but for a ridge above the rounding of sums in this dtype."""
    xs, ys, experts = drawn(10)
    grams, weights = sums(xs, ys, dtype)[0], torch.tensor(experts, dtype=dtype)
    found = regmean(grams, weights)
    assert found.dtype == dtype
    tolerance = 100 * torch.finfo(dtype).eps
    near(found.double(), regmean(grams.double(), weights.double()), tolerance)
    xx, xy = sums(xs, ys, dtype)
    args = {"weights": torch.ones(2), "ridge": 0.01}
    found = least_squares(xx, xy, **args)
    assert found.dtype == dtype
    near(found.double(), least_squares(xx.double(), xy.double(), **args), tolerance)
    found = least_squares(xx.double(), xy.double(), anchor=torch.ones(2, 3, dtype=dtype), **args)
    assert found.dtype == dtype


@pytest.mark.parametrize("ridge", [0.0, 1e-6])
def test_rounding_of_sums_in_single_precision_is_no_input(ridge):
    """20 rows, 200 inputs: most directions hold rounding errors alone; there the anchor about stays."""
    rng = np.random.default_rng(12)
    x, anchor = rng.normal(size=(20, 200)), rng.normal(size=(3, 200))
    y = rng.normal(size=(20, 3))
    x32, y32 = torch.tensor(x).float(), torch.tensor(y).float()
    xx, xy = (x32.T @ x32 / 20)[None], (x32.T @ y32 / 20)[None]
    found = least_squares(
        xx, xy, weights=torch.ones(1), ridge=ridge, anchor=torch.tensor(anchor).float()
    )
    expected = anchor.T + np.linalg.pinv(x) @ (y - x @ anchor.T)
    assert np.linalg.norm(found.T.numpy() - expected) < 0.2 * np.linalg.norm(expected)
    experts = torch.tensor(np.stack([anchor, -anchor])).float()
    assert regmean(torch.cat([xx, xx]), experts, alpha=1.0).abs().max() < 0.1


def test_nothing_is_changed_in_place():
    xs, ys, experts = drawn(11)
    xx, xy = sums(xs, ys)
    tensors = [xx, xy, torch.tensor(experts), torch.ones(2), torch.ones(2, 3)]
    before = [t.clone() for t in tensors]
    regmean(xx, tensors[2])
    least_squares(xx, xy, weights=tensors[3], ridge=0.1, anchor=tensors[4])
    choose_ridge(
        torch.stack([xx, xx]), torch.stack([xy, xy]), weights=tensors[3], anchor=tensors[4]
    )
    assert all(map(torch.equal, tensors, before))


# ------------------------------------------------------------------------------------- wrong input


EYE = torch.eye(3).expand(2, 3, 3)
OUT = torch.ones(2, 3, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"grams": EYE[:1]},
            r"grams: expected a floating tensor of shape \(2, 3, 3\), found \(1, 3",
        ),
        ({"grams": torch.ones(2, 3, 2)}, r"grams: .* found \(2, 3, 2\)"),
        ({"grams": EYE.long()}, r"grams: .* and torch.int64"),
        (
            {"grams": EYE * math.nan},
            "grams: expected finite numbers, found NaN or infinity; look for",
        ),
        ({"weights": OUT.mT * math.inf}, "weights: expected finite numbers"),
        ({"weights": torch.ones(2, 3)}, r"weights: expected shape \(N, O, D\), found \(2, 3\)"),
        ({"weights": torch.ones(())}, r"weights: expected shape \(N, O, D\), found \(\)"),
        ({"alpha": 1.1}, r"alpha: expected a number in \[0, 1\], found 1.1; correct it"),
        ({"alpha": math.nan}, r"alpha: expected a number in \[0, 1\], found nan"),
    ],
)
def test_regmean_refuses(changes, message):
    with pytest.raises(InputError, match=message):
        regmean(**({"grams": EYE, "weights": OUT.mT} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"xx": EYE[:, :2]},
            r"xx: expected a floating tensor of shape \(2, 3, 3\), found \(2, 2, 3\)",
        ),
        ({"xy": OUT[:1]}, r"xy: .* shape \(2, 3, 4\), found \(1, 3, 4\)"),
        ({"xy": OUT[:, :2]}, r"xy: .* shape \(2, 3, 4\), found \(2, 2, 4\)"),
        ({"xx": EYE * math.inf}, "xx: expected finite numbers, found NaN or infinity"),
        ({"xy": OUT * math.nan}, "xy: expected finite numbers, found NaN or infinity"),
        ({"anchor": torch.ones(3, 4)}, r"anchor: .* shape \(4, 3\), found \(3, 4\)"),
        ({"anchor": torch.full((4, 3), math.nan)}, "anchor: expected finite numbers"),
        (
            {"weights": torch.ones(3)},
            r"weights: expected 2 numbers of 0 or more, not all 0, found \[",
        ),
        ({"weights": torch.tensor([1.0, -1.0])}, r"weights: expected 2 .* found \[1.0, -1.0\]"),
        ({"weights": torch.zeros(2)}, r"weights: expected 2 .* found \[0.0, 0.0\]; correct them"),
        ({"weights": torch.tensor([1.0, math.nan])}, "weights: expected 2 numbers"),
        ({"weights": torch.tensor([1.0, math.inf])}, "weights: expected 2 numbers"),
        ({"ridge": -0.1}, "ridge: expected a number of 0 or more, found -0.1; correct it"),
        ({"ridge": math.nan}, "ridge: expected a number of 0 or more, found nan"),
    ],
)
def test_least_squares_refuses(changes, message):
    args = {"xx": EYE, "xy": OUT, "weights": torch.ones(2), "ridge": 0.1, "anchor": None}
    with pytest.raises(InputError, match=message):
        least_squares(**(args | changes))


# ------------------------------------------------------------------------------- choosing a ridge


def choose_ridge(xx, xy, *, weights, anchor, ridges=RIDGES):
    return Folds(xx, weights).choose(xy, anchor, ridges)


def in_folds(tasks, o=2, d=3):
    """Sums (K, N, ...) of folds of rows: tasks[i][k] = (x, y), or None where a task has no rows there."""
    none = np.zeros((1, d)), np.zeros((1, o))
    folds = list(zip(*[[part or none for part in task] for task in tasks], strict=True))
    pairs = [sums(*zip(*fold, strict=True)) for fold in folds]
    return torch.stack([xx for xx, _ in pairs]), torch.stack([xy for _, xy in pairs])


def by_brute_force(tasks, weights, anchor, ridges):
    """Held-out errors of each ridge with explicit rows; numpy alone."""
    errors = np.zeros(len(ridges))
    scored = False
    for held in range(len(tasks[0])):
        rest = [[p for k, p in enumerate(task) if k != held and p] for task in tasks]
        usable = [i for i, task in enumerate(tasks) if rest[i] and task[held] and weights[i]]
        if not usable:
            continue
        scored = True
        x, y = [], []
        for parts, w in zip(rest, weights, strict=True):
            for px, py in parts:  # each fold of a task counts alike
                scale = math.sqrt(w / sum(weights) / len(parts) / len(px))
                x.append(scale * px)
                y.append(scale * py)
        x, y = np.concatenate(x), np.concatenate(y)
        for m, ridge in enumerate(ridges):
            rho = ridge * np.mean(np.diag(x.T @ x))
            w = anchor.T
            if math.isfinite(ridge):
                more = np.concatenate([x, math.sqrt(rho) * np.eye(len(w))])
                w = np.linalg.lstsq(
                    more, np.concatenate([y, math.sqrt(rho) * anchor.T]), rcond=None
                )[0]
            for i in usable:
                hx, hy = tasks[i][held]
                share = weights[i] / sum(weights[j] for j in usable)
                errors[m] += share * np.mean(np.sum((hx @ w - hy) ** 2, 1))
    if not scored:
        return math.inf
    return max(r for r, e in zip(ridges, errors, strict=True) if e <= errors.min() * (1 + 1e-9))


def noisy(seed, sizes, noise):
    """Rows of N tasks in folds of the given sizes, 0 for none, and an anchor beside the truth."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(2, 3))
    tasks = []
    for task in sizes:
        parts = []
        for n in task:
            x = rng.normal(size=(n, 3))
            parts.append((x, x @ truth.T + noise * rng.normal(size=(n, 2))) if n else None)
        tasks.append(parts)
    return tasks, truth + 0.3 * rng.normal(size=(2, 3))


@pytest.mark.parametrize(
    "sizes",
    [
        [(6, 6), (5, 9)],
        [(4, 3, 5), (6, 2, 2), (1, 1, 1)],
        [(5, 0), (4, 4)],  # a task that one fold lacks
        [(5, 0), (0, 4)],  # none can be held out
        [(7, 7, 0), (5, 5, 0)],  # an empty fold
        [(1, 0), (1, 0)],
        [(2, 1), (1, 1)],
    ],
)
def test_the_ridge_is_that_of_explicit_held_out_rows(sizes):
    chosen = set()
    for seed in range(8):
        for noise in (0.0, 0.5, 3.0):
            tasks, anchor = noisy(seed, sizes, noise)
            weights = [1.0, 2.0, 0.5][: len(tasks)]
            found = choose_ridge(
                *in_folds(tasks), weights=torch.tensor(weights), anchor=torch.tensor(anchor)
            )
            assert found == by_brute_force(tasks, weights, anchor, RIDGES), (seed, noise)
            chosen.add(found)
    can = any(sum(map(bool, task)) > 1 for task in sizes)
    assert len(chosen) > 2 if can else chosen == {math.inf}


@pytest.mark.parametrize("noise", [0.01, 3.0, 100.0])
def test_the_ridge_of_many_inputs_is_that_of_all_ridges_one_by_one(noise):
    """140 inputs, of which few say anything; errors of ridges that are close count in full."""
    chosen = set()
    for seed in range(4):
        rng = np.random.default_rng(seed)
        truth, spread = rng.normal(size=(4, 140)), np.geomspace(1, 1e-3, 140)
        tasks = []
        for n in ((90, 80), (100, 70)):
            xs = [rng.normal(size=(k, 140)) * spread for k in n]
            tasks.append([(x, x @ truth.T + noise * rng.normal(size=(len(x), 4))) for x in xs])
        anchor, weights = truth + rng.normal(size=truth.shape), [1.0, 2.0]
        found = choose_ridge(
            *in_folds(tasks, 4, 140), weights=torch.tensor(weights), anchor=torch.tensor(anchor)
        )
        assert found == by_brute_force(tasks, weights, anchor, RIDGES), seed
        chosen.add(found)
    assert (math.inf in chosen) is (noise == 100)


def test_a_task_that_does_not_count_cannot_be_the_only_one_that_is_held_out():
    tasks, anchor = noisy(0, [(5, 0), (4, 4)], 0.1)
    found = choose_ridge(
        *in_folds(tasks), weights=torch.tensor([1.0, 0.0]), anchor=torch.tensor(anchor)
    )
    assert found == math.inf


def test_of_equal_ridges_the_largest_is_taken():
    """The anchor is the truth, and fits as well as any; sums of 4 and 2 whole numbers are exact."""
    rng = np.random.default_rng(2)
    x, anchor = rng.integers(-3, 4, (6, 3)).astype(float), np.ones((2, 3))
    xx, xy = in_folds([[(x[:4], x[:4] @ anchor.T), (x[4:], x[4:] @ anchor.T)]])
    args = {"weights": torch.ones(1), "anchor": torch.tensor(anchor)}
    assert choose_ridge(xx, xy, **args) == math.inf
    assert choose_ridge(xx, xy, **args, ridges=(1.0, 0.5)) == 1.0
    assert choose_ridge(xx, xy, **args, ridges=(0.25,)) == 0.25


def test_nan_in_a_fold_is_refused():
    tasks, anchor = noisy(0, [(5, 5), (4, 4)], 0.1)
    tasks[0][1][0][0, 0] = math.nan
    with pytest.raises(InputError, match=r"xx: expected finite numbers, found NaN or infinity"):
        choose_ridge(*in_folds(tasks), weights=torch.ones(2), anchor=torch.tensor(anchor))


@pytest.mark.parametrize("ridge", [1e-13, 1e-6, 1e-2, 10.0])
def test_a_step_is_numpys_inverse_whether_or_not_small_eigenvalues_are_looked_for(ridge):
    """Eigenvalues 0 to 3; with a ridge that is far above all rounding no small one is looked for."""
    generator = torch.Generator().manual_seed(3)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))[0]
    a = turn @ torch.diag(torch.tensor([0.0, 0.5, 1, 2, 3], dtype=torch.float64)) @ turn.T
    lack = a @ torch.randn(5, 2, generator=generator, dtype=torch.float64)  # no part that is open
    found = step(a, lack, ridge, torch.float64)
    rho = ridge * float(a.diagonal().mean())
    exact = (
        np.linalg.pinv((a + rho * torch.eye(5)).numpy(), rcond=1e-11, hermitian=True) @ lack.numpy()
    )
    assert np.allclose(found, exact, rtol=1e-6, atol=1e-9)
