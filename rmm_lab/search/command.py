"""The command ``merge``: a whole search from a command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rmm_lab import ppo
from rmm_lab.engine.cache import keep_freed_memory
from rmm_lab.errors import InputError
from rmm_lab.search.config import PRESETS, Config, RunArgs, configure, read_config
from rmm_lab.search.pipeline import train
from rmm_lab.search.problem import ProblemSpec
from rmm_lab.search.run_folder import RunFolder
from rmm_lab.tasks.console import check_words, refused, run_command


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


def main(words: Sequence[str]) -> int:
    """Command line; returns the exit code: 0, 2 for bad input, 130 after Ctrl-C.

    Defaults come from ``--preset``, or from the run that ``--resume`` names.
    """
    early = {}  # tyro wants to know the defaults before it parses
    for word, after in zip(words, [*words[1:], ""], strict=True):
        option, _, value = word.partition("=")
        early[option] = value or after
    try:
        check_words(words)
        config = PRESETS.get(early.get("--preset", ""), PRESETS["default"])
        if folder := early.get("--resume"):
            if "--preset" in early:
                raise InputError(
                    "--preset: expected none beside --resume, which has its own options"
                )
            config = read_config(RunFolder(Path(folder)).read_config(), folder)
    except InputError as error:
        return refused(error)
    default = Merge(config.problem, config.agent, config.run)
    return run_command(Merge, "python -m rmm_lab merge", words, default=default)
