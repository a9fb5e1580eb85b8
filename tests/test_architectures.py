"""About forty architectures, which have every mechanism between them; `ARCHITECTURES.md` says what holds for all."""

import dataclasses
import os
from pathlib import Path

import architectures
import pytest
import transformers
from architecture_check import MODES, Report, check
from architecture_models import TYPES

from hf_seqkv.integration.layer import SeqKVLayer

NAMES = [
    *("bloom", "cohere", "cohere2", "deepseek_v3", "deepseek_v32", "diffllama", "exaone4", "falcon", "falcon_h1"),
    *("gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "glm4", "gpt2", "gpt_neo", "gpt_neox"),
    *("gpt_oss", "gptj", "granite", "granitemoehybrid", "hrm_text", "hy_v4", "inkling_text", "jamba", "llama"),
    *("llama4_text", "mistral", "mixtral", "moshi", "mpt", "olmo2", "olmo3", "opt", "phi", "phi3", "qwen2", "qwen3"),
    *("qwen3_5_text", "qwen3_moe", "qwen3_next", "smollm3", "stablelm", "starcoder2"),
]
VERSION, ROWS = architectures.read(Path(__file__).with_name("ARCHITECTURES.md"))
SAME = ("layers coded", "attention", "modes")  # on every machine; errors are not


@pytest.mark.parametrize("name", [name for name in NAMES if name in TYPES])
def test_architecture(name):
    """The tokens of `DynamicCache` in every mode, nearly its logits with 8 bits; and the table says what is found."""
    report = check(name)
    assert report.failures() == []
    assert report.not_built == ""
    assert report.unsupported or list(report.modes) == list(MODES)
    if transformers.__version__ == VERSION:
        found = dict(zip(architectures.COLUMNS, architectures.row(report), strict=True))
        assert {column: found[column] for column in SAME} == {column: ROWS[name][column] for column in SAME}


@pytest.mark.skipif(transformers.__version__ != VERSION, reason=f"the table is of transformers {VERSION}")
def test_every_type_has_a_row():
    assert list(ROWS) == list(TYPES)
    assert not any("**" in row["notes"] for row in ROWS.values())


def test_a_cache_that_forgets_is_found_out(monkeypatch):
    """What every test above rests on: without its pages a cache fails in all modes."""
    view = SeqKVLayer.view

    def forgetful(self, *args):
        seen = view(self, *args)
        return dataclasses.replace(seen, counts=[0] * len(seen.counts))

    monkeypatch.setattr(SeqKVLayer, "view", forgetful)
    report = check("llama")
    assert all(result.startswith("failed: ") for result in report.modes.values())
    assert report.error > 0.5
    assert len(report.failures()) == len(MODES) + 1


def test_a_table_is_read_as_it_was_written(tmp_path):
    good = Report("llama", coded=3, modes=dict.fromkeys(MODES, "same"), error=0.01, attended=9, context=1.0)
    none = Report("mamba", unsupported="keeps | no keys")
    part = Report("doge", coded=1, uncompressed={"Other": 2}, modes={"greedy": "failed: token 4", "beams": "n/a: no"})
    path = tmp_path / "table.md"
    path.write_text(architectures.write([good, none, part]), encoding="utf-8")
    version, rows = architectures.read(path)
    assert version == transformers.__version__
    for report in (good, none, part):
        assert list(rows[report.name].values()) == architectures.row(report)
    assert rows["llama"]["modes"] == "6 of 6"
    assert rows["doge"]["modes"] == "0 of 1"
    assert "**greedy failed: token 4**" in rows["doge"]["notes"]


def test_a_process_that_dies_is_a_finding(monkeypatch):
    monkeypatch.setattr(architectures, "check", os._exit)
    monkeypatch.setattr(architectures, "_quiet", os.getpid)  # anything that imports little
    assert [(report.name, report.crash) for report in architectures.sweep([3, 5])] == [
        (3, "its process died"),
        (5, "its process died"),
    ]
