"""A search from end to end: its phases, what it stores, how it goes on after a stop, what it chooses."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rmm_lab import ppo
from rmm_lab.__main__ import main
from rmm_lab.engine.scorer import Scorer
from rmm_lab.errors import InputError
from rmm_lab.layers import LayerPool
from rmm_lab.path import LayerPath
from rmm_lab.reward import Step, evaluate, parse_path, path_text, reward
from rmm_lab.search.config import configure, read_config
from rmm_lab.search.phases import Search, choose, make_scorer, mean_policy
from rmm_lab.search.pipeline import run_phases, train
from rmm_lab.search.problem import Problem, load_problem, problem_of
from rmm_lab.search.run_folder import RunFolder, from_csv
from rmm_lab.tasks.hold import held

RESULT = (
    *("episodes.csv", "updates.csv", "policy.safetensors", "policies.safetensors"),
    *("path.json", "finalists.json", "notes.json"),
)


def with_spec(problem: Problem, **changes) -> Problem:
    return dataclasses.replace(problem, spec=dataclasses.replace(problem.spec, **changes))


def run(problem=None, preset="weights", **options):
    """A quiet search without a table."""
    return train(configure(preset, quiet=True, **options), problem, table=False)


# ----------------------------------------------------------------------------------------- phases


def test_the_phases_come_in_order_and_spend_their_shares(tiny):
    """On sublayers: L = 3 blocks of two, a stem to choose, S = 4 sources."""
    operators = ("weight_average", "ties")
    result = run(**tiny, operators=operators, episodes=108, data_fraction=0.25, cma_share=0.7)
    rows = result.episodes
    assert [r["episode"] for r in rows] == list(range(108))
    # 108 less 4 uniform ones on two subsets = 100, of which 70 are for CMA-ES
    assert [r["phase"] for r in rows] == ["uniform"] * 8 + ["agent"] * 30 + ["scales"] * 70
    assert [u["episodes"] for u in result.updates] == [28, 38]
    paths = [parse_path(r["path"]) for r in rows]

    sources = ("e1", "e2", *operators) * 2
    for i, (source, row, path) in enumerate(zip(sources, rows, paths, strict=False)):
        assert path == tuple(Step(source, k) for k in range(-1, 6))
        assert (row["subset"], row["penalised"], row["actions"]) == (i // 4, 0, "")

    agent = slice(8, 38)
    assert [r["update"] for r in rows[agent]] == [0] * 20 + [1] * 10
    assert [r["subset"] for r in rows[agent]] == [0] * 20 + [1] * 10  # a subset for each update
    for row, path in zip(rows[agent], paths[agent], strict=True):
        layers = [step for step in path if step.layer >= 0]
        assert row["depth"] == len(layers)
        assert len(row["actions"].split()) >= 4
        for attention, mlp in zip(layers[::2], layers[1::2], strict=True):  # of one block
            assert attention.source == mlp.source
            assert attention.layer % 2 == 0
            assert mlp.layer == attention.layer + 1

    for path in paths[38:]:  # a scale for each of 2 experts at 7 places
        assert [step.layer for step in path] == list(range(-1, 6))
        assert all(step.source == "task_arithmetic" and len(step.scales) == 2 for step in path)
    # 14 numbers: 4 + int(3 ln 14) = 11 in a generation, which shares a subset
    assert [r["subset"] for r in rows[38:]] == [(1 + i // 11) % 4 for i in range(70)]

    assert {f["found"] for f in result.finalists} == {"scales", "best", "greedy"}
    assert len(result.finalists) == 11
    for row in rows:
        assert (row["score_i1"] + row["score_i2"]) / 2 == pytest.approx(row["raw_reward"])


def test_dar_counts_the_agents_episodes_only(tiny):
    """Eq. 10 by hand: its weight reaches lambda (n - 1) / n, n without uniform paths and scales."""
    options = {"score_uniform_first": True, "cma_share": 0.5, "dar_lambda": 0.8}
    options |= {"mask_actions": True, "episodes": 42, "data_fraction": 0.05}
    rows = run(preset="paper", **tiny, **options).episodes
    agent = [row for row in rows if row["phase"] == "agent"]
    n = len(agent)
    assert n == 19  # 5 uniform paths, 18 scales
    assert [row["subset"] for row in agent] == list(range(n))  # one window
    previous = agent[0]["raw_reward"]
    for t, row in enumerate(agent):
        weight = 0.8 * t / n
        previous = weight * previous + (1 - weight) * row["raw_reward"]
        assert row["dar_reward"] == pytest.approx(previous, abs=1e-12)
    assert weight == pytest.approx(0.8 * (n - 1) / n)
    assert agent[-1]["dar_reward"] != agent[-1]["raw_reward"]
    assert all(row["dar_reward"] == row["raw_reward"] for row in rows if row["phase"] != "agent")


def test_without_an_agent_there_is_no_update(trained):
    result = run(trained, cma_share=1.0, episodes=20)
    assert [e["phase"] for e in result.episodes] == ["uniform"] * 4 + ["scales"] * 16
    assert result.updates == []
    assert result.policies.shape == (0, 0, 0)


def test_the_paper_preset_penalises_without_a_mask(trained):
    result = run(trained, "paper", episodes=40)
    penalised = [e for e in result.episodes if e["penalised"]]
    assert penalised  # an untrained agent goes back at layer 0 now and then
    assert all(e["raw_reward"] == e["dar_reward"] == -0.1 for e in penalised)
    assert len(result.updates) == 10
    assert all(row["epochs"] == 40 for row in result.updates)


def test_an_agent_that_chooses_the_stem_leaves_it_in_the_path(trained):
    result = run(with_spec(trained, stem="agent"), "agent", episodes=60)
    paths = [parse_path(e["path"]) for e in result.episodes]
    assert len({path[0].source for path in paths if path and path[0].layer == -1}) > 2
    assert result.path.stem.source in {*trained.pool.sources, "base"}
    assert all(step.layer >= 0 for step in result.path.steps)
    scores = evaluate(trained.pool, trained.tasks, result.path.path, "reward")
    assert scores.mean() == pytest.approx(result.reward)


def test_mean_policy_is_the_mean_over_the_steps_at_a_place():
    def episode(layers, policies):
        infos = [{"layer": k} for k in layers]
        columns = {name: [] for name in ppo.Episode._fields}
        return ppo.Episode(
            **columns | {"infos": infos, "policies": list(map(torch.tensor, policies))}
        )

    one = episode([-1, 0, -1], [[1.0, 0], [0.0, 1], [0.5, 0.5]])
    two = episode([-1], [[0.0, 1.0]])
    found = mean_policy([one, two], range(-1, 2))
    torch.testing.assert_close(found[:2], torch.tensor([[0.5, 0.5], [0.0, 1.0]]))
    assert found.shape == (3, 2)
    assert found[2].isnan().all()  # no step stood at layer 1


# ------------------------------------------------------------------------- what the search finds


def reachable(n_layers, sources, depth):
    """Every path that actions can compose, by exhaustive walk: skips and backs included."""
    out, seen, stack = set(), set(), [(0, ())]
    while stack:
        k, path = stack.pop()
        if (k, path) in seen:
            continue
        seen.add((k, path))
        if k == n_layers:
            out.add(path)
            continue
        if len(path) < depth:
            stack += [(k + 1, (*path, Step(source, k))) for source in sources]
        stack += [(k + 1, path)] + ([(k - 1, path)] if k else [])
    return out


class Table:
    """A scorer that is a formula: what the layers are worth alone and next to each other, seeded."""

    sources, n_models, n_layers, stacks = ("a", "b"), 2, 3, (range(3),)
    n_subsets, task_names, chooses_stem = 1, ["one", "two"], False

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        self.single = rng.normal(size=(2, 3))
        self.pair = rng.normal(size=(2, 3, 2, 3))

    def score(self, path, subset=None):
        steps = [(self.sources.index(step.source), step.layer) for step in path]
        value = sum(self.single[step] for step in steps) / 2
        value += sum(self.pair[(*a, *b)] for a, b in itertools.pairwise(steps))
        return np.full(2, 1 / (1 + np.exp(-value / 2)))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_the_agent_ends_among_the_best_paths_of_a_table(seed):
    """Among the best 5 % of all 511 paths of at most four layers, after 300 episodes."""
    table = Table(seed)
    paths = reachable(3, table.sources, 4)
    assert len(paths) == 511
    ranked = sorted(paths, key=lambda p: table.score(p)[0], reverse=True)
    search = Search.start(
        configure("agent", episodes=300, max_depth=4, quiet=True), table, RunFolder(None)
    )
    run_phases(search)
    assert {parse_path(e["path"]) for e in search.episodes} <= paths
    assert ranked.index(choose(search)[0]["path"]) < 0.05 * 511


@pytest.mark.slow
def test_the_agent_ends_among_the_best_paths_of_trained_models(trained):
    """The best 10 of 511."""
    pool = LayerPool(trained.pool.base, trained.pool.experts, trained.pool.names, ())
    spec = dataclasses.replace(trained.spec, operators=(), stem="weight_average")
    problem = Problem(pool, trained.tasks, spec)
    scorer = problem.scorer(fraction=1.0)
    paths = reachable(3, pool.sources, 4)
    scores = sorted((float(scorer.score(p).mean()) for p in paths), reverse=True)
    assert len(scores) == 511
    options = {"episodes": 300, "data_fraction": 1.0, "max_depth": 4}
    assert run(problem, "agent", **options).reward >= scores[9]


def test_the_final_path_is_the_best_candidate_on_the_whole_reward_split(trained):
    result = run(trained, episodes=100)
    scorer = trained.scorer(fraction=1.0)
    scores = [reward(scorer.score(parse_path(f["path"]))) for f in result.finalists]
    assert scores == pytest.approx([f["reward"] for f in result.finalists])
    assert scores == sorted(scores, reverse=True)
    assert result.reward == pytest.approx(scores[0])
    assert "greedy" in {f["found"] for f in result.finalists}


@pytest.mark.parametrize("finalists", [0, 3])
def test_an_illegal_greedy_rollout_is_no_candidate(trained, finalists):
    """With no finalist asked for, the best legal path of the search takes its place."""
    config = configure("paper", episodes=12, finalists=finalists, quiet=True)
    search = Search.start(config, make_scorer(trained, config), RunFolder(None))
    run_phases(search)
    with torch.no_grad():
        search.agent.actor[-1].bias[-1] += 99  # back, at layer 0
    assert ppo.play(search.env, search.agent, None, masked=False).info["penalised"]
    candidates = choose(search)
    assert len(candidates) == max(1, finalists)
    legal = {e["path"] for e in search.episodes if not e["penalised"]}
    assert {path_text(c["path"]) for c in candidates} <= legal
    assert {c["found"] for c in candidates} == {"best"}


@pytest.mark.parametrize(
    "options",
    [
        {"actions": "scales"},
        {"score_uniform_first": True},
        {"cma_share": 0.5},
    ],
)
def test_a_phase_that_skips_no_layer_needs_room_for_all(trained, options):
    with pytest.raises(InputError, match=r"--max-depth: expected at least \d+ layers, found 1"):
        run(trained, "agent", episodes=20, max_depth=1, **options)


def test_a_search_without_a_legal_path_says_so(trained):
    config = configure("paper", quiet=True)
    search = Search.start(config, make_scorer(trained, config), RunFolder(None))
    with torch.no_grad():
        search.agent.actor[-1].bias[-1] += 99
    with pytest.raises(InputError, match="at least one legal episode, found none"):
        choose(search)


def test_the_search_never_reads_the_test_split(trained, monkeypatch):
    """Another test split changes nothing but the test scores."""
    plain = run(trained, episodes=24)
    for task in trained.tasks:
        splits = {name: task.split(name) for name in ("reward", "test")}
        labels = (splits["test"].labels + 1) % len(task.classes)
        splits["test"] = dataclasses.replace(splits["test"], labels=labels)
        monkeypatch.setattr(task, "split", splits.__getitem__)
    again = train(configure("weights", episodes=24, quiet=True), trained)
    assert again.path == plain.path
    assert again.episodes == plain.episodes
    assert again.scores["fine-tuned"]["stripes"] < 0.5  # the altered split was what was reported


# ------------------------------------------------------------------- what is the same, and for whom


def test_a_run_is_determined_by_its_seed(trained):
    first, again, other = (run(trained, episodes=40, cma_share=0.2, seed=s) for s in (1, 1, 2))
    assert first.episodes == again.episodes
    assert first.updates == again.updates
    assert first.path == again.path
    assert first.episodes != other.episodes


@pytest.mark.parametrize("preset", ["default", "weights", "paper"])
def test_a_search_is_the_same_with_several_workers(trained, preset, monkeypatch):
    """What is looked ahead is what is played: each update's paths go to the workers at once."""
    asked = []
    original = Scorer.prefetch

    def spy(self, wanted):
        asked.append(list(wanted))
        original(self, asked[-1])

    monkeypatch.setattr(Scorer, "prefetch", spy)
    options = {"episodes": 48, "data_fraction": 0.2, "cma_share": 0.2}
    one = run(trained, preset, **options)
    asked.clear()
    two = run(trained, preset, workers="2", **options)
    assert two.episodes == one.episodes
    assert two.updates == one.updates
    assert two.finalists == one.finalists
    assert (two.path, two.reward) == (one.path, one.reward)
    weights = two.agent.state_dict()
    assert all(torch.equal(weights[k], v) for k, v in one.agent.state_dict().items())

    agent = [e for e in two.episodes if e["phase"] == "agent"]
    assert any(e["penalised"] for e in agent) == (preset == "paper")
    for update in range(len(two.updates)):
        played = [e for e in agent if e["update"] == update and not e["penalised"]]
        assert [(parse_path(e["path"]), e["subset"]) for e in played] in asked
    assert len({e["subset"] for e in agent}) > 1  # subsets take turns


