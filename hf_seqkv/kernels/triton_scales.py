"""Scales of 8 bits in the Triton kernels; see `codec.scales`, which is the specification."""

from __future__ import annotations

import triton
import triton.language as tl

from ..codec import scales

_BIAS = tl.constexpr(scales.BIAS)
_HELD = tl.constexpr(scales.HELD)


@triton.jit
def number_of(byte):
    """Bytes 1 to 254, int32, as fp32."""
    return ((byte + _BIAS) << 20).to(tl.float32, bitcast=True)


@triton.jit
def load_scales(data, place, NARROW: tl.constexpr):
    """Scales at `place` from `data` on as they are stored: bf16, or bytes where they are `NARROW`."""
    return tl.load(data.to(tl.pointer_type(tl.uint8 if NARROW else tl.bfloat16)) + place)


@triton.jit
def scale_of(stored, NARROW: tl.constexpr):
    """Stored scales as fp32."""
    if not NARROW:
        return stored.to(tl.float32)
    byte = stored.to(tl.int32)
    return tl.where(byte == _HELD, float("inf"), tl.where(byte == 0, 0.0, number_of(byte)))


@triton.jit
def nearest_byte(scale):
    """Bytes, int32, of the representable scales nearest to `scale`; 0 where it is not above 0."""
    low = tl.minimum(tl.maximum((scale.to(tl.int32, bitcast=True) >> 20) - _BIAS, 1), _HELD - 1)
    up = (scale * scale >= number_of(low) * number_of(low + 1)) & (low < _HELD - 1)
    return tl.where(scale <= 0, 0, tl.where(up, low + 1, low))
