"""Objects and their index, kept in agreement: where a store is, what is in it, and what becomes of damage."""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from ..errors import ConfigError, FormatError, SeqKVWarning
from .entry import HEADER_BYTES, Entry, Head, NewerVersionError, read_head, unpack
from .index import EntryInfo, Index
from .keys import MOST_IDS
from .objects import LocalObjects


def local_path(url: str | Path) -> Path | None:
    """The directory that a path, or a `file://` URL, means; None for a store elsewhere."""
    protocol, separator, path = str(url).partition("://")
    if "::" in str(url) or (separator and protocol not in ("file", "local")):
        return None
    return Path(path if separator else url).expanduser()


def cache_directory() -> Path:
    """Where indices of remote stores are: `HF_SEQKV_CACHE`, or `hf_seqkv` in `XDG_CACHE_HOME` or `~/.cache`."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HF_SEQKV_CACHE") or Path(caches) / "hf_seqkv") / "stores"


class Shelf:
    """Entries of a store at a directory or URL.

    Raises:
        ConfigError: It cannot be opened there.
    """

    def __init__(self, url: str | Path):
        self.url = str(url)
        self._said: set[str] = set()
        root = local_path(url)
        if root is None:
            from .remote import RemoteObjects

            self.objects = RemoteObjects(self.url)
            path = cache_directory() / f"{hashlib.sha256(self.url.encode()).hexdigest()[:32]}.sqlite"
        else:
            self.objects = LocalObjects(root)
            path = root / "index.sqlite"
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"store {self.url!r}: {error}; give a directory that can be made") from error
        # Reading every header of a remote store would take long: there, entries are found as they are asked for.
        scan = self._scan if root is not None else tuple
        self.index = Index(path, scan, lambda said: self.warn("index", said))
        self.index.total()  # makes the index now: one made after the first object would count as lost

    def warn(self, topic: str, said: str) -> None:
        """Once a topic."""
        if topic not in self._said:
            self._said.add(topic)
            warnings.warn(f"store {self.url!r}: {said}", SeqKVWarning, stacklevel=4)

    def known(self, key: bytes) -> EntryInfo | None:
        """From the index, or from an object that another machine, or a writer before its end, has put there."""
        return self.index.find(key) or self.adopt(key)

    def adopt(self, key: bytes) -> EntryInfo | None:
        """From the object's header; the index has it then, as used now."""
        info = self._peek(key.hex(), time.time())
        if info is not None:
            self.note(info, hits=0)
        return info

    def note(self, info: EntryInfo, hits: int) -> None:
        """A use of an entry that is there."""
        if not self.index.touch(info.key, hits):
            self.index.add(info._replace(hits=hits))

    def fetch(self, key: bytes, limit: int) -> tuple[Head, Entry] | None:
        """An entry, verified; None where there is none whose payload has at most `limit` bytes.

        Raises:
            FormatError: It was damaged, and was dropped.
            NewerVersionError: It was written by a newer hf_seqkv.
            OSError: It cannot be read.
        """
        found = self.objects.read(key.hex(), HEADER_BYTES + 4 * MOST_IDS + limit)
        if found is None:
            self.index.remove([key])
            return None
        data, size = found
        try:
            head = read_head(data, size)
            return (head, unpack(data, key)) if head.payload_bytes <= limit else None
        except NewerVersionError:
            self.index.remove([key])
            raise
        except FormatError:
            # Another writer may have put a sound one in its place.
            with suppress(OSError):
                if self.objects.read(key.hex(), len(data)) == found:
                    self.objects.remove(key.hex())
            self.index.remove([key])
            raise

    def remove(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            with suppress(OSError):
                self.objects.remove(key.hex())
        self.index.remove(keys)

    def _peek(self, name: str, written: float) -> EntryInfo | None:
        with suppress(OSError, FormatError):
            found = self.objects.read(name, HEADER_BYTES)
            if found is not None and (head := read_head(*found)).key.hex() == name:
                return EntryInfo.of(head, written)
        return None

    def _scan(self) -> Iterator[EntryInfo]:
        return filter(None, (self._peek(name, written) for name, written in self.objects.list()))
