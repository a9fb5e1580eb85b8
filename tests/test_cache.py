"""`SeqKVCache` as an object: determinism, edits, accounting, and what it refuses."""

import copy
import gc

import pytest
import torch
from models import LOSSLESS, SMALL, prompt, tiny
from transformers import DynamicCache, T5Config

from hf_seqkv import SeqKVCache, SeqKVConfig
from hf_seqkv.errors import (
    ConfigError,
    NonFiniteError,
    SeqKVWarning,
    UnsupportedModelError,
    UnsupportedOperationError,
)
from hf_seqkv.integration import handle
from hf_seqkv.integration.compat import CACHE_NAME
from hf_seqkv.integration.handle import Handle


def filled(name="llama", ids=None, mask=None, chunk=None, **options):
    """A model and its cache after a prefill, whole or in chunks."""
    model = tiny(name)
    cache = SeqKVCache(config=model.config, **(options or SMALL))
    ids = prompt(1, 60)[0] if ids is None else ids
    chunk = chunk or ids.shape[1]
    with torch.no_grad():
        for at in range(0, ids.shape[1], chunk):
            seen = None if mask is None else mask[:, : at + chunk]
            positions = None if seen is None else (seen.cumsum(-1) - 1).clamp_min(0)[:, at : at + chunk]
            model(ids[:, at : at + chunk], attention_mask=seen, position_ids=positions, **{CACHE_NAME: cache})
    return model, cache


def page_bytes(cache, layer, row, first=0):
    """Pages of a row from page `first` on, dropped ones counted."""
    held = cache.layers[layer]
    return held.pages[row, first - held.dropped : held.counts[row] - held.dropped]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt-neox", "gpt2", "mistral-window"])
def test_pages_do_not_depend_on_neighbours_or_padding(name):
    ids, mask = prompt(3, 60, pads=(0, 0, 21))
    ids[2, 21:] = ids[0, :39]
    _, together = filled(name, ids, mask)
    _, alone = filled(name, ids[:1])
    # The first layer sees identical inputs; deeper ones see them through batched matmuls, equal but for rounding.
    held = max(cache.layers[0].dropped for cache in (together, alone))
    single = page_bytes(alone, 0, 0, held)
    for row, fewer in ((0, 0), (2, 3)):
        pages = page_bytes(together, 0, row, held)
        assert len(pages) == max(len(single) - fewer, 0)
        assert torch.equal(pages, single[: len(pages)])


def test_pages_do_not_depend_on_chunking():
    _, whole = filled()
    _, chunks = filled(chunk=7)
    assert torch.equal(page_bytes(whole, 0, 0), page_bytes(chunks, 0, 0))


def test_pads_are_not_stored():
    ids, mask = prompt(2, 60, pads=(0, 40))
    _, cache = filled("llama", ids, mask)
    layer = cache.layers[0]
    assert layer.start == [0, 40]
    assert layer.counts[0] > layer.counts[1]
    assert not layer.keys[1, :, :40].any()


@pytest.mark.parametrize("cut", [1, 7, 9, 20, 31, 55, 60])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mistral-window"])
def test_crop_is_exact_with_dense_pages(name, cut):
    """Also back over flushed pages, into the sinks, and to nothing; then on with other tokens."""
    model, cache = filled(name, **LOSSLESS)
    reference = DynamicCache(config=model.config)
    reference.activate_past_recording()
    ids, more = prompt(1, 60)[0], prompt(1, 90)[0][:, 60:]
    if cut in (20, 31, 55) and name in ("mistral-window", "gemma3"):  # a margin of the window is kept, no more
        with pytest.raises(UnsupportedOperationError, match="window"):
            cache.crop(-cut)
        return
    cache.crop(-cut)
    with torch.no_grad():
        if cut < 60:
            model(ids[:, : 60 - cut], **{CACHE_NAME: reference})
        assert cache.get_seq_length() == 60 - cut
        for at in range(0, 30, 3):
            new = more[:, at : at + 3]
            ours, theirs = (model(new, **{CACHE_NAME: c}).logits for c in (cache, reference))
            reference.crop(0)
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cut", [5, 12, 20])
def test_codes_outlive_a_crop(cut):
    """Tokens that were coded once keep their codes, bit for bit, when the page fills again."""
    model, cache = filled()
    before = page_bytes(cache, 0, 0).clone()
    ids = prompt(1, 60)[0]
    cache.crop(-cut)
    with torch.no_grad():
        model(ids[:, 60 - cut :], **{CACHE_NAME: cache})
    assert torch.equal(page_bytes(cache, 0, 0), before)


