"""Baselines with real bytes: rounding errors, exact sizes, groups that do not touch each other, and the cache."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import prompt, tiny

from hf_seqkv.eval.peers import PEERS, GroupCodec, Groups, PeerCache
from hf_seqkv.integration.compat import CACHE_NAME

ALONG = ("tokens", "components")


@st.composite
def codecs(draw):
    def groups():
        return Groups(draw(st.sampled_from((2, 4))), draw(st.sampled_from((8, 32, 64))), draw(st.sampled_from(ALONG)))

    dims = st.sampled_from((1, 16, 33, 80, 96))
    return GroupCodec(
        groups(), groups(), draw(st.sampled_from((8, 40, 64))), draw(st.integers(1, 3)), *draw(st.tuples(dims, dims))
    )


def tensors(codec, seed: int, *lead: int):
    """Keys and values whose components differ in size and mean."""
    generator = torch.Generator().manual_seed(seed)
    for dim in (codec.key_dim, codec.value_dim):
        size, mean = (10 ** torch.rand(2, dim, generator=generator) - 1).unbind()
        yield torch.randn(*lead, codec.heads, codec.page_size, dim, generator=generator) * size + mean


def each_group(groups: Groups, x: torch.Tensor, f) -> torch.Tensor:
    """`f` of every value's own group, `[..., H, P, D]`; by slicing, not by index arithmetic."""
    axis = -2 if groups.along == "tokens" else -1
    parts = [f(part, axis, keepdim=True).expand_as(part) for part in x.split(groups.size, axis)]
    return torch.cat(parts, axis)


@settings(max_examples=60)
@given(codecs(), st.integers(0, 1000))
def test_error_is_within_half_a_step(codec, seed):
    k, v = tensors(codec, seed, 2)
    pages = codec.encode(k, v)
    assert pages.shape == (2, codec.page_bytes)
    for x, y, (groups, _) in zip((k, v), codec.decode(pages), codec.sides.values(), strict=True):
        assert (y.shape, y.dtype) == (x.shape, torch.float32)
        low, high = (each_group(groups, x, f) for f in (torch.amin, torch.amax))
        levels = 2**groups.bits - 1
        # step and minimum are stored in fp16: off by 2^-11 of themselves, the step `levels` times at the far end
        stored = 2**-11 * (low.abs() + (high - low)) + levels * 2**-24
        assert ((x - y).abs() <= (high - low) / levels / 2 * (1 + 2**-10) + stored).all()


