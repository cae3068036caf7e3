"""Operators on factored LoRA adapters: by hand, against dense SVDs of numpy's, and from peft's folders."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import lm_models
import numpy as np
import pytest
import torch
from conftest import shake, write_images, write_model
from safetensors.torch import load_file, save_file
from t5_models import hf_model, write_t5
from torch.testing import assert_close

from rmm_lab import operators as ops
from rmm_lab.__main__ import main
from rmm_lab.errors import InputError
from rmm_lab.families.checkpoint import read_checkpoint
from rmm_lab.families.vit import create
from rmm_lab.formulas.factored import Factored
from rmm_lab.layers import LayerPool
from rmm_lab.operators import parse_operator
from rmm_lab.path import LayerPath
from rmm_lab.search import uniform
from rmm_lab.search.problem import load_problem
from rmm_lab.search.table import RULES

BOTH = (ops.knots_factored, ops.do_merging)


def changes(ranks=(2, 3), shape=(7, 5), seed=0, dtype=torch.float64):
    """A base and the factors of random changes of these ranks."""
    g = torch.Generator().manual_seed(seed)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64).to(dtype)

    pairs = [(random(shape[0], r), random(r, shape[1])) for r in ranks]
    return random(*shape), Factored(tuple(pairs))


def dense(base, experts):
    return torch.stack([base + left @ right for left, right in experts.pairs])


def outer(*pairs):
    """Changes of rank 1, each a column times a row."""
    return Factored(tuple((torch.tensor(c)[:, None], torch.tensor(r)[None]) for c, r in pairs))


# ------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize(
    ("options", "row"),
    [
        ({"density": 1.0}, [2.0, 2.0]),  # signs of 2 - 1 and 1 + 3 are +: [2, (1 + 3) / 2]
        ({"density": 1.0, "merge": "sum"}, [2.0, 4.0]),
        ({"density": 0.5}, [2.0, 3.0]),  # each keeps its larger coordinate alone
        ({"density": 0.5, "scale": 0.5}, [1.0, 1.5]),
    ],
)
def test_knots_by_hand(options, row):
    """Both experts write along (3, 4) / 5, which is the whole basis; coordinates [2, 1] and [-1, 3]."""
    experts = outer(([0.6, 0.8], [2.0, 1.0]), ([0.6, 0.8], [-1.0, 3.0]))
    found = ops.knots_factored(torch.ones(2, 2), experts, **options)
    assert_close(found, 1 + torch.tensor([[0.6], [0.8]]) * torch.tensor(row))


def test_magnitudes_and_directions_by_hand():
    """First columns (3, 4), of length 5, and (0, 1): the mean of 3 times both directions. The second column
    is moved by one expert alone."""
    experts = outer(([3.0, 4.0], [1.0, 0.0]), ([0.0, 1.0], [1.0, 2.0]))
    expected = torch.tensor([[1.8, 0.0], [5.4, 2.0]])
    assert_close(ops.do_merging(torch.zeros(2, 2), experts, steps=0), expected)
    half = ops.do_merging(torch.ones(2, 2), experts, steps=0, scale=0.5)
    assert_close(half, 1 + 0.5 * expected)


# ------------------------------------------------------------------------------ against the dense form


@pytest.mark.parametrize("ranks", [(1,), (2, 2), (1, 3, 2), (6, 7)])
@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("merge", ["mean", "sum"])
def test_knots_equals_ties_in_the_basis_of_numpys_dense_svd(ranks, density, merge):
    base, experts = changes(ranks)
    deltas = [(left @ right).numpy() for left, right in experts.pairs]
    u, s, vh = np.linalg.svd(np.hstack(deltas), full_matrices=False)
    k = int((s > 1e-10 * s[0]).sum())
    assert k == min(5 * len(ranks), 7, sum(min(r, 5) for r in ranks))
    columns = np.split(s[:k, None] * vh[:k], len(ranks), axis=1)  # (K, in) each
    n = max(1, int(density * columns[0].size))
    kept = np.stack([np.where(abs(c) >= np.sort(abs(c), axis=None)[-n], c, 0) for c in columns])
    agree = kept * np.sign(kept.sum(0)) > 0
    total = (kept * agree).sum(0)
    merged = total if merge == "sum" else total / np.maximum(agree.sum(0), 1)
    options = {"density": density, "merge": merge, "scale": 0.7}
    found = ops.knots_factored(base, experts, **options)
    assert_close(found.numpy(), base.numpy() + 0.7 * u[:, :k] @ merged)
    assert_close(found, ops.knots(base, dense(base, experts), **options))


def test_do_merging_equals_plain_gradient_descent_on_dense_matrices():
    """torch's autograd on the objective, and columns of the products one by one."""
    base, experts = changes((2, 3))
    factors = []
    for left, right in experts.pairs:
        u, s, vh = torch.linalg.svd(left @ right, full_matrices=False)
        r = len(right)
        factors.append(((u[:, :r] * s[:r].sqrt()).T, s[:r].sqrt()[:, None] * vh[:r]))
    moved = []
    for rows in zip(*factors, strict=True):  # the B of both, then the A
        start = [row / torch.linalg.matrix_norm(torch.cat(rows), 2) for row in rows]
        now = [row.clone() for row in start]
        for _ in range(20):
            now = [row.detach().requires_grad_() for row in now]
            pairs = [(i, j) for i in range(2) for j in range(2) if i != j]
            loss = sum((now[i] @ now[j].T).square().sum() for i, j in pairs)
            loss = loss + 0.3 * sum((a - b).square().sum() for a, b in zip(now, start, strict=True))
            slopes = torch.autograd.grad(loss, now)
            now = [a - slope / 12.6 for a, slope in zip(now, slopes, strict=True)]
        moved.append([row.detach() * torch.linalg.matrix_norm(torch.cat(rows), 2) for row in now])
    products = torch.stack([b.T @ a for b, a in zip(*moved, strict=True)])  # (2, out, in)
    sizes = products.norm(dim=1)  # (2, in)
    expected = base + 0.4 * sizes.mean(0) * (products / sizes[:, None]).sum(0)
    found = ops.do_merging(base, experts, gamma=0.3, steps=20, scale=0.4)
    assert_close(found, expected)
    assert not torch.allclose(found, ops.do_merging(base, experts, steps=0, scale=0.4), atol=1e-3)


