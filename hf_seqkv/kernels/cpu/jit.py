"""What the compiled kernels share: compiler options, memory by address, the bits of a code."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import config, njit, types
from numba.core import cgutils, codegen
from numba.extending import intrinsic

# No "nnan" or "ninf": masked scores are minus infinity.
OPTIONS = {"fastmath": {"reassoc", "contract", "nsz", "arcp"}, "error_model": "numpy", "nogil": True}
# Of a large function with one caller: else LLVM compiles it, and all it calls, again in each function above.
INSIDE = {**OPTIONS, "inline": "always"}


def features() -> set[str]:
    """Processor features that numba compiles for, such as `avx512bw`."""
    names = codegen.get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES
    return {name[1:] for name in names.split(",") if name.startswith("+")}


@intrinsic
def pointer(typingctx, address):
    """An address as a pointer, for `carray`."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@intrinsic
def take_number(typingctx, address):
    """The int64 at an address, which grows by one: every thread gets another."""

    def generate(context, builder, signature, args):
        place = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, ir.IntType(64)(1), "seq_cst")

    return types.int64(types.int64), generate


@intrinsic
def wait_for(typingctx, address):
    """Return as soon as the int64 at an address is not 0, and all that was written before it became so is seen."""

    def generate(context, builder, signature, args):
        place = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        again = builder.append_basic_block("wait")
        after = builder.append_basic_block("ready")
        builder.branch(again)
        builder.position_at_end(again)
        found = builder.load_atomic(place, "acquire", 8)
        builder.cbranch(builder.icmp_signed("==", found, ir.IntType(64)(0)), again, after)
        builder.position_at_end(after)
        return context.get_dummy_value()

    return types.void(types.int64), generate


@njit(**OPTIONS)
def copy(row, to):
    """`to[:] = row`; where an array is assigned to a slice, numba compiles an error's text, too, for seconds."""
    for d in range(to.shape[0]):
        to[d] = row[d]


@njit(**OPTIONS)
def planar_code(codes, width, token, size):
    """Code of a token of one component from its bytes; the layout is `codec.packing`'s."""
    code, shift, at, field = 0, 0, 0, 8
    while field > 0:
        if width & field:
            count = size * field // 8
            byte = np.int64(codes[at + token % count])
            code |= ((byte >> (token // count * field)) & ((1 << field) - 1)) << shift
            at += count
            shift += field
        field //= 2
    return code
