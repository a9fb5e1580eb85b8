"""Which entries make room for another: a pure function over what the index knows of each.

An entry is worth `(hits + prior) * 2^(-age / half_life)`. The prior is the probability of its text per token,
2^(-bits): text that the model finds predictable is likely to be met again, so it is kept over surprising text until
use says otherwise. Only leaves go, because a page is of no use without those before it.

Source: the metric -log2 P(s) of a probabilistic trie over sequences, arXiv 2604.15356.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

UNKNOWN_BITS = 4.5


class Candidate(NamedTuple):
    """An entry as eviction sees it: sizes in bytes."""

    key: bytes
    parent: bytes
    size: int
    worth: float


def worth(hits: int, bits: float | None, age: float, half_life: float) -> float:
    """What keeping an entry is worth.

    Args:
        bits: -log2 P of its tokens, a token; None where not known, which counts as 4.5.
        age, half_life: Seconds since it was last used, and in which its worth halves.
    """
    prior = 2.0 ** -(UNKNOWN_BITS if bits is None else bits)
    return (hits + prior) * 2.0 ** (-max(age, 0.0) / half_life)


def victims(
    entries: Iterable[Candidate], least: int, wanted: int, worth: float = math.inf, parent: bytes = b""
) -> list[bytes] | None:
    """Keys to remove, in order: always the leaf that is worth least, until `wanted` bytes are free.

    Args:
        least, wanted: Bytes that must become free, and that should.
        worth: Of the entry that needs the room; only entries worth less go.
        parent: Its parent's key, `b""` where it has none; neither the parent nor what is before it goes.

    Returns:
        None where `least` bytes cannot be had so.
    """
    entries = {entry.key: entry for entry in entries}
    children = Counter(entry.parent for entry in entries.values())
    children[parent] += 1
    leaves = [(entry.worth, key) for key, entry in entries.items() if not children[key]]
    heapq.heapify(leaves)
    gone, freed = [], 0
    while freed < wanted and leaves and leaves[0][0] < worth:
        key = heapq.heappop(leaves)[1]
        gone.append(key)
        freed += entries[key].size
        before = entries[key].parent
        children[before] -= 1
        if before in entries and not children[before]:
            heapq.heappush(leaves, (entries[before].worth, before))
    return gone if freed >= least else None
