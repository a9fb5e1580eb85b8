"""The index of a store: what is in it, how often and when it was used, and what restoring was measured to cost.

Objects are the truth, so the index may be lost: it is built again from their headers. Every row carries a checksum of
its own, since SQLite notices damage to its structure only. What cannot be used at all (a read-only directory, a full
disk, a lock that nobody gives back) is replaced by an index in memory.

The journal is a rollback journal, not a write-ahead log: that one needs shared memory, which works on no network
filesystem and kills the process where its file is cut short. `synchronous` is off: a kill loses nothing, and what a
loss of power may damage is built again.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

from ..errors import UnsupportedOperationError
from .entry import FORMS, Head
from .planner import Sums, is_sound

T = TypeVar("T")
_FILLED = 1  # `user_version` of an index that was made to its end
_PATIENCE = 10.0  # seconds to wait for a lock that another process holds
_COLUMNS = "key, scope, parent, form, bytes, tokens, bits, created, used, hits"
_SCHEMA = (
    "CREATE TABLE entries (key blob primary key, scope blob, parent blob, form integer, bytes integer, "
    "tokens integer, bits real, created real, used real, hits integer, checksum integer) without rowid",
    "CREATE TABLE rates (kind blob primary key, weight real, x real, xx real, y real, xy real) without rowid",
)
_SELECT = f"select {_COLUMNS}, checksum from entries"
_PUT = f"insert or replace into entries ({_COLUMNS}, checksum) values ({', '.join('?' * 11)})"


class EntryInfo(NamedTuple):
    """What the index knows of an entry: `bytes` of its file, `bits` a token, times in seconds since 1970."""

    key: bytes
    scope: bytes
    parent: bytes
    form: str
    bytes: int
    tokens: int
    bits: float | None
    created: float
    used: float
    hits: int

    @classmethod
    def of(cls, head: Head, written: float) -> EntryInfo:
        """Of an entry that was not used yet."""
        return cls(*head[:4], head.size, head.tokens, head.bits, written, written, 0)


class Index:
    """Rows by key; safe to use from several threads and processes.

    Args:
        path: Its file; the directory must exist.
        scan: Makes the rows of a new index.
        warn: Takes what went wrong, for people.
    """

    def __init__(self, path: Path, scan: Callable[[], Iterable[EntryInfo]], warn: Callable[[str], None]):
        self._path, self._scan, self._warn = path, scan, warn
        self._in_memory = self._closed = False
        self._connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        self._lock, self._process = threading.RLock(), os.getpid()

    def find(self, key: bytes) -> EntryInfo | None:
        return self._run(lambda db: _one(db, key), write=False)

    def add(self, info: EntryInfo) -> None:
        self._run(lambda db: db.execute(_PUT, _row(info)))

    def touch(self, key: bytes, hits: int) -> bool:
        """Note a use now, and so many hits; False where there is no such row."""

        def work(db):
            info = _one(db, key)
            if info is not None:
                db.execute(_PUT, _row(info._replace(used=time.time(), hits=info.hits + hits)))
            return info is not None

        return self._run(work)

    def remove(self, keys: Iterable[bytes]) -> None:
        self._run(lambda db: db.executemany("delete from entries where key = ?", [(key,) for key in keys]))

    def rows(self) -> list[EntryInfo]:
        """All of them; damaged ones are removed."""

        def work(db):
            found = [(values[0], _info(values)) for values in db.execute(_SELECT)]
            db.executemany("delete from entries where key = ?", [(key,) for key, info in found if info is None])
            return [info for _, info in found if info is not None]

        return self._run(work)

    def total(self) -> float:
        """Bytes of all entries."""
        return self._run(lambda db: db.execute("select total(bytes) from entries").fetchone()[0], write=False)

    def sums(self) -> dict[str, Sums]:
        """Of measured rates, by kind; see `planner.observe`."""
        found = self._run(lambda db: db.execute("select * from rates").fetchall(), write=False)
        return {kind.decode(errors="replace"): tuple(sums) for kind, *sums in found if _sound(kind, sums)}

    def update_sums(self, kind: str, update: Callable[[Sums | None], Sums]) -> None:
        def work(db):
            name = kind.encode()
            found = db.execute("select * from rates where kind = ?", (name,)).fetchone()
            sums = update(tuple(found[1:]) if found and _sound(*found[:1], found[1:]) else None)
            db.execute("insert or replace into rates values (?, ?, ?, ?, ?, ?)", (name, *sums))

        self._run(work)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._disconnect()

    # -- the database --------------------------------------------------------------------------------------------

    def _run(self, work: Callable[[sqlite3.Connection], T], write: bool = True) -> T:
        """`work` as one transaction, in an index that is mended or made anew as need be."""
        if self._process != os.getpid():
            # A fork's copy: neither its lock nor its connection may be used, and closing would undo the parent's work.
            self._parents, self._connection = self._connection, None
            self._lock, self._process = threading.RLock(), os.getpid()
        with self._lock:
            if self._closed:
                raise UnsupportedOperationError("this store was closed; open it again with PrefixStore(url)")
            for _ in range(3):
                try:
                    return self._transaction(work, write)
                except (sqlite3.Error, MemoryError, OSError, OverflowError) as error:
                    self._disconnect()
                    if _is_damage(error):
                        self._discard()
                        self._warn(f"its index was damaged ({error}) and is built anew from the entries")
                    else:
                        self._in_memory = True
                        self._warn(f"its index cannot be used ({error}); this process keeps one in memory")
            self._in_memory = True
            return self._transaction(work, write)

    def _transaction(self, work: Callable[[sqlite3.Connection], T], write: bool) -> T:
        if self._connection is None or not (self._in_memory or self._file == _identity(self._path)):
            self._disconnect()
            self._connect()
        db = self._connection
        if not write:
            return work(db)
        db.execute("begin immediate")
        try:
            found = work(db)
            db.execute("commit")
            return found
        except BaseException:
            with suppress(sqlite3.Error):
                db.execute("rollback")
            raise

    def _connect(self) -> None:
        if self._in_memory:
            self._connection = _open(":memory:")
            self._fill()
            return
        with _exclusive(self._path.with_name(f"{self._path.name}.lock")):
            os.close(os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600))
            self._file = _identity(self._path)
            self._connection = _open(self._path)
            if self._connection.execute("pragma user_version").fetchone() == (0,) and self._fill():
                self._warn("its index was missing and is built anew from the entries")
            found = self._connection.execute("select sql from sqlite_master order by rowid").fetchall()
            if found != [(sql.encode(),) for sql in _SCHEMA]:
                raise sqlite3.DatabaseError("its tables are not those of this version")

    def _fill(self) -> int:
        """Tables and rows of a new index, all of it or nothing; returns the number of rows."""
        db = self._connection
        db.execute("begin immediate")
        for statement in _SCHEMA:
            db.execute(statement)
        count = db.executemany(_PUT, map(_row, self._scan())).rowcount
        db.execute(f"pragma user_version = {_FILLED}")
        db.execute("commit")
        return max(count, 0)

    def _disconnect(self) -> None:
        if self._connection is not None:
            with suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None

    def _discard(self) -> None:
        """Remove the file, unless another process has already put a new one in its place."""
        with suppress(OSError), _exclusive(self._path.with_name(f"{self._path.name}.lock")):
            if self._file == _identity(self._path):
                os.unlink(self._path)
                with suppress(FileNotFoundError):
                    os.unlink(f"{self._path}-journal")


def _open(path: Path | str) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=_PATIENCE, isolation_level=None, check_same_thread=False)
    db.text_factory = bytes  # a damaged row may hold any bytes as text
    for pragma in ("trusted_schema = off", "cell_size_check = on", "journal_mode = truncate", "synchronous = off"):
        db.execute(f"pragma {pragma}")
    return db


def _is_damage(error: Exception) -> bool:
    """Whether a new file would help."""
    passing = ("locked", "full", "readonly", "unable to open")
    said = isinstance(error, sqlite3.OperationalError) and any(word in str(error) for word in passing)
    return not (said or isinstance(error, OSError))


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file has this name."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


@contextmanager
def _exclusive(path: Path):
    """Hold the lock of a file among processes (where the system has `flock`).

    Raises:
        OSError: It cannot be made, or another process keeps it.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    file, end = os.open(path, os.O_CREAT | os.O_RDWR, 0o600), time.monotonic() + _PATIENCE
    try:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.01)
        yield
    finally:
        os.close(file)


def _row(info: EntryInfo) -> tuple:
    values = (*info[:3], FORMS.index(info.form), *info[4:])
    return (*values, _checksum(values))


def _info(values: tuple) -> EntryInfo | None:
    """A row as read; None where it is not what was written."""
    *values, checksum = values
    if checksum != _checksum(values):
        return None
    return EntryInfo(*values[:3], FORMS[values[3]], *values[4:])


def _one(db: sqlite3.Connection, key: bytes) -> EntryInfo | None:
    values = db.execute(f"{_SELECT} where key = ?", (key,)).fetchone()
    return None if values is None else _info(values)


def _checksum(values: Iterable) -> int:
    return zlib.crc32(repr(tuple(values)).encode())


def _sound(kind, sums) -> bool:
    return isinstance(kind, bytes) and all(isinstance(x, float) for x in sums) and is_sound(sums)
