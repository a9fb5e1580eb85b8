"""Attention over codes: the reference against torch, the compiled kernel against the reference."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import CASES, Case, build

from hf_seqkv.codec.page import DensePageCodec
from hf_seqkv.kernels import cpu, reference
from hf_seqkv.kernels.interface import DenseRun

FP32 = 2e-5  # of the largest output
TOLERANCE = {"reference": FP32, "cpu": cpu.tolerance()}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


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
    assert out.is_contiguous()  # models view it as [B, Tq, Hq * Dv]
    assert out.isfinite().all()
    assert (out.double() - expected.double()).abs().max() <= factor * TOLERANCE[backend] * expected.double().abs().max()


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
@pytest.mark.parametrize("sinks", [False, True], ids=["no sink logits", "sink logits of minus infinity"])
def test_batch_that_sees_nothing_gets_zeros(backend, sinks):
    query, view, _, scoring = build(Case(steps=2))
    if sinks:
        scoring = dataclasses.replace(scoring, sink_logits=torch.full((query.shape[1],), -torch.inf))
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
