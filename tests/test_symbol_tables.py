"""Symbol tables: those that are fitted are close to the entropy, and what is none is refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_entropy import VALUES, geometric, table

from hf_seqkv.codec.symbol_tables import ESCAPE, LIMIT, TOTAL, SymbolTables, code_lengths
from hf_seqkv.errors import FormatError


def laplacian(edges, sigma):
    half = 0.5 * torch.exp(-edges.abs() * 2**0.5 / sigma)
    return torch.where(edges < 0, half, 1 - half)


def gaussian(edges, sigma):
    return 0.5 * (1 + torch.erf(edges / (sigma * 2**0.5)))


@pytest.mark.parametrize("sigma", [0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 4, 8, 16, 25, 40])
@pytest.mark.parametrize("distribution", [laplacian, gaussian])
def test_fit_is_close_to_the_entropy(distribution, sigma):
    values = torch.arange(-2000, 2001)
    p = (distribution(values + 0.5, sigma) - distribution(values - 0.5, sigma)).double().clamp_min(0)
    inside = values.abs() <= LIMIT
    tables = SymbolTables.fit(1e6 * p[None, inside], 1e6 * p[None, ~inside].sum(-1))
    bits = torch.zeros(len(values), dtype=torch.float64)
    bits[inside] = tables.bits()[0].double()
    escape, limit = int(tables.frequencies[0, ESCAPE]), int((tables.frequencies[0, :ESCAPE].int() > 0).sum()) // 2
    bits[~inside] = 12 - math.log2(escape) + 8 + 8 * (values[~inside].abs() - limit > 64).double()
    entropy = -(p * p.clamp_min(1e-300).log2()).sum()
    # An escape takes 1 / 4096 of every table, which counts where nearly all values are zero.
    assert entropy - 1e-9 <= (p * bits).sum() <= 1.003 * entropy + 1.1 * math.log2(math.e) / TOTAL


@given(st.lists(st.lists(st.integers(0, 10**6), min_size=1, max_size=255), min_size=1, max_size=4), st.data())
@settings(max_examples=30)
def test_fit_gives_tables(rows, data):
    counts = torch.zeros(len(rows), 2 * LIMIT + 1)
    for row, drawn_row in zip(counts, rows, strict=True):
        at = data.draw(st.integers(0, 255 - len(drawn_row)))
        row[at : at + len(drawn_row)] = torch.tensor(drawn_row).float()
    beyond = torch.tensor(data.draw(st.lists(st.integers(0, 10**6), min_size=len(rows), max_size=len(rows))))
    tables = SymbolTables.fit(counts, beyond)
    frequencies = tables.frequencies
    assert frequencies.dtype == torch.uint16
    assert frequencies.shape == (len(rows), 256)
    assert (frequencies.int().sum(1) == TOTAL).all()
    assert (frequencies[:, [LIMIT, ESCAPE]].int() >= 1).all()
    assert torch.equal(SymbolTables.fit(counts.long(), beyond.float()).frequencies, frequencies)
    alone = [SymbolTables.fit(counts[i : i + 1], beyond[i : i + 1]).frequencies for i in range(len(rows))]
    assert torch.equal(torch.cat(alone), frequencies)


def test_no_move_of_one_unit_saves_anything():
    counts = geometric(0.1, 0.5, 0.8) * (1 + 0.3 * torch.cos(VALUES * 1.7))
    tables = SymbolTables.fit(counts)
    for row, weights in zip(tables.frequencies.int(), counts, strict=True):
        inside = row[:ESCAPE] > 0
        weights = torch.cat([weights[inside], weights[~inside].sum()[None]])
        f = torch.cat([row[:ESCAPE][inside], row[ESCAPE:]]).double()
        gain = (weights * torch.log2(1 + 1 / f)).max()
        loss = (weights * torch.log2(f / (f - 1)))[f > 1].min()
        assert gain <= loss * (1 + 1e-3)  # the fit's weights are smoothed


def test_what_was_never_counted_stays_cheap():
    bits = SymbolTables.fit(torch.zeros(1, 2 * LIMIT + 1)).bits()[0]
    assert bits[LIMIT] < 1
    assert bits[LIMIT + 1] < 4
    few = torch.zeros(1, 2 * LIMIT + 1)
    few[0, LIMIT] = few[0, LIMIT + 3] = 5
    assert SymbolTables.fit(few).bits()[0, LIMIT - 2] < 8


NO_TABLES = {
    "sum": {-1: 50, 0: 4000, 1: 40, "escape": 7},
    "hole": {-1: 50, 1: 40, "escape": 4006},
    "one-sided": {0: 4000, 1: 40, "escape": 56},
    "not around zero": {0: 4000, 1: 40, 2: 50, "escape": 6},
    "no escape": {-1: 50, 0: 4000, 1: 46},
    "only an escape": {"escape": 4096},
    "nothing": {},
}


@pytest.mark.parametrize("row", NO_TABLES.values(), ids=NO_TABLES)
def test_what_is_no_table_is_refused(row):
    frequencies = torch.zeros(2, ESCAPE + 1, dtype=torch.int32)
    frequencies[0] = table({0: 4000}).frequencies[0].int()
    for value, frequency in row.items():
        frequencies[1, ESCAPE if value == "escape" else value + LIMIT] = frequency
    with pytest.raises(FormatError, match="class 1"):
        SymbolTables(frequencies.to(torch.uint16))


@pytest.mark.parametrize("shape", [(3, 255), (257, 256), (0, 256), (256,), ()])
def test_tables_of_another_shape_are_refused(shape):
    with pytest.raises(FormatError, match="C from 1 to 256"):
        SymbolTables(torch.zeros(shape, dtype=torch.uint16))


def test_code_lengths_are_sums_of_prices():
    """Of every row in every setting; a value beyond the tables counts as the last in them."""
    count, settings_, width = 4, 3, 10
    ratios = torch.tensor([0.01, 0.4, 0.8, 0.97], dtype=torch.float64)[:, None]
    bits = SymbolTables.fit(1e4 * ratios ** torch.arange(-LIMIT, LIMIT + 1).abs()).bits()
    classes, moves = torch.randint(count, (width,)).byte(), torch.randint(count, (settings_, count)).byte()
    symbols = torch.randint(-LIMIT - 40, LIMIT + 40, (33, width), dtype=torch.int32)
    found = code_lengths(symbols, classes, moves, bits)
    assert found.shape == (33, settings_)
    columns = symbols.long().clamp(-LIMIT, LIMIT) + LIMIT
    for setting, move in enumerate(moves.long()):
        expected = bits.double()[move[classes.long()], columns].sum(1)
        torch.testing.assert_close(found[:, setting].double(), expected, rtol=1e-5, atol=0)
