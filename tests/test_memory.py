"""The cache against a list searched by hand, from several threads, and the process's own memory."""

from __future__ import annotations

import copy
import ctypes
import os
import pickle
import subprocess
import sys
import threading

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rmm_lab.engine import cache as memory
from rmm_lab.engine.cache import Cache, free_bytes, keep_freed_memory
from rmm_lab.errors import InputError


def block(n: int) -> torch.Tensor:
    """A tensor of n bytes, alone in its memory."""
    return torch.zeros(n, dtype=torch.uint8)


def put(cache: Cache, key, *tensors: torch.Tensor) -> None:
    cache.put(key, tensors, tensors)


def keys(cache: Cache) -> list:
    """What is kept, of the keys used here."""
    found = [key for key in (*"abcde", "large", "in pieces", "last") if key in cache]
    assert len(found) == len(cache)
    return found


def held(values) -> int:
    """Bytes of the distinct memory of tuples of tensors."""
    storages = {}
    for value in values:
        for tensor in value:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


# ---------------------------------------------------------------------------------------- by hand


def test_the_least_recently_used_goes_first():
    cache = Cache(30)
    for key in "abc":
        put(cache, key, block(10))
    assert (keys(cache), cache.bytes, cache.evicted) == (["a", "b", "c"], 30, 0)
    assert cache.get("a") is not None  # now b is the oldest
    put(cache, "d", block(10))
    assert (keys(cache), cache.bytes, cache.evicted) == (["a", "c", "d"], 30, 1)
    assert cache.get("b") is None
    put(cache, "e", block(15))  # needs the places of two
    assert (keys(cache), cache.bytes, cache.evicted) == (["d", "e"], 25, 3)
    assert (cache.peak, len(cache)) == (30, 2)


def test_a_value_comes_back_as_itself():
    cache, tensor = Cache(10), block(10)
    value = {"any": tensor}
    cache.put("a", value, [tensor])
    assert cache.get("a") is value


def test_memory_that_values_share_counts_once():
    cache, shared = Cache(100), block(40)
    put(cache, "a", shared, block(10))
    put(cache, "b", shared[:7], shared.view(4, 10), block(20))  # views of the same memory
    assert cache.bytes == 70
    put(cache, "c", block(30))
    assert cache.bytes == 100
    put(cache, "d", block(10))  # a goes, but b still holds what they share
    assert (keys(cache), cache.bytes) == (["b", "c", "d"], 100)
    put(cache, "e", block(1))  # b goes, and the 40 with it
    assert (keys(cache), cache.bytes) == (["c", "d", "e"], 41)


def test_room_is_made_for_what_is_new_alone():
    """A value of 90 of which 80 are held already displaces nothing in a cache of 100."""
    cache, shared = Cache(100), block(80)
    put(cache, "a", shared)
    put(cache, "b", block(10))
    put(cache, "c", shared, block(10))
    assert (keys(cache), cache.bytes) == (["a", "b", "c"], 100)


def test_a_view_holds_all_of_its_memory():
    cache = Cache(100)
    put(cache, "a", block(101)[:3])
    assert (len(cache), cache.bytes) == (0, 0)


def test_a_value_larger_than_the_budget_displaces_nothing():
    cache = Cache(30)
    for key in "ab":
        put(cache, key, block(15))
    put(cache, "large", block(31))
    put(cache, "in pieces", block(16), block(15))
    assert (keys(cache), cache.bytes, cache.evicted) == (["a", "b"], 30, 0)
    put(cache, "c", block(30))  # as large as the budget
    assert (keys(cache), cache.bytes) == (["c"], 30)


def test_what_is_spared_stays_and_the_new_value_goes():
    cache = Cache(30)
    for key in "abc":
        put(cache, key, block(10))

    def spare(other):
        return other in "bc"

    cache.put("d", None, [block(10)], spare)  # in a's place
    assert (keys(cache), cache.evicted) == (["b", "c", "d"], 1)
    cache.put("e", None, [block(20)], spare)  # d's place is not enough
    assert "e" not in cache
    assert {"b", "c"} <= set(keys(cache))
    assert cache.bytes <= 30


def test_a_key_that_is_put_again_holds_the_new_value_alone():
    cache, new = Cache(30), block(12)
    put(cache, "a", block(10))
    put(cache, "b", block(10))
    put(cache, "a", new)
    assert (keys(cache), cache.bytes, cache.evicted) == (["a", "b"], 22, 0)
    assert cache.get("a")[0] is new
    put(cache, "a", new, block(1))  # part of the old value's memory
    assert (keys(cache), cache.bytes) == (["a", "b"], 23)


def test_a_budget_of_nothing_keeps_nothing():
    cache = Cache(0)
    put(cache, "a", block(1))
    put(cache, "b", block(0))
    assert (len(cache), cache.bytes, cache.peak) == (0, 0, 0)


def test_a_budget_below_nothing_is_refused():
    with pytest.raises(InputError, match="expected a budget of 0 bytes or more, found -1"):
        Cache(-1)


def test_memory_of_one_address_but_two_lengths():
    """Two tensors over one numpy array, of which one sees a part: whatever goes first, 0 is left."""
    array = np.zeros(100, np.uint8)
    for first, second in ((array, array[:40]), (array[:40], array)):
        cache = Cache(200)
        put(cache, "a", torch.from_numpy(first))
        put(cache, "b", torch.from_numpy(second))
        put(cache, "c", block(200))
        assert (keys(cache), cache.bytes) == (["c"], 200)


