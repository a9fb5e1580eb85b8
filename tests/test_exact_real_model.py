"""What the exact codec takes of hot pages of SmolLM2-135M-Instruct, on a text that nothing was fitted to."""

import pydoc_data.topics

import torch

from hf_seqkv import calibrate
from hf_seqkv.eval import bench_exact, passages, smollm2
from hf_seqkv.integration.gather import token_windows


def test_default_pages_take_at_most_three_quarters():
    model, tokenizer, _ = smollm2.load(torch.float32)
    text = "\n".join(pydoc_data.topics.topics.values())
    calibration = calibrate(model, tokenizer, [text], tokens=8192, progress=False)
    windows = token_windows(tokenizer, [text], 8192, 1028, 0)
    ids = passages.held_out(tokenizer, 1028)[0]
    found = bench_exact.measure(model, [ids], windows, calibration, {}, False, 1.0)
    assert 4.5 < found["hot"] < 4.7
    assert found["rows"][-1]["ratio"] <= 0.75
