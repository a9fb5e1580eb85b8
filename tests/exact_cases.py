"""Small layers whose keys and values can be predicted, for tests of the exact codec."""

from dataclasses import dataclass

import torch

from hf_seqkv.calibration.exact_fit import Predictors, fit_exact
from hf_seqkv.calibration.sequence_fit import Sample
from hf_seqkv.codec.center import relative_table, rotate
from hf_seqkv.codec.exact import ExactCodec
from hf_seqkv.codec.page import QuantizedPageCodec
from hf_seqkv.codec.sequence_part import Part
from hf_seqkv.codec.surroundings import Surroundings
from hf_seqkv.codec.vector import VectorCodec

EMBEDDED = 6
ALL = Predictors()


@dataclass(frozen=True)
class Layer:
    """Shape and RoPE of a layer."""

    heads: int = 2
    key_dim: int = 8
    value_dim: int = 4
    half: int = 3
    interleaved: bool = False
    scale_bits: int = 8

    def page(self, size: int, widths: tuple[int, ...] = (3, 5)) -> QuantizedPageCodec:
        return QuantizedPageCodec(
            _codec(self.heads, self.key_dim, size, widths, self.scale_bits),
            _codec(self.heads, self.value_dim, size, widths[::-1], self.scale_bits),
        )


def _codec(heads: int, dim: int, size: int, widths: tuple[int, ...], scale_bits: int) -> VectorCodec:
    """Widths in turn over the components; evenly spaced levels; a rotation with exact entries."""
    matrix = torch.eye(dim).roll(1, 0).expand(heads, dim, dim).contiguous()
    levels = torch.zeros(1, 9, 256)
    for width in range(9):
        count = 1 << width
        levels[0, width, :count] = (torch.arange(count) - (count - 1) / 2) * (6 / count)
    chosen = torch.tensor(widths, dtype=torch.uint8).repeat(heads * dim)[: heads * dim].view(heads, dim)
    blank = torch.zeros(heads, dim)
    return VectorCodec(matrix.transpose(1, 2).contiguous(), matrix, blank, chosen, levels, "fit", size, scale_bits)


def alone(embedding: torch.Tensor) -> Part:
    """As much of a part as the exact codec takes: weights of the embedding, `[E, W]`."""
    return Part(None, (len(embedding), 0, 0, 0, 0, 0), embedding, None, None, None, None, 0)


@dataclass
class Case:
    """Pages of layers, with all that predicts them."""

    pages: list[QuantizedPageCodec]
    parts: list[Part]
    sample: Sample
    rows: list[torch.Tensor]
    layers: list[Layer]

    def payloads(self) -> list[torch.Tensor]:
        """Of each layer, `[N, page_bytes]`."""
        found = []
        for i, (page, layer) in enumerate(zip(self.pages, self.layers, strict=True)):
            means = self.sample.keys[i].mean(2, keepdim=True)
            keys = rotate(self.sample.keys[i] - means, self.rows[i][:, None], layer.interleaved)
            found.append(page.encode(keys, self.sample.values[i]))
        return found

    def around(self) -> Surroundings:
        return Surroundings(
            self.sample.embedded,
            [rows[:, 0] for rows in self.rows],
            [relative_table(rows[0]) for rows in self.rows],
            [layer.interleaved for layer in self.layers],
            [keys.mean(2) for keys in self.sample.keys],
        )

    def fit(self, using: Predictors = ALL):
        return fit_exact(self.pages, self.payloads(), self.around(), self.parts, using, progress=False)

    def codec(self, using: Predictors | None = None) -> ExactCodec:
        if using is None:
            return ExactCodec(self.pages)
        return ExactCodec(self.pages, self.parts, self.fit(using))


def make(
    layers: tuple[Layer, ...] = (Layer(), Layer(interleaved=True)),
    count: int = 12,
    size: int = 16,
    widths: tuple[int, ...] = (3, 5),
    noise: float = 0.2,
    seed: int = 0,
) -> Case:
    """`count` pages of tokens whose keys and values follow from their embeddings and the layer below, but for noise."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    embedded = normal(count, size, EMBEDDED)
    state = embedded
    keys, values, rows, parts, behind = [], [], [], [], []
    for layer in layers:
        for kept, dim in ((keys, layer.key_dim), (values, layer.value_dim)):
            width = layer.heads * dim
            inputs = [embedded, *behind[-4:]]
            found = state @ normal(state.shape[-1], width) / state.shape[-1] ** 0.5 + noise * normal(count, size, width)
            kept.append(found.unflatten(-1, (layer.heads, dim)).transpose(1, 2))
            flat = torch.cat(inputs, -1).flatten(0, 1)
            weights = torch.linalg.lstsq(flat, found.flatten(0, 1)).solution
            parts.append(alone(weights[:EMBEDDED].half()))
        behind = [x.transpose(1, 2).flatten(2) for x in (keys[-1], values[-1])] + behind
        behind = behind[:4]
        state = torch.cat([embedded, *behind[:2]], -1)
        angle = torch.arange(size)[:, None] * 0.7 ** torch.arange(layer.half)
        rows.append(torch.cat([angle.cos(), angle.sin()], -1).expand(count, -1, -1))
    positions = torch.arange(size).expand(count, -1)
    pages = [layer.page(size, widths) for layer in layers]
    return Case(pages, parts, Sample(keys, values, embedded, positions), rows, list(layers))
