"""What a run folder stores: round trips, whole files, what is refused."""

from __future__ import annotations

import errno

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rmm_lab.errors import InputError, one_sentence
from rmm_lab.search.run_folder import (
    RunFolder,
    check_new,
    from_csv,
    optimiser_tensors,
    restore_optimiser,
    to_csv,
)
from rmm_lab.tasks.files import write_file

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
        ("updates.csv", "3,1"),
    ],
)
def test_rows_that_the_checkpoint_does_not_know_are_dropped(tmp_path, name, more):
    """A search was stopped after the tables and before the checkpoint."""
    known = saved(tmp_path, 3)
    with (tmp_path / name).open("a") as table:
        table.write(more)
    assert RunFolder(tmp_path).load_checkpoint()[2:] == known


@pytest.mark.parametrize(
    ("name", "left", "message"),
    [
        ("episodes.csv", None, "at least 6 rows in .*episodes.csv, found 0"),
        ("episodes.csv", b"episode,reward,path\n0,0.0,a@0\n", "at least 6 rows .*found 1"),
        ("episodes.csv", b"episode,reward,path\n" + 6 * b"0,0.0\n", "found an altered one"),
        ("episodes.csv", b"episode,reward,path\n" + 6 * b"0,x,a@0\n", "found an altered one"),
        ("episodes.csv", b"episode,reward,path\n" + 6 * b"\xff,0.0,a@0\n", "found an altered one"),
        ("updates.csv", b"update,loss\n0,1.0\n1,0.5\n", "at least 3 rows .*found 2"),
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
    assert folder.read_config() == {"a": 1}
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
