"""A path as JSON, as a timm model and as a folder; the oracle is timm with tensors copied by hand."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from conftest import TINY, random_weights, write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from rmm_lab.errors import InputError
from rmm_lab.families import checkpoint as models
from rmm_lab.families import vit_run as vit_family
from rmm_lab.families.checkpoint import read_checkpoint
from rmm_lab.layers import LayerPool
from rmm_lab.path import SCHEMA, LayerPath, Origin
from rmm_lab.reward import Step, split_stem

OPERATORS = ("weight_average", "ties", "dare")
PATHS = {
    name: tuple(Step(source, k) for source, k in steps)
    for name, steps in {
        "plain": [("one", 0), ("two", 1), ("weight_average", 2)],
        "repeats": [("one", 0), ("one", 0), ("two", 1), ("one", 0)],
        "skips": [("two", 2)],
        "back-stack": [("one", 0), ("weight_average", 1), ("two", 0)] * 2,
        "empty": [],
    }.items()
}


@pytest.fixture(scope="module")
def pool(tiny) -> LayerPool:
    base, *experts = (read_checkpoint(f) for f in (tiny["base"], *tiny["experts"]))
    return LayerPool(base, experts, ("one", "two"), OPERATORS, seed=4)


@pytest.fixture(params=PATHS)
def path(request, pool) -> LayerPath:
    return LayerPath.of(pool, PATHS[request.param], "base")


def images(n: int = 4) -> torch.Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def by_hand(tiny, steps) -> VisionTransformer:
    """timm's model of a path over the base's stem, from the files, without any code of ours."""
    base, one, two = (load_file(f"{f}/model.safetensors") for f in (tiny["base"], *tiny["experts"]))
    average = {n: (one[n] + two[n]) / 2 for n in base}
    sources = {"one": one, "two": two, "weight_average": average}
    weights = {n: t for n, t in base.items() if not n.startswith(("blocks.", "head."))}
    for name in ("head.weight", "head.bias"):
        weights[name] = torch.cat([one[name], two[name]])
    for j, (source, k, _) in enumerate(steps):
        for name, tensor in sources[source].items():
            if name.startswith(f"blocks.{k}."):
                weights[name.replace(f"blocks.{k}.", f"blocks.{j}.", 1)] = tensor
    args = TINY["model_args"] | {"depth": len(steps), "num_classes": 6}
    model = timm.create_model(TINY["architecture"], **args).eval()
    model.load_state_dict(weights)
    return model


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(images())


# -------------------------------------------------------------------------------------------- JSON

TEXT = st.text(max_size=8)
ORIGIN = st.builds(Origin, name=TEXT, source=TEXT, sha256=TEXT)
SCALES = st.lists(st.floats(-2, 2), max_size=3).map(tuple)
LAYER_PATHS = st.builds(
    LayerPath,
    steps=st.lists(st.builds(Step, TEXT, st.integers(0, 99), SCALES), max_size=12).map(tuple),
    base=ORIGIN,
    experts=st.lists(ORIGIN, max_size=3).map(tuple),
    operators=st.lists(TEXT, max_size=3).map(tuple),
    scope=TEXT,
    seed=st.integers(0, 2**63),
    stem=st.builds(Step, TEXT, st.just(-1), SCALES),
)


@given(LAYER_PATHS)
@settings(max_examples=40, deadline=None)
def test_json_round_trip(path):
    text = path.to_json()
    assert LayerPath.from_json(text) == path
    assert text.endswith("}\n")
    data = json.loads(text)
    assert data["schema"] == SCHEMA == "rmm_lab/layer-path/1"
    plain = [{"layer": s.layer, "source": s.source} for s in path.steps if not s.scales]
    assert [step for step in data["steps"] if "scales" not in step] == plain
    assert data["seed"] == path.seed


@pytest.mark.parametrize("text", ["0.31/0.55", "-0.2/1.5", "1e-05/0"])
def test_a_path_of_scales_of_an_older_file_is_read(pool, text):
    """There the scales stand in the source; the stem's as well."""
    source, scales = f"task_arithmetic:scale={text}", tuple(map(float, text.split("/")))
    old = altered(
        pool, steps=[{"layer": 0, "source": source}, {"layer": 1, "source": "one"}], stem=source
    )
    path = LayerPath.from_json(old)
    assert path.steps == (Step("task_arithmetic", 0, scales), Step("one", 1))
    assert path.stem == Step("task_arithmetic", -1, scales)
    data = json.loads(path.to_json())
    assert data["steps"][0] == {"layer": 0, "source": "task_arithmetic", "scales": list(scales)}
    assert (data["stem"], data["stem_scales"]) == ("task_arithmetic", list(scales))
    assert LayerPath.from_json(path.to_json()) == path
    expected = pool.assemble((Step(source, -1), Step(source, 0), Step("one", 1)))
    for name, tensor in path.build(pool).state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name])


