"""Searches that know few labels, or none: what they read, against scipy and against other labels."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy

from rmm_lab.engine.ray_workers import only_split
from rmm_lab.errors import InputError
from rmm_lab.families import vit_run
from rmm_lab.reward import Step, evaluate, parse_path, predict_all
from rmm_lab.search import uniform
from rmm_lab.search.config import configure, seen_by
from rmm_lab.search.pipeline import train
from rmm_lab.search.problem import load_problem
from rmm_lab.tasks.few_labels import FewLabels

OPTIONS = {"operators": ("task_arithmetic:scale=0.5", "ties"), "stem": "base"}
SEARCH = {"episodes": 60, "finalists": 6, "episodes_per_update": 8, "quiet": True}
TEXT = "e1@0 e2@1 task_arithmetic:scale=0.5@2"


def scramble(task, keep=()) -> None:
    """Wrong labels for all of a task's reward split but some rows."""
    labels = task.split("reward").labels
    other = (labels + 1) % len(task.classes)
    other[list(keep)] = labels[list(keep)]
    labels.copy_(other)


def right_and_wrong(problem):
    """Two copies of a problem; all labels of the second one's reward splits are wrong."""
    right, wrong = copy.deepcopy(problem), copy.deepcopy(problem)
    for task in wrong.tasks:
        scramble(task)
    return right, wrong


# ------------------------------------------------------------------------------------- agreement


def answers(problem, path, i, rows) -> np.ndarray:
    """A whole timm model's probabilities of task i's answers, (n, answers)."""
    start, stop = list(vit_run.head_slices(problem.pool.heads).values())[i]
    with torch.no_grad():
        logits = problem.pool.assemble(path, "base")(problem.tasks[i].batch("reward", rows))
    return softmax(logits[:, start:stop].double().numpy(), axis=1)


def expected(problem, path, i, rows) -> float:
    name = problem.pool.names[i]
    own = tuple(Step(name, k) for k in range(-1, problem.pool.n_layers))
    theirs, ours = answers(problem, own, i, rows), answers(problem, path, i, rows)
    return float(np.clip(1 - entropy(theirs, ours, axis=1) / 6, 0, 1).mean())


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("text", [TEXT, "ties@0 e2@1 e2@2"])
def test_agreement_is_scipys_divergence_of_whole_timm_models(problem, text, workers):
    path = parse_path(text)
    scorer = problem.scorer(fraction=1 / 3, batch_size=5, reward="agreement", workers=workers)
    for subset in (0, 2, None):
        wanted = [expected(problem, path, i, scorer.rows(i, subset)) for i in range(2)]
        np.testing.assert_allclose(scorer.score(path, subset), wanted, atol=1e-5)
    scorer.close()


def test_an_expert_agrees_with_itself_alone(trained):
    scorer = trained.scorer(reward="agreement", stem="agent")
    for i, name in enumerate(trained.pool.names):
        scores = scorer.score(tuple(Step(name, k) for k in range(-1, 3)))
        assert scores[i] == 1
        assert scores[1 - i] < 0.99


def test_agreement_reads_no_label(trained):
    scores = []
    for problem in right_and_wrong(trained):
        scorer = problem.scorer(fraction=0.25, reward="agreement", stem="agent")
        paths = [parse_path(t) for t in ("quadrant@0 stripes@1", "ties@-1 ties@0 ties@1 ties@2")]
        scores.append([scorer.score(path, subset) for path in paths for subset in (1, None)])
    np.testing.assert_array_equal(*scores)


