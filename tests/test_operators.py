"""The operators against numbers worked out by hand, against peft, and against their own laws."""

import inspect
import math
import re
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operator_cases import layers
from peft.utils import merge_utils as peft_merge
from torch import Tensor
from torch.testing import assert_close

from rmm_lab import operators as ops
from rmm_lab.errors import InputError
from rmm_lab.formulas import steps
from rmm_lab.operators import OPERATORS, RANDOM, OperatorSpec, parse_operator

NAMES = ["weight_average", "weighted_average", "task_arithmetic", "ties", "dare", "dare_ties"]
DETERMINISTIC = ["weight_average", "task_arithmetic", "ties"]


# A busy machine is not a failure.
law = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian_layer(seed: int = 0, n: int = 3, shape: tuple[int, ...] = (40, 50)):
    """Continuous data: no ties between magnitudes, no sum of exactly 0."""
    generator = seeded(seed)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    deltas = torch.randn((n, *shape), generator=generator, dtype=torch.float64)
    return base, base + deltas


def apply(name: str, base: Tensor, experts: Tensor, seed: int = 0, **options) -> Tensor:
    return OPERATORS[name](base, experts, generator=seeded(seed), **options)


# ---------------------------------------------------------------- by hand

BASE = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0])
DELTAS = torch.tensor(
    [
        [4.0, -1.0, 2.0, 0.5, -3.0],
        [2.0, 3.0, -2.0, 0.25, -1.0],
        [-1.0, 1.0, 0.0, 5.0, 2.0],
    ]
)
EXPERTS = BASE + DELTAS


def test_task_vectors_by_hand():
    assert_close(ops.task_vectors(BASE, EXPERTS), DELTAS, rtol=0, atol=0)


def test_weight_average_by_hand():
    base = torch.tensor([100.0, 100.0])  # ignored
    experts = torch.tensor([[1.0, -2.0], [2.0, 0.0], [6.0, 5.0]])
    assert ops.weight_average(base, experts).tolist() == [3.0, 1.0]


def test_weighted_average_by_hand():
    """Shares 0.5, 0.25, 0.25 of three experts, the second leading: an average of the experts."""
    base = torch.tensor([1.0, 2.0])
    experts = torch.tensor([[2.0, 0.0], [4.0, 8.0], [6.0, 4.0]])
    merged = ops.weighted_average(base, experts, expert=2, share=0.5)
    assert merged.tolist() == [0.25 * 2 + 0.5 * 4 + 0.25 * 6, 0.25 * 0 + 0.5 * 8 + 0.25 * 4]
    stretched = ops.weighted_average(base, experts, expert=2, share=0.5, scale=2.0)
    assert stretched.tolist() == [1 + 2 * (4.0 - 1), 2 + 2 * (5.0 - 2)]


def test_task_arithmetic_with_a_scale_per_expert_by_hand():
    base = torch.tensor([1.0, 2.0])
    experts = torch.tensor([[3.0, 0.0], [5.0, 10.0]])  # task vectors [2, -2] and [4, 8]
    merged = ops.task_arithmetic(base, experts, scale=(0.5, -0.25))
    assert merged.tolist() == [1 + 0.5 * 2 - 0.25 * 4, 2 + 0.5 * -2 - 0.25 * 8]
    spec = parse_operator("task_arithmetic:scale=0.5/-0.25")
    assert spec(base, experts).tolist() == merged.tolist()
    assert ops.task_arithmetic(base, experts, scale=(0.0, 1.0)).tolist() == [5.0, 10.0]


@pytest.mark.parametrize("scales", [(0.3, 0.7, -0.2), (1.0, 1.0, 1.0)])
def test_a_scale_per_expert_equals_peft(scales):
    base, experts = gaussian_layer(seed=1)
    weights = torch.tensor(scales, dtype=torch.float64)
    expected = base + peft_merge.task_arithmetic(list(experts - base), weights)
    assert_close(ops.task_arithmetic(base, experts, scale=scales), expected)


@pytest.mark.parametrize("scales", [(0.5,), (0.5, 0.5), (0.5, 0.5, 0.5, 0.5), ()])
def test_another_number_of_scales_than_experts_is_refused(scales):
    with pytest.raises(InputError, match="scales: expected one for each of 3 experts, found"):
        ops.task_arithmetic(BASE, EXPERTS, scale=scales)


def test_a_share_of_one_is_the_expert_and_an_equal_share_the_average():
    base, experts = torch.zeros(3), torch.tensor([[1.0, 2.0, 3.0], [5.0, 4.0, 0.0]])
    assert torch.equal(ops.weighted_average(base, experts, expert=2, share=1.0), experts[1])
    half = ops.weighted_average(base, experts, expert=1, share=0.5)
    assert torch.equal(half, ops.weight_average(base, experts))


@pytest.mark.parametrize("expert", [0, 3, 1.5, -1, math.inf, math.nan])
def test_an_expert_to_lean_to_must_exist(expert):
    with pytest.raises(InputError, match="option expert: expected"):
        ops.weighted_average(torch.zeros(2), torch.ones(2, 2), expert=expert)


