"""Dense keys or values of a `LayerView`, rebuilt from its pages: all of them, or a span."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..codec.center import Center
from ..kernels.interface import LayerView


def rebuild(
    view: LayerView, side: int, dtype: torch.dtype, unpack: Callable, begin: int, end: int
) -> torch.Tensor:
    """Dense tokens `begin` to `end`, counted from `view.offset`; zeros where a row holds nothing (its padding).

    Args:
        side: 0 for keys, 1 for values.
        unpack: A backend's `unpack_pages`.

    Returns:
        `[B, H, end - begin, D]`.
    """
    runs = [(run.k, run.v)[side] for run in (view.sinks, view.recent)]
    batch, heads, _, dim = runs[1].shape
    out = runs[1].new_zeros(batch, heads, end - begin, dim, dtype=dtype)
    first = view.offset + begin
    paged, at = _paged(view, side, dtype, unpack, first, view.offset + end)
    for row in range(batch):
        if paged is not None:
            _put(out[row], paged[row], at[row] - first)
        if view.side is not None:
            slots = view.side.slots[row] - first
            held = ((slots >= 0) & (slots < end - begin)).nonzero()[:, 0]
            out[row, :, slots[held]] = (view.side.k, view.side.v)[side][row, :, held].to(dtype)
        for run, x in zip((view.sinks, view.recent), runs, strict=True):
            _put(out[row], x[row, :, run.begin[row] :], run.slots[row] + run.begin[row] - first)
    return out


def _put(out: torch.Tensor, x: torch.Tensor, at: int) -> None:
    """Tokens `x [H, T, D]` into `out [H, n, D]` from token `at` on, as far as they are inside."""
    low, high = max(at, 0), min(at + x.shape[1], out.shape[1])
    if low < high:
        out[:, low:high] = x[:, low - at : high - at]


def _paged(view: LayerView, side: int, dtype, unpack, first: int, last: int):
    """Of each row the pages that reach into slots `first` to `last`, decoded, and the slot of the first of them.

    Returns:
        A list of `[H, n * P, D]`, or None where there are none, and a list of slots.
    """
    size = view.codec.page_size
    spans = [
        (min(count, max(0, (first - slot) // size)), min(count, max(0, -((slot - last) // size))))
        for count, slot in zip(view.counts, view.page_slots, strict=True)
    ]
    most = max((end - begin for begin, end in spans), default=0)
    if most <= 0:
        return None, []
    begins = torch.tensor([begin for begin, _ in spans])
    index = (begins[:, None] + torch.arange(most)).clamp_max(view.pages.shape[1] - 1).to(view.pages.device)
    rows = torch.arange(len(spans), device=index.device)[:, None]
    x = view.codec.restore(unpack(view.codec, view.pages[rows, index], side), side)
    if side == 0 and view.center is not None:
        center = view.center
        starts = center.starts[rows, index.clamp_max(center.starts.shape[1] - 1)]
        x = x + Center(center.mean, starts, center.relative, center.interleaved).keys(0, most)
    x = x.to(dtype).transpose(1, 2).flatten(2, 3)  # [B, H, n * P, D]
    found = [x[row, :, : (end - begin) * size] for row, (begin, end) in enumerate(spans)]
    return found, [slot + begin * size for (begin, _), slot in zip(spans, view.page_slots, strict=True)]
