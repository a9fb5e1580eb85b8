"""Published ways to quantise a cache, as page codecs with their real bytes: the baselines of `bench quality`.

Both quantise groups of values to integers between a group's minimum and maximum, and store the step and the minimum of
each in fp16. They differ in what a group is:

- KIVI: a key group is one component (channel) of 32 consecutive tokens, keys as the cache is given them, after RoPE;
  a value group is 32 components of one token. Source: Liu et al., arXiv 2402.02750.
- int4 per token: 64 components of one token, keys and values.

A page's sections are the codes of keys, their steps and minima, and the same of values.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from ..codec import packing
from ..codec.page import PageCodec
from ..integration.cache import SeqKVCache

HALF = torch.finfo(torch.float16)
SMALLEST = 2.0**-24  # of fp16's positive numbers: the step of a group of equal values


@dataclass(frozen=True)
class Groups:
    """How the keys or the values of a page are quantised.

    Args:
        bits: Of a code.
        size: Values a group, of one head; the last group of a run is shorter where it does not divide.
        along: `"tokens"` (values of one component) or `"components"` (values of one token).
    """

    bits: int
    size: int
    along: str

    def runs(self, tokens: int, dim: int) -> tuple[int, int, int]:
        """Runs of values that are cut into groups, values a run, and groups a run, for one head."""
        count, length = (dim, tokens) if self.along == "tokens" else (tokens, dim)
        return count, length, -(-length // self.size)

    def _to_runs(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., P, D]` to runs `[..., count, length]`; its own inverse."""
        return x.transpose(-1, -2) if self.along == "tokens" else x

    def _spread(self, of_groups: torch.Tensor, length: int) -> torch.Tensor:
        """Every value's own: `[..., groups]` to `[..., length]`."""
        return of_groups.float()[..., torch.arange(length, device=of_groups.device) // self.size]

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Bytes of the codes and of the steps and minima of `x [..., H, P, D]`.

        Codes are rounded with the step and the minimum as stored; a minimum beyond fp16's range saturates.
        """
        runs = self._to_runs(x.float())
        groups = runs.split(self.size, -1)
        low, high = (torch.stack([f(g, -1) for g in groups], -1) for f in (torch.amin, torch.amax))
        low = low.clamp(HALF.min, HALF.max).half()
        step = ((high - low.float()) / (2**self.bits - 1)).clamp(SMALLEST, HALF.max).half()
        low_each, step_each = (self._spread(t, runs.shape[-1]) for t in (low, step))
        codes = ((runs - low_each) / step_each).round().clamp(0, 2**self.bits - 1).to(torch.uint8)
        return packing.pack(codes.flatten(-3), self.bits), torch.stack([step, low], -1).flatten(-4).view(torch.uint8)

    def decode(self, codes: torch.Tensor, scales: torch.Tensor, heads: int, tokens: int, dim: int) -> torch.Tensor:
        """Inverse of `encode`, fp32 `[..., H, P, D]`."""
        count, length, groups = self.runs(tokens, dim)
        codes = packing.unpack(codes, self.bits).unflatten(-1, (heads, count, length))
        scales = scales.contiguous().view(torch.float16).unflatten(-1, (heads, count, groups, 2))
        step, low = (self._spread(t, length) for t in scales.unbind(-1))
        return self._to_runs(codes * step + low)


class GroupCodec(PageCodec):
    """Pages of grouped integers.

    Args:
        key, value: How each side is quantised.
    """

    kind = 0xFFFF  # no kind of the stored format: a cache only measures with these

    def __init__(self, key: Groups, value: Groups, page_size: int, heads: int, key_dim: int, value_dim: int):
        self.sides = {"key": (key, key_dim), "value": (value, value_dim)}
        sizes = {}
        for name, (groups, dim) in self.sides.items():
            count, _, parts = groups.runs(page_size, dim)
            sizes[f"{name}_codes"] = heads * page_size * dim * groups.bits // 8
            sizes[f"{name}_scales"] = heads * count * parts * 2 * 2  # two fp16 numbers a group
        super().__init__(page_size, heads, key_dim, value_dim, sizes)
        self.fingerprint = hashlib.sha256(repr((key, value)).encode()).digest()[:16]
        self.tables: list[torch.Tensor] = []

    def encode(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """`k [..., H, P, Dk]`, `v [..., H, P, Dv]` to `[..., page_bytes]` uint8."""
        parts = {}
        for (name, (groups, _)), x in zip(self.sides.items(), (k, v), strict=True):
            parts[f"{name}_codes"], parts[f"{name}_scales"] = groups.encode(x)
        return self._assemble(**parts)

    def coordinates(self, pages: torch.Tensor, side: int) -> torch.Tensor:
        """Keys (`side=0`) or values, `[..., H, P, D]` fp32."""
        name, (groups, dim) = list(self.sides.items())[side]
        parts = (self.section(pages, f"{name}_{part}") for part in ("codes", "scales"))
        return groups.decode(*parts, self.heads, self.page_size, dim)

    def splice(self, old: torch.Tensor, new: torch.Tensor, keep: int) -> torch.Tensor:
        """Page of the first `keep` tokens of `old` and the rest of `new`, quantised again: groups span tokens."""
        parts = zip(self.decode(old), self.decode(new), strict=True)
        return self.encode(*(torch.cat([o[..., :keep, :], n[..., keep:, :]], -2) for o, n in parts))


# name -> groups of keys, groups of values
PEERS = {
    **{f"kivi-{bits}": (Groups(bits, 32, "tokens"), Groups(bits, 32, "components")) for bits in (2, 4)},
    "int4": (Groups(4, 64, "components"), Groups(4, 64, "components")),
}


class PeerCache(SeqKVCache):
    """A `SeqKVCache` whose pages are a peer's.

    Args:
        config: The model's config.
        peer: A name in `PEERS`.
        **kept: `n_sink`, `residual_length` and `page_size`, as in `SeqKVConfig`.
    """

    def __init__(self, config, peer: str, **kept):
        self.groups = PEERS[peer]
        bits = {f"{side}_bits": groups.bits for side, groups in zip(("key", "value"), self.groups, strict=True)}
        super().__init__(config, center_keys=False, **bits, **kept)

    def codec(self, index: int, heads: int, key_dim: int, value_dim: int, dtype, device) -> GroupCodec:
        """Page codec of a layer; layers of one shape share one."""
        shape = (heads, key_dim, value_dim)
        if shape not in self._codecs:
            self._codecs[shape] = GroupCodec(*self.groups, self.seqkv_config.page_size, *shape)
        return self._codecs[shape]