def test_a_weighted_average_without_an_expert_leans_to_each():
    found = ops.expand_operators(["ties", "weighted_average:share=0.6", "weighted_average"], 3)
    assert found == [
        "ties",
        "weighted_average:expert=1,share=0.6",
        "weighted_average:expert=2,share=0.6",
        "weighted_average:expert=3,share=0.6",
        "weighted_average:expert=1",
        "weighted_average:expert=2",
        "weighted_average:expert=3",
    ]
    one = ops.expand_operators(["weighted_average:expert=2,share=0.6"], 3)
    assert one == ["weighted_average:expert=2,share=0.6"]
    found = ops.expand_operators(["least_squares:lean=3,fit=whole", "least_squares"], 2)
    assert found == [
        "least_squares:fit=whole,weights=3/1",
        "least_squares:fit=whole,weights=1/3",
        "least_squares",
    ]


def test_task_arithmetic_by_hand():
    assert ops.task_arithmetic(BASE, EXPERTS).tolist() == [6.0, 4.0, 1.0, 6.75, -1.0]
    assert ops.task_arithmetic(BASE, EXPERTS, scale=0.5).tolist() == [3.5, 2.5, 1.0, 3.875, 0.0]


def test_trim_by_hand():
    # density 0.4 of 5 entries: 2 kept per expert. Expert 2 ties 2 and -2: the lower index stays.
    assert ops.trim(DELTAS, 0.4).tolist() == [
        [4.0, 0.0, 0.0, 0.0, -3.0],
        [2.0, 3.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 5.0, 2.0],
    ]


def test_trim_ranks_over_the_whole_tensor_not_per_row():
    deltas = torch.tensor([[[9.0, -8.0], [1.0, 2.0]]])
    assert ops.trim(deltas, 0.5).tolist() == [[[9.0, -8.0], [0.0, 0.0]]]


def test_trim_ranks_each_expert_by_itself():
    deltas = torch.tensor([[100.0, 200.0], [1.0, 2.0]])
    assert ops.trim(deltas, 0.5).tolist() == [[0.0, 200.0], [0.0, 2.0]]


@pytest.mark.parametrize(
    ("density", "kept"), [(0.01, 1), (0.2, 1), (0.39, 1), (0.4, 2), (0.99, 4), (1.0, 5)]
)
def test_trim_breaks_ties_by_lower_index_and_keeps_at_least_one(density, kept):
    deltas = torch.tensor([[-7.0, 7.0, 7.0, -7.0, 7.0]])
    expected = [-7.0, 7.0, 7.0, -7.0, 7.0][:kept] + [0.0] * (5 - kept)
    assert ops.trim(deltas, density).tolist() == [expected]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_trim_works_in_each_dtype(dtype):
    deltas = torch.tensor([[0.5, -4.0, 2.0, -2.0, 1.0]], dtype=dtype)
    trimmed = ops.trim(deltas, 0.4)
    assert (trimmed.dtype, trimmed.tolist()) == (dtype, [[0.0, -4.0, 2.0, 0.0, 0.0]])


def test_trim_of_zeros_and_of_fewer_entries_than_places():
    assert ops.trim(torch.zeros(2, 5), 0.4).tolist() == [[0.0] * 5] * 2
    assert ops.trim(torch.tensor([[0.0, 3.0, 0.0, 0.0, 0.0]]), 0.6).tolist() == [[0, 3, 0, 0, 0]]


def test_trim_keeps_nothing_of_an_expert_with_a_nan_but_the_nan():
    trimmed = ops.trim(torch.tensor([[1.0, math.nan, 5.0, 2.0], [1.0, 3.0, 5.0, 2.0]]), 0.5)
    assert str(trimmed.tolist()) == "[[0.0, nan, 0.0, 0.0], [0.0, 3.0, 5.0, 0.0]]"


def test_trim_rounds_the_count_down():
    assert ops.trim(torch.arange(1.0, 8.0)[None], 0.4).tolist() == [[0, 0, 0, 0, 0, 6, 7]]


def test_elect_sign_by_hand_with_a_zero_sum():
    # column sums: 5, 3, 0, 5.75, -2. In column 2 the signs are 2 and -2: they cancel, so 0.
    assert ops.elect_sign(DELTAS).tolist() == [1.0, 1.0, 0.0, 1.0, -1.0]


def test_elect_sign_weighs_magnitude_not_votes():
    assert ops.elect_sign(torch.tensor([[-1.0], [-1.0], [3.0]])).tolist() == [1.0]


def test_disjoint_merge_by_hand():
    sign = torch.tensor([1.0, 1.0, 0.0, 1.0, -1.0])
    merged = ops.disjoint_merge(DELTAS, sign)
    assert_close(merged, torch.tensor([3.0, 2.0, 0.0, 1.9166667, -2.0]))
    assert ops.disjoint_merge(DELTAS, sign, merge="sum").tolist() == [6.0, 4.0, 0.0, 5.75, -4.0]


