"""The pool's layers against the experts' files, read with safetensors and merged by hand."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import pickle
import weakref

import pytest
import torch
from conftest import TINY, random_weights
from safetensors.torch import load_file

from rmm_lab import operators
from rmm_lab.errors import InputError
from rmm_lab.families import checkpoint as models
from rmm_lab.families import vit_run
from rmm_lab.families.checkpoint import read_checkpoint
from rmm_lab.layers import LayerPool
from rmm_lab.reward import Step, parse_path, path_text

EXPERTS = ("e1", "e2")
OPERATORS = ("weight_average", "task_arithmetic:scale=0.5", "ties", "dare")


@pytest.fixture(scope="module")
def checkpoints(tiny):
    return read_checkpoint(tiny["base"]), [read_checkpoint(e) for e in tiny["experts"]]


@pytest.fixture
def make(checkpoints):
    """A fresh pool of the tiny experts."""
    return lambda ops=OPERATORS, **options: LayerPool(*checkpoints, EXPERTS, ops, **options)


def files(tiny) -> list[dict]:
    """Base and experts as safetensors itself reads them."""
    return [load_file(f"{folder}/model.safetensors") for folder in (tiny["base"], *tiny["experts"])]


def group(weights: dict, k: int) -> dict:
    """Layer k by its names in the file; -1: what is neither layer nor head."""
    if k >= 0:
        prefix = f"blocks.{k}."
        return {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}
    return {n: t for n, t in weights.items() if not n.startswith(("blocks.", "head."))}


# ------------------------------------------------------------------------------ what a layer holds


def test_sources_are_models_then_operators(make):
    pool = make()
    assert pool.sources == ("e1", "e2", *OPERATORS)
    assert (pool.n_models, pool.n_operators, pool.n_layers) == (2, 4, 3)


@pytest.mark.parametrize("scope", ["layer", "tensor", "global"])
def test_an_experts_layer_is_its_files_tensors_bit_by_bit(make, tiny, scope):
    pool = make(scope=scope)
    for source, weights in zip(("base", *EXPERTS), files(tiny), strict=True):
        for k in range(-1, 3):
            expected, found = group(weights, k), pool.weights(source, k)
            assert found.keys() == expected.keys()
            assert len(found) >= 6
            assert all(torch.equal(found[n], expected[n]) for n in expected)


@pytest.mark.parametrize("scope", ["layer", "tensor", "global"])
def test_average_and_task_arithmetic_by_hand(make, tiny, scope):
    pool, (base, one, two) = make(scope=scope), files(tiny)
    for k in range(-1, 3):  # -1 is the stem: merged by the same rule
        b, x, y = (
            {n: t.double() for n, t in group(weights, k).items()} for weights in (base, one, two)
        )
        average = pool.weights("weight_average", k)
        arithmetic = pool.weights("task_arithmetic:scale=0.5", k)
        assert average.keys() == arithmetic.keys() == b.keys()
        for n in b:
            expected = (x[n] + y[n]) / 2
            torch.testing.assert_close(average[n].double(), expected, rtol=1e-5, atol=1e-6)
            expected = b[n] + 0.5 * ((x[n] - b[n]) + (y[n] - b[n]))
            torch.testing.assert_close(arithmetic[n].double(), expected, rtol=1e-5, atol=1e-6)
            assert average[n].dtype == torch.float32


def test_the_stem_is_merged_by_any_operator_named(make, tiny):
    pool, (base, one, two) = make(()), files(tiny)
    stem = pool.weights("task_arithmetic:scale=2", -1)  # no action of this pool
    assert stem.keys() == {n for n in base if not n.startswith(("blocks.", "head."))}
    for n in stem:
        expected = 2 * (one[n].double() + two[n].double()) - 3 * base[n].double()
        torch.testing.assert_close(stem[n].double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(pool.stem("base").trunk.pos_embed, base["pos_embed"])
    assert torch.equal(pool.stem("e2").norm.weight, two["norm.weight"])


def test_heads_are_never_merged(make, tiny):
    pool, (_, *experts) = make(), files(tiny)
    for name, weights in zip(EXPERTS, experts, strict=True):
        assert pool.heads[name].keys() == {"weight", "bias"}
        assert torch.equal(pool.heads[name]["weight"], weights["head.weight"])
        assert torch.equal(pool.heads[name]["bias"], weights["head.bias"])
    for source in pool.sources:
        for k in range(-1, 3):
            assert not any("head" in n for n in pool.weights(source, k))
    assert vit_run.head_slices(pool.heads) == {"e1": (0, 3), "e2": (3, 6)}
    path = (Step("weight_average", -1), Step("ties", 0), Step("dare", 1))
    merged = pool.assemble(path)
    assert torch.equal(merged.head.weight, torch.cat([w["head.weight"] for w in experts]))
    assert torch.equal(merged.head.bias, torch.cat([w["head.bias"] for w in experts]))


def test_the_head_does_not_enter_a_global_trim(checkpoints):
    base, experts = checkpoints
    loud = dict(experts[0].weights)
    loud["head.weight"] = loud["head.weight"] * 1e6
    louder = dataclasses.replace(experts[0], weights=loud)
    quiet = LayerPool(base, experts, EXPERTS, ("ties",), scope="global")
    noisy = LayerPool(base, [louder, experts[1]], EXPERTS, ("ties",), scope="global")
    for k in range(-1, 3):
        expected, found = quiet.weights("ties", k), noisy.weights("ties", k)
        assert all(torch.equal(found[n], expected[n]) for n in expected)


# --------------------------------------------------------------------------------------- the scope
# Expert 1 differs from the base everywhere; expert 2 is the base, so TIES is expert 1's trimmed delta.

STEP = {-1: 1.0, 0: 1.0, 1: 10.0, 2: 1.0}  # layer 1's deltas are 10 times larger


@pytest.fixture(scope="module")
def uneven():
    base, g = random_weights(0), torch.Generator().manual_seed(5)
    expert = {}
    for name, tensor in base.items():
        k = int(name.split(".")[1]) if name.startswith("blocks.") else -1
        magnitude = STEP[k] * (1 + torch.rand(tensor.shape, generator=g))  # STEP to 2 STEP
        sign = torch.randint(2, tensor.shape, generator=g) * 2 - 1
        expert[name] = tensor + magnitude * sign
    config = vit_run.model_config(TINY, depth=3, num_classes=3)
    as_checkpoint = [models.Checkpoint("m", None, config, w, "") for w in (base, expert, base)]
    return as_checkpoint


def changed(pool: LayerPool, source: str, k: int) -> dict[str, int]:
    """How many entries of each tensor an operator moved away from the base."""
    base, merged = pool.weights("base", k), pool.weights(source, k)
    return {n: int((merged[n] != base[n]).sum()) for n in base}


def sizes(pool: LayerPool, k: int) -> dict[str, int]:
    return {n: t.numel() for n, t in pool.weights("base", k).items()}


@pytest.mark.parametrize("density", [0.3, 0.05, 1.0])
def test_scope_layer_keeps_exactly_the_density_of_each_layer(uneven, density):
    name = f"ties:density={density:g}"
    pool = LayerPool(uneven[0], uneven[1:], EXPERTS, (name,), scope="layer")
    for k in range(-1, 3):
        total = sum(sizes(pool, k).values())
        assert sum(changed(pool, name, k).values()) == int(density * total)
    # A layer at once, not tensor by tensor: the counts of single tensors are free to differ.
    if density == 0.3:
        assert any(
            changed(pool, name, 0)[n] != int(0.3 * size) for n, size in sizes(pool, 0).items()
        )


def test_scope_layer_keeps_the_largest_entries_of_the_layer(uneven):
    pool = LayerPool(uneven[0], uneven[1:], EXPERTS, ("ties",), scope="layer")
    base, expert = (group(c.weights, 2) for c in uneven[:2])
    delta = torch.cat([(expert[n] - base[n]).abs().flatten() for n in base])
    merged = pool.weights("ties", 2)
    kept = torch.cat([(merged[n] != base[n]).flatten() for n in base])
    assert delta[kept].min() >= delta[~kept].max()
    for n in base:  # and a kept entry is the expert's own
        where = merged[n] != base[n]
        torch.testing.assert_close(merged[n][where], expert[n][where])


def test_scope_tensor_trims_each_tensor(uneven):
    pool = LayerPool(uneven[0], uneven[1:], EXPERTS, ("ties",), scope="tensor")
    for k in range(-1, 3):
        expected = {n: max(1, int(0.3 * size)) for n, size in sizes(pool, k).items()}
        assert changed(pool, "ties", k) == expected


def test_scope_global_keeps_nothing_of_a_small_layer(uneven):
    pool = LayerPool(uneven[0], uneven[1:], EXPERTS, ("ties",), scope="global")
    total = sum(sum(sizes(pool, k).values()) for k in range(-1, 3))
    loud = sum(sizes(pool, 1).values())
    assert int(0.3 * total) < loud  # the loud layer has room for all that is kept
    counts = {k: sum(changed(pool, "ties", k).values()) for k in range(-1, 3)}
    assert counts == {-1: 0, 0: 0, 1: int(0.3 * total), 2: 0}


def test_scopes_agree_where_nothing_is_trimmed(uneven):
    ops = ("ties:density=1", "task_arithmetic", "weight_average")
    pools = [LayerPool(uneven[0], uneven[1:], EXPERTS, ops, scope=s) for s in ("layer", "tensor")]
    pools.append(LayerPool(uneven[0], uneven[1:], EXPERTS, ops, scope="global"))
    for source in pools[0].sources:
        for k in range(-1, 3):
            first, *others = (pool.weights(source, k) for pool in pools)
            for other in others:
                assert all(torch.equal(other[n], first[n]) for n in first)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_order_of_an_experts_tensors_does_not_matter(checkpoints, scope):
    base, (one, two) = checkpoints
    turned = dataclasses.replace(two, weights=dict(reversed(two.weights.items())))
    pool = LayerPool(base, [one, turned], EXPERTS, ("weight_average",), scope=scope)
    for k in range(-1, 3):
        merged, x, y = (
            pool.weights("weight_average", k),
            *(group(c.weights, k) for c in (one, two)),
        )
        for n in merged:
            torch.testing.assert_close(merged[n], (x[n] + y[n]) / 2)


# ----------------------------------------------------------------------------------- random masks


def mask(pool: LayerPool, k: int, source: str = "dare:drop_rate=0.5") -> torch.Tensor:
    """Where DARE kept a delta, entry by entry over a layer of the uneven experts."""
    base, merged = pool.weights("base", k), pool.weights(source, k)
    return torch.cat([(merged[n] != base[n]).flatten() for n in base])


@pytest.fixture
def dare(uneven):
    return lambda **options: LayerPool(
        uneven[0], uneven[1:], EXPERTS, ("dare:drop_rate=0.5",), **options
    )


@pytest.mark.parametrize("scope", ["layer", "tensor", "global"])
def test_masks_do_not_depend_on_the_order_of_asking(dare, scope):
    one, two = dare(scope=scope), dare(scope=scope)
    forwards = {k: mask(one, k) for k in (-1, 0, 1, 2)}
    two.weights("ties", 0)
    backwards = {k: mask(two, k) for k in (2, 0, -1, 1)}
    assert all(torch.equal(forwards[k], backwards[k]) for k in forwards)


@pytest.mark.parametrize("scope", ["layer", "tensor", "global"])
def test_masks_differ_between_layers_and_seeds(dare, scope):
    masks = {(seed, k): mask(dare(scope=scope, seed=seed), k) for seed in (0, 1) for k in range(3)}
    size = len(masks[0, 0])
    for a in masks:
        assert masks[a].float().mean() == pytest.approx(0.5, abs=5 * 0.5 / size**0.5)
        for b in masks:
            if a < b:  # independent masks agree on about half of the entries
                agree = (masks[a] == masks[b]).float().mean()
                assert agree == pytest.approx(0.5, abs=5 * 0.5 / size**0.5), (a, b)
    for seed, k in masks:
        assert torch.equal(mask(dare(scope=scope, seed=seed), k), masks[seed, k])


def test_tensors_of_one_layer_have_masks_of_their_own_in_scope_tensor(dare):
    pool = dare(scope="tensor")
    base, merged = pool.weights("base", 0), pool.weights("dare:drop_rate=0.5", 0)
    one, two = (
        (merged[n] != base[n]).flatten() for n in ("mlp.fc1.weight", "mlp.fc2.weight")
    )  # both 16 x 64
    assert (one == two).float().mean() == pytest.approx(0.5, abs=5 * 0.5 / 1024**0.5)


def test_what_dare_keeps_is_rescaled(dare, uneven):
    pool = dare()
    base, expert = (group(c.weights, 0) for c in uneven[:2])
    merged = pool.weights("dare:drop_rate=0.5", 0)
    for n in base:
        kept = merged[n] != base[n]
        expected = base[n] + 2 * (expert[n] - base[n])
        torch.testing.assert_close(merged[n][kept], expected[kept])


# ------------------------------------------------------------------------- computed once, and freed


@pytest.fixture
def calls(monkeypatch):
    """The layers' sizes for which TIES ran."""
    found, ties = [], operators.ties

    @functools.wraps(ties)
    def counted(base, experts, **options):
        found.append(base.numel())
        return ties(base, experts, **options)

    monkeypatch.setitem(operators.OPERATORS, "ties", counted)
    return found


