"""Models that cache latents (MLA): coded, attended to as codes, in every mode the same as with DynamicCache."""

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
from models import LOSSLESS, SMALL, VOCABULARY, prompt
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV3Config, DynamicCache

import hf_seqkv
from hf_seqkv import SeqKVCache, calibrate
from hf_seqkv.codec.page import QuantizedPageCodec
from hf_seqkv.codec.vector import VectorCodec
from hf_seqkv.config import DATA_FREE
from hf_seqkv.errors import SeqKVWarning, UnsupportedModelError
from hf_seqkv.integration import attention, latent
from hf_seqkv.integration.compat import CACHE_NAME
from hf_seqkv.integration.latent import Expanded
from hf_seqkv.kernels.interface import DenseRun, LayerView, Scoring
from hf_seqkv.kernels.latent import attend_latents
from hf_seqkv.store.prefix_store import PrefixStore

NEW = {"max_new_tokens": 40, "do_sample": False}
SIZES = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=3, first_k_dense_replace=3, num_attention_heads=4,
    num_key_value_heads=4, vocab_size=VOCABULARY, kv_lora_rank=32, q_lora_rank=24, qk_rope_head_dim=8,
    qk_nope_head_dim=16, v_head_dim=12, pad_token_id=0, bos_token_id=1, eos_token_id=None, initializer_range=0.3,
    max_position_embeddings=512,
)  # fmt: skip
FREE = {name: DATA_FREE[name] for name in ("rotation", "codebook", "scale", "scale_bits", "seed")}
CONFIGS = {"v2": DeepseekV2Config, "v3": DeepseekV3Config}


@functools.cache
def deepseek(name: str = "v3"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name](**SIZES)).eval()


@pytest.fixture
def calls(monkeypatch):
    """Names of what was done with expanded keys and values, in turn."""
    seen = []

    def noted(name, function):
        return lambda *args: (seen.append(name), function(*args))[1]

    for name in ("attend", "materialize"):
        monkeypatch.setattr(Expanded, name, noted(name, getattr(Expanded, name)))
    return seen


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 13}, {"prompt_lookup_num_tokens": 4}],
    ids=["greedy", "beams", "chunks", "lookup"],
)  # fmt: skip
@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_are_those_of_dynamic_cache(name, options, calls):
    model, padded = deepseek(name), "prompt_lookup_num_tokens" not in options
    ids, mask = prompt(2, 45, pads=(0, 13)) if padded else prompt(1, 45)
    plain = model.generate(ids, attention_mask=mask, **NEW, **options)
    ours = {"cache_implementation": "seqkv", "cache_config": LOSSLESS}
    assert torch.equal(plain, model.generate(ids, attention_mask=mask, **NEW, **options, **ours))
    assert set(calls) == {"attend"}


def forced(model, cache, ids, first=30, step=3):
    """Logits of tokens from `first` on, some at a time."""
    with torch.no_grad():
        model(ids[:, :first], **{CACHE_NAME: cache})
        parts = [model(ids[:, at : at + step], **{CACHE_NAME: cache}).logits for at in range(first, ids.shape[1], step)]
    return torch.cat(parts, 1)


@pytest.mark.parametrize(("bits", "worst"), [(8, 0.05), (5, 0.3)])
@pytest.mark.parametrize("name", CONFIGS)
def test_codes_stay_close(name, bits, worst):
    model, (ids, _) = deepseek(name), prompt(2, 90)
    cache = SeqKVCache(config=model.config, key_bits=bits, **SMALL)
    wanted = forced(model, DynamicCache(config=model.config), ids)
    assert 0 < (forced(model, cache, ids) - wanted).norm() / wanted.norm() < worst
    codec = cache.layers[0].codec
    assert set(codec.key.widths.flatten().tolist()) == {bits}
    assert set(codec.value.widths.flatten().tolist()) == {8}  # rotary keys
    assert cache.layers[0].mean.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reading_codes_is_reading_what_they_stand_for(dtype, monkeypatch):
    """Attention over codes against `expand_kv` of the rebuilt latents; rows differ in padding and pages."""
    model, (ids, mask) = copy.deepcopy(deepseek()).to(dtype), prompt(3, 75, pads=(0, 29, 7))
    logits = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(Expanded, "obstacle", lambda self, scoring: "it must not")
            monkeypatch.setattr(attention, "_say_why", lambda name, reason: None)
        cache = SeqKVCache(config=model.config, **SMALL)
        with torch.no_grad():
            model(ids[:, :70], attention_mask=mask[:, :70], **{CACHE_NAME: cache})
            logits.append(model(ids[:, 70:], attention_mask=mask, **{CACHE_NAME: cache}).logits.float())
    assert len({tuple(layer.counts) for layer in cache.layers}) == 1
    assert len(set(cache.layers[0].counts)) > 1
    difference = (logits[0] - logits[1]).norm() / logits[1].norm()
    assert 0 < difference < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_attention_is_that_of_the_definition(sinks, softcap):
    """Sink logits and a softcap, to which the constant part of the latents matters."""
    codec = QuantizedPageCodec(
        *(VectorCodec.data_free(1, dim, 8, bits=bits, **FREE) for dim, bits in ((32, 5), (8, 8)))
    )
    pages = codec.encode(torch.randn(2, 3, 1, 8, 32), torch.randn(2, 3, 1, 8, 8))
    first, last = ([torch.randn(2, 1, n, dim) for dim in (32, 8)] for n in (4, 5))
    runs = DenseRun(*first, [0, 0], [0, 0]), DenseRun(*last, [28, 20], [0, 0])
    constant = SimpleNamespace(mean=torch.randn(2, 1, 32))
    view = LayerView(codec, pages, [3, 2], [4, 4], *runs, constant, 33, 0)
    query, logits = torch.randn(2, 6, 1, 40), 3 * torch.randn(6) if sinks else None
    scoring = Scoring(0.2, False, None, softcap, logits)
    found = attend_latents(query, view, None, scoring, QuantizedPageCodec.coordinates)
    for row, count in enumerate(view.counts):
        coded = [x[row, :count, 0].flatten(0, 1) for x in codec.decode(pages)]
        coded[0] = coded[0] + constant.mean[row]
        latents, turned = (torch.cat([a[row, 0], x, b[row, 0]]) for a, x, b in zip(first, coded, last, strict=True))
        scores = 0.2 * query[row, :, 0] @ torch.cat([latents, turned], 1).T
        scores = scores if softcap is None else softcap * (scores / softcap).tanh()
        if sinks:
            scores = torch.cat([scores, logits[:, None]], 1)
        wanted = scores.softmax(-1)[:, : len(latents)] @ latents
        torch.testing.assert_close(found[row, 0], wanted, atol=1e-5, rtol=1e-4)


