"""Offloaded pages: they lie in host memory and are brought to their layer's device when the layer attends.

For caches that would fill a GPU's memory even as codes. Of the pages at most two layers' are on a device at a time:
while one layer attends, the next one's are copied, as transformers' offloaded caches do it with dense tensors. All else
(sinks, recent tokens, key means, position tables, held tokens) stays on the device.

What the link to the host costs is arithmetic: a step moves every layer's codes over it once, so a layer takes at least
the bytes of its codes / the bytes that the link moves in a second. 131,072 tokens of 8 KV heads of 128 components at
4.63 bits a value are 155 MB a layer: 6.2 ms at 25 GB/s, a usual rate of PCIe 4.0 x16; in bf16 537 MB, 21 ms. What the
device computes in the meantime hides some of it.
"""

from __future__ import annotations

import copy
import functools
import warnings
import weakref
from collections.abc import Callable
from math import prod

import torch

from ..errors import SeqKVWarning
from .page_buffer import PageBuffer


def offloaded(layer) -> PageBuffer:
    """The buffer of an initialized layer in host memory; as it is, with a warning, where that is the layer's own."""
    if layer.device.type == "cpu":
        _say_of_cpu()
        return layer.buffer
    others = (x.buffer for x in layer.cache._coded() if isinstance(x.buffer, OffloadedPages))
    staging = next((x.staging for x in others if x.staging.device == layer.device), None)
    return OffloadedPages(layer, staging or Staging(layer.device))


@functools.cache
def _say_of_cpu() -> None:
    warnings.warn(
        "offload has no effect on layers that run on the CPU: their pages lie in host memory as it is. Leave it out, "
        "or put the model on a GPU",
        SeqKVWarning,
        stacklevel=4,
    )


class OffloadedPages(PageBuffer):
    """Pages of one layer in host memory, pinned for a CUDA device.

    Args:
        layer: Its pages are copied.
        staging: Of its device.
    """

    def __init__(self, layer, staging: Staging):
        self.layer, self.staging = layer, staging
        super().__init__(layer.pages)

    def hold(self, pages: torch.Tensor) -> None:
        self.pages = self.empty(*pages.shape).copy_(pages)

    def empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self.staging.stream is not None)

    def put(self, rows: list[int], at: int, pages: torch.Tensor) -> None:
        self.staging.forget(self.pages)
        for row, made in zip(rows, pages, strict=True):
            self.pages[row, at : at + len(made)].copy_(made)

    def on_device(self) -> torch.Tensor:
        return self.staging.bring(self.layer)

    def __deepcopy__(self, memo) -> OffloadedPages:
        memo[id(self)] = new = OffloadedPages.__new__(OffloadedPages)
        new.layer, new.staging = (copy.deepcopy(x, memo) for x in (self.layer, self.staging))
        new.hold(self.pages)  # a copy by torch would not be pinned
        return new


def _nothing() -> None:
    """A weak reference to nothing."""


class _Slot:
    """Room for the pages of one layer."""

    def __init__(self, device: torch.device):
        self.room = torch.empty(0, dtype=torch.uint8, device=device)
        self.shape = (0, 0, 0)  # of what is in it
        self.source: Callable = _nothing  # weak reference to the host pages that are in it, or on their way
        self.lent: Callable = _nothing  # and to the tensor that an attention was given
        self.done: torch.cuda.Event | None = None  # when they have arrived

    def pages(self) -> torch.Tensor:
        """What is in it, `[B, N, page_bytes]`; the same tensor for as long as someone has it."""
        pages = self.lent()
        if pages is None:
            pages = self.room[: prod(self.shape)].view(self.shape)
            self.lent = weakref.ref(pages)
        return pages


class Staging:
    """Where the offloaded pages of all layers of one device pass through: room for two layers, filled in turn.

    A layer whose keys a model keeps for layers to come (shared KV layers) keeps its room for as long.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.slots = [_Slot(device), _Slot(device)]  # the one that was used last is the last
        cuda = device.type == "cuda" and torch.cuda.is_available()
        self.stream = torch.cuda.Stream(device) if cuda else None  # for copies beside the computation

    def __deepcopy__(self, memo) -> Staging:
        memo[id(self)] = new = Staging(self.device)
        return new

    def bring(self, layer) -> torch.Tensor:
        """Pages of a layer on its device, `[B, N, page_bytes]`; the next layer's are then on their way."""
        slot, layers = self.fetch(layer), layer.cache._coded()
        if slot is not None:
            self._wait(slot)
            self.slots.sort(key=lambda x: x is slot)
        at = layers.index(layer)
        for other in (*layers[at + 1 :], *layers[:at]):  # the first follows the last, in the next step
            if getattr(other.buffer, "staging", None) is self and self.fetch(other) is not None:
                break
        if slot is None:
            return torch.empty(len(layer.pages), 0, layer.pages.shape[2], dtype=torch.uint8, device=self.device)
        return slot.pages()

    def fetch(self, layer) -> _Slot | None:
        """Begin to copy a layer's pages, unless they are here; None where it has none."""
        used = layer._used()
        if not any(used):
            return None
        slot = next((x for x in self.slots if x.source() is layer.pages), None)
        if slot is None:
            slot = self.slots[0]
            self._make_room(slot, layer.pages, max(used))
            self._copy(layer.pages, slot, used)
        return slot

    def _make_room(self, slot: _Slot, pages: torch.Tensor, most: int) -> None:
        slot.source = _nothing
        if slot.lent() is not None or len(slot.room) < pages.numel():
            slot.room, slot.lent = slot.room.new_empty(0), _nothing  # freed before there is more
            slot.room = torch.empty(pages.numel(), dtype=torch.uint8, device=self.device)
            if self.stream is not None:
                slot.room.record_stream(self.stream)
        slot.shape = (len(pages), most, pages.shape[2])

    def _copy(self, pages: torch.Tensor, slot: _Slot, used: list[int]) -> None:
        """Row by row: what a row has is one run of memory, which is what copies beside the computation take."""
        target = slot.pages()
        slot.source = weakref.ref(pages)
        if self.stream is None:
            for row, count in enumerate(used):
                target[row, :count].copy_(pages[row, :count])
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # an attention may still read what was there
        with torch.cuda.stream(self.stream):
            for row, count in enumerate(used):
                target[row, :count].copy_(pages[row, :count], non_blocking=True)
            slot.done = self.stream.record_event()

    def _wait(self, slot: _Slot) -> None:
        """Let what is computed from now on begin after a slot is filled."""
        if slot.done is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.done)

    def forget(self, pages: torch.Tensor) -> None:
        """Host pages are about to be written to: a copy of them is out of date, one under way ends before."""
        for slot in self.slots:
            if slot.source() is pages:
                self._wait(slot)
                slot.source = _nothing
