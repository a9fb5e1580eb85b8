"""`PagedTokens`: the tokens of one layer, `[ sinks | pages | recent ]` for every row; written, cut, reordered, viewed.

Rows are aligned to their own first token: left padding is never stored, and a row's pages are the same bytes whatever
its neighbours. `start` is a row's first real slot, `counts` its pages; before its first page a row's tokens, sinks
included, are all in `recent`.

    slot:   0 ... start | n_sink | page 0 | page 1 | ... | recent ... | length
            pads          sinks    ^ _page_slot(row, 0)    ^ _dense_slot(row)
"""

from __future__ import annotations

import torch

from ..codec.center import Center, rotate
from ..config import SeqKVConfig
from ..kernels.interface import DenseRun, LayerView, select_backend
from .held import HeldTokens, important
from .nonfinite import refuse_nonfinite
from .page_buffer import PageBuffer

ENCODE_PAGES = 64  # pages encoded at once: bounds the temporaries of a long prefill


class PagedTokens:
    """Storage of a layer. Its owner provides `cache` (codecs, position tables) and calls `_clear` first.

    Args of a layer: `index`, `config`, and `sliding_window`, None for full attention.
    """

    index: int
    config: SeqKVConfig
    sliding_window: int | None
    record_past: bool

    def _clear(self) -> None:
        self.codec = None
        self.buffer: PageBuffer | None = None
        self.sink_k = self.sink_v = None  # [B, H, n_sink, D]
        self.recent_k = self.recent_v = None  # [B, H, capacity, D], first token at slot `base`
        self.mean = None  # [B, H, Dk] constant part of the keys
        self.held: HeldTokens | None = None
        self.length = self.base = self.dropped = 0
        self.start: list[int] = []
        self.counts: list[int] = []  # pages of each row, dropped ones included
        self.kept: list[int] = []  # tokens of page `counts[row]` whose codes, in place, outlived a crop

    @property
    def pages(self) -> torch.Tensor:
        """`[B, capacity, page_bytes]` uint8, where they lie; what is assigned is moved there."""
        return self.buffer.pages

    @pages.setter
    def pages(self, pages: torch.Tensor) -> None:
        self.buffer.hold(pages)

    def _used(self) -> list[int]:
        """Pages that each row has in `pages`."""
        return [max(0, count - self.dropped) for count in self.counts]

    def _offset(self) -> int:
        """First slot that is still held: 0 until a sliding layer drops pages."""
        if self.dropped == 0:
            return 0
        return min(self._page_slot(row, self.dropped) for row in range(len(self.start)))

    def _page_slot(self, row: int, page: int) -> int:
        return self.start[row] + self.config.n_sink + page * self.config.page_size

    def _dense_slot(self, row: int) -> int:
        """First slot of a row that is not in a page (or a sink beside pages)."""
        return self._page_slot(row, self.counts[row]) if self.counts[row] else self.start[row]

    def _allocate(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Empty buffers for tokens like these."""
        batch, heads, _, key_dim = key_states.shape
        value_dim = value_states.shape[-1]
        self.dtype, self.device = key_states.dtype, key_states.device
        self.codec = self.cache.codec(self.index, heads, key_dim, value_dim, self.dtype, self.device)
        pages = torch.empty(batch, 0, self.codec.page_bytes, dtype=torch.uint8, device=self.device)
        self.buffer = PageBuffer(pages)
        self.sink_k = key_states.new_zeros(batch, heads, self.config.n_sink, key_dim)
        self.sink_v = key_states.new_zeros(batch, heads, self.config.n_sink, value_dim)
        self.recent_k = key_states.new_empty(batch, heads, 0, key_dim)
        self.recent_v = key_states.new_empty(batch, heads, 0, value_dim)
        self.start, self.counts, self.kept = [0] * batch, [0] * batch, [0] * batch
        self.mean = self.cache.initial_mean(batch, heads, key_dim, self.device)
        self.importance = self.cache.importance(self.index, self.device)
        self.held = None if self.importance is None else HeldTokens(key_states, value_states)

    def _appended(self, key_states, value_states):
        """Dense tokens with the new ones behind them, `[B, H, n, D]`; in place where the buffers have room."""
        held, new = self.length - self.base, key_states.shape[2]
        out = []
        for name, fresh in (("recent_k", key_states), ("recent_v", value_states)):
            buffer = getattr(self, name)
            if held + new > buffer.shape[2]:
                grown = fresh.new_empty(*fresh.shape[:2], max(held + new, self._capacity()), fresh.shape[3])
                grown[:, :, :held] = buffer[:, :, :held]
                buffer = grown
                setattr(self, name, buffer)
            buffer.narrow(2, held, new).copy_(fresh)
            out.append(buffer.narrow(2, 0, held + new))
        return tuple(out)

    def _capacity(self) -> int:
        """Dense tokens there can be between pages; those of rows that fill their pages at different times, too."""
        size = self.config.page_size
        return self.config.n_sink + self.config.residual_length + size * min(len({s % size for s in self.start}), 2)

    def _plan(self, source) -> list[tuple[list[int], int, int, int]]:
        """Rows that owe pages, grouped: `(rows, first page, number of pages, slot of the first)`.

        Raises:
            NonFiniteError: Of any token that would be encoded.
        """
        groups: dict[tuple[int, int, int], list[int]] = {}
        size, keep = self.config.page_size, self.config.residual_length
        for row, count in enumerate(self.counts):
            slot = self._page_slot(row, count)
            due = (self.length - keep - slot) // size
            if due > 0:
                groups.setdefault((count, due, slot), []).append(row)
        for (_, due, slot), rows in groups.items():
            if self.config.method == "dense":
                break
            at, end = max(0, self._dense_slot(rows[0]) - self.base), slot - self.base + due * size
            for name, x in zip(("keys", "values"), source, strict=True):
                part = x[rows, :, at:end] if len(rows) < len(x) else x[:, :, at:end]
                refuse_nonfinite(part, name, self.index, rows, at + self.base)
        return [(rows, *key) for key, rows in groups.items()]

    def _flush(self, source, plan) -> None:
        """Turn all but the recent tokens into pages, then keep a copy of those: frees the dense tensors."""
        k, v = source
        if plan:
            after = list(self.counts)
            for rows, first, due, _ in plan:
                for row in rows:
                    after[row] = first + due
            self._drop(after)
        for rows, first, due, slot in plan:
            pick = slice(None) if len(rows) == len(k) else torch.tensor(rows, device=self.device)
            if first == 0 and self.config.n_sink:
                at = slot - self.base
                self.sink_k[pick] = k[pick, :, at - self.config.n_sink : at]
                self.sink_v[pick] = v[pick, :, at - self.config.n_sink : at]
            self._encode(rows, pick, k, v, first, due, slot)
        if not plan and self.recent_k.shape[2] >= self.length - self.base:
            return
        base = min(self._dense_slot(row) for row in range(len(self.counts)))
        base = max(self.base, min(base, self.length))
        kept = self.length - base
        for name, x in (("recent_k", k), ("recent_v", v)):
            fresh = x.new_empty(*x.shape[:2], max(kept, self._capacity()), x.shape[3])
            fresh[:, :, :kept] = x[:, :, base - self.base :]
            setattr(self, name, fresh)
        self.base = base

    def _encode(self, rows, pick, k, v, first: int, due: int, slot: int) -> None:
        size, last = self.config.page_size, first + due
        backend = select_backend(self.config.backend, self.codec, self.device)
        self._reserve(last)
        table = self.cache.table(self.index)
        if table is not None:
            starts = torch.stack([table.fix(row, first, last, slot) for row in rows])
            if first == 0 and self.mean is not None:
                self._measure_mean([row for row in rows if not self.kept[row]], k, table, slot)
        begin = slot - self.base
        pages_k, pages_v = (
            x[pick, :, begin : begin + due * size].unflatten(2, (-1, size)).transpose(1, 2) for x in (k, v)
        )
        pages_k, pages_v = self.cache.before_pages(self.index, rows, first, slot, pages_k, pages_v)
        recorder = self.cache.recorder  # wants pages too that have already left a sliding window
        skip = max(first, self.dropped) if recorder is None else first
        for at in range(skip, last, ENCODE_PAGES):
            until = min(at + ENCODE_PAGES, last)
            keys, values = (x[:, at - first : until - first] for x in (pages_k, pages_v))
            center = None
            if self.mean is not None:
                begins = starts[:, at - first : until - first]
                center = Center(self.mean[pick], begins, table.relative, table.interleaved)
            pages = backend.encode_pages(self.codec, keys, values, center)
            if self.held is not None:
                self._hold(rows, pages, keys, values, slot + (at - first) * size)
            for i, row in enumerate(rows):
                if at == first and self.kept[row]:
                    old = self.pages[row, at - self.dropped].to(self.device)
                    pages[i, 0] = self.codec.splice(old, pages[i, 0], self.kept[row])
            if recorder is not None:
                recorder.add(self, rows, at, pages.to(self.pages.device))
            gone = max(0, self.dropped - at)
            if gone < until - at:
                self.buffer.put(rows, at + gone - self.dropped, pages[:, gone:])
        if self.held is not None and skip < self.dropped:
            for row in rows:
                self.held.keep(row, self._page_slot(row, self.dropped), self.length)
        for row in rows:
            self.counts[row], self.kept[row] = last, 0

    def _hold(self, rows: list[int], pages, k, v, slot: int) -> None:
        """Hold tokens of new pages `[R, N, page_bytes]`, the first at `slot`, but none whose codes outlived a crop."""
        count, size = k.shape[1], k.shape[3]
        table = self.cache.table(self.index)
        angles = torch.stack([table.tokens(row, slot, count * size) for row in rows])
        place = torch.arange(slot, slot + count * size, device=k.device)
        positions = torch.stack([place - self.start[row] for row in rows])
        chosen = important(self.importance, k, v, angles, table.interleaved, positions, self.cache.shard)
        for i, row in enumerate(rows):
            chosen[i].view(-1)[: max(0, self._page_slot(row, self.counts[row]) + self.kept[row] - slot)] = False
        self.codec.vacate(pages, chosen)
        for i, row in enumerate(rows):
            self.held.park(row, slot + count * size)
            self.held.add(row, *(x[i].transpose(0, 1).flatten(1, 2) for x in (k, v)), place, chosen[i].flatten())

    def _measure_mean(self, rows: list[int], k, table, slot: int) -> None:
        """Constant part of the keys: the mean over the row's first page, before RoPE.

        Only the row's own first tokens enter, so its codes do not depend on anything else.
        """
        if not rows:
            return
        at, size = slot - self.base, self.config.page_size
        angles = torch.stack([table.tokens(row, slot, size) for row in rows])[:, None]
        plain = rotate(k[rows, :, at : at + size].float(), angles, table.interleaved, inverse=True)
        self.mean[rows] = plain.mean(2)

    def _reserve(self, pages: int) -> None:
        """Room for pages up to `pages`: doubled, but not beyond what the sequence is expected to need.

        Between growths pages stay where they are in memory. A first prefill gets no more than is expected of it.
        """
        need, held = pages - self.dropped, self.pages.shape[1]
        if need <= held:
            return
        tokens = self.cache.expected_length - self.config.n_sink - self.config.residual_length
        expected = tokens // self.config.page_size - self.dropped
        room = min(2 * need, expected) if need <= expected else 2 * need if held else need
        self.buffer.grow(room)

    def _drop(self, counts: list[int]) -> None:
        """Forget pages of a sliding layer, `counts` of each row, that no query to come can see.

        A margin of `residual_length` is kept for `crop`, and everything while the past is recorded for a rollback.
        """
        if self.sliding_window is None or self.record_past:
            return
        seen = self.length - self.sliding_window + 1 - self.config.residual_length
        outside = [(seen - self._page_slot(row, 0)) // self.config.page_size for row in range(len(counts))]
        drop = min(map(min, outside, counts))
        if drop > self.dropped:
            self.buffer.drop(drop - self.dropped)
            self.dropped = drop
            if self.held is not None:
                for row in range(len(counts)):
                    self.held.keep(row, self._page_slot(row, drop), self.length)

    def view(self, source=None, offset: int | None = None, new: int = 0) -> LayerView:
        """Snapshot of what the layer holds from slot `offset` on, or of all; `source`: dense tokens not yet flushed.

        `new` tokens count that are to be written behind those held, where there is room.
        """
        if source is None:
            held = self.length + new - self.base
            source = self.recent_k[:, :, :held], self.recent_v[:, :, :held]
        rows = range(len(self.counts))
        table = self.cache.table(self.index)
        center = None
        if self.mean is not None and table is not None and table.relative is not None:
            starts = table.starts[:, self.dropped :] if self.dropped else table.starts
            center = Center(self.mean, starts, table.relative, table.interleaved)
        sinks = [0 if self.counts[row] and not self.dropped else self.config.n_sink for row in rows]
        return LayerView(
            codec=self.codec,
            pages=self.buffer.on_device(),
            counts=self._used(),
            page_slots=[self._page_slot(row, self.dropped) for row in rows],
            sinks=DenseRun(self.sink_k, self.sink_v, list(self.start), sinks),
            recent=DenseRun(*source, [self.base] * len(rows), [self._dense_slot(row) - self.base for row in rows]),
            center=center,
            length=self.length + new,
            offset=self._offset() if offset is None else offset,
            side=None if self.held is None else self.held.table(),
        )

    def _select(self, index: torch.Tensor) -> None:
        """Keep rows of the batch by index, with repetition."""
        if not self.is_initialized:
            return
        at = index.to(self.device)
        self.buffer.select(index)
        for name in ("sink_k", "sink_v", "recent_k", "recent_v", "mean"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.index_select(0, at))
        if self.held is not None:
            self.held.select(index)
        order = index.tolist()
        for name in ("start", "counts", "kept"):
            setattr(self, name, [getattr(self, name)[i] for i in order])
