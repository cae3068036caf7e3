"""Result tables as pages in Markdown, written from their CSV files alone.

``SHOW[name](rows, paper)`` gives a sheet's text: ``rows`` are those of the files that ``FILES`` names,
``paper`` those of ``paper.csv``. Its figure, if it has one, is ``sheet_figures.DRAW[name](rows)``. Means are
over seeds, ± is the sample standard deviation, and differences are paired by seed with a 95 % interval.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rmm_lab.errors import InputError

Rows = Sequence[Mapping[str, Any]]
NAN = float("nan")

# ------------------------------------------------------------------------------------ statistics

# 97.5 % quantiles of Student's t for 1 to 29 degrees of freedom (NIST/SEMATECH e-Handbook of Statistical
# Methods, Sec. 1.3.6.7.2).
T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045),
)
MOST_SEEDS = len(T_975) + 1


def t_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and half width of its 95 % confidence interval, for 2 to 30 independent values.

    ``mean ± t sd / sqrt(n)`` with the sample deviation; Student's t since n is small.
    """
    v = np.asarray(values, float)
    if not 2 <= len(v) <= MOST_SEEDS:
        raise InputError(
            f"t_interval: expected 2 to {MOST_SEEDS} values, found {len(v)}; give some of them"
        )
    return float(v.mean()), float(T_975[len(v) - 2] * v.std(ddof=1) / len(v) ** 0.5)


def mean_and_sd(
    rows: Rows, value: str, *keys: str
) -> dict[tuple[Any, ...], tuple[int, float, float]]:
    """Rows in groups of equal ``keys``: key values -> (number, mean, sample standard deviation).

    The deviation of a single row is NaN. Groups come in the order of their first row.
    """
    groups: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        groups.setdefault(tuple(row[k] for k in keys), []).append(float(row[value]))
    return {
        k: (len(v), float(np.mean(v)), float(np.std(v, ddof=1)) if len(v) > 1 else NAN)
        for k, v in groups.items()
    }


def span(counts: Iterable[int]) -> str:
    """Numbers of seeds in words: ``5``, or ``3 to 5`` where they differ."""
    own = list(counts)
    return " to ".join(dict.fromkeys([str(min(own)), str(max(own))]))


def difference(a: Mapping[int, float], b: Mapping[int, float]) -> str:
    """a - b, paired by seed: ``+1.2 ± 0.3``, the mean and its 95 % interval; one seed gives no interval."""
    both = [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
    if len(both) < 2:
        return _signed(both[0]) if both else ""
    mean, half = t_interval(both)
    return f"{_signed(mean)} ± {half:.1f}"


def _signed(x: float) -> str:
    return f"{x:+.1f}".replace("-", "−")


# ----------------------------------------------------------------------------- tables of methods

BY_SEED = dict[int, float]
Block = dict[str, dict[str, BY_SEED]]  # method -> column -> seed -> score in %


def draws(method: str) -> bool:
    """Whether a method's result depends on the seed."""
    return method.startswith(("DARE", "RMM"))


def by_task(row: Mapping[str, Any]) -> dict[str, float]:
    """Each task's score of a line, in %."""
    parts = (part.rpartition("=") for part in str(row["by_task"]).split())
    return {name: float(value) for name, _, value in parts}


def block(rows: Rows, columns: Callable[[Mapping[str, Any]], Mapping[str, float]]) -> Block:
    """Lines as method -> column -> seed -> score; ``columns`` gives a line's own. Experts become the best.

    Of the experts, each used for all tasks, the one with the best mean on the test split counts: a bound,
    no fair opponent.
    """
    out: Block = {}
    best: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for row in rows:
        if row["method"].startswith("expert "):
            key = (row["group"], row.get("size"), row["seed"])
            best[key] = max(best.get(key, row), row, key=lambda r: r["mean"])
    alone = [dict(row) | {"method": "best expert, for all tasks"} for row in best.values()]
    for row in [*rows, *alone]:
        if not row["method"].startswith("expert "):
            for column, value in columns(row).items():
                own = out.setdefault(row["method"], {})
                own.setdefault(column, {})[row["seed"]] = value
    return out


def add_average(found: Block, columns: Sequence[str]) -> list[str]:
    """Add the mean over columns where a method has them all; all columns."""
    for own in found.values():
        seeds = [set(own.get(c, {})) for c in columns]
        own["Average"] = {
            s: float(np.mean([own[c][s] for c in columns]))
            for s in sorted(set.intersection(*seeds))
        }
    return [*columns, "Average"]


METHODS = (
    *("chance", "most frequent answer", "base", "fine-tuned", "multi-task"),
    "best expert, for all tasks",
    *("weight average", "task arithmetic", "TIES", "DARE"),
    *("task arithmetic, tuned", "TIES, tuned", "DARE, tuned"),
    *("RMM", "RMM, paper's preset"),
)
UNIFORM = METHODS[6:13]


def text(values: BY_SEED, method: str) -> str:
    """Mean ± deviation over seeds; without ± where nothing is drawn, or there is one seed."""
    v = list(values.values())
    if not v:
        return ""
    spread = f" ± {np.std(v, ddof=1):.1f}" if draws(method) and len(v) > 1 else ""
    return f"{np.mean(v):.1f}{spread}"


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]], words: int = 1) -> str:
    """A Markdown table: the first columns, of words, left, the others right."""
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * words + "---:|" * (len(head) - words)]
    return "\n".join([*out, *("| " + " | ".join(cells) + " |" for cells in lines)]) + "\n"


