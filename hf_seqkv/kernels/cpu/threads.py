"""Running a compiled kernel on several threads.

torch brings its own OpenMP pool, whose idle threads spin for a while after each of torch's operations; a second pool
beside it would fight for the same cores. So kernels run on torch's pool where it is libgomp's (Linux wheels), through
`GOMP_parallel`, and on numba's elsewhere.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import torch


@dataclass(frozen=True)
class Entry:
    """A kernel that takes tasks from the record at an address until none is left, however many threads call it.

    Args:
        worker: numba cfunc `void(int64)`.
        on_numbas_pool: njit function of address and thread count that calls the worker's body in a `prange`.
    """

    worker: Any
    on_numbas_pool: Any

    @functools.cached_property
    def alone(self):
        """The worker as a Python function, for one thread."""
        return ctypes.CFUNCTYPE(None, ctypes.c_int64)(self.worker.address)


@functools.cache
def torch_pool():
    """`GOMP_parallel` of the OpenMP library that torch has loaded, or None where torch uses another."""
    folder = Path(torch.__file__).parent
    found = [*folder.glob("lib/libgomp*.so*"), *folder.parent.glob("torch.libs/libgomp*.so*")]
    if not found:
        return None
    function = ctypes.CDLL(str(found[0])).GOMP_parallel
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return function


def count() -> int:
    """Threads a kernel runs on: torch's number, as far as there is a pool that has them."""
    threads = torch.get_num_threads()
    return threads if torch_pool() is not None else min(threads, numba.config.NUMBA_NUM_THREADS)


def run(entry: Entry, address: int, tasks: int) -> None:
    """Run a kernel over the record at `address`, which holds `tasks` tasks."""
    threads = min(count(), tasks)
    if threads <= 1:
        entry.alone(address)
    elif (parallel := torch_pool()) is not None:
        parallel(entry.worker.address, address, threads, 0)
    else:
        before = numba.get_num_threads()
        numba.set_num_threads(threads)
        try:
            entry.on_numbas_pool(address, threads)
        finally:
            numba.set_num_threads(before)