def test_disjoint_merge_does_not_count_zeros_in_the_mean():
    deltas = torch.tensor([[6.0, -1.0], [0.0, -3.0], [2.0, 0.0]])
    assert ops.disjoint_merge(deltas, torch.tensor([1.0, -1.0])).tolist() == [4.0, -2.0]


def test_disjoint_merge_is_zero_where_no_expert_agrees():
    deltas = torch.tensor([[6.0, 0.0], [1.0, 0.0]])
    assert ops.disjoint_merge(deltas, torch.tensor([-1.0, 1.0])).tolist() == [0.0, 0.0]


def test_ties_by_hand_mean_and_sum():
    # Trimmed as above; column sums 6, 3, 0, 5, -1; so the signs are +, +, 0, +, -.
    mean, total = [3.0, 3.0, 0.0, 5.0, -3.0], [6.0, 3.0, 0.0, 5.0, -3.0]
    assert ops.ties(BASE, EXPERTS, density=0.4).tolist() == [1 + x for x in mean]
    assert ops.ties(BASE, EXPERTS, density=0.4, merge="sum").tolist() == [1 + x for x in total]
    assert ops.ties(BASE, EXPERTS, density=0.4, scale=2).tolist() == [1 + 2 * x for x in mean]


def test_ties_with_a_density_and_a_scale_for_each_expert_by_hand():
    base = torch.tensor([1.0, 1.0, 1.0, 1.0])
    experts = base + torch.tensor([[4.0, -2.0, 1.0, 0.0], [-1.0, 3.0, 2.0, 5.0]])
    # Trimmed: 4 0 0 0 and -1 3 2 5. Times 2 and 0.5: 8 0 0 0 and -0.5 1.5 1 2.5. Signs: all +.
    merged = ops.ties(base, experts, density=(0.25, 1.0), scale=(2.0, 0.5), merge="sum")
    assert merged.tolist() == [9.0, 2.5, 2.0, 3.5]
    # Times 1 and -5: 4 0 0 0 and 5 -15 -10 -25. The first agree, and their mean is 4.5.
    merged = ops.ties(base, experts, density=(0.25, 1.0), scale=(1.0, -5.0))
    assert merged.tolist() == [5.5, -14.0, -9.0, -24.0]
    one = ops.ties(base, experts, density=0.5, scale=(0.7, 0.7))
    assert_close(one, ops.ties(base, experts, density=0.5, scale=0.7))
    spec = ops.parse_operator("ties:scale=2/0.5,density=0.25/1,merge=sum", 2)
    assert spec.name == "ties:density=0.25/1,merge=sum,scale=2/0.5"
    assert spec(base, experts).tolist() == [9.0, 2.5, 2.0, 3.5]
    with pytest.raises(InputError, match="densities: expected one for each of 3 experts, found 2"):
        ops.parse_operator("ties:density=0.25/1", 3)
    with pytest.raises(InputError, match="scales: expected one for each of 2 experts, found 3"):
        ops.ties(base, experts, scale=(1.0, 1.0, 1.0))


def test_ties_keeps_the_base_where_the_sum_is_zero():
    base = torch.tensor([5.0, 5.0])
    experts = torch.tensor([[7.0, 6.0], [3.0, 6.0]])
    assert ops.ties(base, experts, density=1.0).tolist() == [5.0, 6.0]


def mask_of(shape: tuple[int, ...], drop_rate: float, seed: int) -> Tensor:
    """The documented draw: an entry stays where a float64 uniform is at least the drop rate."""
    return torch.rand(shape, generator=seeded(seed), dtype=torch.float64) >= drop_rate


def test_dare_by_hand_on_a_known_mask():
    mask = mask_of((3, 5), 0.5, seed=3)
    assert 3 <= mask.sum() <= 12  # a mask worth testing on
    expected = [
        1.0 + sum(2 * DELTAS[i, j].item() for i in range(3) if mask[i, j]) for j in range(5)
    ]
    assert ops.dare(BASE, EXPERTS, drop_rate=0.5, generator=seeded(3)).tolist() == expected
    expected_half = [1.0 + (x - 1.0) / 2 for x in expected]
    merged = ops.dare(BASE, EXPERTS, drop_rate=0.5, scale=0.5, generator=seeded(3))
    assert merged.tolist() == expected_half


@pytest.mark.parametrize("merge", ["mean", "sum"])
def test_dare_ties_by_hand_on_a_known_mask(merge):
    mask = mask_of((3, 5), 0.5, seed=3)
    expected = []
    for j in range(5):
        values = [2 * DELTAS[i, j].item() for i in range(3) if mask[i, j]]
        agreeing = [v for v in values if v * sum(values) > 0]
        count = max(1, len(agreeing)) if merge == "mean" else 1
        expected.append(1.0 + sum(agreeing) / count)
    merged = ops.dare_ties(BASE, EXPERTS, drop_rate=0.5, merge=merge, generator=seeded(3))
    assert_close(merged, torch.tensor(expected))


