"""What ships keeps its promises, and a user's own models and pictures go all the way."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data.build import Build
from rmm_lab.__main__ import main
from rmm_lab.errors import InputError
from rmm_lab.families import checkpoint as models
from rmm_lab.families import shipped, t5, vit
from rmm_lab.search import uniform as baselines
from rmm_lab.search.config import configure
from rmm_lab.search.pipeline import train
from rmm_lab.search.problem import load_problem
from rmm_lab.tasks import small_images as render
from rmm_lab.tasks import small_texts as grammar
from rmm_lab.tasks import small_writing
from rmm_lab.tasks import text_task as texts
from rmm_lab.tasks.image_task import SMALL, InputFormat, Task, data_folder

pytestmark = pytest.mark.slow  # whole models on whole splits


REAL = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def demo():
    return load_problem(("demo",))


def test_data_stay_under_their_limit():
    sizes = [p.stat().st_size for p in data_folder().rglob("*") if p.is_file()]
    assert sum(sizes) < 44 * 2**20
    assert max(sizes) < 4 * 2**20


VITS = [n for n in shipped.SETS if n not in (*grammar.TASKS, *small_writing.TASKS)]


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


def experts_and_merge(problem, scorer, *merges: str) -> tuple[float, float]:
    """Mean scores on the first subset: experts on their own tasks, the best uniform merge."""

    def scores(source: str) -> np.ndarray:
        return scorer.score(baselines.uniform_path(problem, source), 0)

    own = [scores(n)[i] for i, n in enumerate(problem.pool.names)]
    merges = ("weight_average", "task_arithmetic:scale=0.6", *merges)
    return np.mean(own), max(scores(source).mean() for source in merges)


def test_the_best_uniform_merge_of_the_demo_is_20_points_under_the_experts(demo):
    """The gap that leaves room to search; it is fixed by experts and uniform merges alone.

    On a quarter of the reward split: 20 points and three standard errors of its rows.
    """
    scorer = demo.scorer(fraction=0.25)
    rows = np.array([len(scorer.rows(i, 0)) for i in range(2)])
    error = 0.5 * np.sqrt((1 / rows).sum()) / len(rows)  # at most
    merges = ("ties", "ties:density=1", "dare:scale=0.6")
    own, best = experts_and_merge(demo, scorer, *merges)
    assert best < own - 0.20 - 3 * error
    assert best > 0.5  # and yet they are no noise


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


@pytest.mark.parametrize(
    "change", [{"threads": 100_000}, {"seed": -1}, {"steps": 0}, {"text_learning_rate": 2.0}]
)
def test_rebuilding_with_numbers_out_of_range_is_refused(change):
    option = f"--{next(iter(change)).replace('_', '-')}: expected"
    with pytest.raises(InputError, match=option):
        Build(only=("no model",), **change).run()


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


def by_transformers(folder: Path, name: str, n: int | None = None) -> float:
    """A T5's metric on the first n rows of a task's test split, by every choice's log-probability."""
    from transformers import AutoTokenizer, T5ForConditionalGeneration

    model = T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(x) for x in texts.rows_file(name, "test").read_text().splitlines()][:n]
    right: dict[int, list[bool]] = {}
    for start in range(0, len(rows), 100):
        some = rows[start : start + 100]
        asked = tokenizer([r["input"] + "</s>" for r in some], padding=True, return_tensors="pt")
        choices = [c + "</s>" for r in some for c in r["choices"]]
        labels = tokenizer(choices, padding=True, return_tensors="pt")
        wanted = labels.input_ids.masked_fill(labels.attention_mask == 0, -100)
        k = len(choices) // len(some)
        assert {len(r["choices"]) for r in some} == {k}
        with torch.inference_mode():
            states = model.encoder(asked.input_ids, asked.attention_mask).last_hidden_state
            logits = model(
                encoder_outputs=(states.repeat_interleave(k, 0),),
                attention_mask=asked.attention_mask.repeat_interleave(k, 0),
                labels=wanted,
            ).logits
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), wanted, reduction="none"
        ).sum(-1)
        for row, found in zip(some, losses.view(-1, k).argmin(-1).tolist(), strict=True):
            right.setdefault(row["label"], []).append(found == row["label"])
    if len({tuple(row["choices"]) for row in rows}) == 1:  # answers in common: balanced
        return float(np.mean([np.mean(values) for values in right.values()]))
    return float(np.mean([x for values in right.values() for x in values]))


