"""Exercises of notebook 03: what an action does, which are legal, what back undoes, how many paths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from rmm_lab.course.checks import Exercise, Mistake, Quiz
from rmm_lab.env import MergingEnv


@dataclass
class _Free:
    """A ``PathScorer`` without models: the environment's rules need none."""

    n_sources: int
    n_layers: int
    stacks: Sequence[range]
    n_models = 1
    n_subsets = 1
    chooses_stem = False

    def __post_init__(self) -> None:
        self.sources = tuple(str(a) for a in range(self.n_sources))
        self.task_names = ["none"]

    def score(self, path: Any, subset: int | None = None) -> np.ndarray:
        """The same for every path."""
        return np.ones(1)


# ------------------------------------------------------------------------------------ apply_action


def _by_env(merging_map: np.ndarray, layer: int, action: int) -> tuple[np.ndarray, int]:
    """The kit's environment, put into the state and stepped once."""
    n_sources, n_layers = merging_map.shape
    env = MergingEnv(_Free(n_sources, n_layers, [range(n_layers)]))
    env.reset()
    env.merging_map, env.layer = merging_map.copy(), layer
    env.step(action)
    return env.merging_map, env.layer


def _action_cases() -> list[tuple[Any, ...]]:
    empty = np.zeros((3, 4), np.float32)
    later = np.array([[1, 0, 0, 0], [0, 2, 0, 1], [0, 1, 1, 0]], np.float32)
    five = np.array([[0, 1, 0], [1, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 0]], np.float32)
    return [
        (empty, 0, 1),  # a source at the start
        (later, 1, 1),  # a source that was taken there before
        (later, 3, 0),  # the last layer
        (later, 2, 3),  # skip
        (later, 2, 4),  # back
        (later, 3, 4),  # back to a layer of which the last choice is not the first row
        (five, 1, 3),  # five sources, so that 3 is one of them
    ]


def _three_sources(merging_map: np.ndarray, layer: int, action: int) -> tuple[np.ndarray, int]:
    new = merging_map.copy()
    if action < 3:
        new[action, layer] += 1
    return new, layer - 1 if action == 4 else layer + 1


ApplyAction = Callable[[np.ndarray, int, int], Any]


def _variant(
    source: Callable[[np.ndarray, int, int], None], move: Callable[[int, int], int]
) -> ApplyAction:
    """A wrong ``apply_action``: ``source`` changes the copied map, ``move`` gives the next layer.

    ``source`` takes (map, layer, kind), ``move`` (kind, layer); kind is the number of a source, -1 for
    skip, -2 for back.
    """

    def step(merging_map: np.ndarray, layer: int, action: int) -> tuple[np.ndarray, int]:
        new, n = merging_map.copy(), len(merging_map)
        kind = action if action < n else n - 1 - action
        source(new, layer, kind)
        return new, move(kind, layer)

    return step


def _add(new: np.ndarray, layer: int, kind: int) -> None:
    if kind >= 0:
        new[kind, layer] += 1


def _go(kind: int, layer: int) -> int:
    return layer - 1 if kind == -2 else layer + 1


def _back_removes(new: np.ndarray, layer: int, kind: int) -> None:
    _add(new, layer, kind)
    if kind == -2:
        new[:, layer - 1] = 0


def _back_takes_one(new: np.ndarray, layer: int, kind: int) -> None:
    _add(new, layer, kind)
    if kind == -2:
        new[:, layer - 1] = np.maximum(new[:, layer - 1] - 1, 0)


def _back_takes_one_off_each(new: np.ndarray, layer: int, kind: int) -> None:
    _add(new, layer, kind)
    if kind == -2:
        new[:, layer - 1] -= 1


def _back_takes_one_here(new: np.ndarray, layer: int, kind: int) -> None:
    _add(new, layer, kind)
    if kind == -2:
        new[:, layer] = np.maximum(new[:, layer] - 1, 0)


def _back_clears(new: np.ndarray, layer: int, kind: int) -> None:
    _add(new, layer, kind)
    if kind == -2:
        new[:, layer] = 0


def _skip_counts(new: np.ndarray, layer: int, kind: int) -> None:
    new[kind if kind >= 0 else -1, layer] += 1


def _sets(new: np.ndarray, layer: int, kind: int) -> None:
    if kind >= 0:
        new[kind, layer] = 1


def _column_after(new: np.ndarray, layer: int, kind: int) -> None:
    if kind >= 0:
        new[kind, (layer + 1) % new.shape[1]] += 1


