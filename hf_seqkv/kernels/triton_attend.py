"""`attend_codes` for quantised pages on a GPU: tables and launches of the Triton kernels.

    prepare   a KV head: queries rotated as keys are, scores of the keys' constant part; softmax of dense tokens
    partials  a KV head and a few pages: softmax and mix, in the rotated domain of values
    combine   a query: parts merged in their order, those of pages rotated back

Agreement with the reference, of the largest output: 2e-3 where levels are gathered (fp16 operands). On NVIDIA GPUs
widths of 1 to 5 bits, in runs that all heads share (`triton_tables.pieces`), are expanded by byte tables, which round
levels to 127 steps at 4 bits and to 255 at the others: that adds 0.6 % to the codec's own squared error at 4 bits,
1.2 % at 5, nothing to speak of below. Outputs move by 1 % of their size, the farthest of many by up to 2 % of the
largest; 4-bit codes themselves move them by 13 %.

Nothing here waits for the GPU. A row's pages are split by its own page count alone, and splits are merged in their
order: a row's result does not depend on its neighbours, the GPU or chance.
"""

from __future__ import annotations

import functools
import weakref

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..codec.page import PageCodec, QuantizedPageCodec
from .interface import LayerView, Scoring
from .numbers import most_splits, table_of
from .triton_launch import Forms, on_device_of, seen_of, written
from .triton_partials import partials, partials_options
from .triton_rows import CHUNK, OPTIONS, SLICE, combine, pages_scored, prepare, prepare_options, record_size
from .triton_tables import SideTables, pieces

TOLERANCE = 2e-2  # of the largest output, by byte tables
FAR = 1 << 30  # a window, or a look ahead, without end


def supports(codec: PageCodec) -> str | None:
    """Why pages of this codec cannot be read here, or None."""
    if not isinstance(codec, QuantizedPageCodec):
        return "dense pages are read by torch"
    if codec.page_size != 64:
        return f"pages of {codec.page_size} tokens; the Triton kernels read pages of 64"
    if max(codec.key_dim, codec.value_dim) > 256:
        return f"heads of {max(codec.key_dim, codec.value_dim)} components; the Triton kernels read at most 256"
    return None


_TABLES: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # of a codec, and its compiled forms
_RELATIVE = WeakTensorKeyDictionary()


