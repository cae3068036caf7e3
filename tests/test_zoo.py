"""What ships keeps its promises, and a user's own models and pictures go all the way."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data.build import Build
from rmm_lab.errors import InputError
from rmm_lab.families import checkpoint as models
from rmm_lab.families import shipped, t5, vit
from rmm_lab.search import uniform as baselines
from rmm_lab.search.config import configure
from rmm_lab.search.pipeline import train
from rmm_lab.search.problem import load_problem
from rmm_lab.tasks import small_images as render
from rmm_lab.tasks import small_texts as grammar
from rmm_lab.tasks import text_task as texts
from rmm_lab.tasks.image_task import SMALL, InputFormat, Task, data_folder
from rmm_lab.zoo.finetune import Finetune

pytestmark = pytest.mark.slow  # whole models on whole splits


REAL = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def demo():
    return load_problem(("demo",))


def test_data_stay_under_their_limit():
    size = sum(p.stat().st_size for p in data_folder().rglob("*") if p.is_file())
    assert size < 32 * 2**20


VITS = [n for n in shipped.SETS if n not in grammar.TASKS]


@pytest.mark.parametrize("name", VITS)
def test_each_expert_is_at_least_90_percent_on_its_own_test_split(name):
    """By timm alone: create_model on the folder, the whole test split."""
    import timm

    model = timm.create_model(f"local-dir:{shipped.model_folder(name)}", pretrained=True).eval()
    config = json.loads((shipped.model_folder(name) / "config.json").read_text())
    task = Task(shipped.SETS[name], InputFormat.of(config))
    assert config["label_names"] == task.classes
    data = task.split("test")
    with torch.inference_mode():
        found = model((data.images.float() / 255 - 0.5) / 0.5).argmax(-1)
    assert float((found == data.labels).float().mean()) >= 0.90


def test_the_best_uniform_merge_of_the_demo_is_20_points_under_the_experts(demo):
    """The gap that leaves room to search; it is fixed by experts and uniform merges alone."""
    own = [baselines.uniform(demo, n, "test")[i] for i, n in enumerate(demo.pool.names)]
    merges = [
        baselines.uniform(demo, s, "test").mean()
        for s in (
            "weight_average",
            "task_arithmetic:scale=0.6",
            "ties",
            "ties:density=1",
            "dare:scale=0.6",
        )
    ]
    assert max(merges) < np.mean(own) - 0.20
    assert max(merges) > 0.5  # and yet they are no noise


@pytest.mark.parametrize("pair", shipped.PAIRS, ids="+".join)
def test_the_multi_task_models_hold_every_task_of_their_pair(pair):
    """By timm alone: each task's slice of the logits, the whole test split."""
    import timm

    folder = shipped.multi_task_of(pair)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = json.loads((folder / "config.json").read_text())
    for name in pair:
        task = Task(shipped.SETS[name], InputFormat.of(config))
        data = task.split("test")
        with torch.inference_mode():
            logits = model((data.images.float() / 255 - 0.5) / 0.5)
        found = logits[:, slice(*config["rmm_lab"]["heads"][task.name])].argmax(-1)
        assert float((found == data.labels).float().mean()) >= 0.90


def _rows_without_tuning(problem):
    for row in baselines.rows(problem):
        yield row
        if row.name == "multi-task":
            return


@pytest.mark.parametrize("tiny", ["", "tiny-"])
@pytest.mark.parametrize("name", SMALL)
def test_halves_of_a_set_are_a_problem_by_their_names(name, tiny):
    """Base, data, heads and multi-task model are found; the two halves are all classes, each once."""
    pair = (f"{tiny}{name}-first", f"{tiny}{name}-second")
    problem = load_problem(pair)
    assert problem.pool.names == pair
    assert [t.name for t in problem.tasks] == [f"{name}-first", f"{name}-second"]
    assert [c for t in problem.tasks for c in t.classes] == SMALL[name][0]
    assert problem.pool.base.source == f"{tiny}base"
    assert problem.multi_task is not None
    heads = problem.multi_task.config["rmm_lab"]["heads"]
    k = len(SMALL[name][0]) // 2
    assert heads == {f"{name}-first": [0, k], f"{name}-second": [k, 2 * k]}
    swapped = load_problem(pair[::-1])
    assert swapped.multi_task.sha256 == problem.multi_task.sha256
    assert all(n in shipped.SETS for n in pair)
    assert Path(shipped.locate(pair[1])) == data_folder() / "models" / "vit" / pair[1]


def test_experts_of_two_sizes_are_refused():
    with pytest.raises(InputError, match="tiny-digits-second"):
        load_problem(("digits-first", "tiny-digits-second"))