@settings(max_examples=60)
@given(codecs())
def test_sizes(codec):
    """Codes to the bit, 4 bytes for every begun group, sections padded to 16 bytes."""
    expected = {}
    for name, (groups, dim) in codec.sides.items():
        count, length = (dim, codec.page_size) if groups.along == "tokens" else (codec.page_size, dim)
        expected[f"{name}_codes"] = codec.heads * codec.page_size * dim * groups.bits // 8
        expected[f"{name}_scales"] = codec.heads * count * math.ceil(length / groups.size) * 4
    assert {name: size for name, (_, size) in codec.sections.items()} == expected
    assert codec.page_bytes == sum(-(-size // 16) * 16 for size in expected.values())


@pytest.mark.parametrize("along", ALONG)
@pytest.mark.parametrize("x", [0.0, 1.0, -3.5, 1e-7, 65504.0, -1e6])
def test_equal_values(x, along):
    """No division by a step of zero; what fp16 can hold comes back exactly, what is beyond it saturates."""
    groups = Groups(2, 32, along)
    codec = GroupCodec(groups, groups, 8, 1, 16, 16)
    k, v = codec.decode(codec.encode(*torch.full((2, 1, 8, 16), x)))
    nearest = torch.tensor(x).clamp(-65504, 65504).half().float()
    assert torch.equal(k, v)
    torch.testing.assert_close(k, nearest.expand_as(k), atol=2e-7, rtol=0)


def test_groups_do_not_touch_each_other():
    """An outlier costs the group it is in, and no other."""
    codec = GroupCodec(*PEERS["kivi-2"], 64, 2, 80, 80)
    clean = torch.randn(2, 2, 64, 80)
    loud = clean.clone()
    loud[:, 1, 40, 70] = 100
    changed = [
        a != b for a, b in zip(codec.decode(codec.encode(*clean)), codec.decode(codec.encode(*loud)), strict=True)
    ]
    assert [x.any().item() for x in changed] == [True, True]
    for x, inside in zip(changed, ((1, slice(32, 64), 70), (1, 40, slice(64, 80))), strict=True):
        x[inside] = False
        assert not x.any()


def test_splice():
    codec = GroupCodec(*PEERS["kivi-4"], 64, 2, 16, 16)
    old, new = (codec.encode(*tensors(codec, seed)) for seed in (1, 2))
    for a, b, c in zip(*map(codec.decode, (old, new, codec.splice(old, new, 24))), strict=True):
        assert (c[:, :24] - a[:, :24]).abs().max() < (c[:, :24] - b[:, :24]).abs().max() / 4
        assert (c[:, 24:] - b[:, 24:]).abs().max() < (c[:, 24:] - a[:, 24:]).abs().max() / 4


@pytest.mark.parametrize(("peer", "bits"), [("kivi-2", 3.0), ("kivi-4", 5.0), ("int4", 4.5)])
def test_rates(peer, bits):
    """Scales and minima are counted, at the head dim of many models."""
    codec = GroupCodec(*PEERS[peer], 64, 8, 128, 128)
    assert codec.page_bytes * 8 / (64 * 8 * 2 * 128) == bits


@pytest.mark.parametrize("peer", PEERS)
def test_cache(peer):
    """A page holds what the codec makes of the keys and values that the dense cache has, after RoPE."""
    model, ids = tiny("qwen3"), prompt(tokens=110)[0]
    from transformers import DynamicCache

    dense, cache = DynamicCache(config=model.config), PeerCache(model.config, peer, page_size=32, residual_length=8)
    with torch.no_grad():
        for held in (dense, cache):
            model(ids, **{CACHE_NAME: held})
    codec = cache.layers[0].codec
    assert isinstance(codec, GroupCodec)
    assert cache.layers[0].counts == [3]
    for layer, plain in zip(cache.layers, dense.layers, strict=True):
        page = codec.decode(codec.encode(plain.keys[:, :, 36:68], plain.values[:, :, 36:68]))
        for ours, exact, expected in zip((layer.keys, layer.values), (plain.keys, plain.values), page, strict=True):
            torch.testing.assert_close(ours[:, :, 36:68], expected, atol=1e-6, rtol=0)
            assert torch.equal(ours[:, :, 100:], exact[:, :, 100:])
    memory = cache.memory()
    assert memory["codes"] == 3 * 3 * 32 * 2 * 2 * 16 * codec.sides["key"][0].bits // 8
    assert memory["codes"] + memory["side_information"] == 3 * 3 * codec.page_bytes
    assert memory["tables"] == 0
    assert cache.bits_per_value() == codec.page_bytes * 8 / (32 * 2 * 2 * 16)


def test_cache_crops_and_copies():
    model, ids = tiny("llama"), prompt(tokens=110)[0]
    cache = PeerCache(model.config, "kivi-4", page_size=32, residual_length=8)
    with torch.no_grad():
        model(ids, **{CACHE_NAME: cache})
        other = copy.deepcopy(cache)
        cache.crop(-30)
        out = [model(ids[:, 80:], **{CACHE_NAME: x}, logits_to_keep=1).logits for x in (cache, other)]
    assert cache.get_seq_length() == 110
    assert cache.layers[0].counts == [3]
    assert other.get_seq_length() == 140
    assert all(torch.isfinite(x).all() for x in out)