@pytest.mark.parametrize("operator", BOTH)
def test_only_the_product_counts_not_how_it_is_split(operator):
    base, experts = changes()
    g = torch.Generator().manual_seed(5)
    other = []
    for left, right in experts.pairs:
        m = torch.randn(len(right), len(right), generator=g, dtype=torch.float64)
        other.append((left @ m, torch.linalg.inv(m) @ right))
    assert_close(operator(base, experts), operator(base, Factored(tuple(other))))
    padded = tuple(
        (torch.nn.functional.pad(b, (0, 2)), torch.nn.functional.pad(a, (0, 0, 0, 2)))
        for b, a in experts.pairs
    )
    assert_close(operator(base, experts), operator(base, Factored(padded)))


@pytest.mark.parametrize("operator", BOTH)
def test_equal_adapters_and_those_that_change_nothing(operator):
    base, experts = changes((2,))
    twice = Factored(experts.pairs * 2)
    options = {"density": 1.0} if operator is ops.knots_factored else {"scale": 0.5, "steps": 0}
    assert_close(operator(base, twice, **options), dense(base, experts)[0])
    none = Factored.of(base, [base, base], [None, None])
    assert torch.equal(operator(base, none), base)
    with_none = Factored((*experts.pairs, *none.pairs))
    options = {"density": 1.0} if operator is ops.knots_factored else {}
    assert_close(operator(base, with_none, **options), dense(base, experts)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("operator", BOTH)
def test_the_result_has_the_bases_dtype(operator, dtype):
    base, experts = changes(dtype=torch.float32)
    found = operator(base.to(dtype), experts)
    assert found.dtype == dtype
    assert_close(found.float(), operator(base, experts), atol=0.1, rtol=0.01)


def test_no_decomposition_sees_the_full_matrix(monkeypatch):
    """SVDs are of the size of the ranks, QRs of thin matrices; the dense form decomposes (out, N in)."""
    seen = {"svd": [], "qr": []}

    def counted(name, original):
        def count(a, *args, **options):
            seen[name].append(tuple(a.shape))
            return original(a, *args, **options)

        return count

    for name in seen:
        monkeypatch.setattr(torch.linalg, name, counted(name, getattr(torch.linalg, name)))
    base, experts = changes((2, 3), (60, 80))
    for operator in BOTH:
        operator(base, experts)
    assert seen["svd"]
    assert all(max(shape) <= 5 for shape in seen["svd"])
    assert all(min(shape) <= 5 for shape in seen["qr"])
    seen["svd"].clear()
    ops.knots(base, dense(base, experts))
    assert seen["svd"] == [(60, 160)]


def test_small_changes_of_large_weights_have_no_more_directions_than_ranks():
    """Dense, the rounded sums hold noise in every direction."""
    base, experts = changes((1, 1), (40, 30), dtype=torch.float32)
    small = Factored(tuple((1e-4 * b, a) for b, a in experts.pairs))
    found = ops.knots_factored(1e3 * base, small, density=1.0) - 1e3 * base
    exact = ops.knots_factored(0 * base, small, density=0.3)
    double = Factored(tuple((b.double(), a.double()) for b, a in small.pairs))
    assert_close(exact, ops.knots_factored(0 * base.double(), double, density=0.3).float())
    assert torch.linalg.matrix_rank(exact) == 2
    assert found.shape == base.shape


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("operator", BOTH)
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda b, e: (b, torch.stack([b, b])), "Factored changes.*a Tensor"),
        (lambda b, e: (b[0], e), r"expected a matrix.*shape \(5,\)"),
        (lambda b, e: (b, Factored(())), "1 or more LoRA adapters"),
        (lambda b, e: (b[:6], e), r"\(6, 5\), found \(7, 2\) and \(2, 5\) of expert 1"),
        (lambda b, e: (b, Factored((e.pairs[0], (e.pairs[1][0] * torch.nan, e.pairs[1][1])))),
         "NaN or infinity of expert 2"),
    ],
)  # fmt: skip
def test_what_is_no_factored_change_of_the_base_is_refused(operator, spoil, words):
    with pytest.raises(InputError, match=words):
        operator(*spoil(*changes()))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("knots_factored:density=0", "option density"),
        ("knots_factored:merge=max", "option merge"),
        ("do_merging:gamma=-1", "option gamma"),
        ("do_merging:steps=0.5", "option steps"),
        ("do_merging:density=1", "once each, out of gamma, scale, steps"),
    ],
)
def test_options_are_checked_and_read(text, words):
    with pytest.raises(InputError, match=words):
        parse_operator(text)
    name, _, option = text.partition(":")
    if option.partition("=")[0] in ("merge", "gamma", "steps"):
        base, experts = changes()
        right = {"merge": "sum", "gamma": 0.5, "steps": 3.0}[option.partition("=")[0]]
        spec = parse_operator(f"{name}:{option.partition('=')[0]}={right}")
        assert parse_operator(spec.name) == spec
        own = getattr(ops, name)(base, experts, **dict(spec.options))
        assert torch.equal(spec(base, experts), own)


