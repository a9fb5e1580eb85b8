"""Models that cache a latent and a rotary key for all heads (MLA: DeepSeek and others), read from codes.

Their `expand_kv` makes keys `[W_k c | r]` and values `W_v c` of every head from latents `c` and rotary keys `r`, in
every step of the whole history. Of a cache's handles it makes `Expanded` ones instead, which attend without that:
`[q_k | q_r] . [W_k c | r] = [W_k^T q_k | q_r] . [c | r]` and `sum p W_v c = W_v sum p c` (`kernels.latent`).
"""

from __future__ import annotations

import functools
from typing import NoReturn

import torch

from ..errors import UnsupportedModelError
from ..kernels.interface import select_backend
from ..kernels.latent import attend_latents
from .handle import Handle, Lazy
from .shards import local

METHOD = "expand_kv"


class Expanded(Lazy):
    """Keys (`side=0`) `[B, Hq, T, Dn + Dr]` or values (`side=1`) `[B, Hq, T, Dv]` of an attention module."""

    @staticmethod
    def __new__(cls, module, expand, latents: Handle, rotary: Handle, side: int):
        projection = module.kv_b_proj
        rows = len(local(projection.weight)) if type(projection) is torch.nn.Linear else projection.out_features
        heads = rows // (module.qk_nope_head_dim + module.v_head_dim)  # a rank's, where ranks share them
        width = module.v_head_dim if side else module.qk_nope_head_dim + rotary.shape[-1]
        shape = (latents.shape[0], heads, latents.shape[2], width)
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=latents.dtype, device=latents.device)

    def __init__(self, module, expand, latents: Handle, rotary: Handle, side: int):
        self.module, self.expand, self.latents, self.rotary, self.side = module, expand, latents, rotary, side
        self.view_ = latents.view_

    def materialize(self) -> torch.Tensor:
        return self.expand(self.module, self.latents.materialize(), self.rotary.materialize())[self.side]

    def obstacle(self, scoring) -> str | None:
        """As `Handle.obstacle`."""
        projection = self.module.kv_b_proj
        if type(projection) is not torch.nn.Linear or projection.weight.is_meta:
            return f"what makes keys of latents is a {type(projection).__name__} whose weights cannot be read"
        if not _is_product(self.module, self.expand, self.rotary.shape[-1]):
            return f"its {METHOD} computes more than a product"
        return None

    @torch.compiler.disable(reason="the cache's bookkeeping is Python")
    def attend(self, query, mask, scoring) -> torch.Tensor:
        """Attention over the codes, `[B, Tq, Hq, Dv]`."""
        to_keys, to_values = _weights(self.module)
        plain, turned = query.split([to_keys.shape[1], self.rotary.shape[-1]], -1)
        absorbed = torch.einsum("bhtd,hdr->bhtr", plain, to_keys)
        unpack = select_backend(self.latents.backend, self.view_.codec, self.device).unpack_pages
        mixed = attend_latents(torch.cat([absorbed, turned], -1), self.view_, mask, scoring, unpack)
        return torch.einsum("bthr,hdr->bthd", mixed.to(query.dtype), to_values)

    def __repr__(self, **kwargs):
        return f"Expanded(shape={tuple(self.shape)}, side={'kv'[self.side]!r}, dtype={self.dtype})"


def _weights(module) -> tuple[torch.Tensor, torch.Tensor]:
    """`W_k [Hq, Dn, R]` and `W_v [Hq, Dv, R]`."""
    sizes = [module.qk_nope_head_dim, module.v_head_dim]
    return local(module.kv_b_proj.weight).unflatten(0, (-1, sum(sizes))).split(sizes, 1)


_PRODUCTS: dict = {}


def _is_product(module, expand, rotary: int) -> bool:
    """Whether a model file's function makes of latents what we make of them: tried on a few random ones."""
    key = (expand, module.qk_nope_head_dim, module.v_head_dim, rotary, module.kv_b_proj.bias is None)
    if key not in _PRODUCTS:
        weight = local(module.kv_b_proj.weight)
        generator = torch.Generator().manual_seed(0)
        latents, turned = (torch.randn(1, 1, 3, n, generator=generator).to(weight) for n in (weight.shape[1], rotary))
        with torch.no_grad():
            theirs = expand(module, latents, turned)
            plain, values = (torch.einsum("btr,hdr->bhtd", latents[:, 0], w) for w in _weights(module))
        ours = torch.cat([plain, turned.expand(-1, plain.shape[1], -1, -1)], -1), values
        _PRODUCTS[key] = all(
            a.shape == b.shape and (a - b).norm() < 0.02 * a.norm() for a, b in zip(theirs, ours, strict=True)
        )
    return _PRODUCTS[key]


def refuse_calibration(family: str) -> NoReturn:
    raise UnsupportedModelError(
        f"{family} caches a latent and a rotary key for all heads (MLA), which are coded without a calibration: use "
        "method='turboquant'"
    )


def _wrap(original):
    @functools.wraps(original)
    def expand_kv(self, latents, rotary):
        if isinstance(latents, Handle) and isinstance(rotary, Handle) and latents.view_ is rotary.view_:
            return tuple(Expanded(self, original, latents, rotary, side) for side in range(2))
        return original(self, latents, rotary)

    expand_kv.original = original
    return expand_kv


_WRAPPED: set[type] = set()


def wrap_expansions(model: torch.nn.Module) -> None:
    """Wrap what makes keys and values of latents, in the classes of a model; those already wrapped stay."""
    for kind in {type(module) for module in model.modules()}:
        if METHOD in vars(kind) and kind not in _WRAPPED:
            setattr(kind, METHOD, _wrap(vars(kind)[METHOD]))
            _WRAPPED.add(kind)


def unwrap_expansions() -> None:
    for kind in _WRAPPED:
        setattr(kind, METHOD, vars(kind)[METHOD].original)
    _WRAPPED.clear()
