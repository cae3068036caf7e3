"""How fast a search is, and against what: one command, ratios within one process.

    python -m benchmarks.bench                     all cases; about half an hour on two cores
    python -m benchmarks.bench --only demo@0.1     one of them
    python -m benchmarks.bench --episodes 60       shorter searches, to look round

Each case is a process of its own. In it a whole search runs (agent, environment, scoring), and the paths
that it scored are scored again, a sample of them, in the plain way: assemble the merged model, run all
its layers on the same examples, remember nothing. Both must find the same scores. Then the same search
runs with what makes it faster, one thing after another. The table goes to ``performance.csv``.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmm_lab import operators as merging
from rmm_lab import ppo
from rmm_lab.engine.cache import keep_freed_memory
from rmm_lab.engine.scorer import Path as Steps
from rmm_lab.engine.scorer import parts_of
from rmm_lab.errors import InputError, run_command
from rmm_lab.evidence.measure import commit
from rmm_lab.families import t5, vit
from rmm_lab.families.checkpoint import Checkpoint
from rmm_lab.layers import LayerPool
from rmm_lab.search import run_folder as runs
from rmm_lab.search.problem import OPERATORS, STEM, Problem, load_problem
from rmm_lab.search.rivals import random_path
from rmm_lab.tasks.image_task import Split

BATCH = 256  # examples that the plain way takes at once
Cell = dict[str, Any]  # one line of the CSV file


@dataclass(frozen=True)
class Case:
    """A search to time: the experts, the share of the data, and how many episodes at most."""

    experts: str
    fraction: float
    episodes: int = 700
    preset: str = "agent"

    @property
    def name(self) -> str:
        """What ``--only`` calls it."""
        tail = "" if self.preset == "agent" else f"/{self.preset}"
        return f"{self.experts}@{self.fraction:g}{tail}"


CASES = {
    case.name: case
    for case in (
        *(Case("demo", fraction) for fraction in (0.01, 0.1, 1.0)),
        *(Case("demo", fraction, preset="paper") for fraction in (0.1, 1.0)),
        *(Case("qa", fraction) for fraction in (0.01, 0.1)),
        Case("qa", 1.0, episodes=100),
        *(Case("vit_small_patch32_224", 0.1, preset=preset) for preset in ("agent", "paper")),
        Case("vit_base_patch16_224", 0.1),  # where there is a GPU
    )
}
# What a search may use beside what it always does, in the order in which it is added.
VARIANTS: dict[str, dict[str, Any]] = {
    "as the system frees memory": {},
    "freed memory kept": {},  # the default of every command
    "2 workers": {"workers": 2},
    "2 workers, bfloat16": {"workers": 2, "precision": "bfloat16"},
}


@dataclass
class Bench:
    """Time searches against the plain way of scoring, and operators against peft's."""

    only: tuple[str, ...] = ()
    """Cases to run, such as demo@0.1 or operators; all by default."""
    episodes: int = 700
    """Evaluations of each search; a case may have fewer of its own."""
    sample: int = 24
    """Paths of each search that are scored in the plain way too, evenly spaced."""
    out: Path = Path("results")
    """Folder for performance.csv and its like."""
    case: str = ""
    """Run this case in this process, and print its lines as JSON."""

    def run(self) -> None:
        """Measure; print and store the tables."""
        known = [*CASES, *TIMES]
        if unknown := {*self.only, *([self.case] if self.case else [])} - set(known):
            raise InputError(
                f"--only: expected some of {', '.join(known)}, found {unknown.pop()!r}"
            )
        if self.case:
            torch.set_num_threads(1)
            cells = TIMES[self.case]() if self.case in TIMES else self._search(self.case)
            print(json.dumps(cells))
            return
        for name in self.only or known:
            if name.startswith("vit_base") and not torch.cuda.is_available():
                print(f"{name}: left out, no GPU that torch can use", flush=True)
                continue
            print(f"{time.strftime('%H:%M:%S')} {name} ...", flush=True)
            self._store(TABLES.get(name, "performance"), name, self._in_process(name))
        for table, show in SHOW.items():
            file = self.out / f"{table}.csv"
            if file.is_file():
                print(f"\n{show(runs.from_csv(file.read_text('utf-8')))}")

    def _in_process(self, name: str) -> list[Cell]:
        options = ["--episodes", str(self.episodes), "--sample", str(self.sample)]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.bench", "--case", name, *options],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            raise InputError(
                f"case {name}: expected it to end well, found the exit code {done.returncode}; its own "
                "message stands above"
            )
        return json.loads(done.stdout.splitlines()[-1])

    def _store(self, table: str, name: str, cells: Sequence[Cell]) -> None:
        """Into the table, in place of what stood there for the case."""
        self.out.mkdir(parents=True, exist_ok=True)
        file = self.out / f"{table}.csv"
        old = runs.from_csv(file.read_text("utf-8")) if file.is_file() else []
        new = [{"case": name} | cell | {"machine": machine(), "commit": commit()} for cell in cells]
        order = [*CASES, *TIMES]
        rows = [row for row in old if row["case"] != name] + new
        rows.sort(key=lambda row: order.index(row["case"]) if row["case"] in order else len(order))
        runs.write(file, runs.to_csv(rows))

    # ------------------------------------------------------------------------------- one case

    def _search(self, name: str) -> list[Cell]:
        """A search with each variant, and a sample of its paths in the plain way: one line each."""
        case = CASES[name]
        args = ppo.Args(
            preset=case.preset,  # type: ignore[arg-type]
            episodes=min(self.episodes, case.episodes),
            data_fraction=case.fraction,
            device="cuda" if case.experts.startswith("vit_base") else "cpu",
            quiet=True,
        )
        problem = problem_of(case.experts, args)
        cells, naive, first = [], {}, None
        for variant, options in VARIANTS.items():
            if case.experts.startswith("vit_") and variant == next(iter(VARIANTS)):
                continue  # large layers: little to gain, and minutes to lose
            if variant == "freed memory kept":
                keep_freed_memory()
            gc.collect()  # an environment holds its scorer in a circle
            for key, value in options.items():
                setattr(args, key, value)
            timed = timed_search(problem, args)
            if first is None:
                first = timed
                naive = plain_way(problem, args, timed.stream, self.sample)
            same = [r for _, _, r in timed.stream] == [r for _, _, r in first.stream]
            # Agent and environment cost a search in the plain way what they cost ours.
            plain = naive["seconds"] + first.bookkeeping_ms * args.episodes / 1000
            cells.append(
                {
                    "variant": variant,
                    "fraction": case.fraction,
                    "episodes": args.episodes,
                    "examples": naive["examples"],
                    "seconds": round(timed.seconds, 2),
                    "episodes_per_s": round(args.episodes / timed.seconds, 2),
                    "plain_seconds": round(plain, 2),
                    "plain_assembly": round(naive["assembly"] / plain, 3),
                    "plain_ms_per_path": round(1000 * naive["per_path"], 2),
                    "plain_forward_ms": round(1000 * naive["forward"], 3),
                    "times_plain": round(plain / timed.seconds, 2),
                    "layers_asked_per_run": round(timed.asked / timed.run, 3),
                    "forward_share": round(timed.forward / timed.seconds, 3),
                    "bookkeeping_ms": round(timed.bookkeeping_ms, 2),
                    "kept_mb": round(timed.kept / 2**20, 1),
                    "peak_mb": round(timed.peak / 2**20),
                    "same_rewards": same,
                    "reward_split": round(100 * timed.reward, 2),
                    "largest_difference": naive["difference"],
                }
            )
            print(f"  {variant}: {cells[-1]}", file=sys.stderr, flush=True)
        return cells


