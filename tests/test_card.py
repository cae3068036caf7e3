"""A merged model's README.md, read by the Hub's own library."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
from huggingface_hub import ModelCard

from rmm_lab.families.checkpoint import read_checkpoint
from rmm_lab.layers import LayerPool
from rmm_lab.path import LayerPath
from rmm_lab.reward import parse_path
from rmm_lab.search.card import card, licence_of


def pool_of(tiny, tmp_path, licences, sources=("hf-hub:me/base", "hf-hub:me/one@v2", "two")):
    """The tiny ViTs under other names, each with a README that states a licence, or without one."""
    models = []
    for i, folder in enumerate((tiny["base"], *tiny["experts"])):
        own = shutil.copytree(folder, tmp_path / f"m{i}")
        if licences[i]:
            (own / "README.md").write_text(
                f"---\ntags:\n- x\nlicense: {licences[i]}\n---\nlicense: no\n"
            )
        models.append(dataclasses.replace(read_checkpoint(own), source=sources[i]))
    return LayerPool(models[0], models[1:], ("one", "two"), ("ties",))


def card_of(pool, table=""):
    path = LayerPath.of(pool, parse_path("ties@-1 one@0 two@2 ties@1"))
    text = card(path, pool, table)
    return text, ModelCard(text).data.to_dict()


def test_what_the_hub_reads(tiny, tmp_path):
    text, data = card_of(pool_of(tiny, tmp_path, ["mit", '"mit"', "mit"]), "| method | a |")
    assert data == {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "base_model": ["me/base", "me/one"],
        "base_model_relation": "merge",
        "license": "mit",
        "tags": ["merge", "rmm_lab"],
    }
    assert "    ties@-1 one@0 two@2 ties@1" in text
    assert "| method | a |" in text
    assert str(tmp_path) not in text  # folders of this machine are nobody's business
    assert "me/one@v2" in text


def test_it_says_whose_the_scales_are(tiny, tmp_path):
    pool = pool_of(tiny, tmp_path, ["mit"] * 3)
    path = LayerPath.of(pool, parse_path("task_arithmetic:scale=0.3/0.5@-1 one@0"))
    assert "The scales are of one, two, in this order." in card(path, pool, "")
    assert "scales are of" not in card_of(pool)[0]


@pytest.mark.parametrize(
    ("licences", "words"),
    [
        (["mit", "apache-2.0", "mit"], "different licences"),
        (["mit", "", "mit"], "Not every part states"),
        (["", "", ""], "Not every part states"),
    ],
)
def test_licences_that_differ_or_are_not_stated(tiny, tmp_path, licences, words):
    text, data = card_of(pool_of(tiny, tmp_path, licences))
    assert "license" not in data
    assert words in text
    assert "## Scores" not in text
    assert text.count("not stated") == licences.count("")


def test_names_that_the_hub_cannot_look_up_are_no_tags(tiny, tmp_path):
    _, data = card_of(pool_of(tiny, tmp_path, ["", "", ""], ("digits", "one", "two")))
    assert "base_model" not in data


def test_a_licence_in_timms_config(tiny):
    model = read_checkpoint(tiny["base"])
    assert licence_of(model) == "not stated"
    config = model.config | {"pretrained_cfg": {"license": "cc-by-nc-4.0"}}
    assert licence_of(dataclasses.replace(model, config=config)) == "cc-by-nc-4.0"
