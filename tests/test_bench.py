"""The benchmark: its plain way is an oracle of its own for the scorer, and its tables are true."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import bench
from rmm_lab import ppo
from rmm_lab.search import run_folder as runs
from rmm_lab.search.problem import load_problem

ROOT = Path(bench.__file__).parent.parent


def some_args(experts: str, **options) -> ppo.Args:
    return ppo.Args(preset="agent", experts=(experts,), episodes=2, quiet=True, **options)


@pytest.mark.parametrize("experts", ["demo", "mixed"])
def test_the_plain_way_finds_the_scores_of_the_scorer(experts):
    """Whole timm and transformers models against layers run piece by piece, prefixes kept."""
    args = some_args(experts, data_fraction=0.02)
    problem = load_problem((experts,), seed=args.seed)
    scorer = ppo.make_scorer(problem, args)
    rng = np.random.default_rng(0)
    for stack in (0, 1):
        layers = [*range(problem.pool.n_layers)]
        layers.insert(stack, layers[stack])  # one layer stacked
        path = tuple((int(rng.integers(len(scorer.sources))), k) for k in (-1, *layers))
        subset = int(rng.integers(scorer.n_subsets))
        steps = [(scorer.sources[a], k) for a, k in path[1:]]
        model = problem.pool.assemble(steps, scorer.sources[path[0][0]])
        found = [
            bench.plain_score(problem, model, i, scorer.rows(i, subset), "cpu")
            for i in range(scorer.n_models)
        ]
        assert scorer.score(path, subset).tolist() == pytest.approx(found, abs=1e-9)


def test_the_plain_way_counts_whole_split_scores_by_their_examples(monkeypatch):
    """By hand: time stands still but for 2 s to assemble and 0.01 s an example."""
    args = some_args("demo", data_fraction=0.1)  # 60 + 120 examples a subset, 600 + 1200 in all
    problem = load_problem(("demo",), seed=args.seed)
    now = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    assemble = problem.pool.assemble

    def slowly(*a):
        now[0] += 2
        return assemble(*a)

    def score(problem, model, i, rows, device):
        now[0] += 0.01 * len(rows)
        return 0.25

    monkeypatch.setattr(problem.pool, "assemble", slowly)
    monkeypatch.setattr(bench, "plain_score", score)
    path = ((0, -1), *((0, k) for k in range(6)))
    stream = [(path, 0, 0.25), (path, 1, 0.75), (path, 2, 0.25), (path, None, 0.25)]
    found = bench.plain_way(problem, args, stream, sample=2)
    # 4 x 2 s to assemble; (3 x 180 + 1800) x 0.01 s = 23.4 s in the models.
    assert found["seconds"] == pytest.approx(8 + 23.4)
    assert found["assembly"] == pytest.approx(8)
    assert found["per_path"] == pytest.approx(2 + 1.8)
    assert found["forward"] == pytest.approx(1.8)
    assert found["examples"] == 180
    assert found["difference"] == 0  # the sample is the first and the third
    stream[2] = (path, 2, 0.75)  # the plain way finds 0.25
    assert bench.plain_way(problem, args, stream, sample=2)["difference"] == 0.5


def test_a_stopwatch_sees_the_models_and_changes_nothing():
    class Family:
        n_layers = 3

        def embed(self, x):
            return x + 1

        apply = apply_last = logits = embed

    watch = bench.Stopwatch(Family())
    assert (watch.n_layers, watch.embed(1), watch.apply_last(2), watch.logits(3)) == (3, 2, 3, 4)
    assert 0 < watch.seconds < 1


def test_a_stand_in_has_something_to_find():
    """Its labels are its own expert's answers, and of several classes; the other expert knows less."""
    problem = bench.stand_in("vit_tiny_patch16_224", 12, classes=4)
    scorer = problem.scorer(fraction=1.0)
    own = [scorer.score(((a, -1), *((a, k) for k in range(12)))) for a in (0, 1)]
    assert own[0][0] == own[1][1] == 1
    assert own[0][1] < 1 or own[1][0] < 1
    assert all(len(set(task.labels.tolist())) > 1 for task in problem.tasks)


@pytest.mark.slow
def test_the_command_measures_stores_and_measures_again_in_place(tmp_path, capsys):
    options = ["--episodes", "3", "--sample", "2", "--out", str(tmp_path)]
    assert bench.main(["--only", "demo@0.01", *options]) == 0
    rows = runs.from_csv((tmp_path / "performance.csv").read_text())
    assert [row["variant"] for row in rows] == list(bench.VARIANTS)
    for row in rows:
        assert row["episodes"] == 3
        assert row["seconds"] > 0
        assert row["plain_seconds"] > 0
        assert row["times_plain"] == pytest.approx(row["plain_seconds"] / row["seconds"], rel=0.05)
        assert row["layers_asked_per_run"] >= 1
        if "bfloat16" not in row["variant"]:
            assert row["same_rewards"] == "True"  # workers and memory change no reward
            assert row["largest_difference"] == 0  # and the plain way finds the same
    assert 0.2 < rows[0]["forward_share"] <= 1
    out = capsys.readouterr().out
    assert bench.markdown(rows) in out
    assert bench.main(["--only", "demo@0.01", *options]) == 0
    assert len(runs.from_csv((tmp_path / "performance.csv").read_text())) == len(rows)


def test_an_unknown_case_is_refused(capsys):
    assert bench.main(["--only", "cats"]) == 2
    assert "--only: expected some of demo@0.01" in capsys.readouterr().err


def test_a_case_that_fails_stores_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RMM_LAB_DATA", str(tmp_path / "nowhere"))
    assert bench.main(["--only", "demo@0.01", "--out", str(tmp_path / "out")]) == 2
    assert "expected it to end well, found the exit code" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", list(bench.SHOW))
def test_the_page_on_performance_holds_the_last_tables(name):
    rows = runs.from_csv((ROOT / "results" / f"{name}.csv").read_text("utf-8"))
    page = (ROOT / "docs" / "performance.md").read_text("utf-8")
    assert bench.SHOW[name](rows) in page
    for row in rows:
        assert row["machine"] in page
        assert not str(row["commit"]).endswith("+")


def test_the_machine_is_named():
    assert f"torch {torch.__version__}" in bench.machine()
    assert " cores" in bench.machine()
