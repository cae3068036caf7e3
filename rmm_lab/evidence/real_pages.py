"""Pages of real pretrained models, see ``real``, from the CSV files alone: what the kit's tables have not."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
from matplotlib.figure import Figure
from pandas import DataFrame

from rmm_lab.evidence.markdown import markdown, seconds_text
from rmm_lab.evidence.rows import BEST_EXPERT, METHODS, RULES, kind_of, spread, task_scores
from rmm_lab.figures.paths import panels, tidy
from rmm_lab.figures.searches import line_look
from rmm_lab.search.config import SEARCHED
from rmm_lab.search.uniform import OWN

AVERAGE = "weight average"


def _in_order(table: DataFrame) -> DataFrame:
    """Rows by method in the order of all tables, experts first."""
    known = [m for m in METHODS.index if m in table.index]
    return table.reindex([*(m for m in table.index if m not in METHODS.index), *known])


def _how(rows: DataFrame) -> str:
    """What was measured on what, in a line."""
    bases = ", ".join(sorted({sha[:12] for sha in rows["base_sha256"]}))
    return f"Base {bases}; experts: {', '.join(sorted(set(rows['training'])))}.\n\n"


def recovered(rows: DataFrame) -> DataFrame:
    """Methods of one group: mean in %, and the share of what averaging loses that each wins back, in %.

    Columns mean, recovered, seconds, sees; the share is NaN where averaging loses nothing.
    """
    means = rows.groupby("method", sort=False)["mean"].mean()
    lost = means[OWN] - means[AVERAGE]
    share = 100 * (means - means[AVERAGE]) / lost if lost > 0 else means * float("nan")
    table = DataFrame({"mean": means, "recovered": share})
    took = rows.groupby("method", sort=False).agg(
        seconds=("seconds", "mean"), sees=("sees", "first")
    )
    return _in_order(table.join(took))


def recovered_table(rows: DataFrame) -> DataFrame:
    """The same as text; bounds and experts recover nothing."""
    table, kinds = recovered(rows), kind_of(rows["method"].drop_duplicates())
    bounds = set(rows["method"].drop_duplicates()[kinds.isin(("bound", "expert"))])
    share = [
        "" if m in bounds or pd.isna(s) else f"{s:.0f}".replace("-", "−")
        for m, s in table["recovered"].items()
    ]
    text = DataFrame({"test split, %": table["mean"].map("{:.1f}".format), "recovered, %": share})
    text["seconds"] = [seconds_text(pd.Series([s])) for s in table["seconds"]]
    return text.assign(sees=table["sees"]).set_axis(table.index).rename_axis("method")


def stranger_table(rows: DataFrame) -> DataFrame:
    """Each method's mean over the tasks that count, alone and with a stranger, and the difference."""
    wide = rows.pivot_table("mean", "method", "stranger", sort=False)
    out = {"alone": wide["nobody"]} if "nobody" in wide else {}
    for name in wide.columns.drop("nobody", errors="ignore"):
        out[f"with {name}"] = wide[name]
        if "nobody" in wide:
            out["difference"] = wide[name] - wide["nobody"]
    table = _in_order(DataFrame(out))
    return table.map(lambda v: "" if pd.isna(v) else f"{v:.1f}".replace("-", "−"))


def show_stranger(rows: DataFrame) -> str:
    return (
        f"{_how(rows)}Test split, %, mean over the tasks of {rows['group'].iloc[0]}, alone and with one more "
        "expert that has nothing to do with them. Its inputs are among those that closed forms look at; its "
        f"task counts for nothing, also where a method is tuned.\n\n{markdown(stranger_table(rows))}"
    )


def subset_table(rows: DataFrame) -> DataFrame:
    """By number of experts and in all: how often each method is better than the base, and its mean gain.

    Gains are over the best single expert on the same tasks, in points.
    """
    kinds = kind_of(rows["method"])
    means = rows.pivot_table("mean", ["n_experts", "group"], "method", sort=False)
    own = rows[kinds == "expert"]
    best = own.groupby(["n_experts", "group"])["mean"].max()
    methods = [m for m in METHODS.index if m in means and m not in ("base", OWN, BEST_EXPERT)]
    out = {}
    for n, part in [*means.groupby(level="n_experts"), ("all", means)]:
        for method in methods:
            scores = part[method].dropna()
            gain = (scores - best.reindex(scores.index)).mean()
            better = (scores > part["base"].reindex(scores.index)).mean()
            out[n, method] = {
                "subsets": str(len(scores)),
                "P(better than base), %": f"{100 * better:.0f}",
                "test split, %": spread(scores),
                "gain over the best expert": f"{gain:+.1f}".replace("-", "−"),
                "% of experts": spread(100 * scores / part[OWN].reindex(scores.index), False),
            }
    return DataFrame(out).T.rename_axis(["experts", "method"])


def show_subsets(rows: DataFrame) -> str:
    return (
        f"{_how(rows)}All sets of two to four experts; a merge is compared with the base (with the experts' "
        "heads) and with the best single expert, each on the tasks of the set. ± is the standard deviation "
        f"over sets, which hold different tasks.\n\n{markdown(subset_table(rows))}"
    )


def unseen_table(rows: DataFrame) -> DataFrame:
    """Accuracy in % of each model on each set."""
    wide = rows.pivot_table("mean", "method", "unseen", sort=False)
    order = list(dict.fromkeys(rows["method"]))
    return wide.reindex(order).map("{:.1f}".format)


