"""The options of a search: presets, options by name, the stored form, the command line."""

from __future__ import annotations

import dataclasses
import json

import pytest

from rmm_lab.__main__ import main
from rmm_lab.errors import InputError
from rmm_lab.search.config import PRESETS, Config, configure, describe, read_config, searched

OTHER = {  # one value per kind of option, none of them a default
    "experts": ("qa",),
    "operators": ("ties", "dare"),
    "unit": "sublayer",
    "gamma": 0.5,
    "gae_lambda": 0.9,
    "mask_actions": False,
    "data_fraction": 0.3,
    "max_depth": 9,
    "finalists": 3,
    "seed": 4,
}


def test_the_paper_preset_is_the_papers():
    paper = PRESETS["paper"]
    agent, run = paper.agent, paper.run
    assert (agent.episodes_per_update, agent.update_epochs, agent.clip_coef) == (4, 40, 0.2)
    assert (agent.learning_rate, agent.critic_learning_rate, agent.gamma) == (3e-4, 1e-3, 0.99)
    assert (agent.ent_coef, agent.vf_coef, agent.mask_actions) == (0.0001, 0.5, False)
    assert (run.episodes, run.data_fraction, run.dar_lambda, run.observation) == (
        700,
        0.1,
        0.8,
        "map",
    )
    assert paper.problem.operators == ("task_arithmetic", "ties", "dare")


def test_option_names_are_unique_so_that_one_name_sets_one_option():
    config = Config()
    names = [{f.name for f in dataclasses.fields(part)} for part in vars(config).values()]
    assert set.intersection(names[0], names[2]) == {"seed"}
    assert not names[1] & (names[0] | names[2])


def test_options_by_name_change_these_and_no_others():
    plain, config = PRESETS["paper"], configure("paper", episodes=9, gamma=0.5, experts=["qa"])
    assert (config.run.episodes, config.agent.gamma, config.problem.experts) == (9, 0.5, ("qa",))
    back = configure(config, episodes=700, gamma=0.99, experts=("demo",))
    assert dataclasses.replace(back, problem=plain.problem) == plain
    assert dataclasses.replace(back.problem, seed=plain.problem.seed) == plain.problem


def test_one_seed_is_the_runs_and_the_masks():
    config = configure(seed=7)
    assert (config.problem.seed, config.run.seed) == (7, 7)
    loaded = dataclasses.replace(config, problem=dataclasses.replace(config.problem, seed=5))
    assert configure(loaded, resume=None).problem.seed == 5  # of a loaded problem it stays
    assert configure(loaded, seed=8).problem.seed == 8


@pytest.mark.parametrize("options", [{}, {"seed": 3}, OTHER], ids=["none", "seed", "many"])
@pytest.mark.parametrize("preset", PRESETS)
def test_described_and_stored_options_come_back(preset, options):
    config = configure(preset, **options)
    described = json.loads(json.dumps(describe(config)))
    assert configure(**described) == config
    assert read_config(json.loads(json.dumps(config.stored())), "folder") == config
    if options is not OTHER:
        assert described == {"preset": preset, "seed": config.run.seed}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_config_from_before_an_option_has_its_default(preset):
    """Each of these came later, with a default that changes nothing."""
    stored = configure(preset).stored()
    del stored["agent"]["gae_lambda"], stored["run"]["shaping"], stored["run"]["actions"]
    assert read_config(stored, "folder") == configure(preset, actions="sources")


def test_a_config_is_described_by_the_preset_that_it_equals():
    """A preset's values under another preset's name: the name follows the values."""
    agent, weights = PRESETS["agent"], PRESETS["weights"]
    changed = configure("agent", unit="both", score_uniform_first=True, cma_share=0.8)
    assert describe(changed) == describe(configure("weights"))
    assert describe(changed)["preset"] == "weights"
    assert agent != weights


@pytest.mark.parametrize(
    ("preset", "options", "name"),
    [
        ("default", {}, "RMM (agent)"),
        ("default", {"actions": "sources", "observation": "map"}, "RMM (agent)"),
        ("default", {"cma_share": 0.5}, "agent + CMA-ES"),
        ("weights", {}, "agent + CMA-ES"),
        ("weights", {"experts": ("letters", "symbols"), "cma_share": 0.05}, "agent + CMA-ES"),
        ("weights", {"cma_share": 1.0}, "CMA-ES over scales"),
        ("weights", {"cma_share": 0.0}, "RMM (agent)"),  # an agent, after the uniform paths
        ("agent", {}, "RMM (agent)"),
        ("agent", {"gamma": 0.99, "observation": "map"}, "RMM (agent)"),
        ("agent", {"cma_share": 0.5}, "agent + CMA-ES"),
        ("paper", {}, "RMM (paper)"),
        ("paper", {"experts": ("qa",), "episodes": 50, "dar_lambda": 0.0}, "RMM (paper)"),
        ("paper", {"cma_share": 0.5}, "agent + CMA-ES"),
        ("paper", {"cma_share": 1.0, "score_uniform_first": True}, "CMA-ES over scales"),
    ],
)
def test_a_row_is_called_what_searched(preset, options, name):
    assert searched(configure(preset, **options)) == name


