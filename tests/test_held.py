"""Tokens of pages that a cache holds dense: which they are, where they are read from, and what becomes of them."""

import copy
import functools

import pytest
import torch
from models import SMALL, VOCABULARY, prompt, tiny
from test_calibration import make
from transformers import DynamicCache

from hf_seqkv import SeqKVCache, SeqKVCalibration
from hf_seqkv.codec.importance import features
from hf_seqkv.integration.compat import CACHE_NAME

BACKENDS = {"reference": 1e-4, "cpu": 3e-2}  # of the largest logit
FIRST, LAST = 20, 23  # positions that `by_position` holds


def by_position(heads, dim):
    """Weights that are positive for positions `FIRST` to `LAST` alone: a parabola in their logarithm."""
    low, high = (torch.tensor(x).log2().item() for x in (FIRST - 0.5, LAST + 0.5))
    weights = torch.zeros(heads * dim + 4 * heads + 3)
    weights[-3:] = torch.tensor([low + high, -1, -low * high])
    return weights


def by_content(heads, dim):
    """Weights that are positive for about one token in six, told from its keys."""
    weights = torch.zeros(heads * dim + 4 * heads + 3)
    weights[3], weights[-1] = 1, -2.5
    return weights


@functools.cache
def calibration(name):
    return make(name, sequence=False)


@functools.cache
def holding(name, rule):
    """A calibration by which a cache holds tokens; `rule` is None for none."""
    made = calibration(name)
    layers, shape = made.config["model"]["num_hidden_layers"], made.tensors["0.key.std"].shape
    held = {f"{i}.held": rule(*shape) for i in range(layers)} if rule else {}
    return SeqKVCalibration(made.tensors | held, made.config)


def feed(model, cache, ids, mask=None, chunk=None):
    """Run a model over tokens, `chunk` at a time; returns the last logits."""
    chunk = chunk or ids.shape[1]
    with torch.no_grad():
        for at in range(0, ids.shape[1], chunk):
            seen = None if mask is None else mask[:, : at + chunk]
            positions = None if seen is None else (seen.cumsum(-1) - 1).clamp_min(0)[:, at : at + chunk]
            out = model(ids[:, at : at + chunk], attention_mask=seen, position_ids=positions, **{CACHE_NAME: cache})
    return out.logits


def filled(name="llama", rule=by_content, ids=None, mask=None, chunk=None, **options):
    """A model and its cache after a prefill."""
    model = tiny(name)
    cache = SeqKVCache(config=model.config, calibration=holding(name, rule), **SMALL | options)
    feed(model, cache, prompt(1, 60)[0] if ids is None else ids, mask, chunk)
    return model, cache


def table(layer, row=0):
    """What a row holds: slots in order, keys and values `[H, n, D]`."""
    held = layer.held
    at = held.slots[row] >= 0
    slots, order = held.slots[row, at].sort()
    return slots, held.k[row][:, at][:, order], held.v[row][:, at][:, order]


def dense_of(name, ids):
    """Keys and values as the model makes them."""
    cache = DynamicCache()
    feed(tiny(name), cache, ids)
    return cache


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "gpt-neox"])
def test_held_tokens_are_the_models_own(name):
    """Those in bf16, all others as a cache without held tokens has them."""
    ids = prompt(1, 60)[0]
    (_, cache), (_, plain), dense = filled(name, by_position), filled(name, None), dense_of(name, ids)
    for index, (layer, other, exact) in enumerate(zip(cache.layers, plain.layers, dense.layers, strict=True)):
        slots, *held = table(layer)
        offset = layer._offset()
        assert slots.tolist() == [x for x in range(FIRST, LAST + 1) if x >= offset]
        for part, x in zip(("keys", "values"), held, strict=True):
            rebuilt, lossy, original = (getattr(c, part)[0] for c in (layer, other, exact))
            torch.testing.assert_close(x, original[:, slots].bfloat16(), msg=f"{part} of layer {index}")
            assert torch.equal(rebuilt[:, slots - offset], x.float())
            rest = torch.ones(rebuilt.shape[1], dtype=torch.bool)
            rest[slots - offset] = False
            assert torch.equal(rebuilt[:, rest], lossy[:, rest])
            assert len(slots) == 0 or not torch.equal(rebuilt, lossy)


