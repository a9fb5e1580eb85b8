"""`encode_pages` on a CPU, compiled by numba: `QuantizedPageCodec.encode` without its dense temporaries.

The work is in `encode_worker.py`; here it is written down as records of addresses and counts. Codes and scales are
those of the codec's own `encode` but for rounding: sums are taken in another order, so a coordinate on an edge between
two levels, or a vector that two gains serve equally well, may go either way.
"""

from __future__ import annotations

import weakref

import numpy as np
import torch

from ...codec.center import Center
from ...codec.page import QuantizedPageCodec
from ...codec.vector import VectorCodec
from . import encode_worker, threads
from .encode_simd import TABLE, make_tables

_TEMPLATES: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_DTYPES = {torch.float32: encode_worker.FP32, torch.bfloat16: encode_worker.BF16, torch.float16: encode_worker.FP16}
_FACTORS = np.array([1.0, 1.4, 2.0, 2.8, 4.0], np.float32)  # as in `VectorCodec.encode`


def _tables(side: VectorCodec) -> np.ndarray:
    """Codebooks of every head and width, `[H, 9, 2, TABLE]`."""
    levels = side.levels.expand(side.heads, -1, -1)
    tables = np.zeros((side.heads, 9, 2, TABLE), np.float32)
    for width in set(side.widths.flatten().tolist()) - {0}:
        books = levels[:, width, : 1 << width]
        edges = (books[:, 1:] + books[:, :-1]) / 2
        for head in range(side.heads):
            tables[head, width] = make_tables(books[head].numpy(), edges[head].numpy())
    return tables


def _template(codec: QuantizedPageCodec) -> tuple[np.ndarray, list]:
    """Records of both sides with what a codec fills in, made once, and the arrays they point to."""
    if codec not in _TEMPLATES:
        records, held = np.zeros(2, encode_worker.SIDE), []
        for record, name, side in zip(records, ("key", "value"), (codec.key, codec.value), strict=True):
            arrays = {
                "matrix": side.encode_matrix.transpose(1, 2).contiguous().numpy(),
                "mean": side.mean.contiguous().numpy(),
                "widths": side.widths.contiguous().numpy(),
                "offsets": side.offsets.contiguous().numpy(),
                "tables": _tables(side),
                "weights": side.weights.contiguous().numpy(),
                "totals": side.weights.sum(-1).numpy(),
                "factors": _FACTORS,
            }
            for field, array in arrays.items():
                record[field] = array.ctypes.data
            record["dim"], record["tries"] = side.dim, 0 if side.scale == "norm" else 5 if side.mixed else 1
            record["codes"] = codec.sections[f"{name}_codes"][0]
            record["scales"], record["scale_bytes"] = codec.sections[f"{name}_scales"][0], side.scale_bits // 8
            held.append(arrays)
        _TEMPLATES[codec] = records, held
    return _TEMPLATES[codec]


def encode_pages(codec: QuantizedPageCodec, k: torch.Tensor, v: torch.Tensor, center: Center | None) -> torch.Tensor:
    """`codec.encode(k - center.keys(0, N), v)`; no dense temporary, and a page's bytes depend on nothing else.

    Args:
        k, v: Finite keys `[B, N, H, P, Dk]` and values `[B, N, H, P, Dv]` of `N` pages a row, of any strides.
        center: Constant part of the keys, with the starts of these pages; None where keys have none.

    Returns:
        `[B, N, page_bytes]` uint8.
    """
    batch, pages = k.shape[:2]
    template, _ = _template(codec)
    sides, record, progress = template.copy(), np.zeros(1, encode_worker.ENCODE), np.zeros(1, np.int64)
    held = []
    for side, x in zip(sides, (k, v), strict=True):
        x = x.detach() if x.dtype in _DTYPES else x.detach().float()
        x = x if x.stride(-1) == 1 else x.contiguous()
        side["data"], side["dtype"] = x.data_ptr(), _DTYPES[x.dtype]
        side["row"], side["page"], side["head"], side["token"] = x.stride()[:4]
        held.append(x)
    call = record[0]
    out = torch.zeros(batch, pages, codec.page_bytes, dtype=torch.uint8)
    call["sides"], call["next"], call["out"] = sides.ctypes.data, progress.ctypes.data, out.data_ptr()
    call["pages"], call["heads"], call["size"] = pages, codec.heads, codec.page_size
    call["tasks"], call["page_bytes"] = batch * pages * codec.heads * 2, codec.page_bytes
    if center is not None:
        mean, starts = center.mean.float().contiguous(), center.starts.float().contiguous()
        relative = center.relative.float().T.contiguous()
        call["constant"], call["starts"], call["relative"] = mean.data_ptr(), starts.data_ptr(), relative.data_ptr()
        call["half"], call["interleaved"] = relative.shape[0] // 2, center.interleaved
        held += [mean, starts, relative]
    threads.run(encode_worker.WORKER, record.ctypes.data, int(call["tasks"]))
    return out
