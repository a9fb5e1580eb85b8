"""Keys of the prefix store: a page is known by what it holds and by everything before it.

A page's key is the SHA-256 of its scope (the model and everything else that decides what a cache holds), of its
parent's key and of its token ids; so equal keys mean equal token sequences from position 0 under one scope. What is
hashed begins with a domain of its own and gives every length, so no two different inputs are the same bytes.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

from ..errors import ConfigError

KEY_BYTES = 32
MOST_IDS = 1 << 16
_PAGE, _SCOPE = b"hf_seqkv page 1\0", b"hf_seqkv scope 1\0"


def id_bytes(ids: Sequence[int]) -> bytes:
    """Token ids as u32, little-endian.

    Raises:
        ConfigError: There are none or more than 65,536, or one is not a whole number from 0 to 2^32 - 1.
    """
    if not 1 <= len(ids) <= MOST_IDS:
        raise ConfigError(f"a page of {len(ids)} token ids; a stored page has 1 to {MOST_IDS}")
    try:
        return struct.pack(f"<{len(ids)}I", *ids)
    except struct.error as error:
        raise ConfigError(f"token ids of a page: {error}; give whole numbers from 0 to 2^32 - 1") from error


def page_key(scope: bytes, parent: bytes, ids: Sequence[int]) -> bytes:
    """Key of a page, 32 bytes.

    Args:
        scope: 32 bytes; see `scope_key`.
        parent: Key of the page before it, `b""` for the first.
        ids: Its token ids.

    Raises:
        ConfigError: The scope or the parent has another length, or see `id_bytes`.
    """
    if len(scope) != KEY_BYTES or len(parent) not in (0, KEY_BYTES):
        raise ConfigError(
            f"scope of {len(scope)} bytes, parent of {len(parent)}; a scope has {KEY_BYTES} (`scope_key` makes one), "
            f"a parent {KEY_BYTES}, or none for a first page"
        )
    packed = id_bytes(ids)
    head = struct.pack("<II", len(parent), len(packed))
    return hashlib.sha256(b"".join((_PAGE, head, scope, parent, packed))).digest()


def scope_key(**facts: str | int | bytes | None) -> bytes:
    """Key of a scope, 32 bytes, from named facts; their order does not matter, their names and types do.

    Raises:
        ConfigError: A fact is of another type.
    """
    parts = [_SCOPE]
    for name, value in sorted(facts.items()):
        kind, packed = _tagged(name, value)
        label = name.encode()
        parts += [struct.pack("<IcQ", len(label), kind, len(packed)), label, packed]
    return hashlib.sha256(b"".join(parts)).digest()


def _tagged(name: str, value: str | int | bytes | None) -> tuple[bytes, bytes]:
    if value is None:
        return b"n", b""
    if isinstance(value, bytes):
        return b"b", value
    if isinstance(value, str):
        return b"s", value.encode()
    if isinstance(value, int) and not isinstance(value, bool):
        return b"i", str(value).encode()
    raise ConfigError(f"fact {name}={value!r} of a scope; give text, a whole number, bytes or None")
