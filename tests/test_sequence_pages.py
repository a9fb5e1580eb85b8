"""Stored pages of the sequence codec: damage is refused by name, and what an earlier version stored decodes.

`tests/golden/sequence.page` is a page as an earlier version stored it; it must decode for ever. `python
tests/test_sequence_pages.py` writes it anew, which is right only where the format's version changes.
"""

import struct
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sequence_cases import EMBEDDED, HEADER, PAGE, SHAPES, decode, encode, flat, make_codec, make_pages, read

from hf_seqkv.codec.importance import LEVELS
from hf_seqkv.codec.rotation import hadamard_matrix
from hf_seqkv.codec.sequence import SequenceCodec
from hf_seqkv.codec.sequence_part import CLASSES, LADDER, Part
from hf_seqkv.codec.symbol_tables import ESCAPE, LIMIT, TOTAL, SymbolTables
from hf_seqkv.errors import FormatError

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def stored():
    codec, (embedded, layers) = make_codec(), make_pages(1)
    return codec, encode(codec, embedded, layers)[0][0]


def test_every_truncation_is_refused(stored):
    codec, page = stored
    for size in range(len(page)):
        with pytest.raises(FormatError, match="truncated"):
            codec._read(page[:size])
    with pytest.raises(FormatError, match="its header promises"):
        codec._read(page + b"\0")


@pytest.mark.parametrize("flip", [1, 128, 255])
def test_every_damaged_byte_is_refused(stored, flip):
    codec, page = stored
    for i in range(len(page)):
        with pytest.raises(FormatError):
            codec._read(page[:i] + bytes([page[i] ^ flip]) + page[i + 1 :])


@given(st.data())
@settings(max_examples=200)
def test_damage_under_a_right_checksum_is_refused_or_decodes(stored, data):
    """Who forges the checksum gets an error or tensors, never a crash."""
    codec, page = stored
    body = bytearray(page[HEADER:])
    for at in data.draw(st.lists(st.integers(0, len(body) - 1), min_size=1, max_size=3)):
        body[at] = data.draw(st.integers(0, 255))
    crc = zlib.crc32(bytes(body), zlib.crc32(page[: HEADER - 4]))
    try:
        decoded = decode(codec, [page[: HEADER - 4] + struct.pack("<I", crc) + bytes(body)], make_pages(1)[0])
    except FormatError:
        return
    assert [tuple(k.shape) for k, _ in decoded] == [(1, heads, PAGE, dim) for heads, dim, _ in SHAPES]


def test_what_it_is_not_is_named(stored):
    codec, page = stored
    with pytest.raises(FormatError, match=r"magic is b'PK.*SKVS"):
        codec._read(b"PK\3\4" + page[4:])
    with pytest.raises(FormatError, match=r"version 2.*reads version 3.*the hf_seqkv that wrote it"):
        codec._read(page[:4] + b"\2" + page[5:])


def test_another_step_or_codec_is_named(stored):
    codec, page = stored
    with pytest.raises(FormatError, match=r"another codec .*\(0, 8, 6\).*\(4, 8, 6\)"):
        codec.at(4)._read(page)
    with pytest.raises(FormatError, match=f"another codec .*{codec.fingerprint.hex()}"):
        make_codec(seed=1)._read(page)
    with pytest.raises(FormatError, match="another codec"):
        make_codec(predict=False)._read(page)


def test_one_bad_page_spoils_no_other(stored):
    codec, page = stored
    with pytest.raises(FormatError, match="checksum"):
        decode(codec, [page, page[:-1] + bytes([page[-1] ^ 1])], make_pages(2)[0])


# The golden page. Everything it is made of is exact in binary, and its symbols are written down, not computed.


