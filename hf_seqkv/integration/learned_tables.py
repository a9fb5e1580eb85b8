"""`LearnedTables`: what the exact codec predicts by, for pages whose calibration has no tables, or that have none.

They are learned from the first pages that a store gets, and kept in it, as an entry of the form `tables` whose payload
is a bundle (`store/bundle.py`) of `ExactTables.tensors`. There is one for all pages of a scope, and the first to be
stored counts: a process that learned others at the same time drops its own.
"""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections.abc import Sequence

import torch

from ..calibration.exact_fit import Predictors, fit_exact
from ..codec.exact_tables import ExactTables
from ..codec.page import QuantizedPageCodec
from ..codec.surroundings import Surroundings
from ..errors import FormatError
from ..store import bundle
from ..store.keys import page_key, scope_key
from ..store.prefix_store import PrefixStore

logger = logging.getLogger("hf_seqkv")
# Tokens to learn from: so many for each input of a regression, within bounds.
TOKENS_AN_INPUT, LEAST_TOKENS, MOST_TOKENS = 5, 4096, 16384
_IDS = [0]  # of the entry: fewer than any page has


class LearnedTables:
    """The tables of one scope of a store; `of` gives them."""

    def __init__(self, store: PrefixStore, scope: bytes):
        self._store, self._scope = weakref.ref(store), scope_key(pages=scope, holds="tables of the exact codec")
        self._key = page_key(self._scope, b"", _IDS)
        self._lock = threading.Lock()
        self._known: ExactTables | None = None
        self._runs: list[tuple[list[torch.Tensor], Surroundings]] = []
        self._learning = False

    def find(self, codecs: Sequence[QuantizedPageCodec]) -> ExactTables | None:
        """Tables for pages of these codecs of all layers; None where the store has none, or none that fit."""
        store = self._store()
        if self._known is None and store is not None:
            entry = store.get(self._key, _limit(codecs))
            if entry is not None:
                self._known = self._read(store, entry.payload, codecs)
        return self._known

    def _read(self, store: PrefixStore, payload: bytes, codecs) -> ExactTables | None:
        try:
            found = ExactTables.from_tensors(bundle.unpack(payload, "stored tables")[0])
            found.check(codecs)
            return found
        except FormatError as error:
            logger.warning("prefix store: tables are dropped, and learned again: %s", error)
            store.drop(self._key)
            return None

    def add(self, codecs: Sequence[QuantizedPageCodec], payloads: list[torch.Tensor], around: Surroundings) -> None:
        """Learn from pages too; once there are enough, tables are made of them in the background.

        Args:
            payloads: Of each layer, `[N, page_bytes]` uint8.
            around: As `ExactCodec.encode` has it.
        """
        with self._lock:
            alike = not self._runs or all(map(torch.equal, around.relative, self._runs[0][1].relative))
            if self._learning or not alike:
                return
            self._runs.append((payloads, around))
            tokens = sum(len(x[0]) for x, _ in self._runs) * codecs[0].page_size
            inputs = 4 * max(page.heads * max(page.key_dim, page.value_dim) for page in codecs)
            self._learning = tokens >= min(max(TOKENS_AN_INPUT * inputs, LEAST_TOKENS), MOST_TOKENS)
            if self._learning:
                runs, self._runs = self._runs, []
                self._store().submit(functools.partial(self._learn, list(codecs), runs), slow=True)

    def _learn(self, codecs: list[QuantizedPageCodec], runs: list[tuple[list[torch.Tensor], Surroundings]]) -> None:
        payloads = [torch.cat(x) for x in zip(*(pages for pages, _ in runs), strict=True)]
        around = Surroundings.joined([x for _, x in runs])
        logger.info("prefix store: learning tables from %d pages", len(payloads[0]))
        tables = fit_exact(codecs, payloads, around, None, Predictors(embedding=False), progress=False)
        store = self._store()
        if store is not None:
            payload = bundle.pack(tables.tensors(), {})
            store.put(self._scope, b"", _IDS, payload, form="tables", bits=None)


def _limit(codecs: Sequence[QuantizedPageCodec]) -> int:
    """Bytes that tables of such layers cannot exceed."""
    widths = [heads * max(dims) for heads, *dims in ((x.heads, x.key_dim, x.value_dim) for x in codecs)]
    return sum(2 * (2 * 7 * width * width + 64 * width) for width in widths) + (1 << 20)


_OF: weakref.WeakKeyDictionary[PrefixStore, dict[bytes, LearnedTables]] = weakref.WeakKeyDictionary()


def of(store: PrefixStore, scope: bytes) -> LearnedTables:
    """The tables of a scope of a store: one object in a process, since every `generate` has a cache of its own."""
    scopes = _OF.setdefault(store, {})
    if scope not in scopes:
        scopes[scope] = LearnedTables(store, scope)
    return scopes[scope]
