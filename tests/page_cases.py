"""Page codecs, and keys and values that are the same on every machine."""

import pytest
import torch

from hf_seqkv.codec.page import DensePageCodec, QuantizedPageCodec
from hf_seqkv.codec.rotation import hadamard_matrix
from hf_seqkv.codec.vector import VectorCodec


def vectors(heads, page_size, dim, salt):
    """`[H, P, D]` fp32: multiples of 1/8 between -4 and 4, the same on every machine."""
    index = torch.arange(heads * page_size * dim)
    return ((index * index * 7 + index * (13 + 2 * salt) + salt * salt) % 65 - 32).reshape(heads, page_size, dim) / 8


def data_free(dim, page_size, bits, heads=2):
    return VectorCodec.data_free(
        heads, dim, page_size, bits=bits, rotation="hadamard", codebook="lloyd_max", scale="fit", seed=0
    )


def mixed(dim, page_size, heads=2):
    """Every width in turn, levels and means that differ between heads; all numbers are exact in binary."""
    widths = torch.tensor([[(0, 1, 2, 3, 4, 5, 8)[(d + h) % 7] for d in range(dim)] for h in range(heads)])
    levels = torch.zeros(heads, 9, 256)
    for w in range(9):
        levels[:, w, : 2**w] = (torch.arange(2**w) - (2**w - 1) / 2) * 4 / 2**w
        levels[1:, w, : 2**w] += 1 / 64
    basis = hadamard_matrix(dim).expand(heads, dim, dim).contiguous()
    mean = vectors(heads, 1, dim, 9)[:, 0]
    return VectorCodec(basis.clone(), basis, mean, widths.to(torch.uint8), levels, "norm", page_size)


# Name -> codec. Dimensions are powers of four, whose Hadamard matrix is exact.
GOLDEN_CODECS = {
    "dense_fp32": lambda: DensePageCodec(8, 2, 16, 8, torch.float32),
    "hadamard_4bit": lambda: QuantizedPageCodec(data_free(64, 16, 4), data_free(16, 16, 4)),
    "hadamard_3bit": lambda: QuantizedPageCodec(data_free(16, 8, 3), data_free(64, 8, 3)),
    "mixed_widths": lambda: QuantizedPageCodec(mixed(16, 8), mixed(64, 8)),
}


def small_codecs():
    return {
        "dense": DensePageCodec(8, 1, 4, 2, torch.bfloat16),
        "quantised": QuantizedPageCodec(data_free(4, 8, 3, heads=1), data_free(2, 8, 2, heads=1)),
        "mixed": QuantizedPageCodec(mixed(4, 8, heads=1), mixed(8, 8, heads=1)),
    }


small = pytest.mark.parametrize("codec", small_codecs().values(), ids=small_codecs())


def page_inputs(codec):
    return tuple(
        vectors(codec.heads, codec.page_size, dim, salt) for salt, dim in enumerate((codec.key_dim, codec.value_dim))
    )


def golden_inputs(name, codec):
    """Keys and values of a golden page."""
    salt = 2 * list(GOLDEN_CODECS).index(name)
    dims = (codec.key_dim, codec.value_dim)
    return tuple(vectors(codec.heads, codec.page_size, dim, salt + i) for i, dim in enumerate(dims))
