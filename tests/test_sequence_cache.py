"""`SequenceCache`: what it attends to is what its stored pages decode to, and its bits are their bytes."""

import functools
import inspect

import pytest
import torch
from models import prompt, tiny
from test_calibration import make
from transformers import AutoModelForCausalLM, DynamicCache

from hf_seqkv.codec.center import rotate
from hf_seqkv.errors import CalibrationMismatchError, ConfigError, UnsupportedOperationError
from hf_seqkv.integration.compat import CACHE_NAME
from hf_seqkv.integration.sequence_cache import SequenceCache
from hf_seqkv.integration.tap import embed

PAGE, SINKS, TOKENS = 64, 4, 300
COMPONENTS = 2 * (16 + 16) * 3  # of a token of llama: KV heads, dims, layers


@functools.cache
def calibration(name="llama"):
    return make(name, tokens=2112, window=264, sequence=True)


def filled(name="llama", ids=None, mask=None, chunk=None, **options):
    """A model and its cache after a prefill, whole or in chunks."""
    model = tiny(name)
    cache = SequenceCache(model.config, calibration(name), **options)
    ids = prompt(1, TOKENS)[0] if ids is None else ids
    with torch.no_grad():
        for at in range(0, ids.shape[1], chunk or TOKENS):
            end = at + (chunk or TOKENS)
            seen = None if mask is None else mask[:, :end]
            positions = None if seen is None else (seen.cumsum(-1) - 1).clamp_min(0)[:, at:]
            model(ids[:, at:end], attention_mask=seen, position_ids=positions, **{CACHE_NAME: cache})
    return model, cache


