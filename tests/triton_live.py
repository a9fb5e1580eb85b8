"""The Triton kernels with numbers of rows in a tensor, as a recorded step has them: `test_triton.py` runs this."""

import pytest
import torch
import triton_parity
from kernel_cases import build
from test_numbers import live
from triton_parity import GATHERED, attend, case, error, expanding

from hf_seqkv.kernels import reference

interpreter = triton_parity.interpreter  # a fixture of every test here, too

LIVE = {
    "batch of 3": case(counts=(4, 0, 2), pads=(0, 50, 7), half=32),
    "window and offset": case(window=150, offset=37, steps=2, half=16, counts=(5, 2)),
    "many pages": case(counts=(70, 3), pads=(0, 9), heads=1, groups=1, dim=16, value_dim=16),
    "first sinks do not count": case(begin=2, softcap=3.0),
    "nothing": case(counts=(0, 0), recent=1, sinks=0, pads=(0, 0)),
}


@pytest.mark.parametrize("chosen", LIVE.values(), ids=LIVE)
def test_live_numbers(chosen):
    """What the kernels read when they run decides, whatever lists say there can be: to the bit."""
    query, view, mask, scoring = build(chosen)
    with expanding(False):
        assert torch.equal(attend(query, live(view), mask, scoring), attend(query, view, mask, scoring))


def test_live_numbers_with_a_side_table():
    query, view, mask, scoring = build(case(side=5, half=32))
    with expanding(False):
        out = attend(query, live(view), mask, scoring)
    assert error(out, reference.attend_codes(query, view, mask, scoring)) < GATHERED
