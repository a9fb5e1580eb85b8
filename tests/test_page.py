"""Pages: what is stored comes back bit for bit, and what is damaged is refused.

`tests/golden/` holds pages as an earlier version stored them; they must decode for ever. `python tests/test_page.py`
writes them anew, which is right only where the format's version changes.
"""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from page_cases import GOLDEN_CODECS, data_free, golden_inputs, page_inputs, small, small_codecs

from hf_seqkv.codec.page import DensePageCodec, QuantizedPageCodec
from hf_seqkv.codec.vector import VectorCodec
from hf_seqkv.errors import FormatError

GOLDEN = Path(__file__).parent / "golden"
HEADER = 40
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# Dense pages.


@given(st.sampled_from(DTYPES), st.data())
def test_dense_page_is_exact(dtype, data):
    page_size, heads, key_dim, value_dim = (data.draw(st.integers(1, n)) for n in (9, 3, 9, 9))
    lead = tuple(data.draw(st.lists(st.integers(1, 3), max_size=2)))
    codec = DensePageCodec(page_size, heads, key_dim, value_dim, dtype)
    # Any bits at all, NaN and infinity among them: dense pages do not look at the numbers.
    item = torch.empty((), dtype=dtype).element_size()
    k, v = (
        torch.randint(0, 256, (*lead, heads, page_size, dim * item), dtype=torch.uint8).view(dtype)
        for dim in (key_dim, value_dim)
    )
    pages = codec.encode(k, v)
    assert pages.shape == (*lead, codec.page_bytes)
    for out, x in zip(codec.decode(pages), (k, v), strict=True):
        assert out.dtype == dtype
        assert torch.equal(out.view(torch.uint8), x.view(torch.uint8))


# Quantised pages.


@given(st.data())
def test_quantised_page_holds_codes_and_scales(data):
    page_size = data.draw(st.sampled_from([8, 16, 24]))
    sides = []
    for dim in (data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))):
        widths = data.draw(st.lists(st.integers(0, 8), min_size=2 * dim, max_size=2 * dim))
        widths = torch.tensor(widths, dtype=torch.uint8).reshape(2, dim)
        basis = torch.eye(dim).expand(2, dim, dim).contiguous()
        levels = torch.arange(256.0).expand(1, 9, 256) - 2
        sides.append(VectorCodec(basis, basis, torch.zeros(2, dim), widths, levels, "fit", page_size))
    codec = QuantizedPageCodec(*sides)
    k, v = (torch.randn(3, 2, page_size, side.dim) for side in sides)
    pages = codec.encode(k, v)
    assert pages.shape == (3, codec.page_bytes)
    expected = [*codec.key.encode(k), *codec.value.encode(v)]
    for part, want in zip(codec.unpack(pages), expected, strict=True):
        assert part.dtype == want.dtype
        assert torch.equal(part, want)
    for out, side, (codes, scales) in zip(codec.decode(pages), sides, (expected[:2], expected[2:]), strict=True):
        assert torch.equal(out, side.decode(codes, scales))


def test_rate_is_codes_and_scales():
    codec = QuantizedPageCodec(data_free(64, 64, 4), data_free(64, 64, 4))
    assert codec.page_bytes * 8 / (2 * 64 * (64 + 64)) == 4.25


def test_sections_are_aligned_and_padded_with_zeros():
    codec = QuantizedPageCodec(data_free(2, 8, 3, heads=1), data_free(4, 8, 2, heads=1))
    assert codec.sections == {
        "key_codes": (0, 6),
        "key_scales": (16, 16),
        "value_codes": (32, 8),
        "value_scales": (48, 16),
    }
    assert codec.page_bytes == 64
    page = codec.encode(torch.randn(1, 8, 2), torch.randn(1, 8, 4))
    assert not page[6:16].any()
    assert not page[40:48].any()


@small
@pytest.mark.parametrize("keep", [0, 1, 5, 8])
def test_splice_joins_tokens(codec, keep):
    k, v = page_inputs(codec)
    old, new = codec.encode(k, v), codec.encode(v.sum() - k, k.sum() - v)
    spliced = codec.splice(old, new, keep)
    for part, a, b in zip(codec.decode(spliced), codec.decode(old), codec.decode(new), strict=True):
        assert torch.equal(part, torch.cat([a[:, :keep], b[:, keep:]], -2))
    assert torch.equal(codec.splice(old, old, keep), old)
    assert torch.equal(codec.splice(old, new, codec.page_size), old)
    assert torch.equal(codec.splice(old, new, 0), new)


def test_splice_keeps_leading_dimensions():
    codec = small_codecs()["quantised"]
    pages = codec.encode(torch.randn(2, 3, 1, 8, 4), torch.randn(2, 3, 1, 8, 2))
    other = codec.encode(torch.randn(2, 3, 1, 8, 4), torch.randn(2, 3, 1, 8, 2))
    spliced = codec.splice(pages, other, 3)
    assert torch.equal(spliced[1, 2], codec.splice(pages[1, 2], other[1, 2], 3))


# Stored pages.


@small
def test_stored_page_comes_back(codec):
    page = codec.encode(*page_inputs(codec))
    data = codec.to_bytes(page)
    assert len(data) == HEADER + codec.page_bytes
    assert data[:4] == b"SKVP"
    restored = codec.from_bytes(data)
    assert torch.equal(restored, page)
    restored[0] ^= 1  # a copy of its own: the stored bytes stay as they are
    assert torch.equal(codec.from_bytes(data), page)


