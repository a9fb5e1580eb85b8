"""The Triton kernels before and after `triton_partials`: what a head's rows need, and their splits merged.

Queries of a head share a power of two that brings them to fp16's range. Everything here is fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_softmax import LOG2E, LOWEST, VARY, limit, mask_row, softmax

WARPS = {"prepare": 8, "combine": 4}


@triton.jit
def _dense(k, v, q, acc, top, tot, slot, begin, end, here, row, mask, limits, kt, vt, slots,
           D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, SOFTCAP: tl.constexpr,
           MASK: tl.constexpr, LISTED: tl.constexpr):  # fmt: skip
    """Fold dense tokens `begin` to `end` into a softmax: `k`, `v` point to the head, tokens `kt`, `vt` apart.

    Token `j` has slot `slot + j`, or `slots[j]` where `LISTED` (-1 is none).
    """
    d, e = tl.arange(0, DP), tl.arange(0, DVP)
    for first in range(begin, end, 32):
        token = first + tl.arange(0, 32)
        there = token < end
        at = slot + token
        if LISTED:
            at = tl.load(slots + token, mask=there, other=-1).to(tl.int32)
            there = at >= 0
        keys = tl.load(k + token[:, None] * kt + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0)
        y = tl.dot(keys.to(tl.float32), q, input_precision="ieee")
        y = limit(y, at, here, row, mask, there, limits, SOFTCAP, MASK)
        top, shrink, p = softmax(y, top)
        tot = tot * shrink + tl.sum(p, 0)
        values = tl.load(v + token[None, :] * vt + e[:, None], mask=there[None, :] & (e < DV)[:, None], other=0)
        acc = tl.dot(values.to(tl.float32), p, acc * shrink[None, :], input_precision="ieee")
    return acc, top, tot


@triton.jit(do_not_specialize=VARY)
def prepare(
    query, scale, matrix, norm, key_mean, center_mean, rotated, factors, constants, coefficients,
    sink_k, sink_v, recent_k, recent_v, side_k, side_v, side_slots, ints, mask, mixed, tops, totals,
    qb, qh, qt, sink_b, sink_h, sink_t, sink_vb, sink_vh, sink_vt, recent_b, recent_h, recent_t, recent_vb, recent_vh,
    recent_vt, side_b, side_h, side_t, side_vb, side_vh, side_vt, mb, mh, ms,
    batch, parts, sinks, recents, sides, steps, length, offset, window, ahead, softcap, column,
    H: tl.constexpr, ROWS: tl.constexpr, RB: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr,
    DVP: tl.constexpr, HALF: tl.constexpr, HP: tl.constexpr, INTERLEAVED: tl.constexpr, CENTER: tl.constexpr,
    SOFTCAP: tl.constexpr, MASK: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """A head and block of rows: either what `partials` needs, or (program 1) the dense tokens' part.

    `rotated [blocks, DP, RB]` fp16, `factors [blocks]`, `constants [blocks, RB]`, `coefficients [blocks, 2, HP, RB]`.
    """
    block = tl.program_id(0)
    pair, part = block // tl.cdiv(ROWS, RB), block % tl.cdiv(ROWS, RB)
    b, h = pair // H, pair % H
    lane = tl.arange(0, RB)
    r = part * RB + lane
    groups = ROWS // steps
    line = query + b.to(tl.int64) * qb + (h * groups + r // steps).to(tl.int64) * qh + (r % steps) * qt
    valid = r < ROWS
    d = tl.arange(0, DP)
    inside = (d < D)[:, None] & valid[None, :]
    q = tl.load(line[None, :] + d[:, None], mask=inside, other=0).to(tl.float32) * scale  # [DP, RB]
    if tl.program_id(1) == 0:
        # A bound of what q becomes, so that one pass suffices; rows of zeros get no factor of zero.
        size = tl.maximum(tl.sqrt(tl.max(tl.sum(q * q, 0))) * tl.load(norm + h), 1e-20)
        constant = tl.sum(q * tl.load(key_mean + h * D + d, mask=d < D, other=0)[:, None], 0)
        if CENTER:
            mean = center_mean + pair * D
            rest = tl.load(mean + d, mask=(d < D) & (d >= 2 * HALF), other=0)
            constant += tl.sum(q * rest[:, None], 0)
            i = tl.arange(0, HP)
            first, second = i, i + HALF
            if INTERLEAVED:
                first, second = 2 * i, 2 * i + 1
            paired = (i < HALF)[:, None] & valid[None, :]
            qa = tl.load(line[None, :] + first[:, None], mask=paired, other=0).to(tl.float32) * scale
            qs = tl.load(line[None, :] + second[:, None], mask=paired, other=0).to(tl.float32) * scale
            ma = tl.load(mean + first, mask=i < HALF, other=0)[:, None]
            mb_ = tl.load(mean + second, mask=i < HALF, other=0)[:, None]
            cos, sin = qa * ma + qs * mb_, qs * ma - qa * mb_
            size = tl.maximum(size, tl.max(tl.maximum(tl.abs(cos), tl.abs(sin))))
        factor = tl.exp2(tl.ceil(tl.log2(size)) - 12)
        tl.store(factors + block, factor)
        tl.store(constants + block * RB + lane, constant)
        if CENTER:
            turns = coefficients + block * 2 * HP * RB + i[:, None] * RB + lane[None, :]
            tl.store(turns, cos / factor)
            tl.store(turns + HP * RB, sin / factor)
        for first in range(0, DP, 16):
            out = first + tl.arange(0, 16)
            turn = tl.load(
                matrix + (h * D + out[:, None]) * D + d[None, :], mask=(out < D)[:, None] & (d < D)[None, :], other=0
            )
            y = tl.dot(turn, q, input_precision="ieee") / factor
            tl.store(rotated + block * DP * RB + out[:, None] * RB + lane[None, :], y.to(tl.float16))
    else:
        row, here = mask_row(b, h, r % ROWS, groups, steps, length, mb, mh, ms)
        limits = (offset, window, ahead, softcap, column)
        top = tl.full([RB], LOWEST, tl.float32)
        tot = tl.zeros([RB], tl.float32)
        acc = tl.zeros([DVP, RB], tl.float32)
        bl = b.to(tl.int64)
        acc, top, tot = _dense(
            sink_k + bl * sink_b + h * sink_h, sink_v + bl * sink_vb + h * sink_vh, q, acc, top, tot,
            tl.load(ints + 2 * batch + b), tl.load(ints + 3 * batch + b), sinks, here, row, mask, limits,
            sink_t, sink_vt, ints, D, DP, DV, DVP, SOFTCAP, MASK, False,
        )  # fmt: skip
        acc, top, tot = _dense(
            recent_k + bl * recent_b + h * recent_h, recent_v + bl * recent_vb + h * recent_vh, q, acc, top, tot,
            tl.load(ints + 4 * batch + b), tl.load(ints + 5 * batch + b), recents, here, row, mask, limits,
            recent_t, recent_vt, ints, D, DP, DV, DVP, SOFTCAP, MASK, False,
        )  # fmt: skip
        if SIDE:
            acc, top, tot = _dense(
                side_k + bl * side_b + h * side_h, side_v + bl * side_vb + h * side_vh, q, acc, top, tot,
                0, 0, sides, here, row, mask, limits, side_t, side_vt, side_slots + b * sides,
                D, DP, DV, DVP, SOFTCAP, MASK, True,
            )  # fmt: skip
        at = (pair * parts + parts - 1) * ROWS + r
        e = tl.arange(0, DVP)
        tl.store(tops + at, top, mask=valid)
        tl.store(totals + at, tot, mask=valid)
        tl.store(mixed + at[None, :] * DV + e[:, None], acc, mask=valid[None, :] & (e < DV)[:, None])


@triton.jit(do_not_specialize=VARY)
def combine(
    mixed, tops, totals, ints, matrix, value_mean, sink_logits, out, ob, ot, oh, batch, parts, steps,
    H: tl.constexpr, ROWS: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    SINKS: tl.constexpr,
):  # fmt: skip
    """One query row of one head: `out [B, Tq, Hq, DV]`."""
    pair, r = tl.program_id(0), tl.program_id(1)
    b, h = pair // H, pair % H
    splits = tl.cdiv(tl.load(ints + b), tl.load(ints + 6 * batch + b))
    head = h * (ROWS // steps) + r // steps
    e = tl.arange(0, DVP)
    line = pair * parts * ROWS + r
    dense = line + (parts - 1) * ROWS
    top = tl.load(tops + dense)
    total = tl.load(totals + dense)
    weight = total * 0 + 1  # of the dense part, whose maximum is `top`
    paged = total * 0
    pages = tl.zeros([DVP], tl.float32)
    for split in range(0, splits):
        at = line + split * ROWS
        new = tl.maximum(top, tl.load(tops + at))
        shrink, gain = tl.exp2(top - new), tl.exp2(tl.load(tops + at) - new)
        pages = pages * shrink + gain * tl.load(mixed + at * DV + e, mask=e < DV, other=0)
        paged = paged * shrink + gain * tl.load(totals + at)
        total, weight, top = total * shrink, weight * shrink, new
    total += paged
    result = weight * tl.load(mixed + dense * DV + e, mask=e < DV, other=0)
    result += paged * tl.load(value_mean + h * DV + e, mask=e < DV, other=0)
    # The rotation back, a block of its rows at a time.
    for first in range(0, DV, 16):
        i = first + tl.arange(0, 16)
        rows = tl.load(
            matrix + (h * DV + i[:, None]) * DV + e[None, :], mask=(i < DV)[:, None] & (e < DV)[None, :], other=0
        )
        part = tl.sum(tl.where(i[:, None] == e[None, :], pages[None, :], 0), 1)
        result += tl.sum(part[:, None] * rows, 0)
    if SINKS:
        logit = tl.load(sink_logits + head).to(tl.float32) * LOG2E
        new = tl.maximum(top, logit)
        result *= tl.exp2(top - new)
        total = total * tl.exp2(top - new) + tl.exp2(logit - new)
    result /= tl.maximum(total, 1e-30)
    at = out + b.to(tl.int64) * ob + (r % steps) * ot + head * oh + e
    tl.store(at, result.to(out.dtype.element_ty), mask=e < DV)
