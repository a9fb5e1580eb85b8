"""Sessions on disk: a cache is saved whole and wakes bit-identical, its pages entropy-coded without loss.

A session file is a bundle (`store/bundle.py`) of the cache's state (`state.py`). Pages that all layers hold are coded
by the `exact` codec, page by page of each row: `exact.{row}` uint8 has them in turn; what is left of `{i}.pages` are
those that only layers without a sliding window still hold, and `{i}.tail` those that a crop has cut.

Ranks that share a model (`shards.py`) write a file each, with `.rank0-of-2` and so on behind its name; all of them must
save, and load. Their facts tell which `shard` a file is of, and by a common digest that they are of one `session`.
"""

from __future__ import annotations

import glob
import hashlib
import os
from pathlib import Path
from typing import Any

import torch

from ..calibration.artifact import SeqKVCalibration
from ..errors import CalibrationMismatchError, FormatError
from ..store import bundle
from ..store.objects import write_file
from . import records
from .cache import SeqKVCache
from .model_facts import model_fingerprint
from .page_forms import PageForms
from .shards import Shard, shard_of
from .state import set_state, state_of

VERSION = 1


def save(cache: SeqKVCache, path: str | Path) -> int:
    """Write a session; an older file at `path` is replaced once the new one is whole. Returns the file's bytes.

    Args:
        cache: One that its model has run with.

    Raises:
        UnsupportedOperationError: It is empty, or a layer keeps something else than keys and values.
        OSError: The file cannot be written.
    """
    tensors, facts = state_of(cache)
    facts |= {"version": VERSION, "model": model_fingerprint(cache.model).hex(), "config": cache.seqkv_config.to_dict()}
    facts["config"].pop("prefix_store", None)
    facts["calibration"] = None if cache.calibration is None else cache.calibration.fingerprint.hex()
    if cache.seqkv_config.method != "dense" and cache.ids is not None and cache.tracks_positions:
        _encode(cache, tensors, facts)
    data, shard = bundle.pack(tensors, facts), cache.shard
    if shard.ranks > 1:
        digests = shard.gather(hashlib.sha256(data).digest())
        facts |= {"shard": [shard.rank, shard.ranks], "session": hashlib.sha256(b"".join(digests)).hexdigest()}
        data = bundle.pack(tensors, facts)
    write_file(shard.path(path), data)
    return len(data)


def load(
    path: str | Path, model: torch.nn.Module, calibration: str | Path | SeqKVCalibration | None = None
) -> SeqKVCache:
    """The cache that was saved, bound to `model`.

    Args:
        calibration: Where it is now, if the session was made with one and it has moved.

    Raises:
        FormatError: The file is truncated, damaged, foreign, or of another version.
        CalibrationMismatchError: It was made with another model or calibration, or by other ranks.
        FileNotFoundError: There is none.
        SeqKVError: Another rank failed.
    """
    shard, fingerprint = shard_of(model), model_fingerprint(model).hex()
    with shard.together():
        tensors, facts = _read(path, shard)
        if facts["model"] != fingerprint:
            raise CalibrationMismatchError(
                f"{path} was saved with another model, dtype or adapter (fingerprint {facts['model'][:12]}, this model "
                f"{fingerprint[:12]}); load it with the one it was made with"
            )
        options = facts["config"] | ({} if calibration is None else {"calibration": calibration})
        cache = SeqKVCache(config=model.config.get_text_config(decoder=True), **options)
        found = None if cache.calibration is None else cache.calibration.fingerprint.hex()
        if found != facts["calibration"]:
            raise CalibrationMismatchError(
                f"{path} was saved with another calibration ({facts['calibration'][:12]}) than "
                f"{options['calibration']}; give the one it was made with as calibration=..."
            )
    if len(set(shard.gather(bytes.fromhex(facts.get("session", ""))))) > 1:
        raise FormatError(f"the files of {path} are of different sessions: a rank failed to save; drop them")
    cache.bind(model)
    with shard.together():
        if "exact" in facts:
            _decode(cache, tensors, facts)
        set_state(cache, tensors, facts)
    return cache


