"""Vector building blocks in 16-bit integers, emitted from numba, for x86 processors.

A level of a codebook fits a 16-bit lane; `vpmaddwd` multiplies and adds pairs of lanes (with the VNNI extensions LLVM
fuses that with the sum: `vpdpwssd`). Codes become levels in registers and go straight into the sums. How they do is
`avx512.py`'s or `avx2.py`'s; integers, and so all sums, are the same. For keys lanes are tokens and a lane's pair two
components; for values a lane's pair is two neighbouring tokens. Pages hold 64 tokens here. All functions take addresses
and lengths in elements, and check nothing.
"""

from __future__ import annotations

import itertools

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .jit import features
from .simd import FAST, LANES, SUMS, VECTOR, WORDS, call, element, load, place, row_cases, shuffle, splat, store

if "avx512bw" in features():
    from . import avx512 as isa
else:
    from . import avx2 as isa

_I8, _I16, _I32, _I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
_F32 = ir.FloatType()
_IN_TURN = list(range(64))


def available() -> bool:
    return not features().isdisjoint({"avx512bw", "avx2"})


def _prefetch(b, address):
    """Ask for a cache line that will be read soon, from memory to the first-level cache."""
    pointer = b.inttoptr(address, _I8.as_pointer())
    name, kind = "llvm.prefetch.p0", ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
    function = b.module.globals.get(name) or ir.Function(b.module, kind, name)
    b.call(function, [pointer, _I32(0), _I32(3), _I32(1)])


def _signature(count):
    return types.void(*([types.int64] * count))


def _multiply_add(b, total, first, second):
    return b.add(total, isa.multiply_pairs(b, first, second))


def _add_scores(b, n, sums, keys, query, at, query_stride):
    """Let `sums[r, v]` grow by a pair of components: vectors of keys times a pair of each query row."""
    for r in range(n):
        pair = load(b, element(b, query, b.add(b.mul(query_stride, _I64(r)), at), 2, _I32), 2)
        both = b.bitcast(splat(b, pair), WORDS)
        for v, key in keys.items():
            b.store(_multiply_add(b, b.load(sums[r, v]), key, both), sums[r, v])


def _in_turn(b, sums, order, v):
    """Sums of tokens `16 * v` and those that follow, from vectors of which two hold 32 in another order."""
    if order == _IN_TURN:
        return b.load(sums[v])
    first = v & ~1
    lanes = [order.index(LANES * v + i) - LANES * first for i in range(LANES)]
    return shuffle(b, b.load(sums[first]), b.load(sums[first + 1]), lanes)


def _make_scores(width):
    """Scores of 64 tokens from `pairs` pairs of components of a width; without one, from levels `[pairs, 64, 2]`."""
    order = isa.ORDER if width else _IN_TURN
    lanes = [(component, token) for token in order for component in range(2)]

    @intrinsic
    def scores(typingctx, data, ahead, table, query, factors, scale, out, rows, pairs, query_stride, out_stride):
        def generate(context, b, signature, args):
            data, ahead, table, query, factors, scale, out, rows, pairs, query_stride, out_stride = args

            def emit(n):
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
                                _prefetch(b, b.add(address, ahead))
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

            row_cases(b, rows, emit)
            return context.get_dummy_value()

        return _signature(11), generate

    return scores


# `out[r, :64] += factors[r] * scale[:64] * sum_d query[r, d] * key[d, :]` for up to ROWS rows. Index is the width.
# Arguments: codes (or levels), bytes to the codes of the next page (prefetched), codebook, query (int16), factors,
# scale, out, rows, pairs, strides of query and out.
scores = [_make_scores(width) for width in range(7)]


def _make_mix(width, block):
    """Sums of `block` components over pages; width 0 stands for levels `[pages, block, 64]`."""

    @intrinsic
    def mix(typingctx, data, page_bytes, pages, table, weights, weight_stride, rows, factors, out, out_stride):
        def generate(context, b, signature, args):
            data, page_bytes, pages, table, weights, weight_stride, rows, factors, out, out_stride = args

            def emit(n):
                levels = isa.table(b, table, width) if width else None
                zero = ir.Constant(SUMS, [0] * LANES)
                sums = {(c, r): cgutils.alloca_once_value(b, zero) for c in range(block) for r in range(n)}
                for total in sums.values():
                    b.store(zero, total)
                with cgutils.for_range(b, pages) as loop:
                    page = b.add(data, b.mul(loop.index, page_bytes))
                    probs = {}
                    for r, v in itertools.product(range(n), range(2)):
                        at = b.add(b.mul(weight_stride, _I64(r)), b.add(b.shl(loop.index, _I64(6)), _I64(32 * v)))
                        probs[r, v] = load(b, element(b, weights, at, 2, WORDS), 2)
                    if width:
                        _prefetch(b, b.add(page, _I64(3 * 8 * width * block)))
                    for c in range(block):
                        for v in range(2):
                            if width:
                                lanes = [(0, 32 * v + i) for i in range(32)]
                                values = isa.levels(b, levels, b.add(page, _I64(8 * width * c)), width, lanes)
                            else:
                                values = load(b, element(b, page, _I64(64 * c + 32 * v), 2, WORDS), 2)
                            for r in range(n):
                                b.store(_multiply_add(b, b.load(sums[c, r]), values, probs[r, v]), sums[c, r])
                for c, r in sums:
                    # As floats: the lanes' sum need not fit 32 bits.
                    floats = b.sitofp(b.load(sums[c, r]), VECTOR)
                    total = call(b, "llvm.vector.reduce.fadd.v16f32", _F32, _F32(0.0), floats, flags=FAST)
                    value = b.fmul(total, load(b, place(b, factors, _I64(r), _F32)))
                    store(b, value, place(b, out, b.add(b.mul(out_stride, _I64(r)), _I64(c)), _F32))

            row_cases(b, rows, emit)
            return context.get_dummy_value()

        return _signature(10), generate

    return mix


# `out[r, :block] = factors[r] * sum over pages and tokens of weights[r, token] * value[:block, token]`, to ROWS rows.
# Arguments: codes (or levels) of the first page, bytes from page to page, pages, codebook, weights (int16, 64 a page),
# their row stride, rows, factors, out, its row stride. Index is the width.
mix_block = [_make_mix(width, isa.BLOCK) for width in range(7)]
mix_one = mix_block if isa.BLOCK == 1 else [_make_mix(width, 1) for width in range(7)]
