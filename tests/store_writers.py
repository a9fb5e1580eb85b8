"""Processes of the tests of the prefix store; they import little, because many are started."""

import itertools
import os
import random
import sys
import warnings
from contextlib import contextmanager

from hf_seqkv.store.keys import scope_key
from hf_seqkv.store.prefix_store import PrefixStore

SCOPE, LIMIT = scope_key(model="tests"), 1 << 20


def payload(ids):
    """What is stored for a page, told from its ids alone."""
    return random.Random(str(list(ids))).randbytes(1000)


def put(store, ids, parent=b""):
    return store.put(SCOPE, parent, ids, payload(ids), form="exact", bits=None)


def check(store, key, ids):
    """Whether it is there; if so it is right."""
    found = store.get(key, LIMIT)
    assert found is None or (found.payload, list(found.ids)) == (payload(ids), list(ids))
    return found is not None


@contextmanager
def warned():
    """A list of the warnings that are given meanwhile."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield said


def hammer(store, seed, rounds):
    """Store chains out of a few, and read them back; returns how many payloads were read."""
    draw, count = random.Random(seed), 0
    for _ in range(rounds):
        pages = [[draw.randrange(3)] for _ in range(3)]
        parent = b""
        for ids in pages:
            parent = put(store, ids, parent)
            if parent is None:
                break
        keys = store.find(SCOPE, pages)
        count += sum(check(store, key, ids) for key, ids in zip(keys, pages, strict=False))
    return count


def hammer_alone(root, seed, rounds, max_bytes):
    with PrefixStore(root, max_bytes=int(max_bytes) or None) as store:
        print(hammer(store, seed, int(rounds)))


def put_forever(root, seed, told):
    """Pages one after the other, each told once it is stored: key and ids, through a connection."""
    warnings.simplefilter("error")
    store, parent = PrefixStore(root), b""
    for n in itertools.count():
        ids = [seed, n]
        parent = put(store, ids, parent if n % 7 else b"")
        told.send((parent, tuple(ids)))


def fork(root):
    """Parent and child use one store, each with an index connection of its own."""
    with PrefixStore(root) as store:
        key = put(store, [1])
        if (process := os.fork()) == 0:
            os._exit(0 if check(store, key, [1]) and put(store, [2]) else 1)
        assert os.waitpid(process, 0)[1] == 0
        assert len(store.find(SCOPE, [[2]])) == 1
        assert put(store, [3])


def read_as_nobody(root, key):
    """What a user without rights sees."""
    import fcntl  # noqa: F401 - nothing can be imported any more after the next line

    if os.getuid() == 0:
        os.setuid(65534)
    with warned() as said, PrefixStore(root) as store:
        print(store.get(bytes.fromhex(key), LIMIT) is not None, len(store.find(SCOPE, [[1]])), put(store, [2]))
    print(*sorted({str(warning.message).partition("(")[0].rpartition(": ")[2].strip() for warning in said}), sep="|")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