# ------------------------------------------------------------------------------------ properties


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 60),
    st.lists(st.integers(1, 25), min_size=1, max_size=6),
    st.lists(
        st.tuples(st.integers(0, 4), st.none() | st.lists(st.integers(0, 5), max_size=3)),
        max_size=40,
    ),
)
def test_bytes_and_order_are_those_of_a_list(budget, sizes, calls):
    """Against a list of (key, value) in the order of use, whose memory is summed anew each time."""
    cache, blocks = Cache(budget), [block(n) for n in sizes]
    kept: list[tuple[int, tuple[torch.Tensor, ...]]] = []
    for key, numbers in calls:
        own = next((pair for pair in kept if pair[0] == key), None)
        if numbers is None:
            assert cache.get(key) is (own[1] if own else None)
            if own:
                kept = [*(pair for pair in kept if pair is not own), own]
        else:
            value = tuple(blocks[i % len(blocks)].view(-1, 1)[1:] for i in numbers)
            cache.put(key, value, value)
            if budget and held([value]) <= budget:
                kept = [pair for pair in kept if pair[0] != key]
                while held([v for _, v in kept] + [value]) > budget:
                    del kept[0]
                kept.append((key, value))
        assert [k for k in range(5) if k in cache] == sorted(k for k, _ in kept)
        assert cache.bytes == held(v for _, v in kept) <= budget
        assert cache.bytes <= cache.peak <= budget


def test_threads_that_hammer_one_cache_keep_its_invariants():
    cache, shared = Cache(5_000), [block(n) for n in (100, 700, 1_300)]
    wrong: list[object] = []

    def hammer(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for _ in range(1500):
                key = int(rng.integers(30))
                if rng.random() < 0.4:
                    value = cache.get(key)
                    if value is not None and int(value[0][0]) != key:
                        wrong.append((key, value))
                else:
                    own = torch.full((int(rng.integers(1, 400)),), key, dtype=torch.uint8)
                    put(cache, key, own, shared[int(rng.integers(3))])
                if not 0 <= cache.bytes <= cache.budget:
                    wrong.append(cache.bytes)
        except Exception as error:  # of a thread, which would be lost
            wrong.append(error)

    threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
    assert cache.evicted > 100  # room was scarce
    assert cache.bytes == held(cache.get(key) for key in range(30) if key in cache)
    assert cache.bytes <= cache.budget
    put(cache, "last", block(5_000))
    assert (cache.bytes, keys(cache)) == (5_000, ["last"])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_is_empty_and_has_the_same_budget(copied):
    cache = Cache(30)
    put(cache, "a", block(10))
    other = copied(cache)
    assert (len(other), other.bytes, other.budget) == (0, 0, 30)
    put(other, "b", block(30))
    assert (keys(cache), keys(other)) == (["a"], ["b"])


# ------------------------------------------------------------------------------ free, and given back


def test_free_bytes_are_the_machines_or_the_containers(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CONTAINER", ())
    assert free_bytes() == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    limit, used = tmp_path / "max", tmp_path / "current"
    monkeypatch.setattr(memory, "_CONTAINER", ((str(limit), str(used)),))
    limit.write_text("5000000\n")
    used.write_text("1200000\n")
    assert free_bytes() == 3_800_000
    used.write_text("5000001\n")
    assert free_bytes() == 0
    limit.write_text("max\n")  # no limit
    assert free_bytes() > 3_800_000
    limit.write_text(f"{2**63}\n")  # version 1 writes a huge number
    assert free_bytes() == pytest.approx(psutil.virtual_memory().available, rel=0.2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
def test_free_bytes_of_a_gpu_are_its_own():
    total = torch.cuda.get_device_properties(0).total_memory
    before = free_bytes("cuda")
    kept = torch.zeros(2**28, dtype=torch.uint8, device="cuda")
    assert before - free_bytes("cuda") >= kept.nbytes // 2
    assert 0 < before <= total


FAULTS = """
import resource, sys
import torch
from rmm_lab.engine.cache import keep_freed_memory

torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert keep_freed_memory() is True

def allocate(times):
    for _ in range(times):  # four of 1 MiB at a time, written and freed, as a layer's activations
        tensors = [torch.ones(2**18) for _ in range(4)]
        del tensors

allocate(5)  # the first ones ask the system for memory in any case
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
allocate(50)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def is_glibc() -> bool:
    return sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


@pytest.mark.slow
@pytest.mark.skipif(not is_glibc(), reason="mallopt is glibc's")
def test_freed_memory_is_used_again():
    """200 times 1 MiB are 51,200 pages of 4 KiB: asked for one by one, or hardly at all."""

    resource = pytest.importorskip("resource", reason="the count of page faults is Unix's")

    def faults(how: str) -> int:
        command = [sys.executable, "-c", FAULTS, how]
        # glibc moves its thresholds by itself, now and then far enough for so plain a case: not here.
        env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, check=True, timeout=120
        )
        return int(done.stdout)

    kept, given_back = faults("keep"), faults("give back")
    assert given_back > 200 * 2**20 / resource.getpagesize() / 4
    assert kept < given_back / 5


def test_other_systems_are_left_alone(monkeypatch):
    calls = []

    class Library:
        def __init__(self, name):
            calls.append(name)

    monkeypatch.setattr(memory.ctypes, "CDLL", Library)
    assert keep_freed_memory() is False  # a C library without mallopt
    before = len(calls)
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert keep_freed_memory() is False
    assert len(calls) == before


def test_a_cleared_cache_holds_nothing_and_goes_on():
    cache = Cache(1000)
    shared = torch.zeros(50)
    cache.put("a", 1, [shared])
    cache.put("b", 2, [shared, torch.zeros(10)])
    assert cache.bytes == 240
    cache.clear()
    assert (len(cache), cache.bytes, cache.get("a")) == (0, 0, None)
    cache.put("a", 3, [shared])
    assert (cache.bytes, cache.get("a"), cache.peak) == (200, 3, 240)
