"""The paper's tables and Fig. 3 from one command each: at this kit's scale, or at the paper's.

    python -m rmm_lab tables I            halves of each small set, two sizes of ViT
    python -m rmm_lab tables II           two sets that differ more: digits and textures
    python -m rmm_lab tables III          T5s on question answering and on four kinds of task, Llamas
    python -m rmm_lab tables IV           data share and DAR
    python -m rmm_lab tables fig3         reward per episode at 1 % of the data, with DAR and without
    python -m rmm_lab tables all          all of these; some hours with --jobs 2
    python -m rmm_lab tables searches     agent + CMA-ES beside others, at the same number of evaluations
    python -m rmm_lab tables menu         the default search beside others on the same menu
    python -m rmm_lab tables groups       Table II's methods on other groups of sets
    python -m rmm_lab tables agent        agent + CMA-ES with one choice changed
    python -m rmm_lab tables default      the default search with one choice changed
    python -m rmm_lab tables budgets      some of these at 50, 100, 200 and 700 evaluations
    python -m rmm_lab tables seconds      the same searches at equal seconds
    python -m rmm_lab tables labels       Table IV by the default search: few labels, and none
    python -m rmm_lab tables fronts       searches for many answers: hypervolumes of their fronts
    python -m rmm_lab tables show         only write the pages, figures and excerpts from the CSV files

``--scale paper`` takes the paper's models and sets, for Tables I to IV and Fig. 3: see ``paper_scale``. Real
pretrained models have a command of their own: ``python -m rmm_lab tables real``, see ``real``.
A table is a CSV file with a page (.md) and a figure (.png) beside it; a stopped command goes on where it
was. Nothing here is chosen by the test split.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from rmm_lab.engine.scorer import check_device
from rmm_lab.errors import SEED_RANGE, InputError, check_values
from rmm_lab.evidence import excerpts, fronts, measure, page_figures, pages
from rmm_lab.evidence.kit_scale import LANGUAGE, SETS, SIZES, VISION, WRITING, Groups, kit_groups
from rmm_lab.evidence.measure import Job, Store
from rmm_lab.evidence.paper_scale import Group, PaperScale
from rmm_lab.evidence.rows import DRAWN, KINDS, of_this_version, read_csv
from rmm_lab.figures.render import png
from rmm_lab.search import rivals
from rmm_lab.search.config import BOTH, SEARCHED, configure, searched
from rmm_lab.search.uniform import OF_ADAPTERS, OF_TWO
from rmm_lab.tasks.console import run_command
from rmm_lab.tasks.files import write_file
from rmm_lab.tasks.hold import check_apart, check_writable, held_made
from rmm_lab.tasks.image_task import data_folder

DATA = (1.0, 0.1, 0.01)  # Table IV's shares of the data
DAR_SETTINGS: tuple[dict[str, Any], ...] = (  # at 100 % every other one
    {"preset": "paper"},
    {"preset": "paper", "dar_lambda": 0.0},
    {"preset": "weights"},
    {"preset": "weights", "reward": "likelihood"},
)
METHOD_TABLES = {"I": "halves", "II": "vision", "III": "language", "groups": "vision"}
ALL = ("I", "II", "III", "IV", "fig3")
# The preset weights with one choice changed: name -> options. None: measured with the first edition's local
# search, which the kit no longer has; the rows stay.
AGENT: dict[str, dict[str, Any] | None] = {
    BOTH: {},
    "without the agent": None,
    "half as much agent": None,
    "without the local search": None,
    "without the scales": None,
    "the agent alone": {"cma_share": 0.0},
    "the local search alone": None,
    "the scales alone": {"cma_share": 1.0},
    "without the uniform paths": {"score_uniform_first": False},
    "whole blocks": {"unit": "block"},
    "sublayers for the agent too": {"unit": "sublayer"},
    "the paper's operators and stem": {
        "operators": ("task_arithmetic", "ties", "dare"),
        "stem": "task_arithmetic",
    },
    "likelihood as the reward": {"reward": "likelihood"},
    "agent preset": {"preset": "agent"},
    "paper preset": {"preset": "paper"},
}
# The default preset with one choice changed.
DEFAULT: dict[str, dict[str, Any]] = {
    SEARCHED[1]: {},
    "drift seen": {"observation": "map+cursor+drift"},
    "shaping by drift": {"shaping": 1.0},
    "GAE": {"gae_lambda": 0.95},
    "smaller first steps": {"deviation": 0.01},
    "all three": {"observation": "map+cursor+drift", "shaping": 1.0, "gae_lambda": 0.95},
}
# What scores the default search's episodes, and which labels are known. With few of them each episode sees
# all; a small share of the data alone leaves the final choice all labels, as in the other tables.
LABELS: tuple[dict[str, Any], ...] = (
    {},
    {"reward": "likelihood"},
    {"data_fraction": 0.01},
    *(
        {"reward": reward, "label_fraction": share, "data_fraction": 1.0}
        for share in (0.1, 0.01)
        for reward in ("metric", "likelihood")
    ),
    {"reward": "agreement"},
)
# Of AGENT, those that are measured on texts, whose searches take minutes.
ON_TEXTS = (BOTH, "likelihood as the reward", "agent preset")
# What every group has that depends on no seed: SLERP is for two experts, and no adapters ship.
ONCE = ("fine-tuned", *(m for m in KINDS["uniform"] if m not in (*DRAWN, *OF_TWO, *OF_ADAPTERS)))
PER_SEED = {"matched": measure.matched_rules, "gradients": measure.by_gradient}
# Scale -> presets whose searches are in Tables I to III.
PRESETS_AT = {"kit": ("default",), "paper": ("paper", "default")}
ORDER = {
    "group": (*SETS, *VISION, *LANGUAGE, *WRITING),
    "size": tuple(SIZES),
    "setting": (*AGENT, *DEFAULT),
}


@dataclass
class Command:
    """Measure a table, or go on with it, and write its page and figure."""

    dar_settings = DAR_SETTINGS  # no option
    table: Literal[
        "I",
        "II",
        "III",
        "IV",
        "fig3",
        "searches",
        "menu",
        "groups",
        "agent",
        "default",
        "budgets",
        "seconds",
        "labels",
        "fronts",
        "all",
        "show",
    ]
    """Which one; the list above says what each holds."""
    scale: Literal["kit", "paper"] = "kit"
    """kit: the models that ship, on a CPU; paper: the paper's models and sets."""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Seeds of the search."""
    episodes: int = 700
    """Evaluations of each search."""
    budgets: tuple[int, ...] = (50, 100, 200, 700)
    """Evaluations of each search of the table budgets, in place of --episodes."""
    only: tuple[str, ...] = ()
    """Groups, or Table IV's shares of the data such as 0.01, to measure now; all by default."""
    out: Path | None = None
    """Folder of the results; by default results, at the paper's scale results-paper."""
    kinds: tuple[Literal["uniform", "matched", "gradients", "search"], ...] = ()
    """Methods of Tables I to III and groups to measure now, by kind; all by default."""
    calibration: int = 500
    """Inputs per task that RegMean and least squares look at."""
    jobs: int = 1
    """Searches to run at once, each in a process of its own."""
    threads: int = 1
    """CPU threads of each process."""
    device: str = "cpu"
    """Where the models run: cpu, or a GPU such as cuda."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the models in a search; what is reported is scored in float32."""
    paper: PaperScale = field(default_factory=PaperScale)
    """The options of --scale paper."""

    def run(self) -> None:
        """Measure what is not in the files yet, then write pages, figures and excerpts."""
        check_values(
            self,
            {
                "episodes calibration": ("at least 1", lambda v: v >= 1),
                "jobs threads": ("1 to 1024", lambda v: 1 <= v <= 1024),
                "budgets": ("one or more of at least 1", lambda v: len(v) > 0 and min(v) >= 1),
            },
        )
        odd = not all(map(SEED_RANGE[1], self.seeds))
        if odd or not 1 <= len(set(self.seeds)) == len(self.seeds):
            raise InputError(
                f"--seeds: expected one or more different numbers, {SEED_RANGE[0]}, found "
                f"{' '.join(map(str, self.seeds)) or 'none'}; give others"
            )
        out = (self.out or Path("results" if self.scale == "kit" else "results-paper")).expanduser()
        check_writable(out, "--out")
        check_device(self.device)
        if self.table == "show":
            written = [*write_pages(out), *write_excerpts(out)]
            if not written:
                raise InputError(
                    f"--out: expected a folder with the CSV files of a table, found none in {out}; measure "
                    "one first, or name another folder"
                )
        else:
            groups = self._groups(ALL if self.table == "all" else (self.table,))
            found = {place for own in groups.values() for group in own for place in group.reads}
            check_apart(out, "--out", (*found, *self.paper.places()))
            with held_made(out, "--out"):
                self._measure(out, groups)
                written = [*write_pages(out), *write_excerpts(out)]
        for file in written:
            print(f"written: {file}")

    def _measure(self, out: Path, groups: Groups) -> None:
        """Measure what is not in the files yet."""
        if self.scale == "paper":
            wanted = [group for own in groups.values() for group in own]
            self.paper.prepare(wanted, self.device, self.threads)
        store = Store(out, ORDER)
        found = (job for name, own in groups.items() for job in self.jobs_of(name, own, store))
        jobs = {(j.table, j.measure, *j.key.values()): j for j in found}  # IV holds fig3
        print(f"{len(jobs)} jobs to measure into {out}", flush=True)
        measure.measure_all(list(jobs.values()), store, self.jobs, self.threads)

    def _groups(self, names: Sequence[str]) -> Groups:
        """The groups of each table that ``--only`` leaves."""
        of = kit_groups() if self.scale == "kit" else self.paper.groups()
        if odd := set(names) - set(of):
            raise InputError(
                f"--scale paper: expected one of {', '.join(of)}, found {odd.pop()!r}; give one of them"
            )
        shares = {f"{share:g}" for share in DATA} if "IV" in names else set()
        known = {g.name for name in names for g in of[name]} | shares
        if unknown := set(self.only) - known:
            raise InputError(
                f"--only: expected some of {', '.join(sorted(known))}, found {unknown.pop()!r}; correct it"
            )
        # A share alone means all groups of Table IV, and nothing else.
        wanted = set(self.only) - shares
        everywhere = names if not self.only else ("IV",) if not wanted else ()
        return {
            name: [g for g in of[name] if g.name in wanted or name in everywhere] for name in names
        }

    def jobs_of(self, name: str, groups: Sequence[Group], store: Store) -> Iterator[Job]:
        """What is not in the files yet."""
        make = {
            **dict.fromkeys(("searches", "menu"), self._rivals),
            **dict.fromkeys(("IV", "fig3"), self._dar),
            **{"agent": self._agent, "default": self._default, "labels": self._labels},
            **{"budgets": self._budgets, "seconds": self._seconds, "fronts": self._fronts},
        }
        for group in groups:
            if name in METHOD_TABLES:
                yield from self._methods(METHOD_TABLES[name], group, store)
                continue
            for seed in self.seeds:
                for job in make[name](name, group, self._options(group, seed)):
                    done = store.has(job.table, job.key, job.config)
                    if job.measure is measure.trained_curve:
                        curve = {"dar": job.key["dar"], "seed": seed}
                        done = done and store.has("dar-curve", curve)
                    if not done:
                        yield job

    def _options(self, group: Group, seed: int) -> dict[str, Any]:
        run = {"episodes": self.episodes, "device": self.device, "precision": self.precision}
        return group.options | run | {"seed": seed}

    def _methods(self, table: str, group: Group, store: Store) -> Iterator[Job]:
        """Rules that draw nothing once, all else for each seed."""
        key = {"group": group.name, "size": group.size}
        kinds = self.kinds or ("uniform", "matched", "gradients", "search")
        measured = store.methods(table, key)
        once = [method for method in ONCE if method not in measured]
        for seed in self.seeds:
            options, at = self._options(group, seed), key | {"seed": seed}
            # Rules merge block by block, as published, whatever the agent decides on.
            blocks = configure(
                "weights", **options | {"unit": "block", "calibration": self.calibration}
            )
            there = store.methods(table, at)
            if once and "uniform" in kinds:
                yield Job(table, measure.rules, at, blocks)
                once = []
            elif "uniform" in kinds and not there.issuperset(DRAWN):
                yield Job(table, measure.drawn, at, blocks)
            for kind, make in PER_SEED.items():
                if kind in kinds and not there.issuperset(KINDS[kind]):
                    yield Job(table, make, at, blocks)
            if "search" not in kinds:
                continue
            for preset in PRESETS_AT[self.scale]:
                more = {"calibration": self.calibration} if preset == "default" else {}
                config = configure(preset, **options | more)
                own = at | {"method": searched(config)}
                if not store.has(table, own, config):
                    yield Job(table, measure.trained, own, config)

    def _dar(self, name: str, group: Group, options: dict[str, Any]) -> Iterator[Job]:
        """The paper's preset at each share of the data, with DAR and without; ours beside it, by each reward.

        At 100 % every episode begins a new window, so DAR has no effect and is measured once; the likelihood
        is for small shares. Fig. 3 shows the first seed's searches at the smallest share.
        """
        shares = [f for f in DATA if f"{f:g}" in self.only] or DATA
        for fraction in DATA:
            for setting in self.dar_settings[:: 2 if fraction == 1 else 1]:
                config = configure(**(options | setting | {"data_fraction": fraction}))
                drawn = setting["preset"] == "paper" and fraction == min(DATA)
                drawn = drawn and options["seed"] == self.seeds[0]
                if drawn if name == "fig3" else fraction in shares:
                    run = config.run
                    key = {"group": group.name, "preset": setting["preset"], "reward": run.reward}
                    key |= {"data_fraction": fraction, "dar": run.dar_lambda, "seed": run.seed}
                    kind = measure.trained_curve if drawn else measure.trained
                    yield Job("dar", kind, key, config)

    def _rivals(self, name: str, group: Group, options: dict[str, Any]) -> Iterator[Job]:
        config, others = configure("weights", **options), list(rivals.SEARCHES)
        if name == "menu":
            config = configure(**options, calibration=self.calibration)
            # Two take experts alone, whatever the menu has.
            others = [name for name in others if name not in rivals.OF_EXPERTS]
        for method in (searched(config), *others):
            key = {"group": group.name, "seed": options["seed"], "method": method}
            yield Job(name, measure.search, key, config)

    def _agent(self, name: str, group: Group, options: dict[str, Any]) -> Iterator[Job]:
        for setting, changed in AGENT.items():
            if changed is not None and (group.name not in LANGUAGE or setting in ON_TEXTS):
                key = {"group": group.name, "setting": setting, "seed": options["seed"]}
                yield Job(
                    "agent",
                    measure.trained,
                    key,
                    configure(**({"preset": "weights"} | options | changed)),
                )

    def _default(self, name: str, group: Group, options: dict[str, Any]) -> Iterator[Job]:
        for setting, changed in DEFAULT.items():
            key = {"group": group.name, "setting": setting, "seed": options["seed"]}
            config = configure(**options, calibration=self.calibration, **changed)
            yield Job(name, measure.trained, key, config)

    def _budgets(self, name: str, group: Group, options: dict[str, Any]) -> Iterator[Job]:
        for n in self.budgets:
            config = configure(**options | {"episodes": n, "calibration": self.calibration})
            for method in (searched(config), *measure.ON_A_BUDGET):
                key = {"group": group.name, "evaluations": n, "seed": options["seed"]}
                yield Job(name, measure.search_alone, key | {"method": method}, config)

    def _seconds(self, name: str, group: Group, options: dict[str, Any]) -> Iterator[Job]:
        """One job for all searches of a seed: the agent's seconds are the others'."""
        config = configure(**options, calibration=self.calibration)
        key = {"group": group.name, "seed": options["seed"]}
        yield Job(name, measure.at_equal_seconds, key, config)

    def _labels(self, name: str, group: Group, options: dict[str, Any]) -> Iterator[Job]:
        for changed in LABELS:
            config = configure(**options, calibration=self.calibration, **changed)
            run, known = config.run, config.problem.label_fraction
            key = {"group": group.name, "reward": run.reward, "label_fraction": known}
            key |= {"data_fraction": run.data_fraction, "seed": run.seed}
            yield Job(name, measure.trained, key, config)

    def _fronts(self, name: str, group: Group, options: dict[str, Any]) -> Iterator[Job]:
        config = configure(**options, calibration=self.calibration)
        for method in fronts.methods(config):
            key = {"group": group.name, "seed": options["seed"], "method": method}
            yield Job(name, fronts.measured, key, config)


