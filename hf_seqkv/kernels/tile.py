"""Work on one tile `[D, P]` of a page, compiled by numba: expand codes to levels, score, softmax, mix.

The pieces of `cpu.py`'s kernel. Matrix work goes through `simd.py`; the rest are loops that LLVM vectorises.
"""

from __future__ import annotations

import functools

import numpy as np
from numba import njit

from . import simd

LANES = simd.LANES
# numba's disk cache looks at this file alone: with what it calls, this line changes (`tests/test_kernels.py`).
CALLS = "5ff0bae611b65b0f"
# No "nnan" or "ninf": masked scores are minus infinity.
FAST = {"reassoc", "contract", "nsz", "arcp"}
_jit = functools.partial(njit, fastmath=FAST, error_model="numpy", nogil=True, cache=True)


@_jit
def score_rows(query, tile, scores, rows, dim, columns):
    """`scores[:rows, :columns] += query[:rows, :dim] @ tile[:dim, :columns]`; columns a multiple of 16."""
    qs, ts, ss = query.shape[1], tile.shape[1], scores.shape[1]
    for r in range(0, rows, simd.ROWS):
        height = min(rows - r, simd.ROWS)
        q, c = query.ctypes.data + 4 * r * qs, 0
        while c < columns:
            t, s = tile.ctypes.data + 4 * c, scores.ctypes.data + 4 * (r * ss + c)
            if columns - c >= 64:
                simd.scores_64(q, t, s, height, dim, qs, ts, ss)
                c += 64
            else:
                simd.scores_16(q, t, s, height, dim, qs, ts, ss)
                c += 16


@_jit
def mix_rows(probs, tile, lanes, rows, dim, columns):
    """`lanes[:rows, :dim].sum(-1) += probs[:rows, :columns] @ tile[:dim, :columns].T`; columns a multiple of 16."""
    ps, ts, ls = probs.shape[1], tile.shape[1], lanes.shape[1] * lanes.shape[2]
    for r in range(0, rows, simd.ROWS):
        height = min(rows - r, simd.ROWS)
        o, c = lanes.ctypes.data + 4 * r * ls, 0
        while c < columns:
            p, t = probs.ctypes.data + 4 * (r * ps + c), tile.ctypes.data + 4 * c
            if columns - c >= 64:
                simd.mix_64(p, t, o, height, dim, ps, ts, ls)
                c += 64
            else:
                simd.mix_16(p, t, o, height, dim, ps, ts, ls)
                c += 16


