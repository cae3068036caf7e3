"""Merges with gradients against formulas in numpy, scipy and timm's own models."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
from conftest import TINY
from t5_models import problem_of
from torch import nn

from rmm_lab.errors import InputError
from rmm_lab.families import vit
from rmm_lab.families.checkpoint import read_checkpoint
from rmm_lab.search import gradients, uniform
from rmm_lab.search.body import Body, Draws
from rmm_lab.search.fisher import diagonal, fisher, fisher_average, normalise

pytestmark = pytest.mark.slow  # models are fitted: half a minute in all

# --------------------------------------------------------------- a linear model whose answers are known


class Holder(nn.Module):
    """A module of the given tensors."""

    def __init__(self, weights):
        super().__init__()
        for name, tensor in weights.items():
            setattr(
                self, name, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
            )


class Linear:
    """logits = left x_left + right x_right + shift of inputs (x_left, x_right): a stem and one layer."""

    def stem(self, weights):
        return Holder(weights)

    def layer(self, k, weights):
        return Holder(weights)

    def place(self, batch, device, dtype):
        return batch.to(device, dtype)

    def embed(self, stem, batch):
        return batch

    def apply(self, layer, state):
        half = state.shape[1] // 2
        return state[:, :half] @ layer.left.T + state[:, half:] @ layer.right.T

    def logits(self, stem, state, head):
        return state + stem.shift


class Data:
    """A task whose splits are tensors; a split that may not be read, or its labels, raise."""

    metric = "accuracy"

    def __init__(self, name, inputs, labels=None, splits=("train",)):
        self.name, self.inputs, self.known, self.splits = name, inputs, labels, splits

    def split(self, name):
        if name not in self.splits:
            raise InputError(f"no split {name}")
        inputs, known = self.inputs, self.known

        class Split:
            def __len__(self):
                return len(inputs)

            @property
            def labels(self):
                assert known is not None, "the labels were read"
                return known

        return Split()

    def batch(self, name, rows):
        assert name in self.splits
        return self.inputs[rows]

    def score(self, found, labels):
        return float((found == labels).double().mean())


def linear(tensors, tasks):
    """A problem of linear models: ``tensors`` of the base and each expert: left, right, shift."""
    names = ("base", *(f"e{i}" for i in range(1, len(tensors))))
    parts = {
        name: ({"shift": s}, {"left": a, "right": b})
        for name, (a, b, s) in zip(names, tensors, strict=True)
    }
    pool = SimpleNamespace(
        names=names[1:],
        n_layers=1,
        architecture=Linear(),
        heads={name: {} for name in names[1:]},
        weights=lambda name, k: parts[name][k + 1],
    )
    return SimpleNamespace(pool=pool, tasks=tasks, device="cpu")


def drawn(seed=0, n=40, classes=3, half=2, **data):
    """A base, two experts and their tasks, all at random."""
    g = torch.Generator().manual_seed(seed)
    tensors = [
        tuple(torch.randn(shape, generator=g) for shape in ((classes, half),) * 2 + ((classes,),))
        for _ in range(3)
    ]
    tasks = [Data(f"t{i}", torch.randn(n, 2 * half, generator=g), **data) for i in (1, 2)]
    return linear(tensors, tasks)


def numbers(problem, name):
    """A linear model in numpy: W (classes, inputs), shift (classes,)."""
    stem, layer = (problem.pool.weights(name, k) for k in (-1, 0))
    return torch.cat([layer["left"], layer["right"]], 1).double().numpy(), stem[
        "shift"
    ].double().numpy()


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# ------------------------------------------------------------------------------------- objectives


def test_objectives_by_hand():
    """Probabilities 1/4 and 3/4; the entropy of three out of four is 0.5623 nats."""
    sure = torch.tensor([[0.0, math.log(3.0)]])
    h = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert gradients.entropy(sure).item() == pytest.approx(h, abs=1e-6)
    assert gradients.distil(torch.zeros(1, 2), sure).item() == pytest.approx(
        math.log(2) - h, abs=1e-6
    )
    assert gradients.label_loss(sure, torch.tensor([0])).item() == pytest.approx(math.log(4))


def test_objectives_against_scipy():
    rng = np.random.default_rng(1)
    ours, theirs = rng.normal(size=(2, 7, 5))
    p, q = softmax(theirs), softmax(ours)
    found = gradients.distil(torch.tensor(ours), torch.tensor(theirs)).item()
    assert found == pytest.approx(scipy.stats.entropy(p, q, axis=1).mean())
    found = gradients.entropy(torch.tensor(ours)).item()
    assert found == pytest.approx(scipy.stats.entropy(q, axis=1).mean())


def test_a_missing_choice_counts_nothing_and_has_no_gradient():
    full, expert = torch.tensor([[0.3, -1.0]]), torch.tensor([[0.0, 2.0]])
    out = torch.tensor([[-math.inf]])
    for loss in (
        lambda x, e: gradients.distil(x, e),
        lambda x, e: gradients.entropy(x),
        lambda x, e: gradients.label_loss(x, torch.tensor([1])),
    ):
        short = full.clone().requires_grad_()
        expected = loss(short, expert)
        expected.backward()
        long = full.clone().requires_grad_()
        found = loss(torch.cat([long, out], 1), torch.cat([expert, out], 1))
        found.backward()
        assert found.item() == pytest.approx(expected.item())
        torch.testing.assert_close(long.grad, short.grad)


# ------------------------------------------------------------------------------- inputs at random


def test_inputs_come_in_a_random_order_each_once_a_round_and_the_same_for_a_seed():
    problem = drawn(n=10)
    draws = Draws(problem, steps=5, size=4, seed=1)  # two rounds of 10 rows
    for rows in draws.rows:
        flat = rows.ravel()
        assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
        assert list(flat[:10]) != list(range(10))
        assert list(flat[:10]) != list(flat[10:])
    again, other = (Draws(problem, steps=5, size=4, seed=s) for s in (1, 2))
    assert all((a == b).all() for a, b in zip(draws.rows, again.rows, strict=True))
    assert not (draws.rows[0] == other.rows[0]).all()
    assert not (draws.rows[0] == draws.rows[1]).all()


def test_a_small_split_gives_smaller_batches():
    assert Draws(drawn(n=3), steps=2, size=64, seed=0).rows[0].shape == (2, 3)


def test_a_task_without_inputs_is_named():
    problem = drawn(n=0)
    with pytest.raises(InputError, match="t1"):
        Draws(problem, steps=1, size=2, seed=0)


# ----------------------------------------------------------------------------------------- Fisher


def test_fisher_average_by_hand():
    """F = 1 and 3 of 0 and 4 is 3; without information the average; F = 0 and 2 takes the second."""
    experts = torch.tensor([[0.0, 0.0, 5.0], [4.0, 6.0, 7.0]])
    fishers = torch.tensor([[1.0, 0.0, 0.0], [3.0, 0.0, 2.0]])
    found = fisher_average(experts, fishers, floor=1e-9)
    torch.testing.assert_close(found, torch.tensor([3.0, 3.0, 7.0]))


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_fisher_average_refuses_what_is_no_information(bad):
    with pytest.raises(InputError, match="Fisher"):
        fisher_average(torch.zeros(2, 1), torch.tensor([[1.0], [bad]]))


def test_fisher_of_a_linear_model_against_its_formula():
    """E_y (d log p / d W_cj)^2 = p_c (1 - p_c) x_j^2, and p_c (1 - p_c) for a shift."""
    problem = drawn(n=12)
    draws = Draws(problem, steps=12, size=1, seed=3)
    for i, (name, task) in enumerate(zip(problem.pool.names, problem.tasks, strict=True)):
        w, shift = numbers(problem, name)
        x = task.inputs.double().numpy()
        p = softmax(x @ w.T + shift)
        variance = p * (1 - p)  # (n, classes)
        expected = (variance[:, :, None] * x[:, None, :] ** 2).mean(0)  # (classes, inputs)
        stem, layer = diagonal(Body(problem), i, draws, exact=True)
        found = torch.cat([layer["left"], layer["right"]], 1)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(stem["shift"].numpy(), variance.mean(0), rtol=1e-4, atol=1e-7)


def test_answers_drawn_from_the_expert_approach_the_expectation():
    problem = drawn(n=20)
    draws = Draws(problem, steps=1000, size=1, seed=0)
    exact = diagonal(Body(problem), 0, Draws(problem, steps=20, size=1, seed=0), exact=True)
    found = diagonal(Body(problem), 0, draws, seed=5)
    for a, b in zip(exact, found, strict=True):
        for name in a:
            assert ((b[name] - a[name]).abs() <= 0.25 * a[name] + 0.02).all()
    again, other = (diagonal(Body(problem), 0, draws, seed=s)[0]["shift"] for s in (5, 6))
    assert torch.equal(again, found[0]["shift"])
    assert not torch.equal(other, found[0]["shift"])


def test_fisher_of_a_vit_against_timm_and_jacobians(problem):
    """timm's own model with the expert's file, each input's jacobian by forward differentiation."""
    draws = Draws(problem, steps=3, size=1, seed=1)
    expert = problem.pool.experts[1]
    model = vit.create(TINY, depth=3, num_classes=3)
    model.load_state_dict(expert.weights)
    for block in model.blocks:
        block.attn.fused_attn = False  # which has no forward differentiation
    names = ("blocks.1.attn.qkv.weight", "norm.bias", "patch_embed.proj.bias")
    expected = dict.fromkeys(names, 0.0)
    for step in range(3):
        image = draws.batch(1, step)
        for name in names:

            def logs(tensor, name=name, image=image):
                out = torch.func.functional_call(model, {name: tensor}, (image,))
                return out.log_softmax(-1)[0]

            found = torch.func.jacfwd(logs)(expert.weights[name])  # (classes, ...)
            share = logs(expert.weights[name]).exp().reshape(-1, *(1,) * (found.ndim - 1))
            expected[name] = expected[name] + (share * found.square()).sum(0) / 3
    stem, *layers = diagonal(Body(problem), 1, draws, exact=True)
    torch.testing.assert_close(
        layers[1]["attn.qkv.weight"], expected[names[0]], rtol=1e-3, atol=1e-6
    )
    torch.testing.assert_close(stem["norm.bias"], expected[names[1]], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(
        stem["patch_embed.proj.bias"], expected[names[2]], rtol=1e-3, atol=1e-6
    )


def test_an_expert_that_is_sure_weighs_as_much_as_another():
    """Information 100 times as large everywhere changes nothing; without any, there is the average."""
    one, two = ([{"a": torch.tensor([1.0, 2.0])}, {"b": torch.tensor(s)}] for s in (3.0, 4.0))
    large = [{n: 100 * t for n, t in part.items()} for part in one]
    assert all(
        torch.allclose(a[n], b[n])
        for a, b in zip(normalise(one), normalise(large), strict=True)
        for n in a
    )
    square = sum(float(t.square().sum()) for p in normalise(two) for t in p.values())
    assert square == pytest.approx(3)  # a mean square of 1 over three numbers
    assert normalise([{"a": torch.zeros(2)}])[0]["a"].tolist() == [0, 0]


def test_fisher_draws_one_input_at_a_time():
    with pytest.raises(InputError, match="one"):
        fisher(Body(drawn()), Draws(drawn(), steps=2, size=2, seed=0))


# ------------------------------------------------------------------------- coefficients by gradient


def test_a_tensor_has_the_coefficient_of_its_group(problem):
    base = Body(problem).base
    total = sum(len(part) for part in base)
    counts = {}
    for groups in gradients.GROUPS:
        found = gradients.group_numbers(base, groups)
        used = [g for part in found for g in part.values()]
        assert set(used) == set(range(len(set(used))))
        counts[groups] = len(set(used))
    assert counts == {"model": 1, "place": 4, "matrix": 3 * 4, "tensor": total}
    found = gradients.group_numbers(base, "matrix")
    assert found[0] == {}  # a ViT's stem has no matrix
    assert set(found[2]) == {f"{n}.weight" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    with pytest.raises(InputError, match="rows"):
        gradients.group_numbers(base, "rows")


def loss_of(problem, draws, step, scales, objective):
    """The objective in numpy at scales of the shift, left and right, a row for each expert."""
    (w0, shift0), *experts = (numbers(problem, name) for name in ("base", "e1", "e2"))
    w, shift = w0.copy(), shift0.copy()
    for (we, se), (s, left, right) in zip(experts, scales, strict=True):
        w += np.array([left, left, right, right]) * (we - w0)
        shift += s * (se - shift0)
    total = 0.0
    for i, task in enumerate(problem.tasks):
        rows = draws.rows[i][step]
        x = task.inputs.double().numpy()[rows]
        q = softmax(x @ w.T + shift)
        p = softmax(x @ experts[i][0].T + experts[i][1])
        if objective == "distil":
            total += (p * np.log(p / q)).sum(1).mean() / 2
        elif objective == "entropy":
            total -= (q * np.log(q)).sum(1).mean() / 2
        else:
            total -= np.log(q[np.arange(len(rows)), task.known.numpy()[rows]]).mean() / 2
    return total


@pytest.mark.parametrize("objective", ["distil", "entropy", "labels"])
def test_the_gradient_of_coefficients_against_finite_differences(objective):
    labels = torch.arange(40) % 3
    problem = drawn(labels=labels)
    body, draws = Body(problem), Draws(problem, steps=2, size=16, seed=0)
    draws.ask_experts(body)
    groups = gradients.group_numbers(body.base, "tensor")
    order = [("shift",), ("left", "right")]  # three coefficients of each expert
    scales = np.array([[0.3, 0.8, -0.2], [0.6, 0.1, 0.9]])

    def loss(scales):
        return loss_of(problem, draws, 1, scales, objective)

    body.combine(
        [
            [{name: row[groups[k][name]] for name in names} for k, names in enumerate(order)]
            for row in scales.tolist()
        ]
    )
    assert gradients.backward(body, draws, 1, objective) == pytest.approx(loss(scales), abs=1e-5)
    found = gradients.projected(body, groups, 3).numpy()
    step = 1e-5
    for i, g in itertools.product(range(2), range(3)):
        ahead, behind = scales.copy(), scales.copy()
        ahead[i, g] += step
        behind[i, g] -= step
        slope = (loss(ahead) - loss(behind)) / (2 * step)
        assert found[i, g] == pytest.approx(slope, abs=2e-5)


@pytest.mark.parametrize("groups", gradients.GROUPS)
def test_without_a_step_there_is_the_plain_average(groups, problem):
    body = Body(problem)
    found = gradients.learn(body, Draws(problem, steps=0, size=4, seed=0), groups=groups)
    assert found.losses == []
    pool = problem.pool
    for k, part in enumerate(found.model):
        one, two = (pool.weights(name, k - 1) for name in pool.names)
        for name, tensor in part.items():
            torch.testing.assert_close(tensor, (one[name] + two[name]) / 2)


@pytest.mark.parametrize("groups", ["model", "tensor"])
def test_two_experts_that_do_not_meet_are_added(groups):
    """Each moved a tensor of its own, which the other's inputs do not touch: both scales are 1."""
    g = torch.Generator().manual_seed(0)
    zero, shift = torch.zeros(3, 2), torch.zeros(3)
    one, two = (torch.randn(3, 2, generator=g) for _ in range(2))
    x, nothing = torch.randn(50, 2, generator=g), torch.zeros(50, 2)
    tasks = [Data("t1", torch.cat([x, nothing], 1)), Data("t2", torch.cat([nothing, x], 1))]
    problem = linear([(zero, zero, shift), (one, zero, shift), (zero, two, shift)], tasks)
    draws = Draws(problem, steps=150, size=50, seed=0)
    found = gradients.learn(Body(problem), draws, groups=groups)
    assert found.losses[-1] < 1e-4 < 1e-2 < found.losses[0]
    torch.testing.assert_close(found.model[1]["left"], one, atol=0.03, rtol=0)
    torch.testing.assert_close(found.model[1]["right"], two, atol=0.03, rtol=0)
    if groups == "tensor":  # the others have no task vector, so no gradient moves them
        of = gradients.group_numbers(Body(problem).base, "tensor")[1]
        own = found.coefficients[[0, 1], [of["left"], of["right"]]]
        torch.testing.assert_close(own, torch.ones(2), atol=0.02, rtol=0)
        others = found.coefficients[[1, 0], [of["left"], of["right"]]]
        assert others.tolist() == [0.5, 0.5]


def test_coefficients_match_answers_as_well_as_scipy_finds_and_entropy_only_makes_them_sure():
    problem = drawn(seed=3)  # labels are not given: to read them fails
    body, draws = (
        Body(problem),
        Draws(problem, steps=300, size=40, seed=0),
    )  # all inputs at each step
    learned = {o: gradients.learn(body, draws, objective=o) for o in ("distil", "entropy")}

    def loss(scales):
        return loss_of(problem, draws, 0, np.reshape(scales, (2, 3)), "distil")

    best = scipy.optimize.minimize(loss, np.full(6, 0.5)).fun
    found = {o: loss(x.coefficients.double().numpy()) for o, x in learned.items()}
    assert best - 1e-6 <= found["distil"] < best + 0.005
    assert learned["distil"].losses[0] == pytest.approx(loss(np.full(6, 0.5)), abs=1e-5)
    assert learned["entropy"].losses[-1] < 0.5 * learned["entropy"].losses[0]
    assert found["entropy"] > loss(np.full(6, 0.5))
    with pytest.raises(AssertionError, match="labels"):
        gradients.learn(body, draws, objective="labels")
    with pytest.raises(InputError, match="accuracy"):
        gradients.learn(body, draws, objective="accuracy")


def test_the_experts_are_asked_once_for_each_input():
    problem = drawn(n=10)
    asked = []
    for task in problem.tasks:
        task.batch = lambda name, rows, of=task: asked.append(len(rows)) or of.inputs[rows]
    body, draws = Body(problem), Draws(problem, steps=5, size=4, seed=0)
    draws.ask_experts(body)
    assert asked == [10, 10]
    gradients.learn(body, draws)
    assert asked == [10, 10, *[4] * 10]


def test_experts_are_never_changed(problem):
    pool = problem.pool
    before = {
        (name, k): {n: t.clone() for n, t in pool.weights(name, k).items()}
        for name in ("base", *pool.names)
        for k in range(-1, pool.n_layers)
    }
    for _ in gradients.rows(problem, steps=2, vertex_steps=2, inputs=2):
        pass
    for (name, k), weights in before.items():
        assert all(torch.equal(t, pool.weights(name, k)[n]) for n, t in weights.items())
        assert not any(t.requires_grad for t in pool.weights(name, k).values())


# -------------------------------------------------------------------------------------- Frank-Wolfe


def quadratic(targets):
    """The gradient of sum_k |theta_k - target_k|^2 / 2 at a model of places {"w"}."""
    return lambda point, step: [
        {"w": part["w"] - target} for part, target in zip(point, targets, strict=True)
    ]


def test_frank_wolfe_against_scipy():
    """Two places, each with three vertices in the plane: the nearest points to what lies outside."""
    rng = np.random.default_rng(0)
    vertices = rng.normal(size=(3, 2, 2))  # vertex, place, plane
    targets = np.array([[2.0, -1.0], [-1.5, 2.0]])
    start = [{"w": torch.tensor(vertices[:, k].mean(0))} for k in range(2)]
    models = [[{"w": torch.tensor(v[k])} for k in range(2)] for v in vertices]
    found, _ = gradients.frank_wolfe(
        quadratic(torch.tensor(targets)), models, start, steps=3000, rate=1
    )
    for k in range(2):
        best = scipy.optimize.minimize(
            lambda w, k=k: ((w @ vertices[:, k] - targets[k]) ** 2).sum(),
            np.full(3, 1 / 3),
            bounds=[(0, 1)] * 3,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        )
        value = ((found[k]["w"].numpy() - targets[k]) ** 2).sum()
        assert value == pytest.approx(best.fun, abs=5e-3)


def test_frank_wolfe_by_hand():
    """gamma = 1, then 2/3: from 0 to the vertex 1, then a third of 1 and two thirds of -1."""
    vertices = [[{"w": torch.tensor([v])}] for v in (1.0, -1.0)]
    start = [{"w": torch.tensor([0.0])}]
    slopes = iter([torch.tensor([-5.0]), torch.tensor([0.1])])
    found, taken = gradients.frank_wolfe(
        lambda point, step: [{"w": next(slopes)}], vertices, start, steps=2, rate=1
    )
    assert taken == [[0], [1]]
    assert found[0]["w"].item() == pytest.approx(-1 / 3)
    assert start[0]["w"].item() == 0


def test_frank_wolfe_stays_among_the_experts_and_lowers_the_loss():
    """Labels of expert 1: it steps towards that expert."""
    g = torch.Generator().manual_seed(4)
    problem = drawn(seed=4)
    for task in problem.tasks:
        w, shift = numbers(problem, "e1")
        task.inputs = torch.randn(40, 4, generator=g)
        task.known = torch.tensor((task.inputs.numpy() @ w.T + shift).argmax(1))
    body, draws = Body(problem), Draws(problem, steps=30, size=40, seed=0)
    found = gradients.merge_by_frank_wolfe(body, draws, rate=1)
    losses = []
    for model in (
        found,
        [{n: (a[n] + b[n]) / 2 for n in a} for a, b in zip(*body.experts, strict=True)],
    ):
        body.set(model)
        losses.append(gradients.backward(body, draws, 0, "labels"))
    assert losses[0] < losses[1]
    for k, part in enumerate(found):
        one, two = (expert[k] for expert in body.experts)
        shares = torch.cat([((part[n] - two[n]) / (one[n] - two[n])).ravel() for n in part])
        assert shares.max() - shares.min() < 1e-3  # one share for a place
        assert 0 <= shares.min() <= shares.max() <= 1


# ------------------------------------------------------------------------- all of them, and their rows


def test_equal_experts_give_that_expert():
    g = torch.Generator().manual_seed(1)
    base, expert = (
        tuple(torch.randn(shape, generator=g) for shape in ((3, 2), (3, 2), (3,))) for _ in range(2)
    )
    tasks = [Data(f"t{i}", torch.randn(30, 4, generator=g), torch.arange(30) % 3) for i in (1, 2)]
    problem = linear([base, expert, expert], tasks)
    body = Body(problem)
    one = Draws(problem, steps=10, size=1, seed=0)
    batches = Draws(problem, steps=30, size=30, seed=0)
    learned = gradients.learn(body, batches)
    assert learned.losses[0] < 1e-6
    assert max(learned.losses) < 0.01
    for model, atol in (
        (fisher(body, one), 1e-6),
        (gradients.merge_by_frank_wolfe(body, batches), 1e-6),
        (learned.model, 0.05),  # Adam's steps do not vanish where the gradient is rounding alone
    ):
        torch.testing.assert_close(model[0]["shift"], expert[2], atol=atol, rtol=0)
        torch.testing.assert_close(model[1]["left"], expert[0], atol=atol, rtol=0)


def test_no_labels_and_no_test_split_are_read_before_a_model_is_scored():
    problem = drawn(splits=("train",))  # any other split raises, and so do the labels
    body = Body(problem)
    fisher(body, Draws(problem, steps=2, size=1, seed=0))
    for objective in ("distil", "entropy"):
        gradients.learn(body, Draws(problem, steps=2, size=4, seed=0), objective=objective)
    for task in problem.tasks:
        task.known = torch.zeros(40, dtype=torch.long)
    gradients.merge_by_frank_wolfe(body, Draws(problem, steps=2, size=4, seed=0))


def test_a_row_reads_the_test_split_only_to_score_what_it_has_built(problem, monkeypatch):
    read = []
    for task in problem.tasks:

        def split(name, own=task.split):
            read.append(name)
            return own(name)

        monkeypatch.setattr(task, "split", split)
    for _ in gradients.rows(problem, steps=2, vertex_steps=2, inputs=2):
        first = read.index("test")
        assert set(read[first:]) == {"test"}
        assert "reward" not in read
        read.clear()


def test_an_expert_with_broken_weights_is_named():
    problem = drawn()
    problem.pool.weights("e2", -1)["shift"][0] = math.nan
    body = Body(problem)
    with pytest.raises(InputError, match="e2"):
        gradients.learn(body, Draws(problem, steps=1, size=4, seed=0))
    with pytest.raises(InputError, match="e2"):
        fisher(body, Draws(problem, steps=1, size=1, seed=0))


def test_a_loss_that_is_no_number_stops_the_merge():
    problem = drawn()
    problem.pool.weights("base", -1)["shift"][0] = math.inf
    with pytest.raises(InputError, match=r"t1|e1"):
        gradients.learn(Body(problem), Draws(problem, steps=2, size=4, seed=0))


NAMES = [
    "Fisher",
    *(
        f"coefficients by gradient, per {groups}"
        for groups in ("model", "place", "matrix", "tensor")
    ),
    "AdaMerging",
    "Frank-Wolfe",
]


def test_rows_of_vits_say_what_they_saw(problem):
    found = list(gradients.rows(problem, 1, steps=2, vertex_steps=2, inputs=3))
    assert [row.name for row in found] == NAMES
    for row in found:
        assert len(row.scores) == 2
        assert all(0 <= s <= 1 for s in row.scores)
        assert (row.sees, row.evaluations) == ("gradients", 0)
        assert row.seconds > 0
        assert math.isnan(row.reward)
        assert "train" in row.setting
        assert ("with labels" in row.setting) == (row.name == "Frank-Wolfe")
        assert ("no labels" in row.setting) == (row.name != "Frank-Wolfe")
    assert [row.setting.split()[0] for row in found[1:4]] == ["2", "8", "24"]
    again = list(gradients.rows(problem, 1, steps=2, vertex_steps=2, inputs=3))
    assert [row.scores for row in again] == [row.scores for row in found]


def test_rows_of_t5s_where_rows_lack_choices(t5s):
    """The first task's rows have two to four choices of their own."""
    problem = problem_of(t5s)
    widths = {len(choices) for choices in problem.tasks[0].split("train").choices}
    assert len(widths) > 1
    body, draws = Body(problem), Draws(problem, steps=3, size=5, seed=0)
    for objective in ("distil", "entropy", "labels"):
        found = gradients.learn(body, draws, objective=objective)
        assert np.isfinite(found.losses).all()
        assert all(t.isfinite().all() for part in found.model for t in part.values())
    assert [row.name for row in gradients.rows(problem, steps=1, vertex_steps=1, inputs=2)] == NAMES


def test_a_t5_answers_as_its_own_modules_do(t5s):
    """Every weight of an expert reaches the body, and every one takes part in the gradient."""
    problem = problem_of(t5s, variant="v1.1")  # with an lm_head of its own
    body, draws = Body(problem), Draws(problem, steps=2, size=6, seed=0)
    body.set(body.experts[0])
    pool, batch = problem.pool, draws.batch(0, 0)
    state = pool.architecture.embed(pool.stem("one"), batch)
    for k in range(pool.n_layers):
        state = pool.architecture.apply(pool.layer("one", k), state)
    expected = pool.architecture.logits(pool.stem("one"), state, {})
    found = body.logits(0, batch)
    torch.testing.assert_close(found, expected)
    found[found > -math.inf].sum().backward()
    assert all(t.abs().max() > 0 for part in body.gradients for t in part.values())


def test_a_row_from_weights_is_timms_own_model(problem):
    """Expert 1's body with each task's own head, by timm."""
    pool = problem.pool
    stem, *layers = (pool.weights(pool.names[0], k) for k in range(-1, 3))
    row = uniform.weights_row(problem, "one", "as it is", stem, layers, sees="inputs", seconds=2.0)
    assert (row.name, row.setting, row.sees, row.seconds) == ("one", "as it is", "inputs", 2.0)
    model = vit.create(TINY, depth=3, num_classes=3)
    body = {n: t for n, t in pool.experts[0].weights.items() if not n.startswith("head.")}
    for i, task in enumerate(problem.tasks):
        head = {n: t for n, t in pool.experts[i].weights.items() if n.startswith("head.")}
        model.load_state_dict(body | head)
        found = model(task.batch("test", slice(None))).argmax(-1)
        share = (found == task.split("test").labels).double().mean().item()
        assert row.scores[i] == pytest.approx(share)
    assert read_checkpoint(pool.experts[0].source).sha256 == pool.experts[0].sha256
