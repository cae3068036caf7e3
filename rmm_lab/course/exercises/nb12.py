"""Exercises of notebook 12: greedy writing, exact match in one pass, what one wrong token does, a recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rmm_lab.course.checks import Essay, Exercise, Mistake, Quiz, Task

Model = Callable[[Sequence[int]], np.ndarray]  # tokens so far -> logits (V,) of the next one


def _rule(a: int, b: int, size: int) -> Model:
    """A model by formula, which looks at all tokens so far."""

    def next_logits(ids: Sequence[int]) -> np.ndarray:
        place = sum((i + 1) * int(token) for i, token in enumerate(ids))
        return -np.abs(np.arange(size) - (a * place + b) % size).astype(float)

    return next_logits


def _write_cases() -> list[tuple[Any, ...]]:
    one, two, three = _rule(3, 1, 7), _rule(2, 3, 5), _rule(5, 2, 11)
    return [(one, [1, 2], 6, 8), (two, [4], 0, 6), (three, [2, 2, 3], 4, 5), (one, [1, 2], 99, 3)]


def generate(next_logits: Model, prompt: Sequence[int], end: int, most: int) -> list[int]:
    """The tokens that greedy decoding writes after a prompt: at most so many, without the one that ends."""
    ids = list(prompt)
    for _ in range(most):
        token = int(np.argmax(next_logits(ids)))
        if token == end:
            break
        ids.append(token)
    return ids[len(prompt) :]


def _from_last_token(next_logits: Model, prompt: Sequence[int], end: int, most: int) -> list[int]:
    return generate(lambda ids: next_logits(ids[-1:]), prompt, end, most)


def _from_prompt(next_logits: Model, prompt: Sequence[int], end: int, most: int) -> list[int]:
    return generate(lambda ids: next_logits(prompt), prompt, end, most)


def _with_end(next_logits: Model, prompt: Sequence[int], end: int, most: int) -> list[int]:
    own = generate(next_logits, prompt, end, most)
    return own + [end] * (len(own) < most)


WRITE = Exercise(
    reference=generate,
    cases=_write_cases,
    mistakes=[
        Mistake(
            "The prompt is in your answer. Return only what was written after it.",
            lambda f, prompt, end, most: [*prompt, *generate(f, prompt, end, most)],
        ),
        Mistake(
            "The end token is in your answer. It says stop, and is no part of the text.",
            _with_end,
        ),
        Mistake(
            "Writing goes on after the end token. Stop there.",
            lambda f, prompt, end, most: generate(f, prompt, -1, most),
        ),
        Mistake(
            "Each token is predicted from the last one alone. Give the model everything so far: the "
            "prompt, and what it has written.",
            _from_last_token,
        ),
        Mistake(
            "Each token is predicted from the prompt alone. What was written so far must go in, too.",
            _from_prompt,
        ),
        Mistake(
            "This takes the least probable token. Greedy decoding takes the one with the highest logit.",
            lambda f, prompt, end, most: generate(lambda ids: -f(ids), prompt, end, most),
        ),
    ],
    right="One token at a time, each from all before it: a wrong one is read by all that follow.",
    tolerance=0.0,
)

# -------------------------------------------------------------------------------------- one pass


def is_right(logits: np.ndarray, ids: np.ndarray, start: int) -> bool:
    """Whether greedy decoding would write the answer ids[start:], by one pass over the whole text.

    logits: (T, V), row t says what follows token t; ids: (T,).
    """
    return bool((logits[start - 1 : -1].argmax(-1) == ids[start:]).all())


def _pass_cases() -> list[tuple[Any, ...]]:
    """Right ones; one wrong in the middle, at the end, at the start; and one that repeats what it reads."""
    rng, cases = np.random.default_rng(12), []
    for wrong, start in ((None, 3), (5, 3), (7, 4), (4, 4), (-1, 3), (None, 5)):
        ids = rng.integers(0, 9, 8)
        said = np.r_[ids[1:], 0]
        said[: start - 1] = (said[: start - 1] + 1) % 9  # what follows a prompt's tokens is free
        if wrong == -1:
            said = ids.copy()
        elif wrong:
            said[wrong - 1] = (said[wrong - 1] + 1) % 9
        cases.append((np.eye(9)[said] + rng.uniform(0, 0.4, (8, 9)), ids, start))
    return cases


ONE_PASS = Exercise(
    reference=is_right,
    cases=_pass_cases,
    mistakes=[
        Mistake(
            "Row t says what comes after token t. So the first token of the answer is predicted in the row "
            "before it: start - 1.",
            lambda logits, ids, start: bool((logits[start:].argmax(-1) == ids[start:]).all()),
        ),
        Mistake(
            "You also ask that the prompt is predicted. It is given; only the answer's tokens count.",
            lambda logits, ids, start: bool((logits[:-1].argmax(-1) == ids[1:]).all()),
        ),
        Mistake(
            "The last token is not checked. It ends the answer: a model that does not stop is wrong.",
            lambda logits, ids, start: bool(
                (logits[start - 1 : -2].argmax(-1) == ids[start:-1]).all()
            ),
        ),
        Mistake(
            "The first token of the answer is not checked.",
            lambda logits, ids, start: bool(
                (logits[start:-1].argmax(-1) == ids[start + 1 :]).all()
            ),
        ),
        Mistake(
            "One right token is not enough: exact match wants all of them.",
            lambda logits, ids, start: bool(
                (logits[start - 1 : -1].argmax(-1) == ids[start:]).any()
            ),
        ),
        Mistake(
            "This is the share of tokens that are right. Exact match is all or nothing.",
            lambda logits, ids, start: float(
                (logits[start - 1 : -1].argmax(-1) == ids[start:]).mean()
            ),
        ),
    ],
    right="If every token is the most probable one after the right ones, greedy decoding writes just "
    "these.",
    tolerance=0.0,
)

COMPOUND = Quiz(
    right="c",
    explained={
        "a": "That would need all errors in the same few answers. Spread over the tokens, they spoil "
        "many more.",
        "b": "0.9 times 0.9 is 0.81: an answer of two tokens. These have 24.",
        "c": "0.9 to the power of 24 is 0.08. Tokens are not independent, so the true share differs; but "
        "an all-or-nothing metric turns small errors into large losses.",
        "d": "Small, but not zero: 0.9 to the power of 24 is 0.08.",
    },
)

RECIPE = Essay(
    rubric=(
        "states one hypothesis that the tries can refute",
        "says what is tried, and which try comes first as the baseline",
        "keeps to ten tries, on the reward split, and says when to stop",
        "says which try is handed in, and that the test split is looked at once",
        "says what a score of that many rows cannot tell apart",
    ),
    model="Hypothesis: the task that lacks most gains more from a larger weight than the others lose. "
    "Try 1 is least squares with equal weights, the baseline. Then I double the weight of the task that "
    "lacks most, keep the change if the mean on the reward split rises, else halve the step; at most ten "
    "tries, or until two in a row gain less than 2 points, which is the noise of 600 rows. I hand in the "
    "best of them, scored once more on the whole reward split. The test split is looked at once, by the "
    "teacher.",
    needs={
        r"try|tries": "Say what your tries are: there are ten.",
        r"baseline|first|compare|equal weights|least squares|average": "Say what your recipe is compared "
        "with.",
        r"test|once|reward split": "Say which split chooses, and which one reports.",
    },
    words=(40, 150),
)

EXERCISES: dict[str, Task] = {
    "12.generate": WRITE,
    "12.one_pass": ONE_PASS,
    "12.compound": COMPOUND,
    "12.recipe": RECIPE,
}
