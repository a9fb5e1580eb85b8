"""Random rotations: they spread a vector's energy evenly, so that one codebook fits every coordinate.

Source: TurboQuant, arXiv 2504.19874, section 3.1 (random rotation by QR of a Gaussian matrix); randomised Hadamard
transform as in QuaRot, arXiv 2404.00456.
"""

from __future__ import annotations

import functools

import numpy as np
import torch


def hadamard_matrix(size: int) -> torch.Tensor:
    """Sylvester's Hadamard matrix scaled to be orthogonal, `[size, size]` fp32; `size` is a power of two."""
    assert size.bit_count() == 1, size
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return (matrix / size**0.5).float()


@functools.lru_cache(maxsize=32)
def random_rotation(dim: int, kind: str, seed: int) -> torch.Tensor:
    """Orthogonal matrix `[dim, dim]` fp32; rows are the new basis, so `x @ rotation.T` rotates.

    `kind="hadamard"` uses exact arithmetic and is the same on every machine; where `dim` is no power of two there is
    no such matrix and `kind="orthogonal"` is used.
    """
    raw = np.random.PCG64(seed)
    if kind == "hadamard" and dim & (dim - 1) == 0:
        signs = torch.from_numpy((raw.random_raw(dim) >> 63).astype(np.float32) * 2 - 1)
        return hadamard_matrix(dim) * signs
    gaussian = np.random.Generator(raw).standard_normal((dim, dim))
    q, r = np.linalg.qr(gaussian)
    return torch.from_numpy(q * np.sign(np.diag(r))).float().T.contiguous()
