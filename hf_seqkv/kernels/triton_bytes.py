"""Numbers of two bytes for matrix units, which multiply bytes: high and low ones are columns side by side.

What is multiplied with them are levels as bytes. Sums of products are whole numbers, exact in int32; a lane has the
high and the low sum of a number both, so that they are joined where they are.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Whole numbers below 1 << 22 from it on are the low bits of fp32: sums of products of bytes that begin there need no
# conversion.
WHOLE = tl.constexpr(12582912)
BEGIN = tl.constexpr(0x4B400000)  # its bits
MOST = tl.constexpr(32512)  # of a number of two bytes, of which the high one is at most 127


@triton.jit
def split_bytes(x, N: tl.constexpr, R: tl.constexpr):
    """Numbers of up to `MOST` `[N, R]`, rounded: as bytes `256 * high + low` int8 `[N, 2 * R]`, and as they are."""
    big = x + (WHOLE + 128)
    bits = big.to(tl.int32, bitcast=True)
    both = tl.join((bits >> 8).to(tl.int8), (bits ^ 128).to(tl.int8))
    return tl.reshape(both, (N, 2 * R)), big - (WHOLE + 128)


@triton.jit
def load_bytes(data, place, there, R: tl.constexpr):
    """Lines at `place [N]` of the bytes that `split_bytes` gave, `[N, 2 * R]`; zeros where not `there`."""
    both = data.to(tl.pointer_type(tl.int8)) + place[:, None] * (2 * R) + tl.arange(0, 2 * R)[None, :]
    return tl.load(both, mask=there[:, None], other=0)


@triton.jit
def join_bytes(sums, N: tl.constexpr, R: tl.constexpr):
    """Sums `[N, 2 * R]` int32, from `BEGIN` on, of products with what `split_bytes` gave: fp32 `[N, R]`."""
    high, low = tl.split(tl.reshape(sums.to(tl.float32, bitcast=True), (N, R, 2)))
    return (high * 256 - 257 * WHOLE) + low
