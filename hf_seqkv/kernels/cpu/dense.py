"""The dense part of a call, and the merge of all parts."""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from .call import DENSE, SPLIT, limit, padded, read_row, rotated_rows, unlimited, write_row
from .jit import INSIDE, OPTIONS, copy, pointer
from .rows import dots, exponentials, maximum
from .simd import add_product


@njit(**OPTIONS)
def _larger(x, y):
    """The larger of two numbers, NaN if one is."""
    return x if x > y or x != x else y


@njit(**OPTIONS)
def _tokens(address, bf16, at, token, count, dim):
    """`count` dense tokens from element `at`, `token` elements apart, in fp32 and with rows of a multiple of 16.

    Returns their address, the stride of a token, and the memory that holds them where they had to be copied.
    """
    if not bf16 and dim % 16 == 0:
        return address + 4 * at, token, np.empty((0, 0), np.float32)
    out = np.empty((count, padded(dim, 16)), np.float32)
    out[:, dim:] = 0
    for t in range(count):
        read_row(address + (2 if bf16 else 4) * (at + t * token), bf16, dim, out.ctypes.data + 4 * t * out.shape[1])
    return out.ctypes.data, out.shape[1], out


@njit(**OPTIONS)
def _dots(query, keys, stride, count, dim, scores, held):
    """`scores[:, :count]`; `held` is the memory of `keys`, which a caller's array outlives only as an argument."""
    dots(query.ctypes.data, query.shape[1], len(query), keys, stride, count, dim, scores.ctypes.data, scores.shape[1])


@njit(**OPTIONS)
def _add_values(scores, values, stride, mixed, count, held):
    """`mixed += scores[:, :count] @ values`; `held` as in `_dots`."""
    add_product(scores, values, stride, mixed, len(scores), count, mixed.shape[1])


@njit(**OPTIONS)
def _score_run(a, run, query, b, h, row0, first, count, scores):
    """Scores of a run's tokens from `first` on; what counts for nothing gets minus infinity."""
    rows, dim = query.shape
    at = b * run.k_row + h * run.k_head + first * run.k_token
    keys, stride, held = _tokens(run.k, run.bf16, at, run.k_token, count, a.key_dim)
    _dots(query, keys, stride, count, dim, scores, held)
    slots = carray(pointer(run.slots + 8 * b * (run.count if run.each else 1)), run.count, np.int64)
    if not run.each and unlimited(a, slots[0] + first, count):
        return
    for r in range(rows):
        head, step = h * (a.rows // a.steps) + (row0 + r) // a.steps, (row0 + r) % a.steps
        if run.each:
            for t in range(count):
                if slots[t] < 0:
                    scores[r, t] = -np.inf
                else:
                    limit(a, scores[r, t : t + 1], b, head, step, slots[t])
        else:
            limit(a, scores[r, :count], b, head, step, slots[0] + first)


@njit(**INSIDE)
def dense_part(a, query, b, h, row0):
    """Unnormalised output, maximum and sum over the dense tokens; the output is not rotated here."""
    rows, dim = query.shape[0], a.value_dim
    index = ((b * a.heads + h) * (a.splits + 1) + a.splits) * a.rows + row0
    tops = carray(pointer(a.tops + 4 * index), rows, np.float32)
    totals = carray(pointer(a.totals + 4 * index), rows, np.float32)
    mixed = np.zeros((rows, padded(dim, 16)), np.float32)
    tops[:], totals[:] = -np.inf, 0
    runs = carray(pointer(a.dense), a.runs, DENSE)
    for i in range(a.runs):
        run = runs[i]
        first = carray(pointer(run.begin), a.batch, np.int64)[b] if run.begin else 0
        count = run.count - first
        if count <= 0:
            continue
        scores = np.full((rows, padded(count, 16)), np.float32(-np.inf))
        _score_run(a, run, query, b, h, row0, first, count, scores)
        at = b * run.v_row + h * run.v_head + first * run.v_token
        values, stride, held = _tokens(run.v, run.bf16, at, run.v_token, count, dim)
        for r in range(rows):
            row = scores[r].ctypes.data
            top = _larger(tops[r], maximum(row, scores.shape[1]))
            if top == -np.inf:
                scores[r] = 0
                continue
            shrink = np.exp(tops[r] - top)
            totals[r] = totals[r] * shrink + exponentials(row, scores.shape[1], top)
            tops[r] = top
            for at in range(mixed.shape[1]):
                mixed[r, at] *= shrink
        _add_values(scores, values, stride, mixed, count, held)
    out = carray(pointer(a.mixed + 4 * index * dim), (rows, dim), np.float32)
    for r in range(rows):
        copy(mixed[r], out[r])


@njit(**OPTIONS)
def _add(row, weight, to):
    """`to += weight * row`. Of few arrays, and its numbers in variables: else loops over them stay scalar."""
    for d in range(to.shape[0]):
        to[d] += weight * row[d]


@njit(**INSIDE)
def merge(a, b, h):
    """Join the parts of a head in order, rotate the pages' back, normalise, store `out [B, Tq, Hq, Dv]`."""
    dim, rows, parts = a.value_dim, a.rows, a.splits + 1
    index = (b * a.heads + h) * parts
    tops = carray(pointer(a.tops + 4 * index * rows), (parts, rows), np.float32)
    totals = carray(pointer(a.totals + 4 * index * rows), (parts, rows), np.float32)
    mixed = carray(pointer(a.mixed + 4 * index * rows * dim), (parts, rows, dim), np.float32)
    mean = carray(pointer(a.value_mean + 4 * h * dim), dim, np.float32)
    groups = rows // a.steps
    logits = carray(pointer(a.sink_logits), a.heads * groups, np.float32)
    held = -(-carray(pointer(a.counts), a.batch, np.int64)[b] // SPLIT)
    coded, coded_total = np.zeros((rows, dim), np.float32), np.zeros(rows, np.float32)
    dense, total = np.zeros(rows, np.float32), np.zeros(rows, np.float32)  # weights of the dense part, and of all
    for r in range(rows):
        top = tops[parts - 1, r]
        for part in range(held):
            top = _larger(top, tops[part, r])
        logit = logits[h * groups + r // a.steps] if a.sink_logits else np.float32(-np.inf)
        top = _larger(top, logit)
        if top == -np.inf:
            continue
        total[r] = np.exp(logit - top)
        for part in range(held):
            weight = np.exp(tops[part, r] - top)
            coded_total[r] += weight * totals[part, r]
            _add(mixed[part, r], weight, coded[r])
        dense[r] = np.exp(tops[parts - 1, r] - top)
        total[r] += coded_total[r] + dense[r] * totals[parts - 1, r]
    rotated = rotated_rows(coded, a.value_matrix + h * a.value_matrix_head, dim)
    for r in range(rows):
        row = rotated[r, :dim]
        if total[r] != 0:
            _add(mixed[parts - 1, r], dense[r], row)
            _add(mean, coded_total[r], row)
            row /= total[r]
        place = (b * a.steps + r % a.steps) * a.heads * groups + h * groups + r // a.steps
        write_row(row, a.out + (2 if a.bf16 else 4) * place * dim, a.bf16)