@pytest.mark.parametrize("options", [LOSSLESS, SMALL], ids=["dense", "4 bits"])
def test_batch_edits_select_whole_rows(options):
    ids, mask = prompt(3, 60, pads=(0, 17, 5))
    model, cache = filled("llama", ids, mask, **options)
    layer = cache.layers[1]
    keys = layer.keys
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(layer.keys, keys[[2, 0, 0]])
    cache.batch_select_indices(torch.tensor([True, False, True]))
    assert torch.equal(layer.keys, keys[[2, 0]])
    cache.batch_repeat_interleave(2)
    assert torch.equal(layer.keys, keys[[2, 2, 0, 0]])
    twin = copy.deepcopy(cache)
    rows = torch.cat([mask[[2, 2, 0, 0]], torch.ones(4, 1, dtype=mask.dtype)], 1)
    with torch.no_grad():
        outputs = [
            model(ids[:1, :1].expand(4, 1), attention_mask=rows, **{CACHE_NAME: c}).logits for c in (cache, twin)
        ]
    assert torch.equal(*outputs)
    assert cache.get_seq_length() == twin.get_seq_length() == 61
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.memory()["codes"] == 0
    assert twin.get_seq_length() == 61


def test_step_never_builds_dense_pages(monkeypatch):
    """The codec's decoder is poisoned: a fused step must not touch it."""
    from hf_seqkv.codec.page import QuantizedPageCodec

    model, cache = filled(ids=prompt(1, 200)[0])

    def poisoned(self, pages, side):
        raise AssertionError("a step decoded pages")

    monkeypatch.setattr(QuantizedPageCodec, "coordinates", poisoned)
    with torch.no_grad():
        for steps in (1, 1, 5, 16, 1):
            model(prompt(1, steps)[0], **{CACHE_NAME: cache})
    with pytest.raises(AssertionError, match="decoded"):
        cache.layers[0].keys  # noqa: B018


def test_update_returns_storage_less_handles(monkeypatch):
    _, cache = filled()
    layer = cache.layers[0]
    keys, values = layer.update(torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16))
    assert isinstance(keys, Handle)
    assert keys.shape == (1, 2, 61, 16)
    monkeypatch.setattr(handle, "_SAID", set())
    with pytest.warns(SeqKVWarning, match=r"dense keys and values: its own attention takes add"):
        assert (keys + 0).shape == keys.shape
    assert torch.equal(keys - 1, layer.keys - 1)  # a second warning would be an error
    assert torch.equal(values.to(torch.float64), layer.values.double())
    assert keys.to("cpu") is keys


def test_memory_is_what_is_allocated():
    """`memory()` against the storages that can be reached from the cache."""
    _, cache = filled(ids=prompt(2, 200)[0])
    reachable, seen, todo = {}, set(), [cache]
    while todo:
        thing = todo.pop()
        if id(thing) in seen or thing is cache.model_config:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            reachable[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, dict):
            todo += thing.values()
        elif isinstance(thing, (list, tuple)):
            todo += thing
        elif type(thing).__module__.startswith("hf_seqkv"):
            todo += vars(thing).values()
    parts = cache.memory()
    assert parts["total"] == sum(size for name, size in parts.items() if name not in ("total", "host"))
    # Index tables of codecs (which component lies where) are the only tensors it leaves out.
    index = sum(
        t.untyped_storage().nbytes()
        for codec in cache._codecs.values()
        for side in (codec.key, codec.value)
        for t in (side.offsets, *(x for group in side._groups for x in group[1:]))
    )
    assert abs(sum(reachable.values()) - index - parts["total"]) <= 0.02 * parts["total"]


def test_bits_per_value():
    _, cache = filled(ids=prompt(1, 200)[0], page_size=64)
    layer = cache.layers[0]
    values = layer.counts[0] * 64 * 2 * (16 + 16) * 3
    parts = cache.memory()
    assert cache.bits_per_value() == (parts["codes"] + parts["side_information"]) * 8 / values
    assert parts["codes"] == values * 9 // 16  # keys 5 bits, values 4
    assert torch.tensor(SeqKVCache(config=tiny("llama").config).bits_per_value()).isnan()


def test_prefill_frees_dense_tensors():
    """After a prefill the process holds codes and the dense window, nothing of the dense history."""
    cache = filled(ids=prompt(1, 400)[0])[1]
    gc.collect()
    dense = 400 * 2 * 16 * 4  # bytes of one layer's keys
    large = [
        x for x in gc.get_objects() if type(x) is torch.Tensor and x.dim() == 4 and x.shape[-1] == 16
        and x.untyped_storage().nbytes() >= dense
    ]  # fmt: skip
    assert large == []
    assert cache.get_seq_length() == 400


def test_non_finite_keys_are_refused_and_nothing_is_lost():
    _, cache = filled()
    layer = cache.layers[1]
    before, keys = layer.length, layer.keys
    bad = torch.randn(1, 2, 30, 16)
    bad[0, 1, 4, 3] = torch.inf
    with pytest.raises(NonFiniteError, match=r"keys of layer 1, row 0, token 64 .*bfloat16"):
        layer.update(bad, torch.randn(1, 2, 30, 16))
    assert layer.length == before
    assert torch.equal(layer.keys, keys)


def test_gradients_are_refused():
    _, cache = filled()
    with pytest.raises(UnsupportedOperationError, match="no_grad"):
        cache.update(torch.randn(1, 2, 1, 16, requires_grad=True), torch.randn(1, 2, 1, 16), 0)


@pytest.mark.parametrize("shape", [(2, 2, 1, 16), (1, 1, 1, 16), (1, 2, 1, 8)])
def test_other_shapes_are_refused(shape):
    _, cache = filled()
    with pytest.raises(ConfigError, match="holds"):
        cache.update(torch.randn(shape), torch.randn(shape), 0)


def test_what_cannot_be_done_is_said():
    _, cache = filled()
    with pytest.raises(ValueError, match="positive"):
        cache.crop(3)
    with pytest.raises(UnsupportedOperationError, match="update"):
        cache.layers[0].keys = torch.zeros(1)
    with pytest.raises(ConfigError, match=r"did you mean 'page_size'"):
        SeqKVCache(config=tiny("llama").config, pagesize=8)
    with pytest.raises(ConfigError, match=r"model\.config"):
        SeqKVCache()


def test_models_that_cannot_be_coded():
    from transformers import MambaConfig, Qwen3NextConfig

    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        SeqKVCache(config=T5Config())
    with pytest.raises(UnsupportedModelError, match="no layer"):
        SeqKVCache(config=MambaConfig(num_hidden_layers=2))
    hybrid = Qwen3NextConfig(num_hidden_layers=4)
    with pytest.warns(SeqKVWarning, match="LinearAttentionLayer"):
        cache = SeqKVCache(config=hybrid)
    assert len(cache._coded()) == 1


def test_keys_with_huge_bias_survive():
    """Qwen 2.5's key biases put channels at 100 times the rest: without centering 4 bits are lost on the constant."""
    model = copy.deepcopy(tiny("qwen2"))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias[::7] += 300
    ids = prompt(1, 150)[0]
    errors = {}
    with torch.no_grad():
        dense = DynamicCache(config=model.config)
        model(ids, **{CACHE_NAME: dense})
        for center in (True, False):
            cache = SeqKVCache(config=model.config, center_keys=center, **SMALL)
            model(ids, **{CACHE_NAME: cache})
            layer, keys = cache.layers[0], dense.layers[0].keys
            plain = tiny("qwen2").model.layers[0].self_attn.k_proj(model.model.layers[0].input_layernorm(
                model.model.embed_tokens(ids)))  # fmt: skip
            errors[center] = ((layer.keys - keys).square().mean() / plain.var()).item()
    assert errors[True] < 0.02  # what 4 bits cost keys without a bias
    assert errors[False] > 1


def test_published_turboquant_is_a_setting():
    options = SeqKVConfig.published_turboquant(4, page_size=8, residual_length=8).to_dict()
    _, cache = filled(**options)
    layer = cache.layers[0]
    assert layer.mean is None
    assert cache.bits_per_value() == pytest.approx(4 + 16 / 16)  # one scale of 16 bits for head dim 16
