"""One call of the CPU attention kernel: the record of everything it works on, and what its parts share."""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from .jit import OPTIONS, copy, pointer
from .simd import add_product

SPLIT = 16  # pages a part of a call takes: fixed, so that results do not depend on the thread count

_SIDE = (
    *("matrix", "matrix_head", "offsets", "widths", "levels", "units", "mean", "dim"),
    *("codes", "scales", "scale_bytes"),
)
# Everything a call works on: addresses, strides in elements, counts, then the floats; first what a codec fixes.
FIXED = ("heads", "size", "page_bytes", *(f"{side}_{name}" for side in ("key", "value") for name in _SIDE))
_OWN = (
    *("query", "out", "bf16", "batch", "rows", "steps", "splits", "blocks"),
    *("mixed", "tops", "totals", "prepared", "next", "done", "ready", "counts", "page_slots"),
    *("dense", "runs", "pages", "page_row", "length", "offset", "causal", "window"),
    *("constant", "starts", "starts_row", "relative", "half", "interleaved"),
    *("mask", "mask_kind", "mask_row", "mask_head", "mask_step", "sink_logits"),
)
CALL = np.dtype(
    [(name, np.int64) for name in (*FIXED, *_OWN)]
    + [(name, np.float32) for name in ("scaling", "softcap", "relative_unit", "unused")]
)
# A run of dense tokens, one of `CALL.runs`: addresses, strides in elements, and how many tokens.
DENSE = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("k", "v", "slots", "each", "begin", "count", "bf16"),
            *("k_row", "k_head", "k_token", "v_row", "v_head", "v_token"),
        )
    ]
)


@njit(**OPTIONS)
def padded(count, multiple):
    return -(-count // multiple) * multiple


@njit(**OPTIONS)
def read_row(address, bf16, count, out):
    """`count` numbers at an address, bf16 or fp32, to the address `out` as fp32."""
    if bf16:
        raw, bits = carray(pointer(address), count, np.uint16), carray(pointer(out), count, np.int32)
        for d in range(count):
            bits[d] = np.int32(np.uint32(raw[d]) << np.uint32(16))
    else:
        copy(carray(pointer(address), count, np.float32), carray(pointer(out), count, np.float32))


@njit(**OPTIONS)
def write_row(row, address, bf16):
    """The inverse of `read_row`, rounded to the nearest, of two to the even one."""
    if bf16:
        raw, bits = carray(pointer(address), row.shape[0], np.uint16), row.view(np.int32)
        for d in range(row.shape[0]):
            rounded = (bits[d] + np.int32(0x7FFF) + (bits[d] >> np.int32(16) & np.int32(1))) >> np.int32(16)
            raw[d] = np.uint16(rounded if row[d] == row[d] else np.int32(0x7FC0))
    else:
        copy(row, carray(pointer(address), row.shape[0], np.float32))


@njit(**OPTIONS)
def rotated_rows(rows, address, dim):
    """`rows [R, dim]` times the matrix `[dim, columns]` at an address."""
    columns = padded(dim, 32)
    out = np.zeros((rows.shape[0], columns), np.float32)
    add_product(rows, address, columns, out, rows.shape[0], dim, columns)
    return out


@njit(**OPTIONS)
def unlimited(a, slot, count):
    """Whether `limit` would do nothing to `count` tokens from a slot on, for every query."""
    plain = a.softcap == 0 and a.mask_kind == 0 and a.window == 0 and slot >= a.offset
    return plain and (not a.causal or slot + count <= a.length - a.steps + 1)


@njit(**OPTIONS)
def limit(a, row, b, head, step, slot):
    """Softcap, mask, window and causality of one row of scores; token `j` has slot `slot + j`."""
    size = row.shape[0]
    if a.softcap > 0:
        for j in range(size):
            row[j] = a.softcap * np.tanh(row[j] / a.softcap)
    at = b * a.mask_row + head * a.mask_head + step * a.mask_step + slot - a.offset
    first = max(0, a.offset - slot)
    if a.mask_kind == 1:
        seen = carray(pointer(a.mask + at + first), max(0, size - first), np.uint8)
        for j in range(first, size):
            row[j] = row[j] if seen[j - first] else -np.inf
    elif a.mask_kind == 2:
        added = carray(pointer(a.mask + 4 * (at + first)), max(0, size - first), np.float32)
        for j in range(first, size):
            row[j] += added[j - first]
    here = a.length - a.steps + step
    if a.window > 0:
        first = max(first, here - a.window + 1 - slot)
    last = here + 1 - slot if a.causal else size
    for j in range(min(first, size)):
        row[j] = -np.inf
    for j in range(max(last, 0), size):
        row[j] = -np.inf
