"""What a decode step of a model has to read, from its config by arithmetic: parameters and the KV cache's shape."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, SeqKVError, UnsupportedModelError

# Shapes as in the config.json of each model's Hub repository, so that they need no network.
PUBLISHED = {
    "llama-3-8b": {  # meta-llama/Meta-Llama-3-8B; 3.1 has the same
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "llama-3-70b": {  # meta-llama/Meta-Llama-3-70B; 3.1 and 3.3 have the same
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "qwen2.5-7b": {  # Qwen/Qwen2.5-7B
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
    },
    "smollm2-135m": {  # HuggingFaceTB/SmolLM2-135M-Instruct
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
}
OTHER_NAMES = {
    "hidden_size": ("n_embd", "d_model"),
    "intermediate_size": ("n_inner", "ffn_dim"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
}
# Families whose MLP is two matrices; every other one's is gated: three.
UNGATED = {"bloom", "codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "mpt", "nemotron", "opt"}
UNGATED |= {"phi", "stablelm_epoch", "starcoder2", "xglm"}
QKV_BIAS = {"qwen2", "qwen2_moe"}  # always there, no field says so


@dataclass(frozen=True)
class ModelShape:
    """Counts of parameters and the shape of the cache.

    Args:
        name: For people.
        windows: One entry a layer that keeps keys and values: the tokens it sees at most, or None for all.
        heads, kv_heads, head_dim: Of its attention.
        stored: Parameters in memory.
        always: Parameters that every step reads: all but the input embedding's table and the experts.
        moe_layers, experts, experts_per_token, expert: Layers with routed experts, experts in one, those a token is
            sent to, and the parameters of one.
        notes: What was approximated, a sentence each.
    """

    name: str
    windows: tuple[int | None, ...]
    heads: int
    kv_heads: int
    head_dim: int
    stored: int
    always: int
    moe_layers: int = 0
    experts: int = 0
    experts_per_token: int = 0
    expert: int = 0
    notes: tuple[str, ...] = ()

    def read(self, batch: int) -> float:
        """Parameters a step of `batch` tokens reads: of the experts those expected to be chosen, were all alike."""
        if not self.moe_layers:
            return self.always
        missed = (1 - self.experts_per_token / self.experts) ** batch
        return self.always + self.moe_layers * self.expert * self.experts * (1 - missed)


def load(name: str) -> ModelShape:
    """Shape of a published model by its short name, of a `config.json` or its directory, or of a Hub repository.

    Raises:
        SeqKVError: There is no such model here or on the Hub; the message names the short names.
        ConfigError: The file is not a model's config, or lacks a size.
        UnsupportedModelError: The model has no keys and values that a page could hold.
    """
    return from_config(config_of(name), name.lower() if name.lower() in PUBLISHED else name)


def config_of(name: str) -> dict:
    """Fields of a model's config, by the names that `load` takes.

    Raises:
        SeqKVError: There is no such model here or on the Hub; the message names the short names.
        ConfigError: The file is not a model's config.
    """
    short, path = name.lower(), Path(name)
    if short in PUBLISHED:
        return PUBLISHED[short]
    if path.exists():
        return _read(path / "config.json" if path.is_dir() else path)
    close = difflib.get_close_matches(short, PUBLISHED, n=1)
    if close and "/" not in name:
        raise SeqKVError(f"no model {name!r}; did you mean {close[0]!r}? {_otherwise()}")
    return _from_hub(name)


def _otherwise() -> str:
    return f"Give a config.json, its directory, a Hub repository, or one of {', '.join(PUBLISHED)}"


def _read(path: Path) -> dict:
    """A config file, with its family's defaults where transformers knows the family."""
    from transformers import AutoConfig

    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model-config {path}: {error}. {_otherwise()}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"--model-config {path} holds no JSON object. {_otherwise()}")
    try:
        return AutoConfig.for_model(**config).to_dict()
    except (TypeError, ValueError):  # no model_type, or one that this transformers does not know
        return config


def _from_hub(name: str) -> dict:
    from transformers import AutoConfig

    try:
        try:
            return AutoConfig.from_pretrained(name, local_files_only=True).to_dict()
        except OSError:
            return AutoConfig.from_pretrained(name).to_dict()
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise SeqKVError(f"no config for {name!r}: {reason}. {_otherwise()}") from error


