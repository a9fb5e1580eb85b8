"""Vector building blocks in 16-bit integers, emitted from numba, for x86 processors.

A level of a codebook fits a 16-bit lane; `vpmaddwd` multiplies and adds pairs of lanes (with the VNNI extensions LLVM
fuses that with the sum: `vpdpwssd`). Codes become levels in registers and go straight into the sums. How they do is
`avx512.py`'s or `avx2.py`'s; integers, and so all sums, are the same. For keys lanes are tokens and a lane's pair two
components; for values a lane's pair is two neighbouring tokens. Pages hold 64 tokens here. All functions take addresses
and lengths in elements, and check nothing.
"""

from __future__ import annotations

import functools
import itertools

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .jit import features
from .simd import (
    LANES,
    ROWS,
    SUMS,
    VECTOR,
    WORDS,
    added_up,
    cases,
    element,
    load,
    place,
    prefetch,
    row_cases,
    shuffle,
    splat,
    store,
)

if "avx512bw" in features():
    from . import avx512 as isa
else:
    from . import avx2 as isa

_I8, _I16, _I32, _I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
_F32 = ir.FloatType()
_IN_TURN = list(range(64))


def available() -> bool:
    return not features().isdisjoint({"avx512bw", "avx2"})


def _signature(count):
    return types.void(*([types.int64] * count))


def _add_scores(b, n, sums, keys, query, at, query_stride):
    """Let `sums[r, v]` grow by a pair of components: vectors of keys times a pair of each query row."""
    for r in range(n):
        pair = load(b, element(b, query, b.add(b.mul(query_stride, _I64(r)), at), 2, _I32), 2)
        both = b.bitcast(splat(b, pair), WORDS)
        for v, key in keys.items():
            b.store(isa.add_products(b, b.load(sums[r, v]), key, both), sums[r, v])


def _in_turn(b, sums, order, v):
    """Sums of tokens `16 * v` and those that follow, from vectors of which two hold 32 in another order."""
    if order == _IN_TURN:
        return b.load(sums[v])
    first = v & ~1
    lanes = [order.index(LANES * v + i) - LANES * first for i in range(LANES)]
    return shuffle(b, b.load(sums[first]), b.load(sums[first + 1]), lanes)


def _make_scores(widths):
    """Scores of 64 tokens from `pairs` pairs of components of a width; width 0 stands for levels `[pairs, 64, 2]`."""

    @intrinsic
    def scores(typingctx, width, data, ahead, table, query, factors, scale, out, rows, pairs, query_stride, out_stride):
        def generate(context, b, signature, args):
            chosen, data, ahead, table, query, factors, scale, out, rows, pairs, query_stride, out_stride = args

            def emit(width, n):
                order = isa.ORDER if width else _IN_TURN
                lanes = [(component, token) for token in order for component in range(2)]
                levels = isa.table(b, table, width) if width else None
                zero = ir.Constant(SUMS, [0] * LANES)
                sums = {(r, v): cgutils.alloca_once_value(b, zero) for r in range(n) for v in range(4)}
                for total in sums.values():
                    b.store(zero, total)
                for group in isa.GROUPS:
                    with cgutils.for_range(b, pairs) as loop:
                        if width:
                            address = b.add(data, b.mul(loop.index, _I64(16 * width)))
                            if group is isa.GROUPS[0]:
                                for line in range(0, 16 * width, 64):
                                    prefetch(b, b.add(b.add(address, ahead), _I64(line)))
                            keys = {
                                v: isa.levels(b, levels, address, width, lanes[32 * v : 32 * v + 32]) for v in group
                            }
                        else:
                            at = b.mul(loop.index, _I64(128))
                            keys = {v: load(b, element(b, data, b.add(at, _I64(32 * v)), 2, WORDS), 2) for v in group}
                        _add_scores(b, n, sums, keys, query, b.shl(loop.index, _I64(1)), query_stride)
                for r in range(n):
                    factor = splat(b, load(b, place(b, factors, _I64(r), _F32)))
                    for v in range(4):
                        at = place(b, out, b.add(b.mul(out_stride, _I64(r)), _I64(LANES * v)))
                        total = _in_turn(b, [sums[r, u] for u in range(4)], order, v)
                        value = b.fmul(b.sitofp(total, VECTOR), factor)
                        value = b.fmul(value, load(b, place(b, scale, _I64(LANES * v))))
                        store(b, b.fadd(load(b, at), value), at)

            for width in cases(b, chosen, widths):
                row_cases(b, rows, functools.partial(emit, width))
            return context.get_dummy_value()

        return _signature(12), generate

    return scores