def methods_table(found: Block, columns: Sequence[str], compared: Sequence[str]) -> str:
    """Rows methods; at the end what RMM gains over the best uniform merge of each seed.

    Where columns are the tasks of one merged model, the gain is that of their average alone: a merge may be
    good at one task because it lost the other.
    """
    lines = []
    for method in METHODS:
        if method in found:
            cells = [text(found[method].get(c, {}), method) for c in columns]
            cells = [f"**{c}**" if c and method == "RMM" else c for c in cells]
            lines.append([f"**{method}**" if method == "RMM" else method, *cells])
    for method in METHODS[13:]:
        if method in found:
            gains = [
                difference(found[method].get(c, {}), best_uniform(found, c))
                if c in compared
                else ""
                for c in columns
            ]
            lines.append([f"{method} − best uniform merge", *gains])
    return markdown(["method", *columns], lines)


def best_uniform(found: Block, column: str) -> BY_SEED:
    """The best uniform merge of each seed in a column, on the test split: the hardest to beat."""
    own = [found[m].get(column, {}) for m in UNIFORM if m in found]
    return {s: max(v[s] for v in own if s in v) for s in sorted({s for v in own for s in v})}


def tuning(rows: Rows) -> str:
    """How many evaluations each method had, in a sentence or two."""
    tried = {}
    for row in rows:
        if match := re.search(r"best of (\d+)", str(row["setting"])):
            tried[row["method"].removesuffix(", tuned")] = int(match[1])
    parts = ", ".join(f"{n} settings of {method}" for method, n in tried.items())
    searches = [r for r in rows if r["method"].startswith("RMM")]
    out = ""
    if tried:
        out = (
            f"Tuned: the best on the reward split of {parts}; with the weight average "
            f"{1 + sum(tried.values())} evaluations of the whole reward split. "
        )
    if searches:
        episodes = searches[0]["episodes"]
        share = json.loads(searches[0].get("config") or "{}").get("data_fraction", 0.1)
        out += (
            f"RMM: {episodes} episodes, each on {100 * share:g} % of the reward split; at most 11 paths "
            "are scored on all of it to choose one."
        )
    return out


READING = (
    "Score on the test split, %. Mean over {n}; ± is the sample standard deviation, for methods that draw "
    "(the others are measured once). The last line{s}: paired by seed, ± the 95 % interval, over the best of "
    "the seven uniform merges *on the test split*."
)


