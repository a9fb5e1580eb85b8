"""What calibration sees of a model: keys, values and gradients of a window of text.

A window is run in two parts, as a cache is used: the first fills it, the second attends to it. What the second part's
losses feel of the first part's cached keys and values, by automatic differentiation, is what coding them will cost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..codec.center import rotate
from . import capture
from .compat import CACHE_NAME
from .placement import module_device


@dataclass(frozen=True)
class Tap:
    """One layer's keys and values of a window.

    Args:
        keys: `[H, T, D]` fp32, as the model attends to them.
        values: `[H, T, D]` fp32.
        rows: `[T, 2 * half]` fp32, cosines and sines that made the keys, `half` 0 without RoPE.
        interleaved: How RoPE pairs components.
        gradients: Of the summed sampled losses of the second part, `[H, C, D]` each, of the first part's last `C` keys
            and values; None where they were not asked for.
    """

    keys: torch.Tensor
    values: torch.Tensor
    rows: torch.Tensor
    interleaved: bool
    gradients: tuple[torch.Tensor, torch.Tensor] | None

    def plain_keys(self) -> torch.Tensor:
        """Keys before RoPE."""
        return rotate(self.keys, self.rows, self.interleaved, inverse=True)

    def plain_gradients(self, length: int) -> list[torch.Tensor]:
        """Gradients of keys before RoPE and of values; the first part has `length` tokens."""
        keys, values = self.gradients
        half = self.rows.shape[1] // 2
        rows = self.rows[length - keys.shape[1] : length]
        transposed = torch.cat([rows[:, :half], -rows[:, half:]], 1)
        return [rotate(keys.float(), transposed, self.interleaved), values.float()]


class _TapLayer(DynamicLayer):
    """A plain layer, also where the model would use a sliding one, that keeps what it ran with."""

    def __init__(self, cache: _TapCache, index: int):
        super().__init__()
        self.cache, self.index, self.seen = cache, index, []

    def update(self, key_states, value_states, *args, **kwargs):
        self.seen.append(self.cache.noted(self.index))
        return super().update(key_states, value_states, *args, **kwargs)

    def become_leaves(self) -> list[torch.Tensor]:
        self.keys, self.values = (x.detach().requires_grad_() for x in (self.keys, self.values))
        return [self.keys, self.values]


class _TapCache(capture.Listener, DynamicCache):
    def __init__(self, config, coded: list[int]):
        DynamicCache.__init__(self, config=config)
        capture.Listener.__init__(self)
        for index in coded:
            self.layers[index] = _TapLayer(self, index)


def run_window(model, ids: torch.Tensor, coded: list[int], first: int, generator: torch.Generator | None) -> list[Tap]:
    """Run a window and return what its layers saw.

    Args:
        ids: `[T]`.
        coded: Layers to tap.
        first: Tokens of the first part.
        generator: Draws the labels of the losses, from the model's own predictions; None takes no gradients.
    """
    cache = _TapCache(model.config.get_text_config(decoder=True), coded)
    capture.attach(model, cache)
    layers = [cache.layers[index] for index in coded]
    ids = ids[None].to(module_device(model))
    with torch.no_grad():
        model(ids[:, :first], **{CACHE_NAME: cache}, logits_to_keep=1)
    gradients = [None] * len(layers)
    if generator is None:
        with torch.no_grad():
            model(ids[:, first:], **{CACHE_NAME: cache}, logits_to_keep=1)
    else:
        leaves = [x for layer in layers for x in layer.become_leaves()]
        with torch.enable_grad():
            logits = model(ids[:, first:], **{CACHE_NAME: cache}).logits[0].float()
            with torch.no_grad():
                labels = torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator)[:, 0].to(logits.device)
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        found = torch.autograd.grad(loss, leaves)
        gradients = [(k[0], v[0]) for k, v in zip(found[::2], found[1::2], strict=True)]
    return [_tap(layer, pair) for layer, pair in zip(layers, gradients, strict=True)]


def _tap(layer: _TapLayer, gradients) -> Tap:
    keys, values = (x.detach()[0].float() for x in (layer.keys, layer.values))
    rows = [noted.rows() for noted in layer.seen]
    if any(x is None for x in rows):
        return Tap(keys, values, keys.new_zeros(keys.shape[1], 0), False, gradients)
    return Tap(keys, values, torch.cat(rows, 1)[0].to(keys.device), layer.seen[0].layout.interleaved, gradients)


def embedding_rows(model, ids: torch.Tensor) -> torch.Tensor:
    """What the model makes of tokens before its first layer, `[...]` to `[..., d]` fp32 on the CPU."""
    table = model.get_input_embeddings()
    with torch.no_grad():
        return table(ids.to(module_device(table))).float().cpu()


def embed(model, ids: torch.Tensor) -> torch.Tensor:
    """Embeddings of tokens, `[...]` to `[..., d]` fp32 on the CPU, of length `sqrt(d)` as a first layer sees them."""
    found = embedding_rows(model, ids)
    return found * torch.rsqrt(found.square().mean(-1, keepdim=True) + 1e-6)
