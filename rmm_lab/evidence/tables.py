"""The paper's tables and Fig. 3 from one command each: at this kit's scale, or at the paper's.

    python -m rmm_lab.evidence.tables I            halves of each small set, two sizes of ViT
    python -m rmm_lab.evidence.tables II           two sets that differ more: digits and textures
    python -m rmm_lab.evidence.tables III          T5s on question answering and on four kinds of task
    python -m rmm_lab.evidence.tables IV           data share and DAR
    python -m rmm_lab.evidence.tables fig3         reward per episode at 1 % of the data, with DAR and without
    python -m rmm_lab.evidence.tables all          all of these; about three quarters of an hour with --jobs 2
    python -m rmm_lab.evidence.tables searches     RMM beside other searches at the same number of evaluations
    python -m rmm_lab.evidence.tables groups       Table II's methods on other groups of sets
    python -m rmm_lab.evidence.tables agent        the default preset with one choice changed
    python -m rmm_lab.evidence.tables show         only write the sheets anew from the CSV files

``--scale paper`` takes the paper's own models and sets, for Tables I to IV and Fig. 3: see ``paper_scale``.
A table is a CSV file with a page (.md) and a figure (.png) beside it; a stopped command goes on where it
was. Nothing here is chosen by the test split.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rmm_lab.errors import InputError, run_command
from rmm_lab.evidence import measure as cells
from rmm_lab.evidence import page_figures as sheet_figures
from rmm_lab.evidence import pages as sheets
from rmm_lab.evidence.measure import KEYS, Cell, Group, Job, Tables, method_jobs
from rmm_lab.evidence.measure import commit as commit  # used by others under these names
from rmm_lab.evidence.measure import split_stem as split_stem
from rmm_lab.evidence.paper_scale import PaperScale
from rmm_lab.figures import paths as plots
from rmm_lab.ppo import Args
from rmm_lab.search import rivals as searches
from rmm_lab.search import run_folder as runs
from rmm_lab.search.rivals import curve_of as curve_of
from rmm_lab.search.rivals import whole as whole
from rmm_lab.tasks.image_task import data_folder

# The groups of experts of each table, by the name that the table calls them.
SETS = ("digits", "letters", "symbols", "textures")
SIZES = {"ViT, width 32": "tiny-", "ViT, width 64": ""}
PAIR = "digits+textures"
VISION: dict[str, tuple[str, ...]] = {
    PAIR: ("digits", "textures"),  # Table II's
    "letters+symbols": ("letters", "symbols"),
    "digits+letters": ("digits", "letters"),
    "digits+letters+textures": ("digits", "letters", "textures"),
}
LANGUAGE = {"qa": ("qa",), "mixed": ("mixed",)}
DATA = (1.0, 0.1, 0.01)  # Table IV's shares of the data
FILES = {"I": "halves", "II": "vision", "III": "language", "groups": "vision"}
ALL = ("I", "II", "III", "IV", "fig3")
# The default preset with one choice changed: name -> options of Args.
AGENT: dict[str, dict[str, Any]] = {
    "default preset": {},
    "without the agent": {"finish": 0.25, "scales": 0.75},
    "half as much agent": {"finish": 0.15, "scales": 0.75},
    "without the local search": {"finish": 0.0, "scales": 0.8},
    "without the scales": {"finish": 0.8, "scales": 0.0},
    "the agent alone": {"finish": 0.0, "scales": 0.0},
    "the local search alone": {"finish": 1.0, "scales": 0.0},
    "the scales alone": {"finish": 0.0, "scales": 1.0},
    "without the uniform paths": {"start": False},
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
ON_TEXTS = (
    *("default preset", "without the agent", "half as much agent", "without the scales"),
    *("likelihood as the reward", "agent preset"),
)
ORDER = {
    "group": (*SETS, *VISION, *LANGUAGE),
    "size": tuple(SIZES),
    "setting": tuple(AGENT),
}


def kit_groups() -> dict[str, list[Group]]:
    """Each table's groups of experts that ship. Table IV takes Table II's."""
    vision = [Group(n, "ViT, width 64", {"experts": e}) for n, e in VISION.items()]
    language = [Group(n, "T5, width 64", {"experts": e}) for n, e in LANGUAGE.items()]
    halves = [
        Group(name, size, {"experts": (f"{prefix}{name}-first", f"{prefix}{name}-second")})
        for size, prefix in SIZES.items()
        for name in SETS
    ]
    return {
        **{"I": halves, "II": vision[:1], "III": language, "IV": vision[:1], "fig3": vision[:1]},
        **{
            "groups": vision[1:],
            "searches": [vision[0], vision[3], *language],
            "agent": [vision[0], language[0]],
        },
    }


@dataclass
class Command:
    """Measure a table, or go on with it, and write its page and figure."""

    table: Literal["I", "II", "III", "IV", "fig3", "searches", "groups", "agent", "all", "show"]
    """Which one: see above."""
    scale: Literal["kit", "paper"] = "kit"
    """kit: the models that ship, on a CPU; paper: the paper's models and sets."""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Seeds of the search."""
    episodes: int = 700
    """Evaluations of each search."""
    only: tuple[str, ...] = ()
    """Groups, or Table IV's shares of the data such as 0.01, to measure now; all by default."""
    out: Path | None = None
    """Folder of the results; by default results, at the paper's scale results-paper."""
    jobs: int = 1
    """Cells to measure at once, each in a process of its own."""
    threads: int = 1
    """CPU threads of each process."""
    device: str = "cpu"
    """Where the models run: cpu, or a GPU such as cuda."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the models in a search; what is reported is scored in float32."""
    paper: PaperScale = field(default_factory=PaperScale)
    """The options of --scale paper."""

    def run(self) -> None:
        """Measure what is not in the files yet, and write the sheets."""
        for name in ("episodes", "jobs", "threads"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"--{name}: expected at least 1, found {getattr(self, name)}; correct it"
                )
        if not 1 <= len(set(self.seeds)) == len(self.seeds) <= sheets.MOST_SEEDS:
            raise InputError(
                f"--seeds: expected 1 to {sheets.MOST_SEEDS} different numbers, found "
                f"{' '.join(map(str, self.seeds)) or 'none'}; give others"
            )
        out = self.out or Path("results" if self.scale == "kit" else "results-paper")
        if self.table != "show":
            names = ALL if self.table == "all" else (self.table,)
            tables, groups = Tables(out, ORDER), kit_groups()
            if self.scale == "paper":
                groups = self.paper.groups()
                if odd := set(names) - set(groups):
                    raise InputError(
                        f"--scale paper: expected one of {', '.join(groups)}, found {odd.pop()!r}; "
                        "give one of them"
                    )
            groups = self._wanted(names, groups)
            if self.scale == "paper":
                wanted = {id(g): g for own in groups.values() for g in own}
                self.paper.prepare(list(wanted.values()), self.device, self.threads)
            jobs = [job for name in names for job in self._jobs(name, tables, groups[name])]
            once = {(j.table, *j.key.values()): j for j in jobs}  # fig3 is a part of IV
            print(f"{len(once)} cells to measure into {out}", flush=True)
            cells.measure_all(list(once.values()), tables, self.jobs, self.threads)
        written = list(write_sheets(out))
        if not written and self.table == "show":
            raise InputError(
                f"--out: expected a folder with the CSV files of a table, found none in {out}; measure one "
                "first, or name another folder"
            )
        for file in written:
            print(f"written: {file}")

    def _wanted(
        self, names: Sequence[str], groups: Mapping[str, list[Group]]
    ) -> dict[str, list[Group]]:
        known = {g.name for name in names for g in groups[name]}
        shares = {f"{f:g}" for f in DATA} if "IV" in names else set()
        if unknown := set(self.only) - known - shares:
            raise InputError(
                f"--only: expected some of {', '.join(sorted(known | shares))}, found {unknown.pop()!r}; "
                "correct it"
            )
        if not self.only:
            return {name: groups[name] for name in names}
        only = {name: [g for g in groups[name] if g.name in self.only] for name in names}
        if set(self.only) & shares and not set(self.only) & known:
            only["IV"] = groups["IV"]  # a share of all its groups, and nothing else
        return only

    def _jobs(self, name: str, tables: Tables, groups: Sequence[Group]) -> Iterator[Job]:
        """What is not in the files yet."""
        search = {"episodes": self.episodes, "device": self.device, "precision": self.precision}
        if name in FILES:
            presets = ("default",) if self.scale == "kit" else ("default", "paper")
            yield from method_jobs(tables, FILES[name], groups, self.seeds, search, presets)
            return
        for group in groups:
            for seed in self.seeds:
                of_seed = group.options | search | {"seed": seed}
                make = {"searches": self._searches, "agent": self._agent}.get(name, self._dar)
                for job in make(name, group, of_seed):
                    done = tables.has(job.table, job.key, job.args)
                    if job.kind == "rmm_curve":
                        key = {"dar": job.args.dar, "seed": job.args.seed}
                        done = done and tables.has("dar-curve", key)
                    if not done:
                        yield job

    def _dar(self, name: str, group: Group, options: dict[str, Any]) -> Iterator[Job]:
        """The paper's preset at each share of the data, with DAR and without; ours beside it, by each reward.

        At 100 % every episode begins a new window, so DAR has no effect and is measured once; the likelihood
        is for small shares. Fig. 3 shows the first seed's searches at the smallest share.
        """
        shares = [f for f in DATA if f"{f:g}" in self.only] or DATA
        settings: list[dict[str, Any]] = [{"preset": "paper", "dar": dar} for dar in (0.8, 0.0)]
        settings += [{"preset": "default"}, {"preset": "default", "reward": "likelihood"}]
        for fraction in DATA:
            for setting in settings[::2] if fraction == 1 else settings:
                args = Args(**(options | setting | {"data_fraction": fraction}))
                drawn = args.preset == "paper" and fraction == min(DATA)
                drawn = drawn and args.seed == self.seeds[0]
                if drawn if name == "fig3" else fraction in shares:
                    key = {k: getattr(args, k) for k in KEYS["dar"]}
                    yield Job("dar", "rmm_curve" if drawn else "rmm", key, args)

    def _searches(self, name: str, group: Group, options: dict[str, Any]) -> Iterator[Job]:
        for method in ("RMM", *searches.SEARCHES):
            key = {"group": group.name, "seed": options["seed"], "method": method}
            yield Job("searches", "search", key, Args(**options))

    def _agent(self, name: str, group: Group, options: dict[str, Any]) -> Iterator[Job]:
        for setting, changed in AGENT.items():
            if group.name in LANGUAGE and setting not in ON_TEXTS:  # whose searches take minutes
                continue
            key = {"group": group.name, "setting": setting, "seed": options["seed"]}
            yield Job("agent", "rmm", key, Args(**(options | changed)))


