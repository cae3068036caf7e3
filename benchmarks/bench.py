"""How fast a search is, measured against the plain way of scoring.

    python -m benchmarks.bench                     all cases; about half an hour on two cores
    python -m benchmarks.bench --only demo@0.1     one case
    python -m benchmarks.bench --episodes 60       shorter searches, for a first look

Each search runs in a process of its own. A sample of its paths is then scored again in the plain way:
assemble the merged model, run all its layers, remember nothing. Both ways must give the same scores.
Results go to ``results/performance*.csv``, the tables to stdout.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from rmm_lab.tasks.console import run_module

if __name__ == "__main__":  # here, so that Ctrl-C is a sentence while torch is imported
    sys.exit(run_module("benchmarks.bench:Bench", "finished cases are stored"))

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state
from torch.utils.benchmark import Timer

from rmm_lab import operators, reward
from rmm_lab.engine.cache import keep_freed_memory
from rmm_lab.engine.scorer import Scorer
from rmm_lab.errors import InputError
from rmm_lab.evidence.measure import commit
from rmm_lab.families.checkpoint import Checkpoint
from rmm_lab.families.vit_run import head_slices
from rmm_lab.layers import LayerPool
from rmm_lab.reward import Step
from rmm_lab.search.config import Config, configure
from rmm_lab.search.phases import make_scorer
from rmm_lab.search.pipeline import train
from rmm_lab.search.problem import Problem, problem_of
from rmm_lab.tasks.image_task import Split
from rmm_lab.tasks.text_task import TextBatch

BATCH = 256  # examples that the plain way takes at once
# Searches to time: EXPERTS@SHARE_OF_THE_DATA, and /PRESET unless it is "agent".
SEARCHES = (
    *("demo@0.1", "demo@0.1/paper", "demo@1/paper", "qa@0.1"),
    *("vit_small_patch32_224@0.1/paper", "vit_base_patch16_224@0.1"),
)
MODELS = 8  # that one batched product is of
SYSTEM = "as the system frees memory"
VARIANTS: dict[str, dict[str, Any]] = {
    SYSTEM: {},
    "freed memory kept": {},  # the default of every command
    "2 workers": {"workers": 2},
    "2 workers, bfloat16": {"workers": 2, "precision": "bfloat16"},
}
Row = dict[str, Any]  # of a CSV file


@dataclass
class Bench:
    """Time searches against the plain way of scoring, and parts of them against other libraries."""

    only: tuple[str, ...] = ()
    """Cases to run, such as demo@0.1 or operators; all by default."""
    episodes: int = 700
    """Evaluations of each search."""
    sample: int = 24
    """Paths of each search that are also scored in the plain way."""
    out: Path = Path("results")
    """Folder of the CSV files."""

    def run(self) -> None:
        """Measure; store and print the tables."""
        known = [*SEARCHES, *PARTS]
        if unknown := [name for name in self.only if name not in known]:
            raise InputError(f"--only: expected some of {', '.join(known)}, found {unknown[0]!r}")
        for name in self.only or known:
            if name.startswith("vit_base") and not torch.cuda.is_available():
                print(f"{name}: skipped, torch finds no GPU", flush=True)
                continue
            jobs = [partial(PARTS[name])] if name in PARTS else []
            if name in SEARCHES:
                jobs = [partial(time_search, name, v, self.episodes, self.sample) for v in VARIANTS]
            rows: list[Row] = []
            for job in jobs:
                print(time.strftime("%H:%M:%S"), name, *job.args[1:2], flush=True)
                rows += in_process(job)
            self._store(name, rows)
        for table in COLUMNS:
            if (file := self.out / f"{table}.csv").is_file():
                print(f"\n{markdown(table, pd.read_csv(file))}")

    def _store(self, name: str, rows: Sequence[Row]) -> None:
        """Replace the rows of one case."""
        self.out.mkdir(parents=True, exist_ok=True)
        file = self.out / f"performance{f'-{name}' if name in PARTS else ''}.csv"
        new = pd.DataFrame(rows).assign(machine=machine(), commit=commit())
        new.insert(0, "case", name)
        if file.is_file():
            old = pd.read_csv(file)
            new = pd.concat([old[old["case"] != name], new])
        new.to_csv(file, index=False)


def in_process(job: Callable[[], list[Row]]) -> list[Row]:
    """Run in a fresh process with one thread, whose memory no other case has used."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, torch.set_num_threads, (1,)) as pool:
        return pool.submit(job).result()


# ------------------------------------------------------------------------------------ a search


@dataclass
class Watch:
    """What a search asked of its scorer, and the seconds that it spent in the models."""

    scorer: Any = None
    asked: list[tuple[reward.Path, int | None, float]] = field(default_factory=list)
    forward: float = 0.0  # summed over threads