def test_a_layer_is_computed_once_and_shared(make, calls):
    pool = make()
    assert calls == []  # nothing before it is asked for
    first = pool.layer("ties", 1)
    assert len(calls) == 1
    assert pool.layer("ties", 1) is first
    assert pool.weights("ties", 1) is pool.weights("ties", 1)
    pool.assemble((Step("ties", 1), Step("ties", 1)))
    assert len(calls) == 1
    weights = pool.weights("ties", 1)
    assert first.mlp.fc1.weight.data_ptr() == weights["mlp.fc1.weight"].data_ptr()
    assert pool.layer("ties", 2) is not first
    assert pool.stem("ties") is pool.stem("ties")
    assert len(calls) == 3
    own = pool.weights("e1", 0)["norm1.bias"]
    assert pool.layer("e1", 0).norm1.bias.data_ptr() == own.data_ptr()


def test_scope_global_merges_the_model_once(make, calls):
    pool = make(scope="global")
    for k in range(-1, 3):
        pool.weights("ties", k)
    assert len(calls) == 1


@pytest.mark.parametrize("scope", ["layer", "tensor", "global"])
def test_forget_frees_what_is_no_action(make, calls, scope):
    pool = make(("weight_average",), scope=scope)
    kept = pool.layer("weight_average", 0), pool.layer("e1", 0), pool.stem("weight_average")
    expected = [{n: t.clone() for n, t in pool.weights("ties", k).items()} for k in range(3)]
    modules = [pool.layer("ties", k) for k in range(3)]
    stem = weakref.ref(pool.stem("ties"))
    gone = [weakref.ref(t) for k in range(-1, 3) for t in pool.weights("ties", k).values()]
    before = len(calls)
    pool.forget(["ties", "weight_average", "e1"])
    gc.collect()
    assert stem() is None
    assert [ref() for ref in gone] == [None] * len(gone)
    assert all(t.is_meta for module in modules for t in module.state_dict().values())
    assert pool.layer("weight_average", 0) is kept[0]
    assert pool.layer("e1", 0) is kept[1]
    assert pool.stem("weight_average") is kept[2]
    for k in range(3):  # and it can be asked for again
        found = pool.layer("ties", k).state_dict()
        assert all(torch.equal(found[n], t) for n, t in expected[k].items())
    assert before < len(calls) <= 2 * before


