"""Pages on a GPU: encode dense keys and values, and codes back to levels, in one launch each.

The arithmetic is `VectorCodec.encode`'s, in fp32; codes may differ where a value lies on the edge of two levels to the
last digits, as sums are made in another order.
"""

from __future__ import annotations

import weakref

import torch
import triton
import triton.language as tl

from ..codec.center import Center
from ..codec.page import QuantizedPageCodec
from .triton_gather import gather_codes
from .triton_launch import on_device_of
from .triton_scales import load_scales, nearest_byte, number_of, scale_of
from .triton_softmax import FUSED, VARY

ENCODE, UNPACK = {"num_warps": 8, **FUSED}, {"num_warps": 4, **FUSED}


@triton.jit
def _power_of_two(n):
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _scale_by(x, n):
    """`x * 2 ** n`, in two steps: a power of two below 2 ** -126 is no normal number."""
    return x * _power_of_two(n >> 1) * _power_of_two(n - (n >> 1))


@triton.jit
def _constant_keys(mean, start, relative, token, d, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Constant part of keys at components `d [1, n]` of tokens `[64, 1]`: `Center.keys`."""
    if INTERLEAVED:
        pair, first, partner = d // 2, d % 2 == 0, d ^ 1
    else:
        pair, first = tl.where(d < HALF, d, d - HALF), d < HALF
        partner = tl.where(first, d + HALF, d - HALF)
    turned = d < 2 * HALF
    own = tl.load(mean + d, mask=d < D, other=0)
    other = tl.load(mean + partner, mask=turned, other=0)
    c, s = tl.load(start + pair, mask=turned, other=0), tl.load(start + HALF + pair, mask=turned, other=0)
    at = relative + token * (2 * HALF) + pair
    rc, rs = tl.load(at, mask=turned, other=0), tl.load(at + HALF, mask=turned, other=0)
    cos, sin = c * rc - s * rs, s * rc + c * rs
    return tl.where(turned, own * cos + tl.where(first, -other, other) * sin, own)


@triton.jit
def _quarters(y, D: tl.constexpr):
    """Columns of `y [64, D]` in four parts."""
    low, high = tl.split(tl.permute(tl.reshape(y, (64, 2, D // 2)), (0, 2, 1)))
    a, b = tl.split(tl.permute(tl.reshape(low, (64, 2, D // 4)), (0, 2, 1)))
    c, d = tl.split(tl.permute(tl.reshape(high, (64, 2, D // 4)), (0, 2, 1)))
    return a, b, c, d


@triton.jit
def _quantize(parts, gain, weight, edges, levels, widths, D: tl.constexpr, PART: tl.constexpr, MOST: tl.constexpr):
    """Codes of `y` under a gain `[64]`, the least-squares gain and the error it leaves; no width is over `MOST`.

    `y` and its codes are `_quarters`, taken in turn, and what columns need is loaded where it is used: registers would
    not suffice for more.
    """
    codes = ()
    dot = tl.zeros_like(parts[0])
    power, energy = dot, dot
    for part in tl.static_range(4):
        y, e = parts[part], part * PART + tl.arange(0, PART)[None, :]
        table = tl.load(widths + e, mask=e < D, other=0) * 256
        x = y / tl.maximum(gain, 1e-30)[:, None]
        code = tl.zeros_like(x).to(tl.int32)
        for i in range(MOST):
            step = 1 << (MOST - 1 - i)
            code += tl.where(x > tl.load(edges + (table + code + step - 1)), step, 0)
        chosen = tl.load(levels + (table + code))
        weights = tl.load(weight + e, mask=e < D, other=0)
        dot += y * chosen * weights
        power += chosen * chosen * weights
        energy += y * y * weights
        codes += (code,)
    product, square = tl.sum(dot, 1), tl.sum(power, 1)
    fitted = tl.where(square > 0, product / tl.maximum(square, 1e-30), gain)
    return codes, fitted, tl.sum(energy, 1) - product * fitted


@triton.jit
def _encode(
    x, xt, out, codes_at, scales, mean, matrix, weight, edges, levels, widths, offsets, key_mean, start, relative, h,
    D: tl.constexpr, DP: tl.constexpr, UNIFORM: tl.constexpr, MOST: tl.constexpr, FIT: tl.constexpr,
    CENTER: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """One page of one head: `x` points to it, tokens `xt` apart; codes and scales go to these bytes of page `out`."""
    token = tl.arange(0, 64)[:, None]
    e = tl.arange(0, DP)[None, :]
    y = tl.zeros([64, DP], tl.float32)
    for first in range(0, D, 16):
        d = first + tl.arange(0, 16)[None, :]
        part = tl.load(x + token * xt + d, mask=d < D, other=0).to(tl.float32)
        if CENTER:
            part -= _constant_keys(key_mean, start, relative, token, d, D, HALF, INTERLEAVED)
        part = tl.where(d < D, part - tl.load(mean + h * D + d, mask=d < D, other=0), 0)
        i = first + tl.arange(0, 16)[:, None]
        rows = tl.load(matrix + (h * D + i) * D + e, mask=(i < D) & (e < D), other=0)
        y = tl.dot(part, rows, y, input_precision="ieee")
    size = tl.max(tl.abs(y), 1)
    exponent = tl.where(size > 0, (size.to(tl.int32, bitcast=True) >> 23) - 126, 0)
    y = _scale_by(y, -exponent[:, None])
    weight += h * D
    widths += h * D
    weights = tl.load(weight + e, mask=e < D, other=0)
    gain = tl.sqrt(tl.sum(y * y * weights, 1) / tl.sum(weights, 1))
    parts = _quarters(y, DP)
    edges += h * 9 * 256
    levels += h * 9 * 256
    if FIT and UNIFORM > 0:
        _, fitted, _ = _quantize(parts, gain, weight, edges, levels, widths, D, DP // 4, MOST)
        scale = _scale_by(fitted, exponent)
    elif FIT:
        error, best, scale = gain + float("inf"), gain, gain
        for i in tl.range(0, 5, num_stages=1, disable_licm=True):
            factor = tl.where(i == 0, 1.0, tl.where(i == 1, 1.4, tl.where(i == 2, 2.0, tl.where(i == 3, 2.8, 4.0))))
            tried = gain * factor
            _, fitted, rest = _quantize(parts, tried, weight, edges, levels, widths, D, DP // 4, MOST)
            better = rest < error
            error, best = tl.where(better, rest, error), tl.where(better, tried, best)
            scale = tl.where(better, fitted, scale)
        gain = best
        scale = _scale_by(scale, exponent)
    else:
        scale = _scale_by(gain, exponent)
    if NARROW:
        byte = nearest_byte(scale)
        gain = _scale_by(tl.where(byte == 0, 0.0, number_of(byte)), -exponent)
        tl.store(out + scales + h * 64 + tl.arange(0, 64), byte.to(tl.uint8))
    else:
        at = (out + scales).to(tl.pointer_type(tl.bfloat16)) + h * 64 + tl.arange(0, 64)
        tl.store(at, scale.to(tl.bfloat16))
    codes, _, _ = _quantize(parts, gain, weight, edges, levels, widths, D, DP // 4, MOST)
    for part in tl.static_range(4):
        e = part * (DP // 4) + tl.arange(0, DP // 4)[None, :]
        width = tl.load(widths + e, mask=e < D, other=0)
        at = tl.load(offsets + h * D + e, mask=e < D, other=0)
        shift = tl.zeros_like(width)
        for i in tl.static_range(4):  # fields of 8, 4, 2 and 1 bits, see `codec.packing`
            if (8 >> i) <= MOST and (UNIFORM == 0 or UNIFORM & (8 >> i)):
                here = ((width & (8 >> i)) != 0) & (e < D)
                field = tl.reshape((codes[part] >> shift) & ((1 << (8 >> i)) - 1), (1 << i, 64 >> i, DP // 4))
                packed = tl.sum(field << (tl.arange(0, 1 << i) * (8 >> i))[:, None, None], 0)
                tl.store(out + codes_at + at + tl.arange(0, 64 >> i)[:, None], packed.to(tl.uint8), mask=here)
                at += tl.where(here, 64 >> i, 0)
                shift += tl.where(here, 8 >> i, 0)


@triton.jit(do_not_specialize=VARY)
def encode_kernel(
    k, v, pages, key_center, starts, relative,
    key_mean, key_matrix, key_weight, key_edges, key_levels, key_widths, key_offsets,
    value_mean, value_matrix, value_weight, value_edges, value_levels, value_widths, value_offsets,
    kb, kn, kh, kt, vb, vn, vh, vt, starts_b, starts_n, page_bytes, key_codes, key_scales, value_codes, value_scales,
    count,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, KU: tl.constexpr,
    VU: tl.constexpr, KEY_MOST: tl.constexpr, VALUE_MOST: tl.constexpr, KEY_FIT: tl.constexpr, VALUE_FIT: tl.constexpr,
    CENTER: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """A page (of all rows'), a head, keys or values."""
    page, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, n = page // count, page % count
    out = pages + page * page_bytes
    if tl.program_id(2) == 0:
        _encode(
            k + b * kb + n * kn + h * kh, kt, out, key_codes, key_scales, key_mean,
            key_matrix, key_weight, key_edges, key_levels, key_widths, key_offsets,
            key_center + (b * H + h) * D, starts + b * starts_b + n * starts_n, relative, h, D, DP, KU, KEY_MOST,
            KEY_FIT, CENTER, HALF, INTERLEAVED, NARROW,
        )  # fmt: skip
    else:
        _encode(
            v + b * vb + n * vn + h * vh, vt, out, value_codes, value_scales, value_mean,
            value_matrix, value_weight, value_edges, value_levels, value_widths, value_offsets,
            key_center, starts, relative, h, DV, DVP, VU, VALUE_MOST, VALUE_FIT, False, HALF, INTERLEAVED,
            NARROW,
        )  # fmt: skip


@triton.jit
def unpack_kernel(
    pages, levels, widths, offsets, out, page_bytes, codes_at, scales_at,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, UNIFORM: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """A page and a head of one side: level times scale, `out [pages, H, 64, D]`."""
    page, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, DP)[:, None]
    token = tl.arange(0, 64)
    width = tl.load(widths + h * D + d, mask=d < D, other=0)
    at = tl.load(offsets + h * D + d, mask=d < D, other=0)
    data = pages + page * page_bytes
    code = gather_codes(data + codes_at, d, token[None, :], width, at, UNIFORM)
    y = tl.load(levels + (h * 9 + width) * 256 + code)
    scale = scale_of(load_scales(data + scales_at, h * 64 + token, NARROW), NARROW)
    scale = tl.where(scale < float("inf"), scale, 0)
    tl.store(out + ((page * H + h) * 64 + token[None, :]) * D + d, y * scale[None, :], mask=d < D)


class _Side:
    """Tables of one side of a codec: level tables `[H, 9, 256]` and their edges, infinite where there is none."""

    def __init__(self, side):
        flat = set(side.widths.flatten().tolist())
        self.uniform, self.most = next(iter(flat)) if len(flat) == 1 else 0, max(flat)
        self.fit = side.scale == "fit"
        self.levels = side.levels.expand(side.heads, -1, -1).float().clone()
        self.levels[:, 0] = 0
        self.edges = torch.full_like(self.levels, torch.inf)
        for width in flat:
            table = side.levels[:, width, : 1 << width]
            self.edges[:, width, : (1 << width) - 1] = (table[:, 1:] + table[:, :-1]) / 2
        self.widths, self.offsets = (x.to(self.levels.device, torch.int32) for x in (side.widths, side.offsets))
        tables = side.mean, side.encode_matrix, side.weights, self.edges, self.levels, self.widths, self.offsets
        self.arguments = tuple(table.contiguous() for table in tables)


_TABLES: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _tables(codec) -> tuple[_Side, _Side]:
    if codec not in _TABLES:
        _TABLES[codec] = _Side(codec.key), _Side(codec.value)
    return _TABLES[codec]


def _power(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


@on_device_of(1)
def encode_pages(codec: QuantizedPageCodec, k: torch.Tensor, v: torch.Tensor, center: Center | None) -> torch.Tensor:
    """As `codec.encode(k - center.keys, v)`, for codecs that `triton_attend.supports` has nothing against.

    Args:
        k, v: `[B, N, H, P, Dk]` and `[B, N, H, P, Dv]`, any float dtype and strides.
        center: Constant part to take out of the keys, with the starts of these pages; None for none.
    Returns:
        `[B, N, page_bytes]` uint8.
    """
    key, value = _tables(codec)
    batch, count = k.shape[:2]
    padded = codec.page_bytes != sum(size for _, size in codec.sections.values())
    make = torch.zeros if padded else torch.empty
    pages = make(batch, count, codec.page_bytes, dtype=torch.uint8, device=k.device)
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k.detach(), v.detach()))
    mean = starts = relative = pages
    if center is not None:
        mean, starts, relative = (x.contiguous() for x in (center.mean, center.starts, center.relative))
    if batch * count == 0:
        return pages
    encode_kernel[batch * count, codec.heads, 2](
        k, v, pages, mean, starts, relative, *key.arguments, *value.arguments, *k.stride()[:4], *v.stride()[:4],
        *(starts.stride()[:2] if center is not None else (0, 0)), codec.page_bytes,
        *(at for at, _ in codec.sections.values()), count,
        H=codec.heads, D=codec.key_dim, DP=_power(codec.key_dim), DV=codec.value_dim, DVP=_power(codec.value_dim),
        KU=key.uniform, VU=value.uniform, KEY_MOST=key.most, VALUE_MOST=value.most, KEY_FIT=key.fit,
        VALUE_FIT=value.fit, CENTER=center is not None, HALF=0 if center is None else relative.shape[-1] // 2,
        INTERLEAVED=center is not None and center.interleaved,
        NARROW=codec.key.scale_bits == 8, **ENCODE,
    )  # fmt: skip
    return pages


@on_device_of(1)
def unpack_pages(codec: QuantizedPageCodec, pages: torch.Tensor, side: int) -> torch.Tensor:
    """As `reference.unpack_pages`: levels times scales, `[..., H, P, D]` fp32."""
    flat = pages.contiguous().view(-1, codec.page_bytes)
    vectors, table = (codec.key, codec.value)[side], _tables(codec)[side]
    codes, scales = [at for at, _ in codec.sections.values()][2 * side :][:2]
    out = torch.empty(*pages.shape[:-1], codec.heads, codec.page_size, vectors.dim, device=pages.device)
    if len(flat):
        unpack_kernel[len(flat), codec.heads](
            flat, table.levels, table.widths, table.offsets, out, codec.page_bytes, codes, scales,
            H=codec.heads, D=vectors.dim, DP=_power(vectors.dim), UNIFORM=table.uniform,
            NARROW=vectors.scale_bits == 8, **UNPACK,
        )  # fmt: skip
    return out
