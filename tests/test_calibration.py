"""Fitting, files, refusals and the Hub's conventions of `SeqKVCalibration`."""

import json
import shutil

import pytest
import torch
from models import CONFIGS, SMALL, prompt, tiny
from transformers import DynamicCache

from hf_seqkv import SeqKVCache, SeqKVCalibration, calibrate
from hf_seqkv.calibration.artifact import CONFIG_NAME, TENSORS_NAME
from hf_seqkv.calibration.fit import allocate_widths
from hf_seqkv.calibration.overlap import TENSOR as SHINGLES
from hf_seqkv.calibration.overlap import overlap, shingles
from hf_seqkv.errors import (
    CalibrationMismatchError,
    CalibrationNotFoundError,
    ConfigError,
    FormatError,
    SeqKVWarning,
    UnsupportedModelError,
)
from hf_seqkv.eval.card import render_card


class Words:
    """Tokenizer of numbers."""

    bos_token_id = 1

    def __call__(self, text, **options):
        return {"input_ids": [int(word) % 128 + 3 for word in text.split()]}


TEXT = " ".join(str(i * i % 131 + i % 7) for i in range(3000))


def make(name="llama", **options):
    options = {"tokens": 1024, "window": 128, "progress": False, "sequence": False} | options
    return calibrate(tiny(name), Words(), [TEXT], **options)


@pytest.fixture(scope="module")
def llama():
    return make()


@pytest.fixture
def saved(llama, tmp_path):
    return llama.save_pretrained(tmp_path / "calibration")


@pytest.fixture(scope="module")
def complete():
    """With a sequence codec and held tokens, whose gradients need longer windows."""
    return make(tokens=792, window=264, sequence=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_calibrated_keys_are_closer_than_data_free(name):
    """Every kind of RoPE and layer; measured on the first layer's reconstructions of other tokens."""
    model, ids = tiny(name), prompt(1, 300)[0]
    calibration = make(name)
    dense = DynamicCache(config=model.config)
    errors = []
    with torch.no_grad():
        model(ids[:, :200], past_key_values=dense)
        for options in ({"calibration": calibration}, {}):
            cache = SeqKVCache(config=model.config, **SMALL, **options)
            model(ids[:, :200], past_key_values=cache)
            ours, theirs = cache.layers[0], dense.layers[0]
            tail = min(ours.keys.shape[2], theirs.keys.shape[2])
            pairs = [(getattr(x, part)[:, :, -tail:] for x in (ours, theirs)) for part in ("keys", "values")]
            errors.append(sum(((a - b).norm() / b.norm()).item() for a, b in pairs))
            model(ids[:, 200:201], past_key_values=cache)  # a fused step reads mixed widths
    assert errors[0] < errors[1]


def test_same_inputs_same_bytes(llama, tmp_path):
    again = make().save_pretrained(tmp_path / "again")
    first = llama.save_pretrained(tmp_path / "first")
    for name in (TENSORS_NAME, CONFIG_NAME):
        assert (first / name).read_bytes() == (again / name).read_bytes()
    other = make(seed=1)
    assert any(not torch.equal(other.tensors[k], v) for k, v in llama.tensors.items())


def test_round_trip(llama, saved):
    loaded = SeqKVCalibration.from_pretrained(saved)
    assert loaded.config == llama.config
    assert all(torch.equal(loaded.tensors[name], x) for name, x in llama.tensors.items())
    model, ids = tiny("llama"), prompt(1, 100)[0]
    results = [
        model.generate(
            ids,
            max_new_tokens=20,
            do_sample=False,
            cache_implementation="seqkv",
            cache_config={"calibration": source, **SMALL},
        )
        for source in (llama, str(saved))
    ]
    assert torch.equal(*results)


def test_rotations_are_orthogonal_and_rates_exact(llama):
    for name, tensor in llama.tensors.items():
        if name.endswith("rotation"):
            identity = torch.eye(tensor.shape[-1]).expand_as(tensor)
            torch.testing.assert_close(tensor @ tensor.transpose(1, 2), identity, atol=1e-5, rtol=0)
        if name.endswith("widths"):
            bits = 5 if ".key." in name else 4
            assert (tensor.sum(-1, dtype=torch.int64) == bits * tensor.shape[-1]).all()


@pytest.mark.parametrize(("bits", "allowed"), [(3, (2, 3, 4)), (2.25, (2, 3)), (3.75, (3, 4))])
def test_allocate_widths_is_optimal(bits, allowed):
    """Against trying every allocation of the widths next to `bits`."""
    import itertools

    from hf_seqkv.codec.quantize import distortion

    variance = torch.tensor([4.0, 1.0, 0.3, 0.05])

    def error(widths):
        return sum(v * distortion(w, 4) for v, w in zip(variance.tolist(), widths, strict=True))

    best = min((w for w in itertools.product(allowed, repeat=4) if sum(w) == 4 * bits), key=error)
    widths = allocate_widths(variance, bits).tolist()
    assert sum(widths) == 4 * bits
    assert error(widths) == pytest.approx(error(best))


def test_quarters_of_a_bit():
    made = make(key_bits=4.25, value_bits=3.75)
    for name, tensor in made.tensors.items():
        if name.endswith("widths"):
            bits = 4.25 if ".key." in name else 3.75
            assert (tensor.sum(-1, dtype=torch.int64) == bits * tensor.shape[-1]).all()
    cache = SeqKVCache(config=tiny("llama").config, calibration=made, page_size=64, residual_length=8)
    with torch.no_grad():
        tiny("llama")(prompt(1, 100)[0], past_key_values=cache)
    assert cache.memory()["codes"] == 3 * 64 * 2 * 16 * 8 // 8  # layers, tokens, heads, dim; 4.25 + 3.75 bits


def test_texts_leave_their_shingles(llama):
    """The calibration knows its own text again, and no other."""
    other = " ".join(str(i * i * i % 127) for i in range(3000))
    mine, foreign = (shingles(Words()(text)["input_ids"]) for text in (TEXT, other))
    assert overlap(llama.tensors[SHINGLES], mine) > 0.3  # a third of it was used
    assert overlap(llama.tensors[SHINGLES], foreign) == 0


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_another_model_is_refused(llama, name):
    with pytest.raises(CalibrationMismatchError, match=r"model_type: calibration 'llama', model .*seqkv calibrate"):
        SeqKVCache(config=tiny(name).config, calibration=llama)


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"num_hidden_layers": 2}, "num_hidden_layers"),
        ({"head_dim": 32}, "head_dim"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope"),
    ],
    ids=["layers", "head dim", "heads", "rope"],
)
def test_another_shape_or_rope_is_refused(llama, change, fact):
    from transformers import LlamaConfig

    config = LlamaConfig(**tiny("llama").config.to_dict() | change)
    with pytest.raises(CalibrationMismatchError, match=f"{fact}: calibration"):
        SeqKVCache(config=config, calibration=llama)


