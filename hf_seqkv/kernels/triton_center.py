"""Scores of the constant part of keys (`codec.center`) for all tokens of some pages, in Triton.

They are a function of a page's first position and of a token's place in the page: coefficients of the queries, turned
as the page's first token is, times the table that all pages share. Here the rows of several pages fill the matrix
units, where `triton_partials`, a page at a time, would compute mostly padding, and hold the table in every warp. What
it reads instead is 4 bytes a token and row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_softmax import exact_dot
from .triton_tile import token_of


@triton.jit
def coefficients(query, mean, scale, i, there, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Factors of the cosine and of the sine of pairs `i` of RoPE, `[n, R]`, of the rows `query [R]` points to."""
    first, second = i, i + HALF
    if INTERLEAVED:
        first, second = 2 * i, 2 * i + 1
    qa = tl.load(query[None, :] + first[:, None], mask=there, other=0).to(tl.float32) * scale
    qb = tl.load(query[None, :] + second[:, None], mask=there, other=0).to(tl.float32) * scale
    a = tl.load(mean + first, mask=i < HALF, other=0)[:, None]
    b = tl.load(mean + second, mask=i < HALF, other=0)[:, None]
    return qa * a + qb * b, qb * a - qa * b


@triton.jit
def center_scores(
    query, mean, scale, valid, starts, starts_n, relative, scores, first, count,
    HALF: tl.constexpr, HP: tl.constexpr, RP: tl.constexpr, PAGES: tl.constexpr, TILES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """From rows `query [RP]` points to, the constant part `mean` and `starts` of `count` pages to `scores` of `PAGES`.

    `scores [pages, 64, RP]`, tokens in their order or, for `TILES`, in that of tiles.
    """
    LINES: tl.constexpr = PAGES * RP
    SOME: tl.constexpr = 32 if HP > 32 else HP  # pairs at once, for want of registers
    i = tl.arange(0, HP)
    cos, sin = coefficients(query, mean, scale, i, (i < HALF)[:, None] & valid[None, :], HALF, INTERLEAVED)
    size = tl.maximum(tl.max(tl.maximum(tl.abs(cos), tl.abs(sin))), 1e-20)
    factor = tl.exp2(tl.ceil(tl.log2(size)) - 12)
    n = first + tl.arange(0, PAGES)
    place, line = tl.arange(0, 32), tl.arange(0, LINES)
    token, later = place, place + 32
    if TILES:
        token, later = token_of(place), token_of(place + 32)
    y, z = tl.zeros([32, LINES], tl.float32), tl.zeros([32, LINES], tl.float32)
    for part in tl.static_range(HP // SOME):
        i = part * SOME + tl.arange(0, SOME)
        cos, sin = coefficients(query, mean, scale, i, (i < HALF)[:, None] & valid[None, :], HALF, INTERLEAVED)
        cos, sin = (cos / factor)[:, None, :], (sin / factor)[:, None, :]
        start = starts + n[None, :] * starts_n + i[:, None]
        there = (i < HALF)[:, None] & (n < count)[None, :]
        start_cos = tl.load(start, mask=there, other=0)[:, :, None]
        start_sin = tl.load(start + HALF, mask=there, other=0)[:, :, None]
        turn = relative + i[None, :]  # [cos, sin][64][HP]
        # Two products of 32 tokens each: one of 64 would be for a Hopper's warp groups.
        turned = tl.reshape(cos * start_cos + sin * start_sin, (SOME, LINES))
        y = exact_dot(tl.load(turn + token[:, None] * HP), turned, y)
        z = exact_dot(tl.load(turn + later[:, None] * HP), turned, z)
        turned = tl.reshape(sin * start_cos - cos * start_sin, (SOME, LINES))
        turn += 64 * HP
        y = exact_dot(tl.load(turn + token[:, None] * HP), turned, y)
        z = exact_dot(tl.load(turn + later[:, None] * HP), turned, z)
    page = first + line // RP
    at = scores + (page[None, :] * 64 + place[:, None]) * RP + (line % RP)[None, :]
    there = (page < count)[None, :]
    tl.store(at, y * factor, mask=there)
    tl.store(at + 32 * RP, z * factor, mask=there)
