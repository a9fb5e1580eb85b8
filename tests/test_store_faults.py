"""The prefix store under damage, odd files, a lost index and failing writes: at worst a miss and one warning."""

import errno
import os
import random
import shutil
import sqlite3
import tempfile
from pathlib import Path

import pytest
from store_writers import warned

from hf_seqkv.errors import SeqKVWarning
from hf_seqkv.store import index as index_module
from hf_seqkv.store.keys import page_key, scope_key
from hf_seqkv.store.prefix_store import PrefixStore

SCOPE, LIMIT = scope_key(model="tests"), 1 << 16


def payload(ids):
    """What is stored for a page, told from its ids alone."""
    return random.Random(str(list(ids))).randbytes(20 + sum(ids) % 200)


def put(store, ids, parent=b""):
    return store.put(SCOPE, parent, ids, payload(ids), form="exact", bits=None)


class Shelves:
    """A store with three chains of two pages, some way of damaging it, and what must still be right."""

    def __init__(self, root, seed):
        self.root, self.draw, self.store = root, random.Random(seed), None
        self.chains = [[[n, 1], [n, 2, n]] for n in range(3)]
        self.keys = {}
        self.open()
        self.mend()

    def open(self):
        if self.store is not None:
            self.store.close()
        self.store = PrefixStore(self.root)

    def mend(self, gone=None):
        """Put again what is gone, by default everything."""
        for pages in self.chains:
            parent = b""
            for ids in pages:
                key = page_key(SCOPE, parent, ids)
                if gone is None or key.hex() in gone:
                    assert put(self.store, ids, parent) == key
                    self.keys[key] = ids
                parent = key

    def check(self, touched=frozenset()):
        for key, ids in self.keys.items():
            found = self.store.get(key, LIMIT)
            assert found is not None or key.hex() in touched
            assert found is None or (found.key, list(found.ids), found.payload) == (key, ids, payload(ids))

    def objects(self):
        return [path for path in (self.root / "objects").rglob("*") if path.is_file() and len(path.name) == 64]

    def damage(self, path, others):
        """One random fault; returns the names of files it touched."""
        data = bytearray(path.read_bytes()) if path.is_file() else bytearray()
        what = self.draw.choice(("flip", "flip", "truncate", "extend", "swap", "foreign", "delete", "copy"))
        other = self.draw.choice(others)
        if what == "flip":
            for _ in range(self.draw.choice((1, 1, 4)) if data else 0):
                data[self.draw.randrange(len(data))] ^= 1 << self.draw.randrange(8)
        elif what == "truncate":
            del data[self.draw.randrange(len(data) + 1) :]
        elif what == "extend":
            data += self.draw.randbytes(self.draw.randrange(1, 50))
        elif what == "foreign":
            data = self.draw.randbytes(self.draw.randrange(400))
        elif what == "copy":
            data = other.read_bytes()
        elif what == "swap":
            data = other.read_bytes()
            other.write_bytes(path.read_bytes())
        if what == "delete":
            path.unlink()
        elif self.draw.random() < 0.5:  # in place, under whoever has it open, or as a new file
            path.write_bytes(data)
        else:
            path.with_name("new").write_bytes(data)
            os.replace(path.with_name("new"), path)
        return {path.name, other.name} if what == "swap" else {path.name}


@pytest.fixture
def shelves(tmp_path):
    made = Shelves(tmp_path, 0)
    yield made
    made.store.close()


