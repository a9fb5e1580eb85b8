"""Entry point of the CPU encoder: workers that take task after task, one page's keys or values of one head each."""

from __future__ import annotations

import numpy as np
from numba import carray, cfunc, njit, prange

from ...codec.scales import BIAS
from .call import padded
from .encode_simd import TABLE, find_codes, fit_gains
from .jit import OPTIONS, copy, pointer, take_number
from .simd import LANES, add_product
from .threads import Entry

# numba's disk cache looks at this file alone: with what it calls, this line changes (`tests/test_kernel_builds.py`).
CALLS = "0dfe67b8239977a7"

FP32, BF16, FP16 = range(3)
# numba gives its fastmath flags to intrinsics too; without them quotients and errors round as the codec's own do.
EXACT = {name: option for name, option in OPTIONS.items() if name != "fastmath"}
# Keys or values: addresses, strides in elements, counts, and where the page keeps codes and scales.
SIDE = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("data", "dtype", "row", "page", "head", "token", "dim"),
            *("matrix", "mean", "widths", "offsets", "tables", "weights", "totals", "factors", "tries"),
            *("codes", "scales", "scale_bytes"),
        )
    ]
)
ENCODE = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("sides", "next", "tasks", "pages", "heads", "size", "out", "page_bytes"),
            *("constant", "starts", "relative", "half", "interleaved"),
        )
    ]
)


@njit(**OPTIONS)
def _load(address, dtype, token, x, size):
    """Tokens `[size, dim]`, `token` elements apart, to `x [dim, wide]` fp32, zeros behind them."""
    dim, bits = x.shape[0], x.view(np.int32)
    x[:, size:] = 0
    for t in range(size):
        if dtype == FP32:
            numbers = carray(pointer(address + 4 * t * token), dim, np.float32)
            for d in range(dim):
                x[d, t] = numbers[d]
        else:
            raw = carray(pointer(address + 2 * t * token), dim, np.uint16)
            if dtype == BF16:
                for d in range(dim):
                    bits[d, t] = np.int32(np.uint32(raw[d]) << np.uint32(16))
            else:
                for d in range(dim):
                    sign, rest = np.uint32(raw[d]) >> np.uint32(15), np.uint32(raw[d]) & np.uint32(0x7FFF)
                    bits[d, t] = np.int32(sign << np.uint32(31) | rest << np.uint32(13))
    if dtype == FP16:
        x *= np.float32(2.0**112)  # the exponents' biases, 127 and 15, are that far apart


@njit(**OPTIONS)
def _subtract_constant(a, b, page, h, x):
    """Take `codec.center.Center.keys` of a page from its keys `x [dim, wide]`."""
    dim, half = x.shape[0], a.half
    mean = carray(pointer(a.constant + 4 * (b * a.heads + h) * dim), dim, np.float32)
    start = carray(pointer(a.starts + 4 * (b * a.pages + page) * 2 * half), 2 * half, np.float32)
    relative = carray(pointer(a.relative), (2 * half, a.size), np.float32)
    step, other = (2, 1) if a.interleaved else (1, half)
    for i in range(half):
        first, second = x[step * i, : a.size], x[step * i + other, : a.size]
        x_mean, y_mean, c, s = mean[step * i], mean[step * i + other], start[i], start[half + i]
        cosines, sines = relative[i], relative[half + i]
        for t in range(a.size):
            cos, sin = c * cosines[t] - s * sines[t], s * cosines[t] + c * sines[t]
            first[t] -= x_mean * cos - y_mean * sin
            second[t] -= y_mean * cos + x_mean * sin
    for d in range(2 * half, dim):
        for t in range(a.size):
            x[d, t] -= mean[d]


