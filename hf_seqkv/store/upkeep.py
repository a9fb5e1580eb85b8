"""What is done to a whole store now and then: check it, shrink it, count it."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress

from ..errors import FormatError
from . import eviction
from .entry import HEADER_BYTES, PAGE_FORMS, Head, NewerVersionError, read_head
from .index import EntryInfo
from .shelf import Shelf

_ORPHANED = 3600.0  # seconds after which nobody is still writing a temporary file


def verify(shelf: Shelf) -> dict[str, int]:
    """Read every object; drop the damaged, index the unknown, forget the missing.

    Returns:
        Counts of sound `entries` and their `bytes`; of those `adopted`; of `damaged`, `unreadable` and `newer` (by a
        newer hf_seqkv) objects; of `missing` ones; of `temporaries` removed.
    """
    names = ("entries", "bytes", "adopted", "damaged", "unreadable", "newer", "missing", "temporaries")
    report = dict.fromkeys(names, 0)
    for key in [bytes.fromhex(name) for name in _names(shelf)]:
        known = shelf.index.find(key)
        try:
            head = _check(shelf, key)
        except NewerVersionError:
            report["newer"] += 1
        except FormatError:
            report["damaged"] += 1
        except OSError:
            report["unreadable"] += 1
        else:
            if head is not None:
                report["entries"] += 1
                report["bytes"] += head.size
                if known is None:
                    report["adopted"] += 1
                    shelf.index.add(EntryInfo.of(head, time.time()))
    # Asked one by one: an object may have come since they were listed, or the listing have failed.
    for row in shelf.index.rows():
        with suppress(OSError):
            if shelf.objects.read(row.key.hex(), 0) is None:
                report["missing"] += 1
                shelf.index.remove([row.key])
    return report | {"temporaries": sweep(shelf)}


def _names(shelf: Shelf) -> list[str]:
    try:
        return [name for name, _ in shelf.objects.list()]
    except OSError as error:
        shelf.warn("read", f"its entries cannot be listed ({error})")
        return []


def _check(shelf: Shelf, key: bytes) -> Head | None:
    found = shelf.objects.read(key.hex(), HEADER_BYTES)
    if found is None:
        return None
    try:
        limit = read_head(*found).payload_bytes
    except FormatError:
        limit = 0  # nothing to read but the header; `fetch` drops it, or tells that it is newer
    fetched = shelf.fetch(key, limit)
    return fetched and fetched[0]


def prune(shelf: Shelf, max_bytes: int, half_life: float) -> dict[str, int]:
    """Evict what is worth least until entries take at most `max_bytes`, and what killed writers left behind.

    Returns:
        Counts of `removed` entries, their `freed` bytes, `temporaries`; `entries` and `bytes` that stay.
    """
    rows = {row.key: row for row in shelf.index.rows()}
    held = sum(row.bytes for row in rows.values())
    gone = eviction.victims(candidates(rows.values(), half_life), 0, held - max_bytes)
    shelf.remove(gone)
    freed = sum(rows[key].bytes for key in gone)
    report = {"removed": len(gone), "freed": freed, "entries": len(rows) - len(gone), "bytes": held - freed}
    return report | {"temporaries": sweep(shelf)}


def sweep(shelf: Shelf) -> int:
    """Remove temporary files that nobody is writing any more; returns how many."""
    with suppress(OSError):
        return shelf.objects.sweep(_ORPHANED)
    return 0


def totals(rows: Iterable[EntryInfo]) -> list[dict]:
    """Entries, bytes, tokens and hits by scope and form."""
    groups: dict[tuple[str, str], Counter] = {}
    for row in rows:
        counts = groups.setdefault((row.scope.hex(), row.form), Counter())
        counts.update(entries=1, bytes=row.bytes, tokens=row.tokens * (row.form in PAGE_FORMS), hits=row.hits)
    return [{"scope": scope, "form": form, **counts} for (scope, form), counts in sorted(groups.items())]


def candidates(rows: Iterable[EntryInfo], half_life: float) -> Iterator[eviction.Candidate]:
    """Rows as eviction sees them now; tables stay as long as there are pages that may need them."""
    now, rows = time.time(), list(rows)
    coded = any(row.form == "exact" for row in rows)
    for row in rows:
        worth = eviction.worth(row.hits, row.bits, now - row.used, half_life)
        worth = math.inf if coded and row.form == "tables" else worth
        yield eviction.Candidate(row.key, row.parent, row.bytes, worth)
