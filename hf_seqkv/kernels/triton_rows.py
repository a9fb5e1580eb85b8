"""The Triton kernels before and after `triton_partials`: what a head's rows need, dense tokens, and all parts merged.

Queries of a head share a factor that brings them to what matrix units take. Everything here is fp32, to the last
digits: matrix units take numbers in three parts (`tf32x3`) where they can. Between the kernels lie two buffers of fp32:

    prepared    by block of rows: queries as keys are rotated, `[DP, RB]` fp16 or, for tiles, two bytes each
                (`triton_bytes.split_bytes`); their factor and the constant score, `[RB]` each; for tiles sums of
                these numbers times the zeros of tables, `[DP / SLICE, RB]`
    sums        by KV head and part: mix `[pairs, parts, rows, DV]`, then maxima and totals `[pairs, parts, rows]` of
                its softmax; first the parts of pages, from `splits` on those of dense tokens, `CHUNK` of them each

and where keys have a constant part its scores, `[blocks, room, 64, RP]` fp32 (`triton_center`), with the mask in them
unless a softcap comes before it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_bytes import MOST, split_bytes
from .triton_center import score_pages
from .triton_softmax import FUSED, LOG2E, LOWEST, VARY, limit, mask_row, softmax

CHUNK = tl.constexpr(32)  # dense tokens a part
SLICE = tl.constexpr(32)  # rotated components a program
OPTIONS = {"num_warps": 4, **FUSED}


@triton.constexpr_function
def record_size(padded: int) -> int:
    """Numbers of a query in `prepared`, of `padded` components."""
    return padded // 2 + 2 + padded // SLICE.value


def pages_scored(rows: int) -> int:
    """Pages whose constant scores are computed at once, for `rows` queries: what registers hold."""
    return max(64 // rows, 2)


def prepare_options(wide: int, nvidia: bool) -> tuple[dict, int]:
    """How `prepare` is compiled for a table of `wide` pairs, and how many of its programs a multiprocessor holds."""
    resident = 3 if wide <= 64 else 2
    return OPTIONS | ({"maxnreg": 168 if resident == 3 else 255} if nvidia else {}), resident


@triton.jit
def softmax_sums(sums, batch, parts, H: tl.constexpr, ROWS: tl.constexpr, DV: tl.constexpr):
    """Where maxima and totals begin in `sums`."""
    count = (parts * ROWS).to(tl.int64) * batch * H
    return sums + count * DV, sums + count * (DV + 1)


@triton.jit
def scaled(line, d, valid, scale, D: tl.constexpr):
    """Components `d` of query rows at `line [R]`, `[n, R]` fp32, zeros where there is none."""
    there = (d < D)[:, None] & valid[None, :]
    return tl.load(line[None, :] + d[:, None], mask=there, other=0).to(tl.float32) * scale


@triton.jit(do_not_specialize=VARY, do_not_specialize_on_alignment=["mask"])
def prepare(
    query, scale, matrix, norm, key_mean, key_middle, center_mean, prepared,
    sink_k, sink_v, recent_k, recent_v, side_k, side_v, side_slots, ints, mask, sums, starts, relative, scores,
    qb, qh, qt, sink_room, recent_room, side_room, mb, mh, ms, starts_room,
    batch, parts, splits, sinks, sides, room, steps, window, ahead, softcap,
    H: tl.constexpr, ROWS: tl.constexpr, RB: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr,
    DVP: tl.constexpr, HALF: tl.constexpr, HP: tl.constexpr, INTERLEAVED: tl.constexpr, CENTER: tl.constexpr,
    RP: tl.constexpr, PAGES: tl.constexpr, TILES: tl.constexpr, SOFTCAP: tl.constexpr, MASK: tl.constexpr,
    SIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A head and block of rows: in its first `DP / SLICE` programs a slice of what `partials` needs, then as many
    dense tokens as a part has; those that remain share the constant part's scores, of `PAGES` pages at a time.

    Runs of dense tokens are `[B, H, room, D]`: the first `sinks` and `sides` of them, of recent ones as `ints` says.
    """
    SLICES: tl.constexpr = DP // SLICE
    block, which = tl.program_id(0), tl.program_id(1)
    pair, part = block // tl.cdiv(ROWS, RB), block % tl.cdiv(ROWS, RB)
    b, h = pair // H, pair % H
    length, offset = tl.load(ints + 8 * batch + b), tl.load(ints + 9 * batch + b)
    LANES: tl.constexpr = RB if RB > 8 else 8  # as few as matrix units take
    lane = tl.arange(0, LANES)
    r = part * RB + lane
    groups = ROWS // steps
    line = query + b.to(tl.int64) * qb + (h * groups + r // steps).to(tl.int64) * qh + (r % steps) * qt
    valid = (r < ROWS) & (lane < RB)
    STEP: tl.constexpr = 64 if DP > 64 else DP  # components at once, for want of registers
    if which < SLICES:
        out = which * SLICE + tl.arange(0, SLICE)
        y = tl.zeros([SLICE, LANES], tl.float32)
        power, constant = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
        for first in tl.range(0, DP, STEP, num_stages=1):
            d = first + tl.arange(0, STEP)
            q = scaled(line, d, valid, scale, D)
            turn = matrix + (h * D + out[:, None]) * D + d[None, :]
            turn = tl.load(turn, mask=(out < D)[:, None] & (d < D)[None, :], other=0)
            y = tl.dot(turn, q, y, input_precision=PRECISION)
            power += tl.sum(q * q, 0)
            rest = tl.load(key_mean + h * D + d, mask=d < D, other=0)
            if CENTER:
                rest += tl.load(center_mean + pair * D + d, mask=(d < D) & (d >= 2 * HALF), other=0)
            constant += tl.sum(q * rest[:, None], 0)
        # A bound of what q becomes, so that one pass suffices; rows of zeros get no factor of zero.
        size = tl.maximum(tl.sqrt(tl.max(power)) * tl.load(norm + h), 1e-20)
        factor = size / MOST
        y /= factor
        record = prepared + block * RB * record_size(DP)
        if TILES:
            both, rounded = split_bytes(y, SLICE, LANES)
            place = tl.arange(0, 2 * LANES)[None, :]
            data = record.to(tl.pointer_type(tl.int8)) + out[:, None] * (2 * RB) + place
            tl.store(data, both, mask=place < 2 * RB)
            middle = tl.load(key_middle + h * D + out, mask=out < D, other=0)
            data = record + (DP // 2 + 2 + which) * RB
            tl.store(data + lane, tl.sum(rounded * middle[:, None], 0), mask=lane < RB)
        else:
            data = record.to(tl.pointer_type(tl.float16)) + out[:, None] * RB + lane[None, :]
            tl.store(data, y.to(tl.float16), mask=(lane < RB)[None, :])
        if which == 0:
            record += DP // 2 * RB
            tl.store(record + lane, tl.zeros([LANES], tl.float32) + factor, mask=lane < RB)
            tl.store(record + RB + lane, constant, mask=lane < RB)
    elif which < SLICES + parts - splits:
        chunk = which - SLICES
        sink_chunks = tl.cdiv(sinks, CHUNK)
        recent_chunks = parts - splits - sink_chunks
        if SIDE:
            recent_chunks -= tl.cdiv(sides, CHUNK)
        at = pair.to(tl.int64)
        # A row's chunks begin at its own first token, whatever its neighbours.
        if chunk < sink_chunks:
            token = tl.load(ints + 3 * batch + b) + chunk * CHUNK + tl.arange(0, CHUNK)
            there = token < sinks
            slot = tl.load(ints + 2 * batch + b) + token
            k, v = sink_k + at * sink_room * D, sink_v + at * sink_room * DV
        else:
            token = tl.load(ints + 5 * batch + b) + (chunk - sink_chunks) * CHUNK + tl.arange(0, CHUNK)
            there = token < tl.load(ints + 7 * batch + b)
            slot = tl.load(ints + 4 * batch + b) + token
            k, v = recent_k + at * recent_room * D, recent_v + at * recent_room * DV
        if SIDE:  # noqa: SIM102 - known to the compiler, and then to the program
            if chunk >= sink_chunks + recent_chunks:
                token = (chunk - sink_chunks - recent_chunks) * CHUNK + tl.arange(0, CHUNK)
                slot = tl.load(side_slots + b * sides + token, mask=token < sides, other=-1).to(tl.int32)
                there = slot >= 0
                k, v = side_k + at * side_room * D, side_v + at * side_room * DV
        row, here = mask_row(b, h, r % ROWS, groups, steps, length, mb, mh, ms)
        y = tl.zeros([CHUNK, LANES], tl.float32)
        for first in tl.range(0, DP, STEP, num_stages=1):
            d = first + tl.arange(0, STEP)
            q = scaled(line, d, valid, scale, D)
            keys = tl.load(k + token[:, None] * D + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0)
            y = tl.dot(keys.to(tl.float32), q, y, input_precision=PRECISION)
        y = limit(y, slot, here, row, mask, there, (offset, window, ahead, softcap), SOFTCAP, MASK)
        top, _, p = softmax(y, tl.full([LANES], LOWEST, tl.float32))
        tops, totals = softmax_sums(sums, batch, parts, H, ROWS, DV)
        at = (at * parts + splits + chunk) * ROWS + r
        tl.store(tops + at, top, mask=valid)
        tl.store(totals + at, tl.sum(p, 0), mask=valid)
        WIDE: tl.constexpr = 64 if DVP > 64 else DVP
        for first in tl.range(0, DVP, WIDE, num_stages=1):
            e = first + tl.arange(0, WIDE)
            values = tl.load(v + token[None, :] * DV + e[:, None], mask=there[None, :] & (e < DV)[:, None], other=0)
            mix = tl.dot(values.to(tl.float32), p, input_precision=PRECISION)
            tl.store(sums + at[None, :] * DV + e[:, None], mix, mask=valid[None, :] & (e < DV)[:, None])
    elif CENTER:
        own = part * RB + tl.arange(0, RP)
        each = query + b.to(tl.int64) * qb + (h * groups + own // steps).to(tl.int64) * qh + (own % steps) * qt
        lines, _slots = mask_row(b, h, own % ROWS, groups, steps, length, mb, mh, ms)
        before = SLICES + parts - splits
        begin = b.to(tl.int64) * starts_room + tl.load(ints + 10 * batch + b)
        score_pages(
            each, center_mean + pair * D, scale, own < ROWS, starts + begin * (2 * HALF), relative,
            scores + block.to(tl.int64) * room * 64 * RP, which - before, tl.num_programs(1) - before,
            tl.load(ints + b), mask, lines, tl.load(ints + batch + b), offset,
            HALF, HP, RP, PAGES, TILES, INTERLEAVED, 0 if SOFTCAP else MASK,
        )  # fmt: skip


@triton.jit
def _merge(sums, tops, totals, first, count, e, ROWS: tl.constexpr, DV: tl.constexpr):
    """Maximum, total and mix of components `e` of `count` parts of a row, the first at `first`."""
    top, total = tl.full([], LOWEST, tl.float32), tl.full([], 0, tl.float32)
    mix = tl.zeros([e.shape[0]], tl.float32)
    for begin in range(0, count, 32):
        i = begin + tl.arange(0, 32)
        at = first + i * ROWS
        tops_here = tl.load(tops + at, mask=i < count, other=LOWEST)
        totals_here = tl.load(totals + at, mask=i < count, other=0)
        mixes = tl.load(
            sums + at[:, None] * DV + e[None, :], mask=(i < count)[:, None] & (e < DV)[None, :], other=0
        )
        new = tl.maximum(top, tl.max(tops_here, 0))
        shrink, gain = tl.exp2(top - new), tl.exp2(tops_here - new)
        total = total * shrink + tl.sum(gain * totals_here, 0)
        mix = mix * shrink + tl.sum(gain[:, None] * mixes, 0)
        top = new
    return top, total, mix


@triton.jit(do_not_specialize=VARY)
def combine(
    sums, ints, matrix, value_mean, sink_logits, out, ob, ot, oh, batch, parts, splits, steps,
    H: tl.constexpr, ROWS: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, PART: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """`PART` components of a query row of a head: `out [B, Tq, Hq, DV]`."""
    pair, r = tl.program_id(0), tl.program_id(1)
    b, h = pair // H, pair % H
    i, e = tl.arange(0, DVP), tl.program_id(2) * PART + tl.arange(0, PART)
    rows = tl.load(
        matrix + (h * DV + i[:, None]) * DV + e[None, :], mask=(i < DV)[:, None] & (e < DV)[None, :], other=0
    )
    mean = tl.load(value_mean + h * DV + e, mask=e < DV, other=0)
    tops, totals = softmax_sums(sums, batch, parts, H, ROWS, DV)
    line = pair.to(tl.int64) * parts * ROWS + r
    own = tl.cdiv(tl.load(ints + b), tl.load(ints + 6 * batch + b))
    page_top, paged, mix = _merge(sums, tops, totals, line, own, i, ROWS, DV)
    top, total, result = _merge(sums, tops, totals, line + splits * ROWS, parts - splits, e, ROWS, DV)
    turned = tl.sum(mix[:, None] * rows, 0) + paged * mean
    new = tl.maximum(top, page_top)
    if SINKS:
        logit = tl.load(sink_logits + h * (ROWS // steps) + r // steps).to(tl.float32) * LOG2E
        new = tl.maximum(new, logit)
    shrink, gain = tl.exp2(top - new), tl.exp2(page_top - new)
    result = result * shrink + turned * gain
    total = total * shrink + paged * gain
    if SINKS:
        total += tl.exp2(logit - new)
    result /= tl.maximum(total, 1e-30)
    at = out + b.to(tl.int64) * ob + (r % steps) * ot + (h * (ROWS // steps) + r // steps) * oh + e
    tl.store(at, result.to(out.dtype.element_ty), mask=e < DV)
