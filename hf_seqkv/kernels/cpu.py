"""`attend_codes` for quantised pages on a CPU, compiled by numba.

One task is a KV head and a split of `SPLIT` pages (fixed, so that results do not depend on the thread count); one more
task a head takes the dense tokens. A task expands a page's codes to a tile of levels that stays in the first-level
cache, scores all query rows of the head against it, and mixes the values' tile the same way:

    tile [D, P]  <- key codes          scores = (query @ tile) * key_scale + constant part of the keys
    tile [D, P]  <- value codes        lanes += (softmax(scores) * value_scale) @ tile^T

Queries are rotated once on the way in and outputs once on the way out; rows are (group, new token) pairs.
"""

from __future__ import annotations

import contextlib
import functools
import weakref

import numba
import numpy as np
import torch
from numba import njit, prange

from . import simd
from .interface import LayerView, Scoring

SPLIT = 16
LANES = simd.LANES
# No "nnan" or "ninf": masked scores are minus infinity.
FAST = {"reassoc", "contract", "nsz", "arcp"}
_jit = functools.partial(njit, fastmath=FAST, error_model="numpy", nogil=True, cache=True)


@_jit
def _score_rows(query, tile, scores, rows, dim, columns):
    """`scores[:rows, :columns] += query[:rows, :dim] @ tile[:dim, :columns]`; columns a multiple of 16."""
    qs, ts, ss = query.shape[1], tile.shape[1], scores.shape[1]
    for r in range(0, rows, simd.ROWS):
        height = min(rows - r, simd.ROWS)
        q, c = query.ctypes.data + 4 * r * qs, 0
        while c < columns:
            t, s = tile.ctypes.data + 4 * c, scores.ctypes.data + 4 * (r * ss + c)
            if columns - c >= 64:
                simd.scores_64(q, t, s, height, dim, qs, ts, ss)
                c += 64
            else:
                simd.scores_16(q, t, s, height, dim, qs, ts, ss)
                c += 16


@_jit
def _mix_rows(probs, tile, lanes, rows, dim, columns):
    """`lanes[:rows, :dim].sum(-1) += probs[:rows, :columns] @ tile[:dim, :columns].T`; columns a multiple of 16."""
    ps, ts, ls = probs.shape[1], tile.shape[1], lanes.shape[1] * lanes.shape[2]
    for r in range(0, rows, simd.ROWS):
        height = min(rows - r, simd.ROWS)
        o, c = lanes.ctypes.data + 4 * r * ls, 0
        while c < columns:
            p, t = probs.ctypes.data + 4 * (r * ps + c), tile.ctypes.data + 4 * c
            if columns - c >= 64:
                simd.mix_64(p, t, o, height, dim, ps, ts, ls)
                c += 64
            else:
                simd.mix_16(p, t, o, height, dim, ps, ts, ls)
                c += 16


