"""The stored entry: one page of one token sequence, whatever form its payload has, or what pages are coded by.

A file is a header of 136 bytes, the token ids (u32 each) and the payload. Header, little-endian:

| bytes | content                                                                                  |
|-------|------------------------------------------------------------------------------------------|
| 4     | magic `SKVN`                                                                             |
| 2     | version u16, 1                                                                           |
| 2     | form u16: 1 hot, 2 exact, 3 sequence; 4 tables, of the exact codec for a scope's pages    |
| 32    | key: `page_key(scope, parent, ids)`                                                      |
| 32    | scope                                                                                    |
| 32    | parent's key; zeros for a first page                                                     |
| 4     | bits f32: -log2 P of the page's tokens under the model, a token; NaN if not known        |
| 4     | number of token ids u32                                                                  |
| 8     | length of the payload u64                                                                |
| 16    | BLAKE2b-16 of the whole file, this field zero                                            |

Nothing is allocated by what a header says: its lengths must agree with the file's, which is bounded first.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import FormatError
from .keys import KEY_BYTES, MOST_IDS, id_bytes, page_key

MAGIC, VERSION = b"SKVN", 1
FORMS = ("hot", "exact", "sequence", "tables")  # of pages; the last of what pages of a scope are coded by
PAGE_FORMS = FORMS[:3]
MOST_BITS = 1e6
_HEADER = struct.Struct("<4sHH32s32s32sfIQ16s")
HEADER_BYTES = _HEADER.size
_ROOT, _BLANK = bytes(KEY_BYTES), bytes(16)


class NewerVersionError(FormatError):
    """The entry was written by a newer hf_seqkv: not damaged, only not readable here."""


@dataclass(frozen=True)
class Entry:
    """A page as stored: its key, its parent's (`b""` for a first page), token ids, form, payload, scope and bits."""

    key: bytes
    parent: bytes
    ids: tuple[int, ...]
    form: str
    payload: bytes
    scope: bytes
    bits: float | None


class Head(NamedTuple):
    """What a header says; `size` is the whole file's, in bytes."""

    key: bytes
    scope: bytes
    parent: bytes
    form: str
    bits: float | None
    tokens: int
    payload_bytes: int
    size: int


def pack(scope: bytes, parent: bytes, ids: Sequence[int], payload: bytes, form: str, bits: float | None) -> bytes:
    """An entry's file; `bits` in bits a token."""
    key, packed = page_key(scope, parent, ids), id_bytes(ids)
    fields = (MAGIC, VERSION, FORMS.index(form) + 1, key, scope, parent or _ROOT, math.nan if bits is None else bits)
    blank = _HEADER.pack(*fields, len(ids), len(payload), _BLANK)
    return b"".join((blank[:-16], _checksum(blank, packed, payload), packed, payload))


def read_head(data: bytes, size: int) -> Head:
    """The header of a file of `size` bytes that begins with `data`.

    Raises:
        FormatError: Truncated, foreign, or its lengths are not the file's.
        NewerVersionError: Written by a newer hf_seqkv.
    """
    if len(data) < HEADER_BYTES:
        raise FormatError(f"entry of {len(data)} bytes is shorter than its {HEADER_BYTES}-byte header: truncated")
    magic, version, form, key, scope, parent, bits, count, length, _ = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise FormatError(f"not an entry: magic is {magic!r}, must be {MAGIC!r}")
    if version > VERSION:
        raise NewerVersionError(f"entry of format version {version}; this hf_seqkv reads {VERSION}: upgrade it")
    if version != VERSION or not 1 <= form <= len(FORMS) or not (math.isnan(bits) or 0 <= bits < MOST_BITS):
        raise FormatError(f"entry of version {version}, form {form}, {bits} bits a token; none is written so: damaged")
    if not 1 <= count <= MOST_IDS or size != HEADER_BYTES + 4 * count + length:
        raise FormatError(f"entry has {size} bytes, its header promises {count} ids and {length} more: damaged")
    parent = b"" if parent == _ROOT else parent
    return Head(key, scope, parent, FORMS[form - 1], None if math.isnan(bits) else bits, count, length, size)


def unpack(data: bytes, key: bytes) -> Entry:
    """The entry in a file's bytes, which was stored under `key`.

    Raises:
        FormatError: See `read_head`; or the bytes are damaged, or another entry's.
    """
    head = read_head(data, len(data))
    body = memoryview(data)[HEADER_BYTES:]
    if _checksum(data[: HEADER_BYTES - 16] + _BLANK, body) != data[HEADER_BYTES - 16 : HEADER_BYTES]:
        raise FormatError("entry's checksum does not match: it is damaged; drop it and prefill again")
    ids = struct.unpack_from(f"<{head.tokens}I", body)
    if not key == head.key == page_key(head.scope, head.parent, ids):
        raise FormatError(f"entry is stored as {key.hex()}, its content is another's; drop it and prefill again")
    return Entry(key, head.parent, ids, head.form, bytes(body[4 * head.tokens :]), head.scope, head.bits)


def _checksum(*parts: bytes | memoryview) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.digest()
