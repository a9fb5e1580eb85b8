"""The exact codec's coder: codes and scales of one head of pages, with what is known of each number, to rANS symbols.

A number is expected to be normal, with a mean and a deviation; a code is the cell of a codebook that it fell into. The
edges of the cells are put into one table of the normal distribution, which gives the interval of `[0, 2**14)` that the
code takes; each of `n` codes takes at least 1. No codebook needs a table of its own, and no code is beyond coding.

What is known of a number is sharpened while coding goes on, from what the decoder has too:
- component by component, the deviations of the earlier components of a token move the mean of the later ones;
- tokens whose numbers were further off than expected, in this part and those before it, get a larger deviation;
- 8 tokens at a time, a component whose deviations so far lean to one side has its mean moved there.

Interleaved rANS as in `entropy.py`: 8 lanes, token `t` in lane `t % 8`, states of 32 bits, words of 16. Tokens are
coded 8 by 8; of each 8 first the scales, then component by component.

Whatever both sides must agree on is exact: numbers are integers carried in float64, sums and differences of products
stay below `2**53`, everything else is one correctly rounded operation. Neither order nor fused instructions matter.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .exact_cells import EDGE, LAST, TOTAL, TOTAL_BITS

LANES = 8
ONE = 256.0  # a static deviation, in the units of means
FINE = 4096.0  # parts of such a unit, in which weights of earlier components are counted
MOST = float(1 << 17)  # deviations from a mean are cut there
_SCALE = 2.0**-8 / EDGE  # of an edge times its factor, in table entries
_LEAN, _LEAN_SCALE = 16.0, 4.0  # tokens after which half of a component's leaning is believed, and of a scale's
_NARROWEST, _CALMEST = 2.0**36, 0.0625  # bounds of factors and energies
_OPTIONS = {"cache": True, "nogil": True, "error_model": "numpy"}


@njit(**_OPTIONS)
def _below(code, bits, row, edges, a, b, tables):
    """Share of the interval below a code."""
    at = (edges[row, code] * a - b) * _SCALE + LAST / 2
    at = at if at > 0.0 else 0.0
    at = at if at < LAST else LAST
    return code + tables[bits, np.uint64(np.int64(at))]


@njit(**_OPTIONS)
def _take(codes, bits, row, edges, a, b, tables, states, words, place, low, high):
    """Decode a symbol of each lane into `codes [8]`; `place` is the next word and the end of them."""
    for t in range(LANES):
        scale, offset, slot = a[t], b[t], np.int64(states[t] & np.uint64(TOTAL - 1))
        code, below, above = np.uint64(0), np.int64(0), np.int64(TOTAL)
        step = np.uint64(1) << np.uint64(bits) >> np.uint64(1)
        while step:
            tried = _below(code + step, bits, row, edges, scale, offset, tables)
            taken = tried <= slot
            code = code + step if taken else code
            below = tried if taken else below
            above = above if taken else tried
            step >>= np.uint64(1)
        codes[t], low[t], high[t] = code, below, above
    next_word = place[0]
    if next_word + LANES > words.size:
        return False
    for t in range(LANES):
        state = states[t]
        slot = state & np.uint64(TOTAL - 1)
        state = np.uint64(high[t] - low[t]) * (state >> np.uint64(TOTAL_BITS)) + slot - np.uint64(low[t])
        short = state < np.uint64(1 << 16)
        states[t] = state << np.uint64(16) | np.uint64(words[next_word]) if short else state
        next_word += np.uint64(1) if short else np.uint64(0)
    place[0] = next_word
    return next_word <= place[1]


@njit(**_OPTIONS)
def _give(codes, bits, row, edges, a, b, tables, entries, at):
    """Note the intervals of a symbol of each lane."""
    for t in range(LANES):
        low = _below(codes[t], bits, row, edges, a[t], b[t], tables)
        high = _below(codes[t] + np.uint64(1), bits, row, edges, a[t], b[t], tables)
        entries[at + t] = (high - low) << 16 | low


@njit(**_OPTIONS)
def _push(work, first, weights, off):
    """Move the means `work [D, 8]` of components from `first` on by how far this one was off, times its weights."""
    o0, o1, o2, o3, o4, o5, o6, o7 = off[0], off[1], off[2], off[3], off[4], off[5], off[6], off[7]
    for i in range(first, work.shape[0]):
        weight = weights[first - 1, i]
        w0, w1, w2, w3 = (
            work[i, 0] + weight * o0,
            work[i, 1] + weight * o1,
            work[i, 2] + weight * o2,
            work[i, 3] + weight * o3,
        )
        w4, w5, w6, w7 = (
            work[i, 4] + weight * o4,
            work[i, 5] + weight * o5,
            work[i, 6] + weight * o6,
            work[i, 7] + weight * o7,
        )
        work[i, 0], work[i, 1], work[i, 2], work[i, 3] = w0, w1, w2, w3
        work[i, 4], work[i, 5], work[i, 6], work[i, 7] = w4, w5, w6, w7


@njit(**_OPTIONS)
def code_head(
    decoding,
    codes,
    scales,
    wide,
    means,
    expected,
    narrowness,
    scale_values,
    inverse,
    weights,
    rows,
    bits,
    edges,
    levels,
    scale_edges,
    tables,
    adapts,
    energies,
    states,
    words,
    places,
    entries,
    first,
):
    """Code one head of `N` pages; decoding fills `codes` and `scales`, encoding `entries` from `first` on.

    Args:
        codes: `[N, D, P]` uint8.
        scales: Bytes, or the bits of bf16 numbers where `wide`, `[N, P]` uint16.
        means: Of the components, in 256ths of static deviations, `[N, P, D]` integers in float64.
        expected: Of the scales, in 16ths of their units, `[N, P]` integers in float64.
        narrowness: `2**23` over the deviation of a scale, in its units, an integer in float64.
        scale_values: What each scale stands for, float64; 0 for a token held elsewhere, or none.
        inverse: 256 over the static deviation of each component, float64 `[D]`.
        weights: `weights[c, c']` is by how much component `c` moves a later one, `c'`, in 4096ths; `[D, D]`.
        rows, bits: Codebook and width of each component, `[D]`.
        edges, levels: Of codebooks, `[R, 257]` and `[R, 256]` float64; see `cells`.
        scale_edges, tables: See `scale_cells` and `interval_tables`.
        adapts: Whether deviations and means follow what was coded.
        energies: Of each token's deviations so far, around 1, `[N, P]` float64; kept up to date.
        states, words, places: Of the decoder: `[N, 8]` uint64, uint16, and of each page its next word and their end,
            uint64. There are 8 words or more behind the last.

    Returns:
        Whether the words sufficed.
    """
    pages, dim, size = codes.shape
    base, work, a, b = np.empty((dim, LANES)), np.empty((dim, LANES)), np.empty(LANES), np.empty(LANES)
    now, part, low, high = (np.zeros(LANES, np.uint64), np.zeros(LANES, np.uint64),
                            np.zeros(LANES, np.int64), np.zeros(LANES, np.int64))  # fmt: skip
    value, mean, off, energy, leaning = (
        np.empty(LANES),
        np.empty(LANES),
        np.empty(LANES),
        np.empty(LANES),
        np.empty(dim),
    )
    for page in range(pages):
        at = first
        state, place, noted = states[page], places[page], entries[page]
        leaning[:] = 0.0
        seen, scale_leaning = 0.0, 0.0
        for begin in range(0, size, LANES):
            lean = np.rint(scale_leaning / (seen + _LEAN_SCALE)) if adapts else 0.0
            for t in range(LANES):
                a[t] = narrowness
                b[t] = (expected[page, begin + t] + lean) * narrowness
            now[:] = 0
            for half in range(0 if wide else 1, 2):
                if decoding:
                    if not _take(part, 8, 1 - half, scale_edges, a, b, tables, state, words, place, low, high):
                        return False
                else:
                    for t in range(LANES):
                        stored = np.uint64(scales[page, begin + t])
                        part[t] = stored & np.uint64(255) if half else stored >> np.uint64(8)
                    _give(part, 8, 1 - half, scale_edges, a, b, tables, noted, at)
                    at += LANES
                for t in range(LANES):
                    now[t] = now[t] << np.uint64(8) | part[t]
                    b[t] -= np.float64(part[t]) * 4096.0 * narrowness  # what the low byte is counted from
            for t in range(LANES):
                scales[page, begin + t] = now[t]
                value[t] = scale_values[now[t]]
                energy[t] = energies[page, begin + t] if adapts else 1.0
                for c in range(dim):
                    base[c, t] = means[page, begin + t, c]
            work[:] = base * FINE
            for c in range(dim):
                row = rows[c]
                lean = np.rint(leaning[c] / (seen + _LEAN)) if adapts else 0.0
                for t in range(LANES):
                    root = 1.0 / np.sqrt(energy[t])
                    mean[t] = np.rint(work[c, t] * (1.0 / FINE)) + lean
                    narrow = value[t] * inverse[c] * root * 128.0
                    narrow = np.rint(narrow if narrow < _NARROWEST else _NARROWEST)
                    # A token of which nothing is known: deviation 1, in the codebook's units.
                    a[t] = (narrow if narrow > 1.0 else 1.0) if value[t] > 0.0 else 32768.0
                    b[t] = np.rint(mean[t] * root * 524288.0) if value[t] > 0.0 else 0.0
                if decoding:
                    if not _take(now, bits[c], row, edges, a, b, tables, state, words, place, low, high):
                        return False
                    for t in range(LANES):
                        codes[page, c, begin + t] = now[t]
                else:
                    for t in range(LANES):
                        now[t] = codes[page, c, begin + t]
                    _give(now, bits[c], row, edges, a, b, tables, noted, at)
                    at += LANES
                for t in range(LANES):
                    known = value[t] > 0.0
                    found = np.rint(levels[row, now[t]] * value[t] * inverse[c])
                    left = _cut(found - mean[t], MOST) if known else 0.0
                    off[t] = _cut(found - base[c, t], MOST) if known else 0.0
                    leaning[c] += _cut(left + lean, 1024.0) if known else 0.0
                    grown = energy[t] + (left * left * 2.0**-16 - energy[t]) * 0.0625
                    grown = grown if grown > _CALMEST else _CALMEST
                    energy[t] = grown if adapts and known else energy[t]
                _push(work, c + 1, weights, off)
            for t in range(LANES):
                energies[page, begin + t] = energy[t]
                if value[t] > 0.0:
                    seen += 1.0
                    scale_leaning += np.float64(scales[page, begin + t]) * 16.0 - expected[page, begin + t]
    return True


@njit(**_OPTIONS)
def _cut(x, most):
    x = x if x > -most else -most
    return x if x < most else most


@njit(**_OPTIONS)
def write(entries, states, words):
    """Code a page's intervals `[M]` uint32 into `states [8]` and `words`, from its end; returns the first word."""
    states[:] = 1 << 16
    first = np.int64(words.size)
    for back in range(entries.size):
        i = entries.size - 1 - back
        frequency, low = np.uint64(entries[i] >> np.uint32(16)), np.uint64(entries[i] & np.uint32(0xFFFF))
        state = np.uint64(states[i % LANES])
        if state >= frequency << np.uint64(32 - TOTAL_BITS):
            first -= 1
            words[first] = np.uint16(state & np.uint64(0xFFFF))
            state >>= np.uint64(16)
        quotient = state // frequency
        states[i % LANES] = np.uint32((quotient << np.uint64(TOTAL_BITS)) + state - quotient * frequency + low)
    return first
