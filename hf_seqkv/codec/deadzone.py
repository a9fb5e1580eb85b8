"""The sequence codec's scalar quantiser: uniform steps, rounding that minds the rate, fitted reconstruction points.

A coefficient `x` in units of its step becomes the integer `q` among its rounding, the one nearer to zero, and zero with
the least `(x - q)**2 + LAMBDA * bits(q)`; it is rebuilt as `q` moved by a fitted offset of its class towards zero.

Source: entropy-constrained scalar quantisation, Sullivan, "Efficient scalar quantization of exponential and Laplacian
random variables", 1996. `LAMBDA` is `6 ln 2 / 36`, the slope of distortion against rate of a uniform quantiser.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from numba import njit

from .symbol_tables import LIMIT
from .threads import on_threads, spans

LAMBDA = 0.1155
OFFSETS = 3  # magnitudes with a reconstruction point of their own: 1, 2, and 3 with all above
LEAST = 1 << 16  # coefficients that are worth a thread
_MOST = np.float32(2**30)  # a symbol fits 32 bits whatever the coefficient
_OPTIONS = {"cache": True, "nogil": True, "error_model": "numpy"}


# Indices are unsigned: others are checked for being negative in every access. Most coefficients become 0 or 1, as
# likely as not, so that choice is made without a branch: from a threshold on, 1 costs less.
@njit(**_OPTIONS)
def _quantise(x, which, order, classes, scales, bits, offsets, symbols, out):
    zero, weight = np.uint64(LIMIT), np.float32(LAMBDA)
    for row in range(x.shape[0]):
        table, at = which[row], np.uint64(0)
        places, kinds, values, rebuilt, found = order[table], classes[table], x[row], out[row], symbols[row]
        scale, inverse, count = scales[table], np.float32(1) / scales[table], np.uint64(order.shape[1])
        while at < count:
            kind = np.uint64(kinds[at])
            prices, half = bits[kind], np.float32(0.5)
            up = max(half, half + half * weight * (prices[zero + np.uint64(1)] - prices[zero]))
            down = max(half, half + half * weight * (prices[zero - np.uint64(1)] - prices[zero]))
            one = (np.float32(1) + offsets[kind, np.uint64(0)]) * scale
            while at < count and np.uint64(kinds[at]) == kind:
                place = np.uint64(places[at])
                value = values[place] * inverse
                size = min(abs(value), _MOST)
                if size < np.float32(1.5):
                    best = np.int64(value >= up) - np.int64(value <= -down)
                    rebuilt[place] = np.float32(best) * one
                else:
                    best = _cheapest(size, prices, 1 if value > 0 else -1)
                    near = np.float32(0)
                    if best > 0:
                        near = (np.float32(best) + offsets[kind, np.uint64(min(best, OFFSETS) - 1)]) * scale
                    if value < 0:
                        best, near = -best, -near
                    rebuilt[place] = near
                found[at] = best
                at += np.uint64(1)


@njit(**_OPTIONS)
def _cheapest(size, prices, side):
    """The best magnitude for one of 1.5 or more."""
    rounded = np.int64(size + np.float32(0.5))
    best, least = np.int64(0), size * size + np.float32(LAMBDA) * prices[np.uint64(LIMIT)]
    for candidate in (rounded - 1, rounded):
        gap = size - np.float32(candidate)
        cost = gap * gap + np.float32(LAMBDA) * prices[np.uint64(LIMIT + side * min(candidate, LIMIT))]
        if cost <= least:
            least, best = cost, candidate
    return best


@njit(**_OPTIONS)
def _dequantise(symbols, which, order, classes, scales, offsets, out):
    points = np.zeros((offsets.shape[0], OFFSETS + 1), np.float32)  # by magnitude, so that none needs a branch
    points[:, 1:] = offsets
    for row in range(symbols.shape[0]):
        table = which[row]
        places, kinds, values, rebuilt, scale = order[table], classes[table], symbols[row], out[row], scales[table]
        for at in range(places.size):
            symbol = np.int64(values[at])  # the least int32 has no magnitude
            size = abs(symbol)
            near = (np.float32(size) + points[np.uint64(kinds[at]), np.uint64(min(size, OFFSETS))]) * scale
            rebuilt[np.uint64(places[at])] = math.copysign(near, np.float32(symbol))


@njit(**_OPTIONS)
def _code_lengths(symbols, classes, moves, bits, out):
    counts = np.zeros(2 * LIMIT + 1, np.int64)
    for row in range(symbols.shape[0]):
        values, lengths, at = symbols[row], out[row], 0
        lengths[:] = 0
        while at < classes.size:
            kind, low, high = classes[at], LIMIT, LIMIT
            while at < classes.size and classes[at] == kind:
                column = max(min(values[at], LIMIT), -LIMIT) + LIMIT
                low, high = min(low, column), max(high, column)
                counts[np.uint64(column)] += 1
                at += 1
            for setting in range(moves.shape[0]):
                prices = bits[np.uint64(moves[setting, np.uint64(kind)])]
                for column in range(low, high + 1):
                    lengths[setting] += np.float32(counts[np.uint64(column)]) * prices[np.uint64(column)]
            counts[low : high + 1] = 0


def code_lengths(symbols: torch.Tensor, classes: torch.Tensor, moves: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Bits that rows of symbols take if their classes were others.

    Args:
        symbols: `[n, M]` int32.
        classes: Of each place in a row, `[M]` uint8; runs of one class are fastest.
        moves: The class that takes a class's place in each of `S` settings, `[S, C]` uint8.
        bits: As in `DeadZone`.

    Returns:
        `[n, S]` fp32; a value beyond the tables counts as the last in them.
    """
    out = torch.empty(len(symbols), len(moves))
    tables = [x.contiguous().numpy() for x in (classes, moves, bits)]
    _on_threads(_code_lengths, (symbols.contiguous(),), tables, (out,))
    return out


