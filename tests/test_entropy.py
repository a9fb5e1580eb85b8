"""The entropy coder: what goes in comes out, at the tables' price.

`tests/golden/entropy.stream` is a stream as an earlier version stored it; it must decode for ever. `python
tests/test_entropy.py` writes it anew, which is right only where the layout of streams changes.
"""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_seqkv.codec.entropy import decode, encode, lanes
from hf_seqkv.codec.symbol_tables import ESCAPE, LIMIT, TOTAL, SymbolTables

GOLDEN = Path(__file__).parent / "golden" / "entropy.stream"
VALUES = torch.arange(-LIMIT, LIMIT + 1)
INT32 = torch.iinfo(torch.int32)


def geometric(*ratios):
    """Counts `[C, 255]` that fall by a ratio with each step away from 0."""
    return 1e6 * torch.tensor(ratios, dtype=torch.float64)[:, None] ** VALUES.abs()


def table(*rows):
    """Tables from frequencies by value, what is left to 4096 for the escape."""
    frequencies = torch.zeros(len(rows), ESCAPE + 1, dtype=torch.int32)
    for row, given_row in zip(frequencies, rows, strict=True):
        for value, frequency in given_row.items():
            row[value + LIMIT] = frequency
        row[ESCAPE] = TOTAL - row.sum()
    return SymbolTables(frequencies.to(torch.uint16))


# One symbol, a skewed one, nothing but the escape's neighbours, a flat one, the widest, the rarest possible.
TABLES = SymbolTables(
    torch.cat(
        [
            SymbolTables.fit(geometric(1e-9, 0.01, 0.4, 0.9, 0.99)).frequencies.int(),
            table({0: 1}, {-1: 1, 0: TOTAL - 3, 1: 1}, {0: TOTAL - 1}).frequencies.int(),
        ]
    ).to(torch.uint16)
)
CLASSES = len(TABLES.frequencies)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def uint8(*values):
    return torch.tensor(values, dtype=torch.uint8)


def drawn(classes, tables, generator):
    """Symbols by their tables' frequencies; an escape is the first value out of range."""
    columns = torch.zeros(len(classes), dtype=torch.int32)
    for c, row in enumerate(tables.frequencies.double()):
        here = classes == c
        columns[here] = torch.multinomial(row, int(here.sum()), replacement=True, generator=generator).int()
    limits = ((tables.frequencies[:, :ESCAPE].int() > 0).sum(1) - 1) // 2
    return torch.where(columns == ESCAPE, limits[classes.long()].int() + 1, columns - LIMIT)


def ideal_bits(symbols, classes, tables):
    return tables.bits().double()[classes.long(), symbols.long() + LIMIT].sum().item()


# Round trips.

any_value = st.one_of(
    st.integers(-2, 2), st.integers(-LIMIT - 2, LIMIT + 2), st.sampled_from([INT32.min, INT32.max, -(2**15)])
)


@given(st.lists(st.tuples(any_value, st.integers(0, CLASSES - 1)), max_size=200))
@settings(max_examples=300)
def test_round_trip(pairs):
    symbols, classes = int32(*(v for v, _ in pairs)), uint8(*(c for _, c in pairs))
    decoded = decode(encode(symbols, classes, TABLES), classes, TABLES)
    assert decoded.dtype == torch.int32
    assert torch.equal(decoded, symbols)


@given(st.integers(0, 2**20), st.booleans(), st.floats(0, 0.2))
@settings(max_examples=30)
def test_round_trip_of_long_streams(count, runs, escapes):
    generator = torch.Generator().manual_seed(count)
    classes = torch.randint(0, CLASSES, (count,), dtype=torch.uint8, generator=generator)
    classes = classes.sort().values if runs else classes
    symbols = torch.randn(count, generator=generator).mul(2).round().int()
    wild = torch.rand(count, generator=generator) < escapes
    symbols[wild] = torch.randint(INT32.min, INT32.max, (int(wild.sum()),), generator=generator).int()
    assert torch.equal(decode(encode(symbols, classes, TABLES), classes, TABLES), symbols)


@pytest.mark.parametrize("value", [INT32.min, INT32.max, -LIMIT - 1, -LIMIT, -1, 0, 1, LIMIT, LIMIT + 1])
@pytest.mark.parametrize("count", [1, 40_000])
def test_one_value_in_every_class(value, count):
    for c in range(CLASSES):
        symbols, classes = torch.full((count,), value, dtype=torch.int32), torch.full((count,), c, dtype=torch.uint8)
        assert torch.equal(decode(encode(symbols, classes, TABLES), classes, TABLES), symbols)


def test_int16_gives_the_same_bytes():
    symbols, classes = torch.arange(-(2**15), 2**15), torch.arange(2**16) % CLASSES
    wide, narrow = symbols.int(), symbols.to(torch.int16)
    assert encode(wide, classes.byte(), TABLES) == encode(narrow, classes.byte(), TABLES)


def test_views_are_coded_as_what_they_show():
    symbols, classes = torch.arange(-300, 300).int(), (torch.arange(600) % CLASSES).byte()
    data = encode(symbols[::3], classes[::3], TABLES)
    assert data == encode(symbols[::3].clone(), classes[::3].clone(), TABLES)
    assert torch.equal(decode(data, classes[::3], TABLES), symbols[::3])


def test_256_classes():
    tables = SymbolTables.fit(geometric(*(0.9 * c / 255 for c in range(256))))
    classes = torch.arange(256).byte().repeat(3)
    symbols = torch.arange(768).int() % 5 - 2
    assert torch.equal(decode(encode(symbols, classes, tables), classes, tables), symbols)