def _replaces(new: np.ndarray, layer: int, kind: int) -> None:
    if kind >= 0:
        new[:, layer] = 0
        new[kind, layer] = 1


BACK_HINT = (
    "Your back removes an entry. Back undoes nothing: the appended layer stays, and so does the map. "
    "Only the position changes."
)
APPLY_ACTION = Exercise(
    reference=_by_env,
    cases=_action_cases,
    mistakes=[
        Mistake(BACK_HINT, _variant(_back_removes, _go)),
        Mistake(BACK_HINT, _variant(_back_takes_one, _go)),
        Mistake(BACK_HINT, _variant(_back_takes_one_off_each, _go)),
        Mistake(BACK_HINT, _variant(_back_takes_one_here, _go)),
        Mistake(BACK_HINT, _variant(_back_clears, _go)),
        Mistake(
            "You assume three sources: len(merging_map) says how many there are.", _three_sources
        ),
        Mistake(
            "Your skip and back change the map. They append no layer, so nothing is counted.",
            _variant(_skip_counts, _go),
        ),
        Mistake(
            "Your agent stays where it is after taking a source. Model and merging actions also advance to "
            "the next layer.",
            _variant(_add, lambda kind, layer: layer if kind >= 0 else _go(kind, layer)),
        ),
        Mistake(
            "You count the choice in the next layer's column. Count first, then move.",
            _variant(_column_after, _go),
        ),
        Mistake(
            "You set the entry to 1. A source taken twice at a layer counts 2: Eq. 5 adds.",
            _variant(_sets, _go),
        ),
        Mistake(
            "You clear the column before you count the choice. Layers stack: what was taken there before "
            "stays.",
            _variant(_replaces, _go),
        ),
        Mistake(
            "Skip and back are swapped: the actions come in the order models, operators, skip, back.",
            _variant(_add, lambda kind, layer: layer - 1 if kind == -1 else layer + 1),
        ),
        Mistake(
            "Your skip jumps over two layers. It leaves out the current layer: the next one is k + 1.",
            _variant(_add, lambda kind, layer: layer + 2 if kind == -1 else _go(kind, layer)),
        ),
        Mistake(
            "Your skip does not advance. It leaves out the current layer, and the next one is k + 1.",
            _variant(_add, lambda kind, layer: layer if kind == -1 else _go(kind, layer)),
        ),
        Mistake(
            "Your back does not move. It returns to the layer before: k - 1.",
            _variant(_add, lambda kind, layer: layer if kind == -2 else _go(kind, layer)),
        ),
        Mistake(
            "The map is right; the new layer is missing. Return both: new_map, new_layer.",
            lambda merging_map, layer, action: _by_env(merging_map, layer, action)[0],
        ),
    ],
    right="A source changes the map and the position, skip and back the position alone.",
)

# ------------------------------------------------------------------------------------------- legal


def _legal_by_env(n_sources: int, layer: int, starts: Sequence[int], full: bool) -> np.ndarray:
    """The kit's environment, put at the layer; full: the model has as many layers as it may have."""
    n_layers = 8
    edges = [*sorted(starts), n_layers]
    stacks = [range(a, b) for a, b in pairwise(edges)]
    env = MergingEnv(_Free(n_sources, n_layers, stacks))
    env.reset()
    env.layer, env.depth = layer, env.max_depth if full else 0
    return env.action_mask()


def _legal_cases() -> list[tuple[Any, ...]]:
    return [
        (3, 0, (0,), False),
        (3, 1, (0,), False),
        (3, 2, (0,), False),
        (2, 4, (0, 4), False),  # the first block of a T5's decoder
        (3, 2, (0, 4), False),  # between the stacks' first layers
        (3, 2, (0, 2), False),  # a decoder that begins elsewhere
        (4, 5, (0, 4), True),
        (3, 0, (0,), True),
        (3, 7, (0,), False),  # the last layer
    ]


def _mask(n_sources: int, sources: bool, skip: bool, back: bool) -> np.ndarray:
    return np.array([sources] * n_sources + [skip, back], np.int8)


