"""kill -9 at random moments: a run that goes on ends as an unbroken one.

    python tests/kills.py FOLDER N SEED [KIND ...]

Each search of ``KINDS`` is killed N times, then finished and compared, to the byte, with the one that was
left alone. Searches run in forks of this process, so that moments fall into them and not into imports.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from conftest import write_images, write_model

from rmm_lab.__main__ import main

MENU = "least_squares:fit=whole,ridge=0.01"
KINDS = {
    "default": ["--operators", MENU, "--episodes-per-update", "5", "--episodes", "40"],
    "paper": ["--preset", "paper", "--episodes", "40"],
    "weights": ["--preset", "weights", "--episodes", "60"],
    "least squares": [
        *("--preset", "agent", "--operators", "least_squares", "--stem", "least_squares"),
        *("--episodes", "24", "--episodes-per-update", "4"),
    ],
    "front": ["--operators", MENU, "--episodes-per-update", "5", "--episodes", "40", "--front"],
}
TIMED = {
    "table.json",
    "table.md",
    "README.md",
    "rewards.png",
}  # seconds; figures have no bytes to keep
KEPT = 0.25  # the share of kills after which the run is first finished and compared


def models(root: Path) -> list[str]:
    """The options that name a tiny base, two experts and their pictures."""
    write_model(root / "base", 0)
    for i in (1, 2):  # which learn something, or there is no front
        write_images(root / f"i{i}", i, per_class=6)
        words = ["finetune", "--base", "base", "--images", f"i{i}", "--out", f"e{i}"]
        assert not main([*words, "--steps", "60", "--batch-size", "18", "--learning-rate", "0.01"])
    named = ["--base", "base", "--experts", "e1", "e2", "--images", "i1", "i2"]
    return [
        *named,
        "--data-fraction",
        "0.25",
        "--calibration",
        "10",
        "--compare",
        "paper",
        "--quiet",
    ]


def start(argv: list[str]) -> int:
    """A search in a fork of this process; its number."""
    if (child := os.fork()) == 0:
        code = 1
        try:
            code = main(argv)
        finally:
            os._exit(code)
    return child


def ended(child: int, seconds: float | None = None) -> bool:
    """Wait for a search, or kill it after so many seconds; whether it ended by itself, with exit code 0."""
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return False
    assert os.waitstatus_to_exitcode(status) == 0
    return True


def results(folder: Path) -> dict[str, bytes]:
    """What must be equal, by name."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name not in TIMED)
    found = {str(p.relative_to(folder)): p.read_bytes() for p in files}
    found["config.json"] = found["config.json"].replace(str(folder).encode(), b"")
    del found["checkpoint.safetensors"]  # which knows the SHA-256 of config.json, with its folder
    return found


def kills(kind: str, options: list[str], n: int, draw: random.Random) -> None:
    """Kill a search n times, and compare."""
    whole, broken = Path.cwd() / f"{kind}-whole", Path.cwd() / f"{kind}-broken"
    begun = time.perf_counter()
    assert ended(start([*options, "--run-dir", str(whole)]))
    took, known = time.perf_counter() - begun, results(whole)
    rows: list[int] = []
    # What config.json does not hold.
    resume = [
        "--resume",
        str(broken),
        *options[-3:],
        *(["--front"] if "--front" in options else []),
    ]
    while len(rows) < n:
        again = (broken / "config.json").exists()
        argv = resume if again else [*options, "--run-dir", str(broken)]
        if not ended(start(argv), draw.uniform(0, 0.6 * took)):
            table = broken / "episodes.csv"
            rows.append(max(0, table.read_bytes().count(b"\n") - 1) if table.exists() else -1)
            if draw.random() > KEPT and len(rows) < n:
                continue
        if (broken / "config.json").exists():
            assert ended(start(resume))
            assert results(broken) == known, (kind, rows)
            shutil.rmtree(broken)
    print(
        f"{kind}: {took:.1f} s alone, killed {n} times with rows {rows}: equal to the byte",
        flush=True,
    )


if __name__ == "__main__":
    place, times, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    os.chdir(place)
    common = models(place)
    for kind, own in KINDS.items():
        if sys.argv[4:] and kind not in sys.argv[4:]:
            continue
        kills(kind, [*own, *common], times, random.Random(seed))