def test_the_latent_is_far_smaller_than_dense():
    model, (ids, _) = deepseek(), prompt(1, 500)
    cache = SeqKVCache(config=model.config, key_bits=4, residual_length=32)
    with torch.no_grad():
        model(ids, **{CACHE_NAME: cache})
    assert cache.bits_per_value() < 6.2  # 32 latent components of 4 bits, 8 rotary ones of 8, two 8-bit scales, means
    parts = cache.memory()
    dense = 500 * 3 * 40 * 4
    assert parts["codes"] + parts["side_information"] < dense / 5


def test_sleeping_and_stored_prefixes(tmp_path):
    model, (ids, _) = deepseek(), prompt(1, 60)
    options = {"cache_implementation": "seqkv", "return_dict_in_generate": True, **NEW}
    with PrefixStore(tmp_path / "store") as store:
        first = model.generate(ids, cache_config=SMALL | {"prefix_store": store}, **options)
        store.flush()
        again = model.generate(ids, cache_config=SMALL | {"prefix_store": store}, **options)
    assert again[CACHE_NAME].prefixes.loaded >= 40
    for mine, theirs in zip(again[CACHE_NAME].layers, first[CACHE_NAME].layers, strict=True):
        assert torch.equal(mine.pages[0, :5], theirs.pages[0, :5])
    first[CACHE_NAME].save(tmp_path / "session")
    woken = SeqKVCache.load(tmp_path / "session", model)
    step = torch.tensor([[5]])
    with torch.no_grad():
        logits = [model(step, **{CACHE_NAME: cache}).logits for cache in (first[CACHE_NAME], woken)]
    assert torch.equal(*logits)


def test_weights_that_cannot_be_read_are_expanded(calls):
    """Another kind of layer in place of the projection (quantised, adapted): correct, and said once."""

    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    attention._say_why.cache_clear()
    model, (ids, _) = copy.deepcopy(deepseek()), prompt()
    for layer in model.model.layers:
        plain = layer.self_attn.kv_b_proj
        layer.self_attn.kv_b_proj = Scaled(plain.in_features, plain.out_features, bias=False)
        layer.self_attn.kv_b_proj.weight = plain.weight
    plain = model.generate(ids, **NEW)
    with pytest.warns(SeqKVWarning, match="a Scaled whose weights") as told:
        ours = model.generate(ids, cache_implementation="seqkv", cache_config=LOSSLESS, **NEW)
    assert len(told) == 1
    assert torch.equal(plain, ours)
    assert set(calls) == {"materialize"}


def test_another_expansion_is_left_alone(monkeypatch, calls):
    """A function that does more than multiply is found out by trying it."""
    model, (ids, _) = deepseek("v2"), prompt()
    kind = type(model.model.layers[0].self_attn)
    original = getattr(kind.expand_kv, "original", kind.expand_kv)

    def doubled(self, latents, rotary):
        keys, values = original(self, latents, rotary)
        return keys, 2 * values

    monkeypatch.setattr(latent, "_WRAPPED", set())
    monkeypatch.setattr(kind, "expand_kv", doubled)
    attention._say_why.cache_clear()
    plain = model.generate(ids, **NEW)
    with pytest.warns(SeqKVWarning, match="more than a product"):
        ours = model.generate(ids, cache_implementation="seqkv", cache_config=LOSSLESS, **NEW)
    assert torch.equal(plain, ours)
    assert set(calls) == {"materialize"}


def test_uninstall_gives_the_models_function_back():
    model = deepseek()
    kind = type(model.model.layers[0].self_attn)
    model.generate(prompt()[0], max_new_tokens=2, cache_implementation="seqkv")
    assert hasattr(kind.expand_kv, "original")
    hf_seqkv.uninstall()
    assert not hasattr(kind.expand_kv, "original")
    hf_seqkv.install()


def test_calibrations_are_refused_by_name():
    model = deepseek()

    def numbers(text, **options):
        return {"input_ids": [int(word) % 128 + 3 for word in text.split()]}

    numbers.bos_token_id = 1
    text = " ".join(str(i * i % 131) for i in range(600))
    with pytest.raises(UnsupportedModelError, match=r"MLA.*method='turboquant'"):
        calibrate(model, numbers, [text], tokens=256, window=128, sequence=False, progress=False)
    with pytest.raises(UnsupportedModelError, match=r"MLA.*method='turboquant'"):
        SeqKVCache(config=model.config, calibration="anything")
