"""The final choice of a search, on the whole reward split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rmm_lab.errors import InputError
from rmm_lab.reward import Path, parse_path, path_text, reward


def scores(
    scorer: Any, wanted: Sequence[tuple[Path, int | None]], *, in_turn: bool = False
) -> list[np.ndarray]:
    """Each task's score (N,) in [0, 1] of each path on its subset, None for the whole split, by all workers
    at once. in_turn: where they share merged layers, a path has its scores before the next one's are merged.
    """
    if hasattr(scorer, "prefetch") and not (in_turn and scorer.shares_layers):  # not by a formula
        scorer.prefetch(wanted)
    return [scorer.score(path, subset) for path, subset in wanted]


def rewards(scorer: Any, wanted: Sequence[tuple[Path, int | None]]) -> list[float]:
    """The reward in [0, 1] of each path on its subset, see ``scores``."""
    return [reward(own) for own in scores(scorer, wanted)]


def rounds(evaluations: int, n_sources: int, n_subsets: int) -> int:
    """On how many subsets a search first scores the uniform path of each source: for a tenth of its
    evaluations, on one at least, and on each once at most."""
    return max(1, min(n_subsets, evaluations // (10 * n_sources)))


def legal(episodes: Iterable[Mapping[str, Any]]) -> list[tuple[str, float]]:
    """(path as text, reward) of a log's legal episodes."""
    return [(e["path"], e["raw_reward"]) for e in episodes if not e["penalised"]]


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


def candidates(
    scored: Iterable[tuple[str, float]], n: int, answers: Iterable[Path] = ()
) -> dict[Path, str]:
    """Up to n paths to choose from: a search's ``answers``, such as CMA-ES's means, then the shortlist.

    Answers take at most three quarters of the places. Returns path -> how it came about, ``scales`` or
    ``best``.
    """
    own = list(dict.fromkeys(answers))[: n - n // 4]
    found = dict.fromkeys([*own, *map(parse_path, shortlist(scored, n))])
    return {path: "scales" if path in own else "best" for path in list(found)[:n]}


def rank(
    scorer: Any,
    candidates: Mapping[Path, str],
    worth: Callable[[np.ndarray], float] | None = None,
) -> list[dict[str, Any]]:
    """Score candidates on the whole reward split, the best first: path, found (how), reward.

    worth: what scores (N,) are worth to a user; then it ranks them, in place of the reward, and is a column.
    The test split is not used. Raises InputError where there is no candidate.
    """
    if not candidates:
        raise InputError(
            "search: expected at least one legal episode, found none; raise --episodes or use "
            "--mask-actions"
        )
    found = scores(scorer, [(path, None) for path in candidates])
    rows = [
        {"path": path, "found": how, "reward": reward(own)}
        | ({"worth": worth(own)} if worth else {})
        for (path, how), own in zip(candidates.items(), found, strict=True)
    ]
    by = "worth" if worth else "reward"
    return sorted(rows, key=lambda r: (-r[by], len(r["path"]), path_text(r["path"])))
