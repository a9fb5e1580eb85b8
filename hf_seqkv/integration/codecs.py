"""Calibrations and the codecs they give, made once: every `generate` has a new cache, and making them takes seconds."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TypeVar

import torch

from ..calibration.artifact import SeqKVCalibration
from ..calibration.hub import TENSORS_NAME
from ..codec.page import DensePageCodec, PageCodec, QuantizedPageCodec
from ..codec.vector import VectorCodec
from ..config import SeqKVConfig
from .shards import Shard

T = TypeVar("T")


def calibration_of(option: str | Path | SeqKVCalibration) -> SeqKVCalibration:
    """A calibration from what an option holds: itself, a directory or a repository; the last two are read once.

    Raises:
        CalibrationNotFoundError, FormatError: See `SeqKVCalibration.from_pretrained`.
    """
    if isinstance(option, SeqKVCalibration):
        return option
    file = Path(option, TENSORS_NAME)
    return _read(str(option), file.stat().st_mtime_ns) if file.is_file() else SeqKVCalibration.from_pretrained(option)


@functools.lru_cache(maxsize=2)
def _read(directory: str, written: int) -> SeqKVCalibration:
    return SeqKVCalibration.from_pretrained(directory)


class _Nobody:
    """Owner of codecs that need no calibration."""


_NOBODY = _Nobody()
_MADE: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def kept(calibration, key: Hashable, make: Callable[[], T]) -> T:
    """What `make` made for a calibration, or for none, under a key; kept as long as the calibration lives."""
    made = _MADE.setdefault(calibration or _NOBODY, {})
    if key not in made:
        made[key] = make()
    return made[key]


def page_codec(
    config: SeqKVConfig,
    calibration,
    index: int,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    value_bits: int | None,
    shard: Shard,
) -> PageCodec:
    """Page codec of layer `index`, whose tokens have a shape of KV heads, key and value components, on the CPU.

    Args:
        dtype: Of dense pages.
        value_bits: Of codes that need no calibration, where keys have `config.key_bits`.
        shard: Whose heads they are.
    """
    heads, *dims = shape
    if config.method == "dense":
        return DensePageCodec(config.page_size, *shape, dtype)
    if config.method == "calibrated":
        size = (index, *shape, config.page_size, shard.rank, shard.ranks)
        return kept(calibration, size, lambda: calibration.page_codec(*size))
    same = {name: getattr(config, name) for name in ("rotation", "codebook", "scale", "scale_bits", "seed")}
    sides = zip(dims, (config.key_bits, value_bits), strict=True)
    return QuantizedPageCodec(
        *(VectorCodec.data_free(heads, dim, config.page_size, bits=bits, **same) for dim, bits in sides)
    )
