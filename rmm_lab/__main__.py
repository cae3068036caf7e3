"""The command line: ``python -m rmm_lab [merge | finetune | tables] ...``; ``merge`` is the default.

python -m rmm_lab                                                  the demo: digits and textures
python -m rmm_lab --experts qa                                     three T5s
python -m rmm_lab --base B --experts E1 E2 --images D1 D2          your own ViTs
python -m rmm_lab --base B --experts E1 E2 --texts D1 D2           your own T5s or language models
python -m rmm_lab finetune --base B --images D1 --out E1           make an expert
python -m rmm_lab tables show                                      the paper's tables
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rmm_lab import ppo
from rmm_lab.engine.cache import keep_freed_memory
from rmm_lab.errors import InputError, one_sentence, run_command
from rmm_lab.search.config import PRESETS, Config, RunArgs, configure, read_config
from rmm_lab.search.pipeline import train
from rmm_lab.search.problem import ProblemSpec
from rmm_lab.search.run_folder import RunFolder
from rmm_lab.tasks.console import lasting_console

PROG = "python -m rmm_lab"


@dataclass(frozen=True)
class Merge:
    """Search a merged model, and report it on the test split.

    The other commands are ``finetune``, which makes an expert, and ``tables``, which measures the paper's.
    """

    problem: ProblemSpec
    agent: ppo.Args
    search: RunArgs
    preset: Literal["default", "weights", "agent", "paper"] = "default"
    """default: best here; weights: looks at no inputs; agent: that one's agent; paper: as published."""

    def run(self) -> None:
        """Run the search, in a new folder or in the one that is resumed."""
        config = Config(self.problem, self.agent, self.search)
        if config.run.resume is None:  # a problem that is stored keeps its seed
            config = configure(config, seed=config.run.seed)
        if config.run.resume and config.run.run_dir:
            raise InputError("--run-dir: expected none beside --resume, which names the folder")
        keep_freed_memory()
        train(config, above=Path("runs"))


def merge(words: Sequence[str]) -> int:
    """Run ``merge``. Defaults come from ``--preset``, or from the run that ``--resume`` names."""
    early = {}  # tyro wants to know the defaults before it parses
    for word, after in zip(words, [*words[1:], ""], strict=True):
        option, _, value = word.partition("=")
        early[option] = value or after
    try:
        config = PRESETS.get(early.get("--preset", ""), PRESETS["default"])
        if folder := early.get("--resume"):
            if "--preset" in early:
                raise InputError(
                    "--preset: expected none beside --resume, which has its own options"
                )
            config = read_config(RunFolder(Path(folder)).read_config(), folder)
    except InputError as error:
        print(f"\nerror: {one_sentence(error)}", file=sys.stderr)
        return 2
    default = Merge(config.problem, config.agent, config.run)
    return run_command(Merge, f"{PROG} merge", words, "nothing is written", default=default)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    with lasting_console():
        return _main(sys.argv[1:] if argv is None else list(argv))


def _main(words: Sequence[str]) -> int:
    if words[:1] == ["finetune"]:
        from rmm_lab.zoo.finetune import Finetune

        return run_command(Finetune, f"{PROG} finetune", words[1:], "nothing is written")
    if words[:1] == ["tables"]:
        from rmm_lab.evidence.tables import main as tables

        return tables(words[1:])
    if words and words[0] != "merge" and not words[0].startswith("-"):
        print(f"error: expected merge, finetune or tables, found {words[0]!r}", file=sys.stderr)
        return 2
    return merge(words[1:] if words[:1] == ["merge"] else words)


if __name__ == "__main__":
    sys.exit(main())
