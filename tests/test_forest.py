"""The forest plots beside the tables of methods: what is drawn against pandas and scipy on the rows."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text
from scipy import stats
from test_tables import RESULTS, page, read, result

from rmm_lab.evidence import page_figures, pages, rows
from rmm_lab.evidence.forest import LINES, chosen, forest
from rmm_lab.evidence.rows import BEST_EXPERT, METHODS, STOCHASTIC
from rmm_lab.figures.results import forest_picture

PICTURES = {"table-I": "halves", "table-II": "vision", "groups": "vision", "table-III": "language"}
ALL = [*PICTURES.items(), ("table-II", "demo/vision"), ("table-II", "fresh/vision")]


def names_of(figure) -> list[str]:
    """The methods of all panels, from the top down; the first panel of a line of panels names them."""
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def drawn(axes, names: list[str]) -> pd.DataFrame:
    """What a panel shows: index method, columns mean, low, high, marker, colour; lines stand aside."""
    found = {}
    for container in axes.containers:
        line, _, (bars,) = container.lines
        segments = bars.get_segments()
        for x, y, segment in zip(line.get_xdata(), line.get_ydata(), segments, strict=True):
            assert names[int(y)] not in found
            low, high = segment[:, 0] if len(segment) else (np.nan, np.nan)
            found[names[int(y)]] = (x, low, high, line.get_marker(), line.get_color())
    frame = pd.DataFrame(found, ["mean", "low", "high", "marker", "colour"]).T
    assert set(frame.index) == set(names)
    return frame.loc[names].astype({"mean": float, "low": float, "high": float})


def axes_says(axes, y: int) -> str:
    """What is written in a row."""
    return " ".join(text.get_text() for text in axes.texts if text.get_position()[1] == y)


def uprights(axes) -> dict[str, float]:
    """The vertical lines: name -> where."""
    return {x.get_label(): x.get_xdata()[0] for x in axes.lines if x.get_label() in LINES.values()}


def rows_and_figure(name: str, file: str):
    """The rows that a page shows, and its figure."""
    table = read(RESULTS, file)
    return pages.pair_of(table) if name == "table-II" else table, page_figures.DRAW[name](table)


@pytest.mark.parametrize(("name", "file"), ALL)
def test_points_are_means_and_bars_intervals(name, file):
    table, figure = rows_and_figure(name, file)
    panels = {axes.get_title(): axes for axes in figure.axes}
    groups = table.groupby(["size", "group"])
    assert len(panels) == len(groups)
    for (size, group), own in groups:
        axes = panels[group if group in panels else f"{size}: {group}"]
        shown, by_method = drawn(axes, names_of(figure)), own.groupby("method")["mean"]
        for method, row in shown.drop(BEST_EXPERT, errors="ignore").iterrows():
            if method not in by_method.groups:
                assert np.isnan(row["mean"])
                assert axes_says(axes, names_of(figure).index(str(method))) == "not measured"
                continue
            values = by_method.get_group(method)
            assert row["mean"] == pytest.approx(values.mean())
            if method in STOCHASTIC and len(values) > 1:
                low, high = (
                    stats.t.interval(0.95, len(values) - 1, values.mean(), values.sem())
                    if values.std()
                    else (values.mean(), values.mean())
                )
                assert (row["low"], row["high"]) == pytest.approx((low, high))
            else:
                assert np.isnan([row["low"], row["high"]]).all()
        alone = by_method.mean()[lambda means: means.index.str.startswith("expert ")]
        assert shown.at[BEST_EXPERT, "mean"] == pytest.approx(alone.max())
        bounds = {name: by_method.mean().get(method) for method, name in LINES.items()}
        assert uprights(axes) == {n: pytest.approx(x) for n, x in bounds.items() if x is not None}


@pytest.mark.parametrize(("name", "file"), ALL)
def test_every_method_is_a_row_a_line_or_counted(name, file):
    table, figure = rows_and_figure(name, file)
    kinds = rows.kind_of(table["method"])
    methods = {*table["method"][kinds != "expert"], BEST_EXPERT} - set(LINES)
    first = names_of(figure)
    assert len(first) == len(set(first)) == min(len(methods), 16)
    assert set(first) <= methods
    assert "agent + CMA-ES" in first
    left_out = re.findall(r"(\d+) more", figure._supxlabel.get_text())  # type: ignore[attr-defined]
    assert left_out == ([str(len(methods) - 16)] if len(methods) > 16 else [])
    # By what they see, then in the order of the tables.
    sees = dict(zip(table["method"], table["sees"], strict=True)) | {BEST_EXPERT: "nothing"}
    order = ["nothing", "inputs", "labels", "gradients"]
    key = [(order.index(sees[m]), METHODS.index.get_loc(m)) for m in first]
    assert key == sorted(key)
    for axes in figure.axes:
        looks = drawn(axes, first).assign(sees=[sees[m] for m in first]).groupby("sees")
        for look in ("marker", "colour"):  # each alone tells the kinds apart
            assert looks[look].nunique().eq(1).all()
            assert looks[look].first().is_unique


@pytest.mark.parametrize(("name", "file"), PICTURES.items())
def test_a_forest_can_be_read_where_it_is_shown(name, file):
    figure = page_figures.DRAW[name](read(RESULTS, file))
    figure.draw_without_rendering()
    texts = [t for t in figure.findobj(Text) if t.get_text() and t.get_visible()]
    assert min(t.get_fontsize() for t in texts) >= 9
    assert figure.get_figwidth() * 100 <= 1366  # notebooks show 100 pixels an inch
    assert "accuracy, %, mean over tasks" in [t.get_text().partition("\n")[0] for t in texts]
    whole = figure.bbox
    ticks = [label for axes in figure.axes for label in axes.get_xticklabels()]
    for text in set(texts) - set(ticks):  # none is cut off
        box = text.get_window_extent()
        assert whole.x0 <= box.x0 <= box.x1 <= whole.x1, text.get_text()
    for axes in figure.axes:  # rows do not touch
        boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
        for upper, lower in pairwise(boxes):
            assert upper.y0 >= lower.y1 - 1


def test_a_forest_by_hand():
    scores = {
        "expert p": (40, 40),
        "expert q": (45, 45),
        "fine-tuned": (99, 99),
        "weight average": (55, 55),
        "TIES, tuned": (60, 60),
        "DARE, tuned": (50, 40),
        "agent + CMA-ES": (68, 70),
    }
    few = pd.DataFrame(
        result("a", seed, method, mean)
        for method, means in scores.items()
        for seed, mean in enumerate(means)
    )
    shown = forest(few)
    methods = [BEST_EXPERT, "weight average", "TIES, tuned", "DARE, tuned", "agent + CMA-ES"]
    a = shown.points["a"]
    assert a.index.to_list() == methods
    assert a["mean"].to_list() == [45, 55, 60, 45, 69]
    # 12.706 sd / sqrt(2), with sd = 5 sqrt(2) and sqrt(2).
    half = [np.nan, np.nan, np.nan, 63.531, 12.706]
    assert a["half"].to_list() == pytest.approx(half, abs=0.001, nan_ok=True)
    assert shown.lines == {"a": {"experts, own tasks": 99}}
    assert shown.left_out == 0
    assert "more" not in shown.caption
    said = "Forest plot: mean accuracy of 5 methods. a: best agent + CMA-ES 69.0, "
    assert shown.alt == said + "experts, own tasks 99.0."
    begun = pd.DataFrame([result("b", 0, "base", 20), *few.to_dict("records")])
    assert forest(begun).alt.startswith(
        "Forest plot: mean accuracy of 5 methods. b: base 20.0. a: "
    )
    one = forest(few[few["seed"] == 1]).points["a"]
    assert one["half"].isna().all()
    assert one.at["agent + CMA-ES", "mean"] == 70
    fewer = forest(few, most=3)
    assert fewer.left_out == 2
    assert "the page's table has 2 more" in fewer.caption
    assert "of 3 methods of 5." in fewer.alt


def test_kinds_take_turns_and_searches_come_first():
    means = {
        ("weight average", "nothing"): (50, 60),  # rank 4 of 8 in a, 4 of 7 in b
        ("TIES", "nothing"): (60, 40),  # 5 of 8, 3 of 7
        ("DARE", "nothing"): (10, 10),
        ("RegMean", "inputs"): (70, 70),
        ("TSV", "labels"): (75, None),  # 7 of 8
        ("WUDI", "labels"): (80, 80),  # the best of both
        ("DOGE", "labels"): (20, 79),  # 3 of 8, 6 of 7
        ("agent + CMA-ES", "labels"): (5, 5),
    }
    table = pd.DataFrame(
        result(group, 1, method, values[i], sees=sees)
        for i, group in enumerate("ab")
        for (method, sees), values in means.items()
        if values[i] is not None
    )
    turns = ["agent + CMA-ES", "RegMean", "weight average", "WUDI", "TIES", "TSV", "DARE", "DOGE"]
    for n in range(1, 9):
        assert set(chosen(table, n).index) == set(turns[:n])
    assert chosen(table, 8)["sees"].to_dict() == {method: sees for method, sees in means}
    assert chosen(table, 8).index.to_list() == [method for method, _ in means]


def test_kinds_differ_by_marker_and_by_colour():
    sees = ["nothing", "inputs", "labels", "gradients"]
    frame = pd.DataFrame({"sees": sees, "mean": 50.0, "half": [1.0, np.nan] * 2}, list("abcd"))
    lines = {"p": {"one": 10.0, "two": 20.0, "three": 30.0}}
    figure = forest_picture({"p": frame}, lines, "x", "")
    found = drawn(figure.axes[0], list("abcd"))
    assert found["marker"].is_unique
    assert found["colour"].is_unique
    assert found["low"].to_list() == pytest.approx([49, np.nan] * 2, nan_ok=True)
    styles = [x.get_linestyle() for x in figure.axes[0].lines if x.get_label() in lines["p"]]
    assert len(set(styles)) == 3
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == [*(f"sees {s}" for s in sees), "one", "two", "three"]


@pytest.mark.parametrize(("name", "file"), ALL)
def test_pages_show_their_picture_with_words(name, file):
    text = (RESULTS / file.rpartition("/")[0] / f"{name}.md").read_text("utf-8")
    ((alt, picture),) = re.findall(r"!\[(.+)\]\((.+)\)", text)
    assert picture == f"{name}.png"
    assert (RESULTS / file.rpartition("/")[0] / picture).is_file()
    table = read(RESULTS, file)
    table = pages.pair_of(table) if name == "table-II" else table
    assert alt == forest(table).alt
    assert page(name, read(RESULTS, file)).count("![") == 1
