"""The checks of notebook 01 against wrong and right answers, and the data of its pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rmm_lab.figures import models as pictures

TASK_VECTOR, AVERAGE, LINE = "01.task_vector", "01.average", "01.interpolate"
WHY = "01.why_average_hurts"
WRONG = [
    (TASK_VECTOR, "def f(base, experts):\n    return -experts + base", "sign is reversed"),
    (
        TASK_VECTOR,
        "def f(base, experts):\n    m = sum(experts) / len(experts)\n"
        "    return torch.stack([e - m for e in experts])",
        "experts' mean",
    ),
    (TASK_VECTOR, "def f(base, experts):\n    return base[None] + experts", "add base and experts"),
    (
        TASK_VECTOR,
        "def f(base, experts):\n    return torch.stack([torch.maximum(e - base, base - e) for e in experts])",
        "drop the sign",
    ),
    (
        TASK_VECTOR,
        "def f(base, experts):\n    total = 0\n    for e in experts:\n        total = total + e - base\n"
        "    return total",
        "sum over the experts",
    ),
    (
        TASK_VECTOR,
        "def f(base, experts):\n    return torch.mean(experts, dim=0) - base",
        "average over the experts",
    ),
    (TASK_VECTOR, "def f(base, experts):\n    return experts + 0 * base", "experts unchanged"),
    (
        TASK_VECTOR,
        "def f(base, experts):\n    d = experts - base\n"
        "    n = d.flatten(1).pow(2).sum(1).sqrt()\n"
        "    return d / n.view(-1, *[1] * base.dim())",
        "changed the length",
    ),
    (
        TASK_VECTOR,
        "def f(base, experts):\n    d = experts - base\n    return d / d.norm(dim=1, keepdim=True)",
        "changed the length",
    ),
    (
        TASK_VECTOR,
        "def f(base, experts):\n    d = experts - base\n"
        "    return d / (d * d).sum(-1, keepdim=True).sqrt()",
        "changed the length",
    ),
    (TASK_VECTOR, "def f(base, experts):\n    return experts / base - 1", "divide by the base"),
    (TASK_VECTOR, "def f(base, experts):\n    return (experts - base) / 0", "NaN or infinity"),
    (TASK_VECTOR, "def f(base, experts):\n    experts -= base\n    return experts", "in place"),
    (TASK_VECTOR, "def f(base, experts):\n    experts - base", "returns None"),
    (TASK_VECTOR, "def f(base, experts):\n    return experts[0] - base", "expected shape (3, 3)"),
    (TASK_VECTOR, "def f(base, experts):\n    return experts - bass", "NameError"),
    (
        TASK_VECTOR,
        "def f(base, experts):\n    return 2 * (experts - base)",
        "expected [[0.5, 0.0, 0.0]",
    ),
    (
        AVERAGE,
        "def f(experts):\n    total = torch.zeros_like(experts[0])\n    for e in experts:\n"
        "        total = total + e\n    return total",
        "This is the sum",
    ),
    (AVERAGE, "def f(experts):\n    return experts.sum(-1) / experts.shape[-1]", "last axis"),
    (AVERAGE, "def f(experts):\n    return torch.mean(experts, dim=1)", "over axis 1"),
    (AVERAGE, "def f(experts):\n    return float(np.mean(experts.numpy()))", "one number is left"),
    (AVERAGE, "def f(experts):\n    return (experts[0] + experts[1]) / 2", "first two experts"),
    (AVERAGE, "def f(experts):\n    return 0.5 * sum(experts)", "divide by 2"),
    (AVERAGE, "def f(experts):\n    return experts.mean(0)[None]", "axis 0 with length 1"),
    (
        AVERAGE,
        "def f(experts):\n    return experts.sort(0).values[(len(experts) - 1) // 2]",
        "This is the median",
    ),
    (AVERAGE, "def f(experts):\n    return experts[0]", "expected [0.8333"),
    (AVERAGE, "def f(experts):\n    experts.mean(0)", "returns None"),
    (AVERAGE, "def f(experts):\n    return torch.mean(experts, axis=7)", "IndexError"),
    (LINE, "def f(a, b, t):\n    return b + t * (a - b)", "ends are swapped"),
    (LINE, "def f(a, b, t):\n    return torch.add(a, b, alpha=t)", "gives a + b"),
    (LINE, "def f(a, b, t):\n    return (1 + t) * a - t * b", "walk away from b"),
    (LINE, "def f(a, b, t):\n    return t * b - t * a", "without the place where it starts"),
    (LINE, "def f(a, b, t):\n    return torch.stack([a, b]).mean(0)", "middle whatever t"),
    (LINE, "def f(a, b, t):\n    return (a + b) * t", "Both shares are t"),
    (LINE, "def f(a, b, t):\n    return a if t < 0.5 else b", "expected [1.0, 2.0, 3.0]"),
    (LINE, "def f(a, b, t):\n    a += t * (b - a)\n    return a", "in place"),
    (LINE, "def f(a, b, t):\n    return [a, b][t]", "TypeError"),
    (LINE, "def f(a, b, t):\n    return (a + t * (b - a)).sum()", "expected shape (3,)"),
    (WHY, "def f():\n    return 'a'", "right angles"),
    (WHY, "def f():\n    return 'b'", "97.5 %"),
    (WHY, "def f():\n    return 'd'", "head of its own expert"),
]
RIGHT = [
    (
        TASK_VECTOR,
        "def f(base, experts):\n    return torch.stack([(e.double() - base) for e in experts])",
    ),
    (TASK_VECTOR, "def f(base, experts):\n    return torch.sub(experts, base.unsqueeze(0))"),
    (TASK_VECTOR, "def f(base, experts):\n    return experts.numpy() - base.numpy()"),
    (AVERAGE, "def f(experts):\n    return experts.double().sum(0) / len(experts)"),
    (AVERAGE, "def f(experts):\n    return sum(e / experts.shape[0] for e in experts)"),
    (
        AVERAGE,
        "def f(experts):\n    return torch.einsum('n...->...', experts) * (1 / experts.size(0))",
    ),
    (LINE, "def f(a, b, t):\n    return (1 - t) * a.double() + t * b.double()"),
    (LINE, "def f(a, b, t):\n    return b - (1 - t) * (b - a)"),
    (LINE, "def f(a, b, t):\n    return torch.stack([x + t * (y - x) for x, y in zip(a, b)])"),
    (WHY, "def f():\n    return 'c'"),
]


# ------------------------------------------------------------------------------------------ the pictures


def test_the_plane_keeps_lengths_and_angles() -> None:
    """By hand: deltas (3, 4, 0) and (0, 5, 12) have lengths 5 and 13 and the product 20."""
    base = torch.tensor([1.0, 1.0, 1.0])
    experts = base + torch.tensor([[3.0, 4.0, 0.0], [0.0, 5.0, 12.0]])
    points = pictures.plane(base, experts)
    assert points[0] == pytest.approx([5, 0])
    assert points[1] == pytest.approx([20 / 5, np.sqrt(169 - 16)])


@pytest.mark.parametrize("factor", [2.0, -1.0])
def test_the_plane_of_parallel_vectors_is_a_line(factor: float) -> None:
    delta = torch.tensor([0.1, 0.2, 0.7])
    points = pictures.plane(torch.zeros(3), torch.stack([delta, factor * delta]))
    length = np.sqrt(0.01 + 0.04 + 0.49)
    assert points == pytest.approx(np.array([[length, 0], [factor * length, 0]]), abs=1e-4)


def test_the_picture_of_the_plane_marks_both_experts_and_their_middle() -> None:
    experts = torch.tensor([[4.0, 0.0], [0.0, 2.0]])
    (axes,) = pictures.plane_picture(torch.zeros(2), experts, ("left", "right")).axes
    marks = {line.get_marker(): line.get_xydata()[0].tolist() for line in axes.lines}
    assert marks["o"] == pytest.approx([4, 0])
    assert marks["s"] == pytest.approx([0, 2])
    assert marks["D"] == pytest.approx([2, 1])
    texts = [t.get_text().strip() for t in axes.texts]
    assert {"left", "right", "average", "base"} <= set(texts)


def test_the_gallery_shows_a_picture_of_every_class_that_it_names(trained) -> None:
    """Four classes of the first task, three of the second: with n = 3 the classes 0, 2, 3 and 0, 1, 2."""
    figure = pictures.gallery(trained.tasks, n=3)
    assert len(figure.axes) == 6
    for axes, (task, label) in zip(
        figure.axes, [(0, 0), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2)], strict=True
    ):
        split = trained.tasks[task].split("reward")
        second = [i for i, c in enumerate(split.labels.tolist()) if c == label][1]
        shown = np.asarray(axes.images[0].get_array()).squeeze()
        assert np.array_equal(shown, split.images[second, 0].numpy())


# --------------------------------------------------------------------------------- what its prose claims


def test_the_right_explanation_is_decided_by_the_models() -> None:
    """Half of digits' vector, and half of textures' with or without its signs: on all of the reward split."""
    from rmm_lab.reward import predict
    from rmm_lab.search.problem import load_problem

    problem = load_problem(("demo",))
    pool, task = problem.pool, problem.tasks[0]
    random = torch.Generator().manual_seed(5)

    def digits_with(other: str) -> float:
        groups = []
        for k in range(-1, pool.n_layers):
            base, own, second = (pool.weights(s, k) for s in ("base", "digits", "textures"))
            group = {}
            for name, start in base.items():
                delta = second[name] - start
                if other == "random signs":
                    delta = delta * (2 * torch.randint(2, delta.shape, generator=random) - 1)
                elif other == "nothing":
                    delta = torch.zeros_like(delta)
                group[name] = start + 0.5 * (own[name] - start) + 0.5 * delta
            groups.append(group)
        stem = pool.architecture.stem(groups[0])
        layers = [pool.architecture.layer(k, g) for k, g in enumerate(groups[1:])]
        found = predict(pool.architecture, stem, layers, pool.heads["digits"], task, "reward")
        return task.score(found, task.split("reward").labels)

    assert digits_with("nothing") > 0.95  # so that b is wrong
    assert digits_with("random signs") > 0.92
    assert digits_with("textures") < 0.8  # so that c is right
