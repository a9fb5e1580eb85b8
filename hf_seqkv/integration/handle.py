"""What a step's `update()` returns: a tensor without storage that stands for all keys (or values) of a layer.

The attention wrappers (`attention.py`) recognise it and read the codes. Any other operation on it rebuilds the dense
tensor, so that a model with an attention of its own is correct, only not fused.
"""

from __future__ import annotations

import torch
from torch.utils._pytree import tree_map

from ..kernels import ops
from ..kernels.interface import LayerView, select_backend


class Handle(torch.Tensor):
    """Keys (`side=0`) or values (`side=1`) of a `LayerView`, `[B, H, length - offset, D]`."""

    @staticmethod
    def __new__(cls, view: LayerView, side: int, backend: str, dtype: torch.dtype, decoded: dict):
        run = view.recent.k if side == 0 else view.recent.v
        shape = (*run.shape[:2], view.length - view.offset, run.shape[3])
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=run.device)

    def __init__(self, view: LayerView, side: int, backend: str, dtype: torch.dtype, decoded: dict):
        self.view_, self.side, self.backend, self.decoded = view, side, backend, decoded

    @classmethod
    def pair(cls, view: LayerView, backend: str, dtype: torch.dtype) -> tuple[Handle, Handle]:
        decoded: dict[int, torch.Tensor] = {}  # pages of the side that nobody has asked for yet
        return cls(view, 0, backend, dtype, decoded), cls(view, 1, backend, dtype, decoded)

    def attend(self, query, mask, scoring) -> torch.Tensor:
        """Attention over the codes, `[B, Tq, Hq, Dv]`; see `kernels.reference.attend_codes`."""
        if torch.compiler.is_compiling():
            return ops.attend_codes(query, *ops.flatten(self.view_, mask, scoring), self.backend)
        backend = select_backend(self.backend, self.view_.codec, self.device)
        return backend.attend_codes(query, self.view_, mask, scoring)

    def materialize(self) -> torch.Tensor:
        """The dense tensor, zeros where a row holds nothing (its padding)."""
        view, paged = self.view_, None
        if any(view.counts):
            if self.side not in self.decoded:
                chosen = select_backend(self.backend, view.codec, view.pages.device)
                pages = view.pages[:, : max(view.counts)]
                self.decoded |= dict(enumerate(chosen.decode_pages(view.codec, pages)))
            paged = self.decoded.pop(self.side)
        return materialize(view, self.side, self.dtype, paged)

    def __repr__(self, **kwargs):
        return f"Handle(shape={tuple(self.shape)}, side={'kv'[self.side]!r}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def dense(x):
            return x.materialize() if isinstance(x, Handle) else x

        return func(*tree_map(dense, args), **tree_map(dense, kwargs or {}))

    def to(self, *args, **kwargs):
        """Itself where device and dtype already match (accelerate moves inputs between layers), else dense."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device in (None, self.device) and dtype in (None, self.dtype):
            return self
        return self.materialize().to(*args, **kwargs)


def materialize(view: LayerView, side: int, dtype: torch.dtype, paged: torch.Tensor | None) -> torch.Tensor:
    """Dense keys (`side=0`) or values of a view, `[B, H, length - offset, D]`; `paged` are its pages, decoded."""
    runs = [(run.k, run.v)[side] for run in (view.sinks, view.recent)]
    batch, heads, _, dim = runs[1].shape
    out = runs[1].new_zeros(batch, heads, view.length - view.offset, dim, dtype=dtype)
    if paged is not None:
        if side == 0 and view.center is not None:
            paged = paged + view.center.keys(0, paged.shape[1])
        paged = paged.to(dtype).transpose(1, 2).flatten(2, 3)  # [B, H, N * P, D]
    for row in range(batch):
        if view.counts[row]:
            at, count = view.page_slots[row] - view.offset, view.counts[row] * view.codec.page_size
            out[row, :, at : at + count] = paged[row, :, :count]
        if view.side is not None:
            held = (view.side.slots[row] >= view.offset).nonzero()[:, 0]
            out[row, :, view.side.slots[row, held] - view.offset] = (view.side.k, view.side.v)[side][row, :, held].to(
                dtype
            )
        for run, x in zip((view.sinks, view.recent), runs, strict=True):
            begin = run.begin[row]
            at = run.slots[row] + begin - view.offset
            out[row, :, at : at + x.shape[2] - begin] = x[row, :, begin:]
    return out
