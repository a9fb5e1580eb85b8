"""The constant part of the keys: RoPE and its inverse, rows of pages, and the two ways to score it."""

import pytest
import torch

from hf_seqkv.codec.center import Center, expand_rows, page_starts, relative_table, rotate

PAGE = 16
HALF = 2**-11  # a rounding to fp16 of cosines and sines, and a little


def rope_rows(positions, half, attention_scaling=1.0, base=100.0):
    """`[..., 2 * half]` rows `[cos | sin]` of positions, computed in fp64."""
    frequency = base ** -(torch.arange(half, dtype=torch.float64) / max(half, 1))
    angle = torch.as_tensor(positions, dtype=torch.float64)[..., None] * frequency
    return (torch.cat([angle.cos(), angle.sin()], -1) * attention_scaling).float()


def make_center(interleaved=False, half=4, dim=8, scaling=1.0, firsts=((0, 16, 32), (5, 21, 1000)), heads=2):
    rows = rope_rows(torch.tensor(firsts)[..., None] + torch.arange(PAGE), half, scaling)
    relative = relative_table(rows[0, 0])
    mean, starts = torch.randn(len(firsts), heads, dim), page_starts(rows, relative)
    return Center(mean, starts, relative, interleaved), expand_rows(starts, relative)


shapes = pytest.mark.parametrize(
    ("half", "dim"), [(4, 8), (3, 10), (1, 8), (0, 8)], ids=["full", "partial", "one pair", "no rope"]
)
pairing = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
scalings = pytest.mark.parametrize("scaling", [1.0, 1.3], ids=["plain", "scaled"])


@shapes
@pairing
def test_rotate_is_rope_by_its_definition(half, dim, interleaved):
    x, rows = torch.randn(5, dim), rope_rows(torch.arange(5), half)
    expected = x.clone()
    for t in range(5):
        for i in range(half):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
            cos, sin = rows[t, i], rows[t, half + i]
            expected[t, a] = x[t, a] * cos - x[t, b] * sin
            expected[t, b] = x[t, b] * cos + x[t, a] * sin
    assert torch.allclose(rotate(x, rows, interleaved), expected, atol=1e-6)


@shapes
@pairing
@scalings
def test_inverse_undoes_rotate(half, dim, interleaved, scaling):
    x, rows = torch.randn(2, 3, PAGE, dim), rope_rows(torch.arange(PAGE), half, scaling)
    turned = rotate(x, rows, interleaved)
    assert turned.shape == x.shape
    assert torch.allclose(rotate(turned, rows, interleaved, inverse=True), x, atol=1e-5)
    assert torch.equal(turned[..., 2 * half :], x[..., 2 * half :])


@pairing
def test_rows_of_zeros_give_zeros_both_ways(interleaved):
    x, rows = torch.randn(3, 10), torch.zeros(3, 8)
    for inverse in (False, True):
        turned = rotate(x, rows, interleaved, inverse)
        assert not turned[:, :8].any()
        assert torch.equal(turned[:, 8:], x[:, 8:])


@scalings
@pytest.mark.parametrize("first", [0, 7, 4096])
def test_relative_table_does_not_depend_on_the_page(first, scaling):
    found = relative_table(rope_rows(first + torch.arange(PAGE), 4, scaling))
    assert torch.allclose(found, rope_rows(torch.arange(PAGE), 4), atol=HALF)
    assert torch.equal(found, found.half().float())


@scalings
def test_starts_and_table_give_the_rows_back(scaling):
    rows = rope_rows(torch.tensor([[3], [19], [1000]]) + torch.arange(PAGE), 4, scaling)
    relative = relative_table(rope_rows(torch.arange(PAGE), 4, scaling))
    starts = page_starts(rows, relative)
    assert torch.equal(starts, rows[:, 0])
    assert torch.allclose(expand_rows(starts, relative), rows, atol=2 * HALF * scaling)


def changed_frequencies():
    rows = rope_rows(torch.arange(PAGE), 4)
    rows[PAGE // 2 :] = rope_rows(torch.arange(PAGE // 2, PAGE), 4, base=50.0)
    return rows


def gap_in_positions():
    return rope_rows(torch.tensor([*range(PAGE - 1), PAGE]), 4)


def changed_scaling():
    rows = rope_rows(torch.arange(PAGE), 4)
    rows[-1] *= 1.1
    return rows


@pytest.mark.parametrize("make", [changed_frequencies, gap_in_positions, changed_scaling])
def test_page_that_does_not_fit_starts_from_zeros(make):
    relative = relative_table(rope_rows(torch.arange(PAGE), 4))
    fitting = rope_rows(PAGE + torch.arange(PAGE), 4)
    starts = page_starts(torch.stack([fitting, make()]), relative)
    assert torch.equal(starts, torch.stack([fitting[0], torch.zeros(8)]))


def test_no_rope_has_empty_rows():
    starts = page_starts(torch.zeros(2, 3, PAGE, 0), torch.zeros(PAGE, 0))
    assert starts.shape == (2, 3, 0)
    assert expand_rows(starts, torch.zeros(PAGE, 0)).shape == (2, 3, PAGE, 0)


@shapes
@pairing
@scalings
def test_keys_are_the_mean_turned_to_every_position(half, dim, interleaved, scaling):
    center, rows = make_center(interleaved, half, dim, scaling)
    keys = center.keys(1, 3)
    assert keys.shape == (2, 2, 2, PAGE, dim)
    for row in range(2):
        for page in range(2):
            for head in range(2):
                expected = rotate(center.mean[row, head].expand(PAGE, dim), rows[row, 1 + page], interleaved)
                assert torch.allclose(keys[row, page, head], expected, atol=1e-5)


@shapes
@pairing
@scalings
def test_coefficients_score_as_the_keys_do(half, dim, interleaved, scaling):
    center, rows = make_center(interleaved, half, dim, scaling)
    query = torch.randn(2, 2, 5, dim)
    coefficients = center.coefficients(query)
    assert coefficients.shape == (2, 2, 5, 2 * half + 1)
    # [B, H, R, N, P]
    scores = (coefficients[..., None, None, :-1] * rows[:, None, None]).sum(-1) + coefficients[..., None, -1:]
    expected = torch.einsum("bhrd,bnhpd->bhrnp", query, center.keys(0, 3))
    assert torch.allclose(scores, expected, atol=2e-5)


@pairing
def test_page_without_a_start_keeps_only_what_rope_leaves_alone(interleaved):
    center, _ = make_center(interleaved, half=3, dim=10)
    center.starts[1, 2] = 0
    keys = center.keys(2, 3)[1, 0]
    assert not keys[..., :6].any()
    assert torch.equal(keys[..., 6:], center.mean[1, :, None, 6:].expand(2, PAGE, 4))
