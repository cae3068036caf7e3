"""T5s taken apart, run, merged and written, with transformers' own models and files as the oracle."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from t5_models import (
    BIAS,
    ROWS,
    VARIANTS,
    batch_of,
    by_hand,
    close,
    hf_model,
    logits_of,
    pool_of,
    reference,
    run,
    taken_apart,
    write_t5,
)
from torch import nn
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5ForConditionalGeneration

from rmm_lab.errors import InputError
from rmm_lab.families import t5, t5_run
from rmm_lab.families.checkpoint import read_checkpoint
from rmm_lab.families.parts import join
from rmm_lab.layers import LayerPool
from rmm_lab.path import LayerPath
from rmm_lab.reward import Step, parse_path
from rmm_lab.tasks.text_task import TextBatch

BIASES = [f"{stack}.block.0.{BIAS}" for stack in ("encoder", "decoder")]
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
PATHS = {  # encoder blocks, decoder blocks
    "whole": ((0, 1), (0, 1)),
    "skipped": ((1,), (1,)),
    "first decoder block skipped": ((0, 1), (1,)),
    "repeated": ((0, 0, 1), (0, 0, 1)),
    "back": ((1, 0, 1), (1, 0, 1)),
    "one": ((0,), (0,)),
    "no encoder": ((), (0, 1)),
    "no decoder": ((1, 1), ()),
    "nothing": ((), ()),
}


def numbered(model, path) -> list[int]:
    return [*path[0], *(model.config.num_layers + k for k in path[1])]


def check_rows(found, expected, rows=ROWS, tolerance: float = 1e-4) -> None:
    """found: (n, C); expected: a list for each row. Choices that a row lacks are -inf."""
    for i, ((_, choices), values) in enumerate(zip(rows, expected, strict=True)):
        n = len(choices)
        assert found[i, :n].tolist() == pytest.approx(values, rel=tolerance, abs=tolerance)
        assert (found[i, n:] == -torch.inf).all()
        assert found[i].argmax() == np.argmax(values)


pytestmark = pytest.mark.usefixtures("no_progress_bars")


@pytest.fixture(params=VARIANTS)
def variant(request) -> str:
    return request.param


# ------------------------------------------------------------------------------ split and join


def test_every_parameter_has_exactly_one_owner(variant):
    model = hf_model(variant)
    _, parts = taken_apart(model)
    e = model.config.num_layers
    assert parts.stacks == (range(e), range(e, e + 2))
    owner = {}
    for first, stack in ((0, model.encoder), (e, model.decoder)):
        for k, block in enumerate(stack.block, first):
            owner |= {p.data_ptr(): k for p in block.parameters()}
    stem = [model.shared.weight, *(model.get_parameter(n) for n in BIASES)]
    stem += [model.encoder.final_layer_norm.weight, model.decoder.final_layer_norm.weight]
    if variant == "v1.1":
        stem.append(model.lm_head.weight)
    owner |= {p.data_ptr(): "stem" for p in stem}
    found = [(p.data_ptr(), "stem") for p in parts.stem.values()]
    found += [(p.data_ptr(), k) for k, w in enumerate(parts.layers) for p in w.values()]
    assert len(found) == len(owner) == len(list(model.parameters()))
    assert dict(found) == owner
    assert parts.head == {}
    assert not any("relative_attention_bias" in n for w in parts.layers for n in w)


def test_join_undoes_split(variant):
    model = hf_model(variant)
    weights = t5.once("m", dict(model.state_dict()))
    parts = t5.split(weights)
    e = model.config.num_layers
    stacks = {"encoder.block": parts.layers[:e], "decoder.block": parts.layers[e:]}
    again = join(parts.stem, stacks)
    assert again.keys() == weights.keys()
    assert all(again[name] is weights[name] for name in weights)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_a_stack_without_its_position_bias_is_not_assembled(t5s, stack):
    base = read_checkpoint(t5s["t5"][1][0])
    bias = f"{stack}.block.0.{t5_run.BIAS}"
    parts = t5.split({name: t for name, t in base.weights.items() if name != bias})
    with pytest.raises(InputError, match=re.escape(bias)):
        t5.T5(base.config).assemble(parts.stem, list(enumerate(parts.layers)), {})


def test_layers_are_in_numerical_order_whatever_the_order_of_the_file():
    names = [f"{s}.block.{k}.a" for s in ("decoder", "encoder") for k in (10, 2, 0, 9, 1)]
    names += [f"{s}.block.{k}.a" for s in ("decoder", "encoder") for k in (3, 11, 4, 5, 8, 7, 6)]
    weights = {name: torch.tensor(float(i)) for i, name in enumerate(names)}
    parts = t5.split(weights)
    for n, layer in enumerate(parts.layers):
        stack = "encoder" if n < 12 else "decoder"
        assert layer["a"] is weights[f"{stack}.block.{n % 12}.a"]


def test_a_gap_between_layers_is_refused():
    with pytest.raises(InputError, match=r"decoder\.block\.0"):
        t5.split({"encoder.block.0.a": torch.zeros(1), "decoder.block.1.a": torch.zeros(1)})


# ------------------------------------------------------------------- running against transformers


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_pieces_and_the_assembled_model_run_as_transformers_does(variant, path):
    model = hf_model(variant)
    family, parts = taken_apart(model)
    layers = [(k, parts.layers[k]) for k in numbered(model, path)]
    oracle = by_hand([model], *([(0, k) for k in stack] for stack in path))
    if path == ((0, 1), (0, 1)) and variant != "unequal":
        oracle = model
    expected = [reference(oracle, row) for row in ROWS]
    assert np.std(expected[1]) > 0.1  # choices are told apart
    found = run(
        family, parts.stem, layers, batch_of(ROWS, start=model.config.decoder_start_token_id)
    )
    check_rows(found, expected)
    whole = family.assemble(parts.stem, layers, {})
    assert type(whole) is T5ForConditionalGeneration
    assert (len(whole.encoder.block), len(whole.decoder.block)) == tuple(map(len, path))
    assert not whole.training
    check_rows(found[1:2], [reference(whole, ROWS[1])], ROWS[1:2])


def test_batches_with_padding_as_transformers_pads_them(variant):
    """Against one call of transformers with attention_mask, and labels that are shifted by itself."""
    model = hf_model(variant, 3)
    family, parts = taken_apart(model)
    batch = batch_of(ROWS, start=model.config.decoder_start_token_id)
    found = run(family, parts.stem, list(enumerate(parts.layers)), batch)
    for j in range(2):  # every row has two choices at least
        labels = batch.choices[:, j].masked_fill(batch.shares[:, j] == 0, -100)
        logits = model(
            input_ids=batch.ids, attention_mask=batch.mask.long(), labels=labels
        ).logits  # (n, T, vocabulary)
        loss = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        torch.testing.assert_close(found[:, j], -loss.sum(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mean", [False, True])
def test_a_batch_equals_its_rows_one_by_one(variant, mean):
    model = hf_model(variant, 4)
    family, parts = taken_apart(model)
    start, layers = model.config.decoder_start_token_id, list(enumerate(parts.layers))
    together = run(family, parts.stem, layers, batch_of(ROWS, start=start, mean=mean))
    check_rows(together, [reference(model, row, mean=mean) for row in ROWS])
    for i, row in enumerate(ROWS):
        alone = run(family, parts.stem, layers, batch_of([row], start=start, mean=mean))[0]
        torch.testing.assert_close(together[i, : len(alone)], alone, rtol=1e-5, atol=1e-5)


def test_what_stands_in_the_padding_changes_nothing():
    model = hf_model("buckets")
    family, parts = taken_apart(model)
    batch, layers = batch_of(ROWS), list(enumerate(parts.layers))
    other = batch._replace(
        ids=batch.ids.masked_fill(~batch.mask, 50),
        choices=batch.choices.masked_fill(batch.shares == 0, 60),
    )
    assert torch.equal(
        run(family, parts.stem, layers, batch), run(family, parts.stem, layers, other)
    )


# ------------------------------------------------------------------------------ our own attention


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def blocks(request, variant):
    """An encoder's and a decoder's block of transformers, and random tokens (n, tokens, width)."""
    model = hf_model(variant, 5).to(request.param)
    assert model.encoder.block[0].layer[0].SelfAttention.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    g = torch.Generator().manual_seed(1)
    tokens, memory = (torch.randn(3, n, 16, generator=g).to(request.param) for n in (7, 9))
    return model, tokens, memory


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_attention_of_an_encoder_is_transformers_to_the_bit(blocks, padded, batched):
    model, tokens, _ = blocks
    first, second = (b.layer[0].SelfAttention for b in model.encoder.block[:2])
    with torch.no_grad():
        bias = first.compute_bias(7, 7)  # (1, heads, 7, 7)
        if batched:
            bias = bias.repeat(3, 1, 1, 1)
        if padded:
            mask = torch.zeros(3, 1, 1, 7, dtype=tokens.dtype)
            mask[0, ..., 4:] = mask[2, ..., 6:] = torch.finfo(tokens.dtype).min
            bias = bias + mask
        for attention in (first, second):
            found = t5_run.attend(attention, tokens, tokens, bias)
            expected = attention(tokens, position_bias=bias)[0]
            assert torch.equal(found, expected)
            assert found.shape == (3, 7, 16)
            assert found.dtype == tokens.dtype
            if padded:  # a hidden token has no say
                other = tokens.clone()
                other[0, 4:] += 1
                assert torch.equal(
                    t5_run.attend(attention, other, other, bias)[0, :4], found[0, :4]
                )


def test_attention_of_a_decoder_is_transformers_to_the_bit(blocks):
    model, tokens, memory = blocks
    low = torch.finfo(tokens.dtype).min
    with torch.no_grad():
        for block in model.decoder.block:
            own, cross = block.layer[0].SelfAttention, block.layer[1].EncDecAttention
            bias = model.decoder.block[0].layer[0].SelfAttention.compute_bias(7, 7)
            bias = bias + torch.full((7, 7), low, dtype=tokens.dtype).triu(1)
            found = t5_run.attend(own, tokens, tokens, bias)
            assert torch.equal(found, own(tokens, position_bias=bias)[0])
            later = tokens.clone()
            later[:, 3:] += 1  # seen by no token before
            assert torch.equal(t5_run.attend(own, later, later, bias)[:, :3], found[:, :3])
            mask = torch.zeros(3, 1, 1, 9, dtype=tokens.dtype)
            mask[1, ..., 5:] = low
            found = t5_run.attend(cross, tokens, memory, mask)
            expected = cross(tokens, key_value_states=memory, position_bias=mask)[0]
            assert torch.equal(found, expected)
            none = torch.zeros(1, 1, 1, 9, dtype=tokens.dtype)
            expected = cross(tokens, key_value_states=memory)[0]
            assert torch.equal(t5_run.attend(cross, tokens, memory, none), expected)


def test_attention_leaves_its_arguments_alone(blocks):
    model, tokens, memory = blocks
    attention = model.decoder.block[0].layer[1].EncDecAttention
    bias = torch.randn(3, 3, 7, 9).to(tokens.dtype)
    before = [x.clone() for x in (tokens, memory, bias)]
    with torch.no_grad():
        t5_run.attend(attention, tokens, memory, bias)
    assert all(torch.equal(a, b) for a, b in zip((tokens, memory, bias), before, strict=True))


def test_half_precision_is_near(variant):
    """bfloat16 has 8 bits: log-probabilities of about 10 are off by some hundredths of them."""
    model = hf_model(variant, 6)
    for parameter in model.parameters():
        parameter *= 0.5  # answers of trained models are no sums of such large numbers
    family, parts = taken_apart(model)
    layers, batch = list(enumerate(parts.layers)), batch_of(ROWS)
    expected = run(family, parts.stem, layers, batch)
    stem = family.stem(parts.stem).to(torch.bfloat16)
    state = family.embed(stem, family.place(batch, "cpu", torch.bfloat16))
    with torch.no_grad():
        for k, weights in layers:
            layer = copy.deepcopy(family.layer(k, weights)).to(torch.bfloat16)
            state = (family.apply if k < len(layers) - 1 else family.apply_last)(layer, state)
            assert state.encoded.dtype == state.bias.dtype == torch.bfloat16
        found = family.logits(stem, state, {})
    assert found.dtype == torch.float32  # of the sums over tokens
    there = expected.isfinite()
    assert (found[~there] == -torch.inf).all()
    assert not torch.equal(found[there], expected[there])
    torch.testing.assert_close(found[there], expected[there], rtol=0.05, atol=0.3)


def test_a_state_tells_all_the_memory_that_it_holds(variant):
    family, parts = taken_apart(hf_model(variant))
    state = family.embed(family.stem(parts.stem), batch_of(ROWS))
    for k, weights in enumerate(parts.layers):
        values = [getattr(state, f.name) for f in dataclasses.fields(state) if f.name != "stem"]
        held = [t for v in values if v is not None for t in (v if isinstance(v, tuple) else [v])]
        told = family.tensors(state)
        assert {t.data_ptr() for t in told} == {t.data_ptr() for t in held}
        state = family.apply(family.layer(k, weights), state)
    assert state.decoded is not None


def test_the_widest_tensor_of_a_layer_by_hand():
    """In numbers per example: S input tokens, C choices of T tokens."""
    family, parts = taken_apart(hf_model())
    stem = family.stem(parts.stem)
    by_hand = {
        (7, 2, 3): 7 * 24,  # S d_ff
        (100, 2, 3): 3 * 100 * 100,  # heads S S
        (2, 9, 2): 18 * 24,  # C T d_ff
        (40, 4, 30): 3 * 120 * 40,  # heads C T S
        (2, 4, 30): 3 * 120 * 30,  # heads C T T
    }
    for (s, c, t), widest in by_hand.items():
        ids, choices = torch.zeros(4, s, dtype=torch.long), torch.zeros(4, c, t, dtype=torch.long)
        batch = TextBatch(ids, ids == 0, choices, choices, torch.ones(4, c, t))
        assert family.widest(family.embed(stem, batch)) == widest


def test_few_logits_at_once_change_nothing(monkeypatch):
    family, parts = taken_apart(hf_model("v1.1"))
    layers = list(enumerate(parts.layers))
    expected = run(family, parts.stem, layers, batch_of(ROWS))
    monkeypatch.setattr(t5_run, "LOGITS", 1)  # one row at a time
    torch.testing.assert_close(run(family, parts.stem, layers, batch_of(ROWS)), expected)


def test_no_gradient_is_ever_enabled():
    model = hf_model().requires_grad_(True)
    family, parts = taken_apart(model)
    with torch.enable_grad():
        stem = family.stem(parts.stem)
        modules = [stem] + [family.layer(k, w) for k, w in enumerate(parts.layers)]
        state = family.embed(stem, batch_of(ROWS))
        for layer in modules[1:]:
            state = family.apply(layer, state)
        whole = family.assemble(parts.stem, list(enumerate(parts.layers)), {})
        assert not family.logits(stem, state, {}).requires_grad
    for module in [*modules, whole]:
        assert not any(p.requires_grad for p in module.parameters())
        assert not any(m.training for m in module.modules())


def test_a_layer_holds_the_weights_themselves():
    family, parts = taken_apart(hf_model())
    layer = family.layer(3, parts.layers[3])
    own = {p.data_ptr() for p in layer.parameters()}
    assert own == {w.data_ptr() for w in parts.layers[3].values()}


@pytest.mark.parametrize("order", [(2, 0), (0, 2, 1, 3), (0, 1, 2, 3, 0)])
def test_an_encoder_block_behind_a_decoder_block_is_refused(order):
    family, parts = taken_apart(hf_model())
    layers = [(k, parts.layers[k]) for k in order]
    with pytest.raises(InputError, match=r"encoder blocks .*before decoder blocks"):
        family.assemble(parts.stem, layers, {})
    with pytest.raises(InputError, match="encoder blocks before decoder blocks"):
        run(family, parts.stem, layers, batch_of(ROWS))


# ------------------------------------------------------------------------------------- the export


# Steps by expert and block of each stack; 0 is expert one, 1 is expert two.
STEPS = {
    "whole": ([(0, 0), (1, 1)], [(1, 0), (0, 1)]),
    "repeated": ([(0, 0), (0, 0), (1, 1)], [(1, 0), (1, 0), (0, 0), (0, 1), (0, 1)]),
    "skipped": ([(1, 1)], [(0, 1)]),
    "as deep": ([(0, 0), (0, 1), (0, 1)], [(1, 0), (0, 1), (0, 1)]),
    "no encoder": ([], [(0, 0), (1, 0)]),
    "no decoder": ([(0, 1), (1, 1)], []),
}


def steps_of(pool, encoder, decoder) -> list[Step]:
    border = pool.stacks[1].start
    steps = [Step(pool.names[m], k) for m, k in encoder]
    return steps + [Step(pool.names[m], border + k) for m, k in decoder]


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("variant", ["t5", "v1.1", "unequal"])
def test_a_saved_path_is_loaded_by_transformers(t5s, tmp_path, variant, steps):
    pool = pool_of(t5s, variant)
    path = LayerPath.of(pool, steps_of(pool, *steps), "two")
    folder = path.save_pretrained(tmp_path / "merged", pool)
    assert {p.name for p in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_layers"], config["num_decoder_layers"]) == tuple(map(len, steps))
    assert config["model_type"] == "t5"
    assert LayerPath.from_json(json.dumps(config["rmm_lab"]["path"])) == path
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    assert type(model) is T5ForConditionalGeneration
    assert (len(model.encoder.block), len(model.decoder.block)) == tuple(map(len, steps))
    one, two = t5s[variant][0][1:]
    expected = by_hand([one, two], *steps, stem=two)
    close(logits_of(model), logits_of(expected))
    same = T5ForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    assert torch.equal(logits_of(path.build()), logits_of(same))  # by the same way of attention
    names = set(load_file(folder / "model.safetensors"))
    assert names & set(COPIES) == ({"lm_head.weight"} if variant == "v1.1" else set())


@pytest.mark.parametrize("name", ["whole", "repeated", "as deep", "skipped", "no encoder"])
def test_the_cache_of_a_reloaded_model_changes_nothing(t5s, tmp_path, name):
    """Token by token with transformers' cache equals all at once without; generate agrees."""
    pool = pool_of(t5s, "unequal")
    path = LayerPath.of(pool, steps_of(pool, *STEPS[name]), "one")
    folder = path.save_pretrained(tmp_path / "merged", pool)
    model = T5ForConditionalGeneration.from_pretrained(folder).eval()
    ids, tokens = torch.tensor([ROWS[1][0]]), torch.tensor([[0, 45, 31, 8, 99, 17]])
    with torch.no_grad():
        whole = model(input_ids=ids, decoder_input_ids=tokens, use_cache=False).logits
        past, found = None, []
        encoded = model.encoder(input_ids=ids)
        for p in range(tokens.shape[1]):
            out = model(
                encoder_outputs=encoded,
                decoder_input_ids=tokens[:, p : p + 1],
                past_key_values=past,
                use_cache=True,
            )
            past = out.past_key_values
            found.append(out.logits)
        torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-5)
        # Greedy, by hand from whole forwards.
        greedy = [0]
        while len(greedy) < 9 and greedy[-1] != 1:
            logits = model(
                input_ids=ids, decoder_input_ids=torch.tensor([greedy]), use_cache=False
            ).logits
            greedy.append(int(logits[0, -1].argmax()))
    options = [{}, {"use_cache": False}]
    if not 0 < len(STEPS[name][0]) < len(STEPS[name][1]):
        # In some releases of transformers, generate's cache has no room for a deeper decoder;
        # without any option it must work nevertheless.
        options.append({"use_cache": True})
    for more in options:
        made = model.generate(ids, max_new_tokens=8, do_sample=False, num_beams=1, **more)
        assert made[0].tolist() == greedy


