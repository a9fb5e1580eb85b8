"""`seqkv store`: tables on stderr, JSON on stdout."""

import json

import pytest

from hf_seqkv.cli import main
from hf_seqkv.cli.store import size
from hf_seqkv.store.keys import scope_key
from hf_seqkv.store.prefix_store import PrefixStore

SCOPE = scope_key(model="tests")


@pytest.fixture
def keys(tmp_path):
    """Of a chain of three pages in a store at `tmp_path`."""
    found, parent = [], b""
    with PrefixStore(tmp_path) as store:
        for n in range(3):
            parent = store.put(SCOPE, parent, [n] * 64, bytes(1_000_000), form="exact", bits=2.5 if n else None)
            found.append(parent)
        store.get(found[0], 1 << 20)
        store.note_rate("exact", 10, 0.02)
        store.note_rate("prefill", 100, 1.0)
    return found


def printed(capsys, *arguments):
    """JSON and table."""
    assert main(["store", *map(str, arguments), "--json"]) == 0
    out, err = capsys.readouterr()
    return json.loads(out.splitlines()[-1]), err.splitlines()


def test_ls(keys, tmp_path, capsys):
    found, table = printed(capsys, "ls", tmp_path)
    assert [entry["key"] for entry in found["entries"]] == [key.hex() for key in keys]
    assert [(entry["depth"], entry["hits"], entry["bits"]) for entry in found["entries"]] == [
        (0, 1, None),
        (1, 0, 2.5),
        (2, 0, 2.5),
    ]
    assert table[1].split()[:7] == [keys[0].hex()[:12], "0", "exact", "64", "1.0", "MB", "-"]
    assert table[-1] == "3 entries"


def test_ls_without_a_parent(keys, tmp_path, capsys):
    with PrefixStore(tmp_path) as store:
        store.drop(keys[1])
    found, _ = printed(capsys, "ls", tmp_path)
    assert [entry["depth"] for entry in found["entries"]] == [0, None]


def test_stat(keys, tmp_path, capsys):
    found, table = printed(capsys, "stat", tmp_path)
    assert (found["entries"], found["tokens"], found["hits"], found["max_bytes"]) == (3, 192, 1, None)
    assert [(group["scope"], group["form"]) for group in found["groups"]] == [(SCOPE.hex(), "exact")]
    assert found["rates"]["load"]["exact"] == pytest.approx(0.002)
    assert found["rates"]["prefill"] == pytest.approx([0.01, 0.0])
    assert table[1].split() == [SCOPE.hex()[:12], "exact", "3", "192", "3.0", "MB", "1"]
    assert table[-2:] == [
        "load, exact: 2 ms a page",
        "prefill: 10 ms a token, and 0 ms more for 1,000 tokens before it",
    ]


def test_prune_and_verify(keys, tmp_path, capsys):
    found, table = printed(capsys, "prune", tmp_path, "--max-bytes", "1.5MB")
    assert (found["removed"], found["entries"]) == (2, 1)
    assert table == ["removed 2 entries, 2.0 MB, and 0 temporary files; 1 entries, 1.0 MB, stay"]
    name = keys[0].hex()
    (tmp_path / "objects" / name[:2] / name).write_bytes(b"foreign")
    found, table = printed(capsys, "verify", tmp_path)
    assert (found["entries"], found["damaged"]) == (0, 1)
    assert table[1] == "1 damaged, 0 missing, 0 unreadable, 0 newer; 0 temporary files removed"


def test_no_store(tmp_path, capsys):
    assert main(["store", "ls", str(tmp_path / "nowhere")]) == 1
    assert "no such directory" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()


def test_sizes():
    assert [size(text) for text in ("4096", "2GB", "500MiB", "1.5 kb", "1K")] == [
        4096,
        2 * 10**9,
        500 * 2**20,
        1500,
        1000,
    ]
    for wrong in ("", "GB", "-1", "2XB", "1I"):
        with pytest.raises(Exception, match="is not a size"):
            size(wrong)
