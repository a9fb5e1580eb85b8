"""Shingles: the hash is pinned, a passage is found wherever it stands, and unlike texts share nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_seqkv.calibration.overlap import overlap, shingles

IDS = torch.randint(50_000, (20_000,), generator=torch.Generator().manual_seed(5)).tolist()
OTHER = torch.randint(50_000, (20_000,), generator=torch.Generator().manual_seed(6)).tolist()


def spelled_out(ids: list[int]) -> list[int]:
    """The definition in whole numbers."""
    found = set()
    for at in range(len(ids) - 15):
        h = sum((ids[at + i] + 1) * 0x9E3779B97F4A7C15 ** (15 - i) for i in range(16)) % 2**64
        h ^= h >> 32
        if h % 32 == 0:
            found.add(h - 2**64 if h >= 2**63 else h)
    return sorted(found)


@given(st.lists(st.integers(0, 2**31), max_size=200))
def test_definition(ids):
    made = shingles(ids)
    assert made.dtype == torch.int64
    assert made.tolist() == spelled_out(ids)


def test_pinned():
    """Calibrations store these numbers."""
    assert shingles([i * i % 1009 for i in range(200)]).tolist() == [
        -6658094505238831968,
        -396549001746715008,
        130761973964035072,
        2765890628184958592,
    ]


@pytest.mark.parametrize("ids", [IDS, [i * i % 131 for i in range(131)]], ids=["random", "few symbols"])
def test_one_in_32_is_kept(ids):
    runs = len({tuple(ids[i : i + 16]) for i in range(len(ids) - 15)})
    assert abs(len(shingles(ids)) - runs / 32) < 4 * (runs / 32) ** 0.5


def test_a_passage_is_found_wherever_it_stands():
    known = shingles(IDS)
    assert overlap(known, shingles(IDS[4321:6789])) == 1
    moved = OTHER[:1000] + IDS[3:2003] + OTHER[1000:2000]
    assert overlap(known, shingles(moved)) == pytest.approx(0.5, abs=0.12)
    assert overlap(shingles(moved), known) == pytest.approx(0.1, abs=0.03)


def test_unlike_texts_share_nothing():
    assert overlap(shingles(IDS), shingles(OTHER)) == 0
    assert overlap(shingles(IDS), shingles([i + 1 for i in IDS])) == 0
    assert overlap(shingles(IDS), shingles(IDS[::-1])) == 0


@pytest.mark.parametrize("ids", [[], [1], list(range(15))])
def test_too_short_for_a_shingle(ids):
    assert shingles(ids).tolist() == []
    assert overlap(shingles(IDS), shingles(ids)) == 0
    assert overlap(shingles(ids), shingles(IDS)) == 0
