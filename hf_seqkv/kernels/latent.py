"""Attention over cached latents (multi-head latent attention, MLA): one latent and one rotary key for all heads.

The latent `c` stands where other layers have keys, the rotary key `r` where they have values. A query head scores
`[q_c | q_r] . [c | r]` and mixes latents; what a model makes of latents is multiplied into queries before and outputs
after (`integration.latent`). Source: DeepSeek-V2, arXiv 2405.04434, section 2.1.2.

Queries are turned into the basis of the codes once, instead of every cached token out of it: the rotation of a latent
costs as much as the scores of a hundred heads. The constant part of the latents adds the same to all of a query's
scores, and the same to all outputs.

Plain torch on any device, fp32; pages are unpacked `RUN` tokens at a time, once for all heads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..codec.page import QuantizedPageCodec
from .interface import LayerView, Scoring
from .reference import OnlineSoftmax, runs


def attend_latents(
    query: torch.Tensor, view: LayerView, mask: torch.Tensor | None, scoring: Scoring, unpack: Callable
) -> torch.Tensor:
    """Attention of new queries over a layer's latents.

    Args:
        query: `[B, Hq, Tq, Dk + Dv]`, for latents of `Dk` and rotary keys of `Dv` components, any float dtype.
        view: The layer's cache, of one head; its codec's matrices are inverses of each other.
        mask, scoring: As `reference.attend_codes` has them.
        unpack: A backend's `unpack_pages`.

    Returns:
        Mixed latents, `[B, Tq, Hq, Dk]` fp32.
    """
    codec, width = view.codec, view.codec.key_dim
    mean = query.new_zeros(len(query), 1, width, dtype=torch.float32)
    if view.center is not None:
        mean = mean + view.center.mean
    sides = (codec.key, codec.value) if isinstance(codec, QuantizedPageCodec) else ()
    queries = [x.float() for x in query.split([width, codec.value_dim], -1)]
    mean = mean + sides[0].mean if sides else mean
    constant = (queries[0] * mean[:, :, None]).sum(-1)
    if sides:
        constant = constant + (queries[1] * sides[1].mean[:, None]).sum(-1)
        queries = [x @ side.decode_matrix.transpose(1, 2) for x, side in zip(queries, sides, strict=True)]

    def dense(row: int, k: torch.Tensor, v: torch.Tensor):
        k = k - mean[row, :, None]
        if sides:
            k, v = k @ sides[0].encode_matrix, (v - sides[1].mean[:, None]) @ sides[1].encode_matrix
        return k, v

    def coded(first: int, last: int):
        return tuple(unpack(codec, view.pages[:, first:last], side).float() for side in range(2))

    softmax = OnlineSoftmax(torch.cat(queries, -1), view, mask, scoring, width, constant)
    for row, k, v, slots, absent in runs(view, coded, dense):
        softmax.add(row, torch.cat([k, v], -1), k, slots, absent)
    mixed = softmax.result()
    if sides:
        mixed = mixed @ sides[0].decode_matrix[0]
    return mixed + mean[:, :, None] * softmax.seen()
