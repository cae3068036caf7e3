"""What a run folder stores: round trips, whole files, what is refused."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rmm_lab.errors import InputError, one_sentence
from rmm_lab.search.run_folder import (
    RunFolder,
    from_csv,
    optimiser_tensors,
    restore_optimiser,
    to_csv,
)
from rmm_lab.tasks.files import write_file
from rmm_lab.tasks.hold import LOCK, check_new, held, held_new

numbers = st.one_of(st.integers(-(10**12), 10**12), st.floats(allow_nan=False))
texts = st.sampled_from(["digits@0 ties:density=0.3,scale=1@2", "007", "1e5", "", 'a "b"', "3 4"])


@given(st.lists(st.fixed_dictionaries({"n": numbers, "path": texts, "actions": texts}), min_size=1))
def test_rows_come_back_from_csv_as_they_were(rows):
    assert from_csv(to_csv(rows)) == rows


def test_text_that_looks_like_a_number_stays_text():
    rows = [{"commit": c, "mean": m} for c, m in (("0012345", 2), ("12e4567", 1.5), ("007", 0))]
    assert from_csv(to_csv(rows), texts=("commit",)) == rows
    assert from_csv("actions,subset\n007,007\n") == [{"actions": "007", "subset": 7}]
    with pytest.raises(ValueError, match="digits"):
        from_csv("reward\ndigits\n")


def test_write_replaces_whole_files_only(tmp_path, monkeypatch):
    file = tmp_path / "table.csv"
    write_file(file, "old")

    def full(self, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="No space") as caught:
        write_file(file, "new")
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]
    assert "expected space on the device" in one_sentence(caught.value)


def saved(path, n):
    """A folder after n updates of two episodes each, and its rows."""
    episodes = [{"episode": i, "reward": i / 3, "path": f"a@{i % 7}"} for i in range(2 * n)]
    updates = [{"update": i, "loss": 1 / (i + 1)} for i in range(n)]
    for i in range(1, n + 1):
        tensors = {"w": torch.tensor([i, float("nan")])}
        RunFolder(path).save_checkpoint(tensors, {"dar": 0.5 * i}, episodes[: 2 * i], updates[:i])
    return episodes, updates


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    assert RunFolder(tmp_path).load_checkpoint() is None
    episodes, updates = saved(tmp_path, 3)
    tensors, counters, *tables = RunFolder(tmp_path).load_checkpoint()
    assert tables == [episodes, updates]
    assert counters["dar"] == 1.5
    assert tensors["w"].isnan().tolist() == [False, True]
    assert float(tensors["w"][0]) == 3


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("episodes.csv", "6,2.0,a@6\n"),
        ("episodes.csv", "6,2.0,a@6\n7,2.3,a"),
        ("updates.csv", "3,1\n"),
    ],
)
def test_rows_that_the_checkpoint_does_not_know_are_dropped(tmp_path, name, more):
    """A search was stopped after the tables and before the checkpoint."""
    known = saved(tmp_path, 3)
    if name == "updates.csv":
        add(tmp_path / "episodes.csv", "6,2.0,a@6\n")
    add(tmp_path / name, more)
    assert RunFolder(tmp_path).load_checkpoint()[2:] == known


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("episodes.csv", "7,2.0,a@6\n"),
        ("episodes.csv", "6,2.0,a@6\n6,2.0,a@6\n"),
        ("episodes.csv", "6,2.0,a@6\n7,2.0,a@6\n8,2.0,a@6\n"),
        ("episodes.csv", "6,2.0\n"),
        ("updates.csv", "3,1\n"),  # they come after their episodes
        ("updates.csv", "3,1\n4,1\n"),
    ],
)
def test_rows_beyond_that_no_stop_leaves_are_found(tmp_path, name, more):
    """Of two processes, say: numbers twice or left out, more than all, more than one update."""
    saved(tmp_path, 3)
    if more.count("\n") == 2 and name == "updates.csv":
        add(tmp_path / "episodes.csv", "6,2.0,a@6\n")
    add(tmp_path / name, more)
    with pytest.raises(InputError, match=r"start the search again"):
        RunFolder(tmp_path).load_checkpoint(8)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("episodes.csv", lambda t: t.replace(b"1,0.333", b"1,7.5", 1)),
        ("episodes.csv", lambda t: b"".join(swapped(t.splitlines(True), 2, 3))),
        ("episodes.csv", lambda t: b"".join(swapped(t.splitlines(True), 5, 6)[:-1])),
        ("updates.csv", lambda t: t.replace(b"1.0", b"1.1", 1)),
        ("checkpoint.safetensors", lambda t: t[:-5] + bytes([t[-5] ^ 1]) + t[-4:]),
        ("checkpoint.safetensors", lambda t: t.replace(b'dar\\": 1.5', b'dar\\": 1.4')),
    ],
    ids=["edited", "swapped", "dropped", "an update", "a flipped bit", "a counter"],
)
def test_what_was_altered_is_found(tmp_path, name, change):
    saved(tmp_path, 3)
    file = tmp_path / name
    altered = change(file.read_bytes())
    assert altered != file.read_bytes()
    file.write_bytes(altered)
    with pytest.raises(InputError, match=f"--resume: .*{name}"):
        RunFolder(tmp_path).load_checkpoint()


def test_rows_without_their_checkpoint_are_found(tmp_path):
    saved(tmp_path, 3)
    (tmp_path / "checkpoint.safetensors").unlink()
    with pytest.raises(InputError, match=r"--resume: expected .* 0 episodes and 0 updates"):
        RunFolder(tmp_path).load_checkpoint()


def test_a_part_that_changed_is_named(tmp_path):
    parts = {"the base": "0" * 64, "expert one": "1" * 64}
    folder = RunFolder.create(tmp_path / "run", {"a": 1}, parts)
    folder.save_checkpoint({"w": torch.ones(2)}, {}, [{"episode": 0}], [])
    assert RunFolder(folder.path, parts).load_checkpoint() is not None
    with pytest.raises(InputError, match=r"expected expert one as .*111.*found another .222"):
        RunFolder(folder.path, parts | {"expert one": "2" * 64}).load_checkpoint()
    add(folder.path / "config.json", " ")
    with pytest.raises(InputError, match=r"expected .*run/config.json as when"):
        RunFolder(folder.path, parts).load_checkpoint()


def add(file, text):
    with file.open("a") as table:
        table.write(text)


def swapped(lines, i, j):
    lines[i], lines[j] = lines[j], lines[i]
    return lines


def test_a_folder_is_held_by_one_alone(tmp_path):
    with held(tmp_path, "--resume"):
        for hold in (held, held_new):
            by = r"^--x: .* held by process \d+ on .* since 2"
            with pytest.raises(InputError, match=by), hold(tmp_path, "--x"):
                pass
    assert not list(tmp_path.iterdir())
    with held_new(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "kept").write_text("")
        with pytest.raises(InputError, match=by), held_new(tmp_path / "a" / "b", "--x"):
            pass
    with pytest.raises(InputError, match="found files"), held_new(tmp_path / "a" / "b"):
        pass
    (tmp_path / "a" / "b" / "kept").unlink()
    (tmp_path / "a" / "b" / LOCK).write_text("of a process that was killed")
    with held_new(tmp_path / "a" / "b"):
        pass
    with held_new(tmp_path / "new" / "below"):
        pass  # what is left empty goes again, but for what was there before
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "b"]


HOLDING = """
import sys
from pathlib import Path
from rmm_lab.errors import InputError
from rmm_lab.tasks.hold import held_new
folder = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
try:
    with held_new(folder):
        print("mine", flush=True)
        (folder / "result").write_text("mine")
        sys.stdin.readline()
