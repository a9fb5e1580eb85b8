"""Position schemes: keys stay as rotated when frequencies change, and their constant part is found, or left alone."""

import copy
import functools

import pytest
import torch
from models import LOSSLESS, SMALL, VOCABULARY, prompt
from transformers import AutoModelForCausalLM, CohereConfig, DynamicCache, GlmConfig, LlamaConfig, PhiConfig

from hf_seqkv import SeqKVCache
from hf_seqkv.integration.compat import CACHE_NAME

CHANGE = 64  # position from which on LongRoPE and dynamic NTK have other frequencies
TOKENS = 120
FACTORS = [1.0 + 0.1 * i for i in range(8)]


def config(kind=LlamaConfig, **options):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCABULARY, "max_position_embeddings": 512}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "attention_bias": True}
    return kind(**sizes | options)


def rope(kind: str, **options) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **options}}


SCHEMES = {
    "yarn": lambda: config(**rope("yarn", factor=8.0, original_max_position_embeddings=CHANGE)),
    "llama3": lambda: config(
        **rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=CHANGE)
    ),
    "longrope": lambda: config(
        **rope(
            "longrope",
            factor=8.0,
            short_factor=FACTORS,
            long_factor=[4 * x for x in FACTORS],
            original_max_position_embeddings=CHANGE,
        )
    ),
    "dynamic": lambda: config(**rope("dynamic", factor=2.0), max_position_embeddings=CHANGE),
    "partial": lambda: config(PhiConfig, **rope("default", partial_rotary_factor=0.5)),
    "interleaved": lambda: config(CohereConfig, logit_scale=1.0),
    "interleaved partial": lambda: config(GlmConfig, **rope("default", partial_rotary_factor=0.5)),
}
LAYOUT = {"partial": (4, False), "interleaved": (8, True), "interleaved partial": (4, True)}
CHANGES = ("longrope", "dynamic")
schemes = pytest.mark.parametrize("name", SCHEMES)


@functools.cache
def model_of(name: str, bias: float = 0.0):
    """A tiny model with a scheme; `bias` is added to every seventh component of its keys."""
    torch.manual_seed(0)
    made = SCHEMES[name]()
    made.initializer_range = 0.3
    model = AutoModelForCausalLM.from_config(made).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.k_proj.bias).data[::7] += bias
    return model


def forced(model, cache) -> torch.Tensor:
    """Logits over a cache: 40 tokens, then steps of five across the change."""
    ids = prompt(2, TOKENS)[0]
    with torch.no_grad():
        logits = [model(ids[:, :40], **{CACHE_NAME: cache}).logits]
        logits += [model(part, **{CACHE_NAME: cache}).logits for part in ids[:, 40:].split(5, 1)]
    return torch.cat(logits, 1)


def page_errors(ours, dense) -> tuple[torch.Tensor, torch.Tensor]:
    """Root mean square error of the first layer's keys, of each page, and root mean square of its keys.

    Of the first layer, because what goes into others depends on codes.
    """
    layer, keys = ours.layers[0], dense.layers[0].keys
    pages = (layer.keys - keys)[:, :, 4 : 4 + 8 * layer.counts[0]].unflatten(2, (-1, 8))
    return pages.square().mean((0, 1, 3, 4)).sqrt(), keys.square().mean().sqrt()


@schemes
def test_frequencies_change_where_they_are_said_to(name):
    """Else the tests below show nothing: cosines of the same positions in a short and in a long sequence."""
    embedding, positions = copy.deepcopy(model_of(name).model.rotary_emb), torch.arange(TOKENS)[None]
    short, long = (embedding(torch.zeros(1, 1, 64), positions[:, :count])[0] for count in (40, TOKENS))
    assert torch.equal(short, long[:, :40]) == (name not in CHANGES)


@schemes
def test_lossless_pages_keep_every_key(name):
    model = model_of(name)
    dense, ours = DynamicCache(config=model.config), SeqKVCache(config=model.config, **LOSSLESS)
    torch.testing.assert_close(forced(model, ours), forced(model, dense), atol=1e-3, rtol=1e-4)
    for layer, expected in zip(ours.layers, dense.layers, strict=True):
        torch.testing.assert_close(layer.keys, expected.keys, atol=1e-4, rtol=1e-4)


@schemes
def test_tokens_across_the_change(name):
    model, (ids, mask) = model_of(name), prompt(2, 45, pads=(0, 29))
    options = {"attention_mask": mask, "max_new_tokens": 45, "do_sample": False}
    ours = {"cache_implementation": "seqkv", "cache_config": LOSSLESS}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, **options, **ours))


@schemes
def test_eight_bits_stay_close(name):
    """Logits, and keys of pages on both sides of the change."""
    model = model_of(name)
    dense, ours = DynamicCache(config=model.config), SeqKVCache(config=model.config, key_bits=8, value_bits=8, **SMALL)
    expected = forced(model, dense)
    assert 0 < (forced(model, ours) - expected).norm() / expected.norm() < 0.1
    errors, size = page_errors(ours, dense)
    assert len(errors) > (CHANGE + 16) / 8
    assert 0 < errors.min() <= errors.max() < 0.015 * size


@schemes
def test_constant_part_of_keys(name):
    """Removed from every page that fits the first one's frequencies; in others only where RoPE does not turn it."""
    model = model_of(name, bias=300.0)
    dense, ours = DynamicCache(config=model.config), SeqKVCache(config=model.config, **SMALL)
    forced(model, dense), forced(model, ours)
    table, pages = ours.table(0), ours.layers[0].counts[0]
    assert (table.half, table.interleaved) == LAYOUT.get(name, (8, False))
    before = (CHANGE - 4) // 8 if name in CHANGES else pages
    fits = table.starts[:, :pages].abs().sum(-1) > 0
    assert fits.tolist() == [[page < before for page in range(pages)]] * 2
    errors, size = page_errors(ours, dense)
    plain = model_of(name).model.layers[0]
    with torch.no_grad():
        varying = plain.self_attn.k_proj(plain.input_layernorm(model.model.embed_tokens(prompt(2, TOKENS)[0])))
    assert errors[:before].max() < 0.1 * varying.std()  # 5 bits of what differs between tokens
    assert errors.max() < 0.05 * size  # 5 bits of all of a key
