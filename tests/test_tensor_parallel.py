"""Two processes that share a model (`tp_plan="auto"`, gloo): each does what one process does (`rank_worker.py`)."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import rank_worker
import ranks
import torch
from models import LOSSLESS, SMALL, prompt
from test_calibration import TEXT, Words
from test_latent import deepseek
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_seqkv import SeqKVCache, SeqKVCalibration, calibrate
from hf_seqkv.codec.importance import count, features, of_heads
from hf_seqkv.errors import CalibrationMismatchError
from hf_seqkv.integration.compat import CACHE_NAME
from hf_seqkv.store.prefix_store import PrefixStore

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available())
    or torch.backends.mps.is_available(),
    reason="transformers splits a model over CPUs by gloo, and none on machines with MPS",
)
SECONDS = 300  # until processes that wait for each other are killed


def made() -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=131,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        initializer_range=0.3,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def fitted(model) -> SeqKVCalibration:
    """All that a calibration can have; of the tokens, those are held that random features of all heads tell."""
    calibration = calibrate(model, Words(), [TEXT], tokens=792, window=264, progress=False)
    for index in range(2):
        weights = torch.randn(count(4, 8), generator=torch.Generator().manual_seed(index)) / 6
        weights[-3:] = torch.tensor([0.01, 0.0, -1.5])
        calibration.tensors[f"{index}.held"] = weights
    return calibration


def wanted(model, calibration, folder) -> dict:
    """What one process makes of what the ranks will do."""
    found = {mode: ranks.generated(model, mode=mode) for mode in ranks.MODES}
    found["latents"] = ranks.generated(deepseek("v2"))
    found["one row"] = ranks.generated(model, rows=1)
    data_free, calibrated = ranks.prefilled(model), ranks.prefilled(model, calibration)
    found |= {"data-free": ranks.told(data_free), "calibrated": ranks.told(calibrated)}
    found["codes of all heads"] = sum(layer.pages.numel() for layer in data_free.layers)
    with torch.no_grad():
        found["step"] = model(prompt(1, 61)[0][:, -1:], **{CACHE_NAME: calibrated}).logits
    with PrefixStore(folder / "store of one process") as store:
        for rows in (1, 2):
            options = {"cache_implementation": "seqkv", "cache_config": {**LOSSLESS, "prefix_store": store}}
            ranks.generated(model, rows=rows, **options)
        store.flush()
        found["pages of two rows"] = store.stat()["entries"]
    return found


def start(folder, rank):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_SEQKV_BACKEND": "reference", "OMP_NUM_THREADS": "1"}
    environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks.RANKS)}
    with open(folder / f"log.{rank}", "w") as log:
        return subprocess.Popen([sys.executable, rank_worker.__file__, folder], env=environment, stdout=log, stderr=log)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the ranks have left what went wrong."""
    folder, model = tmp_path_factory.mktemp("ranks"), made()
    model.save_pretrained(folder / "model")
    deepseek("v2").save_pretrained(folder / "latents")
    calibration = fitted(model)
    calibration.save_pretrained(folder / "calibration")
    torch.save(wanted(model, calibration, folder), folder / "wanted.pt")
    cache = SeqKVCache(config=model.config, **SMALL)
    ranks.generated(model, cache=cache)
    cache.save(folder / "session of one process")
    running = [start(folder, rank) for rank in range(ranks.RANKS)]
    end = time.monotonic() + SECONDS
    for process in running:
        try:
            process.wait(max(0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return folder


@pytest.mark.parametrize("rank", range(ranks.RANKS))
@pytest.mark.parametrize("check", rank_worker.CHECKS)
def test_ranks(check, rank, folder):
    failed = folder / f"{check}.{rank}"
    assert not failed.exists(), failed.read_text()
    assert (folder / f"{check}.{rank}.passed").exists(), (folder / f"log.{rank}").read_text()[-3000:]


def test_one_process_refuses_a_session_of_ranks(folder):
    with pytest.raises(CalibrationMismatchError, match=r"process\.rank0-of-2.*this is rank 0 of 1"):
        SeqKVCache.load(folder / "for one process", made())
    with pytest.raises(CalibrationMismatchError, match="saved by rank 0 of 2"):
        SeqKVCache.load(folder / "for one process.rank0-of-2", made())


def test_codecs_of_ranks_are_those_of_their_heads(folder):
    calibration = SeqKVCalibration.from_pretrained(folder / "calibration")
    pages = torch.randn(2, 3, 4, 16, 8)  # keys and values
    whole = calibration.page_codec(1, 4, 8, 8, 16)
    expected = whole.decode(whole.encode(*pages))
    for rank in range(4):
        codec = calibration.page_codec(1, 1, 8, 8, 16, rank, 4)
        own = slice(rank, rank + 1)
        for mine, theirs in zip(codec.decode(codec.encode(*pages[:, :, own])), expected, strict=True):
            torch.testing.assert_close(mine, theirs[:, own])


def test_scores_of_ranks_add_up():
    k, v, positions, weights = torch.randn(9, 4, 8), torch.randn(9, 4, 8), torch.arange(9), torch.randn(count(4, 8))
    parts = [slice(0, 2), slice(2, 4)]
    scores = sum(features(k[:, at], v[:, at], positions) @ of_heads(weights, 4, at) for at in parts)
    torch.testing.assert_close(scores, features(k, v, positions) @ weights)
    assert torch.equal(of_heads(weights, 4, slice(0, 4)), weights)
