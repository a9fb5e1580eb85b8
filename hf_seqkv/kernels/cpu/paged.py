"""The coded part of a call: scores, softmax and mix of up to `SPLIT` pages of one head.

Score page after page, softmax over all, mix all pages.
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from ...codec.scales import BIAS, HELD
from . import simd16
from .call import SPLIT, limit, padded, rotated_rows, unlimited
from .jit import INSIDE, OPTIONS, pointer
from .rows import maximum, weigh, widen, widen_narrow
from .simd import ROWS, prefetch_bytes

if simd16.available():
    from . import int16 as path
else:
    from . import float32 as path

_FIRST = 384  # bytes of a head's values that are prefetched before the mix, which asks for the rest
_OPERAND, _ITEM = path.OPERAND, np.dtype(path.OPERAND).itemsize
_extents, _unit_for, _to_operand, _to_weights = path.extents, path.unit_for, path.to_operand, path.to_weights
_score, _score_codes, _mix_codes, _runs_of = path.score, path.score_codes, path.mix_codes, path.runs_of


@njit(**OPTIONS)
def _aligned(size):
    """`size` bytes from a cache line's start."""
    data = np.empty(size + 64, np.uint8)
    first = -data.ctypes.data % 64
    return data[first : first + size]


@njit(**OPTIONS)
def _read_scales(address, size, width, scale):
    """Scales of `width` bytes as fp32, infinite ones as 0; returns whether there was one."""
    whole, bits = size // 16 * 16, scale.view(np.int32)
    if width == 1:
        held = widen_narrow(address, whole, scale.ctypes.data)
        narrow = carray(pointer(address), size, np.uint8)
        for j in range(whole, size):
            held |= narrow[j] == HELD
            seen = narrow[j] != 0 and narrow[j] != HELD
            bits[j] = (np.int32(narrow[j]) + np.int32(BIAS)) << np.int32(20) if seen else 0
        return held
    infinite = widen(address, whole, scale.ctypes.data)
    raw = carray(pointer(address), size, np.uint16)
    for j in range(whole, size):
        infinite |= raw[j] == 0x7F80
        bits[j] = 0 if raw[j] == 0x7F80 else np.int32(np.uint32(raw[j]) << np.uint32(16))
    return infinite


@njit(**OPTIONS)
def _hide(address, width, row):
    """Minus infinity for the tokens whose key scale, `width` bytes at an address, is infinite."""
    if width == 1:
        narrow = carray(pointer(address), row.shape[0], np.uint8)
        for j in range(row.shape[0]):
            row[j] = -np.inf if narrow[j] == HELD else row[j]
        return
    raw = carray(pointer(address), row.shape[0], np.uint16)
    for j in range(row.shape[0]):
        row[j] = -np.inf if raw[j] == 0x7F80 else row[j]


@njit(**OPTIONS)
def _turn(coefficients, start, half, out):
    """Coefficients of the constant part of the keys, seen from a page's first position; all are addresses."""
    a, b = carray(pointer(coefficients), half, np.float32), carray(pointer(coefficients + 4 * half), half, np.float32)
    cos, sin = carray(pointer(start), half, np.float32), carray(pointer(start + 4 * half), half, np.float32)
    x, y = carray(pointer(out), half, np.float32), carray(pointer(out + 4 * half), half, np.float32)
    for i in range(half):
        x[i] = a[i] * cos[i] + b[i] * sin[i]
        y[i] = b[i] * cos[i] - a[i] * sin[i]


@njit(**OPTIONS)
def _turned_units(coefficients, starts, unit, factors):
    """Units for what `_turn` gives at any of `starts [pages, 2 * half]`, and factors: these times `unit`."""
    half = coefficients.shape[1] // 2
    # One by one and as vectors: a maximum that a loop keeps in a variable is found by scalar instructions.
    size, bound = np.zeros((2, padded(half, 32)), np.float32)
    for n in range(starts.shape[0]):
        for i in range(half):
            x = abs(starts[n, i]) + abs(starts[n, half + i])
            size[i] = x if x > size[i] else size[i]
    units = np.empty(len(coefficients), np.float32)
    for r in range(len(coefficients)):
        for i in range(half):
            x, y = abs(coefficients[r, i]), abs(coefficients[r, half + i])
            bound[i] = size[i] * (x if x > y else y)
        top, total = _extents(bound.ctypes.data, bound.shape[0])
        units[r] = _unit_for(top, 2 * total)
        factors[r] = units[r] * unit
    return units


@njit(**OPTIONS)
def _dot(x, y):
    """Scalar product. Summed up in a variable: in memory, whether it is summed in vectors would depend on addresses."""
    total = np.float32(0)
    for d in range(y.shape[0]):
        total += x[d] * y[d]
    return total


