"""The exercises' checks: a verdict that names the likely mistake, and always a working function.

``f = checks.use("02.ties", f)`` in a notebook tries a student's function. It displays whether the exercise
was not attempted, is wrong (with the hint for that mistake) or correct, and returns a working function:
the student's if it is correct, else the kit's. So no later cell depends on a student's answer, which
``f.mine`` keeps. ``case("02.ties", 1)`` is a case to try by hand, ``report()`` a file of all verdicts.

``rmm_lab/course/exercises/nbNN.py`` holds the exercises of notebook NN, as ``EXERCISES: dict[str, ...]``.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import json
import math
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from IPython.display import HTML, display

from rmm_lab.errors import InputError, one_sentence
from rmm_lab.tasks.files import write_file

Function = Callable[..., Any]
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
ARRAYS = (np.ndarray, torch.Tensor)
NUMBERS = (int, float, np.generic, *ARRAYS)
LONGEST = 90  # characters of a value in a message
MARKS = {
    "not attempted": ("○", "#56B4E9"),
    "wrong": ("✗", "#D55E00"),
    "correct": ("✓", "#009E73"),
    "written": ("✎", "#CC79A7"),
}
VERDICTS: dict[str, dict[str, Any]] = {}  # of this session, by exercise, for ``report``


@dataclass(frozen=True)
class Mistake:
    """A wrong solution of an exercise, as code, and the hint for it."""

    hint: str
    wrong: Function


@dataclass(frozen=True)
class Exercise:
    """A function to write.

    ``reference``: a correct one. ``cases`` returns argument tuples, new ones at each call. ``mistakes``:
    in the order in which they are tried. ``right``: the message for a correct answer. ``tolerance``:
    relative and absolute, for floats. ``also``: a check of a function whose answers are all correct, for
    what they do not show (such as a gradient): it returns a hint, or None.
    """

    reference: Function
    cases: Callable[[], Sequence[tuple[Any, ...]]]
    mistakes: Sequence[Mistake]
    right: str
    tolerance: float = 1e-5
    also: Callable[[Function], str | None] | None = None
    how = "its name without parentheses"
    todo = "Replace the line that raises NotImplementedError."

    def judge(self, function: Function, answers: Sequence[Any]) -> Verdict:
        """The verdict on a function's answers to the cases."""

        def wrong(solution: Function) -> list[int]:
            """The cases in which the answers differ from those of a solution."""
            pairs = enumerate(zip(answers, self.cases(), strict=True))
            return [i for i, (a, c) in pairs if not _equal(a, solution(*c), self.tolerance)]

        differ = wrong(self.reference)
        if not differ:
            try:
                hint = self.also(function) if self.also else None
            except Exception as error:  # a student's code may raise anything; the verdict says so
                hint = f"Your function raised {_raised(error)}{_line(error, function)}."
            return Verdict("wrong", hint) if hint else Verdict("correct", self.right)
        if any(answers[i] is None for i in differ):
            return Verdict("wrong", "Your function returns None. Is its return missing?", differ[0])
        for mistake in self.mistakes:
            if not wrong(mistake.wrong):
                return Verdict("wrong", mistake.hint, differ[0])
        case, found = self.cases()[differ[0]], answers[differ[0]]
        expected = self.reference(*case)
        message = _compare(function, case, found, expected, self.tolerance)
        return Verdict("wrong", message, differ[0])


@dataclass(frozen=True)
class Quiz:
    """A question with options; ``explained`` says why each is right or wrong."""

    right: str
    explained: Mapping[str, str]
    how = "the letter, or a function that returns it"

    @property
    def todo(self) -> str:
        """What to do, for a student who has done nothing yet."""
        return f"Return one of {', '.join(map(repr, self.explained))}."

    def reference(self) -> str:
        """The right option's letter."""
        return self.right

    def cases(self) -> Sequence[tuple[Any, ...]]:
        """One call, without arguments."""
        return [()]

    def judge(self, function: Function, answers: Sequence[Any]) -> Verdict:
        """The verdict on the letter that the function returned."""
        (answer,) = answers
        letter = answer.strip().lower() if isinstance(answer, str) else ""
        if letter not in self.explained:
            letters = ", ".join(map(repr, self.explained))
            return Verdict("wrong", f"Expected one of {letters}, found {_short(answer)}.")
        if letter != self.right:
            return Verdict("wrong", f"({letter}) {self.explained[letter]}")
        order = [letter, *(k for k in self.explained if k != letter)]
        return Verdict("correct", "\n".join(f"({k}) {self.explained[k]}" for k in order))