def _read(path: str | Path, shard: Shard) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and facts of a session, from this rank's file."""
    file, mine = shard.path(path), [shard.rank, shard.ranks]
    rule = f"as many ranks load a session as saved it, each its own file; this is rank {shard.rank} of {shard.ranks}"
    if not file.exists():
        others = Path(path).parent.glob(f"{glob.escape(Path(path).name)}.rank*-of-*")
        found = [str(x) for x in (Path(path), *sorted(others)) if x.exists()]
        if found:
            raise CalibrationMismatchError(f"there is no {file}, but {', '.join(found)}: {rule}")
    tensors, facts = bundle.unpack(file.read_bytes(), f"session {os.fspath(file)!r}")
    if facts.get("version") != VERSION:
        raise FormatError(
            f"{file} is no session of version {VERSION} ({facts.get('version')!r}); see hf_seqkv's version"
        )
    if facts.get("shard", [0, 1]) != mine:
        raise CalibrationMismatchError(f"{file} was saved by rank {' of '.join(map(str, facts['shard']))}: {rule}")
    return tensors, facts


def _encode(cache: SeqKVCache, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Replace pages by `exact` ones."""
    layers = [layer for layer in cache._coded() if layer.is_initialized]
    first = max(layer.dropped for layer in layers)
    forms, shapes, size = PageForms(cache, cache.model), records.facts_of(cache), cache.seqkv_config.page_size
    tables, ids, sizes = cache._distinct_tables(), cache.ids, []
    for row, last in enumerate(layers[0].counts):
        count, data = max(0, last - first), []
        if count:
            begin = layers[0]._page_slot(row, first)
            tokens = ids[row, begin : begin + count * size].view(count, size)
            blank = torch.empty(0)
            means = [blank if x.mean is None else x.mean[row].expand(count, *x.mean.shape[1:]) for x in layers]
            starts = [table.starts[row, first:last] for table in tables]
            around = forms.around(starts, [table.relative for table in tables], means, tokens, shapes)
            payloads = [layer.pages[row, first - layer.dropped : last - layer.dropped].cpu() for layer in layers]
            data = forms.codec(shapes).encode(payloads, around)
        tensors[f"exact.{row}"] = torch.frombuffer(bytearray(b"".join(data)), dtype=torch.uint8)
        sizes.append([len(x) for x in data])
    facts |= {"exact": {"first": first, "sizes": sizes}, "shapes": shapes}
    for layer in layers:
        name = f"{layer.index}.pages"
        if any(layer.kept):
            blank = layer.pages.new_zeros(layer.codec.page_bytes)
            cut = [
                layer.pages[row, count - layer.dropped] if kept else blank
                for row, (count, kept) in enumerate(zip(layer.counts, layer.kept, strict=True))
            ]
            tensors[f"{layer.index}.tail"] = torch.stack(cut)
        tensors[name] = tensors[name][:, : first - layer.dropped]


def _decode(cache: SeqKVCache, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Put pages back where `_encode` took them."""
    first, shapes, size = facts["exact"]["first"], facts["shapes"], cache.seqkv_config.page_size
    forms, whole = PageForms(cache, cache.model), {}
    for made in facts["layers"]:
        head, tail = (tensors.get(f"{made['index']}.{name}") for name in ("pages", "tail"))
        last = max(count + (kept > 0) for count, kept in zip(made["counts"], made["kept"], strict=True))
        whole[made["index"]] = head.new_zeros(len(head), max(0, last - made["dropped"]), head.shape[2])
        whole[made["index"]][:, : head.shape[1]] = head
        for row, (count, kept) in enumerate(zip(made["counts"], made["kept"], strict=True)):
            if kept:
                whole[made["index"]][row, count - made["dropped"]] = tail[row]
    for row, sizes in enumerate(facts["exact"]["sizes"]):
        if not sizes:
            continue
        begin = facts["layers"][0]["start"][row] + cache.seqkv_config.n_sink + first * size
        tokens = tensors["ids"][row, begin : begin + len(sizes) * size].view(len(sizes), size)
        starts, relative = (
            [tensors[f"table.{t}.{name}"] for t in range(len(facts["tables"]))] for name in ("starts", "relative")
        )
        means = [tensors.get(f"{made['index']}.mean") for made in facts["layers"]]
        means = [torch.empty(0) if x is None else x[row].expand(len(sizes), *x.shape[1:]) for x in means]
        around = forms.around([x[row, first : first + len(sizes)] for x in starts], relative, means, tokens, shapes)
        data = [x.numpy().tobytes() for x in tensors[f"exact.{row}"].split(sizes)]
        for made, payloads in zip(facts["layers"], forms.codec(shapes).decode(data, around), strict=True):
            at = first - made["dropped"]
            whole[made["index"]][row, at : at + len(sizes)] = payloads
    tensors |= {f"{index}.pages": pages for index, pages in whole.items()}