# ---------------------------------------------------------------------------------- our search


@dataclass
class Timed:
    """What a search took. ``stream``: (path, subset, reward) of all scores that it asked for."""

    seconds: float
    forward: float  # seconds inside the models, summed over workers
    asked: int  # layers x examples
    run: int
    kept: int  # bytes
    peak: int  # bytes of the process
    reward: float
    bookkeeping_ms: float = 0.0  # milliseconds an episode outside the models; one worker only
    stream: list[tuple[Steps, int | None, float]] = field(default_factory=list)


class Stopwatch:
    """An architecture whose models are timed: seconds inside embed, layers and head."""

    def __init__(self, architecture: Any) -> None:
        self._architecture, self.seconds = architecture, 0.0
        for name in ("embed", "apply", "apply_last", "logits"):
            setattr(self, name, self._timed(getattr(architecture, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._architecture, name)

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            start = time.perf_counter()
            out = function(*args)
            self.seconds += time.perf_counter() - start
            return out

        return run


def timed_search(problem: Problem, args: ppo.Args) -> Timed:
    """One search from loaded data and models to the chosen path, timed from outside and inside."""
    for task in problem.tasks:
        task.split("reward")
    env = ppo.make_env(problem, args)
    scorer = env.unwrapped.scorer
    scorer.architecture = watch = Stopwatch(scorer.architecture)
    stream: list[tuple[Steps, int | None, float]] = []
    score = scorer.score

    def noted(path: Steps, subset: int | None = None) -> np.ndarray:
        scores = score(path, subset)
        stream.append((path, subset, float(scores.mean())))
        return scores

    scorer.score = noted
    with peak_memory() as peak:
        start = time.perf_counter()
        agent, episodes, _, _ = ppo.search(env, args, runs.RunFolder(None))
        searched, inside = time.perf_counter() - start, watch.seconds
        best = ppo.choose(env, agent, episodes, args)[0]
        seconds = time.perf_counter() - start
    scorer.close()
    return Timed(
        seconds,
        watch.seconds,
        scorer.work_asked,
        scorer.work_run,
        scorer.cache.peak,
        peak[0],
        best["reward"],
        1000 * (searched - inside) / args.episodes if str(args.workers) == "1" else float("nan"),
        stream,
    )


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """The most memory that the process had, in bytes, looked at every 20 ms: a list of one number."""
    import psutil

    process, peak, stop = psutil.Process(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            peak[0] = max(peak[0], process.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


# --------------------------------------------------------------------------------- the plain way


def plain_way(
    problem: Problem,
    args: ppo.Args,
    stream: Sequence[tuple[Steps, int | None, float]],
    sample: int,
) -> dict[str, Any]:
    """Score an evenly spaced sample of a search's paths with whole models, remembering nothing.

    Returns the seconds that the whole stream would take so, those for assembling, the seconds of one
    path on a subset, in all and inside the model, the examples of a subset, and the largest difference
    from the rewards that the search saw. Scores on the whole split (the finalists') count by their number
    of examples.
    """
    scorer = ppo.make_scorer(problem, args)  # for its subsets alone
    examples = {
        s: sum(len(scorer.rows(i, s)) for i in range(scorer.n_models))
        for s in {subset for _, subset, _ in stream}
    }
    total, part = sum(examples[s] for _, s, _ in stream), 0
    searched = [entry for entry in stream if entry[1] is not None]
    chosen = [searched[i] for i in np.linspace(0, len(searched) - 1, sample).astype(int)]
    assembly = forward = difference = 0.0
    for n, (path, subset, reward) in enumerate([chosen[0], *chosen]):
        source, first = scorer.stem_of(path)
        start = time.perf_counter()
        model = problem.pool.assemble([(scorer.sources[a], k) for a, k in path[first:]], source)
        model.to(scorer.device)
        built = time.perf_counter()
        scores = [
            plain_score(problem, model, i, scorer.rows(i, subset), scorer.device)
            for i in range(scorer.n_models)
        ]
        done = time.perf_counter()
        if n == 0:  # the first one warms up
            continue
        assembly, forward = assembly + built - start, forward + done - built
        part += examples[subset]
        difference = max(difference, abs(float(np.mean(scores)) - reward))
    whole_forward, whole_assembly = forward * total / part, assembly * len(stream) / sample
    return {
        "seconds": whole_forward + whole_assembly,
        "assembly": whole_assembly,
        "per_path": (assembly + forward) / sample,
        "forward": forward / sample,
        "examples": part / sample,
        "difference": round(difference, 6),
    }


@torch.inference_mode()
def plain_score(problem: Problem, model: Any, i: int, rows: np.ndarray, device: Any) -> float:
    """Task i's metric of an assembled model, a timm or transformers one, on rows of the reward split."""
    task, found = problem.tasks[i], []
    for part in parts_of(rows, BATCH):
        batch = task.batch("reward", part)
        if problem.pool.base.family is t5:
            found.append(t5_choices(model, batch).argmax(-1))
        else:
            own = slice(*vit.head_slices(problem.pool.heads)[problem.pool.names[i]])
            found.append(model(batch.to(device))[:, own].argmax(-1).cpu())
    return task.score(torch.cat(found), task.split("reward").labels[torch.from_numpy(rows)])


def t5_choices(model: Any, batch: t5.TextBatch) -> Tensor:
    """The log-probability (n, C) of each choice by a T5ForConditionalGeneration's own forward pass."""
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


# ------------------------------------------------------------------------------- models to time


def problem_of(experts: str, args: ppo.Args, pictures: int = 100) -> Problem:
    """A group that ships, or a stand-in with the architecture that timm knows by this name.

    pictures: of each of the stand-in's two tasks.
    """
    if not experts.startswith("vit_"):
        return load_problem(
            (experts,), operators=args.operators, stem=args.stem, metric=args.metric, seed=args.seed
        )
    return stand_in(experts, pictures, operators=args.operators, stem=args.stem)


class Noise:
    """A task of random pictures; their labels come from outside. Like ``tasks.Task`` for a scorer."""

    metric = "accuracy"

    def __init__(self, name: str, images: Tensor) -> None:
        self.name, self._images = name, images
        self.labels = torch.zeros(len(images), dtype=torch.int64)

    def split(self, name: str) -> Split:
        """The same pictures whatever the split."""
        return Split(self._images, self.labels)

    def batch(self, name: str, rows: np.ndarray | slice) -> Tensor:
        """(n, 3, H, W) float32."""
        return self._images[rows].float() / 64 - 2

    def score(self, found: Tensor, labels: Tensor) -> float:
        """Accuracy: both (n,) -> [0, 1]."""
        return float((found == labels).double().mean())


def stand_in(
    architecture: str,
    n: int,
    classes: int = 10,
    *,
    operators: Sequence[str] = OPERATORS,
    stem: str = STEM,
) -> Problem:
    """Two experts of a timm ViT with random weights, near one base, and n random pictures for each.

    The labels are what an expert itself answers, so that a search has something to find. For timing only.
    """
    import timm

    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)  # timm's initial weights
    shape = timm.create_model(architecture, num_classes=classes)
    size = shape.default_cfg["input_size"]
    config = {
        "architecture": architecture,
        "num_classes": classes,
        "model_args": {"num_classes": classes},
        "pretrained_cfg": {"input_size": list(size)},
    }
    weights = {k: v.detach() for k, v in shape.state_dict().items()}
    base = Checkpoint("base", Path(), config, weights, "")
    experts = []
    for i in range(2):
        own = {
            k: v + 0.2 * v.std(correction=0) * torch.randn(v.shape, generator=generator)
            for k, v in weights.items()
        }
        experts.append(Checkpoint(f"expert-{i + 1}", Path(), config, own, ""))
    names = [e.source for e in experts]
    pool = LayerPool(base, experts, names, operators, seed=0)
    tasks = []
    for name in names:
        colours = torch.randint(0, 256, (n, size[0], 1, 1), generator=generator)
        noise = torch.randint(-64, 65, (n, *size), generator=generator)
        task = Noise(name, (colours + noise).clamp(0, 255).to(torch.uint8))
        head = pool.heads[name]
        logits = _own_logits(pool, name, task)
        head["bias"] = head["bias"] - logits.mean(0)  # or all pictures would be of one class
        task.labels = (logits - logits.mean(0)).argmax(-1)
        tasks.append(task)
    return Problem(pool, tasks, stem)


@torch.inference_mode()
def _own_logits(pool: LayerPool, name: str, task: Noise) -> Tensor:
    architecture, stem, found = pool.architecture, pool.stem(name), []
    for rows in parts_of(np.arange(len(task.labels)), 32):
        state = architecture.embed(stem, task.batch("reward", rows))
        for k in range(pool.n_layers):
            state = architecture.apply(pool.layer(name, k), state)
        found.append(architecture.logits(stem, state, pool.heads[name]))
    return torch.cat(found).clone()


# --------------------------------------------------------------------------------- the operators


def operator_times(layers: int = 12, repeats: int = 3) -> list[Cell]:
    """TIES and DARE over two ViT-B/16's layers, flattened as in Eq. 4, and the same in peft."""
    keep_freed_memory()
    size = 7_087_872  # weights of a layer of ViT-B/16
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(size, generator=generator)
    experts = base + 0.01 * torch.randn(2, size, generator=generator)
    deltas = list(experts - base)
    weights = torch.ones(2)
    pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any] | None]] = {
        "ties:density=0.3": (lambda: merging.ties(base, experts, density=0.3), None),
        "dare:drop_rate=0.34": (
            lambda: merging.dare(base, experts, drop_rate=0.34, generator=generator),
            None,
        ),
    }
    try:
        from peft.utils import merge_utils
    except ImportError:
        print("peft is not installed: its operators are left out", file=sys.stderr)
    else:
        pairs["ties:density=0.3"] = (
            pairs["ties:density=0.3"][0],
            lambda: base + merge_utils.ties(deltas, weights, density=0.3),
        )
        pairs["dare:drop_rate=0.34"] = (
            pairs["dare:drop_rate=0.34"][0],
            lambda: base + merge_utils.dare_linear(deltas, weights, density=0.66),
        )
    cells = []
    for name, both in pairs.items():
        seconds: list[list[float]] = [[], []]
        for _ in range(repeats):  # by turns, so that both see the same machine
            for side, function in zip(seconds, both, strict=True):
                if function is not None:
                    start = time.perf_counter()
                    function()
                    side.append(time.perf_counter() - start)
        ours, theirs = (layers * min(s) if s else float("nan") for s in seconds)
        cells.append(
            {
                "operator": name,
                "seconds": round(ours, 2),
                "peft_seconds": round(theirs, 2),
                "times_peft": round(theirs / ours, 2),
            }
        )
    return cells


