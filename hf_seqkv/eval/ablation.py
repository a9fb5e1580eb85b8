"""What each ingredient of the sequence codec is worth: it is left out, and the rate at equal divergence compared."""

from __future__ import annotations

import math

import torch

from ..calibration.sequence_fit import Ingredients
from ..integration.collect import fit
from ..integration.gather import gather, token_windows
from ..integration.sequence_pages import SequencePages
from . import quality

TURNED = "keys after RoPE"
VARIANTS = {
    "everything": Ingredients(),
    TURNED: Ingredients(),
    "no prediction": Ingredients(prediction=False),
    "prediction from all inputs": Ingredients(chosen=False),
    "squared error for a metric": Ingredients(metric=False),
    "heads apart": Ingredients(heads=False),
    "no transform along tokens": Ingredients(tokens=False),
    "no refined tokens": Ingredients(importance=False),
}
WINDOW = 2048  # tokens fitted to at once
STEPS = (-6, 0)  # quarter octaves; the rate at a divergence lies on the line through both, in the logarithm
TARGET = 0.0044  # nats a token


class TurnedPages(SequencePages):
    """Pages whose keys are coded as the cache has them."""

    def angles(self, index: int, rows: list[int], slot: int, count: int) -> torch.Tensor:
        return super().angles(index, rows, slot, count)[..., :0]


def measure(model, tokenizer, fitted: list[str], judged: dict[str, str], tokens: int, seed: int, plan: quality.Plan):
    """Fit every variant to the same tokens, and measure it.

    Args:
        fitted, judged: Texts to fit to, and texts to judge by.
        tokens: To fit to.

    Returns:
        JSON types by variant: `rows`, by step `bits_per_value`, `kl` and its error, and `bits_at_target`.

    Raises:
        ConfigError: Texts too short, or the same.
    """
    windows = token_windows(tokenizer, fitted, tokens, WINDOW, seed)
    kinds = {name != TURNED for name in VARIANTS}
    gathered = {plain: gather(model, windows, (4, 4), True, seed, True, plain) for plain in kinds}
    methods = {}
    for name, using in VARIANTS.items():
        made = fit(model, gathered[name != TURNED], (4, 4), {"full": using}, 0.0, True)
        pages = TurnedPages if name == TURNED else SequencePages
        methods |= {f"{name}, step {step}": quality.sequence(made, "full", step, pages=pages) for step in STEPS}
    found = quality.measure(model, tokenizer, judged, methods, plan)["all"]
    result = {}
    for name in VARIANTS:
        rows = {step: found[f"{name}, step {step}"] for step in STEPS}
        fine, coarse = (rows[step] for step in STEPS)
        slope = math.log(coarse["kl"] / fine["kl"]) / (coarse["bits_per_value"] - fine["bits_per_value"])
        bits = fine["bits_per_value"] + math.log(TARGET / fine["kl"]) / slope
        kept = ("bits_per_value", "kl", "kl_error")
        result[name] = {
            "rows": {str(step): {field: row[field] for field in kept} for step, row in rows.items()},
            "bits_at_target": bits,
        }
    return result


def table(found: dict) -> str:
    """A line a variant."""
    whole = found["everything"]["bits_at_target"]
    lines = [f"{'':<30}" + "".join(f"{'step ' + str(s):>26}" for s in STEPS) + f"{f'bits at {TARGET} nats':>24}"]
    for name, one in found.items():
        cells = "".join(f"{row['bits_per_value']:>10.3f} b {row['kl']:>8.5f} nats" for row in one["rows"].values())
        lines.append(f"{name:<30}{cells}{one['bits_at_target']:>16.3f} {one['bits_at_target'] - whole:>+7.3f}")
    return "\n".join(lines)