_CODED = range(1, 7)  # widths
# `out[r, :64] += factors[r] * scale[:64] * sum_d query[r, d] * key[d, :]` for up to ROWS rows, from codes or levels.
# Arguments: width, codes (or levels), bytes to the codes of the next page (prefetched), codebook, query (int16),
# factors, scale, out, rows, pairs, strides of query and out.
scores, score_levels = _make_scores(_CODED), _make_scores([0])


def _make_mix(widths, block):
    """Sums of `blocks` times `block` components over pages; width 0 stands for levels `[pages, block, 64]`."""

    @intrinsic
    def mix(typingctx, width, data, page_bytes, pages, table, weights, rows, factors, out, out_stride, blocks):
        def generate(context, b, signature, args):
            chosen, data, page_bytes, pages, table, weights, rows, factors, out, out_stride, blocks = args

            def emit(width, n):
                levels = isa.table(b, table, width) if width else None
                keys = list(itertools.product(range(ROWS), range(block)))
                sums = {(r, c): cgutils.alloca_once(b, SUMS) for r, c in keys if r < n}
                with cgutils.for_range(b, blocks) as block_loop:
                    for total in sums.values():
                        b.store(ir.Constant(SUMS, [0] * LANES), total)
                    first = b.add(data, b.mul(block_loop.index, _I64(8 * width * block)))
                    with cgutils.for_range(b, pages) as loop:
                        page = b.add(first, b.mul(loop.index, page_bytes))
                        probs = {}
                        for r, v in itertools.product(range(n), range(2)):
                            at = b.add(b.mul(loop.index, _I64(64 * n)), _I64(64 * r + 32 * v))
                            probs[r, v] = load(b, element(b, weights, at, 2, WORDS), 2)
                        for line in range(0, 8 * width * block, 64):
                            prefetch(b, b.add(page, _I64(3 * 8 * width * block + line)))
                        for c, v in itertools.product(range(block), range(2)):
                            if width:
                                lanes = [(0, 32 * v + i) for i in range(32)]
                                values = isa.levels(b, levels, b.add(page, _I64(8 * width * c)), width, lanes)
                            else:
                                values = load(b, element(b, page, _I64(64 * c + 32 * v), 2, WORDS), 2)
                            for r in range(n):
                                b.store(isa.add_products(b, b.load(sums[r, c]), values, probs[r, v]), sums[r, c])
                    # As floats: the lanes' sum need not fit 32 bits.
                    none = ir.Constant(VECTOR, [0.0] * LANES)
                    totals = [b.sitofp(b.load(sums[key]), VECTOR) if key in sums else none for key in keys]
                    total, to = added_up(b, totals), b.mul(block_loop.index, _I64(block))
                    for r in range(n):
                        run = shuffle(b, total, None, [block * r + c for c in range(block)])
                        factor = splat(b, load(b, place(b, factors, _I64(r), _F32)))
                        run = b.fmul(run, shuffle(b, factor, None, list(range(block))))
                        store(b, run, place(b, out, b.add(b.mul(out_stride, _I64(r)), to), run.type))

            for width in cases(b, chosen, widths):
                row_cases(b, rows, functools.partial(emit, width))
            return context.get_dummy_value()

        return _signature(11), generate

    return mix


# `out[r, :count] = factors[r] * sum over pages and tokens of weights[r, token] * value[:count, token]`, to ROWS rows
# and `blocks` blocks of BLOCK components, or of one; from codes or levels. Arguments: width, codes (or levels) of the
# first page, bytes from page to page, pages, codebook, weights (int16 `[pages, rows, 64]`), rows, factors, out, its row
# stride, blocks.
mix_blocks, mix_levels = _make_mix(_CODED, isa.BLOCK), _make_mix([0], 1)
mix_ones = mix_blocks if isa.BLOCK == 1 else _make_mix(_CODED, 1)
