"""How much depends on a token, told from its own keys and values: which tokens the sequence codec refines.

A few tokens (the first full stop, a line break, ...) carry most of what a model's output feels; they differ from others
in size and direction. A linear map of `features`, fitted to measured gradient energies, gives a token's level: each
level halves the quantiser's step once more. Only the encoder evaluates it; levels are stored.
"""

from __future__ import annotations

import torch

LEVELS = 4  # refinements beyond the common step: to a sixteenth of it


def features(k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Features of tokens: the keys, logarithms of all norms and of the position and their squares, and a one.

    Args:
        k, v: `[n, H, Dk]` before RoPE and `[n, H, Dv]`, fp32.
        positions: Token's distance from the start of its sequence, `[n]`.

    Returns:
        `[n, H * Dk + 4 * H + 3]` fp32.
    """
    sizes = torch.cat([(x.norm(dim=-1) + 1e-3).log() for x in (k, v)], -1)
    place = positions.clamp_min(1).float().log2()[:, None]
    return torch.cat([k.flatten(1), sizes, sizes.square(), place, place.square(), torch.ones_like(place)], -1)


def count(heads: int, dim: int) -> int:
    """How many features keys of `heads` heads of `dim` components have."""
    return heads * dim + 4 * heads + 3


def of_heads(weights: torch.Tensor, heads: int, part: slice) -> torch.Tensor:
    """Weights `[F]` for the features of some of the `heads` heads alone; scores of all parts add up to the whole.

    What is not of a head, the position and the one, counts in the part that has the first head.
    """
    keys, sizes, rest = weights.split([len(weights) - 4 * heads - 3, 4 * heads, 3])
    own = keys.view(heads, -1)[part].flatten(), sizes.view(4, heads)[:, part].flatten()
    return torch.cat([*own, rest if part.start == 0 else torch.zeros_like(rest)])


def levels(found: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Levels of tokens, `features` `[n, F]` and fitted weights `[F]` to `[n]` int64, 0 to `LEVELS`."""
    return (found @ weights).round().clamp(0, LEVELS).long()
