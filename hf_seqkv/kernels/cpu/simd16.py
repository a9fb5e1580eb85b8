"""Vector building blocks in 16-bit integers, emitted from numba, for x86 processors with AVX-512 BW.

A level of a codebook fits a 16-bit lane; `vpermw` looks up 32 of them at once, and `vpmaddwd` multiplies and adds pairs
(with the VNNI extension LLVM fuses that with the sum: `vpdpwssd`). Codes become levels in registers and go straight
into the sums. For keys lanes are tokens and a lane's pair two components; for values a lane's pair is two neighbouring
tokens. Pages hold 64 tokens here. All functions take addresses and lengths in elements, and check nothing.
"""

from __future__ import annotations

import itertools

from llvmlite import ir
from numba import config, types
from numba.core import cgutils, codegen
from numba.extending import intrinsic

from .simd import FAST, LANES, VECTOR, call, load, place, row_cases, shuffle, splat, store

_I8, _I16, _I32, _I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
_F32 = ir.FloatType()
_WORDS, _SUMS = ir.VectorType(_I16, 32), ir.VectorType(_I32, LANES)


def features() -> set[str]:
    """Processor features that numba compiles for, such as `avx512bw`."""
    names = codegen.get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES
    return {name[1:] for name in names.split(",") if name.startswith("+")}


def available() -> bool:
    return "avx512bw" in features()


def _at(b, base, elements, size, type_):
    """Pointer `elements` (i64) times `size` bytes after the address `base`."""
    return b.inttoptr(b.add(base, b.mul(elements, _I64(size))), type_.as_pointer())


def _words(value):
    return ir.Constant(_WORDS, value if isinstance(value, list) else [value] * 32)


