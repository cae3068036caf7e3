"""Language models taken apart, run, merged and written, with transformers' own models as the oracle."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from lm_models import (
    ROWS,
    VARIANTS,
    config_of,
    hf_model,
    log_probability,
    reference,
    stack_of,
    tuned,
    write_lm,
)
from safetensors.torch import load_file, save_file
from t5_models import run
from transformers import AutoModelForCausalLM

from rmm_lab.errors import InputError
from rmm_lab.families import causal_lm
from rmm_lab.families.checkpoint import architecture, family_of, read_checkpoint
from rmm_lab.layers import LayerPool
from rmm_lab.path import LayerPath
from rmm_lab.reward import Step
from rmm_lab.tasks.lm_task import CHOOSE, NEXT, READ, WRITE, Answers, make_batch

PATHS = {
    "whole": (0, 1, 2),
    "back": (2, 0),
    "repeated": (1, 1, 0, 1, 2, 2),
    "nothing": (),
}
SUBLAYERS = {
    "attention alone": (0, 2, 4),
    "turned round": (1, 0, 3, 2, 2, 5),
    "repeated": (4, 1, 1, 0, 1, 4),
}
SPLIT = ("gemma2", "gemma3", "neox")  # whose blocks are not two sublayers


pytestmark = pytest.mark.usefixtures("no_progress_bars")


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def models(variant) -> list:
    """A base and two experts."""
    base = hf_model(variant, 1)
    return [base, tuned(base, 2), tuned(base, 3)]


def taken_apart(model, unit="block"):
    """What runs the model in pieces, and its parts, from transformers' own files' content."""
    config = config_of(model)
    parts = causal_lm.split(causal_lm.canonical("m", config, dict(model.state_dict())))
    if unit == "sublayer":
        from rmm_lab.families.parts import divide

        parts = divide(parts, causal_lm.sublayer)
    return architecture(config, unit), parts


def batch_of(kind=CHOOSE, rows=ROWS, by_length=False):
    wanted = {CHOOSE: lambda cs: cs, NEXT: lambda cs: [[0]]}.get(kind, lambda cs: cs[:1])
    own = [Answers(prompt, [(c, 0) for c in wanted(choices)]) for prompt, choices in rows]
    return make_batch(own, kind, by_length)


def check_choices(found, model, rows=ROWS) -> None:
    """found: (n, C), against one choice at a time without padding."""
    for i, (prompt, choices) in enumerate(rows):
        expected = [log_probability(model, prompt, choice) for choice in choices]
        assert found[i, : len(choices)].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert (found[i, len(choices) :] == -torch.inf).all()


# ------------------------------------------------------------------------------ pieces


def test_every_parameter_has_exactly_one_owner(models):
    model = models[0]
    arch, parts = taken_apart(model)
    stack = stack_of(model)
    own = dict(model.named_parameters())  # a tied head is the embeddings
    expected = {n for n in own if not n.startswith(f"{stack}.")}
    assert parts.stem.keys() == expected
    assert parts.stacks == (range(3),)
    for k, layer in enumerate(parts.layers):
        names = {n.removeprefix(f"{stack}.{k}.") for n in own if n.startswith(f"{stack}.{k}.")}
        assert layer.keys() == names
    assert parts.head == {}
    assert arch.n_layers == 3
    total = sum(t.numel() for part in (parts.stem, *parts.layers) for t in part.values())
    assert total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("path", PATHS)
def test_any_order_of_layers_runs_as_the_exported_model(models, path, tmp_path):
    """Layers of three models under new numbers, against a model that transformers loads and runs."""
    split = [taken_apart(model) for model in models]
    arch, numbers = split[0][0], PATHS[path]
    chosen = [(i % 3, k) for i, k in enumerate(numbers)]
    layers = [(k, split[m][1].layers[k]) for m, k in chosen]
    built = arch.assemble(split[1][1].stem, layers, {})
    built.save_pretrained(tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    stack, state = stack_of(merged), merged.state_dict()
    for i, (m, k) in enumerate(chosen):  # tensor by tensor
        for name, tensor in models[m].state_dict().items():
            if name.startswith(f"{stack}.{k}."):
                assert torch.equal(state[name.replace(f".{k}.", f".{i}.", 1)], tensor)
    assert merged.config.num_hidden_layers == len(numbers)
    check_choices(run(arch, split[1][1].stem, layers, batch_of()), merged)


def test_each_layer_keeps_its_kind_of_attention():
    """Windows of Gemma 2 and 3 and of Qwen2 go with the layer, not with its place."""
    kinds = {"qwen2": "fss", "gemma2": "sfs", "gemma3": "sfs", "mistral": "sss", "llama": "fff"}
    for variant, expected in kinds.items():
        arch, _ = taken_apart(hf_model(variant))
        assert "".join(kind[0] for kind in arch.kinds) == expected
        config = arch.merged_config([1, 1, 2], {}, {})
        if "layer_types" in config:
            assert "".join(t[0] for t in config["layer_types"]) == "".join(
                expected[k] for k in (1, 1, 2)
            )


def test_a_window_matters():
    """Otherwise the tests above could not see a wrong one."""
    for variant in ("mistral", "qwen2", "gemma2", "gemma3"):
        model = hf_model(variant)
        wide = copy.deepcopy(model)
        config = config_of(wide) | {"sliding_window": 40}
        own, parts = taken_apart(model)
        other = architecture(config)
        layers = list(enumerate(parts.layers))
        a, b = (run(arch, parts.stem, layers, batch_of()) for arch in (own, other))
        assert (a - b)[torch.isfinite(a)].abs().max() > 0.01, variant


@pytest.mark.parametrize("path", SUBLAYERS)
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in SPLIT], indirect=True)
def test_any_order_of_sublayers_runs_as_the_exported_model(models, variant, path, tmp_path):
    split = [taken_apart(model, "sublayer") for model in models]
    arch = split[0][0]
    assert arch.n_layers == len(split[0][1].layers) == 6
    layers = [(k, split[i % 3][1].layers[k]) for i, k in enumerate(SUBLAYERS[path])]
    arch.assemble(split[2][1].stem, layers, {}).save_pretrained(tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    check_choices(run(arch, split[2][1].stem, layers, batch_of()), merged)


@pytest.mark.parametrize("variant", SPLIT)
def test_blocks_that_are_not_two_sublayers_in_a_row_are_refused(variant):
    with pytest.raises(InputError, match="--unit block"):
        architecture(config_of(hf_model(variant)), "sublayer")


# ------------------------------------------------------------------------------ what is asked


def test_greedy_writing_is_seen_in_one_pass(models):
    """Above 0 exactly where ``generate`` writes the target and stops; each row alone, with its cache."""
    model = models[1]
    arch, parts = taken_apart(model)
    rows, written = [], []
    g = torch.Generator().manual_seed(0)
    for _ in range(6):
        prompt = [1, *torch.randint(4, 100, (4,), generator=g).tolist()]
        with torch.no_grad():
            out = model.generate(
                torch.tensor([prompt]), max_new_tokens=4, do_sample=False, pad_token_id=0
            )[0, len(prompt) :].tolist()
        for target in (out, [*out[:-1], (out[-1] + 1) % 100], [5, *out[1:]], out[:2]):
            rows.append((prompt, [target]))
            written.append(out[: len(target)] == target)
    assert 6 <= sum(written) < len(written)
    batch = batch_of(WRITE, rows)
    found = run(arch, parts.stem, list(enumerate(parts.layers)), batch)
    assert found.argmax(-1).tolist() == [int(right) for right in written]
    for (prompt, (target,)), score in zip(rows, found, strict=True):  # by how much, by hand
        logs = reference(model, prompt, target)
        leads = [
            float(row[y] - max(row[:y].tolist() + row[y + 1 :].tolist()))
            for row, y in zip(logs, target, strict=True)
        ]
        assert float(score[1]) == pytest.approx(min(leads), rel=1e-3, abs=1e-4)


def test_perplexity_and_the_next_token(models):
    model = models[0]
    arch, parts = taken_apart(model)
    layers = list(enumerate(parts.layers))
    found = run(arch, parts.stem, layers, batch_of(READ, by_length=True))
    nexts = run(arch, parts.stem, layers, batch_of(NEXT))
    for i, (prompt, choices) in enumerate(ROWS):
        mean = log_probability(model, prompt, choices[0], mean=True)
        assert float(found[i, 1]) == pytest.approx(mean, abs=1e-4)
        assert float(found[i].exp().sum()) == pytest.approx(1, abs=1e-5)
        expected = reference(model, prompt, [7])[0]
        torch.testing.assert_close(nexts[i], expected, rtol=1e-4, atol=1e-4)


def test_tokens_of_a_prompt_that_its_choices_do_not_share(models):
    """As where a tokenizer joins the prompt's end and an answer's beginning: they count for nothing."""
    arch, parts = taken_apart(models[2])
    row = Answers([1, 12, 30], [([7, 55, 40, 2], 2), ([9, 8, 33, 2], 1)])
    found = run(arch, parts.stem, list(enumerate(parts.layers)), make_batch([row], CHOOSE, False))
    expected = [
        log_probability(models[2], [1, 12, 30, 7, 55], [40, 2]),
        log_probability(models[2], [1, 12, 30, 9], [8, 33, 2]),
    ]
    assert found[0].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_equal_tokens_are_decided_as_argmax_does():
    from rmm_lab.families.causal_lm_run import lead

    scores = torch.tensor([[1.0, 2.0, 2.0, 0.0]]).repeat(3, 1)
    found = lead(scores, torch.tensor([1, 2, 0]))
    assert scores.argmax(-1).tolist() == [1, 1, 1]
    assert (found > 0).tolist() == [True, False, False]
    assert found.tolist() == pytest.approx([0, 0, -1])


def test_a_model_whose_scores_are_no_numbers_is_never_right():
    """torch's argmax takes NaN for the largest of all."""
    arch, parts = taken_apart(hf_model("llama"))
    stem = parts.stem | {"model.norm.weight": torch.full((32,), torch.nan)}
    found = run(arch, stem, list(enumerate(parts.layers)), batch_of(WRITE))
    assert found.argmax(-1).tolist() == [0, 0, 0]