def test_the_rule_is_the_calibrations():
    """Chosen tokens against features computed from the model's own keys before RoPE."""
    ids = prompt(1, 60)[0]
    model, cache = filled()
    layer = model.model.layers[0]
    with torch.no_grad():
        x = layer.input_layernorm(model.model.embed_tokens(ids))
        k, v = (f(x)[0].unflatten(-1, (2, 16)) for f in (layer.self_attn.k_proj, layer.self_attn.v_proj))
    chosen = (features(k, v, torch.arange(60)) @ by_content(2, 16) > 0).nonzero()[:, 0]
    paged = chosen[(chosen >= 4) & (chosen < 4 + 8 * cache.layers[0].counts[0])]
    assert 4 <= len(paged) < 24
    assert torch.equal(table(cache.layers[0])[0], paged)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", [0, 3, 13, 35])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "mistral-window"])
def test_attention_is_that_over_what_is_held(name, cut, backend):
    """A fused step, which makes a page, against the model's own attention over the same tokens; also after a crop."""
    if name == "mistral-window" and cut > 8:
        pytest.skip("a window keeps a margin of 8")
    model, cache = filled(name, ids=prompt(2, 60)[0], backend=backend)
    if cut:
        cache.crop(-cut)
    new, position = prompt(2, 12)[0], torch.arange(60 - cut, 72 - cut)[None]
    dense = DynamicCache()
    for index, layer in enumerate(cache.layers):
        assert len({len(table(layer, row)[0]) for row in range(2)} | {0}) > 1
        dense.update(layer.keys, layer.values, index)
    with torch.no_grad():
        ours, theirs = (model(new, position_ids=position, **{CACHE_NAME: c}).logits for c in (cache, dense))
    assert (ours - theirs).abs().max() <= BACKENDS[backend] * theirs.abs().max()


@pytest.mark.parametrize("chunk", [1, 7])
def test_held_tokens_do_not_depend_on_chunking(chunk):
    (_, whole), (_, parts) = filled(), filled(chunk=chunk)
    assert torch.equal(whole.layers[0].pages, parts.layers[0].pages[:, : whole.layers[0].counts[0]])
    for a, b in zip(table(whole.layers[0]), table(parts.layers[0]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("cut", "chunk"),
    [*((cut, None) for cut in (5, 12, 16, 20, 38, 47)), *((cut, 5) for cut in (5, 12, 20, 38, 47))],
)
def test_a_crop_leaves_no_trace(cut, chunk):
    """Cut into a page and grown again with the same tokens: the same pages, the same tokens held."""
    model, cache = filled(chunk=chunk)
    ids, layer = prompt(1, 60)[0], cache.layers[0]
    pages, held, keys = layer.pages[:, : layer.counts[0]].clone(), table(layer), layer.keys
    cache.crop(-cut)
    assert torch.equal(layer.keys, keys[:, :, : 60 - cut])
    inside = 4 + 8 * layer.counts[0]  # what is still in pages
    assert torch.equal(table(layer)[0], held[0][held[0] < inside])
    feed(model, cache, ids[:, 60 - cut :])
    assert torch.equal(layer.pages[:, : layer.counts[0]], pages)
    for a, b in zip(table(layer), held, strict=True):
        torch.testing.assert_close(a, b)


def test_a_crop_to_nothing_and_a_reset_hold_nothing():
    for act in (lambda cache: cache.crop(-60), lambda cache: cache.reset()):
        _, cache = filled()
        act(cache)
        assert all(layer.held is None for layer in cache.layers)
        assert cache.memory()["side_information"] == 0


def test_rows_do_not_influence_each_other():
    ids, mask = prompt(3, 60, pads=(0, 0, 21))
    ids[2, 21:] = ids[0, :39]
    _, together = filled(ids=ids, mask=mask)
    alone = table(filled(ids=ids[:1])[1].layers[0])
    assert torch.equal(table(together.layers[0], 0)[0], alone[0])
    for a, b in zip(table(together.layers[0], 0), alone, strict=True):
        torch.testing.assert_close(a, b)
    end = 4 + 8 * together.layers[0].counts[2]
    slots = table(together.layers[0], 2)[0] - 21
    assert torch.equal(slots, alone[0][alone[0] < end])
    assert not torch.equal(table(together.layers[0], 1)[0], alone[0])


def test_batch_edits_take_held_tokens_along():
    ids, mask = prompt(3, 60, pads=(0, 17, 5))
    model, cache = filled(ids=ids, mask=mask)
    layer = cache.layers[0]
    before, keys = [table(layer, row) for row in range(3)], layer.keys
    twin = copy.deepcopy(cache)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3, 5]))
    for row, old in enumerate((2, 0, 0)):
        for a, b in zip(table(layer, row), before[old], strict=True):
            assert torch.equal(a, b)
    assert torch.equal(layer.keys, keys[[2, 0, 0]])
    assert all(torch.equal(a, b) for a, b in zip(table(twin.layers[0], 1), before[1], strict=True))
    # Rows of one origin go their own ways.
    more = torch.randint(3, VOCABULARY, (3, 30), generator=torch.Generator().manual_seed(4))
    feed(model, cache, more)
    first, second = table(layer, 1)[0], table(layer, 2)[0]
    assert torch.equal(first[first < 52], second[second < 52])
    assert not torch.equal(first, second)


