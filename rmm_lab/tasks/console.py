"""How a command runs: errors and Ctrl-C in one line, on a console that does not end it.

The console may close, fill up, lack letters, or not be there at all.
"""

from __future__ import annotations

import errno
import io
import os
import pkgutil
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from rmm_lab.errors import InputError, check_given, one_sentence

_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|invalid buffer size", re.IGNORECASE)


class Lasting:
    """A text stream that goes on without its reader: what cannot be written is lost. ``lost``: why."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.lost: Exception | None = None
        if isinstance(stream, io.TextIOWrapper):  # one without a letter shows "?" in its place
            stream.reconfigure(errors="replace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write what can be written."""
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Write what is waiting, if that can be."""
        self._try(self._stream.flush)

    def _try(self, what: Callable[..., Any], *arguments: str) -> None:
        try:
            if self.lost is None:
                what(*arguments)
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self.lost = error
            with suppress(
                OSError, ValueError
            ):  # or the interpreter writes what is waiting as it ends
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


@contextmanager
def lasting_console() -> Iterator[None]:
    """Whatever becomes of stdout and stderr, the block ends as it would have.

    Where stdout took no more, stderr says so at the end, but for a reader that had enough (``| head``). Nor
    does a backend of matplotlib's that is not there: nothing is shown, figures are files.
    """
    before, backend = (sys.stdout, sys.stderr), os.environ.get("MPLBACKEND")
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        out, err = (Lasting(stream or nowhere) for stream in before)
        sys.stdout, sys.stderr = out, err
        try:
            if backend is not None:
                os.environ["MPLBACKEND"] = "agg"
            yield
        finally:
            if backend is not None:
                os.environ["MPLBACKEND"] = backend
            out.flush()
            if out.lost is not None and getattr(out.lost, "errno", 0) != errno.EPIPE:
                print(f"note: not all could be written to stdout ({out.lost})", file=err)
            err.flush()
            sys.stdout, sys.stderr = before


@contextmanager
def finishing() -> Iterator[None]:
    """Ctrl-C does not stop the block, such as one that writes a model; it is raised after it."""
    before, asked = signal.getsignal(signal.SIGINT), []
    if not _ours(before):
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: asked.append(1))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        raise KeyboardInterrupt


@contextmanager
def loading() -> Iterator[None]:
    """Ctrl-C while libraries are imported ends the process at once, in one line.

    An exception would come up in the middle of a library, which may take it for its own.
    """
    before = signal.getsignal(signal.SIGINT)
    if not _ours(before):
        yield
        return
    signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def loaded(name: str) -> Any:
    """What MODULE:NAME says, its libraries imported now; for a module that is run, before it imports them."""
    with loading():
        return pkgutil.resolve_name(name)


def _ours(handler: Any) -> bool:
    """Whether Ctrl-C is Python's, and not ignored, as under nohup, or a caller's."""
    in_main = threading.current_thread() is threading.main_thread()
    return in_main and handler is signal.default_int_handler


def _end(*_: object) -> NoReturn:
    with suppress(OSError):
        os.write(2, b"\nstopped; nothing is written\n")
    os._exit(130)


def run_command(
    command: Any,
    prog: str,
    argv: Sequence[str] | None = None,
    stopped: str = "nothing is written",
    **options: Any,
) -> int:
    """Parse a command line into a dataclass with ``run`` and run it, on a lasting console.

    Returns the exit code: 0, 2 for bad input, 130 after Ctrl-C.

    Args:
        command: the dataclass. prog: what the command is called in its help.
        argv: the words; by default those of the process.
        stopped: what Ctrl-C leaves behind, for the message.
        options: further options of ``tyro.cli``, such as ``default``.
    """
    with lasting_console():
        try:
            with loading():
                import tyro

            words = sys.argv[1:] if argv is None else list(argv)
            check_words(words)
            config = (tyro.conf.PositionalRequiredArgs, tyro.conf.OmitArgPrefixes)
            tyro.cli(command, args=words, prog=prog, config=config, **options).run()
        except (InputError, OSError) as error:
            return refused(error)
        except KeyboardInterrupt as error:
            print(f"\nstopped; {str(error) or stopped}", file=sys.stderr)
            return 130
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and not _NO_MEMORY.search(str(error)):
                raise
            why = str(error).strip().partition("\n")[0] or "Python has none left"
            more = "take a smaller batch, fewer workers or a smaller model, or another machine"
            return refused(InputError(f"expected more memory, found too little ({why}); {more}"))
        return 0


def run_module(name: str, stopped: str = "nothing is written") -> int:
    """Run the command MODULE:NAME as ``python -m MODULE``, before that module imports its libraries."""
    prog = f"python -m {name.partition(':')[0]}"
    return run_command(loaded(name), prog, stopped=stopped)


def check_words(words: Sequence[str]) -> None:
    """Raise InputError for an option whose value is empty, or in the home of a user who is not there."""
    option = ""
    for word, after in zip(words, [*words, None][1:], strict=True):
        name, equals, value = word.partition("=")
        check_given(name, value if equals else after)
        option = name if name.startswith("--") else option
        if "\0" in word:
            raise InputError(f"{option or 'argument'}: expected a text without NUL, found {word!r}")
        home = re.search(r"(?:^|[=:])(~[^/=:]*)", word)
        try:
            Path(home[1] if home else "").expanduser()
        except RuntimeError as error:
            raise InputError(
                f"{option or word}: expected the home of a user, found no {home and home[1]}; correct it"
            ) from error


def refused(error: Exception) -> int:
    """Say what was wrong with the input, in one line; the exit code."""
    print(f"\nerror: {one_sentence(error)}", file=sys.stderr)
    return 2
