"""Quiet components of the sequence codec: the last of a part, all of whose coefficients are zero in most pages.

A part's components are in order of size. From some place on a page says by a flag of each whether it is *active*, has
coefficients other than zero. Only then it has symbols, behind those of the loud components; what they stand for is
added one by one, where the loud ones take a product of matrices.

Everything here that decides what is read is made of integers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numba import njit

from .symbol_tables import ESCAPE, LIMIT, TOTAL, SymbolTables

# Kinds of flags: octaves of how many coefficients of a component are expected not to be zero, from 1/64 to 4.
_EDGES = torch.tensor([TOTAL * 2**i // 64 for i in range(9)])
_ACTIVE = (30, 200, 1100, 1600, 1900, 2200, 2600, 3200, 3700, 4000)  # of 4096 of a kind, as measured: they cluster
KINDS = len(_ACTIVE)
COST = 3  # of adding an active component, in what one more takes in the product of matrices
_OPTIONS = {"cache": True, "nogil": True, "error_model": "numpy", "fastmath": {"contract"}}


def _frequencies() -> torch.Tensor:
    found = torch.zeros(KINDS, ESCAPE + 1, dtype=torch.int32)
    found[:, [LIMIT - 1, ESCAPE]] = 1  # a table is of -m .. m and an escape
    found[:, LIMIT + 1] = torch.tensor(_ACTIVE)
    found[:, LIMIT] = TOTAL - found.sum(1)
    return found.to(torch.uint16)


def with_flags(tables: SymbolTables) -> SymbolTables:
    """Tables with those of the flags behind them."""
    return SymbolTables(torch.cat([tables.frequencies, _frequencies()]))


def flag_kinds(classes: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Kind of each component's flag, `[W]` int64.

    Args:
        classes: Of every coefficient, `[P, W]`.
        bits: Code lengths of its values, `[C, 255]`; see `SymbolTables.bits`.
    """
    other = TOTAL - (TOTAL * 2.0 ** -bits[:, LIMIT].double()).round().long()  # the tables' own integers
    return torch.bucketize(other[classes.long()].sum(0), _EDGES, right=True)


def loud_count(kinds: torch.Tensor) -> int:
    """How many components are better not quiet, of flags of these kinds."""
    quiet = COST * torch.tensor(_ACTIVE)[kinds].flip(0).cumsum(0).flip(0)  # from each place on
    cost = torch.cat([quiet, quiet.new_zeros(1)]) + TOTAL * torch.arange(len(kinds) + 1)
    return int(cost.argmin())


class QuietComponents:
    """Those of all parts: which of them a page's streams hold, and what of.

    Args:
        flags: Kinds of each part's flags, `[d]` int64.
        classes: Of their coefficients at every shift, component by component, `[S, d, P]` uint8.
    """

    def __init__(self, flags: Sequence[torch.Tensor], classes: Sequence[torch.Tensor]):
        self.flags, self._classes = torch.cat(list(flags)), torch.cat(list(classes), 1)
        counts = torch.tensor([len(x) for x in flags])
        self._parts = len(flags)
        self._part = torch.arange(len(flags)).repeat_interleave(counts)
        self._number = torch.arange(len(self.flags)) - (counts.cumsum(0) - counts)[self._part]

    def classes(self, active: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
        """Classes of the symbols of a page's active components `[m]`, parts moved by `shifts [parts]`: `[m * P]`."""
        moved = shifts[self._part[active]] + len(self._classes) // 2
        return self._classes[moved, active].flatten()

    def by_part(self, pages: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[tuple[torch.Tensor, ...]]:
        """Active components `[m]` and symbols `[m, P]` of pages, as `add_active` takes them for each part."""
        active, symbols = map(torch.cat, zip(*pages, strict=True))
        page = torch.arange(len(pages)).repeat_interleave(torch.tensor([len(x) for x, _ in pages]))
        part = self._part[active]
        order = part.argsort(stable=True)
        counts = part.bincount(minlength=self._parts).tolist()
        return list(zip(*(x[order].split(counts) for x in (page, self._number[active], symbols)), strict=True))


@njit(**_OPTIONS)
def _are_active(symbols, out):
    for page in range(symbols.shape[0]):
        for component in range(symbols.shape[1]):
            found = np.int32(0)
            for at in range(symbols.shape[2]):
                found |= symbols[page, component, at]
            out[page, component] = found != 0


@njit(**_OPTIONS)
def _tokens(symbols, step, along, out):
    """What the coefficients of a component stand for, token by token."""
    out[:] = 0
    for at in range(symbols.size):
        if symbols[at] != 0:
            value, row = np.float32(symbols[at]) * step, along[at]
            for token in range(out.size):
                out[token] += value * row[token]


# Four components at a time, so that a page's numbers are read and written less often. They are all of one page: what it
# becomes does not depend on others.
@njit(**_OPTIONS)
def _add_active(pages, components, symbols, step, along, synthesis, first, out):
    size, width = symbols.shape[1], out.shape[1]
    tokens, rows = np.zeros((4, size), np.float32), np.zeros(4, np.int64)
    i = 0
    while i < pages.size:
        page, count = pages[i], 0
        while count < 4 and i < pages.size and pages[i] == page:
            rows[count] = first + components[i]
            _tokens(symbols[i], step, along, tokens[count])
            count, i = count + 1, i + 1
        tokens[count:] = 0
        one, two, three, four = synthesis[rows[0]], synthesis[rows[1]], synthesis[rows[2]], synthesis[rows[3]]
        for token in range(size):
            line = out[page * size + token]
            a, b, c, d = tokens[0, token], tokens[1, token], tokens[2, token], tokens[3, token]
            for at in range(width):
                line[at] += a * one[at] + b * two[at] + c * three[at] + d * four[at]


@njit(**_OPTIONS)
def _add_rows(rows, values, first, synthesis, out):
    for i in range(rows.size):
        line = out[rows[i]]
        for at in range(first, values.shape[1]):
            value, row = values[i, at], synthesis[at]
            if value != 0:
                for component in range(row.size):
                    line[component] += value * row[component]


def are_active(symbols: torch.Tensor) -> torch.Tensor:
    """Which components have any symbol but zeros, of `[N, d, P]` int32: `[N, d]` bool."""
    out = torch.empty(symbols.shape[:2], dtype=torch.bool)
    _are_active(symbols.numpy(), out.numpy())
    return out


def add_active(
    active, step: float, along: torch.Tensor, synthesis: torch.Tensor, first: int, out: torch.Tensor
) -> None:
    """Add to `out [N * P, W]` what active components of a part stand for.

    Args:
        active: Their pages `[m]`, numbers among the quiet ones `[m]` and symbols `[m, P]`.
        step: Of the quantiser.
        along: Transform of a page's tokens, `[P, P]`, rows are the basis.
        synthesis: What one unit of each component adds, `[W, W]`, those of the quiet ones from row `first` on.
    """
    pages, components, symbols, along, synthesis = (x.numpy() for x in (*active, along, synthesis))
    _add_active(pages, components, symbols, np.float32(step), along, synthesis, first, out.numpy())


def add_rows(rows: torch.Tensor, values: torch.Tensor, first: int, synthesis, out: torch.Tensor) -> None:
    """`out[rows] += values[:, first:] @ synthesis[first:]`, of `values [n, W]` most of which are zero."""
    _add_rows(rows.numpy(), values.numpy(), first, synthesis.numpy(), out.numpy())
