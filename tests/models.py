"""Tiny random models, one for each mechanism of attention that the cache has to survive."""

import functools

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from hf_seqkv.store.prefix_store import PrefixStore

VOCABULARY = 131
_BASE = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCABULARY,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
CONFIGS = {
    "llama": lambda: LlamaConfig(**_BASE),
    "qwen2": lambda: Qwen2Config(**_BASE),
    "qwen3": lambda: Qwen3Config(**_BASE, head_dim=16),
    "mistral-window": lambda: MistralConfig(**_BASE, sliding_window=24),
    "gemma3": lambda: Gemma3TextConfig(**_BASE | {"num_hidden_layers": 7}, head_dim=16, sliding_window=24),
    "gpt-neox": lambda: GPTNeoXConfig(**_BASE, rotary_pct=0.5),
    "gpt2": lambda: GPT2Config(
        n_embd=64, n_layer=3, n_head=4, n_positions=512, vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1,
        eos_token_id=None,
    ),
}  # fmt: skip
# Pages of 8 tokens and a window of 8: everything fills and slides within a few dozen tokens.
SMALL = {"page_size": 8, "residual_length": 8}
LOSSLESS = {"method": "dense", **SMALL}


@functools.cache
def tiny(name: str):
    """A model of `CONFIGS`, the same weights in every test."""
    torch.manual_seed(0)
    config = CONFIGS[name]()
    config.initializer_range = 0.3  # scores that differ: a wrong mask or position changes the argmax
    return AutoModelForCausalLM.from_config(config).eval()


def prompt(rows: int = 1, tokens: int = 45, pads: tuple[int, ...] = ()) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids and their attention mask, row `i` left-padded by `pads[i]`."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads):
        ids[row, :count], mask[row, :count] = 0, 0
    return ids, mask


class Unmeasured(PrefixStore):
    """A store that loads what it has: it never finds out that a tiny model's prefill is faster."""

    def note_rate(self, *args, **options) -> None:
        pass
