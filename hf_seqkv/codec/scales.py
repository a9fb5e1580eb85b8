"""Scales of 8 bits: floats of 5 exponent and 3 mantissa bits, for vectors so short that 16 would weigh.

A scale's byte `s` from 1 to 254 is the fp32 number with bits `(s + BIAS) << 20`: from `2**-20` to `2**11.8`, at most an
eighth apart. 0 is 0, and 255 infinity: a token that is held elsewhere. Each is also a bf16 number, as which codecs
handle it. Larger and smaller ones saturate: a vector far below `2**-20` is rebuilt as one about that large.

Compiled kernels hold `BIAS` and `HELD` as constants; as part of a stored format they never change.
"""

from __future__ import annotations

import torch

BIAS = (127 - 20) << 3
HELD = 255  # the byte of infinity


def to_bytes(scales: torch.Tensor) -> torch.Tensor:
    """Representable scales, bf16, to their bytes, uint8."""
    found = (scales.view(torch.int16) >> 4) - BIAS
    return found.masked_fill(scales == 0, 0).masked_fill(torch.isinf(scales), HELD).to(torch.uint8)


def from_bytes(data: torch.Tensor) -> torch.Tensor:
    """Inverse of `to_bytes`."""
    found = ((data.to(torch.int16) + BIAS) << 4).view(torch.bfloat16)
    return found.masked_fill(data == 0, 0).masked_fill(data == HELD, torch.inf)


def nearest(x: torch.Tensor) -> torch.Tensor:
    """The nearest representable scale, by ratio, of numbers fp32; 0 for those that are not above 0."""
    low = ((x.view(torch.int32) >> 20) - BIAS).clamp(1, HELD - 1)
    below, above = (((low + step + BIAS) << 20).view(torch.float32) for step in (0, 1))
    up = (x * x >= below * above) & (low < HELD - 1)
    return torch.where(up, above, below).masked_fill(x <= 0, 0)