def _indices(b, address, width, lanes):
    """Codes of 32 `(component, token)` lanes, components 0 and 1 from `address` on; the layout is `codec.packing`'s.

    Bits above `width` are left as they come: `_lookup` ignores them.
    """
    index, at, shift = None, 0, 0
    for field in (4, 2, 1):
        if not width & field:
            continue
        size = 8 * field
        run = ir.VectorType(_I8, size)
        rows = [
            load(b, b.inttoptr(b.add(address, _I64(8 * width * c + at)), run.as_pointer()), 1)
            for c in range(1 + max(c for c, _ in lanes))
        ]
        data = shuffle(b, rows[0], rows[-1], [c * size + token % size for c, token in lanes])
        words = b.zext(data, _WORDS)
        if shift:
            words = b.shl(words, _words(shift))
        words = b.lshr(words, _words([field * (token // size) for _, token in lanes]))
        if index is None:
            index = words
        else:
            mask = ((1 << field) - 1) << shift
            index = b.or_(b.and_(words, _words(mask)), b.and_(index, _words(0xFFFF ^ mask)))
        at, shift = at + size, shift + field
    return index


def _table(b, address, width):
    """A codebook of `2**width` 16-bit levels as one or two vectors, repeated to fill them."""
    run = ir.VectorType(_I16, min(32, 1 << width))
    parts = [load(b, _at(b, address, _I64(32 * i), 2, run), 2) for i in range(max(1, 1 << width >> 5))]
    return [shuffle(b, part, None, [i % run.count for i in range(32)]) for part in parts]


def _prefetch(b, address):
    """Ask for a cache line that will be read soon, from memory to the first-level cache."""
    pointer = b.inttoptr(address, _I8.as_pointer())
    name, kind = "llvm.prefetch.p0", ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
    function = b.module.globals.get(name) or ir.Function(b.module, kind, name)
    b.call(function, [pointer, _I32(0), _I32(3), _I32(1)])


def _lookup(b, table, index):
    if len(table) == 1:
        return call(b, "llvm.x86.avx512.permvar.hi.512", _WORDS, table[0], index)
    return call(b, "llvm.x86.avx512.vpermi2var.hi.512", _WORDS, table[0], index, table[1])


def _signature(count):
    return types.void(*([types.int64] * count))


def _multiply_add(b, total, first, second):
    return b.add(total, call(b, "llvm.x86.avx512.pmaddw.d.512", _SUMS, first, second))


def _add_scores(b, n, sums, keys, query, at, query_stride):
    """Let `sums[r, v]` grow by a pair of components: 64 tokens in four vectors times a pair of each query row."""
    for r in range(n):
        pair = load(b, _at(b, query, b.add(b.mul(query_stride, _I64(r)), at), 2, _I32), 2)
        both = b.bitcast(splat(b, pair), _WORDS)
        for v in range(4):
            b.store(_multiply_add(b, b.load(sums[r, v]), keys[v], both), sums[r, v])


def _make_scores(width):
    """Scores of 64 tokens from `pairs` pairs of components of a width; without one, from levels `[pairs, 64, 2]`."""
    lanes = [(i % 2, i // 2) for i in range(128)]

    @intrinsic
    def scores(typingctx, data, ahead, table, query, factors, scale, out, rows, pairs, query_stride, out_stride):
        def generate(context, b, signature, args):
            data, ahead, table, query, factors, scale, out, rows, pairs, query_stride, out_stride = args

            def emit(n):
                levels = _table(b, table, width) if width else None
                zero = ir.Constant(_SUMS, [0] * LANES)
                sums = {(r, v): cgutils.alloca_once_value(b, zero) for r in range(n) for v in range(4)}
                for total in sums.values():
                    b.store(zero, total)
                with cgutils.for_range(b, pairs) as loop:
                    if width:
                        address = b.add(data, b.mul(loop.index, _I64(16 * width)))
                        _prefetch(b, b.add(address, ahead))
                        keys = [
                            _lookup(b, levels, _indices(b, address, width, lanes[i : i + 32]))
                            for i in range(0, 128, 32)
                        ]
                    else:
                        at = b.mul(loop.index, _I64(128))
                        keys = [load(b, _at(b, data, b.add(at, _I64(32 * v)), 2, _WORDS), 2) for v in range(4)]
                    _add_scores(b, n, sums, keys, query, b.shl(loop.index, _I64(1)), query_stride)
                for r in range(n):
                    factor = splat(b, load(b, place(b, factors, _I64(r), _F32)))
                    for v in range(4):
                        at = place(b, out, b.add(b.mul(out_stride, _I64(r)), _I64(LANES * v)))
                        value = b.fmul(b.sitofp(b.load(sums[r, v]), VECTOR), factor)
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
                levels = _table(b, table, width) if width else None
                zero = ir.Constant(_SUMS, [0] * LANES)
                sums = {(c, r): cgutils.alloca_once_value(b, zero) for c in range(block) for r in range(n)}
                for total in sums.values():
                    b.store(zero, total)
                with cgutils.for_range(b, pages) as loop:
                    page = b.add(data, b.mul(loop.index, page_bytes))
                    probs = {}
                    for r, v in itertools.product(range(n), range(2)):
                        at = b.add(b.mul(weight_stride, _I64(r)), b.add(b.shl(loop.index, _I64(6)), _I64(32 * v)))
                        probs[r, v] = load(b, _at(b, weights, at, 2, _WORDS), 2)
                    if width:
                        _prefetch(b, b.add(page, _I64(3 * 8 * width * block)))
                    for c in range(block):
                        for v in range(2):
                            if width:
                                lanes = [(0, 32 * v + i) for i in range(32)]
                                index = _indices(b, b.add(page, _I64(8 * width * c)), width, lanes)
                                values = _lookup(b, levels, index)
                            else:
                                values = load(b, _at(b, page, _I64(64 * c + 32 * v), 2, _WORDS), 2)
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


BLOCK = 4  # components whose sums stay in registers: 4 components x 4 rows
# `out[r, :block] = factors[r] * sum over pages and tokens of weights[r, token] * value[:block, token]`, to ROWS rows.
# Arguments: codes (or levels) of the first page, bytes from page to page, pages, codebook, weights (int16, 64 a page),
# their row stride, rows, factors, out, its row stride. Index is the width.
mix_block = [_make_mix(width, BLOCK) for width in range(7)]
mix_one = [_make_mix(width, 1) for width in range(7)]
