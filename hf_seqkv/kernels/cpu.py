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
import weakref

import numba
import numpy as np
import torch
from numba import njit, prange

from .interface import LayerView, Scoring
from .tile import (
    FAST,
    LANES,
    accumulate,
    fill,
    limit,
    read_scales,
    rotate,
    score_rows,
    transpose,
    turn,
)

SPLIT = 16
# numba's disk cache looks at this file alone: with what it calls, this line changes (`tests/test_kernels.py`).
CALLS = "2c8b4e551fbfe320"


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
            rotated = rotate(query[b, h], matrices[0][h])
            turned = np.zeros((rows, 2 * half), np.float32)
            constant = np.zeros(rows, np.float32)
            for r in range(rows):
                constant[r] = coefficients[b, h, r, 2 * half]
                for d in range(dim):
                    constant[r] += query[b, h, r, d] * key_mean[h, d]
            for n in range(split * SPLIT, min(counts[b], (split + 1) * SPLIT)):
                page = pages[b, n]
                slot = page_slots[b] + n * size
                fill(page, sections[0], offsets[0][h], widths[0][h], levels[0][h], tile, size)
                scores[:] = 0
                score_rows(rotated, tile, scores, rows, dim, wide)
                read_scales(page, sections[1] + 2 * h * size, scale, bits)
                for r in range(rows):
                    for j in range(size):
                        scores[r, j] = scores[r, j] * scale[j] + constant[r]
                if half > 0:
                    turn(coefficients[b, h], starts[b, n], turned, half)
                    score_rows(turned, relative, scores, rows, 2 * half, wide)
                for r in range(rows):
                    here, head = length - steps + r % steps, h * groups + r // steps
                    limit(scores, r, r % steps, size, slot, here, softcap, causal, window, offset, 0, mask, b, head)
                fill(page, sections[2], offsets[1][h], widths[1][h], levels[1][h], tile, size)
                read_scales(page, sections[3] + 2 * h * size, scale, bits)
                accumulate(scores, tile, lanes, top, total, size, wide, scale, True, bits)
        else:
            for run in range(2):
                k, v = dense[2 * run], dense[2 * run + 1]
                first = dense_begin[run, b]
                for t in range(first, k.shape[2], size):
                    count = min(size, k.shape[2] - t)
                    transpose(k[b, h, t : t + count], tile)
                    scores[:] = 0
                    score_rows(query[b, h], tile, scores, rows, dim, wide)
                    slot = dense_slots[run, b] + t
                    for r in range(rows):
                        here, head = length - steps + r % steps, h * groups + r // steps
                        limit(
                            scores, r, r % steps, count, slot, here, softcap, causal, window, offset, 0, mask, b, head
                        )
                    transpose(v[b, h, t : t + count], tile)
                    accumulate(scores, tile, lanes, top, total, count, wide, scale, False, bits)
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
            scaled.numpy(), steps, size, view.pages.contiguous().numpy(), np.array(view.counts, np.int64),
            np.array(view.page_slots, np.int64), table["sections"], table["matrices"], table["offsets"],
            table["widths"], table["levels"], table["means"][0], coefficients, starts, relative, dense, slots, begin,
            bias, np.float32(scoring.softcap or 0), bool(scoring.causal and mask is None), scoring.window or 0,
            view.offset, view.length, mixed, tops, totals,
        )  # fmt: skip
        _combine(mixed, tops, totals, table["matrices"][1], table["means"][1], sinks, steps, out)
    out = torch.from_numpy(out).reshape(batch, query_heads, steps, codec.value_dim)
    return out.transpose(1, 2).to(query.dtype)
