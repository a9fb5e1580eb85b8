"""Fixed-width codes to bytes and back, along the last dimension (the tokens of a page).

A width is split into fields of 8, 4, 2 and 1 bits, largest first, lowest code bits first: 3 bits are a 2-bit field of
the low bits, then a 1-bit field. A field of `w` bits over `n` codes takes `n * w / 8` bytes, and byte `j` holds codes
`j`, `j + n*w/8`, `j + 2*n*w/8`, ... from its low bits up, so that unpacking a run of bytes gives runs of tokens.
"""

from __future__ import annotations

import torch

WIDTHS = tuple(range(9))


def fields(bits: int) -> list[tuple[int, int]]:
    """`(width, shift)` of each field of a code: `fields(3) == [(2, 0), (1, 2)]`."""
    result, shift = [], 0
    for width in (8, 4, 2, 1):
        if bits & width:
            result.append((width, shift))
            shift += width
    return result


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack `codes [..., n]` uint8 below `2**bits` into `[..., n * bits / 8]` uint8; `n` is a multiple of 8."""
    n = codes.shape[-1]
    assert n % 8 == 0, n
    assert bits in WIDTHS, bits
    parts = [codes.new_zeros(*codes.shape[:-1], 0)]
    for width, shift in fields(bits):
        field = (codes >> shift) & ((1 << width) - 1)
        field = field.unflatten(-1, (8 // width, n * width // 8))
        packed = field[..., 0, :].clone()
        for i in range(1, 8 // width):
            packed |= field[..., i, :] << (i * width)
        parts.append(packed)
    return torch.cat(parts, -1)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of `pack`: `[..., n * bits / 8]` uint8 to codes `[..., n]` uint8; `bits` is at least 1."""
    n = packed.shape[-1] * 8 // bits
    codes, at = None, 0
    for width, shift in fields(bits):
        size = n * width // 8
        part = packed[..., at : at + size]
        mask = (1 << width) - 1
        field = torch.cat([(part >> (i * width)) & mask for i in range(8 // width)], -1) << shift
        codes = field if codes is None else codes | field
        at += size
    return codes
