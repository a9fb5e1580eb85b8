"""The page: `P` consecutive tokens of one layer and one row, all KV heads, as one run of bytes.

In memory a page is its payload alone; `to_bytes` adds the header that makes it safe to store.

Payload of a quantised page (every section padded with zeros to 16 bytes; numbers are little-endian):

| section      | bytes                        | content                                               |
|--------------|------------------------------|-------------------------------------------------------|
| key codes    | sum of widths x P / 8        | head by head, component by component, `packing.pack`  |
| key scales   | heads x P x 2, or heads x P  | `[H, P]` bf16 or bytes (`scales.py`); infinite for a  |
|              |                              | token held elsewhere                                  |
| value codes  | sum of widths x P / 8        | as key codes                                          |
| value scales | as key scales                | as key scales                                         |

Payload of a dense page: keys `[H, P, Dk]`, then values `[H, P, Dv]`, in the cache's dtype.

Header, 40 bytes: magic `SKVP`, version u16, kind u16 (0 dense, 1 quantised), page size u16, heads u16, key dim u16,
value dim u16, payload length u32, codec fingerprint 16 bytes, CRC-32 of header (this field zero) and payload u32.
"""

from __future__ import annotations

import hashlib
import struct
import sys
import zlib

import torch

from ..errors import FormatError
from . import scales
from .vector import VectorCodec

MAGIC, VERSION = b"SKVP", 1
_HEADER = struct.Struct("<4sHHHHHHI16sI")
_ALIGN = 16

# Scales are stored little-endian and viewed in place.
assert sys.byteorder == "little", "pages are little-endian and viewed in place; this processor is big-endian"


