"""The sequence codec: what is written is what the encoder held, at the tables' price."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sequence_cases import (
    BASE,
    HEADER,
    HEADS,
    PAGE,
    both,
    decode,
    encode,
    flat,
    make_codec,
    make_pages,
    read,
    tables,
)

from hf_seqkv.codec.importance import LEVELS, features
from hf_seqkv.codec.sequence_part import (
    CLASSES,
    LADDER,
    LEVEL_CLASSES,
    REFINED,
    SHIFT,
    SHIFT_CLASS,
    SHIFTS,
    SIZES,
    best_shifts,
    classes_at,
    dct,
    shifted,
    size_codes,
)
from hf_seqkv.codec.sequence_quiet import with_flags
from hf_seqkv.codec.symbol_tables import LIMIT

# What comes back.


@both
@pytest.mark.parametrize("step", [-13, 0, 6])
def test_the_decoder_holds_what_the_encoder_held(predict, step):
    codec, (embedded, layers) = make_codec(predict, step), make_pages()
    pages, held, _ = encode(codec, embedded, layers)
    decoded = decode(codec, pages, embedded)
    assert [tuple(x.shape for x in pair) for pair in decoded] == [tuple(x.shape for x in pair) for pair in layers]
    for pair, expected in zip(decoded, held, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(pair, expected, strict=True))


@settings(max_examples=25)
@given(st.integers(0, 1000), st.integers(1, 4), st.integers(-30, 30), st.booleans(), st.floats(0, 8), st.floats(0, 1))
def test_any_numbers_come_back_as_held(seed, count, step, predict, spread, quiet):
    codec, (embedded, layers) = make_codec(predict, step, seed % 5 - 1.0, seed, quiet), make_pages(count, seed)
    layers = [tuple(x * 10 ** (spread * torch.rand_like(x) - spread / 2) for x in pair) for pair in layers]
    pages, held, encoder = encode(codec, embedded, layers)
    for index, found in enumerate(read(codec, pages)):
        assert all(torch.equal(a, b) for a, b in zip(found, encoder.coded(index), strict=True))
    assert torch.equal(flat(decode(codec, pages, embedded)), flat(held))


@both
def test_pages_do_not_depend_on_threads(predict):
    codec, (embedded, layers) = make_codec(predict), make_pages(5)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(encode(codec, embedded, layers)[0])
            assert torch.equal(flat(decode(codec, found[0], embedded)), flat(decode(codec, found[-1], embedded)))
    finally:
        torch.set_num_threads(before)
    assert found[1:] == found[:-1]


@both
def test_finer_steps_err_less_and_take_more(predict):
    embedded, layers = make_pages()
    errors, sizes = [], []
    for step in range(-28, 13, 4):
        pages, held, _ = encode(make_codec(predict, step), embedded, layers)
        errors.append((flat(held) - flat(layers)).square().mean().item())
        sizes.append(sum(map(len, pages)))
    assert all(a < b for a, b in itertools.pairwise(errors))
    assert all(a > b for a, b in itertools.pairwise(sizes[:9]))  # to step 4: coarser than values, classes are wrong
    assert errors[4] / errors[0] == pytest.approx(4.0**4, rel=0.3)  # four octaves of step


def coefficients(codec, held, layers):
    """Errors of all parts in their coefficients, before the DCT and after: `[N, P, W]` each."""
    found = []
    for index, part in enumerate(codec.parts):
        error = (held[index // 2][index % 2] - layers[index // 2][index % 2]).transpose(1, 2).flatten(2)
        found.append(error @ part.analysis)
    return found, [dct(PAGE) @ x for x in found]


@both
def test_outliers_are_not_clipped(predict):
    """A token a hundred thousand times the size of all others is coded as finely as they are."""
    codec, (embedded, layers) = make_codec(predict, refine=-9.0), make_pages()
    for k, v in layers:
        k[1, :, 5] *= 1e5
        v[1, :, 5] *= 1e5
    pages, held, _ = encode(codec, embedded, layers)
    for error in coefficients(codec, held, layers)[1]:
        assert error.abs().max() <= BASE / 2 + 0.05  # half a step, and what fp32 keeps of such numbers
    assert torch.equal(flat(decode(codec, pages, embedded)), flat(held))


def test_refined_tokens_err_less():
    embedded, layers = make_pages(8)
    codec = make_codec(predict=False)
    _, held, encoder = encode(codec, embedded, layers)
    levels, errors = torch.cat([encoder.coded(i)[0].flatten() for i in range(len(codec.parts))]), []
    by_token = torch.cat([x.square().mean(-1).flatten() for x in coefficients(codec, held, layers)[0]])
    for level in range(LEVELS + 1):
        assert (levels == level).sum() > 10
        errors.append(by_token[levels == level].mean().item())
    for coarser, finer in itertools.pairwise(errors):
        assert 3 < coarser / finer < 6  # half the step for each level
    expected = features(*(x.transpose(1, 2).flatten(0, 1) for x in layers[1]), torch.arange(8 * PAGE))
    expected = (expected @ codec.parts[2].importance).round().clamp(0, LEVELS)
    assert torch.equal(encoder.coded(2)[0].flatten(), expected.long())


def test_another_prediction_shifts_what_is_decoded_and_loses_nothing():
    """Arithmetic that differs between machines may not lose a stream: symbols depend on integers alone."""
    codec, (embedded, layers) = make_codec(), make_pages()
    pages, held, _ = encode(codec, embedded, layers)
    nudge = 1e-4 * torch.randn_like(embedded)
    decoded = decode(codec, pages, embedded + nudge)
    shift = (nudge @ codec.parts[0].predictor).unflatten(-1, (HEADS[0], -1)).transpose(1, 2)
    torch.testing.assert_close(decoded[0][0] - held[0][0], shift, atol=1e-5, rtol=0)
    assert (flat(decoded) - flat(held)).abs().max() < 0.01
    assert flat(decode(codec, pages, torch.randn_like(embedded))).isfinite().all()


def test_pages_are_independent():
    codec, (embedded, layers) = make_codec(), make_pages(4)
    pages, _, _ = encode(codec, embedded, layers)
    whole, some = flat(decode(codec, pages, embedded)), [2, 0]
    part = flat(decode(codec, [pages[i] for i in some], embedded[some]))
    torch.testing.assert_close(part, whole[some], atol=1e-5, rtol=1e-5)


def test_the_same_bytes_every_time():
    codec, (embedded, layers) = make_codec(), make_pages()
    assert encode(codec, embedded, layers)[0] == encode(make_codec(), embedded, layers)[0]
    assert codec.at(-3).step == -3
    assert codec.at(-3).at(0).fingerprint == codec.fingerprint


# Rate.


@both
def test_bytes_are_what_tables_promise(predict):
    codec, (embedded, layers) = make_codec(predict, step=6), make_pages(2)
    pages, _, encoder = encode(codec, embedded, layers)
    bits = with_flags(codec.tables).bits().double()

    def price(classes, symbols):
        return bits[classes.long(), symbols.long() + LIMIT].sum().item()

    coded = [encoder.coded(i) for i in range(len(codec.parts))]
    pairs = zip(coded, codec.coders, strict=True)
    chosen = torch.stack([best_shifts(x[1], coder.kinds[SHIFTS], bits.float()) for x, coder in pairs], 1)
    for n, page in enumerate(pages):
        expected = price(torch.full((len(codec.parts),), SHIFT_CLASS), chosen[n])
        for i, (coder, (levels, loud, quiet, fine)) in enumerate(zip(codec.coders, coded, strict=True)):
            refined, levels = (levels[:n] > 0).sum(), levels[n]
            rows = fine[refined : refined + (levels > 0).sum()]
            expected += price(torch.full_like(levels, LEVEL_CLASSES + coder.part.share), levels)
            active = quiet[n].any(-1)
            expected += price(coder.kinds[chosen[n, i] + SHIFTS], loud[n])
            expected += price(coder.flags + CLASSES, active)
            expected += price(coder.quiet_kinds[chosen[n, i] + SHIFTS][active], quiet[n, active])
            expected += price(coder.fine.classes[levels[levels > 0] - 1], rows)
        streams = HEADER + 3 * (4 + 4)  # each with its count of words and one lane's state
        assert 8 * (len(page) - streams) == pytest.approx(expected, rel=0.02)


def test_shifts_are_the_cheapest():
    """Of every page and part, against trying all; pages that are louder than expected move up."""
    bits = tables().bits()
    classes = (torch.arange(60) % SIZES).byte()
    deviation = 2.0 ** ((classes - SIZES // 3) / 4)
    symbols = torch.stack([(scale * deviation * torch.randn(60)).round() for scale in (0.2, 1, 5)]).clamp(-LIMIT, LIMIT)
    found = best_shifts(symbols.int(), classes, bits)
    for row, best in zip(symbols.long(), found.tolist(), strict=True):
        costs = {}
        for shift in range(-SHIFTS, SHIFTS + 1):
            moved = (classes.long() + SHIFT * shift).clamp(0, SIZES - 1)
            assert torch.equal(shifted(classes)[shift + SHIFTS].long(), moved)
            costs[shift] = bits[moved, row + LIMIT].double().sum().item()
        assert costs[best] == pytest.approx(min(costs.values()), rel=1e-5)
    assert found[0] < found[1] < found[2]


# Steps.


@given(st.tuples(*[st.integers(0, 255)] * 3))
def test_sizes_are_met_at_the_ladders_steps(codes):
    for step, code in zip(LADDER, codes, strict=True):
        found = classes_at(torch.tensor(codes, dtype=torch.uint8)[:, None], step).item()
        assert found == min(max(code - 128 - step + SIZES // 3, 0), SIZES - 1)


@given(st.tuples(*[st.integers(100, 150)] * 3), st.integers(-12, 12))
def test_sizes_lie_on_a_line_between(codes, step):
    """Exactly, as integers: writer and reader must agree on classes."""
    low, middle, high = codes
    a, b, left, right = (low, middle, LADDER[0], LADDER[1]) if step < 0 else (middle, high, LADDER[1], LADDER[2])
    at = a + (b - a) * (step - left) // (right - left)
    found = classes_at(torch.tensor(codes, dtype=torch.uint8)[:, None], step).item()
    assert found == min(max(at - 128 - step + SIZES // 3, 0), SIZES - 1)


def test_size_codes_count_quarter_octaves():
    deviation = torch.tensor([1.0, 2.0, 2**0.25, 0.5, 0.0, 1e30])
    assert size_codes(deviation, 1.0).tolist() == [128, 132, 129, 124, 0, 255]
    assert classes_at(size_codes(deviation, 1.0).expand(3, -1), 0).max() < REFINED
