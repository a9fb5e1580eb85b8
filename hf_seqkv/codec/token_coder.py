"""Token ids as intervals of integers, and intervals as bytes: what is stored depends on integers only.

A symbol is an interval `(start, frequency)` of `[0, 2**30)`, as long as the symbol is likely; a stream of them is rANS
with one state (Duda 2009, arXiv:1311.2540). Little-endian, without padding:

| part  | bytes | content                                       |
|-------|-------|-----------------------------------------------|
| state | 8     | u64, the state                                |
| words | rest  | u32, words in the order in which they are read |

For each symbol, the state `x` says in which interval it is by `slot = x % 2**30`; then `x = frequency * (x // 2**30) +
slot - start`, and where that is below `2**32` a word is read: `x = x * 2**32 + word`. After the last symbol all words
are read and the state is `2**32`.

The interval of a token under a model comes from its logits by `frequencies`, which rounds them to 1/256 bit and goes
on with integers: equal logits give equal intervals everywhere.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numba import njit

from ..errors import FormatError, NonFiniteError

TOTAL_BITS = 30
TOTAL = 1 << TOTAL_BITS
LOW = 1 << 32  # of a state between two symbols
FRACTION_BITS, WEIGHT_BITS = 8, 32
_u64 = np.uint64


@functools.cache
def _fractions() -> torch.Tensor:
    """`2**(32 - i / 256)` for each `i`, rounded, `[256]` int64."""
    steps = 1 << FRACTION_BITS
    return torch.tensor([round(2 ** (WEIGHT_BITS - i / steps)) for i in range(steps)])


def frequencies(logits: torch.Tensor) -> torch.Tensor:
    """Lengths of the tokens' intervals, in the order of their ids, from 0 on.

    A token has at least 1, the rest is by its probability: a vocabulary of 262,144 gives up 0.0004 bits a token for it.
    What rounding leaves over, behind the last interval, belongs to no token.

    Args:
        logits: `[V]`, floating point, on any device; minus infinity is allowed.

    Returns:
        `[V]` int64 on the same device, of a sum up to `TOTAL`.

    Raises:
        NonFiniteError: A logit is NaN or infinity.
    """
    # each operation rounds to a float32 in one way only
    logits = logits.float()
    top = logits.max()
    if not torch.isfinite(top):
        raise NonFiniteError(f"the largest logit is {top.item()}: no distribution; load the model in a wider dtype")
    scale = (1 << FRACTION_BITS) * 1.4426950408889634  # steps of 1/256 bit in a nat
    depth = ((top - logits) * scale).round().clamp_max((WEIGHT_BITS + 1) << FRACTION_BITS).long()
    weights = _fractions().to(logits.device)[depth & ((1 << FRACTION_BITS) - 1)] >> (depth >> FRACTION_BITS)
    return 1 + weights * (TOTAL - len(weights)) // weights.sum()


@njit(cache=True, nogil=True, error_model="numpy")
def _encode(starts, lengths, words):
    """Fill `words` from its end; returns the state and the first word."""
    state, first = _u64(LOW), words.size
    for i in range(starts.size - 1, -1, -1):
        length = _u64(lengths[i])
        if state >> _u64(64 - TOTAL_BITS) >= length:
            first -= 1
            words[first] = np.uint32(state & _u64(0xFFFFFFFF))
            state >>= _u64(32)
        state = (state // length << _u64(TOTAL_BITS)) + state % length + _u64(starts[i])
    return state, first


def encode(starts: np.ndarray, lengths: np.ndarray) -> bytes:
    """A stream of the symbols with these intervals, as the module describes it.

    Args:
        starts, lengths: `[N]` of an integer dtype; lengths of at least 1.
    """
    words = np.empty(len(starts), np.uint32)
    state, first = _encode(starts, lengths, words)
    return int(state).to_bytes(8, "little") + words[first:].astype("<u4").tobytes()


def opened(data: bytes) -> tuple[int, np.ndarray]:
    """State and words of a stream.

    Raises:
        FormatError: It is of no possible length.
    """
    if len(data) < 8 or len(data) % 4:
        raise FormatError(f"stream of tokens has {len(data)} bytes, must have 8 and whole words of 4: damaged")
    return int.from_bytes(data[:8], "little"), np.frombuffer(data, "<u4", offset=8)


class IntervalReader:
    """Reads a stream symbol by symbol.

    Raises:
        FormatError: The stream is of no possible length.
    """

    def __init__(self, data: bytes):
        self._state, words = opened(data)
        self._words = iter(words.tolist())

    def take(self, lengths: torch.Tensor) -> int:
        """The next symbol, one of those whose intervals have these lengths `[V]`, from 0 on.

        Raises:
            FormatError: The stream is at its end, or none of them was encoded here.
        """
        slot = self._state % TOTAL
        ends = lengths.cumsum(0)
        symbol = int(torch.searchsorted(ends, slot, right=True))
        if symbol == len(lengths):
            raise FormatError("stream of tokens is damaged, or was coded under other probabilities: no token fits it")
        length, end = int(lengths[symbol]), int(ends[symbol])
        self._state = length * (self._state >> TOTAL_BITS) + slot - (end - length)
        if self._state < LOW:
            word = next(self._words, None)
            if word is None:
                raise FormatError("stream of tokens ends too early: damaged, or coded under other probabilities")
            self._state = self._state << 32 | word
        return symbol

    def close(self) -> None:
        """Check that the stream is at its end.

        Raises:
            FormatError: It is not.
        """
        if self._state != LOW or next(self._words, None) is not None:
            raise FormatError(
                "stream of tokens does not end where it must: damaged, or coded under other probabilities"
            )