# --------------------------------------------------------------------------------- peft's adapters


def adapters(tmp_path, model, base, *options):
    """Checkpoints of adapters of peft's with random matrices, one for each set of options."""
    peft = pytest.importorskip("peft")
    found = []
    for i, own in enumerate(options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = peft.get_peft_model(
                copy.deepcopy(model), peft.LoraConfig(**{"r": 2, "lora_alpha": 3} | own)
            )
            shake((p for p in adapted.parameters() if p.requires_grad), 10 + i)
            adapted.save_pretrained(tmp_path / f"lora{i}", save_embedding_layers=False)
        found.append(read_checkpoint(tmp_path / f"lora{i}", base=base))
    return found


def timm_vit(tmp_path):
    base = read_checkpoint(write_model(tmp_path / "base", 0))
    model = create(base.config, depth=None, num_classes=3)
    model.load_state_dict(base.weights)
    return model, base


def transformers_vit(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = ViTForImageClassification(
        ViTConfig(
            **size,
            intermediate_size=32,
            image_size=16,
            patch_size=8,
            num_labels=3,
            layer_norm_eps=1e-6,
        )
    )
    model.save_pretrained(tmp_path / "base")
    return model, read_checkpoint(tmp_path / "base")


def t5(tmp_path):
    model = hf_model("t5", 1)
    return model, read_checkpoint(write_t5(tmp_path / "base", model))


def lm(variant):
    def made(tmp_path):
        model = lm_models.hf_model(variant, 1)
        return model, read_checkpoint(lm_models.write_lm(tmp_path / "base", model))

    return made


CASES = {
    "timm, biases": (
        timm_vit,
        {"target_modules": ["qkv", "fc1"], "r": 3, "modules_to_save": ["head"]},
        {"target_modules": ["qkv", "fc2", "proj"], "bias": "lora_only", "use_rslora": True},
    ),
    "transformers' ViT": (
        transformers_vit,
        {"target_modules": r".*attention.*\.(query|q_proj)", "modules_to_save": ["classifier"]},
        {"target_modules": r".*(key|value|k_proj|v_proj|intermediate\.dense|fc1)", "r": 3},
    ),
    "T5, whole modules": (
        t5,
        {"target_modules": ["q", "v"], "modules_to_save": ["final_layer_norm", "wo"]},
        {"target_modules": ["wi", "k"], "alpha_pattern": {"k": 5}, "rank_pattern": {"k": 4}},
    ),
    "Llama": (
        lm("llama"),
        {"target_modules": ["q_proj", "down_proj", "lm_head"]},
        {"target_modules": ["q_proj", "gate_proj", "embed_tokens"], "r": 1},
    ),
    "GPT-2": (
        lm("gpt2"),
        {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "r": 3},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_factors_are_what_an_adapter_adds_and_their_merge_is_that_of_the_whole_matrices(
    tmp_path, case
):
    make, *options = CASES[case]
    model, base = make(tmp_path)
    experts = adapters(tmp_path, model, base, *options)
    for expert in experts:
        assert expert.factors
        for name, (left, right) in expert.factors.items():
            change = expert.weights[name] - base.weights[name]
            assert_close(left @ right, change, atol=1e-5, rtol=1e-4)
            assert change.any()
    pool = LayerPool(base, experts, ("one", "two"), ("knots_factored:density=1", "do_merging"))
    changed = 0
    for k in range(-1, pool.n_layers):
        whole = pool.weights("knots:density=1", k)
        for name, found in pool.weights("knots_factored:density=1", k).items():
            assert_close(found, whole[name], atol=2e-5, rtol=1e-3)
            changed += not torch.equal(found, pool.weights("base", k)[name])
        for name, found in pool.weights("do_merging", k).items():
            assert found.isfinite().all(), name
    assert changed > 2
    halves = LayerPool(base, experts, ("one", "two"), (), unit="sublayer")
    for name, found in halves.weights("knots_factored:density=1", 0).items():
        assert torch.equal(found, pool.weights("knots_factored:density=1", 0)[name])


def test_cut_embeddings_have_cut_factors(tmp_path):
    """An adapter of embeddings that are padded, beside an expert whose rows are fewer."""
    from rmm_lab.families.vocabulary import one_vocabulary

    model = hf_model("t5", 1)
    base = read_checkpoint(write_t5(tmp_path / "base", model))
    [expert] = adapters(tmp_path, model, base, {"target_modules": ["q"]})
    rows, width = base.weights["shared.weight"].shape
    expert.factors["shared.weight"] = torch.randn(rows, 2), torch.randn(2, width)
    model.resize_token_embeddings(rows - 2)
    less = read_checkpoint(write_t5(tmp_path / "less", model))
    _, [cut] = one_vocabulary(less, [expert])
    assert len(cut.factors["shared.weight"][0]) == len(cut.weights["shared.weight"])


# --------------------------------------------------------------------------------- from end to end


def write_adapter(folder: Path, seed: int, rank: int = 2, module: str = "blocks.1.attn.qkv") -> str:
    folder.mkdir()
    config = {"peft_type": "LORA", "lora_alpha": 4, "r": rank}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    g = torch.Generator().manual_seed(seed)
    rows = 48 if module.endswith("qkv") else 64
    shapes = {f"{module}.lora_A.weight": (rank, 16), f"{module}.lora_B.weight": (rows, rank)}
    shapes |= {"head.weight": (3, 16), "head.bias": (3,)}
    tensors = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return str(folder)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "base", 0)
    write_adapter(tmp_path / "e1", 1)
    write_adapter(tmp_path / "e2", 2, rank=3, module="blocks.0.mlp.fc1")
    return [str(write_images(tmp_path / f"i{i}", i)) for i in (1, 2)]


def words(images, *more, experts=("e1", "e2")):
    own = ["--base", "./base", "--experts", *experts, "--images", *images, "--quiet"]
    own += ["--episodes", "4", "--data-fraction", "1", "--preset", "weights", "--run-dir", "run"]
    return [*own, "--operators", "weight_average", *more]


def test_a_run_takes_them_as_actions_and_its_path_is_built_again(folders):
    more = ["knots_factored", "do_merging:steps=3", "--stem", "knots_factored"]
    assert main(words(folders, *more, "--compare", "paper")) == 0
    path = LayerPath.from_json(Path("run/path.json").read_text())
    assert path.stem.source == "knots_factored"
    merged = load_file("run/merged/model.safetensors")
    for name, tensor in path.build().state_dict().items():
        assert torch.equal(merged[name], tensor)


def test_a_table_has_rows_for_adapters_and_for_them_alone(folders):
    names = uniform.OF_ADAPTERS
    assert set(names) <= set(RULES["few"])
    options = {"base": "./base", "images": tuple(folders)}
    found = list(uniform.rule_rows(load_problem(("e1", "e2"), **options), names))
    assert tuple(row.name for row in found) == names
    assert all(row.evaluations and row.sees == "labels" for row in found)
    assert [row.setting.partition(":")[0] for row in found] == ["knots_factored", "do_merging"]
    write_model(Path("whole"), 3)
    assert not list(uniform.rule_rows(load_problem(("e1", "whole"), **options), names))


@pytest.mark.parametrize("option", ["knots_factored", "--stem=do_merging"])
def test_one_whole_model_among_adapters_is_one_sentence(folders, option, capsys):
    write_model(Path("whole"), 3)
    assert main(words(folders, option, experts=("e1", "whole"))) == 2
    error = capsys.readouterr().err.strip()
    assert "expected LoRA adapters" in error
    assert "'whole', which is none" in error
    assert "\n" not in error
    assert not Path("run").exists()


def test_a_pickled_adapter_is_kept_whole_and_has_no_factors(folders, capsys):
    tensors = load_file("e1/adapter_model.safetensors")
    torch.save(tensors, "e1/adapter_model.bin")
    Path("e1/adapter_model.safetensors").unlink()
    assert main(words(folders, "do_merging", "--allow-pickle")) == 2
    assert "in safetensors" in capsys.readouterr().err


def test_an_adapter_that_changes_a_tied_head_is_refused(tmp_path):
    model = lm_models.hf_model("llama-tied", 1)
    folder = lm_models.write_lm(tmp_path / "base", model)
    held = load_file(folder / "model.safetensors")
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()  # some files have a copy
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    rows, width = held["lm_head.weight"].shape
    write_adapter(tmp_path / "lora", 1)
    tensors = {"lm_head.lora_A.weight": torch.ones(2, width)}
    tensors["lm_head.lora_B.weight"] = torch.ones(rows, 2)
    save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"leaves the head \(lm_head.weight\) alone"):
        read_checkpoint(tmp_path / "lora", base=read_checkpoint(folder))
