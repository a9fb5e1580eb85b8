"""The prefix store: keys, the format of entries, what is found again, and where it is kept.

`tests/golden/prefix.entry` is an entry as an earlier version stored it; it must be read for ever. `python
tests/test_store.py` writes it anew, which is right only where the format's version changes.
"""

import math
import os
import stat
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st
from store_writers import warned

from hf_seqkv.errors import ConfigError, FormatError, UnsupportedOperationError
from hf_seqkv.store import entry
from hf_seqkv.store.keys import page_key, scope_key
from hf_seqkv.store.prefix_store import PrefixStore
from hf_seqkv.store.shelf import local_path

GOLDEN = Path(__file__).parent / "golden" / "prefix.entry"
SCOPE = scope_key(model="tests")
LIMIT = 1 << 20
IDS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=80)
BITS = st.none() | st.floats(0, 30, width=32)


def chain(store, pages, **facts):
    """Put pages one after the other, with their numbers as payloads; returns their keys."""
    keys, parent = [], b""
    for n, ids in enumerate(pages):
        parent = store.put(SCOPE, parent, ids, f"page {n}".encode(), **{"form": "hot", "bits": None} | facts)
        keys.append(parent)
    return keys


PAGES = [list(range(64 * n, 64 * n + 64)) for n in range(5)]


# Keys.


@given(IDS, IDS, st.booleans())
def test_keys_tell_sequences_apart(a, b, rooted):
    parent = page_key(SCOPE, b"", [1, 2]) if rooted else b""
    assert (page_key(SCOPE, parent, a) == page_key(SCOPE, parent, b)) is (a == b)
    assert page_key(SCOPE, parent, a) != page_key(scope_key(model="other"), parent, a)
    assert page_key(SCOPE, page_key(SCOPE, b"", a), b) != page_key(SCOPE, b"", a + b)


def test_a_first_page_is_not_one_after_zeros():
    assert page_key(SCOPE, b"", [7]) != page_key(SCOPE, bytes(32), [7])


def test_keys_are_a_contract():
    assert SCOPE.hex() == "ed2f57eced459f599079748e345954c4e6678fc529734e093b9676f6cdb7b1a2"
    assert page_key(SCOPE, b"", [1, 2, 3]).hex() == "35132ce58d0b34fecac990ee6dc7f99028f3ce50d3c247d35e36a534ab375b01"


@given(st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text() | st.binary(), max_size=4), st.data())
def test_scopes_are_canonical(facts, data):
    shuffled = dict(data.draw(st.permutations(list(facts.items()))))
    assert scope_key(**facts) == scope_key(**shuffled)
    assert scope_key(**facts) != scope_key(**facts, another=None)


def test_scopes_tell_types_apart():
    assert len({scope_key(a=x) for x in (1, "1", b"1", None, "", b"", 0, -1)}) == 8
    assert scope_key(a="b", c="d") != scope_key(a="bc", d="")
    with pytest.raises(ConfigError, match=r"a=1\.5"):
        scope_key(a=1.5)
    with pytest.raises(ConfigError, match="a=True"):
        scope_key(a=True)


@pytest.mark.parametrize(
    ("scope", "parent", "ids"),
    [(b"", b"", [1]), (SCOPE, b"short", [1]), (SCOPE, b"", []), (SCOPE, b"", [-1]), (SCOPE, b"", [2**32])],
)
def test_keys_refuse(scope, parent, ids):
    with pytest.raises(ConfigError):
        page_key(scope, parent, ids)


# The format.


@given(
    IDS, st.binary(max_size=300), st.sampled_from(entry.FORMS), st.none() | st.floats(0, 30, width=32), st.booleans()
)
def test_format_round_trips(ids, payload, form, bits, rooted):
    parent = page_key(SCOPE, b"", [1]) if rooted else b""
    key, data = page_key(SCOPE, parent, ids), entry.pack(SCOPE, parent, ids, payload, form, bits)
    assert entry.unpack(data, key) == entry.Entry(key, parent, tuple(ids), form, payload, SCOPE, bits)
    head = entry.read_head(data[: entry.HEADER_BYTES], len(data))
    assert (head.key, head.tokens, head.payload_bytes, head.size) == (key, len(ids), len(payload), len(data))