def test_forget_frees_the_scales_of_a_step_alone(make):
    pool = make(("task_arithmetic",))
    kept, other = pool.layer("task_arithmetic", 0), pool.layer("task_arithmetic", 0, (0.1, 0.2))
    gone = pool.layer("task_arithmetic", 0, (0.3, 0.4))
    pool.forget([Step("task_arithmetic", 0, (0.3, 0.4))])
    assert all(t.is_meta for t in gone.state_dict().values())
    assert pool.layer("task_arithmetic", 0) is kept
    assert pool.layer("task_arithmetic", 0, (0.1, 0.2)) is other


# ------------------------------------------------------------------------------- scales, and copies


@pytest.mark.parametrize("scope", ["layer", "tensor", "global"])
def test_a_steps_scales_by_hand(make, tiny, scope):
    pool, (base, one, two) = make((), scope=scope), files(tiny)
    for k in range(-1, 3):
        b, x, y = (
            {n: t.double() for n, t in group(weights, k).items()} for weights in (base, one, two)
        )
        found = pool.weights("task_arithmetic", k, (0.25, -0.5))
        text = pool.weights("task_arithmetic:scale=0.25/-0.5", k)  # the same operator by its text
        for n in b:
            expected = b[n] + 0.25 * (x[n] - b[n]) - 0.5 * (y[n] - b[n])
            torch.testing.assert_close(found[n].double(), expected, rtol=1e-5, atol=1e-6)
            assert torch.equal(found[n], text[n])