def test_dare_ties_with_a_scale_for_each_expert_by_hand():
    base = torch.tensor([1.0, 1.0, 1.0])
    experts = base + torch.tensor([[4.0, -2.0, 1.0], [-8.0, 3.0, 2.0]])
    # Times 0.75 and 0.25: 3 -1.5 0.75 and -2 0.75 0.5. Signs: + - +.
    options = {"drop_rate": 0, "scale": (0.75, 0.25)}
    assert ops.dare_ties(base, experts, merge="sum", **options).tolist() == [4.0, -0.5, 2.25]
    assert ops.dare_ties(base, experts, **options).tolist() == [4.0, -0.5, 1.625]
    # With all weight on one expert its sign is elected everywhere: DARE of that expert alone.
    corner = ops.dare_ties(base, experts, drop_rate=0.5, scale=(0.0, 1.0), generator=seeded(3))
    mask = mask_of((2, 3), 0.5, seed=3)
    assert corner.tolist() == (base + 2 * mask[1] * (experts[1] - base)).tolist()
    assert ops.parse_operator("dare_ties:scale=0.5/0.25", 2).name == "dare_ties:scale=0.5/0.25"
    with pytest.raises(InputError, match="scales: expected one for each of 3 experts, found 2"):
        ops.parse_operator("dare_ties:scale=0.5/0.25", 3)


def test_dare_ties_without_drop_is_ties_without_trim_by_hand():
    # elected signs +, +, 0, +, -; the disjoint mean is computed over all the agreeing entries
    merged = ops.dare_ties(BASE, EXPERTS, drop_rate=0)
    assert_close(merged, torch.tensor([4.0, 3.0, 1.0, 2.9166667, -1.0]))


# ---------------------------------------------------------------- laws


@law
@given(layers(), st.floats(0.01, 1.0))
def test_trim_keeps_exactly_k_largest_entries_unchanged(layer, density):
    base, experts = layer
    # Nonzero deltas, so that a kept entry can be told from a dropped one.
    deltas = torch.where(experts == 0, torch.full_like(experts, 0.125), experts)
    trimmed = ops.trim(deltas, density)
    k = max(1, int(density * base.numel()))
    for before, after in zip(deltas, trimmed, strict=True):
        before, after = before.flatten().tolist(), after.flatten().tolist()
        ranked = sorted(range(len(before)), key=lambda i: (-abs(before[i]), i))
        assert after == [x if i in ranked[:k] else 0.0 for i, x in enumerate(before)]


@law
@given(layers(min_experts=1))
def test_one_expert_untrimmed_and_undropped_is_that_expert(layer):
    base, experts = layer
    expert = experts[:1]
    options = {"ties": {"density": 1.0}, "dare": {"drop_rate": 0}, "dare_ties": {"drop_rate": 0}}
    for name in NAMES:
        assert torch.equal(apply(name, base, expert, **options.get(name, {})), expert[0])


@law
@given(layers(min_experts=2), st.randoms(use_true_random=False), st.floats(0.1, 1.0))
def test_order_of_experts_does_not_matter(layer, random, density):
    base, experts = layer
    order = list(range(len(experts)))
    random.shuffle(order)
    for name in DETERMINISTIC:
        options = {"density": density} if name == "ties" else {}
        there, back = (apply(name, base, e, **options) for e in (experts, experts[order]))
        assert torch.equal(there, back)


@law
@given(layers(), st.integers(1, 5))
def test_average_of_identical_experts_is_that_expert(layer, n):
    base, experts = layer
    merged = ops.weight_average(base, experts[:1].expand(n, *base.shape))
    assert_close(merged, experts[0])


@law
@given(layers(), st.floats(-2, 2))
def test_experts_equal_to_the_base_give_the_base(layer, scale):
    base, experts = layer
    same = base.expand(experts.shape)
    assert_close(ops.weight_average(base, same), base)
    for name in NAMES[1:]:
        assert torch.equal(apply(name, base, same, scale=scale), base)


@law
@given(layers())
def test_scale_zero_gives_the_base(layer):
    base, experts = layer
    for name in NAMES[1:]:
        assert torch.equal(apply(name, base, experts, scale=0.0), base)


@law
@given(layers(), st.floats(0.0, 0.95), st.integers(0, 2**32))
def test_drop_and_rescale_gives_zero_or_the_rescaled_delta(layer, p, seed):
    deltas = ops.task_vectors(*layer)
    dropped = ops.drop_and_rescale(deltas, p, seeded(seed))
    rescaled = (deltas.double() / (1 - p)).float()
    is_zero = dropped == 0
    assert torch.all(is_zero | torch.isclose(dropped, rescaled, rtol=1e-6, atol=0))