def decoded(model, cache, pages, ids):
    """Keys and values of every layer, `[H, T, D]`, from stored pages alone and the row's own ids `[T]`."""
    span = ids[SINKS : SINKS + PAGE * len(pages)]
    embedded = embed(model, span.view(-1, PAGE)) if cache.sequence.predicts else None
    heads = [layer.codec.heads for layer in cache.layers]
    found = []
    for k, v in cache.sequence.decode(pages, embedded, heads):
        k, v = (x.transpose(0, 1).flatten(1, 2) for x in (k, v))
        if hasattr(model, "model"):  # with RoPE
            positions = torch.arange(SINKS, SINKS + len(span))[None]
            cos, sin = (x[0, :, : k.shape[-1] // 2] for x in model.model.rotary_emb(k, positions))
            k = rotate(k, torch.cat([cos, sin], -1), interleaved=False)
        found.append((k, v))
    return found


def assert_holds(model, cache, pages, ids, row=0):
    """The row's pages are what is decoded from `pages`."""
    for layer, (k, v) in zip(cache.layers, decoded(model, cache, pages, ids), strict=True):
        begin = layer.start[row] + SINKS
        at = slice(begin, begin + PAGE * len(pages))
        torch.testing.assert_close(layer.keys[row, :, at], k, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(layer.values[row, :, at], v, atol=1e-5, rtol=1e-5)


def error(cache, dense, row=0):
    """Relative error of all keys and values of a row."""
    pairs = [
        (getattr(a, part)[row, :, a.start[row] :], getattr(b, part)[row, :, a.start[row] :])
        for a, b in zip(cache.layers, dense.layers, strict=True)
        for part in ("keys", "values")
    ]
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


def dense_of(model, ids, **inputs):
    cache = DynamicCache()
    with torch.no_grad():
        model(ids, **{CACHE_NAME: cache}, **inputs)
    return cache


@pytest.mark.parametrize("profile", ["full", "light"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_stored_pages_are_what_is_attended_to(name, profile):
    model, cache = filled(name, profile=profile)
    ids = prompt(1, TOKENS)[0]
    assert len(cache.stored) == cache.layers[0].counts[0] == 4
    assert_holds(model, cache, cache.stored, ids[0])
    dense = dense_of(model, ids)
    assert 0 < error(cache, dense) < 0.3
    for layer, exact in zip(cache.layers, dense.layers, strict=True):  # sinks and recent tokens are dense
        for at in (slice(0, SINKS), slice(SINKS + 4 * PAGE, None)):
            torch.testing.assert_close(layer.keys[:, :, at], exact.keys[:, :, at], atol=1e-3, rtol=1e-3)


def test_pages_of_later_forwards():
    model, cache = filled(chunk=90)
    assert len(cache.stored) == 4
    assert_holds(model, cache, cache.stored, prompt(1, TOKENS)[0][0])


@pytest.mark.parametrize("pads", [(0, 0), (0, 30), (40, 7)])
def test_rows_and_padding(pads):
    """Rows that begin at other slots make their pages at other times."""
    ids, mask = prompt(2, TOKENS, pads=pads)
    model, cache = filled(ids=ids, mask=mask)
    assert cache.layers[0].start == list(pads)
    counts = cache.layers[0].counts
    assert len(cache.stored) == sum(counts)
    dense = dense_of(model, ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0))
    for row, pages in enumerate((cache.stored[: counts[0]], cache.stored[counts[0] :])):
        assert_holds(model, cache, pages, ids[row, pads[row] :], row)
        assert error(cache, dense, row) < 0.3


def test_bits_are_the_bytes():
    model, cache = filled()
    assert cache.stored_bits_per_value() == 8 * sum(map(len, cache.stored)) / (4 * PAGE * COMPONENTS)
    assert torch.tensor(SequenceCache(model.config, calibration()).stored_bits_per_value()).isnan()


def test_coarser_steps_take_less_and_err_more():
    dense = dense_of(tiny("llama"), prompt(1, TOKENS)[0])
    caches = [filled(step=step)[1] for step in (-8, 0, 8)]
    bits, errors = [x.stored_bits_per_value() for x in caches], [error(x, dense) for x in caches]
    assert bits == sorted(bits, reverse=True)
    assert errors == sorted(errors)
    assert errors[2] > 2 * errors[0]


def test_prediction_saves_bytes():
    """Random models have little to predict but the first layer, a function of the token alone."""
    full, light = (filled(profile=profile)[1].stored_bits_per_value() for profile in ("full", "light"))
    assert full < 0.95 * light


def test_hot_pages_hold_what_was_decoded():
    """On top of 8-bit hot pages: their error is added, and it is small."""
    _model, cache = filled(method="turboquant", key_bits=8, value_bits=8)
    _, exact = filled()
    assert cache.stored == exact.stored
    for a, b in zip(cache.layers, exact.layers, strict=True):
        assert 0 < (a.keys - b.keys).norm() < 0.02 * b.keys.norm()


def test_generate():
    model, ids = tiny("llama"), prompt(1, TOKENS)[0]
    cache = SequenceCache(model.config, calibration())
    out = model.generate(ids, **{CACHE_NAME: cache}, max_new_tokens=70, do_sample=False)
    assert out.shape[1] == TOKENS + 70
    assert len(cache.stored) == 5
    assert_holds(model, cache, cache.stored, out[0])


def test_a_crop_and_other_tokens():
    model, cache = filled()
    ids = prompt(1, TOKENS)[0]
    cache.crop(-200)  # into the second page
    other = torch.cat([ids[:, :100], ids[:, :200]], 1)
    with torch.no_grad():
        model(other[:, 100:], **{CACHE_NAME: cache})
    kept, new = cache.stored[:1], cache.stored[5:]  # the second page is made anew, of tokens as they were decoded
    assert len(cache.stored) == 4 + 3
    assert_holds(model, cache, kept, other[0])
    found = decoded(model, cache, kept + cache.stored[4:5] + new, other[0])
    for layer, (k, v) in zip(cache.layers, found, strict=True):
        for x, y in ((layer.keys, k), (layer.values, v)):
            torch.testing.assert_close(x[0, :, 132:260], y[:, 128:], atol=1e-4, rtol=1e-4)


def test_rows_that_are_reordered_take_their_ids_along():
    ids, mask = prompt(2, TOKENS)
    model, cache = filled(ids=ids, mask=mask)
    cache.reorder_cache(torch.tensor([1, 1]))
    before = len(cache.stored)
    with torch.no_grad():
        model(ids[:, :60], **{CACHE_NAME: cache})
    fresh = cache.stored[before:]
    assert len(fresh) == 2
    assert fresh[0] != fresh[1]
    row = torch.cat([ids[1], ids[0, :60]])[4 * PAGE :]
    values = decoded(model, cache, fresh[:1], row)[0][1]
    torch.testing.assert_close(cache.layers[0].values[0, :, 260:324], values, atol=1e-5, rtol=1e-5)


def test_a_reset_starts_anew():
    model, cache = filled()
    stored = cache.stored
    cache.reset()
    assert cache.stored == []
    with torch.no_grad():
        model(prompt(1, TOKENS)[0], **{CACHE_NAME: cache})
    assert cache.stored == stored


def test_a_failed_forward_leaves_nothing_after_a_reset():
    model, cache = tiny("llama"), SequenceCache(tiny("llama").config, calibration())

    def fail(*args):
        raise RuntimeError("stop here")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with torch.no_grad(), pytest.raises(RuntimeError, match="stop here"):
        model(prompt(2, TOKENS)[0][1:], **{CACHE_NAME: cache})
    handle.remove()
    cache.reset()
    assert not cache.coder._encoders
    with torch.no_grad():
        model(prompt(1, TOKENS)[0], **{CACHE_NAME: cache})
    expected = filled()[1]
    assert cache.stored == expected.stored
    assert cache.stored_bits_per_value() == expected.stored_bits_per_value()


def unmet(name):
    """A model like `tiny(name)` that no cache was used with yet."""
    model = AutoModelForCausalLM.from_config(tiny(name).config).eval()
    model.load_state_dict(tiny(name).state_dict())
    return model


@pytest.mark.parametrize("how", ["by name", "by position"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_ids_are_seen_from_the_first_forward_on(name, how):
    """However the cache is passed; hooks are put on a model within its first call."""
    model, ids = unmet(name), prompt(1, TOKENS)[0]
    cache = SequenceCache(model.config, calibration(name))
    before = list(inspect.signature(model.forward).parameters).index(CACHE_NAME) - 1
    for part in ids.split(200, 1):
        with torch.no_grad():
            if how == "by position":
                model(part, *[None] * before, cache)
            else:
                model(part, **{CACHE_NAME: cache})
    assert cache.stored == filled(name, chunk=200)[1].stored


def test_a_model_without_head_by_position():
    """Its own first call is the one that its hook cannot see: `bind` comes first."""
    model, ids = unmet("llama").model, prompt(1, TOKENS)[0]
    before = list(inspect.signature(model.forward).parameters).index(CACHE_NAME) - 1
    with torch.no_grad(), pytest.raises(UnsupportedOperationError, match=r"did not see.*bind\(model\)"):
        model(ids, *[None] * before, SequenceCache(model.config, calibration()))
    cache, model = SequenceCache(model.config, calibration()), unmet("llama").model
    cache.bind(model)
    with torch.no_grad():
        model(ids, *[None] * before, cache)
    assert cache.stored == filled()[1].stored


def test_embeddings_are_refused_by_name():
    model = tiny("llama")
    embeddings = model.get_input_embeddings()(prompt(1, TOKENS)[0])
    with torch.no_grad():
        with pytest.raises(UnsupportedOperationError, match=r"token ids.*input_ids"):
            model(inputs_embeds=embeddings, **{CACHE_NAME: SequenceCache(model.config, calibration())})
        light = SequenceCache(model.config, calibration(), profile="light")  # needs none
        model(inputs_embeds=embeddings, **{CACHE_NAME: light})
    assert light.stored == filled(profile="light")[1].stored


def test_what_cannot_be_done_is_said():
    model = tiny("llama")
    with pytest.raises(ConfigError, match=r"no sequence codec 'best' \(it has: full, light\)"):
        SequenceCache(model.config, calibration(), profile="best")
    with pytest.raises(CalibrationMismatchError, match="model_type"):
        SequenceCache(tiny("gpt2").config, calibration())
