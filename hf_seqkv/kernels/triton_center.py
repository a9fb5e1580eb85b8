"""Scores of the constant part of keys (`codec.center`) for all tokens of some pages, in Triton.

They are a function of a page's first position and of a token's place in the page: coefficients of the queries, turned
as the page's first token is, times the table that all pages share. Here the rows of several pages fill the matrix
units, where `triton_partials`, a page at a time, would compute mostly padding, and hold the table in every warp. What
it reads instead is 4 bytes a token and row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_softmax import exact_dot, masked
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
def factor_of(query, mean, scale, valid, HALF: tl.constexpr, HP: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The power of two that brings all coefficients below 4,096."""
    i = tl.arange(0, HP)
    cos, sin = coefficients(query, mean, scale, i, (i < HALF)[:, None] & valid[None, :], HALF, INTERLEAVED)
    size = tl.maximum(tl.max(tl.maximum(tl.abs(cos), tl.abs(sin))), 1e-20)
    return tl.exp2(tl.ceil(tl.log2(size)) - 12)


@triton.jit
def tokens_of(TILES: tl.constexpr):
    """Tokens of a page's two halves, in their order or, for `TILES`, in that of tiles."""
    place = tl.arange(0, 32)
    token, later = place, place + 32
    if TILES:
        token, later = token_of(place), token_of(place + 32)
    return token, later


@triton.jit
def center_scores(
    turns, starts, relative, first, count,
    HALF: tl.constexpr, HP: tl.constexpr, SOME: tl.constexpr, RP: tl.constexpr, PAGES: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """Scores `[32, PAGES * RP]` of both halves (`tokens_of`) of pages from `first` on; beyond `count`, of the last.

    `turns` are the rows' `coefficients`, `SOME` pairs at a time.
    """
    LINES: tl.constexpr = PAGES * RP
    n = tl.minimum(first + tl.arange(0, PAGES), count - 1)
    token, later = tokens_of(TILES)
    y, z = tl.zeros([32, LINES], tl.float32), tl.zeros([32, LINES], tl.float32)
    for part in tl.static_range(HP // SOME):
        i = part * SOME + tl.arange(0, SOME)
        turn = relative + i[None, :]  # [cos, sin][64][HP]
        early, late = turn + token[:, None] * HP, turn + later[:, None] * HP
        early_cos, late_cos = tl.load(early), tl.load(late)
        early_sin, late_sin = tl.load(early + 64 * HP), tl.load(late + 64 * HP)
        inside = ((i < HALF) | (HALF == HP))[:, None]
        start = starts + n[None, :] * (2 * HALF) + i[:, None]
        start_cos = tl.load(start, mask=inside, other=0)[:, :, None]
        start_sin = tl.load(start + HALF, mask=inside, other=0)[:, :, None]
        cos, sin = turns[part][0][:, None, :], turns[part][1][:, None, :]
        # Products of 32 tokens each: those of 64 would be for a Hopper's warp groups.
        turned = tl.reshape(cos * start_cos + sin * start_sin, (SOME, LINES))
        y, z = exact_dot(early_cos, turned, y), exact_dot(late_cos, turned, z)
        turned = tl.reshape(sin * start_cos - cos * start_sin, (SOME, LINES))
        y, z = exact_dot(early_sin, turned, y), exact_dot(late_sin, turned, z)
    return y, z


@triton.jit
def store_scores(
    y, z, scores, first, count, mask, row, slot, offset, RP: tl.constexpr, TILES: tl.constexpr, MASK: tl.constexpr
):
    """What `center_scores` gives to `scores [pages, 64, RP]`, under a `MASK`, if any.

    `row [RP]` is where the mask of each row begins, `slot` that of the first page's first token, `offset` the mask's.
    """
    LINES: tl.constexpr = y.shape[1]
    token, later = tokens_of(TILES)
    if MASK > 0:
        page = first + tl.arange(0, LINES) // RP
        there = (page < count)[None, :]
        own = mask + tl.reshape(tl.broadcast_to(row[None, :], (LINES // RP, RP)), (LINES,))
        column = slot + page[None, :] * 64 + token[:, None] - offset
        y = masked(y, own, column, there & (column >= 0), MASK)
        column += (later - token)[:, None]
        z = masked(z, own, column, there & (column >= 0), MASK)
    # Page by page, as they lie in memory: else each lane of a store would write to a line of its own.
    n = first + tl.arange(0, LINES // RP)[:, None]
    at = scores + n * (64 * RP) + tl.arange(0, 32 * RP)[None, :]
    tl.store(at, by_page(y, RP), mask=n < count)
    tl.store(at + 32 * RP, by_page(z, RP), mask=n < count)


@triton.jit
def by_page(y, RP: tl.constexpr):
    """Scores `[32, pages * RP]` as `[pages, 32 * RP]`."""
    PAGES: tl.constexpr = y.shape[1] // RP
    return tl.reshape(tl.permute(tl.reshape(y, (32, PAGES, RP)), (1, 0, 2)), (PAGES, 32 * RP))


@triton.jit
def score_pages(
    query, mean, scale, valid, starts, relative, scores, which, programs, count, mask, row, slot, offset,
    HALF: tl.constexpr, HP: tl.constexpr, RP: tl.constexpr, PAGES: tl.constexpr, TILES: tl.constexpr,
    INTERLEAVED: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Scores of a row's `count` pages, `PAGES` at a time: those that fall to program `which` of `programs`.

    Of rows `query [RP]` points to, the constant part `mean` and `starts` of pages; `store_scores` has the rest.
    """
    SOME: tl.constexpr = 32 if HP > 32 else 16  # pairs at once, for want of registers
    factor = factor_of(query, mean, scale, valid, HALF, HP, INTERLEAVED)
    turns = ()
    for part in tl.static_range(HP // SOME):
        i = part * SOME + tl.arange(0, SOME)
        there = ((i < HALF) | (HALF == HP))[:, None] & valid[None, :]
        turns += (coefficients(query, mean, scale / factor, i, there, HALF, INTERLEAVED),)
    for first in tl.range(which * PAGES, count, programs * PAGES, num_stages=2):
        y, z = center_scores(turns, starts, relative, first, count, HALF, HP, SOME, RP, PAGES, TILES)
        store_scores(y * factor, z * factor, scores, first, count, mask, row, slot, offset, RP, TILES, MASK)
