"""Calibrate: run a model over texts, gather statistics of its keys and values, fit a `SeqKVCalibration`.

One pass over windows of text; keys are centred as a cache centres them, by the mean of the window's first page before
RoPE. Nothing but running sums and a small sample is kept.
"""

from __future__ import annotations

import hashlib
import warnings

import torch
from tqdm.auto import tqdm
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..calibration.artifact import FORMAT_VERSION, SIDES, SeqKVCalibration
from ..calibration.fit import Moments, fit_side
from ..codec.center import rotate
from ..config import DATA_FREE
from ..errors import ConfigError, SeqKVWarning, UnsupportedModelError
from . import capture
from .cache import SeqKVCache
from .model_facts import model_facts, weights_fingerprint

SINKS = 4  # first tokens of a window: kept dense by a cache, and unlike all others
SAMPLES = 2048  # vectors a layer kept for the codebooks


class _TapLayer(DynamicLayer):
    """Stores nothing: hands keys and values on to `visit` and back to the model."""

    def __init__(self, cache: _TapCache, index: int):
        super().__init__()
        self.cache, self.index = cache, index

    def update(self, key_states, value_states, *args, **kwargs):
        self.cache.visit(self.index, key_states, value_states, self.cache.noted(self.index))
        return key_states, value_states


class _TapCache(capture.Listener, DynamicCache):
    def __init__(self, config, coded: list[int], visit):
        DynamicCache.__init__(self, config=config)
        capture.Listener.__init__(self)
        self.visit = visit
        for index in coded:
            self.layers[index] = _TapLayer(self, index)


def token_windows(tokenizer, texts: list[str], tokens: int, window: int, seed: int) -> torch.Tensor:
    """Windows of token ids, `[N, window]`, drawn without overlap from all texts.

    Raises:
        ConfigError: The texts hold less than one window.
    """
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    body = window - len(first)
    if len(ids) < body:
        raise ConfigError(f"the texts hold {len(ids)} tokens, a calibration window needs {body}; give more text")
    order = torch.randperm(len(ids) // body, generator=torch.Generator().manual_seed(seed))
    starts = order[: max(1, tokens // window)].sort().values
    if len(starts) * window < tokens:
        warnings.warn(
            f"the texts hold {len(ids)} tokens, {tokens} were asked for; more text makes a better calibration",
            SeqKVWarning,
            stacklevel=2,
        )
    return torch.tensor([first + ids[at * body : (at + 1) * body] for at in starts.tolist()])


@torch.no_grad()
def calibrate(
    model,
    tokenizer,
    texts: list[str],
    *,
    key_bits: int = DATA_FREE["key_bits"],
    value_bits: int = DATA_FREE["value_bits"],
    tokens: int = 16_384,
    window: int = 1024,
    seed: int = 0,
    progress: bool = True,
) -> SeqKVCalibration:
    """Fit a calibration for a causal LM.

    Args:
        model: A transformers causal LM, on any device or spread over several.
        texts: Plain texts like those the model will see; never the ones it will be judged on.
        key_bits, value_bits: Mean bits a code, 2 to 5.
        tokens: Tokens to run, in windows of `window`.

    Returns:
        The calibration; equal for equal inputs and seed on one machine.

    Raises:
        ConfigError: Too little text, or bits outside the range.
        UnsupportedModelError: A model whose layers cannot be coded.
    """
    bits = {"key": key_bits, "value": value_bits}
    for side, count in bits.items():
        if count not in range(2, 6):
            raise ConfigError(f"{side}_bits={count!r} is not one of 2, 3, 4, 5")
    config = model.config.get_text_config(decoder=True)
    probe = SeqKVCache(config=config, method="turboquant")  # refuses what cannot be coded
    page = probe.seqkv_config.page_size
    coded = [layer.index for layer in probe._coded()]
    if len(coded) != config.num_hidden_layers:
        raise UnsupportedModelError(
            f"{config.model_type}: {len(coded)} of {config.num_hidden_layers} layers keep keys and values; "
            "calibration needs all. Use method='turboquant'"
        )
    windows = token_windows(tokenizer, texts, tokens, window, seed)
    keep = -(-SAMPLES // len(windows))
    sides: dict[tuple[int, str], Moments] = {}
    layouts: dict[int, list] = {}

    def visit(index, k, v, noted):
        layouts[index] = [noted.layout.half, noted.layout.interleaved] if noted.layout else [0, False]
        for side, x in zip(SIDES, (_centred(k.float(), noted, page), v), strict=True):
            if (index, side) not in sides:
                sides[index, side] = Moments(x.shape[1], x.shape[3], SAMPLES, x.device)
            sides[index, side].add(x[0, :, SINKS:], keep)

    for ids in tqdm(windows, desc="calibrate: run", unit="window", disable=not progress):
        cache = _TapCache(config, coded, visit)
        capture.attach(model, cache)
        model(ids[None].to(model.device), past_key_values=cache, logits_to_keep=1)
    tensors = {}
    for index in tqdm(coded, desc="calibrate: fit", unit="layer", disable=not progress):
        for side in SIDES:
            fitted = fit_side(sides[index, side], bits[side])
            tensors |= {f"{index}.{side}.{name}": x.contiguous() for name, x in fitted.items()}
    description = {
        "format_version": FORMAT_VERSION,
        "model": model_facts(config),
        "base_model": model.config.name_or_path or None,
        "weights": weights_fingerprint(model),
        "rope": [layouts[index] for index in coded],
        "key_bits": key_bits,
        "value_bits": value_bits,
        "tokens": windows.numel(),
        "window": window,
        "seed": seed,
        "texts_sha256": hashlib.sha256("\0".join(texts).encode()).hexdigest(),
    }
    return SeqKVCalibration(tensors, description, f"calibration of {config.model_type}")


def _centred(k: torch.Tensor, noted: capture.Noted, page: int) -> torch.Tensor:
    """Keys without their constant part, the mean of the first page before RoPE; `[B, H, T, D]` fp32."""
    first = k[:, :, SINKS : SINKS + page]
    rows = noted.rows()
    if rows is None:
        return k - first.mean(2, keepdim=True)
    rows, interleaved = rows[:, None].to(k.device), noted.layout.interleaved
    mean = rotate(first, rows[:, :, SINKS : SINKS + page], interleaved, inverse=True).mean(2, keepdim=True)
    return k - rotate(mean, rows, interleaved)