# --------------------------------------------------------------------------- the share of the data


def data_times(repeats: int = 5) -> list[Cell]:
    """What one evaluation in the plain way takes on 100, 10 and 1 % of the data: the paper's speed-up."""
    cells = []
    for experts in ("demo", "qa", "vit_small_patch32_224"):
        args = ppo.Args(preset="agent", experts=(experts,), quiet=True)
        problem = problem_of(experts, args, pictures=400)
        source, n = problem.pool.names[0], problem.pool.n_layers
        path = ((0, -1), *((0, k) for k in range(n)))
        whole = None
        for fraction in (1.0, 0.1, 0.01):
            args.data_fraction = fraction
            scorer = ppo.make_scorer(problem, args)
            reward = float(scorer.score(path, 0).mean())
            stream = [(path, 0, reward)]
            found = plain_way(problem, args, stream, repeats if fraction < 1 or n < 9 else 1)
            cell = {
                "path": f"{source} at all {n} layers",
                "examples": round(found["examples"]),
                "ms": round(1000 * found["per_path"], 2),
                "forward_ms": round(1000 * found["forward"], 2),
            }
            whole = whole or cell
            cell["times_faster"] = round(whole["ms"] / cell["ms"], 1)
            cell["forward_times_faster"] = round(whole["forward_ms"] / cell["forward_ms"], 1)
            cells.append({"experts": experts, "fraction": fraction} | cell)
    return cells


