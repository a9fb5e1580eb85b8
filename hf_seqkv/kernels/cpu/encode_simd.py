"""Rotated vectors to gains, bf16 scales and codes, as LLVM vectors emitted from numba: 16 tokens a vector.

A codebook's edges lie in a tree, node `i` above nodes `2i` and `2i + 1`, so that a search of `w` steps finds one of
`2**w` codes. With AVX-512 or AVX2 a step looks its edges up in registers; elsewhere it loads them one by one.

Addresses are of fp32 numbers unless said otherwise, strides count elements, and nothing is checked.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ...codec.scales import BIAS, HELD
from .jit import features
from .simd import FAST, LANES, VECTOR, call, load, place, shuffle, splat, store

TABLE = 256  # numbers of a tree; the codebook's levels follow
_I8, _I16, _I32, _I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
_F32 = ir.FloatType()
_INTEGERS = ir.VectorType(_I32, LANES)
# Entries of a table that one instruction looks up, if there is one.
_PART = LANES if "avx512f" in features() else LANES // 2 if "avx2" in features() else 0


def make_tables(levels: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """A codebook as the kernel reads it: sorted levels `[n]` and the `n - 1` edges between them to `[2, TABLE]` fp32.

    `n` is a power of two.
    """
    tables = np.zeros((2, TABLE), np.float32)
    step = len(levels) // 2
    while step:
        depth = len(levels) // (2 * step)
        tables[0, depth : 2 * depth] = edges[step - 1 :: 2 * step]
        step //= 2
    tables[1, : len(levels)] = levels
    return tables


def _number(value):
    return ir.Constant(VECTOR, [value] * LANES)


def _integer(value):
    return ir.Constant(_INTEGERS, [value] * LANES)


def _at(b, base, elements, size, type_):
    """Pointer `elements` (i64) times `size` bytes after the address `base`."""
    return b.inttoptr(b.add(base, b.mul(elements, _I64(size))), type_.as_pointer())


def _larger(b, x, y):
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def _power_of_two(b, exponent):
    """Two factors of `2**exponent`: one alone would overflow or vanish at the ends of the range."""
    half = b.ashr(exponent, _integer(1))
    return [
        b.bitcast(b.shl(b.add(part, _integer(127)), _integer(23)), VECTOR) for part in (half, b.sub(exponent, half))
    ]


def _exponent(b, x):
    """`frexp`'s exponent of numbers that are not negative; 0 for 0."""
    tiny = b.fcmp_ordered("<", x, _number(2.0**-126))
    bits = b.bitcast(b.select(tiny, b.fmul(x, _number(2.0**64)), x), _INTEGERS)
    exponent = b.sub(b.lshr(bits, _integer(23)), b.select(tiny, _integer(126 + 64), _integer(126)))
    return b.select(b.fcmp_ordered("==", x, _number(0.0)), _integer(0), exponent)


def _permute(b, part, index):
    """Entries of a part of a table, by the low bits of `index`."""
    if _PART == LANES:
        return call(b, "llvm.x86.avx512.permvar.sf.512", VECTOR, part, index)
    halves = [shuffle(b, index, None, list(range(at, at + _PART))) for at in range(0, LANES, _PART)]
    return shuffle(b, *(call(b, "llvm.x86.avx2.permps", part.type, part, half) for half in halves), list(range(LANES)))


def _lookup(b, table, first, count, index):
    """Entries `first + index` of a table, `index` below `count`."""
    if not _PART or count > 8 * _PART:
        result = ir.Constant(VECTOR, ir.Undefined)
        for lane in range(LANES):
            at = b.add(b.zext(b.extract_element(index, _I32(lane)), _I64), _I64(first))
            result = b.insert_element(result, load(b, place(b, table, at, _F32)), _I32(lane))
        return result
    type_ = ir.VectorType(_F32, _PART)
    parts = [load(b, place(b, table, _I64(first + at), type_)) for at in range(0, count, _PART)]
    found, bit = [_permute(b, part, index) for part in parts], _PART
    while len(found) > 1:
        upper = b.icmp_unsigned("!=", b.and_(index, _integer(bit)), _integer(0))
        found = [b.select(upper, high, low) for low, high in zip(found[::2], found[1::2], strict=True)]
        bit *= 2
    return found[0]


def _search(b, x, table, width):
    """Codes of 16 numbers: how many of the codebook's edges are below each."""
    edge = splat(b, load(b, place(b, table, _I64(1), _F32)))
    codes = b.zext(b.fcmp_ordered("<", edge, x), _INTEGERS)
    for step in range(1, width):
        edge = _lookup(b, table, 1 << step, 1 << step, codes)
        codes = b.add(b.add(codes, codes), b.zext(b.fcmp_ordered("<", edge, x), _INTEGERS))
    return codes


def _variable(b, value=0.0):
    """Sixteen numbers that LLVM keeps in registers, set here and now."""
    variable = cgutils.alloca_once(b, VECTOR)
    b.store(_number(value), variable)
    return variable


def _accumulate(b, variable, x, y):
    b.store(b.fadd(b.load(variable), b.fmul(x, y, flags=FAST), flags=FAST), variable)


def _normalise(b, row, dim, weights):
    """Scale numbers by a power of two, in place, to magnitudes around 1; `row(d)` is where those of a component lie.

    Returns the exponents that were taken out, and the weighted sum of squares.
    """
    top, energy = _variable(b), _variable(b)
    with cgutils.for_range(b, dim) as loop:
        b.store(_larger(b, call(b, "llvm.fabs.v16f32", VECTOR, load(b, row(loop.index))), b.load(top)), top)
    exponent = _exponent(b, b.load(top))
    shrink = _power_of_two(b, b.sub(_integer(0), exponent))
    with cgutils.for_range(b, dim) as loop:
        at = row(loop.index)
        x = b.fmul(b.fmul(load(b, at), shrink[0]), shrink[1])
        store(b, x, at)
        _accumulate(b, energy, b.fmul(x, x), splat(b, load(b, place(b, weights, loop.index, _F32))))
    return exponent, b.load(energy)


