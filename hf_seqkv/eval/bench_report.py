"""Tables of `bench kernels` and `bench decode` for people."""

from __future__ import annotations

import math
from itertools import groupby

from .bench_kernels import BASELINE

WIDTH = 15  # of a column
UNITS = ((1e-3, 1e6, "us"), (1.0, 1e3, "ms"), (math.inf, 1.0, "s"))  # below so many seconds, a factor and its name


def duration(*seconds: float) -> str:
    """Times in the unit of the last, to three digits: `"84.2 us"`, `"82.1-85 us"`."""
    factor, unit = next((factor, unit) for below, factor, unit in UNITS if seconds[-1] < below)
    return "-".join(f"{x * factor:.0f}" if x * factor >= 100 else f"{x * factor:.3g}" for x in seconds) + f" {unit}"


def head(result: dict) -> list[str]:
    """Machine, versions, and the command that gives these numbers again."""
    machine, gpu = result["machine"], result.get("gpu")
    versions = machine["versions"]
    lines = []
    if gpu:
        lines = [f"{gpu['name']}, {gpu['multiprocessors']} multiprocessors, L2 {gpu['cache'] / 2**20:.0f} MiB"]
    return [
        *lines,
        f"{machine['cpu']}, {machine['cores']} usable cores, last-level cache "
        f"{machine['last_level_cache'] / 2**20:.0f} MiB; {machine['system']}",
        f"hf_seqkv {versions['hf_seqkv']}, torch {versions['torch']}, transformers {versions['transformers']}; "
        f"backend {result['backend']}",
        result["command"],
        "",
    ]


def kernels(result: dict) -> str:
    """Two lines a row: medians with the speed against the baseline, and quartiles."""
    lines = [
        *head(result),
        f"a step of one layer, queries in {result['dtype']}: median, speed against grouped {BASELINE} (median over "
        "median); below, quartiles",
    ]
    for shape, rows in groupby(result["rows"], key=lambda row: row["shape"]):
        rows = list(rows)
        names = list(rows[0]["routes"])
        lines += ["", f"{shape} (query heads / KV heads x components); bits of keys / values, c: constant part apart"]
        lines.append(f"{'tokens':>7}{'threads':>8}{'copies':>8}" + "".join(f"{name:>{WIDTH}}" for name in names))
        for row in rows:
            found = row["routes"].values()
            copies = f"{row['copies']}{'*' if row['fits_cache'] else ' '}"
            medians = (f"{duration(x['median'])} x{x['speedup']:.2f}" for x in found)
            quartiles = (duration(x["q1"], x["q3"]) for x in found)
            first = f"{row['tokens']:>7}{row['threads']:>8}{copies:>8}"
            lines.append(first + "".join(f"{text:>{WIDTH}}" for text in medians))
            lines.append(" " * len(first) + "".join(f"{text:>{WIDTH}}" for text in quartiles))
    if any(row["fits_cache"] for row in result["rows"]):
        lines += ["", "* the dense copies fit the last-level cache together: not all of a call comes from memory"]
    errors = [x["error"] for row in result["rows"] for x in row["routes"].values() if "error" in x]
    return "\n".join([*lines, "", f"largest difference from the reference: {max(errors):.1e} of the largest output"])


def cuda_kernels(result: dict) -> str:
    """Three lines a row: on the GPU's clock, as bytes a second of it, and as called without a graph."""
    lines = [
        *head(result),
        f"a step of one layer, {result['dtype']}: median on the GPU's own clock (a CUDA graph) and speed against "
        f"{result['baseline']}; below, GB/s of keys and values; below, as called one by one, without a graph",
    ]
    for shape, rows in groupby(result["rows"], key=lambda row: row["shape"]):
        rows = list(rows)
        names = "".join(f"{name:>{WIDTH}}" for name in rows[0]["routes"])
        lines += ["", f"{shape} (query heads / KV heads x components); bits of keys / values, c: constant part apart"]
        lines.append(f"{'tokens':>7}{'batch':>6}{'copies':>7}{names}")
        for row in rows:
            found = row["routes"].values()
            first = f"{row['tokens']:>7}{row['batch']:>6}{row['copies']:>7}"
            for start, texts in (
                (first, (f"{duration(x['device']['median'])} x{x['device']['speedup']:.2f}" for x in found)),
                ("", (f"{x['gigabytes_per_second']:.0f} GB/s" for x in found)),
                ("", (f"{duration(x['eager']['median'])} x{x['eager']['speedup']:.2f}" for x in found)),
            ):
                lines.append(f"{start:<{len(first)}}" + "".join(f"{text:>{WIDTH}}" for text in texts))
    errors = [x["error"] for row in result["rows"] for x in row["routes"].values() if "error" in x]
    return "\n".join([*lines, "", f"largest difference from the reference: {max(errors):.1e} of the largest output"])


def decode(result: dict) -> str:
    """A block for every dtype and context, a line a cache."""
    lines = head(result)
    lines.append(f"{result['model']}; {result['threads']} threads; whole decode steps, taken in turn")
    for run in result["runs"]:
        best = run["baseline"]
        of = f" of {run['batch']} sequences" if run["batch"] > 1 else ""
        lines += ["", f"{run['dtype']}, {run['context']} tokens{of} and {run['new_tokens']} steps"]
        lines.append(f"{'':<12}{'median':>12}{'quartiles':>20}{'mean':>12}{'tokens/s':>10}{'':>22}{'prefill':>12}")
        for name, found in run["caches"].items():
            step = found["step"]
            note = f"x{found['speedup']:.3f} of {best}" if best and name != best else ""
            lines.append(
                f"{name:<12}{duration(step['median']):>12}{duration(step['q1'], step['q3']):>20}"
                f"{duration(step['mean']):>12}{found['tokens_per_second']:>10.2f}{note:>22}"
                f"{duration(found['prefill_seconds']):>12}"
            )
            if "pages" in found:
                pages = found["pages"]
                lines.append(
                    f"{'':<12}making pages: {pages['prefill_share']:.2%} of its prefill; {pages['decode_share']:.2%} "
                    f"of its steps, of which {pages['steps']} made any"
                )
    return "\n".join(lines)