def test_one_scale_for_all_experts_stays_in_the_source(pool):
    source = "task_arithmetic:scale=0.5"
    path = LayerPath.from_json(altered(pool, steps=[{"layer": 0, "source": source}], stem=source))
    assert (path.steps, path.stem) == ((Step(source, 0),), Step(source, -1))


def test_a_paths_stem_is_its_first_step_or_the_one_named(pool):
    steps = (Step("one", 0), Step("ties", 1))
    for path, stem in ((steps, "two"), ((Step("two", -1), *steps), "base")):
        made = LayerPath.of(pool, path, stem)
        assert (made.stem, made.steps) == (Step("two", -1), steps)
        assert made.path == (Step("two", -1), *steps)
    assert LayerPath.of(pool, steps).stem == Step("base", -1)


def test_the_stem_is_split_from_the_layers():
    stem, layers = Step("ties", -1, (0.3, 0.5)), (Step("one", 0), Step("two", 1))
    assert split_stem((stem, *layers), "one") == (stem, layers)
    assert split_stem(layers, "one") == (Step("one", -1), layers)
    assert split_stem((stem,)) == (stem, ())
    assert split_stem(()) == (Step("base", -1), ())


def test_json_names_everything_that_is_needed(pool, tiny):
    data = json.loads(LayerPath.of(pool, PATHS["plain"], "ties").to_json())

    def origin(name, folder):
        with open(f"{folder}/model.safetensors", "rb") as stream:
            sha256 = hashlib.sha256(stream.read()).hexdigest()
        return {"name": name, "source": folder, "sha256": sha256}

    assert data == {
        "schema": "rmm_lab/layer-path/1",
        "steps": [
            {"layer": 0, "source": "one"},
            {"layer": 1, "source": "two"},
            {"layer": 2, "source": "weight_average"},
        ],
        "base": origin("base", tiny["base"]),
        "experts": [origin(n, f) for n, f in zip(("one", "two"), tiny["experts"], strict=True)],
        "operators": list(OPERATORS),
        "scope": "layer",
        "seed": 4,
        "stem": "ties",
        "unit": "block",
    }


