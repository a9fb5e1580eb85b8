"""The state of a cache as named tensors and facts, and back: what a sleeping session is, and what stored pages become.

Tensors of coded layer `i`, for `B` rows (`n` what each has):

    {i}.pages [B, n, page_bytes] uint8     {i}.sink_k, {i}.sink_v [B, H, n_sink, D]
    {i}.recent_k, {i}.recent_v [B, H, n, D]     {i}.mean [B, H, Dk]
    {i}.held_k, {i}.held_v [B, H, n, D] bf16     {i}.held_slots [B, n]

of position table `t` `table.{t}.rows [B, n, 2 * half]`, `.starts [B, n, 2 * half]` and `.relative [P, 2 * half]`, and
`ids [B, n]` where they are known. Facts are JSON: sizes and counts of every layer and table.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import FormatError, UnsupportedOperationError
from .cache import SeqKVCache
from .layer import SeqKVLayer
from .mixed import more_than_pages
from .placement import module_device
from .positions import PositionTable

COUNTS = ("start", "counts", "kept", "base", "length", "dropped")


def state_of(cache: SeqKVCache) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and facts of a cache that has seen tokens; the tensors are its own, not copies.

    Raises:
        UnsupportedOperationError: A layer keeps something else than keys and values, or the cache is empty.
    """
    other = more_than_pages(cache.layers)
    if other or not cache.get_seq_length():
        what = f"layers of type {', '.join(other)} keep more than keys and values" if other else "the cache is empty"
        raise UnsupportedOperationError(f"this cache has no state to keep: {what}")
    tables = cache._distinct_tables()
    tensors, layers = {}, []
    for layer in cache._coded():
        if not layer.is_initialized:
            continue
        counts = [count + (kept > 0) for count, kept in zip(layer.counts, layer.kept, strict=True)]
        made = {
            "pages": _first(layer.pages, [max(0, count - layer.dropped) for count in counts]),
            "sink_k": layer.sink_k,
            "sink_v": layer.sink_v,
            "recent_k": layer.recent_k[:, :, : layer.length - layer.base],
            "recent_v": layer.recent_v[:, :, : layer.length - layer.base],
        }
        if layer.mean is not None:
            made["mean"] = layer.mean
        held = [0] * len(layer.start) if layer.held is None else layer.held.counts
        if max(held):
            most = max(held)
            made |= {"held_k": layer.held.k[:, :, :most], "held_v": layer.held.v[:, :, :most]}
            made["held_slots"] = layer.held.slots[:, :most]
        tensors |= {f"{layer.index}.{name}": x for name, x in made.items()}
        table = cache.table(layer.index)
        shape = (layer.codec.heads, layer.codec.key_dim, layer.codec.value_dim)
        layers.append(
            {name: getattr(layer, name) for name in COUNTS}
            | {"index": layer.index, "shape": shape, "held": held}
            | {"table": next((t for t, x in enumerate(tables) if x is table), None)}
        )
    facts = {"dtype": str(layer.dtype).removeprefix("torch."), "layers": layers, "tables": []}
    for t, table in enumerate(tables):
        facts["tables"].append({name: getattr(table, name) for name in ("half", "interleaved", "end", "counts")})
        parts = {"rows": table.rows, "starts": _first(table.starts, table.counts), "relative": table.relative}
        tensors |= {f"table.{t}.{name}": x for name, x in parts.items() if x is not None}
    if cache.ids is not None:
        tensors["ids"] = cache.ids
    return tensors, facts


def _first(x: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """What is used of `x [B, n, ...]`, of each row so many; zeros where other rows have more."""
    used = x[:, : max(counts)]
    if min(counts) == max(counts):
        return used
    past = torch.arange(max(counts)) >= torch.tensor(counts)[:, None]
    return used.masked_fill(past.to(x.device)[..., None], 0)


def set_state(cache: SeqKVCache, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Give an empty cache, bound to its model, a state; takes the tensors over.

    Raises:
        FormatError: The state does not fit the cache's layers.
    """
    try:
        _set_tables(cache, tensors, facts)
        for made in facts["layers"]:
            _set_layer(cache.layers[made["index"]], tensors, made, getattr(torch, facts["dtype"]))
        cache.ids = tensors.get("ids")
    except (KeyError, IndexError, AttributeError, RuntimeError, ValueError) as error:
        cache.reset()
        raise FormatError(f"what is stored does not fit this cache and model ({error!r}); drop it") from error


def _set_tables(cache: SeqKVCache, tensors, facts) -> None:
    tables: dict[tuple[int, torch.device], PositionTable] = {}  # one on every device that needs it
    for made in facts["layers"]:
        if made["table"] is not None and cache.tracks_positions:
            place = made["table"], layer_device(cache, made["index"])
            if place not in tables:
                tables[place] = _table(cache.seqkv_config, tensors, facts, *place)
            if cache.calibration is not None:
                cache.calibration.check_rope(made["index"], tables[place].half, tables[place].interleaved)
            cache._tables[made["index"]] = tables[place]


def _table(config, tensors, facts, t: int, device: torch.device) -> PositionTable:
    made, keep = facts["tables"][t], config.n_sink + config.residual_length + 2 * config.page_size
    table = PositionTable(made["half"], made["interleaved"], device, config.page_size, keep)
    table.end, table.counts = made["end"], list(made["counts"])
    for name in ("rows", "starts", "relative"):
        x = tensors.get(f"table.{t}.{name}")
        setattr(table, name, None if x is None else x.to(device))
    return table


def _set_layer(layer: SeqKVLayer, tensors, made, dtype: torch.dtype) -> None:
    heads, key_dim, value_dim = made["shape"]
    device = layer_device(layer.cache, layer.index)
    rows = len(made["start"])
    layer.lazy_initialization(
        *(torch.empty(rows, heads, 0, dim, dtype=dtype, device=device) for dim in (key_dim, value_dim))
    )
    for name in COUNTS:
        setattr(layer, name, list(made[name]) if isinstance(made[name], (list, tuple)) else made[name])
    for name in ("pages", "sink_k", "sink_v", "recent_k", "recent_v", "mean"):
        x, mine = tensors.get(f"{layer.index}.{name}"), getattr(layer, name)
        if (x is None) != (mine is None) or (x is not None and _shape(x) != _shape(mine)):
            raise ValueError(f"{name} of layer {layer.index}")
        setattr(layer, name, None if x is None else x.to(mine.device))
    if any(made["held"]) and layer.held is None:
        raise ValueError(f"held tokens of layer {layer.index}")
    if any(made["held"]):
        layer.held.counts = list(made["held"])
        given = (tensors[f"{layer.index}.held_{name}"] for name in ("k", "v", "slots"))
        layer.held.k, layer.held.v, layer.held.slots = (x.to(layer.device) for x in given)


def _shape(x: torch.Tensor) -> tuple:
    """What two tensors of a kind have in common: all but the number of tokens or pages."""
    return x.dtype, x.dim(), x.shape[0], x.shape[1] if x.dim() == 4 else None, x.shape[-1]


def layer_device(cache: SeqKVCache, index: int) -> torch.device:
    """Where a layer of the cache's model runs."""
    for module in cache.model.modules():
        if getattr(module, "layer_idx", None) == index:
            return module_device(module)
    return module_device(cache.model)
