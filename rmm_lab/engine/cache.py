"""Memory: how much is free, what is kept within a budget, and what a process keeps for itself."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmm_lab.errors import InputError

# A container's limit and use, version 2 and 1 of Linux' control groups.
_CONTAINER = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def free_bytes(device: str = "cpu") -> int:
    """Bytes that a process may still take: of the machine or its container, or of a GPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    free = int(psutil.virtual_memory().available)
    for limit, used in _CONTAINER:
        if Path(limit).is_file() and (text := Path(limit).read_text().strip()).isdigit():
            free = min(free, int(text) - int(Path(used).read_text()))
    return max(0, free)


def keep_freed_memory() -> bool:
    """Let the process reuse memory that it frees; False where that cannot be set.

    A layer's activations are some hundred kilobytes: glibc returns such blocks to the system and asks for
    them again, page by page, at every layer. In exchange, up to 1 GiB stays with the process.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's; other C libraries have none
    if mallopt is None:
        return False
    trim_threshold, mmap_threshold = -1, -3  # <malloc.h>
    return bool(mallopt(mmap_threshold, 2**25) and mallopt(trim_threshold, 2**30))


class Cache:
    """What was computed, by key, within a budget of bytes; the least recently used goes first.

    Bytes are those of the tensors' memory, each counted once however many values share it. Safe to use
    from several threads. A copy or pickle is an empty cache of the same budget.

    Args:
        budget: bytes that may be held; 0 keeps nothing.
    """

    def __init__(self, budget: int) -> None:
        if budget < 0:
            raise InputError(f"cache: expected a budget of 0 bytes or more, found {budget}")
        self.budget, self.bytes, self.peak, self.evicted = budget, 0, 0, 0
        self._values: OrderedDict[Hashable, tuple[Any, set[tuple[int, int]]]] = OrderedDict()
        # Address and bytes of a tensor's memory -> number of values that hold it.
        self._holders: dict[tuple[int, int], int] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Cache], tuple[int]]:
        return Cache, (self.budget,)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: Hashable) -> bool:
        """Whether a value is kept under a key; this counts as no use of it."""
        return key in self._values

    def get(self, key: Hashable) -> Any:
        """The value kept under a key, which counts as a use; None if there is none."""
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def put(
        self,
        key: Hashable,
        value: Any,
        tensors: Iterable[Tensor],
        spare: Callable[[Any], bool] = lambda other: False,
    ) -> None:
        """Keep a value that holds ``tensors``, and forget the oldest until the budget is met.

        A value larger than the whole budget is not kept, and displaces nothing. Keys that ``spare`` accepts
        are not forgotten for it: where they leave no room, the value is not kept.
        """
        memory = {
            (s.data_ptr(), s.nbytes()) for s in (t.untyped_storage() for t in tensors) if s.nbytes()
        }
        if sum(n for _, n in memory) > self.budget or not self.budget:
            return
        with self._lock:
            if key in self._values:
                self._drop(key)
            # Room first: the budget holds at every moment.
            old = (other for other in list(self._values) if not spare(other))
            while self.bytes + self._new(memory) > self.budget:
                if (other := next(old, None)) is None:
                    return
                self._drop(other)
                self.evicted += 1
            self.bytes += self._new(memory)
            for part in memory:
                self._holders[part] = self._holders.get(part, 0) + 1
            self._values[key] = value, memory
            self.peak = max(self.peak, self.bytes)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            while self._values:
                self._drop(next(iter(self._values)))

    def _new(self, memory: set[tuple[int, int]]) -> int:
        return sum(part[1] for part in memory if part not in self._holders)

    def _drop(self, key: Hashable) -> None:
        _, memory = self._values.pop(key)
        for part in memory:
            self._holders[part] -= 1
            if not self._holders[part]:
                del self._holders[part]
                self.bytes -= part[1]
