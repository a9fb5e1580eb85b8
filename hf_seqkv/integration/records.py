"""Page records: recorded pages as bytes, one record a page of all layers, and rows of a cache made of them again.

A record is a bundle (`store/bundle.py`) with `codes` uint8: in the form `hot` the payloads of all coded layers in turn,
else a page of the `exact` or of the `sequence` codec; `starts` fp32, first turns of RoPE by position table; of held
tokens (not in `sequence` records, where they are chosen again) `held` bf16, keys and values in turn, and `held_at`
int16 `[n, 2]`, layer and token. A sequence's first record adds `sinks` in the cache's dtype, `means` and `relative`
fp32, and as facts the shapes of layers and tables. Flat tensors hold layers in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import FormatError
from ..store import bundle
from .cache import SeqKVCache
from .recorder import Pages

FORMS = ("hot", "exact", "sequence")


@dataclass(frozen=True)
class Record:
    """One page as it was read; see the module. `facts` of a first page are those of the whole sequence."""

    form: str
    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any]


def facts_of(cache: SeqKVCache) -> dict[str, Any]:
    """Shapes of layers and tables, as JSON types."""
    layers = [layer for layer in cache._coded() if layer.is_initialized]
    tables = cache._distinct_tables()
    shapes = [[x.codec.heads, x.codec.key_dim, x.codec.value_dim] for x in layers]
    of = [next((t for t, table in enumerate(tables) if table is cache.table(x.index)), None) for x in layers]
    return {
        "dtype": str(layers[0].dtype).removeprefix("torch."),
        "layers": [[x.index, shape, table] for x, shape, table in zip(layers, shapes, of, strict=True)],
        "tables": [[table.half, table.interleaved] for table in tables],
    }


def write(pages: Pages, form: str, bodies: Sequence[torch.Tensor], facts: dict[str, Any]) -> list[bytes]:
    """Records of consecutive pages, `bodies` are their `codes`, `facts` are `facts_of` the cache."""
    written = []
    for n, body in enumerate(bodies):
        tensors = {"codes": body, "starts": _flat(x[n] for x in pages.starts)}
        if form != "sequence":
            tensors |= _held(pages, n)
        if pages.first + n == 0:
            tensors["sinks"] = _flat(x for pair in pages.sinks for x in pair)
            tensors["means"] = _flat(x for x in pages.means if x is not None)
            tensors["relative"] = _flat(pages.relative)
        written.append(bundle.pack(tensors, {"form": form} | (facts if pages.first + n == 0 else {})))
    return written


def _held(pages: Pages, n: int) -> dict[str, torch.Tensor]:
    where, found, size = [], [], pages.page_size
    for layer, held in enumerate(pages.held):
        if held is None:
            continue
        tokens, k, v = held
        at = (tokens // size == n).nonzero()[:, 0]
        where += [torch.tensor([layer, token - n * size]) for token in tokens[at].tolist()]
        found += [x[:, i] for i in at.tolist() for x in (k, v)]
    if not found:
        return {}
    return {"held_at": torch.stack(where).to(torch.int16), "held": _flat(found)}


def _flat(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """All numbers of tensors in turn, on the CPU: layers may be on different devices."""
    return torch.cat([x.flatten().cpu() for x in parts] or [torch.empty(0)])


def read(data: bytes) -> Record:
    """Inverse of `write`, of one page.

    Raises:
        FormatError: Damaged or foreign.
    """
    tensors, facts = bundle.unpack(data, "stored page")
    form = facts.pop("form", None)  # what is left is the same for all first pages of a model
    if form not in FORMS or {"codes", "starts"} - set(tensors) or tensors["codes"].dtype != torch.uint8:
        raise FormatError("stored page lacks what every page has; it was not written by hf_seqkv; drop it")
    return Record(form, tensors, facts)