def _page(title: str, rows: Rows, tables: Sequence[str], paper: Rows, number: str) -> str:
    counts = Counter((row["group"], row["size"]) for row in rows if row["method"] == "RMM")
    seeds = span(counts.values() or [1])
    several = len({r["method"] for r in rows if r["method"].startswith("RMM")}) > 1
    n = "one seed" if seeds == "1" else f"{seeds} seeds"
    reading = READING.format(n=n, s="s" * several)
    own = [row for row in paper if row["table"] == number]
    parts = [f"# {title}\n", f"{reading} {tuning(rows)}\n", *tables]
    return "\n".join([*parts, *papers_tables(own)])


def papers_tables(rows: Rows) -> list[str]:
    """The paper's own figures, a table for each of its models."""
    out = ["## Paper (Han et al. 2025), other models and data\n"] if rows else []
    models = dict.fromkeys(row["model"] for row in rows)
    for model in models:
        own = [row for row in rows if row["model"] == model]
        columns = list(dict.fromkeys(row["column"] for row in own))
        values = {(row["method"], row["column"]): f"{row['value']:.2f}" for row in own}
        lines = [
            [method, *(values.get((method, c), "") for c in columns)]
            for method in dict.fromkeys(row["method"] for row in own)
        ]
        out.append(f"{model}:\n\n{markdown(['method', *columns], lines)}")
    return out


def halves_blocks(rows: Rows) -> dict[str, tuple[Block, list[str]]]:
    """Table I: size -> scores, columns: each set's mean over its halves, and the average."""
    out = {}
    for size in dict.fromkeys(row["size"] for row in rows):
        own = [row for row in rows if row["size"] == size]
        found = block(own, lambda row: {row["group"]: row["mean"]})
        out[size] = (found, add_average(found, list(dict.fromkeys(r["group"] for r in own))))
    return out


PAIRS = ("digits+textures", "CUB+Dogs")  # Table II's, at the kit's scale and at the paper's


def pair_blocks(rows: Rows) -> dict[str, tuple[Block, list[str]]]:
    """Table II: the tasks of the pair, one of ``PAIRS`` or the only group, and their mean; {} without one."""
    groups = list(dict.fromkeys(row["group"] for row in rows))
    pairs = [group for group in groups if group in PAIRS] or (groups if len(groups) == 1 else [])
    if not pairs:
        return {}
    group = pairs[0]
    own = [row for row in rows if row["group"] == group]
    found = block(own, lambda row: by_task(row) | {"Average": row["mean"]})
    return {group: (found, [*by_task(own[0]), "Average"])}


def group_blocks(rows: Rows) -> dict[str, tuple[Block, list[str]]]:
    """Table III and other groups: size -> the mean of each group."""
    out = {}
    for size in dict.fromkeys(row.get("size", "") for row in rows):
        own = [row for row in rows if row.get("size", "") == size]
        found = block(own, lambda row: {row["group"]: row["mean"]})
        out[size] = (found, list(dict.fromkeys(r["group"] for r in own)))
    return out


Blocks = Callable[[Rows], dict[str, tuple[Block, list[str]]]]


def _methods_sheet(title: str, blocks: Blocks, number: str) -> Callable[..., str]:
    def show(rows: Rows, paper: Rows = ()) -> str:
        of = blocks(rows)
        if not of:
            return ""
        tables = [
            (f"## {heading}\n\n" if heading else "")
            + methods_table(found, columns, columns[-1:] if blocks is pair_blocks else columns)
            for heading, (found, columns) in of.items()
        ]
        if blocks is pair_blocks:
            rows = [row for row in rows if row["group"] in of]
        return _page(title, rows, tables, paper, number)

    return show


# ---------------------------------------------------------------------------- Table IV and Fig. 3


# Settings of Table IV beside the paper's own.
OURS = tuple(
    f"RMM, default preset{by}{dar}" for dar in ("", ", DAR") for by in ("", ", by likelihood")
)


def _setting(row: Mapping[str, Any]) -> str:
    if row["preset"] == "default":
        by = ", by likelihood" if row["reward"] == "likelihood" else ""
        return "RMM, default preset" + by + (", DAR" if row["dar"] else "")
    return "RMM" if row["dar"] else "RMM w/o DAR"


def _share(row: Mapping[str, Any]) -> str:
    return f"{100 * row['data_fraction']:g} %"


