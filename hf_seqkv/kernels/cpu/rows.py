"""What is done to one row of numbers, as LLVM vectors emitted from numba: softmax, extents, rounding to int16.

Written out because numba's own loops stay scalar wherever a maximum is taken. Addresses are of fp32 numbers, lengths
are multiples of 16, and nothing is checked.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ...codec.scales import BIAS, HELD
from .simd import FAST, LANES, ROWS, VECTOR, added_up, call, element, load, place, row_cases, splat, store

_F32, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_INTEGERS = ir.VectorType(_I32, LANES)
WHOLE = 12582912.0  # whole numbers below 1 << 22 added to it are its low bits
# exp2 on [-1/2, 1/2]: degree 5, relative error 2e-7 in fp32; highest power first.
_EXP2 = (1.327647129e-3, 9.675540961e-3, 5.550713092e-2, 2.402212024e-1, 6.931469440e-1, 1.000000119)


def _constant(value):
    return ir.Constant(VECTOR, [value] * LANES)


def _whole(value):
    return ir.Constant(_INTEGERS, [value] * LANES)


def _larger(b, x, y):
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def _reduce(b, name, vector, *first):
    return call(b, f"llvm.vector.reduce.{name}.v{LANES}f32", _F32, *first, vector, flags=FAST)


@intrinsic
def maximum(typingctx, row, count):
    """Largest of `count` numbers, NaN if there is one."""

    def generate(context, b, signature, args):
        row, count = args
        top = cgutils.alloca_once_value(b, _constant(float("-inf")))
        b.store(_constant(float("-inf")), top)
        with cgutils.for_range_slice(b, _I64(0), count, _I64(LANES)) as (i, _):
            b.store(call(b, "llvm.maximum.v16f32", VECTOR, load(b, place(b, row, i)), b.load(top)), top)
        return _reduce(b, "fmaximum", b.load(top))

    return types.float32(types.int64, types.int64), generate


def _exponentials(b, x, top):
    """`exp(x - top)`, 0 below 2**-127, and so for minus infinity."""
    x = b.fmul(b.fsub(x, splat(b, top)), _constant(1.4426950408889634))
    x = b.select(b.fcmp_ordered("<", x, _constant(-127.0)), _constant(-127.0), x)
    whole = call(b, "llvm.rint.v16f32", VECTOR, x)
    fraction, power = b.fsub(x, whole), _constant(_EXP2[0])
    for factor in _EXP2[1:]:
        power = b.fadd(b.fmul(power, fraction, flags=FAST), _constant(factor), flags=FAST)
    bits = b.shl(b.add(b.fptosi(whole, _INTEGERS), _whole(127)), _whole(23))
    return b.fmul(power, b.bitcast(bits, VECTOR))


@intrinsic
def exponentials(typingctx, row, count, top):
    """`exp(x - top)` in place, exactly 0 for minus infinity; returns the sum."""

    def generate(context, b, signature, args):
        row, count, top = args
        total = cgutils.alloca_once_value(b, _constant(0.0))
        b.store(_constant(0.0), total)
        with cgutils.for_range_slice(b, _I64(0), count, _I64(LANES)) as (i, _):
            at = place(b, row, i)
            value = _exponentials(b, load(b, at), top)
            store(b, value, at)
            b.store(b.fadd(b.load(total), value), total)
        return _reduce(b, "fadd", b.load(total), ir.Constant(_F32, 0.0))

    return types.float32(types.int64, types.int64, types.float32), generate


@intrinsic
def weigh(typingctx, row, count, top, scale):
    """`exp(x - top) * scale` in place, for `count` numbers, a multiple of 32.

    Returns the sum of the exponentials; of what is left the largest magnitude, and a bound of the sum that one of 16
    lanes sees when every lane adds up pairs of neighbours.
    """

    def generate(context, b, signature, args):
        row, count, top, scale = args
        total, largest, *sums = (cgutils.alloca_once_value(b, _constant(0.0)) for _ in range(4))
        for variable in (total, largest, *sums):
            b.store(_constant(0.0), variable)
        with cgutils.for_range_slice(b, _I64(0), count, _I64(2 * LANES)) as (i, _):
            for part, lanes in enumerate(sums):
                first = b.add(i, _I64(LANES * part))
                at = place(b, row, first)
                value = _exponentials(b, load(b, at), top)
                b.store(b.fadd(b.load(total), value), total)
                value = b.fmul(value, load(b, place(b, scale, first)))
                store(b, value, at)
                value = call(b, "llvm.fabs.v16f32", VECTOR, value)
                b.store(_larger(b, value, b.load(largest)), largest)
                b.store(b.fadd(b.load(lanes), value), lanes)
        bound = b.fmul(_reduce(b, "fmax", _larger(b, *(b.load(lanes) for lanes in sums))), ir.Constant(_F32, 2.0))
        found = _reduce(b, "fadd", b.load(total), ir.Constant(_F32, 0.0)), _reduce(b, "fmax", b.load(largest)), bound
        return context.make_tuple(b, signature.return_type, found)

    return types.UniTuple(types.float32, 3)(types.int64, types.int64, types.float32, types.int64), generate


@intrinsic
def extents(typingctx, row, count):
    """Largest magnitude of `count` numbers, and the sum of all magnitudes."""

    def generate(context, b, signature, args):
        row, count = args
        top, total = (cgutils.alloca_once_value(b, _constant(0.0)) for _ in range(2))
        for variable in (top, total):
            b.store(_constant(0.0), variable)
        with cgutils.for_range_slice(b, _I64(0), count, _I64(LANES)) as (i, _):
            x = call(b, "llvm.fabs.v16f32", VECTOR, load(b, place(b, row, i)))
            b.store(_larger(b, x, b.load(top)), top)
            b.store(b.fadd(b.load(total), x), total)
        found = _reduce(b, "fmax", b.load(top)), _reduce(b, "fadd", b.load(total), ir.Constant(_F32, 0.0))
        return context.make_tuple(b, signature.return_type, found)

    return types.UniTuple(types.float32, 2)(types.int64, types.int64), generate


@intrinsic
def to_int16(typingctx, row, count, factor, out, apart):
    """`out = round(row * factor)`, int16, in runs of 64 that are `apart` from start to start."""

    def generate(context, b, signature, args):
        row, count, factor, out, apart = args
        words = ir.VectorType(_I16, LANES)
        with cgutils.for_range_slice(b, _I64(0), count, _I64(LANES)) as (i, _):
            x = b.fmul(load(b, place(b, row, i)), splat(b, factor), flags=FAST)
            whole = b.bitcast(b.fadd(x, _constant(WHOLE), flags=("contract",)), _INTEGERS)
            at = b.add(b.mul(b.lshr(i, _I64(6)), apart), b.and_(i, _I64(63)))
            store(b, b.trunc(whole, words), element(b, out, at, 2, words), 2)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32, types.int64, types.int64), generate


def _make_widen(type_, expand):
    """Numbers of an integer type as fp32: `expand(b, numbers as i32)` gives their bits, and which are infinite."""

    @intrinsic
    def widen(typingctx, row, count, out):
        def generate(context, b, signature, args):
            row, count, out = args
            run, none = ir.VectorType(type_, LANES), ir.Constant(_INTEGERS, [0] * LANES)
            found = cgutils.alloca_once_value(b, none)
            b.store(none, found)
            with cgutils.for_range_slice(b, _I64(0), count, _I64(LANES)) as (i, _):
                raw = load(b, element(b, row, i, type_.width // 8, run), 1)
                bits, infinite = expand(b, b.zext(raw, _INTEGERS))
                b.store(b.or_(b.load(found), b.sext(infinite, _INTEGERS)), found)
                store(b, b.bitcast(b.select(infinite, none, bits), VECTOR), place(b, out, i))
            total = call(b, "llvm.vector.reduce.or.v16i32", _I32, b.load(found))
            return b.icmp_signed("!=", total, _I32(0))

        return types.boolean(types.int64, types.int64, types.int64), generate

    return widen


def _expand_bf16(b, raw):
    bits = b.shl(raw, _whole(16))
    return bits, b.icmp_unsigned("==", bits, _whole(0x7F800000))


def _expand_narrow(b, raw):
    bits = b.shl(b.add(raw, _whole(BIAS)), _whole(20))
    zero = b.icmp_unsigned("==", raw, _whole(0))
    return b.select(zero, _whole(0), bits), b.icmp_unsigned("==", raw, _whole(HELD))


# bf16 numbers, or scales of a byte (`codec.scales`), as fp32, infinite ones as 0; return whether there was one.
widen, widen_narrow = _make_widen(_I16, _expand_bf16), _make_widen(ir.IntType(8), _expand_narrow)


@intrinsic
def dots(typingctx, left, left_stride, rows, right, right_stride, count, dim, out, out_stride):
    """`out[r, t] = left[r] . right[t]` for up to ROWS rows; `dim` is a multiple of 16."""

    def generate(context, b, signature, args):
        left, left_stride, rows, right, right_stride, count, dim, out, out_stride = args

        def emit(n):
            none = _constant(0.0)
            sums = [cgutils.alloca_once_value(b, none) for _ in range(n)]
            with cgutils.for_range(b, count) as token:
                for total in sums:
                    b.store(none, total)
                with cgutils.for_range_slice(b, _I64(0), dim, _I64(LANES)) as (d, _):
                    x = load(b, place(b, right, b.add(b.mul(token.index, right_stride), d)))
                    for r, total in enumerate(sums):
                        y = load(b, place(b, left, b.add(b.mul(left_stride, _I64(r)), d)))
                        b.store(b.fadd(b.load(total), b.fmul(x, y, flags=FAST), flags=FAST), total)
                found = added_up(b, [b.load(total) for total in sums] + [none] * (ROWS - n))
                for r in range(n):
                    at = place(b, out, b.add(b.mul(out_stride, _I64(r)), token.index), _F32)
                    store(b, b.extract_element(found, _I32(r)), at)

        row_cases(b, rows, emit)
        return context.get_dummy_value()

    return types.void(*([types.int64] * 9)), generate
