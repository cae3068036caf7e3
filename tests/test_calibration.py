"""Layers fitted to inputs, against whole models of timm and transformers run with hooks, and numpy."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import weakref

import numpy as np
import pytest
import torch
from conftest import TINY, TensorTask, quadrant, stripes, write_tiny
from safetensors.torch import load_file
from t5_models import BIAS, by_hand, pool_of, rows_of
from torch import nn

from rmm_lab import matching
from rmm_lab.engine import calibration, inputs, ridge
from rmm_lab.engine.activations import Means
from rmm_lab.engine.calibration import Calibration
from rmm_lab.errors import InputError
from rmm_lab.families import vit
from rmm_lab.families.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from rmm_lab.layers import LayerPool
from rmm_lab.path import LayerPath
from rmm_lab.reward import Step, evaluate, parse_path
from rmm_lab.search import problem as problems
from rmm_lab.search.config import configure
from rmm_lab.search.layer_scales import scales_of
from rmm_lab.search.pipeline import train
from rmm_lab.search.problem import load_problem
from rmm_lab.tasks.text_task import TextBatch, TextTask

pytestmark = pytest.mark.slow  # models are fitted: half a minute in all

STEM = Step("base", -1)
FIRM = "least_squares:ridge=0.01"  # no ridge is chosen
OTHER = "least_squares:ridge=0.01,weights=1/3"


class Blind:
    """A task of which inputs of the train split can be seen, and nothing else."""

    def __init__(self, task, change=lambda batch: batch):
        self.name, self.source = task.name, task.source
        self._task, self._change = task, change

    def size(self, split):
        assert split == "train"
        return self._task.size(split)

    def inputs(self, split, rows):
        assert split == "train"
        return self._change(self._task.inputs(split, rows))

    def __reduce__(self):
        raise AssertionError("tasks do not travel")


def vits(tmp_path, n=2, **args):
    """Tiny ViTs of other arguments: a pool of a base and n experts, and their tasks."""
    config = TINY | {"model_args": TINY["model_args"] | args}
    models = []
    for i in range(n + 1):
        torch.manual_seed(i)
        model = vit.create(config, depth=3, num_classes=3)
        g = torch.Generator().manual_seed(i)
        weights = {
            k: v + 0.3 * torch.randn(v.shape, generator=g) for k, v in model.state_dict().items()
        }
        for name in [name for name in weights if name.endswith("gamma")]:
            weights[name] = 1 + 0.3 * torch.randn(16, generator=g)
            weights[name][3] = 0  # an output that no model uses
        if i:
            weights = {k: models[0].weights[k] + 0.5 * v for k, v in weights.items()}
        full = vit.model_config(config, depth=3, num_classes=3)
        models.append(Checkpoint(f"m{i}", tmp_path, full, weights, str(i)))
    names = [f"e{i}" for i in range(1, n + 1)]
    tasks = [TensorTask(f"t{i}", i, 3, stripes if i % 2 else quadrant) for i in range(1, n + 1)]
    pool = LayerPool(models[0], models[1:], names, ("ties",))
    return pool, [Blind(task) for task in tasks]


def tiny_pool(tiny, n=12, operators=(FIRM, "regmean", "ties"), **options):
    return load_problem(**tiny, operators=operators, calibration=n, stem="base", **options).pool


def uniform(source, n, start=0):
    return (STEM, *(Step(source, k) for k in range(start, n)))


def layers_of(pool, path):
    """The weights along a path, the stem's step first."""
    return [pool.weights(*step, path[:i]) for i, step in enumerate(path) if i]


def same(found, expected):
    """Weights of equal bits."""
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def near(found, expected, tolerance=1e-3):
    """Weights that are equal but for single precision on the way."""
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        size = float(expected[name].abs().max())
        assert float((tensor - expected[name]).abs().max()) <= tolerance * max(size, 0.1), name


# --------------------------------------------------------------- least squares, written once more


def solve(xs, ys, counts, weights, ridge, start):
    """W (O, D) from explicit rows, each task's scaled to its weight; the ridge as further rows."""
    x, y = [], []
    for rows, targets, n, w in zip(xs, ys, counts, weights, strict=True):
        scale = np.sqrt(n / n.sum() * w / sum(weights))[:, None]
        x.append(scale * rows)
        y.append(scale * (targets - rows @ start.T))
    x, y = np.concatenate(x), np.concatenate(y)
    rho = ridge * np.mean((x**2).sum(0))
    x = np.concatenate([x, np.sqrt(rho) * np.eye(x.shape[1])])
    y = np.concatenate([y, np.zeros((x.shape[1], y.shape[1]))])
    return start + np.linalg.lstsq(x, y, rcond=1e-6)[0].T


def refit(linear, xs, ys, counts, weights, ridge):
    """Set a linear map to the solution of its rows: xs, ys, counts: arrays of each task."""
    start = linear.weight.double().numpy()
    if linear.bias is not None:
        start = np.concatenate([start, linear.bias.double().numpy()[:, None]], 1)
        xs = [np.concatenate([x, np.ones((len(x), 1))], 1) for x in xs]
    found = torch.tensor(solve(xs, ys, counts, weights, ridge, start)).float()
    if linear.bias is not None:
        linear.bias.data, found = found[:, -1].contiguous(), found[:, :-1].contiguous()
    linear.weight.data = found


def numbers(tensor):
    return tensor.flatten(0, -2).double().numpy()


def grab(run, module, what):
    """What goes into a module, or comes out of it, while ``run`` runs whole models."""
    found = []
    if what == "in":
        handle = module.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    else:
        handle = module.register_forward_hook(lambda _, args, out: found.append(out))
    with torch.no_grad():
        run()
    handle.remove()
    return found


def averaged(modules):
    out = copy.deepcopy(modules[0])
    for name, parameter in out.named_parameters():
        each = [dict(m.named_parameters())[name] for m in modules]
        parameter.data = torch.stack(each).mean(0)
    return out


def timm_models(pool):
    models = []
    for checkpoint in (pool.base, *pool.experts):
        model = vit.create(checkpoint.config, depth=None, num_classes=checkpoint.num_classes)
        model.load_state_dict(checkpoint.weights, strict="head.weight" in checkpoint.weights)
        models.append(model)
    return models


WRITES = {"attn.proj": ("norm1", "ls1"), "mlp.fc2": ("norm2", "ls2")}


def vit_by_hand(pool, images, path, weights, ridge, readout, residual):
    """A timm model on the base's stem. path: (an expert's number, or None for a fitted block; its place)."""
    base, *experts = timm_models(pool)
    merged = copy.deepcopy(base)
    merged.blocks = nn.Sequential(
        *(
            averaged([e.blocks[k] for e in experts])
            if i is None
            else copy.deepcopy(experts[i].blocks[k])
            for i, k in path
        )
    )
    for p, (i, k) in enumerate(path):
        for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2") if i is None else ():
            xs, ys, counts = [], [], []
            for expert, batch in zip(experts, images, strict=True):
                ours, theirs = merged.blocks[p], expert.blocks[k]

                def see(model, block, part, what, batch=batch):
                    module = block.get_submodule(part)
                    return grab(lambda: model.forward_features(batch), module, what)[0]

                x, y = see(merged, ours, name, "in"), see(expert, theirs, name, "out")
                if name in WRITES and residual:
                    norm, scale = WRITES[name]
                    mine, its = (
                        getattr(
                            b.get_submodule(scale), "gamma", torch.ones(16 if i else y.shape[-1])
                        )
                        for b in (ours, theirs)
                    )
                    # ours + mine * W x = theirs + its * y
                    lack = see(expert, theirs, norm, "in") - see(merged, ours, norm, "in")
                    y = torch.where(mine == 0, y, (lack + its * y) / mine)
                count = np.ones(x.shape[:2])
                if readout:
                    count[:, 0] = readout / (1 - readout) * (x.shape[1] - 1)
                xs.append(numbers(x))
                ys.append(numbers(y))
                counts.append(count.ravel())
            refit(merged.blocks[p].get_submodule(name), xs, ys, counts, weights, ridge)
    return [dict(block.state_dict()) for block in merged.blocks]


