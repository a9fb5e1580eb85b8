"""Scalar codebooks: against the published tables, and against the definition of an optimum."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_seqkv.codec.quantize import distortion, fit_codebook, lloyd_max, nearest, uniform

# Mean squared error of the optimal quantiser of a unit Gaussian. Source: Max 1960, table 1.
MAX_MSE = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}
# The same for evenly spaced levels, and their optimal step. Source: Max 1960, table 2.
UNIFORM = {1: (1.596, 0.3634), 2: (0.9957, 0.1188), 3: (0.5860, 0.03744), 4: (0.3352, 0.01154)}
# D_mse as printed, digits cut. Source: TurboQuant, arXiv 2504.19874, theorem 1.
TURBOQUANT = {1: (0.36, 0.01), 2: (0.117, 0.001), 3: (0.03, 0.01), 4: (0.009, 0.001)}
LARGE = 4096  # a coordinate of a random vector of this length is Gaussian to four digits


def gaussian(count=1 << 16):
    """Quantiles of the unit Gaussian, `[count]` fp64: integrals over the density become plain means."""
    return torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)


def mse(x, levels):
    levels = levels.double()
    return (x - levels[nearest(x[None].float(), levels[None].float())[0].long()]).square().mean().item()


@pytest.mark.parametrize("make", [lloyd_max, uniform])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dim", [2, 16, 80, 128])
def test_levels_are_sorted_and_symmetric(make, bits, dim):
    levels = make(bits, dim)
    assert levels.shape == (2**bits,)
    assert levels.dtype == torch.float32
    assert (levels.diff() > 0).all()
    assert torch.equal(levels, -levels.flip(0))


@pytest.mark.parametrize("bits", MAX_MSE)
def test_distortion_is_max_s(bits):
    assert mse(gaussian(), lloyd_max(bits, LARGE)) == pytest.approx(MAX_MSE[bits], rel=0.01)


@pytest.mark.parametrize("bits", TURBOQUANT)
def test_distortion_is_turboquant_s(bits):
    printed, digit = TURBOQUANT[bits]
    assert printed <= mse(gaussian(), lloyd_max(bits, LARGE)) < printed + digit


@pytest.mark.parametrize("bits", UNIFORM)
def test_uniform_step_is_max_s(bits):
    step, error = UNIFORM[bits]
    levels = uniform(bits, LARGE)
    assert levels.diff().mean().item() == pytest.approx(step, rel=0.005)
    assert mse(gaussian(), levels) == pytest.approx(error, rel=0.01)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dim", [16, 128])
def test_uniform_step_is_the_best(bits, dim):
    x = sphere(dim)
    levels = uniform(bits, dim)
    best = mse(x, levels)
    assert best < mse(x, levels * 1.05)
    assert best < mse(x, levels * 0.95)


def sphere(dim, count=1 << 17):
    """Coordinates of random vectors of length `sqrt(dim)`, `[count]` fp64."""
    x = torch.randn(count // dim, dim, dtype=torch.float64)
    return (x / x.norm(dim=-1, keepdim=True) * dim**0.5).flatten()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dim", [16, 128])
def test_levels_are_centroids_of_their_cells(bits, dim):
    levels = lloyd_max(bits, dim)
    x = sphere(dim, 1 << 21)
    codes = nearest(x[None].float(), levels[None])[0].long()
    counts = codes.bincount(minlength=2**bits)
    means = torch.zeros(2**bits, dtype=torch.float64).index_add(0, codes, x) / counts
    # Five standard errors of the mean of each cell, which is narrower than one unit.
    assert ((means - levels).abs() < 5 / counts.sqrt()).all()
    assert mse(x, levels) < mse(x, uniform(bits, dim))


@pytest.mark.parametrize("bits", [0, 1, 2, 4])
@pytest.mark.parametrize("dim", [16, 128])
def test_distortion_is_what_is_measured(bits, dim):
    levels = lloyd_max(bits, dim) if bits else torch.zeros(1)
    assert mse(sphere(dim, 1 << 19), levels) == pytest.approx(distortion(bits, dim), rel=0.01)


floats = st.floats(-10, 10, width=32)


@given(st.integers(0, 5), st.data())
def test_nearest_is_brute_force(bits, data):
    heads, count = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 10))
    shared = data.draw(st.booleans())
    tables = 1 if shared else heads
    levels = data.draw(st.lists(floats, min_size=tables * 2**bits, max_size=tables * 2**bits))
    levels = torch.tensor(levels).reshape(tables, -1).sort(-1).values
    x = torch.tensor(data.draw(st.lists(floats, min_size=heads * count, max_size=heads * count))).reshape(heads, count)
    codes = nearest(x, levels)
    assert codes.dtype == torch.uint8
    assert codes.shape == x.shape
    distance = (x.double()[..., None] - levels.double()[:, None]).abs()
    chosen = distance.gather(-1, codes.long()[..., None])[..., 0]
    # The edge between two levels is rounded to fp32, so that a value beside it may go to the other side.
    assert (chosen - distance.min(-1).values <= 2e-6).all()


def test_nearest_keeps_the_shape_and_each_head_its_table():
    levels = torch.tensor([[-1.0, 1.0], [0.0, 10.0]])
    x = torch.tensor([[[0.5, -0.5]], [[6.0, 4.0]]])
    assert nearest(x, levels).tolist() == [[[1, 0]], [[1, 0]]]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_fit_recovers_lloyd_max(bits):
    fitted = fit_codebook(gaussian().float(), bits, iterations=300)
    assert torch.allclose(fitted, lloyd_max(bits, LARGE), atol=0.02)


@pytest.mark.parametrize("bits", range(1, 9))
def test_fit_of_gaussian_samples_is_as_good_as_lloyd_max(bits):
    x = torch.randn(1 << 16)
    assert mse(x.double(), fit_codebook(x, bits)) <= 1.01 * mse(x.double(), lloyd_max(bits, LARGE))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("draw", [torch.randn, torch.rand], ids=["gaussian", "flat"])
def test_fit_is_never_worse_than_uniform(bits, draw):
    x = draw(1 << 14)
    x = x / x.square().mean().sqrt()
    fitted = fit_codebook(x, bits)
    assert (fitted.diff() > 0).all()
    assert mse(x.double(), fitted) <= mse(x.double(), uniform(bits, LARGE))


def test_fit_of_few_samples_is_finite_and_sorted():
    fitted = fit_codebook(torch.tensor([0.5, 0.5, -1.0]), 3)
    assert fitted.isfinite().all()
    assert (fitted.diff() >= 0).all()