def dar_blocks(rows: Rows) -> tuple[dict[str, Block], list[str]]:
    """Table IV: metric (a task, or Average) -> setting -> share of the data -> seed -> score.

    At 100 % DAR changes nothing, so the search with it stands for both.
    """
    out: dict[str, Block] = {}
    for row in rows:
        both = row["data_fraction"] == 1 and row["preset"] == "paper"
        settings = ["RMM", "RMM w/o DAR"] if both else [_setting(row)]
        for metric, value in (by_task(row) | {"Average": row["mean"]}).items():
            for setting in settings:
                own = out.setdefault(metric, {}).setdefault(setting, {})
                own.setdefault(_share(row), {})[row["seed"]] = value
    shares = sorted({row["data_fraction"] for row in rows}, reverse=True)
    return out, [f"{100 * share:g} %" for share in shares]


def show_dar(rows: Rows, paper: Rows = ()) -> str:
    """Table IV in Markdown."""
    found, shares = dar_blocks(rows)
    settings = [s for s in (*("RMM", "RMM w/o DAR"), *OURS) if s in found["Average"]]
    lines = [
        [metric, setting, *(text(own[setting].get(share, {}), "RMM") for share in shares)]
        for metric, own in found.items()
        for setting in settings
    ]
    average = found["Average"]
    partial = [share for share in shares if share != "100 %"]
    gains = [
        difference(average.get("RMM", {}).get(s, {}), average.get("RMM w/o DAR", {}).get(s, {}))
        for s in partial
    ]
    lines.append(["Average", "with − without DAR", *[""] * (len(shares) - len(partial)), *gains])
    seconds = mean_and_sd([r for r in rows if r["preset"] == "paper"], "seconds", "data_fraction")
    times = {f"{100 * f:g} %": mean for (f,), (_, mean, _) in seconds.items()}
    lines.append(["seconds", "RMM", *(f"{times[s]:.0f}" if s in times else "" for s in shares)])
    if "100 %" in times:
        faster = [f"{times['100 %'] / times[s]:.1f}" if s in times else "" for s in shares]
        lines.append(["times faster", "RMM", *faster])
    searches = ("preset", "reward", "data_fraction", "dar")
    seeds = span(Counter(tuple(row[k] for k in searches) for row in rows).values())
    head = (
        "# Table IV: share of the data, with DAR and without\n\nScore on the test split, %: mean ± sample "
        f"standard deviation over {seeds} seeds, {rows[0]['episodes']} episodes. *RMM* and *RMM w/o DAR* are "
        "the paper's preset (at 100 % DAR has no effect, and one search stands for both); the default preset "
        "has choices of its own; *by likelihood*: its episodes are paid by how likely the right answers are, "
        "and the final choice is by the metric as always. The line with − without: paired by seed, ± the "
        "95 % interval. Seconds are of whole searches of the paper's preset, taken beside other work.\n\n"
    )
    own = [row for row in paper if row["table"] == "IV"]
    return head + "\n".join([markdown(["metric", "method", *shares], lines, 2), *_papers_dar(own)])


def _papers_dar(rows: Rows) -> list[str]:
    """The paper's Table IV in the layout of ours."""
    if not rows:
        return []

    def digits(metric: str) -> str:
        return ".1f" if metric == "times faster" else ".2f"

    shares = list(dict.fromkeys(row["column"].rpartition(" at ")[2] for row in rows))
    values = {(*row["column"].split(" at "), row["method"]): row["value"] for row in rows}
    lines = [
        [metric, method, *(f"{values[metric, s, method]:{digits(metric)}}" for s in shares)]
        for metric, method in dict.fromkeys((metric, method) for metric, _, method in values)
    ]
    title = f"## Paper (Han et al. 2025), other models and data\n\n{rows[0]['model']}:\n\n"
    return [title + markdown(["metric", "method", *shares], lines, 2)]


# ------------------------------------------------------------------------ searches and ablation


def by_seed(rows: Rows, value: str) -> BY_SEED:
    """Seed -> a column's number, of rows that differ in nothing else."""
    return {row["seed"]: float(row[value]) for row in rows}