@pytest.mark.parametrize("name", grammar.TASKS)
def test_each_t5_expert_is_25_points_above_chance_and_base(name):
    """By transformers alone, on the first 200 rows of the test split."""
    own, base = (
        by_transformers(shipped.model_folder(n), name, 200) for n in (name, shipped.TEXT_BASE)
    )
    row = json.loads(texts.rows_file(name, "test").read_text().splitlines()[0])
    assert own >= 1 / len(row["choices"]) + 0.25
    assert own >= base + 0.25


def test_uniform_merges_of_t5s_are_10_points_under_the_experts(language):
    """The gap that leaves room to search, with the settings that tuning finds best.

    On a quarter of the reward split: 10 points, and three standard errors of 200 rows for each task.
    """
    scorer = language.scorer(fraction=0.25)
    error = 0.5 / np.sqrt(200 * scorer.n_models)  # at most
    merges = ("ties:density=0.3,scale=1", "ties:density=1,scale=1", "dare:scale=0.5")
    own, best = experts_and_merge(language, scorer, *merges)
    assert best < own - 0.10 - 3 * error


@pytest.mark.parametrize("group", shipped.TEXT_GROUPS)
def test_the_multi_task_t5s_hold_every_task_of_their_group(group):
    """By transformers alone, on the first 400 rows of the test split."""
    names = shipped.TEXT_GROUPS[group]
    folder = shipped.multi_task_of(names)
    assert min(by_transformers(folder, name, 400) for name in names) >= 0.85


def test_the_most_frequent_answer_is_no_better_than_chance(language):
    """Skewed tasks are balanced."""
    found = {r.name: r.scores for r in t5.trivial_rows(language.tasks)}
    assert found["most frequent answer"] == pytest.approx(found["chance"])


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


def every_third(source: Path, folder: Path) -> str:
    """A third of an image folder's pictures, as links."""
    for place in sorted(source.glob("*/*/")):
        part = folder / place.relative_to(source)
        part.mkdir(parents=True)
        for file in sorted(place.iterdir())[::3]:
            (part / file.name).symlink_to(file)
    return str(folder)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real pictures in {REAL}")
def test_real_pictures_from_fine_tuning_to_a_merged_model(tmp_path, capsys):
    """MNIST and CIFAR-10 as image folders: two experts by our own command, merged and reported."""
    sets = [every_third(REAL / n, tmp_path / "data" / n) for n in ("mnist_png", "cifar10_jpg")]
    experts = []
    for name, images, steps in (("mnist", sets[0], "80"), ("cifar", sets[1], "100")):
        argv = ["finetune", "--base", "tiny-base", "--images", images, "--out", tmp_path / name]
        options = ["--learning-rate", "2e-3", "--batch-size", "64", "--seed", "1", "--threads", "1"]
        assert main([*map(str, argv), "--steps", steps, *options]) == 0
        experts.append(str(tmp_path / name))
    printed = capsys.readouterr().out
    own = [float(line.split()[1]) for line in printed.splitlines() if "of the test split" in line]
    assert own[0] > 80  # handwritten digits, from 800 pictures
    assert own[1] > 18  # ten classes of grey 28 px photographs: by chance 10, give or take 1.7
    run = tmp_path / "run"
    problem = {"base": "tiny-base", "experts": tuple(experts), "images": tuple(sets)}
    train(
        configure(
            "weights", **problem, episodes=12, finalists=3, compare="paper", run_dir=run, quiet=True
        )
    )
    table = {r["name"]: r["scores"] for r in json.loads((run / "table.json").read_text())}
    assert table["fine-tuned"]["mnist_png"] == pytest.approx(own[0] / 100, abs=0.0006)
    assert table["fine-tuned"]["cifar10_jpg"] == pytest.approx(own[1] / 100, abs=0.0006)
    assert set(table["agent + CMA-ES"]) == {"mnist_png", "cifar10_jpg"}
    import timm

    merged = timm.create_model(f"local-dir:{run / 'merged'}", pretrained=True).eval()
    heads = json.loads((run / "merged" / "config.json").read_text())["rmm_lab"]["heads"]
    assert list(heads.values()) == [[0, 10], [10, 20]]
    # The exported model by timm alone gives the table's number.
    task = Task(sets[0], InputFormat.of(json.loads((run / "merged" / "config.json").read_text())))
    data = task.split("test")
    with torch.inference_mode():
        found = merged((data.images.float() / 255 - 0.5) / 0.5)[:, :10].argmax(-1)
    right = int((found == data.labels).sum())
    assert right == pytest.approx(table["agent + CMA-ES"]["mnist_png"] * len(data), abs=1.01)
