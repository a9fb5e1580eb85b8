"""Load the stored pages of a prompt, or replay its tokens by prefill: whichever was measured to take less time.

Both costs are lines a unit, fitted to what was measured here, recent measurements first. Loading costs some seconds a
page of a form. Prefilling `n` tokens after a context of `c` costs `a * n + b * n * (c + n / 2)` seconds: each token
runs through the weights once and attends to those before it. Both are kept as five weighted sums, in the index.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

PREFILL = "prefill"
_KEPT = 0.9  # of the weight of what was measured, at every new measurement
Sums = tuple[float, float, float, float, float]


@dataclass(frozen=True)
class Rates:
    """Measured rates.

    Args:
        load: Seconds to load and decode a page, by form.
        prefill: Seconds a token, and more seconds a token for every token before it; None where not measured.
    """

    load: Mapping[str, float]
    prefill: tuple[float, float] | None

    @classmethod
    def fit(cls, sums: Mapping[str, Sums]) -> Rates:
        """From the sums of every kind: `"prefill"`, and forms."""
        lines = {kind: _line(*found) for kind, found in sums.items()}
        prefill = lines.pop(PREFILL, None)
        return cls({form: line[0] for form, line in lines.items()}, prefill)


@dataclass(frozen=True)
class Plan:
    """How many of the pages found to load, why, and the modelled seconds of that and of prefilling everything."""

    load: int
    why: str
    seconds: float | None
    prefill_seconds: float | None


def observe(sums: Sums | None, units: int, seconds: float, context: float) -> Sums:
    """The sums with one measurement more: `units` pages or tokens in `seconds`, after `context` tokens on average."""
    cost = seconds / units
    new = (units, units * context, units * context**2, units * cost, units * context * cost)
    return new if sums is None else tuple(_KEPT * old + more for old, more in zip(sums, new, strict=True))


def _line(weight: float, x: float, xx: float, y: float, xy: float) -> tuple[float, float]:
    """Weighted least squares: cost a unit without context, and its slope; neither negative."""
    x, xx, y, xy = (moment / weight for moment in (x, xx, y, xy))
    spread = xx - x * x
    # Contexts that are all alike tell nothing of the slope.
    slope = max((xy - x * y) / spread, 0.0) if spread > 1e-6 * xx else 0.0
    if y < slope * x:
        return 0.0, xy / xx
    return y - slope * x, slope


def plan(pages: int, page_size: int, tokens: int, rates: Rates, form: str | None = None) -> Plan:
    """How many of the first pages to load; the rest of the prompt is prefilled.

    Args:
        pages: Pages found, from the prompt's first token on.
        page_size: Tokens a page.
        tokens: Tokens of the prompt. The last one is always run, since loading gives no logits.
        rates: What was measured.
        form: Of the pages; None takes the form that loads slowest.
    """
    most = min(pages, (tokens - 1) // page_size)
    if most <= 0:
        return Plan(0, "no stored page to load", None, None)
    load = rates.load.get(form) if form else max(rates.load.values(), default=None)
    if load is None or rates.prefill is None:
        missing = "loading" if load is None else "prefill"
        return Plan(most, f"loading all {most} pages: {missing} has not been measured yet", None, None)

    def seconds(count: int) -> float:
        context, (token, slope) = count * page_size, rates.prefill
        left = tokens - context
        return count * load + token * left + slope * left * (context + left / 2)

    # What loading saves grows with the square of its length, so nothing between is better than both ends.
    best = min((most, 0), key=seconds)
    chosen, replay = seconds(best), seconds(0)
    if best:
        why = f"loading {best} pages and prefilling {tokens - best * page_size} tokens: {chosen:.3g} s, "
        why += f"where prefilling all {tokens} would take {replay:.3g} s"
    else:
        why = f"prefilling all {tokens} tokens: {replay:.3g} s, where loading {most} pages and prefilling the rest "
        why += f"would take {seconds(most):.3g} s"
    return Plan(best, why, chosen, replay)


def is_sound(sums: Sums) -> bool:
    """Whether sums that were stored can be what `observe` made."""
    return all(math.isfinite(x) and x >= 0 for x in sums) and sums[0] > 0