def test_drop_and_rescale_drops_the_stated_fraction_independently_per_expert():
    p, size = 0.34, 100_000
    dropped = ops.drop_and_rescale(torch.ones(2, size), p, seeded(1)) == 0
    tolerance = 4 * math.sqrt(p * (1 - p) / size)
    assert dropped[0].double().mean().item() == pytest.approx(p, abs=tolerance)
    assert dropped[1].double().mean().item() == pytest.approx(p, abs=tolerance)
    both = (dropped[0] & dropped[1]).double().mean().item()  # p * p if independent, p if shared
    assert both == pytest.approx(p * p, abs=4 * math.sqrt(p * p * (1 - p * p) / size))


def test_drop_and_rescale_is_unbiased_over_seeds():
    p, seeds = 0.7, 4000
    deltas = torch.tensor([[1.0, -3.0], [0.5, 8.0]], dtype=torch.float64)
    draws = torch.stack([ops.drop_and_rescale(deltas, p, seeded(s)) for s in range(seeds)])
    standard_error = deltas.abs() * math.sqrt(p / (1 - p) / seeds)  # of the mean, by the formula
    assert torch.all((draws.mean(0) - deltas).abs() <= 4 * standard_error)


def test_drop_rate_zero_is_the_identity_and_no_alias():
    dropped = ops.drop_and_rescale(DELTAS, 0.0)
    assert torch.equal(dropped, DELTAS)
    assert dropped.data_ptr() != DELTAS.data_ptr()


