"""The sequence codec's scalar quantiser: uniform steps, rounding that minds the rate, fitted reconstruction points.

A coefficient `x` in units of its step becomes the integer `q` among its rounding, the one nearer to zero, and zero with
the least `(x - q)**2 + LAMBDA * bits(q)`; it is rebuilt as `q` moved by a fitted offset of its class towards zero.

Source: entropy-constrained scalar quantisation, Sullivan, "Efficient scalar quantization of exponential and Laplacian
random variables", 1996. `LAMBDA` is `6 ln 2 / 36`, the slope of distortion against rate of a uniform quantiser.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit

from .symbol_tables import LIMIT

LAMBDA = 0.1155
OFFSETS = 3  # magnitudes with a reconstruction point of their own: 1, 2, and 3 with all above
_MOST = np.float32(2**30)  # a symbol fits 32 bits whatever the coefficient
_OPTIONS = {"cache": True, "nogil": True, "error_model": "numpy"}


# Indices are unsigned: others are checked for being negative in every access. Coefficients are read in their own order
# and symbols scattered: a read from anywhere is waited for, a write is not. Most coefficients become 0 or 1, as likely
# as not, so that choice is made without a branch: from a threshold on, 1 costs less. Those of 1.5 or more come after.
@njit(**_OPTIONS)
def _quantise(x, which, kinds, places, scales, bits, offsets, symbols, out):
    zero, half, most = np.uint64(LIMIT), np.float32(0.5), np.float32(1.5)
    weight, count = half * np.float32(LAMBDA), np.uint64(kinds.shape[1])
    up, down, one = np.empty((3, bits.shape[0]), np.float32)
    for kind in range(np.uint64(bits.shape[0])):
        prices = bits[kind]
        up[kind] = max(half, half + weight * (prices[zero + np.uint64(1)] - prices[zero]))
        down[kind] = -max(half, half + weight * (prices[zero - np.uint64(1)] - prices[zero]))
        one[kind] = np.float32(1) + offsets[kind, np.uint64(0)]
    large = np.empty(count + np.uint64(1), np.uint32)
    for row in range(x.shape[0]):
        table, found, larger = which[row], symbols[row], np.uint64(0)
        classes, order, values, rebuilt = kinds[table], places[table], x[row], out[row]
        scale, inverse = scales[table], np.float32(1) / scales[table]
        for at in range(count):
            kind, value = np.uint64(classes[at]), values[at] * inverse
            best = np.int32(value >= up[kind]) - np.int32(value <= down[kind])
            found[np.uint64(order[at])] = best
            rebuilt[at] = np.float32(best) * (one[kind] * scale)
            large[larger] = at
            larger += np.uint64(abs(value) >= most)
        for i in range(larger):
            at = np.uint64(large[i])
            kind, value = np.uint64(classes[at]), values[at] * inverse
            best = _cheapest(min(abs(value), _MOST), bits[kind], 1 if value > 0 else -1)
            near = np.float32(0)
            if best > 0:
                near = (np.float32(best) + offsets[kind, np.uint64(min(best, OFFSETS) - 1)]) * scale
            found[np.uint64(order[at])] = best if value > 0 else -best
            rebuilt[at] = near if value > 0 else -near


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
        bits: As in `DeadZone`.

    Returns:
        `[n, S]` fp32; a value beyond the tables counts as the last in them.
    """
    out = torch.empty(len(symbols), len(moves))
    _code_lengths(*(x.contiguous().numpy() for x in (symbols, classes, moves, bits)), out.numpy())
    return out


class DeadZone:
    """Quantiser of rows of coefficients; a row chooses one of `R` settings.

    Symbols of a row are in the order of their classes, so that equal tables are used together, unless another is given.

    Args:
        classes: Class of every coefficient, `[R, M]` uint8.
        steps: Step of each setting, `[R]`.
        bits: Code length of each value by class, `[C, 255]` fp32; see `SymbolTables.bits`.
        offsets: What to add to a magnitude of 1, 2, and 3 or more, by class, `[C, 3]` fp32, in steps.
        order: Coefficients in the order of their symbols, `[R, M]` int64.
    """

    def __init__(self, classes: torch.Tensor, steps: torch.Tensor, bits, offsets, order: torch.Tensor | None = None):
        if order is None:
            order = classes.to(torch.int32).argsort(dim=-1, stable=True)
        places = torch.empty(order.shape, dtype=torch.int32)
        places.scatter_(-1, order, torch.arange(order.shape[-1], dtype=torch.int32).expand(order.shape))
        self.order, self.classes, self.steps = order.to(torch.int32), classes.gather(-1, order), steps.float()
        scales, bits, offsets = (x.contiguous().numpy() for x in (self.steps, bits, offsets))
        self._forward = classes.contiguous().numpy(), places.numpy(), scales, bits, offsets
        self._back = self.order.numpy(), self.classes.numpy(), scales, offsets

    @property
    def points(self) -> tuple[np.float32, np.ndarray]:
        """Step of the first setting, and offsets."""
        return self._back[2][0], self._back[3]

    def quantise(self, x: torch.Tensor, which: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Coefficients `[n, M]` fp32, by settings `[n]` int64, to symbols `[n, M]` int32 and what they stand for.

        Returns:
            Symbols in the order of classes, and rebuilt coefficients `[n, M]` fp32 in their own order.
        """
        symbols, out = torch.empty(x.shape, dtype=torch.int32), torch.empty(x.shape)
        _quantise(x.contiguous().numpy(), which.numpy(), *self._forward, symbols.numpy(), out.numpy())
        return symbols, out

    def dequantise(self, symbols: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
        """Symbols `[n, M]` int32, by settings `[n]` int64, to rebuilt coefficients `[n, M]` fp32."""
        out = torch.empty(symbols.shape)
        _dequantise(symbols.numpy(), which.numpy(), *self._back, out.numpy())
        return out
