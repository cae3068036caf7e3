"""The exercises' checks: a verdict that names the likely mistake, and always a working function.

``f = checks.use("02.ties", f)`` in a notebook tries a student's function. It displays whether the exercise
was not attempted, is wrong (with the hint for that mistake) or correct, and returns a working function:
the student's if it is correct, else the kit's. So no later cell depends on a student's answer.

``rmm_lab/course/exercises/nbNN.py`` holds the exercises of notebook NN, as ``EXERCISES: dict[str, ...]``.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import chain, count
from typing import Any, Literal

import numpy as np
import torch
from IPython.display import HTML, display

from rmm_lab.errors import InputError, one_sentence

Function = Callable[..., Any]
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
ARRAYS = (np.ndarray, torch.Tensor)
NUMBERS = (int, float, np.generic, *ARRAYS)
LONGEST = 90  # characters of a value in a message
MARKS = {"not attempted": ("○", "#56B4E9"), "wrong": ("✗", "#D55E00"), "correct": ("✓", "#009E73")}


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
                hint = f"Your function raised {_raised(error)}."
            return Verdict("wrong", hint) if hint else Verdict("correct", self.right)
        if any(answers[i] is None for i in differ):
            return Verdict("wrong", "Your function returns None. Is its return missing?")
        for mistake in self.mistakes:
            if not wrong(mistake.wrong):
                return Verdict("wrong", mistake.hint)
        case, found = self.cases()[differ[0]], answers[differ[0]]
        expected = self.reference(*case)
        return Verdict("wrong", _compare(function, case, found, expected, self.tolerance))


@dataclass(frozen=True)
class Quiz:
    """A question with options; ``explained`` says why each is right or wrong."""

    right: str
    explained: Mapping[str, str]
    how = "a function that returns the letter"

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
class Verdict:
    """The result of a check: ``message`` is one or a few sentences for the student."""

    status: Literal["not attempted", "wrong", "correct"]
    message: str


def exercise(name: str) -> Exercise | Quiz:
    """An exercise by its name, such as ``02.ties``; InputError for an unknown one."""
    number = name.partition(".")[0]
    try:
        known = importlib.import_module(f"rmm_lab.course.exercises.nb{number}").EXERCISES
    except ModuleNotFoundError:
        known = {}
    if name not in known:
        raise InputError(
            f"exercise {name!r}: expected one of {', '.join(known) or 'notebooks 00 to 12'}; copy its "
            "name from the notebook"
        )
    return known[name]


def check(name: str, function: Function) -> Verdict:
    """Try a student's function on an exercise's cases.

    For a quiz, the function takes nothing and returns an option's letter. Whatever the function does,
    the result is a verdict; only an unknown name raises (InputError).
    """
    task = exercise(name)
    if not callable(function):
        found = _short(function)
        return Verdict("wrong", f"Expected a function, found {found}. Pass {task.how}.")
    answers = []
    for case in task.cases():
        before = copy.deepcopy(case)
        try:
            answer = function(*case)
        except NotImplementedError:
            return Verdict("not attempted", task.todo)
        except Exception as error:  # a student's code may raise anything; the verdict says so
            where = f"for {_call(function, case)}{_line(error)}"
            return Verdict("wrong", f"Your function raised {_raised(error)}, {where}.")
        if not _equal(case, before, 0.0):
            return Verdict(
                "wrong",
                "Your function changes its arguments in place. Work on a copy: new = x.copy() (NumPy) or "
                "x.clone() (torch), list(x); or make a new one: x = x + y, not x += y.",
            )
        answers.append(copy.deepcopy(answer))
    return task.judge(function, answers)


def use(name: str, function: Function) -> Function:
    """Display the verdict on a student's function; return it if it is correct, else the kit's."""
    verdict = check(name, function)
    display(HTML(box(name, verdict)))
    return function if verdict.status == "correct" else exercise(name).reference


def box(name: str, verdict: Verdict) -> str:
    """A verdict as HTML; a word and a mark show its status, not only a colour."""
    mark, colour = MARKS[verdict.status]
    note = "<br><em>The cells below use the kit's answer.</em>" * (verdict.status != "correct")
    message = escape(verdict.message).replace("\n", "<br>")
    return (
        f'<div role="status" style="border-left: 6px solid {colour}; padding: 4px 10px">'
        f"<strong>{mark} {escape(name)}: {verdict.status}.</strong> {message}{note}</div>"
    )


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


def _line(error: Exception) -> str:
    """The line of the student's code that raised; nothing if the call itself failed."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is this module's call
    lines = [frame for frame in frames if frame.filename == frames[0].filename]
    return f", in line {lines[-1].lineno}: {lines[-1].line}" if lines else ""


def _short(value: Any) -> str:
    """A value in a few words: small numbers as they are, large arrays by their shape."""
    if isinstance(value, ARRAYS):
        if math.prod(value.shape) <= 12:
            return str(np.round(_array(value), 4).tolist())
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    if isinstance(value, float):
        return f"{value:.4g}"
    text = repr(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
