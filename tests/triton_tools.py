"""What the Triton interpreter lacks: inline PTX, run instruction by instruction, and right bf16 arithmetic.

`patched()` mends the interpreter for the kernels of this package. Only those instructions are known that they use; any
other stops with an error.
"""

from __future__ import annotations

import contextlib
import re
from unittest import mock

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

LANES = 32


def _prmt(a, b, selector):
    """`prmt.b32`: four bytes of `b:a` by the low three bits of each selector; the fourth repeats the byte's sign."""
    source = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros(np.broadcast(a, b, selector).shape, np.uint32)
    for i in range(4):
        pick = (selector >> np.uint32(4 * i)) & np.uint32(0xF)
        byte = (source >> ((pick & np.uint32(7)) * np.uint32(8)).astype(np.uint64)).astype(np.uint32) & np.uint32(0xFF)
        byte = np.where(pick & np.uint32(8), np.where(byte & np.uint32(0x80), 0xFF, 0), byte).astype(np.uint32)
        result |= byte << np.uint32(8 * i)
    return result


def _lop3(a, b, c, table):
    """`lop3.b32`: bit `4 a + 2 b + c` of the table, for every bit."""
    result = np.zeros(np.broadcast(a, b, c).shape, np.uint32)
    for i in range(8):
        if int(table.flat[0]) >> i & 1:
            terms = (x if i >> bit & 1 else ~x for x, bit in ((a, 2), (b, 1), (c, 0)))
            result |= np.bitwise_and.reduce(np.broadcast_arrays(*terms))
    return result


def _shift(op):
    """PTX shifts by 32 or more give zero, where numpy's are undefined."""
    return lambda a, n: np.where(n > 31, np.uint32(0), op(a, np.minimum(n, 31)))


def _rotate(low, high, n):
    """`shf.l.wrap.b32`: the high word of `high:low`, turned left by `n` modulo 32."""
    pair = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    return (pair << (n & np.uint32(31)).astype(np.uint64)) >> np.uint64(32)


_INSTRUCTIONS = {
    "mov": lambda a: a,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "shl": _shift(np.left_shift),
    "shr": _shift(np.right_shift),
    "mad": lambda a, b, c: a * b + c,
    "mul": lambda a, b: a * b,
    "lop3": _lop3,
    "shf": _rotate,
    "prmt": _prmt,
}


def run_ptx(asm: str, inputs: list[np.ndarray], outputs: int) -> list[np.ndarray]:
    """Results of a block of PTX over uint32 arrays: `$0` and so on are the outputs, then the inputs."""
    registers = {f"${outputs + i}": x for i, x in enumerate(inputs)}
    shape = np.broadcast_shapes(*(x.shape for x in inputs))
    registers["%laneid"] = np.arange(LANES, dtype=np.uint32)[7]  # any lane must do
    for line in re.split(r"[;{}]", asm):
        line = line.strip()
        if not line or line.startswith(".reg"):
            continue
        name, _, rest = line.partition(" ")
        target, *operands = (word.strip() for word in rest.split(","))
        values = [registers[x] if x in registers else np.asarray(int(x, 0), np.uint32) for x in operands]
        registers[target] = np.asarray(_INSTRUCTIONS[name.split(".")[0]](*values)).astype(np.uint32)
    return [np.broadcast_to(registers[f"${i}"], shape) for i in range(outputs)]


class _Result:
    """What the builder gives back: as many values as there are outputs."""

    def __init__(self, handles):
        self.handles = handles

    def get_result(self, i):
        return self.handles[i]


def _create_inline_asm(self, asm, constraints, values, types, pure, pack):
    assert pack == 1
    arrays = [value.data.view(np.uint32) for value in values]
    outputs = run_ptx(asm, arrays, constraints.count("="))
    return _Result([TensorHandle(x.astype(np.uint32).view(np.int32), tl.int32) for x in outputs])


def _wide(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def _narrow(x: np.ndarray) -> np.ndarray:
    """fp32 to bf16 bits, to nearest, ties to even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def _is_bf16(handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _mended_cast(original):
    def cast(self, source, target, *rest):
        if target.scalar == tl.bfloat16 and not _is_bf16(source):
            return TensorHandle(_narrow(source.data.astype(np.float32)), tl.bfloat16)
        if _is_bf16(source) and target.scalar != tl.bfloat16:
            source = TensorHandle(_wide(source.data), tl.float32)
            if target.scalar == tl.float32:
                return source
        return original(self, source, target, *rest)

    return cast


@contextlib.contextmanager
def patched():
    """The interpreter with inline PTX and bf16 casts as GPUs do them (it keeps bf16 as bits and casts those).

    Infinity times zero is no warning on a GPU, and none here.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(np.errstate(all="ignore"))
        for name, new in (
            ("create_inline_asm", _create_inline_asm),
            ("cast_impl", _mended_cast(InterpreterBuilder.cast_impl)),
            ("create_fp_to_fp", _mended_cast(InterpreterBuilder.create_fp_to_fp)),
        ):
            stack.enter_context(mock.patch.object(InterpreterBuilder, name, new))
        yield interpreter
