"""Pages to encode for tests of the encoding kernel: shapes and settings, and codecs and inputs that make them."""

from dataclasses import dataclass

import torch

from hf_seqkv.codec.center import Center
from hf_seqkv.codec.page import QuantizedPageCodec
from hf_seqkv.codec.quantize import CODEBOOKS
from hf_seqkv.codec.rotation import random_rotation
from hf_seqkv.codec.vector import VectorCodec

ALL = (4, 0, 1, 8, 3, 7, 2, 6, 5)


@dataclass(frozen=True)
class Case:
    """`widths` are the bits of all components (one number) or of each in turn; `half` the number of RoPE pairs."""

    batch: int = 1
    pages: int = 2
    heads: int = 2
    page_size: int = 64
    dim: int = 64
    value_dim: int = 64
    key_widths: int | tuple[int, ...] = 5
    value_widths: int | tuple[int, ...] = 4
    scale: str = "fit"
    scale_bits: int = 16
    half: int | None = None
    interleaved: bool = False
    dtype: torch.dtype = torch.float32


def widths_of(heads, dim, bits):
    bits = (bits,) if isinstance(bits, int) else bits
    return torch.tensor([[bits[(d + h) % len(bits)] for d in range(dim)] for h in range(heads)], dtype=torch.uint8)


def exact_codec(case):
    """Identity rotations and levels on a grid: sums of small integers are the same in any order."""

    def side(dim, bits):
        identity, levels = torch.eye(dim).repeat(case.heads, 1, 1), torch.zeros(case.heads, 9, 256)
        for head in range(case.heads):
            for width in range(9):
                step = 2.0 ** (head % 2 - max(width - 3, 0))  # edges at multiples of a quarter or so: ties happen
                levels[head, width, : 2**width] = step * (torch.arange(2**width) - (2**width - 1) / 2)
        mean = torch.randint(-2, 3, (case.heads, dim)).float()
        widths = widths_of(case.heads, dim, bits)
        return VectorCodec(identity, identity, mean, widths, levels, case.scale, case.page_size, case.scale_bits)

    return QuantizedPageCodec(side(case.dim, case.key_widths), side(case.value_dim, case.value_widths))


def real_codec(case):
    """As a calibration makes them: every head its basis, gains, mean and levels."""

    def side(dim, bits, seed):
        widths = widths_of(case.heads, dim, bits)
        middle = widths.float().mean()
        gains = 2.0 ** (widths.float() - middle)[..., None]
        levels = torch.zeros(case.heads, 9, 256)
        for width in range(1, 9):
            book = CODEBOOKS["lloyd_max"](width, 64)
            levels[:, width, : 2**width] = book * (1 + 0.1 * torch.rand(case.heads, 1))
        basis = torch.stack([random_rotation(dim, "orthogonal", seed + h) for h in range(case.heads)])
        mean = torch.randn(case.heads, dim)
        matrix = (basis / gains).transpose(1, 2).contiguous()
        return VectorCodec(matrix, basis * gains, mean, widths, levels, case.scale, case.page_size, case.scale_bits)

    return QuantizedPageCodec(side(case.dim, case.key_widths, 0), side(case.value_dim, case.value_widths, 50))


def make_center(case, exact):
    if case.half is None:
        return None
    shape = (case.batch, case.pages, case.half)
    if exact:  # quarter turns
        first, step = torch.randint(0, 4, shape), torch.randint(0, 4, (case.half,))
        turns = first, torch.arange(case.page_size)[:, None] * step
        cosine, sine = torch.tensor([1.0, 0, -1, 0]), torch.tensor([0.0, 1, 0, -1])
        tables = [torch.cat([cosine[turn % 4], sine[turn % 4]], -1) for turn in turns]
        mean = torch.randint(-3, 4, (case.batch, case.heads, case.dim)).float()
    else:
        angles = torch.rand(shape) * 6, torch.arange(case.page_size)[:, None] * torch.rand(case.half)
        tables = [torch.cat([angle.cos(), angle.sin()], -1) for angle in angles]
        mean = 3 * torch.randn(case.batch, case.heads, case.dim)
    return Center(mean, *tables, case.interleaved)


def paged(case, x):
    """`[B, H, N * P, D]` as the cache hands pages over: a view `[B, N, H, P, D]`."""
    return x.to(case.dtype).unflatten(2, (-1, case.page_size)).transpose(1, 2)


def integers(case):
    shape = (case.batch, case.heads, case.pages * case.page_size)
    dims = case.dim, case.value_dim
    return [paged(case, torch.randint(-9, 10, (*shape, dim)) // torch.randint(1, 10, (*shape, 1))) for dim in dims]


BASE = {
    "data free": Case(),
    "all widths": Case(key_widths=ALL, value_widths=ALL[::-1]),
    "center, halves": Case(half=32, key_widths=(5, 4, 6)),
    "center, neighbours": Case(half=32, interleaved=True),
    "part of the components turned": Case(half=12, interleaved=True, dim=80),
    "no component turned": Case(half=0),
    "norm": Case(scale="norm", half=32),
    "mixed norm": Case(scale="norm", key_widths=(3, 5), value_widths=ALL),
    "8-bit scales": Case(scale_bits=8, key_widths=(3, 4), value_widths=2, half=16),
    "8-bit scales, norm": Case(scale="norm", scale_bits=8, page_size=40),
    "bf16": Case(dtype=torch.bfloat16, half=32, value_widths=(2, 4)),
    "fp16": Case(dtype=torch.float16, half=32, value_widths=(2, 4)),
    "fp64": Case(dtype=torch.float64),
    "rows": Case(batch=3, pages=3, half=32, page_size=16),
    "no codes": Case(key_widths=0, value_widths=(0, 0)),
    "one dimension": Case(dim=1, value_dim=3, page_size=8, heads=1),
}
CASES = (
    BASE
    | {f"page of {size}": Case(page_size=size, key_widths=ALL, half=32, heads=3) for size in (8, 16, 24, 40, 72, 128)}
    | {f"{bits} bits": Case(key_widths=bits, value_widths=9 - bits) for bits in range(1, 9)}
    | {f"dim {d}": Case(dim=d, value_dim=d, half=d // 2, key_widths=(4, 5, 6)) for d in (64, 80, 96, 128, 256)}
)