@given(st.data())
def test_any_other_byte_is_refused(data):
    stored = entry.pack(SCOPE, b"", [5, 6, 7], b"some payload", "exact", 2.5)
    at, bits = data.draw(st.integers(0, len(stored) - 1)), data.draw(st.integers(1, 255))
    damaged = bytearray(stored)
    damaged[at] ^= bits
    for wrong in (bytes(damaged), stored[:at], stored + stored[:bits]):
        with pytest.raises(FormatError):
            entry.unpack(wrong, page_key(SCOPE, b"", [5, 6, 7]))


def test_an_entry_under_another_key_is_refused():
    with pytest.raises(FormatError, match="another's"):
        entry.unpack(entry.pack(SCOPE, b"", [5], b"payload", "hot", None), page_key(SCOPE, b"", [6]))


def golden_arguments():
    return SCOPE, page_key(SCOPE, b"", [1, 2, 3]), [4, 5, 2**32 - 1], bytes(range(100)), "sequence", 3.25


def test_golden_entry_is_read():
    scope, parent, ids, *_ = golden_arguments()
    found = entry.unpack(GOLDEN.read_bytes(), page_key(scope, parent, ids))
    assert (found.scope, found.parent, list(found.ids), found.payload, found.form, found.bits) == golden_arguments()
    assert entry.pack(*golden_arguments()) == GOLDEN.read_bytes()


# What is found again.


def test_longest_chain(tmp_path):
    with PrefixStore(tmp_path) as store:
        keys = chain(store, PAGES[:3])
        assert store.find(SCOPE, PAGES) == keys
        assert store.find(SCOPE, [PAGES[0], PAGES[2]]) == keys[:1]
        assert store.find(SCOPE, PAGES[1:]) == []
        assert store.find(scope_key(model="other"), PAGES) == []
        assert store.find(SCOPE, []) == []
        for n, key in enumerate(keys):
            found = store.get(key, LIMIT)
            assert (found.key, found.payload, list(found.ids)) == (key, f"page {n}".encode(), PAGES[n])
        assert store.get(page_key(SCOPE, b"", [9]), LIMIT) is None


def test_another_process_finds_it(tmp_path):
    with PrefixStore(tmp_path) as store:
        keys = chain(store, PAGES)
    with PrefixStore(tmp_path) as store:
        assert store.find(SCOPE, PAGES) == keys
        assert [row.hits for row in store.entries()] == [0] * 5


def test_uses_are_counted_and_payloads_bounded(tmp_path):
    with PrefixStore(tmp_path) as store:
        key = store.put(SCOPE, b"", [1], b"x" * 100, form="sequence", bits=1.5)
        made = next(store.entries())
        assert store.get(key, 99) is None
        assert store.get(key, 100).payload == b"x" * 100
        assert store.put(SCOPE, b"", [1], b"another payload", form="sequence", bits=1.5) == key
        row = next(store.entries())
        assert (row.hits, row.form, row.tokens, row.bits, row.created) == (1, "sequence", 1, 1.5, made.created)
        assert row.used > made.used
        assert store.get(key, 100).payload == b"x" * 100


def test_a_page_needs_its_parent(tmp_path):
    with PrefixStore(tmp_path) as store:
        keys = chain(store, PAGES[:3])
        store.drop(keys[1])
        assert store.find(SCOPE, PAGES[:3]) == keys[:1]
        assert store.put(SCOPE, page_key(SCOPE, b"", [9]), [8], b"", form="hot", bits=None) is None
        assert chain(store, PAGES[:3]) == keys
        assert store.find(SCOPE, PAGES[:3]) == keys


def test_objects_that_were_deleted_are_put_back(tmp_path):
    with PrefixStore(tmp_path) as store:
        keys = chain(store, PAGES[:2])
        for path in (tmp_path / "objects").rglob("*"):
            if path.is_file():
                path.unlink()
        assert store.find(SCOPE, PAGES) == keys
        assert chain(store, PAGES[:2]) == keys
        assert store.get(keys[0], LIMIT) is not None
        assert store.get(keys[1], LIMIT) is not None


@pytest.mark.parametrize("options", [{"form": "warm"}, {"max_bytes": 0}, {"half_life": 0.0}, {"half_life": math.nan}])
def test_wrong_options(tmp_path, options):
    with pytest.raises(ConfigError):
        PrefixStore(tmp_path, **options)