def test_a_search_leaves_the_callers_threads_and_random_state_alone(trained):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        run(trained, episodes=30, threads=1)
        assert torch.get_num_threads() == 2
        assert torch.equal(torch.get_rng_state(), states[0])
        assert (np.random.get_state()[1] == states[1]).all()
        assert random.getstate() == states[2]
        with pytest.raises(InputError):
            run(trained, episodes=30, threads=1, max_depth=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------- run folder


def words(tiny, folder, *more):
    return [
        *("--base", tiny["base"], "--experts", *tiny["experts"], "--images", *tiny["images"]),
        *("--preset", "paper", "--data-fraction", "0.5", "--run-dir", str(folder), *more),
    ]


def rows_of(folder, name="episodes.csv"):
    return from_csv((folder / name).read_text())


def test_a_run_folder_holds_what_the_readme_says(tiny, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(words(tiny, folder, "--episodes", "24")) == 0
    printed = capsys.readouterr().out
    assert {p.name for p in folder.iterdir()} == {
        *("config.json", "checkpoint.safetensors", "table.md", "table.json", *RESULT),
        *("rewards.png", "path.png", "cross-task.png", "merged"),
    }
    assert [e["episode"] for e in rows_of(folder)] == list(range(24))
    notes = json.loads((folder / "notes.json").read_text())
    assert notes == [line[6:] for line in printed.splitlines() if line.startswith("note: ")]
    assert any("on its own task" in note or "unmerged" in note for note in notes)
    for note in notes:
        assert f"\n{note}.\n" in (folder / "table.md").read_text()
    table = json.loads((folder / "table.json").read_text())
    for row in table:
        assert row["name"] in printed
        assert row["name"] in (folder / "table.md").read_text()
        assert row["mean"] == pytest.approx(np.mean(list(row["scores"].values())))
    assert {"base", "fine-tuned", "TIES, tuned", "RMM (paper)"} <= {row["name"] for row in table}
    for picture in ("rewards.png", "cross-task.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    rmm = table[-1]
    assert (rmm["name"], rmm["sees"], rmm["evaluations"]) == ("RMM (paper)", "labels", 24)
    assert rmm["seconds"] > 0
    best = json.loads((folder / "finalists.json").read_text())[0]
    assert rmm["reward"] == best["reward"]
    # Three ways to the same model: built from the JSON, loaded by timm, scored in the table.
    import timm

    path = LayerPath.from_json((folder / "path.json").read_text())
    built = path.build()
    loaded = timm.create_model(f"local-dir:{folder / 'merged'}", pretrained=True).eval()
    images = torch.randn(4, 1, 8, 8)
    with torch.inference_mode():
        assert torch.equal(built(images), loaded(images))
    config = read_config(RunFolder(folder).read_config(), folder)
    problem = problem_of(config.problem)
    scores = evaluate(problem.pool, problem.tasks, path.path, "test")
    assert list(table[-1]["scores"].values()) == pytest.approx(scores.tolist())


def test_a_run_of_a_loaded_problem_is_read_back_to_the_same_reward(tiny, tmp_path):
    """config.json holds what was merged, whatever the config said; random masks are drawn again."""
    operators = ("dare:drop_rate=0.5", "dare_ties")
    problem = load_problem(**tiny, operators=operators, stem="e2", unit="sublayer", seed=5)
    config = configure("agent", experts=("qa",), episodes=20, run_dir=tmp_path / "run", quiet=True)
    result = train(config, problem, table=False)
    stored = read_config(json.loads((tmp_path / "run" / "config.json").read_text()), "run")
    assert stored.problem == problem.spec
    assert stored.agent == config.agent
    path = LayerPath.from_json((tmp_path / "run" / "path.json").read_text())
    assert path == result.path
    again = problem_of(stored.problem)
    scores = evaluate(again.pool, again.tasks, path.path, "reward")
    assert reward(scores) == pytest.approx(result.reward, abs=1e-12)


def test_a_run_of_a_loaded_problem_goes_on_from_the_command_line(tiny, tmp_path):
    """The masks' seed is the problem's, not the run's."""
    problem, folder = load_problem(**tiny, operators=("dare",), seed=5), tmp_path / "run"
    config = configure("agent", episodes=20, run_dir=folder, quiet=True)
    whole = train(config, problem, table=False)
    assert main(["--resume", str(folder), "--quiet", "--compare", "paper"]) == 0
    assert rows_of(folder)[-1]["path"] == whole.episodes[-1]["path"]


class Stop(Exception):
    pass


def stop_at(monkeypatch, known):
    """Every search stops after the first checkpoint of at least so many episodes."""
    save = RunFolder.save_checkpoint

    def stop(self, tensors, counters, episodes, updates):
        save(self, tensors, counters, episodes, updates)
        if len(episodes) >= known:
            raise Stop

    monkeypatch.setattr(RunFolder, "save_checkpoint", stop)


@pytest.fixture(scope="module")
def unbroken(tiny, tmp_path_factory):
    """4 uniform paths, 12 episodes of the agent in updates of 5, 48 of CMA-ES in generations of 11."""
    options = dict(tiny) | {"operators": ("weight_average", "ties"), "episodes": 64}
    options |= {"episodes_per_update": 5, "data_fraction": 0.25, "dar_lambda": 0.5}
    return options, run(**options, run_dir=tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.parametrize(
    ("known", "saved"),
    [(4, 4), (9, 9), (15, 16), (40, 49)],
    ids=["uniform", "agent", "end of the agent", "scales"],
)
def test_a_search_stopped_in_any_phase_ends_as_an_unbroken_one(
    unbroken, tmp_path, monkeypatch, known, saved
):
    options, whole = unbroken
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        stop_at(patched, known)
        with pytest.raises(Stop):
            run(**options, run_dir=folder)
    assert len(rows_of(folder)) == saved
    again = run(**options, resume=folder)
    assert again.episodes == whole.episodes
    assert again.updates == whole.updates
    assert torch.equal(again.policies, whole.policies)
    for name in RESULT:
        assert (folder / name).read_bytes() == (whole.folder / name).read_bytes(), name


def test_a_stopped_agent_of_scales_ends_as_an_unbroken_one(tiny, tmp_path, monkeypatch):
    """Its first mean came from the uniform paths, and its deviations are learned: both are stored."""
    menu = ("least_squares:fit=whole,ridge=0.01",)
    options = dict(tiny) | {"preset": "default", "operators": menu, "calibration": 10}
    options |= {"episodes": 24, "episodes_per_update": 5, "data_fraction": 0.25}
    whole, folder = run(**options, run_dir=tmp_path / "whole"), tmp_path / "run"
    with monkeypatch.context() as patched:
        stop_at(patched, 9)
        with pytest.raises(Stop):
            run(**options, run_dir=folder)
    again = run(**options, resume=folder)
    assert again.episodes == whole.episodes
    for name in RESULT:
        assert (folder / name).read_bytes() == (whole.folder / name).read_bytes(), name


HANGING = """
import os, signal, sys
from rmm_lab.__main__ import main
replace, saved = os.replace, []

def hang(source, target, **options):
    if str(target).endswith("checkpoint.safetensors"):
        saved.append(target)
        if len(saved) == 3:
            print("third", flush=True)
            signal.pause()
    replace(source, target, **options)

os.replace = hang
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_search_that_was_killed_ends_as_an_unbroken_one(tiny, tmp_path):
    """kill -9 as the third checkpoint is put in place; the rest gives the same result, to the byte."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = ("--episodes", "32", "--compare", "paper")
    command = [sys.executable, "-c", HANGING, *words(tiny, broken, *options, "--quiet")]
    process = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "third\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    assert len(rows_of(broken)) == 12  # 4 of them after the last checkpoint
    assert not (broken / "path.json").exists()
    assert main(["--resume", str(broken), "--compare", "paper"]) == 0
    assert main(words(tiny, whole, *options)) == 0
    for name in (*RESULT, "merged/model.safetensors"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name
    tables = [json.loads((folder / "table.json").read_text()) for folder in (whole, broken)]
    assert tables[0][-1]["seconds"] > 0
    assert tables[1][-1]["seconds"] is None  # of a part of it they say nothing
    for row in (*tables[0], *tables[1]):
        del row["seconds"]
    assert tables[0] == tables[1]


@pytest.mark.slow
def test_searches_killed_at_random_moments_end_as_unbroken_ones(tmp_path):
    script = Path(__file__).with_name("kills.py")
    command = [
        sys.executable,
        str(script),
        str(tmp_path),
        "2",
        "1",
        "default",
        "least squares",
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[1])}
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal to the byte") == 2


def test_ctrl_c_says_how_to_go_on(tiny, tmp_path, monkeypatch, capsys):
    save, folder = RunFolder.save_checkpoint, tmp_path / "run"

    def interrupted(*args):
        save(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "save_checkpoint", interrupted)
    assert main(words(tiny, folder, "--episodes", "20")) == 130
    assert f"--resume {folder}" in capsys.readouterr().err
    assert len(rows_of(folder)) == 4  # one update


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gamma", "0.5"], r"--gamma 1\.0 as in .*, found 0\.5"),
        (["--episodes", "30"], "--episodes 64 as in .*, found 30"),
        (["--seed", "2"], "--seed 1 as in .*, found 2"),
        (["--operators", "ties"], r"--operators .*'ties'.* as in .*, found .*ties"),
        (["--run-dir", "other"], "--run-dir: expected none"),
    ],
)
def test_a_run_goes_on_with_its_own_options_only(unbroken, capsys, options, message):
    folder = unbroken[1].folder
    before = {p: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    assert main(["--resume", str(folder), *options]) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
    assert {p: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before


def test_the_checkpoint_of_another_search_is_refused(tiny, tmp_path):
    for name, operators in (("one", ("ties",)), ("two", ("ties", "dare"))):
        run(**tiny, preset="agent", operators=operators, episodes=4, run_dir=tmp_path / name)
    other = (tmp_path / "two" / "checkpoint.safetensors").read_bytes()
    (tmp_path / "one" / "checkpoint.safetensors").write_bytes(other)
    options = {"preset": "agent", "operators": ("ties",), "episodes": 4}
    with pytest.raises(InputError, match=r"--resume: expected .*config\.json as when"):
        run(**tiny, **options, resume=tmp_path / "one")
    for name in ("episodes.csv", "updates.csv", "config.json"):
        (tmp_path / "one" / name).write_bytes((tmp_path / "two" / name).read_bytes())
    with pytest.raises(InputError, match="--resume: expected --operators"):
        run(**tiny, **options, resume=tmp_path / "one")


@pytest.fixture(scope="module")
def moving(tiny, tmp_path_factory):
    """A folder with models, pictures and a stopped run of them, to copy; what the run gave when unbroken."""
    root = tmp_path_factory.mktemp("moving") / "here"
    for name in ("base", "e1", "e2", "i1", "i2"):
        shutil.copytree(Path(tiny["base"]).parent / name, root / name)
    own = {"base": str(root / "base"), "experts": (str(root / "e1"), str(root / "e2"))}
    own |= {"images": (str(root / "i1"), str(root / "i2")), "preset": "agent", "episodes": 40}
    own |= {"operators": ("regmean",), "calibration": 5, "episodes_per_update": 8}
    whole = run(**own, run_dir=root / "whole")
    with pytest.MonkeyPatch.context() as patched:
        stop_at(patched, 20)
        with pytest.raises(Stop):
            run(**own, run_dir=root / "runs" / "run")
    return root, whole


def resumed(folder):
    config = read_config(RunFolder(folder).read_config(), folder)
    return train(configure(config, resume=folder, quiet=True), table=False)


def test_a_run_that_moved_with_its_models_goes_on(moving, tmp_path, monkeypatch):
    root, whole = moving
    shutil.move(shutil.copytree(root, root.parent / "copy"), tmp_path / "there")
    monkeypatch.chdir(tmp_path)
    root.rename(root.with_name("elsewhere"))  # what is in its place is found there
    try:
        again = resumed(Path("there/runs/run"))
    finally:
        root.with_name("elsewhere").rename(root)
    assert again.episodes == whole.episodes
    assert again.path.experts[0].source == str(tmp_path / "there" / "e1")
    for name in ("episodes.csv", "updates.csv", "merged/model.safetensors"):
        assert (again.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name


def rotate(name):
    return lambda root: (root / name).write_bytes(
        (root / name).read_bytes()[:-1] + bytes([(root / name).read_bytes()[-1] ^ 1])
    )


def replaced(name, old, new):
    def change(root):
        text = (root / name).read_text()
        assert old in text
        (root / name).write_text(text.replace(old, new, 1))

    return change


def shifted(name):
    def change(root):
        pictures = sorted((root / name).rglob("*.png"))
        for picture in pictures[1:]:
            picture.write_bytes(pictures[0].read_bytes())

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (rotate("e2/model.safetensors"), "expert e2"),
        (rotate("base/model.safetensors"), "the base"),
        (replaced("e1/config.json", '"label_names"', '"seed": 3, "label_names"'), "expert e1"),
        (shifted("i2/reward"), "the reward split of i2"),
        (shifted("i1/train"), "the calibration inputs of i1"),
        (replaced("runs/run/config.json", '"gamma": 1.0', '"gamma": 0.9'), "config.json"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_a_run_goes_on_with_what_it_was_made_of_alone(moving, tmp_path, change, named):
    """The copies lie where the run looks only after the originals are gone: so it names its own models."""
    root, _ = moving
    kept = root.rename(root.with_name("kept"))
    try:
        shutil.copytree(kept, root)
        change(root)
        before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
        with pytest.raises(InputError, match=f"--resume: expected .*{named} as when .*another"):
            resumed(root / "runs" / "run")
        assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file()} == before
    finally:
        shutil.rmtree(root)
        kept.rename(root)


@pytest.mark.parametrize(
    "damage",
    [
        lambda merged: shutil.rmtree(merged),
        lambda merged: (merged / "config.json").unlink(),
        lambda merged: (merged / "model.safetensors").write_bytes(b"half"),
        lambda merged: (merged / "config.json").write_text("{"),
    ],
    ids=["gone", "no config", "half a model", "half a config"],
)
def test_a_finished_run_writes_a_damaged_model_again(moving, tmp_path, damage):
    folder = Path(shutil.copytree(moving[1].folder, tmp_path / "run"))
    files = {p: p.read_bytes() for p in (folder / "merged").iterdir()}
    (folder / "merged" / "mine.txt").write_text("kept")
    damage(folder / "merged")
    resumed(folder)
    assert {p: p.read_bytes() for p in files} == files
    assert {p.name for p in folder.iterdir()} == {p.name for p in moving[1].folder.iterdir()}


def test_a_second_process_is_refused_by_name(moving, tmp_path):
    folder = Path(shutil.copytree(moving[0] / "runs" / "run", tmp_path / "run"))
    before = {p: p.read_bytes() for p in folder.iterdir()}
    by = f"--resume: .* held by process {os.getpid()} on"
    with held(folder, "--resume"), pytest.raises(InputError, match=by):
        resumed(folder)
    assert {p: p.read_bytes() for p in folder.iterdir()} == before


def test_a_search_that_cannot_be_made_leaves_no_folder(tiny, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(InputError, match="--max-depth: expected at least 3 layers, found 2"):
        run(**tiny, max_depth=2, run_dir=folder)
    with pytest.raises(InputError, match="expected at least 2 models"):
        run(**tiny | {"experts": tiny["experts"][:1]}, run_dir=folder)
    assert not folder.exists()