def test_other_weights_warn(llama):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(9)
    other = AutoModelForCausalLM.from_config(tiny("llama").config).eval()
    with pytest.warns(SeqKVWarning, match="other weights"):
        other.generate(
            prompt()[0], max_new_tokens=2, cache_implementation="seqkv", cache_config={"calibration": llama, **SMALL}
        )


def test_future_format_is_refused(saved):
    config = json.loads((saved / CONFIG_NAME).read_text())
    (saved / CONFIG_NAME).write_text(json.dumps(config | {"format_version": 3}))
    with pytest.raises(CalibrationMismatchError, match="version 3, this hf_seqkv reads 2"):
        SeqKVCalibration.from_pretrained(saved)


@pytest.mark.parametrize("name", [TENSORS_NAME, CONFIG_NAME])
@pytest.mark.parametrize("size", [0, 10, 500])
def test_truncated_files_are_refused(saved, name, size):
    data = (saved / name).read_bytes()
    assert len(data) > size
    (saved / name).write_bytes(data[:size])
    with pytest.raises(FormatError, match="damaged"):
        SeqKVCalibration.from_pretrained(saved)


def test_missing_parts_are_named(saved, llama):
    (saved / TENSORS_NAME).unlink()
    with pytest.raises(CalibrationNotFoundError, match=TENSORS_NAME):
        SeqKVCalibration.from_pretrained(saved)
    short = SeqKVCalibration({k: v for k, v in llama.tensors.items() if k != "0.key.std"}, llama.config)
    short.save_pretrained(saved)
    with pytest.raises(FormatError, match=r"lacks 0\.key\.std"):
        SeqKVCalibration.from_pretrained(saved)


# The sequence codec.


def test_sequence_codec_survives_files(complete, tmp_path):
    loaded = SeqKVCalibration.from_pretrained(complete.save_pretrained(tmp_path))
    for profile, predicts in (("full", True), ("light", False)):
        ours, theirs = (x.sequence_codec(profile) for x in (complete, loaded))
        assert ours.predicts == predicts
        assert ours.fingerprint == theirs.fingerprint
        assert ours.base == theirs.base
        for a, b in zip(ours.parts, theirs.parts, strict=True):
            assert torch.equal(a.importance, b.importance)
    assert complete.sequence_codec("full").fingerprint != complete.sequence_codec("light").fingerprint
    assert complete.sequence_codec("full", 3).step == 3


def test_sequence_codec_is_as_deterministic_as_the_rest(complete, tmp_path):
    again = make(tokens=792, window=264, sequence=True).save_pretrained(tmp_path / "again")
    first = complete.save_pretrained(tmp_path / "first")
    for name in (TENSORS_NAME, CONFIG_NAME):
        assert (first / name).read_bytes() == (again / name).read_bytes()


