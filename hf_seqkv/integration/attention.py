"""Pass-through wrappers of transformers' attention functions: a `Handle` for keys goes to the kernel, all else passes.

The registered functions are replaced in place, so no model switches its attention implementation and no mask is made
differently. A call is fused when everything in it is understood; else the handle is rebuilt as a dense tensor and the
original function runs, once said why.
"""

from __future__ import annotations

import functools
import inspect
import sys
import warnings

import torch
from transformers.modeling_utils import AttentionInterface

from ..errors import SeqKVWarning
from ..kernels.interface import Scoring
from .direct import MAX_STEPS
from .handle import Lazy, dense

WRAPPED = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
# Named arguments of attention functions that are understood, or do not change the result.
BIAS = "position_bias"  # added to the scores, as the mask is
UNDERSTOOD = {
    *("dropout", "scaling", "sliding_window", "s_aux", "softcap", "is_causal", "position_ids", "use_cache", BIAS)
}


@functools.cache
def _named(function) -> frozenset[str]:
    parameters = inspect.signature(function).parameters.values()
    return frozenset(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)


def _eager(module: torch.nn.Module):
    """The `eager_attention_forward` of the file that defines a module."""
    for base in type(module).__mro__:
        function = getattr(sys.modules.get(base.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise AttributeError(f"the file of {type(module).__name__} has no eager_attention_forward")


def _obstacle(module, function, query, key, value, mask, args, kwargs) -> str | None:
    """Why a call cannot be fused, or None."""
    unknown = [k for k, x in kwargs.items() if x is not None and k in _named(function) and k not in UNDERSTOOD]
    if args or unknown:
        return f"its attention takes {', '.join(unknown) or 'positional arguments'}"
    if type(value) is not type(key) or value.view_ is not key.view_:
        return "its values were changed after the cache"
    if kwargs.get("dropout"):
        return "attention dropout is on"
    if kwargs.get("output_attentions") or (function is _eager_or_none(module) and _wants_weights(module)):
        return "attention weights were asked for (output_attentions)"
    with torch._C.DisableTorchFunctionSubclass():  # a handle's shape by torch's function protocol is slow
        shape = key.shape
    if query.shape[1] % shape[1] or query.shape[-1] != shape[-1]:
        return f"query {tuple(query.shape)} does not fit keys {tuple(shape)}"
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 4):
        return f"its mask is a {type(mask).__name__}" + (f" of {mask.dim()} dimensions" if hasattr(mask, "dim") else "")
    if _bias(function, kwargs) is not None and mask is None and query.shape[2] > 1:
        return f"its attention takes {BIAS} without a mask"
    return None


def _eager_or_none(module):
    try:
        return _eager(module)
    except AttributeError:
        return None


def _wants_weights(module) -> bool:
    return bool(getattr(getattr(module, "config", None), "output_attentions", False))


def _scoring(module, query, mask, kwargs) -> Scoring:
    scaling = kwargs.get("scaling")
    causal = kwargs.get("is_causal")
    return Scoring(
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        causal=bool(getattr(module, "is_causal", True) if causal is None else causal),
        window=kwargs.get("sliding_window") if mask is None else None,
        softcap=kwargs.get("softcap"),
        sink_logits=kwargs.get("s_aux"),
    )


def _bias(function, kwargs):
    """The bias that a function adds; one that does not name it leaves it out."""
    return kwargs.get(BIAS) if BIAS in _named(function) else None


def _added(function, mask, kwargs):
    """What is added to the scores: the mask, with a bias where there is one."""
    bias = _bias(function, kwargs)
    if bias is None or mask is None:
        return mask if bias is None else bias
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask


_PROBED: dict = {}


def _same_as_ours(module, function, query, kwargs) -> bool:
    """Whether an eager function is plain attention with the options we know: tried on a few random tokens.

    Every model file has an eager function of its own. Comparing what it computes covers them all, today's and
    tomorrow's, without a list.
    """
    extra = [kwargs.get(name) is not None for name in ("s_aux", BIAS)]
    key = (function, query.shape[1], *extra, kwargs.get("softcap"))
    if key not in _PROBED:
        _PROBED[key] = _probe(module, function, query, kwargs)
    return _PROBED[key]


def _probe(module, function, query, kwargs) -> bool:
    from ..codec.page import DensePageCodec
    from ..kernels.interface import DenseRun, LayerView
    from ..kernels.reference import attend_codes

    groups = getattr(module, "num_key_value_groups", 1)
    heads, dim, tokens, steps = query.shape[1] // groups, query.shape[-1], 7, 2
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(query)

    q, k, v = random(1, heads * groups, steps, dim), random(1, heads, tokens, dim), random(1, heads, tokens, dim)
    mask = torch.zeros(1, 1, steps, tokens, dtype=query.dtype, device=query.device)
    mask[..., 0, -1] = torch.finfo(query.dtype).min
    kwargs = {name: x for name, x in kwargs.items() if name not in ("position_ids", "sliding_window")}
    if kwargs.get(BIAS) is not None:
        kwargs[BIAS] = random(1, heads * groups, steps, tokens)
    codec = DensePageCodec(8, heads, dim, dim, query.dtype)
    empty = DenseRun(k[:, :, :0], v[:, :, :0], [0], [0])
    pages = torch.empty(1, 0, codec.page_bytes, dtype=torch.uint8, device=query.device)
    view = LayerView(codec, pages, [0], [0], empty, DenseRun(k, v, [0], [0]), None, tokens, 0)
    try:
        with torch.no_grad():
            theirs = function(module, q, k, v, mask, **kwargs)[0]
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return False  # it needs more than these arguments
    ours = attend_codes(q, view, _added(function, mask, kwargs), _scoring(module, q, mask, kwargs))
    tolerance = 1e-4 if query.dtype == torch.float32 else 3e-2
    return theirs.shape == ours.shape and torch.allclose(theirs, ours, atol=tolerance, rtol=tolerance)


@functools.cache
def _say_why(name: str, reason: str) -> None:
    warnings.warn(
        f"{name} runs on rebuilt dense keys and values: {reason}. Correct, but neither faster nor smaller in this step",
        SeqKVWarning,
        stacklevel=4,
    )


def _wrap(original):
    """Wrapper of a registered attention function; `original=None` stands for each model's own eager one."""

    def seqkv_attention(module, query, key, value, attention_mask, *args, **kwargs):
        function = original or _eager(module)
        if not isinstance(key, Lazy):
            return function(module, query, dense(key), dense(value), attention_mask, *args, **kwargs)
        if query.shape[2] <= MAX_STEPS:
            why = _obstacle(module, function, query, key, value, attention_mask, args, kwargs)
            if why is None and original is None and not _same_as_ours(module, function, query, kwargs):
                why = "its eager attention computes more than softmax(q k) v"
            if why is None:
                scoring = _scoring(module, query, attention_mask, kwargs)
                why = key.obstacle(scoring)
            if why is None:
                return key.attend(query, _added(function, attention_mask, kwargs), scoring), None
            _say_why(type(module).__name__, why)
        return function(module, query, dense(key), dense(value), attention_mask, *args, **kwargs)

    if original is not None:
        functools.update_wrapper(seqkv_attention, original)
    seqkv_attention.original = original
    return seqkv_attention


def wrap_attention() -> None:
    """Wrap what is registered; functions already wrapped stay."""
    mapping = AttentionInterface._global_mapping
    for name in WRAPPED:
        current = mapping.get(name)
        if (current is not None or name == "eager") and not hasattr(current, "original"):
            AttentionInterface.register(name, _wrap(current))


def unwrap_attention() -> None:
    mapping = AttentionInterface._global_mapping
    for name in WRAPPED:
        current = mapping.get(name)
        if hasattr(current, "original"):
            if current.original is None:
                del mapping[name]
            else:
                AttentionInterface.register(name, current.original)