def subset_noise(paths: int = 60, batch: int = 20) -> list[Cell]:
    """What episodes that share a subset gain: how well a batch's rewards tell its better paths.

    Random paths of the demo's pair, in batches as for one policy update. The advantage compares the
    episodes of a batch with each other, so what counts is the correlation, within a batch, of the rewards
    with those on the whole reward split: once with one subset for the batch, once with another subset
    for each episode. Means over all subsets.
    """
    problem = load_problem(("demo",), seed=1)
    cells = []
    for fraction in (0.1, 0.01):
        scorer = problem.scorer(fraction=fraction, seed=1)
        rng = np.random.default_rng(1)
        drawn = [random_path(scorer, rng) for _ in range(paths)]
        whole = np.array([scorer.score(path, None).mean() for path in drawn])  # (paths,)
        subsets = range(scorer.n_subsets)
        scorer.prefetch([(path, s) for path in drawn for s in subsets])
        table = np.array([[scorer.score(p, s).mean() for s in subsets] for p in drawn])
        turn = np.arange(batch)
        shared, apart, spread = [], [], []
        for start in range(0, paths - batch + 1, batch):
            own = slice(start, start + batch)
            for s in subsets:
                one, each = table[own, s], table[start + turn, (s + turn) % len(subsets)]
                shared.append(np.corrcoef(one, whole[own])[0, 1])
                apart.append(np.corrcoef(each, whole[own])[0, 1])
                spread.append((one.var(), each.var()))
        one, each = np.mean(spread, axis=0)
        cells.append(
            {
                "fraction": fraction,
                "paths": paths,
                "batch": batch,
                "shared_correlation": round(float(np.mean(shared)), 3),
                "apart_correlation": round(float(np.mean(apart)), 3),
                "true_sd": round(100 * float(whole.std()), 2),
                "shared_sd": round(100 * float(one) ** 0.5, 2),
                "apart_sd": round(100 * float(each) ** 0.5, 2),
            }
        )
    return cells