except InputError as error:
    print(error, flush=True)
"""


def test_of_several_processes_that_start_at_once_one_gets_the_folder(tmp_path):
    command, pipe = [sys.executable, "-c", HOLDING, str(tmp_path / "run")], subprocess.PIPE
    with contextlib.ExitStack() as ends:
        started = [
            ends.enter_context(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True))
            for _ in range(4)
        ]
        for process in started:
            assert process.stdout.readline() == "ready\n"
        for process in started:
            process.stdin.write("\n")
            process.stdin.flush()
        said = [process.stdout.readline() for process in started]
        for process in started:
            process.communicate("\n", timeout=60)
    assert said.count("mine\n") == 1
    assert sum("held by" in line or "found files" in line for line in said) == 3
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["result"]


@pytest.mark.parametrize(
    ("name", "left", "message"),
    [
        ("episodes.csv", None, "the 6 rows in .*episodes.csv .*found only 0"),
        ("episodes.csv", b"episode,reward,path\n0,0.0,a@0\n", "the 6 rows .*found only 1"),
        ("episodes.csv", b"episode,reward,path\n" + 6 * b"0,0.0\n", "found others"),
        ("episodes.csv", b"episode,reward,path\n" + 6 * b"0,x,a@0\n", "found others"),
        ("episodes.csv", b"episode,reward,path\n" + 6 * b"\xff,0.0,a@0\n", "found others"),
        ("updates.csv", b"update,loss\n0,1.0\n1,0.5\n", "the 3 rows .*found only 2"),
        ("checkpoint.safetensors", b"", "found a truncated or altered one"),
        ("checkpoint.safetensors", b"\0" * 40, "found a truncated or altered one"),
    ],
)
def test_what_is_not_whole_is_refused(tmp_path, name, left, message):
    saved(tmp_path, 3)
    (tmp_path / name).unlink()
    if left is not None:
        (tmp_path / name).write_bytes(left)
    with pytest.raises(InputError, match=message):
        RunFolder(tmp_path).load_checkpoint()


@pytest.mark.parametrize("content", [None, b"", b"[", b"3", b"\xff"])
def test_a_folder_without_a_config_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match="--resume: expected a run folder"):
        RunFolder(tmp_path).read_config()


def test_a_folder_in_memory_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = RunFolder.create(None, {"a": 1})
    folder.save_checkpoint({}, {}, [], [])
    folder.write("path.json", "{}")
    assert folder.load_checkpoint() is None
    assert not list(tmp_path.iterdir())


def test_a_new_folder_is_absent_or_empty(tmp_path):
    check_new(tmp_path)
    folder = RunFolder.create(tmp_path / "new" / "below", {"a": 1})
    assert folder.read_config() == {"a": 1, "run_folder": str(tmp_path / "new" / "below")}
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="found files"):
        RunFolder.create(tmp_path / "new" / "below", {})
    with pytest.raises(InputError, match="is a file"):
        check_new(tmp_path / "file" / "below")


def test_an_optimiser_goes_on_from_its_tensors():
    def step(weights, optimiser):
        optimiser.zero_grad()
        (weights**2).sum().backward()
        optimiser.step()

    def adam(start):
        weights = torch.nn.Parameter(torch.tensor(start))
        return weights, torch.optim.Adam([weights], lr=0.1)

    weights, optimiser = adam([1.0, 2.0])
    for _ in range(3):
        step(weights, optimiser)
    other, again = adam(weights.tolist())
    tensors = {name: t.clone() for name, t in optimiser_tensors(optimiser, "adam").items()}
    restore_optimiser(again, tensors | {"agent.0.weight": torch.ones(1)}, "adam")
    step(weights, optimiser)
    step(other, again)
    assert torch.equal(weights, other)


# -------------------------------------------------------------------------------- odd files in a folder


@pytest.mark.skipif(sys.platform == "win32", reason="links need a right there")
def test_a_link_in_a_folder_does_not_have_its_target_written_over(tmp_path):
    precious, folder = tmp_path / "precious", tmp_path / "run"
    precious.write_text("mine")
    folder.mkdir()
    for name in (LOCK, ".config.json.tmp"):
        (folder / name).symlink_to(precious)
    with pytest.raises(InputError, match="found a link"), held(folder, "--resume"):
        pass
    write_file(folder / "config.json", "{}")
    assert (folder / "config.json").read_text() == "{}"
    assert precious.read_text() == "mine"


@pytest.mark.timeout(60)
@pytest.mark.skipif(sys.platform == "win32", reason="has no pipes in folders")
@pytest.mark.parametrize("kind", ["pipe", "folder"])
@pytest.mark.parametrize("name", ["config.json", "episodes.csv", "checkpoint.safetensors", LOCK])
def test_files_of_a_run_are_regular_ones(tmp_path, name, kind):
    """A pipe would be waited for, and a device such as /dev/zero never ends."""
    saved(tmp_path, 2)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name) if kind == "pipe" else (tmp_path / name).mkdir()
    folder = RunFolder(tmp_path)
    reads = {
        "config.json": folder.read_config,
        LOCK: lambda: held(tmp_path, "--resume").__enter__(),
    }
    with pytest.raises(InputError, match=name if name != "config.json" else "--resume"):
        reads.get(name, folder.load_checkpoint)()


def test_a_folder_in_the_place_of_a_result_is_told_before_the_search_goes_on(tmp_path):
    folder = RunFolder.create(tmp_path / "run", {})
    for name in ("notes.json", "cross-task.png"):
        (tmp_path / "run" / name).mkdir()
        with pytest.raises(InputError, match=rf"--resume: .*{name}, found a folder; move it away"):
            folder.load_checkpoint()
        (tmp_path / "run" / name).rmdir()
    assert folder.load_checkpoint() is None
