"""Attention over codes: the reference against torch, the compiled kernel against the reference."""

import dataclasses
import hashlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_seqkv.codec.center import Center
from hf_seqkv.codec.page import DensePageCodec, QuantizedPageCodec
from hf_seqkv.codec.rotation import random_rotation
from hf_seqkv.codec.vector import VectorCodec
from hf_seqkv.kernels import cpu, reference
from hf_seqkv.kernels.cpu import threads
from hf_seqkv.kernels.interface import DenseRun, LayerView, Scoring, SideTable

FP32 = 2e-5  # of the largest output
TOLERANCE = {"reference": FP32, "cpu": cpu.tolerance()}


@dataclass(frozen=True)
class Case:
    """One attention call. Row `b` is `[pads[b] empty slots | sinks | counts[b] pages | the rest dense]`.

    `widths` are the bits of all components (one number) or of each in turn; `half` is the number of RoPE pairs of the
    constant part of the keys, None where keys have none.
    """

    heads: int = 2
    groups: int = 2
    steps: int = 1
    dim: int = 64
    value_dim: int = 64
    page_size: int = 16
    widths: int | tuple[int, ...] = 4
    scale_bits: int = 16
    counts: tuple[int, ...] = (5, 3)
    pads: tuple[int, ...] = (0, 21)
    sinks: int = 4
    recent: int = 20  # dense tokens after the longest row's pages
    half: int | None = None
    interleaved: bool = False
    mask: str | None = None
    window: int | None = None
    softcap: float | None = None
    sink_logits: bool = False
    causal: bool = True
    offset: int = 0
    begin: int = 0  # first sinks that do not count
    side: int = 0  # tokens of the side table, of which the last holds nothing

    @property
    def length(self):
        return max(pad + self.sinks + n * self.page_size for pad, n in zip(self.pads, self.counts, strict=True)) + max(
            self.recent, self.steps
        )