def images_of(cal):
    return [t.inputs("train", r) for t, r in zip(cal.tasks, cal.rows, strict=True)]


@pytest.mark.parametrize(
    ("options", "settings", "args"),
    [
        ("", {}, {}),
        (",readout=0", {"readout": 0}, {}),
        (",residual=0", {"residual": 0}, {"init_values": 0.1}),
        ("", {}, {"init_values": 0.1}),
        (",weights=1/3", {"weights": (1, 3)}, {"qkv_bias": False}),
        ("", {}, {"qk_norm": True}),
        # What a head reads when it pools all tokens is not known: no make-up, all tokens alike.
        ("", {"readout": 0, "residual": 0}, {"global_pool": "avg"}),
    ],
)
def test_a_vits_layers_are_those_of_whole_models_and_stacked_rows(
    tmp_path, options, settings, args
):
    """33 inputs are more than go through a layer at once. One layer is an expert's, from another place."""
    pool, tasks = vits(tmp_path, **args)
    pool.calibration = cal = Calibration(tasks, 33)
    settings = {"weights": (1, 1), "readout": 0.5, "residual": 1} | settings
    source = f"least_squares:ridge=0.01{options}"
    path = (STEM, Step(source, 0), Step("e2", 2), Step(source, 1))
    expected = vit_by_hand(
        pool, images_of(cal), [(None, 0), (1, 2), (None, 1)], ridge=0.01, **settings
    )
    for found, wanted in zip(layers_of(pool, path), expected, strict=True):
        near(found, wanted)


def test_without_a_ridge_what_inputs_leave_open_stays_the_anchors(tmp_path):
    """Two pictures have fewer tokens than an MLP has inputs, and a norm's outputs lie in a plane."""
    pool, tasks = vits(tmp_path)
    for n in (2, 40):
        pool.calibration = cal = Calibration(tasks, n)
        source = "least_squares:ridge=0,residual=0"
        expected = vit_by_hand(pool, images_of(cal), [(None, 0)], (1, 1), 0.0, 0.5, 0)
        # Small singular values magnify single precision
        near(pool.weights(source, 0, (), (STEM,)), expected[0], 0.02)
        pool.forget([source])


def test_the_demos_layers_are_those_of_whole_models_and_stacked_rows():
    pool = load_problem(("demo",), operators=("ties",), calibration=3).pool
    path = uniform(FIRM, 2)
    images = images_of(pool.calibration)
    expected = vit_by_hand(pool, images, [(None, 0), (None, 1)], (1, 1), 0.01, 0.5, 1)
    for found, wanted in zip(layers_of(pool, path), expected, strict=True):
        near(found, wanted, 5e-3)


@pytest.mark.parametrize("alpha", [1.0, 0.9, 0.0])
def test_a_vits_regmean_is_that_of_whole_models(tmp_path, alpha):
    """Jin et al. 2023, Eq. 2, with what hooks on the experts' own models see; biases are averaged."""
    pool, tasks = vits(tmp_path, 3)
    pool.calibration = cal = Calibration(tasks, 33)
    experts = timm_models(pool)[1:]
    k, found = 1, pool.weights(f"regmean:alpha={alpha}", 1)
    for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        top, bottom = 0.0, 0.0
        for expert, batch in zip(experts, images_of(cal), strict=True):
            module = expert.blocks[k].get_submodule(name)
            x = numbers(grab(lambda e=expert, b=batch: e.forward_features(b), module, "in")[0])
            gram = x.T @ x / len(x)
            gram = alpha * gram + (1 - alpha) * np.diag(np.diag(gram))
            top, bottom = top + module.weight.double().numpy() @ gram, bottom + gram
        average = torch.stack([e.blocks[k].get_submodule(name).weight for e in experts]).mean(0)
        average = average.double().numpy()
        change = (top - average @ bottom) @ np.linalg.pinv(bottom, rcond=1e-11, hermitian=True)
        got = found[f"{name}.weight"].double().numpy()
        assert np.abs(got - average - change).max() < 1e-3 * np.abs(average + change).max(), name
    rest = {n: t for n, t in found.items() if t.dim() < 2}
    near(rest, {n: pool.weights("weight_average", k)[n] for n in rest}, 1e-6)


# ------------------------------------------------------------------------------------------- T5

ENCODER = [
    (0, "SelfAttention", ("q", "k", "v")),
    (0, "SelfAttention", ("o",)),
    (1, "DenseReluDense", ("wi", "wi_0", "wi_1")),
    (1, "DenseReluDense", ("wo",)),
]
DECODER = [
    *ENCODER[:2],
    (1, "EncDecAttention", ("q",)),
    (1, "EncDecAttention", ("k", "v")),
    (1, "EncDecAttention", ("o",)),
    *((2, part, names) for _, part, names in ENCODER[2:]),
]


def t5_runs(model, batch):
    """Inputs one by one, their choices one by one, without padding; yields functions that run them."""
    for i in range(len(batch.ids)):
        ids = batch.ids[i][batch.mask[i]][None]
        encoded = []
        yield "encoder", lambda ids=ids, encoded=encoded: encoded.append(model.encoder(ids))
        first = True
        for j in range(batch.choices.shape[1]):
            shifted = batch.shifted[i, j][batch.shares[i, j] > 0][None]
            if shifted.numel():
                # The keys of an input are the same for all of its choices: seen once.
                yield (
                    "decoder once" if first else "decoder",
                    lambda shifted=shifted, encoded=encoded: model.decoder(
                        shifted, encoder_hidden_states=encoded[0][0], use_cache=False
                    ),
                )
                first = False


def t5_rows(model, batch, stack, module, what, keys=False):
    """Rows (n, D) of one stack's module."""
    found = []
    for kind, run in t5_runs(model, batch):
        wanted = kind == "decoder once" if keys else kind.startswith(stack)
        rows = grab(run, module, what) if wanted else None
        if rows is None:
            with torch.no_grad():
                run()
        else:
            found += [numbers(r) for r in rows]
    return np.concatenate(found)


