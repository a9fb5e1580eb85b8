"""`attend_codes` as an operator of torch, `torch.ops.hf_seqkv.attend_codes`: what `torch.compile` sees.

A compiled graph holds tensors and numbers only. What is fixed for a layer, its codec and backend, is known by a key;
what changes from step to step are tensors and lengths, so that a graph serves every step.
"""

from __future__ import annotations

import weakref

import torch

from .interface import DenseRun, LayerView, Scoring, SideTable, select_backend

_CODECS: weakref.WeakValueDictionary = weakref.WeakValueDictionary()


def codec_key(codec) -> int:
    """Key of a codec for the operator; it lasts as long as the codec."""
    _CODECS[id(codec)] = codec
    return id(codec)


def flatten(view: LayerView, mask, scoring: Scoring) -> tuple:
    """Arguments of the operator, after the query and before the backend's name."""
    rows = [view.counts, view.page_slots, view.sinks.slots, view.sinks.begin, view.recent.slots, view.recent.begin]
    side, center = view.side, view.center
    return (
        codec_key(view.codec), view.pages, torch.tensor(rows), view.length, view.offset,
        [view.sinks.k, view.sinks.v, view.recent.k, view.recent.v],
        [] if side is None else [side.k, side.v, side.slots],
        [] if center is None else [center.mean, center.starts, center.relative],
        center is not None and center.interleaved,
        mask, scoring.scaling, scoring.causal, scoring.window, scoring.softcap, scoring.sink_logits,
    )  # fmt: skip


@torch.library.custom_op("hf_seqkv::attend_codes", mutates_args=())
def attend_codes(
    query: torch.Tensor,
    codec: int,
    pages: torch.Tensor,
    rows: torch.Tensor,
    length: int,
    offset: int,
    dense: list[torch.Tensor],
    side: list[torch.Tensor],
    center: list[torch.Tensor],
    interleaved: bool,
    mask: torch.Tensor | None,
    scaling: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    """As `reference.attend_codes`, a view taken apart by `flatten`: `[B, Tq, Hq, Dv]`.

    Args:
        codec: From `codec_key`.
        rows: `[6, B]` int64 on the CPU: counts, page slots, then slots and begin of sinks and of recent tokens.
        dense: Keys and values of sinks and of recent tokens.
        side, center: Fields of the side table and of the constant part of the keys; empty for none.
    """
    from ..codec.center import Center

    counts, page_slots, *runs = rows.tolist()
    view = LayerView(
        _CODECS[codec], pages, counts, page_slots, DenseRun(dense[0], dense[1], *runs[:2]),
        DenseRun(dense[2], dense[3], *runs[2:]), Center(*center, interleaved) if center else None, length, offset,
        SideTable(*side) if side else None,
    )  # fmt: skip
    attend = select_backend(backend, view.codec, query.device).attend_codes
    return attend(query, view, mask, Scoring(scaling, causal, window, softcap, sink_logits)).contiguous()


@attend_codes.register_fake
def _(query, codec, pages, rows, length, offset, dense, side, center, interleaved, mask, *rest):
    batch, heads, steps, _ = query.shape
    return query.new_empty(batch, steps, heads, dense[1].shape[3])
