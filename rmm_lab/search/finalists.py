"""The final choice of a search, on the whole reward split."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from rmm_lab.errors import InputError
from rmm_lab.reward import Path, parse_path, path_text, reward


def shortlist(scored: Iterable[tuple[str, float]], n: int) -> list[str]:
    """The n paths with the best mean reward over their evaluations, the best first.

    ``scored``: (path as text, reward), one for each evaluation on a subset. Means are shrunk towards the
    mean of all, as if two more evaluations had given that, so that one lucky subset does not win.
    """
    seen: dict[str, list[float]] = {}
    for path, value in scored:
        seen.setdefault(path, []).append(value)
    every = [value for values in seen.values() for value in values]
    prior = float(np.mean(every)) if every else 0.0
    return sorted(seen, key=lambda p: (-(sum(seen[p]) + 2 * prior) / (len(seen[p]) + 2), p))[:n]


def candidates_of(
    episodes: Iterable[Mapping[str, Any]], answers: Iterable[Path], n: int
) -> dict[Path, str]:
    """Up to n paths to choose from: ``answers`` (the means of CMA-ES) first, then the shortlist.

    Returns path -> how it came about, ``scales`` or ``best``.
    """
    found = dict.fromkeys(answers, "scales")
    legal = [(e["path"], e["raw_reward"]) for e in episodes if not e["penalised"]]
    for text in shortlist(legal, n):
        if len(found) < n:
            found.setdefault(parse_path(text), "best")
    return found


def rank(scorer: Any, candidates: Mapping[Path, str]) -> list[dict[str, Any]]:
    """Score candidates on the whole reward split, the best first: path, found (how), reward.

    The test split is not used. Raises InputError where there is no candidate.
    """
    if not candidates:
        raise InputError(
            "search: expected at least one legal episode, found none; raise --episodes or use "
            "--mask-actions"
        )
    if hasattr(scorer, "prefetch"):
        scorer.prefetch([(path, None) for path in candidates])
    rows = [
        {"path": path, "found": how, "reward": reward(scorer.score(path, None))}
        for path, how in candidates.items()
    ]
    return sorted(rows, key=lambda r: (-r["reward"], len(r["path"]), path_text(r["path"])))
