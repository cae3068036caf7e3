"""The options of a search in three parts, the presets, and how options are set by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from rmm_lab import ppo
from rmm_lab.errors import SEED_RANGE, InputError, check_values
from rmm_lab.search.problem import ProblemSpec, at_hand, moved


@dataclass(frozen=True)
class RunArgs:
    """How a search spends its evaluations, and where it runs."""

    episodes: int = 700
    """Merged models to evaluate."""
    data_fraction: float = 0.1
    """Share of each task's reward split that scores an episode, in (0, 1]."""
    seed: int = 1
    """Seed of the policy, the rollouts, the data subsets, CMA-ES, and the random operators' masks."""
    reward: Literal["metric", "likelihood", "agreement"] = "metric"
    """What scores an episode: each task's metric (Eq. 7), how likely its right answers are, or how nearly
    the answers are those of the task's expert, without labels, which then also makes the final choice."""
    dar_lambda: float = 0.0
    """Lambda of the Dynamic Average Reward, Eq. 10, in [0, 1]; 0 switches it off."""
    observation: Literal["map", "map+cursor", "map+cursor+drift"] = "map+cursor"
    """What the agent sees: the merging map of Eq. 5, its position, how far from each expert it has got."""
    actions: Literal["sources", "scales"] = "sources"
    """What the agent chooses at each place: a source, or a scale for each expert and merge that looks."""
    deviation: float = 0.05
    """First standard deviation of a scale in the policy of an agent of scales."""
    shaping: float = 0.0
    """Weight of a reward for each step by how much nearer to the experts it leads; 0 switches it off."""
    penalty: float = -0.1
    """Reward of an illegal move, at most 0; rewards are in [0, 1]."""
    max_steps: int | None = None
    """Most actions in an episode; by default 4 L + 1."""
    max_depth: int | None = None
    """Most layers in a merged model; by default 2 L."""
    episodes_per_subset: int = 20
    """Episodes in a row that are scored on the same data subset."""
    score_uniform_first: bool = False
    """Score the uniform path of each source first, for up to a tenth of the episodes."""
    cma_share: float = 0.0
    """Share of the remaining episodes for the last phase, CMA-ES over a scale per layer and member."""
    finalists: int = 10
    """Best paths, besides the greedy one, that are scored on the whole reward split at the end."""
    prefer: str | None = None
    """Weights of the tasks, such as digits=2,textures=1, that choose the final path; by default the mean."""
    front: bool = False
    """Also write the front: models for every preference, as front.json, front.md and front.png."""

    compare: Literal["paper", "few", "rules", "all"] = "few"
    """Rows of the table: the paper's merges; with few better ones; with all by rule; with all by gradient."""
    run_dir: Path | None = None
    """New folder for the results; the command line makes runs/merge-DATE-TIME by default."""
    resume: Path | None = None
    """Folder of a stopped run to resume; the result is that of an unbroken run."""
    threads: int = 1
    """CPU threads for torch; with more than one, small models are often slower. 0: torch's choice."""
    workers: int | str = 1
    """How many paths to score at once: a number of threads, ray, or ray://HOST:PORT; changes no reward."""
    cache_mb: float | None = None
    """MiB for activations that are used again, by default a quarter of free memory; changes no reward."""
    device: str = "cpu"
    """Where the models run: cpu, or a GPU such as cuda."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the models in the search; bfloat16 changes rewards a little. Tables use float32."""
    export: Literal["", "mergekit"] = ""
    """mergekit: of language models, also write mergekit.yaml, from which mergekit makes the same model."""
    quiet: bool = False
    """Print nothing."""

    def __post_init__(self) -> None:
        for name in ("run_dir", "resume"):  # --run-dir=~/x, which no shell expands
            if isinstance(path := getattr(self, name), Path):
                object.__setattr__(self, name, path.expanduser())
        check_values(
            self,
            {
                "episodes episodes_per_subset": ("at least 1", lambda v: v >= 1),
                "max_steps max_depth": ("at least 1", lambda v: v >= 1),
                "seed": SEED_RANGE,
                "threads": ("0 to 1024", lambda v: 0 <= v <= 1024),
                "data_fraction": ("at least 1e-6 and at most 1", lambda v: 1e-6 <= v <= 1),
                "dar_lambda cma_share": ("0 to 1", lambda v: 0 <= v <= 1),
                "finalists cache_mb": ("0 or more", lambda v: v >= 0),
                "deviation": ("1e-4 to 1", lambda v: 1e-4 <= v <= 1),
                "shaping": ("0 to 1000", lambda v: 0 <= v <= 1000),
                "penalty": ("-1000 to 0", lambda v: -1000 <= v <= 0),
                "device": ("a device of torch's, such as cpu or cuda", _is_device),
            },
        )
        if self.cma_share == 1 and not self.score_uniform_first:
            raise InputError(
                "--cma-share: expected less than 1 without --score-uniform-first, found 1; CMA-ES needs "
                "a path to start from"
            )


