"""Beat the agent: a walk whose ends are kept in a file of high scores, beside what rivals reach."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets
import numpy as np

from rmm_lab.course.episode_walk import Walk
from rmm_lab.course.widgets import MapStepper
from rmm_lab.errors import InputError
from rmm_lab.reward import PathScorer, Step, path_text, places_of, reward
from rmm_lab.tasks.files import write_file

BEST = 5  # own tries in the list


class HighScores:
    """One's own tries, in a JSON file: path as text -> reward in [0, 1].

    Written at each try, read at the start; InputError where the file holds something else.
    """

    def __init__(self, file: str | Path) -> None:
        self.file, self.tries = Path(file), {}
        if self.file.exists():
            try:
                found = json.loads(self.file.read_text("utf-8"))
                self.tries = {str(path): float(value) for path, value in found.items()}
            except (ValueError, TypeError, AttributeError) as error:
                raise InputError(
                    f"high scores {self.file}: expected paths and rewards as JSON, found something else; "
                    "delete the file"
                ) from error

    def add(self, path: str, value: float) -> None:
        """Keep a try; the same path twice is one."""
        self.tries[path] = value
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_file(self.file, json.dumps(self.tries, indent=1) + "\n")

    def best(self, n: int = BEST) -> list[tuple[str, float]]:
        """The n best tries, the best first; of equal ones the earlier."""
        return sorted(self.tries.items(), key=lambda item: -item[1])[:n]

    def hand_in(self, file: str | Path) -> None:
        """Write the best path as text, for the class's leaderboard. InputError before the first try."""
        if not self.tries:
            raise InputError("high scores: expected a try to hand in, found none; play first")
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        write_file(Path(file), self.best(1)[0][0] + "\n")


def random_rewards(scorer: PathScorer, n: int, seed: int = 0) -> list[float]:
    """Rewards of n random paths, each place from a random source, on the scorer's whole split."""
    rng = np.random.default_rng(seed)
    paths = [
        tuple(Step(scorer.sources[rng.integers(len(scorer.sources))], k) for k in places_of(scorer))
        for _ in range(n)
    ]
    return [reward(scorer.score(path)) for path in paths]


def everywhere(scorer: PathScorer, source: str) -> float:
    """The reward of one source at all places, on the scorer's whole split."""
    return reward(scorer.score(tuple(Step(source, k) for k in places_of(scorer))))


class Beat(MapStepper):
    """A ``MapStepper`` without an agent: each end is kept, and a list ranks own tries among rivals.

    rivals: name -> reward in [0, 1], measured on the same examples as the walk's end.
    """

    def __init__(self, walk: Walk, rivals: Mapping[str, float], scores: HighScores) -> None:
        self.rivals, self.scores = dict(rivals), scores
        self.ranks = ipywidgets.HTML()
        super().__init__(walk)
        self.children = (*self.rows, self.ranks, self.status, self.place)

    def ranking(self) -> list[tuple[str, float, str]]:
        """(who, reward, path) of rivals and the own best tries, the best first; a rival wins a tie."""
        own = [("you", value, path) for path, value in self.scores.best()]
        rows = [(name, value, "") for name, value in self.rivals.items()] + own
        return sorted(rows, key=lambda row: -round(row[1], 9))

    def refresh(self, change: Any = None) -> None:
        """Keep a try that has ended, then draw."""
        walk = self.walk
        if walk.done and not walk.penalised and walk.reward is not None and walk.env.path:
            path = path_text(walk.env.path)
            if path not in self.scores.tries:
                self.scores.add(path, walk.reward)
        super().refresh(change)
        items, pad = "", "margin: 0 2em 0 0; white-space: nowrap"
        for place, (who, value, path) in enumerate(self.ranking(), 1):
            own = f'; font-weight: bold" title="{escape(path)}' if who == "you" else ""
            text = f"{place}. {escape(who)} {100 * value:.1f} %"
            items += f'<li style="display: inline-block; {pad}{own}">{text}</li>'
        self.ranks.value = f'Reward (reward split): <ol style="padding: 0; margin: 0">{items}</ol>'
