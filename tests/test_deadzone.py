"""The dead-zone quantiser: symbols minimise what its docstring says, and stand for the same on both sides."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_seqkv.codec.deadzone import LAMBDA, OFFSETS, DeadZone, code_lengths
from hf_seqkv.codec.symbol_tables import LIMIT, SymbolTables

CLASSES, SETTINGS, WIDTH = 4, 3, 10


def zone(seed=0, width=WIDTH, **change):
    """A quantiser of random classes, and its arguments."""
    generator = torch.Generator().manual_seed(seed)
    ratios = torch.tensor([0.01, 0.4, 0.8, 0.97], dtype=torch.float64)[:, None]
    counts = 1e4 * ratios ** torch.arange(-LIMIT, LIMIT + 1).abs()
    given_ = {
        "classes": torch.randint(0, CLASSES, (SETTINGS, width), dtype=torch.uint8, generator=generator),
        "steps": torch.tensor([1.0, 0.37, 12.5]),
        "bits": SymbolTables.fit(counts).bits(),
        "offsets": -torch.rand(CLASSES, OFFSETS, generator=generator) / 3,
    } | change
    return DeadZone(**given_), given_


def rows(count, width=WIDTH, spread=3.0):
    """Coefficients of all sizes, and the settings of each row."""
    return torch.randn(count, width) * spread ** torch.randn(count, width), torch.arange(count) % SETTINGS


def by_rule(x, which, made):
    """For every coefficient, as the module's docstring has it: its candidates, and the cost of each; `[n, M, 3]`."""
    size = np.abs(x.double().numpy() / made["steps"].double().numpy()[which, None])
    sign = np.where(x.numpy() > 0, 1, -1)
    rounded = np.floor(size + 0.5)
    candidates = np.stack([rounded, np.maximum(rounded - 1, 0), np.zeros_like(rounded)], -1)
    kinds = made["classes"].numpy()[which][..., None]
    columns = LIMIT + sign[..., None] * np.minimum(candidates, LIMIT).astype(int)
    price = made["bits"].double().numpy()[kinds, columns]
    return sign[..., None] * candidates, (size[..., None] - candidates) ** 2 + LAMBDA * price


def in_place(symbols, which, made):
    """Symbols in the order of coefficients rather than of classes."""
    order = made["classes"].int().argsort(dim=-1, stable=True)[which]
    return torch.empty_like(symbols).scatter_(1, order, symbols)


def test_symbols_cost_least():
    quantiser, made = zone()
    x, which = rows(400)
    symbols = in_place(quantiser.quantise(x, which)[0], which, made).numpy()
    candidates, costs = by_rule(x, which.numpy(), made)
    chosen = np.where(candidates == symbols[..., None], costs, np.inf).min(-1)
    assert np.isfinite(chosen).all()  # one of the candidates
    least = costs.min(-1)
    assert (chosen <= least + 1e-4 * (1 + least)).all()  # but for ties within rounding
    assert (np.abs(symbols) < np.abs(candidates[..., 0])).mean() > 0.02  # the rate has a say


def test_offsets_move_symbols():
    quantiser, made = zone()
    x, which = rows(400)
    symbols, rebuilt = quantiser.quantise(x, which)
    symbols = in_place(symbols, which, made).numpy()
    size = np.abs(symbols)
    offset = made["offsets"].numpy()[made["classes"].numpy()[which], np.minimum(np.maximum(size, 1), OFFSETS) - 1]
    expected = np.sign(symbols) * (size + np.where(size > 0, offset, 0)) * made["steps"].numpy()[which, None]
    np.testing.assert_allclose(rebuilt.numpy(), expected, rtol=1e-6, atol=0)


@given(st.integers(0, 40), st.integers(1, 30), st.floats(1, 30), st.integers(0, 9))
@settings(max_examples=60)
def test_what_is_rebuilt_is_what_symbols_stand_for(count, width, spread, seed):
    torch.manual_seed(seed)
    quantiser, _ = zone(seed, width)
    x, which = rows(count, width, spread)
    symbols, rebuilt = quantiser.quantise(x, which)
    assert symbols.dtype == torch.int32
    assert torch.equal(quantiser.dequantise(symbols, which), rebuilt)