def _is_device(text: str) -> bool:
    try:
        torch.device(text)
    except RuntimeError:
        return False
    return True


# Fields of RunArgs that do not determine the result, and are not stored.
WHERE = (
    "compare",
    "front",
    "run_dir",
    "resume",
    "threads",
    "workers",
    "cache_mb",
    "export",
    "quiet",
)


@dataclass(frozen=True)
class Config:
    """All options of a search; each has one name, in one of the three parts."""

    problem: ProblemSpec = field(default_factory=ProblemSpec)
    agent: ppo.Args = field(default_factory=ppo.Args)
    run: RunArgs = field(default_factory=RunArgs)

    def stored(self) -> dict[str, dict[str, Any]]:
        """What determines the result, as JSON takes it: config.json of a run folder."""
        parts = {name: dataclasses.asdict(part) for name, part in vars(self).items()}
        for name in WHERE:
            del parts["run"][name]
        return {
            name: {k: list(v) if isinstance(v, tuple) else v for k, v in part.items()}
            for name, part in parts.items()
        }


# Merges that look at inputs, as whole models: equal weights, and one leaning to each task.
MENU = ("least_squares:fit=whole", "least_squares:fit=whole,lean=3")
PRESETS: dict[str, Config] = {
    # An agent that gives each place a scale for each expert and merge of the menu. It measures best on the
    # reward split: see docs/evidence.md.
    "default": Config(
        problem=ProblemSpec(operators=MENU, calibration=500, seed=1),
        agent=ppo.Args(ent_coef=0.0, ent_coef_end=0.0),
        run=RunArgs(actions="scales", score_uniform_first=True),
    ),
    # Without inputs to look at: the agent walks through whole blocks; then a scale for each sublayer and
    # expert evolves around its best path.
    "weights": Config(
        problem=ProblemSpec(unit="both", seed=1),
        run=RunArgs(score_uniform_first=True, cma_share=0.8),
    ),
    # The agent of weights, alone.
    "agent": Config(problem=ProblemSpec(seed=1)),
    # As published with the paper, but for the bounds on an episode.
    "paper": Config(
        problem=ProblemSpec(
            metric="accuracy",
            operators=("task_arithmetic", "ties", "dare"),
            stem="task_arithmetic",
            seed=1,
        ),
        agent=ppo.Args(
            episodes_per_update=4,
            update_epochs=40,
            learning_rate=3e-4,
            critic_learning_rate=1e-3,
            gamma=0.99,
            ent_coef=0.0001,
            ent_coef_end=0.0001,
            target_kl=0.0,
            mask_actions=False,
        ),
        run=RunArgs(dar_lambda=0.8, observation="map", episodes_per_subset=1),
    ),
}


