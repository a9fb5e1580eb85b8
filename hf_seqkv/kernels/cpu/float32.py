"""Tiles of levels and their products in fp32 (`simd.py`): the CPU kernel on processors that are not x86 with AVX2.

A page is expanded to a tile `[D, 64]` that stays in the first-level cache. Functions are those of `int16.py`; units
are 1.
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from . import simd
from .jit import OPTIONS, copy, pointer

NAME = "fp32 vectors"
OPERAND = np.float32
_ONE = np.float32(1)


def make_levels(levels: np.ndarray, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Levels `[H, 9, 256]` fp32 as they are, and units of 1, `[H]` fp32."""
    return np.ascontiguousarray(levels), np.ones(levels.shape[0], np.float32)


def make_tile(rows: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """Tiles of keys from numbers `[D, P]` fp32, one for every 64 tokens, and their unit."""
    padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 64))).astype(np.float32)
    return np.ascontiguousarray(padded.reshape(len(rows), padded.shape[1] // 64, 64).swapaxes(0, 1)), _ONE


@njit(**OPTIONS)
def unit_for(top, total):
    """Unit of numbers: always 1."""
    return _ONE


@njit(**OPTIONS)
def to_operand(row, count, unit, out):
    """`count` numbers as operands (addresses)."""
    copy(carray(pointer(row), count, np.float32), carray(pointer(out), count, np.float32))


@njit(**OPTIONS)
def to_weights(row, count, unit, out, rows):
    """As `to_operand`, every 64 `rows` times 64 apart."""
    for i in range(0, count, 64):
        to_operand(row + 4 * i, 64, unit, out + 4 * i * rows)


@njit(**OPTIONS)
def extents(row, count):
    """Not needed here."""
    return _ONE, _ONE


@njit(**OPTIONS)
def _expand(page, offsets, widths, levels, size, first, tile):
    """Levels of all components of a head `[D, 64]`: 64 tokens of a page from `first` on, zeros where it has fewer."""
    index, count = np.zeros(size, np.int64), min(64, size - first)
    for d in range(widths.shape[0]):
        tile[d] = 0
        if widths[d] == 0:
            continue
        codes = carray(pointer(page + offsets[d]), size * widths[d] // 8, np.uint8)
        index[:] = 0
        shift, at, field = 0, 0, 8
        while field > 0:
            if widths[d] & field:
                run, mask = size * field // 8, (1 << field) - 1
                for i in range(8 // field):
                    for j in range(run):
                        index[i * run + j] |= np.int64((codes[at + j] >> (i * field)) & mask) << shift
                at += run
                shift += field
            field //= 2
        table = levels[widths[d]]
        for j in range(count):
            tile[d, j] = table[index[first + j]]


@njit(**OPTIONS)
def score(operand, factors, scale, tile, dim, out, out_stride):
    """`out[r, :64] += factors[r] * scale[:64] * (operand[r] . tile)`; `tile` is the address of one of `make_tile`."""
    rows = len(operand)
    products = np.zeros((rows, 64), np.float32)
    simd.add_product(operand, tile, 64, products, rows, dim, 64)
    weights = carray(pointer(scale), 64, np.float32)
    for r in range(rows):
        row = carray(pointer(out + 4 * r * out_stride), 64, np.float32)
        for j in range(64):
            row[j] += products[r, j] * weights[j] * factors[r]


@njit(**OPTIONS)
def _score_levels(tile, operand, factors, scale, out, out_stride):
    """`score` from an array. Its memory is sure to last for a call only where it is an argument of it."""
    score(operand, factors, scale, tile.ctypes.data, len(tile), out, out_stride)


@njit(**OPTIONS)
def runs_of(widths, size):
    """Not needed here."""
    return np.zeros((0, 2), np.int64)


@njit(**OPTIONS)
def score_codes(operand, factors, scale, page, offsets, widths, runs, levels, size, first, out, out_stride, ahead):
    """As `score` for keys in codes at address `page`: 64 tokens from `first` on."""
    tile = np.empty((widths.shape[0], 64), np.float32)
    _expand(page, offsets, widths, levels, size, first, tile)
    _score_levels(tile, operand, factors, scale, out, out_stride)


@njit(**OPTIONS)
def mix_codes(weights, factors, first, page_bytes, pages, offsets, widths, levels, size, out, out_stride):
    """`out[r, :D] = weights[r] . values` over `pages` pages of codes from address `first` on.

    `weights [blocks, rows, 64]`, where a page has as many blocks of 64 tokens as it takes.
    """
    blocks, rows, _ = weights.shape
    dim, wide = widths.shape[0], blocks // pages * 64
    tile = np.empty((dim, 64), np.float32)
    lanes = np.zeros((dim, simd.ROWS, simd.LANES), np.float32)
    for n in range(pages):
        for at in range(0, wide, 64):
            _expand(first + n * page_bytes, offsets, widths, levels, size, at, tile)
            where = weights.ctypes.data + 4 * rows * (n * wide + at)
            simd.mix_64(where, tile.ctypes.data, lanes.ctypes.data, rows, dim, 64, 64)
    for r in range(rows):
        row = carray(pointer(out + 4 * r * out_stride), dim, np.float32)
        for d in range(dim):
            row[d] = lanes[d, r].sum()