@contextmanager
def watched(architecture: Any) -> Iterator[Watch]:
    """Note each score that is asked for, and time embed, layers and head of the models."""
    watch, score = Watch(), Scorer.score

    def noted(scorer: Scorer, path: reward.Path, subset: int | None = None) -> np.ndarray:
        scores = score(scorer, path, subset)
        watch.scorer = scorer
        watch.asked.append((path, subset, reward.reward(scores)))
        return scores

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            start = time.perf_counter()
            out = function(*args)
            watch.forward += time.perf_counter() - start
            return out

        return run

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Scorer, "score", noted))
        for name in ("embed", "apply", "apply_last", "logits"):
            patch = mock.patch.object(architecture, name, timed(getattr(architecture, name)))
            stack.enter_context(patch)
        yield watch


def time_search(name: str, variant: str, episodes: int, sample: int) -> list[Row]:
    """One search, from loaded models and data to the chosen path, and its plain twin."""
    experts, _, rest = name.partition("@")
    fraction, _, preset = rest.partition("/")
    config = configure(
        preset or "agent",
        experts=(experts,),
        episodes=episodes,
        data_fraction=float(fraction),
        device="cuda" if experts.startswith("vit_base") else "cpu",
        quiet=True,
        **VARIANTS[variant],
    )
    problem = load(config)
    for task in problem.tasks:
        task.split("reward")
    if variant != SYSTEM:
        keep_freed_memory()
    with watched(problem.pool.architecture) as watch:
        start = time.perf_counter()
        result = train(config, problem, table=False)
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; bytes on macOS
    plain = plain_way(problem, watch.scorer, watch.asked, sample)
    alone = config.run.workers == 1
    bookkeeping = seconds - watch.forward  # agent, environment, cache; with threads unknown
    row = {
        "variant": variant,
        "episodes": episodes,
        "seconds": round(seconds, 2),
        "plain_seconds": round(plain["seconds"], 2),
        "times_plain": round(plain["seconds"] / seconds, 2),
        "layers_asked_per_run": round(watch.scorer.work_asked / watch.scorer.work_run, 3),
        "bookkeeping_ms": round(1000 * bookkeeping / episodes, 2) if alone else None,
        "kept_mb": round(watch.scorer.cache.peak / 2**20),
        "peak_mb": round(peak / (2**20 if sys.platform == "darwin" else 2**10)),
        "reward_split": round(100 * result.reward, 2),
        "largest_difference": round(plain["difference"], 6),
    }
    return [row]


def plain_way(
    problem: Problem,
    scorer: Any,
    asked: Sequence[tuple[reward.Path, int | None, float]],
    sample: int,
    clock: Callable[[], float] = lambda: time.perf_counter(),
) -> dict[str, float]:
    """Score an evenly spaced sample of a search's paths with whole models, remembering nothing.

    Returns the seconds that all paths would take so, and the largest difference from the search's rewards.
    Scores on the whole split count by their number of examples.
    """
    tasks = range(scorer.n_models)
    examples = {s: sum(len(scorer.rows(i, s)) for i in tasks) for s in {s for _, s, _ in asked}}
    on_subsets = [entry for entry in asked if entry[1] is not None]
    chosen = [on_subsets[i] for i in np.linspace(0, len(on_subsets) - 1, sample).astype(int)]
    assembly = forward = difference = 0.0
    for n, (path, subset, expected) in enumerate([chosen[0], *chosen]):
        start = clock()
        model = problem.pool.assemble(path, scorer.stem).to(scorer.device)
        built = clock()
        scores = [plain_score(problem, model, i, scorer.rows(i, subset)) for i in tasks]
        done = clock()
        if n:  # the first one warms up
            assembly, forward = assembly + built - start, forward + done - built
            difference = max(difference, abs(float(np.mean(scores)) - expected))
    scale = sum(examples[s] for _, s, _ in asked) / sum(examples[s] for _, s, _ in chosen)
    seconds = forward * scale + assembly * len(asked) / sample
    return {"seconds": seconds, "difference": difference}


@torch.inference_mode()
def plain_score(problem: Problem, model: Any, i: int, rows: np.ndarray) -> float:
    """Task i's metric of an assembled timm or transformers model, on rows of the reward split."""
    task, device, found = problem.tasks[i], next(model.parameters()).device, []
    for part in np.split(rows, range(BATCH, len(rows), BATCH)):
        batch = task.batch("reward", part)
        if isinstance(batch, TextBatch):
            found.append(t5_choices(model, batch).argmax(-1))
        else:
            own = slice(*head_slices(problem.pool.heads)[problem.pool.names[i]])
            found.append(model(batch.to(device))[:, own].argmax(-1).cpu())
    return task.score(torch.cat(found), task.split("reward").labels[torch.from_numpy(rows)])


