"""The checks of notebook 00 against wrong and right answers, its tables against the code, its picture."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.patches import Rectangle
from matplotlib.text import Annotation

from rmm_lab.course import notebooks as course
from rmm_lab.errors import InputError
from rmm_lab.figures import models as pictures
from rmm_lab.reward import Step, parse_path

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "solved" / "00_start_here.ipynb"


REWARD, BOUND = "00.predict_reward", "00.upper_bound"
WRONG = [
    (
        REWARD,
        "def f(scores):\n    total = 0\n    for s in scores:\n        total += s\n    return total",
        "sum",
    ),
    (REWARD, "def f(scores):\n    return sorted(scores)[-1]", "best task"),
    (REWARD, "def f(scores):\n    return sorted(scores)[0]", "worst task"),
    (
        REWARD,
        "def f(scores):\n    p = 1.0\n    for s in scores:\n        p = p * s\n    return p",
        "product",
    ),
    (REWARD, "def f(scores):\n    return (scores[0] + scores[1]) / 2", "first two tasks"),
    (REWARD, "def f(scores):\n    return sum(scores) / 2", "divide by 2"),
    (REWARD, "def f(scores):\n    return sum(100 * s for s in scores) / len(scores)", "not to 100"),
    (REWARD, "def f(scores):\n    return np.quantile(scores, 0.5)", "median"),
    # None of the mistakes on the list: general messages.
    (REWARD, "def f(scores):\n    np.mean(scores)", "returns None"),
    (REWARD, "def f(scores):\n    return scores / len(scores)", "expected shape ()"),
    (REWARD, "def f(scores):\n    return np.sqrt(np.mean(scores**2))", "expected 0.65, found"),
    (REWARD, "def f(scores):\n    return scores.average()", "AttributeError"),
    (REWARD, "def f(scores):\n    scores /= len(scores)\n    return scores.sum()", "in place"),
    (REWARD, "def f():\n    return 0.5", "TypeError"),
    (BOUND, "def f():\n    return 'a'", "lower bound"),
    (BOUND, "def f():\n    return 'c'", "simplest one"),
    (BOUND, "def f():\n    return 'd'", "poor at the others"),
    (BOUND, "def f():\n    return 'e'", "'a', 'b', 'c', 'd'"),
]
RIGHT = [
    (REWARD, "def f(scores):\n    return sum(scores) / len(scores)"),
    (
        REWARD,
        "def f(scores):\n    r = 0.0\n    for s in scores:\n        r += float(s) / len(scores)\n"
        "    return r",
    ),
    (REWARD, "def f(scores):\n    return np.average(scores.astype(np.float32))"),
    (REWARD, "import torch\ndef f(scores):\n    return torch.from_numpy(scores).mean()"),
    (BOUND, "def f():\n    return ' B '"),
]


# --------------------------------------------------------------------------------- the table of symbols

OWNERS = {  # where the classes and functions of the table live
    "LayerPool": "layers",
    "OperatorSpec": "operators",
    "Task": "tasks.image_task",
    "MergingEnv": "env",
    "LayerPath": "path",
    "Agent": "ppo",
    "Rollout": "ppo",
    "Args": "ppo",
    "RunArgs": "search.config",
}


def symbols() -> list[list[str]]:
    """The rows of the table of symbols, cell by cell."""
    (text,) = [c.source for c in course.read(NOTEBOOK).cells if c.id == "map-symbols"]
    rows = [r.strip("|").split("|") for r in text.split("\n") if r.startswith("| $")]
    return [[cell.strip() for cell in row] for row in rows]


def test_every_symbol_has_a_meaning_a_shape_and_a_name() -> None:
    rows = symbols()
    assert len(rows) >= 20
    assert all(len(row) == 4 and all(row) for row in rows)
    names = [row[0] for row in rows]
    assert len(set(names)) == len(names)


def test_the_names_of_the_table_exist() -> None:
    """``Class.attribute`` is set or defined in that class, ``module.function`` in that module."""
    for symbol, _, _, cell in symbols():
        found = re.fullmatch(r"`(\w+)(?:\.(\w+))?`", cell)
        assert found, symbol
        owner, attribute = found.groups()
        if owner not in OWNERS:
            assert callable(getattr(importlib.import_module(f"rmm_lab.{owner}"), attribute)), symbol
            continue
        kind = getattr(importlib.import_module(f"rmm_lab.{OWNERS[owner]}"), owner)
        if attribute is not None and not hasattr(kind, attribute):
            source = inspect.getsource(kind)
            assigned = rf"self\.(?:\w+, self\.)*{attribute}\b[^=\n]*=|^    {attribute}:"
            assert re.search(assigned, source, re.M), f"{symbol}: {owner} has no {attribute}"


# ------------------------------------------------------------------------------------------ the picture


def test_a_source_that_has_no_column_is_refused() -> None:
    with pytest.raises(InputError, match="expected one of a, b"):
        pictures.rmm_picture(parse_path("b@0 mean@1 a@1"), ("a", "b"), (), 2)


def test_the_picture_has_a_box_for_each_layer_and_each_step() -> None:
    figure = pictures.rmm_picture(parse_path("a@0 mean@1 b@2"), ("a", "b"), ("mean",), 3)
    (axes,) = figure.axes
    assert len([p for p in axes.patches if isinstance(p, Rectangle)]) == 3 * 3 + 3
    texts = [t.get_text() for t in axes.texts]
    stack = [t for t in texts if re.fullmatch(r"\w+, layer \d", t)]
    assert stack == ["a, layer 0", "mean, layer 1", "b, layer 2"]  # in running order, upwards
    ends = [(t.xyann, t.xy) for t in axes.texts if isinstance(t, Annotation)][:2]
    np.testing.assert_allclose(ends, [[(0, 0.34), (3.2, 0.66)], [(3.2, 1.34), (1.6, 1.66)]])
    assert min(t.get_fontsize() for t in axes.texts) >= 8


# --------------------------------------------------------------------------------- what its prose claims


def test_half_of_each_expert_is_worse_than_either_and_the_average_better() -> None:
    from rmm_lab.search.problem import load_problem

    scorer = load_problem(("demo",), operators=("weight_average",)).scorer(fraction=0.1, seed=0)

    def score(sources: list[str]) -> Any:
        return scorer.score(tuple(Step(s, k) for k, s in enumerate(sources, start=-1)), subset=0)

    digits, textures, average = (score([s] * 7) for s in scorer.sources)
    halves = score(["digits"] * 4 + ["textures"] * 3)
    assert halves.mean() < min(digits.mean(), textures.mean()) < average.mean()
    assert halves[0] < digits[0]
    assert abs(halves[1] - digits[1]) < 0.05
