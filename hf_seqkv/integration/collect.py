"""Calibrate: gather statistics of a model's keys and values on texts, fit a `SeqKVCalibration` to them."""

from __future__ import annotations

import hashlib

from tqdm.auto import tqdm

from ..calibration.artifact import FORMAT_VERSION, SeqKVCalibration
from ..calibration.fit import fit_held, fit_side
from ..calibration.layout import SIDES, sequence_tensors
from ..calibration.overlap import TENSOR as SHINGLES
from ..calibration.overlap import shingles
from ..calibration.sequence_fit import PROFILES, Ingredients, fit_sequence
from ..config import DATA_FREE
from ..errors import ConfigError
from .gather import Gathered, gather, token_windows
from .model_facts import model_facts, weights_fingerprint


def calibrate(
    model,
    tokenizer,
    texts: list[str],
    *,
    key_bits: float = DATA_FREE["key_bits"],
    value_bits: float = DATA_FREE["value_bits"],
    sequence: bool = True,
    held: float = 0.01,
    tokens: int = 32_768,
    window: int = 2048,
    seed: int = 0,
    progress: bool = True,
) -> SeqKVCalibration:
    """Fit a calibration for a causal LM.

    Args:
        model: A transformers causal LM, on any device or spread over several.
        texts: Plain texts like those the model will see; never the ones it will be judged on.
        key_bits, value_bits: Mean bits a code of hot pages, 2 to 5, quarters too.
        sequence: Whether to take gradients, which the sequence codec and held tokens need, and most of the time.
        held: Share of the tokens of hot pages that are held dense, those that their codes' errors cost most.
        tokens: Tokens to run, in windows of `window`.

    Returns:
        The calibration; equal for equal inputs and seed on one machine.

    Raises:
        ConfigError: Too little text, or bits or a share outside their range.
        UnsupportedModelError: A model whose layers cannot be coded.
    """
    for side, count in (("key", key_bits), ("value", value_bits)):
        if not 2 <= count <= 5 or count * 4 % 1:
            raise ConfigError(f"{side}_bits={count!r} is not from 2 to 5 in steps of a quarter")
    if not 0 <= held < 1:
        raise ConfigError(f"held={held!r} is not a share of the tokens from 0 to below 1; the default is 0.01")
    windows = token_windows(tokenizer, texts, tokens, window, seed)
    gathered = gather(model, windows, (key_bits, value_bits), sequence, seed, progress)
    profiles = PROFILES if sequence else {}
    made = fit(model, gathered, (key_bits, value_bits), profiles, held if sequence else 0.0, progress)
    if sequence:
        made.add_exact(gathered.sample(), gathered.rows, progress)
    made.config |= {"seed": seed, "texts_sha256": hashlib.sha256("\0".join(texts).encode()).hexdigest()}
    return made


def fit(
    model,
    gathered: Gathered,
    bits: tuple[float, float],
    profiles: dict[str, Ingredients],
    held: float,
    progress: bool,
) -> SeqKVCalibration:
    """A calibration from what was gathered; arguments as in `calibrate`, `profiles` of the sequence codec by name."""
    config = model.config.get_text_config(decoder=True)
    tensors = {SHINGLES: shingles(gathered.windows.flatten())}
    facts = {
        "format_version": FORMAT_VERSION,
        "model": model_facts(config),
        "base_model": model.config.name_or_path or None,
        "weights": weights_fingerprint(model),
        "tokens": gathered.windows.numel(),
        "window": gathered.windows.shape[1],
        "rope": gathered.layouts,
        "key_bits": bits[0],
        "value_bits": bits[1],
        "scale_bits": 8,
        "held": held,
    }
    for index in tqdm(range(len(gathered.layouts)), desc="calibrate: hot pages", unit="layer", disable=not progress):
        for side, count in zip(SIDES, bits, strict=True):
            fitted = fit_side(gathered.sides[index, side], count)
            tensors |= {f"{index}.{side}.{name}": x.contiguous() for name, x in fitted.items()}
    sample = gathered.sample() if held or profiles else None
    if held:
        weights = fit_held(sample, gathered.sensitivities, held)
        tensors |= {f"{index}.held": x for index, x in enumerate(weights)}
    if profiles:
        facts["sequence"] = {}
    for name, using in profiles.items():
        codec, report = fit_sequence(sample, gathered.sensitivities, using, progress)
        tensors |= sequence_tensors(codec, name)
        facts["sequence"][name] = {"base": codec.base, **report}
    return SeqKVCalibration(tensors, facts, f"calibration of {config.model_type}")
