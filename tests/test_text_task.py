"""Tasks of texts: tokens, batches, metrics, and scores against transformers and scikit-learn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score
from t5_models import WORDS, hf_model, pool_of, problem_of, reference, rows_of, text
from transformers import AutoTokenizer, T5ForConditionalGeneration

from rmm_lab.errors import InputError
from rmm_lab.families import t5
from rmm_lab.families.checkpoint import read_checkpoint
from rmm_lab.layers import LayerPool
from rmm_lab.path import LayerPath
from rmm_lab.reward import Step, evaluate, parse_path, predict_all
from rmm_lab.tasks.text_task import TextFormat, TextTask

REAL = Path(__file__).parents[2] / "shared" / "data" / "t5_tokenizer"

# ------------------------------------------------------------------------------------- the scores


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


PATHS = [
    "two@-1 one@0 two@1 one@2 two@3",
    "weight_average@-1 ties@0 ties@0 two@1 weight_average@2 weight_average@2 one@2",
    "two@1 one@3",  # skips; the base's stem
    "one@-1 one@0 two@1",
    "two@-1 one@0 two@1",
    "",
]


@pytest.mark.parametrize("variant", ["t5", "v1.1"])
def test_scores_are_those_of_the_exported_model(t5s, tmp_path, variant):
    """Read, tokenised and scored by transformers and scikit-learn alone."""
    problem = problem_of(t5s, variant, stem="agent")
    pool, tasks = problem.pool, problem.tasks
    assert [t.metric for t in tasks] == ["accuracy", "balanced"]
    scorer = problem.scorer(fraction=1.0, batch_size=5)
    seen = []
    for n, path in enumerate(map(parse_path, PATHS)):
        folder = LayerPath.of(pool, path).save_pretrained(tmp_path / str(n), pool)
        model = T5ForConditionalGeneration.from_pretrained(folder).eval()
        best = [oracle(model, texts, "test") for texts in t5s["texts"]]
        assert [a.tolist() for a in predict_all(pool, tasks, path, "test")] == best
        seen += map(tuple, best)
        expected = [accuracy(model, texts, "reward") for texts in t5s["texts"]]
        assert scorer.score(path).tolist() == pytest.approx(expected)
        expected = [metric_of(t, "test", a) for t, a in zip(t5s["texts"], best, strict=True)]
        assert evaluate(pool, tasks, path, "test").tolist() == pytest.approx(expected)
    assert len(set(seen)) >= 7  # the paths' answers differ


def test_half_precision_and_a_gpu_score_nearly_the_same(t5s):
    problem = problem_of(t5s)
    path = parse_path(PATHS[0])[1:]
    expected = problem.scorer(fraction=0.5).score(path, 0)
    options = [{"precision": "bfloat16"}]
    if torch.cuda.is_available():
        options += [{"device": "cuda"}, {"device": "cuda", "precision": "bfloat16"}]
    for more in options:
        assert problem.scorer(fraction=0.5, **more).score(path, 0) == pytest.approx(
            expected, abs=0.35
        )


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
    fmt = t5.input_format(pool.base)
    path = tuple(Step("one", k) for k in range(-1, 4))
    model, found = t5s["t5"][0][1], {}
    for mean in (False, True):
        task = TextTask(str(texts), fmt, normalise_length=mean)
        found[mean] = predict_all(pool, [task, task], path, "test")[0].tolist()
        assert found[mean] == oracle(model, texts, "test", mean)
    differ = sum(a != b for a, b in zip(found[False], found[True], strict=True))
    assert differ >= 3


def test_load_problem_hands_metric_and_normalisation_on(t5s):
    problem = problem_of(t5s, normalise_length=True, metric="accuracy")
    assert all(task.normalise_length for task in problem.tasks)
    assert [task.metric for task in problem.tasks] == ["accuracy", "accuracy"]
    texts = t5s["texts"][0]
    path = tuple(Step("two", k) for k in range(-1, 4))
    found = predict_all(problem.pool, problem.tasks, path, "reward")[0].tolist()
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
    return t5.input_format(read_checkpoint(t5s["t5"][1][0]))


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
    fmt = t5.input_format(read_checkpoint(folder))
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
    fmt = t5.input_format(read_checkpoint(folder))
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
    out = LayerPath.of(pool, parse_path("one@-1 one@0 two@3")).save_pretrained(tmp_path / "o", pool)
    assert {p.name for p in out.iterdir()} == {"config.json", "model.safetensors", *names}
    expected = AutoTokenizer.from_pretrained(folder)(SENTENCES).input_ids
    assert AutoTokenizer.from_pretrained(out)(SENTENCES).input_ids == expected


@real
def test_a_sentencepiece_file_alone(tmp_path):
    """It is read as transformers would; where a library for that is missing, one sentence says so."""
    folder = real_t5(tmp_path / "m", "spiece.model")
    checkpoint = read_checkpoint(folder)
    try:
        found = t5.input_format(checkpoint).encode(SENTENCES)
    except InputError as error:
        message = str(error)
    else:
        assert found == AutoTokenizer.from_pretrained(REAL)(SENTENCES).input_ids
        return
    # what is missing, and what would do instead
    assert all(word in message for word in (str(folder), "sentencepiece", "tokenizer.json"))
    assert "\n" not in message
