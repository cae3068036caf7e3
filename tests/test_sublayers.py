"""Sublayers as layers: attention, cross-attention and MLP apart, with timm and transformers as oracles."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from conftest import TINY
from t5_models import ROWS, batch_of, by_hand, close, hf_model, logits_of, run
from test_models import VARIANTS, config_of, images, timm_model
from torch import nn
from transformers import T5ForConditionalGeneration

from rmm_lab import operators
from rmm_lab.errors import InputError
from rmm_lab.families import parts, t5, vit
from rmm_lab.families.vit import ViT
from rmm_lab.path import LayerPath
from rmm_lab.reward import Step, parse_path
from rmm_lab.search.config import configure
from rmm_lab.search.pipeline import train
from rmm_lab.search.problem import load_problem

# Sublayers of three blocks in running order (even: attention, odd: MLP), and the blocks that they make.
PATHS = {
    "whole": (range(6), 3),
    "attention alone": ((0, 2, 4), 3),
    "MLPs alone": ((1, 3), 2),
    "MLP first": ((3, 0, 1), 2),
    "two of a kind": ((0, 0, 1, 1, 4, 5), 4),
    "of different blocks": ((4, 1), 1),
    "nothing": ((), 0),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("path", "depth"), PATHS.values(), ids=PATHS)
def test_any_order_of_sublayers_runs_as_timms_modules_do(variant, path, depth):
    model, x = timm_model(variant), images(1)
    family = ViT(config_of(variant), "sublayer")
    assert family.n_layers == 6
    own = parts.divide(vit.split(model.state_dict()), vit.sublayer)
    with torch.no_grad():
        blocks, model.blocks = list(model.blocks), nn.Sequential()
        norm, model.norm = model.norm, nn.Identity()
        expected = model.forward_features(x)
        for k in path:
            b = blocks[k // 2]
            if k % 2:
                expected = expected + b.ls2(b.mlp(b.norm2(expected)))
            else:
                expected = expected + b.ls1(b.attn(b.norm1(expected)))
        expected = model.forward_head(norm(expected))
    stem = family.stem(own.stem)
    state = family.embed(stem, x)
    for i, k in enumerate(path):
        apply = family.apply_last if i == len(path) - 1 else family.apply
        state = apply(family.layer(k, own.layers[k]), state)
    torch.testing.assert_close(family.logits(stem, state, own.head), expected)
    whole = family.assemble(own.stem, [(k, own.layers[k]) for k in path], {"task": own.head})
    assert len(whole.blocks) == depth
    with torch.no_grad():
        torch.testing.assert_close(whole(x), expected)
    config = family.merged_config(list(path), {"task": own.head}, {"task": range(5)})
    assert config["model_args"]["depth"] == depth


def test_every_tensor_of_a_block_is_in_one_sublayer_in_running_order():
    weights = timm_model("layer scale").state_dict()
    whole = vit.split(weights)
    own = parts.divide(whole, vit.sublayer)
    assert own.stacks == (range(6),)
    assert (own.stem, own.head) == (whole.stem, whole.head)
    for k, block in enumerate(whole.layers):
        attention, mlp = own.layers[2 * k : 2 * k + 2]
        assert {n.split(".")[0] for n in attention} == {"norm1", "attn", "ls1"}
        assert {n.split(".")[0] for n in mlp} == {"norm2", "mlp", "ls2"}
        assert all(block[name] is t for name, t in (attention | mlp).items())
        assert len(attention) + len(mlp) == len(block)


def test_blocks_of_another_kind_are_refused_as_sublayers():
    for family, known in ((vit, "attn.qkv.weight"), (t5, "layer.0.layer_norm.weight")):
        block = {known: torch.zeros(1), "gate.weight": torch.zeros(1)}
        whole = parts.Parts({}, [block], {}, (range(1),))
        with pytest.raises(InputError, match=r"found 'gate.weight' in a block.*--unit block"):
            parts.divide(whole, family.sublayer)
    norm_after = TINY | {"architecture": "vit_base_patch16_rpn_224"}
    with pytest.raises(InputError, match=r"expected blocks of attention and MLP.*--unit block"):
        ViT(norm_after, "sublayer")


# ----------------------------------------------------------------------------------------------- T5

# Sublayers: 0 1 | 2 3 encoder (attention, MLP), 4 5 6 | 7 8 9 decoder (attention, cross-attention, MLP).
# The blocks that they make: for each stack (number of the block, sublayers it has) of each place.
TEXT_PATHS = {
    "whole": (range(10), [(0, "01"), (1, "01")], [(0, "012"), (1, "012")]),
    "no cross-attention": ((0, 1, 4, 6, 7, 9), [(0, "01")], [(0, "02"), (1, "02")]),
    "MLPs alone": ((1, 3, 6, 9), [(0, "1"), (1, "1")], [(0, "2"), (1, "2")]),
    "cross-attention first": ((0, 1, 5, 4, 6), [(0, "01")], [(0, "1"), (0, "02")]),
    "attention twice": ((0, 0, 1, 7, 8, 8, 9), [(0, "0"), (0, "01")], [(1, "01"), (1, "12")]),
    "no encoder": ((4, 5, 6), [], [(0, "012")]),
}


def zeroed(model, encoder, decoder) -> T5ForConditionalGeneration:
    """A transformers model of whole blocks in which what a path lacks writes nothing."""
    own = by_hand([model], [(0, k) for k, _ in encoder], [(0, k) for k, _ in decoder])
    for stack, places in ((own.encoder, encoder), (own.decoder, decoder)):
        for block, (_, kept) in zip(stack.block, places, strict=True):
            for i, part in enumerate(block.layer):
                if str(i) not in kept:
                    out = getattr(part, "SelfAttention", None) or getattr(
                        part, "EncDecAttention", None
                    )
                    (part.DenseReluDense.wo if out is None else out.o).weight.zero_()
    return own


@pytest.mark.parametrize("variant", ["t5", "v1.1"])
@pytest.mark.parametrize(("path", "encoder", "decoder"), TEXT_PATHS.values(), ids=TEXT_PATHS)
def test_any_order_of_a_t5s_sublayers_runs_as_transformers_does(variant, path, encoder, decoder):
    model = hf_model(variant)
    expected = zeroed(model, encoder, decoder)
    config, weights = model.config.to_dict(), t5.once("m", dict(model.state_dict()))
    family = t5.T5(config, "sublayer")
    own = parts.divide(t5.split(weights), t5.sublayer)
    assert family.n_layers == 10
    assert own.stacks == (range(4), range(4, 10))
    whole = family.assemble(own.stem, [(k, own.layers[k]) for k in path], {})
    assert len(whole.encoder.block) == len(encoder)
    assert len(whole.decoder.block) == len(decoder)
    close(logits_of(whole), logits_of(expected))
    found = run(family, own.stem, layers_of(own, path), batch_of(ROWS))
    same, again = t5.T5(config), t5.split(t5.once("e", expected.state_dict()))
    numbers = [0 if k < len(encoder) else 2 for k in range(len(again.layers))]
    blocks = list(zip(numbers, again.layers, strict=True))
    torch.testing.assert_close(found, run(same, own.stem, blocks, batch_of(ROWS)))


def layers_of(own, path):
    return [(k, own.layers[k]) for k in path]


def test_a_sublayer_of_the_encoder_behind_the_decoder_is_refused():
    model = hf_model()
    family = t5.T5(model.config.to_dict(), "sublayer")
    own = parts.divide(t5.split(t5.once("m", model.state_dict())), t5.sublayer)
    with pytest.raises(InputError, match="before decoder blocks"):
        family.assemble(own.stem, [(k, own.layers[k]) for k in (0, 5, 1)], {})
    with pytest.raises(InputError, match="before decoder blocks"):
        run(family, own.stem, layers_of(own, (0, 5, 1)), batch_of(ROWS))


# -------------------------------------------------------------------------------- pool, path, search


def test_an_operator_trims_over_the_sublayer(tiny):
    problem = load_problem(**tiny, operators=("ties:density=0.3",), unit="sublayer")
    pool = problem.pool
    assert pool.n_layers == 6
    base, experts = pool.base.weights, [e.weights for e in pool.experts]
    names = [n for n in base if n.startswith("blocks.1.") and n.split(".")[2] in ("norm2", "mlp")]
    flat = torch.cat([base[n].flatten() for n in names])
    stack = torch.stack([torch.cat([e[n].flatten() for n in names]) for e in experts])
    expected = operators.ties(flat, stack, density=0.3)
    found = pool.weights(pool.sources[-1], 3)
    assert list(found) == [n.removeprefix("blocks.1.") for n in names]
    torch.testing.assert_close(torch.cat([t.flatten() for t in found.values()]), expected)


def test_a_path_of_sublayers_is_saved_as_a_timm_model(tiny, tmp_path):
    problem = load_problem(**tiny, operators=("ties", "weight_average"), unit="sublayer")
    pool = problem.pool
    steps = parse_path("weight_average@0 e1@1 e2@3 ties@4 ties@5")
    path = LayerPath.of(pool, steps, "e1")
    again = LayerPath.from_json(path.to_json())
    assert again == path
    assert again.unit == "sublayer"
    again.save_pretrained(tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert len(model.blocks) == 3
    # By hand: attention of the average and MLP of e1; MLP of e2 alone; the last block by TIES.
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    average = pool.weights("weight_average", 0)["attn.qkv.weight"]
    torch.testing.assert_close(model.blocks[0].attn.qkv.weight.data, average)
    e2 = pool.experts[1].weights["blocks.1.mlp.fc1.weight"]
    torch.testing.assert_close(model.blocks[1].mlp.fc1.weight.data, e2)
    assert not model.blocks[1].attn.proj.weight.any()
    with torch.no_grad():
        logits = model(x)
    family = pool.architecture
    stem = pool.stem("e1")
    state = family.embed(stem, x)
    for step in steps:
        state = family.apply(pool.layer(*step), state)
    expected = torch.cat([family.logits(stem, state, pool.heads[n]) for n in pool.names], 1)
    torch.testing.assert_close(logits, expected)


def test_a_path_written_before_there_were_sublayers_is_one_of_blocks(tiny):
    pool = load_problem(**tiny, operators=("ties",)).pool
    data = json.loads(LayerPath.of(pool, parse_path("ties@0")).to_json())
    del data["unit"]
    assert LayerPath.from_json(json.dumps(data)).unit == "block"
    data["unit"] = 3
    with pytest.raises(InputError, match="unit is no str"):
        LayerPath.from_json(json.dumps(data))


def test_a_weight_average_is_the_same_model_in_either_unit(tiny):
    scores = []
    for unit in ("block", "sublayer"):
        problem = load_problem(**tiny, operators=("weight_average",), stem="base", unit=unit)
        path = tuple(Step("weight_average", k) for k in range(problem.pool.n_layers))
        scores.append(problem.scorer(fraction=0.5, stem="base").score(path, 1).tolist())
    assert scores[0] == scores[1]


def test_a_search_over_sublayers_ends_in_a_model_that_scores_what_it_says(tiny, tmp_path):
    options = {"operators": ("weight_average", "ties"), "run_dir": tmp_path / "run"}
    options["compare"] = "paper"  # what it is compared with is not the point
    config = configure("weights", **tiny, **options, episodes=24, data_fraction=0.5, quiet=True)
    assert config.problem.unit == "both"
    result = train(config)
    assert result.path.unit == "sublayer"
    model = timm.create_model(f"local-dir:{tmp_path / 'run' / 'merged'}", pretrained=True).eval()
    problem = load_problem(**tiny)
    slices = json.loads((tmp_path / "run" / "merged" / "config.json").read_text())["rmm_lab"]
    for task in problem.tasks:
        data = task.split("test")
        own = slice(*slices["heads"][task.name.replace("i", "e")])
        with torch.no_grad():
            found = model(task.format.normalise(data.images))[:, own].argmax(1)
        score = float((found == data.labels).double().mean())
        assert result.scores["agent + CMA-ES"][task.name] == pytest.approx(score)
