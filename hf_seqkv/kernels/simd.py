"""Vector building blocks for the CPU kernel: LLVM vectors of 16 floats emitted from numba, no compiler needed.

Plain numba loops leave two things on the table here: accumulators are spilled to memory in every iteration,
and a codebook lookup becomes a gather. Both are fixed by emitting the vector instructions directly. LLVM lowers
`<16 x float>` to whatever the processor has (AVX-512, AVX2, NEON); only the lookup of a 16-entry table names an
instruction, `vpermps`, and `cpu.py` falls back to a scalar loop where it does not exist.

All functions take addresses (`array.ctypes.data`) and lengths in elements, and check nothing.
"""

from __future__ import annotations

from llvmlite import ir
from numba import config, types
from numba.core import cgutils, codegen
from numba.extending import intrinsic

LANES = 16
ROWS = 4  # query rows a block: 4 rows x 4 vectors of accumulators fit 32 registers
_I8, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
_V8, _V32, _VF = (ir.VectorType(t, LANES) for t in (_I8, _I32, _F32))
_FAST = ("reassoc", "contract", "nsz", "arcp")


def has_table_lookup() -> bool:
    """Whether numba compiles for a processor with `vpermps` on 16 lanes (AVX-512F)."""
    features = config.CPU_FEATURES
    if features is None:
        features = codegen.get_host_cpu_features()
    return "+avx512f" in features.split(",")


def _at(builder, base, index, type_):
    """Pointer to element `index` (i64, counted in 4-byte floats) after the address `base`."""
    address = builder.add(base, builder.shl(index, _I64(2)))
    return builder.inttoptr(address, type_.as_pointer())


def _load(builder, pointer, align=4):
    value = builder.load(pointer)
    value.align = align
    return value


def _store(builder, value, pointer):
    builder.store(value, pointer).align = 4


def _splat(builder, scalar):
    vector = builder.insert_element(ir.Constant(_VF, ir.Undefined), scalar, _I32(0))
    return builder.shuffle_vector(vector, ir.Constant(_VF, ir.Undefined), ir.Constant(_V32, [0] * LANES))


def _signature(count):
    return types.void(*([types.int64] * count))


def _row_cases(builder, rows, emit):
    """Emit `emit(n)` for every block height and pick one at run time: `rows` accumulators must be known to LLVM."""
    for n in range(1, ROWS + 1):
        with builder.if_then(builder.icmp_signed("==", rows, _I64(n))):
            emit(n)


def _make_scores(vectors: int):
    @intrinsic
    def scores_block(typingctx, query, tile, scores, rows, dim, query_stride, tile_stride, score_stride):
        def codegen(context, b, signature, args):
            query, tile, scores, rows, dim, query_stride, tile_stride, score_stride = args

            def emit(n):
                acc = {}
                for r in range(n):
                    for v in range(vectors):
                        acc[r, v] = cgutils.alloca_once(b, _VF)
                        at = b.add(b.mul(score_stride, _I64(r)), _I64(LANES * v))
                        b.store(_load(b, _at(b, scores, at, _VF)), acc[r, v])
                with cgutils.for_range(b, dim) as loop:
                    base = b.mul(loop.index, tile_stride)
                    keys = [_load(b, _at(b, tile, b.add(base, _I64(LANES * v)), _VF)) for v in range(vectors)]
                    for r in range(n):
                        at = b.add(b.mul(query_stride, _I64(r)), loop.index)
                        q = _splat(b, _load(b, _at(b, query, at, _F32)))
                        for v in range(vectors):
                            product = b.fmul(q, keys[v], flags=_FAST)
                            b.store(b.fadd(b.load(acc[r, v]), product, flags=_FAST), acc[r, v])
                for (r, v), a in acc.items():
                    at = b.add(b.mul(score_stride, _I64(r)), _I64(LANES * v))
                    _store(b, b.load(a), _at(b, scores, at, _VF))

            _row_cases(b, rows, emit)
            return context.get_dummy_value()

        return _signature(8), codegen

    return scores_block


