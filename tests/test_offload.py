"""Offloaded pages lie in host memory and pass through the device, and nothing else is different."""

import copy
import json

import pytest
import torch
from models import LOSSLESS, prompt, tiny
from pretend import pretended, spread
from test_devices import REFERENCE
from test_held import by_content, holding
from test_latent import deepseek

from hf_seqkv import SeqKVCache, SeqKVConfig
from hf_seqkv.errors import ConfigError, SeqKVWarning
from hf_seqkv.integration import offload
from hf_seqkv.integration.compat import CACHE_NAME
from hf_seqkv.integration.state import state_of
from hf_seqkv.store import bundle
from hf_seqkv.store.prefix_store import PrefixStore


@pytest.fixture(autouse=True)
def _no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)


def model_of(name):
    """A tiny model; of one with latents the expansion has been tried out, which is not for pretended devices."""
    if name != "v3":
        return tiny(name)
    cache = SeqKVCache(config=deepseek(name).config, **REFERENCE)
    with torch.no_grad():
        for part in prompt(1, 60)[0].split(58, 1):
            deepseek(name)(part, **{CACHE_NAME: cache})
    return deepseek(name)


def generated(model, options, pads=(0, 5), **more):
    """What `generate` returns for a prompt of 46 tokens, logits included, and the cache."""
    ids, mask = prompt(len(pads), 46, pads)
    cache = SeqKVCache(config=model.config, **options)
    out = model.generate(
        ids.to("cuda:0"), attention_mask=mask.to("cuda:0"), **{CACHE_NAME: cache}, return_dict_in_generate=True,
        output_logits=True, do_sample=False, **{"max_new_tokens": 12} | more,
    )  # fmt: skip
    return out, cache


def assert_same(mine, other):
    """Tokens and logits of two generations."""
    assert torch.equal(mine.sequences.cpu(), other.sequences.cpu())
    assert len(mine.logits) == len(other.logits) > 0
    assert all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(mine.logits, other.logits, strict=True))


def assert_same_state(mine, other):
    (tensors, facts), (others, theirs) = state_of(mine), state_of(other)
    assert json.dumps(facts) == json.dumps(theirs)
    assert tensors.keys() == others.keys()
    for name, x in tensors.items():
        assert torch.equal(x.cpu(), others[name].cpu()), name


def assert_offloaded(cache):
    """Pages are in host memory, all else of a layer is on its device."""
    for layer in cache.layers:
        assert layer.device.type == "cuda"
        assert layer.pages.shape[1] > 0
        assert type(layer.pages) is torch.Tensor
        assert layer.pages.device.type == "cpu"
        parts = [*vars(layer).values(), *vars(layer.held or layer).values()]
        assert {x.device for x in parts if isinstance(x, torch.Tensor)} == {layer.device}


MODES = {
    "greedy": ("llama", REFERENCE, {}),
    "dense pages": ("qwen2", REFERENCE | LOSSLESS, {}),
    "beams": ("llama", REFERENCE, {"num_beams": 2}),
    "prompt lookup": ("llama", REFERENCE | {"residual_length": 1}, {"prompt_lookup_num_tokens": 12, "pads": (0,)}),
    "chunks": ("gpt2", REFERENCE, {"prefill_chunk_size": 16}),
    "sliding and full": ("gemma3", REFERENCE, {}),
    "sliding beams": ("mistral-window", REFERENCE, {"num_beams": 2}),
    "sliding chunks": ("mistral-window", REFERENCE, {"prefill_chunk_size": 16}),
    "sliding lookup": ("mistral-window", REFERENCE, {"prompt_lookup_num_tokens": 5, "pads": (0,)}),
    "latents": ("v3", REFERENCE, {}),
    "dense tensors": ("llama", REFERENCE, {"output_attentions": True}),
}


@pytest.mark.filterwarnings("ignore:.*runs on rebuilt dense keys")
@pytest.mark.parametrize(
    ("mode", "devices"), [*((mode, 1) for mode in MODES), ("chunks", 2), ("sliding lookup", 2)]
)
def test_results_are_bit_identical(mode, devices):
    name, options, more = MODES[mode]
    whole = model_of(name)
    with pretended():
        model = spread(whole, devices)
        if "output_attentions" in more:
            model.set_attn_implementation("eager")
        wanted, plain = generated(model, options, **more)
        found, cache = generated(model, options | {"offload": True}, **more)
        assert_offloaded(cache)
        assert_same(found, wanted)
        assert_same_state(cache, plain)
        assert {layer.device.index for layer in cache.layers} == set(range(devices))


def logits(model, ids, *caches):
    return [model(ids.to("cuda:0"), **{CACHE_NAME: cache}).logits.cpu() for cache in caches]


@pytest.mark.parametrize("cut", [9, 41, 60])
def test_a_crop(cut):
    """Also into pages, whose codes stay, and to nothing."""
    ids = prompt(1, 90)[0]
    with pretended():
        model = spread(tiny("llama"), 1)
        caches = [SeqKVCache(config=model.config, offload=on, **REFERENCE) for on in (True, False)]
        for part in ids[:, :60].split(20, 1):
            logits(model, part, *caches)
        for cache in caches:
            cache.crop(-cut)
        for part in ids[:, 60 - cut :].split(9, 1):
            assert torch.equal(*logits(model, part, *caches))
        assert_offloaded(caches[0])
        assert_same_state(*caches)


