"""What a step's `update()` returns: a tensor without storage that stands for all keys (or values) of a layer.

The attention wrappers (`attention.py`) recognise it and read the codes. Products with it rebuild a part of the dense
tensor at a time (`direct.py`), any other operation all of it, so that a model with an attention of its own is correct,
only not fused.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch.utils._pytree import tree_map

from ..errors import SeqKVWarning, UnsupportedOperationError
from ..kernels import ops
from ..kernels.interface import LayerView, select_backend
from .rebuild import rebuild

OPERATIONS: dict[Callable, Callable] = {}  # of torch, that need not have all of a tensor at once: see `direct.py`


def _unknown(*args, **kwargs):
    return NotImplemented


class Lazy(torch.Tensor):
    """A tensor without storage, that `materialize` makes and any operation on it makes and takes."""

    def materialize(self) -> torch.Tensor:
        """The dense tensor."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = OPERATIONS.get(func, _unknown)(*args, **kwargs or {})
        if result is not NotImplemented:
            return result
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        say_rebuilt("operation", f"its own attention takes {func.__name__} of them")
        return func(*tree_map(dense, args), **tree_map(dense, kwargs or {}))


_SAID: set[str] = set()


def say_rebuilt(kind: str, reason: str) -> None:
    """Warn, once for a kind of reason, that a model reads dense keys and values."""
    if kind not in _SAID:
        _SAID.add(kind)
        warnings.warn(
            f"this model runs on rebuilt dense keys and values: {reason}. Correct, but not faster in this step",
            SeqKVWarning,
            stacklevel=4,
        )


def dense(x):
    """What is not lazy as it is."""
    return x.materialize() if isinstance(x, Lazy) else x


class Handle(Lazy):
    """Keys (`side=0`) or values (`side=1`) of a `LayerView`, `[B, H, length - offset, D]`."""

    @staticmethod
    def __new__(cls, view: LayerView, side: int, backend: str, dtype: torch.dtype):
        run = view.recent.k if side == 0 else view.recent.v
        shape = (*run.shape[:2], view.length - view.offset, run.shape[3])
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=run.device)

    def __init__(self, view: LayerView, side: int, backend: str, dtype: torch.dtype):
        self.view_, self.side, self.backend = view, side, backend

    @classmethod
    def pair(cls, view: LayerView, backend: str, dtype: torch.dtype) -> tuple[Handle, Handle]:
        return cls(view, 0, backend, dtype), cls(view, 1, backend, dtype)

    def obstacle(self, scoring) -> str | None:
        """Why these keys cannot be attended to as codes, or None."""
        return None

    def attend(self, query, mask, scoring) -> torch.Tensor:
        """Attention over the codes, `[B, Tq, Hq, Dv]`; see `kernels.reference.attend_codes`."""
        if torch.compiler.is_compiling():
            return ops.attend_codes(query, *ops.flatten(self.view_, mask, scoring), self.backend)
        backend = select_backend(self.backend, self.view_.codec, query.device)
        return backend.attend_codes(query, self.view_, mask, scoring)

    def materialize(self, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """Dense tokens `begin` to `end` of dimension 2, all by default; zeros where a row holds nothing (padding)."""
        if self.view_.live is not None:
            raise UnsupportedOperationError("its attention reads rebuilt dense keys and values")
        end = self.shape[2] if end is None else end
        unpack = select_backend(self.backend, self.view_.codec, self.device).unpack_pages
        return rebuild(self.view_, self.side, self.dtype, unpack, begin, end)

    def __repr__(self, **kwargs):
        return f"Handle(shape={tuple(self.shape)}, side={'kv'[self.side]!r}, dtype={self.dtype})"
