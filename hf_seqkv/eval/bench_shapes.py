"""What `bench_kernels` and `bench_cuda` time: attention's heads, rates, and codecs of these.

Times do not depend on what levels and rotations are, so a calibration's mixed widths need none of its statistics.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..codec.page import QuantizedPageCodec
from ..codec.vector import VectorCodec
from ..config import DATA_FREE

RUN = 16  # components of one width that lie together, as in a calibration


@dataclass(frozen=True)
class Shape:
    """Attention heads of a layer: query heads, KV heads, components of a head."""

    query_heads: int
    heads: int
    dim: int

    @property
    def name(self) -> str:
        return f"{self.query_heads}/{self.heads}x{self.dim}"


@dataclass(frozen=True)
class Rate:
    """Mean bits of keys and of values, and whether the keys' constant part is coded apart."""

    key_bits: float
    value_bits: float
    center: bool = False

    @property
    def name(self) -> str:
        return f"{self.key_bits:g}/{self.value_bits:g}" + "c" * self.center


def page_codec(shape: Shape, rate: Rate, page_size: int) -> QuantizedPageCodec:
    """The data-free codec with its default options but the rate."""
    return QuantizedPageCodec(*(_side(shape, bits, page_size) for bits in (rate.key_bits, rate.value_bits)))


def _side(shape: Shape, bits: float, page_size: int) -> VectorCodec:
    """Between two whole widths the first components have the larger one."""
    same = {name: DATA_FREE[name] for name in ("rotation", "codebook", "scale", "scale_bits", "seed")}
    made = VectorCodec.data_free(shape.heads, shape.dim, page_size, bits=int(bits), **same)
    if bits == int(bits):
        return made
    finer = VectorCodec.data_free(shape.heads, shape.dim, page_size, bits=int(bits) + 1, **same)
    widths = made.widths.clone()
    widths[:, : round((bits - int(bits)) * shape.dim / RUN) * RUN] += 1
    levels, scale = made.levels + finer.levels, (made.scale, page_size, made.scale_bits)
    return VectorCodec(made.encode_matrix, made.decode_matrix, made.mean, widths, levels, *scale)
