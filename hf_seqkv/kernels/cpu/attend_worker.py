"""Entry points of the CPU attention kernel: workers that take task after task."""

from __future__ import annotations

import numpy as np
from numba import carray, cfunc, njit, prange

from .call import CALL, SPLIT, padded, read_row
from .dense import dense_part, merge
from .jit import OPTIONS, pointer, take_number
from .paged import pages_part, prepare, room
from .simd import ROWS
from .threads import Entry

# numba's disk cache looks at this file alone: with what it calls, this line changes (`tests/test_kernel_builds.py`).
CALLS = "82d55ab89e9a382e"


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


@njit(**OPTIONS)
def _prepare(address):
    """Take blocks of query rows until none is left."""
    a = carray(pointer(address), 1, CALL)[0]
    while True:
        task = take_number(a.prepare_next)
        if task >= a.tasks // (a.splits + 1):
            return
        pair, row0 = task // a.blocks, task % a.blocks * ROWS
        query = _query(a, pair, row0, min(ROWS, a.rows - row0))
        prepare(a, query, pair // a.heads, pair % a.heads, row0)


@njit(**OPTIONS)
def _attend(address):
    """Take tasks until none is left.

    A task is a KV head of one row of the batch, up to `ROWS` of its query rows (a query row is a query head and a new
    token), and a part of the tokens: `SPLIT` pages or all dense tokens. Whoever finishes the last part of a head merges
    its parts, in order. Where all pages are one part, nobody else needs what that part prepares.
    """
    a = carray(pointer(address), 1, CALL)[0]
    parts, memory = a.splits + 1, room(a)
    while True:
        task = take_number(a.attend_next)
        if task >= a.tasks:
            return
        part, rest = task // (a.tasks // parts), task % (a.tasks // parts)
        pair, row0 = rest // a.blocks, rest % a.blocks * ROWS
        b, h, rows = pair // a.heads, pair % a.heads, min(ROWS, a.rows - row0)
        if part == a.splits:
            dense_part(a, _query(a, pair, row0, rows), b, h, row0)
        elif part * SPLIT < carray(pointer(a.counts), a.batch, np.int64)[b]:
            if a.splits == 1:
                prepare(a, _query(a, pair, row0, rows), b, h, row0)
            pages_part(a, memory, b, h, part, row0, rows)
        if take_number(a.done + 8 * pair) == parts * a.blocks - 1:
            merge(a, b, h)


@cfunc("void(int64)", cache=True)
def prepare_entry(address):
    _prepare(address)


@cfunc("void(int64)", cache=True)
def attend_entry(address):
    _attend(address)


@njit(cache=True, parallel=True, nogil=True)
def _prepare_on_numbas_pool(address, threads):
    for _ in prange(threads):
        _prepare(address)


@njit(cache=True, parallel=True, nogil=True)
def _attend_on_numbas_pool(address, threads):
    for _ in prange(threads):
        _attend(address)


PREPARE = Entry(prepare_entry, _prepare_on_numbas_pool)
ATTEND = Entry(attend_entry, _attend_on_numbas_pool)
