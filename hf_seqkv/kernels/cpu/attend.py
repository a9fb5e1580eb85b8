"""`attend_codes` for quantised pages on a CPU, compiled by numba.

The work is in `attend_worker.py`, `paged.py` and `dense.py`; here a call is written down as one record of addresses and
counts.
"""

from __future__ import annotations

import struct
import weakref
from array import array

import numpy as np
import torch

from ..interface import LayerView, Scoring
from . import attend_worker as worker
from . import paged, threads
from .call import CALL, DENSE, SPLIT, WHOLE
from .simd import ROWS

_TEMPLATES: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_FLOATS, _WORDS = struct.Struct("4f"), struct.Struct("2q")


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
    """What every call with a codec has in common: fields of the record, and the arrays they point to."""

    def __init__(self, codec):
        call = dict.fromkeys(WHOLE, 0)
        call |= {"heads": codec.heads, "size": codec.page_size, "page_bytes": codec.page_bytes}
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
            call |= {f"{name}_{field}": x.ctypes.data for field, x in arrays.items()}
            call |= {f"{name}_matrix_head": head, f"{name}_dim": side.dim, f"{name}_scale_bytes": side.scale_bits // 8}
            call |= {f"{name}_{part}": codec.sections[f"{name}_{part}"][0] for part in ("codes", "scales")}
            self.held.append(arrays)
        self.fields = call
        self.table = self.tile = self.unit = self.at = None

    def relative(self, table: torch.Tensor) -> tuple[int, float]:
        """Address of the shared table of turns as a tile of keys, and its unit; made once."""
        if self.table is not table:
            self.table, (self.tile, self.unit) = table, paged.path.make_tile(table.T.contiguous().numpy())
            self.at = self.tile.ctypes.data
        return self.at, self.unit


def _template(codec) -> _Template:
    if codec not in _TEMPLATES:
        _TEMPLATES[codec] = _Template(codec)
    return _TEMPLATES[codec]


def _dense(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Tokens `[B, H, S, D]` in a dtype and with rows that the kernel reads, and their strides."""
    if k.dtype not in (torch.float32, torch.bfloat16):
        k, v = k.float(), v.float()
    if k.stride(3) != 1 or v.stride(3) != 1:
        k, v = k.contiguous(), v.contiguous()
    return k, v, [*k.stride()[:3], *v.stride()[:3]]


def attend_codes(query: torch.Tensor, view: LayerView, mask: torch.Tensor | None, scoring: Scoring) -> torch.Tensor:
    """As `reference.attend_codes`, for quantised pages on a CPU."""
    batch, query_heads, steps, dim = query.shape
    codec, template = view.codec, _template(view.codec)
    call, value_dim = template.fields.copy(), codec.value_dim
    rows, pairs = query_heads // codec.heads * steps, batch * codec.heads
    query32 = query.detach().float().contiguous()
    out = torch.empty(batch, steps, query_heads, value_dim)
    splits, blocks = -(-max(view.counts, default=0) // SPLIT), -(-rows // ROWS)
    parts = pairs * (splits + 1) * rows
    numbers = torch.empty(parts * (value_dim + 2) + pairs * rows * (2 * dim + 34))
    at, pages = numbers.data_ptr(), view.pages
    call["mixed"], call["tops"], call["totals"] = at, at + 4 * parts * value_dim, at + 4 * parts * (value_dim + 1)
    call["prepared"] = at + 4 * parts * (value_dim + 2)
    call["query"], call["out"], call["batch"], call["rows"] = query32.data_ptr(), out.data_ptr(), batch, rows
    call["steps"], call["splits"], call["blocks"], call["tasks"] = steps, splits, blocks, parts // rows * blocks
    call["pages"], call["page_row"] = pages.data_ptr(), pages.stride(0)
    call["length"], call["offset"] = view.length, view.offset
    call["causal"], call["window"] = scoring.causal and mask is None, scoring.window or 0
    held, unit = [], 0.0
    if view.center is not None:
        center = view.center
        mean = center.mean.contiguous()
        starts = center.starts if center.starts.stride(1) == center.starts.shape[2] else center.starts.contiguous()
        call["constant"], call["starts"], call["starts_row"] = mean.data_ptr(), starts.data_ptr(), starts.stride(0)
        call["relative"], unit = template.relative(center.relative)
        call["half"], call["interleaved"] = center.relative.shape[1] // 2, center.interleaved
        held += mean, starts
    if mask is not None:
        bias = mask.detach() if mask.dtype == torch.bool else mask.detach().float()
        bias = bias if bias.stride(3) == 1 else bias.contiguous()
        strides = [0 if size == 1 else stride for size, stride in zip(bias.shape, bias.stride(), strict=True)]
        call["mask"], call["mask_kind"] = bias.data_ptr(), 1 if bias.dtype == torch.bool else 2
        call["mask_row"], call["mask_head"], call["mask_step"] = strides[:3]
        held.append(bias)
    if scoring.sink_logits is not None:
        logits = scoring.sink_logits.detach().float().contiguous()
        call["sink_logits"] = logits.data_ptr()
        held.append(logits)

    # The record, how far the workers are, numbers of every row, and runs of dense tokens lie in one piece of memory.
    runs = (view.sinks, view.recent) if view.side is None else (view.sinks, view.recent, view.side)
    progress_at = CALL.itemsize // 8
    rows_at = progress_at + 2 + pairs
    runs_at = rows_at + 6 * batch
    memory = array("q", bytes(8 * (runs_at + len(runs) * len(DENSE))))
    base = memory.buffer_info()[0]
    progress, numbers_of_rows = base + 8 * progress_at, base + 8 * rows_at
    call["prepare_next"], call["attend_next"], call["done"] = progress, progress + 8, progress + 16
    call["counts"], call["page_slots"] = numbers_of_rows, numbers_of_rows + 8 * batch
    call["dense"], call["runs"] = base + 8 * runs_at, len(runs)
    whole = [*call.values(), *_WORDS.unpack(_FLOATS.pack(scoring.scaling, scoring.softcap or 0, unit, 0))]
    whole += [0] * (2 + pairs)
    whole += [*view.counts, *view.page_slots]
    whole += [*view.sinks.slots, *view.sinks.begin, *view.recent.slots, *view.recent.begin]
    for i, run in enumerate(runs):
        k, v, strides = _dense(run.k, run.v)
        if i < 2:
            slots, begin = (numbers_of_rows + 8 * batch * (2 + 2 * i + j) for j in range(2))
        else:
            side_slots, begin = run.slots.contiguous(), 0
            slots = side_slots.data_ptr()
            held.append(side_slots)
        whole += [k.data_ptr(), v.data_ptr(), slots, i == 2, begin, k.shape[2], k.dtype == torch.bfloat16, *strides]
        held += k, v
    memory[:] = array("q", whole)
    threads.run(worker.PREPARE, base, pairs * blocks)
    threads.run(worker.ATTEND, base, call["tasks"])
    return out.to(query.dtype)
