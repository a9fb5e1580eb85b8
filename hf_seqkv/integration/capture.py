"""What a cache's `update()` is not given: the attention mask (where a row begins), the model's cosines and sines, ids.

A forward-pre-hook on every attention module notes the first two for the layer that is about to run, and one on the
model without its head the token ids. The hooks are put on a model the first time it is used with a `SeqKVCache`, do
nothing for any other cache, and `uninstall()` removes them.
"""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from dataclasses import dataclass

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedModel

from ..codec.center import rotate


@dataclass(frozen=True)
class RopeLayout:
    """How a model file lays out RoPE: pairs of neighbours or halves, and which columns of cos and sin to read."""

    half: int
    interleaved: bool
    columns: slice


@dataclass(eq=False)
class Noted:
    """One forward of one layer; everything is None where nothing was captured.

    Args:
        mask: `[B or 1, 1 or Hq, Tq, >= kv length]`, bool or additive.
        cos, sin: `[B or 1, Tq, width]` as the model passes them.
        layout: How to read them; None where the layer has no RoPE that is understood.
    """

    mask: torch.Tensor | None = None
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    layout: RopeLayout | None = None

    @property
    def source(self):
        """The object that tells one forward from the next; shared by all layers with the same RoPE."""
        return None if self.layout is None else self.cos

    def rows(self) -> torch.Tensor | None:
        """`[cos | sin]`, `[B or 1, Tq, 2 * half]` fp32."""
        if self.layout is None:
            return None
        return torch.cat([x[..., self.layout.columns].float() for x in (self.cos, self.sin)], -1)

    def first_tokens(self, start: list[int], length: int, offset: int, new: int) -> list[int]:
        """First real slot of each row once `new` tokens follow `length` held ones.

        A row is still in its padding while no token of it was seen; there, a slot that not even its own query sees
        is padding.
        """
        if self.mask is None or not isinstance(self.mask, torch.Tensor) or self.mask.dim() != 4:
            return start
        if all(s < length for s in start) or self.mask.shape[-1] < length - offset + new:
            return start
        own = self.mask[:, 0].diagonal(length - offset, -2, -1)[:, :new]
        if own.dtype == torch.bool:
            begun = next((row for row, s in enumerate(start) if s < length), None)
            last = self.mask[:, 0, 0, length - offset + new - 1]  # as the first new token sees it
            seen = ~own if _hides(own, last, begun) else own
        else:
            seen = own > torch.finfo(own.dtype).min / 2
        pads = [next((i for i, x in enumerate(row) if x), new) for row in seen.tolist()]
        return [s if s < length else s + pads[min(row, len(pads) - 1)] for row, s in enumerate(start)]


NOTHING = Noted()


def _hides(own: torch.Tensor, last: torch.Tensor, begun: int | None) -> bool:
    """Whether a mask of bools says what is hidden, as in MPT, instead of what is seen.

    Args:
        own: What it says of each new token and itself, `[B or 1, Tq]`.
        last: What it says of the first new token and the last, `[B or 1]`.
        begun: A row that holds tokens: each of its new ones sees itself.
    """
    if begun is not None:
        return not own[min(begun, len(own) - 1), -1]
    if own.shape[1] == 1:
        return not own.any()
    # Seen ahead is only what is no padding, and what is no padding sees itself.
    return bool(last.all() and not own[:, -1].all())


@functools.cache
def _rope_function(module_type: type):
    """`apply_rotary_pos_emb` of the file a module class (or a base of it) comes from, or None."""
    for base in module_type.__mro__:
        function = getattr(sys.modules.get(base.__module__), "apply_rotary_pos_emb", None)
        if function is not None:
            return function
    return None


_LAYOUTS: dict = {}


def rope_layout(module: torch.nn.Module, cos: torch.Tensor, sin: torch.Tensor) -> RopeLayout | None:
    """Find the layout by trying the model file's own function on a random vector; None where no known one fits."""
    function, width = _rope_function(type(module)), cos.shape[-1]
    dim = getattr(module, "head_dim", width)
    key = (function, width, dim)
    if function is None or not isinstance(dim, int):
        return None
    if key not in _LAYOUTS:
        _LAYOUTS[key] = _probe_layout(function, width, dim)
    return _LAYOUTS[key]