@pytest.mark.parametrize("name", ["dare", "dare_ties"])
def test_the_seed_decides_the_result(name):
    base, experts = gaussian_layer()
    first, again, other = (apply(name, base, experts, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", ["dare", "dare_ties"])
def test_the_global_random_state_neither_matters_nor_moves(name):
    base, experts = gaussian_layer()
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    first = apply(name, base, experts, seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(12)
    assert torch.equal(first, apply(name, base, experts, seed=1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_inputs_stay_unmodified_and_the_dtype_stays(name, dtype):
    base, experts = (x.to(dtype) for x in gaussian_layer())
    base_before, experts_before = base.clone(), experts.clone()
    merged = apply(name, base, experts)
    assert merged.dtype == dtype
    assert merged.shape == base.shape
    assert torch.equal(base, base_before)
    assert torch.equal(experts, experts_before)
    merged.add_(1)  # nor is the result a view of an input
    assert torch.equal(base, base_before)
    assert torch.equal(experts, experts_before)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name, dtype):
    base, experts = (x.to(dtype) for x in gaussian_layer(n=4))
    exact = apply(name, base.double(), experts.double())
    # one rounding at the end, so at most half a unit in the last place (plus float32's own error)
    error = (apply(name, base, experts).double() - exact).abs()
    assert torch.all(error <= exact.abs() * torch.finfo(dtype).eps / 2 + 1e-5)


def test_half_precision_sums_do_not_overflow():
    base = torch.zeros(2, dtype=torch.float16)
    experts = torch.tensor([[60000.0, 1.0], [60000.0, 3.0]], dtype=torch.float16)
    assert ops.weight_average(base, experts).tolist() == [60000.0, 2.0]
    assert ops.ties(base, experts, density=1.0).tolist() == [60000.0, 2.0]


@pytest.mark.parametrize("name", NAMES)
def test_nan_of_a_diverged_expert_stays_visible(name):
    base, experts = gaussian_layer(shape=(20,))
    experts[1, 7] = math.nan
    assert apply(name, base, experts).isnan().nonzero().tolist() == [[7]]


def test_the_operators_differ_on_random_data():
    """A published version of this search trimmed and dropped nothing: see its operators agree."""
    base, experts = gaussian_layer()
    merged = {name: apply(name, base, experts) for name in NAMES}
    merged["ties, sum"] = apply("ties", base, experts, merge="sum")
    merged["dare_ties, sum"] = apply("dare_ties", base, experts, merge="sum")
    merged["ties, all"] = apply("ties", base, experts, density=1.0)
    names = list(merged)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            differing = (merged[one] != merged[other]).double().mean()
            assert differing > 0.1, f"{one} and {other} differ in only {differing:.1%} of entries"


def test_trim_and_drop_really_zero_entries():
    deltas = ops.task_vectors(*gaussian_layer(n=3))  # 2000 entries each, none of them 0
    assert (ops.trim(deltas, 0.3) != 0).flatten(1).sum(1).tolist() == [600, 600, 600]
    kept = (ops.drop_and_rescale(deltas, 0.34, seeded()) != 0).double().mean().item()
    assert kept == pytest.approx(0.66, abs=4 * math.sqrt(0.34 * 0.66 / 6000))


# ---------------------------------------------------------------- against peft


@pytest.fixture
def quiet_peft():
    with warnings.catch_warnings():  # peft warns when it prunes nothing
        warnings.filterwarnings("ignore", message="The density")
        yield


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_task_arithmetic_equals_peft(scale):
    base, experts = gaussian_layer(seed=1)
    weights = torch.full((3,), scale, dtype=torch.float64)
    expected = base + peft_merge.task_arithmetic(list(experts - base), weights)
    assert_close(ops.task_arithmetic(base, experts, scale=scale), expected)


@pytest.mark.parametrize("density", [0.01, 0.2, 0.3, 0.77, 1.0])
def test_trim_equals_peft(density, quiet_peft):
    deltas = torch.randn(3, 40, 50, generator=seeded(2))
    expected = peft_merge.magnitude_prune(list(deltas), torch.ones(3), density)
    assert_close(ops.trim(deltas, density).sum(0), expected)


@pytest.mark.parametrize("density", [0.01, 0.2, 0.3, 0.77, 1.0])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_ties_equals_peft(density, n, quiet_peft):
    base, experts = gaussian_layer(seed=3, n=n)
    weights = torch.full((n,), 0.7, dtype=torch.float64)
    expected = base + peft_merge.ties(list(experts - base), weights, density)
    assert_close(ops.ties(base, experts, density=density, scale=0.7), expected)


DARES = [("dare", peft_merge.dare_linear), ("dare_ties", peft_merge.dare_ties)]


@pytest.fixture
def our_masks_in_peft(monkeypatch):
    """peft draws from the global state; here its draws are replaced by our documented ones."""
    masks: list[Tensor] = []
    monkeypatch.setattr(torch, "bernoulli", lambda input: masks.pop(0).to(input.dtype))
    return masks


@pytest.mark.parametrize("drop_rate", [0.34, 0.9])
@pytest.mark.parametrize(("name", "oracle"), DARES)
def test_dare_equals_peft_on_the_same_mask(name, oracle, drop_rate, our_masks_in_peft):
    base, experts = gaussian_layer(seed=4)
    our_masks_in_peft.extend(mask_of((3, 40, 50), drop_rate, seed=5))
    weights = torch.full((3,), 0.7, dtype=torch.float64)
    expected = base + oracle(list(experts - base), weights, 1 - drop_rate)
    assert our_masks_in_peft == []  # peft used one mask per expert
    assert_close(apply(name, base, experts, seed=5, drop_rate=drop_rate, scale=0.7), expected)


@pytest.mark.parametrize(("name", "oracle"), DARES)
def test_dare_without_drop_equals_peft(name, oracle, quiet_peft):
    base, experts = gaussian_layer(seed=6)
    expected = base + oracle(list(experts - base), torch.ones(3, dtype=torch.float64), 1.0)
    assert_close(OPERATORS[name](base, experts, drop_rate=0), expected)


# ---------------------------------------------------------------- layers of several blocks

LARGE = 3 * steps.BLOCK + 11  # blocks of BLOCK, BLOCK and BLOCK + 11 entries


@pytest.mark.parametrize("n", [2, 5])
def test_a_large_ties_equals_peft(n):
    base, experts = gaussian_layer(seed=7, n=n, shape=(LARGE,))
    expected = base + peft_merge.ties(list(experts - base), torch.ones(n), 0.3)
    assert_close(ops.ties(base, experts, density=0.3), expected)


@pytest.mark.parametrize(("name", "oracle"), DARES)
def test_a_large_dare_draws_one_stream_over_all_experts(name, oracle, our_masks_in_peft):
    """The masks of all blocks are those of one draw of shape (N, numel), expert after expert."""
    base, experts = gaussian_layer(seed=8, shape=(LARGE,))
    our_masks_in_peft.extend(mask_of((3, LARGE), 0.34, seed=9))
    expected = base + oracle(list(experts - base), torch.ones(3), 0.66)
    assert_close(apply(name, base, experts, seed=9), expected)


def test_a_large_drop_draws_and_leaves_the_generator_as_one_draw_does():
    deltas, generator, whole = torch.ones(2, LARGE), seeded(3), seeded(3)
    dropped = ops.drop_and_rescale(deltas, 0.5, generator)
    uniform = torch.rand((2, LARGE), generator=whole, dtype=torch.float64)
    assert torch.equal(dropped, 2.0 * (uniform >= 0.5))
    assert torch.equal(generator.get_state(), whole.get_state())


@pytest.mark.parametrize("name", ["ties", "dare", "dare_ties"])
@pytest.mark.parametrize("n", [2, 9])
def test_blocks_change_no_bit(name, n, monkeypatch):
    base, experts = (x.float() for x in gaussian_layer(seed=10, n=n, shape=(3, 4999)))
    whole = apply(name, base, experts)  # smaller than one block
    monkeypatch.setattr(steps, "BLOCK", 1024)
    assert torch.equal(apply(name, base, experts), whole)


@pytest.mark.parametrize("name", ["ties", "dare", "dare_ties"])
def test_a_nan_of_a_large_layer_stays_where_it_is(name):
    base, experts = gaussian_layer(shape=(LARGE,))
    experts[1, steps.BLOCK] = math.nan
    assert apply(name, base, experts).isnan().nonzero().tolist() == [[steps.BLOCK]]


@pytest.mark.parametrize("name", ["ties", "dare", "dare_ties"])
def test_an_operator_is_its_published_steps_in_order(name):
    """To the bit: what a reader of the steps computes is what the operator gives."""
    base, experts = (x.float() for x in gaussian_layer(seed=11))
    deltas = ops.task_vectors(base, experts)
    deltas = (
        ops.trim(deltas, 0.3) if name == "ties" else ops.drop_and_rescale(deltas, 0.34, seeded(2))
    )
    merged = deltas.sum(0) if name == "dare" else ops.disjoint_merge(deltas, ops.elect_sign(deltas))
    assert torch.equal(apply(name, base, experts, seed=2, scale=0.7), base + 0.7 * merged)


# ---------------------------------------------------------------- operators as text


def test_the_table_of_operators():
    assert list(OPERATORS)[: len(NAMES)] == NAMES
    assert all(OPERATORS[name] is getattr(ops, name) for name in OPERATORS)
    assert {"dare", "dare_ties", "della"} == RANDOM


@pytest.mark.parametrize(
    ("name", "defaults"),
    [
        ("weight_average", {}),
        ("weighted_average", {"expert": 1, "share": 0.75, "scale": 1.0}),
        ("task_arithmetic", {"scale": 1.0}),
        ("ties", {"density": 0.3, "scale": 1.0, "merge": "mean"}),
        ("dare", {"drop_rate": 0.34, "scale": 1.0}),
        ("dare_ties", {"drop_rate": 0.34, "scale": 1.0, "merge": "mean"}),
    ],
)
def test_defaults_are_the_published_ones(name, defaults):
    parameters = inspect.signature(OPERATORS[name]).parameters.values()
    found = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert found == defaults | {"generator": None}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ties", OperatorSpec("ties", "ties", ())),
        (
            " ties : scale=1.0, density=0.30 ",
            OperatorSpec("ties:density=0.3,scale=1", "ties", (("density", 0.3), ("scale", 1.0))),
        ),
        (
            "task_arithmetic:scale=5e-1",
            OperatorSpec("task_arithmetic:scale=0.5", "task_arithmetic", (("scale", 0.5),)),
        ),
        (
            "dare_ties:merge=sum,drop_rate=0.9",
            OperatorSpec(
                "dare_ties:drop_rate=0.9,merge=sum",
                "dare_ties",
                (("drop_rate", 0.9), ("merge", "sum")),
            ),
        ),
    ],
)
def test_parse_operator(text, expected):
    assert parse_operator(text) == expected


@law
@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=4))
def test_the_name_of_several_scales_says_them_exactly(scales):
    spec = parse_operator(f"task_arithmetic:scale={'/'.join(map(repr, scales))}")
    assert spec.options == (("scale", tuple(scales)),)
    assert parse_operator(spec.name) == spec


