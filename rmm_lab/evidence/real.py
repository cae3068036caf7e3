"""Tables of real pretrained models, from one command: a base that others trained, real pictures and texts.

    python -m rmm_lab tables real --base FOLDER --data FOLDER
    python -m rmm_lab tables real --base hf-hub:timm/vit_small_patch14_dinov2.lvd142m --data FOLDER
    python -m rmm_lab tables real --base FOLDER --data FOLDER --parts I II        some of the parts

Experts are fine-tuned from the base once and kept in --work, so a stopped command goes on where it was. The
parts:

    I         halves of CIFAR-10 and of GTSRB          IV        Table II's pair: share of the data, DAR
    II        CIFAR-10 and GTSRB                       groups    with flowers and MNIST: four experts
    curve     what averaging loses, by distance        stranger  an expert joins that has no task
    subsets   all sets of two to four experts          unseen    sets that no expert saw
    texts     a language model (--text-base)           speed     seconds and memory of the closed forms
    inputs    closed forms, by how many inputs they look at

Each row has the base's SHA-256, the experts' training, the search's options, the commit and the seconds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from rmm_lab.engine.scorer import check_device
from rmm_lab.errors import UNIT_RANGE, InputError, check_values
from rmm_lab.evidence import measure, real_measure, tables
from rmm_lab.evidence.measure import Job, Store
from rmm_lab.evidence.real_scale import (
    PAIR,
    SETS,
    STRANGER,
    TEXTS,
    UNSEEN,
    Training,
    Works,
    check_sets,
    read_base,
    subsets,
    vision_groups,
    wanted,
)
from rmm_lab.evidence.rows import KEYS
from rmm_lab.search.config import Config, configure
from rmm_lab.tasks.console import run_command
from rmm_lab.tasks.hold import check_writable, held_made

MOST_TEXT_INPUTS = 50  # per task, that closed forms of language models look at
TABLES = ("I", "II", "IV", "groups")
ORDER = (*SETS.values(), "+".join(SETS[name] for name in PAIR))
PARTS = (
    *("speed", "II", "inputs", "I", "curve", "stranger"),
    *("unseen", "groups", "IV", "texts", "subsets"),
)
# Table IV: the published search with DAR and without, and the default one by either reward.
DAR: tuple[dict[str, Any], ...] = (
    *tables.DAR_SETTINGS[:2],
    {"preset": "default"},
    {"preset": "default", "reward": "likelihood"},
)


class Tables(tables.Command):
    """The kit's tables with this scale's settings."""

    dar_settings = DAR


@dataclass
class Real:
    """Measure the tables of a real base, or go on with them, and write their pages and figures."""

    base: str | None = None
    """A real ViT: a folder of timm's, or hf-hub:OWNER/NAME."""
    data: Path | None = None
    """Folder with cifar10, gtsrb, flowers, mnist; winogrande, wsc, qasc for texts: docs/data-formats.md."""
    text_base: str | None = None
    """A real language model, for the part texts; without it that part is left out."""
    out: Path = Path("results-real")
    """Folder of the results."""
    work: Path | None = None
    """Folder of what is made beside them, sets with splits and experts: by default OUT/work."""
    parts: tuple[
        Literal[
            "I",
            "II",
            "IV",
            "groups",
            "curve",
            "stranger",
            "subsets",
            "unseen",
            "texts",
            "speed",
            "inputs",
        ],
        ...,
    ] = ()
    """What to measure now; all by default."""
    size: int = 70
    """Side of the pictures in pixels; 70 is 26 tokens of a ViT with patches of 14."""
    steps: int = 550
    """Optimiser steps of an expert."""
    learning_rate: float = 5e-5
    """Peak learning rate of an expert."""
    batch_size: int = 32
    """Pictures per step."""
    curve: tuple[float, ...] = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
    """Learning rates of the part curve, half as many steps each."""
    text_steps: int = 400
    """Optimiser steps of a language expert; all weights are trained."""
    text_learning_rate: float = 2e-5
    """Peak learning rate of a language expert."""
    text_batch_size: int = 8
    """Rows per step."""
    text_episodes: int = 60
    """Evaluations of the search on texts."""
    reward: int = 200
    """Pictures of each set that become its reward split, where it has none."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of the searches."""
    episodes: int = 200
    """Evaluations of each search."""
    calibration: int = 100
    """Inputs per task that RegMean and least squares look at."""
    inputs: tuple[int, ...] = (25, 50, 100, 200, 400)
    """Inputs per task that they look at in the part inputs."""
    jobs: int = 1
    """Experts to make and rows to measure at once, each in a process of its own; rows of speed and texts come
    one by one."""
    threads: int = 1
    """CPU threads of each process."""
    device: str = "cpu"
    """Where the models run: cpu, or a GPU such as cuda."""

    def run(self) -> None:
        """Make what is not there yet, measure what is not in the files yet, write the pages and figures."""
        parts = [p for p in PARTS if p in (self.parts or PARTS)]
        if self.text_base is None and "texts" in parts and not self.parts:
            parts.remove("texts")
            print("note: no --text-base, so the part texts is left out")
        self.out = self.out.expanduser()
        work = (self.work or self.out / "work").expanduser()
        self._check(parts, work)
        images = parts != ["texts"]
        names = (tuple(SETS) if images else ()) + (TEXTS if "texts" in parts else ())
        data = check_sets(self.data and self.data.expanduser(), names)
        torch.set_num_threads(self.threads)
        with held_made(self.out, "--out"):
            if images:
                base = read_base(str(self.base), "images", "--base", self.size)
                how = Training(self.steps, self.learning_rate, self.batch_size)
                self._measure(Works(work, data, base, how, self.reward, self.device), parts)
            if "texts" in parts:
                base = read_base(str(self.text_base), "texts", "--text-base")
                how = Training(self.text_steps, self.text_learning_rate, self.text_batch_size)
                self._measure(Works(work, data, base, how, self.reward, self.device), ["texts"])
            for file in (*tables.write_pages(self.out), *tables.write_excerpts(self.out)):
                print(f"written: {file}")

    def _check(self, parts: Sequence[str], work: Path) -> None:
        """InputError for options out of range, before anything is read."""
        whole = ("at least 1", lambda v: v >= 1)
        numbers = "steps batch_size text_steps text_batch_size text_episodes reward episodes"
        check_values(
            self,
            {
                f"{numbers} calibration": whole,
                "size": ("at least 14", lambda v: v >= 14),
                "learning_rate text_learning_rate": UNIT_RANGE,
                "inputs": ("numbers of 1 or more", lambda v: all(n >= 1 for n in v)),
                "curve": ("learning rates more than 0", lambda v: all(0 < rate <= 1 for rate in v)),
                "seeds": ("one or more different numbers", lambda v: 0 < len(v) == len(set(v))),
                "jobs threads": ("1 to 1024", lambda v: 1 <= v <= 1024),
            },
        )
        for option, kind in (("base", "a ViT"), ("text_base", "a language model")):
            needed = "texts" in parts if option == "text_base" else list(parts) != ["texts"]
            if needed and getattr(self, option) is None:
                raise InputError(
                    f"--{option.replace('_', '-')}: expected {kind}, a folder or hf-hub:OWNER/NAME, found "
                    "none; name it"
                )
        check_writable(self.out, "--out")
        check_writable(work, "--work")
        check_device(self.device)

    # ---------------------------------------------------------------------------------- the jobs

    def _measure(self, works: Works, parts: Sequence[str]) -> None:
        """One part after another, so that what is done is there early; each row says what it is of."""
        store = Store(self.out, {"group": ORDER})
        also = {"base_sha256": works.base.sha256, "training": str(works.training)}
        texts = works.base.family.DATA == "texts"
        for part in (p for p in parts if (p == "texts") == texts):
            self._train(works, part)
            jobs = list(self._tables_jobs(works, part, store) if part in TABLES else ())
            own = [] if part in TABLES else list(PROTOCOLS[part](self, works))
            jobs += [job for job in own if not store.has(job.table, _key(job), job.config)]
            print(f"{part}: {len(jobs)} jobs to measure into {self.out}", flush=True)
            alone = part in ("speed", "texts")
            at_once, threads = (1, self.threads * self.jobs) if alone else (self.jobs, self.threads)
            measure.measure_all(jobs, store, at_once, threads, also)

    def _train(self, works: Works, part: str) -> None:
        """Make the experts of a part that are not there yet, ``jobs`` at once."""
        places = list(map(works.text_set if part == "texts" else works.place, wanted(part)))
        hows = list(map(self._shorter, self.curve)) if part == "curve" else [None]
        experts = itertools.product(places, hows)
        missing = [expert for expert in experts if not works.has_expert(*expert)]
        at_once = min(self.jobs, len(missing))
        for _ in measure.in_processes(works.make_expert, missing, at_once, self.threads):
            pass

    def _shorter(self, rate: float) -> Training:
        """The training of the part curve."""
        return Training(max(1, self.steps // 2), rate, self.batch_size)

    def _tables_jobs(self, works: Works, part: str, store: Store) -> Iterator[Job]:
        """Those of the kit's tables; rows by gradient for Table II and the first seed alone."""
        shared: dict[str, Any] = {"episodes": self.episodes, "calibration": self.calibration}
        shared |= {"device": self.device, "out": self.out}
        groups = vision_groups(works, part)
        for kinds, seeds in (
            (("uniform", "matched", "search"), self.seeds),
            (("gradients",), self.seeds[:1] if part == "II" else ()),
        ):
            command = Tables("all", seeds=seeds, kinds=kinds, **shared)  # type: ignore[arg-type]
            yield from command.jobs_of(part, groups, store)

    def config(self, options: dict[str, Any], **more: Any) -> Config:
        """The default search of a group, with the first seed."""
        own = {"episodes": self.episodes, "calibration": self.calibration, "device": self.device}
        return configure(**options | own | {"seed": self.seeds[0]} | more)

    # ----------------------------------------------------------------------------- the protocols

    def speed(self, works: Works) -> Iterator[Job]:
        group = works.group(PAIR)
        options = self.config(group.options, threads=self.threads)
        yield Job("speed", real_measure.speed, {"group": group.name}, options)

    def stranger(self, works: Works) -> Iterator[Job]:
        pair = works.group(PAIR)
        for name, group in (("nobody", pair), (SETS[STRANGER], works.group((*PAIR, STRANGER)))):
            key = {"group": pair.name, "stranger": name, "seed": self.seeds[0]}
            yield Job("stranger", real_measure.stranger, key, self.config(group.options))

    def subsets(self, works: Works) -> Iterator[Job]:
        for names in subsets(tuple(SETS)):
            group = works.group(names)
            key = {"group": group.name, "seed": self.seeds[0]}
            yield Job("subsets", real_measure.subset, key, self.config(group.options))

    def unseen(self, works: Works) -> Iterator[Job]:
        group = works.group(PAIR)
        for name in UNSEEN:
            key = {"group": group.name, "unseen": SETS[name], "place": works.place(name)}
            yield Job("unseen", real_measure.unseen, key, self.config(group.options))

    def curves(self, works: Works) -> Iterator[Job]:
        places = list(map(works.place, PAIR))
        for rate in self.curve:
            how = self._shorter(rate)
            key = {"group": "+".join(SETS[n] for n in PAIR), "learning_rate": rate}
            key |= {"training": str(how)}
            config = self.config(works.options(places, how))
            yield Job("curve", real_measure.curve, key, config)

    def by_inputs(self, works: Works) -> Iterator[Job]:
        group = works.group(PAIR)
        for seed, n in itertools.product(self.seeds, self.inputs):
            key = {"group": group.name, "inputs": n, "seed": seed}
            config = self.config(group.options, calibration=n, seed=seed)
            yield Job("inputs", real_measure.inputs, key, config)

    def texts(self, works: Works) -> Iterator[Job]:
        options = works.options([works.text_set(name) for name in TEXTS])
        more = {"episodes": self.text_episodes, "data_fraction": 0.5}
        calibration = min(self.calibration, MOST_TEXT_INPUTS)
        config = self.config(options, **more, calibration=calibration, threads=self.threads)
        key = {"group": "+".join(TEXTS), "seed": self.seeds[0]}
        yield Job("texts", real_measure.texts, key, config)


def _key(job: Job) -> dict[str, Any]:
    """What of a job's key is in its table."""
    return {name: value for name, value in job.key.items() if name in KEYS[job.table]}


PROTOCOLS: dict[str, Callable[[Real, Works], Iterator[Job]]] = {
    "speed": Real.speed,
    "stranger": Real.stranger,
    "subsets": Real.subsets,
    "unseen": Real.unseen,
    "inputs": Real.by_inputs,
    "curve": Real.curves,
    "texts": Real.texts,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    prog, stopped = "python -m rmm_lab tables real", "the same command goes on"
    return run_command(Real, prog, argv, stopped, description=__doc__)
