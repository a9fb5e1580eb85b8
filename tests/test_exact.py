"""The exact codec: pages come back byte by byte, whatever is in them, or not at all.

`golden/exact.safetensors` holds tables, pages and their stored form as an earlier version wrote them; they must decode
for ever, on every machine. `python tests/test_exact.py` writes it anew.
"""

import functools
from pathlib import Path

import pytest
import torch
from exact_cases import EMBEDDED, Layer, alone, make
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hf_seqkv.calibration.exact_fit import Predictors
from hf_seqkv.codec.exact import ExactCodec
from hf_seqkv.codec.exact_cells import TOTAL, cells, interval_tables, normal_table
from hf_seqkv.codec.exact_tables import ExactTables
from hf_seqkv.codec.surroundings import Surroundings
from hf_seqkv.errors import FormatError

GOLDEN = Path(__file__).parent / "golden" / "exact.safetensors"


@functools.cache
def predicted():
    """A case, its codec, and its pages stored."""
    case = make()
    codec = case.codec(Predictors())
    return case, codec, codec.encode(case.payloads(), case.around())


def assert_back(codec, payloads, around):
    stored = codec.encode(payloads, around)
    for found, meant in zip(codec.decode(stored, around), payloads, strict=True):
        assert torch.equal(found, meant)
    return stored


LAYERS = st.builds(
    Layer,
    heads=st.integers(1, 3),
    key_dim=st.sampled_from([2, 4, 8]),
    value_dim=st.sampled_from([1, 4, 6]),
    half=st.integers(0, 1),
    interleaved=st.booleans(),
)


@settings(max_examples=15, deadline=None)
@given(
    layers=st.lists(LAYERS, min_size=1, max_size=4),
    scale_bits=st.sampled_from([8, 16]),
    widths=st.lists(st.integers(1, 8), min_size=1, max_size=3).map(tuple),
    size=st.sampled_from([8, 16, 24]),
    predicts=st.booleans(),
)
def test_round_trip(layers, scale_bits, widths, size, predicts):
    layers = tuple(Layer(x.heads, x.key_dim, x.value_dim, x.half, x.interleaved, scale_bits) for x in layers)
    case = make(layers, count=5, size=size, widths=widths)
    assert_back(case.codec(Predictors() if predicts else None), case.payloads(), case.around())


@pytest.mark.parametrize("scale_bits", [8, 16])
@pytest.mark.parametrize("predicts", [True, False])
def test_any_payload_comes_back(scale_bits, predicts):
    """Random codes and scales, all that 8 bits can say among them."""
    case = make((Layer(scale_bits=scale_bits), Layer(scale_bits=scale_bits)))
    codec = case.codec(Predictors() if predicts else None)
    generator = torch.Generator().manual_seed(0)
    payloads = [torch.randint(0, 256, x.shape, dtype=torch.uint8, generator=generator) for x in case.payloads()]
    for page, x in zip(case.pages, payloads, strict=True):
        for name, (at, length) in page.sections.items():
            following = [start for start, _ in page.sections.values() if start > at]
            x[:, at + length : min(following, default=page.page_bytes)] = 0
            if name == "key_scales":
                x[0, at : at + length] = 255
    stored = assert_back(codec, payloads, case.around())
    assert all(len(x) <= sum(p.page_bytes for p in case.pages) + 48 for x in stored)


def test_a_page_with_something_in_its_padding_is_kept_as_it_is():
    case, codec, _ = predicted()
    payloads = [torch.full_like(x, 7) for x in case.payloads()]
    stored = assert_back(codec, payloads, case.around())
    assert {len(x) for x in stored} == {sum(p.page_bytes for p in case.pages) + 40}


def test_held_tokens_come_back():
    case, codec, plain = predicted()
    payloads = case.payloads()
    where = torch.zeros(len(payloads[0]), case.pages[0].page_size, dtype=torch.bool)
    where[:, 3] = where[2, 8:] = True
    for page, x in zip(case.pages, payloads, strict=True):
        page.vacate(x, where)
    stored = assert_back(codec, payloads, case.around())
    assert all(a != b for a, b in zip(stored, plain, strict=True))


def test_pages_do_not_depend_on_their_neighbours_or_threads():
    case, codec, stored = predicted()
    around = case.around()
    for n in (0, 7):
        assert codec.encode([x[n : n + 1] for x in case.payloads()], around.part(slice(n, n + 1))) == [stored[n]]
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert codec.encode(case.payloads(), around) == stored
            assert torch.equal(codec.decode(stored, around)[1], case.payloads()[1])
    finally:
        torch.set_num_threads(before)


def test_no_pages():
    case, codec, _ = predicted()
    empty = case.around().part(slice(0, 0))
    assert codec.encode([x[:0] for x in case.payloads()], empty) == []
    assert [len(x) for x in codec.decode([], empty)] == [0, 0]


def test_pages_that_nothing_predicts_need_no_surroundings():
    case = make()
    assert_back(case.codec(), case.payloads(), Surroundings(None, [], [], [], [torch.empty(0)] * 2))


def test_keys_that_rope_does_not_explain_come_back():
    case, codec, _ = predicted()
    around = case.around()
    around.starts[0].data = torch.zeros_like(around.starts[0])
    assert_back(codec, case.payloads(), around)


def test_prediction_takes_fewer_bytes():
    case, _, stored = predicted()
    alone = case.codec().encode(case.payloads(), case.around())
    assert sum(map(len, stored)) < 0.8 * sum(map(len, alone))


# -- what is refused ---------------------------------------------------------------------------------------------


