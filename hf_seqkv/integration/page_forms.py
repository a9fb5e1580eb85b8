"""Codes of pages as what a record holds of them, and back: as they are (`hot`), or entropy-coded (`exact`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..codec.exact import ExactCodec
from ..codec.page import PageCodec
from ..codec.surroundings import Surroundings
from ..errors import FormatError
from .codecs import kept
from .learned_tables import LearnedTables
from .recorder import Pages
from .records import Record
from .refill import Row
from .state import layer_device
from .tap import embedding_rows


class PageForms:
    """For the pages of one cache.

    Args:
        model: Gives the embeddings that `exact` predicts from.
        learned: Gives tables for `exact` where the cache's calibration has none for it; None leaves it to codebooks
            alone.
    """

    def __init__(self, cache, model: torch.nn.Module, learned: Callable[[], LearnedTables] | None = None):
        self.cache, self.model, self.learned = cache, model, learned

    def write(self, pages: Pages, form: str, ids: Sequence[Sequence[int]], facts: dict[str, Any]) -> list[torch.Tensor]:
        """`codes` of every page's record.

        Args:
            form: `"hot"`, `"exact"`, or `"sequence"`, for which the pages were coded when they were recorded.
            ids: Token ids of every page, without sinks.
            facts: `records.facts_of` the cache.
        """
        if form == "sequence":
            return [_bytes(x) for x in pages.coded]
        payloads = [x.cpu() for x in pages.payloads]
        if form == "hot":
            return list(torch.cat(payloads, 1))
        count = len(ids)
        means = [torch.empty(0) if x is None else x.expand(count, *x.shape) for x in pages.means]
        around = self.around(pages.starts, pages.relative, means, ids, facts)
        return [_bytes(x) for x in self.codec(facts).encode(payloads, around)]

    def read(self, records: Sequence[Record], root: Record, ids: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Payloads of each layer, `[N, page_bytes]`, of records in the forms `hot` and `exact`.

        Args:
            root: The first record of the sequence they are from.

        Raises:
            FormatError: They are not of this cache's codecs, or damaged.
        """
        facts, made = root.facts, [None] * len(records)
        codecs = self._codecs(facts)
        sizes = [codec.page_bytes for codec in codecs]
        for n, record in enumerate(records):
            if record.form == "hot":
                flat = record.tensors["codes"]
                if len(flat) != sum(sizes):
                    raise FormatError(f"stored page has {len(flat)} bytes of codes, must have {sum(sizes)}; drop it")
                made[n] = flat.split(sizes)
        coded = [n for n, record in enumerate(records) if record.form == "exact"]
        if coded:
            halves = [half for half, _ in facts["tables"]]
            row = Row(0, [root, *(records[n] for n in coded)])
            means = [torch.empty(0)] * len(codecs)
            if self.cache.centers_keys:
                means = [x.expand(len(coded), *x.shape) for x in row.means(facts["layers"])]
            starts = [x[1:] for x in row.starts(halves)]
            relative = row.relative(halves, self.cache.seqkv_config.page_size)
            around = self.around(starts, relative, means, [ids[n] for n in coded], facts)
            data = [records[n].tensors["codes"].numpy().tobytes() for n in coded]
            for n, *parts in zip(coded, *self.codec(facts).decode(data, around), strict=True):
                made[n] = parts
        if any(x is None for x in made):
            raise FormatError("stored page is of the sequence codec, which this cache does not read; drop it")
        return [torch.stack(parts) for parts in zip(*made, strict=True)]

    def _codecs(self, facts: dict[str, Any]) -> list[PageCodec]:
        dtype = getattr(torch, facts["dtype"])
        return [
            self.cache.codec(index, *shape, dtype, layer_device(self.cache, index))
            for index, shape, _ in facts["layers"]
        ]

    @property
    def fitted(self) -> bool:
        """Whether the cache's calibration has tables for `exact`, that are of use: they predict across all heads."""
        calibration = self.cache.calibration
        return calibration is not None and "exact.flags" in calibration.tensors and self.cache.shard.ranks == 1

    def codec(self, facts: dict[str, Any]) -> ExactCodec:
        """The `exact` codec of layers of these shapes."""
        codecs, calibration, fitted, tables = self._codecs(facts), self.cache.calibration, self.fitted, None
        if not fitted and self.learned is not None:
            tables = self.learned().find(codecs)

        def make() -> ExactCodec:
            given = calibration.exact() if fitted else (None, tables)
            return ExactCodec([codec.to("cpu") for codec in codecs], *given)

        return kept(tables or calibration, tuple(codec.fingerprint for codec in codecs), make)

    def learn(self, pages: Pages, facts: dict[str, Any]) -> None:
        """Learn from pages how to predict such, where nothing does yet."""
        assert self.learned is not None
        count = len(pages.payloads[0])
        means = [torch.empty(0) if x is None else x.expand(count, *x.shape) for x in pages.means]
        around = self.around(pages.starts, pages.relative, means, None, facts)
        self.learned().add(self._codecs(facts), [x.cpu() for x in pages.payloads], around)

    def around(self, starts, relative, means, ids, facts) -> Surroundings:
        """What `exact` pages are predicted from.

        Args:
            starts, relative: Of each position table, `[N, 2 * half]` and `[P, 2 * half]`.
            means: Of each layer `[N, H, Dk]`, empty where keys are not centred.
            ids: Token ids of every page, `[N][P]`; None for a codec that does not read them.
        """
        tables = [table for _, _, table in facts["layers"]]
        nowhere = [torch.zeros(len(starts[0]), heads, dim) for _, (heads, dim, _), _ in facts["layers"]]
        return Surroundings(
            embedding_rows(self.model, torch.as_tensor(ids)) if self.codec(facts).embeds else None,
            [starts[t].cpu() for t in tables],
            [relative[t].cpu() for t in tables],
            [facts["tables"][t][1] for t in tables],
            [x.cpu() if x.numel() else zeros for x, zeros in zip(means, nowhere, strict=True)],
        )


def _bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
