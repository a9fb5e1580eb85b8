"""Random rotations: orthogonal, deterministic, and where stored pages depend on them, pinned."""

import pytest
import torch

from hf_seqkv.codec.rotation import hadamard_matrix, random_rotation

DIMS = [8, 16, 64, 80, 96, 128, 256]


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
def test_orthogonal(dim, kind):
    matrix = random_rotation(dim, kind, 0)
    assert matrix.dtype == torch.float32
    assert matrix.is_contiguous()
    product = matrix.double() @ matrix.double().T
    assert (product - torch.eye(dim)).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
def test_seed_decides(kind):
    random_rotation.cache_clear()
    first = random_rotation(64, kind, 3)
    torch.manual_seed(1)
    random_rotation.cache_clear()
    assert torch.equal(random_rotation(64, kind, 3), first)
    assert not torch.equal(random_rotation(64, kind, 4), first)


@pytest.mark.parametrize("dim", [80, 96])
def test_hadamard_falls_back_where_there_is_none(dim):
    assert torch.equal(random_rotation(dim, "hadamard", 0), random_rotation(dim, "orthogonal", 0))


@pytest.mark.parametrize("dim", [8, 64, 128])
def test_hadamard_spreads_a_unit_vector_evenly(dim):
    assert torch.equal(random_rotation(dim, "hadamard", 0).abs(), torch.full((dim, dim), dim**-0.5))


def test_orthogonal_signs_are_unbiased():
    # QR alone favours a sign; the published construction fixes it by the diagonal of R, so that entries average out.
    diagonals = torch.stack([random_rotation(8, "orthogonal", seed).diagonal() for seed in range(500)])
    assert diagonals.mean().abs() < 5 * diagonals.std() / diagonals.numel() ** 0.5


def test_hadamard_matrix_is_sylvester_s():
    assert (hadamard_matrix(4) * 2).tolist() == [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]


@pytest.mark.parametrize(
    ("dim", "seed", "signs"),
    [(64, 0, "+---+++++++-+-+-"), (64, 1, "++-+--+-+-++-+--"), (128, 0, "+---+++++++-+-+-")],
)
def test_hadamard_signs_are_pinned(dim, seed, signs):
    first = random_rotation(dim, "hadamard", seed)[0]
    assert "".join("+" if x > 0 else "-" for x in first[:16]) == signs
