"""The entropy coder: integers to bytes and back, with one static table for each class of symbols.

Interleaved rANS (Duda 2009, arXiv:1311.2540; Giesen 2014, arXiv:1402.3392). What is stored depends on integers only.

Tables are those of `symbol_tables.py`; `start` is the sum of the columns before a column.

A stream of `N` symbols has `K` lanes, the largest power of two up to `min(32, N / 16384)`, at least 1. Symbol `i`
belongs to lane `i % K`, step `i // K`. Little-endian, without padding:

| part    | bytes | content                                                              |
|---------|-------|----------------------------------------------------------------------|
| words   | 4     | number `W` of words                                                  |
| states  | 4 K   | u32, the state of each lane                                          |
| stream  | 2 W   | u16, words in the order in which they are read                       |
| escapes | rest  | for every escape, in order of `i`, by how much it is out of range    |

Every step, every lane with state `x` and `slot = x % 4096` finds the column with `start <= slot < start + frequency`
and sets `x = frequency * (x // 4096) + slot - start`; then, in order of the lanes, each whose `x` is below `2**16`
reads a word and sets `x = x * 2**16 + word`. After the last step all words are read and all states are `2**16`.

An escape of `v > m` stores `e = v - m - 1`, one of `v < -m` stores `e = v + m`, as a zigzag varint: `2 e`, or
`-2 e - 1` for a negative `e`, 7 bits a byte, lowest first, the high bit set in all bytes but the last.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit

from ..errors import FormatError
from .symbol_tables import ESCAPE, LIMIT, TOTAL, TOTAL_BITS, SymbolTables

MAX_LANES, SYMBOLS_A_LANE = 32, 1 << 14
_OPTIONS = {"cache": True, "nogil": True, "error_model": "numpy"}
_u32, _u64 = np.uint32, np.uint64

# What the compiled decoder returns.
_OK, _WORDS_OFF, _STATES_OFF, _ESCAPES_OFF = range(4)
_DAMAGE = {
    _WORDS_OFF: "its words are not as many as its symbols take",
    _STATES_OFF: "its lanes do not end where they began",
    _ESCAPES_OFF: "its escapes do not fit its symbols",
}


def lanes(count: int) -> int:
    """Number of lanes of a stream of `count` symbols: states cost about 24 bits a lane, few lanes cost time."""
    wanted = min(max(count // SYMBOLS_A_LANE, 1), MAX_LANES)
    return 1 << (wanted.bit_length() - 1)


# Indices are unsigned: others are checked for being negative in every access.
@njit(**_OPTIONS)
def _encode(symbols, classes, reciprocals, entries, limits, states, words, escapes):
    """Fill `states`, and `words` and `escapes` from their ends; returns the first of each."""
    step, first, begin = _u64(states.size), _u64(words.size), _u64(escapes.size)
    states[:] = 1 << 16
    i = _u64(symbols.size)
    while i > _u64(0):
        i -= _u64(1)
        lane = i & (step - _u64(1))
        column = min(_u32(_u32(symbols[i]) + _u32(LIMIT)), _u32(ESCAPE))
        at = _u32(classes[i]) << _u32(8) | column
        entry, state = entries[at], states[lane]
        frequency, start = entry >> _u32(16), entry & _u32(0xFFFF)
        if start + frequency == _u32(TOTAL):  # the escape's column is the last
            begin = _escape(np.int64(symbols[i]), np.int64(limits[classes[i]]), escapes, begin)
        if state >> _u32(32 - TOTAL_BITS) >= frequency:
            first -= _u64(1)
            words[first] = np.uint16(state)
            state >>= _u32(16)
        quotient = _u32(_u64(state) * reciprocals[at] >> _u64(44))
        states[lane] = _u32(state + quotient * (_u32(TOTAL) - frequency) + start)
    return first, begin


@njit(**_OPTIONS)
def _escape(value, limit, escapes, end):
    """Write an escape that ends there; returns where it begins."""
    excess = value - limit - 1 if value > 0 else value + limit
    rest = _u64(2 * excess if excess >= 0 else -2 * excess - 1)
    size = _u64(1)
    while rest >> (_u64(7) * size):
        size += _u64(1)
    for k in range(size):
        more = _u64(128 if k + _u64(1) < size else 0)
        escapes[end - size + k] = np.uint8(rest >> (_u64(7) * k) & _u64(127) | more)
    return end - size


@njit(**_OPTIONS)
def _decode(classes, columns, entries, limits, states, words, last, escapes, values):
    """Fill `values`. `words` has room for a step's reads behind its `last` one, whatever the states are."""
    count, step, at, mask = _u64(values.size), _u64(states.size), _u64(0), _u32(TOTAL - 1)
    base = _u64(0)
    while base < count:
        for lane in range(min(step, count - base)):
            state, kind = states[lane], _u32(classes[base + lane])
            slot = state & mask
            column = columns[kind << _u32(TOTAL_BITS) | slot]
            values[base + lane] = np.int32(column) - np.int32(LIMIT)
            entry = entries[kind << _u32(8) | _u32(column)]
            state = _u32((entry >> _u32(16)) * (state >> _u32(TOTAL_BITS)) + slot - (entry & _u32(0xFFFF)))
            low, more = state < _u32(1 << 16), _u32(state << _u32(16) | _u32(words[at]))  # no branch: none foretells it
            states[lane] = more if low else state
            at += _u64(low)
        if at > last:
            return _WORDS_OFF
        base += step
    if at < last:
        return _WORDS_OFF
    if (states != 1 << 16).any():
        return _STATES_OFF
    at = _u64(0)
    for i in range(count):
        if values[i] == ESCAPE - LIMIT:
            code, shift, byte = _u64(0), _u64(0), np.uint8(128)
            while byte >= 128:
                if at == escapes.size or shift > 28:
                    return _ESCAPES_OFF
                byte = escapes[at]
                code |= _u64(byte & 127) << shift
                at, shift = at + _u64(1), shift + _u64(7)
            half, limit = np.int64(code >> _u64(1)), limits[classes[i]]
            value = -1 - half - limit if code & _u64(1) else half + limit + 1
            if value < -(1 << 31) or value >= 1 << 31:
                return _ESCAPES_OFF
            values[i] = value
    return _OK if at == escapes.size else _ESCAPES_OFF


