"""Reinforced Model Merging: search the best merge of models that were fine-tuned from one base.

    python -m rmm_lab [merge | finetune | tables] ...      merge is the default

    python -m rmm_lab                                                  the demo: digits and textures
    python -m rmm_lab --experts qa                                     three T5s
    python -m rmm_lab --base B --experts E1 E2 --images D1 D2          your own ViTs
    python -m rmm_lab --base B --experts E1 E2 --texts D1 D2           your own T5s or language models
    python -m rmm_lab finetune --base B --images D1 --out E1           make an expert
    python -m rmm_lab tables show                                      the paper's tables
    python -m rmm_lab tables real --base B --data FOLDER               the same of real pretrained models

All options of a command: python -m rmm_lab merge --help, finetune --help, tables --help, tables real --help.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rmm_lab.errors import InputError
from rmm_lab.tasks.console import lasting_console, loaded, refused, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    with lasting_console():
        words = sys.argv[1:] if argv is None else list(argv)
        if words in (["-h"], ["--help"]):  # at once: a command's own help loads its libraries
            print(__doc__, end="")
            return 0
        named = bool(words) and not words[0].startswith("-")
        try:
            return _run(words[0] if named else "merge", words[named:])
        except KeyboardInterrupt:
            print("\nstopped; nothing is written", file=sys.stderr)
            return 130


def _run(command: str, words: Sequence[str]) -> int:
    """Run a command, whose libraries are loaded now."""
    if command == "merge":
        return loaded("rmm_lab.search.command:main")(words)
    if command == "finetune":
        return run_command(
            loaded("rmm_lab.zoo.finetune:Finetune"), f"python -m rmm_lab {command}", words
        )
    if command == "tables" and words[:1] == ["real"]:
        return loaded("rmm_lab.evidence.real:main")(words[1:])
    if command == "tables":
        return loaded("rmm_lab.evidence.tables:main")(words)
    return refused(InputError(f"expected merge, finetune or tables, found {command!r}"))


if __name__ == "__main__":
    sys.exit(main())