def _make_mix(vectors: int):
    @intrinsic
    def mix_block(typingctx, probs, tile, lanes, rows, dim, prob_stride, tile_stride, lane_stride):
        def codegen(context, b, signature, args):
            probs, tile, lanes, rows, dim, prob_stride, tile_stride, lane_stride = args

            def emit(n):
                p = {}
                for r in range(n):
                    for v in range(vectors):
                        at = b.add(b.mul(prob_stride, _I64(r)), _I64(LANES * v))
                        p[r, v] = _load(b, _at(b, probs, at, _VF))
                with cgutils.for_range(b, dim) as loop:
                    base = b.mul(loop.index, tile_stride)
                    values = [_load(b, _at(b, tile, b.add(base, _I64(LANES * v)), _VF)) for v in range(vectors)]
                    for r in range(n):
                        at = b.add(b.mul(lane_stride, _I64(r)), b.mul(loop.index, _I64(LANES)))
                        pointer = _at(b, lanes, at, _VF)
                        total = _load(b, pointer)
                        for v in range(vectors):
                            total = b.fadd(total, b.fmul(p[r, v], values[v], flags=_FAST), flags=_FAST)
                        _store(b, total, pointer)

            _row_cases(b, rows, emit)
            return context.get_dummy_value()

        return _signature(8), codegen

    return mix_block


# `scores[r, :] += sum_d query[r, d] * tile[d, :]` for up to ROWS rows and 16 or 64 tokens, accumulators in registers.
# Arguments: query, tile, scores (addresses), rows, D, then the row strides of query, tile and scores.
scores_16, scores_64 = _make_scores(1), _make_scores(4)

# `lanes[r, d, :] += probs[r, tokens] * tile[d, tokens]`, 16 lanes kept apart: they are summed once at the end of a
# split instead of once a page. Arguments: probs, tile, lanes (addresses), rows, D, then their row strides.
mix_16, mix_64 = _make_mix(1), _make_mix(4)


def _vpermps(builder, table, index):
    """16 entries at once of a table of 16, 32 or 64, given as vectors of 16."""
    if len(table) == 4:
        low, high = (_vpermps(builder, half, index) for half in (table[:2], table[2:]))
        upper = builder.icmp_unsigned(">=", index, ir.Constant(_V32, [32] * LANES))
        return builder.select(upper, high, low)
    name, args = "llvm.x86.avx512.permvar.sf.512", [table[0], index]
    if len(table) == 2:
        name, args = "llvm.x86.avx512.vpermi2var.ps.512", [table[0], index, table[1]]
    function = builder.module.globals.get(name) or ir.Function(
        builder.module, ir.FunctionType(_VF, [a.type for a in args]), name
    )
    return builder.call(function, args)


def _field(builder, row, at, width, vector):
    """Codes of one field for tokens `16 * vector ...` of a 64-token row: `codec.packing`'s layout, 16 x int32."""
    size = 8 * width  # bytes the field takes: byte t % size, shift width * (t // size)
    first = LANES * vector
    address = builder.add(row, _I64(at + (first % size if size >= LANES else 0)))
    if size >= LANES:
        data, shifts = _load(builder, builder.inttoptr(address, _V8.as_pointer()), align=1), [first // size] * LANES
    else:  # 8 bytes serve two runs of 8 tokens
        half = ir.VectorType(_I8, 8)
        data = _load(builder, builder.inttoptr(address, half.as_pointer()), align=1)
        lanes = ir.Constant(_V32, [i % 8 for i in range(LANES)])
        data = builder.shuffle_vector(data, ir.Constant(half, ir.Undefined), lanes)
        shifts = [(first + i) // size for i in range(LANES)]
    words = builder.lshr(builder.zext(data, _V32), ir.Constant(_V32, [width * s for s in shifts]))
    return builder.and_(words, ir.Constant(_V32, [(1 << width) - 1] * LANES))


def _make_expand(width: int):
    @intrinsic
    def expand(typingctx, codes, table, out, rows, out_stride):
        def codegen(context, b, signature, args):
            codes, table, out, rows, out_stride = args
            halves = [_load(b, _at(b, table, _I64(LANES * i), _VF)) for i in range(max(1, 2 ** (width - 4)))]
            with cgutils.for_range(b, rows) as loop:
                row = b.add(codes, b.mul(loop.index, _I64(8 * width)))
                target = b.mul(loop.index, out_stride)
                for vector in range(4):
                    index, at, shift = None, 0, 0
                    for field in (4, 2, 1):
                        if width & field:
                            part = _field(b, row, at, field, vector)
                            if shift:
                                part = b.shl(part, ir.Constant(_V32, [shift] * LANES))
                            index = part if index is None else b.or_(index, part)
                            at, shift = at + 8 * field, shift + field
                    levels = _vpermps(b, halves, index)
                    _store(b, levels, _at(b, out, b.add(target, _I64(LANES * vector)), _VF))
            return context.get_dummy_value()

        return _signature(5), codegen

    return expand


# Codes of consecutive components, 64 tokens each, to levels: `out[r, :64] = table[codes[r]]`.
# Arguments: codes, table, out (addresses), rows, row stride of out. One function a width.
expand_1, expand_2, expand_3, expand_4, expand_5, expand_6 = (_make_expand(width) for width in range(1, 7))