def test_held_tokens():
    options = {"calibration": holding("llama", by_content), "backend": "reference"}
    ids = prompt(1, 240)[0]
    with pretended():
        model = spread(tiny("llama"), 1)
        caches = [SeqKVCache(config=model.config, offload=on, **options) for on in (True, False)]
        for part in ids[:, :200].split(100, 1):
            assert torch.equal(*logits(model, part, *caches))
        for cache in caches:
            cache.crop(-90)
        for part in ids[:, 110:].split(16, 1):
            assert torch.equal(*logits(model, part, *caches))
        assert max(caches[0].layers[2].held.counts) > 9
        assert_offloaded(caches[0])


@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_batch_edits_and_copies(name):
    ids, step = prompt(3, 60)[0], torch.tensor([[5], [7], [9]])
    with pretended():
        model = spread(tiny(name), 2)
        caches = [SeqKVCache(config=model.config, offload=on, **REFERENCE) for on in (True, False)]
        logits(model, ids, *caches)
        logits(model, step, *caches)  # leaves a prefetched layer behind
        for cache in caches:
            cache.reorder_cache(torch.tensor([2, 0, 0]))
        assert torch.equal(*logits(model, step, *caches))
        for cache in caches:
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([0, 5, 3]))
        assert torch.equal(*logits(model, step, *caches))
        twins = copy.deepcopy(caches)
        mine = {id(layer.buffer.staging) for layer in caches[0].layers}
        assert mine.isdisjoint(id(layer.buffer.staging) for layer in twins[0].layers)
        for turn in range(9):  # the two drift apart, over new pages
            assert torch.equal(*logits(model, step + turn, *twins))
            assert torch.equal(*logits(model, step, *caches))
        assert_offloaded(twins[0])
        assert_same_state(*caches)
        assert_same_state(*twins)
        for cache in caches:
            cache.reset()
        assert torch.equal(*logits(model, ids, *caches))
        assert torch.equal(*logits(model, step, *caches))
        assert_offloaded(caches[0])


def test_sessions(tmp_path):
    """What is saved is the same but for the option; a session wakes as it went to sleep."""
    with pretended():
        model = spread(tiny("llama"), 2)
        _, plain = generated(model, REFERENCE)
        _, cache = generated(model, REFERENCE | {"offload": True})
        for held, name in ((plain, "plain"), (cache, "offloaded")):
            held.crop(-13)
            held.save(tmp_path / name)
        (mine, facts), (other, theirs) = (
            bundle.unpack((tmp_path / name).read_bytes()) for name in ("offloaded", "plain")
        )
        assert facts["config"].pop("offload") is True
        assert facts == theirs
        assert all(torch.equal(x, other[name]) for name, x in mine.items())
        woken = SeqKVCache.load(tmp_path / "offloaded", model)
        assert_offloaded(woken)
        assert_same_state(woken, plain)
        for step in torch.arange(10).view(5, 2, 1):
            assert torch.equal(*logits(model, step, woken, plain))


@pytest.mark.parametrize(
    ("writer", "name", "form"),
    [(True, "llama", "hot"), (False, "mistral-window", "exact")],
    ids=["offloaded writes", "offloaded reads"],
)
def test_a_prefix_store_is_shared(writer, name, form, tmp_path):
    with pretended(), PrefixStore(tmp_path / "store", form=form) as store:
        model, found = spread(tiny(name), 2), []
        for on in (writer, not writer, writer):
            out, cache = generated(model, REFERENCE | {"offload": on, "prefix_store": store}, (0,))
            store.flush()
            found.append((out, cache))
        assert [cache.prefixes.loaded > 0 for _, cache in found] == [False, True, True]
        assert_same(found[1][0], found[2][0])
        assert_same_state(found[1][1], found[2][1])
        assert_offloaded(found[0 if writer else 1][1])


def test_a_layer_goes_and_comes_back():
    """transformers' own calls, without the option."""
    ids = prompt(1, 90)[0]
    with pretended():
        model = spread(tiny("llama"), 1)
        caches = [SeqKVCache(config=model.config, **REFERENCE) for _ in range(2)]
        cache, layer = caches[0], caches[0].layers[1]
        layer.offload()  # nothing yet
        logits(model, ids[:, :60], *caches)
        cache.offload(1)
        assert (layer.pages.device.type, cache.layers[0].pages.device.type) == ("cpu", "cuda")
        for part in ids[:, 60:76].split(2, 1):
            assert torch.equal(*logits(model, part, *caches))
        layer.prefetch()
        assert layer.pages.device == layer.device
        assert cache.memory() == caches[1].memory()
        for part in ids[:, 76:].split(2, 1):
            assert torch.equal(*logits(model, part, *caches))


def test_on_the_cpu_it_says_that_it_has_no_effect():
    offload._say_of_cpu.cache_clear()
    model, ids = tiny("llama"), prompt(1, 60)[0]
    caches = [SeqKVCache(config=model.config, offload=on, **REFERENCE) for on in (True, False)]
    with torch.no_grad(), pytest.warns(SeqKVWarning, match="no effect.*CPU") as said:
        found = [model(ids, **{CACHE_NAME: cache}).logits for cache in caches]
    assert len(said) == 1
    assert torch.equal(*found)
    assert caches[0].memory() == caches[1].memory()


def test_the_option():
    assert SeqKVConfig().offload is False
    assert "offload" not in SeqKVConfig().to_dict()  # nor in what was stored before there was one
    assert SeqKVConfig.from_json(SeqKVConfig(offload=True).to_json()) == SeqKVConfig(offload=True)
    with pytest.raises(ConfigError, match="offload=1 must be True or False"):
        SeqKVConfig(offload=1)
    with pytest.raises(ConfigError, match="offload=None"):
        SeqKVConfig(offload=None)