def vector_codec(case, dim, seed):
    if isinstance(case.widths, int):
        return VectorCodec.data_free(
            case.heads,
            dim,
            case.page_size,
            bits=case.widths,
            rotation="orthogonal",
            codebook="lloyd_max",
            scale="fit",
            seed=seed,
            scale_bits=case.scale_bits,
        )
    # As a calibration makes them: runs of one width, and every head its basis, gains, mean and levels.
    runs = [case.widths[i * len(case.widths) // dim] for i in range(dim)]
    widths = torch.tensor([runs[h:] + runs[:h] for h in range(case.heads)], dtype=torch.uint8)
    levels = torch.zeros(case.heads, 9, 256)
    for width in range(9):
        levels[:, width, : 2**width] = torch.randn(case.heads, 2**width).sort(-1).values
    basis = torch.stack([random_rotation(dim, "orthogonal", seed + h) for h in range(case.heads)])
    gains = torch.rand(case.heads, dim, 1) + 0.5
    encode_matrix = (basis / gains).transpose(1, 2).contiguous()
    return VectorCodec(
        encode_matrix,
        basis * gains,
        torch.randn(case.heads, dim),
        widths,
        levels,
        "fit",
        case.page_size,
        case.scale_bits,
    )


def make_center(case, pages):
    if case.half is None:
        return None
    frequency = 100.0 ** -(torch.arange(case.half) / max(case.half, 1))
    angle = torch.arange(case.page_size)[:, None] * frequency
    first = (torch.arange(pages) * case.page_size + 3 * torch.arange(len(case.counts))[:, None])[..., None] * frequency
    return Center(
        mean=torch.randn(len(case.counts), case.heads, case.dim),
        starts=1.2 * torch.cat([first.cos(), first.sin()], -1),
        relative=torch.cat([angle.cos(), angle.sin()], -1),
        interleaved=case.interleaved,
    )


def make_mask(case):
    batch, heads = len(case.counts), case.heads * case.groups
    columns = case.length - case.offset
    if case.mask is None:
        return None
    if case.mask == "bool":
        return torch.rand(batch, 1, case.steps, columns) > 0.3
    if case.mask == "additive":
        # Wider than needed, as a mask of a preallocated buffer is; what lies beyond must not matter.
        mask = torch.randn(batch, 1, case.steps, columns + 7)
        mask = mask.masked_fill(torch.rand(mask.shape) > 0.7, -torch.inf)
        mask[..., columns:] = torch.nan
        return mask
    if case.mask == "lowest":
        # What transformers adds where a token is not seen.
        return torch.zeros(1, 1, case.steps, columns).masked_fill(
            torch.rand(1, 1, case.steps, columns) > 0.7, torch.finfo(torch.float32).min
        )
    if case.mask == "per head":
        return torch.randn(1, heads, case.steps, columns)
    if case.mask == "per head bool":
        return torch.rand(batch, heads, case.steps, columns) > 0.5
    if case.mask in ("pages only", "no pages"):
        mask = torch.zeros(batch, 1, case.steps, columns, dtype=torch.bool)
        for row, (pad, count) in enumerate(zip(case.pads, case.counts, strict=True)):
            first = pad + case.sinks - case.offset
            mask[row, ..., first : first + count * case.page_size] = True
        return mask if case.mask == "pages only" else ~mask
    assert case.mask == "nothing seen", case.mask
    mask = torch.rand(batch, 1, case.steps, columns) > 0.3
    mask[-1, :, -1] = False
    return mask


def build(case):
    """`(query, view, mask, scoring)`, everything that does not count poisoned."""
    batch, pages = len(case.counts), max(case.counts) + 2
    codec = QuantizedPageCodec(vector_codec(case, case.dim, 0), vector_codec(case, case.value_dim, 7))
    k = torch.randn(batch, pages, case.heads, case.page_size, case.dim)
    v = torch.randn(batch, pages, case.heads, case.page_size, case.value_dim)
    stored = codec.encode(k, v)
    center = make_center(case, pages)
    for row, count in enumerate(case.counts):
        stored[row, count:] = 0xFF
        if center is not None:
            center.starts[row, count:] = torch.nan
    page_slots = [pad + case.sinks for pad in case.pads]
    ends = [slot + n * case.page_size for slot, n in zip(page_slots, case.counts, strict=True)]
    size = case.length - min(ends) + 3
    recent = dense_run(case, size, [case.length - size] * batch, [end - case.length + size for end in ends])
    sinks = dense_run(case, case.sinks, list(case.pads), [min(case.begin, case.sinks)] * batch)
    side = side_table(case, codec, stored, page_slots) if case.side else None
    view = LayerView(
        codec, stored, list(case.counts), page_slots, sinks, recent, center, case.length, case.offset, side
    )
    logits = torch.randn(case.heads * case.groups) if case.sink_logits else None
    scoring = Scoring(case.dim**-0.5, case.causal, case.window, case.softcap, logits)
    query = torch.randn(batch, case.heads * case.groups, case.steps, case.dim)
    return query, view, make_mask(case), scoring


def side_table(case, codec, stored, page_slots):
    """Some tokens of every row's pages, taken out of them and held dense."""
    batch, last = len(case.counts), case.side - 1
    slots = torch.full((batch, case.side), -1)
    where = torch.zeros(*stored.shape[:2], case.page_size, dtype=torch.bool)
    for row, count in enumerate(case.counts):
        picked = torch.randperm(count * case.page_size)[:last]
        slots[row, : len(picked)] = page_slots[row] + picked
        where[row].view(-1)[picked] = True
    codec.vacate(stored, where)
    k = torch.randn(batch, case.heads, case.side, case.dim)
    v = torch.randn(batch, case.heads, case.side, case.value_dim)
    k[:, :, last], v[:, :, last] = 100, 100
    return SideTable(k, v, slots)


def dense_run(case, size, slots, begin):
    batch = len(case.counts)
    k = torch.randn(batch, case.heads, size, case.dim)
    v = torch.randn(batch, case.heads, size, case.value_dim)
    for row in range(batch):
        k[row, :, : begin[row]] = torch.nan
        v[row, :, : begin[row]] = torch.nan
    return DenseRun(k, v, slots, begin)


def by_definition(query, view, mask, scoring):
    """The same in fp64, one row at a time, by torch's own attention where it has the means."""
    out, (batch, heads, steps, _) = [], query.shape
    here = torch.arange(view.length - steps, view.length)[:, None]
    keys, values = (x.double() for x in view.codec.decode(view.pages))
    if view.center is not None:
        keys = keys + view.center.keys(0, view.pages.shape[1]).double()
    for row in range(batch):
        k, v, slots = [], [], []
        for run in (view.sinks, view.recent):
            k.append(run.k[row, :, run.begin[row] :].double())
            v.append(run.v[row, :, run.begin[row] :].double())
            slots.append(run.slots[row] + torch.arange(run.begin[row], run.k.shape[2]))
        n, size = view.counts[row], view.codec.page_size
        here_too = ~view.codec.absent(view.pages[row, :n])[:, 0].flatten()
        k.append(keys[row, :n].transpose(0, 1).flatten(1, 2)[:, here_too])
        v.append(values[row, :n].transpose(0, 1).flatten(1, 2)[:, here_too])
        slots.append((view.page_slots[row] + torch.arange(n * size))[here_too])
        if view.side is not None:
            held = view.side.slots[row] >= 0
            k.append(view.side.k[row, :, held].double())
            v.append(view.side.v[row, :, held].double())
            slots.append(view.side.slots[row][held])
        k, v, slots = torch.cat(k, 1), torch.cat(v, 1), torch.cat(slots)
        groups = heads // k.shape[0]
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        seen = (slots >= view.offset).expand(steps, -1)
        if mask is None and scoring.causal:
            seen = seen & (slots <= here)
        if scoring.window is not None:
            seen = seen & (slots > here - scoring.window)
        bias = torch.zeros(heads, steps, len(slots), dtype=torch.float64).masked_fill(~seen, -torch.inf)
        if mask is not None:
            extra = mask[row % mask.shape[0]][..., (slots - view.offset).clamp_min(0)].expand_as(bias)
            if extra.dtype == torch.bool:
                extra = torch.zeros_like(bias).masked_fill(~extra, -torch.inf)
            bias = bias + extra
        if scoring.sink_logits is not None:
            # A token without key or value whose score is the logit.
            logits = scoring.sink_logits.double()[:, None, None].expand(heads, steps, 1)
            bias = torch.cat([bias, logits], -1)
            k, v = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (k, v))
        if scoring.softcap is None:
            row_out = torch.nn.functional.scaled_dot_product_attention(
                query[row].double(), k, v, attn_mask=bias, scale=scoring.scaling
            )
        else:
            scores = scoring.scaling * query[row].double() @ k.transpose(-1, -2)
            row_out = (scoring.softcap * torch.tanh(scores / scoring.softcap) + bias).softmax(-1) @ v
        nothing = (bias == -torch.inf).all(-1, keepdim=True)
        out.append(row_out.masked_fill(nothing, 0))
    return torch.stack(out).transpose(1, 2)


def assert_close(out, expected, backend="reference", factor=1):
    assert out.shape == expected.shape
    assert out.isfinite().all()
    assert (out.double() - expected.double()).abs().max() <= factor * TOLERANCE[backend] * expected.double().abs().max()


MIXED = (8, 5, 4, 3, 2, 1, 0)
CASES = {
    "plain": Case(),
    "side table": Case(side=6),
    "side table, page of 64, center": Case(side=9, page_size=64, half=32, steps=2, counts=(2, 17)),
    "side table, mask, window, softcap": Case(side=9, mask="per head", window=60, softcap=3.0, steps=3, half=5),
    # Shapes.
    "dim 16": Case(dim=16, value_dim=16),
    "dim 80": Case(dim=80, value_dim=80, page_size=64, counts=(2, 1)),
    "dim 96": Case(dim=96, value_dim=96),
    "dim 128": Case(dim=128, value_dim=128, page_size=64, counts=(2, 1)),
    "dim 256": Case(dim=256, value_dim=256, page_size=32, counts=(2,), pads=(0,)),
    "values narrower": Case(dim=96, value_dim=16),
    "values wider": Case(dim=16, value_dim=96),
    "page of 8": Case(page_size=8),
    "page of 24": Case(page_size=24),
    "page of 64": Case(page_size=64),
    "page of 72": Case(page_size=72, counts=(2, 1)),
    "page of 128": Case(page_size=128, counts=(2, 1)),
    "batch of 1": Case(counts=(4,), pads=(0,)),
    "batch of 3": Case(counts=(4, 0, 2), pads=(0, 50, 7)),
    "G 1": Case(groups=1),
    "G 3": Case(groups=3),
    "G 8": Case(groups=8, heads=1),
    "Tq 2": Case(steps=2),
    "Tq 5": Case(steps=5, groups=3),
    "Tq 16": Case(steps=16, groups=4),
    "more queries than dense tokens": Case(steps=16, recent=16, counts=(3, 3), pads=(0, 0)),
    "many splits": Case(page_size=8, counts=(50, 17), pads=(0, 100), heads=1),
    # Codes.
    **{f"{bits} bits": Case(widths=bits) for bits in (2, 3, 8)},
    **{f"{bits} bits, page of 64": Case(widths=bits, page_size=64, counts=(2, 1)) for bits in (2, 3, 4, 8)},
    "mixed widths": Case(widths=MIXED),
    "8-bit scales": Case(scale_bits=8, side=5, half=32),
    "8-bit scales, page of 64": Case(scale_bits=8, widths=3, side=5, page_size=64, counts=(2, 1)),
    "mixed widths, page of 64": Case(widths=MIXED, page_size=64, counts=(2, 1)),
    "widths 6 and 7, page of 64": Case(widths=(7, 6), page_size=64, counts=(2, 1)),
    "mixed widths, page of 8": Case(widths=MIXED, page_size=8, dim=80, value_dim=96),
    # What a query sees.
    "bool mask": Case(mask="bool", steps=2),
    "additive mask": Case(mask="additive", steps=2),
    "mask of lowest": Case(mask="lowest", steps=2),
    "mask per head": Case(mask="per head", steps=2),
    "bool mask per head": Case(mask="per head bool", steps=2),
    "window": Case(window=50, steps=5),
    "window of one": Case(window=1, steps=2),
    "window and mask": Case(window=50, steps=5, mask="bool"),
    "not causal": Case(causal=False, steps=5),
    "offset": Case(offset=37, steps=2),
    "offset and mask": Case(offset=37, steps=2, mask="bool"),
    "offset and additive mask": Case(offset=90, steps=2, mask="additive"),
    "a query sees nothing": Case(mask="nothing seen", steps=2),
    # Scores.
    "softcap": Case(softcap=1.5),
    "softcap and mask": Case(softcap=1.5, mask="bool", half=32),
    "sink logits": Case(sink_logits=True, steps=2, groups=3),
    "sink logits, nothing seen": Case(sink_logits=True, mask="nothing seen", steps=2),
    # Constant part of the keys.
    "center": Case(half=32),
    "center of 64": Case(half=32, page_size=64, counts=(2, 1), steps=5),
    "center, interleaved": Case(half=32, interleaved=True, steps=2),
    "center, partial": Case(half=12, dim=80),
    "center, partial and interleaved": Case(half=12, dim=80, interleaved=True),
    "center without rope": Case(half=0),
    "center and mixed widths": Case(half=32, widths=MIXED),
    # Parts of the cache that are empty.
    "no pages": Case(counts=(0, 0)),
    "no pages in one row": Case(counts=(0, 4)),
    "no sinks": Case(sinks=0),
    "first sinks do not count": Case(begin=2),
    "no dense token seen": Case(mask="pages only", half=32),
    "no page seen": Case(mask="no pages", half=32),
    "everything": Case(
        half=20, interleaved=True, widths=MIXED, steps=5, groups=3, mask="additive", window=70, softcap=3.0,
        sink_logits=True, offset=5, page_size=24, dim=80, value_dim=96, counts=(5, 0, 3), pads=(0, 40, 11),
    ),
}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@every_case
def test_reference_is_the_definition(case):
    arguments = build(case)
    assert_close(reference.attend_codes(*arguments), by_definition(*arguments))


def test_reference_reads_dense_pages():
    query, view, mask, scoring = build(Case(steps=2, counts=(3, 1)))
    codec = DensePageCodec(16, 2, 64, 64, torch.bfloat16)
    stored = codec.encode(torch.randn(2, 3, 2, 16, 64), torch.randn(2, 3, 2, 16, 64))
    arguments = (query, dataclasses.replace(view, codec=codec, pages=stored), mask, scoring)
    assert_close(reference.attend_codes(*arguments), by_definition(*arguments))


def test_reference_joins_runs_of_pages(monkeypatch):
    arguments = build(Case(page_size=8, counts=(9, 4)))
    monkeypatch.setattr(reference, "RUN", 16)
    assert_close(reference.attend_codes(*arguments), by_definition(*arguments))


@every_case
def test_cpu_is_the_reference(case):
    arguments = build(case)
    out, expected = cpu.attend_codes(*arguments), reference.attend_codes(*arguments)
    assert out.dtype == torch.float32
    assert_close(out, expected, "cpu")


@given(
    st.builds(
        Case,
        heads=st.integers(1, 3),
        groups=st.integers(1, 5),
        steps=st.integers(1, 6),
        dim=st.sampled_from([4, 16, 30, 64]),
        value_dim=st.sampled_from([4, 17, 64]),
        page_size=st.sampled_from([8, 16, 40, 64]),
        widths=st.one_of(st.sampled_from([2, 3, 4, 8]), st.lists(st.integers(0, 8), min_size=4, max_size=4).map(tuple)),
        counts=st.tuples(st.integers(0, 20), st.integers(0, 3)),
        pads=st.tuples(st.integers(0, 9), st.integers(0, 99)),
        sinks=st.integers(0, 5),
        recent=st.integers(0, 70),
        half=st.sampled_from([None, 0, 1, 2]),
        interleaved=st.booleans(),
        mask=st.sampled_from([None, "bool", "additive", "per head"]),
        window=st.sampled_from([None, 1, 30, 1000]),
        softcap=st.sampled_from([None, 2.0]),
        sink_logits=st.booleans(),
        causal=st.booleans(),
        offset=st.integers(0, 5),
        side=st.integers(0, 4),
    )
)
@settings(max_examples=150)
def test_cpu_is_the_reference_anywhere(case):
    torch.manual_seed(0)
    arguments = build(case)
    # Over a few components and tokens roundings do not average out.
    factor = 1 if min(case.dim, case.value_dim) >= 16 else 4
    assert_close(cpu.attend_codes(*arguments), reference.attend_codes(*arguments), "cpu", factor)


both = pytest.mark.parametrize("backend", [reference, cpu], ids=["reference", "cpu"])


@both
@pytest.mark.parametrize("sink_logits", [False, True], ids=["", "sink logits"])
def test_query_that_sees_nothing_gets_zeros(backend, sink_logits):
    out = backend.attend_codes(*build(Case(mask="nothing seen", steps=2, sink_logits=sink_logits)))
    assert not out[-1, -1].any()
    assert out[-1, 0].abs().amax(-1).min() > 0
    assert out.isfinite().all()


@both
def test_batch_that_sees_nothing_gets_zeros(backend):
    query, view, _, scoring = build(Case(steps=2))
    out = backend.attend_codes(query, view, torch.zeros(1, 1, 2, view.length, dtype=torch.bool), scoring)
    assert torch.equal(out, torch.zeros_like(out))


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_fp32(backend, dtype):
    query, view, mask, scoring = build(Case(steps=2, mask="per head", sink_logits=True, half=32))

    def cast(run, target):
        return dataclasses.replace(run, k=run.k.to(dtype).to(target), v=run.v.to(dtype).to(target))

    outs = []
    for target in (dtype, torch.float32):
        runs = {"sinks": cast(view.sinks, target), "recent": cast(view.recent, target)}
        logits = scoring.sink_logits.to(dtype).to(target)
        outs.append(
            backend.attend_codes(
                query.to(dtype).to(target),
                dataclasses.replace(view, **runs),
                mask.to(dtype).to(target),
                dataclasses.replace(scoring, sink_logits=logits),
            )
        )
    assert outs[0].dtype == dtype
    assert torch.equal(outs[0], outs[1].to(dtype))


@both
@pytest.mark.parametrize("name", ["everything", "center", "page of 72", "mixed widths, page of 64", "plain"])
def test_what_does_not_count_does_not_matter(backend, name):
    case = CASES[name]
    query, view, mask, scoring = build(case)
    poisoned = backend.attend_codes(query, view, mask, scoring)
    for row, count in enumerate(view.counts):
        view.pages[row, count:] = 0
        if view.center is not None:
            view.center.starts[row, count:] = 0
    for run in (view.sinks, view.recent):
        run.k.nan_to_num_(0)
        run.v.nan_to_num_(0)
    if mask is not None:
        mask.nan_to_num_(0, neginf=-torch.inf)
    assert torch.equal(backend.attend_codes(query, view, mask, scoring), poisoned)


@both
def test_row_does_not_depend_on_its_neighbours(backend):
    query, view, mask, scoring = build(Case(counts=(40, 3, 0), pads=(0, 9, 70), half=32, steps=2, page_size=8))
    together = backend.attend_codes(query, view, mask, scoring)
    for row in range(3):
        cut = slice(row, row + 1)
        runs = {
            name: DenseRun(run.k[cut], run.v[cut], run.slots[cut], run.begin[cut])
            for name, run in (("sinks", view.sinks), ("recent", view.recent))
        }
        center = dataclasses.replace(view.center, mean=view.center.mean[cut], starts=view.center.starts[cut])
        alone = dataclasses.replace(
            view,
            pages=view.pages[cut],
            counts=view.counts[cut],
            page_slots=view.page_slots[cut],
            center=center,
            **runs,
        )
        out = backend.attend_codes(query[cut], alone, mask, scoring)
        if backend is cpu:
            assert torch.equal(out[0], together[row])
        else:
            assert_close(out[0], together[row])


@pytest.mark.parametrize("name", ["plain", "many splits", "everything", "Tq 16", "mixed widths, page of 64"])
def test_thread_count_does_not_matter(name):
    arguments, before, outs = build(CASES[name]), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            outs.append(cpu.attend_codes(*arguments))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*outs)


