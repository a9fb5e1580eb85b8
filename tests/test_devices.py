"""Models on more than one device: spread over two, or offloaded by accelerate, they are what they are on one."""

import copy
import itertools

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from models import LOSSLESS, SMALL, Unmeasured, prompt, tiny
from pretend import Pretended, pretended, spread
from test_calibration import TEXT, Words
from test_held import by_content, holding

from hf_seqkv import SeqKVCache, calibrate
from hf_seqkv.errors import UnsupportedOperationError
from hf_seqkv.integration.compat import CACHE_NAME
from hf_seqkv.integration.model_facts import model_fingerprint, weights_fingerprint

REFERENCE = SMALL | {"backend": "reference"}


@pytest.fixture(autouse=True)
def _no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)


def generated(model, options, pads=(0, 5), past=None, **more):
    """Tokens after a prompt, on the CPU, and the cache."""
    ids, mask = prompt(len(pads), 46, pads)
    device = "cuda:0" if isinstance(next(model.parameters()), Pretended) else "cpu"
    cache = past or SeqKVCache(config=model.config, **options)
    more = {"max_new_tokens": 9, "do_sample": False} | more
    out = model.generate(ids.to(device), attention_mask=mask.to(device), **{CACHE_NAME: cache}, **more)
    return out.cpu(), cache


def assert_at_home(cache):
    """Everything of a layer is on its own device."""
    assert {str(layer.device) for layer in cache.layers} == {"cuda:0", "cuda:1"}
    for layer in cache.layers:
        table = cache.table(layer.index)
        parts = [*vars(layer).values(), *vars(layer.held or layer).values(), *(vars(table).values() if table else ())]
        assert {x.device for x in parts if isinstance(x, torch.Tensor)} == {layer.device}


def assert_same_pages(cache, other):
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        assert mine.counts == theirs.counts
        for row, count in enumerate(mine.counts):
            assert torch.equal(mine.pages[row, :count].cpu(), theirs.pages[row, :count])


@pytest.mark.parametrize(
    ("name", "more"),
    [("llama", {"num_beams": 2}), ("gemma3", {}), ("gpt2", {"prefill_chunk_size": 16})],
    ids=["beams", "sliding", "chunks"],
)
def test_layers_on_two_devices(name, more):
    wanted, _ = generated(tiny(name), REFERENCE, **more)
    with pretended():
        found, cache = generated(spread(tiny(name)), REFERENCE, **more)
        assert_at_home(cache)
    assert torch.equal(found, wanted)


def test_held_tokens_on_two_devices():
    options = {"calibration": holding("llama", by_content), "backend": "reference"}
    ids = prompt(1, 200)[0]
    with pretended():
        found = []
        for model, device in ((tiny("llama"), "cpu"), (spread(tiny("llama")), "cuda:0")):
            cache = SeqKVCache(config=model.config, **options)
            model(ids[:, :180].to(device), **{CACHE_NAME: cache})
            step = model(ids[:, 180:182].to(device), **{CACHE_NAME: cache}).logits
            cache.crop(-60)
            found.append([step.cpu(), model(ids[:, 122:].to(device), **{CACHE_NAME: cache}).logits.cpu()])
            assert max(cache.layers[2].held.counts) > 9
        assert_at_home(cache)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sessions_move_between_one_device_and_two(name, tmp_path):
    _, one = generated(tiny(name), REFERENCE)
    one.save(tmp_path / "one")
    with pretended():
        model = spread(tiny(name))
        woken = SeqKVCache.load(tmp_path / "one", model)
        assert_at_home(woken)
        assert_same_pages(woken, one)
        woken.save(tmp_path / "two")
        model(torch.full((2, 1), 9).to("cuda:0"), **{CACHE_NAME: woken})
    again = SeqKVCache.load(tmp_path / "two", tiny(name))
    assert_same_pages(again, one)
    with torch.no_grad():
        logits = [tiny(name)(torch.full((2, 1), 9), **{CACHE_NAME: cache}).logits for cache in (one, again)]
    assert torch.equal(*logits)


