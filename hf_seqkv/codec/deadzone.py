"""The sequence codec's scalar quantiser: uniform steps, rounding that minds the rate, fitted reconstruction points.

A coefficient `x` in units of its step becomes the integer `q` among its rounding, the one nearer to zero, and zero with
the least `(x - q)**2 + LAMBDA * bits(q)`; it is rebuilt as `q` moved by a fitted offset of its class towards zero.

Source: entropy-constrained scalar quantisation, Sullivan, "Efficient scalar quantization of exponential and Laplacian
random variables", 1996. `LAMBDA` is `6 ln 2 / 36`, the slope of distortion against rate of a uniform quantiser.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numba import njit

from .symbol_tables import LIMIT

LAMBDA = 0.1155
OFFSETS = 3  # magnitudes with a reconstruction point of their own: 1, 2, and 3 with all above
LEAST = 1 << 16  # coefficients that are worth a thread
_MOST = np.float32(2**30)  # a symbol fits 32 bits whatever the coefficient
_OPTIONS = {"cache": True, "nogil": True, "error_model": "numpy"}


@njit(**_OPTIONS)
def _quantise(x, which, order, classes, scales, bits, offsets, symbols, out):
    for row in range(x.shape[0]):
        table = which[row]
        scale, inverse = scales[table], np.float32(1) / scales[table]
        for at in range(order.shape[1]):
            position, kind = order[table, at], classes[table, at]
            value = x[row, position] * inverse
            size = min(abs(value), _MOST)
            best = np.int64(size + np.float32(0.5))
            if best > 0:
                rounded = best
                cost = np.float32(np.inf)
                for candidate in (rounded, rounded - 1, 0):
                    column = min(candidate, LIMIT)
                    price = bits[kind, LIMIT + column if value > 0 else LIMIT - column]
                    gap = size - np.float32(candidate)
                    total = gap * gap + np.float32(LAMBDA) * price
                    if total < cost:
                        cost, best = total, candidate
            symbols[row, at] = best if value > 0 else -best
            rebuilt = np.float32(0)
            if best > 0:
                rebuilt = (np.float32(best) + offsets[kind, min(best, OFFSETS) - 1]) * scale
            out[row, position] = rebuilt if value > 0 else -rebuilt


@njit(**_OPTIONS)
def _dequantise(symbols, which, order, classes, scales, offsets, out):
    for row in range(symbols.shape[0]):
        table = which[row]
        scale = scales[table]
        for at in range(order.shape[1]):
            symbol = np.int64(symbols[row, at])  # the least int32 has no magnitude
            rebuilt = np.float32(0)
            if symbol != 0:
                offset = offsets[classes[table, at], min(abs(symbol), OFFSETS) - 1]
                rebuilt = (np.float32(symbol) + (offset if symbol > 0 else -offset)) * scale
            out[row, order[table, at]] = rebuilt


@njit(**_OPTIONS)
def _code_lengths(symbols, classes, bits, out):
    out[:] = 0
    for row in range(symbols.shape[0]):
        for at in range(symbols.shape[1]):
            column = max(min(symbols[row, at], LIMIT), -LIMIT) + LIMIT
            for setting in range(classes.shape[1]):
                out[row, setting] += bits[classes[at, setting], column]


def code_lengths(symbols: torch.Tensor, classes: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Bits that rows of symbols take if their classes were these.

    Args:
        symbols: `[n, M]` int32.
        classes: `[S, M]` uint8.
        bits: As in `DeadZone`.

    Returns:
        `[n, S]` fp32; a value beyond the tables counts as the last in them.
    """
    out = torch.empty(len(symbols), len(classes))
    _on_threads(
        _code_lengths, (symbols.contiguous(),), (classes.T.contiguous().numpy(), bits.contiguous().numpy()), (out,)
    )
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

    def dequantise(self, symbols: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
        """Symbols `[n, M]` int32 to rebuilt coefficients `[n, M]` fp32."""
        out = torch.empty(symbols.shape)
        tables = (self._order, self._kinds, self._scales, self._offsets)
        _on_threads(_dequantise, (symbols, which), tables, (out,))
        return out


def _on_threads(kernel: Callable, inputs: tuple, tables: tuple, outputs: tuple) -> None:
    """Run a kernel over rows, a part of them on each of torch's threads; no result depends on the parts."""
    count = len(inputs[0])
    threads = max(1, min(torch.get_num_threads(), count, inputs[0].numel() // LEAST))
    rows = [slice(count * i // threads, count * (i + 1) // threads) for i in range(threads)]
    inputs, outputs = ([t.numpy() for t in group] for group in (inputs, outputs))

    def part(span: slice) -> None:
        kernel(*(t[span] for t in inputs), *tables, *(t[span] for t in outputs))

    if threads == 1:
        part(rows[0])
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(part, rows))
