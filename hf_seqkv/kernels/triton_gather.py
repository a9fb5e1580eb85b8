"""Codes of any widths to tiles of levels, in plain Triton: from a table of fp16 levels, tokens in their order.

All of it is for pages of 64 tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gather_codes(codes, d, token, width, at, UNIFORM: tl.constexpr):
    """Codes of components whose `width` bits of each token begin at byte `at`; all `[D, 64]`, see `codec.packing`.

    `UNIFORM` is the width where all components have the same, else 0.
    """
    result = tl.zeros_like(token + d)
    shift = tl.zeros_like(width)
    for i in tl.static_range(4):  # fields of 8, 4, 2 and 1 bits
        if UNIFORM == 0 or UNIFORM & (8 >> i):
            here = (width & (8 >> i)) != 0
            byte = tl.load(codes + at + tl.arange(0, 64 >> i)[None, :], mask=here, other=0).to(tl.int32)
            byte = tl.reshape(byte, (width.shape[0], 1, 64 >> i))
            part = (byte >> (tl.arange(0, 1 << i) * (8 >> i))[None, :, None]) & ((1 << (8 >> i)) - 1)
            result |= tl.reshape(part, (width.shape[0], 64)) << shift
            at += tl.where(here, 64 >> i, 0)
            shift += tl.where(here, 8 >> i, 0)
    return result


@triton.jit
def gather_tile(
    codes, h, levels, widths, offsets, D: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr, UNIFORM: tl.constexpr
):
    """Tile `[SIZE, 64]` fp16 of components from `FIRST` on of head `h`, those from `D` on 0.

    `codes` points to a side's, `levels [H, 9, 256]`, `widths` and `offsets [H, D]` int32; components of 0 bits are 0.
    """
    codes = codes.to(tl.pointer_type(tl.uint8))
    d = FIRST + tl.arange(0, SIZE)[:, None]
    token = tl.arange(0, 64)[None, :]
    if UNIFORM > 0:
        width = tl.where(d < D, UNIFORM, 0)
        at = (h * D + d) * (8 * UNIFORM)
    else:
        width = tl.load(widths + h * D + d, mask=d < D, other=0)
        at = tl.load(offsets + h * D + d, mask=d < D, other=0)
    code = gather_codes(codes, d, token, width, at, UNIFORM)
    return tl.load(levels + (h * 9 + width) * 256 + code)
