"""Token ids as bytes without a model: bits of an id, predicted from those of like ids after like tokens.

An id is coded from its highest bit on. A bit is predicted from how often it was 0 and 1 with the same higher bits, in
this sequence so far: anywhere, after the same token, and after the same two tokens. Each of the three starts from
what the one before it says, as if it had seen that so many times (`TRUST`): a hierarchical Dirichlet prior, in
integers. Up to some thousand tokens of text that takes 5 to 25 % less than xz, which sees bytes (`seqkv bench replay`).

Stored: width u8, the bits of the largest id, then the stream of `token_coder.py`; the interval of a 1 is the first.

Counts are kept in a table for each of the three, of `2**b` slots: `b` are the bits of `32 T`, from 10 to 22. A slot is
found by the first bits of a hash (`_follow`, `_predict`), and has the 16 bits behind as its tag; one of another tag is
taken over. Counts are halved when one reaches 255. All of this is part of the format.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from ..errors import FormatError
from .token_coder import LOW, TOTAL, TOTAL_BITS, encode, opened

MAX_WIDTH = 32
ORDERS = 3
TRUST = (1, 2, 1)
LIMIT = 255  # of a count
_OPTIONS = {"cache": True, "nogil": True, "error_model": "numpy"}
_u64 = np.uint64
_PRIME = _u64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: Fibonacci hashing (Knuth, TAOCP 3, 6.4)


def _tables(count: int) -> tuple[np.ndarray, np.ndarray]:
    bits = min(max((32 * count).bit_length(), 10), 22)
    return np.zeros((ORDERS, 1 << bits, 2), np.uint8), np.zeros((ORDERS, 1 << bits), np.uint16)


@njit(**_OPTIONS)
def _follow(ids, i, hashes):
    """Hashes of the contexts of token `i`."""
    hashes[0] = 0
    for order in range(1, ORDERS):
        before = _u64(ids[i - order]) + _u64(1) if i >= order else _u64(0)
        hashes[order] = (hashes[order - 1] + before) * _PRIME


@njit(**_OPTIONS)
def _predict(hashes, prefix, counts, tags, slots):
    """Length of the interval of a 1; the contexts' slots are left in `slots`."""
    shift, likely = _u64(64), TOTAL // 2
    size = counts.shape[1]
    while size > 1:
        shift, size = shift - _u64(1), size // 2
    for order in range(ORDERS):
        code = (hashes[order] + prefix) * _PRIME
        code = (code ^ code >> _u64(29)) * _PRIME
        slot, tag = np.int64(code >> shift), np.uint16(code >> (shift - _u64(16)))
        if tags[order, slot] != tag:
            tags[order, slot] = tag
            counts[order, slot, 0] = 0
            counts[order, slot, 1] = 0
        slots[order] = slot
        zeros, ones = np.int64(counts[order, slot, 0]), np.int64(counts[order, slot, 1])
        likely = (ones * TOTAL + TRUST[order] * likely) // (zeros + ones + TRUST[order])
    return max(likely, 1)


@njit(**_OPTIONS)
def _learn(bit, slots, counts):
    for order in range(ORDERS):
        seen = counts[order, slots[order]]
        seen[bit] += 1
        if seen[bit] == LIMIT:
            seen[0] //= 2
            seen[1] //= 2


@njit(**_OPTIONS)
def _intervals(ids, width, counts, tags, starts, lengths):
    hashes, slots, at = np.zeros(ORDERS, np.uint64), np.zeros(ORDERS, np.int64), 0
    for i in range(ids.size):
        _follow(ids, i, hashes)
        prefix = _u64(1)
        for place in range(width - 1, -1, -1):
            bit = (ids[i] >> place) & 1
            likely = _predict(hashes, prefix, counts, tags, slots)
            starts[at] = 0 if bit else likely
            lengths[at] = likely if bit else TOTAL - likely
            _learn(bit, slots, counts)
            prefix, at = prefix << _u64(1) | _u64(bit), at + 1


@njit(**_OPTIONS)
def _decode(state, words, width, counts, tags, ids):
    """Fill `ids`; whether the stream ended where it must."""
    hashes, slots, at = np.zeros(ORDERS, np.uint64), np.zeros(ORDERS, np.int64), 0
    for i in range(ids.size):
        _follow(ids, i, hashes)
        prefix = _u64(1)
        for _ in range(width):
            likely = _u64(_predict(hashes, prefix, counts, tags, slots))
            slot = state & _u64(TOTAL - 1)
            bit = 1 if slot < likely else 0
            state >>= _u64(TOTAL_BITS)
            state = state * likely + slot if bit else state * (_u64(TOTAL) - likely) + slot - likely
            if state < _u64(LOW):
                if at == words.size:
                    return False
                state = state << _u64(32) | _u64(words[at])
                at += 1
            _learn(bit, slots, counts)
            prefix = prefix << _u64(1) | _u64(bit)
        ids[i] = np.int64(prefix) - (1 << width)
    return at == words.size and state == _u64(LOW)


def encode_ids(ids: np.ndarray) -> bytes:
    """Bytes of token ids `[T]` int64, each from 0 to `2**32 - 1`, as the module describes them."""
    width = int(ids.max()).bit_length() if len(ids) else 0
    starts, lengths = np.empty((2, len(ids) * width), np.uint32)
    _intervals(ids, width, *_tables(len(ids)), starts, lengths)
    return bytes([width]) + encode(starts, lengths)


def decode_ids(data: bytes, count: int) -> np.ndarray:
    """The `count` ids of `encode_ids`, `[T]` int64.

    Raises:
        FormatError: `data` is not of so many ids. Damage that happens to give some goes unseen: what stores them adds a
            checksum.
    """
    state, words = opened(data[1:])
    ids = np.empty(count, np.int64)
    if data[0] > MAX_WIDTH or not _decode(_u64(state), words, data[0], *_tables(count), ids):
        raise FormatError(f"stream of {count} token ids does not end where it must: damaged; drop it")
    return ids