def _quantise(b, row, dim, tables, widths, weights, gain):
    """Sums over components of `y * level` and `level * level`, weighted, under a gain."""
    dot, power = _variable(b), _variable(b)
    with cgutils.for_range(b, dim) as loop:
        weight = splat(b, load(b, place(b, weights, loop.index, _F32)))
        y = load(b, row(loop.index))
        ratio = b.fdiv(y, gain)
        width = load(b, _at(b, widths, loop.index, 1, _I8), 1)
        for w in range(1, 9):
            with b.if_then(b.icmp_unsigned("==", width, _I8(w))):
                table = b.add(tables, _I64(w * 2 * TABLE * 4))
                level = _lookup(b, table, TABLE, 1 << w, _search(b, ratio, table, w))
                weighted = b.fmul(level, weight)
                _accumulate(b, dot, y, weighted)
                _accumulate(b, power, level, weighted)
    return b.load(dot), b.load(power)


def _nearest_scale(b, x):
    """`codec.scales.nearest` of 16 numbers."""
    low = b.sub(b.lshr(b.bitcast(x, _INTEGERS), _integer(20)), _integer(BIAS))
    low = b.select(b.icmp_signed("<", low, _integer(1)), _integer(1), low)
    last = b.icmp_signed(">=", low, _integer(HELD - 1))
    low = b.select(last, _integer(HELD - 1), low)
    below, above = (b.bitcast(b.shl(b.add(low, _integer(step + BIAS)), _integer(20)), VECTOR) for step in (0, 1))
    up = b.and_(b.fcmp_ordered(">=", b.fmul(x, x), b.fmul(below, above)), b.not_(last))
    return b.select(b.fcmp_ordered("<=", x, _number(0.0)), _number(0.0), b.select(up, above, below))


@intrinsic
def fit_gains(typingctx, y, stride, dim, tables, widths, weights, total, factors, tries, narrow, gains, scales):
    """Gains and scales of 16 tokens, `y [dim, tokens]`, which become numbers around 1 in place.

    Arguments: y and the stride of its components, their count, the head's tables `[9, 2, TABLE]`, widths (bytes) and
    weights, the sum of the weights, the factors to try on the gain (none: the gain is the scale) and how many, whether
    scales are stored as bytes, and where to leave gains to divide by (fp32) and scales (bf16).
    """

    def generate(context, b, signature, args):
        y, stride, dim, tables, widths, weights, total, factors, tries, narrow, gains, scales = args

        def row(d):
            return place(b, y, b.mul(d, stride))

        exponent, energy = _normalise(b, row, dim, weights)
        start = call(b, "llvm.sqrt.v16f32", VECTOR, b.fdiv(energy, splat(b, total)))
        best, fitted, least = _variable(b), _variable(b), _variable(b, float("inf"))
        b.store(start, best)
        b.store(start, fitted)
        with cgutils.for_range(b, tries) as loop:
            gain = b.fmul(start, splat(b, load(b, place(b, factors, loop.index, _F32))))
            dot, power = _quantise(b, row, dim, tables, widths, weights, _larger(b, gain, _number(1e-30)))
            ratio = b.fdiv(dot, _larger(b, power, _number(1e-30)))
            ratio = b.select(b.fcmp_ordered(">", power, _number(0.0)), ratio, gain)
            error = b.fsub(energy, b.fmul(dot, ratio))
            better = b.fcmp_ordered("<", error, b.load(least))
            for new, variable in ((gain, best), (ratio, fitted), (error, least)):
                b.store(b.select(better, new, b.load(variable)), variable)
        words, grow = ir.VectorType(_I16, LANES), _power_of_two(b, exponent)
        scale = cgutils.alloca_once_value(b, b.fmul(b.fmul(b.load(fitted), grow[0]), grow[1]))
        with b.if_then(b.icmp_signed("!=", narrow, _I64(0))):
            b.store(_nearest_scale(b, b.load(scale)), scale)
            shrink = _power_of_two(b, b.sub(_integer(0), exponent))
            b.store(b.fmul(b.fmul(b.load(scale), shrink[0]), shrink[1]), best)
        store(b, _larger(b, b.load(best), _number(1e-30)), place(b, gains, _I64(0)))
        bits = b.bitcast(b.load(scale), _INTEGERS)
        odd = b.and_(b.lshr(bits, _integer(16)), _integer(1))  # to the nearest, ties to even
        bits = b.lshr(b.add(b.add(bits, odd), _integer(0x7FFF)), _integer(16))
        store(b, b.trunc(bits, words), _at(b, scales, _I64(0), 2, words), 2)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6, types.float32, *[types.int64] * 5), generate


@intrinsic
def find_codes(typingctx, y, count, gains, tables, width, codes):
    """Codes (bytes) of `count` tokens of one component, a multiple of 16, under their gains; `width` is at least 1."""

    def generate(context, b, signature, args):
        y, count, gains, tables, width, codes = args
        run = ir.VectorType(_I8, LANES)
        for w in range(1, 9):
            with b.if_then(b.icmp_signed("==", width, _I64(w))):
                table = b.add(tables, _I64(w * 2 * TABLE * 4))
                with cgutils.for_range_slice(b, _I64(0), count, _I64(LANES)) as (i, _):
                    x = b.fdiv(load(b, place(b, y, i)), load(b, place(b, gains, i)))
                    store(b, b.trunc(_search(b, x, table, w), run), _at(b, codes, i, 1, run), 1)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate
