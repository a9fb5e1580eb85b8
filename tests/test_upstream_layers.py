"""What our layers tell a model of themselves, and hand to it, is what upstream's do: models rely on it in many ways."""

import pytest
import torch
from models import LOSSLESS, tiny
from transformers import DynamicCache

from hf_seqkv import SeqKVCache
from hf_seqkv.integration.capture import NOTHING, Listener, Noted
from hf_seqkv.integration.handle import dense

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
                assert torch.equal(dense(found), expected)
        assert mine.get_seq_length() == other.get_seq_length()
        if recorded:
            ours.crop(0), theirs.crop(0)


def causal(pads: list[int], held: int, new: int) -> torch.Tensor:
    """`[B, 1, new, held + new]`, True where a token is seen."""
    slots, here = torch.arange(held + new), torch.arange(held, held + new)[:, None]
    return torch.stack([(slots <= here) & (slots >= pad) for pad in pads])[:, None]


@pytest.mark.parametrize(
    ("pads", "held", "new"),
    [([0, 3], 0, 8), ([2, 3], 0, 8), ([5], 4, 4), ([0, 9], 0, 4), ([0, 9], 4, 4), ([0, 6], 4, 4), ([0, 6], 4, 1),
     ([0], 0, 1)],
    ids=["one row", "both rows", "a chunk with the end", "one row of padding", "still", "its end", "one token more",
         "one token"],
)
def test_where_rows_begin_by_any_mask(pads, held, new):
    """Masks of bools say what is seen, or in some models (MPT) what is hidden; others are added to the scores."""
    seen = causal(pads, held, new)
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    start = [min(pad, held) for pad in pads]
    for mask in (seen, ~seen, added):
        assert Noted(mask=mask).first_tokens(start, held, 0, new) == [min(pad, held + new) for pad in pads]


def test_padding_alone():
    """Not even a mask that shows all of a prompt to its first token (prefix LM) makes padding a row's first token."""
    ahead = causal([0, 5], 0, 4) | (torch.arange(4) >= torch.tensor([0, 5]).view(2, 1, 1, 1))
    assert Noted(mask=ahead).first_tokens([0, 0], 0, 0, 4) == [0, 4]
    assert Noted(mask=causal([5], 0, 4)).first_tokens([0], 0, 0, 4) == [4]
    assert Noted(mask=causal([5], 0, 4)[..., :1, :1]).first_tokens([0], 0, 0, 1) == [0]  # could as well be hidden


def test_a_module_that_runs_several_layers_is_noted_for_each():
    """Recurrent depth: one module, noted under its own index, updates others of the cache."""
    cache, first, second, unused = Listener(), Noted(cos=1), Noted(cos=2), Noted(cos=3)
    cache.note(0, first)
    assert cache.noted(0) is first
    cache.note(7, unused)  # of a layer that updates nothing
    cache.note(0, second)
    assert cache.noted(3) is second
    assert cache.noted(7) is unused
    assert cache.noted(1) is NOTHING