def from_config(config: dict, name: str) -> ModelShape:
    """Shape of a decoder from its config's fields, by arithmetic alone.

    Raises:
        ConfigError: A size is missing.
        UnsupportedModelError: An encoder-decoder, latents instead of keys and values, or neither.
    """
    config = config.get("text_config") or config
    family = config.get("model_type", "model")
    if config.get("is_encoder_decoder"):
        raise UnsupportedModelError(f"{name} is an encoder-decoder ({family}); give a decoder-only model")
    if config.get("kv_lora_rank"):
        raise UnsupportedModelError(f"{name} ({family}) caches latents, not keys and values; give another model")
    size = {part: _size(config, part, name) for part in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    hidden, layers, heads = size.values()
    kv_heads = _optional(config, "num_key_value_heads") or heads
    dim = _optional(config, "head_dim") or hidden // heads
    vocabulary = _size(config, "vocab_size", name) * hidden
    windows, notes = _windows(config, layers, name)
    if not windows:
        raise UnsupportedModelError(f"{name} ({family}) has no layer that keeps keys and values; give another model")

    attention = 2 * hidden * dim * (heads + kv_heads)
    if family in QKV_BIAS or config.get("attention_bias"):
        attention += dim * (heads + 2 * kv_heads)
    matrices = 2 if family in UNGATED else 3
    inner = _optional(config, "intermediate_size") or 4 * hidden
    moe = _experts(config, layers, matrices * hidden, inner, name)
    dense_layers = layers - moe.get("moe_layers", 0)
    always = layers * (attention + 2 * hidden) + dense_layers * matrices * hidden * inner + hidden + vocabulary
    always += moe.pop("shared", 0)
    routed = moe["moe_layers"] * moe["experts"] * moe["expert"] if moe else 0
    tied = config.get("tie_word_embeddings", True)
    stored = always + routed + (0 if tied else vocabulary)
    return ModelShape(name, windows, heads, kv_heads, dim, stored, always, **moe, notes=notes)


def _experts(config: dict, layers: int, width: int, inner: int, name: str) -> dict:
    """Fields of `ModelShape` on experts, and `shared`: what all tokens read of the layers that have them."""
    experts = _optional(config, "experts")
    if not experts:
        return {}
    step, first = config.get("decoder_sparse_step") or 1, config.get("first_k_dense_replace") or 0
    plain = set(config.get("mlp_only_layers") or ())
    moe_layers = sum(i not in plain and i >= first and (i + 1) % step == 0 for i in range(layers))
    inner = _optional(config, "moe_intermediate_size") or inner
    shared = config.get("shared_expert_intermediate_size") or (config.get("n_shared_experts") or 0) * inner
    return {
        "moe_layers": moe_layers,
        "experts": experts,
        "experts_per_token": _size(config, "num_experts_per_tok", name),
        "expert": width * inner,
        "shared": moe_layers * (width * shared + _size(config, "hidden_size", name) * experts),  # with the router
    }


def _windows(config: dict, layers: int, name: str) -> tuple[tuple[int | None, ...], tuple[str, ...]]:
    window, types = _optional(config, "sliding_window"), config.get("layer_types")
    if not types:
        sliding = window and config.get("use_sliding_window", True)
        return (window if sliding else None,) * layers, ()
    if len(types) != layers:
        raise ConfigError(f"{name}: {len(types)} layer_types for {layers} layers; correct the config")
    sees = {"full_attention": None, "sliding_attention": window}
    sees["chunked_attention"] = _optional(config, "attention_chunk_size")
    others = sorted(set(types) - set(sees))
    notes = ()
    if others:
        count = sum(kind in others for kind in types)
        notes = (f"{count} layers ({', '.join(others)}) keep no keys and values; their weights counted as attention's",)
    return tuple(sees[kind] for kind in types if kind in sees), notes


def _optional(config: dict, part: str) -> int | None:
    """A size under any of its names; None where there is none, or where it differs by layer."""
    for key in (part, *OTHER_NAMES.get(part, ())):
        value = config.get(key)
        if type(value) is int and value > 0:
            return value
    return None


def _size(config: dict, part: str, name: str) -> int:
    value = _optional(config, part)
    if value is None:
        raise ConfigError(f"{name}: its config has no whole number {part!r}; give a decoder's config.json")
    return value