def configure(preset: str | Config = "default", **options: Any) -> Config:
    """A preset with some options set by name, as on the command line.

    ``configure("paper", experts=("qa",), episodes=100)``. With ``seed``, and with a preset's name, the
    operators' masks get the run's seed.
    Raises InputError for an unknown preset or option, and for a value out of range.
    """
    if isinstance(preset, str) and preset not in PRESETS:
        raise InputError(f"--preset: expected {' or '.join(PRESETS)}, found {preset!r}; correct it")
    config = PRESETS[preset] if isinstance(preset, str) else preset
    parts, shares_seed = dict(vars(config)), isinstance(preset, str) or "seed" in options
    for name, part in parts.items():
        known = {f.name for f in dataclasses.fields(part)} & set(options)
        known -= {"seed"} if name == "problem" else set()
        values = {k: tuple(v) if isinstance(v := options[k], list) else v for k in known}
        parts[name] = dataclasses.replace(part, **values)
        options = {k: v for k, v in options.items() if k not in known}
    if unknown := sorted(options):
        raise InputError(
            f"configure: expected options of a search, found {unknown[0]!r}; see python -m rmm_lab "
            "merge --help"
        )
    if shares_seed:
        parts["problem"] = dataclasses.replace(parts["problem"], seed=parts["run"].seed)
    return Config(**parts)


def describe(config: Config) -> dict[str, Any]:
    """The inverse of ``configure``: the nearest preset, the seed, and the options that differ from it.

    As JSON takes it; options that do not determine the result are left out, and so is the seed of the
    operators' masks: with ``configure`` it is the run's.
    """

    def flat(config: Config) -> dict[str, Any]:
        stored = config.stored()
        return stored["problem"] | stored["agent"] | stored["run"]

    own = flat(config)
    found = []
    for name, preset in PRESETS.items():
        usual = flat(preset)
        found.append((name, {k: v for k, v in own.items() if v != usual[k] and k != "seed"}))
    name, differences = min(found, key=lambda pair: len(pair[1]))
    return {"preset": name, "seed": own["seed"]} | differences


# What a search's row is called: an agent alone, as published or another; both; CMA-ES alone.
BOTH = "agent + CMA-ES"  # the preset weights
SEARCHED = ("RMM (paper)", "RMM (agent)", BOTH, "CMA-ES over scales")


def searched(config: Config) -> str:
    """The name of a search's row, one of ``SEARCHED``, by what spends its episodes.

    The uniform paths do not count. An agent is the published one where ``paper`` is the nearest preset.
    """
    if share := config.run.cma_share:
        return SEARCHED[3] if share == 1 else BOTH
    return SEARCHED[0] if describe(config)["preset"] == "paper" else SEARCHED[1]


def seen_by(config: Config) -> str:
    """The most that a search looks at: ``inputs`` where no label scores or chooses, else ``labels``."""
    return "inputs" if config.run.reward == "agreement" else "labels"


def read_config(stored: Mapping[str, Any], where: str | Path) -> Config:
    """The inverse of ``Config.stored``; ``where`` is the folder, which may have moved with what is merged."""
    kinds = {"problem": ProblemSpec, "agent": ppo.Args, "run": RunArgs}
    parts: dict[str, Any] = {}
    try:
        for name, kind in kinds.items():
            values = {k: tuple(v) if isinstance(v, list) else v for k, v in stored[name].items()}
            parts[name] = kind(**values)
        before = str(stored.get("run_folder", ""))
        parts["problem"] = moved(at_hand(parts["problem"]), before, Path(where).expanduser())
    except (KeyError, TypeError, AttributeError, InputError) as error:
        raise InputError(
            f"--resume: expected the config of this version in {where}, found another ({error}); start "
            "the search again in another folder"
        ) from error
    return Config(**parts)


def check_depth(scorer: Any, config: Config) -> None:
    """InputError where a phase needs more layers than a path may have."""
    run = config.run
    needed, most = scorer.n_layers, run.max_depth
    if config.problem.unit == "both":
        needed = len(scorer.blocks)
    skips_none = run.score_uniform_first or run.cma_share or run.actions == "scales"
    if skips_none and most is not None and most < needed:
        raise InputError(
            f"--max-depth: expected at least {needed} layers, found {most}; the uniform paths, CMA-ES and an "
            "agent of scales skip none: use --no-score-uniform-first --cma-share 0 --actions sources"
        )
