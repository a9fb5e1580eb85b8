"""Layers that keep something else beside keys and values: codes for these, and upstream's own storage for the rest."""

from __future__ import annotations

import torch
from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from ..errors import UnsupportedModelError
from .layer import SeqKVLayer


class IndexedLayer(DynamicIndexedLayer, SeqKVLayer):
    """Beside keys and values those of an indexer, which chooses what is attended to (DSA: DeepSeek 3.2)."""

    def __init__(self, *args):
        SeqKVLayer.__init__(self, *args)
        self.indexer_keys = self.indexer_position_ids = None
        self.is_indexer_initialized = False

    offload, prefetch = SeqKVLayer.offload, SeqKVLayer.prefetch


class HybridLayer(SeqKVLayer, LinearAttentionAndFullAttentionLayer):
    """Attention and linear attention (or a state space) side by side (Falcon H1)."""

    is_croppable = LinearAttentionLayer.is_croppable

    def __init__(self, *args, number_of_states: int = 1):
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        SeqKVLayer.__init__(self, *args)

    def lazy_initialization(self, *args, **kwargs) -> None:
        (SeqKVLayer if args else LinearAttentionLayer).lazy_initialization(self, *args, **kwargs)

    def activate_past_recording(self) -> None:
        SeqKVLayer.activate_past_recording(self)
        LinearAttentionLayer.activate_past_recording(self)

    def crop(self, tokens_to_remove: int) -> None:
        LinearAttentionLayer.crop(self, tokens_to_remove)
        SeqKVLayer.crop(self, tokens_to_remove)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        SeqKVLayer.reset(self)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        SeqKVLayer.reorder_cache(self, beam_idx)


_KINDS = {
    DynamicLayer: SeqKVLayer,
    DynamicSlidingWindowLayer: SeqKVLayer,
    DynamicIndexedLayer: IndexedLayer,
    LinearAttentionAndFullAttentionLayer: HybridLayer,
    LinearAttentionAndSlidingWindowAttentionLayer: HybridLayer,
}


def coded(layer, cache, index: int, config) -> SeqKVLayer | None:
    """What stands in a `SeqKVCache` for a layer of upstream's; None where it keeps no plain keys and values."""
    kind = _KINDS.get(type(layer))
    if kind is None:
        return None
    more = {"number_of_states": layer.number_of_states} if kind is HybridLayer else {}
    return kind(cache, index, config, getattr(layer, "sliding_window", None), **more)


def more_than_pages(layers) -> list[str]:
    """Types of layers that keep more than the keys and values of pages."""
    # A dummy, for a layer that shares another's keys, keeps nothing; 5.21 has none.
    return sorted({type(x).__name__ for x in layers if type(x) is not SeqKVLayer} - {"DummyLayer"})


def refuse_store(family: str, layers) -> None:
    """Raise `UnsupportedModelError` where pages are not all that a sequence leaves behind."""
    if more_than_pages(layers):
        raise UnsupportedModelError(
            f"{family}: layers of type {', '.join(more_than_pages(layers))} keep more than keys and values, which a "
            "prefix store does not hold; leave prefix_store out for this model"
        )
