"""Importing has no effect, and is fast."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import os, random, sys, time
import gymnasium, numpy, torch  # gymnasium sets a variable for pygame
before = (torch.get_num_threads(), torch.initial_seed(), torch.get_default_dtype(),
          torch.is_grad_enabled(), random.getstate(), dict(os.environ), sorted(os.listdir()))
start = time.perf_counter()
import rmm_lab
print(time.perf_counter() - start)
import rmm_lab.search.uniform, rmm_lab.engine.ray_workers, rmm_lab.env, rmm_lab.path
import rmm_lab.ppo, rmm_lab.zoo.build
import rmm_lab.search.rivals
after = (torch.get_num_threads(), torch.initial_seed(), torch.get_default_dtype(),
         torch.is_grad_enabled(), random.getstate(), dict(os.environ), sorted(os.listdir()))
assert before == after
for heavy in ("timm", "transformers", "tokenizers", "datasets", "torchvision", "matplotlib",
              "huggingface_hub", "ray", "optuna", "cmaes"):
    assert heavy not in sys.modules, heavy
"""


def test_import_is_quiet_fast_and_changes_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert float(done.stdout) < 0.3  # seconds over a bare import of torch; nothing else is printed