@njit(**OPTIONS)
def _coefficients(a, query, b, h, rest, turned):
    """`c [rows]` and `[A | B] [rows, 2 * half]` of `codec.center.Center.coefficients`."""
    rows, dim, half = query.shape[0], a.key_dim, a.half
    if a.constant == 0:
        rest[:] = 0
        return
    mean = carray(pointer(a.constant + 4 * (b * a.heads + h) * dim), dim, np.float32)
    step, other = (2, 1) if a.interleaved else (1, half)
    for r in range(rows):
        for i in range(half):
            x, y = step * i, step * i + other
            turned[r, i] = query[r, x] * mean[x] + query[r, y] * mean[y]
            turned[r, half + i] = query[r, y] * mean[x] - query[r, x] * mean[y]
        rest[r] = _dot(query[r, 2 * half :], mean[2 * half :])


@njit(**OPTIONS)
def _prepared(a, pair, row0, rows):
    """Where `prepare` leaves its results: operands, units, constants and turned coefficients of some query rows."""
    first, total = pair * a.rows + row0, a.batch * a.heads * a.rows
    stride, twice = padded(a.key_dim, 32), 2 * a.half
    numbers = a.prepared + _ITEM * total * stride
    return (
        carray(pointer(a.prepared + _ITEM * first * stride), (rows, stride), _OPERAND),
        carray(pointer(numbers + 4 * first), rows, np.float32),
        carray(pointer(numbers + 4 * (total + first)), rows, np.float32),
        carray(pointer(numbers + 4 * (2 * total + first * twice)), (rows, twice), np.float32),
    )


@njit(**OPTIONS)
def prepare(a, query, b, h, row0):
    """What all parts need of scaled query rows `[rows, Dk]`: rotated operands, and what the keys' constant gives."""
    rows, dim = query.shape[0], a.key_dim
    operand, factors, constant, coefficients = _prepared(a, b * a.heads + h, row0, rows)
    _coefficients(a, query, b, h, constant, coefficients)
    mean = carray(pointer(a.key_mean + 4 * h * dim), dim, np.float32)
    for r in range(rows):
        constant[r] += _dot(query[r, :dim], mean)
    rotated = rotated_rows(query, a.key_matrix + h * a.key_matrix_head, dim)
    unit = carray(pointer(a.key_units), a.heads, np.float32)[h]
    for r in range(rows):
        row, count = rotated[r].ctypes.data, rotated.shape[1]
        own = _unit_for(*_extents(row, count))
        _to_operand(row, count, own, operand[r].ctypes.data)
        factors[r] = own * unit


@njit(**OPTIONS)
def room(a):
    """Memory that `pages_part` works in: scores, scales of values, weights."""
    tokens = SPLIT * padded(a.size, 64)
    return _aligned(tokens * ((4 + _ITEM) * ROWS + 4))


