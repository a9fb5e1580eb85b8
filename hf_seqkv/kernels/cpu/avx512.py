"""Levels of 32 codes at a time with AVX-512 BW: `vpermw` looks them up. Functions and names are those of `avx2.py`."""

from __future__ import annotations

from llvmlite import ir

from .jit import features
from .simd import SUMS, WORDS, call, element, field_bytes, load, shuffle

NAME = "AVX-512"
VNNI = "avx512vnni"
ORDER = list(range(64))
GROUPS = [range(4)]
BLOCK = 4
_I8, _I16, _I64 = (ir.IntType(n) for n in (8, 16, 64))


def _words(value):
    return ir.Constant(WORDS, value if isinstance(value, list) else [value] * 32)


def _indices(b, address, width, lanes):
    """Codes of lanes. Bits above `width` are left as they come: the look-up ignores them."""
    index, at, shift = None, 0, 0
    for field in (4, 2, 1):
        if not width & field:
            continue
        size = 8 * field
        data = field_bytes(b, b.add(address, _I64(at)), 8 * width, size, lanes)
        words = b.zext(data, WORDS)
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


def table(b, address, width):
    """A codebook of `2**width` levels as one or two vectors, repeated to fill them."""
    run = ir.VectorType(_I16, min(32, 1 << width))
    parts = [load(b, element(b, address, _I64(32 * i), 2, run), 2) for i in range(max(1, 1 << width >> 5))]
    return [shuffle(b, part, None, [i % run.count for i in range(32)]) for part in parts]


def levels(b, table, address, width, lanes):
    """Levels of lanes, from the codes at an address."""
    index = _indices(b, address, width, lanes)
    if len(table) == 1:
        return call(b, "llvm.x86.avx512.permvar.hi.512", WORDS, table[0], index)
    return call(b, "llvm.x86.avx512.vpermi2var.hi.512", WORDS, table[0], index, table[1])


def add_products(b, total, first, second):
    """A sum, and products of words, neighbours added."""
    if VNNI in features():  # the one that saturates, though no sum does: LLVM parts the other in two for Intel's
        return call(b, "llvm.x86.avx512.vpdpwssds.512", SUMS, total, *(b.bitcast(x, SUMS) for x in (first, second)))
    return b.add(total, call(b, "llvm.x86.avx512.pmaddw.d.512", SUMS, first, second))
