"""What every attention backend computes, on what, and how a backend is chosen.

A layer's cache is `[ sinks | pages | recent ]` for every row. A *slot* counts tokens from the start of the batch, pads
included; a row's own tokens begin at its first real one, and everything of a row is aligned to that, so that its pages
do not depend on its neighbours or its padding.

`attend_codes(query, view, ...)` returns `softmax(scaling * q . k^T + mask) v` over the three parts of `view`, where
keys and values of pages are what `view.codec.decode` gives plus the constant part of the keys. `reference.py` is the
specification. The others agree with it to 2e-5 of the largest output in fp32.
"""

from __future__ import annotations

import functools
import os
import warnings
from dataclasses import dataclass

import torch

from ..codec.center import Center
from ..codec.page import PageCodec, QuantizedPageCodec
from ..errors import BackendError, SeqKVWarning


@dataclass(frozen=True)
class DenseRun:
    """Dense tokens of each row: token `j` of row `b` has slot `slots[b] + j` and counts if `begin[b] <= j`.

    Args:
        k, v: `[B, H, S, Dk]` and `[B, H, S, Dv]`, any float dtype.
        slots, begin: Lists of `B` integers.
    """

    k: torch.Tensor
    v: torch.Tensor
    slots: list[int]
    begin: list[int]


@dataclass(frozen=True)
class LayerView:
    """Snapshot of one layer's cache: what a step attends to. Nothing in it is copied.

    Args:
        codec: Of the pages.
        pages: `[B, N, page_bytes]` uint8.
        counts: Valid pages of each row, at most `N`.
        page_slots: Slot of the first token of `pages[b, 0]`.
        sinks, recent: Dense runs.
        center: Constant part of the keys of pages, or None.
        length: Slots seen, the new tokens included. Query `i` of `Tq` has slot `length - Tq + i`.
        offset: Slot of the mask's first column.
    """

    codec: PageCodec
    pages: torch.Tensor
    counts: list[int]
    page_slots: list[int]
    sinks: DenseRun
    recent: DenseRun
    center: Center | None
    length: int
    offset: int


@dataclass(frozen=True)
class Scoring:
    """How scores are made, besides the mask.

    Args:
        scaling: Factor of `q . k`.
        causal: Whether a query sees no later slot (used where no mask says so).
        window: Whether a query sees only the last `window` slots, itself included; None for all.
        softcap: `softcap * tanh(score / softcap)` before the mask; None for none.
        sink_logits: One extra logit a query head, `[Hq]`, that takes part in the softmax only; None for none.
    """

    scaling: float
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    sink_logits: torch.Tensor | None = None


@functools.cache
def _numba_missing() -> str | None:
    """Why the numba kernel cannot run here, or None."""
    threads = torch.get_num_threads()
    try:
        from . import cpu  # noqa: F401
    except ImportError as error:
        return str(error)
    finally:
        torch.set_num_threads(threads)  # numba's OpenMP pool may reset torch's count as it starts
    return None


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, SeqKVWarning, stacklevel=3)


def select_backend(name: str, codec: PageCodec, device: torch.device):
    """The `attend_codes` function of a backend.

    `"auto"` is the compiled kernel for quantised pages on a CPU, else torch; `HF_SEQKV_BACKEND` overrides it.

    Raises:
        BackendError: The backend named cannot run for this device or here.
    """
    from .reference import attend_codes as reference

    name = (os.environ.get("HF_SEQKV_BACKEND") or "auto") if name == "auto" else name
    if name not in ("auto", "reference", "cpu"):
        raise BackendError(f"backend {name!r} is not one of 'auto', 'reference', 'cpu' (see HF_SEQKV_BACKEND)")
    # Dense pages hold plain tensors: torch's own matmul is the fast path for them.
    if name == "reference" or not isinstance(codec, QuantizedPageCodec):
        return reference
    if device.type != "cpu":
        if name == "cpu":
            raise BackendError(f"backend 'cpu' cannot read pages on {device}; use 'auto' or 'reference'")
        return reference
    missing = _numba_missing()
    if missing is None:
        from .cpu import attend_codes

        return attend_codes
    if name == "cpu":
        raise BackendError(f"backend 'cpu' needs numba ({missing}): pip install numba, or use backend='reference'")
    _warn_once(f"numba cannot be imported ({missing}); attention uses the slower torch backend. pip install numba")
    return reference
