"""Calibrations and the codecs they give, made once: every `generate` has a new cache, and making them takes seconds."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TypeVar

from ..calibration.artifact import SeqKVCalibration
from ..calibration.hub import TENSORS_NAME

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