LEGAL = Exercise(
    reference=_legal_by_env,
    cases=_legal_cases,
    mistakes=[
        Mistake(
            "Your back is legal everywhere. At the first layer of a stack there is nothing to go back to.",
            lambda n, k, starts, full: _mask(n, not full, True, True),
        ),
        Mistake(
            "Your back is illegal at layer 0 only. A T5 has two stacks, and no way leads from the "
            "decoder's first block back into the encoder.",
            lambda n, k, starts, full: _mask(n, not full, True, k > 0),
        ),
        Mistake(
            "Your back is illegal up to the start of the last stack. It is so only at the first layer of a "
            "stack.",
            lambda n, k, starts, full: _mask(n, not full, True, k > starts[-1]),
        ),
        Mistake(
            "You assume stacks that begin at 0 and 4: starts says where they do.",
            lambda n, k, starts, full: _mask(n, not full, True, k not in (0, 4)),
        ),
        Mistake(
            "Sources stay legal in your full model. When no further layer fits, only skip and back are "
            "left.",
            lambda n, k, starts, full: _mask(n, True, True, k not in starts),
        ),
        Mistake(
            "The mask is the wrong way round: 1 means legal.",
            lambda n, k, starts, full: 1 - _legal_by_env(n, k, starts, full),
        ),
        Mistake(
            "Skip is illegal in your full model. It appends nothing, and is the only way to the end.",
            lambda n, k, starts, full: _mask(n, not full, not full, k not in starts),
        ),
        Mistake(
            "Your skip is illegal at the first layer of a stack. Any layer can be left out, even the first.",
            lambda n, k, starts, full: _mask(n, not full, k not in starts, k not in starts),
        ),
        Mistake(
            "Skip and back are in each other's place: the order is models, operators, skip, back.",
            lambda n, k, starts, full: _mask(n, not full, k not in starts, True),
        ),
        Mistake(
            "The values are right, in a list. Return a NumPy array: np.array(...).",
            lambda n, k, starts, full: _legal_by_env(n, k, starts, full).tolist(),
        ),
    ],
    right="This is the rule of the environment's own mask, but for its limit on the number of actions.",
)

# ------------------------------------------------------------------------------------- count_paths


def _whole(function: Callable[..., Any]) -> str | None:
    """A hint for a float: it is exact only as long as the number is small."""
    answer = function(2, 3)
    if isinstance(answer, int | np.integer):
        return None
    return f"The value is right; return a whole number (int), not {type(answer).__name__} {answer}."


COUNT_PATHS = Exercise(
    reference=lambda n_sources, n_layers: (n_sources + 1) ** n_layers,
    cases=lambda: [(2, 3), (7, 6), (1, 4), (5, 12)],
    mistakes=[
        Mistake(
            "Skip is missing: at each layer the agent takes a source or none.",
            lambda n, layers: n**layers,
        ),
        Mistake(
            "You count both skip and back. Without back there is one choice more than there are sources.",
            lambda n, layers: (n + 2) ** layers,
        ),
        Mistake(
            "You add the choices. Each choice at one layer can be followed by every choice at the next: "
            "multiply.",
            lambda n, layers: (n + 1) * layers,
        ),
        Mistake(
            "Base and exponent are swapped: one factor for each layer.",
            lambda n, layers: layers ** (n + 1),
        ),
        Mistake(
            "Base and exponent are swapped, and skip is missing: one factor for each layer.",
            lambda n, layers: layers**n,
        ),
        Mistake(
            "This counts one skipped layer at most. Any set of layers may be skipped.",
            lambda n, layers: n**layers + layers * n ** (layers - 1),
        ),
        Mistake(
            "You count skipping everything, but no path that skips only some layers. Skip is one more choice "
            "at each of them.",
            lambda n, layers: n**layers + 1,
        ),
        Mistake(
            "You leave out the path that skips every layer. It makes a poor model, but is legal.",
            lambda n, layers: (n + 1) ** layers - 1,
        ),
    ],
    right="One factor N + M + 1 for each layer: the number grows exponentially with the depth.",
    tolerance=0.0,
    also=_whole,
)

BACK = Quiz(
    right="c",
    explained={
        "a": "Nothing is removed: the map still counts 1 for digits at layer 2, and the path still ends "
        "with that layer.",
        "b": "Only the position moves back. If the count went down, the map would forget a layer that is in "
        "the model.",
        "c": "Back undoes nothing. The agent is at layer 2 again, and what it takes there runs after "
        "digits' layer 2: the model grows deeper.",
        "d": "Back is legal at every layer but the first one of a stack. It costs one action.",
    },
)

EXERCISES: dict[str, Exercise | Quiz] = {
    "03.apply_action": APPLY_ACTION,
    "03.legal": LEGAL,
    "03.count_paths": COUNT_PATHS,
    "03.back": BACK,
}