def test_an_expert_with_the_data_of_the_other_half_is_refused():
    with pytest.raises(InputError, match="'digits:second'"):
        load_problem(("digits-first", "digits-second"), images=("digits:second", "digits:first"))


def test_a_pair_of_halves_with_data_given_has_no_multi_task_model_of_its_own():
    pair = ("digits-first", "digits-second")
    given = load_problem(pair, images=("digits:first", "digits:second"))
    assert given.multi_task is not None  # the same data
    assert load_problem(pair, base="base").multi_task is None


def test_no_task_has_a_glyph_that_the_base_was_trained_on():
    assert not set(render.BASE_GLYPHS) & set(render.LETTERS + render.SYMBOLS + "0123456789")
    for base in ("base", "tiny-base"):
        config = json.loads((shipped.model_folder(base) / "config.json").read_text())
        assert config["label_names"] == list(render.BASE_GLYPHS)


@pytest.mark.parametrize(
    ("base", "least", "most"), [("base", 250_000, 350_000), ("tiny-base", 70_000, 90_000)]
)
def test_the_bases_have_six_layers_of_so_many_weights_in_fp16(base, least, most):
    file = shipped.model_folder(base) / "model.safetensors"
    from safetensors import safe_open

    with safe_open(file, "pt") as stored:
        assert {stored.get_tensor(k).dtype for k in stored.keys()} == {torch.float16}  # noqa: SIM118
    parts = vit.split(models.read_checkpoint(shipped.model_folder(base)).weights)
    assert len(parts.layers) == 6
    n = sum(t.numel() for w in (parts.stem, *parts.layers) for t in w.values())
    assert least < n < most


def test_a_fine_tuned_model_learns_and_leaves_its_base_alone(trained):
    """The fixture's experts were trained by fine_tune: far above chance on their own task only."""
    for i, name in enumerate(trained.pool.names):
        scores = baselines.uniform(trained, name, "test")
        assert scores[i] > 1.5 / len(trained.tasks[i].classes)
    start = trained.pool.base.weights
    again = vit.create(trained.pool.base.config, depth=None, num_classes=4)
    torch.manual_seed(0)
    again = vit.create(trained.pool.base.config, depth=None, num_classes=4).state_dict()
    assert all(torch.equal(start[k], again[k]) for k in start)


def test_uniform_merges_are_tuned_on_the_reward_split_alone(trained, monkeypatch):
    """A setting that wins on the test split only must lose."""
    scores = {"ties": {"reward": 0.6, "test": 0.2}, "weight_average": {"reward": 0.5, "test": 0.9}}
    monkeypatch.setattr(baselines, "uniform", lambda p, s, split: np.array([scores[s][split]]))
    assert baselines.tune(trained, ("weight_average", "ties")).setting == "ties"


def test_rebuilding_only_an_unknown_model_is_refused():
    with pytest.raises(InputError, match="found 'rigits'"):
        Build(only=("rigits",)).run()


# ----------------------------------------------------------------------------------------- the T5s

QA, MIXED = shipped.TEXT_GROUPS["qa"], shipped.TEXT_GROUPS["mixed"]


@pytest.fixture(scope="module", params=shipped.TEXT_GROUPS)
def language(request):
    return load_problem((request.param,))


def test_every_task_of_the_grammar_is_in_one_group():
    assert sorted(QA + MIXED) == sorted(grammar.TASKS)


@pytest.mark.parametrize("name", grammar.TASKS)
def test_each_t5_expert_is_25_points_above_chance_and_base(name):
    """By transformers alone: every choice's log-probability, on the first 200 rows of the test split."""
    from transformers import AutoTokenizer, T5ForConditionalGeneration

    rows = [json.loads(x) for x in texts.rows_file(name, "test").read_text().splitlines()][:200]
    tokenizer = AutoTokenizer.from_pretrained(shipped.model_folder(name))
    scores = {}
    for model_name in (shipped.TEXT_BASE, name):
        model = T5ForConditionalGeneration.from_pretrained(
            shipped.model_folder(model_name), dtype=torch.float32
        ).eval()
        right: dict[int, list[bool]] = {}
        for row in rows:
            n = len(row["choices"])
            ids = tokenizer(row["input"] + "</s>", return_tensors="pt").input_ids
            labels = tokenizer(
                [c + "</s>" for c in row["choices"]], padding=True, return_tensors="pt"
            )
            wanted = labels.input_ids.masked_fill(labels.attention_mask == 0, -100)
            with torch.inference_mode():
                logits = model(input_ids=ids.expand(n, -1), labels=wanted).logits
            losses = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), wanted, reduction="none"
            ).sum(-1)
            right.setdefault(row["label"], []).append(int(losses.argmin()) == row["label"])
        answers_in_common = len({tuple(row["choices"]) for row in rows}) == 1
        flat = [x for values in right.values() for x in values]
        scores[model_name] = (
            np.mean([np.mean(values) for values in right.values()])  # balanced
            if answers_in_common
            else np.mean(flat)
        )
    chance = 1 / len(rows[0]["choices"])
    assert scores[name] >= chance + 0.25
    assert scores[name] >= scores[shipped.TEXT_BASE] + 0.25