@_jit
def _expand_any(page, at, width, levels, tile, first, last, size):
    """Levels of components `first` to `last`, `size` tokens of `width` bits each; the layout is `codec.packing`'s."""
    index = np.zeros(size, np.int64)
    for d in range(first, last):
        index[:] = 0
        shift, field = 0, 8
        while field > 0:
            if width & field:
                count, mask = size * field // 8, (1 << field) - 1
                for i in range(8 // field):
                    for j in range(count):
                        index[i * count + j] |= ((page[at + j] >> (i * field)) & mask) << shift
                at += count
                shift += field
            field //= 2
        for j in range(size):
            tile[d, j] = levels[index[j]]


if simd.has_table_lookup():

    @_jit
    def _expand(page, at, width, levels, tile, first, last, size):
        """`_expand_any` for components `first` to `last` of one width, by table lookups of 16 lanes."""
        if size == 64 and width <= 6:
            codes, table, out = page.ctypes.data + at, levels.ctypes.data, tile[first:].ctypes.data
            if width == 4:
                simd.expand_4(codes, table, out, last - first, tile.shape[1])
            elif width == 3:
                simd.expand_3(codes, table, out, last - first, tile.shape[1])
            elif width == 2:
                simd.expand_2(codes, table, out, last - first, tile.shape[1])
            elif width == 5:
                simd.expand_5(codes, table, out, last - first, tile.shape[1])
            elif width == 6:
                simd.expand_6(codes, table, out, last - first, tile.shape[1])
            else:
                simd.expand_1(codes, table, out, last - first, tile.shape[1])
        else:
            _expand_any(page, at, width, levels, tile, first, last, size)

else:
    _expand = _expand_any


@_jit
def fill(page, at, offsets, widths, levels, tile, size):
    """Tile `[D, >= size]` of a head's components from a page's bytes; `at` is where the codes begin."""
    first = 0
    while first < widths.shape[0]:
        width, last = int(widths[first]), first + 1
        while last < widths.shape[0] and widths[last] == width:
            last += 1
        if width == 0:
            tile[first:last, :size] = 0
        else:
            _expand(page, at + offsets[first], width, levels[width], tile, first, last, size)
        first = last


@_jit
def _softmax(scores, r, size, top, bits):
    """Exponentials of a row against the new maximum, in place; returns that maximum and their sum.

    `exp2` by a degree-6 polynomial on [0, 1), relative error 2e-7: LLVM vectorises it, `np.exp` it does not.
    """
    for j in range(size):
        top = max(top, scores[r, j])
    total = np.float32(0)
    if top == -np.inf:
        scores[r, :] = 0
        return top, total
    for j in range(size):
        x = max((scores[r, j] - top) * np.float32(1.4426950408889634), np.float32(-126.0))
        whole = np.floor(x)
        f = x - whole
        p = np.float32(2.1864262e-4)
        p = p * f + np.float32(1.2390889e-3)
        p = p * f + np.float32(9.6845225e-3)
        p = p * f + np.float32(5.5480409e-2)
        p = p * f + np.float32(2.4023061e-1)
        p = p * f + np.float32(6.9314694e-1)
        p = p * f + np.float32(1.0)
        bits[j] = (np.int32(whole) + np.int32(127)) << np.int32(23)
        scores[r, j] = p
    power = bits.view(np.float32)
    for j in range(size):
        scores[r, j] *= power[j]
        total += scores[r, j]
    for j in range(size, scores.shape[1]):
        scores[r, j] = 0
    return top, total


@_jit
def limit(scores, r, step, size, slot, here, softcap, causal, window, offset, begin, mask, b, head):
    """Softcap, mask, window and validity of one row of scores; token `j` has slot `slot + j`."""
    if softcap > 0:
        for j in range(size):
            scores[r, j] = softcap * np.tanh(scores[r, j] / softcap)
    if mask.shape[3] > 0:
        row = mask[b if mask.shape[0] > 1 else 0, head if mask.shape[1] > 1 else 0, step]
        for j in range(max(0, offset - slot), size):
            scores[r, j] += row[slot + j - offset]
    first = max(begin, offset - slot)
    if window > 0:
        first = max(first, here - window + 1 - slot)
    last = min(size, here + 1 - slot) if causal else size
    for j in range(min(first, size)):
        scores[r, j] = -np.inf
    for j in range(max(last, 0), size):
        scores[r, j] = -np.inf


@_jit
def accumulate(scores, tile, lanes, top, total, size, columns, scale, weighted, bits):
    """Fold a tile's scores and values into the running softmax of every row."""
    rows = lanes.shape[0]
    for r in range(rows):
        new, added = _softmax(scores, r, size, top[r], bits)
        if new > top[r]:
            shrink = np.exp(top[r] - new)
            top[r] = new
            total[r] *= shrink
            for d in range(lanes.shape[1]):
                for i in range(LANES):
                    lanes[r, d, i] *= shrink
        total[r] += added
        if weighted:
            for j in range(size):
                scores[r, j] *= scale[j]
    mix_rows(scores, tile, lanes, rows, lanes.shape[1], columns)


@_jit
def read_scales(page, at, out, bits):
    """bf16 scales to fp32."""
    for j in range(out.shape[0]):
        bits[j] = np.int32((np.uint32(page[at + 2 * j]) << 16) | (np.uint32(page[at + 2 * j + 1]) << 24))
    out[:] = bits[: out.shape[0]].view(np.float32)


@_jit
def rotate(query, matrix):
    """`query @ matrix.T`, `[R, D]`."""
    rows, dim = query.shape
    out = np.empty((rows, dim), np.float32)
    for r in range(rows):
        for i in range(dim):
            total = np.float32(0)
            for d in range(dim):
                total += matrix[i, d] * query[r, d]
            out[r, i] = total
    return out


@_jit
def transpose(tokens, tile):
    """`tile[d, j] = tokens[j, d]`, zeros elsewhere."""
    tile[:] = 0
    for j in range(tokens.shape[0]):
        for d in range(tokens.shape[1]):
            tile[d, j] = tokens[j, d]


@_jit
def turn(coefficients, start, out, half):
    """Coefficients of the constant part seen from a page's first position."""
    for r in range(out.shape[0]):
        for i in range(half):
            a, b = coefficients[r, i], coefficients[r, half + i]
            out[r, i] = a * start[i] + b * start[half + i]
            out[r, half + i] = b * start[i] - a * start[half + i]
