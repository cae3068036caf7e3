"""T5s taken apart, merged, scored and written, with transformers' own models and files as the oracle."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import write_images, write_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sklearn.metrics import balanced_accuracy_score
from test_bad_input import refused
from test_scoring import STEM, check_cache, check_that_nothing_changes_a_bit, reachable
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from rmm_lab import ppo
from rmm_lab.engine.scorer import answers, answers_of_path, batch_size, evaluate
from rmm_lab.env import MergingEnv
from rmm_lab.errors import InputError, one_sentence
from rmm_lab.families import t5
from rmm_lab.families.checkpoint import architecture, read_checkpoint
from rmm_lab.families.t5 import T5, TextBatch
from rmm_lab.layers import LayerPool
from rmm_lab.path import LayerPath
from rmm_lab.search.problem import load_problem
from rmm_lab.tasks.text_task import TextFormat, TextTask

REAL = Path(__file__).parents[2] / "shared" / "data" / "t5_tokenizer"
BIAS = "layer.0.SelfAttention.relative_attention_bias.weight"
BIASES = [f"{stack}.block.0.{BIAS}" for stack in ("encoder", "decoder")]
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
TINY = {
    "vocab_size": 104,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 3,  # heads times d_kv is not the width
    "decoder_start_token_id": 0,
    "n_positions": 24,
}
VARIANTS = {
    "t5": {},
    "v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "unequal": {"num_layers": 3, "layer_norm_epsilon": 1e-3},
    "buckets": {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 6},
    "start": {"decoder_start_token_id": 7, "feed_forward_proj": "gated-silu"},
}
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


# ------------------------------------------------------------- models, made without code of ours


def hf_model(variant: str = "t5", seed: int = 0, **more) -> T5ForConditionalGeneration:
    """A transformers model, every parameter of which is random and makes a difference."""
    args = TINY | VARIANTS[variant] | more
    model = T5ForConditionalGeneration(T5Config(**args)).eval().requires_grad_(False)
    if args.get("tie_word_embeddings") is False:
        model.lm_head.weight = nn.Parameter(model.shared.weight.clone(), requires_grad=False)
    g = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        scale = 1.0 if "shared" in name or "bias" in name or "lm_head" in name else 0.3
        parameter.copy_(scale * torch.randn(parameter.shape, generator=g))
        parameter += "layer_norm" in name
    return model


def tuned(model: T5ForConditionalGeneration, seed: int) -> T5ForConditionalGeneration:
    """A copy that has moved away from the model in every parameter."""
    model, g = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter += 0.3 * torch.randn(parameter.shape, generator=g)
    return model


def by_hand(models, encoder, decoder, stem=None) -> T5ForConditionalGeneration:
    """A transformers model whose blocks are copied tensor by tensor: (model, block) of each place."""
    stem = models[0] if stem is None else stem
    args = {k: v for k, v in stem.config.to_dict().items() if k not in ("dtype", "num_layers")}
    args |= {"num_layers": len(encoder), "num_decoder_layers": len(decoder)}
    own = T5ForConditionalGeneration(T5Config(**args)).eval().requires_grad_(False)
    own.config.scale_decoder_outputs = stem.config.scale_decoder_outputs
    if stem.lm_head.weight is not stem.shared.weight:
        own.lm_head.weight = nn.Parameter(own.lm_head.weight.clone(), requires_grad=False)
    for name, parameter in own.named_parameters():
        source = stem
        match = re.fullmatch(r"(encoder|decoder)\.block\.(\d+)\.(.+)", name)
        if match and match[3] != BIAS:
            m, k = {"encoder": encoder, "decoder": decoder}[match[1]][int(match[2])]
            source, name = models[m], f"{match[1]}.block.{k}.{match[3]}"
        parameter.copy_(source.get_parameter(name))
    return own


def reference(model, row, *, mean: bool = False) -> list[float]:
    """The log-probability of each choice: one choice at a time, no padding, no cache."""
    ids, choices = row
    out, encoded = [], model.encoder(input_ids=torch.tensor([ids]))
    for choice in choices:
        shifted = [model.config.decoder_start_token_id, *choice[:-1]]
        logits = model(
            encoder_outputs=encoded,
            decoder_input_ids=torch.tensor([shifted]),
            use_cache=False,
        ).logits[0]  # (T, vocabulary)
        found = logits.log_softmax(-1)[range(len(choice)), choice]
        out.append(float(found.mean() if mean else found.sum()))
    return out


# Inputs of 6 to 11 tokens, 2 to 4 choices of 1 to 5 tokens, each with the end token.
ROWS = [
    ([12, 30, 7, 55, 9, 1], [[40, 1], [8, 33, 71, 1]]),
    ([3, 3, 90, 41, 22, 17, 60, 61, 5, 88, 1], [[5, 1], [6, 1], [9, 10, 11, 12, 1], [1]]),
    ([99, 4, 71, 12, 50, 1], [[20, 21, 1], [20, 22, 1], [23, 1]]),
]


def batch_of(rows, *, start: int = 0, mean: bool = False) -> TextBatch:
    """Padded with zeros at the right, entry by entry."""
    n, s = len(rows), max(len(ids) for ids, _ in rows)
    c = max(len(choices) for _, choices in rows)
    t = max(len(y) for _, choices in rows for y in choices)
    ids, mask = torch.zeros(n, s, dtype=torch.long), torch.zeros(n, s, dtype=torch.bool)
    choices, shifted = (torch.zeros(n, c, t, dtype=torch.long) for _ in range(2))
    shares = torch.zeros(n, c, t)
    for i, (x, ys) in enumerate(rows):
        for p, token in enumerate(x):
            ids[i, p], mask[i, p] = token, True
        for j, y in enumerate(ys):
            for p, token in enumerate(y):
                choices[i, j, p] = token
                shifted[i, j, p] = start if p == 0 else y[p - 1]
                shares[i, j, p] = 1 / len(y) if mean else 1
    return TextBatch(ids, mask, choices, shifted, shares)


def taken_apart(model):
    """What runs the model in pieces, and its parts, from transformers' own files' content."""
    config = model.config.to_dict()
    family = architecture(config)
    return family, t5.split(t5.canonical("m", config, dict(model.state_dict())))


def run(family: T5, stem, layers, batch) -> torch.Tensor:
    """Log-probabilities (n, C) piece by piece; layers: (number, weights)."""
    stem = family.stem(stem)
    with torch.no_grad():
        state = family.embed(stem, batch)
        for k, weights in layers:
            state = family.apply(family.layer(k, weights), state)
        return family.logits(stem, state, {})


def numbered(model, path) -> list[int]:
    return [*path[0], *(model.config.num_layers + k for k in path[1])]


def check_rows(found, expected, rows=ROWS, tolerance: float = 1e-4) -> None:
    """found: (n, C); expected: a list for each row. Choices that a row lacks are -inf."""
    for i, ((_, choices), values) in enumerate(zip(rows, expected, strict=True)):
        n = len(choices)
        assert found[i, :n].tolist() == pytest.approx(values, rel=tolerance, abs=tolerance)
        assert (found[i, n:] == -torch.inf).all()
        assert found[i].argmax() == np.argmax(values)


@pytest.fixture(autouse=True, scope="module")
def _no_progress_bars():
    """transformers draws them on stderr, where our errors are looked for."""
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


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
    again = t5.join(parts.stem, parts.layers[:e], parts.layers[e:])
    assert again.keys() == weights.keys()
    assert all(again[name] is weights[name] for name in weights)


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


def test_every_piece_of_an_answer_matters():
    """The comparison would notice it: each input token, block, bias and special token has a say."""
    model = hf_model("start")
    ids, choices = ROWS[1]
    own = reference(model, ROWS[1])
    differs = [reference(model, ([*ids[:p], 77, *ids[p + 1 :]], choices)) for p in range(len(ids))]
    for name, _ in list(model.named_parameters()):
        other = copy.deepcopy(model)
        other.get_parameter(name).mul_(0.5)
        differs.append(reference(other, ROWS[1]))
    other = copy.deepcopy(model)
    other.config.decoder_start_token_id = 0
    differs.append(reference(other, ROWS[1]))
    for values in differs:
        assert np.abs(np.subtract(values, own)).max() > 1e-3


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
            found = t5._attend(attention, tokens, tokens, bias)
            expected = attention(tokens, position_bias=bias)[0]
            assert torch.equal(found, expected)
            assert found.shape == (3, 7, 16)
            assert found.dtype == tokens.dtype
            if padded:  # a hidden token has no say
                other = tokens.clone()
                other[0, 4:] += 1
                assert torch.equal(t5._attend(attention, other, other, bias)[0, :4], found[0, :4])


def test_attention_of_a_decoder_is_transformers_to_the_bit(blocks):
    model, tokens, memory = blocks
    low = torch.finfo(tokens.dtype).min
    with torch.no_grad():
        for block in model.decoder.block:
            own, cross = block.layer[0].SelfAttention, block.layer[1].EncDecAttention
            bias = model.decoder.block[0].layer[0].SelfAttention.compute_bias(7, 7)
            bias = bias + torch.full((7, 7), low, dtype=tokens.dtype).triu(1)
            found = t5._attend(own, tokens, tokens, bias)
            assert torch.equal(found, own(tokens, position_bias=bias)[0])
            later = tokens.clone()
            later[:, 3:] += 1  # seen by no token before
            assert torch.equal(t5._attend(own, later, later, bias)[:, :3], found[:, :3])
            mask = torch.zeros(3, 1, 1, 9, dtype=tokens.dtype)
            mask[1, ..., 5:] = low
            found = t5._attend(cross, tokens, memory, mask)
            expected = cross(tokens, key_value_states=memory, position_bias=mask)[0]
            assert torch.equal(found, expected)
            none = torch.zeros(1, 1, 1, 9, dtype=tokens.dtype)
            expected = cross(tokens, key_value_states=memory)[0]
            assert torch.equal(t5._attend(cross, tokens, memory, none), expected)


def test_attention_leaves_its_arguments_alone(blocks):
    model, tokens, memory = blocks
    attention = model.decoder.block[0].layer[1].EncDecAttention
    bias = torch.randn(3, 3, 7, 9).to(tokens.dtype)
    before = [x.clone() for x in (tokens, memory, bias)]
    with torch.no_grad():
        t5._attend(attention, tokens, memory, bias)
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
    model = hf_model(variant)
    family, parts = taken_apart(model)
    batch = batch_of(ROWS)
    state = family.embed(family.stem(parts.stem), batch)
    fields = [f.name for f in dataclasses.fields(state)]
    shared = reachable(batch)
    for k, weights in enumerate(parts.layers):
        told = {t.untyped_storage().data_ptr() for t in family.tensors(state)}
        assert told == set(reachable([getattr(state, name) for name in fields]))
        assert told >= set(shared)
        state = family.apply(family.layer(k, weights), state)
    assert state.decoded is not None
    assert family.tensors(state) == state.tensors


def test_scores_of_half_precision_and_of_a_gpu(t5s):
    problem = problem_of(t5s)
    options = [{"precision": "bfloat16"}]
    if torch.cuda.is_available():
        options += [{"device": "cuda"}, {"device": "cuda", "precision": "bfloat16"}]
    for more in options:
        scorer = problem.scorer(fraction=0.5, **more)
        for path in SCORED:
            scores = scorer.score(path, 0)
            assert ((scores >= 0) & (scores <= 1)).all()
        check_cache(scorer.cache)
    plain, gpu = problem.scorer(fraction=0.5), problem.scorer(fraction=0.5, **options[-1])
    assert plain.score(SCORED[0], 0) == pytest.approx(gpu.score(SCORED[0], 0), abs=0.35)


def test_the_batches_size_by_hand(t5s):
    """The widest of a layer's tensors, in numbers per example, at the sample's lengths."""
    problem = problem_of(t5s)
    family, stem = problem.pool.architecture, problem.pool.stem("base")
    by_hand = {
        (7, 2, 3): 7 * 24,  # S d_ff
        (100, 2, 3): 3 * 100 * 100,  # heads S S
        (2, 9, 2): 18 * 24,  # C T d_ff
        (40, 4, 30): 3 * 120 * 40,  # heads C T S
        (2, 4, 30): 3 * 120 * 30,  # heads C T T
    }
    for (s, c, t), widest in by_hand.items():
        ids = torch.zeros(4, s, dtype=torch.long)
        choices = torch.zeros(4, c, t, dtype=torch.long)
        given = TextBatch(ids, ids == 0, choices, choices, torch.ones(4, c, t))
        assert family.widest(family.embed(stem, given)) == widest

        class Given:
            def split(self, name):
                return range(1000)

            def batch(self, name, rows, given=given):
                assert len(rows) <= 32
                return given

        size = max(32, min(256, 2**20 // widest))
        assert batch_size(family, stem, Given(), "reward") == size
    assert 2**20 // (3 * 100 * 100) == 34  # so that one of them lies between the bounds


def test_few_logits_at_once_change_nothing(monkeypatch):
    family, parts = taken_apart(hf_model("v1.1"))
    layers = list(enumerate(parts.layers))
    expected = run(family, parts.stem, layers, batch_of(ROWS))
    monkeypatch.setattr(t5, "_LOGITS", 1)  # one row at a time
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


# ----------------------------------------------------------------- folders: models, texts, a pool


WORDS = ["no", "yes", *(f"w{i}" for i in range(5, 98))]


def write_tokenizer(folder: Path, words=WORDS) -> None:
    """Words between blanks; <pad> 0, </s> 1 and <unk> 2; transformers' own adds </s>."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.enable_truncation(4)  # files of others come with such settings; ours must not care
    tokenizer.enable_padding(length=30)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings_of = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": {"content": "</s>", "__type": "AddedToken"},
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings_of))


