"""What every attention backend computes, on what, and how a backend is chosen.

A layer's cache is `[ sinks | pages | recent ]` for every row. A *slot* counts tokens from the start of the batch, pads
included; a row's own tokens begin at its first real one, and everything of a row is aligned to that, so that its pages
do not depend on its neighbours or its padding.

`attend_codes(query, view, ...)` returns `softmax(scaling * q . k^T + mask) v` over the parts of `view`, where keys
and values of pages are what `view.codec.decode` gives plus the constant part of the keys. `reference.py` is the
specification; each backend's file says how closely it agrees.
"""

from __future__ import annotations

import functools
import os
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..codec.center import Center
from ..codec.page import PageCodec, QuantizedPageCodec
from ..config import BACKENDS
from ..errors import BackendError, SeqKVWarning


# What is made in every layer of every step is not frozen, here and below: to make it would take three times as long.
@dataclass(eq=False)
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


@dataclass(eq=False)
class SideTable:
    """Tokens of pages that are held dense because much depends on them: token `j` of row `b` has slot `slots[b, j]`.

    In its page such a token has a key scale of infinity, which takes it out of the page's softmax.

    Args:
        k, v: `[B, H, S, Dk]` and `[B, H, S, Dv]`, any float dtype.
        slots: `[B, S]` int64; -1 for an entry that holds nothing.
    """

    k: torch.Tensor
    v: torch.Tensor
    slots: torch.Tensor


@dataclass(eq=False)
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
        side: Tokens taken out of pages, or None.
        live: `numbers.table_of` int32 on the device, for a step that is recorded: what it holds when the step is
            replayed counts, and lists and `length` say how much there can be. None where they count.
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
    side: SideTable | None = None
    live: torch.Tensor | None = None


@dataclass(eq=False)
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


@dataclass(frozen=True)
class Backend:
    """What computes on codes.

    Args:
        name: As in `SeqKVConfig.backend`.
        attend_codes: As `reference.attend_codes`.
        encode_pages, unpack_pages: As `reference.encode_pages` and `reference.unpack_pages`.
        tolerance: Largest difference of `attend_codes` from the reference, as a part of the largest output.
    """

    name: str
    attend_codes: Callable
    encode_pages: Callable
    unpack_pages: Callable
    tolerance: float


@functools.cache
def _backend(name: str) -> Backend | str:
    """A backend, or why it cannot be imported here."""
    from .reference import attend_codes, encode_pages, unpack_pages

    threads, tolerance = torch.get_num_threads(), 0.0
    try:
        if name == "cpu":
            from . import cpu

            attend_codes, encode_pages, tolerance = cpu.attend_codes, cpu.encode_pages, cpu.tolerance()
        elif name == "triton":
            from .triton_attend import TOLERANCE as tolerance
            from .triton_attend import attend_codes
            from .triton_pages import encode_pages, unpack_pages
    except ImportError as error:
        package = {"cpu": "numba", "triton": "triton"}[name]
        return f"{package} cannot be imported ({error}): pip install {package}"
    finally:
        torch.set_num_threads(threads)  # numba's OpenMP pool may reset torch's count as it starts
    return Backend(name, attend_codes, encode_pages, unpack_pages, tolerance)


def _obstacle(name: str, codec: PageCodec, device: torch.device) -> str | None:
    """Why a compiled backend cannot read these pages, or None."""
    if (device.type == "cpu") != (name == "cpu"):
        return f"it cannot read pages on {device}"
    if isinstance(_backend(name), str):
        return _backend(name)
    if name == "triton":
        from .triton_attend import supports

        nvidia = torch.cuda.is_available() and torch.version.hip is None
        if nvidia and torch.cuda.get_device_capability(device) < (8, 0):
            return "the Triton kernels need compute capability 8.0 (Ampere)"
        return supports(codec)
    return None


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, SeqKVWarning, stacklevel=4)


_CHOSEN: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _choose(name: str, codec: PageCodec, device: torch.device) -> Backend:
    if name not in BACKENDS:
        raise BackendError(f"backend {name!r} is not one of {', '.join(map(repr, BACKENDS))} (see HF_SEQKV_BACKEND)")
    # Dense pages hold plain tensors: torch's own matmul is the fast path for them.
    wanted = "reference" if not isinstance(codec, QuantizedPageCodec) else name
    if wanted == "auto":
        wanted = "cpu" if device.type == "cpu" else "triton"
    why = None if wanted == "reference" else _obstacle(wanted, codec, device)
    if why is None:
        return _backend(wanted)
    if name != "auto":
        raise BackendError(f"backend {name!r}: {why}; use 'auto' or 'reference'")
    _warn_once(f"the {wanted} kernel is not used: {why}. Attention uses the slower torch backend")
    return _backend("reference")


def select_backend(name: str, codec: PageCodec, device: torch.device) -> Backend:
    """The backend for a codec's pages on a device.

    `"auto"` is a compiled kernel for quantised pages, numba's on a CPU and Triton's elsewhere; it is torch where that
    cannot be had, and says why once. `HF_SEQKV_BACKEND` overrides it.

    Raises:
        BackendError: The backend named cannot run for this codec, for this device or here.
    """
    name = (os.environ.get("HF_SEQKV_BACKEND") or "auto") if name == "auto" else name
    chosen = _CHOSEN.setdefault(codec, {})  # asked for in every layer of every step
    backend = chosen.get((name, device))
    if backend is None:
        backend = chosen[name, device] = _choose(name, codec, device)
    return backend
