"""The roofline's models: parameters of published ones and of families, what a step reads, where configs come from."""

import dataclasses
import json

import pytest
import torch
from test_roofline import one
from transformers import AutoConfig, AutoModelForCausalLM

from hf_seqkv.cli import main
from hf_seqkv.errors import ConfigError, SeqKVError, UnsupportedModelError
from hf_seqkv.eval import roofline_model


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
        ("qwen2.5-7b", 7_615_616_512),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_published_parameters(name, parameters):
    shape = roofline_model.load(name.upper())
    assert shape.stored == parameters
    embedding = roofline_model.PUBLISHED[name]["vocab_size"] * roofline_model.PUBLISHED[name]["hidden_size"]
    assert shape.read(1) == parameters - (0 if name.startswith("smol") else embedding)


@pytest.mark.parametrize(
    "family",
    ["llama", "mistral", "qwen3", "gemma2", "gemma3_text", "gpt2", "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"],
)
def test_parameters_of_a_family(family):
    """The arithmetic against transformers' own modules, of their default sizes, without memory."""
    config = AutoConfig.for_model(family, **({} if family == "gpt2" else {"num_hidden_layers": 2}))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = roofline_model.from_config(config.to_dict(), family)
    assert shape.stored == pytest.approx(sum(p.numel() for p in model.parameters()), rel=0.01)


MOE = {
    "hidden_size": 64,
    "intermediate_size": 512,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 100,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [0],
}


def test_experts():
    """One token reads its own experts, two share some, many read all."""
    shape = roofline_model.from_config(MOE, "moe")
    expert = 3 * 64 * 32
    assert (shape.moe_layers, shape.expert) == (2, expert)
    assert shape.read(1) == shape.always + 2 * 2 * expert
    assert shape.read(2) == shape.always + 2 * expert * (2 + 2 * (1 - 2 / 8))
    assert shape.read(1000) == pytest.approx(shape.stored)
    assert shape.stored == shape.always + 2 * 8 * expert


def test_windows():
    window = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 128}
    sizes = {name: MOE[name] for name in ("hidden_size", "num_attention_heads", "vocab_size")}
    shape = roofline_model.from_config({**sizes, **window, "num_hidden_layers": 2}, "sliding")
    assert shape.windows == (128, None)
    row = one(1000, 3, model=shape)
    assert row.dense.kv_bytes == 3 * (128 + 1000) * 2 * 64 * 2
    everywhere = {**sizes, "num_hidden_layers": 2, "sliding_window": 128}
    assert roofline_model.from_config(everywhere, "mistral").windows == (128, 128)
    assert roofline_model.from_config(everywhere | {"use_sliding_window": False}, "qwen2").windows == (None, None)
    mixed = {**sizes, "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    shape = roofline_model.from_config(mixed, "hybrid")
    assert shape.windows == (None,)
    assert "linear_attention" in shape.notes[0]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"hidden_size": None}, ConfigError, "'hidden_size'"),
        ({"num_attention_heads": [2, 4]}, ConfigError, "'num_attention_heads'"),
        ({"layer_types": ["full_attention"]}, ConfigError, "1 layer_types for 3 layers"),
        ({"layer_types": ["mamba"] * 3}, UnsupportedModelError, "no layer that keeps keys and values"),
        ({"kv_lora_rank": 512}, UnsupportedModelError, "latents"),
        ({"is_encoder_decoder": True}, UnsupportedModelError, "encoder-decoder"),
    ],
)
def test_configs_refused(change, error, words):
    with pytest.raises(error, match=words):
        roofline_model.from_config(MOE | change, "model")


def test_load_files(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "qwen2", "text_config": None, **roofline_model.PUBLISHED["qwen2.5-7b"]}))
    assert roofline_model.load(str(path)).stored == roofline_model.load(str(tmp_path)).stored == 7_615_616_512
    path.write_text(json.dumps(MOE | {"model_type": "of nobody's"}))
    assert roofline_model.load(str(path)) == dataclasses.replace(roofline_model.from_config(MOE, "moe"), name=str(path))
    for text in ("{", "[]"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="llama-3-8b"):
            roofline_model.load(str(path))


def test_hub_config(monkeypatch):
    """The cache first, then the network; what fails there is said."""
    asked = []

    def from_pretrained(name, **options):
        asked.append(options)
        if len(asked) == 1:
            raise OSError("not in the cache")
        return AutoConfig.for_model(**roofline_model.PUBLISHED["smollm2-135m"])

    monkeypatch.setattr(AutoConfig, "from_pretrained", from_pretrained)
    assert roofline_model.load("HuggingFaceTB/SmolLM2-135M-Instruct").stored == 134_515_008
    assert asked == [{"local_files_only": True}, {}]

    def offline(name, **options):
        raise OSError("We couldn't connect.\nCheck your connection")

    monkeypatch.setattr(AutoConfig, "from_pretrained", offline)
    with pytest.raises(SeqKVError, match=r"no config for 'a/b': We couldn't connect\. Give a config"):
        roofline_model.load("a/b")


def test_other_head_dim_and_experts_are_said(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(MOE))
    assert main(["bench", "roofline", "--model-config", str(tmp_path), "--context", "100", "--batch", "1"]) == 0
    said = capsys.readouterr().err
    assert "not counted for head_dim 32" in said
    assert "2 of 8 experts a token" in said