def test_where_a_search_runs_is_no_part_of_its_config():
    plain = configure()
    elsewhere = configure(workers="4", cache_mb=3.0, threads=2, quiet=True, run_dir=None)
    assert elsewhere.stored() == plain.stored()
    for options in ({"precision": "bfloat16"}, {"device": "cuda"}, {"reward": "likelihood"}):
        assert configure(**options).stored() != plain.stored()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("episodes", 2.5), ("episodes", 0), ("episodes", True), ("episodes", "9")),
        *(("data_fraction", 0.0), ("data_fraction", 1.5), ("dar_lambda", 1.2), ("penalty", 0.1)),
        *(
            ("cma_share", -0.1),
            ("finalists", -1),
            ("seed", -1),
            ("max_depth", 0),
            ("threads", 2000),
        ),
        *(("unit", "x"), ("scope", "x"), ("reward", "x"), ("precision", "x"), ("observation", "x")),
        *(("mask_actions", "no"), ("quiet", 1), ("device", "nosuch"), ("operators", ("ties", 3))),
        *(("experts", "demo"), ("gamma", 1.5), ("metric", "x"), ("stem", None)),
    ],
)
def test_a_value_of_another_type_or_out_of_range_is_refused_by_name(option, value):
    with pytest.raises(InputError, match=f"--{option.replace('_', '-')}: expected .*, found"):
        configure(**{option: value})


def test_unknown_options_and_presets_are_refused():
    with pytest.raises(InputError, match="found 'finish'"):
        configure(finish=0.5)
    with pytest.raises(InputError, match="default or weights or agent or paper, found 'best'"):
        configure("best")
    with pytest.raises(InputError, match="--cma-share: expected less than 1 without"):
        configure("agent", cma_share=1.0)


@pytest.mark.parametrize(
    "change",
    [
        lambda stored: stored.pop("agent"),
        lambda stored: stored["run"].update(finish=0.5),
        lambda stored: stored["run"].update(episodes="many"),
        lambda stored: stored.update(problem=3),
    ],
)
def test_a_config_of_another_version_is_refused(change):
    stored = configure().stored()
    change(stored)
    with pytest.raises(InputError, match="expected the config of this version in runs/a"):
        read_config(stored, "runs/a")


# ----------------------------------------------------------------------------------- command line


@pytest.fixture
def trained_with(monkeypatch):
    """The configs that the command line hands to ``train``, which does nothing."""
    configs: list[Config] = []
    monkeypatch.setattr(
        "rmm_lab.search.command.train", lambda config, above: configs.append(config)
    )
    monkeypatch.setattr("rmm_lab.search.command.keep_freed_memory", lambda: None)
    return configs


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("form", ["--preset {}", "--preset={}", "merge --preset {}"])
def test_the_command_line_starts_from_a_preset(trained_with, preset, form):
    words = [*form.format(preset).split(), "--episodes", "9", "--experts", "qa", "--seed", "5"]
    assert main(words) == 0
    [config] = trained_with
    assert config.run.run_dir is None  # ``train`` makes one in runs/
    expected = configure(preset, episodes=9, experts=("qa",), seed=5)
    assert configure(config, run_dir=None) == expected


def test_the_command_line_goes_on_with_the_stored_options(trained_with, tmp_path):
    stored = configure("paper", episodes=9, seed=5).stored()
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert main(["--resume", str(tmp_path), "--workers", "2"]) == 0
    [config] = trained_with
    assert config.stored() == stored
    assert (config.run.resume, config.run.workers, config.run.run_dir) == (tmp_path, 2, None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--resume", "{}"], "expected a run folder with config.json"),
        (["--resume", "{}", "--run-dir", "x"], "expected a run folder with config.json"),
    ],
)
def test_a_folder_without_a_config_is_refused(trained_with, tmp_path, capsys, words, message):
    assert main([word.format(tmp_path) for word in words]) == 2
    assert message in capsys.readouterr().err
    assert not trained_with


@pytest.mark.parametrize("words", [["--gamma", "2"], ["--episodes", "2.5"], ["--unit", "x"]])
def test_the_command_line_refuses_what_the_options_refuse(trained_with, capsys, words):
    try:
        code = main(words)
    except SystemExit as stop:  # the parser's own refusal
        code = stop.code
    assert code == 2
    assert words[0] in capsys.readouterr().err
    assert not trained_with