def layer_times(repeats: int = 30) -> list[Cell]:
    """One layer in the ways that were tried, against the library's own forward pass of it."""
    keep_freed_memory()
    cells = []

    def add(models: str, examples: int, ways: Mapping[str, Callable[[], Any]]) -> None:
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for n in range(repeats + 2):  # by turns, so that all see the same machine; two to warm up
            for way, run in ways.items():
                start = time.perf_counter()
                run()
                if n > 1:
                    seconds[way].append(time.perf_counter() - start)
        own = float(np.median(next(iter(seconds.values()))))
        for way, all_ in seconds.items():
            ms, times = 1000 * float(np.median(all_)), own / float(np.median(all_))
            cell = {"models": models, "examples": examples, "way": way}
            cells.append(cell | {"ms": round(ms, 3), "times_faster": round(times, 2)})

    with torch.inference_mode():
        for experts, n in (("demo", 120), ("vit_small_patch32_224", 32)):
            args = ppo.Args(preset="agent", experts=(experts,), quiet=True)
            problem = problem_of(experts, args, pictures=n)
            pool, source = problem.pool, problem.pool.names[0]
            layer, family = pool.layer(source, 1), pool.architecture
            tokens = family.embed(pool.stem(source), problem.tasks[0].batch("reward", np.arange(n)))
            half, half_tokens = copy.deepcopy(layer).bfloat16(), tokens.bfloat16()
            ways = {
                "timm's own": partial(layer, tokens),
                "ours, last layer": partial(family.apply_last, layer, tokens),
                "bfloat16": partial(half, half_tokens),
            }
            if shutil.which("g++"):  # torch.compile needs a compiler
                ways["torch.compile"] = partial(torch.compile(layer), tokens)
            add(experts, n, ways)
        problem = load_problem(("qa",))
        pool, source = problem.pool, problem.pool.names[0]
        state = pool.architecture.embed(
            pool.stem(source), problem.tasks[0].batch("reward", np.arange(80))
        )
        block = pool.layer(source, 1)
        mask = state.bias.expand(len(state.encoded), -1, -1, -1)
        ways = {
            "transformers' own": partial(
                block, state.encoded, position_bias=mask, attention_mask=None
            ),
            "ours": partial(pool.architecture.apply, block, state),
        }
        add("qa, encoder", 80, ways)
    return cells