def write_t5(folder: Path, model, *, tokenizer: bool = True) -> Path:
    """As transformers writes it, and the tokenizer."""
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if tokenizer:
        write_tokenizer(folder)
    return folder


def text(rng, low: int, high: int) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(low, high)))


def write_texts(folder: Path, seed: int, *, fixed: bool, n: int = 12) -> Path:
    """Rows in three splits: with the choices no and yes, mostly no; or with choices of their own."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for split in ("train", "reward", "test"):
        lines = []
        for i in range(n):
            choices = ["no", "yes"]
            while not fixed and (len(set(choices)) < 3 or choices[0] == "no"):
                choices = [text(rng, 1, 5) for _ in range(2 + i % 3)]
                choices += [f"{choices[0]} w7"] if len(choices) == 2 else []
            label = int(i % 4 == 0) if fixed else int(rng.integers(len(choices)))
            lines.append({"input": text(rng, 3, 9), "choices": choices, "label": label})
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="session")
def t5s(tmp_path_factory) -> dict:
    """For some variants the models and their folders: a base and two experts; two tasks."""
    root = tmp_path_factory.mktemp("t5s")
    out = {"texts": [write_texts(root / "own", 1, fixed=False)]}
    out["texts"].append(write_texts(root / "noyes", 2, fixed=True))
    for variant in ("t5", "v1.1", "unequal"):
        base = hf_model(variant, 1)
        models = [base, tuned(base, 2), tuned(base, 3)]
        folders = [
            write_t5(root / variant / name, model, tokenizer=name != "two")
            for name, model in zip(("base", "one", "two"), models, strict=True)
        ]
        out[variant] = (models, folders)
    return out


def pool_of(t5s, variant="t5", operators=("weight_average", "ties")) -> LayerPool:
    base, *experts = map(read_checkpoint, t5s[variant][1])
    return LayerPool(base, experts, ("one", "two"), operators)


def problem_of(t5s, variant="t5", stem="one", **options):
    base, *experts = map(str, t5s[variant][1])
    return load_problem(
        experts,
        base=base,
        texts=list(map(str, t5s["texts"])),
        operators=("weight_average", "ties"),
        stem=stem,
        **options,
    )


def rows_of(folder: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


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


def steps_of(pool, encoder, decoder) -> list[tuple[str, int]]:
    border = pool.stacks[1].start
    return [(pool.names[m], k) for m, k in encoder] + [
        (pool.names[m], border + k) for m, k in decoder
    ]


def logits_of(model, rows=ROWS) -> torch.Tensor:
    """Teacher-forced, padded, no cache: (n, T, vocabulary)."""
    batch = batch_of(rows, start=model.config.decoder_start_token_id)
    with torch.no_grad():
        return model(
            input_ids=batch.ids,
            attention_mask=batch.mask.long(),
            decoder_input_ids=batch.shifted[:, 1],
            use_cache=False,
        ).logits


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the order of sums in float32; logits are about 1 to 10."""
    assert found.dtype == expected.dtype == torch.float32
    assert expected.std() > 0.3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-4)


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
    folder = LayerPath.of(pool, [("one", 0)], "base").save_pretrained(tmp_path / "merged", pool)
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
    for layer, (source, k) in zip(parts.layers, path.steps, strict=True):
        expected = pool.layer_weights(source, k)
        assert layer.keys() == expected.keys()
        assert all(torch.equal(layer[n], expected[n]) for n in expected)
    stem = pool.stem_weights("ties")
    assert parts.stem.keys() == stem.keys()
    assert all(torch.equal(parts.stem[n], stem[n]) for n in stem)
    TextFormat.of(again)
    other = LayerPath.of(pool, path.steps, "one").save_pretrained(tmp_path / "b", pool)
    second = LayerPool(again, [again, read_checkpoint(other)], ("a", "b"), ("weight_average",))
    third = LayerPath.of(second, [("a", 4), ("b", 7)], "weight_average")
    model = T5ForConditionalGeneration.from_pretrained(
        third.save_pretrained(tmp_path / "c", second)
    )
    name = "layer.2.DenseReluDense.wo.weight"
    assert torch.equal(model.decoder.block[1].get_parameter(name), parts.layers[7][name])
    mean = (stem["shared.weight"] + pool.stem_weights("one")["shared.weight"]) / 2
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
    folder = LayerPath.of(pool, [("two", 0)], "base").save_pretrained(tmp_path / "merged", pool)
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
    path = LayerPath.of(pool, [("weight_average", k) for k in range(4)], "weight_average")
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
    layers = [(k, pool.layer_weights(source, k)) for source, k in path.steps]
    found = run(pool.architecture, pool.stem_weights("one"), layers, batch_of(ROWS))
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
        found, own = pool.stem_weights(source), clean.stem_weights(source)
        assert sum(w.numel() for w in found.values()) == expected
        assert found.keys() == own.keys()
        assert all(torch.equal(found[n], own[n]) for n in own)
    # a base with copies and experts without are of one architecture too
    mixed = LayerPool(base, clean.experts, ("one", "two"), ("ties",))
    assert torch.equal(
        mixed.stem_weights("ties")["shared.weight"], clean.stem_weights("ties")["shared.weight"]
    )
    folder = LayerPath.of(pool, [("one", 0)], "ties").save_pretrained(tmp_path / "merged", pool)
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
        own, found = (pool.layer_weights("ties", k) for pool in pools)
        assert own.keys() == found.keys()
        assert all(torch.equal(own[n], found[n]) for n in own)


