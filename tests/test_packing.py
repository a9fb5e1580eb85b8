"""Bit packing: the layout that stored pages rely on."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_seqkv.codec.packing import fields, pack, unpack


def uint8(*values):
    return torch.tensor(values, dtype=torch.uint8)


@given(st.integers(1, 8), st.integers(1, 20), st.data())
def test_round_trip(bits, eighths, data):
    n = 8 * eighths
    codes = uint8(*data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=n, max_size=n)))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (n * bits // 8,)
    assert torch.equal(unpack(packed, bits), codes)


@given(st.integers(1, 8), st.integers(1, 8), st.data())
def test_every_byte_string_is_a_packing(bits, eighths, data):
    packed = uint8(*data.draw(st.binary(min_size=eighths * bits, max_size=eighths * bits)))
    assert torch.equal(pack(unpack(packed, bits), bits), packed)


@pytest.mark.parametrize("bits", range(1, 9))
def test_leading_dimensions_are_packed_on_their_own(bits):
    codes = torch.randint(0, 2**bits, (3, 2, 16), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, 2, 2 * bits)
    assert torch.equal(packed[2, 1], pack(codes[2, 1], bits))
    assert torch.equal(unpack(packed, bits), codes)


def test_zero_bits_take_no_bytes():
    assert pack(torch.zeros(5, 8, dtype=torch.uint8), 0).shape == (5, 0)


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (0, []),
        (1, [(1, 0)]),
        (2, [(2, 0)]),
        (3, [(2, 0), (1, 2)]),
        (4, [(4, 0)]),
        (5, [(4, 0), (1, 4)]),
        (6, [(4, 0), (2, 4)]),
        (7, [(4, 0), (2, 4), (1, 6)]),
        (8, [(8, 0)]),
    ],
)
def test_fields(bits, expected):
    assert fields(bits) == expected


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        # One byte of eight 1-bit codes, lowest bit first.
        (1, [1, 0, 0, 0, 1, 1, 0, 1], "b1"),
        # n = 16: byte j holds codes j, j + 2, j + 4, ...
        (1, [1, 0] * 8, "ff00"),
        # n = 8, 2 bytes: byte j holds codes j, j + 2, j + 4, j + 6, from its low bits up.
        (2, [0, 1, 2, 3, 3, 2, 1, 0], "782d"),
        # n = 8, 4 bytes: byte j holds code j in its low half and code j + 4 in its high half.
        (4, [0, 1, 2, 3, 12, 13, 14, 15], "c0d1e2f3"),
        # A 2-bit field of the low bits, then a 1-bit field of the third.
        (3, [0, 1, 2, 3, 4, 5, 6, 7], "88dd" + "f0"),
        # A 4-bit field, then a 1-bit field.
        (5, [16, 1, 18, 3, 20, 5, 22, 7], "40516273" + "55"),
        # A 4-bit, a 2-bit and a 1-bit field.
        (7, [127, 0, 0, 0, 0, 0, 0, 64], "0f000000" + "0300" + "81"),
        (8, [0, 1, 2, 3, 252, 253, 254, 255], "00010203fcfdfeff"),
    ],
    ids=["1 bit", "1 bit two bytes", "2 bits", "4 bits", "3 bits", "5 bits", "7 bits", "8 bits"],
)
def test_layout(bits, codes, expected):
    packed = pack(uint8(*codes), bits)
    assert bytes(packed.tolist()).hex() == expected
    assert unpack(packed, bits).tolist() == codes