def _tables(codec, device: torch.device) -> tuple[SideTables, SideTables, list[int], bool, Forms]:
    """Tables of both sides, where sections begin in words of their content, whether scales are bytes; forms."""
    found = _TABLES.get(codec)
    if found is None:
        sides, scale_bytes = (codec.key, codec.value), codec.key.scale_bits // 8
        expand = all(pieces(side.widths) for side in sides) and use_tables(device)
        begins = [at // (4 if "codes" in name else scale_bytes) for name, (at, _) in codec.sections.items()]
        found = _TABLES[codec] = *(SideTables(side, expand) for side in sides), begins, scale_bytes == 1, Forms()
    return found


def use_tables(device: torch.device) -> bool:
    """Whether codes may be expanded by PTX instructions."""
    return device.type == "cuda" and torch.version.hip is None


@functools.cache
def _gpu(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and the bytes of shared memory of each; of an interpreter few."""
    if device.type != "cuda":
        return 4, 0
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, found.shared_memory_per_multiprocessor


def _relative(relative: torch.Tensor, wide: int) -> torch.Tensor:
    """Relative table `[P, 2 * half]` as `[cos | sin, P, wide]` fp16, made once."""
    version = None if relative.is_inference() else relative._version
    found = _RELATIVE.get(relative)
    if found is None or found[0] != (version, wide):
        half = relative.shape[-1] // 2
        parts = relative.half().unflatten(-1, (2, half)).transpose(0, 1)
        found = _RELATIVE[relative] = ((version, wide), torch.nn.functional.pad(parts, (0, wide - half)).contiguous())
    return found[1]


def _power(n: int, least: int) -> int:
    return max(least, 1 << (n - 1).bit_length())


def _numbers(view: LayerView, device: torch.device) -> torch.Tensor:
    """What the kernels need to know of each row, `numbers.table_of`; the layers of a step share it."""
    if view.live is not None:
        return view.live
    rows = table_of(view)
    if device.type != "cuda":
        return torch.tensor(rows, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return written(rows, device)
    _load(device)
    return _copied(rows, device, torch.cuda.current_stream(device))


@functools.cache
def _load(device: torch.device) -> None:
    """Compile and load what only a capture starts, in which nothing may be loaded."""
    written(((0,),), device)


@functools.lru_cache(maxsize=16)
def _copied(rows: tuple, device: torch.device, stream: torch.cuda.Stream) -> torch.Tensor:
    """Copied on a stream, without waiting; to be read on that stream."""
    return torch.tensor(rows, dtype=torch.int32, pin_memory=True).to(device, non_blocking=True)


def _dense_last(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _run(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Keys and values `[B, H, n, D]` in memory as `[B, H, room, D]`, and the room; copied where they lie otherwise."""
    room = _room(k)
    if room is None or _room(v) != room:
        k, v, room = k.contiguous(), v.contiguous(), k.shape[2]
    return k, v, room


def _room(x: torch.Tensor) -> int | None:
    """Tokens from head to head, None where memory is not as `_run` wants it; strides of one thing mean nothing."""
    batch, heads, tokens, dim = x.shape
    row, head, token, one = x.stride()
    room = head // dim if heads > 1 else row // dim if batch > 1 else tokens
    wanted = (one == 1 or dim == 1) and (token == dim or tokens == 1) and (head == room * dim or heads == 1)
    return room if wanted and (row == heads * room * dim or batch == 1) else None


@on_device_of(0)
def attend_codes(query: torch.Tensor, view: LayerView, mask: torch.Tensor | None, scoring: Scoring) -> torch.Tensor:
    """As `reference.attend_codes`, for codecs that `supports` has nothing against."""
    batch, query_heads, steps, dim = query.shape
    codec, device, side = view.codec, query.device, view.side
    heads, value_dim = codec.heads, codec.value_dim
    rows = query_heads // heads * steps
    key, value, begins, narrow, forms = _tables(codec, device)
    nvidia = use_tables(device)
    tiles = key.pieces[0][0] > 0
    block = min(_power(rows, 4), 8) if tiles else min(_power(rows, 8 if nvidia else 16), 16)
    blocks = batch * heads * -(-rows // block)
    ints = _numbers(view, device)
    half = 0 if view.center is None else view.center.relative.shape[-1] // 2
    wide = _power(half, 16)
    relative, starts, starts_room, mean, interleaved = ints, ints, 0, ints, False
    if view.center is not None:
        relative, starts = _relative(view.center.relative, wide), view.center.starts
        if starts.stride()[1:] != (2 * half, 1) or starts.stride(0) % max(2 * half, 1):
            starts = starts.contiguous()
        starts_room = starts.stride(0) // max(2 * half, 1)
        mean, interleaved = view.center.mean.contiguous(), view.center.interleaved
    mask = None if mask is None else _dense_last(mask)
    bias = ints if mask is None else mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    strides = (0, 0, 0) if mask is None else [
        0 if size == 1 else stride for size, stride in zip(mask.shape[:3], mask.stride()[:3], strict=True)
    ]  # fmt: skip
    query, pages = _dense_last(query), _dense_last(view.pages)
    runs = [_run(run.k, run.v) for run in (view.sinks, view.recent)]
    # One program reads either: pointers of one type.
    runs.append((ints, ints, 0) if side is None else _run(*(x.to(view.recent.k.dtype) for x in (side.k, side.v))))
    tensors, rooms = [x for k, v, _ in runs for x in (k, v)], [room for *_, room in runs]
    listed = ints if side is None else side.slots.contiguous()
    sinks, recents = (run.k.shape[2] for run in (view.sinks, view.recent))
    sides = 0 if side is None else side.k.shape[2]
    splits = most_splits(view)
    longest = recents - min(view.recent.begin, default=0)
    parts = splits + sum(-(-n // CHUNK.value) for n in (sinks, longest, sides))

    dp, dvp = _power(dim, 32), _power(value_dim, 32)
    prepared = torch.empty(blocks * block * record_size(dp), dtype=torch.float32, device=device)
    some, scores, room, scorers = min(_power(rows, 1), block), ints, 0, 0
    each = pages_scored(some)
    multiprocessors, shared = _gpu(device)
    options, resident = prepare_options(wide, nvidia)
    if view.center is not None:
        room = max(view.counts, default=0)
        # No more programs than run at once: what each needs of queries and tables is had once.
        scorers = min(-(-room // each), max(resident * multiprocessors // blocks, 1))
        scores = torch.empty(blocks * room * 64 * some, dtype=torch.float32, device=device)
    sums = torch.empty(batch * heads * parts * rows * (value_dim + 2), dtype=torch.float32, device=device)
    out = torch.empty(batch, steps, query_heads, value_dim, dtype=query.dtype, device=device)
    cap = float(scoring.softcap or 0)
    ahead = 0 if scoring.causal and mask is None else FAR
    limits = (steps, scoring.window or FAR, ahead, cap)
    shape = {
        "H": heads, "ROWS": rows, "RB": block, "RP": some, "D": dim, "DP": dp, "DV": value_dim,
        "CENTER": view.center is not None, "SOFTCAP": cap > 0,
        "MASK": 0 if mask is None else 1 if mask.dtype == torch.bool else 2,
    }  # fmt: skip
    logits = ints if scoring.sink_logits is None else scoring.sink_logits.contiguous()
    words = pages.stride(0) // 4, pages.stride(1) // 4
    # All that the kernels' compiled forms depend on beside the codec.
    seen = seen_of(
        (query, pages, starts, relative, mean, *tensors, listed, bias, logits),
        (*query.stride()[:3], *out.stride()[:3], *words),
    )
    form = (query_heads, steps, half, interleaved, *shape.values(), side is None, scoring.sink_logits is None, seen)
    forms.start(
        prepare, (blocks, dp // SLICE.value + parts - splits + scorers, 1), form,
        [query, scoring.scaling * 1.4426950408889634, key.matrix, key.norm, key.mean, key.middle, mean, prepared,
         *tensors, listed, ints, bias, sums, starts, relative, scores, *query.stride()[:3], *rooms, *strides,
         starts_room, batch, parts, splits, sinks, sides, room, *limits],
        lambda: shape | {
            "DVP": dvp, "HALF": half, "HP": wide, "PAGES": each, "TILES": tiles, "INTERLEAVED": interleaved,
            "SIDE": side is not None, "PRECISION": "tf32x3" if nvidia else "ieee", **options,
        },
    )  # fmt: skip
    if splits:
        forms.start(
            partials, (blocks, splits, 1), form,
            [prepared, scores, pages.view(torch.int32), ints, bias, sums, *key.arguments, *value.arguments,
             value.middle, *words, *begins, *strides, batch, parts, room, *limits],
            lambda: shape | {
                # `prepare` puts it into scores of the constant part.
                "MASK": 0 if view.center is not None and not cap else shape["MASK"],
                "KEYS": key.pieces, "KU": key.uniform, "VALUES": value.pieces, "VU": value.uniform, "NARROW": narrow,
                **partials_options(tiles, max(dim, value_dim), shared),
            },
        )  # fmt: skip
    part = min(dvp, 64)
    forms.start(
        combine, (batch * heads, rows, dvp // part), form,
        [sums, ints, value.matrix, value.mean, logits, out, *out.stride()[:3], batch, parts, splits, steps],
        lambda: {
            "H": heads, "ROWS": rows, "DV": value_dim, "DVP": dvp, "PART": part,
            "SINKS": scoring.sink_logits is not None, **OPTIONS,
        },
    )  # fmt: skip
    return out
