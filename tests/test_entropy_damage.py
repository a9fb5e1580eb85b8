"""The entropy coder on damaged and foreign streams: refused, or as many values, never a crash."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_entropy import CLASSES, TABLES, int32, uint8

from hf_seqkv.codec.entropy import decode, encode
from hf_seqkv.errors import FormatError


def small_stream():
    generator = torch.Generator().manual_seed(3)
    classes = torch.randint(0, CLASSES, (400,), dtype=torch.uint8, generator=generator).sort().values
    symbols = torch.randn(400, generator=generator).mul(2).round().int()
    symbols[::50] = 10**6
    return symbols, classes, encode(symbols, classes, TABLES)


def refused_or(data, classes, tables, symbols):
    """Whether `data` is refused; where it is not, it decodes to as many values, other ones."""
    try:
        decoded = decode(data, classes, tables)
    except FormatError:
        return True
    assert decoded.shape == symbols.shape
    assert not torch.equal(decoded, symbols)
    return False


def test_damaged_streams_are_refused_or_wrong():
    symbols, classes, data = small_stream()
    escapes = 8 + 2 * int.from_bytes(data[:4], "little")
    assert 50 < len(data) - escapes < 200
    unseen = []
    for i in range(len(data)):
        for flip in (1, 16, 128, 255):
            if not refused_or(data[:i] + bytes([data[i] ^ flip]) + data[i + 1 :], classes, TABLES, symbols):
                unseen.append(i)
    # What an escape stands for is a number like any other. All else moves the states, but for a word that turns a
    # symbol into another one of the same frequency.
    assert sum(i < escapes for i in unseen) <= 0.02 * 4 * escapes
    assert all(i >= 8 for i in unseen)


def test_truncated_and_extended_streams_are_refused():
    _, classes, data = small_stream()
    for size in range(len(data)):
        with pytest.raises(FormatError, match="drop it"):
            decode(data[:size], classes, TABLES)
    for extra in (b"\0", b"\1\2", bytes(100)):
        with pytest.raises(FormatError, match="escapes"):
            decode(data + extra, classes, TABLES)


@given(st.binary(max_size=300), st.integers(0, 300))
@settings(max_examples=500)
def test_foreign_bytes_are_refused(data, words):
    _, classes, stream = small_stream()
    for foreign in (data, words.to_bytes(4, "little") + data, stream[:8] + data):
        with pytest.raises(FormatError):
            decode(foreign, classes, TABLES)


def test_a_huge_number_of_words_is_refused_before_it_is_believed():
    _, classes, data = small_stream()
    with pytest.raises(FormatError, match=str(8 + 2 * (2**32 - 1))):
        decode(b"\xff" * 4 + data[4:], classes, TABLES)


def test_another_number_of_symbols_or_other_classes_are_refused():
    _, classes, data = small_stream()
    for other in (classes[:-1], torch.cat([classes, classes[-1:]]), classes.flip(0), classes[:0]):
        with pytest.raises(FormatError):
            decode(data, other, TABLES)


@pytest.mark.parametrize("escape", ["", "80", "ff" * 5, "ffffffff7f", "ffffffff1f", "0000"])
def test_escapes_that_are_none_are_refused(escape):
    data = encode(int32(5), uint8(7), TABLES)
    assert data[-1:] == bytes([8])
    assert decode(data, uint8(7), TABLES) == 5
    with pytest.raises(FormatError, match="escapes"):
        decode(data[:-1] + bytes.fromhex(escape), uint8(7), TABLES)


def test_what_callers_get_wrong_is_named():
    with pytest.raises(ValueError, match=f"class {CLASSES} has no table"):
        encode(int32(0, 0), uint8(0, CLASSES), TABLES)
    with pytest.raises(ValueError, match=f"class {CLASSES} has no table"):
        decode(bytes(8), uint8(CLASSES), TABLES)
    with pytest.raises(ValueError, match=r"must be torch\.uint8"):
        decode(bytes(8), int32(0), TABLES)
    with pytest.raises(ValueError, match="symbols are"):
        encode(int32(0, 0), uint8(0), TABLES)
    with pytest.raises(ValueError, match="symbols are"):
        encode(int32(0).long(), uint8(0), TABLES)
