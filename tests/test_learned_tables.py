"""Pages without a calibration are stored in the exact form too, by tables that a store learned from its first pages."""

import pytest
import torch
from models import Unmeasured, tiny
from test_prefix import generate, loaded

from hf_seqkv.errors import SeqKVWarning
from hf_seqkv.integration import learned_tables
from hf_seqkv.integration.compat import CACHE_NAME

CODES = {"page_size": 16, "residual_length": 8}


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """A small store has learned enough."""
    monkeypatch.setattr(learned_tables, "TOKENS_AN_INPUT", 1)
    monkeypatch.setattr(learned_tables, "LEAST_TOKENS", 512)


def texts(count: int, tokens: int = 140) -> list[torch.Tensor]:
    """A few dozen tokens in orders that repeat, so that much of one text is in another."""
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(3, 131, (12, 5), generator=generator)
    return [words[torch.randint(12, (tokens // 5,), generator=generator)].reshape(1, -1) for _ in range(count)]


def run(model, store, ids, **options):
    return generate(model, ids, torch.ones_like(ids), store, cache_config=CODES | options, max_new_tokens=4)


def forms(store) -> dict[str, list[int]]:
    """Bytes of entries by form."""
    found = {}
    for entry in store.entries():
        found.setdefault(entry.form, []).append(entry.bytes)
    return found


def taught(model, folder) -> Unmeasured:
    """A store whose tables are there, and the pages of one more text."""
    store = Unmeasured(folder, form="exact")
    *first, last = texts(5)
    for ids in first:
        run(model, store, ids)
    assert "exact" not in forms(store)
    store.flush(slow=True)
    run(model, store, last)
    return store


@pytest.mark.parametrize(("name", "options"), [("qwen3", {}), ("gpt2", {}), ("llama", {"center_keys": False})])
def test_pages_become_exact_once_there_are_tables(name, options, tmp_path, monkeypatch):
    model = tiny(name)
    monkeypatch.setitem(CODES, "center_keys", options.get("center_keys", True))
    with taught(model, tmp_path) as store:
        sizes = forms(store)
        assert len(sizes["tables"]) == 1
        # The first page brings the sinks and the key means with it.
        assert sorted(sizes["exact"])[len(sizes["exact"]) // 2] < 0.9 * sorted(sizes["hot"])[len(sizes["hot"]) // 2]
        for ids in (texts(5)[0], texts(5)[4]):
            found = run(model, store, ids)
            alone = model.generate(
                ids, attention_mask=torch.ones_like(ids), cache_implementation="seqkv", cache_config=CODES,
                max_new_tokens=4, do_sample=False, return_dict_in_generate=True,
            )  # fmt: skip
            assert loaded(found) == 8
            for a, b in zip(alone[CACHE_NAME].layers, found[CACHE_NAME].layers, strict=True):
                assert torch.equal(a.pages[:, :8], b.pages[:, :8])


def test_rows_that_begin_with_pages_of_different_forms(tmp_path):
    """One from before there were tables beside one from after."""
    with taught(tiny("qwen3"), tmp_path) as store:
        rows = torch.cat([texts(5)[0], texts(5)[4]])
        assert loaded(run(tiny("qwen3"), store, rows)) == 8
        assert set(forms(store)) == {"hot", "exact", "tables"}


def test_another_process_finds_them(tmp_path):
    model, ids = tiny("llama"), texts(5)[4]
    taught(model, tmp_path).close()
    with Unmeasured(tmp_path) as store:  # whose own form is hot
        assert loaded(run(model, store, ids)) == 8
    with Unmeasured(tmp_path, form="exact") as store:
        before = len(forms(store)["exact"])
        run(model, store, texts(7)[6])
        assert len(forms(store)["exact"]) == before + 8


def test_without_its_tables_a_page_is_a_miss_and_stays(tmp_path):
    model, ids = tiny("llama"), texts(5)[4]
    taught(model, tmp_path).close()
    with Unmeasured(tmp_path) as store:
        (key,) = (entry.key for entry in store.entries() if entry.form == "tables")
        before = len(forms(store)["exact"])
        path = store._shelf.objects._path(key.hex())
        whole = path.read_bytes()
        path.write_bytes(whole[:-9] + bytes(9))
        with pytest.warns(SeqKVWarning, match="checksum"):
            found = run(model, store, ids)
        assert loaded(found) == 0
        assert len(forms(store)["exact"]) == before
        path.write_bytes(whole)
        assert loaded(run(model, store, ids)) == 8


def test_foreign_tables_are_learned_again(tmp_path):
    model = tiny("llama")
    store = taught(model, tmp_path)
    (key,) = (entry.key for entry in store.entries() if entry.form == "tables")
    scope = store.get(key, 1 << 30).scope
    store.drop(key)
    assert store.put(scope, b"", [0], b"nothing of ours", form="tables", bits=None) == key
    store.close()
    with Unmeasured(tmp_path, form="exact") as store:
        for ids in texts(9)[5:]:
            run(model, store, ids)
        store.flush(slow=True)
        assert len(store.get(key, 1 << 30).payload) > 1000


def test_tables_stay_as_long_as_pages_need_them(tmp_path):
    model = tiny("llama")
    with taught(model, tmp_path) as store:
        tables = sum(forms(store)["tables"])
        store.prune(tables + 4000)
        assert "tables" in forms(store)
        store.prune(0)
        store.prune(0)
        assert not forms(store)
