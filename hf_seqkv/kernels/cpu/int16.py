"""Dot products with codes in 16-bit integers (`simd16.py`): the fast path of the CPU kernel.

Levels become 14-bit integers of one unit a head, queries and probabilities 16-bit integers of one unit a row, chosen
so that no 32-bit sum can overflow. All three roundings together are about 1e-4 of the output, where 4-bit codes are
off by 1e-1: see `tests/test_kernels.py`. Functions are those of `float32.py`.
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from . import rows as row_work
from . import simd16
from .jit import OPTIONS, features, planar_code, pointer

NAME = f"int16 dot products ({simd16.isa.NAME}{', VNNI' if simd16.isa.VNNI in features() else ''})"
OPERAND = np.int16
LEVEL_MAX = 8191
_BLOCK = simd16.isa.BLOCK
_SUM_MAX = np.float32(2.0**31 / LEVEL_MAX * 0.99)
_SCORES_0, _SCORES_1, _SCORES_2, _SCORES_3, _SCORES_4, _SCORES_5, _SCORES_6 = simd16.scores
_BLOCK_1, _BLOCK_2, _BLOCK_3, _BLOCK_4, _BLOCK_5, _BLOCK_6 = simd16.mix_block[1:]
_ONE_0, _ONE_1, _ONE_2, _ONE_3, _ONE_4, _ONE_5, _ONE_6 = simd16.mix_one


def make_levels(levels: np.ndarray, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Levels `[H, 9, 256]` fp32 as operands, and the unit of each head, `[H]` fp32."""
    used = np.zeros(levels.shape, bool)
    for width in range(1, 9):
        used[:, width, : 1 << width] = (widths == width).any(1)[:, None]
    units = np.abs(np.where(used, levels, 0)).max((1, 2)) / LEVEL_MAX
    units = np.where(units > 0, units, 1).astype(np.float32)
    return np.rint(np.where(used, levels, 0) / units[:, None, None]).astype(np.int16), units


