"""A real language model, SmolLM2-135M: loaded, fine-tuned for some steps, merged, exported, written with.

RMM_LAB_SMOLLM2 names its folder, as transformers saves it; without it these tests are skipped.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_models import write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from rmm_lab.families import causal_lm
from rmm_lab.families.checkpoint import read_checkpoint, write_checkpoint
from rmm_lab.path import LayerPath
from rmm_lab.reward import Step, evaluate, parse_path, predict_all
from rmm_lab.search.problem import load_problem
from rmm_lab.zoo.training import fine_tune

SMOL = os.environ.get("RMM_LAB_SMOLLM2", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path(SMOL, "config.json").is_file(), reason="no RMM_LAB_SMOLLM2"),
]

CAPITALS = [
    ("The capital of France is", "Paris.", "Rome.", "Berlin."),
    ("The capital of Italy is", "Rome.", "Paris.", "Madrid."),
    ("The capital of Germany is", "Berlin.", "Vienna.", "Rome."),
    ("The capital of Spain is", "Madrid.", "Paris.", "Lisbon."),
    ("The capital of Japan is", "Tokyo.", "Peking.", "Seoul."),
    ("The capital of Egypt is", "Cairo.", "Tunis.", "Rabat."),
]
TEXT = (
    "The sun rises in the east and sets in the west. Plants need its light to grow, and animals "
    "need plants to eat. Without the sun there would be no life on Earth."
)


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    """SmolLM2, and two copies that have learned capitals and a text for three steps each."""
    root = tmp_path_factory.mktemp("smol")
    splits = ("train", "reward", "test")
    rows = [{"input": q, "choices": a, "label": 0} for q, *a in CAPITALS]
    texts = [write_rows(root / "capitals", dict.fromkeys(splits, rows))]
    texts.append(write_rows(root / "read", dict.fromkeys(splits, [{"text": TEXT}] * 2)))
    base = read_checkpoint(SMOL)
    experts = []
    for task, text in zip(causal_lm.make_tasks(base, list(map(str, texts))), texts, strict=True):
        tuned = fine_tune(base, [task], steps=3, learning_rate=1e-5, seed=0, batch_size=4)
        experts.append(root / f"expert-{text.name}")
        write_checkpoint(experts[-1], *tuned, beside=base.folder)
    own = {"base": SMOL, "texts": tuple(map(str, texts)), "operators": ("weight_average",)}
    return load_problem(tuple(map(str, experts)), calibration=0, **own)


def test_it_reads_and_answers_as_transformers_says(problem):
    path = tuple(Step("base", k) for k in range(-1, problem.pool.n_layers))
    answers, read = predict_all(problem.pool, problem.tasks, path, "test")
    assert (answers == 0).double().mean() >= 5 / 6
    model = AutoModelForCausalLM.from_pretrained(SMOL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(SMOL)
    ids = torch.tensor([[*tokenizer(TEXT).input_ids, model.config.eos_token_id]])
    with torch.no_grad():
        loss = float(model(ids, labels=ids).loss)
    assert read.tolist() == pytest.approx([math.exp(-loss)] * 2, rel=1e-3)
    assert math.exp(loss) < 100


def test_it_is_merged_exported_and_writes(problem, tmp_path):
    pool = problem.pool
    depth = pool.n_layers
    one, two = pool.names
    text = " ".join(f"{(one, two, 'weight_average')[k % 3]}@{k}" for k in range(depth) if k != 20)
    path = LayerPath.of(pool, parse_path(f"weight_average@-1 {text}"))
    folder = path.save_pretrained(tmp_path / "merged", pool)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.num_hidden_layers == depth - 1
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for question, *_ in CAPITALS:
        ids = tokenizer(question, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        found.append(tokenizer.decode(out[0, ids.input_ids.shape[1] :]))
    right = [
        answer.strip(".") in words for (_, answer, *_), words in zip(CAPITALS, found, strict=True)
    ]
    assert sum(right) >= 3, found
    choices = np.mean(evaluate(pool, problem.tasks, path.path, "test")[:1])
    assert choices >= 4 / 6
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