@dataclass(frozen=True)
class Essay:
    """A design or an argument in words, which no machine grades.

    ``rubric``: what earns a point each. ``model``: an answer that earns them all. ``needs``: a pattern that
    the text must match -> what is missing where it does not. ``words``: fewest and most.
    """

    rubric: Sequence[str]
    model: str
    needs: Mapping[str, str]
    words: tuple[int, int] = (30, 120)
    how = "the text, or a function that returns it"
    todo = "Return your text."

    def reference(self) -> str:
        """The model answer."""
        return self.model

    def cases(self) -> Sequence[tuple[Any, ...]]:
        """One call, without arguments."""
        return [()]

    def judge(self, function: Function, answers: Sequence[Any]) -> Verdict:
        """Wrong if the text is too short, too long or lacks what it needs; else the rubric to grade it by."""
        (text,), (least, most) = answers, self.words
        if not isinstance(text, str):
            return Verdict("wrong", f"Expected a text, found {_short(text)}.")
        if not least <= (n := len(text.split())) <= most:
            return Verdict("wrong", f"Expected {least} to {most} words, found {n}.")
        for pattern, missing in self.needs.items():
            if not re.search(pattern, text, re.I):
                return Verdict("wrong", missing)
        points = "\n".join(f"{i}. {point}" for i, point in enumerate(self.rubric, 1))
        return Verdict("written", f"Give yourself, or a neighbour, a point for each:\n{points}")


@dataclass(frozen=True)
class Verdict:
    """The result of a check: ``message`` is one or a few sentences for the student; ``case``: the number of
    the first case that fails."""

    status: Literal["not attempted", "wrong", "correct", "written"]
    message: str
    case: int | None = None


Task = Exercise | Quiz | Essay


class Case(NamedTuple):
    """Arguments of a function to write, and the answer that is expected for them."""

    arguments: tuple[Any, ...]
    expected: Any


def exercise(name: str) -> Task:
    """An exercise by its name, such as ``02.ties``; InputError for an unknown one."""
    known = _exercises(name.partition(".")[0])
    if name not in known:
        raise InputError(
            f"exercise {name!r}: expected one of {', '.join(known) or 'notebooks 00 to 12'}; copy its "
            "name from the notebook"
        )
    return known[name]


def _exercises(number: str) -> dict[str, Task]:
    """The exercises of a notebook, by name; none where it has none."""
    try:
        found: dict[str, Task] = importlib.import_module(
            f"rmm_lab.course.exercises.nb{number}"
        ).EXERCISES
    except ModuleNotFoundError:
        return {}
    return found


def case(name: str, i: int = 0) -> Case:
    """Case i of an exercise, to try a function on: ``f(*case("02.trim", 1).arguments)``.

    InputError for a quiz, which has none, and for a number that the exercise lacks.
    """
    task = exercise(name)
    cases = task.cases() if isinstance(task, Exercise) else ()
    if not 0 <= i < len(cases):
        raise InputError(
            f"exercise {name!r}: expected a case from 0 to {len(cases) - 1}, found {i}; see its verdict"
            if cases
            else f"exercise {name!r}: expected a function to write, found a question; it has no cases"
        )
    return Case(cases[i], task.reference(*copy.deepcopy(cases[i])))


def check(name: str, function: Function) -> Verdict:
    """Try a student's function on an exercise's cases.

    For a quiz, the function takes nothing and returns an option's letter, for an essay its text; the bare
    letter or text will do. Whatever the function does, the result is a verdict; only an unknown name raises
    (InputError).
    """
    task, answer = exercise(name), function
    if isinstance(answer, str) and not isinstance(task, Exercise):
        function = lambda: answer  # noqa: E731
    if not callable(function):
        found = _short(function)
        return Verdict("wrong", f"Expected a function, found {found}. Pass {task.how}.")
    answers = []
    for i, case in enumerate(task.cases()):
        before = copy.deepcopy(case)
        try:
            answer = function(*case)
        except NotImplementedError:
            return Verdict("not attempted", task.todo)
        except Exception as error:  # a student's code may raise anything; the verdict says so
            where = f"for {_call(function, case)}{_line(error, function)}"
            return Verdict("wrong", f"Your function raised {_raised(error)}, {where}.", i)
        if not _equal(case, before, 0.0):
            return Verdict(
                "wrong",
                "Your function changes its arguments in place. Work on a copy: new = x.copy() (NumPy) or "
                "x.clone() (torch), list(x); or make a new one: x = x + y, not x += y.",
                i,
            )
        answers.append(copy.deepcopy(answer))
    return task.judge(function, answers)


