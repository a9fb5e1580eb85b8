"""The CPU kernels as compiled where a processor has AVX-512, whose instructions are others' here, of AVX2.

`NUMBA_CACHE_DIR=$(mktemp -d) python tests/emulated.py` checks some cases of `kernel_cases.py`; nothing of it is fast.
"""

import os
import sys
import types

from llvmlite import ir

import hf_seqkv.kernels

CPU = "hf_seqkv.kernels.cpu"
FEATURES = {"avx512bw", "avx512vnni"}  # what attention asks for
I8, I16, I32 = (ir.IntType(n) for n in (8, 16, 32))
BYTES, HALF, WORDS = ir.VectorType(I8, 64), ir.VectorType(I8, 32), ir.VectorType(I16, 32)


def every(type_, value):
    return ir.Constant(type_, [value] * type_.count)


def pairs(b, shuffle, total, first, second):
    """`vpdpwssds`, but that it does not saturate: products of words, neighbours and a total added."""
    wide = ir.VectorType(I32, 32)
    products = b.mul(*(b.sext(b.bitcast(x, WORDS), wide) for x in (first, second)))
    return b.add(total, b.add(*(shuffle(b, products, None, list(range(i, 32, 2))) for i in range(2))))


def looked_up(b, shuffle, call, tables, index):
    """`vpermw` and `vpermi2w`: words of one or two tables of 32, by the low bits of an index."""
    index = b.shl(b.and_(index, every(WORDS, 32 * len(tables) - 1)), every(WORDS, 1))  # of bytes
    index = b.bitcast(b.or_(b.or_(index, b.shl(index, every(WORDS, 8))), every(WORDS, 256)), BYTES)
    low, block = b.and_(index, every(BYTES, 15)), b.lshr(index, every(BYTES, 4))
    found = None
    for k in range(4 * len(tables)):
        table = shuffle(b, b.bitcast(tables[k // 4], BYTES), None, [16 * (k % 4) + i for i in range(16)] * 2)
        halves = (shuffle(b, low, None, list(range(first, first + 32))) for first in (0, 32))
        here = shuffle(b, *(call(b, "llvm.x86.avx2.pshuf.b", HALF, table, x) for x in halves), list(range(64)))
        found = here if found is None else b.select(b.icmp_unsigned("==", block, every(BYTES, k)), here, found)
    return b.bitcast(found, WORDS)


def emulate():
    """Import the kernels with these instructions instead of their own.

    numba's cache knows of the real processor alone: what is compiled here must not get into the one that all use.
    """
    assert "NUMBA_CACHE_DIR" in os.environ, "set NUMBA_CACHE_DIR to a folder of its own"
    package = types.ModuleType(CPU)  # for modules to be imported before all that needs them is
    package.__path__ = [f"{hf_seqkv.kernels.__path__[0]}/cpu"]
    sys.modules[CPU] = package
    from hf_seqkv.kernels.cpu import jit, simd

    del sys.modules[CPU]
    known, call = jit.features(), simd.call

    def emulated(b, name, result, *args, flags=()):
        if "vpdpwssds" in name:
            return pairs(b, simd.shuffle, *args)
        if "permvar.hi" in name or "vpermi2var.hi" in name:
            return looked_up(b, simd.shuffle, call, args[::2], args[1])
        assert "avx512" not in name, name
        return call(b, name, result, *args, flags=flags)

    jit.features, simd.call = lambda: known | FEATURES, emulated


if __name__ == "__main__":
    emulate()
    from test_kernel_builds import check_some

    check_some()