# The layout, read by the rules of the module's docstring and nothing else.


def read_in_lock_step(data, classes, tables):
    count = len(classes)
    step = lanes(count)
    words = int.from_bytes(data[:4], "little")
    states = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "little") for i in range(step)]
    at, escapes = 4 + 4 * step, data[4 + 4 * step + 2 * words :]
    rows = tables.frequencies.tolist()
    values = []
    for i in range(count):
        lane, row = i % step, rows[classes[i]]
        slot = states[lane] % 4096
        start = column = 0
        while slot >= start + row[column]:
            start += row[column]
            column += 1
        states[lane] = row[column] * (states[lane] // 4096) + slot - start
        if states[lane] < 2**16:
            states[lane] = states[lane] * 2**16 + int.from_bytes(data[at : at + 2], "little")
            at += 2
        value, limit = column - 127, (sum(f > 0 for f in row[:255]) - 1) // 2
        if column == 255:
            code = size = 0
            while True:
                code |= (escapes[size] & 127) << 7 * size
                size += 1
                if escapes[size - 1] < 128:
                    break
            escapes = escapes[size:]
            excess = code // 2 if code % 2 == 0 else -(code + 1) // 2
            value = excess + limit + 1 if excess >= 0 else excess - limit
        values.append(value)
    assert at == 4 + 4 * step + 2 * words
    assert states == [2**16] * step
    assert escapes == b""
    return values


@pytest.mark.parametrize("count", [0, 1, 500, 33_001, 70_000])
def test_layout(count):
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(0, CLASSES, (count,), dtype=torch.uint8, generator=generator)
    symbols = torch.randn(count, generator=generator).mul(3).round().int()
    symbols[::37] = 1000
    symbols[5::41] = -(2**31)
    assert read_in_lock_step(encode(symbols, classes, TABLES), classes.tolist(), TABLES) == symbols.tolist()


def test_lanes():
    counts = [0, 1, 20_000, 2**15 - 1, 2**15, 2**16, 3 * 2**16, 2**19 - 1, 2**19, 10**9]
    assert [lanes(n) for n in counts] == [1, 1, 1, 1, 2, 4, 8, 16, 32, 32]


def golden_inputs():
    """Tables, classes and symbols of the golden stream, the same on every machine."""
    tables = table({-1: 40, 0: 4000, 1: 50}, {v: 60 - 5 * abs(v) for v in range(-9, 10)}, {0: 4095})
    index = torch.arange(33_001)
    classes = (index // 700 % 3).byte()
    noise = index * index * 7 % 1009 * (index % 13)
    symbols = torch.where(classes == 1, noise % 19 - 9, (noise % 31 == 1).long() - (noise % 37 == 2).long())
    symbols[::1999] = (index - 16_000)[::1999] * 90_000
    return tables, classes, symbols.int()


def test_golden_stream():
    tables, classes, symbols = golden_inputs()
    stored = GOLDEN.read_bytes()
    assert torch.equal(decode(stored, classes, tables), symbols)
    assert encode(symbols, classes, tables) == stored


# Rates.


def test_bits_are_what_a_symbol_costs():
    tables = table({-1: 128, 0: 2048, 1: 1024}, {0: 4095})
    bits = tables.bits()
    assert bits.dtype == torch.float32
    assert bits.shape == (2, 2 * LIMIT + 1)
    row = dict(zip(VALUES.tolist(), bits[0].tolist(), strict=True))
    escape = 12 - math.log2(4096 - 128 - 2048 - 1024)
    assert [row[-1], row[0], row[1]] == [5, 1, 2]
    # One byte carries 64 values on either side of the range, two carry the rest.
    for value in (-65, -2, 2, 65):
        assert row[value] == pytest.approx(escape + 8)
    for value in (-LIMIT, -66, 66, LIMIT):
        assert row[value] == pytest.approx(escape + 16)
    assert bits[1, LIMIT + 1] == 12 + 8
    for value in (-66, -65, 65, 66):
        many = torch.full((30_000,), value, dtype=torch.int32)
        spent = len(encode(many, torch.zeros(30_000, dtype=torch.uint8), tables)) * 8 / 30_000
        assert spent == pytest.approx(row[value], rel=0.001)


@pytest.mark.parametrize("ratio", [0.001, 0.02, 0.2, 0.6, 0.95])
@pytest.mark.parametrize("count", [300_000, 700_000])
def test_streams_cost_what_the_tables_say(ratio, count):
    # Beyond what the states cost: the words themselves are within 0.02 % of the ideal.
    tables = SymbolTables.fit(geometric(ratio, ratio / 2))
    classes = (torch.arange(count) // 500 % 2).byte()
    symbols = drawn(classes, tables, torch.Generator().manual_seed(1))
    ideal = ideal_bits(symbols, classes, tables)
    spent = len(encode(symbols, classes, tables)) * 8
    states = 32 * lanes(count) + 32
    assert ideal * 0.9998 <= spent <= ideal * 1.0002 + states
    if ideal > 0.5 * count:
        assert spent <= ideal * 1.005


def test_short_streams_are_not_dominated_by_states():
    tables = SymbolTables.fit(geometric(0.07))
    classes = torch.zeros(20_000, dtype=torch.uint8)
    symbols = drawn(classes, tables, torch.Generator().manual_seed(2))
    ideal = ideal_bits(symbols, classes, tables)
    assert 0.55 * 20_000 < ideal < 0.75 * 20_000
    assert len(encode(symbols, classes, tables)) * 8 <= 1.01 * ideal