def test_missing_profiles_are_named(llama, complete):
    with pytest.raises(ConfigError, match=r"no sequence codec 'full' \(it has: none\).*seqkv calibrate"):
        llama.sequence_codec()
    with pytest.raises(ConfigError, match=r"no sequence codec 'fine' \(it has: full, light\)"):
        complete.sequence_codec("fine")
    with pytest.raises(ConfigError, match=r"no preset 'tiny'"):
        complete.sequence_codec("full", "tiny")


def test_held_tokens_are_the_calibrations_share(complete):
    """About as many as were asked for, of other tokens, on the first layer; none where none were asked for."""
    cache = SeqKVCache(config=tiny("llama").config, calibration=complete, **SMALL)
    with torch.no_grad():
        tiny("llama")(prompt(4, 500)[0], past_key_values=cache)
    paged = 8 * sum(cache.layers[0].counts)
    assert 0 < sum(cache.layers[0].held.counts) < 0.1 * paged
    assert complete.config["held"] == 0.01
    none = make(tokens=792, window=264, sequence=True, held=0)
    assert not any(name.endswith("held") for name in none.tensors)


def test_hub_cache_and_offline(saved, monkeypatch, tmp_path):
    """A repository in the Hub cache loads without a network; one that is not there is an error that says what to do."""
    folder = tmp_path / "hub" / "models--someone--llama-seqkv"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    shutil.copytree(saved, folder / "snapshots" / ("a" * 40))
    options = {"cache_dir": tmp_path / "hub", "local_files_only": True}
    assert SeqKVCalibration.from_pretrained("someone/llama-seqkv", **options).config["key_bits"] == 5
    with pytest.raises(CalibrationNotFoundError, match="hf download someone/nothing"):
        SeqKVCalibration.from_pretrained("someone/nothing", **options)
    with pytest.raises(CalibrationNotFoundError, match="neither a directory nor"):
        SeqKVCalibration.from_pretrained("not/a/repository")


def test_push_to_hub(llama, monkeypatch):
    """What is sent, and with which options; the client is replaced, there being no Hub in a test."""
    import huggingface_hub

    sent = {}

    class Api:
        def __init__(self, token=None):
            sent["token"] = token

        def create_repo(self, repo_id, **options):
            sent["create"] = (repo_id, options)
            return type("Url", (), {"repo_id": f"me/{repo_id}"})()

        def upload_folder(self, *, repo_id, folder_path, revision, commit_message):
            import os

            sent["upload"] = (repo_id, sorted(os.listdir(folder_path)), revision)
            return "https://example.invalid/commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    llama.card = render_card(llama.config)
    try:
        url = llama.push_to_hub("llama-seqkv", private=True, token="secret", revision="v1")
    finally:
        llama.card = None
    assert url == "https://example.invalid/commit"
    assert sent["token"] == "secret"
    assert sent["create"] == ("llama-seqkv", {"private": True, "exist_ok": True})
    assert sent["upload"] == ("me/llama-seqkv", ["README.md", TENSORS_NAME, CONFIG_NAME], "v1")


def test_calibrate_refuses():
    with pytest.raises(ConfigError, match="give more text"):
        calibrate(tiny("llama"), Words(), ["1 2 3"], progress=False)
    for bits in (6, 1.75, 4.1):
        with pytest.raises(ConfigError, match=f"key_bits={bits}.*steps of a quarter"):
            make(key_bits=bits)
    with pytest.raises(ConfigError, match="too short for gradients"):
        make(sequence=True)
    with pytest.warns(SeqKVWarning, match="more text"):
        make(tokens=100_000)
    from transformers import AutoModelForCausalLM, Qwen3NextConfig

    hybrid = AutoModelForCausalLM.from_config(
        Qwen3NextConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
            head_dim=16, vocab_size=131, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
            shared_expert_intermediate_size=16, linear_num_key_heads=2, linear_num_value_heads=2,
            linear_key_head_dim=8, linear_value_head_dim=8,
        )
    )  # fmt: skip
    with pytest.warns(SeqKVWarning, match="stay uncompressed"), pytest.raises(UnsupportedModelError, match="1 of 4"):
        calibrate(hybrid, Words(), [TEXT], tokens=1024, window=128, progress=False)


def test_card_has_every_number(llama):
    quality = {"bits_per_value": 4.26, "ratio": 1.002, "ratio_error": 0.001, "kl": 0.003, "top1": 0.97}
    card = render_card(llama.config | {"quality": {"calibrated": quality}, "texts": ["a.txt"]})
    for text in ("library_name: hf_seqkv", llama.config["weights"], "a.txt", "| calibrated | 4.260 | 1.0020 ± 0.0010"):
        assert text in card
    assert "$" not in card
