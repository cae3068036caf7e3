"""The package's one kind of error for what a user passed in."""


class InputError(ValueError):
    """Something the caller gave is not what is expected; the message says what, and what to do."""
