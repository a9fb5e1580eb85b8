"""The uniform quantiser: the nearest multiple of the step, which symbols stand for on both sides."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_seqkv.codec.uniform import UniformQuantizer

CLASSES, SETTINGS, WIDTH = 4, 3, 10
STEPS = torch.tensor([1.0, 0.37, 12.5])


def make(seed=0, width=WIDTH):
    """A quantiser of random classes, and these."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(0, CLASSES, (SETTINGS, width), dtype=torch.uint8, generator=generator)
    return UniformQuantizer(classes, STEPS), classes


def rows(count, width=WIDTH, spread=3.0):
    """Coefficients of all sizes, and the settings of each row."""
    return torch.randn(count, width) * spread ** torch.randn(count, width), torch.arange(count) % SETTINGS


def in_place(symbols, which, classes):
    """Symbols in the order of coefficients rather than of classes."""
    order = classes.int().argsort(dim=-1, stable=True)[which]
    return torch.empty_like(symbols).scatter_(1, order, symbols)


def test_symbols_are_the_nearest():
    quantiser, classes = make()
    x, which = rows(400)
    symbols, rebuilt = quantiser.quantise(x, which)
    exact = x.double() / STEPS.double()[which, None]
    found = in_place(symbols, which, classes)
    assert ((found - exact).abs() <= 0.5 + 1e-6 * exact.abs()).all()
    np.testing.assert_allclose(rebuilt, found * STEPS[which, None], rtol=1e-6, atol=0)


@given(st.integers(0, 40), st.integers(1, 30), st.floats(1, 30), st.integers(0, 9))
@settings(max_examples=60)
def test_what_is_rebuilt_is_what_symbols_stand_for(count, width, spread, seed):
    torch.manual_seed(seed)
    quantiser, _ = make(seed, width)
    x, which = rows(count, width, spread)
    symbols, rebuilt = quantiser.quantise(x, which)
    assert symbols.dtype == torch.int32
    assert torch.equal(quantiser.dequantise(symbols, which), rebuilt)


def test_errors_do_not_lean():
    """They average out: values are not moved towards zero, or away from it."""
    quantiser, _ = make(width=20_000)
    x = 1 + 8 * torch.rand(1, 20_000)
    error = quantiser.quantise(x, torch.zeros(1, dtype=torch.int64))[1] - x
    assert error.mean().abs() < 5 * (1 / 12 / 20_000) ** 0.5
    assert error.square().mean().item() == pytest.approx(1 / 12, rel=0.05)


def test_symbols_are_in_the_order_of_classes():
    quantiser, classes = make()
    assert torch.equal(quantiser.classes, classes.sort(stable=True).values)
    x, which = torch.arange(1.0, WIDTH + 1).expand(SETTINGS, -1) * 1000, torch.arange(SETTINGS)
    symbols, _ = quantiser.quantise(x, which)
    for row in range(SETTINGS):
        by_class = [v for c in range(CLASSES) for v in x[row][classes[row] == c].tolist()]
        expected = torch.tensor(by_class) / STEPS[row]
        assert (symbols[row] - expected).abs().max() <= 0.51  # far apart: the order shows


def test_an_order_may_be_given():
    _, classes = make()
    order = torch.arange(WIDTH).flip(0).expand(SETTINGS, -1)
    quantiser = UniformQuantizer(classes, STEPS, order)
    assert torch.equal(quantiser.classes, classes.flip(1))
    x, which = 1000 * torch.randn(SETTINGS, WIDTH), torch.arange(SETTINGS)
    symbols, rebuilt = quantiser.quantise(x, which)
    assert torch.equal(symbols.flip(1), (rebuilt / STEPS[:, None]).round().int())


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-38, -1e-38])
def test_nothing_stays_nothing(value):
    quantiser, _ = make()
    symbols, rebuilt = quantiser.quantise(torch.full((9, WIDTH), value), torch.arange(9) % SETTINGS)
    assert not symbols.any()
    assert not rebuilt.any()


@pytest.mark.parametrize("size", [1e3, 1e6, 1e8])
def test_huge_values_are_kept(size):
    """Far beyond the values that tables know: the error stays that of the step, or of fp32."""
    quantiser, _ = make()
    x, which = size * (1 + torch.rand(30, WIDTH)) * torch.tensor([1.0, -1.0]).repeat(WIDTH // 2), torch.arange(30) % 3
    _, rebuilt = quantiser.quantise(x, which)
    assert ((x - rebuilt).abs() <= STEPS[which, None] / 2 + 1e-6 * x.abs()).all()


@pytest.mark.parametrize("value", [3e38, -3e38, torch.inf, -torch.inf, torch.nan])
def test_what_no_integer_holds_is_clipped(value):
    quantiser, _ = make()
    symbols, rebuilt = quantiser.quantise(torch.full((3, WIDTH), value), torch.arange(3))
    assert (symbols == (-(2**30) if value < 0 else 2**30)).all()
    assert rebuilt.isfinite().all()
    assert torch.equal(quantiser.dequantise(symbols, torch.arange(3)), rebuilt)


@pytest.mark.parametrize("symbol", [-(2**31), 2**31 - 1])
def test_any_symbol_is_rebuilt(symbol):
    """A stored stream may hold what no coefficient gives."""
    quantiser, _ = make()
    rebuilt = quantiser.dequantise(torch.full((3, WIDTH), symbol, dtype=torch.int32), torch.arange(3))
    torch.testing.assert_close(rebuilt, (symbol * STEPS)[:, None].expand(3, WIDTH))


def test_threads_change_nothing():
    quantiser, _ = make()
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