def test_a_balanced_task_counts_each_of_its_experts_answers_alike(trained, monkeypatch):
    monkeypatch.setattr(type(trained.tasks[0]), "metric", "balanced")
    path, rows = parse_path("ties@0 stripes@1 ties@2"), np.arange(0, 240, 3)
    own = answers(trained, tuple(Step("quadrant", k) for k in range(-1, 3)), 0, rows)
    right = np.clip(1 - entropy(own, answers(trained, path, 0, rows), axis=1) / 6, 0, 1)
    named = own.argmax(1)
    assert len(set(np.bincount(named))) > 1  # or both means are the same
    scorer = trained.scorer(reward="agreement", stem="base")
    monkeypatch.setattr(scorer, "rows", lambda i, subset: rows[: len(rows) // (1 + i)])
    wanted = np.mean([right[named == a].mean() for a in np.unique(named)])
    assert scorer.score(path)[0] == pytest.approx(wanted, abs=1e-5)
    assert abs(wanted - right.mean()) > 1e-4


def test_a_search_by_agreement_chooses_by_it_and_reads_no_label(trained):
    config = configure("weights", **SEARCH, unit="block", reward="agreement")
    found = []
    for problem in right_and_wrong(trained):
        found.append(train(config, problem, table=False))
    right, other = found
    assert right.episodes == other.episodes
    assert right.finalists == other.finalists
    scorer = trained.scorer(fraction=0.1, seed=1, reward="agreement")
    for row in right.finalists:
        assert row["reward"] == pytest.approx(scorer.score(parse_path(row["path"])).mean())
    assert seen_by(config) == "inputs"
    assert seen_by(configure("weights")) == "labels"


def test_its_row_sees_inputs(trained):
    run = {"episodes": 12, "compare": "paper", "reward": "agreement"}
    table, row = {}, uniform.row

    def note(problem, name, setting, *args, **took):
        table[name] = took.get("sees")
        return row(problem, name, setting, *args, **took)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uniform, "row", note)
        for reward in ("agreement", "likelihood"):
            options = SEARCH | run | {"unit": "block", "reward": reward}
            train(configure("weights", **options), trained)
            assert table["agent + CMA-ES"] == {"agreement": "inputs"}.get(reward, "labels")


# ------------------------------------------------------------------------------------- few labels


def few(tiny, share, seed=3, **options):
    return load_problem(**tiny, **OPTIONS | options, label_fraction=share, seed=seed)


@pytest.mark.parametrize(("share", "n"), [(0.25, 9), (0.5, 18), (0.1, 4), (1e-6, 1), (1.0, 36)])
def test_a_share_of_the_labels_is_known(tiny, share, n):
    """Of 36; another seed and another task draw others."""
    tasks = few(tiny, share).tasks
    whole = load_problem(**tiny, **OPTIONS).tasks
    for task, all_of_it in zip(tasks, whole, strict=True):
        assert task.size("reward") == len(task.split("reward")) == n
        assert task.size("test") == len(task.split("test")) == 36
        assert task.name == all_of_it.name
        assert torch.equal(task.batch("test", slice(3)), all_of_it.batch("test", slice(3)))
    if 1 < n < 36:
        one, two = (task.known.tolist() for task in tasks)
        assert one != two
        assert few(tiny, share, seed=4).tasks[0].known.tolist() != one
        assert few(tiny, share).tasks[0].known.tolist() == one == sorted(set(one))
        labels = tasks[0].split("reward").labels
        assert torch.equal(labels, whole[0].split("reward").labels[one])
        for rows in (slice(1, 3), np.array([2, 0])):
            theirs = whole[0].batch("reward", np.array(one)[rows])
            assert torch.equal(tasks[0].batch("reward", rows), theirs)
            if not isinstance(rows, slice):
                assert torch.equal(tasks[0].inputs("reward", rows), theirs)


@pytest.mark.parametrize("share", ["0", "1.5", "-1"])
def test_other_shares_are_refused(share):
    with pytest.raises(InputError, match="--label-fraction: expected more than 0 and at most 1"):
        configure(label_fraction=float(share))


@pytest.mark.parametrize("reward", ["metric", "likelihood"])
def test_a_search_reads_no_other_label(tiny, reward):
    """Subsets, the final choice and what tunes rules: wrong labels of all others change nothing."""
    config = configure(
        "weights", **tiny, **SEARCH, unit="block", reward=reward, label_fraction=0.3, seed=3
    )
    found = []
    for wrong in (False, True):
        problem = load_problem(**tiny, unit="block", label_fraction=0.3, seed=3)
        for task in problem.tasks if wrong else ():
            scramble(task.task, keep=task.known.tolist())
        result = train(config, problem, table=False)
        tuned = uniform.tune(problem, uniform.GRIDS["task arithmetic, tuned"])
        found.append((result.episodes, result.finalists, tuned, uniform.tune_metrics(problem)))
    assert found[0] == found[1]
    problem = load_problem(**tiny, unit="block", label_fraction=0.3, seed=3)
    for task in problem.tasks:
        scramble(task.task)
    assert train(config, problem, table=False).episodes != found[0][0]


def test_few_labels_choose_by_the_likelihood_too(tiny):
    """With all labels the choice is by the metric."""
    for share, kind in ((0.3, "likelihood"), (1.0, "metric")):
        options = {"unit": "block", "reward": "likelihood", "label_fraction": share, "seed": 3}
        problem = load_problem(**tiny, unit="block", label_fraction=share, seed=3)
        result = train(configure("weights", **tiny, **SEARCH, **options), problem, table=False)
        scorer = problem.scorer(reward=kind, choice=kind)
        for row in result.finalists:
            assert row["reward"] == pytest.approx(scorer.score(parse_path(row["path"])).mean())
        if kind == "metric":
            path = parse_path(result.finalists[0]["path"])
            whole = path if path[0].layer < 0 else (Step("base", -1), *path)
            score = evaluate(problem.pool, problem.tasks, whole, "reward").mean()
            assert result.reward == pytest.approx(score)


def test_texts_with_few_labels_are_scored_on_these(t5s):
    """Against the scores of the whole split's answers at the known rows."""
    folders = t5s["t5"][1]
    options = {"base": str(folders[0]), "texts": tuple(map(str, t5s["texts"])), "stem": "base"}
    problem, whole = (
        load_problem(tuple(map(str, folders[1:])), **options, label_fraction=share)
        for share in (0.4, 1.0)
    )
    path = tuple(Step("task_arithmetic:scale=0.75", k) for k in range(problem.pool.n_layers))
    scores = problem.scorer(fraction=1.0, stem="base").score(path)
    found = predict_all(whole.pool, whole.tasks, path, "reward")
    for i, (task, answer) in enumerate(zip(problem.tasks, found, strict=True)):
        labels = whole.tasks[i].split("reward").labels
        assert 1 < len(task.known) < len(labels)
        assert scores[i] == task.score(answer[task.known], labels[task.known])
    agreed = problem.scorer(reward="agreement", stem="base").score(path)
    assert ((agreed > 0) & (agreed < 1)).all()


def test_agreement_takes_all_inputs_however_few_labels_are_known(tiny):
    path = parse_path(TEXT)
    some, every = few(tiny, 0.1), few(tiny, 1.0)
    scores = [p.scorer(reward="agreement").score(path) for p in (some, every)]
    np.testing.assert_array_equal(*scores)
    assert [len(some.scorer(fraction=1.0).rows(i, None)) for i in (0, 1)] == [4, 4]


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_a_copy_knows_the_same(tiny, again):
    task = FewLabels(load_problem(**tiny, **OPTIONS).tasks[0], 0.25, 1)
    known = task.known.tolist()
    assert again(task).known.tolist() == known
    assert FewLabels(task.task, 0.25, 1).known.tolist() == known


def test_workers_elsewhere_get_one_split(tiny):
    """As only_split says; the splits that were read before stay behind."""
    task = few(tiny, 0.25).tasks[0]
    task.split("test")
    sent = pickle.loads(pickle.dumps(only_split(task, "reward")))
    assert torch.equal(sent.split("reward").labels, task.split("reward").labels)
    assert torch.equal(sent.batch("reward", slice(4)), task.batch("reward", slice(4)))
    with pytest.raises(KeyError):  # it has no files to read
        sent.split("test")