# ------------------------------------------------------------------------------ folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory, models):
    """A base and two experts as transformers saves them; the second expert has no tokenizer."""
    root = tmp_path_factory.mktemp("lms")
    names = ("base", "one", "two")
    return [
        write_lm(root / name, model, tokenizer=name != "two")
        for name, model in zip(names, models, strict=True)
    ]


def pool_of(folders, operators=("weight_average", "ties"), **options) -> LayerPool:
    base, *experts = map(read_checkpoint, folders)
    return LayerPool(base, experts, ("one", "two"), operators, **options)


STEPS = [Step("one", 0), Step("weight_average", 2), Step("two", 2), Step("base", 1)]


def test_a_merged_folder_loads_and_generates(folders, models, tmp_path):
    """By transformers alone, with its usual attention and its cache, word for word as without a cache."""
    pool = pool_of(folders)
    path = LayerPath.of(pool, STEPS, "two")
    folder = path.save_pretrained(tmp_path / "merged", pool)
    files = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {f.name for f in folder.iterdir()} == files | {"generation_config.json"}
    merged = AutoModelForCausalLM.from_pretrained(folder)
    stack, state = stack_of(merged), merged.state_dict()
    own = [model.state_dict() for model in models]
    for name in own[0]:
        if name.startswith(f"{stack}."):
            k = int(name.removeprefix(f"{stack}.").split(".")[0])
            new = [name.replace(f".{k}.", f".{i}.", 1) for i in range(4)]
            if k == 0:
                assert torch.equal(state[new[0]], own[1][name])
            elif k == 1:
                assert torch.equal(state[new[3]], own[0][name])
            else:
                average = (own[1][name] + own[2][name]) / 2
                torch.testing.assert_close(state[new[1]], average, rtol=1e-5, atol=1e-6)
                assert torch.equal(state[new[2]], own[2][name])
        else:
            assert torch.equal(state[name], own[2][name])
    merged.set_attn_implementation("eager")
    out = merged.generate(torch.tensor([[1, 12, 30]]), max_new_tokens=5, do_sample=False)[
        0
    ].tolist()
    plain = [1, 12, 30]
    while len(plain) < 8 and plain[-1] != 2:
        plain.append(int(reference(path.build(pool), plain, [7]).argmax()))
    assert out == plain
    again = read_checkpoint(folder)  # a merged model is a model like any other
    assert again.weights.keys() == {
        n for n in state if merged.config.tie_word_embeddings is False or n != "lm_head.weight"
    }
    (path_again,) = [LayerPath.from_json(json.dumps(again.config["rmm_lab"]["path"]))]
    assert path_again == path