def test_trimming_sees_the_shared_embeddings_once(t5s):
    """TIES of the stem by hand: the smallest entries of each task vector, each counted once, go."""
    pool = pool_of(t5s, operators=("ties:density=0.3,scale=1",))
    base = pool.stem_weights("base")
    deltas = []
    for source in ("one", "two"):
        own = pool.stem_weights(source)
        delta = np.concatenate([(own[n] - base[n]).numpy().ravel() for n in base])
        order = np.argsort(-np.abs(delta))
        delta[order[round(0.3 * len(delta)) :]] = 0
        deltas.append(delta)
    total = deltas[0] + deltas[1]
    agree = [d * (np.sign(d) == np.sign(total)) for d in deltas]
    count = np.maximum(1, sum(a != 0 for a in agree))
    merged = sum(agree) / count
    found = pool.stem_weights("ties:density=0.3,scale=1")
    found = np.concatenate([(found[n] - base[n]).numpy().ravel() for n in base])
    assert np.mean(np.abs(found - merged) < 1e-5) > 0.999  # but for a tie at the threshold


def test_an_untied_head_is_merged_as_a_tensor_of_its_own(t5s, tmp_path):
    pool = pool_of(t5s, "v1.1")
    _, one, two = t5s["v1.1"][0]
    found = pool.stem_weights("weight_average")
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
    for i, steps in enumerate(
        ([("one", 0), ("one", 2)], [("one", 1), ("two", 1), ("one", 3)], [("two", 0), ("two", 2)])
    ):
        for k in range(pool.n_layers):
            assert not any("relative" in n for n in pool.layer_weights("one", k))
        path = LayerPath.of(pool, steps, stem)
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


# ------------------------------------------------------------------- the environment's two stacks


class Fake:
    """The real pool's sources and stacks; a path costs nothing to score."""

    def __init__(self, pool, chooses_stem=False) -> None:
        self.sources, self.n_models, self.n_layers = pool.sources, pool.n_models, pool.n_layers
        self.stacks, self.n_subsets, self.task_names = pool.stacks, 1, ["a", "b"]
        self.chooses_stem = chooses_stem

    def score(self, path, subset=None):
        return np.array([0.25, 0.75])


def play(env, rng, *, masked: bool):
    """A random episode; yields (place, action, mask, terminated, truncated, info)."""
    _, info = env.reset()
    place, done = info["layer"], False
    while not done:
        mask = info["action_mask"]
        p = mask / mask.sum() if masked else None
        action = int(rng.choice(len(mask), p=p))
        _, _, terminated, truncated, info = env.step(action)
        yield place, action, mask, terminated, truncated, info
        place, done = info["layer"], terminated or truncated


