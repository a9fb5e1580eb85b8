"""Rows of an empty cache from page records: what the prefix store gives back.

Rows of a batch may have found prefixes of different lengths; a cache has one length. Records of codes fill every row as
far as they go, and the cache is cropped to the shortest; what the sequence codec decodes goes in as a first prefill's
tokens would.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from ..codec.center import expand_rows, rotate
from ..errors import FormatError
from .records import Record
from .state import layer_device, set_state


@dataclass(frozen=True)
class Row:
    """What one row of the batch found.

    Args:
        start: Slot of its first token.
        records: Of its first pages, at least one.
    """

    start: int
    records: Sequence[Record]

    def section(self, name: str, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """A flat tensor of the first record as tensors of `shapes`.

        Raises:
            FormatError: It has another size.
        """
        flat, sizes = self.records[0].tensors.get(name), [prod(shape) for shape in shapes]
        if flat is None or flat.numel() != sum(sizes):
            raise FormatError(f"stored first page: {name} are not the {sum(sizes)} numbers of this model; drop it")
        return [x.view(*shape) for x, shape in zip(flat.split(sizes), shapes, strict=True)]

    def starts(self, halves: Sequence[int]) -> list[torch.Tensor]:
        """Of each position table, `[N, 2 * half]`."""
        flat = torch.stack([record.tensors["starts"] for record in self.records])
        return list(flat.split([2 * half for half in halves], 1))

    def relative(self, halves: Sequence[int], size: int) -> list[torch.Tensor]:
        return self.section("relative", [(size, 2 * half) for half in halves])

    def sinks(self, count: int, layers) -> list[tuple[torch.Tensor, torch.Tensor]]:
        shapes = [(heads, count, dim) for _, (heads, *dims), _ in layers for dim in dims]
        found = self.section("sinks", shapes)
        return list(zip(found[::2], found[1::2], strict=True))

    def means(self, layers) -> list[torch.Tensor]:
        return self.section("means", [(heads, key_dim) for _, (heads, key_dim, _), _ in layers])


def length(cache, row: Row) -> int:
    """Slots that a row's records fill."""
    return row.start + cache.seqkv_config.n_sink + len(row.records) * cache.seqkv_config.page_size


def fill(cache, rows: Sequence[Row], payloads: Sequence[Sequence[torch.Tensor]], ids: torch.Tensor) -> int:
    """Fill an empty cache that is bound to its model with codes; returns its length, that of the shortest row.

    Args:
        payloads: Of every row, for each layer `[N, page_bytes]` uint8.
        ids: `[B, T]`, pads included.

    Raises:
        FormatError: The records do not fit the cache.
    """
    facts, config = _shared_facts(rows), cache.seqkv_config
    ends = [length(cache, row) for row in rows]
    counts = [len(row.records) for row in rows]
    tensors, tables = _tables(cache, rows, facts, max(ends), counts)
    tensors["ids"] = ids[:, : max(ends)]
    sinks, held = (
        [row.sinks(config.n_sink, facts["layers"]) for row in rows],
        [_held(row, facts, config.page_size) for row in rows],
    )
    means = [row.means(facts["layers"]) for row in rows] if cache.centers_keys else None
    common = {"start": [row.start for row in rows], "counts": counts, "kept": [0] * len(rows), "base": min(ends)}
    layers = []
    for at, (index, (heads, key_dim, value_dim), table) in enumerate(facts["layers"]):
        made = {"pages": _stack([x[at] for x in payloads])}
        for side, name, dim in ((0, "k", key_dim), (1, "v", value_dim)):
            made[f"sink_{name}"] = torch.stack([x[at][side] for x in sinks])
            made[f"recent_{name}"] = made[f"sink_{name}"].new_zeros(len(rows), heads, max(ends) - min(ends), dim)
        if means is not None:
            made["mean"] = torch.stack([x[at] for x in means])
        slots = [x[at][0] + row.start + config.n_sink for x, row in zip(held, rows, strict=True)]
        if any(map(len, slots)):
            made["held_slots"] = _stack(slots, -1)
            for side, name in ((1, "k"), (2, "v")):
                made[f"held_{name}"] = _stack([x[at][side] for x in held]).transpose(1, 2)
        tensors |= {f"{index}.{name}": x for name, x in made.items()}
        shape = (heads, key_dim, value_dim)
        facts_here = {"index": index, "shape": shape, "table": table, "held": [len(x) for x in slots]}
        layers.append(common | facts_here | {"length": max(ends), "dropped": 0})
    set_state(cache, tensors, {"dtype": facts["dtype"], "layers": layers, "tables": tables})
    if min(ends) < max(ends):
        cache.crop(min(ends) - max(ends))
    for layer in cache._coded():
        if layer.is_initialized:
            layer._drop(layer.counts)
    _trim(cache)
    return min(ends)


