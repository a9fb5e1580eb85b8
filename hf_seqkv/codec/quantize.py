"""Scalar codebooks and the nearest-level search.

A codebook is a sorted tensor of levels for coordinates of unit variance. Codes are indices into it, `uint8`.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

_GRID = 1 << 17


@functools.lru_cache(maxsize=16)
def _sphere_density(dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Grid and probabilities of `sqrt(dim) * u_1` for `u` uniform on the unit sphere of `R^dim`.

    Source: TurboQuant, arXiv 2504.19874, lemma 1: density proportional to `(1 - x^2)^((dim - 3) / 2)`.
    """
    dim = max(dim, 4)  # below that the density has no interior mode; one extra coordinate is the closest that has
    x = (np.arange(_GRID) + 0.5) / _GRID * 2 - 1
    log_density = (dim - 3) / 2 * np.log1p(-(x**2))
    weights = np.exp(log_density - log_density.max())
    return x * np.sqrt(dim), weights / weights.sum()


class _Cells:
    """Conditional means and error of the cells around levels, over sorted values `x` with weights."""

    def __init__(self, x: np.ndarray, weights: np.ndarray):
        self.x = x
        self.mass = np.concatenate([[0.0], np.cumsum(weights)])
        self.moment = np.concatenate([[0.0], np.cumsum(weights * x)])
        self.power = float((weights * x**2).sum())

    def centroids(self, levels: np.ndarray) -> tuple[np.ndarray, float]:
        """Centroids of the cells of `levels`, and the mean squared error of these centroids."""
        edges = np.concatenate([[0], np.searchsorted(self.x, (levels[1:] + levels[:-1]) / 2), [len(self.x)]])
        cell = np.diff(self.mass[edges])
        means = np.where(cell > 0, np.diff(self.moment[edges]) / np.maximum(cell, 1e-300), levels)
        return means, self.power - float((cell * means**2).sum())


@functools.lru_cache(maxsize=32)
def lloyd_max(bits: int, dim: int) -> torch.Tensor:
    """Lloyd–Max levels for a coordinate of a random vector of length `sqrt(dim)`, `[2**bits]` fp32, symmetric.

    Source: Lloyd 1982; TurboQuant, arXiv 2504.19874, eq. 4.
    """
    x, weights = _sphere_density(dim)
    # Panter–Dite start: levels at the quantiles of the cube root of the density.
    companded = np.cumsum(weights ** (1 / 3))
    levels = x[np.searchsorted(companded / companded[-1], (np.arange(2**bits) + 0.5) / 2**bits)]
    cells = _Cells(x, weights)
    for _ in range(1000):
        new, _ = cells.centroids(levels)
        moved = np.abs(new - levels).max()
        levels = new
        if moved < 1e-9:
            break
    return torch.from_numpy((levels - levels[::-1]) / 2).float()


@functools.lru_cache(maxsize=32)
def uniform(bits: int, dim: int) -> torch.Tensor:
    """Evenly spaced levels with the step that minimises the mean squared error of the same coordinate."""
    x, weights = _sphere_density(dim)
    unit = np.arange(2**bits) - (2**bits - 1) / 2

    def error(step):
        index = np.clip(np.floor(x / step + 2**bits / 2), 0, 2**bits - 1).astype(np.int64)
        return (weights * (x - unit[index] * step) ** 2).sum()

    low, high = 1e-3, 4.0
    for _ in range(100):  # golden section: the error has one minimum in the step
        a, b = high - (high - low) * 0.6180339887498949, low + (high - low) * 0.6180339887498949
        low, high = (low, b) if error(a) < error(b) else (a, high)
    return torch.from_numpy(unit * (low + high) / 2).float()


CODEBOOKS = {"lloyd_max": lloyd_max, "uniform": uniform}


@functools.lru_cache(maxsize=32)
def distortion(bits: int, dim: int) -> float:
    """Mean squared error of `lloyd_max(bits, dim)` for a coordinate of unit variance; 1 at 0 bits."""
    if bits == 0:
        return 1.0
    x, weights = _sphere_density(dim)
    return _Cells(x, weights).centroids(lloyd_max(bits, dim).double().numpy())[1]


def fit_codebook(samples: torch.Tensor, bits: int, iterations: int = 50) -> torch.Tensor:
    """Lloyd–Max levels of measured coordinates.

    Args:
        samples: `[N]` fp32 values, already scaled to about unit variance.
    Returns:
        `[2**bits]` fp32, sorted.
    """
    x = np.sort(samples.double().numpy())
    # Panter–Dite again, from the quantiles: spacing to the power 2/3 is density to the power 1/3 along x.
    grid = np.quantile(x, np.linspace(0, 1, 1025))
    companded = np.concatenate([[0.0], np.cumsum(np.diff(grid) ** (2 / 3))])
    levels = np.interp((np.arange(2**bits) + 0.5) / 2**bits * companded[-1], companded, grid)
    cells = _Cells(x, np.full(len(x), 1.0 / len(x)))
    for _ in range(iterations):
        levels = np.sort(cells.centroids(levels)[0])
    return torch.from_numpy(levels).float()


def nearest(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Index of the nearest level, `uint8`.

    Args:
        x: `[H, ...]` fp32.
        levels: `[H, 2**bits]` fp32, sorted along the last dimension; `H` may be 1.
    """
    edges = (levels[:, 1:] + levels[:, :-1]) / 2
    if edges.shape[1] == 0:
        return torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    if levels.shape[0] == 1:
        return torch.bucketize(x.contiguous(), edges[0], out_int32=True).to(torch.uint8)
    flat = x.reshape(x.shape[0], -1).contiguous()
    return torch.searchsorted(edges.contiguous(), flat, out_int32=True).to(torch.uint8).reshape(x.shape)
