"""What a calibration depends on, read from a model's config and weights."""

from __future__ import annotations

import hashlib

import torch


def model_facts(text_config) -> dict:
    """Shape and RoPE of a decoder config, as JSON types: equal for models that can share a calibration's tensors."""
    heads = text_config.num_attention_heads
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    rope = getattr(text_config, "rope_parameters", None) or {}
    return {
        "model_type": text_config.model_type,
        "num_hidden_layers": text_config.num_hidden_layers,
        "num_key_value_heads": getattr(text_config, "num_key_value_heads", None) or heads,
        "head_dim": head_dim,
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


def weights_fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 over the key projections, in fp32: tells weights of one shape apart, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if any(part in name for part in ("k_proj", "qkv", "query_key_value", "c_attn")):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
