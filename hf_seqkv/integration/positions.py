"""Cosines and sines of the tokens a cache holds, as the model used them: one table for all layers of a device that
share a RoPE.

The rows are captured rather than recomputed, because dynamic NTK and LongRoPE change their frequencies in
mid-sequence. Only rows of dense tokens are kept; of a page the row of its first token remains (`codec.center`).
"""

from __future__ import annotations

import weakref

import torch

from ..codec.center import expand_rows, page_starts, relative_table


class PositionTable:
    """Rows `[cos | sin]` of recent slots, and the start of every page.

    Args:
        half: Number of RoPE pairs; 0 for layers without RoPE, whose keys have a constant part all the same.
        interleaved: Pairing, see `codec.center.Center`.
        device: Of the layers that share it.
        page_size: Tokens a page.
        keep: Recent slots whose rows may still be needed.
    """

    def __init__(self, half: int, interleaved: bool, device: torch.device, page_size: int, keep: int):
        self.half, self.interleaved, self.device = half, interleaved, device
        self.page_size, self.keep = page_size, keep
        self.clear()

    def clear(self) -> None:
        self.rows: torch.Tensor | None = None  # [B, n, 2 * half], the last of them at slot `end - 1`
        self.end = 0
        self.starts: torch.Tensor | None = None  # [B, N, 2 * half]
        self.counts: list[int] = []
        self.relative: torch.Tensor | None = None
        self._source: weakref.ref | None = None

    def append(self, slot: int, new: int, batch: int, noted) -> None:
        """Rows of the `new` tokens from `slot` on, as a forward was noted; the first layer of it writes."""
        if self.rows is None:
            self.rows = torch.zeros(batch, 0, 2 * self.half, device=self.device)
            self.starts = torch.zeros(batch, 0, 2 * self.half, device=self.device)
            self.counts = [0] * batch
        if self.end == slot + new and self.follows(noted):
            return
        self._source = None if noted.source is None else weakref.ref(noted.source)
        rows = noted.rows()
        if rows is None:
            rows = torch.zeros(1, new, 2 * self.half)
        old = self.rows[:, : max(0, self.rows.shape[1] - (self.end - slot))]
        self.rows = torch.cat([old[:, -self.keep :], rows.to(self.device).expand(batch, -1, -1)], 1)
        self.end = slot + new

    def follows(self, noted) -> bool:
        """Whether the last rows came from the forward that was noted; without RoPE there is nothing to tell apart."""
        return self.half == 0 or (self._source is not None and self._source() is noted.source)

    def tokens(self, row: int, slot: int, count: int) -> torch.Tensor:
        """Rows of `count` tokens from `slot`, `[count, 2 * half]`; zeros for slots that are gone."""
        found = self.rows.new_zeros(count, 2 * self.half)
        first = slot - (self.end - self.rows.shape[1])
        begin, end = max(first, 0), min(first + count, self.rows.shape[1])
        if begin < end:
            found[begin - first : end - first] = self.rows[row, begin:end]
        return found

    def fix(self, row: int, first: int, last: int, slot: int) -> torch.Tensor:
        """Starts of pages `first` to `last` of a row, `[last - first, 2 * half]`; page `first` begins at `slot`.

        Computed by the first layer that encodes them and the same for all others.
        """
        size = self.page_size
        if self.starts.shape[1] < last:
            grown = self.starts.new_zeros(self.starts.shape[0], last + last // 4, 2 * self.half)
            grown[:, : self.starts.shape[1]] = self.starts
            self.starts = grown
        begin = max(first, self.counts[row])
        if begin < last:
            rows = self.tokens(row, slot + (begin - first) * size, (last - begin) * size).unflatten(0, (-1, size))
            if self.relative is None:
                self.relative = relative_table(rows[0])
            self.starts[row, begin:last] = page_starts(rows, self.relative)
            self.counts[row] = last
        return self.starts[row, first:last]

    def counts_from_zero(self, row: int, last: int, sinks: int) -> bool:
        """Whether a row's tokens up to page `last` are at positions 0, 1, 2, ..., `sinks` of them before its pages."""
        begin, turn = self.starts[row, 0], self.relative[min(sinks, len(self.relative) - 1)]
        size = begin.unflatten(0, (2, -1)).square().sum(0).sqrt().repeat(2)
        if sinks < len(self.relative) and not torch.allclose(begin, turn * size, atol=0.02):
            return False
        # Every page is the one before it, turned by its tokens; a page that is not of one run has no turn at all.
        turned = expand_rows(expand_rows(self.starts[row, : last - 1], self.relative[-1:])[:, 0], self.relative[1:2])
        return torch.allclose(self.starts[row, 1:last], turned[:, 0], atol=0.02 * size.max().item())

    def crop(self, end: int, pages: list[int]) -> None:
        """Forget slots from `end` on and, of each row, pages from `pages[row]` on."""
        if self.rows is None:
            return
        if end < self.end:
            self.rows = self.rows[:, : max(0, self.rows.shape[1] - (self.end - end))]
            self.end = end
        self.counts = [min(a, b) for a, b in zip(self.counts, pages, strict=True)]
        self._source = None

    def select(self, index: torch.Tensor) -> None:
        """Keep rows of the batch by index, with repetition."""
        if self.rows is not None:
            at = index.to(self.rows.device)
            self.rows, self.starts = self.rows[at], self.starts[at]
            self.counts = [self.counts[i] for i in index.tolist()]
            self._source = None


def first_slots(ids: torch.Tensor, mask: torch.Tensor | None) -> list[int] | None:
    """Slot of every row's first token; None where a mask is not just left padding."""
    if mask is None:
        return [0] * len(ids)
    if mask.shape != ids.shape:
        return None
    real = mask.cpu() != 0
    pads = (~real).sum(1)
    plain = torch.arange(ids.shape[1]) >= pads[:, None]
    return pads.tolist() if bool((real == plain).all()) else None
