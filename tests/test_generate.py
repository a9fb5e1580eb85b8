"""Every generation mode gives DynamicCache's tokens with lossless pages, on every kind of attention."""

import contextlib
import copy

import pytest
import torch
from models import CONFIGS, LOSSLESS, SMALL, prompt, tiny
from transformers import DynamicCache, pipeline

from hf_seqkv import SeqKVCache
from hf_seqkv.integration.compat import CACHE_NAME

NEW = 40


def greedy(model, ids, mask, cache=None, **options):
    """Tokens, with `cache_config` for ours or upstream's default."""
    if cache is not None:
        options |= {"cache_implementation": "seqkv", "cache_config": cache}
    return model.generate(ids, attention_mask=mask, max_new_tokens=NEW, **({"do_sample": False} | options))


def repetitive(ids):
    """A prompt that repeats itself, so that prompt lookup finds candidates, right and wrong ones."""
    return torch.cat([ids, ids[:, :20], ids[:, 5:25]], 1)


MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 0.8},
    "beam-sampling": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
    "return-sequences": {"do_sample": True, "num_return_sequences": 3},
    "chunked-prefill": {"prefill_chunk_size": 17},
    "prompt-lookup": {"prompt_lookup_num_tokens": 6},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_are_those_of_dynamic_cache(name, mode):
    model, (ids, mask) = tiny(name), prompt()
    if mode == "prompt-lookup":
        ids = repetitive(ids)
        mask = torch.ones_like(ids)
    results = []
    for cache in (None, LOSSLESS):
        torch.manual_seed(3)
        results.append(greedy(model, ids, mask, cache, **MODES[mode]))
    assert torch.equal(*results)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"prefill_chunk_size": 13}], ids=["greedy", "beams", "chunks"]
)
@pytest.mark.parametrize("name", CONFIGS)
def test_left_padding(name, options):
    model, (ids, mask) = tiny(name), prompt(3, 45, pads=(0, 29, 7))
    assert torch.equal(greedy(model, ids, mask, **options), greedy(model, ids, mask, LOSSLESS, **options))


@pytest.mark.parametrize("name", CONFIGS)
def test_assisted_decoding(name):
    """The draft is a copy with other weights: some candidates are taken, some are cropped."""
    model, (ids, mask) = tiny(name), prompt()
    draft = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.mul_(1.01).add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.01)
    plain = greedy(model, ids, mask, assistant_model=draft)
    assert torch.equal(plain, greedy(model, ids, mask, LOSSLESS, assistant_model=draft))


@pytest.mark.parametrize("name", CONFIGS)
def test_multi_turn(name):
    """A cache that is handed on from turn to turn, as in a chat."""
    model, (ids, _) = tiny(name), prompt()
    results = []
    for cache in (DynamicCache(config=model.config), SeqKVCache(config=model.config, **LOSSLESS)):
        turn = ids
        for extra in (ids[:, :11], ids[:, 20:21], None):
            turn = model.generate(turn, **{CACHE_NAME: cache}, max_new_tokens=12, do_sample=False)
            if extra is not None:
                turn = torch.cat([turn, extra], 1)
        results.append(turn)
    assert torch.equal(*results)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_eight_bits_stay_close(name, attention):
    """Lossy, so logits instead of tokens: teacher-forced over pages that fill, windows that slide."""
    model, (ids, _) = tiny(name), prompt(2, 90)
    before = model.config._attn_implementation
    model.set_attn_implementation(attention)
    try:
        logits = []
        for cache in (
            DynamicCache(config=model.config),
            SeqKVCache(config=model.config, key_bits=8, value_bits=8, **SMALL),
        ):
            with torch.no_grad():
                model(ids[:, :40], **{CACHE_NAME: cache})
                logits.append(
                    torch.cat([model(ids[:, at : at + 5], **{CACHE_NAME: cache}).logits for at in range(40, 90, 5)], 1)
                )
    finally:
        model.set_attn_implementation(before)
    error = (logits[0] - logits[1]).norm() / logits[0].norm()
    assert 0 < error < 0.1  # a wrong mask or position gives about 1


def test_pipeline_and_saved_generation_config(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    model = copy.deepcopy(tiny("llama"))
    vocabulary = {f"w{i}": i for i in range(131)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2")
    GenerationConfig(cache_implementation="seqkv", cache_config=LOSSLESS).save_pretrained(tmp_path)
    saved = GenerationConfig.from_pretrained(tmp_path)
    assert saved.cache_implementation == "seqkv"
    assert saved.cache_config == LOSSLESS
    text = " ".join(f"w{i}" for i in range(5, 50))
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 30, "max_length": None, "do_sample": False}
    plain = generate(text, **options)
    assert plain == generate(text, cache_implementation="seqkv", cache_config=LOSSLESS, **options)


def test_default_options_without_cache_config():
    model, (ids, mask) = tiny("llama"), prompt(1, 200)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=4, cache_implementation="seqkv", return_dict_in_generate=True
    )
    cache = out[CACHE_NAME]
    assert type(cache) is SeqKVCache
    assert cache.seqkv_config.method == "turboquant"
    assert cache.layers[0].counts == [2]  # (203 - 4 - 32) // 64


@pytest.mark.parametrize("call", ["generate", "model", "model without head"])
def test_older_name_of_a_cache(call):
    """`past_key_values` reaches the cache everywhere, with transformers' own warning where it prefers another."""
    model, (ids, mask) = tiny("llama"), prompt()
    run = {"generate": model.generate, "model": model, "model without head": model.model}[call]
    options = {"max_new_tokens": 1, "return_dict_in_generate": True} if call == "generate" else {}
    told = pytest.warns(FutureWarning, match="past_key_values") if CACHE_NAME == "cache" else contextlib.nullcontext()
    cache = SeqKVCache(config=model.config)
    cache.bind(model)
    with torch.no_grad(), told:
        out = run(ids, attention_mask=mask, past_key_values=cache, **options)
    assert out.past_key_values is cache
    assert torch.equal(cache.ids, ids)