@njit(**OPTIONS)
def _pack(codes, width, out):
    """Codes of a page's tokens, bytes, to `width` bits each; the layout is `codec.packing`'s."""
    shift, at, field = 0, 0, 8
    while field > 0:
        if width & field:
            count, mask = codes.shape[0] * field // 8, np.uint8((1 << field) - 1)
            packed = out[at : at + count]
            packed[:] = 0
            for i in range(8 // field):
                run = codes[i * count : (i + 1) * count]
                for j in range(count):
                    packed[j] |= ((run[j] >> np.uint8(shift)) & mask) << np.uint8(i * field)
            at += count
            shift += field
        field //= 2


@njit(inline="always", **EXACT)
def _encode_head(a, side, is_key, b, page, h, x, y, gains, scales, codes):
    """Codes and scales of one head of a page; the last five are room: `[dim, wide]` twice, `[wide]` thrice."""
    dim, wide = x.shape
    at = b * side.row + page * side.page + h * side.head
    _load(side.data + at * (4 if side.dtype == FP32 else 2), side.dtype, side.token, x, a.size)
    if is_key and a.constant:
        _subtract_constant(a, b, page, h, x)
    mean = carray(pointer(side.mean + 4 * h * dim), dim, np.float32)
    for d in range(dim):
        for t in range(wide):
            x[d, t] -= mean[d]
    y[:] = 0
    matrix = carray(pointer(side.matrix + 4 * h * dim * dim), (dim, dim), np.float32)
    add_product(matrix, x.ctypes.data, wide, y, dim, dim, wide)

    tables, weights = side.tables + 4 * h * 9 * 2 * TABLE, side.weights + 4 * h * dim
    total = carray(pointer(side.totals), a.heads, np.float32)[h]
    for t in range(0, wide, LANES):
        fit_gains(
            y.ctypes.data + 4 * t, wide, dim, tables, side.widths + h * dim, weights, total, side.factors, side.tries,
            side.scale_bytes == 1, gains.ctypes.data + 4 * t, scales.ctypes.data + 2 * t,
        )  # fmt: skip
    target = a.out + (b * a.pages + page) * a.page_bytes
    stored = target + side.scales + side.scale_bytes * h * a.size
    if side.scale_bytes == 1:
        narrow = carray(pointer(stored), a.size, np.uint8)
        for t in range(a.size):
            narrow[t] = max(np.int64(scales[t] >> np.uint16(4)) - BIAS, 0)
    else:
        copy(scales, carray(pointer(stored), a.size, np.uint16))
    widths = carray(pointer(side.widths + h * dim), dim, np.uint8)
    offsets = carray(pointer(side.offsets + 8 * h * dim), dim, np.int64)
    for d in range(dim):
        width = np.int64(widths[d])
        if width > 0:
            find_codes(y[d].ctypes.data, wide, gains.ctypes.data, tables, width, codes.ctypes.data)
            packed = carray(pointer(target + side.codes + offsets[d]), a.size * width // 8, np.uint8)
            _pack(codes[: a.size], width, packed)


@njit(inline="always", **EXACT)
def _encode(address):
    """Take tasks until none is left."""
    a = carray(pointer(address), 1, ENCODE)[0]
    sides = carray(pointer(a.sides), 2, SIDE)
    wide = padded(a.size, LANES)
    largest = max(sides[0].dim, sides[1].dim)
    room = np.empty((2 * largest + 1) * wide + 16, np.float32)
    skip = -room.ctypes.data % 64 // 4  # to a cache line's start
    gains, room = room[skip : skip + wide], room[skip + wide :]
    scales, codes = np.empty(wide, np.uint16), np.empty(wide, np.uint8)
    while True:
        task = take_number(a.next)
        if task >= a.tasks:
            return
        which, h, rest = task % 2, task // 2 % a.heads, task // 2 // a.heads
        dim = sides[which].dim
        x = room[: dim * wide].reshape(dim, wide)
        y = room[dim * wide : 2 * dim * wide].reshape(dim, wide)
        _encode_head(a, sides[which], which == 0, rest // a.pages, rest % a.pages, h, x, y, gains, scales, codes)


@cfunc("void(int64)", cache=True, **EXACT)
def encode_entry(address):
    _encode(address)


@njit(cache=True, parallel=True, **EXACT)
def _encode_on_numbas_pool(address, threads):
    for _ in prange(threads):
        _encode(address)


WORKER = Entry(encode_entry, _encode_on_numbas_pool)