def test_every_flipped_byte_is_refused():
    case, codec, stored = predicted()
    around = case.around().part(slice(0, 1))
    for at in range(len(stored[0])):
        damaged = bytearray(stored[0])
        damaged[at] ^= 1 << at % 8
        with pytest.raises(FormatError):
            codec.decode([bytes(damaged)], around)


def test_every_truncation_is_refused():
    case, codec, stored = predicted()
    around = case.around().part(slice(0, 1))
    for size in range(len(stored[0])):
        with pytest.raises(FormatError):
            codec.decode([stored[0][:size]], around)


@pytest.mark.parametrize("what", ["embedded", "starts", "relative", "means"])
def test_other_surroundings_are_refused(what):
    case, codec, stored = predicted()
    around = case.around()
    old = getattr(around, what)
    new = old.flip(0) if what == "embedded" else [old[0] + 0.5, *old[1:]]
    with pytest.raises(FormatError, match=r"other tokens, positions or key means|other surroundings"):
        codec.decode(stored, Surroundings(**vars(around) | {what: new}))


def test_other_codecs_are_refused():
    case, codec, stored = predicted()
    other = case.codec(Predictors(components=False))
    assert len({codec.fingerprint, other.fingerprint, case.codec().fingerprint}) == 3
    for reader in (other, case.codec()):
        with pytest.raises(FormatError, match="another codec"):
            reader.decode(stored, case.around())


def test_tables_that_do_not_fit_are_refused():
    case, codec, _ = predicted()
    tensors = codec.tables.tensors()
    with pytest.raises(FormatError, match="missing or unknown"):
        ExactTables.from_tensors({name: x for name, x in tensors.items() if name != "1.value.bias"})
    bad = {
        "0.key.gain": -tensors["0.key.gain"],
        "0.value.bias": tensors["0.value.bias"] / 0,
        "1.key.weights": tensors["1.key.weights"][1:],
        "1.key.scale": 0 * tensors["1.key.scale"],
    }
    for name, x in bad.items():
        with pytest.raises(
            FormatError, match="a center, bias or scale" if "bias" in name else name.replace(".", r"\.")
        ):
            ExactCodec(case.pages, case.parts, ExactTables.from_tensors(tensors | {name: x}))
    heavy = torch.full_like(tensors["1.value.weights"], 30000)
    with pytest.raises(FormatError, match="sum to"):
        ExactCodec(case.pages, case.parts, ExactTables.from_tensors(tensors | {"1.value.weights": heavy}))
    with pytest.raises(FormatError, match="layers"):
        ExactCodec(case.pages[:1], case.parts[:2], codec.tables)
    with pytest.raises(FormatError, match="parts of a sequence codec"):
        ExactCodec(case.pages, None, codec.tables)
    with pytest.raises(ValueError, match="embedded is None"):
        codec.encode(case.payloads(), Surroundings(None, *list(vars(case.around()).values())[1:]))


# -- tables and golden bytes ---------------------------------------------------------------------------------------


def test_normal_table():
    found = torch.from_numpy(normal_table())
    at = (torch.arange(2049, dtype=torch.float64) - 1024) / 128
    assert (found - 65536 * torch.special.ndtr(at)).abs().max() < 1
    assert (found.diff() >= 0).all()
    assert (interval_tables()[:, -1] == [TOTAL - (1 << width) for width in range(9)]).all()


def test_cells_are_sorted():
    case = make()
    levels = case.pages[0].key.levels[0].numpy()
    for width, edges in enumerate(cells(levels, range(9))):
        assert (edges[1 : (1 << width) + 1] > edges[: 1 << width]).all()


def golden_codec(tensors):
    """What the golden pages were written by."""
    layers = (Layer(), Layer(heads=1, interleaved=True, scale_bits=16))
    tables = ExactTables.from_tensors({n.removeprefix("t."): x for n, x in tensors.items() if n.startswith("t.")})
    parts = [alone(tensors[f"predictor.{i}"][:EMBEDDED]) for i in range(2 * len(layers))]
    around = Surroundings(
        tensors["embedded"],
        *([tensors[f"{name}.{i}"] for i in range(2)] for name in ("starts", "relative")),
        [layer.interleaved for layer in layers],
        [tensors[f"means.{i}"] for i in range(2)],
    )
    return ExactCodec([layer.page(16) for layer in layers], parts, tables), around


def test_golden_pages():
    tensors = load_file(GOLDEN)
    codec, around = golden_codec(tensors)
    payloads = [tensors[f"payloads.{i}"] for i in range(2)]
    stored = [tensors[f"stored.{n}"].numpy().tobytes() for n in range(2)]
    for found, meant in zip(codec.decode(stored, around), payloads, strict=True):
        assert torch.equal(found, meant)
    assert codec.encode(payloads, around) == stored


def write_golden():
    case = make((Layer(), Layer(heads=1, interleaved=True, scale_bits=16)))
    some = slice(0, 2)
    tensors = {f"t.{name}": x for name, x in case.fit().tensors().items()}
    tensors |= {f"predictor.{i}": part.embedding for i, part in enumerate(case.parts)}
    around = case.around().part(some)
    tensors["embedded"] = around.embedded
    for name in ("starts", "relative", "means"):
        tensors |= {f"{name}.{i}": x for i, x in enumerate(getattr(around, name))}
    payloads = [x[some] for x in case.payloads()]
    tensors |= {f"payloads.{i}": x for i, x in enumerate(payloads)}
    codec, _ = golden_codec(tensors)
    for n, data in enumerate(codec.encode(payloads, around)):
        tensors[f"stored.{n}"] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    save_file({name: x.contiguous() for name, x in tensors.items()}, GOLDEN)


if __name__ == "__main__":
    write_golden()
