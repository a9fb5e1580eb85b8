"""Numbers of rows in a tensor, as kernels of a recorded step read them: they say what a view's lists say."""

import dataclasses

import pytest
import torch
from kernel_cases import CASES, build

from hf_seqkv.kernels import cpu, reference
from hf_seqkv.kernels.interface import DenseRun
from hf_seqkv.kernels.numbers import most_splits, pages_each, settled, table_of


def live(view):
    """The view as a step is recorded with it: numbers in a tensor, lists that hold too much, poison where room is."""
    batch, first, more = len(view.counts), 2, 40
    numbers = torch.tensor(table_of(view, first), dtype=torch.int32)
    k, v = (
        torch.cat([x, torch.full((*x.shape[:2], more, x.shape[3]), torch.nan)], 2)
        for x in (view.recent.k, view.recent.v)
    )
    center = view.center
    if center is not None:
        before = torch.full_like(center.starts[:, :1], torch.nan).expand(-1, first, -1)
        center = dataclasses.replace(center, starts=torch.cat([before, center.starts], 1))
    nothing = [0] * batch
    return dataclasses.replace(
        view, counts=[view.pages.shape[1]] * batch, page_slots=nothing, recent=DenseRun(k, v, nothing, nothing),
        sinks=dataclasses.replace(view.sinks, slots=nothing, begin=nothing), center=center, length=view.length + more,
        offset=0, live=numbers,
    )  # fmt: skip


@pytest.mark.parametrize("backend", [reference, cpu], ids=["reference", "cpu"])
@pytest.mark.parametrize(
    "name", ["plain", "center", "window", "side table", "offset", "no pages in one row", "first sinks do not count"]
)
def test_live_numbers_count(backend, name):
    """Lists that hold too much do not matter, nor what is behind the last token."""
    query, view, mask, scoring = build(CASES[name])
    expected = backend.attend_codes(query, view, mask, scoring)
    assert torch.equal(backend.attend_codes(query, live(view), mask, scoring), expected)


def test_settled():
    view = build(CASES["center"])[1]
    found = settled(live(view))
    assert settled(view) is view
    assert (found.counts, found.page_slots, found.length, found.offset) == (
        view.counts, view.page_slots, view.length, view.offset,
    )  # fmt: skip
    assert torch.equal(found.recent.k.nan_to_num(7), view.recent.k.nan_to_num(7))
    assert torch.equal(found.center.starts.nan_to_num(7), view.center.starts.nan_to_num(7))
    assert table_of(found) == table_of(view)


def test_pages_each():
    counts = (0, 1, 64, 65, 128, 129, 512, 513, 5000)
    assert [pages_each(n) for n in counts] == [1, 1, 1, 2, 2, 4, 8, 16, 16]


def test_most_splits():
    """With live numbers, as many as any row can take that fits."""
    view = build(CASES["plain"])[1]
    assert most_splits(view) == max(view.counts)
    for room in (1, 7, 64, 65, 100, 1024, 1025, 3000):
        pages = torch.empty(1, room, 8, dtype=torch.uint8)
        found = most_splits(dataclasses.replace(view, pages=pages, live=torch.empty(0)))
        assert found == max(-(-n // pages_each(n)) for n in range(1, room + 1))
