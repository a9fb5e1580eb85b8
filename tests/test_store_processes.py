"""Several threads and processes on one prefix store, kills at any moment, a disk that is really full."""

import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import store_writers
from store_writers import check, hammer, put, put_forever, warned

from hf_seqkv.errors import SeqKVWarning
from hf_seqkv.store.prefix_store import PrefixStore

posix = pytest.mark.skipif(os.name != "posix", reason="signals, users and mounts are POSIX's")


def start(what, *arguments, warnings="error"):
    """A function of `store_writers.py` as a process whose output is piped."""
    command = [sys.executable, "-W", warnings, store_writers.__file__, what, *map(str, arguments)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE)


def test_threads(tmp_path):
    with PrefixStore(tmp_path) as store:
        counts = []
        threads = [threading.Thread(target=lambda n=n: counts.append(hammer(store, n, 20))) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert counts == [60] * 8
        assert store.verify()["entries"] == len(list(store.entries())) == len(list((tmp_path / "objects").glob("*/*")))


@pytest.mark.parametrize("max_bytes", [0, 12_000], ids=["no limit", "12 kB"])
def test_processes(tmp_path, max_bytes):
    running = [start("hammer_alone", tmp_path, n, 60, max_bytes) for n in range(4)]
    counts = [int(process.communicate()[0]) for process in running]
    assert [process.returncode for process in running] == [0] * 4
    assert all(counts) if max_bytes else counts == [180] * 4
    with PrefixStore(tmp_path) as store:
        report = store.verify()
        assert not any(report[name] for name in ("adopted", "damaged", "unreadable", "missing"))
        # Each writer may be one entry over before it sees another's.
        assert not max_bytes or report["bytes"] <= max_bytes + 4 * 1200


def test_processes_that_find_a_damaged_index(tmp_path):
    with PrefixStore(tmp_path) as store:
        hammer(store, 0, 20)
    (tmp_path / "index.sqlite").write_bytes(b"no index" * 1000)
    running = [start("hammer_alone", tmp_path, n, 30, 0, warnings="ignore") for n in range(4)]
    assert [int(process.communicate()[0]) for process in running] == [90] * 4
    with PrefixStore(tmp_path) as store:
        report = store.verify()
        assert not any(report[name] for name in ("damaged", "unreadable", "missing"))
        assert len(list(store.entries())) == report["entries"]


@posix
def test_kills(tmp_path):
    draw, told = random.Random(0), {}
    processes = multiprocessing.get_context("forkserver")  # torch is imported once, not a hundred times
    processes.set_forkserver_preload(["hf_seqkv.store.prefix_store"])
    for n in range(100):
        reader, writer = processes.Pipe(duplex=False)
        process = processes.Process(target=put_forever, args=(tmp_path, n, writer))
        process.start()
        writer.close()
        told.update([reader.recv()])
        time.sleep(draw.uniform(0, 0.02))
        process.kill()
        with contextlib.suppress(EOFError, OSError), reader:  # its end, or half a message
            while True:
                told.update([reader.recv()])
        process.join()
        assert process.exitcode == -signal.SIGKILL
        process.close()
        if n % 20 == 0:
            with PrefixStore(tmp_path) as store:
                assert all(check(store, key, ids) for key, ids in told.items())
    with PrefixStore(tmp_path) as store:
        assert all(check(store, key, ids) for key, ids in told.items())
        report = store.verify()
    assert report["entries"] >= len(told) >= 100
    assert not any(report[name] for name in ("damaged", "unreadable", "missing"))


@posix
def test_a_fork(tmp_path):
    process = start("fork", tmp_path)
    process.communicate()
    assert process.returncode == 0


@posix
def test_a_full_disk(tmp_path):
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", tmp_path], capture_output=True)
    if made.returncode:
        pytest.skip("may not mount a file system")
    try:
        with PrefixStore(tmp_path / "store") as store:
            with warned() as said:
                keys = {put(store, [n]): [n] for n in range(200)}
            assert {warning.category for warning in said} == {SeqKVWarning}
            assert ["free space or set max_bytes" in str(warning.message) for warning in said].count(True) == 1
            assert len(said) <= 2  # the other one is of the index
            keys.pop(None)
            assert len(keys) > 5
            assert all(check(store, key, ids) for key, ids in keys.items())
            assert not list((tmp_path / "store").rglob("*.tmp"))
            assert store.prune(10_000)["removed"] > 0
            assert put(store, [1000]) is not None
        with PrefixStore(tmp_path / "store") as store:
            assert store.verify()["damaged"] == 0
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@posix
@pytest.mark.parametrize("mode", [0o555, 0o000], ids=["may be read", "may not be read"])
def test_no_rights(mode):
    with tempfile.TemporaryDirectory() as path:
        root = Path(path)
        with PrefixStore(root) as store:
            key = put(store, [1])
        folders = [root, root / "objects", *(root / "objects").iterdir()]
        for file in (*root.glob("index*"), *root.glob("objects/*/*")):
            file.chmod(mode & 0o444)
        for folder in folders:
            folder.chmod(mode)
        process = start("read_as_nobody", root, key.hex())
        answers, warned = process.communicate()[0].splitlines()
        for folder in folders:
            folder.chmod(0o700)
    assert process.returncode == 0
    assert answers == ("True 1 None" if mode else "False 0 None")
    unreadable = set() if mode else {"an entry cannot be read"}
    assert set(warned.split("|")) == {"an entry cannot be written", "its index cannot be used"} | unreadable