@law
@given(st.sampled_from(NAMES[1:]), st.floats(-1e6, 1e6))
def test_the_name_says_exactly_which_operator_it_is(function, scale):
    spec = parse_operator(f"{function}:scale={scale!r}")
    assert spec.options == (("scale", scale),)
    assert parse_operator(spec.name) == spec


def test_a_spec_applies_its_options():
    spec = parse_operator("ties:merge=sum,density=0.4")
    assert spec(BASE, EXPERTS).tolist() == [7.0, 4.0, 1.0, 6.0, -2.0]
    spec = parse_operator("task_arithmetic:scale=0.5")
    assert spec(BASE, EXPERTS, seeded()).tolist() == [3.5, 2.5, 1.0, 3.875, 0.0]


def test_a_spec_passes_the_generator_on():
    base, experts = gaussian_layer()
    expected = ops.dare(base, experts, drop_rate=0.9, generator=seeded(8))
    assert torch.equal(parse_operator("dare:drop_rate=0.9")(base, experts, seeded(8)), expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "tise",
            r"'tise'.*weight_average, weighted_average, task_arithmetic, ties, dare, dare_ties",
        ),
        ("", r"operator '': expected one of"),
        ("TIES", r"operator 'TIES'"),
        ("ties:densty=0.3", r"density, scale, merge, found 'densty'"),
        ("ties:generator=1", r"found 'generator'"),
        ("ties:base=1", r"found 'base'"),
        ("dare:density=0.3", r"drop_rate, scale, found 'density'"),
        ("weight_average:scale=1", r"expected no option, found 'scale'"),
        ("ties:", r"key=value.*found ''"),
        ("ties:density=0.3,", r"found ''"),
        ("ties:scale=1,scale=2", r"found 'scale' twice"),
        ("ties:density", r"density: expected a number in \(0, 1\], found ''"),
        ("ties:density=much", r"density: expected a number in \(0, 1\], found 'much'"),
        ("ties:density=0", r"density: expected a number in \(0, 1\], found 0\.0"),
        ("ties:density=1.01", r"density: .*1\.01"),
        ("ties:density=nan", r"density: .*nan"),
        ("dare:drop_rate=1", r"drop_rate: expected a number in \[0, 1\), found 1\.0"),
        ("dare:drop_rate=-0.1", r"drop_rate: .*-0\.1"),
        ("ties:scale=inf", r"scale: expected a finite number .*, found inf"),
        ("dare:scale=0.3/0.5", r"scale: expected a finite number .*, found '0.3/0.5'"),
        ("ties:density=0.3/1.5", r"density: expected a number in \(0, 1\], found 1.5"),
        ("task_arithmetic:scale=0.3/", r"scale: expected a finite number .*, found '0.3/'"),
        ("task_arithmetic:scale=0.3/inf", r"scale: expected a finite number .*, found inf"),
        ("ties:merge=median", r"merge: expected 'mean' or 'sum', found 'median'"),
        ("weighted_average:expert=inf", r"expert: expected a whole number from 1, found inf"),
        ("ties:merge=1", r"merge: expected 'mean' or 'sum'"),
    ],
)
def test_a_wrong_spec_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_operator(text)


