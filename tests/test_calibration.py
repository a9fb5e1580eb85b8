"""Calibrations as they are fitted: closer than data-free codecs, deterministic, for one model, and what is refused."""

import pytest
import torch
from models import CONFIGS, SMALL, prompt, tiny
from transformers import DynamicCache

from hf_seqkv import SeqKVCache, calibrate
from hf_seqkv.calibration.artifact import CONFIG_NAME, TENSORS_NAME
from hf_seqkv.calibration.fit import run_lengths
from hf_seqkv.calibration.overlap import TENSOR as SHINGLES
from hf_seqkv.calibration.overlap import overlap, shingles
from hf_seqkv.errors import CalibrationMismatchError, ConfigError, SeqKVWarning, UnsupportedModelError
from hf_seqkv.eval.card import render_card
from hf_seqkv.integration.compat import CACHE_NAME


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
        model(ids[:, :200], **{CACHE_NAME: dense})
        for options in ({"calibration": calibration}, {}):
            cache = SeqKVCache(config=model.config, **SMALL, **options)
            model(ids[:, :200], **{CACHE_NAME: cache})
            ours, theirs = cache.layers[0], dense.layers[0]
            tail = min(ours.keys.shape[2], theirs.keys.shape[2])
            pairs = [(getattr(x, part)[:, :, -tail:] for x in (ours, theirs)) for part in ("keys", "values")]
            errors.append(sum(((a - b).norm() / b.norm()).item() for a, b in pairs))
            model(ids[:, 200:201], **{CACHE_NAME: cache})  # a fused step reads mixed widths
    assert errors[0] < errors[1]


def test_same_inputs_same_bytes(llama, tmp_path):
    again = make().save_pretrained(tmp_path / "again")
    first = llama.save_pretrained(tmp_path / "first")
    for name in (TENSORS_NAME, CONFIG_NAME):
        assert (first / name).read_bytes() == (again / name).read_bytes()
    other = make(seed=1)
    assert any(not torch.equal(other.tensors[k], v) for k, v in llama.tensors.items())


def test_rotations_are_orthogonal_and_rates_exact(llama):
    for name, tensor in llama.tensors.items():
        if name.endswith("rotation"):
            identity = torch.eye(tensor.shape[-1]).expand_as(tensor)
            torch.testing.assert_close(tensor @ tensor.transpose(1, 2), identity, atol=1e-5, rtol=0)
        if name.endswith("widths"):
            bits = 5 if ".key." in name else 4
            assert (tensor.sum(-1, dtype=torch.int64) == bits * tensor.shape[-1]).all()


@pytest.mark.parametrize(("bits", "allowed"), [(3, (2, 3, 4)), (2.25, (2, 3)), (3.75, (3, 4))])
def test_run_lengths_are_optimal(bits, allowed):
    """Against trying every allocation of the widths next to `bits`."""
    import itertools

    from hf_seqkv.codec.quantize import distortion

    variance = torch.tensor([4.0, 1.0, 0.3, 0.05])

    def error(widths):
        return sum(v * distortion(w, 4) for v, w in zip(variance.tolist(), widths, strict=True))

    best = min((w for w in itertools.product(allowed, repeat=4) if sum(w) == 4 * bits), key=error)
    widths = [width for width, count in run_lengths(variance[None], bits).items() for _ in range(count)]
    assert sum(widths) == 4 * bits
    assert error(widths) == pytest.approx(error(best))


def test_heads_share_runs_that_kernels_expand():
    variance = torch.stack([0.8 ** torch.arange(128), 0.99 ** torch.arange(128)])
    for bits in (2, 2.25, 2.5, 3, 3.75, 4):
        runs = run_lengths(variance, bits)
        assert sum(runs.values()) == 128
        assert sum(width * count for width, count in runs.items()) == 128 * bits
        assert all(count % 16 == 0 for count in runs.values())


def test_quarters_of_a_bit():
    made = make(key_bits=4.25, value_bits=3.75)
    for name, tensor in made.tensors.items():
        if name.endswith("widths"):
            bits = 4.25 if ".key." in name else 3.75
            assert (tensor.sum(-1, dtype=torch.int64) == bits * tensor.shape[-1]).all()
    cache = SeqKVCache(config=tiny("llama").config, calibration=made, page_size=64, residual_length=8)
    with torch.no_grad():
        tiny("llama")(prompt(1, 100)[0], **{CACHE_NAME: cache})
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


# The sequence codec.


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


@pytest.mark.parametrize("step", [65, -65, 10**6, 0.5, None, "tiny"])
def test_steps_out_of_range_are_refused(complete, step):
    """A page's header has room for no more, and sizes are not told so far from where they were measured."""
    with pytest.raises(ConfigError, match=rf"step={step!r} is not a whole number from -64 to 64 or a preset"):
        complete.sequence_codec("light", step)
    assert [complete.sequence_codec("light", step).step for step in (-64, 64)] == [-64, 64]


def test_held_tokens_are_the_calibrations_share(complete):
    """About as many as were asked for, of other tokens, on the first layer; none where none were asked for."""
    cache = SeqKVCache(config=tiny("llama").config, calibration=complete, **SMALL)
    with torch.no_grad():
        tiny("llama")(prompt(4, 500)[0], **{CACHE_NAME: cache})
    paged = 8 * sum(cache.layers[0].counts)
    assert 0 < sum(cache.layers[0].held.counts) < 0.1 * paged
    assert complete.config["held"] == 0.01
    none = make(tokens=792, window=264, sequence=True, held=0)
    assert not any(name.endswith("held") for name in none.tensors)


def test_calibrate_refuses():
    with pytest.raises(ConfigError, match="give more text"):
        calibrate(tiny("llama"), Words(), ["1 2 3"], progress=False)
    for bits in (6, 1.75, 4.1):
        with pytest.raises(ConfigError, match=f"key_bits={bits}.*steps of a quarter"):
            make(key_bits=bits)
    for held in (-0.01, 1, float("nan")):
        with pytest.raises(ConfigError, match=f"held={held} is not a share.* from 0 to below 1"):
            make(held=held)
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