class DeadZone:
    """Quantiser of rows of coefficients; a row chooses one of `R` settings.

    Symbols of a row are in the order of their classes, so that equal tables are used together.

    Args:
        classes: Class of every coefficient, `[R, M]` uint8.
        steps: Step of each setting, `[R]`.
        bits: Code length of each value by class, `[C, 255]` fp32; see `SymbolTables.bits`.
        offsets: What to add to a magnitude of 1, 2, and 3 or more, by class, `[C, 3]` fp32, in steps.
    """

    def __init__(self, classes: torch.Tensor, steps: torch.Tensor, bits: torch.Tensor, offsets: torch.Tensor):
        order = classes.to(torch.int32).argsort(dim=-1, stable=True)
        self._set(order.to(torch.int32), classes.gather(-1, order), steps.float(), bits, offsets)

    @classmethod
    def joined(cls, zones: list[DeadZone], bits: torch.Tensor, offsets: torch.Tensor) -> DeadZone:
        """One for rows that hold, one after the other, coefficients of several with one setting and equal steps."""
        ends = list(itertools.accumulate(zone.order.shape[1] for zone in zones))
        order = torch.cat([zone.order + end - zone.order.shape[1] for zone, end in zip(zones, ends, strict=True)], 1)
        made = cls.__new__(cls)
        made._set(order, torch.cat([zone.classes for zone in zones], 1), zones[0].steps, bits, offsets)
        return made

    def _set(self, order, classes, steps, bits, offsets) -> None:
        self.order, self.classes, self.steps = order, classes, steps
        self._order, self._kinds, self._scales = (t.numpy() for t in (self.order, self.classes, self.steps))
        self._bits, self._offsets = bits.contiguous().numpy(), offsets.contiguous().numpy()

    def quantise(self, x: torch.Tensor, which: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Coefficients `[n, M]` fp32, by settings `[n]` int64, to symbols `[n, M]` int32 and what they stand for.

        Returns:
            Symbols in the order of classes, and rebuilt coefficients `[n, M]` fp32 in their own order.
        """
        symbols, out = torch.empty(x.shape, dtype=torch.int32), torch.empty(x.shape)
        tables = (self._order, self._kinds, self._scales, self._bits, self._offsets)
        _on_threads(_quantise, (x.contiguous(), which), tables, (symbols, out))
        return symbols, out

    def dequantise(self, symbols: torch.Tensor, which: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Symbols `[n, M]` int32 to rebuilt coefficients `[n, M]` fp32, in `out` if given."""
        out = torch.empty(symbols.shape) if out is None else out
        tables = (self._order, self._kinds, self._scales, self._offsets)
        _on_threads(_dequantise, (symbols, which), tables, (out,))
        return out


def _on_threads(kernel: Callable, inputs: tuple, tables: tuple, outputs: tuple) -> None:
    """Run a kernel over rows, a part of them on each of torch's threads; no result depends on the parts."""
    count = len(inputs[0])
    parts = max(1, min(torch.get_num_threads(), count, inputs[0].numel() // LEAST))
    inputs, outputs = ([t.numpy() for t in group] for group in (inputs, outputs))
    on_threads(
        lambda span: kernel(*(t[span] for t in inputs), *tables, *(t[span] for t in outputs)),
        spans(count, -(-count // parts) or 1),
    )
