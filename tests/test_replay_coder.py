"""Token ids and intervals as bytes: round trips, prices, damage, and streams of earlier versions.

`tests/golden/tokens.*` are streams as an earlier version stored them; they must decode for ever. `python
tests/test_replay_coder.py` writes them anew, which is right only where their layout changes.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_seqkv.codec.token_coder import LOW, TOTAL, IntervalReader, encode, frequencies
from hf_seqkv.codec.token_contexts import decode_ids, encode_ids
from hf_seqkv.errors import FormatError, NonFiniteError
from hf_seqkv.integration.replay import pack, unpack

GOLDEN = Path(__file__).parent / "golden"


def logits_of(step, vocabulary=300):
    """Logits that any machine computes alike: eighths, by integers."""
    return torch.tensor([((i * (step + 3)) ** 2 % 127) / 8 for i in range(vocabulary)])


def golden_ids(count=2000):
    """Ids that repeat, jump, and take all widths."""
    return np.array(
        [(i * i % 37 + i % 5) if i % 50 else (i * 2654435761) % (1 << (i // 50 % 33)) for i in range(count)]
    )


def interval_stream(tokens, rows):
    starts = [int(row[:token].sum()) for token, row in zip(tokens, rows, strict=True)]
    return encode(
        np.array(starts, np.int64), np.array([int(r[t]) for t, r in zip(tokens, rows, strict=True)], np.int64)
    )


def read(data, rows):
    reader = IntervalReader(data)
    tokens = [reader.take(row) for row in rows]
    reader.close()
    return tokens


# Intervals of logits.


any_logit = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False) | st.floats(-20, 20) | st.just(-math.inf)


@given(st.lists(any_logit, min_size=1, max_size=60), st.integers(0, 59))
def test_frequencies_are_intervals(values, at):
    values[at % len(values)] = 3.0
    found = frequencies(torch.tensor(values))
    assert found.dtype == torch.int64
    assert found.min() >= 1
    assert TOTAL - len(values) <= found.sum() <= TOTAL


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_frequencies_follow_the_softmax(dtype):
    logits = (4 * torch.randn(49_152)).to(dtype)
    chances = logits.double().softmax(-1)
    ours = frequencies(logits).double() / TOTAL
    assert (chances * (chances / ours).log2()).sum() < 1e-4  # bits a token more than the entropy


def test_a_wide_vocabulary_costs_little():
    logits = torch.zeros(262_144)
    logits[7] = 30
    assert -math.log2(frequencies(logits)[7].item() / TOTAL) < 0.0004


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_frequencies_of_no_distribution(value):
    with pytest.raises(NonFiniteError, match="largest logit"):
        frequencies(torch.tensor([0.0, value, 1.0]))
    with pytest.raises(NonFiniteError, match="largest logit"):
        frequencies(torch.full((3,), -math.inf))


# Streams of intervals.


@given(st.lists(st.integers(0, 299), max_size=100))
@settings(max_examples=100)
def test_intervals_round_trip(tokens):
    rows = [frequencies(logits_of(i)) for i in range(len(tokens))]
    assert read(interval_stream(tokens, rows), rows) == tokens


@given(st.lists(st.tuples(st.integers(1, TOTAL), st.integers(0, TOTAL)), max_size=50))
def test_any_interval_round_trips(pairs):
    """Two or three symbols, the one that is coded anywhere; from the whole range to a single slot."""
    rows = [(start % (TOTAL - length + 1), length) for length, start in pairs]
    data = encode(np.array([start for start, _ in rows], np.int64), np.array([length for _, length in rows], np.int64))
    reader = IntervalReader(data)
    for start, length in rows:
        assert reader.take(torch.tensor([start, length, TOTAL - start - length])) == 1
    reader.close()


def test_intervals_take_their_price():
    rows = [frequencies(logits_of(i)) for i in range(3000)]
    tokens = [int(torch.multinomial(row.double(), 1)) for row in rows]
    ideal = sum(30 - math.log2(row[token]) for row, token in zip(rows, tokens, strict=True))
    assert ideal <= 8 * len(interval_stream(tokens, rows)) < ideal + 65


def test_the_layout():
    """One symbol of half the range, then one of a sixteenth, pushed in reverse as the docstring reads them."""
    data = encode(np.array([0, TOTAL // 2]), np.array([TOTAL // 2, TOTAL // 16]))
    last = (LOW // (TOTAL // 16)) * TOTAL + TOTAL // 2
    state = (last // (TOTAL // 2)) * TOTAL
    assert data == state.to_bytes(8, "little")


@pytest.mark.parametrize("data", [b"", bytes(7), bytes(9), bytes(14)])
def test_streams_of_impossible_length(data):
    with pytest.raises(FormatError, match="damaged"):
        IntervalReader(data)


def test_damaged_streams_of_intervals():
    rows = [frequencies(logits_of(i)) for i in range(20)]
    tokens = [i % 300 for i in range(20)]
    data = interval_stream(tokens, rows)
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1
        # what is stored has a checksum besides: 32 bits of the state say nothing at the end
        try:
            assert read(bytes(damaged), rows) != tokens
        except FormatError:
            continue
    for wrong in (data[:-4], data + bytes(4)):
        with pytest.raises(FormatError, match="end"):
            read(wrong, rows)


def test_slots_that_belong_to_no_token():
    data = encode(np.array([TOTAL - 1]), np.array([1]))
    with pytest.raises(FormatError, match="no token fits"):
        IntervalReader(data).take(torch.tensor([5, 7]))


# Ids without a model.

any_id = st.integers(0, 5) | st.integers(0, 50_000) | st.sampled_from([2**16, 2**31, 2**32 - 1])


@given(st.lists(any_id, max_size=300))
@settings(max_examples=200)
def test_ids_round_trip(tokens):
    ids = np.array(tokens, np.int64)
    assert np.array_equal(decode_ids(encode_ids(ids), len(ids)), ids)


@pytest.mark.parametrize("high", [1, 2, 49_152, 2**32])
@pytest.mark.parametrize("count", [1, 5000])
def test_random_ids_take_little_more_than_their_width(high, count):
    ids = np.random.default_rng(0).integers(0, high, count)
    data = encode_ids(ids)
    assert np.array_equal(decode_ids(data, count), ids)
    assert 8 * len(data) <= 1.08 * count * (high - 1).bit_length() + 80


def test_repetition_is_seen():
    ids = np.tile(np.random.default_rng(0).integers(0, 49_152, 64), 32)
    assert 8 * len(encode_ids(ids)) / len(ids) < 2.5


def test_damaged_ids_do_no_harm():
    ids = golden_ids(100)
    data = encode_ids(ids)
    for at in range(len(data)):
        for value in (0, 1, 33, 255):
            damaged = bytearray(data)
            damaged[at] ^= value
            try:
                assert len(decode_ids(bytes(damaged), 100)) == 100
            except FormatError:
                continue
    for wrong in (b"", data[:1], data[:-4], data + bytes(4), bytes([33]) + data[1:]):
        with pytest.raises(FormatError, match="damaged"):
            decode_ids(wrong, 100)


# Golden files.


def golden_intervals():
    rows = [frequencies(logits_of(i)) for i in range(500)]
    return interval_stream([i * 7919 % 300 for i in range(500)], rows)


def test_golden_intervals():
    rows = [frequencies(logits_of(i)) for i in range(500)]
    assert read((GOLDEN / "tokens.intervals").read_bytes(), rows) == [i * 7919 % 300 for i in range(500)]
    assert golden_intervals() == (GOLDEN / "tokens.intervals").read_bytes()


def test_golden_sequence():
    stored = (GOLDEN / "tokens.sequence").read_bytes()
    assert unpack(stored).tolist() == golden_ids().tolist()
    assert pack(torch.from_numpy(golden_ids())) == stored


if __name__ == "__main__":
    (GOLDEN / "tokens.intervals").write_bytes(golden_intervals())
    (GOLDEN / "tokens.sequence").write_bytes(pack(torch.from_numpy(golden_ids())))