@njit(**INSIDE)
def pages_part(a, memory, b, h, part, row0, rows):
    """Unnormalised output, maximum and sum over a part's pages, for `rows <= ROWS` query rows from `row0` on."""
    size, wide = a.size, padded(a.size, 64)
    count = min(SPLIT, carray(pointer(a.counts), a.batch, np.int64)[b] - part * SPLIT)
    first = a.pages + b * a.page_row + part * SPLIT * a.page_bytes
    # Arrays without an owner, which would be counted every time that one is looked at.
    at, tokens = memory.ctypes.data, count * wide
    scores = carray(pointer(at), (rows, tokens), np.float32)
    scales = carray(pointer(at + 4 * rows * tokens), (count, wide), np.float32)
    weights = carray(pointer(at + 4 * (rows + 1) * tokens), (tokens // 64, rows, 64), _OPERAND)
    factors = np.empty(ROWS, np.float32)
    scales[:] = 0
    _score_pages(a, b, h, part, row0, first, count, scores, scales[0])
    for n in range(count):
        at = first + n * a.page_bytes + a.value_scales + a.value_scale_bytes * h * size
        _read_scales(at, size, a.value_scale_bytes, scales[n])
    index = ((b * a.heads + h) * (a.splits + 1) + part) * a.rows + row0
    _weigh(a, h, index, scores, scales, weights, factors)
    dim = a.value_dim
    offsets = carray(pointer(a.value_offsets + 8 * h * dim), dim, np.int64)
    widths = carray(pointer(a.value_widths + h * dim), dim, np.uint8)
    levels = carray(pointer(a.value_levels), (a.heads, 9, 256), _OPERAND)[h]
    _mix_codes(
        weights, factors, first + a.value_codes, a.page_bytes, count, offsets, widths, levels, size,
        a.mixed + 4 * index * dim, dim,
    )  # fmt: skip


@njit(**OPTIONS)
def _weigh(a, h, index, scores, scales, weights, factors):
    """Softmax of scores `[rows, tokens]`; what values are weighed with, as operands, and the units of these."""
    rows, count = scores.shape
    tops = carray(pointer(a.tops + 4 * index), rows, np.float32)
    totals = carray(pointer(a.totals + 4 * index), rows, np.float32)
    unit = carray(pointer(a.value_units), a.heads, np.float32)[h]
    row, to = scores.ctypes.data, weights.ctypes.data
    for r in range(rows):
        tops[r] = maximum(row, count)
        largest = bound = np.float32(0)
        if tops[r] == -np.inf:
            totals[r], scores[r] = 0, 0
        else:
            totals[r], largest, bound = weigh(row, count, tops[r], scales.ctypes.data)
        own = _unit_for(largest, bound)
        _to_weights(row, count, own, to, rows)
        factors[r] = own * unit
        row, to = row + 4 * count, to + _ITEM * 64


@njit(**INSIDE)
def _score_pages(a, b, h, part, row0, first, count, scores, scale):
    """Scores of `count` pages from the one at address `first`; what counts for nothing gets minus infinity."""
    rows, dim, pair = len(scores), a.key_dim, b * a.heads + h
    size, wide, twice = a.size, padded(a.size, 64), 2 * a.half
    slot = carray(pointer(a.page_slots), a.batch, np.int64)[b] + part * SPLIT * size
    operand, factors, constant, coefficients = _prepared(a, pair, row0, rows)
    turned, turned_factors = np.zeros(padded(twice, 32), np.float32), np.empty(ROWS, np.float32)
    turned_operand = np.zeros((rows, padded(twice, 32)), _OPERAND)
    starts = a.starts + 4 * (b * a.starts_row + part * SPLIT * twice)
    turn_units = _turned_units(
        coefficients, carray(pointer(starts), (count, twice), np.float32), a.relative_unit, turned_factors
    )
    ones = np.ones(64, np.float32)
    offsets = carray(pointer(a.key_offsets + 8 * h * dim), dim, np.int64)
    widths = carray(pointer(a.key_widths + h * dim), dim, np.uint8)
    levels = carray(pointer(a.key_levels), (a.heads, 9, 256), _OPERAND)[h]
    runs = _runs_of(widths, size)
    values = a.value_codes + carray(pointer(a.value_offsets + 8 * h * a.value_dim), 1, np.int64)[0]
    for n in range(count):
        page = first + n * a.page_bytes
        key_scales = page + a.key_scales + a.key_scale_bytes * h * size
        # What is read next: the next page's scales, then of this page what the mix begins with.
        prefetch_bytes(key_scales + a.page_bytes, size * a.key_scale_bytes)
        prefetch_bytes(page + a.value_scales + a.value_scale_bytes * h * size, size * a.value_scale_bytes)
        prefetch_bytes(page + values, _FIRST)
        some_hidden = _read_scales(key_scales, size, a.key_scale_bytes, scale)
        for r in range(rows):
            row = carray(pointer(scores.ctypes.data + 4 * wide * (r * count + n)), wide, np.float32)
            for j in range(wide):
                row[j] = constant[r]
        if twice > 0:
            for r in range(rows):
                _turn(coefficients.ctypes.data + 4 * r * twice, starts + 4 * n * twice, a.half, turned.ctypes.data)
                to = turned_operand.ctypes.data + _ITEM * r * turned.shape[0]
                _to_operand(turned.ctypes.data, turned.shape[0], turn_units[r], to)
        for at in range(0, wide, 64):
            out = scores.ctypes.data + 4 * (n * wide + at)
            if twice > 0:
                relative = a.relative + _ITEM * at * twice
                _score(turned_operand, turned_factors, ones.ctypes.data, relative, twice, out, count * wide)
            _score_codes(
                operand, factors, scale.ctypes.data + 4 * at, page + a.key_codes, offsets, widths, runs, levels, size,
                at, out, count * wide, a.page_bytes,
            )  # fmt: skip
        if some_hidden or size < wide or not unlimited(a, slot + n * size, size):
            for r in range(rows):
                row, at = scores[r, n * wide : (n + 1) * wide], row0 + r
                head = h * (a.rows // a.steps) + at // a.steps
                limit(a, row[:size], b, head, at % a.steps, slot + n * size)
                row[size:] = -np.inf
                _hide(key_scales, a.key_scale_bytes, row[:size])