@pytest.mark.parametrize("chooses_stem", [False, True])
@pytest.mark.parametrize("masked", [True, False])
def test_no_episode_leads_back_into_the_encoder(t5s, masked, chooses_stem):
    pool = pool_of(t5s, "unequal")
    env = MergingEnv(Fake(pool, chooses_stem))
    border, rng = 3, np.random.default_rng(5)
    assert pool.stacks == (range(3), range(3, 5))
    illegal = finished = backs = 0
    paths = set()
    for _ in range(1_000):
        reached = False
        for place, action, mask, terminated, truncated, info in play(env, rng, masked=masked):
            reached |= place >= border
            assert not (reached and place < border)  # once in the decoder, always
            if place in (0, border):
                assert not mask[env.back]
            if action == env.back:
                if place in (-1, 0, border):
                    illegal += 1
                    assert terminated
                    assert info["penalised"]
                    assert "scores" not in info
                else:
                    backs += 1
                    assert truncated or info["layer"] == place - 1
        numbers = [k for _, k in info["path"]]
        assert all(not (a >= border > b) for a, b in itertools.pairwise(numbers))
        if not info["penalised"]:
            finished += 1
            paths.add(info["path"])
    assert backs > 100
    assert len(paths) > 100
    assert (illegal == 0 and finished == 1_000) if masked else (illegal > 100 and finished > 100)
    chosen = sorted(paths)[:: max(1, len(paths) // 15)]
    for path in chosen[:15]:
        layers = [(env.scorer.sources[a], k) for a, k in path if k >= 0]
        model = pool.assemble(layers, "base")
        stacks = [[s for s in layers if s[1] < border], [s for s in layers if s[1] >= border]]
        for stack, steps in zip((model.encoder, model.decoder), stacks, strict=True):
            assert len(stack.block) == len(steps)
            for block, (source, k) in zip(stack.block, steps, strict=True):
                for name, weight in pool.layer_weights(source, k).items():
                    assert torch.equal(block.get_parameter(name), weight)


def test_back_inside_the_decoder_stays_in_the_decoder(t5s):
    """By hand: back is offered at the decoder's second block and not at its first."""
    env = MergingEnv(Fake(pool_of(t5s)))
    _, info = env.reset()
    offered = {}
    for _ in range(4):
        offered[info["layer"]] = int(info["action_mask"][env.back])
        _, _, _, _, info = env.step(0)
    assert offered == {0: 0, 1: 1, 2: 0, 3: 1}
    env.reset()
    for action in (0, env.skip, 1, env.back):  # e0, skip, d0, back
        _, _, terminated, _, info = env.step(action)
    assert (info["layer"], terminated) == (2, False)
    _, reward, terminated, _, info = env.step(env.back)
    assert (reward, terminated, info["penalised"]) == (-0.1, True, True)
    assert info["path"] == ((0, 0), (1, 2))


def test_random_episodes_with_the_real_scorer(t5s):
    """Rewards are the mean of the tasks' scores of the model that the path builds."""
    problem = problem_of(t5s, stem="agent")
    env = MergingEnv(problem.scorer(fraction=1.0))
    rng = np.random.default_rng(0)
    for n in range(25):
        *_, info = list(play(env, rng, masked=True))[-1]
        assert not info["penalised"]
        if n % 8 == 0:
            path = info["path"]
            stem = problem.pool.sources[path[0][0]] if path and path[0][1] < 0 else "base"
            steps = [(problem.pool.sources[a], k) for a, k in path if k >= 0]
            model = problem.pool.assemble(steps, stem)
            expected = [accuracy(model, f, "reward") for f in t5s["texts"]]
            assert list(info["scores"].values()) == pytest.approx(expected)


# -------------------------------------------------------------------------------------- the scorer


def oracle(model, folder: Path, split: str, mean: bool = False) -> list[int]:
    """The best choice of each row: words by number, row by row, choice by choice, unpadded."""
    rows = rows_of(folder, split)
    number = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}

    def tokens(words):
        return [*(number.get(w, 2) for w in words.split()), 1]

    with torch.no_grad():
        return [
            int(
                np.argmax(
                    reference(
                        model, (tokens(r["input"]), [tokens(c) for c in r["choices"]]), mean=mean
                    )
                )
            )
            for r in rows
        ]


def accuracy(model, folder: Path, split: str, mean: bool = False) -> float:
    """Of a task: plain accuracy, or scikit-learn's balanced one for the task with no and yes."""
    return metric_of(folder, split, oracle(model, folder, split, mean))


def metric_of(folder: Path, split: str, found: list[int]) -> float:
    labels = [r["label"] for r in rows_of(folder, split)]
    if folder.name == "noyes":
        return balanced_accuracy_score(labels, found)
    return float(np.mean(np.equal(found, labels)))


SCORED = [
    ((0, 0), (1, 1), (0, 2), (1, 3)),
    ((3, 0), (3, 0), (1, 1), (2, 2), (2, 2), (0, 2)),  # stacks
    ((1, 1), (0, 3)),  # skips
    ((0, 0), (1, 1)),
    (),
]


@pytest.mark.parametrize("variant", ["t5", "v1.1"])
def test_scores_are_those_of_the_exported_model(t5s, tmp_path, variant):
    """Read, tokenised and scored by transformers and scikit-learn alone."""
    problem = problem_of(t5s, variant)
    assert [t.metric for t in problem.tasks] == ["accuracy", "balanced"]
    scorer = problem.scorer(fraction=1.0, batch_size=5)
    seen = []
    for n, path in enumerate(SCORED):
        steps = [(problem.pool.sources[a], k) for a, k in path]
        exported = LayerPath.of(problem.pool, steps, problem.stem)
        folder = exported.save_pretrained(tmp_path / str(n), problem.pool)
        model = T5ForConditionalGeneration.from_pretrained(folder).eval()
        found = answers_of_path(problem.pool, problem.tasks, steps, problem.stem, "test")
        best = [oracle(model, texts, "test") for texts in t5s["texts"]]
        assert [own.tolist() for own in found] == best
        seen += [tuple(own.tolist()) for own in found]
        expected = [accuracy(model, texts, "reward") for texts in t5s["texts"]]
        assert scorer.score(path).tolist() == pytest.approx(expected)
        test = evaluate(problem.pool, problem.tasks, steps, problem.stem, "test")
        expected = [
            metric_of(texts, "test", own) for texts, own in zip(t5s["texts"], best, strict=True)
        ]
        assert test.tolist() == pytest.approx(expected)
    assert len(set(seen)) >= 7  # the paths' answers differ


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_nothing_but_the_path_changes_a_score(shared_problem, data):
    """Skips, stacks, repeats and stems: the same to the bit for any budget, workers and looking ahead."""
    encoder = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1)), max_size=3)
    decoder = st.lists(st.tuples(st.integers(0, 3), st.integers(2, 3)), max_size=3)
    path = st.tuples(STEM, encoder, decoder).map(lambda p: tuple(s for q in p for s in q))
    options = {"fraction": 1 / 3, "stem": "agent", "batch_size": 5}
    check_that_nothing_changes_a_bit(shared_problem, path, data, **options)


@pytest.fixture(scope="session")
def shared_problem(t5s):
    return problem_of(t5s)


def test_the_stem_of_a_prefix_is_no_other_stems(t5s):
    """Paths that differ in their stem alone share no activations."""
    problem = problem_of(t5s, stem="agent")
    scorer = problem.scorer(fraction=1.0)
    layers = ((0, 0), (0, 1), (1, 2), (1, 3))
    for stem in (0, 1, 2):
        model = problem.pool.assemble(
            [(problem.pool.sources[a], k) for a, k in layers], problem.pool.sources[stem]
        )
        expected = [accuracy(model, texts, "reward") for texts in t5s["texts"]]
        assert scorer.score(((stem, -1), *layers)).tolist() == pytest.approx(expected)


