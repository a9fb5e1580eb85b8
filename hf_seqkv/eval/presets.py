"""Names for steps of the sequence codec, by measured divergence: how a step and its damage relate differs by model."""

from __future__ import annotations

import itertools
import math

PRESETS = {"fine": 0.0015, "balanced": 0.0044, "small": 0.018}  # nats a token, KL divergence from dense


def choose_steps(measured: dict[int, float]) -> dict[str, int]:
    """The coarsest step of each preset that stays below its divergence.

    Args:
        measured: KL divergence in nats a token at steps, two or more; on the lines between them, and on the first and
            the last beyond, the logarithm is interpolated.
    """
    points = sorted((step, math.log(max(kl, 1e-12))) for step, kl in measured.items())
    lines = list(itertools.pairwise(points))

    def expected(step: int) -> float:
        (a, low), (b, high) = next((line for line in lines if step <= line[1][0]), lines[-1])
        return low + (high - low) * (step - a) / (b - a)

    first, last = points[0][0] - 12, points[-1][0] + 12
    return {
        name: max((step for step in range(first, last + 1) if expected(step) <= math.log(kl)), default=first)
        for name, kl in PRESETS.items()
    }