@_jit
def _expand_any(page, at, width, levels, tile, first, last, size):
    """Levels of components `first` to `last`, `size` tokens of `width` bits each; the layout is `codec.packing`'s."""
    index = np.zeros(size, np.int64)
    for d in range(first, last):
        index[:] = 0
        shift, field = 0, 8
        while field > 0:
            if width & field:
                count, mask = size * field // 8, (1 << field) - 1
                for i in range(8 // field):
                    for j in range(count):
                        index[i * count + j] |= ((page[at + j] >> (i * field)) & mask) << shift
                at += count
                shift += field
            field //= 2
        for j in range(size):
            tile[d, j] = levels[index[j]]


if simd.has_table_lookup():

    @_jit
    def _expand(page, at, width, levels, tile, first, last, size):
        """`_expand_any` for components `first` to `last` of one width, by table lookups of 16 lanes."""
        if size == 64 and width <= 5:
            codes, table, out = page.ctypes.data + at, levels.ctypes.data, tile[first:].ctypes.data
            if width == 4:
                simd.expand_4(codes, table, out, last - first, tile.shape[1])
            elif width == 3:
                simd.expand_3(codes, table, out, last - first, tile.shape[1])
            elif width == 2:
                simd.expand_2(codes, table, out, last - first, tile.shape[1])
            elif width == 5:
                simd.expand_5(codes, table, out, last - first, tile.shape[1])
            else:
                simd.expand_1(codes, table, out, last - first, tile.shape[1])
        else:
            _expand_any(page, at, width, levels, tile, first, last, size)

else:
    _expand = _expand_any


@_jit
def _fill(page, at, offsets, widths, levels, tile, size):
    """Tile `[D, >= size]` of a head's components from a page's bytes; `at` is where the codes begin."""
    first = 0
    while first < widths.shape[0]:
        width, last = int(widths[first]), first + 1
        while last < widths.shape[0] and widths[last] == width:
            last += 1
        if width == 0:
            tile[first:last, :size] = 0
        else:
            _expand(page, at + offsets[first], width, levels[width], tile, first, last, size)
        first = last


@_jit
def _softmax(scores, r, size, top, bits):
    """Exponentials of a row against the new maximum, in place; returns that maximum and their sum.

    `exp2` by a degree-6 polynomial on [0, 1), relative error 2e-7: LLVM vectorises it, `np.exp` it does not.
    """
    for j in range(size):
        top = max(top, scores[r, j])
    total = np.float32(0)
    if top == -np.inf:
        scores[r, :] = 0
        return top, total
    for j in range(size):
        x = max((scores[r, j] - top) * np.float32(1.4426950408889634), np.float32(-126.0))
        whole = np.floor(x)
        f = x - whole
        p = np.float32(2.1864262e-4)
        p = p * f + np.float32(1.2390889e-3)
        p = p * f + np.float32(9.6845225e-3)
        p = p * f + np.float32(5.5480409e-2)
        p = p * f + np.float32(2.4023061e-1)
        p = p * f + np.float32(6.9314694e-1)
        p = p * f + np.float32(1.0)
        bits[j] = (np.int32(whole) + np.int32(127)) << np.int32(23)
        scores[r, j] = p
    power = bits.view(np.float32)
    for j in range(size):
        scores[r, j] *= power[j]
        total += scores[r, j]
    for j in range(size, scores.shape[1]):
        scores[r, j] = 0
    return top, total


@_jit
def _limit(scores, r, step, size, slot, here, softcap, causal, window, offset, begin, mask, b, head):
    """Softcap, mask, window and validity of one row of scores; token `j` has slot `slot + j`."""
    if softcap > 0:
        for j in range(size):
            scores[r, j] = softcap * np.tanh(scores[r, j] / softcap)
    if mask.shape[3] > 0:
        row = mask[b if mask.shape[0] > 1 else 0, head if mask.shape[1] > 1 else 0, step]
        for j in range(max(0, offset - slot), size):
            scores[r, j] += row[slot + j - offset]
    first = max(begin, offset - slot)
    if window > 0:
        first = max(first, here - window + 1 - slot)
    last = min(size, here + 1 - slot) if causal else size
    for j in range(min(first, size)):
        scores[r, j] = -np.inf
    for j in range(max(last, 0), size):
        scores[r, j] = -np.inf


@_jit
def _accumulate(scores, tile, lanes, top, total, size, columns, scale, weighted, bits):
    """Fold a tile's scores and values into the running softmax of every row."""
    rows = lanes.shape[0]
    for r in range(rows):
        new, added = _softmax(scores, r, size, top[r], bits)
        if new > top[r]:
            shrink = np.exp(top[r] - new)
            top[r] = new
            total[r] *= shrink
            for d in range(lanes.shape[1]):
                for i in range(LANES):
                    lanes[r, d, i] *= shrink
        total[r] += added
        if weighted:
            for j in range(size):
                scores[r, j] *= scale[j]
    _mix_rows(scores, tile, lanes, rows, lanes.shape[1], columns)


@_jit
def _read_scales(page, at, out, bits):
    """bf16 scales to fp32."""
    for j in range(out.shape[0]):
        bits[j] = np.int32((np.uint32(page[at + 2 * j]) << 16) | (np.uint32(page[at + 2 * j + 1]) << 24))
    out[:] = bits[: out.shape[0]].view(np.float32)


@_jit
def _rotate(query, matrix):
    """`query @ matrix.T`, `[R, D]`."""
    rows, dim = query.shape
    out = np.empty((rows, dim), np.float32)
    for r in range(rows):
        for i in range(dim):
            total = np.float32(0)
            for d in range(dim):
                total += matrix[i, d] * query[r, d]
            out[r, i] = total
    return out


@_jit
def _transpose(tokens, tile):
    """`tile[d, j] = tokens[j, d]`, zeros elsewhere."""
    tile[:] = 0
    for j in range(tokens.shape[0]):
        for d in range(tokens.shape[1]):
            tile[d, j] = tokens[j, d]


@_jit
def _turn(coefficients, start, out, half):
    """Coefficients of the constant part seen from a page's first position."""
    for r in range(out.shape[0]):
        for i in range(half):
            a, b = coefficients[r, i], coefficients[r, half + i]
            out[r, i] = a * start[i] + b * start[half + i]
            out[r, half + i] = b * start[i] - a * start[half + i]


@njit(
    "void(f4[:,:,:,::1], i8, i8, u1[:,:,::1], i8[::1], i8[::1], i8[::1], UniTuple(f4[:,:,::1], 2),"
    "UniTuple(i8[:,::1], 2), UniTuple(u1[:,::1], 2), UniTuple(f4[:,:,::1], 2), f4[:,::1], f4[:,:,:,::1],"
    "f4[:,:,::1], f4[:,::1], UniTuple(f4[:,:,:,:], 4), i8[:,::1], i8[:,::1], f4[:,:,:,:], f4, b1, i8, i8, i8,"
    "f4[:,:,:,::1], f4[:,:,::1], f4[:,:,::1])",
    fastmath=FAST, error_model="numpy", nogil=True, cache=True, parallel=True,
)  # fmt: skip
def _partials(
    query, steps, size, pages, counts, page_slots, sections, matrices, offsets, widths, levels, key_mean, coefficients,
    starts, relative, dense, dense_slots, dense_begin, mask, softcap, causal, window, offset, length,
    mixed, tops, totals,
):  # fmt: skip
    """Unnormalised output, maximum and denominator of every (row of batch, head) and split.

    `query [B, H, R, Dk]` is scaled; `R` rows are (group, step). `mixed [B * H, S + 1, R, Dv]`: splits of pages are in
    the rotated domain of values, the last one (dense tokens) is not.
    """
    batch, heads, rows, dim = query.shape
    value_dim, splits = mixed.shape[3], mixed.shape[1] - 1
    wide, half, groups = relative.shape[1], relative.shape[0] // 2, rows // steps
    for task in prange(batch * heads * (splits + 1)):
        pair, split = task // (splits + 1), task % (splits + 1)
        b, h = pair // heads, pair % heads
        tile = np.zeros((max(dim, value_dim), wide), np.float32)
        scores = np.zeros((rows, wide), np.float32)
        bits = np.zeros(wide, np.int32)
        lanes = np.zeros((rows, value_dim, LANES), np.float32)
        scale = np.zeros(size, np.float32)
        top = np.full(rows, np.float32(-np.inf))
        total = np.zeros(rows, np.float32)
        if split < splits:
            rotated = _rotate(query[b, h], matrices[0][h])
            turned = np.zeros((rows, 2 * half), np.float32)
            constant = np.zeros(rows, np.float32)
            for r in range(rows):
                constant[r] = coefficients[b, h, r, 2 * half]
                for d in range(dim):
                    constant[r] += query[b, h, r, d] * key_mean[h, d]
            for n in range(split * SPLIT, min(counts[b], (split + 1) * SPLIT)):
                page = pages[b, n]
                slot = page_slots[b] + n * size
                _fill(page, sections[0], offsets[0][h], widths[0][h], levels[0][h], tile, size)
                scores[:] = 0
                _score_rows(rotated, tile, scores, rows, dim, wide)
                _read_scales(page, sections[1] + 2 * h * size, scale, bits)
                for r in range(rows):
                    for j in range(size):
                        scores[r, j] = scores[r, j] * scale[j] + constant[r]
                if half > 0:
                    _turn(coefficients[b, h], starts[b, n], turned, half)
                    _score_rows(turned, relative, scores, rows, 2 * half, wide)
                for r in range(rows):
                    here, head = length - steps + r % steps, h * groups + r // steps
                    _limit(scores, r, r % steps, size, slot, here, softcap, causal, window, offset, 0, mask, b, head)
                _fill(page, sections[2], offsets[1][h], widths[1][h], levels[1][h], tile, size)
                _read_scales(page, sections[3] + 2 * h * size, scale, bits)
                _accumulate(scores, tile, lanes, top, total, size, wide, scale, True, bits)
        else:
            for run in range(2):
                k, v = dense[2 * run], dense[2 * run + 1]
                first = dense_begin[run, b]
                for t in range(first, k.shape[2], size):
                    count = min(size, k.shape[2] - t)
                    _transpose(k[b, h, t : t + count], tile)
                    scores[:] = 0
                    _score_rows(query[b, h], tile, scores, rows, dim, wide)
                    slot = dense_slots[run, b] + t
                    for r in range(rows):
                        here, head = length - steps + r % steps, h * groups + r // steps
                        _limit(scores, r, r % steps, count, slot, here, softcap, causal, window, offset, 0, mask, b, head)
                    _transpose(v[b, h, t : t + count], tile)
                    _accumulate(scores, tile, lanes, top, total, count, wide, scale, False, bits)
        for r in range(rows):
            tops[pair, split, r] = top[r]
            totals[pair, split, r] = total[r]
            for d in range(value_dim):
                mixed[pair, split, r, d] = lanes[r, d].sum()


@njit(
    "void(f4[:,:,:,::1], f4[:,:,::1], f4[:,:,::1], f4[:,:,::1], f4[:,::1], f4[::1], i8, f4[:,:,::1])",
    fastmath=FAST, error_model="numpy", nogil=True, cache=True, parallel=True,
)  # fmt: skip
def _combine(mixed, tops, totals, matrix, value_mean, sink_logits, steps, out):
    """Merge the splits, rotate pages' part back, normalise: `out [B * H, R, Dv]`."""
    pairs, parts, rows, dim = mixed.shape
    heads = matrix.shape[0]
    for pair in prange(pairs):
        h = pair % heads
        pages = np.empty(dim, np.float32)
        for r in range(rows):
            top = np.float32(-np.inf)
            for part in range(parts):
                top = max(top, tops[pair, part, r])
            total = np.float32(0)
            if sink_logits.shape[0] > 0:
                logit = sink_logits[h * (rows // steps) + r // steps]
                top = max(top, logit)
                total += np.exp(logit - top)
            out[pair, r, :] = 0
            if top == -np.inf:
                continue
            pages[:] = 0
            paged = np.float32(0)
            for part in range(parts - 1):
                weight = np.exp(tops[pair, part, r] - top)
                paged += weight * totals[pair, part, r]
                for d in range(dim):
                    pages[d] += weight * mixed[pair, part, r, d]
            weight = np.exp(tops[pair, parts - 1, r] - top)
            for d in range(dim):
                out[pair, r, d] = weight * mixed[pair, parts - 1, r, d] + paged * value_mean[h, d]
            for i in range(dim):
                for d in range(dim):
                    out[pair, r, d] += pages[i] * matrix[h, i, d]
            total += paged + weight * totals[pair, parts - 1, r]
            for d in range(dim):
                out[pair, r, d] /= total


_TABLES: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _tables(codec):
    """A codec's tables as numpy arrays, made once."""
    if codec not in _TABLES:
        sides = (codec.key, codec.value)
        _TABLES[codec] = {
            "sections": np.array([at for at, _ in codec.sections.values()], np.int64),
            "matrices": tuple(s.decode_matrix.contiguous().numpy() for s in sides),
            "offsets": tuple(s.offsets.contiguous().numpy() for s in sides),
            "widths": tuple(s.widths.contiguous().numpy() for s in sides),
            "levels": tuple(s.levels.expand(s.heads, -1, -1).contiguous().numpy() for s in sides),
            "means": tuple(s.mean.contiguous().numpy() for s in sides),
        }
    return _TABLES[codec]


_NO_MASK = np.zeros((1, 1, 1, 0), np.float32)
_NO_SINKS = np.zeros(0, np.float32)


def _center(view: LayerView, query: torch.Tensor, wide: int):
    """Coefficients, page starts and the relative table as a tile; empty ones where nothing was removed."""
    if view.center is None:
        coefficients = torch.zeros(*query.shape[:3], 1)
        return coefficients.numpy(), np.zeros((1, 1, 0), np.float32), np.zeros((0, wide), np.float32)
    relative = view.center.relative
    tile = torch.nn.functional.pad(relative.T, (0, wide - relative.shape[0])).contiguous()
    coefficients = view.center.coefficients(query).contiguous()
    return coefficients.numpy(), view.center.starts.contiguous().numpy(), tile.numpy()


@contextlib.contextmanager
def _threads():
    """As many threads as torch uses, taking tasks one by one: torch's own threads may still be spinning beside them."""
    before = numba.get_num_threads()
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    try:
        with numba.parallel_chunksize(1):
            yield
    finally:
        numba.set_num_threads(before)


def attend_codes(query: torch.Tensor, view: LayerView, mask: torch.Tensor | None, scoring: Scoring) -> torch.Tensor:
    """As `reference.attend_codes`, for quantised pages on a CPU."""
    batch, query_heads, steps, dim = query.shape
    codec, heads = view.codec, view.codec.heads
    rows, size = query_heads // heads * steps, view.codec.page_size
    wide = -(-size // LANES) * LANES
    table = _tables(codec)
    scaled = (query.detach().float() * scoring.scaling).reshape(batch, heads, rows, dim).contiguous()
    coefficients, starts, relative = _center(view, scaled, wide)
    dense = tuple(x.detach().float().numpy() for run in (view.sinks, view.recent) for x in (run.k, run.v))
    slots = np.array([view.sinks.slots, view.recent.slots], np.int64)
    begin = np.array([view.sinks.begin, view.recent.begin], np.int64)
    if mask is None:
        bias = _NO_MASK
    else:
        bias = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else mask.float()
        bias = bias.numpy()
    splits = -(-max(view.counts, default=0) // SPLIT)
    pairs = batch * heads
    mixed = np.empty((pairs, splits + 1, rows, codec.value_dim), np.float32)
    tops, totals = (np.empty((pairs, splits + 1, rows), np.float32) for _ in range(2))
    sinks = _NO_SINKS if scoring.sink_logits is None else scoring.sink_logits.detach().float().contiguous().numpy()
    out = np.empty((pairs, rows, codec.value_dim), np.float32)
    with _threads():
        _partials(
            scaled.numpy(), steps, size, view.pages.numpy(), np.array(view.counts, np.int64),
            np.array(view.page_slots, np.int64), table["sections"], table["matrices"], table["offsets"],
            table["widths"], table["levels"], table["means"][0], coefficients, starts, relative, dense, slots, begin,
            bias, np.float32(scoring.softcap or 0), bool(scoring.causal and mask is None), scoring.window or 0,
            view.offset, view.length, mixed, tops, totals,
        )  # fmt: skip
        _combine(mixed, tops, totals, table["matrices"][1], table["means"][1], sinks, steps, out)
    out = torch.from_numpy(out).reshape(batch, query_heads, steps, codec.value_dim)
    return out.transpose(1, 2).to(query.dtype)