def t5_by_hand(models, batches, fitted, weights, ridge, residual):
    """A transformers model on the base's stem whose blocks are the first expert's, or fitted: (stack, k)."""
    base, *experts = models
    merged = copy.deepcopy(base)
    blocks = {}
    for stack in ("encoder", "decoder"):
        for k, block in enumerate(getattr(merged, stack).block):
            theirs = [getattr(e, stack).block[k] for e in experts]
            source = averaged(theirs) if (stack, k) in fitted else theirs[0]
            for name, parameter in block.named_parameters():
                if name != BIAS:
                    parameter.data = dict(source.named_parameters())[name].data.clone()
    for stack, k in fitted:
        ours = getattr(merged, stack).block[k]
        for number, part, names in ENCODER if stack == "encoder" else DECODER:
            names = [n for n in names if hasattr(getattr(ours.layer[number], part), n)]
            keys = part == "EncDecAttention" and "k" in names
            xs, ys = [], {name: [] for name in names}
            for expert, batch in zip(experts, batches, strict=True):
                theirs = getattr(expert, stack).block[k]
                a, b = (getattr(block.layer[number], part) for block in (ours, theirs))
                x = t5_rows(merged, batch, stack, getattr(a, names[0]), "in", keys)
                xs.append(x)
                for name in names:
                    y = t5_rows(expert, batch, stack, getattr(b, name), "out", keys)
                    if residual and name in ("o", "wo"):
                        norms = ours.layer[number].layer_norm, theirs.layer[number].layer_norm
                        y = y - t5_rows(merged, batch, stack, norms[0], "in")
                        y = y + t5_rows(expert, batch, stack, norms[1], "in")
                    ys[name].append(y)
            counts = [np.ones(len(x)) for x in xs]
            for name in names:
                refit(
                    getattr(getattr(ours.layer[number], part), name),
                    xs,
                    ys[name],
                    counts,
                    weights,
                    ridge,
                )
        blocks[stack, k] = {n: t for n, t in ours.state_dict().items() if n != BIAS}
    return blocks


def t5_problem(t5s, variant="t5", n=5, change=lambda batch: batch):
    """A pool of tiny T5s with blind tasks: one whose rows have choices of their own, one of no and yes."""
    pool = pool_of(t5s, variant)
    format_ = pool.base.family.input_format(pool.base)
    tasks = [Blind(TextTask(str(folder), format_), change) for folder in t5s["texts"]]
    pool.calibration = Calibration(tasks, n)
    return pool


@pytest.mark.parametrize(("variant", "residual"), [("t5", 1), ("v1.1", 1), ("t5", 0)])
def test_a_t5s_layers_are_those_of_whole_models_and_stacked_rows(t5s, variant, residual):
    """No padding there: each input, each choice alone. Cross-attention reads the merged encoder's end."""
    pool = t5_problem(t5s, variant, 3)
    source = f"least_squares:ridge=0.01,residual={residual},weights=2/1"
    steps = (Step(source, 0), Step("one", 1), Step(source, 2), Step("one", 3))
    batches = images_of(pool.calibration)
    fitted = [("encoder", 0), ("decoder", 0)]
    expected = t5_by_hand(t5s[variant][0], batches, fitted, (2, 1), 0.01, residual)
    found = layers_of(pool, (STEM, *steps))
    near(found[0], expected["encoder", 0])
    near(found[2], expected["decoder", 0])


def test_a_t5s_regmean_is_that_of_whole_models(t5s):
    pool = t5_problem(t5s)
    batches, experts = images_of(pool.calibration), t5s["t5"][0][1:]
    for stack, k, number, part, names in (
        ("encoder", 1, 1, "DenseReluDense", ("wo",)),
        ("decoder", 1, 1, "EncDecAttention", ("k", "v")),
    ):
        found = pool.weights("regmean:alpha=0.5", k + 2 * (stack == "decoder"))
        for name in names:
            top, bottom = 0.0, 0.0
            for expert, batch in zip(experts, batches, strict=True):
                module = getattr(getattr(expert, stack).block[k].layer[number], part)
                module = getattr(module, name)
                x = t5_rows(expert, batch, stack, module, "in", part == "EncDecAttention")
                gram = 0.5 * x.T @ x / len(x)
                gram[np.diag_indices(len(gram))] *= 2
                top, bottom = top + module.weight.double().numpy() @ gram, bottom + gram
            key = f"layer.{number}.{part}.{name}.weight"
            near({key: found[key]}, {key: torch.tensor(top @ np.linalg.inv(bottom))}, 1e-3)


def test_a_t5s_embeddings_are_weighed_by_how_often_tasks_use_them(t5s):
    """Tokens that are read, written and read again; equal weights where no task uses a row."""
    pool = t5_problem(t5s, n=12)
    found = pool.weights("least_squares:weights=1/3", -1)["shared.weight"]
    shares = []
    for batch in images_of(pool.calibration):
        counts = np.zeros(104)
        for i in range(len(batch.ids)):
            for token in batch.ids[i][batch.mask[i]].tolist():
                counts[token] += 1
            for j in range(batch.choices.shape[1]):
                there = batch.shares[i, j] > 0
                for token in (*batch.choices[i, j][there], *batch.shifted[i, j][there]):
                    counts[int(token)] += 1
        shares.append(counts / counts.sum())
    one, two = (pool.weights(name, -1)["shared.weight"].double() for name in ("one", "two"))
    share = torch.tensor(np.stack(shares)) * torch.tensor([0.25, 0.75])[:, None]
    used = share.sum(0) > 0
    assert 0 < used.sum() < 104
    assert torch.allclose(found[~used].double(), (one + two)[~used] / 2, atol=1e-6)
    mixed = (share[0][:, None] * one + share[1][:, None] * two) / share.sum(0)[:, None]
    # The average counts for a little, 1e-4 of all tokens.
    little = (1e-4 / share.sum(0)[:, None] * (one - two).abs())[used]
    assert ((found.double() - mixed)[used].abs() <= little + 1e-6).all()


def more_padding(batch):
    """The same rows with further columns of padding and a further choice that no row has."""
    n, c, t = batch.choices.shape
    ids = torch.cat([batch.ids, torch.full((n, 3), 9)], 1)
    mask = torch.cat([batch.mask, torch.zeros(n, 3, dtype=torch.bool)], 1)
    out = []
    for old, value in ((batch.choices, 11), (batch.shifted, 12), (batch.shares, 0)):
        new = torch.full((n, c + 1, t + 2), value, dtype=old.dtype)
        new[:, :c, :t] = torch.where(batch.shares > 0, old, new[:, :c, :t])
        out.append(new)
    return TextBatch(ids, mask, *out)


def test_padding_counts_for_nothing(t5s):
    pools = [t5_problem(t5s), t5_problem(t5s, change=more_padding)]
    for source in (FIRM, "regmean"):
        path = (Step(source, -1), *(Step(source, k) for k in range(4)))
        near(pools[1].weights(source, -1), pools[0].weights(source, -1), 1e-5)
        for found, expected in zip(*(layers_of(pool, path) for pool in pools), strict=True):
            near(found, expected, 2e-4)


# ---------------------------------------------------------------------------- what must not matter


@pytest.fixture(params=["vit", "t5"])
def pool(request, tmp_path):
    """A pool of either family with a few inputs of two blind tasks."""
    if request.param == "t5":
        return t5_problem(request.getfixturevalue("t5s"), n=12)
    made, tasks = vits(tmp_path)
    made.calibration = Calibration(tasks, 33)
    return made


def other_source(pool):
    """Least squares with a ridge that is chosen; for T5s, where that takes seconds, with another one."""
    return "least_squares" if len(pool.stacks) == 1 else "least_squares:ridge=0.1"


