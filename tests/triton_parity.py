"""The Triton kernels against the reference, in Triton's interpreter or on a GPU: `test_triton.py` runs this."""

import contextlib
import dataclasses
import os
from unittest import mock

import pytest
import torch
import triton_tools
from kernel_cases import MIXED, Case, build, make_center, rounded, vector_codec

from hf_seqkv.codec.page import QuantizedPageCodec
from hf_seqkv.codec.quantize import distortion, lloyd_max
from hf_seqkv.eval.bench_cuda import on_device
from hf_seqkv.kernels import reference, triton_attend, triton_launch, triton_pages
from hf_seqkv.kernels.triton_tables import byte_table, pieces

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
GATHERED = 2e-3  # of the largest output: fp16 operands
# Tables move levels by 0.7 % of a coordinate's deviation at 4 bits, a fourteenth of the codec's own 10 %.
TABLES = 1.2e-2


def case(**changes):
    return Case(**{"page_size": 64, "counts": (2, 1), **changes})


LENGTHS = {
    1: case(counts=(0,), pads=(0,), sinks=0, recent=1),
    63: case(counts=(0,), pads=(0,), recent=59),
    65: case(counts=(0,), pads=(1,), recent=60),
    300: case(counts=(4,), pads=(3,), recent=37),
    1000: case(counts=(14,), pads=(0,), heads=1, recent=100),
}
CASES = {
    **{f"length {length}": chosen for length, chosen in LENGTHS.items()},
    **{f"dim {dim}": case(dim=dim, value_dim=dim, counts=(2,), pads=(5,), half=dim // 4) for dim in (80, 96, 128, 256)},
    "values narrower": case(dim=96, value_dim=64),
    "values wider": case(dim=64, value_dim=80),
    **{f"{bits} bits": case(widths=bits) for bits in (2, 3, 5, 6, 8)},
    "mixed widths": case(widths=MIXED),
    "8-bit scales": case(scale_bits=8, side=5, half=32),
    "batch of 3": case(counts=(4, 0, 2), pads=(0, 50, 7), half=32),
    "G 1": case(groups=1),
    "G 8": case(groups=8, heads=1),
    "Tq 5": case(steps=5, groups=3, half=32, interleaved=True),
    "Tq 16": case(steps=16, groups=4, heads=1, counts=(3, 3), pads=(0, 0), recent=16),
    "bool mask": case(mask="bool", steps=2),
    "additive mask": case(mask="additive", steps=2),
    "mask of lowest": case(mask="lowest", steps=2),
    "bool mask per head": case(mask="per head bool", steps=2),
    "mask with its keys apart": case(mask="turned", steps=2),
    "center and mask": case(half=32, mask="bool", steps=2, counts=(5, 2), side=3),
    "center and mask per head": case(half=20, mask="per head bool", steps=3, groups=3, offset=70, window=200),
    "center and additive mask": case(half=16, mask="additive", steps=5, groups=4, offset=90),
    "center, nothing seen": case(half=32, mask="nothing seen", steps=2),
    "center, mask of lowest": case(half=32, mask="lowest", steps=2, interleaved=True),
    "window": case(window=50, steps=5, counts=(4, 2)),
    "window of one": case(window=1, steps=2),
    "window and mask": case(window=50, steps=5, mask="bool"),
    "not causal": case(causal=False, steps=5),
    "offset": case(offset=37, steps=2),
    "offset and additive mask": case(offset=90, steps=2, mask="additive"),
    "a query sees nothing": case(mask="nothing seen", steps=2),
    "softcap": case(softcap=1.5, half=32),
    "softcap and mask": case(softcap=1.5, mask="bool", side=5),
    "sink logits": case(sink_logits=True, steps=2, groups=3),
    "sink logits, nothing seen": case(sink_logits=True, mask="nothing seen", steps=2),
    "center without rope": case(half=0),
    "no sinks": case(sinks=0),
    "first sinks do not count": case(begin=2),
    "side table": case(side=7, half=32),
    "no pages, side": case(counts=(0, 1), side=3),
    "everything": case(
        half=20, interleaved=True, widths=MIXED, steps=5, groups=3, mask="additive", window=70, softcap=3.0,
        sink_logits=True, offset=5, dim=80, value_dim=96, counts=(3, 0, 1), pads=(0, 40, 11), side=4,
    ),
}  # fmt: skip
TABLE_CASES = {
    **{f"{bits} bits": case(widths=bits) for bits in (2, 3, 4, 5)},
    "5 bits, dim 80": case(widths=5, dim=80, value_dim=96, half=20),
    "8-bit scales": case(scale_bits=8, side=5, window=70),
    "dim 128": case(dim=128, value_dim=128, half=64, steps=2, counts=(1,), pads=(0,)),
    "dim 256": case(dim=256, value_dim=256, counts=(1,), pads=(0,)),
    "3 bits, dim 96": case(widths=3, dim=96, value_dim=96, counts=(1,), pads=(0,)),
    "3.5 and 2.5 bits": case(widths=(4, 3), alike=True, side=5, half=32),
    "three widths": case(widths=(3, 2, 2, 1), alike=True, dim=128, value_dim=64, counts=(1,), pads=(0,)),
    "center and mask": case(half=32, mask="bool", steps=5, groups=3, counts=(6, 2), offset=75, side=3),
    "center and additive mask": case(half=20, mask="additive", steps=2, widths=5),
    "4.25 bits, dim 80": case(widths=(5, 4, 4, 4, 4), alike=True, dim=80, value_dim=80),
    "everything": case(
        half=20, interleaved=True, widths=(5, 4), alike=True, steps=5, groups=3, mask="additive", window=70,
        softcap=3.0, sink_logits=True, offset=5, dim=96, value_dim=64, counts=(3, 0, 1), pads=(0, 40, 11), side=4,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def interpreter():
    torch.manual_seed(0)
    with triton_tools.patched() if INTERPRETED else contextlib.nullcontext():
        yield


def expanding(yes):
    """Whether codes are expanded by byte tables, whatever the device."""
    return mock.patch.object(triton_attend, "use_tables", return_value=yes)


def attend(*arguments):
    """With every buffer full of NaN before it is written; where the kernels run, and back."""

    def poisoned(*shape, **options):
        made = torch.zeros(*shape, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    query, view, mask, scoring = (on_device(x, DEVICE) for x in arguments)
    with mock.patch.object(triton_attend.torch, "empty", poisoned):
        return triton_attend.attend_codes(query, view, mask, scoring).cpu()


def error(out, expected):
    assert out.shape == expected.shape
    assert out.dtype == expected.dtype
    assert out.isfinite().all()
    return float((out.double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize("chosen", CASES.values(), ids=CASES)
def test_gathered(chosen):
    arguments = build(chosen)
    with expanding(False):
        out = attend(*arguments)
    assert error(out, reference.attend_codes(*arguments)) < GATHERED


@pytest.mark.parametrize("chosen", TABLE_CASES.values(), ids=TABLE_CASES)
def test_tables(chosen):
    query, view, mask, scoring = build(chosen)
    assert pieces(view.codec.key.widths)
    with expanding(True):
        out = attend(query, view, mask, scoring)
    assert error(out, reference.attend_codes(query, rounded(view), mask, scoring)) < GATHERED
    assert error(out, reference.attend_codes(query, view, mask, scoring)) < TABLES


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("expand", ["gathered", "tables"])
def test_precisions(dtype, expand):
    """Of queries and dense windows; the tokens of a side table are held in bf16."""
    query, view, mask, scoring = build(case(steps=2, half=32, side=3, sink_logits=True))
    kinds = {"sinks": dtype, "recent": dtype, "side": torch.bfloat16}
    parts = {name: getattr(view, name) for name in kinds}
    runs = {name: dataclasses.replace(x, k=x.k.to(kinds[name]), v=x.v.to(kinds[name])) for name, x in parts.items()}
    view, query = dataclasses.replace(view, **runs), query.to(dtype)
    with expanding(expand == "tables"):
        out = attend(query, view, mask, scoring)
    expected = reference.attend_codes(query, view if expand == "gathered" else rounded(view), mask, scoring)
    # One rounding of the output may differ.
    assert error(out, expected) < GATHERED + torch.finfo(dtype).eps


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_numbers_for_a_graph(batch):
    rows = tuple(tuple(range(i, i + batch)) for i in range(7))
    assert triton_launch.written(rows, DEVICE).tolist() == [list(row) for row in rows]


def test_row_does_not_depend_on_its_neighbours():
    query, view, _, scoring = build(case(counts=(3, 1), half=32, steps=2))
    together = attend(query, view, None, scoring)
    for row in range(2):
        cut = slice(row, row + 1)
        runs = {
            name: dataclasses.replace(
                run, k=run.k[cut], v=run.v[cut], slots=run.slots[cut], begin=run.begin[cut]
            )
            for name, run in (("sinks", view.sinks), ("recent", view.recent))
        }  # fmt: skip
        center = dataclasses.replace(view.center, mean=view.center.mean[cut], starts=view.center.starts[cut])
        counts, slots = view.counts[cut], view.page_slots[cut]
        alone = dataclasses.replace(
            view, pages=view.pages[cut], counts=counts, page_slots=slots, center=center, **runs
        )  # fmt: skip
        assert torch.equal(attend(query[cut], alone, None, scoring)[0], together[row])


def test_programs_share_the_constant_part():
    """What is computed does not depend on how many compute it, to the bit."""
    arguments, found = build(case(counts=(9, 2), steps=4, heads=1, groups=4, half=32)), []
    for multiprocessors in (1, 100):
        with expanding(False), mock.patch.object(triton_attend, "_gpu", return_value=(multiprocessors, 0)):
            found.append(attend(*arguments))
    assert torch.equal(*found)
    assert error(found[0], reference.attend_codes(*arguments)) < GATHERED


@pytest.mark.parametrize("expand", ["gathered", "tables"])
def test_scales_of_any_size(expand):
    """Value scales 2**60 apart and queries 2**40 times larger neither overflow nor vanish."""
    query, view, mask, scoring = build(case(counts=(3,), pads=(0,), recent=1, sinks=0))
    at, size = view.codec.sections["value_scales"]
    scales = view.pages.view(torch.bfloat16)[..., at // 2 : (at + size) // 2]
    scales[:, 0] *= 2.0**30
    scales[:, 1] *= 2.0**-30
    key_at, key_size = view.codec.sections["key_scales"]
    view.pages.view(torch.bfloat16)[..., key_at // 2 : (key_at + key_size) // 2] *= 2.0**-40
    view.recent.v.mul_(2.0**30)
    arguments = (query * 2.0**40, view, mask, scoring)
    with expanding(expand == "tables"):
        out = attend(*arguments)
    assert error(out, reference.attend_codes(*arguments)) < TABLES


@pytest.mark.parametrize("expand", ["gathered", "tables"])
def test_a_large_value_that_nothing_looks_at(expand):
    """Beside it the values that count are as exact as without it: weights are not relative to its scale."""
    query, view, mask, scoring = build(case(counts=(2,), pads=(0,), recent=1, sinks=0))
    keys, values = (view.codec.sections[name][0] // 2 for name in ("key_scales", "value_scales"))
    scales = view.pages.view(torch.bfloat16)
    at = torch.arange(view.codec.heads) * 64 + 5
    scales[..., keys + at] *= 2.0**7  # a key that some queries turn from, as far as others turn to it
    signs = reference.attend_codes(query, view, mask, scoring)
    scales[..., values + at] *= 2.0**20
    with expanding(expand == "tables"):
        out = attend(query, view, mask, scoring)
    expected = reference.attend_codes(query, view, mask, scoring)
    away = (expected.abs().amax(-1) < 2.0**10 * signs.abs().amax()).nonzero()
    assert len(away)
    for b, t, h in away.tolist():
        assert error(out[b, t, h], expected[b, t, h]) < TABLES


@pytest.mark.parametrize(("bits", "free"), [(2, True), (3, True), (4, True), (5, True), (5, False)])
def test_byte_tables_cost_little(bits, free):
    levels = lloyd_max(bits, 128)
    u, step, shift = byte_table(levels, free)
    assert bits != 4 or u.min() >= 0
    edges = torch.cat([torch.tensor([-20.0]), (levels[1:] + levels[:-1]) / 2, torch.tensor([20.0])]).double()
    mass = torch.distributions.Normal(0, 1).cdf(edges).diff()
    added = (mass * (step * (u.double() + shift) - levels.double()) ** 2).sum()
    assert added < 0.015 * distortion(bits, 128)


@pytest.mark.parametrize(
    ("chosen", "half", "interleaved"),
    [(case(widths=4), None, False), (case(widths=5, dim=80), 32, False), (case(widths=MIXED, dim=80), 20, True),
     (case(widths=3, dim=96), 48, True), (case(widths=8), 32, False), (case(widths=MIXED, scale_bits=8), 32, False)],
    ids=["4 bits", "5 bits and center", "mixed widths", "3 bits", "8 bits", "8-bit scales"],
)  # fmt: skip
def test_pages(chosen, half, interleaved):
    """Encoding in place of `codec.encode`, from strided tensors, and unpacking in place of `codec.decode`."""
    chosen = dataclasses.replace(chosen, half=half, interleaved=interleaved)
    codec = QuantizedPageCodec(vector_codec(chosen, chosen.dim, 0), vector_codec(chosen, chosen.value_dim, 7))
    center = make_center(chosen, 2)
    k = torch.randn(2, chosen.heads, 2, 64, chosen.dim).transpose(1, 2)
    v = torch.randn(2, 2, 64, chosen.heads, chosen.value_dim + 3).transpose(2, 3)[..., :-3]
    constant = 0
    if center is not None:
        constant = center.keys(0, 2)
        k = (k.transpose(1, 2) + constant.transpose(1, 2)).transpose(1, 2)
    expected = codec.encode(k - constant, v)
    moved = [on_device(x, DEVICE) for x in (codec, k, v, center)]
    pages = triton_pages.encode_pages(*moved).cpu()
    for made, wanted in zip(codec.unpack(pages), codec.unpack(expected), strict=True):
        assert (made != wanted).sum() <= max(1, 1e-3 * made.numel())
    codec.vacate(expected, torch.rand(2, 2, 64) > 0.9)
    for side in range(2):
        made = triton_pages.unpack_pages(moved[0], expected.to(DEVICE), side).cpu()
        torch.testing.assert_close(made, codec.coordinates(expected, side))


def test_padding_between_sections_is_zero():
    chosen = case(widths=(3, 0), dim=16, value_dim=16, heads=1)
    codec = QuantizedPageCodec(vector_codec(chosen, 16, 0), vector_codec(chosen, 16, 7)).to(DEVICE)
    codec.sections = {name: (at + 16 * i, size) for i, (name, (at, size)) in enumerate(codec.sections.items())}
    codec.page_bytes += 64
    dense = torch.randn(2, 1, 1, 1, 64, 16, device=DEVICE)
    pages = triton_pages.encode_pages(codec, *dense, None).cpu()
    used = torch.zeros(codec.page_bytes, dtype=torch.bool)
    for at, size in codec.sections.values():
        used[at : at + size] = True
    assert not pages[0, 0, ~used].any()


def test_nothing_to_encode():
    codec = QuantizedPageCodec(*(vector_codec(case(), 64, seed) for seed in (0, 7)))
    nothing = torch.randn(2, 0, 2, 64, 64, device=DEVICE)
    made = triton_pages.encode_pages(codec.to(DEVICE), nothing, nothing, None)
    assert made.shape == (2, 0, codec.page_bytes)


def test_unsupported_codecs_are_named():
    small = QuantizedPageCodec(*(vector_codec(case(page_size=16), 64, seed) for seed in (0, 7)))
    assert "pages of 16 tokens" in triton_attend.supports(small)
    wide = QuantizedPageCodec(*(vector_codec(case(), 512, seed) for seed in (0, 7)))
    assert "512 components" in triton_attend.supports(wide)
    assert triton_attend.supports(build(case())[1].codec) is None