@both
def test_layout_in_memory_does_not_matter(backend):
    query, view, mask, scoring = build(Case(steps=2, mask="per head", half=32))
    expected = backend.attend_codes(query, view, mask, scoring)

    def strided(x):
        """The same numbers, tokens before heads and inside a larger buffer."""
        buffer = torch.full((x.shape[0], x.shape[2] + 3, x.shape[1], x.shape[3]), torch.nan)
        buffer[:, : x.shape[2]] = x.transpose(1, 2)
        return buffer[:, : x.shape[2]].transpose(1, 2)

    runs = {
        name: dataclasses.replace(run, k=strided(run.k), v=strided(run.v))
        for name, run in (("sinks", view.sinks), ("recent", view.recent))
    }
    pages = torch.cat([view.pages, view.pages], 1)[:, : view.pages.shape[1]]
    view = dataclasses.replace(view, pages=pages, **runs)
    assert torch.equal(backend.attend_codes(strided(query), view, strided(mask), scoring), expected)


@both
def test_nothing_is_written(backend):
    query, view, mask, scoring = build(CASES["everything"])
    tensors = [query, mask, view.pages, view.center.mean, view.center.starts, view.center.relative]
    tensors += [view.sinks.k, view.sinks.v, view.recent.k, view.recent.v, scoring.sink_logits]
    before = [x.clone() for x in tensors]
    backend.attend_codes(query, view, mask, scoring)
    assert all(torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for x, y in zip(tensors, before, strict=True))


