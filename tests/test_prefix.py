"""Prompts that begin like earlier ones load what those stored, and give what they would have given."""

import copy

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from models import CONFIGS, LOSSLESS, SMALL, prompt, tiny
from test_sequence_cache import calibration
from transformers import AutoModelForCausalLM

from hf_seqkv import SeqKVCache
from hf_seqkv.errors import ConfigError, SeqKVWarning
from hf_seqkv.integration.compat import CACHE_NAME
from hf_seqkv.store.planner import Rates
from hf_seqkv.store.prefix_store import PrefixStore

PAGE, SINKS = SMALL["page_size"], 4


@pytest.fixture(autouse=True)
def nothing_is_measured(monkeypatch):
    """So that all that is found is loaded: which is faster, of models as small as these, is chance."""
    monkeypatch.setattr(PrefixStore, "rates", lambda self: Rates({}, None))


@pytest.fixture
def store(tmp_path):
    with PrefixStore(tmp_path / "store") as store:
        yield store


def generate(model, ids, mask, store, **options):
    """What `generate` gives, with pages in the store once this returns."""
    options = {"max_new_tokens": 12, "do_sample": False, "cache_config": LOSSLESS} | options
    options["cache_config"] = options["cache_config"] | {"prefix_store": store}
    found = model.generate(
        ids, attention_mask=mask, cache_implementation="seqkv", return_dict_in_generate=True, **options
    )
    store.flush()
    return found


def loaded(found) -> int:
    """Pages that a generation loaded."""
    prefixes = found[CACHE_NAME].prefixes
    return prefixes.plan.load if prefixes.loaded else 0


def expected(model, ids, mask, **options):
    return model.generate(ids, attention_mask=mask, do_sample=False, **{"max_new_tokens": 12} | options)


@pytest.mark.filterwarnings("ignore:pages are not stored")  # GPT-2's, in padded rows
@pytest.mark.parametrize("pads", [(), (0, 5)], ids=["one row", "padded rows"])
@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_are_those_of_the_dense_cache(name, pads, store):
    model, (ids, mask) = tiny(name), prompt(len(pads) or 1, 61, pads)
    first = generate(model, ids, mask, store)
    again = generate(model, ids, mask, store)
    wanted = expected(model, ids, mask)
    assert (loaded(first), loaded(again)) == (
        0,
        0 if name == "gpt2" and pads else (60 - max(pads or (0,)) - SINKS) // PAGE,
    )
    assert torch.equal(first.sequences, wanted)
    assert torch.equal(again.sequences, wanted)


@pytest.mark.filterwarnings("ignore:pages are not stored")
def test_rows_find_prefixes_of_different_lengths(store):
    """A row known to its end beside one that shares two pages of it: both are loaded as far as the shorter goes."""
    model, (ids, mask) = tiny("llama"), prompt(1, 61)
    generate(model, ids, mask, store)
    other = ids.clone()
    other[0, SINKS + 2 * PAGE + 3 :] = other[0, SINKS + 2 * PAGE + 3 :].roll(1)
    rows, masks = torch.cat([ids, other]), mask.expand(2, -1)
    found = generate(model, rows, masks, store)
    assert loaded(found) == 2
    assert torch.equal(found.sequences, expected(model, rows, masks))


def test_rows_that_begin_at_different_slots(store):
    """Pages end at different slots in padded rows: the cache ends with the first of them."""
    model, (ids, mask) = tiny("llama"), prompt(2, 61, (0, 5))
    for row, pads in ((0, 0), (1, 5)):
        generate(model, ids[row : row + 1, pads:], mask[row : row + 1, pads:], store)
    found = generate(model, ids, mask, store)
    assert loaded(found) > 0
    assert torch.equal(found.sequences, expected(model, ids, mask))


def test_codes_are_those_that_were_stored(store):
    """Loaded pages are the bytes that the first prefill made, sinks and key means too."""
    model, (ids, mask) = tiny("qwen2"), prompt(1, 61)
    options = {"cache_config": {**SMALL, "key_bits": 4}, "max_new_tokens": 1}
    first = generate(model, ids, mask, store, **options)[CACHE_NAME]
    again = generate(model, ids, mask, store, **options)
    count = loaded(again)
    assert count > 0
    for a, b in zip(first.layers, again[CACHE_NAME].layers, strict=True):
        assert torch.equal(a.pages[:, :count], b.pages[:, :count])
        assert torch.equal(a.mean, b.mean)
        assert torch.equal(a.sink_k, b.sink_k)


