"""`Prefixes`: what connects a cache with a prefix store.

Before a prefill it loads what is stored of every row, after a forward it stores the pages that were made. A page is
stored under its token ids and all before them, whatever row or request they came from: beams and rows of a batch that
begin alike share pages, and a conversation's next turn finds those of the last.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..errors import ConfigError, FormatError, SeqKVWarning
from ..store.keys import page_key, scope_key
from ..store.planner import PREFILL, Plan, plan
from ..store.prefix_store import PrefixStore
from . import learned_tables, records
from .codecs import kept
from .model_facts import layer_configs, model_fingerprint
from .page_forms import PageForms
from .positions import first_slots
from .recorder import Pages, Recorder
from .refill import Row, fill, fill_decoded
from .sequence_pages import refuse_ranks
from .surprise import surprise
from .tap import embed

logger = logging.getLogger("hf_seqkv")
PROFILE = "full"  # of the sequence codec, where pages are stored in that form


@functools.cache
def open_store(url: str) -> PrefixStore:
    """The store at a URL, opened once in a process."""
    return PrefixStore(url)


class Prefixes:
    """Loads and stores the pages of one cache.

    Ranks that share a model (`shards.py`) have pages of their own, and load as many as all of them can.

    Args:
        cache: Empty, bound to `model`.
        store: Or its URL.

    Raises:
        ConfigError: Pages of this cache have no such form as the store's.
    """

    def __init__(self, cache, model: torch.nn.Module, store: PrefixStore | str):
        self.cache, self.model = cache, model
        self.store = store if isinstance(store, PrefixStore) else open_store(str(store))
        self.forms = self._page_forms()
        self._scope = b""  # of the pages last looked for or made; what runs in the background reads this one
        self.sequence = None
        self.plan: Plan | None = None  # of the last prefill
        self.loaded = 0  # slots that were filled
        self._said: set[str] = set()
        dense = cache.seqkv_config.method == "dense"
        self.form = self.store.form or "hot"  # the quickest to load
        if self.form == "exact" and dense:
            raise ConfigError("form='exact' codes codes, of which method='dense' has none; take form='hot'")
        if self.form == "sequence":
            if cache.calibration is None:
                raise ConfigError("form='sequence' needs calibration=...; give one, or take form='hot' or 'exact'")
            refuse_ranks(cache)
            chosen = PROFILE, self.store.preset
            self.sequence = kept(cache.calibration, chosen, lambda: cache.calibration.sequence_codec(*chosen))
        tables = () if cache.calibration is None else cache.calibration.tensors
        if self.form == "exact" and "exact.flags" in tables and not self.forms.fitted:
            self._say(
                "the calibration's tables of form='exact' predict across all KV heads, of which each rank of a "
                "tensor-parallel model has its own: the store learns tables for each rank, pages are hot until then"
            )
        cache.recorder = Recorder(cache, self.sequence)
        cache.tracks_positions = True

    def __deepcopy__(self, memo) -> Prefixes:
        new = Prefixes.__new__(Prefixes)
        new.__dict__ = self.__dict__ | {"cache": memo[id(self.cache)]}
        new.forms = new._page_forms()
        return new

    def _page_forms(self) -> PageForms:
        return PageForms(self.cache, self.model, lambda: learned_tables.of(self.store, self._scope))

    @functools.cached_property
    def _options(self) -> str:
        """What of the cache's options decides what pages hold."""
        options = self.cache.seqkv_config.to_dict()
        others = ("prefix_store", "backend", "residual_length", "offload", "cuda_graphs")
        return repr(sorted(x for x in options.items() if x[0] not in others))

    @property
    def scope(self) -> bytes:
        """32 bytes of all but token ids that decides what pages hold; ranks that share the model ask together."""
        calibration, sequence, shard = self.cache.calibration, self.sequence, self.cache.shard
        return scope_key(
            namespace=self.store.namespace,
            model=model_fingerprint(self.model),
            options=self._options if calibration is None else calibration.fingerprint.hex(),
            windows=repr((self.cache.seqkv_config.n_sink, self.cache.seqkv_config.page_size)),
            sequence=None if sequence is None else f"{sequence.fingerprint.hex()} {sequence.step}",
            turns="fp16",  # of constant parts, `center.relative_table`: pages of other numbers are not these
            **({} if shard.ranks == 1 else {"rank": shard.rank, "ranks": shard.ranks}),
        )

    def _split(self, ids: Sequence[int]) -> list[list[int]]:
        """Token ids of whole pages, from a row's first token on; the first page brings the sinks with it."""
        config = self.cache.seqkv_config
        ends = range(config.n_sink + config.page_size, len(ids) + 1, config.page_size)
        return [list(ids[end - config.page_size if n else 0 : end]) for n, end in enumerate(ends)]

    # -- loading -------------------------------------------------------------------------------------------------

    def load(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> int:
        """Load stored pages of all rows into the empty cache; returns the slots filled, 0 where nothing was found.

        At least the last token is left to run.

        Args:
            ids: `[B, T]`.
            mask: `[B, T]`, zeros for left padding.
        """
        starts = first_slots(ids, mask)
        if starts is None or self.cache.get_seq_length():
            return 0
        self.store.flush()
        begun, size, shard = time.perf_counter(), self.cache.seqkv_config.page_size, self.cache.shard
        scope = self._scope = self.scope
        rows = [row[start:] for row, start in zip(ids.tolist(), starts, strict=True)]
        pages = [self._split(row[:-1]) for row in rows]
        known = {tuple(row): self.store.find(scope, split) for row, split in zip(rows, pages, strict=True)}
        keys = [known[tuple(row)] for row in rows]
        self.plan = plan(min(map(len, keys)), size, ids.shape[1], self.store.rates(), self.form)
        least, *counts = shard.least(self.plan.load, *map(len, keys))
        if least < self.plan.load:
            self.plan = replace(self.plan, load=least, why=f"{least} pages, all that a rank has or wants to load")
        logger.info("prefix store: %s", self.plan.why)
        if not self.plan.load:
            return 0
        most = max(counts) if self.plan.load == min(counts) else self.plan.load
        keys = [row[: min(most, count)] for row, count in zip(keys, counts, strict=True)]
        each = dict.fromkeys(key for row in keys for key in row)
        read = self._or_drop(each, lambda: self._within_reach({key: self._read(key) for key in each}), {})
        missing = [next((n for n, key in enumerate(row) if read.get(key) is None), len(row)) for row in keys]
        chains = [row[:count] for row, count in zip(keys, shard.least(*missing), strict=True)]
        filled = 0
        if min(map(len, chains)):
            filled = self._or_drop(each, lambda: self._fill(read, chains, starts, pages, ids.cpu()), 0)
        self.loaded = shard.least(filled)[0]
        if self.loaded < filled:
            self.cache.reset()
        if self.loaded:
            self.store.note_rate(self.form, len(each), time.perf_counter() - begun)
        return self.loaded

    def _or_drop(self, keys: Iterable[bytes], job: Callable[[], Any], otherwise: Any) -> Any:
        """What a job makes of stored pages; whatever they hold, the worst they do is a prefill."""
        try:
            return job()
        except Exception as error:
            self.cache.reset()
            for key in keys:
                self.store.drop(key)
            self._say(f"stored pages are dropped and prefilled instead: {error}")
            return otherwise

    def _fill(self, read, chains: list[list[bytes]], starts: list[int], pages: list[list[list[int]]], ids) -> int:
        tables = read[chains[0][0]].facts["tables"]
        if any(starts) and not any(half for half, _ in tables):
            return 0  # without RoPE nothing tells whether positions count from a row's first token
        found = [Row(start, [read[key] for key in row]) for start, row in zip(starts, chains, strict=True)]
        # Pages that rows share are decoded once; those of one sequence together, since its first page speaks for all.
        size = self.cache.seqkv_config.page_size
        tokens = {
            key: page[-size:]
            for row, split in zip(chains, pages, strict=True)
            for key, page in zip(row, split, strict=False)  # a prompt has more pages than were found
        }
        members = {row[0]: list(dict.fromkeys(key for x in chains if x[0] == row[0] for key in x)) for row in chains}
        made = {root: self._decode([read[key] for key in x], [tokens[key] for key in x]) for root, x in members.items()}
        place = {key: n for x in members.values() for n, key in enumerate(x)}
        at = [(row[0], torch.tensor([place[key] for key in row])) for row in chains]
        if self.sequence is None:
            return fill(self.cache, found, [[x[where] for x in made[root]] for root, where in at], ids)
        layers = zip(*made.values(), strict=True)
        decoded = (dict(zip(made, layer, strict=True)) for layer in layers)
        pairs = ([[x[where] for x in layer[root]] for root, where in at] for layer in decoded)
        return fill_decoded(self.cache, found, ids, pairs)

    def _read(self, key: bytes) -> records.Record | None:
        """A record, or None where it is gone."""
        entry = self.store.get(key, self._limit())
        return None if entry is None else records.read(entry.payload)

    def _within_reach(self, read: dict[bytes, records.Record | None]) -> dict[bytes, records.Record | None]:
        """Records, but no `exact` ones where their tables cannot be had: a miss, not damage."""
        coded = [key for key, x in read.items() if x is not None and x.form == "exact"]
        facts = next((x.facts for x in read.values() if x is not None and "layers" in x.facts), None)
        if not coded or (facts is not None and self.forms.codec(facts).predicts):
            return read
        return read | dict.fromkeys(coded)

    def _decode(self, found: list[records.Record], tokens: list[list[int]]):
        """Of each layer payloads `[N, page_bytes]`, or keys before RoPE and values; `found` begins with the first."""
        if self.sequence is None:
            return self.forms.read(found, found[0], tokens)
        if any(record.form != "sequence" for record in found):
            raise FormatError("stored page is not of the sequence codec; drop it")
        embedded = embed(self.model, torch.tensor(tokens)) if self.sequence.predicts else None
        heads = [shape[0] for _, shape, _ in found[0].facts["layers"]]
        return self.sequence.decode([x.tensors["codes"].numpy().tobytes() for x in found], embedded, heads)

    def _limit(self) -> int:
        """Bytes that no record can exceed: as many as dense pages in fp32, twice."""
        windows, config = self.cache.seqkv_config, self.cache.model_config.get_text_config(decoder=True)
        layers = layer_configs(config)
        width = max(max(x.hidden_size, (getattr(x, "head_dim", None) or 0) * x.num_attention_heads) for x in layers)
        return 16 * config.num_hidden_layers * width * (windows.page_size + windows.n_sink) + (1 << 20)

    @contextlib.contextmanager
    def timed(self, tokens: int) -> Iterator[None]:
        """Note how long the prefill of a prompt of `tokens` takes from what the cache holds on."""
        held, begun = self.cache.get_seq_length(), time.perf_counter()
        yield
        for device in {layer.device for layer in self.cache._coded() if layer.is_initialized}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        if tokens > held:
            self.store.note_rate(PREFILL, tokens - held, time.perf_counter() - begun, context=held)

    # -- storing -------------------------------------------------------------------------------------------------

    def after_forward(self, hidden: torch.Tensor | None) -> None:
        """Store, in the background, the pages that a forward made.

        Args:
            hidden: What the model's head reads, `[B, Tq, d]`.
        """
        found = self.cache.recorder.take()
        if not found:
            return
        ids = self.cache.ids
        if ids is None:
            self._say(
                "pages are not stored: they are known by token ids, and the model was given more, or something else"
            )
            return
        facts, bits, self._scope = records.facts_of(self.cache), surprise(self.model, hidden, ids), self.scope
        starts = self.cache._coded()[0].start
        for pages in found:
            start = starts[pages.row]
            last = pages.first + len(pages.payloads[0])
            if not self._counts_from_zero(pages.row, start, last):
                self._say("pages are not stored: positions of their tokens do not count from the row's first token")
                continue
            tokens = self._split(ids[pages.row, start:].tolist())[:last]
            told = None if bits is None else (bits[0] - start, bits[1][pages.row])
            self.store.submit(functools.partial(self._store, self._scope, pages, tokens, facts, told))

    def _say(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            warnings.warn(what, SeqKVWarning, stacklevel=2)

    def _counts_from_zero(self, row: int, start: int, last: int) -> bool:
        """Whether a row's tokens up to page `last` are at positions 0, 1, 2, ..., as far as RoPE tells."""
        sinks = self.cache.seqkv_config.n_sink
        tables = [table for table in self.cache._distinct_tables() if table.half]
        return all(table.counts_from_zero(row, last, sinks) for table in tables) if tables else start == 0

    def _store(self, scope: bytes, pages: Pages, tokens: list[list[int]], facts, bits) -> None:
        """Store pages of one row, whose token ids are the last of `tokens`."""
        size, parent = self.cache.seqkv_config.page_size, b""
        for page in tokens[: pages.first]:
            parent = page_key(scope, parent, page)
        mine, form = tokens[pages.first :], self.form
        if form == "exact" and not self.forms.codec(facts).predicts:
            self.forms.learn(pages, facts)
            form = "hot"
        bodies = self.forms.write(pages, form, [page[-size:] for page in mine], facts)
        for n, payload in enumerate(records.write(pages, form, bodies, facts)):
            end = self.cache.seqkv_config.n_sink + (pages.first + n + 1) * size
            told = None if bits is None else bits[1][(bits[0] >= end - size) & (bits[0] < end)]
            known = None if told is None or not len(told) else told.mean().item()
            parent = self.store.put(scope, parent, mine[n], payload, form=form, bits=known)
            if parent is None:
                return