def test_a_normalised_choice_is_scored_by_its_mean_per_token(t5s, tmp_path):
    """On rows where sum and mean disagree: the sum likes short answers."""
    rng = np.random.default_rng(0)
    rows = [
        {"input": text(rng, 3, 8), "choices": [text(rng, 1, 2), text(rng, 5, 6)], "label": 1}
        for _ in range(12)
    ]
    texts = tmp_path / "lengths"
    texts.mkdir()
    for split in ("train", "reward", "test"):
        (texts / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pool = pool_of(t5s)
    fmt = TextFormat.of(pool.base)
    steps = [("one", k) for k in range(4)]
    model, found = t5s["t5"][0][1], {}
    for mean in (False, True):
        task = TextTask(str(texts), fmt, normalise_length=mean)
        found[mean] = answers_of_path(pool, [task, task], steps, "one", "test")[0].tolist()
        assert found[mean] == oracle(model, texts, "test", mean)
    differ = sum(a != b for a, b in zip(found[False], found[True], strict=True))
    assert differ >= 3


def test_load_problem_hands_metric_and_normalisation_on(t5s):
    problem = problem_of(t5s, normalise_length=True, metric="accuracy")
    assert all(task.normalise_length for task in problem.tasks)
    assert [task.metric for task in problem.tasks] == ["accuracy", "accuracy"]
    texts = t5s["texts"][0]
    steps = [("two", k) for k in range(4)]
    found = answers_of_path(problem.pool, problem.tasks, steps, "two", "reward")[0].tolist()
    assert found == oracle(t5s["t5"][0][2], texts, "reward", mean=True)


# ------------------------------------------------------------------------------------- the texts


def one_task(tmp_path, rows, fmt, **options) -> TextTask:
    folder = tmp_path / "rows"
    folder.mkdir(exist_ok=True)
    for split in ("train", "reward", "test"):
        lines = rows[split] if isinstance(rows, dict) else rows
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return TextTask(str(folder), fmt, **options)


@pytest.fixture(scope="session")
def fmt(t5s) -> TextFormat:
    return TextFormat.of(read_checkpoint(t5s["t5"][1][0]))


@pytest.mark.parametrize("mean", [False, True])
def test_a_batch_by_hand(tmp_path, fmt, mean):
    """Right padding, the end token, the start token, and a weight for each token."""
    rows = [
        {"input": "w10 w11 other", "choices": ["w20 w21", "w22"], "label": 1},
        {"input": "w12", "choices": ["w23", "w24", "yes"], "label": 0},
    ]
    task = one_task(tmp_path, rows, fmt, normalise_length=mean)
    batch = task.batch("test", np.array([0, 1]))
    assert batch.ids.tolist() == [[10, 11, 2, 1], [12, 1, 0, 0]]
    assert batch.mask.tolist() == [[True] * 4, [True, True, False, False]]
    zero = [0, 0, 0]
    assert batch.choices.tolist() == [
        [[20, 21, 1], [22, 1, 0], zero],
        [[23, 1, 0], [24, 1, 0], [4, 1, 0]],
    ]
    assert batch.shifted[0, :2].tolist() == [[0, 20, 21], [0, 22, 1]]
    a, b = (1 / 3, 1 / 2) if mean else (1, 1)
    expected = [[[a, a, a], [b, b, 0], zero], [[b, b, 0]] * 3]
    torch.testing.assert_close(batch.shares, torch.tensor(expected, dtype=torch.float32))
    assert task.split("test").labels.tolist() == [1, 0]
    assert task.batch("test", slice(1, 2)).ids.tolist() == [[12, 1]]
    assert task.batch("test", np.array([1, 0])).ids[0].tolist() == [12, 1, 0, 0]


def test_a_start_token_of_its_own(t5s, tmp_path):
    folder = shutil.copytree(t5s["t5"][1][0], tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"decoder_start_token_id": 7}))
    fmt = TextFormat.of(read_checkpoint(folder))
    rows = [{"input": f"w{i}", "choices": ["w20 w21", "w22"], "label": 1} for i in range(3)]
    batch = one_task(tmp_path, rows, fmt).batch("test", slice(0, 1))
    assert batch.shifted.tolist() == [[[7, 20, 21], [7, 22, 1]]]


def test_a_long_input_loses_its_end_but_not_the_end_token(tmp_path, fmt):
    assert fmt.max_length == 24  # n_positions
    words = [f"w{i}" for i in range(10, 40)]
    rows = [
        {"input": " ".join(words), "choices": ["no", "yes"], "label": 0},
        {"input": " ".join(words[:23]), "choices": ["no", "yes"], "label": 0},
    ]
    split = one_task(tmp_path, rows, fmt).split("test")
    whole = [*range(10, 33), 1]
    assert split.inputs == [whole, whole]
    assert split.cut == 1


def noyes(*labels: int) -> list[dict]:
    return [
        {"input": f"w{i + 5} w{i % 7 + 5}", "choices": ["no", "yes"], "label": label}
        for i, label in enumerate(labels)
    ]


def test_balanced_accuracy_by_hand(tmp_path, fmt):
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 0, 0, 1, 1])
    always, mixed = torch.zeros(10).long(), torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 0])
    plain = one_task(tmp_path, noyes(*labels.tolist()), fmt, metric="accuracy")
    assert plain.score(always, labels) == pytest.approx(0.8)
    assert plain.score(mixed, labels) == pytest.approx(0.7)
    auto = one_task(tmp_path, noyes(*labels.tolist()), fmt)  # 80 % are no
    assert auto.metric == "balanced"
    assert auto.score(always, labels) == pytest.approx(0.5)
    assert auto.score(mixed, labels) == pytest.approx((6 / 8 + 1 / 2) / 2)
    assert auto.score(mixed[:8], labels[:8]) == pytest.approx(6 / 8)  # a subset without a yes


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
@pytest.mark.filterwarnings("ignore:y_pred contains classes")
@pytest.mark.filterwarnings("ignore:A single label")
def test_balanced_accuracy_is_scikit_learns(balanced_task, pairs):
    found, labels = (torch.tensor(x) for x in zip(*pairs, strict=True))
    expected = balanced_accuracy_score(labels, found)
    assert balanced_task.score(found, labels) == pytest.approx(expected)


@pytest.fixture(scope="session")
def balanced_task(tmp_path_factory, fmt) -> TextTask:
    return one_task(tmp_path_factory.mktemp("b"), noyes(0, 1, 0, 1), fmt, metric="balanced")


@pytest.mark.parametrize(
    ("labels", "metric"),
    [
        ((0, 0, 0, 1, 1), "balanced"),  # exactly 60 %
        ((1, 1, 1, 1, 0), "balanced"),
        ((0, 0, 1, 1), "accuracy"),
        ((0, 0, 0, 0, 0, 1, 1, 1, 1), "accuracy"),  # 5 of 9
    ],
)
def test_a_skewed_task_is_balanced_by_itself(tmp_path, fmt, labels, metric):
    """By the reward split alone."""
    rows = {"train": noyes(0, 0, 0), "reward": noyes(*labels), "test": noyes(0, 0, 0, 1)}
    assert one_task(tmp_path, rows, fmt).metric == metric


def test_majority_and_chance_by_hand(tmp_path, fmt):
    rows = {"train": noyes(0), "reward": noyes(1, 1, 1, 0), "test": noyes(1, 0, 0, 0, 0)}
    task = one_task(tmp_path, rows, fmt)
    assert task.metric == "balanced"
    assert task.majority("test") == pytest.approx((0.5, 1 / 5))  # the reward split's answer: yes
    assert task.majority("reward") == pytest.approx((0.5, 3 / 4))
    assert task.chance("test") == 0.5
    plain = one_task(tmp_path, rows, fmt, metric="accuracy")
    assert plain.majority("test") == pytest.approx((1 / 5, 1 / 5))


def test_majority_without_common_answers_is_chance(tmp_path, fmt):
    rows = [
        {"input": "w5", "choices": ["w6", "w7"], "label": 0},
        {"input": "w6", "choices": ["w6", "w7", "w8"], "label": 0},
        {"input": "w7", "choices": ["w6", "w9", "w8", "w5"], "label": 0},
        {"input": "w8", "choices": ["w6", "w9", "w8", "w5"], "label": 0},
    ]
    task = one_task(tmp_path, rows, fmt)
    expected = (1 / 2 + 1 / 3 + 1 / 4 + 1 / 4) / 4
    assert task.answers is None
    assert task.metric == "accuracy"  # however many labels are 0
    assert task.chance("test") == pytest.approx(expected)
    assert task.majority("test") == pytest.approx((expected, expected))
    with pytest.raises(InputError, match="the same choices in every row"):
        _ = one_task(tmp_path, rows, fmt, metric="balanced").metric


# -------------------------------------------------------------------------------------- bad models


class Own:
    """The tiny problem's folders; what a test alters is copied first."""

    def __init__(self, t5s) -> None:
        self.base, *self.experts = map(str, t5s["t5"][1])
        self.texts = list(map(str, t5s["texts"]))

    def copied(self, name: str = "two") -> Path:
        """A folder of this problem's own: base, one or two."""
        if name == "base":
            self.base = str(shutil.copytree(self.base, "origin"))
            return Path(self.base)
        i = ("one", "two").index(name)
        self.experts[i] = str(shutil.copytree(self.experts[i], name))
        return Path(self.experts[i])

    def configure(self, *names: str, **values) -> None:
        for name in names:
            file = self.copied(name) / "config.json"
            config = json.loads(file.read_text())
            config |= values
            file.write_text(json.dumps(config))

    def weights(self, change, *names: str) -> None:
        for name in names:
            file = self.copied(name) / "model.safetensors"
            tensors = load_file(file)
            change(tensors)
            save_file(tensors, file)

    def other(self, variant: str = "t5", **args) -> None:
        """Expert two is of another shape."""
        self.experts[1] = str(write_t5(Path("two"), hf_model(variant, 5, **args)))

    def models(self) -> list[str]:
        models = ["--base", self.base, "--experts", *self.experts]
        return [*models, "--quiet", "--episodes", "2"]

    def argv(self, *more) -> list[str]:
        return [*self.models(), "--texts", *self.texts, *map(str, more)]

    def load(self):
        return load_problem(self.experts, base=self.base, texts=self.texts)