# ---------------------------------------------------------------- wrong inputs


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("base", "experts", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 3, 2), r"shape \(2, 3\).*found shape \(2, 3, 2\)"),
        (torch.zeros(2, 3), torch.zeros(2, 3), r"shape \(2, 3\).*found shape \(2, 3\)"),
        (torch.zeros(3), torch.zeros(2, 1), r"shape \(3,\).*found shape \(2, 1\)"),
        (torch.zeros(3), torch.zeros(0, 3), r"N >= 1.*found shape \(0, 3\)"),
        (torch.zeros(()), torch.zeros(()), r"N >= 1.*found shape \(\)"),
        (torch.zeros(0), torch.zeros(2, 0), r"found shape \(2, 0\)"),
        (torch.zeros(3).int(), torch.zeros(2, 3), r"base: expected a floating.*torch\.int32"),
        (torch.zeros(3), torch.zeros(2, 3).long(), r"experts: expected .*floating.*torch\.int64"),
    ],
)
def test_wrong_tensors_are_refused(name, base, experts, message):
    with pytest.raises(InputError, match=message):
        apply(name, base, experts)


@pytest.mark.parametrize(
    "step",
    [
        lambda deltas: ops.trim(deltas, 0.5),
        lambda deltas: ops.elect_sign(deltas),
        lambda deltas: ops.disjoint_merge(deltas, torch.zeros(3)),
        lambda deltas: ops.drop_and_rescale(deltas, 0.5, seeded()),
    ],
)
@pytest.mark.parametrize(
    "deltas", [torch.tensor(1.0), torch.zeros(0, 3), torch.zeros(2, 3, dtype=torch.int64)]
)
def test_wrong_deltas_are_refused(step, deltas):
    with pytest.raises(InputError, match="deltas: expected N >= 1 floating tensors"):
        step(deltas)


def test_a_sign_of_another_shape_is_refused():
    with pytest.raises(InputError, match=r"shape \(4,\).*found shape \(3, 5\)"):
        ops.disjoint_merge(DELTAS, torch.ones(4))


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("ties", "density", 0),
        ("ties", "density", -0.1),
        ("ties", "density", 1.5),
        ("ties", "density", math.nan),
        ("ties", "density", True),
        ("ties", "density", "0.3"),
        ("dare", "drop_rate", 1.0),
        ("dare", "drop_rate", -0.01),
        ("dare_ties", "drop_rate", math.nan),
        ("task_arithmetic", "scale", math.inf),
        ("ties", "scale", math.nan),
        ("dare", "scale", -math.inf),
        ("dare_ties", "scale", None),
        ("dare", "scale", (0.5, 0.5, 0.5)),
        ("ties", "merge", "max"),
        ("dare_ties", "merge", None),
    ],
)
def test_wrong_options_are_refused(name, option, value):
    with pytest.raises(InputError, match=f"{option}: expected .*found {re.escape(repr(value))}"):
        apply(name, BASE, EXPERTS, **{option: value})


@pytest.mark.parametrize("name", ["dare", "dare_ties"])
@pytest.mark.parametrize("generator", [None, 7])
def test_a_random_operator_without_a_generator_is_refused(name, generator):
    message = f"generator: expected a seeded one.*found {generator}"
    with pytest.raises(InputError, match=message):
        OPERATORS[name](BASE, EXPERTS, generator=generator)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_a_cuda_layer_gives_the_same_result_with_a_cpu_generator(name):
    base, experts = gaussian_layer()
    on_cuda = apply(name, base.cuda(), experts.cuda())
    assert on_cuda.is_cuda
    assert_close(on_cuda.cpu(), apply(name, base, experts))


@pytest.mark.parametrize(
    "text", ["ties:density=0", "ties:density", "dare:drop_rate=1", "slerp:at=x"]
)
def test_a_wrong_option_names_its_operator(text):
    with pytest.raises(InputError, match=f"^operator '{text}': (option )?.*expected"):
        parse_operator(text)