def renewed(pool, **changes):
    """The same pool with nothing computed yet, and calibration inputs from other arguments."""
    new, cal = copy.deepcopy(pool), pool.calibration
    options = {"tasks": cal.tasks, "n": cal.n, "seed": cal.seed} | changes
    new.calibration = Calibration(**options)
    return new


def test_equal_experts_give_their_outputs(pool):
    """Also behind another layer: what the stream lacks is made up for, as far as a layer can."""
    twins = LayerPool(pool.base, [pool.experts[0]] * 2, ("a", "b"))
    twins.calibration = renewed(pool).calibration
    for source in (FIRM, "regmean", "least_squares:ridge=0,weights=1/9"):
        path = (Step(source, -1), *(Step(source, k) for k in range(pool.n_layers)))
        for k, found in enumerate(layers_of(twins, path)):
            near(found, twins.weights("a", k), 1e-3)


def test_order_and_batches_of_inputs_do_not_matter(pool, monkeypatch):
    rng = np.random.default_rng(0)
    rows = [rng.permutation(own) for own in pool.calibration.rows]
    path = uniform(FIRM, pool.n_layers)
    expected = layers_of(pool, path)
    turned = layers_of(renewed(pool, rows=rows), path)
    monkeypatch.setattr(inputs, "BATCH", 5)
    monkeypatch.setattr(inputs, "JOINED", 0)
    small = layers_of(renewed(pool), path)
    for one, two, three in zip(expected, turned, small, strict=True):
        near(two, one, 1e-4)
        near(three, one, 1e-4)


