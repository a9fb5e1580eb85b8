"""`seqkv bench store`: what it reports is what a store holds and gives."""

import json
import math
from types import SimpleNamespace

import pytest
from models import LOSSLESS, SMALL, prompt, tiny

from hf_seqkv.cli import main
from hf_seqkv.errors import ConfigError
from hf_seqkv.eval import bench_store
from hf_seqkv.integration import learned_tables


def test_measure():
    model, (ids, _) = tiny("llama"), prompt(1, 120)
    found = bench_store.measure(model, ids, 100, ["hot", "exact"], SMALL, 0.01, progress=False)
    pages = (100 - 4 - SMALL["residual_length"]) // SMALL["page_size"]
    for form, facts in found["forms"].items():
        assert facts["pages"] == pages
        assert facts["bits_per_value"] == pytest.approx(8 * facts["bytes"] / (pages * 8 * 3 * 2 * 32))
        assert 0 < facts["kl"] < 0.5
        assert {f"{form}, warm", f"{form}, cold"} <= set(found["ways"])
    assert found["forms"]["hot"]["kl"] == pytest.approx(found["forms"]["exact"]["kl"], rel=1e-6), "the same codes"
    assert found["ways"]["DynamicCache"]["speedup"] == 1
    assert all(math.isfinite(way["median"]) for way in found["ways"].values())
    assert "exact, warm" in bench_store.table(found)


def test_exact_pages_are_measured_with_tables(monkeypatch):
    monkeypatch.setattr(learned_tables, "LEAST_TOKENS", 100)
    monkeypatch.setattr(learned_tables, "TOKENS_AN_INPUT", 0)
    model, (ids, _) = tiny("llama"), prompt(1, 120)
    others, forms = [ids.flip(1)] * 2, ["hot", "exact"]
    found = bench_store.measure(model, ids, 100, forms, SMALL, 0.01, others=others, progress=False)
    assert found["forms"]["exact"]["tables"] > 1000
    assert found["forms"]["exact"]["pages"] == found["forms"]["hot"]["pages"]


def test_lossless_pages_give_the_same_predictions():
    model, (ids, _) = tiny("llama"), prompt(1, 120)
    found = bench_store.measure(model, ids, 100, ["hot"], LOSSLESS, 0.01, progress=False)
    assert abs(found["forms"]["hot"]["kl"]) < 1e-5


def test_what_cannot_be_measured_is_said():
    model, (ids, _) = tiny("llama"), prompt(1, 120)
    with pytest.raises(ConfigError, match="shorter"):
        bench_store.measure(model, ids, 120, ["hot"], SMALL, 0.01, progress=False)
    with pytest.raises(ConfigError, match="holds no page"):
        bench_store.measure(model, ids, 10, ["hot"], SMALL, 0.01, progress=False)


def _tokenizer(text, **options):
    return SimpleNamespace(input_ids=[len(word) % 100 + 3 for word in text.split()])


def test_the_command(monkeypatch, capsys):
    monkeypatch.setattr("hf_seqkv.cli.bench_store.load_model", lambda *_: (tiny("llama"), _tokenizer, "tiny"))
    command = "bench store --tokens 80 --more 8 --forms hot --option page_size=8 --seconds 1 --json"
    assert main(command.split()) == 0
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert result["prefix"] == 80
    assert result["options"] == {"page_size": "8"}
    assert "hot, warm" in err