def _probe_layout(function, width: int, dim: int) -> RopeLayout | None:
    generator = torch.Generator().manual_seed(0)
    angles = torch.rand(1, 3, width, generator=generator)
    whole, half = slice(None), slice(width // 2)
    repeats = [
        (angles, whole, width),
        (torch.cat([angles[..., half]] * 2, -1), half, width // 2),
        (angles[..., half].repeat_interleave(2, -1), slice(0, None, 2), width // 2),
    ]
    for size in dict.fromkeys((dim, width)):
        x = torch.randn(1, 1, 3, size, generator=generator)
        for table, columns, pairs in repeats:
            if 2 * pairs > size or pairs == 0:
                continue
            try:
                with torch.no_grad():
                    expected = function(x, x, table.cos(), table.sin())[1]
            except (RuntimeError, TypeError, ValueError, IndexError):
                continue  # a function of another shape or signature: not a layout we know
            rows = torch.cat([table.cos()[..., columns], table.sin()[..., columns]], -1)[:, None]
            for interleaved in (False, True):
                if expected.shape == x.shape and torch.allclose(rotate(x, rows, interleaved), expected, atol=1e-5):
                    return RopeLayout(pairs, interleaved, columns)
    return None


class Listener:
    """A cache that wants to know what its layers run with."""

    def __init__(self):
        self._noted: dict[int, Noted] = {}

    def note_ids(self, ids: torch.Tensor | None) -> None:
        """Called before a forward with its token ids `[B, Tq]`, None where it was given anything else to cache."""

    def after_forward(self, hidden: torch.Tensor | None) -> None:
        """Called after a forward with the last layer's normed output `[B, Tq, d]`, None where there is none."""

    def note(self, index: int, noted: Noted) -> None:
        """Called before layer `index` runs."""
        self._noted.pop(index, None)
        self._noted[index] = noted

    def noted(self, index: int) -> Noted:
        """What was noted for the forward that is running, once.

        A module that runs several layers of a cache in turn (recurrent depth) notes all under its own index: the last
        note is that of the module that runs.
        """
        if index not in self._noted and self._noted:
            index = next(reversed(self._noted))
        return self._noted.pop(index, NOTHING)


def _note(module: torch.nn.Module, cache: Listener, attention_mask, position_embeddings) -> None:
    cos = sin = layout = None
    if isinstance(position_embeddings, tuple) and len(position_embeddings) == 2:
        cos, sin = position_embeddings
        if cos.dim() == 3 and cos.is_floating_point():
            layout = rope_layout(module, cos, sin)
    cache.note(module.layer_idx, Noted(attention_mask, cos, sin, layout))


def _listener(args, kwargs) -> Listener | None:
    """The cache that a module is called with, whatever the module calls it."""
    for x in (*kwargs.values(), *args):
        if isinstance(x, Listener):
            return x
    return None


def _before_attention(module, args, kwargs):
    cache = _listener(args, kwargs)
    if cache is not None:
        _note(module, cache, kwargs.get("attention_mask"), kwargs.get("position_embeddings"))


# Inputs of a model beside its ids of which what it caches is no function, or one that the cache itself tells.
_PLAIN = {"input_ids", "attention_mask", "position_ids", "cache_position"}
_TOLD = (Listener, bool, int, float, str)


def _before_model(names: tuple[str, ...], module, args, kwargs):
    cache = _listener(args, kwargs)
    if cache is not None:
        given = dict(zip(names, args, strict=False)) | kwargs
        more = {name for name, x in given.items() if not (x is None or isinstance(x, _TOLD))}
        cache.note_ids(given.get("input_ids") if more <= _PLAIN else None)


def _after_model(module, args, kwargs, output):
    cache = _listener(args, kwargs)
    if cache is not None:
        cache.after_forward(getattr(output, "last_hidden_state", None))


_ATTACHED: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_WAITING: weakref.WeakSet = weakref.WeakSet()
_FIRST_CALL = None


def attach(model: torch.nn.Module, cache) -> None:
    """Hook the attention modules of the model that uses a cache; a second call does nothing."""
    _WAITING.discard(cache)
    # Without its head: a hook that is put on a module while it is called is not part of that call.
    model = getattr(model, "base_model", model)
    if model not in _ATTACHED:
        modules = [m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int)]
        _forget_copies([*modules, model])
        handles = [m.register_forward_pre_hook(_before_attention, with_kwargs=True) for m in modules]
        names = tuple(inspect.signature(model.forward).parameters)
        handles.append(model.register_forward_pre_hook(functools.partial(_before_model, names), with_kwargs=True))
        handles.append(model.register_forward_hook(_after_model, with_kwargs=True))
        _ATTACHED[model] = handles


def _forget_copies(modules: list[torch.nn.Module]) -> None:
    """Remove hooks that a copy of a hooked model took along: what is noted twice counts twice."""
    for module in modules:
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
                del hooks[key]


def _is_ours(hook) -> bool:
    return getattr(hook, "func", hook) in (_before_attention, _before_model, _after_model)


_COLLECTING = "transformers.utils.output_capturing"  # hooks that put hidden states into a forward's output


def foreign_hook(model: torch.nn.Module) -> str | None:
    """The kind of a module that a hook of neither this package nor transformers sees run, or None."""
    for module in model.modules():
        hooks = *module._forward_pre_hooks.values(), *module._forward_hooks.values()
        if not all(_is_ours(hook) or getattr(hook, "__module__", None) == _COLLECTING for hook in hooks):
            return type(module).__name__
    return None


def detach_all() -> None:
    """Remove every hook."""
    global _FIRST_CALL
    for handles in _ATTACHED.values():
        for handle in handles:
            handle.remove()
    _ATTACHED.clear()
    _WAITING.clear()
    if _FIRST_CALL is not None:
        _FIRST_CALL.remove()
        _FIRST_CALL = None


def attach_on_first_call(cache) -> None:
    """Hook the model that `cache` was made for when it is first called: the cache knows only its config object.

    Until then one global hook compares configs; it is gone as soon as no cache waits.
    """
    global _FIRST_CALL
    _WAITING.add(cache)
    if _FIRST_CALL is None:
        _FIRST_CALL = register_module_forward_pre_hook(_on_any_call)


def _on_any_call(module, args) -> None:
    global _FIRST_CALL
    if isinstance(module, PreTrainedModel):
        configs = (module.config, module.config.get_text_config(decoder=True))
        for cache in [c for c in _WAITING if any(c.model_config is config for config in configs)]:
            cache.bind(module)
    if not _WAITING and _FIRST_CALL is not None:
        _FIRST_CALL.remove()
        _FIRST_CALL = None