@pytest.fixture
def own(t5s, tmp_path, monkeypatch) -> Own:
    """In an empty folder, where anything written by mistake shows."""
    monkeypatch.chdir(tmp_path)
    return Own(t5s)


def refused_both(own, capsys, *words) -> None:
    """``load_problem`` and the command line refuse with the same sentence."""
    with pytest.raises(InputError) as caught:
        own.load()
    for word in words:
        assert word in one_sentence(caught.value)
    refused(capsys, own.argv(), *words)


def test_the_untouched_problem_is_accepted(own, capsys):
    """All other tests alter one thing of this command line, which alone is good."""
    assert ppo.main(own.argv("--run-dir", "run")) == 0
    assert capsys.readouterr().err == ""
    path = LayerPath.from_json((Path("run") / "path.json").read_text())
    assert type(path.build()) is T5ForConditionalGeneration


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"num_layers": 1}, ["encoder.block.1.", "no such tensor"]),
        ({"num_layers": 3}, ["encoder.block.2.", "besides"]),
        ({"num_decoder_layers": 1}, ["decoder.block.1.", "no such tensor"]),
        ({"num_decoder_layers": 3}, ["decoder.block.2.", "besides"]),
        ({"d_model": 8}, ["(104, 16)", "(104, 8)"]),
        ({"d_ff": 8}, ["DenseReluDense", "(24, 16)", "(8, 16)"]),
        ({"vocab_size": 120}, ["shared.weight", "(104, 16)", "(120, 16)"]),
        ({"d_kv": 3, "num_heads": 4}, ["relative_attention_bias", "(32, 3)", "(32, 4)"]),
        ({"relative_attention_num_buckets": 8}, ["relative_attention_bias", "(32, 3)", "(8, 3)"]),
        ({"relative_attention_max_distance": 64}, ["max_distance': 128", "max_distance': 64"]),
        ({"feed_forward_proj": "gated-gelu"}, ["DenseReluDense.wi.weight", "no such tensor"]),
        ({"feed_forward_proj": "silu"}, ["'relu'", "'silu'"]),  # the same shapes
        ({"layer_norm_epsilon": 1e-3}, ["1e-06", "0.001"]),
        ({"decoder_start_token_id": 9}, ["'start': 0", "'start': 9"]),
        ({"tie_word_embeddings": False}, ["lm_head.weight", "besides"]),
    ],
    ids=lambda v: "-".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else "",
)
def test_experts_of_another_shape(own, capsys, args, words):
    own.other(**args)
    refused_both(own, capsys, "'two'", own.base, *words, "merge only models")


def test_heads_that_differ_where_no_shape_does(own, capsys):
    """config.json alone says it: the same 12 numbers are 3 heads of 4 or 3 of other sizes."""
    own.configure("two", num_heads=4, d_kv=3)
    refused_both(own, capsys, "'two'", "'num_heads': 3", "'num_heads': 4", "merge only models")


def test_outputs_that_are_scaled_or_not(own, capsys):
    own.configure("two", scale_decoder_outputs=False)
    refused_both(own, capsys, "'two'", "'scaled': True", "'scaled': False")


def test_an_activation_by_its_other_name(own, capsys):
    """transformers obeys dense_act_fn where it contradicts feed_forward_proj."""
    assert T5Config(feed_forward_proj="relu", dense_act_fn="silu").dense_act_fn == "silu"
    own.configure("two", dense_act_fn="silu")
    refused_both(own, capsys, "'two'", "relu", "silu", "merge only models")


def test_a_vit_among_t5s(own, capsys):
    own.experts[1] = str(write_model(Path("two"), 0))
    refused_both(own, capsys, "'two'", own.base, "a T5", "a timm ViT", "one family")


def test_a_t5_among_vits(own, tiny, capsys):
    images = ["--images", *tiny["images"], "--quiet"]
    argv = ["--base", tiny["base"], "--experts", tiny["experts"][0], own.experts[0], *images]
    refused(capsys, argv, own.experts[0], "a timm ViT", "a T5", "one family")
    argv = ["--base", own.base, "--experts", *tiny["experts"], *images]
    refused(capsys, argv, tiny["experts"][0], "a T5", "a timm ViT", "one family")


def test_images_for_t5s_and_texts_for_vits(own, tiny, capsys):
    pictures = [str(write_images(Path(f"i{i}"), i, per_class=2)) for i in range(2)]
    refused(capsys, [*own.models(), "--images", *pictures], "--images", "is a T5", "--texts")
    vits = ["--base", tiny["base"], "--experts", *tiny["experts"], "--quiet"]
    refused(capsys, [*vits, "--texts", *own.texts], "--texts", "is a ViT", "--images")
    refused(capsys, own.argv("--images", *pictures), "--texts", "--images", "both")
    refused(capsys, own.models(), "--texts", own.experts[0])
    refused(capsys, [*own.models(), "--texts", own.texts[0]], "--texts", "2 experts", "found 1")


def test_no_tokenizer(own, capsys):
    folder = own.copied("base")
    (folder / "tokenizer.json").unlink()
    refused_both(own, capsys, "'origin'", "tokenizer", "found none", "save_pretrained")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": "1.0", "model": {}}'])
@pytest.mark.parametrize("name", ["base", "one"])
def test_a_broken_tokenizer(own, capsys, name, content):
    folder = own.copied(name)
    (folder / "tokenizer.json").write_text(content)
    refused_both(own, capsys, f"'{folder}'", "tokenizer", "broken", "save it again")


@pytest.mark.parametrize("content", ["{", "[]", '{"pad_token": 5}', '{"eos_token": ["</s>"]}'])
def test_a_broken_tokenizer_config(own, capsys, content):
    (own.copied("base") / "tokenizer_config.json").write_text(content)
    refused_both(own, capsys, "'origin'", "tokenizer")


@pytest.mark.parametrize("n", [105, 400])
def test_a_tokenizer_larger_than_the_embeddings(own, capsys, n):
    words = [f"w{i}" for i in range(n - 3)]
    write_tokenizer(own.copied("base"), words)
    refused_both(own, capsys, "'origin'", "at most 104 tokens", f"found {n}", "own tokenizer")


def test_a_tokenizer_as_large_as_the_embeddings(own):
    write_tokenizer(own.copied("base"), [f"w{i}" for i in range(101)])
    assert TextFormat.of(read_checkpoint(own.base)).tokenizer.get_vocab_size() == 104


def test_a_tokenizer_far_smaller_than_the_embeddings(own, capsys):
    own.base = str(write_t5(Path("origin"), hf_model(vocab_size=98 + 257)))
    refused(capsys, own.argv(), "'origin'")  # and the experts are of another size, in any case
    with pytest.raises(InputError, match=r"'origin'.*355 tokens.*256 fewer.*found 98"):
        TextFormat.of(read_checkpoint("origin"))
    write_t5(Path("other"), hf_model(vocab_size=98 + 256))
    TextFormat.of(read_checkpoint("other"))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"pad_token_id": 5}, ["pad", "number 5", "'<pad>'", "number 0"]),
        ({"eos_token_id": 0}, ["eos", "number 0", "'</s>'", "number 1"]),
        ({"eos_token_id": None}, ["eos", "number None", "'</s>'"]),
    ],
)
def test_special_tokens_that_are_not_the_models(own, capsys, values, words):
    own.configure("base", "one", "two", **values)
    refused_both(own, capsys, "'origin'", *words, "own tokenizer")


