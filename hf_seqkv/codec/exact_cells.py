"""The normal distribution as the exact codec's coder has it, and the cells of codebooks in it."""

from __future__ import annotations

import functools
from decimal import Decimal, localcontext

import numpy as np

TOTAL_BITS = 14
TOTAL = 1 << TOTAL_BITS
EDGE = 4096.0  # units of the edges of cells
_PER_DEVIATION, _RANGE = 128, 8  # of the table: entries a deviation, and deviations either way
LAST = 2.0 * _RANGE * _PER_DEVIATION  # entry


@functools.cache
def normal_table() -> np.ndarray:
    """`2**16` times the normal distribution function from -8 to 8 deviations, `[2049]` int64, the ends 0 and `2**16`.

    In decimal arithmetic, which is the same on every machine.
    """
    half = []
    with localcontext() as context:
        context.prec = 60
        pi = Decimal("3.14159265358979323846264338327950288419716939937510582097494")
        factor = 65536 / (2 * pi).sqrt()
        for i in range(_RANGE * _PER_DEVIATION + 1):
            x = Decimal(i) / _PER_DEVIATION
            term, total, k = x, x, 0
            while abs(term) > Decimal("1e-20"):  # x + x^3 / 3 + x^5 / 15 + ..., times the density, is the integral
                k += 1
                term *= x * x / (2 * k + 1)
                total += term
            half.append(int((32768 + factor * (-x * x / 2).exp() * total).to_integral_value()))
    upper = np.array(half, np.int64)
    upper[-1] = 1 << 16
    return np.concatenate([(1 << 16) - upper[:0:-1], upper])


@functools.cache
def interval_tables() -> np.ndarray:
    """The same, scaled to what `2**width` codes leave of the interval, of each width; `[9, 2049]` int64."""
    return np.stack([(normal_table() * (TOTAL - (1 << width))) >> 16 for width in range(9)])


def cells(levels: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Edges of codebooks `[R, 256]` fp32 of `widths [R]`, in units of the coder, `[R, 257]`; `j` is below code `j`."""
    edges = np.full((len(levels), 257), np.inf)
    wide = levels.astype(np.float64)
    for edge, level, width in zip(edges, wide, widths, strict=True):
        count = 1 << width
        edge[0], edge[1:count] = -np.inf, np.rint((level[1:count] + level[: count - 1]) * (EDGE / 2))
    return edges


@functools.cache
def scale_cells() -> np.ndarray:
    """The same of scales, in sixteenths of a unit: of low bytes, and of high bytes. `[2, 257]`."""
    at = np.arange(257.0)
    edges = np.stack([16 * at - 8, 4096 * at - 8])
    edges[:, 0], edges[:, 256] = -np.inf, np.inf
    return edges
