"""Tokens of pages that are held dense because much depends on them: about one in a hundred, in bf16.

In its page such a token is vacated; a step's attention reads it from here. What decides is a calibrated score of the
token's own keys and values, so that a row's choice does not depend on its neighbours.
"""

from __future__ import annotations

import torch

from ..codec.center import rotate
from ..codec.importance import features
from ..kernels.interface import SideTable
from .shards import Shard

_PARKED = -2  # slot `s` is stored as `_PARKED - s` while its token is in the dense window, after a crop


def important(weights: torch.Tensor, k, v, rows, interleaved: bool, positions, shard: Shard) -> torch.Tensor:
    """Tokens of pages whose score is above 0, `[B, N, P]` bool.

    Args:
        weights: Of `codec.importance.features`, `[F]`.
        k, v: `[B, N, H, P, D]`, keys after RoPE.
        rows: Cosines and sines of the tokens, `[B, N * P, 2 * half]`.
        positions: `[B, N * P]`.
        shard: Of the layer's heads: what all ranks see of a token counts, so that all hold the same ones.
    """
    shape = (len(k), k.shape[1], k.shape[3])
    plain = rotate(k.float(), rows.unflatten(1, shape[1:])[:, :, None], interleaved, inverse=True)
    tokens = [x.transpose(2, 3).flatten(0, 2) for x in (plain, v.float())]  # [B * N * P, H, D]
    return (shard.sum(features(*tokens, positions.flatten()) @ weights) > 0).view(shape)


class HeldTokens:
    """Held tokens of one layer: `counts[b]` of row `b`, in the order in which their pages were made.

    A table that was handed out stays as it was: the step that makes a page still attends to what was there before.
    So `slots` is replaced and never written to, and of `k` and `v` only what no slot tells of.

    Args:
        k, v: Tensors like the layer's keys `[B, H, ?, Dk]` and values `[B, H, ?, Dv]`.
    """

    def __init__(self, k: torch.Tensor, v: torch.Tensor):
        self.k, self.v = (x.new_empty(*x.shape[:2], 0, x.shape[3], dtype=torch.bfloat16) for x in (k, v))
        self.slots = torch.full((k.shape[0], 0), -1, dtype=torch.int64, device=k.device)
        self.counts = [0] * k.shape[0]

    def add(self, row: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, chosen: torch.Tensor) -> None:
        """Hold those `chosen [n]` of the tokens `k [H, n, Dk]`, `v [H, n, Dv]` at `slots [n]` of a row."""
        at = chosen.nonzero()[:, 0]
        if len(at) == 0:
            return
        k, v, slots = k[:, at], v[:, at], slots[at]
        begin, end = self.counts[row], self.counts[row] + len(slots)
        if end > self.slots.shape[1]:
            self._grow(2 * end)
        self.slots = self.slots.clone()
        self.k[row, :, begin:end], self.v[row, :, begin:end], self.slots[row, begin:end] = k, v, slots
        self.counts[row] = end

    def _grow(self, room: int) -> None:
        for name in ("k", "v"):
            old = getattr(self, name)
            grown = old.new_zeros(*old.shape[:2], room, old.shape[3])
            grown[:, :, : old.shape[2]] = old
            setattr(self, name, grown)
        slots = self.slots.new_full((len(self.slots), room), -1)
        slots[:, : self.slots.shape[1]] = self.slots
        self.slots = slots

    def table(self) -> SideTable | None:
        """What a step reads; None where nothing is held."""
        most = max(self.counts)
        return SideTable(self.k[:, :, :most], self.v[:, :, :most], self.slots[:, :most]) if most else None

    def between(self, row: int, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens of a row at slots `begin` to `end`: slots `[n]`, keys `[H, n, Dk]` and values `[H, n, Dv]` bf16."""
        slots = self._slots(row)
        at = ((slots >= begin) & (slots < end)).nonzero()[:, 0]
        return slots[at], self.k[row][:, at], self.v[row][:, at]

    def keep(self, row: int, begin: int, end: int) -> None:
        """Forget tokens of a row outside slots `begin` to `end`."""
        count = self.counts[row]
        slots = self._slots(row)
        stay = ((slots >= begin) & (slots < end)).nonzero()[:, 0]
        if len(stay) < count:
            for name in ("k", "v"):
                held = getattr(self, name).clone()
                held[row, :, : len(stay)] = held[row][:, stay]
                setattr(self, name, held)
            self.slots = self.slots.clone()
            self.slots[row, : len(stay)] = self.slots[row, stay]
            self.slots[row, len(stay) :] = -1
            self.counts[row] = len(stay)

    def park(self, row: int, begin: int) -> None:
        """Count tokens of a row from slot `begin` on as not held: they are in the dense window, pages end before them.

        They are held again once `begin` has moved behind them.
        """
        if self.counts[row]:
            slots = self._slots(row)
            self.slots = self.slots.clone()
            self.slots[row, : self.counts[row]] = torch.where(slots >= begin, _PARKED - slots, slots)

    def _slots(self, row: int) -> torch.Tensor:
        slots = self.slots[row, : self.counts[row]]
        return torch.where(slots <= _PARKED, _PARKED - slots, slots)

    def select(self, index: torch.Tensor) -> None:
        """Keep rows of the batch by index, with repetition."""
        at = index.to(self.k.device)
        self.k, self.v, self.slots = self.k[at], self.v[at], self.slots[at]
        self.counts = [self.counts[i] for i in index.tolist()]

    def bytes(self) -> tuple[int, int]:
        """Bytes of held tokens with their slots, and of room for more."""
        token = sum(x.shape[1] * x.shape[3] * x.element_size() for x in (self.k, self.v)) + self.slots.element_size()
        used = token * sum(self.counts)
        return used, token * self.slots.numel() - used