def t5_choices(model: Any, batch: TextBatch) -> Tensor:
    """Each choice's log-probability (n, C) by T5ForConditionalGeneration's forward pass."""
    n, c, t = batch.shifted.shape
    encoded = model.encoder(input_ids=batch.ids, attention_mask=batch.mask.long())[0]
    logits = model(
        encoder_outputs=(encoded.repeat_interleave(c, 0),),  # (n, S, width) -> (n * C, S, width)
        attention_mask=batch.mask.long().repeat_interleave(c, 0),
        decoder_input_ids=batch.shifted.reshape(n * c, t),
        use_cache=False,
    ).logits
    log_probs = logits.log_softmax(-1).gather(-1, batch.choices.reshape(n * c, t, 1))
    total = (log_probs.reshape(n, c, t) * batch.shares).sum(-1)
    return total.masked_fill(batch.shares.sum(-1) == 0, -torch.inf)


# ------------------------------------------------------------------------------ models to time


def load(config: Config, pictures: int = 100) -> Problem:
    """The config's problem, or a stand-in where its experts are an architecture of timm's."""
    (experts,) = config.problem.experts
    if experts.startswith("vit_"):
        return stand_in(experts, pictures, config)
    return problem_of(config.problem)


class Noise:
    """A task of random pictures, labelled from outside; like ``image_task.Task`` for a scorer."""

    metric = "accuracy"

    def __init__(self, name: str, images: Tensor) -> None:
        self.name = self.source = name
        self._images, self.labels = images, torch.zeros(len(images), dtype=torch.int64)

    def split(self, name: str) -> Split:
        """The same pictures for every split."""
        return Split(self._images, self.labels)

    def batch(self, name: str, rows: Any) -> Tensor:
        """(n, 3, H, W) float32."""
        return self._images[rows].float() / 64 - 2

    def score(self, found: Tensor, labels: Tensor) -> float:
        """Accuracy: both (n,) -> [0, 1]."""
        return float((found == labels).double().mean())


def stand_in(architecture: str, n: int, config: Config, classes: int = 10) -> Problem:
    """Two experts of a timm ViT with random weights near one base, and n random pictures for each.

    Each picture's label is what its expert says, so that a search has something to find. For timing only.
    """
    import timm

    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # timm's initial weights
        model = timm.create_model(architecture, num_classes=classes).eval()
    size = list(model.default_cfg["input_size"])
    settings = {"architecture": architecture, "num_classes": classes}
    settings |= {"model_args": {"num_classes": classes}, "pretrained_cfg": {"input_size": size}}
    weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
    base, experts, tasks = Checkpoint("base", Path(), settings, weights, ""), [], []
    for name in ("expert-1", "expert-2"):
        own = {
            k: v + 0.2 * v.std(correction=0) * torch.randn(v.shape, generator=generator)
            for k, v in weights.items()
        }
        colours = torch.randint(0, 256, (n, size[0], 1, 1), generator=generator)
        noise = torch.randint(-64, 65, (n, *size), generator=generator)
        task = Noise(name, (colours + noise).clamp(0, 255).to(torch.uint8))
        model.load_state_dict(own)
        with torch.inference_mode():
            parts = [task.batch("reward", rows) for rows in torch.arange(n).split(32)]
            logits = torch.cat([model(part) for part in parts]).clone()
        own["head.bias"] = own["head.bias"] - logits.mean(0)  # else one class takes all pictures
        task.labels = (logits - logits.mean(0)).argmax(-1)
        experts.append(Checkpoint(name, Path(), settings, own, ""))
        tasks.append(task)
    names = [e.source for e in experts]
    pool = LayerPool(base, experts, names, config.problem.operators, seed=config.problem.seed)
    return Problem(pool, tasks, config.problem)


# --------------------------------------------------------------------------- parts of a search


def milliseconds(function: Callable[[], Any], least: float = 1.0) -> float:
    """Of a call on one thread: the median, over at least so many seconds of calls."""
    timer = Timer("function()", globals={"function": function})
    return 1000 * timer.blocked_autorange(min_run_time=least).median


