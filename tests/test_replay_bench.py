"""`seqkv bench replay`, on a tiny model."""

import json

import pytest
from models import tiny
from test_calibration import Words

from hf_seqkv.cli import main
from hf_seqkv.eval import bench_replay, passages, smollm2

TEXT = " ".join(str((7 * i * i + 3 * i) % 127) for i in range(300))


@pytest.fixture(autouse=True)
def _demo(monkeypatch):
    monkeypatch.setattr(smollm2, "load", lambda dtype: (tiny("llama").to(dtype), Words(), "tiny"))
    monkeypatch.setattr(passages, "read", lambda name: TEXT[name == "king_james" :])


def test_bits_ratios_and_costs(capsys):
    assert main(["bench", "replay", "--tokens", "40", "--json"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out.splitlines()[-1])
    assert found["tokens"] == 40
    assert list(found["texts"]) == ["jargon_file", "king_james"]
    for text in found["texts"].values():
        assert text["bits"]["raw"] == 8
        assert text["model_stream"] == pytest.approx(text["bits"]["model"] - 8 * 52 / 40)
    caches = found["caches"]
    assert [cache["values_per_token"] for cache in caches.values()] == [3 * 2 * 2 * 16, 163_840, 1_310_720]
    assert [cache["turboquant_bits_per_token"] for cache in caches.values()] == [192 * 4, 512_000, 4_096_000]
    mean = sum(text["bits"]["static"] for text in found["texts"].values()) / 2
    for cache in caches.values():
        assert cache["ratios"]["static"] == pytest.approx(cache["turboquant_bits_per_token"] / mean)
    assert all(seconds > 0 for seconds in found["seconds"].values())
    assert found["read"]["bf16"]["bytes"] == 39 * 192 * 2
    for said in ("TurboQuant at 3 bits is larger by", "restore by steps", "restore by prefill", "512,000"):
        assert said in shown.err


def test_a_text_that_is_too_short(capsys):
    assert main(["bench", "replay", "--tokens", "301"]) == 1
    assert "jargon_file has 300 tokens, --tokens asks for 301" in capsys.readouterr().err


def test_the_quoted_ratio():
    """914,000 for 64 KV heads is of 3 bits flat and 4.3 bits a token; a scale of 16 bits adds a 24th."""
    values, dim = bench_replay.QUOTED["80 layers, 64 KV heads of 128"]
    assert values * 3 / 4.3 == pytest.approx(914_456, rel=1e-6)
    assert bench_replay.turboquant_bits(dim) == 3.125
    assert bench_replay.turboquant_bits(64) == 3.25
