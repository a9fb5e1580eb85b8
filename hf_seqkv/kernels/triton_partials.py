"""The Triton kernel that reads pages: scores, online softmax and mix of a few pages, on their codes.

Matrix units see fp16: queries times a power of two of their head's, levels, and probabilities times the value scale
over the largest so far. Sums are fp32. Tiles are transposed, tokens by rows: the few query rows of a head are the
narrow side of a product, so that little is computed for padding.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_gather import gather_tile
from .triton_rows import softmax_sums
from .triton_scales import load_narrow
from .triton_softmax import FUSED, LOWEST, VARY, exact_dot, limit, mask_row, reorder, softmax
from .triton_tile import component_of, key_tile, load_shifts, load_tables, token_of, value_tile


def partials_options(tables: bool, plain: bool, dim: int) -> dict:
    """How `partials` is compiled: one warp keeps tables, tile and softmax to itself.

    The fewer registers and shared bytes a warp has, the more warps hide each other's waiting; fewer would be spilt.
    Four and eight warps, for gathered levels with a constant part, computed something else on an H200 (Triton 3.6).
    """
    if not tables:
        return FUSED | {"num_warps": 1}
    return FUSED | {"num_warps": 1, "num_stages": 2, "maxnreg": (168 if dim <= 128 else 200) if plain else 255}


@triton.jit
def empty_mix(SIZE: tl.constexpr, RB: tl.constexpr):
    """Zeros `[SIZE, RB]` fp32. Triton 3.6 takes a number of a tuple as an argument, not in a shape."""
    return tl.zeros([SIZE, RB], tl.float32)


@triton.jit(do_not_specialize=VARY, do_not_specialize_on_alignment=["mask"])
def partials(
    prepared, starts, relative, pages, ints, mask, sums,
    key_tables, key_middle, key_levels, key_widths, key_offsets,
    value_tables, value_middle, value_levels, value_widths, value_offsets,
    batch_words, page_words, key_codes, key_scales, value_codes, value_scales, starts_b, starts_n, mb, mh, ms,
    batch, parts, steps, length, offset, window, ahead, softcap, column,
    H: tl.constexpr, ROWS: tl.constexpr, RB: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr,
    KEYS: tl.constexpr, KU: tl.constexpr, VALUES: tl.constexpr, VU: tl.constexpr, HALF: tl.constexpr, HP: tl.constexpr,
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
    limits = (offset, window, ahead, softcap, column)
    record = prepared + block * RB * (DP // 2 + 2 + (2 * HP if CENTER else 0))
    line = record.to(tl.pointer_type(tl.float16)) + lane[None, :]
    record += DP // 2 * RB
    factor = tl.load(record)
    constant = tl.load(record + RB + lane)
    base = tl.zeros([RB], tl.float32)
    token = tl.arange(0, 64)
    q, acc, key_words, value_words = (), (), (), ()
    if TABLES:
        token = token_of(token)
        shifts = load_shifts(key_tables)
    for j in tl.static_range(len(KEYS)):
        place = tl.arange(0, KEYS[j][2])
        if TABLES:
            place = component_of(place, KEYS[j][2])
        place += KEYS[j][1]
        q += (tl.load(line + place[:, None] * RB),)
        if TABLES:
            base += tl.sum(q[j].to(tl.float32) * tl.load(key_middle + h * D + place)[:, None], 0)
            key_words += (load_tables(key_tables + h * 64, KEYS[j][0]),)
    for j in tl.static_range(len(VALUES)):
        acc += (empty_mix(VALUES[j][2], RB),)
        if TABLES:
            value_words += (load_tables(value_tables + h * 64, VALUES[j][0]),)
    if CENTER:
        i = tl.arange(0, HP)
        turn = relative + token[:, None] * HP + i[None, :]  # [cos, sin][64][HP] fp16
        turn_cos, turn_sin = tl.load(turn), tl.load(turn + 64 * HP)
        turns = record + 2 * RB + i[:, None] * RB + lane[None, :]
        start = starts + b.to(tl.int64) * starts_b

    head_pages = pages + b.to(tl.int64) * batch_words
    ones = tl.full([16, 64], 1, tl.float16)
    weighed = tl.zeros([16, RB], tl.float32)
    top = tl.full([RB], LOWEST, tl.float32)
    tot = tl.zeros([8, RB], tl.float32)
    largest = factor * 0 + 1e-30

    for EDGE in tl.static_range(1 if ONE else 0, 2):
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
            y = tl.broadcast_to(base[None, :], (64, RB))
            codes = page + key_codes
            for j in tl.static_range(len(KEYS)):
                if TABLES:
                    head = codes + h * KEY_WORDS + KEYS[j][3]
                    tile = key_tile(head, key_words[j], shifts, KEYS[j][2], KEYS[j][0])
                else:
                    tile = gather_tile(codes, again, key_levels, key_widths, key_offsets, D, KEYS[j][1], KEYS[j][2], KU)
                    tile = tl.trans(tile)
                y = tl.dot(tile, q[j], y)
            y *= key_scale[:, None]
            if CENTER:
                cos = tl.load(start + n * starts_n + i, mask=i < HALF, other=0)[:, None]
                sin = tl.load(start + n * starts_n + HALF + i, mask=i < HALF, other=0)[:, None]
                a, c = tl.load(turns), tl.load(turns + HP * RB)
                y = exact_dot(turn_cos, a * cos + c * sin, y)
                y = exact_dot(turn_sin, c * cos - a * sin, y)
            y *= factor
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
            weights = (p * (value_scale * (32768 / most))[:, None]).to(tl.float16)
            if TABLES:
                weights = reorder(weights, RB)
                weighed = tl.dot(ones, weights, weighed * shrink[None, :])
            codes = page + value_codes
            mix = ()
            for j in tl.static_range(len(VALUES)):
                if TABLES:
                    head = codes + h * VALUE_WORDS + VALUES[j][3]
                    tile = value_tile(head, value_words[j], shifts, VALUES[j][2], VALUES[j][0])
                else:
                    tile = gather_tile(
                        codes, again, value_levels, value_widths, value_offsets, DV, VALUES[j][1], VALUES[j][2], VU
                    )
                mix += (tl.dot(tile, weights, acc[j] * shrink[None, :]),)
            acc = mix

    unit = largest / 32768
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
            found += tl.load(value_middle + h * DV + e)[:, None] * tl.max(weighed, 0)[None, :]
        tl.store(line + e[:, None], found * unit, mask=valid[None, :] & (e < DV)[:, None])