def show_unseen(rows: DataFrame) -> str:
    return (
        f"{_how(rows)}Sets that no expert of {rows['group'].iloc[0]} saw: the class whose mean feature is "
        "nearest (cosine, means of the train split), accuracy on the test split, %. Nothing is fitted or "
        f"tuned.\n\n{markdown(unseen_table(rows))}"
    )


def inputs_table(rows: DataFrame) -> DataFrame:
    """By number of inputs: each method's mean on the reward and test split in %, and its seconds."""
    out = {}
    for method in (m for m in METHODS.index if m in set(rows["method"])):
        own = rows[rows["method"] == method].groupby("inputs")
        out[f"{method}, reward split"] = own["reward_split"].agg(spread)
        out[f"{method}, test split"] = own["mean"].agg(spread)
        out[f"{method}, seconds"] = own["seconds"].mean().map("{:.0f}".format)
    return DataFrame(out).rename_axis("inputs per task")


def show_inputs(rows: DataFrame) -> str:
    return (
        f"{_how(rows)}Closed forms on {rows['group'].iloc[0]}, %, by how many inputs of each task's train "
        f"split they look at; labels are not among them.\n\n{markdown(inputs_table(rows))}"
    )


def curve_table(rows: DataFrame) -> DataFrame:
    """By learning rate: distance from the base in % of its norm, and each method's mean."""
    wide = rows.pivot_table("mean", "learning_rate", "method", sort=False)
    wide = wide[[m for m in METHODS.index if m in wide]]
    far = rows.groupby("learning_rate")["distance"].first()
    lost = (wide[OWN] - wide[AVERAGE]).map("{:.1f}".format)
    table = wide.map("{:.1f}".format).assign(**{"averaging loses": lost})
    table.insert(0, "distance, %", far.map("{:.2f}".format))
    return table.set_axis([f"{rate:g}" for rate in table.index]).rename_axis("learning rate")


def show_curve(rows: DataFrame) -> str:
    return (
        f"![What merging loses against the distance from the base](curve.png)\n\n{_how(rows)}Test split, %, "
        "of experts that were fine-tuned at different learning rates, half the steps of the other tables. "
        "*Distance*: |expert − base| / |base| over all merged weights, mean over "
        f"experts.\n\n{markdown(curve_table(rows))}"
    )


def draw_curve(rows: DataFrame) -> Figure:
    """What each merge loses against the experts, over their distance from the base."""
    figure, [axes] = panels(1, 1, 6.0, 3.6)
    wide = rows.pivot_table("mean", "distance", "method", sort=False).sort_index()
    for i, method in enumerate(m for m in METHODS.index if m in wide and m in RULES):
        axes.plot(wide.index, wide[OWN] - wide[method], label=method, **line_look(i))
    axes.set_xscale("log")
    tidy(axes, "", "distance of the experts from the base, % of its norm", "points lost", "y")
    axes.legend(fontsize=8)
    return figure


def texts_table(rows: DataFrame) -> DataFrame:
    """Tasks, mean, seconds and memory of each model."""
    table = task_scores(rows).assign(mean=rows["mean"]).map("{:.1f}".format)
    table["seconds"] = [seconds_text(rows.loc[[i], "seconds"]) for i in rows.index]
    table["peak MB"] = rows["peak_mb"].map("{:.0f}".format)
    return table.set_axis(rows["method"].rename("method"))


def show_texts(rows: DataFrame) -> str:
    n = rows.loc[rows["method"].isin(SEARCHED), "evaluations"]
    return (
        f"{_how(rows)}Test split, %. The search has {n.iloc[0] if len(n) else 0} evaluations. Memory is the "
        f"most that the process had so far, with torch and all models.\n\n{markdown(texts_table(rows))}"
    )


def speed_table(rows: DataFrame) -> DataFrame:
    """Seconds, those of the processor and inside the models, their share, and memory, of each stage."""
    table = rows.set_index("method")[["seconds", "cpu", "inside", "share", "peak_mb"]]
    for name in ("seconds", "cpu", "inside", "peak_mb"):
        table[name] = table[name].map(("{:.0f}" if name == "peak_mb" else "{:.1f}").format)
    names = ["seconds", "processor's", "inside the models", "share", "peak MB"]
    return table.set_axis(names, axis=1).rename_axis("stage")


def show_speed(rows: DataFrame) -> str:
    return (
        f"{_how(rows)}One merge of {rows['group'].iloc[0]}, in a process of its own. *Processor's*: its "
        "seconds over all threads; *share*: of these inside the models. Memory is the most so far, with "
        f"torch.\n\n{markdown(speed_table(rows))}"
    )


# A page's name, which is also its table's -> its title and what it shows.
REAL_PAGES: dict[str, tuple[str, Callable[[DataFrame], str]]] = {
    "stranger": ("An expert that has nothing to do with the tasks", show_stranger),
    "subsets": ("Two to four experts: all sets of them", show_subsets),
    "unseen": ("Sets that no expert saw", show_unseen),
    "inputs": ("How many inputs closed forms need", show_inputs),
    "curve": ("What averaging loses, by the experts' distance from the base", show_curve),
    "texts": ("A real language model", show_texts),
    "speed": ("Seconds and memory of a merge", show_speed),
}
