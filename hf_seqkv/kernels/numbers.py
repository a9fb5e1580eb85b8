"""What a kernel must know of each row of a `LayerView`, as one table of integers on the device.

A view's lists say it of one step. Where a step is recorded to be replayed, its kernels read what the table holds by
then, and the lists say only how much there can be.
"""

from __future__ import annotations

import dataclasses

from .interface import DenseRun, LayerView


def pages_each(count: int) -> int:
    """Pages a program takes of a row with `count`: few enough that short rows fill a GPU, too."""
    return min(max((1 << (count - 1).bit_length()) // 64, 1), 16) if count else 1


def most_splits(view: LayerView) -> int:
    """Programs that the longest row's pages take, of a row with as many as can come where numbers are `live`."""
    if view.live is None:
        return max((-(-n // pages_each(n)) for n in view.counts), default=0)
    room = view.pages.shape[1]
    return max(min(room, 64), -(-room // 16))


def table_of(view: LayerView, first: int = 0) -> tuple[tuple[int, ...], ...]:
    """`[11, B]`: pages, slot of the first; sinks' slots and begin, recent tokens'; pages a program takes; then, of all
    rows alike, end of recent tokens, length, offset, and the page whose start is the first of `view.center.starts`.

    Args:
        first: Pages that those starts have before those of the view.
    """
    dense = view.sinks.slots, view.sinks.begin, view.recent.slots, view.recent.begin
    alike = view.recent.k.shape[2], view.length, view.offset, first
    batch = len(view.counts)
    own = view.counts, view.page_slots, *dense, map(pages_each, view.counts)
    return *map(tuple, own), *((n,) * batch for n in alike)


def settled(view: LayerView) -> LayerView:
    """The view with what its live numbers say now in its lists; others as they are."""
    if view.live is None:
        return view
    counts, page_slots, sinks, sinks_begin, recent, begin, _, end, length, offset, first = view.live.tolist()
    center = view.center
    if center is not None:
        center = dataclasses.replace(center, starts=center.starts[:, first[0] :])
    return dataclasses.replace(
        view, counts=counts, page_slots=page_slots, center=center, length=length[0], offset=offset[0], live=None,
        sinks=dataclasses.replace(view.sinks, slots=sinks, begin=sinks_begin),
        recent=DenseRun(view.recent.k[:, :, : end[0]], view.recent.v[:, :, : end[0]], recent, begin),
    )  # fmt: skip
