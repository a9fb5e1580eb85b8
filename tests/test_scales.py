"""Scales of 8 bits: a monotone table, the nearest by ratio, and codes chosen for what is stored."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_seqkv.codec import scales
from hf_seqkv.codec.page import QuantizedPageCodec
from hf_seqkv.codec.vector import VectorCodec

EVERY = torch.arange(256, dtype=torch.uint8)


def test_every_byte_comes_back_and_is_larger_than_the_one_before():
    values = scales.from_bytes(EVERY)
    assert torch.equal(scales.to_bytes(values), EVERY)
    assert (values.float().diff() > 0).all()
    assert values[0] == 0
    assert torch.isinf(values[scales.HELD])


def test_steps_are_at_most_an_eighth():
    finite = scales.from_bytes(EVERY)[1 : scales.HELD].float()
    assert (finite[1:] / finite[:-1]).max() <= 1.125
    assert finite[0] < 2.0**-19
    assert finite[-1] > 2.0**11


@given(st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=50))
def test_nearest_by_ratio(numbers):
    x = torch.tensor(numbers)
    found, finite = scales.nearest(x), scales.from_bytes(EVERY)[1 : scales.HELD].float()
    far = (x[:, None].clamp_min(1e-30).log() - finite.log()).abs()
    for number, ours, distance in zip(x, found, far, strict=True):
        if number == 0:
            assert ours == 0
        else:
            assert distance[finite == ours].item() <= distance.min().item() + 1e-6


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_vectors_lose_nothing(bits):
    torch.manual_seed(bits)
    x = torch.randn(4, 2, 64, 64) * 2 ** torch.randn(4, 2, 64, 1)
    errors = []
    for scale_bits in (16, 8):
        same = {"rotation": "hadamard", "codebook": "lloyd_max", "scale": "fit", "seed": 0, "scale_bits": scale_bits}
        codec = VectorCodec.data_free(2, 64, 64, bits=bits, **same)
        errors.append((codec.decode(*codec.encode(x)) - x).square().sum())
    assert errors[1] < 1.01 * errors[0]


def test_a_page_is_shorter_by_a_byte_a_vector_and_remembers_held_tokens():
    made = []
    for scale_bits in (16, 8):
        same = {"rotation": "hadamard", "codebook": "lloyd_max", "scale": "fit", "seed": 0, "scale_bits": scale_bits}
        codec = VectorCodec.data_free(2, 32, 16, bits=4, **same)
        made.append(QuantizedPageCodec(codec, codec))
    wide, narrow = made
    assert wide.page_bytes - narrow.page_bytes == 2 * 2 * 16
    assert wide.fingerprint != narrow.fingerprint
    torch.manual_seed(0)
    pages = narrow.encode(torch.randn(3, 2, 16, 32), torch.randn(3, 2, 16, 32))
    where = torch.rand(3, 16) < 0.3
    before = narrow.decode(pages)[1]
    narrow.vacate(pages, where)
    assert torch.equal(narrow.absent(pages), where[:, None].expand(-1, 2, -1))
    assert torch.equal(narrow.decode(pages)[1], before)
