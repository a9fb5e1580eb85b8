"""Continuous batching: works beside this package as it does without, and refuses this cache by name."""

import pytest
import torch
from models import LOSSLESS, prompt, tiny
from transformers import ContinuousBatchingConfig, GenerationConfig

import hf_seqkv
from hf_seqkv import SeqKVCache
from hf_seqkv.errors import SeqKVWarning, UnsupportedOperationError
from hf_seqkv.integration.compat import CACHE_NAME
from hf_seqkv.integration.default_cache import use_by_default

SMALL = {"continuous_batching_config": ContinuousBatchingConfig(page_size=8, num_blocks=64, max_batch_tokens=64)}


def settings(**options):
    return GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0, **options)


def batch(model, **options):
    """Tokens of two requests with a common beginning, longer than a forward takes."""
    ids = prompt(1, 70)[0][0].tolist()
    given = {"generation_config": settings(), **SMALL, "warmup": False} | options
    results = model.generate_batch([ids, [*ids[:40], *ids[60:]]], **given)
    assert all(result.error is None for result in results.values())
    return [result.generated_tokens for result in results.values()]


def test_without_seqkv_it_is_left_alone():
    model, ids = tiny("llama"), prompt(1, 70)[0]
    plain = [
        model.generate(row, generation_config=settings())[0, row.shape[1] :].tolist()
        for row in (ids, torch.cat([ids[:, :40], ids[:, 60:]], 1))
    ]
    assert batch(model) == plain


@pytest.mark.parametrize(
    "options",
    [
        {"generation_config": settings(cache_implementation="seqkv")},
        {"cache_implementation": "seqkv"},
        {"cache_implementation": "seqkv", "cache_config": LOSSLESS},
        {CACHE_NAME: SeqKVCache(config=tiny("llama").config)},
    ],
    ids=["config", "keyword", "options", "cache"],
)
def test_seqkv_is_refused_by_name(options):
    with pytest.raises(UnsupportedOperationError, match=r"use generate\(\) with cache_implementation='seqkv', or"):
        batch(tiny("llama"), **options)


def test_every_way_in_refuses():
    model = tiny("llama")
    asked = settings(cache_implementation="seqkv")
    with pytest.raises(UnsupportedOperationError, match="paged cache of its own"):
        model.init_continuous_batching(asked)
    with (
        pytest.raises(UnsupportedOperationError, match="paged cache of its own"),
        model.continuous_batching_context_manager(generation_config=asked),
    ):
        pass


def test_model_whose_generation_config_asks(monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr(model, "generation_config", settings(cache_implementation="seqkv"))
    with pytest.raises(UnsupportedOperationError, match="generate_batch"):
        batch(model, generation_config=None)


def test_as_default_it_says_once_that_it_is_not_used():
    model = tiny("llama")
    plain = batch(model)
    try:
        use_by_default()
        with pytest.warns(SeqKVWarning, match="keeps its own paged cache") as told:
            assert batch(model) == plain
        assert len(told) == 1
        assert batch(model) == plain  # a second warning would be an error
    finally:
        hf_seqkv.uninstall()
        hf_seqkv.install()
    assert batch(model) == plain