TIMES: dict[str, Callable[[], list[Cell]]] = {
    "layers": layer_times,
    "data": data_times,
    "subsets": subset_noise,
    "operators": operator_times,
}


# ------------------------------------------------------------------------------------ the tables


def machine() -> str:
    """CPU, cores that this process may use, GPU and torch's version, in a line."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = names[0].split(":", 1)[1].strip() if names else name
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {os.cpu_count()} cores{gpu}, torch {torch.__version__}"


def markdown(cells: Sequence[Cell]) -> str:
    """The table of searches, in Markdown."""
    head = ["case", "with", "episodes", "s", "plain way, s", "times faster", "layers asked / run"]
    head += [
        "in the models",
        "bookkeeping, ms an episode",
        "kept, MB",
        "peak, MB",
        "reward split, %",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    for c in cells:
        alone = "workers" not in c["variant"]
        values = (
            c["case"],
            c["variant"],
            c["episodes"],
            f"{c['seconds']:.1f}",
            f"{c['plain_seconds']:.1f}",
            f"**{c['times_plain']:.1f}**",
            f"{c['layers_asked_per_run']:.2f}",
            f"{100 * c['forward_share']:.0f} %" if alone else "",
            f"{c['bookkeeping_ms']:.1f}" if alone else "",
            f"{c['kept_mb']:.0f}",
            c["peak_mb"],
            f"{c['reward_split']:.1f}",
        )
        lines.append("| " + " | ".join(map(str, values)) + " |")
    return "\n".join(lines) + "\n"


def operators_markdown(cells: Sequence[Cell]) -> str:
    """The table of operators, in Markdown."""
    lines = [
        "| operator, 12 layers of two ViT-B/16 | s | peft, s | times faster |",
        "|---|---:|---:|---:|",
    ]
    lines += [
        f"| {c['operator']} | {c['seconds']:.1f} | {c['peft_seconds']:.1f} | {c['times_peft']:.1f} |"
        for c in cells
    ]
    return "\n".join(lines) + "\n"


def data_markdown(cells: Sequence[Cell]) -> str:
    """The table of data shares, in Markdown."""
    head = "| models | share of the data | examples | ms an evaluation | times faster | "
    lines = [head + "ms in the models | times faster |", "|---|---:|---:|---:|---:|---:|---:|"]
    lines += [
        f"| {c['experts']} | {100 * c['fraction']:g} % | {c['examples']} | {c['ms']:.1f} | "
        f"{c['times_faster']:.1f} | {c['forward_ms']:.1f} | {c['forward_times_faster']:.1f} |"
        for c in cells
    ]
    return "\n".join(lines) + "\n"


def subsets_markdown(cells: Sequence[Cell]) -> str:
    """The table of subsets, in Markdown."""
    lines = [
        "| data | 20 episodes on | correlation with the whole split | spread of rewards, points |",
        "|---:|---|---:|---:|",
    ]
    for c in cells:
        for name, key in (("one subset", "shared"), ("a subset each", "apart")):
            lines.append(
                f"| {100 * c['fraction']:g} % | {name} | {c[f'{key}_correlation']:.2f} | "
                f"{c[f'{key}_sd']:.1f} (whole split: {c['true_sd']:.1f}) |"
            )
    return "\n".join(lines) + "\n"


def layers_markdown(cells: Sequence[Cell]) -> str:
    """The table of single layers, in Markdown."""
    lines = ["| models | examples | one layer | ms | times faster |", "|---|---:|---|---:|---:|"]
    lines += [
        f"| {c['models']} | {c['examples']} | {c['way']} | {c['ms']:.2f} | {c['times_faster']:.2f} |"
        for c in cells
    ]
    return "\n".join(lines) + "\n"


TABLES = {name: f"performance-{name}" for name in TIMES}
SHOW: dict[str, Callable[[Sequence[Cell]], str]] = {
    "performance": markdown,
    "performance-layers": layers_markdown,
    "performance-data": data_markdown,
    "performance-subsets": subsets_markdown,
    "performance-operators": operators_markdown,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    return run_command(Bench, "python -m benchmarks.bench", argv, "what was measured is stored")


if __name__ == "__main__":
    sys.exit(main())