def test_small_pictures_go_through_together_and_in_the_same_folds(tmp_path, monkeypatch):
    """What a ridge is chosen from must not hang on how many go through a layer at a time."""
    pool, tasks = vits(tmp_path)
    pool.calibration, seen = Calibration(tasks, 90), []

    class Watched(ridge.Folds):
        def __init__(self, xx, weights):
            seen.append(xx)
            super().__init__(xx, weights)

    monkeypatch.setattr(ridge, "Folds", Watched)
    pool.weights("least_squares", 0, prefix=(STEM,))
    assert len(list(pool.calibration.parts(0))) == 1
    monkeypatch.setattr(inputs, "JOINED", 0)
    apart = renewed(pool)
    apart.weights("least_squares", 0, prefix=(STEM,))
    assert len(list(apart.calibration.parts(0))) == 3
    for one, other in zip(seen[:4], seen[4:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(one[0], one[1], rtol=1e-2)  # folds differ


def test_a_stem_without_rows_to_weigh_runs_once_for_all_fits(tmp_path, monkeypatch):
    """Whatever their weights, it is the anchor's; a stem of another anchor is another one."""
    pool, tasks = vits(tmp_path)
    pool.calibration, runs, embed = Calibration(tasks, 20), [], pool.architecture.embed

    def counted(stem, batch):
        runs.append(1)
        return embed(stem, batch)

    def fitted(stem):
        runs.clear()
        return pool.weights(FIRM, 0, prefix=(Step(stem, -1),))

    expected = fitted("weight_average")
    monkeypatch.setattr(pool.architecture, "embed", counted)
    for stem in ("least_squares:weights=1/2", "least_squares:weights=5/1", "regmean"):
        same(fitted(stem), expected)
        assert not runs
    other = fitted("least_squares:anchor=0.5")
    assert runs
    same(other, pool.weights(FIRM, 0, prefix=(Step("task_arithmetic:scale=0.5", -1),)))
    assert any(not torch.equal(other[name], expected[name]) for name in other)


def test_nothing_that_is_kept_changes_a_bit(pool, monkeypatch):
    path = (STEM, *(Step(s, k) for k, s in enumerate((FIRM, other_source(pool), "regmean"))))
    expected = layers_of(pool, path)
    for name in ("BUDGET", "INSIDE"):
        monkeypatch.setattr(calibration, name, 0, raising=False)
    for found, wanted in zip(layers_of(renewed(pool), path), expected, strict=True):
        same(found, wanted)
    # Nor does what was asked for before.
    other = renewed(pool)
    layers_of(other, (Step("regmean", -1), *uniform(other_source(pool), pool.n_layers)[1:]))
    same(layers_of(other, path)[0], expected[0])


def test_experts_run_in_the_first_two_fits_alone(pool, monkeypatch):
    """A single merge keeps nothing for others; what the second keeps changes no bit of the third."""
    sources = [f"least_squares:ridge=0.01,weights={w}/1" for w in (1, 2, 3)]

    def sum_of(weights):
        return sum(float(weights[name].double().sum()) for name in sorted(weights))

    experts = {sum_of(pool.weights(e, k)) for e in pool.names for k in range(pool.n_layers)}
    runs, apply = [], pool.architecture.apply

    def watched(layer, state):
        runs[-1] += sum_of(layer.state_dict()) in experts
        return apply(layer, state)

    def fitted(pool):
        runs.clear()
        for source in sources:
            runs.append(0)
            yield layers_of(pool, uniform(source, pool.n_layers))

    monkeypatch.setattr(type(pool.architecture), "apply", lambda _, *args: watched(*args))
    expected = list(fitted(renewed(pool)))
    assert runs[0] >= runs[1] > runs[2] == 0
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "BUDGET", 0)  # nor for states that nobody asks for
        list(fitted(renewed(pool)))
        assert runs[2] == 0
    monkeypatch.setattr(calibration, "THEIRS", 0)
    for found, wanted in zip(fitted(renewed(pool)), expected, strict=True):
        for one, two in zip(found, wanted, strict=True):
            same(one, two)
    nothing = runs[2]
    assert nothing >= runs[1] > 0
    monkeypatch.setattr(
        calibration, "THEIRS", 60_000
    )  # what has found room stays, the rest is computed
    list(fitted(renewed(pool)))
    assert 0 < runs[2] < nothing


def test_states_that_fit_are_kept_though_others_do_not(pool, monkeypatch):
    """Each pass over a layer's inputs takes them in the same order: kept by age, all would be lost."""
    monkeypatch.setattr(inputs, "BATCH", 5)
    monkeypatch.setattr(inputs, "JOINED", 0)
    asked = []

    def watched(batch):
        asked.append(batch)
        return batch

    def asks(budget):
        monkeypatch.setattr(calibration, "BUDGET", budget)
        asked.clear()
        tasks = [Blind(task, watched) for task in pool.calibration.tasks]
        layers_of(renewed(pool, tasks=tasks), uniform(FIRM, pool.n_layers))
        return len(asked)

    size = 2**12
    while asks(size) == asks(0):
        size *= 2  # the first budget that holds anything
    while asks(2 * size) < asks(size):
        size *= 2  # until all that is asked for again fits
    everything, nothing, part = asks(size), asks(0), asks(size // 4)
    assert everything < part < nothing - (nothing - everything) / 8


def test_blocks_are_their_sublayers(pool):
    """A block is fitted part by part in any case."""
    fine = LayerPool(pool.base, pool.experts, pool.names, unit="sublayer")
    fine.calibration = renewed(pool).calibration
    for source in (FIRM, "regmean"):
        whole = layers_of(pool, uniform(source, pool.n_layers))
        parts = layers_of(fine, uniform(source, fine.n_layers))
        for block, own in zip(whole, fine.blocks, strict=True):
            near({n: t for k in own for n, t in parts[k].items()}, block, 1e-5)


def test_a_path_runs_as_its_real_model(tmp_path):
    pool, tasks = vits(tmp_path)
    pool.calibration = Calibration(tasks, 20)
    path = (Step("e2", -1), Step(FIRM, 1), Step("ties", 0), Step("least_squares", 2), Step(FIRM, 2))
    images = tasks[0].inputs("train", np.arange(8))
    stem, arch = pool.stem("e2"), pool.architecture
    layers = [pool.layer(*step, path[:i]) for i, step in enumerate(path) if i]
    model = pool.assemble(path)
    with torch.no_grad():
        state = arch.embed(stem, images)
        for layer in layers:
            state = arch.apply(layer, state)
        logits = [arch.logits(stem, state, pool.heads[name]) for name in pool.names]
        torch.testing.assert_close(torch.cat(logits, 1), model(images), rtol=1e-4, atol=1e-4)
    same(dict(model.blocks[3].state_dict()), layers_of(pool, path)[3])


def test_the_path_before_matters_to_least_squares_alone(pool):
    one, two = ((STEM, Step(name, 0)) for name in pool.names)
    for source in ("regmean", "ties", pool.names[0]):
        assert pool.layer(source, 1, prefix=one) is pool.layer(source, 1, prefix=two)
        assert pool.layer(source, 1) is pool.layer(source, 1, prefix=one)
        assert not pool.depends_on_path(source)
    assert pool.depends_on_path(FIRM)
    assert pool.depends_on_path("least_squares")
    found = [pool.layer(FIRM, 1, prefix=path) for path in (one, two, one)]
    assert found[0] is found[2] is not found[1]
    weights = [pool.weights(FIRM, 1, prefix=path) for path in (one, two)]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    # The stem is part of the path.
    other = pool.weights(FIRM, 1, prefix=(Step(pool.names[1], -1), one[1]))
    assert any(not torch.equal(weights[0][name], other[name]) for name in other)
    with pytest.raises(InputError, match=f"'{FIRM}': expected the path before layer 1"):
        pool.layer(FIRM, 1)


def test_a_whole_fit_is_the_uniform_path_wherever_it_stands(pool):
    whole = f"{FIRM},fit=whole"
    path = (Step(FIRM, -1), *uniform(FIRM, pool.n_layers)[1:])
    expected = layers_of(pool, path)
    assert not pool.depends_on_path(whole)
    for k in reversed(range(pool.n_layers)):  # the last first: it asks for those before
        same(pool.weights(whole, k), expected[k])
        assert pool.layer(whole, k, prefix=(STEM, Step(pool.names[0], 0))) is pool.layer(whole, k)
    with pytest.raises(InputError, match="found lean, which stands for one operator per expert"):
        pool.weights("least_squares:lean=3", 0, prefix=(STEM,))


def test_scales_reach_merges_that_look_by_hand(pool):
    whole = f"{FIRM},fit=whole"
    more = LayerPool(pool.base, pool.experts, pool.names, ("ties", "regmean", FIRM, whole))
    more.calibration = renewed(pool).calibration
    first = more.sources[-1]
    assert more.members == (*pool.names, "regmean", first)
    scales = (0.5, -0.25, 1.5, 0.125)
    for k in (-1, 1):
        base = more.weights("base", k)
        found = more.weights("task_arithmetic", k, scales)
        for name, start in base.items():
            deltas = [more.weights(m, k)[name] - start for m in more.members]
            expected = start + sum(s * d for s, d in zip(scales, deltas, strict=True))
            torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-5)
        two = more.weights("task_arithmetic", k, scales[:2])  # of the experts alone
        same(two, pool.weights("task_arithmetic", k, scales[:2]))
    with pytest.raises(InputError, match="one for each of 4 experts, found 3"):
        more.weights("task_arithmetic", 0, scales[:3])
    found = scales_of(more, (Step("task_arithmetic", 1, scales), Step(first, 0)))
    np.testing.assert_allclose(found, [scales, [0, 0, 0, 1]], atol=1e-2)


def test_what_is_forgotten_is_free(pool, monkeypatch):
    monkeypatch.setattr(calibration, "FITTED", 0)
    pool.calibration = pool.calibration.anew()
    path = (STEM, Step(pool.names[0], 0))
    pool.layer(FIRM, 1, prefix=path)
    weights = pool.weights(FIRM, 1, prefix=path)
    expected = {name: t.clone() for name, t in weights.items()}
    watched = [weakref.ref(t) for name, t in weights.items() if name.endswith("weight")]
    del weights
    pool.forget([FIRM])
    gc.collect()
    assert not [ref for ref in watched if ref() is not None]
    same(pool.weights(FIRM, 1, prefix=path), expected)


# ------------------------------------------------------------------------------------- the inputs


def test_inputs_are_drawn_by_the_seed_over_the_whole_split(pool):
    tasks = pool.calibration.tasks
    sizes = [task.size("train") for task in tasks]
    n = min(sizes) // 2
    draws = [Calibration(tasks, n, seed=seed).rows for seed in (0, 0, 1)]
    for one, two, other, size in zip(*draws, sizes, strict=True):
        assert one.tolist() == two.tolist() == sorted(set(one.tolist())) != other.tolist()
        assert len(one) == n <= one.max() < size
    assert draws[0][0].tolist() != draws[0][1].tolist() or sizes[0] != sizes[1]
    assert [r.tolist() for r in Calibration(tasks, 10**6).rows] == [list(range(s)) for s in sizes]


def test_labels_do_not_matter(tiny, tmp_path, t5s):
    """The same inputs with other labels; blind tasks show that no other split is read."""
    pool, tasks = vits(tmp_path)
    other = [TensorTask(f"t{i}", i, 3, stripes if i % 2 else quadrant) for i in (1, 2)]
    for task in other:
        object.__setattr__(task.split("train"), "labels", task.split("train").labels.flip(0))
    pool.calibration = Calibration(tasks, 10)
    path = uniform(FIRM, 3)
    expected = layers_of(pool, path)
    for found, wanted in zip(layers_of(renewed(pool, tasks=other), path), expected, strict=True):
        same(found, wanted)
    folder = tmp_path / "texts"
    folder.mkdir()
    for split in ("train", "reward", "test"):
        rows = [
            row | {"label": (row["label"] + 1) % len(row["choices"])}
            for row in rows_of(t5s["texts"][0], split)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts = t5_problem(t5s)
    format_ = texts.base.family.input_format(texts.base)
    tasks = [Blind(TextTask(str(folder), format_)), texts.calibration.tasks[1]]
    changed = renewed(texts, tasks=tasks)
    same(changed.weights(FIRM, 0, (), (STEM,)), texts.weights(FIRM, 0, (), (STEM,)))


def test_a_pickled_pool_has_its_inputs(tiny, pool):
    ours = LayerPool(pool.base, pool.experts, pool.names, (FIRM, "regmean"))
    ours.calibration = renewed(pool).calibration
    theirs = pickle.loads(pickle.dumps(ours))
    twice = copy.deepcopy(theirs)
    path = (Step("regmean", -1), Step(FIRM, 0), Step(other_source(pool), 1))
    for other in (theirs, twice):
        for found, expected in zip(layers_of(other, path), layers_of(ours, path), strict=True):
            same(found, expected)
        assert LayerPath.of(other, path) == LayerPath.of(ours, path)
    # Without an operator that looks at them they stay where they are.
    assert len(pickle.dumps(pool)) < len(pickle.dumps(ours))


def test_the_same_inputs_anew_are_of_the_same_tasks(pool):
    cal = pool.calibration
    new = cal.anew()
    assert new.tasks == cal.tasks
    assert new.record() == cal.record()


def test_one_input_of_each_task_is_enough(pool):
    one = renewed(pool, n=1)
    for source in (FIRM, "regmean", "least_squares:ridge=0", "regmean:alpha=1"):
        for weights in layers_of(one, uniform(source, pool.n_layers)):
            assert all(torch.isfinite(t).all() for t in weights.values())
            if source == FIRM:
                assert max(float(t.abs().max()) for t in weights.values()) < 100
    # None can be held out to choose a ridge: the anchor stays.
    for k, weights in enumerate(layers_of(one, uniform("least_squares", pool.n_layers))):
        near(weights, pool.weights("weight_average", k), 1e-6)


def test_inputs_without_variety_are_no_error(tmp_path):
    pool, tasks = vits(tmp_path)
    black = [Blind(task, torch.zeros_like) for task in tasks]
    pool.calibration = Calibration(black, 60)
    for source in (FIRM, "regmean", "least_squares", "least_squares:ridge=0"):
        for weights in layers_of(pool, uniform(source, 3)):
            assert all(torch.isfinite(t).all() for t in weights.values())
            assert max(float(t.abs().max()) for t in weights.values()) < 100


def test_an_input_that_is_no_number_is_named_with_its_layer(tmp_path):
    pool, tasks = vits(tmp_path)

    def broken(batch):
        batch = batch.clone()
        batch[1:2] = torch.nan
        return batch

    pool.calibration = Calibration([tasks[0], Blind(tasks[1], broken)], 60)
    for source in (FIRM, "least_squares"):
        with pytest.raises(InputError, match=r"least squares at layer 0, attn.qkv: xx: .* NaN"):
            pool.weights(source, 0, (), (STEM,))
    with pytest.raises(InputError, match=r"regmean at layer 2, attn.qkv: grams: .* NaN"):
        pool.weights("regmean", 2)


def test_experts_in_half_precision_are_fitted_in_single(tiny, tmp_path):
    experts = []
    for i, folder in enumerate(tiny["experts"]):
        model = read_checkpoint(folder)
        halves = {name: t.half() for name, t in model.weights.items()}
        write_checkpoint(tmp_path / f"e{i + 1}", model.config, halves)
        experts.append(str(tmp_path / f"e{i + 1}"))
    pool = tiny_pool(tiny | {"experts": tuple(experts)})
    for source in (FIRM, "regmean"):
        found, expected = (layers_of(p, uniform(source, 3)) for p in (pool, tiny_pool(tiny)))
        for one, two in zip(found, expected, strict=True):
            assert {t.dtype for t in one.values()} == {torch.float32}
            near(one, two, 0.02)


def test_inputs_that_are_needed_and_not_there(tiny, tmp_path):
    for operator in (FIRM, "regmean"):
        message = (
            rf"--calibration: expected 1 or more inputs per task for operator '{operator}', found 0"
        )
        with pytest.raises(InputError, match=message):
            load_problem(**tiny, operators=("ties", operator), calibration=0)
    without = load_problem(**tiny, operators=("ties",), calibration=0).pool
    with pytest.raises(
        InputError, match="expected calibration inputs, found none; give --calibration N"
    ):
        without.weights("regmean", 0)
    with pytest.raises(InputError, match=r"calibration.*expected 0 or more, found -1"):
        load_problem(**tiny, calibration=-1)
    pool, tasks = vits(tmp_path)
    with pytest.raises(InputError, match=r"--calibration: expected 1 or more inputs .* found 0"):
        Calibration(tasks, 0)
    tasks[1].size = lambda split: 0
    pool.calibration = Calibration(tasks, 5)
    with pytest.raises(
        InputError, match="input of task 't2', found none in its train split; add som"
    ):
        pool.weights("regmean", 0)


# -------------------------------------------------------------------------------------- path.json


@pytest.fixture
def own(tmp_path):
    """A copy of tiny models and images that a test may change."""
    return write_tiny(tmp_path)


MIXED = (Step("regmean", -1), Step(FIRM, 0), Step("e1", 1), Step("least_squares", 2))
BLENDED = tuple(Step("task_arithmetic", k, (0.2, 0.3, 0.5)) for k in range(-1, 3))  # and regmean


@pytest.mark.parametrize("steps", [MIXED, BLENDED], ids=["sources", "scales"])
def test_a_path_is_built_again_bit_for_bit(own, tmp_path, steps):
    pool = tiny_pool(own, 40)
    path = LayerPath.of(pool, steps)
    again = LayerPath.from_json(path.to_json())
    assert again == path
    record = json.loads(path.to_json())["calibration"]
    assert (record["split"], record["seed"]) == ("train", 0)
    rows = [len(task["rows"]) for task in record["tasks"]]
    assert rows == [36, 36]  # all that there are
    expected = dict(pool.assemble(steps).state_dict())
    same(dict(again.build(problems.pool_of(again)).state_dict()), expected)
    with pytest.raises(InputError, match="expected calibration inputs, found none"):
        again.build()
    folder = again.save_pretrained(tmp_path / "merged", problems.pool_of(again))
    same(load_file(folder / "model.safetensors"), expected)
    config = json.loads((folder / "config.json").read_text())
    assert config["rmm_lab"]["path"]["calibration"] == record
    assert json.loads(path.to_json()) == config["rmm_lab"]["path"]


def test_a_t5s_path_is_built_again_bit_for_bit(t5s):
    base, *experts = map(str, t5s["t5"][1])
    texts = list(map(str, t5s["texts"]))
    problem = load_problem(experts, base=base, texts=texts, operators=(FIRM,), calibration=7)
    path = (Step("regmean", -1), *uniform(FIRM, 4)[1:])
    again = LayerPath.from_json(LayerPath.of(problem.pool, path).to_json())
    expected = dict(problem.pool.assemble(path).state_dict())
    same(dict(again.build(problems.pool_of(again)).state_dict()), expected)


def test_a_record_holds_in_any_folder(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    relative = {"base": "base", "experts": ("e1", "e2"), "images": ("i1", "./i2")}
    pool = tiny_pool(relative)
    text = LayerPath.of(pool, MIXED).to_json()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    path = LayerPath.from_json(text)
    same(
        problems.pool_of(path).weights(FIRM, 0, (), MIXED[:1]), pool.weights(FIRM, 0, (), MIXED[:1])
    )


def test_names_that_ship_stay_names(tmp_path, monkeypatch):
    """Whatever folders there are."""
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    pool = load_problem(("demo",), operators=("regmean",), calibration=2).pool
    path = LayerPath.of(pool, [Step("regmean", 0)])
    assert [t["source"] for t in path.calibration["tasks"]] == ["digits", "textures"]
    problems.pool_of(path)


def test_a_path_that_looks_at_nothing_names_no_inputs(tiny):
    pool = tiny_pool(tiny)
    path = LayerPath.of(pool, uniform("ties", 3))
    assert path.calibration is None
    assert "calibration" not in json.loads(path.to_json())
    assert problems.pool_of(path).calibration is None
    # Nor does one of a pool that has none, which cannot be built.
    pool.calibration = None
    assert LayerPath.of(pool, [Step("regmean", 0)]).calibration is None


def test_data_that_have_changed_are_noticed(own, tmp_path):
    path = LayerPath.of(tiny_pool(own), MIXED)
    data = json.loads(path.to_json())
    first = data["calibration"]["tasks"][0]

    def with_task(**changes):
        tasks = [first | changes, *data["calibration"]["tasks"][1:]]
        new = data | {"calibration": data["calibration"] | {"tasks": tasks}}
        return LayerPath.from_json(json.dumps(new))

    message = (
        r"calibration: expected inputs of task 'i1' with SHA-256 \w+..., found \w+...; the data ha"
    )
    rows = first["rows"]
    free = next(row for row in range(36) if row not in rows)
    for changed in ([*rows[:-1], free], rows[:-1], rows[::-1]):
        with pytest.raises(InputError, match=message):
            problems.pool_of(with_task(rows=changed))
    with pytest.raises(
        InputError, match="calibration: expected row 36 in the train split of task 'i1'"
    ):
        problems.pool_of(with_task(rows=[*rows[:-1], 36]))
    for broken in ({"rows": "some"}, {"rows": None}, {"sha256": None}):
        with pytest.raises(InputError):
            problems.pool_of(with_task(**broken))
    for broken in (3, [], {}, {"tasks": [{}]}):
        with pytest.raises(InputError, match="layer path: expected"):
            problems.pool_of(LayerPath.from_json(json.dumps(data | {"calibration": broken})))
    folder = tmp_path / "i1" / "train"
    picture = sorted(folder.rglob("*.png"))[rows[0]]
    other = sorted((tmp_path / "i1" / "test").rglob("*.png"))[0]
    picture.write_bytes(other.read_bytes())
    with pytest.raises(InputError, match="calibration: expected inputs of task"):
        problems.pool_of(path)


# ---------------------------------------------------------------------------------------- searches


def searched(tiny, tmp_path, **options):
    defaults = {"operators": ("least_squares", "regmean", "ties"), "calibration": 8, "episodes": 12}
    given = tiny | defaults | {"run_dir": tmp_path / "run", "quiet": True} | options
    config = configure("weights", **given)
    problem = problems.problem_of(config.problem)
    return problem, train(config, problem, table=False)


@pytest.mark.parametrize("options", [{}, {"cma_share": 0.0, "unit": "block", "stem": "regmean"}])
def test_a_search_over_layers_that_look(tiny, tmp_path, options):
    """Ends in a model that its path.json builds again; scores are those of the plain evaluation."""
    problem, result = searched(tiny, tmp_path, **options)
    assert {"uniform", "agent"} <= {row["phase"] for row in result.episodes}
    for row in result.finalists:
        path = parse_path(row["path"])
        path = path if path[0].layer < 0 else (Step(result.path.stem.source, -1), *path)
        scores = evaluate(problem.pool, problem.tasks, path, "reward")
        assert row["reward"] == pytest.approx(scores.mean(), abs=1e-9)
    looking = (Step("regmean", -1), *(Step(FIRM, k) for k in range(problem.pool.n_layers)))
    stored = LayerPath.from_json((tmp_path / "run" / "path.json").read_text())
    merged = load_file(tmp_path / "run" / "merged" / "model.safetensors")
    same(dict(stored.build(problems.pool_of(stored)).state_dict()), merged)
    assert stored.experts == LayerPath.of(problem.pool, looking).experts


def test_cma_es_starts_from_layers_that_look(tiny, tmp_path):
    """All sources depend on the path before: so does the start."""
    _, result = searched(
        tiny, tmp_path, operators=(FIRM,), experts=tiny["experts"], cma_share=0.5, episodes=14
    )
    assert "scales" in {row["phase"] for row in result.episodes}


def test_a_scorer_forgets_layers_of_single_paths(tiny, monkeypatch):
    """However many paths it scores, without room the layers of one are there at a time."""
    monkeypatch.setattr(calibration, "FITTED", 0)
    problem = load_problem(**tiny, operators=(FIRM, "ties"), calibration=6, stem="agent")
    alive, merge = [], problem.pool.calibration.merge

    def watched(*args, **options):
        weights = merge(*args, **options)
        alive.append(weakref.ref(next(iter(weights.values()))))
        return weights

    problem.pool.calibration.merge = watched
    scorer, rng = problem.scorer(fraction=0.5), np.random.default_rng(0)
    for _ in range(8):
        names = rng.choice([*problem.pool.names, FIRM, FIRM, "ties"], 3)
        path = (STEM, *(Step(str(name), k) for k, name in enumerate(names)))
        scorer.score(path, 0)
        scorer.score((*path, Step(FIRM, 2)), 1)
    gc.collect()
    assert len(alive) > 10
    assert not [ref for ref in alive if ref() is not None]


@pytest.mark.parametrize(("room", "fits"), [(2**20, 6), (0, 9)])
def test_paths_that_begin_alike_share_fitted_layers_while_there_is_room(
    tiny, monkeypatch, room, fits
):
    """Three paths of three layers: the second and the third leave the first at layers 1 and 2."""
    monkeypatch.setattr(calibration, "FITTED", room)
    problem = load_problem(**tiny, operators=(FIRM, OTHER), calibration=6, stem="agent")
    start = (STEM, Step(FIRM, 0))
    paths = [(*start, Step(FIRM, 1), Step(FIRM, 2))]
    paths += [(*start, Step(OTHER, 1), Step(FIRM, 2)), (*start, Step(FIRM, 1), Step(OTHER, 2))]
    expected = [evaluate(problem.pool, problem.tasks, path, "reward") for path in paths]
    fitted, solve = [], matching.towards

    def counted(*args, **options):
        fitted.append(1)
        return solve(*args, **options)

    monkeypatch.setattr(matching, "towards", counted)
    problem.pool.calibration = problem.pool.calibration.anew()
    problem.pool.forget([FIRM, OTHER])
    scorer = problem.scorer()
    for path, scores in zip(paths, expected, strict=True):
        np.testing.assert_array_equal(scorer.score(path), scores)
        problem.pool.forget([FIRM, OTHER])
    assert len(fitted) == 4 * fits  # four maps in each layer


# ------------------------------------------------------------------------------------------- drift


def share(ours, theirs):
    return ((ours - theirs) ** 2).sum() / (theirs**2).sum()


def test_a_vits_drift_is_that_of_whole_models(tmp_path):
    pool, tasks = vits(tmp_path)
    pool.calibration = cal = Calibration(tasks, 40)
    base, *experts = timm_models(pool)
    merged = copy.deepcopy(base)
    merged.blocks[0] = experts[0].blocks[0]
    merged.blocks[1].load_state_dict(pool.weights("ties", 1))
    path = (STEM, Step("e1", 0), Step("ties", 1))
    for end in (2, 3):
        expected = []
        for expert, batch in zip(experts, images_of(cal), strict=True):
            ours, theirs = (
                numbers(
                    grab(lambda m=m, b=batch: m.forward_features(b), m.blocks[end - 2], "out")[0]
                )
                for m in (merged, expert)
            )
            expected.append(share(ours, theirs))
        np.testing.assert_allclose(cal.drift(pool, path[:end]), expected, rtol=1e-4)


def test_few_inputs_are_drawn_from_all_of_them(tmp_path):
    """From the whole list, which is sorted by class, and from no others."""
    _, tasks = vits(tmp_path)
    cal = Calibration(tasks, 40, seed=3)
    few = cal.few(10)
    for all_of, own in zip(cal.rows, few.rows, strict=True):
        assert len(set(own)) == 10
        assert set(own) < set(all_of)
        assert own.max() > np.median(all_of) > own.min()
    assert [list(rows) for rows in cal.few(99).rows] == [list(rows) for rows in cal.rows]


def test_a_scorers_drift_looks_at_few_inputs(tiny, monkeypatch):
    monkeypatch.setattr("rmm_lab.engine.scorer.DRIFTING", 3)
    problem = load_problem(**tiny, operators=("ties",), calibration=8, stem="base")
    path = uniform("ties", problem.pool.n_layers)[1:]
    rows = problem.pool.calibration.few(3).rows
    looked = Calibration(problem.tasks, 3, rows=rows).drift(problem.pool, (STEM, *path))
    drift = problem.scorer().drift((STEM, *path))
    np.testing.assert_array_equal(drift, looked)
    assert (drift != problem.pool.calibration.drift(problem.pool, (STEM, *path))).all()


def test_a_t5s_drift_leaves_padding_out(t5s):
    """Inputs and choices one by one; behind the encoder's first block, its end, the decoder's first block."""
    pool = t5_problem(t5s)
    models = t5s["t5"][0]
    merged = by_hand(models, [(1, 0), (2, 1)], [(2, 0), (2, 1)])
    path = (STEM, *(Step(name, k) for k, name in enumerate(("one", "two", "two"))))
    ends = {
        2: ("encoder", lambda m: m.encoder.block[1].layer[0].layer_norm),
        3: ("encoder", lambda m: m.encoder.final_layer_norm),
        4: ("decoder", lambda m: m.decoder.block[1].layer[0].layer_norm),
    }
    for end, (stack, next_norm) in ends.items():
        expected = [
            share(*(t5_rows(m, batch, stack, next_norm(m), "in") for m in (merged, expert)))
            for expert, batch in zip(models[1:], images_of(pool.calibration), strict=True)
        ]
        np.testing.assert_allclose(pool.calibration.drift(pool, path[:end]), expected, rtol=1e-4)


def test_an_expert_alone_does_not_drift_from_itself(pool):
    name = pool.names[1]
    path = (Step(name, -1), *(Step(name, k) for k in range(pool.n_layers)))
    for end in range(1, len(path) + 1):
        drift = pool.calibration.drift(pool, path[:end])
        assert drift[1] == 0
        assert drift[0] > 0


def test_least_squares_drifts_less_than_the_average(pool):
    ends = [
        pool.calibration.drift(pool, uniform(source, pool.n_layers))
        for source in (FIRM, "weight_average")
    ]
    assert ends[0].mean() < ends[1].mean()


def test_states_that_are_no_numbers_are_infinitely_far(tmp_path):
    pool, tasks = vits(tmp_path)
    pool.calibration = Calibration(tasks, 4)
    pool.experts[0].weights["blocks.0.mlp.fc1.weight"][0, 0] = 1e30
    path = (STEM, Step("task_arithmetic", 0, (1e6, 1e6)))
    assert np.isinf(pool.calibration.drift(pool, path)).all()


def test_experts_run_as_ever_while_a_layer_is_fitted(tmp_path, monkeypatch):
    """Other threads may be using them."""
    pool, tasks = vits(tmp_path)
    pool.calibration = Calibration(tasks, 4)
    tokens, apply = torch.randn(2, 5, 16), pool.architecture.apply
    experts = [pool.layer(name, 1) for name in pool.names]
    expected = [expert(tokens) for expert in experts]
    checked = []

    def watched(layer, state):
        checked.extend(torch.equal(e(tokens), y) for e, y in zip(experts, expected, strict=True))
        return apply(layer, state)

    monkeypatch.setattr(pool.architecture, "apply", watched)
    pool.weights(FIRM, 1, prefix=(STEM, Step("ties", 0)))
    pool.weights("regmean", 1)
    assert len(checked) > 20
    assert all(checked)


def test_threads_do_not_get_in_each_others_way(tiny):
    """Scores are those of a single one."""
    problem = load_problem(**tiny, operators=(FIRM, "ties"), calibration=12, stem="agent")
    sources = (*problem.pool.names, FIRM)
    paths = [
        (Step(a, -1), Step(b, 0), Step(c, 1), Step(FIRM, 2))
        for a in sources[1:]
        for b in sources
        for c in sources
    ]
    found = []
    for workers in (1, 4):
        scorer = copy.deepcopy(problem).scorer(fraction=0.5, workers=workers)
        scorer.prefetch([(path, 0) for path in paths])
        found.append([scorer.score(path, 0).tolist() for path in paths])
        scorer.close()
    assert found[0] == found[1]


def test_what_was_merged_in_inference_mode_serves_outside_of_it(pool):
    """A search merges in inference mode; the rows of its table are made after it."""
    fresh = renewed(pool)
    with torch.inference_mode():
        fresh.weights("weight_average", -1)
        fresh.weights("weight_average", 0)
    modules = [fresh.stem("weight_average"), fresh.layer("weight_average", 0)]
    assert not any(p.requires_grad for module in modules for p in module.parameters())


@pytest.mark.parametrize(("names", "helps"), [("digits letters", False), ("digits textures", True)])
def test_a_fit_to_few_inputs_must_help_every_task(names, helps):
    """6 and 12 pictures: the pair that averages well keeps the average, the other one gains by the fit."""
    problem = load_problem(tuple(names.split()))
    rows = [
        np.sort(np.random.default_rng((0, i)).permutation(task.size("train"))[:n])
        for i, (task, n) in enumerate(zip(problem.tasks, (6, 12), strict=True))
    ]
    problem.pool.calibration = Calibration(problem.tasks, 12, rows=rows)
    prefix = (Step("least_squares", -1),)
    found = problem.pool.weights("least_squares", 0, prefix=prefix)
    average = problem.pool.weights("weight_average", 0)
    assert all(torch.equal(found[name], average[name]) for name in average) is not helps


@pytest.mark.parametrize("d", [40, 301, 512, 700])
def test_gram_matrices_are_whole_however_wide(d):
    """Wide ones add up in bands; rows with weights by hand, two folds, one task without rows."""
    generator = torch.Generator().manual_seed(d)
    x = torch.randn(60, d, generator=generator)
    w = torch.rand(60, generator=generator)
    y = torch.randn(60, 5, generator=generator)
    means = Means(2, 2, d, 5)
    for rows in (slice(0, 7), slice(7, 40)):
        means.add(0, x[rows], [y[rows]], w[rows], folds=[slice(0, 0), slice(None)])
    for found, other in zip(means.take(), (x, y), strict=True):
        plain = (x[:40] * w[:40, None]).double().T @ other[:40].double() / w[:40].double().sum()
        assert torch.allclose(found[1, 0].double(), plain, rtol=1e-4, atol=1e-5)
        assert not found[0].any()
        assert not found[:, 1].any()
