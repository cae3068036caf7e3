"""The package's one kind of error for what a user passed in, and how errors are told."""

import errno


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
