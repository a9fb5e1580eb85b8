"""The Triton kernel that reads pages: scores, online softmax and mix of a few pages, on their codes.

Matrix units see fp16: queries times a power of two of their head's, levels, and probabilities times the value scale
over the largest so far. Sums are fp32. Tiles are transposed, tokens by rows: the few query rows of a head are the
narrow side of a product, so that little is computed for padding.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_scales import load_narrow
from .triton_softmax import LOWEST, VARY, constant_part, limit, mask_row, reorder, softmax
from .triton_tile import component_of, gather_tile, load_tables, table_keys, table_values, token_of


def partials_options(tables: bool, uniform: bool) -> dict:
    """How `partials` is compiled: one warp keeps tables, tile and softmax to itself; gathering wants more."""
    return {"num_warps": 1, "maxnreg": 255} if tables else {"num_warps": 4 if uniform else 8}


@triton.jit(do_not_specialize=VARY)
def partials(
    rotated, factors, constants, coefficients, starts, relative, pages, ints, mask, mixed, tops, totals,
    key_tables, key_affine, key_levels, key_widths, key_offsets,
    value_tables, value_affine, value_levels, value_widths, value_offsets,
    batch_words, page_words, key_codes, key_scales, value_codes, value_scales, starts_b, starts_n, mb, mh, ms,
    batch, parts, steps, length, offset, window, ahead, softcap, column,
    H: tl.constexpr, ROWS: tl.constexpr, RB: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr,
    DVP: tl.constexpr, KB: tl.constexpr, KU: tl.constexpr, VB: tl.constexpr, VU: tl.constexpr, HALF: tl.constexpr,
    HP: tl.constexpr, CENTER: tl.constexpr, SOFTCAP: tl.constexpr, MASK: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """A head's block of rows over a run of pages: `mixed [pairs, parts, rows, DV]`, `tops` and `totals` without `DV`.

    `KB` and `VB` are the bits of codes expanded by tables; where 0, codes of `KU` and `VU` bits (0: each component its
    own) are gathered. Offsets of sections are in words of their content: int32 for codes, bf16 for scales,
    bytes where they are `NARROW`.
    """
    block, split = tl.program_id(0), tl.program_id(1)
    pair, part = block // tl.cdiv(ROWS, RB), block % tl.cdiv(ROWS, RB)
    b, h = pair // H, pair % H
    count = tl.load(ints + b)
    slot0 = tl.load(ints + batch + b)
    each = tl.load(ints + 6 * batch + b)
    begin, end = split * each, tl.minimum(count, (split + 1) * each)
    if begin >= count:
        return
    # Pages that some row sees, [begin, end), and those inside that every row sees whole, [first, last).
    begin = tl.maximum(begin, tl.maximum(tl.maximum(length - steps - window + 1, offset) - slot0, 0) // 64)
    end = tl.maximum(tl.minimum(end, tl.maximum(length + ahead - slot0 + 63, 0) // 64), begin)
    first = (tl.maximum(tl.maximum(length - window, offset) - slot0, 0) + 63) // 64
    last = tl.maximum(length - steps + 1 + ahead - slot0, 0) // 64
    first = tl.minimum(tl.maximum(first, begin), end)
    last = tl.maximum(tl.minimum(last, end), first)
    if MASK > 0 or SOFTCAP:
        last = first

    lane = tl.arange(0, RB)
    r = part * RB + lane
    row, here = mask_row(b, h, r % ROWS, ROWS // steps, steps, length, mb, mh, ms)
    limits = (offset, window, ahead, softcap, column)
    place = tl.arange(0, DP // 2 if KB > 0 else DP)
    q = tl.load(rotated + (block * DP + component_of(place, 0, DP, KB))[:, None] * RB + lane[None, :])
    factor = tl.load(factors + block)
    constant = tl.load(constants + block * RB + lane)
    # Levels are step * (u + shift), and tiles hold 1024 + u.
    base = tl.zeros([RB], tl.float32)
    factor_k = factor
    if KB > 0:
        q1 = tl.load(rotated + (block * DP + component_of(place, 1, DP, KB))[:, None] * RB + lane[None, :])
        base = tl.sum(q.to(tl.float32) + q1.to(tl.float32), 0) * (tl.load(key_affine + 2 * h + 1) - 1024)
        factor_k *= tl.load(key_affine + 2 * h)
        key_table = load_tables(key_tables + h * 16, KB)
    if VB > 0:
        value_table = load_tables(value_tables + h * 16, VB)
    token = token_of(tl.arange(0, 64), KB)
    if CENTER:
        i = tl.arange(0, HP)
        turn = relative + token[:, None] * HP + i[None, :]  # [cos, sin][high, low][64][HP] fp16
        cos_high, cos_low = tl.load(turn), tl.load(turn + 64 * HP)
        sin_high, sin_low = tl.load(turn + 128 * HP), tl.load(turn + 192 * HP)
        turns = coefficients + block * 2 * HP * RB + i[:, None] * RB + lane[None, :]
        start = starts + b.to(tl.int64) * starts_b

    head_pages = pages + b.to(tl.int64) * batch_words
    acc = tl.zeros([DVP, RB], tl.float32)
    ones = tl.full([16, 64], 1, tl.float16)
    sums = tl.zeros([16, RB], tl.float32)
    top = tl.full([RB], LOWEST, tl.float32)
    tot = tl.zeros([8, RB], tl.float32)
    largest = factor * 0 + 1e-30

    for EDGE in tl.static_range(2):
        left = first - begin
        for step in range(0, left + end - last if EDGE else last - first):
            if EDGE:
                n = tl.where(step < left, begin + step, last + step - left)
            else:
                n = first + step
            page = head_pages + n * page_words
            # The head, so told that no address of a gathered tile is computed before the loop, to fill the registers.
            again = h + (n * n + n) % 2
            if NARROW:
                scales = page.to(tl.pointer_type(tl.uint8)) + h * 64 + token
                key_scale, value_scale = load_narrow(scales + key_scales), load_narrow(scales + value_scales)
            else:
                scales = page.to(tl.pointer_type(tl.bfloat16)) + h * 64 + token
                key_scale = tl.load(scales + key_scales).to(tl.float32)
                value_scale = tl.load(scales + value_scales).to(tl.float32)
            if CENTER:
                cos = tl.load(start + n * starts_n + i, mask=i < HALF, other=0)[:, None]
                sin = tl.load(start + n * starts_n + HALF + i, mask=i < HALF, other=0)[:, None]
                a, c = tl.load(turns), tl.load(turns + HP * RB)
                extra = (
                    constant_part(cos_high, cos_low, sin_high, sin_low, a * cos + c * sin, c * cos - a * sin) * factor
                )
            y = tl.broadcast_to(base[None, :], (64, RB))
            if KB > 0:
                codes = page + key_codes + h * (2 * KB * D)
                y = tl.dot(table_keys(codes, key_table, 0, D, DP, KB), q, y)
                y = tl.dot(table_keys(codes, key_table, 1, D, DP, KB), q1, y)
            else:
                codes = page.to(tl.pointer_type(tl.uint8)) + key_codes * 4
                y = tl.dot(tl.trans(gather_tile(codes, again, key_levels, key_widths, key_offsets, D, DP, KU)), q, y)
            y *= (key_scale * factor_k)[:, None]
            if CENTER:
                y += extra
            if SOFTCAP:
                y += constant[None, :]
            if EDGE:
                slot = slot0 + n * 64 + token
                y = limit(y, slot, here, row, mask, slot >= 0, limits, SOFTCAP, MASK)
            y = tl.where((key_scale < float("inf"))[:, None], y, -float("inf"))
            top, shrink, p = softmax(y, top)
            tot = tot * shrink[None, :] + tl.sum(tl.reshape(p, (8, 8, RB)), 0)
            most = tl.maximum(largest, tl.max(tl.abs(value_scale), 0))
            shrink *= largest / most
            largest = most
            weights = reorder((p * (value_scale * (32768 / most))[:, None]).to(tl.float16), KB, VB, RB)
            if VB > 0:
                codes = page + value_codes + h * (2 * VB * DV)
                values = table_values(codes, value_table, DV, DVP, VB)
                sums = tl.dot(ones, weights, sums * shrink[None, :])
            else:
                codes = page.to(tl.pointer_type(tl.uint8)) + value_codes * 4
                values = gather_tile(codes, again, value_levels, value_widths, value_offsets, DV, DVP, VU)
            acc = tl.dot(values, weights, acc * shrink[None, :])

    unit = largest / 32768
    if VB > 0:
        acc += (tl.load(value_affine + 2 * h + 1) - 1024) * tl.max(sums, 0)[None, :]
        unit *= tl.load(value_affine + 2 * h)
    if SOFTCAP:
        constant = tl.zeros([RB], tl.float32)
    at = (pair * parts + split) * ROWS + r
    e = tl.arange(0, DVP)
    valid = r < ROWS
    tl.store(tops + at, top + constant, mask=valid)
    tl.store(totals + at, tl.sum(tot, 0), mask=valid)
    tl.store(mixed + at[None, :] * DV + e[:, None], acc * unit, mask=valid[None, :] & (e < DV)[:, None])
