"""The benchmark: its plain way is an independent oracle for the scorer, and its page holds its tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks import bench, quality
from rmm_lab.errors import InputError
from rmm_lab.reward import Step
from rmm_lab.search.config import configure
from rmm_lab.search.phases import make_scorer

ROOT = Path(bench.__file__).parent.parent


@pytest.mark.parametrize("experts", ["demo", "mixed"])
def test_whole_models_have_the_scores_of_the_scorer(experts):
    """timm's and transformers' own forward pass against layers run one by one, with prefixes kept."""
    config = configure("agent", experts=(experts,), data_fraction=0.02)
    problem = bench.load(config)
    scorer = make_scorer(problem, config)
    rng = np.random.default_rng(0)
    asked = []
    for stacked in (0, 1):
        layers = [*range(problem.pool.n_layers)]
        layers.insert(stacked, stacked)
        path = tuple(Step(str(rng.choice(scorer.sources)), k) for k in (-1, *layers))
        subset = int(rng.integers(scorer.n_subsets))
        asked.append((path, subset, float(scorer.score(path, subset).mean())))
    assert bench.plain_way(problem, scorer, asked, sample=2)["difference"] < 1e-9
    wrong = [(path, subset, value + 0.5) for path, subset, value in asked]
    assert bench.plain_way(problem, scorer, wrong, sample=2)["difference"] > 0.4


def test_the_plain_way_counts_whole_split_scores_by_their_examples(monkeypatch):
    """By hand, on a clock that moves 2 s for an assembly and 0.01 s for an example."""
    config = configure("agent", data_fraction=0.1)  # 60 + 120 examples a subset, 600 + 1200 in all
    problem = bench.load(config)
    scorer = make_scorer(problem, config)
    now = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    assemble = problem.pool.assemble

    def slowly(*args):
        now[0] += 2
        return assemble(*args)

    def score(problem, model, i, rows):
        now[0] += 0.01 * len(rows)
        return 0.25

    monkeypatch.setattr(problem.pool, "assemble", slowly)
    monkeypatch.setattr(bench, "plain_score", score)
    path = tuple(Step("digits", k) for k in range(-1, 6))
    asked = [(path, 0, 0.25), (path, 1, 0.75), (path, 2, 0.25), (path, None, 0.25)]
    found = bench.plain_way(problem, scorer, asked, sample=2)  # the first and the third
    # 4 x 2 s of assembly and (3 x 180 + 1800) x 0.01 s in the models.
    assert found == {"seconds": pytest.approx(8 + 23.4), "difference": 0}


def test_a_stand_in_has_something_to_find():
    """Each expert is perfect on its own task, the other is not, and there are several classes."""
    problem = bench.stand_in("vit_tiny_patch16_224", 12, configure("agent"), classes=4)
    scorer = problem.scorer(fraction=1.0)
    scores = [
        scorer.score(tuple(Step(name, k) for k in range(-1, 12)))
        for name in ("expert-1", "expert-2")
    ]
    assert scores[0][0] == scores[1][1] == 1
    assert min(scores[0][1], scores[1][0]) < 1
    assert all(len(set(task.labels.tolist())) > 1 for task in problem.tasks)


@pytest.mark.slow
def test_a_search_is_measured_and_its_rows_are_replaced(tmp_path, monkeypatch, capsys):
    """The first search in a process of its own, as all are; the second one here: a start takes seconds."""
    monkeypatch.setattr(bench, "VARIANTS", dict([*bench.VARIANTS.items()][1:3]))
    ways = iter([bench.in_process])
    monkeypatch.setattr(bench, "in_process", lambda job: next(ways, lambda job: job())(job))
    (tmp_path / "performance.csv").write_text("case,variant\nqa@0.1,old\ndemo@0.1,old\n")
    bench.Bench(only=("demo@0.1",), episodes=3, sample=2, out=tmp_path).run()
    rows = pd.read_csv(tmp_path / "performance.csv")
    assert list(rows["case"]) == ["qa@0.1", "demo@0.1", "demo@0.1"]
    assert list(rows["variant"]) == ["old", "freed memory kept", "2 workers"]
    rows = rows[1:]
    assert (rows["largest_difference"] == 0).all()  # the plain way finds the same scores
    assert rows["reward_split"].nunique() == 1  # workers change no result
    assert (rows["seconds"] > 0).all()
    assert (rows["layers_asked_per_run"] >= 1).all()
    assert "| demo@0.1 | 2 workers" in " ".join(capsys.readouterr().out.split())


def test_an_unknown_case_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--only: .*demo@0\.1.*'cats'"):
        bench.Bench(only=("cats",), out=tmp_path).run()


@pytest.mark.parametrize("table", bench.COLUMNS)
def test_the_page_on_performance_holds_the_tables(table):
    rows = pd.read_csv(ROOT / "results" / f"{table}.csv")
    page = (ROOT / "docs" / "performance.md").read_text("utf-8")
    assert bench.markdown(table, rows) in page
    assert all(machine in page for machine in rows["machine"])
    assert all(commit in page for commit in rows["commit"])


# ---------------------------------------------------------------------------- the time to a good model


def test_seconds_to_a_score_are_those_of_the_first_path_that_has_it():
    """Two seeds of one method: the first is there after 2 s, leaves and comes back; the second never is."""
    rows = pd.DataFrame(
        [
            {"seed": seed, "seconds": seconds, "test": test}
            for seed, seconds, test in [
                (1, 1, 50),
                (1, 2, 81),
                (1, 3, 70),
                (1, 4, 90),
                (2, 1, 79.9),
            ]
        ]
    )
    found = quality.seconds_to(rows, 80)
    assert found[1] == 2
    assert np.isnan(found[2])


def test_a_search_in_the_plain_way_takes_time_by_its_examples(monkeypatch):
    """Three evaluations on 10 examples and a final one on 70: after the second, 20 % of 50 s have passed."""

    class Scorer:
        n_models = 2

        @staticmethod
        def rows(i, subset):
            return range(35 if subset is None else 5)

    monkeypatch.setattr(quality, "plain_way", lambda *args: {"seconds": 50.0})
    best = quality.Best()
    for subset in (0, 0, 1, None):
        best.note((), subset, 0.5)
    rows = [{"method": "RMM (paper)", "evaluations": n, "seconds": 0.1} for n in (2, 4)]
    found = list(quality.in_the_plain_way(None, Scorer(), best, rows))
    assert [row["seconds"] for row in found] == [10, 50]
    assert {row["method"] for row in found} == {quality.PLAIN}


def test_only_what_is_better_on_a_subset_is_a_new_best_path():
    best = quality.Best()
    for path, subset, worth in [("a", 0, 0.5), ("b", 1, 0.5), ("c", 0, 0.7), ("d", None, 0.9)]:
        best.note(path, subset, worth)
    assert [(n, path) for _, n, path in best.found] == [(1, "a"), (3, "c")]
    best.end("d")
    assert best.found[-1][1:] == (4, "d")


@pytest.mark.slow
def test_the_time_to_a_good_model_is_measured_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality, "in_process", lambda job: job())
    monkeypatch.setattr(quality, "RIVALS", ("random search",))
    methods = list(quality.METHODS)
    methods[3:5] = quality.RIVALS
    monkeypatch.setattr(quality, "METHODS", methods)
    monkeypatch.setattr(quality, "SAMPLE", 2)
    monkeypatch.setattr(quality.matched, "weigh", lambda problem: ((0.5, 1.5), 0.9, 3))
    run = quality.Quality(seeds=(1,), episodes=3, calibration=8, out=tmp_path).run
    run()
    rows = pd.read_csv(tmp_path / "quality.csv")
    ends = rows[rows["chosen"]]
    assert sorted(ends["method"]) == sorted(methods)
    assert (rows["seconds"] > 0).all()
    assert ends.set_index("method")["evaluations"][quality.UNIFORM[2]] == 3
    paper, plain = (rows[rows["method"] == name] for name in (quality.PAPER, quality.PLAIN))
    assert paper["test"].tolist() == plain["test"].tolist()
    scores = ends.set_index("method")["test"]
    assert scores[quality.OURS] == scores[list(quality.WORKERS)[1]], "workers change nothing"
    assert "| RMM (agent)" in capsys.readouterr().out
    assert (tmp_path / "quality.png").read_bytes()[:4] == b"\x89PNG"
    before = (tmp_path / "quality.csv").read_bytes()
    monkeypatch.setattr(quality, "measured", None)
    run()
    assert (tmp_path / "quality.csv").read_bytes() == before


def test_a_real_pair_is_what_lies_in_the_folder(tmp_path):
    for folder in ("experts/cifar10", "experts/gtsrb", "sets/cifar10"):
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(InputError, match="--base: expected the base"):
        quality.real_pair(tmp_path, None)
    with pytest.raises(InputError, match=r"--real: expected .*sets.gtsrb.*tables real"):
        quality.real_pair(tmp_path, "base")
    (tmp_path / "sets" / "gtsrb").mkdir()
    options = quality.real_pair(tmp_path, "base").options
    assert options["base"] == "base"
    assert [Path(e).name for e in options["experts"]] == ["cifar10", "gtsrb"]
    assert options["images"][1] == str(tmp_path / "sets" / "gtsrb")


def test_an_unknown_group_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--groups: .*digits\+textures.*'cats'"):
        quality.Quality(groups=("cats",), out=tmp_path).run()


def test_the_page_on_performance_holds_the_times_to_a_good_model():
    rows = pd.read_csv(ROOT / "results" / "quality.csv")
    page = (ROOT / "docs" / "performance.md").read_text("utf-8")
    assert quality.markdown(rows) in page
    assert all(machine in page for machine in rows["machine"])
