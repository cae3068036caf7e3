"""Recipes for mergekit: weights by hand, and its own result, tensor by tensor, where it is installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch
import yaml
from lm_models import hf_model, tuned, write_lm, write_texts
from transformers import AutoModelForCausalLM

from rmm_lab.__main__ import main
from rmm_lab.errors import InputError
from rmm_lab.families.checkpoint import read_checkpoint
from rmm_lab.layers import LayerPool
from rmm_lab.path import LayerPath
from rmm_lab.reward import Step, parse_path
from rmm_lab.search.mergekit import recipe, weights_of

MERGEKIT = importlib.util.find_spec("mergekit") is not None
pytestmark = pytest.mark.usefixtures("no_progress_bars")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Variant -> a base and two experts, written when first asked for."""
    made: dict[str, list] = {}

    def of(variant: str):
        if variant not in made:
            root, base = tmp_path_factory.mktemp(variant), hf_model(variant, 1)
            models = {"base": base, "one": tuned(base, 2), "two": tuned(base, 3)}
            made[variant] = [write_lm(root / name, model) for name, model in models.items()]
        return made[variant]

    return of


def pool_of(folders, unit="block", operators=("weight_average",)) -> LayerPool:
    base, *experts = map(read_checkpoint, folders)
    return LayerPool(base, experts, ("one", "two"), operators, unit=unit)


@pytest.mark.parametrize(
    ("step", "weights"),
    [
        (Step("two", 1), [0, 0, 1]),
        (Step("base", -1), [1, 0, 0]),
        (Step("weight_average", 0), [0, 0.5, 0.5]),
        (Step("weighted_average:expert=2,share=0.75", 0), [0, 0.25, 0.75]),
        (Step("task_arithmetic:scale=0.4", 2), [0.2, 0.4, 0.4]),
        (Step("task_arithmetic", 2, (0.3, 0.9)), [-0.2, 0.3, 0.9]),
        (Step("lines:first=0.1,last=0.7", 2), [-0.4, 0.7, 0.7]),
        (Step("lines:first=0.1,last=0.7", -1), [0.8, 0.1, 0.1]),
    ],
)
def test_weights_by_hand(folders, step, weights):
    assert weights_of(step, pool_of(folders("llama"))) == pytest.approx(weights)


@pytest.mark.parametrize(
    ("text", "unit", "words"),
    [
        ("one@0 ties@1", "block", ["ties", "layer 1"]),
        ("tsv@-1 one@0", "block", ["tsv", "stem"]),
        ("", "block", ["none"]),
        ("one@0 one@1 two@2", "sublayer", ["a part of layer 1"]),
        ("one@1 one@0", "sublayer", ["whole blocks"]),
    ],
)
def test_what_cannot_be_said_is_named(folders, text, unit, words):
    pool = pool_of(folders("llama"), unit)
    with pytest.raises(InputError) as error:
        recipe(LayerPath.of(pool, parse_path(text)), pool)
    assert all(word in str(error.value) for word in words)


def test_scales_of_merges_that_look_at_inputs_are_not_said(folders):
    pool = pool_of(folders("llama"), operators=("least_squares:fit=whole",))
    assert weights_of(Step("task_arithmetic", 0, (0.5, 0.25, 0.0)), pool) == [0.25, 0.5, 0.25]
    with pytest.raises(InputError, match="least_squares"):
        weights_of(Step("task_arithmetic", 0, (0.5, 0.25, 0.1)), pool)


def test_kinds_of_attention_that_change_place_are_refused(folders):
    """mergekit copies config.json's list of them."""
    pool = pool_of(folders("gemma2"))
    assert "slices" in recipe(LayerPath.of(pool, parse_path("one@0 two@1 base@2")), pool)
    for text in ("one@0 two@2 base@2", "one@0 two@1"):
        with pytest.raises(InputError, match="layer_types"):
            recipe(LayerPath.of(pool, parse_path(text)), pool)


