"""Vector building blocks in fp32: LLVM vectors of 16 floats emitted from numba, no compiler needed.

Plain numba loops spill the accumulators of a matrix product to memory in every iteration. LLVM lowers `<16 x float>`
to whatever the processor has (AVX-512, AVX2, NEON).

The intrinsics take addresses (`array.ctypes.data`) and lengths in elements, and check nothing.
"""

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .jit import OPTIONS, features

LANES = 16
ROWS = 4  # query rows a block
_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
VECTOR = ir.VectorType(_F32, LANES)
WORDS, SUMS = ir.VectorType(ir.IntType(16), 2 * LANES), ir.VectorType(_I32, LANES)
FAST = ("reassoc", "contract", "nsz", "arcp")


def place(builder, base, index, type_=VECTOR):
    """Pointer to element `index` (i64, counted in 4-byte numbers) after the address `base`."""
    address = builder.add(base, builder.shl(index, _I64(2)))
    return builder.inttoptr(address, type_.as_pointer())


def element(builder, base, index, size, type_):
    """Pointer to element `index` (i64), of `size` bytes, after the address `base`."""
    return builder.inttoptr(builder.add(base, builder.mul(index, _I64(size))), type_.as_pointer())


def load(builder, pointer, align=4):
    value = builder.load(pointer)
    value.align = align
    return value


def store(builder, value, pointer, align=4):
    builder.store(value, pointer).align = align


def shuffle(builder, first, second, lanes):
    """Lanes of two vectors of one type, or of one."""
    second = ir.Constant(first.type, ir.Undefined) if second is None else second
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))


def field_bytes(builder, address, apart, size, lanes):
    """Bytes of `(component, token)` lanes; a component, 0 or 1, has `size` of them, `apart` bytes from the other's."""
    run = ir.VectorType(ir.IntType(8), size)
    rows = [
        load(builder, builder.inttoptr(builder.add(address, _I64(apart * c)), run.as_pointer()), 1)
        for c in range(1 + max(c for c, _ in lanes))
    ]
    return shuffle(builder, rows[0], rows[-1], [c * size + token % size for c, token in lanes])


def splat(builder, scalar):
    """A scalar in all of 16 lanes."""
    vector = ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined)
    return shuffle(builder, builder.insert_element(vector, scalar, _I32(0)), None, [0] * LANES)


