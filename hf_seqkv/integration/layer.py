"""`SeqKVLayer`: `PagedTokens` behind the interface of a transformers cache layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import DynamicLayer

from ..config import SeqKVConfig
from ..errors import ConfigError, SeqKVError, UnsupportedOperationError
from .handle import Handle
from .offload import OffloadedPages, offloaded
from .page_buffer import PageBuffer
from .paged import PagedTokens

if TYPE_CHECKING:
    from .step_graph import Recording


class SeqKVLayer(PagedTokens, DynamicLayer):
    """Cache of one layer; `sliding_window` is the window of a sliding or chunked layer, None for full attention.

    Args:
        cache: The `SeqKVCache` it belongs to: codecs, position tables and what was captured of the forward.
        index: Layer index.
    """

    def __init__(self, cache, index: int, config: SeqKVConfig, sliding_window: int | None = None):
        DynamicLayer.__init__(self)
        self.cache, self.index, self.config, self.sliding_window = cache, index, config, sliding_window
        self.is_sliding = sliding_window is not None
        self.supports_early_init = False
        self.record_past = False
        self.recording: Recording | None = None  # while a step is recorded
        self._clear()

    def _clear(self) -> None:
        super()._clear()
        self.is_initialized = False

    # -- sizes ---------------------------------------------------------------------------------------------------

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1 if self.sliding_window is None else self.sliding_window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        offset = self._seen_from()
        return self.length + query_length - offset, offset

    def _seen_from(self) -> int:
        """First slot that the next tokens attend to: of a sliding layer as upstream has it, though more is held.

        A model whose masks do not know the window slides by the length of the cache alone.
        """
        window = self.length + 1 if self.sliding_window is None else self.sliding_window
        return max(self._offset(), self.length - window + 1)

    # -- writing -------------------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self._allocate(key_states, value_states)
        self.is_initialized = True
        if self.config.offload:
            self.offload()

    @torch.compiler.disable(reason="the cache's bookkeeping is Python")
    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Store new tokens and return what the model attends to.

        A first prefill gets its own dense tensors back; later calls get storage-less handles (see `handle.py`).

        Args:
            key_states, value_states: `[B, H, Tq, Dk]` and `[B, H, Tq, Dv]`, keys rotated as the model rotates them.

        Raises:
            NonFiniteError: Tokens that are due for a page hold NaN or infinity; nothing was stored.
            ConfigError: Shape or dtype differ from what the cache holds.
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise UnsupportedOperationError(
                "a SeqKVCache stores codes, through which no gradient flows; wrap the call in torch.no_grad(), or "
                "train with use_cache=False"
            )
        if self.recording is not None:
            return self.recording.update(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check(key_states, value_states)
        batch, _, new, _ = key_states.shape
        noted = self.cache.noted(self.index)
        table = self.cache.table(self.index, noted)
        if table is not None:
            table.append(self.length, new, batch, noted)
        offset = self._seen_from()
        start = noted.first_tokens(self.start, self.length, offset, new)
        first = self.length == 0
        source = (key_states, value_states) if first else self._appended(key_states, value_states)
        plan = self._count(source, start, new)
        result = (key_states, value_states) if first else self._handles(source, offset)
        self._flush(source, plan)
        return result

    def _count(self, source, start: list[int], new: int) -> list:
        """Have `new` tokens more, which `source` has already: what `_plan` says then. Nothing changes if it raises."""
        before = self.start, self.length, self.base
        self.start, self.length, self.base = start, self.length + new, self.base if self.length else 0
        try:
            return self._plan(source)
        except SeqKVError:
            self.start, self.length, self.base = before
            raise

    def advance(self, noted, new: int) -> None:
        """Count `new` tokens that a recorded step wrote behind those held, and make the pages that are due.

        Raises:
            NonFiniteError: As `update`.
        """
        table = self.cache.table(self.index, noted)
        if table is not None:
            table.append(self.length, new, len(self.start), noted)
        held = self.length + new - self.base
        source = self.recent_k[:, :, :held], self.recent_v[:, :, :held]
        self._flush(source, self._count(source, self.start, new))

    def _check(self, key_states, value_states) -> None:
        batch, heads, _, key_dim = key_states.shape
        held = len(self.start), self.codec.heads, self.codec.key_dim, self.codec.value_dim, self.dtype
        given = batch, heads, key_dim, value_states.shape[3], key_states.dtype
        if held != given:
            raise ConfigError(
                f"layer {self.index} holds (batch, KV heads, key dim, value dim, dtype) {held} and was given {given}; "
                "use one cache for one batch, or reset() it first"
            )

    # -- reading -------------------------------------------------------------------------------------------------

    def _handles(self, source=None, offset: int | None = None) -> tuple[Handle, Handle]:
        if self.recording is not None:
            raise UnsupportedOperationError(f"keys and values of layer {self.index} are read beside its attention")
        return Handle.pair(self.view(source, offset), self.config.backend, self.dtype)

    @property
    def keys(self) -> torch.Tensor | None:
        """Dense keys `[B, H, length - offset, Dk]`, rebuilt; None before the first update."""
        return self._handles()[0].materialize() if self.length else None

    @property
    def values(self) -> torch.Tensor | None:
        """Dense values `[B, H, length - offset, Dv]`, rebuilt; None before the first update."""
        return self._handles()[1].materialize() if self.length else None

    @keys.setter
    def keys(self, value) -> None:
        self._refuse_assignment("keys", value)

    @values.setter
    def values(self, value) -> None:
        self._refuse_assignment("values", value)

    def _refuse_assignment(self, name, value) -> None:
        if value is not None:
            raise UnsupportedOperationError(f"{name} of a SeqKVLayer are codes and cannot be assigned; use update()")

    # -- editing -------------------------------------------------------------------------------------------------

    def activate_past_recording(self) -> None:
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; 0 lets a sliding layer drop what it kept for a rollback.

        A cut inside a page decodes what remains of it to the dense window; its codes stay in place and are taken
        again when the page fills up, so that a token is never quantised twice.

        Raises:
            UnsupportedOperationError: The cut reaches pages that a sliding layer has dropped.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): positive lengths are not supported; pass minus the tokens to remove"
            )
        if not self.is_initialized:
            return
        length = self.length + tokens_to_remove
        if length <= 0:
            self.reset()
            return
        if self.dropped and self._offset() > length - self.sliding_window + 1:
            raise UnsupportedOperationError(
                f"crop({tokens_to_remove}) on sliding layer {self.index} reaches tokens that left its window of "
                f"{self.sliding_window}; call activate_past_recording() on the cache before generating"
            )
        plan = [self._cropped(row, length) for row in range(len(self.counts))]
        if any(count < self.counts[row] for row, (count, _) in enumerate(plan)):
            self._unpage(length, plan)
        if self.held is not None:
            for row in range(len(self.counts)):
                self.held.keep(row, 0, length)
        self.length = length
        self.start = [min(start, length) for start in self.start]
        if self.record_past:  # a crop ends a rollback, as upstream has it
            self.record_past = False
            self._drop(self.counts)
            self.record_past = True

    def _cropped(self, row: int, length: int) -> tuple[int, int]:
        """Pages of a row after a crop, and the tokens of the next page whose codes remain."""
        if length >= self._dense_slot(row):
            kept = length - self._page_slot(row, self.counts[row])
            return self.counts[row], max(0, min(self.kept[row], kept))
        inside = max(0, length - self._page_slot(row, 0))
        return inside // self.config.page_size, inside % self.config.page_size

    def _unpage(self, length: int, plan) -> None:
        """Move the tokens of cut pages back to the dense window."""
        k, v = (h.materialize() for h in self._handles())
        offset = self._offset()
        for row, (count, kept) in enumerate(plan):
            self.counts[row], self.kept[row] = count, max(0, kept)
            if self.held is not None:
                self.held.park(row, self._dense_slot(row))
        base = max(offset, min(min(self._dense_slot(row) for row in range(len(plan))), length))
        for name, x in (("recent_k", k), ("recent_v", v)):
            fresh = x.new_empty(*x.shape[:2], max(length - base, self._capacity()), x.shape[3])
            fresh[:, :, : length - base] = x[:, :, base - offset : length - offset]
            setattr(self, name, fresh)
        self.base = base

    def reset(self) -> None:
        self._clear()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(torch.arange(len(self.start)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(torch.arange(len(self.start))[torch.as_tensor(indices).cpu()])

    def offload(self) -> None:
        """Keep the pages in host memory from now on; see `offload.py`. On the CPU they stay, with a warning."""
        if self.is_initialized and not isinstance(self.buffer, OffloadedPages):
            self.buffer = offloaded(self)

    def prefetch(self) -> None:
        """Begin to bring the pages to the device for the next attention; without the option `offload`, for good."""
        if self.is_initialized and isinstance(self.buffer, OffloadedPages):
            if self.config.offload:
                self.buffer.staging.fetch(self)
            else:
                self.buffer = PageBuffer(self.pages.to(self.device))
