"""Timing several ways to do one thing in one run, in turn, and what is said of the times."""

from __future__ import annotations

import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from . import environment

LEAST, MOST = 5, 200  # calls of a way
ASSUMED_CACHE = 32 << 20  # bytes, where the system does not say


def last_level_cache() -> int:
    """Bytes of this processor's largest cache."""
    found = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text[:-1].isdecimal() and text[-1] in "KM":
            found.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]])
    return max(found, default=ASSUMED_CACHE)


def machine() -> dict:
    """What times depend on, as JSON types."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {"cpu": environment.cpu_name(), "cores": cores, "last_level_cache": last_level_cache()}
    facts |= {"system": platform.platform(), "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None}
    return facts | {"versions": {"python": platform.python_version(), **environment.versions()}}


def spread(seconds: list[float]) -> dict:
    """Median, quartiles and mean of at least two times."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"median": median, "q1": low, "q3": high, "mean": statistics.fmean(seconds), "calls": len(seconds)}


def with_speedup(found: dict[str, dict], baseline: str) -> dict[str, dict]:
    """Every entry with `speedup`: the baseline's median over its own."""
    return {name: entry | {"speedup": found[baseline]["median"] / entry["median"]} for name, entry in found.items()}


def interleaved(calls: dict[str, Callable[[int], object]], copies: int, seconds: float) -> dict[str, list[float]]:
    """Times of each call, taken in turn, A B A B, until each has had its part of `seconds`.

    Turns are shuffled: a call finds code and memory as its predecessor left them, and none shall have a better one.

    Returns:
        Seconds, `LEAST` to `MOST` of each; call `i` was given copy `i % copies`.
    """
    for call in calls.values():
        call(copies - 1)
    times: dict[str, list[float]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    order, shuffled = list(calls), random.Random(0)
    for i in range(MOST):
        shuffled.shuffle(order)
        for name in order:
            if i >= LEAST and spent[name] > seconds / len(calls):
                continue
            start = time.perf_counter()
            calls[name](i % copies)
            times[name].append(time.perf_counter() - start)
            spent[name] += times[name][-1]
    return times