@pytest.mark.parametrize("source", ["e1", "base", "ties", "task_arithmetic:scale=0.5"])
def test_scales_of_another_source_are_refused(make, source):
    with pytest.raises(InputError, match=f"expected with task_arithmetic, found with '{source}'"):
        make().weights(source, 0, (0.5, 0.5))


@pytest.mark.parametrize("scales", [(0.5,), (0.5, 0.5, 0.5)])
def test_scales_of_another_number_of_experts_are_refused(make, scales):
    with pytest.raises(InputError, match="one for each of 2 experts"):
        make().layer("task_arithmetic", 0, scales)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pool: pickle.loads(pickle.dumps(pool))])
def test_a_copy_computes_its_layers_again(make, calls, copied):
    pool = make(scope="global")
    expected, module = pool.weights("ties", 1), pool.layer("ties", 1)
    other = copied(pool)
    assert len(calls) == 1
    found = other.weights("ties", 1)
    assert len(calls) == 2
    assert all(torch.equal(found[n], t) for n, t in expected.items())
    assert other.layer("ties", 1) is not module
    assert other.sources == pool.sources
    for n, t in pool.weights("e2", 0).items():
        assert torch.equal(other.weights("e2", 0)[n], t)


# ------------------------------------------------------------------------------------------ errors


