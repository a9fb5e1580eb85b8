"""`attend_codes` for quantised pages on a CPU, compiled by numba.

The work is in `attend_worker.py`, `paged.py` and `dense.py`; here a call is written down as one record of addresses and
counts.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import weakref

import numpy as np
import torch

from ..interface import LayerView, Scoring
from ..numbers import settled
from . import attend_worker as worker
from . import paged, threads
from .call import CALL, DENSE, FIXED, SPLIT
from .simd import ROWS

_TEMPLATES: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_FLOATS = struct.Struct("4f")
_RECORD, _NONE = CALL.itemsize // 8, [0] * 6
_READ = (torch.float32, torch.bfloat16)


@functools.cache
def _words(count: int) -> struct.Struct:
    """`count` int64."""
    return struct.Struct(f"{count}q")


def path() -> str:
    """How this processor multiplies: the name of the compiled path."""
    return paged.path.NAME


def tolerance() -> float:
    """Largest difference from the reference, as a part of the largest output.

    In 16-bit integers it is typically 2e-4 and grows with the scores: 1e-3 holds as long as these stay below some tens.
    4-bit codes themselves are off by 1e-1.
    """
    return 2e-5 if paged.path.OPERAND is np.float32 else 1e-3


def _matrix(matrix: torch.Tensor) -> tuple[np.ndarray, int]:
    """Matrices `[H, D, E]` with rows padded to 32 columns, and bytes from head to head: 0 where all share the first."""
    if torch.equal(matrix, matrix[:1].expand_as(matrix)):
        matrix = matrix[:1]  # stays in a cache nearer by
    padded = torch.nn.functional.pad(matrix, (0, -matrix.shape[2] % 32)).contiguous().numpy()
    return padded, 0 if len(matrix) == 1 else padded[0].nbytes


class _Template:
    """What every call with a codec has in common: the first fields of the record, and the arrays they point to."""

    def __init__(self, codec):
        self.heads, self.value_dim = codec.heads, codec.value_dim
        fields = {"heads": codec.heads, "size": codec.page_size, "page_bytes": codec.page_bytes}
        self.held = []
        for name, side in (("key", codec.key), ("value", codec.value)):
            widths = side.widths.contiguous().numpy()
            levels = side.levels.expand(side.heads, -1, -1).contiguous().numpy()
            arrays = dict(zip(("levels", "units"), paged.path.make_levels(levels, widths), strict=True))
            # Queries are multiplied by the transposed decode matrix, outputs by the matrix itself.
            matrix = side.decode_matrix.transpose(1, 2) if name == "key" else side.decode_matrix
            arrays["matrix"], head = _matrix(matrix)
            arrays |= {"widths": widths, "offsets": side.offsets.contiguous().numpy()}
            arrays["mean"] = side.mean.contiguous().numpy()
            fields |= {f"{name}_{field}": x.ctypes.data for field, x in arrays.items()}
            fields |= {f"{name}_matrix_head": head, f"{name}_dim": side.dim}
            fields[f"{name}_scale_bytes"] = side.scale_bits // 8
            fields |= {f"{name}_{part}": codec.sections[f"{name}_{part}"][0] for part in ("codes", "scales")}
            self.held.append(arrays)
        self.fields = _words(len(FIXED)).pack(*(fields[name] for name in FIXED))
        self.table = self.tile = self.unit = self.at = None

    def relative(self, table: torch.Tensor) -> tuple[int, float]:
        """Address of the shared table of turns as a tile of keys, and its unit; made once."""
        if self.table is not table:
            self.table, (self.tile, self.unit) = table, paged.path.make_tile(table.T.contiguous().numpy())
            self.at = self.tile.ctypes.data
        return self.at, self.unit


def _template(codec) -> _Template:
    found = _TEMPLATES.get(codec)
    if found is None:
        found = _TEMPLATES[codec] = _Template(codec)
    return found


def _dense(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, tuple, tuple]:
    """Tokens `[B, H, S, D]` in a dtype and with rows that the kernel reads, and their strides."""
    if k.dtype not in _READ:
        k, v = k.float(), v.float()
    strides = k.stride(), v.stride()
    if strides[0][3] != 1 or strides[1][3] != 1:
        k, v = k.contiguous(), v.contiguous()
        strides = k.stride(), v.stride()
    return k, v, *strides


def attend_codes(query: torch.Tensor, view: LayerView, mask: torch.Tensor | None, scoring: Scoring) -> torch.Tensor:
    """As `reference.attend_codes`, for quantised pages on a CPU.

    Short contexts are decoded in some tens of microseconds a layer, so that what is done here counts.
    """
    view = settled(view)
    batch, query_heads, steps, dim = query.shape
    template, counts, pages = _template(view.codec), view.counts, view.pages
    heads, value_dim = template.heads, template.value_dim
    rows, pairs = query_heads // heads * steps, batch * heads
    dtype = query.dtype
    query = (query if dtype in _READ else query.detach().float()).contiguous()
    out = torch.empty(batch, steps, query_heads, value_dim, dtype=query.dtype)
    splits, blocks = -(-max(counts, default=0) // SPLIT), -(-rows // ROWS)
    parts, units = pairs * (splits + 1) * rows, pairs * blocks
    runs = (view.sinks, view.recent) if view.side is None else (view.sinks, view.recent, view.side)

    # One piece of memory has what the parts compute, then the record, how far the workers are, numbers of every row,
    # and the runs of dense tokens.
    results = parts * (value_dim + 2) + pairs * rows * (2 * dim + 34)
    results += results % 2
    memory = torch.empty(results + 2 * (_RECORD + 1 + pairs + units + 6 * batch + len(runs) * len(DENSE)))
    mixed = memory.data_ptr()
    record = mixed + 4 * results
    progress = record + 8 * _RECORD
    of_rows = progress + 8 * (1 + pairs + units)
    tops = mixed + 4 * parts * value_dim
    # In the order of `call.CALL`, behind what the codec fixes.
    call = [query.data_ptr(), out.data_ptr(), query.dtype == torch.bfloat16, batch, rows, steps, splits, blocks]
    call += mixed, tops, tops + 4 * parts, tops + 8 * parts, progress, progress + 8, progress + 8 + 8 * pairs
    call += of_rows, of_rows + 8 * batch, of_rows + 48 * batch, len(runs)
    call += pages.data_ptr(), pages.stride(0), view.length, view.offset
    call += scoring.causal and mask is None, scoring.window or 0
    held, unit = [], 0.0
    if (center := view.center) is None:
        call += _NONE
    else:
        mean, starts = center.mean.contiguous(), center.starts
        starts = starts if starts.stride(1) == starts.shape[2] else starts.contiguous()
        table, unit = template.relative(center.relative)
        call += mean.data_ptr(), starts.data_ptr(), starts.stride(0), table, center.relative.shape[1] // 2
        call.append(center.interleaved)
        held += mean, starts
    if mask is None:
        call += _NONE[1:]
    else:
        bias = mask.detach() if mask.dtype == torch.bool else mask.detach().float()
        bias = bias if bias.stride(3) == 1 else bias.contiguous()
        strides = [0 if size == 1 else stride for size, stride in zip(bias.shape, bias.stride(), strict=True)]
        call += bias.data_ptr(), 1 if bias.dtype == torch.bool else 2, *strides[:3]
        held.append(bias)
    if scoring.sink_logits is None:
        call.append(0)
    else:
        logits = scoring.sink_logits.detach().float().contiguous()
        call.append(logits.data_ptr())
        held.append(logits)
    call += _words(2).unpack(_FLOATS.pack(scoring.scaling, scoring.softcap or 0, unit, 0))
    call += [0] * (1 + pairs + units)
    call += *counts, *view.page_slots, *view.sinks.slots, *view.sinks.begin, *view.recent.slots, *view.recent.begin
    slots = of_rows + 16 * batch
    for run in runs:
        k, v, (*ks, _), (*vs, _) = _dense(run.k, run.v)
        if run is view.side:
            at = run.slots.contiguous()
            call += k.data_ptr(), v.data_ptr(), at.data_ptr(), True, 0
            held.append(at)
        else:
            call += k.data_ptr(), v.data_ptr(), slots, False, slots + 8 * batch
            slots += 16 * batch
        call += k.shape[2], k.dtype == torch.bfloat16, *ks, *vs
        held += k, v
    whole = template.fields + _words(len(call)).pack(*call)
    ctypes.memmove(record, whole, len(whole))
    threads.run(worker.ATTEND, record, units * (splits + 1))
    return out if query.dtype == dtype else out.to(dtype)