def test_beams_and_the_next_turn_share_pages(store):
    model, (ids, mask) = tiny("llama"), prompt(1, 61)
    beams = generate(model, ids, mask, store, num_beams=3)
    assert store.stat()["entries"] >= 7
    assert torch.equal(beams.sequences, expected(model, ids, mask, num_beams=3))
    before = store.stat()["entries"]
    generate(model, ids, mask, store, num_beams=3)
    assert store.stat()["entries"] == before
    turn = beams.sequences
    found = generate(model, turn, torch.ones_like(turn), store)
    assert loaded(found) == (turn.shape[1] - 1 - SINKS - SMALL["residual_length"]) // PAGE == 7, "of the answer too"
    assert torch.equal(found.sequences, expected(model, turn, torch.ones_like(turn)))


@pytest.mark.parametrize("options", [{"prefill_chunk_size": 16}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_generation_modes(options, store):
    model, (ids, mask) = tiny("llama"), prompt(1, 61)
    for _ in range(2):
        found = generate(model, ids, mask, store, **options)
        assert torch.equal(found.sequences, expected(model, ids, mask, **options))
    assert store.stat()["entries"] >= 7


def test_others_do_not_see_it(store, tmp_path):
    """Other weights, options or namespaces have pages of their own."""
    model, (ids, mask) = tiny("llama"), prompt(1, 61)
    generate(model, ids, mask, store)
    torch.manual_seed(1)
    other = AutoModelForCausalLM.from_config(model.config).eval()
    assert loaded(generate(other, ids, mask, store)) == 0
    assert loaded(generate(model, ids, mask, store, cache_config=SMALL)) == 0
    with PrefixStore(tmp_path / "store", namespace="tenant") as tenant:
        assert loaded(generate(model, ids, mask, tenant)) == 0
        assert loaded(generate(model, ids, mask, tenant)) > 0
    with torch.no_grad():
        next(model.parameters()).add_(0)  # a write, of whatever
    assert loaded(generate(model, ids, mask, store)) > 0


def test_damage_is_a_miss(store, tmp_path):
    model, (ids, mask) = tiny("llama"), prompt(1, 61)
    generate(model, ids, mask, store)
    for path in (tmp_path / "store" / "objects").glob("*/*"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.warns(SeqKVWarning):
        found = generate(model, ids, mask, store)
    assert torch.equal(found.sequences, expected(model, ids, mask))
    assert loaded(generate(model, ids, mask, store)) > 0, "stored again"


def test_a_foreign_payload_is_a_miss(store):
    """A page that is whole, and no record: dropped, with one warning."""
    model, (ids, mask) = tiny("llama"), prompt(1, 61)
    cache = SeqKVCache(config=model.config, prefix_store=store, **LOSSLESS)
    cache.bind(model)
    assert store.put(cache.prefixes.scope, b"", ids[0, : SINKS + PAGE].tolist(), b"?" * 99, form="hot", bits=None)
    with pytest.warns(SeqKVWarning, match="prefilled instead.*magic"):
        found = generate(model, ids, mask, store)
    assert torch.equal(found.sequences, expected(model, ids, mask))
    assert loaded(generate(model, ids, mask, store)) > 0


def test_embeddings_are_not_stored(store):
    model, (ids, _) = tiny("llama"), prompt(1, 61)
    cache = SeqKVCache(config=model.config, prefix_store=store, **LOSSLESS)
    cache.bind(model)
    with torch.no_grad(), pytest.warns(SeqKVWarning, match="something else"):
        model(inputs_embeds=model.get_input_embeddings()(ids), **{CACHE_NAME: cache})
    assert store.stat()["entries"] == 0


@pytest.mark.parametrize("gap", [0, 30])
def test_positions_of_ones_own_are_not_stored(gap, store):
    """Not those that begin elsewhere, nor those with a gap."""
    model, (ids, mask) = tiny("llama"), prompt(1, 61)
    positions = torch.arange(61)[None]
    positions[:, gap:] += 7
    with pytest.warns(SeqKVWarning, match="do not count from"):
        generate(model, ids, mask, store, position_ids=positions)
    assert store.stat()["entries"] == 0


def test_an_adapter_that_is_off_has_pages_of_its_own(store):
    """A layer of peft says by attributes, not by weights, whether it is on."""
    model, (ids, mask) = copy.deepcopy(tiny("llama")), prompt(1, 61)
    layer = model.model.layers[0].self_attn.q_proj
    layer.active_adapters, layer.disable_adapters = ["default"], False
    generate(model, ids, mask, store)
    layer.disable_adapters = True
    assert loaded(generate(model, ids, mask, store)) == 0
    layer.disable_adapters = False
    assert loaded(generate(model, ids, mask, store)) > 0


def test_weights_that_change_without_a_trace(store):
    model, (ids, mask) = copy.deepcopy(tiny("llama")), prompt(1, 61)
    generate(model, ids, mask, store)
    model.lm_head.weight.data = model.lm_head.weight.data * 2
    assert loaded(generate(model, ids, mask, store)) == 0


def test_other_inputs_are_not_stored(store):
    """What an image adds to its place holders is not in the token ids."""
    model, (ids, _) = copy.deepcopy(tiny("llama")), prompt(1, 61)
    cache = SeqKVCache(config=model.config, prefix_store=store, **LOSSLESS)
    cache.bind(model)
    with torch.no_grad(), pytest.warns(SeqKVWarning, match="something else"):
        model(input_ids=ids, **{CACHE_NAME: cache}, pixel_values=torch.zeros(1, 3, 2, 2))
    assert store.stat()["entries"] == 0


def test_sequence_pages(tmp_path):
    """Far fewer bytes, and keys and values near the dense ones."""
    model, (ids, mask) = tiny("llama"), prompt(1, 300)
    fitted = copy.deepcopy(calibration())
    fitted.config["sequence"]["full"]["presets"] = {"balanced": 0}
    options = {"cache_config": {"calibration": fitted}, "max_new_tokens": 1}
    sizes = {}
    for form in ("hot", "sequence"):
        with PrefixStore(tmp_path / form, form=form) as store:
            dense = generate(model, ids, mask, store, **options)[CACHE_NAME]
            again = generate(model, ids, mask, store, **options)
            assert loaded(again) == 4
            sizes[form] = store.stat()["bytes"]
            for a, b in zip(dense.layers, again[CACHE_NAME].layers, strict=True):
                for part in ("keys", "values"):
                    x, y = (getattr(layer, part)[:, :, : SINKS + 4 * 64] for layer in (a, b))
                    assert (x - y).norm() < (0.6 if form == "sequence" else 1e-6) * x.norm()
    assert sizes["sequence"] < 0.8 * sizes["hot"]


def test_forms_that_a_cache_has_not(tmp_path):
    model = tiny("llama")
    for form, options, said in (("exact", LOSSLESS, "dense"), ("sequence", SMALL, "calibration")):
        with PrefixStore(tmp_path / form, form=form) as store, pytest.raises(ConfigError, match=said):
            SeqKVCache(config=model.config, prefix_store=store, **options).bind(model)


def test_a_url_will_do(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model, (ids, mask) = tiny("llama"), prompt(1, 61)
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    for url in (str(tmp_path / "there"), "memory://prefixes"):
        for found in range(2):
            config = {**LOSSLESS, "prefix_store": url}
            made = model.generate(
                ids, attention_mask=mask, cache_implementation="seqkv", cache_config=config, max_new_tokens=4,
                return_dict_in_generate=True,
            )  # fmt: skip
            prefixes = made[CACHE_NAME].prefixes
            prefixes.store.flush()
            assert (prefixes.loaded > 0) is bool(found)


def test_predictable_pages_say_so(store):
    """Bits a token are those of the model's own head."""
    model, (ids, mask) = tiny("llama"), prompt(1, 61)
    generate(model, ids, mask, store)
    bits = [entry.bits for entry in store.entries() if entry.bits is not None]
    with torch.no_grad():
        nats = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
    sampled = nats[::16] / torch.log(torch.tensor(2.0))
    assert len(bits) >= 3
    assert all(any(abs(x - y) < 1e-3 for y in sampled.tolist()) for x in bits)
