"""What our layers tell a model of themselves, and hand to it, is what upstream's do: models rely on it in many ways."""

import pytest
import torch
from models import LOSSLESS, tiny
from transformers import DynamicCache

from hf_seqkv import SeqKVCache

STEPS = (30, 1, 1, 5, 17, 1, 9, 40, 1)  # a window of 24 begins to slide in the prefill, or later


@pytest.mark.parametrize("first", [30, 11, 24, 23])
@pytest.mark.parametrize("recorded", [False, True], ids=["plain", "recorded"])
@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_sizes_and_tokens(name, recorded, first):
    """Sliding layers hold more for a rollback, but show their window alone, so that any mask slides."""
    config = tiny(name).config
    ours, theirs = SeqKVCache(config=config, **LOSSLESS), DynamicCache(config=config)
    if recorded:
        ours.activate_past_recording(), theirs.activate_past_recording()
    for count in (first, *STEPS[1:]):
        mine, other = ours.layers[0], theirs.layers[0]
        assert mine.get_mask_sizes(count) == other.get_mask_sizes(count)
        tokens = torch.randn(2, 2, 2, count, 16)
        for index in range(3):
            for found, expected in zip(ours.update(*tokens, index), theirs.update(*tokens, index), strict=True):
                assert found.shape == expected.shape
                assert torch.equal(found + 0, expected)
        assert mine.get_seq_length() == other.get_seq_length()
        if recorded:
            ours.crop(0), theirs.crop(0)
