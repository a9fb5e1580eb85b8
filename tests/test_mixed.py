"""Layers that keep more than keys and values: these as codes, the rest as upstream has it, nothing stored by halves."""

import functools

import pytest
import torch
from models import LOSSLESS, SMALL, VOCABULARY, prompt
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from hf_seqkv import SeqKVCache
from hf_seqkv.errors import SeqKVWarning, UnsupportedModelError, UnsupportedOperationError
from hf_seqkv.integration.compat import CACHE_NAME
from hf_seqkv.integration.handle import Handle
from hf_seqkv.integration.latent import Expanded
from hf_seqkv.integration.mixed import HybridLayer, IndexedLayer

_BASE = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=VOCABULARY, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=None, initializer_range=0.3,
    max_position_embeddings=512,
)  # fmt: skip
SIZES = {
    "falcon_h1": dict(mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16, mamba_chunk_size=8),
    "deepseek_v32": dict(
        num_key_value_heads=4, head_dim=8, first_k_dense_replace=3, kv_lora_rank=32, q_lora_rank=24, v_head_dim=16,
        qk_rope_head_dim=8, qk_nope_head_dim=16, index_n_heads=2, index_head_dim=16, index_topk=24,
    ),
    "qwen3_next": dict(
        num_hidden_layers=4, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
        linear_value_head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    ),
}  # fmt: skip
KINDS = {"falcon_h1": HybridLayer, "deepseek_v32": IndexedLayer}


@functools.cache
def model_of(name: str):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **_BASE | SIZES[name])).eval()


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 13}], ids=["greedy", "beams", "chunks"]
)
@pytest.mark.parametrize("name", KINDS)
def test_tokens_are_those_of_dynamic_cache(name, options, monkeypatch):
    model, (ids, mask) = model_of(name), prompt(2, 45, pads=(0, 13))
    new = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False, **options}
    plain, fused = model.generate(ids, **new), []
    for kind in (Handle, Expanded):
        attend = kind.attend
        monkeypatch.setattr(kind, "attend", lambda *args, attend=attend: (fused.append(1), attend(*args))[1])
    ours = model.generate(
        ids, cache_implementation="seqkv", cache_config=LOSSLESS, return_dict_in_generate=True, **new
    )
    assert torch.equal(plain, ours.sequences)
    assert {type(layer) for layer in ours[CACHE_NAME].layers} == {KINDS[name]}
    assert len(fused) >= 3 * 39


@pytest.mark.parametrize("name", KINDS)
def test_edited_as_a_whole(name):
    """Rows reordered and the cache reset take the other states along."""
    model, (ids, _) = model_of(name), prompt(3, 50)
    order, logits = torch.tensor([2, 0, 0]), []
    for cache in (DynamicCache(config=model.config), SeqKVCache(config=model.config, **LOSSLESS)):
        for _ in range(2):
            with torch.no_grad():
                model(ids[:, :45], **{CACHE_NAME: cache})
                cache.reorder_cache(order)
                step = model(ids[order, 45:46], **{CACHE_NAME: cache}).logits
            cache.reset()
        logits.append(step)
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_candidates_are_taken_back_of_the_indexer_too():
    model, (ids, _) = model_of("deepseek_v32"), prompt(1, 30)
    ids = torch.cat([ids, ids, ids[:, :15]], 1)
    new = {"max_new_tokens": 40, "do_sample": False, "prompt_lookup_num_tokens": 6}
    plain = model.generate(ids, **new)
    assert torch.equal(plain, model.generate(ids, cache_implementation="seqkv", cache_config=LOSSLESS, **new))


@pytest.mark.parametrize("name", KINDS)
def test_other_states_are_counted(name):
    model, (ids, _) = model_of(name), prompt(1, 60)
    cache = SeqKVCache(config=model.config, **SMALL)
    with torch.no_grad():
        model(ids, **{CACHE_NAME: cache})
    layer = cache.layers[0]
    held = [layer.indexer_keys] if name == "deepseek_v32" else [layer.conv_states[0], layer.recurrent_states[0]]
    assert cache.memory()["uncompressed"] == 3 * sum(x.numel() * x.element_size() for x in held)
    assert cache.memory()["total"] == sum(n for part, n in cache.memory().items() if part != "total")


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.filterwarnings("ignore:qwen3_next. layers of type:hf_seqkv.errors.SeqKVWarning")
def test_nothing_is_stored_by_halves(name, tmp_path):
    """Pages without the states beside them would be wrong tokens."""
    model, (ids, _) = model_of(name), prompt(1, 60)
    with pytest.raises(UnsupportedModelError, match=r"keep more than keys and values.*leave prefix_store out"):
        SeqKVCache(config=model.config, prefix_store=tmp_path)
    cache = SeqKVCache(config=model.config, **SMALL)
    with torch.no_grad():
        model(ids, **{CACHE_NAME: cache})
    with pytest.raises(UnsupportedOperationError, match="keep more than keys and values"):
        cache.save(tmp_path / "session")


def test_linear_attention_of_its_own_is_counted():
    model, (ids, _) = model_of("qwen3_next"), prompt(1, 60)
    with pytest.warns(SeqKVWarning, match="LinearAttentionLayer"):
        cache = SeqKVCache(config=model.config, **SMALL)
    with torch.no_grad():
        model(ids, **{CACHE_NAME: cache})
    linear = cache.layers[0]
    states = linear.conv_states[0], linear.recurrent_states[0]
    assert cache.memory()["uncompressed"] == 3 * sum(x.numel() * x.element_size() for x in states)
