"""Models that multiply queries, keys and values themselves instead of calling a registered attention function.

`scaled_dot_product_attention` of handles goes to the kernel, and matrix products with them are summed up `WINDOW`
tokens at a time, so that no step holds the dense keys and values of a whole layer. Operations that come before the
product (a transposition, another dtype, heads merged into the batch) are kept in mind until then.
"""

from __future__ import annotations

import torch

from ..kernels.interface import Scoring
from .handle import OPERATIONS, Handle, Lazy, dense, say_rebuilt

WINDOW = 1024  # tokens rebuilt at once
MAX_STEPS = 16  # new tokens a fused call takes; more (chunked prefill) is matrix work for the dense path


class Arranged(Lazy):
    """A handle with dimensions exchanged or merged, or in another dtype.

    Args:
        swapped: Whether the last two dimensions are exchanged.
        merged: Whether the first two are one.
    """

    @staticmethod
    def __new__(cls, handle: Handle, swapped: bool, merged: bool, dtype: torch.dtype):
        batch, heads, tokens, dim = handle.shape
        shape = ((batch * heads,) if merged else (batch, heads)) + ((dim, tokens) if swapped else (tokens, dim))
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=handle.device)

    def __init__(self, handle: Handle, swapped: bool, merged: bool, dtype: torch.dtype):
        self.handle, self.swapped, self.merged = handle, swapped, merged

    def materialize(self, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """Tokens `begin` to `end`, all by default."""
        x = self.handle.materialize(begin, end).to(self.dtype)
        x = x.flatten(0, 1) if self.merged else x
        return x.transpose(-1, -2) if self.swapped else x

    def products(self, x: torch.Tensor) -> torch.Tensor:
        """`x @ self`."""
        say_rebuilt("product", f"its own attention multiplies them, {WINDOW} tokens at a time")
        parts, tokens = [], self.handle.shape[2]
        for begin in range(0, tokens, WINDOW):
            end = min(begin + WINDOW, tokens)
            part = self.materialize(begin, end)
            parts.append(torch.matmul(x if self.swapped else x[..., begin:end], part))
        return torch.cat(parts, -1) if self.swapped else sum(parts[1:], parts[0])


def _arranged(x: Lazy) -> Arranged | None:
    return x if isinstance(x, Arranged) else Arranged(x, False, False, x.dtype) if isinstance(x, Handle) else None


def _operation(*functions):
    """Register what is done instead of torch's functions where a handle is among the arguments."""

    def register(function):
        OPERATIONS.update(dict.fromkeys(functions, function))
        return function

    return register


@_operation(torch.transpose, torch.Tensor.transpose, torch.swapaxes, torch.Tensor.swapaxes)
def _transpose(x, dim0, dim1):
    found = _arranged(x)
    if found is None or {dim0 % x.dim(), dim1 % x.dim()} != {x.dim() - 2, x.dim() - 1}:
        return NotImplemented
    return Arranged(found.handle, not found.swapped, found.merged, found.dtype)


@_operation(torch.reshape, torch.Tensor.reshape, torch.Tensor.view)
def _reshape(x, *shape):
    found, shape = _arranged(x), tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
    if found is None or found.swapped or found.merged:
        return NotImplemented
    batch, heads, tokens, dim = x.shape
    if len(shape) != 3 or shape[0] != batch * heads or shape[1] not in (-1, tokens) or shape[2] not in (-1, dim):
        return NotImplemented
    return Arranged(found.handle, False, True, found.dtype) if shape[1:] != (-1, -1) else NotImplemented


@_operation(torch.Tensor.to)
def _to(x, *args, **options):
    """Itself where nothing changes: accelerate moves inputs between layers."""
    device, dtype, *_ = torch._C._nn._parse_to(*args, **options)
    found = _arranged(x)
    if device not in (None, x.device) or (found is None and dtype not in (None, x.dtype)):
        return NotImplemented
    return x if dtype in (None, x.dtype) else Arranged(found.handle, found.swapped, found.merged, dtype)


@_operation(torch.Tensor.float)
def _float(x):
    return _to(x, torch.float32)


@_operation(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm)
def _matmul(x, y):
    found = _arranged(y)
    if found is None or isinstance(x, Lazy) or x.dim() != y.dim():
        return NotImplemented
    return found.products(x)


@_operation(torch.baddbmm, torch.Tensor.baddbmm)
def _baddbmm(x, batch1, batch2, *, beta=1, alpha=1):
    found = _arranged(batch2)
    if found is None or not found.merged or isinstance(x, Lazy) or isinstance(batch1, Lazy):
        return NotImplemented
    return beta * x + alpha * found.products(batch1) if beta else alpha * found.products(batch1)


_attend = torch.nn.functional.scaled_dot_product_attention


@_operation(_attend)
def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    handles = isinstance(key, Handle) and isinstance(value, Handle) and key.view_ is value.view_
    # Of a causal call torch counts from the first key, not from the last.
    plain = not (isinstance(query, Lazy) or dropout_p or is_causal) and query.dim() == 4
    if not (handles and plain and query.shape[2] <= MAX_STEPS and query.shape[1] % key.shape[1] == 0) or not (
        attn_mask is None or attn_mask.dim() == 4
    ):
        options = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        return _attend(*map(dense, (query, key, value)), attn_mask, dropout_p, **options)
    scoring = Scoring(query.shape[-1] ** -0.5 if scale is None else scale, causal=False)
    return key.attend(query, attn_mask, scoring).transpose(1, 2)
