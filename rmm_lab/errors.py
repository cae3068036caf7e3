"""One kind of error for what a user passed in, and the check of a command's options."""

from __future__ import annotations

import errno
import math
import types
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

FULL = (errno.ENOSPC, errno.EDQUOT)  # a full disk, a full quota


class InputError(Exception):
    """The caller gave something unexpected; the message says what, and what to do.

    No ValueError, so that nothing on the way takes it for its own: tyro would put it into a box.
    """


def one_sentence(error: Exception, then: str = "go on or try again") -> str:
    """An error as one sentence; a full disk says so, and what to do then."""
    if isinstance(error, OSError) and error.errno in FULL:
        where = error.filename or "the run folder"
        return f"{where}: expected space on the device, found none left; free some, then {then}"
    return " ".join(str(error).split())


# ----------------------------------------------------------------------------- checks of options

Range = tuple[str, Callable[[Any], bool]]  # what is expected, in words, and whether a value is that
SEED_RANGE: Range = ("0 or more and below 2**63", lambda v: 0 <= v < 2**63)
UNIT_RANGE: Range = ("more than 0 and at most 1", lambda v: 0 < v <= 1)
_WORDS = {int: "a whole number", float: "a finite number", bool: "True or False", str: "a text"}
_MAY_BE_EMPTY = ("--groups", "--export")


def check_values(args: Any, ranges: dict[str, Range]) -> None:
    """Raise InputError for the first field whose value has the wrong type or is out of range.

    ``ranges``: field names, several separated by spaces, -> (what is expected, test). None passes where
    the type allows it.
    """
    hints = get_type_hints(type(args))
    checks = [(name, hint, (_expected(hint), lambda _: True)) for name, hint in hints.items()]
    checks += [(name, hints[name], r) for names, r in ranges.items() for name in names.split()]
    for name, hint, (expected, is_in_range) in checks:
        value, option = getattr(args, name), f"--{name.replace('_', '-')}"
        if "" in (value if isinstance(value, tuple) else (value,)):
            check_given(option, "")
        if not _fits(value, hint) or (value is not None and not is_in_range(value)):
            raise InputError(f"{option}: expected {expected}, found {value!r}; correct it")
        for number in value if isinstance(value, tuple) else (value,):
            if type(number) is int and abs(number) >= 2**63:  # which no array holds
                raise InputError(
                    f"{option}: expected a number below 2**63, found {number}; correct it"
                )


def check_given(option: str, value: str | None) -> None:
    """Raise InputError for an option whose value is an empty text, unless that means something."""
    if value == "" and option.startswith("--") and option not in _MAY_BE_EMPTY:
        raise InputError(f"{option}: expected a value, found ''; give one, or leave the option out")


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return type(value) in map(type, inner) and value in inner
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(v, inner[0]) for v in value)
    if hint is float:
        return type(value) in (int, float) and -math.inf < value < math.inf
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _expected(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(map(str, inner))
    if origin in (Union, types.UnionType):
        return " or ".join(map(_expected, inner))
    if origin is tuple:
        return f"a tuple, each {_expected(inner[0])}"
    return "None" if hint is type(None) else _WORDS.get(hint, f"a {hint.__name__}")