def test_special_tokens_that_the_tokenizer_lacks(own, capsys):
    file = own.copied("base") / "tokenizer_config.json"
    file.write_text(json.dumps({"eos_token": "<eos>"}))
    refused_both(own, capsys, "'origin'", "eos", "'<eos>'", "None")


def test_an_expert_with_another_tokenizer(own, capsys):
    folder = own.copied("two")
    write_tokenizer(folder)  # equal: accepted
    own.load()
    write_tokenizer(folder, ["yes", "no", *WORDS[2:]])
    refused_both(own, capsys, "'two'", "tokenizer of its base", "differ in", "merge only models")


@pytest.mark.parametrize("name", COPIES[:2])
def test_copies_of_the_embeddings_that_differ(own, capsys, name):
    def change(tensors):
        tensors[name] = tensors["shared.weight"] + 1

    own.weights(change, "two")
    refused_both(own, capsys, "'two'", name, "shared embeddings", "tied")


@pytest.mark.parametrize("name", BIASES)
def test_no_relative_position_bias(own, capsys, name):
    own.weights(lambda tensors: tensors.pop(name), "base", "one", "two")
    refused_both(own, capsys, "'origin'", name, "found none")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_layers": 3}, ["3 encoder and 2 decoder", "of 2 and 2"]),
        ({"num_decoder_layers": 1}, ["2 encoder and 1 decoder", "of 2 and 2"]),
        ({"num_layers": 4, "num_decoder_layers": None}, ["4 encoder and 4 decoder", "of 2 and 2"]),
    ],
)
def test_a_config_of_another_depth_than_its_weights(own, capsys, values, words):
    own.configure("two", **values)
    refused_both(own, capsys, "'two'", "config.json", *words)


def test_a_decoders_depth_may_be_left_out(own):
    """transformers then takes the encoder's."""
    own.configure("base", "one", "two", num_decoder_layers=None)
    assert own.load().pool.stacks == (range(2), range(2, 4))


def test_a_missing_block(own, capsys):
    def change(tensors):
        for name in [n for n in tensors if n.startswith("encoder.block.1.")]:
            tensors[name.replace("block.1.", "block.2.")] = tensors.pop(name)

    own.weights(change, "two")
    refused_both(own, capsys, "'two'", "encoder.block.")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"d_ff": 32}, ["DenseReluDense", "(32, 16)", "(24, 16)"]),
        ({"vocab_size": 105}, ["shared.weight", "(105, 16)", "(104, 16)"]),
        (
            {"feed_forward_proj": "gated-gelu", "is_gated_act": True},
            ["DenseReluDense.wi_0.weight", "found none"],
        ),
        ({"num_heads": 4}, ["(32, 4)", "(32, 3)"]),
    ],
)
def test_a_config_that_is_not_the_weights(own, capsys, values, words):
    """Base and experts agree, but no model of this config has these weights."""
    own.configure("base", "one", "two", **values)
    refused(capsys, own.argv(), own.base, "config.json", *words)


@pytest.mark.parametrize(
    "values",
    [
        {"num_layers": "2"},
        {"num_decoder_layers": 2.0},
        {"d_kv": 4.0},
        {"num_heads": True},
        {"vocab_size": "many"},
        {"d_ff": "24"},
        {"relative_attention_num_buckets": "32"},
        {"relative_attention_max_distance": None},
        {"layer_norm_epsilon": "tiny"},
        {"feed_forward_proj": 3},
        {"feed_forward_proj": "nonsense", "dense_act_fn": "nonsense"},
        {"feed_forward_proj": "a-b-c"},
        {"dropout_rate": "x"},
        {"n_positions": "many"},
        {"decoder_start_token_id": "zero"},
        {"decoder_start_token_id": 104},
        {"decoder_start_token_id": -1},
        {"pad_token_id": "0"},
    ],
    ids=lambda v: "-".join(f"{k}={x}" for k, x in v.items()),
)
def test_a_config_value_of_the_wrong_type_or_size(own, capsys, values):
    own.configure("base", "one", "two", **values)
    refused(capsys, own.argv())


@pytest.mark.parametrize("kind", ["mt5", "umt5", "longt5", "bert", None])
def test_other_families(own, capsys, kind):
    own.configure("two", model_type=kind)
    found = "neither" if kind is None else f"'{kind}'"
    refused_both(own, capsys, "'two'", "'t5'", found, "not supported")


def test_an_encoder_alone(own, capsys):
    own.experts[1] = "two"
    encoder = T5EncoderModel(T5Config(**TINY))
    encoder.save_pretrained("two")
    refused_both(own, capsys, "'two'", "decoder blocks", "2 and 0")


def test_weights_of_something_else(own, capsys):
    own.weights(lambda tensors: tensors.pop("shared.weight"), "two")
    refused_both(own, capsys, "'two'", "weights of a T5", "shared", "not supported")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(own, capsys, value):
    def change(tensors):
        tensors["decoder.block.1.layer.1.EncDecAttention.v.weight"][2, 3] = value

    own.weights(change, "two")
    refused_both(own, capsys, "'two'", "decoder.block.1.layer.1.EncDecAttention.v.weight", "1 NaN")


@pytest.mark.parametrize(
    "layers", [(0, 2, 1), (3, 0), (2, 3, 0, 1)], ids=lambda v: "".join(map(str, v))
)
def test_a_path_whose_encoder_block_stands_behind_a_decoder_block(own, t5s, layers):
    pool = pool_of(t5s)
    data = json.loads(LayerPath.of(pool, [("one", 0)], "base").to_json())
    data["steps"] = [{"layer": k, "source": "one"} for k in layers]
    path = LayerPath.from_json(json.dumps(data))
    for action in (path.build, lambda: path.save_pretrained("merged")):
        with pytest.raises(InputError, match=r"layer path: expected encoder blocks .*path\.json"):
            action()
    assert not Path("merged").exists()


# ---------------------------------------------------------------------------- the real vocabulary


real = pytest.mark.skipif(not REAL.is_dir(), reason="the real T5 vocabulary is not at hand")
SENTENCES = [
    "question: What is the capital of France? facts: Paris is large.",
    "  Two  blanks,\tand a tab\nand a line.  ",
    "Naïve café — “quotes”, ½ litre, 価格 and an emoji 🙂",
    "translate English to German: That is good.",
    "Fill <extra_id_0> in <extra_id_1>.",
    "yes",
    "",
]


def real_t5(folder: Path, *files: str) -> Path:
    """A tiny T5 with the real number of embeddings and some of the tokenizer's files."""
    if not (folder / "config.json").exists():
        hf_model(vocab_size=32_128, d_ff=8).save_pretrained(folder)
    for name in files:
        shutil.copy(REAL / name, folder / name)
    return folder


@real
@pytest.mark.parametrize(
    "files",
    [
        ("tokenizer.json",),
        ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    ],
    ids=["alone", "all"],
)
def test_the_real_vocabulary_as_transformers_reads_it(tmp_path, files):
    folder = real_t5(tmp_path / "m", *files)
    fmt = TextFormat.of(read_checkpoint(folder))
    assert (fmt.pad, fmt.end, fmt.start) == (0, 1, 0)
    expected = AutoTokenizer.from_pretrained(folder)(SENTENCES).input_ids
    assert all(ids[-1] == 1 for ids in expected)
    assert fmt.encode(SENTENCES) == expected