def test_generate_runs_without_a_decoder_block(t5s, tmp_path):
    pool = pool_of(t5s)
    folder = LayerPath.of(pool, [Step("one", 0)], "base").save_pretrained(tmp_path / "merged", pool)
    model = T5ForConditionalGeneration.from_pretrained(folder)
    assert (
        model.generate(torch.tensor([ROWS[0][0]]), max_new_tokens=3, use_cache=False).shape[0] == 1
    )


@pytest.mark.parametrize("variant", ["t5", "v1.1"])
def test_a_saved_model_is_a_checkpoint_again(t5s, tmp_path, variant):
    """Read back it has the weights it was built from, and it can be merged again."""
    pool = pool_of(t5s, variant)
    path = LayerPath.of(pool, steps_of(pool, *STEPS["repeated"]), "ties")
    folder = path.save_pretrained(tmp_path / "a", pool)
    again = read_checkpoint(folder)
    parts = t5.split(again.weights)
    assert parts.stacks == (range(3), range(3, 8))
    for layer, step in zip(parts.layers, path.steps, strict=True):
        expected = pool.weights(*step)
        assert layer.keys() == expected.keys()
        assert all(torch.equal(layer[n], expected[n]) for n in expected)
    stem = pool.weights("ties", -1)
    assert parts.stem.keys() == stem.keys()
    assert all(torch.equal(parts.stem[n], stem[n]) for n in stem)
    t5.input_format(again)
    other = LayerPath.of(pool, path.steps, "one").save_pretrained(tmp_path / "b", pool)
    second = LayerPool(again, [again, read_checkpoint(other)], ("a", "b"), ("weight_average",))
    third = LayerPath.of(second, [Step("a", 4), Step("b", 7)], "weight_average")
    model = T5ForConditionalGeneration.from_pretrained(
        third.save_pretrained(tmp_path / "c", second)
    )
    name = "layer.2.DenseReluDense.wo.weight"
    assert torch.equal(model.decoder.block[1].get_parameter(name), parts.layers[7][name])
    mean = (stem["shared.weight"] + pool.weights("one", -1)["shared.weight"]) / 2
    torch.testing.assert_close(model.shared.weight.detach(), mean)