def read(name: str) -> pd.DataFrame:
    """A table that ships, by its file's name without ``.csv``; InputError where there is none."""
    file = data_folder().parent / "results" / f"{name}.csv"
    if not file.is_file():
        raise InputError(
            f"table {name!r}: expected {file}, found none; take a checkout of the repository, or measure "
            "it with python -m rmm_lab tables"
        )
    return read_csv(file)


def write_pages(folder: Path) -> Iterator[Path]:
    """Write the page and the figure of each table whose CSV files are in the folder."""
    paper, page_of = read("paper"), pages.PAGES
    needed = {name: page.files for name, page in page_of.items()} | {"fig-3": ("dar-curve",)}
    written: dict[Path, str | bytes] = {}
    for name, names in needed.items():
        files = [folder / f"{table}.csv" for table in names]
        if not all(file.exists() for file in files):
            continue
        tables = [read_csv(file) for file in files]
        with of_this_version(files[0]):
            text = page_of[name].text(*tables, paper=paper) if name in page_of else ""
            if text:
                written[folder / f"{name}.md"] = text
            if name in page_figures.DRAW and (text or name not in page_of):
                written[folder / f"{name}.png"] = png(page_figures.DRAW[name](*tables))
    for file, content in written.items():
        write_file(file, content)
        yield file


def write_excerpts(folder: Path) -> Iterator[Path]:
    """Bring the excerpts in README.md and docs/ up to date, where the folder is of the results that ship."""
    root = data_folder().parent
    if folder.resolve() not in ((root / "results").resolve(), (root / "results/real").resolve()):
        return
    for file in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        old = file.read_text("utf-8")
        if (new := excerpts.fill(old, read)) != old:
            write_file(file, new)
            yield file


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    prog, stopped = "python -m rmm_lab tables", "the same command goes on"
    return run_command(Command, prog, argv, stopped, description=__doc__)