def make_tile(rows: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """Tiles of keys from numbers `[D, P]` fp32, one for every 64 tokens, and their unit."""
    dim, size = rows.shape
    unit = np.float32(max(np.abs(rows).max(initial=0), 1e-30) / LEVEL_MAX)
    padded = np.zeros((dim + dim % 2, -(-size // 64) * 64), np.float32)
    padded[:dim, :size] = np.rint(rows / unit)
    tile = padded.reshape(-1, 2, padded.shape[1] // 64, 64).transpose(2, 0, 3, 1)
    return np.ascontiguousarray(tile).astype(np.int16), unit


@njit(**OPTIONS)
def unit_for(top, total):
    """Unit of numbers whose magnitudes are at most `top` and add up to at most `total`. NaN gives NaN."""
    return max(top / np.float32(32767), total / _SUM_MAX, np.float32(1e-30)) if total == total else total


@njit(**OPTIONS)
def to_operand(row, count, unit, out):
    """`count` numbers in some unit as operands (addresses; a multiple of 32)."""
    row_work.to_int16(row, count, np.float32(1) / unit, out)


@njit(**OPTIONS)
def extents(row, count):
    """Largest magnitude and sum of magnitudes of a row, for `unit_for`."""
    return row_work.extents(row, count)


@njit(**OPTIONS)
def extents_apart(row, count):
    """As `extents` for weights of tokens: these are summed in 16 lanes apart, so they may be larger."""
    return row_work.extents_apart(row, count)


@njit(**OPTIONS)
def _expand(page, offset, width, levels, tile, stride, size, first):
    """Levels of one component to every `stride`-th place from address `tile`: any width, any page size.

    64 tokens from `first` on, zeros where a page has fewer.
    """
    codes = carray(pointer(page + offset), max(1, size * width // 8), np.uint8)
    out = carray(pointer(tile), 64 * stride, np.int16)
    for t in range(64):
        known = width > 0 and first + t < size
        out[t * stride] = levels[width, planar_code(codes, width, first + t, size)] if known else 0


@njit(**OPTIONS)
def _score_levels(tile, query, factors, scale, out, rows, stride, out_stride):
    """`score` of two components. An array's memory is sure to last for a call only where it is an argument of it."""
    _SCORES_0(tile.ctypes.data, 0, 0, query, factors, scale, out, rows, 1, stride, out_stride)


@njit(**OPTIONS)
def _mix_levels(tile, weights, rows, factors, out, out_stride):
    """`mix_codes` of one component from its levels `[pages, 64]`."""
    _ONE_0(tile.ctypes.data, 128, tile.size // 64, 0, weights, tile.size, rows, factors, out, out_stride)


@njit(**OPTIONS)
def score(operand, factors, scale, tile, dim, out, out_stride):
    """`out[r, :64] += factors[r] * scale[:64] * (operand[r] . tile)`; `tile` is the address of one of `make_tile`."""
    rows, stride = operand.shape
    _SCORES_0(
        tile, 0, 0, operand.ctypes.data, factors.ctypes.data, scale, out, rows, (dim + 1) // 2, stride, out_stride
    )


@njit(**OPTIONS)
def score_codes(operand, factors, scale, page, offsets, widths, levels, size, first, out, out_stride, ahead):
    """As `score` for keys in codes at address `page`: 64 tokens from `first` on; `ahead` bytes on is the next page."""
    rows, stride = operand.shape
    dim, d, f = widths.shape[0], 0, factors.ctypes.data
    while d < dim:
        width, end = widths[d], d
        while end + 1 < dim and widths[end] == width and widths[end + 1] == width:
            end += 2
        query, codes, table, pairs = (
            operand.ctypes.data + 2 * d,
            page + offsets[d],
            levels[width].ctypes.data,
            (end - d) // 2,
        )
        if size != 64 or width > 6 or pairs == 0:
            tile = np.zeros((64, 2), np.int16)
            for c in range(d, min(d + 2, dim)):
                _expand(page, offsets[c], widths[c], levels, tile.ctypes.data + 2 * (c - d), 2, size, first)
            _score_levels(tile, query, f, scale, out, rows, stride, out_stride)
            end = d + 2
        elif width == 4:
            _SCORES_4(codes, ahead, table, query, f, scale, out, rows, pairs, stride, out_stride)
        elif width == 5:
            _SCORES_5(codes, ahead, table, query, f, scale, out, rows, pairs, stride, out_stride)
        elif width == 3:
            _SCORES_3(codes, ahead, table, query, f, scale, out, rows, pairs, stride, out_stride)
        elif width == 2:
            _SCORES_2(codes, ahead, table, query, f, scale, out, rows, pairs, stride, out_stride)
        elif width == 6:
            _SCORES_6(codes, ahead, table, query, f, scale, out, rows, pairs, stride, out_stride)
        elif width == 1:
            _SCORES_1(codes, ahead, table, query, f, scale, out, rows, pairs, stride, out_stride)
        d = end


@njit(**OPTIONS)
def mix_codes(weights, factors, first, page_bytes, pages, offsets, widths, levels, size, out, out_stride):
    """`out[r, :D] = factors[r] * (weights[r] . values)` over `pages` pages of codes from address `first` on.

    `weights [rows, pages * wide]`, where `wide` is the page size rounded up to 64 tokens.
    """
    rows, stride = weights.shape
    dim, d, f, w, wide = widths.shape[0], 0, factors.ctypes.data, weights.ctypes.data, weights.shape[1] // pages
    while d < dim:
        width, end = widths[d], d + 1
        while end < dim and end < d + _BLOCK and widths[end] == width:
            end += 1
        codes, table, to, block = first + offsets[d], levels[width].ctypes.data, out + 4 * d, end == d + _BLOCK
        if size != 64 or width > 6 or width == 0:
            tile, end = np.zeros((pages, wide), np.int16), d + 1
            for n in range(pages):
                for at in range(0, wide, 64):
                    page = first + n * page_bytes
                    _expand(page, offsets[d], width, levels, tile[n, at:].ctypes.data, 1, size, at)
            _mix_levels(tile, w, rows, f, to, out_stride)
        elif block:
            if width == 4:
                _BLOCK_4(codes, page_bytes, pages, table, w, stride, rows, f, to, out_stride)
            elif width == 5:
                _BLOCK_5(codes, page_bytes, pages, table, w, stride, rows, f, to, out_stride)
            elif width == 3:
                _BLOCK_3(codes, page_bytes, pages, table, w, stride, rows, f, to, out_stride)
            elif width == 2:
                _BLOCK_2(codes, page_bytes, pages, table, w, stride, rows, f, to, out_stride)
            elif width == 6:
                _BLOCK_6(codes, page_bytes, pages, table, w, stride, rows, f, to, out_stride)
            else:
                _BLOCK_1(codes, page_bytes, pages, table, w, stride, rows, f, to, out_stride)
        else:
            end = d + 1
            if width == 4:
                _ONE_4(codes, page_bytes, pages, table, w, stride, rows, f, to, out_stride)
            elif width == 5:
                _ONE_5(codes, page_bytes, pages, table, w, stride, rows, f, to, out_stride)
            elif width == 3:
                _ONE_3(codes, page_bytes, pages, table, w, stride, rows, f, to, out_stride)
            elif width == 2:
                _ONE_2(codes, page_bytes, pages, table, w, stride, rows, f, to, out_stride)
            elif width == 6:
                _ONE_6(codes, page_bytes, pages, table, w, stride, rows, f, to, out_stride)
            else:
                _ONE_1(codes, page_bytes, pages, table, w, stride, rows, f, to, out_stride)
        d = end