def test_a_repeated_layer_is_a_copy(t5s, tmp_path):
    pool = pool_of(t5s)
    path = LayerPath.of(pool, steps_of(pool, *STEPS["repeated"]), "one")
    model = path.build(pool)
    starts = [p.data_ptr() for p in model.parameters()]
    assert len(set(starts)) == len(starts)
    before = {n: p.clone() for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.add_(1.0)
    assert all(torch.equal(p, before[n] + 1) for n, p in model.named_parameters())
    # and a built model may be changed without changing the pool
    again = path.build(pool)
    assert all(torch.equal(p, before[n]) for n, p in again.named_parameters())
    # blocks know their number in this model
    numbers = [b.layer[0].SelfAttention.layer_idx for b in model.decoder.block]
    assert numbers == [0, 1, 2, 3, 4]


def test_the_tokenizer_lies_beside_the_weights(t5s, tmp_path):
    pool = pool_of(t5s)
    folder = LayerPath.of(pool, [Step("two", 0)], "base").save_pretrained(tmp_path / "merged", pool)
    sentence = "w9 yes w50 unheard no"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer(sentence).input_ids == [9 + 0, 4, 50, 2, 3, 1]  # WORDS[i] is number i + 3
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        own = (t5s["t5"][1][0] / name).read_bytes()
        assert (folder / name).read_bytes() == own


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision_are_exported_in_full(t5s, tmp_path, dtype):
    """Merging is in float32; a reloaded model must compute what was scored."""
    folders = [
        write_t5(tmp_path / str(i), copy.deepcopy(m).to(dtype)) for i, m in enumerate(t5s["t5"][0])
    ]
    base, *experts = map(read_checkpoint, folders)
    assert all(w.dtype == torch.float32 for w in base.weights.values())
    pool = LayerPool(base, experts, ("one", "two"), ("weight_average",))
    path = LayerPath.of(pool, [Step("weight_average", k) for k in range(4)], "weight_average")
    folder = path.save_pretrained(tmp_path / "merged", pool)
    model = T5ForConditionalGeneration.from_pretrained(folder)
    close(logits_of(model), logits_of(path.build(pool)))


def test_a_config_of_an_earlier_transformers_is_kept(t5s, tmp_path):
    """v1.1's files said that they are untied by tie_word_embeddings; now scale_decoder_outputs is."""
    folders = []
    for folder in t5s["v1.1"][1]:
        folders.append(shutil.copytree(folder, tmp_path / folder.name))
        config = json.loads((folders[-1] / "config.json").read_text())
        del config["scale_decoder_outputs"], config["dense_act_fn"], config["is_gated_act"]
        config["tie_word_embeddings"] = False
        (folders[-1] / "config.json").write_text(json.dumps(config))
    base, *experts = map(read_checkpoint, folders)
    pool = LayerPool(base, experts, ("one", "two"))
    path = LayerPath.of(pool, steps_of(pool, *STEPS["whole"]), "one")
    folder = path.save_pretrained(tmp_path / "merged", pool)
    model = T5ForConditionalGeneration.from_pretrained(folder)
    one, two = t5s["v1.1"][0][1:]
    expected = by_hand([one, two], *STEPS["whole"], stem=one)
    close(logits_of(model), logits_of(expected))
    layers = [(step.layer, pool.weights(*step)) for step in path.steps]
    found = run(pool.architecture, pool.weights("one", -1), layers, batch_of(ROWS))
    check_rows(found, [reference(expected, row) for row in ROWS])


# ------------------------------------------------------------- stem: tied embeddings, biases


def with_copies(folder: Path, out: Path, *names: str) -> Path:
    """The same model with the shared embeddings stored under more names."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    for name in names:
        tensors[name] = tensors["shared.weight"].clone()
    save_file(tensors, out / "model.safetensors")
    return out


def test_tied_embeddings_are_counted_once(t5s, tmp_path):
    """Files with three copies more, or without, make the same pool; the stem has each number once."""
    clean = pool_of(t5s)
    folders = [with_copies(f, tmp_path / f.name, *COPIES) for f in t5s["t5"][1]]
    base, *experts = map(read_checkpoint, folders)
    pool = LayerPool(base, experts, ("one", "two"), ("weight_average", "ties"))
    vocabulary, width, heads, buckets = 104, 16, 3, 32
    expected = vocabulary * width + 2 * heads * buckets + 2 * width
    for source in ("base", "one", "ties", "weight_average"):
        found, own = pool.weights(source, -1), clean.weights(source, -1)
        assert sum(w.numel() for w in found.values()) == expected
        assert found.keys() == own.keys()
        assert all(torch.equal(found[n], own[n]) for n in own)
    # a base with copies and experts without are of one architecture too
    mixed = LayerPool(base, clean.experts, ("one", "two"), ("ties",))
    assert torch.equal(
        mixed.weights("ties", -1)["shared.weight"], clean.weights("ties", -1)["shared.weight"]
    )
    folder = LayerPath.of(pool, [Step("one", 0)], "ties").save_pretrained(tmp_path / "merged", pool)
    assert not set(load_file(folder / "model.safetensors")) & set(COPIES)


def test_embeddings_under_the_encoders_name_only(t5s, tmp_path):
    folder = shutil.copytree(t5s["t5"][1][0], tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    own = tensors.pop("shared.weight")
    save_file(tensors | {"encoder.embed_tokens.weight": own}, folder / "model.safetensors")
    found = read_checkpoint(folder).weights
    assert torch.equal(found["shared.weight"], own)
    assert not set(found) & set(COPIES)


@pytest.mark.parametrize("scope", ["layer", "tensor", "global"])
def test_the_order_of_an_experts_tensors_changes_nothing(t5s, scope):
    base, *experts = map(read_checkpoint, t5s["v1.1"][1])
    turned = dataclasses.replace(experts[1], weights=dict(reversed(experts[1].weights.items())))
    pools = [
        LayerPool(base, [experts[0], e], ("one", "two"), ("ties",), scope=scope)
        for e in (experts[1], turned)
    ]
    for k in range(-1, 4):
        own, found = (pool.weights("ties", k) for pool in pools)
        assert own.keys() == found.keys()
        assert all(torch.equal(own[n], found[n]) for n in own)


def test_an_untied_head_is_merged_as_a_tensor_of_its_own(t5s, tmp_path):
    pool = pool_of(t5s, "v1.1")
    _, one, two = t5s["v1.1"][0]
    found = pool.weights("weight_average", -1)
    torch.testing.assert_close(
        found["lm_head.weight"], (one.lm_head.weight + two.lm_head.weight) / 2
    )
    torch.testing.assert_close(found["shared.weight"], (one.shared.weight + two.shared.weight) / 2)
    assert not torch.equal(found["lm_head.weight"], found["shared.weight"])
    path = LayerPath.of(pool, [], "weight_average")
    model = T5ForConditionalGeneration.from_pretrained(path.save_pretrained(tmp_path / "m", pool))
    assert torch.equal(model.lm_head.weight, found["lm_head.weight"])
    assert torch.equal(model.shared.weight, found["shared.weight"])
    assert torch.equal(model.encoder.embed_tokens.weight, found["shared.weight"])


@pytest.mark.parametrize("stem", ["base", "one", "two", "weight_average"])
def test_position_biases_are_the_stems(t5s, tmp_path, stem):
    """Whoever gives block 0, or if none does."""
    pool = pool_of(t5s)
    base, one, two = t5s["t5"][0]
    average = [(one.get_parameter(n) + two.get_parameter(n)) / 2 for n in BIASES]
    models = {"base": base, "one": one, "two": two}
    expected = [models[stem].get_parameter(n) for n in BIASES] if stem in models else average
    for i, text in enumerate(("one@0 one@2", "one@1 two@1 one@3", "two@0 two@2")):
        for k in range(pool.n_layers):
            assert not any("relative" in n for n in pool.weights("one", k))
        path = LayerPath.of(pool, parse_path(text), stem)
        folder = path.save_pretrained(tmp_path / str(i), pool)
        tensors = load_file(folder / "model.safetensors")
        for name, bias in zip(BIASES, expected, strict=True):
            torch.testing.assert_close(tensors[name], bias)
        assert sum("relative" in n for n in tensors) == 2


def test_an_old_files_unused_bias_of_cross_attention_is_left_out(t5s, tmp_path):
    """The first T5s' files have it; transformers ignores it since cross-attention has no positions."""
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    assert unused in T5ForConditionalGeneration._keys_to_ignore_on_load_unexpected
    folders = []
    for folder in t5s["t5"][1]:
        folders.append(shutil.copytree(folder, tmp_path / folder.name))
        file = folders[-1] / "model.safetensors"
        save_file(load_file(file) | {unused: torch.ones(32, 3)}, file)
    base, *experts = map(read_checkpoint, folders)
    pool = LayerPool(base, experts, ("one", "two"), ("ties",))
    path = LayerPath.of(pool, steps_of(pool, *STEPS["whole"]), "two")
    folder = path.save_pretrained(tmp_path / "merged", pool)
    one, two = t5s["t5"][0][1:]
    expected = by_hand([one, two], *STEPS["whole"], stem=two)
    model = T5ForConditionalGeneration.from_pretrained(folder)
    close(logits_of(model), logits_of(expected))