@pytest.fixture
def quick_path(tmp_path):
    """In memory where the system has such a directory: thousands of files are removed."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path) as path:
        yield Path(path)


@pytest.mark.parametrize(("what", "faults"), [("objects", 7000), ("index", 3000)])
def test_campaign(quick_path, what, faults):
    shelves, decoy = Shelves(quick_path, what), quick_path / "decoy"
    with warned() as said:
        for n in range(faults):
            if n % 50 == 0:
                assert len(said) <= 2
                said.clear()
                shelves.open()
            if what == "objects":
                found = shelves.objects()
                touched = shelves.damage(shelves.draw.choice(found), found)
                shelves.check(touched)
                shelves.mend(touched)
            else:
                decoy.write_bytes(shelves.objects()[0].read_bytes())
                shelves.damage(quick_path / "index.sqlite", [decoy])
                for pages, keys in zip(shelves.chains, zip(*[iter(shelves.keys)] * 2, strict=True), strict=True):
                    assert shelves.store.find(SCOPE, pages) == list(keys)
                if n % 10 == 0:
                    shelves.store.note_rate("exact", 1, 1.0)
                    assert shelves.store.rates().load.get("exact", 1.0) > 0
                    assert {row.key for row in shelves.store.entries()} <= set(shelves.keys)
                shelves.mend()
                shelves.check()
                assert all(path.stat().st_size > 0 for path in shelves.objects())
        assert {warning.category for warning in said} <= {SeqKVWarning}
        shelves.store.close()


@pytest.mark.skipif(os.name != "posix", reason="pipes and links are POSIX's")
def test_odd_things_in_place_of_files(shelves, tmp_path):
    first, second, third, *rest = shelves.objects()
    for path, make in ((first, Path.mkdir), (second, os.mkfifo), (third, lambda path: path.symlink_to("/dev/zero"))):
        path.unlink()
        make(path)
    shutil.rmtree(rest[0].parent)
    rest[0].parent.touch()
    shelves.check({path.name for path in (first, second, third, *(p for p in rest if p.parent == rest[0].parent))})
    blocked = {path.name for path in rest if path.parent == rest[0].parent} | {first.name}
    with warned() as said:
        for pages in shelves.chains:
            parent = b""
            for ids in pages:
                key = put(shelves.store, ids, parent)
                assert key is None or key.hex() not in blocked
                parent = page_key(SCOPE, parent, ids)
        assert shelves.store.verify()["damaged"] == 0
    assert ["cannot be written" in str(warning.message) for warning in said] == [True]


def test_verify(shelves, tmp_path):
    flipped, cut, gone, newer, *_ = shelves.objects()
    data = bytearray(flipped.read_bytes())
    data[-1] ^= 1
    flipped.write_bytes(data)
    cut.write_bytes(cut.read_bytes()[:50])
    gone.unlink()
    data = bytearray(newer.read_bytes())
    data[4] = 2
    newer.write_bytes(data)
    old, young = flipped.with_name(".old.tmp"), flipped.with_name(".young.tmp")
    for path in (old, young):
        path.touch()
    os.utime(old, (1e9, 1e9))
    with PrefixStore(tmp_path / "other") as other:
        key = put(other, [77])
        name = f"objects/{key.hex()[:2]}"
        shutil.copytree(tmp_path / "other" / name, tmp_path / name, dirs_exist_ok=True)
    with PrefixStore(tmp_path) as store:
        report = store.verify()
        assert store.get(key, LIMIT).payload == payload([77])
        assert store.get(bytes.fromhex(newer.name), LIMIT) is None
        assert not any(store.verify()[name] for name in ("damaged", "adopted", "missing", "temporaries"))
    counts = {"damaged": 2, "missing": 1, "newer": 1, "temporaries": 1, "adopted": 1, "entries": 3, "unreadable": 0}
    assert report.items() >= counts.items()
    assert [path.exists() for path in (flipped, cut, newer, old, young)] == [False, False, True, False, True]


def test_one_warning(shelves, tmp_path):
    for path in shelves.objects():
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(SeqKVWarning, match="missing; more like it") as said:
        shelves.check({path.name for path in shelves.objects()})
    assert len(said) == 1
    assert list(shelves.store.entries()) == []


@pytest.mark.parametrize("again", [False, True], ids=["open", "opened again"])
@pytest.mark.parametrize("what", ["deleted", "emptied", "cut", "foreign", "other tables", "unfinished"])
def test_index_is_built_anew(shelves, tmp_path, what, again):
    path = tmp_path / "index.sqlite"
    if what == "deleted":
        path.unlink()
    elif what in ("other tables", "unfinished"):
        db = sqlite3.connect(path, isolation_level=None)
        db.execute("drop table entries" if what == "other tables" else "pragma user_version = 0")
        db.close()
    else:
        path.write_bytes({"emptied": b"", "cut": path.read_bytes()[:5000], "foreign": b"no index" * 1000}[what])
    with warned() as said:
        if again:
            shelves.open()
        assert {row.key for row in shelves.store.entries()} == set(shelves.keys)
    assert len(said) == (again or what != "unfinished")  # an open store does not look whether it is finished
    shelves.check()
    for pages in shelves.chains:
        assert len(shelves.store.find(SCOPE, pages)) == 2


def test_index_locked_or_unusable(shelves, tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "_PATIENCE", 0.05)
    holder = sqlite3.connect(tmp_path / "index.sqlite", isolation_level=None)
    holder.execute("begin exclusive")
    with pytest.warns(SeqKVWarning, match="locked"):
        shelves.open()
    shelves.check()
    assert {row.key for row in shelves.store.entries()} == set(shelves.keys)
    holder.close()
    (tmp_path / "index.sqlite").unlink()
    (tmp_path / "index.sqlite").mkdir()
    with pytest.warns(SeqKVWarning, match="keeps one in memory"):
        shelves.open()
    shelves.mend()
    shelves.check()


@pytest.mark.parametrize("failing", ["write", "fsync", "replace", "open"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_failed_writes(shelves, tmp_path, monkeypatch, failing, code):
    real = getattr(os, failing)

    def fail(*arguments):
        if failing != "open" or str(arguments[0]).endswith(".tmp"):
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    with monkeypatch.context() as patch, warned() as said:
        patch.setattr(os, failing, fail)
        assert put(shelves.store, [90]) is put(shelves.store, [91]) is None
    assert ["cannot be written" in str(warning.message) for warning in said] == [True]
    assert ("free space" in str(said[0].message)) is (code != errno.EIO)
    assert len(list((tmp_path / "objects").glob("*/*"))) == len(shelves.keys)
    shelves.check()
    assert put(shelves.store, [90]) is not None
