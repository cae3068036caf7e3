"""The one place that asks the Hugging Face hub for a data set."""

from __future__ import annotations

import re
from typing import Any

from rmm_lab.errors import InputError


def is_hub(text: str) -> bool:
    """Whether a text reads ``hf-hub[:OWNER/NAME][@REVISION]``."""
    return re.match("hf-hub($|[:@])", text) is not None


def parse(text: str, default: str) -> tuple[str, str | None]:
    """OWNER/NAME and revision of such a text."""
    repository, _, revision = text.removeprefix("hf-hub").removeprefix(":").partition("@")
    return repository or default, revision or None


def load(
    repository: str, configuration: str | None, revision: str | None, *, thing: str, remedy: str
) -> Any:
    """A data set's splits, from the hub or its cache; data files only, never a data set's own code.

    Args:
        repository: OWNER/NAME; configuration, revision: None for the repository's default.
        thing, remedy: how an error begins and ends: what was asked for, and what to do instead.

    Raises InputError where the library datasets is missing, or neither hub nor cache have the data set;
    without a network that takes seconds.
    """
    try:
        import datasets  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise InputError(
            f"{thing}: expected the optional library datasets, found none; install it with "
            f"pip install -e '.[hub]', or {remedy}"
        ) from error
    from huggingface_hub import HfApi, constants

    try:
        if not constants.HF_HUB_OFFLINE:
            # One cheap question first: datasets itself tries for minutes without a network.
            HfApi().dataset_info(repository, revision=revision, timeout=2)
        return datasets.load_dataset(
            repository, configuration, revision=revision, trust_remote_code=False
        )
    except Exception as error:  # whatever the network stack raises, the user needs one sentence
        raise InputError(
            f"{thing}: expected {repository} on the hub, or with HF_HUB_OFFLINE=1 in its cache, found "
            f"neither ({type(error).__name__}); {remedy}"
        ) from error
