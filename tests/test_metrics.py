"""Metrics and the likelihood against hand-computed values and torch's own cross entropy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from rmm_lab.errors import InputError
from rmm_lab.families import vit_run
from rmm_lab.reward import parse_path
from rmm_lab.search.config import configure
from rmm_lab.search.pipeline import train
from rmm_lab.tasks.metrics import agreement, likelihood, mean_of


def test_likelihood_by_hand():
    half, quarter, tiny = math.log(0.5), math.log(0.25), -9.0
    logits = torch.tensor([[half, half], [quarter, math.log(0.75)], [tiny, 0.0], [0.0, tiny]])
    found = likelihood(logits, torch.tensor([0, 0, 0, 0]))
    expected = [1 + half / 6, 1 + quarter / 6, 0, 1 - math.log1p(math.exp(-9)) / 6]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.dtype == torch.float64
    assert likelihood(torch.tensor([[0.0, -math.inf]]), torch.tensor([1])) == 0  # no such choice
    assert likelihood(torch.tensor([[math.nan, 1.0]]), torch.tensor([1])) == 0
    shifted = likelihood(logits + 100, torch.tensor([0, 0, 0, 0]))
    np.testing.assert_allclose(shifted, found, atol=1e-4)


def test_means_by_hand():
    right, labels = torch.tensor([1.0, 0.5, 0.0, 0.2]), torch.tensor([3, 3, 3, 1])
    assert mean_of("accuracy", right, labels) == pytest.approx(1.7 / 4)
    assert mean_of("balanced", right, labels) == pytest.approx((0.5 + 0.2) / 2)


def losses(problem, path, rows):
    """The whole timm model's cross entropy of each task's examples."""
    pool = problem.pool
    model = pool.assemble(path, problem.stem)
    heads = vit_run.head_slices(pool.heads).values()
    for task, (start, stop), own in zip(problem.tasks, heads, rows, strict=True):
        with torch.no_grad():
            logits = model(task.batch("reward", own))[:, start:stop]
        labels = task.split("reward").labels[torch.from_numpy(own)]
        yield functional.cross_entropy(logits, labels, reduction="none").double().numpy()


def test_agreement_by_hand():
    """1 - KL(expert || merged) / 6."""
    ln = np.log
    merged = [[0.0, 0.0], [0.0, 0.0], [ln(3.0), 0.0], [-50.0, 0.0]]
    own = [[0.0, 0.0], [ln(3.0), 0.0], [0.0, ln(3.0)], [0.0, -50.0]]
    # Alike; (3/4, 1/4) of (1/2, 1/2); (1/4, 3/4) of (3/4, 1/4): ln(3) / 2; 50, which is too far.
    second = 0.75 * ln(1.5) + 0.25 * ln(0.5)
    expected = [1, 1 - second / 6, 1 - ln(3) / 12, 0]
    found = agreement(torch.tensor(merged), torch.tensor(own))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(
        agreement(torch.tensor(merged) + 7, torch.tensor(own) - 3), expected, atol=1e-6
    )
    # Rows with fewer choices, and no numbers at all.
    three = torch.tensor([[0.0, 0.0, -math.inf], [-math.inf, 0.0, 0.0], [math.nan, 0.0, 0.0]])
    experts = torch.tensor([[0.0, 0.0, -math.inf], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert agreement(three, experts).tolist() == [1, 0, 0]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("text", ["e1@0 e2@1 task_arithmetic:scale=0.5@2", "ties@0 e2@1 e2@2"])
def test_a_subsets_score_is_the_likelihood_and_the_whole_splits_the_metric(problem, text, workers):
    path, options = parse_path(text), {"fraction": 1 / 3, "batch_size": 5}
    soft = problem.scorer(**options, reward="likelihood", workers=workers)
    for subset in range(3):
        rows = [soft.rows(i, subset) for i in range(2)]
        expected = [np.clip(1 - own / 6, 0, 1).mean() for own in losses(problem, path, rows)]
        np.testing.assert_allclose(soft.score(path, subset), expected, atol=1e-6)
    assert (soft.score(path) == problem.scorer(**options).score(path)).all()
    assert (soft.score(path, 0) != problem.scorer(**options).score(path, 0)).all()
    soft.close()


def test_an_unknown_reward_is_refused(problem):
    with pytest.raises(
        InputError, match="expected metric or likelihood or agreement, found 'loss'"
    ):
        problem.scorer(reward="loss")


def test_a_search_by_likelihood_chooses_by_the_metric_at_the_end(trained):
    options = {"episodes": 60, "data_fraction": 0.1, "quiet": True, "unit": "block"}
    result = train(configure("weights", **options, reward="likelihood"), trained, table=False)
    soft, plain = (trained.scorer(fraction=0.1, seed=1, reward=r) for r in ("likelihood", "metric"))
    for episode in result.episodes[::7]:
        scores = soft.score(parse_path(episode["path"]), episode["subset"])
        assert episode["raw_reward"] == pytest.approx(scores.mean())
    for row in result.finalists:
        assert row["reward"] == pytest.approx(plain.score(parse_path(row["path"])).mean())
    by_metric = train(configure("weights", **options, reward="metric"), trained, table=False)
    assert by_metric.episodes != result.episodes
