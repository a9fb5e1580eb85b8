"""Models that multiply keys and values themselves: correct in every mode, never the dense history of a whole layer."""

import functools
import sys

import pytest
import torch
from models import LOSSLESS, SMALL, VOCABULARY, prompt, tiny
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CodeGenConfig,
    DynamicCache,
    FalconConfig,
    GPTJConfig,
    GPTNeoConfig,
    XGLMConfig,
)

from hf_seqkv import SeqKVCache
from hf_seqkv.errors import SeqKVWarning
from hf_seqkv.integration import direct, handle
from hf_seqkv.integration.compat import CACHE_NAME
from hf_seqkv.integration.handle import Handle
from hf_seqkv.kernels import cpu

_BASE = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "initializer_range": 0.3}
_GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "rotary_dim": 8}
_FALCON = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "gptj": lambda: GPTJConfig(**_GPT, **_BASE),
    "codegen": lambda: CodeGenConfig(**_GPT, **_BASE),
    "gpt_neo": lambda: GPTNeoConfig(
        hidden_size=64, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=24,
        max_position_embeddings=512, **_BASE,
    ),
    "bloom": lambda: BloomConfig(hidden_size=64, n_layer=2, n_head=4, **_BASE),
    "xglm": lambda: XGLMConfig(d_model=64, num_layers=2, attention_heads=4, ffn_dim=96, **_BASE),
    "falcon": lambda: FalconConfig(**_FALCON, **_BASE),
    "falcon-alibi": lambda: FalconConfig(**_FALCON, alibi=True, **_BASE),
}  # fmt: skip


@functools.cache
def model_of(name: str, dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]()).to(dtype).eval()


def calls_a_function(name: str) -> bool:
    """Whether attention is torch's own function, as Falcon's, or a registered one, as GPT-J's from 5.24 on."""
    return "falcon" in name or hasattr(sys.modules[type(model_of(name)).__module__], "ALL_ATTENTION_FUNCTIONS")


