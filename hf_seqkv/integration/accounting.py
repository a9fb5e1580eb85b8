"""Bytes that a cache holds, by part, and what they come to for each value."""

from __future__ import annotations

import math

import torch

from .layer import SeqKVLayer
from .offload import OffloadedPages

# What layers of `mixed.py` keep beside codes.
MIXED = ("indexer_keys", "indexer_position_ids", "conv_states", "recurrent_states")


def memory(cache) -> dict[str, int]:
    """See `SeqKVCache.memory`."""
    names = ("codes", "side_information", "sinks", "recent", "slack", "staging", "tables", "ids", "uncompressed")
    parts, host, rooms = dict.fromkeys(names, 0), 0, []
    for layer in cache.layers:
        parts["uncompressed"] += _bytes(_uncompressed(layer))
        if not isinstance(layer, SeqKVLayer):
            continue
        if not layer.is_initialized:
            continue
        pages = sum(layer._used())
        codes = sum(size for name, (_, size) in layer.codec.sections.items() if not name.endswith("scales"))
        parts["codes"] += pages * codes
        parts["side_information"] += pages * (layer.codec.page_bytes - codes) + _bytes([layer.mean])
        parts["slack"] += _bytes([layer.pages]) - pages * layer.codec.page_bytes
        if isinstance(layer.buffer, OffloadedPages):
            host += _bytes([layer.pages])
            rooms += [slot.room for slot in layer.buffer.staging.slots]
        if layer.held is not None:
            held, room = layer.held.bytes()
            parts["side_information"] += held
            parts["slack"] += room
        parts["sinks"] += _bytes([layer.sink_k, layer.sink_v])
        parts["recent"] += _bytes([layer.recent_k, layer.recent_v])
    for table in cache._distinct_tables():
        starts = sum(table.counts) * 2 * table.half * 4
        parts["side_information"] += starts
        parts["tables"] += _bytes([table.rows, table.starts, table.relative]) - starts
    parts["tables"] += _bytes([t for codec in cache._codecs.values() for t in codec.tables])
    parts["ids"] = _bytes(cache._ids)
    parts["staging"] = _bytes(rooms)
    return parts | {"total": sum(parts.values()), "host": host}


def _uncompressed(layer) -> list[torch.Tensor]:
    """What a layer keeps that is not ours: all of a layer of another kind, states and indexer's keys of a mixed one."""
    mine = vars(layer)
    names = mine if not isinstance(layer, SeqKVLayer) else MIXED
    found = [mine[name] for name in names if name in mine]
    tensors = [x for value in found for x in (value.values() if isinstance(value, dict) else [value])]
    return [x for x in tensors if isinstance(x, torch.Tensor) and x.dim() > 0]


def bits_per_value(cache) -> float:
    """See `SeqKVCache.bits_per_value`."""
    parts, values = memory(cache), 0
    for layer in cache._coded():
        if layer.is_initialized:
            tokens = sum(layer._used()) * layer.codec.page_size
            values += tokens * layer.codec.heads * (layer.codec.key_dim + layer.codec.value_dim)
    return (parts["codes"] + parts["side_information"]) * 8 / values if values else math.nan


def _bytes(tensors) -> int:
    """Bytes of the distinct storages behind tensors."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())
