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
from .jit import INSIDE, OPTIONS, features, planar_code, pointer

NAME = f"int16 dot products ({simd16.isa.NAME}{', VNNI' if simd16.isa.VNNI in features() else ''})"
OPERAND = np.int16
LEVEL_MAX = 8191
_BLOCK = simd16.isa.BLOCK
_SUM_MAX = np.float32(2.0**31 / LEVEL_MAX * 0.99)
_scores, _score_levels = simd16.scores, simd16.score_levels
_mix_blocks, _mix_ones, _mix_levels = simd16.mix_blocks, simd16.mix_ones, simd16.mix_levels
_WIDEST = 6  # bits of codes that are looked up in registers


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
    row_work.to_int16(row, count, np.float32(1) / unit, out, 64)


@njit(**OPTIONS)
def to_weights(row, count, unit, out, rows):
    """As `to_operand`, every 64 `rows` times 64 apart."""
    row_work.to_int16(row, count, np.float32(1) / unit, out, 64 * rows)


@njit(**OPTIONS)
def extents(row, count):
    """Largest magnitude and sum of magnitudes of a row, for `unit_for`."""
    return row_work.extents(row, count)


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
def _score_pair(tile, query, factors, scale, out, rows, stride, out_stride):
    """`score` of two components. An array's memory is sure to last for a call only where it is an argument of it."""
    _score_levels(0, tile.ctypes.data, 0, 0, query, factors, scale, out, rows, 1, stride, out_stride)


@njit(**OPTIONS)
def _mix_tile(tile, weights, rows, factors, out, out_stride):
    """`mix_codes` of one component from its levels `[pages, 64]`."""
    _mix_levels(0, tile.ctypes.data, 128, tile.size // 64, 0, weights, rows, factors, out, out_stride, 1)


@njit(**INSIDE)
def score(operand, factors, scale, tile, dim, out, out_stride):
    """`out[r, :64] += factors[r] * scale[:64] * (operand[r] . tile)`; `tile` is the address of one of `make_tile`."""
    rows, stride = operand.shape
    query, f = operand.ctypes.data, factors.ctypes.data
    _score_levels(0, tile, 0, 0, query, f, scale, out, rows, (dim + 1) // 2, stride, out_stride)


@njit(**OPTIONS)
def runs_of(widths, size):
    """Runs of components `[n, 2]`: the first, and how many pairs of its width follow from it on.

    0 stands for two that go through a tile: unlike ones, of more than `_WIDEST` bits, or of pages that are not of 64.
    """
    found, n, d = np.zeros((widths.shape[0], 2), np.int64), 0, 0
    while d < widths.shape[0]:
        end = d
        while size == 64 and end + 1 < widths.shape[0] and widths[d] == widths[end] == widths[end + 1] <= _WIDEST:
            end += 2
        found[n, 0], found[n, 1] = d, (end - d) // 2
        d, n = max(end, d + 2), n + 1
    return found[:n]


@njit(**INSIDE)
def score_codes(operand, factors, scale, page, offsets, widths, runs, levels, size, first, out, out_stride, ahead):
    """As `score` for keys in codes at address `page`: 64 tokens from `first` on; `ahead` bytes on is the next page.

    `runs` are those of `runs_of`.
    """
    rows, stride = operand.shape
    dim, f = widths.shape[0], factors.ctypes.data
    for n in range(len(runs)):
        d, pairs = runs[n, 0], runs[n, 1]
        query, width = operand.ctypes.data + 2 * d, np.int64(widths[d])
        if pairs:
            codes, table = page + offsets[d], levels[width].ctypes.data
            _scores(width, codes, ahead, table, query, f, scale, out, rows, pairs, stride, out_stride)
        else:
            tile = np.zeros((64, 2), np.int16)
            for c in range(d, min(d + 2, dim)):
                _expand(page, offsets[c], widths[c], levels, tile.ctypes.data + 2 * (c - d), 2, size, first)
            _score_pair(tile, query, f, scale, out, rows, stride, out_stride)


@njit(**INSIDE)
def mix_codes(weights, factors, first, page_bytes, pages, offsets, widths, levels, size, out, out_stride):
    """`out[r, :D] = factors[r] * (weights[r] . values)` over `pages` pages of codes from address `first` on.

    `weights [blocks, rows, 64]`, where a page has as many blocks of 64 tokens as it takes.
    """
    blocks, rows, _ = weights.shape
    dim, d, f, w, wide = widths.shape[0], 0, factors.ctypes.data, weights.ctypes.data, blocks // pages * 64
    while d < dim:
        width, end, to = np.int64(widths[d]), d, out + 4 * d
        while size == 64 and 0 < width <= _WIDEST and end < dim and widths[end] == width:
            end += 1
        several = (end - d) // _BLOCK
        codes, table, ones = first + offsets[d], levels[width].ctypes.data, end - d - several * _BLOCK
        if several:
            _mix_blocks(width, codes, page_bytes, pages, table, w, rows, f, to, out_stride, several)
        if ones:
            codes, to = first + offsets[end - ones], out + 4 * (end - ones)
            _mix_ones(width, codes, page_bytes, pages, table, w, rows, f, to, out_stride, ones)
        if end == d:
            tile = np.zeros((pages, wide), np.int16)
            for n in range(pages):
                for at in range(0, wide, 64):
                    page = first + n * page_bytes
                    _expand(page, offsets[d], width, levels, tile[n, at:].ctypes.data, 1, size, at)
            _mix_tile(tile, w, rows, f, to, out_stride)
            end = d + 1
        d = end
