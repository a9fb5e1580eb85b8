"""Checks that every rank makes of a shared model: tokens, codes, calibrations, what is refused."""

import copy

import pytest
import torch
from models import LOSSLESS, SMALL, prompt
from ranks import MODES, PAGE, RANKS, assert_like_one_process, generated, prefilled, shared, warned
from test_calibration import TEXT, Words
from torch.distributed.tensor import DTensor
from transformers import DynamicCache

from hf_seqkv import SeqKVCache, SeqKVCalibration, calibrate
from hf_seqkv.errors import CalibrationMismatchError, ConfigError, SeqKVError, UnsupportedModelError
from hf_seqkv.integration.compat import CACHE_NAME
from hf_seqkv.integration.sequence_cache import SequenceCache
from hf_seqkv.integration.shards import shard_of

# Projections whose outputs all ranks gather, as Phi-3's and OLMo 2's: every rank has all heads.
GATHERED = {
    **{f"model.layers.*.self_attn.{name}_proj": "colwise_gather_output" for name in "qkv"},
    "model.layers.*.self_attn.o_proj": "rowwise_split_input",
}


def check_ranks_are_known(run):
    shard = shard_of(run.model)
    assert (shard.rank, shard.ranks) == (run.rank, RANKS)
    assert shard_of(run.model.model) == shard, "its weights tell"
    assert shard.gather(bytes([run.rank])) == [b"\0", b"\1"]
    assert shard.least(5 - run.rank, run.rank, -3) == [4, 0, -3]
    assert shard.sum(torch.tensor([1.5, run.rank])).tolist() == [3, 1]
    error = (ZeroDivisionError, "division") if run.rank else (SeqKVError, "another one failed")
    with pytest.raises(error[0], match=error[1]), shard.together():
        assert 1 / (1 - run.rank)


def check_tokens_are_those_of_the_dense_cache(run):
    for mode in MODES:
        dense = generated(run.model, cache=DynamicCache(config=run.model.config), mode=mode)
        ours = generated(run.model, mode=mode, cache_implementation="seqkv", cache_config=LOSSLESS)
        assert torch.equal(ours, dense), mode
        assert torch.equal(ours, run.wanted[mode]), mode


def check_each_rank_codes_its_heads(run):
    cache = prefilled(run.model)
    assert cache.layers[0].codec.heads == 2
    assert_like_one_process(run, cache, run.wanted["data-free"])
    assert torch.equal(copy.deepcopy(cache).layers[1].keys, cache.layers[1].keys)
    assert run.wanted["codes of all heads"] == RANKS * sum(layer.pages.numel() for layer in cache.layers)


def check_a_calibration_is_sliced(run):
    cache = prefilled(run.model, run.calibration)  # nor does it warn of other weights
    assert any(layer.held.counts[0] for layer in cache.layers)
    assert_like_one_process(run, cache, run.wanted["calibrated"])
    ours = generated(run.model, cache=SeqKVCache(config=run.model.config, calibration=run.calibration, **SMALL))
    assert torch.equal(ours[:, :62], run.wanted["greedy"][:, :62])
    ids = prompt(1, 61)[0][:, -1:]
    with torch.no_grad():
        logits = run.model(ids, **{CACHE_NAME: cache}).logits
    assert (logits - run.wanted["step"]).norm() < 1e-2 * run.wanted["step"].norm()


def check_other_weights_are_noticed(run):
    other = SeqKVCalibration(run.calibration.tensors, run.calibration.config | {"weights": "0" * 64})
    with warned(True, "other weights"):
        prefilled(run.model, other)


def check_what_needs_all_heads_is_refused(run):
    with run.store("sequence", form="sequence") as store, pytest.raises(ConfigError, match="form='hot'"):
        prefilled(run.model, run.calibration, prefix_store=store)
    with pytest.raises(ConfigError, match="form='hot'"):
        SequenceCache(run.model.config, run.calibration).bind(run.model)
    with pytest.raises(UnsupportedModelError, match="one process"):
        calibrate(run.model, Words(), [TEXT], tokens=264, window=264, progress=False)
    with pytest.raises(CalibrationMismatchError, match="for this model"):
        run.calibration.page_codec(0, 1, 8, 8, PAGE, run.rank, RANKS)


def check_latents(run):
    """All ranks hold them, each expands its own heads of them, and nothing is rebuilt for that."""
    model = shared(run.folder / "latents")
    ours = generated(model, cache_implementation="seqkv", cache_config=LOSSLESS)
    assert torch.equal(ours, run.wanted["latents"])
    assert isinstance(model.model.layers[0].self_attn.kv_b_proj.weight, DTensor)


def check_ranks_that_have_all_heads(run):
    model = shared(run.folder / "model", GATHERED)
    assert shard_of(model).ranks == RANKS
    ours = generated(model, cache_implementation="seqkv", cache_config=LOSSLESS)
    assert torch.equal(ours, run.wanted["greedy"])
    assert_like_one_process(run, prefilled(model, run.calibration), run.wanted["calibrated"], whole=True)
