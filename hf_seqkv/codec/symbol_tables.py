"""Symbol tables: how often every symbol is expected, which is what the entropy coder codes by.

A class codes the values `-m .. m` (`m` its own, at most 127) and an escape for all others, by integer frequencies that
sum to 4096. Its row has 256 columns: value `v` in column `v + 127`, the escape in column 255, zeros outside the range.
What an escape stands for takes bytes of its own (`entropy.py`), which its price in `bits` includes.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numba import njit

from ..errors import FormatError

LIMIT = 127
TOTAL_BITS = 12
TOTAL = 1 << TOTAL_BITS
ESCAPE = 2 * LIMIT + 1
_VALUES = np.arange(-LIMIT, LIMIT + 1)
_PRIOR = 16.0  # how many counts the geometric weighs in a fit: helps below a few hundred, costs nothing above


class SymbolTables:
    """Frequencies of the symbols of `C` classes.

    Args:
        frequencies: `[C, 256]` uint16 as the module describes them, `1 <= C <= 256`.

    Raises:
        FormatError: The tensor, or a row of it, is not that.
    """

    def __init__(self, frequencies: torch.Tensor):
        shape = list(frequencies.shape)
        if frequencies.dtype != torch.uint16 or shape[1:] != [ESCAPE + 1] or not 1 <= shape[0] <= 256:
            raise FormatError(
                f"symbol tables are {frequencies.dtype} {shape}, must be torch.uint16 [C, 256] "
                f"with C from 1 to 256: the file they are from is damaged"
            )
        table = frequencies.cpu().numpy().astype(np.int64)
        limits = (table[:, :ESCAPE] > 0).sum(1) // 2
        bad = (table.sum(1) != TOTAL) | ((table > 0) != _present(limits)).any(1)
        if bad.any():
            raise FormatError(
                f"symbol table of class {int(bad.argmax())} is not one: frequencies must sum to {TOTAL} and be "
                f"positive for an escape and the values -m .. m alone: the file it is from is damaged"
            )
        self.frequencies, self._table, self._limits = frequencies, table, limits

    @classmethod
    def fit(cls, counts: torch.Tensor, beyond: torch.Tensor | None = None) -> SymbolTables:
        """Tables for values as often as they were counted, and for what was never counted.

        Args:
            counts: How often each value `-127 .. 127` occurred, `[C, 255]`, any real dtype.
            beyond: How many values were outside that, `[C]`; None for none.

        Returns:
            Tables of the ranges with the least code length, escapes' bytes included.
        """
        counts = counts.cpu().double().numpy()
        beyond = np.zeros(len(counts)) if beyond is None else beyond.cpu().double().numpy()
        # A two-sided geometric of the same mean magnitude, which is a half where nothing was counted.
        seen = counts.sum(1) + beyond
        mean = ((counts * abs(_VALUES)).sum(1) + beyond * (LIMIT + 1) + 0.5) / (seen + 1)
        ratio = ((np.sqrt(1 + mean**2) - 1) / mean)[:, None]
        geometric = (1 - ratio) / (1 + ratio) * ratio ** abs(_VALUES)
        left = 1 - geometric.sum(1)
        scale = 1 / (seen + _PRIOR)
        inside, outside = (counts + _PRIOR * geometric) * scale[:, None], (beyond + _PRIOR * left) * scale
        limits = _best_limits(inside, outside)
        return cls(torch.from_numpy(_quantise(*_with_escape(inside, outside, limits)).astype(np.uint16)))

    def bits(self) -> torch.Tensor:
        """Code length of each value `-127 .. 127` in bits, an escape's bytes included: `[C, 255]` fp32."""
        coded = np.where(_present(self._limits), self._table, self._table[:, ESCAPE:])[:, :ESCAPE]
        return torch.from_numpy((TOTAL_BITS - np.log2(coded) + _escape_bits(self._limits)).astype(np.float32))

    @functools.cached_property
    def decoder(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Column of every slot, `[C * 4096]` uint8; entries and limits as for the encoder.

        Two small tables instead of one that holds all: those of the classes in use then stay in the second cache.
        """
        columns = np.repeat(np.tile(np.arange(ESCAPE + 1, dtype=np.uint8), len(self._table)), self._table.ravel())
        return columns, *self.encoder[1:]

    @functools.cached_property
    def encoder(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For every column, `[C * 256]`: reciprocals uint64, entries `frequency << 16 | start` uint32; limits `[C]`.

        `x // frequency == x * ceil(2**44 / frequency) >> 44` for `x < frequency << 20`, within 64 bits. Values out of
        range have the escape's entries.
        """
        column = np.where(_present(self._limits), np.arange(ESCAPE + 1), ESCAPE)
        frequency = np.take_along_axis(self._table, column, 1).ravel()
        start = np.take_along_axis(self._table.cumsum(1) - self._table, column, 1).ravel()
        return (-(-(1 << 44) // frequency)).astype(np.uint64), (frequency << 16 | start).astype(np.uint32), self._limits


@njit(cache=True, nogil=True, error_model="numpy")
def _code_lengths(symbols, classes, moves, bits, out):
    counts = np.zeros(2 * LIMIT + 1, np.int64)
    for row in range(symbols.shape[0]):
        values, lengths, at, end = symbols[row], out[row], np.uint64(0), np.uint64(classes.size)
        lengths[:] = 0
        while at < end:
            kind, low, high = classes[at], np.int32(LIMIT), np.int32(LIMIT)
            while at < end and classes[at] == kind:
                column = max(min(values[at], np.int32(LIMIT)), np.int32(-LIMIT)) + np.int32(LIMIT)
                low, high = min(low, column), max(high, column)
                counts[np.uint64(column)] += 1
                at += np.uint64(1)
            for column in range(low, high + 1):
                count = np.float32(counts[np.uint64(column)])
                if count > 0:
                    for setting in range(np.uint64(moves.shape[0])):
                        prices = bits[np.uint64(moves[setting, np.uint64(kind)])]
                        lengths[setting] += count * prices[np.uint64(column)]
                    counts[np.uint64(column)] = 0


def code_lengths(symbols: torch.Tensor, classes: torch.Tensor, moves: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Bits that rows of symbols take if their classes were others.

    Args:
        symbols: `[n, M]` int32.
        classes: Of each place in a row, `[M]` uint8; runs of one class are fastest.
        moves: The class that takes a class's place in each of `S` settings, `[S, C]` uint8.
        bits: See `SymbolTables.bits`.

    Returns:
        `[n, S]` fp32; a value beyond the tables counts as the last in them.
    """
    out = torch.empty(len(symbols), len(moves))
    _code_lengths(*(x.contiguous().numpy() for x in (symbols, classes, moves, bits)), out.numpy())
    return out


def _present(limits: np.ndarray) -> np.ndarray:
    """Columns that classes of these limits have, `[C]` to `[C, 256]` bool."""
    inside = abs(_VALUES) <= limits[:, None]
    return np.concatenate([inside, np.ones((len(limits), 1), bool)], 1)


def _escape_bits(limits: np.ndarray) -> np.ndarray:
    """Bits of each value in the escapes, `[C]` to `[C, 255]`."""
    excess = abs(_VALUES) - limits[:, None]
    return 8 * ((excess > 0).astype(np.int64) + (excess > 64))


def _with_escape(inside: np.ndarray, outside: np.ndarray, limits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of the columns `[C, 256]`, and which of them are present."""
    present = _present(limits)
    escaped = (inside * ~present[:, :ESCAPE]).sum(1) + outside
    return np.concatenate([inside * present[:, :ESCAPE], escaped[:, None]], 1), present


def _best_limits(inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """Limit of each class with the least expected code length, `[C]`.

    Args:
        inside, outside: Probabilities of the values `[C, 255]` and of all beyond them `[C]`.
    """
    lengths = []
    for m in range(LIMIT + 1):
        limits = np.full(len(inside), m)
        columns, present = _with_escape(inside, outside, limits)
        coded = np.where(present, np.maximum(columns, 1 / TOTAL), 0)
        coded = coded / coded.sum(1, keepdims=True)
        lengths.append((inside * _escape_bits(limits)).sum(1) - (columns * np.log2(coded + ~present)).sum(1))
    return np.argmin(lengths, 0)


def _quantise(probabilities: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Frequencies `[C, 256]` with the least code length: units go where they save most, from a point that is too low.

    Code length is convex in each frequency, so that the greedy choice is the best one.
    """
    columns = present.sum(1, keepdims=True)
    frequencies = np.where(present, np.maximum(np.floor(probabilities * (TOTAL - 2 * columns)), 1), 0)
    while (short := np.flatnonzero(frequencies.sum(1) < TOTAL)).size:
        saved = probabilities[short] * np.log2(1 + 1 / np.maximum(frequencies[short], 1))
        frequencies[short, np.where(present[short], saved, -1).argmax(1)] += 1
    return frequencies
