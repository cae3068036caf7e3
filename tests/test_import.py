"""Importing has no effect, and loads no library that only some runs need."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import os, pkgutil, random, sys
import rmm_lab
assert "torch" not in sys.modules and "numpy" not in sys.modules
import gymnasium, numpy, torch  # gymnasium sets a variable for pygame
def state():
    return (torch.get_num_threads(), torch.initial_seed(), torch.get_default_dtype(),
            torch.is_grad_enabled(), random.getstate(), numpy.random.get_state()[1].tobytes(),
            dict(os.environ), sorted(os.listdir()))
before, seen = state(), set()
for module in pkgutil.walk_packages(rmm_lab.__path__, "rmm_lab."):
    if module.name.split(".")[1] not in ("course", "evidence", "figures", "__main__"):
        __import__(module.name)
        seen.add(module.name)
assert state() == before
assert {"rmm_lab.env", "rmm_lab.ppo", "rmm_lab.engine.scorer", "rmm_lab.zoo.finetune"} <= seen
for heavy in ("timm", "transformers", "tokenizers", "datasets", "torchvision", "matplotlib",
              "huggingface_hub", "ray", "optuna", "cmaes"):
    assert heavy not in sys.modules, heavy
"""


def run(code, folder):
    """A program in an interpreter of its own."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=120,
        check=False,
    )


def test_imports_are_quiet_light_and_change_nothing(tmp_path):
    done = run(CODE, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stderr


HELP = """
import sys
from rmm_lab.__main__ import main
assert main(["--help"]) == 0 == main(["-h"]) and main(["merg", "--help"]) == 2
assert not {"torch", "numpy", "tyro"} & set(sys.modules)
"""


def test_the_overview_of_the_commands_waits_for_no_library(tmp_path):
    done = run(HELP, tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("finetune --base", "tables show", "merge --help"):
        assert done.stdout.count(f"python -m rmm_lab {words}") == 2, words
