"""A console that does not end a run: it may close, fill up, lack letters, or not be there at all."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


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
