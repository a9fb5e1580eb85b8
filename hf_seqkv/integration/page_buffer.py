"""`PageBuffer`: the memory in which one layer's pages lie, with room for more."""

from __future__ import annotations

import torch


class PageBuffer:
    """Pages on the device of their layer. Between growths they stay where they are in memory.

    Args:
        pages: `[B, capacity, page_bytes]` uint8; taken over.
    """

    def __init__(self, pages: torch.Tensor):
        self.hold(pages)

    def hold(self, pages: torch.Tensor) -> None:
        """Have these pages instead, `[B, capacity, page_bytes]` uint8."""
        self.pages = pages

    def empty(self, *shape: int) -> torch.Tensor:
        """Memory of the kind in which the pages lie, uint8."""
        return self.pages.new_empty(shape)

    def grow(self, capacity: int) -> None:
        grown = self.empty(len(self.pages), capacity, self.pages.shape[2])
        grown[:, : self.pages.shape[1]] = self.pages
        self.pages = grown

    def drop(self, count: int) -> None:
        """Forget the first pages of every row."""
        rest = self.pages[:, count:]
        self.pages = self.empty(*rest.shape).copy_(rest)

    def select(self, index: torch.Tensor) -> None:
        """Keep rows of the batch by index, with repetition."""
        chosen = self.empty(len(index), *self.pages.shape[1:])
        self.pages = torch.index_select(self.pages, 0, index.to(self.pages.device), out=chosen)

    def put(self, rows: list[int], at: int, pages: torch.Tensor) -> None:
        """Write `pages [R, N, page_bytes]` of the layer's device to page `at`, and behind it, of `rows`."""
        pick = slice(None) if len(rows) == len(self.pages) else rows
        self.pages[pick, at : at + pages.shape[1]] = pages

    def on_device(self) -> torch.Tensor:
        """`[B, N, page_bytes]` on the layer's device, `N` at least what the longest row has: for one attention."""
        return self.pages