def numbers(*shape, salt=0, span=65):
    """Integers around zero, the same on every machine."""
    index = torch.arange(torch.Size(shape).numel())
    return ((index * index * 7 + index * (13 + 2 * salt) + salt * salt) % span - span // 2).view(shape)


def golden_codec():
    frequencies = torch.zeros(CLASSES, ESCAPE + 1, dtype=torch.int32)
    for kind, row in enumerate(frequencies):
        limit, least = 3 + kind % 20, 2 if kind < 12 else 16
        row[LIMIT - limit : LIMIT + limit + 1] = least
        row[LIMIT], row[ESCAPE] = least + TOTAL // 2, least
        row[LIMIT + (kind >= 12)] += TOTAL - row.sum()
    parts = []
    for index, width in enumerate((4, 16, 16, 4)):
        sizes = (120 + numbers(len(LADDER), PAGE, width, salt=index) // 4).to(torch.uint8)
        sizes[..., 5:] = 90 + index  # mostly zero
        refined = (120 + numbers(len(LADDER), LEVELS, width, salt=index) // 8).to(torch.uint8)
        inputs = ((EMBEDDED, 0, 0, 0, 0, 0), (EMBEDDED, 0, 0, 0, 0, 4), (EMBEDDED, 4, 16, 0, 0, 0), (0, 4, 0, 0, 0, 16))
        predictor = numbers(sum(inputs[index]), width, salt=index) / 256
        bias, importance = numbers(width, salt=9) / 8, torch.zeros(width)
        parts.append(Part(bias, inputs[index], predictor, hadamard_matrix(width), sizes, refined, importance, share=5))
    along = torch.block_diag(*[hadamard_matrix(4)] * 2)
    return SequenceCodec(parts, along, SymbolTables(frequencies.to(torch.uint16)), 0.125, -5)


def golden_symbols(codec):
    """Levels, coarse and fine symbols of one page, among them some that tables know as escapes."""
    sizes = [part.sizes.shape[2] for part in codec.parts]
    levels = numbers(1, len(sizes), PAGE, salt=3, span=17).clamp(0, LEVELS)
    loud = [
        (numbers(1, PAGE * coder.loud, salt=n, span=61) / 8).int() for n, coder in zip(sizes, codec.coders, strict=True)
    ]
    quiet = (numbers(1, len(codec.quiet.flags), PAGE, span=37) / 17).int()
    quiet[:, ::2] = 0
    loud[1][0, :3] = torch.tensor([40, -5000, 2**30])
    quiet[0, 1, :2] = torch.tensor([-70, 3])
    fine = [(numbers(int((levels[0, i] > 0).sum()), width, salt=i, span=41) / 5).int() for i, width in enumerate(sizes)]
    return levels, loud, quiet, fine


def golden_embedded():
    return numbers(1, PAGE, EMBEDDED, salt=5) / 16


def test_golden_page_decodes():
    codec, data = golden_codec(), (GOLDEN / "sequence.page").read_bytes()
    assert [(coder.loud, len(coder.flags)) for coder in codec.coders] == [(4, 0), (5, 11), (5, 11), (4, 0)]
    levels, loud, quiet, fine = golden_symbols(codec)
    expected = zip(levels.unbind(1), loud, quiet.split([0, 11, 11, 0], 1), fine, strict=True)
    for found, part in zip(read(codec, [data]), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, part, strict=True))
    decoded = flat(codec.decode([data], golden_embedded(), (1, 2))).double()
    stored = torch.frombuffer(bytearray((GOLDEN / "sequence.f32").read_bytes()), dtype=torch.float32).double()
    # Symbols are exact; what they are added to is sums that processors order in their own way.
    assert (decoded.flatten() - stored).abs().max() <= 2e-6 * stored.abs().max()


def test_golden_page_is_what_write_gives():
    codec = golden_codec()
    assert codec.write(*golden_symbols(codec)) == [(GOLDEN / "sequence.page").read_bytes()]


def write_golden():
    codec = golden_codec()
    (page,) = codec.write(*golden_symbols(codec))
    (GOLDEN / "sequence.page").write_bytes(page)
    decoded = flat(codec.decode([page], golden_embedded(), (1, 2)))
    (GOLDEN / "sequence.f32").write_bytes(decoded.flatten().numpy().tobytes())


if __name__ == "__main__":
    write_golden()