def operator_times(layers: int = 12) -> list[Row]:
    """TIES and DARE on all layers of two ViT-B/16s, flattened as in Eq. 4, and the same in peft."""
    from peft.utils.merge_utils import dare_linear, ties

    keep_freed_memory()
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(7_087_872, generator=generator)  # (D,)
    experts = base + 0.01 * torch.randn(2, len(base), generator=generator)
    deltas, ones = list(experts - base), torch.ones(2)
    ours = {
        "ties:density=0.3": partial(operators.ties, base, experts, density=0.3),
        "dare:drop_rate=0.34": partial(
            operators.dare, base, experts, drop_rate=0.34, generator=generator
        ),
    }
    theirs = {
        "ties:density=0.3": lambda: base + ties(deltas, ones, density=0.3),
        "dare:drop_rate=0.34": lambda: base + dare_linear(deltas, ones, density=0.66),
    }
    rows = []
    for name in ours:
        own, other = (layers * milliseconds(f[name]) / 1000 for f in (ours, theirs))
        row = {"operator": name, "seconds": round(own, 2), "peft_seconds": round(other, 2)}
        rows.append(row | {"times_peft": round(other / own, 2)})
    return rows


def data_times() -> list[Row]:
    """One evaluation in the plain way on 100, 10 and 1 % of the data: the paper's speed-up."""
    rows = []
    for experts in ("demo", "qa", "vit_small_patch32_224"):
        config = configure("agent", experts=(experts,))
        problem = load(config, pictures=400)
        source, n = problem.pool.names[0], problem.pool.n_layers
        assemble = partial(problem.pool.assemble, [Step(source, k) for k in range(-1, n)])
        model, first = assemble(), (0.0, 0.0)
        for fraction in (1.0, 0.1, 0.01):
            scorer = make_scorer(problem, configure(config, data_fraction=fraction))
            taken = [scorer.rows(i, 0) for i in range(scorer.n_models)]
            score = partial(plain_score, problem)
            forward = milliseconds(lambda: [score(model, i, r) for i, r in enumerate(taken)])  # noqa: B023
            ms = forward + milliseconds(assemble)
            first = first if any(first) else (ms, forward)
            row = {"experts": experts, "fraction": fraction, "examples": sum(map(len, taken))}
            row |= {"ms": round(ms, 2), "times_faster": round(first[0] / ms, 1)}
            row |= {"forward_ms": round(forward, 2)}
            rows.append(row | {"forward_times_faster": round(first[1] / forward, 1)})
    return rows


def at_once(layer: torch.nn.Module, tokens: Tensor) -> Callable[[], Any]:
    """The same layer of several models on states of their own, with one batched product for each map."""
    weights = stack_module_state([copy.deepcopy(layer) for _ in range(MODELS)])
    states = torch.stack([tokens] * MODELS)  # (C, n, tokens, D)
    return partial(torch.vmap(partial(functional_call, layer)), weights, (states,))


def layer_times() -> list[Row]:
    """One layer of a ViT in the ways that were tried, ms per model; the first is timm's own forward pass."""
    keep_freed_memory()
    rows = []
    for experts, n in (("demo", 120), ("vit_small_patch32_224", 32)):
        problem = load(configure("agent", experts=(experts,)), pictures=n)
        pool, family = problem.pool, problem.pool.architecture
        layer = pool.layer(pool.names[0], 1)
        with torch.inference_mode():
            batch = problem.tasks[0].batch("reward", np.arange(n))
            tokens = family.embed(pool.stem(pool.names[0]), batch)
            ways = {
                "timm's own": partial(layer, tokens),
                "ours, last layer": partial(family.apply_last, layer, tokens),
                "bfloat16": partial(copy.deepcopy(layer).bfloat16(), tokens.bfloat16()),
                "torch.compile": partial(torch.compile(layer), tokens),  # needs a C++ compiler
            }
            ms = {way: milliseconds(run) for way, run in ways.items()}
            ms |= {f"{MODELS} models at once": milliseconds(at_once(layer, tokens)) / MODELS}
        for way, m in ms.items():
            row = {"models": experts, "examples": n, "way": way, "ms": round(m, 3)}
            rows.append(row | {"times_faster": round(ms["timm's own"] / m, 2)})
    return rows


PARTS = {"data": data_times, "layers": layer_times, "operators": operator_times}

# ---------------------------------------------------------------------------------- the output

COLUMNS = {  # CSV file -> the columns that docs/performance.md shows
    "performance": "case variant seconds plain_seconds times_plain layers_asked_per_run bookkeeping_ms "
    "kept_mb peak_mb",
    "performance-data": "experts fraction examples ms times_faster forward_ms forward_times_faster",
    "performance-layers": "models examples way ms times_faster",
    "performance-operators": "operator seconds peft_seconds times_peft",
}


def markdown(table: str, rows: pd.DataFrame) -> str:
    """A table of docs/performance.md from the rows of its CSV file."""
    shown = rows[COLUMNS[table].split()].astype(object).where(rows.notna(), None)
    return shown.to_markdown(index=False, floatfmt=".5g", missingval="") + "\n"


def machine() -> str:
    """CPU, cores, GPU and torch's version, in a line."""
    name, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = names[0].partition(":")[2].strip() if names else name
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {os.cpu_count()} cores{gpu}, torch {torch.__version__}"