@given(st.binary(min_size=96, max_size=96))
def test_any_payload_round_trips(payload):
    codec = DensePageCodec(8, 1, 4, 2, torch.bfloat16)
    page = torch.tensor(list(payload), dtype=torch.uint8)
    assert bytes(codec.from_bytes(codec.to_bytes(page)).tolist()) == payload


@small
@pytest.mark.parametrize("flip", [1, 128, 255])
def test_every_damaged_byte_is_refused(codec, flip):
    data = codec.to_bytes(codec.encode(*page_inputs(codec)))
    for i in range(len(data)):
        damaged = data[:i] + bytes([data[i] ^ flip]) + data[i + 1 :]
        with pytest.raises(FormatError):
            codec.from_bytes(damaged)


@small
def test_every_truncation_is_refused(codec):
    data = codec.to_bytes(codec.encode(*page_inputs(codec)))
    for size in range(len(data)):
        with pytest.raises(FormatError, match="truncated"):
            codec.from_bytes(data[:size])


@small
@pytest.mark.parametrize("extra", [b"\0", b"SKVP", bytes(100)], ids=["one byte", "four bytes", "many bytes"])
def test_extra_bytes_are_refused(codec, extra):
    data = codec.to_bytes(codec.encode(*page_inputs(codec)))
    with pytest.raises(FormatError, match=f"has {len(data) + len(extra)} bytes"):
        codec.from_bytes(data + extra)


@small
def test_short_payload_with_a_fitting_header_is_refused(codec):
    page = codec.encode(*page_inputs(codec))
    with pytest.raises(FormatError, match="another codec"):
        codec.from_bytes(codec.to_bytes(page[:-16]))


def test_other_version_is_named():
    codec = small_codecs()["dense"]
    data = bytearray(codec.to_bytes(codec.encode(*page_inputs(codec))))
    data[4] = 2
    with pytest.raises(FormatError, match=r"version 2.*reads version 1"):
        codec.from_bytes(bytes(data))


def test_something_else_is_named():
    with pytest.raises(FormatError, match="magic"):
        small_codecs()["dense"].from_bytes(b"PK\3\4" + bytes(200))


@pytest.mark.parametrize(
    "other",
    [
        DensePageCodec(8, 1, 4, 2, torch.float16),
        DensePageCodec(8, 1, 2, 4, torch.bfloat16),
        DensePageCodec(4, 2, 4, 2, torch.bfloat16),
        DensePageCodec(16, 1, 2, 1, torch.bfloat16),
        QuantizedPageCodec(data_free(4, 8, 3, heads=1), data_free(2, 8, 3, heads=1)),
    ],
    ids=["dtype", "dims swapped", "heads", "page size", "kind"],
)
def test_foreign_codec_is_refused(other):
    codec = small_codecs()["dense"]
    data = codec.to_bytes(codec.encode(*page_inputs(codec)))
    with pytest.raises(FormatError, match="another codec"):
        other.from_bytes(data)


def test_foreign_levels_are_refused():
    codec = QuantizedPageCodec(data_free(4, 8, 3), data_free(4, 8, 3))
    value = codec.value
    moved = VectorCodec(
        value.encode_matrix, value.decode_matrix, value.mean, value.widths, value.levels + 2**-10, "fit", 8
    )
    data = codec.to_bytes(codec.encode(*page_inputs(codec)))
    with pytest.raises(FormatError, match="another codec"):
        QuantizedPageCodec(codec.key, moved).from_bytes(data)


# Golden pages.


@pytest.mark.parametrize("name", GOLDEN_CODECS)
def test_golden_page_decodes(name):
    codec = GOLDEN_CODECS[name]()
    page = codec.from_bytes((GOLDEN / f"{name}.page").read_bytes())
    decoded = torch.cat([x.flatten() for x in codec.decode(page)]).double()
    stored = torch.frombuffer(bytearray((GOLDEN / f"{name}.f32").read_bytes()), dtype=torch.float32).double()
    if isinstance(codec, DensePageCodec):
        assert torch.equal(decoded, stored)
        assert torch.equal(decoded, torch.cat([x.flatten() for x in golden_inputs(name, codec)]).double())
    else:
        # Codes and scales are exact; the rotation back is a sum that processors order in their own way.
        assert (decoded - stored).abs().max() <= 2e-6 * stored.abs().max()


@pytest.mark.parametrize("name", GOLDEN_CODECS)
def test_golden_page_is_what_encode_gives(name):
    codec = GOLDEN_CODECS[name]()
    page = codec.from_bytes((GOLDEN / f"{name}.page").read_bytes())
    encoded = codec.encode(*golden_inputs(name, codec))
    for section in codec.sections:
        if section.endswith("scales"):
            # Rounded sums: two processors may differ by one unit in the last place of bf16.
            ours, theirs = (codec.section(x, section).view(torch.int16).int() for x in (encoded, page))
            assert (ours - theirs).abs().max() <= 1
        else:
            assert torch.equal(codec.section(encoded, section), codec.section(page, section))


def write_golden():
    GOLDEN.mkdir(exist_ok=True)
    for name, make in GOLDEN_CODECS.items():
        codec = make()
        page = codec.encode(*golden_inputs(name, codec))
        (GOLDEN / f"{name}.page").write_bytes(codec.to_bytes(page))
        decoded = torch.cat([x.float().flatten() for x in codec.decode(page)])
        (GOLDEN / f"{name}.f32").write_bytes(decoded.numpy().tobytes())


if __name__ == "__main__":
    write_golden()
