"""Students' answers, given as text: what all these tests share."""

from __future__ import annotations

import inspect
import math
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def function_of(text: str) -> Callable[..., Any]:
    """The last function that a text defines, with the names that the notebooks import."""
    space: dict[str, Any] = {"np": np, "torch": torch, "math": math, "defaultdict": defaultdict}
    known = set(space)
    exec(text, space)
    return [v for k, v in space.items() if k not in known and inspect.isfunction(v)][-1]


def answers(text: str) -> tuple[list[tuple[str, str, str]], list[tuple[str, str]]]:
    """Wrong answers (exercise, code, a phrase of the verdict), and right ones (exercise, code).

    ``## 05.returns`` stands before the lines that its answers have in common, ``# the phrase`` or
    ``# correct`` before the rest of each.
    """
    wrong, right = [], []
    for section in re.split(r"^## ", text, flags=re.M)[1:]:
        start, *parts = re.split(r"^# (.+)\n", section, flags=re.M)
        name, head = start.split("\n", 1)
        for phrase, rest in zip(parts[::2], parts[1::2], strict=True):
            if phrase == "correct":
                right.append((name, head + rest))
            else:
                wrong.append((name, head + rest, phrase))
    return wrong, right
