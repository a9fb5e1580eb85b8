"""Predictions of the exact codec: what is expected of a head's codes, from everything that was coded before.

The embedding, the two layers below and, for values, their own keys predict a part; keys before RoPE. What predictions
of earlier heads of the part missed then moves those of the later ones.
"""

from __future__ import annotations

import numpy as np
import torch

from .exact_cells import cells, scale_cells
from .exact_coder import ONE
from .exact_part import PER_DEVIATION, ExactPart, Transform, check_weights, inputs, product, turn
from .scales import BIAS, from_bytes
from .vector import VectorCodec

_HIGHEST = float(1 << 20)  # of a mean, in 256ths of a deviation


class Side:
    """One side of one layer, as the coder takes it.

    Args:
        codec: Of the side.
        part: None predicts nothing: codes are then coded as if of unit variance.
        embedding: Weights of embeddings of length `sqrt(E)`, `[E, W]`; None, or no rows, without.
        name: For messages.
    """

    def __init__(self, codec: VectorCodec, part: ExactPart | None, embedding: torch.Tensor | None, name: str):
        self.heads, self.dim, self.wide = codec.heads, codec.dim, codec.scale_bits == 16
        self.part = part
        widths = codec.widths.cpu().numpy().astype(np.int64)
        levels = codec.levels.cpu().numpy()
        tables = levels.reshape(-1, 256)
        rows = widths + 9 * (np.arange(self.heads)[:, None] if len(levels) > 1 else 0)
        self.rows, self.widths, self.levels, self.edges = (
            rows,
            widths,
            tables.astype(np.float64),
            cells(tables, np.arange(len(tables)) % 9),
        )
        self.scale_edges = scale_cells()
        self.values = scale_values(self.wide)
        if part is None:
            self.values = np.ones_like(self.values)
            self.inverse = np.full((self.heads, self.dim), ONE)
            self.chain = np.zeros((self.heads, self.dim, self.dim))
            self.narrowness = np.full(self.heads, 2.0**23 / (256 if self.wide else 16))
            self.usual = scale_steps(np.ones(1), self.wide)[0]
            return
        self.transform = Transform(codec, part.units)
        wide = {name: x.numpy().astype(np.float64) for name, x in part.tensors().items()}
        self.tables = wide
        self.inverse = ONE / wide["deviation"]
        self.chain = np.ascontiguousarray(wide["chain"])
        self.narrowness = np.rint(2.0**23 / wide["scale"][:, 2])
        weights = part.weights.numpy().astype(np.float32)
        self.embeds = embedding is not None and len(embedding) > 0
        if self.embeds:
            first = np.rint(embedding.numpy().astype(np.float64) / PER_DEVIATION / wide["gain"])
            weights = np.concatenate([first.astype(np.float32), weights])
        check_weights(weights, name)
        self.weights, self.cross = weights, part.cross.numpy().astype(np.float32)

    def predict(self, embedded: np.ndarray | None, given: list[np.ndarray], tokens: int) -> np.ndarray:
        """Predictions `[n, W]` float64 from inputs: embeddings, where they are used, and all others."""
        given = [embedded, *given] if self.embeds else given
        found = np.zeros((tokens, self.heads * self.dim))
        at = 0
        for x in given:
            found += product(x, self.weights[at : at + x.shape[1]])
            at += x.shape[1]
        assert at == len(self.weights), (at, len(self.weights))
        found *= self.tables["gain"]
        found += self.tables["bias"]
        return found

    def sharpen(self, predicted: np.ndarray, head: int, missed: np.ndarray) -> None:
        """Move the predictions `[n, W]` of a head, by what earlier ones missed, inputs `[n, W]`."""
        span = slice(head * self.dim, (head + 1) * self.dim)
        moved = product(missed[:, : span.start], self.cross[: span.start, span])
        predicted[:, span] += moved * self.tables["cross_gain"][span]

    def expect(self, y: np.ndarray, head: int) -> tuple[np.ndarray, np.ndarray]:
        """Means of components and scales, as the coder takes them, from predictions `[n, D]` in the domain of codes."""
        means = np.clip(np.rint(y * self.inverse[head]), -_HIGHEST, _HIGHEST)
        energy, offset, _ = self.tables["scale"][head]
        expected = scale_steps(expected_size(y, self.transform.units[0, head], energy), self.wide)
        return means, np.clip(expected + np.rint(16 * offset), -(2.0**21), 2.0**21)

    def learn(self, raw: np.ndarray) -> np.ndarray:
        """Decoded components `[n, W]` as inputs."""
        return inputs(raw, self.tables["center"], self.tables["step"])

    def miss(self, raw: np.ndarray, predicted: np.ndarray, head: int) -> np.ndarray:
        """What predictions of a head, `[n, D]`, missed, as inputs."""
        span = slice(head * self.dim, (head + 1) * self.dim)
        return inputs(raw - predicted, 0.0, self.tables["spread"][span])


class Place:
    """Where keys stand: RoPE and the constant part of a layer's tokens. Values stand nowhere.

    Args:
        rows: Cosines and sines, `[n, half]`.
        means: Of each token's row, `[n, H, D]`.
    """

    def __init__(self, rows: tuple[np.ndarray, np.ndarray], interleaved: bool, means: np.ndarray):
        self.rows, self.interleaved, self.means = rows, interleaved, means

    def to_cache(self, x: np.ndarray, head: int) -> np.ndarray:
        """Keys before RoPE `[n, D]`, constant part included, to what is coded."""
        return turn(x - self.means[:, head], self.rows, self.interleaved, inverse=False)

    def to_plain(self, x: np.ndarray, head: int) -> np.ndarray:
        """Inverse of `to_cache`."""
        return turn(x, self.rows, self.interleaved, inverse=True) + self.means[:, head]


class Nowhere:
    """`Place` of values."""

    @staticmethod
    def to_cache(x: np.ndarray, head: int) -> np.ndarray:
        return x

    to_plain = to_cache


def expected_size(y: np.ndarray, unit: float, energy: float) -> np.ndarray:
    """Root mean square of components that are expected to be `y [n, D]`, with a mean square of `energy` around that."""
    step = unit / ONE
    whole = np.clip(np.rint(y / step), -_HIGHEST, _HIGHEST)
    power = (whole * whole).sum(1) / y.shape[1]  # a sum of integers
    return np.sqrt(power * (step * step) + energy)


def scale_steps(sizes: np.ndarray, wide: bool) -> np.ndarray:
    """Sizes as scales that were not rounded, in 16ths of what a stored scale counts in: integers in float64."""
    bits = sizes.astype(np.float32).view(np.int32).astype(np.int64)
    return (bits >> 12 if wide else (bits >> 16) - 16 * BIAS).astype(np.float64)


def scale_values(wide: bool) -> np.ndarray:
    """What every stored scale stands for, float64; 0 for infinity, and for what is not a scale."""
    if wide:
        found = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    else:
        found = from_bytes(torch.arange(256, dtype=torch.uint8))
    found = found.double().numpy()
    return np.where(np.isfinite(found) & (found > 0), found, 0.0)