def test_wrong_arguments(tmp_path):
    with PrefixStore(tmp_path) as store:
        for wrong in ({"form": "warm"}, {"bits": -1.0}, {"bits": math.nan}, {"bits": 1e39}):
            with pytest.raises(ConfigError):
                chain(store, PAGES[:1], **wrong)
        for kind, units, seconds in (("walk", 1, 1.0), ("hot", 0, 1.0), ("hot", 1, 0.0), ("prefill", 1, math.inf)):
            with pytest.raises(ConfigError):
                store.note_rate(kind, units, seconds)
    with pytest.raises(UnsupportedOperationError, match="closed"):
        store.find(SCOPE, PAGES)
    (tmp_path / "file").touch()
    for url in (tmp_path / "file", "nosuchprotocol://there"):
        with pytest.raises(ConfigError):
            PrefixStore(url)


# Where it is kept.


def test_local_paths():
    assert local_path("file:///a/b") == Path("/a/b")
    assert local_path("a/b") == Path("a/b")
    assert local_path("~/b") == Path.home() / "b"
    assert local_path("s3://bucket/x") is local_path("simplecache::file:///a") is None


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_nobody_else_may_read_it(tmp_path):
    root = tmp_path / "store"
    with PrefixStore(root) as store:
        chain(store, PAGES[:2])
        modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (root, *root.rglob("*"))}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o600}


class Renaming(MemoryFileSystem):
    """A filesystem that renames by itself, and may refuse to."""

    protocol = "renaming"
    store, pseudo_dirs, refuses, moves = {}, [""], False, 0

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("renaming://", "memory://"))

    def mv(self, path1, path2, **kwargs):
        if self.refuses:
            raise RuntimeError("not here")
        type(self).moves += 1
        super().mv(path1, path2)


fsspec.register_implementation("renaming", Renaming, clobber=True)


@pytest.fixture(params=["memory", "renaming", "renaming, refused"])
def remote(request, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_SEQKV_CACHE", str(tmp_path))
    monkeypatch.setattr(Renaming, "refuses", "refused" in request.param)
    files = fsspec.filesystem(request.param.split(",")[0])
    yield f"{files.protocol}://stores/one"
    files.store.clear()


def test_remote(remote, monkeypatch, tmp_path):
    with PrefixStore(remote) as store:
        keys = chain(store, PAGES)
        assert store.find(SCOPE, PAGES) == keys
        assert store.get(keys[2], LIMIT).payload == b"page 2"
    assert len(list((tmp_path / "stores").glob("*.sqlite"))) == 1
    monkeypatch.setenv("HF_SEQKV_CACHE", str(tmp_path / "another machine"))
    with PrefixStore(remote) as store:
        assert list(store.entries()) == []
        assert store.find(SCOPE, PAGES[:3]) == keys[:3]
        assert store.verify() | {"bytes": 0} == dict.fromkeys(store.verify(), 0) | {"entries": 5, "adopted": 2}
        store.drop(keys[4])
        assert store.get(keys[4], LIMIT) is None
        assert store.prune(1)["removed"] == 4
    assert list(fsspec.core.url_to_fs(remote)[0].find("/")) == []


def test_remote_failures_are_misses(remote, monkeypatch):
    files = fsspec.core.url_to_fs(remote)[0]

    def fail(*args, **kwargs):
        raise RuntimeError("no connection")

    with PrefixStore(remote) as store:
        keys = chain(store, PAGES[:2])
        with monkeypatch.context() as patch, warned() as said:
            for name in ("cat_file", "pipe_file", "find", "rm_file"):
                patch.setattr(type(files), name, fail)
            assert store.get(keys[0], LIMIT) is store.get(keys[1], LIMIT) is None
            assert store.put(SCOPE, b"", [9], b"", form="hot", bits=None) is None
            assert store.verify()["entries"] == 0
        assert [str(warning.message).count("no connection") for warning in said] == [1, 1]
        assert store.get(keys[1], LIMIT).payload == b"page 1"


if __name__ == "__main__":
    GOLDEN.write_bytes(entry.pack(*golden_arguments()))