def altered(pool, **changes) -> str:
    """A path's JSON with some keys changed; None takes a key away."""
    data = json.loads(LayerPath.of(pool, PATHS["plain"], "base").to_json()) | changes
    return json.dumps({k: v for k, v in data.items() if v is not None})


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "3", '"path"', "{}"])
def test_what_is_no_path_is_refused(text):
    with pytest.raises(InputError, match="layer path"):
        LayerPath.from_json(text)


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": None},
        {"schema": "rmm_lab/layer-path/2"},
        {"steps": None},
        {"steps": 3},
        {"steps": [0, 1]},
        {"steps": [{"layer": 0}]},
        {"steps": [{"source": "one"}]},
        {"steps": [{"layer": "first", "source": "one"}]},
        {"steps": [{"layer": None, "source": "one"}]},
        {"base": None},
        {"base": {"name": "base", "source": "x"}},
        {"experts": [{"name": "one", "source": "x", "sha256": "y", "more": 1}]},
        {"experts": None},
        {"operators": None},
        {"scope": None},
        {"seed": None},
        {"stem": None},
        {"more": 1},
    ],
    ids=json.dumps,
)
def test_another_schema_is_refused(pool, changes):
    assert LayerPath.from_json(altered(pool)).steps == PATHS["plain"]  # unless it is changed
    with pytest.raises(InputError, match="layer path"):
        LayerPath.from_json(altered(pool, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": [{"layer": 1.7, "source": "one"}]},
        {"steps": [{"layer": "0", "source": "one"}]},
        {"steps": [{"layer": True, "source": "one"}]},
        {"steps": [{"layer": -1, "source": "one"}]},
        {"steps": [{"layer": 0, "source": 5}]},
        {"seed": "4"},
        {"stem": 3},
        {"operators": "ties"},
        {"steps": [{"layer": 0, "source": "task_arithmetic", "scales": 0.3}]},
        {"steps": [{"layer": 0, "source": "task_arithmetic", "scales": ["0.3", "0.4"]}]},
        {"steps": [{"layer": 0, "source": "task_arithmetic:scale=a/b"}]},
        {"stem_scales": [True, False]},
    ],
    ids=json.dumps,
)
def test_values_of_other_types_are_refused(pool, changes):
    with pytest.raises(InputError, match="layer path"):
        LayerPath.from_json(altered(pool, **changes))


def test_unknown_sources_and_scopes_are_refused_when_built(pool):
    for changes in (
        {"steps": [{"layer": 0, "source": "three"}]},
        {"stem": "three"},
        {"stem_scales": [0.5, 0.5]},  # of the base
        {"steps": [{"layer": 0, "source": "task_arithmetic", "scales": [0.5]}]},
        {"scope": "model"},
        {"operators": ["tiess"]},
    ):
        with pytest.raises(InputError):
            LayerPath.from_json(altered(pool, **changes)).build()


@pytest.mark.parametrize("k", [3, 99, -5])
def test_a_layer_that_the_model_lacks_is_refused(pool, k):
    with pytest.raises(InputError):
        dataclasses.replace(LayerPath.of(pool, ()), steps=(Step("one", k),)).build(pool)


# -------------------------------------------------------------------------------------- the model


def test_built_from_json_alone_it_equals_timm_by_hand(tiny, path):
    model = LayerPath.from_json(path.to_json()).build()
    assert type(model) is VisionTransformer
    assert len(model.blocks) == len(path.steps)
    assert not model.training
    expected = logits(by_hand(tiny, path.steps))
    assert expected.shape == (4, 6)
    torch.testing.assert_close(logits(model), expected)


def test_paths_are_different_models(pool):
    found = [logits(LayerPath.of(pool, steps, "base").build(pool)) for steps in PATHS.values()]
    for i, one in enumerate(found):
        assert all((one - other).abs().max() > 1e-3 for other in found[:i])


@pytest.mark.parametrize("stem", ["base", "one", "ties", "dare_ties"])
def test_built_from_json_alone_it_equals_the_pieces(pool, stem):
    steps = tuple(Step(*s) for s in [("dare", 0), ("ties", 1), ("dare", 0), ("two", 2)])
    model = LayerPath.from_json(LayerPath.of(pool, steps, stem).to_json()).build()
    vit, trunk = pool.architecture, pool.stem(stem)
    tokens = vit.embed(trunk, images())
    for step in steps:
        tokens = vit.apply(pool.layer(*step), tokens)
    pieces = torch.cat([vit.logits(trunk, tokens, pool.heads[n]) for n in ("one", "two")], dim=1)
    torch.testing.assert_close(logits(model), pieces)


