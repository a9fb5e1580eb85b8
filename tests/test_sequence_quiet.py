"""Components that are mostly zero: which they are, and that few of them are stored."""

from dataclasses import replace

import pytest
import torch
from sequence_cases import BASE, both, decode, encode, flat, make_codec, make_pages, tables

from hf_seqkv.codec import sequence_quiet as quiet
from hf_seqkv.codec.sequence import SequenceCodec
from hf_seqkv.codec.sequence_part import SIZES, dct
from hf_seqkv.codec.symbol_tables import LIMIT, TOTAL
from hf_seqkv.codec.uniform import UniformQuantizer

PAGE = 8


@both
def test_silent_components_cost_flags_alone(predict):
    """What is taken for mostly zero and is, has no symbols; one coefficient of it brings those of its component."""
    codec, (embedded, layers) = make_codec(predict, refine=-9.0, quiet=0.5), make_pages(4)
    parts = [replace(part, sizes=torch.where(part.sizes > 60, 160, part.sizes)) for part in codec.parts]
    codec = SequenceCodec(parts, codec.along, codec.tables, BASE, step=30)
    assert all(0 < coder.loud < part.bias.numel() for coder, part in zip(codec.coders, codec.parts, strict=True))
    pages, held, encoder = encode(codec, embedded, layers)
    active = torch.cat([encoder.coded(i)[2].any(-1) for i in range(len(codec.parts))], 1)
    assert 0 < active.float().mean() < 0.5
    symbols = [codec._read(page)[2] for page in pages]
    assert [len(x) for x, _ in symbols] == active.sum(1).tolist()
    assert all(x.any(1).all() for _, x in symbols)
    assert torch.equal(flat(decode(codec, pages, embedded)), flat(held))


def test_flags_follow_from_what_tables_say_of_zero():
    """Of a component's coefficients the numbers of 4,096 that are not zero add up, in integers."""
    bits, classes = tables().bits(), torch.randint(SIZES, (PAGE, 50))
    other = TOTAL - tables().frequencies.int()[:, LIMIT]
    expected = other[classes].sum(0) / TOTAL  # coefficients a page
    for kind, count in zip(quiet.flag_kinds(classes, bits).tolist(), expected.tolist(), strict=True):
        assert kind == 0 or count >= 2.0 ** (kind - 7)
        assert kind == quiet.KINDS - 1 or count < 2.0 ** (kind - 6)


@pytest.mark.parametrize(("kinds", "count"), [([9] * 4 + [0] * 9, 4), ([0, 1, 0], 0), ([9, 0, 0, 9, 0, 0], 1), ([], 0)])
def test_few_active_ones_cost_less_than_a_product_with_all(kinds, count):
    assert quiet.loud_count(torch.tensor(kinds, dtype=torch.int64)) == count


def test_flags_have_tables():
    found = quiet.with_flags(tables())
    shares = found.frequencies[-quiet.KINDS :].double() / TOTAL
    assert torch.equal(found.frequencies[: -quiet.KINDS], tables().frequencies)
    assert (shares[:, [LIMIT, LIMIT + 1]].sum(1) > 1 - 3 / TOTAL).all()
    assert (shares[:, LIMIT + 1].diff() > 0).all()


@pytest.mark.parametrize("per_page", [(0, 0, 0), (1, 4, 5), (9, 0, 2)])
def test_active_components_are_added(per_page):
    """As a product with all of them would; pages do not depend on each other."""
    pages, quiet_count, width, first = len(per_page), 9, 24, 15
    order = torch.arange(PAGE * quiet_count).view(PAGE, -1).T.reshape(1, -1)
    uniform = UniformQuantizer(torch.zeros_like(order, dtype=torch.uint8), torch.tensor([0.3]), order)
    symbols = torch.zeros(pages, quiet_count, PAGE, dtype=torch.int32)
    for page, count in enumerate(per_page):
        symbols[page, torch.randperm(quiet_count)[:count], page] = torch.randint(1, 6, (count,), dtype=torch.int32)
    symbols[:, :, 7] = -symbols[:, :, 0]
    chosen = quiet.are_active(symbols)
    assert torch.equal(chosen, symbols.any(2))
    assert chosen.sum(1).tolist() == list(per_page)
    synthesis, out = torch.randn(width, width), torch.randn(pages * PAGE, width)
    values = uniform.dequantise(symbols.flatten(1), torch.zeros(pages, dtype=torch.int64)).view(pages, PAGE, -1)
    expected = out + (dct(PAGE).T @ values).flatten(0, 1) @ synthesis[first:]

    def added(some):
        active = *chosen[some].nonzero().unbind(1), symbols[some][chosen[some]]
        result = out.view(pages, PAGE, width)[some].flatten(0, 1).clone()
        quiet.add_active(active, 0.3, dct(PAGE), synthesis, first, result)
        return result

    together = added(slice(None))
    torch.testing.assert_close(together, expected)
    assert torch.equal(torch.cat([added(slice(i, i + 1)) for i in range(pages)]), together)


def test_rows_are_added():
    values, synthesis, out = torch.randn(5, 12) * (torch.rand(5, 12) > 0.7), torch.randn(12, 12), torch.randn(9, 12)
    rows, found = torch.tensor([1, 2, 4, 7, 8]), out.clone()
    quiet.add_rows(rows, values, 4, synthesis, found)
    torch.testing.assert_close(found, out.index_add(0, rows, values[:, 4:] @ synthesis[4:]))