@both
def test_large_scores_do_not_overflow(backend):
    query, view, mask, scoring = build(Case(steps=2, half=32))
    fp32 = backend is reference or TOLERANCE["cpu"] == FP32
    # Scores of 1e4 keep four digits behind the point in fp32; in 16-bit integers scores of 100 keep one and a half.
    arguments = (query * (1e4 if fp32 else 100), view, mask, scoring)
    out = backend.attend_codes(*arguments)
    assert out.isfinite().all()
    assert (out - by_definition(*arguments)).abs().max() < 0.05
    assert backend.attend_codes(query * 1e30, view, mask, scoring).isfinite().all()


@both
def test_nan_is_not_hidden(backend):
    query, view, mask, scoring = build(Case())
    query[0, 0, 0, 3] = torch.nan
    out = backend.attend_codes(query, view, mask, scoring)
    assert out[0, 0, 0].isnan().all()
    assert out[1].isfinite().all()


SCALAR = (
    *("plain", "page of 64", "4 bits, page of 64", "3 bits, page of 64", "mixed widths, page of 64"),
    *("center without rope", "8-bit scales", "everything"),
)


def test_processor_without_avx512():
    """The same kernel compiled for a plain processor, in a process of its own."""
    env = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    result = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["fp32", "vectors", str(len(SCALAR))]