@pytest.mark.parametrize("scope", ["layer", "tensor", "global"])
def test_a_random_path_is_rebuilt_to_the_bit(pool, scope):
    own = LayerPool(pool.base, pool.experts, pool.names, ("dare",), scope=scope, seed=11)
    for k in (2, 0):  # whatever was asked for before
        own.layer("dare", k)
    path = LayerPath.of(own, [Step("dare", 0), Step("dare", 2), Step("dare", 0)], "dare_ties")
    expected = path.build(own).state_dict()
    found = LayerPath.from_json(path.to_json()).build().state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    other = dataclasses.replace(path, seed=12).build().state_dict()
    name = "blocks.0.mlp.fc1.weight"
    assert (other[name] != expected[name]).float().mean() > 0.1  # the seed is what does it


@pytest.mark.slow
def test_another_process_draws_the_same_masks(pool):
    steps = [Step("dare", 1)]
    weights = pool.weights("dare", 1)["mlp.fc1.weight"]
    program = (
        "import sys, hashlib; from rmm_lab.path import LayerPath; "
        "pool = LayerPath.from_json(sys.stdin.read()).load_pool(); "
        "w = pool.weights('dare', 1)['mlp.fc1.weight']; "
        "print(hashlib.sha256(w.numpy().tobytes()).hexdigest())"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        input=LayerPath.of(pool, steps, "base").to_json(),
        env=os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert found.stdout.strip() == hashlib.sha256(weights.numpy().tobytes()).hexdigest()


# ------------------------------------------------------------------------------------- the folder


def reload(folder) -> VisionTransformer:
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def test_a_saved_path_is_loaded_by_timm(tiny, tmp_path, path):
    assert path.save_pretrained(tmp_path / "merged") == tmp_path / "merged"
    model = reload(tmp_path / "merged")
    assert type(model) is VisionTransformer
    assert len(model.blocks) == len(path.steps)
    expected = by_hand(tiny, path.steps)
    assert model.state_dict().keys() == expected.state_dict().keys()
    torch.testing.assert_close(logits(model), logits(expected))
    assert torch.equal(logits(model), logits(path.build()))


def test_a_repeated_layer_is_a_copy(pool, tmp_path):
    path = LayerPath.of(pool, PATHS["repeats"], "base")
    model = reload(path.save_pretrained(tmp_path / "merged", pool))
    for built in (model, path.build(pool)):
        starts = [p.data_ptr() for p in built.parameters()]
        assert len(set(starts)) == len(starts)
        before = logits(built)
        kept = built.blocks[1].mlp.fc1.weight.clone()
        assert torch.equal(built.blocks[0].mlp.fc1.weight, kept)
        with torch.no_grad():
            built.blocks[0].mlp.fc1.weight.add_(1.0)
        assert torch.equal(built.blocks[1].mlp.fc1.weight, kept)
        assert torch.equal(built.blocks[3].mlp.fc1.weight, kept)
        assert not torch.equal(logits(built), before)
    # and a built model may be trained without changing the pool
    assert torch.equal(
        pool.weights("one", 0)["mlp.fc1.weight"],
        load_file(pool.experts[0].folder / "model.safetensors")["blocks.0.mlp.fc1.weight"],
    )


def test_config_json_carries_heads_labels_and_the_path(pool, tmp_path):
    path = LayerPath.of(pool, PATHS["back-stack"], "ties")
    path.save_pretrained(tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text("utf-8"))
    assert config["rmm_lab"]["heads"] == {"one": [0, 3], "two": [3, 6]}
    assert config["label_names"] == [f"{t}/class{i}" for t in ("one", "two") for i in range(3)]
    assert LayerPath.from_json(json.dumps(config["rmm_lab"]["path"])) == path
    assert config["num_classes"] == 6
    assert config["model_args"]["depth"] == 6
    assert config["architecture"] == TINY["architecture"]
    assert config["pretrained_cfg"]["mean"] == [0.5]
    files = {p.name for p in (tmp_path / "merged").iterdir()}
    assert files == {"config.json", "model.safetensors"}
    # The slices are right: each head is its expert's.
    head = load_file(tmp_path / "merged" / "model.safetensors")["head.weight"]
    for expert, (start, stop) in zip(pool.experts, [(0, 3), (3, 6)], strict=True):
        own = load_file(expert.folder / "model.safetensors")["head.weight"]
        assert torch.equal(head[start:stop], own)


def test_heads_of_different_sizes_and_without_label_names(tmp_path):
    base = write_model(tmp_path / "base", 0)
    weights = read_checkpoint(base).weights
    body = {n: t for n, t in weights.items() if not n.startswith("head.")}
    write_model(tmp_path / "a", 1, near=body, num_classes=2)
    bare = vit_family.model_config(TINY, depth=3, num_classes=4)
    own = random_weights(2, num_classes=4)
    models.write_checkpoint(tmp_path / "b", bare, own)
    checkpoints = [read_checkpoint(tmp_path / n) for n in "ab"]
    pool = LayerPool(read_checkpoint(base), checkpoints, ("a", "b"), ())
    LayerPath.of(pool, [Step("b", 0)], "b").save_pretrained(tmp_path / "merged", pool)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["rmm_lab"]["heads"] == {"a": [0, 2], "b": [2, 6]}
    assert config["label_names"] == ["a/class0", "a/class1", "b/0", "b/1", "b/2", "b/3"]
    args = TINY["model_args"] | {"depth": 1, "num_classes": 4}
    expected = timm.create_model(TINY["architecture"], **args).eval()
    expected.load_state_dict(
        {n: t for n, t in own.items() if not n.startswith(("blocks.1", "blocks.2"))}
    )
    torch.testing.assert_close(logits(reload(tmp_path / "merged"))[:, 2:], logits(expected))


def test_a_saved_model_can_be_merged_again(pool, tmp_path):
    for name, source in (("a", "one"), ("b", "two")):
        steps = [Step(source, 0), Step(source, 0)]
        LayerPath.of(pool, steps, "base").save_pretrained(tmp_path / name, pool)
    again = [read_checkpoint(tmp_path / name) for name in "ab"]
    assert [c.num_classes for c in again] == [6, 6]
    second = LayerPool(again[0], again, ("a", "b"), ("weight_average",))
    path = LayerPath.of(second, [Step("weight_average", 1)], "base")
    config_folder = path.save_pretrained(tmp_path / "c", second)
    config = json.loads((config_folder / "config.json").read_text())
    assert config["label_names"][6] == "b/one/class0"
    expected = (pool.weights("one", 0), pool.weights("two", 0))
    found = reload(config_folder).blocks[0].mlp.fc2.weight
    torch.testing.assert_close(
        found.detach(), (expected[0]["mlp.fc2.weight"] + expected[1]["mlp.fc2.weight"]) / 2
    )


def test_a_folder_that_is_not_empty_is_refused(pool, tmp_path):
    path = LayerPath.of(pool, PATHS["skips"], "base")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="new or empty"):
        path.save_pretrained(tmp_path, pool)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    path.save_pretrained(str(tmp_path / "empty"), pool)
    with pytest.raises(InputError, match="new or empty"):  # nor is its own result overwritten
        path.save_pretrained(tmp_path / "empty", pool)


def test_a_file_in_the_folders_place_is_refused(pool, tmp_path):
    (tmp_path / "merged").write_text("mine")
    with pytest.raises(InputError):
        LayerPath.of(pool, PATHS["skips"], "base").save_pretrained(tmp_path / "merged", pool)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_changed_weights_are_refused(tiny, tmp_path, which):
    folders = []
    for i, folder in enumerate((tiny["base"], *tiny["experts"])):
        folders.append(shutil.copytree(folder, tmp_path / str(i)))
    base, *experts = map(read_checkpoint, folders)
    path = LayerPath.of(LayerPool(base, experts, ("one", "two")), [Step("one", 0)], "base")
    assert len(path.build().blocks) == 1
    weights = dict([base, *experts][which].weights)
    weights["norm.bias"] = weights["norm.bias"] + 1e-3
    models.write_checkpoint(folders[which], base.config, weights)
    for action in (path.build, lambda: path.save_pretrained(tmp_path / "merged")):
        with pytest.raises(InputError, match=rf"{which}'.*changed since"):
            action()
    assert not (tmp_path / "merged").exists()