def test_uniform_merges_of_t5s_are_10_points_under_the_experts(language):
    """The gap that leaves room to search, with the settings that tuning finds best."""
    own = [baselines.uniform(language, n, "reward")[i] for i, n in enumerate(language.pool.names)]
    merges = [
        baselines.uniform(language, setting, "reward").mean()
        for setting in (
            "weight_average",
            "task_arithmetic:scale=0.6",
            "ties:density=0.3,scale=1",
            "ties:density=1,scale=1",
            "dare:scale=0.5",
        )
    ]
    assert max(merges) < np.mean(own) - 0.10


def test_the_multi_task_t5s_hold_every_task_of_their_group(language):
    rows = {r.name: r.scores for r in _rows_without_tuning(language)}
    assert min(rows["multi-task"]) >= 0.85
    assert rows["most frequent answer"] == pytest.approx(rows["chance"])  # skewed ones are balanced


def test_every_word_of_the_grammar_is_one_token_of_the_small_t5s():
    fmt = t5.input_format(models.read_checkpoint(shipped.model_folder(shipped.TEXT_BASE)))
    words = {
        word
        for name in grammar.TASKS
        for row in grammar.rows(name, "reward", 300)
        for text in (row["input"], *row["choices"])
        for word in text.split()
    }
    assert [w for w, ids in zip(words, fmt.encode(list(words)), strict=True) if len(ids) != 2] == []


def test_the_small_t5_has_4_and_4_blocks_and_less_than_half_a_million_weights():
    checkpoint = models.read_checkpoint(shipped.model_folder(shipped.TEXT_BASE))
    assert [len(stack) for stack in t5.split(checkpoint.weights).stacks] == [4, 4]
    assert 300_000 < sum(t.numel() for t in checkpoint.weights.values()) < 500_000


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real pictures in {REAL}")
def test_real_pictures_from_fine_tuning_to_a_merged_model(tmp_path, capsys):
    """MNIST and CIFAR-10 as image folders: two experts by our own command, merged and reported."""
    sets = [str(REAL / "mnist_png"), str(REAL / "cifar10_jpg")]
    experts = []
    for name, images, steps in (("mnist", sets[0], 150), ("cifar", sets[1], 200)):
        options = {"steps": steps, "seed": 1, "threads": 1}
        Finetune(base="base", images=(images,), out=tmp_path / name, **options).run()
        experts.append(str(tmp_path / name))
    printed = capsys.readouterr().out
    own = [float(line.split()[1]) for line in printed.splitlines() if "of the test split" in line]
    assert own[0] > 85  # handwritten digits, from 2,400 pictures
    assert own[1] > 25  # ten classes of grey 28 px photographs: well above chance
    run = tmp_path / "run"
    problem = {"base": "base", "experts": tuple(experts), "images": tuple(sets)}
    train(configure(**problem, episodes=24, finalists=3, run_dir=run, quiet=True))
    table = {r["name"]: r["scores"] for r in json.loads((run / "table.json").read_text())}
    assert table["fine-tuned"]["mnist_png"] == pytest.approx(own[0] / 100, abs=0.0006)
    assert table["fine-tuned"]["cifar10_jpg"] == pytest.approx(own[1] / 100, abs=0.0006)
    assert set(table["RMM"]) == {"mnist_png", "cifar10_jpg"}
    import timm

    merged = timm.create_model(f"local-dir:{run / 'merged'}", pretrained=True).eval()
    heads = json.loads((run / "merged" / "config.json").read_text())["rmm_lab"]["heads"]
    assert list(heads.values()) == [[0, 10], [10, 20]]
    # The exported model by timm alone gives the table's number.
    task = Task(sets[0], InputFormat.of(json.loads((run / "merged" / "config.json").read_text())))
    data = task.split("test")
    with torch.inference_mode():
        found = merged((data.images.float() / 255 - 0.5) / 0.5)[:, :10].argmax(-1)
    accuracy = float((found == data.labels).float().mean())
    assert accuracy == pytest.approx(table["RMM"]["mnist_png"], abs=0.0021)
