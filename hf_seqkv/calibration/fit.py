"""From statistics of a model's keys and values to a codec: rotation, widths and codebooks of every KV head.

Source: the Karhunen–Loève transform with bits where they lower the error most (reverse water-filling); Gersho and
Gray, "Vector Quantization and Signal Compression", 1992, chapters 8 and 16. The metric is the plain squared error: at
a fixed rate it did better than metrics weighted by sensitivity, which starve directions that outlier tokens use.
"""

from __future__ import annotations

import math

import torch

from ..codec.importance import features
from ..codec.quantize import distortion, fit_codebook
from ..codec.rotation import random_rotation
from .sensitivity import Sensitivity
from .sequence_fit import Sample

CODEBOOK_SAMPLES = 20_000
GRANULE = 16  # components, of what matrix units multiply at once


class Moments:
    """Running second moments of vectors, per KV head, and a sample of them."""

    def __init__(self, heads: int, dim: int, samples: int, device):
        self.count = 0
        self.second = torch.zeros(heads, dim, dim, dtype=torch.float64, device=device)
        self.samples: list[torch.Tensor] = []
        self.room = samples

    def add(self, x: torch.Tensor, keep: int) -> None:
        """Add vectors `x [H, N, D]`, `keep` of them, evenly spaced, to the sample."""
        x = x.float()
        self.count += x.shape[1]
        self.second += x.transpose(1, 2) @ x
        keep = min(keep, self.room, x.shape[1])
        if keep:
            at = torch.linspace(0, x.shape[1] - 1, keep).long()
            self.samples.append(x[:, at].to("cpu", torch.bfloat16))
            self.room -= keep


def run_lengths(variance: torch.Tensor, bits: float) -> dict[int, int]:
    """Widths, widest first, and how many of a head's components get each: `D * bits` bits in all.

    Widths are the two next to `bits`, or within one of it where it is whole. Tokens that are unlike the others, on
    which a model often leans, put their energy where the average has none: starving those components destroys them.
    All heads share the numbers, so that kernels need not tell heads apart; where `bits` is whole and they are free,
    they minimise the summed squared error, in steps of `GRANULE` components but in small heads.

    Args:
        variance: `[H, D]`, falling along `D`.
        bits: A multiple of `1 / D`.
    """
    dim, low = variance.shape[1], math.floor(bits)
    if low != bits:
        wide = round(dim * (bits - low))
        return {low + 1: wide, low: dim - wide}
    energy = variance.sum(0)

    def lost(ends: int) -> float:
        parts = energy[:ends], energy[ends : dim - ends], energy[dim - ends :]
        return sum(float(part.sum()) * distortion(low + 1 - i, dim) for i, part in enumerate(parts))

    ends = min(range(0, dim // 2 + 1, GRANULE if dim >= 4 * GRANULE else 1), key=lost)
    return {low + 1: ends, low: dim - 2 * ends, low - 1: ends}


def mix_equal_widths(rotation: torch.Tensor, widths: torch.Tensor, seed: int) -> torch.Tensor:
    """Rotate components of one width at random among themselves: spreads outliers, costs no rate.

    Args:
        rotation: `[D, D]`, rows are the basis; `widths [D]` in descending order.
    """
    mixed = rotation.clone()
    for width in set(widths.tolist()):
        rows = (widths == width).nonzero()[:, 0]
        mixed[rows] = random_rotation(len(rows), "hadamard", seed + width) @ rotation[rows]
    return mixed


def fit_side(moments: Moments, bits: float) -> dict[str, torch.Tensor]:
    """Codec tensors of the keys or the values of a layer.

    Args:
        bits: Mean width.

    Returns:
        `rotation [H, D, D]`, `std [H, D]`, `widths [H, D]`, `levels [H, 9, n]`; see `layout.py`.
    """
    # About zero, not about the mean: the tokens a model leans on most have values near zero, and coding what sets
    # them apart from a mean would take their precision away.
    _, vectors = torch.linalg.eigh(moments.second.cpu() / moments.count)
    heads, dim = vectors.shape[:2]
    # Largest first; the sign is arbitrary and fixed so that equal statistics give equal files.
    rotation = vectors.flip(-1).transpose(1, 2)
    rotation = rotation * rotation.gather(2, rotation.abs().argmax(-1, keepdim=True)).sign()
    rotation = rotation.float().contiguous()
    x = torch.cat(moments.samples, 1).float()
    x = x / (x.square().sum(-1) / dim).sqrt().clamp_min(1e-30)[..., None]  # as the codec's gain will
    # Not quite in order yet: these are vectors of one length.
    variance, order = (x @ rotation.transpose(1, 2)).square().mean(1).sort(dim=-1, descending=True, stable=True)
    rotation = rotation.gather(1, order[..., None].expand_as(rotation))
    runs = run_lengths(variance, bits)
    widths = torch.tensor([bits for bits, count in runs.items() for _ in range(count)], dtype=torch.uint8)
    widths, levels = widths.repeat(heads, 1), torch.zeros(heads, 9, 2 ** max(runs))
    std = torch.zeros(heads, dim)
    for head in range(heads):
        rotation[head] = mix_equal_widths(rotation[head], widths[head], seed=0)
        y = x[head] @ rotation[head].T
        std[head] = y.square().mean(0).sqrt().clamp_min(1e-4)
        for width in set(widths[head].tolist()):
            chosen = widths[head] == width
            values = (y[:, chosen] / std[head][chosen]).flatten()
            step = max(1, len(values) // CODEBOOK_SAMPLES)
            levels[head, width, : 2**width] = fit_codebook(values[::step], width)
    return {"rotation": rotation, "std": std, "widths": widths, "levels": levels}


def fit_held(sample: Sample, sensitivities: list[Sensitivity], share: float) -> list[torch.Tensor]:
    """For every layer, weights of `codec.importance.features` that are positive for `share` of the sample's tokens."""
    made = []
    for k, v, sensitivity in zip(sample.keys, sample.values, sensitivities, strict=True):
        found = features(*(x.float().transpose(1, 2).flatten(0, 1) for x in (k, v)), sample.positions.flatten())
        weights = sensitivity.importance(2)
        weights[-1] -= (found @ weights).quantile(1 - share)
        made.append(weights)
    return made