def test_what_is_wrong_is_refused(checkpoints, make):
    base, experts = checkpoints
    with pytest.raises(InputError, match="at least 2"):
        LayerPool(base, experts[:1], ["e1"])
    with pytest.raises(InputError, match="distinct name"):
        LayerPool(base, experts, ["e1", "e1"])
    with pytest.raises(InputError, match="distinct name"):
        LayerPool(base, experts, ["e1", "e2", "e3"])
    with pytest.raises(InputError, match="scope 'model'"):
        make(scope="model")
    with pytest.raises(InputError, match="twice"):
        make(("ties", "ties"))
    with pytest.raises(InputError, match="tiess"):
        make(("tiess",))
    for stem in ("nothing", "e3", "ties:density=2", ""):
        with pytest.raises(InputError):
            make().check_stem(stem)
        with pytest.raises(InputError):
            make().stem(stem)
    for stem in ("base", "e1", "weight_average", "ties:density=0.5"):
        make().check_stem(stem)


@pytest.mark.parametrize(
    ("operator", "words"),
    [
        ("weighted_average:expert=3", "expert: expected 1 to 2, found 3"),
        ("task_arithmetic:scale=0.1/0.2/0.3", "one for each of 2 experts, found 3"),
    ],
)
def test_an_operator_for_another_number_of_experts_is_refused_before_it_merges(
    make, operator, words
):
    with pytest.raises(InputError, match=words):
        make((operator,))
    with pytest.raises(InputError, match=words):
        make().check_stem(operator)


def test_an_unknown_stem_is_named_twice_at_most(make):
    with pytest.raises(InputError, match="'nosuch'") as error:
        make().check_stem("nosuch")
    assert str(error.value).count("nosuch") <= 2


def test_an_expert_without_a_head_is_refused(checkpoints):
    base, (one, two) = checkpoints
    bare = {k: v for k, v in two.weights.items() if not k.startswith("head.")}
    with pytest.raises(InputError, match=r"'e2'.*head"):
        LayerPool(base, [one, dataclasses.replace(two, weights=bare)], EXPERTS)
    no_head = {k: v for k, v in base.weights.items() if not k.startswith("head.")}
    LayerPool(dataclasses.replace(base, weights=no_head), [one, two], EXPERTS)  # a base needs none


@pytest.mark.parametrize(
    "name",
    ["base", "agent", "skip", "back", "ties", "ties:density=0.3", "task_arithmetic:scale=0.1/0.2"],
)
def test_a_name_that_means_something_else_is_refused(checkpoints, name):
    with pytest.raises(InputError, match=f"expert '{name}': .* no action, stem or operator has"):
        LayerPool(*checkpoints, [name, "e2"], ("weight_average",))


@pytest.mark.parametrize("name", ["a@b", "a@1", "my model", "a\tb", "a\u00a0b", "", " "])
def test_a_name_that_breaks_the_text_of_a_path_is_refused(checkpoints, name):
    with pytest.raises(InputError, match="can stand in a path, without white space or '@'"):
        LayerPool(*checkpoints, ["e1", name], ("ties",))


@pytest.mark.parametrize("name", ["tie", "skipper", "a:b", "ties2", "x=1/2", "é", "a-2"])
def test_other_names_are_taken_and_come_back_from_a_paths_text(checkpoints, name):
    pool = LayerPool(*checkpoints, [name, "e2"], ("ties",))
    path = (Step(name, -1), Step(name, 0), Step("ties", 1))
    assert parse_path(path_text(path)) == path
    assert torch.equal(
        pool.weights(name, 0)["norm1.bias"], checkpoints[1][0].weights["blocks.0.norm1.bias"]
    )


def test_a_config_of_another_depth_than_the_weights_is_refused(checkpoints):
    def shallow(c):
        args = c.config["model_args"] | {"depth": 2}
        return dataclasses.replace(c, config=c.config | {"model_args": args})

    with pytest.raises(InputError):
        LayerPool(shallow(checkpoints[0]), [shallow(c) for c in checkpoints[1]], EXPERTS).layer(
            "e1", 2
        )