def _padded(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


class PageCodec:
    """Shape and byte layout that dense and quantised pages share."""

    kind: int

    def __init__(self, page_size: int, heads: int, key_dim: int, value_dim: int, sections: dict[str, int]):
        self.page_size, self.heads, self.key_dim, self.value_dim = page_size, heads, key_dim, value_dim
        self.sections, at = {}, 0
        for name, size in sections.items():
            self.sections[name] = (at, size)
            at += _padded(size)
        self.page_bytes = at

    def section(self, pages: torch.Tensor, name: str) -> torch.Tensor:
        """Bytes of one section of `pages [..., page_bytes]`, a view."""
        at, size = self.sections[name]
        return pages[..., at : at + size]

    def absent(self, pages: torch.Tensor) -> torch.Tensor:
        """Tokens that `pages [..., page_bytes]` do not answer for, `[..., H, P]` bool."""
        return torch.zeros(*pages.shape[:-1], self.heads, self.page_size, dtype=torch.bool, device=pages.device)

    def coordinates(self, pages: torch.Tensor, side: int) -> torch.Tensor:
        """What the codes of keys (`side=0`) or values say, `[..., H, P, D]`."""
        raise NotImplementedError

    def restore(self, x: torch.Tensor, side: int) -> torch.Tensor:
        """Keys (`side=0`) or values from their `coordinates`, which they are already unless a codec says otherwise."""
        return x

    def decode(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Reconstructions `[..., H, P, Dk]` and `[..., H, P, Dv]`; fp32, or the dtype of dense pages."""
        return tuple(self.restore(self.coordinates(pages, side), side) for side in range(2))

    def _assemble(self, **parts: torch.Tensor) -> torch.Tensor:
        first = next(iter(parts.values()))
        pages = torch.zeros(*first.shape[:-1], self.page_bytes, dtype=torch.uint8, device=first.device)
        for name, part in parts.items():
            self.section(pages, name).copy_(part)
        return pages

    def to_bytes(self, page: torch.Tensor) -> bytes:
        """One page's payload `[page_bytes]` with its header, ready to store."""
        payload = page.cpu().contiguous().numpy().tobytes()
        return self._header(payload, zlib.crc32(payload, zlib.crc32(self._header(payload, 0)))) + payload

    def _header(self, payload: bytes, crc: int) -> bytes:
        shape = (self.page_size, self.heads, self.key_dim, self.value_dim)
        return _HEADER.pack(MAGIC, VERSION, self.kind, *shape, len(payload), self.fingerprint, crc)

    def from_bytes(self, data: bytes) -> torch.Tensor:
        """Payload `[page_bytes]` uint8 of a stored page.

        Raises:
            FormatError: Truncated, damaged, of another version, or made by another codec.
        """
        if len(data) < _HEADER.size:
            raise FormatError(f"page of {len(data)} bytes is shorter than its {_HEADER.size}-byte header: truncated")
        magic, version, kind, *shape, length, fingerprint, crc = _HEADER.unpack_from(data)
        if magic != MAGIC:
            raise FormatError(f"not a page: magic is {magic!r}, must be {MAGIC!r}")
        if version != VERSION:
            raise FormatError(f"page format version {version}; this hf_seqkv reads version {VERSION}: upgrade it")
        if len(data) != _HEADER.size + length:
            raise FormatError(f"page has {len(data)} bytes, its header promises {_HEADER.size + length}: truncated")
        payload = data[_HEADER.size :]
        blank = _HEADER.pack(magic, version, kind, *shape, length, fingerprint, 0)
        if zlib.crc32(payload, zlib.crc32(blank)) != crc:
            raise FormatError("page checksum does not match: the bytes are damaged; drop the page and prefill again")
        expected = (self.kind, self.page_size, self.heads, self.key_dim, self.value_dim)
        if (kind, *shape) != expected or length != self.page_bytes or fingerprint != self.fingerprint:
            raise FormatError(
                f"page was written by another codec (kind, page size, heads, dims {(kind, *shape)}, fingerprint "
                f"{fingerprint.hex()}); this cache uses {expected}, {self.fingerprint.hex()}"
            )
        return torch.frombuffer(bytearray(payload), dtype=torch.uint8)


class DensePageCodec(PageCodec):
    """Lossless pages: keys and values in the cache's own dtype."""

    kind = 0

    def __init__(self, page_size: int, heads: int, key_dim: int, value_dim: int, dtype: torch.dtype):
        self.dtype = dtype
        item = torch.empty((), dtype=dtype).element_size()
        sizes = {"keys": heads * page_size * key_dim * item, "values": heads * page_size * value_dim * item}
        super().__init__(page_size, heads, key_dim, value_dim, sizes)
        self.fingerprint = hashlib.sha256(f"dense {dtype}".encode()).digest()[:16]
        self.tables: list[torch.Tensor] = []

    def to(self, device) -> DensePageCodec:
        return self

    def encode(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """`k [..., H, P, Dk]`, `v [..., H, P, Dv]` to `[..., page_bytes]` uint8."""
        flat = (x.to(self.dtype).contiguous().flatten(-3).view(torch.uint8) for x in (k, v))
        return self._assemble(**dict(zip(("keys", "values"), flat, strict=True)))

    def coordinates(self, pages: torch.Tensor, side: int) -> torch.Tensor:
        """Keys (`side=0`) or values of `pages [..., page_bytes]`, `[..., H, P, D]`."""
        name, dim = (("keys", self.key_dim), ("values", self.value_dim))[side]
        flat = self.section(pages, name).contiguous().view(self.dtype)
        return flat.reshape(*pages.shape[:-1], self.heads, self.page_size, dim)

    def splice(self, old: torch.Tensor, new: torch.Tensor, keep: int) -> torch.Tensor:
        """Page of the first `keep` tokens of `old` and the rest of `new`."""
        parts = zip(self.decode(old), self.decode(new), strict=True)
        return self.encode(*(torch.cat([o[..., :keep, :], n[..., keep:, :]], -2) for o, n in parts))


class QuantizedPageCodec(PageCodec):
    """Packed codes with one scale a vector."""

    kind = 1

    def __init__(self, key: VectorCodec, value: VectorCodec):
        if key.scale_bits != value.scale_bits or key.scale_bits not in (8, 16):
            raise FormatError(
                f"scales of keys have {key.scale_bits} bits, of values {value.scale_bits}; both must have 8 or both 16"
            )
        self.key, self.value = key, value
        sizes = {
            "key_codes": key.code_bytes,
            "key_scales": key.heads * key.page_size * key.scale_bits // 8,
            "value_codes": value.code_bytes,
            "value_scales": value.heads * value.page_size * value.scale_bits // 8,
        }
        super().__init__(key.page_size, key.heads, key.dim, value.dim, sizes)
        self.fingerprint = hashlib.sha256(key.fingerprint + value.fingerprint).digest()[:16]
        self.tables = key.tables + value.tables

    def to(self, device) -> QuantizedPageCodec:
        return QuantizedPageCodec(self.key.to(device), self.value.to(device))

    def _join(self, key_codes, key_scales, value_codes, value_scales):
        return self._assemble(
            key_codes=self.key.pack(key_codes),
            key_scales=_store(key_scales, self.key.scale_bits),
            value_codes=self.value.pack(value_codes),
            value_scales=_store(value_scales, self.value.scale_bits),
        )

    def unpack(self, pages: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Key codes `[..., H, Dk, P]`, key scales `[..., H, P]`, value codes, value scales."""
        result = []
        for side, name in ((self.key, "key"), (self.value, "value")):
            result += [side.unpack(self.section(pages, f"{name}_codes")), self._scales(pages, name)]
        return tuple(result)

    def _scales(self, pages: torch.Tensor, name: str) -> torch.Tensor:
        """Scales of `pages [..., page_bytes]`, `[..., H, P]` bf16."""
        data = self.section(pages, f"{name}_scales").contiguous()
        narrow = {"key": self.key, "value": self.value}[name].scale_bits == 8
        found = scales.from_bytes(data) if narrow else data.view(torch.bfloat16)
        return found.unflatten(-1, (self.heads, self.page_size))

    def encode(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """`k [..., H, P, Dk]`, `v [..., H, P, Dv]` to `[..., page_bytes]` uint8. Every token is coded on its own."""
        return self._join(*self.key.encode(k), *self.value.encode(v))

    def coordinates(self, pages: torch.Tensor, side: int) -> torch.Tensor:
        """Levels times scales of keys (`side=0`) or values, `[..., H, P, D]` fp32."""
        codec, name = ((self.key, "key"), (self.value, "value"))[side]
        return codec.coordinates(codec.unpack(self.section(pages, f"{name}_codes")), self._scales(pages, name))

    def restore(self, x: torch.Tensor, side: int) -> torch.Tensor:
        """Keys (`side=0`) or values from `coordinates [..., H, P, D]`."""
        return (self.key, self.value)[side].restore(x)

    def absent(self, pages: torch.Tensor) -> torch.Tensor:
        """As `PageCodec.absent`: what `vacate` took out."""
        return torch.isinf(self._scales(pages, "key"))

    def vacate(self, pages: torch.Tensor, where: torch.Tensor) -> None:
        """Take tokens out of pages, in place: a key scale of infinity says that a token is held elsewhere.

        Args:
            pages: `[..., page_bytes]` uint8, contiguous.
            where: `[..., P]` bool, True for tokens to take out.
        """
        held = torch.where(where[..., None, :], torch.inf, self._scales(pages, "key").float())
        self.section(pages, "key_scales").copy_(_store(held.to(torch.bfloat16), self.key.scale_bits))

    def splice(self, old: torch.Tensor, new: torch.Tensor, keep: int) -> torch.Tensor:
        """Page of the first `keep` tokens of `old` and the rest of `new`, codes untouched."""
        parts = zip(self.unpack(old), self.unpack(new), strict=True)
        return self._join(*(torch.cat([o[..., :keep], n[..., keep:]], -1) for o, n in parts))


def _store(found: torch.Tensor, bits: int) -> torch.Tensor:
    """Scales `[..., H, P]` bf16 as bytes."""
    flat = found.contiguous().flatten(-2)
    return scales.to_bytes(flat) if bits == 8 else flat.view(torch.uint8)