def use(name: str, function: Function) -> Function:
    """Display the verdict on a student's function; return it if it is correct, else the kit's.

    ``.mine`` of what is returned is the student's function in any case; passed again, that is tried.
    """
    mine = getattr(function, "mine", function)
    verdict = check(name, mine)
    tries = VERDICTS.get(name, {}).get("tries", 0) + 1
    VERDICTS[name] = {"status": verdict.status, "message": verdict.message, "tries": tries}
    if verdict.status == "written":
        VERDICTS[name]["text"] = mine if isinstance(mine, str) else mine()
    display(HTML(box(name, verdict)))
    kept = mine if verdict.status == "correct" and callable(mine) else exercise(name).reference

    @functools.wraps(kept)
    def working(*args: Any, **options: Any) -> Any:
        return kept(*args, **options)

    working.mine = mine  # type: ignore[attr-defined]
    return working


def box(name: str, verdict: Verdict) -> str:
    """A verdict as HTML; a word and a mark show its status, not only a colour."""
    mark, colour = MARKS[verdict.status]
    message = escape(verdict.message).replace("\n", "<br>")
    if verdict.case is not None:
        call = f'<code>checks.case("{escape(name)}", {verdict.case})</code>'
        message += f"<br>The first case that fails: {call} has its arguments and answer."
    if verdict.status == "written":
        model = escape(str(exercise(name).reference()))
        message += f"<details><summary>A model answer</summary>{model}</details>"
    elif verdict.status != "correct":
        message += "<br><em>The cells below use the kit's answer.</em>"
    return (
        f'<div role="status" style="border-left: 6px solid {colour}; padding: 4px 10px">'
        f"<strong>{mark} {escape(name)}: {verdict.status}.</strong> {message}</div>"
    )