@pytest.mark.parametrize(("variant", "words"), [("neox", "GPT-NeoX"), ("llama-tied", "biases")])
def test_models_that_mergekit_does_not_write_whole_are_refused(folders, variant, words):
    pool = pool_of(folders(variant))
    with pytest.raises(InputError, match=words):
        recipe(LayerPath.of(pool, parse_path("one@0 two@1 one@2")), pool)


def test_vits_and_t5s_are_refused(problem):
    with pytest.raises(InputError, match="timm ViT"):
        recipe(LayerPath.of(problem.pool, parse_path("ties@0")), problem.pool)


def test_the_stem_is_in_the_first_and_the_last_slice(folders):
    """Read as YAML: embeddings before the layers, norm and head behind them, all else the layer's own."""
    pool = pool_of(folders("llama"))
    path = LayerPath.of(pool, parse_path("task_arithmetic:scale=0.25@-1 one@2 two@0"))
    data = yaml.safe_load(recipe(path, pool))
    assert data["merge_method"] == "linear"
    assert data["parameters"] == {"normalize": False}
    first, last = (part["sources"] for part in data["slices"])
    assert [s["layer_range"] for s in first] == [[2, 3]] * 3
    assert [s["layer_range"] for s in last] == [[0, 1]] * 3
    assert [s["model"] for s in first] == [str(f.resolve()) for f in folders("llama")]
    names = [rule["filter"] for rule in last[0]["parameters"]["weight"][:-1]]
    assert names == [".norm.", "lm_head."]
    found = [[rule["value"] for rule in s["parameters"]["weight"]] for s in first]
    assert found == [[0.5, 0.0], [0.25, 1.0], [0.25, 0.0]]


PATHS = {
    "llama": ("block", "weight_average@-1 one@0 task_arithmetic:scale=0.3/0.9@0 two@2 one@1"),
    "gpt2": ("sublayer", "base@-1 one@0 two@1 weight_average@4 one@5"),
    "qwen3": ("block", "two@-1 one@0 base@1 weight_average@2"),
}


@pytest.mark.skipif(not MERGEKIT, reason="mergekit is not installed")
@pytest.mark.slow
@pytest.mark.parametrize("variant", PATHS)
def test_mergekit_makes_the_same_model(folders, variant, tmp_path):
    unit, text = PATHS[variant]
    pool = pool_of(folders(variant), unit)
    path = LayerPath.of(pool, parse_path(text))
    (tmp_path / "r.yaml").write_text(recipe(path, pool))
    command = [sys.executable, "-m", "mergekit.scripts.run_yaml"]
    command += [str(tmp_path / "r.yaml"), str(tmp_path / "theirs")]
    subprocess.run(command, check=True, capture_output=True)
    folder = path.save_pretrained(tmp_path / "ours", pool)
    ours, theirs = map(AutoModelForCausalLM.from_pretrained, (folder, tmp_path / "theirs"))
    expected, found = ours.state_dict(), theirs.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_the_command_writes_a_recipe_or_says_why_not(folders, tmp_path, capsys):
    base, *experts = map(str, folders("llama"))
    texts = [str(write_texts(tmp_path / f"t{i}", i, "choices", n=6)) for i in (1, 2)]
    command = ["merge", "--base", base, "--experts", *experts, "--texts", *texts]
    command += ["--preset", "agent", "--episodes", "2", "--compare", "paper", "--finalists", "0"]
    command += ["--export", "mergekit", "--threads", "1", "--operators"]
    for operator, written in (("weight_average", True), ("dare", False)):
        run = tmp_path / operator
        stem = ["--stem", operator, "--run-dir", str(run)]
        assert main([*command, operator, *stem]) == 0
        assert (run / "mergekit.yaml").is_file() == written
        said = "mergekit-yaml" if written else "--export mergekit: expected steps"
        assert said in capsys.readouterr().out
        card = (run / "merged" / "README.md").read_text()
        assert "pipeline_tag: text-generation" in card
        assert "| RMM (agent)" in card
