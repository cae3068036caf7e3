"""What all operators by formula share: laws, precision, bad input, specs, and how a pool applies them."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import layer
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from rmm_lab import operators as ops
from rmm_lab.errors import InputError
from rmm_lab.families import t5, vit
from rmm_lab.families.checkpoint import read_checkpoint
from rmm_lab.layers import LayerPool
from rmm_lab.operators import DEPTH, FACTORED, MATCHED, OPERATORS, RANDOM, SCOPE, parse_operator

PAPER = {"weight_average", "weighted_average", "task_arithmetic", "ties", "dare", "dare_ties"}
NAMES = [name for name in OPERATORS if name not in PAPER]
SCALED = [name for name in NAMES if "scale" in inspect.signature(OPERATORS[name]).parameters]
SHAPES = [(1, 7), (7, 1), (6, 4), (4, 9)]


def apply(name: str, base: Tensor, experts: Tensor, **options) -> Tensor:
    if name in RANDOM:
        options["generator"] = torch.Generator().manual_seed(0)
    if name in DEPTH:
        options.setdefault("depth", 0.5)
    return OPERATORS[name](base, experts, **options)


def counts(name: str) -> list[int]:
    return [2] if name == "slerp" else [1, 2, 3, 4]


def test_there_are_25_operators_and_a_scope_for_each():
    assert len(OPERATORS) >= 25
    assert set(SCOPE) == set(OPERATORS) | set(FACTORED) | MATCHED
    assert set(SCOPE.values()) == {"pool", "matrix", "tensor", "factors"}
    assert all(SCOPE[name] == "pool" for name in PAPER)


# ---------------------------------------------------------------- laws


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_any_number_of_experts_and_any_matrix_give_a_finite_one(name, shape):
    for n in counts(name):
        base, experts = layer(n, shape)
        merged = apply(name, base, experts)
        assert merged.shape == base.shape
        assert merged.dtype == base.dtype
        assert merged.isfinite().all()


@pytest.mark.parametrize("name", [name for name in NAMES if SCOPE[name] != "matrix"])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
def test_tensors_of_any_shape_are_merged_unless_an_operator_takes_matrices(name, shape):
    for n in counts(name):
        base, experts = layer(n, shape)
        merged = apply(name, base, experts)
        assert merged.shape == base.shape
        assert merged.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_experts_equal_to_the_base_give_the_base(name):
    for n in counts(name):
        base, _ = layer()
        assert_close(apply(name, base, base.expand(n, *base.shape)), base)


@pytest.mark.parametrize("name", SCALED)
def test_scale_zero_gives_the_base(name):
    base, experts = layer()
    assert_close(apply(name, base, experts, scale=0.0), base)


@pytest.mark.parametrize("name", SCALED)
def test_what_is_added_to_the_base_grows_with_the_scale(name):
    base, experts = layer(3) if name != "doge" else layer(1, (1, 5))
    once, twice = (apply(name, base, experts, scale=s) - base for s in (0.5, 1.0))
    assert_close(2 * once, twice)


# What makes an operator give back an expert that all experts are.
IDENTITY = {
    "wudi": {"damping": 0.0},
    "knots": {"density": 1.0},
    "star": {"energy": 1.0},
    "della": {"drop_rate": 0.0, "epsilon": 0.0},
    "emr": {},
    "magmax": {},
    "sce": {},
    "model_stock": {},
    "slerp": {},
    "karcher": {},
    "metrics_weighted_average": {},
}


@pytest.mark.parametrize("name", IDENTITY)
def test_equal_experts_give_that_expert(name):
    for n in counts(name):
        base, experts = layer(1, (4, 4))
        merged = apply(name, base, experts.expand(n, 4, 4), **IDENTITY[name])
        assert_close(merged, experts[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in RANDOM])
def test_the_order_of_experts_does_not_matter(name):
    base, experts = layer(2 if name == "slerp" else 3)
    assert_close(apply(name, base, experts.flip(0)), apply(name, base, experts))


TURNING = ["tsv", "iso_c", "iso_cts", "wudi", "star", "model_stock", "karcher"]


@pytest.mark.parametrize("name", TURNING)
@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
@pytest.mark.parametrize("moved", [True, False])
def test_a_turned_matrix_is_merged_alike(name, shape, moved):
    """No coordinate is special: Q f(W) P = f(Q W P) for orthogonal Q and P.

    Nor where an expert never moved: the singular directions of zeros are arbitrary, and not used.
    """
    base, experts = layer(3, shape)
    if not moved:
        experts[1] = base
    q, p = (torch.linalg.qr(layer(1, (n, n), seed=n)[0])[0] for n in shape)
    turned = q @ experts @ p
    turned_base = turned[1] if not moved else q @ base @ p
    assert_close(apply(name, turned_base, turned), q @ apply(name, base, experts) @ p)


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name, dtype):
    base, experts = layer(2 if name == "slerp" else 3, (8, 6), seed=3, dtype=dtype)
    before = base.clone(), experts.clone()
    merged = apply(name, base, experts)
    exact = apply(name, base.double(), experts.double())
    assert merged.dtype == dtype
    error = (merged.double() - exact).abs()
    assert torch.all(error <= exact.abs() * torch.finfo(dtype).eps / 2 + 1e-4)
    merged.add_(1)  # neither an input nor a view of one is changed
    assert torch.equal(base, before[0])
    assert torch.equal(experts, before[1])


@pytest.mark.parametrize("name", OPERATORS)
def test_runs_in_inference_mode_and_with_gradients_off_alike(name):
    base, experts = layer()
    with torch.inference_mode():
        merged = apply(name, base, experts)
    assert merged.is_inference()
    assert torch.equal(merged, apply(name, base, experts))
    assert not apply(name, base, experts).requires_grad


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1e-20, 1e15])
def test_tiny_and_huge_task_vectors_stay_finite(name, size):
    _, experts = layer(dtype=torch.float32)
    merged = apply(name, torch.zeros(6, 4), size * experts)
    assert merged.isfinite().all()


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(name, value):
    base, experts = layer()
    broken = experts.clone()
    broken[1, 2, 3] = value
    with pytest.raises(InputError, match="expert 2: expected finite weights"):
        apply(name, base, broken)
    base[0, 0] = value
    with pytest.raises(InputError, match="base: expected finite weights"):
        apply(name, base, experts)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("base", "experts"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 3)),
        (torch.zeros(2, 3), torch.zeros(0, 2, 3)),
        (torch.zeros(2, 3), torch.zeros(2, 3, 2)),
        (torch.zeros(2, 3).int(), torch.zeros(2, 2, 3)),
        (torch.zeros(2, 3), torch.zeros(2, 2, 3).long()),
    ],
)
def test_wrong_tensors_are_refused(name, base, experts):
    with pytest.raises(InputError, match="expected"):
        apply(name, base, experts)


@pytest.mark.parametrize("name", [name for name in NAMES if SCOPE[name] == "matrix"])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
def test_an_operator_on_matrices_refuses_other_tensors(name, shape):
    with pytest.raises(InputError, match=rf"{name}: expected a matrix \(out, in\), found shape"):
        apply(name, *layer(2, shape))


WRONG = {
    "scale": (math.inf, math.nan, "much", (0.5, 0.5), None, True),
    "density": (0, 1.1, "all"),
    "merge": ("max", 1),
    "common": (-0.1, 1.1),
    "energy": (0, 1.5),
    "damping": (-1, math.inf, "auto"),
    "outliers": (1, -0.1),
    "drop_rate": (1, -0.1),
    "epsilon": (1, -0.1),
    "threshold": (-1, math.inf),
    "agree": (0, 1.5),
    "factor": (-1, math.inf),
    "calibration": (math.nan,),
    "t": (-0.1, 1.1),
    "of": ("columns", 1),
    "first": (math.inf,),
    "last": (math.nan,),
    "power": (math.inf,),
    "steps": (-1, 2.5),
}


@pytest.mark.parametrize("name", NAMES)
def test_each_option_is_checked(name):
    base, experts = layer()
    parameters = inspect.signature(OPERATORS[name]).parameters.values()
    keys = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - {"generator", "depth"}
    assert keys - {"metrics"} <= WRONG.keys()
    for key in keys - {"metrics"}:
        for value in WRONG[key]:
            with pytest.raises(InputError, match=f"option {key}: expected"):
                apply(name, base, experts, **{key: value})
            text = "/".join(map(str, value)) if isinstance(value, tuple) else value
            with pytest.raises(InputError, match=f"option {key}: expected"):
                parse_operator(f"{name}:{key}={text}")


# ---------------------------------------------------------------- specs


@pytest.mark.parametrize("name", NAMES)
def test_a_spec_is_read_and_named_again(name):
    spec = parse_operator(name)
    assert (spec.name, spec.options) == (name, ())
    defaults = {
        p.name: p.default
        for p in inspect.signature(OPERATORS[name]).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.name not in ("generator", "depth", "metrics")
    }
    text = ",".join(f"{key}={value}" for key, value in defaults.items())
    spec = parse_operator(f"{name}:{text}" if text else name)
    assert dict(spec.options) == defaults
    assert parse_operator(spec.name) == spec
    base, experts = layer()
    g = torch.Generator().manual_seed(0)
    assert torch.equal(spec(base, experts, g, 0.5), apply(name, base, experts))


@settings(max_examples=40)
@given(st.lists(st.floats(0.01, 1e6), min_size=1, max_size=4))
def test_a_metric_for_each_expert_is_read_exactly(metrics):
    text = "/".join(map(repr, metrics))
    spec = parse_operator(f"metrics_weighted_average:metrics={text},power=2", len(metrics))
    assert dict(spec.options) == {"metrics": tuple(metrics), "power": 2}
    assert parse_operator(spec.name) == spec


@pytest.mark.parametrize(
    ("text", "n", "message"),
    [
        ("metrics_weighted_average:metrics=0.9/0.8", 3, "metrics: expected one for each of 3"),
        (
            "metrics_weighted_average:metrics=0.9/0",
            None,
            "metrics: expected a finite number above 0",
        ),
        ("metrics_weighted_average:metrics=0.9/", None, "metrics: expected .* found '0.9/'"),
        ("slerp:t=0.3", 3, "slerp: expected 2 experts, found 3"),
        ("tsv:scale=1/2", None, "scale: expected a finite number .*, found '1/2'"),
        ("lines:depth=0.5", None, "first, last, found 'depth'"),
        ("model_stock:scale=1", None, "expected no option, found 'scale'"),
        ("regmean:alpha=1.1", None, r"alpha: expected a number in \[0, 1\]"),
        ("regmean:ridge=1", None, "once each, out of alpha, found 'ridge'"),
        ("least_squares:ridge=-1", None, "ridge: expected 'auto' or a finite number from 0"),
        ("least_squares:ridge=some", None, "ridge: expected 'auto' or .*found 'some'"),
        ("least_squares:anchor=ties", None, "anchor: expected 'average' or 'regmean' or a finite"),
        ("least_squares:weights=1/3", 3, "weights: expected one for each of 3 experts, found 2"),
        ("least_squares:weights=1/-3", 2, "weights: expected a finite number above 0, .*found -3"),
        ("least_squares:weights=1", 2, "weights: expected one for each of 2 experts, found 1"),
    ],
)
def test_a_wrong_spec_is_refused(text, n, message):
    with pytest.raises(InputError, match=message):
        parse_operator(text, n)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("regmean", {}),
        ("regmean:alpha=0.9", {"alpha": 0.9}),
        ("least_squares:ridge=auto", {"ridge": "auto"}),
        (
            "least_squares:anchor=average,ridge=0.01,weights=1/3",
            {"anchor": "average", "ridge": 0.01, "weights": (1.0, 3.0)},
        ),
        ("least_squares:anchor=0.6", {"anchor": 0.6}),
    ],
)
def test_what_matches_activations_is_read_but_needs_more_than_weights(text, options):
    spec = parse_operator(text, 2)
    assert (spec.name, dict(spec.options)) == (text, options)
    assert spec.function in MATCHED
    assert spec.function not in OPERATORS
    with pytest.raises(InputError, match=f"{spec.function}.*expected calibration inputs"):
        spec(*layer())


# ---------------------------------------------------------------- in a pool


@pytest.fixture(scope="module")
def vits(tiny):
    folders = (tiny["base"], *tiny["experts"])
    pool = {
        scope: LayerPool(
            read_checkpoint(folders[0]),
            [read_checkpoint(f) for f in folders[1:]],
            ("e1", "e2"),
            (),
            scope=scope,
        )
        for scope in ("layer", "global")
    }
    return pool, [load_file(f"{folder}/model.safetensors") for folder in folders]


@pytest.mark.parametrize("name", [name for name in NAMES if SCOPE[name] == "matrix"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_matrices_are_merged_whole_a_fused_one_in_parts_and_the_rest_averaged(vits, name, scope):
    pools, (base, *experts) = vits
    width = TINY["model_args"]["embed_dim"]
    merged = pools[scope].weights(name, 1)
    for key, found in merged.items():
        b, stack = base[f"blocks.1.{key}"], torch.stack([e[f"blocks.1.{key}"] for e in experts])
        if key == "attn.qkv.weight":
            parts = range(0, 3 * width, width)
            expected = torch.cat(
                [OPERATORS[name](b[i : i + width], stack[:, i : i + width]) for i in parts]
            )
        elif key.endswith(("proj.weight", "fc1.weight", "fc2.weight")):
            expected = OPERATORS[name](b, stack)
        else:
            expected = stack.mean(dim=0)
        assert torch.equal(found, expected)
    stem = pools[scope].weights(name, -1)  # no matrix: a convolution, tokens, a norm
    for key, found in stem.items():
        assert torch.equal(found, torch.stack([e[key] for e in experts]).mean(dim=0))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_an_operator_by_tensor_keeps_its_scope(vits, scope):
    pools, (base, *experts) = vits
    for name in ("model_stock", "sce", "karcher:of=deltas"):
        spec = parse_operator(name)
        for key, found in pools[scope].weights(name, 0).items():
            stack = torch.stack([e[f"blocks.0.{key}"] for e in experts])
            assert torch.equal(found, spec(base[f"blocks.0.{key}"], stack))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_lines_grows_from_the_stem_to_the_last_layer(vits, scope):
    pool = vits[0][scope]
    for k, scale in zip(range(-1, 3), (0.1, 0.4, 0.7, 1.0), strict=True):
        expected = pool.weights(f"task_arithmetic:scale={scale}", k)
        for key, found in pool.weights("lines:first=0.1,last=1", k).items():
            assert_close(found, expected[key])


def test_the_masks_of_della_come_from_the_pools_seed(vits, tiny):
    folders = (tiny["base"], *tiny["experts"])
    models = [read_checkpoint(f) for f in folders]
    one, same, other = (
        LayerPool(models[0], models[1:], ("e1", "e2"), (), seed=s) for s in (1, 1, 2)
    )
    found = [pool.weights("della", 0)["mlp.fc1.weight"] for pool in (one, same, other)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_what_matches_activations_says_so_in_a_pool_without_them(vits):
    with pytest.raises(InputError, match="expected calibration inputs"):
        vits[0]["layer"].weights("regmean", 0)


def test_fused_counts_the_matrices_of_a_tensor():
    assert vit.fused("attn.qkv.weight") == vit.fused("blocks.3.attn.qkv.bias") == 3
    assert vit.fused("attn.proj.weight") == vit.fused("mlp.fc1.weight") == 1
    assert t5.fused("layer.0.SelfAttention.q.weight") == 1


def test_every_operator_merges_the_pair_that_ships():
    from rmm_lab.search.problem import load_problem

    pool = load_problem(("demo",)).pool
    for name in NAMES:
        source = f"{name}:steps=2" if name == "doge" else name
        for k in (-1, 0, pool.n_layers - 1):
            base, merged = pool.weights("base", k), pool.weights(source, k)
            assert merged.keys() == base.keys()
            for key, tensor in merged.items():
                assert tensor.shape == base[key].shape
                assert tensor.dtype == base[key].dtype
                assert tensor.isfinite().all()
            assert any(not torch.equal(merged[key], base[key]) for key in base)


def test_every_operator_merges_t5s(t5s):
    _, folders = t5s["v1.1"]
    models = [read_checkpoint(str(folder)) for folder in folders]
    pool = LayerPool(models[0], models[1:], ("one", "two"), NAMES)
    assert pool.sources[2:] == tuple(NAMES)
    for name in NAMES:
        for k in range(-1, pool.n_layers):
            for key, tensor in pool.weights(name, k).items():
                assert tensor.shape == pool.weights("base", k)[key].shape
                assert tensor.isfinite().all()
    shared = ops.tsv(*((m := [x.weights["shared.weight"] for x in models])[0], torch.stack(m[1:])))
    assert torch.equal(pool.weights("tsv", -1)["shared.weight"], shared)
