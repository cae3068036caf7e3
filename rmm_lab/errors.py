"""The package's one kind of error for what a user passed in, and how errors are told."""

import errno
import sys
from collections.abc import Sequence
from typing import Any


class InputError(ValueError):
    """Something the caller gave is not what is expected; the message says what, and what to do."""


def one_sentence(error: Exception) -> str:
    """An error as one sentence; a full disk says so."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = error.filename or "the run folder"
        return (
            f"{where}: expected space on the device, found none left; free some, then use --resume"
        )
    return " ".join(str(error).split())


def run_command(
    command: Any, prog: str, argv: Sequence[str] | None = None, stopped: str = ""
) -> int:
    """A command line of a dataclass with ``run``; returns 0, 2 for bad input, 130 after Ctrl-C.

    ``argv``: its words, the process's own by default. ``stopped``: what Ctrl-C leaves, for the message.
    """
    import tyro

    config = (tyro.conf.PositionalRequiredArgs, tyro.conf.OmitArgPrefixes)
    try:
        words = sys.argv[1:] if argv is None else list(argv)
        tyro.cli(command, args=words, prog=prog, config=config).run()
    except (InputError, OSError) as error:
        print(f"\nerror: {one_sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nstopped; {stopped}", file=sys.stderr)
        return 130
    return 0