@real
def test_an_export_carries_the_real_vocabulary(tmp_path):
    names = ("spiece.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    folder = real_t5(tmp_path / "m", *names)
    base = read_checkpoint(folder)
    pool = LayerPool(base, [base, base], ("one", "two"), ())
    out = LayerPath.of(pool, [("one", 0), ("two", 3)], "one").save_pretrained(tmp_path / "o", pool)
    assert {p.name for p in out.iterdir()} == {"config.json", "model.safetensors", *names}
    expected = AutoTokenizer.from_pretrained(folder)(SENTENCES).input_ids
    assert AutoTokenizer.from_pretrained(out)(SENTENCES).input_ids == expected


@real
def test_a_sentencepiece_file_alone(tmp_path):
    """It is read as transformers would; where a library for that is missing, one sentence says so."""
    folder = real_t5(tmp_path / "m", "spiece.model")
    checkpoint = read_checkpoint(folder)
    try:
        found = TextFormat.of(checkpoint).encode(SENTENCES)
    except InputError as error:
        message = str(error)
    else:
        assert found == AutoTokenizer.from_pretrained(REAL)(SENTENCES).input_ids
        return
    # what is missing, and what would do instead
    assert all(word in message for word in (str(folder), "sentencepiece", "tokenizer.json"))
    assert "\n" not in message


# ------------------------------------------------------------------- bad rows, and a run from end to end


def bad_row(name: str, line: int, change) -> Path:
    """Texts in the current folder, one row of the train split changed."""
    rows = [{"input": f"w{i} w{i + 1}", "choices": ["w2", "w3"], "label": i % 2} for i in range(9)]
    rows[line - 1] = change(rows[line - 1])
    folder = Path(name)
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: {"input": "w1", "choices": ["w2", "w3"]}, ["'label'"]),
        (lambda r: {"question": "w1", "choices": ["w2", "w3"], "label": 0}, ["'input'"]),
        (lambda r: r | {"label": 2}, ["label", "0 to 1", "found 2"]),
        (lambda r: r | {"label": -1}, ["label", "found -1"]),
        (lambda r: r | {"label": "0"}, ["label", "'0'"]),
        (lambda r: r | {"choices": ["w2", " "]}, ["choice"]),
        (lambda r: r | {"choices": ["w2"]}, ["two"]),
        (lambda r: r | {"input": "  "}, ["input"]),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(own, capsys, change, words):
    own.texts[1] = str(bad_row("rows", 7, change))
    refused(capsys, own.argv("--run-dir", "run"), "train.jsonl", "line 7", *words)


def test_inputs_that_are_too_long_are_counted_and_told(own, capsys):
    own.configure("base", n_positions=3)
    assert ppo.main(own.argv("--run-dir", "run")) == 0
    told = (Path("run") / "table.md").read_text()
    task = Path(own.texts[0])
    n = len((task / "test.jsonl").read_text().splitlines())
    fmt = TextFormat.of(read_checkpoint(own.base))
    rows = [json.loads(line) for line in (task / "test.jsonl").read_text().splitlines()]
    long = sum(len(r["input"].split()) + 1 > 3 for r in rows)  # the end token counts
    assert long > 0
    assert fmt.max_length == 3
    assert f"{long} of {n} inputs of the test split" in told
    assert "3 tokens" in told


def test_a_metric_that_does_not_fit_leaves_nothing_behind(own, capsys):
    """Also with --quiet, under which nothing about the data is printed."""
    refused(capsys, own.argv("--metric", "balanced", "--run-dir", "run"), "the same choices")


def test_a_multi_task_model_with_another_tokenizer(own, capsys):
    folder = Path(shutil.copytree(own.base, "joint"))
    write_tokenizer(folder, words=["other", *WORDS[1:]])
    refused(capsys, own.argv("--multi-task", folder, "--run-dir", "run"), "joint", "tokenizer")


def fine_tuned(own, *more):
    from rmm_lab.zoo import build as zoo

    argv = ["finetune", "--base", own.base, "--texts", own.texts[0], "--out", "out"]
    return zoo.main([*argv, "--steps", "3", "--batch-size", "4", "--threads", "1", *more])


def test_a_fine_tuned_model_of_a_base_in_half_precision_is_in_full(own):
    own.configure("base", dtype="bfloat16")
    assert fine_tuned(own) == 0
    assert T5ForConditionalGeneration.from_pretrained("out").dtype == torch.float32


def test_fine_tuning_teaches_the_right_choice(t5s, tmp_path):
    """Only the second choice is ever right: a model taught the first would find none."""
    from rmm_lab.zoo.training import fine_tune_t5

    rows = [{"input": f"w{i} w9", "choices": ["w20", "w30"], "label": 1} for i in range(10, 40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    base = read_checkpoint(t5s["t5"][1][0])
    task = TextTask(str(tmp_path / "rows.jsonl"), TextFormat.of(base))
    config, weights = fine_tune_t5(
        base, [task], steps=60, learning_rate=1e-2, seed=0, batch_size=16
    )
    family, parts = architecture(config), t5.split(weights)
    layers = [family.layer(k, w) for k, w in enumerate(parts.layers)]
    found = answers(family, family.stem(parts.stem), layers, {}, task, "test")
    assert found.tolist() == [1] * len(found)


def test_a_training_that_diverges_is_stopped(own, capsys):
    assert fine_tuned(own, "--learning-rate", "1e30") == 2
    assert "expected a finite loss" in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_run_of_an_earlier_version_is_not_resumed(own, capsys):
    assert ppo.main(own.argv("--run-dir", "run")) == 0
    file = Path("run") / "config.json"
    config = json.loads(file.read_text())
    del config["texts"]
    file.write_text(json.dumps(config))
    capsys.readouterr()
    assert ppo.main(["--resume", "run"]) == 2
    error = capsys.readouterr().err
    assert "config of this version" in error
    assert "texts" in error


def test_a_model_that_is_cached_in_part_is_fetched_whole(own, monkeypatch):
    """As transformers leaves it when only the model, not the tokenizer, was asked for."""
    import huggingface_hub

    part = Path(shutil.copytree(own.base, "part"))
    (part / "tokenizer.json").unlink()
    asked = []

    def snapshot_download(name, *, revision, allow_patterns, local_files_only=False):
        asked.append(local_files_only)
        return str(part if local_files_only else own.base)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: None)
    found = read_checkpoint("hf-hub:someone/small")
    assert asked == [True, False]
    assert found.folder == Path(own.base)


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real texts beside {REAL}")
def test_real_texts_from_fine_tuning_to_a_merged_model(tmp_path, capsys, monkeypatch):
    """Winogrande and WSC with T5's own vocabulary: two experts by our own command, merged, resumed."""
    from rmm_lab.zoo import build as zoo

    monkeypatch.chdir(tmp_path)
    real = REAL.parent
    model = hf_model("t5", 3, vocab_size=32_128, n_positions=512)
    base = write_t5(tmp_path / "base-t5", model, tokenizer=False)
    shutil.copy(REAL / "tokenizer.json", base)
    sets = [f"winogrande:{real / 'winogrande' / 'dev.jsonl'}", f"wsc:{real / 'wsc'}"]
    for name, source in zip(("one", "two"), sets, strict=True):
        argv = ["finetune", "--base", str(base), "--texts", source, "--out", name]
        assert zoo.main([*argv, "--steps", "20", "--batch-size", "16", "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    assert "of the test split" in printed
    run = ["--base", str(base), "--experts", "one", "two", "--texts", *sets]
    assert ppo.main([*run, "--episodes", "10", "--finalists", "2", "--run-dir", "run"]) == 0
    table = {r["method"]: r for r in json.loads((Path("run") / "table.json").read_text())}
    assert set(table["RMM"]["test"]) == {"dev", "wsc"}
    merged = T5ForConditionalGeneration.from_pretrained("run/merged").eval()
    task = TextTask(sets[1], TextFormat.of(read_checkpoint("run/merged")))
    labels, right = task.split("test").labels.tolist(), 0
    for row, label in zip(task.rows("test"), labels, strict=True):
        ids = torch.tensor(task.format.encode([row["input"]]))
        scores = []
        for choice in task.format.encode(row["choices"]):
            with torch.no_grad():
                loss = merged(input_ids=ids, labels=torch.tensor([choice])).loss
            scores.append(-float(loss) * len(choice))
        right += scores.index(max(scores)) == label
    assert table["RMM"]["test"]["wsc"] == pytest.approx(right / len(labels), abs=0.011)
