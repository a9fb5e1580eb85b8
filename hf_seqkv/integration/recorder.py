"""`Recorder`: the pages that a forward makes, put together over all layers, with all that is needed to load them again.

A recorded page is the same whatever cache it is loaded into: positions are those of its own tokens, held tokens are
numbered within it, and a sequence's first page brings what the sequence has once (sinks, key means, turns of RoPE).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..codec.sequence import SequenceCodec
from .sequence_pages import SequencePages


@dataclass
class Pages:
    """Consecutive pages of one row.

    Args:
        row, first: Of the batch, and number of the first page.
        payloads: Of each coded layer, `[N, page_bytes]` uint8.
        held: Of each coded layer, tokens `[n]` counted from the first page's first, keys `[H, n, Dk]` and values
            `[H, n, Dv]` bf16; None where a layer holds none.
        starts: Of each position table, `[N, 2 * half]`.
        relative: Of each position table, `[P, 2 * half]`.
        means: Of each coded layer, `[H, Dk]`, or None.
        sinks: Keys and values of each coded layer, `[H, n_sink, D]`.
        coded: By the sequence codec; None where there is none.
    """

    row: int
    first: int
    payloads: list[torch.Tensor]
    held: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None]
    starts: list[torch.Tensor]
    relative: list[torch.Tensor]
    means: list[torch.Tensor | None]
    sinks: list[tuple[torch.Tensor, torch.Tensor]]
    coded: list[bytes] | None
    page_size: int


class Recorder:
    """Listens to the layers of a cache.

    Args:
        sequence: Codes pages too, while they are dense.
    """

    def __init__(self, cache, sequence: SequenceCodec | None = None):
        self.cache = cache
        self.coder = None if sequence is None else SequencePages(cache, sequence)
        self._seen: dict[tuple[int, int], dict[int, tuple]] = {}

    def see(self, index: int, rows: list[int], first: int, slot: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Dense pages about to be encoded; see `SeqKVCache.before_pages`."""
        if self.coder is not None:
            self.coder.add(index, rows, first, slot, k, v)

    def add(self, layer, rows: list[int], first: int, pages: torch.Tensor) -> None:
        """Pages `[R, N, page_bytes]` that a layer made of its `rows`, the first of number `first`."""
        for i, row in enumerate(rows):
            begin, held = layer._page_slot(row, first), None
            if layer.held is not None:
                slots, k, v = layer.held.between(row, begin, begin + pages.shape[1] * layer.config.page_size)
                held = slots - begin, k, v
            self._seen.setdefault((row, first), {})[layer.index] = pages[i], held

    def take(self) -> list[Pages]:
        """What was added since the last call, once all layers have run."""
        coded = {} if self.coder is None else self.coder.take()
        layers = [layer for layer in self.cache._coded() if layer.is_initialized]
        tables = self.cache._distinct_tables()
        found = []
        for (row, first), seen in self._seen.items():
            if len(seen) < len(layers):
                continue  # a forward that failed midway
            payloads, held = zip(*(seen[layer.index] for layer in layers), strict=True)
            last = first + len(payloads[0])
            # A flush of many pages is seen in runs, but coded whole.
            whole = next((x for (r, f), x in coded.items() if r == row and f <= first < f + len(x)), None)
            begin = next((f for (r, f), x in coded.items() if x is whole), 0)
            found.append(
                Pages(
                    row,
                    first,
                    list(payloads),
                    list(held),
                    [table.starts[row, first:last].clone() for table in tables],
                    [table.relative for table in tables],
                    [None if layer.mean is None else layer.mean[row].clone() for layer in layers],
                    [(layer.sink_k[row].clone(), layer.sink_v[row].clone()) for layer in layers],
                    None if whole is None else whole[first - begin : last - begin],
                    self.cache.seqkv_config.page_size,
                )
            )
        self._seen.clear()
        return sorted(found, key=lambda pages: (pages.row, pages.first))

    def clear(self) -> None:
        """Forget what was not taken."""
        self._seen.clear()
        if self.coder is not None:
            self.coder.clear()
