"""Codes and scales of hot pages' payloads as arrays, and back."""

from __future__ import annotations

import numpy as np
import torch

from .exact_tables import SIDES
from .page import QuantizedPageCodec
from .vector import VectorCodec


def _sides(page: QuantizedPageCodec) -> list[tuple[str, VectorCodec]]:
    return list(zip(SIDES, (page.key, page.value), strict=True))


def open_payloads(page: QuantizedPageCodec, payloads: torch.Tensor) -> tuple[np.ndarray, ...]:
    """Codes `[N, H, D, P]` uint8 and scales as they are stored `[N, H, P]` uint16, of keys, then of values."""
    found = []
    for name, side in _sides(page):
        scales = page.section(payloads, f"{name}_scales").contiguous().numpy()
        scales = scales.view(np.uint16) if side.scale_bits == 16 else scales.astype(np.uint16)
        codes = side.unpack(page.section(payloads, f"{name}_codes")).contiguous().numpy()
        found += [codes, scales.reshape(len(payloads), side.heads, -1)]
    return tuple(found)


def blank(page: QuantizedPageCodec, count: int) -> tuple[np.ndarray, ...]:
    """As `open_payloads`, to be filled."""
    found = []
    for _, side in _sides(page):
        found += [np.zeros((count, side.heads, side.dim, side.page_size), np.uint8)]
        found += [np.zeros((count, side.heads, side.page_size), np.uint16)]
    return tuple(found)


def close_payloads(page: QuantizedPageCodec, numbers: tuple[np.ndarray, ...]) -> torch.Tensor:
    """Inverse of `open_payloads`."""
    payloads = torch.zeros(len(numbers[0]), page.page_bytes, dtype=torch.uint8)
    for i, (name, side) in enumerate(_sides(page)):
        codes, scales = numbers[2 * i : 2 * i + 2]
        stored = scales.view(np.uint8) if side.scale_bits == 16 else scales.astype(np.uint8)
        page.section(payloads, f"{name}_codes").copy_(side.pack(torch.from_numpy(codes)))
        page.section(payloads, f"{name}_scales").copy_(torch.from_numpy(stored.reshape(len(payloads), -1)))
    return payloads
