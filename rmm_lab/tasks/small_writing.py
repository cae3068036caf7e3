"""How the small writing tasks are made: three grammars, after the kinds of task that HM3 merges.

    translation   a sentence into a language with other words and another word order
    arithmetic    the sum of three two-digit numbers, digit by digit
    code          an expression as a program of a stack machine, which ``run`` runs

Every example is a row ``{"input": text, "target": text}``. Its input decides its split, as in
``small_texts``. Every word, digit and sign is a token, between spaces.
Source of the three kinds: Zhou et al. 2025, "HM3: Hierarchical Multi-Objective Model Merging for Pretrained
Models", Sec. 4.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from rmm_lab.tasks.small_texts import rows_of

Row = dict[str, str]


def _table(english: str, other: str) -> dict[str, str]:
    return dict(zip(english.split(), other.split(), strict=True))


# English -> the other language, whose adjectives follow their noun and whose verb ends the sentence.
NOUNS = _table(
    "fox owl bear wolf hare frog crow duck goat horse sheep cat dog king queen child",
    "ruvo sile bamo lupe hasa koru vaki dene gota piro mebu tilu woka rexo zara nino",
)
ADJECTIVES = _table(
    "red blue old young big small kind sad", "rak blun oss jemm gran pim dolk trist"
)
VERBS = _table(
    "sees hears helps follows calls likes feeds warns",
    "videt audet ajudet sekvet vokat amat nurit monet",
)
# Times come last in English and first in the other language.
TIMES = _table("today often never now", "hodi saepe numka nunk")
OPERATORS = {"+": "add", "-": "sub", "*": "mul"}


def translation(rng: random.Random) -> Row:
    """Words by a dictionary, and three reorderings: time first, verb last, adjective behind its noun."""
    verb, time = rng.choice(list(VERBS)), rng.choice(list(TIMES))
    english, other = [], []
    for noun in rng.sample(list(NOUNS), 2):
        adjectives = rng.sample(list(ADJECTIVES), rng.randrange(3))
        english.append(" ".join(["the", *adjectives, noun]))
        # the last adjective, which is nearest to the noun, stays nearest
        other.append(" ".join([NOUNS[noun], *(ADJECTIVES[a] for a in reversed(adjectives))]))
    return {
        "input": f"translate : {english[0]} {verb} {english[1]} {time} =",
        "target": f"{TIMES[time]} {other[0]} {other[1]} {VERBS[verb]}",
    }


def digits(number: int) -> str:
    """A number as its digits, the last one last, between spaces."""
    return " ".join(str(number))


def sum_of(numbers: Sequence[int]) -> Row:
    """A sum by steps: the ones, the tens with what is carried, the result."""
    ones = sum(n % 10 for n in numbers)
    tens = sum(n // 10 for n in numbers) + ones // 10
    steps = [
        " + ".join(str(n % 10) for n in numbers) + f" = {digits(ones)}",
        " + ".join(str(n // 10) for n in numbers) + f" + {ones // 10} = {digits(tens)}",
        digits(sum(numbers)),
    ]
    question = " + ".join(map(digits, numbers))
    return {"input": f"sum : {question} =", "target": " , ".join(steps)}


def arithmetic(rng: random.Random) -> Row:
    """The sum of three numbers of two digits, by steps."""
    return sum_of([rng.randrange(10, 100) for _ in range(3)])


def draw_expression(rng: random.Random, leaves: int) -> tuple[str, str]:
    """An expression of so many digits, every operation in brackets, and its program."""
    if leaves == 1:
        digit = rng.randrange(10)
        return str(digit), f"push {digit}"
    left = rng.randrange(1, leaves)
    a, b = draw_expression(rng, left), draw_expression(rng, leaves - left)
    sign = rng.choice(list(OPERATORS))
    return f"( {a[0]} {sign} {b[0]} )", f"{a[1]} {b[1]} {OPERATORS[sign]}"


def code(rng: random.Random) -> Row:
    """An expression of three to five digits as a program: operands first, then the operation."""
    expression, program = draw_expression(rng, rng.randrange(3, 6))
    return {"input": f"program : {expression} =", "target": program}


def run(program: str) -> int:
    """What a program leaves on its stack: ``push 2 push 3 add`` leaves 5.

    Raises ValueError for a program that is none, takes from an empty stack, or leaves not one number.
    """
    words, stack = iter(program.split()), []
    for word in words:
        if word == "push":
            digit = next(words, "")
            if len(digit) != 1 or digit not in "0123456789":
                raise ValueError(f"push: expected a digit, found {digit!r}")
            stack.append(int(digit))
            continue
        if word not in OPERATORS.values():
            raise ValueError(
                f"expected push, {', '.join(OPERATORS.values())}, found {word!r}; correct the program"
            )
        if len(stack) < 2:
            raise ValueError(f"{word}: expected two numbers on the stack, found {len(stack)}")
        b, a = stack.pop(), stack.pop()
        stack.append({"add": a + b, "sub": a - b, "mul": a * b}[word])
    if len(stack) != 1:
        raise ValueError(f"expected one number on the stack at the end, found {len(stack)}")
    return stack[0]


TASKS: dict[str, Callable[[random.Random], Row]] = {
    task.__name__: task for task in (translation, arithmetic, code)
}


def rows(task: str, split: str, n: int) -> list[Row]:
    """n rows of a split of a task, always the same, each input once."""
    return rows_of(TASKS[task], task, split, n)


def vocabulary() -> list[str]:
    """Every word, digit and sign of the three tasks."""
    words = [
        word
        for table in (NOUNS, ADJECTIVES, VERBS, TIMES)
        for pair in table.items()
        for word in pair
    ]
    signs = ["the", "translate", "sum", "program", "push", ":", "=", "+", "-", "*", "(", ")", ","]
    return sorted({*words, *signs, *OPERATORS.values(), *map(str, range(10))})
