"""Bundles: named tensors and a few facts as one run of bytes that is safe to store.

A bundle is a 12-byte header and a safetensors file. Header, little-endian: magic `SKVB`, version u16, two zero bytes,
CRC-32 u32 of what follows. The facts are JSON under the one metadata key `hf_seqkv`.
"""

from __future__ import annotations

import json
import struct
import zlib
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ..errors import FormatError

MAGIC, VERSION = b"SKVB", 1
_HEADER = struct.Struct("<4sHHI")
_KEY = "hf_seqkv"


def pack(tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> bytes:
    """Tensors of any device and JSON facts, as bytes; equal for equal content."""
    plain = {name: x.detach().cpu().contiguous() for name, x in sorted(tensors.items())}
    body = save(plain, metadata={_KEY: json.dumps(facts, sort_keys=True)})
    return _HEADER.pack(MAGIC, VERSION, 0, zlib.crc32(body)) + body


def unpack(data: bytes, what: str = "bundle") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Inverse of `pack`; tensors are on the CPU.

    Args:
        what: Name for messages.

    Raises:
        FormatError: Truncated, damaged, foreign or of another version.
    """
    if len(data) < _HEADER.size + 8:
        raise FormatError(f"{what} of {len(data)} bytes is shorter than its header: truncated; drop it")
    magic, version, zero, crc = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise FormatError(f"{what} is not one of hf_seqkv's: magic is {magic!r}, must be {MAGIC!r}")
    if version != VERSION:
        raise FormatError(f"{what} has format version {version}; this hf_seqkv reads version {VERSION}: upgrade it")
    body = data[_HEADER.size :]
    if zero or zlib.crc32(body) != crc:
        raise FormatError(f"{what}'s checksum does not match: the bytes are truncated or damaged; drop it")
    try:
        length = int.from_bytes(body[:8], "little")
        facts = json.loads(json.loads(body[8 : 8 + length])["__metadata__"][_KEY])
        return load(body), facts
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{what} was not written by hf_seqkv ({error}); drop it") from error
