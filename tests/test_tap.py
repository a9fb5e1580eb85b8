"""What calibration sees of a model: keys before RoPE, and gradients, against the model's own and finite differences."""

import copy
import functools
import sys

import pytest
import torch
from models import prompt, tiny
from transformers import DynamicCache

from hf_seqkv.integration.compat import CACHE_NAME
from hf_seqkv.integration.tap import embed, run_window

TOKENS, FIRST = 60, 40
NAMES = ["llama", "gemma3", "gpt2", "gpt-neox"]
every_model = pytest.mark.parametrize("name", NAMES)
WINDOW = 24  # of gemma3's sliding layers


def ids():
    return prompt(1, TOKENS)[0][0]


@functools.cache
def double(name):
    """In fp64, where differences are exact enough to divide by."""
    return copy.deepcopy(tiny(name)).double()


def tapped(model, seed=0):
    coded = list(range(model.config.num_hidden_layers))
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return run_window(model, ids(), coded, FIRST, generator)


@every_model
def test_keys_and_values_are_the_models(name):
    model, cache = tiny(name), DynamicCache()
    with torch.no_grad():
        model(ids()[None], **{CACHE_NAME: cache})
    for tap, layer in zip(tapped(model), cache.layers, strict=True):
        torch.testing.assert_close(tap.keys, layer.keys[0], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(tap.values, layer.values[0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-neox"])
def test_plain_keys_are_those_before_rope(name, monkeypatch):
    """What the model hands to its own rotation, forward by forward."""
    model = tiny(name)
    module = sys.modules[type(model).__module__]
    rope, seen = module.apply_rotary_pos_emb, []

    def watched(q, k, *args, **kwargs):
        if k.shape[2] in (FIRST, TOKENS - FIRST):  # not a probe of its layout
            seen.append(k[0])
        return rope(q, k, *args, **kwargs)

    monkeypatch.setattr(module, "apply_rotary_pos_emb", watched)
    taps = tapped(model, None)
    layers = len(taps)
    assert len(seen) == 2 * layers
    for index, tap in enumerate(taps):
        before = torch.cat([seen[index], seen[layers + index]], 1)
        torch.testing.assert_close(tap.plain_keys(), before, atol=1e-4, rtol=1e-4)
        assert (tap.keys[:, 1:] - before[:, 1:]).abs().max() > 0.1
        turned = 2 * (tap.rows.shape[1] // 2)
        assert turned == (8 if name == "gpt-neox" else before.shape[-1])  # a part of the components
        torch.testing.assert_close(tap.keys[..., turned:], before[..., turned:], atol=1e-4, rtol=1e-4)


def test_plain_keys_without_rope():
    for tap in tapped(tiny("gpt2"), None):
        assert tap.rows.shape == (TOKENS, 0)
        assert torch.equal(tap.plain_keys(), tap.keys)
        assert tap.gradients is None


def sampled_loss(model, cache, seed=0, labels=None):
    """Summed loss of the second part, and its labels, drawn from the model's own predictions."""
    with torch.no_grad():
        logits = model(ids()[None, FIRST:], **{CACHE_NAME: copy.deepcopy(cache)}).logits[0]
    if labels is None:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.multinomial(logits.float().softmax(-1), 1, generator=generator)[:, 0]
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item(), labels


def slope(model, cache, layer, name, direction, labels, size=1e-3):
    """Change of the loss along a direction of a layer's cached keys or values."""
    losses = []
    for sign in (1, -1):
        moved = copy.deepcopy(cache)
        setattr(moved.layers[layer], name, getattr(moved.layers[layer], name) + sign * size * direction)
        losses.append(sampled_loss(model, moved, labels=labels)[0])
    return (losses[0] - losses[1]) / (2 * size)


@every_model
def test_gradients_are_slopes_of_the_loss(name):
    model, cache = double(name), DynamicCache()
    with torch.no_grad():
        model(ids()[None, :FIRST], **{CACHE_NAME: cache})
    _, labels = sampled_loss(model, cache)
    for layer, tap in enumerate(tapped(model)):
        for side, part in enumerate(("keys", "values")):
            gradient = tap.gradients[side].double()
            direction = gradient / gradient.norm() + 0.1 * torch.nn.functional.normalize(torch.randn_like(gradient))
            expected = slope(model, cache, layer, part, direction[None], labels)
            assert (gradient * direction).sum().item() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "gpt2"])
def test_plain_gradients_are_those_of_plain_keys(name):
    """The chain rule through RoPE: a step before it and the same step after it change the loss alike."""
    tap = tapped(tiny(name))[1]
    keys, values = tap.plain_gradients(FIRST)
    assert torch.equal(values, tap.gradients[1])
    step = torch.randn(*keys.shape)
    rows = tap.rows[:FIRST]
    half = rows.shape[1] // 2
    turned = step.clone()
    a, b = step[..., :half], step[..., half : 2 * half]
    turned[..., :half] = a * rows[:, :half] - b * rows[:, half:]
    turned[..., half : 2 * half] = b * rows[:, :half] + a * rows[:, half:]
    torch.testing.assert_close((keys * step).sum(), (tap.gradients[0] * turned).sum(), atol=1e-4, rtol=1e-4)
    assert keys.shape == tap.gradients[0].shape
    if half:
        assert not torch.allclose(keys, tap.gradients[0])


def test_sliding_layers_feel_their_window():
    """The second part's first token sees `WINDOW` tokens, itself one of them; nothing before is felt."""
    model = tiny("gemma3")
    kinds = model.config.layer_types
    assert {"sliding_attention", "full_attention"} == set(kinds)
    for kind, tap in zip(kinds, tapped(model), strict=True):
        felt = [gradient.abs().sum((0, 2)) > 0 for gradient in tap.gradients]
        for side in felt:
            side = torch.nn.functional.pad(side, (FIRST - len(side), 0))
            first = FIRST - WINDOW + 1 if kind == "sliding_attention" else 0
            assert not side[:first].any()
            assert side[first:].all()


def test_labels_are_the_generators():
    first, again, other = (tapped(tiny("llama"), seed)[0].gradients for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.allclose(first[0], other[0])


def test_parameters_get_no_gradients():
    model = tiny("llama")
    tapped(model)
    assert all(p.grad is None for p in model.parameters())


@every_model
def test_embeddings_have_one_length(name):
    found = embed(tiny(name), prompt(2, 5)[0])
    assert found.shape == (2, 5, 64)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.norm(dim=-1), torch.full((2, 5), 8.0), atol=1e-3, rtol=0)
    table = tiny(name).get_input_embeddings().weight[prompt(2, 5)[0]]
    torch.testing.assert_close(torch.cosine_similarity(found, table, dim=-1), torch.ones(2, 5))
