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
import rmm_lab.baselines, rmm_lab.cluster, rmm_lab.env, rmm_lab.path, rmm_lab.ppo, rmm_lab.zoo
import rmm_lab.searches
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


def test_imports_go_one_way():
    """operators and models import nothing of ours; nothing above imports what stands below it."""
    import ast
    from pathlib import Path

    import rmm_lab

    order = (
        *("errors", "operators", "parts", "vit", "t5", "memory", "metrics", "models"),
        *("hub", "render", "images", "image_formats", "tasks"),
        *("grammar", "formats", "texts", "training"),
        *(
            "pool",
            "scoring",
            "surrogate",
            "scales",
            "cluster",
            "zoo",
            "path",
            "problem",
            "env",
            "baselines",
        ),
        "searches",
        *("runs", "plots", "sheets", "sheet_figures", "report", "ppo"),
        *("cells", "paper_scale", "tables", "excerpts", "bench"),
        *("model_pictures", "search_pictures", "result_pictures", "pictures"),
        *("tiny", "walk", "views", "explorers", "widgets", "checks", "course"),
    )
    folder = Path(rmm_lab.__file__).parent
    assert {p.stem for p in folder.glob("*.py")} - {"__init__"} == set(order)
    allowed_late = {
        ("report", "ppo"),
        ("env", "problem"),
    }  # a type only; the demo's pair by default
    for i, name in enumerate(order):
        tree = ast.parse((folder / f"{name}.py").read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rmm_lab"):
                module = node.module.removeprefix("rmm_lab").lstrip(".")
                used = [module] if module else [a.name for a in node.names]
                for other in used:
                    if other in order and (name, other) not in allowed_late:
                        assert order.index(other) < i, f"{name} imports {other}"
    for name in ("operators", "parts"):
        text = (folder / f"{name}.py").read_text("utf-8")
        own = {line for line in text.splitlines() if line.strip().startswith("from rmm_lab")}
        assert own <= {"from rmm_lab.errors import InputError"}