def test_sliding_layers_drop_what_no_query_sees():
    model, cache = filled("mistral-window")
    for _ in range(30):
        feed(model, cache, prompt(1, 5)[0])
        for layer in cache.layers:
            slots = table(layer)[0]
            assert (slots >= layer._page_slot(0, layer.dropped)).all()
            assert (slots < layer._dense_slot(0)).all()
    assert cache.layers[0].dropped > 10
    assert cache.layers[0].held.counts[0] > 0
    assert cache.layers[0].held.slots.shape[1] < 60  # room does not grow with the sequence


def test_memory_counts_held_tokens():
    ids, mask = prompt(2, 200, pads=(0, 9))
    _, cache = filled(ids=ids, mask=mask)
    _, plain = filled(rule=None, ids=ids, mask=mask)
    parts, without = cache.memory(), plain.memory()
    tokens = sum(layer.held.counts[row] for layer in cache.layers for row in range(2))
    assert tokens > 50
    assert parts["side_information"] - without["side_information"] == tokens * (2 * (16 + 16) * 2 + 8)
    assert {x: parts[x] for x in ("codes", "sinks", "recent", "tables")} == {
        x: without[x] for x in ("codes", "sinks", "recent", "tables")
    }
    held = sum(x.untyped_storage().nbytes() for y in cache.layers for x in (y.held.k, y.held.v, y.held.slots))
    assert parts["total"] - without["total"] == held
    assert parts["total"] == sum(size for name, size in parts.items() if name != "total")
    assert cache.bits_per_value() > plain.bits_per_value()


@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_generation_with_padding(name):
    """Rows that are padded generate what they generate alone."""
    model, (ids, mask) = tiny(name), prompt(3, 60, pads=(0, 20, 7))

    def generate(row, **more):
        options = {"max_new_tokens": 30, "do_sample": False, "attention_mask": mask[row]}
        cache = SeqKVCache(config=model.config, calibration=holding(name, by_content), backend="reference", **SMALL)
        out = model.generate(ids[row], **{CACHE_NAME: cache}, **options, **more)
        assert any(layer.held.table() for layer in cache.layers)
        return out[:, 60:]

    together = generate(slice(None))
    for row in range(3):
        assert torch.equal(generate(slice(row, row + 1))[0], together[row])
    assert generate(slice(None), num_beams=3).shape == (3, 30)