def test_symbols_are_in_the_order_of_classes():
    quantiser, made = zone()
    assert torch.equal(quantiser.classes, made["classes"].sort(stable=True).values)
    x, which = torch.arange(1.0, WIDTH + 1).expand(SETTINGS, -1) * 1000, torch.arange(SETTINGS)
    symbols, _ = quantiser.quantise(x, which)
    for row in range(SETTINGS):
        by_class = [v for c in range(CLASSES) for v in x[row][made["classes"][row] == c].tolist()]
        expected = torch.tensor(by_class) / made["steps"][row]
        assert (symbols[row] - expected).abs().max() <= 1.5  # far apart: the order shows


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-38, -1e-38])
def test_nothing_stays_nothing(value):
    quantiser, _ = zone()
    symbols, rebuilt = quantiser.quantise(torch.full((9, WIDTH), value), torch.arange(9) % SETTINGS)
    assert not symbols.any()
    assert not rebuilt.any()


@pytest.mark.parametrize("size", [1e3, 1e6, 1e8])
def test_huge_values_are_kept(size):
    """Far beyond the values that tables know: the error stays that of the step, or of fp32."""
    quantiser, made = zone()
    x, which = size * (1 + torch.rand(30, WIDTH)) * torch.tensor([1.0, -1.0]).repeat(WIDTH // 2), torch.arange(30) % 3
    _, rebuilt = quantiser.quantise(x, which)
    assert ((x - rebuilt).abs() <= 2 * made["steps"][which, None] + 1e-6 * x.abs()).all()


@pytest.mark.parametrize("value", [3e38, -3e38, torch.inf, -torch.inf])
def test_what_no_integer_holds_is_clipped(value):
    quantiser, _made = zone()
    symbols, rebuilt = quantiser.quantise(torch.full((3, WIDTH), value), torch.arange(3))
    assert (symbols == (2**30 if value > 0 else -(2**30))).all()
    assert rebuilt.isfinite().all()
    assert torch.equal(quantiser.dequantise(symbols, torch.arange(3)), rebuilt)


@pytest.mark.parametrize("symbol", [-(2**31), 2**31 - 1])
def test_any_symbol_is_rebuilt(symbol):
    """A stored stream may hold what no coefficient gives."""
    quantiser, made = zone()
    rebuilt = quantiser.dequantise(torch.full((3, WIDTH), symbol, dtype=torch.int32), torch.arange(3))
    torch.testing.assert_close(rebuilt, (symbol * made["steps"])[:, None].expand(3, WIDTH))


def test_a_dearer_symbol_is_avoided():
    """Of two classes that differ in the price of a one alone, the dearer keeps it for values closer to it."""
    bits = torch.full((2, 2 * LIMIT + 1), 20.0)
    bits[:, LIMIT] = 1
    bits[0, LIMIT + 1], bits[1, LIMIT + 1] = 1, 5
    classes = torch.tensor([[0] * 100 + [1] * 100], dtype=torch.uint8)
    quantiser = DeadZone(classes, torch.ones(1), bits, torch.zeros(2, OFFSETS))
    x = torch.linspace(0.01, 0.99, 100).repeat(2)[None]
    symbols, _ = quantiser.quantise(x, torch.zeros(1, dtype=torch.int64))
    ends = [x[0, :100][row == 1].min().item() for row in symbols[0].view(2, 100)]
    assert ends[0] == pytest.approx(0.5, abs=0.011)
    assert ends[1] == pytest.approx(0.5 + LAMBDA * 4 / 2, abs=0.011)  # where the squared errors differ by the price


def test_code_lengths_are_sums_of_prices():
    """Of every row in every setting; a value beyond the tables counts as the last in them."""
    _, made = zone()
    classes, moves = made["classes"][0], torch.randint(0, CLASSES, (SETTINGS, CLASSES), dtype=torch.uint8)
    symbols = torch.randint(-LIMIT - 40, LIMIT + 40, (33, WIDTH), dtype=torch.int32)
    found = code_lengths(symbols, classes, moves, made["bits"])
    assert found.shape == (33, SETTINGS)
    columns = symbols.long().clamp(-LIMIT, LIMIT) + LIMIT
    for setting, move in enumerate(moves.long()):
        expected = made["bits"].double()[move[classes.long()], columns].sum(1)
        torch.testing.assert_close(found[:, setting].double(), expected, rtol=1e-5, atol=0)


def test_threads_change_nothing():
    quantiser, _ = zone()
    x, which = rows(100)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            symbols, rebuilt = quantiser.quantise(x, which)
            results.append((symbols, rebuilt, quantiser.dequantise(symbols, which)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
