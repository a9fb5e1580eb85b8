"""Whether two texts share passages: a calibration text may never be an evaluation text.

A text is known by a sample of its shingles, runs of `LENGTH` consecutive token ids. The hash of a shingle decides
whether it is in the sample (one in `KEEP` is), so that a passage leaves the same traces wherever it stands, and a
calibration carries 8 bytes for every `KEEP` tokens of its texts, not the texts.

The hash is fixed, since calibrations store it: with ids `t0 ... t15`,

    h = (t0 + 1) M^15 + (t1 + 1) M^14 + ... + (t15 + 1)  mod 2^64,   hash = h xor (h >> 32)

Source: Broder, "On the resemblance and containment of documents", 1997.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

LENGTH, KEEP = 16, 32
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # M: odd, its bits without pattern
TENSOR = "texts.shingles"  # a calibration's tensor with the shingles of its texts


def shingles(ids: Sequence[int] | torch.Tensor) -> torch.Tensor:
    """Sampled hashes of a text's token ids `[T]`: int64 (the hash's 64 bits), sorted, each once."""
    tokens = np.asarray(ids, dtype=np.int64).astype(np.uint64) + np.uint64(1)
    count = max(0, len(tokens) - LENGTH + 1)
    hashed = np.zeros(count, np.uint64)
    for at in range(LENGTH):
        hashed = hashed * MULTIPLIER + tokens[at : at + count]
    hashed ^= hashed >> np.uint64(32)
    return torch.from_numpy(np.unique(hashed[hashed % np.uint64(KEEP) == 0].view(np.int64)))


def overlap(known: torch.Tensor, text: torch.Tensor) -> float:
    """Share of the shingles of `text` that are among those `known`; 0 where `text` has none."""
    return torch.isin(text, known).double().mean().item() if len(text) else 0.0