def show_searches(rows: Rows, curve: Rows = (), paper: Rows = ()) -> str:
    """Each search's final choice on both splits, and what RMM has over each other one."""
    lines = []
    for group in dict.fromkeys(row["group"] for row in rows):
        own: dict[str, list[Mapping[str, Any]]] = {}
        for row in rows:
            if row["group"] == group:
                own.setdefault(row["method"], []).append(row)
        order = sorted(own, key=lambda m: -np.mean([r["reward_split"] for r in own[m]]))
        for method in order:
            splits = ("reward_split", "mean")
            found = [text(by_seed(own[method], k), "RMM") for k in splits]
            gains = ["", ""]
            if method != "RMM" and "RMM" in own:
                gains = [
                    difference(by_seed(own["RMM"], k), by_seed(own[method], k)) for k in splits
                ]
            seconds = np.mean([r["seconds"] for r in own[method]])
            name = f"**{method}**" if method == "RMM" else method
            seeds = str(len({r["seed"] for r in own[method]}))
            lines.append([group, name, seeds, *found, *gains, f"{seconds:.0f}"])
    head = (
        f"# RMM beside other searches\n\nAll had {rows[0]['episodes']} evaluations on the same subsets of "
        "the reward split. Each chose in the end among ten paths on all of it: those with the best scores, "
        "and where scales evolved, most are the means that these arrived at; RMM had its agent's greedy path "
        "besides. Mean ± sample standard deviation over "
        "seeds, best first on the reward split. *RMM − it*: on the reward and on the test split, paired by "
        "seed, ± the 95 % interval. Seconds are of searches that ran beside other work.\n\n"
    )
    columns = ["problem", "search", "seeds", "reward split, %", "test split, %"]
    columns += ["RMM − it, reward", "RMM − it, test", "seconds"]
    return head + markdown(columns, lines, 2)


DEFAULT = "default preset"  # what the ablation's differences are to


def show_agent(rows: Rows, paper: Rows = ()) -> str:
    """The default preset and one choice changed, with the paired difference on the reward split."""
    lines = []
    for group in dict.fromkeys(row["group"] for row in rows):
        own: dict[str, list[Mapping[str, Any]]] = {}
        for row in rows:
            if row["group"] == group:
                own.setdefault(row["setting"], []).append(row)
        first = DEFAULT if DEFAULT in own else next(iter(own))
        for setting, its in own.items():
            split = [text(by_seed(its, k), "RMM") for k in ("reward_split", "mean")]
            gain = ""
            if setting != first:
                gain = difference(by_seed(its, "reward_split"), by_seed(own[first], "reward_split"))
            seeds = str(len({row["seed"] for row in its}))
            lines.append([group, setting, split[0], gain, split[1], seeds])
    head = (
        "# The default preset, one choice changed\n\nMean ± sample standard deviation over "
        f"seeds, {rows[0]['episodes']} episodes. The difference is paired by seed, ± its 95 % "
        "interval. Choices were made on the reward split; the test split is shown beside.\n\n"
    )
    columns = ["problem", "setting", "reward split, %", "difference", "test split, %", "seeds"]
    return head + markdown(columns, lines, 2)


# ------------------------------------------------------------------------------------- all sheets

# Sheet -> the tables that it is written from.
FILES: dict[str, tuple[str, ...]] = {
    "table-I": ("halves",),
    "table-II": ("vision",),
    "groups": ("vision",),
    "table-III": ("language",),
    "table-IV": ("dar",),
    "fig-3": ("dar-curve",),
    "searches": ("searches", "searches-curve"),
    "agent": ("agent",),
}
TITLES: dict[str, tuple[str, Blocks, str]] = {
    "table-I": ("Table I: halves of each set, merged in pairs", halves_blocks, "I"),
    "table-II": ("Table II: two sets that differ more", pair_blocks, "II"),
    "groups": ("Groups of sets: Table II's methods", group_blocks, ""),
    "table-III": ("Table III: language tasks", group_blocks, "III"),
}
SHOW: dict[str, Callable[..., str]] = {
    **{name: _methods_sheet(*of) for name, of in TITLES.items()},
    "table-IV": show_dar,
    "searches": show_searches,
    "agent": show_agent,
}
