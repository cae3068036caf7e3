"""The exercises of notebook 09: means and spread over seeds, a paired gain, two questions."""

from __future__ import annotations

from typing import Any

import numpy as np

from rmm_lab.course.checks import Exercise, Mistake, Quiz


def mean_and_spread(scores: np.ndarray) -> tuple[float, float]:
    """Mean and sample standard deviation over seeds of the mean over tasks.

    scores: (S, N), S >= 2 seeds and N tasks -> (mean, spread), in the scores' unit.
    """
    by_seed = np.asarray(scores).mean(axis=1)  # (S, N) -> (S,)
    return float(by_seed.mean()), float(by_seed.std(ddof=1))


def paired_gain(search: np.ndarray, chosen_by: np.ndarray, reported: np.ndarray) -> np.ndarray:
    """What a search gains in each seed over the uniform merge that ``chosen_by`` likes best there.

    search: (S,); chosen_by, reported: (S, U), U uniform merges -> (S,), in the scores' unit.
    """
    best = np.asarray(chosen_by).argmax(axis=1)  # (S, U) -> (S,)
    return np.asarray(search) - np.asarray(reported)[np.arange(len(best)), best]


def _spread_cases() -> list[tuple[Any, ...]]:
    rng = np.random.default_rng(8)
    shapes = ((3, 2), (5, 2), (4, 3))
    return [(np.round(rng.uniform(50, 90, shape), 1),) for shape in shapes]


def _gain_cases() -> list[tuple[Any, ...]]:
    # In each, the reward split and the test split disagree on the best merge, and seeds disagree too.
    first = (
        np.array([75.0, 77.0, 76.0]),
        np.array([[70.0, 66.0], [64.0, 69.0], [68.0, 67.0]]),
        np.array([[67.0, 68.0], [69.0, 66.0], [65.0, 70.0]]),
    )
    rng = np.random.default_rng(9)
    others = [
        tuple(np.round(rng.uniform(60, 80, size), 1) for size in ((s,), (s, u), (s, u)))
        for s, u in ((4, 3), (5, 4))
    ]
    return [first, *others]


def _rows(reported: np.ndarray, columns: np.ndarray) -> np.ndarray:
    return reported[np.arange(len(reported)), columns]


EXERCISES: dict[str, Exercise | Quiz] = {
    "09.mean_and_spread": Exercise(
        reference=mean_and_spread,
        cases=_spread_cases,
        mistakes=(
            Mistake(
                "This is the standard deviation of the seeds at hand: the sum of squares is divided by S. "
                "The seeds are a sample, and their own mean is used, so one degree of freedom is gone: "
                "divide by S - 1.",
                lambda scores: (scores.mean(), scores.mean(axis=1).std()),
            ),
            Mistake(
                "This is the spread over tasks, not over seeds. Tasks differ because some are harder; "
                "average them first, within each seed.",
                lambda scores: (scores.mean(), scores.mean(axis=0).std(ddof=1)),
            ),
            Mistake(
                "This is the mean of each task's spread over seeds. A seed that wins on one task may lose on "
                "another; take the mean over tasks first, then its spread.",
                lambda scores: (scores.mean(), scores.std(axis=0, ddof=1).mean()),
            ),
            Mistake(
                "This is the standard error: how well the mean is known. It shrinks with more seeds. The "
                "spread asked for says how far one search lies from the mean.",
                lambda scores: (
                    scores.mean(),
                    scores.mean(axis=1).std(ddof=1) / np.sqrt(len(scores)),
                ),
            ),
            Mistake(
                "All S x N numbers are pooled here, so the distance between tasks counts as spread between "
                "seeds. First the mean over tasks, one number for each seed.",
                lambda scores: (scores.mean(), scores.std(ddof=1)),
            ),
            Mistake(
                "This is the variance, in squared points. A root is missing.",
                lambda scores: (scores.mean(), scores.mean(axis=1).var(ddof=1)),
            ),
        ),
        right="One number for each seed, then mean and sample standard deviation over the seeds.",
    ),
    "09.gain": Exercise(
        reference=paired_gain,
        cases=_gain_cases,
        mistakes=(
            Mistake(
                "The sign is reversed: a gain is positive where the search is better.",
                lambda search, by, out: -(search - _rows(out, by.argmax(1))),
            ),
            Mistake(
                "The merge is chosen by the very scores that are reported. Choose it by chosen_by, and "
                "look at reported only afterwards.",
                lambda search, by, out: search - out.max(1),
            ),
            Mistake(
                "You compare the search's reported score with one of chosen_by. chosen_by only says which "
                "merge to take; its score comes from reported.",
                lambda search, by, out: search - by.max(1),
            ),
            Mistake(
                "This subtracts the mean over all uniform merges. Nobody would use an average of methods: "
                "take the best one by chosen_by.",
                lambda search, by, out: search - out.mean(1),
            ),
            Mistake(
                "This takes the worst uniform merge, by chosen_by, as the opponent. Higher is better.",
                lambda search, by, out: search - _rows(out, by.argmin(1)),
            ),
            Mistake(
                "The seeds are not paired: one average opponent is subtracted from all. Subtract within "
                "each seed, so that what seed j shares cancels.",
                lambda search, by, out: search - _rows(out, by.argmax(1)).mean(),
            ),
            Mistake(
                "You choose one merge for all seeds together. In practice there is one seed: let each row of "
                "chosen_by choose for itself.",
                lambda search, by, out: search - out[:, by.mean(0).argmax()],
            ),
        ),
        right="Chosen by one split, reported on the other, subtracted seed by seed.",
    ),
    "09.claim": Quiz(
        right="b",
        explained={
            "a": (
                "Look at letters+symbols: uniform merging already leaves less than five points below the "
                "experts, so nothing could gain five there."
            ),
            "b": (
                "It holds. A search that sees scores finds more than any rule that sees weights alone; least "
                "squares, which sees what each layer answers to unlabelled inputs, finds far more, in "
                "seconds."
            ),
            "c": (
                "Compare the rows agent + CMA-ES and multi-task: training on all tasks is ahead in every "
                "pair. It needs the data and the gradients that merging does without."
            ),
            "d": (
                "Compare task arithmetic with its tuned row: on digits+textures its scale alone moves the "
                "mean by more than ten points."
            ),
        },
    ),
}
