"""Short exercises that the base of the small language models learns before any task.

They hold the skills that the tasks need, each alone: to copy, to turn a list around, to look a word up, to
add digits; and the smallest cases of each task, which are no rows of it: a phrase, no sentence; a sum of two
numbers, not three; one operation, not several.
"""

from __future__ import annotations

import random

from rmm_lab.tasks.small_writing import (
    ADJECTIVES,
    NOUNS,
    TIMES,
    VERBS,
    digits,
    draw_expression,
    sum_of,
)

Row = dict[str, str]
WORDS = {**NOUNS, **ADJECTIVES, **VERBS, **TIMES}


def copy(rng: random.Random) -> Row:
    """Say a list again."""
    words = rng.choices([*WORDS, *WORDS.values(), *map(str, range(10))], k=rng.randrange(2, 8))
    return {"input": f": {' '.join(words)} =", "target": " ".join(words)}


def turn(rng: random.Random) -> Row:
    """Say a list from its end."""
    words = rng.choices([*WORDS, *map(str, range(10))], k=rng.randrange(2, 6))
    return {"input": f", {' '.join(words)} =", "target": " ".join(reversed(words))}


def look_up(rng: random.Random) -> Row:
    """Say each word of a list in the other language."""
    words = rng.choices(list(WORDS), k=rng.randrange(1, 6))
    return {"input": f"the {' '.join(words)} =", "target": " ".join(WORDS[w] for w in words)}


def add(rng: random.Random) -> Row:
    """Two to four digits, added."""
    numbers = [rng.randrange(10) for _ in range(rng.randrange(2, 5))]
    return {"input": f"{' + '.join(map(str, numbers))} =", "target": digits(sum(numbers))}


def columns(rng: random.Random) -> Row:
    """The ones, or the tens, of two-digit numbers."""
    numbers = [rng.randrange(10, 100) for _ in range(rng.randrange(2, 4))]
    of = rng.randrange(2)
    question = " , ".join(map(digits, numbers))
    return {"input": f"{'+-'[of]} {question} =", "target": " + ".join(str(n)[of] for n in numbers)}


def phrase(rng: random.Random) -> Row:
    """A noun with up to two adjectives, in the other language's order."""
    noun, adjectives = rng.choice(list(NOUNS)), rng.sample(list(ADJECTIVES), rng.randrange(3))
    other = [NOUNS[noun], *(ADJECTIVES[a] for a in reversed(adjectives))]
    return {
        "input": f"translate : the {' '.join([*adjectives, noun])} =",
        "target": " ".join(other),
    }


def two(rng: random.Random) -> Row:
    """The sum of two numbers of two digits, by steps."""
    return sum_of([rng.randrange(10, 100) for _ in range(2)])


def operation(rng: random.Random) -> Row:
    """One operation as a program."""
    expression, program = draw_expression(rng, 2)
    return {"input": f"program : {expression} =", "target": program}


DRILLS = (copy, turn, look_up, add, columns, phrase, two, operation)


def rows(n: int, seed: int = 0) -> list[Row]:
    """n exercises, each kind as often."""
    rng = random.Random(f"drills {seed}")
    return [DRILLS[i % len(DRILLS)](rng) for i in range(n)]
