"""A saved session wakes bit-identical, or not at all."""

import json

import pytest
import torch
from models import CONFIGS, LOSSLESS, SMALL, prompt, tiny
from test_sequence_cache import calibration
from transformers import AutoModelForCausalLM

from hf_seqkv import SeqKVCache
from hf_seqkv.errors import CalibrationMismatchError, FormatError, UnsupportedOperationError
from hf_seqkv.integration.compat import CACHE_NAME
from hf_seqkv.integration.state import state_of


def session(name, mask, ids, **options):
    """A cache after a prefill and a few steps, and the tokens so far."""
    model = tiny(name)
    cache = SeqKVCache(config=model.config, **options)
    out = model.generate(ids, attention_mask=mask, **{CACHE_NAME: cache}, max_new_tokens=9, do_sample=False)
    return model, cache, out


def go_on(model, cache, ids, mask, tokens=64):
    """The next greedy tokens."""
    whole = torch.cat([mask, torch.ones(len(ids), ids.shape[1] - mask.shape[1], dtype=mask.dtype)], 1)
    out = model.generate(ids, attention_mask=whole, **{CACHE_NAME: cache}, max_new_tokens=tokens, do_sample=False)
    return out[:, ids.shape[1] :]


def assert_same_state(a, b):
    (mine, facts), (other, others) = state_of(a), state_of(b)
    assert json.dumps(facts, sort_keys=True) == json.dumps(others, sort_keys=True)
    assert set(mine) == set(other)
    for name, x in mine.items():
        assert torch.equal(x, other[name]), name


@pytest.mark.parametrize("options", [LOSSLESS, SMALL], ids=["dense", "codes"])
@pytest.mark.parametrize("name", CONFIGS)
def test_wakes_bit_identical(name, options, tmp_path):
    ids, mask = prompt(2, 61, (0, 5))
    model, cache, out = session(name, mask, ids, **options)
    assert cache.save(tmp_path / "a") == (tmp_path / "a").stat().st_size
    woken = SeqKVCache.load(tmp_path / "a", model)
    assert_same_state(cache, woken)
    woken.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes(), "for ever without drift"
    assert torch.equal(go_on(model, cache, out, mask), go_on(model, woken, out, mask))


@pytest.mark.parametrize("cut", [-3, -17, -30])
def test_after_a_crop_into_pages(cut, tmp_path):
    """Codes that outlived a crop sleep, too."""
    ids, mask = prompt(2, 61, (0, 5))
    model, cache, out = session("llama", mask, ids, **SMALL)
    cache.crop(cut)
    cache.save(tmp_path / "a")
    woken = SeqKVCache.load(tmp_path / "a", model)
    assert_same_state(cache, woken)
    out = out[:, : cache.get_seq_length() + 1]
    mask = mask[:, : out.shape[1]]
    assert torch.equal(go_on(model, cache, out, mask), go_on(model, woken, out, mask))


def test_with_a_calibration(tmp_path):
    """Held tokens too; and where the calibration has moved."""
    ids, mask = prompt(1, 300)
    model, cache, out = session("llama", mask, ids, calibration=calibration())
    assert any(max(layer.held.counts) for layer in cache.layers)
    cache.save(tmp_path / "a")
    woken = SeqKVCache.load(tmp_path / "a", model, calibration=calibration())
    assert_same_state(cache, woken)
    calibration().save_pretrained(tmp_path / "elsewhere")
    assert_same_state(cache, SeqKVCache.load(tmp_path / "a", model, calibration=tmp_path / "elsewhere"))
    assert torch.equal(go_on(model, cache, out, mask), go_on(model, woken, out, mask))


def test_pages_take_less(tmp_path):
    """Coded without loss, pages take fewer bytes than as codes."""
    ids, mask = prompt(1, 300)
    _, cache, _ = session("llama", mask, ids, calibration=calibration())
    hot = sum(layer.codec.page_bytes * layer.counts[0] for layer in cache.layers)
    tensors, _ = state_of(cache)
    rest = sum(x.nbytes for name, x in tensors.items() if not name.endswith("pages"))
    assert cache.save(tmp_path / "a") - rest < hot + 6000  # header of the file: facts, names


def test_damage_is_refused(tmp_path):
    ids, mask = prompt(1, 61)
    model, cache, _ = session("llama", mask, ids, **SMALL)
    path = tmp_path / "a"
    cache.save(path)
    data = path.read_bytes()
    for at in range(0, len(data), 97):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(FormatError):
            SeqKVCache.load(path, model)
        path.write_bytes(data[:at])
        with pytest.raises(FormatError):
            SeqKVCache.load(path, model)


def test_of_another_model(tmp_path):
    ids, mask = prompt(1, 61)
    _, cache, _ = session("llama", mask, ids, **SMALL)
    cache.save(tmp_path / "a")
    torch.manual_seed(1)
    for other in (AutoModelForCausalLM.from_config(cache.model_config), tiny("qwen2")):
        with pytest.raises(CalibrationMismatchError, match="another model"):
            SeqKVCache.load(tmp_path / "a", other)
    with pytest.raises(FileNotFoundError):
        SeqKVCache.load(tmp_path / "b", tiny("llama"))


def test_nothing_to_save(tmp_path):
    model = tiny("llama")
    with pytest.raises(UnsupportedOperationError, match="empty"):
        SeqKVCache(config=model.config).save(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_failed_save_keeps_the_older_file(tmp_path, monkeypatch):
    ids, mask = prompt(1, 61)
    _, cache, _ = session("llama", mask, ids, **SMALL)
    cache.save(tmp_path / "a")
    before = (tmp_path / "a").read_bytes()
    cache.crop(-5)
    monkeypatch.setattr("os.fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        cache.save(tmp_path / "a")
    assert [x.name for x in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == before