def report(file: str | Path = "verdicts.json") -> Path:
    """Write the verdicts of this session as JSON: exercise -> status, message, tries, and a written text.

    Exercises of a notebook of which any was tried are all in it. It says what the checks said on this
    machine: a record for students and teachers, no proof.
    """
    found: dict[str, Any] = {}
    for number in dict.fromkeys(name.partition(".")[0] for name in sorted(VERDICTS)):
        for name in _exercises(number):
            found[name] = VERDICTS.get(name, {"status": "not attempted", "message": "", "tries": 0})
    data = {"schema": "rmm_lab/verdicts/1", "exercises": found}
    write_file(Path(file), json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    return Path(file)


# ------------------------------------------------------------------------------------ comparing


def _compare(
    function: Function, case: tuple[Any, ...], found: Any, expected: Any, tolerance: float
) -> str:
    """The message for a mistake that is on no list: type, shape, or numbers."""
    call = _call(function, case)
    where, found, expected = _part(found, expected, tolerance)
    if where:
        call = f"{call}, {where}:"
    kinds = {torch.Tensor: "tensor", np.ndarray: "NumPy array", list: "list", tuple: "tuple"}
    wanted, got = kinds.get(type(expected)), kinds.get(type(found))
    if wanted and got and isinstance(found, list | tuple) != isinstance(expected, list | tuple):
        return f"For {call} expected a {wanted}, found a {got}: {_short(found)}."
    if isinstance(expected, NUMBERS) and isinstance(found, NUMBERS):
        right, own = _array(expected), _array(found)
        if right.shape != own.shape:
            shapes = f"expected shape {right.shape}, found {own.shape}"
            return f"For {call} {shapes}. Which axis do you sum over or keep?"
        if not np.isfinite(own).all():
            return f"For {call} your answer contains NaN or infinity. Do you divide by 0?"
    return f"For {call} expected {_short(expected)}, found {_short(found)}."


def _part(found: Any, expected: Any, tolerance: float) -> tuple[str, Any, Any]:
    """Where the two differ, in words, and both values there; the whole values where they are short.

    Of a tuple, list or dict: the first part that differs. Of an array that has one wrong entry or is too
    large to show: its first wrong entry. Values of different type, length or shape stay whole.
    """
    if isinstance(found, ARRAYS) and isinstance(expected, ARRAYS):
        return _entry(found, expected, tolerance)
    own, right = _parts(found), _parts(expected)
    wrong = []
    if own.keys() == right.keys():
        wrong = [name for name in right if not _equal(own[name], right[name], tolerance)]
    whole = len(repr(expected)) <= LONGEST and len(repr(found)) <= LONGEST
    if not wrong or (len(wrong) > 1 and whole and isinstance(expected, list | tuple)):
        return "", found, expected
    inner, f, e = _part(own[wrong[0]], right[wrong[0]], tolerance)
    return f"{wrong[0]}, {inner}" if inner else wrong[0], f, e


def _parts(value: Any) -> dict[str, Any]:
    """What a dict, list or tuple holds, by a name in words; of other values nothing."""
    if isinstance(value, Mapping):
        return {f"key {k!r}": v for k, v in value.items()}
    names = chain(ORDINALS, (f"{i}th" for i in count(len(ORDINALS) + 1)))
    values = value if isinstance(value, list | tuple) else ()
    return {f"{name} value": v for name, v in zip(names, values, strict=False)}


def _entry(found: Any, expected: Any, tolerance: float) -> tuple[str, Any, Any]:
    """The first wrong entry of an array, if it is the only one or the array is too large to show."""
    x, y = _array(found), _array(expected)
    if x.shape != y.shape or object in (x.dtype, y.dtype) or not np.isfinite(x).all():
        return "", found, expected
    wrong = np.argwhere(~np.isclose(x, y, rtol=tolerance, atol=tolerance, equal_nan=True))
    if not len(wrong) or (len(wrong) > 1 and x.size <= 12) or x.size == 1:
        return "", found, expected
    place = tuple(wrong[0].tolist())
    more = f" (the first of {len(wrong)} entries)" if len(wrong) > 1 else ""
    return f"differs at {list(place)}{more}", float(x[place]), float(y[place])


def _equal(a: Any, b: Any, tolerance: float) -> bool:
    """Equality of numbers, arrays, tensors, and lists, tuples and dicts of these; NaN equals NaN."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[k], b[k], tolerance) for k in a)
    if isinstance(a, str | bytes | None) or isinstance(b, str | bytes | None):
        return type(a) is type(b) and a == b
    if isinstance(a, NUMBERS) and isinstance(b, NUMBERS):
        x, y = _array(a), _array(b)
        alike = x.shape == y.shape and object not in (x.dtype, y.dtype)
        return alike and np.allclose(x, y, rtol=tolerance, atol=tolerance, equal_nan=True)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_equal(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if type(a) is not type(b):
        return False
    if type(a).__eq__ is object.__eq__:  # such as a task: equal if their attributes are
        return a is b or _equal(getattr(a, "__dict__", {}), getattr(b, "__dict__", {}), tolerance)
    return bool(a == b)


def _array(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().to(torch.float64).numpy()
    array = np.asarray(value)
    return array if array.dtype == object else array.astype(np.float64)


def _call(function: Function, case: tuple[Any, ...]) -> str:
    """The case as a call, in one line."""
    name = getattr(function, "__name__", "your function")
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        names = []
    named = [f"{n}=" for n in names] if len(names) == len(case) else [""] * len(case)
    return f"{name}({', '.join(n + _short(v) for n, v in zip(named, case, strict=True))})"


def _raised(error: Exception) -> str:
    return f"{type(error).__name__}: {one_sentence(error)[:200]}".removesuffix(": ")


def _line(error: Exception, function: Function) -> str:
    """The line of the student's code that raised; nothing if the call itself failed."""
    file = getattr(getattr(function, "__code__", None), "co_filename", None)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    return f", in line {frames[-1].lineno}: {frames[-1].line}" if frames else ""


def _short(value: Any) -> str:
    """A value in a few words: small numbers as they are, large arrays by their shape."""
    if isinstance(value, ARRAYS):
        if math.prod(value.shape) <= 12:
            return str(np.round(_array(value), 4).tolist())
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if inspect.isfunction(value):
        return f"the function {value.__name__}"
    text = repr(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
