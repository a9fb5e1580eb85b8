"""The Triton kernel that reads pages: scores, online softmax and mix of a few pages, on their codes.

Matrix units see bytes, levels by the tables of `triton_tables`, and numbers of two bytes: queries times a factor of
their head's, and probabilities times the value scale over the largest of a page. Sums are exact in a page, fp32 across
pages. Where levels are gathered, all of these are fp16. Tiles are transposed, tokens by rows: the few query rows of a
head are the narrow side of a product, so that little is computed for padding.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_bytes import BEGIN, MOST, join_bytes, load_bytes, split_bytes
from .triton_gather import gather_tile
from .triton_rows import SLICE, record_size, softmax_sums
from .triton_scales import load_scales, scale_of
from .triton_softmax import FUSED, LOWEST, VARY, limit, mask_row, softmax
from .triton_tile import component_of, key_tile, load_shifts, load_tables, reorder, token_of, value_tile


def partials_options(tables: bool, dim: int, shared: int) -> dict:
    """How `partials` is compiled: one warp keeps tables, tile and softmax to itself.

    The fewer registers and shared bytes a warp has, the more warps hide each other's waiting; with fewer registers some
    would be spilt. Codes are copied a page ahead where `shared`, the bytes of a multiprocessor, hold two pages of eight
    warps. Four and eight warps, for gathered levels with a constant part, computed something else on an H200.
    """
    if not tables:
        return FUSED | {"num_warps": 1}
    stages = 3 if dim <= 128 and shared >= 160 << 10 else 2
    return FUSED | {"num_warps": 1, "num_stages": stages, "maxnreg": 168 if dim <= 128 else 200}


@triton.jit
def empty_mix(SIZE: tl.constexpr, RB: tl.constexpr):
    """Zeros `[SIZE, RB]` fp32. Triton 3.6 takes a number of a tuple as an argument, not in a shape."""
    return tl.zeros([SIZE, RB], tl.float32)


@triton.jit
def page_number(step, begin, first, last, count, EDGE: tl.constexpr):
    """Page of a step through those from `first` to `last` or, at the edges, before and after; a step too far, any."""
    n = first + step
    if EDGE:
        n = tl.where(begin + step < first, begin + step, last + step - (first - begin))
    return tl.minimum(n, count - 1)


@triton.jit(do_not_specialize=VARY, do_not_specialize_on_alignment=["mask"])
def partials(
    prepared, scores, pages, ints, mask, sums,
    key_tables, key_levels, key_widths, key_offsets,
    value_tables, value_levels, value_widths, value_offsets, value_middle,
    batch_words, page_words, key_codes, key_scales, value_codes, value_scales, mb, mh, ms,
    batch, parts, room, steps, window, ahead, softcap,
    H: tl.constexpr, ROWS: tl.constexpr, RB: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr,
    KEYS: tl.constexpr, KU: tl.constexpr, VALUES: tl.constexpr, VU: tl.constexpr, RP: tl.constexpr,
    CENTER: tl.constexpr, SOFTCAP: tl.constexpr, MASK: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """A head's block of rows over a run of pages: from `prepared` to a part of `sums`, see `triton_rows`.

    `KEYS` and `VALUES` are the pieces (`triton_tile`) that tables expand; where they have no width, codes of `KU` and
    `VU` bits (0: each component its own) are gathered. Offsets of sections are in words of their content: int32 for
    codes, bf16 for scales, bytes where they are `NARROW`.
    """
    TABLES: tl.constexpr = KEYS[0][0] > 0
    KEY_WORDS: tl.constexpr = KEYS[-1][3] + 2 * KEYS[-1][0] * KEYS[-1][2]  # of a head
    VALUE_WORDS: tl.constexpr = VALUES[-1][3] + 2 * VALUES[-1][0] * VALUES[-1][2]
    block, split = tl.program_id(0), tl.program_id(1)
    pair, part = block // tl.cdiv(ROWS, RB), block % tl.cdiv(ROWS, RB)
    b, h = pair // H, pair % H
    count = tl.load(ints + b)
    slot0 = tl.load(ints + batch + b)
    each = tl.load(ints + 6 * batch + b)
    begin, end = split * each, tl.minimum(count, (split + 1) * each)
    if begin >= count:
        return
    length, offset = tl.load(ints + 8 * batch + b), tl.load(ints + 9 * batch + b)
    # Pages that some row sees, [begin, end), and those inside that every row sees whole, [first, last).
    begin = tl.maximum(begin, tl.maximum(tl.maximum(length - steps - window + 1, offset) - slot0, 0) // 64)
    end = tl.maximum(tl.minimum(end, tl.maximum(length + ahead - slot0 + 63, 0) // 64), begin)
    first = (tl.maximum(tl.maximum(length - window, offset) - slot0, 0) + 63) // 64
    last = tl.maximum(length - steps + 1 + ahead - slot0, 0) // 64
    first = tl.minimum(tl.maximum(first, begin), end)
    last = tl.maximum(tl.minimum(last, end), first)
    # Where a mask or a cap is in all pages, or gathering is slow anyway, one loop is enough.
    ONE: tl.constexpr = MASK > 0 or SOFTCAP or not TABLES
    if ONE:
        last = first

    lane = tl.arange(0, RB)
    r = part * RB + lane
    row, here = mask_row(b, h, r % ROWS, ROWS // steps, steps, length, mb, mh, ms)
    limits = (offset, window, ahead, softcap)
    record = prepared + block * RB * record_size(DP)
    line = record.to(tl.pointer_type(tl.float16))
    record += DP // 2 * RB
    factor = tl.load(record)
    constant = tl.load(record + RB + lane)
    base = tl.zeros([RB], tl.float32)
    token = tl.arange(0, 64)
    q, acc, key_words, value_words = (), (), (), ()
    if TABLES:
        token = token_of(token)
        shifts = load_shifts(key_tables)
        for j in tl.static_range(DP // SLICE):
            base += tl.load(record + (2 + j) * RB + lane)
    for j in tl.static_range(len(KEYS)):
        if TABLES:
            place = component_of(tl.arange(0, 32), KEYS[j][2])
            place, there = KEYS[j][1] + place, place < KEYS[j][2]
            q += (load_bytes(line, place, there, RB),)
            key_words += (load_tables(key_tables + h * 64, KEYS[j][0], KEYS[j][4]),)
        else:
            place = KEYS[j][1] + tl.arange(0, KEYS[j][2])
            q += (tl.load(line + place[:, None] * RB + lane[None, :]),)
    for j in tl.static_range(len(VALUES)):
        acc += (empty_mix(VALUES[j][2], RB),)
        if TABLES:
            value_words += (load_tables(value_tables + h * 64, VALUES[j][0], VALUES[j][4]),)
    if CENTER:
        # Tokens are in the order of `token` there.
        score = scores + block.to(tl.int64) * room * 64 * RP + tl.arange(0, 64)[:, None] * RP + lane[None, :]

    head_pages = pages + b.to(tl.int64) * batch_words
    key_scales += h * 64 + token
    value_scales += h * 64 + token
    top = tl.full([RB], LOWEST, tl.float32)
    tot, weighed = tl.zeros([8, RB], tl.float32), tl.zeros([8, RB], tl.float32)

    for EDGE in tl.static_range(1 if ONE else 0, 2):
        # Scales are too small to be copied asynchronously: they are read a page ahead.
        page = head_pages + page_number(0, begin, first, last, count, EDGE) * page_words
        key_scale = scale_of(load_scales(page, key_scales, NARROW), NARROW)
        value_scale = scale_of(load_scales(page, value_scales, NARROW), NARROW)
        for step in range(0, first - begin + end - last if EDGE else last - first):
            page = head_pages + page_number(step + 1, begin, first, last, count, EDGE) * page_words
            next_k, next_v = load_scales(page, key_scales, NARROW), load_scales(page, value_scales, NARROW)
            n = page_number(step, begin, first, last, count, EDGE)
            page = head_pages + n * page_words
            # The head, so told that no address of a gathered tile is computed before the loop, to fill the registers.
            again = h + (n * n + n) % 2
            if CENTER:
                apart = tl.load(score + n * (64 * RP), mask=(lane < RP)[None, :], other=0)
            codes = page + key_codes
            if TABLES:
                y = tl.full([64, 2 * RB], BEGIN, tl.int32)
            else:
                y = tl.zeros([64, RB], tl.float32)
            for j in tl.static_range(len(KEYS)):
                if TABLES:
                    head = codes + h * KEY_WORDS + KEYS[j][3]
                    tile = key_tile(head, key_words[j], shifts, KEYS[j][2], KEYS[j][0], KEYS[j][4])
                else:
                    tile = gather_tile(codes, again, key_levels, key_widths, key_offsets, D, KEYS[j][1], KEYS[j][2], KU)
                    tile = tl.trans(tile)
                y = tl.dot(tile, q[j], y, out_dtype=y.dtype)
            if TABLES:
                y = join_bytes(y, 64, RB) + base[None, :]
            y *= (tl.where(key_scale < float("inf"), key_scale, 0) * factor)[:, None]
            if CENTER:
                y += apart
            if SOFTCAP:
                y += constant[None, :]
            if EDGE:
                slot = slot0 + n * 64 + token
                y = limit(y, slot, here, row, mask, slot >= 0, limits, SOFTCAP, MASK)
            # Tokens that are held elsewhere have no scale.
            y += tl.where(key_scale < float("inf"), 0, -float("inf"))[:, None]
            # Weights are relative to a row's largest of the page: small ones count, however large another page's were
            # and whatever the scales of tokens that nothing looks at.
            page_top, _, p = softmax(y, tl.full([RB], LOWEST, tl.float32))
            new = tl.maximum(top, page_top)
            shrink, gain = tl.exp2(top - new), tl.exp2(page_top - new)
            top = new
            tot = tot * shrink[None, :] + tl.sum(tl.reshape(p, (8, 8, RB)), 0) * gain[None, :]
            weights = p * value_scale[:, None]
            most = tl.maximum(tl.max(tl.abs(weights), 0), 1e-30)
            gain *= most / MOST
            weights *= (1 / most)[None, :] * MOST
            if TABLES:
                weights, rounded = split_bytes(reorder(weights, RB), 64, RB)
                weighed = weighed * shrink[None, :] + tl.sum(tl.reshape(rounded, (8, 8, RB)), 0) * gain[None, :]
            else:
                weights = weights.to(tl.float16)
            codes = page + value_codes
            mix = ()
            for j in tl.static_range(len(VALUES)):
                if TABLES:
                    head = codes + h * VALUE_WORDS + VALUES[j][3]
                    tile = value_tile(head, value_words[j], shifts, VALUES[j][2], VALUES[j][0], VALUES[j][4])
                else:
                    tile = gather_tile(
                        codes, again, value_levels, value_widths, value_offsets, DV, VALUES[j][1], VALUES[j][2], VU
                    )
                if TABLES:
                    none = tl.full([VALUES[j][2], 2 * RB], BEGIN, tl.int32)
                    found = join_bytes(tl.dot(tile, weights, none, out_dtype=tl.int32), VALUES[j][2], RB)
                else:
                    found = tl.dot(tile, weights)
                mix += (acc[j] * shrink[None, :] + found * gain[None, :],)
            acc = mix
            key_scale, value_scale = scale_of(next_k, NARROW), scale_of(next_v, NARROW)

    if SOFTCAP:
        constant = tl.zeros([RB], tl.float32)
    tops, totals = softmax_sums(sums, batch, parts, H, ROWS, DV)
    at = (pair.to(tl.int64) * parts + split) * ROWS + r
    valid = r < ROWS
    tl.store(tops + at, top + constant, mask=valid)
    tl.store(totals + at, tl.sum(tot, 0), mask=valid)
    line = sums + at[None, :] * DV
    for j in tl.static_range(len(VALUES)):
        e = VALUES[j][1] + tl.arange(0, VALUES[j][2])
        found = acc[j]
        if TABLES:
            found += tl.load(value_middle + h * DV + e)[:, None] * tl.sum(weighed, 0)[None, :]
        tl.store(line + e[:, None], found, mask=valid[None, :] & (e < DV)[:, None])
