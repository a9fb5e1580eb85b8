"""Entry point of the CPU attention kernel: a worker that takes task after task."""

from __future__ import annotations

import numpy as np
from numba import carray, cfunc, njit, prange

from .call import CALL, SPLIT, padded, read_row
from .dense import dense_part, merge
from .jit import INSIDE, OPTIONS, pointer, take_number, wait_for
from .paged import pages_part, prepare, room
from .simd import ROWS
from .threads import Entry

# numba's disk cache looks at this file alone: with what it calls, this line changes (`tests/test_kernel_builds.py`).
CALLS = "c3155c92debd856c"


@njit(**OPTIONS)
def _query(a, pair, row0, rows):
    """Scaled query rows `[rows, Dk]`, padded with zeros to a multiple of 16 components."""
    dim, item = a.key_dim, 2 if a.bf16 else 4
    out = np.zeros((rows, padded(dim, 16)), np.float32)
    for r in range(rows):
        at = a.query + item * (pair * a.rows + row0 + r) * dim
        read_row(at, a.bf16, dim, out.ctypes.data + 4 * r * out.shape[1])
    out *= a.scaling
    return out


@njit(**INSIDE)
def _attend(address):
    """Take tasks until none is left.

    A task is a KV head of one row of the batch, up to `ROWS` of its query rows (a query row is a query head and a new
    token), and a part of the tokens: `SPLIT` pages or all dense tokens. Whoever finishes the last part of a head merges
    its parts, in order. What several parts need of query rows is prepared by tasks before them, and waited for;
    whoever is waited for has begun, so that this ends however few threads there are.
    """
    a = carray(pointer(address), 1, CALL)[0]
    parts, memory, units = a.splits + 1, room(a), a.batch * a.heads * a.blocks
    prepares = units if a.splits > 1 else 0
    while True:
        task = take_number(a.next)
        if task >= prepares + parts * units:
            return
        part, unit = (task - prepares) // units, task % units
        pair, row0 = unit // a.blocks, unit % a.blocks * ROWS
        b, h, rows = pair // a.heads, pair % a.heads, min(ROWS, a.rows - row0)
        if task < prepares:
            prepare(a, _query(a, pair, row0, rows), b, h, row0)
            take_number(a.ready + 8 * unit)
            continue
        if part == a.splits:
            dense_part(a, _query(a, pair, row0, rows), b, h, row0)
        elif part * SPLIT < carray(pointer(a.counts), a.batch, np.int64)[b]:
            if prepares:
                wait_for(a.ready + 8 * unit)
            else:
                prepare(a, _query(a, pair, row0, rows), b, h, row0)
            pages_part(a, memory, b, h, part, row0, rows)
        if take_number(a.done + 8 * pair) == parts * a.blocks - 1:
            merge(a, b, h)


@cfunc("void(int64)", cache=True, **OPTIONS)
def attend_entry(address):
    _attend(address)


@njit(cache=True, parallel=True, **OPTIONS)
def _on_numbas_pool(address, threads):
    for _ in prange(threads):
        _attend(address)


ATTEND = Entry(attend_entry, _on_numbas_pool)
