"""T5s and language models whose embeddings are padded, cut, or grown by new tokens."""

from __future__ import annotations

from pathlib import Path

import lm_models
import pytest
import torch
from t5_models import WORDS, hf_model, tuned, write_t5, write_texts, write_tokenizer
from transformers import T5ForConditionalGeneration

from rmm_lab.__main__ import main
from rmm_lab.errors import InputError
from rmm_lab.families.checkpoint import read_checkpoint, same_form
from rmm_lab.families.vocabulary import one_vocabulary
from rmm_lab.layers import LayerPool
from rmm_lab.path import LayerPath
from rmm_lab.reward import Step

USED = 3 + len(WORDS)  # tokens of the tokenizer; the models have 104 embeddings
NEW = ["<A>", "<B>", "<C>", "<D>", "<E>", "<F>", "<G>", "<H>"]


@pytest.fixture(scope="module")
def start() -> T5ForConditionalGeneration:
    return hf_model("v1.1", 1)


def write(folder: Path, start, seed: int, rows: int, words=()) -> Path:
    """An expert with a number of embeddings, and words in its tokenizer."""
    old, model = tuned(start, seed) if seed else start, hf_model("v1.1", 9, vocab_size=rows)
    for name, parameter in model.named_parameters():
        found = old.get_parameter(name)
        n = min(len(found), len(parameter))
        parameter[:n] = found[:n]
    write_t5(folder, model)
    write_tokenizer(folder, [*WORDS, *words])
    return folder


def read(tmp_path, start, rows, words=((), (), ())):
    base, *experts = (
        read_checkpoint(write(tmp_path / f"m{i}", start, i, r, w))
        for i, (r, w) in enumerate(zip(rows, words, strict=True))
    )
    return base, experts


def test_rows_of_no_token_are_cut(tmp_path, start):
    base, experts = read(tmp_path, start, (104, USED, 102))
    found, same = same_form(base, experts)
    for before, after in zip((base, *experts), (found, *same), strict=True):
        for name, tensor in after.weights.items():
            rows = USED if name in ("shared.weight", "lm_head.weight") else len(tensor)
            assert torch.equal(tensor, before.weights[name][:rows])
        assert after.config["vocab_size"] == USED
    assert any(f"104 embeddings are cut to {USED}" in note for note in found.notes)
    assert not same[0].notes
    again = same_form(found, same)
    assert again[0] is found


def test_new_tokens_that_all_experts_share_are_the_means_in_the_base(tmp_path, start):
    words = NEW[:8]  # 6 more than there are padded rows
    rows = USED + len(words)
    base, experts = read(tmp_path, start, (104, rows, rows), ((), words, words))
    found, same = same_form(base, experts)
    assert same == experts
    for name in ("shared.weight", "lm_head.weight"):
        table = found.weights[name]
        assert torch.equal(
            table[:104], base.weights[name]
        )  # the padded rows are what they began with
        mean = (experts[0].weights[name] + experts[1].weights[name])[104:] / 2
        torch.testing.assert_close(table[104:], mean)
        assert len(table) == rows
    assert found.tokenizer_folder == experts[0].folder
    assert f"the {rows - 104} that it has no row for" in " ".join(found.notes)


def test_new_tokens_in_padded_rows_need_no_new_row(tmp_path, start):
    words = NEW[: 104 - USED]
    base, experts = read(tmp_path, start, (104, 104, 104), ((), words, words))
    found, _ = same_form(base, experts)
    assert all(torch.equal(found.weights[n], t) for n, t in base.weights.items())
    assert found.tokenizer_folder == experts[0].folder


def test_equal_vocabularies_stay_as_they_are(tmp_path, start):
    base, experts = read(tmp_path, start, (104, 104, 104))
    found, same = one_vocabulary(base, experts)
    assert (found, same) == (base, experts)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (((), NEW[:8], NEW[7::-1]), "8 new ones .*<A>"),
        (((), NEW[:8], ()), "8 new ones .*<A>"),
    ],
    ids=["other tokens", "one expert alone"],
)
def test_new_tokens_that_are_not_shared_are_refused(tmp_path, start, words, found):
    rows = [max(104, USED + len(w)) for w in words]
    base, experts = read(tmp_path, start, rows, words)
    with pytest.raises(InputError, match=rf"m1'.*{found}"):
        same_form(base, experts)


def test_too_few_rows_for_the_tokens_are_refused(tmp_path, start):
    base, experts = read(tmp_path, start, (104, 104, 60))
    with pytest.raises(InputError, match=rf"m2'.*{USED} embeddings or more.*found 60"):
        same_form(base, experts)


def test_grown_experts_merge_and_the_result_has_their_tokenizer(tmp_path, start, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = USED + 8
    sizes = {"m0": 104, "m1": rows, "m2": rows}
    folders = [
        write(tmp_path / name, start, i, n, NEW if i else ())
        for i, (name, n) in enumerate(sizes.items())
    ]
    texts = [str(write_texts(tmp_path / f"t{i}", i, fixed=False)) for i in (1, 2)]
    argv = ["--base", str(folders[0]), "--experts", *map(str, folders[1:]), "--texts", *texts]
    argv += ["--preset", "weights", "--episodes", "4", "--data-fraction", "1", "--quiet"]
    assert main([*argv, "--compare", "paper", "--run-dir", "run"]) == 0
    old, new, own = (
        (Path(f) / "tokenizer.json").read_text() for f in (folders[0], folders[1], "run/merged")
    )
    assert own == new != old
    model = T5ForConditionalGeneration.from_pretrained("run/merged")
    assert model.shared.weight.shape == (rows, 16)
    path = LayerPath.from_json(Path("run/path.json").read_text())
    assert torch.equal(path.build().shared.weight, model.shared.weight)


@pytest.mark.parametrize("variant", ["llama", "llama-tied", "gpt2", "neox"])
def test_padded_rows_of_language_models_are_cut(tmp_path, variant):
    """transformers pads them, as training libraries do for speed."""
    models = [lm_models.hf_model(variant, seed) for seed in (1, 2, 3)]
    wide = models[1]
    whole = {name: tensor.clone() for name, tensor in wide.state_dict().items()}
    wide.resize_token_embeddings(128)
    folders = [lm_models.write_lm(tmp_path / str(i), m) for i, m in enumerate(models)]
    base, *experts = map(read_checkpoint, folders)
    found, same = same_form(base, experts)
    assert found is base
    assert same[0].config["vocab_size"] == 100
    assert any("128 embeddings are cut to 100" in note for note in same[0].notes)
    pool = LayerPool(base, experts, ("a", "b"))
    path = LayerPath.of(pool, [Step("a", k) for k in range(pool.n_layers)], "a")
    merged = path.build(pool)
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, whole[name])