def read(name: str) -> list[Cell]:
    """A table that ships, by its file's name without ``.csv``; InputError where there is none."""
    file = data_folder().parent / "results" / f"{name}.csv"
    if not file.is_file():
        raise InputError(
            f"table {name!r}: expected {file}, found none; take a checkout of the repository, or measure "
            "it with python -m rmm_lab.evidence.tables"
        )
    return runs.from_csv(file.read_text("utf-8"))


def write_sheets(folder: Path) -> Iterator[Path]:
    """Write the page and the figure of each table whose CSV files are in the folder."""
    paper = read("paper")
    for name, needed in sheets.FILES.items():
        files = [folder / f"{table}.csv" for table in needed]
        if not all(file.is_file() for file in files):
            continue
        rows = [runs.from_csv(file.read_text("utf-8")) for file in files]
        if name in sheets.SHOW:
            if not (page := sheets.SHOW[name](*rows, paper=paper)):
                continue
            runs.write(folder / f"{name}.md", page)
            yield folder / f"{name}.md"
        if name in sheet_figures.DRAW:
            runs.write(folder / f"{name}.png", plots.png(sheet_figures.DRAW[name](*rows)))
            yield folder / f"{name}.png"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    return run_command(
        Command, "python -m rmm_lab.evidence.tables", argv, "the same command goes on"
    )


if __name__ == "__main__":
    sys.exit(main())