@pytest.mark.parametrize("variant", ["llama", "gpt2", "neox"], indirect=True)
def test_tensors_of_older_files_are_read(folders, models, variant, tmp_path):
    """A trunk without its prefix, buffers that are computed now, a head under its former name."""
    folder = shutil.copytree(folders[1], tmp_path / "old")
    tensors = load_file(folder / "model.safetensors")
    trunk = stack_of(models[0]).partition(".")[0] + "."
    tensors = {n.removeprefix(trunk): t for n, t in tensors.items()}
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    for name in ("h.0.attn.bias", "h.1.attn.masked_bias", "layers.0.attention.bias"):
        tensors[name] = torch.ones(1, 1, 4, 4)
    if "lm_head.weight" in tensors and variant == "neox":
        tensors["embed_out.weight"] = tensors.pop("lm_head.weight")
    save_file(tensors, folder / "model.safetensors")
    found, expected = read_checkpoint(folder).weights, read_checkpoint(folders[1]).weights
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in found)


def test_gpt2s_matrices_lie_as_all_others_do():
    """(out, in) in memory, the other way round in files."""
    model = hf_model("gpt2")
    weights = causal_lm.canonical("m", config_of(model), dict(model.state_dict()))
    assert weights["transformer.h.1.mlp.c_fc.weight"].shape == (40, 32)
    assert weights["transformer.h.1.attn.c_attn.weight"].shape == (96, 32)
    assert causal_lm.fused("attn.c_attn.weight") == 3
    assert weights["transformer.wpe.weight"].shape == (48, 32)


