"""`PrefixStore`: pages of token sequences, shared by sessions, processes and machines.

A trie over pages: an entry's key tells its tokens and all before them (`keys.py`), its payload is opaque bytes. Entries
are files (`entry.py`) in a local directory or below any fsspec URL; beside them is an index (`index.py`), for a remote
store in this user's cache directory. Whatever is damaged costs a miss and one warning, never a wrong payload, an
error, or another entry.
"""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..errors import ConfigError, FormatError
from . import eviction, planner, upkeep
from .entry import FORMS, MOST_BITS, PAGE_FORMS, Entry, NewerVersionError, pack, read_head
from .index import EntryInfo
from .keys import page_key
from .shelf import Shelf
from .writer import Writer

WEEK = 7 * 24 * 3600.0
_SLACK = 32  # an eviction frees 1/32 of the budget if it can, so that the next puts need none
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


class PrefixStore:
    """Entries by key, in a directory or below a URL; usable from several threads, and as a context manager.

    Args:
        url: Local directory, made if need be, or a URL that fsspec opens (`s3://...`).
        namespace: Part of the scopes that users of the store make; see `scope_key`.
        form: Which form users of the store write, `"hot"`, `"exact"` or `"sequence"`; None leaves it to them.
        preset: Of the sequence codec, for users that write that form: `"fine"`, `"balanced"` or `"small"`.
        max_bytes: Budget for all entries that the index knows; None for no limit.
        half_life: Seconds in which an unused entry's worth halves; see `eviction.py`.

    Raises:
        ConfigError: An argument is invalid, or the store cannot be opened there.
    """

    def __init__(
        self,
        url: str | Path,
        *,
        namespace: str = "",
        form: str | None = None,
        preset: str = "balanced",
        max_bytes: int | None = None,
        half_life: float = WEEK,
    ):
        if form is not None and form not in PAGE_FORMS:
            raise ConfigError(f"form={form!r} is not one of {', '.join(PAGE_FORMS)}, or None")
        if max_bytes is not None and max_bytes < 1:
            raise ConfigError(f"max_bytes={max_bytes!r} must be at least 1, or None for no limit")
        if not half_life > 0:
            raise ConfigError(f"half_life={half_life!r} must be more than 0 seconds")
        self.url, self.namespace, self.form, self.preset = str(url), namespace, form, preset
        self.max_bytes, self.half_life = max_bytes, half_life
        self._shelf, self._writer, self._slow = Shelf(url), Writer(), Writer()

    def find(self, scope: bytes, pages: Sequence[Sequence[int]]) -> list[bytes]:
        """Keys of the longest stored chain from the first page on; reads no payload.

        Args:
            scope: 32 bytes; see `scope_key`.
            pages: Token ids, page by page.

        Raises:
            ConfigError: See `page_key`.
        """
        keys, parent = [], b""
        for ids in pages:
            parent = page_key(scope, parent, ids)
            if self._shelf.known(parent) is None:
                break
            keys.append(parent)
        return keys

    def get(self, key: bytes, limit: int) -> Entry | None:
        """The entry of a key, verified from its first byte to its last; None is a miss.

        Args:
            limit: Most bytes its payload may have; no more is read.
        """
        try:
            found = self._shelf.fetch(key, limit)
        except NewerVersionError:
            return None
        except FormatError as error:
            self._shelf.warn("damage", f"{error}. It counts as missing; more like it are not mentioned")
            return None
        except OSError as error:
            self._shelf.warn("read", f"an entry cannot be read ({error}); it counts as missing")
            return None
        if found is None:
            return None
        head, entry = found
        self._shelf.note(EntryInfo.of(head, time.time()), hits=1)
        return entry

    def put(
        self, scope: bytes, parent: bytes, ids: Sequence[int], payload: bytes, *, form: str, bits: float | None
    ) -> bytes | None:
        """Store a page; once this returned its key, neither a kill nor a loss of power takes it.

        Args:
            parent: Key of the page before it, `b""` for the first.
            ids: Its token ids.
            form: What the payload is: `"hot"`, `"exact"` or `"sequence"`; or `"tables"`, see `entry.py`.
            bits: -log2 P of its tokens under the model, a token; None where not known.

        Returns:
            Its key, also where it was stored before. None where its parent is not stored, where it is worth less than
            what would have to make room, and where it cannot be written.

        Raises:
            ConfigError: See `page_key`; or the form is unknown, or bits are not from 0 to a million.
        """
        if form not in FORMS or not (bits is None or 0 <= bits < MOST_BITS):
            raise ConfigError(f"form={form!r}, bits={bits!r}: a form is one of {', '.join(FORMS)}, bits 0 or more")
        key = page_key(scope, parent, ids)
        # The object is asked for, not its row: so what somebody deleted is put back.
        if self._shelf.adopt(key) is not None:
            return key
        if parent and self._shelf.known(parent) is None:
            return None
        data = pack(scope, parent, ids, payload, form, bits)
        info = EntryInfo.of(read_head(data, len(data)), time.time())
        evicted = self._room_for(info)
        if evicted is None:
            return None
        try:
            self._shelf.objects.write(key.hex(), data)
        except OSError as error:
            remedy = "free space or set max_bytes" if error.errno in _FULL else "see to its directory or connection"
            self._shelf.warn("write", f"an entry cannot be written ({error}); what it holds stays, {remedy}")
            return None
        self._shelf.index.add(info)
        self._shelf.remove(evicted)
        return key

    def _room_for(self, info: EntryInfo) -> list[bytes] | None:
        """What to evict for a new entry, once it is written; None where it is not worth that."""
        if self.max_bytes is None or self._shelf.index.total() + info.bytes <= self.max_bytes:
            return []
        rows = self._shelf.index.rows()
        least = sum(row.bytes for row in rows) + info.bytes - self.max_bytes
        worth = eviction.worth(0, info.bits, 0.0, self.half_life)
        known = upkeep.candidates(rows, self.half_life)
        return eviction.victims(known, least, least + self.max_bytes // _SLACK, worth, info.parent)

    def drop(self, key: bytes) -> None:
        """Remove an entry; what follows it is found again once it is stored again."""
        self._shelf.remove([key])

    def prune(self, max_bytes: int) -> dict[str, int]:
        """Shrink it; see `upkeep.prune`."""
        return upkeep.prune(self._shelf, max_bytes, self.half_life)

    def verify(self) -> dict[str, int]:
        """Check all of it; see `upkeep.verify`."""
        return upkeep.verify(self._shelf)

    def entries(self) -> Iterator[EntryInfo]:
        """What the index knows of each entry."""
        return iter(self._shelf.index.rows())

    def stat(self) -> dict:
        """Totals, the same by scope and form, and rates; JSON types."""
        groups, rates = upkeep.totals(self.entries()), self.rates()
        counts = {name: sum(group[name] for group in groups) for name in ("entries", "bytes", "tokens", "hits")}
        found = {"url": self.url, **counts, "max_bytes": self.max_bytes, "half_life": self.half_life}
        return found | {"groups": groups, "rates": {"load": dict(rates.load), "prefill": rates.prefill}}

    def rates(self) -> planner.Rates:
        """What `note_rate` was told, recent measurements first."""
        return planner.Rates.fit(self._shelf.index.sums())

    def note_rate(self, kind: str, units: int, seconds: float, context: int = 0) -> None:
        """Note what something took.

        Args:
            kind: A form, for pages that were loaded and decoded; `"prefill"` for tokens that were prefilled.
            units: Pages or tokens.
            context: Tokens before those that were prefilled.

        Raises:
            ConfigError: The kind is unknown, or a number is out of its range.
        """
        if kind not in (*PAGE_FORMS, planner.PREFILL) or units < 1 or context < 0 or not 0 < seconds < math.inf:
            raise ConfigError(
                f"rate {kind!r} of {units} units in {seconds} s after {context} tokens; a kind is one of "
                f"{', '.join(PAGE_FORMS)}, {planner.PREFILL}, units and seconds are more than 0"
            )
        mean = context + units / 2 if kind == planner.PREFILL else 0.0
        self._shelf.index.update_sums(kind, lambda sums: planner.observe(sums, units, seconds, mean))

    def submit(self, job: Callable[[], None], slow: bool = False) -> None:
        """Run a job in the background, after those before it; see `writer.py`.

        Args:
            job: Codes and puts pages; or is `slow`, and nothing waits for it but `close`.
        """
        (self._slow if slow else self._writer).submit(job)

    def flush(self, slow: bool = False) -> None:
        """Wait until all jobs are done that were submitted so far, slow ones where asked to."""
        self._writer.wait()
        if slow:
            self._slow.wait()

    def close(self) -> None:
        """Flush; every method but this one raises `UnsupportedOperationError` from now on."""
        self.flush(slow=True)
        self._shelf.index.close()

    def __enter__(self) -> PrefixStore:
        return self

    def __exit__(self, *exception) -> None:
        self.close()