def added_up(b, vectors):
    """Sums of the lanes of vectors of floats, of which there are 4 or 16, as one vector."""
    count = len(vectors)

    def halved(x):
        lanes = list(range(x.type.count))
        return b.fadd(*(shuffle(b, x, None, half) for half in (lanes[: len(lanes) // 2], lanes[len(lanes) // 2 :])))

    while vectors[0].type.count > 2 * count:
        vectors = [halved(x) for x in vectors]
    run = 1  # of lanes that are kept together: neighbours first, then whole quarters of a register
    while len(vectors) > 1:
        lanes, pairs = range(vectors[0].type.count), zip(vectors[::2], vectors[1::2], strict=True)
        if run < 4:  # [x0 + x1, x2 + x3, y0 + y1, y2 + y3], each four lanes for themselves
            even = [first + at for first in lanes[::4] for at in (0, 2, len(lanes), len(lanes) + 2)]
            odd = [i + 1 for i in even]
        else:
            even = [first + at for first in range(0, 2 * len(lanes), 8) for at in range(4)]
            odd = [i + 4 for i in even]
        vectors, run = [b.fadd(shuffle(b, x, y, even), shuffle(b, x, y, odd)) for x, y in pairs], 2 * run
    return halved(vectors[0]) if vectors[0].type.count > count else vectors[0]


def call(builder, name, result, *args, flags=()):
    """Call one of LLVM's own functions."""
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(result, [a.type for a in args]), name)
    return builder.call(function, args, fastmath=flags)


def _signature(count):
    return types.void(*([types.int64] * count))


def cases(builder, value, known):
    """Emit what follows once for each of the integers in `known`, and pick one at run time."""
    for n in known:
        with builder.if_then(builder.icmp_signed("==", value, _I64(n))):
            yield n


def row_cases(builder, rows, emit):
    """Emit `emit(n)` for every block height and pick one at run time: `rows` accumulators must be known to LLVM."""
    for n in cases(builder, rows, range(1, ROWS + 1)):
        emit(n)


def prefetch(b, address):
    """Ask for a cache line that will be read soon, from memory to the first-level cache."""
    pointer = b.inttoptr(address, ir.IntType(8).as_pointer())
    name, kind = "llvm.prefetch.p0", ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
    function = b.module.globals.get(name) or ir.Function(b.module, kind, name)
    b.call(function, [pointer, _I32(0), _I32(3), _I32(1)])


@intrinsic
def prefetch_bytes(typingctx, address, count):
    """`prefetch` for `count` bytes."""

    def codegen(context, b, signature, args):
        with cgutils.for_range_slice(b, _I64(0), args[1], _I64(64)) as (i, _):
            prefetch(b, b.add(args[0], i))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def _make_scores(vectors: int):
    @intrinsic
    def scores_block(typingctx, query, tile, scores, rows, dim, query_stride, tile_stride, score_stride):
        def codegen(context, b, signature, args):
            query, tile, scores, rows, dim, query_stride, tile_stride, score_stride = args

            def emit(n):
                acc = {}
                for r in range(n):
                    for v in range(vectors):
                        acc[r, v] = cgutils.alloca_once(b, VECTOR)
                        at = b.add(b.mul(score_stride, _I64(r)), _I64(LANES * v))
                        b.store(load(b, place(b, scores, at)), acc[r, v])
                with cgutils.for_range(b, dim) as loop:
                    base = b.mul(loop.index, tile_stride)
                    keys = [load(b, place(b, tile, b.add(base, _I64(LANES * v)))) for v in range(vectors)]
                    for r in range(n):
                        at = b.add(b.mul(query_stride, _I64(r)), loop.index)
                        q = splat(b, load(b, place(b, query, at, _F32)))
                        for v in range(vectors):
                            product = b.fmul(q, keys[v], flags=FAST)
                            b.store(b.fadd(b.load(acc[r, v]), product, flags=FAST), acc[r, v])
                for (r, v), a in acc.items():
                    at = b.add(b.mul(score_stride, _I64(r)), _I64(LANES * v))
                    store(b, b.load(a), place(b, scores, at))

            row_cases(b, rows, emit)
            return context.get_dummy_value()

        return _signature(8), codegen

    return scores_block


# Columns of a block whose sums stay in registers: 4 rows of 64 fit 32 registers of 16, of 16 they fit 16 of 8.
COLUMNS = 64 if "avx512f" in features() else 16
# `scores[r, :] += sum_d query[r, d] * tile[d, :]` for up to ROWS rows and 16 or COLUMNS columns.
# Arguments: query, tile, scores (addresses), rows, D, then the row strides of query, tile and scores.
scores_16, scores_wide = _make_scores(1), _make_scores(COLUMNS // LANES)


@intrinsic
def mix_64(typingctx, probs, tile, lanes, rows, dim, prob_stride, tile_stride):
    """`lanes[d, r, :16] += probs[r, tokens] * tile[d, tokens]` for 64 tokens; lanes are summed once, at the end."""

    def codegen(context, b, signature, args):
        probs, tile, lanes, rows, dim, prob_stride, tile_stride = args

        def emit(n):
            p = {}
            for r in range(n):
                for v in range(4):
                    at = b.add(b.mul(prob_stride, _I64(r)), _I64(LANES * v))
                    p[r, v] = load(b, place(b, probs, at))
            with cgutils.for_range(b, dim) as loop:
                base = b.mul(loop.index, tile_stride)
                values = [load(b, place(b, tile, b.add(base, _I64(LANES * v)))) for v in range(4)]
                for r in range(n):
                    at = b.add(b.mul(loop.index, _I64(ROWS * LANES)), _I64(r * LANES))
                    pointer = place(b, lanes, at)
                    total = load(b, pointer)
                    for v in range(4):
                        total = b.fadd(total, b.fmul(p[r, v], values[v], flags=FAST), flags=FAST)
                    store(b, total, pointer)

        row_cases(b, rows, emit)
        return context.get_dummy_value()

    return _signature(7), codegen


@njit(**OPTIONS)
def add_product(left, right, stride, out, rows, dim, columns):
    """`out[:rows, :columns] += left[:rows, :dim] @ right[:dim, :columns]`, fp32, columns a multiple of 16.

    `right` is an address, its rows `stride` numbers apart.
    """
    ls, os = left.shape[1], out.shape[1]
    for r in range(0, rows, ROWS):
        height = min(rows - r, ROWS)
        c = 0
        while c < columns:
            a, b, o = left.ctypes.data + 4 * r * ls, right + 4 * c, out.ctypes.data + 4 * (r * os + c)
            if columns - c >= COLUMNS:
                scores_wide(a, b, o, height, dim, ls, stride, os)
                c += COLUMNS
            else:
                scores_16(a, b, o, height, dim, ls, stride, os)
                c += 16