def test_token_ids_after_a_crop():
    """What a crop leaves of them is on the CPU, what the model is called with next on its device."""
    ids = prompt(1, 60)[0]
    with pretended():
        model = spread(tiny("llama"))
        cache = SeqKVCache(config=model.config, **REFERENCE)
        cache.bind(model)
        model(ids[:, :50].to("cuda:0"), **{CACHE_NAME: cache})
        cache.crop(-10)
        model(ids[:, 40:].to("cuda:0"), **{CACHE_NAME: cache})
        assert torch.equal(cache.ids, ids)


@pytest.mark.parametrize("writer", [0, 1], ids=["one writes", "two write"])
def test_prefixes_are_shared_by_one_device_and_two(writer, tmp_path):
    lossless = LOSSLESS | {"backend": "reference"}  # loaded or not makes no difference
    wanted, _ = generated(tiny("gemma3"), lossless, (0,))
    with pretended(), Unmeasured(tmp_path / "store") as store:
        models = [tiny("gemma3"), spread(tiny("gemma3"))]
        for model in (models[writer], models[1 - writer]):
            found, cache = generated(model, lossless | {"prefix_store": store}, (0,))
            store.flush()
            assert torch.equal(found, wanted)
        assert cache.prefixes.loaded


def _offloaded(model, kind, folder):
    model = copy.deepcopy(model)
    if kind == "cpu":
        return cpu_offload(model, execution_device=torch.device("cpu"))
    return disk_offload(model, str(folder), execution_device=torch.device("cpu"))


@pytest.mark.parametrize("kind", ["cpu", "disk"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_offloaded_weights(name, kind, tmp_path):
    """Their fingerprints are read from where they are kept; stores and sessions are those of the model in memory."""
    whole, model = tiny(name), _offloaded(tiny(name), kind, tmp_path / "weights")
    assert next(model.parameters()).is_meta
    assert (model_fingerprint(model), weights_fingerprint(model)) == (
        model_fingerprint(whole),
        weights_fingerprint(whole),
    )
    with Unmeasured(tmp_path / "store") as store:
        generated(whole, SMALL | {"prefix_store": store})
        store.flush()
        wanted, _ = generated(whole, SMALL | {"prefix_store": store})
        found, cache = generated(model, SMALL | {"prefix_store": store})
        assert cache.prefixes.loaded
    assert torch.equal(found, wanted)
    cache.save(tmp_path / "session")
    woken = SeqKVCache.load(tmp_path / "session", model)
    ids = torch.tensor([[5], [7]])
    with torch.no_grad():
        assert torch.equal(model(ids, **{CACHE_NAME: woken}).logits, whole(ids, **{CACHE_NAME: cache}).logits)


def test_a_calibration_meets_an_offloaded_model(tmp_path):
    options = {"calibration": holding("llama", by_content)}
    wanted, _ = generated(tiny("llama"), options)
    found, _ = generated(_offloaded(tiny("llama"), "disk", tmp_path), options)  # no warning of other weights
    assert torch.equal(found, wanted)


def test_a_model_on_two_devices_is_calibrated():
    """Gradients and all, layer by layer where it is; it differs as sums in another order do."""
    options = {"tokens": 528, "window": 264, "progress": False}
    wanted = calibrate(tiny("llama"), Words(), [TEXT], **options)
    with pretended():
        found = calibrate(spread(tiny("llama")), Words(), [TEXT], **options)
    assert found.tensors.keys() == wanted.tensors.keys()
    assert {x.device.type for x in found.tensors.values()} == {"cpu"}
    for i in range(3):
        for name in (f"{i}.key.levels", f"{i}.value.levels", f"{i}.key.std"):
            torch.testing.assert_close(found.tensors[name], wanted.tensors[name], atol=0.02, rtol=0.02)
        for profile, side in itertools.product(("full", "light"), ("key", "value")):
            mine, theirs = (x.tensors[f"sequence.{profile}.{i}.{side}.sizes"].float() for x in (found, wanted))
            assert (mine - theirs).abs().mean() < 0.02 * theirs.mean()


def test_weights_that_are_nowhere():
    with pytest.raises(UnsupportedOperationError, match="meta device"):
        model_fingerprint(copy.deepcopy(tiny("llama")).to("meta"))
