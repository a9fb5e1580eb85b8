"""Importing, installing, uninstalling: what changes in transformers, and that it can be taken back."""

import subprocess
import sys

import pytest
import torch
from models import LOSSLESS, prompt, tiny
from transformers import DynamicCache, GenerationConfig, T5Config, T5ForConditionalGeneration
from transformers.generation.utils import GenerationMixin
from transformers.modeling_utils import AttentionInterface

import hf_seqkv
from hf_seqkv import SeqKVCache
from hf_seqkv.errors import ConfigError, SeqKVWarning, UnsupportedModelError
from hf_seqkv.integration import attention, handle
from hf_seqkv.integration.compat import CACHE_NAME


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


CHECK = """
from transformers import GenerationConfig
print(GenerationConfig(cache_implementation="seqkv").cache_implementation)
from transformers.generation.utils import GenerationMixin
import transformers.modeling_utils
print(hasattr(GenerationMixin._prepare_cache_for_generation, "seqkv_original"))
"""


@pytest.mark.parametrize(
    "order", ["import hf_seqkv\nimport transformers", "import transformers.modeling_utils\nimport hf_seqkv"]
)
def test_import_registers_in_either_order(order):
    assert python(order + CHECK).split() == ["seqkv", "True"]


def test_submodule_first():
    assert python("from hf_seqkv.integration.cache import SeqKVCache\nprint(SeqKVCache.__name__)") == "SeqKVCache"


def test_uninstall_takes_everything_back():
    model, (ids, mask) = tiny("llama"), prompt()
    model.generate(ids, attention_mask=mask, max_new_tokens=2, cache_implementation="seqkv")
    module = model.model.layers[0].self_attn
    assert module._forward_pre_hooks
    try:
        hf_seqkv.uninstall()
        assert not module._forward_pre_hooks
        assert "eager" not in AttentionInterface._global_mapping
        assert not hasattr(AttentionInterface._global_mapping["sdpa"], "original")
        assert not hasattr(GenerationMixin._prepare_cache_for_generation, "seqkv_original")
        with pytest.raises(ValueError, match="cache_implementation"):
            GenerationConfig(cache_implementation="seqkv")
        hf_seqkv.uninstall()
    finally:
        hf_seqkv.install()
        hf_seqkv.install()
    assert not hasattr(GenerationMixin._prepare_cache_for_generation.seqkv_original, "seqkv_original")
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=2, cache_implementation="seqkv", return_dict_in_generate=True
    )
    assert isinstance(out[CACHE_NAME], SeqKVCache)


def test_others_are_left_alone():
    model, (ids, mask) = tiny("llama"), prompt()
    out = model.generate(ids, attention_mask=mask, max_new_tokens=2, return_dict_in_generate=True)
    assert type(out[CACHE_NAME]) is DynamicCache


def test_conflicts_and_wrong_models_are_said():
    model, (ids, mask) = tiny("llama"), prompt()
    options = {"attention_mask": mask, "max_new_tokens": 2, "cache_implementation": "seqkv"}
    with pytest.raises(ValueError, match="unsupported"):
        model.generate(ids, **{CACHE_NAME: DynamicCache(config=model.config)}, **options)
    own = SeqKVCache(config=model.config, **LOSSLESS)
    model.generate(ids, **{CACHE_NAME: own}, **{k: v for k, v in options.items() if k != "cache_implementation"})
    assert own.get_seq_length() == 46
    with pytest.raises(ConfigError, match="must be a dict"):
        model.generate(ids, cache_config=["key_bits"], **options)
    with pytest.raises(ConfigError, match="key_bit"):
        model.generate(ids, cache_config={"key_bit": 4}, **options)
    encoder_decoder = T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=20, decoder_start_token_id=0)
    )
    with pytest.raises(UnsupportedModelError, match="EncoderDecoderCache"):
        encoder_decoder.generate(torch.tensor([[3, 4]]), cache_implementation="seqkv", max_new_tokens=2)


def test_direct_forward_attaches_the_model():
    """Without generate nobody introduces cache and model; the first call does."""
    model = tiny("qwen3")
    hf_seqkv.uninstall()
    hf_seqkv.install()
    cache = SeqKVCache(config=model.config, page_size=8, residual_length=8)
    with torch.no_grad():
        model(prompt()[0], **{CACHE_NAME: cache})
    table = cache.table(0)
    assert table.half == 8  # RoPE was captured
    assert cache.layers[0].mean.abs().sum() > 0


def test_unknown_attention_is_rebuilt_and_said(monkeypatch):
    """ALiBi is added inside BLOOM's own attention: correct through dense keys, with one warning."""
    from transformers import BloomConfig, BloomForCausalLM, Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "vocab_size": 131, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    bloom = BloomForCausalLM(BloomConfig(n_layer=2, n_head=4, **shape)).eval()
    gemma = Gemma2ForCausalLM(
        Gemma2Config(
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=32,
            sliding_window=24, attn_logit_softcapping=2.0, **shape,
        )
    ).eval()  # fmt: skip
    ids, mask = prompt(2, 40, pads=(9, 0))
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    ours = {"cache_implementation": "seqkv", "cache_config": LOSSLESS}
    monkeypatch.setattr(handle, "_SAID", set())
    with pytest.warns(SeqKVWarning, match="rebuilt dense keys and values: its own attention multiplies") as told:
        found = bloom.generate(ids, **options, **ours)
    assert len(told) == 1
    assert torch.equal(bloom.generate(ids, **options), found)
    assert torch.equal(gemma.generate(ids, **options), gemma.generate(ids, **options, **ours))


def test_eager_functions_are_probed():
    model = tiny("llama")
    module = model.model.layers[0].self_attn
    eager = attention._eager(module)
    query = torch.randn(1, 4, 1, 16)

    def scaled_twice(*args, **kwargs):
        out, weights = eager(*args, **kwargs)
        return out * 2, weights

    assert attention._same_as_ours(module, eager, query, {"scaling": 0.25})
    assert not attention._same_as_ours(module, scaled_twice, query, {"scaling": 0.25})


def test_attention_weights_are_not_silently_missing():
    model = tiny("llama")
    cache = SeqKVCache(config=model.config, **LOSSLESS)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    attention._say_why.cache_clear()
    try:
        with torch.no_grad():
            model(prompt()[0], **{CACHE_NAME: cache})
            with pytest.warns(SeqKVWarning, match="output_attentions"):
                out = model(prompt()[0][:, :1], **{CACHE_NAME: cache}, output_attentions=True)
    finally:
        model.set_attn_implementation(before)
    assert out.attentions[0].shape == (1, 4, 1, 46)