def _checked_classes(classes: torch.Tensor, tables: SymbolTables) -> np.ndarray:
    if classes.dtype != torch.uint8 or classes.ndim != 1:
        raise ValueError(f"classes are {classes.dtype} {list(classes.shape)}, must be torch.uint8 [N]")
    array = np.ascontiguousarray(classes.cpu().numpy())
    if array.size and array.max() >= len(tables.frequencies):
        raise ValueError(f"class {array.max()} has no table: the tables are of {len(tables.frequencies)} classes")
    return array


def encode(symbols: torch.Tensor, classes: torch.Tensor, tables: SymbolTables) -> bytes:
    """One stream, as the module describes it.

    Args:
        symbols: `[N]` int32 or int16, of any value.
        classes: Class of each symbol, `[N]` uint8; runs of one class are fastest.

    Raises:
        ValueError: Shapes or dtypes differ from these, or a class has no table.
    """
    if symbols.dtype not in (torch.int16, torch.int32) or symbols.shape != classes.shape:
        raise ValueError(
            f"symbols are {symbols.dtype} {list(symbols.shape)}, must be torch.int16 or torch.int32 and of the shape "
            f"{list(classes.shape)} of their classes"
        )
    classes = _checked_classes(classes, tables)
    states, words = np.empty(lanes(classes.size), np.uint32), np.empty(classes.size, np.uint16)
    escapes = np.empty(5 * classes.size, np.uint8)
    symbols = np.ascontiguousarray(symbols.cpu().to(torch.int32).numpy())
    first, begin = _encode(symbols, classes, *tables.encoder, states, words, escapes)
    words = words[first:]
    parts = (np.array([words.size], "<u4"), states.astype("<u4"), words.astype("<u2"), escapes[begin:])
    return b"".join(part.tobytes() for part in parts)


def decode(data: bytes, classes: torch.Tensor, tables: SymbolTables) -> torch.Tensor:
    """The symbols of a stream, `[N]` int32.

    Args:
        classes: As at encoding, `[N]` uint8.

    Raises:
        FormatError: `data` is not a stream of these classes. Damage that happens to give one goes unseen: what stores
            a stream adds a checksum.
        ValueError: `classes` are of another dtype or shape, or one of them has no table.
    """
    classes = _checked_classes(classes, tables)
    values = np.empty(classes.size, np.int32)
    step = lanes(classes.size)
    head = 4 + 4 * step
    last = int.from_bytes(data[:4], "little")
    if len(data) < head + 2 * last:
        raise FormatError(
            f"stream of {classes.size} symbols has {len(data)} bytes, must have {head + 2 * last} or more: truncated, "
            f"damaged or foreign; drop it and prefill again"
        )
    words = np.zeros(last + step, np.uint16)
    words[:last] = np.frombuffer(data, "<u2", last, head)
    states = np.frombuffer(data, "<u4", step, 4).astype(np.uint32)
    escapes = np.frombuffer(data, np.uint8, offset=head + 2 * last)
    if damage := _decode(classes, *tables.decoder, states, words, last, escapes, values):
        raise FormatError(
            f"stream of {classes.size} symbols is damaged or foreign: {_DAMAGE[damage]}; drop it and prefill again"
        )
    return torch.from_numpy(values)
