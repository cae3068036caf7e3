"""The pool's layers against the experts' files, read with safetensors and merged by hand."""

from __future__ import annotations

import dataclasses
import functools
import gc
import weakref

import pytest
import torch
from conftest import TINY, random_weights
from safetensors.torch import load_file

from rmm_lab import operators
from rmm_lab.errors import InputError
from rmm_lab.families import checkpoint as models
from rmm_lab.families import vit
from rmm_lab.families.checkpoint import read_checkpoint
from rmm_lab.layers import LayerPool

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
            expected, found = group(weights, k), pool.layer_weights(source, k)
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
        average = pool.layer_weights("weight_average", k)
        arithmetic = pool.layer_weights("task_arithmetic:scale=0.5", k)
        assert average.keys() == arithmetic.keys() == b.keys()
        for n in b:
            expected = (x[n] + y[n]) / 2
            torch.testing.assert_close(average[n].double(), expected, rtol=1e-5, atol=1e-6)
            expected = b[n] + 0.5 * ((x[n] - b[n]) + (y[n] - b[n]))
            torch.testing.assert_close(arithmetic[n].double(), expected, rtol=1e-5, atol=1e-6)
            assert average[n].dtype == torch.float32


def test_the_stem_is_merged_by_any_operator_named(make, tiny):
    pool, (base, one, two) = make(()), files(tiny)
    stem = pool.stem_weights("task_arithmetic:scale=2")  # no action of this pool
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
            assert not any("head" in n for n in pool.layer_weights(source, k))
    assert vit.head_slices(pool.heads) == {"e1": (0, 3), "e2": (3, 6)}
    merged = pool.assemble([("ties", 0), ("dare", 1)], "weight_average")
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
        expected, found = quiet.layer_weights("ties", k), noisy.layer_weights("ties", k)
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
    config = vit.model_config(TINY, depth=3, num_classes=3)
    as_checkpoint = [models.Checkpoint("m", None, config, w, "") for w in (base, expert, base)]
    return as_checkpoint


def changed(pool: LayerPool, source: str, k: int) -> dict[str, int]:
    """How many entries of each tensor an operator moved away from the base."""
    base, merged = pool.layer_weights("base", k), pool.layer_weights(source, k)
    return {n: int((merged[n] != base[n]).sum()) for n in base}


def sizes(pool: LayerPool, k: int) -> dict[str, int]:
    return {n: t.numel() for n, t in pool.layer_weights("base", k).items()}


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
    merged = pool.layer_weights("ties", 2)
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
            first, *others = (pool.layer_weights(source, k) for pool in pools)
            for other in others:
                assert all(torch.equal(other[n], first[n]) for n in first)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_order_of_an_experts_tensors_does_not_matter(checkpoints, scope):
    base, (one, two) = checkpoints
    turned = dataclasses.replace(two, weights=dict(reversed(two.weights.items())))
    pool = LayerPool(base, [one, turned], EXPERTS, ("weight_average",), scope=scope)
    for k in range(-1, 3):
        merged, x, y = (
            pool.layer_weights("weight_average", k),
            *(group(c.weights, k) for c in (one, two)),
        )
        for n in merged:
            torch.testing.assert_close(merged[n], (x[n] + y[n]) / 2)


# ----------------------------------------------------------------------------------- random masks


def mask(pool: LayerPool, k: int, source: str = "dare:drop_rate=0.5") -> torch.Tensor:
    """Where DARE kept a delta, entry by entry over a layer of the uneven experts."""
    base, merged = pool.layer_weights("base", k), pool.layer_weights(source, k)
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
    two.layer_weights("ties", 0)
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
    base, merged = pool.layer_weights("base", 0), pool.layer_weights("dare:drop_rate=0.5", 0)
    one, two = (
        (merged[n] != base[n]).flatten() for n in ("mlp.fc1.weight", "mlp.fc2.weight")
    )  # both 16 x 64
    assert (one == two).float().mean() == pytest.approx(0.5, abs=5 * 0.5 / 1024**0.5)


def test_what_dare_keeps_is_rescaled(dare, uneven):
    pool = dare()
    base, expert = (group(c.weights, 0) for c in uneven[:2])
    merged = pool.layer_weights("dare:drop_rate=0.5", 0)
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
    assert pool.layer_weights("ties", 1) is pool.layer_weights("ties", 1)
    pool.assemble([("ties", 1), ("ties", 1)], "base")
    assert len(calls) == 1
    weights = pool.layer_weights("ties", 1)
    assert first.mlp.fc1.weight.data_ptr() == weights["mlp.fc1.weight"].data_ptr()
    assert pool.layer("ties", 2) is not first
    assert pool.stem("ties") is pool.stem("ties")
    assert len(calls) == 3
    own = pool.layer_weights("e1", 0)["norm1.bias"]
    assert pool.layer("e1", 0).norm1.bias.data_ptr() == own.data_ptr()


def test_scope_global_merges_the_model_once(make, calls):
    pool = make(scope="global")
    for k in range(-1, 3):
        pool.layer_weights("ties", k)
    assert len(calls) == 1


@pytest.mark.parametrize("scope", ["layer", "tensor", "global"])
def test_forget_frees_what_is_no_action(make, calls, scope):
    pool = make(("weight_average",), scope=scope)
    kept = pool.layer("weight_average", 0), pool.layer("e1", 0), pool.stem("weight_average")
    spare = [pool.layer("ties", k) for k in range(3)]
    gone = [weakref.ref(t) for k in range(3) for t in pool.layer_weights("ties", k).values()]
    n = len(gone)
    gone += [weakref.ref(pool.stem("ties")), weakref.ref(pool.stem_weights("ties")["pos_embed"])]
    before = len(calls)
    assert before
    pool.forget(["ties", "weight_average", "e1"])
    gc.collect()
    assert [ref() for ref in gone] == [None] * (n + 2)
    assert all(t.is_meta for module in spare for t in module.state_dict().values())
    assert pool.layer("weight_average", 0) is kept[0]
    assert pool.layer("e1", 0) is kept[1]
    assert pool.stem("weight_average") is kept[2]
    for k in range(-1, 3):  # and it can be asked for again
        weights = pool.layer_weights("ties", k)
        if k >= 0:
            assert pool.layer("ties", k) is spare[k]
            assert all(torch.equal(t, weights[n]) for n, t in spare[k].state_dict().items())
    assert len(calls) == 2 * before


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


def test_an_expert_without_a_head_is_refused(checkpoints):
    base, (one, two) = checkpoints
    bare = {k: v for k, v in two.weights.items() if not k.startswith("head.")}
    with pytest.raises(InputError, match=r"'e2'.*head"):
        LayerPool(base, [one, dataclasses.replace(two, weights=bare)], EXPERTS)
    no_head = {k: v for k, v in base.weights.items() if not k.startswith("head.")}
    LayerPool(dataclasses.replace(base, weights=no_head), [one, two], EXPERTS)  # a base needs none


@pytest.mark.parametrize("name", ["base", "ties"])
def test_a_name_that_means_something_else_is_refused(checkpoints, name):
    with pytest.raises(InputError, match=name):
        LayerPool(*checkpoints, [name, "e2"], ("ties",))


def test_a_config_of_another_depth_than_the_weights_is_refused(checkpoints):
    def shallow(c):
        args = c.config["model_args"] | {"depth": 2}
        return dataclasses.replace(c, config=c.config | {"model_args": args})

    with pytest.raises(InputError):
        LayerPool(shallow(checkpoints[0]), [shallow(c) for c in checkpoints[1]], EXPERTS).layer(
            "e1", 2
        )