def check_scalar():
    assert TOLERANCE["cpu"] == FP32
    for name in SCALAR:
        arguments = build(CASES[name])
        assert_close(cpu.attend_codes(*arguments), reference.attend_codes(*arguments))
    print(cpu.path(), len(SCALAR))


@pytest.mark.skipif(sys.platform != "linux", reason="glibc fills freed memory on request, others do not")
def test_freed_memory_is_not_read():
    """Arrays are passed by address, where numba may free one too early: with freed memory overwritten it shows."""
    env = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.perturb=85"}
    result = subprocess.run([sys.executable, __file__, "perturbed"], capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["perturbed", str(len(CASES))]


def check_perturbed():
    for case in CASES.values():
        query, view, mask, scoring = build(case)
        runs = {
            name: dataclasses.replace(run, k=run.k.bfloat16(), v=run.v.bfloat16())
            for name, run in (("sinks", view.sinks), ("recent", view.recent))
        }
        for seen in (view, dataclasses.replace(view, **runs)):
            arguments = query, seen, mask, scoring
            assert_close(cpu.attend_codes(*arguments), reference.attend_codes(*arguments), "cpu")
    print("perturbed", len(CASES))


def test_numbas_pool_gives_the_same(monkeypatch):
    """Where torch has no pool that kernels can run on."""
    arguments = build(CASES["many splits"])
    expected = cpu.attend_codes(*arguments)
    monkeypatch.setattr(threads, "torch_pool", lambda: None)
    assert torch.equal(cpu.attend_codes(*arguments), expected)


def sources(entry, seen=None):
    """Kernel files that a file's compiled functions come from: what it imports, and what that imports."""
    seen = set() if seen is None else seen
    for name in re.findall(r"^ *from (?:\.(\w+) import|\. import (\w+)(?: as \w+)?$)", entry.read_text(), re.MULTILINE):
        path = entry.with_name(f"{name[0] or name[1]}.py")
        if path not in seen and path.name != "threads.py":
            seen.add(path)
            sources(path, seen)
    return seen


@pytest.mark.parametrize("name", ["attend_worker.py", "encode_worker.py"])
def test_compiled_code_is_of_these_sources(name):
    """numba's cache looks at the entry file alone: `CALLS` changes it with what it calls, or old code would run."""
    entry = Path(threads.__file__).with_name(name)
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources(entry)))).hexdigest()[:16]
    assert f'CALLS = "{digest}"' in entry.read_text()


if __name__ == "__main__":
    torch.manual_seed(0)
    check_perturbed() if "perturbed" in sys.argv else check_scalar()
