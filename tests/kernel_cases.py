"""Attention calls for tests of the kernels: shapes, settings, and tensors where all that does not count is poisoned."""

import dataclasses
from dataclasses import dataclass

import torch

from hf_seqkv.codec.center import Center
from hf_seqkv.codec.page import QuantizedPageCodec
from hf_seqkv.codec.quantize import lloyd_max
from hf_seqkv.codec.rotation import random_rotation
from hf_seqkv.codec.vector import VectorCodec
from hf_seqkv.kernels.interface import DenseRun, LayerView, Scoring, SideTable
from hf_seqkv.kernels.triton_tables import byte_table, is_free


@dataclass(frozen=True)
class Case:
    """One attention call. Row `b` is `[pads[b] empty slots | sinks | counts[b] pages | the rest dense]`.

    `widths` are the bits of all components (one number) or of runs of them: the same in all heads and with fitted
    levels where they are `alike`, else from another component on in each and with levels at random; `half` is the
    number of RoPE pairs of the constant part of the keys, None where keys have none.
    """

    heads: int = 2
    groups: int = 2
    steps: int = 1
    dim: int = 64
    value_dim: int = 64
    page_size: int = 16
    widths: int | tuple[int, ...] = 4
    alike: bool = False
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
    starts = [0 if case.alike else h for h in range(case.heads)]
    widths = torch.tensor([runs[at:] + runs[:at] for at in starts], dtype=torch.uint8)
    levels = torch.zeros(case.heads, 9, 256)
    for width in range(9):
        if not case.alike:
            levels[:, width, : 2**width] = torch.randn(case.heads, 2**width).sort(-1).values
        elif width in runs:
            fitted = lloyd_max(width, dim)
            if width == 5:  # where kernels tell symmetric levels from others
                fitted = fitted + 0.01 * fitted**2
            levels[:, width, : 2**width] = torch.linspace(1, 1.2, case.heads)[:, None] * fitted
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
        relative=torch.cat([angle.cos(), angle.sin()], -1).half().float(),
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
    if case.mask == "turned":  # in memory
        return (torch.rand(batch, 1, columns, case.steps) > 0.3).transpose(2, 3)
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


def rounded(view):
    """The view with the levels that byte tables hold; its codes are the same."""

    def side(codec):
        levels = codec.levels.clone()
        for bits in codec.widths.unique().tolist():
            for table in levels[:, bits, : 1 << bits]:
                u, step, shift = byte_table(table, is_free(codec))
                table[:] = step * (u.double() + shift)
        given = codec.encode_matrix, codec.decode_matrix, codec.mean, codec.widths, levels
        return VectorCodec(*given, codec.scale, codec.page_size, codec.scale_bits)

    return dataclasses.replace(view, codec=QuantizedPageCodec(side(view.codec.key), side(view.codec.value)))
