"""What a calibration depends on, read from a model's config and weights."""

from __future__ import annotations

import hashlib
import weakref

import torch

from .placement import weights
from .shards import local, shard_of, whole


def layer_configs(text_config) -> list:
    """Configs of the layers of a decoder config whose layers differ, else the config alone."""
    if getattr(text_config, "is_heterogeneous", False):
        return list(text_config.per_layer_config)
    return [text_config]


def model_facts(text_config) -> dict:
    """Shape and RoPE of a decoder config, as JSON types: equal for models that can share a calibration's tensors.

    Numbers that differ between layers (Gemma 4) are lists.
    """
    layers = layer_configs(text_config)
    heads = [layer.num_attention_heads for layer in layers]
    shapes = {
        "num_key_value_heads": [
            getattr(layer, "num_key_value_heads", None) or n for layer, n in zip(layers, heads, strict=True)
        ],
        "head_dim": [
            getattr(layer, "head_dim", None) or layer.hidden_size // n for layer, n in zip(layers, heads, strict=True)
        ],
    }
    rope = getattr(text_config, "rope_parameters", None) or {}
    return {
        "model_type": text_config.model_type,
        "num_hidden_layers": text_config.num_hidden_layers,
        **{name: values[0] if len(set(values)) == 1 else values for name, values in shapes.items()},
        "layer_types": list(getattr(text_config, "layer_types", None) or []),
        "rope": _plain(rope),
    }


def _plain(value):
    """Nested dicts and lists of JSON types, floats as they are, None left out."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in sorted(value.items(), key=lambda kv: str(kv[0])) if v is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (bool, int, float, str)) else str(value)


def model_fingerprint(model: torch.nn.Module) -> bytes:
    """32 bytes that tell apart models whose keys and values differ: all weights, their dtype, active adapters.

    Of every tensor a sample of 256 numbers is read, each time: nothing tells for sure that a weight was not written to.
    Where ranks share the model they call this together, each samples its own, and all get the same.
    """
    facts = sorted(model_facts(model.config.get_text_config(decoder=True)).items())
    # Layers of peft: which adapters are on, and how strongly, is no weight.
    adapters = [
        (name, module.active_adapters, module.disable_adapters, getattr(module, "scaling", None))
        for name, module in model.named_modules()
        if isinstance(getattr(module, "disable_adapters", None), bool)
    ]
    digest = hashlib.sha256(repr((facts, adapters)).encode())
    for name, tensor in weights(model):
        flat = local(tensor).flatten()
        sample = flat[:: max(1, flat.numel() // 256)].cpu().contiguous().view(torch.uint8)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + sample.numpy().tobytes())
    parts = shard_of(model).gather(digest.digest())
    return parts[0] if len(parts) == 1 else hashlib.sha256(b"".join(parts)).digest()


def _projects(name: str, tensor: torch.Tensor) -> bool:
    return tensor.dim() == 2 and any(part in name for part in ("attn", "attention"))


_FINGERPRINTS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def weights_fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 over a sample of the attention projections: tells weights of one shape apart.

    Rounded to bfloat16, so that a model loaded in float32 and in bfloat16 is the same. So is one that ranks share: they
    call this together, and the first time gather those weights, one at a time.
    """
    if model in _FINGERPRINTS:
        return _FINGERPRINTS[model]
    digest = hashlib.sha256()
    for name, tensor in weights(model, _projects):
        flat = whole(tensor).flatten()
        sample = flat[:: max(1, flat.numel() // 256)].to("cpu", torch.bfloat16)
        digest.update(name.encode() + sample.view(torch.int16).numpy().tobytes())
    return _FINGERPRINTS.setdefault(model, digest.hexdigest())
