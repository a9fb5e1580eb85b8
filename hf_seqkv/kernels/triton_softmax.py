"""Pieces of the Triton kernels between two products: limits, online softmax, the order of tokens, the constant part.

Scores are `[tokens, rows]`, in units of log2.
"""

from __future__ import annotations

import triton
import triton.language as tl

FUSED = {"enable_fp_fusion": True}  # of all kernels: the default differs from Triton to Triton
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4e38)  # of a maximum, so that differences of maxima are numbers
# What changes from step to step, or with the batch or a mask, is not worth a compilation.
VARY = [
    *("batch", "parts", "splits", "sinks", "sides", "room", "sink_room", "recent_room", "side_room"),
    *("window", "ahead", "mb", "mh", "ms", "starts_room", "starts_b", "count"),
]


@triton.jit
def softmax(y, top):
    """New maximum, factor for what was summed before, and exponentials of scores `y [T, R]`."""
    new = tl.maximum(top, tl.max(y, 0))
    return new, tl.exp2(top - new), tl.exp2(y - new[None, :])


@triton.jit
def limit(y, slot, here, row, mask, seen, limits, SOFTCAP: tl.constexpr, MASK: tl.constexpr):
    """Softcap and mask of scores `y [T, R]` of tokens at `slot [T]`, minus infinity where not seen.

    `row` and `here [R]`: offset of the row's mask, and its query's slot; `seen [T]`: whether a token exists.
    """
    offset, window, ahead, softcap = limits
    if SOFTCAP:
        x = tl.exp2(y * (2 / softcap))  # of e ** (2 s / cap); y is s * log2(e)
        y = softcap * LOG2E * (1 - 2 / (x + 1))
    keep = (seen & (slot >= offset))[:, None] & (slot[:, None] > here[None, :] - window)
    if MASK == 0:
        keep = keep & (slot[:, None] <= here[None, :] + ahead)
    else:
        y = masked(y, mask + row, (slot - offset)[:, None], keep, MASK)
    return tl.where(keep, y, -float("inf"))


@triton.jit
def masked(y, line, column, keep, MASK: tl.constexpr):
    """Scores `y [T, R]` under a mask, of bool (`MASK` is 1) or added.

    It is read where `keep`: at `column` of each row's `line [R]`.
    """
    bias = tl.load(line[None, :] + column, mask=keep, other=0)
    if MASK == 1:
        keep = bias != 0
    else:
        bias = bias.to(tl.float32)
        keep = bias > -float("inf")
        y += tl.maximum(bias, LOWEST / LOG2E) * LOG2E
    return tl.where(keep, y, -float("inf"))


@triton.jit
def mask_row(b, h, r, groups, steps, length, sb, sh, st):
    """Offset of each row `r`'s line of the mask, and the slot of its query."""
    return b.to(tl.int64) * sb + (h * groups + r // steps).to(tl.int64) * sh + (r % steps).to(tl.int64) * st, (
        length - steps + r % steps
    )


@triton.jit
def exact_dot(a, b, y):
    """`a @ b + y` of `a` fp16 and `b` fp32 as two numbers of fp16: errors of 1e-6, where one leaves 5e-4."""
    high = b.to(tl.float16)
    return tl.dot(a, (b - high.to(tl.float32)).to(tl.float16), tl.dot(a, high, y))