def fill_decoded(cache, rows: Sequence[Row], ids: torch.Tensor, decoded: Iterable) -> int:
    """As `fill`, with what the sequence codec decoded, layer by layer.

    Args:
        decoded: For every layer, for every row keys before RoPE and values, `[N, H, P, D]` fp32.
    """
    facts, config = _shared_facts(rows), cache.seqkv_config
    end = min(length(cache, row) for row in rows)
    counts = [len(row.records) for row in rows]
    tensors, tables = _tables(cache, rows, facts, end, counts)
    angles = [tensors[f"table.{t}.rows"] for t in range(len(tables))]
    sinks = [row.sinks(config.n_sink, facts["layers"]) for row in rows]
    dtype, batch = getattr(torch, facts["dtype"]), len(rows)
    blank = {"start": [0] * batch, "counts": [0] * batch, "kept": [0] * batch, "base": 0, "length": 0, "dropped": 0}
    layers = [
        blank | {"index": index, "shape": shape, "table": table, "held": [0] * batch}
        for index, shape, table in facts["layers"]
    ]
    for index, (heads, key_dim, value_dim), _ in facts["layers"]:
        codec = cache.codec(index, heads, key_dim, value_dim, dtype, layer_device(cache, index))
        empty = {"pages": torch.empty(batch, 0, codec.page_bytes, dtype=torch.uint8)}
        for name, dim in (("k", key_dim), ("v", value_dim)):
            empty[f"sink_{name}"] = torch.zeros(batch, heads, config.n_sink, dim, dtype=dtype)
            empty[f"recent_{name}"] = torch.empty(batch, heads, 0, dim, dtype=dtype)
        if cache.centers_keys:
            empty["mean"] = torch.zeros(batch, heads, key_dim)
        tensors |= {f"{index}.{name}": x for name, x in empty.items()}
    for table in tables:
        table["counts"] = [0] * batch  # turns of pages are found again from the rows, as in a prefill
    tensors["ids"] = ids[:, :end]
    set_state(cache, tensors, {"dtype": facts["dtype"], "layers": layers, "tables": tables})
    recorder, cache.recorder = cache.recorder, None  # these pages are known
    try:
        for at, (made, pairs) in enumerate(zip(layers, decoded, strict=True)):
            layer, table = cache.layers[made["index"]], tables[made["table"]]
            whole = []
            for side in range(2):
                first = sinks[0][at][side]
                x = first.new_zeros(batch, first.shape[0], end, first.shape[2])
                for i, (row, pair) in enumerate(zip(rows, pairs, strict=True)):
                    begin = row.start + config.n_sink
                    tokens = pair[side].transpose(0, 1).flatten(1, 2)[:, : end - begin]
                    if side == 0:
                        turn = angles[made["table"]][i, begin : begin + tokens.shape[1]]
                        tokens = rotate(tokens, turn, table["interleaved"])
                    x[i, :, row.start : begin], x[i, :, begin:end] = sinks[i][at][side], tokens.to(dtype)
                whole.append(x.to(layer.device))
            layer.start, layer.length = [row.start for row in rows], end
            layer._flush(whole, layer._plan(whole))
    finally:
        cache.recorder = recorder
    _trim(cache)
    return end


def _trim(cache) -> None:
    """Keep the position tables' rows of recent slots only, as a cache that ran would."""
    for table in cache._distinct_tables():
        table.rows = table.rows[:, -table.keep :].clone()


def _shared_facts(rows: Sequence[Row]) -> dict[str, Any]:
    facts = rows[0].records[0].facts
    if any(row.records[0].facts != facts for row in rows) or {"layers", "tables", "dtype"} - set(facts):
        raise FormatError("stored first pages do not say, or not alike, what their layers are; drop them")
    return facts


def _tables(cache, rows: Sequence[Row], facts, end: int, counts: list[int]) -> tuple[dict[str, torch.Tensor], list]:
    """Tensors and facts of the position tables, with rows of all slots up to `end`."""
    config, halves = cache.seqkv_config, [half for half, _ in facts["tables"]]
    starts, relative = [row.starts(halves) for row in rows], [row.relative(halves, config.page_size) for row in rows]
    tensors, tables = {}, []
    for t, (half, interleaved) in enumerate(facts["tables"]):
        turned = torch.zeros(len(rows), end, 2 * half)
        for i, row in enumerate(rows):
            begin = row.start + config.n_sink
            found = expand_rows(starts[i][t], relative[i][t]).flatten(0, 1)[: end - begin]
            turned[i, begin : begin + len(found)] = found
        tensors[f"table.{t}.rows"] = turned
        tensors[f"table.{t}.starts"] = _stack([x[t] for x in starts])
        tensors[f"table.{t}.relative"] = relative[0][t]
        tables.append({"half": half, "interleaved": interleaved, "end": end, "counts": list(counts)})
    return tensors, tables


def _stack(rows: Sequence[torch.Tensor], blank: int = 0) -> torch.Tensor:
    """Rows of different lengths `[n, ...]` as one tensor `[B, most, ...]`."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=blank)


def _held(row: Row, facts, size: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Of each layer tokens `[n]` counted from the first page's first, keys and values `[n, H, D]`."""
    shapes = [shape for _, shape, _ in facts["layers"]]
    found: list[list] = [[] for _ in shapes]
    for page, record in enumerate(row.records):
        places, flat = record.tensors.get("held_at"), record.tensors.get("held")
        if places is None:
            continue
        places = places.tolist()
        sizes = [shapes[layer][0] * dim for layer, _ in places for dim in shapes[layer][1:]]
        if flat is None or flat.numel() != sum(sizes):
            raise FormatError("stored page: its held tokens are not as many as it says; drop it")
        parts = flat.split(sizes)
        for n, (layer, token) in enumerate(places):
            found[layer].append((page * size + token, parts[2 * n], parts[2 * n + 1]))
    made = []
    for (heads, *dims), tokens in zip(shapes, found, strict=True):
        slots = torch.tensor([token for token, *_ in tokens], dtype=torch.int64)
        sides = [[x[side].view(heads, dim) for x in tokens] for side, dim in enumerate(dims, 1)]
        empty = [torch.empty(0, heads, dim, dtype=torch.bfloat16) for dim in dims]
        made.append((slots, *(torch.stack(x) if x else blank for x, blank in zip(sides, empty, strict=True))))
    return made