def change(folder, tmp_path, **values):
    out = shutil.copytree(folder, tmp_path / "changed")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | values))
    return out


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_lm(tmp_path_factory.mktemp("llama") / "m", hf_model("llama"))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "mixtral"}, ["mixture of experts", "'mixtral'", "llama", "gpt_neox"]),
        ({"model_type": "phi3"}, ["'phi3'", "gemma2", "not supported"]),
        ({"quantization_config": {"bits": 4}}, ["quantised", "float32"]),
        ({"num_hidden_layers": 4}, ["4 layers", "3"]),
        ({"num_attention_heads": "many"}, ["transformers", "many"]),
        (
            {
                "rope_scaling": {
                    "rope_type": "longrope",
                    "factor": 2.0,
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                }
            },
            ["longrope"],
        ),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, ["'bert'", "llama", "t5"]),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, ["layer's number"]),
    ],
)
def test_models_that_are_not_supported_are_refused_in_a_sentence(llama, tmp_path, values, words):
    with pytest.raises(InputError) as error:
        read_checkpoint(change(llama, tmp_path, **values))
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_a_missing_head_is_named(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"lm_head\.weight"):
        read_checkpoint(folder)


def test_experts_of_another_architecture_are_refused(llama, tmp_path):
    other = change(llama, tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 77.0})
    with pytest.raises(InputError, match=r"77\.0"):
        pool_of([llama, llama, other])
    with pytest.raises(InputError, match="tensor"):
        pool_of([llama, llama, write_lm(tmp_path / "q", hf_model("qwen3"))])
    assert family_of("m", {"model_type": "gemma3_text"}) is causal_lm