@pytest.fixture
def spans(monkeypatch):
    """Tokens that handles rebuilt at a time; windows are small, and warnings are given anew."""
    seen, original = [], Handle.materialize

    def materialize(self, begin=0, end=None):
        seen.append((self.shape[2] if end is None else end) - begin)
        return original(self, begin, end)

    monkeypatch.setattr(direct, "WINDOW", 24)
    monkeypatch.setattr(handle, "_SAID", set())
    monkeypatch.setattr(Handle, "materialize", materialize)
    return seen


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.filterwarnings("ignore:this model runs on rebuilt:hf_seqkv.errors.SeqKVWarning")
def test_tokens_are_those_of_dynamic_cache(name, options, spans):
    model, (ids, mask) = model_of(name), prompt(2, 45, pads=(0, 13))
    new = {"max_new_tokens": 40, "do_sample": False, "attention_mask": mask, **options}
    plain = model.generate(ids, **new)
    assert torch.equal(plain, model.generate(ids, cache_implementation="seqkv", cache_config=LOSSLESS, **new))
    assert max(spans, default=0) <= 24
    assert bool(spans) != calls_a_function(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", ["gptj", "bloom", "falcon"])
@pytest.mark.filterwarnings("ignore:this model runs on rebuilt:hf_seqkv.errors.SeqKVWarning")
def test_eight_bits_stay_close(name, dtype, spans):
    model, (ids, _), logits = model_of(name, dtype), prompt(2, 90), []
    for cache in (
        DynamicCache(config=model.config),
        SeqKVCache(config=model.config, key_bits=8, value_bits=8, **SMALL),
    ):
        with torch.no_grad():
            model(ids[:, :40], **{CACHE_NAME: cache})
            parts = [model(ids[:, at : at + 5], **{CACHE_NAME: cache}).logits for at in range(40, 90, 5)]
        logits.append(torch.cat(parts, 1).float())
    assert 0 < (logits[0] - logits[1]).norm() / logits[0].norm() < 0.1
    assert max(spans, default=0) <= 24


def test_it_is_said_once(spans):
    model, (ids, _) = model_of("gpt_neo"), prompt()
    options = {"max_new_tokens": 3, "cache_implementation": "seqkv"}
    with pytest.warns(SeqKVWarning, match=r"multiplies them, 24 tokens at a time") as told:
        model.generate(ids, **options)
    assert len(told) == 1
    model.generate(ids, **options)  # a second warning would be an error


def pair(options=SMALL) -> tuple[Handle, Handle]:
    """Keys and values of a layer after a ragged prompt."""
    model, (ids, mask) = tiny("llama"), prompt(2, 70, pads=(0, 29))
    cache = SeqKVCache(config=model.config, **options)
    with torch.no_grad():
        model(ids, attention_mask=mask, **{CACHE_NAME: cache})
    return cache.layers[1]._handles(None)


@pytest.mark.parametrize("begin", [0, 1, 4, 27, 40, 69])
@pytest.mark.parametrize("tokens", [1, 8, 30])
def test_a_span_is_a_part_of_the_whole(begin, tokens):
    for x in pair():
        end = min(begin + tokens, 70)
        assert torch.equal(x.materialize(begin, end), x.materialize()[:, :, begin:end])


@pytest.mark.filterwarnings("ignore:this model runs on rebuilt:hf_seqkv.errors.SeqKVWarning")
def test_products_are_those_of_dense_tensors(spans):
    keys, values = pair()
    k, v = keys.materialize(), values.materialize()
    queries, weights = torch.randn(2, 2, 3, 16), torch.rand(2, 2, 3, 70)
    flat_q, flat_w = queries.flatten(0, 1), weights.flatten(0, 1)
    added = torch.randn(4, 3, 70)
    del spans[:]
    cases = [
        (queries @ keys.transpose(-1, -2), queries @ k.transpose(-1, -2)),
        (torch.matmul(queries, keys.transpose(2, 3)), queries @ k.transpose(-1, -2)),
        (weights @ values, weights @ v),
        (torch.matmul(weights.double(), values.to(torch.float64)), weights.double() @ v.double()),
        (torch.bmm(flat_q, keys.reshape(4, -1, 16).transpose(1, 2)), flat_q @ k.flatten(0, 1).transpose(1, 2)),
        (torch.bmm(flat_w, values.view(4, 70, 16)), flat_w @ v.flatten(0, 1)),
        (
            added.baddbmm(flat_q, keys.reshape(4, 70, 16).transpose(-1, -2), beta=0.5, alpha=2),
            added.baddbmm(flat_q, k.flatten(0, 1).transpose(-1, -2), beta=0.5, alpha=2),
        ),
    ]
    assert max(spans) <= 24
    for found, wanted in cases:
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:this model runs on rebuilt:hf_seqkv.errors.SeqKVWarning")
def test_everything_else_takes_the_dense_tensor(spans):
    keys, values = pair()
    k, v = keys.materialize(), values.materialize()
    query, mask = torch.randn(2, 4, 3, 16), torch.rand(2, 1, 3, 70) > 0.3
    mask[1, :, :, :29] = False  # padding
    attention = torch.nn.functional.scaled_dot_product_attention
    repeated = [x.repeat_interleave(2, 1) for x in (k, v)]
    cases = [
        (keys.transpose(0, 1), k.transpose(0, 1)),
        (keys.reshape(2, 2, -1), k.reshape(2, 2, -1)),
        (keys.transpose(2, 3) * 2, k.transpose(2, 3) * 2),
        (keys.repeat_interleave(2, 1), repeated[0]),
        (torch.cat([keys, values], -1), torch.cat([k, v], -1)),
        (attention(query[:, :2], keys, values, is_causal=True), attention(query[:, :2], k, v, is_causal=True)),
    ]
    for found, wanted in cases:
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    # This one attends to the codes, within what the kernel promises.
    found, wanted = attention(query, keys, values, mask, enable_gqa=True), attention(query, *repeated, mask)
    torch.testing.assert_close(found, wanted, atol=cpu.tolerance() * wanted.abs().max().item(), rtol=0)
