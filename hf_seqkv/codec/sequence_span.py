"""What a thread of the sequence codec does: a run of pages, all their parts in turn."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import importance
from .sequence_part import Context, PartCoder


class Span:
    """Pages that one thread codes, layer by layer; what they decode to goes into their rows of all pages'.

    Args:
        codec: A `SequenceCodec`.
        embedded: Of all pages, `[N, P, E]`, or None.
    """

    def __init__(self, codec, embedded: torch.Tensor | None, pages: slice):
        self.codec, self.pages, self.parts = codec, pages, 0
        self.rows = slice(pages.start * codec.page_size, pages.stop * codec.page_size)
        self.context = Context(None if embedded is None else embedded[pages])

    def part(self) -> tuple[int, PartCoder, torch.Tensor]:
        """Number and coder of the next part, and its prediction."""
        coder, self.parts = self.codec.coders[self.parts], self.parts + 1
        return self.parts - 1, coder, self.context.predict(coder.part)


class Encoding(Span):
    """Their keys and values, layer by layer to symbols, then to bytes."""

    def __init__(self, codec, embedded: torch.Tensor | None, pages: slice):
        super().__init__(codec, embedded, pages)
        self.coded: list[tuple[torch.Tensor, ...]] = []

    def add(self, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, decoded: Sequence[torch.Tensor]) -> None:
        k, v = (x[self.pages].float().cpu().transpose(1, 2).flatten(0, 1) for x in (k, v))  # [N * P, H, D]
        found = importance.features(k, v, positions[self.pages].flatten())
        for x, out in zip((k, v), decoded, strict=True):
            _, coder, predicted = self.part()
            levels = importance.levels(found, coder.part.importance)
            coded = coder.encode(x.flatten(1), predicted, levels, out[self.rows])
            self.context.add(out[self.rows])
            self.coded.append((levels.unflatten(0, (-1, self.codec.page_size)), *coded))

    def finish(self) -> list[bytes]:
        levels, loud, quiet, fine = zip(*self.coded, strict=True)
        return self.codec.write(torch.stack(levels, 1), loud, torch.cat(quiet, 1), fine)


class Decoding(Span):
    """From what was read of them to keys and values, layer by layer."""

    def __init__(self, codec, embedded: torch.Tensor | None, pages: slice, read: Sequence):
        super().__init__(codec, embedded, pages)
        levels, self._loud, active, self._fine = zip(*read, strict=True)
        self._levels, self._active = torch.stack(levels, 1).flatten(1), codec.quiet.by_part(active)

    def next(self, decoded: Sequence[torch.Tensor]) -> None:
        for out in decoded:
            index, coder, predicted = self.part()
            loud, fine = torch.stack([x[index] for x in self._loud]), torch.cat([x[index] for x in self._fine])
            coder.decode(loud, self._active[index], fine, self._levels[index], predicted, out[self.rows])
            self.context.add(out[self.rows])
